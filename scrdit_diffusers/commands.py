"""The scripts of `training/` without a checkout: `scrdit train ...` in a shell, `train(adata, ...)` in Python."""

import difflib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd

from .checks import label_categories, layer_names
from .pipeline_scrdit import SCRDiTPipeline
from .redaction import redact

JOBS = ("denoise", "annotate", "simulate", "augment", "complete", "translate", "interpolate")
COMMANDS = ("train", "generate", "evaluate", *JOBS, "distill", "demo", "convert_checkpoint")
USAGE = f"""usage: scrdit COMMAND [arguments]

  scrdit train --dataset cells.h5ad --labels_key cell_type --output_dir my-model
  scrdit generate --pipeline my-model --num_cells 1000 --output new_cells.h5ad
  scrdit evaluate --dataset cells.h5ad --labels_key cell_type --split_dir split
  scrdit denoise --pipeline my-model --dataset cells.h5ad --output denoised.h5ad
  scrdit annotate --pipeline my-model --dataset cells.h5ad --output annotated.h5ad
  scrdit simulate --pipeline my-model --obs design.csv --effects effects.csv --output simulated.h5ad
  scrdit augment --pipeline my-model --dataset cells.h5ad --to 200 --output balanced.h5ad
  scrdit complete --pipeline my-model --dataset panel.h5ad --output completed.h5ad
  scrdit translate --pipeline my-model --dataset cells.h5ad --condition batch=B --output translated.h5ad
  scrdit interpolate --pipeline my-model --dataset cells.h5ad --start_cells A --end_cells B --output path.h5ad
  scrdit distill --pipeline my-model --output_dir distilled
  scrdit demo                      train on real cells, generate new ones and compare them, in outputs/demo
  scrdit convert_checkpoint ...    turn a checkpoint of the original scRDiT into a pipeline
  scrdit path COMMAND              print where its script is, as in: accelerate launch "$(scrdit path train)" ...
  scrdit --version                 print the version

`scrdit COMMAND --help` lists the arguments of {", ".join(COMMANDS)}."""


def script_path(command: str) -> Path:
    """Find the script of a command: installed with the package, or in the checkout that the package is in."""
    package = Path(__file__).parent
    folder = package / "scripts"
    return (folder if folder.is_dir() else package.parent / "training") / f"{command}.py"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command of the shell in this process; `arguments` is what follows `scrdit`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(USAGE)
        return
    if arguments == ["--version"]:
        print(f"scrdit_diffusers {version('scrdit_diffusers')}")
        return
    command, *rest = arguments
    if command == "path" and len(rest) == 1 and rest[0] in COMMANDS:
        print(script_path(rest[0]))
        return
    if command not in COMMANDS:
        known = ", ".join([*COMMANDS, "path COMMAND"])
        sys.exit(f"error: unknown command {' '.join(redact(arguments))}; the commands are {known}.")
    script = script_path(command)
    sys.argv = [str(script), *rest]
    sys.path.insert(0, str(script.parent))  # scripts import each other by name
    try:
        runpy.run_path(str(script), run_name="__main__")
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: {error.name}, which scrdit {command} needs, is not installed: "
            "pip install 'scrdit-diffusers[train]'"
        )


def train(
    adata: ad.AnnData | str | os.PathLike,
    output_dir: str | os.PathLike = "scrdit-model",
    labels_key: str | Sequence[str] | None = None,
    num_processes: int = 1,
    **options: Any,
) -> SCRDiTPipeline:
    """Train a pipeline on cells: one call of `training/train.py`, in a process of its own.

    A progress bar shows the loss and the time left. Interrupting the call (Ctrl-C, or the stop button of a notebook)
    saves a checkpoint; the same call with `resume_from_checkpoint="latest"` continues to the result of an
    uninterrupted one.

    Parameters
    ----------
    adata
        Cells, raw counts unless the options say otherwise, or what `--dataset` takes: a path, a pattern, an id on the
        Hub.
    output_dir
        Folder of the pipeline, its model card, the checkpoints and the logs.
    labels_key
        Column or columns of `adata.obs` that condition the model; `None` trains without labels.
    num_processes
        Number of processes, one for each GPU.
    options
        Any other argument of the script by its name, such as `max_train_steps=500`, `n_top_genes=3000` or
        `overwrite_output_dir=True`; `scrdit train --help` lists them. Only `dry_run` is for the shell alone.

    Returns
    -------
    The trained pipeline, as [`SCRDiTPipeline.from_pretrained`] loads it from `output_dir`.

    Raises
    ------
    ValueError
        An argument or the cells are not what the script expects.
    RuntimeError
        Training failed in another way; the output of the script is shown above.
    KeyboardInterrupt
        Training was interrupted; its checkpoint is saved.

    Examples
    --------
    >>> import scrdit_diffusers
    >>> pipe = scrdit_diffusers.train(adata, labels_key="cell_type", output_dir="my-model")  # doctest: +SKIP
    >>> cells = pipe(num_cells=100, conditions={"cell_type": "B"}).adata  # doctest: +SKIP
    """
    if options.get("dry_run"):
        raise ValueError("dry_run=True would leave no pipeline to return; run scrdit train --dry_run in a shell.")
    keys = [labels_key] if isinstance(labels_key, str) else list(labels_key or [])
    options = {"output_dir": output_dir, "labels_key": keys} | options
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if token := options.pop("hub_token", None):
            environment["HF_TOKEN"] = token  # in the command, others could see it
        if isinstance(adata, ad.AnnData):
            options["dataset"] = Path(folder) / "adata.h5ad"
            _write_used(adata, keys, options, options["dataset"])
            environment["HF_DATASETS_CACHE"] = folder  # what is converted for this call is of no use to another
        else:
            options["dataset"] = adata
        _run_script([*_launch(num_processes), str(script_path("train")), *_flags(options)], environment)
    if not options.get("lora_rank"):
        return SCRDiTPipeline.from_pretrained(Path(output_dir))
    has_base = (Path(output_dir) / "model_index.json").exists()  # where genes or labels are new
    pipe = SCRDiTPipeline.from_pretrained(Path(output_dir) if has_base else options["pretrained_model_name_or_path"])
    pipe.load_lora_weights(str(output_dir))
    return pipe


def _launch(num_processes: int) -> list[str]:
    """Python, and Accelerate's launcher for several processes, which would print the command after an error."""
    if num_processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", str(num_processes)]


def _flags(options: dict[str, Any]) -> list[str]:
    """Turn keyword arguments into flags; `None` and empty lists are left out."""
    flags = []
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        if value is not None and values:
            flags += [f"--{name}", *map(str, values)]
    return flags


def _write_used(adata: ad.AnnData, keys: list[str], options: dict[str, Any], path: Path) -> None:
    """Write what training reads of `adata`: the values, the columns of labels and that of gene ids."""
    layer, gene_key = options.pop("layer", None), options.get("gene_key")
    for name, wanted, there in (
        ("labels_key", keys, adata.obs.columns),
        ("gene_key", [gene_key] if gene_key else [], adata.var.columns),
        ("layer", [layer] if layer else [], layer_names(adata)),
    ):
        if missing := [key for key in wanted if key not in there]:
            closest = [match for key in missing for match in difflib.get_close_matches(key, list(map(str, there)), n=1)]
            meant = f", did you mean {closest}?" if closest else ";"
            raise ValueError(f"{name}: adata has no {missing}{meant} it has {list(there)}.")
    # As text, since a file cannot hold labels of any type, such as dates.
    labels = {key: adata.obs[key].astype(object).map(str) for key in keys}
    obs = {key: pd.Categorical(texts, categories=label_categories(adata.obs, key)) for key, texts in labels.items()}
    used = ad.AnnData(adata.layers[layer] if layer else adata.X, pd.DataFrame(obs, index=adata.obs_names))
    used.var_names = adata.var_names
    if gene_key:
        used.var[gene_key] = adata.var[gene_key]
    with ad.settings.override(allow_write_nullable_strings=True):
        used.write_h5ad(path)


def _run_script(command: list[str], environment: dict[str, str]) -> None:
    """Run a script, show its output where that of this process is shown, and raise its error here."""
    # Not in this process's group, so that an interrupt reaches the script once, from here.
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        assert process.stdout is not None
        output, interrupted = b"", False
        while True:
            try:
                if not (chunk := os.read(process.stdout.fileno(), 1 << 16)):
                    break
                output = (output + chunk)[-(1 << 16) :]
                sys.stderr.write(chunk.decode(errors="replace"))
                sys.stderr.flush()
            except KeyboardInterrupt:
                interrupted = True
                os.killpg(process.pid, signal.SIGINT)
    code = process.returncode
    if interrupted and code:
        raise KeyboardInterrupt('Interrupted; continue with resume_from_checkpoint="latest".')
    if code:
        lines = output.decode(errors="replace").replace("\r", "\n").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if errors:
            raise ValueError(errors[-1])
        raise RuntimeError(f"Training ended with exit code {code}; its last line: {lines[-1] if lines else ''}")


if __name__ == "__main__":
    main()
