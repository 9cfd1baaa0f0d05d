"""Commands, records and messages hold no credentials."""

import json
import logging
import shlex
import subprocess
import sys

import cli
import pytest
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser, simple_launcher
from accelerate.state import AcceleratorState
from scripts import TINY, load_script
from sklearn.ensemble import RandomForestClassifier

from scrdit_diffusers.evaluation import compare, report
from scrdit_diffusers.redaction import redact

SECRET = "hf_notARealTokenOfAnyone"
COMMANDS = {
    "two words": ["--hub_token", SECRET],
    "one word": [f"--hub_token={SECRET}"],
    "with dashes": ["--hub-token", SECRET],
    "abbreviated": ["--hub_tok", "xSECRETx"],
    "abbreviated to the shortest": ["--hub_t", "xSECRETx"],
    "abbreviated, one word": ["--hub_to=xSECRETx"],
    "after nothing": ["--hub_token", "", "xSECRETx"],
    "with blanks": ["--hub_token", "xSECRETx y xSECRETx"],
    "a variable": ["env", "HF_TOKEN=xSECRETx", "python"],
    "a key": ["WANDB_API_KEY=xSECRETx"],
    "another flag": ["--password", "xSECRETx", "--secret-key=xSECRETx", "-token", "xSECRETx"],
    "an address": ["--dataset", "https://ada:xSECRETx@example.org/cells.h5ad"],
    "an address without a password": ["--dataset=https://xSECRETx@example.org/cells.h5ad"],
    "an address as a path": ["https:/ada:xSECRETx@example.org/cells.h5ad"],
    "a password with an at sign": ["s3://ada:xSECRETx@xSECRETx@example.org/cells"],
    "a chain of addresses": ["zip://cells.h5ad::https://ada:xSECRETx@example.org/cells.zip"],
    "a query": ["https://example.org/a?sig=xSECRETx&access_token=xSECRETx&X-Amz-Signature=xSECRETx"],
    "a token elsewhere": ["--card_data", SECRET],
    "tokens of other shapes": [
        "hf_oauth_xSECRETx0123456789",
        "ghr_xSECRETx0123456789",
        "eyJxSECRETx0123.eyJ0.xSECRETx",
    ],
    "a password with a slash": ["https://ada:a/xSECRETx@example.org/cells.h5ad"],
    "JSON": ['{"hub_token": "xSECRETx"}', "api_key: xSECRETx"],
    "a header": ["Authorization: Token xSECRETx"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_holds_no_credential(name):
    command = ["train.py", "--seed", "0", *COMMANDS[name], "--num_cell_tokens", "8"]
    for hidden in (shlex.join(redact(command)), json.dumps(redact({"nested": {"command": command}}))):
        assert SECRET not in hidden and "SECRET" not in hidden and "***" in hidden
        assert "--seed" in hidden and hidden.count("8") == 1


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"with blanks", "after nothing"}))
def test_a_message_holds_no_credential(name):
    for text in (
        shlex.join(COMMANDS[name]),
        f"not used: {COMMANDS[name]}",
        f"{' '.join(COMMANDS[name])} does not exist",
    ):
        assert SECRET not in redact(text) and "SECRET" not in redact(text)


def test_a_value_of_the_environment_is_found_anywhere(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_TOKEN", "short")
    assert redact("key 0123456789abcdef in short") == "key *** in short"


def test_values_are_hidden_by_their_names(monkeypatch):
    monkeypatch.setenv("HF_TOKEN_WRITE", "0123456789")
    record = redact({"hub_token": "abc", "deep": [{"password": "def"}], "note": "0123456789", "labels_key": "token"})
    assert record == {"hub_token": "***", "deep": [{"password": "***"}], "note": "***", "labels_key": "token"}


def test_other_texts_stay():
    command = (
        "train.py --num_cell_tokens 8 --dataset hf_cells.h5ad --labels_key cell_type --seed=3 a@b.org PWD=/home/ada"
    )
    assert redact(command) == command and redact(command.split()) == command.split()
    text = "https://example.org/cells.h5ad and user/name@main, log in or pass token=..., with a token"
    assert redact(text) == text


def test_other_values_stay():
    record = {"seed": 3, "rate": 1e-3, "labels_key": ["a", "b"], "none": None, "sizes": [1, 2], "deep": [{"x": "y"}]}
    assert redact(record) == record


@pytest.fixture
def run(monkeypatch):
    """Run a script in this process by its command line."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    kept = logging.getLogRecordFactory()

    def run(name, *arguments):
        script = load_script(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        cli.run(script.main, getattr(script, ARGUMENTS[name]), (ValueError, OSError))
        assert SECRET not in shlex.join(sys.argv)  # which trackers record
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()

    yield run
    logging.setLogRecordFactory(kept)


ARGUMENTS = {"train": "TrainingArguments", "generate": "GenerationArguments", "evaluate": "EvaluationArguments"}
ADDRESS = f"https://ada:{SECRET}@example.org/cells.h5ad"


@pytest.mark.usefixtures("train_here")  # which cleans up
def test_no_credential_is_written_or_shown(run, dataset, tmp_path, monkeypatch, capfd):
    """Every byte that training, generation and evaluation write, and what they print."""
    monkeypatch.setattr(compare, "RandomForestClassifier", lambda n, **kwargs: RandomForestClassifier(20, **kwargs))
    monkeypatch.setattr(report, "draw_figures", lambda *args: [])  # compiling UMAP takes a minute
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, SECRET)
    (tmp_path / "card.yaml").write_text(f"dataset_accession: {ADDRESS}\n")
    split, pipeline = tmp_path / "split", tmp_path / "pipeline"
    run("evaluate", "--dataset", dataset, "--labels_key", "cell_type", "--split_dir", split)
    (split / "split.json").unlink()  # so that the dataset, which is written anew below, may be called anything
    train = ["--dataset", split / "train.h5ad", "--output_dir", pipeline, *TINY, "--labels_key", "cell_type"]
    train += ["--report_to", "tensorboard", "--card_data", tmp_path / "card.yaml", f"--hub_to={SECRET}"]
    run("train", *train, "--hub_tok", SECRET, "--hub-token", SECRET)
    run("generate", "--pipeline", pipeline, "--num_cells", 4, "--output", tmp_path / "cells.h5ad", "--device", "cpu")
    evaluate = ["--split_dir", split, "--dataset", ADDRESS, "--pipeline", pipeline, "--output_dir", tmp_path / "out"]
    evaluate += ["--num_seeds", 1, "--n_jobs", 1, "--num_inference_steps", 2, "--baselines", "none", "--steps_curve", 0]
    run("evaluate", *evaluate, "--update_card", "--min_label_cells", 10)
    for name, more in {
        "train": ["--output_dir", tmp_path / "other"],
        "evaluate": ["--split_dir", tmp_path / "no"],
    }.items():
        with pytest.raises(SystemExit, match=r"^error: (?!.*RealToken)"):
            run(name, "--dataset", ADDRESS, *more)
    with pytest.raises(SystemExit):
        run("train", f"--hub_={SECRET}")  # ambiguous, as argparse says with the whole word
    sys.excepthook(RuntimeError, RuntimeError(ADDRESS), None)
    logging.getLogger("train").warning("starting from %s", ADDRESS)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "card.yaml"]
    assert {"README.md", "arguments.json", "train_config.json", "metrics.json"} <= {path.name for path in written}
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    shown = capfd.readouterr()
    assert SECRET not in shown.out + shown.err and "ambiguous" in shown.err and "***@example.org" in shown.err


@pytest.mark.parametrize("quiet", [False, True])
def test_a_launcher_that_is_told_to_be_quiet_does_not_print_the_command(tmp_path, quiet):
    """As docs/reliability.md advises; the other one does."""
    (tmp_path / "fails.py").write_text("raise SystemExit(1)")
    command = [*["--quiet"] * quiet, "--num_processes", "1", str(tmp_path / "fails.py"), "--hub_token", SECRET]
    with pytest.raises((SystemExit, subprocess.CalledProcessError)) as raised:
        simple_launcher(_validate_launch_command(launch_command_parser().parse_args(command))[0])
    assert (SECRET in str(raised.value)) is not quiet
