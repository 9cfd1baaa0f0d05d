"""Baselines keep what they promise: labels, values, dependence of genes, and the same cells for the same seed."""

import logging
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import spearmanr

from scrdit_diffusers.checks import looks_like_counts
from scrdit_diffusers.evaluation import baselines

KEY = "cell_type"


@pytest.fixture
def obs():
    """The labels of 40 new cells, in no order."""
    return pd.DataFrame({KEY: np.random.default_rng(1).choice(["NK", "T", "B"], 40)})


@pytest.mark.parametrize("baseline", [baselines.resample_genes, baselines.gaussian_copula])
def test_baselines_have_the_requested_labels_and_only_values_of_train(baseline, adata, obs):
    synthetic = baseline(adata, obs, KEY, np.random.default_rng(0))
    assert synthetic.shape == (40, adata.n_vars) and list(synthetic.var_names) == list(adata.var_names)
    assert synthetic.X.dtype == np.float32 and synthetic.obs["synthetic"].all()
    assert list(synthetic.obs[KEY]) == list(obs[KEY])
    for label in ["T", "B", "NK"]:
        new, old = (a.X[(a.obs[KEY] == label).to_numpy()].toarray() for a in (synthetic, adata))
        assert all(set(new[:, g]) <= set(old[:, g]) for g in range(adata.n_vars))


def test_resampled_genes_are_independent_and_copula_genes_are_not():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(400, 1)) + 0.3 * rng.normal(size=(400, 2))
    train = ad.AnnData(sp.csr_matrix(np.exp(z), dtype=np.float32))
    obs = pd.DataFrame(index=[str(i) for i in range(2000)])
    independent = baselines.resample_genes(train, obs, None, rng).X.toarray()
    copula = baselines.gaussian_copula(train, obs, None, rng).X.toarray()
    expected = spearmanr(train.X.toarray()).statistic
    assert abs(spearmanr(independent).statistic) < 0.1
    assert spearmanr(copula).statistic == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("baseline", [baselines.resample_genes, baselines.gaussian_copula, baselines.scvi_prior])
def test_baselines_refuse_what_train_lacks(baseline, adata, obs):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"obs\['cell_type'\] .*\['Platelet'\]"):
        baseline(adata, pd.DataFrame({KEY: ["B", "Platelet"]}), KEY, rng)
    with pytest.raises(ValueError, match=r"train\.obs .*'cluster'"):
        baseline(adata, obs, "cluster", rng)
    with pytest.raises(ValueError, match="^obs .*row"):
        baseline(adata, obs[:0], KEY, rng)


# -- scVI --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scvi():
    """scVI, which is optional."""
    return pytest.importorskip("scvi", reason="scvi-tools is not installed", exc_type=ImportError)


@pytest.fixture
def two_kinds():
    """300 cells with one of two profiles of 12 genes; those of "low" have a third of the library size."""
    rng = np.random.default_rng(0)
    labels = rng.choice(["low", "high"], 300, p=[0.3, 0.7])
    profile = np.where((labels == "low")[:, None], np.linspace(10, 1, 12), np.linspace(3, 30, 12))
    return ad.AnnData(
        sp.csr_matrix(rng.poisson(profile), dtype=np.float32),
        obs=pd.DataFrame({KEY: labels}, index=[f"cell{i}" for i in range(300)]),
    )


@pytest.mark.usefixtures("scvi")
def test_scvi_makes_counts_of_the_requested_labels(two_kinds):
    obs = pd.DataFrame({KEY: ["high", "low", "low"] * 100})
    synthetic = baselines.scvi_prior(two_kinds, obs, KEY, np.random.default_rng(0), max_epochs=150)
    assert synthetic.shape == (300, 12) and synthetic.X.dtype == np.float32 and looks_like_counts(synthetic.X)
    assert synthetic.obs["synthetic"].all() and list(synthetic.obs[KEY]) == list(obs[KEY])
    for label in ["low", "high"]:
        new, old = (a.X[(a.obs[KEY] == label).to_numpy()].toarray() for a in (synthetic, two_kinds))
        assert np.corrcoef(new.mean(axis=0), old.mean(axis=0))[0, 1] > 0.85  # -1 for the other label
        assert new.sum(axis=1).mean() == pytest.approx(old.sum(axis=1).mean(), rel=0.1)


@pytest.mark.usefixtures("scvi")
def test_scvi_depends_on_rng_alone_and_leaves_no_trace(adata, obs, caplog, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, state, level = adata.copy(), torch.get_rng_state(), logging.getLogger("scvi").level
    first, second, other = (
        baselines.scvi_prior(adata, obs, KEY, np.random.default_rng(seed), layer="counts", max_epochs=2).X.toarray()
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    assert torch.equal(torch.get_rng_state(), state) and logging.getLogger("scvi").level == level
    assert not caplog.text and capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert list(adata.uns) == list(before.uns)


@pytest.mark.usefixtures("scvi")
def test_scvi_without_labels(adata):
    synthetic = baselines.scvi_prior(adata, adata.obs[:5], None, np.random.default_rng(0), max_epochs=1)
    assert synthetic.shape == (5, adata.n_vars) and list(synthetic.obs) == ["synthetic"]


def test_scvi_refuses_values_that_are_no_counts(adata, obs):
    with pytest.raises(ValueError, match=r"layers\['lognorm'\] .* 4\.98311"):
        baselines.scvi_prior(adata, obs, KEY, np.random.default_rng(0), layer="lognorm")


def test_scvi_says_how_to_install_it(adata, obs, monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi", None)
    with pytest.raises(ImportError, match="scvi_prior .*scvi-tools"):
        baselines.scvi_prior(adata, obs, KEY, np.random.default_rng(0))
