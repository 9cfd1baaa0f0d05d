"""Gene selection: scanpy as oracle."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from made_cells import chunked, make_adata, names

from scrdit_diffusers import SCRDiTProcessor
from scrdit_diffusers.cells.fitting import FitOptions, fit_chunks


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


# -- in memory, through the processor ----------------------------------------------------------------------------------


def gene_adata():
    """300 genes in 200 cells, two groups of cells, two genes that are never expressed."""
    rng = np.random.default_rng(3)
    rate = rng.gamma(0.5, 3.0, 300) * np.where(rng.random((200, 300)) < 0.5, 1, rng.gamma(1, 1, (2, 300))[[0, 1] * 100])
    counts = rng.poisson(rate)
    counts[:, [5, 250]] = 0
    return make_adata(sp.csr_matrix(counts.astype(np.float32)))


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger", "seurat_v3"])
def test_variable_genes_are_scanpys(flavor):
    adata = gene_adata()
    processor = SCRDiTProcessor.from_anndata(adata, n_top_genes=50, flavor=flavor)
    sc.pp.filter_genes(adata, min_cells=1)
    if flavor != "seurat_v3":
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=50, flavor=flavor)
    assert processor.var_names == list(adata.var_names[adata.var.highly_variable])
    assert processor.num_genes == 50


def test_cv_takes_the_largest_coefficients_of_variation():
    adata = gene_adata()
    processor = SCRDiTProcessor.from_anndata(adata, n_top_genes=50, flavor="cv")
    values = adata.X.toarray().astype(np.float64)[:, adata.X.toarray().any(axis=0)]
    names = adata.var_names[adata.X.toarray().any(axis=0)]
    cv = values.std(axis=0) / values.mean(axis=0)
    chosen = np.isin(names, processor.var_names)
    assert chosen.sum() == 50
    assert cv[chosen].min() >= cv[~chosen].max() - 1e-9


def test_all_keeps_the_expressed_genes_in_order():
    adata = gene_adata()
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", n_top_genes=3)
    assert processor.var_names == list(adata.var_names[adata.X.toarray().any(axis=0)])
    assert processor.num_genes < adata.n_vars


def test_given_genes_keep_their_order(adata):
    genes = ["gene7", "gene2", "gene11"]
    processor = SCRDiTProcessor.from_anndata(adata, genes=genes)
    assert processor.var_names == genes
    assert processor.gene_ids == ["ENSG00007", "ENSG00002", "ENSG00011"]
    assert np.array_equal(processor.get_values(adata).toarray(), adata[:, genes].X.toarray())


def test_genes_are_found_by_name_in_other_data(processor, adata):
    shuffled = adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()
    assert np.array_equal(processor.get_values(shuffled).toarray(), processor.get_values(adata).toarray())


def test_fewer_expressed_genes_than_asked_for_warns(adata, caplog):
    with caplog.at_level(logging.WARNING):
        processor = SCRDiTProcessor.from_anndata(adata, n_top_genes=2000)
    assert processor.num_genes == 23
    assert "Only 23 genes are expressed" in caplog.text


def test_unexpressed_genes_of_a_list_warn(caplog):
    with caplog.at_level(logging.WARNING):
        SCRDiTProcessor.from_anndata(gene_adata(), genes=["g5", "g6"])
    assert "1 of the 2 genes are zero in every training cell" in caplog.text


def test_gene_ids_of_a_named_column(adata):
    adata.var = adata.var.rename(columns={"gene_ids": "stable_id"})
    assert SCRDiTProcessor.from_anndata(adata, flavor="all").gene_ids is None
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", gene_ids_key="stable_id")
    assert processor.gene_ids == list(adata.var["stable_id"])
