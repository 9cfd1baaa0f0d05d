"""One AnnData file, of which only what is asked for is read: some rows of a matrix, a column of obs, the genes.

Files come from many hands and disks, so that what is read is checked: a damaged pointer would crash SciPy, and a chunk
that a .zarr store lacks would be read as zeros.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import datasets
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.io import read_elem

from scrdit_diffusers.checks import (
    SYNTHETIC_KEY,
    as_csr,
    check_label,
    check_values,
    get_matrix,
    matrix_name,
    native,
)

from .damage import reading
from .layout import class_label, pa_type_name
from .moments import ROWS_PER_CHUNK

logger = logging.getLogger(__name__)

ROWS_OF_COLUMN = 2**20  # read of a column at a time
VALUES_PER_CHUNK = 2**22  # read at a time, whatever the number of genes
ROWS_OF_HEAD = 1000  # looked at before anything is converted
SPARSE = ("csr_matrix", "csc_matrix")
UNREADABLE = (OSError, ValueError)  # what [`reading`] raises


def _is_array(stored: Any) -> bool:
    """Whether an element of a file is an array, not a group."""
    return hasattr(stored, "shape")


def _array_of(stored: Any) -> Any:
    """Take the array with one entry for each row of a column: of codes, or of values of which some are missing."""
    return stored if _is_array(stored) else stored["codes" if "codes" in stored else "values"]


def _rows_of(stored: Any, rows: slice) -> np.ndarray:
    """Read some values of an array of numbers or strings."""
    is_text = isinstance(stored, h5py.Dataset) and h5py.check_string_dtype(stored.dtype) is not None
    values = (stored.asstr() if is_text else stored)[rows]
    return values.astype(object) if values.dtype.kind in "TUS" else native(values)


def _num_missing_chunks(stored: Any) -> int:
    """Count the chunks of a .zarr array that are not stored: lost, or left out as they hold nothing but zeros."""
    return max(0, stored.nchunks - stored.nchunks_initialized) if isinstance(stored, zarr.Array) else 0


class CellFile:
    """Rows of a .h5ad or .zarr file, read when they are asked for.

    Parameters
    ----------
    path
        The file, or the folder of the zarr store.

    Raises
    ------
    ValueError
        It cannot be read, or holds no AnnData.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.group: Any = zarr.open_group(path, mode="r") if self.path.is_dir() else h5py.File(path, "r")
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be opened as a .h5ad file or .zarr store: {error}. Copy, download or write it again."
            ) from error
        try:
            with reading(path, "obs or var"):
                self._read_sizes()
        except ValueError:
            self.__exit__()
            raise
        self._categories: dict[str, pd.Index | None] = {}
        self._by_genes: dict[str | None, sp.csr_matrix] = {}

    def _read_sizes(self) -> None:
        """Find the columns of obs and the numbers of cells and genes; raise ValueError where there are none."""
        path = self.path
        lacking = [key for key in ("obs", "var") if key not in self.group]
        if lacking:
            raise ValueError(f"{path} holds no AnnData: it lacks {' and '.join(lacking)}. Was it written to its end?")
        for key in ("obs", "var"):
            if not {"column-order", "_index"} <= set(self.group[key].attrs):
                raise ValueError(
                    f"{key} of {path} is not stored as anndata 0.7 and later do; read the file with anndata.read_h5ad "
                    "and write it again."
                )
        columns: Any = self.group["obs"].attrs["column-order"]
        self.columns = [str(key) for key in columns]
        self.n_obs, self.n_vars = self._length("obs"), self._length("var")

    def __enter__(self) -> "CellFile":
        return self

    def __exit__(self, *error: object) -> None:
        if isinstance(self.group, h5py.File):
            self.group.close()

    def var(self, needed: str | None = None) -> pd.DataFrame:
        """Genes, with the columns of var that can be read; all of them must be if it is `needed`."""
        stored, columns = self.group["var"], {}
        index = self._index("var")
        for key in map(str, stored.attrs["column-order"]):
            try:
                with self._reading(f"var[{key!r}]"):
                    columns[key] = pd.Series(read_elem(stored[key])).set_axis(index)
            except UNREADABLE as error:
                if key == needed:
                    raise
                logger.warning("var[%r] is left out. %s", key, error)
        return pd.DataFrame(columns, index=index)

    def _index(self, frame: str) -> pd.Index:
        """Read the names of cells (obs) or genes (var)."""
        stored = self.group[frame]
        with self._reading(frame):
            return pd.Index(read_elem(stored[stored.attrs["_index"]])).astype(str)

    def _length(self, frame: str) -> int:
        """Count the rows of obs or var."""
        stored = self.group[frame]
        return _array_of(stored[stored.attrs["_index"]]).shape[0]

    def _reading(self, part: str) -> AbstractContextManager[None]:
        """See [`reading`]."""
        return reading(self.path, part)

    # -- obs -------------------------------------------------------------------------------------------------------

    def categories(self, key: str) -> pd.Index | None:
        """Categories of a column of obs; `None` for one that is not categorical."""
        if key not in self._categories:
            stored, names = self.group["obs"][key], None
            if stored.attrs.get("encoding-type") == "categorical":
                names = stored["categories"]
            elif "categories" in stored.attrs:  # anndata 0.7
                names = self.group["obs"][stored.attrs["categories"]]
            self._categories[key] = None if names is None else pd.Index(read_elem(names))
        return self._categories[key]

    def column(self, key: str, rows: slice) -> pd.Series:
        """Read some rows of a column of obs."""
        stored, names = self.group["obs"][key], self.categories(key)
        values = _rows_of(_array_of(stored), rows)
        if names is not None:
            return pd.Series(pd.Categorical.from_codes(values, names))
        if not _is_array(stored):  # numbers or strings, of which some are missing
            return pd.Series(values).astype(object).mask(stored["mask"][rows])
        return pd.Series(values)

    def check_column(self, key: str, is_label: bool = True) -> None:
        """Raise ValueError for a column of obs that cannot be read, of which a part is missing, or that is no label."""
        name = f"obs[{key!r}]"
        try:
            if is_label or key != SYNTHETIC_KEY:
                check_label(pd.DataFrame(columns=self.columns), key)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

        with self._reading(name):
            values, names = _array_of(self.group["obs"][key]), self.categories(key)
            self.column(key, slice(0, 1))
        if values.shape != (self.n_obs,):
            raise ValueError(f"{self.path}: {name} has the shape {values.shape}, but obs has {self.n_obs} cells.")
        # The code of a single category is zero, which may be left out.
        if (missing := _num_missing_chunks(values)) and (names is None or len(names) > 1):
            raise ValueError(
                f"{self.path}: {missing} chunks of {name} are missing. They are lost, which would give their cells the "
                "first label, or were left out as they hold nothing but it: copy the store again, or write it with "
                "zarr.config.set({'array.write_empty_chunks': True})."
            )

    def usable_columns(self, reserved: Sequence[str] = ()) -> Iterator[str]:
        """Name the columns of obs that can be read to their end and have none of the `reserved` names."""
        for key in self.columns:
            try:
                if key in reserved:
                    raise ValueError(f"{self.path}: the dataset needs this name itself; rename the column to keep it.")
                self.check_column(key, is_label=False)
                is_text = _array_of(self.group["obs"][key]).dtype.kind not in "biuf"  # which takes memory
                for _ in self._parts_of_column(key, ROWS_PER_CHUNK if is_text else 10 * ROWS_PER_CHUNK):
                    pass  # damage beyond the first cells, which would stop a conversion
            except UNREADABLE as error:
                logger.warning("obs[%r] is left out. %s", key, error)
            else:
                yield key

    def labels(self, key: str) -> tuple[pd.Index, int]:
        """Different values of a column of obs, and the number of cells without one; the column is read in parts."""
        found, num_missing = pd.Index([]), 0
        for i, part in enumerate(self._parts_of_column(key, ROWS_OF_COLUMN)):
            num_missing += int(part.isna().sum())
            values = pd.Index(part.dropna().unique())
            found = values if i == 0 else found.union(values, sort=False)
        return found, num_missing

    def _parts_of_column(self, key: str, num_rows: int) -> Iterator[pd.Series]:
        """Read a column of obs, some rows at a time."""
        for start in range(0, self.n_obs, num_rows):
            with self._reading(f"obs[{key!r}]"):
                part = self.column(key, slice(start, start + num_rows))
            yield part

    def num_generated(self) -> int:
        """Count the cells that the file marks as generated."""
        if SYNTHETIC_KEY not in self.columns:
            return 0
        marks = self.column(SYNTHETIC_KEY, slice(0, None))
        return int(marks.sum()) if pd.api.types.is_bool_dtype(marks) else 0

    def column_type(self, key: str) -> Any:
        """Type that a column of obs has in a dataset, without reading all of it."""
        names, values = self.categories(key), _array_of(self.group["obs"][key])
        if names is not None:
            return class_label([str(name) for name in names])
        dtype = native(np.empty(0, values.dtype)).dtype if values.dtype.kind in "biuf" else None
        return datasets.Value("string" if dtype is None else pa_type_name(dtype))

    # -- values ----------------------------------------------------------------------------------------------------

    def stored(self, layer: str | None) -> Any:
        """X (`layer=None`) or a layer, as it lies in the file; `None` where there is none."""
        name = "X" if layer is None else f"layers/{layer}"
        found = self.group[name] if name in self.group else None
        return None if found is None or found.attrs.get("encoding-type") == "null" else found

    def num_values(self, layer: str | None) -> int:
        """Count the stored values; 0 for a dense matrix, where the number of those that are not zero is not known."""
        stored = self.stored(layer)
        return 0 if _is_array(stored) else stored["data"].shape[0]

    def matrix(self, layer: str | None, rows: slice) -> sp.csr_matrix:
        """Values of some rows of X (`layer=None`) or of a layer.

        Raises
        ------
        ValueError
            The rows are damaged, or not stored as numbers.
        """
        return self._rows_of_matrix(self.stored(layer), rows, layer)

    def _rows_of_matrix(self, stored: Any, rows: slice, name: str | None) -> sp.csr_matrix:
        if _is_array(stored):
            return as_csr(stored[rows])
        if stored.attrs["encoding-type"] == "csr_matrix":
            return self._slice(stored, rows)
        if name not in self._by_genes:
            logger.warning(
                "%s is stored by genes (CSC) and is read as a whole; store it as CSR to stream it.", self.path
            )
            self._by_genes[name] = sp.csr_matrix(self._slice(stored, slice(0, None)).T)
        return self._by_genes[name][rows]

    @staticmethod
    def _slice(stored: Any, rows: slice) -> sp.csr_matrix:
        """Read some rows of a CSR matrix, or columns of a CSC one as rows."""
        num_columns = int(stored.attrs["shape"][int(stored.attrs["encoding-type"] == "csr_matrix")])
        stop = None if rows.stop is None else rows.stop + 1
        indptr = np.asarray(stored["indptr"][rows.start : stop]).astype(np.int64)
        if indptr[0] < 0 or (np.diff(indptr) < 0).any() or indptr[-1] > stored["data"].shape[0]:
            raise ValueError("its indptr decreases or points beyond its values")
        part = slice(int(indptr[0]), int(indptr[-1]))
        data, indices = native(stored["data"][part]), np.asarray(stored["indices"][part]).astype(np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < num_columns:
            raise ValueError(f"its indices go from {indices.min()} to {indices.max()}, expected 0 to {num_columns - 1}")
        shape = (len(indptr) - 1, num_columns)
        small = np.int32 if max(num_columns, len(indices)) < 2**31 else np.int64
        return sp.csr_matrix((data, indices.astype(small), (indptr - indptr[0]).astype(small)), shape=shape)

    def chunks(self, layer: str | None) -> Iterator[slice]:
        """Rows to read at a time: `ROWS_PER_CHUNK`, or as many as hold `VALUES_PER_CHUNK` values, but at least one."""
        stored, start = self.stored(layer), 0
        by_cells = not _is_array(stored) and stored.attrs["encoding-type"] == "csr_matrix"
        while start < self.n_obs:
            stop = min(start + ROWS_PER_CHUNK, self.n_obs)
            if _is_array(stored):
                stop = min(stop, start + VALUES_PER_CHUNK // max(1, stored.shape[1]))
            elif by_cells:
                ends = stored["indptr"][start : stop + 1]
                stop = start + int(np.searchsorted(ends, ends[0] + VALUES_PER_CHUNK, side="right")) - 1
            stop = max(stop, start + 1)
            yield slice(start, stop)
            start = stop

    # -- all of it -------------------------------------------------------------------------------------------------

    def read(self) -> ad.AnnData:
        """Read everything into memory; what cannot be read is left out with a warning.

        Raises
        ------
        ValueError
            Neither X nor any layer can be read.
        """
        columns = list(self.usable_columns())
        try:
            with reading(self.path):
                adata = ad.read_zarr(self.path) if self.path.is_dir() else ad.read_h5ad(self.path)
        except UNREADABLE as error:
            logger.warning("%s Meanwhile it is read in parts.", error)
            return self._parts(columns)
        adata.obs = adata.obs[[key for key in adata.obs if key in columns]]
        return adata

    def _parts(self, columns: Sequence[str]) -> ad.AnnData:
        """Read each element on its own, see [`read`], and these columns of obs."""
        adata = ad.AnnData(obs=pd.DataFrame(index=self._index("obs")), var=self.var())

        def put(name: str, place: Callable[[Any], None]) -> None:
            """Read an element and put it into its place, or warn."""
            try:
                with self._reading(name):
                    stored = self.group[name]
                    old_categories = name.startswith("obs/") and "encoding-type" not in stored.attrs
                    place(self.column(name[4:], slice(0, None)).array if old_categories else read_elem(stored))
            except UNREADABLE as error:
                logger.warning("%s is left out. %s", name, error)

        for key in columns:
            put(f"obs/{key}", partial(adata.obs.__setitem__, key))
        for group in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
            for key in self.group[group] if group in self.group else ():
                put(f"{group}/{key}", partial(getattr(adata, group).__setitem__, key))
        for name in ("X", "raw"):
            if name in self.group:
                put(name, partial(setattr, adata, name))
        if adata.X is None and not len(adata.layers):
            raise ValueError(f"{self.path}: neither X nor a layer can be read. Copy, download or write it again.")
        return adata

    # -- checks ----------------------------------------------------------------------------------------------------

    def check(self, layer: str | None, expect_counts: bool) -> None:
        """Raise ValueError unless the layer is whole and its first rows are what is expected; see [`get_matrix`]."""
        rows = slice(0, min(ROWS_OF_HEAD, self.n_obs))
        if not rows.stop or not self.n_vars:
            raise ValueError(f"{self.path} holds no {'genes' if rows.stop else 'cells'}.")
        if self.stored(layer) is not None:
            name = matrix_name(layer)
            with self._reading(name):
                self._check_whole(layer)
                head = self._rows_of_matrix(self.stored(layer), rows, layer)
            head.sum_duplicates()
            try:
                return check_values(head, name, expect_counts)
            except ValueError:
                pass  # told below, together with where the right values may be
        try:
            get_matrix(self._heads(rows), layer, expect_counts)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def _heads(self, rows: slice) -> ad.AnnData:
        """Read the first rows of everything that can be read: X, layers and raw."""

        def head_of(group: Any, key: str, name: str) -> sp.csr_matrix | None:
            try:
                with self._reading(name):
                    return self._rows_of_matrix(group[key], rows, name) if key in group else None
            except UNREADABLE:
                return None

        obs = pd.DataFrame(index=[str(i) for i in range(rows.stop)])
        var = pd.DataFrame(index=[str(i) for i in range(self.n_vars)])
        layers = self.group["layers"] if "layers" in self.group else {}
        heads = {key: head_of(layers, key, key) for key in layers}
        values = head_of(self.group, "X", "X")
        fits = None if values is None or values.shape != (len(obs), len(var)) else values
        adata = ad.AnnData(fits, obs=obs, var=var)
        for key, head in heads.items():
            if head is not None and head.shape == adata.shape:
                adata.layers[key] = head
        raw = head_of(self.group, "raw/X", "raw")
        if raw is not None:
            adata.raw = ad.AnnData(raw, obs=obs)
        return adata

    def _check_whole(self, layer: str | None) -> None:
        """Raise ValueError for a layer of another size than obs and var, or of which a part is missing."""
        stored = self.stored(layer)
        sparse = not _is_array(stored)
        if sparse and stored.attrs.get("encoding-type") not in SPARSE:
            raise ValueError(f"it is stored as {stored.attrs.get('encoding-type')}, not as an array or a sparse matrix")
        shape = tuple(map(int, stored.attrs["shape"] if sparse else stored.shape))
        expected = (self.n_obs, self.n_vars)
        if shape != expected:
            raise ValueError(f"it has {shape} cells x genes, but obs and var have {expected}")
        if not sparse:
            if missing := _num_missing_chunks(stored):
                logger.warning("%s: %d chunks of %s are not stored: all zero.", self.path, missing, matrix_name(layer))
            return
        indptr, data, indices = (stored[part] for part in ("indptr", "data", "indices"))
        by_gene = stored.attrs["encoding-type"] == "csc_matrix"
        ends = (indptr.shape[0] - 1, int(indptr[0]), int(indptr[-1]))
        if missing := _num_missing_chunks(data):
            raise ValueError(
                f"{missing} chunks of its values are missing: lost, or left out as they hold nothing but zeros, which "
                "its method eliminate_zeros drops"
            )
        if ends != (shape[by_gene], 0, data.shape[0]) or data.shape != indices.shape:
            raise ValueError("its indptr does not fit its values")
        if _num_missing_chunks(indptr) + _num_missing_chunks(indices):
            self._check_left_out(native(indptr[:]), indices)

    @staticmethod
    def _check_left_out(indptr: np.ndarray, indices: Any) -> None:
        """Raise ValueError unless zeros in place of chunks that are missing make each entry of a row another one.

        A chunk of indptr is zero where cells have no values, and one of indices where each cell has the first gene.
        """
        first = int(np.searchsorted(indptr, 0, side="right"))  # the row after those without values
        spans = [(0, int(indptr[first]))] if first < len(indptr) else []
        spans += [(start, start + indices.chunks[0]) for start in range(0, indices.shape[0], indices.chunks[0])]
        for i, (start, stop) in enumerate(spans):
            values = np.asarray(indices[start:stop])
            if i < 1 and len(np.unique(values)) < len(values):
                raise ValueError("chunks of its indptr are missing")
            rows = np.searchsorted(indptr, np.arange(start, start + len(values)), side="right")
            if not values.any() and (np.diff(rows) == 0).any():
                raise ValueError("chunks of its indices are missing")
