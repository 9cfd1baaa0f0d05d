"""The training objective: weights, dropped labels, count likelihood."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from scrdit_diffusers import SCRDiTTransformer, default_scheduler
from scrdit_diffusers.objective import diffusion_loss, drop_labels, loss_weights, negative_binomial_nll

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


@pytest.mark.parametrize("loss_weighting", ["sample", "epsilon", "v"])
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


def test_negative_binomial_against_torch_distribution():
    torch.manual_seed(0)
    log_mean, log_dispersion = torch.randn(40, 30), torch.randn(30) + 1
    counts = torch.poisson(torch.full((40, 30), 2.0))
    oracle = torch.distributions.NegativeBinomial(log_dispersion.exp(), logits=log_mean - log_dispersion)
    nll = negative_binomial_nll(counts, log_mean, log_dispersion)
    torch.testing.assert_close(nll, -oracle.log_prob(counts), rtol=1e-4, atol=1e-4)


def test_negative_binomial_gradient_against_torch_distribution():
    torch.manual_seed(0)
    counts = torch.poisson(torch.full((10, 6), 1.0)).double()
    log_mean, log_dispersion = torch.randn(10, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    ours = torch.autograd.grad(
        negative_binomial_nll(counts, log_mean, log_dispersion).sum(), (log_mean, log_dispersion)
    )
    oracle = torch.distributions.NegativeBinomial(log_dispersion.exp(), logits=log_mean - log_dispersion)
    theirs = torch.autograd.grad(-oracle.log_prob(counts).sum(), (log_mean, log_dispersion))
    torch.testing.assert_close(ours, theirs)


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


def test_counts_add_their_likelihood():
    torch.manual_seed(0)
    model = SCRDiTTransformer(num_genes=6, patch_size=4, num_layers=1, count_head=True).eval()
    scheduler = noise_scheduler("sample")
    batch = {
        "values": torch.randn(3, 6),
        "class_labels": None,
        "counts": torch.tensor(np.arange(18.0)).view(3, 6).float(),
    }
    arguments = (model, scheduler, batch, torch.tensor([500, 600, 700]), torch.randn(3, 6))
    with torch.no_grad():
        without, with_counts = (diffusion_loss(*arguments, count_loss_weight=weight) for weight in (0.0, 2.0))
        noisy = scheduler.add_noise(batch["values"], arguments[4], arguments[3])
        _, log_mean, log_dispersion = model(noisy, arguments[3], return_dict=False)
    expected = 2 * negative_binomial_nll(batch["counts"], log_mean, log_dispersion).mean(1)
    torch.testing.assert_close(with_counts - without, expected, rtol=1e-4, atol=1e-4)
