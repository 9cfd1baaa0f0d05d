"""Arguments of the training script: defaults, recipes, checks."""

import json

import anndata as ad
import arguments
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from scripts import REPOSITORY, train
from transformers import HfArgumentParser

from scrdit_diffusers import launch


@pytest.mark.parametrize(
    ("batch_size", "val_fraction", "steps"),
    [(81, 0.1, 600), (16, 0.1, 900), (4, 0.1, 2500), (1, 0.1, 4860), (1, 0, 5000)],
    ids=["at least 600", "150 passes", "2,500", "60 passes", "at most 5,000"],
)
@pytest.mark.usefixtures("train_here")  # which cleans up
def test_default_number_of_steps(train_script, dataset, tmp_path, capsys, batch_size, val_fraction, steps):
    """81 training cells, or 90."""
    size = dict(n_top_genes=30, patch_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    output = dict(output_dir=str(tmp_path / "model"), report_to="none", dry_run=True, val_fraction=val_fraction)
    train_script.main(train_script.TrainingArguments(str(dataset), train_batch_size=batch_size, **size, **output))
    assert json.loads(capsys.readouterr().out)["arguments"]["max_train_steps"] == steps


BAD_ARGUMENTS = {
    "no such file": (["--dataset", "nowhere.h5ad"], r"^nowhere\.h5ad "),
    "unknown label column": (
        ["--labels_key", "celltype"],
        r"cells\.h5ad: obs .*'celltype'.*'cell_type'.*\['cell_type'",
    ),
    "missing layer": (["--layer", "counts"], r"cells\.h5ad: adata\.layers\['counts'\]"),
    "no layers": (["--num_layers", "0"], "num_layers .* 0"),
    "negative rate": (["--learning_rate", "-1"], "--learning_rate .*-1"),
    "all cells held out": (["--val_fraction", "1"], r"--val_fraction .* 1\.0"),
    "no genes": (["--n_top_genes", "0"], "--n_top_genes .* 0"),
    "one state": (["--num_states", "1"], "--num_states .* 1"),
    "fewer states than none": (["--num_states", "-2"], "--num_states .*-2"),
    "states without counts": (["--num_states", "3", "--decode", "round"], "--num_states 3 .*--decode posterior"),
    "unknown schedule": (["--lr_scheduler", "cosin"], r"--lr_scheduler .*'cosine'.* cosin\b"),
    "unknown precision": (["--mixed_precision", "fp8"], "--mixed_precision .* fp8"),
    "unknown tracker": (["--report_to", "foo"], "foo"),
    "no gene list": (["--genes", "nowhere.txt"], r"--genes nowhere\.txt"),
    "no checkpoint": (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere"),
    "decoding below what is trained": (["--decode_timestep", "100"], "--min_timestep 200.*--decode_timestep 100"),
    "noise prediction with counts": (["--prediction_type", "epsilon"], "--prediction_type epsilon.*--decode round"),
    "velocity prediction with counts": (
        ["--prediction_type", "v_prediction"],
        "--prediction_type v_prediction.*--decode round",
    ),
    "zero negation of counts": (["--zero_negation", "True"], "--zero_negation.*--decode round"),
    "counts for log values": (["--value_space", "log_normalized"], r"cells\.h5ad .*target_sum=1e4"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(train_here, dataset, tmp_path, name):
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_here(dataset, tmp_path / "model", *arguments)
    assert not (tmp_path / "model").exists()


def test_dry_run_prints_cost_and_writes_nothing(train_here, dataset, tmp_path, capsys, caplog):
    train_here(dataset, tmp_path / "model", "--dry_run", "--hub_token", "secret")
    assert not (tmp_path / "model").exists()
    printed = capsys.readouterr().out
    assert "MFLOP per cell" in caplog.text and '"patch_size": 8' in printed and "secret" not in printed


def test_all_rare_labels_are_named_before_training(train_here, dataset, tmp_path, caplog):
    train_here(dataset, tmp_path, "--labels_key", "cell_type", "--val_fraction", "0.7", "--dry_run", "true")
    assert "Few training cells for some of cell_type" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "advised"),
    [(["--labels_key", "cell_type"], True), (["--labels_key", "cell_type", "--num_states", "0"], False), ([], False)],
)
def test_states_are_advised_beside_few_labels(train_here, dataset, tmp_path, caplog, arguments, advised):
    many = ad.concat([ad.read_h5ad(dataset)] * 4, index_unique="-")
    many.write_h5ad(tmp_path / "many.h5ad")
    train_here(tmp_path / "many.h5ad", tmp_path / "model", "--dry_run", "true", *arguments)
    assert ("--num_states 5 finds groups" in caplog.text) == advised


def test_launched_processes_that_do_not_find_each_other_are_refused(train_here, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^2 .* 1: .*ACCELERATE_USE_CPU"):
        train_here(dataset, tmp_path)


def test_one_process_where_accelerate_was_asked_for_two_is_refused(monkeypatch):
    command = ["--num_processes", "2", "--cpu", "training/train.py"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(command))[0]
    for name, value in prepare_simple_launcher_cmd_env(arguments)[1].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="num_processes"):
        launch.check_processes(1)


def test_accelerate_understands_the_configuration():
    # port 0: whatever listens on the default one
    command = ["--config_file", str(REPOSITORY / "training" / "configs" / "ddp.yaml"), "--main_process_port", "0"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args([*command, "training/train.py"]))
    assert prepare_multi_gpu_env(parsed)["ACCELERATE_MIXED_PRECISION"] == "bf16"


PAPER = {"value_space": "log_normalized", "decode": "round", "zero_negation": True, "zero_value": -10}
PAPER |= {
    "n_top_genes": 2000,
    "standardize": False,
    "flavor": "cv",
    "val_fraction": 0,
    "dropout": 0,
    "num_train_timesteps": 1000,
}
PAPER |= {"beta_schedule": "linear", "prediction_type": "epsilon", "loss_weighting": "epsilon", "max_loss_weight": 1e9}
PAPER |= {"train_batch_size": 16, "learning_rate": 3e-4, "lr_scheduler": "constant", "lr_warmup_steps": 0}
PAPER |= {"adam_beta2": 0.999, "adam_weight_decay": 0.01, "max_grad_norm": 1e9, "use_ema": False}


@pytest.mark.parametrize("preset", ["scrdit-paper-d1", "scrdit-paper-d3"])
def test_the_presets_of_the_paper_train_as_published(preset):
    args = arguments.TrainingArguments("cells.h5ad", preset=preset).with_recipe()
    arguments.check_args(args)
    settings = args.resolve(num_cells=160, num_processes=1, width=768)
    assert {name: getattr(settings, name) for name in PAPER} == PAPER
    assert settings.max_train_steps == 1600 * 10


def test_arguments_that_are_given_override_the_recipe():
    given = {"use_ema": True, "flavor": "seurat", "max_train_steps": 7, "train_batch_size": 128}
    args = arguments.TrainingArguments("cells.h5ad", preset="scrdit-paper-d1", **given).with_recipe()
    settings = args.resolve(num_cells=160, num_processes=1, width=768)
    assert {name: getattr(settings, name) for name in given} == given
    assert settings.learning_rate == 3e-4


def test_a_switch_of_the_recipe_is_turned_on_and_off():
    parser = HfArgumentParser(arguments.TrainingArguments)
    assert parser.parse_args_into_dataclasses(["--zero_negation"])[0].zero_negation is True
    assert parser.parse_args_into_dataclasses(["--use_ema", "False"])[0].use_ema is False
    assert parser.parse_args_into_dataclasses([])[0].use_ema is None


def test_unknown_facts_of_the_model_card_are_refused(tmp_path):
    (tmp_path / "card.yaml").write_text("tissue: lung\norgan: lung\n")
    args = arguments.TrainingArguments("cells.h5ad", card_data=str(tmp_path / "card.yaml")).with_recipe()
    with pytest.raises(ValueError, match=r"card_data.*\['organ'\]"):
        arguments.check_args(args)


def test_errors_end_the_script_without_a_traceback(tmp_path):
    result = train("nowhere.h5ad", tmp_path)
    assert result.returncode != 0 and "error: nowhere.h5ad" in result.stderr
