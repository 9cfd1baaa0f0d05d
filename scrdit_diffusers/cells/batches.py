"""Endless full batches of cells for training, each cell once per epoch, and the collator that makes them tensors."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Sampler

from scrdit_diffusers.checks import check_label
from scrdit_diffusers.processing_scrdit import SCRDiTProcessor

from .damage import folder_of, reading
from .layout import VALUE_COLUMNS, LabelNames, iterate_rows, rows_to_matrix, rows_to_obs, token_positions
from .moments import ROWS_PER_CHUNK


class CellRows(torch.utils.data.Dataset):
    """Serves rows of a dataset of cells to a DataLoader, a whole batch at a time as one `pyarrow.Table`.

    Parameters
    ----------
    dataset
        Cells, with `genes`, `expressions` and the condition columns.
    columns
        Columns of obs to serve; `None` serves all.
    """

    def __init__(self, dataset: datasets.Dataset, columns: Sequence[str] | None = None):
        for key in columns or []:
            check_label(pd.DataFrame(columns=dataset.column_names), key)
        self.dataset = dataset.with_format("arrow", columns=None if columns is None else [*VALUE_COLUMNS, *columns])
        self.named = LabelNames(dataset.features)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> pa.Table:
        with reading(folder_of(self.dataset), "its cells"):
            return self.named(self.dataset[indices])


class BatchSampler(Sampler[list[int]]):
    """Positions of the cells in each batch of one process, without end.

    Epochs, each a random order of all cells by seed and epoch, form one stream. A joined batch, that of all processes
    together, is the next slice of this stream: always full, possibly across the end of an epoch.

    Parameters
    ----------
    num_cells
        Number of cells.
    batch_size
        Cells per batch of one process.
    num_processes
        Number of processes.
    process_index
        Number of this process.
    seed
        Makes the order reproducible.
    start
        Number of the first batch. Cells before it are not read.
    """

    def __init__(
        self,
        num_cells: int,
        batch_size: int,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int = 0,
        start: int = 0,
    ):
        self.num_cells, self.batch_size, self.seed, self.start = num_cells, batch_size, seed, start
        self.num_processes, self.process_index = num_processes, process_index

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, int)
        for batch in itertools.count(self.start):
            position = (batch * self.num_processes + self.process_index) * self.batch_size
            cells: list[int] = []
            while len(cells) < self.batch_size:
                now, place = divmod(position + len(cells), self.num_cells)
                if now != epoch:
                    epoch, order = now, np.random.default_rng([self.seed, now]).permutation(self.num_cells)
                cells += order[place : place + self.batch_size - len(cells)].tolist()
            yield cells


class CellStream(torch.utils.data.IterableDataset):
    """Serves batches of a stream to a DataLoader with `batch_size=None`, full ones without end.

    Rows are shuffled within blocks of neighbors. A batch may begin in an epoch and end in the next.

    Parameters
    ----------
    dataset
        Stream with `genes`, `expressions` and the condition columns.
    num_rows
        Number of its rows.
    batch_size
        Rows per batch.
    columns
        Columns of obs to serve.
    block_size
        Rows of a block, which is in memory.
    seed
        Makes the order reproducible, together with the epoch.
    start
        Number of the first batch. Whole epochs before it are not read.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        num_rows: int,
        batch_size: int,
        columns: Sequence[str] = (),
        block_size: int = 2 * ROWS_PER_CHUNK,
        seed: int = 0,
        start: int = 0,
    ):
        self.dataset, self.num_rows, self.batch_size, self.start = dataset, num_rows, batch_size, start
        self.columns, self.block_size, self.seed = list(columns), block_size, seed

    def __iter__(self) -> Iterator[pa.Table]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(f"A stream is read by one worker process, not {worker.num_workers}.")
        epoch, skipped = divmod(self.start * self.batch_size, self.num_rows)
        remaining = None
        for rows in self._blocks(epoch):
            if rows.num_rows <= skipped:
                skipped -= rows.num_rows
                continue
            rows, skipped = rows.slice(skipped), 0
            rows = rows if remaining is None else pa.concat_tables([remaining, rows])
            whole = rows.num_rows - rows.num_rows % self.batch_size
            for start in range(0, whole, self.batch_size):
                yield rows.slice(start, self.batch_size)
            remaining = rows.slice(whole)

    def _blocks(self, first_epoch: int) -> Iterator[pa.Table]:
        """Blocks of shuffled rows, epoch after epoch."""
        for epoch in itertools.count(first_epoch):
            rng = np.random.default_rng([self.seed, epoch])
            for block in iterate_rows(self.dataset, self.block_size, [*VALUE_COLUMNS, *self.columns]):
                yield block.take(rng.permutation(block.num_rows))


class CellCollator:
    """Turns rows of a dataset into dense tensors in model space.

    Parameters
    ----------
    processor
        Gives genes, transform and labels.
    var
        Gene vocabulary of the dataset.
    expect_counts
        Also give counts and library sizes, for a model with a count head.
    token_key
        That of the dataset, see [`CellDataset`].
    """

    def __init__(
        self, processor: SCRDiTProcessor, var: pd.DataFrame, expect_counts: bool = False, token_key: str | None = None
    ):
        if expect_counts and not processor.models_counts:
            raise ValueError(
                'expect_counts=True needs a processor whose model sees counts (value_space="counts" or recover_counts).'
            )
        self.processor = processor
        self.expect_counts = expect_counts
        self.num_vars = len(var)
        self.positions = token_positions(var, token_key)
        self.columns = processor.gene_columns([str(gene) for gene in var.index])

    def __call__(self, rows: pa.Table) -> dict[str, torch.Tensor]:
        """Collate B rows.

        Returns
        -------
        `values` (B, G) float32 in model space, `class_labels` (B, K) int64, and with `expect_counts` also `counts`
        (B, G) and `library_size` (B,), float32.
        """
        matrix = rows_to_matrix(rows, self.num_vars, self.positions)
        values, library_size = self.processor.value_kind.model_values(matrix, self.columns)
        obs = rows_to_obs(rows, self.processor.labels_keys)
        if self.processor.models_counts:
            obs = self.processor.add_states(obs, values)
        batch = {
            "values": torch.from_numpy(self.processor.transform(values)).float(),
            "class_labels": torch.from_numpy(self.processor.encode_labels(obs)),
        }
        if self.expect_counts:
            batch["counts"] = torch.from_numpy(values.toarray()).float()
            batch["library_size"] = torch.from_numpy(library_size).float()
        return batch


class CellBatches:
    """Endless full batches for training, as tensors: call it with the number of the first batch.

    Parameters
    ----------
    dataset
        Training cells, in memory-mapped files or streamed.
    num_cells
        Number of cells.
    batch_size
        Cells per batch of one process.
    collate
        Makes tensors of rows.
    columns
        Columns of obs that the model is conditioned on.
    seed
        Makes the order reproducible.
    num_processes
        Number of processes; 1 for a stream.
    process_index
        Number of this process.
    num_workers
        Processes that collate; at most 1 for a stream.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        num_cells: int,
        batch_size: int,
        collate: CellCollator,
        columns: Sequence[str] = (),
        seed: int = 0,
        num_processes: int = 1,
        process_index: int = 0,
        num_workers: int = 0,
    ):
        self.dataset, self.num_cells, self.batch_size, self.collate = dataset, num_cells, batch_size, collate
        self.columns, self.seed, self.num_workers = columns, seed, num_workers
        self.num_processes, self.process_index = num_processes, process_index

    def __call__(self, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Iterate over the batches from number `start` on."""
        # Without a generator of its own the loader would draw from the one of dropout.
        options: dict[str, Any] = {
            "num_workers": self.num_workers,
            "collate_fn": self.collate,
            "generator": torch.Generator(),
        }
        if isinstance(self.dataset, datasets.IterableDataset):
            stream = CellStream(
                self.dataset, self.num_cells, self.batch_size, self.columns, seed=self.seed, start=start
            )
            return iter(DataLoader(stream, batch_size=None, **options))
        sampler = BatchSampler(
            self.num_cells, self.batch_size, self.num_processes, self.process_index, self.seed, start
        )
        return iter(DataLoader(CellRows(self.dataset, self.columns), batch_sampler=sampler, **options))
