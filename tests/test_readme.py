"""The README's Python snippets run, in order, on a tiny pipeline, and the texts link to files that exist."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from scrdit_diffusers import SCRDiTPipeline, SCRDiTProcessor, SCRDiTTransformer, default_scheduler

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
TEXTS = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "training" / "LOG.md"]


@pytest.fixture
def pipeline_folder(tmp_path):
    processor = SCRDiTProcessor(
        var_names=["CD3D", "MS4A1", "CD34"],
        mean=np.full(3, 0.5),
        std=np.ones(3),
        condition_keys=["cell_type"],
        condition_categories=[["CD19+ B", "CD34+"]],
        composition=[[0, 5], [1, 3]],
        log_library_sizes=[[1.0, 2.0], [1.5, 2.5]],
    )
    scheduler = default_scheduler(beta_schedule="squaredcos_cap_v2")
    model = SCRDiTTransformer(num_genes=3, patch_size=2, num_layers=1, num_classes=[2], count_bins=[[3, 4]])
    SCRDiTPipeline(model, scheduler, processor, decode_timestep=200).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_snippets_run(pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    namespace = {"pipeline_folder": pipeline_folder}
    for snippet in snippets:
        exec(snippet, namespace)
    assert len(snippets) == 3 and os.path.exists("new_cells.h5ad")
    assert namespace["adata"].n_obs == 50 and type(namespace["pipe"].scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_named_files_exist(text):
    for target in re.findall(r"\]\(([^)#]+)\)", text.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (text.parent / target).exists(), target
