"""The command that measures denoising, annotation, simulation and augmentation beside their baselines."""

import json
import sys

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/jobs")


@pytest.fixture
def run(script, adata, count_pipe, tmp_path, monkeypatch, capsys):
    """Run the command on sixty cells that are split, with the tiny pipeline as the trained one."""
    cells = ad.concat([adata] * 4, index_unique="-")
    cells.X = sp.csr_matrix(cells.X + np.random.default_rng(1).poisson(0.5, cells.shape), dtype=np.float32)  # no copies
    cells.obs["cell_type"] = cells.obs["cell_type"].astype("category")
    folder = tmp_path / "out" / "cells"
    folder.mkdir(parents=True)
    for part, rows in zip(script.PARTS, np.array_split(np.random.default_rng(0).permutation(240), 3), strict=True):
        cells[rows].copy().write_h5ad(folder / f"{part}.h5ad")
    (folder / "split.json").write_text("{}")
    trained = []

    def train(study, path, seed, output):
        trained.append(output.name)
        return count_pipe

    monkeypatch.setattr(script.Study, "_train", train)
    monkeypatch.setattr(script, "RARE", 0.25)

    def run(*arguments):
        words = ["--datasets", "cells.h5ad", "--output_dir", tmp_path / "out", "--num_cells", 12, *arguments]
        monkeypatch.setattr(sys, "argv", ["jobs.py", *map(str, words)])
        trained.clear()
        script.main()
        return json.loads((folder / "jobs.json").read_text())["results"], trained, capsys.readouterr().out

    return run


def test_each_job_has_finite_figures_beside_its_baselines(run):
    results, _, printed = run("--num_seeds", 1, "--num_unseen", 1)
    assert {name.split()[0] for name in results} == {"denoise", "annotate", "unseen", "simulate", "realism", "augment"}
    for name, found in results.items():
        assert len(found) > 1, name
        assert np.isfinite([value for values in found.values() for value in values.values()]).all(), name
        assert f"cells: {name.split()[0]}" in printed
    assert all(0 <= values["AUROC"] <= 1 for name in results if "unseen" in name for values in results[name].values())


def test_the_same_command_continues(run):
    first, trained, _ = run("--num_seeds", 1, "--jobs", "denoise", "annotate")
    assert trained == ["pipeline-0"] * 2
    second, trained, printed = run("--num_seeds", 2, "--jobs", "denoise", "annotate")
    assert trained == ["pipeline-1"] * 2 and "range of 2" in printed
    assert second["denoise 0"] == first["denoise 0"] and second.keys() > first.keys()


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy(script):
    probabilities = np.tile([0.8, 0.2], (100, 1))
    codes = (np.arange(100) >= 60).astype(int)  # right in 60 of 100 cells
    assert script.calibration_error(probabilities, codes) == pytest.approx(0.2)


def test_thinned_cells_have_their_effects(script):
    counts = np.random.default_rng(0).poisson(200, (400, 3)).astype(np.float32)
    cells = ad.AnnData(sp.csr_matrix(counts))
    cells.var_names = ["a", "b", "c"]
    thinned = script.thin(cells, {"b": -1.0}, np.random.default_rng(1))
    treated = (thinned.obs["group"] == "treated").to_numpy()
    ratio = np.asarray(thinned.X[treated].mean(axis=0) / thinned.X[~treated].mean(axis=0)).ravel()
    assert np.allclose(ratio, [1, 0.5, 1], atol=0.02)
    assert thinned.varm["log2_fold_change"]["treated"].tolist() == [0, -1, 0]
