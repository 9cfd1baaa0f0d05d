"""Which genes a model is trained on: scanpy's flavors and others, over cells that need not fit in memory."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scrdit_diffusers.values import normalize_log1p, normalize_total

from .moments import Chunks, GeneMoments, run_pass

logger = logging.getLogger(__name__)

GENE_FLAVORS = ("seurat", "cell_ranger", "seurat_v3", "cv", "all")


class GeneSelection:
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
        Whether values are counts; otherwise they are log-normalized.

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
            raise ValueError('flavor="seurat_v3" chooses genes from counts; use "seurat" for log-normalized values.')
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

    def merge(self, other: "GeneSelection") -> None:
        """Take in the cells of another one."""
        self.num_expressing += other.num_expressing
        self.moments.merge(other.moments)

    def select(self, parts: Sequence[Chunks], map_parts: Callable[..., Iterable[Any]] = map) -> np.ndarray:
        """Positions of the chosen genes; "seurat_v3" takes another pass over the cells, see [`run_pass`]."""
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
        """Variance of the standardized counts, those beyond sqrt(cells) standard deviations clipped.

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
        clipped = run_pass(ClippedSums(columns, std * np.sqrt(num_cells) + mean), parts, map_parts)
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
    """Variance over mean of each gene, standardized among the genes with a similar mean."""
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
