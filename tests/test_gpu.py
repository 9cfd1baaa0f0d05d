"""The command that measures a GPU, in miniature on a CPU, and its calls of an accelerator, on stand-ins."""

import contextlib
import inspect
import io
import json
import subprocess
import sys
import types

import pytest
import torch
from accelerate.state import AcceleratorState
from scripts import load_script
from transformers import HfArgumentParser


@pytest.fixture
def script():
    return load_script("benchmarks/gpu")


@pytest.fixture
def speed():
    return load_script("benchmarks/speed")


@pytest.fixture
def run(script, tmp_path, monkeypatch, train_here, evaluate, evaluate_script):
    """Run the command in miniature; what it would start as processes runs here, and its words are listed.

    Left out is what takes half a minute: figures of the evaluation, and the code that a compiler generates.
    """
    started = []
    monkeypatch.setattr(evaluate_script, "draw_figures", lambda *args: {})
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: started.append("compile"))

    def run_logged(command, log, timeout):
        words = [str(word) for word in command[1:]]
        started.append(words)
        log.parent.mkdir(parents=True, exist_ok=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            if words[0].endswith("gpu.py"):
                monkeypatch.setattr(sys, "argv", words)
                script.main()
            elif words[0].endswith("evaluate.py"):
                evaluate(*words[1:])
            else:
                train = load_script("train")
                train.main(HfArgumentParser(train.TrainingArguments).parse_args_into_dataclasses(words[1:])[0])
                AcceleratorState._reset_state(reset_partial_state=True)
        log.write_text(printed.getvalue())

    monkeypatch.setattr(script, "run_logged", run_logged)

    def run(*arguments):
        words = ["gpu.py", "--miniature", "--device", "cpu", "--output_dir", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        started.clear()
        script.main()
        return json.loads((tmp_path / "out/gpu.json").read_text())["rows"], list(started)

    return run


NAMES = ["matmul", "loader", "scrdit-s, 40 genes", "training", "evaluation", "scrdit-s, 40 genes, compiled"]


def test_miniature_measures_every_row_on_a_cpu_once(run, capsys):
    rows, started = run()
    assert list(rows) == NAMES and "--compile" in started[-3] and started[-2:] == ["compile"] * 2
    assert rows["matmul"]["flops_per_second"] > 0 and rows["matmul"]["torch"] == torch.__version__
    assert rows["loader"]["40 genes, 0 workers"]["cells_per_second"] > 0
    training = rows["training"]
    assert training["max_train_steps"] >= 1 and training["train_cells"] == 60 and training["cells_per_second"] > 0
    assert 0.4 <= rows["evaluation"]["classifier_genes_auroc"]["value"] <= 1
    for name in (NAMES[2], NAMES[-1]):
        for task in ("sampling", "training"):
            found = rows[name][task]
            share = found["flops_per_second"] / rows["matmul"]["flops_per_second"]
            assert found["share_of_matmul"] == pytest.approx(share) and found["batch_size"] == 8
    printed = capsys.readouterr().out
    assert "| scrdit-s, 40 genes, compiled | " in printed and "error" not in printed
    again, started = run()
    assert again == rows and not started  # nothing is left to do


def test_what_does_not_fit_into_the_time_is_skipped_and_measured_later(script, run, monkeypatch):
    monkeypatch.setattr(script, "train", lambda args, seconds: {"cells_per_second": 1.0})
    monkeypatch.setattr(script, "evaluate", lambda args, seconds: {"skipped": "nothing was trained"})
    rows, _ = run("--max_seconds", 20)
    assert rows["training"] == rows["evaluation"] == rows[NAMES[-1]] == {"skipped": "time"}
    assert "skipped" not in rows["matmul"]
    again, started = run("--max_seconds", 600)
    assert list(again) == NAMES and not any("skipped" in again[name] for name in ("training", NAMES[2], NAMES[-1]))
    assert again["evaluation"] == {"skipped": "nothing was trained"} and again["matmul"] == rows["matmul"]
    assert all("matmul" not in words for words in started)


def test_what_fails_has_its_error_in_its_row_and_the_others_go_on(script, run, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("no room for even one cell")

    monkeypatch.setattr(script.speed, "time_training", fail)
    rows, _ = run("--train_options", "--num_layers -1")
    assert rows["training"]["error"].startswith("ValueError: --num_layers")
    assert rows["evaluation"] == {"skipped": "nothing was trained"}
    assert "no room for even one cell" in rows[NAMES[-1]]["training"]["error"]
    assert rows[NAMES[-1]]["sampling"]["cells_per_second"] > 0


def test_results_of_a_process_that_is_cut_off_are_kept(script, tmp_path, monkeypatch):
    def run_logged(command, log, timeout):
        log.write_text('a warning\n{"sampling": {"cells_per_second": 7}}\nand more')
        raise subprocess.TimeoutExpired(command, timeout) if timeout else RuntimeError("exit code -9")

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(script, "run_logged", run_logged)
    args = types.SimpleNamespace(output_dir=tmp_path, device="cpu", repeats=1)
    expected = {"sampling": {"cells_per_second": 7}}
    assert script.run_measurement(args, "row", [], 1.0) == expected | {"skipped": "time"}
    assert script.run_measurement(args, "row", [], 0) == expected | {"error": "exit code -9"}


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, "64"),
        ({"skipped": "time"}, "64"),
        ({"error": "exit code -9"}, "64"),
        ({"sampling": {"batch_size": 32}, "training": {"error": "no room"}}, "32"),
        ({"sampling": {"batch_size": 32}, "training": {"batch_size": 8}}, "8"),
    ],
)
def test_compiled_models_begin_with_the_cells_that_fit_without(script, tmp_path, monkeypatch, known, expected):
    started = []

    def run_logged(command, log, timeout):
        started.extend(map(str, command))
        log.write_text('{"sampling": {"flops_per_second": 5.0}}\n{"training": {"error": "no compiler"}}')

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(script, "run_logged", run_logged)
    args = types.SimpleNamespace(output_dir=tmp_path, device="cpu", repeats=1, batch_size=64)
    record = {"rows": {"matmul": {"flops_per_second": 20.0}, "scrdit-s, 40 genes": known}}
    found = script.measure_preset(args, record, "scrdit-s", 40, True, 60.0)
    assert started[started.index("--batch_size") + 1] == expected and "--compile" in started
    assert found["sampling"]["share_of_matmul"] == 0.25 and found["training"] == {"error": "no compiler"}


def test_table_shows_rates_or_what_stands_in_their_place(script):
    rows = {
        "loader": {},
        "scrdit-s, 40 genes": {"sampling": {"cells_per_second": 1234.5, "share_of_matmul": 0.25}, "skipped": "time"},
        "scrdit-b, 40 genes": {"error": "exit code -9"},
    }
    lines = script.format_table(rows).splitlines()
    assert lines[2:] == [
        "| scrdit-s, 40 genes | 1,234 (0.25) | skipped: time |",
        "| scrdit-b, 40 genes | exit code -9 | exit code -9 |",
    ]


def test_cells_are_halved_until_they_fit(script):
    tried = []

    def measure(batch_size):
        tried.append(batch_size)
        if batch_size > 3:
            raise torch.OutOfMemoryError
        return {"cells_per_second": 1.0}

    found = script.halve_until_it_fits(measure, 16, "cpu")
    assert tried == [16, 8, 4, 2] and found["batch_size"] == 2


def test_one_row_runs_in_a_process_of_its_own(script, tmp_path):
    args = types.SimpleNamespace(output_dir=tmp_path, device="cpu", repeats=1)
    words = ["--measure", "matmul", "--matmul_size", 32]
    assert script.run_measurement(args, "matmul", words, 300)["flops_per_second"] > 0


def test_a_process_that_fails_or_takes_too_long_is_told_by_what_it_said_last(script, tmp_path):
    command = [sys.executable, "-c"]
    with pytest.raises(RuntimeError, match="exit code 3, see .*row.txt: the cause"):
        script.run_logged([*command, "print('the cause'); raise SystemExit(3)"], tmp_path / "logs/row.txt")
    with pytest.raises(subprocess.TimeoutExpired):
        script.run_logged([*command, "import time; time.sleep(60)"], tmp_path / "logs/row.txt", 0.1)


def test_memory_of_an_accelerator_is_its_peak_within_the_block(script, monkeypatch):
    calls = []
    accelerator = types.SimpleNamespace(
        reset_peak_memory_stats=lambda: calls.append("reset"), max_memory_allocated=lambda: 3 * 2**20
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: accelerator)
    with script.peak_memory("cuda") as found:
        calls.append("block")
    assert calls == ["reset", "block"] and found == {"megabytes": 3}


@pytest.mark.parametrize("name", ["reset_peak_memory_stats", "max_memory_allocated", "empty_cache", "get_device_name"])
def test_calls_of_an_accelerator_exist_without_arguments(name):
    for device in ("cuda", "xpu"):
        inspect.signature(getattr(torch.get_device_module(device), name)).bind()
    inspect.signature(torch.accelerator.synchronize).bind()


@pytest.mark.parametrize("preset", ["scrdit-s", "scrdit-b"])
def test_a_step_of_training_leaves_nothing_on_the_cpu(speed, preset, monkeypatch):
    """Tensors of the device "meta" have no values; mixed with those of another device they raise, as on a GPU."""
    monkeypatch.setattr(speed, "NUM_GENES", 250)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited.append(1))
    adam = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, fused: adam(parameters))
    settings = types.SimpleNamespace(device="meta", dtype="bfloat16", compile=False)
    rate, flops = speed.train_rate(preset, 300, 1, settings)
    assert rate > 0 and flops > 0 and len(waited) == 4


def test_presets_of_ours_have_a_count_head_and_the_papers_not(speed, monkeypatch):
    monkeypatch.setattr(speed, "NUM_GENES", 40)
    for preset, expected in {"scrdit-l": True, "scrdit-paper-d1": False}.items():
        pipe = speed.make_pipeline(preset, "cpu", torch.float32)
        assert (pipe.transformer.count_head is not None) == expected


@pytest.mark.parametrize(("available", "expected"), [([], "cpu"), (["xpu"], "xpu"), (["cuda", "xpu"], "cuda")])
def test_the_first_accelerator_is_measured(script, monkeypatch, available, expected):
    for device in ("cuda", "xpu"):
        monkeypatch.setattr(torch.get_device_module(device), "is_available", lambda device=device: device in available)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert script.parse().device == expected
