"""The whole workflow on real cells: prepare, train, save, load, generate, compare. All output goes to outputs/demo.

The cells are the 700 blood cells (765 genes, 10 labels) that come with scanpy: 60 % for training, 20 % as a control
that shows what other real cells reach, and 20 % as test cells, whose labels the generated cells take.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import matplotlib
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scrdit_diffusers import SCRDiTPipeline, split_cells
from scrdit_diffusers.atomic import write_atomically
from scrdit_diffusers.evaluation import baselines, plotting
from scrdit_diffusers.evaluation.compare import compare

matplotlib.use("Agg")
OUTPUT = Path("outputs/demo")
LABELS_KEY = "cell_type"
UMAP_COLORS = {"origin": "origin", "labels": LABELS_KEY}


def pbmc68k_counts() -> ad.AnnData:
    """Load scanpy's embedded cells and recover their counts.

    `raw` holds log1p(count x s) with an unknown factor s per cell, whose smallest positive value is that of one count.
    """
    cells = sc.datasets.pbmc68k_reduced()
    values = np.expm1(cells.raw.X.toarray())
    one_count = np.where(values > 0, values, np.inf).min(axis=1, keepdims=True)
    counts = sp.csr_matrix(np.rint(values / one_count), dtype=np.float32)
    return ad.AnnData(
        counts, obs=cells.obs[["bulk_labels"]].rename(columns={"bulk_labels": LABELS_KEY}), var=cells.raw.var[[]]
    )


def run(*command: str) -> None:
    """Run a command as a user would, and show it."""
    print("\n$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    """Run the whole workflow."""
    argparse.ArgumentParser(description=__doc__).parse_args()  # has no arguments but --help
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    cells = pbmc68k_counts()
    rest, test = split_cells(cells, [LABELS_KEY], 0.2, seed=0)
    train, control = split_cells(cells[rest], [LABELS_KEY], 0.25, seed=0)
    train, control, test = cells[rest][train].copy(), cells[rest][control].copy(), cells[test].copy()
    train.write_h5ad(OUTPUT / "train.h5ad")
    print(f"{train.n_obs} training, {control.n_obs} control and {test.n_obs} test cells, {cells.n_vars} genes")

    # 1. Train
    pipeline_folder = OUTPUT / "pipeline"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    arguments = ["--dataset", str(OUTPUT / "train.h5ad"), "--labels_key", LABELS_KEY]
    arguments += ["--output_dir", str(pipeline_folder)]
    run(*accelerate, str(Path(__file__).with_name("train.py")), *arguments)

    # 2. Load, and generate as many cells as there are test cells, with their labels
    pipe = SCRDiTPipeline.from_pretrained(pipeline_folder)
    synthetic = pipe(obs=test.obs, generator=torch.Generator().manual_seed(0)).adata
    synthetic.write_h5ad(OUTPUT / "cells.h5ad")
    print(synthetic)

    # 3. Compare
    test, train, control = (part[:, pipe.processor.var_names].copy() for part in (test, train, control))
    table = compare(test, synthetic, train, control, labels_key=LABELS_KEY)
    copula = baselines.gaussian_copula(train, test.obs, LABELS_KEY, np.random.default_rng(0))
    table["copula"] = compare(test, copula, train, labels_key=LABELS_KEY)["value"]
    with write_atomically(OUTPUT / "metrics.json") as temporary:
        temporary.write_text(json.dumps(table.to_dict(orient="records"), indent=2))
    draw(test, synthetic, train, pipeline_folder)

    shown = table[table["group"] == "all"].set_index("metric")[["value", "ceiling", "copula", "aim"]]
    with pd.option_context("display.width", 200, "display.max_columns", None, "display.max_rows", None):
        print(
            "\nGenerated cells (value) against test cells, beside what other real cells reach (ceiling) and what a"
            "\nGaussian copula of each label reaches (copula):\n"
        )
        print(shown.round(3))
    print(f"\nEverything lies in {OUTPUT}:")
    for name, meaning in {
        "pipeline/": "the trained pipeline: SCRDiTPipeline.from_pretrained takes this folder",
        "cells.h5ad": "the generated cells: counts, labels, provenance in uns['scrdit']",
        "metrics.json": "the table above and its rows by label",
        "umap_origin.png": "real and generated cells should mix",
        "umap_labels.png": "a label should lie at the same place, real or generated",
        "genes.png": "points should lie on the diagonal",
        "cells.png": "the distributions should coincide",
        "loss.png": "the training loss should fall",
    }.items():
        print(f"  {name:16} {meaning}")
    print(
        "\nGo on with your own cells:\n"
        "  scrdit train --dataset cells.h5ad --labels_key cell_type --output_dir my-model\n"
        "  scrdit generate --pipeline my-model --num_cells 1000 --output new_cells.h5ad\n"
        "or generate from the pipeline that comes with the repository: SCRDiTPipeline.from_pretrained"
        '("hub_cards/scrdit-pbmc-zheng"). README.md has more.'
    )


def draw(real: ad.AnnData, synthetic: ad.AnnData, train: ad.AnnData, pipeline_folder: Path) -> None:
    """Write the figures."""
    embedding = plotting.joint_umap(real, synthetic, train, labels_key=LABELS_KEY)
    figures = {f"umap_{name}": plotting.umap(embedding, key) for name, key in UMAP_COLORS.items()}
    figures["genes"] = plotting.gene_statistics(real, synthetic)
    figures["cells"] = plotting.library_size_histogram(real, synthetic)
    events = EventAccumulator(str(next((pipeline_folder / "logs").glob("*/")))).Reload()
    losses = events.Scalars("train_loss")
    figures["loss"] = plotting.loss_curve([event.step for event in losses], [event.value for event in losses])
    for name, axes in figures.items():
        np.ravel(axes)[0].figure.savefig(OUTPUT / f"{name}.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
