"""Fine-tuning of a pretrained pipeline on cells with other genes and labels, in full or with LoRA.

Known genes keep their place and with it their weights, mean and standard deviation; new genes take the places of genes
that the new cells lack. New weights start neutral, so that training starts from what the pretrained model predicts for
the known genes. A new label starts as the known label that fits its cells best.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from diffusers import DDPMScheduler

from .cells.moments import CellMoments
from .checks import NUMBER, check_spellings, explain_missing
from .count_head import LABEL_TABLES
from .initialization import count_bins, initialize_from_cells
from .objective import diffusion_loss
from .pipeline_scrdit import SCRDiTPipeline
from .processing_scrdit import SCRDiTProcessor
from .transformer_scrdit import SCRDiTTransformer

logger = logging.getLogger(__name__)

# Weights with a row for each gene, as views with the genes first.
GENE_ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cell_embed.weight": lambda tensor: tensor.T,
    "cell_out.weight": lambda tensor: tensor,
    "cell_out.bias": lambda tensor: tensor,
}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "adaln", "adaln_out"]


def check_settings(pretrained: SCRDiTPipeline, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if training settings differ from those of the pretrained pipeline.

    Parameters
    ----------
    pretrained
        The pipeline to start from.
    settings
        Command-line arguments by name: transform of the values, noise process, decoding and size of the model. `None`
        takes the pipeline's size.
    """
    processor, config = pretrained.processor, pretrained.transformer.config
    has = {name: getattr(processor, name) for name in ("value_space", "target_sum", "zero_negation", "zero_value")}
    has |= {name: pretrained.scheduler.config[name] for name in ("prediction_type", "beta_schedule")}
    has |= {"num_train_timesteps": pretrained.scheduler.config.num_train_timesteps}
    has |= {"decode": "posterior" if pretrained.transformer.count_head is not None else "round"}
    sizes = (
        "patch_size",
        "patch_embed_type",
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "num_cell_tokens",
    )
    has |= {name: config[name] for name in sizes}
    wrong = {name: has[name] for name, value in settings.items() if name in has and value not in (None, has[name])}
    if processor.target_sum != settings.get("target_sum"):
        wrong["target_sum"] = processor.target_sum
    if wrong:
        given = ", ".join(f"--{name} {settings[name]}" for name in wrong)
        needed = " ".join(f"--{name} {value}" if value is not None else f"no --{name}" for name, value in wrong.items())
        raise ValueError(f"The pretrained pipeline was trained otherwise than {given}: give {needed}.")


def choose_genes(
    pretrained: Sequence[str], var_names: Sequence[str], variable: SCRDiTProcessor, n_top_genes: int
) -> list[str]:
    """Choose the genes to fine-tune on: those of the pretrained model that the data has, then variable others.

    Parameters
    ----------
    pretrained
        Genes of the pretrained model.
    var_names
        Genes of the new data.
    variable
        Processor fitted to the new data, with variable genes of its own. Those that the pretrained model lacks are
        taken by decreasing standard deviation, then mean.
    n_top_genes
        Number of genes to choose.

    Raises
    ------
    ValueError
        The model and the data share more than `n_top_genes` genes.
    """
    known, measured = set(pretrained), set(var_names)
    matched = [gene for gene in pretrained if gene in measured]
    if len(matched) > n_top_genes:
        raise ValueError(
            f"The pretrained model and the data have {len(matched)} genes in common, more than n_top_genes="
            f"{n_top_genes}; raise it, or name the genes to keep."
        )
    others = [i for i in np.lexsort((-variable.mean, -variable.std)) if variable.var_names[i] not in known]
    return matched + [variable.var_names[i] for i in others[: n_top_genes - len(matched)]]


def check_common_genes(pretrained: Sequence[str], genes: Sequence[str]) -> None:
    """Raise ValueError if no gene is one of the pretrained model's."""
    if not set(pretrained) & set(genes):
        raise ValueError(
            f"No gene is common: the pretrained model has names such as {list(pretrained[:3])}, the data "
            f"{[str(gene) for gene in genes[:3]]}. Rename adata.var_names, or train from scratch."
        )
    missing = sorted(set(pretrained) - set(genes))
    if len(missing) > len(pretrained) / 2:
        logger.warning(
            "%d of the pretrained model's %d genes are not in the data, and their weights are lost.%s",
            len(missing),
            len(pretrained),
            explain_missing(missing, genes) or " Training from scratch may be as good.",
        )
    if all(NUMBER.fullmatch(gene) for gene in pretrained):
        logger.warning(
            "The genes of the pretrained model are called by numbers such as %s: are they those of the data?",
            pretrained[0],
        )


def arrange_genes(pretrained: Sequence[str], genes: Sequence[str]) -> list[str]:
    """Order genes so that known ones keep their place in the pretrained model, and with it their weights.

    New genes fill the places of pretrained genes that are not among `genes`; the rest follow at the end. If there are
    too few, the last known genes move into the gaps.
    """
    known, wanted = set(pretrained), set(genes)
    new = iter([gene for gene in genes if gene not in known])
    places = [gene if gene in wanted else next(new, None) for gene in pretrained]
    places += list(new)
    for i in range(len(places)):
        while i < len(places) and places[i] is None:
            places[i] = places[-1]
            places.pop()
    return [gene for gene in places if gene is not None]


def adapt_processor(pretrained: SCRDiTProcessor, fitted: SCRDiTProcessor, keep_labels: bool = False) -> SCRDiTProcessor:
    """Make a processor of the new cells that fits the pretrained weights.

    Known genes get the pretrained mean and standard deviation, so that the network sees a count as in its training.
    Within a condition of the same name, known labels come first, in the pretrained order.

    Parameters
    ----------
    pretrained
        Processor of the pretrained pipeline.
    fitted
        Processor fitted to the new cells, its genes in the order of [`arrange_genes`].
    keep_labels
        Also keep known labels that the new cells lack, for a frozen network, which still knows them.

    Returns
    -------
    The processor to train with. Its composition and library sizes are those of the new cells.

    Raises
    ------
    ValueError
        Either processor has a `value_step`: its values are not log1p of scaled counts. Or the new cells spell a known
        label differently.
    """
    if pretrained.value_step is not None or fitted.value_step is not None:
        raise ValueError(
            "value_step: values that are not log1p of scaled counts cannot be fine-tuned on; train from scratch."
        )
    before = pretrained.conditions
    categories = []
    composition = np.array(fitted.composition, dtype=np.int64)  # (combinations, K + 1)
    for k, (key, names) in enumerate(fitted.conditions.items()):
        check_spellings(key, {"the new cells": names, "the pretrained model": before.get(key, [])})
        known = [name for name in before.get(key, []) if keep_labels or name in names]
        categories.append(known + [name for name in names if name not in known])
        composition[:, k] = pd.Index(categories[k]).get_indexer(pd.Index(names))[composition[:, k]]
    mean, std = fitted.mean.copy(), fitted.std.copy()
    position = pd.Index(pretrained.var_names).get_indexer(pd.Index(fitted.var_names))  # (G,), -1 for new genes
    mean[position >= 0] = pretrained.mean[position[position >= 0]]
    std[position >= 0] = pretrained.std[position[position >= 0]]
    adapted = copy.deepcopy(fitted)
    adapted.mean, adapted.std = mean, std
    adapted.condition_categories, adapted.composition = categories, composition.tolist()
    return adapted


def compare_processors(before: SCRDiTProcessor, after: SCRDiTProcessor) -> dict[str, Any]:
    """Report what fine-tuning keeps, adds and drops.

    Returns
    -------
    `genes`: numbers of matched, moved (known, but with new projections), new and dropped genes. `labels`: by condition,
    the names of matched, new and dropped labels; those of a condition that only one side has are all new or dropped.
    """
    position = pd.Index(before.var_names).get_indexer(pd.Index(after.var_names))
    stays = position == np.arange(len(position))
    genes = {"matched": int(stays.sum()), "moved": int((~stays & (position >= 0)).sum())}
    genes |= {"new": int((position < 0).sum()), "dropped": before.num_genes - int((position >= 0).sum())}
    labels = {}
    for key in dict.fromkeys([*before.condition_keys, *after.condition_keys]):
        old, new = before.conditions.get(key, []), after.conditions.get(key, [])
        labels[key] = {
            "matched": [name for name in new if name in old],
            "new": [name for name in new if name not in old],
            "dropped": [name for name in old if name not in new],
        }
    return {"genes": genes, "labels": labels}


def same_genes_and_labels(before: SCRDiTProcessor, after: SCRDiTProcessor) -> bool:
    """Whether two processors fit the same transformer: same genes and labels in the same order."""
    conditions = [list(processor.conditions.items()) for processor in (before, after)]
    return before.var_names == after.var_names and conditions[0] == conditions[1]


def adapt_transformer(
    pretrained: SCRDiTPipeline,
    processor: SCRDiTProcessor,
    statistics: CellMoments | None,
    dropout: float = 0.0,
    lora_rank: int | None = None,
    cells: Mapping[str, torch.Tensor] | None = None,
) -> tuple[SCRDiTTransformer, dict[str, Any]]:
    """Make the transformer to fine-tune.

    Parameters
    ----------
    pretrained
        The pipeline to start from.
    processor
        Output of [`adapt_processor`].
    statistics
        Moments of the training cells' counts, for a count head, where known genes keep at least the bins that they had.
        `None` if the pretrained model has no count head.
    dropout
        Dropout probability of the training.
    lora_rank
        Rank of the adapters; `None` trains all weights.
    cells
        Training cells from a [`CellCollator`], for [`start_new_labels`]. `None`: new labels start as no label.

    Returns
    -------
    The transformer, and the report of [`compare_processors`] with two more entries. `adapter_only`: whether genes and
    labels are the pretrained ones, so that an adapter of the unchanged pretrained model suffices. `new_labels_start_as`
    (with `cells`, unless `adapter_only`): output of [`start_new_labels`].
    """
    before, source = pretrained.processor, pretrained.transformer
    adapter_only = lora_rank is not None and same_genes_and_labels(before, processor)
    config = {name: value for name, value in source.config.items() if not name.startswith("_")} | {"dropout": dropout}
    report = compare_processors(before, processor) | {"adapter_only": adapter_only}
    new: dict[str, torch.Tensor] = {}
    if adapter_only:
        model = SCRDiTTransformer(**config)
        model.load_state_dict(source.state_dict())
    else:
        config |= {"num_genes": processor.num_genes, "num_classes": processor.num_classes}
        bins = None
        if statistics is not None:
            position = pd.Index(before.var_names).get_indexer(pd.Index(processor.var_names))  # (G,), -1 for new genes
            bins = np.where(position >= 0, source.count_head.bins_per_gene().cpu().numpy()[position], 0)
            config["count_bins"] = count_bins(statistics, min_bins=bins)
        model = SCRDiTTransformer(**config)
        initialize_from_cells(model, processor, statistics, min_bins=bins)
        new = transfer_weights(source, before, model, processor)
        if cells is not None:
            report["new_labels_start_as"] = start_new_labels(pretrained, model, processor, cells)
    if lora_rank is not None:
        add_lora(model, lora_rank, new)
    return model, report


@torch.no_grad()
def transfer_weights(
    pretrained: SCRDiTTransformer, before: SCRDiTProcessor, model: SCRDiTTransformer, after: SCRDiTProcessor
) -> dict[str, torch.Tensor]:
    """Copy the weights that still hold for the new genes and labels, and start the rest neutral.

    Projections of new genes are zero, new labels have the embedding of the null label, and a dropped condition acts as
    if its null label were always given. Before training, known genes and labels thus get the pretrained predictions.

    Parameters
    ----------
    pretrained
        The pretrained transformer.
    before
        Its processor.
    model
        Transformer of the same size for the genes and labels of `after`, initialized for the new cells.
    after
        Processor of [`adapt_processor`].

    Returns
    -------
    Masks by parameter name, of the parameter's shape: True where its entries are new.
    """
    position = pd.Index(before.var_names).get_indexer(pd.Index(after.var_names))  # (G,), -1 for new genes
    weights = _Weights(
        old=pretrained.state_dict(),  # shares memory with the model, as does the next one
        state=model.state_dict(),
        new={name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in model.named_parameters()},
        position=position,
        known=torch.as_tensor(position >= 0),
        source=torch.as_tensor(position[position >= 0]),
    )
    per_patch = model.config.patch_embed_type == "per_patch"
    for name, tensor in weights.old.items():
        per_gene = per_patch and name.startswith(("patch_embed.", "proj_out.")) or name == "pos_embed"
        if not per_gene and name not in GENE_ROWS and not name.startswith(("count_head.", "class_embed.")):
            weights.state[name].copy_(tensor)
    for name, rows in GENE_ROWS.items():
        if name in weights.old:
            rows(weights.state[name])[~weights.known] = 0
            rows(weights.state[name])[weights.known] = rows(weights.old[name])[weights.source]
            rows(weights.new[name])[~weights.known] = True
    if per_patch:
        _transfer_patches(weights, model.config.patch_size, min(pretrained.num_patches, model.num_patches))
    if model.count_head is not None:
        shared_library_size = before.normalized_by == after.normalized_by == "library_size"
        _transfer_count_head(weights, shared_library_size)
    _transfer_labels(weights, before, after, [] if model.count_head is None else LABEL_TABLES)
    return {name: mask for name, mask in weights.new.items() if mask.any()}


class _Weights(NamedTuple):
    """Pretrained and new weights, masks of what is new, and the pretrained position of each gene."""

    old: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    new: dict[str, torch.Tensor]
    position: np.ndarray  # (G,) in the pretrained model, -1 for new genes
    known: torch.Tensor  # (G,) bool
    source: torch.Tensor  # position of the known genes


def _transfer_patches(weights: _Weights, patch_size: int, num_patches: int) -> None:
    """Copy the projections of genes that stay in place; a token's input bias is its position."""
    old, state, new = weights[:3]
    kept = np.flatnonzero(weights.position == np.arange(len(weights.position)))
    token, place = (torch.as_tensor(index) for index in np.divmod(kept, patch_size))
    for name, index in {
        "patch_embed.weight": (token, place),
        "patch_embed.bias": (torch.arange(num_patches),),
        "proj_out.weight": (token, slice(None), place),
        "proj_out.bias": (token, place),
    }.items():
        if name != "patch_embed.bias":
            state[name].zero_()
        state[name][index] = old[name][index]
        new[name][:] = True
        new[name][index] = False


def _transfer_count_head(weights: _Weights, shared_library_size: bool) -> None:
    """Copy means, dispersions and base measures of known genes.

    Mean counts are relative to the library size. Where that is a sum over the model's genes, which have changed, it is
    rescaled to the pretrained genes', so that the known means still hold.
    """
    old, state, new, _, known, source = weights
    rates = state["count_head.log_mean"].exp(), old["count_head.log_mean"].exp()
    typical = old["count_head.log_library_size"][0].clone()
    if not shared_library_size:
        typical -= (rates[0][known].sum() / rates[0].sum() * rates[1].sum() / rates[1][source].sum()).log()
    state["count_head.log_mean"] += typical - state["count_head.log_library_size"][0]
    state["count_head.log_library_size"][0] = typical
    state["count_head.log_library_size"][1] = old["count_head.log_library_size"][1]
    for name in ("count_head.log_mean", "count_head.log_dispersion"):
        state[name][known] = old[name][source]
        new[name][~known] = True
    name = "count_head.log_base"  # (G, bins); no gene lost bins, but the gene with most may be gone
    num_bins = min(state[name].shape[1], old[name].shape[1])
    state[name][known, :num_bins] = old[name][source, :num_bins]
    new[name][~known] = True


def _transfer_labels(
    weights: _Weights, before: SCRDiTProcessor, after: SCRDiTProcessor, head_tables: Sequence[str]
) -> None:
    """Copy embeddings and tables of known labels; the last row of an embedding is the null label's."""
    old, state, new, _, known, source = weights
    tables = [f"count_head.{name}" for name in head_tables]
    for name in tables:
        new[name][:] = True
    for k, (key, names) in enumerate(after.conditions.items()):
        name = f"class_embed.{k}.weight"
        new[name][:] = True
        state[name].zero_()
        if key not in before.conditions:
            continue
        place_before = before.condition_keys.index(key)
        embedding = old[f"class_embed.{place_before}.weight"]
        code = torch.as_tensor(pd.Index(before.conditions[key]).get_indexer(pd.Index(names)))
        state[name].copy_(embedding[torch.cat([code, code.new_tensor([-1])])])
        new[name][:-1][code >= 0] = False
        new[name][-1] = False
        row = torch.nonzero(code >= 0) + sum(after.num_classes[:k])  # (labels, 1)
        row_before = code[code >= 0][:, None] + sum(before.num_classes[:place_before])
        for name in tables:
            state[name][row, torch.nonzero(known).T] = old[name][row_before, source]
            new[name][row, torch.nonzero(known).T] = False
    for k, key in enumerate(before.condition_keys):
        if key not in after.conditions:
            state["time_embed.linear_2.bias"] += old[f"class_embed.{k}.weight"][-1]


@torch.no_grad()
def start_new_labels(
    pretrained: SCRDiTPipeline,
    model: SCRDiTTransformer,
    processor: SCRDiTProcessor,
    cells: Mapping[str, torch.Tensor],
    max_cells: int = 32,
) -> dict[str, dict[str, str]]:
    """Give each new label the embedding of the known label under which its cells are likeliest (diffusion classifier).

    A new label is mostly a known cell type under another name, or a relative of one. Started as no label, its embedding
    would have to be learned from nothing.

    Parameters
    ----------
    pretrained
        The pretrained pipeline.
    model
        The model after [`transfer_weights`]; the embeddings of new labels are set in place.
    processor
        Output of [`adapt_processor`].
    cells
        Training cells: `values` (N, G), `class_labels` (N, K), and for a model with a count head `counts` (N, G).
    max_cells
        Most cells of a label to look at.

    Returns
    -------
    By condition, the known label that each new label starts as. Labels whose cells are likeliest without a label are
    left out, as are conditions that the pretrained model lacks.

    References
    ----------
    Li et al. 2023, arXiv 2303.16203.
    """
    before = pretrained.processor
    noise_scheduler = DDPMScheduler.from_config(pretrained.scheduler.config)
    num_timesteps = noise_scheduler.config.num_train_timesteps
    generator = torch.Generator().manual_seed(0)
    position = torch.as_tensor(pd.Index(before.var_names).get_indexer(pd.Index(processor.var_names)))  # (G,), -1: new
    same = position >= 0
    training, started = model.training, dict[str, dict[str, str]]()
    model.eval()

    def start_as(own: torch.Tensor, row: int, embedding: torch.Tensor, row_before: int | None) -> None:
        """Copy the embedding of a known label and its rows of the count head's tables; `None` is no label."""
        own.copy_(embedding)
        if model.count_head is not None and pretrained.transformer.count_head is not None:
            for name in LABEL_TABLES:
                of_labels = pretrained.transformer.count_head.get_parameter(name)  # (labels, G before)
                of_label = 0.0 if row_before is None else of_labels[row_before, position[same]]
                model.count_head.get_parameter(name)[row, same] = of_label

    for k, (key, names) in enumerate(processor.conditions.items()):
        if key not in before.conditions:
            continue
        known, codes = before.conditions[key], cells["class_labels"][:, k]
        cells_of = {code: torch.where(codes == code)[0][:max_cells] for code in range(len(names))}  # of new labels
        cells_of = {code: rows for code, rows in cells_of.items() if names[code] not in known and len(rows)}
        place_before = before.condition_keys.index(key)
        embeddings = pretrained.transformer.get_parameter(f"class_embed.{place_before}.weight")  # (labels + 1, D)
        table = model.get_parameter(f"class_embed.{k}.weight")
        for code, rows in cells_of.items():
            batch = {name: tensor[rows] for name, tensor in cells.items()}
            # Mid to high noise, where the cell alone does not tell its label; the same draws for each known label.
            low, high = int(0.4 * num_timesteps), int(0.9 * num_timesteps)
            timesteps = torch.randint(low, high, (len(rows),), generator=generator)
            noise = torch.randn(batch["values"].shape, generator=generator)
            row, first = sum(processor.num_classes[:k]) + code, sum(before.num_classes[:place_before])
            rows_before: list[int | None] = [*range(first, first + len(known)), None]  # the last is no label
            losses = []
            for embedding, row_of_known in zip(embeddings, rows_before, strict=True):
                start_as(table[code], row, embedding, row_of_known)
                losses.append(diffusion_loss(model, noise_scheduler, batch, timesteps, noise).mean().item())
            best = int(np.argmin(losses))
            start_as(table[code], row, embeddings[best], rows_before[best])
            if best < len(known):
                started.setdefault(key, {})[names[code]] = known[best]
    model.train(training)
    return started


def add_lora(model: SCRDiTTransformer, rank: int, new: Mapping[str, torch.Tensor]) -> None:
    """Freeze a transformer except for what is new, and add low-rank adapters to its linear layers.

    Parameters
    ----------
    model
        The transformer.
    rank
        Rank of the adapters.
    new
        Output of [`transfer_weights`]; empty if genes and labels are the pretrained ones. These parameters must not
        decay, because their known entries would decay too.

    References
    ----------
    Hu et al. 2021, arXiv 2106.09685.
    """
    from peft import LoraConfig

    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
    model.add_adapter(config)
    for name, parameter in model.named_parameters():
        if name in new:
            parameter.requires_grad_(True)
            parameter.register_hook(new[name].to(parameter).mul)


def save_lora(pipe: SCRDiTPipeline, folder: str, adapter_only: bool) -> None:
    """Write the adapter for `pipe.load_lora_weights(folder)`, with the processor or pipeline that it needs.

    Parameters
    ----------
    pipe
        The trained pipeline.
    folder
        Where to write.
    adapter_only
        Whether genes and labels are the pretrained ones ([`same_genes_and_labels`]). The adapter then belongs to the
        pretrained pipeline, and only the processor is added, for composition and library sizes of the new cells.
        Otherwise the folder also holds the pipeline that the adapter belongs to.
    """
    from peft.utils import get_peft_model_state_dict

    config = pipe.transformer.peft_config["default"].to_dict()
    metadata = {"transformer_lora_adapter_metadata": config}
    SCRDiTPipeline.save_lora_weights(folder, get_peft_model_state_dict(pipe.transformer), **metadata)
    if adapter_only:
        pipe.processor.save_pretrained(f"{folder}/processor")
    else:
        pipe.unload_lora_weights()
        pipe.save_pretrained(folder)
