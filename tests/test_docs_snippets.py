"""The Python snippets of the documentation run, in order, page by page, with tiny training."""

import re
import shutil
from pathlib import Path

import huggingface_hub
import matplotlib.pyplot as plt
import pytest
from scripts import TINY

import scrdit_diffusers

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = ("quickstart", "how-to", "tutorials/generate", "tutorials/own-cells", "tutorials/fine-tune")
PAGES += ("jobs/denoise", "jobs/annotate", "jobs/simulate", "jobs/augment")
PAGES += ("jobs/complete", "jobs/translate", "jobs/interpolate")
TINY_TRAINING = {name.removeprefix("--"): value for name, value in zip(TINY[::2], TINY[1::2], strict=True)}
TINY_TRAINING["n_top_genes"] = 300  # with 30 most of these cells are equal, and distances between them zero
FEW_STEPS = {"max_train_steps": 8, "checkpointing_steps": 8, "validation_steps": 8}


def run_snippets(page):
    namespace = {}
    for snippet in re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text("utf-8"), flags=re.DOTALL):
        exec(snippet, namespace)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A working directory with the trained pipelines of the repository and `cells.h5ad`; training takes eight steps."""
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("Agg")
    (tmp_path / "hub_cards").symlink_to(REPOSITORY / "hub_cards")
    shutil.copy(REPOSITORY / "hub_cards" / "space" / "reference" / "scrdit-pbmc-zheng.h5ad", "cells.h5ad")
    train = scrdit_diffusers.train

    def train_briefly(*args, **options):
        size = {} if "pretrained_model_name_or_path" in options else TINY_TRAINING
        return train(*args, **size | options | FEW_STEPS)

    monkeypatch.setattr(scrdit_diffusers, "train", train_briefly)
    yield
    plt.close("all")


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page, checkout):
    run_snippets(page)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub, uploading large files
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers
def test_snippets_of_sharing_run(checkout, hub, count_pipe, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "hub-cache")
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    count_pipe.save_pretrained("my-model")
    run_snippets("tutorials/share")
    assert "remote-code" in hub.repositories["model", "user/scrdit-pbmc"].branches
