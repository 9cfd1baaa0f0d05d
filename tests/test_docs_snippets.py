"""The Python snippets of the documentation run, in order, page by page, with tiny training."""

import functools
import re
import shutil
from pathlib import Path

import matplotlib
import pytest
from scripts import TINY

import scrdit_diffusers

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = ("quickstart", "how-to", "tutorials/generate", "tutorials/own-cells", "tutorials/fine-tune")
REFERENCE = "hub_cards/space/reference/scrdit-pbmc-zheng.h5ad"


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matplotlib.rcParams, "backend", "Agg", raising=False)
    (tmp_path / "hub_cards").symlink_to(REPOSITORY / "hub_cards")
    shutil.copy(REFERENCE, "cells.h5ad")
    tiny = {name.removeprefix("--"): value for name, value in zip(TINY[::2], TINY[1::2], strict=True)}
    if page == "tutorials/fine-tune":  # the size is that of the pretrained pipeline
        tiny = {name: tiny[name] for name in ("report_to", "checkpointing_steps", "validation_steps")}
    train = scrdit_diffusers.train
    monkeypatch.setattr(scrdit_diffusers, "train", lambda *args, **kwargs: train(*args, **tiny | kwargs | STEPS))
    namespace = {}
    for snippet in re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL):
        exec(snippet, namespace)
