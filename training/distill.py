"""Distill a trained pipeline into an adapter with which two network calls make a cell.

python training/distill.py --pipeline scrdit-model --output_dir distilled
python training/generate.py --pipeline scrdit-model --lora_weights distilled --num_cells 1000 --output cells.h5ad

The pipeline generates cells and remembers the noise from which each came; the adapter then learns to get from the noise
to the cell (`scrdit_diffusers/distillation.py`). No measured cells are needed. In Python:

    pipe.load_lora_weights("distilled")
    pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
    adata = pipe(num_cells=1000, num_inference_steps=2).adata
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from cli import arg, best_device, check_alone, check_numbers, command_line, run_job, versions
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from scrdit_diffusers import SCRDiTPipeline, distillation, finetuning
from scrdit_diffusers.atomic import lock_folder, write_into
from scrdit_diffusers.launch import check_device
from scrdit_diffusers.redaction import redact
from scrdit_diffusers.schedulers import DISTILLED

WEIGHTS = "pytorch_lora_weights.safetensors"
PCA_BATCHES = 32  # from which principal components are computed


@dataclass
class DistillationArguments:
    """Command-line arguments."""

    pipeline: str = arg(None, "Folder or Hub id of a trained pipeline.")
    revision: str | None = arg(None, "Branch, tag or commit on the Hub.")
    output_dir: str = arg("distilled", "Folder of the adapter.")
    overwrite: bool = arg(False, "Replace the adapter in --output_dir.")
    num_cells: int = arg(12288, "Cells that the pipeline generates to learn from.")
    max_train_steps: int = arg(400, "Number of optimizer steps.")
    train_batch_size: int = arg(128, f"Cells per step, a multiple of {distillation.GROUP_SIZE}.")
    learning_rate: float = arg(6e-3, "Peak learning rate.")
    lora_rank: int = arg(16, "Rank of the adapter.")
    max_grad_norm: float = arg(1.0, "Largest gradient norm.")
    seed: int = arg(0, "Seed of all that is drawn.")
    device: str | None = arg(None, "cpu, cuda, mps. Default: the best one available.")


def check_args(args: DistillationArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    check_alone()
    if args.pipeline is None:
        raise ValueError("--pipeline is needed: the folder or the Hub id of a trained pipeline.")
    positive = ("num_cells", "max_train_steps", "train_batch_size", "learning_rate", "lora_rank", "max_grad_norm")
    check_numbers(args, positive)
    if args.train_batch_size % distillation.GROUP_SIZE:
        raise ValueError(
            f"--train_batch_size must be a multiple of {distillation.GROUP_SIZE}, got {args.train_batch_size}."
        )
    if args.num_cells < args.train_batch_size:
        raise ValueError(f"--num_cells {args.num_cells} is less than --train_batch_size {args.train_batch_size}.")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1, got {args.seed}.")
    check_device(args.device)
    check_output_dir(args)


def check_output_dir(args: DistillationArguments) -> None:
    """Raise ValueError for an adapter that would be lost, and for the folder of a pipeline."""
    if (Path(args.output_dir) / "model_index.json").exists():
        raise ValueError(f"--output_dir {args.output_dir} holds a pipeline; give another folder for the adapter.")
    if (Path(args.output_dir) / WEIGHTS).exists() and not args.overwrite:
        raise ValueError(f"{args.output_dir} holds an adapter; give --overwrite to replace it.")


def load_teacher(args: DistillationArguments) -> SCRDiTPipeline:
    """Load the pipeline to distill."""
    pipe = SCRDiTPipeline.from_pretrained(args.pipeline, revision=args.revision).to(best_device(args))
    if pipe.processor.value_step is not None:
        raise ValueError(f"--pipeline {args.pipeline} was trained on values that are not scaled counts.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_batches(pipe: SCRDiTPipeline, args: DistillationArguments) -> list[dict[str, torch.Tensor]]:
    """Let the pipeline generate the cells to learn from, batch by batch, with sparse counts."""
    batches = []
    for number in tqdm(range(args.num_cells // args.train_batch_size), desc="cells", unit="batches"):
        seed = np.random.SeedSequence((args.seed, number)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed) >> 1)
        batch = distillation.follow_trajectories(pipe, args.train_batch_size, generator)
        batches.append(batch | {"counts": batch["counts"].to_sparse()})
    return batches


def complete(pipe: SCRDiTPipeline, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make the counts (B, G) of a batch dense, add its `values` in model space (B, G), and bring all to the device."""
    counts = batch["counts"].to_dense()  # (B, G)
    values = torch.from_numpy(pipe.processor.transform(counts.numpy())).float()  # (B, G)
    return {name: tensor.to(pipe.device) for name, tensor in (batch | {"counts": counts, "values": values}).items()}


def train(
    pipe: SCRDiTPipeline,
    batches: list[dict[str, torch.Tensor]],
    timesteps: list[int],
    args: DistillationArguments,
) -> list[float]:
    """Train the adapter, which is added to the transformer; return the losses."""
    model, generator = pipe.transformer, torch.Generator().manual_seed(args.seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    lengths = dict(num_warmup_steps=args.max_train_steps // 10, num_training_steps=args.max_train_steps)
    schedule = get_scheduler("cosine", optimizer, **lengths)
    dtype = pipe.choose_autocast_dtype()
    some_cells = torch.cat([complete(pipe, batch)["values"] for batch in batches[:PCA_BATCHES]])  # (cells, G)
    components = distillation.principal_components(some_cells)  # (G, C)
    losses: list[float] = []
    progress = tqdm(range(args.max_train_steps), desc="distillation", unit="steps")
    for step in progress:
        if step % len(batches) == 0:
            order = torch.randperm(len(batches), generator=generator).tolist()
        batch = complete(pipe, batches[order[step % len(batches)]])
        with torch.autocast(pipe.device.type, dtype, enabled=dtype is not None):
            loss = distillation.distillation_loss(model, batch, timesteps, components, generator)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"The loss is not finite at step {step}: lower --learning_rate {args.learning_rate:g}.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix({"loss": f"{sum(losses[-50:]) / len(losses[-50:]):.4f}"}, refresh=False)
    return losses


def main(args: DistillationArguments) -> None:
    """Check everything, generate cells, train the adapter, write it."""
    check_args(args)
    torch.set_flush_denormal(True)
    with lock_folder(args.output_dir, "Wait for it, or give another --output_dir."):
        check_output_dir(args)  # as no other run changes it any more
        pipe = load_teacher(args)
        timesteps = distillation.choose_timesteps(pipe)
        batches = generate_batches(pipe, args)
        torch.manual_seed(args.seed)  # of the adapter's first weights
        finetuning.add_lora(pipe.transformer, args.lora_rank, {})
        pipe.transformer.peft_config["default"].auto_mapping = {DISTILLED: "TCDScheduler"}
        losses = train(pipe, batches, timesteps, args)
        record = redact(asdict(args)) | versions() | {"command": command_line(), "timesteps": timesteps}
        record |= {"first_losses": losses[:50], "last_losses": losses[-50:]}
        with write_into(args.output_dir, [WEIGHTS]) as temporary:
            finetuning.save_lora(pipe.to("cpu"), str(temporary), adapter_only=True)
            (temporary / "distill_config.json").write_text(json.dumps(record, indent=2))
    print(f"Wrote the adapter to {args.output_dir}: pipe.load_lora_weights, then TCDScheduler.")


if __name__ == "__main__":
    run_job(main, DistillationArguments)
