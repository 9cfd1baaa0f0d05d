"""The code of the notebooks runs, in a small setting, and what they store shows figures and no errors."""

import base64
import io
import json
import re
from pathlib import Path

import anndata as ad
import matplotlib.image
import matplotlib.pyplot as plt
import pytest
from scripts import TINY

import scrdit_diffusers
from scrdit_diffusers.evaluation import compare

REPOSITORY = Path(__file__).parents[1]
PIPELINE = "scrdit-pbmc-zheng"
NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
SMALL = {"CELLS_PER_GROUP": 20, "NUM_CELLS": 25, "REPEATS": 2}  # what notebooks set in lines of their own
TINY_TRAINING = {name.removeprefix("--"): value for name, value in zip(TINY[::2], TINY[1::2], strict=True)}
TINY_TRAINING["n_top_genes"] = 300  # with 30 many cells are equal, and distances between them zero
FEW_STEPS = {"max_train_steps": 4, "checkpointing_steps": 4, "validation_steps": 4, "report_to": "none"}


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The folder of notebooks in a small copy of the repository: 20 real cells of each label, brief training."""
    cards, folder = tmp_path / "hub_cards", tmp_path / "docs" / "notebooks"
    (cards / "space" / "reference").mkdir(parents=True)
    (cards / PIPELINE).symlink_to(REPOSITORY / "hub_cards" / PIPELINE)
    real = ad.read_h5ad(REPOSITORY / "hub_cards" / "space" / "reference" / f"{PIPELINE}.h5ad")
    few = real.obs.groupby("cell_type", observed=True).head(20).index
    real[few].write_h5ad(cards / "space" / "reference" / f"{PIPELINE}.h5ad")
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    plt.switch_backend("Agg")
    train = scrdit_diffusers.train

    def train_briefly(*args, **options):
        size = {} if "pretrained_model_name_or_path" in options else TINY_TRAINING
        return train(*args, **size | options | FEW_STEPS)

    def compare_quickly(*args, compare=compare.compare, **options):
        return compare(*args, **options | {"quick": True})

    monkeypatch.setattr(scrdit_diffusers, "train", train_briefly)
    monkeypatch.setattr(compare, "compare", compare_quickly)
    yield tmp_path
    plt.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_runs(notebook, checkout):
    namespace = {}
    for cell in code_cells(notebook):
        code = "".join(cell["source"])
        for name, number in SMALL.items():
            code = re.sub(rf"^{name} = \d+$", f"{name} = {number}", code, flags=re.MULTILINE)
        exec(code, namespace)
    assert plt.get_fignums()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_complete(notebook):
    """Every cell was run once, in order, without an error; figures are images that are not blank."""
    cells = code_cells(notebook)
    outputs = [output for cell in cells for output in cell["outputs"]]
    figures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert notebook.stat().st_size < 400_000 and figures
    for figure in figures:
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode("".join(figure))))
        assert pixels[..., :3].std() > 0.01


def test_pages_list_every_notebook():
    page = (REPOSITORY / "docs" / "tutorials.md").read_text(encoding="utf-8")
    listed = re.findall(r"^notebooks/(\w+)$", page, flags=re.MULTILINE)
    assert listed and sorted(listed) == [path.stem for path in NOTEBOOKS]
