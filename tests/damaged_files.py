"""Reads damaged copies of files, each as this package does, and says what came of it.

Run by tests/test_properties.py as `python damaged_files.py KIND FOLDER MEMORY`, because a copy may crash the process or
ask for more memory than MEMORY bytes. Prints a line when it starts with a copy, and one with the outcome.
"""

import json
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import datasets
import torch

from scrdit_diffusers import CellDataset, SCRDiTPipeline

torch.set_num_threads(1)
datasets.disable_progress_bars()


def read_cells(path: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        cells = CellDataset.open(path, labels_key=["cell_type"] if path.suffix else (), cache_dir=cache)
        cells.to_anndata()


def read_pipeline(path: Path) -> None:
    pipe = SCRDiTPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe(2, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    except ValueError as error:  # of numbers in the weights, which no header tells
        raise ValueError(f"{path}: {error}" if "NaN" in str(error) else str(error)) from error


def main(kind: str, folder: str, memory: str) -> None:
    read = {"cells": read_cells, "pipeline": read_pipeline}[kind]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(memory), used + int(memory)))
    for path in sorted(Path(folder).iterdir()):
        print(json.dumps({"copy": path.name}), flush=True)
        try:
            read(path)
            outcome = "read"
        except BaseException as error:  # noqa: BLE001 - whatever comes is judged by the test
            named = str(path) in str(error)
            outcome = f"{type(error).__name__}: {error}"
            outcome = ("refused" if isinstance(error, (ValueError, OSError)) and named else "other") + f" {outcome}"
        print(json.dumps({"copy": path.name, "outcome": outcome[:1000]}), flush=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
