"""Complete cells that were measured on some genes: counts, means and intervals of all genes of a trained pipeline.

python training/complete.py --pipeline scrdit-model --dataset panel.h5ad --output completed.h5ad
"""

from dataclasses import dataclass

import torch
from cli import (
    CellArguments,
    arg,
    best_device,
    check_alone,
    check_pipeline_args,
    describe,
    load_pipeline,
    lock_output,
    naming,
    run_job,
    write_cells,
)

from scrdit_diffusers import SCRDiTCompletePipeline, read_cells


@dataclass
class CompletionArguments(CellArguments):
    """Command-line arguments; those of the pipeline's call keep their names."""

    output: str = arg("completed.h5ad", ".h5ad file or .zarr store to write: the cells with all of the model's genes.")
    use_labels: bool = arg(True, "Condition on the labels in obs; False completes each cell by its counts alone.")
    library_size: float | None = arg(
        None, "Total count of each cell over the model's genes. Default: estimated from its measured genes."
    )
    num_inference_steps: int | None = arg(None, "Network calls for each draw. Default: the pipeline's.")
    num_draws: int = arg(16, "Cells that are drawn for each measured one; more of them find better ones.")
    interval: float = arg(0.9, "Share of the counts that lie within the interval.")


def check_args(args: CompletionArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    check_alone()
    check_pipeline_args(args, ("library_size", "num_inference_steps", "num_draws", "interval"))


def main(args: CompletionArguments) -> None:
    """Check everything, complete, write."""
    check_args(args)
    cells = read_cells(args.dataset)
    complete = SCRDiTCompletePipeline.from_pipe(load_pipeline(args)).to(best_device(args))
    options = {
        "use_labels": args.use_labels,
        "library_size": args.library_size,
        "num_inference_steps": args.num_inference_steps,
        "num_draws": args.num_draws,
        "interval": args.interval,
        "batch_size": args.batch_size,
    }
    complete.check_inputs(cells, **options)
    with lock_output(args):
        with naming("--dataset", args.dataset):
            completed = complete(cells, layer=args.layer, generator=torch.Generator().manual_seed(args.seed), **options)
        completed.uns["scrdit_complete"] = describe(args)
        write_cells(completed, args.output)


if __name__ == "__main__":
    run_job(main, CompletionArguments)
