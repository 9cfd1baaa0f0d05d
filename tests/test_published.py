"""The command that judges cells by published protocols."""

import json
import sys
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scripts import load_script
from sklearn.metrics.pairwise import rbf_kernel

from scrdit_diffusers import SCRDiTPipeline

SIGMAS = (0.01, 0.1, 1, 10, 100)


@pytest.fixture
def script(monkeypatch):
    script = load_script("benchmarks/published")
    monkeypatch.setattr(script, "N_TOP_GENES", 20)
    monkeypatch.setattr(script, "REAL_DRAWS", 2)
    monkeypatch.setattr(script.CFGen, "RARE", "NK")
    return script


@pytest.fixture
def cells(adata):
    """240 cells of three types."""
    cells = ad.concat([adata] * 4, index_unique="-")
    cells.X = sp.csr_matrix(cells.X + np.random.default_rng(1).poisson(0.5, cells.shape), dtype=np.float32)  # no copies
    return cells


@pytest.fixture
def run(script, cells, count_pipe, tmp_path, monkeypatch, capsys):
    """Run the command, with the tiny pipeline as the trained one."""
    cells.write_h5ad(tmp_path / "cells.h5ad")
    trained = []

    def load_or_train(path, seed, output, options):
        trained.append((seed, *options))
        return count_pipe

    monkeypatch.setattr(script, "load_or_train", load_or_train)

    def run(protocol, *arguments):
        folders = ["--dataset", tmp_path / "cells.h5ad", "--output_dir", tmp_path / protocol]
        words = ["--protocol", protocol, *folders, "--num_draws", 2, *arguments]
        monkeypatch.setattr(sys, "argv", ["published.py", *map(str, words)])
        trained.clear()
        script.main()
        results = json.loads((tmp_path / protocol / "published.json").read_text())["results"]
        return results, list(trained), capsys.readouterr().out

    return run


@pytest.mark.parametrize("protocol", ["cfgen", "moe-fb"])
def test_real_cells_stand_beside_ours_and_the_published(protocol, script, run):
    results, trained, printed = run(protocol, "--num_splits", 2, "--learning_rate", "1e-3")
    assert [options[0] for options in trained] == [0, 1] and trained[0][-2:] == ("--learning_rate", "1e-3")
    for name in (script.REAL, "ours"):
        assert np.isfinite(list(results[name]["1"].values())).all() and f"| {name} |" in printed
    assert results["ours"]["0"]["MMD"] > results[script.REAL]["0"]["MMD"]
    assert "| ours - real cells" in printed and "(published, not paired) |" in printed


def test_the_same_command_continues_and_other_options_need_another_name(run):
    first, _, _ = run("moe-fb", "--num_splits", 1)
    second, trained, _ = run("moe-fb", "--num_splits", 2)
    assert len(trained) == 1 and second["ours"]["0"] == first["ours"]["0"] != second["ours"]["1"]
    with pytest.raises(ValueError, match="--name"):
        run("moe-fb", "--learning_rate", "1e-3")
    results, trained, _ = run("moe-fb", "--num_splits", 1, "--name", "slow", "--learning_rate", "1e-3")
    assert len(trained) == 1 and set(results) == {"real cells", "real cells, held out", "ours", "slow"}


@pytest.mark.parametrize("protocol", ["cfgen", "moe-fb"])
def test_cells_of_other_models_are_judged_on_the_same_split(protocol, run, tmp_path):
    run(protocol, "--num_splits", 1)
    (tmp_path / "copies").mkdir()
    test = ad.read_h5ad(tmp_path / protocol / "split-0" / "test.h5ad")
    test[:, ::-1].write_h5ad(tmp_path / "copies" / "split-0.h5ad")
    results, trained, _ = run(protocol, "--num_splits", 1, "--others", f"copies={tmp_path / 'copies'}")
    assert not trained and np.allclose(list(results["copies"]["0"].values()), 0, atol=1e-3)
    with pytest.raises(ValueError, match=r"split-1"):
        run(protocol, "--num_splits", 2, "--others", f"copies={tmp_path / 'copies'}")


def test_distances_are_exact(script, cells, tmp_path):
    protocol = script.CFGen(cells, "cell_type", tmp_path)
    protocol.fit(cells[:120].copy(), cells[120:].copy())
    values = protocol.values(cells[:120])
    protocol.types = np.array(["T", "B"]).repeat(60)
    found = protocol.judge(values)
    pcs = protocol.pca.transform(values[:, protocol.genes])
    halves = [(pcs[rows], protocol.test[rows]) for rows in (slice(60), slice(60, None))]
    distances = [cdist(x, y) for x, y in halves]
    w1, w2 = ([(d**p)[linear_sum_assignment(d**p)].mean() ** (1 / p) for d in distances] for p in (1, 2))
    mmd = []
    for x, y in halves:
        kernels = [[rbf_kernel(*pair, 1 / (2 * s**2)).mean() for s in SIGMAS] for pair in ((x, x), (y, y), (x, y))]
        mmd.append(np.dot([1, 1, -2], kernels).sum())
    expected = [np.mean(values) for values in (w1, w2, mmd)]
    assert np.allclose([found["W1"], found["W2"], found["MMD"]], expected)


def test_moe_fb_trains_on_log_normalized_values_without_types(script, cells, train_here, tmp_path, monkeypatch):
    def train(command, check):
        words = dict(zip(command[2::2], command[3::2], strict=True))
        train_here(words.pop("--dataset"), words.pop("--output_dir"), *(w for pair in words.items() for w in pair))

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=train))
    cells.write_h5ad(tmp_path / "train.h5ad")
    protocol = script.MoeFB(cells, "cell_type", tmp_path)
    pipe = script.load_or_train(tmp_path / "train.h5ad", 0, tmp_path / "pipeline", protocol.training)
    assert isinstance(pipe, SCRDiTPipeline) and "cell_type" not in pipe.processor.condition_keys
    values = protocol.generate(pipe, cells[:50], seed=0)
    real = protocol.values(cells[:50])
    assert values.shape == real.shape == (50, 20) and abs(values.mean() - real.mean()) < 0.5
    again = script.load_or_train(tmp_path / "train.h5ad", 0, tmp_path / "pipeline", ["--unknown"])  # not trained again
    assert again.processor.var_names == pipe.processor.var_names == list(protocol.genes)
