"""Errors of files of cells that are damaged: each names the file and what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

NOT_OF_THE_FILE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)  # no room, too many open files


@contextmanager
def reading(path: str | Path | None, part: str = "the file") -> Iterator[None]:
    """Turn whatever h5py, zarr, Arrow or a JSON parser raises into an error that names the file.

    Parameters
    ----------
    path
        File or folder that is read. `None` leaves errors as they are, for what lies in memory or comes from the Hub.
    part
        What of it is read, such as `obs['cell_type']`.

    Raises
    ------
    ValueError
        The part cannot be read. A ValueError or, say, a PermissionError that names the file stays as it is.
    """
    try:
        yield
    except Exception as error:
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        is_told = type(error) is ValueError or (isinstance(error, OSError) and type(error) is not OSError)
        is_other = isinstance(reason, MemoryError) or getattr(reason, "errno", None) in NOT_OF_THE_FILE
        if path is None or is_other or (is_told and str(path) in str(error)):
            raise
        kind = "" if type(reason) is ValueError else f"{type(reason).__name__}: "
        told = str(reason).rstrip(".")
        raise ValueError(f"{path}: {part} cannot be read: {kind}{told}. Copy, download or write it again.") from error


def folder_of(dataset: datasets.Dataset | datasets.IterableDataset) -> Path | None:
    """Find the folder of the files of a dataset; `None` for a stream or a dataset in memory."""
    files = dataset.cache_files if isinstance(dataset, datasets.Dataset) else []
    return Path(files[0]["filename"]).parent if files else None
