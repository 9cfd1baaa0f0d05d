"""The report of an evaluation: one HTML file that holds everything, with the verdict in plain words first."""

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

from . import plotting
from .processing_scrdit import RARE_LABEL_CELLS

METRIC_NAMES = {
    "mmd2": "MMD²",
    "w2": "Wasserstein-2 distance",
    "classifier_pcs_auroc": "classifier on PCs, AUROC",
    "classifier_genes_auroc": "classifier on all genes, AUROC",
    "nearest_neighbor_accuracy": "1-nearest-neighbour accuracy",
    "nearest_neighbor_accuracy_of_synthetic": "1-nearest-neighbour accuracy, generated cells alone",
    "nearest_neighbor_accuracy_of_real": "1-nearest-neighbour accuracy, real cells alone",
    "ilisi": "iLISI (mixing)",
    "gene_mean_r": "gene means, r",
    "gene_variance_r": "gene variances, r",
    "gene_zero_fraction_mae": "zero fractions, mean error",
    "library_size_ks": "library size, KS",
    "genes_detected_ks": "genes detected, KS",
    "gene_gene_r": "gene-gene correlations, r",
    "label_accuracy": "label accuracy",
    "train_on_synthetic_f1": "trained on generated, F1 on real",
    "effect_size_slope": "effect sizes, slope",
    "nearest_train_distance_ratio": "distance to nearest training cell, ratio",
    "share_nearer_to_train": "share nearer to training cells",
    "share_duplicates_of_train": "share equal to a training cell",
    "legacy_kl": "scRDiT: KL",
    "legacy_wasserstein": "scRDiT: Wasserstein",
    "legacy_mmd": "scRDiT: MMD",
    "legacy_zero_proportion_difference": "scRDiT: zero proportion",
    "legacy_coefficient_of_variation_difference": "scRDiT: coefficient of variation",
}
FLOOR_NAMES = {
    "resample_genes": "genes resampled alone",
    "gaussian_copula": "Gaussian copula",
    "scvi_prior": "scVI prior",
}
LABEL_METRICS = ("classifier_pcs_auroc", "nearest_neighbor_accuracy", "w2", "label_accuracy", "effect_size_slope")
STEP_METRICS = ("w2", "nearest_neighbor_accuracy", "gene_gene_r", "library_size_ks", "gene_zero_fraction_mae", "mmd2")


class Picture(NamedTuple):
    """A figure of the report."""

    title: str
    caption: str  # one line: how to read it
    figure: Figure


def draw_pictures(
    record: dict[str, Any], real: ad.AnnData, synthetic: ad.AnnData, train: ad.AnnData, value_space: str = "counts"
) -> list[Picture]:
    """Draw the figures of the report.

    Parameters
    ----------
    record
        What `training/evaluate.py` writes as metrics.json; gives the labels and the quality against steps.
    real, synthetic, train
        Test cells, generated cells and training cells.
    value_space
        "counts", or "log_normalized" for values that are log-normalised already.
    """
    key = record["labels_key"]
    embedding = plotting.joint_umap(real, synthetic, train, labels_key=key, value_space=value_space)
    pictures = []

    def add(title: str, caption: str, axes: Any) -> None:
        pictures.append(Picture(title, caption, np.ravel(axes)[0].figure))

    add("UMAP by origin", "Real and generated cells should mix everywhere.", plotting.umap(embedding))
    if key:
        by_label = plotting.umap(embedding, key)
        add("UMAP by label", "Beside the picture above: no part of a label should be of one origin.", by_label)
    several: list[tuple[str, str, Any]] = [
        ("Genes", "A point is a gene, and should lie on the diagonal.", plotting.gene_statistics),
        ("Mean and variance", "Both clouds should rise from the dashed line alike.", plotting.mean_variance),
        ("Zero fraction", "Both clouds should lie above the dashed line alike.", plotting.mean_zero_fraction),
        ("Library size and genes detected", "Both outlines should coincide.", plotting.cell_statistics),
        ("Gene-gene correlation", "Both squares should show the same blocks.", plotting.gene_gene_correlation),
    ]
    for title, caption, draw in several:
        add(title, caption, draw(real, synthetic, value_space=value_space))
    if sum(cells["train"] >= 3 for cells in record["labels"].values()) > 1:
        dots = plotting.marker_dotplot(real, synthetic, train, key, value_space=value_space)
        add("Marker genes", "Each dot should have the same size and colour on both sides.", dots)
    if record["steps_curve"]:
        pictures.append(draw_steps_curve(record))
    return pictures


def draw_steps_curve(record: dict[str, Any]) -> Picture:
    """Draw the quality against steps of metrics.json, beside other real cells and the floors."""
    curve = pd.DataFrame(record["steps_curve"]).set_index("num_inference_steps")[list(STEP_METRICS[:4])]
    overall = {row["metric"]: row for row in record["rows"] if row["group"] == "all"}
    titles = {"ceiling": "real cells"} | {name: FLOOR_NAMES[name] for name in record["floors"]}
    references = {
        title: pd.Series({METRIC_NAMES[metric]: overall[metric][name] for metric in STEP_METRICS[:4]})
        for name, title in titles.items()
    }
    panels = plt.subplots(2, 2, figsize=(9.6, 7.6), layout="constrained")[1].ravel()
    plotting.quality_against_steps(curve.rename(columns=METRIC_NAMES), references, panels)
    return Picture(
        "Quality against steps", "The line should reach that of real cells with few calls.", panels[0].figure
    )


def render_report(record: dict[str, Any], pictures: Sequence[Picture]) -> str:
    """Make the HTML page, which refers to nothing outside itself.

    Parameters
    ----------
    record
        What `training/evaluate.py` writes as metrics.json.
    pictures
        Figures in their order; each is embedded as PNG and closed.
    """
    overall = {row["metric"]: row for row in record["rows"] if row["group"] == "all"}
    floors = [name for name in FLOOR_NAMES if name in record["floors"]]
    by_label = {}
    for label, cells in record["labels"].items():
        rows = {row["metric"]: row for row in record["rows"] if row["group"] == label}
        decided = [row["met"] for row in rows.values() if row["met"] is not None]
        by_label[label] = {"cells": cells, "rows": rows, "met": sum(decided), "decided": len(decided)}
    embedded = []
    for title, caption, figure in pictures:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, bbox_inches="tight", facecolor="white")
        plt.close(figure)
        embedded.append((title, caption, base64.b64encode(buffer.getvalue()).decode()))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": format_figure, "signs": format_signs}
    return environment.from_string(TEMPLATE).render(
        record=record,
        verdict=verdict(record),
        overall=overall,
        by_label=by_label,
        floors=floors,
        pictures=embedded,
        METRIC_NAMES=METRIC_NAMES,
        FLOOR_NAMES=FLOOR_NAMES,
        LABEL_METRICS=[metric for metric in LABEL_METRICS if metric in overall],
        STEP_METRICS=STEP_METRICS,
        RARE_LABEL_CELLS=RARE_LABEL_CELLS,
    )


def format_figure(value: float | None) -> str:
    """Format a figure with as many decimals as its size asks for; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    digits = 2 if abs(value) >= 10 else 3 if abs(value) >= 0.01 or value == 0 else 4
    return f"{value:.{digits}f}"


def format_signs(text: str) -> str:
    """Replace what stands for mathematical signs in an aim."""
    return text.replace("<=", "≤").replace(">=", "≥").replace(" x ", " × ").replace(" - ", " − ")


def verdict(record: dict[str, Any]) -> list[str]:
    """Say in plain words what the figures of `record` mean, a sentence or a few per topic."""
    rows = {row["metric"]: row for row in record["rows"] if row["group"] == "all"}
    floors = {name: title for name, title in FLOOR_NAMES.items() if name in record["floors"]}
    auroc = rows["classifier_genes_auroc"]
    others = [f"real cells {auroc['ceiling']:.2f}"] + [f"{title} {auroc[name]:.2f}" for name, title in floors.items()]
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

    for name, title in floors.items():
        # A figure is better if it lies nearer to that of real cells. The paper's are left out, they have no aim.
        judged = [row for metric, row in rows.items() if not metric.startswith("legacy") and row[name] is not None]
        nearer = sum(abs(row["value"] - row["ceiling"]) < abs(row[name] - row["ceiling"]) for row in judged)
        sentences.append(
            f"In {nearer} of {len(judged)} figures the generated cells are nearer to real cells than the baseline "
            f"“{title}” is."
        )

    ratio, share, copies = (
        rows[metric]
        for metric in ("nearest_train_distance_ratio", "share_nearer_to_train", "share_duplicates_of_train")
    )
    clean = ratio["met"] and share["met"] and copies["met"]
    sentences.append(
        f"{'No sign of memorisation' if clean else 'Possible memorisation'}: {copies['value']:.1%} of the generated "
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
            text += f" Fewer than {RARE_LABEL_CELLS} training cells, so expect little of: {', '.join(rare)}."
        sentences.append(text)
    return sentences


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Generated cells against real cells</title>
<style>
:root { color-scheme: light dark; --text: #1b1f24; --soft: #5a636e; --page: #fff; --box: #f3f5f8; --line: #d8dde3;
  --good: #0a7a3d; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --soft: #a3adb8; --page: #14171b; --box: #1f242b;
  --line: #39414b; --good: #5fd08f; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.soft, figcaption, small { color: var(--soft); }
.verdict { background: var(--box); border-left: 4px solid var(--line); padding: .6rem 1rem; }
.verdict p { margin: .5rem 0; } .verdict p:first-child { font-size: 1.15rem; }
.warning { border-left: 4px solid var(--bad); padding: .4rem 1rem; background: var(--box); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
thead th { text-align: right; color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th, thead th:first-child { text-align: left; font-weight: 400; }
tbody th { min-width: 8.5rem; } thead th.left, td.left { text-align: left; } td small { white-space: nowrap; }
.yes { color: var(--good); } .no { color: var(--bad); font-weight: 600; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0; min-width: 0; } figcaption { margin-bottom: .4rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; padding: .5rem; border: 1px solid var(--line);
  border-radius: 6px; }
pre { background: var(--box); padding: .6rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
</style>
</head>
<body>
{% macro figure(row, name) -%}
{{ row[name] | figure }}
{%- if row[name ~ "_std"] is not none %} <small>± {{ row[name ~ "_std"] | figure }}</small>{% endif %}
{%- endmacro %}
{% macro met(row) -%}
{% if row.met is none %}–{% elif row.met %}<span class="yes">✓ yes</span>
{%- else %}<span class="no">✗ no</span>{% endif %}
{%- endmacro %}
<h1>Generated cells against real cells</h1>
<p class="soft">{{ record.source }} · {{ record.cells.judged }} generated against {{ record.cells.judged }} unseen real
cells, {{ record.genes.number }} genes, {{ record.seeds | length }} evaluation
seed{{ "s" if record.seeds | length > 1 }}</p>
{% for warning in record.warnings %}
<p class="warning"><strong>Warning:</strong> {{ warning }}</p>
{% endfor %}
<div class="verdict">
{% for sentence in verdict %}
<p>{{ sentence }}</p>
{% endfor %}
</div>

<h2>All figures</h2>
<p class="soft">Ceiling: the same figure for other real cells that no model saw. Floors: the same figure for baselines.
Mean{{ " ± standard deviation over the seeds" if record.seeds | length > 1 }}. The scRDiT figures are printed to compare
with the paper; they are not 0 for real cells and have no aim of their own.</p>
<div class="scroll"><table>
<thead><tr><th>metric</th><th>generated</th><th>ceiling: real</th>
{% for floor in floors %}
<th>floor: {{ FLOOR_NAMES[floor] }}</th>
{% endfor %}
<th class="left">aim</th><th>met</th></tr></thead>
<tbody>
{% for metric, row in overall.items() %}
<tr><th>{{ METRIC_NAMES[metric] }}</th><td>{{ figure(row, "value") }}</td><td>{{ figure(row, "ceiling") }}</td>
{% for floor in floors %}
<td>{{ figure(row, floor) }}</td>
{% endfor %}
<td class="left">{{ "–" if metric.startswith("legacy") else row.aim | signs }}</td><td>{{ met(row) }}</td></tr>
{% endfor %}
</tbody></table></div>

{% if by_label %}
<h2>By label</h2>
<p class="soft">Generated, and real cells in brackets. Labels with fewer than {{ record.arguments.min_label_cells }}
cells on a side are not judged alone. † marks labels with fewer than {{ RARE_LABEL_CELLS }} training cells.</p>
<div class="scroll"><table>
<thead><tr><th>label</th><th>training cells</th><th>judged</th>
{% for metric in LABEL_METRICS %}
<th>{{ METRIC_NAMES[metric] }}</th>
{% endfor %}
<th>aims met</th></tr></thead>
<tbody>
{% for label, entry in by_label.items() %}
<tr><th>{{ label }}{{ " †" if entry.cells.train < RARE_LABEL_CELLS }}</th><td>{{ entry.cells.train }}</td>
{% if entry.rows %}
<td>{{ (entry.rows.values() | first).n_cells }}</td>
{% for metric in LABEL_METRICS %}
<td>{% if metric in entry.rows %}{{ entry.rows[metric].value | figure }}
<small>({{ entry.rows[metric].ceiling | figure }})</small>{% else %}–{% endif %}</td>
{% endfor %}
<td>{{ entry.met }} of {{ entry.decided }}</td>
{% else %}
<td class="soft left" colspan="{{ LABEL_METRICS | length + 2 }}">too few cells ({{ entry.cells.test }} test cells)</td>
{% endif %}
</tr>
{% endfor %}
</tbody></table></div>
{% endif %}

{% if record.steps_curve %}
<h2>Quality against steps</h2>
<p class="soft">Network calls per cell; seed {{ record.seeds[0] }}, without the slow classifiers.</p>
<div class="scroll"><table>
<thead><tr><th>calls</th>
{% for metric in STEP_METRICS %}
<th>{{ METRIC_NAMES[metric] }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in record.steps_curve %}
<tr><th>{{ row.num_inference_steps }}</th>
{% for metric in STEP_METRICS %}
<td>{{ row[metric] | figure }}</td>
{% endfor %}
</tr>
{% endfor %}
<tr><th>real cells</th>
{% for metric in STEP_METRICS %}
<td>{{ overall[metric].ceiling | figure }}</td>
{% endfor %}
</tr>
</tbody></table></div>
{% endif %}

<h2>Pictures</h2>
<div class="pictures">
{% for title, caption, image in pictures %}
<figure><figcaption><strong>{{ title }}.</strong> {{ caption }}</figcaption>
<img alt="{{ title }}" src="data:image/png;base64,{{ image }}"></figure>
{% endfor %}
</div>

<h2>How it was computed</h2>
<p>The real cells were split into train, control and test. As many generated cells as test cells
{{- ", with their labels," if record.labels_key }} are compared with the test cells; control cells in their place give
the ceiling, baselines made from the train cells the floors. Nothing is fitted on test cells.</p>
<p>Distances are taken in 50 principal components of the train cells
{{- " (counts per 10,000, log1p)" if record.value_space == "counts" }}. Classifiers are scored by 5-fold
cross-validation: gradient boosting on all genes, library size and genes detected, and a random forest on the principal
components. Label classifiers work on the principal components.</p>
<p>Each seed generates, draws and folds anew
{{- ", and all but the first divide the unseen real cells anew into control and test, so that the ceiling has a spread"
if record.unseen_cells_divided_anew else "; control and test stay as they were split" }}.</p>
<p>Cells: {{ record.cells.train }} train, {{ record.cells.control }} control, {{ record.cells.test }} test;
{{ record.cells.judged }} of each kind judged. Genes: {{ record.genes.number }}, {{ record.genes.choice }}.
Seeds: {{ record.seeds | join(", ") }}. {{ record.seconds }} seconds in all.</p>
<pre>{{ record.command }}</pre>
<p class="soft">{% for name, number in record.versions.items() %}{{ name }} {{ number }}{{ ", " if not loop.last }}
{%- endfor %}</p>
</body>
</html>
"""
