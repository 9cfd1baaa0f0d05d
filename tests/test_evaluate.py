"""The evaluation script, run on few cells: split, pipeline or foreign cells, results, report, wrong input."""

import json
import re
import runpy
import shutil
import sys
from unittest.mock import Mock

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from evaluations import KEY, PARTS, QUICK, row
from scripts import TRAINING, load_script, start_in_block
from transformers import HfArgumentParser

from scrdit_diffusers import SCRDiTPipeline, finetuning
from scrdit_diffusers.evaluation import baselines, model_card, privacy, report

# -- split -------------------------------------------------------------------------------------------------------------


def test_split_is_disjoint_and_complete(parts, cells):
    names = [name for part in parts.values() for name in part.obs_names]
    assert sorted(names) == sorted(cells.obs_names)


def test_split_is_stratified(parts):
    counts = pd.DataFrame({name: part.obs[KEY].value_counts() for name, part in parts.items()})
    assert counts.loc[["B cell", "T cell", "rare"], list(PARTS)].to_numpy().tolist() == [
        [48, 16, 16],
        [39, 13, 13],
        [9, 3, 3],
    ]


def test_split_says_how_to_train(evaluate, split_dir, capsys):
    evaluate("--split_dir", split_dir)
    command = f"scrdit train --dataset {split_dir}/train.h5ad --labels_key {KEY} --output_dir"
    assert command in capsys.readouterr().out


def test_split_is_reproducible(evaluate, split_dir, parts, tmp_path):
    evaluate("--dataset", split_dir / "cells.h5ad", "--labels_key", KEY, "--split_dir", tmp_path)
    assert list(ad.read_h5ad(tmp_path / "test.h5ad").obs_names) == list(parts["test"].obs_names)


def test_split_by_keeps_groups_whole(evaluate, split_dir, tmp_path):
    arguments = ["--labels_key", KEY, "--split_by", "donor", "--split_dir", tmp_path]
    evaluate("--dataset", split_dir / "cells.h5ad", *arguments)
    donors = [set(ad.read_h5ad(tmp_path / f"{name}.h5ad").obs["donor"]) for name in PARTS]
    assert [len(names) for names in donors] == [3, 1, 1] and len(set.union(*donors)) == 5


# -- results -----------------------------------------------------------------------------------------------------------


def test_every_figure_stands_beside_ceiling_and_floor(record):
    for figures in record["rows"]:
        for name in ("value", "ceiling", "gaussian_copula"):
            assert isinstance(figures[name], float) and isinstance(figures[f"{name}_std"], float), figures


def test_untrained_pipeline_is_told_from_real_cells(record):
    auroc = row(record, "classifier_genes_auroc")
    assert auroc["value"] > 0.8 > auroc["ceiling"] and auroc["met"] is False


def test_seeds_divide_the_unseen_cells_anew(record):
    assert record["seeds"] == [0, 1] and row(record, "mmd2")["ceiling_std"] > 0


def test_cells_genes_and_labels_are_recorded(record):
    assert record["cells"] == {"train": 96, "control": 32, "test": 32, "evaluated": 32}
    assert record["genes"] == {"number": 40, "choice": "those of the pipeline"}
    assert record["labels"]["rare"] == {"train": 9, "control": 3, "test": 3}


def test_labels_with_enough_cells_have_rows(record):
    assert {figures["group"] for figures in record["rows"]} == {"all", "B cell"}


def test_quality_is_measured_at_each_number_of_steps(record):
    assert [entry["num_inference_steps"] for entry in record["steps_curve"]] == [2, 4]
    assert all(np.isfinite(entry["w2"]) for entry in record["steps_curve"])


def test_more_genes_than_the_metrics_look_at_are_all_judged(
    evaluate, evaluate_script, split_dir, pipeline, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate_script, "NUM_VARIABLE", 39)
    evaluate("--split_dir", split_dir, "--pipeline", pipeline, "--output_dir", tmp_path, *QUICK)
    strata = json.loads((tmp_path / "metrics.json").read_text())["strata"]
    assert [entry["num_genes"] for entry in strata][0] == 40 and sum(entry["num_genes"] for entry in strata) == 80
    assert strata[0]["value"] > 0.8 > strata[0]["ceiling"]
    assert "<h2>All genes</h2>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_pipeline_of_the_train_part_gives_no_warning(record):
    assert record["warnings"] == []


def test_results_are_not_replaced_unasked(evaluate, split_dir, pipeline, evaluation):
    with pytest.raises(ValueError, match="--overwrite"):
        evaluate("--split_dir", split_dir, "--pipeline", pipeline, "--output_dir", evaluation)


def test_attacks_stand_in_record_and_report(record, html):
    found = record["privacy"]
    assert [(row["unit"], row["attack"]) for row in found["rows"]] == [("cells", name) for name in privacy.ATTACK_NAMES]
    assert found["cells"] == {"train": 96, "unseen": 64, "value": 96, "gaussian_copula": 96}
    assert found["rows"][0]["value_std"] > 0 and found["donors"] is None
    section = html[html.index("<h2>Privacy</h2>") : html.index("<h2>Figures</h2>")]
    assert all(name in section for name in privacy.ATTACK_NAMES.values())
    assert all(copy["cell"] in section for copy in found["rare_cells"]["closest"])


def test_donors_of_a_split_by_donor_are_attacked(evaluate, split_dir, tmp_path):
    arguments = ["--labels_key", KEY, "--split_by", "donor", "--split_dir", tmp_path]
    evaluate("--dataset", split_dir / "cells.h5ad", *arguments)
    train = ad.read_h5ad(tmp_path / "train.h5ad")
    train.write_h5ad(tmp_path / "copies.h5ad")
    arguments += ["--synthetic", tmp_path / "copies.h5ad", "--output_dir", tmp_path, "--privacy"]
    evaluate(*arguments, *QUICK)
    found = json.loads((tmp_path / "metrics.json").read_text())["privacy"]
    row = next(row for row in found["rows"] if row["unit"] == "donors" and row["attack"] == "distance")
    assert found["donors"] == {"train": 3, "unseen": 2} and set(row["scores"]) == set("01234")
    assert row["value"] == 1 and row["value_place"] == pytest.approx(0.1)
    assert "<th>donors</th>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_an_interrupted_evaluation_needs_no_permission_to_be_repeated(
    evaluate, evaluate_script, split_dir, pipeline, evaluation, tmp_path, monkeypatch
):
    """What was there before it is replaced at the first new result, not sooner."""
    folder = tmp_path / "judged"
    shutil.copytree(evaluation, folder)
    arguments = ["--split_dir", split_dir, "--pipeline", pipeline, "--output_dir", folder, *QUICK]
    for name, kept in {"compare_seeds": True, "measure_steps": False}.items():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(evaluate_script, name, Mock(side_effect=KeyboardInterrupt))
            evaluate(*arguments, "--overwrite")
        assert (folder / "report.html").exists() == kept
    assert len(json.loads((folder / "metrics.json").read_text())["seeds"]) == 1
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:  # so it is not refused
        patch.setattr(evaluate_script, "compare_seeds", Mock(side_effect=KeyboardInterrupt))
        evaluate(*arguments)


def test_a_folder_in_which_another_evaluation_writes_is_refused(evaluate, split_dir, pipeline, tmp_path):
    other = start_in_block("lock_folder", tmp_path / "judged", "")
    with pytest.raises(ValueError, match="judged is in use by another run, .*--output_dir"):
        evaluate("--split_dir", split_dir, "--pipeline", pipeline, "--output_dir", tmp_path / "judged")
    other.communicate()


# -- cells of other tools ----------------------------------------------------------------------------------------------


@pytest.fixture
def synthetic(parts):
    return baselines.gaussian_copula(parts["train"], parts["test"].obs, KEY, np.random.default_rng(0))


def test_cells_of_any_tool_are_evaluated_on_variable_genes(evaluate, split_dir, synthetic, tmp_path, caplog):
    synthetic.obs[KEY] = synthetic.obs[KEY].astype(str).replace("rare", "B cell")
    synthetic.write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["--synthetic", tmp_path / "cells.h5ad", "--n_top_genes", 30, "--output_dir", tmp_path]
    evaluate("--split_dir", split_dir, *arguments, *QUICK)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["genes"]["number"] == 30 and "highly variable" in record["genes"]["choice"]
    assert record["baselines"] == [] and record["steps_curve"] == []
    assert row(record, "mmd2")["met"] is None and row(record, "mmd2")["value_std"] is None  # one seed has no spread
    warning = "9% of the synthetic cells would need another label"
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert warning in caplog.text and warning in record["warnings"][0] and warning in html


def test_at_most_max_cells_are_generated(evaluate_script, split_dir, pipeline, tmp_path):
    arguments = [f"--split_dir={split_dir}", f"--pipeline={pipeline}", "--max_cells=20"]
    args = HfArgumentParser(evaluate_script.EvaluationArguments).parse_args_into_dataclasses(arguments)[0]
    evaluation = evaluate_script.Evaluation(args, evaluate_script.read_split(args))
    test, control = evaluation.draw_real(1)
    assert test.n_obs == control.n_obs == evaluation.generate(test.obs, 1, 2).n_obs == 20


# -- wrong input -------------------------------------------------------------------------------------------------------


def refuse(evaluate, message, *arguments):
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--split_dir is needed"),
        (["--split_dir", "nowhere"], "holds no split; give --dataset"),
        (["--split_dir", "nowhere", "--dataset", "nowhere.h5ad"], "nowhere.h5ad does not exist"),
        (["--split_dir", "x", "--pipeline", "a", "--synthetic", "b"], "not both"),
        (["--split_dir", "x", "--num_seeds", 0], "--num_seeds .* 0"),
        (["--split_dir", "x", "--max_cells", 5], "--max_cells must be at least 10"),
        (["--split_dir", "x", "--steps_curve", 0, 5], "--steps_curve"),
    ],
)
def test_wrong_arguments_are_refused(evaluate, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse(evaluate, message, *arguments)
    assert not list(tmp_path.iterdir())


def test_unknown_label_column_is_refused(evaluate, split_dir, tmp_path):
    arguments = ["--labels_key", "celltype", "--split_dir", tmp_path / "split"]
    refuse(evaluate, "did you mean 'cell_type'", "--dataset", split_dir / "cells.h5ad", *arguments)


def test_too_few_cells_are_refused(evaluate, cells, tmp_path):
    cells[:30].write_h5ad(tmp_path / "few.h5ad")
    refuse(evaluate, "control would have 6 cells", "--dataset", tmp_path / "few.h5ad", "--split_dir", tmp_path)
    assert not (tmp_path / "train.h5ad").exists()


def test_two_groups_are_refused(evaluate, cells, tmp_path):
    cells[cells.obs["donor"].isin(["0", "1"])].write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["--split_by", "donor", "--split_dir", tmp_path]
    refuse(evaluate, "2 groups cannot make train, control and test", "--dataset", tmp_path / "cells.h5ad", *arguments)


def test_another_split_by_than_that_of_the_split_is_refused(evaluate, split_dir):
    refuse(evaluate, "was not split by 'donor'", "--split_dir", split_dir, "--split_by", "donor")


def test_a_split_within_other_labels_is_refused(evaluate, split_dir):
    arguments = ["--split_dir", split_dir, "--dataset", split_dir / "cells.h5ad", "--labels_key", "donor"]
    refuse(evaluate, f"made with --labels_key {KEY}, not donor", *arguments)


def test_generated_cells_are_not_split_as_real_ones(evaluate, cells, tmp_path):
    marked = cells.copy()
    marked.obs["synthetic"] = np.arange(cells.n_obs) < 5
    marked.write_h5ad(tmp_path / "cells.h5ad")
    message = f"--dataset .*cells.h5ad: 5 of the {cells.n_obs} cells are marked as generated .*real cells"
    refuse(evaluate, message, "--dataset", tmp_path / "cells.h5ad", "--split_dir", tmp_path / "split")
    assert not (tmp_path / "split").exists()


def test_split_of_other_cells_is_refused(evaluate, split_dir):
    refuse(
        evaluate, "is a split of .*cells.h5ad, not of other.h5ad", "--split_dir", split_dir, "--dataset", "other.h5ad"
    )


def test_values_that_cannot_be_trained_on_are_refused_before_splitting(evaluate, split_dir, tmp_path):
    cells = ad.read_h5ad(split_dir / "cells.h5ad")
    cells.X[0, 0] = np.nan
    cells.write_h5ad(tmp_path / "cells.h5ad")
    refuse(evaluate, "NaN or infinite", "--split_dir", tmp_path / "split", "--dataset", tmp_path / "cells.h5ad")
    assert not (tmp_path / "split").exists()


def test_incomplete_split_is_refused(evaluate, split_dir, tmp_path):
    shutil.copy(split_dir / "train.h5ad", tmp_path)
    refuse(evaluate, r"holds only \['train'\]", "--split_dir", tmp_path, "--dataset", split_dir / "cells.h5ad")


def test_no_condition_of_the_pipeline_is_refused(evaluate, split_dir, pipeline, tmp_path):
    arguments = ["--pipeline", pipeline, "--labels_key", "donor", "--output_dir", tmp_path]
    refuse(evaluate, "donor is not a condition of the pipeline", "--split_dir", split_dir, *arguments)


def wrong_genes(synthetic):
    synthetic.var_names = [f"other{i}" for i in range(40)]


def few_cells(synthetic):
    synthetic._inplace_subset_obs(np.arange(160 // 5) < 8)


def no_labels(synthetic):
    del synthetic.obs[KEY]


def unknown_label(synthetic):
    synthetic.obs[KEY] = ["Platelet"] + synthetic.obs[KEY].astype(str).tolist()[1:]


def no_counts(synthetic):
    synthetic.X = synthetic.X * 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_genes, "train lacks 40 of the 40 genes"),
        (few_cells, "At least 10 cells of each kind are needed, got .*'synthetic': 8"),
        (no_labels, "synthetic.obs has no column"),
        (unknown_label, r"--synthetic .*labels that real cells lack: \['Platelet'\]"),
        (no_counts, "synthetic: .* are no counts|synthetic: "),
    ],
)
def test_wrong_synthetic_cells_are_refused(evaluate, split_dir, synthetic, tmp_path, change, message):
    change(synthetic)
    synthetic.write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["--synthetic", tmp_path / "cells.h5ad", "--output_dir", tmp_path / "results"]
    refuse(evaluate, message, "--split_dir", split_dir, *arguments)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dataset": "all.h5ad"}, "was trained on all.h5ad, not on .*train.h5ad"),
        ({"train_cells": 50}, "was trained on 50 cells of .*train.h5ad, which now has 96"),
        (None, "no train_config.json"),
    ],
)
def test_pipeline_of_other_cells_gives_a_warning(evaluate_script, split_dir, pipeline, tmp_path, config, message):
    if config is not None:
        known = json.loads((pipeline / "train_config.json").read_text())
        (tmp_path / "train_config.json").write_text(json.dumps(known | config))
    (warning,) = evaluate_script.training_warnings(str(tmp_path), split_dir / "train.h5ad", 96)
    assert re.search(message, warning)


def test_errors_end_the_script_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--split_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^error: {tmp_path} .*--dataset"):
        runpy.run_path(str(TRAINING / "evaluate.py"), run_name="__main__")


# -- adapters and model cards ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(pipeline, tmp_path_factory):
    """A folder as LoRA training leaves it where genes and labels are the pretrained ones, with another composition."""
    folder = tmp_path_factory.mktemp("adapter")
    pipe = SCRDiTPipeline.from_pretrained(pipeline)
    finetuning.add_lora(pipe.transformer, 2, {})
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    pipe.processor.composition = [[0, 7], [1, 5], [2, 3]]
    finetuning.save_lora(pipe, str(folder), adapter_only=True)
    record = json.loads((pipeline / "train_config.json").read_text())
    (folder / "train_config.json").write_text(json.dumps(record))
    record |= {"command": ["train.py"], "max_train_steps": 1, "train_batch_size": 1, "seed": 0, "lora_rank": 2}
    changes = finetuning.compare_processors(pipe.processor, pipe.processor) | {"adapter_only": True}
    record |= {"pretrained_model_name_or_path": str(pipeline), "finetuning": changes}
    model_card.write_facts(pipe, record, {}, folder)
    return folder


def test_an_adapter_is_evaluated_with_its_processor(evaluate_script, split_dir, pipeline, adapter):
    command = ["--split_dir", split_dir, "--pipeline", pipeline, "--lora_weights", adapter]
    parser = HfArgumentParser(evaluate_script.EvaluationArguments)
    args = parser.parse_args_into_dataclasses([str(argument) for argument in command])[0]
    pipe = evaluate_script.Evaluation(args, evaluate_script.read_split(args)).pipe
    assert list(pipe.get_list_adapters()) == ["transformer"]
    assert pipe.processor.composition == [[0, 7], [1, 5], [2, 3]]


def test_results_are_added_to_the_card(evaluate, split_dir, pipeline, adapter, tmp_path):
    arguments = ["--pipeline", pipeline, "--lora_weights", adapter, "--output_dir", tmp_path, "--update_card"]
    evaluate("--split_dir", split_dir, *arguments, "--privacy", *QUICK)
    record = json.loads((adapter / "metrics.json").read_text())
    assert record["source"] == f"pipeline {pipeline} with {adapter}" and record["warnings"] == []
    text = (adapter / "README.md").read_text(encoding="utf-8")
    assert f"| {report.format_value(row(record, 'w2')['value'])} |" in text
    assert privacy.in_words(record["privacy"])[0] in text
    assert "](figures/umap-by-origin.png)" in text and (adapter / "figures" / "umap-by-origin.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_weights", "adapter"], "--lora_weights adapter .*--pipeline"),
        (["--pipeline", "nowhere", "--update_card"], r"--update_card .*card\.json.* nowhere "),
    ],
)
def test_adapters_and_cards_that_cannot_be_are_refused(evaluate, split_dir, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate("--split_dir", split_dir, *arguments)


def test_a_pipeline_of_cells_given_in_python_is_not_said_to_be_of_other_cells(tmp_path):
    config = {"dataset": str(tmp_path / "gone" / "adata.h5ad"), "train_cells": 3, "val_cells": 0}
    (tmp_path / "train_config.json").write_text(json.dumps(config))
    (warning,) = load_script("evaluate").training_warnings(str(tmp_path), tmp_path / "train.h5ad", 3)
    assert "given in Python" in warning and "not on" not in warning
