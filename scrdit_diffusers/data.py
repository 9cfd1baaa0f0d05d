"""Cells as a `datasets` table, and batches of them.

The table has the layout of the large public collections: one row per cell with `genes` (list of int32 positions in
the gene vocabulary), `expressions` (list of float32) and the columns of obs. The vocabulary, AnnData's `var`, lies
beside the table as `var.parquet`.
"""

from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
import torch
from huggingface_hub import HfApi, hf_hub_download

from .processing_scrdit import SCRDiTProcessor, get_matrix, label_categories

ROWS_PER_CHUNK = 10_000  # keeps the int32 offsets of a chunk's lists far from overflow


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
    Table with `genes` (positions in `adata.var_names`), `expressions` and the obs columns; categoricals become strings.

    Raises
    ------
    ValueError
        The values cannot be used, or a column of obs is named like one of the table's own.
    """
    matrix = get_matrix(adata, layer, counts=False).astype(np.float32)
    matrix.sort_indices()
    obs = adata.obs if obs_columns is None else adata.obs[list(obs_columns)]
    taken = [key for key in ("genes", "expressions") if key in obs]
    if taken:
        raise ValueError(f"obs has columns {taken}, names that the table needs itself; rename them or leave them out.")
    categoricals = obs.select_dtypes("category").columns
    obs = obs.assign(**{key: obs[key].astype(object).map(str, na_action="ignore") for key in categoricals})
    schema = pa.Schema.from_pandas(obs, preserve_index=False).remove_metadata()
    chunks = []
    for start in range(0, max(adata.n_obs, 1), ROWS_PER_CHUNK):
        rows = matrix[start : start + ROWS_PER_CHUNK]
        offsets = pa.array(rows.indptr.astype(np.int32))
        columns = {
            "genes": pa.ListArray.from_arrays(offsets, pa.array(rows.indices.astype(np.int32))),
            "expressions": pa.ListArray.from_arrays(offsets, pa.array(rows.data)),
        }
        labels = pa.Table.from_pandas(obs.iloc[start : start + ROWS_PER_CHUNK], schema=schema, preserve_index=False)
        chunks.append(pa.table(columns | {name: labels[name] for name in labels.column_names}))
    return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(chunks)))


def rows_to_matrix(rows: pa.Table, num_vars: int) -> sp.csr_matrix:
    """Assemble the CSR matrix (cells, `num_vars`) of some rows of the table."""
    genes, expressions = rows["genes"].combine_chunks(), rows["expressions"].combine_chunks()
    lengths = np.asarray(genes.value_lengths(), dtype=np.int64)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    data = np.asarray(expressions.flatten(), dtype=np.float32)
    return sp.csr_matrix((data, np.asarray(genes.flatten()), indptr), shape=(rows.num_rows, num_vars))


def table_to_anndata(table: datasets.Dataset, var: pd.DataFrame) -> ad.AnnData:
    """Turn a table and its gene vocabulary into an AnnData in memory; the inverse of [`anndata_to_table`]."""
    rows = table.with_format("arrow")[:]
    obs = rows.drop_columns(["genes", "expressions"]).to_pandas()
    obs.index = obs.index.astype(str)
    return ad.AnnData(rows_to_matrix(rows, len(var)), obs=obs, var=var)


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
    """
    anndata_to_table(adata, layer).push_to_hub(repo_id, private=private, token=token)
    vocabulary = adata.var.rename_axis("var_names").to_parquet()
    HfApi(token=token).upload_file(
        path_or_fileobj=vocabulary, path_in_repo="var.parquet", repo_id=repo_id, repo_type="dataset"
    )


def read_cells(dataset: str | Path) -> ad.AnnData:
    """Read cells by name.

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
    if (path / "var.parquet").is_file():
        return table_to_anndata(datasets.load_from_disk(str(path)), pd.read_parquet(path / "var.parquet"))
    if path.exists():
        raise ValueError(f"{path} is neither a .h5ad file, nor a .zarr store, nor a folder written by save_table.")
    if path.suffix in (".h5ad", ".zarr") or len(path.parts) != 2:
        raise FileNotFoundError(f"{path} does not exist.")
    var = pd.read_parquet(hf_hub_download(str(dataset), "var.parquet", repo_type="dataset"))
    return table_to_anndata(datasets.load_dataset(str(dataset), split="train"), var)


def split_cells(
    adata: ad.AnnData, labels_key: str | Sequence[str], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Set cells aside: `fraction` of the cells of each combination of labels.

    Parameters
    ----------
    adata
        Cells.
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
    if not adata.n_obs:
        raise ValueError("adata has no cells.")
    for key in labels_key:
        label_categories(adata.obs, key)
    rng = np.random.default_rng(seed)
    groups = [np.arange(adata.n_obs)]
    if labels_key:
        grouped = adata.obs[labels_key].reset_index(drop=True).groupby(labels_key, observed=True, sort=True)
        groups = [np.asarray(cells) for cells in grouped.groups.values()]
    aside = np.sort(np.concatenate([rng.permutation(cells)[: round(fraction * len(cells))] for cells in groups]))
    return np.setdiff1d(np.arange(adata.n_obs), aside), aside


class CellDataset(torch.utils.data.Dataset):
    """Serves whole batches of table rows to a DataLoader as one `pyarrow.Table`.

    Parameters
    ----------
    table
        Table with `genes`, `expressions` and the condition columns.
    """

    def __init__(self, table: datasets.Dataset):
        self.table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, indices: list[int]) -> pa.Table:
        return self.table[indices]


class CellCollator:
    """Turns rows of the table into tensors in model space, the only place where cells are densified.

    Parameters
    ----------
    processor
        Gives genes, transform and labels.
    var_names
        Gene vocabulary of the table.
    counts
        Also give the counts, for a model with a count head.
    """

    def __init__(self, processor: SCRDiTProcessor, var_names: Sequence[str], counts: bool = False):
        if counts and processor.value_space != "counts":
            raise ValueError(f'counts=True needs a processor with value_space="counts", not {processor.value_space!r}.')
        self.processor = processor
        self.counts = counts
        self.num_vars = len(var_names)
        self.columns = processor.gene_columns(var_names)

    def __call__(self, rows: pa.Table) -> dict[str, torch.Tensor]:
        """Collate B rows.

        Returns
        -------
        `values` (B, G) float32 in model space, `class_labels` (B, K) int64, and if asked for `counts` (B, G) float32.
        """
        values = self.processor.select_values(rows_to_matrix(rows, self.num_vars), self.columns)
        obs = pd.DataFrame(
            {key: rows[key].to_pandas() for key in self.processor.condition_keys}, index=range(rows.num_rows)
        )
        batch = {
            "values": torch.from_numpy(self.processor.transform(values)).float(),
            "class_labels": torch.from_numpy(self.processor.encode_labels(obs)),
        }
        if self.counts:
            batch["counts"] = torch.from_numpy(values.toarray()).float()
        return batch
