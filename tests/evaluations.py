"""Fixtures of an evaluation: cells, their split, a pipeline, and what evaluate.py writes."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scripts import load_script
from sklearn.ensemble import RandomForestClassifier
from transformers import HfArgumentParser

from scrdit_diffusers import SCRDiTPipeline, SCRDiTProcessor, SCRDiTTransformer, default_scheduler
from scrdit_diffusers.evaluation import compare

PARTS = ("train", "control", "test")
KEY = "cell_type"
QUICK = ["--n_jobs", 1, "--num_seeds", 1, "--baselines", "none", "--steps_curve", 0]
QUICK += ["--num_inference_steps", 2]


def row(record, metric, group="all"):
    (found,) = (row for row in record["rows"] if row["metric"] == metric and row["group"] == group)
    return found


@pytest.fixture(scope="session")
def evaluate_script():
    return load_script("evaluate")


@pytest.fixture(scope="session")
def evaluate(evaluate_script):
    """Run the script's main in this process, which saves the seconds of importing everything.

    Forests have 20 instead of 200 trees: they take most of the time, and are not what is tested.
    """

    def evaluate(*arguments):
        command = [str(argument) for argument in arguments]
        args = HfArgumentParser(evaluate_script.EvaluationArguments).parse_args_into_dataclasses(command)[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compare, "RandomForestClassifier", lambda n, **kwargs: RandomForestClassifier(20, **kwargs))
            evaluate_script.main(args)

    return evaluate


@pytest.fixture(scope="session")
def cells():
    """160 cells of 40 genes: two labels of many cells, a rare one, five donors."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.8, 2.0, size=(3, 40))
    labels = np.repeat([0, 1, 2], [80, 65, 15])
    obs = pd.DataFrame({KEY: np.array(["B cell", "T cell", "rare"])[labels], "donor": rng.integers(5, size=160)})
    obs = obs.astype({"donor": str}).set_axis([f"cell{i}" for i in range(160)])
    counts = sp.csr_matrix(rng.poisson(rates[labels]), dtype=np.float32)
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(40)]))


@pytest.fixture(scope="session")
def split_dir(evaluate, cells, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    cells.write_h5ad(folder / "cells.h5ad")
    evaluate("--dataset", folder / "cells.h5ad", "--labels_key", KEY, "--split_dir", folder)
    return folder


@pytest.fixture(scope="session")
def parts(split_dir):
    return {name: ad.read_h5ad(split_dir / f"{name}.h5ad") for name in PARTS}


@pytest.fixture(scope="session")
def pipeline(split_dir, parts, tmp_path_factory):
    """An untrained pipeline that says it was trained on the train part."""
    folder = tmp_path_factory.mktemp("pipeline")
    processor = SCRDiTProcessor.from_anndata(parts["train"], [KEY], flavor="all")
    torch.manual_seed(0)
    config = dict(num_genes=40, patch_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    model = SCRDiTTransformer(**config, num_classes=[3])
    SCRDiTPipeline(model, default_scheduler(), processor).save_pretrained(folder)
    record = {"dataset": str(split_dir / "train.h5ad"), "train_cells": parts["train"].n_obs, "val_cells": 0}
    (folder / "train_config.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="session")
def evaluation(evaluate, split_dir, pipeline, tmp_path_factory):
    """Folder of the results of the whole command with two seeds and one baseline."""
    folder = tmp_path_factory.mktemp("evaluation")
    arguments = ["--num_seeds", 2, "--baselines", "gaussian_copula", "--steps_curve", 4, 2, "--min_label_cells", 16]
    arguments += ["--num_inference_steps", 2, "--privacy"]
    evaluate("--split_dir", split_dir, "--pipeline", pipeline, "--output_dir", folder, *QUICK[:2], *arguments)
    return folder


@pytest.fixture(scope="session")
def record(evaluation):
    return json.loads((evaluation / "metrics.json").read_text())


@pytest.fixture(scope="session")
def html(evaluation):
    return (evaluation / "report.html").read_text(encoding="utf-8")
