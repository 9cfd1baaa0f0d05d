"""The figures show the numbers they should, and name their axes."""

import anndata as ad
import matplotlib
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from scipy.stats import spearmanr

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from scrdit_diffusers.evaluation import metrics, plotting, space

KEY = "bulk_labels"


@pytest.fixture(scope="module")
def cells():
    """120 real cells x 60 genes with counts."""
    raw = sc.datasets.pbmc68k_reduced()[:120].copy()
    values = np.expm1(raw.raw.X.toarray().astype(np.float64))
    unit = np.where(values > 0, values, np.inf).min(axis=1, keepdims=True)  # a cell's smallest value is one count
    counts = sp.csr_matrix(np.rint(values / unit), dtype=np.float32)
    genes = np.argsort(-np.asarray(counts.mean(axis=0)).ravel())[:60]
    return ad.AnnData(counts, obs=raw.obs[[KEY]], var=raw.raw.var)[:, genes].copy()


@pytest.fixture(autouse=True)
def close_figures(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("plt.show was called"))
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def embedding(cells):
    return plotting.joint_umap(cells[:60], cells[60:], labels_key=KEY)


def named(axes):
    return all(ax.get_xlabel() and ax.get_ylabel() for ax in np.ravel(axes))


def test_joint_umap_embeds_every_cell_once(embedding, cells):
    assert set(embedding.index) == set(cells.obs_names) and len(embedding) == 120
    assert (embedding["origin"] == "real").sum() == 60
    assert list(embedding[KEY]) == list(cells.obs.loc[embedding.index, KEY])
    assert np.isfinite(embedding[["UMAP1", "UMAP2"]]).all(axis=None)


@pytest.mark.parametrize("color", ["origin", KEY])
def test_umap_draws_every_cell_and_names_every_colour(embedding, color):
    ax = plotting.umap(embedding, color)
    assert sum(len(points.get_offsets()) for points in ax.collections) == 120
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(texts) == embedding[color].nunique() and named(ax)


def test_umap_tells_more_labels_apart_than_it_has_colours(embedding):
    table = embedding.assign(label=[f"{i % 10:02d}" for i in range(120)])
    looks = {
        (tuple(handle.get_facecolor()[0]), tuple(map(tuple, handle.get_paths()[0].vertices)))
        for handle in plotting.umap(table, "label").get_legend().legend_handles
    }
    assert len(looks) == 10


def test_umap_refuses_an_unknown_column(embedding):
    with pytest.raises(ValueError, match="color .*'batch'"):
        plotting.umap(embedding, "batch")


def test_joint_umap_bounds_the_number_of_cells(cells):
    table = plotting.joint_umap(cells, cells[:, ::-1], train=cells, max_cells=30)
    assert len(table) == 60


def test_gene_statistics_shows_the_metrics(cells):
    real, synthetic = cells[:60], cells[60:]
    axes = plotting.gene_statistics(real, synthetic)
    expected = metrics.gene_marginals(*(space.log_normalize(part.X, "counts") for part in (real, synthetic)))
    assert f"{expected['gene_mean_r']:.3f}" in axes[0].get_title()
    assert f"{expected['gene_zero_fraction_mae']:.3f}" in axes[1].get_title()
    assert axes[0].get_xscale() == axes[0].get_yscale() == "log" and named(axes)


def test_gene_statistics_says_how_many_genes_a_log_axis_cannot_show(cells):
    synthetic = cells.copy()
    synthetic.X = synthetic.X @ sp.diags((np.arange(60) > 2).astype(np.float32))
    assert "3 genes" in plotting.gene_statistics(cells, synthetic)[0].get_title()


def test_mean_variance_has_a_point_for_each_gene(cells):
    ax = plotting.mean_variance(cells[:60], cells[60:])
    offsets = ax.collections[0].get_offsets()
    dense = cells[:60].X.toarray()
    shown = dense.var(axis=0) > 0
    np.testing.assert_allclose(offsets[:, 0], dense.mean(axis=0)[shown], rtol=1e-5)
    np.testing.assert_allclose(offsets[:, 1], dense.var(axis=0)[shown], rtol=1e-4)
    assert named(ax)


def test_mean_zero_fraction_has_a_point_for_each_gene(cells):
    ax = plotting.mean_zero_fraction(cells[:60], cells[60:])
    for points, part in zip(ax.collections, (cells[:60], cells[60:]), strict=True):
        dense = part.X.toarray()
        expected = np.column_stack([dense.mean(axis=0), (dense == 0).mean(axis=0)])[dense.sum(axis=0) > 0]
        np.testing.assert_allclose(points.get_offsets(), expected, rtol=1e-5)
    assert ax.lines[0].get_label() == "Poisson" and named(ax)


def test_gene_gene_correlation_shows_spearman_of_the_most_expressed_genes(cells):
    axes = plotting.gene_gene_correlation(cells[:60], cells[60:], n_genes=10)
    genes = np.argsort(-space.log_normalize(cells[:60].X, "counts").toarray().mean(axis=0))[:10]
    for ax, part in zip(axes, (cells[:60], cells[60:]), strict=True):
        expected = spearmanr(space.log_normalize(part.X, "counts").toarray()[:, genes]).statistic
        np.testing.assert_allclose(np.sort(ax.images[0].get_array(), axis=None), np.sort(expected, axis=None))
    assert axes[0].images[0].get_clim() == axes[1].images[0].get_clim() and named(axes)


def test_gene_gene_correlation_of_equal_cells_is_the_same_figure(cells):
    axes = plotting.gene_gene_correlation(cells, cells, n_genes=10)
    np.testing.assert_array_equal(*(ax.images[0].get_array() for ax in axes))
    assert "r = 1.000" in axes[1].get_title()


def test_marker_dotplot_shows_shares_and_means(cells):
    train = cells[cells.obs[KEY].isin(["Dendritic", "CD14+ Monocyte", "CD19+ B"])]
    axes = plotting.marker_dotplot(train, train[:20], train, KEY, n_markers=2)
    genes = [text.get_text() for text in axes[0].get_xticklabels()]
    labels = [text.get_text() for text in axes[0].get_yticklabels()]
    assert labels == ["CD14+ Monocyte", "CD19+ B", "Dendritic"] and "LYZ" in genes
    for ax, part in zip(axes, (train, train[:20]), strict=True):
        sizes = ax.collections[0].get_sizes().reshape(len(labels), len(genes))
        expressed = part[part.obs[KEY] == "CD19+ B", genes].X.toarray() > 0
        np.testing.assert_allclose(sizes[1] / 90, expressed.mean(axis=0))
    colors = axes[0].collections[0].get_array().reshape(len(labels), len(genes))
    np.testing.assert_allclose(colors.max(axis=0), 1)  # each gene over the labels of real


def test_marker_dotplot_draws_no_dots_for_a_label_that_was_not_generated(cells):
    train = cells[cells.obs[KEY].isin(["Dendritic", "CD19+ B"])]
    axes = plotting.marker_dotplot(train, train[train.obs[KEY] == "CD19+ B"], train, KEY)
    sizes = axes[1].collections[0].get_sizes().reshape(2, -1)
    assert sizes[0].any() and not sizes[1].any()


def test_marker_dotplot_needs_two_labels(cells):
    one = cells[cells.obs[KEY] == "Dendritic"]
    with pytest.raises(ValueError, match=rf"train\.obs\['{KEY}'\] .* 3 .*\['Dendritic'\]"):
        plotting.marker_dotplot(one, one, one, KEY)


def test_quality_against_steps_draws_each_metric_and_reference():
    values = pd.DataFrame({"w2": [3.0, 2.0], "mmd2": [0.2, 0.1]}, index=[5, 20])
    axes = plotting.quality_against_steps(values, {"real cells": pd.Series({"w2": 1.5, "mmd2": 0.0})})
    assert [ax.get_ylabel() for ax in axes] == ["w2", "mmd2"] and named(axes)
    assert list(axes[0].lines[0].get_ydata()) == [3, 2] and list(axes[0].lines[1].get_ydata()) == [1.5, 1.5]
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["5", "20"]


def test_quality_against_steps_refuses_an_empty_table():
    with pytest.raises(ValueError, match=r"values .*\(0, 1\)"):
        plotting.quality_against_steps(pd.DataFrame({"w2": []}))


def test_library_size_histograms_are_shares_of_all_cells(cells):
    axes = plotting.library_size_histogram(cells[:80], cells[80:])
    for ax in axes:
        heights = [patch.get_height() for patch in ax.patches if isinstance(patch, plt.Rectangle)]
        assert sum(heights) == pytest.approx(200)  # 100 % of real and of synthetic cells
    assert "counts" in axes[0].get_xlabel() and named(axes)


def test_log_normalized_values_are_named_as_such(cells):
    logged = cells.copy()
    logged.X = space.log_normalize(logged.X, "counts")
    axes = plotting.library_size_histogram(logged, logged, value_space="log_normalized")
    assert "counts" not in axes[0].get_xlabel()


def test_loss_curve_draws_training_and_validation():
    ax = plotting.loss_curve(range(500), 1 / np.arange(1, 501), validation=([100, 200], [0.1, 0.05]))
    assert [line.get_label() for line in ax.lines] == ["training", "training, mean of 10", "validation"] and named(ax)


def test_loss_curve_refuses_lists_of_different_length():
    with pytest.raises(ValueError, match="losses .* 1 .* 2 steps"):
        plotting.loss_curve([0, 1], [0.5])


def test_axes_that_are_given_are_drawn_on(cells, embedding):
    figure, axes = plt.subplots(1, 2)
    assert plotting.gene_statistics(cells, cells, axes=axes)[0] is axes[0]
    assert plotting.umap(embedding, ax=axes[0]) is axes[0]
    with pytest.raises(ValueError, match="axes .* 2 .* 1"):
        plotting.library_size_histogram(cells, cells, axes=axes[:1])


def test_power_curve_draws_power_and_false_discoveries_of_each_table():
    columns = {"power": [0.1, 0.7], "power_std": [0.05, 0.02], "false_discoveries": [0.0, 0.06]}
    table = pd.DataFrame(columns, index=pd.Index([10, 100], name="num_cells"))
    ax = plotting.power_curve({"large": table, "all": table / 2})
    drawn = {tuple(line.get_ydata()) for line in ax.get_lines()}
    assert {(0.1, 0.7), (0.05, 0.35), (0.0, 0.06), (0.0, 0.03), (0.05, 0.05)} <= drawn
    assert [text.get_text() for text in ax.get_xticklabels()] == ["10", "100"] and named(ax)
    assert len(plotting.power_curve(table).get_legend().get_texts()) == 2


def test_power_curve_refuses_to_draw_nothing():
    with pytest.raises(ValueError, match="tables"):
        plotting.power_curve({})
