"""The command that measures completion, translation and paths beside their baselines."""

import json
import sys

import anndata as ad
import numpy as np
import pytest
from scripts import load_script


@pytest.fixture
def run(adata, count_pipe, tmp_path, monkeypatch, capsys):
    """Run the command with the tiny pipeline on 240 cells; those of one label and batch are held out."""
    script = load_script("benchmarks/editing")
    cells = ad.concat([adata] * 4, index_unique="-")
    held_out = ((cells.obs["cell_type"] == "NK") & (cells.obs["batch"] == "b2")).to_numpy()
    cells[held_out].copy().write_h5ad(tmp_path / "held_out.h5ad")
    kept = np.random.default_rng(0).permutation(np.flatnonzero(~held_out))
    for part, rows in zip(("train", "control", "test"), np.array_split(kept, 3), strict=True):
        cells[rows].copy().write_h5ad(tmp_path / f"{part}.h5ad")
    count_pipe.save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr(script, "PANEL", 8)

    def run(*arguments):
        folders = ["--pipeline", tmp_path / "pipeline", "--split_dir", tmp_path, "--output_dir", tmp_path / "out"]
        words = [*folders, "--num_cells", 30, *arguments]
        monkeypatch.setattr(sys, "argv", ["editing.py", *map(str, words)])
        script.main()
        return json.loads((tmp_path / "out" / "editing.json").read_text())["results"], capsys.readouterr().out

    return run


def test_each_job_has_finite_figures_beside_its_baselines(run):
    results, printed = run("--complete", "--translate", "batch", "b2", "--path", "T", "B", "--num_seeds", 1)
    assert set(results) == {"complete, variable panel 0", "complete, random panel 0", "translate 0", "path 0"}
    for name, found in results.items():
        assert {"ours"} < set(found) and f"## {name[:-2]}" in printed
        values = {metric: value for values in found.values() for metric, value in values.items()}
        values.pop("neighbors kept", None)  # needs twelve cells of a label
        assert np.isfinite(list(values.values())).all(), name
    assert results["translate 0"]["not translated"]["labels kept"] <= 1


def test_the_same_command_continues(run):
    first, _ = run("--path", "T", "B", "--num_seeds", 1)
    second, _ = run("--path", "T", "B", "--num_seeds", 2)
    assert second["path 0"] == first["path 0"] != second["path 1"]
    with pytest.raises(ValueError, match="--output_dir"):
        run("--path", "B", "T", "--num_seeds", 1)
