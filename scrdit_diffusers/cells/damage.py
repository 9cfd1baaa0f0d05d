"""Errors of files of cells that are damaged: each names the file and what to do."""

import errno
import traceback
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
        File, folder or dataset that is read; of a dataset of several files, the one that is damaged is named. `None`
        leaves errors as they are, for what lies in memory or comes from the Hub.
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
        path = path and (_file_of(reason) or path)
        is_told = type(error) is ValueError or (isinstance(error, OSError) and type(error) is not OSError)
        is_other = isinstance(reason, MemoryError) or getattr(reason, "errno", None) in NOT_OF_THE_FILE
        if path is None or is_other or (is_told and str(path) in str(error)):
            raise
        kind = "" if type(reason) is ValueError else f"{type(reason).__name__}: "
        told = str(reason).strip().rstrip(".")
        raise ValueError(f"{path}: {part} cannot be read: {kind}{told}. Copy, download or write it again.") from error


def _file_of(error: BaseException | None) -> str | None:
    """Find the file that `datasets` was reading, which its errors do not tell; `None` if it was reading none."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__ if error else None):
        if frame.f_globals.get("__name__", "").startswith("datasets.packaged_modules."):
            found = frame.f_locals.get("file", found)
    return found and str(found)


def folder_of(dataset: datasets.Dataset | datasets.IterableDataset) -> str | Path | None:
    """Find the folder of the files of a dataset, or the name of a stream; `None` for a dataset in memory."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.info.dataset_name
    return Path(dataset.cache_files[0]["filename"]).parent if dataset.cache_files else None
