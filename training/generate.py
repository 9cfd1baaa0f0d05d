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
from cli import arg, run
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

import scrdit_diffusers
from scrdit_diffusers import SCRDiTPipeline, SCRDiTProcessor
from scrdit_diffusers.atomic import LOCK_NAME, lock_folder, remove, write_atomically
from scrdit_diffusers.launch import check_device, check_processes, watch_launcher
from scrdit_diffusers.redaction import redact

logger = logging.getLogger("generate")

COMPRESSION = {"compression": "gzip", "compression_opts": 1}


@dataclass
class GenerationArguments:
    """Command-line arguments; those of the pipeline's call keep their names."""

    pipeline: str = arg(None, "Folder or Hub id of a trained pipeline.")
    output: str = arg("cells.h5ad", ".h5ad file or .zarr store to write.")
    num_cells: int | None = arg(None, "Number of cells; that of --obs if not given.")
    condition: list[str] = arg(
        [], "Labels: --condition cell_type=B batch=2; the others are drawn from the training composition."
    )
    obs: str | None = arg(None, "A row per cell and conditions as columns: .csv, .tsv or .h5ad.")
    num_inference_steps: int | None = arg(None, "Steps of the scheduler. Default: the pipeline's.")
    lora_weights: str | None = arg(None, "Folder or Hub id of an adapter for the pipeline.")
    library_size: float | None = arg(
        None, "Total count of each cell over the model's genes. Default: drawn from the training cells."
    )
    scheduler: str | None = arg(None, "diffusers scheduler to swap in, such as DDIMScheduler.")
    guidance_scale: float = arg(1.0, "Classifier-free guidance; 1.0 is off.")
    eta: float = arg(0.0, "Noise of DDIM: 0 deterministic, 1 as DDPM.")
    batch_size: int = arg(512, "Cells generated at a time.")
    shard_size: int = arg(4096, "Cells that are held in memory and written at a time.")
    seed: int = arg(0, "Seed of labels, library sizes and noise.")
    dtype: str = arg("float32", "Precision.", choices=["float32", "bfloat16", "float16"])
    device: str | None = arg(None, "cpu, cuda, mps. Default: the best one available.")
    revision: str | None = arg(None, "Branch, tag or commit on the Hub.")
    overwrite: bool = arg(False, "Replace --output, and an unfinished one of another run.")


def read_obs(path: str) -> pd.DataFrame:
    """Read the requested cells as a table; labels stay strings."""
    suffix = Path(path).suffix
    if suffix not in (".csv", ".tsv", ".h5ad"):
        raise ValueError(f"--obs must be a .csv, .tsv or .h5ad file, got {path}.")
    if suffix == ".h5ad":
        return ad.read_h5ad(path, backed="r").obs
    try:
        obs = pd.read_csv(path, sep="," if suffix == ".csv" else "\t", dtype=str, keep_default_na=False)
    except ValueError as error:  # not UTF-8, empty, rows of several lengths
        raise ValueError(f"--obs {path} cannot be read as a table in UTF-8: {error}") from error
    return obs.drop(columns="Unnamed: 0", errors="ignore")  # the index, as pandas writes it


def check_args(args: GenerationArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is loaded."""
    if args.pipeline is None:
        raise ValueError("--pipeline is needed: the folder or the Hub id of a trained pipeline.")
    output = Path(args.output)
    if output.suffix not in (".h5ad", ".zarr"):
        raise ValueError(f"--output must end in .h5ad or .zarr, got {output}.")
    check_output(args)
    if any("=" not in condition for condition in args.condition):
        raise ValueError(f"--condition takes key=value, got {args.condition}.")
    if len({condition.split("=", 1)[0] for condition in args.condition}) < len(args.condition):
        raise ValueError(f"--condition names a column twice: {args.condition}.")
    if args.num_cells is None and args.obs is None:
        raise ValueError("Give --num_cells, or --obs with one row per cell.")
    for name in ("batch_size", "shard_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    check_device(args.device)
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1, got {args.seed}.")
    scheduler_class = getattr(diffusers, args.scheduler or "", None)
    if args.scheduler and not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise ValueError(f"diffusers has no scheduler {args.scheduler}; try DDIMScheduler or UniPCMultistepScheduler.")


def check_output(args: GenerationArguments) -> None:
    """Raise ValueError for an output that would be lost."""
    if Path(args.output).exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists; give --overwrite to replace it.")


def load_pipeline(args: GenerationArguments) -> SCRDiTPipeline:
    """Load the pipeline, with another scheduler if asked for."""
    pipe = SCRDiTPipeline.from_pretrained(args.pipeline, revision=args.revision, dtype=getattr(torch, args.dtype))
    if args.lora_weights:
        pipe.load_lora_weights(args.lora_weights)
        if (Path(args.lora_weights) / "processor").is_dir():  # composition and library sizes of the adapter's cells
            pipe.processor = SCRDiTProcessor.from_pretrained(args.lora_weights, subfolder="processor")
    elif any(Path(args.pipeline).glob("*lora_weights.safetensors")):
        logger.warning(f"{args.pipeline} holds an adapter, which is not used: --lora_weights {args.pipeline}")
    if args.scheduler:
        pipe.scheduler = getattr(diffusers, args.scheduler).from_config(pipe.scheduler.config)
    return pipe


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
    versions = {module.__name__: module.__version__ for module in (scrdit_diffusers, diffusers, torch)}
    return redact(arguments) | {"num_cells": request["num_cells"], "content_sha256": content.hexdigest()} | versions


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
        array, values = stored[key], obs.index if key == stored.attrs["_index"] else obs[key]
        if isinstance(values.dtype, pd.CategoricalDtype):
            array, values = array["codes"], values.cat.codes
        start = array.shape[0]
        array.resize((start + len(obs),))
        array[start:] = values.to_numpy()


def join_shards(shards: list[Path], blocks: list[range], temporary: Path) -> None:
    """Join the shards into one file or store, with one shard in memory at a time.

    `anndata.experimental.concat_on_disk` drops `uns` and compression, and opens all files at once.
    """
    if temporary.is_dir():  # left by a killed run
        shutil.rmtree(temporary)
    adata = read_shard(shards[0], blocks[0])
    matrices = {"X": adata.X} | {f"layers/{name}": layer for name, layer in adata.layers.items()}
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
    conditions = dict(condition.split("=", 1) for condition in args.condition) or None
    obs = read_obs(args.obs) if args.obs else None
    num_cells = len(obs) if args.num_cells is None and obs is not None else args.num_cells
    request = {"num_cells": num_cells, "conditions": conditions, "obs": obs}

    pipe = load_pipeline(args)
    check_request(pipe, args, request)
    advice = "Wait for it, or give another --output."
    with lock_folder(f"{args.output}.parts", advice) if state.is_main_process else nullcontext():
        generate(pipe, args, request, state)
    state.destroy_process_group()


def generate(pipe: SCRDiTPipeline, args: GenerationArguments, request: dict, state: PartialState) -> None:
    """Make the shards that are missing, each process its share of them, and join all."""
    output, parts, num_cells = Path(args.output), Path(f"{args.output}.parts"), request["num_cells"]
    blocks = [range(start, min(start + args.shard_size, num_cells)) for start in range(0, num_cells, args.shard_size)]
    shards = [parts / f"shard-{number:06d}.h5ad" for number in range(len(blocks))]
    if state.is_main_process:
        check_output(args)  # as no other run changes it any more
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
