"""Draws and writes what the pages take from records and code: `docs/_generated`, at each build.

Figures and a table come from `hub_cards/*/metrics.json`, the arguments of the commands from the dataclasses of
`training/`, and the verdicts on schedulers from the package.
"""

import importlib
import json
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from scrdit_diffusers.evaluation.baselines import BASELINE_NAMES
from scrdit_diffusers.evaluation.compare import METRIC_NAMES
from scrdit_diffusers.schedulers import SCHEDULERS

matplotlib.use("Agg")
REPOSITORY = Path(__file__).parents[1]
OUTPUT = Path(__file__).parent / "_generated"
REALISM = ("classifier_genes_auroc", "classifier_pcs_auroc", "nearest_neighbor_accuracy")
SHOWN = (*REALISM, "w2", "library_size_ks", "gene_gene_r", "label_accuracy", "train_on_synthetic_f1")
COMMANDS = {
    "train": ("arguments", "TrainingArguments"),
    "generate": ("generate", "GenerationArguments"),
    "evaluate": ("evaluate", "EvaluationArguments"),
    "denoise": ("denoise", "DenoisingArguments"),
    "annotate": ("annotate", "AnnotationArguments"),
    "simulate": ("simulate", "SimulationArguments"),
    "augment": ("augment", "AugmentationArguments"),
    "complete": ("complete", "CompletionArguments"),
    "translate": ("translate", "TranslationArguments"),
    "interpolate": ("interpolate", "InterpolationArguments"),
    "distill": ("distill", "DistillationArguments"),
    "convert_checkpoint": ("convert_checkpoint", "ConversionArguments"),
}
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "savefig.bbox": "tight", "savefig.dpi": 150})


def read_records() -> dict[str, dict[str, Any]]:
    """Read the evaluations in the repository, by the name of the pipeline."""
    files = sorted(REPOSITORY.glob("hub_cards/*/metrics.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in files}


def overall(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Find the rows of all cells, by metric."""
    return {row["metric"]: row for row in record["rows"] if row["group"] == "all"}


def draw_realism(records: dict[str, dict[str, Any]]) -> None:
    """Draw generated cells, other real cells and baselines, for each metric whose best value is 0.5."""
    _, panels = plt.subplots(1, len(REALISM), figsize=(11, 0.6 * len(records) + 1.2), sharey=True)
    sources = {"value": "generated", "ceiling": "other real cells"} | BASELINE_NAMES
    styles = dict(zip(sources, ("o", "|", "^", "s", "D"), strict=False))
    for axes, metric in zip(panels, REALISM, strict=True):
        axes.axvline(0.5, color="0.8", zorder=0)
        for source, title in sources.items():
            points = [(overall(record)[metric].get(source), y) for y, record in enumerate(records.values())]
            points = [point for point in points if point[0] is not None]
            strong = source in ("value", "ceiling")
            color = {"value": "tab:blue", "ceiling": "black"}.get(source)
            axes.plot(
                *zip(*points, strict=True),
                styles[source],
                label=title,
                color=color,
                markersize=(14 if source == "ceiling" else 8) if strong else 5,
                alpha=1 if strong else 0.6,
            )
        axes.set(xlabel=METRIC_NAMES[metric], ylim=(len(records) - 0.5, -0.5))
    panels[0].set_yticks(range(len(records)), records)
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.savefig(OUTPUT / "realism.png")
    plt.close()


def draw_steps(records: dict[str, dict[str, Any]]) -> None:
    """Draw quality against network calls."""
    metrics = ("nearest_neighbor_accuracy", "gene_gene_r", "library_size_ks")
    _, panels = plt.subplots(1, len(metrics), figsize=(11, 2.8))
    for axes, metric in zip(panels, metrics, strict=True):
        for name, record in records.items():
            curve = record["steps_curve"]
            axes.plot([p["num_inference_steps"] for p in curve], [p[metric] for p in curve], ".-", label=name)
        axes.set(xlabel="network calls", title=METRIC_NAMES[metric], xscale="log")
        axes.set_xticks([5, 10, 20, 50], [5, 10, 20, 50])
        axes.minorticks_off()
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.savefig(OUTPUT / "steps.png")
    plt.close()


def make_table(header: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def quality_table(records: dict[str, dict[str, Any]]) -> str:
    """Compare generated cells with other real cells, the copula and scVI's prior."""
    rows = []
    for name, record in records.items():
        for metric in SHOWN:
            row = overall(record)[metric]
            spread = f"{row['value']:.3f}\u00a0±\u00a0{row['value_std']:.3f}"
            others = [row.get(source) for source in ("ceiling", "gaussian_copula", "scvi_prior")]
            met = {True: "yes", False: "no", None: ""}[row["met"]]
            numbers = ["" if value is None else f"{value:.3f}" for value in others]
            link = f"[{name}](cards/{name}.md)" if metric == SHOWN[0] else ""
            rows.append([link, METRIC_NAMES[metric], spread, *numbers, met])
    header = ["pipeline", "metric", "generated", "other real cells", "Gaussian copula", "scVI's prior", "aim met"]
    return make_table(header, rows)


def arguments_table(module: str, arguments_class: str) -> str:
    """List every argument of a script, its default and its help."""
    rows = []
    for argument in fields(getattr(importlib.import_module(module), arguments_class)):
        default = argument.default if argument.default is not MISSING else argument.default_factory()
        words = default if isinstance(default, list) else [] if default is None else [default]
        shown = f"`{' '.join(map(str, words))}`" if words else ""
        text = argument.metadata["help"].replace(f" (default: {default})", "")  # it has a column of its own
        text = text.replace("%%", "%").replace("*", "\\*")
        rows.append([f"`--{argument.name}`", shown, text])
    return make_table(["argument", "default", "meaning"], rows)


def schedulers_table() -> str:
    """List the verdict on every scheduler of diffusers."""
    rows = []
    for name, verdict in sorted(SCHEDULERS.items(), key=lambda item: (not item[1].prediction_types, item[0])):
        remarks = [verdict.reason] if verdict.reason else []
        if not verdict.any_schedule:
            remarks.append("it needs a noise schedule that leaves some signal at the last timestep, such as `linear`")
        rows.append([f"`{name}`", ", ".join(verdict.prediction_types) or "none", "; ".join(remarks)])
    return make_table(["scheduler", "prediction types", "remarks"], rows)


def write_all() -> None:
    """Write everything into `docs/_generated`."""
    OUTPUT.mkdir(exist_ok=True)
    records = read_records()
    draw_realism(records)
    draw_steps(records)
    sys.path.append(str(REPOSITORY / "training"))  # scripts import each other by name
    texts = {name: arguments_table(*place) for name, place in COMMANDS.items()}
    texts |= {"quality": quality_table(records), "schedulers": schedulers_table()}
    for name, text in texts.items():
        (OUTPUT / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_all()
