"""Files and folders are never left half-written."""

import os
import signal
from types import SimpleNamespace

import pytest
from scripts import start_in_block

from scrdit_diffusers import atomic
from scrdit_diffusers.atomic import delete_folder, lock_folder, write_atomically, write_into


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_written_whole(tmp_path, before):
    path = tmp_path / "metrics.json"
    if before:
        path.write_text(before)
    with write_atomically(path) as temporary:
        temporary.write_text("new")
        assert not before or path.read_text() == before
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with pytest.raises(error), write_atomically(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_a_folder(tmp_path):
    path = tmp_path / "cells"
    for name in ("a", "b"):
        with write_atomically(path) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [file.name for file in path.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [path]


def test_two_processes_write_one_file(tmp_path):
    path = tmp_path / "metrics.json"
    other = start_in_block("write_atomically", path, then="found.write_text('other')")
    with write_atomically(path) as temporary:
        temporary.write_text("own")
    assert path.read_text() == "own"
    other.communicate()
    assert other.returncode == 0 and path.read_text() == "other" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_is_removed(tmp_path, folder):
    path = tmp_path / "cells.h5ad"
    make = "(found.mkdir(), (found / 'half').touch())" if folder else "found.touch()"
    other = start_in_block("write_atomically", path, then=f"{make}; os.kill(os.getpid(), 9)")
    other.communicate()
    assert other.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    with write_atomically(path) as temporary:
        temporary.touch()
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_deleted(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "file").touch()
    delete_folder(tmp_path / "checkpoint-3")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def model(tmp_path):
    """A folder that is complete with `index`, with a file of its own."""
    for name in ("index", "weights", "genes", "log"):
        (tmp_path / "model" / "part").mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / "part" / name).write_text("old")
    (tmp_path / "model" / "index").write_text("old")
    return tmp_path / "model"


def read(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write_model(folder):
    (folder / "part").mkdir()
    for name in ("index", "part/weights", "part/genes"):
        (folder / name).write_text("new")


def test_files_go_into_a_folder_that_keeps_others(model):
    with write_into(model, ["index", "part/index"]) as temporary:
        write_model(temporary)
        assert read(model)["part/weights"] == "old"
    assert read(model) == {"index": "new", "part/weights": "new", "part/genes": "new", "part/log": "old"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_folder_as_it_was(model, tmp_path, error):
    before = read(model)
    for folder in (model, tmp_path / "none"):
        with pytest.raises(error), write_into(folder, ["index"]) as temporary:
            write_model(temporary)
            raise error
    assert read(model) == before and not (tmp_path / "none").exists()


@pytest.mark.parametrize("moment", range(3))
def test_a_kill_between_two_files_leaves_a_folder_without_its_index(model, monkeypatch, moment):
    calls = []

    def replace(source, target):
        if len(calls) == moment:
            raise KeyboardInterrupt
        calls.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), write_into(model, ["index"]) as temporary:
        write_model(temporary)
        patch.setattr(atomic, "os", SimpleNamespace(**vars(os) | {"replace": replace}))
    assert "index" not in read(model)
    with write_into(model, ["index"]) as temporary:
        write_model(temporary)
    assert read(model)["index"] == "new"


def test_a_folder_that_another_process_holds_is_refused(tmp_path):
    folder = tmp_path / "model"
    other = start_in_block("lock_folder", folder, "")
    with pytest.raises(ValueError, match=f"model is in use by another run, process {other.pid} .*Wait"):
        with lock_folder(folder, "Wait."):
            pass
    other.communicate()
    assert not folder.exists()
    with lock_folder(folder, ""):
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_a_killed_process_holds_nothing(tmp_path):
    other = start_in_block("lock_folder", tmp_path, "")
    other.kill()
    other.communicate()
    assert (tmp_path / ".lock").exists()
    with lock_folder(tmp_path, ""):
        pass


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "cells.h5ad").touch()
    for name in ("cells.h5ad", "cells.h5ad/parts"):
        with (
            pytest.raises(ValueError, match=r"cannot be a folder: .*cells\.h5ad is a file"),
            lock_folder(tmp_path / name, ""),
        ):
            pass
