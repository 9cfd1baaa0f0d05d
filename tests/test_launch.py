"""Devices and launched processes that would not do what was asked for, and what asks to stop."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from scrdit_diffusers import launch
from scrdit_diffusers.launch import catch_signals, check_device, check_processes, has_bfloat16


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_device_that_is_there_is_accepted(device):
    check_device(device)


@pytest.mark.parametrize("device", ["cuda:99", "cpuu"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=f"--device {device}"):
        check_device(device)


def test_as_many_processes_as_were_launched_are_accepted(monkeypatch):
    check_processes(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(2)


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^2 .* 1: .*ACCELERATE_USE_CPU"):
        check_processes(1)


def test_one_process_instead_of_several_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ValueError, match="--num_processes"):
        check_processes(1)


SCRIPT = """
import importlib.util, os, sys
assert os.getpid() == int(os.environ.setdefault("FIRST", str(os.getpid()))), "the script runs again"
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
spec = importlib.util.spec_from_file_location("launch", sys.argv[1])  # alone, which is faster
launch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launch)
before = __file__, __spec__
for method in ("spawn", "forkserver"):
    with ProcessPoolExecutor(1, get_context(method)) as executor:
        print(list(launch.without_main_module()(executor.map)(abs, [-3])))
assert (__file__, __spec__) == before
"""


def test_processes_do_not_run_the_script_again(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), launch.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["[3]", "[3]"], done.stderr


def wait_for(find_signal):
    while find_signal() is None:
        time.sleep(0.01)
    return find_signal()


def be_told(number, ignored):
    """End with the number of the signal that is found."""
    signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)  # whatever the tests were started with
    with catch_signals() as find_signal:
        os.kill(os.getpid(), number)
        os._exit(0 if ignored and find_signal() is None else wait_for(find_signal))


def lose_the_terminal(*_):
    """End with the signal that a process finds, and can still print after, whose terminal is closed."""
    import pty

    child, terminal = pty.fork()
    if child:
        assert os.read(terminal, 5) == b"ready"
        os.close(terminal)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.stderr = os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with catch_signals() as find_signal:
        os.write(2, b"ready")
        number = wait_for(find_signal)
        print("still there", file=sys.stderr, flush=True)
        os._exit(number)


@pytest.mark.parametrize(
    ("function", "name", "ignored", "found"),
    [
        (be_told, "SIGINT", False, "SIGINT"),
        (be_told, "SIGTERM", False, "SIGTERM"),
        (be_told, "SIGHUP", False, "SIGHUP"),
        (be_told, "SIGUSR1", False, "SIGUSR1"),
        (be_told, "SIGHUP", True, None),
        (lose_the_terminal, "SIGHUP", False, "SIGHUP"),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP", "a batch system", "nohup", "closed terminal"],
)
def test_a_signal_is_found_and_does_not_end_the_process(function, name, ignored, found):
    arguments = (getattr(signal, name), ignored)
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    process.join(60)
    process.kill()  # if it is still there
    process.join()
    assert process.exitcode == (getattr(signal, found) if found else 0)


@pytest.mark.parametrize(("variable", "found"), [("ACCELERATE_MIXED_PRECISION", signal.SIGTERM), ("OTHER", None)])
def test_the_end_of_a_launcher_asks_to_stop_and_that_of_a_shell_does_not(monkeypatch, variable, found):
    monkeypatch.setenv(variable, "no")
    with catch_signals() as find_signal:
        assert find_signal() is None
        monkeypatch.setattr(launch.os, "getppid", lambda: 1)
        assert find_signal() == found


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with catch_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("capabilities", "expected"), [({"avx512_bf16": True}, True), ({"avx512_f": True}, False)])
def test_bfloat16_is_looked_up_among_the_capabilities(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_bfloat16(torch.device("cpu")) == expected


def test_older_pytorch_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has_bfloat16(torch.device("cpu"))
