"""Translation: the same cells under other labels, such as another batch, donor or condition."""

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
from .sampling import (
    check_count_head,
    check_positive,
    check_timesteps,
    draw_uniform,
    expected_log_mean,
    read_batch,
    to_data_values,
)
from .transformer_scrdit import SCRDiTTransformer

TIMESTEPS = (999, 600)


class SCRDiTTranslatePipeline(SafePipelineMixin, DiffusionPipeline):
    r"""Shows what measured cells would be under other labels.

    Each count k of a cell keeps its rank. It goes to the count k' that is as high or low among those expected under the
    target labels as k is among those expected under the cell's own,

        F(k' | y', size', x'_t without the gene) = F(k | y, size, x_t without the gene)

    with the distributions F from the count head and the network. These see the measured cell x and the translated cell
    x' at the noise level of each of `timesteps` in turn: at the highest, labels and library sizes alone speak, and
    lower ones take into account what the other genes say, those of the cell on one side and those of its translation
    on the other. The library size keeps its rank among training cells with the same labels.

    Nothing is drawn anew except the place of a count in its range of ranks: cells that have the target labels come
    back as they are, and a cell unusual for its labels becomes one that is unusual in the same way.

    Parameters
    ----------
    transformer
        The denoiser of a trained pipeline, with a count head.
    processor
        Genes, value transform and labels.

    References
    ----------
    The counterfactual of a structural model (abduction, action, prediction): Pearl 2009, Causality, section 7.1.

    Examples
    --------
    ```python
    translate = SCRDiTTranslatePipeline.from_pipe(pipe)  # shares the weights of a loaded SCRDiTPipeline
    translated = translate(adata, {"batch": "B"}, generator=torch.manual_seed(0))
    ```
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: SCRDiTTransformer, processor: SCRDiTProcessor):
        super().__init__()
        self.register_modules(transformer=transformer, processor=processor)

    def check_inputs(
        self,
        adata: ad.AnnData,
        target: Mapping[str, str | Sequence[str]],
        timesteps: Sequence[int],
        num_draws: int,
        batch_size: int,
    ) -> None:
        """Raise ValueError or TypeError for arguments that [`SCRDiTTranslatePipeline.__call__`] cannot use."""
        if not isinstance(adata, ad.AnnData):
            raise TypeError(f"adata must be an AnnData of measured cells, got {type(adata).__name__}.")
        check_count_head(self.transformer, self.processor, "translate")
        if not isinstance(target, Mapping) or not target:
            raise TypeError(f'target must be a dict such as {{"batch": "B"}}, got {target!r}.')
        conditions = self.processor.conditions
        if unknown := [key for key in target if key not in conditions]:
            raise ValueError(f"target: {unknown} are not conditions of the model: {list(conditions) or 'it has none'}.")
        if missing := [key for key in self.processor.labels_keys if key not in adata.obs]:
            raise ValueError(f"adata.obs has no {missing}: add the labels that the cells are to be translated from.")
        for key, labels in target.items():
            if np.ndim(labels) and len(labels) != adata.n_obs:
                raise ValueError(f"target[{key!r}] lists {len(labels)} labels for {adata.n_obs} cells; give one each.")
        check_positive(num_draws=num_draws, batch_size=batch_size)
        check_timesteps(self.transformer, timesteps)

    def translate_library_size(self, library_sizes: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Find the library sizes with the same rank among training cells with the target labels, shape (cells,).

        Parameters
        ----------
        library_sizes
            Of the measured cells, shape (cells,). One beyond those of the training cells stays as many times beyond.
        source, target
            Labels, shape (cells, K).
        """
        if not self.processor.log_library_sizes:
            return library_sizes
        levels = np.linspace(0, 1, 101)
        log_sizes = np.log(np.maximum(library_sizes, 1))  # (cells,)
        pairs, pair_of_cell = np.unique(np.hstack([source, target]), axis=0, return_inverse=True)
        for i, codes in enumerate(np.split(pairs, 2, axis=1)[0]):
            rows = pair_of_cell.ravel() == i
            before, after = (  # (levels,)
                np.log(self.processor.sample_library_sizes(np.repeat(labels[None], len(levels), axis=0), levels))
                for labels in (codes, pairs[i, source.shape[1] :])
            )
            inside = log_sizes[rows].clip(before[0], before[-1])
            rank = np.interp(inside, before, levels)
            log_sizes[rows] += np.interp(rank, levels, after) - inside
        return np.exp(log_sizes)

    @torch.no_grad()
    def __call__(
        self,
        adata: ad.AnnData,
        target: Mapping[str, str | Sequence[str]],
        layer: str | None = None,
        timesteps: Sequence[int] = TIMESTEPS,
        num_draws: int = 2,
        generator: torch.Generator | None = None,
        batch_size: int = 512,
    ) -> ad.AnnData:
        """Translate measured cells.

        Parameters
        ----------
        adata
            Cells with at least the model's genes, values like the training data's, and in `obs` the labels that they
            have.
        target
            The labels that they are to have, by condition: one for all cells, or one per cell. Other conditions stay.
        layer
            Layer that holds the values; `None` takes X.
        timesteps
            Noise levels at which the network sees the cells, one after the other. `(999,)` goes by labels and library
            size alone and keeps cells closest to what they were; further, lower ones make translated cells more like
            real ones of the target.
        num_draws
            Draws of the noise; each is two calls of the network for each of `timesteps`.
        generator
            Makes the result reproducible; `None` draws from PyTorch's global state.
        batch_size
            Cells that are translated at a time; bounds the memory. Another `batch_size` draws other noise.

        Returns
        -------
        AnnData of the model's genes with the translated cells in `X`, values like the training data's, float32, `var`
        of `adata`, and its `obs` with the target labels.

        Raises
        ------
        ValueError, TypeError
            Genes or labels are missing or unknown, or values are not what the model was trained on; raised before any
            computation.
        """
        self.check_inputs(adata, target, timesteps, num_draws, batch_size)
        obs = adata.obs.copy()
        for key, labels in target.items():
            known = self.processor.conditions[key]
            column = pd.Series(labels if np.ndim(labels) == 0 else list(labels), obs.index, dtype=object)
            # Left as they are, encode_labels names the unknown one.
            obs[key] = pd.Categorical(column, categories=known) if column.isin(known).all() else column
        counts, library_sizes = self.processor.get_counts(adata, layer)  # (cells, G), (cells,)
        tables = (self.processor.add_states(table, counts) for table in (adata.obs, obs))
        source, goal = map(self.processor.encode_labels, tables)  # (cells, K)
        new_sizes = self.translate_library_size(library_sizes, source, goal)  # (cells,)
        changed = torch.from_numpy((source != goal).any(axis=1))  # (cells,)
        generator = generator or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        device = self._execution_device
        translated = []
        starts = range(0, counts.shape[0], batch_size)
        with self.progress_bar(total=len(starts) * len(timesteps)) as progress_bar:
            for start in starts:
                chunk = slice(start, start + batch_size)
                k, x_0, size = read_batch(self.processor, counts[chunk], library_sizes[chunk], device)
                new_size = torch.from_numpy(new_sizes[chunk]).to(device, torch.float32)  # (B,)
                before, after = (torch.from_numpy(codes[chunk]).to(device) for codes in (source, goal))  # (B, K)
                heads = [self.transformer.count_head(*given) for given in ((before, size), (after, new_size))]
                place = draw_uniform(k.shape, generator, device)  # (B, G)
                new, new_x_0 = k, x_0  # (B, G)
                for timestep in timesteps:
                    noise = [
                        randn_tensor(k.shape, generator=generator, device=device, dtype=torch.float32)  # (B, G)
                        for _ in range(num_draws)
                    ]
                    expected = [
                        head.probabilities(expected_log_mean(self.transformer, head, x, timestep, *given, noise))
                        for head, x, given in zip(
                            heads, (x_0, new_x_0), ((before, size), (after, new_size)), strict=True
                        )
                    ]
                    scores = heads[0].scores(expected[0], k, place)  # (B, G)
                    new = heads[1].at_scores(expected[1], scores)  # (B, G)
                    new = torch.where(changed[chunk, None].to(device), new, k)  # (B, G)
                    new_x_0 = torch.from_numpy(self.processor.transform(new.cpu().numpy())).to(x_0)  # (B, G)
                    progress_bar.update()
                translated.append(sp.csr_matrix(new.cpu().numpy()))
        self.maybe_free_model_hooks()
        empty = sp.csr_matrix((0, self.processor.num_genes), dtype=np.float32)
        values = sp.vstack([empty, *translated], format="csr")  # (cells, G)
        var = adata.var.iloc[self.processor.gene_columns(adata.var_names)].copy()
        return ad.AnnData(to_data_values(self.processor, values, new_sizes), obs=obs, var=var)
