"""Model cards: what a pipeline is, how it was trained and evaluated, rendered from a template.

    python -m scrdit_diffusers.evaluation.model_card FOLDER

writes `FOLDER/README.md` anew from its `card.json`, its `metrics.json` and the figures in `figures`.
"""

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from scrdit_diffusers.pipeline_scrdit import SCRDiTPipeline
from scrdit_diffusers.processing_scrdit import RARE_LABEL_CELLS, STATE_KEY
from scrdit_diffusers.redaction import redact

from .baselines import BASELINE_NAMES
from .compare import METRIC_NAMES
from .privacy import in_words
from .report import ReportFigure, draw_steps_curve, format_value

TEMPLATE = Path(__file__).with_name("card.md.jinja")
NOT_STATED = "not stated"
# The id on the Hub, the license of the weights, and where the training cells come from.
ABOUT = ("model_id", "license", "dataset_accession", "dataset_license", "dataset_citation", "organism", "tissue")
FIGURES = {"umap-by-origin": "UMAP by origin", "genes": "Genes", "quality-against-steps": "Quality against steps"}

EVALUATION_FILES = ("metrics.json", *(f"figures/{name}.png" for name in FIGURES))  # of a folder with a card


def describe_pipeline(
    pipe: SCRDiTPipeline, record: Mapping[str, Any] | None, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Collect the facts of a card, except for the evaluation.

    Parameters
    ----------
    pipe
        The trained pipeline.
    record
        The contents of train_config.json; `None` leaves out how the model was trained.
    about
        What only the author knows, by the names in [`ABOUT`]; missing entries show as "not stated".

    Returns
    -------
    Contents of card.json.
    """
    processor, transformer = pipe.processor, pipe.transformer
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    config.pop("count_bins", None)
    names: tuple[str, ...] = ("dataset", "max_train_steps", "train_batch_size", "learning_rate", "seed", "train_cells")
    names += ("val_cells", "commit", "hardware", "seconds", "resumed_from_step", "versions", "finetuning", "lora_rank")
    record = redact(record or {})
    recipe = {name: record.get(name) for name in names}
    dataset = record.get("dataset") or ""
    recipe["dataset"] = (Path(dataset).name if Path(dataset).exists() else dataset) or None
    recipe["dataset_on_hub"] = bool(dataset) and not Path(dataset).exists()
    recipe["command"] = shlex.join(record.get("command") or []) or None
    start = record.get("pretrained_model_name_or_path") or ""
    recipe["base_model"] = (Path(start).name if Path(start).exists() else start) or None
    recipe["base_model_on_hub"] = bool(start) and not Path(start).exists()
    space = {name: getattr(processor, name) for name in ("value_space", "target_sum", "normalized_by", "num_genes")}
    has_library_size = transformer.count_head is not None and processor.value_step is None
    labels = processor.label_counts
    states = len(labels.pop(STATE_KEY, {}))
    parameters = {"parameters": transformer.num_parameters(), "library_size": has_library_size}
    return {
        "about": redact({name: about.get(name) for name in ABOUT}),
        **space,
        "labels": labels,
        "states": states,
        "transformer": config,
        **parameters,
        "recipe": recipe,
    }


def save_figures(figures: Sequence[ReportFigure], folder: str | Path) -> None:
    """Write those figures of a report that belong to a card ([`FIGURES`]) to `folder/figures`."""
    (Path(folder) / "figures").mkdir(parents=True, exist_ok=True)
    titles = {title: name for name, title in FIGURES.items()}
    for title, _, figure in figures:
        if title in titles:
            figure.savefig(Path(folder) / "figures" / f"{titles[title]}.png", dpi=80, facecolor="white")


def build_card(
    facts: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
    figures: Sequence[str],
    name: str,
    template: str | Path | None = None,
) -> ModelCard:
    """Render a card.

    Parameters
    ----------
    facts
        Output of [`describe_pipeline`].
    metrics
        Contents of metrics.json; `None` for a model that was not evaluated.
    figures
        Names of the files in `folder/figures`, without `.png`.
    name
        What to call the model if its id on the Hub is not stated, such as its folder's name.
    template
        Path of the Jinja template; `None` takes `card.md.jinja`.

    Returns
    -------
    The card with its metadata for the Hub. Results are in `model-index`, because the newer `.eval_results` files are
    only for datasets that the Hub has registered as benchmarks.

    References
    ----------
    https://huggingface.co/docs/hub/model-cards, https://huggingface.co/docs/hub/eval-results
    """
    about, recipe = facts["about"], facts["recipe"]
    rows = [row for row in (metrics or {}).get("rows", []) if row["group"] == "all" and "legacy" not in row["metric"]]
    source = about["model_id"] or name
    name = source.split("/")[-1]
    dataset = recipe["dataset"] or NOT_STATED
    tags = ["biology", "genomics", "single-cell", "scRNA-seq", "modality:rna", "scrdit"]
    tags += [f"tissue:{about['tissue']}"] if about.get("tissue") else []
    tags += [f"organism:{about['organism']}"] if about.get("organism") else []
    tags += ["lora"] if recipe.get("lora_rank") else []
    metadata: dict[str, Any] = {"license": about["license"]} if about.get("license") else {}
    metadata |= {"datasets": [dataset]} if recipe["dataset_on_hub"] else {}
    if recipe.get("base_model_on_hub"):
        relation = "adapter" if recipe.get("lora_rank") else "finetune"
        metadata |= {"base_model": recipe["base_model"], "base_model_relation": relation}
    if rows:
        metadata["model_name"] = name
        metadata["eval_results"] = [
            EvalResult(
                task_type="other",
                task_name="generation of single cells",
                dataset_type=dataset if recipe["dataset_on_hub"] else "scrna-seq",
                dataset_name=f"{dataset}, test cells",
                metric_type=row["metric"],
                metric_name=METRIC_NAMES[row["metric"]],
                metric_value=row["value"],
            )
            for row in rows
            if row["value"] is not None
        ]
    baselines = [name for name in BASELINE_NAMES if name in (metrics or {}).get("baselines", [])]
    shown = [[METRIC_NAMES[row["metric"]]] for row in rows]
    for cells, row in zip(shown, rows, strict=True):
        cells += [_with_spread(row, source) for source in ("value", "ceiling", *baselines)]
        cells.append("–" if row["met"] is None else "yes" if row["met"] else "no")
    # ModelCard.from_template would keep the lines of Jinja's own tags, which break tables.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    content = environment.from_string(Path(template or TEMPLATE).read_text(encoding="utf-8")).render(
        card_data=ModelCardData(library_name="diffusers", tags=tags, **metadata).to_yaml(),
        name=name,
        source=source,
        facts=facts,
        about={key: value or NOT_STATED for key, value in about.items()},
        recipe=recipe,
        example=_example_condition(facts["labels"]),
        rare={k: [n for n, count in of.items() if count < RARE_LABEL_CELLS] for k, of in facts["labels"].items()},
        rare_cells=RARE_LABEL_CELLS,
        metrics=metrics,
        privacy=in_words(metrics["privacy"]) if metrics and metrics.get("privacy") else [],
        columns=["generated", "other real cells", *(BASELINE_NAMES[name] for name in baselines), "aim met"],
        rows=shown,
        figures={figure: FIGURES[figure] for figure in figures if figure in FIGURES},
        not_stated=NOT_STATED,
    )
    return ModelCard(redact(re.sub(r"\n{3,}", "\n\n", content)))


def _with_spread(row: Mapping[str, Any], source: str) -> str:
    """Format the mean and, if several evaluation seeds gave one, the standard deviation."""
    value, spread = row[source], row.get(f"{source}_std")
    if value is None:
        return format_value(value)
    tiny = 0 < abs(value) < 0.001
    text = f"{value:.1e}" if tiny else format_value(value)
    if not spread or spread < 1e-9 * abs(value):  # one seed, or the same cells for each
        return text
    return f"{text} ± {spread:.1e}" if tiny else f"{text} ± {spread:.{len(text.split('.')[1])}f}"


def _example_condition(labels: Mapping[str, Mapping[str, int]]) -> str:
    """Format the most frequent label of the first condition as a Python dict."""
    for key, numbers in labels.items():
        return json.dumps({key: max(numbers, key=lambda name: numbers[name])}, ensure_ascii=False)
    return ""


def write_facts(pipe: SCRDiTPipeline, record: Mapping[str, Any], about: Mapping[str, Any], folder: str | Path) -> None:
    """Write `folder/card.json`: the output of [`describe_pipeline`]."""
    text = json.dumps(describe_pipeline(pipe, record, about), indent=1)
    (Path(folder) / "card.json").write_text(text + "\n", encoding="utf-8")


def write_card(folder: str | Path, template: str | Path | None = None, name: str | None = None) -> None:
    """Write `folder/README.md` from card.json and, if present, metrics.json and `figures`.

    Quality against steps is drawn anew if metrics.json has it. `name` is for a model without an id; `None` takes the
    name of the folder.
    """
    folder = Path(folder)
    facts = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if metrics and metrics["steps_curve"]:
        curve = draw_steps_curve(metrics)
        save_figures([curve], folder)
        plt.close(curve.figure)
    figures = [name for name in FIGURES if (folder / "figures" / f"{name}.png").is_file()]
    build_card(facts, metrics, figures, name or folder.resolve().name, template).save(folder / "README.md")


def write_card_of(pipe: SCRDiTPipeline, folder: str | Path, repo_id: str, from_scratch: bool = True) -> None:
    """Write the card of a pipeline that is about to be published.

    Parameters
    ----------
    pipe
        The pipeline. If the folder from which it was loaded has a card.json, that is used, with metrics and figures.
    folder
        Where to write.
    repo_id
        What the card calls the model.
    from_scratch
        Without that card.json: write a card of what the pipeline itself knows (`True`), or none (`False`).
    """
    source, folder = Path(pipe.config.get("_name_or_path") or ""), Path(folder)
    if (source / "card.json").is_file():
        facts = json.loads((source / "card.json").read_text(encoding="utf-8"))
        files = ["metrics.json", "train_config.json", *(f"figures/{name}.png" for name in FIGURES)]
        files += ["pytorch_lora_weights.safetensors"]
        for file in files:
            if (source / file).is_file() and not (folder / file).exists():
                (folder / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / file, folder / file)
    elif from_scratch:
        facts = describe_pipeline(pipe, None, {})
    else:
        return
    facts["about"]["model_id"] = repo_id
    (folder / "card.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    write_card(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write FOLDER/README.md anew from card.json and metrics.json.")
    parser.add_argument("folder")
    parser.add_argument("--template", help="another Jinja template")
    arguments = parser.parse_args()
    write_card(arguments.folder, arguments.template)
