"""Processor between AnnData and model space: genes, transform and labels. Saved with the pipeline."""

import difflib
import importlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from transformers import FeatureExtractionMixin

from .checks import check_gene_names, check_label, explain_missing, get_matrix, matrix_name
from .hub import explain_push
from .stored_weights import DamagedFileError
from .values import Counts, choose_value_kind, normalize_log1p

logger = logging.getLogger(__name__)

RARE_LABEL_CELLS = 30  # labels with fewer training cells may give poor cells
FEW_CELLS = 200  # training cells, below which training alone does not teach the labels
MAX_LOG_LIBRARY_SIZE = 30  # e^30 = 10^13 counts
STATE_KEY = "scrdit_state"  # the condition that groups of similar training cells are
ZERO_TOLERANCE = 1e-6  # largest error of an exact zero after standardizing and back


class SCRDiTProcessor(FeatureExtractionMixin):
    r"""Maps values of AnnData to the space in which the transformer works (model space), and back.

    For a value v of gene g:

    - `value_space="counts"`: x = (log1p(v) - mean_g) / std_g. The inverse rounds to integers and is exact.
    - `value_space="log_normalized"` (the paper's): v is a log-normalized value, x = (v - mean_g) / std_g.
    - The same with `normalized_by`: the model sees the counts k behind v = log1p(`normalized_to` w_g k / d), with
      x = (log1p(k) - mean_g) / std_g. The divisor d is the cell's library size, the sum of w_g k, over all genes of
      the data ("library_size") or over those of the model ("model_genes"). All w_g are 1 unless there is a
      `gene_scale`, as in TPM; the logarithm may have another `log_base`.
    - The same with `value_step`, for values that are not scaled counts: the model sees the step k, 0 for an exact zero
      and otherwise given by v = `value_min`_g + `value_step` (k - 1).

    The inverse turns values up to `zero_threshold` (log space) into exact zeros. With `zero_negation`, exact zeros
    become `zero_value` before standardization, so that they lie far from small positive values. Mean and standard
    deviation are those of the training cells after zero negation. Because of a floor on the latter, genes that
    few cells express have one below 1 in model space.

    Usually built by [`SCRDiTProcessor.from_anndata`], and loaded with the pipeline.

    Parameters
    ----------
    var_names
        Names of the G genes, in the order of the model.
    mean
        Mean of each gene before standardization, shape (G,).
    std
        Standard deviation of each gene before standardization, shape (G,), positive.
    value_space
        "counts" or "log_normalized".
    target_sum
        Library size to which counts are scaled before log1p. `None`: values are taken as they are. Only for
        `value_space="log_normalized"`.
    zero_negation
        Whether exact zeros are moved away from small positive values.
    zero_value
        Value of exact zeros with zero negation (paper: -10), in the log space before standardization.
    zero_threshold
        Values up to this one, in the log space, become exact zeros on the way back.
    gene_ids
        Ensembl ids of the genes, shape (G,); `None` if unknown.
    condition_keys
        The K columns of obs that condition the model, in the order of `class_labels`.
    condition_categories
        For each key its categories; the code of a category is its position.
    composition
        One row per combination of categories in the training cells: K codes and the number of cells.
    log_library_sizes
        For a model of counts: for each row of `composition`, equally spaced quantiles (0 to 1) of its cells' log
        library sizes, over the G genes or, with `normalized_by="library_size"`, over all genes.
    normalized_by
        "library_size" or "model_genes", see above; `None` if the model does not see counts behind the values.
    normalized_to
        Library size to which the counts behind log-normalized values were scaled.
    value_step
        Step in which other log-normalized values are counted; `None` if they are not.
    value_min
        Smallest value of each gene, shape (G,), if values are counted in steps.
    log_base
        Base of the logarithm of values with counts behind them; `None` for the natural one.
    gene_scale
        w of each gene, shape (G,), if counts were divided by the length of the gene or the like; empty if not.
    state_profiles
        For a model of states (groups of similar cells, the condition `STATE_KEY`): mean log-normalized counts of each
        of the S groups, shape (S, G). Each cell belongs to the nearest, see [`SCRDiTProcessor.add_states`].
    state_library_size
        Library size over the model's genes to which counts are scaled for that.

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
        state_profiles: Sequence[Sequence[float]] | np.ndarray = (),
        state_library_size: float | None = None,
        log_base: float | None = None,
        gene_scale: Sequence[float] | np.ndarray = (),
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
        self.log_base = None if log_base is None else float(log_base)
        self.gene_scale = np.asarray(gene_scale, dtype=np.float64)
        self.state_profiles = np.asarray(state_profiles, dtype=np.float64)
        self.state_library_size = None if state_library_size is None else float(state_library_size)

        _ = self.value_kind  # raises ValueError for settings that do not go together
        check_gene_names(self.var_names, "var_names")
        lengths = dict(mean=self.mean.shape, std=self.std.shape)
        if value_step is not None:
            lengths["value_min"] = self.value_min.shape
        if len(self.gene_scale):
            lengths["gene_scale"] = self.gene_scale.shape
        if self.gene_ids is not None:
            lengths["gene_ids"] = (len(self.gene_ids),)
        for name, shape in lengths.items():
            if shape != (self.num_genes,):
                raise ValueError(
                    f"{name} has shape {shape}, expected one entry for each of {self.num_genes} var_names."
                )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and (self.std > 0).all()):
            bad = (~np.isfinite(self.mean) | ~np.isfinite(self.std) | (self.std <= 0)).sum()
            raise ValueError(f"mean and std must be finite, and std positive; {bad} of {self.num_genes} genes are not.")
        if not (np.isfinite([self.zero_value, self.zero_threshold]).all() and np.isfinite(self.value_min).all()):
            raise ValueError("zero_value, zero_threshold and value_min must be finite.")
        self._check_labels()

    def _check_states(self) -> None:
        """Raise ValueError unless states belong to the genes and to the last condition."""
        states, profiles = self.conditions.get(STATE_KEY, []), self.state_profiles
        if len(profiles) != len(states) or (states and self.condition_keys[-1] != STATE_KEY):
            raise ValueError(f"state_profiles has {len(profiles)} rows for {len(states)} labels of {STATE_KEY!r}.")
        if states and (profiles.shape != (len(states), self.num_genes) or not np.isfinite(profiles).all()):
            raise ValueError(f"state_profiles has shape {profiles.shape}, expected finite (S, {self.num_genes}).")
        if states and not (self.state_library_size and 0 < self.state_library_size < np.inf):
            raise ValueError(f"state_library_size must be positive, got {self.state_library_size}.")

    def _check_labels(self) -> None:
        """Raise ValueError unless conditions, composition and library sizes belong together."""
        if len(self.condition_keys) != len(self.condition_categories):
            lengths = (len(self.condition_keys), len(self.condition_categories))
            raise ValueError(f"condition_keys and condition_categories must have the same length, got {lengths}.")
        self._check_states()
        for key, names in self.conditions.items():
            if len(set(names)) != len(names):
                raise ValueError(f"condition_categories repeats a label of {key!r}.")
        for row in self.composition:
            if len(row) != len(self.condition_keys) + 1 or row[-1] < 1:
                raise ValueError(f"composition holds {row}, expected a code for each condition and a number of cells.")
            for code, names in zip(row, self.condition_categories, strict=False):
                if not 0 <= code < len(names):
                    raise ValueError(f"composition holds the code {code} of {len(names)} labels.")
        if self.log_library_sizes and len(self.log_library_sizes) != len(self.composition):
            lengths = (len(self.log_library_sizes), len(self.composition))
            raise ValueError(f"log_library_sizes must have one row for each of composition, got {lengths}.")
        if len({len(row) for row in self.log_library_sizes}) > 1:
            raise ValueError("log_library_sizes must have rows of one length.")
        if not all(
            np.isfinite(row).all() and max(row, default=1) < MAX_LOG_LIBRARY_SIZE for row in self.log_library_sizes
        ):
            raise ValueError(f"log_library_sizes must be finite and below {MAX_LOG_LIBRARY_SIZE}.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a processor as `FeatureExtractionMixin.from_pretrained` does.

        Raises
        ------
        OSError
            There is no such file, or its contents describe no processor.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, OverflowError, RecursionError, TypeError, ValueError) as error:
            place = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "", "preprocessor_config.json")
            raise DamagedFileError(f"{place} describes no {cls.__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Serialize to a dict; a processor without states or scales of genes has no entries for these."""
        settings = super().to_dict()
        if self.log_base is None:
            del settings["log_base"]
        if not len(self.gene_scale):
            del settings["gene_scale"]
        if not len(self.state_profiles):
            del settings["state_profiles"], settings["state_library_size"]
        return settings

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save the processor as `FeatureExtractionMixin.save_pretrained` does; errors of the upload say what to do."""
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
        **options: Any,
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
        **options
            Those of [`~scrdit_diffusers.cells.fitting.FitOptions`]: `value_space`, `n_top_genes`, `flavor`, `genes`,
            `min_std`, ...

        Returns
        -------
        The processor. Genes are in the order of `adata.var_names`, or in that of `genes`.

        Raises
        ------
        ValueError
            A model cannot be trained on the values, genes or labels; the message names the layer or column.
        TypeError
            An option is unknown.
        """
        # Not at the top: fitting needs scanpy's gene flavors, and the code on the Hub only transforms.
        fitting = importlib.import_module("scrdit_diffusers.cells.fitting")
        return fitting.fit_anndata(adata, labels_key, layer, fitting.FitOptions(**options))[0]

    @property
    def num_genes(self) -> int:
        """Number of genes G."""
        return len(self.var_names)

    @property
    def value_kind(self) -> Counts:
        """Kind of the values, and what the model sees of them."""
        zero = self.zero_value if self.zero_negation else 0.0
        settings = (self.normalized_by, self.normalized_to, self.value_step, self.value_min)
        return choose_value_kind(self.value_space, self.target_sum, zero, *settings, self.log_base, self.gene_scale)

    @property
    def models_counts(self) -> bool:
        """Whether the model sees counts, either the values themselves or those behind log-normalized values."""
        return self.value_kind.models_counts

    @property
    def num_classes(self) -> list[int]:
        """Number of categories of each condition, for the transformer's config."""
        return [len(names) for names in self.condition_categories]

    @property
    def conditions(self) -> dict[str, list[str]]:
        """Categories of each condition by its obs column, in the order of their codes."""
        return dict(zip(self.condition_keys, self.condition_categories, strict=True))

    @property
    def labels_keys(self) -> list[str]:
        """The columns of obs that condition the model: all conditions but states, which are found by the counts."""
        return [key for key in self.condition_keys if key != STATE_KEY]

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
        check_gene_names(list(map(str, var_names)), "var_names", " Call adata.var_names_make_unique().")
        positions = pd.Index(var_names).get_indexer(pd.Index(self.var_names))
        if (positions < 0).any():
            missing = [self.var_names[i] for i in np.flatnonzero(positions < 0)]
            raise ValueError(
                f"{len(missing)} of the model's {self.num_genes} genes are missing from the data, such as "
                f"{missing[:5]}; the data's names look like {[str(name) for name in var_names[:3]]}."
                + (
                    explain_missing(missing, var_names, self.gene_ids)
                    or " Give all genes that were measured, or train a pipeline on the genes that the data have."
                )
            )
        return positions

    def get_values(self, adata: ad.AnnData, layer: str | None = None) -> sp.csr_matrix:
        """Select the model's genes of an AnnData, check the values and, with `target_sum`, log-normalize them.

        Parameters
        ----------
        adata
            Cells, with at least the model's genes. The library size is taken over all of its genes.
        layer
            Layer that holds the values; `None` takes X.

        Returns
        -------
        CSR matrix, shape (cells, G): counts, or log-normalized values.

        Raises
        ------
        ValueError
            Genes are missing, or values are not what `value_space` says.
        """
        matrix = get_matrix(adata, layer, self.value_kind.expect_counts)
        return self.value_kind.data_values(matrix, self.gene_columns(adata.var_names))

    def get_counts(self, adata: ad.AnnData, layer: str | None = None) -> tuple[sp.csr_matrix, np.ndarray]:
        """Select what a model of counts sees of an AnnData: its counts, or the counts behind its values.

        Parameters
        ----------
        adata
            Cells, with at least the model's genes. All genes serve to find library sizes and counts.
        layer
            Layer that holds the values; `None` takes X.

        Returns
        -------
        Counts as a CSR matrix, shape (cells, G), and library sizes, shape (cells,).

        Raises
        ------
        ValueError
            As [`get_values`]; or the model does not see counts, or the values have none behind them.
        """
        matrix = get_matrix(adata, layer, self.value_kind.expect_counts)
        columns = self.gene_columns(adata.var_names)
        self.value_kind.check_data(matrix, columns, matrix_name(layer))
        return self.select_counts(matrix, columns)

    def select_counts(self, matrix: sp.csr_matrix, columns: np.ndarray | slice) -> tuple[sp.csr_matrix, np.ndarray]:
        """[`get_counts`] for a checked matrix whose gene columns are known, as in a training batch."""
        counts, library_sizes = self.value_kind.model_values(matrix, columns)
        if library_sizes is None:
            raise ValueError(f"value_space={self.value_space!r}: this model sees the values themselves, not counts.")
        return counts, library_sizes

    def normalize(self, counts: sp.csr_matrix, library_sizes: np.ndarray | None = None) -> sp.csr_matrix:
        """Turn counts of a model into values like those of its training data.

        Parameters
        ----------
        counts
            CSR matrix, shape (cells, G).
        library_sizes
            Shape (cells,); needed only with `normalized_by="library_size"`.

        Returns
        -------
        CSR matrix of the same shape: log-normalized values, or `counts` if the training data were counts.
        """
        return self.value_kind.restore(counts, library_sizes)

    def transform(self, values: np.ndarray | sp.spmatrix) -> np.ndarray:
        """Transform values to model space.

        Parameters
        ----------
        values
            Counts or log-normalized values, as the model sees them, shape (cells, G), dense or sparse.

        Returns
        -------
        Dense float64 array of the same shape. (As float32, counts above about 10^5 would not come back exactly.)

        Raises
        ------
        ValueError
            The number of genes is not G, or `values` are not the counts that the model sees.
        TypeError
            `values` is an AnnData.
        """
        if isinstance(values, ad.AnnData):
            raise TypeError("transform takes a matrix, not an AnnData: adata[:, processor.var_names].X")
        values = sp.csr_matrix(values, copy=True)
        if values.shape[1] != self.num_genes:
            raise ValueError(f"values has {values.shape[1]} genes, the processor has {self.num_genes}.")
        values.eliminate_zeros()
        kind = self.value_kind
        if (
            kind.models_counts
            and self.value_space != "counts"
            and not np.array_equal(values.data, np.rint(values.data))
        ):
            raise ValueError("values are not counts, which this model sees: transform those that get_counts returns.")
        dense = np.repeat(((kind.zero - self.mean) / self.std)[None], values.shape[0], axis=0)  # (cells, G)
        rows = np.repeat(np.arange(values.shape[0]), np.diff(values.indptr))
        columns = values.indices
        dense[rows, columns] = (kind.to_log(values.data) - self.mean[columns]) / self.std[columns]
        return dense

    def inverse_transform(self, samples: np.ndarray) -> np.ndarray:
        """Transform model space back to values.

        Parameters
        ----------
        samples
            Model space, shape (cells, G).

        Returns
        -------
        Float32 array of the same shape: non-negative integers if the model sees counts, else values >= 0.

        Raises
        ------
        ValueError
            The number of genes is not G.
        """
        if samples.shape[-1] != self.num_genes:
            raise ValueError(f"samples has {samples.shape[-1]} genes, the processor has {self.num_genes}.")
        values = np.asarray(samples, dtype=np.float64) * self.std + self.mean
        values = np.where(values <= max(self.zero_threshold, ZERO_TOLERANCE), 0.0, values)
        return self.value_kind.from_log(values).astype(np.float32)

    # -- labels ----------------------------------------------------------------------------------------------------

    def encode_labels(self, obs: pd.DataFrame, keys: Sequence[str] | None = None) -> np.ndarray:
        """Encode each cell's labels.

        Parameters
        ----------
        obs
            One row per cell, with all condition columns.
        keys
            The conditions to encode; `None`: all.

        Returns
        -------
        Integer codes, shape (cells, K).

        Raises
        ------
        ValueError
            A column is missing, comes twice, holds NaN, or holds a label that the model does not know.
        """
        keys = self.condition_keys if keys is None else keys
        for key in keys:
            check_label(obs, key)
        codes = [self._encode(key, obs[key]) for key in keys]
        return np.stack(codes, axis=1) if codes else np.empty((len(obs), 0), dtype=np.int64)

    def add_states(self, obs: pd.DataFrame, counts: sp.csr_matrix, measured: np.ndarray | None = None) -> pd.DataFrame:
        """Find the states of measured cells, as one more column of their labels, unless there is none or it is there.

        Parameters
        ----------
        obs
            One row per cell.
        counts
            Counts of these cells, shape (cells, G).
        measured
            Whether a gene is measured, shape (G,); `None`: all are.
        """
        if self.state_library_size is None or STATE_KEY in obs:
            return obs
        profiles, library_size = self.state_profiles, self.state_library_size
        if measured is not None:
            rates = np.expm1(profiles).mean(axis=0)  # (G,)
            library_size *= rates[measured].sum() / max(rates.sum(), 1e-12)
            counts, profiles = counts[:, np.flatnonzero(measured)], profiles[:, measured]
        logs = normalize_log1p(counts, library_size)  # (cells, genes)
        distance = (profiles**2).sum(axis=1) - 2 * (logs @ profiles.T)  # (cells, S), up to a constant of each cell
        states = pd.Categorical.from_codes(np.argmin(distance, axis=1), categories=pd.Index(self.conditions[STATE_KEY]))
        return obs.assign(**{STATE_KEY: states})

    def _encode(self, key: str, labels: pd.Series) -> np.ndarray:
        """Encode the labels of one condition as codes (cells,)."""
        names = self.conditions[key]
        if labels.isna().any():
            raise ValueError(f"{key!r} holds {int(labels.isna().sum())} NaN; give every cell a label or drop it.")
        categories = pd.Categorical(labels)
        codes = pd.Index(names).get_indexer(categories.categories.map(str))[categories.codes]
        if (codes < 0).any():
            unknown = str(labels[codes < 0].iloc[0])
            closest = difflib.get_close_matches(unknown, names, n=1, cutoff=0.4)
            raise ValueError(
                f"Unknown {key} {unknown!r}{f', did you mean {closest[0]!r}?' if closest else '.'} Known: {names}."
            )
        return codes

    def decode_labels(self, codes: np.ndarray) -> pd.DataFrame:
        """Decode codes (cells, K) to labels, as categoricals with the training categories."""
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
        """Labels for new cells: given ones, and the others drawn from the training composition conditional on them.

        Parameters
        ----------
        num_cells
            Number of cells.
        conditions
            For any of the condition keys, one label for all cells or one per cell.
        quantiles
            Uniform random numbers in [0, 1) for drawing the others, shape (`num_cells`,).

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
                    f"conditions: {key!r} is unknown; the model's conditions are {self.condition_keys or 'none'}."
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
        """Library sizes for new cells, interpolated from those of training cells with the same labels.

        For a combination of labels that no training cell has, quantiles are those of all cells plus the shift of each
        of its labels.

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
