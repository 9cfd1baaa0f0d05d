"""Completion, translation and paths of real cells beside their baselines; `jobs.py` measures them.

Each function takes a pipeline, the parts of a split by `training/evaluate.py`, the column of labels and a seed. Cells
may have been taken out of the parts: these are then in the part `held_out`.

- Complete: cells of the test part keep 300 genes, the most variable ones of the training cells or random ones. Mean
  over the missing genes of the correlation, over cells, between expected and true counts after log1p; share of true
  counts within the 90% interval, of all and of those with a mean of at least 1; AUROC of a classifier on all genes that
  tells completed cells from other real ones, beside that of cells generated with the same labels. The penalty of ridge
  regression and the number of neighbors are chosen on the control part.
- Translate: cells of the control and test parts with other labels of the condition are translated to the target and
  compared with the real ones there: energy distance on 50 PCs within each of `--labels_key`, AUROC of classifiers on
  PCs and genes, iLISI on PCs (median, 0 to 1), share kept of each cell's 5 nearest neighbors among those of the same
  labels, and of the labels by a classifier, log fold changes of genes with a mean of at least 1. If the cells that
  were taken out are those of the target, the real ones are these, of a combination of labels that the model never saw,
  and training cells are translated as well, for the log fold changes alone. scVI, trained on the train part, is
  measured where scvi-tools is installed, as expected counts and as draws; iLISI and Harmony where harmonypy is. Harmony
  corrects PCs, of the train part, the cells and the real ones together; its classifier of labels is trained on them.
- Path: cells half-way between those of two labels, paired at random, beside the cells that were taken out, which lie
  between them: 2-Wasserstein and energy distance on 50 PCs.
"""

from collections.abc import Callable
from importlib.util import find_spec

import anndata as ad
import numpy as np
import pandas as pd
import torch
from answers import labels_of, log_normalize, new_pca
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scrdit_diffusers import (
    SCRDiTCompletePipeline,
    SCRDiTInterpolatePipeline,
    SCRDiTPipeline,
    SCRDiTTranslatePipeline,
)
from scrdit_diffusers.evaluation.baselines import gaussian_copula
from scrdit_diffusers.evaluation.metrics import classifier_auroc, wasserstein2

PARTS = ("train", "control", "test")
PANEL = 300  # genes
COMPLETED = 200  # cells, and pairs of cells of a path
TRANSLATED = 500  # cells
TREES = 300  # of a random forest
Parts = dict[str, ad.AnnData]
Results = dict[str, dict[str, float]]


def dense(cells: ad.AnnData) -> np.ndarray:
    """Read counts as an array, shape (cells, G)."""
    return cells.X.toarray().astype(np.float64)


def seeded(seed: int) -> torch.Generator:
    """Make a generator."""
    return torch.Generator().manual_seed(seed)


def choose(cells: ad.AnnData, num_cells: int, seed: int) -> ad.AnnData:
    """Choose cells at random."""
    rows = np.random.default_rng(seed).permutation(cells.n_obs)[:num_cells]
    return cells[np.sort(rows)].copy()


def linear_auroc(x: np.ndarray, y: np.ndarray) -> float:
    """AUROC of a logistic regression on standardized log-normalized genes."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return classifier_auroc(log_normalize(x), log_normalize(y), model)


def forest_auroc(x: np.ndarray, y: np.ndarray) -> float:
    """AUROC of a random forest."""
    return classifier_auroc(x, y, RandomForestClassifier(TREES, random_state=0))


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased energy distance of two sets of points: 0 on average for points of one distribution."""
    within = sum(cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y))
    return float(2 * cdist(x, y).mean() - within)


# -- complete ----------------------------------------------------------------------------------------------------------


def choose_panel(train: ad.AnnData, kind: str, seed: int) -> np.ndarray:
    """Choose the genes that are measured: the most variable ones, or random ones."""
    if kind == "random":
        return np.sort(np.random.default_rng(seed).permutation(train.n_vars)[:PANEL])
    return np.sort(np.argsort(-log_normalize(train.X).var(axis=0))[:PANEL])


def gene_correlation(expected: np.ndarray, true: np.ndarray) -> float:
    """Mean over genes of the correlation after log1p; 0 for a gene of which all cells are expected alike."""
    x, y = (np.log1p(values) - np.log1p(values).mean(axis=0) for values in (expected, true))
    scale = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    varies = (y**2).sum(axis=0) > 0
    return float(np.divide((x * y).sum(axis=0), scale, out=np.zeros(len(scale)), where=scale > 1e-9)[varies].mean())


def complete_by_baselines(
    train: np.ndarray, control: np.ndarray, test: np.ndarray, panel: np.ndarray, missing: np.ndarray
) -> dict[str, np.ndarray]:
    """Predict the counts of the missing genes by ridge regression and by neighbors."""

    def features(counts: np.ndarray) -> np.ndarray:
        known = counts[:, panel]
        return np.column_stack([np.log1p(known), np.log1p(known.sum(axis=1))])

    scaler = StandardScaler().fit(features(train))
    inputs = {name: scaler.transform(features(x)) for name, x in (("control", control), ("test", test))}
    best: dict[str, tuple[float, np.ndarray]] = {}

    def offer(method: str, predict: Callable[[str, np.ndarray], np.ndarray]) -> None:
        quality = gene_correlation(predict("control", control), control[:, missing])
        if method not in best or quality > best[method][0]:
            best[method] = quality, predict("test", test)

    for alpha in (1e3, 3e3, 1e4, 3e4, 1e5):
        ridge = Ridge(alpha=alpha).fit(scaler.transform(features(train)), np.log1p(train[:, missing]))
        offer("ridge regression", lambda name, _, ridge=ridge: np.expm1(np.maximum(ridge.predict(inputs[name]), 0)))
    for k in (15, 30, 60, 120):
        logs = log_normalize(train[:, panel])
        neighbors = NearestNeighbors(n_neighbors=min(k, len(train))).fit(logs)

        def predict(_: str, cells: np.ndarray, neighbors: NearestNeighbors = neighbors) -> np.ndarray:
            rows = neighbors.kneighbors(log_normalize(cells[:, panel]), return_distance=False)
            profiles = np.stack([train[row].sum(axis=0) / train[row].sum() for row in rows])
            sizes = cells[:, panel].sum(axis=1) / np.maximum(profiles[:, panel].sum(axis=1), 1e-9)
            return profiles[:, missing] * sizes[:, None]

        offer("nearest neighbors", predict)
    return {method: expected for method, (_, expected) in best.items()}


def measure_completion(pipe: SCRDiTPipeline, parts: Parts, key: str, seed: int, kind: str) -> Results:
    """Correlation, coverage and AUROC of each method."""
    train, test = parts["train"], choose(parts["test"], COMPLETED, seed)
    panel = choose_panel(train, kind, seed)
    missing = np.setdiff1d(np.arange(train.n_vars), panel)
    counts, true = dense(train), dense(test)
    expected = complete_by_baselines(counts, dense(parts["control"]), true, panel, missing)
    labels = labels_of(train, key)
    means = {label: counts[labels == label].sum(axis=0) / counts[labels == label].sum() for label in set(labels)}
    profiles = np.stack([means[label] for label in labels_of(test, key)])
    sizes = true[:, panel].sum(axis=1) / profiles[:, panel].sum(axis=1)
    expected["mean of the label"] = profiles[:, missing] * sizes[:, None]
    results: Results = {name: {"correlation": gene_correlation(x, true[:, missing])} for name, x in expected.items()}
    half = np.random.default_rng(seed).permutation(len(true)) % 2 == 0

    def auroc(cells: np.ndarray) -> float:
        return linear_auroc(cells[half], true[~half])  # a cell and its completion would help no classifier

    complete = SCRDiTCompletePipeline.from_pipe(pipe)
    complete.set_progress_bar_config(disable=True)
    for use_labels in (True, False):
        cells = complete(test[:, panel].copy(), use_labels=use_labels, generator=seeded(seed))
        mean, lower, upper = (cells.layers[name][:, missing] for name in ("mean", "lower", "upper"))
        inside = (lower <= true[:, missing]) & (true[:, missing] <= upper)
        results["ours" if use_labels else "ours, without labels"] = {
            "correlation": gene_correlation(mean, true[:, missing]),
            "coverage": float(inside.mean()),
            "coverage, means of at least 1": float(inside[mean >= 1].mean()),
            "AUROC against real cells": auroc(dense(cells)),
            "error of log library size": float(np.std(np.log(cells.obs["library_size"] / true.sum(axis=1)))),
        }
    generated = pipe(obs=test.obs, generator=seeded(seed)).adata
    results["cells generated with the same labels"] = {"AUROC against real cells": auroc(dense(generated))}
    return results


# -- translate ---------------------------------------------------------------------------------------------------------


def shift_means(cells: ad.AnnData, train: ad.AnnData, key: str, condition: str, target: str, sizes: np.ndarray):
    """Add the difference of mean log-normalized values to the target, the mean over labels that both have."""
    logs, types, values = log_normalize(train.X), labels_of(train, key), labels_of(train, condition)
    shifts = {}
    for value in set(labels_of(cells, condition)):
        pairs = [((types == t) & (values == target), (types == t) & (values == value)) for t in set(types)]
        found = [logs[a].mean(axis=0) - logs[b].mean(axis=0) for a, b in pairs if a.sum() > 1 and b.sum() > 1]
        shifts[value] = np.mean(found, axis=0)
    moved = log_normalize(cells.X) + np.stack([shifts[value] for value in labels_of(cells, condition)])
    profiles = np.expm1(np.maximum(moved, 0))
    return profiles / profiles.sum(axis=1, keepdims=True) * sizes[:, None]


def translate_by_scvi(
    train: ad.AnnData, cells: ad.AnnData, condition: str, target: str, sizes: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Decode under the target the latent variables that scVI, trained on the training cells, finds: means and draws."""
    import scvi

    scvi.settings.seed = seed
    known, asked = (
        ad.AnnData(part.X.astype(np.float32), obs=pd.DataFrame({"batch": labels_of(part, condition)}, part.obs_names))
        for part in (train, cells)
    )
    scvi.model.SCVI.setup_anndata(known, batch_key="batch")
    model = scvi.model.SCVI(known)
    model.train(accelerator="cpu", enable_progress_bar=False, logger=None)
    means = model.get_normalized_expression(asked, transform_batch=target, n_samples=10, return_numpy=True)
    code = sorted(set(known.obs["batch"])).index(target)
    with torch.inference_mode():
        outputs = model.module.generative(
            z=torch.from_numpy(model.get_latent_representation(asked, give_mean=False)),
            library=torch.from_numpy(sizes).float().log()[:, None],
            batch_index=torch.full((len(sizes), 1), code),
        )
        draws = outputs["px"].sample().double().numpy()
    return {"scVI, means": means * sizes[:, None], "scVI, draws": draws}


def correct_by_harmony(pcs: list[np.ndarray], batches: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Correct the PCs of several sets of cells together."""
    from harmonypy import run_harmony

    batch = {"batch": np.concatenate(batches)}
    model = run_harmony(np.concatenate(pcs), pd.DataFrame(batch), "batch", verbose=False, random_state=seed, ncores=1)
    return np.split(model.Z_corr, np.cumsum([len(z) for z in pcs])[:-1])


def share_neighbors_kept(before: np.ndarray, after: np.ndarray, groups: np.ndarray) -> float:
    """Share of each cell's 5 nearest neighbors within its group that stay so."""
    shares = []
    for group in set(groups):
        rows = np.flatnonzero(groups == group)
        if len(rows) < 12:
            continue
        one, other = (NearestNeighbors(n_neighbors=5).fit(x[rows]).kneighbors()[1] for x in (before, after))
        shares += [len(set(a) & set(b)) / 5 for a, b in zip(one, other, strict=True)]
    return float(np.mean(shares)) if shares else float("nan")


def scaled_ilisi(x: np.ndarray, y: np.ndarray) -> float:
    """Median inverse Simpson index of two sets in the neighborhoods of all points: 0 apart, 1 mixed."""
    from harmonypy import compute_lisi

    both = np.concatenate([x, y])
    of_set = pd.DataFrame({"set": np.repeat(["x", "y"], [len(x), len(y)])})
    return float(np.median(compute_lisi(both, of_set, ["set"], min(30, len(both) // 6))) - 1)


def compare_changes(
    new: np.ndarray, before: np.ndarray, labels: np.ndarray, goal: np.ndarray, goal_labels: np.ndarray
) -> dict[str, float]:
    """Compare log2 fold changes with those to real cells, of which each label counts as much as among `labels`."""
    weights = np.array([(labels == label).sum() / (goal_labels == label).sum() for label in goal_labels])
    genes = np.maximum(goal.mean(axis=0), before.mean(axis=0)) > 1
    logs = [
        np.log2(np.average(x / x.sum(axis=1, keepdims=True) * 1e4, axis=0, weights=w)[genes] + 0.05)
        for x, w in ((before, None), (new, None), (goal, weights))
    ]
    change, true = logs[1] - logs[0], logs[2] - logs[0]
    return {
        "correlation of log fold changes": float(np.corrcoef(change, true)[0, 1]),
        "slope of log fold changes": float((change * true).sum() / (true**2).sum()),
    }


def pair_by_label(one: np.ndarray, other: np.ndarray, seed: int) -> list[np.ndarray]:
    """Choose rows of two sets at random, as many of each label in both."""
    rng = np.random.default_rng(seed)
    rows: tuple[list, list] = ([], [])
    for label in sorted(set(one) & set(other)):
        found = [rng.permutation(np.flatnonzero(labels == label)) for labels in (one, other)]
        for chosen, part in zip(rows, found, strict=True):
            chosen.extend(part[: min(map(len, found))])
    return [np.array(chosen) for chosen in rows]


def compare_pcs(z: np.ndarray, labels: np.ndarray, goal: np.ndarray, goal_labels: np.ndarray, seed: int):
    """How well cells mix with the real ones on PCs."""
    rows = pair_by_label(labels, goal_labels, seed)
    pair = z[rows[0]], goal[rows[1]]
    return {"AUROC, 50 PCs": forest_auroc(*pair)} | ({"iLISI": scaled_ilisi(*pair)} if find_spec("harmonypy") else {})


def compare_genes(
    cells: np.ndarray, labels: np.ndarray, goal: np.ndarray, goal_labels: np.ndarray, pca: PCA, seed: int
) -> dict[str, float]:
    """How near cells are to the real ones; the distance is that within labels."""
    z, goal_z = (pca.transform(log_normalize(x)) for x in (cells, goal))
    types, numbers = np.unique(labels, return_counts=True)
    types, numbers = types[numbers > 1], numbers[numbers > 1]
    distances = [energy_distance(z[labels == t], goal_z[goal_labels == t]) for t in types]
    rows = pair_by_label(labels, goal_labels, seed)
    return {
        "energy distance": float(np.average(distances, weights=numbers)),
        **compare_pcs(z, labels, goal_z, goal_labels, seed),
        "AUROC, genes": linear_auroc(cells[rows[0]], goal[rows[1]]),
    }


def translate_by_all(
    pipe: SCRDiTPipeline, train: ad.AnnData, source: ad.AnnData, key: str, condition: str, target: str, seed: int
) -> dict[str, np.ndarray]:
    """Translate cells by each method: counts, or values that stand for them."""
    translate = SCRDiTTranslatePipeline.from_pipe(pipe)
    translate.set_progress_bar_config(disable=True)
    codes = [pipe.processor.encode_labels(obs) for obs in (source.obs, source.obs.assign(**{condition: target}))]
    before = dense(source)
    sizes = translate.translate_library_size(before.sum(axis=1), *codes)
    cells = {"not translated": before, "mean shift": shift_means(source, train, key, condition, target, sizes)}
    if find_spec("scvi"):
        cells |= translate_by_scvi(train, source, condition, target, sizes, seed)
    for name, timesteps in {"ours, labels alone": (999,), "ours": (999, 600)}.items():
        cells[name] = dense(translate(source, {condition: target}, timesteps=timesteps, generator=seeded(seed)))
    return cells


def measure_translation(
    pipe: SCRDiTPipeline, parts: Parts, key: str, seed: int, condition: str, target: str
) -> Results:
    """Nearness to the real cells of the target, and what is kept of the cells."""
    train = parts["train"]
    unseen = "held_out" in parts and set(labels_of(parts["held_out"], condition)) == {target}
    others = ad.concat([parts[part] for part in (PARTS if unseen else PARTS[1:])])
    real = parts["held_out"] if unseen else others[labels_of(others, condition) == target]
    real = choose(real, TRANSLATED, seed)
    types, numbers = np.unique(labels_of(real, key), return_counts=True)
    enough = types[numbers > 3]  # for two halves with distances within
    real = real[np.isin(labels_of(real, key), enough)]
    source = others[(labels_of(others, condition) != target) & np.isin(labels_of(others, key), enough)]
    source = choose(source, TRANSLATED, seed)
    labels, goal_labels, goal = labels_of(source, key), labels_of(real, key), dense(real)
    new = ~source.obs_names.isin(train.obs_names)  # PCs of cells that they were fitted on lie apart
    pca = new_pca(log_normalize(train.X)).fit(log_normalize(train.X))
    pcs = [pca.transform(log_normalize(x.X)) for x in (train, source[new], real)]
    groups = np.char.add(labels.astype(str), labels_of(source, condition).astype(str))[new]
    cells = translate_by_all(pipe, train, source, key, condition, target, seed)
    if unseen:
        obs = source.obs.assign(**{condition: target})
        cells["generated with the target labels"] = dense(pipe(obs=obs, generator=seeded(seed)).adata)
        cells["Gaussian copula of the label"] = dense(gaussian_copula(train, obs, key, np.random.default_rng(seed)))

    def conserved(z: np.ndarray, known: np.ndarray) -> dict[str, float]:
        classifier = LogisticRegression(max_iter=2000).fit(known, labels_of(train, key))
        kept = float((classifier.predict(z) == labels[new]).mean())
        return {"labels kept": kept, "neighbors kept": share_neighbors_kept(pcs[1], z, groups)}

    results: Results = {}
    for i, (name, values) in enumerate(cells.items()):
        results[name] = compare_genes(values[new], labels[new], goal, goal_labels, pca, seed)
        results[name] |= conserved(pca.transform(log_normalize(values[new])), pcs[0])
        if i > 0:
            results[name] |= compare_changes(values, dense(source), labels, goal, goal_labels)
    if find_spec("harmonypy"):
        batches = [labels_of(x, condition) for x in (train, source[new], real)]
        known, z, goal_z = correct_by_harmony(pcs, batches, seed)
        results["Harmony"] = compare_pcs(z, labels[new], goal_z, goal_labels, seed) | conserved(z, known)
    halves = train_test_split(goal, goal_labels, test_size=0.5, stratify=goal_labels, random_state=seed)
    results["half of the real cells beside the others"] = compare_genes(*halves[::2], *halves[1::2], pca, seed)
    return results


# -- path --------------------------------------------------------------------------------------------------------------


def measure_path(pipe: SCRDiTPipeline, parts: Parts, key: str, seed: int, start: str, end: str) -> Results:
    """Distance of the middle of the path from real cells that were left out of training."""
    everything = ad.concat([parts[part] for part in PARTS])
    rng = np.random.default_rng(seed)
    middle = parts["held_out"]
    num_cells = min(COMPLETED, middle.n_obs // 2)
    order = rng.permutation(middle.n_obs)
    real, others = (dense(middle[order[rows]]) for rows in (slice(num_cells), slice(num_cells, 2 * num_cells)))
    ends = []
    for label in (start, end):
        rows = np.flatnonzero(labels_of(everything, key) == label)
        chosen = everything[np.resize(rng.permutation(rows), num_cells)]
        chosen = ad.AnnData(
            chosen.X, obs=chosen.obs.set_axis([f"{label} {i}" for i in range(num_cells)]), var=chosen.var
        )
        ends.append(chosen)
    interpolate = SCRDiTInterpolatePipeline.from_pipe(pipe)
    interpolate.set_progress_bar_config(disable=True)
    first, last = map(dense, ends)
    logs = log_normalize(first), log_normalize(last)
    cells = {
        "other real cells": others,
        "start": first,
        "end": last,
        "straight mix of log-normalized values": np.expm1((logs[0] + logs[1]) / 2),
        "straight mix of counts": (first + last) / 2,
        "one of the ends for each gene": np.where(rng.random(first.shape) < 0.5, first, last),
        "ours": dense(interpolate(*ends, positions=(0.5,), generator=seeded(seed))),
    }
    pca = new_pca(log_normalize(parts["train"].X)).fit(log_normalize(parts["train"].X))
    goal = pca.transform(log_normalize(real))
    results = {}
    for name, new in cells.items():
        z = pca.transform(log_normalize(new))
        results[name] = {
            "W2": wasserstein2(z, goal),
            "W2, 10 PCs": wasserstein2(z[:, :10], goal[:, :10]),
            "energy distance": energy_distance(z, goal),
        }
    return results
