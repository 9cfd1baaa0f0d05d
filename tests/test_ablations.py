"""The command that trains and evaluates one change of the defaults at a time."""

import dataclasses
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scripts import load_script
from test_acceleration import save_tiny_pipelines
from transformers import HfArgumentParser


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/ablations")


@pytest.fixture(scope="module")
def rows(script):
    return script.ROWS


def test_every_row_is_a_command_that_train_accepts(rows):
    train = load_script("train")
    parser = HfArgumentParser(train.TrainingArguments)

    def parse(flags):
        args = parser.parse_args_into_dataclasses(["--dataset", "cells.h5ad", *flags.split()])[0]
        train.check_args(args)
        return dataclasses.asdict(args)

    default = parse("")
    for flags in rows.values():
        changed = {f"--{name}" for name, value in parse(flags).items() if value != default[name]}
        assert changed == {word for word in flags.split() if word.startswith("--")}


@pytest.fixture
def prepare(script, adata, tmp_path):
    adata.obs["cell_type"] = np.tile(["T", "B"], 30)
    adata.write_h5ad(tmp_path / "cells.h5ad")

    def prepare(*more):
        words = ["--dataset", str(tmp_path / "cells.h5ad"), "--labels_key", "cell_type", "--n_top_genes", "20"]
        words += ["--num_seeds", "2", "--num_inference_steps", "2", "--output_dir", str(tmp_path / "out"), *more]
        return HfArgumentParser(script.AblationArguments).parse_args_into_dataclasses(words)[0]

    return prepare


def test_rows_are_trained_and_evaluated_once_and_the_command_goes_on(script, prepare, tmp_path, capsys, monkeypatch):
    trained = []

    def train_model(args, name, cells, labels, output_dir):
        """Tiny untrained pipelines stand where training would leave its own."""
        trained.append(name)
        save_tiny_pipelines(tmp_path / "out")
        folders = {label: tmp_path / f"out/paper-{i}" for i, label in enumerate(labels)}
        return script.Trained.load(folders if name == script.PER_LABEL else {None: tmp_path / "out/default"})

    monkeypatch.setattr(script, "train_model", train_model)
    script.main(prepare("--rows", "one model per label"))
    script.main(prepare("--rows", "default", "one model per label"))
    assert trained == ["one model per label", "default"]  # each once
    rows = json.loads((tmp_path / "out/ablations.json").read_text())["rows"]
    names = ["real cells", "one model per label", "default"]
    assert [(row["name"], row["seed"]) for row in rows] == [(name, seed) for name in names for seed in (0, 1)]
    table = [line.split(" |")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert table[-3:] == ["| real cells", "| default", "| one model per label"]  # in the order of ROWS
    with pytest.raises(ValueError, match=r"ablations\.json .*'num_train_epochs': 50"):
        script.main(prepare("--num_train_epochs", "7"))


def test_genes_that_vary_together_are_put_side_by_side(script, tmp_path):
    rng = np.random.default_rng(0)
    module = rng.integers(0, 2, (40, 2))  # each cell has both, one or none of two modules on
    counts = rng.poisson(1 + 20 * module[:, [0, 1] * 5])  # genes of the modules take turns
    genes = [f"{'ab'[i % 2]}{i}" for i in range(10)]
    adata = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=genes))
    adata.write_h5ad(tmp_path / "train.h5ad")
    script.write_gene_orders(tmp_path, seed=0)
    orders = {name: (tmp_path / name).read_text().split() for name in script.GENE_ORDERS.values()}
    assert all(sorted(order) == sorted(genes) and order != genes for order in orders.values())
    modules = "".join(gene[0] for gene in orders["genes-modules.txt"])
    assert modules in ("aaaaabbbbb", "bbbbbaaaaa")


def test_table_holds_means_over_seeds_and_the_flags(script):
    def row(name, seed, value):
        return {"name": name, "seed": seed, "metrics": dict.fromkeys(script.SHOWN, value)}

    lines = script.format_table(
        [row("no prior of the log fold changes", 0, 0.5), row("real cells", 0, 0.25)]
    ).splitlines()
    assert lines[2].startswith("| real cells |  | 0.25 |")
    assert lines[3].startswith("| no prior of the log fold changes | `--prior_std 1000` | 0.5 |")
    lines = script.format_table([row("default", 0, 0.5), row("default", 1, 0.7)]).splitlines()
    assert lines[2].startswith("| default |  | 0.6 |")


def test_conditional_model_and_models_of_one_label_see_the_same_passes(script, prepare, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(script.subprocess, "run", lambda command, **kwargs: commands.append(command))
    monkeypatch.setattr(script.Trained, "load", lambda folders: folders)
    args = prepare("--num_train_epochs", "7", "--seed", "3")
    script.prepare_cells(args, tmp_path / "cells")
    options = (tmp_path / "cells", ["B", "T"], tmp_path / "model")
    assert list(script.train_model(args, "shared embedding", *options)) == [None]
    assert list(script.train_model(args, "one model per label", *options)) == ["B", "T"]
    train = load_script("train")
    parser = HfArgumentParser(train.TrainingArguments)
    parsed = [parser.parse_args_into_dataclasses(command[5:])[0] for command in commands]
    assert [run.patch_embed_type for run in parsed] == ["shared", None, None]
    assert [run.labels_key for run in parsed] == [["cell_type"], [], []]
    assert all((run.num_train_epochs, run.seed) == (7, 3) for run in parsed)
    labels = [set(ad.read_h5ad(run.dataset).obs["cell_type"]) for run in parsed]
    assert labels == [{"B", "T"}, {"B"}, {"T"}]
    assert script.train_model(args, "another seed of training", *options)
    assert parser.parse_args_into_dataclasses(commands[-1][5:])[0].seed == 1
