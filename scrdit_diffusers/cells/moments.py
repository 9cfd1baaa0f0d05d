"""Moments of cells that need not fit in memory: what the processor and the count head learn from training cells.

All are sums over chunks of rows, so that memory grows with the number of genes, not with the number of cells. A pass
over the cells may be spread over processes, see [`run_pass`].
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import pandas as pd
import scipy.sparse as sp

ROWS_PER_CHUNK = 10_000  # keeps the int32 offsets of a chunk's lists far from overflow
ROWS_PER_UPDATE = 1000  # of which the temporary arrays fit a processor's cache
MAX_PENDING = 2**20  # library sizes to collect before equal ones are joined

Chunks = Callable[[], Iterator[tuple[sp.csr_matrix, pd.DataFrame]]]
"""Starts a pass over the cells: yields values (cells, n_vars) and obs (cells, columns) of some rows at a time."""


class Accumulator(Protocol):
    """What a pass gathers."""

    def update(self, matrix: sp.csr_matrix, obs: Any, /) -> None:
        """Take in more cells."""

    def merge(self, other: Self, /) -> None:
        """Take in what another one has gathered of later cells."""


A = TypeVar("A", bound=Accumulator)


def run_pass(accumulator: A, parts: Sequence[Chunks], map_parts: Callable[..., Iterable[Any]] = map) -> A:
    """Go through all cells once.

    A copy of `accumulator` takes in each part. The copies are merged in the order of the parts, so that the result does
    not depend on who has gone through them.

    Parameters
    ----------
    accumulator
        Gathers.
    parts
        Each starts a pass over its part of the cells.
    map_parts
        `map`, or that of a `concurrent.futures` executor, which spreads the parts over its processes.

    Returns
    -------
    `accumulator`, of all cells.
    """
    start = copy.deepcopy(accumulator)  # `map` takes the next part only after the last was merged
    for part in map_parts(partial(_run_part, start), parts):
        accumulator.merge(part)
    return accumulator


def _run_part(start: A, chunks: Chunks) -> A:
    accumulator = copy.deepcopy(start)
    for matrix, obs in chunks():
        accumulator.update(matrix, obs)
    return accumulator


def gene_moments(matrix: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each column, in two passes: E[x^2] - E[x]^2 would take rounding for variance."""
    matrix = sp.csr_matrix(matrix)
    num_cells, num_vars = matrix.shape
    columns = matrix.indices.astype(np.intp)  # once, else each of the next lines would
    mean = np.bincount(columns, matrix.data, num_vars) / num_cells
    zeros = num_cells - np.bincount(columns, minlength=num_vars)
    squares = np.bincount(columns, (matrix.data - mean[columns]) ** 2, num_vars)
    return mean, (squares + zeros * mean**2) / num_cells


class GeneMoments:
    """Mean and variance of each gene over chunks of cells.

    Within a chunk as in [`gene_moments`]; chunks are joined by the pairwise formula, which loses no digits either.

    References
    ----------
    Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", equation 1.5.
    """

    def __init__(self, num_vars: int):
        self.num_cells = 0
        self.mean = np.zeros(num_vars)
        self.squares = np.zeros(num_vars)  # summed squared distances from the mean

    def update(self, matrix: sp.csr_matrix) -> None:
        """Take in more cells, shape (cells, n_vars)."""
        mean, variance = gene_moments(matrix)
        self._join(matrix.shape[0], mean, variance * matrix.shape[0])

    def merge(self, other: "GeneMoments") -> None:
        """Take in the cells of another one."""
        if other.num_cells:
            self._join(other.num_cells, other.mean, other.squares)

    def _join(self, new: int, mean: np.ndarray, squares: np.ndarray) -> None:
        total, distance = self.num_cells + new, mean - self.mean
        self.mean = self.mean + distance * (new / total)
        self.squares = self.squares + squares + distance**2 * (self.num_cells * new / total)
        self.num_cells = total

    def variance(self, ddof: int = 0) -> np.ndarray:
        """Variance of each gene, shape (n_vars,)."""
        return self.squares / (self.num_cells - ddof)


class CellMoments:
    """Labels, library sizes and count sums of cells, by combination of labels.

    Parameters
    ----------
    combinations
        Codes of the combinations of labels that occur, sorted, shape (combinations, K).
    num_genes
        Number of genes G, for counts; `None` for other values, of which only the labels are counted.
    """

    def __init__(self, combinations: np.ndarray, num_genes: int | None):
        self.combinations = combinations
        self.num_cells = np.zeros(len(combinations), dtype=np.int64)
        self.counts = num_genes is not None
        self._shape = tuple(combinations.max(axis=0) + 1)
        self._keys = self._key(combinations)
        if num_genes is None:
            return
        self.count_max = np.zeros(num_genes)
        self.square_sum = np.zeros(num_genes)
        self.count_sum = np.zeros((len(combinations), num_genes))
        self.weighted_sum = np.zeros((len(combinations), num_genes))  # counts times library size
        self._sizes = np.empty(0, dtype=np.int64)  # each library size of a combination once ...
        self._numbers = np.empty(0, dtype=np.int64)  # ... and how many cells have it
        self._pending: list[np.ndarray] = []

    @classmethod
    def from_counts(cls, counts: sp.csr_matrix, class_labels: np.ndarray) -> "CellMoments":
        """Of counts (cells, G) and codes (cells, K) in memory."""
        class_labels = np.asarray(class_labels).astype(np.int64)
        statistics = cls(np.unique(class_labels, axis=0), counts.shape[1])
        for start in range(0, counts.shape[0], ROWS_PER_UPDATE):
            rows = slice(start, start + ROWS_PER_UPDATE)
            statistics.update(counts[rows], class_labels[rows])
        return statistics

    def save(self, path: str | Path) -> None:
        """Write to a .npz file."""
        if self.counts:
            self._join_sizes()
        arrays = {name: array for name, array in vars(self).items() if isinstance(array, np.ndarray)}
        np.savez(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "CellMoments":
        """Read what `save` has written."""
        with np.load(path) as arrays:
            num_genes = len(arrays["count_max"]) if "count_max" in arrays else None
            statistics = cls(arrays["combinations"], num_genes)
            vars(statistics).update(arrays)
        return statistics

    def _key(self, codes: np.ndarray) -> np.ndarray:
        """One number for each combination of codes (cells, K), ordered as the codes are."""
        if not codes.shape[1]:
            return np.zeros(len(codes), dtype=np.int64)
        return np.ravel_multi_index(tuple(codes.T), self._shape)

    def update(
        self, counts: sp.csr_matrix | None, class_labels: np.ndarray, library_sizes: np.ndarray | None = None
    ) -> None:
        """Take in more cells: counts (cells, G), codes (cells, K), and library sizes where they are not the sums."""
        of_cell = np.searchsorted(self._keys, self._key(class_labels))  # (cells,)
        present, of_present, number = np.unique(of_cell, return_inverse=True, return_counts=True)
        self.num_cells[present] += number
        if counts is None:
            return
        counts = sp.csr_matrix(counts, dtype=np.float64)
        size = np.rint(counts.sum(axis=1).A1 if library_sizes is None else library_sizes)
        self._pending.append(of_cell * 2**40 + size.astype(np.int64))
        if sum(map(len, self._pending)) > MAX_PENDING:
            self._join_sizes()
        cells = np.arange(len(size))
        for total, weight in ((self.count_sum, np.ones(len(size))), (self.weighted_sum, np.maximum(size, 1))):
            members = sp.csr_matrix((weight, (of_present.ravel(), cells)), shape=(len(present), len(size)))
            total[present] += (members @ counts).toarray()
        columns = counts.indices.astype(np.intp)
        np.maximum.at(self.count_max, columns, counts.data)
        self.square_sum += np.bincount(columns, counts.data**2, len(self.square_sum))

    def merge(self, other: "CellMoments") -> None:
        """Take in the cells of another one of the same combinations of labels."""
        self.num_cells += other.num_cells
        if not self.counts:
            return
        for name in ("count_sum", "weighted_sum", "square_sum"):
            getattr(self, name).__iadd__(getattr(other, name))
        np.maximum(self.count_max, other.count_max, out=self.count_max)
        other._join_sizes()
        self._merge_sizes(other._sizes, other._numbers)

    def _join_sizes(self) -> None:
        pending = np.concatenate([self._sizes[:0], *self._pending])
        self._pending = []
        self._merge_sizes(pending, np.ones(len(pending), dtype=np.int64))

    def _merge_sizes(self, sizes: np.ndarray, numbers: np.ndarray) -> None:
        self._sizes, place = np.unique(np.concatenate([self._sizes, sizes]), return_inverse=True)
        numbers = np.concatenate([self._numbers, numbers])
        self._numbers = np.bincount(place.ravel(), weights=numbers).astype(np.int64)

    def drop_absent(self) -> None:
        """Forget combinations of labels that no cell has."""
        present = self.num_cells > 0
        self.combinations, self._keys, self.num_cells = (
            array[present] for array in (self.combinations, self._keys, self.num_cells)
        )
        if self.counts:
            self._join_sizes()
            self.count_sum, self.weighted_sum = self.count_sum[present], self.weighted_sum[present]
            place = np.cumsum(present) - 1
            self._sizes = (place[self._sizes >> 40] << 40) | (self._sizes & (2**40 - 1))

    def library_sizes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Library sizes that occur: their combination of labels, their size, and how many cells have them."""
        self._join_sizes()
        return self._sizes >> 40, self._sizes & (2**40 - 1), self._numbers

    def log_library_size(self) -> tuple[float, float]:
        """Mean and standard deviation over cells of the log library size; an empty cell counts as one of size 1."""
        _, size, number = self.library_sizes()
        log_size = np.log(np.maximum(size, 1))
        mean = float(np.average(log_size, weights=number))
        return mean, float(np.sqrt(np.average((log_size - mean) ** 2, weights=number)))

    def library_size_quantiles(self, num_levels: int) -> np.ndarray:
        """Quantiles of the log library size from 0 to 1, shape (combinations, `num_levels`)."""
        combination, size, number = self.library_sizes()
        log_size = np.log(np.maximum(size, 1))
        starts = np.searchsorted(combination, np.arange(len(self.combinations) + 1))
        cells = [np.repeat(log_size[a:b], number[a:b]) for a, b in zip(starts[:-1], starts[1:], strict=True)]
        return np.stack([np.quantile(of_one, np.linspace(0, 1, num_levels)) for of_one in cells])

    def mean_profile(self) -> np.ndarray:
        """Share of each gene in the library sizes of all cells, shape (G,)."""
        _, size, number = self.library_sizes()
        return self.count_sum.sum(axis=0) / (np.maximum(size, 1) * number).sum()

    def inverse_dispersion(self) -> np.ndarray:
        """Moment estimate of each gene's inverse dispersion, shape (G,).

        The mean of a cell is its library size times the profile of its combination of labels.
        """
        combination, size, number = self.library_sizes()
        size = np.maximum(size, 1).astype(np.float64)
        size_sum = np.bincount(combination, size * number)[:, None]  # (combinations, 1)
        size_square_sum = np.bincount(combination, size**2 * number)[:, None]
        profile = self.count_sum / size_sum  # (combinations, G)
        squared_means = (profile**2 * size_square_sum).sum(axis=0)
        squares = self.square_sum - 2 * (profile * self.weighted_sum).sum(axis=0) + squared_means
        excess = squares - (profile * size_sum).sum(axis=0)  # variance beyond Poisson, summed over cells
        return np.clip(squared_means / np.maximum(excess, 1e-6), 0.1, 200)
