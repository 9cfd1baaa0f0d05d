"""Generate cells with a trained pipeline and write them as .h5ad.

python training/generate.py --pipeline scrdit-model --num_cells 1000 --condition cell_type=B --output cells.h5ad
python training/generate.py --pipeline scrdit-model --obs cells_wanted.csv --output cells.h5ad
"""

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import diffusers
import pandas as pd
import torch
from diffusers import SchedulerMixin
from transformers import HfArgumentParser

from scrdit_diffusers import SCRDiTPipeline


@dataclass
class GenerationArguments:
    """Command-line arguments; those of the pipeline's call keep its names."""

    pipeline: str = field(metadata={"help": "Folder or Hub id of a trained pipeline."})
    output: str = field(default="cells.h5ad", metadata={"help": ".h5ad file to write."})
    num_cells: int | None = field(default=None, metadata={"help": "Number of cells; that of --obs if not given."})
    condition: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "Labels: --condition cell_type=B batch=2; the others are drawn from the training composition.",
        },
    )
    obs: str | None = field(
        default=None, metadata={"help": "Table with a row per cell and conditions as columns: .csv, .tsv or .h5ad."}
    )
    num_inference_steps: int = field(default=25, metadata={"help": "Steps of the scheduler."})
    scheduler: str | None = field(
        default=None, metadata={"help": "diffusers scheduler to swap in, such as DDIMScheduler."}
    )
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1.0 is off."})
    eta: float = field(default=0.0, metadata={"help": "Noise of DDIM: 0 deterministic, 1 as DDPM."})
    batch_size: int = field(default=512, metadata={"help": "Cells generated at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of labels and noise."})
    dtype: str = field(
        default="float32", metadata={"help": "Precision.", "choices": ["float32", "bfloat16", "float16"]}
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, mps; the best there is if not given."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    overwrite: bool = field(default=False, metadata={"help": "Replace --output if it exists."})


def read_obs(path: str) -> pd.DataFrame:
    """Read the table of wanted cells; labels stay strings."""
    suffix = Path(path).suffix
    if suffix not in (".csv", ".tsv", ".h5ad"):
        raise ValueError(f"--obs must be a .csv, .tsv or .h5ad file, got {path}.")
    if suffix == ".h5ad":
        return ad.read_h5ad(path, backed="r").obs
    return pd.read_csv(path, sep="," if suffix == ".csv" else "\t", dtype=str, keep_default_na=False)


def main(args: GenerationArguments) -> None:
    """Generate, then write under a temporary name and rename."""
    output = Path(args.output)
    if output.suffix != ".h5ad":
        raise ValueError(f"--output must end in .h5ad, got {output}.")
    if output.exists() and not args.overwrite:
        raise ValueError(f"{output} exists; give --overwrite to replace it.")
    if any("=" not in condition for condition in args.condition):
        raise ValueError(f"--condition takes key=value, got {args.condition}.")
    conditions = dict(condition.split("=", 1) for condition in args.condition) or None
    if len(conditions or ()) < len(args.condition):
        raise ValueError(f"--condition names a column twice: {args.condition}.")
    obs = read_obs(args.obs) if args.obs else None
    if args.num_cells is None and obs is None:
        raise ValueError("Give --num_cells, or --obs with one row per cell.")
    scheduler_class = getattr(diffusers, args.scheduler or "", None)
    if args.scheduler and not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler {args.scheduler}; try DDIMScheduler or UniPCMultistepScheduler.")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"

    pipe = SCRDiTPipeline.from_pretrained(args.pipeline, revision=args.revision, dtype=getattr(torch, args.dtype))
    pipe.to(args.device or best)
    if args.scheduler:
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    adata = pipe(
        num_cells=args.num_cells,
        conditions=conditions,
        obs=obs,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        eta=args.eta,
        generator=torch.Generator().manual_seed(args.seed),
        batch_size=args.batch_size,
    ).adata
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp.h5ad")
    adata.write_h5ad(temporary, compression="gzip")
    os.replace(temporary, output)
    print(f"Wrote {adata.n_obs} cells x {adata.n_vars} genes to {output}")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        main(HfArgumentParser(GenerationArguments).parse_args_into_dataclasses()[0])
    except (TypeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
