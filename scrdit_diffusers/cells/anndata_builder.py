"""A `datasets` builder that converts AnnData files, some rows at a time, to memory-mapped Arrow in its cache.

The cache of `datasets` makes a dataset once per set of files and options, under a lock, in a folder that is named only
when complete, so that concurrent processes and kills do no harm.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import datasets
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
import zarr
from anndata.io import read_elem, sparse_dataset

from scrdit_diffusers.checks import check_gene_names, check_label, check_values, get_matrix

from .layout import (
    check_obs_columns,
    class_label,
    columns_to_arrow,
    dataset_features,
    pa_type_name,
    values_to_arrow,
)
from .moments import ROWS_PER_CHUNK

logger = logging.getLogger(__name__)

JOINS = ("inner", "outer")
ROWS_OF_COLUMN = 2**20  # of a column, read at a time
VALUES_PER_CHUNK = 2**22  # read at a time, whatever the number of genes


def _rows_of(stored: Any, rows: slice) -> np.ndarray:
    """Read some values of an array of numbers or strings."""
    is_text = isinstance(stored, h5py.Dataset) and h5py.check_string_dtype(stored.dtype) is not None
    return (stored.asstr() if is_text else stored)[rows]


class CellFileError(datasets.exceptions.DatasetGenerationError):
    """A file cannot be converted; the only kind of error whose message `datasets` keeps, also of other processes."""


class CellFile:
    """Rows of a .h5ad or .zarr file, read when they are asked for.

    Parameters
    ----------
    path
        The file, or the folder of the zarr store.

    Raises
    ------
    ValueError
        It holds no AnnData.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.group: Any = zarr.open_group(path, mode="r") if self.path.is_dir() else h5py.File(path, "r")
        except (OSError, zarr.errors.GroupNotFoundError) as error:
            raise ValueError(f"{path} cannot be opened as a .h5ad file or .zarr store: {error}") from error
        lacking = [key for key in ("obs", "var") if key not in self.group]
        if lacking:
            raise ValueError(f"{path} holds no AnnData: it lacks {' and '.join(lacking)}. Was it written to its end?")
        if "column-order" not in self.group["obs"].attrs:
            raise ValueError(
                f"obs of {path} is not stored as anndata 0.7 and later do; read the file with anndata.read_h5ad and "
                "write it again."
            )
        columns: Any = self.group["obs"].attrs["column-order"]
        self.columns = [str(key) for key in columns]
        self._categories: dict[str, pd.Index | None] = {}
        self._by_genes: dict[str | None, sp.csr_matrix] = {}

    def __enter__(self) -> "CellFile":
        return self

    def __exit__(self, *error: object) -> None:
        if isinstance(self.group, h5py.File):
            self.group.close()

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return self.group["obs"][self.group["obs"].attrs["_index"]].shape[0]

    def var(self) -> pd.DataFrame:
        """Genes."""
        return read_elem(self.group["var"])

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
        if names is not None:
            codes = stored["codes"] if hasattr(stored, "keys") else stored
            return pd.Series(pd.Categorical.from_codes(codes[rows], names))
        if hasattr(stored, "keys"):  # numbers or strings, of which some are missing
            return pd.Series(_rows_of(stored["values"], rows)).astype(object).mask(stored["mask"][rows])
        return pd.Series(_rows_of(stored, rows))

    def num_missing(self, key: str) -> int:
        """Count the cells without a value in a column of obs."""
        rows = [slice(start, start + ROWS_OF_COLUMN) for start in range(0, self.n_obs, ROWS_OF_COLUMN)]
        return sum(int(self.column(key, part).isna().sum()) for part in rows)

    def column_type(self, key: str) -> Any:
        """Type that a column of obs has in a dataset, without reading all of it."""
        stored, names = self.group["obs"][key], self.categories(key)
        if names is not None:
            return class_label([str(name) for name in names])
        if hasattr(stored, "keys"):
            stored = stored["values"]
        return datasets.Value(pa_type_name(stored.dtype) if stored.dtype.kind in "biuf" else "string")

    def stored(self, layer: str | None) -> Any:
        """X (`layer=None`) or a layer, as it lies in the file."""
        return self.group["X" if layer is None else f"layers/{layer}"]

    def num_values(self, layer: str | None) -> int:
        """Count the stored values; 0 for a dense matrix, where the number of those that are not zero is not known."""
        stored = self.stored(layer)
        return 0 if hasattr(stored, "shape") else stored["data"].shape[0]

    def matrix(self, layer: str | None, rows: slice) -> sp.csr_matrix:
        """Values of some rows of X (`layer=None`) or of a layer."""
        stored = self.stored(layer)
        if hasattr(stored, "shape"):
            return sp.csr_matrix(stored[rows])
        if stored.attrs["encoding-type"] == "csc_matrix":
            if layer not in self._by_genes:
                logger.warning(
                    "%s is stored by genes (CSC) and is read as a whole; store it as CSR to stream it.", self.path
                )
                self._by_genes[layer] = sp.csr_matrix(read_elem(stored))
            return self._by_genes[layer][rows]
        return sp.csr_matrix(sparse_dataset(stored, should_cache_indptr=False)[rows])

    def chunks(self, layer: str | None) -> Iterator[slice]:
        """Rows to read at a time: `ROWS_PER_CHUNK`, or as many as hold `VALUES_PER_CHUNK` values, but at least one."""
        stored, start = self.stored(layer), 0
        by_cells = not hasattr(stored, "shape") and stored.attrs["encoding-type"] == "csr_matrix"
        while start < self.n_obs:
            stop = min(start + ROWS_PER_CHUNK, self.n_obs)
            if hasattr(stored, "shape"):
                stop = min(stop, start + VALUES_PER_CHUNK // stored.shape[1])
            elif by_cells:
                ends = stored["indptr"][start : stop + 1]
                stop = start + int(np.searchsorted(ends, ends[0] + VALUES_PER_CHUNK, side="right")) - 1
            stop = max(stop, start + 1)
            yield slice(start, stop)
            start = stop

    def check(self, layer: str | None, expect_counts: bool, num_rows: int = 1000) -> None:
        """Raise ValueError unless the layer is whole and its first rows are what is expected; see [`get_matrix`]."""
        rows = min(num_rows, self.n_obs)
        if not rows:
            raise ValueError(f"{self.path} holds no cells.")

        def head_of(elem) -> sp.csr_matrix:
            if not hasattr(elem, "shape"):
                by_gene = elem.attrs["encoding-type"] == "csc_matrix"
                elem = read_elem(elem).tocsr() if by_gene else sparse_dataset(elem, should_cache_indptr=False)
            return sp.csr_matrix(elem[:rows])

        def stored_at(group, key: str):  # what an AnnData lacks is left out or stored as a null
            found = group[key] if key in group else None
            return None if found is None or found.attrs.get("encoding-type") == "null" else found

        stored, raw = stored_at(self.group, "X"), stored_at(self.group, "raw")
        layers = self.group["layers"] if "layers" in self.group else {}
        if (stored if layer is None else stored_at(layers, layer)) is not None:
            self._check_whole(layer)
        try:
            head = ad.AnnData(
                None if stored is None else head_of(stored),
                obs=pd.DataFrame(index=[str(i) for i in range(rows)]),
                var=pd.DataFrame(index=[str(i) for i in range(len(self.var()))]),
                layers={key: head_of(layers[key]) for key in layers},
            )
            if raw is not None and stored_at(raw, "X") is not None:
                head.raw = ad.AnnData(head_of(raw["X"]), obs=head.obs)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged: {error}. Copy or write it again.") from error
        try:
            get_matrix(head, layer, expect_counts)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def _check_whole(self, layer: str | None) -> None:
        """Raise ValueError for a layer of another size than obs and var, or of which a part is missing."""
        stored, name = self.stored(layer), "X" if layer is None else f"layers[{layer!r}]"
        sparse = not hasattr(stored, "shape")
        shape = tuple(map(int, stored.attrs["shape"] if sparse else stored.shape))
        expected = (self.n_obs, len(self.var()))
        if shape != expected:
            raise ValueError(f"{self.path}: {name} has {shape} cells x genes, but obs and var have {expected}.")
        if not sparse:
            return
        indptr, data, indices = parts = [stored[part] for part in ("indptr", "data", "indices")]
        ends = (indptr.shape[0] - 1, int(indptr[0]), int(indptr[-1]))
        by_gene = stored.attrs["encoding-type"] == "csc_matrix"
        if isinstance(data, zarr.Array):  # a chunk that was not copied would be read as zeros
            missing = sum(max(0, part.nchunks - part.nchunks_initialized) for part in parts)
            if missing:
                raise ValueError(f"{self.path}: {missing} chunks of {name} are missing. Copy or write it again.")
        if ends != (shape[by_gene], 0, data.shape[0]) or data.shape != indices.shape:
            raise ValueError(f"{self.path}: {name} is incomplete: its indptr does not fit its values. Write it again.")


def join_types(types: Sequence[Any]) -> Any:
    """Type of a column that has these types in several files."""
    if all(isinstance(of_file, datasets.ClassLabel) for of_file in types):
        return class_label(list(dict.fromkeys(name for of_file in types for name in of_file.names)))
    if all(of_file == types[0] for of_file in types):
        return types[0]
    if any(isinstance(of_file, datasets.ClassLabel) or of_file.dtype in ("string", "bool") for of_file in types):
        return datasets.Value("string")
    return datasets.Value(pa_type_name(np.result_type(*(of_file.dtype for of_file in types))))


def gene_vocabulary(
    paths: Sequence[str | Path], join: str, gene_key: str | None
) -> tuple[pd.DataFrame, list[np.ndarray]]:
    """Join the genes of several files.

    Parameters
    ----------
    paths
        Files.
    join
        "inner": genes that all files have; "outer": all genes, zero in the files that lack them.
    gene_key
        Column of var that identifies a gene, such as one of Ensembl ids; `None` takes var_names.

    Returns
    -------
    The common var: genes in the order in which they occur, with the columns that all files have; and for each file the
    position of its genes in it, -1 for those left out.

    Raises
    ------
    ValueError
        A gene occurs twice in a file, the column is missing, or no gene is in all files.
    """
    if join not in JOINS:
        raise ValueError(f"join must be one of {JOINS}, got {join!r}.")
    variables, keys = [], []
    for path in paths:
        with CellFile(path) as file:
            var = file.var()
        var.index = var.index.astype(str)
        if gene_key is not None and gene_key not in var:
            raise ValueError(f"var of {path} has no column {gene_key!r}; it has {list(var)}.")
        key = pd.Index(var.index if gene_key is None else var[gene_key].astype(str))
        check_gene_names(list(key), f"var of {path}", " Give another gene_key, or make them unique.")
        variables.append(var.set_axis(key))
        keys.append(key)
        if gene_key is not None:
            variables[-1] = variables[-1].assign(var_names=var.index.to_numpy())
    shared = [column for column in variables[0] if all(column in var for var in variables)]
    var = pd.concat([var[shared] for var in variables])
    var = var[~var.index.duplicated()]
    examples = [list(key[:3]) for key in keys]
    if join == "inner":
        for key in keys:
            var = var[var.index.isin(key)]
        if not len(var):
            raise ValueError(
                f"The files have no gene in common; their genes look like {examples}. Join other genes with "
                'join="outer" (--join outer), or by another column of var with gene_key (--gene_key).'
            )
    elif len(keys) > 1 and len(var) == sum(map(len, keys)):
        raise ValueError(
            f"No gene is in two of the files; their genes look like {examples}. If these are names and ids, give a "
            "column of var that both have as gene_key (--gene_key)."
        )
    if gene_key is not None and var["var_names"].is_unique:
        var = var.set_index("var_names")
        joined = pd.Index(var[gene_key].astype(str))
    else:
        joined = var.index
        var = var.drop(columns="var_names", errors="ignore")
    var.index.name = None
    return var, [joined.get_indexer(key) for key in keys]


@dataclass
class AnnDataConfig(datasets.BuilderConfig):
    """What makes a dataset: a JSON object with `files` (path, size and time of change of each), and the options.

    One string, because the cache's key is made of it.
    """

    source: str = ""


class AnnDataBuilder(datasets.ArrowBasedBuilder):
    """Turns AnnData files into a dataset; see [`CellDataset.open`]."""

    VERSION = datasets.Version("1.1.0")  # of what is written for given files and options
    BUILDER_CONFIG_CLASS = AnnDataConfig
    DEFAULT_WRITER_BATCH_SIZE = ROWS_PER_CHUNK

    @classmethod
    def for_files(
        cls,
        paths: Sequence[Path],
        layer: str | None,
        expect_counts: bool,
        join: str,
        gene_key: str | None,
        obs_columns: Sequence[str] | None,
        cache_dir: str | Path | None,
    ) -> "AnnDataBuilder":
        """Make the builder whose cache belongs to these files, as they are now, and options."""
        files = []
        for path in paths:
            parts = [part.stat() for part in (path.rglob("*") if path.is_dir() else [path])]
            changed = max(part.st_mtime_ns for part in parts)
            files.append([str(path.resolve()), sum(part.st_size for part in parts), changed])
        source: dict[str, Any] = {"files": files, "layer": layer, "expect_counts": expect_counts, "join": join}
        source |= {"gene_key": gene_key, "obs_columns": None if obs_columns is None else list(obs_columns)}
        return cls(cache_dir=None if cache_dir is None else str(cache_dir), source=json.dumps(source))

    @property
    def _source(self) -> dict[str, Any]:
        return json.loads(self.config.source)

    def _info(self) -> datasets.DatasetInfo:
        source = self._source
        types: list[dict[str, Any]] = []
        size = 0
        for path, *_ in source["files"]:
            with CellFile(path) as file:
                wanted = file.columns if source["obs_columns"] is None else source["obs_columns"]
                size += 8 * file.num_values(source["layer"])
                types.append({key: file.column_type(key) for key in wanted if key in file.columns})
        shared = [key for key in types[0] if all(key in of_file for of_file in types)]
        columns = {key: join_types([of_file[key] for of_file in types]) for key in shared}
        # What `datasets` looks for room for, before it converts.
        options = {"download_size": 0, "dataset_size": size, "size_in_bytes": size}
        return datasets.DatasetInfo(features=dataset_features(columns), **options)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        numbers = list(range(len(self._source["files"])))  # a list, over which processes are spread
        return [datasets.SplitGenerator("train", gen_kwargs={"numbers": numbers})]

    def _generate_tables(self, numbers: list[int]) -> Iterator[tuple[Any, pa.Table]]:
        source = self._source
        paths = [path for path, *_ in source["files"]]
        var, positions = gene_vocabulary(paths, source["join"], source["gene_key"])
        for number in numbers:
            with CellFile(paths[number]) as file:
                for i, rows in enumerate(file.chunks(source["layer"])):
                    # Nothing here keeps the rows while the next ones are read. `datasets` needs keys of this
                    # class, which it offers nowhere else.
                    yield datasets.builder.Key(number, i), self._read(file, rows, positions[number], len(var))

    def _read(self, file: CellFile, rows: slice, place: np.ndarray, num_vars: int) -> pa.Table:
        """Read some rows of a file, whose genes have the given places among those of the dataset."""
        name, source, features = f"{file.path}, cells from {rows.start}", self._source, self.info.features
        try:
            matrix = file.matrix(source["layer"], rows)
            obs = pd.DataFrame({key: file.column(key, rows) for key in features if key in file.columns})
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise CellFileError(f"{name}: the file is damaged: {error}. Copy or write it again.") from error
        try:
            check_values(matrix, name, source["expect_counts"])
        except ValueError as error:
            raise CellFileError(str(error)) from error
        if not np.array_equal(place, np.arange(num_vars)):
            matrix = sp.csr_matrix(matrix[:, np.flatnonzero(place >= 0)])
            matrix.indices = place[place >= 0][matrix.indices].astype(np.int32)
            matrix = sp.csr_matrix((matrix.data, matrix.indices, matrix.indptr), (matrix.shape[0], num_vars))
        matrix.sum_duplicates()
        matrix.sort_indices()
        columns = values_to_arrow(matrix) | columns_to_arrow(obs, features)
        return pa.table(columns, schema=features.arrow_schema)


def convert_files(
    files: Sequence[Path],
    layer: str | None,
    expect_counts: bool,
    obs_columns: Sequence[str] | None,
    join: str,
    gene_key: str | None,
    num_proc: int | None,
    cache_dir: str | Path | None,
) -> tuple[datasets.Dataset, pd.DataFrame]:
    """Convert AnnData files, or find them converted in the cache; see [`CellDataset.open`].

    Returns
    -------
    The rows of all files, and their common gene vocabulary.
    """
    var, positions = gene_vocabulary(files, join, gene_key)
    if len(files) > 1:
        for path, place in zip(files, positions, strict=True):
            kept = int((place >= 0).sum())
            lacking = f", lacks {len(var) - kept} (taken as zero)" if kept < len(var) else ""
            logger.info(f"{path}: {len(place)} genes, {kept} of the {len(var)} that are used{lacking}")
    try:
        builder = AnnDataBuilder.for_files(files, layer, expect_counts, join, gene_key, obs_columns, cache_dir)
        builder.download_and_prepare(num_proc=num_proc)
    except CellFileError as error:
        raise ValueError(str(error)) from error
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError):
            raise
        cache = cache_dir or datasets.config.HF_DATASETS_CACHE
        raise OSError(
            f"The dataset of the cells could not be written to the cache {cache}: {reason} Give HF_DATASETS_CACHE a "
            "folder of your own with room for 8 bytes for each value that is not zero."
        ) from error
    return builder.as_dataset("train"), var


def check_files(
    files: Sequence[Path],
    layer: str | None,
    expect_counts: bool,
    obs_columns: Sequence[str] | None,
    labels_key: Sequence[str],
) -> None:
    """Raise ValueError, with the name of the file, for one that cannot be converted as asked for."""
    for path in files:
        with CellFile(path) as file:
            file.check(layer, expect_counts)
            check_obs_columns(file.columns if obs_columns is None else list(obs_columns))
            for key in [*(obs_columns or []), *labels_key]:
                try:
                    check_label(pd.DataFrame(columns=file.columns), key)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
            for key in labels_key:
                if missing := file.num_missing(key):
                    raise ValueError(f"{path}: obs[{key!r}] holds {missing} NaN; give every cell a label or drop it.")
