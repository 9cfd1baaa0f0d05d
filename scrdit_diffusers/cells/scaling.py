"""How log-normalized values were made from counts: base of the logarithm, and scales of genes such as those of TPM."""

import numpy as np
import scipy.sparse as sp

from scrdit_diffusers.values import MAX_INEXACT, MAX_OFF, are_multiples, find_units, recover_counts

LOG_BASES = (np.e, 2.0, 10.0)
MAX_LOG = 50  # of any value
SAMPLE_CELLS, SAMPLE_VALUES = 2000, 2_000_000  # are enough
MAX_SMALLEST = 20  # counts of a gene in the cell that has fewest of it
MAX_ROUNDS = 4
MIN_NEAR = 0.5  # share of whole multiples in the first round; one in ten is by chance
MIN_SHARED = 3  # genes of a cell that agree on its scale
MIN_MULTIPLES = 100  # values above one count, without which nothing is known
SAME_RATIO = 1e-3  # largest difference of the logarithms of equal ratios, for values of three decimals


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
        multiples = values.data / np.repeat(cell_scale, np.diff(values.indptr))
        counts = np.rint(multiples)
        telling = (counts > 1) & (counts < 50)  # the smallest value of a gene is always one count
        near = np.abs(multiples - counts)[telling] <= 0.05 + 1e-3 * counts[telling]
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
