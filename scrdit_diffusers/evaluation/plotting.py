"""Figures of real and synthetic cells and of training.

Each function draws on the Axes given as `ax` or `axes` (`None` makes a new figure), returns them and never calls
`show`. Arguments that the functions share:

- `real`, `synthetic`: cells; genes are those of `synthetic`.
- `layer`: layer that holds the values; `None` takes X.
- `value_space`: "counts", or "log_normalized" for values that are log-normalized already. Unless stated otherwise,
  counts are shown as log1p of counts per 10,000.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.sparse as sp
from matplotlib.axes import Axes
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from scrdit_diffusers.cells.moments import gene_moments
from scrdit_diffusers.checks import check_label

from .metrics import gene_correlations, gene_marginals, pearson
from .space import EvaluationSpace, get_values, log_normalize

# Okabe and Ito, colors that color-blind readers can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
COLORS = {"real": PALETTE[0], "synthetic": PALETTE[1]}
MARKERS = "o^sDv*"  # one for each pass through the palette


def joint_umap(
    real: ad.AnnData,
    synthetic: ad.AnnData,
    train: ad.AnnData | None = None,
    labels_key: str | None = None,
    layer: str | None = None,
    value_space: str = "counts",
    max_cells: int = 5000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute one UMAP of real and synthetic cells, for [`umap`] to color by origin or label.

    Parameters
    ----------
    train
        Training cells, on which space E is fitted; `None` fits it on `real`.
    labels_key
        Column of obs in `real` and `synthetic`; `None` leaves labels out.
    max_cells
        Largest number of cells of each origin; more are subsampled.
    seed
        Seed of subsampling and UMAP.

    Returns
    -------
    One row per cell, in random order so that neither origin covers the other: `UMAP1`, `UMAP2` (float32), `origin`
    ("real" or "synthetic") and `labels_key`.

    Raises
    ------
    ValueError
        Genes, labels or values are missing or wrong, or there are too few cells.
    """
    for name, adata in dict(real=real, synthetic=synthetic).items():
        if labels_key is not None:
            check_label(adata.obs, labels_key, f"{name}.obs")
    for name, adata in dict(real=real, synthetic=synthetic).items():
        get_values(adata, synthetic.var_names, layer, value_space, name)  # check before computing
    space = EvaluationSpace(
        real if train is None else train, layer, value_space, seed=seed, var_names=synthetic.var_names
    )
    rng = np.random.default_rng(seed)
    coordinates, tables = [], []
    for origin, adata in dict(real=real, synthetic=synthetic).items():
        rows = np.sort(rng.permutation(adata.n_obs)[:max_cells])
        coordinates.append(space.transform(adata)[rows])
        tables.append(pd.DataFrame({"origin": origin}, index=adata.obs_names[rows]))
        if labels_key is not None:
            tables[-1][labels_key] = adata.obs[labels_key].astype(str).iloc[rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # of a missing TensorFlow
        from umap import UMAP
    cells = np.concatenate(coordinates)
    embedder = UMAP(n_neighbors=min(15, len(cells) - 1), min_dist=0.3, random_state=seed, n_jobs=1)
    embedding = pd.DataFrame(embedder.fit_transform(cells), columns=["UMAP1", "UMAP2"])
    table = pd.concat([embedding.set_index(pd.concat(tables).index), pd.concat(tables)], axis=1)
    return table.iloc[rng.permutation(len(table))]


def umap(embedding: pd.DataFrame, color: str = "origin", ax: Axes | None = None) -> Axes:
    """Draw the embedding of [`joint_umap`].

    Parameters
    ----------
    embedding
        Output of [`joint_umap`].
    color
        Column that colors the cells: "origin" or the labels.
    """
    if color not in embedding or color in ("UMAP1", "UMAP2"):
        choices = [column for column in embedding if column not in ("UMAP1", "UMAP2")]
        raise ValueError(f"color must be one of {choices}, got {color!r}; joint_umap keeps the column labels_key.")
    ax = _axes(ax)
    names = sorted(embedding[color].unique())
    codes = pd.Index(names).get_indexer(embedding[color])
    size = np.clip(2e4 / len(embedding), 3, 30)
    rounds = codes // len(PALETTE)
    for k in np.unique(rounds):  # one call per marker keeps the random order, unlike one per category
        rows = embedding[rounds == k]
        colors = np.array(PALETTE)[codes[rounds == k] % len(PALETTE)]
        ax.scatter(rows["UMAP1"], rows["UMAP2"], c=colors, s=size, marker=MARKERS[k % len(MARKERS)], alpha=0.7, lw=0)
    for i, name in enumerate(names):
        marker = MARKERS[i // len(PALETTE) % len(MARKERS)]
        number = int((codes == i).sum())
        ax.scatter([], [], c=PALETTE[i % len(PALETTE)], marker=marker, s=30, label=f"{name} ({number:,})")
    ax.legend(title=color, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    ax.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    return ax


def gene_statistics(
    real: ad.AnnData,
    synthetic: ad.AnnData,
    layer: str | None = None,
    value_space: str = "counts",
    axes: Sequence[Axes] | None = None,
) -> Sequence[Axes]:
    """Scatter each gene's mean (log scale) and zero fraction, synthetic against real.

    Returns
    -------
    Two Axes: means, titled with Pearson's r, and zero fractions, titled with the mean absolute error (MAE).
    """
    x, y = (log_normalize(m, value_space) for m in _values(real, synthetic, layer, value_space).values())
    metrics = gene_marginals(x, y)
    axes = _axes(axes, 2)
    means = [np.asarray(matrix.mean(axis=0)).ravel() for matrix in (x, y)]
    both = (means[0] > 0) & (means[1] > 0)
    if not both.any():
        raise ValueError("real and synthetic have no expressed gene in common; there is nothing to draw.")
    _diagonal(axes[0], means[0][both], means[1][both])
    axes[0].set(xscale="log", yscale="log", title=f"Gene means, r = {metrics['gene_mean_r']:.3f}")
    if not both.all():
        axes[0].set_title(f"{axes[0].get_title()}\n{(~both).sum():,} genes not expressed in both: not drawn")
    zeros = [1 - matrix.getnnz(axis=0) / matrix.shape[0] for matrix in (x, y)]
    _diagonal(axes[1], *zeros)
    axes[1].set(title=f"Zero fractions, MAE = {metrics['gene_zero_fraction_mae']:.3f}")
    for ax, quantity in zip(axes, (f"mean {_unit(value_space)}", "fraction of cells with zero"), strict=True):
        ax.set(xlabel=f"real: {quantity}", ylabel=f"synthetic: {quantity}")
    return axes


def mean_variance(
    real: ad.AnnData,
    synthetic: ad.AnnData,
    layer: str | None = None,
    value_space: str = "counts",
    ax: Axes | None = None,
) -> Axes:
    """Scatter each gene's variance over its mean, for real and for synthetic cells, on log scales.

    Counts are not normalized, and the line of the Poisson distribution is drawn.
    """
    ax = _axes(ax)
    for name, values in _values(real, synthetic, layer, value_space).items():
        values = values.astype(np.float64)
        mean = np.asarray(values.mean(axis=0)).ravel()
        variance = np.asarray(values.power(2).mean(axis=0)).ravel() - mean**2
        shown = (mean > 0) & (variance > 0)
        ax.scatter(mean[shown], variance[shown], s=6, alpha=0.4, lw=0, c=COLORS[name], label=name)
    ax.set(xscale="log", yscale="log")
    if value_space == "counts":
        limits = ax.get_xlim()
        ax.plot(limits, limits, c="0.4", lw=1, ls="--", label="Poisson")
        ax.set_xlim(limits)
    unit = "counts" if value_space == "counts" else _unit(value_space)
    ax.set(xlabel=f"gene mean ({unit})", ylabel=f"gene variance ({unit}, squared)")
    ax.legend(frameon=False, markerscale=2)
    return ax


def mean_zero_fraction(
    real: ad.AnnData,
    synthetic: ad.AnnData,
    layer: str | None = None,
    value_space: str = "counts",
    ax: Axes | None = None,
) -> Axes:
    """Scatter each gene's fraction of cells with zero over its mean (log scale), for real and for synthetic cells.

    Counts are not normalized, and the line of the Poisson distribution, `exp(-mean)`, is drawn.
    """
    ax = _axes(ax)
    for name, values in _values(real, synthetic, layer, value_space).items():
        mean = np.asarray(values.mean(axis=0)).ravel()
        zeros = 1 - values.getnnz(axis=0) / values.shape[0]
        ax.scatter(mean[mean > 0], zeros[mean > 0], s=6, alpha=0.4, lw=0, c=COLORS[name], label=name)
    ax.set(xscale="log")
    if value_space == "counts":
        limits = ax.get_xlim()
        means = np.geomspace(limits[0], limits[1], 100)
        ax.plot(means, np.exp(-means), c="0.4", lw=1, ls="--", label="Poisson")
        ax.set_xlim(limits)
    unit = "counts" if value_space == "counts" else _unit(value_space)
    ax.set(xlabel=f"gene mean ({unit})", ylabel="fraction of cells with zero")
    ax.legend(frameon=False, markerscale=2)
    return ax


def gene_gene_correlation(
    real: ad.AnnData,
    synthetic: ad.AnnData,
    layer: str | None = None,
    value_space: str = "counts",
    n_genes: int = 100,
    axes: Sequence[Axes] | None = None,
) -> Sequence[Axes]:
    """Spearman correlations of the most expressed genes, in real and in synthetic cells side by side.

    Parameters
    ----------
    n_genes
        Number of genes, those with the largest log-normalized mean in `real`; all if there are no more.

    Returns
    -------
    Two Axes, real and synthetic, with the same colors and order of genes (clustered in `real`). The title states
    Pearson's r between the two.
    """
    axes = _axes(axes, 2)
    logs = {name: log_normalize(m, value_space) for name, m in _values(real, synthetic, layer, value_space).items()}
    genes = np.argsort(-gene_moments(logs["real"])[0], kind="stable")[:n_genes]
    if len(genes) < 3:
        raise ValueError(f"{len(genes)} genes have too few correlations to compare; give at least 3.")
    correlations = {name: gene_correlations(matrix[:, genes]) for name, matrix in logs.items()}
    distance = np.clip(1 - correlations["real"], 0, None)
    order = leaves_list(linkage(squareform(distance, checks=False), "average"))
    triangle = np.triu_indices(len(genes), k=1)
    limit = max(0.05, np.quantile(np.abs(correlations["real"][triangle]), 0.99))
    for ax, (name, correlation) in zip(axes, correlations.items(), strict=True):
        image = ax.imshow(correlation[np.ix_(order, order)], cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set(xticks=[], yticks=[], xlabel=f"{len(genes)} most expressed genes", ylabel="the same genes", title=name)
    r = pearson(*(correlation[triangle] for correlation in correlations.values()))
    axes[1].set_title(f"synthetic, r = {r:.3f}")
    axes[1].figure.colorbar(image, ax=list(axes), label="Spearman correlation", shrink=0.7)
    return axes


def marker_dotplot(
    real: ad.AnnData,
    synthetic: ad.AnnData,
    train: ad.AnnData,
    labels_key: str,
    layer: str | None = None,
    value_space: str = "counts",
    n_markers: int = 2,
    axes: Sequence[Axes] | None = None,
) -> Sequence[Axes]:
    """Dot plot of each label's top marker genes, in real and in synthetic cells side by side.

    Parameters
    ----------
    train
        Cells that choose the markers: the genes of each label with the largest t statistic against all other cells
        (`scanpy.tl.rank_genes_groups`).
    labels_key
        Column of obs in all three. Labels with at least 3 cells in `train` are shown.
    n_markers
        Genes per label; a gene is shown once.

    Returns
    -------
    Two Axes, real and synthetic. Size: share of the label's cells that express the gene. Color: mean log-normalized
    value, relative to the gene's largest mean over the labels of `real`.

    Raises
    ------
    ValueError
        Labels are missing, or fewer than two labels have enough training cells.
    """
    import scanpy as sc  # takes seconds to import, and no other figure needs it

    groups = dict(train=train, real=real, synthetic=synthetic)
    for name, adata in groups.items():
        check_label(adata.obs, labels_key, f"{name}.obs")
    logs = {
        name: log_normalize(get_values(adata, synthetic.var_names, layer, value_space, name), value_space)
        for name, adata in groups.items()
    }
    cells = {name: adata.obs[labels_key].astype(str).to_numpy() for name, adata in groups.items()}
    names, numbers = np.unique(cells["train"], return_counts=True)
    labels = list(names[numbers >= 3])
    if len(labels) < 2:
        raise ValueError(f"train.obs[{labels_key!r}] needs two labels of at least 3 cells, it has {labels}.")
    obs = pd.DataFrame({"label": pd.Categorical(cells["train"])}, index=train.obs_names)
    ranked = ad.AnnData(logs["train"], obs=obs, var=synthetic.var[[]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # log fold changes of genes that a label does not express
        sc.tl.rank_genes_groups(ranked, "label", groups=labels, n_genes=n_markers, method="t-test")
    markers = list(dict.fromkeys(name for label in labels for name in ranked.uns["rank_genes_groups"]["names"][label]))
    columns = synthetic.var_names.get_indexer(markers)

    if axes is None:
        size = (2.2 + 0.5 * len(markers), 1.8 + 0.28 * len(labels))
        axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)[1]
    axes = _axes(axes, 2)
    x, y = (grid.ravel() for grid in np.meshgrid(range(len(markers)), range(len(labels))))
    largest = None
    for ax, name in zip(axes, ("real", "synthetic"), strict=True):
        means, shares = np.zeros((2, len(labels), len(markers)))
        for i, label in enumerate(labels):
            chosen = logs[name][cells[name] == label][:, columns]
            if chosen.shape[0]:
                means[i] = np.asarray(chosen.mean(axis=0)).ravel()
                shares[i] = chosen.getnnz(axis=0) / chosen.shape[0]
        largest = np.maximum(means.max(axis=0), 1e-12) if largest is None else largest
        dots = ax.scatter(
            x, y, s=90 * shares.ravel(), c=(means / largest).ravel(), cmap="Reds", vmin=0, vmax=1, ec="0.5", lw=0.4
        )
        ax.set_xticks(range(len(markers)), markers, rotation=90, fontsize="small")
        ax.set_yticks(range(len(labels)), labels, fontsize="small")
        ax.set(title=name, xlim=(-0.7, len(markers) - 0.3), ylim=(len(labels) - 0.4, -0.6))
    axes[0].set(ylabel=labels_key)
    for share in (0.2, 0.6, 1.0):
        axes[1].scatter([], [], s=90 * share, c="0.7", ec="0.5", lw=0.4, label=f"{share:.0%}")
    axes[1].legend(title="expressing", frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    axes[1].figure.colorbar(dots, ax=axes[1], label="mean, share of largest", shrink=0.5, anchor=(0, 0))
    return axes


def quality_against_steps(
    values: pd.DataFrame, references: Mapping[str, pd.Series] | None = None, axes: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """Draw metrics against the number of network calls, one panel each.

    Parameters
    ----------
    values
        One row per number of network calls (the index), one column per metric.
    references
        By name, such as "real cells" or a baseline: values by metric, drawn as horizontal lines.
    axes
        One Axes per metric.
    """
    if not len(values) or not values.shape[1]:
        raise ValueError(f"values has shape {values.shape}; give at least one number of steps and one metric.")
    panels = list(np.ravel(_axes(axes, values.shape[1])))
    for ax, metric in zip(panels, map(str, values), strict=True):
        ax.plot(values.index, values[metric], c=COLORS["synthetic"], lw=1.8, marker="o", ms=4, label="synthetic")
        colors = (COLORS["real"], *PALETTE[2:])
        for color, style, (name, reference) in zip(
            colors, ("--", ":", "-.") * 3, (references or {}).items(), strict=False
        ):
            ax.axhline(reference[metric], c=color, lw=1.4, ls=style, label=name)
        ax.set_xscale("log")
        ax.set_xticks(values.index, [str(steps) for steps in values.index])
        ax.minorticks_off()
        ax.set(xlabel="network calls per cell", ylabel=metric)
    panels[0].legend(frameon=False, fontsize="small")
    return panels


def power_curve(tables: pd.DataFrame | Mapping[str, pd.DataFrame], fdr: float = 0.05, ax: Axes | None = None) -> Axes:
    """Draw the share of effects that a test finds against the cells per group, and the share of false discoveries.

    Parameters
    ----------
    tables
        Output of [`scrdit_diffusers.evaluation.power.power_curve`]; or several by name, such as those of large and of
        all effects. Bars are standard deviations.
    fdr
        False discovery rate at which genes were called; drawn as a line.
    """
    named = dict(tables) if isinstance(tables, Mapping) else {"effects found": tables}
    if not named:
        raise ValueError("tables is empty; give at least one.")
    ax = _axes(ax)
    ax.axhline(fdr, c="0.6", lw=1, ls="--")
    for color, marker, (name, table) in zip(PALETTE, "os^Dv*" * 2, named.items(), strict=False):
        ax.errorbar(
            table.index, table["power"], table["power_std"], c=color, lw=1.8, marker=marker, ms=4, capsize=2, label=name
        )
        last = f"false among called, {name}" if len(named) > 1 else "false among called"
        ax.plot(table.index, table["false_discoveries"], c=color, lw=1.2, ls=":", marker=marker, ms=3, label=last)
    numbers = sorted({number for table in named.values() for number in table.index})
    ax.set_xscale("log")
    ax.set_xticks(numbers, [str(number) for number in numbers])
    ax.minorticks_off()
    ax.set(xlabel="cells per group", ylabel="share of genes", ylim=(0, 1))
    ax.legend(frameon=False, fontsize="small")
    return ax


def library_size_histogram(
    real: ad.AnnData,
    synthetic: ad.AnnData,
    layer: str | None = None,
    value_space: str = "counts",
    axes: Sequence[Axes] | None = None,
) -> Sequence[Axes]:
    """Draw histograms of library size (log scale) and genes detected per cell, on two Axes.

    Counts are not normalized; for log-normalized values, their sum is shown instead of the library size.
    """
    axes = _axes(axes, 2)
    values = _values(real, synthetic, layer, value_space)
    library_size = {name: np.asarray(matrix.sum(axis=1)).ravel() for name, matrix in values.items()}
    detected = {name: matrix.getnnz(axis=1) for name, matrix in values.items()}
    for ax, statistic in zip(axes, (library_size, detected), strict=True):
        positive = np.concatenate(list(statistic.values()))
        positive = positive[positive > 0]
        if not positive.size:
            raise ValueError("All cells of real and synthetic are empty; there is nothing to draw.")
        if ax is axes[0]:
            bins = np.geomspace(positive.min(), positive.max() * 1.001, 41)
            ax.set_xscale("log")
        else:
            bins = np.linspace(positive.min(), positive.max() + 1, 41)
        for name, numbers in statistic.items():
            weights = np.full(len(numbers), 100 / len(numbers))
            ax.hist(numbers, bins, weights=weights, color=COLORS[name], alpha=0.25)
            ax.hist(numbers, bins, weights=weights, color=COLORS[name], histtype="step", lw=1.5, label=name)
        ax.set_ylabel("cells (%)")
    axes[0].set_xlabel("library size (counts)" if value_space == "counts" else "sum of log-normalized values")
    axes[1].set_xlabel("genes detected")
    axes[0].legend(frameon=False)
    return axes


def loss_curve(
    steps: Sequence[float],
    losses: Sequence[float],
    validation: tuple[Sequence[float], Sequence[float]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the training loss with its running mean over 2 % of the points, and the validation loss.

    Parameters
    ----------
    steps, losses
        Optimizer steps and training losses, of equal length.
    validation
        Steps and validation losses, or `None`.
    """
    curves = {"losses": (steps, losses)} | ({} if validation is None else {"validation": tuple(validation)})
    for name, (x, y) in curves.items():
        if len(x) != len(y) or not len(x):
            raise ValueError(f"{name} has {len(y)} losses for {len(x)} steps; give one for each, and at least one.")
    ax = _axes(ax)
    window = max(1, len(losses) // 50)
    smooth = pd.Series(np.asarray(losses, dtype=float)).rolling(window, min_periods=1).mean()
    ax.plot(steps, losses, c=PALETTE[0], lw=0.8, alpha=0.3 if window > 1 else 1, label="training")
    if window > 1:
        ax.plot(steps, smooth, c=PALETTE[0], lw=1.8, label=f"training, mean of {window}")
    if validation is not None:
        ax.plot(*validation, c=PALETTE[1], lw=1.8, marker="o", ms=3, label="validation")
    values = np.concatenate([np.asarray(y, dtype=float) for _, y in curves.values()])
    if (values > 0).all():
        ax.set_yscale("log")
    ax.set(xlabel="optimizer step", ylabel="loss")
    ax.legend(frameon=False)
    return ax


def _axes(axes: Any, n: int = 1) -> Any:
    """Return the given Axes, or those of a new figure with n panels."""
    if axes is None:
        axes = plt.subplots(1, n, figsize=(4.8 * n, 4.2), layout="constrained")[1]
    elif n > 1 and len(axes) != n:
        raise ValueError(f"axes must hold {n} Axes, got {len(axes)}.")
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
    return axes


def _values(real: ad.AnnData, synthetic: ad.AnnData, layer: str | None, value_space: str) -> dict[str, sp.csr_matrix]:
    """Values of the genes of `synthetic`, by origin."""
    groups = dict(real=real, synthetic=synthetic)
    return {name: get_values(adata, synthetic.var_names, layer, value_space, name) for name, adata in groups.items()}


def _diagonal(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Scatter y against x, with the line of equality."""
    ax.scatter(x, y, s=6, alpha=0.4, lw=0, c=PALETTE[0])
    limits = [min(x.min(), y.min()), max(x.max(), y.max())]
    ax.plot(limits, limits, c="0.4", lw=1, ls="--")


def _unit(value_space: str) -> str:
    return "log1p of counts per 10,000" if value_space == "counts" else "log-normalized value"
