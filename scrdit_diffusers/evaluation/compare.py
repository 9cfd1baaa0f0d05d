"""Comparison of synthetic with real cells: every metric beside its ceiling."""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial.distance import pdist
from scipy.stats import ks_2samp
from sklearn.base import ClassifierMixin
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.metrics import accuracy_score

from scrdit_diffusers.checks import check_known_labels, check_label, check_real

from .metrics import (
    NUM_FOLDS,
    classifier_auroc,
    effect_size_slopes,
    gene_gene_agreement,
    gene_marginals,
    ilisi,
    label_classifier,
    legacy_metrics,
    memorization,
    mmd2,
    nearest_neighbor_accuracies,
    train_on_synthetic_f1,
    variance_within_labels,
    wasserstein2,
)
from .space import CellsInSpace, EvaluationSpace, get_values

logger = logging.getLogger(__name__)

MIN_CELLS = 2 * NUM_FOLDS  # two cells of each kind in each fold


class Aim(NamedTuple):
    """What a metric should reach."""

    better: str  # "lower", "higher", "near 0.5", "near 1", "near ceiling"
    text: str
    met: Callable[[float, float, float], bool | None]  # of value, ceiling, standard deviation of the ceiling


def _undecided(value: float, ceiling: float, spread: float) -> None:
    """Aim of metrics that only explain another one or allow comparison with the paper."""


# "ceiling" is the value of the same metric for real control cells.
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
    "variance_within_labels": Aim("near 1", "0.90 - 1.10", lambda v, c, s: 0.9 <= v <= 1.1),
    "nearest_train_distance_ratio": Aim("near 1", ">= 0.95", lambda v, c, s: v >= 0.95),
    "share_nearer_to_train": Aim("near 0.5", "<= 0.55", lambda v, c, s: v <= 0.55),
    "share_duplicates_of_train": Aim("lower", "0", lambda v, c, s: v == 0),
    "legacy_kl": Aim("lower", "ceiling", _undecided),
    "legacy_wasserstein": Aim("lower", "ceiling", _undecided),
    "legacy_mmd": Aim("lower", "ceiling", _undecided),
    "legacy_zero_proportion_difference": Aim("lower", "ceiling", _undecided),
    "legacy_coefficient_of_variation_difference": Aim("lower", "ceiling", _undecided),
}

METRIC_NAMES = {
    "mmd2": "MMD²",
    "w2": "Wasserstein-2 distance",
    "classifier_pcs_auroc": "classifier on PCs, AUROC",
    "classifier_genes_auroc": "classifier on all genes, AUROC",
    "nearest_neighbor_accuracy": "1-nearest-neighbor accuracy",
    "nearest_neighbor_accuracy_of_synthetic": "1-nearest-neighbor accuracy, generated cells alone",
    "nearest_neighbor_accuracy_of_real": "1-nearest-neighbor accuracy, real cells alone",
    "ilisi": "iLISI (mixing)",
    "gene_mean_r": "gene means, r",
    "gene_variance_r": "gene variances, r",
    "gene_zero_fraction_mae": "zero fractions, mean error",
    "library_size_ks": "library size, KS",
    "genes_detected_ks": "genes detected, KS",
    "gene_gene_r": "gene-gene correlations, r",
    "label_accuracy": "label accuracy",
    "train_on_synthetic_f1": "trained on generated, F1 on real",
    "effect_size_slope": "effect sizes, slope",
    "variance_within_labels": "variance within labels, PCs 1-10, ratio",
    "nearest_train_distance_ratio": "distance to nearest training cell, ratio",
    "share_nearer_to_train": "share nearer to training cells",
    "share_duplicates_of_train": "share equal to a training cell",
    "legacy_kl": "scRDiT: KL",
    "legacy_wasserstein": "scRDiT: Wasserstein",
    "legacy_mmd": "scRDiT: MMD",
    "legacy_zero_proportion_difference": "scRDiT: zero proportion",
    "legacy_coefficient_of_variation_difference": "scRDiT: coefficient of variation",
}


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
    """Compare synthetic with held-out real cells; the ceiling is the same metric for real control cells.

    Genes are those of `synthetic`; other genes of the real cells are left out. All groups are subsampled to the same
    size n, on which most metrics depend, and so are the cells of each label. `AIMS` lists the metrics, which direction
    is better and what to aim at; `metrics.py` says how each is computed.

    Parameters
    ----------
    real
        Held-out real cells (test).
    synthetic
        Generated cells, ideally as many as `real` and with its label counts. Or several sets with the same genes, which
        share the ceiling, by name: `{"model": cells, "copula": other_cells}`.
    train
        Training cells of the model. Space, genes and label classifier are fitted on them, and memorization is measured
        against all of them.
    control
        Other held-out real cells, disjoint from `real` and `train`: the ceiling. `None` leaves the ceiling NaN.
    labels_key
        Column of obs, in all groups; adds the label metrics and the rows by label. `None` leaves them out.
    layer
        Layer that holds the values; `None` takes X.
    value_space
        "counts", or "log_normalized" for values that are log-normalized already. Library size is then the sum of the
        values.
    n_top_genes
        Highly variable genes of space E and of the classifier on genes.
    n_comps
        Principal components of space E.
    max_cells
        Upper limit of n; bounds time and memory. `train` is also cut to it for the label classifier and the distance
        scale.
    min_label_cells
        Labels with at least this many cells in each group get their own rows and enter the effect sizes.
    quick
        Leave out what takes long: classifiers of real against synthetic, iLISI and the legacy metrics.
    n_jobs
        Processes for the folds of those classifiers, as in scikit-learn: -1 takes all cores, `None` one.
    seed
        Seed of subsampling, folds and classifiers. Repeat with several seeds for a spread.

    Returns
    -------
    One row per metric and group: `metric`, `group` ("all" or a label), `n_cells` (of each side), `value`, `ceiling`
    (float64), `better` ("lower", "higher", "near 0.5", "near 1", "near ceiling") and `aim`. For several synthetic sets,
    a column named after each replaces `value`. iLISI is left out without scib-metrics.

    Raises
    ------
    ValueError
        There are too few cells or genes, genes or labels are missing, or values are wrong; the message names which.
    """
    if isinstance(synthetic, Mapping):
        columns = {name: f"synthetic[{name!r}]" for name in synthetic}
        reserved = {"metric", "group", "n_cells", "ceiling", "better", "aim"} & set(columns)
        if reserved or not columns:
            wrong = f"sets named {sorted(reserved)}, which are columns of the result" if reserved else "none"
            raise ValueError(f"synthetic must be at least one set of cells by name, got {wrong}.")
    else:
        columns, synthetic = {"value": "synthetic"}, {"value": synthetic}
    groups = {"real": real} | {columns[name]: adata for name, adata in synthetic.items()} | {"train": train}
    groups |= {} if control is None else {"control": control}
    for name, adata in groups.items():
        if adata.n_obs < MIN_CELLS:
            raise ValueError(f"{name} has {adata.n_obs} cells; at least {MIN_CELLS} are needed.")
        if labels_key is not None:
            check_label(adata.obs, labels_key, f"{name}.obs")
        if name not in columns.values():
            check_real(adata.obs, f"{name}.obs")
    if labels_key is not None:
        known = sorted({str(label) for adata in (real, train) for label in adata.obs[labels_key].unique()})
        for name in columns.values():
            check_known_labels(groups[name].obs[labels_key], known, f"{name}.obs[{labels_key!r}]")
    for name, limit in dict(max_cells=max_cells, min_label_cells=min_label_cells).items():
        if limit < MIN_CELLS:
            raise ValueError(f"{name} must be at least {MIN_CELLS}, got {limit}.")
    var_names = next(iter(synthetic.values())).var_names
    matrices = {name: get_values(adata, var_names, layer, value_space, name) for name, adata in groups.items()}
    space = EvaluationSpace(train, layer, value_space, n_top_genes, n_comps, seed, var_names)

    cells = {name: CellsInSpace.from_anndata(groups[name], matrices[name], labels_key, space) for name in groups}
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
    classifier = None
    if len(np.unique(train_cells.labels)) > 1:
        subset = train_cells.sample(max_cells, np.random.default_rng(seed))
        classifier = label_classifier().fit(subset.pcs, subset.labels)

    def score(name: str) -> dict[tuple[str, str], float]:
        query = cells[name]
        return _score(query, cells["real"], train_cells, sizes, scale, space, classifier, quick, n_jobs, seed)

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
    """Summarize several seeds: mean, spread, and which aims are met.

    Parameters
    ----------
    tables
        Output of [`compare`] for each seed, with a ceiling and a column `value`; other sets are baselines.

    Returns
    -------
    One row per metric and group: `metric`, `group`, `n_cells` (the smallest); for `value`, `ceiling` and each baseline
    the mean and, as `<name>_std`, the sample standard deviation (NaN for one seed); `better`, `aim`, and `met` (by the
    mean; `None` if there is no aim or it cannot be decided).
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
    query: CellsInSpace,
    real: CellsInSpace,
    train: CellsInSpace,
    sizes: dict[str, int],
    scale: float,
    space: EvaluationSpace,
    classifier: ClassifierMixin | None,
    quick: bool,
    n_jobs: int | None,
    seed: int,
) -> dict[tuple[str, str], float]:
    """All metrics of `query` against `real`, by (metric, group); `sizes` has the cells per side of each group."""
    rng = np.random.default_rng(seed)
    labels = [group for group in sizes if group != "all"]
    figures = {"all": _pair_metrics(query, real, scale, quick, n_jobs, seed)}
    if not quick:
        x, y = (group.log_values[:, space.columns] for group in (query, real))
        sizes_of_cells = [np.column_stack([group.library_size, group.genes_detected]) for group in (query, real)]
        figures["all"]["classifier_genes_auroc"] = genes_auroc(x, y, sizes_of_cells, n_jobs=n_jobs, seed=seed)
        if importlib.util.find_spec("scib_metrics"):
            figures["all"]["ilisi"] = ilisi(query.pcs, real.pcs)
        figures["all"] |= legacy_metrics(query.log_values, real.log_values)
    figures["all"]["gene_gene_r"] = gene_gene_agreement(query.log_values, real.log_values, train.log_values)
    for label in labels:
        a, b = (group[np.flatnonzero(group.labels == label)].sample(sizes[label], rng) for group in (query, real))
        figures[label] = _pair_metrics(a, b, scale, quick, n_jobs, seed)
    if classifier is not None:
        predicted = classifier.predict(query.pcs)
        for group in figures:
            rows = np.full(len(query), True) if group == "all" else query.labels == group
            figures[group]["label_accuracy"] = accuracy_score(query.labels[rows], predicted[rows])
        if len(np.unique(query.labels)) > 1:
            f1 = train_on_synthetic_f1(query.pcs, query.labels, real.pcs, real.labels)
            figures["all"]["train_on_synthetic_f1"] = f1
    if labels and len(np.unique(real.labels)) > 1 and len(np.unique(query.labels)) > 1:
        for group, slope in effect_size_slopes(query, real, train, labels).items():
            figures[group]["effect_size_slope"] = slope
    if len(np.unique(real.labels)) > 1:
        figures["all"]["variance_within_labels"] = variance_within_labels(query, real)
    figures["all"] |= memorization(query.values, real.values, train.values, space, seed)
    return {
        (metric, group): float(figures[group][metric])
        for metric in AIMS
        for group in figures
        if metric in figures[group]
    }


def _pair_metrics(
    x: CellsInSpace, y: CellsInSpace, scale: float, quick: bool, n_jobs: int | None, seed: int
) -> dict[str, float]:
    """Metrics of two groups of equal size that also make sense for a single label."""
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


def genes_auroc(
    x: sp.csr_matrix,
    y: sp.csr_matrix,
    further: Sequence[np.ndarray] | None = None,
    n_jobs: int | None = None,
    seed: int = 0,
) -> float:
    """AUROC of gradient boosting that tells cells x from cells y by log-normalized genes and further columns.

    NaN without further columns if no gene is seen in enough cells.
    """
    boosting = HistGradientBoostingClassifier(max_bins=31, random_state=seed)  # 255 bins: as good, many times slower
    # No tree can split on a gene that fewer cells express.
    seen = x.getnnz(axis=0) + y.getnnz(axis=0) >= boosting.min_samples_leaf
    a, b = x[:, seen].toarray(), y[:, seen].toarray()
    if further is not None:
        a, b = np.column_stack([a, further[0]]), np.column_stack([b, further[1]])
    return classifier_auroc(a, b, boosting, seed, n_jobs) if a.shape[1] else np.nan


def _common_labels(groups: dict[str, CellsInSpace], min_cells: int) -> dict[str, int]:
    """Labels with enough cells in every group, with their number of cells in the smallest."""
    counts = pd.DataFrame({name: pd.Series(group.labels).value_counts() for name, group in groups.items()}).fillna(0)
    return {str(label): int(n) for label, n in counts.min(axis=1).sort_index().items() if n >= min_cells}
