"""Annotate measured cells with a trained pipeline: the most likely label of each, its probability and a score.

python training/annotate.py --pipeline scrdit-model --dataset cells.h5ad --output annotated.h5ad
python training/annotate.py --pipeline scrdit-model --dataset cells.h5ad --output labels.csv

An .h5ad file or .zarr store is a copy of the cells with `obs["scrdit_<labels_key>"]`, `obs["scrdit_probability"]`,
`obs["scrdit_unlikeness"]` and `obsm["scrdit_probabilities"]`, a column for each category of the label; a table has a
row per cell.
"""

from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from cli import (
    CellArguments,
    arg,
    best_device,
    check_alone,
    check_pipeline_args,
    choose_label,
    describe,
    load_pipeline,
    lock_output,
    naming,
    run_job,
    write_cells,
)

from scrdit_diffusers import SCRDiTAnnotatePipeline, read_cells
from scrdit_diffusers.atomic import write_atomically
from scrdit_diffusers.pipeline_scrdit_annotate import MIN_GENERATED, NUM_GENERATED, TEMPERATURE, TIMESTEPS

TABLES = {".csv": ",", ".tsv": "\t"}


@dataclass
class AnnotationArguments(CellArguments):
    """Command-line arguments; those of the pipeline's call keep their names."""

    output: str = arg("annotated.h5ad", ".h5ad file or .zarr store (a copy of the cells), or .csv or .tsv table.")
    batch_size: int = arg(256, "Cells at a time; bounds the memory.")
    labels_key: str | None = arg(None, "Condition of the model to find. Default: its only one.")
    prior: str = arg("flat", "Prior of the labels.", choices=["flat", "composition"])
    temperature: float | None = arg(None, f"Divides the log-likelihoods. Default: {TEMPERATURE}.")
    temperature_cells: str | None = arg(
        None, "Cells with labels, not trained on, to which the temperature is fitted: a source as --dataset."
    )
    timesteps: list[int] = arg([*TIMESTEPS], "Noise levels at which the network sees the cells.")
    num_generated: int = arg(NUM_GENERATED, "Cells to generate, with which unlikeness compares the cells; 0 for none.")


def check_args(args: AnnotationArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    check_alone()
    check_pipeline_args(args, ("temperature",), suffixes=(".h5ad", ".zarr", *TABLES))
    if args.num_generated and args.num_generated < MIN_GENERATED:
        raise ValueError(f"--num_generated must be at least {MIN_GENERATED}, or 0 for none, got {args.num_generated}.")
    if args.temperature is not None and args.temperature_cells:
        raise ValueError(f"Give either --temperature or --temperature_cells, got {args.temperature} and the latter.")


def add_labels(cells: ad.AnnData, table: pd.DataFrame, labels_key: str) -> None:
    """Write the labels and what is known of them into the cells."""
    for name in (labels_key, "probability", "unlikeness"):
        cells.obs[f"scrdit_{name}"] = table[name]
    cells.obsm["scrdit_probabilities"] = table.filter(regex="^p_").to_numpy(np.float32)


def main(args: AnnotationArguments) -> None:
    """Check everything, fit the temperature, annotate, write."""
    check_args(args)
    cells = read_cells(args.dataset)
    pipe = load_pipeline(args)
    labels_key = choose_label(pipe, args.labels_key)
    annotate = SCRDiTAnnotatePipeline.from_pipe(pipe).to(best_device(args))
    temperature = TEMPERATURE if args.temperature is None else args.temperature
    options = {"layer": args.layer, "timesteps": args.timesteps, "batch_size": args.batch_size}
    given = (args.timesteps, args.batch_size, args.num_generated)
    annotate.check_inputs(cells, labels_key, args.prior, temperature, *given)
    with naming("--dataset", args.dataset):
        annotate.processor.get_counts(cells, args.layer)
    with lock_output(args):
        if args.temperature_cells:
            with naming("--temperature_cells", args.temperature_cells):
                labeled = read_cells(args.temperature_cells)
                generator = torch.Generator().manual_seed(args.seed)
                temperature = annotate.fit_temperature(labeled, labels_key, args.prior, generator=generator, **options)
            print(f"The temperature that fits {labeled.n_obs} labeled cells is {temperature:.3g}.")
        generator = torch.Generator().manual_seed(args.seed)
        options |= {"temperature": temperature, "num_generated": args.num_generated}
        table = annotate(cells, labels_key, prior=args.prior, generator=generator, **options)
        if separator := TABLES.get(Path(args.output).suffix):
            with write_atomically(args.output) as temporary:
                table.to_csv(temporary, sep=separator, index_label="cell")
            print(f"Wrote the labels of {len(table)} cells to {args.output}")
        else:
            add_labels(cells, table, labels_key)
            cells.uns["scrdit_annotate"] = describe(args) | {"labels_key": labels_key, "temperature": temperature}
            write_cells(cells, args.output)


if __name__ == "__main__":
    run_job(main, AnnotationArguments)
