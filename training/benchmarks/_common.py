"""What the benchmarks share: a resumable record of results, processes that measure, and Markdown tables."""

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from scrdit_diffusers import split_cells
from scrdit_diffusers.atomic import write_atomically

# Columns of obs and labels of the cells that are used: of lung lines, and of blood cells of several datasets.
SINGLETS = {"demuxlet_cls": ("SNG",)}
LABELED = {"cell_type_coarse": ("CD4 T", "NK", "B", "CD8 T", "Monocyte", "CD34+", "DC", "Megakaryocyte")}


class Record(dict):
    """Results as JSON, saved as they come, so that the same command continues after an interruption.

    Parameters
    ----------
    path
        File to write; continued if it exists.
    arguments
        What the results depend on.
    **empty
        Entries of a new record.

    Raises
    ------
    ValueError
        The file has results for other arguments.
    """

    def __init__(self, path: Path, arguments: Mapping[str, Any], **empty: Any):
        super().__init__(empty, arguments=dict(arguments))
        self.path = path
        if path.exists():
            self.update({"arguments": {}} | json.loads(path.read_text()))  # an old record does not say its arguments
            before = self["arguments"]
            changed = {k: before.get(k) for k, v in json.loads(json.dumps(arguments)).items() if before.get(k) != v}
            if changed:
                raise ValueError(f"{path} is of other arguments: {changed}; give another --output_dir.")

    def save(self) -> None:
        """Write the file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.path) as temporary:
            temporary.write_text(json.dumps(self, indent=2))


def run_logged(command: Sequence[object], log: Path, timeout: float | None = None) -> None:
    """Run a command in a process of its own that writes all it says to a file.

    Parameters
    ----------
    command
        Program and arguments.
    log
        File to write.
    timeout
        Seconds after which the process is killed; `None` waits for it.

    Raises
    ------
    subprocess.TimeoutExpired
        The time is over.
    RuntimeError
        The process failed; the message has its last lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:  # not a pipe, which processes that the command has left behind would keep open
        words = list(map(str, command))
        code = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, timeout=timeout).returncode
    if code:
        raise RuntimeError(f"exit code {code}, see {log}: {' '.join(log.read_text().split()[-60:])}")


def printed_results(log: Path) -> dict[str, Any]:
    """Join the JSON objects that a process has printed, one a line; none if it did not start."""
    found: dict[str, Any] = {}
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        if line.startswith("{"):
            found |= json.loads(line)
    return found


def select_labels(obs: pd.DataFrame, wanted: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Which cells have one of the labels in each column."""
    return np.all([np.ones(len(obs), dtype=bool), *(obs[key].isin(labels) for key, labels in wanted.items())], axis=0)


def write_split(cells: ad.AnnData, key: str, folder: Path, held_out: Mapping[str, Sequence[str]]) -> None:
    """Write the parts of cells as `training/evaluate.py` makes them, and the cells that are held out of all of them.

    Parameters
    ----------
    cells
        Cells.
    key
        Column of obs within whose labels they are split 60 / 20 / 20.
    folder
        Gets `train.h5ad`, `control.h5ad` and, as the last one, `test.h5ad`; `held_out.h5ad` comes before.
    held_out
        Columns of obs and labels: cells that have one in each column are held out.
    """
    rest, test = split_cells(cells, key, 0.2, seed=0)
    train, control = split_cells(cells[rest], key, 0.25, seed=0)
    rows = {"train": rest[train], "control": rest[control], "test": test}
    if held_out:
        is_held_out = select_labels(cells.obs, held_out)
        kept = {part: chosen[~is_held_out[chosen]] for part, chosen in rows.items()}
        rows = {"held_out": np.flatnonzero(is_held_out)} | kept
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in rows.items():
        with write_atomically(folder / f"{part}.h5ad") as temporary:
            cells[chosen].copy().write_h5ad(temporary)


def to_markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows))
