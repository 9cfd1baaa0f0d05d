"""What pipelines share, each piece alone."""

import threading

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, TCDScheduler

from scrdit_diffusers import SCRDiTPipeline, default_scheduler
from scrdit_diffusers.sampling import (
    Denoiser,
    check_finite,
    denoise,
    draw_uniform,
    guide,
    set_timesteps,
    visit_timesteps,
)

CPU = torch.device("cpu")


@pytest.fixture
def denoiser(count_model):
    labels, sizes = torch.tensor([[0, 1], [2, 0]]), torch.tensor([40.0, 60.0])
    return Denoiser(count_model, default_scheduler(), labels, sizes)


@pytest.mark.parametrize("scale", [0.0, 1.5, 3.0])
def test_guidance_moves_from_the_prediction_without_labels_to_that_with_them(scale):
    uncond, cond = torch.randn(2, 3, 5)
    torch.testing.assert_close(guide(torch.cat([uncond, cond]), scale), uncond + scale * (cond - uncond))


def test_a_scale_of_1_is_off():
    prediction = torch.randn(3, 5)
    assert torch.equal(guide(prediction, 1.0), prediction)


@pytest.mark.parametrize("decode_timestep", [None, 200, 700])
def test_as_many_timesteps_as_asked_for_lie_above_the_one_of_decoding(decode_timestep):
    scheduler = default_scheduler()
    num_steps, num_timesteps = set_timesteps(scheduler, 6, decode_timestep, CPU)
    scheduler.set_timesteps(num_steps)
    assert num_timesteps == 6
    assert decode_timestep is None or scheduler.timesteps[5] >= decode_timestep - 1 > scheduler.timesteps[6]


def test_a_scheduler_may_visit_more_timesteps_than_steps():
    scheduler = HeunDiscreteScheduler.from_config(default_scheduler(beta_schedule="linear").config)
    assert set_timesteps(scheduler, 6, None, CPU) == (6, 11)


def test_uniform_numbers_of_a_list_of_generators_are_those_of_each_alone(generators):
    together = draw_uniform((3, 4), generators(3), CPU)
    alone = [draw_uniform((1, 4), torch.Generator().manual_seed(i), CPU) for i in range(3)]
    assert torch.equal(together, torch.cat(alone)) and ((together >= 0) & (together < 1)).all()


@torch.no_grad()
def test_cells_are_not_moved_where_counts_are_drawn(denoiser):
    """The network is called at every timestep, and the scheduler takes a step after all of them but the last."""
    denoiser.scheduler = DDIMScheduler.from_config(denoiser.scheduler.config)
    denoiser.scheduler.set_timesteps(5)
    timesteps, noise, seen = denoiser.scheduler.timesteps[:3], torch.randn(2, 23), []

    def remember(i, t, x_t):
        seen.append(x_t)
        return x_t

    x_t, output = denoise(denoiser, noise, timesteps, draws_counts=True, on_step_end=remember)
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    assert torch.equal(x_t, seen[2])
    counts = denoiser.draw_counts(output, timesteps[-1], x_t, torch.rand(2, 23))
    assert counts.shape == (2, 23) and torch.equal(counts, counts.round())


@torch.no_grad()
def test_a_step_can_go_towards_a_cell_that_is_drawn(count_model):
    """With the network's own noise given back (eta=0), the step tells the clean cell: one of counts, not their mean."""
    labels, sizes = torch.tensor([[0, 1], [2, 0]]), torch.tensor([40.0, 60.0])
    scheduler, noise = TCDScheduler.from_config(default_scheduler().config), torch.randn(2, 23)
    scheduler.set_timesteps(2)
    options = dict(step_kwargs={"eta": 0.0, "generator": torch.Generator().manual_seed(0)}, draws_cells=True)
    denoiser = Denoiser(count_model, scheduler, labels, sizes, **options)
    output = denoiser.predict(noise, scheduler.timesteps[0])
    assert output.sample is None
    x_t = denoiser.step(output, scheduler.timesteps[0], noise)
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps[1]]
    x_0 = (x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
    values = torch.cat([value.flatten() for _, _, value in count_model.count_head.bins()])
    distance = (x_0.flatten()[:, None] - values).abs().min(dim=1).values
    assert (distance < 1e-2).all() and len(x_0[:, 0].unique()) > 1


def test_tcd_takes_no_more_steps_than_it_was_made_for(caplog):
    scheduler = TCDScheduler.from_config(default_scheduler().config)
    assert set_timesteps(scheduler, 2, 200, CPU) == (2, 2) and scheduler.timesteps.tolist() == [999, 499]
    num_steps, num_timesteps = set_timesteps(scheduler, 60, 200, CPU)
    assert (num_steps, num_timesteps) == (50, 41) and "Only 41 timesteps" in caplog.text


@torch.no_grad()
def test_known_values_can_be_put_back_after_each_step(denoiser):
    denoiser.scheduler.set_timesteps(4)

    def put_back(i, t, x_t):
        return torch.cat([torch.full((2, 3), 0.5), x_t[:, 3:]], dim=1)

    x_t, _ = denoise(denoiser, torch.randn(2, 23), denoiser.scheduler.timesteps, False, on_step_end=put_back)
    assert (x_t[:, :3] == 0.5).all() and (x_t[:, 3:] != 0.5).all()


@torch.no_grad()
def test_what_is_left_is_left_out_when_asked(denoiser):
    denoiser.scheduler.set_timesteps(4)
    noise = torch.randn(2, 23)
    x_t, output = denoise(denoiser, noise, denoiser.scheduler.timesteps, False, on_step_start=lambda t: False)
    assert torch.equal(x_t, noise) and output is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="NaN .*dtype"):
        check_finite(torch.tensor([0.0, value]))


@pytest.mark.parametrize("shared", [False, True], ids=["one pipeline", "shared components"])
def test_a_call_from_another_thread_waits_and_changes_no_cell(pipe, shared):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    other = SCRDiTPipeline(**pipe.components) if shared else pipe

    def make_cells(pipe, steps, scale, **options):
        options |= dict(num_inference_steps=steps, guidance_scale=scale, output_type="latent")
        return pipe(num_cells=3, generator=torch.Generator().manual_seed(steps), **options).samples

    alone = make_cells(pipe, 4, 1.0), make_cells(other, 7, 3.0)
    together = []
    thread = threading.Thread(target=lambda: together.append(make_cells(other, 7, 3.0)))

    def start_thread(pipe, i, t, tensors):
        if i == 0:
            thread.start()
            thread.join(timeout=0.2)
        return tensors

    first = make_cells(pipe, 4, 1.0, callback_on_step_end=start_thread)
    thread.join()
    assert torch.equal(first, alone[0]) and torch.equal(together[0], alone[1])


def test_a_callback_cannot_call_its_pipeline(pipe):
    with pytest.raises(ValueError, match="callback"):
        pipe(num_inference_steps=2, callback_on_step_end=lambda pipe, i, t, tensors: pipe(num_inference_steps=2))
    assert pipe(num_inference_steps=1).adata.n_obs == 1  # and the pipeline is free again


def test_a_scheduler_that_is_replaced_during_a_call_is_an_error(pipe):
    def replace(pipe, i, t, tensors):
        pipe.scheduler = default_scheduler()
        pipe.scheduler.set_timesteps(2)
        return tensors

    with pytest.raises(ValueError, match="scheduler"):
        pipe(num_inference_steps=2, callback_on_step_end=replace)


def test_unipc_visits_given_timesteps():
    """Evenly spaced ones give the same cells as `set_timesteps`."""
    cells = []
    for given in (False, True):
        scheduler = default_scheduler()
        scheduler.set_timesteps(6)
        assert scheduler.timesteps.tolist() == [999, 832, 666, 499, 332, 166]
        if given:
            visit_timesteps(scheduler, [999, 832, 666, 499, 332])
        x_t = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps[:5]:
            x_t = scheduler.step(0.5 * x_t, t, x_t, return_dict=False)[0]
        cells.append(x_t)
    torch.testing.assert_close(*cells)
