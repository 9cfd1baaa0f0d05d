"""State of a training run between two steps, and its checkpoints, which are never half-written."""

import json
import logging
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm.auto import tqdm

from scrdit_diffusers import SCRDiTProcessor, SCRDiTTransformer, finetuning, hub
from scrdit_diffusers.atomic import delete_folder

logger = logging.getLogger("train")

EMA = {"decay": 0.999, "use_ema_warmup": True, "power": 3 / 4, "foreach": True}
ADAM_BETA1 = 0.9


def find_checkpoints(output_dir: str) -> list[Path]:
    """Complete checkpoints in a folder, oldest first (unfinished ones end in .tmp)."""
    return sorted(filter(is_checkpoint, Path(output_dir).glob("checkpoint-*")), key=lambda path: int(path.name[11:]))


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint, which ends in its step."""
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None


def find_checkpoint(output_dir: str, resume_from_checkpoint: str | None) -> Path | None:
    """Find the checkpoint to resume from; `None` to start over."""
    whole = find_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        if not whole:
            logger.warning(f"No checkpoint in {output_dir}: starting over.")
        return whole[-1] if whole else None
    path = Path(resume_from_checkpoint) if resume_from_checkpoint else None
    if path and not (is_checkpoint(path) and (path / "transformer").is_dir()):
        raise ValueError(f"--resume_from_checkpoint {path} is not a checkpoint; {output_dir} has {whole}.")
    return path


def write_model(model: SCRDiTTransformer, folder: Path) -> None:
    """Write weights and configuration; adapters, too, which `model.save_pretrained` refuses."""
    ModelMixin.save_pretrained(model, folder)
    hub.make_readable(folder)


class TrainingState:
    """Model, optimizer, learning-rate schedule, averaged weights, step and losses of a run.

    A checkpoint holds them, the processor and the arguments; weights are in safetensors.

    Parameters
    ----------
    accelerator
        The accelerator; this class registers its save and load hooks.
    model
        The transformer with its initial weights.
    processor
        Fitted to the training cells.
    settings
        Resolved `TrainingArguments`.
    fixed
        Names of the settings that a resumed run may not change.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: SCRDiTTransformer,
        processor: SCRDiTProcessor,
        settings: Any,
        fixed: list[str],
    ):
        self.accelerator, self.processor, self.settings, self.fixed = accelerator, processor, settings, fixed
        self.config = model.config
        self.step = 0
        self.losses: list[float] = []  # per batch since the last report
        self.saved_at = time.monotonic()
        groups = model.parameter_groups(settings.learning_rate, settings.adam_weight_decay)
        betas, epsilon = (ADAM_BETA1, settings.adam_beta2), settings.adam_epsilon
        optimizer = torch.optim.AdamW(groups, settings.learning_rate, betas, epsilon, fused=True)
        steps = {"num_warmup_steps": settings.lr_warmup_steps, "num_training_steps": settings.max_train_steps}
        lr_scheduler = get_scheduler(settings.lr_scheduler, optimizer, **steps)
        self.model, self.optimizer, self.lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
        self.ema = None
        if settings.use_ema:
            self.ema = EMAModel(self.model.parameters(), **EMA, model_cls=SCRDiTTransformer, model_config=self.config)
            self.ema.to(accelerator.device)
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.settings.max_train_steps

    @property
    def is_time(self) -> bool:
        """Whether the last checkpoint, or the start, was long enough ago; the main process has the clock."""
        minutes = self.settings.checkpointing_minutes
        seconds = time.monotonic() - self.saved_at
        return self.accelerator.is_main_process and bool(minutes) and seconds >= 60 * minutes

    def agree(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Whether any process wants to stop, and whether any wants a checkpoint; all of them call this."""
        wishes = torch.tensor([stop, save], dtype=torch.int32, device=self.accelerator.device)
        any_stop, any_save = self.accelerator.reduce(wishes, "sum").tolist()
        return any_stop > 0, any_save > 0

    def update(self, loss: torch.Tensor) -> bool:
        """Add the gradient of a batch; after the last one of a step, step the optimizer. Return whether it did."""
        accelerator = self.accelerator
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            if self.ema is not None:
                self.ema.step(self.model.parameters())
            self.step += 1
        return accelerator.sync_gradients

    def joined_losses(self) -> list[float]:
        """Mean of the losses over the processes; every process must call this."""
        return self.accelerator.reduce(torch.tensor(self.losses, device=self.accelerator.device), "mean").tolist()

    def mean_loss(self) -> float:
        """Mean loss since the last call, over all processes."""
        num_steps = (self.step - 1) % 10 + 1
        mean = sum(self.joined_losses()) / self.settings.gradient_accumulation_steps / num_steps
        self.losses.clear()
        return mean

    def whole_model(self, averaged: bool = True) -> SCRDiTTransformer:
        """Copy the model into a plain one, with averaged weights if there are any."""
        trained = self.accelerator.unwrap_model(self.model)
        state = trained.state_dict()
        if averaged and self.ema is not None:
            names = [name for name, _ in trained.named_parameters()]
            state |= dict(zip(names, self.ema.shadow_params, strict=True))
        model = SCRDiTTransformer.from_config(self.config).to(self.accelerator.device)
        if self.settings.lora_rank:
            finetuning.add_lora(model, self.settings.lora_rank, {})
        model.load_state_dict(state)
        return model.eval()

    def save(self) -> None:
        """Write a checkpoint, then delete the oldest ones beyond the limit; every process must call this.

        Raises
        ------
        OSError
            It could not be written; earlier ones are intact.
        """
        accelerator, settings = self.accelerator, self.settings
        path = Path(settings.output_dir) / f"checkpoint-{self.step}"
        self.losses[:] = self.joined_losses()
        if accelerator.is_main_process:
            for stray in [*path.parent.glob("checkpoint-*.tmp"), *path.parent.glob("checkpoint-*.deleted-*")]:
                shutil.rmtree(stray)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(f"{path}.tmp")
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError for a full disk
            shutil.rmtree(f"{path}.tmp", ignore_errors=True)
            whole = find_checkpoints(settings.output_dir)
            last = f"{whole[-1]} is whole" if whole else "There is no earlier one"
            raise OSError(f"Could not write {path}: {error}. {last}; make room, then resume.") from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if path.exists():  # written by a run that went further than the checkpoint it was resumed from
                delete_folder(path)
            os.replace(f"{path}.tmp", path)
            tqdm.write(f"Saved {path}")
            self._prune(path)
        self.saved_at = time.monotonic()

    def resume(self, path: Path | None) -> None:
        """Continue from a checkpoint, if there is one.

        Raises
        ------
        ValueError
            The checkpoint has other cells or settings.
        OSError
            It is damaged.
        """
        if path is not None:
            try:
                self.accelerator.load_state(str(path))
            except (
                OSError,
                EOFError,
                KeyError,
                RuntimeError,
                SafetensorError,
                json.JSONDecodeError,
            ) as error:
                raise OSError(
                    f"{path} is damaged: {error}. Delete it, and resume from an earlier checkpoint or start over."
                ) from error
            self.step = int(path.name.split("-")[1])
            logger.info(f"Resumed from {path}")

    def _prune(self, last: Path) -> None:
        whole = [path for path in find_checkpoints(self.settings.output_dir) if path != last]
        surplus = len(whole) + 1 - (self.settings.checkpoints_total_limit or math.inf)
        for path in whole[: int(max(0, surplus))]:
            delete_folder(path)

    def _save(self, models, weights, output_dir) -> None:
        if self.accelerator.is_main_process:
            folder = Path(output_dir)
            self.processor.save_pretrained(folder / "processor")
            (folder / "arguments.json").write_text(json.dumps(self.settings.record()))
            (folder / "losses.json").write_text(json.dumps(self.losses))
            write_model(self.whole_model(averaged=False), folder / "transformer")
            if self.ema is not None:  # EMAModel.save_pretrained would lose the buffers of the count head
                averaged = self.whole_model()
                averaged.register_to_config(**{k: v for k, v in self.ema.state_dict().items() if k != "shadow_params"})
                write_model(averaged, folder / "transformer_ema")
        weights.clear()  # so that Accelerate does not save the model too

    def _load(self, models, input_dir) -> None:
        folder = Path(input_dir)
        saved = SCRDiTProcessor.from_pretrained(folder / "processor")
        if saved.to_json_string() != self.processor.to_json_string():
            before, now = saved.conditions, self.processor.conditions
            other = f"labels ({before}, now {now})" if before != now else "cells or genes"
            raise ValueError(f"{folder} was trained on other {other}; use the arguments of that run.")
        before, now = json.loads((folder / "arguments.json").read_text()), self.settings.record()
        changed = {name: (before.get(name), now[name]) for name in self.fixed if before.get(name) != now[name]}
        if changed:
            raise ValueError(f"Arguments differ from those of {folder} (then, now): {changed}.")
        self.losses[:] = json.loads((folder / "losses.json").read_text())
        models.clear()  # nor load it
        model = self.accelerator.unwrap_model(self.model)  # by file: from_pretrained does not know adapters
        model.load_state_dict(load_file(folder / "transformer" / SAFETENSORS_WEIGHTS_NAME))
        if self.ema is not None:
            averaged = load_file(folder / "transformer_ema" / SAFETENSORS_WEIGHTS_NAME)
            state = SCRDiTTransformer.load_config(folder / "transformer_ema")
            state = {name: state[name] for name in self.ema.state_dict() if name != "shadow_params"}
            shadows = [averaged[name] for name, _ in model.named_parameters()]
            self.ema.load_state_dict(state | {"shadow_params": shadows})
            self.ema.to(self.accelerator.device)
