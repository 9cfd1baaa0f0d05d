"""All checks of AnnData, genes, labels and values, so that each has one wording."""

import difflib
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

logger = logging.getLogger(__name__)

NUMBER = re.compile(r"\d+(\.0)?")  # a gene name that is a position
# A label that is a number, as programs write them: "1_0", which Python reads as 10, is a name, and so is "1e1".
NUMBER_LABEL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]\d{1,2})?")
SYNTHETIC_KEY = "synthetic"  # column of obs: True for generated cells, False for real ones
MAX_COUNT = 2**24  # float32, AnnData's usual dtype, holds integers exactly up to here


def native(values: np.ndarray) -> np.ndarray:
    """Numbers as SciPy and Arrow can hold them: of this machine's byte order, not of half or extended precision."""
    dtype = {"e": np.float32, "g": np.float64}.get(values.dtype.char, values.dtype.newbyteorder("="))
    return values.astype(dtype, copy=False)


def as_csr(matrix: Any) -> sp.csr_matrix:
    """Cells x genes as a CSR matrix, see [`native`]; its values are those of `matrix`, shared where possible."""
    if hasattr(matrix, "compute"):  # of dask
        matrix = matrix.compute()
    if sp.issparse(matrix):
        return sp.csr_matrix(matrix.astype(native(np.empty(0, matrix.dtype)).dtype, copy=False))
    return sp.csr_matrix(native(np.asarray(matrix)))


def looks_like_counts(matrix: np.ndarray | sp.spmatrix) -> bool:
    """Whether all values of a matrix are finite, non-negative integers (and not all are zero)."""
    data = np.asarray(matrix.data if sp.issparse(matrix) else matrix)
    if data.size == 0 or data.dtype.kind not in "iuf" or not np.isfinite(data).all():
        return False
    return bool(data.min() >= 0 and data.max() > 0 and np.array_equal(data, np.rint(data)))


def check_values(matrix: sp.csr_matrix, name: str, expect_counts: bool, hint: str = "") -> None:
    """Raise ValueError unless all values are finite, non-negative and, for counts, integers that float32 holds.

    Parameters
    ----------
    matrix
        Cells x genes.
    name
        What to call the matrix in the message, such as `adata.layers['counts']`.
    expect_counts
        Whether integers are expected.
    hint
        Where the right values may be; ends the message.
    """
    data = matrix.data
    if data.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds values of type {data.dtype}, expected real numbers; take their real part.")
    if not np.isfinite(data).all():
        raise ValueError(
            f"{name} holds {np.sum(~np.isfinite(data))} NaN or infinite values; fill or drop them first.{hint}"
        )
    if data.size and data.max() > np.finfo(np.float32).max:
        raise ValueError(f"{name} holds {data.max():g}, more than float32 holds; fill or drop such values first.{hint}")
    if data.size and data.min() < 0:
        raise ValueError(
            f"{name} holds negative values (smallest {data.min():g}), as scaled data do; give unscaled values.{hint}"
        )
    if expect_counts and not np.array_equal(data, np.rint(data)):
        example = data[data != np.rint(data)][0]
        raise ValueError(
            f"{name} was taken as counts but holds non-integers such as {example:g}.{hint} Give counts, or the layer "
            'that holds them; a model is trained on log-normalized values by value_space="log_normalized".'
        )
    if expect_counts and data.size and data.max() > MAX_COUNT:
        raise ValueError(f"{name} holds a count of {data.max():g}; the largest supported is 2^24 = {MAX_COUNT}.{hint}")
    check_exact(data, name)


def check_exact(values: np.ndarray, name: str) -> None:
    """Raise ValueError for an integer that float32 would round; `name` is what the message calls the values."""
    large = values[values > MAX_COUNT]
    rounded = large[(large == np.rint(large)) & (large.astype(np.float32).astype(large.dtype) != large)]
    if len(rounded):
        raise ValueError(
            f"{name} holds {rounded[0]:.0f}, which float32 would round, as it does integers above 2^24 = {MAX_COUNT}; "
            "drop such values, or divide all by a constant."
        )


def matrix_name(layer: str | None) -> str:
    """Name of X (`layer=None`) or of a layer in messages."""
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def get_matrix(adata: ad.AnnData, layer: str | None, expect_counts: bool) -> sp.csr_matrix:
    """Take X (`layer=None`) or a layer as CSR and check its values.

    Raises
    ------
    ValueError
        The layer does not exist, or its values are not what `expect_counts` says; the message names the layers that
        look like counts.
    """
    name = matrix_name(layer)
    if adata.isbacked:
        raise ValueError("adata is backed by a file; load it into memory with adata.to_memory().")
    if layer is not None and layer not in adata.layers:
        raise ValueError(
            f"{name} does not exist; the layers are {layer_names(adata) or 'none'}, and layer=None takes adata.X."
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ValueError(f"{name} is empty; name the layer that holds the values.")
    if np.ma.is_masked(matrix):
        raise ValueError(f"{name} is a masked array with masked values; fill them first.")
    matrix = as_csr(matrix)
    try:
        matrix.check_format()  # before a wrong index makes SciPy read elsewhere in memory
    except ValueError as error:
        raise ValueError(f"{name} is no valid sparse matrix: {error}. Build it again.") from error
    if not matrix.has_canonical_format:  # an entry may be stored as several to add up
        matrix = matrix.copy()
        matrix.sum_duplicates()
    hint = ""
    if expect_counts and not looks_like_counts(matrix):
        found = [key for key in layer_names(adata) if key != layer and looks_like_counts(adata.layers[key])]
        hint = (
            f" These layers look like counts: {found}; name one as the layer (--layer)."
            if found
            else " No layer looks like counts."
        )
        if layer is not None and looks_like_counts(adata.X):
            hint = " adata.X looks like counts: use layer=None (no --layer)."
        elif adata.raw is not None and looks_like_counts(adata.raw.X):
            hint += " adata.raw does: use adata.raw.to_adata()."
    check_values(matrix, name, expect_counts, hint)
    return matrix


def layer_names(adata: ad.AnnData) -> list[str]:
    """List the layers by name; from 0.13 on, anndata also counts `X` among them, under `None`."""
    return [name for name in adata.layers if name is not None]


def check_gene_names(names: Sequence[str], name: str, hint: str = "") -> None:
    """Raise ValueError for gene names that repeat or are missing; `name` is what the message calls them."""
    duplicated = pd.Index(names)[pd.Index(names).duplicated()].unique()
    if len(duplicated):
        raise ValueError(f"{name} repeats {len(duplicated)} gene names, such as {list(duplicated[:5])}.{hint}")
    if missing := sum(gene == "" or pd.isna(gene) for gene in names):  # but "nan" is a gene of Drosophila
        raise ValueError(f"{name} has {missing} missing (empty or NaN) gene names.")


def check_label(obs: pd.DataFrame, key: str, name: str = "obs") -> None:
    """Raise ValueError unless obs has the column, of labels without NaN; `name` is what the message calls obs."""
    if key not in obs:
        closest = difflib.get_close_matches(key, list(map(str, obs)), n=1)
        raise ValueError(
            f"{name} has no column {key!r}{f', did you mean {closest[0]!r}?' if closest else '.'} It has {list(obs)}."
        )
    if isinstance(obs[key], pd.DataFrame):
        raise ValueError(f"{name} has {obs[key].shape[1]} columns {key!r}; rename or drop the others.")
    check_single_values(obs[key], f"{name}[{key!r}]")
    if obs[key].isna().any():
        raise ValueError(
            f"{name}[{key!r}] holds {int(obs[key].isna().sum())} NaN; give every cell a label, "
            f"or keep those that have one: adata[adata.obs[{key!r}].notna()].copy()."
        )
    if key == SYNTHETIC_KEY:
        raise ValueError(f"obs[{key!r}] marks generated cells and cannot be a label; name another column.")


def generated_cells(obs: pd.DataFrame, name: str = "obs") -> np.ndarray:
    """Tell which cells are marked as generated, shape (cells,); raise ValueError for another column "synthetic".

    Parameters
    ----------
    obs
        Of the cells; without the column, none is generated.
    name
        What the message calls `obs`.
    """
    if SYNTHETIC_KEY not in obs:
        return np.zeros(len(obs), dtype=bool)
    marks = obs[SYNTHETIC_KEY]
    if not pd.api.types.is_bool_dtype(marks) or marks.isna().any():
        raise ValueError(
            f"{name}[{SYNTHETIC_KEY!r}] marks generated cells by True and real ones by False, but holds "
            f"{list(marks.unique()[:3])}; rename the column."
        )
    return marks.to_numpy(dtype=bool)


def check_real(obs: pd.DataFrame, name: str = "obs") -> None:
    """Raise ValueError for cells that are marked as generated; `name` is what the message calls obs."""
    if num_generated := int(generated_cells(obs, name).sum()):
        raise ValueError(
            f"{num_generated} of the {len(obs)} cells are marked as generated by {name}[{SYNTHETIC_KEY!r}], but real "
            f"cells are needed; keep these: adata[~adata.obs[{SYNTHETIC_KEY!r}]].copy()."
        )


def check_known_labels(labels: pd.Series, known: Sequence[str], name: str) -> None:
    """Raise ValueError for a label that is not one of the `known`; `name` is what the message calls the column."""
    if unknown := [label for label in map(str, labels.unique()) if label not in set(known)]:
        raise ValueError(
            f"{name} has labels that real cells lack: {unknown}{did_you_mean(unknown, known)} Known: {list(known)}."
        )


def did_you_mean(unknown: Iterable[object], known: Sequence[str]) -> str:
    """End a sentence about unknown names with those of the known ones that are close to them."""
    closest = [match for name in unknown for match in difflib.get_close_matches(str(name), known, n=1)]
    return f", did you mean {closest}?" if closest else "."


def check_single_values(labels: pd.Series, name: str) -> None:
    """Raise ValueError for labels that are lists, dicts or the like; `name` is what the message calls the column."""
    several = (label for label in labels if not pd.api.types.is_hashable(label)) if labels.dtype == object else ()
    for label in several:
        raise ValueError(
            f"{name} holds {label}, a value of several parts (a list, tuple or dict), but a label is one value: write "
            "all as text, such as by .map(str, na_action='ignore')."
        )


def check_spellings(key: str, labels: Mapping[str, Iterable[str]]) -> None:
    """Raise ValueError for a label that is spelled in two ways, such as "1" and "01", True and 1, or "B" and "B ".

    Parameters
    ----------
    key
        Column of obs.
    labels
        The different labels of each source, such as a file. Two labels of the same source are never one, unless they
        look the same, see [`as_shown`].
    """
    spellings: dict[str | Decimal, dict[str, str]] = {}
    texts = {source: set(of_source) for source, of_source in labels.items()}
    for source, of_source in texts.items():
        for text in of_source:
            spellings.setdefault(_meaning(text), {}).setdefault(text, source)
    for same in spellings.values():
        look_alike = len(set(map(as_shown, same))) < len(same)
        if look_alike or (len(same) > 1 and not any(len(of_source & same.keys()) > 1 for of_source in texts.values())):
            by_source = sorted((source, ascii(text) if look_alike else repr(text)) for text, source in same.items())
            found = " and ".join(f"{text} ({source})" for source, text in by_source)
            raise ValueError(f"obs[{key!r}] holds {found}, which look like one label; spell it in one way.")


def as_shown(text: str) -> str:
    """Write a name without what a reader cannot see: blanks around and repeated, and its form in Unicode."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def label_text(value: Any) -> str:
    """Write a label as text; a number without decimals is an integer, as other files may hold it."""
    return str(int(value)) if isinstance(value, float | np.floating) and float(value).is_integer() else str(value)


def _meaning(text: str) -> str | Decimal:
    """Find the number that a label stands for, however it is spelled; else it is the label as it is shown."""
    lower = as_shown(text).lower()
    if lower in ("true", "false"):
        return Decimal(lower == "true")
    return Decimal(lower) if NUMBER_LABEL.fullmatch(lower) else as_shown(text)


def label_categories(obs: pd.DataFrame, key: str, num_cells: int | None = None) -> list[str]:
    """List the categories that occur in a column of obs, in the order of the categorical, else sorted.

    Parameters
    ----------
    obs
        All cells, or one cell of each combination of labels.
    key
        Column.
    num_cells
        Number of cells, if obs does not have all of them.

    Raises
    ------
    ValueError
        The column is missing, holds NaN, or has too many different values for a label.
    """
    check_label(obs, key)
    column = obs[key]
    num_cells = num_cells or len(column)
    if isinstance(column.dtype, pd.CategoricalDtype):
        names = list(column.cat.remove_unused_categories().cat.categories)
    else:
        names = sorted(column.unique(), key=lambda name: (str(type(name)), name))
    if len(names) > max(50, num_cells // 2):
        raise ValueError(
            f"obs[{key!r}] has {len(names)} different values in {num_cells} cells: it is not a categorical label."
        )
    by_type: dict[str, list[str]] = {}
    for name in names:
        by_type.setdefault(type(name).__name__, []).append(str(name))
    check_spellings(key, by_type)
    return list(dict.fromkeys(str(name) for name in names))


def find_genes(genes: Sequence[str], var_names: Sequence[str], num_expressing: np.ndarray | None = None) -> np.ndarray:
    """Find the positions of named genes.

    Parameters
    ----------
    genes
        Names of the wanted genes.
    var_names
        Names of the genes of the data.
    num_expressing
        Number of cells that express each gene of the data; `None` if not known yet.

    Raises
    ------
    ValueError
        A gene is missing, or no cell expresses any of them.
    """
    columns = pd.Index(var_names).get_indexer(pd.Index(genes))
    if (columns < 0).any():
        missing = [gene for gene, column in zip(genes, columns, strict=True) if column < 0]
        raise ValueError(
            f"genes: {len(missing)} of {len(genes)} are not in adata.var_names, such as {missing[:5]}."
            f"{explain_missing(missing, var_names)}"
        )
    if not len(columns):
        raise ValueError("genes is empty: list at least one gene.")
    if num_expressing is not None and not num_expressing[columns].any():
        raise ValueError(f"genes: all {len(columns)} are zero in every training cell, so there is nothing to learn.")
    if num_expressing is not None and not num_expressing[columns].all():
        silent = (num_expressing[columns] == 0).sum()
        logger.warning("%d of the %d genes are zero in every training cell.", silent, len(columns))
    return columns


def explain_missing(genes: Sequence[str], var_names: Sequence[str], gene_ids: Sequence[str] | None = None) -> str:
    """Say why genes may be missing from the data: the names differ in case, or are ids; empty if neither is so.

    Parameters
    ----------
    genes
        Names that are missing.
    var_names
        Names of the genes of the data.
    gene_ids
        Ids of the genes of the model, if known.
    """
    by_lower = {str(name).lower(): str(name) for name in var_names}
    if other_case := [gene for gene in genes if gene.lower() in by_lower]:
        example = f"{by_lower[other_case[0].lower()]!r} for {other_case[0]!r}"
        return f" {len(other_case)} of them differ in case only, such as {example}: rename adata.var_names."
    if gene_ids is not None and set(gene_ids) & set(map(str, var_names)):
        return " adata.var_names are ids: make the symbols of the genes adata.var_names."
    return ""


def find_gene_ids(var: pd.DataFrame, key: str | None) -> list[str] | None:
    """Take Ensembl ids from a column of var, or from one of the usual columns; `None` if there is none."""
    if key is not None and key not in var:
        raise ValueError(f"var has no column {key!r}; it has {list(var)}.")
    key = key or next((name for name in ("gene_ids", "gene_id", "ensembl_id", "ensembl") if name in var), None)
    return None if key is None else [str(gene_id) for gene_id in var[key]]
