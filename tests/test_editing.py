"""The command that measures completion, translation and paths beside their baselines."""

import json
import sys

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scripts import load_script


@pytest.fixture
def run(adata, count_pipe, tmp_path, monkeypatch, capsys):
    """Run the command with the tiny pipeline on 240 cells; those of one label and batch are held out."""
    script = load_script("benchmarks/editing")
    cells = ad.concat([adata] * 4, index_unique="-")
    held_out = ((cells.obs["cell_type"] == "T") & (cells.obs["batch"] == "b2")).to_numpy()
    cells[held_out].copy().write_h5ad(tmp_path / "held_out.h5ad")
    kept = np.random.default_rng(0).permutation(np.flatnonzero(~held_out))
    for part, rows in zip(("train", "control", "test"), np.array_split(kept, 3), strict=True):
        cells[rows].copy().write_h5ad(tmp_path / f"{part}.h5ad")
    count_pipe.save_pretrained(tmp_path / "pipeline")
    monkeypatch.setattr(script, "PANEL", 8)
    monkeypatch.setattr(script, "TREES", 10)
    monkeypatch.setattr(script, "find_spec", lambda name: None)

    def run(*arguments, folder="out"):
        folders = ["--pipeline", tmp_path / "pipeline", "--split_dir", tmp_path, "--output_dir", tmp_path / folder]
        words = [*folders, "--num_cells", 30, *arguments]
        monkeypatch.setattr(sys, "argv", ["editing.py", *map(str, words)])
        script.main()
        return json.loads((tmp_path / folder / "editing.json").read_text())["results"], capsys.readouterr().out

    return run


def test_each_job_has_finite_figures_beside_its_baselines(run):
    results, printed = run("--complete", "--translate", "batch", "b2", "--path", "NK", "B", "--num_seeds", 1)
    assert set(results) == {"complete, variable panel 0", "complete, random panel 0", "translate 0", "path 0"}
    for name, found in results.items():
        assert {"ours"} < set(found) and f"## {name[:-2]}" in printed
        values = {metric: value for values in found.values() for metric, value in values.items()}
        values.pop("neighbors kept", None)  # needs twelve cells of a label
        assert np.isfinite(list(values.values())).all(), name
    translated = results["translate 0"]
    assert translated["not translated"]["labels kept"] <= 1 and "generated with the target labels" in translated
    assert {"Gaussian copula of the label", "half of the real cells beside the others"} < set(translated)


def test_pipelines_take_turns_with_the_seeds(run, count_pipe, tmp_path):
    first, _ = run("--path", "NK", "B", "--num_seeds", 2)
    other = tmp_path / "other"
    with torch.no_grad():
        for weight in count_pipe.transformer.parameters():
            weight.add_(torch.randn_like(weight) / 4)
    count_pipe.save_pretrained(other)
    both, _ = run("--pipeline", tmp_path / "pipeline", other, "--path", "NK", "B", "--num_seeds", 2, folder="both")
    assert both["path 0"] == first["path 0"] and both["path 1"]["start"] == first["path 1"]["start"]
    assert both["path 1"]["ours"] != first["path 1"]["ours"]


def test_the_same_command_continues(run):
    first, _ = run("--path", "NK", "B", "--num_seeds", 1)
    second, _ = run("--path", "NK", "B", "--num_seeds", 2)
    assert second["path 0"] == first["path 0"] != second["path 1"]
    with pytest.raises(ValueError, match="--output_dir"):
        run("--path", "B", "NK", "--num_seeds", 1)


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/editing")


def test_as_many_cells_of_each_label_are_compared(script):
    one, other = np.array(list("aaabbc")), np.array(list("bbbbaad"))
    rows = script.pair_by_label(one, other, seed=0)
    assert [sorted(labels[chosen]) for labels, chosen in zip((one, other), rows, strict=True)] == [list("aabb")] * 2


def test_fold_changes_of_the_right_cells_are_right_whatever_the_composition(script):
    rates = {("a", 0): [50, 20, 30], ("a", 1): [20, 50, 30], ("b", 0): [10, 30, 60], ("b", 1): [4, 66, 30]}
    labels, goal_labels = np.array(list("aaab")), np.array(list("abbbbb"))
    before, after = (np.array([rates[label, i] for label in labels], float) for i in (0, 1))
    goal = np.array([rates[label, 1] for label in goal_labels], float)
    right = script.compare_changes(after, before, labels, goal, goal_labels)
    assert right == pytest.approx({"correlation of log fold changes": 1, "slope of log fold changes": 1})
    shrunk = script.compare_changes((before + after) / 2, before, labels, goal, goal_labels)
    assert 0.1 < shrunk["slope of log fold changes"] < 0.9


def test_neighbors_are_kept_by_a_shift_and_lost_at_random(script):
    rng = np.random.default_rng(0)
    points, groups = rng.normal(size=(80, 4)), np.repeat(["a", "b"], 40)
    assert script.share_neighbors_kept(points, points + 3, groups) == 1
    assert script.share_neighbors_kept(points, rng.normal(size=(80, 4)), groups) < 0.3


def test_mixed_points_have_a_higher_ilisi_and_harmony_mixes_them(script):
    pytest.importorskip("harmonypy", reason="harmonypy is not installed")
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(100, 5)), rng.normal(size=(100, 5))
    assert script.scaled_ilisi(one, other + 5) < 0.05 < 0.7 < script.scaled_ilisi(one, other)
    corrected = script.correct_by_harmony([one, other + 1], [np.repeat("one", 100), np.repeat("other", 100)], 0)
    assert script.scaled_ilisi(*corrected) > script.scaled_ilisi(one, other + 1) + 0.2


def test_scvi_translates_to_the_rates_of_the_target(script):
    pytest.importorskip("scvi", reason="scvi-tools is not installed", exc_type=ImportError)
    rng = np.random.default_rng(0)
    batch = np.repeat(["one", "other"], 100)
    rates = np.where((batch == "one")[:, None], [20, 5, 5, 5], [5, 20, 5, 5])
    cells = ad.AnnData(sp.csr_matrix(rng.poisson(rates).astype(np.float32)))
    cells.obs["batch"] = batch
    found = script.translate_by_scvi(cells, cells[:100].copy(), "batch", "other", np.full(100, 35.0), 0)
    for values in found.values():
        assert values.mean(axis=0) == pytest.approx([5, 20, 5, 5], rel=0.4)
    assert (found["scVI, draws"] % 1 == 0).all() and (found["scVI, means"] % 1 != 0).any()
