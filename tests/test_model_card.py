"""Model cards: each one in hub_cards is what the builder makes of the files beside it, and says what they say."""

import json
import math
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from huggingface_hub import ModelCard

from scrdit_diffusers import finetuning
from scrdit_diffusers.evaluation import model_card
from scrdit_diffusers.evaluation.baselines import BASELINE_NAMES
from scrdit_diffusers.evaluation.compare import METRIC_NAMES
from scrdit_diffusers.evaluation.report import STEP_METRICS, ReportFigure
from scrdit_diffusers.processing_scrdit import RARE_LABEL_CELLS

HUB_CARDS = Path(__file__).parents[1] / "hub_cards"
CARDS = sorted(path.parent for path in HUB_CARDS.glob("*/card.json"))
RECORD = {"dataset": "user/cells", "command": ["training/train.py", "--labels_key", "cell type"], "seed": 3}
RECORD |= {"max_train_steps": 1000, "train_batch_size": 16, "train_cells": 1234, "val_cells": 56}


@pytest.fixture(params=CARDS, ids=lambda path: path.name)
def published(request):
    return request.param


def test_published_cards_are_products_of_the_builder(published, tmp_path):
    folder = tmp_path / published.name
    shutil.copytree(published, folder)
    (folder / "README.md").unlink()
    model_card.write_card(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == (published / "README.md").read_text(encoding="utf-8")


def test_figures_of_published_cards_are_those_of_metrics_json(published):
    """Read back from the table and from the metadata, without the builder."""
    metrics = json.loads((published / "metrics.json").read_text(encoding="utf-8"))
    card = ModelCard.load(published / "README.md")
    rows = {row["metric"]: row for row in metrics["rows"] if row["group"] == "all"}
    header, _, *lines = re.search(r"(\| metric \|.*\n)(\|.*\n)+", card.text).group().splitlines()
    columns = [cell.strip() for cell in header.split("|")[2:-2]]
    sources = {"generated": "value", "other real cells": "ceiling"} | {v: k for k, v in BASELINE_NAMES.items()}
    assert columns == ["generated", "other real cells", *(BASELINE_NAMES[name] for name in metrics["baselines"])]
    seen = set()
    for line in lines:
        title, *cells, met = (cell.strip() for cell in line.split("|")[1:-1])
        metric = next(name for name, known in METRIC_NAMES.items() if known == title)
        seen.add(metric)
        assert met == {True: "yes", False: "no", None: "–"}[rows[metric]["met"]]
        for column, cell in zip(columns, cells, strict=True):
            for text, name in zip(cell.split(" ± "), (sources[column], f"{sources[column]}_std"), strict=False):
                assert float(text) == pytest.approx(rows[metric][name], abs=unit(text) / 2 * 1.001)
    assert seen == {name for name in rows if not name.startswith("legacy")}
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        name: rows[name]["value"] for name in seen
    }
    counts = re.search(r"\n([\d,]+) generated cells against .* (\d+) evaluation seed", card.text)
    assert int(counts[1].replace(",", "")) == metrics["cells"]["evaluated"] and int(counts[2]) == len(metrics["seeds"])
    for part in ("train", "control", "test"):
        assert f"{metrics['cells'][part]:,} {part}" in card.text


def unit(text):
    """Return the place value of the last digit."""
    mantissa, _, exponent = text.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def test_figures_of_published_cards_exist(published):
    for target in re.findall(r"\]\(([^)]+)\)", (published / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("http") or (published / target).is_file(), target


@pytest.fixture
def card(pipe):
    """Build the card of the tiny pipeline, trained as `RECORD` says."""

    def card(record=(), about=(), **options):
        facts = model_card.describe_pipeline(pipe, RECORD | dict(record), dict(about))
        options = {"metrics": None, "figures": [], "name": "model"} | options
        return model_card.build_card(json.loads(json.dumps(facts)), **options)

    return card


def test_what_is_not_known_is_not_stated(card):
    made = card()
    assert made.data.license is None and not any(tag.startswith("tissue:") for tag in made.data.tags)
    for line in ("| accession | not stated |", "| license of the data | not stated |", "| commit | not stated |"):
        assert line in made.text
    assert "Not evaluated yet" in made.text and made.data.eval_results is None


def test_what_is_stated_is_shown(card):
    about = {"license": "mit", "tissue": "lung", "dataset_accession": "GSE1", "model_id": "user/lung"}
    made = card({"commit": "abc", "seconds": 90}, about)
    assert made.data.license == "mit" and "tissue:lung" in made.data.tags and made.data.datasets == ["user/cells"]
    for text in ("# lung\n", "| accession | GSE1 |", "| commit | abc |", "| time | 1.5 minutes |", "1,234 trained on"):
        assert text in made.text
    assert "train.py --labels_key 'cell type'" in made.text


def test_metadata_are_those_of_single_cell_models(card):
    made = card()
    assert made.data.library_name == "diffusers"
    assert {"biology", "genomics", "single-cell", "modality:rna"} <= set(made.data.tags)


def test_labels_have_their_counts_and_rare_ones_are_marked(card, adata):
    counts = adata.obs["cell_type"].value_counts()
    text = card().text
    assert f"| T | {counts['T']} |" in text
    assert f"| NK | {counts['NK']} (fewer than 30: may be poor) |" in text


def test_use_runs(card, pipe, tmp_path, monkeypatch):
    """The first code block, as it stands, on the folder that it names."""
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("model")
    code = re.search(r"```python\n(.*?)```", card().text, re.DOTALL)[1]
    namespace: dict = {}
    exec(code.replace("num_cells=200", "num_cells=3, num_inference_steps=2"), namespace)
    assert namespace["adata"].obs["cell_type"].tolist() == ["T"] * 3


@pytest.mark.parametrize("adapter_only", [True, False])
def test_card_of_an_adapter_loads_it(card, pipe, adapter_only):
    changes = finetuning.compare_processors(pipe.processor, pipe.processor) | {"adapter_only": adapter_only}
    record = {"pretrained_model_name_or_path": "user/base", "lora_rank": 4, "finetuning": changes}
    made = card(record, {"model_id": "user/tuned"})
    code = re.search(r"```python\n(.*?)```", made.text, re.DOTALL)[1]
    assert f'from_pretrained("user/{"base" if adapter_only else "tuned"}")' in code
    assert 'pipe.load_lora_weights("user/tuned")' in code
    assert made.data.base_model == "user/base" and made.data.base_model_relation == "adapter"
    assert "`user/base`: 23 genes kept in place, 0 moved, 0 new, 0 dropped" in made.text


def test_paths_of_data_and_pretrained_models_are_not_published(card, tmp_path):
    (tmp_path / "cells.h5ad").touch()
    record = {"dataset": str(tmp_path / "cells.h5ad"), "pretrained_model_name_or_path": str(tmp_path)}
    made = card(record | {"finetuning": {"genes": dict.fromkeys(("matched", "moved", "new", "dropped"), 0)}})
    assert "`cells.h5ad`" in made.text and str(tmp_path) not in made.text
    assert made.data.datasets is None and made.data.base_model is None


def test_log_normalized_and_unlabelled_models_say_so(pipe):
    pipe.processor.value_space, pipe.processor.target_sum = "log_normalized", 1e4
    pipe.processor.condition_keys = pipe.processor.condition_categories = pipe.processor.composition = []
    facts = model_card.describe_pipeline(pipe, RECORD, {})
    text = model_card.build_card(facts, None, [], "model").text
    assert "Log-normalized values (log1p of counts per 10,000) of 23 genes. The model has no labels" in text
    assert "pipe(\n    num_cells=200,\n    generator=" in text


def test_models_of_the_counts_behind_log_normalized_values_say_so(count_pipe):
    count_pipe.processor.value_space, count_pipe.processor.normalized_by = "log_normalized", "library_size"
    text = model_card.build_card(model_card.describe_pipeline(count_pipe, RECORD, {}), None, [], "model").text
    expected = 'Log-normalized values of 23 genes, the counts behind them in `layers["counts"]`, with the library size'
    assert expected in text


def test_models_of_other_values_have_no_library_size_to_ask_for(count_pipe):
    count_pipe.processor.value_space, count_pipe.processor.value_step = "log_normalized", 0.1
    text = model_card.build_card(model_card.describe_pipeline(count_pipe, RECORD, {}), None, [], "model").text
    assert "Log-normalized values of 23 genes.\n" in text


def test_quality_against_steps_is_drawn_from_metrics_json(pipe, tmp_path):
    metrics = json.loads((CARDS[0] / "metrics.json").read_text(encoding="utf-8"))
    rows = {row["metric"]: row["value"] for row in metrics["rows"] if row["group"] == "all"}
    metrics["steps_curve"] = [{"num_inference_steps": k} | {name: rows[name] for name in STEP_METRICS} for k in (5, 25)]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    model_card.write_facts(pipe, RECORD, {}, tmp_path)
    model_card.write_card(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "![Quality against steps](figures/quality-against-steps.png)" in text
    assert plt.imread(tmp_path / "figures" / "quality-against-steps.png").std() > 0
    assert not plt.get_fignums()


def test_what_a_pipeline_alone_knows(pipe, adata):
    facts = json.loads(json.dumps(model_card.describe_pipeline(pipe, None, {})))
    made = model_card.build_card(facts, None, [], "user/cells-of-mine")
    assert 'SCRDiTPipeline.from_pretrained("user/cells-of-mine")' in made.text
    assert "Integer counts of 23 genes.\n" in made.text
    cell_types = adata.obs["cell_type"].value_counts()
    assert f'conditions={{"cell_type": "{cell_types.idxmax()}"}}' in made.text
    tables = {key: adata.obs[key].value_counts() for key in ("cell_type", "batch")}
    stated = dict(re.findall(r"^\| ([^|`]+) \| (\d+)[ |(]", made.text, flags=re.MULTILINE))
    assert stated == {str(label): str(n) for table in tables.values() for label, n in table.items()}
    rare = {label for table in tables.values() for label, n in table.items() if n < RARE_LABEL_CELLS}
    assert set(re.findall(r"\| (\S+) \| \d+ \(fewer than 30", made.text)) == rare and rare
    parameters = sum(p.numel() for p in pipe.transformer.parameters()) / 1e6
    assert f"| model | {parameters:.2f} M parameters, 2 blocks of width 16, 5 genes per token |" in made.text


def test_what_a_pipeline_alone_does_not_know(pipe):
    made = model_card.build_card(model_card.describe_pipeline(pipe, None, {}), None, [], "user/cells-of-mine")
    unknown = set(re.findall(r"^\| (.+) \| not stated(?:, not stated)? \|$", made.text, flags=re.MULTILINE))
    assert unknown == {"dataset", "accession", "license of the data", "organism, tissue", "cells", "split"} | {
        "training",
        "commit",
        "hardware",
        "time",
        "license of the weights",
    }
    assert "Not evaluated yet." in made.text and "fine-tuned" not in made.text and "None" not in made.text
    known = {name for name, value in made.data.to_dict().items() if value}
    assert known == {"library_name", "tags"}
    assert not [tag for tag in made.data.tags if tag.startswith(("tissue:", "organism:", "lora"))]


def test_results_and_figures_come_from_the_folder(pipe, tmp_path):
    published = CARDS[0]
    model_card.write_facts(pipe, RECORD, {}, tmp_path)
    model_card.write_card(tmp_path)
    assert "Not evaluated yet" in (tmp_path / "README.md").read_text(encoding="utf-8")
    shutil.copyfile(published / "metrics.json", tmp_path / "metrics.json")
    figures = [ReportFigure(title, "", plt.figure(figsize=(1, 1))) for title in ("Genes", "Zero fraction")]
    model_card.save_figures(figures, tmp_path)
    plt.close("all")
    model_card.write_card(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "![Genes](figures/genes.png)" in text
    shown = {path.name for path in (tmp_path / "figures").iterdir()}
    assert shown == {"genes.png", "quality-against-steps.png"}  # the latter is drawn from metrics.json
    assert "classifier on all genes, AUROC" in text


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"value": 0.6071, "value_std": 0.0142}, "0.607 ± 0.014"),
        ({"value": 0.6071, "value_std": None}, "0.607"),
        ({"value": 11.35, "value_std": 1e-15}, "11.35"),
        ({"value": 3.09e-5, "value_std": 5.5e-5}, "3.1e-05 ± 5.5e-05"),
        ({"value": None, "value_std": None}, "–"),
        ({"value": math.nan, "value_std": None}, "–"),
    ],
)
def test_figures_are_formatted_with_their_spread(row, text):
    assert model_card._with_spread(row, "value") == text
