"""Cells to tables, folders and batches, and back."""

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
import torch

from scrdit_diffusers import (
    CellCollator,
    CellDataset,
    SCRDiTProcessor,
    anndata_to_table,
    data,
    read_cells,
    save_table,
    split_cells,
    table_to_anndata,
)


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
    batch = CellCollator(processor, adata.var)(CellDataset(anndata_to_table(adata)).__getitems__(indices))
    cells = adata[indices].copy()
    expected = processor.transform(processor.get_values(cells)).astype(np.float32)
    assert batch["values"].dtype == torch.float32
    assert np.array_equal(batch["values"].numpy(), expected)
    assert np.array_equal(batch["class_labels"].numpy(), processor.encode_labels(cells.obs))
    assert "counts" not in batch


@pytest.mark.parametrize("kwargs", [dict(flavor="all"), dict(genes=["gene9", "gene3", "gene20"])])
def test_a_batch_with_its_counts(adata, kwargs):
    processor = SCRDiTProcessor.from_anndata(adata, ["cell_type", "batch"], **kwargs)
    rows = CellDataset(anndata_to_table(adata)).__getitems__([5, 59, 0, 17])
    counts = CellCollator(processor, adata.var, counts=True)(rows)["counts"]
    assert counts.dtype == torch.float32
    assert np.array_equal(counts.numpy(), adata[[5, 59, 0, 17], processor.var_names].X.toarray())


def test_refuses_the_counts_of_log_normalised_values(adata):
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", value_space="log_normalized", target_sum=1e4)
    with pytest.raises(ValueError, match='counts=True needs a processor with value_space="counts"'):
        CellCollator(processor, adata.var, counts=True)


def test_an_unconditional_batch_has_no_labels(adata):
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all")
    rows = CellDataset(anndata_to_table(adata)).__getitems__([1, 2, 3])
    assert CellCollator(processor, adata.var)(rows)["class_labels"].shape == (3, 0)


def test_a_data_loader_serves_every_cell_once(adata, processor):
    loader = torch.utils.data.DataLoader(
        CellDataset(anndata_to_table(adata)),
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
    rows = CellDataset(anndata_to_table(adata)).__getitems__(list(range(60)))
    codes = CellCollator(processor, adata.var)(rows)["class_labels"]
    assert np.array_equal(codes.numpy(), processor.encode_labels(adata.obs))


def test_refuses_a_table_without_the_models_genes(adata, processor):
    with pytest.raises(ValueError, match=r"2 of the model's 23 genes are missing from the data"):
        CellCollator(processor, adata.var.iloc[2:])


def test_refuses_a_table_without_the_models_labels(adata, processor):
    rows = CellDataset(anndata_to_table(adata, obs_columns=["batch"])).__getitems__([0])
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
