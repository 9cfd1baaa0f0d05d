"""How speed, memory and quality grow with the number of genes, beside scVI's in the same run.

    python training/benchmarks/growth.py --dataset pbmc_zheng_facs.h5ad --labels_key cell_type
    python training/benchmarks/growth.py --dataset pbmc_zheng_facs.h5ad --labels_key cell_type --parts speed

Both train and sample on the CPU. scVI is measured where scvi-tools is installed. Each row is a process of its own, and
results are saved as they come: the same command continues after an interruption, and draws what there is.

- Training: cells per second of an optimizer step of the default preset, and of an epoch of scVI. Random cells.
- Sampling: cells per second of a call of the pipeline, and of draws from scVI's prior, given labels. Random cells.
- Memory: the largest resident set of the process, which includes 0.6 to 0.7 GB of imported libraries. That of
  scVI's sampling has trained for an epoch.
- Quality: the default training on the train part (60%) of the dataset, with its most variable genes, judged by
  `evaluate.py` on the test part; and scVI's prior, trained and judged by the same command.
"""

import argparse
import json
import resource
import runpy
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib
import matplotlib.ticker
import numpy as np
import pandas as pd
import scipy.sparse as sp
import speed  # beside this file, as is the next
import torch
from _common import Record, printed_results, run_logged, to_markdown

from scrdit_diffusers.evaluation import baselines
from scrdit_diffusers.evaluation.plotting import PALETTE

matplotlib.use("Agg")
TRAINING = Path(__file__).resolve().parents[1]
COLORS = {"ours": PALETTE[1], "scVI": PALETTE[0], "real cells": "0.4"}
QUALITY = {
    "classifier_genes_auroc": "classifier on genes, AUROC",
    "classifier_pcs_auroc": "classifier on PCs, AUROC",
    "nearest_neighbor_accuracy": "1-NN accuracy",
}
SPEEDS = {"training": "training, cells per second", "sampling": "sampling, cells per second"}


# -- in a process of its own -------------------------------------------------------------------------------------------


def measure_ours(args) -> dict[str, float]:
    """Rate of a task of the default preset."""
    speed.NUM_GENES = args.num_genes[0]
    settings = argparse.Namespace(device="cpu", dtype=args.dtype, compile=False)
    if args.task == "training":
        return {"cells_per_second": speed.train_rate(speed.DEFAULT, args.batch_size, args.repeats, settings)[0]}
    settings.dtype = "float32"  # of the weights; the pipeline chooses that of the matmuls
    rate = speed.sample_rate(speed.DEFAULT, 4 * args.batch_size, None, args.repeats, settings)
    return {"cells_per_second": rate}


def measure_scvi(args) -> dict[str, float]:
    """Rate of a task of scVI: differences between two runs, so that what each run does once does not count."""
    import scvi

    speed.NUM_GENES = args.num_genes[0]
    labels = np.arange(10 * args.batch_size) % speed.NUM_LABELS
    obs = pd.DataFrame({"cell_type": labels.astype(str)}, index=[f"cell{i}" for i in range(len(labels))])
    cells = ad.AnnData(sp.csr_matrix(speed.make_counts(len(labels))), obs=obs)
    train, times = scvi.model.SCVI.train, []

    def train_timed(*args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        train(*args, **kwargs)
        times.append(time.perf_counter() - start)

    scvi.model.SCVI.train = train_timed

    def seconds(num_epochs: int, num_cells: int) -> float:
        """Time of a run for the task."""
        start, rng = time.perf_counter(), np.random.default_rng(0)
        wanted = obs.iloc[np.arange(num_cells) % len(obs)]
        baselines.scvi_prior(cells, wanted, "cell_type", rng, max_epochs=num_epochs)
        return times[-1] if args.task == "training" else time.perf_counter() - start - times[-1]

    few, many = args.batch_size, (1 + 8 * args.repeats) * args.batch_size
    if args.task == "training":
        spent = seconds(1 + args.repeats, few) - seconds(1, few)
        return {"cells_per_second": args.repeats * 0.9 * len(cells) / spent}  # it holds out a tenth
    spent = seconds(1, many) - seconds(1, few)
    return {"cells_per_second": (many - few) / spent}


def train(args) -> dict[str, float]:
    """Run train.py in this process."""
    start = time.monotonic()
    sys.argv = [str(TRAINING / "train.py"), *shlex.split(args.train_options)]
    runpy.run_path(sys.argv[0], run_name="__main__")
    config = json.loads((Path(args.output_dir) / "transformer/config.json").read_text())
    return {"seconds": time.monotonic() - start, "num_genes": config["num_genes"]}


MEASURES: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "ours": measure_ours,
    "scVI": measure_scvi,
    "train": train,
}


def measure(args) -> None:
    """Print what this process measures, and its memory."""
    found = MEASURES[args.measure](args)
    found["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


# -- rows --------------------------------------------------------------------------------------------------------------


def run_measurement(args, name: str, *words: object) -> dict[str, Any]:
    """Run this file in a process of its own; return what it found."""
    log = Path(args.output_dir) / "logs" / f"{name}.txt"
    options = ["--batch_size", args.batch_size, "--repeats", args.repeats, "--dtype", args.dtype]
    run_logged([sys.executable, __file__, *words, *options], log)
    return printed_results(log)


def evaluate(args, name: str, *words: object) -> None:
    """Run evaluate.py on the split of the dataset, or to split it."""
    folder = Path(args.output_dir)
    command = [sys.executable, TRAINING / "evaluate.py", "--split_dir", folder / "split", *words]
    run_logged(command, folder / "logs" / f"{name}.txt")


def train_with(args, num_genes: int) -> dict[str, Any]:
    """Train with the most variable genes, or all, by the defaults; continue what was interrupted."""
    folder = Path(args.output_dir)
    if not (folder / "split/split.json").exists():
        evaluate(args, "split", "--dataset", args.dataset, "--labels_key", args.labels_key)
    cells, model = folder / "split/train.h5ad", folder / f"pipeline-{num_genes}"
    all_genes = num_genes >= ad.read_h5ad(cells, backed="r").n_vars
    genes = ["--flavor", "all"] if all_genes else ["--n_top_genes", num_genes]
    words = ["--dataset", cells, "--labels_key", args.labels_key, "--output_dir", model, *genes, "--report_to", "none"]
    words += ["--resume_from_checkpoint", "latest", *shlex.split(args.train_options)]
    options = ["--train_options", shlex.join(map(str, words)), "--output_dir", model]
    return run_measurement(args, f"train {num_genes}", "--measure", "train", *options)


def judge(args, num_genes: int) -> dict[str, Any]:
    """Compare the cells of what was trained, and those of scVI, with real ones."""
    folder = Path(args.output_dir)
    judged = ["--pipeline", folder / f"pipeline-{num_genes}", "--output_dir", folder / f"evaluation-{num_genes}"]
    judged += ["--overwrite", "--baselines", "scvi_prior" if find_spec("scvi") else "none", "--steps_curve", 0]
    judged += ["--min_label_cells", sys.maxsize, "--num_seeds", args.num_seeds]
    evaluate(args, f"evaluation {num_genes}", *judged, *shlex.split(args.evaluate_options))
    rows = json.loads((folder / f"evaluation-{num_genes}/metrics.json").read_text())["rows"]
    names = {"value": "ours", "scvi_prior": "scVI", "ceiling": "real cells"}
    return {
        row["metric"]: {method: row[name] for name, method in names.items() if name in row}
        for row in rows
        if row["group"] == "all"
    }


def measure_rows(args, record: Record) -> None:
    """Measure what the record lacks, from few to many genes."""
    methods = ["ours", *(["scVI"] if find_spec("scvi") else [])]
    for num_genes in sorted(args.num_genes):
        measures: dict[str, Callable[[], dict[str, Any]]] = {}
        if "speed" in args.parts:
            for method in methods:
                for task in SPEEDS:
                    words = ["--measure", method, "--task", task, "--num_genes", num_genes]
                    name = f"{method} {task} {num_genes}"
                    measures[name] = partial(run_measurement, args, name, *words)
        if "quality" in args.parts:
            measures[f"train {num_genes}"] = partial(train_with, args, num_genes)
            measures[f"quality {num_genes}"] = partial(judge, args, num_genes)
        for name, call in measures.items():
            if name not in record["rows"]:
                record["rows"][name] = call()
                record.save()
                print(f"{name}: {json.dumps(record['rows'][name])[:160]}", flush=True)


def tabulate(rows: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row for each method, figure and number of genes: `method`, `figure`, `genes`, `value`."""
    lines = []
    for name, row in rows.items():
        what, number = name.rsplit(" ", 1)
        if what == "quality":
            for metric, title in QUALITY.items():
                lines += [(method, title, int(number), value) for method, value in row[metric].items()]
        elif what == "train":
            lines.append(("ours", "train.py, memory in MB", int(number), row["megabytes"]))
        else:
            method, task = what.split(" ")
            lines.append((method, SPEEDS[task], int(number), row["cells_per_second"]))
            lines.append((method, f"{task}, memory in MB", int(number), row["megabytes"]))
    return pd.DataFrame(lines, columns=["method", "figure", "genes", "value"])


def format_table(table: pd.DataFrame) -> str:
    """Format the figures: one line for each and method, one column for each number of genes."""
    wide = table.pivot_table(index=["figure", "method"], columns="genes", values="value", sort=False)
    lines = []
    for (figure, method), values in wide.iterrows():
        texts = ["" if np.isnan(x) else f"{x:,.0f}" if x >= 10 else f"{x:.3f}" for x in values]
        lines.append([figure, method, *texts])
    return to_markdown(["", "", *(f"{number:,} genes" for number in wide.columns)], lines)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw each figure against the number of genes, a line for each method."""
    panels = list(dict.fromkeys(table["figure"]))
    columns = (len(panels) + 1) // 2
    figure, axes = matplotlib.pyplot.subplots(2, columns, figsize=(3.4 * columns, 5.6), layout="constrained")
    for axis, panel in zip(np.ravel(axes), panels, strict=False):
        shown = table[table["figure"] == panel].sort_values("genes")
        for method, rows in shown.groupby("method", sort=False):
            style = "--" if method == "real cells" else "-"
            axis.plot(rows["genes"], rows["value"], c=COLORS[method], ls=style, marker="o", ms=4, label=method)
        axis.set_xscale("log")
        axis.set_xticks(sorted(set(shown["genes"])), [f"{number:,}" for number in sorted(set(shown["genes"]))])
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        if panel in SPEEDS.values():
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        if panel not in QUALITY.values():
            axis.yaxis.set_major_formatter("{x:,.0f}")
        if "memory" in panel:
            axis.set_ylim(0)
        axis.set(xlabel="genes", title=panel)
        axis.title.set_size("medium")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small")
    for axis in np.ravel(axes)[len(panels) :]:
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    matplotlib.pyplot.close(figure)


def main() -> None:
    """Measure what is missing, print the table, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="cells with counts, for the quality")
    parser.add_argument("--labels_key", default="cell_type")
    parser.add_argument("--num_genes", type=int, nargs="+", default=[500, 2000, 8000, 16791])
    parser.add_argument("--parts", nargs="+", default=["speed", "quality"], choices=["speed", "quality"])
    parser.add_argument(
        "--batch_size", type=int, default=128, help="cells per training step; sampling takes four times"
    )
    parser.add_argument("--repeats", type=int, default=5, help="steps and calls, of which the fastest counts; epochs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of training")
    parser.add_argument("--train_options", default="", help="further arguments of train.py, in quotes")
    parser.add_argument("--evaluate_options", default="", help="further arguments of evaluate.py, in quotes")
    parser.add_argument("--num_seeds", type=int, default=1, help="of the evaluation")
    parser.add_argument("--output_dir", default="outputs/growth", help="folder of growth.json, pipelines and logs")
    parser.add_argument("--figure", help="PNG to write; growth.png in the folder if not given")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=SPEEDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if args.measure:
        measure(args)
        return
    if "quality" in args.parts and not args.dataset:
        parser.error("quality needs --dataset; without one give --parts speed.")
    may_change = ("num_genes", "parts", "output_dir", "figure", "measure", "task")
    fixed = {name: value for name, value in vars(args).items() if name not in may_change}
    fixed["threads"] = torch.get_num_threads()
    record = Record(Path(args.output_dir) / "growth.json", fixed, rows={})
    measure_rows(args, record)
    table = tabulate(record["rows"])
    print(f"\n{format_table(table)}")
    draw(table, Path(args.figure or Path(args.output_dir) / "growth.png"))


if __name__ == "__main__":
    main()
