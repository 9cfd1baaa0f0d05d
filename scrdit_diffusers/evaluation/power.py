"""Power: how many cells per group it takes to find effects that are known because they were planted."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import false_discovery_control, mannwhitneyu

from scrdit_diffusers.checks import find_genes, get_matrix

NUM_CELLS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
# Values (cells, genes), true log2 fold changes of the groups against the control (genes, groups), rows by group.
Taken = tuple[sp.csr_matrix, pd.DataFrame, dict[str, np.ndarray]]


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
        Output of [`SCRDiTSimulatePipeline`], from which cells of each group are drawn without replacement; or a
        function that makes it anew from the number of cells per group. Values are tested as they are: normalize counts
        first where totals differ.
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
    none), and `false_discoveries`, the share of the called genes that do not change (0 if none is called), both as
    means over groups and repeats; `power_std` and `false_discoveries_std`, their standard deviations.

    Raises
    ------
    ValueError
        There is no truth, the control or a gene is missing, or a group has fewer cells than a number asks for.
    """
    if num_repeats < 1 or not 0 < fdr < 1:
        raise ValueError(f"num_repeats must be at least 1 and fdr between 0 and 1, got {num_repeats} and {fdr}.")
    take = partial(_take, genes=genes, group_key=group_key, control=control, layer=layer)
    rng, found = np.random.default_rng(seed), []
    if isinstance(cells, ad.AnnData):
        all_values, changes, all_rows = take(cells)
        num_cells = _check_numbers(num_cells, min(map(len, all_rows.values())))

        def draw(number: int) -> Taken:
            rows = {group: rng.choice(of_group, number, replace=False) for group, of_group in all_rows.items()}
            return all_values, changes, rows
    else:
        if not num_cells:
            raise ValueError("num_cells is needed with a function: the numbers of cells to call it with.")
        make = cells

        def draw(number: int) -> Taken:
            return take(make(number))

    for number in num_cells:
        for _ in range(num_repeats):
            found += [(number, *shares) for shares in _measure(draw(number), control, min_log2_fold_change, fdr)]
    table = pd.DataFrame(found, columns=["num_cells", "power", "false_discoveries"]).groupby("num_cells")
    return pd.concat([table.mean(), table.std(ddof=0).add_suffix("_std")], axis=1)


def _take(adata: ad.AnnData, genes: Sequence[str] | None, group_key: str, control: str, layer: str | None) -> Taken:
    """Check simulated cells, and take what is needed of them."""
    if "log2_fold_change" not in adata.varm:
        raise ValueError("cells.varm has no 'log2_fold_change', the truth that SCRDiTSimulatePipeline writes.")
    truth = adata.varm["log2_fold_change"]
    if group_key not in adata.obs:
        raise ValueError(f"group_key: cells.obs has no column {group_key!r}, only {list(adata.obs)}.")
    of_cells = adata.obs[group_key].map(str).to_numpy()
    rows = {group: np.flatnonzero(of_cells == group) for group in dict.fromkeys([control, *truth])}
    if missing := [group for group, of_group in rows.items() if not len(of_group)]:
        raise ValueError(f"cells.obs[{group_key!r}] has no cells of {missing}, only of {sorted(set(of_cells))}.")
    if len(rows) == 1:
        raise ValueError("cells.varm['log2_fold_change'] has no group but the control, so there is nothing to find.")
    columns = np.arange(adata.n_vars) if genes is None else find_genes(genes, adata.var_names)
    of_control = truth[control] if control in truth else 0.0
    changes = truth.drop(columns=control, errors="ignore").sub(of_control, axis=0)
    values = get_matrix(adata, layer, expect_counts=False)
    return values[:, columns], changes.iloc[columns], rows


def _check_numbers(num_cells: Sequence[int] | None, smallest: int) -> Sequence[int]:
    """Choose numbers of cells up to the size of the smallest group, or raise ValueError for given ones beyond it."""
    num_cells = num_cells or [*(number for number in NUM_CELLS if number < smallest), smallest]
    if not 2 <= min(num_cells) <= max(num_cells) <= smallest:
        raise ValueError(f"num_cells must be from 2 to the {smallest} cells of the smallest group, got {num_cells}.")
    return num_cells


def _measure(taken: Taken, control: str, min_log2_fold_change: float, fdr: float) -> Iterator[tuple[float, float]]:
    """Yield the share of effects that are called, and the share of false ones among the called, for each group."""
    values, truth, rows = taken
    for group in map(str, truth):
        change = truth[group].to_numpy()
        called = _call(values[rows[control]].toarray(), values[rows[group]].toarray(), fdr)
        counted = (change != 0) & (np.abs(change) >= min_log2_fold_change)
        power = called[counted].mean() if counted.any() else np.nan
        yield power, called[change == 0].sum() / max(called.sum(), 1)


def _call(control: np.ndarray, treated: np.ndarray, fdr: float) -> np.ndarray:
    """Genes (G,) called at a false discovery rate, from values (cells, G) of both groups; constant ones never are."""
    varies = (control != control[0]).any(axis=0) | (treated != control[0]).any(axis=0)
    p = np.ones(len(varies))
    if varies.any():
        p[varies] = mannwhitneyu(control[:, varies], treated[:, varies], axis=0).pvalue
    return false_discovery_control(p) < fdr
