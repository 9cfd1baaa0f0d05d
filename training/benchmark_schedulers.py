"""Network calls, quality and time of every scheduler on a trained pipeline, as a Markdown table.

    python training/benchmark_schedulers.py --pipeline my-model \
        --train split/train.h5ad --real split/test.h5ad --control split/control.h5ad

For each scheduler that samples the pipeline (`scrdit_diffusers.schedulers.SCHEDULERS`) and each number of network
calls, cells are generated with the labels of real ones that the model did not see. Quality is the distance W2 to these
in 50 principal components of the training cells, and the AUROC of a random forest there that tells the two apart; the
last row is what other real cells reach. A scheduler needs as many calls as bring W2 within 1 % of the lowest of all.
Time is that of the processor, which other programs do not change.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import diffusers
import numpy as np
import pandas as pd
import torch
from sklearn.ensemble import RandomForestClassifier

from scrdit_diffusers import SCRDiTPipeline
from scrdit_diffusers.metrics import EvaluationSpace, classifier_auroc, wasserstein2
from scrdit_diffusers.schedulers import SCHEDULERS, check_scheduler


def usable_schedulers(pipe: SCRDiTPipeline) -> Iterator[diffusers.SchedulerMixin]:
    """Make every scheduler that can sample the pipeline."""
    for name in sorted(SCHEDULERS):
        try:
            scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
            check_scheduler(scheduler)
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            continue  # not to be made from this config, or refused
        yield scheduler


def main() -> None:
    """Generate, measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--train", required=True, help="training cells: the principal components are theirs")
    parser.add_argument("--real", required=True, help="real cells that the model did not see, with its labels in obs")
    parser.add_argument("--control", required=True, help="other real cells that it did not see")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 10, 25], help="numbers of network calls")
    parser.add_argument("--schedulers", nargs="+", help="names (default: all that can sample the pipeline)")
    parser.add_argument("--num_cells", type=int, default=400, help="of each set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="outputs/schedulers.json")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    diffusers.utils.logging.set_verbosity_error()  # arguments of ours that a scheduler does not take

    pipe = SCRDiTPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    train, real, control = (ad.read_h5ad(path) for path in (args.train, args.real, args.control))
    num_cells = min(args.num_cells, real.n_obs, control.n_obs)
    rng = np.random.default_rng(args.seed)
    real, control = (cells[rng.choice(cells.n_obs, num_cells, replace=False)].copy() for cells in (real, control))
    genes = pd.Index(pipe.processor.var_names)
    space = EvaluationSpace(train, value_space=pipe.processor.value_space, seed=args.seed, var_names=genes)
    real_pcs = space.transform(real)

    def judge(cells: ad.AnnData) -> dict[str, float]:
        pcs = space.transform(cells)
        forest = RandomForestClassifier(200, random_state=args.seed)
        return {"w2": wasserstein2(pcs, real_pcs), "auroc": classifier_auroc(pcs, real_pcs, forest, args.seed)}

    results = []
    for scheduler in usable_schedulers(pipe):
        name = type(scheduler).__name__
        if args.schedulers and name not in args.schedulers:
            continue
        pipe.scheduler = scheduler
        for calls in args.calls:
            start = time.process_time()
            generator = torch.Generator().manual_seed(args.seed)
            cells = pipe(obs=real.obs, num_inference_steps=calls, generator=generator).adata
            seconds = 1000 * (time.process_time() - start) / num_cells
            results.append({"scheduler": name, "calls": calls, "seconds_per_1000": seconds} | judge(cells))
            print(results[-1], flush=True)
    ceiling = judge(control)
    output = {"num_cells": num_cells, "seed": args.seed, "results": results, "ceiling": ceiling}
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(output, indent=2))

    lowest = min(row["w2"] for row in results)
    print("\n| scheduler | calls needed | W2 | AUROC | seconds per 1,000 cells |\n| --- | --- | --- | --- | --- |")
    for name in dict.fromkeys(row["scheduler"] for row in results):
        rows = sorted((row for row in results if row["scheduler"] == name), key=lambda row: row["calls"])
        row = next((row for row in rows if row["w2"] <= 1.01 * lowest), None)
        calls = row["calls"] if row else f"more than {rows[-1]['calls']}"
        row = row or rows[-1]
        figures = f"{row['w2']:.2f} | {row['auroc']:.2f} | {row['seconds_per_1000']:.1f}"
        print(f"| {name.removesuffix('Scheduler')} | {calls} | {figures} |")
    print(f"| other real cells | | {ceiling['w2']:.2f} | {ceiling['auroc']:.2f} | |")


if __name__ == "__main__":
    main()
