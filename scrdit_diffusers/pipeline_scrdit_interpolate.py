"""Interpolation: a path from one measured cell or label to another."""

from collections.abc import Mapping, Sequence

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from .hub import SafePipelineMixin
from .processing_scrdit import SCRDiTProcessor
from .sampling import check_count_head, check_positive, draw_uniform, expected_log_mean, read_batch, to_data_values
from .transformer_scrdit import SCRDiTTransformer


class SCRDiTInterpolatePipeline(SafePipelineMixin, DiffusionPipeline):
    r"""Makes the cells between measured cells, or between a cell and itself under other labels.

    Each count of the cells a and b at the ends has a normal score z, which says how high or low it is among those that
    labels and library size let expect. At position w, from 0 to 1, both are mixed,

        z_w = ((1 - w) z_a + w z_b) / sqrt((1 - w)^2 + w^2)
        p_w(k) ~ p_a(k)^(1 - w) p_b(k)^w

    and the count is the one with score z_w in p_w, with p_a and p_b at the geometric mean of the library sizes. The
    scores are spread at every position as those of real cells are, which the mean of two cells is not.

    Parameters
    ----------
    transformer
        The denoiser of a trained pipeline, with a count head.
    processor
        Genes, value transform and labels.

    References
    ----------
    Interpolation of noise, there of pictures: Song et al. 2020, arXiv 2010.02502, section 5.3.

    Examples
    --------
    ```python
    interpolate = SCRDiTInterpolatePipeline.from_pipe(pipe)  # shares the weights of a loaded SCRDiTPipeline
    path = interpolate(progenitors, neurons, positions=(0, 0.25, 0.5, 0.75, 1), generator=torch.manual_seed(0))
    path[path.obs["position"] == 0.5]
    ```
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: SCRDiTTransformer, processor: SCRDiTProcessor):
        super().__init__()
        self.register_modules(transformer=transformer, processor=processor)

    def check_inputs(
        self,
        start: ad.AnnData,
        end: ad.AnnData | Mapping[str, str],
        positions: Sequence[float],
        num_draws: int,
        batch_size: int,
    ) -> None:
        """Raise ValueError or TypeError for arguments that [`SCRDiTInterpolatePipeline.__call__`] cannot use."""
        check_count_head(self.transformer, self.processor, "interpolate")
        if not isinstance(start, ad.AnnData):
            raise TypeError(f"start must be an AnnData of measured cells, got {type(start).__name__}.")
        if not isinstance(end, (ad.AnnData, Mapping)) or (isinstance(end, Mapping) and not end):
            raise TypeError(f"end must be an AnnData of measured cells or a dict of labels, got {end!r}.")
        if isinstance(end, ad.AnnData) and end.n_obs != start.n_obs:
            raise ValueError(f"end has {end.n_obs} cells for the {start.n_obs} of start; give one for each.")
        conditions, labels_keys = self.processor.conditions, self.processor.labels_keys
        for name, cells in {"start": start, "end": end}.items():
            if isinstance(cells, ad.AnnData) and (missing := [key for key in labels_keys if key not in cells.obs]):
                raise ValueError(f"{name}.obs has no {missing}: add the labels of the cells.")
        if isinstance(end, Mapping) and (unknown := [key for key in end if key not in conditions]):
            raise ValueError(f"end: {unknown} are not conditions of the model: {list(conditions) or 'it has none'}.")
        if not isinstance(positions, Sequence | np.ndarray):
            raise TypeError(
                f"positions must be a list from 0 (start) to 1 (end), such as (0, 0.5, 1), got {positions!r}."
            )
        if not len(positions) or not all(0 <= position <= 1 for position in positions):
            raise ValueError(f"positions must be from 0 (start) to 1 (end), got {list(positions)}.")
        check_positive(num_draws=num_draws, batch_size=batch_size)

    @torch.no_grad()
    def __call__(
        self,
        start: ad.AnnData,
        end: ad.AnnData | Mapping[str, str],
        layer: str | None = None,
        positions: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        num_draws: int = 2,
        generator: torch.Generator | None = None,
        batch_size: int = 512,
    ) -> ad.AnnData:
        """Make a path for each cell.

        Parameters
        ----------
        start
            Cells with at least the model's genes, values like the training data's, and their labels in `obs`.
        end
            As many cells, to each of which the path of the cell in the same row leads; or labels by condition, and each
            path leads to the cell as it would be under these, with the library size it has.
        layer
            Layer that holds the values; `None` takes X.
        positions
            Places on the path: 0 is the start, 1 the end.
        num_draws
            Draws of the noise; each is one call of the network for each end, and two for each position.
        generator
            Makes the result reproducible; `None` draws from PyTorch's global state.
        batch_size
            Paths that are made at a time; bounds the memory. Another `batch_size` draws other noise.

        Returns
        -------
        AnnData of the model's genes, position after position: cells in `X`, values like the training data's, float32;
        `obs["position"]`, float64, and `obs["start"]` and, between cells, `obs["end"]`, the names of the cells at the
        ends. Measured cells are at positions 0 and 1.

        Raises
        ------
        ValueError, TypeError
            Genes or labels are missing or unknown, or values are not what the model was trained on; raised before any
            computation.
        """
        self.check_inputs(start, end, positions, num_draws, batch_size)
        ends = [start, end if isinstance(end, ad.AnnData) else start]
        tables = [start.obs, end.obs if isinstance(end, ad.AnnData) else start.obs.assign(**end)]
        cells = [self.processor.get_counts(adata, layer) for adata in ends]  # (cells, G) and (cells,)
        tables = [self.processor.add_states(table, counts) for table, (counts, _) in zip(tables, cells, strict=True)]
        codes = [torch.from_numpy(self.processor.encode_labels(table)) for table in tables]  # (cells, K)
        generator = generator or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        device = self._execution_device
        last = self.transformer.config.num_train_timesteps - 1  # where nothing of the cell is left
        parts: list[list] = [[] for _ in positions]
        starts = range(0, start.n_obs, batch_size)
        with self.progress_bar(total=len(starts) * len(positions)) as progress_bar:
            for first in starts:
                chunk = slice(first, first + batch_size)
                batches = [read_batch(self.processor, k[chunk], sizes[chunk], device) for k, sizes in cells]
                labels = [code[chunk].to(device) for code in codes]  # (B, K)
                shape = batches[0][0].shape
                place = draw_uniform(shape, generator, device)  # (B, G)
                noise = [
                    randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
                    for _ in range(num_draws)
                ]
                scores = []
                for i, (k, x_0, size) in enumerate(batches):
                    known = labels[i] if isinstance(end, ad.AnnData) else labels[0]  # (B, K), of the measured cell
                    posterior = self.transformer.count_head(known, size)
                    log_mean = expected_log_mean(self.transformer, posterior, x_0, last, known, size, noise)  # (B, G)
                    scores.append(posterior.scores(posterior.probabilities(log_mean), k, place))  # (B, G)
                for w, part in zip(positions, parts, strict=True):
                    size = batches[0][2] ** (1 - w) * batches[1][2] ** w  # (B,)
                    logits = []
                    for (_, x_0, _), label in zip(batches, labels, strict=True):
                        posterior = self.transformer.count_head(label, size)
                        log_mean = expected_log_mean(self.transformer, posterior, x_0, last, label, size, noise)
                        logits.append(posterior.logits(log_mean))
                    mixed = [torch.lerp(a, b, float(w)).softmax(dim=1) for a, b in zip(*logits, strict=True)]
                    score = torch.lerp(scores[0], scores[1], float(w))  # (B, G)
                    if isinstance(end, ad.AnnData):  # the scores at the ends are independent
                        score /= np.hypot(1 - w, w)
                    part.append(sp.csr_matrix(posterior.at_scores(mixed, score).cpu().numpy()))
                    progress_bar.update()
        self.maybe_free_model_hooks()
        return self.make_output(start, end, cells, positions, parts)

    def make_output(
        self,
        start: ad.AnnData,
        end: ad.AnnData | Mapping[str, str],
        cells: list[tuple[sp.csr_matrix, np.ndarray]],
        positions: Sequence[float],
        parts: list[list],
    ) -> ad.AnnData:
        """Join the batches of counts at each position, with measured cells at the ends that have them."""
        values, sizes, tables = [], [], []
        (first, size_of_first), (last, size_of_last) = cells
        for w, part in zip(positions, parts, strict=True):
            measured = first if w == 0 else last if w == 1 and isinstance(end, ad.AnnData) else None
            empty = sp.csr_matrix((0, self.processor.num_genes), dtype=np.float32)
            values.append(sp.vstack([empty, *part], format="csr") if measured is None else measured)
            sizes.append(size_of_first ** (1 - w) * size_of_last**w)
            table = pd.DataFrame({"position": float(w), "start": start.obs_names})
            if isinstance(end, ad.AnnData):
                table["end"] = end.obs_names
            tables.append(table)
        obs = pd.concat(tables, ignore_index=True)
        obs.index = [f"path_{i}" for i in range(len(obs))]
        var = start.var.iloc[self.processor.gene_columns(start.var_names)].copy()
        matrix = sp.vstack(values, format="csr").astype(np.float32)  # (positions x cells, G)
        return ad.AnnData(to_data_values(self.processor, matrix, np.concatenate(sizes)), obs=obs, var=var)
