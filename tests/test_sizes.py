"""The table of sizes, on a made-up repository."""

import subprocess
import sys

import pytest
from scripts import load_script

FILES = {
    "training/train.py": """
from scrdit_diffusers.objective import loss

def main(args):
    for batch in args:
        step(batch)

def step(batch):
    value = loss(batch)
    return value
""",
    "scrdit_diffusers/objective.py": "def loss(batch):\n    return model(batch)\n",
    "scrdit_diffusers/transformer_scrdit.py": "class T:\n    def forward(self, x):\n        return x\n",
    "scrdit_diffusers/pipeline_scrdit.py": "\n\nclass P:\n    def __call__(self):\n        pass\n",
    "training/arguments.py": "class TrainingArguments:\n    seed: int = 0\n    dataset: str = ''\n",
}


@pytest.fixture(scope="module")
def sizes():
    return load_script("benchmarks/sizes")


def test_sizes_are_those_of_the_files(sizes):
    table = sizes.measure({path: sizes.parse(text) for path, text in FILES.items()})
    assert table["Python files"] == "5" and table["train.py: lines"] == "10"
    assert table["train.py: main, lines / names"] == "3 / 2"
    assert table["train.py: flags"] == "2" and table["pipeline: line of `__call__`"] == "4"
    assert table["modules entered by the arguments"] == "2"


def test_calls_and_files_on_the_way_are_counted(sizes):
    """From main to step in the same file, to the loss, and from there to the model."""
    objective = "from .transformer_scrdit import T\n" + FILES["scrdit_diffusers/objective.py"]
    files = FILES | {"scrdit_diffusers/objective.py": objective}
    sources = {path: sizes.parse(text) for path, text in files.items()}
    assert sizes.count_hops(sources) == 3 and sizes.count_hops(sources, files_only=True) == 2
    assert sizes.count_hops({path: sizes.parse(text) for path, text in FILES.items()}) is None


def test_a_commit_is_compared_with_the_files_of_today(sizes, tmp_path, monkeypatch, capsys):
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "before"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "training" / "train.py").write_text(FILES["training/train.py"] + "\n\nLAST = 1\n")
    monkeypatch.setattr(sizes, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["sizes.py", "--against", "HEAD"])
    sizes.main()
    out = capsys.readouterr().out
    assert "| | HEAD | now |" in out and "| train.py: lines | 10 | 13 |" in out
