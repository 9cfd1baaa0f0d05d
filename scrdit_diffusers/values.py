"""Kinds of values in a dataset, and what the model sees of them: counts, counts behind logs, steps, or plain logs.

The four classes have the same methods. The settings of a processor choose one, see [`choose_value_kind`].
"""

from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

from .checks import MAX_COUNT

VALUE_SPACES = ("counts", "log_normalized")
NORMALIZED_BY = ("library_size", "model_genes")
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

    def check_data(self, matrix: sp.csr_matrix, name: str) -> None:
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
    """Values are v = log1p(s k / d) of counts k, and the model sees k.

    Parameters
    ----------
    normalized_by
        The divisor d is the cell's library size over all genes of the data ("library_size") or over those of the model
        ("model_genes").
    normalized_to
        Library size s to which counts are scaled; equals `target_sum` if the data hold counts.
    """

    normalized_by: str = "library_size"
    normalized_to: float = 1e4

    def model_values(self, matrix, columns):  # noqa: D102
        if self.target_sum is None:
            matrix, one_count, _ = recover_counts(matrix)
            library_sizes = self.normalized_to / one_count
        else:
            library_sizes = row_sums(matrix)
        counts = matrix[:, columns]
        return counts, library_sizes if self.normalized_by == "library_size" else row_sums(counts)

    def restore(self, values, library_sizes):  # noqa: D102
        by_genes = self.normalized_by == "model_genes"
        divisor = row_sums(values) if by_genes else np.asarray(library_sizes, np.float64)
        scale = np.repeat(self.normalized_to / np.maximum(divisor, 1e-9), np.diff(values.indptr))
        return _with_data(values, np.log1p(values.data * scale))

    def check_data(self, matrix, name):  # noqa: D102
        if self.target_sum is None and (~recover_counts(matrix)[2]).mean() > MAX_INEXACT:
            raise ValueError(f"{name} is not log1p of scaled counts, as that of the training cells is.")


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
    if value_step is not None and (value_space != "log_normalized" or normalized_by or not value_step > 0):
        raise ValueError(f"value_step={value_step} is for log-normalized values that are not scaled counts.")
    if zero and (normalized_by or value_step is not None):
        raise ValueError("zero_negation is for values that the model does not see as counts.")
    if normalized_by is not None and normalized_to is not None:
        return CountsBehindLogs(0.0, target_sum, normalized_by, normalized_to)
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


def recover_counts(values: sp.csr_matrix) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Find the counts behind log-normalized values `log1p(c x counts)`, where c differs between cells.

    The smallest value of a cell stands for one count (or two or three), all others for whole multiples.

    Parameters
    ----------
    values
        Natural logarithms as scanpy's `normalize_total` and `log1p` give them, shape (cells, n_vars).

    Returns
    -------
    Counts, shape (cells, n_vars); c of each cell, shape (cells,), infinite for an empty cell; and whether all values of
    a cell are whole multiples, shape (cells,).
    """
    values = sp.csr_matrix(values, dtype=np.float64).expm1()
    values.eliminate_zeros()
    num_cells = values.shape[0]
    rows = np.repeat(np.arange(num_cells), np.diff(values.indptr))
    smallest = np.full(num_cells, np.inf)
    np.minimum.at(smallest, rows, values.data)
    one_count, exact = smallest.copy(), np.zeros(num_cells, dtype=bool)
    for count_of_smallest in (1, 2, 3):
        one_count[~exact] = smallest[~exact] / count_of_smallest
        # The smallest value may be rounded; all values of up to 50 counts together are more precise.
        multiples = values.data / one_count[rows]
        few = multiples < 50
        total = np.bincount(rows[few], values.data[few], num_cells)
        count = np.bincount(rows[few], np.rint(multiples[few]), num_cells)
        one_count = np.divide(total, count, out=one_count, where=count > 0)
        multiples = values.data / one_count[rows]
        off = np.abs(multiples - np.rint(multiples)) > 0.05 + 1e-3 * multiples  # for values of three decimals
        exact = np.bincount(rows[off | (multiples > MAX_COUNT)], minlength=num_cells) == 0
        if exact.all():
            break
    counts = sp.csr_matrix((np.maximum(np.rint(multiples), 1), values.indices, values.indptr), shape=values.shape)
    return counts, one_count, exact


def row_sums(matrix: sp.csr_matrix) -> np.ndarray:
    """Sum of each row, shape (cells,)."""
    return np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()


def _with_data(matrix: sp.csr_matrix, data: np.ndarray) -> sp.csr_matrix:
    """Replace the stored values of a matrix."""
    return sp.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)
