"""Writes that never leave half a file or folder: to a temporary name first, then renamed; and locks of folders."""

import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; after the block it replaces `path`.

    If the block raises, what it wrote is deleted and `path` stays as it was. What a killed process leaves behind is
    deleted by the next call for the same `path` on the same computer. Of processes that write it at once, the last one
    counts.

    Parameters
    ----------
    path
        The final file or folder. An existing file is replaced in one step, an existing folder is deleted first.

    Yields
    ------
    Where to write: `path` with ".tmp" and more before its suffix.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from scrdit_diffusers.atomic import write_atomically
    >>> path = Path(tempfile.mkdtemp()) / "metrics.json"
    >>> with write_atomically(path) as temporary:
    ...     _ = temporary.write_text("{}")
    >>> path.read_text()
    '{}'
    """
    path = Path(path)
    temporary = temporary_name(path, "tmp")
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    if path.is_dir():
        delete_folder(path)
    os.replace(temporary, path)


@contextmanager
def write_into(folder: str | Path, last: Sequence[str] = ()) -> Iterator[Path]:
    """Give a temporary folder to write to; after the block its files go into `folder`, which may hold others.

    If the block raises, for a full disk say, `folder` stays as it was. Only renaming is left to be done then, and a
    process that is killed at it leaves a folder without the files named `last`.

    Parameters
    ----------
    folder
        The final folder; made if there is none. Its files of other names stay.
    last
        Files of `folder` without which it counts for nothing, the first one most of all: those of before are deleted in
        this order, even if there are no new ones, and new ones come at the end in the opposite order.

    Yields
    ------
    An empty folder in `folder`.
    """
    folder = Path(folder)
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder / "unfinished", "tmp")
    try:
        temporary.mkdir()
        yield temporary
        files = {path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if not path.is_dir()}
        for file in last:
            (folder / file).unlink(missing_ok=True)
        for file in [*sorted(files - set(last)), *(file for file in reversed(last) if file in files)]:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / file, folder / file)
    finally:
        remove(temporary)
        if not existed:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def lock_folder(folder: str | Path, advice: str) -> Iterator[None]:
    """Keep other processes that ask for the same from writing to `folder` until the end of the block.

    The lock is of the file `.lock` in it; the system takes it back when the process ends, however it does.

    Parameters
    ----------
    folder
        Made if there is none, and removed in the end if it is empty then.
    advice
        What to do if it is in use; ends the message.

    Raises
    ------
    ValueError
        Another process has it, or a file is in its way.
    OSError
        It cannot be written.
    """
    folder = Path(folder)
    path = folder / LOCK_NAME
    if taken := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise ValueError(f"{folder} cannot be a folder: {taken} is a file. Give another name.")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "a+") as file:
            if fcntl is not None:
                _lock(file, path, folder, advice)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # the process that had it removed the file in the meantime
            file.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
            try:
                yield
            finally:
                with suppress(OSError):  # it is open (Windows), or not there any more
                    path.unlink()
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
            return


def _lock(file, path: Path, folder: Path, advice: str) -> None:
    """Take the lock of an open file, if its file system has locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forks of this process do not hold it
    except (BlockingIOError, PermissionError) as error:  # which one depends on the system
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise ValueError(f"{folder} is in use by another run, {owner}. {advice}") from error
    except OSError:
        pass


def delete_folder(path: str | Path) -> None:
    """Rename a folder, then delete it, so that its name never stands for a half-deleted one."""
    deleted = temporary_name(Path(path), "deleted")
    os.replace(path, deleted)
    shutil.rmtree(deleted)


def temporary_name(path: Path, word: str) -> Path:
    """Give a name beside `path` that nothing has, and remove what has such a name and belongs to a dead process."""
    stem, suffix = re.escape(f"{path.stem}.{word}-{_HOST}-"), re.escape(path.suffix)
    for left in path.parent.iterdir() if path.parent.is_dir() else []:
        made = re.fullmatch(rf"{stem}(\d+)-\w+{suffix}", left.name)
        if made and not psutil.pid_exists(int(made[1])):
            remove(left)
    return path.with_name(f"{path.stem}.{word}-{_HOST}-{os.getpid()}-{secrets.token_hex(3)}{path.suffix}")


def remove(path: Path) -> None:
    """Delete a file or folder if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
