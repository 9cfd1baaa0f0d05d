"""Checkpoints of the training script: never half-written, and resumed to the same result."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import checkpointing
import pytest
import torch
from accelerate.state import AcceleratorState
from checkpointing import find_checkpoints
from scripts import LAUNCH, REPOSITORY, TINY, load_script, logged, run_main, start_in_block, weights

from scrdit_diffusers import SCRDiTPipeline, atomic

LOGGED = ["--labels_key", "cell_type", "--max_train_steps", "24", "--report_to", "tensorboard"]
LOGGED += ["--resume_from_checkpoint", "latest", "--validation_steps", "100"]


@pytest.fixture
def uninterrupted(train_here, dataset, tmp_path):
    """A run with tensorboard and all its checkpoints, its folder."""
    train_here(dataset, tmp_path / "whole", *LOGGED)
    return tmp_path / "whole"


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


def assert_same_run(folder, other):
    """Weights, optimizer, averages and reported losses of two runs are equal to the bit."""
    names = ["transformer/diffusion_pytorch_model.safetensors", "checkpoint-24/optimizer.bin"]
    names += [
        f"checkpoint-24/{name}/diffusion_pytorch_model.safetensors" for name in ("transformer", "transformer_ema")
    ]
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert logged(folder) == logged(other) and len(logged(folder)) == 3


def test_resumed_run_equals_the_uninterrupted_one(train_here, trained, dataset, tmp_path, caplog):
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(trained / "checkpoint-6", checkpoint)
    shutil.copytree(trained / "checkpoint-8", tmp_path / "checkpoint-8.tmp")  # as if killed while it was written
    train_here(dataset, tmp_path, "--labels_key", "cell_type", "--resume_from_checkpoint", "latest")
    assert f"Resumed from {checkpoint}" in caplog.text
    resumed = weights(tmp_path)
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)


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
    checkpointing.os = SimpleNamespace(**vars(os) | {"replace": replace})
    atomic.shutil = SimpleNamespace(rmtree=rmtree)
    run_main(train_script, dataset, output_dir, *LOGGED)


@pytest.mark.parametrize("moment", ["step", "checkpoint", "deletion"])
def test_a_killed_run_resumes_to_the_same_result(train_script, train_here, uninterrupted, dataset, tmp_path, moment):
    output_dir = tmp_path / "killed"
    assert finish(start(train_until_killed, moment, dataset, output_dir)) == -signal.SIGKILL
    time.sleep(1.1)  # tensorboard orders its files by their second
    left = [path.name for path in find_checkpoints(output_dir)]
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


def train_on_a_full_disk(train_script, dataset, output_dir, message, last_step):
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with EFBIG, as it would with ENOSPC

    def replace(source, target):  # after the checkpoint of this step no file may be longer than 4 kB
        os.rename(source, target)
        if str(target).endswith(f"checkpoint-{last_step}"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    checkpointing.os = SimpleNamespace(**vars(os) | {"replace": replace})
    try:
        run_main(train_script, dataset, output_dir, "--validation_steps", "100", "--overwrite_output_dir")
    except OSError as error:
        message.write_text(str(error))


def test_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint(train_here, dataset, tmp_path):
    pytest.importorskip("resource")
    message = tmp_path / "message"
    assert finish(start(train_on_a_full_disk, dataset, tmp_path / "run", message, 3)) == 0
    assert re.search(r"Could not write .*checkpoint-6: .*checkpoint-3 is whole; make room", message.read_text())
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    train_here(dataset, tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert (tmp_path / "run" / "model_index.json").exists()


def read_pipeline(folder):
    paths = [path for name in ("transformer", "processor", "scheduler", ".") for path in (folder / name).glob("*.*")]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def test_full_disk_at_the_end_leaves_the_pipeline_before(train_here, trained, dataset, tmp_path):
    pytest.importorskip("resource")
    shutil.copytree(trained, tmp_path / "run")
    before = read_pipeline(tmp_path / "run")
    assert finish(start(train_on_a_full_disk, dataset, tmp_path / "run", tmp_path / "message", 8)) == 0
    told = (tmp_path / "message").read_text()
    assert re.search(r"Could not write the pipeline to .*checkpoint-8 is whole; make room", told)
    assert read_pipeline(tmp_path / "run") == before
    train_here(dataset, tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert not SCRDiTPipeline.from_pretrained(tmp_path / "run").processor.labels_keys


def overwrite_until_killed(train_script, moment, dataset, output_dir):
    def replace(source, target):
        if Path(target).parent.parent == output_dir and Path(target).name == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        os.rename(source, target)

    atomic.os = SimpleNamespace(**vars(os) | {"replace": replace})
    run_main(train_script, dataset, output_dir, "--overwrite_output_dir")


@pytest.mark.parametrize("moment", ["preprocessor_config.json", "diffusion_pytorch_model.safetensors"])
def test_no_pipeline_has_the_weights_of_one_run_and_the_labels_of_another(
    train_here, trained, dataset, tmp_path, moment
):
    """Killed while a pipeline without labels takes the place of one with labels."""
    output_dir = tmp_path / "model"
    shutil.copytree(trained, output_dir)
    (output_dir / "metrics.json").write_text(json.dumps({"of": "the run before"}))
    assert finish(start(overwrite_until_killed, moment, dataset, output_dir)) == -signal.SIGKILL
    with pytest.raises(OSError, match="--resume_from_checkpoint latest"):
        SCRDiTPipeline.from_pretrained(output_dir)
    train_here(dataset, output_dir, "--resume_from_checkpoint", "latest")
    assert not SCRDiTPipeline.from_pretrained(output_dir).processor.labels_keys
    assert {path.name for path in output_dir.iterdir() if path.is_dir()} == {
        *("checkpoint-6", "checkpoint-8", "logs", "processor", "samples", "scheduler", "transformer")
    }
    assert not (output_dir / "metrics.json").exists()


BAD = {"dataset": ["--dataset", "typo.h5ad"], "labels": ["--labels_key", "typo"], "model": ["--num_layers", "0"]}
BAD |= {
    "start": ["--pretrained_model_name_or_path", "typo/typo/typo"],
    "hub": ["--push_to_hub", "--hub_model_id", "a b"],
}


@pytest.mark.parametrize("name", BAD)
def test_nothing_is_overwritten_by_a_run_that_cannot_start(train_here, trained, dataset, tmp_path, name):
    shutil.copytree(trained, tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError)):
        train_here(dataset, tmp_path / "model", "--overwrite_output_dir", *BAD[name])
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_overwritten_if_the_tracker_cannot_start(train_here, trained, dataset, tmp_path):
    output_dir = tmp_path / "model"
    shutil.copytree(trained, output_dir)
    shutil.rmtree(output_dir / "logs")
    (output_dir / "logs").write_text("a file in the way")
    with pytest.raises(OSError, match="logs"):
        train_here(dataset, output_dir, "--overwrite_output_dir", "--report_to", "tensorboard")
    assert [path.name for path in find_checkpoints(output_dir)] == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize("name", ["transformer/diffusion_pytorch_model.safetensors", "optimizer.bin", "losses.json"])
def test_a_damaged_checkpoint_is_named(train_here, trained, dataset, tmp_path, name):
    path = tmp_path / "checkpoint-6"
    shutil.copytree(trained / "checkpoint-6", path)
    os.truncate(path / name, (path / name).stat().st_size // 2)
    with pytest.raises(OSError, match="checkpoint-6"):
        train_here(dataset, tmp_path, "--labels_key", "cell_type", "--resume_from_checkpoint", "latest")


def test_what_is_resumed_from_is_not_overwritten(train_here, trained, dataset, tmp_path):
    output_dir = tmp_path / "model"
    shutil.copytree(trained, output_dir)
    arguments = ["--overwrite_output_dir", "--resume_from_checkpoint", "latest", "--max_train_steps", "9"]
    train_here(dataset, output_dir, "--labels_key", "cell_type", "--checkpoints_total_limit", "9", *arguments)
    assert [path.name for path in find_checkpoints(output_dir)] == ["checkpoint-6", "checkpoint-8", "checkpoint-9"]
    assert json.loads((output_dir / "train_config.json").read_text())["resumed_from_step"] == 8


def test_a_folder_in_which_another_run_trains_is_refused(train_here, dataset, tmp_path):
    other = start_in_block("lock_folder", tmp_path / "model", "")
    with pytest.raises(ValueError, match="model is in use by another run, .*--output_dir"):
        train_here(dataset, tmp_path / "model")
    other.communicate()
    assert not (tmp_path / "model").exists()


def test_checkpoints_by_time_change_nothing(train_here, uninterrupted, dataset, tmp_path):
    """One after each step, as each takes longer than is asked for."""
    often = ["--checkpointing_steps", "1000", "--checkpointing_minutes", "1e-9", "--checkpoints_total_limit", "99"]
    train_here(dataset, tmp_path / "often", *LOGGED, *often)
    assert len(find_checkpoints(tmp_path / "often")) == 24
    assert_same_run(tmp_path / "often", uninterrupted)
    train_here(dataset, tmp_path / "never", *LOGGED, "--checkpointing_steps", "1000", "--checkpointing_minutes", "0")
    assert len(find_checkpoints(tmp_path / "never")) == 1


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


def test_resuming_in_another_precision_than_the_launcher_chose_is_refused(
    train_here, trained, dataset, tmp_path, monkeypatch
):
    shutil.copytree(trained / "checkpoint-6", tmp_path / "checkpoint-6")
    resume = ["--labels_key", "cell_type", "--resume_from_checkpoint", "latest", "--max_train_steps", "7"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"mixed_precision.*\('no', 'bf16'\)"):
        train_here(dataset, tmp_path, *resume)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(dataset, tmp_path, *resume, "--mixed_precision", "no")  # the argument counts
    train_here(dataset, tmp_path / "half", "--max_train_steps", "1")
    assert json.loads((tmp_path / "half" / "train_config.json").read_text())["mixed_precision"] == "bf16"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    with pytest.raises(ValueError, match=r"mixed_precision.*\('bf16', 'no'\)"):
        train_here(dataset, tmp_path / "half", "--resume_from_checkpoint", "latest", "--max_train_steps", "2")


def test_checkpoints_of_another_run_are_not_overwritten(train_here, trained, dataset):
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        train_here(dataset, trained, "--labels_key", "cell_type")


def test_resuming_with_other_data_is_refused(train_here, trained, dataset, tmp_path):
    shutil.copytree(trained / "checkpoint-6", tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match=r"checkpoint-6 .*other (labels .*, now|cells or genes)"):
        train_here(dataset, tmp_path, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("launch", [[sys.executable, "training/train.py"], LAUNCH], ids=["alone", "launched"])
def test_interrupt_saves_a_checkpoint(dataset, tmp_path, launch):
    """A launcher that is told to stop ends without what it has launched."""
    command = [*launch, "--dataset", str(dataset), "--output_dir", str(tmp_path), *TINY]
    command += ["--max_train_steps", "100000", "--checkpointing_steps", "100000", "--validation_steps", "100000"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE)
    seen = b""
    while b"cells/s" not in seen:
        seen += os.read(process.stderr.fileno(), 4096)
        assert process.poll() is None, seen
    process.send_signal(signal.SIGTERM if launch is LAUNCH else signal.SIGINT)
    stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == (-signal.SIGTERM if launch is LAUNCH else 128 + signal.SIGINT)
    assert "--resume_from_checkpoint latest" in stderr
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


@pytest.mark.parametrize("step", [3, 6], ids=["first epoch", "second epoch"])
def test_a_streamed_run_resumes_to_the_same_result(train_here, parquet_folder, tmp_path, step):
    """Five steps are an epoch; with dropout, and validation on the way."""
    arguments = ["--labels_key", "cell_type", "--streaming", "True", "--dropout", "0.1", "--val_fraction", "0.1"]
    train_here(parquet_folder, tmp_path / "whole", *arguments, "--checkpoints_total_limit", "9")
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "resumed" / f"checkpoint-{step}")
    train_here(parquet_folder, tmp_path / "resumed", *arguments, "--resume_from_checkpoint", "latest")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "resumed")[name], tensor), name
