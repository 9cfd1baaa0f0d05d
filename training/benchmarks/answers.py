"""Denoising, annotation, simulation and augmentation beside their baselines; `jobs.py` measures them.

Each function takes a pipeline, the parts of a split by `training/evaluate.py`, the column of labels and a seed.
Everything is measured on the test part; temperatures are fitted on the control part.

- Denoise: molecular cross-validation (Batson et al. 2019). Counts are split binomially 90 to 10, the larger part is
  denoised; the Poisson loss of the smaller part, and, as Open Problems does, the squared error after log1p of counts
  per 10,000, are means over cells and genes.
- Annotate: accuracy, macro F1 and expected calibration error (15 bins), beside logistic regressions on 50 PCs and on
  standardized genes of the log-normalized values, the latter clipped at 10 as in CellTypist. All have their temperature
  fitted on the control part.
- Unseen: a label is left out of training; AUROC with which scores tell its test cells from the others.
- Simulate: cells of the most frequent label in two groups, without effects and with those of 200 expressed genes (log2
  fold changes of standard deviation 1): share of unchanged genes with p < 0.05 by the Wilcoxon rank-sum test (without
  effects the mean over 20 random divisions of the cells), and slope of estimated on true effects, weighted by their
  precision. Power to find effects of 20, 50 and 100 cells per group, beside that of real cells that were not trained
  on; there all effects are negative, so that real cells can be thinned to them.
- Realism: the control group of such an experiment, with the labels of the test cells, against the test cells; beside
  cells that the pipeline generates, and real cells (the control part). AUROC of the classifiers of
  `training/evaluate.py`, and 1-nearest-neighbor accuracy. Genes whose baseline the simulation lowers are left out.
- Augment: F1 of the labels with fewer than 5% of the training cells, and of the others, by classifiers trained on real
  cells, with class weights, with duplicates, with SMOTE, and with new cells of the rare labels.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import mannwhitneyu
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from scrdit_diffusers import (
    SCRDiTAnnotatePipeline,
    SCRDiTDenoisePipeline,
    SCRDiTPipeline,
    SCRDiTSimulatePipeline,
    augment,
    draw_effects,
)
from scrdit_diffusers.evaluation.compare import METRIC_NAMES, compare
from scrdit_diffusers.evaluation.power import power_curve
from scrdit_diffusers.values import normalize_log1p

KEPT = 0.9  # share of the counts that are denoised
RARE = 0.05  # share of the training cells
SIMULATED = 2000  # cells of each group


def log_normalize(counts: np.ndarray | sp.csr_matrix) -> np.ndarray:
    """Log1p of counts per 10,000, shape (cells, G)."""
    return normalize_log1p(sp.csr_matrix(counts, dtype=np.float32), 1e4).toarray()


def new_pca(values: np.ndarray) -> PCA:
    """PCA of log-normalized values with 50 components, or as many as there can be."""
    return PCA(min(50, *values.shape), random_state=0)


def labels_of(cells: ad.AnnData, key: str) -> np.ndarray:
    """Labels as texts, shape (cells,)."""
    return cells.obs[key].astype(str).to_numpy()


# -- denoise -----------------------------------------------------------------------------------------------------------


def smooth_by_neighbors(kept: np.ndarray, train: np.ndarray, n_neighbors: int) -> np.ndarray:
    """Rates of each cell from its nearest neighbors on 50 PCs, itself included."""
    everything = np.concatenate([kept, train])
    logs = log_normalize(everything)
    pcs = new_pca(logs).fit_transform(logs)
    neighbors = NearestNeighbors(n_neighbors=n_neighbors).fit(pcs).kneighbors(pcs[: len(kept)], return_distance=False)
    profiles = np.stack([everything[rows].sum(axis=0) / everything[rows].sum() for rows in neighbors])
    return kept.sum(axis=1, keepdims=True) * profiles


def smooth_by_magic(kept: np.ndarray, train: np.ndarray, seed: int) -> np.ndarray:
    """Rates by MAGIC with its defaults, on square roots of normalized counts, as its authors advise."""
    import magic

    everything = np.concatenate([kept, train])
    sizes = everything.sum(axis=1, keepdims=True).clip(1)
    median = np.median(sizes)
    smoothed = magic.MAGIC(random_state=seed, verbose=0, n_jobs=1).fit_transform(np.sqrt(everything / sizes * median))
    return (np.asarray(smoothed) ** 2 / median * sizes)[: len(kept)]


def smooth_by_scvi(kept: np.ndarray, train: np.ndarray, seed: int) -> np.ndarray:
    """Rates by scVI with its defaults, trained on the cells that it denoises and the training cells."""
    import scvi

    scvi.settings.seed = seed
    everything = ad.AnnData(sp.csr_matrix(np.concatenate([kept, train]), dtype=np.float32))
    scvi.model.SCVI.setup_anndata(everything)
    model = scvi.model.SCVI(everything)
    model.train(accelerator="cpu", enable_progress_bar=False, logger=None)
    profiles = model.get_normalized_expression(indices=np.arange(len(kept)), n_samples=10, return_numpy=True)
    return profiles * kept.sum(axis=1, keepdims=True)


def measure_denoising(pipe: SCRDiTPipeline, parts: dict[str, ad.AnnData], key: str, seed: int) -> dict[str, dict]:
    """Losses of the held-out counts by method; lower is better."""
    train, test = parts["train"].X.toarray(), parts["test"].X.toarray().astype(int)
    kept = np.random.default_rng(seed).binomial(test, KEPT)
    left = test - kept
    denoise = SCRDiTDenoisePipeline.from_pipe(pipe)
    denoise.set_progress_bar_config(disable=True)
    cells = ad.AnnData(sp.csr_matrix(kept, dtype=np.float32), obs=parts["test"].obs, var=parts["test"].var)

    def ours(use_labels: bool) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return denoise(cells, use_labels=use_labels, generator=generator).layers["denoised"]

    def mean_of_label() -> np.ndarray:
        labels = labels_of(parts["train"], key)
        means = {label: train[labels == label].sum(axis=0) / train[labels == label].sum() for label in set(labels)}
        return kept.sum(axis=1, keepdims=True) * np.stack([means[label] for label in labels_of(parts["test"], key)])

    methods: dict[str, Callable[[], np.ndarray]] = {
        "ours": lambda: ours(True),
        "ours, without labels": lambda: ours(False),
        "no denoising": lambda: kept.astype(float),
        "mean of the label": mean_of_label,
    }
    methods |= {f"{k} nearest neighbors": partial(smooth_by_neighbors, kept, train, k) for k in (15, 30, 60)}
    methods |= {"MAGIC": lambda: smooth_by_magic(kept, train, seed)} if find_spec("magic") else {}
    methods |= {"scVI": lambda: smooth_by_scvi(kept, train, seed)} if find_spec("scvi") else {}
    results = {}
    for name, method in methods.items():
        expected = np.maximum(method() * (1 - KEPT) / KEPT, 1e-4)  # a rate of zero would have an infinite loss
        errors = log_normalize(expected) - log_normalize(left)
        results[name] = {
            "Poisson loss": float((expected - left * np.log(expected)).mean()),
            "squared error of log1p": float((errors**2).mean()),
        }
    return results


# -- annotate ----------------------------------------------------------------------------------------------------------


def calibration_error(probabilities: np.ndarray, codes: np.ndarray, bins: int = 15) -> float:
    """Compute the expected calibration error of the most probable label."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == codes
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[bin_of == b].mean() - right[bin_of == b].mean()) * (bin_of == b).mean() for b in set(bin_of)]
    return float(sum(gaps))


def calibrate(scores: dict[str, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """Probabilities of the test cells with the temperature that fits the control cells best."""

    def loss(log_temperature: float) -> float:
        return -log_softmax(scores["control"] / np.exp(log_temperature), axis=1)[np.arange(len(codes)), codes].mean()

    temperature = np.exp(minimize_scalar(loss, bounds=(-3, 8), method="bounded").x)
    return np.exp(log_softmax(scores["test"] / temperature, axis=1))


def classifiers(values: np.ndarray) -> dict[str, Pipeline]:
    """Logistic regressions of log-normalized values like these."""
    return {
        "logistic regression, 50 PCs": make_pipeline(new_pca(values), LogisticRegression(max_iter=2000)),
        "logistic regression, genes": make_pipeline(
            StandardScaler(),
            FunctionTransformer(partial(np.clip, a_min=None, a_max=10)),
            LogisticRegression(max_iter=500),
        ),
    }


def measure_annotation(pipe: SCRDiTPipeline, parts: dict[str, ad.AnnData], key: str, seed: int) -> dict[str, dict]:
    """Accuracy, macro F1 and calibration error of each method."""
    names = pipe.processor.conditions[key]
    codes = {part: pd.Categorical(labels_of(cells, key), categories=names).codes for part, cells in parts.items()}
    logs = {part: log_normalize(cells.X) for part, cells in parts.items()}
    found = {}
    for name, model in classifiers(logs["train"]).items():
        model.fit(logs["train"], codes["train"])
        scores = {part: model.decision_function(logs[part]) for part in ("control", "test")}
        found[name] = calibrate(scores, codes["control"])
    annotate = SCRDiTAnnotatePipeline.from_pipe(pipe)
    annotate.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    temperature = annotate.fit_temperature(parts["control"], key, generator=generator)
    table = annotate(parts["test"], key, temperature=temperature, generator=generator)
    found["ours"] = table[[f"p_{name}" for name in names]].to_numpy()
    results = {}
    for name, probabilities in found.items():
        best = probabilities.argmax(axis=1)
        results[name] = {
            "accuracy": float((best == codes["test"]).mean()),
            "macro F1": float(f1_score(codes["test"], best, average="macro")),
            "calibration error": calibration_error(probabilities, codes["test"]),
        }
    results["ours"]["temperature"] = temperature
    return results


def measure_unseen(pipe: SCRDiTPipeline, parts: dict[str, ad.AnnData], key: str, label: str) -> dict[str, dict]:
    """AUROC of scores that tell test cells of a label that was left out of training from the others."""
    train = parts["train"][labels_of(parts["train"], key) != label]
    unseen = labels_of(parts["test"], key) == label
    train_logs, logs = log_normalize(train.X), log_normalize(parts["test"].X)
    pca = new_pca(train_logs).fit(train_logs)
    nearest = NearestNeighbors(n_neighbors=5).fit(pca.transform(train_logs))
    classifier = LogisticRegression(max_iter=2000).fit(pca.transform(train_logs), labels_of(train, key))
    annotate = SCRDiTAnnotatePipeline.from_pipe(pipe)
    annotate.set_progress_bar_config(disable=True)
    table = annotate(parts["test"], key, generator=torch.Generator().manual_seed(0))
    scores = {
        "ours": table["unlikeness"],
        "ours, 1 - probability of the label": 1 - table["probability"],
        "distance to the 5 nearest training cells, 50 PCs": nearest.kneighbors(pca.transform(logs))[0].mean(axis=1),
        "1 - probability of the label, logistic regression": 1
        - classifier.predict_proba(pca.transform(logs)).max(axis=1),
    }
    return {name: {"AUROC": float(roc_auc_score(unseen, score))} for name, score in scores.items()}


# -- simulate ----------------------------------------------------------------------------------------------------------


def share_significant(control: np.ndarray, treated: np.ndarray) -> float:
    """Share of the genes with p < 0.05 by the Wilcoxon rank-sum test."""
    return float((mannwhitneyu(control, treated).pvalue < 0.05).mean())


def measure_simulation(pipe: SCRDiTPipeline, parts: dict[str, ad.AnnData], key: str, seed: int) -> dict[str, dict]:
    """Share of false positives with and without effects, and slope of estimated on true effects."""
    label = parts["train"].obs[key].value_counts().index[0]
    train = parts["train"][parts["train"].obs[key] == label]
    simulate = SCRDiTSimulatePipeline.from_pipe(pipe)
    simulate.set_progress_bar_config(disable=True)
    obs = train.obs[pipe.processor.condition_keys].sample(2 * SIMULATED, replace=True, random_state=seed)
    obs = obs.assign(group=np.repeat(["control", "treated"], SIMULATED)).reset_index(drop=True)
    expressed = train.var_names[np.asarray(train.X.mean(axis=0)).ravel() > 0.1]
    generator = torch.Generator().manual_seed(seed)

    null = simulate(obs, {}, generator=generator)
    counts = null[:, expressed].X.toarray()
    rng = np.random.default_rng(seed)
    divisions = [np.split(rng.permutation(len(counts)), 2) for _ in range(20)]
    no_effects = [share_significant(counts[one], counts[other]) for one, other in divisions]

    effects = draw_effects(expressed, ["treated"], min(200, len(expressed) // 2), seed=seed)
    cells = simulate(obs, effects, generator=generator)
    control, treated = (cells[obs["group"] == group].X.toarray() for group in ("control", "treated"))
    true = cells.varm["log2_fold_change"]["treated"].to_numpy()
    unchanged = cells.var_names.isin(expressed) & ~cells.var["changed"].to_numpy()
    used = (true != 0) & (control.mean(axis=0) > 0.05) & (treated.mean(axis=0) > 0)
    estimated = np.log2(treated[:, used].mean(axis=0) / control[:, used].mean(axis=0))
    precision = 1 / sum(side[:, used].var(axis=0) / side[:, used].mean(axis=0) ** 2 for side in (control, treated))
    results = {
        "slope of effects": float((precision * true[used] * estimated).sum() / (precision * true[used] ** 2).sum()),
        "genes with p < 0.05, no effects": float(np.mean(no_effects)),
        "unchanged genes with p < 0.05": share_significant(control[:, unchanged], treated[:, unchanged]),
        "library size of the control over that without effects": float(
            control.sum(axis=1).mean() / null.X.sum(axis=1).mean()
        ),
    }
    effects = {"treated": {gene: -abs(change) for gene, change in effects["treated"].items()}}
    simulated = simulate(obs.groupby("group").head(500), effects, generator=generator)
    held_out = ad.concat([parts["control"], parts["test"]])
    real = thin(held_out[labels_of(held_out, key) == label], effects["treated"], rng)
    return {
        "ours": results | measure_power(simulated, expressed, seed),
        "real cells": measure_power(real, expressed, seed),
    }


def measure_realism(pipe: SCRDiTPipeline, parts: dict[str, ad.AnnData], key: str, seed: int) -> dict[str, dict]:
    """How well classifiers tell simulated cells without effects, generated cells and real ones from the test cells."""
    simulate = SCRDiTSimulatePipeline.from_pipe(pipe)
    simulate.set_progress_bar_config(disable=True)
    test, keys = parts["test"], pipe.processor.condition_keys
    expressed = test.var_names[np.asarray(parts["train"].X.mean(axis=0)).ravel() > 0.1]
    effects = draw_effects(expressed, ["treated"], min(200, len(expressed) // 2), seed=seed)
    design = pd.concat([test.obs[keys].assign(group=group) for group in ("control", "treated")], ignore_index=True)
    simulated = simulate(design, effects, generator=torch.Generator().manual_seed(seed))
    genes = simulated.var_names[simulated.var["baseline"] == 1]
    sets = {
        "generated": pipe(obs=test.obs[keys], generator=torch.Generator().manual_seed(seed)).adata[:, genes],
        "simulated, without effects": simulated[simulated.obs["group"] == "control", genes],
    }
    table = compare(test[:, genes], sets, parts["train"][:, genes], parts["control"][:, genes], key, seed=seed)
    table = table[table["group"] == "all"].set_index("metric")
    metrics = ["classifier_genes_auroc", "classifier_pcs_auroc", "nearest_neighbor_accuracy"]
    names = {name: name for name in sets} | {"real cells": "ceiling"}
    return {name: {METRIC_NAMES[m]: float(table.loc[m, column]) for m in metrics} for name, column in names.items()}


def thin(cells: ad.AnnData, changes: dict[str, float], rng: np.random.Generator) -> ad.AnnData:
    """Divide real cells into a control and a group whose counts are thinned to negative log2 fold changes."""
    truth = pd.DataFrame({"treated": pd.Series(changes).reindex(cells.var_names, fill_value=0.0)})
    counts = cells.X.toarray().astype(int)
    treated = rng.permutation(len(counts)) % 2 == 1
    counts[treated] = rng.binomial(counts[treated], 2.0 ** truth["treated"].to_numpy())
    obs = pd.DataFrame({"group": np.where(treated, "treated", "control")}, index=cells.obs_names)
    return ad.AnnData(sp.csr_matrix(counts, dtype=np.float32), obs, cells.var[[]], varm={"log2_fold_change": truth})


def measure_power(cells: ad.AnnData, genes: pd.Index, seed: int) -> dict[str, float]:
    """Share of the effects found at a false discovery rate of 5%, by the number of cells per group."""
    most = cells.obs["group"].value_counts().min()
    table = power_curve(cells, genes, [number for number in (20, 50, 100) if number <= most], seed=seed)
    return {f"power, {number} cells": float(power) for number, power in table["power"].items()}


# -- augment -----------------------------------------------------------------------------------------------------------


def rare_labels(train: ad.AnnData, key: str) -> list[str]:
    """Labels with fewer than 5% of the training cells, and at least 6, which SMOTE needs."""
    numbers = train.obs[key].astype(str).value_counts()
    return sorted(numbers.index[(numbers < RARE * train.n_obs) & (numbers >= 6)])


def measure_augmentation(pipe: SCRDiTPipeline, parts: dict[str, ad.AnnData], key: str, seed: int) -> dict[str, dict]:
    """F1 of each rare label and mean F1 of the others, by classifier and by what it was trained on."""
    train, test = parts["train"], ad.concat([parts["control"], parts["test"]])
    labels, true = labels_of(train, key), labels_of(test, key)
    rare = rare_labels(train, key)
    target = int(np.ceil(RARE * train.n_obs))
    wanted = dict.fromkeys(rare, target)
    grown = augment(pipe, train, key, wanted, generator=torch.Generator().manual_seed(seed))
    rng = np.random.default_rng(seed)
    copies = [rng.choice(np.flatnonzero(labels == label), target - (labels == label).sum()) for label in rare]
    rows = np.concatenate([np.arange(train.n_obs), *copies])
    logs = log_normalize(train.X)
    sets = {
        "real cells": (logs, labels, None),
        "real cells, class weights": (logs, labels, "balanced"),
        "and duplicates": (logs[rows], labels[rows], None),
        "and ours": (log_normalize(grown.X), labels_of(grown, key), None),
    }
    if find_spec("imblearn"):
        from imblearn.over_sampling import SMOTE

        sets["and SMOTE"] = (*SMOTE(sampling_strategy=wanted, random_state=seed).fit_resample(logs, labels), None)
    results: dict[str, dict] = {}
    test_logs = log_normalize(test.X)
    others = sorted(set(labels) - set(rare))
    for name, (values, known, weights) in sets.items():
        forest = RandomForestClassifier(500, class_weight=weights, random_state=seed)
        regression = make_pipeline(new_pca(values), LogisticRegression(max_iter=2000, class_weight=weights))
        for kind, model in (("forest", forest), ("logistic regression", regression)):
            predicted = model.fit(values, known).predict(test_logs)
            scores = dict(zip(rare, f1_score(true, predicted, labels=rare, average=None), strict=True))
            scores["other labels"] = f1_score(true, predicted, labels=others, average="macro")
            results[f"{kind}: {name}"] = {label: float(score) for label, score in scores.items()}
    return results
