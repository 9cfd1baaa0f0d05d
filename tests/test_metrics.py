"""Single metrics and the space of evaluation, against libraries as oracles."""

import numpy as np
import ot
import pytest
import scipy.sparse as sp
from made_cells import blood_split
from scipy.stats import spearmanr
from sklearn.gaussian_process.kernels import RBF
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from scrdit_diffusers.evaluation import compare as comparison
from scrdit_diffusers.evaluation import metrics
from scrdit_diffusers.evaluation.space import log_normalize


@pytest.fixture(scope="module")
def split():
    return blood_split()


@pytest.fixture
def clouds():
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 4)), rng.normal(0.5, 1.2, size=(60, 4))


def test_mmd2_agrees_with_the_formula(clouds):
    x, y = clouds
    expected = 0.0
    for sigma in np.array([0.25, 0.5, 1, 2, 4]) * 1.7:
        kernel = RBF(sigma)
        within = sum((kernel(z).sum() - len(z)) / (len(z) * (len(z) - 1)) for z in clouds)
        expected += (within - 2 * kernel(x, y).mean()) / 5
    assert metrics.mmd2(x, y, 1.7) == pytest.approx(expected)


def test_mmd2_is_unbiased():
    rng = np.random.default_rng(0)
    values = [metrics.mmd2(*rng.normal(size=(2, 20, 3)), 2.0) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)


def test_w2_agrees_with_sorted_values_in_one_dimension(clouds):
    x, y = (np.sort(z[:, :1], axis=0) for z in clouds)
    assert metrics.wasserstein2(x, y) == pytest.approx(np.sqrt(np.mean((x - y) ** 2)))


def test_w2_agrees_with_pot(clouds):
    assert metrics.wasserstein2(*clouds) == pytest.approx(np.sqrt(ot.solve_sample(*clouds).value))


def test_w2_of_a_shift_is_its_length(clouds):
    assert metrics.wasserstein2(clouds[0], clouds[0] + 3.0) == pytest.approx(6.0)  # 3 in each of 4 dimensions


def test_auroc_of_separate_clouds_is_1(clouds):
    assert metrics.classifier_auroc(clouds[0], clouds[1] + 20, LogisticRegression()) == 1


def test_nearest_neighbor_accuracies_of_separate_clouds_and_of_copies(clouds):
    assert set(metrics.nearest_neighbor_accuracies(clouds[0], clouds[1] + 20).values()) == {1}
    assert set(metrics.nearest_neighbor_accuracies(clouds[0], clouds[0]).values()) == {0}


def test_nearest_neighbor_accuracies_agree_with_scikit_learn(clouds):
    accuracies = metrics.nearest_neighbor_accuracies(*clouds)
    target = np.repeat([0, 1], 60)
    scores = cross_val_score(KNeighborsClassifier(1), np.concatenate(clouds), target, cv=LeaveOneOut())
    assert accuracies["nearest_neighbor_accuracy"] == pytest.approx(scores.mean())
    assert accuracies["nearest_neighbor_accuracy_of_synthetic"] == pytest.approx(scores[:60].mean())
    assert accuracies["nearest_neighbor_accuracy_of_real"] == pytest.approx(scores[60:].mean())


def test_nearest_neighbor_accuracies_of_noisy_cells_cancel():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1.4, size=(200, 30)), rng.normal(size=(200, 30))
    accuracies = metrics.nearest_neighbor_accuracies(x, y)
    assert accuracies["nearest_neighbor_accuracy"] < 0.6
    assert accuracies["nearest_neighbor_accuracy_of_synthetic"] < 0.2
    assert accuracies["nearest_neighbor_accuracy_of_real"] > 0.9


def test_ilisi_falls_when_clouds_separate():
    pytest.importorskip("scib_metrics", exc_type=ImportError)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 120, 3))
    assert metrics.ilisi(x, y) > 0.9
    assert metrics.ilisi(x, y + 20) < 0.05


def test_gene_gene_agreement_agrees_with_scipy():
    rng = np.random.default_rng(0)
    x, y, train = (sp.csr_matrix(rng.poisson(np.linspace(0.5, 3, 6), (80, 6)).astype(float)) for _ in range(3))
    top = np.argsort(-train.toarray().mean(axis=0))[:4]
    triangle = np.triu_indices(4, 1)
    a, b = (spearmanr(z.toarray()[:, top]).statistic[triangle] for z in (x, y))
    assert metrics.gene_gene_agreement(x, y, train, n_genes=4) == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_constant_genes_do_not_break_the_correlations():
    x = sp.csr_matrix(np.random.default_rng(0).poisson(1.0, (50, 5)).astype(float))
    assert metrics.gene_gene_agreement(sp.csr_matrix(np.ones((50, 5))), x, x) == 0
    assert metrics.gene_gene_agreement(x, x, x) == pytest.approx(1)


def test_legacy_metrics_are_zero_for_identical_cells(split):
    logged = log_normalize(split["real"].X, "counts")
    assert metrics.legacy_metrics(logged, logged) == pytest.approx(
        dict.fromkeys([name for name in comparison.AIMS if name.startswith("legacy")], 0.0), abs=1e-9
    )


def test_legacy_mmd_agrees_with_the_formula(clouds):
    both = np.concatenate(clouds)
    squared = ((both[:, None] - both[None]) ** 2).sum(-1)
    bandwidth = squared.sum() / (len(both) ** 2 - len(both)) / 4
    kernel = sum(np.exp(-squared / (bandwidth * 2**k)) for k in range(5))
    sign = np.repeat([1, -1], [60, 60])
    assert metrics._legacy_mmd(*clouds) == pytest.approx(sign @ kernel @ sign / 60**2)
