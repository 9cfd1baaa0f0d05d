"""Rows of a dataset as batches of tensors."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from scrdit_diffusers import CellCollator, CellDataset, SCRDiTProcessor
from scrdit_diffusers.cells.batches import CellRows
from scrdit_diffusers.cells.layout import rows_to_matrix


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(flavor="all"),
        dict(genes=["gene9", "gene3", "gene20"]),
        dict(flavor="all", value_space="log_normalized", target_sum=1e4, zero_negation=True),
    ],
    ids=["counts", "some genes", "log-normalized"],
)
def test_a_batch_is_the_direct_transform(adata, kwargs):
    processor = SCRDiTProcessor.from_anndata(adata, ["cell_type", "batch"], **kwargs)
    indices = [5, 59, 0, 17]
    batch = CellCollator(processor, adata.var)(CellRows(CellDataset.from_anndata(adata).rows).__getitems__(indices))
    cells = adata[indices].copy()
    expected = processor.transform(processor.get_values(cells)).astype(np.float32)
    assert batch["values"].dtype == torch.float32
    assert np.array_equal(batch["values"].numpy(), expected)
    assert np.array_equal(batch["class_labels"].numpy(), processor.encode_labels(cells.obs))
    assert "counts" not in batch


@pytest.mark.parametrize("kwargs", [dict(flavor="all"), dict(genes=["gene9", "gene3", "gene20"])])
def test_a_batch_with_its_counts(adata, kwargs):
    processor = SCRDiTProcessor.from_anndata(adata, ["cell_type", "batch"], **kwargs)
    rows = CellRows(CellDataset.from_anndata(adata).rows).__getitems__([5, 59, 0, 17])
    batch = CellCollator(processor, adata.var, counts=True)(rows)
    assert batch["counts"].dtype == batch["library_size"].dtype == torch.float32
    assert np.array_equal(batch["counts"].numpy(), adata[[5, 59, 0, 17], processor.var_names].X.toarray())
    assert torch.equal(batch["library_size"], batch["counts"].sum(dim=1))


def test_a_batch_with_the_counts_behind_log_normalized_values(adata):
    """Library sizes are over all genes."""
    options = dict(value_space="log_normalized", recover_counts=True, genes=["gene9", "gene3", "gene20"])
    processor = SCRDiTProcessor.from_anndata(adata, "cell_type", "lognorm", **options)
    rows = CellRows(CellDataset.from_anndata(adata, "lognorm").rows).__getitems__([5, 59, 0, 17])
    batch = CellCollator(processor, adata.var, counts=True)(rows)
    counts = adata[[5, 59, 0, 17]].layers["counts"].toarray()
    assert np.array_equal(batch["counts"].numpy(), counts[:, [9, 3, 20]])
    np.testing.assert_allclose(batch["library_size"], counts.sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(batch["values"], processor.transform(counts[:, [9, 3, 20]]), rtol=1e-6)


def test_refuses_the_counts_of_log_normalized_values(adata):
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", value_space="log_normalized", target_sum=1e4)
    with pytest.raises(ValueError, match="counts=True needs a processor whose model sees counts"):
        CellCollator(processor, adata.var, counts=True)


def test_an_unconditional_batch_has_no_labels(adata):
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all")
    rows = CellRows(CellDataset.from_anndata(adata).rows).__getitems__([1, 2, 3])
    assert CellCollator(processor, adata.var)(rows)["class_labels"].shape == (3, 0)


def test_a_data_loader_serves_every_cell_once(adata, processor):
    loader = torch.utils.data.DataLoader(
        CellRows(CellDataset.from_anndata(adata).rows),
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
    rows = CellRows(CellDataset.from_anndata(adata).rows).__getitems__(list(range(60)))
    codes = CellCollator(processor, adata.var)(rows)["class_labels"]
    assert np.array_equal(codes.numpy(), processor.encode_labels(adata.obs))


def test_refuses_a_table_without_the_models_genes(adata, processor):
    with pytest.raises(ValueError, match=r"2 of the model's 23 genes are missing from the data"):
        CellCollator(processor, adata.var.iloc[2:])


def test_refuses_a_table_without_the_models_labels(adata, processor):
    rows = CellRows(CellDataset.from_anndata(adata, obs_columns=["batch"]).rows).__getitems__([0])
    with pytest.raises((ValueError, KeyError), match="cell_type"):
        CellCollator(processor, adata.var)(rows)


def test_rows_of_a_slice_keep_their_offsets(adata):
    """Arrow slices share buffers: a batch from the middle must not read the values of the first rows."""
    rows: pa.Table = CellDataset.from_anndata(adata).rows.with_format("arrow")[:]
    matrix = rows_to_matrix(rows.slice(20, 10), adata.n_vars)
    assert np.array_equal(matrix.toarray(), adata.X[20:30].toarray())
