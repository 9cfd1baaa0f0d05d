"""A `datasets` builder that converts AnnData files, some rows at a time, to memory-mapped Arrow in its cache.

The cache of `datasets` makes a dataset once per set of files and options, under a lock, in a folder that is named only
when complete, so that concurrent processes and kills do no harm.
"""

import errno
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from scrdit_diffusers.checks import (
    NUMBER,
    SYNTHETIC_KEY,
    as_shown,
    check_gene_names,
    check_spellings,
    check_values,
    label_text,
    matrix_name,
)

from .cell_file import UNREADABLE, CellFile
from .damage import reading
from .layout import (
    VALUE_COLUMNS,
    check_obs_columns,
    class_label,
    columns_to_arrow,
    dataset_features,
    join_labels,
    pa_type_name,
    values_to_arrow,
)
from .moments import ROWS_PER_CHUNK

logger = logging.getLogger(__name__)

JOINS = ("inner", "outer")
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)  # errors of a place that one may not write to


class CellFileError(datasets.exceptions.DatasetGenerationError):
    """A file cannot be converted; the only kind of error whose message `datasets` keeps, also of other processes."""


def is_float(dtype: str) -> bool:
    """Whether a type of `datasets` is one of floats."""
    return dtype.startswith("float")


def join_types(types: Sequence[Any]) -> Any:
    """Type of a column that has these types in several files."""
    if all(isinstance(of_file, datasets.ClassLabel) for of_file in types):
        return class_label(join_labels([of_file.names for of_file in types]))
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
        A gene occurs twice in a file or looks like another one, the column is missing, or no gene is in all files.
    """
    if join not in JOINS:
        raise ValueError(f"join must be one of {JOINS}, got {join!r}.")
    variables, keys, names = [], [], []
    for path in paths:
        with CellFile(path) as file, reading(path):
            var = file.var(needed=gene_key)
        if gene_key is not None and gene_key not in var:
            raise ValueError(f"var of {path} has no column {gene_key!r}; it has {list(var)}.")
        key = pd.Index(var.index if gene_key is None else var[gene_key].map(str, na_action="ignore"))
        check_gene_names(list(key), f"var of {path}", " Give another gene_key, or make them unique.")
        if gene_key is None and len(paths) > 1 and all(map(NUMBER.fullmatch, key)):
            raise ValueError(
                f"The genes of {path} are called by numbers ({', '.join(key[:3])}, ...), which mean other genes in "
                "another file. Give a column of var that identifies them as gene_key (--gene_key), or name them: "
                "adata.var_names = ..."
            )
        variables.append(var.set_axis(key))
        keys.append(key)
        names.append(pd.Series(var.index, index=key))
    _check_gene_spellings(dict(zip(paths, keys, strict=True)))
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
    joined, named = var.index, pd.concat(names)
    named = named[~named.index.duplicated()].loc[joined]
    if gene_key is not None and named.is_unique and not all(map(NUMBER.fullmatch, named)):
        var = var.set_axis(pd.Index(named))
    return var.rename_axis(None), [joined.get_indexer(key) for key in keys]


def _check_gene_spellings(names: Mapping[str | Path, pd.Index]) -> None:
    """Raise ValueError for genes of several files whose names differ, but not to the eye."""
    different = reduce(pd.Index.union, names.values())
    shown = different.map(as_shown)
    if len(names) > 1 and (twice := shown[shown.duplicated()]).size:
        same = different[shown == twice[0]]
        found = " and ".join(f"{ascii(gene)} ({next(p for p in names if gene in names[p])})" for gene in same)
        raise ValueError(f"The files have the genes {found}, which look like one; spell it in one way.")


def fingerprint(path: Path) -> str:
    """Hash what changes whenever a file, or one of a store, is replaced or written to.

    The time of change of the inode cannot be set, unlike that of the content, which copies keep. Reading all of the
    content for a hash would take a second per gigabyte, each time that the file is opened.
    """
    parts = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(part), part.stat()) for part in parts]
    facts = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for name, stat in stats]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass
class AnnDataConfig(datasets.BuilderConfig):
    """What makes a dataset: a JSON object with `files` (path of each, and what changes with it), and the options.

    One string, because the cache's key is made of it.
    """

    source: str = ""


class AnnDataBuilder(datasets.ArrowBasedBuilder):
    """Turns AnnData files into a dataset; see [`CellDataset.open`]."""

    VERSION = datasets.Version("1.3.0")  # of what is written for given files and options
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
        obs_columns: Sequence[str],
        cache_dir: str | Path,
    ) -> "AnnDataBuilder":
        """Make the builder whose cache belongs to these files, as they are now, and options."""
        files = []
        for path in paths:
            files.append([str(path.resolve()), fingerprint(path)])
        source: dict[str, Any] = {"files": files, "layer": layer, "expect_counts": expect_counts, "join": join}
        source |= {"gene_key": gene_key, "obs_columns": list(obs_columns)}
        return cls(cache_dir=str(cache_dir), source=json.dumps(source))

    @property
    def _source(self) -> dict[str, Any]:
        return json.loads(self.config.source)

    def _info(self) -> datasets.DatasetInfo:
        source = self._source
        types: list[dict[str, Any]] = []
        size = 0
        for path, *_ in source["files"]:
            with CellFile(path) as file, reading(path):
                size += 8 * file.num_values(source["layer"])
                types.append({key: file.column_type(key) for key in source["obs_columns"]})
        columns = {key: self._join_column(key, [of_file[key] for of_file in types]) for key in source["obs_columns"]}
        # What `datasets` looks for room for, before it converts.
        options = {"download_size": 0, "dataset_size": size, "size_in_bytes": size}
        return datasets.DatasetInfo(features=dataset_features(columns), **options)

    def _join_column(self, key: str, types: Sequence[Any]) -> Any:
        """See [`join_types`]; whole numbers stored as floats or uint64 join the integers of other files as int64."""
        joined = join_types(types)
        if not is_float(joined.dtype) or all(is_float(of_file.dtype) for of_file in types):
            return joined
        for (path, *_), of_file in zip(self._source["files"], types, strict=True):
            if is_float(of_file.dtype) or of_file.dtype == "uint64":
                limit = 2**53 if is_float(of_file.dtype) else 2**63
                with CellFile(path) as file, reading(path):
                    values = file.labels(key)[0]
                if not all(abs(value) < limit and float(value).is_integer() for value in values):
                    self._check_held_by_floats(key, types)
                    return joined
        return datasets.Value("int64")

    def _check_held_by_floats(self, key: str, types: Sequence[Any]) -> None:
        """Raise ValueError if a column that other files make one of floats holds integers that these would round."""
        for (path, *_), of_file in zip(self._source["files"], types, strict=True):
            if of_file.dtype in ("int64", "uint64"):
                with CellFile(path) as file, reading(path):
                    values = file.labels(key)[0]
                if large := [value for value in values if abs(int(value)) > 2**53]:
                    raise ValueError(
                        f"{path}: obs[{key!r}] holds {large[0]}, but other files make the column one of floats, which "
                        f"round integers above 2^53. Write it as text: adata.obs[{key!r}] = "
                        f"adata.obs[{key!r}].astype(str), or drop it."
                    )

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        numbers = list(range(len(self._source["files"])))  # a list, over which processes are spread
        return [datasets.SplitGenerator("train", gen_kwargs={"numbers": numbers})]

    def _generate_tables(self, numbers: list[int]) -> Iterator[tuple[Any, pa.Table]]:
        source = self._source
        paths = [path for path, *_ in source["files"]]
        try:
            var, positions = gene_vocabulary(paths, source["join"], source["gene_key"])
            for number in numbers:
                with CellFile(paths[number]) as file, reading(paths[number]):
                    for i, rows in enumerate(file.chunks(source["layer"])):
                        # Nothing here keeps the rows while the next ones are read. `datasets` needs keys of this
                        # class, which it offers nowhere else.
                        yield datasets.builder.Key(number, i), self._read(file, rows, positions[number], len(var))
        except UNREADABLE as error:
            raise CellFileError(str(error)) from error

    def _read(self, file: CellFile, rows: slice, place: np.ndarray, num_vars: int) -> pa.Table:
        """Read some rows of a file, whose genes have the given places among those of the dataset."""
        name, source, features = f"{file.path}, cells from {rows.start}", self._source, self.info.features
        with reading(name, matrix_name(source["layer"])):
            matrix = file.matrix(source["layer"], rows)
        columns = {}
        for key in source["obs_columns"]:
            with reading(name, f"obs[{key!r}]"):
                columns[key] = file.column(key, rows)
        obs = pd.DataFrame(columns, index=range(matrix.shape[0]))
        check_values(matrix, name, source["expect_counts"])
        if not np.array_equal(place, np.arange(num_vars)):
            matrix = sp.csr_matrix(matrix[:, np.flatnonzero(place >= 0)])
            matrix.indices = place[place >= 0][matrix.indices].astype(np.int32)
            matrix = sp.csr_matrix((matrix.data, matrix.indices, matrix.indptr), (matrix.shape[0], num_vars))
        matrix.sum_duplicates()
        matrix.sort_indices()
        arrays = values_to_arrow(matrix) | columns_to_arrow(obs, features)
        return pa.table(arrays, schema=features.arrow_schema)


def convert_files(
    files: Sequence[Path],
    layer: str | None,
    expect_counts: bool,
    obs_columns: Sequence[str],
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
            level = logging.WARNING if kept < len(place) else logging.INFO  # genes are left out
            logger.log(level, f"{path}: {len(place)} genes, {kept} of the {len(var)} that are used{lacking}")
    make_builder = partial(AnnDataBuilder.for_files, files, layer, expect_counts, join, gene_key, obs_columns)
    cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    try:
        builder = make_builder(cache)
        builder.download_and_prepare(num_proc=num_proc)
    except CellFileError as error:
        raise ValueError(str(error)) from error
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError):
            raise
        if reason.errno in READ_ONLY and (rows := _read_only_cache(make_builder, cache)) is not None:
            return rows, var
        raise OSError(
            f"The dataset of the cells could not be written to the cache {cache}: {reason} Give HF_DATASETS_CACHE a "
            "folder of your own with room for 8 bytes for each value that is not zero."
        ) from error
    return builder.as_dataset("train"), var


def _read_only_cache(make_builder: Callable[[Path], AnnDataBuilder], cache: Path) -> datasets.Dataset | None:
    """Find a dataset in a cache that cannot be written to, not even the locks of `datasets`; `None` if it is not there.

    Parameters
    ----------
    make_builder
        Makes the builder of the dataset, with its cache in some folder.
    cache
        The cache.
    """
    with tempfile.TemporaryDirectory() as temporary:  # in which the builder may lock
        builder = make_builder(Path(temporary))
        folder = cache / Path(builder.cache_dir).relative_to(temporary)
    if not folder.is_dir():  # which gets its name when it is whole
        return None
    info = datasets.DatasetInfo.from_directory(str(folder))
    files = sorted(map(str, folder.glob("*.arrow")))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(file, info) for file in files])


def check_files(
    files: Sequence[Path],
    layer: str | None,
    expect_counts: bool,
    obs_columns: Sequence[str] | None,
    labels_key: Sequence[str],
) -> list[str]:
    """Check what is needed of each file before anything is converted.

    Returns
    -------
    The columns of obs to convert: `obs_columns`, or those of all files that can be read.

    Raises
    ------
    ValueError
        A file cannot be converted as asked for, or two files spell a label differently; the message names the file.
    """
    needed = list(dict.fromkeys([*(obs_columns or []), *labels_key]))
    usable: list[list[str]] = []
    labels: dict[str, dict[str, list[str]]] = {key: {} for key in labels_key}
    for path in files:
        with CellFile(path) as file, reading(path):
            file.check(layer, expect_counts)
            for key in needed:
                file.check_column(key, is_label=key in labels_key)
            if num_generated := file.num_generated():
                logger.warning(
                    "%s: %d of the %d cells are marked as generated by obs[%r]. What is trained on them learns the "
                    "errors of the model that made them.",
                    path,
                    num_generated,
                    file.n_obs,
                    SYNTHETIC_KEY,
                )
            for key in labels_key:
                values, missing = file.labels(key)
                labels[key][str(path)] = [label_text(value) for value in values]
                if missing:
                    raise ValueError(
                        f"{path}: obs[{key!r}] holds {missing} NaN; give every cell a label, or write the file with "
                        f"those that have one: adata[adata.obs[{key!r}].notna()]."
                    )
            usable.append(needed if obs_columns is not None else list(file.usable_columns(VALUE_COLUMNS)))
    for key, of_files in labels.items():
        check_spellings(key, of_files)
    columns = [key for key in usable[0] if all(key in of_file for of_file in usable)]
    columns = columns if obs_columns is None else list(obs_columns)
    check_obs_columns([*columns, *labels_key])
    return columns
