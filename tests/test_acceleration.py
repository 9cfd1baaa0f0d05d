"""The samplers of the published method against its equations, and the command that compares them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import diffusers
import numpy as np
import pytest
import torch
from scripts import REPOSITORY, load_script
from transformers import HfArgumentParser

from scrdit_diffusers import (
    SCRDIT_PRESETS,
    SCRDiTPipeline,
    SCRDiTProcessor,
    SCRDiTTransformer,
    count_bins,
    default_scheduler,
)
from scrdit_diffusers.cells.moments import CellMoments
from scrdit_diffusers.initialization import initialize_count_head
from scrdit_diffusers.objective import loss_weights

RECIPE = REPOSITORY / "training/recipes/scrdit-paper.sh"


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/acceleration")


def published_scheduler(script, name, steps):
    sampler = next(s for s in script.SAMPLERS if (s.method, s.name) == ("paper", name))
    config = default_scheduler("epsilon", "linear").config
    scheduler = getattr(diffusers, sampler.scheduler).from_config(config, **dict(sampler.config))
    scheduler.set_timesteps(steps)
    return scheduler, sampler.eta


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("DDPM", 1000, range(999, -1, -1)),
        ("DDIM eta 1, leading", 100, range(990, -1, -10)),
        ("DDIM eta 1, leading", 50, range(980, -1, -20)),
        ("DDIM eta 1, trailing", 100, range(999, -1, -10)),
    ],
)
def test_published_samplers_visit_the_stated_timesteps(script, name, steps, expected):
    assert published_scheduler(script, name, steps)[0].timesteps.tolist() == list(expected)


ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def test_ddpm_step_is_that_of_the_paper(script):
    """Ho et al. 2020, equation 11 with sigma^2 = beta tilde (equation 7)."""
    scheduler, _ = published_scheduler(script, "DDPM", 1000)
    x, epsilon, t = torch.randn(2, 7).double(), torch.randn(2, 7).double(), 400
    beta = 1 - ALPHA_BAR[t] / ALPHA_BAR[t - 1]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    expected = (x - beta / np.sqrt(1 - ALPHA_BAR[t]) * epsilon) / np.sqrt(1 - beta)
    expected += np.sqrt((1 - ALPHA_BAR[t - 1]) / (1 - ALPHA_BAR[t]) * beta) * noise
    stepped = scheduler.step(epsilon, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    torch.testing.assert_close(stepped, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["DDIM eta 1, leading", "DDIM eta 1, trailing", "DDIM eta 0"])
def test_ddim_step_is_that_of_the_paper(script, name):
    """Song et al. 2020, equations 12 and 16."""
    scheduler, eta = published_scheduler(script, name, 50)
    t, previous = scheduler.timesteps[10:12].tolist()
    x, epsilon = torch.randn(2, 7).double(), torch.randn(2, 7).double()
    now, then = ALPHA_BAR[t], ALPHA_BAR[previous]
    sigma = eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    clean = (x - np.sqrt(1 - now) * epsilon) / np.sqrt(now)
    expected = np.sqrt(then) * clean + np.sqrt(1 - then - sigma**2) * epsilon + sigma * noise
    stepped = scheduler.step(epsilon, t, x, eta=eta, generator=torch.Generator().manual_seed(0)).prev_sample
    torch.testing.assert_close(stepped, expected, rtol=1e-5, atol=1e-5)


def test_recipe_has_the_published_settings(tmp_path):
    """A program named accelerate stands in for the real one and shows what the recipe would run."""
    (tmp_path / "accelerate").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "accelerate").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [str(RECIPE), "cells.h5ad", "model", "--seed", "7"]
    words = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
    assert (REPOSITORY / "training/train.py").samefile(words[3])
    parser = HfArgumentParser(load_script("train").TrainingArguments)
    arguments = dataclasses.asdict(parser.parse_args_into_dataclasses(words[4:])[0].with_recipe())
    published = dict(flavor="cv", n_top_genes=2000, zero_negation=True, zero_value=-10, standardize=False)
    published |= dict(value_space="log_normalized", target_sum=None, labels_key=[], val_fraction=0, use_ema=False)
    published |= dict(num_train_timesteps=1000, prediction_type="epsilon", dropout=0)
    published |= dict(train_batch_size=16, learning_rate=3e-4, lr_scheduler="constant", num_train_epochs=1600)
    published |= dict(dataset="cells.h5ad", output_dir="model", seed=7)
    assert {name: arguments[name] for name in published} == published
    transformer = dict(patch_size=10, patch_embed_type="shared", num_layers=1, num_attention_heads=8)
    assert SCRDIT_PRESETS[arguments["preset"]] == transformer | {"attention_head_dim": 96, "num_cell_tokens": 0}
    snr = torch.tensor([1e-5, 1.0, 1e4])  # the noise has the same weight everywhere
    weights = loss_weights(snr, "epsilon", arguments["loss_weighting"], arguments["max_loss_weight"])
    assert weights.tolist() == [1, 1, 1]


def test_recipe_runs_to_its_end(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    command = [str(RECIPE), str(tmp_path / "cells.h5ad"), str(tmp_path / "model"), "--target_sum", "1e4"]
    command += ["--n_top_genes", "20", "--attention_head_dim", "4", "--num_train_epochs", "1", "--report_to", "none"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pipe = SCRDiTPipeline.from_pretrained(tmp_path / "model")
    assert pipe.processor.zero_negation and pipe.processor.num_genes == 20 and not pipe.processor.conditions
    assert (tmp_path / "model/README.md").exists()


TYPES = ["T", "B"]
ARGUMENTS = ["--labels_key", "cell_type", "--labels", *TYPES, "--n_top_genes", "20", "--full_size", "False"]


@pytest.fixture
def prepare(script, adata, tmp_path):
    """Arguments of the command for sixty cells; tiny untrained pipelines stand where training would leave its own."""
    adata.obs["cell_type"] = np.tile(TYPES, 30)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["--dataset", str(tmp_path / "cells.h5ad"), "--output_dir", str(tmp_path / "out"), *ARGUMENTS]

    def prepare(*more):
        return HfArgumentParser(script.AccelerationArguments).parse_args_into_dataclasses([*arguments, *more])[0]

    script.prepare_cells(prepare(), tmp_path / "out/cells")
    save_tiny_pipelines(tmp_path / "out")
    return prepare


def save_tiny_pipelines(folder):
    train = ad.read_h5ad(folder / "cells/train.h5ad")
    sizes = dict(num_genes=20, patch_size=10, num_layers=1, num_attention_heads=2, attention_head_dim=4)
    for name in ("paper-0", "paper-1"):
        options = dict(value_space="log_normalized", target_sum=1e4, zero_negation=True, flavor="all")
        processor = SCRDiTProcessor.from_anndata(train, **options, standardize=False)
        model = SCRDiTTransformer(**sizes, patch_embed_type="shared")
        SCRDiTPipeline(model, default_scheduler("epsilon"), processor).save_pretrained(str(folder / name))
    processor = SCRDiTProcessor.from_anndata(train, "cell_type", flavor="all")
    model = SCRDiTTransformer(**sizes, num_classes=[2], count_bins=count_bins(train.X))
    initialize_count_head(
        model.count_head,
        CellMoments.from_counts(train.X, processor.encode_labels(train.obs)),
        processor.mean,
        processor.std,
    )
    pipe = SCRDiTPipeline(model, default_scheduler(), processor, decode_timestep=200, min_timestep=200)
    pipe.save_pretrained(str(folder / "default"))


def test_every_sampler_is_timed_and_evaluated_once_and_resumed(script, prepare, tmp_path, capsys, monkeypatch):
    first = [script.Sampler("paper", "DDPM", "DDPMScheduler", (20,))]
    few = [script.Sampler("default", "UniPC", "UniPCMultistepScheduler", (4, 2))]
    monkeypatch.setattr(script, "SAMPLERS", (*first, *few))
    results = tmp_path / "out/acceleration.json"
    script.main(prepare())
    rows = json.loads(results.read_text())["rows"]
    assert [row["method"] for row in rows] == ["real cells", "Gaussian copula", "paper", "default", "default"]
    assert [row["steps"] for row in rows] == [0, 0, 20, 4, 2]
    assert all(row["seconds"] > 0 for row in rows[2:]) and all("legacy_kl" in row["metrics"] for row in rows)
    assert (tmp_path / "out/acceleration.png").stat().st_size > 10_000
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and "| DDPM | 20 |" in table[4]
    script.main(prepare())
    assert json.loads(results.read_text())["rows"] == rows  # nothing is left to do
    with pytest.raises(ValueError, match=r"acceleration\.json .*'batch_size': 512"):
        script.main(prepare("--batch_size", "7"))


def test_speedup_is_over_ddpm_of_the_paper(script):
    rows = [
        {"method": method, "sampler": sampler, "steps": steps, "seed": seed, "seconds": seconds, "metrics": {"w2": w2}}
        for method, sampler, steps, seed, seconds, w2 in [
            ("real cells", "", 0, 0, np.nan, 1.0),
            ("paper", "DDPM", 1000, 0, 90.0, 3.0),
            ("paper", "DDPM", 1000, 1, 110.0, 5.0),
            ("default", "UniPC", 10, 0, 0.5, 2.0),
        ]
    ]
    table = script.summarize(rows)
    assert table.loc[("paper", "DDPM", 1000), ["seconds", "speedup", "w2"]].tolist() == [100.0, 1.0, 4.0]
    assert table.loc[("default", "UniPC", 10), "speedup"] == 200.0


def test_cells_are_divided_without_overlap_on_the_same_genes(prepare, tmp_path):
    parts = {name: ad.read_h5ad(tmp_path / f"out/cells/{name}.h5ad") for name in ("train", "control", "test")}
    names = [set(part.obs_names) for part in parts.values()]
    assert [len(part) for part in names] == [36, 12, 12] and len(set.union(*names)) == 60
    genes = (tmp_path / "out/cells/genes.txt").read_text().split()
    assert all(list(part.var_names) == genes for part in parts.values()) and len(genes) == 20
    of_label = [ad.read_h5ad(tmp_path / f"out/cells/train-{i}.h5ad") for i in range(2)]
    assert [set(part.obs["cell_type"]) for part in of_label] == [{"T"}, {"B"}]


def test_cells_have_the_labels_that_were_asked_for(script, prepare, tmp_path):
    obs = ad.read_h5ad(tmp_path / "out/cells/test.h5ad").obs.iloc[:7]
    for folders in ({"T": "paper-0", "B": "paper-1"}, {None: "default"}):
        trained = script.Trained.load({label: tmp_path / "out" / name for label, name in folders.items()})
        cells, seconds = trained.generate(script.SAMPLERS[2], 2, obs, "cell_type", batch_size=512, seed=0)
        assert cells.obs["cell_type"].loc[obs.index].tolist() == obs["cell_type"].tolist() and seconds > 0
        if None in folders:  # its counts become log1p of counts per 10,000
            np.testing.assert_allclose(np.expm1(cells.X.toarray()).sum(axis=1), 1e4, rtol=1e-4)


def test_training_is_by_the_recipe_and_by_the_defaults(script, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(script.subprocess, "run", lambda command, **kwargs: commands.append(command))
    args = script.AccelerationArguments(dataset="cells.h5ad", labels_key="cell_type")
    (tmp_path / "paper-1").mkdir()
    (tmp_path / "paper-1/model_index.json").touch()  # is trained already
    script.train_models(args, tmp_path, [*TYPES, "NK"], counts=True)
    assert len(commands) == 3
    assert commands[0][0] == commands[1][0] == str(RECIPE) and "--labels_key" not in commands[0]
    assert commands[0][1:3] == [str(tmp_path / "cells/train-0.h5ad"), str(tmp_path / "paper-0")]
    assert commands[1][1:3] == [str(tmp_path / "cells/train-2.h5ad"), str(tmp_path / "paper-2")]
    assert "--zero_negation" not in commands[2] and commands[2][commands[2].index("--labels_key") + 1] == "cell_type"


def test_times_at_full_size_are_measured_on_few_calls_and_scaled(script, monkeypatch):
    made = []

    def pipeline(num_cells, num_inference_steps, output_type):
        made.append((num_cells, num_inference_steps))

    monkeypatch.setattr(script, "make_pipeline", lambda *args: pipeline)
    ticks = iter([0.0, 8.0, 0.0, 2.0])
    monkeypatch.setattr(script.time, "process_time", lambda: next(ticks))
    timed = {}
    assert script.full_size_seconds("paper", 1000, timed) == pytest.approx(8 * 1000 / 64 * 1000 / 4)
    assert script.full_size_seconds("paper", 50, timed) == pytest.approx(8 * 1000 / 64 * 50 / 4)
    assert script.full_size_seconds("default", 25, timed) == pytest.approx(2 * 1000 / 512)
    assert made == [(8, 1), (64, 4), (8, 1), (512, 25)]  # each after a warm-up, and once


def test_unknown_labels_are_refused(script, adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    arguments = dict(dataset=str(tmp_path / "cells.h5ad"), labels_key="cell_type", labels=["T", "Bcell"])
    with pytest.raises(ValueError, match=r"--labels \['Bcell'\]"):
        script.prepare_cells(script.AccelerationArguments(**arguments), tmp_path / "cells")
