"""What a model has to beat: simple generators that make cells from training cells for the rows of a given obs."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scipy.special import ndtr, ndtri

from scrdit_diffusers.checks import check_label, get_matrix

BASELINE_MAX_CELLS = 5000  # of a label, at most, that a baseline uses; bounds its dense matrices

BASELINE_NAMES = {
    "resample_genes": "genes resampled alone",
    "gaussian_copula": "Gaussian copula",
    "scvi_prior": "scVI prior",
}


def resample_genes(
    train: ad.AnnData, obs: pd.DataFrame, labels_key: str | None, rng: np.random.Generator, layer: str | None = None
) -> ad.AnnData:
    """Baseline of independent genes: each gene of a new cell comes from a random training cell of its label.

    Parameters
    ----------
    train
        Training cells.
    obs
        One row per new cell, such as the obs of the test cells.
    labels_key
        Column of `obs` and `train.obs`; `None` treats all cells as one label.
    rng
        Source of randomness.
    layer
        Layer of `train` that holds the values; `None` takes X.

    Returns
    -------
    Cells: X (CSR float32), obs with `labels_key` and `obs["synthetic"]` (bool, True), genes of `train`.
    """

    def draw(cells: np.ndarray, n: int) -> np.ndarray:
        return np.take_along_axis(cells, rng.integers(len(cells), size=(n, cells.shape[1])), axis=0)

    return _sample_by_label(train, obs, labels_key, layer, rng, draw)


def gaussian_copula(
    train: ad.AnnData, obs: pd.DataFrame, labels_key: str | None, rng: np.random.Generator, layer: str | None = None
) -> ad.AnnData:
    """Baseline with pairwise dependence of genes: per label a Gaussian copula with the genes' empirical marginals.

    Normal scores of the ranks (ties in random order) give the correlation matrix R; a new cell is
    `x_g = F_g^-1(Phi(z_g))`, z ~ N(0, R).

    Parameters and output are those of [`resample_genes`].

    References
    ----------
    scDesign2, which fits the marginals: Sun et al. 2021, Genome Biology 22:163.
    """

    def draw(cells: np.ndarray, n: int) -> np.ndarray:
        num_train = len(cells)
        order = np.lexsort((rng.random(cells.shape), cells), axis=0)
        scores = ndtri((np.argsort(order, axis=0) + 0.5) / num_train)  # (train cells, G)
        # Mixtures of the rows with normal weights have covariance R, without forming the G x G matrix.
        length = np.maximum(np.linalg.norm(scores, axis=0), 1e-12)  # a label with a single cell has scores of 0
        quantiles = ndtr(rng.standard_normal((n, num_train)) @ (scores / length))  # (n, G)
        ranks = np.minimum((quantiles * num_train).astype(np.int64), num_train - 1)
        return np.take_along_axis(np.sort(cells, axis=0), ranks, axis=0)

    return _sample_by_label(train, obs, labels_key, layer, rng, draw)


def scvi_prior(
    train: ad.AnnData,
    obs: pd.DataFrame,
    labels_key: str | None,
    rng: np.random.Generator,
    layer: str | None = None,
    max_epochs: int | None = None,
) -> ad.AnnData:
    """Baseline of deep generative models: new cells from the prior of an scVI model conditioned on the label.

    `z ~ N(0, I)`, `l ~ library sizes of the label's training cells`, `x_g ~ ZINB(l f_g(z, label), theta_g, pi_g(z,
    label))`. scVI has its defaults (10 latent dimensions, one hidden layer of 128, 90 % of the cells to train on), with
    the label as a categorical covariate of the decoder. It then takes library sizes as observed and has no prior for
    them; drawing them from the label's training cells is what a perfect prior would do.

    Parameters
    ----------
    train
        Training cells, with counts; all their genes are modeled.
    obs, labels_key, rng, layer
        As [`resample_genes`].
    max_epochs
        Epochs of training. `None` takes scVI's: 400 up to 20,000 cells, and 8 million over the number of cells above.

    Returns
    -------
    As [`resample_genes`]. Reproducible on the same kind of machine, because all randomness comes from `rng`.

    Raises
    ------
    ImportError
        scvi-tools is not installed.
    ValueError
        The values are not counts, or `obs` has labels that `train` lacks.

    References
    ----------
    scVI: Lopez et al. 2018, Nature Methods 15:1053.
    """
    values = get_matrix(train, layer, expect_counts=True)
    known, wanted = _get_labels(train, obs, labels_key)
    try:
        import scvi
    except ImportError as error:
        raise ImportError("scvi_prior needs scvi-tools: pip install scvi-tools") from error

    labels = np.unique(known)
    library_size = np.asarray(values.sum(axis=1)).ravel()
    sampled = np.empty(len(obs))
    for label in np.unique(wanted):
        rows = wanted == label
        sampled[rows] = rng.choice(library_size[known == label], rows.sum())
    # scVI's own shuffling takes a global seed; without it, the first tenth of the cells is held out.
    order = rng.permutation(train.n_obs)
    shuffled = ad.AnnData(values[order].astype(np.float32), obs=pd.DataFrame(index=train.obs_names[order]))
    shuffled.obs["label"] = pd.Categorical(known[order], categories=labels)
    with torch.random.fork_rng(), _quiet("scvi", "lightning.pytorch"):
        torch.manual_seed(int(rng.integers(2**63)))
        scvi.model.SCVI.setup_anndata(shuffled, categorical_covariate_keys=["label"])
        model = scvi.model.SCVI(shuffled)
        model.train(max_epochs, shuffle_set_split=False, enable_progress_bar=False, logger=False)
        module, parts = model.module, []
        for rows in np.array_split(np.arange(len(obs)), -(-len(obs) // 1024)):
            codes = torch.as_tensor(np.searchsorted(labels, wanted[rows]))[:, None]  # (B, 1)
            with torch.inference_mode():
                outputs = module.generative(
                    z=torch.randn(len(rows), module.n_latent),
                    library=torch.as_tensor(sampled[rows], dtype=torch.float32).log()[:, None],  # (B, 1)
                    batch_index=torch.zeros_like(codes),
                    cat_covs=codes,
                )
            parts.append(sp.csr_matrix(outputs["px"].sample().cpu().numpy(), dtype=np.float32))  # (B, G)
    return _to_anndata(sp.vstack(parts, format="csr"), wanted, labels_key, train)


# -- helpers -----------------------------------------------------------------------------------------------------------


def _get_labels(train: ad.AnnData, obs: pd.DataFrame, labels_key: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Check and return labels of the training cells and of the rows of `obs`; all "" without `labels_key`."""
    if not len(obs):
        raise ValueError("obs has no rows; give one row per new cell.")
    if labels_key is None:
        return np.full(train.n_obs, ""), np.full(len(obs), "")
    check_label(train.obs, labels_key, "train.obs")
    check_label(obs, labels_key)
    known, wanted = (table[labels_key].map(str).to_numpy() for table in (train.obs, obs))
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise ValueError(f"obs[{labels_key!r}] asks for labels that train lacks: {unknown}.")
    return known, wanted


def _sample_by_label(
    train: ad.AnnData,
    obs: pd.DataFrame,
    labels_key: str | None,
    layer: str | None,
    rng: np.random.Generator,
    draw: Callable[[np.ndarray, int], np.ndarray],
) -> ad.AnnData:
    """Fill the rows of `obs` label by label with `draw(dense training cells of the label, number)`."""
    values = get_matrix(train, layer, expect_counts=False)
    known, wanted = _get_labels(train, obs, labels_key)
    parts, rows = [], []
    for label in np.unique(wanted):
        cells = np.flatnonzero(known == label)
        if len(cells) > BASELINE_MAX_CELLS:
            cells = rng.choice(cells, BASELINE_MAX_CELLS, replace=False)
        rows.append(np.flatnonzero(wanted == label))
        parts.append(sp.csr_matrix(draw(values[cells].toarray(), len(rows[-1])), dtype=np.float32))
    matrix = sp.vstack(parts, format="csr")[np.argsort(np.concatenate(rows))]
    return _to_anndata(matrix, wanted, labels_key, train)


def _to_anndata(matrix: sp.csr_matrix, labels: np.ndarray, labels_key: str | None, train: ad.AnnData) -> ad.AnnData:
    obs = pd.DataFrame(index=[f"synthetic_{i}" for i in range(len(labels))])
    if labels_key is not None:
        obs[labels_key] = pd.Categorical(labels)
    return ad.AnnData(matrix, obs=obs.assign(synthetic=True), var=pd.DataFrame(index=train.var_names.copy()))


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Silence warnings, and these loggers below errors."""
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
