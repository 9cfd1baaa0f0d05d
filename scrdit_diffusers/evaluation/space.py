"""Space E, in which cells are compared: principal components of the log-normalized variable genes of train."""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.decomposition import PCA

from scrdit_diffusers.checks import get_matrix, looks_like_counts
from scrdit_diffusers.values import VALUE_SPACES, normalize_log1p

TARGET_SUM = 1e4


def get_values(
    adata: ad.AnnData, var_names: pd.Index, layer: str | None = None, value_space: str = "counts", name: str = "adata"
) -> sp.csr_matrix:
    """Check and return the values (cells, genes) of given genes, in that order, without stored zeros.

    Parameters
    ----------
    adata
        Cells with at least these genes; others are left out.
    var_names
        Genes.
    layer
        Layer that holds the values; `None` takes X.
    value_space
        "counts" or "log_normalized".
    name
        What to call `adata` in messages.

    Raises
    ------
    ValueError
        Genes are missing or repeated, or values are not what `value_space` says.
    """
    if value_space not in VALUE_SPACES:
        raise ValueError(f"value_space must be one of {VALUE_SPACES}, got {value_space!r}.")
    if not adata.var_names.is_unique:
        raise ValueError(f"{name}.var_names repeats gene names; call {name}.var_names_make_unique().")
    columns = adata.var_names.get_indexer(var_names)
    if (columns < 0).any():
        raise ValueError(
            f"{name} lacks {np.sum(columns < 0)} of the {len(columns)} genes to compare, such as "
            f"{list(var_names[columns < 0][:5])}; compare cells with the same genes."
        )
    counts = value_space == "counts"
    try:
        values = get_matrix(adata, layer, counts)
    except ValueError as error:
        hint = ' For log-normalized values use value_space="log_normalized".' if counts else ""
        raise ValueError(f"{name}: {error}{hint}") from None
    if not counts and looks_like_counts(values):
        raise ValueError(f'{name} holds only integers, but value_space is "log_normalized"; use "counts".')
    values = values[:, columns]
    values.eliminate_zeros()
    values.sort_indices()
    return values


def log_normalize(values: sp.csr_matrix, value_space: str) -> sp.csr_matrix:
    """Turn counts (cells, genes) into log1p of counts per 10,000; log-normalized values stay as they are."""
    return normalize_log1p(values, TARGET_SUM) if value_space == "counts" else values.astype(np.float64)


class EvaluationSpace:
    """Space E: counts -> counts per 10,000 -> log1p -> highly variable genes of train -> PCs of train.

    Fitted on the training cells only. The library size is the sum over `var_names`.

    Parameters
    ----------
    train
        Training cells.
    layer
        Layer that holds the values, in all cells; `None` takes X.
    value_space
        "counts", or "log_normalized" for values that are log-normalized already.
    n_top_genes
        Number of highly variable genes (`flavor="seurat"`); all genes if there are no more.
    n_comps
        Number of principal components; fewer if there are fewer cells or genes.
    seed
        Seed of the PCA.
    var_names
        Genes to start from, those of the generated cells; `None` takes all of `train`.

    Raises
    ------
    ValueError
        The values are not what `value_space` says, or `train` has fewer than 3 cells or 3 genes.
    """

    def __init__(
        self,
        train: ad.AnnData,
        layer: str | None = None,
        value_space: str = "counts",
        n_top_genes: int = 2000,
        n_comps: int = 50,
        seed: int = 0,
        var_names: pd.Index | None = None,
    ):
        for name, size in dict(n_top_genes=n_top_genes, n_comps=n_comps).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        self.var_names = train.var_names if var_names is None else var_names
        self.layer, self.value_space = layer, value_space
        num_genes = len(self.var_names)
        if min(train.n_obs, num_genes) < 3:
            raise ValueError(f"train has {train.n_obs} cells x {num_genes} genes; give at least 3 of each.")
        log_values = log_normalize(get_values(train, self.var_names, layer, value_space, "train"), value_space)
        self.columns = np.arange(num_genes)  # of the highly variable genes
        if num_genes > n_top_genes:
            import scanpy as sc  # takes seconds to import, and is not needed for the genes of a model

            chosen = sc.pp.highly_variable_genes(ad.AnnData(log_values), n_top_genes=n_top_genes, inplace=False)
            self.columns = np.flatnonzero(chosen["highly_variable"])
        self.pca = fit_pca(log_values[:, self.columns], n_comps, seed)

    def transform(self, adata: ad.AnnData) -> np.ndarray:
        """Coordinates in E, shape (cells, PCs)."""
        values = get_values(adata, self.var_names, self.layer, self.value_space)
        return self.pca.transform(log_normalize(values, self.value_space)[:, self.columns])


def fit_pca(log_values: sp.csr_matrix, n_comps: int, seed: int) -> PCA:
    """Fit PCs with implicit centering, so that the matrix stays sparse."""
    return PCA(min(n_comps, min(log_values.shape) - 1), svd_solver="arpack", random_state=seed).fit(log_values)


@dataclass
class CellsInSpace:
    """Cells with everything that the metrics use."""

    values: sp.csr_matrix  # (n, G) counts, or log-normalized values
    log_values: sp.csr_matrix  # (n, G) log-normalized
    pcs: np.ndarray  # (n, PCs) in E
    labels: np.ndarray  # (n,); all empty without labels_key

    @classmethod
    def from_anndata(cls, adata: ad.AnnData, values: sp.csr_matrix, labels_key: str | None, space: EvaluationSpace):
        """Project cells to the space; `values` are their checked values."""
        log_values = log_normalize(values, space.value_space)
        labels = np.full(adata.n_obs, "") if labels_key is None else adata.obs[labels_key].astype(str).to_numpy()
        return cls(values, log_values, space.pca.transform(log_values[:, space.columns]), labels)

    def __len__(self) -> int:
        return len(self.pcs)

    def __getitem__(self, rows: np.ndarray) -> "CellsInSpace":
        return CellsInSpace(self.values[rows], self.log_values[rows], self.pcs[rows], self.labels[rows])

    def sample(self, n: int, rng: np.random.Generator) -> "CellsInSpace":
        """Draw at most n cells without replacement, in their order."""
        return self if len(self) <= n else self[np.sort(rng.choice(len(self), n, replace=False))]

    @property
    def library_size(self) -> np.ndarray:
        """Sum of the values of each cell, shape (n,)."""
        return np.asarray(self.values.sum(axis=1), dtype=np.float64).ravel()

    @property
    def genes_detected(self) -> np.ndarray:
        """Number of genes with a value above zero, shape (n,)."""
        return self.values.getnnz(axis=1)
