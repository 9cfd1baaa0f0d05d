"""Known answers for the metrics, on real cells, and libraries as oracles."""

from types import SimpleNamespace

import anndata as ad
import numpy as np
import ot
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.gaussian_process.kernels import RBF
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from scrdit_diffusers.evaluation import baselines, metrics
from scrdit_diffusers.evaluation import compare as comparison
from scrdit_diffusers.evaluation.space import CellsInSpace, EvaluationSpace, log_normalize

KEY = "bulk_labels"


@pytest.fixture(scope="module")
def cells():
    """700 real cells x 120 genes with counts, of the three most frequent labels."""
    raw = sc.datasets.pbmc68k_reduced()
    values = np.expm1(raw.raw.X.toarray().astype(np.float64))
    unit = np.where(values > 0, values, np.inf).min(axis=1, keepdims=True)  # a cell's smallest value is one count
    adata = ad.AnnData(sp.csr_matrix(np.rint(values / unit), dtype=np.float32), obs=raw.obs[[KEY]], var=raw.raw.var)
    adata = adata[adata.obs[KEY].isin(["Dendritic", "CD14+ Monocyte", "CD19+ B"])]
    genes = np.argsort(-np.asarray(adata.X.mean(axis=0)).ravel())[:120]
    return adata[np.random.default_rng(0).permutation(adata.n_obs), genes].copy()


@pytest.fixture(scope="module")
def split(cells):
    """Disjoint train (204), control (130) and real (130) cells."""
    return dict(train=cells[:204].copy(), control=cells[204:334].copy(), real=cells[334:464].copy())


def value(table, metric, group="all", column="value"):
    rows = table[(table["metric"] == metric) & (table["group"] == group)]
    assert len(rows) == 1
    return rows[column].item()


def compare(split, synthetic, control=False, labels_key=None, **kwargs):
    parts = {name: adata for name, adata in split.items() if control or name != "control"}
    kwargs = dict(labels_key=labels_key, min_label_cells=30, n_comps=20) | kwargs
    return comparison.compare(synthetic=synthetic, **parts, **kwargs)


@pytest.fixture(scope="module")
def real_table(split):
    """Real cells in the role of synthetic ones, and as the ceiling."""
    return compare(split, split["control"], control=True, labels_key=KEY)


@pytest.fixture(scope="module")
def copy_table(split):
    """Training cells in the role of synthetic ones."""
    return compare(split, split["train"][:130])


@pytest.fixture(scope="module")
def independent_table(split):
    synthetic = baselines.resample_genes(split["train"], split["real"].obs, KEY, np.random.default_rng(0))
    return compare(split, synthetic, labels_key=KEY)


# -- compare -----------------------------------------------------------------------------------------------------------


def test_value_equals_ceiling_for_the_control_cells(real_table):
    pd.testing.assert_series_equal(real_table["value"], real_table["ceiling"], check_names=False)


def test_table_is_tidy_and_complete(real_table):
    assert list(real_table) == ["metric", "group", "n_cells", "value", "ceiling", "better", "aim"]
    assert not real_table.isna().any(axis=None)
    assert not real_table.duplicated(["metric", "group"]).any()
    optional = {"ilisi"}
    assert set(comparison.AIMS) - optional <= set(real_table["metric"]) <= set(comparison.AIMS)


def test_labels_with_enough_cells_have_rows_of_their_own(real_table):
    assert set(real_table["group"]) == {"all", "Dendritic", "CD14+ Monocyte"}


def test_real_cells_pass_as_real(real_table):
    for metric, low, high in [
        ("mmd2", -0.01, 0.01),
        ("classifier_pcs_auroc", 0.35, 0.65),
        ("classifier_genes_auroc", 0.35, 0.65),
        ("nearest_neighbor_accuracy", 0.4, 0.6),
        ("gene_mean_r", 0.98, 1),
        ("gene_zero_fraction_mae", 0, 0.05),
        ("library_size_ks", 0, 0.2),
        ("label_accuracy", 0.8, 1),
        ("train_on_synthetic_f1", 0.75, 1),
        ("effect_size_slope", 0.85, 1.15),
        ("nearest_train_distance_ratio", 0.9, 1.1),
        ("share_nearer_to_train", 0.35, 0.65),
        ("share_duplicates_of_train", 0, 0),
    ]:
        assert low <= value(real_table, metric) <= high, metric


def test_independent_genes_are_recognised(independent_table, real_table):
    for metric in ("mmd2", "w2", "classifier_pcs_auroc", "classifier_genes_auroc", "nearest_neighbor_accuracy"):
        assert value(independent_table, metric) > value(real_table, metric), metric
    assert value(independent_table, "classifier_genes_auroc") > 0.7
    assert value(independent_table, "gene_gene_r") < value(real_table, "gene_gene_r") - 0.05


def test_independent_genes_keep_the_marginals(independent_table):
    assert value(independent_table, "gene_mean_r") > 0.97
    assert value(independent_table, "effect_size_slope") == pytest.approx(1, abs=0.15)


def test_copies_of_training_cells_are_memorization_and_nothing_else(copy_table):
    assert value(copy_table, "share_duplicates_of_train") == 1
    assert value(copy_table, "nearest_train_distance_ratio") < 0.01
    assert value(copy_table, "share_nearer_to_train") > 0.65
    assert value(copy_table, "classifier_genes_auroc") < 0.65


def test_doubled_library_size_moves_the_library_size_only(split):
    doubled = split["control"].copy()
    doubled.X = doubled.X * 2
    table = compare(split, doubled)
    assert value(table, "library_size_ks") > 0.4
    assert value(table, "classifier_genes_auroc") > 0.8
    assert value(table, "genes_detected_ks") < 0.2
    assert value(table, "nearest_neighbor_accuracy") < 0.6


def test_dropped_label_lowers_train_on_synthetic_and_is_reported(split, real_table, caplog):
    synthetic = split["control"]
    table = compare(split, synthetic[synthetic.obs[KEY] != "CD14+ Monocyte"], labels_key=KEY)
    assert value(table, "train_on_synthetic_f1") < value(real_table, "train_on_synthetic_f1") - 0.2
    assert "CD14+ Monocyte" in caplog.text and "CD14+ Monocyte" not in set(table["group"])


def test_swapped_labels_lower_label_accuracy(split):
    swapped = split["control"].copy()
    swapped.obs[KEY] = swapped.obs[KEY].astype(str).to_numpy()[::-1]
    table = compare(split, swapped, labels_key=KEY)
    assert value(table, "label_accuracy") < 0.6
    assert value(table, "effect_size_slope") < 0.5


def test_groups_are_drawn_to_the_same_size_and_max_cells(split):
    table = compare(split, split["control"][:100], max_cells=90)
    assert set(table.loc[table["group"] == "all", "n_cells"]) == {90}


@pytest.fixture(scope="module")
def quick_table(split):
    """Two sets at once, without what takes long."""
    sets = {"control": split["control"], "train": split["train"][:130]}
    return compare(split, sets, control=True, labels_key=KEY, quick=True)


def test_several_sets_have_the_figures_that_each_has_alone(quick_table, real_table):
    merged = quick_table[quick_table["group"] == "all"].merge(real_table, on=["metric", "group"])
    assert len(merged) > 10
    np.testing.assert_allclose(merged["control"], merged["value"])
    np.testing.assert_allclose(merged["ceiling_x"], merged["ceiling_y"])
    assert value(quick_table, "share_duplicates_of_train", column="train") == 1


def test_quick_leaves_out_what_takes_long(quick_table):
    slow = {name for name in comparison.AIMS if name.startswith(("classifier", "legacy", "ilisi"))}
    assert set(quick_table["metric"]) == set(comparison.AIMS) - slow


def test_sets_are_checked_by_name(split):
    with pytest.raises(ValueError, match=r"synthetic\['few'\] has 3 cells"):
        compare(split, {"few": split["control"][:3]})
    with pytest.raises(ValueError, match=r"none of them named \['ceiling'\]"):
        compare(split, {"ceiling": split["control"]})
    with pytest.raises(ValueError, match="at least one set"):
        compare(split, {})


def test_genes_too_rare_to_split_on_do_not_change_the_classifier():
    rng = np.random.default_rng(0)
    rates = np.geomspace(0.01, 3, 30)
    counts = [sp.csr_matrix(rng.poisson(rates * shift, (100, 30)).astype(float)) for shift in (1, 1.3)]
    x, y = (CellsInSpace(c, log_normalize(c, "counts"), np.empty(0), np.empty(0)) for c in counts)
    features = [np.column_stack([z.log_values.toarray(), z.library_size, z.genes_detected]) for z in (x, y)]
    boosting = HistGradientBoostingClassifier(max_bins=31, random_state=0)
    assert (sum((f > 0).sum(axis=0) for f in features) < boosting.min_samples_leaf).sum() > 5
    all_genes = SimpleNamespace(columns=np.arange(30))
    assert comparison._genes_auroc(x, y, all_genes, None, 0) == metrics.classifier_auroc(*features, boosting, 0)


def summary(**figures):
    tables = [
        pd.DataFrame({"metric": ["mmd2", "w2", "legacy_kl"], "group": "all", "n_cells": n, "value": x, "ceiling": y})
        for n, x, y in figures.values()
    ]
    return comparison.summarize([table.assign(better="", aim="") for table in tables]).set_index("metric")


def test_summary_has_mean_spread_and_smallest_number_of_cells():
    table = summary(a=(60, 1.0, 2.0), b=(50, 3.0, 2.0))
    assert table.loc["w2", ["n_cells", "value", "ceiling", "ceiling_std"]].tolist() == [50, 2, 2, 0]
    assert table.loc["w2", "value_std"] == pytest.approx(np.sqrt(2))


def test_summary_says_which_aims_are_met():
    assert summary(a=(60, 2.0, 2.0), b=(60, 2.0, 2.2))["met"].tolist() == [True, True, None]
    assert summary(a=(60, 3.0, 2.0), b=(60, 3.0, 2.2))["met"].tolist() == [False, False, None]
    assert summary(a=(60, 1.0, 2.0))["met"].tolist() == [None, True, None]  # the ceiling of MMD^2 has no spread


DECIDED = [name for name, aim in comparison.AIMS.items() if aim.met is not comparison._undecided]


@pytest.mark.parametrize("metric", DECIDED)
def test_aim_is_met_by_real_cells_and_missed_by_bad_ones(metric):
    real = dict(ilisi=0.9, label_accuracy=0.8, effect_size_slope=1, nearest_train_distance_ratio=1).get(metric, 0)
    real = 0.9 if metric.endswith(("_r", "_f1")) else 0.5 if metric.startswith(("share_n", "nearest_n", "cl")) else real
    aim = comparison.AIMS[metric]
    worse = -1 if aim.better in ("higher", "near 1", "near ceiling") else 1
    assert aim.met(real, real, 0.01) is True and aim.met(real + worse * 0.3, real, 0.01) is False


def test_seed_makes_it_reproducible(split):
    first, second = (compare(split, split["control"], max_cells=30, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


def test_log_normalised_values_without_labels(split):
    logged = {name: adata.copy() for name, adata in split.items()}
    for adata in logged.values():
        adata.X = log_normalize(adata.X, "counts")
    table = comparison.compare(
        logged["real"], logged["control"], logged["train"], value_space="log_normalized", max_cells=60
    )
    assert set(table["group"]) == {"all"} and table["ceiling"].isna().all() and table["value"].notna().all()


def test_genes_are_those_of_the_synthetic_cells_in_any_order(split):
    few = split["control"][:, split["control"].var_names[50::-1]]
    ordered = split["control"][:, split["control"].var_names[:51]]
    kwargs = dict(real=split["real"], train=split["train"], max_cells=60)
    tables = (comparison.compare(synthetic=synthetic, **kwargs) for synthetic in (few, ordered))
    a, b = (table.set_index("metric")["value"] for table in tables)
    for metric in ("mmd2", "w2", "gene_mean_r", "gene_gene_r"):
        assert a[metric] == pytest.approx(b[metric], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels_key="cluster"), "real.obs has no column 'cluster'"),
        (dict(max_cells=5), "max_cells must be at least 10, got 5"),
        (dict(layer="counts"), r"real: adata.layers\['counts'\] does not exist"),
        (dict(value_space="tpm"), "value_space must be one of"),
        (dict(value_space="log_normalized"), "real holds only integers"),
        (dict(n_comps=0), "n_comps must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(split, change, message):
    with pytest.raises(ValueError, match=message):
        comparison.compare(**(dict(real=split["real"], synthetic=split["control"], train=split["train"]) | change))


def test_wrong_cells_are_named(split):
    real, synthetic, train = split["real"], split["control"], split["train"]
    with pytest.raises(ValueError, match="control has 9 cells"):
        comparison.compare(real, synthetic, train, control=synthetic[:9])
    with pytest.raises(ValueError, match="train lacks 20 of the 120 genes"):
        comparison.compare(real, synthetic, train[:, :100])
    logged = synthetic.copy()
    logged.X = log_normalize(logged.X, "counts")
    with pytest.raises(ValueError, match='synthetic: .* use value_space="log_normalized"'):
        comparison.compare(real, logged, train)
    missing = real.copy()
    missing.obs[KEY] = missing.obs[KEY].where(np.arange(real.n_obs) > 3)
    with pytest.raises(ValueError, match="holds 4 NaN"):
        comparison.compare(missing, synthetic, train, labels_key=KEY)


# -- single metrics against oracles ------------------------------------------------------------------------------------


@pytest.fixture
def clouds():
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 4)), rng.normal(0.5, 1.2, size=(60, 4))


def test_space_agrees_with_scanpy(split):
    train = split["train"].copy()
    sc.pp.normalize_total(train, target_sum=1e4)
    sc.pp.log1p(train)
    expected = PCA(10, svd_solver="full").fit_transform(train.X.toarray())
    coordinates = EvaluationSpace(split["train"], n_comps=10).transform(split["train"])
    np.testing.assert_allclose(np.abs(coordinates), np.abs(expected), atol=2e-3)


def test_space_chooses_highly_variable_genes_of_train(split):
    space = EvaluationSpace(split["train"], n_top_genes=50, n_comps=5)
    assert len(space.columns) == 50 and space.transform(split["real"]).shape == (130, 5)


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
