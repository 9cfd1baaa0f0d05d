"""Which device to use, and how many processes were launched."""

import os

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
