"""Weights are read from and written to safetensors only: unpickling a file runs whatever its author put into it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # of the HTTP library that huggingface_hub uses
)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ADVICE = (
    "Weights are read from safetensors files only, because unpickling can run any code: ask the author for such a file."
)


@contextmanager
def load_safely(source: Any, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Keep a loader of diffusers, run inside, from falling back to pickled files, and make its errors clear.

    Parameters
    ----------
    source
        Folder, file or repository that is loaded, or a state dict in memory.
    kwargs
        The other arguments of the loader.

    Yields
    ------
    `kwargs` with `use_safetensors=True`.

    Raises
    ------
    ValueError
        The arguments ask for a pickled file.
    OSError
        There are no safetensors, with the reason why other files do not count; the download broke off; or the
        repository cannot be reached, with its name, the revision and what to look at.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(f"use_safetensors=False would unpickle weights. {ADVICE}")
    for name in (kwargs.get("weight_name"), None if isinstance(source, dict) else source):
        if name is not None and Path(str(name)).suffix in PICKLE_SUFFIXES:
            raise ValueError(f"{name} is a pickled file. {ADVICE}")
    try:
        yield kwargs | {"use_safetensors": True}
    except HFValidationError as error:
        raise OSError(f"{source} is neither a folder here nor the name of a repository, such as user/name.") from error
    except PermissionError:
        raise
    except OSError as error:
        if isinstance(source, (str, Path)) and any(Path(source).glob("checkpoint-*")) and "model_index" in str(error):
            raise OSError(
                f"{source} holds no pipeline yet, but checkpoints of a training: go on with "
                "training/train.py --resume_from_checkpoint latest and its other arguments."
            ) from error
        if "safetensors" in str(error) and ADVICE not in str(error):
            raise OSError(f"{error} {ADVICE}") from error
        if "cached" in str(error) or str(source) not in str(error):  # whatever went wrong, and of what is not said
            revision = f" at revision {kwargs['revision']!r}" if kwargs.get("revision") else ""
            raise OSError(
                f"Could not load {source}{revision}. Is the name right, does the revision exist, may your token read "
                f"it (`hf auth login`, or token=...), is there a network? The library says: {error}"
            ) from error
        raise
    except HTTPError as error:  # names neither the repository nor what to do, and is no OSError
        raise OSError(f"Loading {source} broke off ({error}). Load it again: whole files are kept.") from error


def saving_folder(save_directory: str | Path, kwargs: dict[str, Any]) -> str:
    """Give the folder as the string that diffusers splits into the name of a repository.

    Raises
    ------
    ValueError
        The arguments ask for pickled weights.
    """
    if kwargs.get("safe_serialization") is False:
        raise ValueError("safe_serialization=False would write pickled weights, which are never loaded; leave it out.")
    return str(Path(save_directory))


def make_readable(folder: str | Path) -> None:
    """Give saved weights the permissions of other new files; safetensors writes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(0o666 & ~mask)
