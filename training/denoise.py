"""Denoise measured cells with a trained pipeline: expected counts in `layers["denoised"]` of a copy.

python training/denoise.py --pipeline scrdit-model --dataset cells.h5ad --output denoised.h5ad
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

from scrdit_diffusers import SCRDiTDenoisePipeline, read_cells


@dataclass
class DenoisingArguments(CellArguments):
    """Command-line arguments; those of the pipeline's call keep their names."""

    output: str = arg("denoised.h5ad", ".h5ad file or .zarr store to write: the cells with the model's genes.")
    use_labels: bool = arg(True, "Condition on the labels in obs; False denoises each cell by its counts alone.")
    timestep: int = arg(400, "Noise level at which the network sees the cells.")
    num_draws: int = arg(4, "Draws of the noise; each is one call of the network.")


def check_args(args: DenoisingArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    check_alone()
    check_pipeline_args(args, ("num_draws",), ("timestep",))


def main(args: DenoisingArguments) -> None:
    """Check everything, denoise, write."""
    check_args(args)
    cells = read_cells(args.dataset)
    denoise = SCRDiTDenoisePipeline.from_pipe(load_pipeline(args)).to(best_device(args))
    with lock_output(args):
        with naming("--dataset", args.dataset):
            denoised = denoise(
                cells,
                layer=args.layer,
                use_labels=args.use_labels,
                timestep=args.timestep,
                num_draws=args.num_draws,
                generator=torch.Generator().manual_seed(args.seed),
                batch_size=args.batch_size,
            )
        denoised.uns["scrdit_denoise"] = describe(args)
        write_cells(denoised, args.output)


if __name__ == "__main__":
    run_job(main, DenoisingArguments)
