"""Cells that several test files share: made ones with many genes, whole and in chunks, and real blood cells."""

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp

NUM_CELLS, NUM_GENES = 211, 120
BLOOD_KEY = "bulk_labels"


def make_counts() -> sp.csr_matrix:
    """Overdispersed counts with some genes that no cell expresses."""
    rng = np.random.default_rng(3)
    mean = np.minimum(rng.lognormal(-0.5, 1.5, NUM_GENES), 60)
    mean[[5, 50]] = 0
    size = rng.lognormal(0, 0.5, NUM_CELLS)[:, None]
    theta = rng.uniform(0.5, 10, NUM_GENES)
    return sp.csr_matrix(rng.poisson(rng.gamma(theta, mean * size / theta)), dtype=np.float32)


def make_obs() -> pd.DataFrame:
    rng = np.random.default_rng(4)
    cell_type = pd.Categorical(rng.choice(["T", "B", "NK"], NUM_CELLS), categories=["T", "NK", "B"])
    return pd.DataFrame({"cell_type": cell_type, "batch": rng.integers(8, 11, NUM_CELLS)})


def chunked(matrix, obs, rows):
    """Start passes over cells, some rows at a time."""
    return lambda: ((matrix[i : i + rows], obs.iloc[i : i + rows]) for i in range(0, matrix.shape[0], rows))


def names():
    """Names of the genes."""
    return [f"g{i}" for i in range(NUM_GENES)]


def make_adata(matrix, **obs):
    """AnnData of a matrix, genes g0, g1, ... and columns of obs."""
    var = pd.DataFrame(index=[f"g{i}" for i in range(matrix.shape[1])])
    return ad.AnnData(matrix, obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(matrix.shape[0])]), var=var)


def blood_cells() -> ad.AnnData:
    """700 real cells x 120 genes with counts, of the three most frequent labels."""
    raw = sc.datasets.pbmc68k_reduced()
    values = np.expm1(raw.raw.X.toarray().astype(np.float64))
    unit = np.where(values > 0, values, np.inf).min(axis=1, keepdims=True)  # a cell's smallest value is one count
    adata = ad.AnnData(
        sp.csr_matrix(np.rint(values / unit), dtype=np.float32), obs=raw.obs[[BLOOD_KEY]], var=raw.raw.var
    )
    adata = adata[adata.obs[BLOOD_KEY].isin(["Dendritic", "CD14+ Monocyte", "CD19+ B"])]
    genes = np.argsort(-np.asarray(adata.X.mean(axis=0)).ravel())[:120]
    return adata[np.random.default_rng(0).permutation(adata.n_obs), genes].copy()


def blood_split() -> dict[str, ad.AnnData]:
    """Disjoint train (204), control (130) and real (130) cells."""
    cells = blood_cells()
    return dict(train=cells[:204].copy(), control=cells[204:334].copy(), real=cells[334:464].copy())
