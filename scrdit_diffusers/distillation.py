"""Distillation of the way from noise to cells: an adapter with which one or two network calls make a cell.

The pretrained pipeline follows a trajectory from noise to a cell; the adapter learns its end from its beginning. At the
first timestep T - 1 it maps the noise to the log mean count of each gene, and a cell is drawn from them: what genes
have in common comes from the noise, what each has alone is drawn. With fresh noise, at the timestep that
`TCDScheduler` visits next, a second call draws the counts anew, given the noisy cell as a whole. This is trajectory
consistency distillation (TCD) with full stochasticity (gamma = 1), in which the likelihood of counts takes the place of
a distance between cells.

References
----------
TCD: Zheng et al. 2024, arXiv 2402.19159. Energy distance: Szekely and Rizzo 2013, doi:10.1016/j.jspi.2013.03.018.
"""

from collections.abc import Mapping

import torch
from diffusers import TCDScheduler

from .count_head import CountPosterior
from .pipeline_scrdit import SCRDiTPipeline
from .sampling import Denoiser, add_noise, draw_uniform, set_timesteps
from .schedulers import DISTILLED_STEPS
from .transformer_scrdit import SCRDiTTransformer, SCRDiTTransformerOutput

GROUP_SIZE = 8  # cells with the same labels and library size, which the energy distance compares
NUM_COMPONENTS = 30  # principal components on which it does
ENERGY_WEIGHT = 300.0  # of the energy distance, relative to the log-likelihood of a cell


def choose_timesteps(pipe: SCRDiTPipeline) -> list[int]:
    """Choose the timesteps of the network calls of the distilled pipeline: those of `TCDScheduler`.

    Raises
    ------
    ValueError
        The pipeline does not draw counts from their posterior, or TCDScheduler cannot start from its noise.
    """
    if pipe.transformer.count_head is None or pipe.config.decode_timestep is None:
        raise ValueError("The pipeline does not draw counts from their posterior: train it with --decode posterior.")
    scheduler = TCDScheduler.from_config(pipe.scheduler.config)
    _, num_timesteps = set_timesteps(scheduler, DISTILLED_STEPS, pipe.config.decode_timestep, torch.device("cpu"))
    timesteps = scheduler.timesteps[:num_timesteps].tolist()
    last = scheduler.config.num_train_timesteps - 1
    if timesteps[0] != last or num_timesteps < DISTILLED_STEPS:
        raise ValueError(
            f"TCDScheduler visits the timesteps {timesteps} of this pipeline; it should begin at {last} and visit "
            f"{DISTILLED_STEPS} from decode_timestep={pipe.config.decode_timestep} on: num_train_timesteps must be "
            f"divisible by {scheduler.config.original_inference_steps} and decode_timestep at most half of it."
        )
    return timesteps


@torch.no_grad()
def follow_trajectories(pipe: SCRDiTPipeline, num_cells: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Generate cells with a pipeline as it is, and keep the noise from which each came.

    Parameters
    ----------
    pipe
        The pipeline, with its own scheduler, at its default number of network calls.
    num_cells
        How many cells B, a multiple of `GROUP_SIZE`. The cells of a group follow each other and have the same labels
        and library size, drawn from the training composition.
    generator
        Source of randomness.

    Returns
    -------
    On the CPU, `noise` (B, G), `counts` (B, G), `class_labels` (B, K) and `library_size` (B,).
    """
    codes = pipe.prepare_class_labels(num_cells // GROUP_SIZE, None, None, generator)  # (groups, K)
    sizes = pipe.prepare_library_size(None, codes, generator)  # (groups,)
    assert sizes is not None
    codes, sizes = codes.repeat_interleave(GROUP_SIZE, dim=0), sizes.repeat_interleave(GROUP_SIZE)  # (B, K), (B,)
    noise = torch.randn((num_cells, pipe.processor.num_genes), generator=generator)  # (B, G)
    options = dict(obs=pipe.processor.decode_labels(codes.numpy()), library_size=sizes.tolist(), latents=noise)
    x_t = pipe(**options, output_type="latent", batch_size=num_cells, generator=generator).samples  # (B, G)
    t = pipe.scheduler.timesteps[pipe.num_timesteps - 1]
    dtype = pipe.choose_autocast_dtype()
    labels = (codes.to(x_t.device), sizes.to(x_t.device))
    denoiser = Denoiser(pipe.transformer, pipe.scheduler, *labels, autocast_dtype=dtype)
    uniform = draw_uniform(x_t.shape, generator, x_t.device)  # (B, G)
    counts = denoiser.draw_counts(denoiser.predict(x_t, t), t, x_t, uniform)  # (B, G)
    return {"noise": noise, "counts": counts.cpu(), "class_labels": codes, "library_size": sizes}


def principal_components(values: torch.Tensor, num_components: int = NUM_COMPONENTS) -> torch.Tensor:
    """Find directions (G, C) along which cells (B, G) of a group differ most, each scaled to variance 1.

    Groups are those of [`follow_trajectories`], so that the differences are not those between labels.
    """
    groups = values.unflatten(0, (-1, GROUP_SIZE))  # (S, M, G)
    within = (groups - groups.mean(dim=1, keepdim=True)).flatten(0, 1)  # (B, G)
    num_components = min(num_components, *within.shape)
    components = torch.pca_lowrank(within, q=min(num_components + 10, *within.shape), center=False)[2]
    components = components[:, :num_components]  # (G, C)
    return components / (within @ components).std(dim=0).clamp(min=1e-6)


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    r"""Mean over groups of the energy distance of two sets of M points each, shape (): 0 on average for one source.

        2 E|x_i - y_j| - E|x_i - x_j| - E|y_i - y_j|,    i != j

    Parameters
    ----------
    x, y
        Points, shape (S, M, C). `x[s, i]` and `y[s, i]` may depend on each other and are not compared.
    """
    num_points = x.shape[1]
    others = 1 - torch.eye(num_points, device=x.device)  # (M, M)

    def mean_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        squares = (a[:, :, None] - b[:, None]).square().sum(dim=-1)  # (S, M, M)
        distances = (squares + 1e-4).sqrt() * others  # (S, M, M); the root of 0 has no slope
        return distances.sum() / (len(x) * num_points * (num_points - 1))

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def draw_cells(
    posterior: CountPosterior,
    output: SCRDiTTransformerOutput,
    noisy: torch.Tensor,
    timestep: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draw clean cells (B, G) from their posterior; the gradient is that of their mean."""
    assert output.sample is not None and output.count_log_mean is not None
    with torch.no_grad():
        uniform = draw_uniform(noisy.shape, generator, noisy.device)  # (B, G)
        drawn = posterior.sample_values(output.count_log_mean, noisy, timestep, uniform)  # (B, G)
    mean = output.sample.float()  # (B, G)
    return mean + (drawn - mean).detach()


def distillation_loss(
    model: SCRDiTTransformer,
    batch: Mapping[str, torch.Tensor],
    timesteps: list[int],
    components: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Compute the loss of the two network calls, shape ().

    The first call should make the counts likely in which the trajectory from its noise ended:
    `-log p(counts | log mean(noise)) / G`. The second call is trained as before the distillation, on the cells of the
    trajectories. This alone would make cells too much alike: the first call cannot follow each trajectory to its end,
    and the second draws each gene alone. So the energy distances between the cells of each call and those of the
    trajectories are added.

    Parameters
    ----------
    model
        The transformer with the adapter.
    batch
        Output of [`follow_trajectories`], and `values`: the counts in model space, shape (B, G).
    timesteps
        Output of [`choose_timesteps`].
    components
        Output of [`principal_components`].
    generator
        Source of randomness.
    """
    names = ("noise", "counts", "values", "class_labels", "library_size")
    noise, counts, values, class_labels, library_size = (batch[name] for name in names)
    labels, num_genes = (class_labels, library_size), noise.shape[1]
    assert model.count_head is not None
    posterior = model.count_head(*labels)
    first, second = (torch.full_like(library_size, timestep) for timestep in timesteps)  # 2 x (B,)

    def compare(cells: torch.Tensor) -> torch.Tensor:
        """Energy distance of cells (B, G) from those of the trajectories, shape ()."""
        groups = ((x_0 @ components).unflatten(0, (-1, GROUP_SIZE)) for x_0 in (cells, values))  # 2 x (S, M, C)
        return ENERGY_WEIGHT * energy_distance(*groups) / num_genes

    def add_fresh_noise(cells: torch.Tensor) -> torch.Tensor:
        """Cells (B, G) at the noise level of the second call."""
        fresh = torch.randn(cells.shape, generator=generator, device=generator.device).to(cells.device)  # (B, G)
        return add_noise(posterior, cells, second, fresh)

    # 1. From noise to the end of its trajectory
    output = model(noise, first, *labels, count_posterior=posterior)
    likelihood = posterior.nll(counts, output.count_log_mean, noise, first).mean()  # ()
    drawn = draw_cells(posterior, output, noise, first, generator)  # (B, G)

    # 2. To the counts, from the cells of the trajectories and from those of the first call
    noisy = add_fresh_noise(values)  # (B, G)
    decoding = model(noisy, second, *labels, counts, posterior).count_nll.mean()  # ()
    noisy = add_fresh_noise(drawn.detach())  # (B, G)
    output = model(noisy, second, *labels, count_posterior=posterior)
    redrawn = draw_cells(posterior, output, noisy, second, generator)  # (B, G)
    return likelihood + decoding + compare(drawn) + compare(redrawn)
