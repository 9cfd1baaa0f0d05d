"""What a processor learns from training cells that need not fit in memory: genes, transform, labels, library sizes.

Fitting takes two passes over the cells, one more each for `flavor="seurat_v3"` and states, and one or two for
`recover_counts`. The first gives the moments from which genes are chosen; library sizes are those over the chosen genes
and need the second.
"""

import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import scipy.sparse as sp
from datasets.fingerprint import Hasher
from filelock import FileLock

from scrdit_diffusers.checks import (
    check_gene_names,
    check_label,
    check_values,
    find_gene_ids,
    find_genes,
    get_matrix,
    label_categories,
    looks_like_counts,
    matrix_name,
)
from scrdit_diffusers.launch import without_main_module
from scrdit_diffusers.processing_scrdit import STATE_KEY, SCRDiTProcessor
from scrdit_diffusers.values import VALUE_SPACES

from .anndata_builder import READ_ONLY
from .damage import folder_of, reading
from .gene_selection import GeneSelection
from .layout import VALUE_COLUMNS, iterate_rows, rows_to_matrix, rows_to_obs, token_positions
from .moments import ROWS_PER_UPDATE, CellMoments, Chunks, GeneMoments, run_pass
from .scaling import Normalization, find_scaling, ignore_overflow
from .states import fit_states, with_states

logger = logging.getLogger(__name__)

Table: TypeAlias = datasets.Dataset | datasets.IterableDataset
FIT_VERSION = 2  # increased when fitting changes, to invalidate earlier caches
ROWS_PER_PART = 10**6  # of a dataset, whose parts are gone through separately to learn from them
LIBRARY_SIZE_QUANTILES = 21


@dataclass(frozen=True)
class FitOptions:
    """How a processor is fitted.

    Parameters
    ----------
    value_space
        "counts" or "log_normalized"; see [`SCRDiTProcessor`].
    target_sum
        With "log_normalized": the values are counts and are log-normalized to this library size. `None`: they are
        log-normalized already.
    zero_negation, zero_value, zero_threshold
        See [`SCRDiTProcessor`].
    min_std
        Smallest standard deviation by which a gene is divided, in the log space. Divided by its own, a gene that few
        cells express would reach tens of standard deviations and drown the others (see training/LOG.md). 0 gives
        every gene the standard deviation 1.
    n_top_genes
        How many genes to keep; fewer are kept where fewer are expressed.
    flavor
        How they are chosen: "seurat", "cell_ranger" or "seurat_v3" (`scanpy.pp.highly_variable_genes`), "cv" (largest
        coefficient of variation, the paper's), or "all" (every expressed gene; ignores `n_top_genes`).
    genes
        Names of the genes to use, instead of a choice by `flavor`.
    gene_ids_key
        Column of var with Ensembl ids. `None` looks for "gene_ids", "gene_id", "ensembl_id" and "ensembl".
    standardize
        Whether model space is standardized; the paper's is not (mean 0 and standard deviation 1 are stored).
    num_states
        For a model of counts, how many groups of similar cells to find as one more condition, `STATE_KEY`, see
        [`~scrdit_diffusers.cells.states.find_states`]; `None` chooses by the number of cells if there are no labels.
    pretrained_states
        Processor of a pretrained model, whose groups are kept.
    recover_counts
        With "log_normalized": let the model see the counts behind the values, see `normalized_by` of
        [`SCRDiTProcessor`]. Where a cell's values are whole multiples of its smallest one (before log1p), as those of
        `scanpy.pp.normalize_total` are, these are exact. So they are for the most part where counts were divided by
        the length of the gene as well, as in TPM, or the logarithm is to base 2 or 10.

    Raises
    ------
    ValueError
        `value_space` is unknown.
    """

    value_space: str = "counts"
    target_sum: float | None = None
    zero_negation: bool = False
    zero_value: float = -10.0
    zero_threshold: float = 0.0
    min_std: float = 0.3
    n_top_genes: int = 2000
    flavor: str = "seurat"
    genes: Sequence[str] | None = None
    gene_ids_key: str | None = None
    standardize: bool = True
    num_states: int | None = 0
    pretrained_states: SCRDiTProcessor | None = None
    recover_counts: bool = False

    def __post_init__(self):
        if self.value_space not in VALUE_SPACES:
            raise ValueError(f"value_space must be one of {VALUE_SPACES}, got {self.value_space!r}.")

    @property
    def expect_counts(self) -> bool:
        """Whether the values of the cells have to be counts."""
        return self.value_space == "counts" or self.target_sum is not None


def fit_anndata(
    adata: ad.AnnData,
    labels_key: str | Sequence[str] | None = None,
    layer: str | None = None,
    options: FitOptions | None = None,
) -> tuple[SCRDiTProcessor, CellMoments]:
    """Fit a processor to cells in memory; see [`SCRDiTProcessor.from_anndata`] and [`fit_chunks`]."""
    options = options or FitOptions()
    check_gene_names(list(map(str, adata.var_names)), "adata.var_names", " Call adata.var_names_make_unique().")
    matrix = get_matrix(adata, layer, options.expect_counts)

    def chunks() -> Iterator[tuple[sp.csr_matrix, pd.DataFrame]]:
        for start in range(0, adata.n_obs, ROWS_PER_UPDATE):
            yield matrix[start : start + ROWS_PER_UPDATE], adata.obs.iloc[start : start + ROWS_PER_UPDATE]

    return fit_chunks(chunks, adata.var, labels_key, matrix_name(layer), options)


def fit_chunks(
    chunks: Chunks | Sequence[Chunks],
    var: pd.DataFrame,
    labels_key: str | Sequence[str] | None = None,
    name: str = "the data",
    options: FitOptions | None = None,
    map_parts: Callable[..., Iterable[Any]] = map,
) -> tuple[SCRDiTProcessor, CellMoments]:
    """Fit a processor to cells that come in chunks, of which only one is in memory.

    Parameters
    ----------
    chunks
        Starts a pass: yields the values of some cells over all genes, and their rows of obs. Or several of these, one
        for each part of the cells.
    var
        Genes of the data.
    labels_key
        Column(s) of obs that condition the model.
    name
        What to call the values in messages.
    options
        How to fit; the defaults if `None`.
    map_parts
        `map`, or that of a `concurrent.futures` executor, which spreads the parts over its processes. The result
        depends on the parts only.

    Returns
    -------
    The processor, and the moments of the cells from which a count head starts.

    Raises
    ------
    ValueError
        Values, genes or labels that a model cannot be trained on.
    """
    options = options or FitOptions()
    var_names = [str(gene) for gene in var.index]
    check_gene_names(var_names, "var_names", " Call adata.var_names_make_unique().")
    if options.genes is not None:
        check_gene_names(list(map(str, options.genes)), "genes")
        find_genes(options.genes, var_names)
    labels_key = [labels_key] if isinstance(labels_key, str) else list(labels_key or [])
    if STATE_KEY in labels_key:
        raise ValueError(f"labels_key: {STATE_KEY!r} is what states are called, which are found; rename the column.")
    gene_ids = find_gene_ids(var, options.gene_ids_key)
    parts = [chunks] if callable(chunks) else list(chunks)

    # 1. What the values are, which genes and labels there are
    space, of_genes = _find_value_space(parts, name, len(var_names), options, map_parts)
    preliminary = SCRDiTProcessor(**space)
    for setting, values in of_genes.items():
        setattr(preliminary, setting, values)  # of all genes
    flavor = options.flavor if options.genes is None else "all"
    selection = GeneSelection(flavor, options.n_top_genes, len(var_names), options.expect_counts)
    seen = run_pass(_FirstPass(preliminary, selection, name, options.expect_counts, labels_key), parts, map_parts)
    seen.check()
    if options.genes is not None:
        columns = find_genes(options.genes, var_names, seen.selection.num_expressing)
    elif seen.selection.num_expressing.any():
        columns = seen.selection.select(parts, map_parts)
    else:
        raise ValueError("All genes are zero in every training cell: there is nothing to learn.")
    if "value_min" in of_genes:
        logger.warning("%s does not look like log1p of scaled counts; pass raw counts if you have them.", name)

    # 2. The transform
    moments, zero = seen.moments, preliminary.value_kind.zero
    variance = moments.variance()[columns]
    std = np.sqrt(np.where(variance > 1e-12, variance, 1.0))  # 1 for a gene that does not vary
    processor = SCRDiTProcessor(
        var_names=[var_names[column] for column in columns],
        mean=moments.mean[columns] + zero if options.standardize else np.zeros(len(columns)),
        std=np.maximum(std, options.min_std) if options.standardize else np.ones(len(columns)),
        **space,
        **{setting: values[columns] for setting, values in of_genes.items()},
        gene_ids=None if gene_ids is None else [gene_ids[column] for column in columns],
        condition_keys=labels_key,
        condition_categories=[label_categories(seen.labels, key, moments.num_cells) for key in labels_key],
    )

    # 3. States, composition and library sizes
    combinations = np.unique(processor.encode_labels(seen.labels), axis=0)
    combinations = combinations if labels_key else np.zeros((1, 0), dtype=np.int64)
    if processor.models_counts:
        known = options.pretrained_states
        fit_states(processor, columns, parts, map_parts, moments.num_cells, options.num_states, known)
        combinations = with_states(combinations, len(processor.state_profiles))
    cell_moments = CellMoments(combinations, len(columns) if processor.models_counts else None)
    second = run_pass(_SecondPass(processor, columns, cell_moments), parts, map_parts)
    cell_moments = second.moments
    cell_moments.drop_absent()
    processor.composition = np.column_stack([cell_moments.combinations, cell_moments.num_cells]).tolist()
    if processor.normalized_by == "library_size" and second.no_other_genes:
        processor.normalized_by = "model_genes"
    if processor.models_counts:
        quantiles = cell_moments.library_size_quantiles(LIBRARY_SIZE_QUANTILES)
        processor.log_library_sizes = np.round(quantiles, 4).tolist()
    return processor, cell_moments


def _find_value_space(
    parts: Sequence[Chunks], name: str, num_vars: int, options: FitOptions, map_parts: Callable[..., Iterable[Any]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Find the settings of the processor that say what values are, and those of them that all genes have."""
    names = ("value_space", "target_sum", "zero_negation", "zero_value", "zero_threshold")
    space: dict[str, Any] = {field: getattr(options, field) for field in names}
    if not options.recover_counts or options.value_space != "log_normalized":
        return space, {}
    if options.target_sum is not None:
        return space | dict(normalized_by="library_size", normalized_to=options.target_sum), {}
    found = seen = run_pass(Normalization(name, num_vars), parts, map_parts)
    if found.library_size() is None and (scaling := find_scaling(seen.sample())):
        found = run_pass(Normalization(name, num_vars, *scaling), parts, map_parts)
    library_size = found.library_size()
    if library_size is not None:
        space |= dict(normalized_by="library_size", normalized_to=library_size)
        space |= {} if found.log_base == np.e else dict(log_base=found.log_base)
        return space, found.scales_of_all_genes()
    smallest = np.where(np.isfinite(seen.smallest), seen.smallest, 0.0)
    return space | dict(value_step=seen.value_step()), {"value_min": smallest}


class _FirstPass:
    """What [`fit_chunks`] wants to know before it knows the genes and labels: checks as it goes."""

    def __init__(
        self,
        processor: SCRDiTProcessor,
        selection: GeneSelection,
        name: str,
        expect_counts: bool,
        labels_key: Sequence[str],
    ):
        self.value_kind, self.selection, self.name = processor.value_kind, selection, name
        self.expect_counts = expect_counts
        self.moments = GeneMoments(len(selection.num_expressing))  # of the values before standardization
        self.labels_key = list(labels_key)
        self.labels = pd.DataFrame(columns=self.labels_key)  # the combinations that occur
        self.integers = True

    def update(self, matrix: sp.csr_matrix, obs: pd.DataFrame) -> None:
        """Take in more cells."""
        check_values(matrix, self.name, self.expect_counts)
        self.integers = self.integers and looks_like_counts(matrix)
        with ignore_overflow():
            self.selection.update(matrix)
        self.moments.update(self._above_zero(matrix))
        for key in self.labels_key:
            check_label(obs, key)
        self._add_labels(obs[self.labels_key].drop_duplicates())

    def merge(self, other: "_FirstPass") -> None:
        """Take in the cells of another one."""
        with ignore_overflow():
            self.selection.merge(other.selection)
        self.moments.merge(other.moments)
        self.integers = self.integers and other.integers
        self._add_labels(other.labels)

    def check(self) -> None:
        """Raise ValueError for cells that a model cannot be trained on."""
        if self.moments.num_cells < 2:
            raise ValueError(f"{self.name} has {self.moments.num_cells} cells; at least 2 are needed.")
        if not self.expect_counts and self.integers:
            raise ValueError(
                f"{self.name} was taken as log-normalized values but holds only integers: give "
                'target_sum=1e4 to log-normalize counts, or use value_space="counts".'
            )

    def _above_zero(self, matrix: sp.csr_matrix) -> sp.csr_matrix:
        """Values before standardization minus that of zero, hence still sparse."""
        values, _ = self.value_kind.model_values(matrix, slice(None))
        if not values.data.all():
            values = values.copy()
            values.eliminate_zeros()
        data = self.value_kind.to_log(values.data) - self.value_kind.zero
        return sp.csr_matrix((data, values.indices, values.indptr), shape=values.shape)

    def _add_labels(self, labels: pd.DataFrame) -> None:
        known = [some for some in (self.labels, labels) if len(some)]
        self.labels = pd.concat(known).drop_duplicates() if known else self.labels


class _SecondPass:
    """The moments of the chosen genes."""

    def __init__(self, processor: SCRDiTProcessor, columns: np.ndarray, moments: CellMoments):
        self.processor, self.columns, self.moments = processor, columns, moments
        self.no_other_genes = True  # all counts of all cells belong to the model's genes

    def update(self, matrix: sp.csr_matrix, obs: pd.DataFrame) -> None:
        """Take in more cells."""
        counts = library_sizes = None
        if self.moments.counts:
            counts, library_sizes = self.processor.select_counts(matrix, self.columns)
            of_model = self.processor.value_kind.library_sizes(counts)
            self.no_other_genes = self.no_other_genes and np.allclose(of_model, library_sizes, rtol=1e-3)
            obs = self.processor.add_states(obs, counts)
        self.moments.update(counts, self.processor.encode_labels(obs), library_sizes)

    def merge(self, other: "_SecondPass") -> None:
        """Take in the cells of another one."""
        self.moments.merge(other.moments)
        self.no_other_genes = self.no_other_genes and other.no_other_genes


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
            with reading(folder_of(self.table), "its cells"):
                matrix = rows_to_matrix(rows, self.num_vars, self.positions)
            yield matrix, rows_to_obs(rows, self.labels_key)


def fit_dataset(
    table: Table,
    var: pd.DataFrame,
    labels_key: str | Sequence[str] = (),
    num_proc: int | None = None,
    name: str = "the data",
    token_key: str | None = None,
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
    name
        What to call the values in messages.
    token_key
        That of the dataset, see [`CellDataset`].
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
    features, positions = table.features, token_positions(var, token_key)
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
            map_parts = without_main_module()(executor.map)  # which starts the processes
            return fit_chunks(parts, var, labels_key, name, FitOptions(**options), map_parts)

    if isinstance(table, datasets.IterableDataset) or not table.cache_files:
        return fit()
    key = Hasher.hash([table._fingerprint, var.to_csv(), token_key, labels_key, sorted(options.items()), FIT_VERSION])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "scrdit_processors" / key
    with ExitStack() as stack:
        if not folder.exists():
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(f"{folder}.lock"))
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise
                return fit()
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
