"""The command that measures growth with the number of genes, in miniature; a stand-in is timed in place of scVI."""

import contextlib
import io
import json
import sys
import types

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from scripts import load_script
from test_acceleration import TYPES

SMALL = ["--batch_size", 8, "--repeats", 1]


@pytest.fixture
def script():
    return load_script("benchmarks/growth")


@pytest.fixture
def run(script, adata, tmp_path, monkeypatch, train_here, evaluate, evaluate_script):
    """Run the command on sixty cells; what it would start as processes runs here, and is listed."""
    adata.obs["cell_type"] = np.tile(TYPES, 30)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    started = []

    def run_logged(command, log):
        words = [str(word) for word in command[1:]]
        started.append(log.stem)
        log.parent.mkdir(parents=True, exist_ok=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            if words[0].endswith("growth.py"):
                monkeypatch.setattr(sys, "argv", words)
                script.main()
                AcceleratorState._reset_state(reset_partial_state=True)
            else:
                evaluate(*words[1:])
        log.write_text(printed.getvalue())

    monkeypatch.setattr(script, "run_logged", run_logged)
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    monkeypatch.setattr(evaluate_script, "draw_figures", lambda *args: {})

    def run(*arguments):
        folders = ["--dataset", tmp_path / "cells.h5ad", "--output_dir", tmp_path / "out"]
        words = ["growth.py", *folders, *SMALL, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        started.clear()
        script.main()
        return json.loads((tmp_path / "out/growth.json").read_text())["rows"], list(started)

    return run


TRAINING = "--patch_size 8 --num_layers 1 --attention_head_dim 4 --max_train_steps 2 --validation_steps 100"
OPTIONS = ["--train_options", TRAINING, "--evaluate_options", "--num_inference_steps 2 --n_jobs 1"]


def test_every_number_of_genes_is_measured_once_and_the_command_goes_on(run, tmp_path, capsys):
    first, started = run("--num_genes", 15, *OPTIONS)
    assert list(first) == ["ours training 15", "ours sampling 15", "train 15", "quality 15"]
    assert started == ["ours training 15", "ours sampling 15", "split", "train 15", "evaluation 15"]
    rows, started = run("--num_genes", 15, 100, *OPTIONS)
    assert started == ["ours training 100", "ours sampling 100", "train 100", "evaluation 100"]
    assert {name: rows[name] for name in first} == first
    assert [rows[f"train {number}"]["num_genes"] for number in (15, 100)] == [15, 23]  # there are no more
    for name, row in rows.items():
        assert name.startswith("quality") or (row["megabytes"] > 50 and row.get("cells_per_second", 1) > 0)
    assert set(rows["quality 15"]["classifier_genes_auroc"]) == {"ours", "real cells"}
    assert (tmp_path / "out/growth.png").stat().st_size > 10_000
    assert "| training, cells per second | ours |" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"growth\.json .*'num_seeds': 1"):
        run("--num_genes", 15, *OPTIONS, "--num_seeds", 2)


def test_quality_needs_a_dataset(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["growth.py"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--dataset" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "expected"), [("training", 0.9 * 80 / 2), ("sampling", 4)])
def test_rates_of_scvi_leave_out_what_a_run_does_once(script, monkeypatch, task, expected):
    """An epoch takes two seconds and a cell a quarter; 10 and 5 seconds are spent once."""
    now = [0.0]

    class SCVI:
        def train(self, max_epochs):
            now[0] += 10 + 2 * max_epochs

    def scvi_prior(train, obs, labels_key, rng, max_epochs):
        assert set(obs[labels_key]) <= set(train.obs[labels_key])
        sys.modules["scvi"].model.SCVI().train(max_epochs)
        now[0] += 5 + len(obs) / 4

    monkeypatch.setitem(sys.modules, "scvi", types.SimpleNamespace(model=types.SimpleNamespace(SCVI=SCVI)))
    monkeypatch.setattr(script.baselines, "scvi_prior", scvi_prior)
    monkeypatch.setattr(script, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    args = types.SimpleNamespace(num_genes=[12], batch_size=8, repeats=3, task=task)
    assert script.measure_scvi(args)["cells_per_second"] == pytest.approx(expected)


def test_table_and_figure_show_both_methods_beside_real_cells(script, tmp_path):
    speed = {"cells_per_second": 1234.0, "megabytes": 700.0}
    rows = {f"{method} training {number}": speed for method in ("ours", "scVI") for number in (500, 2000)}
    rows["train 2000"] = {"megabytes": 900.0, "seconds": 60.0, "num_genes": 2000}
    rows["quality 2000"] = {metric: {"ours": 0.55, "scVI": 0.75, "real cells": 0.5} for metric in script.QUALITY}
    table = script.tabulate(rows)
    assert len(table) == 4 * 2 + 1 + 3 * 3 and set(table["genes"]) == {500, 2000}
    lines = script.format_table(table).splitlines()
    assert lines[0] == "|  |  | 500 genes | 2,000 genes |"
    assert "| training, cells per second | scVI | 1,234 | 1,234 |" in lines
    assert "| 1-NN accuracy | real cells |  | 0.500 |" in lines
    script.draw(table, tmp_path / "figures/growth.png")
    assert (tmp_path / "figures/growth.png").stat().st_size > 10_000
