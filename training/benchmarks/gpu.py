"""What one GPU does in ten minutes, as one JSON file: `outputs/gpu/gpu.json`.

    python training/benchmarks/gpu.py --dataset pbmc_multi_19k.h5ad --labels_key cell_type_coarse
    python training/benchmarks/gpu.py --miniature --device cpu      # the same in small, without a GPU

Rows, in the order of measurement; each is a process of its own and is saved before the next begins:

- `matmul`: the rate of a large matmul in bfloat16, of which the shares below are parts.
- `loader`: batches in model space from the dataset alone, with several numbers of worker processes.
- `PRESET, N genes`: training (one optimizer step) and sampling (a call of the pipeline) of random cells in bfloat16.
- `training`: `train.py` on all genes of the dataset in bfloat16, for `--train_seconds`: as many steps as the rate of a
  short run before promises.
- `evaluation`: `evaluate.py` on what was trained.
- `PRESET, N genes, compiled`: the same with `torch.compile`; the first step or call, which compiles, does not count.

As many cells at a time as fit: `--batch_size`, halved until memory suffices. What fails has its `error` in its row, and
the others go on; delete the row to try it again. What would take longer than `--max_seconds` is `"skipped": "time"`,
and the same command measures it when it is run again. All that a process says is kept in `logs`.
"""

import argparse
import gc
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import speed  # beside this file, as are the next two
import torch
from _common import Record, printed_results, run_logged, to_markdown
from measuring import Clock, PeakMemory

from scrdit_diffusers import CellBatches, CellCollator, CellDataset, fit_dataset
from scrdit_diffusers.atomic import write_atomically
from scrdit_diffusers.schedulers import FAST_TIMESTEPS

TRAINING = Path(__file__).resolve().parents[1]
LABELS_KEY = "cell_type"  # of made cells
DEVICES = ("cpu", "cuda", "xpu")  # whose peak of memory PyTorch tells
TASKS = ("sampling", "training")
SKIPPED = {"skipped": "time"}
# Seconds without which a measurement does not begin: start of a process, compilation.
START, COMPILATION = 15, 60
JUDGEMENT = 90
MINIATURE: dict[str, Any] = {
    "presets": ["scrdit-s"],
    "num_genes": [40],
    "batch_size": 8,
    "repeats": 1,
    "matmul_size": 64,
    "num_workers": [0],
    "loader_seconds": 0.1,
    "made_cells": 100,
    "train_preset": "scrdit-s",
    "train_options": "--patch_size 8 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8",
    "train_batch_size": 16,
    "train_seconds": 1,
    "calibration_steps": 10,
    "evaluate_options": "--num_inference_steps 2 --n_jobs 1",
}


# -- in a process of its own -------------------------------------------------------------------------------------------


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """Fill in the largest memory within the block, in MB: of the accelerator, or of the process beyond its start."""
    found: dict[str, float] = {}
    if device == "cpu":
        with PeakMemory() as memory:
            yield found
        found["megabytes"] = memory.megabytes
    else:
        accelerator = torch.get_device_module(device)
        accelerator.reset_peak_memory_stats()
        yield found
        found["megabytes"] = accelerator.max_memory_allocated() / 2**20


def halve_until_it_fits(measure: Callable[[int], dict[str, float]], batch_size: int, device: str) -> dict[str, float]:
    """Measure with as many cells at a time as memory allows; return the result, their number and the peak of memory."""
    while True:
        try:
            with peak_memory(device) as memory:
                found = measure(batch_size)
            return found | memory | {"batch_size": batch_size}
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        # After the block, in which the error still holds the tensors.
        gc.collect()
        torch.compiler.reset()
        if device != "cpu":
            torch.get_device_module(device).empty_cache()
        batch_size //= 2


def measure_speed(args) -> None:
    """Print the rates of sampling and training of a preset; the first cannot fail for what the second has left."""
    speed.NUM_GENES = args.num_genes[0]
    settings = argparse.Namespace(device=args.device, dtype="bfloat16", compile=args.compile)
    pipe = speed.make_pipeline(args.presets[0], args.device, torch.float32)

    def sample(batch_size: int) -> dict[str, float]:
        rate = speed.time_sampling(pipe, batch_size, None, args.repeats, settings)
        flops = pipe.transformer.flops_per_cell() * len(FAST_TIMESTEPS)
        return {"cells_per_second": rate, "flops_per_second": rate * flops}

    def train(batch_size: int) -> dict[str, float]:
        rate, flops = speed.time_training(pipe, batch_size, args.repeats, settings)
        return {"cells_per_second": rate, "flops_per_second": flops}

    for task, measure in zip(TASKS, (sample, train), strict=True):
        start = time.monotonic()
        try:
            found: dict[str, Any] = halve_until_it_fits(measure, args.batch_size, args.device)
            found["seconds"] = time.monotonic() - start
        except Exception as error:
            logging.exception(task)  # compilers raise errors of all kinds; the other task goes on
            found = {"error": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps({task: found}), flush=True)


def measure_matmul(args) -> None:
    """Print the FLOP/s of a square matmul in bfloat16, and what computes it."""
    a, b = torch.randn(2, args.matmul_size, args.matmul_size, device=args.device, dtype=torch.bfloat16)
    rate = 2 * args.matmul_size**3 / speed.seconds(lambda: a @ b, 20, args.device)
    on_cpu = args.device == "cpu"
    name = platform.machine() if on_cpu else torch.get_device_module(args.device).get_device_name()
    print(json.dumps({"flops_per_second": rate, "device": name, "torch": torch.__version__, "cores": os.cpu_count()}))


def measure_loader(args) -> None:
    """Print the cells per second of the batches of the most variable genes, and of all of them."""
    dataset = CellDataset.open(args.dataset, expect_counts=True, obs_columns=[args.labels_key])
    for num_genes in sorted({min(number, len(dataset.var)) for number in args.num_genes}):
        options = {"flavor": "all"} if num_genes == len(dataset.var) else {"n_top_genes": num_genes}
        processor, _ = fit_dataset(dataset.rows, dataset.var, args.labels_key, **options)
        collate = CellCollator(processor, dataset.var, True, dataset.token_key)
        for num_workers in args.num_workers:
            options = {"num_workers": num_workers}
            batches = CellBatches(
                dataset.rows, len(dataset), args.train_batch_size, collate, [args.labels_key], **options
            )()
            for _ in range(1 + 2 * num_workers):  # as many batches as workers prepare
                next(batches)
            number, clock = 0, Clock()
            while time.perf_counter() - clock.start < args.loader_seconds:
                next(batches)
                number += 1
            found = {"cells_per_second": clock.rates(number * args.train_batch_size)["cells_per_second"]}
            print(json.dumps({f"{num_genes} genes, {num_workers} workers": found}), flush=True)
            del batches  # ends its workers


# -- rows --------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of the record: its name, the seconds that it needs to begin, and how it is measured in those left."""

    name: str
    seconds: float
    measure: Callable[[float], dict[str, Any]]


def make_cells(path: Path, num_cells: int, num_genes: int) -> None:
    """Write random cells with random labels."""
    speed.NUM_GENES = num_genes
    labels = pd.Categorical(np.array(["A", "B"])[np.arange(num_cells) % 2])
    obs = pd.DataFrame({LABELS_KEY: labels}, index=[f"cell{i}" for i in range(num_cells)])
    var = pd.DataFrame(index=[f"gene{i}" for i in range(num_genes)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        ad.AnnData(sp.csr_matrix(speed.make_counts(num_cells)), obs=obs, var=var).write_h5ad(temporary)


def run_measurement(args, name: str, words: list[object], seconds: float) -> dict[str, Any]:
    """Run this file in a process of its own; return what it found, even if it did not come to its end."""
    log = Path(args.output_dir) / "logs" / f"{name}.txt"
    log.unlink(missing_ok=True)
    command = [sys.executable, __file__, *words, "--device", args.device, "--repeats", args.repeats]
    ended: dict[str, Any] = {}
    try:
        run_logged(command, log, seconds)
    except subprocess.TimeoutExpired:
        ended = SKIPPED
    except RuntimeError as error:
        ended = {"error": str(error)}
    return printed_results(log) | ended


def measure_preset(args, record: Record, preset: str, num_genes: int, compiled: bool, seconds: float) -> dict[str, Any]:
    """Measure training and sampling; compiled ones begin with the number of cells that fit without."""
    name = f"{preset}, {num_genes} genes"
    batch_size = args.batch_size
    if compiled:
        known = record["rows"].get(name, {})
        fitting = [known[task]["batch_size"] for task in TASKS if "batch_size" in known.get(task, {})]
        batch_size, name = min([batch_size, *fitting]), f"{name}, compiled"
    words = ["--measure", "speed", "--presets", preset, "--num_genes", num_genes, "--batch_size", batch_size]
    found = run_measurement(args, name, [*words, *(["--compile"] if compiled else [])], seconds)
    peak = record["rows"].get("matmul", {}).get("flops_per_second")
    for task in TASKS:
        if peak and "flops_per_second" in found.get(task, {}):
            found[task]["share_of_matmul"] = found[task]["flops_per_second"] / peak
    return found


def train(args, seconds: float) -> dict[str, Any]:
    """Split the dataset, time a few steps of training, and train for the seconds asked for."""
    end, folder = time.monotonic() + seconds, Path(args.output_dir)

    def run(log: str, script: str, *words: object) -> str:
        path = folder / "logs" / f"{log}.txt"
        run_logged([sys.executable, TRAINING / f"{script}.py", *words], path, end - time.monotonic())
        return path.read_text(errors="replace")

    def run_training(output: Path, num_steps: int) -> float:
        words = ["--dataset", folder / "split/train.h5ad", "--labels_key", args.labels_key, "--flavor", "all"]
        words += ["--preset", args.train_preset, "--mixed_precision", "bf16", "--report_to", "none"]
        words += ["--train_batch_size", args.train_batch_size, "--max_train_steps", num_steps]
        words += ["--dataloader_num_workers", args.num_workers[-1], "--validation_steps", 10**6]
        words += [*shlex.split(args.train_options), "--output_dir", output, "--overwrite_output_dir", "True"]
        return float(re.findall(r"cells/s=(\d+)", run(f"training, {output.name}", "train", *words))[-1])

    if not (folder / "split/split.json").exists():
        split = ["--dataset", args.dataset, "--labels_key", args.labels_key, "--split_dir", folder / "split"]
        run("split", "evaluate", *split)
    rate = run_training(folder / "calibration", args.calibration_steps)
    num_steps = max(1, int(args.train_seconds * rate / args.train_batch_size))
    started = time.monotonic()
    rate = run_training(folder / "pipeline", num_steps)
    settings = json.loads((folder / "pipeline/train_config.json").read_text())
    network = json.loads((folder / "pipeline/transformer/config.json").read_text())
    return {
        "cells_per_second": rate,
        "seconds": time.monotonic() - started,
        "max_train_steps": num_steps,
        "train_batch_size": args.train_batch_size,
        "epochs": num_steps * args.train_batch_size / settings["train_cells"],
        "num_genes": network["num_genes"],
        "train_cells": settings["train_cells"],
    }


def evaluate(args, seconds: float) -> dict[str, Any]:
    """Judge what was trained: each metric and its ceiling, which is that of real cells."""
    folder = Path(args.output_dir)
    if not (folder / "pipeline/model_index.json").exists():
        return {"skipped": "nothing was trained"}
    words = ["--split_dir", folder / "split", "--pipeline", folder / "pipeline", "--output_dir", folder / "evaluation"]
    words += ["--num_seeds", 1, "--baselines", "none", "--steps_curve", 0, "--min_label_cells", sys.maxsize]
    words += ["--overwrite", "--device", args.device, *shlex.split(args.evaluate_options)]
    run_logged([sys.executable, TRAINING / "evaluate.py", *words], folder / "logs/evaluation.txt", seconds)
    rows = json.loads((folder / "evaluation/metrics.json").read_text())["rows"]
    return {row["metric"]: {"value": row["value"], "ceiling": row["ceiling"]} for row in rows if row["group"] == "all"}


def list_rows(args, record: Record) -> list[Row]:
    """List all rows in the order of measurement, those that may be cut off last."""
    given = ["--dataset", args.dataset, "--labels_key", args.labels_key, "--num_genes", *args.num_genes, sys.maxsize]
    given += ["--num_workers", *args.num_workers, "--train_batch_size", args.train_batch_size]
    loader = ["--measure", "loader", *given, "--loader_seconds", args.loader_seconds]
    matmul = ["--measure", "matmul", "--matmul_size", args.matmul_size]
    rows = [
        Row("matmul", START, partial(run_measurement, args, "matmul", matmul)),
        Row("loader", START, partial(run_measurement, args, "loader", loader)),
    ]
    models = [(preset, num_genes) for num_genes in args.num_genes for preset in args.presets]
    for model in models:
        rows.append(Row("{}, {} genes".format(*model), START, partial(measure_preset, args, record, *model, False)))
    if args.train_seconds:
        rows.append(Row("training", args.train_seconds + 2 * START, partial(train, args)))
        rows.append(Row("evaluation", JUDGEMENT, partial(evaluate, args)))
    for model in models:
        measure = partial(measure_preset, args, record, *model, True)
        rows.append(Row("{}, {} genes, compiled".format(*model), COMPILATION, measure))
    return rows


def measure_rows(record: Record, rows: list[Row], max_seconds: float) -> None:
    """Measure what the record lacks, as long as time lasts, and save each row."""
    end = time.monotonic() + max_seconds
    for row in rows:
        if "skipped" not in record["rows"].get(row.name, SKIPPED):
            continue
        found: dict[str, Any] = SKIPPED
        if (left := end - time.monotonic()) >= row.seconds:
            try:
                found = row.measure(left)
            except subprocess.TimeoutExpired:
                found = SKIPPED
            except (RuntimeError, OSError, LookupError, ValueError) as error:
                found = {"error": f"{type(error).__name__}: {error}"}
        record["rows"][row.name] = found
        record.save()
        print(f"{max_seconds - end + time.monotonic():4.0f} s  {row.name}: {json.dumps(found)[:160]}", flush=True)


def format_table(rows: dict[str, dict[str, Any]]) -> str:
    """Format the rates of the presets; a failure or what was skipped stands in place of a rate."""
    lines = []
    for name, row in rows.items():
        if " genes" in name:
            texts = []
            for task in TASKS:
                found = row.get(task, row)
                share = f" ({found['share_of_matmul']:.2f})" if "share_of_matmul" in found else ""
                rate = f"{found['cells_per_second']:,.0f}{share}" if "cells_per_second" in found else ""
                texts.append(rate or (found.get("error") or f"skipped: {found.get('skipped')}")[:60])
            lines.append([name, *texts])
    return to_markdown(["cells per second (share of the matmul)", *TASKS], lines)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="counts to load and to train on; made cells if not given")
    parser.add_argument("--labels_key", default=LABELS_KEY)
    found = [device for device in DEVICES[1:] if torch.get_device_module(device).is_available()]
    parser.add_argument("--device", default=[*found, "cpu"][0], choices=DEVICES)
    parser.add_argument("--presets", nargs="+", default=["scrdit-s", "scrdit-b", "scrdit-l"])
    parser.add_argument("--num_genes", type=int, nargs="+", default=[2000, 16791])
    parser.add_argument("--batch_size", type=int, default=4096, help="cells at a time, halved until they fit")
    parser.add_argument("--repeats", type=int, default=5, help="steps or calls, of which the fastest counts")
    parser.add_argument("--matmul_size", type=int, default=8192)
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 8], help="of the loader; the last one trains")
    parser.add_argument("--loader_seconds", type=float, default=4, help="for each number of genes and workers")
    parser.add_argument("--made_cells", type=int, default=4000, help="without --dataset")
    parser.add_argument("--train_preset", default="scrdit-b")
    parser.add_argument("--train_options", default="", help="further arguments of train.py, in quotes")
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--train_seconds", type=float, default=300, help="0: neither training nor evaluation")
    parser.add_argument("--calibration_steps", type=int, default=300, help="by which the number of steps is chosen")
    parser.add_argument("--evaluate_options", default="", help="further arguments of evaluate.py, in quotes")
    parser.add_argument("--max_seconds", type=float, default=600, help="for all of it")
    parser.add_argument("--miniature", action="store_true", help="small numbers in place of all defaults, for a test")
    parser.add_argument("--output_dir", default="outputs/gpu", help="folder of gpu.json, logs and the pipeline")
    parser.add_argument("--measure", choices=["matmul", "loader", "speed"], help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    if "--miniature" in sys.argv:
        parser.set_defaults(**MINIATURE)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, print the table."""
    args = parse()
    if args.measure:
        torch.set_flush_denormal(True)
        {"matmul": measure_matmul, "loader": measure_loader, "speed": measure_speed}[args.measure](args)
        return
    folder = Path(args.output_dir)
    fixed = {name: value for name, value in vars(args).items() if name not in ("max_seconds", "output_dir")}
    record = Record(folder / "gpu.json", fixed, rows={})
    if args.dataset is None:
        args.dataset = str(folder / "made.h5ad")
        if not Path(args.dataset).exists():
            make_cells(Path(args.dataset), args.made_cells, max(args.num_genes))
    measure_rows(record, list_rows(args, record), args.max_seconds)
    print(f"\n{format_table(record['rows'])}\nWrote {record.path}")


if __name__ == "__main__":
    main()
