"""Writes that never leave half a file or folder: to a temporary name first, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; after the block it replaces `path`.

    If the block raises, what it wrote is deleted and `path` stays as it was. What a killed process leaves behind is
    deleted by the next call for the same `path`.

    Parameters
    ----------
    path
        The final file or folder. An existing file is replaced in one step, an existing folder is deleted first.

    Yields
    ------
    Where to write: `path` with ".tmp" before its suffix.

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
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    remove(temporary)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    if path.is_dir():
        delete_folder(path)
    os.replace(temporary, path)


def delete_folder(path: str | Path) -> None:
    """Rename a folder, then delete it, so that its name never stands for a half-deleted one."""
    deleted = Path(f"{path}.deleted")
    remove(deleted)
    os.replace(path, deleted)
    shutil.rmtree(deleted)


def remove(path: Path) -> None:
    """Delete a file or folder if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
