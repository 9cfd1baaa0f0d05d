"""Train scRDiT on an AnnData file and save it as a pipeline.

    accelerate launch training/train.py --dataset cells.h5ad --labels_key cell_type --output_dir scrdit-model

The pipeline folder is `--output_dir` itself. Run the same command with `--resume_from_checkpoint latest` to continue
where the last run stopped, with the same result: all randomness of a step is a function of seed and step. Except for
`--dropout`, the result does not depend on the number of processes, given the same number of cells per step.
"""

import json
import logging
import math
import os
import pickle
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed

sys.path.insert(0, str(Path(__file__).parent))  # which `runpy.run_path` does not do
from arguments import FIXED, MODEL_SIZES, TrainingArguments, check_args, check_output_dir
from checkpointing import TrainingState, find_checkpoint, find_checkpoints
from cli import command_line, read_genes, run
from diffusers import DDPMScheduler
from preview import draw_samples, validation_loss
from safetensors import SafetensorError
from tqdm.auto import tqdm

import scrdit_diffusers
from scrdit_diffusers import (
    CellBatches,
    CellCollator,
    CellDataset,
    FoldChangePrior,
    SCRDiTPipeline,
    SCRDiTProcessor,
    SCRDiTTransformer,
    count_bins,
    default_scheduler,
    diffusion_loss,
    finetuning,
    fit_dataset,
    fit_preset,
    hub,
    initialize_from_cells,
)
from scrdit_diffusers.atomic import LOCK_NAME, delete_folder, lock_folder, write_into
from scrdit_diffusers.cells.moments import CellMoments
from scrdit_diffusers.cells.states import choose_num_states
from scrdit_diffusers.evaluation import model_card
from scrdit_diffusers.launch import catch_signals, check_processes
from scrdit_diffusers.objective import drop_labels
from scrdit_diffusers.processing_scrdit import FEW_CELLS, RARE_LABEL_CELLS
from scrdit_diffusers.schedulers import FAST_TIMESTEPS

logger = logging.getLogger("train")

MAX_START_CELLS = 5000  # from which cell tokens (by principal components) and new labels start


@dataclass
class Cells:
    """Training and validation cells, and what was learned from the training cells."""

    processor: SCRDiTProcessor
    statistics: CellMoments
    batches: CellBatches
    preview_batch: dict[str, torch.Tensor]  # held-out cells, or training cells if there are none
    start_cells: dict[str, torch.Tensor]  # at most MAX_START_CELLS training cells
    num_train: int
    num_val: int


@dataclass
class Objective:
    """What the loss needs besides the model and a batch."""

    scheduler: diffusers.SchedulerMixin  # of the pipeline
    noise_scheduler: DDPMScheduler  # of training, the same noise process
    null_labels: torch.Tensor  # (K,)
    prior: FoldChangePrior | None
    pipeline_config: dict[str, Any]


def main(args: TrainingArguments) -> None:
    """Train, then save the pipeline to `args.output_dir`."""
    start_time = time.time()
    args = args.with_recipe()
    check_args(args)
    accelerator = start(args)
    args = replace(args, mixed_precision=accelerator.mixed_precision)  # the launcher may have chosen it
    writes = accelerator.is_main_process and not args.dry_run
    with lock_folder(args.output_dir, "Wait for it, or give another --output_dir.") if writes else nullcontext():
        check_output_dir(args)  # as no other run changes it any more
        checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
        pretrained = load_pretrained(args)
        cells = open_cells(args, accelerator, pretrained)
        model, changes = build_model(args, cells, pretrained)
        settings = args.resolve(cells.num_train, accelerator.num_processes, width(model), default_num_genes(pretrained))
        report_plan(settings, accelerator, cells, model, changes)
        if args.dry_run:
            return

        objective = make_objective(settings, cells, model, accelerator.device)
        state = TrainingState(accelerator, model, cells.processor, settings, FIXED)
        repo_id = prepare_outputs(settings, accelerator, checkpoint)
        state.resume(checkpoint)
        first_step = state.step
        progress = tqdm(total=settings.max_train_steps, initial=state.step, disable=not accelerator.is_main_process)
        with catch_signals() as find_signal:
            stopped = train(state, cells, objective, progress, find_signal)
            if stopped:
                accelerator.end_training()
                logger.warning(f"Stopped at step {state.step}; continue with --resume_from_checkpoint latest.")
                sys.exit(128 + (find_signal() or signal.SIGTERM))
        if accelerator.is_main_process:
            history = {"seconds": round(time.time() - start_time), "resumed_from_step": first_step}
            save_pipeline(state, cells, objective, changes, history, repo_id)
        accelerator.end_training()


def train(
    state: TrainingState, cells: Cells, objective: Objective, progress: tqdm, find_signal: Callable[[], int | None]
) -> bool:
    """Train until all steps are done or a signal arrives; return whether one did."""
    accelerator, settings = state.accelerator, state.settings
    accumulation = settings.gradient_accumulation_steps
    weighting = (settings.loss_weighting, settings.max_loss_weight)
    first_batch = state.step * accumulation
    batches = enumerate(cells.batches(first_batch), first_batch)
    stopped = False
    while not (state.finished or stopped):
        number, batch = next(batches)
        step, micro_step = divmod(number, accumulation)
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with accelerator.accumulate(state.model):
            timesteps, noise, labels = draw_inputs(batch, objective, settings, accelerator, step, micro_step)
            batch["class_labels"] = labels
            losses = diffusion_loss(
                state.model, objective.noise_scheduler, batch, timesteps, noise, *weighting, prior=objective.prior
            )
            loss = losses.mean()
            state.losses.append(loss.item())
            if not math.isfinite(state.losses[-1]):
                raise_not_finite(step, micro_step, batch, losses, timesteps, settings)
            if not state.update(loss):
                continue

        progress.update()
        if state.step % 10 == 0 or state.finished:
            report_loss(state, progress)
        if state.finished:
            state.save()
        if state.step % settings.validation_steps == 0 or state.finished:
            show_preview(state, cells, objective)
        stopped, is_time = state.agree(find_signal() is not None, state.is_time)
        if stopped or ((is_time or state.step % settings.checkpointing_steps == 0) and not state.finished):
            state.save()
    progress.close()
    return stopped


def draw_inputs(
    batch: Mapping[str, torch.Tensor],
    objective: Objective,
    settings: TrainingArguments,
    accelerator: Accelerator,
    step: int,
    micro_step: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a timestep (B,) and noise (B, G) for each cell of a batch, and drop labels (B, K), by seed and step."""
    batch_size, num_genes = batch["values"].shape
    # All processes draw for the joined batch of all, J cells, and each takes the part of its own B cells.
    joined_size = batch_size * accelerator.num_processes
    own = slice(accelerator.process_index * batch_size, (accelerator.process_index + 1) * batch_size)
    generator = seeded_generator(accelerator.device, settings.seed, step, micro_step)
    draw = {"generator": generator, "device": accelerator.device}
    first_timestep = objective.pipeline_config["min_timestep"]
    timesteps = torch.randint(first_timestep, settings.num_train_timesteps, (joined_size,), **draw)[own]  # (B,)
    noise = torch.randn((joined_size, num_genes), **draw)[own]  # (B, G)
    labels = objective.null_labels.repeat(joined_size, 1)  # (J, K)
    labels[own] = batch["class_labels"]
    labels = drop_labels(labels, objective.null_labels, settings.class_dropout_prob, generator)[own]  # (B, K)
    torch.manual_seed(mix_seeds(settings.seed, step, micro_step, 1 + accelerator.process_index))  # for dropout
    return timesteps, noise, labels


def start(args: TrainingArguments) -> Accelerator:
    """Find the other processes, check arguments, set up logging and seeds."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, "logs")),
        step_scheduler_with_optimizer=False,
    )
    check_processes(accelerator.num_processes)
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:  # the environment decides
        raise ValueError(
            f"--gradient_accumulation_steps is {args.gradient_accumulation_steps}, but accelerate was launched with "
            f"{accelerator.gradient_accumulation_steps}: give the same to both."
        )
    if args.report_to not in ("none", "all") and not accelerator.log_with:
        raise ValueError(f"--report_to {args.report_to} is not installed.")
    if args.streaming and (accelerator.num_processes > 1 or args.dataloader_num_workers > 1):
        raise ValueError("--streaming is for one process with at most one data loader worker; else leave it out.")
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)
    torch.set_flush_denormal(True)  # optimizer states decay into denormals, which are slow on CPUs
    return accelerator


def load_pretrained(args: TrainingArguments) -> SCRDiTPipeline | None:
    """Load the pretrained pipeline; raise ValueError for arguments that do not fit it."""
    if args.pretrained_model_name_or_path is None:
        return None
    pretrained = SCRDiTPipeline.from_pretrained(args.pretrained_model_name_or_path)
    finetuning.check_settings(pretrained, asdict(args))
    return pretrained


def default_num_genes(pretrained: SCRDiTPipeline | None) -> int:
    """Choose the number of genes if none is given."""
    return pretrained.processor.num_genes if pretrained else 2000


def open_cells(args: TrainingArguments, accelerator: Accelerator, pretrained: SCRDiTPipeline | None) -> Cells:
    """Open the cells as a dataset on disk, split it, fit the processor to the training cells."""
    dataset = CellDataset.open(
        args.dataset,
        layer=args.layer,
        expect_counts=args.value_space == "counts" or args.target_sum is not None,
        obs_columns=args.labels_key,
        labels_key=args.labels_key,
        join=args.join,
        gene_key=args.gene_key,
        streaming=args.streaming,
        num_proc=args.preprocessing_num_workers,
    )
    train, val = dataset.split(args.labels_key, args.val_fraction, args.seed)
    processor, statistics = fit_processor(args, train, pretrained)
    num_train = int(statistics.num_cells.sum())
    collate = CellCollator(processor, dataset.var, args.decode == "posterior", dataset.token_key)
    rng = np.random.default_rng(args.seed)
    start_cells = collate(train.sample(MAX_START_CELLS, args.labels_key, rng))
    shown = val.sample(args.num_validation_cells, args.labels_key, rng)
    num_val = shown.num_rows if val.is_stream else len(val)
    if not num_val:
        shown = train.sample(args.num_validation_cells, args.labels_key, rng)
    preview_batch = collate(shown)
    preview_batch = {name: tensor.to(accelerator.device) for name, tensor in preview_batch.items()}
    batches = CellBatches(
        train.rows,
        num_train,
        args.train_batch_size,
        collate,
        args.labels_key,
        seed=args.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        num_workers=args.dataloader_num_workers,
    )
    return Cells(processor, statistics, batches, preview_batch, start_cells, num_train, num_val)


def fit_processor(
    args: TrainingArguments, train: CellDataset, pretrained: SCRDiTPipeline | None
) -> tuple[SCRDiTProcessor, CellMoments]:
    """Choose the genes and learn the transform from the training cells."""
    names = ["value_space", "target_sum", "zero_negation", "zero_value", "min_std", "flavor", "standardize"]
    options = {name: getattr(args, name) for name in names}
    options |= {"n_top_genes": args.n_top_genes or default_num_genes(pretrained)}
    options |= {"name": str(args.dataset), "num_proc": args.preprocessing_num_workers}
    options |= {"recover_counts": args.decode == "posterior", "token_key": train.token_key}
    genes = read_genes(args.genes) if args.genes else None
    if pretrained is None:
        options["num_states"] = args.num_states
        return fit_dataset(train.rows, train.var, args.labels_key, genes=genes, **options)
    known = pretrained.processor.var_names
    finetuning.check_common_genes(known, genes or list(train.var.index))
    if genes is None:
        variable, _ = fit_dataset(train.rows, train.var, args.labels_key, **options)
        total = len(train.var) if args.flavor == "all" else options["n_top_genes"]
        genes = finetuning.choose_genes(known, list(train.var.index), variable, total)
    genes = finetuning.arrange_genes(known, genes)
    if len(pretrained.processor.state_profiles):
        options["pretrained_states"] = pretrained.processor
    fitted, statistics = fit_dataset(train.rows, train.var, args.labels_key, genes=genes, **options)
    adapted = finetuning.adapt_processor(pretrained.processor, fitted, keep_labels=bool(args.lora_rank))
    return adapted, statistics


def build_model(
    args: TrainingArguments, cells: Cells, pretrained: SCRDiTPipeline | None
) -> tuple[SCRDiTTransformer, dict[str, Any]]:
    """Make a new transformer with initial weights, or adapt the pretrained one; also return what changed."""
    statistics = cells.statistics if args.decode == "posterior" else None
    if pretrained is not None:
        options = {"dropout": args.dropout, "lora_rank": args.lora_rank, "cells": cells.start_cells}
        model, changes = finetuning.adapt_transformer(pretrained, cells.processor, statistics, **options)
    else:
        sizes = {name: getattr(args, name) for name in MODEL_SIZES if getattr(args, name) is not None}
        config = fit_preset(args.preset, cells.processor.num_genes) | sizes | {"dropout": args.dropout}
        config |= {"num_genes": cells.processor.num_genes, "num_classes": cells.processor.num_classes}
        if statistics is not None:
            config |= {"count_bins": count_bins(statistics), "beta_schedule": args.beta_schedule}
            config |= {"num_train_timesteps": args.num_train_timesteps}
        model, changes = SCRDiTTransformer(**config), {}
        values, prior_std = cells.start_cells["values"], args.prior_std if has_few_cells(cells, pretrained) else None
        initialize_from_cells(model, cells.processor, statistics, values, prior_std=prior_std)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model, changes


def has_few_cells(cells: Cells, pretrained: object | None) -> bool:
    """Whether labels start at their posterior modes and have a prior of their own: few cells do not teach them."""
    return pretrained is None and cells.num_train < FEW_CELLS


def width(model: SCRDiTTransformer) -> int:
    """Width of a token."""
    return model.config.num_attention_heads * model.config.attention_head_dim


def make_objective(
    settings: TrainingArguments, cells: Cells, model: SCRDiTTransformer, device: torch.device
) -> Objective:
    """Noise process, prior and null labels; the model is not wrapped yet."""
    posterior, pretrained = settings.decode == "posterior", settings.pretrained_model_name_or_path
    scheduler = default_scheduler(settings.prediction_type, settings.beta_schedule, settings.num_train_timesteps)
    null_labels = torch.tensor(cells.processor.num_classes, dtype=torch.long, device=device)  # (K,)
    centered = {"around_present_weights": pretrained is not None, "own_label_prior": has_few_cells(cells, pretrained)}
    prior = FoldChangePrior(model, cells.num_train, settings.prior_std, **centered) if posterior else None
    has_default_noise = (settings.beta_schedule, settings.num_train_timesteps) == ("squaredcos_cap_v2", 1000)
    pipeline_config = {
        "decode_timestep": settings.decode_timestep if posterior else None,
        "min_timestep": settings.min_timestep if posterior else 0,
        "default_timesteps": FAST_TIMESTEPS if posterior and has_default_noise else None,
        "autocast_dtype": "bfloat16" if posterior else None,
    }
    noise_scheduler = DDPMScheduler.from_config(scheduler.config)
    return Objective(scheduler, noise_scheduler, null_labels, prior, pipeline_config)


def advised_states(settings: TrainingArguments, cells: Cells) -> int:
    """Choose as many states as training without labels finds, if labels are fewer; else 0."""
    if settings.num_states is not None or settings.decode != "posterior" or settings.pretrained_model_name_or_path:
        return 0
    num_states, num_combinations = choose_num_states(cells.num_train), len(cells.processor.composition)
    return num_states if settings.labels_key and cells.num_train >= FEW_CELLS and num_combinations < num_states else 0


def report_plan(
    settings: TrainingArguments,
    accelerator: Accelerator,
    cells: Cells,
    model: SCRDiTTransformer,
    changes: Mapping[str, Any],
) -> None:
    """Log what will be trained and its cost; a dry run also prints all settings."""
    processor, steps = cells.processor, settings.max_train_steps
    cells_per_step = settings.train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    flops = 3 * model.flops_per_cell() * cells_per_step * steps
    logger.info(
        f"{cells.num_train} training and {cells.num_val} held-out cells, {processor.num_genes} genes, "
        f"conditions { {key: len(names) for key, names in processor.conditions.items()} }"
    )
    if num_states := advised_states(settings, cells):
        logger.info(
            f"The labels tell few kinds of cells apart: --num_states {num_states} finds groups of similar cells as "
            "well, which may bring generated cells closer to real ones."
        )
    label_counts = processor.label_counts
    for key in processor.labels_keys if processor.composition else []:
        if rare := {name: number for name, number in label_counts[key].items() if number < RARE_LABEL_CELLS}:
            logger.warning(f"Few training cells for some of {key}, so cells generated for these may be poor: {rare}")
    logger.info(
        f"{settings.preset}: {model.num_parameters() / 1e6:.2f} M parameters, {model.num_patches} tokens, "
        f"{model.flops_per_cell() / 1e6:.1f} MFLOP per cell forward; {steps} steps of {cells_per_step} "
        f"cells ({steps * cells_per_step / cells.num_train:.0f} epochs) are {flops / 1e15:.3f} PFLOP"
    )
    if changes:
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        logger.info(
            f"Fine-tuning {settings.pretrained_model_name_or_path}, {trainable / 1e6:.2f} M parameters trained: "
            f"{changes}"
        )
    if settings.dry_run and accelerator.is_main_process:
        shown = {name: value for name, value in model.config.items() if not name.startswith("_")}
        print(json.dumps({"arguments": settings.record(), "transformer": shown}, indent=2))


def prepare_outputs(settings: TrainingArguments, accelerator: Accelerator, checkpoint: Path | None) -> str | None:
    """Make the repository on the Hub, delete what is overwritten, start the trackers; return the id, if any."""
    if not accelerator.is_main_process:
        return None
    repo_id = None
    if settings.push_to_hub:  # before training, so that a wrong name or token costs nothing
        name = settings.hub_model_id or Path(settings.output_dir).name
        repo_id = hub.prepare_repository(name, settings.hub_private_repo, settings.hub_token)
    # A killed run may have logged steps that will be repeated.
    first_step = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    tensorboard = {"tensorboard": {"purge_step": first_step + 1}}
    accelerator.init_trackers("scrdit", {k: str(v) for k, v in settings.record().items()}, tensorboard)
    if settings.overwrite_output_dir and checkpoint is None:  # last, as whatever fails before must not cost them
        for path in find_checkpoints(settings.output_dir):
            delete_folder(path)
    return repo_id


def report_loss(state: TrainingState, progress: tqdm) -> None:
    """Log the loss since the last report, the learning rate and the speed."""
    settings, loss = state.settings, state.mean_loss()
    state.accelerator.log({"train_loss": loss, "lr": state.lr_scheduler.get_last_lr()[0]}, step=state.step)
    cells = settings.train_batch_size * settings.gradient_accumulation_steps * state.accelerator.num_processes
    bar = progress.format_dict  # which knows no rate before it is drawn a second time
    rate = cells * (bar["rate"] or (bar["n"] - (bar["initial"] or 0)) / max(bar["elapsed"], 1e-3))
    progress.set_postfix({"loss": f"{loss:.4f}", "cells/s": f"{rate:.0f}"})


def show_preview(state: TrainingState, cells: Cells, objective: Objective) -> None:
    """Draw generated cells, and log the loss of the held-out cells."""
    if not state.accelerator.is_main_process:
        return
    settings, model = state.settings, state.whole_model()
    pipe = SCRDiTPipeline(model, objective.scheduler, cells.processor, **objective.pipeline_config)
    path = Path(settings.output_dir) / "samples" / f"step-{state.step}.png"
    draw_samples(pipe, cells.preview_batch, settings.seed, path)
    if cells.num_val:
        loss = validation_loss(model, objective.noise_scheduler, cells.preview_batch, settings)
        state.accelerator.log({"val_loss": loss}, step=state.step)
        tqdm.write(f"Step {state.step}: validation loss {loss:.4f}")


def save_pipeline(
    state: TrainingState,
    cells: Cells,
    objective: Objective,
    changes: Mapping[str, Any],
    history: Mapping[str, Any],
    repo_id: str | None,
) -> None:
    """Write the pipeline, train_config.json and the model card; upload them if requested."""
    settings, folder = state.settings, state.settings.output_dir
    about = settings.about() | {"model_id": repo_id or settings.hub_model_id}
    pipe = SCRDiTPipeline(state.whole_model().cpu(), objective.scheduler, cells.processor, **objective.pipeline_config)
    record = settings.record() | ({"finetuning": changes} if changes else {})
    record |= {"train_cells": cells.num_train, "val_cells": cells.num_val}
    record |= {"num_processes": state.accelerator.num_processes, "command": command_line()}
    record |= {"versions": {m.__name__: m.__version__ for m in (scrdit_diffusers, diffusers, torch, accelerate)}}
    record |= provenance() | history
    # What must not stay of an earlier pipeline in the folder, and of its evaluation, if saving is interrupted.
    stale = [*hub.weights_last(folder), *model_card.EVALUATION_FILES]
    try:
        with write_into(folder, ["pytorch_lora_weights.safetensors", *stale]) as temporary:
            if settings.lora_rank:
                finetuning.save_lora(pipe, str(temporary), changes["adapter_only"])
            else:
                pipe.save_pretrained(temporary)
            (temporary / "train_config.json").write_text(json.dumps(record, indent=2))
            model_card.write_facts(pipe, record, about, temporary)
            model_card.write_card(temporary, name=Path(folder).resolve().name)
    except (OSError, SafetensorError) as error:
        last = find_checkpoints(folder)[-1]
        raise OSError(
            f"Could not write the pipeline to {folder}: {error}. {last} is whole; make room, then resume."
        ) from error
    logger.info(f"Saved the {'adapter' if settings.lora_rank else 'pipeline'} to {folder}")
    if repo_id:
        without = ["--exclude", "checkpoint-*", "--exclude", "logs/*", "--exclude", LOCK_NAME]
        command = shlex.join(["hf", "upload", repo_id, folder, *without])
        with hub.explain_push(repo_id, f"The pipeline is whole in {folder}; upload it by `{command}`."):
            hub.upload_pipeline(folder, repo_id, settings.hub_token)


def provenance() -> dict[str, str | None]:
    """Find the `commit` of the checkout (`None` outside of one) and the `hardware` of the run."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = ""
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        hardware = f"{threads} thread{'s' if threads > 1 else ''} of a {platform.machine()} CPU"
    return {"commit": found or None, "hardware": hardware}


def mix_seeds(*seeds: int) -> int:
    """Mix several seeds into one; trailing zeros do not count."""
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]) >> 1


def seeded_generator(device: torch.device, *seeds: int) -> torch.Generator:
    """Make a generator seeded by several integers."""
    return torch.Generator(device).manual_seed(mix_seeds(*seeds))


def raise_not_finite(step, micro_step, batch, losses, timesteps, args) -> None:
    """Raise FloatingPointError with step, cells and likely cause of a loss that is NaN or infinite."""
    if not torch.isfinite(batch["values"]).all():
        cause = "the batch itself holds such values; check the data"
    elif args.mixed_precision == "fp16":
        cause = "fp16 overflowed; use --mixed_precision bf16 or no"
    else:
        cause = f"training diverged; lower --learning_rate (now {args.learning_rate:g}) or raise --lr_warmup_steps"
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    raise FloatingPointError(
        f"The loss is not finite at step {step} (batch {micro_step}, cells {bad[:10]} "
        f"of it at timesteps {timesteps[bad[:10]].tolist()}). Likely cause: {cause}. Checkpoints stay intact."
    )


if __name__ == "__main__":
    run(main, TrainingArguments, (ValueError, OSError, FloatingPointError, pickle.UnpicklingError))
