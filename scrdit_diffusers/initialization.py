"""Initial weights of a new transformer and of its count head."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch

from .cells.moments import CellMoments
from .checks import MAX_COUNT
from .count_head import SCRDiTCountHead, midpoint
from .objective import FREE_LABEL_CHANGE
from .processing_scrdit import SCRDiTProcessor
from .transformer_scrdit import SCRDiTTransformer

EXACT_COUNTS = 12  # counts up to this have their own bins, larger ones share bins that grow by BIN_RATIO
BIN_RATIO = 1.12
MAX_OVERSHOOT = 1.3  # largest count of a gene over its largest training count
SCORING_STEPS = 50  # after which 0.5% to 4% of the log fold changes would still move by 0.1
GROUP_BINS = (4, 6, 9, 13, 20, 32, 48)  # genes with similar numbers of bins are computed together


def initialize_from_cells(
    model: SCRDiTTransformer,
    processor: SCRDiTProcessor,
    moments: CellMoments | None = None,
    values: torch.Tensor | None = None,
    min_bins: np.ndarray | None = None,
    prior_std: float | None = None,
) -> None:
    """Set all weights of a new transformer.

    Parameters
    ----------
    model
        The transformer.
    processor
        Fitted to the training cells.
    moments
        Of the training cells, for a count head.
    values
        Some training cells in model space, shape (cells, G), for cell tokens; `None` starts these at random.
    min_bins
        As in [`count_bins`].
    prior_std
        s of the [`FoldChangePrior`] under which labels start at their posterior modes; `None`: they start equal.
    """
    model.initialize_weights()
    if values is not None and model.config.num_cell_tokens:
        model.initialize_cell_tokens(values)
    if model.count_head is not None and moments is not None:
        initialize_count_head(model.count_head, moments, processor.mean, processor.std, min_bins, prior_std)


def count_bins(counts: sp.csr_matrix | CellMoments, min_bins: np.ndarray | None = None) -> list[list[int]]:
    """Group genes by the number of bins that their counts need, for the config of [`SCRDiTTransformer`].

    Parameters
    ----------
    counts
        Counts of the training cells, shape (cells, G), or their moments.
    min_bins
        Smallest number of bins of each gene, shape (G,), such as those of a pretrained head.

    Returns
    -------
    Pairs (number of genes, bins per gene), fewest bins first; together the groups have all G genes.
    """
    count_max = counts.count_max if isinstance(counts, CellMoments) else counts.max(axis=0).toarray().ravel()
    bins = np.sort(_bins_per_gene(count_max, min_bins))
    groups = np.split(bins, np.unique(np.searchsorted(bins, GROUP_BINS, side="right")))
    return [[len(group), int(group.max())] for group in groups if len(group)]


def initialize_count_head(
    head: SCRDiTCountHead,
    moments: CellMoments,
    mean: np.ndarray,
    std: np.ndarray,
    min_bins: np.ndarray | None = None,
    prior_std: float | None = None,
) -> None:
    """Set the bins of a count head and its initial means and dispersions.

    Dispersions are moment estimates, and what labels add to the log means may be posterior modes, because training
    alone moves both too slowly; within each combination of labels the mean is taken as proportional to the library
    size. The dispersions of all labels start equal, all distributions as negative binomials.

    Parameters
    ----------
    head
        The count head.
    moments
        Of the counts of the training cells.
    mean, std
        The processor's mean and standard deviation of each gene before standardization, shape (G,).
    min_bins
        As in [`count_bins`].
    prior_std
        s of the [`FoldChangePrior`] under which labels start at their posterior modes; `None`: they start equal.

    Raises
    ------
    ValueError
        The head was made for other counts.
    """
    bins = _bins_per_gene(moments.count_max, min_bins)
    needed = count_bins(moments, min_bins)
    if needed != [list(shape) for *_, shape in head.groups]:
        raise ValueError(f"This head was made for other counts; make it with count_bins={needed}.")
    order = np.argsort(bins, kind="stable")
    edges = _bin_edges(MAX_COUNT)
    parts = []
    for group_genes, _, (num_genes, num_bins) in head.groups:
        inside = np.arange(num_bins) < bins[order[group_genes], None]  # (genes, bins)
        lower = np.tile(edges[:num_bins], num_genes)
        upper = np.where(inside, edges[1 : num_bins + 1], edges[:num_bins]).ravel()  # a padding bin is empty
        parts.append((lower, upper, np.repeat(order[group_genes], num_bins)))
    lower, upper, genes = (np.concatenate(part) for part in zip(*parts, strict=True))
    value = (np.log1p(midpoint(lower, upper)) - mean[genes]) / std[genes]

    mean_log_size, std_log_size = moments.log_library_size()
    typical_count = moments.mean_profile() * np.exp(mean_log_size)
    state = head.state_dict() | {
        "lower": lower,
        "upper": upper,
        "value": value,
        "gene_order": order,
        "log_library_size": [mean_log_size, max(std_log_size, 1e-3)],
        "log_mean": np.log(np.maximum(typical_count, 1e-4)),
        "log_dispersion": np.log(moments.inverse_dispersion()),
        "class_log_mean": np.zeros(head.class_log_mean.shape)
        if prior_std is None
        else label_log_means(moments, head.num_classes, prior_std),
        "class_log_dispersion": np.zeros(head.class_log_dispersion.shape),
        "log_base": np.zeros(head.log_base.shape),
    }
    head.load_state_dict({name: torch.as_tensor(array) for name, array in state.items()})


def label_log_means(moments: CellMoments, num_classes: Sequence[int], prior_std: float) -> np.ndarray:
    """Find what labels add to the log mean counts: nearly the posterior modes under the prior of training.

    A Poisson regression whose counts are weighed by the precision of a negative binomial with the mean of their
    combination of labels. So the baseline is not set by few labels with large counts, and what labels add is sparse,
    most of it positive. Damped Fisher scoring from zero, one condition after the other.

    Parameters
    ----------
    moments
        Of the counts of the training cells.
    num_classes
        Number of labels of each condition.
    prior_std
        s of [`FoldChangePrior`].

    Returns
    -------
    Log fold changes, shape (labels of all conditions, G).

    References
    ----------
    Fisher scoring: McCullagh and Nelder 1989, Generalized Linear Models, section 2.5.
    """
    combination, size, number = moments.library_sizes()
    size_sum = np.bincount(combination, np.maximum(size, 1) * number, len(moments.combinations))[:, None]
    mean = moments.count_sum / np.maximum(moments.num_cells, 1)[:, None]  # (combinations, G)
    weight = 1 / (1 + mean / moments.inverse_dispersion())
    observed, sizes = moments.count_sum * weight, size_sum * weight  # (combinations, G)
    tables = [np.zeros((number_of_labels, mean.shape[1])) for number_of_labels in num_classes]
    members = [
        sp.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(len(table), len(codes)))
        for codes, table in zip(moments.combinations.T, tables, strict=True)
    ]
    for _ in range(SCORING_STEPS):
        for table, member in zip(tables, members, strict=True):
            rate = np.exp(sum(other.T @ changes for other, changes in zip(members, tables, strict=True)))
            baseline = (observed.sum(axis=0) + 1e-3) / ((sizes * rate).sum(axis=0) + 1e-300)  # (G,)
            expected = baseline * sizes * rate
            precision = 1 / (prior_std**2 * (1 + (table / FREE_LABEL_CHANGE) ** 2))  # (labels, G)
            step = member @ (observed - expected) - precision * table
            table += np.clip(step / (member @ np.maximum(observed, expected) + precision), -1, 1)
    return np.concatenate([np.zeros((0, mean.shape[1])), *tables])


def _bin_edges(largest: float) -> np.ndarray:
    """Lower edges of the bins of counts: 0, 1, 2, ..., then in growing steps up to beyond `largest`."""
    edges = list(range(EXACT_COUNTS + 1))
    while edges[-1] <= largest:
        edges.append(max(edges[-1] + 1, round(edges[-1] * BIN_RATIO)))
    return np.array(edges)


def _bins_per_gene(count_max: np.ndarray, min_bins: np.ndarray | None) -> np.ndarray:
    """Count the bins of each gene (G,) for its largest training count (G,)."""
    largest = np.minimum(np.floor(MAX_OVERSHOOT * count_max.astype(np.float64)) + 1, MAX_COUNT)
    bins = np.searchsorted(_bin_edges(largest.max()), largest, side="right")
    return bins if min_bins is None else np.maximum(bins, min_bins)
