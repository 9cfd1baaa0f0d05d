"""Arguments of train.py: declarations, recipes of the presets, checks, and defaults that depend on the cells."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml
from checkpointing import find_checkpoints
from cli import arg, check_numbers, may_change
from diffusers.optimization import SchedulerType

from scrdit_diffusers import SCRDIT_PRESETS
from scrdit_diffusers.evaluation import model_card
from scrdit_diffusers.redaction import redact

DEFAULT_STEPS = (600, 2500, 5000)  # minimum (half of it for a pretrained model), preferred if EPOCHS allow it, maximum
EPOCHS = (60, 150)  # minimum and maximum number of passes over the cells
MODEL_SIZES = ["patch_size", "patch_embed_type", "num_layers", "num_attention_heads", "attention_head_dim"]
MODEL_SIZES += ["num_cell_tokens"]

# Defaults that depend on the preset: ours, and for scrdit-paper-* those of scRDiT as published (arXiv 2404.06153), with
# one unconditional model per cell type. For AdamW the paper gives only the learning rate; the rest is PyTorch's.
_RECIPE_ROWS: dict[str, tuple[Any, Any]] = {
    "value_space":       ("counts",            "log_normalized"),
    "decode":            ("posterior",         "round"),
    "zero_negation":     (False,               True),
    "standardize":       (True,                False),
    "flavor":            ("seurat",            "cv"),
    "n_top_genes":       (None,                2000),
    "beta_schedule":     ("squaredcos_cap_v2", "linear"),
    "prediction_type":   ("sample",            "epsilon"),
    "loss_weighting":    ("v",                 "epsilon"),
    "max_loss_weight":   (25.0,                1e9),
    "train_batch_size":  (128,                 16),
    "num_train_epochs":  (None,                1600),
    "learning_rate":     (None,                3e-4),
    "lr_scheduler":      ("cosine",            "constant"),
    "lr_warmup_steps":   (None,                0),
    "adam_beta2":        (0.99,                0.999),
    "adam_weight_decay": (0.1,                 0.01),
    "max_grad_norm":     (1.0,                 1e9),
    "use_ema":           (True,                False),
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    preset: {name: row[preset.startswith("scrdit-paper")] for name, row in _RECIPE_ROWS.items()}
    for preset in SCRDIT_PRESETS
}


def recipe_arg(name: str, help: str, **kwargs: Any):
    """Declare an argument whose default depends on the preset."""
    ours, paper = _RECIPE_ROWS[name]
    defaults = f" Default: {paper} for scrdit-paper-*" + (f", else {ours}." if ours is not None else ".")
    return arg(None, help + defaults, **kwargs)


def recipe_switch(name: str, help: str):
    """Declare a switch whose default depends on the preset."""
    return recipe_arg(name, help, nargs="?", const=True)


@dataclass(frozen=True)
class TrainingArguments:
    """Command-line arguments; names as in diffusers' example scripts."""

    # data
    dataset: str = arg(
        None, "Cells: .h5ad or .zarr, a folder or pattern of them, a dataset folder, or an id on the Hub.", True
    )
    streaming: bool = arg(False, "Read a dataset while training instead of downloading it; one process.")
    join: str = arg(
        "inner", "Genes of several files: inner keeps those in all files, outer all.", choices=["inner", "outer"]
    )
    gene_key: str | None = arg(None, "Column of var that identifies a gene, such as gene_ids; var_names if not given.")
    preprocessing_num_workers: int | None = arg(None, "Processes that convert files and fit the processor.", True)
    labels_key: list[str] = arg([], "Column(s) of obs that condition the model; none trains without labels.")
    num_states: int | None = arg(
        None,
        "Groups of similar cells to find as one more condition, drawn with the labels. If not given: without labels, "
        "a quarter of the root of the number of cells, at most 20, and one for 16 of fewer than 200 cells; with labels "
        "none.",
    )
    layer: str | None = arg(None, "Layer that holds the values; X if not given.")
    value_space: str | None = recipe_arg(
        "value_space", "Kind of values that are read and generated.", choices=["counts", "log_normalized"]
    )
    target_sum: float | None = arg(None, "log_normalized: values are counts; normalize them to this library size.")
    zero_negation: bool | None = recipe_switch("zero_negation", "Move exact zeros to --zero_value, away from the rest.")
    zero_value: float = arg(-10.0, "Value of exact zeros with zero negation, in the log space (paper: -10).")
    standardize: bool | None = recipe_switch("standardize", "Standardize each gene: mean 0, standard deviation 1.")
    min_std: float = arg(0.3, "Smallest standard deviation by which a gene is divided, in the log space.")
    n_top_genes: int | None = recipe_arg(
        "n_top_genes", "Number of genes; if not given, that of the pretrained pipeline, or 2000."
    )
    flavor: str | None = recipe_arg(
        "flavor", "How genes are chosen: scanpy's seurat, cell_ranger or seurat_v3; cv (the paper's); or all."
    )
    genes: str | None = arg(None, "Text file with one gene name per line, instead of a choice by --flavor.")
    val_fraction: float = arg(0.0, "Share of the cells of each label held out of training for a validation loss.")
    # fine-tuning
    pretrained_model_name_or_path: str | None = arg(None, "Pipeline to start from: a folder or an id on the Hub.")
    lora_rank: int | None = arg(None, "Train LoRA adapters of this rank instead of all weights.")
    # model
    preset: str = arg("scrdit-s", "Size of the transformer, and training recipe.", choices=list(SCRDIT_PRESETS))
    patch_size: int | None = arg(None, "Genes per token; overrides the preset, as do the next five.")
    patch_embed_type: str | None = arg(None, "per_patch or shared projections.")
    num_layers: int | None = arg(None, "Number of blocks.")
    num_attention_heads: int | None = arg(None, "Number of attention heads.")
    attention_head_dim: int | None = arg(None, "Width of a head.")
    num_cell_tokens: int | None = arg(None, "Tokens that read all genes.")
    dropout: float = arg(0.0, "Dropout probability in the MLPs and before the last projection.")
    # diffusion
    prediction_type: str | None = recipe_arg(
        "prediction_type", "What the model predicts.", choices=["epsilon", "v_prediction", "sample"]
    )
    num_train_timesteps: int = arg(1000, "Number of diffusion timesteps T.")
    beta_schedule: str | None = recipe_arg(
        "beta_schedule", "Noise schedule.", choices=["linear", "scaled_linear", "squaredcos_cap_v2"]
    )
    loss_weighting: str | None = recipe_arg(
        "loss_weighting", "Weight of a timestep in the loss.", choices=["v", "epsilon", "x0"]
    )
    max_loss_weight: float | None = recipe_arg("max_loss_weight", "Largest weight of an error of the clean cell.")
    decode: str | None = recipe_arg(
        "decode", "Draw counts from their learned posterior, or round.", choices=["posterior", "round"]
    )
    decode_timestep: int = arg(200, "Timestep at which counts are drawn from their posterior.")
    prior_std: float = arg(0.16, "Counts: standard deviation of the prior of log fold changes.")
    min_timestep: int = arg(200, "Lowest timestep to train with --decode posterior, which uses none below.")
    class_dropout_prob: float = arg(0.02, "Share of cells trained without labels, for classifier-free guidance.")
    # optimization
    output_dir: str = arg("scrdit-model", "Folder of the pipeline, the checkpoints and the logs.", True)
    overwrite_output_dir: bool = arg(
        False, "Start over and delete the checkpoints in --output_dir, unless one is resumed from.", True
    )
    seed: int = arg(0, "Seed of all randomness.")
    train_batch_size: int | None = recipe_arg("train_batch_size", "Cells per step and process.")
    max_train_steps: int | None = arg(
        None,
        "Number of optimizer steps. Default: 2,500, adjusted to 60-150 epochs and clamped to 600-5,000 (300-5,000 when "
        "fine-tuning).",
        True,
    )
    num_train_epochs: int | None = recipe_arg(
        "num_train_epochs", "Passes over the cells; overrides --max_train_steps.", may_change=True
    )
    gradient_accumulation_steps: int = arg(1, "Batches per optimizer step.")
    gradient_checkpointing: bool = arg(False, "Save memory by computing the forward pass twice.")
    learning_rate: float | None = recipe_arg("learning_rate", "Peak learning rate; 3e-3 x 128 / width if not given.")
    lr_scheduler: str | None = recipe_arg(
        "lr_scheduler", "Learning-rate schedule, a name of diffusers.optimization.get_scheduler."
    )
    lr_warmup_steps: int | None = recipe_arg(  # follows from --max_train_steps
        "lr_warmup_steps",
        "Warm-up steps; 200, but at most two thirds of all steps (fine-tuning: a tenth).",
        may_change=True,
    )
    adam_beta2: float | None = recipe_arg("adam_beta2", "AdamW beta 2.")
    adam_weight_decay: float | None = recipe_arg("adam_weight_decay", "AdamW weight decay.")
    adam_epsilon: float = arg(1e-8, "AdamW epsilon.")
    max_grad_norm: float | None = recipe_arg("max_grad_norm", "Largest gradient norm.")
    use_ema: bool | None = recipe_switch("use_ema", "Average the weights, and save the average.")
    mixed_precision: str | None = arg(None, "no, fp16 or bf16; the choice of `accelerate launch` if not given.")
    dataloader_num_workers: int = arg(0, "Processes that collate batches.", True)
    # checkpoints, validation, reports
    checkpointing_steps: int = arg(2000, "Steps between checkpoints.", True)
    checkpointing_minutes: float = arg(
        10.0, "Minutes after which a checkpoint is due as well; 0 for steps alone.", True
    )
    checkpoints_total_limit: int | None = arg(2, "Number of checkpoints to keep.", True)
    resume_from_checkpoint: str | None = arg(None, "A checkpoint folder, or latest.", True)
    validation_steps: int = arg(
        1000, "Steps between sample figures, and validation losses if cells are held out.", True
    )
    num_validation_cells: int = arg(256, "Cells in the sample figures and in the validation loss.")
    report_to: str = arg("tensorboard", "Tracker known to Accelerate, or none.", True)
    dry_run: bool = arg(False, "Print the resolved configuration and the cost, then stop.", True)
    push_to_hub: bool = arg(False, "Upload the pipeline at the end.", True)
    hub_model_id: str | None = arg(None, "Repository on the Hub; the name of --output_dir if not given.", True)
    hub_token: str | None = arg(
        None,
        "Token for the Hub. HF_TOKEN or the stored one, if not given, are safer: `accelerate launch` without --quiet "
        "prints the command of a run that fails.",
        True,
    )
    hub_private_repo: bool = arg(False, "Make the repository private.", True)
    card_data: str | None = arg(
        None, f"YAML or JSON file for the model card, with some of {', '.join(model_card.ABOUT[1:])}.", True
    )

    def with_recipe(self) -> Self:
        """Fill in missing arguments from the recipe of the preset."""
        recipe = dict(RECIPES[self.preset])
        if self.max_train_steps is not None:
            del recipe["num_train_epochs"]
        missing = {name: value for name, value in recipe.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def resolve(self, num_cells: int, num_processes: int, width: int, num_genes: int = 2000) -> Self:
        """Fill in what depends on the cells, the number of processes, and the width and genes of the model."""
        finetuned = self.pretrained_model_name_or_path is not None
        cells_per_step = self.train_batch_size * self.gradient_accumulation_steps * num_processes
        steps = self.max_train_steps
        if self.num_train_epochs is not None:
            steps = self.num_train_epochs * math.ceil(num_cells / cells_per_step)
        elif steps is None:
            steps = default_num_steps(math.ceil(num_cells / cells_per_step), finetuned)
        warmup = self.lr_warmup_steps
        if warmup is None:
            warmup = min(200, steps // 10 if finetuned else steps * 2 // 3)
        rate = 3e-3 * 128 / width if self.learning_rate is None else self.learning_rate
        schedule = {"max_train_steps": steps, "lr_warmup_steps": warmup, "learning_rate": rate}
        return dataclasses.replace(self, n_top_genes=self.n_top_genes or num_genes, **schedule)

    def record(self) -> dict[str, Any]:
        """All arguments, for files: without the token and other credentials."""
        return redact({name: value for name, value in dataclasses.asdict(self).items() if name != "hub_token"})

    def about(self) -> dict[str, Any]:
        """Read `card_data`: facts about the weights and the cells."""
        try:
            return (yaml.safe_load(Path(self.card_data).read_text(encoding="utf-8")) or {}) if self.card_data else {}
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"--card_data {self.card_data} is neither YAML nor JSON: {error}") from error


POSITIVE = ["train_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "validation_steps"]
POSITIVE += ["max_train_steps", "num_train_epochs", "num_train_timesteps", "num_validation_cells"]
POSITIVE += ["lora_rank", "learning_rate", "max_loss_weight", "prior_std", "max_grad_norm", "min_std", "target_sum"]
POSITIVE += ["checkpoints_total_limit", "n_top_genes", "preprocessing_num_workers"]
POSITIVE += ["patch_size", "num_layers", "num_attention_heads", "attention_head_dim"]
NOT_NEGATIVE = ["lr_warmup_steps", "checkpointing_minutes", "dataloader_num_workers", "num_cell_tokens"]
NOT_NEGATIVE += ["adam_weight_decay", "adam_epsilon", "decode_timestep", "min_timestep", "num_states"]
SHARES = ["val_fraction", "class_dropout_prob", "dropout", "adam_beta2"]
FIXED = [argument.name for argument in dataclasses.fields(TrainingArguments) if not may_change(argument)]


def default_num_steps(updates_per_epoch: int, finetuned: bool) -> int:
    """Choose the number of optimizer steps; more passes would overfit small datasets."""
    fewest, usual, most = DEFAULT_STEPS
    steps = np.clip(usual, EPOCHS[0] * updates_per_epoch, EPOCHS[1] * updates_per_epoch)
    return int(np.clip(steps, fewest // 2 if finetuned else fewest, most))


def check_args(args: TrainingArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is read."""
    args = args.with_recipe()
    if args.dataset is None:
        raise ValueError("--dataset is needed: a .h5ad file, a .zarr store, a dataset folder or an id on the Hub.")
    check_numbers(args, POSITIVE, NOT_NEGATIVE)
    for name in SHARES:
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 0 and below 1, got {getattr(args, name)}.")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 2^32 - 1, got {args.seed}.")
    if args.decode == "posterior":
        check_posterior(args)
    schedules = [schedule.value for schedule in SchedulerType]
    if args.lr_scheduler not in schedules:
        raise ValueError(f"--lr_scheduler must be one of {schedules}, got {args.lr_scheduler}.")
    if args.mixed_precision not in (None, "no", "fp16", "bf16"):
        raise ValueError(f"--mixed_precision must be no, fp16 or bf16, got {args.mixed_precision}.")
    if len(set(args.labels_key)) < len(args.labels_key):
        raise ValueError(f"--labels_key names a column twice: {args.labels_key}.")
    if args.num_states == 1:
        raise ValueError("--num_states must be at least 2, or 0 for none, got 1.")
    if args.num_states and args.decode != "posterior":
        raise ValueError(f"--num_states {args.num_states} needs --decode posterior: states are groups of counts.")
    if args.num_states is not None and args.pretrained_model_name_or_path:
        raise ValueError(
            f"--num_states {args.num_states} does not go with --pretrained_model_name_or_path, which keeps its states."
        )
    if args.lora_rank and not args.pretrained_model_name_or_path:
        raise ValueError(
            f"--lora_rank {args.lora_rank} needs --pretrained_model_name_or_path: adapters change a trained model."
        )
    check_files(args)
    check_output_dir(args)


def check_posterior(args: TrainingArguments) -> None:
    """Raise ValueError for arguments that do not go with `--decode posterior`."""
    if not 0 <= args.min_timestep <= args.decode_timestep < args.num_train_timesteps:
        raise ValueError(
            f"--min_timestep {args.min_timestep}, --decode_timestep {args.decode_timestep} and --num_train_timesteps "
            f"{args.num_train_timesteps} must be in this order."
        )
    if args.zero_negation:
        raise ValueError("--zero_negation True needs --decode round: the posterior of the counts includes zeros.")
    if args.prediction_type != "sample":
        raise ValueError(
            f"--prediction_type {args.prediction_type} needs --decode round: with a posterior of the counts the "
            "denoised cell is the mean of that posterior."
        )


def check_files(args: TrainingArguments) -> None:
    """Raise ValueError for files that are missing or hold something else."""
    for name, content in (("genes", "one gene name per line"), ("card_data", "YAML or JSON")):
        if (path := getattr(args, name)) and not Path(path).is_file():
            raise ValueError(f"--{name} {path} is not a file; it should hold {content}.")
    about = args.about()
    if not isinstance(about, dict) or (unknown := about.keys() - set(model_card.ABOUT[1:])):
        wrong = sorted(unknown) if isinstance(about, dict) else type(about).__name__
        raise ValueError(f"--card_data {args.card_data} may hold {model_card.ABOUT[1:]}, got {wrong}.")


def check_output_dir(args: TrainingArguments) -> None:
    """Raise ValueError for an output folder whose earlier run would be lost."""
    used = find_checkpoints(args.output_dir) or (Path(args.output_dir) / "model_index.json").exists()
    if used and not (args.resume_from_checkpoint or args.overwrite_output_dir or args.dry_run):
        raise ValueError(
            f"{args.output_dir} holds an earlier run: give --resume_from_checkpoint latest to continue it, "
            "--overwrite_output_dir to delete its checkpoints, or another --output_dir."
        )
