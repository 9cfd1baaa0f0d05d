"""Translate measured cells to other labels with a trained pipeline: what they would be in another batch or condition.

python training/translate.py --pipeline scrdit-model --dataset cells.h5ad --condition batch=B --output translated.h5ad
"""

from dataclasses import dataclass

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

from scrdit_diffusers import SCRDiTTranslatePipeline, read_cells
from scrdit_diffusers.pipeline_scrdit_translate import TIMESTEPS


@dataclass
class TranslationArguments(CellArguments):
    """Command-line arguments; those of the pipeline's call keep their names."""

    output: str = arg("translated.h5ad", ".h5ad file or .zarr store to write: the cells with the model's genes.")
    condition: list[str] = arg(
        [], "Labels that all cells are to have: --condition batch=B donor=D2. Other conditions stay."
    )
    timesteps: list[int] = arg([*TIMESTEPS], "Noise levels at which the network sees the cells, one after the other.")
    num_draws: int = arg(2, "Draws of the noise; each is two calls of the network for each of --timesteps.")


def check_args(args: TranslationArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    check_alone()
    check_pipeline_args(args, ("num_draws",))
    if not parse_conditions(args.condition):
        raise ValueError("--condition is needed: the labels that the cells are to have, such as --condition batch=B.")


def main(args: TranslationArguments) -> None:
    """Check everything, translate, write."""
    check_args(args)
    cells = read_cells(args.dataset)
    pipe = load_pipeline(args)
    target = parse_conditions(args.condition)
    check_known_labels(pipe, target, "--condition")
    translate = SCRDiTTranslatePipeline.from_pipe(pipe).to(best_device(args))
    options = {"timesteps": args.timesteps, "num_draws": args.num_draws, "batch_size": args.batch_size}
    translate.check_inputs(cells, target, **options)
    with lock_output(args):
        with naming("--dataset", args.dataset):
            generator = torch.Generator().manual_seed(args.seed)
            translated = translate(cells, target, layer=args.layer, generator=generator, **options)
        translated.uns["scrdit_translate"] = describe(args)
        write_cells(translated, args.output)


if __name__ == "__main__":
    run_job(main, TranslationArguments)
