"""The command that judges the default on sets of many kinds, in miniature."""

import sys
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scripts import load_script

GENERATION = "--num_inference_steps 2 --n_jobs 1 --num_seeds 1"


@pytest.fixture
def script():
    return load_script("benchmarks/realism")


@pytest.fixture
def run(script, adata, tmp_path, monkeypatch, train_here, evaluate, evaluate_script):
    """Run the command on 240 cells; what it would start as processes runs here, and is listed."""
    cells = ad.concat([adata] * 4, index_unique="-")
    cells.X = sp.csr_matrix(cells.X + np.random.default_rng(1).poisson(0.5, cells.shape), dtype=np.float32)
    cells.obs = cells.obs.astype("category")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    started = []

    def run_logged(command, log):
        words = [str(word) for word in command[1:]]
        started.append(f"{log.stem} {log.parents[1].name}")
        if log.stem == "evaluate":
            evaluate(*words[1:])
        else:
            named = dict(zip(words[1::2], words[2::2], strict=False))
            keep = [word for name in ("--labels_key", "--value_space") if name in named for word in (name, named[name])]
            if "batch" in words:
                keep.insert(2, "batch")
            train_here(named["--dataset"], named["--output_dir"], *keep)

    monkeypatch.setattr(script, "run_logged", run_logged)
    monkeypatch.setattr(evaluate_script, "draw_figures", lambda *args: {})

    def run(cases, *arguments):
        monkeypatch.setattr(script, "CASES", cases)
        words = ["realism.py", "--data_dir", tmp_path, "--output_dir", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, words), "--evaluate_options", GENERATION])
        started.clear()
        script.main()
        return list(started)

    return run


def test_a_case_is_split_trained_and_judged_once(run, script, tmp_path, capsys):
    labeled = script.Case("sets", "types", "cells.h5ad", only={"batch": ("b1",)}, num_cells=40)
    cases = [labeled, replace(labeled, part="labels", name="no labels", labels_key=(), num_cells=None)]
    assert run(cases, "--parts", "sets") == ["train types", "evaluate types"]
    assert run(cases) == ["train no labels", "evaluate no labels"]
    assert run(cases) == []
    printed = capsys.readouterr().out.splitlines()
    tables = [line.split(" | ")[0] for line in printed if line.startswith(("##", "| types", "| no labels"))]
    assert tables[-4:] == ["## sets", "| types", "## labels", "| no labels"]
    train = ad.read_h5ad(tmp_path / "out/sets/types/train.h5ad")
    assert set(train.obs["batch"]) == {"b1"} and train.n_obs == pytest.approx(40, abs=2)


def test_an_unseen_combination_is_judged_by_its_own_cells(run, script, tmp_path):
    held_out = {"cell_type": ("T",), "batch": ("b2",)}
    case = script.Case("unseen", "T in b2", "cells.h5ad", ("cell_type", "batch"), held_out=held_out)
    run([case])
    parts = {
        part: ad.read_h5ad(tmp_path / f"out/unseen/T in b2/{part}.h5ad").obs for part in ("train", "test", "control")
    }
    for part, obs in parts.items():
        is_held_out = (obs["cell_type"] == "T") & (obs["batch"] == "b2")
        assert is_held_out.all() if part != "train" else not is_held_out.any()
    assert not set(parts["test"].index) & set(parts["control"].index)


def test_rows_have_the_excess_over_real_cells_and_over_the_copula(run, script, tmp_path, capsys):
    case = script.Case("sets", "types", "cells.h5ad")
    run([case])
    metrics = pd.read_json(tmp_path / "out/sets/types/evaluation/metrics.json", typ="series")["rows"]
    found = pd.DataFrame(metrics).query("group == 'all'").set_index("metric")
    on = found.loc[["classifier_genes_auroc", "classifier_pcs_auroc"]]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| types")]
    cells = dict(zip(script.titles(), lines[-1].strip("| ").split(" | "), strict=True))
    assert float(cells["excess over real"]) == pytest.approx((on["value"] - on["ceiling"]).mean(), abs=6e-4)
    assert float(cells["copula over ours"]) == pytest.approx((on["gaussian_copula"] - on["value"]).mean(), abs=6e-4)
    assert cells["genes"].split(" / ")[1] == f"{on['ceiling'].iloc[0]:.3f}"


def test_cells_are_drawn_in_proportion_and_from_every_label(script):
    labels = pd.Series(["a"] * 900 + ["b"] * 99 + ["c"] * 3)
    drawn = labels[script.draw_cells(labels, 100)].value_counts()
    assert drawn.to_dict() == {"a": 90, "b": 10, "c": 2}


def test_every_case_has_a_name_of_its_own(script):
    assert len({(case.part, case.name) for case in script.CASES}) == len(script.CASES)
    assert {case.part for case in script.CASES} == set(script.PARTS)


def test_tpm_is_zero_where_the_count_is(script, adata):
    counts = adata.X.toarray()
    script.make_tpm(adata)
    assert ((adata.X == 0) == (counts == 0)).all()
    np.testing.assert_allclose((2**adata.X - 1).sum(axis=1) * 10, 1e6, rtol=1e-4)


def test_a_folder_without_the_files_is_an_error(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["realism.py", "--data_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        script.main()
    assert "pbmc_zheng_facs.h5ad" in capsys.readouterr().err
