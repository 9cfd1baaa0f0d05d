"""Completion: the genes that a panel or another chemistry did not measure."""

import copy
import logging
from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .checks import check_gene_names, explain_missing, get_matrix
from .count_head import CountPosterior
from .hub import SafePipelineMixin
from .processing_scrdit import SCRDiTProcessor
from .sampling import (
    Denoiser,
    check_count_head,
    check_finite,
    check_num_inference_steps,
    check_positive,
    choose_timesteps,
    denoise,
    draw_uniform,
    read_batch,
    set_timesteps,
    visit_timesteps,
)
from .schedulers import check_scheduler
from .transformer_scrdit import SCRDiTTransformer

logger = logging.getLogger(__name__)

TEMPERATURE = 4  # of the likelihood of measured counts: the genes of a cell err together


class Mixture:
    """Draws of the same B cells, weighted by how probable they make the measured counts.

    Parameters
    ----------
    counts
        Shape (B, G).
    measured
        Which genes are measured, shape (G,).
    generator
        Chooses one of the draws for each cell.
    """

    def __init__(self, counts: torch.Tensor, measured: torch.Tensor, generator: torch.Generator):
        self.counts, self.measured, self.generator = counts, measured, generator
        self.log_weight = counts.new_full((len(counts),), -torch.inf)  # of all draws, (B,)
        self.probabilities: list[torch.Tensor] = []  # of the missing counts, (genes, bins, B) for each group of genes
        self.chosen: tuple[torch.Tensor, torch.Tensor] = (counts, counts)  # log means and noisy cell of a draw, (B, G)

    def add(self, posterior: CountPosterior, log_mean: torch.Tensor, noisy: torch.Tensor) -> None:
        """Add a draw: log mean counts (B, G) that its noisy cells (B, G) let expect."""
        parts = posterior.probabilities(log_mean)
        likelihood = posterior.log_likelihood(parts, self.counts)  # (B, G)
        log_weight = torch.where(self.measured, likelihood, 0).sum(dim=1) / TEMPERATURE  # (B,)
        self.log_weight = torch.logaddexp(self.log_weight, log_weight)
        share = (log_weight - self.log_weight).exp()  # of this draw among those so far, (B,)
        if self.probabilities:
            parts = [torch.lerp(*pair, share) for pair in zip(self.probabilities, parts, strict=True)]
        self.probabilities = parts
        uniform = draw_uniform(share.shape, self.generator, share.device)  # (B,)
        is_chosen = (uniform < share)[:, None]  # (B, 1)
        log_mean_before, noisy_before = self.chosen
        self.chosen = torch.where(is_chosen, log_mean, log_mean_before), torch.where(is_chosen, noisy, noisy_before)


class SCRDiTCompletePipeline(SafePipelineMixin, DiffusionPipeline):
    r"""Fills in the genes that cells were not measured on.

    Cells are generated as by [`SCRDiTPipeline`], but after each step the measured genes go back to what they are, at
    the noise level of the next step, as in the in-painting of pictures. What a cell is, is decided at noise levels at
    which its measured counts hardly show. So `num_draws` cells are drawn for each measured one. The distributions that
    the *other* genes of each let expect are mixed, with weights for how probable they make the measured counts:

        p(k) = sum_d w_d p(k | x_t of draw d without the gene, labels, library size)
        w_d  ~  prod_measured p(count | x_t of draw d without the gene, labels, library size)^(1 / 4)

    The exponent is below 1, since the genes of a cell err together. At `decode_timestep` only missing genes are drawn,
    in one of the cells, which is chosen with these weights.

    Parameters
    ----------
    transformer, scheduler, processor
        Those of a trained pipeline with a count head.
    decode_timestep
        Timestep at which counts are drawn; `None` takes that of the transformer's config.
    default_timesteps
        Where the network is called if a call does not say `num_inference_steps`, as in [`SCRDiTPipeline`]; `None` takes
        those of the transformer's config.

    References
    ----------
    RePaint: Lugmayr et al. 2022, arXiv 2201.09865, here without its jumps back, which did not help. Weights: Wu et al.
    2023, arXiv 2306.17775 (twisted diffusion sampler), here without resampling on the way, which did not help either.

    Examples
    --------
    ```python
    complete = SCRDiTCompletePipeline.from_pipe(pipe)  # shares the weights of a loaded SCRDiTPipeline
    adata = complete(panel, generator=torch.manual_seed(0))
    adata[:, ~adata.var["measured"]].layers["mean"]
    ```
    """

    model_cpu_offload_seq = "transformer"

    def __init__(
        self,
        transformer: SCRDiTTransformer,
        scheduler: SchedulerMixin,
        processor: SCRDiTProcessor,
        decode_timestep: int | None = None,
        default_timesteps: list[int] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, processor=processor)
        settings = {"decode_timestep": decode_timestep, "default_timesteps": default_timesteps}
        if transformer is not None:
            settings = {k: transformer.config.get(k) if value is None else value for k, value in settings.items()}
        self.register_to_config(**settings)

    def check_inputs(
        self,
        adata: ad.AnnData,
        use_labels: bool,
        library_size: float | Sequence[float] | None,
        num_inference_steps: int | None,
        num_draws: int,
        interval: float,
        batch_size: int,
    ) -> None:
        """Raise ValueError or TypeError for arguments that [`SCRDiTCompletePipeline.__call__`] cannot use."""
        if not isinstance(adata, ad.AnnData):
            raise TypeError(f"adata must be an AnnData of measured cells, got {type(adata).__name__}.")
        check_count_head(self.transformer, self.processor, "complete")
        if self.config.decode_timestep is None:
            raise ValueError("decode_timestep: neither the pipeline nor the transformer's config has one; give it.")
        if self.processor.value_space != "counts":
            raise ValueError(
                f"The model was trained with value_space={self.processor.value_space!r}, whose counts need all genes: "
                "train it on counts to complete."
            )
        check_scheduler(self.scheduler)
        check_positive(num_draws=num_draws, batch_size=batch_size)
        if num_inference_steps is not None:
            check_positive(num_inference_steps=num_inference_steps)
        check_num_inference_steps(num_inference_steps, self.scheduler)
        if not 0 < interval < 1:
            raise ValueError(f"interval must be a share between 0 and 1, such as 0.9, got {interval!r}.")
        missing = [key for key in self.processor.labels_keys if key not in adata.obs]
        if use_labels and missing:
            raise ValueError(f"adata.obs has no {missing}: add the labels, or complete without by use_labels=False.")
        if library_size is None and not self.processor.log_library_sizes:
            raise ValueError("library_size: the processor holds no library sizes of training cells; give them.")
        if library_size is not None:
            sizes = np.asarray(library_size, dtype=np.float64)
            if sizes.shape not in ((), (adata.n_obs,)) or not (np.isfinite(sizes).all() and (sizes >= 1).all()):
                raise ValueError(
                    f"library_size must be at least 1, one number or one for each of the {adata.n_obs} cells; got "
                    f"shape {sizes.shape} and a smallest value of {sizes.min(initial=np.inf):g}."
                )

    def find_genes(self, var_names: Sequence[str]) -> np.ndarray:
        """Positions of the model's genes in `var_names`, -1 for a missing one, shape (G,).

        Raises
        ------
        ValueError
            `var_names` repeats a name, or has none of the model's genes.
        """
        check_gene_names(list(map(str, var_names)), "var_names", " Call adata.var_names_make_unique().")
        columns = pd.Index(var_names).get_indexer(pd.Index(self.processor.var_names))
        missing = [self.processor.var_names[gene] for gene in np.flatnonzero(columns < 0)]
        reason = explain_missing(missing, var_names, self.processor.gene_ids)
        if len(missing) == len(columns):
            raise ValueError(
                f"adata has none of the model's {len(columns)} genes, such as {self.processor.var_names[:5]}; its own "
                f"look like {list(map(str, var_names[:3]))}.{reason}"
            )
        if reason:
            logger.warning("%d of the model's %d genes count as not measured.%s", len(missing), len(columns), reason)
        return columns

    def prepare_class_labels(self, obs: pd.DataFrame, use_labels: bool) -> torch.Tensor:
        """Encode the labels of `obs`, or "no label" for every cell, shape (cells, K)."""
        if use_labels:
            return torch.from_numpy(self.processor.encode_labels(obs))
        return torch.tensor(self.processor.num_classes, dtype=torch.long).repeat(len(obs), 1)

    def prepare_library_size(
        self, counts: sp.csr_matrix, measured: np.ndarray, class_labels: torch.Tensor
    ) -> torch.Tensor:
        """Estimate library sizes over all of the model's genes from the measured ones, shape (cells,).

        The total T of a cell's measured genes is taken as Poisson with mean p L, where p is the share that these genes
        have among cells with its labels, and its library size L as gamma distributed, with mean a / b and variance
        a / b^2 of training cells with these labels. The estimate is the posterior mean, (a + T) / (b + p): T / p for
        large panels, and near that of a typical cell for small ones.

        Parameters
        ----------
        counts
            Shape (cells, G).
        measured
            Whether a gene is measured, shape (G,).
        class_labels
            Codes, shape (cells, K).
        """
        combinations, rows = np.unique(class_labels.numpy(), axis=0, return_inverse=True)
        levels = (np.arange(50) + 0.5) / 50
        sizes = np.stack(  # (combinations, levels)
            [self.processor.sample_library_sizes(combinations, np.full(len(combinations), q)) for q in levels], axis=1
        )
        device = self._execution_device
        log_mean = self.transformer.count_head(torch.from_numpy(combinations).to(device)).log_mean  # (combinations, G)
        share = log_mean.double().softmax(dim=1).cpu().numpy()[:, measured].sum(axis=1)  # p
        b = sizes.mean(axis=1) / np.maximum(sizes.var(axis=1), 1e-6)
        a = b * sizes.mean(axis=1)
        totals = np.asarray(counts[:, np.flatnonzero(measured)].sum(axis=1)).ravel()  # T
        estimate = (a[rows.ravel()] + totals) / (b + share)[rows.ravel()]
        return torch.from_numpy(np.maximum(estimate, 1.0)).float()

    def draw_cells(
        self,
        denoiser: Denoiser,
        x_0: torch.Tensor,
        measured: torch.Tensor,
        num_steps: int,
        num_timesteps: int,
        visited: list[int] | None,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw noisy cells at `decode_timestep` whose measured genes (G,) are those of `x_0` (B, G).

        Returns
        -------
        Timestep, the cells (B, G), and the log means of their counts (B, G).
        """
        scheduler, device = denoiser.scheduler, x_0.device
        scheduler.set_timesteps(num_steps, device=device)
        if visited is not None:
            visit_timesteps(scheduler, visited)
        timesteps = scheduler.timesteps[:num_timesteps]

        def put_back(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            noise = randn_tensor(x_0.shape, generator=generator, device=device, dtype=torch.float32)  # (B, G)
            return torch.where(measured, scheduler.add_noise(x_0, noise, t.expand(len(x_0))), x_t)

        def on_step_end(i: int, t: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
            return put_back(x_t, timesteps[i + 1]) if i + 1 < num_timesteps else x_t

        noise = randn_tensor(x_0.shape, generator=generator, device=device, dtype=torch.float32)  # (B, G)
        x_t = put_back(noise * scheduler.init_noise_sigma, timesteps[0])  # (B, G)
        x_t, output = denoise(denoiser, x_t, timesteps, draws_counts=True, on_step_end=on_step_end)
        assert output is not None and output.count_log_mean is not None
        log_mean = output.count_log_mean.float()  # (B, G)
        check_finite(log_mean)
        return timesteps[-1], denoiser.scheduler.scale_model_input(x_t, timesteps[-1]), log_mean

    @torch.no_grad()
    def __call__(
        self,
        adata: ad.AnnData,
        layer: str | None = None,
        use_labels: bool = True,
        library_size: float | Sequence[float] | None = None,
        num_inference_steps: int | None = None,
        num_draws: int = 16,
        interval: float = 0.9,
        generator: torch.Generator | None = None,
        batch_size: int = 512,
    ) -> ad.AnnData:
        """Complete measured cells.

        Parameters
        ----------
        adata
            Counts of cells on some of the model's genes, found by name; other genes are left out.
        layer
            Layer that holds the counts; `None` takes X.
        use_labels
            Condition on the labels in `adata.obs`, in the columns that the model was trained on. False completes each
            cell by its counts alone.
        library_size
            Total count over all of the model's genes, one number or one per cell. `None` estimates it, see
            [`SCRDiTCompletePipeline.prepare_library_size`].
        num_inference_steps
            Network calls for each draw, evenly spaced. `None`: the `default_timesteps`.
        num_draws
            Cells that are drawn for each measured one. More of them find better ones.
        interval
            Share of the counts that lie from `lower` to `upper`; for counts, which are integers, at least that many.
        generator
            Makes the result reproducible; `None` draws from PyTorch's global state.
        batch_size
            Cells that are completed at a time; bounds the memory. Another `batch_size` draws other noise.

        Returns
        -------
        AnnData of the model's genes with `obs` of `adata` and `obs["library_size"]`, given or estimated, float32.
        Counts in `X`: measured ones, and one draw of the missing ones. `layers["mean"]`, `layers["lower"]` and
        `layers["upper"]`: the mean and the ends of the interval of each missing count, float32, and the measured
        counts themselves. `var["measured"]` tells the genes apart.

        Raises
        ------
        ValueError, TypeError
            No gene of the model is there, labels are missing or unknown, or values are not counts; raised before any
            computation.
        """
        self.check_inputs(adata, use_labels, library_size, num_inference_steps, num_draws, interval, batch_size)
        num_calls, visited = choose_timesteps(
            num_inference_steps,
            self.config.default_timesteps,
            self.scheduler,
            self.config.decode_timestep,
            self.transformer.config.min_timestep,
        )
        columns = self.find_genes(adata.var_names)  # (G,)
        matrix = get_matrix(adata, layer, expect_counts=True)
        measured = columns >= 0  # (G,)
        place = sp.csr_matrix(
            (np.ones(measured.sum(), np.float32), (columns[measured], np.flatnonzero(measured))),
            shape=(adata.n_vars, len(columns)),
        )
        counts = sp.csr_matrix(matrix.astype(np.float32) @ place)  # (cells, G)
        obs = self.processor.add_states(adata.obs, counts, measured)
        class_labels = self.prepare_class_labels(obs, use_labels)  # (cells, K)
        if library_size is None:
            library_sizes = self.prepare_library_size(counts, measured, class_labels)  # (cells,)
        else:
            library_sizes = torch.from_numpy(np.broadcast_to(library_size, adata.n_obs).astype(np.float32))
        generator = generator or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        device = self._execution_device
        scheduler = copy.deepcopy(self.scheduler)  # other threads may use the original meanwhile
        if visited is None:
            steps = set_timesteps(scheduler, num_calls, self.config.decode_timestep, device)
        else:
            steps = num_calls, num_calls
        known = torch.from_numpy(measured).to(device)  # (G,)
        layers = {name: np.empty(counts.shape, dtype=np.float32) for name in ("mean", "lower", "upper")}
        drawn = []
        starts = range(0, counts.shape[0], batch_size)
        with self.progress_bar(total=len(starts) * num_draws) as progress_bar:
            for start in starts:
                chunk = slice(start, start + batch_size)
                k, x_0, sizes = read_batch(self.processor, counts[chunk], library_sizes[chunk].numpy(), device)
                labels = class_labels[chunk].to(device)  # (B, K)
                denoiser = Denoiser(self.transformer, scheduler, labels, sizes, step_kwargs={"generator": generator})
                posterior = self.transformer.count_head(labels, sizes)
                mixture = Mixture(k, known, generator)
                for _ in range(num_draws):
                    t, x_t, log_mean = self.draw_cells(denoiser, x_0, known, *steps, visited, generator)
                    mixture.add(posterior, log_mean, x_t)
                    progress_bar.update()
                uniform = draw_uniform(k.shape, generator, device)  # (B, G)
                sample = posterior.sample(*mixture.chosen, t.expand(len(k)), uniform)  # (B, G)
                drawn.append(sp.csr_matrix(torch.where(known, k, sample).cpu().numpy()))
                levels = {"lower": (1 - interval) / 2, "upper": (1 + interval) / 2}
                found = {
                    name: posterior.quantile(mixture.probabilities, torch.full_like(k, q)) for name, q in levels.items()
                }
                for name, values in (found | {"mean": posterior.mean_count(mixture.probabilities)}).items():
                    layers[name][chunk] = torch.where(known, k, values).cpu().numpy()
        self.maybe_free_model_hooks()
        var = pd.DataFrame({"measured": measured}, index=pd.Index(self.processor.var_names))
        if self.processor.gene_ids is not None:
            var["gene_ids"] = self.processor.gene_ids
        obs = adata.obs.assign(library_size=library_sizes.numpy())
        return ad.AnnData(sp.vstack(drawn, format="csr"), obs=obs, var=var, layers=layers)
