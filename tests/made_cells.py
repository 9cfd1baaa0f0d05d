"""Cells with many genes, whole and in chunks, for the tests of what is learned from them."""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

NUM_CELLS, NUM_GENES = 211, 120


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
