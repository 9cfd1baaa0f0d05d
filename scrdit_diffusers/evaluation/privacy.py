"""What generated cells give away of the cells and donors that were trained on: membership attacks, and close copies."""

from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from diffusers import DDPMScheduler
from scipy.stats import mannwhitneyu, rankdata
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.preprocessing import normalize

from scrdit_diffusers.objective import diffusion_loss
from scrdit_diffusers.pipeline_scrdit import SCRDiTPipeline
from scrdit_diffusers.processing_scrdit import RARE_LABEL_CELLS

from .space import fit_pca, log_normalize

ATTACK_NAMES = {
    "distance": "nearest generated cell",
    "density": "density of generated cells (DOMIAS)",
    "likelihood": "loss of the model itself",
}
NEIGHBORS = {"distance": 1, "density": 10}
NUM_FOLDS = 5  # of the unseen cells, where donors do not make the folds
NUM_HALVINGS = 5  # which half of the other unseen cells is the reference matters more than the draw of the cells
NUM_COMPS = 20  # principal components that tell what loss to expect of a cell
TINY = 1e-9  # distance of a cell from its copy


# -- what an attacker computes of each candidate -----------------------------------------------------------------------


def mean_log_distance(distances: np.ndarray, n_neighbors: int) -> np.ndarray:
    """Mean log distance of candidates to their nearest cells.

    That to real cells less that to generated cells is the score of an attack: nearness to generated cells, calibrated
    by what is usual for such a cell. With many neighbors it is the ratio of densities of DOMIAS, up to a factor and a
    constant, as the density around a cell goes with a negative power of the distance.

    Parameters
    ----------
    distances
        Distances of n candidates to m cells, shape (n, m).
    n_neighbors
        Number of nearest cells; all where there are fewer.

    Returns
    -------
    Shape (n,).

    References
    ----------
    GAN-Leaks: Chen et al. 2020, arXiv 1909.03935, sections 4.2 and 4.5; DOMIAS: van Breugel et al. 2023,
    arXiv 2302.12580.
    """
    last = min(n_neighbors, distances.shape[1])
    return np.log(np.partition(distances, last - 1, axis=1)[:, :last] + TINY).mean(axis=1)


def likelihood_scores(
    losses: np.ndarray, features: np.ndarray, reference_losses: np.ndarray, reference_features: np.ndarray
) -> np.ndarray:
    """How much lower the model's loss of a cell is than expected: `f(features) - loss`, f linear, from the reference.

    Losses depend above all on what kind of cell it is and on its library size, which say nothing of membership.

    Parameters
    ----------
    losses, reference_losses
        Output of [`denoising_losses`], shapes (n,) and (r,).
    features, reference_features
        What f knows of the cells, shapes (n, F) and (r, F).

    Returns
    -------
    Scores, shape (n,).

    References
    ----------
    Watson et al. 2022, arXiv 2111.08440 (calibration by difficulty); losses of diffusion models: Carlini et al. 2023,
    arXiv 2301.13188.
    """
    scale = reference_features.std(axis=0) + TINY
    expected = Ridge().fit(reference_features / scale, reference_losses)
    return expected.predict(features / scale) - losses


@torch.no_grad()
def denoising_losses(
    pipe: SCRDiTPipeline,
    adata: ad.AnnData,
    layer: str | None = None,
    num_draws: int = 10,
    batch_size: int = 512,
    seed: int = 0,
) -> np.ndarray:
    """Training loss of each cell, averaged over timesteps: of counts -log p(counts | noisy cell) / G, else squared.

    Timesteps are the middles of `num_draws` equal parts of those that were trained. All cells get the same noise at a
    timestep, so the loss of a cell does not depend on the others.

    Parameters
    ----------
    pipe
        The pipeline.
    adata
        Cells, with the genes and labels of the pipeline.
    layer
        Layer that holds the values; `None` takes X.
    num_draws
        Number of timesteps.
    batch_size
        Cells at a time.
    seed
        Seed of the noise.

    Returns
    -------
    Losses, shape (cells,).
    """
    processor, model, device = pipe.processor, pipe.transformer, pipe.device
    obs, columns = adata.obs, {}
    if processor.models_counts:
        values, library_sizes = processor.get_counts(adata, layer)
        obs = processor.add_states(obs, values)
        columns["library_size"] = torch.from_numpy(np.asarray(library_sizes)).float()
    else:
        values = processor.get_values(adata, layer)
    columns["class_labels"] = torch.from_numpy(processor.encode_labels(obs))
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    first, last = pipe.config.min_timestep or 0, scheduler.config.num_train_timesteps
    timesteps = (first + (np.arange(num_draws) + 0.5) * (last - first) / num_draws).astype(int)
    noises = torch.randn((num_draws, processor.num_genes), generator=torch.Generator().manual_seed(seed)).to(device)
    model.eval()
    losses = []
    for start in range(0, adata.n_obs, batch_size):
        rows = slice(start, start + batch_size)
        batch = {name: column[rows].to(device) for name, column in columns.items()}
        batch["values"] = torch.from_numpy(processor.transform(values[rows])).float().to(device)  # (B, G)
        if model.count_head is not None:
            batch["counts"] = torch.from_numpy(values[rows].toarray()).float().to(device)  # (B, G)
        size = len(batch["values"])
        of_draws = [
            diffusion_loss(model, scheduler, batch, torch.full((size,), int(t), device=device), noise.expand(size, -1))
            for t, noise in zip(timesteps, noises, strict=True)
        ]
        losses.append(torch.stack(of_draws).mean(dim=0).cpu().numpy())
    return np.concatenate(losses).astype(np.float64)


# -- from scores to figures --------------------------------------------------------------------------------------------


def placements(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the others with a lower score, for each member, and share of the members with a higher one, vice versa.

    A tie counts half. The mean of either is the AUROC; `sqrt(var / n + var / k)` of both is its standard error.

    References
    ----------
    DeLong et al. 1988, Biometrics 44.
    """
    ranks = rankdata(np.concatenate([members, others]))
    n, k = len(members), len(others)
    return (ranks[:n] - rankdata(members)) / k, 1 - (ranks[n:] - rankdata(others)) / n


def donor_auroc(trained: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """AUROC that tells donors who were trained on from others by their scores, and its place by chance.

    Returns
    -------
    `auroc`; `std`, the standard deviation of the AUROC if donors are named at random; `place`, the share of all ways
    to name as many donors that reach at least this AUROC (exact, unless scores are tied).
    """
    n, k = len(trained), len(others)
    test = mannwhitneyu(trained, others, alternative="greater", method="auto" if n * k > 10_000 else "exact")
    spread = np.sqrt((n + k + 1) / (12 * n * k))
    return {"auroc": float(test.statistic / (n * k)), "std": float(spread), "place": float(test.pvalue)}


def attack(
    train: sp.csr_matrix,
    unseen: sp.csr_matrix,
    generated: Mapping[str, sp.csr_matrix],
    losses: tuple[np.ndarray, np.ndarray] | None = None,
    donors: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Attack training cells, and their donors, with every kind of score.

    The unseen cells are divided into folds: by donor, or at random. In turn the cells of a fold are the candidates that
    were not trained on, and the other unseen cells are halved, five times: the attacker's reference, and real cells
    that stand in place of the generated ones ("real"). So no candidate, and none of its donor, is ever in the
    reference, and "real" is expected at 0.5. Distances are those of all genes, cells scaled to length 1: principal
    components would leave out what is peculiar to a cell. Those of the reference only tell what loss to expect of it.

    Parameters
    ----------
    train, unseen
        Log-normalized values, shapes (n, G) and (k, G).
    generated
        Log-normalized values of generated cells, shape (m, G), by name. "value" are those of the model with `losses`.
    losses
        Losses of the model for `train` and `unseen`, shapes (n,) and (k,); `None` leaves the attack out.
    donors
        Donor of each cell of `train` and `unseen`, no donor in both; `None` attacks cells only.
    seed
        Seed of folds and halves.

    Returns
    -------
    One row for each `attack` of [`ATTACK_NAMES`], `unit` ("cells", "donors") and `source` (a name, or "real") with
    `auroc`, its spread `std` (cells: standard error; donors: [`donor_auroc`]) and, for donors, `place` and `scores`,
    the mean score of each donor.

    Raises
    ------
    ValueError
        A donor is on both sides, or there are fewer than two unseen donors.
    """
    rng, num_train = np.random.default_rng(seed), train.shape[0]
    folds = rng.permutation(unseen.shape[0]) % NUM_FOLDS
    if donors is not None:
        if both := sorted(set(donors[0]) & set(donors[1])):
            raise ValueError(f"donors {both[:5]} have cells in both train and unseen; split the cells by donor.")
        names, codes = np.unique(donors[1], return_inverse=True)
        if len(names) < 2:
            raise ValueError(f"donors: unseen cells are of {len(names)} donor; at least 2 are needed.")
        folds = codes % (2 * NUM_FOLDS)
    found = _score(train, unseen, generated, losses, folds, rng)
    rows = []
    for (kind, source), of_halvings in found.items():
        row: dict[str, Any] = {"attack": kind, "source": source}
        rows.append(row | {"unit": "cells"} | _cells_auroc(of_halvings, num_train, folds))
        if donors is not None:
            of_folds = of_halvings.mean(axis=0)  # (folds, candidates)
            members, others = of_folds[:, :num_train].mean(axis=0), of_folds[folds, np.arange(len(folds)) + num_train]
            means = [pd.Series(x).groupby(names).mean() for x, names in zip((members, others), donors, strict=True)]
            trained, unknown = ({str(name): float(x) for name, x in mean.items()} for mean in means)
            figures = donor_auroc(list(trained.values()), list(unknown.values()))
            rows.append(row | {"unit": "donors", "scores": trained | unknown} | figures)
    return pd.DataFrame(rows).sort_values("unit", kind="stable", ignore_index=True)


def closest_copies(
    train: sp.csr_matrix,
    unseen: sp.csr_matrix,
    generated: sp.csr_matrix,
    labels: tuple[np.ndarray, np.ndarray],
    label_cells: Mapping[str, int],
    seed: int = 0,
) -> pd.DataFrame:
    """Rare training cells, those with the closest copies first.

    `ratio = d(cell, nearest generated) / d(cell, nearest unseen)`, among equally many of both, with d as in
    [`attack`]. Rare are cells of a label with fewer than 30 training cells, and the tenth of all that is farthest from
    unseen cells. Unseen cells that are rare by the same rule tell how low a ratio is by chance.

    Parameters
    ----------
    train, unseen, generated
        Log-normalized values, shapes (n, G), (k, G) and (m, G).
    labels
        Label of each cell of `train` and `unseen`.
    label_cells
        Number of training cells of each label.
    seed
        Seed of the draw of equally many cells.

    Returns
    -------
    One row per rare training cell: `cell` (row of train), `label`, `label_cells` (its training cells), `ratio`, and
    `place`, the share of rare unseen cells with a ratio at least as low.
    """
    rng = np.random.default_rng(seed)
    n = min(unseen.shape[0], generated.shape[0])
    drawn = np.sort(rng.permutation(unseen.shape[0])[:n])
    generated_points = _points(generated[rng.permutation(generated.shape[0])[:n]])
    parts = [_points(train), _points(unseen)]
    tables = [euclidean_distances(points, parts[1][drawn]) for points in parts]
    tables[1][drawn, np.arange(n)] = np.inf  # a cell is not its own neighbor
    ratios, rare = [], []
    for points, table, names in zip(parts, tables, labels, strict=True):
        distances = table.min(axis=1)
        ratios.append(euclidean_distances(points, generated_points).min(axis=1) / (distances + TINY))
        rare_label = np.array([label_cells[name] < RARE_LABEL_CELLS for name in names])
        rare.append(rare_label | (distances >= np.quantile(distances, 0.9)))
    by_chance = np.sort(ratios[1][rare[1]])
    cells = np.flatnonzero(rare[0])
    copies = pd.DataFrame({"cell": cells, "label": labels[0][cells], "ratio": ratios[0][cells]})
    copies["label_cells"] = [label_cells[name] for name in copies["label"]]
    copies["place"] = np.searchsorted(by_chance, copies["ratio"], side="right") / len(by_chance)
    return copies.sort_values("ratio", ignore_index=True)


def audit(
    train: ad.AnnData,
    unseen: ad.AnnData,
    generated: Mapping[str, ad.AnnData],
    value_space: str = "counts",
    labels_key: str | None = None,
    label_cells: Mapping[str, int] | None = None,
    losses: tuple[np.ndarray, np.ndarray] | None = None,
    donors: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run all attacks, and find the closest copies of rare cells.

    Parameters
    ----------
    train, unseen
        Cells that were trained on, and real cells that were not, with the same genes and labels; values in X.
    generated
        Generated cells by name; "value" are those of the model.
    value_space
        "counts", or "log_normalized".
    labels_key
        Column of obs with labels; `None` for none.
    label_cells
        Number of training cells of each label; `None` counts those of `train`.
    losses, donors, seed
        As [`attack`].

    Returns
    -------
    For metrics.json: `cells` (numbers); `donors` (numbers, or `None`); `rows`, for each attack and unit the AUROC,
    `<name>_std` and for donors `<name>_place` of "value", "real" and each other set, and `scores` of the donors by
    "value"; `rare_cells`: their number, `copied`, the share with a place of at most 0.05 in [`closest_copies`], and
    `closest`, its first ten rows, with names of cells.
    """
    of_train, of_unseen = (log_normalize(part.X, value_space) for part in (train, unseen))
    sets = {name: log_normalize(part.X, value_space) for name, part in generated.items()}
    rows = []
    for (unit, kind), found in attack(of_train, of_unseen, sets, losses, donors, seed).groupby(
        ["unit", "attack"], sort=False
    ):
        row: dict[str, Any] = {"attack": kind, "unit": unit}
        for figures in found.to_dict("records"):
            name = figures["source"]
            row |= {name: figures["auroc"], f"{name}_std": figures["std"]}
            if unit == "donors":
                row |= {f"{name}_place": figures["place"]} | ({"scores": figures["scores"]} if name == "value" else {})
        rows.append(row)
    labels = [
        part.obs[labels_key].astype(str).to_numpy() if labels_key else np.full(part.n_obs, "")
        for part in (train, unseen)
    ]
    numbers = label_cells or {str(name): int(n) for name, n in pd.Series(labels[0]).value_counts().items()}
    copies = closest_copies(of_train, of_unseen, sets["value"], (labels[0], labels[1]), numbers, seed)
    closest = copies.head(10).assign(cell=train.obs_names[copies["cell"].head(10)])
    return {
        "cells": {name: part.n_obs for name, part in ({"train": train, "unseen": unseen} | dict(generated)).items()},
        "donors": donors and {"train": len(set(donors[0])), "unseen": len(set(donors[1]))},
        "rows": rows,
        "rare_cells": {
            "cells": len(copies),
            "copied": float((copies["place"] <= 0.05).mean()),
            "closest": closest.to_dict("records"),
        },
    }


def in_words(found: Mapping[str, Any]) -> list[str]:
    """Say in plain words what the output of [`audit`] means, a sentence or two per topic."""
    cells = {row["attack"]: row for row in found["rows"] if row["unit"] == "cells"}
    best = max((cells["distance"], cells["density"]), key=lambda row: row["value"])
    beside = [f"generated by a Gaussian copula {best['gaussian_copula']:.2f}"] if "gaussian_copula" in best else []
    beside.append(f"other real cells in their place {best['real']:.2f}")
    sentences = [
        f"Training cells can be told from unseen cells by the generated cells alone with AUROC {best['value']:.2f} ± "
        f"{best['value_std']:.2f} ({ATTACK_NAMES[best['attack']]}; 0.50: not at all; {'; '.join(beside)})."
    ]
    if "likelihood" in cells:
        row = cells["likelihood"]
        sentences.append(
            f"With the model at hand its loss tells them with {row['value']:.2f} ± {row['value_std']:.2f}."
        )
    if found["donors"]:
        train, unseen = found["donors"]["train"], found["donors"]["unseen"]
        best = max((row for row in found["rows"] if row["unit"] == "donors"), key=lambda row: row["value"])
        sentences.append(
            f"The {train} donors that were trained on can be told from {unseen} others with AUROC {best['value']:.2f} "
            f"({ATTACK_NAMES[best['attack']]}, the best attack). Of all ways to name {train} of the {train + unseen} "
            f"donors, {best['value_place']:.1%} do as well; by chance it would be 0.50 ± {best['value_std']:.2f}."
        )
    rare = found["rare_cells"]
    sentences.append(
        f"{rare['copied']:.0%} of {rare['cells']} rare training cells are nearer to a generated cell than 95% of rare "
        "unseen cells are (5% is expected)."
    )
    return sentences


# -- helpers -----------------------------------------------------------------------------------------------------------


def _points(log_values: sp.csr_matrix) -> np.ndarray:
    """Cells as points: log-normalized values scaled to length 1, so that a distance is one of directions."""
    return normalize(log_values).toarray()


def _score(
    train: sp.csr_matrix,
    unseen: sp.csr_matrix,
    generated: Mapping[str, sp.csr_matrix],
    losses: tuple[np.ndarray, np.ndarray] | None,
    folds: np.ndarray,
    rng: np.random.Generator,
) -> dict[tuple[str, str], np.ndarray]:
    """Scores of the cells of `train` and `unseen` by attack and set, shape (halvings, folds, cells): see [`attack`]."""
    num_train, num_reference = train.shape[0], min((folds != fold).sum() for fold in np.unique(folds)) // 2
    points = _points(sp.vstack([train, unseen]))  # all candidates
    to_unseen = euclidean_distances(points, points[num_train:])
    of_generated: dict[tuple[str, str], np.ndarray] = {}
    for name, cells in generated.items():
        table = euclidean_distances(points, _points(cells))
        of_generated |= {(kind, name): mean_log_distance(table, number) for kind, number in NEIGHBORS.items()}
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for _ in range(NUM_HALVINGS):
        scores: dict[tuple[str, str], list[np.ndarray]] = {}
        for fold in np.unique(folds):
            held = rng.permutation(np.flatnonzero(folds != fold))
            reference, real = held[:num_reference], held[num_reference : 2 * num_reference]
            for kind, n_neighbors in NEIGHBORS.items():
                of_reference = mean_log_distance(to_unseen[:, reference], n_neighbors)
                of_sets = {name: of_generated[kind, name] for name in generated}
                of_sets |= {"real": mean_log_distance(to_unseen[:, real], n_neighbors)}
                for name, of_set in of_sets.items():
                    scores.setdefault((kind, name), []).append(of_reference - of_set)
            if losses is not None:
                pca = fit_pca(unseen[reference], NUM_COMPS, 0)
                pcs = pca.transform(sp.vstack([train, unseen]))
                of_cells, known = np.concatenate(losses), num_train + reference
                of_model = likelihood_scores(of_cells, pcs, of_cells[known], pcs[known])
                scores.setdefault(("likelihood", "value"), []).append(of_model)
        for key, of_folds in scores.items():
            found.setdefault(key, []).append(np.array(of_folds))
    return {key: np.array(of_halvings) for key, of_halvings in found.items()}


def _cells_auroc(scores: np.ndarray, num_train: int, folds: np.ndarray) -> dict[str, float]:
    """AUROC of cells and its standard error: that of drawing the cells, and that of halving.

    Parameters
    ----------
    scores
        Shape (halvings, folds, candidates), training cells first; others count in the fold of their own only.
    num_train
        Number of training cells.
    folds
        Fold of each other candidate.
    """
    of_members = np.empty((len(scores), scores.shape[1], num_train))
    of_others = np.empty((len(scores), len(folds)))
    for halving, of_folds in enumerate(scores):
        for fold, score in enumerate(of_folds):
            own = folds == fold
            of_members[halving, fold], of_others[halving, own] = placements(score[:num_train], score[num_train:][own])
    drawn = [of_members.mean(axis=(0, 1)), of_others.mean(axis=0)]
    variance = sum(x.var(ddof=1) / len(x) for x in drawn)
    if len(scores) > 1:
        variance += of_others.mean(axis=1).var(ddof=1) / len(scores)
    return {"auroc": float(of_others.mean()), "std": float(np.sqrt(variance))}
