"""Add generated cells of rare labels to measured ones: `obs["synthetic"]` tells them apart.

python training/augment.py --pipeline scrdit-model --dataset cells.h5ad --to 200 --output balanced.h5ad
python training/augment.py --pipeline scrdit-model --dataset cells.h5ad --to NK=200 B=100 --output balanced.h5ad
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

from scrdit_diffusers import augment, read_cells


@dataclass
class AugmentationArguments(CellArguments):
    """Command-line arguments; those of the pipeline's call keep their names."""

    output: str = arg("augmented.h5ad", ".h5ad file or .zarr store to write: real cells, then new ones.")
    labels_key: str | None = arg(None, "Column of obs and condition of the model. Default: its only one.")
    to: list[str] = arg(
        [], "Number of cells, real and new, that each label with fewer is brought to, or label=number for some labels."
    )
    num_inference_steps: int | None = arg(None, "Steps of the scheduler. Default: the pipeline's.")
    library_size: float | None = arg(
        None, "Total count of each new cell over the model's genes. Default: drawn from the training cells."
    )


def parse_to(words: Sequence[str]) -> int | dict[str, int]:
    """Turn the words of `--to` into one number, or a number by label."""
    labels = [word.rpartition("=")[0] for word in words]
    numbers = [word.rpartition("=")[2] for word in words]
    one_for_all = len(words) == 1 and not labels[0]
    if not words or not all(number.isdecimal() for number in numbers) or not (one_for_all or all(labels)):
        raise ValueError(f"--to takes a number of cells, or label=number for each label that is to grow, got {words}.")
    if len(set(labels)) < len(labels):
        raise ValueError(f"--to names a label twice: {words}.")
    return int(numbers[0]) if one_for_all else dict(zip(labels, map(int, numbers), strict=True))


def check_args(args: AugmentationArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    check_alone()
    check_pipeline_args(args, ("num_inference_steps", "library_size"))
    parse_to(args.to)


def main(args: AugmentationArguments) -> None:
    """Check everything, generate the missing cells, write all."""
    check_args(args)
    cells = read_cells(args.dataset)
    pipe = load_pipeline(args).to(best_device(args))
    with naming("--dataset", args.dataset):
        pipe.processor.get_values(cells, args.layer)
    with lock_output(args):
        both = augment(
            pipe,
            cells,
            choose_label(pipe, args.labels_key),
            parse_to(args.to),
            args.layer,
            num_inference_steps=args.num_inference_steps,
            library_size=args.library_size,
            generator=torch.Generator().manual_seed(args.seed),
            batch_size=args.batch_size,
        )
        both.uns["scrdit_augment"] = describe(args)
        write_cells(both, args.output)


if __name__ == "__main__":
    run_job(main, AugmentationArguments)
