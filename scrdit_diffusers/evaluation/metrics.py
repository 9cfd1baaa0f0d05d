"""One function per metric: arrays in, floats out. Docstrings give the formula and the better direction."""

import warnings

import numpy as np
import ot
import scipy.sparse as sp
from scipy.spatial.distance import cdist, pdist
from scipy.special import log_softmax
from scipy.stats import rankdata, wasserstein_distance
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from scrdit_diffusers.cells.moments import gene_moments

from .space import CellsInSpace, EvaluationSpace, fit_pca, log_normalize

NUM_FOLDS = 5
LEGACY_BLOCK = 20  # genes per block of scRDiT's MMD
LEGACY_MAX_CELLS = 500  # enough for the kernels of blocks, whose cost is quadratic


# -- distances between two clouds of cells -----------------------------------------------------------------------------


def mmd2(x: np.ndarray, y: np.ndarray, scale: float) -> float:
    r"""Unbiased squared maximum mean discrepancy. 0 for equal distributions, below 0 by chance; lower is better.

    `sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1)) - 2 mean_{i, j} k(x_i, y_j)`
    with k the mean of Gaussian kernels `exp(-|a - b|^2 / (2 sigma^2))`, sigma = {1/4, 1/2, 1, 2, 4} x `scale`.

    Parameters
    ----------
    x, y
        Cells in E, shapes (n, PCs) and (m, PCs).
    scale
        Median distance between training cells in E.

    References
    ----------
    Gretton et al. 2012, JMLR 13, lemma 6.
    """

    def kernel_sum(squared: np.ndarray) -> float:
        return np.mean([np.exp(-squared / (2 * (factor * scale) ** 2)).sum() for factor in (0.25, 0.5, 1, 2, 4)])

    n, m = len(x), len(y)
    within = [2 * kernel_sum(pdist(z, "sqeuclidean")) / (k * (k - 1)) for z, k in ((x, n), (y, m))]
    return float(sum(within) - 2 * kernel_sum(cdist(x, y, "sqeuclidean")) / (n * m))


def wasserstein2(x: np.ndarray, y: np.ndarray) -> float:
    """Wasserstein-2 distance in E by exact optimal transport. Positive for finite samples: compare with the ceiling.

    `sqrt(min_P sum_ij P_ij |x_i - y_j|^2)`, P the couplings of the two uniform measures.

    References
    ----------
    POT, `ot.emd2`.
    """
    cost = cdist(x, y, "sqeuclidean")
    return float(np.sqrt(max(ot.emd2(np.empty(0), np.empty(0), cost, numItermax=10_000_000), 0.0)))


def classifier_auroc(
    x: np.ndarray, y: np.ndarray, classifier: ClassifierMixin, seed: int = 0, n_jobs: int | None = None
) -> float:
    """Area under the ROC curve of a classifier that tells x from y: 0.5 if it cannot, 1 if it always can.

    Mean over 5 stratified, shuffled folds, each scored alone because scores of different folds are not comparable.
    `n_jobs` processes share the folds.

    References
    ----------
    Lopez-Paz and Oquab 2017, classifier two-sample tests.
    """
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    target = np.repeat([0, 1], [len(x), len(y)])
    with threadpool_limits(1, user_api="openmp"):  # many genes, few cells: threads mostly wait for each other
        scores = cross_val_score(classifier, np.concatenate([x, y]), target, cv=folds, scoring="roc_auc", n_jobs=n_jobs)
    return float(scores.mean())


def nearest_neighbor_accuracies(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Leave-one-out accuracy of 1-NN that tells x from y, of equal size, in E. 0.5 is best; copies give 0.

    - nearest_neighbor_accuracy: over all cells, the mean of the next two.
    - nearest_neighbor_accuracy_of_synthetic: share of x whose nearest cell is in x. High if x varies too little.
    - nearest_neighbor_accuracy_of_real: share of y whose nearest cell is in y. High if x is noisy or misses cells.

    The mean alone can mislead: noisy x may lie near real cells (0.2, say), while real cells lie near each other (0.9).

    References
    ----------
    Lopez-Paz and Oquab 2017; by side: Xu et al. 2018, arXiv 1806.07755.
    """
    nearest = NearestNeighbors(n_neighbors=1).fit(np.concatenate([x, y])).kneighbors(return_distance=False)[:, 0]
    of_x, of_y = np.mean(nearest[: len(x)] < len(x)), np.mean(nearest[len(x) :] >= len(x))
    return {
        "nearest_neighbor_accuracy": float((of_x + of_y) / 2),
        "nearest_neighbor_accuracy_of_synthetic": float(of_x),
        "nearest_neighbor_accuracy_of_real": float(of_y),
    }


def ilisi(x: np.ndarray, y: np.ndarray, n_neighbors: int = 90) -> float:
    """Median local inverse Simpson index of x and y among neighbors in E, scaled to 0 - 1; higher is better.

    References
    ----------
    Korsunsky et al. 2019 (LISI); `scib_metrics.ilisi_knn`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap-learn, imported with it, warns that there is no TensorFlow
        from scib_metrics import ilisi_knn
        from scib_metrics.nearest_neighbors import NeighborsResults

        cells = np.concatenate([x, y])
        search = NearestNeighbors(n_neighbors=min(n_neighbors, len(cells))).fit(cells)
        distances, indices = search.kneighbors(cells)  # scib-metrics expects each cell among its neighbors
        return float(ilisi_knn(NeighborsResults(indices, distances), np.repeat([0, 1], [len(x), len(y)])))


# -- genes and labels --------------------------------------------------------------------------------------------------


def gene_marginals(x: sp.csr_matrix, y: sp.csr_matrix) -> dict[str, float]:
    """Pearson r of the genes' means and variances (log-normalized), and mean absolute difference of zero fractions."""
    moments = [gene_moments(matrix) for matrix in (x, y)]
    zeros = [1 - matrix.getnnz(axis=0) / matrix.shape[0] for matrix in (x, y)]
    return {
        "gene_mean_r": pearson(moments[0][0], moments[1][0]),
        "gene_variance_r": pearson(moments[0][1], moments[1][1]),
        "gene_zero_fraction_mae": float(np.abs(zeros[0] - zeros[1]).mean()),
    }


def gene_gene_agreement(x: sp.csr_matrix, y: sp.csr_matrix, train: sp.csr_matrix, n_genes: int = 300) -> float:
    """Pearson r between the upper triangles of two Spearman correlation matrices of genes; higher is better.

    Log-normalized values of the `n_genes` genes with the largest mean in train. Correlations with a gene that does not
    vary are 0, so that a model gains nothing by making genes constant.
    """
    genes = np.argsort(-gene_moments(train)[0], kind="stable")[:n_genes]
    triangle = np.triu_indices(len(genes), k=1)
    return pearson(*(gene_correlations(matrix[:, genes])[triangle] for matrix in (x, y)))


def gene_correlations(x: sp.csr_matrix) -> np.ndarray:
    """Spearman correlations (G, G) of the genes of x (n, G); 0 for a gene that does not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(np.corrcoef(rankdata(x.toarray(), axis=0), rowvar=False))


def train_on_synthetic_f1(x: np.ndarray, x_labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> float:
    """Macro F1 on real cells of a label classifier that was trained on x (both in E); higher is better.

    A label that x lacks counts with F1 = 0.

    References
    ----------
    Esteban et al. 2017, train on synthetic, test on real.
    """
    predicted = label_classifier().fit(x, x_labels).predict(real)
    return float(
        f1_score(real_labels, predicted, labels=np.unique(real_labels), average="macro", zero_division=np.float64(0))
    )


def effect_size_slopes(
    x: CellsInSpace, y: CellsInSpace, train: CellsInSpace, labels: list[str], n_genes: int = 100
) -> dict[str, float]:
    """Slope through the origin of log fold changes in x on those in y, by label and pooled ("all"). 1 is best.

    `sum_g f_g(x) f_g(y) / sum_g f_g(y)^2`, with f_g the mean log-normalized value of gene g in the label minus that
    in all other cells; below 1 if a model blurs the labels. Genes are the `n_genes` with the largest `|f_g|` in train:
    choosing them in y would favor f_g(y) that are large by chance, and push the slope below 1.
    """

    def fold_changes(cells: CellsInSpace, label: str) -> np.ndarray:
        inside = cells.labels == label
        return gene_moments(cells.log_values[inside])[0] - gene_moments(cells.log_values[~inside])[0]

    products = {}
    for label in labels:
        genes = np.argsort(-np.abs(fold_changes(train, label)), kind="stable")[:n_genes]
        f_x, f_y = fold_changes(x, label)[genes], fold_changes(y, label)[genes]
        products[label] = np.array([f_x @ f_y, f_y @ f_y])
    products["all"] = np.sum(list(products.values()), axis=0)
    return {group: float(numerator / denominator) for group, (numerator, denominator) in products.items()}


def variance_within_labels(x: CellsInSpace, y: CellsInSpace, n_comps: int = 10) -> float:
    """Variance of x within labels along the first components of E over that of y, mean over components. 1 is best.

    Below 1 the cells of a label are too alike. The variance is pooled over labels, and NaN where it is 0 in y.
    """

    def pooled(cells: CellsInSpace) -> np.ndarray:
        labels, codes = np.unique(cells.labels, return_inverse=True)
        pcs = cells.pcs[:, :n_comps]
        means = np.stack([pcs[codes == code].mean(axis=0) for code in range(len(labels))])
        return np.square(pcs - means[codes]).sum(axis=0) / max(len(pcs) - len(labels), 1)

    variance = pooled(y)
    return float(np.mean(pooled(x) / variance)) if variance.all() else np.nan


# -- memorization ------------------------------------------------------------------------------------------------------


def memorization(
    x: sp.csr_matrix, held_out: sp.csr_matrix, train: sp.csr_matrix, space: EvaluationSpace, seed: int = 0
) -> dict[str, float]:
    """Measure whether x copies training cells.

    - nearest_train_distance_ratio: median distance to the nearest training cell, of x over that of held-out cells. 1 is
      best; lower for copies.
    - share_nearer_to_train: share of x nearer to a training cell than to a held-out one, among equally many of both (a
      tie counts half). 0.5 is best; higher for copies.
    - share_duplicates_of_train: share of x with exactly the values of a training cell. 0 is best.

    Distances are in PCs fitted on equally many cells of x, held-out and training cells. PCs drop more of what is
    peculiar to cells they were not fitted on, which would seem to lie closer to everything.

    Parameters
    ----------
    x, held_out, train
        Values (cells, G); `train` is not subsampled.
    space
        Gives normalization, genes and number of PCs, but not the PCs.
    """
    rng = np.random.default_rng(seed)
    logs = [log_normalize(matrix, space.value_space)[:, space.columns] for matrix in (x, held_out, train)]
    n = min(matrix.shape[0] for matrix in logs)
    drawn = [rng.choice(matrix.shape[0], n, replace=False) for matrix in logs]
    pca = fit_pca(
        sp.vstack([matrix[rows] for matrix, rows in zip(logs, drawn, strict=True)]), space.pca.n_components_, seed
    )
    x_pcs, held_pcs, train_pcs = (pca.transform(matrix) for matrix in logs)

    def nearest(query: np.ndarray, cells: np.ndarray) -> np.ndarray:
        return NearestNeighbors(n_neighbors=1).fit(cells).kneighbors(query)[0][:, 0]

    to_train, to_held_out = nearest(x_pcs, train_pcs[drawn[2]]), nearest(x_pcs, held_pcs[drawn[1]])
    known = set(_row_keys(train))
    return {
        "nearest_train_distance_ratio": np.median(nearest(x_pcs, train_pcs)) / np.median(nearest(held_pcs, train_pcs)),
        "share_nearer_to_train": np.mean((to_train < to_held_out) + 0.5 * (to_train == to_held_out)),
        "share_duplicates_of_train": np.mean([key in known for key in _row_keys(x)]),
    }


# -- legacy ------------------------------------------------------------------------------------------------------------


def legacy_metrics(x: sp.csr_matrix, y: sp.csr_matrix) -> dict[str, float]:
    """Metrics of the scRDiT paper, on log-normalized values (n, G) of equally many cells; lower is better.

    They are not 0 for real cells, pair rows at random, or see only single genes: compare them only with the ceiling.

    - legacy_kl: mean of `sum_g p_g log(p_g / q_g)`, p and q the softmax over genes of the i-th cells of y and x.
    - legacy_wasserstein: Wasserstein-1 distance of all values, flattened.
    - legacy_mmd: biased squared MMD of blocks of 20 consecutive genes, mean over blocks; the kernel is the sum of
      `exp(-d^2 / b)`, b = {1/4, 1/2, 1, 2, 4} x mean d^2. From the first 500 cells.
    - legacy_zero_proportion_difference: absolute difference of the share of zeros.
    - legacy_coefficient_of_variation_difference: absolute difference of std / mean of all values.

    References
    ----------
    scRDiT: arXiv 2404.06153.
    """
    x_dense, y_dense = x.toarray(), y.toarray()
    log_q, log_p = log_softmax(x_dense, axis=1), log_softmax(y_dense, axis=1)
    zeros = [np.mean(dense == 0) for dense in (x_dense, y_dense)]
    variation = [dense.std() / max(dense.mean(), 1e-12) for dense in (x_dense, y_dense)]
    n = min(LEGACY_MAX_CELLS, len(x_dense))
    blocks = [
        _legacy_mmd(x_dense[:n, start : start + LEGACY_BLOCK], y_dense[:n, start : start + LEGACY_BLOCK])
        for start in range(0, x_dense.shape[1], LEGACY_BLOCK)
    ]
    return {
        "legacy_kl": np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1)),
        "legacy_wasserstein": wasserstein_distance(x_dense.ravel(), y_dense.ravel()),
        "legacy_mmd": np.mean(blocks),
        "legacy_zero_proportion_difference": abs(zeros[0] - zeros[1]),
        "legacy_coefficient_of_variation_difference": abs(variation[0] - variation[1]),
    }


def _legacy_mmd(x: np.ndarray, y: np.ndarray) -> float:
    n = len(x)
    squared = (pdist(x, "sqeuclidean"), pdist(y, "sqeuclidean"), cdist(x, y, "sqeuclidean"))
    bandwidth = 2 * sum(distances.sum() for distances in squared) / (2 * n * (2 * n - 1))
    if bandwidth == 0:  # a block that is zero in every cell
        return 0.0

    def kernel_sum(distances: np.ndarray) -> float:
        kernel = np.exp(-distances / (4 * bandwidth))
        total = kernel.sum()
        for _ in range(4):  # halving the bandwidth squares the kernel
            kernel *= kernel
            total += kernel.sum()
        return total

    within_x, within_y, between = map(kernel_sum, squared)
    return float((2 * within_x + 2 * within_y + 2 * 5 * n - 2 * between) / n**2)  # the kernels are 1 on the diagonals


def label_classifier() -> ClassifierMixin:
    """Make the classifier that predicts labels from principal components."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson r; 0 where one side does not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.nan_to_num(np.corrcoef(a, b)[0, 1]))


def _row_keys(matrix: sp.csr_matrix) -> list[bytes]:
    """One key per row, equal for equal rows; zeros are not stored and indices are sorted."""
    indices, data = matrix.indices.astype(np.int64), matrix.data.astype(np.float32)
    bounds = zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)
    return [indices[start:stop].tobytes() + data[start:stop].tobytes() for start, stop in bounds]
