"""Training, generation and evaluation without a checkout: from the shell and from Python."""

import os
import signal
import subprocess
import sys
import threading
import time

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scripts import REPOSITORY, TINY

import scrdit_diffusers
from scrdit_diffusers import CellDataset, SCRDiTPipeline, SCRDiTProcessor, commands, fit_dataset, train

OPTIONS = {name.removeprefix("--"): value for name, value in zip(TINY[::2], TINY[1::2], strict=True)}


@pytest.fixture
def cells(dataset):
    return ad.read_h5ad(dataset)


def test_a_call_trains_and_returns_the_pipeline(cells, trained, tmp_path, capsys):
    """With the weights of the script, which ran with the same arguments in this process."""
    cells.obs["unused"], cells.uns["unused"] = [{1, 2}] * cells.n_obs, object()  # cannot be written
    pipe = train(cells, tmp_path / "model", "cell_type", **OPTIONS)
    expected = SCRDiTPipeline.from_pretrained(trained).transformer.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in pipe.transformer.state_dict().items())
    assert "loss=" in capsys.readouterr().err


def test_an_adapter_is_loaded_into_its_base(cells, trained, tmp_path):
    cells.obs["cell_type"] = (
        cells.obs["cell_type"].astype(str).replace("B cell", "new")
    )  # so that a base is saved beside it
    options = OPTIONS | {"pretrained_model_name_or_path": trained, "lora_rank": 2}
    for name in ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim"):
        del options[name]
    pipe = train(cells, tmp_path / "tuned", "cell_type", **options)
    assert (tmp_path / "tuned" / "model_index.json").exists() and list(pipe.get_list_adapters()) == ["transformer"]


def test_an_interrupted_call_is_continued_by_the_next(cells, trained, tmp_path):
    options = OPTIONS | {"max_train_steps": 100000, "lr_scheduler": "constant"}

    def interrupt():
        while not list(tmp_path.glob("checkpoint-*")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="resume_from_checkpoint"):
        train(cells, tmp_path, "cell_type", **options)
    last = max(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    train(cells, tmp_path, "cell_type", **options | {"max_train_steps": last + 1}, resume_from_checkpoint="latest")
    assert (tmp_path / f"checkpoint-{last + 1}").is_dir()


def test_errors_of_the_script_are_raised_here(cells, tmp_path):
    with pytest.raises(ValueError, match="--dropout.*2"):
        train(cells, tmp_path, "cell_type", dropout=2)


@pytest.mark.parametrize("name", ["labels_key", "layer", "gene_key"])
def test_missing_columns_are_refused_before_the_script_starts(cells, tmp_path, monkeypatch, name):
    monkeypatch.setattr(commands, "_run_script", None)
    with pytest.raises(ValueError, match=f"{name}.*nowhere"):
        train(cells, tmp_path, **{name: "nowhere"})


LABELS = {
    "dates": pd.to_datetime(["2026-01-02", "2026-01-01"]),
    "numbers and text": [1, "a"],
    "truth": pd.Series([True, False], dtype=object),
    "numbers": [10, 9],
    "categories": pd.Categorical([10, 9], categories=[10, 11, 9]),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_those_that_a_processor_has_for_the_cells(cells, tmp_path, name):
    cells.obs["label"] = pd.Series(LABELS[name]).loc[np.resize([0, 1], cells.n_obs)].array
    commands._write_used(cells, ["label"], {}, tmp_path / "adata.h5ad")
    written = CellDataset.open(tmp_path / "adata.h5ad", labels_key=["label"], cache_dir=tmp_path)
    expected = SCRDiTProcessor.from_anndata(cells, "label", flavor="all")
    fitted, _ = fit_dataset(written.rows, written.var, "label", flavor="all")
    assert fitted.to_json_string() == expected.to_json_string()


def test_a_cell_without_label_is_refused_before_the_script_starts(cells, tmp_path):
    cells.obs["label"] = pd.Categorical(["a", None]).take(np.resize([0, 1], cells.n_obs))
    with pytest.raises(ValueError, match="'label'.* 45 NaN"):
        train(cells, tmp_path, "label")


def test_a_token_stays_out_of_the_command(cells, monkeypatch):
    seen = {}

    def run_script(command, environment):
        seen.update(command=command, token=environment["HF_TOKEN"])
        raise InterruptedError

    monkeypatch.setattr(commands, "_run_script", run_script)
    with pytest.raises(InterruptedError):
        commands.train(cells, hub_token="hf_notARealToken", seed=3)
    assert seen["token"] == "hf_notARealToken" and "--seed" in seen["command"]
    assert not any("hub_token" in word or "hf_notARealToken" in word for word in seen["command"])


def test_several_processes_are_launched_without_showing_the_command():
    assert commands._launch(1) == [sys.executable] and "--quiet" in commands._launch(2)


def test_keywords_become_flags():
    options = {"seed": 1, "labels_key": ["a", "b"], "genes": None, "use_ema": False, "layer": []}
    assert commands._flags(options) == ["--seed", "1", "--labels_key", "a", "b", "--use_ema", "False"]


def test_path_prints_where_a_script_is(capsys):
    commands.main(["path", "train"])
    assert capsys.readouterr().out.strip() == str(REPOSITORY / "training" / "train.py")


def test_the_version_is_printed(capsys):
    commands.main(["--version"])
    assert capsys.readouterr().out == f"scrdit_diffusers {scrdit_diffusers.__version__}\n"


def test_a_dry_run_is_refused_as_it_leaves_no_pipeline(cells, tmp_path):
    with pytest.raises(ValueError, match="dry_run.*scrdit train --dry_run"):
        train(cells, tmp_path, "cell_type", dry_run=True)


def test_a_column_that_nearly_fits_is_named(cells, tmp_path):
    with pytest.raises(ValueError, match=r"no \['celltype'\], did you mean \['cell_type'\]\? it has"):
        train(cells, tmp_path, "celltype")


def test_unknown_commands_are_refused():
    with pytest.raises(SystemExit, match=r"trian --hub_token \*\*\*"):
        commands.main(["trian", "--hub_token", "hf_notARealToken"])


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(SystemExit, match=r"sklearn.*scrdit-diffusers\[train\]"):
        commands.main(["evaluate", "--help"])


def test_a_wheel_holds_the_scripts_and_runs_them(tmp_path):
    """Installed alone into a folder; only the other packages come from this environment."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    command = [sys.executable, "-m", "scrdit_diffusers.commands", "path", "generate"]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(site / "scrdit_diffusers" / "scripts" / "generate.py")
    names = {path.name for path in (site / "scrdit_diffusers" / "scripts").glob("*.py")}
    assert names == {path.name for path in (REPOSITORY / "training").glob("*.py")}
