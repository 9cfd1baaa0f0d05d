"""The training objective: weights, dropped labels, count likelihood."""

import pytest
import torch
from diffusers import DDPMScheduler

from scrdit_diffusers import SCRDiTTransformer, default_scheduler
from scrdit_diffusers.objective import FoldChangePrior, diffusion_loss, drop_labels, loss_weights, negative_log_prior

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def noise_scheduler(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler.from_config(default_scheduler(prediction_type).config)


class Oracle(torch.nn.Module):
    """Predicts the clean cell `guess`, expressed as any prediction type."""

    def __init__(self, scheduler, guess):
        super().__init__()
        self.scheduler, self.guess = scheduler, guess

    def forward(self, noisy, timesteps, class_labels, return_dict):
        alpha_bar = self.scheduler.alphas_cumprod[timesteps][:, None]
        noise = (noisy - alpha_bar.sqrt() * self.guess) / (1 - alpha_bar).sqrt()
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * self.guess
        predictions = {"epsilon": noise, "v_prediction": velocity, "sample": self.guess}
        return (predictions[self.scheduler.config.prediction_type],)


@pytest.mark.parametrize("loss_weighting", ["x0", "epsilon", "v"])
def test_loss_does_not_depend_on_prediction_type(loss_weighting):
    torch.manual_seed(0)
    values, guess, noise = torch.randn(3, 8, 5)
    timesteps = torch.randint(50, 900, (8,))
    batch = {"values": values, "class_labels": None}
    losses = []
    for prediction_type in PREDICTION_TYPES:
        scheduler = noise_scheduler(prediction_type)
        loss = diffusion_loss(Oracle(scheduler, guess), scheduler, batch, timesteps, noise, loss_weighting)
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[2], rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(losses[1], losses[2], rtol=2e-3, atol=1e-4)


def test_v_weighting_is_the_plain_error_of_v():
    snr = torch.tensor([0.01, 1.0, 20.0])
    torch.testing.assert_close(loss_weights(snr, "v_prediction", "v"), torch.ones(3))


def test_weights_are_bounded():
    assert loss_weights(torch.tensor([1e4]), "sample", "v", max_loss_weight=25).item() == 25


def test_labels_are_dropped_at_their_rate():
    codes = torch.zeros(20_000, 1, dtype=torch.long)
    dropped = drop_labels(codes, torch.tensor([7]), 0.1, torch.Generator().manual_seed(0))
    assert (dropped == 7).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_several_labels_are_dropped_jointly_and_alone():
    codes = torch.zeros(20_000, 2, dtype=torch.long)
    dropped = drop_labels(codes, torch.tensor([7, 7]), 0.2, torch.Generator().manual_seed(0)).numpy() == 7
    both, first_only = dropped.all(1).mean(), (dropped[:, 0] & ~dropped[:, 1]).mean()
    assert both == pytest.approx(0.2 + 0.8 * 0.04, abs=0.01)
    assert first_only == pytest.approx(0.8 * 0.2 * 0.8, abs=0.01)


def test_without_conditions_nothing_is_dropped():
    codes = torch.zeros(5, 0, dtype=torch.long)
    assert drop_labels(codes, torch.zeros(0, dtype=torch.long), 0.5).shape == (5, 0)


@torch.no_grad()
def test_the_loss_of_counts_is_their_nll_given_the_noisy_cell_and_the_library_size(count_model, adata, processor):
    counts = torch.from_numpy(adata.X[:3].toarray())
    labels = torch.from_numpy(processor.encode_labels(adata.obs[:3]))
    values = torch.from_numpy(processor.transform(adata.X[:3])).float()
    timesteps, noise = torch.tensor([100, 500, 900]), torch.randn(3, 23, generator=torch.Generator().manual_seed(0))
    batch = {"values": values, "class_labels": labels, "counts": counts}
    loss = diffusion_loss(count_model, noise_scheduler("sample"), batch, timesteps, noise)
    alpha_bar = noise_scheduler("sample").alphas_cumprod[timesteps][:, None]
    noisy = alpha_bar.sqrt() * values + (1 - alpha_bar).sqrt() * noise
    output = count_model(noisy, timesteps, labels, library_size=counts.sum(dim=1))
    expected = count_model.count_head(labels).nll(counts, output.count_log_mean, noisy, timesteps)
    torch.testing.assert_close(loss, expected)


def test_the_prior_is_added(count_model, adata, processor):
    values = torch.from_numpy(processor.transform(adata.X[:3])).float()
    labels = torch.from_numpy(processor.encode_labels(adata.obs[:3]))
    batch = {"values": values, "class_labels": labels, "counts": torch.from_numpy(adata.X[:3].toarray())}
    arguments = (count_model.train(), noise_scheduler("sample"), batch, torch.full((3,), 500), torch.zeros(3, 23))
    prior = FoldChangePrior(count_model, num_cells=60)
    assert prior() > 0
    added = diffusion_loss(*arguments, prior=prior) - diffusion_loss(*arguments)
    torch.testing.assert_close(added, prior().expand(3))


def test_the_prior_is_normal_for_small_fold_changes_and_flat_for_large_ones():
    """Oracle: the density of width weights of one gene, whose squares add up to f^2."""

    def prior(fold_change, shape=0.0):
        squares = torch.tensor([fold_change**2, 0.0], dtype=torch.float64)
        per_cell_and_gene = negative_log_prior(squares, torch.tensor(shape**2), num_cells=100, width=16, prior_std=0.2)
        return 2 * 100 * per_cell_and_gene

    weights = torch.distributions.Normal(0.0, 0.2 / 16**0.5)
    normal = 16 * (weights.log_prob(torch.tensor(0.0)) - weights.log_prob(torch.tensor(0.01 / 16**0.5)))
    torch.testing.assert_close(prior(0.01).float(), normal, rtol=2e-3, atol=0)
    assert prior(1.8) - prior(0.9) < 0.03 * 16 * (1.8**2 - 0.9**2) / (2 * 0.2**2)
    shape_weights = torch.distributions.Normal(0.0, 4 * 0.2)
    expected = shape_weights.log_prob(torch.tensor(0.0)) - shape_weights.log_prob(torch.tensor(0.5))
    torch.testing.assert_close(prior(0.0, 0.5).float(), expected)


def test_more_cells_let_smaller_fold_changes_free():
    squares = (torch.full((3,), 0.04), torch.tensor(0.0))
    nats = [num_cells * negative_log_prior(*squares, num_cells, width=16) for num_cells in (100, 1000, 10000)]
    assert nats[0] > 2 * nats[1] > 8 * nats[2]


def test_counts_are_refused_by_a_model_without_a_count_head(model):
    batch = {"values": torch.zeros(2, 23), "class_labels": None, "counts": torch.ones(2, 23)}
    with pytest.raises(ValueError, match="counts .*count_bins"):
        diffusion_loss(model, noise_scheduler("sample"), batch, torch.tensor([3, 4]), torch.randn(2, 23))


def test_counts_can_be_learned(count_model, adata, processor):
    """A few steps on all cells must bring the loss below that of the initial means."""
    count_model.initialize_weights()
    codes = torch.from_numpy(processor.encode_labels(adata.obs))
    values, counts = processor.transform(adata.X), adata.X.toarray()
    batch = {"values": torch.from_numpy(values).float(), "class_labels": codes, "counts": torch.from_numpy(counts)}
    optimizer = torch.optim.Adam(count_model.parameters(), lr=1e-2)
    timesteps, noise = torch.full((60,), 700), torch.randn(60, 23, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        loss = diffusion_loss(count_model, noise_scheduler("sample"), batch, timesteps, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def make_model(**kwargs):
    sizes = dict(num_genes=25, patch_size=5, num_attention_heads=2, attention_head_dim=8, num_layers=1)
    return SCRDiTTransformer(**sizes, num_classes=[3, 2], **kwargs)


@pytest.mark.parametrize("patch_embed_type", ["per_patch", "shared"])
def test_squared_fold_changes_are_those_of_unit_inputs(patch_embed_type):
    """Oracle: the variance of what the two last layers make of white noise, without their biases."""
    model = make_model(patch_embed_type=patch_embed_type, num_cell_tokens=1, count_bins=[[25, 4]])
    squares, _ = FoldChangePrior(model, num_cells=100).squared_changes()
    with torch.no_grad():
        tokens = torch.randn(20000, 6, 16, generator=torch.Generator().manual_seed(0))
        patches = (model.proj_out(tokens[:, 1:]) - model.proj_out.bias).flatten(1)
        fold_changes = patches + model.cell_out(tokens[:, 0]) - model.cell_out.bias
    torch.testing.assert_close(squares, fold_changes.square().mean(dim=0), rtol=0.05, atol=0)


def test_squared_fold_changes_of_labels_are_over_the_width():
    model = make_model(patch_embed_type="per_patch", count_bins=[[25, 4]])
    prior = FoldChangePrior(model, num_cells=100)
    before, _ = prior.squared_changes()
    torch.nn.init.normal_(model.count_head.class_log_mean, generator=torch.Generator().manual_seed(0))
    added = prior.squared_changes()[0] - before
    torch.testing.assert_close(added, model.count_head.class_log_mean.square().sum(dim=0) / 16)


def test_labels_may_have_a_prior_of_their_own():
    """Oracle: small log fold changes of a label are normal, whatever the number of cells."""
    model = make_model(patch_embed_type="per_patch", count_bins=[[25, 4]])
    without = FoldChangePrior(model, num_cells=100)
    before = without.squared_changes()
    for num_cells in (100, 10_000):
        prior = FoldChangePrior(model, num_cells, prior_std=0.2, own_label_prior=True)
        values = []
        for change in (0.0, 0.01, 1.0, 4.0):
            torch.nn.init.constant_(model.count_head.class_log_mean[0, :1], change)
            torch.testing.assert_close(prior.squared_changes(), before)
            values.append(prior().double() * num_cells * 25)
        label = torch.distributions.Normal(0.0, 0.2)
        expected = label.log_prob(torch.tensor(0.0)) - label.log_prob(torch.tensor(0.01))
        torch.testing.assert_close((values[1] - values[0]).float(), expected, rtol=0.05, atol=0)
        assert 0 < values[3] - values[2] < 0.05 * (4.0**2 - 1) / (2 * 0.2**2)
