"""AnnData files to a dataset in the cache: one file, damaged ones, several."""

import contextlib
import errno
import itertools
import multiprocessing
import os
import re
import shutil
import time
import tracemalloc
from pathlib import Path

import anndata as ad
import datasets
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from cell_files import assert_same_cells, write

from scrdit_diffusers import CellDataset, SCRDiTProcessor, fit_dataset
from scrdit_diffusers.cells import anndata_builder, cell_file, fitting
from scrdit_diffusers.cells.cell_file import CellFile


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("convert", [sp.csr_matrix, sp.csc_matrix, lambda x: x.toarray(), lambda x: x.astype(np.int64)])
def test_open_is_the_file(adata, tmp_path, monkeypatch, suffix, convert):
    monkeypatch.setattr(cell_file, "ROWS_PER_CHUNK", 7)
    expected = adata.copy()
    adata.X = convert(adata.X)
    dataset = CellDataset.open(write(adata, tmp_path / f"cells{suffix}"), cache_dir=tmp_path / "cache")
    assert_same_cells(dataset.to_anndata(), expected)
    assert dataset.rows.cache_files and Path(dataset.rows.cache_files[0]["filename"]).is_relative_to(tmp_path / "cache")


def test_open_keeps_the_order_of_categories(adata, tmp_path):
    dataset = CellDataset.open(write(adata, tmp_path / "cells.h5ad"))
    assert dataset.rows.features["cell_type"].names == ["T", "B", "NK"]
    assert list(dataset.labels(["cell_type"])["cell_type"].cat.categories) == ["T", "B", "NK"]


def test_open_of_a_layer_with_chosen_columns(adata, tmp_path):
    dataset = CellDataset.open(write(adata, tmp_path / "cells.h5ad"), layer="lognorm", obs_columns=["batch"])
    assert dataset.rows.column_names == ["genes", "expressions", "batch"]
    assert np.array_equal(dataset.to_anndata().X.toarray(), adata.layers["lognorm"].toarray())


def test_open_reads_no_more_than_a_chunk(adata, tmp_path, monkeypatch):
    """A file larger than memory is never asked for all its rows, nor for many values of few rows."""
    read = []
    matrix = CellFile.matrix
    monkeypatch.setattr(CellFile, "matrix", lambda self, layer, rows: read.append(rows) or matrix(self, layer, rows))
    monkeypatch.setattr(cell_file, "ROWS_PER_CHUNK", 25)
    path = write(adata, tmp_path / "cells.h5ad")
    CellDataset.open(path, cache_dir=tmp_path / "cache")
    assert read == [slice(0, 25), slice(25, 50), slice(50, 60)]
    read.clear()
    monkeypatch.setattr(cell_file, "VALUES_PER_CHUNK", 300)
    dataset = CellDataset.open(path, cache_dir=tmp_path / "other")
    sizes = [adata.X[rows].nnz for rows in read]
    assert [rows.start for rows in read] == [0, *(rows.stop for rows in read[:-1])] and read[-1].stop == 60
    assert all(size <= 300 for size in sizes) and min(sizes[:-1]) > 300 - 23  # one row more would not fit
    assert_same_cells(dataset.to_anndata(), adata)


def test_a_dataset_is_converted_once(adata, tmp_path, monkeypatch):
    path = write(adata, tmp_path / "cells.h5ad")
    first = CellDataset.open(path, cache_dir=tmp_path / "cache")
    with monkeypatch.context() as context:
        context.setattr(anndata_builder.AnnDataBuilder, "_generate_tables", None)  # would raise if called
        again = CellDataset.open(path, cache_dir=tmp_path / "cache")
    assert again.rows.cache_files == first.rows.cache_files
    other = CellDataset.open(path, layer="lognorm", cache_dir=tmp_path / "cache")
    assert other.rows.cache_files != first.rows.cache_files


def test_a_changed_file_is_converted_again(adata, tmp_path):
    path = write(adata, tmp_path / "cells.h5ad")
    CellDataset.open(path, cache_dir=tmp_path / "cache")
    adata.X.data[:] = 7
    write(adata, path)
    dataset = CellDataset.open(path, cache_dir=tmp_path / "cache")
    assert set(dataset.to_anndata().X.data) == {7}


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_replaced_by_one_of_the_same_size_and_time_is_converted_again(adata, tmp_path, suffix, in_place):
    """As `cp -p`, `rsync -t` and `touch -r` do."""
    path, other = write(adata, tmp_path / f"cells{suffix}"), tmp_path / f"other{suffix}"
    times = {part: part.stat().st_mtime_ns for part in (path, *path.rglob("*"))}
    CellDataset.open(path, cache_dir=tmp_path / "cache")
    adata.X.data[:] = np.random.default_rng(0).permutation(adata.X.data)
    write(adata, path if in_place else other)
    if not in_place:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        other.rename(path)
    for part, time_of_change in times.items():
        os.utime(part, ns=(time_of_change, time_of_change))
    assert_same_cells(CellDataset.open(path, cache_dir=tmp_path / "cache").to_anndata(), adata)


def convert_slowly(path, cache, seconds_per_chunk, sender):
    chunks = CellFile.chunks

    def slow_chunks(self, layer):
        for rows in chunks(self, layer):
            yield rows
            sender.send("converting")
            time.sleep(seconds_per_chunk)

    cell_file.ROWS_PER_CHUNK, CellFile.chunks = 10, slow_chunks
    sender.send(len(CellDataset.open(path, cache_dir=cache)))


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


def test_a_conversion_that_was_killed_leaves_no_dataset(adata, tmp_path):
    path = write(adata, tmp_path / "cells.h5ad")
    process, messages = open_elsewhere(path, tmp_path / "cache", 60)
    assert messages.recv() == "converting"
    process.kill()
    process.join()
    assert list((tmp_path / "cache").rglob("*.arrow"))  # of the half that was written
    dataset = CellDataset.open(path, cache_dir=tmp_path / "cache")
    assert_same_cells(dataset.to_anndata(), adata)


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
    with caplog.at_level("INFO", "scrdit_diffusers.cells.anndata_builder"):
        dataset = CellDataset.open(tmp_path, join=join, gene_key="gene_ids", cache_dir=tmp_path / "cache")
    back = dataset.to_anndata()
    parts = [ad.read_h5ad(path) for path in two_files]
    for part in parts:
        part.var_names = part.var["gene_ids"]
    expected = ad.concat(parts, join=join)
    assert sorted(dataset.var["gene_ids"]) == sorted(expected.var_names)
    expected = expected[:, dataset.var["gene_ids"]]
    assert np.array_equal(back.X.toarray(), expected.X.toarray())
    assert back.obs["cell_type"].tolist() == expected.obs["cell_type"].tolist()
    assert back.obs["age"].tolist() == expected.obs["age"].tolist()
    assert set(dataset.rows.features["cell_type"].names) == {"T", "B", "NK", "NKT"}
    lacking = "20 of the 23 that are used, lacks 3 (taken as zero)" if join == "outer" else "15 of the 15 that are used"
    assert f"{two_files[0]}: 20 genes, {lacking}" in caplog.text


@pytest.mark.parametrize("names", [np.arange(23), np.arange(1, 24), np.arange(23.0), np.arange(23)[::-1] * 7])
@pytest.mark.parametrize("join", ["inner", "outer"])
def test_genes_called_by_numbers_are_not_joined(adata, tmp_path, names, join):
    """They are positions, and mean other genes in another file."""
    folder = tmp_path / "files"
    folder.mkdir()
    for file, order in (("a", np.arange(23)), ("b", np.arange(23)[::-1])):
        part = adata[:, order].copy()
        part.var_names = names.astype(str)
        write(part, folder / f"{file}.h5ad")
    with pytest.raises(ValueError, match=r"a\.h5ad .*numbers.*gene_key"):
        CellDataset.open(folder, join=join, cache_dir=tmp_path / "cache")
    both = CellDataset.open(folder, join=join, gene_key="gene_ids", cache_dir=tmp_path / "cache").to_anndata()
    assert list(both.var_names) == list(both.var["gene_ids"]) == list(adata.var["gene_ids"])
    assert np.array_equal(both.X.toarray(), np.tile(adata.X.toarray(), (2, 1)))
    alone = CellDataset.open(folder / "a.h5ad", cache_dir=tmp_path / "cache")
    assert list(alone.var.index) == list(names.astype(str))


# How labels 0, 1 and 2 may be stored.
CODES = {
    "text": lambda codes: codes.astype(str),
    "categories of text": lambda codes: pd.Categorical(codes.astype(str)),
    "integers": lambda codes: codes,
    "categories of integers": lambda codes: pd.Categorical(codes),
    "nullable integers": lambda codes: pd.array(codes, dtype="Int64"),
    "floats": lambda codes: codes.astype(float),
    "single floats": lambda codes: codes.astype(np.float32),
    "categories of floats": lambda codes: pd.Categorical(codes.astype(float)),
}


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(CODES, 2)))
def test_numbers_as_labels_are_those_of_other_files(adata, tmp_path, first, second):
    codes = np.arange(60) % 3
    for file, kind, rows in (("a", first, slice(0, 30)), ("b", second, slice(30, 60))):
        part = adata[rows].copy()
        part.obs["label"] = CODES[kind](codes[rows])
        write(part, tmp_path / f"{file}.h5ad")
    cells = CellDataset.open(tmp_path, obs_columns=["label"], labels_key=["label"], cache_dir=tmp_path / "cache")
    labels = cells.labels(["label"])["label"]
    assert labels.astype(float).tolist() == codes.tolist() and len(labels.cat.categories) == 3
    whole = {"floats", "single floats", "categories of floats"}
    if not {first, second} <= whole:
        processor, _ = fit_dataset(cells.rows, cells.var, "label", flavor="all")
        assert processor.condition_categories[0] == ["0", "1", "2"]


@pytest.mark.parametrize("others", [[0.5, 1.0], [1.0, np.nan], [2.0**60, 1.0]])
def test_numbers_of_two_files_stay_what_they_are(adata, tmp_path, others):
    for file, numbers in (("a", [1, 2]), ("b", others)):
        part = adata[:30].copy()
        part.obs["number"] = np.array(numbers)[np.arange(30) % 2]
        write(part, tmp_path / f"{file}.h5ad")
    cells = CellDataset.open(tmp_path, cache_dir=tmp_path / "cache").to_anndata()
    np.testing.assert_array_equal(cells.obs["number"], [1, 2] * 15 + others * 15)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.array([2**53 + 1, 1]), np.array([0.5, 1.0])),
        (np.array([-(2**53) - 1, 1]), np.array([2.0**60, 1.0])),
        (np.array([2**53 + 1, 1], dtype="uint64"), np.array([0.5, 1.0])),
        (np.array([2**63 + 5, 1], dtype="uint64"), np.array([-1, 1])),
    ],
    ids=["fractions", "large floats", "unsigned", "signed and unsigned"],
)
def test_integers_that_floats_of_another_file_would_round_are_refused_with_the_mend(adata, tmp_path, first, second):
    parts = {"a": adata[:30].copy(), "b": adata[30:].copy()}
    for numbers, (file, part) in zip((first, second), parts.items(), strict=True):
        part.obs["number"] = np.resize(numbers, 30)
        write(part, tmp_path / f"{file}.h5ad")
    with pytest.raises(ValueError, match=rf"^\S*a\.h5ad: obs\['number'\] holds {first[0]}, .*astype\(str\)"):
        CellDataset.open(tmp_path, cache_dir=tmp_path / "cache")
    parts["a"].obs["number"] = parts["a"].obs["number"].astype(str)
    write(parts["a"], tmp_path / "a.h5ad")
    cells = CellDataset.open(tmp_path, cache_dir=tmp_path / "cache").to_anndata()
    assert cells.obs["number"].iloc[0] == str(first[0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([True, False], [1, 0]),
        ([True, False], ["true", "false"]),
        ([True, False], ["TRUE", "FALSE"]),
        (["1", "2"], ["1.0", "2.0"]),
        (["01", "02"], [1, 2]),
        (["True", "False"], [1.0, 0.0]),
        (["100000", "2"], ["1e+05", "2.50"]),
        (["B", "T"], ["B ", "T"]),
        (["B", "T"], ["\tB", "T"]),
        (["CD4 T", "B"], ["CD4\N{NO-BREAK SPACE}T", "B"]),
        (["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "B"], ["cafe\N{COMBINING ACUTE ACCENT}", "B"]),
    ],
)
def test_labels_that_files_spell_differently_are_refused(adata, tmp_path, first, second):
    for file, names in (("a", first), ("b", second)):
        part = adata[:30].copy()
        part.obs["label"] = np.array(names)[np.arange(30) % 2]
        write(part, tmp_path / f"{file}.h5ad")
    with pytest.raises(ValueError, match=r"'label'.*a\.h5ad.*b\.h5ad"):
        CellDataset.open(tmp_path, labels_key=["label"], cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("first", "second"),
    [(["1_0", "1_1"], ["10", "11"]), (["1e1", "a"], ["10", "b"]), ([str(2**53)], [str(2**53 + 1)]), (["b"], ["B"])],
)
def test_names_that_are_no_numbers_stay_apart(adata, tmp_path, first, second):
    for file, names in (("a", first), ("b", second)):
        part = adata[:30].copy()
        part.obs["label"] = np.resize(names, 30)
        write(part, tmp_path / f"{file}.h5ad")
    cells = CellDataset.open(tmp_path, labels_key=["label"], cache_dir=tmp_path / "cache")
    assert set(cells.labels(["label"])["label"]) == {*first, *second}


def test_signed_and_unsigned_integers_are_joined_as_integers(adata, tmp_path):
    for dtype in ("int64", "uint64"):
        part = adata[:30].copy()
        part.obs["label"] = np.resize([1, 2], 30).astype(dtype)
        write(part, tmp_path / f"{dtype}.h5ad")
    cells = CellDataset.open(tmp_path, labels_key=["label"], cache_dir=tmp_path / "cache")
    assert set(cells.labels(["label"])["label"]) == {1, 2}


@pytest.mark.parametrize("join", ["inner", "outer"])
def test_genes_whose_names_look_the_same_are_refused(adata, tmp_path, join):
    write(adata, tmp_path / "a.h5ad")
    adata.var_names = [f"{gene} " for gene in adata.var_names]
    write(adata, tmp_path / "b.h5ad")
    with pytest.raises(ValueError, match=r"'gene0' \(.*a\.h5ad\) and 'gene0 ' \(.*b\.h5ad\)"):
        CellDataset.open(tmp_path, join=join, cache_dir=tmp_path / "cache")


def test_truth_is_one_label_as_text_and_as_boolean(adata, tmp_path):
    for file, names in (("a", [True, False]), ("b", ["True", "False"])):
        part = adata[:30].copy()
        part.obs["label"] = np.array(names)[np.arange(30) % 2]
        write(part, tmp_path / f"{file}.h5ad")
    cells = CellDataset.open(tmp_path, labels_key=["label"], cache_dir=tmp_path / "cache")
    assert cells.labels(["label"])["label"].tolist() == ["True", "False"] * 30


def test_files_that_macos_leaves_behind_are_not_cells(adata, tmp_path):
    write(adata, tmp_path / "cells.h5ad")
    (tmp_path / "._cells.h5ad").write_bytes(b"Mac OS X")
    for source in (tmp_path, f"{tmp_path}/*.h5ad", list(tmp_path.glob("*.h5ad"))):
        assert len(CellDataset.open(source, cache_dir=tmp_path / "cache")) == 60


def test_missing_labels_are_refused_before_anything_is_converted(adata, tmp_path, monkeypatch):
    adata.obs.loc[adata.obs_names[3:5], "cell_type"] = np.nan
    path = write(adata, tmp_path / "cells.h5ad")
    monkeypatch.setattr(anndata_builder.AnnDataBuilder, "for_files", lambda *args: pytest.fail("it was converted"))
    with pytest.raises(ValueError, match=r"cells\.h5ad: obs\['cell_type'\] [^;]*2 NaN"):
        CellDataset.open(path, labels_key=["cell_type"])


def test_files_without_common_genes_are_refused(two_files):
    with pytest.raises(ValueError, match="'othergene22'.*--join outer"):
        CellDataset.open(two_files)


def test_files_of_names_and_ids_are_not_taken_for_other_genes(two_files):
    with pytest.raises(ValueError, match="'othergene22'.*--gene_key"):
        CellDataset.open(two_files, join="outer")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(gene_key="symbol"), r"^var .*a\.h5ad .*'symbol'"),
        (dict(join="left"), "^join .*'left'"),
        (dict(layer="nothing"), r"a\.h5ad: adata\.layers\['nothing'\] .*'lognorm'"),
        (
            dict(layer="lognorm", expect_counts=True),
            r"a\.h5ad: adata\.layers\['lognorm'\] .* 4\.98311.* adata\.X .*layer=None",
        ),
        (dict(obs_columns=["celltype"]), r"a\.h5ad: obs .*'celltype'.*'cell_type'.*\['cell_type'"),
        (dict(streaming=True), "^streaming "),
    ],
)
def test_open_refuses(two_files, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        CellDataset.open(two_files, cache_dir=tmp_path / "cache", **kwargs)
    assert not (tmp_path / "cache").exists()


def write_error(folder, num_proc):
    cell_file.ROWS_PER_CHUNK = 10
    CellFile.check = lambda *args: None  # which sees the first cells only
    try:
        CellDataset.open(folder, cache_dir=folder / "cache", num_proc=num_proc)
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
    with pytest.raises(ValueError, match=r"cells\.h5ad, cells from 0 .* 0\.5"):
        CellDataset.open(path, expect_counts=True, cache_dir=tmp_path / "cache")
    assert len(CellDataset.open(path, cache_dir=tmp_path / "cache")) == 60


def peak_memory(adata, path, cache) -> int:
    """Bytes that converting a file takes at most beyond those at its beginning; those of NumPy and Python."""
    write(adata, path)
    tracemalloc.start()
    try:
        CellDataset.open(path, cache_dir=cache)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """Neither values nor obs nor indptr are read as a whole; 30 times the cells may not take half as much again."""
    monkeypatch.setattr(cell_file, "ROWS_PER_CHUNK", 1000)
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
    monkeypatch.setattr(cell_file, "ROWS_PER_CHUNK", 25)
    missing = np.arange(60) % 7 == 3
    adata.obs["number"] = pd.array(np.arange(60), dtype="Int64")
    adata.obs["flag"] = pd.array(np.arange(60) % 2 == 0, dtype="boolean")
    adata.obs["plain"] = np.arange(60) % 3 == 0
    adata.obs.loc[missing, ["number", "flag"]] = pd.NA
    dataset = CellDataset.open(write(adata, tmp_path / f"cells{suffix}"), cache_dir=tmp_path / "cache")
    assert [dataset.rows.features[key].dtype for key in ("number", "flag", "plain")] == ["int64", "bool", "bool"]
    assert dataset.rows["number"][:] == [None if skip else i for i, skip in enumerate(missing)]
    assert dataset.rows["flag"][:] == [None if skip else i % 2 == 0 for i, skip in enumerate(missing)]
    assert dataset.rows["plain"][:] == [i % 3 == 0 for i in range(60)]


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
    dataset = CellDataset.open(path, cache_dir=tmp_path / "cache")
    assert dataset.rows.features["cell_type"].names == ["T", "B", "NK"]
    assert dataset.to_anndata().obs["cell_type"].tolist() == adata.obs["cell_type"].tolist()


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
        ("b.h5ad", shorten, r"b\.h5ad .*\.zarr .*eof = \d+"),
        ("b.h5ad", overwrite_values, r"b\.h5ad: adata\.X .*\(filter "),
        ("b.h5ad", drop_rows, r"b\.h5ad: adata\.X .*\(59, 23\).*\(60, 23\)"),
        ("b.h5ad", drop_values, r"b\.h5ad: adata\.X .*indptr"),
        ("b.h5ad", stop_writing, r"b\.h5ad .*AnnData: .* var\."),
        ("b.h5ad", make_obs_an_array, r"^obs .*b\.h5ad .*anndata 0\.7"),
        ("b.zarr", lose_chunk, r"b\.zarr: adata\.X .*1 "),
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
        CellDataset.open(tmp_path, cache_dir=tmp_path / "cache")
    assert str(path) in str(raised.value) and "a.h5ad" not in str(raised.value)


def test_a_damaged_end_is_found_while_converting(adata, tmp_path, monkeypatch):
    adata.write_h5ad(tmp_path / "cells.h5ad", compression="gzip")
    overwrite_values(tmp_path / "cells.h5ad")
    monkeypatch.setattr(CellFile, "check", lambda *args: None)
    with pytest.raises(ValueError, match=r"cells\.h5ad, cells from 0: .*\(filter "):
        CellDataset.open(tmp_path, cache_dir=tmp_path / "cache")


def test_labels_that_one_file_lacks_are_refused_with_it(adata, tmp_path):
    write(adata, tmp_path / "a.h5ad")
    adata.obs = adata.obs.rename(columns={"cell_type": "celltype"})
    write(adata, tmp_path / "b.h5ad")
    with pytest.raises(ValueError, match=r"b\.h5ad: obs .*'cell_type'.*'celltype'.*\['celltype'"):
        CellDataset.open(tmp_path, labels_key=["cell_type"], cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_without_room_is_refused_before_anything_is_converted(adata, tmp_path, monkeypatch):
    path = write(adata, tmp_path / "cells.h5ad")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(datasets.utils.py_utils, "disk_usage", lambda folder: usage._replace(free=8 * adata.X.nnz - 1))
    monkeypatch.setattr(anndata_builder.AnnDataBuilder, "_generate_tables", None)  # would raise if called
    with pytest.raises(OSError, match="/cache: .*disk space.* HF_DATASETS_CACHE"):
        CellDataset.open(path, cache_dir=tmp_path / "cache")


def test_a_disk_that_is_full_while_converting(adata, tmp_path, monkeypatch):
    def full(self, table, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write(adata, tmp_path / "cells.h5ad")
    with monkeypatch.context() as context:
        context.setattr(datasets.arrow_writer.ArrowWriter, "write_table", full)
        with pytest.raises(OSError, match=r"/cache: \[Errno 28\].* HF_DATASETS_CACHE"):
            CellDataset.open(path, cache_dir=tmp_path / "cache")
    assert len(CellDataset.open(path, cache_dir=tmp_path / "cache")) == 60


@pytest.fixture
def may_not_write(tmp_path, monkeypatch):
    """Make the cache one of another user; as root may write everywhere, the refusal is that of the locks."""
    lock = datasets.builder.FileLock

    def refuse(path, *args):
        if Path(path).is_relative_to(tmp_path / "cache"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return lock(path, *args)

    def refuse_all():
        monkeypatch.setattr(datasets.builder, "FileLock", refuse)
        monkeypatch.setattr(fitting, "FileLock", refuse)

    return refuse_all


def test_a_cache_of_another_user(adata, tmp_path, may_not_write):
    path = write(adata, tmp_path / "cells.h5ad")
    may_not_write()
    with pytest.raises(OSError, match=r"/cache: \[Errno 13\].* HF_DATASETS_CACHE"):
        CellDataset.open(path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("learned", [False, True])
def test_a_whole_cache_of_another_user_is_read(adata, tmp_path, monkeypatch, may_not_write, learned):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(adata[:30].copy(), tmp_path / "a.h5ad")
    write(adata[30:].copy(), tmp_path / "b.h5ad")
    opened = CellDataset.open(tmp_path)
    if learned:
        fit_dataset(opened.rows, opened.var, "cell_type", flavor="all")
    may_not_write()
    again = CellDataset.open(tmp_path)
    assert_same_cells(again.to_anndata(), adata)
    assert again.rows.features == opened.rows.features
    processor, _ = fit_dataset(again.rows, again.var, "cell_type", flavor="all")
    expected = SCRDiTProcessor.from_anndata(adata, "cell_type", flavor="all")
    np.testing.assert_allclose(processor.mean, expected.mean)
