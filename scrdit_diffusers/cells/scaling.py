"""How log-normalized values were made from counts: base of the logarithm, and scales of genes such as those of TPM."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scrdit_diffusers.checks import check_values
from scrdit_diffusers.values import MAX_INEXACT, MAX_OFF, are_multiples, find_units, recover_counts

STEPS_PER_STD = 15  # for log-normalized values that are not scaled counts, and are counted in steps
LOG_BASES = (np.e, 2.0, 10.0)
MAX_LOG = 50  # of any value
SAMPLE_CELLS, SAMPLE_VALUES = 2000, 2_000_000  # are enough
MAX_SMALLEST = 20  # counts of a gene in the cell that has fewest of it
MAX_ROUNDS = 4
MIN_NEAR = 0.5  # share of whole multiples in the first round; one in ten is by chance
MIN_SHARED = 3  # genes of a cell that agree on its scale
MIN_MULTIPLES = 100  # values above one count, without which nothing is known
SAME_RATIO = 1e-3  # largest difference of the logarithms of equal ratios, for values of three decimals


def ignore_overflow() -> np.errstate:
    """Let sums overflow: those of counts that were taken for logarithms, which are refused at the end of the pass."""
    return np.errstate(over="ignore", invalid="ignore")


class Normalization:
    """How log-normalized values were made from counts, and what else is known about positive ones.

    Parameters
    ----------
    name
        What to call the values in messages.
    num_vars
        Number of genes of the data.
    log_base, gene_scale
        How values may have been made, see [`find_scaling`].
    """

    def __init__(self, name: str, num_vars: int, log_base: float = np.e, gene_scale: np.ndarray | None = None):
        self.name, self.log_base, self.gene_scale = name, log_base, gene_scale
        self.num_cells = self.num_exact = self.num_positive = 0
        self.total = self.sum = self.squares = 0.0
        self.smallest = np.full(num_vars, np.inf)
        self.smallest_scale = np.full(num_vars, np.inf)  # of genes whose scale is not known
        self.first: list[sp.csr_matrix] = []  # some cells

    def update(self, matrix: sp.csr_matrix, obs: pd.DataFrame) -> None:
        """Take in more cells."""
        check_values(matrix, self.name, expect_counts=False)
        positive = matrix.data > 0
        values = matrix.data[positive].astype(np.float64)
        with ignore_overflow():
            self.num_exact += int(self._find_exact(matrix).sum())
            self.total += np.expm1(values * np.log(self.log_base)).sum()
        self.num_cells += matrix.shape[0]
        self.num_positive += len(values)
        self.sum += values.sum()
        self.squares += (values**2).sum()
        np.minimum.at(self.smallest, matrix.indices[positive], values)
        self._keep([matrix])

    def _find_exact(self, matrix: sp.csr_matrix) -> np.ndarray:
        """Find the cells whose values have counts behind them, shape (cells,)."""
        if self.gene_scale is None:
            return recover_counts(matrix, self.log_base)[2]
        known = np.isfinite(self.gene_scale)
        _, one_count, exact = recover_counts(matrix[:, known], self.log_base, self.gene_scale[known])
        others = sp.csr_matrix(matrix[:, ~known], dtype=np.float64)
        scales = np.expm1(others.data * np.log(self.log_base)) / np.repeat(one_count, np.diff(others.indptr))
        np.minimum.at(self.smallest_scale, np.flatnonzero(~known)[others.indices[scales > 0]], scales[scales > 0])
        return exact

    def _keep(self, matrices: Sequence[sp.csr_matrix]) -> None:
        """Keep cells until there are enough."""
        for matrix in matrices:
            missing = SAMPLE_CELLS - sum(kept.shape[0] for kept in self.first)
            if missing > 0:
                self.first.append(matrix[:missing])

    def merge(self, other: "Normalization") -> None:
        """Take in the cells of another one."""
        for name in ("num_cells", "num_exact", "num_positive", "total", "sum", "squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        np.minimum(self.smallest, other.smallest, out=self.smallest)
        np.minimum(self.smallest_scale, other.smallest_scale, out=self.smallest_scale)
        self._keep(other.first)

    def sample(self) -> sp.csr_matrix:
        """Values of the first cells, shape (cells, n_vars)."""
        return sp.vstack(self.first or [sp.csr_matrix((0, len(self.smallest)))], format="csr")

    def scales_of_all_genes(self) -> dict[str, np.ndarray]:
        """`gene_scale`, shape (n_vars,), if there are; where the sample has none, the smallest value is one count."""
        if self.gene_scale is None:
            return {}
        scale = np.where(np.isfinite(self.gene_scale), self.gene_scale, self.smallest_scale)
        return {"gene_scale": np.where(np.isfinite(scale), scale, 1.0)}

    def library_size(self) -> float | None:
        """Library size to which counts were scaled; `None` where there are no scaled counts."""
        if self.num_cells - self.num_exact > MAX_INEXACT * self.num_cells or not self.total:
            return None
        return float(f"{self.total / self.num_cells:.6g}")  # 10,000 and not 9,999.9997

    def value_step(self) -> float:
        """Choose a fine step of positive values."""
        number = max(self.num_positive, 1)
        variance = self.squares / number - (self.sum / number) ** 2
        return float(np.sqrt(variance)) / STEPS_PER_STD if variance > 1e-12 else 1.0


def find_scaling(values: sp.csr_matrix) -> tuple[float, np.ndarray | None] | None:
    """Find how values were made from counts k of cell i and gene g: v = log(1 + c_i w_g k).

    Parameters
    ----------
    values
        Values of some cells over all genes of the data, shape (cells, n_vars).

    Returns
    -------
    Base of the logarithm, and w, shape (n_vars,), NaN for genes that are zero in these cells, or `None` if all are 1.
    `None` if there are no counts behind the values.
    """
    values = sp.csr_matrix(values, dtype=np.float64, copy=True)
    values.eliminate_zeros()
    values = values[: max(np.searchsorted(values.indptr, SAMPLE_VALUES), 2)]
    if not values.nnz or values.max() > MAX_LOG:
        return None
    for log_base in LOG_BASES:
        if (~recover_counts(values, log_base)[2]).mean() <= MAX_INEXACT:
            return log_base, None
    for log_base in LOG_BASES:
        scaled = values.copy()
        scaled.data = np.expm1(scaled.data * np.log(log_base))
        gene_scale = find_gene_scale(scaled)
        if gene_scale is not None:
            return log_base, gene_scale
    return None


def find_gene_scale(scaled: sp.csr_matrix) -> np.ndarray | None:
    """Find w in values c_i w_g k of whole counts k, where neither c nor w is known.

    Most counts are small, so that the ratio of two cells is c_i / c_j in more genes than it is any other number. With
    c known, the values of a gene are whole multiples of w_g.

    Parameters
    ----------
    scaled
        Positive values, shape (cells, n_vars).

    Returns
    -------
    w, shape (n_vars,), NaN for a gene that is zero everywhere; the sums of k and of w k over all cells are equal.
    `None` if the values are no multiples of such numbers.
    """
    cell_scale = _ratios_to_largest(scaled)
    for _ in range(MAX_ROUNDS):  # cells whose ratio was that of two counts with one are corrected, then their genes
        known = np.isfinite(cell_scale)
        by_gene = sp.csr_matrix((sp.diags_array(1 / cell_scale[known]) @ scaled[known]).T)
        gene_scale = _find_large_units(by_gene, MAX_SMALLEST)
        found = np.isfinite(gene_scale)
        values = scaled[:, found]
        values.data /= gene_scale[found][values.indices]
        before, cell_scale = cell_scale, _find_large_units(values)
        counts = np.rint(values.data / np.repeat(cell_scale, np.diff(values.indptr)))
        telling = (counts > 1) & (counts < 50)  # the smallest value of a gene is always one count
        near = are_multiples(values, cell_scale)[telling]
        if len(near) < MIN_MULTIPLES or near.mean() < MIN_NEAR:
            return None
        if np.allclose(cell_scale, before, rtol=0.1):
            break
    if near.mean() < 1 - MAX_OFF:
        return None
    weighed = counts * gene_scale[found][values.indices]
    return np.where(found, gene_scale, np.nan) * counts.sum() / weighed.sum()


def _find_large_units(values: sp.csr_matrix, max_smallest: int = 3) -> np.ndarray:
    """[`find_units`], but twice or three times as large where nearly all values are multiples of that as well."""
    unit, _ = find_units(values, max_smallest, MAX_OFF)
    sizes = np.diff(values.indptr)
    rows = np.repeat(np.arange(len(unit)), sizes)
    for factor in (2, 3):
        off = np.bincount(rows[~are_multiples(values, factor * unit)], minlength=len(unit))
        unit = np.where(off <= MAX_OFF * sizes, factor * unit, unit)
    return unit


def _ratios_to_largest(scaled: sp.csr_matrix) -> np.ndarray:
    """Most frequent ratio of each cell's values to those of the cell with most genes; NaN where few genes share one."""
    largest = scaled[[np.argmax(np.diff(scaled.indptr))]]
    logs = np.full(scaled.shape[1], np.nan)
    logs[largest.indices] = np.log(largest.data)
    ratios = np.full(scaled.shape[0], np.nan)
    for i, (start, end) in enumerate(zip(scaled.indptr, scaled.indptr[1:], strict=False)):
        differences = np.log(scaled.data[start:end]) - logs[scaled.indices[start:end]]
        differences = np.sort(differences[np.isfinite(differences)])
        if len(differences):
            number = np.searchsorted(differences, differences + SAME_RATIO, side="right") - np.arange(len(differences))
            first = number.argmax()
            if number[first] >= MIN_SHARED:
                ratios[i] = np.exp(differences[first : first + number[first]].mean())
    return ratios
