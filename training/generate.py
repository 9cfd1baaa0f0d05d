"""Generate cells with a trained pipeline and write them as .h5ad or .zarr.

python training/generate.py --pipeline scrdit-model --num_cells 1000 --condition cell_type=B --output cells.h5ad
python training/generate.py --pipeline scrdit-model --obs cells_wanted.csv --output cells.h5ad
accelerate launch --num_processes 8 training/generate.py --pipeline scrdit-model --num_cells 1000000 --output cells.zarr

Cells are written in shards to `OUTPUT.parts` as they are made, and joined at the end. After an interruption, the same
command continues. Each cell has its own random generator, so that labels, library size and noise depend only on
`--seed` and the number of the cell, not on processes, device, or sizes of shards and batches.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import anndata as ad
import diffusers
import h5py
import numpy as np
import pandas as pd
import torch
import zarr
from accelerate import PartialState
from cli import (
    COMPRESSION,
    PipelineArguments,
    arg,
    check_pipeline_args,
    load_pipeline,
    lock_output,
    parse_conditions,
    read_table,
    run,
    versions,
)
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

from scrdit_diffusers import SCRDiTPipeline
from scrdit_diffusers.atomic import LOCK_NAME, remove, write_atomically
from scrdit_diffusers.checks import layer_names
from scrdit_diffusers.launch import check_processes, watch_launcher
from scrdit_diffusers.redaction import redact

logger = logging.getLogger("generate")


@dataclass
class GenerationArguments(PipelineArguments):
    """Command-line arguments; those of the pipeline's call keep their names."""

    overwrite: bool = arg(False, "Replace --output, and an unfinished one of another run.")
    num_cells: int | None = arg(None, "Number of cells; that of --obs if not given.")
    condition: list[str] = arg(
        [], "Labels: --condition cell_type=B batch=2; the others are drawn from the training composition."
    )
    obs: str | None = arg(None, "A row per cell and conditions as columns: .csv, .tsv or .h5ad.")
    num_inference_steps: int | None = arg(None, "Steps of the scheduler. Default: the pipeline's.")
    library_size: float | None = arg(
        None, "Total count of each cell over the model's genes. Default: drawn from the training cells."
    )
    scheduler: str | None = arg(None, "diffusers scheduler to swap in, such as DDIMScheduler.")
    guidance_scale: float = arg(1.0, "Classifier-free guidance; 1.0 is off.")
    eta: float | None = arg(None, "Noise of DDIM: 0, the default, is deterministic, 1 as DDPM.")
    shard_size: int = arg(4096, "Cells that are held in memory and written at a time.")


def check_args(args: GenerationArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    positive = ("num_cells", "num_inference_steps", "library_size", "shard_size")
    check_pipeline_args(args, positive, ("guidance_scale", "eta"))
    parse_conditions(args.condition)
    if args.num_cells is None and args.obs is None:
        raise ValueError("Give --num_cells, or --obs with one row per cell.")
    scheduler_class = getattr(diffusers, args.scheduler or "", None)
    if args.scheduler and not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler {args.scheduler}; try DDIMScheduler or UniPCMultistepScheduler.")


def check_request(pipe: SCRDiTPipeline, args: GenerationArguments, request: dict) -> None:
    """Let the pipeline check the request for all cells up front, not hours later when their turn comes."""
    pipe.check_inputs(
        **request,
        library_size=args.library_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        eta=args.eta,
        generator=None,
        batch_size=args.batch_size,
        latents=None,
        output_type="anndata",
        callback_on_step_end_tensor_inputs=(),
        decode_timestep=pipe.config.decode_timestep,
    )
    if request["obs"] is None:  # the request is the same for all cells
        request = request | {"num_cells": 1}
    pipe.prepare_class_labels(**request, generator=torch.Generator())


def describe_run(pipe: SCRDiTPipeline, args: GenerationArguments, request: dict) -> dict:
    """Return everything that the cells depend on, as JSON."""
    content = hashlib.sha256(pipe.processor.to_json_string().encode())
    for name, tensor in sorted(pipe.transformer.state_dict().items()):
        content.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    if request["obs"] is not None:
        content.update(request["obs"].to_csv().encode())
    free = ("pipeline", "output", "overwrite", "obs", "device", "batch_size")  # do not affect what is drawn
    arguments = {name: value for name, value in dataclasses.asdict(args).items() if name not in free}
    described = {"num_cells": request["num_cells"], "content_sha256": content.hexdigest()}
    return redact(arguments) | described | versions()


def open_parts(parts: Path, run: dict, overwrite: bool) -> None:
    """Prepare the folder of shards, or continue that of an interrupted run.

    Raises
    ------
    ValueError
        It holds shards of another run.
    """
    record = parts / "run.json"
    before = json.loads(record.read_text()) if record.exists() else None
    if before is not None and before != run:
        changed = {key: (before.get(key), run.get(key)) for key in before | run if before.get(key) != run.get(key)}
        if not overwrite:
            raise ValueError(
                f"{parts} holds an unfinished run with other arguments (then, now): {changed}. Give those to go on "
                "with it, --overwrite to delete it, or another --output."
            )
        for path in parts.iterdir():
            if path.name != LOCK_NAME:
                remove(path)
    with write_atomically(record) as temporary:
        temporary.write_text(json.dumps(run, indent=2))


def read_shard(shard: Path, cells: range) -> ad.AnnData:
    """Read the file of some of the cells; raise OSError if it is damaged or holds others."""
    try:
        adata = ad.read_h5ad(shard)
    except Exception as error:  # whatever h5py and anndata make of damaged bytes
        raise OSError(
            f"{shard} is damaged ({' '.join(str(error).split())}); the same command makes it again."
        ) from error
    if list(adata.obs_names) != cell_names(cells):
        raise OSError(
            f"{shard} does not hold cells {cells.start} to {cells.stop - 1}; the same command makes it again."
        )
    return adata


def remove_bad_shards(shards: list[Path], blocks: list[range]) -> None:
    """Remove what an earlier run left damaged, and name it."""
    for shard, cells in zip(shards, blocks, strict=True):
        if shard.exists():
            try:
                read_shard(shard, cells)
            except OSError as error:
                logger.warning(error)
                remove(shard)


def cell_names(cells: range) -> list[str]:
    """Name cells by their numbers."""
    return [f"synthetic_{cell}" for cell in cells]


def cell_generators(seed: int, cells: range) -> list[torch.Generator]:
    """Make a generator for each cell, from the seed and the number of the cell.

    PyTorch's CPU generator uses 32 bits of its seed. Random seeds would collide (116 pairs are expected among a million
    cells); consecutive ones differ for 2^32 cells.
    """
    first = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [torch.Generator().manual_seed((first + cell) % 2**32) for cell in cells]


def write_shard(pipe: SCRDiTPipeline, args: GenerationArguments, request: dict, cells: range, path: Path) -> None:
    """Generate some of the cells and write them atomically."""
    obs = request["obs"]
    adata = pipe(
        num_cells=len(cells),
        conditions=request["conditions"],
        obs=None if obs is None else obs.iloc[cells.start : cells.stop],
        library_size=args.library_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        eta=args.eta,
        generator=cell_generators(args.seed, cells),
        batch_size=args.batch_size,
    ).adata
    adata.obs_names = cell_names(cells)
    adata.uns["scrdit"]["seed"] = args.seed
    with write_atomically(path) as temporary:
        adata.write_h5ad(temporary, **COMPRESSION)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())


def append_obs(stored: h5py.Group | zarr.Group, obs: pd.DataFrame) -> None:
    """Append the obs of a shard to that on disk, which has the same categories."""
    for key in [stored.attrs["_index"], *obs.columns]:
        column, values = stored[key], obs.index if key == stored.attrs["_index"] else obs[key]
        if isinstance(values.dtype, pd.CategoricalDtype):
            parts = [(column["codes"], values.cat.codes)]
        elif isinstance(column, h5py.Group | zarr.Group):  # text of pandas 3
            parts = [(column["values"], values.fillna("")), (column["mask"], values.isna())]
        else:
            parts = [(column, values)]
        for array, new in parts:
            start = array.shape[0]
            array.resize((start + len(new),))
            array[start:] = np.asarray(new)


def join_shards(shards: list[Path], blocks: list[range], temporary: Path) -> None:
    """Join the shards into one file or store, with one shard in memory at a time.

    `anndata.experimental.concat_on_disk` drops `uns` and compression, and opens all files at once.
    """
    if temporary.is_dir():  # left by a killed run
        shutil.rmtree(temporary)
    adata = read_shard(shards[0], blocks[0])
    matrices = {"X": adata.X} | {f"layers/{name}": adata.layers[name] for name in layer_names(adata)}
    for matrix in matrices.values():
        matrix.indptr = matrix.indptr.astype(np.int64)  # the joined matrix may have more than 2^31 values
    is_zarr = temporary.suffix == ".zarr"
    group = zarr.open_group(temporary, mode="w", zarr_format=2) if is_zarr else h5py.File(temporary, "w")
    ad.io.write_elem(group, "/", adata, dataset_kwargs={} if is_zarr else COMPRESSION)
    ad.io.write_elem(group, "obs", adata.obs, dataset_kwargs={} if is_zarr else COMPRESSION | {"maxshape": (None,)})
    for shard, cells in zip(shards[1:], blocks[1:], strict=True):
        adata = read_shard(shard, cells)
        append_obs(group["obs"], adata.obs)
        for name in matrices:
            ad.io.sparse_dataset(group[name]).append(adata.X if name == "X" else adata.layers[Path(name).name])
    if not is_zarr:
        group.close()


def replace(joined: Path, output: Path) -> None:
    """Give the finished file or store its name. An existing store, a folder, is first moved aside."""
    old = joined.with_name(f"replaced{output.suffix}")
    if old.exists():  # a run was killed between the two moves, or while deleting
        shutil.rmtree(old)
    if output.is_dir():
        os.replace(output, old)
    os.replace(joined, output)


def join_processes(device: str | None) -> PartialState:
    """Find the other launched processes; raise ValueError if each would write all cells."""
    cpu = device == "cpu" or (device is None and not torch.accelerator.is_available())
    state = PartialState(cpu=cpu, timeout=timedelta(days=1))  # time to wait for the slowest process
    check_processes(state.num_processes)
    return state


def main(args: GenerationArguments) -> None:
    """Generate shards, shared among the processes, then join them."""
    check_args(args)
    state = join_processes(args.device)
    obs = read_table(args.obs, "--obs") if args.obs else None
    num_cells = len(obs) if args.num_cells is None and obs is not None else args.num_cells
    request = {"num_cells": num_cells, "conditions": parse_conditions(args.condition), "obs": obs}

    pipe = load_pipeline(args)
    if args.scheduler:
        pipe.scheduler = getattr(diffusers, args.scheduler).from_config(pipe.scheduler.config)
    check_request(pipe, args, request)
    with lock_output(args) if state.is_main_process else nullcontext():
        generate(pipe, args, request, state)
    state.destroy_process_group()


def generate(pipe: SCRDiTPipeline, args: GenerationArguments, request: dict, state: PartialState) -> None:
    """Make the shards that are missing, each process its share of them, and join all."""
    output, parts, num_cells = Path(args.output), Path(f"{args.output}.parts"), request["num_cells"]
    blocks = [range(start, min(start + args.shard_size, num_cells)) for start in range(0, num_cells, args.shard_size)]
    shards = [parts / f"shard-{number:06d}.h5ad" for number in range(len(blocks))]
    if state.is_main_process:
        open_parts(parts, describe_run(pipe, args, request), args.overwrite)
        remove_bad_shards(shards, blocks)
    state.wait_for_everyone()
    pipe.to(args.device or state.device)
    missing = [number for number, shard in enumerate(shards) if not shard.exists()]
    state.wait_for_everyone()  # all must look before any writes
    if state.is_main_process and len(missing) < len(shards):
        print(f"Going on with {parts}: {len(shards) - len(missing)} of {len(shards)} shards are there.")
    pipe.set_progress_bar_config(disable=len(blocks) > 1 or not state.is_main_process)
    done = num_cells - sum(len(blocks[number]) for number in missing)
    disable = len(blocks) == 1 or not state.is_main_process
    with tqdm(total=num_cells, initial=done, unit="cells", smoothing=0, disable=disable) as progress:
        launcher_is_gone = watch_launcher()
        for number in missing[state.process_index :: state.num_processes]:
            if launcher_is_gone():
                raise InterruptedError("Stopped, as the launcher did; repeat the command to continue.")
            write_shard(pipe, args, request, blocks[number], shards[number])
            if state.is_main_process:  # shows the shards of all processes
                names = set(os.listdir(parts))
                there = sum(len(blocks[number]) for number in missing if shards[number].name in names)
                progress.update(done + there - progress.n)
    state.wait_for_everyone()
    if state.is_main_process:
        joined = parts / f"joined{output.suffix}"
        join_shards(shards, blocks, joined)
        replace(joined, output)
        shutil.rmtree(parts, ignore_errors=True)  # another run may just ask for the lock
        print(f"Wrote {num_cells} cells x {pipe.processor.num_genes} genes to {output}")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        run(main, GenerationArguments, (TypeError, ValueError, OSError))
    except KeyboardInterrupt:
        sys.exit("Stopped; repeat the command to continue.")
