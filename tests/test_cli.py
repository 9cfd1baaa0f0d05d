"""Flags that come twice, and files of gene names."""

import sys
from dataclasses import dataclass

import pytest
from cli import arg, may_change, parse, read_genes


@dataclass
class SomeArguments:
    labels_key: list[str] = arg([], "A list.")
    steps: list[int] = arg([5, 10], "A list with a default.")
    layer: str | None = arg(None, "Text.")
    seed: int = arg(0, "A number.")
    streaming: bool = arg(False, "A switch.")


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


@pytest.mark.parametrize(
    ("flag", "first", "second"),
    [("--seed", "0", "1"), ("--layer", "counts", "raw"), ("--streaming", "True", "False"), ("--seed", "3", "0")],
)
def test_a_flag_with_two_values_is_refused(monkeypatch, capsys, flag, first, second):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, flag, first, flag, second)
    message = capsys.readouterr().err
    assert all(word in message for word in (flag, first, second))


def test_a_flag_with_the_same_value_twice_is_taken(monkeypatch):
    assert parsed(monkeypatch, "--seed", "3", "--seed=3", "--streaming", "--streaming").seed == 3


def test_gene_names_are_lines(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_bytes("\ufeffHLA-A\r\nsomething odd \r\n\r\nB2M".encode())
    assert read_genes(path) == ["HLA-A", "something odd", "B2M"]


def test_a_resumed_run_may_change_what_says_so():
    assert may_change(arg(0, "A number.", True)) and not may_change(arg(0, "A number."))
