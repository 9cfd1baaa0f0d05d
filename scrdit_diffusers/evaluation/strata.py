"""Realism by expression: how well all genes, and those of each level of expression, tell synthetic from real cells."""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from .compare import MIN_CELLS, genes_auroc
from .space import get_values, log_normalize

BOUNDS = (0.01, 0.1, 1.0)  # mean values of a gene in the training cells, at which strata end


def compare_strata(
    real: ad.AnnData,
    synthetic: ad.AnnData,
    train: ad.AnnData,
    control: ad.AnnData | None = None,
    layer: str | None = None,
    value_space: str = "counts",
    max_cells: int = 3000,
    n_jobs: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Score classifiers of synthetic against real cells that see all genes, or those of one stratum of expression.

    `compare` looks at highly variable genes. Here every gene counts, so that
    those that hardly vary or are hardly seen cannot be wrong unnoticed.

    Parameters
    ----------
    real, synthetic, train, control, layer, value_space, max_cells, n_jobs, seed
        As in `compare`.

    Returns
    -------
    A row for all genes, then one for each stratum of the mean value in the training cells: `stratum`, `num_genes`,
    `value` and `ceiling`, AUROC of gradient boosting on log-normalized genes (0.5: indistinguishable), float64. NaN
    where there is no `control`, or where no gene is seen in enough cells.

    Raises
    ------
    ValueError
        There are too few cells, genes are missing, or values are wrong; the message names which.
    """
    groups = {"real": real, "synthetic": synthetic} | ({} if control is None else {"control": control})
    for name, adata in groups.items():
        if adata.n_obs < MIN_CELLS:
            raise ValueError(f"{name} has {adata.n_obs} cells; at least {MIN_CELLS} are needed.")
    n = min(max_cells, *(adata.n_obs for adata in groups.values()))
    rng = np.random.default_rng(seed)
    log_values = {}
    for name, adata in groups.items():
        rows = np.sort(rng.choice(adata.n_obs, n, replace=False))
        source = None if name == "synthetic" else layer
        values = get_values(adata[rows], synthetic.var_names, source, value_space, name)
        log_values[name] = log_normalize(values, value_space)
    means = get_values(train, synthetic.var_names, layer, value_space, "train").mean(axis=0)
    stratum_of = np.digitize(np.asarray(means).ravel(), BOUNDS)
    names = [f"below {BOUNDS[0]:g}", *(f"{a:g} to {b:g}" for a, b in zip(BOUNDS, BOUNDS[1:], strict=False))]
    columns = {"all genes": np.arange(len(stratum_of))}
    columns |= {name: np.flatnonzero(stratum_of == i) for i, name in enumerate([*names, f"at least {BOUNDS[-1]:g}"])}

    def score(query: sp.csr_matrix, genes: np.ndarray) -> float:
        return genes_auroc(query[:, genes], log_values["real"][:, genes], n_jobs=n_jobs, seed=seed)

    table = []
    for name, genes in columns.items():
        ceiling = np.nan if control is None else score(log_values["control"], genes)
        table.append((name, len(genes), score(log_values["synthetic"], genes), ceiling))
    return pd.DataFrame(table, columns=["stratum", "num_genes", "value", "ceiling"])
