"""Speed and memory of a dataset against other ways to read cells, side by side in one run.

    python training/benchmarks/data.py --cells 10000 100000 1000000 --genes 2000

Makes `.h5ad` files by drawing cells of a real one with replacement, then measures, each in a process of its own:

- converting the file to a dataset, and fitting the processor and the count head's start to it (cells per second);
- random batches in model space, as for training, from the dataset, from a CSR matrix in memory and from the backed
  file: collating is the same, so that the difference is reading;
- random sparse batches, before collating: "rows" of the dataset, and annbatch's loader if --annbatch_python is given;
- the training rate of the default preset on the same core, and how many times faster the dataset is read.

Memory is the peak anonymous resident set minus that after importing. Pages of a mapped file, which the system drops
when it needs the room, do not count.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata.io import sparse_dataset, write_elem
from measuring import Clock, PeakMemory  # beside this file
from torch.utils.data import DataLoader

from scrdit_diffusers import CellCollator, CellDataset, SCRDiTProcessor, fit_dataset
from scrdit_diffusers.atomic import write_atomically
from scrdit_diffusers.cells.batches import CellRows
from scrdit_diffusers.cells.layout import rows_to_matrix

LABELS_KEY = "cell_type"
WAYS = ("dataset", "memory", "backed", "rows")


def make_file(path: Path, source: Path, num_cells: int, num_genes: int) -> None:
    """Draw cells with replacement; the genes are those that most cells express."""
    cells = ad.read_h5ad(source)
    matrix = sp.csr_matrix(cells.X, dtype=np.float32)
    genes = np.sort(np.argsort(-matrix.getnnz(axis=0), kind="stable")[:num_genes])
    matrix, rng = matrix[:, genes], np.random.default_rng(0)
    drawn = rng.integers(0, cells.n_obs, num_cells)
    labels = pd.Categorical(cells.obs[LABELS_KEY].iloc[drawn])
    obs = pd.DataFrame({LABELS_KEY: labels}, index=np.arange(num_cells).astype(str))
    with write_atomically(path) as unfinished, h5py.File(unfinished, "w") as file:
        empty = ad.AnnData(shape=(num_cells, len(genes)), obs=obs, var=cells.var.iloc[genes][[]])
        write_elem(file, "/", empty)
        write_elem(file, "X", matrix[drawn[:10_000]])
        stored = sparse_dataset(file["X"])
        for start in range(10_000, num_cells, 10_000):
            stored.append(matrix[drawn[start : start + 10_000]])


def convert(args) -> dict:
    """Convert a file into an empty cache."""
    with PeakMemory() as memory:
        clock = Clock()
        dataset = CellDataset.open(args.file, obs_columns=[LABELS_KEY], cache_dir=args.cache_dir)
        rates = clock.rates(len(dataset))
    size = sum(path.stat().st_size for path in Path(args.cache_dir).rglob("*.arrow"))
    values = sum(map(len, dataset.rows.with_format("arrow")[:1000]["genes"])) / 1000
    size_of_cell = {"values_per_cell": values, "bytes_per_cell": size / len(dataset)}
    return rates | size_of_cell | {"megabytes": memory.megabytes}


def fit(args) -> dict:
    """Fit the processor and the moments for the count head, in two passes."""
    dataset = CellDataset.open(args.file, obs_columns=[LABELS_KEY], cache_dir=args.cache_dir)
    with PeakMemory() as memory:
        clock = Clock()
        processor, _ = fit_dataset(dataset.rows, dataset.var, LABELS_KEY, flavor=args.flavor)
        rates = clock.rates(len(dataset))
    processor.save_pretrained(args.cache_dir)
    return rates | {"megabytes": memory.megabytes}


def batches(args, processor: SCRDiTProcessor):
    """Yield random batches without end, read in one of the `WAYS`."""
    rng = np.random.default_rng(args.seed)
    if args.way == "rows":
        dataset = CellDataset.open(args.file, obs_columns=[LABELS_KEY], cache_dir=args.cache_dir)
        cells = CellRows(dataset.rows, [LABELS_KEY])
        while True:
            drawn = rng.integers(0, len(cells), args.batch_size).tolist()
            yield rows_to_matrix(cells.__getitems__(drawn), len(dataset.var))
    if args.way == "dataset":
        dataset = CellDataset.open(args.file, obs_columns=[LABELS_KEY], cache_dir=args.cache_dir)
        cells = CellRows(dataset.rows, [LABELS_KEY])
        collate = CellCollator(processor, dataset.var, expect_counts=True)
        sampler = torch.utils.data.RandomSampler(cells, replacement=True, num_samples=10**7)
        yield from DataLoader(cells, args.batch_size, sampler=sampler, collate_fn=collate, num_workers=args.num_workers)
        return
    cells = ad.read_h5ad(args.file, backed="r" if args.way == "backed" else None)
    columns = processor.gene_columns(cells.var_names)
    while True:
        rows = np.sort(rng.integers(0, cells.n_obs, args.batch_size))
        yield dense_batch(processor, sp.csr_matrix(cells.X[rows]), columns, cells.obs.iloc[rows])


def dense_batch(processor: SCRDiTProcessor, matrix: sp.csr_matrix, columns: np.ndarray, obs: pd.DataFrame) -> dict:
    """Collate as [`CellCollator`] does."""
    values, library_size = processor.select_counts(matrix, columns)
    return {
        "values": torch.from_numpy(processor.transform(values)).float(),
        "class_labels": torch.from_numpy(processor.encode_labels(obs)),
        "counts": torch.from_numpy(values.toarray()).float(),
        "library_size": torch.from_numpy(library_size).float(),
    }


def read(args) -> dict:
    """Read random batches for some seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    processor = SCRDiTProcessor.from_pretrained(args.cache_dir)
    with PeakMemory() as memory:
        source = batches(args, processor)
        next(source)
        num_batches, clock = 0, Clock()
        while time.perf_counter() - clock.start < args.seconds:
            next(source)
            num_batches += 1
        rates = clock.rates(num_batches * args.batch_size)
    return rates | {"megabytes": memory.megabytes}


def run(measure: str, *arguments: object) -> subprocess.Popen:
    """Start a measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", measure, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen) -> dict:
    """Wait for a measurement and return the last line that it printed."""
    printed = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"{process.args} failed.")
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="cells.h5ad", help="real cells to draw from, with obs['cell_type']")
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--genes", type=int, nargs="+", default=[2000])
    parser.add_argument("--folder", default="outputs/benchmark_data", help="for files (kept) and datasets (deleted)")
    parser.add_argument("--seconds", type=float, default=5, help="time for each way to read")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--processes", type=int, default=1, help="also read with this many processes at once")
    parser.add_argument("--flavor", default="seurat")
    parser.add_argument("--annbatch_python", help="Python that has annbatch, which needs Python 3.12 or newer")
    parser.add_argument("--output", default="outputs/benchmark_data.json")
    for name, kind in dict(measure=str, file=str, cache_dir=str, way=str, seed=int, num_workers=int).items():
        parser.add_argument(f"--{name}", type=kind, default=0 if kind is int else None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(dict(convert=convert, fit=fit, read=read)[args.measure](args)))
        return

    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    rows = []
    for num_genes in args.genes:
        for num_cells in args.cells:
            path = folder / f"{num_cells}x{num_genes}.h5ad"
            if not path.exists():
                make_file(path, Path(args.source), num_cells, num_genes)
            cache = folder / f"{num_cells}x{num_genes}-{os.getpid()}"
            common = ["--file", path, "--cache_dir", cache, "--batch_size", args.batch_size, "--seconds", args.seconds]
            row = {"cells": num_cells, "genes": num_genes}
            row["convert"] = result(run("convert", *common))
            os.environ["HF_DATASETS_CACHE"] = str(cache)  # where fit_dataset keeps what it has learned
            row["fit"] = result(run("fit", *common, "--flavor", args.flavor))
            for way in WAYS:
                row[way] = result(run("read", *common, "--way", way))
            if args.annbatch_python:
                script = Path(__file__).with_name("annbatch_loader.py")
                command = [args.annbatch_python, script, path, f"{cache}/annbatch.zarr"]
                command += ["--batch_size", str(args.batch_size), "--seconds", str(args.seconds)]
                process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                row["annbatch"] = json.loads(process.stdout.splitlines()[-1])
            if args.processes > 1:
                started = [run("read", *common, "--way", "dataset", "--seed", i) for i in range(args.processes)]
                rates = [result(process) for process in started]
                row["processes"] = {
                    name: sum(rate[name] for rate in rates) for name in ("cells_per_second", "cells_per_cpu_second")
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(args.output) as temporary:
                temporary.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2))
            shutil.rmtree(cache)

    from speed import DEFAULT, train_rate  # beside this file

    torch.set_flush_denormal(True)
    model, _ = train_rate(
        DEFAULT, args.batch_size, 20, argparse.Namespace(device="cpu", dtype="float32", compile=False)
    )
    print(f"cells per CPU second (MB); the default preset trains at {model:.0f} cells per second")
    columns = ["convert", "fit", *WAYS]
    print(f"{'cells x genes':>18}" + "".join(f"{name:>18}" for name in columns) + f"{'dataset / training':>20}")
    for row in rows:
        cell = [f"{row[name]['cells_per_cpu_second']:,.0f} ({row[name]['megabytes']:,.0f})" for name in columns]
        ratio = row["dataset"]["cells_per_cpu_second"] / model
        print(f"{row['cells']:>9,} x {row['genes']:>6,}" + "".join(f"{text:>18}" for text in cell) + f"{ratio:>20.1f}")
        if "annbatch" in row:
            for name, of in row["annbatch"].items():
                rate = f"{of['cells_per_cpu_second']:,.0f} ({of['megabytes']:,.0f})"
                print(f"{'':18}  annbatch, {name}: {rate}")
        if "processes" in row:
            names = {"cells_per_second": "second", "cells_per_cpu_second": "CPU second"}
            times = [f"{row['processes'][name] / row['dataset'][name]:.2f} per {of}" for name, of in names.items()]
            print(f"{'':18}  {args.processes} processes, rate over that of one: {', '.join(times)}")
    with write_atomically(args.output) as temporary:
        temporary.write_text(json.dumps({"machine": machine, "training": model, "rows": rows}, indent=2))
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
