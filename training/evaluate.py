"""Evaluate generated cells against unseen real cells: writes metrics.json and a self-contained report.html.

    python training/evaluate.py --dataset cells.h5ad --labels_key cell_type --split_dir split

splits the cells into train, control and test, and prints how to train on the first. Then

    python training/evaluate.py --split_dir split --pipeline split/pipeline --output_dir evaluation

evaluates the pipeline; `--synthetic cells.h5ad` instead of `--pipeline` evaluates the cells of any other tool.
"""

import dataclasses
import importlib.util
import json
import logging
import shlex
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import anndata as ad
import matplotlib
import numpy as np
import pandas as pd
import torch
from cli import arg, check_numbers, command_line, load_adapter, naming, run
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from sklearn.model_selection import StratifiedGroupKFold

from scrdit_diffusers import SCRDiTPipeline, SCRDiTProcessor, read_cells, split_cells
from scrdit_diffusers.atomic import lock_folder, write_atomically, write_into
from scrdit_diffusers.checks import check_known_labels, check_label, check_real, get_matrix, label_categories
from scrdit_diffusers.evaluation import baselines, compare, model_card, privacy
from scrdit_diffusers.evaluation.baselines import BASELINE_NAMES
from scrdit_diffusers.evaluation.report import STEP_METRICS, draw_figures, render_report
from scrdit_diffusers.evaluation.space import get_values
from scrdit_diffusers.evaluation.strata import compare_strata
from scrdit_diffusers.launch import check_device
from scrdit_diffusers.redaction import redact

matplotlib.use("Agg")
logger = logging.getLogger("evaluate")
PARTS = ("train", "control", "test")
NUM_VARIABLE = 2000  # genes at which the metrics look; of more genes, all are judged as well
PACKAGES = {"scrdit_diffusers": "scrdit-diffusers", "sklearn": "scikit-learn", "ot": "POT", "scvi": "scvi-tools"}
PACKAGES |= {"scib_metrics": "scib-metrics"}
PACKAGES |= {name: name for name in ("diffusers", "torch", "anndata", "scanpy", "numpy", "scipy")}


@dataclass(frozen=True)
class EvaluationArguments:
    """Command-line arguments."""

    # real cells
    split_dir: str = arg(None, "Folder of train.h5ad, control.h5ad, test.h5ad; made from --dataset if it lacks them.")
    dataset: str | None = arg(None, "Real cells to split: .h5ad file, .zarr store, dataset folder or Hub dataset id.")
    labels_key: str | None = arg(None, "Column of obs; that of the split, or the pipeline's first one, if not given.")
    layer: str | None = arg(None, "Layer of the real cells that holds the values; that of the split, or X.")
    split_by: str | None = arg(None, "Column of obs, such as donor, whose groups stay whole when the cells are split.")
    # what is evaluated
    pipeline: str | None = arg(None, "Folder or Hub id of the pipeline to evaluate.")
    lora_weights: str | None = arg(None, "Folder or Hub id of an adapter for the pipeline.")
    synthetic: str | None = arg(None, "Cells of any other tool to evaluate, values in X.")
    value_space: str = arg("counts", "Values of --synthetic.", choices=["counts", "log_normalized"])
    n_top_genes: int = arg(2000, "With --synthetic: number of genes at most; the most variable ones of train are kept.")
    num_inference_steps: int | None = arg(None, "Network calls per cell. Default: the pipeline's.")
    guidance_scale: float = arg(1.0, "Classifier-free guidance; 1.0 is off.")
    batch_size: int | None = arg(None, "Cells generated at a time. Default: 512, fewer of over 8,192 genes.")
    device: str | None = arg(None, "cpu, cuda or mps; the best one if not given.")
    # how
    num_seeds: int = arg(5, "Evaluation seeds; each repeats generation, draws, folds and split of unseen cells.")
    seed: int = arg(0, "First seed, and seed of the split.")
    max_cells: int = arg(3000, "Largest number of cells of each kind to evaluate; bounds time and memory.")
    min_label_cells: int = arg(50, "Labels with at least this many cells of each kind are also evaluated alone.")
    baselines: list[str] = arg(
        ["resample_genes", "gaussian_copula"],
        "Baselines, or none; scvi_prior is added where scvi-tools is installed.",
        choices=["none", *BASELINE_NAMES],
    )
    steps_curve: list[int] = arg(
        [5, 10, 20, 50], "Further numbers of network calls at which quality is measured; 0 for none."
    )
    privacy: bool = arg(False, "Also try to tell training cells from unseen ones; donors, too, with --split_by.")
    n_jobs: int = arg(-1, "Processes for the folds of the classifiers; -1 takes all cores.")
    output_dir: str = arg("evaluation", "Folder of metrics.json and report.html.")
    overwrite: bool = arg(False, "Replace the results in --output_dir.")
    update_card: bool = arg(False, "Add the results to the model card in the folder of the pipeline or the adapter.")


def leave_out(args: EvaluationArguments) -> EvaluationArguments:
    """Replace "none" and 0 by empty lists."""
    given = {"baselines": ["none"], "steps_curve": [0]}
    return dataclasses.replace(args, **{name: [] for name, nothing in given.items() if getattr(args, name) == nothing})


def check_args(args: EvaluationArguments) -> None:
    """Raise ValueError for arguments that cannot work, before anything is read."""
    if args.split_dir is None:
        raise ValueError("--split_dir is needed: the folder of train.h5ad, control.h5ad and test.h5ad.")
    if args.pipeline and args.synthetic:
        raise ValueError("Give either --pipeline or --synthetic, not both.")
    if args.lora_weights and not args.pipeline:
        raise ValueError(f"--lora_weights {args.lora_weights} needs --pipeline: the pipeline that it was trained on.")
    if args.update_card and not (Path(args.lora_weights or args.pipeline or "") / "card.json").is_file():
        raise ValueError(
            f"--update_card needs a folder with card.json, as training/train.py writes it; "
            f"{args.lora_weights or args.pipeline} has none."
        )
    check_numbers(args, ("num_seeds", "num_inference_steps", "batch_size", "n_top_genes"), ("guidance_scale",))
    if not 0 <= args.seed <= 2**32 - args.num_seeds:
        raise ValueError(f"--seed must be from 0 to 2^32 - --num_seeds, got {args.seed}.")
    if not args.n_jobs:
        raise ValueError("--n_jobs must not be 0; -1 takes all cores.")
    check_device(args.device)
    for name in ("max_cells", "min_label_cells"):
        if getattr(args, name) < compare.MIN_CELLS:
            raise ValueError(f"--{name} must be at least {compare.MIN_CELLS}, got {getattr(args, name)}.")
    if any(steps < 1 for steps in args.steps_curve) or "none" in args.baselines:
        raise ValueError(f"--steps_curve {args.steps_curve} --baselines {args.baselines}: 0 and none stand alone.")
    if "scvi_prior" in args.baselines and not importlib.util.find_spec("scvi"):
        raise ValueError("--baselines scvi_prior needs scvi-tools: pip install scvi-tools")
    check_output_dir(args)


def check_output_dir(args: EvaluationArguments) -> None:
    """Raise ValueError for results that would be lost; unfinished ones are replaced."""
    finished = (Path(args.output_dir) / "report.html").exists()  # metrics.json grows seed by seed, it comes last
    if (args.pipeline or args.synthetic) and finished and not args.overwrite:
        raise ValueError(f"{args.output_dir} holds results; give --overwrite to replace them, or another --output_dir.")


# -- real cells --------------------------------------------------------------------------------------------------------


def make_split(args: EvaluationArguments) -> None:
    """Split the cells 60 / 20 / 20 and write the parts, all or none."""
    cells = read_cells(args.dataset)
    with naming("--dataset", args.dataset):
        check_real(cells.obs)
    get_matrix(cells, args.layer, expect_counts=False)  # no NaN, none negative: training would refuse such cells
    keys = [args.labels_key] if args.labels_key else []
    if args.split_by:
        if (num_groups := len(label_categories(cells.obs, args.split_by))) < len(PARTS):
            raise ValueError(f"--split_by {args.split_by}: {num_groups} groups cannot make train, control and test.")
        groups = cells.obs[args.split_by].astype(str)
        labels = cells.obs[keys[0]].astype(str) if keys and label_categories(cells.obs, keys[0]) else groups
        folds = StratifiedGroupKFold(min(5, num_groups), shuffle=True, random_state=args.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a label has fewer cells than there are folds
            (_, test), (_, control), *_ = folds.split(np.empty(cells.n_obs), labels, groups)
        train = np.setdiff1d(np.arange(cells.n_obs), np.concatenate([control, test]))
    else:
        rest, test = split_cells(cells, keys, 0.2, args.seed)
        stay, aside = split_cells(cells[rest], keys, 0.25, args.seed)
        train, control = rest[stay], rest[aside]
    rows = dict(zip(PARTS, (train, control, test), strict=True))
    for name, part in rows.items():
        if len(part) < compare.MIN_CELLS:
            raise ValueError(f"{name} would have {len(part)} cells; at least {compare.MIN_CELLS} are needed.")
    folder = Path(args.split_dir)
    record = {name: getattr(args, name) for name in ("dataset", "labels_key", "layer", "split_by", "seed")}
    with write_into(folder) as temporary:
        (temporary / "split.json").write_text(json.dumps(redact(record), indent=2))
        for name, part in rows.items():
            with ad.settings.override(allow_write_nullable_strings=True):
                cells[part].copy().write_h5ad(temporary / f"{name}.h5ad", compression="gzip")
    print(f"Wrote {', '.join(f'{name}.h5ad ({len(part)} cells)' for name, part in rows.items())} to {folder}")


def read_split(args: EvaluationArguments) -> dict[str, Any]:
    """Read how the cells were split (unknown for parts made elsewhere), after splitting them if needed."""
    folder = Path(args.split_dir)
    found = [name for name in PARTS if (folder / f"{name}.h5ad").is_file()]
    if found and len(found) < len(PARTS):
        raise ValueError(f"{folder} holds only {found} of {list(PARTS)}; restore the others or split anew.")
    if not found and args.dataset is None:
        raise ValueError(f"{folder} holds no split; give --dataset to make one.")
    if not found:
        make_split(args)
    split = json.loads((folder / "split.json").read_text()) if (folder / "split.json").is_file() else {}
    if args.split_by and args.split_by != split.get("split_by"):
        raise ValueError(f"{folder} was not split by {args.split_by!r}; give another --split_dir to make that split.")
    if found and args.dataset and split.get("dataset", redact(args.dataset)) != redact(args.dataset):
        raise ValueError(f"{folder} is a split of {split['dataset']}, not of {args.dataset}; give another --split_dir.")
    if found and args.dataset:
        for name in ("labels_key", "layer"):
            if (asked := getattr(args, name)) is not None and asked != split.get(name, asked):
                raise ValueError(
                    f"{folder} holds a split made with --{name} {split[name]}, not {asked}; give another --split_dir."
                )
        print(f"{folder} holds the split already.")
    return split


def print_next_commands(args: EvaluationArguments, labels_key: str | None) -> None:
    """Print how to train on the train part and how to evaluate the result."""
    folder = Path(args.split_dir)
    train = ["scrdit", "train", "--dataset", str(folder / "train.h5ad")]
    train += ["--labels_key", labels_key] if labels_key else []
    train += ["--layer", args.layer] if args.layer else []
    train += ["--output_dir", str(folder / "pipeline")]
    evaluate = ["scrdit", "evaluate", "--split_dir", str(folder), "--pipeline", train[-1]]
    print(f"Train on the train part, then evaluate:\n\n    {shlex.join(train)}\n    {shlex.join(evaluate)}\n")


def training_warnings(pipeline: str, train_part: Path, num_train: int) -> list[str]:
    """List warnings that the pipeline was not, or may not have been, trained on the train part alone."""
    path = Path(pipeline) / "train_config.json"
    if not Path(pipeline).is_dir():
        try:
            path = Path(hf_hub_download(pipeline, "train_config.json"))
        except (EntryNotFoundError, OSError):
            logger.debug("%s has no train_config.json.", pipeline)
    if not path.is_file():
        return [f"{pipeline} has no train_config.json: it may have been trained on the cells it is evaluated on."]
    config = json.loads(path.read_text())
    source = Path(config["dataset"])
    if source.resolve() != train_part.resolve():
        trained_on = f"on {source}, not on {train_part}: if that holds control or test cells"
        if source.is_absolute() and not source.exists():  # the temporary file of scrdit_diffusers.train
            trained_on = f"on cells given in Python or since deleted: if these are not those of {train_part}"
        return [f"The pipeline was trained {trained_on}, the metrics are of cells that it has seen, and mean nothing."]
    if (used := config["train_cells"] + config["val_cells"]) != num_train:
        return [f"The pipeline was trained on {used} cells of {train_part}, which now has {num_train}: it was changed."]
    return []


# -- evaluation --------------------------------------------------------------------------------------------------------


class Evaluation:
    """Real and synthetic cells with the same genes and values, checked, and how to draw and to generate them."""

    def __init__(self, args: EvaluationArguments, split: dict[str, Any]):
        self.args, self.pipe = args, None
        self.warnings: list[str] = []
        self.divide_anew = bool(split) and not split["split_by"]
        folder = Path(args.split_dir)
        cells = {name: read_cells(folder / f"{name}.h5ad") for name in PARTS}
        if args.pipeline:
            self.warnings += training_warnings(
                args.lora_weights or args.pipeline, folder / "train.h5ad", cells["train"].n_obs
            )
            values, keys = self._load_pipeline(cells, split)
        else:
            cells["synthetic"] = read_cells(args.synthetic)
            self.labels_key, self.value_space = args.labels_key or split.get("labels_key"), args.value_space
            values, keys = self._choose_genes(cells), [self.labels_key] if self.labels_key else []
        self.parts = {}
        for name, part in cells.items():
            for key in keys:
                check_label(part.obs, key, f"{name}.obs")
            obs = part.obs[keys].set_axis([f"{name}_{i}" for i in range(part.n_obs)])
            self.parts[name] = ad.AnnData(values[name], obs=obs, var=pd.DataFrame(index=self.var_names))
        sizes = {name: part.n_obs for name, part in self.parts.items()}
        if min(sizes.values()) < compare.MIN_CELLS:
            raise ValueError(f"At least {compare.MIN_CELLS} cells of each kind are needed, got {sizes}.")
        self.num_cells = min(args.max_cells, *(size for name, size in sizes.items() if name != "train"))
        self.label_counts = self._count_labels() if self.labels_key else {}

    def _load_pipeline(self, cells: dict[str, ad.AnnData], split: dict[str, Any]) -> tuple[dict, list[str]]:
        """Load the pipeline, select its genes and values from the real cells, and check that it knows their labels."""
        self.pipe = SCRDiTPipeline.from_pretrained(self.args.pipeline)
        if self.args.lora_weights:
            load_adapter(self.pipe, self.args.lora_weights)
        self.pipe.set_progress_bar_config(disable=True)
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.pipe.to(self.args.device or best)
        processor = self.pipe.processor
        conditions = processor.labels_keys
        self.labels_key = self.args.labels_key or next(
            (key for key in (split.get("labels_key"), *conditions) if key in conditions), None
        )
        if self.labels_key and self.labels_key not in conditions:
            raise ValueError(
                f"--labels_key {self.labels_key} is not a condition of the pipeline, which has {conditions}."
            )
        self.value_space, self.var_names = processor.value_space, pd.Index(processor.var_names)
        self.gene_choice = "those of the pipeline"
        for name in ("control", "test"):
            processor.encode_labels(cells[name].obs, conditions)
        return {name: processor.get_values(part, self.args.layer) for name, part in cells.items()}, conditions

    def _choose_genes(self, cells: dict[str, ad.AnnData]) -> dict:
        """Select the genes of the synthetic cells, or the highly variable ones among them."""
        self.var_names, self.gene_choice = cells["synthetic"].var_names, "those of the synthetic cells"
        layers = {name: None if name == "synthetic" else self.args.layer for name in cells}
        values = {
            name: get_values(part, self.var_names, layers[name], self.value_space, name) for name, part in cells.items()
        }
        if len(self.var_names) > self.args.n_top_genes:
            train = ad.AnnData(values["train"], var=pd.DataFrame(index=self.var_names))
            options = {"value_space": self.value_space, "n_top_genes": self.args.n_top_genes}
            chosen = pd.Index(SCRDiTProcessor.from_anndata(train, **options).var_names)
            columns, self.var_names = self.var_names.get_indexer(chosen), chosen
            values = {name: matrix[:, columns] for name, matrix in values.items()}
            self.gene_choice = "highly variable ones of train (scanpy, flavor seurat) among the synthetic cells'"
        return values

    def _count_labels(self) -> dict[str, dict[str, int]]:
        """Count cells by label and part; raise for labels without train cells, warn of another composition."""
        counts = {name: part.obs[self.labels_key].astype(str).value_counts() for name, part in self.parts.items()}
        table = pd.DataFrame(counts).fillna(0).sort_index()
        if not self.pipe:
            known = list(table.index[table["train"] > 0])
            labels = self.parts["synthetic"].obs[self.labels_key]
            check_known_labels(labels, known, f"--synthetic {self.args.synthetic}: obs[{self.labels_key!r}]")
        if unknown := list(table.index[table["train"] == 0]):
            raise ValueError(f"Labels that the train part lacks: {unknown}. Leave these cells out, or split anew.")
        shares = table / table.sum()
        if not self.pipe and (off := (shares["synthetic"] - shares["test"]).abs().sum() / 2) > 0.02:
            self.warnings.append(
                f"{off:.0%} of the synthetic cells would need another label for the composition of the test cells: "
                "metrics over all cells mix that with the quality of the cells."
            )
        return table[list(PARTS)].astype(int).to_dict("index")

    def draw_real(self, seed: int) -> tuple[ad.AnnData, ad.AnnData]:
        """Test and control cells for a seed; seeds after the first divide the unseen cells anew, label by label."""
        test, control = self.parts["test"], self.parts["control"]
        if self.divide_anew and seed != self.args.seed:
            unseen = ad.concat([test, control])
            stay, aside = split_cells(unseen, self.labels_key or [], test.n_obs / unseen.n_obs, seed)
            test, control = unseen[aside], unseen[stay]
        return self._draw(test, seed), self._draw(control, seed)

    def _draw(self, cells: ad.AnnData, seed: int) -> ad.AnnData:
        rows = np.random.default_rng(seed).permutation(cells.n_obs)[: self.num_cells]
        return cells[np.sort(rows)].copy()

    def generate(self, obs: pd.DataFrame, seed: int, num_inference_steps: int | None) -> ad.AnnData:
        """Generate cells with the labels of `obs`, or without a pipeline draw synthetic ones."""
        if self.pipe is None:
            return self._draw(self.parts["synthetic"], seed)
        return self.pipe(
            obs=obs,
            num_inference_steps=num_inference_steps,
            guidance_scale=self.args.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            batch_size=self.args.batch_size,
        ).adata

    def compare(self, test: ad.AnnData, control: ad.AnnData | None, sets: dict[str, ad.AnnData], **kwargs):
        """Call `compare` with the arguments of this evaluation."""
        options = {name: getattr(self.args, name) for name in ("max_cells", "min_label_cells", "n_jobs")}
        options |= {"labels_key": self.labels_key, "value_space": self.value_space} | kwargs
        return compare.compare(test, sets, self.parts["train"], control, **options)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_record(evaluation: Evaluation, split: dict[str, Any]) -> dict[str, Any]:
    """Begin the record that becomes metrics.json."""
    args = evaluation.args
    chosen = args.baselines
    if chosen and evaluation.value_space == "counts" and importlib.util.find_spec("scvi"):
        chosen = list(dict.fromkeys([*chosen, "scvi_prior"]))
    adapter = f" with {args.lora_weights}" if args.lora_weights else ""
    record = {
        "command": shlex.join(command_line()),
        "source": f"pipeline {args.pipeline}{adapter}" if args.pipeline else f"cells {args.synthetic}",
        "arguments": dataclasses.asdict(args),
        "split": split,
        "versions": {"python": python_version()}
        | {package: version(package) for name, package in PACKAGES.items() if importlib.util.find_spec(name)},
        "warnings": evaluation.warnings,
        "cells": {name: part.n_obs for name, part in evaluation.parts.items()} | {"evaluated": evaluation.num_cells},
        "genes": {"number": evaluation.parts["train"].n_vars, "choice": evaluation.gene_choice},
        "value_space": evaluation.value_space,
        "labels_key": evaluation.labels_key,
        "labels": evaluation.label_counts,
        "unseen_cells_divided_anew": evaluation.divide_anew,
        "baselines": chosen,
        "seeds": [],
        "rows": [],
        "strata": [],
        "steps_curve": [],
        "privacy": None,
    }
    return redact(record)


def compare_seeds(
    evaluation: Evaluation, record: dict[str, Any], save: Callable[[], None]
) -> tuple[ad.AnnData, ad.AnnData]:
    """Generate and compare with each seed; return test and generated cells of the first seed."""
    args, start = evaluation.args, time.time()
    tables: list[pd.DataFrame] = []
    for seed in range(args.seed, args.seed + args.num_seeds):
        test, control = evaluation.draw_real(seed)
        sets = {"value": evaluation.generate(test.obs, seed, args.num_inference_steps)}
        for name in record["baselines"]:
            generate, rng = getattr(baselines, name), np.random.default_rng(seed)
            sets[name] = generate(evaluation.parts["train"], test.obs, evaluation.labels_key, rng)
        if seed == args.seed:
            shown = test, sets["value"]
        tables.append(evaluation.compare(test, control, sets, seed=seed))
        summary = compare.summarize(tables)
        record["seeds"].append(seed)
        record["rows"] = summary.astype(object).where(summary.notna(), None).to_dict("records")
        save()
        auroc = tables[-1].set_index(["metric", "group"]).loc[("classifier_genes_auroc", "all"), "value"]
        print(
            f"Seed {seed}, {len(tables)} of {args.num_seeds}: {test.n_obs} cells of each kind, classifier on all genes "
            f"{auroc:.3f}, {time.time() - start:.0f} s",
            flush=True,
        )
    return shown


def measure_steps(evaluation: Evaluation, test: ad.AnnData) -> list[dict[str, Any]]:
    """Measure quality against the number of network calls."""
    args = evaluation.args
    steps = sorted(set(args.steps_curve)) if evaluation.pipe else []
    if not steps:
        return []
    sets = {str(k): evaluation.generate(test.obs, args.seed, k) for k in steps}
    table = evaluation.compare(test, None, sets, seed=args.seed, quick=True).query("group == 'all'")
    curve = table.set_index("metric").loc[list(STEP_METRICS)]
    return [{"num_inference_steps": k} | curve[str(k)].to_dict() for k in steps]


def measure_strata(evaluation: Evaluation, test: ad.AnnData, synthetic: ad.AnnData) -> list[dict[str, Any]]:
    """Judge all genes and those of each level of expression, if there are more than the metrics look at."""
    if len(evaluation.var_names) <= NUM_VARIABLE:
        return []
    args = evaluation.args
    _, control = evaluation.draw_real(args.seed)
    options = {"value_space": evaluation.value_space, "max_cells": args.max_cells, "n_jobs": args.n_jobs}
    table = compare_strata(test, synthetic, evaluation.parts["train"], control, **options, seed=args.seed)
    return table.astype(object).where(table.notna(), None).to_dict("records")


def measure_privacy(evaluation: Evaluation, split: dict[str, Any]) -> dict[str, Any]:
    """Attack the training cells, and their donors if the cells were split by donor."""
    args, rng = evaluation.args, np.random.default_rng(evaluation.args.seed)
    cells = {name: read_cells(Path(args.split_dir) / f"{name}.h5ad") for name in PARTS}
    sides = []
    for names in (PARTS[:1], PARTS[1:]):
        real = ad.concat([cells[name] for name in names], join="inner")
        part = ad.concat([evaluation.parts[name] for name in names])
        rows = np.sort(rng.permutation(part.n_obs)[: args.max_cells])
        sides.append((real[rows].copy(), part[rows].copy()))
    (real_train, train), (real_unseen, unseen) = sides
    options: dict[str, Any] = {"value_space": evaluation.value_space, "labels_key": evaluation.labels_key}
    if evaluation.labels_key:
        options["label_cells"] = {label: numbers["train"] for label, numbers in evaluation.label_counts.items()}
    if key := split.get("split_by"):
        options["donors"] = tuple(real.obs[key].astype(str).to_numpy() for real in (real_train, real_unseen))
    if pipe := evaluation.pipe:
        losses = (
            privacy.denoising_losses(pipe, real, args.layer, seed=args.seed) for real in (real_train, real_unseen)
        )
        options["losses"] = tuple(losses)
    obs = pd.concat([train.obs, unseen.obs])  # labels of both alike, so that composition gives nothing away
    obs = obs.iloc[rng.permutation(len(obs))[: train.n_obs]]
    sets = {
        "value": evaluation.generate(obs, args.seed, args.num_inference_steps),
        "gaussian_copula": baselines.gaussian_copula(evaluation.parts["train"], obs, evaluation.labels_key, rng),
    }
    return privacy.audit(train, unseen, sets, **options, seed=args.seed)


def main(args: EvaluationArguments) -> None:
    """Split the cells if needed, then evaluate if a pipeline or cells are given."""
    args = leave_out(args)
    check_args(args)
    split = read_split(args)
    args = dataclasses.replace(args, layer=args.layer or split.get("layer"))
    if not args.pipeline and not args.synthetic:
        return print_next_commands(args, args.labels_key or split.get("labels_key"))
    with lock_folder(args.output_dir, "Wait for it, or give another --output_dir."):
        check_output_dir(args)  # as no other evaluation changes it any more
        evaluate(args, split)


def evaluate(args: EvaluationArguments, split: dict[str, Any]) -> None:
    """Compare the generated with the real cells and write the results."""
    start, output_dir = time.time(), Path(args.output_dir)
    evaluation = Evaluation(args, split)
    for warning in evaluation.warnings:
        logger.warning(warning)
    record = make_record(evaluation, split)

    def save() -> None:
        record["seconds"] = round(time.time() - start)
        (output_dir / "report.html").unlink(missing_ok=True)  # of earlier metrics; the last file, so that none is begun
        write_text(output_dir / "metrics.json", json.dumps(record, indent=2, allow_nan=False))

    test, synthetic = compare_seeds(evaluation, record, save)
    record["strata"] = measure_strata(evaluation, test, synthetic)
    record["steps_curve"] = measure_steps(evaluation, test)
    record["privacy"] = measure_privacy(evaluation, split) if args.privacy else None
    figures = draw_figures(record, test, synthetic, evaluation.parts["train"], evaluation.value_space)
    save()
    if args.update_card:
        folder = Path(args.lora_weights or args.pipeline or "")
        shutil.copyfile(output_dir / "metrics.json", folder / "metrics.json")
        model_card.save_figures(figures, folder)
        model_card.write_card(folder)
    write_text(output_dir / "report.html", render_report(record, figures))
    met = [row["met"] for row in record["rows"] if row["group"] == "all" and row["met"] is not None]
    print(
        f"{sum(met)} of {len(met)} aims are met. Wrote {output_dir / 'metrics.json'} and {output_dir / 'report.html'}"
    )


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    run(main, EvaluationArguments, (TypeError, ValueError, OSError))
