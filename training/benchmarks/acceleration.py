r"""Time and quality of scRDiT as published against this package's defaults, sampler by sampler, in one run.

    python training/benchmarks/acceleration.py --dataset pbmc_zheng_facs.h5ad --labels_key cell_type \
        --labels "CD19+ B" CD34+

The cells of `--labels` are split 60 / 20 / 20 into train, control and test. On the train cells, over the same highly
variable genes, (a) recipes/scrdit-paper.sh trains one unconditional model per label, at the width and length that
`--paper_*` give, and (b) train.py trains one model with its defaults. Every sampler then generates as many cells of
each label as there are test cells, and `evaluation.compare` compares them, all in log1p of counts per 10,000 over these
genes (values that are not counts are taken as they are). The same evaluation gives the ceiling (control cells) and a
baseline (Gaussian copula).

Times are CPU seconds, which other programs on the machine hardly change. The models at full size (2,000 genes; the
paper's of width 768) are timed untrained, on a few calls of the network, and scaled: all calls cost the same. Results
are written as they come, and the same command continues after an interruption.
"""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import diffusers
import matplotlib
import numpy as np
import pandas as pd
import torch
from _common import Record, to_markdown
from speed import DEFAULT, PAPER, make_pipeline
from transformers import HfArgumentParser

from scrdit_diffusers import SCRDiTPipeline, SCRDiTProcessor, read_cells, split_cells
from scrdit_diffusers.atomic import write_atomically
from scrdit_diffusers.checks import get_matrix, label_categories, looks_like_counts
from scrdit_diffusers.evaluation import baselines
from scrdit_diffusers.evaluation.compare import compare
from scrdit_diffusers.evaluation.space import TARGET_SUM, get_values
from scrdit_diffusers.values import normalize_log1p

matplotlib.use("Agg")
TRAINING = Path(__file__).resolve().parents[1]
METHODS = {"paper": f"{PAPER}, as published", "default": f"{DEFAULT}, this package"}
FULL_SIZE_CALLS = {"paper": 4, "default": 25}  # calls of the network that are timed at full size; more are scaled
FULL_SIZE_CELLS = {"paper": 64, "default": 512}
# Shown in the printed table; acceleration.json has all.
SHOWN = {
    "classifier_genes_auroc": "classifier, genes",
    "classifier_pcs_auroc": "classifier, PCs",
    "nearest_neighbor_accuracy": "1-NN",
    "w2": "W2",
    "gene_zero_fraction_mae": "zero fraction error",
    "gene_gene_r": "gene-gene r",
    "legacy_kl": "KL",
    "legacy_wasserstein": "Wasserstein",
    "legacy_mmd": "MMD",
    "legacy_zero_proportion_difference": "zero proportion",
    "legacy_coefficient_of_variation_difference": "CV",
}


class Sampler(NamedTuple):
    """A scheduler, its changes to the config that pipelines ship with, and the numbers of steps to try."""

    method: str
    name: str
    scheduler: str
    steps: tuple[int, ...]
    eta: float = 0.0
    config: tuple[tuple[str, Any], ...] = ()


# "leading" is the sub-sequence of DDIM (Song et al. 2020, appendix D.2): 0, c, 2c, ... which never visits T - 1, where
# the noise to start from belongs; "trailing", which pipelines ship with, starts at T - 1. With all 1,000 steps they
# agree. DDPM draws with the variance of the exact posterior (Ho et al. 2020, section 3.2). The default's DDPM takes all
# calls at or above the timestep where counts are decoded.
LEADING = (("timestep_spacing", "leading"),)
SAMPLERS = (
    Sampler("paper", "DDPM", "DDPMScheduler", (1000,)),
    Sampler("paper", "DDIM eta 1, leading", "DDIMScheduler", (100, 50), eta=1.0, config=LEADING),
    Sampler("default", "UniPC", "UniPCMultistepScheduler", (50, 25, 10, 5)),
    Sampler("paper", "UniPC", "UniPCMultistepScheduler", (50, 20, 10)),
    Sampler("paper", "DDIM eta 1, trailing", "DDIMScheduler", (100, 50), eta=1.0),
    Sampler("paper", "DPM-Solver++ 2M", "DPMSolverMultistepScheduler", (50, 20, 10)),
    Sampler("paper", "DDIM eta 0", "DDIMScheduler", (50, 20)),
    Sampler("default", "DPM-Solver++ 2M", "DPMSolverMultistepScheduler", (20, 10)),
    Sampler("default", "DDIM eta 1, trailing", "DDIMScheduler", (100, 50), eta=1.0),
    Sampler("default", "DDPM", "DDPMScheduler", (800,)),
)


@dataclass
class AccelerationArguments:
    """Command-line arguments."""

    dataset: str = field(metadata={"help": "Cells: .h5ad, .zarr, dataset folder or Hub id; counts or log-normalized."})
    labels_key: str = field(metadata={"help": "Column of obs with the cell types."})
    labels: list[str] = field(default_factory=list, metadata={"help": "Cell types to use; all if not given."})
    layer: str | None = field(default=None, metadata={"help": "Layer that holds the values; X if not given."})
    n_top_genes: int = field(default=500, metadata={"help": "Highly variable genes that both methods model."})
    paper_attention_head_dim: int = field(default=16, metadata={"help": "Width of the paper's 8 heads (paper: 96)."})
    paper_num_train_epochs: int = field(default=150, metadata={"help": "Epochs of the paper's recipe (paper: 1,600)."})
    max_train_steps: int | None = field(
        default=None, metadata={"help": "Steps of the default recipe; as many as train.py chooses if not given."}
    )
    num_seeds: int = field(default=1, metadata={"help": "Seeds of noise and evaluation; the table shows means."})
    batch_size: int = field(default=512, metadata={"help": "Cells generated at a time."})
    full_size: bool = field(default=True, metadata={"help": "Also time the models at full size."})
    seed: int = field(default=0, metadata={"help": "Seed of split and training, and the first of the others."})
    output_dir: str = field(default="outputs/acceleration", metadata={"help": "Folder of cells, models and results."})
    figure: str | None = field(default=None, metadata={"help": "PNG to write; acceleration.png in it if not given."})


def prepare_cells(args: AccelerationArguments, folder: Path) -> None:
    """Split the cells; write train, control, test and the train cells of each label, with the same genes."""
    adata = read_cells(args.dataset)
    known = label_categories(adata.obs, args.labels_key)
    labels = args.labels or known
    if missing := set(labels) - set(known):
        raise ValueError(f"--labels {sorted(missing)} occur in no cell of obs[{args.labels_key!r}]; it has {known}.")
    adata = adata[adata.obs[args.labels_key].astype(str).isin(labels)].copy()
    rest, test = split_cells(adata, args.labels_key, 0.2, args.seed)
    train, control = split_cells(adata[rest], args.labels_key, 0.25, args.seed)
    parts = {"train": adata[rest[train]], "control": adata[rest[control]], "test": adata[test]}
    space = "counts" if looks_like_counts(get_matrix(adata, args.layer, expect_counts=False)) else "log_normalized"
    options = dict(value_space=space, n_top_genes=args.n_top_genes, layer=args.layer)
    genes = SCRDiTProcessor.from_anndata(parts["train"].copy(), **options).var_names
    for name, part in list(parts.items()):
        values = get_values(part, pd.Index(genes), args.layer, space, name)
        obs = part.obs[[args.labels_key]].astype(str)
        parts[name] = ad.AnnData(values, obs=obs, var=pd.DataFrame(index=pd.Index(genes)))
    for i, label in enumerate(labels):
        parts[f"train-{i}"] = parts["train"][parts["train"].obs[args.labels_key] == label].copy()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "genes.txt").write_text("\n".join(genes))
    (folder / "labels.json").write_text(json.dumps(labels))
    for name, part in parts.items():
        part.write_h5ad(folder / f"{name}.h5ad")


def train_models(args: AccelerationArguments, folder: Path, labels: list[str], counts: bool) -> None:
    """Train what is not trained yet, with the commands that a user would run."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    common = ["--genes", str(folder / "cells/genes.txt"), "--seed", str(args.seed), "--report_to", "none"]
    common += ["--resume_from_checkpoint", "latest", "--validation_steps", "1000000"]
    paper = [*common, "--attention_head_dim", str(args.paper_attention_head_dim)]
    paper += ["--num_train_epochs", str(args.paper_num_train_epochs)] + (["--target_sum", "1e4"] if counts else [])
    commands = {
        f"paper-{i}": [str(TRAINING / "recipes/scrdit-paper.sh"), str(folder / f"cells/train-{i}.h5ad")]
        + [str(folder / f"paper-{i}"), *paper]
        for i in range(len(labels))
    }
    commands["default"] = ["accelerate", "launch", "--num_processes", "1", str(TRAINING / "train.py"), *common]
    commands["default"] += ["--dataset", str(folder / "cells/train.h5ad"), "--output_dir", str(folder / "default")]
    commands["default"] += ["--labels_key", args.labels_key]
    commands["default"] += ["--max_train_steps", str(args.max_train_steps)] if args.max_train_steps else []
    commands["default"] += [] if counts else ["--value_space", "log_normalized"]
    for name, command in commands.items():
        if not (folder / name / "model_index.json").exists():
            subprocess.run(command, check=True, env=environment)


class Trained(NamedTuple):
    """Pipelines of a recipe: an unconditional one for each label, or a conditional one under the key `None`."""

    pipelines: dict[str | None, SCRDiTPipeline]
    scheduler_config: Any  # that the pipelines came with

    @classmethod
    def load(cls, folders: dict[str | None, Path]) -> "Trained":
        """Load the pipelines from their folders."""
        pipelines = {label: SCRDiTPipeline.from_pretrained(folder) for label, folder in folders.items()}
        for pipe in pipelines.values():
            pipe.set_progress_bar_config(disable=True)
        return cls(pipelines, next(iter(pipelines.values())).scheduler.config)

    def generate(
        self, sampler: Sampler, steps: int, obs: pd.DataFrame, labels_key: str, batch_size: int, seed: int
    ) -> tuple[ad.AnnData, float]:
        """Log-normalized cells with the labels of `obs`, and the CPU seconds it took to generate them."""
        options = {"num_inference_steps": steps, "batch_size": batch_size, "eta": sampler.eta}
        options["generator"] = torch.Generator().manual_seed(seed)
        parts, seconds = [], 0.0
        for label, pipe in self.pipelines.items():
            scheduler = getattr(diffusers, sampler.scheduler)
            pipe.scheduler = scheduler.from_config(self.scheduler_config, **dict(sampler.config))
            rows = obs if label is None else obs[obs[labels_key] == label]
            start = time.process_time()
            part = pipe(num_cells=len(rows), obs=rows if label is None else None, **options).adata
            seconds += time.process_time() - start
            part.obs = rows
            parts.append(part)
        counts = parts[0].uns["scrdit"]["value_space"] == "counts"
        cells = ad.concat(parts)
        return (log_normalized(cells) if counts else cells), seconds


def log_normalized(cells: ad.AnnData) -> ad.AnnData:
    """Turn counts into log1p of counts per 10,000."""
    return ad.AnnData(normalize_log1p(cells.X, TARGET_SUM), obs=cells.obs, var=cells.var)


def full_size_seconds(method: str, calls: int, timed: dict[str, float]) -> float:
    """CPU seconds per 1,000 cells of a model at full size, timed once for each number of calls and kept in `timed`."""
    measured = min(calls, FULL_SIZE_CALLS[method])
    key = f"{method}, {measured} calls"
    if key not in timed:
        pipe = make_pipeline({"paper": PAPER, "default": DEFAULT}[method], "cpu", torch.float32)
        pipe(8, num_inference_steps=1, output_type="np")  # warm up
        num_cells = FULL_SIZE_CELLS[method]
        start = time.process_time()
        pipe(num_cells, num_inference_steps=measured, output_type="np")
        timed[key] = (time.process_time() - start) * 1000 / num_cells
    return timed[key] * calls / measured


def summarize(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Means over seeds, and how many times faster than the paper's DDPM each sampler is."""
    table = pd.json_normalize(rows)
    table = table.groupby(["method", "sampler", "steps"], sort=False).mean(numeric_only=True).drop(columns="seed")
    for column in table.columns.intersection(["seconds", "full_size_seconds"]):
        reference = table[column].xs(("paper", "DDPM"), level=("method", "sampler")).iloc[0]
        table[column.replace("seconds", "speedup")] = reference / table[column]
    return table.rename(columns=lambda name: name.removeprefix("metrics."))


def format_table(table: pd.DataFrame) -> str:
    """Format the table; real cells and the baseline have no time."""
    columns = {
        "seconds": "CPU s per 1,000 cells",
        "full_size_seconds": "... at full size",
        "full_size_speedup": "faster",
    }
    columns |= SHOWN
    lines = []
    for (method, sampler, steps), row in table.iterrows():
        figures = [row.get(name, np.nan) for name in columns]
        texts = ["" if np.isnan(x) else f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in figures]
        lines.append([METHODS.get(method, method), sampler, str(steps or ""), *texts])
    return to_markdown(["method", "sampler", "steps", *columns.values()], lines)


def draw(table: pd.DataFrame, time_column: str, path: Path) -> None:
    """Quality against time, one line per sampler."""
    figure, axes = matplotlib.pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colors, markers = {"paper": "tab:orange", "default": "tab:blue"}, "osv^Dx"
    panels = {"classifier_genes_auroc": "classifier on genes, AUROC", "w2": "W2 in 50 PCs"}
    for axis, (metric, label) in zip(axes, panels.items(), strict=True):
        for method in METHODS:
            for sampler, marker in zip((s for s in SAMPLERS if s.method == method), markers, strict=False):
                if (method, sampler.name) in table.index.droplevel("steps"):
                    rows = table.xs((method, sampler.name), level=("method", "sampler"))
                    axis.plot(
                        *(rows[time_column], rows[metric]),
                        marker=marker,
                        color=colors[method],
                        alpha=0.8,
                        markersize=5,
                        linewidth=0.8,
                        label=f"{'paper' if method == 'paper' else 'this package'}: {sampler.name}",
                    )
        real, copula = (table[metric].xs(name, level="method").iloc[0] for name in ("real cells", "Gaussian copula"))
        axis.axhline(real, color="black", linestyle="--", linewidth=1, label="real cells")
        axis.axhline(copula, color="gray", linestyle=":", linewidth=1, label="Gaussian copula")
        axis.set_xscale("log")
        where = "full size" if time_column.startswith("full") else "size of this run"
        axis.set_xlabel(f"CPU seconds per 1,000 cells, {where}")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    matplotlib.pyplot.close(figure)


def main(args: AccelerationArguments) -> None:
    """Train, sample and evaluate what is missing, print the table, draw it."""
    folder = Path(args.output_dir)
    may_change = ("num_seeds", "figure", "output_dir")
    fixed = {name: value for name, value in asdict(args).items() if name not in may_change}
    record = Record(folder / "acceleration.json", fixed, full_size={}, rows=[])
    if not (folder / "cells").exists():
        with write_atomically(folder / "cells") as temporary:
            prepare_cells(args, temporary)
    labels = json.loads((folder / "cells/labels.json").read_text())
    parts = {name: ad.read_h5ad(folder / f"cells/{name}.h5ad") for name in ("train", "control", "test")}
    counts = looks_like_counts(parts["train"].X)

    # 1. Train
    record.save()
    train_models(args, folder, labels, counts)
    trained = {
        "paper": Trained.load({label: folder / f"paper-{i}" for i, label in enumerate(labels)}),
        "default": Trained.load({None: folder / "default"}),
    }
    record["machine"] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    evaluated = {name: log_normalized(part) if counts else part for name, part in parts.items()}

    def evaluate(method: str, sampler: str, steps: int, seed: int, cells: ad.AnnData, **seconds: float) -> None:
        options = {"labels_key": args.labels_key, "value_space": "log_normalized", "seed": seed}
        table = compare(evaluated["test"], cells, evaluated["train"], **options).query("group == 'all'")
        metrics = table.set_index("metric")["value"].dropna().to_dict()
        row = {"method": method, "sampler": sampler, "steps": steps, "seed": seed, **seconds, "metrics": metrics}
        record["rows"].append(row)
        record.save()
        print(f"{method}, {sampler}, {steps} steps, seed {seed}: {metrics['classifier_genes_auroc']:.3f}", flush=True)

    # 2. Sample and evaluate
    for seed in range(args.seed, args.seed + args.num_seeds):
        done = {(row["method"], row["sampler"], row["steps"]) for row in record["rows"] if row["seed"] == seed}
        if ("real cells", "", 0) not in done:
            evaluate("real cells", "", 0, seed, evaluated["control"])
        if ("Gaussian copula", "", 0) not in done:
            rng = np.random.default_rng(seed)
            copula = baselines.gaussian_copula(parts["train"], parts["test"].obs, args.labels_key, rng)
            evaluate("Gaussian copula", "", 0, seed, log_normalized(copula) if counts else copula)
        for sampler in SAMPLERS:
            for steps in sampler.steps:
                if (sampler.method, sampler.name, steps) in done:
                    continue
                options = (parts["test"].obs, args.labels_key, args.batch_size, seed)
                cells, seconds = trained[sampler.method].generate(sampler, steps, *options)
                times = {"seconds": seconds * 1000 / cells.n_obs}
                if args.full_size:
                    times["full_size_seconds"] = full_size_seconds(sampler.method, steps, record["full_size"])
                evaluate(sampler.method, sampler.name, steps, seed, cells, **times)

    # 3. Show
    table = summarize(record["rows"])
    print(format_table(table))
    column = "full_size_seconds" if "full_size_seconds" in table else "seconds"
    draw(table, column, Path(args.figure or folder / "acceleration.png"))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        main(HfArgumentParser(AccelerationArguments).parse_args_into_dataclasses()[0])
    except (TypeError, ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
