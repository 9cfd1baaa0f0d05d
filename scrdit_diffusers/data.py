"""Cells as a `datasets` table, and batches of them.

The table has the layout of the large public collections: one row per cell with `genes` (list of int32 positions in
the gene vocabulary), `expressions` (list of float32) and the columns of obs, categoricals as `ClassLabel`. The
vocabulary is AnnData's `var`; in a folder it lies beside the table as `var.parquet`. Where it has a column `token_id`,
as in tahoebio/Tahoe-100M, `genes` holds these tokens instead, and a row may begin with a special token.

AnnData files become a table by [`open_table`], some thousand rows at a time, in the cache of `datasets`. Nothing here
needs all cells in memory but what is called AnnData, and nothing but [`CellCollator`] makes values dense.
"""

import glob
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
from datasets.fingerprint import Hasher
from filelock import FileLock
from huggingface_hub import HfApi, hf_hub_download

from .anndata_builder import (
    AnnDataBuilder,
    CellFile,
    CellFileError,
    class_label,
    columns_to_arrow,
    gene_vocabulary,
    table_features,
    values_to_arrow,
)
from .cells.fitting import FitOptions, fit_chunks
from .cells.moments import ROWS_PER_CHUNK, ROWS_PER_UPDATE, CellMoments
from .checks import check_label, get_matrix, label_categories
from .hub import explain_push
from .processing_scrdit import SCRDiTProcessor

logger = logging.getLogger(__name__)

FIT_VERSION = 1  # counted up when fitting changes, so that what was cached before is fitted again
Table: TypeAlias = datasets.Dataset | datasets.IterableDataset
VALUE_COLUMNS = ["genes", "expressions"]
ROWS_PER_PART = 10**6  # of a table, whose parts are gone through separately to learn from them
ANNDATA_SUFFIXES = (".h5ad", ".zarr")


def anndata_to_table(
    adata: ad.AnnData, layer: str | None = None, obs_columns: Sequence[str] | None = None
) -> datasets.Dataset:
    """Turn cells into a `datasets` table with sparse rows.

    Parameters
    ----------
    adata
        Cells.
    layer
        Layer that holds the values; `None` takes X.
    obs_columns
        Columns of obs to keep. `None` keeps all.

    Returns
    -------
    Table with `genes` (positions in `adata.var_names`), `expressions` and the obs columns; categoricals become
    `ClassLabel`.

    Raises
    ------
    ValueError
        The values cannot be used, or a column of obs is named like one of the table's own.
    """
    matrix = get_matrix(adata, layer, expect_counts=False).astype(np.float32)
    matrix.sort_indices()
    obs = adata.obs if obs_columns is None else adata.obs[list(obs_columns)]
    _check_columns(list(obs))
    features = table_features({key: _column_type(obs[key]) for key in obs})
    chunks = []
    for start in range(0, max(adata.n_obs, 1), ROWS_PER_CHUNK):
        rows = slice(start, start + ROWS_PER_CHUNK)
        columns = values_to_arrow(matrix[rows]) | columns_to_arrow(obs.iloc[rows], features)
        chunks.append(pa.table(columns, schema=features.arrow_schema))
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(chunks)), info=info)


def _column_type(column: pd.Series) -> Any:
    """Type of a column of obs in a table."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return class_label([str(name) for name in column.cat.categories])
    schema = pa.Schema.from_pandas(column.to_frame("column"), preserve_index=False)
    return datasets.Features.from_arrow_schema(schema.remove_metadata())["column"]


def _check_columns(columns: Sequence[str]) -> None:
    taken = [key for key in VALUE_COLUMNS if key in columns]
    if taken:
        raise ValueError(f"obs has columns {taken}, names that the table needs itself; rename them or leave them out.")


def token_positions(var: pd.DataFrame) -> np.ndarray | None:
    """Position in the vocabulary of each token, -1 for others; `None` where `genes` holds positions."""
    if "token_id" not in var:
        return None
    tokens = var["token_id"].to_numpy()
    positions = np.full(tokens.max() + 1, -1)
    positions[tokens] = np.arange(len(var))
    return positions


def rows_to_matrix(rows: pa.Table, num_vars: int, positions: np.ndarray | None = None) -> sp.csr_matrix:
    """Assemble the CSR matrix (cells, `num_vars`) of some rows of the table.

    Parameters
    ----------
    rows
        Rows with `genes` and `expressions`, of integers or floats.
    num_vars
        Number of genes in the vocabulary.
    positions
        From [`token_positions`], for a table whose `genes` are tokens. A negative value at the beginning of a row marks
        a special token and is left out.

    Raises
    ------
    ValueError
        A token is not in the vocabulary.
    """
    genes, expressions = rows["genes"].combine_chunks(), rows["expressions"].combine_chunks()
    indptr = np.concatenate([[0], np.cumsum(np.asarray(genes.value_lengths(), dtype=np.int64))])
    indices = np.asarray(genes.flatten())
    data = np.asarray(expressions.flatten(), dtype=np.float32)
    if positions is not None:
        first = indptr[:-1][indptr[:-1] < indptr[1:]]
        special = np.zeros(len(data), dtype=bool)
        special[first] = data[first] < 0
        indptr = indptr - np.concatenate([[0], np.cumsum(special)])[indptr]
        indices, data = indices[~special], data[~special]
        known = (indices >= 0) & (indices < len(positions))
        indices = np.where(known, positions[np.where(known, indices, 0)], -1)
        if (indices < 0).any():
            tokens = np.asarray(genes.flatten())[~special][indices < 0]
            raise ValueError(f"{len(tokens)} values belong to tokens that var does not have, such as {tokens[0]}.")
    return sp.csr_matrix((data, indices, indptr), shape=(rows.num_rows, num_vars))


class LabelNames:
    """Replaces the numbers in `ClassLabel` columns by their names, as a dictionary column.

    Parameters
    ----------
    features
        Types of the table's columns; `None` where they are not known.
    """

    def __init__(self, features: datasets.Features | None):
        types = {} if features is None else features
        self.names = {key: pa.array(of.names) for key, of in types.items() if isinstance(of, datasets.ClassLabel)}

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Name the labels of some rows."""
        for i, key in enumerate(rows.column_names):
            if key in self.names:
                codes = rows[key].combine_chunks().cast(pa.int32())
                rows = rows.set_column(i, key, pa.DictionaryArray.from_arrays(codes, self.names[key]))
        return rows


def iterate_rows(table: Table, batch_size: int, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Go through a table in order, some rows at a time, with the names of labels."""
    named = LabelNames(table.features)
    if isinstance(table, datasets.IterableDataset):
        batches = table.select_columns(list(columns)).with_format("arrow").iter(batch_size)
    else:
        batches = table.with_format("arrow", columns=list(columns)).iter(batch_size)
    for rows in batches:
        yield named(rows)


def rows_to_obs(rows: pa.Table, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of obs of some rows."""
    missing = [key for key in columns if key not in rows.column_names]
    if missing:
        raise ValueError(f"The table has no columns {missing}; it has {rows.column_names}.")
    return pd.DataFrame({key: rows[key].to_pandas() for key in columns}, index=range(rows.num_rows))


def table_to_anndata(table: datasets.Dataset, var: pd.DataFrame) -> ad.AnnData:
    """Turn a table and its gene vocabulary into an AnnData in memory; the inverse of [`anndata_to_table`]."""
    rows = LabelNames(table.features)(table.with_format("arrow")[:])
    obs = rows_to_obs(rows, [key for key in rows.column_names if key not in VALUE_COLUMNS])
    obs.index = obs.index.astype(str)
    return ad.AnnData(rows_to_matrix(rows, len(var), token_positions(var)), obs=obs, var=var)


def save_table(adata: ad.AnnData, folder: str | Path, layer: str | None = None) -> None:
    """Write cells as a `datasets` folder with its gene vocabulary, for [`read_cells`] and for the Hub."""
    anndata_to_table(adata, layer).save_to_disk(str(folder))
    adata.var.rename_axis("var_names").to_parquet(Path(folder) / "var.parquet")


def push_table(
    adata: ad.AnnData,
    repo_id: str,
    layer: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> None:
    """Publish cells as a data set on the Hub, with their gene vocabulary, for [`read_cells`] and for streaming.

    Parameters
    ----------
    adata
        Cells.
    repo_id
        Data set on the Hub, such as "user/pbmc"; made if there is none.
    layer
        Layer that holds the values; `None` takes X.
    private
        Make a new data set private; `None` takes the account's default.
    token
        Token for the Hub; the stored one if `None`.

    Raises
    ------
    OSError
        The Hub refused, or cannot be reached, with what to do.
    """
    table = anndata_to_table(adata, layer)
    vocabulary = adata.var.rename_axis("var_names").to_parquet()
    with explain_push(repo_id):
        table.push_to_hub(repo_id, private=private, token=token)
        HfApi(token=token).upload_file(
            path_or_fileobj=vocabulary, path_in_repo="var.parquet", repo_id=repo_id, repo_type="dataset"
        )


def find_files(dataset: str | Path) -> list[Path]:
    """AnnData files that a name stands for: a file, a folder of them, or a pattern such as `cells/*.h5ad`."""
    path = Path(dataset)
    if path.suffix in ANNDATA_SUFFIXES and path.exists():
        return [path]
    if path.is_dir():
        return sorted(part for part in path.iterdir() if part.suffix in ANNDATA_SUFFIXES)
    if any(character in str(dataset) for character in "*?["):
        return sorted(Path(name) for name in glob.glob(str(dataset)) if Path(name).suffix in ANNDATA_SUFFIXES)
    return []


def open_table(
    dataset: str | Path | Sequence[str | Path],
    layer: str | None = None,
    counts: bool = False,
    obs_columns: Sequence[str] | None = None,
    labels_key: Sequence[str] = (),
    join: str = "inner",
    gene_key: str | None = None,
    streaming: bool = False,
    name: str | None = None,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Table, pd.DataFrame]:
    """Open cells as a table that is read from disk when rows are asked for.

    AnnData files are converted once, in the cache of `datasets`; one chunk of rows and the chosen columns of obs are in
    memory meanwhile.

    Parameters
    ----------
    dataset
        A `.h5ad` file, a `.zarr` store, a folder or glob pattern or list of them; a folder written by [`save_table`];
        or a data set of the same layout, as a local folder or on the Hub. Its vocabulary is `var.parquet`, or the
        configuration `gene_metadata` with `gene_symbol`, `ensembl_id` and `token_id`.
    layer
        Of AnnData files: layer that holds the values; `None` takes X.
    counts
        Of AnnData files: refuse values that are no counts, those of the first cells of each file before anything is
        converted.
    obs_columns
        Of AnnData files: columns of obs to keep; `None` keeps those that all files have.
    labels_key
        Of AnnData files: columns of obs that each file has to have.
    join
        Of several files: "inner" keeps the genes that all have, "outer" keeps all genes, zero where a file lacks them.
    gene_key
        Column of var that identifies a gene, such as one of Ensembl ids; `None` takes var_names, or `gene_symbol`.
    streaming
        Of data sets: do not download, read while training.
    name
        Of data sets: configuration that holds the cells; `None` takes the default one.
    num_proc
        Processes that convert or download, each its share of the files.
    cache_dir
        Where tables are kept; `None` takes the cache of `datasets` (environment variable `HF_DATASETS_CACHE`).

    Returns
    -------
    The table, and its gene vocabulary.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder, and it is not the id of a data set on the Hub.
    ValueError
        A file is of another kind, or files or values do not fit; the message names the file.
    OSError
        The cache cannot be written, or has no room.
    """
    files = find_files(dataset) if isinstance(dataset, str | Path) else [Path(path) for path in dataset]
    for path in files:
        if not path.exists() or path.suffix not in ANNDATA_SUFFIXES:
            raise FileNotFoundError(f"{path} does not exist, or is neither a .h5ad file nor a .zarr store.")
    if not files:
        return _open_dataset(str(dataset), gene_key, streaming, name, num_proc, cache_dir)
    if streaming:
        raise ValueError("streaming is for data sets; AnnData files are read from their memory-mapped table anyway.")
    for path in files:
        with CellFile(path) as file:
            file.check(layer, counts)
            _check_columns(file.columns if obs_columns is None else list(obs_columns))
            for key in [*(obs_columns or []), *labels_key]:
                try:
                    check_label(pd.DataFrame(columns=file.columns), key)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
            for key in labels_key:
                if missing := file.num_missing(key):
                    raise ValueError(f"{path}: obs[{key!r}] holds {missing} NaN; give every cell a label or drop it.")
    var, positions = gene_vocabulary(files, join, gene_key)
    if len(files) > 1:
        for path, place in zip(files, positions, strict=True):
            kept = int((place >= 0).sum())
            lacking = f", lacks {len(var) - kept} (taken as zero)" if kept < len(var) else ""
            logger.info(f"{path}: {len(place)} genes, {kept} of the {len(var)} that are used{lacking}")
    try:
        builder = AnnDataBuilder.for_files(files, layer, counts, join, gene_key, obs_columns, cache_dir)
        builder.download_and_prepare(num_proc=num_proc)
    except CellFileError as error:
        raise ValueError(str(error)) from error
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError):
            raise
        cache = cache_dir or datasets.config.HF_DATASETS_CACHE
        raise OSError(
            f"The table of the cells could not be written to the cache {cache}: {reason} Give HF_DATASETS_CACHE a "
            "folder of your own with room for 8 bytes for each value that is not zero."
        ) from error
    return builder.as_dataset("train"), var


def _open_dataset(dataset, gene_key, streaming, name, num_proc, cache_dir) -> tuple[Table, pd.DataFrame]:
    """[`open_table`] for a folder or a data set on the Hub."""
    path = Path(dataset)
    if (path / "state.json").is_file() and (path / "var.parquet").is_file():
        table = datasets.load_from_disk(dataset)
        return table.to_iterable_dataset() if streaming else table, _index_genes(
            pd.read_parquet(path / "var.parquet"), gene_key
        )
    if path.exists() and not (path.is_dir() and next(path.rglob("*.parquet"), None)):
        raise ValueError(
            f"{path} is neither a .h5ad file, nor a .zarr store, nor a folder of them or one written by save_table."
        )
    if not path.exists() and (path.suffix in ANNDATA_SUFFIXES or len(path.parts) != 2):
        raise FileNotFoundError(f"{path} does not exist.")
    var = _index_genes(_read_vocabulary(dataset), gene_key)
    options: dict[str, Any] = {"streaming": True} if streaming else {"num_proc": num_proc}
    cache = None if cache_dir is None else str(cache_dir)
    table = datasets.load_dataset(dataset, name, split="train", cache_dir=cache, **options)
    missing = [key for key in VALUE_COLUMNS if table.features is not None and key not in table.features]
    if missing:
        raise ValueError(f"{dataset} has no columns {missing}, only {list(table.features)}: it is no table of cells.")
    return table, var


def _read_vocabulary(dataset: str) -> pd.DataFrame:
    """Read the genes of a folder or of a data set on the Hub."""
    if (Path(dataset) / "var.parquet").is_file():
        return pd.read_parquet(Path(dataset) / "var.parquet")
    if "gene_metadata" in datasets.get_dataset_config_names(dataset):
        return datasets.load_dataset(dataset, "gene_metadata", split="train").to_pandas()
    if Path(dataset).exists():
        raise ValueError(f"{dataset} has no gene vocabulary: neither var.parquet nor the configuration gene_metadata.")
    return pd.read_parquet(hf_hub_download(dataset, "var.parquet", repo_type="dataset"))


def _index_genes(var: pd.DataFrame, gene_key: str | None) -> pd.DataFrame:
    """Name the genes of a vocabulary by a column."""
    if gene_key is None and "gene_symbol" in var and isinstance(var.index, pd.RangeIndex):
        gene_key = "gene_symbol"
    if gene_key is None:
        return var
    if gene_key not in var:
        raise ValueError(f"The gene vocabulary has no column {gene_key!r}; it has {list(var)}.")
    return var.set_index(var[gene_key].astype(str).rename(None))


def read_cells(dataset: str | Path) -> ad.AnnData:
    """Read cells by name, all into memory; [`open_table`] leaves them on disk.

    Parameters
    ----------
    dataset
        A `.h5ad` file, a `.zarr` store, a folder written by [`save_table`], or the Hub id of a data set
        published by [`push_table`].

    Returns
    -------
    The cells, in memory.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder, and it is not the id of a data set on the Hub.
    ValueError
        The file is of another kind.
    """
    path = Path(dataset)
    if path.suffix == ".h5ad" and path.is_file():
        return ad.read_h5ad(path)
    if path.suffix == ".zarr" and path.is_dir():
        return ad.read_zarr(path)
    return table_to_anndata(*_open_dataset(str(dataset), None, False, None, None, None))


@dataclass(frozen=True)
class TableChunks:
    """Starts a pass over some rows of a table, see [`fit_chunks`]; can be sent to another process."""

    table: Table
    num_vars: int
    positions: np.ndarray | None
    labels_key: tuple[str, ...]

    def __call__(self) -> Iterator[tuple[sp.csr_matrix, pd.DataFrame]]:
        """Values and labels of some rows at a time."""
        for rows in iterate_rows(self.table, ROWS_PER_UPDATE, [*VALUE_COLUMNS, *self.labels_key]):
            yield rows_to_matrix(rows, self.num_vars, self.positions), rows_to_obs(rows, self.labels_key)


def fit_table(
    table: Table,
    var: pd.DataFrame,
    labels_key: str | Sequence[str] = (),
    num_proc: int | None = None,
    name: str = "the data",
    **options: Any,
) -> tuple[SCRDiTProcessor, CellMoments]:
    """Learn genes, transform and labels from a table, in two passes over it ("seurat_v3": three).

    What was learned from a table on disk is kept in the cache of `datasets`, where other processes and resumed runs
    find it. It does not depend on the number of processes.

    Parameters
    ----------
    table
        Training cells.
    var
        Its gene vocabulary.
    labels_key
        Column(s) that condition the model.
    num_proc
        Processes that go through a table on disk, each its share of parts of a million cells.
    **options
        As for [`SCRDiTProcessor.from_anndata`].

    Returns
    -------
    The processor, and the statistics from which a count head starts.

    Raises
    ------
    ValueError
        As [`SCRDiTProcessor.from_anndata`].
    """
    labels_key = [labels_key] if isinstance(labels_key, str) else list(labels_key)
    features, positions = table.features, token_positions(var)
    if features is not None:
        for key in labels_key:
            check_label(pd.DataFrame(columns=[key for key in features if key not in VALUE_COLUMNS]), key)

    def fit() -> tuple[SCRDiTProcessor, CellMoments]:
        parts = [TableChunks(part, len(var), positions, tuple(labels_key)) for part in _parts(table)]
        if num_proc is None or num_proc == 1 or len(parts) == 1:
            return fit_chunks(parts, var, labels_key, name, FitOptions(**options))
        # A fork of this process could wait for its threads for ever.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        workers = min(num_proc, len(parts))
        with ProcessPoolExecutor(workers, multiprocessing.get_context(method)) as executor:
            return fit_chunks(parts, var, labels_key, name, FitOptions(**options), executor.map)

    if isinstance(table, datasets.IterableDataset) or not table.cache_files:
        return fit()
    key = Hasher.hash([table._fingerprint, var.to_csv(), labels_key, sorted(options.items()), FIT_VERSION])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "scrdit_processors" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            processor, statistics = fit()
            unfinished = Path(f"{folder}.incomplete")
            processor.save_pretrained(unfinished)
            statistics.save(unfinished / "statistics.npz")
            unfinished.rename(folder)
    return SCRDiTProcessor.from_pretrained(folder), CellMoments.load(folder / "statistics.npz")


def _parts(table: Table) -> list[Table]:
    """Parts of a table that are gone through separately; a stream is one."""
    if isinstance(table, datasets.IterableDataset):
        return [table]
    starts = range(0, max(1, len(table)), ROWS_PER_PART)
    return [table.select(range(start, min(start + ROWS_PER_PART, len(table)))) for start in starts]


def read_labels(table: datasets.Dataset, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of obs of a table, as categoricals: a few bytes for each cell."""
    parts: dict[str, list[pd.Categorical]] = {key: [] for key in columns}
    no_rows = pd.DataFrame(columns=[key for key in table.column_names if key not in VALUE_COLUMNS])
    for key in columns:
        check_label(no_rows, key)
    for rows in iterate_rows(table, 100 * ROWS_PER_CHUNK, columns) if columns else []:
        obs = rows_to_obs(rows, columns)
        for key in columns:
            parts[key].append(pd.Categorical(obs[key]))
    joined = {key: pd.api.types.union_categoricals(of_key) for key, of_key in parts.items()}
    for key, labels in joined.items():
        if not isinstance(table.features[key], datasets.ClassLabel):
            joined[key] = labels.reorder_categories(sorted(labels.categories))
    return pd.DataFrame(joined, index=range(len(table)))


def split_cells(
    cells: ad.AnnData | pd.DataFrame, labels_key: str | Sequence[str], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Set cells aside: `fraction` of the cells of each combination of labels.

    Parameters
    ----------
    cells
        Cells, or their obs.
    labels_key
        Column(s) of obs; with none, cells are set aside from all.
    fraction
        Share to set aside, at least 0 and below 1; rounded for each combination, so that a lone cell stays.
    seed
        Makes the split reproducible.

    Returns
    -------
    Positions of the cells that stay and of those set aside, both sorted.

    Raises
    ------
    ValueError
        A column is missing, holds NaN or is not categorical.
    """
    labels_key = [labels_key] if isinstance(labels_key, str) else list(labels_key)
    obs = cells.obs if isinstance(cells, ad.AnnData) else cells
    if not len(obs):
        raise ValueError("adata has no cells.")
    for key in labels_key:
        label_categories(obs, key)
    rng = np.random.default_rng(seed)
    groups = [np.arange(len(obs))]
    if labels_key:
        grouped = obs[labels_key].reset_index(drop=True).groupby(labels_key, observed=True, sort=True)
        groups = [np.asarray(cells) for cells in grouped.groups.values()]
    aside = np.sort(np.concatenate([rng.permutation(cells)[: round(fraction * len(cells))] for cells in groups]))
    return np.setdiff1d(np.arange(len(obs)), aside), aside


def split_stream(
    table: datasets.IterableDataset, fraction: float, seed: int
) -> tuple[datasets.IterableDataset, datasets.IterableDataset]:
    """Set aside `fraction` of the cells of a stream, each by its position in it; returns those that stay, and those."""

    def is_aside(positions: Sequence[int]) -> np.ndarray:
        block, place = np.divmod(np.asarray(positions), ROWS_PER_CHUNK)
        draws = {number: np.random.default_rng([seed, number]).random(ROWS_PER_CHUNK) for number in np.unique(block)}
        return np.array([draws[number][i] for number, i in zip(block, place, strict=True)]) < fraction

    options = {"with_indices": True, "batched": True, "batch_size": ROWS_PER_CHUNK}
    table = table.with_format("arrow")
    stay = table.filter(lambda rows, positions: ~is_aside(positions), **options)
    return stay, table.filter(lambda rows, positions: is_aside(positions), **options)
