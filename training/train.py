"""Train scRDiT on an AnnData file and save it as a pipeline.

    accelerate launch training/train.py --dataset cells.h5ad --labels_key cell_type --output_dir scrdit-model

The pipeline folder is `--output_dir` itself. Running the same command with `--resume_from_checkpoint latest` goes on
where the last one stopped, to the same result: all randomness of a step is a function of seed and step. It does not
depend on the number of processes, given the same number of cells per step, but for the masks of `--dropout`.
"""

import dataclasses
import json
import logging
import math
import os
import pickle
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import accelerate
import anndata as ad
import diffusers
import matplotlib
import numpy as np
import scipy.sparse as sp
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.tracking import filter_trackers
from accelerate.utils import DistributedType, ProjectConfiguration, parse_flag_from_env, set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import HfArgumentParser

import scrdit_diffusers
from scrdit_diffusers import (
    SCRDIT_PRESETS,
    CellCollator,
    CellDataset,
    CellStatistics,
    CellStream,
    FoldChangePrior,
    SCRDiTPipeline,
    SCRDiTProcessor,
    SCRDiTTransformer,
    count_bins,
    default_scheduler,
    diffusion_loss,
    drop_labels,
    finetuning,
    fit_table,
    hub,
    initialize_from_cells,
    iterate_rows,
    model_card,
    open_table,
    plotting,
    read_labels,
    split_cells,
    split_stream,
)
from scrdit_diffusers.processing_scrdit import RARE_LABEL_CELLS

matplotlib.use("Agg")
logger = logging.getLogger("train")

DEFAULT_STEPS = (600, 2500, 5000)  # at least (half of that for a pretrained model), where EPOCHS allow it, at most
EPOCHS = (60, 150)  # passes over the cells, at least and at most
MAX_START_CELLS = 5000  # from which cell tokens (by principal components) and new labels start
TABLE_RATE = 10  # learning rate of the tables of the count head over that of the rest


def arg(default, help, **kwargs):
    """One command-line argument: its default and its help."""
    if isinstance(default, list):
        return field(default_factory=lambda: default, metadata={"help": help, **kwargs})
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class TrainingArguments:
    """Command-line arguments; names as in diffusers' example scripts."""

    # data
    dataset: str = arg(None, "Cells: .h5ad or .zarr, a folder or pattern of them, a table folder, or Hub data set id.")
    dataset_config_name: str | None = arg(None, "Configuration of a Hub data set.")
    streaming: bool = arg(False, "Read a data set while training instead of downloading it; one process.")
    join: str = arg("inner", "Genes of several files: those that all have, or all.", choices=["inner", "outer"])
    gene_key: str | None = arg(None, "Column of var that identifies a gene, such as gene_ids; var_names if not given.")
    preprocessing_num_workers: int | None = arg(None, "Processes that convert files and learn the genes.")
    labels_key: list[str] = arg([], "Column(s) of obs that condition the model; none trains without labels.")
    layer: str | None = arg(None, "Layer that holds the values; X if not given.")
    value_space: str = arg("counts", "What the values are, and will be.", choices=["counts", "log_normalized"])
    target_sum: float | None = arg(None, "log_normalized: the values are counts, scale them to this library size.")
    zero_negation: bool = arg(False, "Move exact zeros to --zero_value, away from small positive values.")
    zero_value: float = arg(-10.0, "Where zero negation puts zeros, in the log space (paper: -10).")
    standardize: bool = arg(True, "Subtract each gene's mean and divide by its standard deviation (paper: no).")
    min_std: float = arg(0.3, "Smallest standard deviation by which a gene is divided, in the log space.")
    n_top_genes: int | None = arg(None, "Number of genes; that of the pretrained pipeline, or 2000, if not given.")
    flavor: str = arg("seurat", "Choice of genes: scanpy's seurat, cell_ranger, seurat_v3; cv (the paper's); or all.")
    genes: str | None = arg(None, "Text file with one gene name per line, instead of a choice by --flavor.")
    val_fraction: float = arg(0.0, "Share of the cells of each label held out of training for a validation loss.")
    # fine-tuning
    pretrained_model_name_or_path: str | None = arg(None, "Pipeline to start from: a folder or an id on the Hub.")
    revision: str | None = arg(None, "Revision of the pretrained pipeline on the Hub.")
    lora_rank: int | None = arg(None, "Train adapters of this rank instead of all weights.")
    # model
    preset: str = arg("scrdit-s", "Size of the transformer.", choices=list(SCRDIT_PRESETS))
    patch_size: int | None = arg(None, "Genes per token; overrides the preset, as do the next five.")
    patch_embed_type: str | None = arg(None, "per_patch or shared projections.")
    num_layers: int | None = arg(None, "Number of blocks.")
    num_attention_heads: int | None = arg(None, "Number of attention heads.")
    attention_head_dim: int | None = arg(None, "Width of a head.")
    num_cell_tokens: int | None = arg(None, "Tokens that read all genes.")
    dropout: float = arg(0.0, "Dropout probability in the MLPs and before the last projection.")
    # diffusion
    prediction_type: str = arg("sample", "What it predicts.", choices=["epsilon", "v_prediction", "sample"])
    num_train_timesteps: int = arg(1000, "Number of diffusion timesteps T.")
    beta_schedule: str = arg(
        "squaredcos_cap_v2", "Noise schedule.", choices=["linear", "scaled_linear", "squaredcos_cap_v2"]
    )
    loss_weighting: str = arg("v", "Weight of a timestep in the loss.", choices=["v", "epsilon", "x0"])
    max_loss_weight: float = arg(25.0, "Largest weight of an error of the clean cell.")
    decode: str = arg(
        "sample", "Counts are sampled from a learned likelihood, or rounded.", choices=["sample", "round"]
    )
    decode_timestep: int = arg(200, "Timestep at which counts are sampled from their posterior.")
    prior_std: float = arg(0.16, "Counts: width of the prior of log fold changes, against overfitting.")
    min_timestep: int = arg(200, "Lowest timestep to train where counts are sampled; the ones below are not used.")
    class_dropout_prob: float = arg(0.02, "Share of cells trained without labels, for classifier-free guidance.")
    # optimisation
    output_dir: str = arg("scrdit-model", "Folder of the pipeline, the checkpoints and the logs.")
    overwrite_output_dir: bool = arg(False, "Start anew although --output_dir holds checkpoints; they are deleted.")
    seed: int = arg(0, "Seed of everything.")
    train_batch_size: int = arg(128, "Cells per step and process.")
    max_train_steps: int | None = arg(
        None, "Optimiser steps; 2,500, but 60 to 150 passes within 300 to 5,000, if not given."
    )
    num_train_epochs: int | None = arg(None, "Passes over the cells; overrides --max_train_steps.")
    gradient_accumulation_steps: int = arg(1, "Batches per optimiser step.")
    gradient_checkpointing: bool = arg(False, "Save memory by computing the forward pass twice.")
    learning_rate: float | None = arg(None, "Peak learning rate; 3e-3 x 128 / width of the model if not given.")
    lr_scheduler: str = arg("cosine", "Learning-rate schedule of diffusers.optimization.get_scheduler.")
    lr_warmup_steps: int | None = arg(None, "Warm-up steps; 200, at most two thirds (fine-tuning: a tenth).")
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
    validation_steps: int = arg(1000, "Steps between sample pictures, and validation losses where cells are held out.")
    num_validation_cells: int = arg(256, "Cells in the sample pictures and in the validation loss.")
    report_to: str = arg("tensorboard", "Tracker known to Accelerate, or none.")
    logging_dir: str = arg("logs", "Tracker's folder in --output_dir.")
    dry_run: bool = arg(False, "Print the resolved configuration and the cost, then stop.")
    push_to_hub: bool = arg(False, "Upload the pipeline at the end.")
    hub_model_id: str | None = arg(None, "Repository on the Hub; the name of --output_dir if not given.")
    hub_token: str | None = arg(None, "Token for the Hub; the stored one if not given.")
    hub_private_repo: bool = arg(False, "Make the repository private.")
    # model card; what is not given is "not stated"
    license: str | None = arg(None, "Licence of the weights, such as apache-2.0.")
    dataset_accession: str | None = arg(None, "Where the cells come from, such as SRP073767 (10x v1).")
    dataset_license: str | None = arg(None, "Licence of the cells.")
    dataset_citation: str | None = arg(None, "Publication of the cells.")
    organism: str | None = arg(None, "Organism of the cells, such as human.")
    tissue: str | None = arg(None, "Tissue of the cells, such as blood.")


# Arguments that a resumed run may change; --lr_warmup_steps follows from --max_train_steps.
CHANGEABLE = ["dataset", "preprocessing_num_workers", "dataloader_num_workers", "output_dir", "overwrite_output_dir"]
CHANGEABLE += ["resume_from_checkpoint", "max_train_steps", "num_train_epochs", "lr_warmup_steps"]
CHANGEABLE += ["checkpointing_steps", "checkpoints_total_limit", "validation_steps", "report_to", "logging_dir"]
CHANGEABLE += ["dry_run", "push_to_hub", "hub_model_id", "hub_private_repo"]
CHANGEABLE += ["license", "dataset_accession", "dataset_license", "dataset_citation", "organism", "tissue"]


def check_args(args: TrainingArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is read."""
    if args.dataset is None:
        raise ValueError("--dataset is needed: a .h5ad file, a .zarr store, a table folder or a Hub data set id.")
    positive = ["train_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "validation_steps"]
    positive += ["max_train_steps", "num_train_epochs", "num_train_timesteps", "num_validation_cells"]
    positive += ["lora_rank", "learning_rate", "max_loss_weight", "prior_std", "max_grad_norm"]
    positive += ["checkpoints_total_limit", "n_top_genes"]
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
    if args.decode == "sample" and args.zero_negation:
        raise ValueError("--zero_negation True needs --decode round: where counts are sampled, zeros are counts, too.")
    if args.decode == "sample" and args.prediction_type != "sample":
        raise ValueError(
            f"--prediction_type {args.prediction_type} needs --decode round: where counts are sampled, the denoised "
            "cell follows from their posterior."
        )
    schedules = [schedule.value for schedule in SchedulerType]
    if args.lr_scheduler not in schedules:
        raise ValueError(f"--lr_scheduler must be one of {schedules}, got {args.lr_scheduler}.")
    if args.mixed_precision not in (None, "no", "fp16", "bf16"):
        raise ValueError(f"--mixed_precision must be no, fp16 or bf16, got {args.mixed_precision}.")
    if args.report_to not in ("none", "all") and not filter_trackers(args.report_to, args.output_dir):
        raise ValueError(f"--report_to {args.report_to}: it is not installed, or Accelerate does not know it.")
    if args.lora_rank and not args.pretrained_model_name_or_path:
        raise ValueError(
            f"--lora_rank {args.lora_rank} needs --pretrained_model_name_or_path: adapters change a trained model."
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


def check_processes(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Raise ValueError for processes that would not train as they were launched to."""
    # accelerate launch --num_processes 2 starts one process where it finds no GPU, and sets the port for two
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "Several processes were asked for, but accelerate launch has started one: on CPUs set "
            "ACCELERATE_USE_CPU=true and give --multi_gpu as well (or unset MASTER_PORT, or launch with torchrun)."
        )
    launched, kind = int(os.environ.get("WORLD_SIZE", 1)), accelerator.distributed_type
    if launched != accelerator.num_processes:  # each would train alone, into the same folder
        raise ValueError(
            f"{launched} processes were launched, but each finds {accelerator.num_processes}: on CPUs set "
            "ACCELERATE_USE_CPU=true, or launch one process."
        )
    for name in ("FSDP", "DEEPSPEED"):  # where Accelerate cannot, it says nothing and keeps the model whole
        if parse_flag_from_env(f"ACCELERATE_USE_{name}") and kind != DistributedType[name]:
            raise ValueError(f"{name} was asked for, but Accelerate has chosen {kind.value}: {name} needs GPUs.")
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:  # DeepSpeed's configuration decides
        raise ValueError(
            f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}, but accelerate was launched with "
            f"{accelerator.gradient_accumulation_steps}: give the same in the configuration file."
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("Of FSDP only version 2 is supported: set fsdp_version: 2, as in training/configs/fsdp2.yaml.")
    if kind == DistributedType.DEEPSPEED:
        if accelerator.deepspeed_plugin.zero_stage == 3:
            raise ValueError("Of DeepSpeed stages 1 and 2 are supported, not 3; use training/configs/fsdp2.yaml.")
        logger.warning("This script was run with DeepSpeed on CPUs only: compare a short run with one of DDP first.")
        accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and args.lora_rank:
        raise ValueError(f"--lora_rank does not work with {kind.value}: what is frozen would move. Use DDP.")


def checkpoints(output_dir: str) -> list[Path]:
    """Whole checkpoints in a folder, oldest first (one that is being written ends in .tmp)."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, so that a half-deleted one is never taken for a whole one."""
    os.replace(path, f"{path}.deleted")
    shutil.rmtree(f"{path}.deleted")


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


def check_checkpoint(path: Path, accelerator: Accelerator) -> None:
    """Raise ValueError for a checkpoint whose optimiser was cut in another way than this run's."""
    cut = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    now = accelerator.distributed_type.value if accelerator.distributed_type in cut else "DDP or one process"
    written = "DDP or one process"
    if any(path.glob("pytorch_model_fsdp*")):
        written = "FSDP"
    elif (path / "pytorch_model").is_dir():
        written = "DEEPSPEED"
    if written != now:
        raise ValueError(f"{path} was written with {written}, this run is with {now}: resume it as it was begun.")


def mix_seeds(*seeds: int) -> int:
    """Make one seed of several; zeros at their end do not count."""
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1)


def seeded_generator(device: torch.device, *seeds: int) -> torch.Generator:
    """Make a generator whose state is a function of several integers."""
    return torch.Generator(device).manual_seed(mix_seeds(*seeds))


def share(count: int, num_processes: int, process_index: int) -> slice:
    """Part of `count` cells that belongs to a process; the sizes differ by one at most."""
    size, rest = divmod(count, num_processes)
    start = process_index * size + min(process_index, rest)
    return slice(start, start + size + (process_index < rest))


class EpochSampler(Sampler[list[int]]):
    """Positions of each batch of one process; the processes together see each cell once per epoch.

    The joined batches of all processes are consecutive parts of one random order, which is a function of seed and
    epoch. The last one may be short: the processes share it, and one that is left without a cell gets the first,
    which training weighs by zero.

    Parameters
    ----------
    num_cells
        Number of cells.
    batch_size
        Cells of a joined batch.
    num_processes
        Number of processes.
    process_index
        Number of this process.
    seed
        Makes the order reproducible.
    """

    def __init__(self, num_cells: int, batch_size: int, num_processes: int, process_index: int, seed: int):
        self.num_cells, self.batch_size, self.seed, self.epoch = num_cells, batch_size, seed, 0
        self.num_processes, self.process_index = num_processes, process_index

    def __len__(self) -> int:
        return math.ceil(self.num_cells / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose another order of the cells."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_cells)
        for start in range(0, self.num_cells, self.batch_size):
            joined = order[start : start + self.batch_size]
            own = joined[share(len(joined), self.num_processes, self.process_index)]
            yield (own if len(own) else joined[:1]).tolist()


def load_pretrained(args: TrainingArguments) -> SCRDiTPipeline | None:
    """Load the pipeline to start from and raise ValueError for arguments that do not fit it."""
    if args.pretrained_model_name_or_path is None:
        return None
    pretrained = SCRDiTPipeline.from_pretrained(args.pretrained_model_name_or_path, revision=args.revision)
    finetuning.check_settings(pretrained, dataclasses.asdict(args))
    return pretrained


@dataclass
class Cells:
    """Training and validation cells, and what was learned from the former."""

    processor: SCRDiTProcessor
    statistics: CellStatistics
    loader: DataLoader
    val_batch: dict[str, torch.Tensor]
    some_cells: dict[str, torch.Tensor]  # at most MAX_START_CELLS training cells
    num_train: int
    num_val: int
    cells_per_epoch: int


def open_cells(
    args: TrainingArguments, accelerator: Accelerator, sample_counts: bool, pretrained: SCRDiTPipeline | None
) -> Cells:
    """Open the cells as a table on disk, split it, learn the transform from the training cells."""
    if args.streaming and (accelerator.num_processes > 1 or args.dataloader_num_workers > 1):
        raise ValueError("--streaming is for one process with at most one data loader worker; else leave it out.")
    table, var = open_table(
        args.dataset,
        layer=args.layer,
        counts=args.value_space == "counts" or args.target_sum is not None,
        labels_key=args.labels_key,
        join=args.join,
        gene_key=args.gene_key,
        streaming=args.streaming,
        name=args.dataset_config_name,
        num_proc=args.preprocessing_num_workers,
    )
    if args.streaming:
        train, val = split_stream(table, args.val_fraction, args.seed) if args.val_fraction else (table, table)
    else:
        train_cells, val_cells = split_cells(
            read_labels(table, args.labels_key), args.labels_key, args.val_fraction, args.seed
        )
        train = table.select(train_cells)

    names = ["value_space", "target_sum", "zero_negation", "zero_value", "min_std", "n_top_genes", "flavor"]
    names += ["standardize"]
    options = {name: getattr(args, name) for name in names}
    options |= {"name": str(args.dataset), "num_proc": args.preprocessing_num_workers}
    options["recover_counts"] = sample_counts
    genes = Path(args.genes).read_text().split() if args.genes else None
    if pretrained is not None:
        known = pretrained.processor.var_names
        finetuning.check_common_genes(known, genes or list(var.index))
        if genes is None:
            variable, _ = fit_table(train, var, args.labels_key, **options)
            total = len(var) if args.flavor == "all" else args.n_top_genes
            genes = finetuning.choose_genes(known, list(var.index), variable, total)
        genes = finetuning.arrange_genes(known, genes)
    processor, statistics = fit_table(train, var, args.labels_key, genes=genes, **options)
    if pretrained is not None:
        processor = finetuning.adapt_processor(pretrained.processor, processor, keep_labels=bool(args.lora_rank))
    num_train = int(statistics.num_cells.sum())
    collate = CellCollator(processor, var, counts=sample_counts)
    options = {"num_workers": args.dataloader_num_workers, "collate_fn": collate}
    if args.streaming:
        stream = CellStream(train, num_train, args.train_batch_size, args.labels_key, seed=args.seed)
        shown = next(iterate_rows(val, args.num_validation_cells, ["genes", "expressions", *args.labels_key]))
        some = collate(next(iterate_rows(train, MAX_START_CELLS, shown.column_names)))
        generator = torch.Generator()  # else each pass draws from the one of the dropout, and resuming is not exact
        loader = DataLoader(stream, batch_size=None, generator=generator, **options)
        used = len(stream) * args.train_batch_size
        return Cells(processor, statistics, loader, collate(shown), some, num_train, shown.num_rows, used)
    dataset = CellDataset(train, args.labels_key)
    num_processes, process_index = accelerator.num_processes, accelerator.process_index
    joined_size = args.train_batch_size * num_processes
    sampler = EpochSampler(num_train, joined_size, num_processes, process_index, args.seed)
    loader = DataLoader(dataset, batch_sampler=sampler, **options)
    rng = np.random.default_rng(args.seed)
    some_cells = np.sort(rng.permutation(len(train_cells))[:MAX_START_CELLS])
    some = collate(dataset.__getitems__(some_cells.tolist()))
    shown_cells = rng.permutation(val_cells if len(val_cells) else train_cells)[: args.num_validation_cells]
    val_batch = collate(CellDataset(table, args.labels_key).__getitems__(np.sort(shown_cells).tolist()))
    return Cells(processor, statistics, loader, val_batch, some, num_train, len(val_cells), num_train)


def build_model(args: TrainingArguments, cells: Cells, sample_counts: bool) -> SCRDiTTransformer:
    """Make a new transformer, with the weights from which training starts."""
    names = ["patch_size", "patch_embed_type", "num_layers", "num_attention_heads", "attention_head_dim"]
    names += ["num_cell_tokens"]
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = SCRDIT_PRESETS[args.preset] | overrides | {"dropout": args.dropout}
    config |= {"num_genes": cells.processor.num_genes, "num_classes": cells.processor.num_classes}
    if sample_counts:
        config |= {"count_bins": count_bins(cells.statistics), "beta_schedule": args.beta_schedule}
        config |= {"num_train_timesteps": args.num_train_timesteps}
    model = SCRDiTTransformer(**config)
    statistics = cells.statistics if sample_counts else None
    initialize_from_cells(model, cells.processor, statistics, cells.some_cells["values"])
    return model


def main(args: TrainingArguments) -> None:
    """Train, then save the pipeline to `args.output_dir`."""
    start = time.time()
    check_args(args)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
    )
    check_processes(args, accelerator)
    if accelerator.is_main_process and args.overwrite_output_dir and not args.dry_run:
        for path in checkpoints(args.output_dir):
            delete_checkpoint(path)
    accelerator.wait_for_everyone()
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)
    torch.set_flush_denormal(True)  # optimiser states decay into denormals, which are slow on CPUs
    resume_from = find_checkpoint(args)
    if resume_from:
        check_checkpoint(resume_from, accelerator)
    first_step = int(resume_from.name.split("-")[1]) if resume_from else 0

    # 1. Cells
    pretrained = load_pretrained(args)
    args.n_top_genes = args.n_top_genes or (pretrained.processor.num_genes if pretrained else 2000)
    sample_counts = args.decode == "sample"
    cells = open_cells(args, accelerator, sample_counts, pretrained)
    processor, loader, val_batch = cells.processor, cells.loader, cells.val_batch

    # 2. Model, noise, optimiser
    changes: dict = {}
    if pretrained is not None:
        options = {"dropout": args.dropout, "lora_rank": args.lora_rank, "cells": cells.some_cells}
        statistics = cells.statistics if sample_counts else None
        model, changes = finetuning.adapt_transformer(pretrained, processor, statistics, **options)
    else:
        model = build_model(args, cells, sample_counts)
    min_timestep = args.min_timestep if sample_counts else 0
    weights = (args.loss_weighting, args.max_loss_weight)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    prior = None
    if sample_counts:
        prior = FoldChangePrior(model, cells.num_train, args.prior_std, around_present_weights=pretrained is not None)
    pipeline_config = {"decode_timestep": args.decode_timestep if sample_counts else None, "min_timestep": min_timestep}
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    scheduler = default_scheduler(args.prediction_type, args.beta_schedule, args.num_train_timesteps)
    noise_scheduler = DDPMScheduler.from_config(scheduler.config)
    updates_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    if args.num_train_epochs is not None:
        args.max_train_steps = args.num_train_epochs * updates_per_epoch
    elif args.max_train_steps is None:  # small sets are learned by heart by more passes
        least, usual, most = DEFAULT_STEPS
        least = least if pretrained is None else least // 2
        steps = np.clip(usual, EPOCHS[0] * updates_per_epoch, EPOCHS[1] * updates_per_epoch)
        args.max_train_steps = int(np.clip(steps, least, most))

    if args.lr_warmup_steps is None:
        longest = args.max_train_steps * 2 // 3 if pretrained is None else args.max_train_steps // 10
        args.lr_warmup_steps = min(200, longest)
    if args.learning_rate is None:
        args.learning_rate = 3e-3 * 128 / width

    record = {name: value for name, value in dataclasses.asdict(args).items() if name != "hub_token"}

    joined_size = args.train_batch_size * accelerator.num_processes
    cells_per_step = joined_size * args.gradient_accumulation_steps
    flops = 3 * model.flops_per_cell() * cells_per_step * args.max_train_steps
    logger.info(
        f"{cells.num_train} training and {cells.num_val} held-out cells, {processor.num_genes} genes, "
        f"conditions { {key: len(names) for key, names in processor.conditions.items()} }"
    )
    for key, numbers in (processor.label_counts if processor.composition else {}).items():
        if rare := {name: number for name, number in numbers.items() if number < RARE_LABEL_CELLS}:
            logger.warning(f"Few training cells for some of {key}, expect little of the cells generated for it: {rare}")
    logger.info(
        f"{args.preset}: {model.num_parameters() / 1e6:.2f} M parameters, {model.num_patches} tokens, "
        f"{model.flops_per_cell() / 1e6:.1f} MFLOP per cell forward; {args.max_train_steps} steps of {cells_per_step} "
        f"cells ({args.max_train_steps * cells_per_step / cells.num_train:.0f} epochs) are {flops / 1e15:.3f} PFLOP"
    )
    if changes:
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        logger.info(
            f"Fine-tuning {args.pretrained_model_name_or_path}, {trainable / 1e6:.2f} M parameters trained: {changes}"
        )
    if args.dry_run:
        if accelerator.is_main_process:
            shown = {name: value for name, value in model.config.items() if not name.startswith("_")}
            print(json.dumps({"arguments": record, "transformer": shown}, indent=2))
        return

    betas, decay = (args.adam_beta1, args.adam_beta2), args.adam_weight_decay
    # Tables of genes and labels or bins in the count head are numbers on a log scale that may have far to go. What LoRA
    # trains of the model itself shares its tensors with what is frozen, which must not decay. Nor must the log means:
    # decay pulls those of rare genes, far below zero, up by half their counts.
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_genes = ("log_dispersion", "log_base", "class_log_mean")
    tables = [trained.pop(name) for name in list(trained) if name.endswith(of_genes)]
    kept = [trained.pop(name) for name in list(trained) if name.endswith("log_mean")]
    kept += [trained.pop(name) for name in list(trained) if args.lora_rank and "lora_" not in name]
    groups = [{"params": list(trained.values())}]
    if kept:
        groups.append({"params": kept, "weight_decay": 0.0})
    if tables:
        groups.append({"params": tables, "lr": TABLE_RATE * args.learning_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, args.learning_rate, betas, args.adam_epsilon, decay, fused=True)
    lr_scheduler = get_scheduler(  # Accelerate steps it once per process
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    config = model.config
    running: list[float] = []  # losses since the last report, part of a checkpoint

    # 3. Checkpoints: weights as safetensors, besides what Accelerate saves
    def save_hook(models, weights, output_dir):
        current, averaged = gather_weights(accelerator.unwrap_model(model), ema)
        if accelerator.is_main_process:
            processor.save_pretrained(os.path.join(output_dir, "processor"))
            (Path(output_dir) / "arguments.json").write_text(json.dumps(record))
            (Path(output_dir) / "losses.json").write_text(json.dumps(running))
            whole_model(current).save_pretrained(os.path.join(output_dir, "transformer"))
            if ema is not None:  # EMAModel.save_pretrained would lose the buffers of the count head
                saved = whole_model(averaged)
                saved.register_to_config(**{k: v for k, v in ema.state_dict().items() if k != "shadow_params"})
                saved.save_pretrained(os.path.join(output_dir, "transformer_ema"))
        weights.clear()

    def load_hook(models, input_dir):
        saved = SCRDiTProcessor.from_pretrained(os.path.join(input_dir, "processor"))
        if saved.to_json_string() != processor.to_json_string():
            raise ValueError(f"{input_dir} was trained on other cells, genes or labels; use the arguments of that run.")
        before = json.loads((Path(input_dir) / "arguments.json").read_text())
        changed = {k: (before[k], v) for k, v in record.items() if k not in CHANGEABLE and before[k] != v}
        if changed:
            raise ValueError(f"Arguments differ from those of {input_dir} (then, now): {changed}.")
        running[:] = json.loads((Path(input_dir) / "losses.json").read_text())
        while models:  # by file and not from_pretrained, which knows no adapters
            loaded = load_file(os.path.join(input_dir, "transformer", SAFETENSORS_WEIGHTS_NAME))
            accelerator.unwrap_model(models.pop()).load_state_dict(loaded)
        if ema is not None:
            folder = os.path.join(input_dir, "transformer_ema")
            averaged = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
            names = [name for name, _ in accelerator.unwrap_model(model).named_parameters()]
            state = SCRDiTTransformer.load_config(folder)
            state = {name: state[name] for name in ema.state_dict() if name != "shadow_params"}
            shadows = [shard_like(averaged[name], now) for name, now in zip(names, ema.shadow_params, strict=True)]
            ema.load_state_dict(state | {"shadow_params": shadows})
            ema.to(accelerator.device)

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    ema = None
    if args.use_ema:  # of the prepared parameters, which may be parts of the whole ones
        warmup = {"decay": args.ema_decay, "use_ema_warmup": True, "power": 3 / 4}
        ema = EMAModel(model.parameters(), **warmup, foreach=True, model_cls=SCRDiTTransformer, model_config=config)
        ema.to(accelerator.device)
    loader = prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0)  # sharded already
    val_batch = {name: tensor.to(accelerator.device) for name, tensor in val_batch.items()}
    null_labels = torch.tensor(processor.num_classes, dtype=torch.long, device=accelerator.device)  # (K,)
    if accelerator.is_main_process:
        if args.push_to_hub:  # before training, so that a wrong name or token costs nothing
            name, private = args.hub_model_id or Path(args.output_dir).name, args.hub_private_repo
            repo_id = hub.prepare_repository(name, private, args.hub_token)
        os.makedirs(args.output_dir, exist_ok=True)
        # A run that was killed may have logged steps that come again.
        tensorboard = {"tensorboard": {"purge_step": first_step + 1}}
        accelerator.init_trackers("scrdit", {k: str(v) for k, v in record.items()}, tensorboard)

    def joined_losses() -> list[float]:
        return accelerator.reduce(torch.tensor(running, device=accelerator.device), "mean").tolist()

    def save_checkpoint(step: int) -> None:
        path = Path(args.output_dir) / f"checkpoint-{step}"
        running[:] = joined_losses()
        if accelerator.is_main_process:
            for left in [*path.parent.glob("checkpoint-*.tmp"), *path.parent.glob("checkpoint-*.deleted")]:
                shutil.rmtree(left)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(f"{path}.tmp")
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk by RuntimeError
            shutil.rmtree(f"{path}.tmp", ignore_errors=True)
            whole = checkpoints(args.output_dir)
            last = f"{whole[-1]} is whole" if whole else "There is no earlier one"
            raise OSError(f"Could not write {path}: {error}. {last}; make room, then resume.") from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if path.exists():  # written by a run that went further than the checkpoint it was resumed from
                delete_checkpoint(path)
            os.replace(f"{path}.tmp", path)
            tqdm.write(f"Saved {path}")
            whole = [old for old in checkpoints(args.output_dir) if old != path]
            surplus = len(whole) + 1 - (args.checkpoints_total_limit or len(whole) + 1)
            for old in whole[: max(0, surplus)]:
                delete_checkpoint(old)

    def whole_model(state: dict[str, torch.Tensor]) -> SCRDiTTransformer:
        plain = SCRDiTTransformer.from_config(config).to(accelerator.device)
        if args.lora_rank:
            finetuning.add_lora(plain, args.lora_rank, {})
        plain.load_state_dict(state)
        return plain.eval()

    def validation_loss(trained: SCRDiTTransformer) -> float:
        count = len(val_batch["values"])
        timesteps = torch.linspace(min_timestep, args.num_train_timesteps - 1, count).to(accelerator.device, torch.long)
        generator = seeded_generator(accelerator.device, args.seed)
        noise = torch.randn(val_batch["values"].shape, generator=generator, device=accelerator.device)
        with torch.no_grad():
            return diffusion_loss(trained, noise_scheduler, val_batch, timesteps, noise, *weights).mean().item()

    def draw_samples(trained: SCRDiTTransformer, step: int) -> None:
        pipe = SCRDiTPipeline(trained, scheduler, processor, **pipeline_config)
        pipe.set_progress_bar_config(disable=True)
        obs = processor.decode_labels(val_batch["class_labels"].cpu().numpy())
        synthetic = pipe(len(val_batch["values"]), obs=obs, generator=torch.Generator().manual_seed(args.seed)).adata
        values = sp.csr_matrix(processor.inverse_transform(val_batch["values"].cpu().numpy()))
        library_size = val_batch["library_size"].cpu().numpy() if sample_counts else None
        real = ad.AnnData(processor.normalize(values, library_size), var=synthetic.var)
        try:
            figure = np.ravel(plotting.gene_statistics(real, synthetic, value_space=args.value_space))[0].figure
        except ValueError as error:  # a model at its beginning may give cells that cannot be drawn
            logger.warning(f"No picture at step {step}: {error}")
            return
        os.makedirs(os.path.join(args.output_dir, "samples"), exist_ok=True)
        figure.savefig(os.path.join(args.output_dir, "samples", f"step-{step}.png"), dpi=100)
        matplotlib.pyplot.close(figure)

    # 4. Train
    step = first_step
    if resume_from is not None:
        accelerator.load_state(str(resume_from))
        logger.info(f"Resumed from {resume_from}")
    first_step = step
    signals: list[int] = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: signals.append(number))
    stopped = False
    progress = tqdm(total=args.max_train_steps, initial=step, desc="train", disable=not accelerator.is_main_process)
    postfix: dict[str, str] = {}
    while step < args.max_train_steps and not stopped:
        epoch, done = divmod(step, updates_per_epoch)
        loader.set_epoch(epoch)
        batches = accelerator.skip_first_batches(loader, done * args.gradient_accumulation_steps)
        for micro_step, batch in enumerate(batches):
            micro_step %= args.gradient_accumulation_steps
            # All processes draw for the joined batch of all, J cells, and each takes the part of its own B cells.
            left = cells.cells_per_epoch - (step - epoch * updates_per_epoch) * cells_per_step
            num_joined = min(joined_size, left - micro_step * joined_size)
            own = share(num_joined, accelerator.num_processes, accelerator.process_index)
            scale = accelerator.num_processes * args.gradient_accumulation_steps / min(cells_per_step, left)
            if own.start == own.stop:  # more processes than cells: this one has a cell that does not count
                own, scale = slice(0, 1), 0.0
            generator = seeded_generator(accelerator.device, args.seed, step, micro_step)
            draw = {"generator": generator, "device": accelerator.device}
            timesteps = torch.randint(min_timestep, args.num_train_timesteps, (num_joined,), **draw)[own]  # (B,)
            noise = torch.randn((num_joined, processor.num_genes), **draw)[own]  # (B, G)
            labels = null_labels.repeat(num_joined, 1)  # (J, K)
            labels[own] = batch["class_labels"]
            batch["class_labels"] = drop_labels(labels, null_labels, args.class_dropout_prob, generator)[own]  # (B, K)
            torch.manual_seed(mix_seeds(args.seed, step, micro_step, 1 + accelerator.process_index))  # for dropout
            with accelerator.accumulate(model):
                losses = diffusion_loss(model, noise_scheduler, batch, timesteps, noise, *weights, prior=prior)  # (B,)
                loss = scale * losses.sum()  # its mean over processes and batches of a step is that over its cells
                running.append(loss.item())
                if not math.isfinite(running[-1]):
                    raise_not_finite(step, epoch, micro_step, batch, losses, timesteps, args)
                accelerator.backward(loss)
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
                num_steps = (step - 1) % 10 + 1
                train_loss = sum(joined_losses()) / args.gradient_accumulation_steps / num_steps
                running.clear()
                accelerator.log({"train_loss": train_loss, "lr": lr_scheduler.get_last_lr()[0]}, step=step)
                rate = (progress.format_dict["rate"] or 0) * cells_per_step
                postfix |= {"loss": f"{train_loss:.4f}", "cells/s": f"{rate:.0f}"}
                progress.set_postfix(postfix)
            if step == args.max_train_steps:
                save_checkpoint(step)
            if step % args.validation_steps == 0 or step == args.max_train_steps:
                _, averaged = gather_weights(accelerator.unwrap_model(model), ema)
                if accelerator.is_main_process:
                    averaged_model = whole_model(averaged)
                    draw_samples(averaged_model, step)
                    if cells.num_val:
                        val_loss = validation_loss(averaged_model)
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
    _, averaged = gather_weights(accelerator.unwrap_model(model), ema)
    if accelerator.is_main_process:
        pipe = SCRDiTPipeline(whole_model(averaged).cpu(), scheduler, processor, **pipeline_config)
        if args.lora_rank:
            finetuning.save_lora(pipe, args.output_dir, changes["adapter_only"])
        else:
            pipe.save_pretrained(args.output_dir)
        record |= {"finetuning": changes} if changes else {}
        record |= {"train_cells": cells.num_train, "val_cells": cells.num_val}
        record |= {"num_processes": accelerator.num_processes, "command": sys.argv}
        record |= {"versions": {m.__name__: m.__version__ for m in (scrdit_diffusers, diffusers, torch, accelerate)}}
        record |= model_card.provenance() | {"seconds": round(time.time() - start), "resumed_from_step": first_step}
        (Path(args.output_dir) / "train_config.json").write_text(json.dumps(record, indent=2))
        about = dataclasses.asdict(args) | {"model_id": repo_id if args.push_to_hub else args.hub_model_id}
        model_card.write_facts(pipe, record, about, args.output_dir)
        model_card.write_card(args.output_dir)
        logger.info(f"Saved the pipeline to {args.output_dir}")
        if args.push_to_hub:
            without = ["--exclude", "checkpoint-*", "--exclude", f"{args.logging_dir}/*"]
            command = shlex.join(["hf", "upload", repo_id, args.output_dir, *without])
            with hub.explain_push(repo_id, f"The pipeline is whole in {args.output_dir}; upload it by `{command}`."):
                hub.upload_pipeline(args.output_dir, repo_id, args.hub_token, logging_dir=args.logging_dir)
    accelerator.end_training()


def gather_weights(model: torch.nn.Module, ema: EMAModel | None) -> tuple[dict[str, torch.Tensor], ...]:
    """Gather current and averaged weights; all processes call it, for with FSDP each holds parts of them."""

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    current = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    if ema is None:
        return current, current
    names = [name for name, _ in model.named_parameters()]
    return current, current | dict(zip(names, map(whole, ema.shadow_params), strict=True))


def shard_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Part of a tensor that this process holds of another one, which may be whole."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def raise_not_finite(step, epoch, micro_step, batch, losses, timesteps, args) -> None:
    """Stop with the step, the cells and the likely cause of a loss that is NaN or infinite."""
    if not torch.isfinite(batch["values"]).all():
        cause = "the batch itself holds such values; check the data"
    elif args.mixed_precision == "fp16":
        cause = "fp16 overflowed; use --mixed_precision bf16 or no"
    else:
        cause = f"training diverged; lower --learning_rate (now {args.learning_rate:g}) or raise --lr_warmup_steps"
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    raise FloatingPointError(
        f"The loss is not finite at step {step} (epoch {epoch}, batch {micro_step}, cells {bad[:10]} "
        f"of it at timesteps {timesteps[bad[:10]].tolist()}). Likely cause: {cause}. Checkpoints stay intact."
    )


if __name__ == "__main__":
    try:
        main(HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()[0])
    except (ValueError, OSError, FloatingPointError, pickle.UnpicklingError) as error:
        sys.exit(f"error: {error}")
