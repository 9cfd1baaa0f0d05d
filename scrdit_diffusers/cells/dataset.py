"""Cells as a `datasets` dataset with its gene vocabulary, opened from files or from the Hub.

Each row is a cell, see [`layout`]; the vocabulary is AnnData's `var`, which lies beside the rows as `var.parquet`.
AnnData files are converted some thousand rows at a time into the cache of `datasets`. Nothing here holds all cells in
memory except what is called AnnData, and only [`CellCollator`] makes values dense.
"""

import glob
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, hf_hub_download

from scrdit_diffusers.atomic import write_atomically
from scrdit_diffusers.checks import check_label, check_single_values, get_matrix, label_categories, label_text
from scrdit_diffusers.hub import explain_push

from .anndata_builder import check_files, convert_files
from .cell_file import CellFile
from .damage import folder_of, reading
from .layout import (
    VALUE_COLUMNS,
    LabelNames,
    check_obs_columns,
    column_type,
    columns_to_arrow,
    dataset_features,
    iterate_rows,
    rows_to_matrix,
    rows_to_obs,
    token_positions,
    values_to_arrow,
)
from .moments import ROWS_PER_CHUNK

ANNDATA_SUFFIXES = (".h5ad", ".zarr")
TOKEN_KEY = b"scrdit_token_key"  # in the metadata of var.parquet: the column of tokens that `genes` holds


@dataclass(frozen=True, eq=False)
class CellDataset:
    """Cells on disk, in memory or streamed, and the genes that their values belong to.

    Parameters
    ----------
    rows
        One row per cell: `genes`, `expressions` and the columns of obs, categoricals as `ClassLabel`.
    var
        Gene vocabulary.
    token_key
        Column of var with the tokens that `genes` holds; `None` where `genes` holds positions in var.

    Examples
    --------
    >>> import anndata as ad, numpy as np, pandas as pd
    >>> from scrdit_diffusers import CellDataset
    >>> obs = pd.DataFrame({"cell_type": pd.Categorical(["T", "B"] * 4)}, index=[f"cell{i}" for i in range(8)])
    >>> cells = CellDataset.from_anndata(ad.AnnData(np.ones((8, 3), np.float32), obs=obs))
    >>> train, val = cells.split("cell_type", 0.25, seed=0)
    >>> len(train), len(val)
    (6, 2)
    """

    rows: datasets.Dataset | datasets.IterableDataset
    var: pd.DataFrame
    token_key: str | None = None

    @classmethod
    def open(
        cls,
        source: str | Path | Sequence[str | Path],
        layer: str | None = None,
        expect_counts: bool = False,
        obs_columns: Sequence[str] | None = None,
        labels_key: Sequence[str] = (),
        join: str = "inner",
        gene_key: str | None = None,
        streaming: bool = False,
        name: str | None = None,
        num_proc: int | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Open cells such that rows are read from disk when they are asked for.

        AnnData files are converted once, into the cache of `datasets`; one chunk of rows and the chosen columns of obs
        are in memory meanwhile.

        Parameters
        ----------
        source
            A `.h5ad` file, a `.zarr` store, a folder or glob pattern or list of them; a folder written by [`save`]; or
            a dataset of the same layout, as a local folder or on the Hub. Its vocabulary is `var.parquet`, or the
            configuration `gene_metadata` with `gene_symbol`, `ensembl_id` and, for rows of tokens, `token_id`.
        layer
            Of AnnData files: layer that holds the values; `None` takes X.
        expect_counts
            Of AnnData files: refuse values that are not counts; those of the first cells of each file are checked
            before anything is converted.
        obs_columns
            Of AnnData files: columns of obs to keep; `None` keeps those that all files have and that can be read.
        labels_key
            Of AnnData files: columns of obs that each file must have.
        join
            Of several files: "inner" keeps the genes that all have, "outer" keeps all genes, zero where a file lacks
            them.
        gene_key
            Column of var that identifies a gene, such as one of Ensembl ids; `None` takes var_names, or `gene_symbol`.
        streaming
            Of datasets: read them during training instead of downloading them first.
        name
            Of datasets: configuration that holds the cells; `None` takes the default one.
        num_proc
            Processes that convert or download, each its share of the files.
        cache_dir
            Where datasets are kept; `None` takes the cache of `datasets` (environment variable `HF_DATASETS_CACHE`).

        Returns
        -------
        The cells.

        Raises
        ------
        FileNotFoundError
            There is no such file or folder, and it is not the id of a dataset on the Hub.
        ValueError
            A file is of another kind, or files or values do not fit; the message names the file.
        OSError
            The cache cannot be written, or has no room.
        """
        files = find_files(source) if isinstance(source, str | Path) else _visible(map(Path, source))
        for path in files:
            if not (path.exists() and _is_anndata(path)):
                raise FileNotFoundError(f"{path} does not exist, or is neither a .h5ad file nor a .zarr store.")
        if not files:
            return cls(*_load(str(source), gene_key, streaming, name, num_proc, cache_dir))
        if streaming:
            raise ValueError("streaming is for datasets; AnnData files are memory-mapped once converted.")
        columns = check_files(files, layer, expect_counts, obs_columns, labels_key)
        return cls(*convert_files(files, layer, expect_counts, columns, join, gene_key, num_proc, cache_dir))

    @classmethod
    def from_anndata(
        cls, adata: ad.AnnData, layer: str | None = None, obs_columns: Sequence[str] | None = None
    ) -> Self:
        """Turn cells into rows in memory.

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
        The cells, with positions in `adata.var_names` as `genes`.

        Raises
        ------
        ValueError
            The values cannot be used, or a column of obs is named `genes` or `expressions`.
        """
        matrix = get_matrix(adata, layer, expect_counts=False).astype(np.float32)
        matrix.sort_indices()
        obs = adata.obs if obs_columns is None else adata.obs[list(obs_columns)]
        check_obs_columns(list(obs))
        if not obs.columns.is_unique:
            twice = list(obs.columns[obs.columns.duplicated()])
            raise ValueError(f"obs has more than one column of the names {twice}; rename or drop the others.")
        features = dataset_features({key: column_type(obs[key]) for key in obs})
        chunks = []
        for start in range(0, max(adata.n_obs, 1), ROWS_PER_CHUNK):
            part = slice(start, start + ROWS_PER_CHUNK)
            columns = values_to_arrow(matrix[part]) | columns_to_arrow(obs.iloc[part], features)
            chunks.append(pa.table(columns, schema=features.arrow_schema))
        rows = datasets.Dataset(pa.concat_tables(chunks), info=datasets.DatasetInfo(features=features))
        return cls(rows, adata.var)

    @property
    def is_stream(self) -> bool:
        """Whether the cells can only be read in order."""
        return isinstance(self.rows, datasets.IterableDataset)

    @property
    def _stored(self) -> datasets.Dataset:
        if isinstance(self.rows, datasets.IterableDataset):
            raise ValueError("A stream can only be read in order; open the dataset with streaming=False.")
        return self.rows

    def __len__(self) -> int:
        return len(self._stored)

    def select(self, indices: Sequence[int] | np.ndarray) -> Self:
        """Keep the cells at some positions, in this order."""
        return replace(self, rows=self._stored.select(indices))

    def labels(self, columns: Sequence[str]) -> pd.DataFrame:
        """Columns of obs as categoricals, which take a few bytes for each cell."""
        rows = self._stored
        parts: dict[str, list[pd.Categorical]] = {key: [] for key in columns}
        no_rows = pd.DataFrame(columns=[key for key in rows.column_names if key not in VALUE_COLUMNS])
        for key in columns:
            check_label(no_rows, key)
        for chunk in self.iterate(100 * ROWS_PER_CHUNK, columns) if columns else []:
            obs = rows_to_obs(chunk, columns)
            for key in columns:
                check_single_values(obs[key], f"obs[{key!r}]")
                parts[key].append(pd.Categorical(obs[key]))
        joined = {key: pd.api.types.union_categoricals(of_key) for key, of_key in parts.items()}
        for key, labels in joined.items():
            if not isinstance(rows.features[key], datasets.ClassLabel):
                joined[key] = labels.reorder_categories(sorted(labels.categories))
        return pd.DataFrame(joined, index=range(len(rows)))

    def split(self, labels_key: str | Sequence[str], fraction: float, seed: int) -> tuple[Self, Self]:
        """Set aside `fraction` of the cells for validation.

        Parameters
        ----------
        labels_key
            Column(s) of obs: cells are set aside from each combination of labels, see [`split_cells`]. From a stream,
            whose labels are not known in advance, cells are set aside by their positions instead.
        fraction
            Share to set aside, at least 0 and below 1.
        seed
            Makes the split reproducible.

        Returns
        -------
        The cells that stay, and those set aside.
        """
        if isinstance(self.rows, datasets.IterableDataset):
            if not fraction:
                return self, replace(self, rows=self.rows.take(0))
            stay, aside = _split_stream(self.rows, fraction, seed)
            return replace(self, rows=stay), replace(self, rows=aside)
        keys = [labels_key] if isinstance(labels_key, str) else list(labels_key)
        train, val = split_cells(self.labels(keys), keys, fraction, seed)
        return self.select(train), self.select(val)

    def iterate(self, batch_size: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Go through the cells in order, some rows at a time, with the names of labels."""
        return iterate_rows(self.rows, batch_size, columns)

    def sample(self, num_cells: int, columns: Sequence[str], rng: np.random.Generator) -> pa.Table:
        """Draw at most `num_cells` cells, in the order of their positions; from a stream, take the first ones.

        Parameters
        ----------
        num_cells
            Number of cells.
        columns
            Columns of obs to read besides the values.
        rng
            Source of the draw.

        Returns
        -------
        Rows for a [`CellCollator`], with the names of labels. There are none if the dataset has no cells.
        """
        columns = [*VALUE_COLUMNS, *columns]
        if self.is_stream:
            return next(self.iterate(num_cells, columns), pa.table({}))
        drawn = np.sort(rng.permutation(len(self))[:num_cells])
        return next(self.select(drawn).iterate(num_cells, columns), pa.table({}))

    def to_anndata(self) -> ad.AnnData:
        """Read all cells into memory; the inverse of [`from_anndata`], except for obs_names.

        Raises
        ------
        ValueError
            A file of the dataset is damaged, or the dataset is a stream.
        """
        with reading(folder_of(self._stored), "its cells"):
            rows = LabelNames(self._stored.features)(self._stored.with_format("arrow")[:])
            matrix = rows_to_matrix(rows, len(self.var), token_positions(self.var, self.token_key))
        obs = rows_to_obs(rows, [key for key in rows.column_names if key not in VALUE_COLUMNS])
        obs.index = obs.index.astype(str)
        return ad.AnnData(matrix, obs=obs, var=self.var)

    def save(self, folder: str | Path) -> None:
        """Write the cells and their gene vocabulary as a folder for [`open`] and [`read_cells`].

        Parameters
        ----------
        folder
            Where to write. A saved dataset of this name is replaced once the new one is whole.

        Raises
        ------
        ValueError
            The folder holds other things, which would be lost.
        """
        rows, folder = self._stored, Path(folder)
        if folder.exists() and not (folder / "state.json").is_file() and (folder.is_file() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists and is not a saved dataset; give a folder that is empty or not there.")
        with write_atomically(folder) as temporary:
            rows.save_to_disk(str(temporary))
            pq.write_table(self._vocabulary(), temporary / "var.parquet")

    def _vocabulary(self) -> pa.Table:
        """Genes as `var.parquet` stores them; a note in its metadata names the column of tokens."""
        index = "var_names"
        while index in self.var:  # a column of the user's
            index = f"_{index}"
        var = self.var.rename_axis(index)
        for key in var.columns[var.dtypes == "object"]:
            if column_type(var[key]) == datasets.Value("string"):  # also where types are mixed
                var[key] = var[key].map(label_text, na_action="ignore")
        vocabulary = pa.Table.from_pandas(var)
        note = {} if self.token_key is None else {TOKEN_KEY: self.token_key.encode()}
        return vocabulary.replace_schema_metadata(vocabulary.schema.metadata | note)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | bool | None = None) -> None:
        """Publish the cells as a dataset on the Hub, with their gene vocabulary, for [`open`] and [`read_cells`].

        Parameters
        ----------
        repo_id
            Dataset on the Hub, such as "user/pbmc"; it is created if it does not exist.
        private
            Make a new dataset private; `None` takes the account's default.
        token
            Token for the Hub; the stored one if `None`.

        Raises
        ------
        OSError
            The Hub refused, or cannot be reached; the message says what to do.
        """
        vocabulary = io.BytesIO()
        pq.write_table(self._vocabulary(), vocabulary)
        with explain_push(repo_id):
            self.rows.push_to_hub(repo_id, private=private, token=token)
            HfApi(token=token).upload_file(
                path_or_fileobj=vocabulary.getvalue(), path_in_repo="var.parquet", repo_id=repo_id, repo_type="dataset"
            )


def read_cells(source: str | Path) -> ad.AnnData:
    """Read cells into memory; [`CellDataset.open`] leaves them on disk.

    Parameters
    ----------
    source
        A `.h5ad` file, a `.zarr` store, a folder written by [`CellDataset.save`], or the Hub id of a dataset published
        by [`CellDataset.push_to_hub`].

    Returns
    -------
    The cells, in memory. Layers, columns and other parts that cannot be read are left out with a warning.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder, and it is not the id of a dataset on the Hub.
    ValueError
        The file is of another kind, it is a folder of AnnData files, or neither X nor any layer can be read.
    """
    path = Path(source)
    if not (_is_anndata(path) and path.exists()):
        if files := find_files(source):
            raise ValueError(f"{source} is {len(files)} AnnData files, and one is needed: join them by anndata.concat.")
        return CellDataset(*_load(str(source))).to_anndata()
    with CellFile(path) as file, reading(path):
        return file.read()


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
        A column is missing, holds NaN or is not categorical, or `fraction` is out of range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be at least 0 and below 1, got {fraction!r}.")
    labels_key = [labels_key] if isinstance(labels_key, str) else list(labels_key)
    obs = cells.obs if isinstance(cells, ad.AnnData) else cells
    if not len(obs):
        raise ValueError("adata has no cells.")
    for key in labels_key:
        label_categories(obs, key)
    rng = np.random.default_rng(seed)
    groups = [np.arange(len(obs))]
    if labels_key:
        by = labels_key if len(labels_key) > 1 else labels_key[0]  # pandas 3 warns of a list with a single name
        grouped = obs[labels_key].reset_index(drop=True).groupby(by, observed=True, sort=True)
        groups = [np.asarray(cells) for cells in grouped.groups.values()]
    aside = np.sort(np.concatenate([rng.permutation(cells)[: round(fraction * len(cells))] for cells in groups]))
    return np.setdiff1d(np.arange(len(obs)), aside), aside


def find_files(source: str | Path) -> list[Path]:
    """AnnData files that a name stands for: a file, a folder of them, or a pattern such as `cells/*.h5ad`."""
    path = Path(source)
    if _is_anndata(path) and path.exists():
        return [path]
    if path.is_dir():
        return sorted(filter(_is_anndata, _visible(path.iterdir())))
    if any(character in str(source) for character in "*?["):
        found = _visible(map(Path, glob.glob(str(source))))
        return sorted(filter(_is_anndata, found))
    return []


def _is_anndata(path: Path) -> bool:
    """Whether a path has the name of an AnnData file; Windows and some pipelines write `CELLS.H5AD`."""
    return path.suffix.lower() in ANNDATA_SUFFIXES


def _visible(paths: Iterable[Path]) -> list[Path]:
    """Leave out the files that macOS puts beside others on foreign disks, such as `._cells.h5ad`."""
    return [path for path in paths if not path.name.startswith("._")]


def _load(
    source: str,
    gene_key: str | None = None,
    streaming: bool = False,
    name: str | None = None,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[datasets.Dataset | datasets.IterableDataset, pd.DataFrame, str | None]:
    """[`CellDataset.open`] for a folder or a dataset on the Hub: rows, genes and the column of tokens."""
    path = Path(source)
    rows: datasets.Dataset | datasets.IterableDataset
    if (path / "state.json").is_file() and (path / "var.parquet").is_file():
        with reading(source, "the dataset"):
            rows = datasets.load_from_disk(source)
            var, token_key = _read_vocabulary(source)
        rows = rows.to_iterable_dataset() if streaming else rows
    else:
        if path.exists() and not (path.is_dir() and next(path.rglob("*.parquet"), None)):
            raise ValueError(
                f"{path} is neither a .h5ad file, nor a .zarr store, nor a folder of them or one that CellDataset.save "
                "has written."
            )
        if not path.exists() and (_is_anndata(path) or len(path.parts) != 2):
            raise FileNotFoundError(f"{path} does not exist.")
        options: dict[str, Any] = {"streaming": True} if streaming else {"num_proc": num_proc}
        with reading(path if path.exists() else None, "the dataset"):
            var, token_key = _read_vocabulary(source)
            rows = datasets.load_dataset(source, name, split="train", cache_dir=cache_dir and str(cache_dir), **options)
        missing = [key for key in VALUE_COLUMNS if rows.features is not None and key not in rows.features]
        if missing:
            raise ValueError(f"{source} has no columns {missing}, only {list(rows.features)}: it does not hold cells.")
    if streaming:
        rows.info.dataset_name = source  # for errors, see [`folder_of`]
    return rows, _index_genes(var, gene_key), token_key


def _read_vocabulary(source: str) -> tuple[pd.DataFrame, str | None]:
    """Read the genes of a folder or of a dataset on the Hub, and which of their columns holds tokens."""
    path = Path(source) / "var.parquet"
    if not path.is_file():
        if "gene_metadata" in datasets.get_dataset_config_names(source):
            var = datasets.load_dataset(source, "gene_metadata", split="train").to_pandas()
            return var, "token_id" if "token_id" in var else None
        if Path(source).exists():
            raise ValueError(
                f"{source} has no gene vocabulary: neither var.parquet nor the configuration gene_metadata."
            )
        path = Path(hf_hub_download(source, "var.parquet", repo_type="dataset"))
    with reading(path, "the gene vocabulary"):
        table = pq.read_table(path)
        token_key = (table.schema.metadata or {}).get(TOKEN_KEY)
        return table.to_pandas(), None if token_key is None else token_key.decode()


def _index_genes(var: pd.DataFrame, gene_key: str | None) -> pd.DataFrame:
    """Name the genes of a vocabulary by a column."""
    if gene_key is None and "gene_symbol" in var and isinstance(var.index, pd.RangeIndex):
        gene_key = "gene_symbol"
    if gene_key is None:
        return var
    if gene_key not in var:
        raise ValueError(f"The gene vocabulary has no column {gene_key!r}; it has {list(var)}.")
    return var.set_index(var[gene_key].map(str, na_action="ignore").rename(None))


def _split_stream(
    rows: datasets.IterableDataset, fraction: float, seed: int
) -> tuple[datasets.IterableDataset, datasets.IterableDataset]:
    """Set aside `fraction` of the cells, each by a draw of its position alone; return those that stay, and those."""

    def is_aside(positions: Sequence[int]) -> np.ndarray:
        block, place = np.divmod(np.asarray(positions), ROWS_PER_CHUNK)
        draws = {number: np.random.default_rng([seed, number]).random(ROWS_PER_CHUNK) for number in np.unique(block)}
        return np.array([draws[number][i] for number, i in zip(block, place, strict=True)]) < fraction

    options = {"with_indices": True, "batched": True, "batch_size": ROWS_PER_CHUNK}
    rows = rows.with_format("arrow")
    stay = rows.filter(lambda rows, positions: ~is_aside(positions), **options)
    return stay, rows.filter(lambda rows, positions: is_aside(positions), **options)
