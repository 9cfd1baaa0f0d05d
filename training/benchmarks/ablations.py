"""What each choice of the defaults is worth: one change of train.py at a time, every model evaluated alike.

    python training/benchmarks/ablations.py --dataset pbmc_zheng_facs.h5ad --labels_key cell_type

Cells are split 60 / 20 / 20 into train, control and test. Each row of `ROWS` trains with the same passes over the same
cells and genes, generates the labels of the test cells, and is evaluated in log1p of counts per 10,000, so that models
of counts and of log-normalized values can be compared. The second row is the first with another training
seed: differences of that size mean nothing. Results are written as they come, and the same command continues after an
interruption.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from _common import Record, to_markdown
from acceleration import TRAINING, Sampler, Trained, log_normalized, prepare_cells
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.stats import zscore
from transformers import HfArgumentParser

from scrdit_diffusers.atomic import write_atomically
from scrdit_diffusers.evaluation.compare import compare

LOG = "--value_space log_normalized --target_sum 1e4 --decode round"
# Name of each change and its flags for train.py. Compare rounded and log-normalized rows with the first of their kind.
ROWS = {
    "default": "",
    "another seed of training": "--seed 1",
    "no prior of the log fold changes": "--prior_std 1000",
    "no token that reads all genes": "--num_cell_tokens 0",
    "two tokens that read all genes": "--num_cell_tokens 2",
    "50 genes in a token": "--patch_size 50",
    "200 genes in a token": "--patch_size 200",
    "shared embedding": "--patch_embed_type shared",
    "genes in random order": "",
    "genes next to those they vary with": "",
    "one block": "--num_layers 1",
    "four blocks": "--num_layers 4",
    "half the width": "--num_attention_heads 2",
    "twice the width": "--num_attention_heads 8",
    "dropout": "--dropout 0.1",
    "no average of the weights": "--use_ema False",
    "linear noise schedule, as noisy where decoded": "--beta_schedule linear --decode_timestep 100 --min_timestep 100",
    "decoded at more noise": "--decode_timestep 500 --min_timestep 500",
    "counts rounded": "--decode round",
    "counts rounded, zero negation": "--decode round --zero_negation True",
    "counts rounded, v prediction": "--decode round --prediction_type v_prediction",
    "counts rounded, epsilon prediction": "--decode round --prediction_type epsilon",
    "log-normalized": LOG,
    "log-normalized, zero negation": f"{LOG} --zero_negation True",
    "log-normalized, zero negation, not scaled": f"{LOG} --zero_negation True --standardize False",
    "one model per label": "",
}
PER_LABEL = "one model per label"
GENE_ORDERS = {"genes in random order": "genes-random.txt", "genes next to those they vary with": "genes-modules.txt"}
SHOWN = {
    "classifier_genes_auroc": "genes",
    "classifier_pcs_auroc": "PCs",
    "nearest_neighbor_accuracy": "1-NN",
    "w2": "W2",
    "gene_zero_fraction_mae": "zero fraction error",
    "genes_detected_ks": "genes detected, KS",
    "gene_gene_r": "gene-gene r",
    "label_accuracy": "label accuracy",
    "share_nearer_to_train": "nearer to train",
}


@dataclass
class AblationArguments:
    """Command-line arguments."""

    dataset: str = field(metadata={"help": "Cells with counts: .h5ad, .zarr, dataset folder or Hub id."})
    labels_key: str = field(metadata={"help": "Column of obs with the cell types."})
    labels: list[str] = field(default_factory=list, metadata={"help": "Cell types to use; all if not given."})
    layer: str | None = field(default=None, metadata={"help": "Layer that holds the counts; X if not given."})
    n_top_genes: int = field(default=500, metadata={"help": "Highly variable genes, the same for all models."})
    num_train_epochs: int = field(default=50, metadata={"help": "Passes over the cells, of each row."})
    lr_warmup_steps: int = field(default=50, metadata={"help": "Warm-up steps, of each row."})
    num_inference_steps: int = field(default=25, metadata={"help": "Network calls per cell."})
    num_seeds: int = field(default=1, metadata={"help": "Seeds of noise and evaluation; the table shows means."})
    seed: int = field(default=0, metadata={"help": "Seed of split and training, and the first of the others."})
    rows: list[str] = field(default_factory=list, metadata={"help": "Rows to run; all if not given.", "choices": ROWS})
    output_dir: str = field(default="outputs/ablations", metadata={"help": "Folder of cells and results."})


def write_gene_orders(cells: Path, seed: int) -> None:
    """Write the genes in random order, and in leaf order of a tree of their correlations (Ward)."""
    train = log_normalized(ad.read_h5ad(cells / "train.h5ad"))
    orders = {
        "genes-random.txt": np.random.default_rng(seed).permutation(train.n_vars),
        "genes-modules.txt": leaves_list(linkage(zscore(train.X.toarray()).T, method="ward")),
    }
    for name, order in orders.items():
        (cells / name).write_text("\n".join(train.var_names[order]))


def train_model(args: AblationArguments, name: str, cells: Path, labels: list[str], output_dir: Path) -> Trained:
    """Train a row with the commands that a user would run."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["accelerate", "launch", "--num_processes", "1", str(TRAINING / "train.py")]
    command += [
        "--genes",
        str(cells / GENE_ORDERS.get(name, "genes.txt")),
        "--num_train_epochs",
        str(args.num_train_epochs),
    ]
    command += ["--lr_warmup_steps", str(args.lr_warmup_steps), "--validation_steps", "1000000"]
    row = ROWS[name].split()
    command += ["--report_to", "none", *row, *([] if "--seed" in row else ["--seed", str(args.seed)])]
    if name == PER_LABEL:
        runs = {label: ["--dataset", str(cells / f"train-{i}.h5ad")] for i, label in enumerate(labels)}
    else:
        runs = {None: ["--dataset", str(cells / "train.h5ad"), "--labels_key", args.labels_key]}
    folders = {label: output_dir / str(i) for i, label in enumerate(runs)}
    for label, arguments in runs.items():
        subprocess.run([*command, *arguments, "--output_dir", str(folders[label])], check=True, env=environment)
    return Trained.load(folders)


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format means over seeds; real cells first, then the rows in order."""
    table = pd.json_normalize(rows).groupby("name").mean(numeric_only=True)
    lines = []
    for name in ("real cells", *ROWS):
        if name in table.index:
            values = [f"{table.loc[name, f'metrics.{metric}']:.3g}" for metric in SHOWN]
            change = f"`{ROWS[name]}`" if ROWS.get(name) else ""
            lines.append([name, change, *values])
    return to_markdown(["", "change", *SHOWN.values()], lines)


def main(args: AblationArguments) -> None:
    """Train and evaluate what is missing, print the table."""
    folder = Path(args.output_dir)
    fixed = {name: value for name, value in asdict(args).items() if name not in ("rows", "output_dir")}
    record = Record(folder / "ablations.json", fixed, rows=[])
    if not (folder / "cells").exists():
        with write_atomically(folder / "cells") as temporary:
            prepare_cells(args, temporary)
            write_gene_orders(temporary, args.seed)
    labels = json.loads((folder / "cells/labels.json").read_text())
    parts = {name: ad.read_h5ad(folder / f"cells/{name}.h5ad") for name in ("train", "control", "test")}
    evaluated = {name: log_normalized(part) for name, part in parts.items()}
    done = {row["name"] for row in record["rows"]}

    def evaluate(name: str, seed: int, cells: ad.AnnData) -> dict[str, Any]:
        options = {"labels_key": args.labels_key, "value_space": "log_normalized", "seed": seed}
        options["min_label_cells"] = sys.maxsize  # no metrics of single labels, which take most of the time
        table = compare(evaluated["test"], cells, evaluated["train"], **options)
        metrics = table.set_index("metric")["value"].dropna().to_dict()
        print(f"{name}, seed {seed}: {metrics['classifier_genes_auroc']:.3f}", flush=True)
        return {"name": name, "seed": seed, "metrics": metrics}

    for name in ("real cells", *(args.rows or ROWS)):
        if name in done:
            continue
        seeds = range(args.seed, args.seed + args.num_seeds)
        if name == "real cells":
            record["rows"] += [evaluate(name, seed, evaluated["control"]) for seed in seeds]
        else:
            shutil.rmtree(folder / "model", ignore_errors=True)  # of a row that was interrupted
            trained = train_model(args, name, folder / "cells", labels, folder / "model")
            sampler = Sampler("default", "UniPC", "UniPCMultistepScheduler", ())
            options = (args.num_inference_steps, parts["test"].obs, args.labels_key, 512)
            for seed in seeds:
                cells, _ = trained.generate(sampler, *options, seed)
                record["rows"].append(evaluate(name, seed, cells))
        record.save()
    print(format_table(record["rows"]))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        main(HfArgumentParser(AblationArguments).parse_args_into_dataclasses()[0])
    except (TypeError, ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
