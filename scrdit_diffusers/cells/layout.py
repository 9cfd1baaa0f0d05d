"""The layout of cells in a dataset, one row per cell: to Arrow, and back to SciPy and pandas.

A row has `genes` (list of int32 positions in the gene vocabulary), `expressions` (list of float32) and the columns of
obs, categoricals as `ClassLabel`. This is the layout of the large public collections. Where these use tokens, as
tahoebio/Tahoe-100M does, `genes` holds tokens instead, and a row may begin with a special token.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from scrdit_diffusers.checks import check_exact, label_text

from .damage import folder_of, reading

VALUE_COLUMNS = ["genes", "expressions"]
MAX_CLASS_LABELS = 10_000  # categoricals with more categories, such as barcodes, become strings


def class_label(names: Sequence[str]) -> Any:
    """Type of a categorical column."""
    if 0 < len(names) <= MAX_CLASS_LABELS and len(set(names)) == len(names):
        return datasets.ClassLabel(names=list(names))
    return datasets.Value("string")


def pa_type_name(dtype: np.dtype) -> str:
    """Name that `datasets` has for a NumPy type of numbers."""
    return str(pa.from_numpy_dtype(dtype)) if dtype.kind != "f" else f"float{8 * dtype.itemsize}"


def column_type(column: pd.Series) -> Any:
    """Type that a column of obs has in a dataset."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return class_label([str(name) for name in column.cat.categories])
    try:
        schema = pa.Schema.from_pandas(column.to_frame("column"), preserve_index=False)
        return datasets.Features.from_arrow_schema(schema.remove_metadata())["column"]
    except (pa.ArrowException, TypeError, ValueError):  # of mixed types, such as 1 and "X", or ones of pandas alone
        return datasets.Value("string")


def check_obs_columns(columns: Sequence[str]) -> None:
    """Raise ValueError for columns of obs whose names the layout needs itself."""
    taken = [key for key in VALUE_COLUMNS if key in columns]
    if taken:
        raise ValueError(
            f"obs has columns {taken}, names that the dataset needs itself; rename them or leave them out."
        )


def whole_number(name: str) -> str:
    """Write a label such as 1.0 as the integer 1, which other files may hold; any other label stays as it is."""
    return name[:-2] if re.fullmatch(r"-?\d+\.0", name) else name


def join_labels(names_of_files: Sequence[Sequence[str]]) -> list[str]:
    """Labels of a column of several files, in the order of occurrence; 1 stands for 1.0 unless a file has both."""
    joined = list(dict.fromkeys(name for names in names_of_files for name in names))
    distinct = {name for names in names_of_files for name in names if whole_number(name) in set(names) - {name}}
    return [
        name for name in joined if whole_number(name) == name or name in distinct or whole_number(name) not in joined
    ]


def columns_to_arrow(obs: pd.DataFrame, features: datasets.Features) -> dict[str, pa.Array]:
    """Columns of obs as a dataset stores them."""
    columns: dict[str, pa.Array] = {}
    for key in map(str, obs):
        column, feature = obs[key], features[key]
        if isinstance(feature, datasets.ClassLabel):
            names = pd.Index(feature.names)
            categories = pd.Categorical(column)
            found = categories.categories.map(str)
            of_category = names.get_indexer(found)
            of_category = np.where(of_category < 0, names.get_indexer(found.map(whole_number)), of_category)
            codes = np.append(of_category, -1)[categories.codes]
            columns[key] = pa.array(codes, pa.int64(), mask=codes < 0)
        elif feature == datasets.Value("string"):
            texts = column.astype(object).map(label_text, na_action="ignore")
            columns[key] = pa.array(texts, pa.string(), from_pandas=True)
        else:
            columns[key] = pa.array(column, features.arrow_schema.field(key).type, from_pandas=True)
    return columns


def values_to_arrow(matrix: sp.csr_matrix) -> dict[str, pa.Array]:
    """Rows of a matrix as the columns `genes` and `expressions`."""
    offsets = pa.array(matrix.indptr.astype(np.int32, copy=False))
    return {
        "genes": pa.ListArray.from_arrays(offsets, pa.array(matrix.indices.astype(np.int32, copy=False))),
        "expressions": pa.ListArray.from_arrays(offsets, pa.array(matrix.data.astype(np.float32, copy=False))),
    }


def dataset_features(columns: dict[str, Any]) -> datasets.Features:
    """Column types of a dataset with these columns of obs."""
    values = {"genes": datasets.List(datasets.Value("int32")), "expressions": datasets.List(datasets.Value("float32"))}
    return datasets.Features(values | columns)


def token_positions(var: pd.DataFrame, token_key: str | None) -> np.ndarray | None:
    """Position in the vocabulary of each token of a column of var, -1 for others; `None` without such a column."""
    if token_key is None:
        return None
    tokens = var[token_key].to_numpy()
    positions = np.full(tokens.max() + 1, -1)
    positions[tokens] = np.arange(len(var))
    return positions


def rows_to_matrix(rows: pa.Table, num_vars: int, positions: np.ndarray | None = None) -> sp.csr_matrix:
    """Assemble the CSR matrix (cells, `num_vars`) of some rows of a dataset.

    Parameters
    ----------
    rows
        Rows with `genes` and `expressions`, of integers or floats.
    num_vars
        Number of genes in the vocabulary.
    positions
        From [`token_positions`], for a dataset whose `genes` are tokens. A negative value at the beginning of a row
        marks a special token and is left out.

    Raises
    ------
    ValueError
        A token or position is not in the vocabulary, or float32 would round an integer.
    """
    genes, expressions = rows["genes"].combine_chunks(), rows["expressions"].combine_chunks()
    indptr = np.concatenate([[0], np.cumsum(np.asarray(genes.value_lengths(), dtype=np.int64))])
    indices = np.asarray(genes.flatten())
    data = np.asarray(expressions.flatten())
    check_exact(data, "expressions")
    data = data.astype(np.float32, copy=False)
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
    if len(indices) and not 0 <= indices.min() <= indices.max() < num_vars:
        wrong = indices[(indices < 0) | (indices >= num_vars)]
        raise ValueError(
            f"{len(wrong)} values belong to gene {wrong[0]} or others that the vocabulary of {num_vars} genes does not "
            "have: these rows were saved with another var."
        )
    return sp.csr_matrix((data, indices, indptr), shape=(rows.num_rows, num_vars))


class LabelNames:
    """Replaces the numbers in `ClassLabel` columns by their names, as a dictionary column.

    Parameters
    ----------
    features
        Column types of the dataset; `None` where they are not known.
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


def iterate_rows(
    dataset: datasets.Dataset | datasets.IterableDataset, batch_size: int, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Go through a dataset in order, some rows at a time, with the names of labels.

    Raises
    ------
    ValueError
        A file of the dataset is damaged.
    """
    named = LabelNames(dataset.features)
    if isinstance(dataset, datasets.IterableDataset):
        batches = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size)
    else:
        batches = dataset.with_format("arrow", columns=list(columns)).iter(batch_size)
    with reading(folder_of(dataset), "its cells"):
        for rows in batches:
            yield named(rows)


def rows_to_obs(rows: pa.Table, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of obs of some rows."""
    missing = [key for key in columns if key not in rows.column_names]
    if missing:
        raise ValueError(f"The dataset has no columns {missing}; it has {rows.column_names}.")
    return pd.DataFrame({key: rows[key].to_pandas() for key in columns}, index=range(rows.num_rows))
