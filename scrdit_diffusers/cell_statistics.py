"""Statistics of cells that need not fit in memory: what the processor and the count head learn from training cells.

All are sums over chunks of rows, so that memory grows with the number of genes, not with that of cells. The first pass
gives the moments from which genes are chosen; library sizes are those over the chosen genes and need a second one. The
flavor "seurat_v3" needs one more in between, for variances of clipped counts. A pass may be spread over processes, see
[`take_in`].
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import pandas as pd
import scipy.sparse as sp

logger = logging.getLogger(__name__)

GENE_FLAVORS = ("seurat", "cell_ranger", "seurat_v3", "cv", "all")
ROWS_PER_CHUNK = 10_000  # keeps the int32 offsets of a chunk's lists far from overflow
ROWS_PER_UPDATE = 1000  # of which the temporary arrays fit a processor's cache
MAX_COUNT = 2**24  # the largest range of integers that float32, AnnData's usual dtype, holds exactly
MAX_PENDING = 2**20  # library sizes to collect before equal ones are joined

Chunks = Callable[[], Iterator[tuple[sp.csr_matrix, pd.DataFrame]]]
"""Starts a pass over the cells: yields values (cells, n_vars) and obs (cells, columns) of some rows at a time."""


class Sums(Protocol):
    """What a pass gathers."""

    def update(self, matrix: sp.csr_matrix, obs: Any, /) -> None:
        """Take in more cells."""

    def merge(self, other: Self, /) -> None:
        """Take in what another one has gathered of later cells."""


S = TypeVar("S", bound=Sums)


def take_in(sums: S, parts: Sequence[Chunks], map_parts: Callable[..., Iterable[Any]] = map) -> S:
    """Go through all cells once.

    A copy of `sums` takes in each part; the copies are merged in the order of the parts, so that the result does not
    depend on who has gone through them.

    Parameters
    ----------
    sums
        Gathers.
    parts
        Each starts a pass over its part of the cells.
    map_parts
        `map`, or that of a `concurrent.futures` executor, which spreads the parts over its processes.

    Returns
    -------
    `sums`, of all cells.
    """
    start = copy.deepcopy(sums)  # `map` takes the next part only after the last was merged
    for of_part in map_parts(partial(_take_in_part, start), parts):
        sums.merge(of_part)
    return sums


def _take_in_part(start: S, chunks: Chunks) -> S:
    sums = copy.deepcopy(start)
    for matrix, obs in chunks():
        sums.update(matrix, obs)
    return sums


def normalize_total(counts: sp.csr_matrix, target_sum: float) -> sp.csr_matrix:
    """Scale counts to one library size: `counts / library size x target_sum`, the library size over all columns."""
    library_size = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    scale = target_sum / np.where(library_size > 0, library_size, 1.0)
    values = counts.data * np.repeat(scale, np.diff(counts.indptr))
    return sp.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


def normalize_log1p(counts: sp.csr_matrix, target_sum: float) -> sp.csr_matrix:
    """Log-normalise counts: `log1p(counts / library size x target_sum)`, the library size over all columns."""
    return normalize_total(sp.csr_matrix(counts), target_sum).log1p()


def recover_counts(values: sp.csr_matrix) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Find the counts behind log-normalised values `log1p(c x counts)`, where c differs between cells.

    The smallest value of a cell is one count (or two or three), and all others are whole multiples.

    Parameters
    ----------
    values
        Natural logarithms as scanpy's `normalize_total` and `log1p` give them, shape (cells, n_vars).

    Returns
    -------
    Counts, shape (cells, n_vars); c of each cell, shape (cells,), infinite for a cell without any; and whether all of a
    cell's values are whole multiples, shape (cells,).
    """
    values = sp.csr_matrix(values, dtype=np.float64).expm1()
    values.eliminate_zeros()
    num_cells = values.shape[0]
    rows = np.repeat(np.arange(num_cells), np.diff(values.indptr))
    smallest = np.full(num_cells, np.inf)
    np.minimum.at(smallest, rows, values.data)
    one_count, exact = smallest.copy(), np.zeros(num_cells, dtype=bool)
    for of_smallest in (1, 2, 3):
        one_count[~exact] = smallest[~exact] / of_smallest
        # The smallest value may be rounded; all of up to 50 counts together know better.
        multiples = values.data / one_count[rows]
        few = multiples < 50
        total = np.bincount(rows[few], values.data[few], num_cells)
        count = np.bincount(rows[few], np.rint(multiples[few]), num_cells)
        one_count = np.divide(total, count, out=one_count, where=count > 0)
        multiples = values.data / one_count[rows]
        off = np.abs(multiples - np.rint(multiples)) > 0.05 + 1e-3 * multiples  # of values with three decimals
        exact = np.bincount(rows[off | (multiples > MAX_COUNT)], minlength=num_cells) == 0
        if exact.all():
            break
    counts = sp.csr_matrix((np.maximum(np.rint(multiples), 1), values.indices, values.indptr), shape=values.shape)
    return counts, one_count, exact


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


class GeneChoice:
    """Chooses genes from what one pass over the cells has shown.

    Parameters
    ----------
    flavor
        "seurat", "cell_ranger" and "seurat_v3" choose as `scanpy.pp.highly_variable_genes` does, "cv" by the
        coefficient of variation, "all" every expressed gene.
    n_top_genes
        How many genes to choose.
    num_vars
        Number of genes of the data.
    counts
        Whether values are counts; else they are log-normalised.

    Raises
    ------
    ValueError
        An argument is unknown or does not fit the values.

    References
    ----------
    "seurat": Satija et al. 2015; "cell_ranger": Zheng et al. 2017; "seurat_v3": Stuart et al. 2019.
    """

    def __init__(self, flavor: str, n_top_genes: int, num_vars: int, counts: bool):
        if flavor not in GENE_FLAVORS:
            raise ValueError(f"flavor must be one of {GENE_FLAVORS}, got {flavor!r}.")
        if n_top_genes < 1:
            raise ValueError(
                f'n_top_genes must be at least 1, got {n_top_genes}; use flavor="all" for all expressed genes.'
            )
        if flavor == "seurat_v3" and not counts:
            raise ValueError('flavor="seurat_v3" chooses genes from counts; use "seurat" for log-normalised values.')
        self.flavor, self.n_top_genes, self.counts = flavor, n_top_genes, counts
        self.num_expressing = np.zeros(num_vars, dtype=np.int64)
        self.moments = GeneMoments(num_vars)

    def update(self, matrix: sp.csr_matrix) -> None:
        """Take in more cells, shape (cells, n_vars)."""
        self.num_expressing += matrix.getnnz(axis=0) if (matrix.data > 0).all() else (matrix > 0).sum(axis=0).A1
        if self.flavor == "seurat":
            self.moments.update(normalize_total(matrix, 1e4) if self.counts else matrix.astype(np.float64).expm1())
        elif self.flavor == "cell_ranger":
            self.moments.update(normalize_log1p(matrix, 1e4) if self.counts else matrix)
        elif self.flavor != "all":
            self.moments.update(matrix)

    def merge(self, other: "GeneChoice") -> None:
        """Take in the cells of another one."""
        self.num_expressing += other.num_expressing
        self.moments.merge(other.moments)

    def choose(self, parts: Sequence[Chunks], map_parts: Callable[..., Iterable[Any]] = map) -> np.ndarray:
        """Positions of the chosen genes; "seurat_v3" takes another pass over the cells, see [`take_in`]."""
        expressed = np.flatnonzero(self.num_expressing)
        if self.flavor == "all" or len(expressed) <= self.n_top_genes:
            if self.flavor != "all" and len(expressed) < self.n_top_genes:
                logger.warning("Only %d genes are expressed: all of them are used.", len(expressed))
            return expressed
        mean, variance = self.moments.mean[expressed], self.moments.variance(ddof=1)[expressed]
        if self.flavor in ("seurat", "cell_ranger"):
            score = _normalized_dispersion(mean, variance, self.flavor)
            smallest = np.sort(score[~np.isnan(score)])[-self.n_top_genes :][0]
            return expressed[np.nan_to_num(score, nan=-np.inf) >= smallest]
        if self.flavor == "seurat_v3":
            score = self._clipped_variance(expressed, mean, variance, parts, map_parts)
        else:
            score = np.sqrt(self.moments.variance()[expressed]) / mean
        return np.sort(expressed[np.argsort(-score, kind="stable")[: self.n_top_genes]])

    def _clipped_variance(self, columns, mean, variance, parts, map_parts) -> np.ndarray:
        """Variance of the standardised counts, those beyond sqrt(cells) standard deviations clipped.

        The standard deviation of a gene is what a local regression on the mean expects.
        """
        from skmisc.loess import loess  # here, because no other flavor needs it

        varies = variance > 0
        model = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=0.3, degree=2)
        model.fit()
        expected = np.zeros(len(columns))
        expected[varies] = model.outputs.fitted_values
        std = np.sqrt(10**expected)
        num_cells = self.moments.num_cells
        clipped = take_in(ClippedSums(columns, std * np.sqrt(num_cells) + mean), parts, map_parts)
        squares = clipped.squares - 2 * clipped.sums * mean
        return (num_cells * mean**2 + squares) / ((num_cells - 1) * std**2)


class ClippedSums:
    """Sums of values, and of their squares, of which none is above its gene's largest.

    Parameters
    ----------
    columns
        Positions of genes.
    largest
        Largest value of each of these genes.
    """

    def __init__(self, columns: np.ndarray, largest: np.ndarray):
        self.columns, self.largest = columns, largest
        self.sums, self.squares = np.zeros(len(columns)), np.zeros(len(columns))

    def update(self, matrix: sp.csr_matrix, obs: Any = None) -> None:
        """Take in more cells, shape (cells, n_vars)."""
        matrix = matrix[:, self.columns]
        columns = matrix.indices.astype(np.intp)
        values = np.minimum(matrix.data, self.largest[columns])
        self.sums += np.bincount(columns, values, len(self.sums))
        self.squares += np.bincount(columns, values**2, len(self.sums))

    def merge(self, other: "ClippedSums") -> None:
        """Take in the cells of another one."""
        self.sums += other.sums
        self.squares += other.squares


def _normalized_dispersion(mean: np.ndarray, variance: np.ndarray, flavor: str) -> np.ndarray:
    """Variance over mean of each gene, standardised among the genes with a similar mean."""
    dispersion = variance / mean
    if flavor == "seurat":
        dispersion[dispersion == 0] = np.nan
        genes = pd.DataFrame({"mean": np.log1p(mean), "dispersion": np.log(dispersion)})
        bins = pd.cut(genes["mean"], bins=20)
        grouped = genes["dispersion"].groupby(bins, observed=True)
        center, scale = grouped.transform("mean"), grouped.transform("std")
        alone = scale.isna()  # no other gene in the bin: its score is 1
        center, scale = center.mask(alone, 0.0), scale.mask(alone, center)
    else:
        genes = pd.DataFrame({"mean": mean, "dispersion": dispersion})
        edges = np.r_[-np.inf, np.percentile(mean, np.arange(10, 105, 5)), np.inf]
        bins = pd.cut(genes["mean"], bins=edges)
        center = genes["dispersion"].groupby(bins, observed=True).transform("median")
        distance = (genes["dispersion"] - center).abs().groupby(bins, observed=True)
        scale = distance.transform("median") / 0.6744897501960817  # of a normal: the standard deviation
    return ((genes["dispersion"] - center) / scale).to_numpy()


class CellStatistics:
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
    def from_counts(cls, counts: sp.csr_matrix, class_labels: np.ndarray) -> "CellStatistics":
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
    def load(cls, path: str | Path) -> "CellStatistics":
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
        """Take in more cells: counts (cells, G), codes (cells, K), and library sizes where these are no sums."""
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

    def merge(self, other: "CellStatistics") -> None:
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


def check_genes(genes: Sequence[str], var_names: Sequence[str], num_expressing: np.ndarray | None = None) -> np.ndarray:
    """Positions of named genes.

    Parameters
    ----------
    genes
        Names of the wanted genes.
    var_names
        Names of the genes of the data.
    num_expressing
        Number of cells that express each gene of the data; `None` before that is known.

    Raises
    ------
    ValueError
        A gene is missing, or no cell expresses any of them.
    """
    columns = pd.Index(var_names).get_indexer(pd.Index(genes))
    if (columns < 0).any():
        missing = [gene for gene, column in zip(genes, columns, strict=True) if column < 0]
        raise ValueError(f"{len(missing)} of {len(genes)} genes are not in adata.var_names, such as {missing[:5]}.")
    if num_expressing is not None and not num_expressing[columns].any():
        raise ValueError(f"All {len(columns)} genes are zero in every training cell: there is nothing to learn.")
    if num_expressing is not None and not num_expressing[columns].all():
        silent = (num_expressing[columns] == 0).sum()
        logger.warning("%d of the %d genes are zero in every training cell.", silent, len(columns))
    return columns
