r"""What generated cells and models give away, by training cells, steps and protection, as a Markdown table.

    python training/benchmarks/privacy.py --dataset kang_pbmc_12k.h5ad --labels_key cell_type --split_by donor \
        --num_choices 6 --output_dir outputs/privacy/kang-donors
    python training/benchmarks/privacy.py --dataset kang_pbmc_12k.h5ad --labels_key cell_type \
        --num_train_cells 100 500 2000 --max_train_steps 300 1200 --output_dir outputs/privacy/kang-sizes

Every combination of the numbers of training cells, of steps and of options trains a model with `train.py`, generates
cells, and attacks training and unseen cells as `evaluate.py --privacy` does (`scrdit_diffusers.evaluation.privacy`).
With `--split_by` half of the donors are trained on, with equally many cells each; choices come in pairs that exchange
the halves, so every donor is in and out equally often. Results are written as they come, and the same command goes on
where it stopped.
"""

import itertools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from _common import Record, to_markdown
from sklearn.ensemble import HistGradientBoostingClassifier
from transformers import HfArgumentParser

import scrdit_diffusers
from scrdit_diffusers import SCRDiTPipeline, read_cells
from scrdit_diffusers.checks import label_categories
from scrdit_diffusers.evaluation import privacy
from scrdit_diffusers.evaluation.baselines import gaussian_copula
from scrdit_diffusers.evaluation.compare import compare
from scrdit_diffusers.evaluation.metrics import classifier_auroc
from scrdit_diffusers.evaluation.space import log_normalize

QUALITY = {
    "classifier_genes_auroc": "genes",
    "nearest_neighbor_accuracy": "1-NN",
    "w2": "W2",
    "gene_gene_r": "gene-gene r",
}
SETS = ("value", "gaussian_copula", "real", "others")


@dataclass
class PrivacyArguments:
    """Command-line arguments."""

    dataset: str = field(metadata={"help": "Cells with counts in X."})
    labels_key: str = field(metadata={"help": "Column of obs with the cell types."})
    split_by: str | None = field(default=None, metadata={"help": "Column of obs with donors; cells are split without."})
    num_choices: int = field(
        default=2, metadata={"help": "Choices of half of the donors, in pairs that exchange them."}
    )
    num_train_cells: list[int] = field(default_factory=lambda: [1000], metadata={"help": "Numbers of training cells."})
    max_train_steps: list[int] = field(default_factory=lambda: [600], metadata={"help": "Numbers of steps."})
    options: list[str] = field(
        default_factory=lambda: [""], metadata={"help": "Further arguments of train.py, as name=value,name=value."}
    )
    num_unseen: int = field(default=1000, metadata={"help": "Cells that are not trained on."})
    num_cells: int = field(default=1000, metadata={"help": "Cells to generate."})
    n_top_genes: int = field(default=300, metadata={"help": "Genes of the model."})
    num_inference_steps: int = field(default=10, metadata={"help": "Network calls per cell."})
    seed: int = field(default=0, metadata={"help": "Seed of choices, training and generation."})
    output_dir: str = field(default="outputs/privacy", metadata={"help": "Folder of privacy.json."})


def choose_donors(donors: Sequence[str], num_choices: int, seed: int) -> list[list[str]]:
    """Choose halves of the donors, every second one what the one before leaves out."""
    if num_choices < 2 or num_choices % 2:
        raise ValueError(f"--num_choices must be an even number from 2 on, got {num_choices}.")
    rng, choices = np.random.default_rng(seed), []
    for _ in range(num_choices // 2):
        order = rng.permutation(donors).tolist()
        choices += [sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])]
    return choices


def divide(
    cells: ad.AnnData, args: PrivacyArguments, trained: Sequence[str] | None, num_train: int
) -> dict[str, ad.AnnData]:
    """Draw training cells and unseen ones of the same labels, equally many of each donor.

    With donors also draw as many others of the donors that are trained on: what a faithful generator would give.
    """
    order = np.random.default_rng(args.seed).permutation(cells.n_obs)
    if trained is None:
        rows = {"train": order[args.num_unseen :][:num_train], "unseen": order[: args.num_unseen]}
    else:
        donor = cells.obs[args.split_by].astype(str).to_numpy()[order]
        own, other = [[name for name in np.unique(donor) if (name in trained) == side] for side in (True, False)]
        drawn = {"train": (own, 0, num_train), "unseen": (other, 0, args.num_unseen), "others": (own, 1, num_train)}
        rows = {}
        for part, (names, before, total) in drawn.items():
            number = total // len(names)
            rows[part] = np.concatenate([order[donor == name][before * number :][:number] for name in names])
    parts = {name: cells[np.sort(part)].copy() for name, part in rows.items()}
    known = parts["train"].obs[args.labels_key]
    return {name: part[part.obs[args.labels_key].isin(known)].copy() for name, part in parts.items()}


def measure(args: PrivacyArguments, folder: Path, parts: Mapping[str, ad.AnnData]) -> dict[str, Any]:
    """Attack the model in `folder`, and evaluate its cells."""
    pipe = SCRDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    losses = tuple(privacy.denoising_losses(pipe, parts[name], seed=args.seed) for name in ("train", "unseen"))
    parts = {name: part[:, pipe.processor.var_names].copy() for name, part in parts.items()}
    train, unseen = parts["train"], parts["unseen"]
    rng = np.random.default_rng(args.seed)
    obs = pd.concat([train.obs, unseen.obs])
    obs = obs.iloc[rng.choice(len(obs), args.num_cells)].reset_index(drop=True)
    generator = torch.Generator().manual_seed(args.seed)
    sets = {
        "value": pipe(obs=obs, num_inference_steps=args.num_inference_steps, generator=generator).adata,
        "gaussian_copula": gaussian_copula(train, obs, args.labels_key, rng),
    }
    donors = None
    if args.split_by:
        sets["others"] = parts["others"]
        donors = tuple(cells.obs[args.split_by].astype(str).to_numpy() for cells in (train, unseen))
    found = privacy.audit(train, unseen, sets, labels_key=args.labels_key, losses=losses, donors=donors, seed=args.seed)
    test, control = unseen[::2].copy(), unseen[1::2].copy()
    table = compare(test, sets, train, control, labels_key=args.labels_key, min_label_cells=sys.maxsize, quick=True)
    quality = table[table["group"] == "all"].set_index("metric")[[*sets, "ceiling"]].to_dict("index")
    logs = {name: log_normalize(part.X, "counts").toarray() for name, part in (sets | {"ceiling": control}).items()}
    real, boosting = log_normalize(test.X, "counts").toarray(), HistGradientBoostingClassifier(max_bins=31)
    quality["classifier_genes_auroc"] = {
        name: classifier_auroc(values[: len(real)], real, boosting) for name, values in logs.items()
    }
    return {"privacy": found, "quality": {metric: quality[metric] for metric in QUALITY}}


def runs(args: PrivacyArguments, cells: ad.AnnData) -> Iterator[dict[str, Any]]:
    """Give what each training is to be."""
    choices: list[Any] = [None]
    if args.split_by:
        choices = choose_donors(label_categories(cells.obs, args.split_by), args.num_choices, args.seed)
    for choice, number, steps, options in itertools.product(
        choices, args.num_train_cells, args.max_train_steps, args.options
    ):
        yield {"donors": choice, "train_cells": number, "steps": steps, "options": options}


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format AUROCs of model, copula, real cells and other cells of the donors; of the quality real cells come last."""
    kinds = list(privacy.ATTACK_NAMES)
    units = ["cells", "donors"] if rows[0]["donors"] else ["cells"]
    titles = ["cells", "steps", "options", *(f"{unit}: {kind}" for unit in units for kind in kinds)]
    lines = []
    for row in rows:
        figures = {(entry["unit"], entry["attack"]): entry for entry in row["privacy"]["rows"]}
        line = [str(row["privacy"]["cells"]["train"]), str(row["steps"]), row["options"]]
        for unit, kind in itertools.product(units, kinds):
            entry = figures[unit, kind]
            line.append(" / ".join(f"{entry[name]:.3f}" for name in SETS if name in entry))
        line.append(f"{row['privacy']['rare_cells']['copied']:.3f}")
        for metric in QUALITY:
            line.append(
                " / ".join(f"{row['quality'][metric][name]:.3f}" for name in ("value", "gaussian_copula", "ceiling"))
            )
        lines.append(line)
    return to_markdown([*titles, "rare, copied", *QUALITY.values()], lines)


def compare_donors(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tell each donor's scores when trained on from those when not: AUROC over trainings, mean over donors."""
    lines = []
    for kind in privacy.ATTACK_NAMES:
        inside: dict[str, list[float]] = {}
        outside: dict[str, list[float]] = {}
        for row in rows:
            (scores,) = (e["scores"] for e in row["privacy"]["rows"] if (e["unit"], e["attack"]) == ("donors", kind))
            for donor, score in scores.items():
                (inside if donor in row["donors"] else outside).setdefault(donor, []).append(score)
        aurocs = [privacy.donor_auroc(inside[donor], outside[donor])["auroc"] for donor in inside]
        lines.append([kind, str(len(aurocs)), f"{np.mean(aurocs):.3f}", f"{min(aurocs):.3f}"])
    return to_markdown(["attack", "donors", "AUROC of trainings with and without a donor, mean", "lowest"], lines)


def main(args: PrivacyArguments) -> None:
    """Train and attack what is missing, print the table."""
    folder = Path(args.output_dir)
    grid = ("num_choices", "num_train_cells", "max_train_steps", "options", "output_dir")
    record = Record(
        folder / "privacy.json", {name: value for name, value in asdict(args).items() if name not in grid}, rows=[]
    )
    cells = read_cells(args.dataset)
    for run in runs(args, cells):
        if any(all(row[name] == value for name, value in run.items()) for row in record["rows"]):
            continue
        model = folder / "-".join(map(str, [*(run["donors"] or []), run["train_cells"], run["steps"], run["options"]]))
        parts = divide(cells, args, run["donors"], run["train_cells"])
        options = dict(option.split("=") for option in run["options"].split(",") if option)
        options |= {"max_train_steps": run["steps"], "n_top_genes": args.n_top_genes, "seed": args.seed}
        options |= {"report_to": "none", "validation_steps": 10**6, "overwrite_output_dir": True}
        if not (model / "model_index.json").exists():
            scrdit_diffusers.train(parts["train"], model, args.labels_key, **options)
        record["rows"].append(run | measure(args, model, parts))
        record.save()
        print(format_table(record["rows"][-1:]), flush=True)
    print(format_table(record["rows"]))
    if args.split_by:
        print(compare_donors(record["rows"]))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    torch.set_flush_denormal(True)
    try:
        main(HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses()[0])
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
