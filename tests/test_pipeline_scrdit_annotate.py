"""Annotation of measured cells: the likelihood, the posterior of the labels, wrong input."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import nbinom
from sklearn.metrics import roc_auc_score

from scrdit_diffusers import SCRDiTAnnotatePipeline
from scrdit_diffusers.pipeline_scrdit_annotate import standardize


@pytest.fixture
def annotate(count_pipe):
    """With a network that adds nothing to what labels and library size say."""
    for part in (count_pipe.transformer.proj_out, count_pipe.transformer.cell_out):
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    annotate = SCRDiTAnnotatePipeline.from_pipe(count_pipe)
    annotate.set_progress_bar_config(disable=True)
    return annotate


def test_likelihoods_are_those_of_negative_binomials(annotate, adata):
    """SciPy has the distribution."""
    found = annotate.log_likelihood(adata, "cell_type", timesteps=[500])
    counts = adata.X.toarray()
    null = annotate.processor.num_classes
    head = annotate.transformer.count_head
    last = np.empty(counts.shape[1])  # largest count that the bins of a gene hold
    last[head.gene_order] = torch.cat([upper.max(dim=1).values for _, upper, _ in head.bins()]) - 1
    for code in range(3):
        codes = torch.tensor([[code, null[1]]]).expand(len(counts), 2)
        posterior = annotate.transformer.count_head(codes, torch.from_numpy(counts.sum(axis=1)))
        mu = posterior.log_mean.exp().detach().numpy().astype(float)
        theta = posterior.log_dispersion.exp().detach().numpy().astype(float)
        success = theta / (theta + mu)
        expected = nbinom.logpmf(counts, theta, success) - nbinom.logcdf(last, theta, success)  # (cells, G)
        assert np.allclose(found[:, code, 0], expected.sum(axis=1), rtol=5e-4)


def test_the_posterior_is_that_of_bayes(annotate, adata):
    likelihood = annotate.log_likelihood(adata, "cell_type", generator=torch.manual_seed(0)).mean(axis=2)
    table = annotate(adata, "cell_type", prior="composition", temperature=2.0, generator=torch.manual_seed(0))
    share = adata.obs["cell_type"].value_counts(normalize=True)[annotate.processor.conditions["cell_type"]].to_numpy()
    scores = likelihood / 2.0 + np.log(share)
    expected = np.exp(scores - logsumexp(scores, axis=1, keepdims=True))
    assert np.allclose(table.filter(like="p_"), expected, atol=1e-6)
    assert np.allclose(table["probability"], expected.max(axis=1), atol=1e-6)
    assert list(table.index) == list(adata.obs_names)


def test_cells_that_the_model_does_not_generate_are_unlike_all_labels(count_pipe, adata):
    annotate = SCRDiTAnnotatePipeline.from_pipe(count_pipe)
    cells = count_pipe(num_cells=60, generator=torch.manual_seed(0)).adata
    strange = cells.copy()
    strange.X = cells.X[:, ::-1].copy()  # each gene has the counts of another one
    options = dict(labels_key="cell_type", num_generated=500)
    usual, unusual = (
        annotate(some, generator=torch.manual_seed(1), **options)["unlikeness"] for some in (cells, strange)
    )
    assert abs(usual.mean()) < 0.5 and usual.std() == pytest.approx(1.1, abs=0.4)
    assert roc_auc_score([0] * 60 + [1] * 60, [*usual, *unusual]) > 0.8
    one = annotate(strange, timesteps=[600], generator=torch.manual_seed(1), **options)["unlikeness"]  # distance alone
    assert roc_auc_score([0] * 60 + [1] * 60, [*usual, *one]) > 0.6
    assert annotate(adata, "cell_type", num_generated=0)["unlikeness"].isna().all()


def test_scores_are_compared_at_the_same_library_size():
    rng = np.random.default_rng(0)
    sizes = rng.uniform(100, 10_000, 4000)
    scores = 3 * np.log(sizes) + rng.normal(0, 0.1, 4000)
    found = standardize(scores[:2000] + 0.2, sizes[:2000], scores[2000:], sizes[2000:])
    assert found.mean() == pytest.approx(2, abs=0.1) and abs(np.corrcoef(found, sizes[:2000])[0, 1]) < 0.1
    assert np.isfinite(standardize(np.ones(2), np.array([0, 1e9]), scores, sizes)).all()
    assert (standardize(np.ones(2), np.ones(2), np.zeros(9), np.ones(9)) == 0).all()  # nothing varies


def test_cells_of_a_label_are_found(annotate, count_pipe):
    """Cells drawn under labels whose means are ten times apart in a few genes."""
    with torch.no_grad():
        for code in range(3):
            annotate.transformer.count_head.class_log_mean[code, 5 * code : 5 * code + 5] += 2.3
    cells = count_pipe(conditions={"cell_type": ["T", "B", "NK"] * 20}, generator=torch.manual_seed(0)).adata
    truth = cells.obs["cell_type"].astype(str)
    found = annotate(cells, "cell_type", generator=torch.manual_seed(1))
    assert (found["cell_type"].astype(str) == truth).mean() > 0.95


def test_the_temperature_makes_the_labels_most_probable(annotate, adata):
    best = annotate.fit_temperature(adata, "cell_type", generator=torch.manual_seed(0))
    codes = adata.obs["cell_type"].cat.codes.to_numpy()

    def loss(temperature):
        table = annotate(adata, "cell_type", temperature=temperature, generator=torch.manual_seed(0))
        return -np.log(table.filter(like="p_").to_numpy()[np.arange(len(codes)), codes]).mean()

    assert loss(best) <= min(loss(0.8 * best), loss(1.25 * best)) + 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(labels_key="celltype"), "labels_key.*'celltype'"),
        (dict(labels_key=None), r"labels_key must name one .*\['cell_type', 'batch'\], got None"),
        (dict(labels_key=["cell_type", "batch"]), r"labels_key must name one .*got \['cell_type'"),
        (dict(labels_key="batch", prior="uniform"), "prior.*'uniform'"),
        (dict(labels_key="batch", temperature=0), "temperature.*0"),
        (dict(labels_key="batch", timesteps=[]), r"timesteps.*\[\]"),
        (dict(labels_key="batch", batch_size=0), "batch_size .*0"),
        (dict(labels_key="batch", batch_size=2.5), r"batch_size .*2\.5"),
        (dict(labels_key="batch", num_generated=-1), "num_generated .*-1"),
        (dict(labels_key="batch", num_generated=99), "num_generated must be at least 100, or 0 for none, got 99"),
    ],
)
def test_wrong_arguments_are_refused(annotate, adata, arguments, message):
    with pytest.raises(ValueError, match=message):
        annotate(adata, **arguments)


def test_a_wrong_batch_size_is_refused_for_the_temperature(annotate, adata):
    with pytest.raises(ValueError, match="batch_size .*-1"):
        annotate.fit_temperature(adata, "batch", batch_size=-1)
