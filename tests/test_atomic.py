"""Files and folders are never left half-written."""

import pytest

from scrdit_diffusers.atomic import delete_folder, write_atomically


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


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "cells.tmp").mkdir()
    (tmp_path / "cells.tmp" / "half").touch()
    with write_atomically(tmp_path / "cells") as temporary:
        assert not temporary.exists()
        temporary.mkdir()
    assert [file.name for file in tmp_path.iterdir()] == ["cells"]


def test_a_folder_is_deleted(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3.deleted").mkdir()  # of a process that was killed while it deleted
    delete_folder(tmp_path / "checkpoint-3")
    assert not list(tmp_path.iterdir())
