"""Distillation: what the adapter learns from, the distance between cells, and the loss."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from scrdit_diffusers import SCRDiTPipeline, default_scheduler
from scrdit_diffusers.distillation import (
    GROUP_SIZE,
    choose_timesteps,
    distillation_loss,
    energy_distance,
    follow_trajectories,
    principal_components,
)
from scrdit_diffusers.finetuning import add_lora


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch(count_pipe):
    """Sixteen cells in two groups, with their values in model space."""
    batch = follow_trajectories(count_pipe, 2 * GROUP_SIZE, seeded())
    return batch | {"values": torch.from_numpy(count_pipe.processor.transform(batch["counts"].numpy())).float()}


def test_the_calls_are_at_the_timesteps_of_tcd(count_pipe):
    assert choose_timesteps(count_pipe) == [999, 499]


def test_pipelines_that_cannot_be_distilled_are_refused(pipe, count_pipe):
    with pytest.raises(ValueError, match="posterior"):
        choose_timesteps(pipe)
    late = SCRDiTPipeline(count_pipe.transformer, count_pipe.scheduler, count_pipe.processor, decode_timestep=990)
    with pytest.raises(ValueError, match="decode_timestep=990"):
        choose_timesteps(late)
    odd = default_scheduler(num_train_timesteps=130)
    with pytest.raises(ValueError, match="begin at 129.*divisible by 50"):
        choose_timesteps(SCRDiTPipeline(count_pipe.transformer, odd, count_pipe.processor, decode_timestep=50))


def test_cells_of_a_group_differ_in_their_noise_alone(count_pipe, batch):
    for name in ("class_labels", "library_size"):
        groups = batch[name].unflatten(0, (-1, GROUP_SIZE))
        assert (groups == groups[:, :1]).all()
    assert len(batch["noise"].unique(dim=0)) == 2 * GROUP_SIZE
    assert torch.equal(batch["counts"], batch["counts"].round()) and batch["counts"].any()
    again = follow_trajectories(count_pipe, 2 * GROUP_SIZE, seeded())
    assert all(torch.equal(tensor, batch[name]) for name, tensor in again.items())


def test_counts_are_those_at_the_end_of_the_trajectory_from_the_noise(count_pipe, batch):
    """With noise from which the network's part is gone, the ends of two trajectories differ in the draw alone."""
    options = dict(
        obs=count_pipe.processor.decode_labels(batch["class_labels"].numpy()),
        library_size=batch["library_size"].tolist(),
        latents=batch["noise"],
        generator=seeded(1),
    )
    ends = count_pipe(**options, output_type="latent").samples  # at the noise level of decoding
    correlation = np.corrcoef(ends.flatten(), batch["values"].flatten())[0, 1]
    others = np.corrcoef(ends.roll(1, 0).flatten(), batch["values"].flatten())[0, 1]
    assert correlation > 0.95 > others


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_the_energy_distance_is_that_of_the_definition(shift):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 5, 4))
    y += shift
    expected = []
    for a, b in zip(x, y, strict=True):
        means = [cdist(p, q)[~np.eye(5, dtype=bool)].mean() for p, q in ((a, b), (a, a), (b, b))]
        expected.append(2 * means[0] - means[1] - means[2])
    found = energy_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found.item() == pytest.approx(np.mean(expected), abs=1e-3)


def test_components_have_variance_1_within_groups_whatever_is_between_them():
    rng = np.random.default_rng(0)
    direction = np.eye(12)[3]
    groups = rng.normal(size=(20, 1, 12)) * 50
    cells = groups + rng.normal(size=(20, GROUP_SIZE, 1)) * 5 * direction + rng.normal(size=(20, GROUP_SIZE, 12)) * 0.1
    cells = torch.from_numpy(cells.reshape(-1, 12)).float()
    components = principal_components(cells, 3)
    assert abs(components[3, 0]) > 100 * components[:, 0].abs()[:3].max()
    within = (cells - cells.unflatten(0, (-1, GROUP_SIZE)).mean(1).repeat_interleave(GROUP_SIZE, 0)) @ components
    torch.testing.assert_close(within.std(0), torch.ones(3), rtol=1e-3, atol=1e-3)


def test_the_loss_trains_the_adapter_alone_and_on_noise_that_says_something(count_pipe, batch):
    model = count_pipe.transformer
    add_lora(model, 4, {})
    components = principal_components(batch["values"])
    options = dict(timesteps=choose_timesteps(count_pipe), components=components)
    parameters = [parameter for name, parameter in model.named_parameters() if "lora" in name]
    assert parameters == [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, 0.02)
    losses = []
    for _ in range(30):
        losses.append(distillation_loss(model, batch, **options, generator=seeded()))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    shuffled = batch | {"noise": batch["noise"].roll(1, 0)}  # within groups, but for two cells
    with torch.no_grad():
        after, of_others = (distillation_loss(model, b, **options, generator=seeded()) for b in (batch, shuffled))
    assert after < losses[0] and after < of_others
