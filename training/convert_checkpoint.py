"""Turn a checkpoint of the published scRDiT into a pipeline folder, and back.

    python training/convert_checkpoint.py --checkpoint published.pt --genes genes.txt --output_dir pipeline
    python training/convert_checkpoint.py --pipeline pipeline --output published.pt

The checkpoint is a state dict of the published DiT: a patch convolution over (genes, 1), positions, blocks with packed
query, key and value, no labels. It holds only weights, so you must give the genes and the value transform. Without
`--genes` the genes are numbered. The way back needs a model of the published kind: one shared projection, no labels, no
counts.
"""

import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cli import arg, check_numbers, parse, read_genes

from scrdit_diffusers import SCRDiTPipeline, SCRDiTProcessor, SCRDiTTransformer, default_scheduler
from scrdit_diffusers.atomic import write_atomically

# Published name -> our name, for layers with weight and bias. The packed `attn.qkv` of a block is treated separately.
LAYERS = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "adaln_out",
}
BLOCK_LAYERS = {
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "adaln",
}
QUERY_KEY_VALUE = ("attn.to_q", "attn.to_k", "attn.to_v")


def layer_names(num_layers: int) -> dict[str, str]:
    """Map the published names of all layers but the packed ones to ours."""
    blocks = {
        f"blocks.{i}.{published}": f"transformer_blocks.{i}.{ours}"
        for i in range(num_layers)
        for published, ours in BLOCK_LAYERS.items()
    }
    return LAYERS | blocks


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Load a state dict without running any code in it.

    Raises
    ------
    ValueError
        The file holds anything but dense tensors by name.
    """
    if not Path(path).is_file():
        raise ValueError(f"--checkpoint {path} is not a file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are not a pickle make the unpickler raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} holds more than weights, or is not a whole file of torch.save ({reason}).") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict: tensors by name.")
    others = {
        str(key): type(value).__name__
        for key, value in state.items()
        if not (isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided)
    }
    if others:
        raise ValueError(
            f"{path} holds {others}, expected only dense tensors by name; if one of them is the model's state dict, "
            "save that alone."
        )
    return state


def convert_to_transformer(state: Mapping[str, torch.Tensor], num_attention_heads: int = 8) -> SCRDiTTransformer:
    """Make the transformer that computes the same as the published model.

    Parameters
    ----------
    state
        State dict of the published model, for G genes in N patches of P: `x_embedder.proj.weight` (D, 1, P, 1),
        `pos_embed` (1, N, D), `blocks.*.attn.qkv.weight` (3 D, D), `final_layer.linear.weight` (P, D).
    num_attention_heads
        Number of heads H, which the weights do not reveal (published: 8).

    Returns
    -------
    The transformer, with G = N P genes.

    Raises
    ------
    ValueError
        Tensors are missing or unknown, have the wrong shape, or hold NaN.

    References
    ----------
    scRDiT: arXiv 2404.06153. DiT: Peebles and Xie 2023, arXiv 2212.09748.
    """
    blocks = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    sizes = {
        "x_embedder.proj.weight": "(D, 1, P, 1)",
        "pos_embed": "(1, N, D)",
        "blocks.0.mlp.fc1.weight": "(hidden, D)",
    }
    for name, expected in sizes.items():
        if name not in state or state[name].ndim != expected.count(",") + 1:
            found = (
                f"has shape {tuple(state[name].shape)}" if name in state else f"is missing in {sorted(state)[:5]} ..."
            )
            raise ValueError(f"{name} {found}; a state dict of the published model has it with shape {expected}.")
    dim, channels, patch_size, width = state["x_embedder.proj.weight"].shape
    num_patches = state["pos_embed"].shape[1]
    if (channels, width) != (1, 1):
        raise ValueError(
            f"x_embedder.proj.weight has shape {(dim, channels, patch_size, width)}, expected (D, 1, P, 1): one "
            "channel, patches of P genes."
        )
    if num_attention_heads < 1 or dim % num_attention_heads:
        raise ValueError(f"num_attention_heads={num_attention_heads} does not divide the width {dim} of the model.")
    model = SCRDiTTransformer(
        num_genes=num_patches * patch_size,
        patch_size=patch_size,
        patch_embed_type="shared",
        num_layers=len(blocks),
        num_attention_heads=num_attention_heads,
        attention_head_dim=dim // num_attention_heads,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim,
    )
    wanted = convert_to_published(model)
    if state.keys() != wanted.keys():
        raise ValueError(
            f"The state dict is not that of an unconditional published model of {len(blocks)} blocks: it lacks "
            f"{sorted(wanted.keys() - state.keys()) or 'nothing'}, and has besides "
            f"{sorted(state.keys() - wanted.keys()) or 'nothing'}."
        )
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            hint = " (a model that also predicts variances is not supported)" if name.startswith("final_layer") else ""
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}{hint}.")
        if not (state[name].is_floating_point() and torch.isfinite(state[name]).all()):
            raise ValueError(f"{name} is not finite or not of floating point ({state[name].dtype}).")

    ours = {"pos_embed": state["pos_embed"][0]}  # (N, D)
    for kind in ("weight", "bias"):
        for published, name in layer_names(len(blocks)).items():
            ours[f"{name}.{kind}"] = state[f"{published}.{kind}"]
        for i in range(len(blocks)):
            packed = state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)  # 3 x (D, D) or (D,)
            for name, tensor in zip(QUERY_KEY_VALUE, packed, strict=True):
                ours[f"transformer_blocks.{i}.{name}.{kind}"] = tensor
    ours["patch_embed.weight"] = ours["patch_embed.weight"][:, 0, :, 0]  # (D, 1, P, 1) -> (D, P)
    model.load_state_dict({name: tensor.float() for name, tensor in ours.items()})
    return model.eval()


def convert_to_published(model: SCRDiTTransformer) -> dict[str, torch.Tensor]:
    """Make the state dict of the published layout, the inverse of [`convert_to_transformer`].

    Raises
    ------
    ValueError
        The published form cannot hold the model: it has per-patch projections, labels, counts, or a padded patch.
    """
    config = model.config
    reasons = {
        f"patch_embed_type={config.patch_embed_type!r}": config.patch_embed_type != "shared",
        f"num_classes={config.num_classes}": bool(config.num_classes),
        "a count head": config.count_bins is not None,
        f"{config.num_genes} genes (no multiple of patch_size={config.patch_size})": config.num_genes
        % config.patch_size
        != 0,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(f"The published model has no form for a model with {' and '.join(found)}.")
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    published = {"pos_embed": state["pos_embed"][None]}  # (1, N, D)
    for kind in ("weight", "bias"):
        for name, ours in layer_names(config.num_layers).items():
            published[f"{name}.{kind}"] = state[f"{ours}.{kind}"]
        for i in range(config.num_layers):
            packed = [state[f"transformer_blocks.{i}.{name}.{kind}"] for name in QUERY_KEY_VALUE]
            published[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(packed)  # (3 D, D) or (3 D,)
    published["x_embedder.proj.weight"] = published["x_embedder.proj.weight"][:, None, :, None]  # (D, 1, P, 1)
    return published


def make_processor(
    num_genes: int, genes: list[str] | None, target_sum: float | None, zero_negation: bool, zero_value: float
) -> SCRDiTProcessor:
    """Make the transform of the published recipe: log-normalized values, zero negation, no standardization."""
    if genes is not None and len(genes) != num_genes:
        raise ValueError(f"--genes lists {len(genes)} genes, the checkpoint has {num_genes}; list them in its order.")
    return SCRDiTProcessor(
        var_names=genes or [f"gene{i}" for i in range(num_genes)],
        mean=np.zeros(num_genes),
        std=np.ones(num_genes),
        value_space="log_normalized",
        target_sum=target_sum,
        zero_negation=zero_negation,
        zero_value=zero_value,
    )


@dataclass
class ConversionArguments:
    """Command-line arguments."""

    checkpoint: str | None = arg(None, "State dict of the published model.")
    output_dir: str | None = arg(None, "Pipeline folder to write; must not exist.")
    pipeline: str | None = arg(None, "The other way: folder or Hub id of a pipeline.")
    output: str | None = arg(None, "... and state dict to write; must not exist.")
    genes: str | None = arg(None, "Text file with one gene name per line, in order.")
    num_attention_heads: int = arg(8, "Number of heads, which no tensor tells.")
    target_sum: float | None = arg(
        None, "Library size to which counts were scaled; none if values were taken as they are."
    )
    zero_negation: bool = arg(True, "Whether zeros were moved to --zero_value.")
    zero_value: float = arg(-10.0, "Where zeros were moved to.")
    beta_schedule: str = arg("linear", "Noise schedule.", choices=["linear", "squaredcos_cap_v2"])
    num_train_timesteps: int = arg(1000, "Number of diffusion timesteps T.")


def main(args: ConversionArguments) -> None:
    """Convert in one of the two directions."""
    if not ((args.checkpoint and args.output_dir) or (args.pipeline and args.output)):
        raise ValueError("Give --checkpoint and --output_dir, or --pipeline and --output.")
    if args.checkpoint and args.pipeline:
        raise ValueError("Give either --checkpoint or --pipeline, not both.")
    check_numbers(args, ("num_attention_heads", "target_sum", "num_train_timesteps"))
    output = Path(args.output_dir if args.checkpoint else args.output)
    if output.exists():
        raise ValueError(f"{output} exists; give another name.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(output) as temporary:
        if args.checkpoint:
            genes = read_genes(args.genes) if args.genes else None
            model = convert_to_transformer(read_checkpoint(args.checkpoint), args.num_attention_heads)
            options = (genes, args.target_sum, args.zero_negation, args.zero_value)
            processor = make_processor(model.config.num_genes, *options)
            scheduler = default_scheduler("epsilon", args.beta_schedule, args.num_train_timesteps)
            SCRDiTPipeline(model, scheduler, processor).save_pretrained(str(temporary))
        else:
            torch.save(convert_to_published(SCRDiTPipeline.from_pretrained(args.pipeline).transformer), temporary)
    print(f"Wrote {output}")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        main(parse(ConversionArguments))
    except (TypeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
