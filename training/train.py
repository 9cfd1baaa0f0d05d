"""Train scRDiT on an AnnData file and save it as a pipeline.

    accelerate launch training/train.py --dataset cells.h5ad --labels_key cell_type --output_dir scrdit-model

The pipeline folder is `--output_dir` itself. Running the same command with `--resume_from_checkpoint latest` goes on
where the last one stopped, to the same result: all randomness of a step is a function of seed, step and process.
"""

import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import accelerate
import anndata as ad
import diffusers
import matplotlib
import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo, upload_folder
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

import scrdit_diffusers
from scrdit_diffusers import (
    SCRDIT_PRESETS,
    CellCollator,
    CellDataset,
    SCRDiTPipeline,
    SCRDiTProcessor,
    SCRDiTTransformer,
    anndata_to_table,
    count_bins,
    default_scheduler,
    diffusion_loss,
    drop_labels,
    plotting,
    read_cells,
    split_cells,
)

matplotlib.use("Agg")
logger = logging.getLogger("train")

DISPERSION_RATE = 10  # learning rate of the dispersions over that of the rest


def arg(default, help, **kwargs):
    """One command-line argument: its default and its help."""
    if isinstance(default, list):
        return field(default_factory=lambda: default, metadata={"help": help, **kwargs})
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class TrainingArguments:
    """Command-line arguments; names as in diffusers' example scripts."""

    # data
    dataset: str = arg(None, "Cells: .h5ad file, .zarr store, folder written by save_table, or Hub data set id.")
    labels_key: list[str] = arg([], "Column(s) of obs that condition the model; none trains without labels.")
    layer: str | None = arg(None, "Layer that holds the values; X if not given.")
    value_space: str = arg("counts", "What is modelled.", choices=["counts", "log_normalized"])
    target_sum: float | None = arg(None, "log_normalized: the values are counts, scale them to this library size.")
    zero_negation: bool = arg(False, "Move exact zeros to --zero_value, away from small positive values.")
    zero_value: float = arg(-10.0, "Where zero negation puts zeros, in the log space (paper: -10).")
    min_std: float = arg(0.3, "Smallest standard deviation by which a gene is divided, in the log space.")
    n_top_genes: int = arg(2000, "Number of genes to keep.")
    flavor: str = arg("seurat", "Choice of genes: scanpy's seurat, cell_ranger, seurat_v3; cv (the paper's); or all.")
    genes: str | None = arg(None, "Text file with one gene name per line, instead of a choice by --flavor.")
    val_fraction: float = arg(0.1, "Share of the cells of each label held out for the validation loss.")
    # model
    preset: str = arg("scrdit-s", "Size of the transformer.", choices=list(SCRDIT_PRESETS))
    patch_size: int | None = arg(None, "Genes per token; overrides the preset, as do the next four.")
    patch_embed_type: str | None = arg(None, "per_patch or shared projections.")
    num_layers: int | None = arg(None, "Number of blocks.")
    num_attention_heads: int | None = arg(None, "Number of attention heads.")
    attention_head_dim: int | None = arg(None, "Width of a head.")
    dropout: float = arg(0.1, "Dropout probability in the MLPs and before the last projection.")
    # diffusion
    prediction_type: str = arg("sample", "What it predicts.", choices=["epsilon", "v_prediction", "sample"])
    num_train_timesteps: int = arg(1000, "Number of diffusion timesteps T.")
    beta_schedule: str = arg(
        "squaredcos_cap_v2", "Noise schedule.", choices=["linear", "scaled_linear", "squaredcos_cap_v2"]
    )
    loss_weighting: str = arg("v", "Weight of a timestep in the loss.", choices=["v", "epsilon", "sample"])
    max_loss_weight: float = arg(25.0, "Largest weight of an error of the clean cell.")
    decode: str = arg(
        "sample", "Counts are sampled from a learned likelihood, or rounded.", choices=["sample", "round"]
    )
    decode_timestep: int = arg(200, "Timestep at which counts are sampled from their posterior.")
    min_timestep: int = arg(200, "Lowest timestep to train where counts are sampled; the ones below are not used.")
    class_dropout_prob: float = arg(0.1, "Share of cells trained without labels, for classifier-free guidance.")
    # optimisation
    output_dir: str = arg("scrdit-model", "Folder of the pipeline, the checkpoints and the logs.")
    overwrite_output_dir: bool = arg(False, "Start anew although --output_dir holds checkpoints; they are deleted.")
    seed: int = arg(0, "Seed of everything.")
    train_batch_size: int = arg(128, "Cells per step and process.")
    max_train_steps: int = arg(4500, "Number of optimiser steps.")
    num_train_epochs: int | None = arg(None, "Passes over the cells; overrides --max_train_steps.")
    gradient_accumulation_steps: int = arg(1, "Batches per optimiser step.")
    gradient_checkpointing: bool = arg(False, "Save memory by computing the forward pass twice.")
    learning_rate: float | None = arg(None, "Peak learning rate; 3e-3 x 128 / width of the model if not given.")
    lr_scheduler: str = arg("cosine", "Learning-rate schedule of diffusers.optimization.get_scheduler.")
    lr_warmup_steps: int = arg(200, "Warm-up steps.")
    adam_beta1: float = arg(0.9, "AdamW beta 1.")
    adam_beta2: float = arg(0.99, "AdamW beta 2.")
    adam_weight_decay: float = arg(0.1, "AdamW weight decay.")
    adam_epsilon: float = arg(1e-8, "AdamW epsilon.")
    max_grad_norm: float = arg(1.0, "Largest gradient norm.")
    use_ema: bool = arg(True, "Average the weights; the average is what is saved.")
    ema_decay: float = arg(0.999, "Decay of the average, reached after a warm-up.")
    mixed_precision: str | None = arg(None, "no, fp16 or bf16; the choice of `accelerate launch` if not given.")
    dataloader_num_workers: int = arg(0, "Processes that collate batches.")
    # checkpoints, validation, reports
    checkpointing_steps: int = arg(2000, "Steps between checkpoints.")
    checkpoints_total_limit: int | None = arg(2, "Number of checkpoints to keep.")
    resume_from_checkpoint: str | None = arg(None, "A checkpoint folder, or latest.")
    validation_steps: int = arg(1000, "Steps between validation losses and sample pictures.")
    num_validation_cells: int = arg(256, "Cells in the validation loss and in the sample pictures.")
    report_to: str = arg("tensorboard", "Tracker known to Accelerate, or none.")
    logging_dir: str = arg("logs", "Tracker's folder in --output_dir.")
    dry_run: bool = arg(False, "Print the resolved configuration and the cost, then stop.")
    push_to_hub: bool = arg(False, "Upload the pipeline at the end.")
    hub_model_id: str | None = arg(None, "Repository on the Hub; the name of --output_dir if not given.")
    hub_token: str | None = arg(None, "Token for the Hub; the stored one if not given.")
    hub_private_repo: bool = arg(False, "Make the repository private.")


# Arguments that a resumed run may change.
CHANGEABLE = ["dataset", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "max_train_steps"]
CHANGEABLE += [
    "num_train_epochs",
    "dataloader_num_workers",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "report_to",
]
CHANGEABLE += ["validation_steps", "logging_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "dry_run"]


def check_args(args: TrainingArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is read."""
    if args.dataset is None:
        raise ValueError("--dataset is needed: a .h5ad file, a .zarr store, a table folder or a Hub data set id.")
    positive = ["train_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "validation_steps"]
    positive += ["max_train_steps", "num_train_epochs", "num_train_timesteps", "num_validation_cells"]
    positive += ["learning_rate", "max_loss_weight", "max_grad_norm", "checkpoints_total_limit"]
    for name in positive:
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name} must be positive, got {value}.")
    for name in ("val_fraction", "class_dropout_prob", "dropout"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 0 and below 1, got {getattr(args, name)}.")
    if args.decode == "sample" and not 0 <= args.min_timestep <= args.decode_timestep < args.num_train_timesteps:
        raise ValueError(
            f"--min_timestep {args.min_timestep}, --decode_timestep {args.decode_timestep} and --num_train_timesteps "
            f"{args.num_train_timesteps} must be in this order."
        )
    if args.decode == "sample" and args.value_space == "counts" and args.prediction_type != "sample":
        raise ValueError(
            f"--prediction_type {args.prediction_type} needs --decode round: where counts are sampled, the denoised "
            "cell follows from their posterior."
        )
    if args.genes and not Path(args.genes).is_file():
        raise ValueError(f"--genes {args.genes} is no file; it should hold one gene name per line.")
    if len(set(args.labels_key)) < len(args.labels_key):
        raise ValueError(f"--labels_key names a column twice: {args.labels_key}.")
    used = checkpoints(args.output_dir) or (Path(args.output_dir) / "model_index.json").exists()
    if used and not (args.resume_from_checkpoint or args.overwrite_output_dir or args.dry_run):
        raise ValueError(
            f"{args.output_dir} holds an earlier run: give --resume_from_checkpoint latest to go on "
            "with it, --overwrite_output_dir to delete them, or another --output_dir."
        )


def checkpoints(output_dir: str) -> list[Path]:
    """Whole checkpoints in a folder, oldest first (one that is being written ends in .tmp)."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(args: TrainingArguments) -> Path | None:
    """Find the checkpoint to resume from; `None` to start anew."""
    whole = checkpoints(args.output_dir)
    if args.resume_from_checkpoint == "latest":
        if not whole:
            logger.warning(f"No checkpoint in {args.output_dir}: starting anew.")
        return whole[-1] if whole else None
    path = Path(args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    if path and not (path / "transformer").is_dir():
        raise ValueError(f"--resume_from_checkpoint {path} is no checkpoint; {args.output_dir} has {whole}.")
    return path


def seeded_generator(device: torch.device, *seeds: int) -> torch.Generator:
    """Make a generator whose state is a function of several integers."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1))


def main(args: TrainingArguments) -> None:
    """Train, then save the pipeline to `args.output_dir`."""
    check_args(args)
    for path in checkpoints(args.output_dir) if args.overwrite_output_dir and not args.dry_run else []:
        shutil.rmtree(path)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)
    torch.set_flush_denormal(True)  # optimiser states decay into denormals, which are slow on CPUs
    resume_from = find_checkpoint(args)

    # 1. Cells: read, split, learn the transform from the training cells
    adata = read_cells(args.dataset)
    genes = Path(args.genes).read_text().split() if args.genes else None
    train_cells, val_cells = split_cells(adata, args.labels_key, args.val_fraction, args.seed)
    names = ["layer", "labels_key", "value_space", "target_sum", "zero_negation", "zero_value", "min_std"]
    names += ["n_top_genes", "flavor"]
    options = {name: getattr(args, name) for name in names}
    processor = SCRDiTProcessor.from_anndata(adata[train_cells], **options, genes=genes)
    table = CellDataset(anndata_to_table(adata, args.layer, obs_columns=args.labels_key))
    sample_counts = args.value_space == "counts" and args.decode == "sample"
    collate = CellCollator(processor, adata.var_names, counts=sample_counts)
    options = {"batch_size": args.train_batch_size, "num_workers": args.dataloader_num_workers}
    loader = DataLoader(Subset(table, train_cells.tolist()), **options, shuffle=True, collate_fn=collate)
    rng = np.random.default_rng(args.seed)
    shown_cells = rng.permutation(val_cells if len(val_cells) else train_cells)[: args.num_validation_cells]
    val_batch = collate(table.__getitems__(np.sort(shown_cells).tolist()))

    # 2. Model, noise, optimiser
    names = ("patch_size", "patch_embed_type", "num_layers", "num_attention_heads", "attention_head_dim")
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = SCRDIT_PRESETS[args.preset] | overrides | {"dropout": args.dropout}
    config |= {"num_genes": processor.num_genes, "num_classes": processor.num_classes}
    counts = processor.get_values(adata[train_cells], args.layer) if sample_counts else None  # (cells, G)
    if sample_counts:
        config |= {"count_bins": count_bins(counts), "beta_schedule": args.beta_schedule}
        config |= {"num_train_timesteps": args.num_train_timesteps}
    model = SCRDiTTransformer(**config)
    model.initialize_weights()
    if sample_counts:
        codes = processor.encode_labels(adata.obs.iloc[train_cells])
        model.count_head.initialize(counts, codes, processor.mean, processor.std)
    min_timestep = args.min_timestep if sample_counts else 0
    weights = (args.loss_weighting, args.max_loss_weight)
    pipeline_config = {"decode_timestep": args.decode_timestep if sample_counts else None, "min_timestep": min_timestep}
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    scheduler = default_scheduler(args.prediction_type, args.beta_schedule, args.num_train_timesteps)
    noise_scheduler = DDPMScheduler.from_config(scheduler.config)
    updates_per_epoch = math.ceil(len(loader) / accelerator.num_processes / args.gradient_accumulation_steps)
    if args.num_train_epochs is not None:
        args.max_train_steps = args.num_train_epochs * updates_per_epoch

    if args.learning_rate is None:
        args.learning_rate = 3e-3 * 128 / (model.config.num_attention_heads * model.config.attention_head_dim)

    record = {name: value for name, value in dataclasses.asdict(args).items() if name != "hub_token"}

    cells_per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    flops = 3 * model.flops_per_cell() * cells_per_step * args.max_train_steps
    logger.info(
        f"{len(train_cells)} training and {len(val_cells)} validation cells, {processor.num_genes} genes, "
        f"conditions { {key: len(names) for key, names in processor.conditions.items()} }"
    )
    logger.info(
        f"{args.preset}: {model.num_parameters() / 1e6:.2f} M parameters, {model.num_patches} tokens, "
        f"{model.flops_per_cell() / 1e6:.1f} MFLOP per cell forward; {args.max_train_steps} steps of {cells_per_step} "
        f"cells ({args.max_train_steps * cells_per_step / len(train_cells):.0f} epochs) are {flops / 1e15:.3f} PFLOP"
    )
    if args.dry_run:
        if accelerator.is_main_process:
            shown = {name: value for name, value in model.config.items() if not name.startswith("_")}
            print(json.dumps({"arguments": record, "transformer": shown}, indent=2))
        return

    betas, decay = (args.adam_beta1, args.adam_beta2), args.adam_weight_decay
    # The dispersions of the counts are single numbers on a log scale that may have far to go.
    dispersions = [parameter for name, parameter in model.named_parameters() if name.endswith("log_dispersion")]
    groups = [
        {"params": [parameter for name, parameter in model.named_parameters() if not name.endswith("log_dispersion")]}
    ]
    if dispersions:
        groups.append({"params": dispersions, "lr": DISPERSION_RATE * args.learning_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, args.learning_rate, betas, args.adam_epsilon, decay, fused=True)
    lr_scheduler = get_scheduler(  # Accelerate steps it once per process
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    ema = None
    if args.use_ema:
        warmup = {"decay": args.ema_decay, "use_ema_warmup": True, "power": 3 / 4}
        ema = EMAModel(
            model.parameters(), **warmup, foreach=True, model_cls=SCRDiTTransformer, model_config=model.config
        )
        ema.to(accelerator.device)

    # 3. Checkpoints: weights as safetensors, besides what Accelerate saves
    def save_hook(models, weights, output_dir):
        if accelerator.is_main_process:
            processor.save_pretrained(os.path.join(output_dir, "processor"))
            (Path(output_dir) / "arguments.json").write_text(json.dumps(record))
            for saved in models:
                accelerator.unwrap_model(saved).save_pretrained(os.path.join(output_dir, "transformer"))
            if ema is not None:  # EMAModel.save_pretrained would lose the buffers of the count head
                averaged = trained_model()
                state = {name: value for name, value in ema.state_dict().items() if name != "shadow_params"}
                averaged.register_to_config(**state)
                averaged.save_pretrained(os.path.join(output_dir, "transformer_ema"))
        weights.clear()

    def load_hook(models, input_dir):
        saved = SCRDiTProcessor.from_pretrained(os.path.join(input_dir, "processor"))
        if saved.to_json_string() != processor.to_json_string():
            raise ValueError(f"{input_dir} was trained on other cells, genes or labels; use the arguments of that run.")
        before = json.loads((Path(input_dir) / "arguments.json").read_text())
        changed = {k: (before[k], v) for k, v in record.items() if k not in CHANGEABLE and before[k] != v}
        if changed:
            raise ValueError(f"Arguments differ from those of {input_dir} (then, now): {changed}.")
        while models:
            loaded = SCRDiTTransformer.from_pretrained(input_dir, subfolder="transformer")
            accelerator.unwrap_model(models.pop()).load_state_dict(loaded.state_dict())
        if ema is not None:
            with warnings.catch_warnings():  # EMAModel calls from_config in a way that diffusers itself deprecates
                warnings.simplefilter("ignore", FutureWarning)
                loaded = EMAModel.from_pretrained(os.path.join(input_dir, "transformer_ema"), SCRDiTTransformer)
            ema.load_state_dict(loaded.state_dict())
            ema.to(accelerator.device)

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    val_batch = {name: tensor.to(accelerator.device) for name, tensor in val_batch.items()}
    null_labels = torch.tensor(processor.num_classes, dtype=torch.long, device=accelerator.device)  # (K,)
    if accelerator.is_main_process:
        if args.push_to_hub:  # before training, so that a wrong name or token costs nothing
            name, private = args.hub_model_id or Path(args.output_dir).name, args.hub_private_repo
            repo_id = create_repo(name, private=private, token=args.hub_token, exist_ok=True).repo_id
        os.makedirs(args.output_dir, exist_ok=True)
        accelerator.init_trackers("scrdit", {k: str(v) for k, v in record.items()})

    def save_checkpoint(step: int) -> None:
        path = Path(args.output_dir) / f"checkpoint-{step}"
        if accelerator.is_main_process:
            whole = checkpoints(args.output_dir)
            for old in whole[: max(0, len(whole) + 1 - (args.checkpoints_total_limit or len(whole) + 1))]:
                shutil.rmtree(old)
            shutil.rmtree(f"{path}.tmp", ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(f"{path}.tmp")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            os.replace(f"{path}.tmp", path)
            tqdm.write(f"Saved {path}")

    def trained_model() -> SCRDiTTransformer:
        trained = SCRDiTTransformer.from_config(accelerator.unwrap_model(model).config).to(accelerator.device)
        trained.load_state_dict(accelerator.unwrap_model(model).state_dict())
        if ema is not None:
            ema.copy_to(trained.parameters())
        return trained.eval()

    def validate(step: int) -> float:
        trained = trained_model()
        count = len(val_batch["values"])
        timesteps = torch.linspace(min_timestep, args.num_train_timesteps - 1, count).to(accelerator.device, torch.long)
        generator = seeded_generator(accelerator.device, args.seed)
        noise = torch.randn(val_batch["values"].shape, generator=generator, device=accelerator.device)
        with torch.no_grad():
            loss = diffusion_loss(trained, noise_scheduler, val_batch, timesteps, noise, *weights).mean().item()
        pipe = SCRDiTPipeline(trained, scheduler, processor, **pipeline_config)
        pipe.set_progress_bar_config(disable=True)
        obs = processor.decode_labels(val_batch["class_labels"].cpu().numpy())
        synthetic = pipe(count, obs=obs, generator=torch.Generator().manual_seed(args.seed)).adata
        real = ad.AnnData(processor.inverse_transform(val_batch["values"].cpu().numpy()), var=synthetic.var)
        try:
            figure = np.ravel(plotting.gene_statistics(real, synthetic, value_space=args.value_space))[0].figure
        except ValueError as error:  # a model at its beginning may give cells that cannot be drawn
            logger.warning(f"No picture at step {step}: {error}")
            return loss
        os.makedirs(os.path.join(args.output_dir, "samples"), exist_ok=True)
        figure.savefig(os.path.join(args.output_dir, "samples", f"step-{step}.png"), dpi=100)
        matplotlib.pyplot.close(figure)
        return loss

    # 4. Train
    step = 0
    if resume_from is not None:
        accelerator.load_state(str(resume_from))
        step = int(resume_from.name.split("-")[1])
        logger.info(f"Resumed from {resume_from}")
    signals: list[int] = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: signals.append(number))
    stopped = False
    progress = tqdm(total=args.max_train_steps, initial=step, desc="train", disable=not accelerator.is_main_process)
    postfix: dict[str, str] = {}
    running: list[float] = []
    while step < args.max_train_steps and not stopped:
        epoch, done = divmod(step, updates_per_epoch)
        loader.set_epoch(epoch)
        batches = accelerator.skip_first_batches(loader, done * args.gradient_accumulation_steps)
        for micro_step, batch in enumerate(batches):
            micro_step %= args.gradient_accumulation_steps
            generator = seeded_generator(accelerator.device, args.seed, step, micro_step, accelerator.process_index)
            values = batch["values"]  # (B, G)
            draw = {"generator": generator, "device": accelerator.device}
            timesteps = torch.randint(min_timestep, args.num_train_timesteps, (len(values),), **draw)  # (B,)
            noise = torch.randn(values.shape, **draw)  # (B, G)
            batch["class_labels"] = drop_labels(batch["class_labels"], null_labels, args.class_dropout_prob, generator)
            with accelerator.accumulate(model):
                losses = diffusion_loss(model, noise_scheduler, batch, timesteps, noise, *weights)  # (B,)
                running.append(losses.mean().item())
                if not math.isfinite(running[-1]):
                    raise_not_finite(step, epoch, micro_step, batch, losses, timesteps, args)
                accelerator.backward(losses.mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            if ema is not None:
                ema.step(model.parameters())
            step += 1
            progress.update()
            if step % 10 == 0 or step == args.max_train_steps:
                train_loss, running = float(np.mean(running)), []
                accelerator.log({"train_loss": train_loss, "lr": lr_scheduler.get_last_lr()[0]}, step=step)
                rate = (progress.format_dict["rate"] or 0) * cells_per_step
                postfix |= {"loss": f"{train_loss:.4f}", "cells/s": f"{rate:.0f}"}
                progress.set_postfix(postfix)
            if step == args.max_train_steps:
                save_checkpoint(step)
            if step % args.validation_steps == 0 or step == args.max_train_steps:
                if accelerator.is_main_process:
                    val_loss = validate(step)
                    accelerator.log({"val_loss": val_loss}, step=step)
                    postfix["val_loss"] = f"{val_loss:.4f}"
                    progress.set_postfix(postfix)
            if signals:
                accelerator.set_trigger()
            stopped = accelerator.check_trigger()  # the processes agree on the step
            if stopped:
                save_checkpoint(step)
                break
            if step >= args.max_train_steps:
                break
            if step % args.checkpointing_steps == 0:
                save_checkpoint(step)
    progress.close()
    if stopped:
        accelerator.end_training()
        logger.warning(f"Stopped at step {step}; go on with --resume_from_checkpoint latest.")
        sys.exit(128 + signals[0] if signals else 1)

    # 5. Save the pipeline
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        pipe = SCRDiTPipeline(trained_model(), scheduler, processor, **pipeline_config)
        pipe.save_pretrained(args.output_dir)
        record |= {"train_cells": len(train_cells), "val_cells": len(val_cells)}
        record |= {"num_processes": accelerator.num_processes, "command": sys.argv}
        record |= {"versions": {m.__name__: m.__version__ for m in (scrdit_diffusers, diffusers, torch, accelerate)}}
        (Path(args.output_dir) / "train_config.json").write_text(json.dumps(record, indent=2))
        logger.info(f"Saved the pipeline to {args.output_dir}")
        if args.push_to_hub:
            push_to_hub(args, repo_id)
    accelerator.end_training()


def raise_not_finite(step, epoch, micro_step, batch, losses, timesteps, args) -> None:
    """Stop with the step, the cells and the likely cause of a loss that is NaN or infinite."""
    if not torch.isfinite(batch["values"]).all():
        cause = "the batch itself holds such values; check the data"
    elif args.mixed_precision == "fp16":
        cause = "fp16 overflowed; use --mixed_precision bf16 or no"
    else:
        cause = f"training diverged; lower --learning_rate (now {args.learning_rate:g}) or raise --lr_warmup_steps"
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    raise RuntimeError(
        f"The loss is not finite at step {step} (epoch {epoch}, batch {micro_step}, cells {bad[:10]} "
        f"of it at timesteps {timesteps[bad[:10]].tolist()}). Likely cause: {cause}. Checkpoints stay intact."
    )


def push_to_hub(args: TrainingArguments, repo_id: str) -> None:
    """Upload the pipeline folder, without checkpoints and logs, with a model card."""
    description = f"scRDiT trained on `{Path(args.dataset).name}`: generates single cells as AnnData."
    about = {"from_training": True, "license": "apache-2.0", "model_description": description}
    card = load_or_create_model_card(repo_id, token=args.hub_token, **about)
    card = populate_model_card(card, ["biology", "genomics", "single-cell", "modality:rna"])
    card.save(f"{args.output_dir}/README.md")
    ignored = ["checkpoint-*", "checkpoint-*/*", f"{args.logging_dir}/*"]
    upload_folder(repo_id=repo_id, folder_path=args.output_dir, ignore_patterns=ignored, token=args.hub_token)


if __name__ == "__main__":
    try:
        main(HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()[0])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
