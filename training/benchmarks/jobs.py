"""Denoising, annotation, simulation and augmentation beside their baselines, as a Markdown table.

    python training/benchmarks/jobs.py --pipeline split/pipeline --split_dir split --output_dir outputs/jobs

The pipeline is trained on the train part of a split by `training/evaluate.py`; everything is measured on the test
part, and temperatures are fitted on the control part. The same command continues after an interruption.

- Denoise: molecular cross-validation (Batson et al. 2019). Counts are split binomially 90 to 10, the larger part is
  denoised, and the Poisson loss of the smaller part is measured, per cell and gene.
- Annotate: accuracy, macro F1 and expected calibration error (15 bins), beside logistic regressions on 50 PCs and on
  standardized genes of the log-normalized values.
- Simulate: cells of the most frequent label in two groups, without effects and with those of 200 expressed genes
  (log2 fold changes of standard deviation 1): share of unchanged genes with p < 0.05 by the Wilcoxon rank-sum test,
  and slope of estimated on true effects, weighted by their precision.
- Augment: macro F1 of a random forest on the labels with fewer than 5 % of the training cells, and on the others,
  trained on real cells, with duplicates, with class weights, and with new cells of the rare labels.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from _common import Record, to_markdown
from scipy.stats import mannwhitneyu
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scrdit_diffusers import (
    SCRDiTAnnotatePipeline,
    SCRDiTDenoisePipeline,
    SCRDiTPipeline,
    SCRDiTSimulatePipeline,
    augment,
    draw_effects,
)
from scrdit_diffusers.values import normalize_log1p

KEPT = 0.9  # share of the counts that are denoised
RARE = 0.05  # share of the training cells


def log_normalize(counts: np.ndarray) -> np.ndarray:
    """Log1p of counts per 10,000, shape (cells, G)."""
    return normalize_log1p(sp.csr_matrix(counts, dtype=np.float32), 1e4).toarray()


def measure_denoising(pipe: SCRDiTPipeline, parts: dict[str, ad.AnnData], key: str, seed: int) -> dict[str, float]:
    """Poisson loss of the held-out counts by method; lower is better."""
    train, test = parts["train"].X.toarray(), parts["test"].X.toarray().astype(int)
    rng = np.random.default_rng(seed)
    kept = rng.binomial(test, KEPT)
    left = test - kept
    sizes = kept.sum(axis=1, keepdims=True)
    cells = ad.AnnData(sp.csr_matrix(kept, dtype=np.float32), obs=parts["test"].obs, var=parts["test"].var)
    denoise = SCRDiTDenoisePipeline.from_pipe(pipe)
    denoise.set_progress_bar_config(disable=True)
    rates = {"none": kept.astype(float)}
    everything = np.concatenate([kept, train])
    logs = log_normalize(everything)
    pcs = PCA(50, random_state=0).fit_transform(logs)
    for k in (15, 30, 60):
        neighbors = NearestNeighbors(n_neighbors=k).fit(pcs).kneighbors(pcs[: len(kept)], return_distance=False)
        rates[f"{k} nearest neighbors on PCs"] = sizes * np.stack(
            [everything[rows].sum(axis=0) / everything[rows].sum() for rows in neighbors]
        )
    labels = parts["train"].obs[key].astype(str).to_numpy()
    means = {label: train[labels == label].sum(axis=0) / train[labels == label].sum() for label in set(labels)}
    rates["mean of the label"] = sizes * np.stack([means[label] for label in parts["test"].obs[key].astype(str)])
    for use_labels in (True, False):
        generator = torch.Generator().manual_seed(seed)
        name = "ours" if use_labels else "ours, without labels"
        rates[name] = denoise(cells, use_labels=use_labels, generator=generator).layers["denoised"]

    def loss(rate: np.ndarray) -> float:
        expected = np.maximum(rate * (1 - KEPT) / KEPT, 1e-4)  # a rate of zero would have an infinite loss
        return float((expected - left * np.log(expected)).mean())

    return {name: loss(rate) for name, rate in rates.items()}


def calibration_error(probabilities: np.ndarray, codes: np.ndarray, bins: int = 15) -> float:
    """Compute the expected calibration error of the most probable label."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == codes
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[bin_of == b].mean() - right[bin_of == b].mean()) * (bin_of == b).mean() for b in set(bin_of)]
    return float(sum(gaps))


def measure_annotation(
    pipe: SCRDiTPipeline, parts: dict[str, ad.AnnData], key: str, seed: int
) -> dict[str, dict[str, float]]:
    """Accuracy, macro F1 and calibration error of each method."""
    names = pipe.processor.conditions[key]
    codes = {part: pd.Categorical(cells.obs[key].astype(str), categories=names).codes for part, cells in parts.items()}
    logs = {part: log_normalize(cells.X.toarray()) for part, cells in parts.items()}
    found = {}
    for name, model in {
        "logistic regression, 50 PCs": make_pipeline(PCA(50, random_state=0), LogisticRegression(max_iter=2000)),
        "logistic regression, genes": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    }.items():
        found[name] = model.fit(logs["train"], codes["train"]).predict_proba(logs["test"])
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


def measure_simulation(
    pipe: SCRDiTPipeline, parts: dict[str, ad.AnnData], key: str, seed: int, num_cells: int
) -> dict[str, float]:
    """Share of false positives with and without effects, and slope of estimated on true effects."""
    label = parts["train"].obs[key].value_counts().index[0]
    train = parts["train"][parts["train"].obs[key] == label]
    simulate = SCRDiTSimulatePipeline.from_pipe(pipe)
    simulate.set_progress_bar_config(disable=True)
    obs = pd.DataFrame({key: label, "group": np.repeat(["control", "treated"], num_cells)})
    obs.index = obs.index.astype(str)
    expressed = train.var_names[np.asarray(train.X.mean(axis=0)).ravel() > 0.1]
    results = {}
    for name, effects in {
        "no effects": {},
        "with effects": draw_effects(expressed, ["treated"], min(200, len(expressed) // 2), seed=seed),
    }.items():
        cells = simulate(obs, effects, generator=torch.Generator().manual_seed(seed))
        control, treated = (cells[obs["group"] == group].X.toarray() for group in ("control", "treated"))
        tested = np.flatnonzero(cells.var_names.isin(expressed) & ~cells.var["changed"])
        p = np.array([mannwhitneyu(control[:, gene], treated[:, gene]).pvalue for gene in tested])
        results[f"unchanged genes with p < 0.05, {name}"] = float((p < 0.05).mean())
        results[f"unchanged genes, {name}"] = len(p)
        results[f"library size of the control over that without effects, {name}"] = float(control.sum(axis=1).mean())
        if effects:
            true = cells.varm["log2_fold_change"]["treated"].to_numpy()
            used = (true != 0) & (control.mean(axis=0) > 0.05) & (treated.mean(axis=0) > 0)
            estimated = np.log2(treated[:, used].mean(axis=0) / control[:, used].mean(axis=0))
            precision = 1 / sum(
                side[:, used].var(axis=0) / side[:, used].mean(axis=0) ** 2 for side in (control, treated)
            )
            results["slope of effects"] = float(
                (precision * true[used] * estimated).sum() / (precision * true[used] ** 2).sum()
            )
    base = results.pop("library size of the control over that without effects, no effects")
    results["library size of the control over that without effects, with effects"] /= base
    return results


def measure_augmentation(
    pipe: SCRDiTPipeline, parts: dict[str, ad.AnnData], key: str, seed: int
) -> dict[str, dict[str, float]]:
    """Macro F1 on rare and on other labels by what the forest was trained on; empty if no label is rare."""
    train, test = parts["train"], parts["test"]
    share = train.obs[key].astype(str).value_counts(normalize=True)
    rare = sorted(share.index[share < RARE])
    if not rare:
        return {}
    target = int(np.ceil(RARE * train.n_obs))
    grown = augment(pipe, train, key, dict.fromkeys(rare, target), generator=torch.Generator().manual_seed(seed))
    rng = np.random.default_rng(seed)
    labels = train.obs[key].astype(str).to_numpy()
    copies = [rng.choice(np.flatnonzero(labels == label), target - (labels == label).sum()) for label in rare]
    rows = np.concatenate([np.arange(train.n_obs), *copies])
    sets = {
        "real cells": (train, None),
        "real cells, class weights": (train, "balanced"),
        "and duplicates": (train[rows], None),
        "and ours": (grown, None),
    }
    results = {}
    true = test.obs[key].astype(str)
    for name, (cells, weights) in sets.items():
        forest = RandomForestClassifier(500, class_weight=weights, random_state=seed)
        forest.fit(log_normalize(cells.X.toarray()), cells.obs[key].astype(str))
        predicted = forest.predict(log_normalize(test.X.toarray()))
        others = sorted(set(share.index) - set(rare))
        results[name] = {
            "F1 of rare labels": float(f1_score(true, predicted, labels=rare, average="macro")),
            "F1 of other labels": float(f1_score(true, predicted, labels=others, average="macro")),
        }
    return results


def main() -> None:
    """Measure each job and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--split_dir", required=True, help="train.h5ad, test.h5ad and control.h5ad")
    parser.add_argument("--labels_key", default="cell_type")
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--num_cells", type=int, default=2000, help="simulated cells of each group")
    parser.add_argument("--output_dir", default="outputs/jobs", help="folder of the results")
    args = parser.parse_args()
    pipe = SCRDiTPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    genes, key = pipe.processor.var_names, args.labels_key
    parts = {
        name: ad.read_h5ad(Path(args.split_dir) / f"{name}.h5ad")[:, genes].copy()
        for name in ("train", "control", "test")
    }
    given = {name: value for name, value in vars(args).items() if name not in ("output_dir", "num_seeds")}
    record = Record(Path(args.output_dir) / "jobs.json", given, results={})
    jobs: dict[str, Callable[[int], dict]] = {
        "denoise": lambda seed: {"Poisson loss": measure_denoising(pipe, parts, key, seed)},
        "annotate": lambda seed: measure_annotation(pipe, parts, key, seed),
        "simulate": lambda seed: {"ours": measure_simulation(pipe, parts, key, seed, args.num_cells)},
        "augment": lambda seed: measure_augmentation(pipe, parts, key, seed),
    }
    for job, measure in jobs.items():
        for seed in range(args.num_seeds):
            if f"{job} {seed}" not in record["results"]:
                record["results"][f"{job} {seed}"] = measure(seed)
                record.save()
        print(f"\n## {job}\n\n{format_job(record['results'], job)}", flush=True)


def format_job(results: dict[str, dict], job: str) -> str:
    """Format the mean of a job's values over the seeds, and their range."""
    seeds = [value for name, value in results.items() if name.startswith(f"{job} ")]
    rows = []
    for method, values in seeds[0].items():
        for metric in values:
            numbers = [seed[method][metric] for seed in seeds]
            rows.append([method, metric, f"{np.mean(numbers):.4g}", f"{min(numbers):.4g} to {max(numbers):.4g}"])
    return to_markdown(["method", "metric", "mean", "range over seeds"], rows)


if __name__ == "__main__":
    main()
