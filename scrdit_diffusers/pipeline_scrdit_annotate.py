"""Annotation: which label explains the counts of a measured cell best, and how well."""

from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from .checks import check_label
from .hub import SafePipelineMixin
from .pipeline_scrdit import SCRDiTPipeline
from .processing_scrdit import SCRDiTProcessor
from .sampling import add_noise, check_count_head, check_positive, check_timesteps, read_batch
from .schedulers import default_scheduler
from .transformer_scrdit import SCRDiTTransformer
from .values import normalize_log1p

TIMESTEPS = (999, 800, 700, 600, 500, 400)
TEMPERATURE = 5.0
NUM_GENERATED = 2500  # cells that measured ones are compared with
NUM_CALLS = 8  # of the network for each of these, where the model does not say how many
YARDSTICK = 0.2  # share of these that only say what is usual
GAIN_WEIGHT = 0.5  # of what other genes say, against 1 for the distance
NUM_COMPONENTS, NUM_NEIGHBORS = 50, 5
MIN_GENERATED = 100
TARGET_SUM = 1e4


def standardize(
    values: np.ndarray, library_sizes: np.ndarray, usual: np.ndarray, usual_sizes: np.ndarray
) -> np.ndarray:
    """Express values (cells,) in standard deviations of usual ones (M,) from what is usual for the library size.

    What is usual is a parabola in the logarithm of the library size, beyond that of all usual cells a constant.
    """
    logs = np.log(np.maximum(usual_sizes, 1))
    parabola = np.polynomial.Polynomial.fit(logs, usual, 2 if np.ptp(logs) > 0 else 0)
    spread = np.std(usual - parabola(logs))
    expected = parabola(np.log(np.maximum(library_sizes, 1)).clip(logs.min(), logs.max()))
    return (values - expected) / spread if spread > 0 else np.zeros(len(values))


class SCRDiTAnnotatePipeline(SafePipelineMixin, DiffusionPipeline):
    r"""Labels measured cells by the likelihood of their counts.

    The network sees the cell at several noise levels t, once under each label y, and expects a distribution for each
    gene from all *other* genes. The score of a label is the log-likelihood of the counts under these,

        l(y) = mean_t l_t(y),  l_t(y) = sum_g log p(k_g | x_t without gene g, y, library size)

    a pseudo-likelihood: genes inform each other, and each counts once. At high noise only the label says what to
    expect, and genes count as independent; at low noise the other genes say so too, and little is left to the label. As
    genes are not independent, the posterior of the labels is softmax(l(y) / temperature + log prior(y)).

    A cell unlike all labels is told by what the model does not generate. Two numbers are large for it: its distance to
    the nearest generated cells, and what the other genes say beyond the label, l at the lowest noise minus l at the
    highest. Both are measured in standard deviations of generated cells, the latter of those with the same library
    size; it counts half.

    Parameters
    ----------
    transformer
        The denoiser of a trained pipeline, with a count head.
    processor
        Genes, value transform and labels.

    References
    ----------
    Pseudo-likelihood: Besag 1975, The Statistician 24:179. Classification by the likelihood of a conditional diffusion
    model: Li et al. 2023, arXiv 2303.16203, there by the error of the noise.

    Examples
    --------
    ```python
    annotate = SCRDiTAnnotatePipeline.from_pipe(pipe)  # shares the weights of a loaded SCRDiTPipeline
    table = annotate(adata, generator=torch.manual_seed(0))
    adata.obs["cell_type"] = table["cell_type"]
    ```
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: SCRDiTTransformer, processor: SCRDiTProcessor):
        super().__init__()
        self.register_modules(transformer=transformer, processor=processor)

    def check_inputs(
        self,
        adata: ad.AnnData,
        labels_key: str | None,
        prior: str,
        temperature: float,
        timesteps: Sequence[int],
        batch_size: int,
        num_generated: int = NUM_GENERATED,
    ) -> None:
        """Raise ValueError or TypeError for arguments that [`SCRDiTAnnotatePipeline.__call__`] cannot use."""
        if not isinstance(adata, ad.AnnData):
            raise TypeError(f"adata must be an AnnData of measured cells, got {type(adata).__name__}.")
        check_count_head(self.transformer, self.processor, "annotate")
        if not isinstance(labels_key, str) or labels_key not in self.processor.conditions:
            raise ValueError(
                f"labels_key must name one condition of the model, {self.processor.condition_keys}, got {labels_key!r}."
            )
        if prior not in ("flat", "composition"):
            raise ValueError(f'prior must be "flat" or "composition", got {prior!r}.')
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}.")
        check_timesteps(self.transformer, timesteps)
        check_positive(batch_size=batch_size)
        if num_generated != 0:
            check_positive(num_generated=num_generated)  # a whole number
            if num_generated < MIN_GENERATED:
                raise ValueError(f"num_generated must be at least {MIN_GENERATED}, or 0 for none, got {num_generated}.")

    @torch.no_grad()
    def log_likelihood(
        self,
        adata: ad.AnnData,
        labels_key: str,
        layer: str | None = None,
        timesteps: Sequence[int] = TIMESTEPS,
        generator: torch.Generator | None = None,
        batch_size: int = 256,
    ) -> np.ndarray:
        """Log-likelihood l_t(y) of each cell under each label at each noise level.

        Parameters as in [`SCRDiTAnnotatePipeline.__call__`]. Other conditions of the model are left open.

        Returns
        -------
        Nats, shape (cells, labels, timesteps).
        """
        counts, library_sizes = self.processor.get_counts(adata, layer)  # (cells, G), (cells,)
        codes = np.arange(len(self.processor.conditions[labels_key]))
        labels = np.broadcast_to(codes, (counts.shape[0], len(codes)))
        return self._log_likelihood(counts, library_sizes, labels_key, labels, timesteps, generator, batch_size)

    def _log_likelihood(
        self,
        counts: sp.csr_matrix,
        library_sizes: np.ndarray,
        labels_key: str,
        labels: np.ndarray,
        timesteps: Sequence[int],
        generator: torch.Generator | None,
        batch_size: int,
    ) -> np.ndarray:
        """Log-likelihood of counts (cells, G) under some labels of each cell, codes (cells, labels)."""
        key = list(self.processor.conditions).index(labels_key)
        null = torch.tensor(self.processor.num_classes, dtype=torch.long, device=self._execution_device)  # (K,)
        found = np.zeros((*labels.shape, len(timesteps)))
        starts = range(0, counts.shape[0], batch_size)
        with self.progress_bar(total=len(starts) * len(timesteps)) as progress_bar:
            for start in starts:
                chunk = slice(start, start + batch_size)
                batch = (counts[chunk], library_sizes[chunk])
                k, x_0, library_size = read_batch(self.processor, *batch, null.device)  # (B, G), (B, G), (B,)
                codes = torch.from_numpy(labels[chunk].astype(np.int64)).to(null.device)  # (B, labels)
                for level, timestep in enumerate(timesteps):
                    t = torch.full((len(k),), timestep, device=null.device)  # (B,)
                    noise = randn_tensor(x_0.shape, generator=generator, device=null.device, dtype=torch.float32)
                    for column in range(codes.shape[1]):
                        class_labels = null.repeat(len(k), 1)  # (B, K)
                        class_labels[:, key] = codes[:, column]
                        posterior = self.transformer.count_head(class_labels, library_size)
                        x_t = add_noise(posterior, x_0, t, noise)  # (B, G)
                        output = self.transformer(x_t.to(self.transformer.dtype), t, class_labels, library_size)
                        nll = posterior.nll(k, output.count_log_mean.float()) * k.shape[1]  # (B,)
                        found[chunk, column, level] = -nll.cpu().numpy()
                    progress_bar.update()
        self.maybe_free_model_hooks()
        return found

    @torch.no_grad()
    def _unlikeness(
        self,
        counts: sp.csr_matrix,
        library_sizes: np.ndarray,
        gain: np.ndarray,
        labels_key: str,
        timesteps: Sequence[int],
        generator: torch.Generator | None,
        batch_size: int,
        num_generated: int,
    ) -> np.ndarray:
        """How unlike generated cells measured ones are, shape (cells,), with l at low minus high noise, (cells,)."""
        from sklearn.decomposition import PCA  # here, because other jobs do not need scikit-learn
        from sklearn.neighbors import NearestNeighbors

        config = self.transformer.config
        scheduler = default_scheduler(
            beta_schedule=config.beta_schedule, num_train_timesteps=config.num_train_timesteps
        )
        pipe = SCRDiTPipeline(self.transformer, scheduler, self.processor)
        pipe.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        num_calls = None if config.get("default_timesteps") else NUM_CALLS
        cells = pipe(num_generated, num_inference_steps=num_calls, generator=generator, batch_size=batch_size).adata
        generated, generated_sizes = self.processor.get_counts(cells, None)
        num_usual = round(YARDSTICK * num_generated)

        reference = normalize_log1p(generated[num_usual:], TARGET_SUM).toarray()
        pca = PCA(min(NUM_COMPONENTS, *reference.shape), random_state=0).fit(reference)
        neighbors = NearestNeighbors(n_neighbors=NUM_NEIGHBORS).fit(pca.transform(reference))

        def distance(some: sp.csr_matrix) -> np.ndarray:
            found = []
            for start in range(0, some.shape[0], batch_size):
                log_values = normalize_log1p(some[start : start + batch_size], TARGET_SUM).toarray()
                found.append(neighbors.kneighbors(pca.transform(log_values))[0].mean(axis=1))
            return np.concatenate(found)

        usual, sizes = generated[:num_usual], generated_sizes[:num_usual]
        codes = pd.Index(self.processor.conditions[labels_key]).get_indexer(cells.obs[labels_key].astype(str))
        ends = [min(timesteps), max(timesteps)]
        likelihood = self._log_likelihood(
            usual, sizes, labels_key, codes[:num_usual, None], ends, generator, batch_size
        )[:, 0]  # (usual, 2)
        usual_distance = distance(usual)
        unlikeness = (distance(counts) - usual_distance.mean()) / max(usual_distance.std(), 1e-6)
        return unlikeness + GAIN_WEIGHT * standardize(gain, library_sizes, likelihood[:, 0] - likelihood[:, 1], sizes)

    def __call__(
        self,
        adata: ad.AnnData,
        labels_key: str | None = None,
        layer: str | None = None,
        prior: str = "flat",
        temperature: float = TEMPERATURE,
        timesteps: Sequence[int] = TIMESTEPS,
        generator: torch.Generator | None = None,
        batch_size: int = 256,
        num_generated: int = NUM_GENERATED,
    ) -> pd.DataFrame:
        """Annotate measured cells.

        Parameters
        ----------
        adata
            Cells with at least the model's genes: counts, or log-normalized values if the model was trained on these.
            Labels in `obs` are not looked at.
        labels_key
            Condition of the model to find; `None` takes its only one.
        layer
            Layer that holds the values; `None` takes X.
        prior
            "flat", or "composition" for that of the training cells.
        temperature
            Divides the log-likelihoods; [`SCRDiTAnnotatePipeline.fit_temperature`] finds it on labeled cells. With a
            flat prior it changes the probabilities, not the label.
        timesteps
            Noise levels at which the network sees the cells, each one call of the network for each label.
        generator
            Makes the result reproducible; `None` draws from PyTorch's global state.
        batch_size
            Cells that are annotated at a time; bounds the memory.
        num_generated
            Cells to generate, to which `unlikeness` compares the measured ones; 0 leaves it out (NaN).

        Returns
        -------
        A row per cell, indexed like `adata.obs`: `labels_key` (categorical), `probability` of that label, `unlikeness`
        (the higher, the less the cell is like all that the model generates; in standard deviations of generated cells),
        and a column `p_<label>` for each label.

        Raises
        ------
        ValueError, TypeError
            Genes are missing, values are not what the model was trained on, or an argument does not fit.
        """
        if labels_key is None and len(self.processor.labels_keys) == 1:
            labels_key = self.processor.labels_keys[0]
        self.check_inputs(adata, labels_key, prior, temperature, timesteps, batch_size, num_generated)
        assert labels_key is not None
        likelihood = self.log_likelihood(adata, labels_key, layer, timesteps, generator, batch_size)
        log_posterior = self._log_posterior(likelihood, labels_key, prior, temperature)  # (cells, labels)
        names = self.processor.conditions[labels_key]
        best = log_posterior.argmax(axis=1)
        rows = np.arange(len(best))
        table = pd.DataFrame(np.exp(log_posterior), index=adata.obs_names, columns=[f"p_{name}" for name in names])
        table.insert(0, labels_key, pd.Series(pd.Categorical.from_codes(best, categories=names), table.index))
        table.insert(1, "probability", np.exp(log_posterior[rows, best]))
        unlikeness: np.ndarray | float = np.nan
        if num_generated:
            counts, library_sizes = self.processor.get_counts(adata, layer)
            gain = (
                likelihood[rows, best, np.argmin(timesteps)] - likelihood[rows, best, np.argmax(timesteps)]
            )  # (cells,)
            given = (labels_key, timesteps, generator, batch_size, num_generated)
            unlikeness = self._unlikeness(counts, library_sizes, gain, *given)
        table.insert(2, "unlikeness", unlikeness)
        return table

    def fit_temperature(self, adata: ad.AnnData, labels_key: str, prior: str = "flat", **kwargs) -> float:
        """Find the temperature under which the labels of held-out cells are most probable.

        Parameters
        ----------
        adata
            A few hundred cells that the model was not trained on, with the columns of its conditions in `obs`.
        labels_key
            Condition of the model, column of `adata.obs`.
        prior
            As in [`SCRDiTAnnotatePipeline.__call__`].
        kwargs
            For [`SCRDiTAnnotatePipeline.log_likelihood`].

        References
        ----------
        Guo et al. 2017, arXiv 1706.04599.
        """
        timesteps, batch_size = kwargs.get("timesteps", TIMESTEPS), kwargs.get("batch_size", 256)
        self.check_inputs(adata, labels_key, prior, 1.0, timesteps, batch_size)
        check_label(adata.obs, labels_key, "adata.obs")
        codes = pd.Index(self.processor.conditions[labels_key]).get_indexer(adata.obs[labels_key].map(str))
        if (codes < 0).any():
            unknown = sorted(adata.obs[labels_key][codes < 0].map(str).unique())
            raise ValueError(
                f"adata.obs[{labels_key!r}] has {(codes < 0).sum()} cells with labels unknown to the model: {unknown}."
            )
        likelihood = self.log_likelihood(adata, labels_key, **kwargs)

        def loss(log_temperature: float) -> float:
            log_posterior = self._log_posterior(likelihood, labels_key, prior, np.exp(log_temperature))
            return -log_posterior[np.arange(len(codes)), codes].mean()

        return float(np.exp(minimize_scalar(loss, bounds=(-3, 8), method="bounded").x))

    def _log_posterior(self, likelihood: np.ndarray, labels_key: str, prior: str, temperature: float) -> np.ndarray:
        scores = likelihood.mean(axis=2) / temperature  # (cells, labels)
        if prior == "composition":
            numbers = np.array(list(self.processor.label_counts[labels_key].values()), dtype=float)
            scores += np.log(numbers / numbers.sum())
        return log_softmax(scores, axis=1)
