"""The training and generation scripts, run as a user runs them."""

import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from safetensors.torch import load_file
from transformers import HfArgumentParser

from scrdit_diffusers import CellDataset, SCRDiTPipeline
from scrdit_diffusers.cell_statistics import normalize_log1p

REPOSITORY = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "training/train.py"]
TINY = ["--n_top_genes", "30", "--patch_size", "8", "--num_layers", "1", "--num_attention_heads", "2"]
TINY += ["--attention_head_dim", "8", "--train_batch_size", "16", "--lr_warmup_steps", "2", "--max_train_steps", "8"]
TINY += ["--checkpointing_steps", "3", "--validation_steps", "4", "--report_to", "none"]


def run(command, **kwargs):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, **kwargs)


def train(dataset, output_dir, *arguments):
    return run([*LAUNCH, "--dataset", str(dataset), "--output_dir", str(output_dir), *TINY, *arguments])


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "training" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_script():
    return load_script("train")


def run_main(train_script, dataset, output_dir, *arguments):
    command = ["--dataset", str(dataset), "--output_dir", str(output_dir), *TINY, *arguments]
    train_script.main(HfArgumentParser(train_script.TrainingArguments).parse_args_into_dataclasses(command)[0])


@pytest.fixture
def train_here(train_script):
    """Run the script's main in this process, which saves the seconds of importing everything."""

    def train_here(dataset, output_dir, *arguments):
        run_main(train_script, dataset, output_dir, *arguments)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield train_here
    torch.set_flush_denormal(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(output_dir, subfolder="transformer"):
    return load_file(output_dir / subfolder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.5, 2.0, size=(2, 40))
    labels = rng.choice(2, size=90)
    counts = sp.csr_matrix(rng.poisson(rates[labels]), dtype=np.float32)
    obs = pd.DataFrame({"cell_type": np.array(["T cell", "B cell"])[labels]}, index=[f"cell{i}" for i in range(90)])
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(40)])).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("model")
    result = train(dataset, output_dir, "--labels_key", "cell_type", "--report_to", "tensorboard")
    assert result.returncode == 0, result.stderr
    return output_dir


def test_output_dir_is_a_pipeline(trained):
    pipe = SCRDiTPipeline.from_pretrained(trained)
    adata = pipe(5, conditions={"cell_type": "B cell"}, num_inference_steps=3).adata
    assert adata.shape == (5, 30) and np.array_equal(adata.X.data, np.rint(adata.X.data))


def test_weights_moved(trained):
    assert weights(trained)["proj_out.weight"].abs().max() > 0  # zero when training starts


def test_config_checkpoints_pictures_and_logs_are_written(trained):
    config = json.loads((trained / "train_config.json").read_text())
    assert config["labels_key"] == ["cell_type"] and config["max_train_steps"] == 8
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert sorted(path.name for path in (trained / "samples").iterdir()) == ["step-4.png", "step-8.png"]
    assert list((trained / "logs").rglob("events.out*"))


def test_resumed_run_equals_the_uninterrupted_one(train_here, trained, dataset, tmp_path, caplog):
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(trained / "checkpoint-6", checkpoint)
    shutil.copytree(trained / "checkpoint-8", tmp_path / "checkpoint-8.tmp")  # as if killed while it was written
    train_here(dataset, tmp_path, "--labels_key", "cell_type", "--resume_from_checkpoint", "latest")
    assert f"Resumed from {checkpoint}" in caplog.text
    resumed = weights(tmp_path)
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)


@pytest.fixture
def uninterrupted(train_here, dataset, tmp_path):
    """A run with tensorboard and all its checkpoints, its folder."""
    train_here(dataset, tmp_path / "whole", *LOGGED)
    AcceleratorState._reset_state(reset_partial_state=True)
    return tmp_path / "whole"


LOGGED = ["--labels_key", "cell_type", "--max_train_steps", "24", "--report_to", "tensorboard"]
LOGGED += ["--resume_from_checkpoint", "latest", "--validation_steps", "100"]


def run_quietly(function, arguments):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    function(load_script("train"), *arguments)


def start(function, *arguments):
    """Start a process that calls a function with the training script and arguments; its progress bars are not shown."""
    process = multiprocessing.get_context("forkserver").Process(target=run_quietly, args=(function, arguments))
    process.start()
    return process


def finish(process):
    """Wait for a process; its exit code, negative if a signal ended it."""
    process.join()
    return process.exitcode


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(folder, other):
    """Weights, optimiser, averages and reported losses of two runs are equal to the bit."""
    names = ["transformer/diffusion_pytorch_model.safetensors", "checkpoint-24/optimizer.bin"]
    names += [
        f"checkpoint-24/{name}/diffusion_pytorch_model.safetensors" for name in ("transformer", "transformer_ema")
    ]
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert logged(folder) == logged(other) and len(logged(folder)) == 3


def logged(folder, tag="train_loss"):
    """(step, loss) of each report, as tensorboard shows them; none where there are no such reports."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder / "logs" / "scrdit"))
    events.Reload()
    return [(event.step, event.value) for event in (events.Scalars(tag) if tag in events.Tags()["scalars"] else [])]


def test_only_held_out_cells_give_a_validation_loss(train_here, trained, dataset, tmp_path):
    assert logged(trained) and not logged(trained, "val_loss")
    train_here(dataset, tmp_path, "--val_fraction", "0.1", "--report_to", "tensorboard")
    assert [step for step, _ in logged(tmp_path, "val_loss")] == [4, 8]
    config = json.loads((tmp_path / "train_config.json").read_text())
    assert (config["train_cells"], config["val_cells"]) == (81, 9)


def train_until_killed(train_script, moment, dataset, output_dir):
    calls = {"diffusion_loss": 0}

    def loss(*args, original=train_script.diffusion_loss, **kwargs):
        calls["diffusion_loss"] += 1
        if moment == "step" and calls["diffusion_loss"] == 15:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    def replace(source, target):
        if moment == "checkpoint" and str(target).endswith("checkpoint-15"):
            (Path(source) / "optimizer.bin").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        os.rename(source, target)

    def rmtree(path, original=shutil.rmtree, **kwargs):
        if moment == "deletion" and "checkpoint-9" in str(path):
            (Path(path) / "optimizer.bin").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, **kwargs)

    train_script.diffusion_loss = loss
    train_script.os = SimpleNamespace(**vars(os) | {"replace": replace})
    train_script.shutil = SimpleNamespace(rmtree=rmtree)
    run_main(train_script, dataset, output_dir, *LOGGED)


@pytest.mark.parametrize("moment", ["step", "checkpoint", "deletion"])
def test_a_killed_run_resumes_to_the_same_result(train_script, train_here, uninterrupted, dataset, tmp_path, moment):
    output_dir = tmp_path / "killed"
    assert finish(start(train_until_killed, moment, dataset, output_dir)) == -signal.SIGKILL
    time.sleep(1.1)  # tensorboard orders its files by their second
    left = [path.name for path in train_script.checkpoints(output_dir)]
    expected = {"step": ["9", "12"], "checkpoint": ["9", "12"], "deletion": ["12", "15"]}[moment]
    assert left == [f"checkpoint-{step}" for step in expected]
    train_here(dataset, output_dir, *LOGGED)
    assert_same_run(output_dir, uninterrupted)
    assert not [path for path in output_dir.iterdir() if path.suffix in (".tmp", ".deleted")]


@pytest.mark.slow
def test_runs_killed_at_any_moment_resume_to_the_same_result(
    train_script, train_here, uninterrupted, dataset, tmp_path
):
    """Ten times SIGKILL from outside, at a random time after training has begun to write."""
    draw, killed, output_dir = random.Random(0), 0, tmp_path / "killed"
    more = [*LOGGED, "--checkpointing_steps", "1"]
    while killed < 10:
        process = start(run_main, dataset, output_dir, *more)
        while not output_dir.exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0.1, 1.5))
        process.kill()
        if finish(process) == 0:  # done before the signal: once more from the beginning
            assert_same_run(output_dir, uninterrupted)
            shutil.rmtree(output_dir)
        else:
            killed += 1
    train_here(dataset, output_dir, *more)
    assert_same_run(output_dir, uninterrupted)


def train_on_a_full_disk(train_script, dataset, output_dir, message):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with EFBIG, as it would with ENOSPC

    def replace(source, target):  # from the second checkpoint on no file may be longer than 4 kB
        os.rename(source, target)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    train_script.os = SimpleNamespace(**vars(os) | {"replace": replace})
    try:
        run_main(train_script, dataset, output_dir, "--validation_steps", "100")
    except OSError as error:
        message.write_text(str(error))


def test_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint(train_here, dataset, tmp_path):
    pytest.importorskip("resource")
    message = tmp_path / "message"
    assert finish(start(train_on_a_full_disk, dataset, tmp_path / "run", message)) == 0
    assert re.search(r"Could not write .*checkpoint-6: .*checkpoint-3 is whole; make room", message.read_text())
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    train_here(dataset, tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_processes_share_each_joined_batch_and_see_each_cell_once(train_script, num_processes):
    samplers = [train_script.EpochSampler(37, 12, num_processes, i, seed=0) for i in range(num_processes)]
    for sampler in samplers:
        sampler.set_epoch(3)
    alone = train_script.EpochSampler(37, 12, 1, 0, seed=0)
    alone.set_epoch(3)
    joined = list(alone)
    assert sorted(sum(joined, [])) == list(range(37)) and [len(batch) for batch in joined] == [12, 12, 12, 1]
    for batch, *parts in zip(joined, *samplers, strict=True):
        counts = [train_script.share(len(batch), num_processes, i) for i in range(num_processes)]
        assert sum([part[: own.stop - own.start] for part, own in zip(parts, counts, strict=True)], []) == batch
        assert all(parts)


def test_launched_processes_that_do_not_find_each_other_are_refused(train_here, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but each finds 1"):
        train_here(dataset, tmp_path)


# 81 training cells and 16 per step: the last batch of an epoch has one cell, and the second process none.
TWO = ["--labels_key", "cell_type", "--dropout", "0", "--max_train_steps", "12", "--validation_steps", "100"]
TWO += ["--val_fraction", "0.1"]
# With its usual epsilon Adam makes full steps of gradients that are rounding errors, such as that of the keys' bias.
TWO += ["--adam_epsilon", "1e-3"]


def assert_close_weights(two, one):
    """Weights are equal up to the rounding of their gradients."""
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        # Steps of shapes are long, and near the Poisson limit a dispersion's gradient is a difference of large numbers.
        atol = 2e-3 if name.endswith("log_dispersion") else 1e-4 if name.endswith("log_base") else 1e-5
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=atol)


def test_two_processes_train_as_one_does_on_the_joined_batch(train_here, dataset, tmp_path):
    train_here(dataset, tmp_path / "one", *TWO, "--report_to", "tensorboard")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "training/train.py",
    ]
    command = [*launch, "--dataset", str(dataset), "--output_dir", str(tmp_path / "two"), *TINY, *TWO]
    result = run([*command, "--train_batch_size", "8", "--report_to", "tensorboard"])
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "two" / "train_config.json").read_text())["num_processes"] == 2
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    start = weights(tmp_path / "one" / "checkpoint-9")
    assert_close_weights(two, one)
    assert max((start[name] - tensor).abs().max() for name, tensor in one.items()) > 1e-3  # what is compared moves
    np.testing.assert_allclose(logged(tmp_path / "two"), logged(tmp_path / "one"), rtol=1e-5)


CONFIGS = REPOSITORY / "training" / "configs"


def launch_environment(config):
    """What `accelerate launch` hands to its processes for a configuration file."""
    # port 0: whatever listens on the default one
    command = ["--config_file", str(CONFIGS / config), "--main_process_port", "0", "training/train.py"]
    arguments, config, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        return prepare_deepspeed_cmd_env(arguments)[1]
    return prepare_multi_gpu_env(arguments)


def train_sharded(rank, port, environment, dataset, output_dir, arguments):
    """Train as one of two processes with FSDP, which Accelerate itself allows on GPUs only."""
    os.environ.update(environment, ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    script = load_script("train")
    plugin = FullyShardedDataParallelPlugin()  # reads the environment

    def accelerator(**kwargs):
        made = Accelerator(**kwargs)
        PartialState._shared_state["distributed_type"] = made.state.distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = plugin
        return made

    script.Accelerator = accelerator
    run_main(script, dataset, output_dir, *arguments)


def launch_sharded(dataset, output_dir, *arguments, **environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = launch_environment("fsdp2.yaml") | environment
    context = multiprocessing.get_context("forkserver")
    arguments = [*TWO, "--train_batch_size", "8", "--mixed_precision", "no", *arguments]
    processes = [
        context.Process(target=train_sharded, args=(rank, port, environment, dataset, output_dir, arguments))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def sharded(dataset, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("sharded")
    assert launch_sharded(dataset, output_dir) == [0, 0]
    return output_dir


def test_two_sharded_processes_train_as_one_does(train_here, sharded, dataset, tmp_path):
    train_here(dataset, tmp_path, *TWO)
    for folder in ("", "checkpoint-12", "checkpoint-9"):
        for subfolder in ("transformer", "transformer_ema")[: 2 if folder else 1]:
            two, one = weights(sharded / folder, subfolder), weights(tmp_path / folder, subfolder)
            assert_close_weights(two, one)
    assert (sharded / "checkpoint-9" / "pytorch_model_fsdp.bin").exists()  # it was FSDP that saved it


def test_a_sharded_run_resumes_to_the_same_result(sharded, dataset, tmp_path):
    shutil.copytree(sharded / "checkpoint-9", tmp_path / "checkpoint-9")
    assert launch_sharded(dataset, tmp_path, "--resume_from_checkpoint", "latest") == [0, 0]
    for folder, subfolder in (("", "transformer"), ("checkpoint-12", "transformer_ema")):
        for name, tensor in weights(sharded / folder, subfolder).items():
            assert torch.equal(weights(tmp_path / folder, subfolder)[name], tensor), name


def test_a_sharded_checkpoint_is_not_resumed_by_processes_that_are_not(train_here, sharded, dataset, tmp_path):
    shutil.copytree(sharded / "checkpoint-9", tmp_path / "checkpoint-9")
    with pytest.raises(ValueError, match="checkpoint-9 was written with FSDP"):
        train_here(dataset, tmp_path, *TWO, "--train_batch_size", "8", "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MULTI_CPU])
@pytest.mark.parametrize(
    ("folder", "written"), [("pytorch_model_fsdp_0", "FSDP"), ("pytorch_model", "DEEPSPEED"), ("transformer", "DDP")]
)
def test_a_checkpoint_is_resumed_with_the_sharding_it_was_written_with(train_script, tmp_path, kind, folder, written):
    (tmp_path / folder).mkdir()
    accelerator = SimpleNamespace(distributed_type=kind)
    if written == {"MULTI_CPU": "DDP"}.get(kind.value, kind.value):
        train_script.check_checkpoint(tmp_path, accelerator)
    else:
        with pytest.raises(ValueError, match=f"was written with {written}"):
            train_script.check_checkpoint(tmp_path, accelerator)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("ddp.yaml", {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ("fsdp2.yaml", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        (
            "deepspeed_zero2.yaml",
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",  # Accelerate makes an int of it: "auto" fails
            },
        ),
    ],
)
def test_accelerate_understands_the_configurations(config, expected):
    environment = launch_environment(config)
    assert {name: environment.get(name) for name in expected} == expected
    others = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} - expected.keys()
    assert not [name for name in others if environment.get(name) == "true"]


def made_accelerator(kind, **state):
    return SimpleNamespace(distributed_type=kind, num_processes=2, gradient_accumulation_steps=1, **state)


NOT_SUPPORTED = {
    "FSDP on CPUs": (
        made_accelerator(DistributedType.MULTI_CPU),
        [],
        "FSDP was asked for, but Accelerate .* MULTI_CPU",
    ),
    "FSDP 1": (made_accelerator(DistributedType.FSDP, is_fsdp2=False), [], "fsdp_version: 2"),
    "FSDP of adapters": (made_accelerator(DistributedType.FSDP, is_fsdp2=True), ["--lora_rank", "2"], "lora_rank"),
    "ZeRO-3": (
        made_accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=3)),
        [],
        "stages 1 and 2",
    ),
    "other accumulation": (
        made_accelerator(DistributedType.FSDP, is_fsdp2=True),
        ["--gradient_accumulation_steps", "4"],
        "is 4, but accelerate was launched with 1",
    ),
}


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_what_does_not_work_with_several_processes_is_refused(train_script, monkeypatch, name):
    accelerator, arguments, message = NOT_SUPPORTED[name]
    monkeypatch.setenv("WORLD_SIZE", "2")
    kind = "DEEPSPEED" if name == "ZeRO-3" else "FSDP"
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    args = HfArgumentParser(train_script.TrainingArguments).parse_args_into_dataclasses(arguments)[0]
    with pytest.raises(ValueError, match=message):
        train_script.check_processes(args, accelerator)


def test_one_process_where_accelerate_was_asked_for_two_is_refused(train_script, monkeypatch):
    command = ["--num_processes", "2", "--cpu", "training/train.py"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(command))[0]
    for name, value in prepare_simple_launcher_cmd_env(arguments)[1].items():
        monkeypatch.setenv(name, value)
    alone = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match="Several processes were asked for"):
        train_script.check_processes(train_script.TrainingArguments(), alone)


def test_one_process_that_would_train_without_deepspeed_is_refused(train_script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    alone = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match="DEEPSPEED was asked for, but Accelerate has chosen NO"):
        train_script.check_processes(train_script.TrainingArguments(), alone)


def test_the_averaged_model_of_a_checkpoint_has_the_count_head_of_the_pipeline(trained):
    averaged, saved = weights(trained / "checkpoint-8", "transformer_ema"), weights(trained)
    assert averaged.keys() == saved.keys() and "count_head.value" in saved
    for name, tensor in saved.items():
        torch.testing.assert_close(averaged[name], tensor)


def test_resuming_with_other_arguments_is_refused(train_here, trained, dataset, tmp_path):
    shutil.copytree(trained / "checkpoint-6", tmp_path / "checkpoint-6")
    arguments = ["--labels_key", "cell_type", "--resume_from_checkpoint", "latest", "--train_batch_size", "8"]
    with pytest.raises(ValueError, match=r"train_batch_size.*\(16, 8\)"):
        train_here(dataset, tmp_path, *arguments)


def test_accumulated_gradients_train(train_here, dataset, tmp_path):
    train_here(dataset, tmp_path, "--gradient_accumulation_steps", "2", "--train_batch_size", "8", "--use_ema", "False")
    assert (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_other_prediction_types_and_log_normalized_values_train(train_here, dataset, tmp_path, prediction_type):
    arguments = ["--value_space", "log_normalized", "--target_sum", "1e4", "--zero_negation", "True"]
    arguments += ["--decode", "round"]
    arguments += ["--prediction_type", prediction_type, "--beta_schedule", "linear", "--patch_embed_type", "shared"]
    train_here(dataset, tmp_path, *arguments)
    adata = SCRDiTPipeline.from_pretrained(tmp_path)(3, num_inference_steps=3).adata
    assert adata.n_obs == 3 and "counts" not in adata.layers


def test_log_normalised_values_train_as_the_counts_behind_them(train_here, dataset, tmp_path):
    """Of all genes and from the same seed: the same weights."""
    adata = ad.read_h5ad(dataset)
    adata.X = normalize_log1p(adata.X, 1e4).astype(np.float32)
    adata.write_h5ad(tmp_path / "log.h5ad")
    genes = tmp_path / "genes.txt"
    genes.write_text("\n".join(adata.var_names))
    arguments = ["--labels_key", "cell_type", "--genes", str(genes)]
    train_here(dataset, tmp_path / "counts", *arguments)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(tmp_path / "log.h5ad", tmp_path / "log", *arguments, "--value_space", "log_normalized")
    assert_close_weights(weights(tmp_path / "log"), weights(tmp_path / "counts"))
    of_log, of_counts = (SCRDiTPipeline.from_pretrained(tmp_path / name) for name in ("log", "counts"))
    options = dict(num_cells=5, num_inference_steps=3)
    cells = of_log(**options, generator=torch.manual_seed(0)).adata
    counts = of_counts(**options, generator=torch.manual_seed(0)).adata.X
    np.testing.assert_allclose(cells.X.toarray(), normalize_log1p(counts, 1e4).toarray(), rtol=1e-4)
    assert (tmp_path / "log" / "samples").is_dir()


def test_counts_train_with_rounding(train_here, dataset, tmp_path):
    train_here(dataset, tmp_path, "--decode", "round", "--prediction_type", "epsilon", "--beta_schedule", "linear")
    pipe = SCRDiTPipeline.from_pretrained(tmp_path)
    assert pipe.transformer.count_head is None and pipe.config.decode_timestep is None
    assert "counts" in pipe(3, num_inference_steps=3).adata.layers


def test_pipeline_of_counts_has_their_noise_process(trained, dataset):
    pipe = SCRDiTPipeline.from_pretrained(trained)
    assert (pipe.config.decode_timestep, pipe.config.min_timestep) == (200, 200)
    assert sum(genes for genes, _ in pipe.transformer.config.count_bins) == 30
    assert pipe.transformer.config.beta_schedule == pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_dataset_folder_trains_as_the_file_does(train_here, trained, dataset, tmp_path):
    CellDataset.from_anndata(ad.read_h5ad(dataset)).save(tmp_path / "cells")
    train_here(tmp_path / "cells", tmp_path / "model", "--labels_key", "cell_type")
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(weights(tmp_path / "model")[name], tensor, rtol=0, atol=1e-6)


def test_dry_run_prints_cost_and_writes_nothing(train_here, dataset, tmp_path, capsys, caplog):
    train_here(dataset, tmp_path / "model", "--dry_run", "--hub_token", "secret")
    assert not (tmp_path / "model").exists()
    printed = capsys.readouterr().out
    assert "MFLOP per cell" in caplog.text and '"patch_size": 8' in printed and "secret" not in printed


def test_interrupt_saves_a_checkpoint(dataset, tmp_path):
    command = [sys.executable, "training/train.py", "--dataset", str(dataset), "--output_dir", str(tmp_path), *TINY]
    command += ["--max_train_steps", "100000", "--checkpointing_steps", "100000", "--validation_steps", "100000"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE)
    seen = b""
    while b"cells/s" not in seen:
        seen += os.read(process.stderr.fileno(), 4096)
        assert process.poll() is None, seen
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 128 + signal.SIGINT
    assert "--resume_from_checkpoint latest" in stderr
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


def test_weight_decay_spares_the_log_means(train_here, dataset, tmp_path):
    """Decay would pull the log means of rare genes towards zero, their counts up."""
    log_means = []
    for decay in ("0", "10"):  # a decay of 0.43 in eight steps; gradients move a log mean by 0.08 at most
        output = tmp_path / decay
        train_here(dataset, output, "--adam_weight_decay", decay, "--learning_rate", "0.01", "--use_ema", "False")
        log_means.append(weights(output)["count_head.log_mean"])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert log_means[0].abs().max() > 1
    torch.testing.assert_close(log_means[1], log_means[0], rtol=0, atol=0.17)


def test_nan_guard_names_step_and_cause(train_here, dataset, tmp_path):
    arguments = ["--learning_rate", "1e30", "--lr_warmup_steps", "0", "--max_grad_norm", "1e30"]
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+ .*lower --learning_rate"):
        train_here(dataset, tmp_path, *arguments)


@pytest.mark.parametrize(
    ("batch_size", "val_fraction", "steps"),
    [(81, 0.1, 600), (16, 0.1, 900), (4, 0.1, 2500), (1, 0.1, 4860), (1, 0, 5000)],
    ids=["at least 600", "150 passes", "2,500", "60 passes", "at most 5,000"],
)
@pytest.mark.usefixtures("train_here")  # which cleans up
def test_default_number_of_steps(train_script, dataset, tmp_path, capsys, batch_size, val_fraction, steps):
    """81 training cells, or 90."""
    size = dict(n_top_genes=30, patch_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    output = dict(output_dir=str(tmp_path / "model"), report_to="none", dry_run=True, val_fraction=val_fraction)
    train_script.main(train_script.TrainingArguments(str(dataset), train_batch_size=batch_size, **size, **output))
    assert json.loads(capsys.readouterr().out)["arguments"]["max_train_steps"] == steps


BAD_ARGUMENTS = {
    "no such file": (["--dataset", "nowhere.h5ad"], "does not exist"),
    "unknown label column": (["--labels_key", "celltype"], "did you mean 'cell_type'"),
    "missing layer": (["--layer", "counts"], "does not exist"),
    "no layers": (["--num_layers", "0"], "num_layers must be at least 1"),
    "negative rate": (["--learning_rate", "-1"], "--learning_rate must be positive"),
    "all cells held out": (["--val_fraction", "1"], "--val_fraction must be at least 0 and below 1"),
    "no genes": (["--n_top_genes", "0"], "--n_top_genes must be positive"),
    "unknown schedule": (["--lr_scheduler", "cosin"], "--lr_scheduler must be one of .*cosine"),
    "unknown precision": (["--mixed_precision", "fp8"], "--mixed_precision must be no, fp16 or bf16"),
    "unknown tracker": (["--report_to", "foo"], "foo"),
    "no gene list": (["--genes", "nowhere.txt"], "is no file"),
    "no checkpoint": (["--resume_from_checkpoint", "nowhere"], "is no checkpoint"),
    "decoding below what is trained": (["--decode_timestep", "100"], "--decode_timestep"),
    "noise prediction with counts": (["--prediction_type", "epsilon"], "epsilon needs --decode round"),
    "velocity prediction with counts": (["--prediction_type", "v_prediction"], "v_prediction needs --decode round"),
    "zero negation of counts": (["--zero_negation", "True"], "zero_negation True needs --decode round"),
    "counts for log values": (["--value_space", "log_normalized"], "holds only integers"),
}


def test_all_rare_labels_are_named_before_training(train_here, dataset, tmp_path, caplog):
    train_here(dataset, tmp_path, "--labels_key", "cell_type", "--val_fraction", "0.7", "--dry_run", "true")
    assert "Few training cells for some of cell_type" in caplog.text


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(train_here, dataset, tmp_path, name):
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_here(dataset, tmp_path / "model", *arguments)
    assert not (tmp_path / "model").exists()


def test_checkpoints_of_another_run_are_not_overwritten(train_here, trained, dataset):
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        train_here(dataset, trained, "--labels_key", "cell_type")


def test_resuming_with_other_data_is_refused(train_here, trained, dataset, tmp_path):
    shutil.copytree(trained / "checkpoint-6", tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match="was trained on other cells"):
        train_here(dataset, tmp_path, "--resume_from_checkpoint", "latest")


def test_errors_end_the_script_without_a_traceback(tmp_path):
    result = train("nowhere.h5ad", tmp_path)
    assert result.returncode != 0 and "error: nowhere.h5ad does not exist" in result.stderr


# -- data that need not fit in memory ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parquet_folder(dataset, tmp_path_factory):
    """A data set as on the Hub: parquet files and the gene vocabulary."""
    folder = tmp_path_factory.mktemp("parquet")
    adata = ad.read_h5ad(dataset)
    rows = CellDataset.from_anndata(adata).rows
    (folder / "data").mkdir()
    for part in range(2):
        rows.shard(2, part, contiguous=True).to_parquet(folder / "data" / f"train-{part:05d}-of-00002.parquet")
    adata.var.rename_axis("var_names").to_parquet(folder / "var.parquet")
    return folder


def test_a_data_set_trains_as_the_file_does(train_here, trained, parquet_folder, tmp_path):
    train_here(parquet_folder, tmp_path, "--labels_key", "cell_type")
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, rtol=0, atol=1e-6)


def test_a_streamed_data_set_trains(train_here, parquet_folder, tmp_path):
    """Eight steps of 16 of its 90 cells: into a second epoch."""
    train_here(parquet_folder, tmp_path, "--labels_key", "cell_type", "--streaming", "True")
    assert weights(tmp_path)["proj_out.weight"].abs().max() > 0
    assert sum(number for *_, number in SCRDiTPipeline.from_pretrained(tmp_path).processor.composition) == 90


@pytest.mark.parametrize("step", [3, 6], ids=["first epoch", "second epoch"])
def test_a_streamed_run_resumes_to_the_same_result(train_here, parquet_folder, tmp_path, step):
    """Five steps are an epoch; with dropout, and validation on the way."""
    arguments = ["--labels_key", "cell_type", "--streaming", "True", "--dropout", "0.1", "--val_fraction", "0.1"]
    train_here(parquet_folder, tmp_path / "whole", *arguments, "--checkpoints_total_limit", "9")
    AcceleratorState._reset_state(reset_partial_state=True)
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "resumed" / f"checkpoint-{step}")
    train_here(parquet_folder, tmp_path / "resumed", *arguments, "--resume_from_checkpoint", "latest")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "resumed")[name], tensor), name


def test_several_files_train(train_here, dataset, tmp_path):
    adata = ad.read_h5ad(dataset)
    (tmp_path / "cells").mkdir()
    adata[:40].copy().write_h5ad(tmp_path / "cells" / "a.h5ad")
    adata[40:, ::-1].copy().write_h5ad(tmp_path / "cells" / "b.h5ad")
    train_here(tmp_path / "cells", tmp_path / "model", "--labels_key", "cell_type")
    processor = SCRDiTPipeline.from_pretrained(tmp_path / "model").processor
    assert sum(number for *_, number in processor.composition) == 90
