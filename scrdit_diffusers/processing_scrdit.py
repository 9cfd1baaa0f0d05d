"""Between AnnData values and model space: which genes, which transform, which labels. Saved with the pipeline."""

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from transformers.feature_extraction_utils import FeatureExtractionMixin

from .cell_statistics import (
    MAX_COUNT,
    ROWS_PER_UPDATE,
    CellStatistics,
    Chunks,
    GeneChoice,
    GeneMoments,
    check_genes,
    normalize_log1p,
    recover_counts,
    take_in,
)
from .hub import explain_push

logger = logging.getLogger(__name__)

VALUE_SPACES = ("counts", "log_normalized")
NORMALIZED_BY = ("library_size", "model_genes")
LIBRARY_SIZE_QUANTILES = 21
MAX_INEXACT = 0.01  # share of cells whose values may be no whole multiples, such as those with few genes
STEPS_PER_STD = 15  # of log-normalised values that are no scaled counts, and are counted in steps
RARE_LABEL_CELLS = 30  # of labels with fewer training cells little is to be expected
ZERO_TOLERANCE = 1e-6  # what standardising an exact zero and back may leave of it
MISTAKEN: Any = {"over": "ignore", "invalid": "ignore"}  # of counts taken for logarithms, which are refused at the end


def looks_like_counts(matrix: np.ndarray | sp.spmatrix) -> bool:
    """Whether all values of a matrix are finite, non-negative integers (and not all are zero)."""
    data = np.asarray(matrix.data if sp.issparse(matrix) else matrix)
    if data.size == 0 or not np.issubdtype(data.dtype, np.number) or not np.isfinite(data).all():
        return False
    return bool(data.min() >= 0 and data.max() > 0 and np.array_equal(data, np.rint(data)))


def check_values(matrix: sp.csr_matrix, name: str, counts: bool, hint: str = "") -> None:
    """Raise ValueError unless all values are finite, non-negative and, for counts, integers that float32 holds.

    Parameters
    ----------
    matrix
        Cells x genes.
    name
        What to call the matrix in the message, such as `adata.layers['counts']`.
    counts
        Whether integers are expected.
    hint
        Where the right values may be found; ends the message.
    """
    data = matrix.data
    if not np.isfinite(data).all():
        raise ValueError(
            f"{name} holds {np.sum(~np.isfinite(data))} NaN or infinite values; fill or drop them first.{hint}"
        )
    if data.size and data.min() < 0:
        raise ValueError(
            f"{name} holds negative values (smallest {data.min():g}), as scaled data do; give unscaled values.{hint}"
        )
    if counts and not np.array_equal(data, np.rint(data)):
        example = data[data != np.rint(data)][0]
        raise ValueError(
            f"{name} was taken as counts but holds non-integers such as {example:g}.{hint} Log-normalised values need "
            'value_space="log_normalized".'
        )
    if counts and data.size and data.max() > MAX_COUNT:
        raise ValueError(f"{name} holds a count of {data.max():g}; the largest supported is 2^24 = {MAX_COUNT}.{hint}")


def _sums(matrix: sp.csr_matrix) -> np.ndarray:
    """Sum of each row."""
    return np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()


def _matrix_name(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def get_matrix(adata: ad.AnnData, layer: str | None, counts: bool) -> sp.csr_matrix:
    """Take X (`layer=None`) or a layer as CSR and check its values.

    Raises
    ------
    ValueError
        The layer does not exist, or its values are not what `counts` says; the message names the layers that look
        like counts.
    """
    name = _matrix_name(layer)
    if adata.isbacked:
        raise ValueError("adata is backed by a file; load it into memory with adata.to_memory().")
    if layer is not None and layer not in adata.layers:
        raise ValueError(
            f"{name} does not exist; the layers are {list(adata.layers) or 'none'}, and layer=None takes adata.X."
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ValueError(f"{name} is empty; name the layer that holds the values.")
    matrix = sp.csr_matrix(matrix)
    if not matrix.has_canonical_format:  # an entry may be stored in parts
        matrix = matrix.copy()
        matrix.sum_duplicates()
    hint = ""
    if counts and not looks_like_counts(matrix):
        found = [key for key in adata.layers if key != layer and looks_like_counts(adata.layers[key])]
        hint = f" These layers look like counts: {found}." if found else " No layer looks like counts."
        if layer is not None and looks_like_counts(adata.X):
            hint = " adata.X looks like counts: use layer=None."
        elif adata.raw is not None and looks_like_counts(adata.raw.X):
            hint += " adata.raw does: use adata.raw.to_adata()."
    check_values(matrix, name, counts, hint)
    return matrix


class SCRDiTProcessor(FeatureExtractionMixin):
    r"""Maps the values of AnnData to the space in which the transformer works, and back.

    For a value v of gene g:

    - `value_space="counts"`: x = (log1p(v) - mean_g) / std_g. The inverse rounds to integers and is exact.
    - `value_space="log_normalized"` (the paper's): v is a log-normalised value, x = (v - mean_g) / std_g.
    - The same with `normalized_by`: the model sees the counts k behind v = log1p(`normalized_to` k / d), with
      x = (log1p(k) - mean_g) / std_g. The divisor d is the cell's library size over all genes of the data
      ("library_size") or over those of the model ("model_genes").
    - The same with `value_step`, for values that are no scaled counts: the model sees k, which is 0 for an exact zero,
      else how many steps v is above the gene's smallest value, plus 1: v = `value_min`_g + `value_step` (k - 1).

    The inverse makes every value up to `zero_threshold` (log space) an exact zero. With `zero_negation` an exact zero
    becomes `zero_value` before it is standardised, so that zeros lie far from the small positive values. Mean and
    standard deviation are those of the training cells, after zero negation, the latter not below a floor, so that in
    model space a gene has mean 0 and standard deviation 1, or less for a gene that few cells express.

    Usually built by [`SCRDiTProcessor.from_anndata`], and loaded with the pipeline.

    Parameters
    ----------
    var_names
        Names of the G genes, in the order of the model.
    mean
        Mean of each gene before standardisation, shape (G,).
    std
        Standard deviation of each gene before standardisation, shape (G,), positive.
    value_space
        "counts" or "log_normalized".
    target_sum
        Library size to which counts are scaled before log1p. `None`: values are taken as they are. Only for
        `value_space="log_normalized"`.
    zero_negation
        Whether exact zeros are moved away from the small positive values.
    zero_value
        Where zero negation puts an exact zero (paper: -10), in the log space before standardisation.
    zero_threshold
        Values up to this one, in the log space, are exact zeros on the way back.
    gene_ids
        Ensembl ids of the genes, shape (G,); `None` where unknown.
    condition_keys
        The K columns of obs that condition the model, in the order of `class_labels`.
    condition_categories
        For each key its categories; the code of a category is its position.
    composition
        Training cells by combination of categories, rows of K codes and a number of cells.
    log_library_sizes
        For a model of counts, for each row of `composition` quantiles of the log of its cells' library sizes, equally
        spaced from 0 to 1: total counts over the G genes, or over all genes with `normalized_by="library_size"`.
    normalized_by
        "library_size" or "model_genes", see above; `None` where values are no scaled counts, or not modelled as such.
    normalized_to
        Library size to which the counts behind log-normalised values were scaled.
    value_step
        Step in which other log-normalised values are counted; `None` where they are not.
    value_min
        Smallest value of each gene, shape (G,), where values are counted in steps.

    Raises
    ------
    ValueError
        Lengths differ, genes repeat, a number is not finite, or a name is unknown.

    References
    ----------
    Zero negation: scRDiT, arXiv 2404.06153.
    """

    model_input_names = ["values"]

    def __init__(
        self,
        var_names: Sequence[str] = (),
        mean: Sequence[float] | np.ndarray = (),
        std: Sequence[float] | np.ndarray = (),
        value_space: str = "counts",
        target_sum: float | None = None,
        zero_negation: bool = False,
        zero_value: float = -10.0,
        zero_threshold: float = 0.0,
        gene_ids: Sequence[str] | None = None,
        condition_keys: Sequence[str] = (),
        condition_categories: Sequence[Sequence[str]] = (),
        composition: Sequence[Sequence[int]] = (),
        log_library_sizes: Sequence[Sequence[float]] = (),
        normalized_by: str | None = None,
        normalized_to: float | None = None,
        value_step: float | None = None,
        value_min: Sequence[float] | np.ndarray = (),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.var_names = [str(name) for name in var_names]
        self.mean = np.asarray(mean, dtype=np.float64)
        self.std = np.asarray(std, dtype=np.float64)
        self.value_space = value_space
        self.target_sum = None if target_sum is None else float(target_sum)
        self.zero_negation = bool(zero_negation)
        self.zero_value = float(zero_value)
        self.zero_threshold = float(zero_threshold)
        self.gene_ids = None if gene_ids is None else [str(gene_id) for gene_id in gene_ids]
        self.condition_keys = [str(key) for key in condition_keys]
        self.condition_categories = [[str(name) for name in names] for names in condition_categories]
        self.composition = [[int(number) for number in row] for row in composition]
        self.log_library_sizes = [[float(size) for size in row] for row in log_library_sizes]
        self.normalized_by = normalized_by
        self.normalized_to = None if normalized_to is None else float(normalized_to)
        self.value_step = None if value_step is None else float(value_step)
        self.value_min = np.asarray(value_min, dtype=np.float64)

        if value_space not in VALUE_SPACES:
            raise ValueError(f"value_space must be one of {VALUE_SPACES}, got {value_space!r}.")
        if target_sum is not None and value_space != "log_normalized":
            raise ValueError(
                'target_sum scales counts to log-normalised values: it needs value_space="log_normalized".'
            )
        if target_sum is not None and not target_sum > 0:
            raise ValueError(f"target_sum must be positive, got {target_sum}.")
        if normalized_by is not None and (normalized_by not in NORMALIZED_BY or value_space != "log_normalized"):
            raise ValueError(
                f"normalized_by must be one of {NORMALIZED_BY}, of log-normalised values; got {normalized_by!r} for "
                f"{value_space!r}."
            )
        if (normalized_by is None) != (normalized_to is None) or normalized_to is not None and not normalized_to > 0:
            raise ValueError(f"normalized_by={normalized_by!r} does not go with normalized_to={normalized_to}.")
        if value_step is not None and (value_space != "log_normalized" or normalized_by or not value_step > 0):
            raise ValueError(f"value_step={value_step} is for log-normalised values that are no scaled counts.")
        if self.zero_negation and self.has_counts_behind:
            raise ValueError("zero_negation is for values that the model does not see as counts.")
        _check_gene_names(self.var_names, "var_names")
        lengths = dict(mean=self.mean.shape, std=self.std.shape)
        if value_step is not None:
            lengths["value_min"] = self.value_min.shape
        if self.gene_ids is not None:
            lengths["gene_ids"] = (len(self.gene_ids),)
        for name, shape in lengths.items():
            if shape != (self.num_genes,):
                raise ValueError(
                    f"{name} has shape {shape}, expected one entry for each of {self.num_genes} var_names."
                )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and (self.std > 0).all()):
            raise ValueError("mean and std must be finite, and std positive.")
        if len(self.condition_keys) != len(self.condition_categories):
            raise ValueError("condition_keys and condition_categories must have the same length.")
        if self.log_library_sizes and len(self.log_library_sizes) != len(self.composition):
            raise ValueError("log_library_sizes must have one row for each of composition.")

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save the processor as `FeatureExtractionMixin.save_pretrained` does; errors of pushing say what to do."""
        folder = str(Path(save_directory))
        with explain_push(kwargs.get("repo_id") or folder) if push_to_hub else nullcontext():
            return super().save_pretrained(folder, push_to_hub, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the processor as `FeatureExtractionMixin.push_to_hub` does; errors say what to do."""
        with explain_push(repo_id):
            return super().push_to_hub(repo_id, **kwargs)

    @classmethod
    def from_anndata(
        cls,
        adata: ad.AnnData,
        labels_key: str | Sequence[str] | None = None,
        layer: str | None = None,
        value_space: str = "counts",
        target_sum: float | None = None,
        zero_negation: bool = False,
        zero_value: float = -10.0,
        zero_threshold: float = 0.0,
        min_std: float = 0.3,
        n_top_genes: int = 2000,
        flavor: str = "seurat",
        genes: Sequence[str] | None = None,
        gene_ids_key: str | None = None,
        standardize: bool = True,
        recover_counts: bool = False,
    ) -> Self:
        """Choose the genes, learn their mean and standard deviation, and store the labels of the training cells.

        Parameters
        ----------
        adata
            Training cells.
        labels_key
            Column(s) of obs that condition the model; `None` for an unconditional model.
        layer
            Layer that holds the values; `None` takes X.
        value_space
            "counts" or "log_normalized"; see the class.
        target_sum
            With "log_normalized": the values are counts and are log-normalised to this library size.
            `None`: they are log-normalised already.
        zero_negation
            See the class.
        zero_value
            See the class.
        zero_threshold
            See the class.
        min_std
            Smallest standard deviation by which a gene is divided, in the log space. Divided by its own, a gene that
            few cells express would reach tens of standard deviations and drown the others (figures in
            training/LOG.md). 0 gives every gene the standard deviation 1.
        n_top_genes
            How many genes to keep; fewer are kept where fewer are expressed.
        flavor
            How they are chosen: "seurat", "cell_ranger" or "seurat_v3" (`scanpy.pp.highly_variable_genes`), "cv"
            (largest coefficient of variation, the paper's), or "all" (every expressed gene; ignores `n_top_genes`).
        genes
            Names of the genes to use, instead of a choice by `flavor`.
        gene_ids_key
            Column of var with Ensembl ids. `None` looks for "gene_ids", "gene_id", "ensembl_id" and "ensembl".
        standardize
            Whether model space is standardised; the paper's is not (mean 0 and standard deviation 1 are stored).
        recover_counts
            With "log_normalized": the model shall see the counts behind the values, see `normalized_by` of the class.
            Where a cell's values are whole multiples of its smallest one (before log1p), as those of
            `scanpy.pp.normalize_total` are, these are exact.

        Returns
        -------
        The processor. Genes are in the order of `adata.var_names`, or in that of `genes`.

        Raises
        ------
        ValueError
            Values, genes or labels that a model cannot be trained on; the message names the layer or column.
        """
        if value_space not in VALUE_SPACES:
            raise ValueError(f"value_space must be one of {VALUE_SPACES}, got {value_space!r}.")
        _check_gene_names(list(map(str, adata.var_names)), "adata.var_names", " Call adata.var_names_make_unique().")
        matrix = get_matrix(adata, layer, counts=value_space == "counts" or target_sum is not None)

        def chunks() -> Iterator[tuple[sp.csr_matrix, pd.DataFrame]]:
            for start in range(0, adata.n_obs, ROWS_PER_UPDATE):
                yield matrix[start : start + ROWS_PER_UPDATE], adata.obs.iloc[start : start + ROWS_PER_UPDATE]

        return cls.from_chunks(
            chunks,
            adata.var,
            labels_key,
            name=_matrix_name(layer),
            value_space=value_space,
            target_sum=target_sum,
            zero_negation=zero_negation,
            zero_value=zero_value,
            zero_threshold=zero_threshold,
            min_std=min_std,
            n_top_genes=n_top_genes,
            flavor=flavor,
            genes=genes,
            gene_ids_key=gene_ids_key,
            standardize=standardize,
            recover_counts=recover_counts,
        )[0]

    @classmethod
    def from_chunks(
        cls,
        chunks: Chunks | Sequence[Chunks],
        var: pd.DataFrame,
        labels_key: str | Sequence[str] | None = None,
        name: str = "the data",
        value_space: str = "counts",
        target_sum: float | None = None,
        zero_negation: bool = False,
        zero_value: float = -10.0,
        zero_threshold: float = 0.0,
        min_std: float = 0.3,
        n_top_genes: int = 2000,
        flavor: str = "seurat",
        genes: Sequence[str] | None = None,
        gene_ids_key: str | None = None,
        standardize: bool = True,
        recover_counts: bool = False,
        map_parts: Callable[..., Iterable[Any]] = map,
    ) -> tuple[Self, CellStatistics]:
        """[`from_anndata`] for cells that come in chunks, of which only one is in memory.

        Takes two passes over the cells, and a third with `flavor="seurat_v3"` or `recover_counts`.

        Parameters
        ----------
        chunks
            Starts a pass: yields the values of some cells over all genes, and their rows of obs. Or several of these,
            one for each part of the cells.
        var
            Genes of the data.
        labels_key, value_space, target_sum, zero_negation, zero_value, zero_threshold, min_std
            As in [`from_anndata`].
        n_top_genes, flavor, genes, gene_ids_key, standardize, recover_counts
            As in [`from_anndata`].
        name
            What to call the values in messages.
        map_parts
            `map`, or that of a `concurrent.futures` executor, which spreads the parts over its processes. The result
            depends on the parts only.

        Returns
        -------
        The processor, and the statistics of the cells from which a count head starts.

        Raises
        ------
        ValueError
            As [`from_anndata`].
        """
        if value_space not in VALUE_SPACES:
            raise ValueError(f"value_space must be one of {VALUE_SPACES}, got {value_space!r}.")
        var_names = [str(gene) for gene in var.index]
        _check_gene_names(var_names, "var_names", " Call adata.var_names_make_unique().")
        labels_key = [labels_key] if isinstance(labels_key, str) else list(labels_key or [])
        counts = value_space == "counts" or target_sum is not None
        choice = GeneChoice("all" if genes is not None else flavor, n_top_genes, len(var_names), counts)
        if genes is not None:
            _check_gene_names(list(map(str, genes)), "genes")
            check_genes(genes, var_names)
        gene_ids = _gene_ids(var, gene_ids_key)
        space: dict[str, Any] = dict(
            value_space=value_space,
            target_sum=target_sum,
            zero_negation=zero_negation,
            zero_value=zero_value,
            zero_threshold=zero_threshold,
        )

        parts = [chunks] if callable(chunks) else list(chunks)
        smallest = np.empty(0)
        if recover_counts and value_space == "log_normalized":
            library_size = target_sum
            if not counts:
                found = take_in(_Normalization(name, len(var_names)), parts, map_parts)
                library_size = found.library_size()
            if library_size is not None:
                space |= dict(normalized_by="library_size", normalized_to=library_size)
            else:
                smallest = np.where(np.isfinite(found.smallest), found.smallest, 0.0)
                space |= dict(value_step=found.value_step())
        processor = cls(**space)
        processor.value_min = smallest  # of all genes
        seen = take_in(_FirstPass(processor, choice, name, counts, labels_key), parts, map_parts)
        choice, moments = seen.choice, seen.moments
        if moments.num_cells < 2:
            raise ValueError(f"{name} has {moments.num_cells} cells; at least 2 are needed.")
        if not counts and seen.integers:
            raise ValueError(
                f"{name} was taken as log-normalised values but holds only integers: give "
                'target_sum=1e4 to log-normalise counts, or use value_space="counts".'
            )
        if genes is None and not choice.num_expressing.any():
            raise ValueError("All genes are zero in every training cell: there is nothing to learn.")
        columns = (
            choice.choose(parts, map_parts) if genes is None else check_genes(genes, var_names, choice.num_expressing)
        )
        if len(smallest):
            logger.warning("%s is no log1p of scaled counts: give counts if there are any.", name)
        variance = moments.variance()[columns]
        std = np.sqrt(np.where(variance > 1e-12, variance, 1.0))  # 1 for a gene that does not vary
        processor = cls(
            var_names=[var_names[column] for column in columns],
            mean=moments.mean[columns] + processor._zero if standardize else np.zeros(len(columns)),
            std=np.maximum(std, min_std) if standardize else np.ones(len(columns)),
            **space,
            value_min=smallest[columns] if len(smallest) else (),
            gene_ids=None if gene_ids is None else [gene_ids[column] for column in columns],
            condition_keys=labels_key,
            condition_categories=[label_categories(seen.labels, key, moments.num_cells) for key in labels_key],
        )
        combinations = np.unique(processor.encode_labels(seen.labels), axis=0)
        combinations = combinations if labels_key else np.zeros((1, 0), dtype=np.int64)
        statistics = CellStatistics(combinations, len(columns) if processor.models_counts else None)
        second = take_in(_SecondPass(processor, columns, statistics), parts, map_parts)
        statistics = second.statistics
        processor.composition = np.column_stack([combinations, statistics.num_cells]).tolist()
        if processor.normalized_by == "library_size" and second.no_other_genes:
            processor.normalized_by = "model_genes"
        if processor.models_counts:
            quantiles = statistics.library_size_quantiles(LIBRARY_SIZE_QUANTILES)
            processor.log_library_sizes = np.round(quantiles, 4).tolist()
        return processor, statistics

    @property
    def num_genes(self) -> int:
        """Number of genes G."""
        return len(self.var_names)

    @property
    def has_counts_behind(self) -> bool:
        """Whether values are log-normalised and the model sees the counts behind them."""
        return self.normalized_by is not None or self.value_step is not None

    @property
    def models_counts(self) -> bool:
        """Whether the model sees counts: those that it is given, or those behind log-normalised values."""
        return self.value_space == "counts" or self.has_counts_behind

    @property
    def num_classes(self) -> list[int]:
        """Number of categories of each condition, as the transformer's config wants it."""
        return [len(names) for names in self.condition_categories]

    @property
    def conditions(self) -> dict[str, list[str]]:
        """Categories of each condition by its obs column, in the order of their codes."""
        return dict(zip(self.condition_keys, self.condition_categories, strict=True))

    @property
    def label_counts(self) -> dict[str, dict[str, int]]:
        """Number of training cells of each label, by condition; 0 for a label that they lack."""
        counts = {key: dict.fromkeys(names, 0) for key, names in self.conditions.items()}
        for *codes, number in self.composition:
            for (key, names), code in zip(self.conditions.items(), codes, strict=True):
                counts[key][names[code]] += number
        return counts

    # -- genes and values ------------------------------------------------------------------------------------------

    def gene_columns(self, var_names: Sequence[str]) -> np.ndarray:
        """Find the model's genes in other data.

        Parameters
        ----------
        var_names
            Gene names of the other data.

        Returns
        -------
        Positions of the G genes in `var_names`, shape (G,).

        Raises
        ------
        ValueError
            `var_names` repeats a name or lacks one of the model's genes.
        """
        _check_gene_names(list(map(str, var_names)), "var_names", " Call adata.var_names_make_unique().")
        positions = pd.Index(var_names).get_indexer(pd.Index(self.var_names))
        if (positions < 0).any():
            missing = [self.var_names[i] for i in np.flatnonzero(positions < 0)]
            raise ValueError(
                f"{len(missing)} of the model's {self.num_genes} genes are missing from the data, such as "
                f"{missing[:5]}; the data's names look like {[str(name) for name in var_names[:3]]}."
            )
        return positions

    def get_values(self, adata: ad.AnnData, layer: str | None = None) -> sp.csr_matrix:
        """Take the model's genes out of an AnnData, checked and, with `target_sum`, log-normalised.

        Parameters
        ----------
        adata
            Cells, with at least the model's genes. The library size is taken over all of its genes.
        layer
            Layer that holds the values; `None` takes X.

        Returns
        -------
        CSR matrix, shape (cells, G): counts, or log-normalised values.

        Raises
        ------
        ValueError
            Genes are missing, or values are not what `value_space` says.
        """
        matrix = get_matrix(adata, layer, counts=self.value_space == "counts" or self.target_sum is not None)
        return self.select_values(matrix, self.gene_columns(adata.var_names))

    def select_values(self, matrix: sp.csr_matrix, columns: np.ndarray) -> sp.csr_matrix:
        """[`get_values`] for a checked matrix whose gene columns are known, as in a training batch."""
        if self.target_sum is not None:
            matrix = normalize_log1p(matrix, self.target_sum)
        return matrix[:, columns]

    def get_counts(self, adata: ad.AnnData, layer: str | None = None) -> tuple[sp.csr_matrix, np.ndarray]:
        """Take what a model of counts sees out of an AnnData: the counts behind the values, if need be.

        Parameters
        ----------
        adata
            Cells, with at least the model's genes. Library sizes and counts are found from all of its genes.
        layer
            Layer that holds the values; `None` takes X.

        Returns
        -------
        Counts as a CSR matrix, shape (cells, G), and library sizes, shape (cells,).

        Raises
        ------
        ValueError
            As [`get_values`]; or the model does not see counts, or there are none behind the values.
        """
        recover = self.normalized_by in ("library_size", "model_genes") and self.target_sum is None
        matrix = get_matrix(adata, layer, counts=self.value_space == "counts" or self.target_sum is not None)
        if recover and (~recover_counts(matrix)[2]).mean() > MAX_INEXACT:
            raise ValueError(f"{_matrix_name(layer)} is no log1p of scaled counts, as that of the training cells is.")
        return self.select_counts(matrix, self.gene_columns(adata.var_names))

    def select_counts(self, matrix: sp.csr_matrix, columns: np.ndarray | slice) -> tuple[sp.csr_matrix, np.ndarray]:
        """[`get_counts`] for a checked matrix whose gene columns are known, as in a training batch."""
        if not self.models_counts:
            raise ValueError("This processor is of a model that sees log-normalised values themselves, not as counts.")
        library_sizes = None
        if self.value_step is not None:
            counts = sp.csr_matrix(matrix[:, columns], dtype=np.float64, copy=True)
            counts.eliminate_zeros()
            steps = (counts.data - self.value_min[counts.indices]) / self.value_step
            counts.data = 1 + np.maximum(np.rint(steps), 0)
            return counts, _sums(counts)
        if self.normalized_by is not None and self.target_sum is None:
            matrix, one_count, _ = recover_counts(matrix)
            library_sizes = self.normalized_to / one_count
        elif self.normalized_by is not None:
            library_sizes = _sums(matrix)
        counts = matrix[:, columns]
        if self.normalized_by != "library_size" or library_sizes is None:
            library_sizes = _sums(counts)
        return counts, library_sizes

    def normalize(self, counts: sp.csr_matrix, library_sizes: np.ndarray | None = None) -> sp.csr_matrix:
        """Turn counts of a model into values like those that it was trained on.

        Parameters
        ----------
        counts
            CSR matrix, shape (cells, G).
        library_sizes
            Shape (cells,); only needed with `normalized_by="library_size"`.

        Returns
        -------
        CSR matrix of the same shape: log-normalised values, or `counts` where these are the values.
        """
        if self.value_step is not None:
            values = self.value_min[counts.indices] + self.value_step * (counts.data - 1)
        elif self.normalized_by is not None:
            divisor = _sums(counts) if self.normalized_by == "model_genes" else np.asarray(library_sizes, np.float64)
            scale = np.repeat(self.normalized_to / np.maximum(divisor, 1e-9), np.diff(counts.indptr))
            values = np.log1p(counts.data * scale)
        else:
            return counts
        return sp.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)

    def transform(self, values: np.ndarray | sp.spmatrix) -> np.ndarray:
        """Values to model space.

        Parameters
        ----------
        values
            Counts or log-normalised values, as the model sees them, shape (cells, G), dense or sparse.

        Returns
        -------
        Dense float64 array of the same shape. (As float32, counts above about 10^5 would not come back exactly.)

        Raises
        ------
        ValueError
            The number of genes is not G, or the model sees counts behind values and `values` are not these.
        TypeError
            `values` is an AnnData.
        """
        if isinstance(values, ad.AnnData):
            raise TypeError("transform takes a matrix, not an AnnData: adata[:, processor.var_names].X")
        values = sp.csr_matrix(values, copy=True)
        if values.shape[1] != self.num_genes:
            raise ValueError(f"values has {values.shape[1]} genes, the processor has {self.num_genes}.")
        values.eliminate_zeros()
        if self.has_counts_behind and not np.array_equal(values.data, np.rint(values.data)):
            raise ValueError("This model sees the counts behind log-normalised values: transform those of get_counts.")
        dense = np.repeat(((self._zero - self.mean) / self.std)[None], values.shape[0], axis=0)  # (cells, G)
        rows = np.repeat(np.arange(values.shape[0]), np.diff(values.indptr))
        columns = values.indices
        dense[rows, columns] = (self._forward(values.data) - self.mean[columns]) / self.std[columns]
        return dense

    def inverse_transform(self, samples: np.ndarray) -> np.ndarray:
        """Model space to values.

        Parameters
        ----------
        samples
            Model space, shape (cells, G).

        Returns
        -------
        Float32 array of the same shape: non-negative integers where the model sees counts, else values >= 0.

        Raises
        ------
        ValueError
            The number of genes is not G.
        """
        if samples.shape[-1] != self.num_genes:
            raise ValueError(f"samples has {samples.shape[-1]} genes, the processor has {self.num_genes}.")
        values = np.asarray(samples, dtype=np.float64) * self.std + self.mean
        values = np.where(values <= max(self.zero_threshold, ZERO_TOLERANCE), 0.0, values)
        if self.models_counts:
            values = np.rint(np.expm1(np.minimum(values, np.log1p(MAX_COUNT))))
        return values.astype(np.float32)

    @property
    def _zero(self) -> float:
        """Where an exact zero goes, before standardisation."""
        return self.zero_value if self.zero_negation else 0.0

    def _forward(self, nonzero: np.ndarray) -> np.ndarray:
        """Positive values before standardisation."""
        nonzero = np.asarray(nonzero, dtype=np.float64)
        return np.log1p(nonzero) if self.models_counts else nonzero

    def _offset(self, matrix: sp.csr_matrix) -> sp.csr_matrix:
        """Values before standardisation minus that of zero, hence still sparse."""
        offset = self.select_counts(matrix, slice(None))[0] if self.models_counts else matrix
        if not self.models_counts and self.target_sum is not None:
            offset = normalize_log1p(matrix, self.target_sum)
        if not offset.data.all():
            offset = offset.copy()
            offset.eliminate_zeros()
        values = self._forward(offset.data) - self._zero
        return sp.csr_matrix((values, offset.indices, offset.indptr), shape=offset.shape)

    # -- labels ----------------------------------------------------------------------------------------------------

    def encode_labels(self, obs: pd.DataFrame) -> np.ndarray:
        """Codes of each cell's labels.

        Parameters
        ----------
        obs
            One row per cell, with all condition columns.

        Returns
        -------
        Integer codes, shape (cells, K).

        Raises
        ------
        ValueError
            A column is missing, holds NaN, or holds a label that the model does not know.
        """
        for key in self.condition_keys:
            if key not in obs:
                raise ValueError(f"obs lacks the column {key!r}; the model's conditions are {self.condition_keys}.")
        codes = [self._encode(key, obs[key]) for key in self.condition_keys]
        return np.stack(codes, axis=1) if codes else np.empty((len(obs), 0), dtype=np.int64)

    def _encode(self, key: str, labels: pd.Series) -> np.ndarray:
        """Codes (cells,) of one condition's labels."""
        names = self.conditions[key]
        if labels.isna().any():
            raise ValueError(f"{key!r} holds {int(labels.isna().sum())} NaN; give every cell a label or drop it.")
        categories = pd.Categorical(labels)
        codes = pd.Index(names).get_indexer(categories.categories.astype(str))[categories.codes]
        if (codes < 0).any():
            unknown = str(labels[codes < 0].iloc[0])
            closest = difflib.get_close_matches(unknown, names, n=1, cutoff=0.4)
            raise ValueError(
                f"Unknown {key} {unknown!r}{f', did you mean {closest[0]!r}?' if closest else '.'} Known: {names}."
            )
        return codes

    def decode_labels(self, codes: np.ndarray) -> pd.DataFrame:
        """Labels of codes (cells, K), as categoricals with the training categories."""
        return pd.DataFrame(
            {
                key: pd.Categorical.from_codes(codes[:, k], categories=pd.Index(names))
                for k, (key, names) in enumerate(self.conditions.items())
            },
            index=range(len(codes)),
        )

    def sample_labels(
        self, num_cells: int, conditions: Mapping[str, str | Sequence[str]] | None, quantiles: np.ndarray
    ) -> np.ndarray:
        """Labels for new cells: those that are given, the others drawn from the training composition given them.

        Parameters
        ----------
        num_cells
            Number of cells.
        conditions
            For some of the condition keys, one label for all cells or one per cell.
        quantiles
            Uniform random numbers in [0, 1) that draw what is not given, shape (`num_cells`,).

        Returns
        -------
        Integer codes, shape (`num_cells`, K). Where no training cell has the given combination, the other labels are
        drawn from all training cells.

        Raises
        ------
        ValueError
            A key or label is unknown, or a list has another length than `num_cells`.
        """
        given = {}
        for key, labels in (conditions or {}).items():
            if key not in self.condition_keys:
                raise ValueError(
                    f"Unknown condition {key!r}; the model's conditions are {self.condition_keys or 'none'}."
                )
            column = pd.Series([labels] * num_cells if np.ndim(labels) == 0 else list(labels))
            if len(column) != num_cells:
                raise ValueError(
                    f"conditions[{key!r}] lists {len(column)} labels for {num_cells} cells; give one label for all, "
                    "or one per cell."
                )
            given[self.condition_keys.index(key)] = self._encode(key, column)
        fixed = sorted(given)
        free = [k for k in range(len(self.condition_keys)) if k not in given]
        codes = np.empty((num_cells, len(self.condition_keys)), dtype=np.int64)
        for k in fixed:
            codes[:, k] = given[k]
        if not free:
            return codes
        composition = np.asarray(self.composition, dtype=np.int64)  # (combinations, K + 1)
        for combination in np.unique(codes[:, fixed], axis=0):
            rows = (codes[:, fixed] == combination).all(axis=1)
            matching = composition[(composition[:, fixed] == combination).all(axis=1)]
            if not len(matching):
                labels = [self.condition_categories[k][code] for k, code in zip(fixed, combination, strict=True)]
                logger.warning("No training cell is %s: its other labels are drawn from all training cells.", labels)
                matching = composition
            cumulative = np.cumsum(matching[:, -1]) / matching[:, -1].sum()
            drawn = np.searchsorted(cumulative, quantiles[rows], side="right")
            codes[np.ix_(rows, free)] = matching[np.ix_(drawn, free)]
        return codes

    def sample_library_sizes(self, codes: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
        """Library sizes for new cells: those of the training cells with the same labels, interpolated.

        For a combination of labels that no training cell has, the quantiles are those of all cells, shifted by what
        each of its labels shifts them.

        Parameters
        ----------
        codes
            Labels, shape (cells, K).
        quantiles
            Uniform random numbers in [0, 1), shape (cells,).

        Returns
        -------
        Total counts over the G genes, shape (cells,).

        Raises
        ------
        ValueError
            The processor holds no library sizes: it is not for counts, or from an earlier version.
        """
        if not self.log_library_sizes:
            raise ValueError("The processor holds no library sizes; give library_size.")
        known = np.asarray(self.composition, dtype=np.int64)  # (combinations, K + 1)
        table = np.asarray(self.log_library_sizes)  # (combinations, quantiles)
        average = np.average(table, axis=0, weights=known[:, -1])  # (quantiles,)
        levels = np.linspace(0, 1, table.shape[1])
        log_sizes = np.empty(len(codes))
        for combination in np.unique(codes, axis=0):
            same = (known[:, :-1] == combination).all(axis=1)
            if same.any():
                log_size = table[same][0]
            else:
                log_size = average.copy()
                for k, code in enumerate(combination):
                    alike = known[:, k] == code
                    if alike.any():
                        log_size += np.average(table[alike], axis=0, weights=known[alike, -1]) - average
                log_size = np.sort(log_size)
            rows = (codes == combination).all(axis=1)
            log_sizes[rows] = np.interp(quantiles[rows], levels, log_size)
        return np.exp(log_sizes)


class _FirstPass:
    """What [`SCRDiTProcessor.from_chunks`] wants to know before it knows the genes and labels: checks as it goes."""

    def __init__(
        self, processor: SCRDiTProcessor, choice: GeneChoice, name: str, counts: bool, labels_key: Sequence[str]
    ):
        self.processor, self.choice, self.name, self.counts = processor, choice, name, counts
        self.moments = GeneMoments(len(choice.num_expressing))  # of the values before standardisation
        self.labels_key = list(labels_key)
        self.labels = pd.DataFrame(columns=self.labels_key)  # the combinations that occur
        self.integers = True

    def update(self, matrix: sp.csr_matrix, obs: pd.DataFrame) -> None:
        """Take in more cells."""
        check_values(matrix, self.name, self.counts)
        self.integers = self.integers and looks_like_counts(matrix)
        with np.errstate(**MISTAKEN):
            self.choice.update(matrix)
        self.moments.update(self.processor._offset(matrix))
        for key in self.labels_key:
            _check_label(obs, key)
        self._add_labels(obs[self.labels_key].drop_duplicates())

    def merge(self, other: "_FirstPass") -> None:
        """Take in the cells of another one."""
        with np.errstate(**MISTAKEN):
            self.choice.merge(other.choice)
        self.moments.merge(other.moments)
        self.integers = self.integers and other.integers
        self._add_labels(other.labels)

    def _add_labels(self, labels: pd.DataFrame) -> None:
        known = [of_some for of_some in (self.labels, labels) if len(of_some)]
        self.labels = pd.concat(known).drop_duplicates() if known else self.labels


class _SecondPass:
    """The statistics of the chosen genes."""

    def __init__(self, processor: SCRDiTProcessor, columns: np.ndarray, statistics: CellStatistics):
        self.processor, self.columns, self.statistics = processor, columns, statistics
        self.no_other_genes = True  # all counts of all cells are of the model's genes

    def update(self, matrix: sp.csr_matrix, obs: pd.DataFrame) -> None:
        """Take in more cells."""
        counts = library_sizes = None
        if self.statistics.counts:
            counts, library_sizes = self.processor.select_counts(matrix, self.columns)
            self.no_other_genes = self.no_other_genes and np.allclose(_sums(counts), library_sizes, rtol=1e-3)
        self.statistics.update(counts, self.processor.encode_labels(obs), library_sizes)

    def merge(self, other: "_SecondPass") -> None:
        """Take in the cells of another one."""
        self.statistics.merge(other.statistics)
        self.no_other_genes = self.no_other_genes and other.no_other_genes


class _Normalization:
    """How log-normalised values were made from counts, and what else is known of positive ones."""

    def __init__(self, name: str, num_vars: int):
        self.name = name
        self.num_cells = self.num_exact = self.num_positive = 0
        self.total = self.sum = self.squares = 0.0
        self.smallest = np.full(num_vars, np.inf)

    def update(self, matrix: sp.csr_matrix, obs: pd.DataFrame) -> None:
        """Take in more cells."""
        check_values(matrix, self.name, counts=False)
        positive = matrix.data > 0
        values = matrix.data[positive].astype(np.float64)
        with np.errstate(**MISTAKEN):
            self.num_exact += int(recover_counts(matrix)[2].sum())
            self.total += np.expm1(values).sum()
        self.num_cells += matrix.shape[0]
        self.num_positive += len(values)
        self.sum += values.sum()
        self.squares += (values**2).sum()
        np.minimum.at(self.smallest, matrix.indices[positive], values)

    def merge(self, other: "_Normalization") -> None:
        """Take in the cells of another one."""
        for name in ("num_cells", "num_exact", "num_positive", "total", "sum", "squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        np.minimum(self.smallest, other.smallest, out=self.smallest)

    def library_size(self) -> float | None:
        """Library size to which counts were scaled; `None` where there are no scaled counts."""
        if self.num_cells - self.num_exact > MAX_INEXACT * self.num_cells or not self.total:
            return None
        return float(f"{self.total / self.num_cells:.6g}")  # 10,000 and not 9,999.9997

    def value_step(self) -> float:
        """Choose a fine step of positive values."""
        number = max(self.num_positive, 1)
        variance = self.squares / number - (self.sum / number) ** 2
        return float(np.sqrt(variance)) / STEPS_PER_STD if variance > 1e-12 else 1.0


def _check_gene_names(names: list[str], name: str, hint: str = "") -> None:
    duplicated = pd.Index(names)[pd.Index(names).duplicated()].unique()
    if len(duplicated):
        raise ValueError(f"{name} repeats {len(duplicated)} gene names, such as {list(duplicated[:5])}.{hint}")
    if any(not gene or gene == "nan" for gene in names):
        raise ValueError(
            f"{name} has {sum(not gene or gene == 'nan' for gene in names)} missing (empty or NaN) gene names."
        )


def _check_label(obs: pd.DataFrame, key: str) -> None:
    """Raise ValueError unless obs has the column, without NaN."""
    if key not in obs:
        closest = difflib.get_close_matches(key, list(map(str, obs)), n=1)
        raise ValueError(
            f"obs has no column {key!r}{f', did you mean {closest[0]!r}?' if closest else '.'} It has {list(obs)}."
        )
    if obs[key].isna().any():
        raise ValueError(f"obs[{key!r}] holds {int(obs[key].isna().sum())} NaN; give every cell a label or drop it.")
    if key == "synthetic":
        raise ValueError("obs['synthetic'] marks generated cells and cannot be a label; rename the column.")


def label_categories(obs: pd.DataFrame, key: str, num_cells: int | None = None) -> list[str]:
    """List the categories of a column of obs that occur, in the order of the categorical, else sorted.

    Parameters
    ----------
    obs
        Cells, or of each combination of labels one cell.
    key
        Column.
    num_cells
        Number of cells, where obs has not all of them.

    Raises
    ------
    ValueError
        The column is missing, holds NaN, or holds too many different values for a label.
    """
    _check_label(obs, key)
    column = obs[key]
    num_cells = num_cells or len(column)
    if isinstance(column.dtype, pd.CategoricalDtype):
        names = list(column.cat.remove_unused_categories().cat.categories)
    else:
        names = sorted(column.unique(), key=lambda name: (str(type(name)), name))
    if len(names) > max(50, num_cells // 2):
        raise ValueError(
            f"obs[{key!r}] has {len(names)} different values in {num_cells} cells: it is no categorical label."
        )
    return [str(name) for name in names]


def _gene_ids(var: pd.DataFrame, key: str | None) -> list[str] | None:
    if key is not None and key not in var:
        raise ValueError(f"var has no column {key!r}; it has {list(var)}.")
    key = key or next((name for name in ("gene_ids", "gene_id", "ensembl_id", "ensembl") if name in var), None)
    return None if key is None else [str(gene_id) for gene_id in var[key]]
