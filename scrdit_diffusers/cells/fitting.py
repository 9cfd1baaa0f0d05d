"""What is learned from a dataset of cells before training, kept in the cache of `datasets`."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pandas as pd
import scipy.sparse as sp
from datasets.fingerprint import Hasher
from filelock import FileLock

from scrdit_diffusers import cell_statistics, processing_scrdit
from scrdit_diffusers.cell_statistics import ROWS_PER_UPDATE, CellStatistics
from scrdit_diffusers.processing_scrdit import SCRDiTProcessor, _check_label

from .layout import VALUE_COLUMNS, iterate_rows, rows_to_matrix, rows_to_obs, token_positions

Table: TypeAlias = datasets.Dataset | datasets.IterableDataset
ROWS_PER_PART = 10**6  # of a table, whose parts are gone through separately to learn from them


@dataclass(frozen=True)
class TableChunks:
    """Starts a pass over some rows of a table, see [`SCRDiTProcessor.from_chunks`]; can be sent to another process."""

    table: Table
    num_vars: int
    positions: np.ndarray | None
    labels_key: tuple[str, ...]

    def __call__(self) -> Iterator[tuple[sp.csr_matrix, pd.DataFrame]]:
        """Values and labels of some rows at a time."""
        for rows in iterate_rows(self.table, ROWS_PER_UPDATE, [*VALUE_COLUMNS, *self.labels_key]):
            yield rows_to_matrix(rows, self.num_vars, self.positions), rows_to_obs(rows, self.labels_key)


def fit_table(
    table: Table,
    var: pd.DataFrame,
    labels_key: str | Sequence[str] = (),
    num_proc: int | None = None,
    **options: Any,
) -> tuple[SCRDiTProcessor, CellStatistics]:
    """Learn genes, transform and labels from a table, in two passes over it ("seurat_v3": three).

    What was learned from a table on disk is kept in the cache of `datasets`, where other processes and resumed runs
    find it. It does not depend on the number of processes.

    Parameters
    ----------
    table
        Training cells.
    var
        Its gene vocabulary.
    labels_key
        Column(s) that condition the model.
    num_proc
        Processes that go through a table on disk, each its share of parts of a million cells.
    **options
        As for [`SCRDiTProcessor.from_anndata`].

    Returns
    -------
    The processor, and the statistics from which a count head starts.

    Raises
    ------
    ValueError
        As [`SCRDiTProcessor.from_anndata`].
    """
    labels_key = [labels_key] if isinstance(labels_key, str) else list(labels_key)
    features, positions = table.features, token_positions(var)
    if features is not None:
        for key in labels_key:
            _check_label(pd.DataFrame(columns=[key for key in features if key not in VALUE_COLUMNS]), key)

    def fit() -> tuple[SCRDiTProcessor, CellStatistics]:
        parts = [TableChunks(part, len(var), positions, tuple(labels_key)) for part in _parts(table)]
        if num_proc is None or num_proc == 1 or len(parts) == 1:
            return SCRDiTProcessor.from_chunks(parts, var, labels_key, **options)
        # A fork of this process could wait for its threads for ever.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        workers = min(num_proc, len(parts))
        with ProcessPoolExecutor(workers, multiprocessing.get_context(method)) as executor:
            return SCRDiTProcessor.from_chunks(parts, var, labels_key, map_parts=executor.map, **options)

    if isinstance(table, datasets.IterableDataset) or not table.cache_files:
        return fit()
    code = [Path(module.__file__ or "").read_bytes() for module in (cell_statistics, processing_scrdit)]
    key = Hasher.hash([table._fingerprint, var.to_csv(), labels_key, sorted(options.items()), code])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "scrdit_processors" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            processor, statistics = fit()
            unfinished = Path(f"{folder}.incomplete")
            processor.save_pretrained(unfinished)
            statistics.save(unfinished / "statistics.npz")
            unfinished.rename(folder)
    return SCRDiTProcessor.from_pretrained(folder), CellStatistics.load(folder / "statistics.npz")


def _parts(table: Table) -> list[Table]:
    """Parts of a table that are gone through separately; a stream is one."""
    if isinstance(table, datasets.IterableDataset):
        return [table]
    starts = range(0, max(1, len(table)), ROWS_PER_PART)
    return [table.select(range(start, min(start + ROWS_PER_PART, len(table)))) for start in starts]
