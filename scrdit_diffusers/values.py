"""Kinds of values in a dataset, and what the model sees of them: counts, counts behind logs, steps, or plain logs.

The four classes have the same methods. The settings of a processor choose one, see [`choose_value_kind`].
"""

from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

from .checks import MAX_COUNT

VALUE_SPACES = ("counts", "log_normalized")
NORMALIZED_BY = ("library_size", "model_genes")
MAX_OFF = 0.02  # fraction of a cell's values that need not have a count behind them where genes have scales
MAX_INEXACT = 0.01  # fraction of cells, such as those with few genes, whose counts need not be recovered exactly


@dataclass(frozen=True)
class Counts:
    """Values are counts, and the model sees them.

    Parameters
    ----------
    zero
        Value of an exact zero in the log space: 0, unless there is zero negation.
    """

    zero: float = 0.0

    expect_counts = True  # values of the dataset must be integers
    models_counts = True  # the model sees counts
    scaled_counts = True  # the counts are numbers of molecules, whose sum is a library size

    def data_values(self, matrix: sp.csr_matrix, columns: np.ndarray | slice) -> sp.csr_matrix:
        """Select the model's genes from all genes (cells, n_vars), as values like those of the training data."""
        return matrix[:, columns]

    def model_values(
        self, matrix: sp.csr_matrix, columns: np.ndarray | slice
    ) -> tuple[sp.csr_matrix, np.ndarray | None]:
        """Return what the model sees: values (cells, G), and library sizes (cells,) if these are counts."""
        counts = matrix[:, columns]
        return counts, row_sums(counts)

    def to_log(self, nonzero: np.ndarray) -> np.ndarray:
        """Transform positive model values to the log space, where they are standardized."""
        return np.log1p(np.asarray(nonzero, dtype=np.float64))

    def from_log(self, values: np.ndarray) -> np.ndarray:
        """Invert [`to_log`]; counts are rounded."""
        return np.rint(np.expm1(np.minimum(values, np.log1p(MAX_COUNT))))

    def restore(self, values: sp.csr_matrix, library_sizes: np.ndarray | None) -> sp.csr_matrix:
        """Turn model values (cells, G) into values like those of the training data."""
        return values

    def library_sizes(self, values: sp.csr_matrix) -> np.ndarray:
        """Sum each cell's model values, shape (cells,), as its library size does over all genes."""
        return row_sums(values)

    def check_data(self, matrix: sp.csr_matrix, columns: np.ndarray | slice, name: str) -> None:
        """Raise ValueError for values of another kind; `name` is what the message calls them."""


@dataclass(frozen=True)
class LogNormalized(Counts):
    """Base of the log-normalized kinds.

    Parameters
    ----------
    target_sum
        Library size to which counts in the data are scaled; `None` if the data are normalized already.
    """

    target_sum: float | None = None

    @property
    def expect_counts(self) -> bool:  # type: ignore[override]
        """Whether the values of a dataset must be integers."""
        return self.target_sum is not None

    def data_values(self, matrix, columns):  # noqa: D102
        logs = matrix if self.target_sum is None else normalize_log1p(matrix, self.target_sum)
        return logs[:, columns]


@dataclass(frozen=True)
class CountsBehindLogs(LogNormalized):
    """Values are v = log(1 + s w_g k / d) of counts k, and the model sees k.

    Parameters
    ----------
    normalized_by
        The divisor d is the cell's library size, the sum of w_g k, over all genes of the data ("library_size") or over
        those of the model ("model_genes").
    normalized_to
        Library size s to which counts are scaled; equals `target_sum` if the data hold counts.
    log_base
        Base of the logarithm.
    gene_scale
        w_g of the model's genes, shape (G,), as one over the gene's length in TPM; empty if all are 1.
    """

    normalized_by: str = "library_size"
    normalized_to: float = 1e4
    log_base: float = np.e
    gene_scale: np.ndarray = field(default_factory=lambda: np.empty(0))

    def model_values(self, matrix, columns):  # noqa: D102
        if self.target_sum is None:
            counts, one_count, _ = self._recover(matrix, columns)
            library_sizes = self.normalized_to / one_count
        else:
            library_sizes = row_sums(matrix)
            counts = matrix[:, columns]
        return counts, library_sizes if self.normalized_by == "library_size" else row_sums(counts)

    def restore(self, values, library_sizes):  # noqa: D102
        by_genes = self.normalized_by == "model_genes"
        scaled = self._scale(values)
        divisor = row_sums(scaled) if by_genes else np.asarray(library_sizes, np.float64)
        scale = np.repeat(self.normalized_to / np.maximum(divisor, 1e-9), np.diff(scaled.indptr))
        return _with_data(scaled, np.log1p(scaled.data * scale) / np.log(self.log_base))

    def library_sizes(self, values):  # noqa: D102
        return row_sums(self._scale(values))

    def check_data(self, matrix, columns, name):  # noqa: D102
        if self.target_sum is None and (~self._recover(matrix, columns)[2]).mean() > MAX_INEXACT:
            raise ValueError(f"{name} is not log1p of scaled counts, as that of the training cells is.")

    def _recover(
        self, matrix: sp.csr_matrix, columns: np.ndarray | slice
    ) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
        """[`recover_counts`] of the model's genes, with the help of all others unless genes have scales."""
        if len(self.gene_scale):
            return recover_counts(matrix[:, columns], self.log_base, self.gene_scale)
        counts, one_count, exact = recover_counts(matrix, self.log_base)
        return counts[:, columns], one_count, exact

    def _scale(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """Multiply counts (cells, G) by the scales of the genes."""
        if not len(self.gene_scale):
            return counts
        return _with_data(counts, counts.data * self.gene_scale[counts.indices])


@dataclass(frozen=True)
class SteppedLogs(Counts):
    """Values are logs, but not of scaled counts, and the model sees the step k of each one.

    k is 0 for an exact zero, otherwise one more than the number of steps above the gene's smallest value:
    v = `value_min`_g + `value_step` (k - 1).

    Parameters
    ----------
    value_step
        Width of a step.
    value_min
        Smallest value of each gene, shape (G,).
    """

    value_step: float = 1.0
    value_min: np.ndarray = field(default_factory=lambda: np.empty(0))

    expect_counts = False
    scaled_counts = False

    def model_values(self, matrix, columns):  # noqa: D102
        steps = sp.csr_matrix(matrix[:, columns], dtype=np.float64, copy=True)
        steps.eliminate_zeros()
        above = (steps.data - self.value_min[steps.indices]) / self.value_step
        steps.data = 1 + np.maximum(np.rint(above), 0)
        return steps, row_sums(steps)

    def restore(self, values, library_sizes):  # noqa: D102
        return _with_data(values, self.value_min[values.indices] + self.value_step * (values.data - 1))


@dataclass(frozen=True)
class PlainLogs(LogNormalized):
    """Values are log-normalized, and the model sees them as they are (the paper's)."""

    models_counts = False
    scaled_counts = False

    def model_values(self, matrix, columns):  # noqa: D102
        return self.data_values(matrix, columns), None

    def to_log(self, nonzero):  # noqa: D102
        return np.asarray(nonzero, dtype=np.float64)

    def from_log(self, values):  # noqa: D102
        return values


def choose_value_kind(
    value_space: str,
    target_sum: float | None,
    zero: float,
    normalized_by: str | None,
    normalized_to: float | None,
    value_step: float | None,
    value_min: np.ndarray,
    log_base: float | None = None,
    gene_scale: np.ndarray | None = None,
) -> Counts:
    """Choose the class for the settings of a processor.

    Raises
    ------
    ValueError
        The settings do not go together.
    """
    if value_space not in VALUE_SPACES:
        raise ValueError(f"value_space must be one of {VALUE_SPACES}, got {value_space!r}.")
    if target_sum is not None and value_space != "log_normalized":
        raise ValueError('target_sum scales counts to log-normalized values: it needs value_space="log_normalized".')
    if target_sum is not None and not target_sum > 0:
        raise ValueError(f"target_sum must be positive, got {target_sum}.")
    if normalized_by is not None and (normalized_by not in NORMALIZED_BY or value_space != "log_normalized"):
        raise ValueError(
            f"normalized_by must be one of {NORMALIZED_BY}, for log-normalized values; got {normalized_by!r} for "
            f"{value_space!r}."
        )
    if (normalized_by is None) != (normalized_to is None) or normalized_to is not None and not normalized_to > 0:
        raise ValueError(f"normalized_by={normalized_by!r} does not go with normalized_to={normalized_to}.")
    gene_scale = np.empty(0) if gene_scale is None else gene_scale
    if (log_base is not None or len(gene_scale)) and (normalized_by is None or target_sum is not None):
        raise ValueError("log_base and gene_scale are for log-normalized values that have scaled counts behind them.")
    if log_base is not None and not log_base > 1:
        raise ValueError(f"log_base must be greater than 1, got {log_base}.")
    if len(gene_scale) and not ((gene_scale > 0) & np.isfinite(gene_scale)).all():
        raise ValueError("gene_scale must be positive and finite.")
    if value_step is not None and (value_space != "log_normalized" or normalized_by or not value_step > 0):
        raise ValueError(f"value_step={value_step} is for log-normalized values that are not scaled counts.")
    if zero and (normalized_by or value_step is not None):
        raise ValueError("zero_negation is for values that the model does not see as counts.")
    if normalized_by is not None and normalized_to is not None:
        return CountsBehindLogs(0.0, target_sum, normalized_by, normalized_to, log_base or np.e, gene_scale)
    if value_step is not None:
        return SteppedLogs(0.0, value_step, value_min)
    return Counts(zero) if value_space == "counts" else PlainLogs(zero, target_sum)


def normalize_total(counts: sp.csr_matrix, target_sum: float) -> sp.csr_matrix:
    """Scale counts to one library size: `counts / library size x target_sum`, the library size over all columns."""
    library_size = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    scale = target_sum / np.where(library_size > 0, library_size, 1.0)
    values = counts.data * np.repeat(scale, np.diff(counts.indptr))
    return sp.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


def normalize_log1p(counts: sp.csr_matrix, target_sum: float) -> sp.csr_matrix:
    """Log-normalize counts: `log1p(counts / library size x target_sum)`, the library size over all columns."""
    return normalize_total(sp.csr_matrix(counts), target_sum).log1p()


def recover_counts(
    values: sp.csr_matrix, log_base: float = np.e, gene_scale: np.ndarray | None = None
) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Find the counts behind log-normalized values `log(1 + c_i w_g counts)`, where c differs between cells.

    The smallest value of a cell stands for one count (or two or three), all others for whole multiples.

    Parameters
    ----------
    values
        Logarithms, as scanpy's `normalize_total` and `log1p` give them, shape (cells, n_vars).
    log_base
        Base of the logarithms.
    gene_scale
        w of each gene, shape (n_vars,); `None` if all are 1.

    Returns
    -------
    Counts, shape (cells, n_vars); c of each cell, shape (cells,), infinite for an empty cell; and whether all values of
    a cell (but `MAX_OFF` of them where genes have scales) are whole multiples, shape (cells,).
    """
    values = sp.csr_matrix(values, dtype=np.float64, copy=True)
    if log_base != np.e:
        values.data *= np.log(log_base)
    values = values.expm1()
    values.eliminate_zeros()
    if gene_scale is not None:
        values.data /= gene_scale[values.indices]
    one_count, exact = find_units(values, max_off=0.0 if gene_scale is None else MAX_OFF)
    multiples = values.data / np.repeat(one_count, np.diff(values.indptr))
    counts = sp.csr_matrix((np.maximum(np.rint(multiples), 1), values.indices, values.indptr), shape=values.shape)
    return counts, one_count, exact


def find_units(values: sp.csr_matrix, max_smallest: int = 3, max_off: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Find the largest number of which a row's values are whole multiples, the smallest one at most `max_smallest`.

    Parameters
    ----------
    values
        Positive values, shape (rows, columns).
    max_smallest
        Largest multiple that the smallest value may be.
    max_off
        Share of a row's values that need not be whole multiples.

    Returns
    -------
    The numbers, shape (rows,), infinite for an empty row; and whether the values of a row are whole multiples.
    """
    num_rows, sizes = values.shape[0], np.diff(values.indptr)
    rows = np.repeat(np.arange(num_rows), sizes)
    smallest = np.full(num_rows, np.inf)
    np.minimum.at(smallest, rows, values.data)
    unit, exact = smallest.copy(), np.zeros(num_rows, dtype=bool)
    for multiple_of_smallest in range(1, max_smallest + 1):
        unit[~exact] = smallest[~exact] / multiple_of_smallest
        # The smallest value may be rounded; all values of up to 50 units together are more precise.
        multiples = values.data / unit[rows]
        few = multiples < 50
        total = np.bincount(rows[few], values.data[few], num_rows)
        count = np.bincount(rows[few], np.rint(multiples[few]), num_rows)
        unit = np.divide(total, count, out=unit, where=count > 0)
        exact = np.bincount(rows[~are_multiples(values, unit)], minlength=num_rows) <= max_off * sizes
        if exact.all():
            break
    return unit, exact


def are_multiples(values: sp.csr_matrix, unit: np.ndarray) -> np.ndarray:
    """Tell which stored values are whole multiples of the unit of their row, shape (stored values,)."""
    multiples = values.data / np.repeat(unit, np.diff(values.indptr))
    near = np.abs(multiples - np.rint(multiples)) <= 0.05 + 1e-3 * multiples  # for values of three decimals
    return near & (multiples <= MAX_COUNT)


def row_sums(matrix: sp.csr_matrix) -> np.ndarray:
    """Sum of each row, shape (cells,)."""
    return np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()


def _with_data(matrix: sp.csr_matrix, data: np.ndarray) -> sp.csr_matrix:
    """Replace the stored values of a matrix."""
    return sp.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)
