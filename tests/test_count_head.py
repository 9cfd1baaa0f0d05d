"""The count head against brute-force posteriors made of SciPy's distributions."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from diffusers import DDPMScheduler
from scipy.stats import nbinom, norm
from torch.utils.flop_counter import FlopCounterMode

from scrdit_diffusers import SCRDiTCountHead, SCRDiTTransformer, count_bins, count_head
from scrdit_diffusers.cells.moments import CellMoments
from scrdit_diffusers.initialization import MAX_OVERSHOOT, initialize_count_head

SCHEDULE = "squaredcos_cap_v2"
LAST = 999
LARGEST = [8, 1, 3, 8, 0, 5, 2]  # not sorted, so that the order of genes matters; all counts have exact bins


NO_LABELS = torch.zeros(1, 0, dtype=torch.long)


def random_counts(largest=LARGEST, num_cells=50, seed=0):
    """Counts of genes with these largest values."""
    rng = np.random.default_rng(seed)
    counts = np.floor(rng.random((num_cells, len(largest))) ** 2 * (np.array(largest) + 1))
    counts[0] = largest
    return counts


def standardization(counts):
    logs = np.log1p(counts)
    return logs.mean(axis=0), np.maximum(logs.std(axis=0), 0.3)


def make_head(counts, labels=None, schedule=SCHEDULE):
    labels = np.empty((len(counts), 0), dtype=np.int64) if labels is None else labels
    num_classes = [int(codes.max()) + 1 for codes in labels.T]
    head = SCRDiTCountHead(count_bins(sp.csr_matrix(counts)), num_classes, LAST + 1, schedule)
    initialize_count_head(head, CellMoments.from_counts(sp.csr_matrix(counts), labels), *standardization(counts))
    return head.requires_grad_(False)


def bins_of_genes(head):
    """Lower and upper ends of the bins of each gene, without the empty ones, in the order of the model."""
    ends = [pair for lower, upper, _ in head.bins() for pair in zip(lower, upper, strict=True)]
    ends = [(lower[upper > lower].numpy(), upper[upper > lower].numpy()) for lower, upper in ends]
    return [ends[place] for place in head.gene_order.argsort().tolist()]


def denoise(head, log_mean, noisy, timestep, labels):
    return head(labels).mean(log_mean, noisy, timestep)


def nll(head, counts, log_mean, noisy, timestep, labels):
    return head(labels).nll(counts, log_mean, noisy, timestep)


def sample(head, log_mean, noisy, timestep, labels, uniform):
    return head(labels).sample(log_mean, noisy, timestep, uniform)


class Case:
    """Noisy cells of a head whose bins are all exact, and their posterior by brute force."""

    def __init__(self, timestep, num_cells=6):
        counts = random_counts()
        rng = np.random.default_rng(1)
        self.head = make_head(counts, rng.integers(0, 2, (len(counts), 1)))
        self.head.log_dispersion.copy_(torch.from_numpy(rng.normal(1, 1, len(LARGEST))))
        of_label = torch.from_numpy(rng.normal(0, 1, (2, len(LARGEST))))
        self.head.class_log_dispersion.copy_(of_label)
        self.head.log_base.copy_(torch.from_numpy(rng.normal(0, 1, self.head.log_base.shape)))
        self.class_labels = torch.arange(num_cells)[:, None] % 3  # 2 means no label
        self.counts = counts[:num_cells]
        self.timestep = torch.full((num_cells,), timestep)
        self.alpha_bar = DDPMScheduler(beta_schedule=SCHEDULE).alphas_cumprod[timestep].double().item()
        mean, std = standardization(counts)
        self.support = [np.arange(np.floor(MAX_OVERSHOOT * largest) + 2) for largest in LARGEST]
        self.values = [(np.log1p(k) - mean[g]) / std[g] for g, k in enumerate(self.support)]
        clean = (np.log1p(self.counts) - mean) / std
        noise = rng.normal(size=clean.shape)
        noisy = np.sqrt(self.alpha_bar) * clean + np.sqrt(1 - self.alpha_bar) * noise
        log_mean = rng.normal(0, 1, clean.shape)
        self.noisy, self.log_mean = torch.from_numpy(noisy).float(), torch.from_numpy(log_mean).float()
        self.arguments = (self.log_mean, self.noisy, self.timestep, self.class_labels)

    def posterior(self, cell, gene):
        """p(k | x_t) of one gene of one cell, in float64."""
        label = self.class_labels[cell, 0]
        of_label = self.head.class_log_dispersion[label, gene].item() if label < 2 else 0
        mean, theta = np.exp(self.log_mean[cell, gene].item()), np.exp(self.head.log_dispersion[gene].item() + of_label)
        location, scale = np.sqrt(self.alpha_bar) * self.values[gene], np.sqrt(1 - self.alpha_bar)
        log_p = nbinom.logpmf(self.support[gene], theta, theta / (theta + mean))
        log_p += self.head.log_base[gene, : len(log_p)].numpy()
        log_p += norm.logpdf(self.noisy[cell, gene].item(), location, scale)
        p = np.exp(log_p - log_p.max())
        return p / p.sum()

    def table(self, function):
        """`function(posterior, cell, gene)` of all cells and genes."""
        shape = self.counts.shape
        values = [function(self.posterior(cell, gene), cell, gene) for cell, gene in np.ndindex(shape)]
        return np.array(values).reshape(shape)


TIMESTEPS = [2, 100, 500, 800, LAST]


# -- the posterior -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_denoised_cells_are_the_posterior_mean(timestep):
    case = Case(timestep)
    expected = case.table(lambda p, cell, gene: p @ case.values[gene])
    np.testing.assert_allclose(denoise(case.head, *case.arguments), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_nll_is_that_of_the_posterior(timestep):
    case = Case(timestep)
    expected = -case.table(lambda p, cell, gene: np.log(p[int(case.counts[cell, gene])])).mean(axis=1)
    likelihood = nll(case.head, torch.from_numpy(case.counts), *case.arguments)
    np.testing.assert_allclose(likelihood, expected, rtol=1e-3, atol=1e-4)


def test_log_likelihoods_of_single_genes_add_up_to_the_nll():
    case = Case(500)
    log_mean, _, _, labels = case.arguments
    posterior, counts = case.head(labels), torch.from_numpy(case.counts)
    found = posterior.log_likelihood(posterior.probabilities(log_mean), counts)
    assert found.shape == counts.shape
    torch.testing.assert_close(-found.mean(dim=1), posterior.nll(counts, log_mean))


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_samples_have_the_distribution_of_the_posterior(timestep):
    """Equally spaced uniform numbers give the distribution function without sampling error."""
    case, draws = Case(timestep, num_cells=2), 1000
    repeated = (tensor.repeat_interleave(draws, dim=0) for tensor in case.arguments)
    uniform = ((torch.arange(draws) + 0.5) / draws).repeat(2)[:, None].expand(-1, len(LARGEST))
    drawn = sample(case.head, *repeated, uniform).view(2, draws, -1).numpy()
    for cell, gene in np.ndindex(2, len(LARGEST)):
        shares = (drawn[cell, :, gene] == case.support[gene][:, None]).mean(axis=1)
        np.testing.assert_allclose(shares, case.posterior(cell, gene), atol=2 / draws)


def test_drawn_cells_are_drawn_counts_in_model_space():
    case = Case(800)
    uniform = torch.rand(case.counts.shape, generator=torch.Generator().manual_seed(0))
    counts = sample(case.head, *case.arguments, uniform).long()
    expected = [[case.values[gene][counts[cell, gene]] for gene in range(len(LARGEST))] for cell in range(len(counts))]
    log_mean, noisy, timestep, labels = case.arguments
    drawn = case.head(labels).sample_values(log_mean, noisy, timestep, uniform)
    np.testing.assert_allclose(drawn, expected, rtol=1e-4, atol=1e-4)


def test_counts_at_the_scores_of_others_have_the_same_level_in_their_distribution():
    """Levels are those of the count's range in the one, and counts those whose range in the other holds the level."""
    cases = Case(900, num_cells=6), Case(700, num_cells=6)
    tables = [[[case.posterior(c, g) for g in range(len(LARGEST))] for c in range(6)] for case in cases]
    heads = [case.head(case.class_labels) for case in cases]
    source, target = (head.probabilities(*case.arguments[:3]) for head, case in zip(heads, cases, strict=True))
    uniform = np.random.default_rng(5).random(cases[0].counts.shape)
    scores = heads[0].scores(source, torch.from_numpy(cases[0].counts), torch.from_numpy(uniform))
    moved = heads[1].at_scores(target, scores)
    for cell, gene in np.ndindex(uniform.shape):
        before, after = (table[cell][gene] for table in tables)
        count = int(cases[0].counts[cell, gene])
        level = before[:count].sum() + uniform[cell, gene] * before[count]
        assert scores[cell, gene] == pytest.approx(norm.ppf(level), abs=1e-4)
        assert moved[cell, gene] == np.searchsorted(after.cumsum(), level, side="right")


def test_scores_keep_counts_far_beyond_what_is_expected():
    """Such counts have levels that no floating-point number tells from 1."""
    head = make_head(random_counts([60] * 4))(NO_LABELS.expand(3, 0))
    probabilities = head.probabilities(torch.full((3, 4), 0.0))
    counts = torch.tensor([[0.0, 1, 2, 3], [25, 18, 20, 5], [30, 10, 0, 7]])
    for place in (0.01, 0.5, 0.99):
        moved = head.at_scores(probabilities, head.scores(probabilities, counts, torch.full_like(counts, place)))
        assert torch.equal(moved, counts)
    assert min(p.flip(1).cumsum(1).flip(1)[:, 25].max() for p in probabilities) < 1e-9


def test_quantiles_of_mixtures_lie_between_their_parts():
    case = Case(900)
    head = case.head(case.class_labels)
    parts = [head.probabilities(case.log_mean + shift) for shift in (0.0, 1.0)]
    mixture = [(a + b) / 2 for a, b in zip(*parts, strict=True)]
    level = torch.full_like(case.log_mean, 0.7)
    low, mixed, high = (head.quantile(p, level) for p in (parts[0], mixture, parts[1]))
    assert (low <= mixed).all() and (mixed <= high).all() and (low < high).any()
    means = [head.mean_count(p) for p in (*parts, mixture)]
    torch.testing.assert_close((means[0] + means[1]) / 2, means[2])


def test_without_noise_the_counts_come_back():
    case = Case(0, num_cells=50)
    drawn = sample(case.head, *case.arguments, torch.rand(case.counts.shape))
    assert np.array_equal(drawn, case.counts)


def test_order_of_genes_does_not_matter():
    counts, order = random_counts(), np.array([3, 6, 0, 5, 1, 4, 2])
    heads = make_head(counts), make_head(counts[:, order])
    log_mean, noisy, uniform = torch.randn(3, 4, len(LARGEST), generator=torch.Generator().manual_seed(0))
    timestep = torch.full((4,), 600)
    results = []
    for head, genes in zip(heads, (np.arange(len(LARGEST)), order), strict=True):
        inputs = log_mean[:, genes], noisy[:, genes], timestep, NO_LABELS.expand(4, 0)
        likelihood = nll(head, torch.from_numpy(counts[:4, genes]), *inputs)
        drawn = sample(head, *inputs, uniform[:, genes].sigmoid())
        prior = head(NO_LABELS.expand(4, 0)).log_mean + log_mean[:, genes]
        results.append((denoise(head, *inputs), drawn, prior, likelihood))
    for first, second in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(first[:, order], second)
    torch.testing.assert_close(results[0][3], results[1][3])


# -- large counts ------------------------------------------------------------------------------------------------------


def prior_of_one_gene(mean, theta, rows, largest=5000):
    """A head for one gene, and inputs by which nothing but the negative binomial is known."""
    head = make_head(random_counts([largest]))
    head.log_dispersion.fill_(np.log(theta))
    inputs = torch.full((rows, 1), np.log(mean)), torch.zeros(rows, 1), torch.full((rows,), LAST)
    return head, (*inputs, NO_LABELS.expand(rows, 0))


def test_without_signal_the_posterior_is_the_negative_binomial():
    head, inputs = prior_of_one_gene(mean=0.5, theta=4, rows=9, largest=8)
    expected = -nbinom.logpmf(np.arange(9), 4, 4 / 4.5)
    np.testing.assert_allclose(nll(head, torch.arange(9)[:, None], *inputs), expected, rtol=1e-4)


def test_a_gene_that_is_on_or_off_is_learned():
    """Half of the cells have none and the others about 20, as of XIST: no negative binomial has such counts."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(20, (1000, 1)) * (np.arange(1000)[:, None] % 2) * 1.0
    head = make_head(counts).requires_grad_(True)
    nothing_else = torch.zeros(1000, 1), torch.full((1000,), LAST), NO_LABELS.expand(1000, 0)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    for _ in range(300):
        log_mean = head(nothing_else[2]).log_mean + torch.zeros(1000, 1)
        loss = nll(head, torch.from_numpy(counts), log_mean, *nothing_else).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        drawn = sample(head, log_mean, *nothing_else, torch.from_numpy(rng.random((1000, 1))))
    assert (drawn == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert ((drawn > 0) & (drawn < 8)).float().mean() < 0.02
    assert drawn[drawn > 0].mean().item() == pytest.approx(20, rel=0.05)


def test_large_counts_have_the_moments_of_the_negative_binomial():
    rows = 20_000
    head, inputs = prior_of_one_gene(mean=500, theta=3, rows=rows)
    drawn = sample(head, *inputs, ((torch.arange(rows) + 0.5) / rows)[:, None]).double()
    assert torch.equal(drawn, drawn.round())
    mean, variance = nbinom.stats(3, 3 / 503)
    assert drawn.mean().item() == pytest.approx(mean, rel=0.01)
    assert drawn.var().item() == pytest.approx(variance, rel=0.02)


def test_probabilities_of_bins_are_those_of_the_negative_binomial():
    lower, upper = bins_of_genes(make_head(random_counts([5000])))[0]
    head, inputs = prior_of_one_gene(mean=500, theta=3, rows=int(upper[-1]))
    p = nll(head, torch.arange(upper[-1])[:, None], *inputs).neg().double().exp().numpy()
    assert p.sum() == pytest.approx(1, abs=1e-4)
    distribution = nbinom(3, 3 / 503)
    expected = distribution.cdf(upper - 1) - distribution.cdf(lower - 1)
    np.testing.assert_allclose(np.add.reduceat(p, lower.astype(int)), expected, rtol=0.05, atol=3e-5)


def test_a_count_beyond_the_last_bin_has_a_finite_nll():
    head, inputs = prior_of_one_gene(mean=500, theta=3, rows=2)
    likelihood = nll(head, torch.tensor([[1e5], [1e7]]), *inputs)
    assert torch.isfinite(likelihood).all()
    assert likelihood[0] == likelihood[1]


# -- from the training cells -------------------------------------------------------------------------------------------


def test_label_means_add_up_over_conditions_and_are_zero_without_a_label():
    counts = random_counts()
    labels = np.random.default_rng(1).integers(0, 2, (len(counts), 2))
    head = make_head(counts, labels)
    head.class_log_mean.copy_(torch.randn(4, len(LARGEST), generator=torch.Generator().manual_seed(0)))
    codes = torch.tensor([[2, 2], [1, 2], [2, 0], [1, 0]])  # 2 means no label
    log_mean = head(codes).log_mean + torch.zeros(4, len(LARGEST))
    torch.testing.assert_close(log_mean[0], head.log_mean)
    torch.testing.assert_close(log_mean[1] - log_mean[0], head.class_log_mean[1])
    torch.testing.assert_close(log_mean[2] - log_mean[0], head.class_log_mean[2])
    torch.testing.assert_close(log_mean[3] - log_mean[0], head.class_log_mean[1] + head.class_log_mean[2])


def test_without_a_library_size_it_is_that_of_a_typical_cell():
    counts = random_counts()
    head = make_head(counts)
    typical = torch.tensor([np.exp(np.log(counts.sum(axis=1)).mean())])
    given, left_out = head(NO_LABELS, typical), head(NO_LABELS)
    torch.testing.assert_close(given.library_size, left_out.library_size, rtol=0, atol=1e-5)
    torch.testing.assert_close(given.log_mean, left_out.log_mean, rtol=0, atol=1e-5)


# -- timesteps ---------------------------------------------------------------------------------------------------------


def test_timesteps_between_integers_are_interpolated():
    head = make_head(random_counts())
    low, half, high = head(NO_LABELS).alpha_bar(torch.tensor([400, 400.5, 401]))
    assert half.item() == pytest.approx((low + high).item() / 2)
    alphas_cumprod = DDPMScheduler(beta_schedule=SCHEDULE).alphas_cumprod
    torch.testing.assert_close(torch.stack([low, high]), alphas_cumprod[[400, 401]])


def test_timesteps_beyond_the_ends_are_those_of_the_ends():
    head = make_head(random_counts())
    beyond, ends = (head(NO_LABELS).alpha_bar(torch.tensor(steps)) for steps in ([-1.0, 2000.0], [0, LAST]))
    assert torch.equal(beyond, ends)


@pytest.mark.parametrize("timestep", [700, 700.5])
def test_dtype_of_timesteps_does_not_matter(timestep):
    case = Case(700)
    dtypes = [torch.float32, torch.float64] + [torch.int64] * (timestep == 700)
    log_mean, noisy, _, labels = case.arguments
    timesteps = [torch.full((6,), timestep, dtype=dtype) for dtype in dtypes]
    results = [denoise(case.head, log_mean, noisy, timestep, labels) for timestep in timesteps]
    assert all(torch.equal(result, results[0]) for result in results)


# -- in the model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(adata, processor):
    generator = torch.Generator().manual_seed(1)
    counts = torch.from_numpy(adata.X[:4].toarray())
    return dict(
        hidden_states=torch.randn(4, 23, generator=generator),
        timestep=torch.tensor([3, 500, 40, 999]),
        class_labels=torch.from_numpy(processor.encode_labels(adata.obs[:4])),
        library_size=counts.sum(dim=1),
        counts=counts,
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_finite_and_reach_every_parameter(count_model, inputs, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        count_model(**inputs).count_nll.mean().backward()
    gradients = {name: parameter.grad for name, parameter in count_model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_autocast_leaves_the_posterior_in_float32():
    case = Case(300)
    expected = denoise(case.head, *case.arguments)
    with torch.autocast("cpu", torch.bfloat16):
        denoised = denoise(case.head, *case.arguments)
        likelihood = nll(case.head, torch.from_numpy(case.counts), *case.arguments)
    assert torch.equal(denoised, expected)
    assert torch.equal(likelihood, nll(case.head, torch.from_numpy(case.counts), *case.arguments))


@torch.no_grad()
def test_output_with_and_without_counts(count_model, inputs):
    likelihood = count_model(**inputs)
    del inputs["counts"]
    prediction = count_model(**inputs)
    assert prediction.sample.shape == (4, 23) and prediction.count_nll is None
    assert likelihood.count_nll.shape == (4,) and likelihood.sample is None
    assert torch.equal(prediction.count_log_mean, likelihood.count_log_mean)
    as_tuple = count_model(**inputs, return_dict=False)
    assert len(as_tuple) == 2 and torch.equal(as_tuple[0], prediction.sample)


@torch.no_grad()
def test_library_size_changes_the_prediction(count_model, inputs):
    small, large = (
        count_model(**inputs | {"counts": None, "library_size": torch.full((4,), size)}).count_log_mean
        for size in (20.0, 200.0)
    )
    assert (large - small).mean().item() == pytest.approx(np.log(10), abs=1)
    assert not torch.allclose(large - small, torch.full((4, 23), np.log(10)), atol=1e-3)  # the network sees it too


@pytest.mark.parametrize("name", ["library_size", "counts"])
def test_a_model_without_a_head_takes_neither_library_size_nor_counts(model, inputs, name):
    with pytest.raises(ValueError, match=f"{name} .*count_bins"):
        model(inputs["hidden_states"], 3, **{name: inputs[name]})


def test_save_and_load_keep_every_buffer(count_model, inputs, tmp_path):
    count_model.save_pretrained(tmp_path)
    loaded = SCRDiTTransformer.from_pretrained(tmp_path)
    state = count_model.state_dict()
    assert {name.split(".")[-1] for name in state} >= {"gene_order", "lower", "upper", "value", "log_library_size"}
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(loaded(**inputs).count_nll, count_model(**inputs).count_nll)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_its_counts_in_float32(count_model, dtype):
    """A count of 257 would be 256 in bfloat16."""
    before = {name: tensor.clone() for name, tensor in count_model.count_head.state_dict().items()}
    count_model.to(dtype)
    assert count_model.dtype == dtype
    for name, tensor in count_model.count_head.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_leaves_its_counts_in_float32(count_model, tmp_path, dtype):
    count_model.save_pretrained(tmp_path)
    loaded = SCRDiTTransformer.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    for name, tensor in loaded.count_head.state_dict().items():
        assert torch.equal(tensor, count_model.count_head.state_dict()[name])


def test_logits_are_no_matrix_product():
    """TF32 would round one to three digits, and a logit of hundreds has to be right to 0.01."""
    case = Case(300)
    log_mean, noisy, timestep, labels = case.arguments
    posterior = case.head(labels)
    with FlopCounterMode(display=False) as counter:
        posterior.logits(log_mean, noisy, timestep)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_label_tables_are_looked_up_without_rounding(precision):
    """On a CPU as a product, which a lower precision of float32 products would round."""
    table, rows = 300 * torch.randn(6, 4, 11), torch.randint(11, (9,))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = count_head.look_up(table, rows)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, table[..., rows])


def test_many_genes_are_split_into_groups_that_fit_the_cache(monkeypatch):
    case = Case(300)
    log_mean, noisy, timestep, labels = case.arguments
    expected = case.head(labels)
    monkeypatch.setattr(count_head, "CACHED_BINS", 1)  # one gene at a time
    split = case.head(labels)
    assert len(split.groups) == log_mean.shape[1]
    given = (log_mean, noisy, timestep)
    uniform = torch.rand_like(log_mean)
    torch.testing.assert_close(split.mean(*given), expected.mean(*given))
    assert torch.equal(split.sample(*given, uniform), expected.sample(*given, uniform))
