"""Which device to use, how many processes were launched, how to start more, and whether they were asked to stop."""

import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")  # signals, where the system has them


def check_device(device: str | None) -> None:
    """Raise ValueError unless PyTorch can use a device, such as "cpu" or "cuda:1"; `None` passes."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # which older PyTorch lacks
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last: ARM


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


def watch_launcher() -> Callable[[], bool]:
    """Give a function that tells whether the launcher that started this process, if one did, has ended since now."""
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    parent = os.getppid()
    return lambda: bool(launched) and os.getppid() != parent


@contextmanager
def catch_signals() -> Iterator[Callable[[], int | None]]:
    """Collect what asks to stop, instead of stopping in the middle of a step.

    That is Ctrl-C, SIGTERM, the end of the terminal (SIGHUP, unless it is ignored as `nohup` has it), what batch
    systems send before they kill (SIGUSR1, SIGXCPU), and the end of `accelerate launch` or torchrun, which does not
    always stop what it has launched.

    Yields
    ------
    A function that gives the number of the signal that came, SIGTERM for a launcher that is gone, or `None`.
    """
    came: list[int] = []
    launcher_is_gone = watch_launcher()

    def remember(number: int, frame: object) -> None:
        came.append(number)
        if number == getattr(signal, "SIGHUP", None):
            silence_terminal()

    def find() -> int | None:
        if launcher_is_gone():
            came.append(signal.SIGTERM)
        return came[0] if came else None

    names = [name for name in STOPPING if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    if handlers.get(getattr(signal, "SIGHUP", None)) is signal.SIG_IGN:
        del handlers[signal.SIGHUP]
    for number in handlers:
        signal.signal(number, remember)
    try:
        yield find
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def silence_terminal() -> None:
    """Send what is printed nowhere, unless it goes to a file: the terminal, or the program that reads it, is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with suppress(OSError):  # it is closed
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)
