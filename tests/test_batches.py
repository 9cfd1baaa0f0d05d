"""Endless full batches: each cell once per epoch, shared by processes, and resumed without reading what was seen."""

import itertools

import numpy as np
import pytest
import torch

from scrdit_diffusers import CellBatches, CellCollator, CellRows, anndata_to_table
from scrdit_diffusers.cells.batches import BatchSampler, CellStream


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
    return anndata_to_table(adata)


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


@pytest.mark.parametrize("start", [1, 3, 4, 9])
def test_a_stream_from_a_later_batch_on_is_the_same(numbered, start):
    assert served(numbered, 4, start=start) == served(numbered)[start : start + 4]


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("streamed", [False, True])
def test_batches_are_tensors(adata, processor, streamed, start):
    dataset = anndata_to_table(adata)
    dataset = dataset.to_iterable_dataset(2) if streamed else dataset
    columns = ["cell_type", "batch"]
    batches = CellBatches(dataset, 60, 16, CellCollator(processor, adata.var), columns)
    batch = next(batches(start))
    assert batch["values"].shape == (16, 23) and batch["class_labels"].shape == (16, 2)
    again = first_batches(batches(), start + 1)[start]
    assert torch.equal(batch["values"], again["values"])


def test_a_batch_of_the_stream_is_named_as_one_of_the_table(adata, processor):
    table = anndata_to_table(adata)
    stream = CellStream(table.to_iterable_dataset(2), 60, 60, ["cell_type", "batch"])
    collate = CellCollator(processor, adata.var)
    codes = collate(next(iter(stream)))["class_labels"]
    expected = collate(CellRows(table, ["cell_type", "batch"]).__getitems__(list(range(60))))["class_labels"]
    assert torch.equal(codes.unique(dim=0, return_counts=True)[1], expected.unique(dim=0, return_counts=True)[1])
