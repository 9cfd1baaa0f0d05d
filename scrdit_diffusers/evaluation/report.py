"""The report of an evaluation: one self-contained HTML file that starts with the verdict in plain words."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import anndata as ad
import jinja2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from scrdit_diffusers.processing_scrdit import RARE_LABEL_CELLS

from . import plotting
from .baselines import BASELINE_NAMES
from .compare import METRIC_NAMES
from .privacy import ATTACK_NAMES, in_words

TEMPLATES = jinja2.PackageLoader("scrdit_diffusers.evaluation", ".")

LABEL_METRICS = ("classifier_pcs_auroc", "nearest_neighbor_accuracy", "w2", "label_accuracy", "effect_size_slope")
STEP_METRICS = ("w2", "nearest_neighbor_accuracy", "gene_gene_r", "library_size_ks", "gene_zero_fraction_mae", "mmd2")


class ReportFigure(NamedTuple):
    """A figure of the report."""

    title: str
    caption: str  # one line: how to read it
    figure: Figure


def draw_figures(
    record: dict[str, Any], real: ad.AnnData, synthetic: ad.AnnData, train: ad.AnnData, value_space: str = "counts"
) -> list[ReportFigure]:
    """Draw the figures of the report.

    Parameters
    ----------
    record
        Contents of metrics.json; gives the labels and the quality against steps.
    real, synthetic, train
        Test cells, generated cells and training cells.
    value_space
        "counts", or "log_normalized" for values that are log-normalized already.
    """
    key = record["labels_key"]
    embedding = plotting.joint_umap(real, synthetic, train, labels_key=key, value_space=value_space)
    figures = []

    def add(title: str, caption: str, axes: Any) -> None:
        figures.append(ReportFigure(title, caption, np.ravel(axes)[0].figure))

    add("UMAP by origin", "Real and generated cells should mix everywhere.", plotting.umap(embedding))
    if key:
        by_label = plotting.umap(embedding, key)
        add("UMAP by label", "Beside the figure above: no part of a label should be of one origin.", by_label)
    several: list[tuple[str, str, Any]] = [
        ("Genes", "A point is a gene, and should lie on the diagonal.", plotting.gene_statistics),
        ("Mean and variance", "Both clouds should rise from the dashed line alike.", plotting.mean_variance),
        ("Zero fraction", "Both clouds should lie above the dashed line alike.", plotting.mean_zero_fraction),
        ("Library size and genes detected", "Both outlines should coincide.", plotting.library_size_histogram),
        ("Gene-gene correlation", "Both squares should show the same blocks.", plotting.gene_gene_correlation),
    ]
    for title, caption, draw in several:
        add(title, caption, draw(real, synthetic, value_space=value_space))
    if sum(cells["train"] >= 3 for cells in record["labels"].values()) > 1:
        dots = plotting.marker_dotplot(real, synthetic, train, key, value_space=value_space)
        add("Marker genes", "Each dot should have the same size and color on both sides.", dots)
    if record["steps_curve"]:
        figures.append(draw_steps_curve(record))
    return figures


def draw_steps_curve(record: dict[str, Any]) -> ReportFigure:
    """Draw the quality against steps of metrics.json, beside other real cells and the baselines."""
    curve = pd.DataFrame(record["steps_curve"]).set_index("num_inference_steps")[list(STEP_METRICS[:4])]
    overall = {row["metric"]: row for row in record["rows"] if row["group"] == "all"}
    titles = {"ceiling": "real cells"} | {name: BASELINE_NAMES[name] for name in record["baselines"]}
    references = {
        title: pd.Series({METRIC_NAMES[metric]: overall[metric][name] for metric in STEP_METRICS[:4]})
        for name, title in titles.items()
    }
    panels = plt.subplots(2, 2, figsize=(9.6, 7.6), layout="constrained")[1].ravel()
    plotting.quality_against_steps(curve.rename(columns=METRIC_NAMES), references, panels)
    return ReportFigure(
        "Quality against steps", "The line should reach that of real cells with few calls.", panels[0].figure
    )


def render_report(record: dict[str, Any], figures: Sequence[ReportFigure]) -> str:
    """Render the HTML page, which needs no other file.

    Parameters
    ----------
    record
        Contents of metrics.json.
    figures
        Figures in order; each is embedded as PNG and closed.
    """
    overall = {row["metric"]: row for row in record["rows"] if row["group"] == "all"}
    baselines = [name for name in BASELINE_NAMES if name in record["baselines"]]
    by_label = {}
    for label, cells in record["labels"].items():
        rows = {row["metric"]: row for row in record["rows"] if row["group"] == label}
        decided = [row["met"] for row in rows.values() if row["met"] is not None]
        by_label[label] = {"cells": cells, "rows": rows, "met": sum(decided), "decided": len(decided)}
    embedded = []
    for title, caption, figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, bbox_inches="tight", facecolor="white")
        plt.close(figure)
        embedded.append((title, caption, base64.b64encode(buffer.getvalue()).decode()))
    found = record.get("privacy")
    environment = jinja2.Environment(loader=TEMPLATES, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"value": format_value, "signs": format_signs}
    return environment.get_template("report.html.jinja").render(
        record=record,
        verdict=verdict(record),
        overall=overall,
        by_label=by_label,
        baselines=baselines,
        figures=embedded,
        privacy=found,
        privacy_in_words=in_words(found) if found else [],
        ATTACK_NAMES=ATTACK_NAMES,
        METRIC_NAMES=METRIC_NAMES,
        BASELINE_NAMES=BASELINE_NAMES,
        LABEL_METRICS=[metric for metric in LABEL_METRICS if metric in overall],
        STEP_METRICS=STEP_METRICS,
        RARE_LABEL_CELLS=RARE_LABEL_CELLS,
    )


def format_value(value: float | None) -> str:
    """Format a value with as many decimals as its size asks for; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    digits = 2 if abs(value) >= 10 else 3 if abs(value) >= 0.01 or value == 0 else 4
    return f"{value:.{digits}f}"


def format_signs(text: str) -> str:
    """Replace ASCII by mathematical signs in an aim."""
    return text.replace("<=", "≤").replace(">=", "≥").replace(" x ", " × ").replace(" - ", " − ")


def verdict(record: dict[str, Any]) -> list[str]:
    """Say in plain words what the values of `record` mean, topic by topic."""
    rows = {row["metric"]: row for row in record["rows"] if row["group"] == "all"}
    baselines = {name: title for name, title in BASELINE_NAMES.items() if name in record["baselines"]}
    auroc = rows["classifier_genes_auroc"]
    others = [f"real cells {auroc['ceiling']:.2f}"] + [
        f"{title} {auroc[name]:.2f}" for name, title in baselines.items()
    ]
    sentences = [
        f"A classifier that sees all genes tells generated from real cells with AUROC {auroc['value']:.2f} "
        f"(0.50: indistinguishable; {'; '.join(others)})."
    ]

    missed = [row for row in rows.values() if row["met"] is False]
    decided = sum(row["met"] is not None for row in rows.values())
    passed = f"{decided - len(missed)} of {decided} aims are met."
    if missed:
        passed += f" Not met: {'; '.join(METRIC_NAMES[row['metric']] for row in missed)}."
    sentences.append(passed)

    for name, title in baselines.items():
        # A value is better if it is nearer to that of real cells. The paper's metrics have no aim and are left out.
        decisive = [row for metric, row in rows.items() if not metric.startswith("legacy") and row[name] is not None]
        nearer = sum(abs(row["value"] - row["ceiling"]) < abs(row[name] - row["ceiling"]) for row in decisive)
        sentences.append(
            f"In {nearer} of {len(decisive)} metrics the generated cells are nearer to real cells than the baseline "
            f"“{title}” is."
        )

    ratio, share, copies = (
        rows[metric]
        for metric in ("nearest_train_distance_ratio", "share_nearer_to_train", "share_duplicates_of_train")
    )
    clean = ratio["met"] and share["met"] and copies["met"]
    sentences.append(
        f"{'No sign of memorization' if clean else 'Possible memorization'}: {copies['value']:.1%} of the generated "
        f"cells equal a training cell (real cells {copies['ceiling']:.1%}), {share['value']:.0%} lie nearer to "
        f"training than to as many unseen cells (50% is expected), and the distance to the nearest training cell is "
        f"{ratio['value']:.2f} times that of unseen real cells."
    )
    if "label_accuracy" in rows:
        accuracy = rows["label_accuracy"]
        text = (
            f"Labels: a classifier trained on real cells finds the label of {accuracy['value']:.0%} of the generated "
            f"cells (real cells {accuracy['ceiling']:.0%}{'' if accuracy['met'] else '; the aim is not met'})."
        )
        if "train_on_synthetic_f1" in rows:
            f1 = rows["train_on_synthetic_f1"]
            text += (
                f" One trained on generated cells reaches F1 {f1['value']:.2f} on real cells, where training on as "
                f"many real cells gives {f1['ceiling']:.2f}{'' if f1['met'] else '; the aim is not met'}."
            )
        per_label = [row for row in record["rows"] if row["metric"] == "classifier_pcs_auroc" and row["group"] != "all"]
        if per_label:
            worst = max(per_label, key=lambda row: row["value"] - row["ceiling"])
            text += (
                f" Furthest from real is {worst['group']} (classifier on PCs {worst['value']:.2f}, real cells "
                f"{worst['ceiling']:.2f})."
            )
        rare = [label for label, cells in record["labels"].items() if cells["train"] < RARE_LABEL_CELLS]
        if rare:
            text += f" Fewer than {RARE_LABEL_CELLS} training cells, so these may be poor: {', '.join(rare)}."
        sentences.append(text)
    return sentences
