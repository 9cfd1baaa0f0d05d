"""Power: how many cells per group it takes to find effects that are known because they were planted."""

from collections.abc import Callable, Sequence

import anndata as ad
import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, mannwhitneyu

from scrdit_diffusers.checks import as_csr, find_genes

NUM_CELLS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


def power_curve(
    cells: ad.AnnData | Callable[[int], ad.AnnData],
    genes: Sequence[str] | None = None,
    num_cells: Sequence[int] | None = None,
    group_key: str = "group",
    control: str = "control",
    layer: str | None = None,
    min_log2_fold_change: float = 0.0,
    fdr: float = 0.05,
    num_repeats: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure the share of planted effects that a Wilcoxon rank-sum test finds, by the number of cells per group.

    Each group with effects is compared with the control, gene by gene. Genes are called at the false discovery rate of
    Benjamini and Hochberg.

    Parameters
    ----------
    cells
        Output of [`SCRDiTSimulatePipeline`], from which cells of each group are drawn without replacement; or a function
        that makes it anew from the number of cells per group. Values are tested as they are: normalize counts first
        where totals differ.
    genes
        Genes to test, such as those expressed well enough; `None` takes all. Effects on other genes do not count.
    num_cells
        Numbers of cells per group; `None` takes 10, 20, 50, 100, ... up to the size of the smallest group.
    group_key
        Column of `obs` that holds the group.
    control
        Group that the others are compared with.
    layer
        Layer that holds the values; `None` takes X.
    min_log2_fold_change
        Smaller effects, up or down, do not count for the power.
    fdr
        False discovery rate at which genes are called.
    num_repeats
        Draws of cells, or calls of the function, for each number.
    seed
        Seed of the draws.

    Returns
    -------
    A row per number of cells (the index, `num_cells`): `power`, the share of effects that are called (NaN if there are
    none), and `false_discoveries`, the share of the called genes that do not change (0 if none is called), each the mean
    over groups and repeats; `power_std` and `false_discoveries_std`, their standard deviations.

    Raises
    ------
    ValueError
        There is no truth, the control or a gene is missing, or a group has fewer cells than a number asks for.
    """
    if callable(cells) and not num_cells:
        raise ValueError("num_cells: with a function, list the numbers of cells to call it with.")
    given = None if callable(cells) else _check(cells, group_key, control, layer)
    if num_repeats < 1 or not 0 < fdr < 1:
        raise ValueError(f"num_repeats must be at least 1 and fdr between 0 and 1, got {num_repeats} and {fdr}.")
    if given is not None:
        smallest = min(len(rows) for rows in given.values())
        numbers = num_cells or [*(number for number in NUM_CELLS if number < smallest), smallest]
        if not 2 <= min(numbers) <= max(numbers) <= smallest:
            raise ValueError(f"num_cells must be from 2 to the {smallest} cells of the smallest group, got {numbers}.")
    else:
        numbers = num_cells or ()
    found = []
    for number in numbers:
        for repeat in range(num_repeats):
            adata = cells(number) if callable(cells) else cells
            rows = _check(adata, group_key, control, layer) if given is None else given
            if given is not None:
                rng = np.random.default_rng([seed, number, repeat])
                rows = {group: rng.choice(of_group, number, replace=False) for group, of_group in given.items()}
            columns = np.arange(adata.n_vars) if genes is None else find_genes(genes, adata.var_names)
            values = as_csr(adata.X if layer is None else adata.layers[layer])[:, columns]
            truth = adata.varm["log2_fold_change"].iloc[columns]
            base = truth.get(control, 0.0)
            for group in truth.columns.drop(control, errors="ignore"):
                change = (truth[group] - base).to_numpy()
                called = _call(values[rows[control]].toarray(), values[rows[group]].toarray(), fdr)
                counted = (change != 0) & (np.abs(change) >= min_log2_fold_change)
                power = called[counted].mean() if counted.any() else np.nan
                found.append((number, power, (called & (change == 0)).sum() / max(called.sum(), 1)))
    table = pd.DataFrame(found, columns=["num_cells", "power", "false_discoveries"]).groupby("num_cells")
    return pd.concat([table.mean(), table.std(ddof=0).add_suffix("_std")], axis=1)


def _check(adata: ad.AnnData, group_key: str, control: str, layer: str | None) -> dict[str, np.ndarray]:
    """Find the rows of the control and of each group with effects; raise ValueError for what is missing."""
    if "log2_fold_change" not in adata.varm:
        raise ValueError("cells.varm has no 'log2_fold_change', the truth that SCRDiTSimulatePipeline writes.")
    if group_key not in adata.obs:
        raise ValueError(f"group_key: cells.obs has no column {group_key!r}, only {list(adata.obs)}.")
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"layer: cells has no {layer!r}, only {list(adata.layers)}.")
    of_cells = adata.obs[group_key].map(str).to_numpy()
    groups = [group for group in adata.varm["log2_fold_change"] if group != control]
    if missing := [group for group in (control, *groups) if group not in of_cells]:
        raise ValueError(f"cells.obs[{group_key!r}] has no cells of {missing}, only of {sorted(set(of_cells))}.")
    if not groups:
        raise ValueError("cells.varm['log2_fold_change'] has no group other than the control, so nothing to find.")
    return {group: np.flatnonzero(of_cells == group) for group in (control, *groups)}


def _call(control: np.ndarray, treated: np.ndarray, fdr: float) -> np.ndarray:
    """Genes (G,) called at a false discovery rate, from values (cells, G) of both groups; constant ones never are."""
    varies = (control != control[0]).any(axis=0) | (treated != control[0]).any(axis=0)
    p = np.ones(len(varies))
    p[varies] = mannwhitneyu(control[:, varies], treated[:, varies], axis=0).pvalue if varies.any() else []
    return false_discovery_control(p) < fdr
