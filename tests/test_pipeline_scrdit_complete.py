"""Completion of panels: measured genes, what missing ones may be, library sizes, wrong input."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from diffusers import DDIMScheduler
from scipy.stats import gamma, poisson

from scrdit_diffusers import SCRDiTCompletePipeline, SCRDiTPipeline
from scrdit_diffusers.pipeline_scrdit_complete import TEMPERATURE, Mixture

PANEL = slice(3, 15)
FAST = dict(num_inference_steps=4, num_draws=2)


@pytest.fixture
def complete(count_pipe):
    """With a network that reads the noisy cell."""
    torch.manual_seed(1)
    for part in (count_pipe.transformer.proj_out, count_pipe.transformer.cell_out):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    complete = SCRDiTCompletePipeline.from_pipe(count_pipe)
    complete.set_progress_bar_config(disable=True)
    return complete


@pytest.fixture
def marginal(complete):
    """With a network that adds nothing to what labels and library size say."""
    for part in (complete.transformer.proj_out, complete.transformer.cell_out):
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    return complete


def prepared(complete, adata):
    """Labels and library sizes."""
    return complete.prepare_class_labels(adata.obs, True), torch.from_numpy(np.asarray(adata.X.sum(axis=1)).ravel())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_it_shares_the_components_of_a_loaded_pipeline(complete, count_pipe):
    assert complete.transformer is count_pipe.transformer and complete.processor is count_pipe.processor
    assert complete.config.decode_timestep == count_pipe.config.decode_timestep


def test_it_loads_from_the_folder_of_a_pipeline(complete, count_pipe, adata, tmp_path):
    count_pipe.save_pretrained(tmp_path)
    loaded = SCRDiTCompletePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    first, second = (pipe(adata[:5, PANEL], generator=seeded(), **FAST) for pipe in (complete, loaded))
    assert np.array_equal(first.X.toarray(), second.X.toarray())


def test_cells_with_all_genes_come_back_as_they_are(complete, adata):
    completed = complete(adata, **FAST)
    for values in (completed.X.toarray(), *(completed.layers[name] for name in ("mean", "lower", "upper"))):
        assert np.array_equal(values, adata.X.toarray())
    assert completed.var["measured"].all()


def test_measured_genes_stay_and_others_are_drawn(complete, adata):
    completed = complete(adata[:, PANEL], generator=seeded(), **FAST)
    measured = completed.var["measured"].to_numpy()
    assert list(completed.var_names) == complete.processor.var_names and completed.obs_names.equals(adata.obs_names)
    assert np.array_equal(completed[:, measured].X.toarray(), adata[:, PANEL].X.toarray())
    new = completed[:, ~measured].X.toarray()
    assert new.std() > 0 and np.array_equal(new, np.rint(new)) and new.min() >= 0
    assert (completed.layers["lower"] <= completed.layers["upper"]).all()


def test_genes_are_found_by_name_and_other_genes_are_left_out(complete, adata):
    panel = adata[:, PANEL].copy()
    expected = complete(panel, generator=seeded(), **FAST)
    shuffled = panel[:, ::-1].copy()
    shuffled.var_names = ["unknown", *shuffled.var_names[1:]]
    measured = complete(shuffled, generator=seeded(), **FAST).var["measured"]
    assert measured.sum() == expected.var["measured"].sum() - 1 and not measured["gene14"]
    again = complete(panel[:, ::-1].copy(), generator=seeded(), **FAST)
    assert np.array_equal(again.X.toarray(), expected.X.toarray())


def test_measured_genes_inform_the_others(complete, adata):
    """With the same noise, another count of a measured gene changes what is expected of a missing one."""
    other = adata[:, PANEL].copy()
    other.X = sp.csr_matrix(other.X.toarray()[:, ::-1].copy())
    sizes = np.asarray(adata.X.sum(axis=1)).ravel()
    means = [
        complete(cells, library_size=sizes, generator=seeded(), **FAST).layers["mean"][:, 15:]
        for cells in (adata[:, PANEL], other)
    ]
    assert not np.allclose(*means)


def test_draws_count_the_more_the_better_they_expect_the_measured_counts(complete, adata):
    counts = torch.from_numpy(adata.X[:4].toarray()).float()
    measured = torch.arange(counts.shape[1]) % 2 == 0
    posterior = complete.transformer.count_head(*prepared(complete, adata[:4]))
    log_means = [posterior.log_mean + shift for shift in (0.0, -1.0, 2.0)]
    mixture = Mixture(counts, measured, seeded())
    for draw, log_mean in enumerate(log_means):
        mixture.add(posterior, log_mean, torch.full_like(counts, draw))
    parts = [posterior.probabilities(log_mean) for log_mean in log_means]
    scores = [posterior.log_likelihood(part, counts)[:, measured].sum(dim=1) / TEMPERATURE for part in parts]
    weights = torch.stack(scores).softmax(dim=0)  # (draws, cells)
    for found, *expected in zip(mixture.probabilities, *parts, strict=True):
        torch.testing.assert_close(found, sum(p * w for p, w in zip(expected, weights, strict=True)))
    chosen = mixture.chosen[1][:, 0].long()
    assert torch.equal(mixture.chosen[0], torch.stack(log_means)[chosen, torch.arange(4)])


def test_one_draw_is_chosen_with_the_weight_that_it_has(complete, adata):
    many = adata[np.zeros(4000, dtype=int)]
    counts = torch.from_numpy(many.X.toarray()).float()
    measured = torch.arange(counts.shape[1]) < 5
    posterior = complete.transformer.count_head(*prepared(complete, many))
    mixture = Mixture(counts, measured, seeded())
    log_means = [posterior.log_mean, posterior.log_mean + 0.7, posterior.log_mean - 0.7]
    for draw, log_mean in enumerate(log_means):
        mixture.add(posterior, log_mean, torch.full_like(counts, draw))
    parts = [posterior.log_likelihood(posterior.probabilities(x), counts)[0, measured].sum() for x in log_means]
    expected = (torch.stack(parts) / TEMPERATURE).softmax(dim=0)
    shares = torch.bincount(mixture.chosen[1][:, 0].long(), minlength=3) / 4000
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("use_labels", [True, False])
def test_mean_and_interval_are_those_of_the_posterior(marginal, adata, use_labels):
    """Without the network, all draws expect the same."""
    completed = marginal(adata[:, PANEL], use_labels=use_labels, interval=0.8, **FAST)
    codes = torch.from_numpy(marginal.processor.encode_labels(adata.obs))
    if not use_labels:
        codes = torch.tensor(marginal.processor.num_classes).expand_as(codes)
    sizes = torch.tensor(completed.obs["library_size"].to_numpy())
    posterior = marginal.transformer.count_head(codes, sizes)
    draws = [
        posterior.quantile(posterior.probabilities(posterior.log_mean), torch.full((60, 23), (i + 0.5) / 400))
        for i in range(400)
    ]
    draws = torch.stack(draws).detach().numpy()
    missing = ~completed.var["measured"].to_numpy()
    np.testing.assert_allclose(completed.layers["mean"][:, missing], draws.mean(axis=0)[:, missing], atol=0.02)
    for name, level in (("lower", 0.1), ("upper", 0.9)):
        expected = np.quantile(draws, level, axis=0, method="inverted_cdf")[:, missing]
        assert np.mean(completed.layers[name][:, missing] == expected) > 0.97  # others differ by rounding


def test_library_sizes_are_posterior_means(marginal, adata):
    """Of a gamma prior with the moments of training cells with these labels; the integral is taken numerically."""
    sizes = marginal(adata[:, PANEL], **FAST).obs["library_size"].to_numpy()
    codes = marginal.processor.encode_labels(adata.obs)
    totals = np.asarray(adata[:, PANEL].X.sum(axis=1)).ravel()
    grid = np.linspace(1, 400, 20_000)
    for cell in (0, 7, 59):
        combinations = np.repeat(codes[[cell]], 50, axis=0)
        training = marginal.processor.sample_library_sizes(combinations, (np.arange(50) + 0.5) / 50)
        means = marginal.transformer.count_head(torch.from_numpy(codes[[cell]])).log_mean.exp().detach().numpy()[0]
        prior = gamma.pdf(grid, training.mean() ** 2 / training.var(), scale=training.var() / training.mean())
        weight = prior * poisson.pmf(totals[cell], grid * means[PANEL].sum() / means.sum())
        assert sizes[cell] == pytest.approx((grid * weight).sum() / weight.sum(), rel=1e-3)


def test_given_library_sizes_scale_the_means(marginal, adata):
    first, second = (
        marginal(adata[:, PANEL], library_size=size, **FAST).layers["mean"][:, 15:] for size in (60.0, [90.0] * 60)
    )
    np.testing.assert_allclose(second.sum(axis=1) / first.sum(axis=1), 1.5, rtol=0.1)


def test_cells_depend_on_the_seed_only(complete, adata):
    complete.scheduler = DDIMScheduler.from_config(complete.scheduler.config)
    a, b, c = (complete(adata[:9, PANEL], generator=seeded(s), **FAST).X.toarray() for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_batches_are_joined(complete, adata):
    completed = complete(adata[:, PANEL], batch_size=25, generator=seeded(), **FAST)
    assert completed.n_obs == 60 and np.array_equal(completed.X[:, PANEL].toarray(), adata.X[:, PANEL].toarray())


@pytest.mark.parametrize("loaded", [False, True], ids=["of a pipeline in memory", "of its folder"])
def test_the_network_is_called_where_the_pipeline_says(count_pipe, adata, tmp_path, loaded):
    pipe = SCRDiTPipeline(**count_pipe.components, decode_timestep=400, default_timesteps=[999, 700, 400])
    pipe.save_pretrained(tmp_path)
    complete = SCRDiTCompletePipeline.from_pretrained(tmp_path) if loaded else SCRDiTCompletePipeline.from_pipe(pipe)
    complete.set_progress_bar_config(disable=True)
    seen = []
    complete.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int(kwargs["timestep"][0])), with_kwargs=True
    )
    complete(adata[:3, PANEL], num_draws=2)
    assert seen == [999, 700, 400] * 2
    complete(adata[:3, PANEL], num_draws=1, num_inference_steps=5)
    assert len(seen) == 6 + 5
    complete.scheduler = DDIMScheduler.from_config(complete.scheduler.config)
    complete(adata[:3, PANEL], num_draws=1)
    assert len(seen) == 6 + 5 + 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_draws=0), "num_draws.*0"),
        (dict(num_inference_steps=3000), "3000.*1000"),
        (dict(num_inference_steps=True), "num_inference_steps.*True"),
        (dict(batch_size=2.5), "batch_size.*2.5"),
        (dict(interval=90), "interval.*90"),
        (dict(library_size=[100.0]), r"library_size.*60.*\(1,\)"),
        (dict(library_size=0.0), "library_size.*0"),
        (dict(layer="lognorm"), "lognorm.*non-integers.*counts"),
        (dict(layer="none"), "none.*counts"),
    ],
)
def test_wrong_arguments_are_refused(complete, adata, arguments, message):
    with pytest.raises(ValueError, match=message):
        complete(adata[:, PANEL], **arguments)


def test_cells_without_labels_are_refused_with_the_mend(complete, adata):
    del adata.obs["batch"]
    with pytest.raises(ValueError, match=r"\['batch'\].*use_labels"):
        complete(adata)


def test_unknown_labels_are_refused(complete, adata):
    adata.obs["batch"] = "b7"
    with pytest.raises(ValueError, match="b7"):
        complete(adata)


def test_cells_with_none_of_the_genes_are_refused(complete, adata):
    adata.var_names = [f"ENSG{i}" for i in range(adata.n_vars)]
    with pytest.raises(ValueError, match="23 genes.*gene0.*ENSG0"):
        complete(adata)


def test_a_model_without_a_count_head_is_refused(pipe, adata):
    with pytest.raises(ValueError, match="count head"):
        SCRDiTCompletePipeline.from_pipe(pipe)(adata)


def test_something_else_than_cells_is_refused(complete):
    with pytest.raises(TypeError, match="adata.*ndarray"):
        complete(np.ones((3, 23)))


def test_genes_in_another_case_are_told(complete, adata, caplog):
    adata.var_names = [name.upper() if i < 5 else name for i, name in enumerate(adata.var_names)]
    complete(adata[:3].copy(), num_draws=1)
    assert "5 of the model's 23 genes count as not measured. 5 of them differ in case only" in caplog.text
    caplog.clear()
    complete(adata[:3, 5:].copy(), num_draws=1)
    assert "not measured" not in caplog.text
