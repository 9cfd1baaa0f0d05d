"""The distillation script: the adapter that it writes, how cells are made with it, and what it refuses."""

import json
from pathlib import Path

import anndata as ad
import pytest
import torch
from diffusers import TCDScheduler
from safetensors.torch import load_file

from scrdit_diffusers import SCRDiTDenoisePipeline, SCRDiTPipeline, distillation
from scrdit_diffusers.schedulers import distilled_for

BRIEFLY = ["--num_cells", 32, "--train_batch_size", 16, "--max_train_steps", 5, "--lora_rank", 2]


@pytest.fixture
def distill(run_job):
    yield lambda *arguments: run_job("distill", *BRIEFLY, *arguments)
    torch.set_flush_denormal(False)


def load(adapter="distilled"):
    pipe = SCRDiTPipeline.from_pretrained("pipeline")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(adapter)
    return pipe


def test_two_calls_make_cells_as_a_user_of_diffusers_expects(distill):
    distill()
    pipe = load()
    pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
    adata, again = (pipe(6, num_inference_steps=2, generator=torch.manual_seed(0)).adata for _ in range(2))
    assert adata.n_obs == 6 and (adata.X != again.X).nnz == 0 and pipe.num_timesteps == 2
    assert adata.uns["scrdit"]["scheduler"] == "TCDScheduler" and adata.uns["scrdit"]["eta"] == 1.0
    assert (pipe(6, generator=torch.manual_seed(0)).adata.X != adata.X).nnz == 0  # two calls are the default
    pipe.fuse_lora(components=["transformer"])
    assert pipe(6, generator=torch.manual_seed(0)).adata.n_obs == 6


def test_adapter_and_scheduler_need_each_other(distill):
    distill()
    pipe = load()
    shipped, swapped = pipe.scheduler, TCDScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler .*TCDScheduler"):
        pipe(2)
    with pytest.raises(ValueError, match=r"unload_lora_weights.*denoise"):
        SCRDiTDenoisePipeline.from_pipe(pipe)(ad.read_h5ad("cells.h5ad"))
    pipe.scheduler = swapped
    pipe.disable_lora()
    with pytest.raises(ValueError, match="TCDScheduler .*distill"):
        pipe(2)
    pipe.scheduler = shipped
    assert pipe(2, num_inference_steps=2).adata.n_obs == 2
    pipe.unload_lora_weights()
    assert distilled_for(pipe.transformer) is None


def test_other_scripts_take_the_scheduler_of_the_adapter(distill, run_job):
    distill()
    run_job("generate", "--lora_weights", "distilled", "--num_cells", 4, "--output", "new.h5ad")
    about = ad.read_h5ad("new.h5ad").uns["scrdit"]
    assert about["scheduler"] == "TCDScheduler" and about["num_inference_steps"] == 2
    assert about["decode"] == "posterior at timestep 499"  # where TCD's last call is


def test_the_adapter_is_a_function_of_the_seed(distill):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        distill("--output_dir", folder, "--seed", seed)
    a, b, c = (load_file(f"{folder}/pytorch_lora_weights.safetensors") for folder in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    record = json.loads(Path("a/distill_config.json").read_text())
    assert record["timesteps"] == [999, 499] and record["seed"] == 1 and len(record["last_losses"]) == 5


def test_nothing_is_left_of_an_interrupted_run(distill, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "distillation_loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        distill()
    assert not list(Path("distilled").glob("*"))


BAD_ARGUMENTS = {
    "half a group": (["--train_batch_size", 20], "--train_batch_size .*20"),
    "too few cells": (["--num_cells", 8], "--num_cells 8"),
    "a seed below 0": (["--seed", -1], "--seed .*-1"),
    "the folder of a pipeline": (["--output_dir", "pipeline"], "--output_dir pipeline"),
    "no such device": (["--device", "nowhere"], "--device nowhere"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(distill, name, monkeypatch):
    arguments, message = BAD_ARGUMENTS[name]
    monkeypatch.setattr(SCRDiTPipeline, "from_pretrained", None)  # before anything is loaded
    with pytest.raises(ValueError, match=message):
        distill(*arguments)
    assert {path.name for path in Path.cwd().iterdir()} == {"pipeline", "cells.h5ad"}


def test_an_adapter_is_not_replaced_unasked(distill):
    distill()
    with pytest.raises(ValueError, match="distilled .*--overwrite"):
        distill()
    distill("--overwrite", "True")


def test_models_without_a_posterior_are_refused(run_job, pipe):
    pipe.save_pretrained("rounding")
    with pytest.raises(ValueError, match="posterior"):
        run_job("distill", "--pipeline", "rounding")


def test_a_diverging_run_names_the_learning_rate(distill, monkeypatch):
    monkeypatch.setattr(distillation, "distillation_loss", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="step 0: .*--learning_rate"):
        distill()
