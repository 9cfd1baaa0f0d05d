"""Import the scripts of training/, which are not part of the package."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import HfArgumentParser

from scrdit_diffusers import atomic

REPOSITORY = Path(__file__).parents[1]
TRAINING = REPOSITORY / "training"
sys.path += [str(TRAINING), str(TRAINING / "benchmarks")]  # scripts import each other by name


def load_script(name):
    """Import a script anew, so that what a test changes in it is gone."""
    path = TRAINING / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "training/train.py"]
TINY = ["--n_top_genes", "30", "--patch_size", "8", "--num_layers", "1", "--num_attention_heads", "2"]
TINY += ["--attention_head_dim", "8", "--train_batch_size", "16", "--lr_warmup_steps", "2", "--max_train_steps", "8"]
TINY += ["--checkpointing_steps", "3", "--validation_steps", "4", "--report_to", "none"]


def run_main(train_script, dataset, output_dir, *arguments):
    """Run train.py in this process, with a tiny model where the arguments say nothing else."""
    command = ["--dataset", str(dataset), "--output_dir", str(output_dir), *TINY, *arguments]
    train_script.main(HfArgumentParser(train_script.TrainingArguments).parse_args_into_dataclasses(command)[0])
    AcceleratorState._reset_state(reset_partial_state=True)


def run(command, **kwargs):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, **kwargs)


def train(dataset, output_dir, *arguments):
    return run([*LAUNCH, "--dataset", str(dataset), "--output_dir", str(output_dir), *TINY, *arguments])


IN_BLOCK = """
import os, runpy, sys
functions = runpy.run_path({file!r})  # importing the whole package would take seconds
with functions[{name!r}](*{arguments}) as found:
    print("ready", flush=True)
    sys.stdin.read()
    {then}
"""


def start_in_block(name, *arguments, then="pass"):
    """Start a process that is in the block of a function of atomic.py until its input is closed."""
    arguments = [str(argument) for argument in arguments]
    code = IN_BLOCK.format(file=atomic.__file__, name=name, arguments=arguments, then=then)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def weights(output_dir, subfolder="transformer"):
    return load_file(output_dir / subfolder / "diffusion_pytorch_model.safetensors")


def logged(folder, tag="train_loss"):
    """(step, loss) of each report, as tensorboard shows them; none where there are no such reports."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder / "logs" / "scrdit"))
    events.Reload()
    return [(event.step, event.value) for event in (events.Scalars(tag) if tag in events.Tags()["scalars"] else [])]
