"""The command that measures what trained models answer beside their baselines."""

import json
import re
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/jobs")


@pytest.fixture
def run(script, adata, count_pipe, tmp_path, monkeypatch, capsys):
    """Run the command on 240 cells, of which the last is of no use, with the tiny pipeline as the trained one."""
    cells = ad.concat([adata] * 4, index_unique="-")
    cells.X = sp.csr_matrix(cells.X + np.random.default_rng(1).poisson(0.5, cells.shape), dtype=np.float32)  # no copies
    cells.obs["cell_type"] = cells.obs["cell_type"].astype("category")
    cells.obs["doublet"] = np.where(np.arange(cells.n_obs) == cells.n_obs - 1, "yes", "no")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    trained = []

    def train(bench, path, seed, output):
        trained.append((path.name, seed, output.name))
        return count_pipe

    monkeypatch.setattr(script.Bench, "_train", train)
    editing, answers = sys.modules["editing"], sys.modules["answers"]
    monkeypatch.setattr(editing, "PANEL", 8)
    monkeypatch.setattr(editing, "TREES", 10)
    monkeypatch.setattr(editing, "TRANSLATED", 30)
    monkeypatch.setattr(editing, "COMPLETED", 30)
    monkeypatch.setattr(editing, "find_spec", lambda name: None)
    monkeypatch.setattr(answers, "RARE", 0.25)
    monkeypatch.setattr(answers, "SIMULATED", 12)

    def run(*arguments, dataset=("--datasets", tmp_path / "cells.h5ad")):
        words = [*dataset, "--output_dir", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", ["jobs.py", *map(str, words)])
        trained.clear()
        script.main()
        records = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/jobs.json")}
        return {name: record["results"] for name, record in records.items()}, list(trained), capsys.readouterr().out

    return run


def test_each_answer_has_finite_figures_beside_its_baselines(run, script):
    records, _, printed = run("--num_seeds", 1, "--num_unseen", 1)
    results = records["cells"]
    assert {re.split(r"[ ,]", name)[0] for name in results} == set(script.ANSWERS)
    for name, found in results.items():
        assert len(found) > 1 and f"## cells: {name.rsplit(' ', 1)[0]}" in printed
        assert np.isfinite([value for values in found.values() for value in values.values()]).all(), name
    assert all(0 <= values["AUROC"] <= 1 for name in results if "unseen" in name for values in results[name].values())


def test_cells_are_moved_and_joined_beside_cells_that_were_held_out(run, tmp_path):
    held_out = ["--held_out", "cell_type", "T", "--held_out", "batch", "b2"]
    moved = ["--translate", "batch", "b2", "--path", "NK", "B", "--jobs", "translate", "path"]
    records, trained, printed = run("--num_seeds", 1, "--labels_key", "cell_type", "batch", *held_out, *moved)
    results = records["cells-translate-path"]
    assert set(results) == {"translate, batch b2 0", "path, NK to B 0"}
    for name, found in results.items():
        assert "ours" in found and f"## cells-translate-path: {name[:-2]}" in printed
        values = {metric: value for values in found.values() for metric, value in values.items()}
        values.pop("neighbors kept", None)  # needs twelve cells of a label
        assert np.isfinite(list(values.values())).all(), name
    translated = results["translate, batch b2 0"]
    assert translated["not translated"]["labels kept"] <= 1 and "generated with the target labels" in translated
    assert {"Gaussian copula of the label", "half of the real cells beside the others"} < set(translated)
    folder = tmp_path / "out" / "cells-translate-path"
    parts = [ad.read_h5ad(folder / f"{part}.h5ad").obs for part in ("train", "control", "test", "held_out")]
    held_out = [(obs["cell_type"] == "T") & (obs["batch"] == "b2") for obs in parts]
    assert sum(map(len, parts)) == 240 and [rows.mean() for rows in held_out] == [0, 0, 0, 1]


def test_the_same_command_continues(run):
    first, trained, _ = run("--num_seeds", 1, "--jobs", "denoise", "annotate")
    assert trained == [("train.h5ad", 0, "pipeline-0")] * 2
    second, trained, printed = run("--num_seeds", 2, "--jobs", "denoise", "annotate")
    assert trained == [("train.h5ad", 1, "pipeline-1")] * 2 and "2 runs" in printed
    first, second = first["cells"], second["cells"]
    assert second["denoise 0"] == first["denoise 0"] and second.keys() > first.keys()
    with pytest.raises(ValueError, match="--output_dir"):
        run("--labels_key", "batch", "--jobs", "denoise")


def test_one_command_measures_all_studies_of_a_folder(run, script, tmp_path, monkeypatch):
    studies = (
        script.Study("cells.h5ad", jobs=("annotate", "complete"), only={"doublet": ("no",)}),
        script.Study("cells.h5ad", ("batch",), ("translate",), translate=(("cell_type", "B"),)),
        script.Study("another.h5ad"),
    )
    monkeypatch.setattr(script, "STUDIES", studies)
    records, _, printed = run("--num_seeds", 1, "--jobs", "annotate", dataset=("--data_dir", tmp_path))
    assert {name: list(found) for name, found in records.items()} == {"cells": ["annotate 0"]}
    parts = [ad.read_h5ad(tmp_path / "out" / "cells" / f"{part}.h5ad") for part in script.PARTS]
    assert sum(part.n_obs for part in parts) == 239 and "yes" not in set(pd.concat(x.obs["doublet"] for x in parts))
    records, _, _ = run("--num_seeds", 1, dataset=("--data_dir", tmp_path))
    assert {"cells", "cells-translate"} == set(records) and len(records["cells"]) == 3


@pytest.mark.parametrize(
    ("arguments", "job"),
    [
        (("--jobs", "translate"), "translate"),
        (("--translate", "batch", "b2"), "translate"),
        (("--jobs", "path", "--path", "NK", "B"), "path"),
        (("--path", "NK", "B", "--held_out", "cell_type", "T"), "path"),
    ],
)
def test_jobs_and_their_labels_come_together(run, arguments, job, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert f"--jobs {job}" in capsys.readouterr().err


def test_the_studies_are_of_labels_that_the_datasets_have(script):
    assert len({study.name for study in script.STUDIES}) == len(script.STUDIES)
    for study in script.STUDIES:
        assert set(study.jobs) <= set(script.JOBS) and set(study.held_out) <= {*study.labels_key}
        assert all(condition in study.labels_key for condition, _ in study.translate)
