"""Gene selection: scanpy as oracle."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from chunked_cells import chunked, make_counts, make_obs, names

from scrdit_diffusers.cells.fitting import FitOptions, fit_chunks


@pytest.fixture(scope="module")
def counts() -> sp.csr_matrix:
    return make_counts()


@pytest.fixture(scope="module")
def obs() -> pd.DataFrame:
    return make_obs()


@pytest.mark.parametrize("rows", [13, 1000])
@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger", "seurat_v3"])
def test_genes_are_scanpys(counts, obs, flavor, rows):
    processor, _ = fit_chunks(
        chunked(counts, obs, rows), pd.DataFrame(index=names()), options=FitOptions(flavor=flavor, n_top_genes=40)
    )
    adata = ad.AnnData(counts.astype(np.float64), var=pd.DataFrame(index=names()))
    sc.pp.filter_genes(adata, min_cells=1)
    if flavor != "seurat_v3":
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=40, flavor=flavor)
    assert processor.var_names == list(adata.var_names[adata.var["highly_variable"]])
