"""Devices and launched processes that would not do what was asked for."""

import subprocess
import sys

import pytest

from scrdit_diffusers import launch
from scrdit_diffusers.launch import check_device, check_processes


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
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
