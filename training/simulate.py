"""Simulate an experiment with known truth: cells of a design, with effects that were planted.

python training/simulate.py --pipeline scrdit-model --obs design.csv --effects effects.csv --output simulated.h5ad
python training/simulate.py --pipeline scrdit-model --num_cells 500 --condition cell_type=B --num_effects 50

The first takes a design with a row per cell, and a table of the columns group, gene and log2_fold_change. The second
makes a control and a treated group of 500 cells each, and draws the effects. With `--power_curve power.csv` it also
tells how many cells per group it takes to find them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from cli import (
    PipelineArguments,
    arg,
    best_device,
    check_alone,
    check_pipeline_args,
    describe,
    load_pipeline,
    lock_output,
    parse_conditions,
    read_genes,
    read_table,
    run_job,
    write_cells,
)

from scrdit_diffusers import SCRDiTPipeline, SCRDiTSimulatePipeline, draw_effects
from scrdit_diffusers.atomic import write_atomically

COLUMNS = ("group", "gene", "log2_fold_change")


@dataclass
class SimulationArguments(PipelineArguments):
    """Command-line arguments; those of the pipeline's call keep their names."""

    output: str = arg("simulated.h5ad", ".h5ad file or .zarr store to write.")
    # design
    obs: str | None = arg(None, "The design, a row per cell with conditions and group: .csv, .tsv or .h5ad.")
    num_cells: int | None = arg(None, "Without --obs: number of cells of each group.")
    groups: list[str] = arg(["control", "treated"], "Without --obs: the groups.")
    condition: list[str] = arg(
        [],
        "Without --obs: labels of all cells, as --condition cell_type=B batch=2; the others are drawn from the "
        "training composition.",
    )
    group_key: str = arg("group", "Column of obs that holds the group.")
    control: str = arg("control", "Group that drawn effects leave as it is, and that --power_curve compares with.")
    # effects
    effects: str | None = arg(None, f"Table with the columns {', '.join(COLUMNS)}. Default: no effects.")
    num_effects: int | None = arg(None, "Instead of --effects: number of genes that change in each other group.")
    effect_std: float = arg(1.0, "With --num_effects: standard deviation of the log2 fold changes.")
    genes: str | None = arg(
        None, "Text file of the genes that may change and are tested, one per line. Default: all of the model."
    )
    # cells
    library_size: float | None = arg(
        None, "Total count of each cell before effects. Default: drawn from the training cells."
    )
    max_factor: float = arg(
        1.0, "Generate cells with up to so many times the counts: larger effects lower their baseline."
    )
    num_inference_steps: int | None = arg(None, "Steps of the scheduler. Default: the pipeline's.")
    power_curve: str | None = arg(None, "Table to write, .csv or .tsv: share of the effects found, by cells per group.")


def check_args(args: SimulationArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    check_alone()
    positive = ("num_cells", "library_size", "max_factor", "num_inference_steps")
    check_pipeline_args(args, positive, ("num_effects", "effect_std"))
    parse_conditions(args.condition)
    if (args.obs is None) == (args.num_cells is None):
        raise ValueError("Give either --obs, a row per cell, or --num_cells, the number of cells of each group.")
    if args.obs and args.condition:
        raise ValueError(f"--condition {args.condition}: --obs has the labels already.")
    if len(set(args.groups)) < len(args.groups):
        raise ValueError(f"--groups names a group twice: {args.groups}.")
    if args.effects and args.num_effects is not None:
        raise ValueError("Give either --effects or --num_effects, not both.")
    if args.power_curve:
        if not args.effects and not args.num_effects:
            raise ValueError("--power_curve needs effects that can be found: give --effects or --num_effects.")
        if Path(args.power_curve).suffix not in (".csv", ".tsv"):
            raise ValueError(f"--power_curve must end in .csv or .tsv, got {args.power_curve}.")
        if Path(args.power_curve).exists() and not args.overwrite:
            raise ValueError(f"{args.power_curve} exists; give --overwrite to replace it.")


def make_design(pipe: SCRDiTPipeline, args: SimulationArguments) -> pd.DataFrame:
    """Read the design, or make one of groups of equal size."""
    if args.obs:
        obs = read_table(args.obs, "--obs")
    else:
        groups = np.repeat(args.groups, args.num_cells)
        generator = torch.Generator().manual_seed(args.seed)
        codes = pipe.prepare_class_labels(len(groups), parse_conditions(args.condition), None, generator)
        obs = pipe.processor.decode_labels(codes.numpy()).assign(**{args.group_key: groups})
    if isinstance(obs.index, pd.RangeIndex):
        obs.index = pd.Index([f"synthetic_{cell}" for cell in obs.index])
    return obs


def read_effects(path: str) -> dict[str, dict[str, float]]:
    """Read log2 fold changes by group and gene."""
    table = read_table(path, "--effects")
    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(f"--effects {path} has no column {missing}; it has {list(table)}.")
    changes = pd.to_numeric(table["log2_fold_change"], errors="coerce")
    for reason, rows in (
        ("holds no number", changes.isna()),
        ("repeats the group and gene of an earlier one", table.duplicated(["group", "gene"])),
    ):
        if rows.any():
            raise ValueError(f"--effects {path}: {rows.sum()} rows {reason}, first {table[rows].iloc[0].to_dict()}.")
    table["log2_fold_change"] = changes
    return {group: rows.set_index("gene")["log2_fold_change"].to_dict() for group, rows in table.groupby("group")}


def choose_effects(args: SimulationArguments, obs: pd.DataFrame, genes: list[str]) -> dict[str, dict[str, float]]:
    """Read or draw the effects, and check that there is a control where one is needed."""
    drawn = args.num_effects is not None
    if (drawn or args.power_curve) and args.group_key not in obs:
        raise ValueError(f"--group_key {args.group_key} is no column of the design, which has {list(obs)}.")
    groups = list(obs[args.group_key].astype(str).unique()) if drawn or args.power_curve else []
    if groups and (args.control not in groups or len(groups) < 2):
        raise ValueError(f"--control {args.control} must be one of at least two groups, got {groups}.")
    if drawn:
        others = [group for group in groups if group != args.control]
        return draw_effects(genes, others, args.num_effects, args.effect_std, args.seed)
    return read_effects(args.effects) if args.effects else {}


def main(args: SimulationArguments) -> None:
    """Check everything, simulate, write."""
    check_args(args)
    if args.power_curve:
        from scrdit_diffusers.evaluation.power import power_curve  # needs the packages of the train extra
    pipe = load_pipeline(args)
    genes = list(dict.fromkeys(read_genes(args.genes))) if args.genes else pipe.processor.var_names
    if unknown := [gene for gene in genes if gene not in set(pipe.processor.var_names)]:
        raise ValueError(f"--genes {args.genes}: {len(unknown)} genes are not the model's, such as {unknown[:5]}.")
    obs = make_design(pipe, args)
    effects = choose_effects(args, obs, genes)
    if slashes := [name for name in (*obs, *effects) if "/" in name]:
        raise ValueError(f"Columns of the design and groups cannot be written with a slash in their name: {slashes}.")
    simulate = SCRDiTSimulatePipeline.from_pipe(pipe).to(best_device(args))
    with lock_output(args):
        adata = simulate(
            obs,
            effects,
            args.group_key,
            library_size=args.library_size,
            max_factor=args.max_factor,
            num_inference_steps=args.num_inference_steps,
            generator=torch.Generator().manual_seed(args.seed),
            batch_size=args.batch_size,
        )
        if args.power_curve:
            table = power_curve(adata, genes, group_key=args.group_key, control=args.control, seed=args.seed)
        adata.uns["scrdit_simulate"] = describe(args)
        write_cells(adata, args.output)
        if args.power_curve:
            with write_atomically(args.power_curve) as temporary:
                table.to_csv(temporary, sep="," if Path(args.power_curve).suffix == ".csv" else "\t")
            print(f"Wrote {args.power_curve}\n{table.round(3).to_string()}")
            if not table["power"].any():
                print("No effect was found: take more cells, larger effects or, by --genes, genes that are seen often.")


if __name__ == "__main__":
    run_job(main, SimulationArguments)
