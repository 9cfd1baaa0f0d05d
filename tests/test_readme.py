"""The README's Python snippets run, in order, and the texts link to files that exist."""

import functools
import os
import re
from pathlib import Path

import pytest
from scripts import TINY

import scrdit_diffusers

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
TEXTS = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "training" / "LOG.md"]


def test_snippets_run(tmp_path, monkeypatch):
    """In a folder with the trained pipelines; training takes eight steps of a tiny model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub_cards").symlink_to(REPOSITORY / "hub_cards")
    tiny = {name.removeprefix("--"): value for name, value in zip(TINY[::2], TINY[1::2], strict=True)}
    monkeypatch.setattr(scrdit_diffusers, "train", functools.partial(scrdit_diffusers.train, **tiny))
    namespace = {}
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    for snippet in snippets:
        exec(snippet, namespace)
    assert len(snippets) == 3 and namespace["adata"].n_obs == 200 and os.path.exists("new_cells.h5ad")
    assert namespace["pipe"].processor.num_genes == 30 and (tmp_path / "my-model" / "README.md").exists()


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_named_files_exist(text):
    for target in re.findall(r"\]\(([^)#]+)\)", text.read_text(encoding="utf-8")):
        if not target.startswith(("http", "_generated/")):  # what the build of the documentation draws
            assert (text.parent / target).exists(), target
