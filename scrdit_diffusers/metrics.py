"""Real against synthetic cells: every figure beside its ceiling."""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import anndata as ad
import numpy as np
import ot
import pandas as pd
import scipy.sparse as sp
from scipy.spatial.distance import cdist, pdist
from scipy.special import log_softmax
from scipy.stats import ks_2samp, rankdata, wasserstein_distance
from sklearn.base import ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from .cells.moments import gene_moments
from .checks import get_matrix, looks_like_counts
from .values import VALUE_SPACES, normalize_log1p

logger = logging.getLogger(__name__)

TARGET_SUM = 1e4
NUM_FOLDS = 5
MIN_CELLS = 2 * NUM_FOLDS  # two cells of each kind in each fold
LEGACY_BLOCK = 20  # genes of a block in scRDiT's MMD
LEGACY_MAX_CELLS = 500  # the blocks' kernels need no more, and their cost grows with the square


class Aim(NamedTuple):
    """What a metric should reach."""

    better: str  # "lower", "higher", "near 0.5", "near 1", "near ceiling"
    text: str
    met: Callable[[float, float, float], bool | None]  # of value, ceiling, standard deviation of the ceiling


def _undecided(value: float, ceiling: float, spread: float) -> None:
    """Aim of the metrics that are printed to explain another one, or for comparison with the paper."""


# "ceiling" is the same figure for real control cells.
AIMS = {
    "mmd2": Aim(  # undecided where the ceiling has no spread: one seed, or the same control and test cells in each
        "lower", "<= ceiling + 2 standard deviations", lambda v, c, s: v <= c + 2 * s if s > 0 else None
    ),
    "w2": Aim("lower", "<= 1.05 x ceiling", lambda v, c, s: v <= 1.05 * c),
    "classifier_pcs_auroc": Aim("near 0.5", "<= 0.55", lambda v, c, s: v <= 0.55),
    "classifier_genes_auroc": Aim("near 0.5", "<= 0.60", lambda v, c, s: v <= 0.60),
    "nearest_neighbor_accuracy": Aim("near 0.5", "<= 0.53", lambda v, c, s: v <= 0.53),
    "nearest_neighbor_accuracy_of_synthetic": Aim("near 0.5", "0.5", _undecided),
    "nearest_neighbor_accuracy_of_real": Aim("near 0.5", "0.5", _undecided),
    "ilisi": Aim("higher", ">= 0.95 x ceiling", lambda v, c, s: v >= 0.95 * c),
    "gene_mean_r": Aim("higher", ">= 0.90 x ceiling", lambda v, c, s: v >= 0.9 * c),
    "gene_variance_r": Aim("higher", ">= 0.90 x ceiling", lambda v, c, s: v >= 0.9 * c),
    "gene_zero_fraction_mae": Aim("lower", "<= 1.10 x ceiling", lambda v, c, s: v <= 1.1 * c),
    "library_size_ks": Aim("lower", "<= 0.08", lambda v, c, s: v <= 0.08),
    "genes_detected_ks": Aim("lower", "<= 0.08", lambda v, c, s: v <= 0.08),
    "gene_gene_r": Aim("higher", ">= 0.97 x ceiling", lambda v, c, s: v >= 0.97 * c),
    "label_accuracy": Aim("near ceiling", "within 0.02 of ceiling", lambda v, c, s: abs(v - c) <= 0.02),
    "train_on_synthetic_f1": Aim("higher", ">= ceiling - 0.02", lambda v, c, s: v >= c - 0.02),
    "effect_size_slope": Aim("near 1", "0.95 - 1.05", lambda v, c, s: 0.95 <= v <= 1.05),
    "nearest_train_distance_ratio": Aim("near 1", ">= 0.95", lambda v, c, s: v >= 0.95),
    "share_nearer_to_train": Aim("near 0.5", "<= 0.55", lambda v, c, s: v <= 0.55),
    "share_duplicates_of_train": Aim("lower", "0", lambda v, c, s: v == 0),
    "legacy_kl": Aim("lower", "ceiling", _undecided),
    "legacy_wasserstein": Aim("lower", "ceiling", _undecided),
    "legacy_mmd": Aim("lower", "ceiling", _undecided),
    "legacy_zero_proportion_difference": Aim("lower", "ceiling", _undecided),
    "legacy_coefficient_of_variation_difference": Aim("lower", "ceiling", _undecided),
}


def get_values(
    adata: ad.AnnData, var_names: pd.Index, layer: str | None = None, value_space: str = "counts", name: str = "adata"
) -> sp.csr_matrix:
    """Take the checked values (cells, genes) of some genes, in their order, without stored zeros.

    Parameters
    ----------
    adata
        Cells with at least these genes; others are left out.
    var_names
        Genes.
    layer
        Layer that holds the values; `None` takes X.
    value_space
        "counts" or "log_normalized".
    name
        What to call `adata` in messages.

    Raises
    ------
    ValueError
        Genes are missing or repeated, or values are not what `value_space` says.
    """
    if value_space not in VALUE_SPACES:
        raise ValueError(f"value_space must be one of {VALUE_SPACES}, got {value_space!r}.")
    if not adata.var_names.is_unique:
        raise ValueError(f"{name}.var_names repeats gene names; call {name}.var_names_make_unique().")
    columns = adata.var_names.get_indexer(var_names)
    if (columns < 0).any():
        raise ValueError(
            f"{name} lacks {np.sum(columns < 0)} of the {len(columns)} genes to compare, such as "
            f"{list(var_names[columns < 0][:5])}; compare cells with the same genes."
        )
    counts = value_space == "counts"
    try:
        values = get_matrix(adata, layer, counts)
    except ValueError as error:
        hint = ' For log-normalised values use value_space="log_normalized".' if counts else ""
        raise ValueError(f"{name}: {error}{hint}") from None
    if not counts and looks_like_counts(values):
        raise ValueError(f'{name} holds only integers, but value_space is "log_normalized"; use "counts".')
    values = values[:, columns]
    values.eliminate_zeros()
    values.sort_indices()
    return values


def log_normalize(values: sp.csr_matrix, value_space: str) -> sp.csr_matrix:
    """Turn counts (cells, genes) into log1p of counts per 10,000; log-normalised values stay as they are."""
    return normalize_log1p(values, TARGET_SUM) if value_space == "counts" else values.astype(np.float64)


class EvaluationSpace:
    """Space E: counts -> counts per 10,000 -> log1p -> highly variable genes of train -> PCs of train.

    Fitted on the training cells only. The library size is the sum over `var_names`.

    Parameters
    ----------
    train
        Training cells.
    layer
        Layer that holds the values, in all cells; `None` takes X.
    value_space
        "counts", or "log_normalized" for values that are log-normalised already and are taken as they are.
    n_top_genes
        Number of highly variable genes (`flavor="seurat"`); all genes where there are no more.
    n_comps
        Number of principal components; fewer where there are fewer cells or genes.
    seed
        Start of the PCA's iteration.
    var_names
        Genes to start from, as the generated cells have; `None` takes those of train.

    Raises
    ------
    ValueError
        The values are not what `value_space` says, or `train` has fewer than 3 cells or 3 genes.
    """

    def __init__(
        self,
        train: ad.AnnData,
        layer: str | None = None,
        value_space: str = "counts",
        n_top_genes: int = 2000,
        n_comps: int = 50,
        seed: int = 0,
        var_names: pd.Index | None = None,
    ):
        for name, size in dict(n_top_genes=n_top_genes, n_comps=n_comps).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        self.var_names = train.var_names if var_names is None else var_names
        self.layer, self.value_space = layer, value_space
        num_genes = len(self.var_names)
        if min(train.n_obs, num_genes) < 3:
            raise ValueError(f"train has {train.n_obs} cells x {num_genes} genes; give at least 3 of each.")
        log_values = log_normalize(get_values(train, self.var_names, layer, value_space, "train"), value_space)
        self.columns = np.arange(num_genes)  # of the highly variable genes
        if num_genes > n_top_genes:
            import scanpy as sc  # here, because it takes seconds and is not needed for the genes of a model

            chosen = sc.pp.highly_variable_genes(ad.AnnData(log_values), n_top_genes=n_top_genes, inplace=False)
            self.columns = np.flatnonzero(chosen["highly_variable"])
        self.pca = _fit_pca(log_values[:, self.columns], n_comps, seed)

    def transform(self, adata: ad.AnnData) -> np.ndarray:
        """Coordinates in E, shape (cells, PCs)."""
        values = get_values(adata, self.var_names, self.layer, self.value_space)
        return self.pca.transform(log_normalize(values, self.value_space)[:, self.columns])


@dataclass
class _Cells:
    """Cells with all that the metrics look at."""

    values: sp.csr_matrix  # (n, G) counts, or log-normalised values
    log_values: sp.csr_matrix  # (n, G) log-normalised
    pcs: np.ndarray  # (n, PCs) in E
    labels: np.ndarray  # (n,); all empty without labels_key

    @classmethod
    def from_anndata(cls, adata: ad.AnnData, values: sp.csr_matrix, labels_key: str | None, space: EvaluationSpace):
        log_values = log_normalize(values, space.value_space)
        labels = np.full(adata.n_obs, "") if labels_key is None else adata.obs[labels_key].astype(str).to_numpy()
        return cls(values, log_values, space.pca.transform(log_values[:, space.columns]), labels)

    def __len__(self) -> int:
        return len(self.pcs)

    def __getitem__(self, rows: np.ndarray) -> "_Cells":
        return _Cells(self.values[rows], self.log_values[rows], self.pcs[rows], self.labels[rows])

    def sample(self, n: int, rng: np.random.Generator) -> "_Cells":
        """At most n cells, without replacement, in their order."""
        return self if len(self) <= n else self[np.sort(rng.choice(len(self), n, replace=False))]

    @property
    def library_size(self) -> np.ndarray:
        return np.asarray(self.values.sum(axis=1), dtype=np.float64).ravel()

    @property
    def genes_detected(self) -> np.ndarray:
        return self.values.getnnz(axis=1)


def compare(
    real: ad.AnnData,
    synthetic: ad.AnnData | Mapping[str, ad.AnnData],
    train: ad.AnnData,
    control: ad.AnnData | None = None,
    labels_key: str | None = None,
    layer: str | None = None,
    value_space: str = "counts",
    n_top_genes: int = 2000,
    n_comps: int = 50,
    max_cells: int = 3000,
    min_label_cells: int = 50,
    quick: bool = False,
    n_jobs: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare synthetic with held-out real cells, and put the same figure for real control cells beside each.

    Genes are those of `synthetic`; others of the real cells are left out. All groups of cells are drawn down to the
    same size n, because most figures depend on it, and so are the cells of each label. Which figures there are, which
    way is better and what to aim at stands in `AIMS`; how each is computed in the function of its name.

    Parameters
    ----------
    real
        Held-out real cells (test).
    synthetic
        Generated cells, ideally as many as `real` and with its label counts. Several sets with the same genes, by
        name, share the ceiling: `{"model": cells, "copula": other_cells}`.
    train
        Cells on which the model was trained. Space, genes and label classifier are fitted on them, and memorisation
        is measured against all of them.
    control
        Other held-out real cells, disjoint from `real` and `train`: the ceiling. `None` leaves the ceiling NaN.
    labels_key
        Column of obs, in all groups; adds the label metrics and the rows by label. `None` leaves them out.
    layer
        Layer that holds the values; `None` takes X.
    value_space
        "counts", or "log_normalized" for values that are log-normalised already. Library size is then the sum of the
        values.
    n_top_genes
        Highly variable genes of space E and of the classifier on genes.
    n_comps
        Principal components of space E.
    max_cells
        Upper limit of n; bounds time and memory. Train is cut to it where a classifier is fitted on it, or a
        distance scale is taken from it.
    min_label_cells
        Labels with as many cells in each group get rows of their own, and enter the effect sizes.
    quick
        Leave out what takes long: classifiers of real against synthetic, iLISI and the legacy metrics.
    n_jobs
        Processes for the folds of these classifiers, as in scikit-learn: -1 takes all cores, `None` one.
    seed
        Seed of subsampling, folds and classifiers. Repeat with five seeds for a spread.

    Returns
    -------
    One row per metric and group: `metric`, `group` ("all" or a label), `n_cells` (of each side), `value`, `ceiling`
    (float64), `better` ("lower", "higher", "near 0.5", "near 1", "near ceiling") and `aim`. Several synthetic sets
    have a column with their name each, in place of `value`. iLISI is left out without scib-metrics.

    Raises
    ------
    ValueError
        Too few cells or genes, genes or labels that are missing, or wrong values; the message names the argument.
    """
    if isinstance(synthetic, Mapping):
        columns = {name: f"synthetic[{name!r}]" for name in synthetic}
        reserved = {"metric", "group", "n_cells", "ceiling", "better", "aim"} & set(columns)
        if reserved or not columns:
            raise ValueError(f"synthetic needs at least one set, none of them named {sorted(reserved) or 'metric'}.")
    else:
        columns, synthetic = {"value": "synthetic"}, {"value": synthetic}
    groups = {"real": real} | {columns[name]: adata for name, adata in synthetic.items()} | {"train": train}
    groups |= {} if control is None else {"control": control}
    for name, adata in groups.items():
        if adata.n_obs < MIN_CELLS:
            raise ValueError(f"{name} has {adata.n_obs} cells; at least {MIN_CELLS} are needed.")
        if labels_key is not None:
            check_labels(adata.obs, labels_key, name)
    for name, limit in dict(max_cells=max_cells, min_label_cells=min_label_cells).items():
        if limit < MIN_CELLS:
            raise ValueError(f"{name} must be at least {MIN_CELLS}, got {limit}.")
    var_names = next(iter(synthetic.values())).var_names
    matrices = {name: get_values(adata, var_names, layer, value_space, name) for name, adata in groups.items()}
    space = EvaluationSpace(train, layer, value_space, n_top_genes, n_comps, seed, var_names)

    cells = {name: _Cells.from_anndata(groups[name], matrices[name], labels_key, space) for name in groups}
    train_cells = cells.pop("train")
    complete = cells["real"]
    rng = np.random.default_rng(seed)
    n = min(max_cells, *map(len, cells.values()))
    cells = {name: group.sample(n, rng) for name, group in cells.items()}
    sizes = {"all": n} | ({} if labels_key is None else _common_labels(cells, min_label_cells))
    lost = set() if labels_key is None else set(_common_labels({"real": complete}, min_label_cells)) - set(sizes)
    if lost:
        logger.warning("No rows for %s: fewer than %d cells among %d of a group.", sorted(lost), min_label_cells, n)
    scale = float(np.median(pdist(train_cells.sample(max_cells, rng).pcs)))
    label_classifier = None
    if len(np.unique(train_cells.labels)) > 1:
        subset = train_cells.sample(max_cells, np.random.default_rng(seed))
        label_classifier = _label_classifier().fit(subset.pcs, subset.labels)

    def score(name: str) -> dict[tuple[str, str], float]:
        query = cells[name]
        return _score(query, cells["real"], train_cells, sizes, scale, space, label_classifier, quick, n_jobs, seed)

    values = {column: score(name) for column, name in columns.items()}
    ceilings = score("control") if control is not None else {}
    rows = []
    for metric, group in max(values.values(), key=len):
        figures = {column: scores.get((metric, group), np.nan) for column, scores in values.items()}
        figures["ceiling"] = ceilings.get((metric, group), np.nan)
        aim = {"better": AIMS[metric].better, "aim": AIMS[metric].text}
        rows.append({"metric": metric, "group": group, "n_cells": sizes[group]} | figures | aim)
    return pd.DataFrame(rows)


def summarize(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Mean and spread over several seeds, and which aims are met.

    Parameters
    ----------
    tables
        Output of [`compare`] for each seed, with a ceiling and a column `value`; other sets are baselines.

    Returns
    -------
    One row per metric and group: `metric`, `group`, `n_cells` (the smallest), then for `value`, `ceiling` and each
    baseline its mean and, as `<name>_std`, its sample standard deviation (NaN for one table), `better`, `aim`, and
    `met` (of the mean value; `None` where there is no aim or it cannot be decided).
    """
    sets = [str(name) for name in tables[0] if name not in ("metric", "group", "n_cells", "better", "aim")]
    rows = []
    for _, table in pd.concat(tables).groupby(["metric", "group"], sort=False):
        aim = AIMS[table["metric"].iloc[0]]
        figures = {name: float(table[name].mean()) for name in sets}
        spread = {name: float(table[name].std()) for name in sets}
        row = {name: table[name].iloc[0] for name in ("metric", "group")} | {"n_cells": table["n_cells"].min()}
        for name in sets:
            row |= {name: figures[name], f"{name}_std": spread[name]}
        met = aim.met(figures["value"], figures["ceiling"], spread["ceiling"])
        rows.append(row | {"better": aim.better, "aim": aim.text, "met": met})
    return pd.DataFrame(rows).astype({"met": object})


def _score(
    query: _Cells,
    real: _Cells,
    train: _Cells,
    sizes: dict[str, int],
    scale: float,
    space: EvaluationSpace,
    label_classifier: ClassifierMixin | None,
    quick: bool,
    n_jobs: int | None,
    seed: int,
) -> dict[tuple[str, str], float]:
    """All metrics of `query` against `real`, by (metric, group); `sizes` are the cells of each side in each group."""
    rng = np.random.default_rng(seed)
    labels = [group for group in sizes if group != "all"]
    figures = {"all": _pair_metrics(query, real, scale, quick, n_jobs, seed)}
    if not quick:
        figures["all"]["classifier_genes_auroc"] = _genes_auroc(query, real, space, n_jobs, seed)
        if importlib.util.find_spec("scib_metrics"):
            figures["all"]["ilisi"] = ilisi(query.pcs, real.pcs)
        figures["all"] |= legacy_metrics(query.log_values, real.log_values)
    figures["all"]["gene_gene_r"] = gene_gene_agreement(query.log_values, real.log_values, train.log_values)
    for label in labels:
        a, b = (group[np.flatnonzero(group.labels == label)].sample(sizes[label], rng) for group in (query, real))
        figures[label] = _pair_metrics(a, b, scale, quick, n_jobs, seed)
    if label_classifier is not None:
        predicted = label_classifier.predict(query.pcs)
        for group in figures:
            rows = np.full(len(query), True) if group == "all" else query.labels == group
            figures[group]["label_accuracy"] = accuracy_score(query.labels[rows], predicted[rows])
        if len(np.unique(query.labels)) > 1:
            f1 = train_on_synthetic_f1(query.pcs, query.labels, real.pcs, real.labels)
            figures["all"]["train_on_synthetic_f1"] = f1
    if labels and len(np.unique(real.labels)) > 1 and len(np.unique(query.labels)) > 1:
        for group, slope in effect_size_slopes(query, real, train, labels).items():
            figures[group]["effect_size_slope"] = slope
    figures["all"] |= memorization(query.values, real.values, train.values, space, seed)
    return {
        (metric, group): float(figures[group][metric])
        for metric in AIMS
        for group in figures
        if metric in figures[group]
    }


def _pair_metrics(x: _Cells, y: _Cells, scale: float, quick: bool, n_jobs: int | None, seed: int) -> dict[str, float]:
    """Metrics of two groups of equal size that make sense for one label, too."""
    forest = RandomForestClassifier(200, random_state=seed)
    return {
        "mmd2": mmd2(x.pcs, y.pcs, scale),
        "w2": wasserstein2(x.pcs, y.pcs),
        **({} if quick else {"classifier_pcs_auroc": classifier_auroc(x.pcs, y.pcs, forest, seed, n_jobs)}),
        **nearest_neighbor_accuracies(x.pcs, y.pcs),
        **gene_marginals(x.log_values, y.log_values),
        "library_size_ks": ks_2samp(x.library_size, y.library_size, method="asymp").statistic,
        "genes_detected_ks": ks_2samp(x.genes_detected, y.genes_detected, method="asymp").statistic,
    }


def _genes_auroc(x: _Cells, y: _Cells, space: EvaluationSpace, n_jobs: int | None, seed: int) -> float:
    """AUROC of gradient boosting on log-normalised genes, library size and genes detected."""
    boosting = HistGradientBoostingClassifier(max_bins=31, random_state=seed)  # 255 bins: as good, many times slower
    columns = space.columns
    expressed = sum(group.log_values[:, columns].getnnz(axis=0) for group in (x, y))
    columns = columns[expressed >= boosting.min_samples_leaf]  # no tree can split on a gene of fewer cells than a leaf
    a, b = (
        np.column_stack([group.log_values[:, columns].toarray(), group.library_size, group.genes_detected])
        for group in (x, y)
    )
    return classifier_auroc(a, b, boosting, seed, n_jobs)


# -- distances between two clouds of cells -----------------------------------------------------------------------------


def mmd2(x: np.ndarray, y: np.ndarray, scale: float) -> float:
    r"""Squared maximum mean discrepancy, unbiased. 0 for equal distributions (and below by chance); lower is better.

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
    """Area under the ROC curve of a classifier that tells x from y. 0.5: it cannot; 1: always.

    Mean over 5 stratified, shuffled folds, each scored alone: scores of different folds are not comparable. `n_jobs`
    processes share the folds.

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
    """Leave-one-out accuracy of 1-NN that tells x from y, of equal size, in E. 0.5 is best; 0 for copies of each other.

    - nearest_neighbor_accuracy: over all cells, the mean of the next two.
    - nearest_neighbor_accuracy_of_synthetic: share of x whose nearest cell is of x. High where x varies too little.
    - nearest_neighbor_accuracy_of_real: share of y whose nearest cell is of y. High where x is noisy or misses cells.

    The mean alone can mislead: cells with too much noise lie near real ones (0.2, say) and no real one near them (0.9).

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
    """Median local inverse Simpson index of x and y among neighbours in E, scaled to 0 - 1; higher is better.

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
        distances, indices = search.kneighbors(cells)  # scib-metrics expects each cell among its neighbours
        return float(ilisi_knn(NeighborsResults(indices, distances), np.repeat([0, 1], [len(x), len(y)])))


# -- genes and labels --------------------------------------------------------------------------------------------------


def gene_marginals(x: sp.csr_matrix, y: sp.csr_matrix) -> dict[str, float]:
    """Pearson r of the genes' means and variances (log-normalised), and mean absolute difference of zero fractions."""
    moments = [gene_moments(matrix) for matrix in (x, y)]
    zeros = [1 - matrix.getnnz(axis=0) / matrix.shape[0] for matrix in (x, y)]
    return {
        "gene_mean_r": pearson(moments[0][0], moments[1][0]),
        "gene_variance_r": pearson(moments[0][1], moments[1][1]),
        "gene_zero_fraction_mae": float(np.abs(zeros[0] - zeros[1]).mean()),
    }


def gene_gene_agreement(x: sp.csr_matrix, y: sp.csr_matrix, train: sp.csr_matrix, n_genes: int = 300) -> float:
    """Pearson r between the upper triangles of two Spearman correlation matrices of genes; higher is better.

    Log-normalised values of the `n_genes` genes with the largest mean in train. A gene that does not vary correlates
    with none (0), so that a model does not gain by making genes constant.
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
    predicted = _label_classifier().fit(x, x_labels).predict(real)
    return float(
        f1_score(real_labels, predicted, labels=np.unique(real_labels), average="macro", zero_division=np.float64(0))
    )


def effect_size_slopes(x: _Cells, y: _Cells, train: _Cells, labels: list[str], n_genes: int = 100) -> dict[str, float]:
    """Slope through the origin of log fold changes in x on those in y, by label and pooled ("all"). 1 is best.

    `sum_g f_g(x) f_g(y) / sum_g f_g(y)^2`, with f_g the mean log-normalised value of gene g in the label minus that
    in all other cells; below 1 where a model blurs the labels. The genes are the `n_genes` with the largest |f_g| in
    train: chosen in y, chance would favour large f_g(y) and push the slope below 1.
    """

    def fold_changes(cells: _Cells, label: str) -> np.ndarray:
        inside = cells.labels == label
        return gene_moments(cells.log_values[inside])[0] - gene_moments(cells.log_values[~inside])[0]

    products = {}
    for label in labels:
        genes = np.argsort(-np.abs(fold_changes(train, label)), kind="stable")[:n_genes]
        f_x, f_y = fold_changes(x, label)[genes], fold_changes(y, label)[genes]
        products[label] = np.array([f_x @ f_y, f_y @ f_y])
    products["all"] = np.sum(list(products.values()), axis=0)
    return {group: float(numerator / denominator) for group, (numerator, denominator) in products.items()}


# -- memorisation ------------------------------------------------------------------------------------------------------


def memorization(
    x: sp.csr_matrix, held_out: sp.csr_matrix, train: sp.csr_matrix, space: EvaluationSpace, seed: int = 0
) -> dict[str, float]:
    """Whether x are copies of training cells.

    - nearest_train_distance_ratio: median distance to the nearest of all training cells, x over held-out. Best 1;
      lower for copies.
    - share_nearer_to_train: share of x that lie nearer to a training cell than to a held-out one, among equally many
      of both (a tie counts half). Best 0.5; higher for copies.
    - share_duplicates_of_train: share of x with exactly the values of a training cell. Best 0.

    Distances are in PCs fitted on equally many cells of each kind. In PCs of some kinds only, the others would seem to
    lie closer to everything, since the PCs leave out more of what is peculiar to them.

    Parameters
    ----------
    x, held_out, train
        Values (cells, G); `train` is complete.
    space
        Gives normalisation, genes and number of PCs, not the PCs.
    """
    rng = np.random.default_rng(seed)
    logs = [log_normalize(matrix, space.value_space)[:, space.columns] for matrix in (x, held_out, train)]
    n = min(matrix.shape[0] for matrix in logs)
    drawn = [rng.choice(matrix.shape[0], n, replace=False) for matrix in logs]
    pca = _fit_pca(
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
    """Metrics of the scRDiT paper, on log-normalised values (n, G) of equally many cells; lower is better.

    They are not 0 for real cells, pair rows at random or see single genes only: read them against the ceiling alone.

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
        for _ in range(4):  # the kernel of half the bandwidth is the square
            kernel *= kernel
            total += kernel.sum()
        return total

    within_x, within_y, between = map(kernel_sum, squared)
    return float((2 * within_x + 2 * within_y + 2 * 5 * n - 2 * between) / n**2)  # 5 kernels are 1 on both diagonals


# -- helpers -----------------------------------------------------------------------------------------------------------


def check_labels(obs: pd.DataFrame, labels_key: str, name: str | None) -> None:
    """Raise ValueError unless every cell has a label; `name` is what to call the AnnData, `None` for a bare obs."""
    table = "obs" if name is None else f"{name}.obs"
    if labels_key not in obs:
        raise ValueError(f"labels_key={labels_key!r} is no column of {table}; it has {list(obs)}.")
    if obs[labels_key].isna().any():
        raise ValueError(
            f"{table}[{labels_key!r}] holds {obs[labels_key].isna().sum()} NaN; give every cell a label or drop it."
        )


def _common_labels(groups: dict[str, _Cells], min_cells: int) -> dict[str, int]:
    """Labels with enough cells in every group, and with how many in the smallest."""
    counts = pd.DataFrame({name: pd.Series(group.labels).value_counts() for name, group in groups.items()}).fillna(0)
    return {str(label): int(n) for label, n in counts.min(axis=1).sort_index().items() if n >= min_cells}


def _label_classifier() -> ClassifierMixin:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def _fit_pca(log_values: sp.csr_matrix, n_comps: int, seed: int) -> PCA:
    """Fit PCs with implicit centring, so that the matrix stays sparse."""
    return PCA(min(n_comps, min(log_values.shape) - 1), svd_solver="arpack", random_state=seed).fit(log_values)


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson r; 0 where one side does not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.nan_to_num(np.corrcoef(a, b)[0, 1]))


def _row_keys(matrix: sp.csr_matrix) -> list[bytes]:
    """One key per row, equal for equal rows; zeros are not stored and indices are sorted."""
    indices, data = matrix.indices.astype(np.int64), matrix.data.astype(np.float32)
    bounds = zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)
    return [indices[start:stop].tobytes() + data[start:stop].tobytes() for start, stop in bounds]
