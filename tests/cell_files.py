"""Helpers of tests that write cells to files and compare what comes back."""

import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd


def assert_same_cells(left: ad.AnnData, right: ad.AnnData) -> None:
    """Values, genes and labels are equal; obs_names and categorical dtypes are not part of a dataset."""
    assert np.array_equal(left.X.toarray(), right.X.toarray())
    pd.testing.assert_frame_equal(left.var, right.var, check_names=False)
    assert list(left.obs) == list(right.obs)
    for key in left.obs:
        assert list(left.obs[key]) == list(right.obs[key])


def write(adata: ad.AnnData, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Writing zarr v2 data will no longer be the default")  # anndata
        adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    return path
