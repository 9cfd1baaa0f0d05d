"""Denoising of measured cells: the formula, the noise, what is written, wrong input."""

import numpy as np
import pytest
import torch

from scrdit_diffusers import SCRDiTDenoisePipeline


@pytest.fixture
def denoise(count_pipe):
    """With a network that adds nothing to what labels and library size say."""
    for part in (count_pipe.transformer.proj_out, count_pipe.transformer.cell_out):
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    denoise = SCRDiTDenoisePipeline.from_pipe(count_pipe)
    denoise.set_progress_bar_config(disable=True)
    return denoise


def test_it_shares_the_weights_of_a_loaded_pipeline(denoise, count_pipe):
    assert denoise.transformer is count_pipe.transformer and denoise.processor is count_pipe.processor


def test_sharing_leaves_the_dtype_as_it_is(count_pipe):
    count_pipe.transformer.to(torch.bfloat16)
    SCRDiTDenoisePipeline.from_pipe(count_pipe)
    assert count_pipe.transformer.dtype == torch.bfloat16


def test_it_loads_from_the_folder_of_a_pipeline(denoise, count_pipe, adata, tmp_path):
    count_pipe.save_pretrained(tmp_path)
    loaded = SCRDiTDenoisePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    cells = [pipe(adata, generator=torch.manual_seed(0)).layers["denoised"] for pipe in (denoise, loaded)]
    assert np.array_equal(*cells)


@pytest.mark.parametrize("use_labels", [True, False])
def test_rates_are_posterior_means_of_a_gamma_distribution(denoise, adata, use_labels):
    """The integral is taken numerically."""
    rates = denoise(adata, use_labels=use_labels).layers["denoised"]
    counts = adata.X.toarray()
    codes = torch.from_numpy(denoise.processor.encode_labels(adata.obs))
    if not use_labels:
        codes = torch.tensor(denoise.processor.num_classes).expand_as(codes)
    posterior = denoise.transformer.count_head(codes, torch.from_numpy(counts.sum(axis=1)))
    mu, theta = posterior.log_mean.exp().detach().numpy(), posterior.log_dispersion.exp().detach().numpy()
    for cell, gene in ((0, 1), (7, 5), (59, 22)):
        k, m, shape = counts[cell, gene], mu[cell, gene], theta[cell, gene]
        grid = np.linspace(1e-6, 20 * (m + k + 1), 200_000)
        log_weight = (shape - 1 + k) * np.log(grid) - grid * shape / m - grid
        weight = np.exp(log_weight - log_weight.max())
        assert rates[cell, gene] == pytest.approx((grid * weight).sum() / weight.sum(), rel=1e-2)


def test_genes_are_found_by_name_and_obs_is_kept(denoise, adata):
    expected = denoise(adata, generator=torch.manual_seed(0))
    shuffled = denoise(adata[:, ::-1].copy(), generator=torch.manual_seed(0))
    assert np.array_equal(shuffled.layers["denoised"], expected.layers["denoised"])
    assert list(shuffled.var_names) == denoise.processor.var_names and shuffled.obs.equals(adata.obs)


def test_draws_of_the_noise_are_averaged(denoise, adata):
    """More draws differ less from each other."""
    torch.manual_seed(1)
    for parameter in denoise.transformer.proj_out.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    spread = [
        np.std(
            [denoise(adata, num_draws=n, generator=torch.manual_seed(s)).layers["denoised"] for s in range(3)], axis=0
        )
        for n in (1, 9)
    ]
    assert spread[1].mean() < 0.6 * spread[0].mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(timestep=1000), "timestep.*1000"),
        (dict(num_draws=0), "num_draws.*0"),
        (dict(batch_size=True), "batch_size.*True"),
    ],
)
def test_wrong_arguments_are_refused(denoise, adata, arguments, message):
    with pytest.raises(ValueError, match=message):
        denoise(adata, **arguments)


def test_cells_without_labels_are_refused_with_the_mend(denoise, adata):
    del adata.obs["batch"]
    with pytest.raises(ValueError, match=r"\['batch'\].*use_labels"):
        denoise(adata)


def test_missing_genes_are_counted(denoise, adata):
    with pytest.raises(ValueError, match="3 of the"):
        denoise(adata[:, 3:].copy())


def test_a_model_without_a_count_head_is_refused(pipe, adata):
    with pytest.raises(ValueError, match="count head"):
        SCRDiTDenoisePipeline.from_pipe(pipe)(adata)
