"""States: groups of similar training cells, one more condition where labels say too little or are missing."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scrdit_diffusers.processing_scrdit import FEW_CELLS, RARE_LABEL_CELLS, STATE_KEY, SCRDiTProcessor
from scrdit_diffusers.values import normalize_log1p, row_sums

from .moments import Chunks, run_pass

logger = logging.getLogger(__name__)

MAX_STATES = 20
MIN_GROUPED_CELLS = 32  # training cells, for groups that were not asked for
CELLS_PER_STATE = 16  # of few cells, whose labels and states have a prior of their own
MIN_STATE_CELLS = 6  # likewise
NUM_COMPONENTS = 20  # principal components in which cells are grouped
MAX_GROUPED_CELLS = 20_000  # cells in which groups are found; further ones only join them


def choose_num_states(num_cells: int) -> int:
    """Choose how many groups to find among training cells; 0 where there are hardly any."""
    if num_cells < FEW_CELLS:
        return num_cells // CELLS_PER_STATE if num_cells >= MIN_GROUPED_CELLS else 0
    return min(MAX_STATES, round(num_cells**0.5 / 4))


def min_state_cells(num_cells: int) -> int:
    """Smallest number of training cells of a state; the cells of smaller ones join others: they would be memorized."""
    return MIN_STATE_CELLS if num_cells < FEW_CELLS else RARE_LABEL_CELLS


class StateCells:
    """Gathers counts of the model's genes of some training cells, chosen at random, in which states are found.

    Parameters
    ----------
    processor
        Knows what a model of counts sees of values.
    columns
        Places of its genes among all genes, shape (G,).
    share
        Share of the cells to take.
    """

    def __init__(self, processor: SCRDiTProcessor, columns: np.ndarray, share: float):
        self.processor, self.columns, self.share = processor, columns, share
        self.rng = np.random.default_rng(0)
        self.counts: list[sp.csr_matrix] = []

    def update(self, matrix: sp.csr_matrix, obs: pd.DataFrame) -> None:
        """Take in more cells."""
        counts, _ = self.processor.select_counts(matrix, self.columns)
        self.counts.append(counts[self.rng.random(counts.shape[0]) < self.share])

    def merge(self, other: "StateCells") -> None:
        """Take in the cells of another one."""
        self.counts += other.counts


def find_states(log_values: sp.csr_matrix, num_states: int, seed: int = 0) -> np.ndarray:
    """Find groups of similar cells by k-means on principal components.

    Parameters
    ----------
    log_values
        Log-normalized values, shape (cells, G).
    num_states
        Number of groups S; fewer are found where groups would be too small.
    seed
        Seed of PCA and k-means.

    Returns
    -------
    Mean log-normalized values of each group, shape (S, G). Each cell belongs to the nearest. Shape (0, G) if there are
    not two large ones.
    """
    from sklearn.cluster import KMeans  # here, because generating cells does not need scikit-learn
    from sklearn.decomposition import PCA

    num_components = min(NUM_COMPONENTS, *(size - 1 for size in log_values.shape))
    if num_states < 2 or num_components < 1:
        return np.empty((0, log_values.shape[1]))
    pcs = PCA(num_components, svd_solver="arpack", random_state=seed).fit_transform(log_values)
    groups = KMeans(min(num_states, len(pcs)), n_init=10, random_state=seed).fit_predict(pcs)
    sizes = np.bincount(groups)
    members = sp.csr_matrix((np.ones(len(groups)), (groups, np.arange(len(groups)))))
    profiles = (members @ log_values).toarray() / sizes[:, None]
    large = sizes >= min_state_cells(log_values.shape[0])
    return profiles[large] if large.sum() > 1 else profiles[:0]


def fit_states(
    processor: SCRDiTProcessor,
    columns: np.ndarray,
    parts: Sequence[Chunks],
    map_parts: Callable[..., Iterable[Any]],
    num_cells: int,
    num_states: int | None,
    pretrained: SCRDiTProcessor | None = None,
) -> None:
    """Make states one more condition of a processor of counts.

    Parameters
    ----------
    processor
        Fitted but for composition and library sizes; changed in place.
    columns
        Places of its genes among all genes, shape (G,).
    parts, map_parts
        The training cells, as in [`fit_chunks`].
    num_cells
        Their number.
    num_states
        Number of states; 0 for none, `None` for a choice by [`choose_num_states`] if there are no labels.
    pretrained
        Processor whose states are taken instead; a gene that it lacks does not count.
    """
    asked_for = num_states
    if num_states is None:
        num_states = 0 if processor.condition_keys else choose_num_states(num_cells)
    if pretrained is not None and len(pretrained.state_profiles):
        place = pd.Index(pretrained.var_names).get_indexer(pd.Index(processor.var_names))  # (G,), -1 for new genes
        profiles = np.where(place >= 0, pretrained.state_profiles[:, place], 0.0)
        library_size = pretrained.state_library_size
    elif num_states:
        cells = run_pass(StateCells(processor, columns, MAX_GROUPED_CELLS / num_cells), parts, map_parts)
        counts = sp.vstack(cells.counts, format="csr")
        library_size = float(np.median(row_sums(counts).clip(1)))
        profiles = np.round(find_states(normalize_log1p(counts, library_size), num_states), 4)
        if asked_for and len(profiles) < asked_for:
            logger.warning(
                "%d states instead of %d: the other groups have fewer than %d cells.",
                len(profiles),
                asked_for,
                min_state_cells(num_cells),
            )
    else:
        return
    if len(profiles):
        processor.state_profiles, processor.state_library_size = profiles, library_size
        processor.condition_keys.append(STATE_KEY)
        processor.condition_categories.append([str(state) for state in range(len(profiles))])


def with_states(combinations: np.ndarray, num_states: int) -> np.ndarray:
    """Combine each combination of labels (combinations, K) with each state."""
    if not num_states:
        return combinations
    states = np.tile(np.arange(num_states), len(combinations))[:, None]
    return np.hstack([np.repeat(combinations, num_states, axis=0), states])
