"""Cells to tables, folders and batches, and back."""

import contextlib
import errno
import multiprocessing
import re
import shutil
import time
import tracemalloc
import warnings
from pathlib import Path

import anndata as ad
import datasets
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch

from scrdit_diffusers import (
    CellCollator,
    CellRows,
    SCRDiTProcessor,
    anndata_builder,
    anndata_to_table,
    data,
    fit_table,
    iterate_rows,
    open_table,
    read_cells,
    read_labels,
    save_table,
    split_cells,
    split_stream,
    table_to_anndata,
)
from scrdit_diffusers.anndata_builder import CellFile
from scrdit_diffusers.data import rows_to_matrix, token_positions


def assert_same_cells(left: ad.AnnData, right: ad.AnnData) -> None:
    """Values, genes and labels are equal; obs_names and categorical dtypes are not part of a table."""
    assert np.array_equal(left.X.toarray(), right.X.toarray())
    pd.testing.assert_frame_equal(left.var, right.var, check_names=False)
    assert list(left.obs) == list(right.obs)
    for key in left.obs:
        assert list(left.obs[key]) == list(right.obs[key])


# -- table -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_chunk", [7, 10_000])
def test_table_round_trip(adata, monkeypatch, rows_per_chunk):
    monkeypatch.setattr(data, "ROWS_PER_CHUNK", rows_per_chunk)
    table = anndata_to_table(adata)
    assert table.column_names == ["genes", "expressions", "cell_type", "batch", "age"]
    assert len(table) == 60
    assert_same_cells(table_to_anndata(table, adata.var), adata)


def test_table_is_sparse(adata):
    adata.X = sp.csr_matrix(adata.X.toarray() * (np.arange(60) != 2)[:, None])
    table = anndata_to_table(adata)
    assert len(table[2]["genes"]) == 0
    row, dense = table[5], adata.X[5].toarray().ravel()
    assert row["genes"] == np.flatnonzero(dense).tolist()
    assert row["expressions"] == dense[dense > 0].tolist()
    assert table.features["genes"].feature.dtype == "int32"
    assert table.features["expressions"].feature.dtype == "float32"


@pytest.mark.parametrize("convert", [sp.csc_matrix, lambda x: x.toarray(), lambda x: x.astype(np.int64)])
def test_table_of_other_matrices(adata, convert):
    expected = adata.X.toarray()
    adata.X = convert(adata.X)
    assert np.array_equal(table_to_anndata(anndata_to_table(adata), adata.var).X.toarray(), expected)


def test_table_of_a_layer_with_chosen_columns(adata):
    table = anndata_to_table(adata, layer="lognorm", obs_columns=["batch"])
    assert table.column_names == ["genes", "expressions", "batch"]
    back = table_to_anndata(table, adata.var)
    assert np.array_equal(back.X.toarray(), adata.layers["lognorm"].toarray())


def test_table_after_selecting_and_shuffling(adata):
    order = np.random.default_rng(0).permutation(60)[:20]
    back = table_to_anndata(anndata_to_table(adata).select(order), adata.var)
    assert_same_cells(back, adata[order].copy())


@pytest.mark.parametrize("column", ["text", "category"])
def test_missing_labels_stay_missing(adata, column):
    """A label "nan" would pass for a cell type, and its cells would be trained on."""
    labels = pd.Series(["x", None, "y"] * 20, index=adata.obs_names, dtype=object)
    adata.obs["label"] = labels.astype("category") if column == "category" else labels
    back = table_to_anndata(anndata_to_table(adata), adata.var)
    assert back.obs["label"].isna().tolist() == labels.isna().tolist()


def test_labels_missing_from_a_whole_chunk(adata, monkeypatch):
    monkeypatch.setattr(data, "ROWS_PER_CHUNK", 30)
    adata.obs["donor"] = [None] * 30 + ["d1"] * 30
    back = table_to_anndata(anndata_to_table(adata), adata.var)
    assert back.obs["donor"].tolist() == [None] * 30 + ["d1"] * 30


@pytest.mark.parametrize("key", ["genes", "expressions"])
def test_refuses_obs_columns_of_the_tables_own_names(adata, key):
    adata.obs[key] = 1
    with pytest.raises(ValueError, match=key):
        anndata_to_table(adata)


def test_refuses_values_that_are_no_expression(adata):
    adata.X.data[0] = np.nan
    with pytest.raises(ValueError, match=r"adata\.X holds 1 NaN"):
        anndata_to_table(adata)


# -- files -------------------------------------------------------------------------------------------------------------


def test_reads_h5ad(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert_same_cells(read_cells(tmp_path / "cells.h5ad"), adata)


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default")  # anndata, on writing
def test_reads_zarr(adata, tmp_path):
    adata.write_zarr(tmp_path / "cells.zarr")
    assert_same_cells(read_cells(str(tmp_path / "cells.zarr")), adata)


def test_reads_a_table_folder(adata, tmp_path):
    save_table(adata, tmp_path / "table")
    assert_same_cells(read_cells(tmp_path / "table"), adata)


def test_saves_the_layer_it_is_told_to(adata, tmp_path):
    save_table(adata, tmp_path / "table", layer="lognorm")
    assert np.array_equal(read_cells(tmp_path / "table").X.toarray(), adata.layers["lognorm"].toarray())


def test_a_saved_table_is_an_ordinary_data_set(adata, tmp_path):
    """What others read it with is `datasets` alone, and a Hub upload goes through parquet."""
    save_table(adata, tmp_path / "table")
    table = datasets.load_from_disk(str(tmp_path / "table"))
    table.to_parquet(str(tmp_path / "cells.parquet"))
    table = datasets.Dataset.from_parquet(str(tmp_path / "cells.parquet"), cache_dir=str(tmp_path / "cache"))
    assert_same_cells(table_to_anndata(table, adata.var), adata)


@pytest.mark.parametrize("name", ["no.h5ad", "no.zarr", "no", "a/b/c"])
def test_missing_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        read_cells(name)


@pytest.mark.parametrize("name", ["cells.csv", "folder"])
def test_files_of_another_kind(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.write_text("a,b")
    with pytest.raises(ValueError, match=f"{name} is neither a .h5ad file, nor a .zarr store, nor a folder"):
        read_cells(path)


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(flavor="all"),
        dict(genes=["gene9", "gene3", "gene20"]),
        dict(flavor="all", value_space="log_normalized", target_sum=1e4, zero_negation=True),
    ],
    ids=["counts", "some genes", "log-normalised"],
)
def test_a_batch_is_the_direct_transform(adata, kwargs):
    processor = SCRDiTProcessor.from_anndata(adata, ["cell_type", "batch"], **kwargs)
    indices = [5, 59, 0, 17]
    batch = CellCollator(processor, adata.var)(CellRows(anndata_to_table(adata)).__getitems__(indices))
    cells = adata[indices].copy()
    expected = processor.transform(processor.get_values(cells)).astype(np.float32)
    assert batch["values"].dtype == torch.float32
    assert np.array_equal(batch["values"].numpy(), expected)
    assert np.array_equal(batch["class_labels"].numpy(), processor.encode_labels(cells.obs))
    assert "counts" not in batch


@pytest.mark.parametrize("kwargs", [dict(flavor="all"), dict(genes=["gene9", "gene3", "gene20"])])
def test_a_batch_with_its_counts(adata, kwargs):
    processor = SCRDiTProcessor.from_anndata(adata, ["cell_type", "batch"], **kwargs)
    rows = CellRows(anndata_to_table(adata)).__getitems__([5, 59, 0, 17])
    batch = CellCollator(processor, adata.var, counts=True)(rows)
    assert batch["counts"].dtype == batch["library_size"].dtype == torch.float32
    assert np.array_equal(batch["counts"].numpy(), adata[[5, 59, 0, 17], processor.var_names].X.toarray())
    assert torch.equal(batch["library_size"], batch["counts"].sum(dim=1))


def test_a_batch_with_the_counts_behind_log_normalised_values(adata):
    """Library sizes are over all genes."""
    options = dict(value_space="log_normalized", recover_counts=True, genes=["gene9", "gene3", "gene20"])
    processor = SCRDiTProcessor.from_anndata(adata, "cell_type", "lognorm", **options)
    rows = CellRows(anndata_to_table(adata, "lognorm")).__getitems__([5, 59, 0, 17])
    batch = CellCollator(processor, adata.var, counts=True)(rows)
    counts = adata[[5, 59, 0, 17]].layers["counts"].toarray()
    assert np.array_equal(batch["counts"].numpy(), counts[:, [9, 3, 20]])
    np.testing.assert_allclose(batch["library_size"], counts.sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(batch["values"], processor.transform(counts[:, [9, 3, 20]]), rtol=1e-6)


def test_refuses_the_counts_of_log_normalised_values(adata):
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", value_space="log_normalized", target_sum=1e4)
    with pytest.raises(ValueError, match="counts=True needs a processor whose model sees counts"):
        CellCollator(processor, adata.var, counts=True)


def test_an_unconditional_batch_has_no_labels(adata):
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all")
    rows = CellRows(anndata_to_table(adata)).__getitems__([1, 2, 3])
    assert CellCollator(processor, adata.var)(rows)["class_labels"].shape == (3, 0)


def test_a_data_loader_serves_every_cell_once(adata, processor):
    loader = torch.utils.data.DataLoader(
        CellRows(anndata_to_table(adata)),
        batch_size=16,
        shuffle=True,
        collate_fn=CellCollator(processor, adata.var),
    )
    batches = list(loader)
    assert [len(batch["values"]) for batch in batches] == [16, 16, 16, 12]
    served = torch.cat([batch["values"] for batch in batches])
    expected = torch.from_numpy(processor.transform(adata.X)).float()
    assert torch.equal(served.sum(1).sort().values, expected.sum(1).sort().values)


def test_numeric_labels_survive_the_table(adata):
    adata.obs["cluster"] = pd.Categorical([3, 1, 20] * 20)
    processor = SCRDiTProcessor.from_anndata(adata, "cluster", flavor="all")
    rows = CellRows(anndata_to_table(adata)).__getitems__(list(range(60)))
    codes = CellCollator(processor, adata.var)(rows)["class_labels"]
    assert np.array_equal(codes.numpy(), processor.encode_labels(adata.obs))


def test_refuses_a_table_without_the_models_genes(adata, processor):
    with pytest.raises(ValueError, match=r"2 of the model's 23 genes are missing from the data"):
        CellCollator(processor, adata.var.iloc[2:])


def test_refuses_a_table_without_the_models_labels(adata, processor):
    rows = CellRows(anndata_to_table(adata, obs_columns=["batch"])).__getitems__([0])
    with pytest.raises((ValueError, KeyError), match="cell_type"):
        CellCollator(processor, adata.var)(rows)


def test_rows_of_a_slice_keep_their_offsets(adata):
    """Arrow slices share buffers: a batch from the middle must not read the values of the first rows."""
    rows: pa.Table = anndata_to_table(adata).with_format("arrow")[:]
    matrix = data.rows_to_matrix(rows.slice(20, 10), adata.n_vars)
    assert np.array_equal(matrix.toarray(), adata.X[20:30].toarray())


# -- split -------------------------------------------------------------------------------------------------------------


def test_split_takes_its_share_of_every_combination(adata):
    stay, aside = split_cells(adata, ["cell_type", "batch"], 0.25, seed=0)
    assert sorted([*stay, *aside]) == list(range(60))
    groups = adata.obs.reset_index().groupby(["cell_type", "batch"], observed=True).indices
    assert {key: len(np.intersect1d(cells, aside)) for key, cells in groups.items()} == {
        key: round(0.25 * len(cells)) for key, cells in groups.items()
    }


def test_split_depends_on_the_seed_only(adata):
    first, second, other = (split_cells(adata, [], 0.25, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == second != other
    assert len(first) == 15


def test_split_refuses_missing_labels(adata):
    adata.obs.loc["cell3", "cell_type"] = np.nan
    with pytest.raises(ValueError, match=r"obs\['cell_type'\] holds 1 NaN"):
        split_cells(adata, ["cell_type"], 0.25, seed=0)


# -- tables of AnnData files ----------------------------------------------------------------------------------------


def write(adata: ad.AnnData, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Writing zarr v2 data will no longer be the default")  # anndata
        adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    return path


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("convert", [sp.csr_matrix, sp.csc_matrix, lambda x: x.toarray(), lambda x: x.astype(np.int64)])
def test_open_table_is_the_file(adata, tmp_path, monkeypatch, suffix, convert):
    monkeypatch.setattr(anndata_builder, "ROWS_PER_CHUNK", 7)
    expected = adata.copy()
    adata.X = convert(adata.X)
    table, var = open_table(write(adata, tmp_path / f"cells{suffix}"), cache_dir=tmp_path / "cache")
    assert_same_cells(table_to_anndata(table, var), expected)
    assert table.cache_files and Path(table.cache_files[0]["filename"]).is_relative_to(tmp_path / "cache")


def test_open_table_keeps_the_order_of_categories(adata, tmp_path):
    table, _ = open_table(write(adata, tmp_path / "cells.h5ad"))
    assert table.features["cell_type"].names == ["T", "B", "NK"]
    assert list(read_labels(table, ["cell_type"])["cell_type"].cat.categories) == ["T", "B", "NK"]


def test_open_table_of_a_layer_with_chosen_columns(adata, tmp_path):
    table, var = open_table(write(adata, tmp_path / "cells.h5ad"), layer="lognorm", obs_columns=["batch"])
    assert table.column_names == ["genes", "expressions", "batch"]
    assert np.array_equal(table_to_anndata(table, var).X.toarray(), adata.layers["lognorm"].toarray())


def test_open_table_reads_no_more_than_a_chunk(adata, tmp_path, monkeypatch):
    """A file larger than memory is never asked for all its rows, nor for many values of few rows."""
    read = []
    matrix = CellFile.matrix
    monkeypatch.setattr(CellFile, "matrix", lambda self, layer, rows: read.append(rows) or matrix(self, layer, rows))
    monkeypatch.setattr(anndata_builder, "ROWS_PER_CHUNK", 25)
    path = write(adata, tmp_path / "cells.h5ad")
    open_table(path, cache_dir=tmp_path / "cache")
    assert read == [slice(0, 25), slice(25, 50), slice(50, 60)]
    read.clear()
    monkeypatch.setattr(anndata_builder, "VALUES_PER_CHUNK", 300)
    table, var = open_table(path, cache_dir=tmp_path / "other")
    sizes = [adata.X[rows].nnz for rows in read]
    assert [rows.start for rows in read] == [0, *(rows.stop for rows in read[:-1])] and read[-1].stop == 60
    assert all(size <= 300 for size in sizes) and min(sizes[:-1]) > 300 - 23  # one row more would not fit
    assert_same_cells(table_to_anndata(table, var), adata)


def test_a_table_is_converted_once(adata, tmp_path, monkeypatch):
    path = write(adata, tmp_path / "cells.h5ad")
    first, _ = open_table(path, cache_dir=tmp_path / "cache")
    with monkeypatch.context() as context:
        context.setattr(anndata_builder.AnnDataBuilder, "_generate_tables", None)  # would raise if called
        again, _ = open_table(path, cache_dir=tmp_path / "cache")
    assert again.cache_files == first.cache_files
    other, _ = open_table(path, layer="lognorm", cache_dir=tmp_path / "cache")
    assert other.cache_files != first.cache_files


def test_a_changed_file_is_converted_again(adata, tmp_path):
    path = write(adata, tmp_path / "cells.h5ad")
    open_table(path, cache_dir=tmp_path / "cache")
    adata.X.data[:] = 7
    write(adata, path)
    table, var = open_table(path, cache_dir=tmp_path / "cache")
    assert set(table_to_anndata(table, var).X.data) == {7}


def convert_slowly(path, cache, seconds_per_chunk, sender):
    chunks = CellFile.chunks

    def slow_chunks(self, layer):
        for rows in chunks(self, layer):
            yield rows
            sender.send("converting")
            time.sleep(seconds_per_chunk)

    anndata_builder.ROWS_PER_CHUNK, CellFile.chunks = 10, slow_chunks
    sender.send(len(open_table(path, cache_dir=cache)[0]))


def open_elsewhere(path, cache, seconds_per_chunk):
    """Open a file in another process, slowly; it sends a message for each chunk, and the number of cells at last."""
    messages, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(
        target=convert_slowly, args=(path, cache, seconds_per_chunk, sender)
    )
    process.start()
    sender.close()
    return process, messages


def all_of(messages):
    received = []
    with contextlib.suppress(EOFError):
        while True:
            received.append(messages.recv())
    return received


def test_a_conversion_that_was_killed_leaves_no_table(adata, tmp_path):
    path = write(adata, tmp_path / "cells.h5ad")
    process, messages = open_elsewhere(path, tmp_path / "cache", 60)
    assert messages.recv() == "converting"
    process.kill()
    process.join()
    assert list((tmp_path / "cache").rglob("*.arrow"))  # of the half that was written
    table, var = open_table(path, cache_dir=tmp_path / "cache")
    assert_same_cells(table_to_anndata(table, var), adata)


def test_two_processes_may_open_at_once(adata, tmp_path):
    path = write(adata, tmp_path / "cells.h5ad")
    started = [open_elsewhere(path, tmp_path / "cache", 0.1) for _ in range(2)]
    received = sorted((all_of(messages) for _, messages in started), key=len)
    assert received == [[60], ["converting"] * 6 + [60]]  # one converts, the other waits
    for process, _ in started:
        process.join()


# -- several files --------------------------------------------------------------------------------------------------


@pytest.fixture
def two_files(adata, tmp_path):
    """Genes 0 to 19, and 5 to 22 in another order with other names; a category that only the second has."""
    first, second = adata[:25, :20].copy(), adata[25:, np.r_[22:4:-1]].copy()
    second.var_names = [f"other{name}" for name in second.var_names]
    second.obs["cell_type"] = second.obs["cell_type"].cat.rename_categories({"NK": "NKT"})
    first.obs["age"] = first.obs["age"].astype(int)
    return [write(first, tmp_path / "a.h5ad"), write(second, tmp_path / "b.h5ad")]


@pytest.mark.parametrize("join", ["inner", "outer"])
def test_files_are_joined_as_anndata_joins_them(adata, two_files, tmp_path, join, caplog):
    with caplog.at_level("INFO", "scrdit_diffusers.data"):
        table, var = open_table(tmp_path, join=join, gene_key="gene_ids", cache_dir=tmp_path / "cache")
    back = table_to_anndata(table, var)
    parts = [ad.read_h5ad(path) for path in two_files]
    for part in parts:
        part.var_names = part.var["gene_ids"]
    expected = ad.concat(parts, join=join)
    assert sorted(var["gene_ids"]) == sorted(expected.var_names)
    expected = expected[:, var["gene_ids"]]
    assert np.array_equal(back.X.toarray(), expected.X.toarray())
    assert back.obs["cell_type"].tolist() == expected.obs["cell_type"].tolist()
    assert back.obs["age"].tolist() == expected.obs["age"].tolist()
    assert set(table.features["cell_type"].names) == {"T", "B", "NK", "NKT"}
    lacking = "20 of the 23 that are used, lacks 3 (taken as zero)" if join == "outer" else "15 of the 15 that are used"
    assert f"{two_files[0]}: 20 genes, {lacking}" in caplog.text


def test_missing_labels_are_refused_before_anything_is_converted(adata, tmp_path, monkeypatch):
    adata.obs.loc[adata.obs_names[3:5], "cell_type"] = np.nan
    path = write(adata, tmp_path / "cells.h5ad")
    monkeypatch.setattr(anndata_builder.AnnDataBuilder, "for_files", lambda *args: pytest.fail("it was converted"))
    with pytest.raises(ValueError, match=r"cells\.h5ad: obs\['cell_type'\] holds 2 NaN"):
        open_table(path, labels_key=["cell_type"])


def test_files_without_common_genes_are_refused(two_files):
    with pytest.raises(ValueError, match="no gene in common; their genes look like"):
        open_table(two_files)


def test_files_of_names_and_ids_are_not_taken_for_other_genes(two_files):
    with pytest.raises(ValueError, match="No gene is in two of the files.*gene_key"):
        open_table(two_files, join="outer")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(gene_key="symbol"), "has no column 'symbol'"),
        (dict(join="left"), "join must be one of"),
        (dict(layer="nothing"), r"a\.h5ad: adata\.layers\['nothing'\] does not exist; the layers are"),
        (dict(layer="lognorm", counts=True), r"a\.h5ad: .* non-integers .* adata\.X looks like counts: use layer=None"),
        (dict(obs_columns=["celltype"]), "did you mean 'cell_type'"),
        (dict(streaming=True), "streaming is for data sets"),
    ],
)
def test_open_table_refuses(two_files, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        open_table(two_files, cache_dir=tmp_path / "cache", **kwargs)
    assert not (tmp_path / "cache").exists()


def write_error(folder, num_proc):
    anndata_builder.ROWS_PER_CHUNK = 10
    CellFile.check = lambda *args: None  # which sees the first cells only
    try:
        open_table(folder, cache_dir=folder / "cache", num_proc=num_proc)
    except ValueError as error:
        (folder / "error.txt").write_text(str(error))


@pytest.mark.parametrize("num_proc", [None, 2])
def test_values_that_cannot_be_are_refused_wherever_they_are(adata, tmp_path, num_proc):
    """Also where another process reads them, whose errors `datasets` does not tell."""
    adata.X.data[-1] = np.inf
    write(adata[:30].copy(), tmp_path / "a.h5ad")
    write(adata[30:].copy(), tmp_path / "b.h5ad")
    process = multiprocessing.get_context("forkserver").Process(target=write_error, args=(tmp_path, num_proc))
    process.start()  # `datasets` forks, which the process of the tests with its threads must not
    process.join()
    message = (tmp_path / "error.txt").read_text()
    assert re.search(r"b\.h5ad, cells from (20|0) holds 1 NaN or infinite", message)


def test_values_that_are_no_counts_are_refused_with_their_file(adata, tmp_path, monkeypatch):
    adata.X.data[-1] = 0.5
    monkeypatch.setattr(CellFile, "check", lambda *args: None)
    path = write(adata, tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=r"cells\.h5ad, cells from 0 was taken as counts but holds .* 0\.5"):
        open_table(path, counts=True, cache_dir=tmp_path / "cache")
    assert len(open_table(path, cache_dir=tmp_path / "cache")[0]) == 60


def peak_memory(adata, path, cache) -> int:
    """Bytes that converting a file takes at most beyond those at its beginning; those of NumPy and Python."""
    write(adata, path)
    tracemalloc.start()
    try:
        open_table(path, cache_dir=cache)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """Neither values nor obs nor indptr are read as a whole; 30 times the cells may not take half as much again."""
    monkeypatch.setattr(anndata_builder, "ROWS_PER_CHUNK", 1000)
    rng = np.random.default_rng(0)
    peaks = []
    for num_cells in (1000, 1000, 30_000):  # the first one imports what the others need
        obs = pd.DataFrame({"barcode": [f"{cell:040d}" for cell in range(num_cells)]}).rename(index="cell{}".format)
        obs["depth"] = np.arange(num_cells)
        adata = ad.AnnData(sp.random(num_cells, 200, 0.1, "csr", np.float32, rng).ceil(), obs=obs)
        peaks.append(peak_memory(adata, tmp_path / f"{len(peaks)}.h5ad", tmp_path / "cache"))
    assert peaks[2] < 1.5 * peaks[1]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_columns_with_missing_values_are_read_in_parts(adata, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(anndata_builder, "ROWS_PER_CHUNK", 25)
    missing = np.arange(60) % 7 == 3
    adata.obs["number"] = pd.array(np.arange(60), dtype="Int64")
    adata.obs["flag"] = pd.array(np.arange(60) % 2 == 0, dtype="boolean")
    adata.obs["plain"] = np.arange(60) % 3 == 0
    adata.obs.loc[missing, ["number", "flag"]] = pd.NA
    table, _ = open_table(write(adata, tmp_path / f"cells{suffix}"), cache_dir=tmp_path / "cache")
    assert [table.features[key].dtype for key in ("number", "flag", "plain")] == ["int64", "bool", "bool"]
    assert table["number"][:] == [None if skip else i for i, skip in enumerate(missing)]
    assert table["flag"][:] == [None if skip else i % 2 == 0 for i, skip in enumerate(missing)]
    assert table["plain"][:] == [i % 3 == 0 for i in range(60)]


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
def test_categories_as_anndata_0_7_stores_them(adata, tmp_path):
    """Read as plain numbers, they would be other labels."""
    path = write(adata, tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        obs, codes, names = file["obs"], file["obs/cell_type/codes"][:], file["obs/cell_type/categories"][:]
        del obs["cell_type"]
        obs["__categories/cell_type"], obs["cell_type"] = names, codes
        obs["cell_type"].attrs["categories"] = obs["__categories/cell_type"].ref
        obs.attrs["encoding-version"] = "0.1.0"
    assert ad.read_h5ad(path).obs["cell_type"].tolist() == adata.obs["cell_type"].tolist()
    table, var = open_table(path, cache_dir=tmp_path / "cache")
    assert table.features["cell_type"].names == ["T", "B", "NK"]
    assert table_to_anndata(table, var).obs["cell_type"].tolist() == adata.obs["cell_type"].tolist()


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def overwrite_values(path: Path) -> None:
    """Damage the last compressed chunk of the values, which no first look sees."""
    with h5py.File(path, "r") as file:
        values = file["X/data"].id
        place = values.get_chunk_info(values.get_num_chunks() - 1).byte_offset
    content = bytearray(path.read_bytes())
    content[place : place + 50] = bytes(50)
    path.write_bytes(content)


def drop_rows(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        values = ad.io.read_elem(file["X"])[:-1]
        del file["X"]
        ad.io.write_elem(file, "X", values)


def drop_values(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for name in ("data", "indices"):
            values = file[f"X/{name}"][:-1]
            del file[f"X/{name}"]
            file[f"X/{name}"] = values


def stop_writing(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["var"]


def make_obs_an_array(path: Path) -> None:
    """Store obs as anndata 0.6 did."""
    with h5py.File(path, "r+") as file:
        del file["obs"]
        file["obs"] = np.zeros(60, dtype=[("index", "S5")])


def lose_chunk(path: Path) -> None:
    """Lose a file of the store."""
    next(part for part in sorted(path.glob("X/data/**/*")) if part.is_file() and part.name[-1].isdigit()).unlink()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("b.h5ad", shorten, "cannot be opened as a .h5ad file"),
        ("b.h5ad", overwrite_values, "damaged: .* Copy or write it again"),
        ("b.h5ad", drop_rows, r"X has \(59, 23\) cells x genes, but obs and var have \(60, 23\)"),
        ("b.h5ad", drop_values, "X is incomplete"),
        ("b.h5ad", stop_writing, "lacks var. Was it written to its end"),
        ("b.h5ad", make_obs_an_array, "obs of .* is not stored as anndata 0.7"),
        ("b.zarr", lose_chunk, "1 chunks of X are missing"),
    ],
)
def test_a_damaged_file_among_others_is_named(adata, tmp_path, name, damage, message):
    write(adata, tmp_path / "a.h5ad")
    path = tmp_path / name
    if path.suffix == ".zarr":
        write(adata, path)
    else:
        adata.write_h5ad(path, compression="gzip")
    damage(path)
    with pytest.raises(ValueError, match=message) as raised:
        open_table(tmp_path, cache_dir=tmp_path / "cache")
    assert str(path) in str(raised.value) and "a.h5ad" not in str(raised.value)


def test_a_damaged_end_is_found_while_converting(adata, tmp_path, monkeypatch):
    adata.write_h5ad(tmp_path / "cells.h5ad", compression="gzip")
    overwrite_values(tmp_path / "cells.h5ad")
    monkeypatch.setattr(CellFile, "check", lambda *args: None)
    with pytest.raises(ValueError, match=r"cells\.h5ad, cells from 0: the file is damaged: "):
        open_table(tmp_path, cache_dir=tmp_path / "cache")


def test_labels_that_one_file_lacks_are_refused_with_it(adata, tmp_path):
    write(adata, tmp_path / "a.h5ad")
    adata.obs = adata.obs.rename(columns={"cell_type": "celltype"})
    write(adata, tmp_path / "b.h5ad")
    with pytest.raises(ValueError, match=r"b\.h5ad: obs has no column 'cell_type'.* did you mean 'celltype'"):
        open_table(tmp_path, labels_key=["cell_type"], cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_without_room_is_refused_before_anything_is_converted(adata, tmp_path, monkeypatch):
    path = write(adata, tmp_path / "cells.h5ad")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(datasets.utils.py_utils, "disk_usage", lambda folder: usage._replace(free=8 * adata.X.nnz - 1))
    monkeypatch.setattr(anndata_builder.AnnDataBuilder, "_generate_tables", None)  # would raise if called
    with pytest.raises(OSError, match="could not be written to the cache .*Not enough disk space.* HF_DATASETS_CACHE"):
        open_table(path, cache_dir=tmp_path / "cache")


def test_a_disk_that_is_full_while_converting(adata, tmp_path, monkeypatch):
    def full(self, table, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write(adata, tmp_path / "cells.h5ad")
    with monkeypatch.context() as context:
        context.setattr(datasets.arrow_writer.ArrowWriter, "write_table", full)
        with pytest.raises(OSError, match="could not be written to the cache .*No space left.* HF_DATASETS_CACHE"):
            open_table(path, cache_dir=tmp_path / "cache")
    assert len(open_table(path, cache_dir=tmp_path / "cache")[0]) == 60


def test_a_cache_of_another_user(adata, tmp_path, monkeypatch):
    """As root may write everywhere, the refusal is that of the lock."""

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    path = write(adata, tmp_path / "cells.h5ad")
    monkeypatch.setattr(datasets.builder, "FileLock", refuse)
    with pytest.raises(OSError, match="could not be written to the cache .*Permission denied.* HF_DATASETS_CACHE"):
        open_table(path, cache_dir=tmp_path / "cache")


# -- data sets with tokens, streams -----------------------------------------------------------------------------------


@pytest.fixture
def tahoe(adata, tmp_path):
    """A folder laid out as tahoebio/Tahoe-100M: token ids from 3 on, and a special token 1 of value -2 first."""
    folder = tmp_path / "tahoe"
    (folder / "data").mkdir(parents=True)
    tokens = np.random.default_rng(0).permutation(23) + 3
    metadata = {"gene_symbol": adata.var_names, "ensembl_id": adata.var["gene_ids"], "token_id": tokens}
    (folder / "metadata").mkdir()
    pd.DataFrame(metadata).to_parquet(folder / "metadata" / "gene_metadata.parquet", index=False)
    for part, cells in enumerate(np.split(np.arange(60), 3)):
        rows = [adata.X[i] for i in cells]
        table = {
            "genes": [[1, *tokens[row.indices].tolist()] for row in rows],
            "expressions": [[-2.0, *row.data.tolist()] for row in rows],
            "drug": adata.obs["cell_type"].iloc[cells].astype(str).tolist(),
            "plate": adata.obs["batch"].iloc[cells].tolist(),
        }
        path = folder / "data" / f"train-{part:05d}-of-00003.parquet"
        pq.write_table(pa.table(table | {"expressions": pa.array(table["expressions"], pa.list_(pa.float32()))}), path)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: expression_data\n  default: true\n  data_files: data/train-*\n"
        "- config_name: gene_metadata\n  data_files: metadata/gene_metadata.parquet\n---\n"
    )
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_become_genes(adata, tahoe, tmp_path, streaming):
    table, var = open_table(tahoe, streaming=streaming, cache_dir=tmp_path / "cache")
    assert list(var.index) == list(adata.var_names)
    rows = pa.concat_tables(iterate_rows(table, 11, ["genes", "expressions"]))
    assert np.array_equal(rows_to_matrix(rows, len(var), token_positions(var)).toarray(), adata.X.toarray())


def test_genes_of_tokens_may_be_named_by_ensembl_id(adata, tahoe, tmp_path):
    _, var = open_table(tahoe, gene_key="ensembl_id", cache_dir=tmp_path / "cache")
    assert list(var.index) == list(adata.var["gene_ids"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_processor_learned_from_tokens_is_that_of_the_cells(adata, tahoe, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(data, "ROWS_PER_CHUNK", 13)
    table, var = open_table(tahoe, streaming=streaming, cache_dir=tmp_path / "cache")
    processor, _ = fit_table(table, var, ["drug", "plate"], flavor="all")
    adata.obs = adata.obs.rename(columns={"cell_type": "drug", "batch": "plate"}).astype({"drug": str})
    expected = SCRDiTProcessor.from_anndata(adata, ["drug", "plate"], flavor="all")
    assert processor.composition == expected.composition
    assert processor.conditions == expected.conditions
    assert processor.gene_ids == expected.gene_ids
    np.testing.assert_allclose(processor.mean, expected.mean)
    rows = next(iterate_rows(table, 60, ["genes", "expressions", "drug", "plate"]))
    values = CellCollator(processor, var, counts=True)(rows)["counts"]
    assert np.array_equal(values.numpy(), adata.X.toarray())


def test_an_unknown_token_is_refused(tahoe, tmp_path):
    table, var = open_table(tahoe, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"\d+ values belong to tokens that var does not have, such as \d+"):
        table_to_anndata(table, var.iloc[:-3])


def test_integer_expressions_are_read():
    rows = pa.table({"genes": [[0, 2], [], [1]], "expressions": [[5, 1], [], [2]]})
    assert rows_to_matrix(rows, 3).toarray().tolist() == [[5, 0, 1], [0, 0, 0], [0, 2, 0]]


def test_a_folder_without_a_vocabulary_is_refused(tahoe, tmp_path):
    (tahoe / "README.md").unlink()
    with pytest.raises(ValueError, match=r"neither var\.parquet nor the configuration gene_metadata"):
        open_table(tahoe, cache_dir=tmp_path / "cache")


def test_what_was_learned_is_kept(adata, tmp_path, monkeypatch):
    table, var = open_table(write(adata, tmp_path / "cells.h5ad"), cache_dir=tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    first, statistics = fit_table(table.select(range(40)), var, "cell_type", flavor="all")
    with monkeypatch.context() as context:
        context.setattr(data, "fit_chunks", None)  # would raise if called
        again, kept = fit_table(table.select(range(40)), var, "cell_type", flavor="all")
    assert again.to_json_string() == first.to_json_string()
    assert np.array_equal(kept.count_sum, statistics.count_sum)
    other, _ = fit_table(table.select(range(41)), var, "cell_type", flavor="all")
    assert other.to_json_string() != first.to_json_string()


@pytest.mark.parametrize("flavor", ["seurat", "seurat_v3"])
def test_what_was_learned_does_not_depend_on_the_number_of_processes(adata, tmp_path, monkeypatch, flavor):
    """Real processes, which are sent parts of a selection of rows of the table on disk."""
    monkeypatch.setattr(data, "ROWS_PER_PART", 16)
    table, var = open_table(write(adata, tmp_path / "cells.h5ad"), cache_dir=tmp_path / "cache")
    table = table.select(list(range(0, 60, 2)) + list(range(1, 60, 4)))
    options = {"labels_key": ["cell_type", "batch"], "flavor": flavor, "n_top_genes": 10}
    learned = []
    for num_proc in (1, 2):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / str(num_proc))
        learned.append(fit_table(table, var, num_proc=num_proc, **options))
    (alone, statistics), (shared, of_two) = learned
    assert alone.to_json_string() == shared.to_json_string()
    for name, array in vars(statistics).items():
        np.testing.assert_array_equal(getattr(of_two, name), array)


def test_a_refusal_in_another_process_is_told_as_in_this_one(adata, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ROWS_PER_PART", 16)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    adata.X.data[-1] = 0.5
    table, var = open_table(write(adata, tmp_path / "cells.h5ad"), cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="^some file was taken as counts but holds non-integers such as 0.5"):
        fit_table(table, var, num_proc=2, name="some file")


def test_split_of_a_stream(adata, monkeypatch):
    monkeypatch.setattr(data, "ROWS_PER_CHUNK", 16)
    adata.obs["number"] = np.arange(60)
    stream = anndata_to_table(adata).to_iterable_dataset(4)

    def numbers(fraction, seed):
        parts = split_stream(stream, fraction, seed)
        return [[n for rows in iterate_rows(part, 9, ["number"]) for n in rows["number"].to_pylist()] for part in parts]

    stay, aside = numbers(0.3, 0)
    assert sorted(stay + aside) == list(range(60)) and 8 <= len(aside) <= 28
    assert numbers(0.3, 0) == [stay, aside] != numbers(0.3, 1)


def test_split_of_a_table_is_that_of_the_cells(adata, tmp_path):
    table, _ = open_table(write(adata, tmp_path / "cells.h5ad"))
    labels = ["cell_type", "batch"]
    for left, right in zip(
        split_cells(read_labels(table, labels), labels, 0.3, 0), split_cells(adata, labels, 0.3, 0), strict=True
    ):
        assert np.array_equal(left, right)
