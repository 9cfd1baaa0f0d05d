"""Make the cells between measured cells with a trained pipeline, or between a cell and itself under other labels.

python training/interpolate.py --pipeline scrdit-model --dataset cells.h5ad --start_cells A --end_cells B
python training/interpolate.py --pipeline scrdit-model --dataset cells.h5ad --start_condition stage=early \
    --end_condition stage=late --num_positions 9 --output path.h5ad

The first makes a path from cell A to cell B, and from the first of several cells to the first of as many others. The
second makes one from each cell of stage "early" to what it would be at stage "late".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import torch
from cli import (
    CellArguments,
    arg,
    best_device,
    check_alone,
    check_known_labels,
    check_pipeline_args,
    describe,
    load_pipeline,
    lock_output,
    naming,
    parse_conditions,
    run_job,
    write_cells,
)

from scrdit_diffusers import SCRDiTInterpolatePipeline, read_cells
from scrdit_diffusers.checks import check_label

NUM_POSITIONS = 5


@dataclass
class InterpolationArguments(CellArguments):
    """Command-line arguments; those of the pipeline's call keep their names."""

    output: str = arg("path.h5ad", ".h5ad file or .zarr store to write: the cells of all paths.")
    start_cells: list[str] = arg([], "Names in obs of the cells at which paths start. Default: all cells.")
    start_condition: list[str] = arg([], "Instead: labels of these cells, as --start_condition cell_type=B batch=2.")
    end_cells: list[str] = arg([], "Names in obs of as many cells, to which the paths lead, in the same order.")
    end_condition: list[str] = arg(
        [], "Instead: labels under which each cell is to be at the end of its path; its other labels stay."
    )
    positions: list[float] = arg([], "Places on the path: 0 is the start, 1 the end.")
    num_positions: int | None = arg(
        None, f"Instead: number of evenly spaced places, with start and end. Default: {NUM_POSITIONS}."
    )
    num_draws: int = arg(2, "Draws of the noise; each is one call of the network for each end, and two for each place.")


def check_args(args: InterpolationArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    check_alone()
    check_pipeline_args(args, ("num_positions", "num_draws"))
    parse_conditions(args.start_condition, "--start_condition")
    parse_conditions(args.end_condition, "--end_condition")
    if args.start_cells and args.start_condition:
        raise ValueError(f"Give either --start_cells or --start_condition, got {args.start_cells} and the latter.")
    if bool(args.end_cells) == bool(args.end_condition):
        raise ValueError("Give either --end_cells, to which the paths lead, or --end_condition, labels at their end.")
    if args.positions and args.num_positions is not None:
        raise ValueError(f"Give either --positions or --num_positions, got {args.positions} and {args.num_positions}.")
    if args.num_positions == 1:
        raise ValueError("--num_positions must be at least 2, start and end, got 1; for one place, give --positions.")
    if outside := [place for place in args.positions if not 0 <= place <= 1]:
        raise ValueError(f"--positions must be from 0 (start) to 1 (end), got {outside}.")


def choose_cells(cells: ad.AnnData, names: Sequence[str], flag: str) -> ad.AnnData:
    """Take cells by their names in obs, in this order."""
    if missing := [name for name in names if name not in cells.obs_names]:
        raise ValueError(f"{flag}: no cells are called {missing[:5]}; names look like {list(cells.obs_names[:3])}.")
    if twice := [name for name in names if (cells.obs_names == name).sum() > 1]:
        raise ValueError(f"{flag}: several cells are called {twice[:5]}; make the names in obs unique.")
    return cells[cells.obs_names.get_indexer(pd.Index(names))].copy()


def choose_start(cells: ad.AnnData, args: InterpolationArguments) -> ad.AnnData:
    """Take the cells at which paths start."""
    if args.start_cells:
        return choose_cells(cells, args.start_cells, "--start_cells")
    chosen = np.ones(cells.n_obs, dtype=bool)
    for key, label in (parse_conditions(args.start_condition) or {}).items():
        with naming("--start_condition", f"{key}={label}"):
            check_label(cells.obs, key, f"obs of {args.dataset}")
        chosen &= (cells.obs[key].map(str) == label).to_numpy(dtype=bool)
    if not chosen.any():
        found = {key: sorted(cells.obs[key].map(str).unique())[:10] for key in parse_conditions(args.start_condition)}
        raise ValueError(f"--start_condition {args.start_condition}: {args.dataset} has no such cells, but {found}.")
    return cells[chosen].copy()


def main(args: InterpolationArguments) -> None:
    """Check everything, make the paths, write."""
    check_args(args)
    cells = read_cells(args.dataset)
    pipe = load_pipeline(args)
    start, end = choose_start(cells, args), parse_conditions(args.end_condition)
    if end is None:
        end = choose_cells(cells, args.end_cells, "--end_cells")
        if end.n_obs != start.n_obs:
            raise ValueError(f"--end_cells names {end.n_obs} cells for {start.n_obs} at the start; give one for each.")
    else:
        check_known_labels(pipe, end, "--end_condition")
    interpolate = SCRDiTInterpolatePipeline.from_pipe(pipe).to(best_device(args))
    options = {
        "positions": args.positions or np.linspace(0, 1, args.num_positions or NUM_POSITIONS).tolist(),
        "num_draws": args.num_draws,
        "batch_size": args.batch_size,
    }
    interpolate.check_inputs(start, end, **options)
    with lock_output(args):
        with naming("--dataset", args.dataset):
            generator = torch.Generator().manual_seed(args.seed)
            path = interpolate(start, end, layer=args.layer, generator=generator, **options)
        path.uns["scrdit_interpolate"] = describe(args)
        write_cells(path, args.output)


if __name__ == "__main__":
    run_job(main, InterpolationArguments)
