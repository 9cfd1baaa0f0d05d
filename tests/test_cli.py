"""Command-line arguments are declared once, and repeated ones are not lost."""

from dataclasses import dataclass

import pytest
from cli import arg, may_change
from transformers import HfArgumentParser


@dataclass
class Arguments:
    labels_key: list[str] = arg([], "Columns.", True)
    steps: list[int] = arg([5, 10], "Numbers.")
    seed: int = arg(0, "Number.")


def parse(*command):
    return HfArgumentParser(Arguments).parse_args_into_dataclasses(list(command))[0]


@pytest.mark.parametrize(
    "command",
    [
        ["--labels_key", "a", "b", "--steps", "1", "2"],
        ["--labels_key", "a", "--steps", "1", "--labels_key", "b", "--steps", "2"],
        ["--labels_key=a", "--labels_key=b", "--steps=1", "--steps=2"],
        ["--labels-key", "a", "--labels_k=b", "--steps=1", "--ste", "2"],
    ],
    ids=["together", "twice", "with equals signs", "abbreviated"],
)
def test_values_of_a_repeated_flag_are_joined(command):
    assert parse(*command) == Arguments(["a", "b"], [1, 2])
    assert parse() == Arguments([], [5, 10])  # defaults stay


def test_a_resumed_run_may_change_what_says_so():
    assert [may_change(field) for field in Arguments.__dataclass_fields__.values()] == [True, False, False]
