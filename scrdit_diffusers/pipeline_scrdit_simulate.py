"""Simulation with known truth: generated cells whose differences between groups were planted."""

import copy
import difflib
from collections.abc import Mapping, Sequence

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from .hub import SafePipelineMixin
from .pipeline_scrdit import SCRDiTPipeline
from .processing_scrdit import SCRDiTProcessor
from .sampling import Denoiser, cells_to_anndata, check_count_head, check_positive, choose_batch_size, draw_uniform
from .transformer_scrdit import SCRDiTTransformer

Effects = Mapping[str, Mapping[str, float]]  # group: gene: log2 fold change


def draw_effects(
    genes: Sequence[str], groups: Sequence[str], num_genes: int, std: float = 1.0, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Draw effects for [`SCRDiTSimulatePipeline`]: normal log2 fold changes of genes chosen at random.

    Parameters
    ----------
    genes
        Genes to choose from, such as those expressed well enough to be tested.
    groups
        Each gets its own genes and effects.
    num_genes
        How many genes change in a group.
    std
        Standard deviation of the log2 fold changes.
    seed
        Seed of the choice and of the effects.

    Raises
    ------
    ValueError
        `num_genes` exceeds the number of genes.
    TypeError
        `groups` is a single name.
    """
    if isinstance(groups, str):
        raise TypeError(f"groups must be a list of names, got the text {groups!r}; write [{groups!r}].")
    if not 0 <= num_genes <= len(genes):
        raise ValueError(f"num_genes must be from 0 to the {len(genes)} genes given, got {num_genes}.")
    rng = np.random.default_rng(seed)
    return {
        group: dict(zip(rng.choice(list(genes), num_genes, replace=False), rng.normal(0, std, num_genes), strict=True))
        for group in groups
    }


class SCRDiTSimulatePipeline(SafePipelineMixin, DiffusionPipeline):
    r"""Generates cells of a designed experiment, with planted and therefore known effects.

    Cells of every group are first generated alike. Each count k of gene g in a cell of group j is then thinned,

        count ~ Binomial(k, b_g f_gj),  b_g = 1 / max(1, max_j f_gj)

    with fold change f_gj (1 where nothing is planted). So unchanged genes are left as they were generated, a gene that
    rises in some group has its natural level in the group where it is highest and less in the others (a baseline b_g
    below 1), and the mean of a changed gene is exactly f_gj times its baseline.

    With `max_factor` above 1, cells are generated with F times the library size that was asked for, F being the largest
    fold change or `max_factor` if that is smaller, and every count is thinned to 1 / F more: then
    b_g = min(1, F / max_j f_gj), so that fewer genes have a lowered baseline, but what remains is the profile of
    larger cells, which differ from cells of the library size that was asked for.

    Parameters
    ----------
    transformer, scheduler, processor
        Those of a trained pipeline with a count head.

    References
    ----------
    Binomial thinning: Gerard 2020, BMC Bioinformatics 21:206 (seqgendiff).

    Examples
    --------
    ```python
    simulate = SCRDiTSimulatePipeline.from_pipe(pipe)  # shares the weights of a loaded SCRDiTPipeline
    design = pd.DataFrame({"cell_type": "B", "group": ["control"] * 500 + ["treated"] * 500})
    adata = simulate(design, {"treated": {"CD79A": 1.0, "MS4A1": -0.5}}, generator=torch.manual_seed(0))
    adata.varm["log2_fold_change"], adata.layers["mean"]  # the truth
    ```
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: SCRDiTTransformer, scheduler: SchedulerMixin, processor: SCRDiTProcessor):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, processor=processor)

    def check_inputs(
        self, obs: pd.DataFrame, effects: Effects, group_key: str, max_factor: float, batch_size: int | None
    ) -> None:
        """Raise ValueError or TypeError for arguments that [`SCRDiTSimulatePipeline.__call__`] cannot use."""
        check_count_head(self.transformer, self.processor, "simulate")
        if not isinstance(obs, pd.DataFrame) or obs.empty:
            raise TypeError(f"obs must be a table with one row per cell to simulate, got {type(obs).__name__}.")
        missing = [key for key in self.processor.labels_keys if key not in obs]
        if missing:
            raise ValueError(f"obs has no {missing}: give each cell a label of {list(self.processor.conditions)}.")
        if not isinstance(effects, Mapping) or not all(isinstance(of_group, Mapping) for of_group in effects.values()):
            raise TypeError(
                'effects must give log2 fold changes by gene for each group, as {"treated": {"CD79A": 1.0}} does, or '
                f"be {{}} for none; got {type(effects).__name__} {effects!r:.60}."
            )
        if effects and group_key not in obs:
            raise ValueError(f"group_key: obs has no column {group_key!r}, only {list(obs.columns)}.")
        if unknown := [group for group in effects if group not in set(obs[group_key].map(str))]:
            groups = sorted(set(obs[group_key].map(str)))
            raise ValueError(f"effects: obs[{group_key!r}] has no group {unknown}, only {groups}.")
        for group, changes in effects.items():
            if absent := [gene for gene in changes if gene not in self.processor.var_names]:
                known = list(map(str, self.processor.var_names))
                closest = difflib.get_close_matches(str(absent[0]), known, n=1)
                meant = f", did you mean {closest[0]!r}?" if closest else "."
                raise ValueError(
                    f"effects[{group!r}]: {len(absent)} genes are not the model's, such as {absent[:5]}{meant}"
                )
            if bad := {gene: value for gene, value in changes.items() if not np.isfinite(value)}:
                raise ValueError(f"effects[{group!r}] must be finite log2 fold changes, got {bad}.")
        if not 1 <= max_factor < np.inf:
            raise ValueError(f"max_factor must be at least 1, got {max_factor!r}.")
        if batch_size is not None:
            check_positive(batch_size=batch_size)

    def fold_changes(self, effects: Effects) -> pd.DataFrame:
        """Log2 fold change of each gene in each group with effects, shape (G, groups)."""
        table = pd.DataFrame(0.0, index=pd.Index(self.processor.var_names), columns=list(effects))
        for group, changes in effects.items():
            table.loc[list(changes), group] = list(changes.values())
        return table

    @torch.no_grad()
    def __call__(
        self,
        obs: pd.DataFrame,
        effects: Effects,
        group_key: str = "group",
        library_size: float | Sequence[float] | None = None,
        max_factor: float = 1.0,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> ad.AnnData:
        """Simulate an experiment.

        Parameters
        ----------
        obs
            The design: a row for each cell with its labels, its group and whatever else is to be kept (donor, batch).
        effects
            Log2 fold changes by group and gene; groups that are not named, such as the control, have none.
            [`draw_effects`] draws some; `{}` simulates the null hypothesis.
        group_key
            Column of `obs` that holds the group.
        library_size
            Total count over the model's genes before effects, one number or one per cell; `None` draws it from the
            training cells with the same labels.
        max_factor
            Largest F. More than 1 lowers the baseline of fewer genes, but makes cells easier to tell from real ones.
        num_inference_steps
            As in [`SCRDiTPipeline.__call__`].
        generator
            Makes the result reproducible; `None` draws from PyTorch's global state.
        batch_size
            Cells that are generated at a time; bounds the memory.

        Returns
        -------
        AnnData with counts in `X` and `layers["counts"]`, the columns of `obs`, and the truth: `layers["mean"]`, each
        cell's expected count of each gene, float32; `varm["log2_fold_change"]`, a column per group with effects;
        `var["changed"]`; and `var["baseline"]`, b_g, float64: below 1 for genes whose mean was lowered in all groups.

        Raises
        ------
        ValueError, TypeError
            Labels, groups or genes are unknown or missing; raised before any computation.
        """
        self.check_inputs(obs, effects, group_key, max_factor, batch_size)
        table = self.fold_changes(effects)  # (G, groups)
        generator = generator or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        scheduler = copy.deepcopy(self.scheduler)  # other threads may use the original meanwhile
        generate = SCRDiTPipeline(self.transformer, scheduler, self.processor)
        generate.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        if library_size is not None:
            generate._check_library_size(len(obs), library_size)

        # 1. Noisy cells, of F times the library size, from which counts can be drawn
        class_labels = generate.prepare_class_labels(len(obs), None, obs, generator)  # (cells, K)
        asked = generate.prepare_library_size(library_size, class_labels, generator)  # (cells,)
        assert asked is not None
        largest = 2.0 ** table.to_numpy().max(axis=1, initial=0.0)  # (G,), of all groups
        factor = min(largest.max(), max_factor)  # F
        baseline = np.minimum(1.0, factor / largest)  # (G,)
        sizes = asked * factor  # (cells,)
        options = dict(num_inference_steps=num_inference_steps, generator=generator, batch_size=batch_size)
        noisy = generate(obs=obs, library_size=sizes.tolist(), output_type="latent", **options).samples  # (cells, G)
        t = scheduler.timesteps[generate.num_timesteps - 1]

        # 2. Their counts and means, thinned to what was asked for
        lowered = torch.from_numpy(baseline).float()  # (G,)
        probability = (lowered / factor).repeat(len(obs), 1)  # (cells, G)
        for group in table:
            fold_change = torch.from_numpy(2.0 ** table[group].to_numpy()).float()  # (G,)
            chosen = (obs[group_key].map(str) == group).to_numpy(copy=True)  # pandas 3 shows it read-only
            probability[chosen] = (fold_change * lowered / factor).clamp(max=1)
        means = np.empty(noisy.shape, dtype=np.float32)
        counts = []
        batch_size = batch_size or choose_batch_size(self.transformer.config.num_genes)
        for start in range(0, len(obs), batch_size):
            chunk = slice(start, start + batch_size)
            x_t, p = noisy[chunk], probability[chunk].to(noisy.device)  # (B, G)
            denoiser = Denoiser(
                self.transformer,
                scheduler,
                class_labels[chunk].to(x_t.device),
                sizes[chunk].to(x_t.device),
                autocast_dtype=generate.choose_autocast_dtype(),
            )
            output = denoiser.predict(x_t, t)
            drawn = denoiser.draw_counts(output, t, x_t, draw_uniform(x_t.shape, generator, x_t.device))  # (B, G)
            means[chunk] = (denoiser.mean_counts(output, t, x_t) * p).cpu().numpy()
            thinned = torch.binomial(drawn.double().cpu(), p.double().cpu(), generator=generator)  # (B, G)
            counts.append(sp.csr_matrix(thinned.float().numpy()))

        # 3. AnnData with the truth
        provenance = generate.describe_run(generate.num_timesteps, 1.0, 0.0, float(t), generator)
        provenance["model"] = str(self.config.get("_name_or_path") or "")
        kept = obs.drop(columns="synthetic", errors="ignore").set_axis(obs.index.astype(str))
        adata = cells_to_anndata(self.processor, sp.vstack(counts, format="csr"), kept, asked.numpy(), provenance)
        adata.layers["mean"] = means
        adata.varm["log2_fold_change"] = table
        adata.var["changed"], adata.var["baseline"] = (table != 0).any(axis=1), baseline
        return adata
