"""Endless full batches: each cell once per epoch, shared by processes, and resumed without reading what was seen."""

import itertools

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from scrdit_diffusers import CellBatches, CellCollator, CellDataset, SCRDiTProcessor
from scrdit_diffusers.cells.batches import BatchSampler, CellRows, CellStream
from scrdit_diffusers.cells.layout import rows_to_matrix


def first_batches(batches, number=15):
    return list(itertools.islice(batches, number))


def test_batches_are_full_and_slices_of_one_permutation_per_epoch():
    batches = first_batches(BatchSampler(37, 12, seed=5))
    assert {len(batch) for batch in batches} == {12}
    stream = np.concatenate([np.random.default_rng([5, epoch]).permutation(37) for epoch in range(5)])
    np.testing.assert_array_equal(np.concatenate(batches), stream[:180])


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_processes_share_each_joined_batch(num_processes):
    alone = first_batches(BatchSampler(37, 12, seed=0))
    options = (37, 12 // num_processes, num_processes)
    samplers = [first_batches(BatchSampler(*options, process_index=i)) for i in range(num_processes)]
    assert [sum(parts, []) for parts in zip(*samplers, strict=True)] == alone


def test_more_cells_in_a_batch_than_there_are():
    batches = first_batches(BatchSampler(5, 12), 5)
    assert [len(batch) for batch in batches] == [12] * 5
    assert all(np.bincount(sum(batches, [])) == 12)


@pytest.mark.parametrize("start", [1, 3, 4, 11])
def test_batches_from_a_later_one_on_are_the_same(start):
    assert first_batches(BatchSampler(37, 12, start=start), 4) == first_batches(BatchSampler(37, 12))[start:][:4]


@pytest.fixture
def numbered(adata):
    adata.obs["number"] = np.arange(60)
    return CellDataset.from_anndata(adata).rows


def served(numbered, count=15, **options):
    stream = CellStream(numbered.to_iterable_dataset(3), 60, 16, ["number"], block_size=25, **options)
    loader = torch.utils.data.DataLoader(stream, batch_size=None)
    return [rows["number"].to_pylist() for rows in first_batches(loader, count)]


def test_a_stream_serves_full_batches_and_each_cell_once_per_epoch(numbered):
    batches = served(numbered)
    cells = np.concatenate(batches).reshape(4, 60)
    assert {len(batch) for batch in batches} == {16}
    assert all(sorted(epoch) == list(range(60)) for epoch in cells)
    assert cells[0].tolist() != sorted(cells[0]) and cells[0].tolist() != cells[1].tolist()
    assert served(numbered) == batches != served(numbered, seed=1)


@pytest.mark.parametrize("num_cells", [1, 3, 15, 17])
def test_a_stream_of_few_cells_serves_full_batches(numbered, num_cells):
    """Each batch holds the cells as often as they go into it, give or take one time."""
    stream = CellStream(numbered.to_iterable_dataset(3).take(num_cells), num_cells, 16, ["number"], block_size=25)
    batches = [
        rows["number"].to_pylist() for rows in first_batches(torch.utils.data.DataLoader(stream, batch_size=None), 5)
    ]
    assert {len(batch) for batch in batches} == {16}
    epochs = np.concatenate(batches)[: 80 // num_cells * num_cells].reshape(-1, num_cells)
    assert all(sorted(epoch) == list(range(num_cells)) for epoch in epochs)


@pytest.mark.parametrize("start", [1, 3, 4, 9])
def test_a_stream_from_a_later_batch_on_is_the_same(numbered, start):
    assert served(numbered, 4, start=start) == served(numbered)[start : start + 4]


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("streamed", [False, True])
def test_batches_are_tensors(adata, processor, streamed, start):
    dataset = CellDataset.from_anndata(adata).rows
    dataset = dataset.to_iterable_dataset(2) if streamed else dataset
    columns = ["cell_type", "batch"]
    batches = CellBatches(dataset, 60, 16, CellCollator(processor, adata.var), columns)
    batch = next(batches(start))
    assert batch["values"].shape == (16, 23) and batch["class_labels"].shape == (16, 2)
    again = first_batches(batches(), start + 1)[start]
    assert torch.equal(batch["values"], again["values"])


def test_a_batch_of_the_stream_is_named_as_one_of_the_dataset(adata, processor):
    rows = CellDataset.from_anndata(adata).rows
    stream = CellStream(rows.to_iterable_dataset(2), 60, 60, ["cell_type", "batch"])
    collate = CellCollator(processor, adata.var)
    codes = collate(next(iter(stream)))["class_labels"]
    expected = collate(CellRows(rows, ["cell_type", "batch"]).__getitems__(list(range(60))))["class_labels"]
    assert torch.equal(codes.unique(dim=0, return_counts=True)[1], expected.unique(dim=0, return_counts=True)[1])


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
    batch = CellCollator(processor, adata.var, expect_counts=True)(rows)
    assert batch["counts"].dtype == batch["library_size"].dtype == torch.float32
    assert np.array_equal(batch["counts"].numpy(), adata[[5, 59, 0, 17], processor.var_names].X.toarray())
    assert torch.equal(batch["library_size"], batch["counts"].sum(dim=1))


def test_a_batch_with_the_counts_behind_log_normalized_values(adata):
    """Library sizes are over all genes."""
    options = dict(value_space="log_normalized", recover_counts=True, genes=["gene9", "gene3", "gene20"])
    processor = SCRDiTProcessor.from_anndata(adata, "cell_type", "lognorm", **options)
    rows = CellRows(CellDataset.from_anndata(adata, "lognorm").rows).__getitems__([5, 59, 0, 17])
    batch = CellCollator(processor, adata.var, expect_counts=True)(rows)
    counts = adata[[5, 59, 0, 17]].layers["counts"].toarray()
    assert np.array_equal(batch["counts"].numpy(), counts[:, [9, 3, 20]])
    np.testing.assert_allclose(batch["library_size"], counts.sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(batch["values"], processor.transform(counts[:, [9, 3, 20]]), rtol=1e-6)


def test_refuses_the_counts_of_log_normalized_values(adata):
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", value_space="log_normalized", target_sum=1e4)
    with pytest.raises(ValueError, match="^expect_counts=True .*value_space"):
        CellCollator(processor, adata.var, expect_counts=True)


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


def test_numeric_labels_survive_the_dataset(adata):
    adata.obs["cluster"] = pd.Categorical([3, 1, 20] * 20)
    processor = SCRDiTProcessor.from_anndata(adata, "cluster", flavor="all")
    rows = CellRows(CellDataset.from_anndata(adata).rows).__getitems__(list(range(60)))
    codes = CellCollator(processor, adata.var)(rows)["class_labels"]
    assert np.array_equal(codes.numpy(), processor.encode_labels(adata.obs))


def test_refuses_a_dataset_without_the_models_genes(adata, processor):
    with pytest.raises(ValueError, match=r"^2 .* 23 genes .*\['gene0', 'gene1'\]"):
        CellCollator(processor, adata.var.iloc[2:])


def test_refuses_a_dataset_without_the_models_labels(adata, processor):
    rows = CellRows(CellDataset.from_anndata(adata, obs_columns=["batch"]).rows).__getitems__([0])
    with pytest.raises((ValueError, KeyError), match="cell_type"):
        CellCollator(processor, adata.var)(rows)


def test_rows_of_a_slice_keep_their_offsets(adata):
    """Arrow slices share buffers: a batch from the middle must not read the values of the first rows."""
    rows: pa.Table = CellDataset.from_anndata(adata).rows.with_format("arrow")[:]
    matrix = rows_to_matrix(rows.slice(20, 10), adata.n_vars)
    assert np.array_equal(matrix.toarray(), adata.X[20:30].toarray())
