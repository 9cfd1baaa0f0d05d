"""Network calls, quality and time of every scheduler on a trained pipeline, as a Markdown table.

    python training/benchmark_schedulers.py --pipeline my-model --split_dir split --output_dir outputs/schedulers

For each scheduler that samples the pipeline (`scrdit_diffusers.schedulers.SCHEDULERS`) and each number of network
calls, cells are generated with the labels of test cells. A scheduler needs as many calls as bring W2, the distance to
the test cells in 50 principal components of the training cells, within 1 % of the lowest of all. With that many, the
cells are judged as `training/evaluate.py` does; the last row is what other real cells reach. Time is that of the
processor, which other programs do not change. The same command goes on after an interruption.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import diffusers
import numpy as np
import pandas as pd
import torch

from scrdit_diffusers import SCRDiTPipeline
from scrdit_diffusers.metrics import EvaluationSpace, compare, nearest_neighbor_accuracy, wasserstein2
from scrdit_diffusers.schedulers import SCHEDULERS, check_scheduler

SAME = {"DDIMParallelScheduler": "DDIMScheduler", "DDPMParallelScheduler": "DDPMScheduler"}  # to the digit
COLUMNS = {
    "classifier_genes_auroc": "genes, AUROC",
    "classifier_pcs_auroc": "PCs, AUROC",
    "nearest_neighbor_accuracy": "1-NN",
    "w2": "W2",
    "library_size_ks": "library size, KS",
}


def usable_schedulers(pipe: SCRDiTPipeline) -> Iterator[diffusers.SchedulerMixin]:
    """Make every scheduler that can sample the pipeline."""
    for name in sorted(set(SCHEDULERS) - set(SAME)):
        try:
            scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
            check_scheduler(scheduler)
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            continue  # not to be made from this config, or refused
        yield scheduler


def needed(rows: list[dict], lowest: float) -> tuple[dict, bool]:
    """Choose the row of a scheduler with the fewest calls that suffice, or else the one with most; and if they do."""
    rows = sorted(rows, key=lambda row: row["calls"])
    enough = [row for row in rows if row["w2"] <= 1.01 * lowest]
    return (enough or rows[-1:])[0], bool(enough)


def main() -> None:
    """Generate, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--split_dir", required=True, help="train.h5ad, test.h5ad and control.h5ad")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 10, 25], help="numbers of network calls")
    parser.add_argument("--schedulers", nargs="+", help="names (default: all that can sample the pipeline)")
    parser.add_argument("--num_cells", type=int, default=400, help="of each set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_jobs", type=int, help="processes for the folds of the classifiers")
    parser.add_argument("--output_dir", default="outputs/schedulers", help="cells and figures")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    diffusers.utils.logging.set_verbosity_error()  # arguments of ours that a scheduler does not take

    pipe = SCRDiTPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    train, test, control = (ad.read_h5ad(f"{args.split_dir}/{name}.h5ad") for name in ("train", "test", "control"))
    num_cells = min(args.num_cells, test.n_obs, control.n_obs)
    rng = np.random.default_rng(args.seed)
    test, control = (cells[rng.choice(cells.n_obs, num_cells, replace=False)].copy() for cells in (test, control))
    value_space, genes = pipe.processor.value_space, pd.Index(pipe.processor.var_names)
    space = EvaluationSpace(train, value_space=value_space, seed=args.seed, var_names=genes)
    test_pcs = space.transform(test)

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"pipeline": args.pipeline, "split_dir": args.split_dir, "num_cells": num_cells, "seed": args.seed}
    output: dict = about | {"results": []}
    if (folder / "schedulers.json").is_file():
        output = json.loads((folder / "schedulers.json").read_text())
        if about != {name: output[name] for name in about}:
            sys.exit(f"error: --output_dir {folder} holds figures of other cells than {about}; give another.")

    def save() -> None:
        (folder / "schedulers.tmp").write_text(json.dumps(output, indent=2))
        os.replace(folder / "schedulers.tmp", folder / "schedulers.json")

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
            pcs = space.transform(cells)
            row |= {"w2": wasserstein2(pcs, test_pcs), "1-nn": nearest_neighbor_accuracy(pcs, test_pcs)}
            cells.write_h5ad(folder / f"{name}-{steps}.h5ad", compression="gzip")
            output["results"].append(row)
            save()
            print(row, flush=True)

    # 2. Judge the cells of the calls that are needed
    lowest = min(row["w2"] for row in output["results"])
    by_name: dict[str, list[dict]] = {}
    for row in output["results"]:
        by_name.setdefault(row["scheduler"], []).append(row)
    chosen = {name: needed(rows, lowest) for name, rows in by_name.items()}
    sets = {name: ad.read_h5ad(folder / f"{name}-{row['steps']}.h5ad") for name, (row, _) in chosen.items()}
    options = {"value_space": value_space, "seed": args.seed, "n_jobs": args.n_jobs}
    table = compare(test, sets, train, control, **options).set_index("metric")
    output["judged"] = table[[*sets, "ceiling"]].astype(float).to_dict()
    save()

    titles = ["scheduler", "calls needed", *COLUMNS.values(), "seconds per 1,000 cells"]
    print(f"\n| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for name, (row, enough) in chosen.items():
        calls = row["calls"] if enough else f"more than {row['calls']}"
        figures = [f"{table.loc[metric, name]:.{2 if metric == 'w2' else 3}f}" for metric in COLUMNS]
        print(f"| {name.removesuffix('Scheduler')} | {calls} | {' | '.join(figures)} | {row['seconds_per_1000']:.1f} |")
    figures = [f"{table.loc[metric, 'ceiling']:.{2 if metric == 'w2' else 3}f}" for metric in COLUMNS]
    print(f"| other real cells | | {' | '.join(figures)} | |")


if __name__ == "__main__":
    main()
