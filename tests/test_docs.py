"""The documentation names what the package exports, and its commands exist; test_docs_snippets.py runs its snippets."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from scripts import TRAINING  # so that scripts can be imported by name
from transformers import HfArgumentParser

import scrdit_diffusers
from scrdit_diffusers.commands import COMMANDS

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "_generated" not in page.parts]
ARGUMENTS = {
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


def test_every_public_name_has_an_entry():
    page = (DOCS / "api" / "package.md").read_text(encoding="utf-8")
    entries = re.findall(r"\.\. (?:autoclass|autofunction|py:data):: (\w+)", page)
    assert sorted(entries) == sorted(scrdit_diffusers.__all__)


def test_every_module_of_evaluation_has_an_entry():
    page = (DOCS / "api" / "evaluation.md").read_text(encoding="utf-8")
    modules = {path.stem for path in (REPOSITORY / "scrdit_diffusers" / "evaluation").glob("*.py")} - {"__init__"}
    assert set(re.findall(r"automodule:: scrdit_diffusers\.evaluation\.(\w+)", page)) == modules


def test_every_card_has_a_page():
    cards = {path.parent.name for path in REPOSITORY.glob("hub_cards/*/card.json")}
    assert {path.stem for path in (DOCS / "cards").glob("*.md")} == cards


def commands(page):
    """The commands of this package in the shell blocks of a page: name and arguments."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            call = re.search(r"(?:scrdit |\$\(scrdit path |training/)(\w+)(?:\.py)?\)?\"?( .*)?$", line)
            if call and call[1] not in ("demo", "path"):
                yield call[1], shlex.split(call[2] or "", comments=True)


@pytest.mark.parametrize("page", [p for p in PAGES if list(commands(p))], ids=lambda p: str(p.relative_to(DOCS)))
def test_commands_are_understood(page):
    """By the parsers of the scripts; what the files hold is not looked at."""
    for name, arguments in commands(page):
        assert name in COMMANDS and (TRAINING / f"{name}.py").exists()
        module, arguments_class = ARGUMENTS[name]
        parser = HfArgumentParser(getattr(importlib.import_module(module), arguments_class))
        parser.error = lambda message, call=(name, *arguments): pytest.fail(f"{' '.join(call)}: {message}")
        parser.parse_args_into_dataclasses(arguments)
