"""The pipeline: labels -> noise -> denoise -> cells."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from diffusers import DiffusionPipeline, HookRegistry, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .checks import check_label
from .hub import SafePipelineMixin
from .launch import has_bfloat16
from .processing_scrdit import RARE_LABEL_CELLS, SCRDiTProcessor
from .sampling import (
    Denoiser,
    Generators,
    cells_to_anndata,
    check_finite,
    check_num_inference_steps,
    choose_batch_size,
    choose_timesteps,
    denoise,
    draw_seeds,
    draw_uniform,
    one_at_a_time,
    set_timesteps,
    to_data_values,
    visit_timesteps,
)
from .schedulers import DISTILLED_STEPS, NOISE_PROCESS, check_scheduler, distilled_for
from .transformer_scrdit import SCRDiTTransformer

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("anndata", "np", "pt", "latent")


@dataclass
class SCRDiTPipelineOutput(BaseOutput):
    """Output of [`SCRDiTPipeline`].

    Parameters
    ----------
    adata
        With `output_type="anndata"`, the cells. X is CSR float32: integer counts, or log-normalized values. Other
        fields: `layers["counts"]` (CSR float32, where X are counts), `obs` with the conditions (categorical)
        and `obs["synthetic"]` (bool, True), `var["gene_ids"]` where known, and `uns["scrdit"]` (dict: model,
        scheduler, steps, dtype, guidance scale, seed, versions).
    samples
        With other output types, an array or tensor (cells, G): values for "np" and "pt", model space for "latent".
    obs
        With other output types, the labels of the cells, one row each.
    """

    adata: ad.AnnData | None = None
    samples: np.ndarray | torch.Tensor | None = None
    obs: pd.DataFrame | None = None


def count_entries(conditions: Any, obs: Any, library_size: Any, latents: Any) -> int:
    """Count the cells that the arguments of a call list one by one; 1 if none does."""
    given = conditions.values() if isinstance(conditions, Mapping) else ()
    lists = [entries for entries in (*given, library_size) if np.ndim(entries) == 1]
    return next((len(rows) for rows in (obs, latents, *lists) if rows is not None), 1)


class SCRDiTPipeline(SafePipelineMixin, DiffusionPipeline):
    """Generates cells with a diffusion transformer.

    Parameters
    ----------
    transformer
        The denoiser.
    scheduler
        One that [`~scrdit_diffusers.schedulers.SCHEDULERS`] approves of; swap it with
        `pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`.
    processor
        Genes, value transform and labels.
    decode_timestep
        For a transformer with a count head: where denoising stops and counts are drawn from their posterior. `None`
        takes that of the transformer's config; if that is `None` too, cells are denoised to the end and the transform
        inverted, which rounds in "counts" space.
    min_timestep
        Lowest timestep on which the transformer was trained; `None` takes that of its config.
    default_timesteps
        Where the network is called if a call does not say `num_inference_steps`: falling from T - 1 to
        `decode_timestep`. They are chosen for UniPC, so that with another scheduler or `decode_timestep`, or without
        one, 25 evenly spaced steps are taken. `None` takes those of the transformer's config; if that is `None` too,
        25 steps are taken.
    autocast_dtype
        "bfloat16" computes the network's matmuls in it, on processors that can (elsewhere in the dtype of the weights);
        "float32" does not. `None` takes that of the transformer's config; if that is `None` too, it is "float32".

    References
    ----------
    scRDiT: arXiv 2404.06153. Discrete decoder: Ho et al. 2020, arXiv 2006.11239, section 3.3.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: SCRDiTTransformer,
        scheduler: SchedulerMixin,
        processor: SCRDiTProcessor,
        decode_timestep: int | None = None,
        min_timestep: int | None = None,
        default_timesteps: list[int] | None = None,
        autocast_dtype: str | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, processor=processor)
        settings: dict[str, Any] = dict(decode_timestep=decode_timestep, min_timestep=min_timestep)
        settings |= dict(default_timesteps=default_timesteps, autocast_dtype=autocast_dtype)
        if transformer is not None:  # which carries them to `SCRDiTPipeline(**pipe.components)`
            settings = {k: transformer.config.get(k) if value is None else value for k, value in settings.items()}
        settings["min_timestep"] = settings["min_timestep"] or 0
        if transformer is not None:
            transformer.register_to_config(**settings)
        self.register_to_config(**settings)
        self._noise_process = {name: scheduler.config.get(name) for name in NOISE_PROCESS} if scheduler else {}

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance in the running call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call evaluates the network with and without labels."""
        return self._guidance_scale != 1.0

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """Keyword arguments handed to the attention layers in the running call."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Number of scheduler steps of the running call; some schedulers take more than `num_inference_steps`."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Current timestep of the running call."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the running call was asked to stop (a callback sets `pipe._interrupt = True`)."""
        return self._interrupt

    def check_inputs(
        self,
        num_cells: int,
        conditions: Mapping[str, str | Sequence[str]] | None,
        obs: pd.DataFrame | None,
        library_size: float | Sequence[float] | None,
        num_inference_steps: int | None,
        guidance_scale: float,
        eta: float | None,
        generator: Generators | None,
        batch_size: int | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        decode_timestep: int | None,
    ) -> None:
        """Raise ValueError or TypeError for arguments that [`SCRDiTPipeline.__call__`] cannot use."""
        self.check_components()
        sizes = dict(num_cells=num_cells, batch_size=batch_size, num_inference_steps=num_inference_steps)
        for name, size in sizes.items():
            if size is None and name != "num_cells":
                continue
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
                raise TypeError(f"{name} must be an integer, got {size!r}.")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        self._check_labels(num_cells, conditions, obs)
        if library_size is not None:
            self._check_library_size(num_cells, library_size)
        if not isinstance(guidance_scale, (int, float)) or not 0 <= guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be a number of at least 0 (1.0 is off), got {guidance_scale!r}.")
        if guidance_scale != 1.0 and not self.processor.condition_keys:
            raise ValueError(f"guidance_scale={guidance_scale} needs a conditional model; this one has no conditions.")
        if eta is not None and (not isinstance(eta, (int, float)) or not 0 <= eta <= 1):
            raise ValueError(f"eta must be a number from 0 (deterministic) to 1 (as DDPM), got {eta!r}.")
        if eta and "eta" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(f"{type(self.scheduler).__name__} takes no eta; eta={eta} needs DDIMScheduler.")
        generators = generator if isinstance(generator, list) else [generator]
        if not all(isinstance(g, torch.Generator) for g in generators) and generator is not None:
            raise TypeError(
                "generator must be a torch.Generator such as torch.manual_seed(0), or a list with one per cell."
            )
        if isinstance(generator, list) and len(generator) != num_cells:
            raise ValueError(f"generator must be a list with one per cell: got {len(generator)} for {num_cells} cells.")
        if latents is not None and not isinstance(latents, torch.Tensor):
            raise TypeError(f"latents must be a torch.Tensor, got {type(latents).__name__}.")
        shape = (num_cells, self.transformer.config.num_genes)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}, expected {shape}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs can hold {self._callback_tensor_inputs}, got {unknown}."
            )
        self._check_timesteps(num_inference_steps, decode_timestep)

    def check_components(self) -> None:
        """Raise ValueError unless processor, transformer and scheduler belong together."""
        config = self.transformer.config
        if self.processor.num_genes != config.num_genes:
            raise ValueError(f"The processor has {self.processor.num_genes} genes, the transformer {config.num_genes}.")
        if self.processor.num_classes != list(config.num_classes or []):
            raise ValueError(
                f"The processor's conditions have {self.processor.num_classes} categories, the transformer's "
                f"{config.num_classes or []}."
            )
        counts_behind = self.processor.models_counts and self.processor.value_space != "counts"
        if counts_behind and self.transformer.count_head is None:
            raise ValueError("The processor is of a model with a count head; the transformer has none.")
        check_scheduler(self.scheduler, distilled_for(self.transformer))
        for name, trained in self._noise_process.items():
            if self.scheduler.config.get(name) != trained:
                raise ValueError(
                    f"{type(self.scheduler).__name__} has {name}={self.scheduler.config.get(name)!r}, this model was "
                    f"trained with {trained!r}: make it by `.from_config` from the config of the shipped one."
                )
        if self.transformer.count_head is not None:
            expected = {name: config[name] for name in ("num_train_timesteps", "beta_schedule")}
            for name, value in (expected | {"prediction_type": "sample"}).items():
                if self.scheduler.config.get(name) != value:
                    raise ValueError(
                        f"{type(self.scheduler).__name__} has {name}={self.scheduler.config.get(name)!r}, but the "
                        f"transformer's count head needs {value!r}."
                    )

    def _check_labels(
        self, num_cells: int, conditions: Mapping[str, str | Sequence[str]] | None, obs: pd.DataFrame | None
    ) -> None:
        keys = self.processor.condition_keys
        if obs is not None and conditions is not None:
            raise ValueError("Give either obs (one row per cell) or conditions, not both.")
        if conditions is not None and not isinstance(conditions, Mapping):
            raise TypeError(f'conditions must be a dict such as {{"cell_type": "B"}}, got {type(conditions).__name__}.')
        if obs is None:
            return
        if not isinstance(obs, pd.DataFrame):
            raise TypeError(f"obs must be a pandas DataFrame with one row per cell, got {type(obs).__name__}.")
        if len(obs) != num_cells:
            raise ValueError(
                f"obs has {len(obs)} rows for num_cells={num_cells}; leave num_cells out to use every row."
            )
        if self.processor.labels_keys and not set(keys) & set(obs):
            raise ValueError(f"obs has none of the model's conditions {keys}; it has {list(obs)}.")
        for key in set(keys) & set(obs):
            check_label(obs, key)

    def _check_library_size(self, num_cells: int, library_size: float | Sequence[float]) -> None:
        if self.transformer.count_head is None:
            raise ValueError("library_size needs a model that predicts counts (with a count head).")
        if self.processor.value_step is not None:
            raise ValueError(
                "library_size is a number of counts, but this model was trained on values that are not scaled counts."
            )
        try:
            if np.asarray(library_size).dtype.kind in "USb":
                raise TypeError("text or truth values")
            sizes = np.asarray(library_size, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"library_size must be a number or one per cell, got {library_size!r}.") from error
        if sizes.shape not in ((), (num_cells,)):
            raise ValueError(
                f"library_size has shape {sizes.shape} for {num_cells} cells; give one number for all, or one per cell."
            )
        if not ((sizes >= 1) & (sizes <= np.finfo(np.float32).max)).all():
            raise ValueError(
                "library_size must be at least 1, the total count of a cell, and not more than float32 holds; got "
                f"{np.min(sizes):g} to {np.max(sizes):g}."
            )

    def _check_timesteps(self, num_inference_steps: int | None, decode_timestep: int | None) -> None:
        check_num_inference_steps(num_inference_steps, self.scheduler)
        last = self.scheduler.config.num_train_timesteps - 1
        if decode_timestep is not None and self.transformer.count_head is None:
            raise ValueError("decode_timestep needs a transformer with a count head; this one has none.")
        if not self.config.min_timestep <= (decode_timestep or 0) <= last:
            raise ValueError(
                f"decode_timestep: this model was trained on timesteps {self.config.min_timestep} to {last} and cannot "
                f"decode at {decode_timestep or 0}"
                + ("." if decode_timestep else ", as rounding the last sample would.")
            )

    def prepare_class_labels(
        self,
        num_cells: int,
        conditions: Mapping[str, str | Sequence[str]] | None,
        obs: pd.DataFrame | None,
        generator: Generators,
    ) -> torch.Tensor:
        """Codes (cells, K) of given labels, and of others drawn from the training composition."""
        if obs is not None:
            conditions = {key: obs[key].tolist() for key in self.processor.condition_keys if key in obs}
        quantiles = draw_uniform((num_cells,), generator, torch.device("cpu"))
        codes = self.processor.sample_labels(num_cells, conditions, quantiles.numpy())
        self._warn_of_rare_labels(codes, conditions or {})
        return torch.from_numpy(codes)

    def _warn_of_rare_labels(self, codes: np.ndarray, conditions: Mapping[str, Any]) -> None:
        """Warn of requested labels that few training cells have."""
        label_counts = self.processor.label_counts if self.processor.composition else {}
        for k, (key, numbers) in enumerate(label_counts.items()):
            names = self.processor.conditions[key]
            for name in [names[code] for code in np.unique(codes[:, k])] if key in conditions else []:
                if numbers[name] < RARE_LABEL_CELLS:
                    logger.warning(
                        "%s %r has %d training cells, fewer than %d: the cells generated for it may be poor.",
                        key,
                        name,
                        numbers[name],
                        RARE_LABEL_CELLS,
                    )

    def prepare_library_size(
        self,
        library_size: float | Sequence[float] | None,
        class_labels: torch.Tensor,
        generator: Generators,
    ) -> torch.Tensor | None:
        """Library sizes (cells,), given or drawn from those of training cells with the same labels."""
        if self.transformer.count_head is None:
            return None
        num_cells = len(class_labels)
        if library_size is not None:
            self._warn_of_library_sizes(np.asarray(library_size, dtype=np.float64))
            return torch.as_tensor(np.broadcast_to(library_size, num_cells).astype(np.float32))
        quantiles = draw_uniform((num_cells,), generator, torch.device("cpu"))
        return torch.from_numpy(self.processor.sample_library_sizes(class_labels.numpy(), quantiles.numpy())).float()

    def _warn_of_library_sizes(self, library_size: np.ndarray) -> None:
        """Warn of library sizes far from the training cells', to which the counts will not add up."""
        if not self.processor.log_library_sizes:
            return
        table = np.exp(np.asarray(self.processor.log_library_sizes))
        smallest, largest = table.min(), table.max()
        over_all_genes = self.processor.normalized_by == "library_size"
        if library_size.max() > 1.5 * largest or library_size.min() < smallest / 1.5:
            logger.warning(
                "library_size is %.0f to %.0f, that of the training cells %.0f to %.0f over %s: "
                "the counts will not add up to it.",
                library_size.min(),
                library_size.max(),
                smallest,
                largest,
                "all genes" if over_all_genes else f"the model's {self.processor.num_genes} genes",
            )

    def prepare_latents(self, num_cells: int, generator: Generators, latents: torch.Tensor | None) -> torch.Tensor:
        """Draw the noise to start from (cells, G), or take `latents`, and scale it for the scheduler."""
        device = self._execution_device
        if latents is None:
            shape = (num_cells, self.transformer.config.num_genes)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

    @one_at_a_time
    @torch.no_grad()
    def __call__(
        self,
        num_cells: int | None = None,
        conditions: Mapping[str, str | Sequence[str]] | None = None,
        obs: pd.DataFrame | None = None,
        library_size: float | Sequence[float] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        eta: float | None = None,
        decode: str | None = None,
        decode_timestep: int | None = None,
        generator: Generators | None = None,
        batch_size: int | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "anndata",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SCRDiTPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        attention_kwargs: dict[str, Any] | None = None,
    ) -> SCRDiTPipelineOutput | tuple:
        r"""Generate cells.

        Parameters
        ----------
        num_cells
            How many cells. `None`: as many as `obs`, `latents` or a list in `conditions` or `library_size` has
            entries, else 1.
        conditions
            Labels by condition, such as `{"cell_type": "B"}`: one label for all cells, or a list with one per cell.
            Missing conditions are drawn from the training composition, conditional on the given ones.
        obs
            Instead of `conditions`: one row per new cell, such as the `obs` of real cells. Columns that are not
            conditions of the model are ignored.
        library_size
            Total count over the model's genes, one number for all cells or one per cell. `None` draws it from the
            training cells with the same labels. Only for models with a count head; the counts of a cell add up to it
            on average. For log-normalized values, it is the total over all genes before normalization.
        num_inference_steps
            Steps of the scheduler or, if counts are drawn from their posterior, network calls, evenly spaced. `None`:
            the pipeline's `default_timesteps`, or 2 with a distilled adapter.
        guidance_scale
            Scale s of classifier-free guidance, `uncond + s * (cond - uncond)`: diffusers' convention, where 1.0 is
            off. It equals 1 + w in the convention of Ho and Salimans (2022, equation 6), where w = 0 is off. Scales
            above 1 sharpen the labels and inflate the counts.
        eta
            Noise of DDIM, 0 (deterministic) to 1 (as DDPM). Only for schedulers that take it. `None`: 0, or 1 with a
            distilled adapter, which is trained for fresh noise after each call (the gamma of TCD).
        decode
            "posterior" draws counts from their posterior at `decode_timestep`, "round" denoises to the end and rounds.
            `None`: "posterior" if the pipeline has a `decode_timestep`, else "round".
        decode_timestep
            Replaces the pipeline's `decode_timestep`.
        generator
            Makes the result reproducible: one for all cells, or a list with one per cell, so that no cell depends on
            the others or on `batch_size`. `None` draws a seed from PyTorch's global state.
        batch_size
            Cells generated at a time; bounds the memory. With a single generator, another `batch_size` gives other
            cells. `None`: 512, or of more than 8,192 genes fewer, with at most 2^22 values.
        latents
            Standard normal noise to start from, shape (cells, G); `None` draws it.
        output_type
            "anndata"; "np" or "pt" for an array or tensor of values; "latent" for model space, where cells are still
            noisy if counts would be drawn from them.
        return_dict
            Return a [`SCRDiTPipelineOutput`] (default) or a tuple of its first field that is set.
        callback_on_step_end
            Called after each step of each batch as `callback(pipe, step, timestep, kwargs)`; may return changed
            tensors. It may set `pipe._interrupt = True`: unfinished cells are then left out (with "latent", kept as
            they are).
        callback_on_step_end_tensor_inputs
            Names of the tensors in `kwargs`: "latents" (cells of the batch, G).
        attention_kwargs
            `{"scale": s}` scales LoRA layers.

        Returns
        -------
        [`SCRDiTPipelineOutput`], or a tuple.

        Raises
        ------
        ValueError, TypeError
            An argument does not fit the model; raised before any computation. Also if the model returns NaN.

        Examples
        --------
        ```python
        pipe = SCRDiTPipeline.from_pretrained("user/scrdit-pbmc")
        adata = pipe(num_cells=1000, conditions={"cell_type": "B"}, generator=torch.manual_seed(0)).adata
        ```
        """
        # 1. Check the request
        if num_cells is None:
            num_cells = count_entries(conditions, obs, library_size, latents)
        decode_timestep = self.choose_decode_timestep(decode, decode_timestep)
        self.check_inputs(
            num_cells,
            conditions,
            obs,
            library_size,
            num_inference_steps,
            guidance_scale,
            eta,
            generator,
            batch_size,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            decode_timestep,
        )
        distilled = distilled_for(self.transformer) is not None
        eta = float(distilled) if eta is None else eta
        if distilled and num_inference_steps is None:
            num_inference_steps = DISTILLED_STEPS
        num_inference_steps, timesteps = choose_timesteps(
            num_inference_steps,
            self.config.default_timesteps,
            self.scheduler,
            decode_timestep,
            self.config.min_timestep,
        )
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

        # 2. Labels and library sizes of all cells
        class_labels = self.prepare_class_labels(num_cells, conditions, obs, generator)  # (cells, K)
        library_sizes = self.prepare_library_size(library_size, class_labels, generator)  # (cells,) or None
        if timesteps is None:
            num_steps, self._num_timesteps = set_timesteps(self.scheduler, num_inference_steps, decode_timestep, device)
        else:
            num_steps = self._num_timesteps = num_inference_steps
        batch_size = batch_size or choose_batch_size(self.transformer.config.num_genes)
        starts = range(0, num_cells, batch_size)
        batches: list = []
        with self.progress_bar(total=len(starts) * self._num_timesteps) as progress_bar:

            def on_step_start(t: torch.Tensor) -> bool:
                self._current_timestep = t
                return not self.interrupt

            def on_step_end(i: int, t: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = {"latents": x_t}[name]
                    x_t = (callback_on_step_end(self, i, t, callback_kwargs) or {}).get("latents", x_t)
                progress_bar.update()
                return x_t

            for start in starts:
                # 3. Noise of this batch of cells
                chunk = slice(start, min(start + batch_size, num_cells))
                chunk_generator = generator[chunk] if isinstance(generator, list) else generator
                x_t = self.prepare_latents(
                    chunk.stop - chunk.start, chunk_generator, None if latents is None else latents[chunk]
                )  # (B, G)
                denoiser = Denoiser(
                    self.transformer,
                    self.scheduler,
                    class_labels[chunk].to(device),
                    None if library_sizes is None else library_sizes[chunk].to(device),
                    guidance_scale,
                    attention_kwargs,
                    step_kwargs={"eta": eta, "generator": chunk_generator},
                    autocast_dtype=self.choose_autocast_dtype(),
                    draws_cells=distilled,
                )

                # 4. Denoise
                self.reset_state(num_steps, chunk_generator)
                if timesteps is not None:
                    visit_timesteps(self.scheduler, timesteps)
                visited = self.scheduler.timesteps[: self._num_timesteps]
                x_t, output = denoise(
                    denoiser, x_t, visited, decode_timestep is not None, on_step_start, on_step_end
                )  # (B, G)

                # 5. Model space -> values
                if output_type == "latent":
                    batches.append(x_t)
                    continue
                if self.interrupt:
                    logger.warning("Interrupted: %d of %d cells are finished.", start, num_cells)
                    break
                if decode_timestep is None or output is None:
                    check_finite(x_t)
                    values = self.processor.inverse_transform(x_t.cpu().numpy())  # (B, G)
                else:
                    uniform = draw_uniform(x_t.shape, chunk_generator, device)  # (B, G)
                    values = denoiser.draw_counts(output, visited[-1], x_t, uniform).cpu().numpy()  # (B, G)
                batches.append(sp.csr_matrix(values))

        self._current_timestep = None
        self.maybe_free_model_hooks()
        decoded_at = None if decode_timestep is None else float(visited[-1])
        provenance = self.describe_run(num_inference_steps, guidance_scale, eta, decoded_at, generator)
        cells = self.make_output(batches, class_labels, library_sizes, output_type, provenance)
        return cells if return_dict else cells.to_tuple()[:1]

    def choose_decode_timestep(self, decode: str | None, decode_timestep: int | None) -> int | None:
        """Choose where counts are drawn; `None` denoises to the end and rounds."""
        if decode not in (None, "posterior", "round"):
            raise ValueError(f'decode must be "posterior", "round" or None, got {decode!r}.')
        if decode == "round" and decode_timestep is not None:
            raise ValueError('decode="round" goes to the end and takes no decode_timestep.')
        if decode_timestep is None and decode != "round":
            decode_timestep = self.config.decode_timestep
        if decode == "posterior" and decode_timestep is None:
            raise ValueError('decode="posterior" needs a decode_timestep: the pipeline has none.')
        return decode_timestep

    def choose_autocast_dtype(self) -> torch.dtype | None:
        """Choose the dtype of the network's matmuls; `None` for that of its weights. See `autocast_dtype`."""
        wanted = self.config.autocast_dtype == "bfloat16" and has_bfloat16(self._execution_device)
        return torch.bfloat16 if wanted else None

    def reset_state(self, num_steps: int, generator: Generators) -> None:
        """Reset caches and scheduler for a batch of cells, so that nothing carries over from other cells."""
        HookRegistry.check_if_exists_or_initialize(self.transformer).reset_stateful_hooks(recurse=True)
        self.scheduler.set_timesteps(num_steps, device=self._execution_device)
        if hasattr(self.scheduler, "noise_sampler_seed"):  # DPM-Solver SDE has its own source of noise
            self.scheduler.noise_sampler_seed = draw_seeds(generator)

    def describe_run(
        self,
        num_inference_steps: int,
        guidance_scale: float,
        eta: float,
        decoded_at: float | None,
        generator: Generators,
    ) -> dict[str, Any]:
        """Describe how cells were made, for `uns["scrdit"]`; `decoded_at` is the timestep where counts were drawn."""
        seeds = [g.initial_seed() for g in (generator if isinstance(generator, list) else [generator])]
        exact = np.array(seeds, dtype=np.uint64)  # AnnData would write those from 2^63 on as floats
        return {
            "model": str(self.config.get("_name_or_path") or ""),
            "value_space": self.processor.value_space,
            "scheduler": type(self.scheduler).__name__,
            "num_inference_steps": int(num_inference_steps),
            "dtype": str(self.choose_autocast_dtype() or self.transformer.dtype).removeprefix("torch."),
            "guidance_scale": float(guidance_scale),
            "eta": float(eta),
            "decode": "round" if decoded_at is None else f"posterior at timestep {decoded_at:g}",
            "seed": exact if isinstance(generator, list) else seeds[0],
            "scrdit_diffusers_version": version("scrdit_diffusers"),
            "diffusers_version": version("diffusers"),
        }

    def make_output(
        self,
        batches: list,
        class_labels: torch.Tensor,
        library_sizes: torch.Tensor | None,
        output_type: str,
        provenance: Mapping[str, Any],
    ) -> SCRDiTPipelineOutput:
        """Join the batches of cells into the requested output."""
        if output_type == "latent":
            latents = torch.cat(batches)  # (cells, G)
            return SCRDiTPipelineOutput(samples=latents, obs=self._make_obs(class_labels[: len(latents)]))
        values = sp.vstack([sp.csr_matrix((0, self.processor.num_genes), dtype=np.float32), *batches], format="csr")
        num_cells = values.shape[0]  # fewer than requested after an interruption
        obs = self._make_obs(class_labels[:num_cells])
        empty = int((values.getnnz(axis=1) == 0).sum())
        if empty:
            logger.warning("%d of %d cells have no expressed gene.", empty, num_cells)
        sizes = None if library_sizes is None else library_sizes[:num_cells].numpy()
        if output_type == "anndata":
            return SCRDiTPipelineOutput(adata=cells_to_anndata(self.processor, values, obs, sizes, provenance))
        samples = to_data_values(self.processor, values, sizes).toarray()
        return SCRDiTPipelineOutput(samples=torch.from_numpy(samples) if output_type == "pt" else samples, obs=obs)

    def _make_obs(self, class_labels: torch.Tensor) -> pd.DataFrame:
        """Labels of new cells, which are named by number."""
        obs = self.processor.decode_labels(class_labels.numpy())
        obs.index = [f"synthetic_{i}" for i in range(len(obs))]
        return obs
