"""Building blocks of pipelines: set the timesteps, guide, denoise, draw counts, build the AnnData.

Each takes only the parts it needs (transformer, scheduler, processor), so that a new pipeline can combine them in its
own order. Tensors hold a batch of B cells.
"""

import bisect
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from diffusers import SchedulerMixin, UniPCMultistepScheduler

from .count_head import CountPosterior
from .processing_scrdit import SCRDiTProcessor
from .schedulers import distilled_for
from .transformer_scrdit import SCRDiTTransformer, SCRDiTTransformerOutput

logger = logging.getLogger(__name__)

NUM_STEPS = 25  # where neither a call nor the pipeline says how many

Generators = torch.Generator | list[torch.Generator]  # one for all cells, or one for each


class Turn:
    """A lock that a thread cannot wait for while it holds it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.owner: int | None = None

    def __enter__(self):
        if self.owner == threading.get_ident():
            raise ValueError("The pipeline is running: a callback cannot call it, nor one that shares its components.")
        self.lock.acquire()
        self.owner = threading.get_ident()

    def __exit__(self, *error: object):
        self.owner = None
        self.lock.release()


_TURNS: WeakKeyDictionary[Any, Turn] = WeakKeyDictionary()  # of components, which pipelines may share


def one_at_a_time(call: Callable) -> Callable:
    """Let the calls of pipelines with one transformer or scheduler wait for each other when they come from threads.

    A transformer keeps LoRA scales and caches during a call, a scheduler its steps.

    Raises
    ------
    ValueError
        A callback calls the pipeline that is running, or its scheduler is replaced meanwhile.
    """

    @functools.wraps(call)
    def wait(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        scheduler = pipe.scheduler
        with _TURNS.setdefault(pipe.transformer, Turn()), _TURNS.setdefault(scheduler, Turn()):
            cells = call(pipe, *args, **kwargs)
            if pipe.scheduler is not scheduler:
                raise ValueError("pipe.scheduler was replaced during a call: give each thread a pipeline of its own.")
            return cells

    return wait


def draw_uniform(shape: tuple[int, ...], generator: Generators, device: torch.device) -> torch.Tensor:
    """Draw uniform random numbers in [0, 1); with a list of generators, one row from each."""
    if isinstance(generator, list):
        return torch.cat([draw_uniform((1, *shape[1:]), g, device) for g in generator])
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


def draw_seeds(generator: Generators) -> int | list[int]:
    """Draw a seed from a generator, or one from each of a list."""
    if isinstance(generator, list):
        return [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in generator]
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def set_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, decode_timestep: int | None, device: torch.device
) -> tuple[int, int]:
    """Set the timesteps of a scheduler such that `num_inference_steps` of them are at or above `decode_timestep`.

    Returns
    -------
    Number of steps of the whole schedule, and how many of `scheduler.timesteps` to visit. Without `decode_timestep` all
    are visited, which for some schedulers are more than the number of steps.
    """
    num_train_timesteps = scheduler.config.num_train_timesteps

    def visited(num_steps: int) -> int:
        scheduler.set_timesteps(num_steps, device=device)
        timesteps = scheduler.timesteps
        return len(timesteps) if decode_timestep is None else int((timesteps >= decode_timestep - 1).sum())

    if decode_timestep is None:
        return num_inference_steps, visited(num_inference_steps)
    largest = num_train_timesteps
    if "original_inference_steps" in inspect.signature(scheduler.set_timesteps).parameters:  # TCD has no more
        largest = scheduler.config.original_inference_steps
    num_steps = 1 + bisect.bisect_left(range(1, largest), num_inference_steps, key=visited)
    num_timesteps = min(visited(num_steps), num_inference_steps)
    if num_timesteps < num_inference_steps:
        logger.warning(
            "Only %d timesteps lie above decode_timestep=%d: as many network calls, instead of %d.",
            num_timesteps,
            decode_timestep,
            num_inference_steps,
        )
    return num_steps, num_timesteps


def check_num_inference_steps(num_inference_steps: int | None, scheduler: SchedulerMixin) -> None:
    """Raise ValueError for more network calls than there are timesteps."""
    num_train_timesteps = scheduler.config.num_train_timesteps
    if num_inference_steps is not None and num_inference_steps > num_train_timesteps:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} exceeds the {num_train_timesteps} timesteps of the training."
        )


def choose_timesteps(
    num_inference_steps: int | None,
    default_timesteps: list[int] | None,
    scheduler: SchedulerMixin,
    decode_timestep: int | None,
    min_timestep: int,
) -> tuple[int, list[int] | None]:
    """Choose how often to call the network, and where: as a call says, or else as its pipeline does.

    Returns
    -------
    Number of calls, and the timesteps to visit: the `default_timesteps` of the pipeline where they fit, `None` for
    evenly spaced ones.

    Raises
    ------
    ValueError
        The `default_timesteps` do not fall, or are not all among the timesteps of the training.
    """
    if num_inference_steps is not None:
        return num_inference_steps, None
    timesteps = default_timesteps
    if not timesteps or type(scheduler) is not UniPCMultistepScheduler or timesteps[-1] != decode_timestep:
        return NUM_STEPS, None
    limits = [scheduler.config.num_train_timesteps, *timesteps, min_timestep - 1]
    if not all(above > below for above, below in pairwise(limits)):
        raise ValueError(
            f"default_timesteps of the pipeline must fall from at most {limits[0] - 1} to at least {min_timestep}, "
            f"got {timesteps}; give num_inference_steps."
        )
    return len(timesteps), list(timesteps)


def choose_batch_size(num_genes: int) -> int:
    """Cells generated at a time: 512, or of more than 8,192 genes fewer, so that no array exceeds 16 MB.

    From 32 MB on, the C library hands arrays back to the system, and on CPUs a third of the time goes to getting them
    again.
    """
    return min(512, max(1, 2**22 // num_genes))


def visit_timesteps(scheduler: UniPCMultistepScheduler, timesteps: list[int]) -> None:
    """Let UniPC, after `set_timesteps`, visit given timesteps instead of evenly spaced ones.

    One more follows, because UniPC lowers its order before the last.
    """
    visited = torch.tensor([*timesteps, timesteps[-1] // 2])
    alphas_cumprod = scheduler.alphas_cumprod.cpu()[visited]
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    scheduler.timesteps = visited.to(scheduler.timesteps.device)


def guide(prediction: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance: predictions without and with labels (2B, G) to (B, G). With a scale of 1, a no-op.

    Scheduler steps guide the prediction, in which the score is linear. Drawing counts guides the log means, so that
    means stay positive. Guiding log means at every step was tried and is worse: library sizes inflate twice as much,
    and cells are easier to tell from real ones.
    """
    if guidance_scale == 1.0:
        return prediction.float()
    uncond, cond = prediction.float().chunk(2)
    return uncond + guidance_scale * (cond - uncond)


@dataclass
class Denoiser:
    """Network and scheduler, applied to a batch of B cells with given labels.

    Parameters
    ----------
    transformer, scheduler
        Parts of the pipeline.
    class_labels
        Codes, shape (B, K).
    library_size
        Shape (B,); `None` for a transformer without a count head.
    guidance_scale
        See [`guide`].
    attention_kwargs
        Passed to the transformer.
    step_kwargs
        `eta` and `generator`, passed to `scheduler.step` if it takes them.
    autocast_dtype
        The network's matmuls are computed in it; `None` for that of its weights.
    draws_cells
        Whether a step goes towards a cell drawn from the posterior of the counts, as distilled adapters have it, or
        towards the mean of that posterior.
    """

    transformer: SCRDiTTransformer
    scheduler: SchedulerMixin
    class_labels: torch.Tensor
    library_size: torch.Tensor | None
    guidance_scale: float = 1.0
    attention_kwargs: dict[str, Any] | None = None
    step_kwargs: Mapping[str, Any] = field(default_factory=dict)
    autocast_dtype: torch.dtype | None = None
    draws_cells: bool = False
    count_posterior: CountPosterior | None = field(default=None, init=False)  # of the first call, for all others

    def __post_init__(self):
        accepted = inspect.signature(self.scheduler.step).parameters
        self.step_kwargs = {name: value for name, value in self.step_kwargs.items() if name in accepted}

    def predict(self, x_t: torch.Tensor, t: torch.Tensor) -> SCRDiTTransformerOutput:
        """Call the network on noisy cells (B, G); with guidance on 2B, the ones without labels first."""
        class_labels, library_size = self.class_labels, self.library_size
        if self.guidance_scale != 1.0:
            null_labels = class_labels.new_tensor(self.transformer.config.num_classes)  # (K,)
            class_labels = torch.cat([null_labels.expand_as(class_labels), class_labels])  # (2B, K)
            library_size = None if library_size is None else torch.cat([library_size] * 2)  # (2B,)
            x_t = torch.cat([x_t] * 2)  # (2B, G)
        head = self.transformer.count_head
        if self.count_posterior is None and head is not None and head.log_mean.device == x_t.device:
            self.count_posterior = head(class_labels, library_size)
        autocast = torch.autocast(x_t.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)
        with self.transformer.cache_context("cond_uncond"), autocast:
            output = self.transformer(
                self.scheduler.scale_model_input(x_t, t).to(self.transformer.dtype),
                timestep=t.expand(x_t.shape[0]),
                class_labels=class_labels,
                library_size=library_size,
                count_posterior=self.count_posterior,
                attention_kwargs=self.attention_kwargs,
                return_sample=not self.draws_cells,
            )
        if self.count_posterior is None and head is not None:  # only now, as the first call loads offloaded weights
            self.count_posterior = head(class_labels, library_size)
        return output

    def step(self, output: SCRDiTTransformerOutput, t: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """Move the cells (B, G) to the next timestep."""
        if self.draws_cells:
            posterior, *given = self._count_posterior(output, t, x_t)
            uniform = draw_uniform(x_t.shape, self.step_kwargs["generator"], x_t.device)  # (B, G)
            prediction = posterior.sample_values(*given, uniform)  # (B, G)
        else:
            assert output.sample is not None
            prediction = guide(output.sample, self.guidance_scale)  # (B, G)
        return self.scheduler.step(prediction, t, x_t, **self.step_kwargs, return_dict=False)[0]  # (B, G)

    def draw_counts(
        self, output: SCRDiTTransformerOutput, t: torch.Tensor, x_t: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Draw counts (B, G) from their posterior at timestep `t` with uniform random numbers (B, G)."""
        posterior, *given = self._count_posterior(output, t, x_t)
        return posterior.sample(*given, uniform)  # (B, G)

    def mean_counts(self, output: SCRDiTTransformerOutput, t: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """Mean (B, G) of the counts that [`Denoiser.draw_counts`] draws."""
        posterior, *given = self._count_posterior(output, t, x_t)
        return posterior.mean_count(posterior.probabilities(*given))  # (B, G)

    def _count_posterior(self, output: SCRDiTTransformerOutput, t: torch.Tensor, x_t: torch.Tensor) -> tuple:
        """Posterior of the counts, and what its methods take: log means, noisy cells (B, G), timesteps (B,)."""
        assert output.count_log_mean is not None and self.transformer.count_head is not None
        log_mean = guide(output.count_log_mean, self.guidance_scale)  # (B, G)
        check_finite(log_mean)
        posterior = self.count_posterior
        if posterior is None or self.guidance_scale != 1.0:  # that of 2B cells
            posterior = self.transformer.count_head(self.class_labels, self.library_size)
        noisy = self.scheduler.scale_model_input(x_t, t)  # (B, G)
        return posterior, log_mean, noisy, t.expand(len(noisy))


def read_batch(
    processor: SCRDiTProcessor, counts: sp.csr_matrix, library_sizes: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bring measured cells to a device: counts (B, G), the same in model space, and library sizes (B,)."""
    k = torch.from_numpy(counts.toarray()).to(device, torch.float32)  # (B, G)
    x_0 = torch.from_numpy(processor.transform(counts)).to(device, torch.float32)  # (B, G)
    return k, x_0, torch.from_numpy(library_sizes).to(device, torch.float32)  # (B,)


def add_noise(
    posterior: CountPosterior, x_0: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Bring measured cells (B, G) in model space to the noise level of timesteps (B,), with standard normal noise."""
    alpha_bar = posterior.alpha_bar(timestep)[:, None]  # (B, 1)
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise  # (B, G)


def expected_log_mean(
    transformer: SCRDiTTransformer,
    posterior: CountPosterior,
    x_0: torch.Tensor,
    timestep: int,
    class_labels: torch.Tensor,
    library_size: torch.Tensor,
    noise: Iterable[torch.Tensor],
) -> torch.Tensor:
    """Log mean count of each gene that the other genes of measured cells let expect, shape (B, G).

    Parameters
    ----------
    transformer
        With a count head.
    posterior
        Of the count head for these labels and library sizes.
    x_0
        Cells in model space, shape (B, G).
    timestep
        Noise level at which the network sees them.
    class_labels, library_size
        Codes (B, K) and total counts (B,).
    noise
        Draws of the noise, each (B, G), over which the log means are averaged.
    """
    t = torch.full((len(x_0),), timestep, device=x_0.device)  # (B,)
    log_means = []
    for draw in noise:
        x_t = add_noise(posterior, x_0, t, draw)  # (B, G)
        output = transformer(x_t.to(transformer.dtype), t, class_labels, library_size)
        log_means.append(output.count_log_mean.float())
    log_mean = torch.stack(log_means).mean(dim=0)  # (B, G)
    check_finite(log_mean)
    return log_mean


def denoise(
    denoiser: Denoiser,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    draws_counts: bool,
    on_step_start: Callable[[torch.Tensor], bool] = lambda t: True,
    on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] = lambda i, t, x_t: x_t,
) -> tuple[torch.Tensor, SCRDiTTransformerOutput | None]:
    """Denoise cells over the given timesteps.

    Parameters
    ----------
    denoiser
        Network and scheduler.
    x_t
        Noisy cells, shape (B, G).
    timesteps
        The timesteps to visit.
    draws_counts
        Whether counts are drawn at the last timestep, which then has a network call but no scheduler step.
    on_step_start
        `on_step_start(t)` returns False to stop.
    on_step_end
        `on_step_end(i, t, x_t)` may replace the cells, as a callback or the known genes of a panel do.

    Returns
    -------
    The cells, shape (B, G), and the last output of the network.
    """
    output = None
    for i, t in enumerate(timesteps):
        if not on_step_start(t):
            break
        output = denoiser.predict(x_t, t)
        if not (draws_counts and i == len(timesteps) - 1):
            x_t = denoiser.step(output, t, x_t)  # (B, G)
        x_t = on_step_end(i, t, x_t)
    return x_t, output


def check_count_head(transformer: SCRDiTTransformer, processor: SCRDiTProcessor, job: str) -> None:
    """Raise ValueError unless a model predicts counts at all timesteps, which `job`, such as "denoise", needs."""
    if transformer.count_head is None or not processor.models_counts:
        raise ValueError(f"transformer has no count head: train with the default --decode posterior to {job}.")
    if distilled_for(transformer):
        raise ValueError(f"transformer has an adapter distilled to generate: pipe.unload_lora_weights() to {job}.")


def check_positive(**numbers: Any) -> None:
    """Raise ValueError unless all arguments are integers of at least 1."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


def check_timesteps(transformer: SCRDiTTransformer, timesteps: Sequence[int]) -> None:
    """Raise ValueError or TypeError unless a model was trained on all of some noise levels, at least one."""
    first, last = transformer.config.min_timestep, transformer.config.num_train_timesteps - 1
    if not isinstance(timesteps, Sequence | np.ndarray | torch.Tensor):
        raise TypeError(f"timesteps must be a list, such as [{first}, {last}], got {timesteps!r}.")
    if not len(timesteps) or not all(first <= t <= last for t in timesteps):
        raise ValueError(f"timesteps must be from {first} to {last}, as in training, got {list(timesteps)}.")


def check_finite(values: torch.Tensor) -> None:
    """Raise ValueError if the network gave NaN or infinite values."""
    if not torch.isfinite(values).all():
        raise ValueError("transformer returned NaN or infinite values. Is it trained, and its dtype not float16?")


def cells_to_anndata(
    processor: SCRDiTProcessor,
    values: sp.csr_matrix,
    obs: pd.DataFrame,
    library_sizes: np.ndarray | None,
    provenance: Mapping[str, Any],
) -> ad.AnnData:
    """Build the AnnData of generated cells; [`SCRDiTPipelineOutput`] says which fields are written.

    Parameters
    ----------
    processor
        Genes and transform.
    values
        What the model generates: counts if it models them, shape (cells, G).
    obs
        One row for each cell.
    library_sizes
        Requested library sizes, shape (cells,), or `None`.
    provenance
        Written to `uns["scrdit"]`.
    """
    var = pd.DataFrame(index=pd.Index(processor.var_names))
    if processor.gene_ids is not None:
        var["gene_ids"] = processor.gene_ids
    adata = ad.AnnData(to_data_values(processor, values, library_sizes), obs=obs.assign(synthetic=True), var=var)
    if processor.models_counts and processor.value_step is None:
        adata.layers["counts"] = values.copy()
    adata.uns["scrdit"] = dict(provenance)
    return adata


def to_data_values(
    processor: SCRDiTProcessor, values: sp.csr_matrix, library_sizes: np.ndarray | None
) -> sp.csr_matrix:
    """Turn what the model generates into values like the training data's, float32."""
    return processor.normalize(values, library_sizes).astype(np.float32)
