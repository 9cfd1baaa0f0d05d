"""The weights from which training starts: bins, means and dispersions of the training cells."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from test_count_head import LARGEST, NO_LABELS, bins_of_genes, make_head, random_counts, standardization

from scrdit_diffusers import SCRDiTTransformer, count_bins
from scrdit_diffusers.cells.moments import CellMoments
from scrdit_diffusers.checks import MAX_COUNT
from scrdit_diffusers.initialization import BIN_RATIO, MAX_OVERSHOOT, initialize_count_head, label_log_means


@pytest.mark.parametrize("largest", [[0, 1, 2, 7, 9, 10, 100, 3000, 20_000], [5, MAX_COUNT]])
def test_bins_cover_all_counts_and_stop_at_the_overshoot(largest):
    bins = bins_of_genes(make_head(random_counts(largest)))
    for (lower, upper), count in zip(bins, largest, strict=True):
        assert lower[0] == 0 and np.array_equal(lower[1:], upper[:-1])
        assert upper[-1] > min(MAX_OVERSHOOT * count, MAX_COUNT)
        assert lower[-1] <= MAX_OVERSHOOT * count + 1
        assert upper[-1] <= max(BIN_RATIO * lower[-1] + 1, lower[-1] + 1)


@pytest.mark.parametrize("largest", [LARGEST, [4], [0, 0, 0], [1, 10, 100, 1000, 10_000] * 5])
def test_groups_hold_all_genes(largest):
    groups = count_bins(sp.csr_matrix(random_counts(largest)))
    assert sum(genes for genes, _ in groups) == len(largest)
    assert all(isinstance(number, int) for group in groups for number in group)
    assert [bins for _, bins in groups] == sorted({bins for _, bins in groups})


def test_refuses_other_counts():
    head = make_head(random_counts())
    other = random_counts([80] * len(LARGEST))
    with pytest.raises(ValueError, match=r"count_bins=\[\[7, 32\]\]"):
        initialize_count_head(
            head, CellMoments.from_counts(sp.csr_matrix(other), np.zeros((50, 0))), *standardization(other)
        )


def test_refuses_bins_of_another_number_of_genes():
    with pytest.raises(ValueError, match="count_bins .* 7 .* 8"):
        SCRDiTTransformer(num_genes=8, count_bins=[[3, 4], [4, 9]])


def test_dispersions_are_moment_estimates():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (400, 2))
    means = rng.gamma(2, 3, (2, 2, 5))[labels[:, 0], labels[:, 1]] * rng.gamma(5, 0.2, (400, 1)) + 1
    counts = rng.negative_binomial(2, 2 / (2 + means)).astype(float)
    counts[:, 0] += 1  # no cell is empty
    numerator, denominator = np.zeros(5), np.zeros(5)
    for combination in np.unique(labels, axis=0):
        cells = counts[(labels == combination).all(axis=1)]
        predicted = cells.sum(axis=1, keepdims=True) * cells.sum(axis=0) / cells.sum()
        numerator += (predicted**2).sum(axis=0)
        denominator += ((cells - predicted) ** 2 - predicted).sum(axis=0)
    dispersion = make_head(counts, labels).log_dispersion.exp()
    np.testing.assert_allclose(dispersion, np.clip(numerator / denominator, 0.1, 200), rtol=1e-4)


def simulate_labels(num_cells, fold_changes):
    """Negative binomial counts of cells of two labels in equal numbers, and their moments; a last gene is large."""
    rng, labels = np.random.default_rng(0), np.arange(num_cells) % 2
    means = 4 * np.exp(np.where(labels[:, None] == 0, fold_changes, -fold_changes))
    means = np.concatenate([means, np.full((num_cells, 1), 20_000)], axis=1) * rng.gamma(9, 1 / 9, (num_cells, 1))
    counts = rng.negative_binomial(2, 2 / (2 + means)).astype(float)
    return CellMoments.from_counts(sp.csr_matrix(counts), labels[:, None])


def test_labels_start_at_their_fold_changes():
    fold_changes = np.concatenate([np.full(20, 1.0), np.full(20, -1.0), np.zeros(160)])
    found = label_log_means(simulate_labels(400, fold_changes), [2], 0.16)
    differences = found[0] - found[1]
    assert differences[:20].mean() == pytest.approx(2, abs=0.25) == -differences[20:40].mean()
    assert np.abs(found[:, 40:200]).mean() < 0.05


def test_a_gene_of_one_label_is_added_by_it_and_not_taken_away_by_the_others():
    rng, labels = np.random.default_rng(0), np.arange(300) % 6
    means = np.column_stack([np.where(labels == 0, 60.0, 0.5), np.full(300, 20_000.0)]) * rng.gamma(9, 1 / 9, (300, 1))
    counts = rng.negative_binomial(2, 2 / (2 + means)).astype(float)
    found = label_log_means(CellMoments.from_counts(sp.csr_matrix(counts), labels[:, None]), [6], 0.16)
    assert found[0, 0] > 3 and np.abs(found[1:, 0]).max() < 0.5


def test_few_cells_show_large_fold_changes_and_hide_small_ones():
    fold_changes = np.concatenate([np.full(20, 2.5), np.zeros(180)])
    found = label_log_means(simulate_labels(60, fold_changes), [2], 0.16)
    assert (found[0] - found[1])[:20].mean() > 3 and np.abs(found[:, 20:200]).mean() < 0.1


def test_labels_of_several_conditions_share_what_they_explain():
    """Each gene differs between the labels of one condition, which the labels of the other must not take over."""
    rng = np.random.default_rng(0)
    codes = np.stack([np.repeat([0, 1], 150), np.tile([0, 0, 1], 100)], axis=1)
    effects = np.zeros((2, 101))
    effects[0, :10] = effects[1, 10:20] = 1.2
    base = np.append(np.full(100, 3.0), 10_000.0)
    counts = rng.poisson(base * np.exp(codes @ effects)).astype(float)
    found = label_log_means(CellMoments.from_counts(sp.csr_matrix(counts), codes), [2, 2], 0.16)
    differences = found[[1, 3]] - found[[0, 2]]
    assert differences[0, :10].mean() == pytest.approx(1.2, abs=0.25) == differences[1, 10:20].mean()
    assert np.abs(differences[0, 10:100]).mean() < 0.06 and np.abs(differences[1, 20:100]).mean() < 0.06


def test_absent_labels_and_no_conditions_add_nothing():
    counts = sp.csr_matrix(random_counts())
    moments = CellMoments.from_counts(counts, np.zeros((counts.shape[0], 1), dtype=int))
    found = label_log_means(moments, [3], 0.16)
    assert found.shape == (3, counts.shape[1]) and not found[1:].any()
    unlabeled = CellMoments.from_counts(counts, np.zeros((counts.shape[0], 0), dtype=int))
    assert label_log_means(unlabeled, [], 0.16).shape == (0, counts.shape[1])


def test_means_are_the_average_profile_times_the_library_size():
    counts = random_counts()
    head = make_head(counts)
    sizes = torch.tensor([5.0, 10.0, 80.0])
    log_mean = head(NO_LABELS.expand(3, 0), sizes).log_mean
    profile = counts.sum(axis=0) / counts.sum()
    expressed = profile > 0
    expected = sizes.numpy()[:, None] * profile
    np.testing.assert_allclose(log_mean.exp()[:, expressed], expected[:, expressed], rtol=1e-4)
    assert (log_mean.exp()[:, ~expressed] < 1e-2).all()


def test_cells_of_equal_size_and_empty_cells_are_no_problem():
    for counts in (np.ones((6, 4)), np.zeros((6, 4)), np.eye(4)):
        head = make_head(counts)
        assert all(torch.isfinite(tensor).all() for tensor in head.state_dict().values())
