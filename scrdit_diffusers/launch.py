"""Which device to use, how many processes were launched, and how to start more."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def check_device(device: str | None) -> None:
    """Raise ValueError unless PyTorch can use a device, such as "cpu" or "cuda:1"; `None` passes."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error


def check_processes(num_processes: int) -> None:
    """Raise ValueError unless this program runs in as many processes as were requested.

    Otherwise each process would do the whole job and write to the same files.

    Parameters
    ----------
    num_processes
        Number of processes that Accelerate found.

    Raises
    ------
    ValueError
        Other processes were launched but not found, or `accelerate launch` has started one instead of several.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != num_processes:
        raise ValueError(
            f"{launched} processes were launched, but each finds {num_processes}: set ACCELERATE_USE_CPU=true to use "
            "several processes on CPUs, or launch one process."
        )
    if launched_one_instead_of_several():
        raise ValueError(
            "`accelerate launch` started 1 process although --num_processes is larger: on CPUs set "
            "ACCELERATE_USE_CPU=true and give --multi_gpu as well (or unset MASTER_PORT, or launch with torchrun)."
        )


def launched_one_instead_of_several() -> bool:
    """Whether `accelerate launch --num_processes 2` started only one process, as it does without a GPU."""
    return {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ


@contextmanager
def without_main_module() -> Iterator[None]:
    """Let processes that are started inside, by spawn or forkserver, not run the user's script again.

    They would start processes in turn, or wait for a lock that this process holds, where the script has no
    `if __name__ == "__main__"`; and they could not find one that is read from standard input. What they run has to be
    importable.
    """
    main = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.update(dict.fromkeys(kept))
    try:
        yield
    finally:
        main.update(kept)
