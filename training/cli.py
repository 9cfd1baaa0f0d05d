"""Command-line arguments of the scripts, declared once as the fields of a dataclass, and how a script is run.

Further what the scripts that use a trained pipeline share: arguments, checks before any work, tables, and the output,
which is locked, written atomically and says how it was made.
"""

import argparse
import dataclasses
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, field
from pathlib import Path

import anndata as ad
import diffusers
import pandas as pd
import torch
import zarr
from transformers import HfArgumentParser

import scrdit_diffusers
from scrdit_diffusers import SCRDiTPipeline, SCRDiTProcessor
from scrdit_diffusers.atomic import lock_folder, write_atomically
from scrdit_diffusers.checks import did_you_mean
from scrdit_diffusers.launch import check_device
from scrdit_diffusers.redaction import redact
from scrdit_diffusers.schedulers import distilled_for

logger = logging.getLogger(__name__)

AMBIGUOUS = re.compile(r"(--[\w-]+=).*(?= could match )", re.DOTALL)  # a flag that argparse shows with its value
MAY_CHANGE = " (A resumed run may change it.)"
COMPRESSION = {"compression": "gzip", "compression_opts": 1}


class Join(argparse.Action):
    """Joins the values of a flag that is given several times; the first ones replace the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Add values to those of the namespace."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else before + values)


def arg(default, help, may_change=False, **kwargs):
    """Declare a command-line argument: its default, its help, and whether a resumed run may change it."""
    shown = "" if default in (None, []) else f" (default: {default})"
    metadata = {"help": help + shown + MAY_CHANGE * may_change, **kwargs}  # argparse takes all of it
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata | {"action": Join})
    return field(default=default, metadata=metadata)


def may_change(argument: Field) -> bool:
    """Whether a resumed run may change an argument made by [`arg`]."""
    return argument.metadata["help"].endswith(MAY_CHANGE)


def check_numbers(arguments, positive: Sequence[str], not_negative: Sequence[str] = ()) -> None:
    """Raise ValueError for numbers that are out of range, or not finite; `None` passes.

    Parameters
    ----------
    arguments
        A dataclass whose fields are made by [`arg`].
    positive
        Names of the arguments that must be above zero.
    not_negative
        Names of those that may also be zero.
    """
    for name, value in vars(arguments).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} must be a finite number, got {value}; for no limit, give a large one.")
        if name in positive and value is not None and value <= 0:
            raise ValueError(f"--{name} must be positive, got {value}.")
        if name in not_negative and value is not None and value < 0:
            raise ValueError(f"--{name} must be at least 0, got {value}.")


def parse(arguments_class):
    """Parse the command line into a dataclass whose fields are made by [`arg`].

    `sys.argv` is left without credentials: trackers record it, too.

    Raises
    ------
    ValueError
        A flag is unknown. Its value is not shown: after a mistyped `--hub_token` it is a credential.
    """
    about = (sys.modules["__main__"].__doc__ or "").partition("\n")[0]
    prog = f"scrdit {Path(sys.argv[0]).stem}"
    parser = HfArgumentParser(arguments_class, prog=prog, description=about, formatter_class=argparse.HelpFormatter)
    parser.error = lambda message: type(parser).error(parser, redact(AMBIGUOUS.sub(r"\1***", message)))
    arguments, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    words, sys.argv[:] = sys.argv[:], redact(sys.argv)
    if unknown:
        known = [f"--{argument.name}" for argument in dataclasses.fields(arguments_class)]
        names = [word.partition("=")[0] for word in unknown]
        flags = [name for name in names if re.fullmatch(r"--[A-Za-z][\w-]*", name)]
        if flags:
            meant = did_you_mean([flag.replace("-", "_") for flag in flags], known)
            raise ValueError(f"Unknown flags {flags}{meant} --help lists all.")
        raise ValueError(
            f"Word {words.index(unknown[0])} after the script's name belongs to no flag. Give every value after its "
            "flag, as in --dataset cells.h5ad, and put quotes around one with blanks."
        )
    return arguments


def command_line() -> list[str]:
    """Return the command of this process for others to read: without credentials and the folders of this machine."""
    words = ["scrdit", Path(sys.argv[0]).stem]
    for word in redact(sys.argv)[1:]:
        flag, equals, value = word.rpartition("=")
        words.append(flag + equals + (Path(value).name if Path(value).is_absolute() else value))
    return words


def run(main: Callable, arguments_class: type, expected: tuple[type[Exception], ...]) -> None:
    """Run the main function of a script with its arguments; expected errors end it with their message alone.

    Neither messages nor tracebacks nor what is logged show credentials.
    """
    make_record = logging.getLogRecordFactory()

    def make_redacted_record(*args, **kwargs) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        record.msg, record.args = redact(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(make_redacted_record)
    sys.excepthook = lambda *error: print(redact("".join(traceback.format_exception(*error))), file=sys.stderr)
    try:
        main(parse(arguments_class))
    except expected as error:
        sys.exit(f"error: {redact(str(error))}")


def read_genes(path):
    """Read a text file with one gene name per line; a name may hold blanks."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--genes {path} is not text in UTF-8: {error}") from error
    return [line.strip() for line in lines if line.strip()]


# -- scripts that use a trained pipeline -------------------------------------------------------------------------------


@dataclass
class PipelineArguments:
    """Arguments of every script that uses a trained pipeline."""

    pipeline: str = arg(None, "Folder or Hub id of a trained pipeline.")
    lora_weights: str | None = arg(None, "Folder or Hub id of an adapter for the pipeline.")
    revision: str | None = arg(None, "Branch, tag or commit on the Hub.")
    output: str = arg("cells.h5ad", ".h5ad file or .zarr store to write.")
    overwrite: bool = arg(False, "Replace --output.")
    batch_size: int | None = arg(None, "Cells at a time; bounds the memory. Default: 512, fewer of over 8,192 genes.")
    seed: int = arg(0, "Seed of all that is drawn.")
    dtype: str = arg("float32", "Precision.", choices=["float32", "bfloat16", "float16"])
    device: str | None = arg(None, "cpu, cuda, mps. Default: the best one available.")


@dataclass
class CellArguments(PipelineArguments):
    """Arguments of every script that uses a trained pipeline on measured cells."""

    batch_size: int = arg(512, "Cells at a time; bounds the memory.")
    dataset: str = arg(None, "Measured cells: .h5ad file, .zarr store, dataset folder or Hub dataset id.")
    layer: str | None = arg(None, "Layer that holds the values. Default: X.")


def check_pipeline_args(
    args: PipelineArguments,
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    suffixes: Sequence[str] = (".h5ad", ".zarr"),
) -> None:
    """Raise ValueError for arguments that cannot work, before anything is loaded; numbers as in [`check_numbers`]."""
    if args.pipeline is None:
        raise ValueError("--pipeline is needed: the folder or the Hub id of a trained pipeline.")
    if isinstance(args, CellArguments) and args.dataset is None:
        raise ValueError("--dataset is needed: the measured cells.")
    if Path(args.output).suffix not in suffixes:
        raise ValueError(f"--output must end in {' or '.join(suffixes)}, got {args.output}.")
    check_output(args)
    check_numbers(args, ("batch_size", *positive), not_negative)
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1, got {args.seed}.")
    check_device(args.device)


def check_output(args: PipelineArguments) -> None:
    """Raise ValueError for an output that would be lost."""
    if Path(args.output).exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists; give --overwrite to replace it.")


def check_alone() -> None:
    """Raise ValueError if several processes were launched, each of which would do the whole job."""
    if (launched := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"{launched} processes were launched, but this script uses one: start it by python.")


@contextmanager
def lock_output(args: PipelineArguments) -> Iterator[None]:
    """Keep other runs from writing `--output` during the block."""
    with lock_folder(f"{args.output}.parts", "Wait for it, or give another --output."):
        check_output(args)  # as no other run changes it any more
        yield


@contextmanager
def naming(flag: str, value: str) -> Iterator[None]:
    """Begin the message of an error in the block with the flag whose file is wrong."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{flag} {value}: {error}") from error


def parse_conditions(conditions: Sequence[str], flag: str = "--condition") -> dict[str, str] | None:
    """Turn the words of `--condition` into a label by column; `None` if there are none."""
    if any("=" not in condition for condition in conditions):
        raise ValueError(
            f"{flag} takes key=value, got {conditions}. Put quotes around a label with blanks: 'cell_type=B cell'."
        )
    labels = dict(condition.split("=", 1) for condition in conditions)
    if len(labels) < len(conditions):
        raise ValueError(f"{flag} names a column twice: {conditions}.")
    return labels or None


def check_known_labels(pipe: SCRDiTPipeline, labels: dict[str, str], flag: str) -> None:
    """Raise ValueError for labels, by column, that the model does not know."""
    conditions = pipe.processor.conditions
    with naming(flag, " ".join(f"{key}={label}" for key, label in labels.items())):
        if unknown := [key for key in labels if key not in conditions]:
            raise ValueError(f"{unknown} are not conditions of the model: {list(conditions) or 'it has none'}.")
        example = {key: [labels.get(key, names[0])] for key, names in conditions.items()}
        pipe.processor.encode_labels(pd.DataFrame(example))


def read_table(path: str, flag: str) -> pd.DataFrame:
    """Read a table, or the obs of cells; what a text file holds stays text."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".tsv", ".h5ad"):
        raise ValueError(f"{flag} must be a .csv, .tsv or .h5ad file, got {path}.")
    if suffix == ".h5ad":
        return ad.read_h5ad(path, backed="r").obs
    options = {"sep": "," if suffix == ".csv" else "\t", "dtype": str, "keep_default_na": False}
    try:
        header = pd.read_csv(path, header=None, nrows=1, **options).iloc[0]
        table = pd.read_csv(path, **options)
    except ValueError as error:  # not UTF-8, empty, rows of several lengths
        raise ValueError(f"{flag} {path} cannot be read as a table in UTF-8: {error}") from error
    if twice := sorted(set(header[header.duplicated()])):
        raise ValueError(f"{flag} {path} has more than one column of the names {twice}; rename or drop the others.")
    return table.drop(columns="Unnamed: 0", errors="ignore")  # the index, as pandas writes it


def load_pipeline(args: PipelineArguments) -> SCRDiTPipeline:
    """Load the pipeline, with its adapter if one is given."""
    pipe = SCRDiTPipeline.from_pretrained(args.pipeline, revision=args.revision, dtype=getattr(torch, args.dtype))
    if args.lora_weights:
        load_adapter(pipe, args.lora_weights)
    elif any(Path(args.pipeline).glob("*lora_weights.safetensors")):
        logger.warning(f"{args.pipeline} holds an adapter, which is not used: --lora_weights {args.pipeline}")
    return pipe


def load_adapter(pipe: SCRDiTPipeline, folder: str) -> None:
    """Load an adapter, the processor beside it, and the scheduler that it was distilled for."""
    pipe.load_lora_weights(folder)
    if (Path(folder) / "processor").is_dir():  # composition and library sizes of the adapter's cells
        pipe.processor = SCRDiTProcessor.from_pretrained(folder, subfolder="processor")
    if name := distilled_for(pipe.transformer):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)


def choose_label(pipe: SCRDiTPipeline, labels_key: str | None) -> str:
    """Take the condition that was asked for, or the model's only one."""
    keys = pipe.processor.labels_keys
    if not keys:
        raise ValueError(
            "This needs a model with labels, and the pipeline was trained without: use --labels_key there."
        )
    if labels_key not in keys and (labels_key or len(keys) != 1):
        raise ValueError(f"--labels_key must name one of the model's conditions {keys}, got {labels_key}.")
    return labels_key or keys[0]


def best_device(args: PipelineArguments) -> str | torch.device:
    """Choose the device that was asked for, or the best one."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return args.device or best or "cpu"


def versions() -> dict[str, str]:
    """Versions of what makes results."""
    return {module.__name__: str(module.__version__) for module in (scrdit_diffusers, diffusers, torch)}


def describe(args: PipelineArguments) -> dict:
    """Say how a result was made, for `uns`: arguments, without credentials, and versions."""
    left_out = ("output", "overwrite", "device")
    given = {
        name: value
        for name, value in dataclasses.asdict(args).items()
        if name not in left_out and value not in (None, [])
    }
    return redact(given) | versions()


def write_cells(adata: ad.AnnData, output: str) -> None:
    """Write cells as .h5ad or .zarr, all or nothing."""
    with write_atomically(output) as temporary, ad.settings.override(allow_write_nullable_strings=True):
        if temporary.suffix == ".zarr":
            adata.strings_to_categoricals()  # as write_h5ad does
            ad.io.write_elem(zarr.open_group(temporary, mode="w", zarr_format=2), "/", adata)
        else:
            adata.write_h5ad(temporary, **COMPRESSION)
    print(f"Wrote {adata.n_obs} cells x {adata.n_vars} genes to {output}")


def run_job(main: Callable, arguments_class: type) -> None:
    """Run the main function of a script that writes its output at the end."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        run(main, arguments_class, (TypeError, ValueError, OSError))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing was written.")
