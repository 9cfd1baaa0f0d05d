"""Denoising: what a measured cell expresses, without the chance of counting."""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from .hub import SafePipelineMixin
from .processing_scrdit import SCRDiTProcessor
from .sampling import add_noise, check_count_head, check_finite, check_positive, read_batch
from .transformer_scrdit import SCRDiTTransformer


class SCRDiTDenoisePipeline(SafePipelineMixin, DiffusionPipeline):
    r"""Estimates the expression rates behind the counts of measured cells.

    The network sees the cell at the noise level of `timestep` and says, for each gene, which mean count mu the other
    genes, the labels and the library size let expect, and how far cells scatter around it, theta. The gene's own count
    k adds what it says: the rate is the posterior mean of a gamma distribution with shape theta and mean mu, given a
    Poisson count,

        rate = mu (k + theta) / (mu + theta)

    and mu is the geometric mean over `num_draws` draws of the noise.

    Parameters
    ----------
    transformer
        The denoiser of a trained pipeline, with a count head.
    processor
        Genes, value transform and labels.

    Examples
    --------
    ```python
    denoise = SCRDiTDenoisePipeline.from_pipe(pipe)  # shares the weights of a loaded SCRDiTPipeline
    adata = denoise(adata, generator=torch.manual_seed(0))
    adata.layers["denoised"]
    ```
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: SCRDiTTransformer, processor: SCRDiTProcessor):
        super().__init__()
        self.register_modules(transformer=transformer, processor=processor)

    def check_inputs(self, adata: ad.AnnData, use_labels: bool, timestep: int, num_draws: int, batch_size: int) -> None:
        """Raise ValueError or TypeError for arguments that [`SCRDiTDenoisePipeline.__call__`] cannot use."""
        if not isinstance(adata, ad.AnnData):
            raise TypeError(f"adata must be an AnnData of measured cells, got {type(adata).__name__}.")
        check_count_head(self.transformer, self.processor, "denoise")
        check_positive(num_draws=num_draws, batch_size=batch_size)
        first, last = self.transformer.config.min_timestep, self.transformer.config.num_train_timesteps - 1
        if not first <= timestep <= last:
            raise ValueError(f"timestep must be from {first} to {last}, as in training, got {timestep!r}.")
        missing = [key for key in self.processor.labels_keys if key not in adata.obs]
        if use_labels and missing:
            raise ValueError(f"adata.obs has no {missing}: add the labels, or denoise without by use_labels=False.")

    def prepare_class_labels(self, obs: pd.DataFrame, use_labels: bool) -> torch.Tensor:
        """Encode the labels of `obs`, or "no label" for every cell, shape (cells, K)."""
        if use_labels:
            return torch.from_numpy(self.processor.encode_labels(obs))
        return torch.tensor(self.processor.num_classes, dtype=torch.long).repeat(len(obs), 1)

    @torch.no_grad()
    def __call__(
        self,
        adata: ad.AnnData,
        layer: str | None = None,
        use_labels: bool = True,
        timestep: int = 400,
        num_draws: int = 4,
        generator: torch.Generator | None = None,
        batch_size: int = 512,
    ) -> ad.AnnData:
        """Denoise measured cells.

        Parameters
        ----------
        adata
            Cells with at least the model's genes: counts, or log-normalized values if the model was trained on these.
        layer
            Layer that holds the values; `None` takes X.
        use_labels
            Condition on the labels in `adata.obs`, in the columns that the model was trained on. False denoises each
            cell by its counts alone.
        timestep
            Noise level at which the network sees the cells.
        num_draws
            Draws of the noise; each is one call of the network.
        generator
            Makes the result reproducible; `None` draws from PyTorch's global state.
        batch_size
            Cells that are denoised at a time; bounds the memory. Another `batch_size` draws other noise.

        Returns
        -------
        AnnData of the model's genes with `obs` of `adata`, the counts in `X` and, in `layers["denoised"]`, expected
        counts at each cell's own library size, float32, shape (cells, G).

        Raises
        ------
        ValueError, TypeError
            Genes or labels are missing or unknown, or the values are not what the model was trained on; raised before
            any computation.
        """
        self.check_inputs(adata, use_labels, timestep, num_draws, batch_size)
        counts, library_sizes = self.processor.get_counts(adata, layer)  # (cells, G), (cells,)
        class_labels = self.prepare_class_labels(self.processor.add_states(adata.obs, counts), use_labels)  # (cells, K)
        rates = np.empty(counts.shape, dtype=np.float32)
        starts = range(0, counts.shape[0], batch_size)
        with self.progress_bar(total=len(starts) * num_draws) as progress_bar:
            for start in starts:
                chunk = slice(start, start + batch_size)
                device = self._execution_device
                batch = (counts[chunk], library_sizes[chunk])
                k, x_0, library_size = read_batch(self.processor, *batch, device)  # (B, G), (B, G), (B,)
                labels = class_labels[chunk].to(device)  # (B, K)
                posterior = self.transformer.count_head(labels, library_size)
                t = torch.full((len(k),), timestep, device=device)  # (B,)
                log_mean = torch.zeros_like(k)  # (B, G)
                for _ in range(num_draws):
                    noise = randn_tensor(x_0.shape, generator=generator, device=device, dtype=torch.float32)  # (B, G)
                    x_t = add_noise(posterior, x_0, t, noise)  # (B, G)
                    output = self.transformer(x_t.to(self.transformer.dtype), t, labels, library_size)
                    log_mean += output.count_log_mean.float() / num_draws
                    progress_bar.update()
                check_finite(log_mean)
                mu, theta = log_mean.exp(), posterior.log_dispersion.exp()  # (B, G)
                rates[chunk] = (mu * (k + theta) / (mu + theta)).cpu().numpy()
        self.maybe_free_model_hooks()
        var = adata.var.iloc[self.processor.gene_columns(adata.var_names)].copy()
        return ad.AnnData(
            sp.csr_matrix(counts, dtype=np.float32), obs=adata.obs.copy(), var=var, layers={"denoised": rates}
        )
