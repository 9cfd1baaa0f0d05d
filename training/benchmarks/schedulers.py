"""Network calls, quality and time of every scheduler on a trained pipeline, as a Markdown table.

    python training/benchmarks/schedulers.py --pipeline my-model --split_dir split --output_dir outputs/schedulers

For each scheduler that samples the pipeline (`scrdit_diffusers.schedulers.SCHEDULERS`) and each number of network
calls, cells are generated with the labels of test cells, and evaluated as `training/evaluate.py` does; the last row
is what other real cells reach. "Calls needed" is the smallest number that brings the mean of the two classifiers'
AUROCs within 0.02 of the lowest of all. (A distance such as W2 would mislead: with few calls cells are too much alike,
hence near.) Times are CPU seconds, which other programs hardly change. The same command continues after an
interruption.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import anndata as ad
import diffusers
import numpy as np
import pandas as pd
import torch
from _common import Record, to_markdown

from scrdit_diffusers import SCRDiTPipeline
from scrdit_diffusers.evaluation.compare import compare
from scrdit_diffusers.schedulers import SCHEDULERS, check_scheduler

SAME = {"DDIMParallelScheduler": "DDIMScheduler", "DDPMParallelScheduler": "DDPMScheduler"}  # to the digit
COLUMNS = {
    "classifier_genes_auroc": "genes, AUROC",
    "classifier_pcs_auroc": "PCs, AUROC",
    "nearest_neighbor_accuracy": "1-NN",
    "library_size_ks": "library size, KS",
}
CLASSIFIERS = ["classifier_genes_auroc", "classifier_pcs_auroc"]
TOLERANCE = 0.02  # of the mean of both, about the noise of one generation seed


def usable_schedulers(pipe: SCRDiTPipeline) -> Iterator[diffusers.SchedulerMixin]:
    """Make every scheduler that can sample the pipeline."""
    for name in sorted(set(SCHEDULERS) - set(SAME)):
        try:
            scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
            check_scheduler(scheduler)
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            continue  # cannot be made from this config, or is refused
        yield scheduler


def format_table(results: pd.DataFrame, real: Mapping[str, float]) -> str:
    """Format `results`, one row per scheduler, and what `real` cells reach."""
    mean = results[CLASSIFIERS].mean(axis=1)
    enough = results[mean <= mean.min() + TOLERANCE].groupby("scheduler")["calls"].min()
    steps = sorted(results["steps"].unique())
    titles = [f"{title}, {' / '.join(map(str, steps))} calls" for title in COLUMNS.values()]
    titles = ["scheduler", "calls needed", *titles, "CPU s per 1,000 cells"]
    lines = []
    for name, rows in results.set_index("steps").groupby("scheduler"):
        rows = rows.reindex(steps)
        cells = [str(name).removesuffix("Scheduler"), str(enough.get(name, f"more than {rows['calls'].max():.0f}"))]
        for metric, digits in [*((metric, 3) for metric in COLUMNS), ("seconds_per_1000", 1)]:
            cells.append(" / ".join("–" if pd.isna(value) else f"{value:.{digits}f}" for value in rows[metric]))
        lines.append(cells)
    lines.append(["other real cells", "", *(f"{real[metric]:.3f}" for metric in COLUMNS), ""])
    return to_markdown(titles, lines)


def main() -> None:
    """Generate, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--split_dir", required=True, help="train.h5ad, test.h5ad and control.h5ad")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 10, 25], help="numbers of network calls")
    parser.add_argument("--schedulers", nargs="+", help="names (default: all that can sample the pipeline)")
    parser.add_argument("--num_cells", type=int, default=400, help="number of cells of each set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_jobs", type=int, help="processes for the folds of the classifiers")
    parser.add_argument("--output_dir", default="outputs/schedulers", help="folder of cells and results")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    diffusers.utils.logging.set_verbosity_error()  # about arguments that a scheduler does not take

    pipe = SCRDiTPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    train, test, control = (ad.read_h5ad(f"{args.split_dir}/{name}.h5ad") for name in ("train", "test", "control"))
    num_cells = min(args.num_cells, test.n_obs, control.n_obs)
    rng = np.random.default_rng(args.seed)
    test, control = (cells[rng.choice(cells.n_obs, num_cells, replace=False)].copy() for cells in (test, control))

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"pipeline": args.pipeline, "split_dir": args.split_dir, "num_cells": num_cells, "seed": args.seed}
    try:
        output = Record(folder / "schedulers.json", about, results=[])
    except ValueError as error:
        sys.exit(f"error: {error}")

    # 1. Generate
    for scheduler in usable_schedulers(pipe):
        name = type(scheduler).__name__
        if args.schedulers and name not in args.schedulers:
            continue
        pipe.scheduler = scheduler
        for steps in args.calls:
            if any((row["scheduler"], row["steps"]) == (name, steps) for row in output["results"]):
                continue
            start = time.process_time()
            generator = torch.Generator().manual_seed(args.seed)
            cells = pipe(obs=test.obs, num_inference_steps=steps, generator=generator).adata
            row = {"scheduler": name, "steps": steps, "calls": pipe.num_timesteps}
            row["seconds_per_1000"] = 1000 * (time.process_time() - start) / num_cells
            cells.write_h5ad(folder / f"{name}-{steps}.h5ad", compression="gzip")
            output["results"].append(row)
            output.save()
            print(row, flush=True)

    # 2. Evaluate
    evaluated = output.setdefault("evaluated", {})
    for row in output["results"]:
        name = f"{row['scheduler']}-{row['steps']}"
        if name not in evaluated:
            cells = ad.read_h5ad(folder / f"{name}.h5ad")
            options = {"value_space": pipe.processor.value_space, "seed": args.seed, "n_jobs": args.n_jobs}
            table = compare(test, cells, train, None if evaluated else control, **options).set_index("metric")
            evaluated |= {name: table["value"].astype(float).to_dict()}
            if "ceiling" in table and "real" not in evaluated:
                evaluated["real"] = table["ceiling"].astype(float).to_dict()
            output.save()
        row |= evaluated[name]

    print("\n" + format_table(pd.DataFrame(output["results"]), evaluated["real"]))


if __name__ == "__main__":
    main()
