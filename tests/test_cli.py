"""Flags that come twice, numbers out of range, unknown flags, and files of gene names."""

import dataclasses
import sys
from dataclasses import dataclass

import annotate
import augment
import cli
import complete
import convert_checkpoint
import denoise
import distill
import evaluate
import generate
import interpolate
import pytest
import simulate
import translate
from arguments import TrainingArguments, check_args
from cli import PipelineArguments, arg, command_line, describe, may_change, parse, read_genes, run_job


@dataclass
class SomeArguments:
    labels_key: list[str] = arg([], "A list.")
    steps: list[int] = arg([5, 10], "A list with a default.")
    seed: int = arg(0, "A number.")


def parsed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    return parse(SomeArguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--labels_key", "a", "b", "--steps", "1", "2"],
        ["--labels_key", "a", "--labels_key", "b", "--steps", "1", "--steps", "2"],
        ["--labels_key=a", "--steps=1", "--labels-key=b", "--steps=2"],
        ["--labels-key", "a", "--labels_k=b", "--steps=1", "--ste", "2"],
    ],
)
def test_lists_of_a_flag_that_comes_twice_are_joined(monkeypatch, arguments):
    found = parsed(monkeypatch, *arguments)
    assert (found.labels_key, found.steps) == (["a", "b"], [1, 2])
    assert parsed(monkeypatch).steps == [5, 10]  # nothing is left of an earlier command line


def test_the_last_value_of_another_flag_counts(monkeypatch):
    """So that a script can append what its user wants changed."""
    assert parsed(monkeypatch, "--seed", "3", "--seed=4").seed == 4


SCRIPTS = {
    "train": (check_args, TrainingArguments("cells.h5ad", report_to="none")),
    "generate": (generate.check_args, generate.GenerationArguments("model", num_cells=1)),
    "evaluate": (evaluate.check_args, evaluate.EvaluationArguments("split")),
    "denoise": (denoise.check_args, denoise.DenoisingArguments("model", dataset="cells.h5ad")),
    "annotate": (annotate.check_args, annotate.AnnotationArguments("model", dataset="cells.h5ad")),
    "simulate": (simulate.check_args, simulate.SimulationArguments("model", num_cells=1)),
    "augment": (augment.check_args, augment.AugmentationArguments("model", dataset="cells.h5ad", to=["9"])),
    "complete": (complete.check_args, complete.CompletionArguments("model", dataset="cells.h5ad")),
    "translate": (translate.check_args, translate.TranslationArguments("model", dataset="c.h5ad", condition=["a=b"])),
    "interpolate": (
        interpolate.check_args,
        interpolate.InterpolationArguments("model", dataset="cells.h5ad", end_cells=["cell0"]),
    ),
    "distill": (distill.check_args, distill.DistillationArguments("model")),
    "convert_checkpoint": (convert_checkpoint.main, convert_checkpoint.ConversionArguments("a.pt", "model")),
}
ANY_NUMBER = {"zero_value", "n_jobs"}  # finite, but of any sign


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_out_of_range_are_refused_by_name(script):
    check, arguments = SCRIPTS[script]
    hints = {argument.name: str(argument.type) for argument in dataclasses.fields(arguments)}
    numbers = [name for name, hint in hints.items() if ("int" in hint or "float" in hint) and "list" not in hint]
    assert len(numbers) >= 3
    for name in numbers:
        values = [float("nan"), float("inf")] * ("float" in hints[name]) + [-5] * (name not in ANY_NUMBER)
        for value in values:
            with pytest.raises(ValueError, match=f"--{name} .*{value}"):
                check(dataclasses.replace(arguments, **{name: value}))


SECRET = "notARealSecret"


@pytest.mark.parametrize("words", [["--hub_tokn", SECRET], [f"--hub_tokn={SECRET}"], ["--hub-tokn", SECRET, "--see=1"]])
def test_an_unknown_flag_is_named_without_its_value(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["train.py", "--labels_key", "a", *words])
    with pytest.raises(ValueError, match=r"--hub.tokn.*--hub_token") as raised:
        parse(TrainingArguments)
    assert SECRET not in str(raised.value)


def test_a_word_without_a_flag_is_not_shown(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "1", SECRET])
    with pytest.raises(ValueError, match=r"^Word 3 (?!.*Secret)"):
        parse(TrainingArguments)


@pytest.mark.parametrize("flag", ["--h", "--hub", "--hub_"])
def test_an_abbreviation_that_fits_several_flags_is_shown_without_its_value(monkeypatch, capsys, flag):
    monkeypatch.setattr(sys, "argv", ["train.py", f"{flag}={SECRET} and more"])
    with pytest.raises(SystemExit):
        parse(TrainingArguments)
    printed = capsys.readouterr().err
    assert f"{flag}=*** could match" in printed and SECRET not in printed and "and more" not in printed


def test_gene_names_are_lines(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_bytes("\ufeffHLA-A\r\nsomething odd \r\n\r\nB2M".encode())
    assert read_genes(path) == ["HLA-A", "something odd", "B2M"]


def test_a_resumed_run_may_change_what_says_so():
    assert may_change(arg(0, "A number.", True)) and not may_change(arg(0, "A number."))


def test_a_description_holds_arguments_and_versions_but_no_credentials():
    described = describe(PipelineArguments(pipeline="https://ada:engine@example.org/model", seed=3))
    assert described["pipeline"] == "https://***@example.org/model" and described["seed"] == 3
    assert {"torch", "diffusers", "scrdit_diffusers"} <= described.keys() and None not in described.values()


def test_an_interrupt_ends_a_job_with_a_sentence(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupt)
    with pytest.raises(SystemExit, match="nothing was written"):
        run_job(None, SomeArguments)


def test_help_names_the_command_and_shows_defaults_where_there_are_some(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/generate.py", "--help"])
    with pytest.raises(SystemExit):
        parse(PipelineArguments)
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: scrdit generate ") and "(default: None)" not in text


def test_a_recorded_command_shows_no_folder_of_this_machine(monkeypatch):
    words = ["/home/me/train.py", "--dataset", "/home/me/cells.h5ad", "--genes=/home/me/a.txt", "--output_dir", "x/y"]
    monkeypatch.setattr(sys, "argv", words)
    shown = ["scrdit", "train", "--dataset", "cells.h5ad", "--genes=a.txt", "--output_dir", "x/y"]
    assert command_line() == shown


def test_a_word_without_a_flag_is_told_where_values_go(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "cells.h5ad"])
    with pytest.raises(ValueError, match="after its flag, as in --dataset"):
        parse(TrainingArguments)
