"""The samplers of the published method against its equations, and the command that compares them."""

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
from test_training import REPOSITORY, load_script
from transformers import HfArgumentParser

from scrdit_diffusers import SCRDiTPipeline, SCRDiTProcessor, SCRDiTTransformer, count_bins, default_scheduler

RECIPE = REPOSITORY / "training/recipes/scrdit-paper.sh"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(REPOSITORY / "training"))  # it imports benchmark.py, its neighbour
    yield load_script("acceleration")
    sys.path.remove(str(REPOSITORY / "training"))


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


def test_recipe_has_the_published_settings(adata, tmp_path):
    values = adata[adata.obs["cell_type"] == "B"].copy()
    values.X = values.layers["lognorm"]
    values.write_h5ad(tmp_path / "cells.h5ad")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(RECIPE), str(tmp_path / "cells.h5ad"), str(tmp_path / "model"), "--dry_run"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert result.returncode == 0, result.stderr
    resolved = json.loads(result.stdout)
    published = dict(flavor="cv", n_top_genes=2000, zero_negation=True, zero_value=-10, standardize=False)
    published |= dict(value_space="log_normalized", target_sum=None, labels_key=[], val_fraction=0, use_ema=False)
    published |= dict(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    published |= dict(train_batch_size=16, learning_rate=3e-4, lr_scheduler="constant", num_train_epochs=1600)
    assert {name: resolved["arguments"][name] for name in published} == published
    transformer = dict(patch_size=10, patch_embed_type="shared", num_layers=1, num_attention_heads=8)
    transformer |= dict(attention_head_dim=96, mlp_ratio=4.0, dropout=0.0, num_classes=[])
    assert {name: resolved["transformer"][name] for name in transformer} == transformer


TYPES = ["T", "B"]
ARGUMENTS = ["--labels_key", "cell_type", "--labels", *TYPES, "--n_top_genes", "20", "--full_size", "False"]


@pytest.fixture
def run(script, adata, tmp_path, monkeypatch):
    """Run the command on sixty cells; tiny untrained pipelines stand where training would leave its own."""
    adata.obs["cell_type"] = np.tile(TYPES, 30)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    first = [script.Sampler("paper", "DDPM", "DDPMScheduler", (1000,))]
    few = [script.Sampler(m, "UniPC", "UniPCMultistepScheduler", (4, 2)) for m in ("paper", "default")]
    monkeypatch.setattr(script, "SAMPLERS", (*first, *few))
    arguments = ["--dataset", str(tmp_path / "cells.h5ad"), "--output_dir", str(tmp_path / "out"), *ARGUMENTS]

    def run(*more):
        args = HfArgumentParser(script.AccelerationArguments).parse_args_into_dataclasses([*arguments, *more])[0]
        if not (tmp_path / "out/cells").exists():
            script.prepare_cells(args, tmp_path / "out/cells")
            save_tiny_pipelines(tmp_path / "out")
        script.main(args)
        return json.loads((tmp_path / "out/acceleration.json").read_text())

    return run


def save_tiny_pipelines(folder):
    train = ad.read_h5ad(folder / "cells/train.h5ad")
    sizes = dict(num_genes=20, patch_size=10, num_layers=1, num_attention_heads=2, attention_head_dim=4)
    for name in ("paper-0", "paper-1"):
        options = dict(value_space="log_normalized", target_sum=1e4, zero_negation=True, flavor="all")
        processor = SCRDiTProcessor.from_anndata(train, **options, standardize=False)
        model = SCRDiTTransformer(**sizes, patch_embed_type="shared")
        SCRDiTPipeline(model, default_scheduler("epsilon"), processor).save_pretrained(str(folder / name))
    processor = SCRDiTProcessor.from_anndata(train, "cell_type", flavor="all")
    model = SCRDiTTransformer(**sizes, num_classes=[2], count_bins=count_bins(train.X), beta_schedule="linear")
    model.count_head.initialize(train.X, processor.encode_labels(train.obs), processor.mean, processor.std)
    pipe = SCRDiTPipeline(model, default_scheduler(), processor, decode_timestep=200, min_timestep=200)
    pipe.save_pretrained(str(folder / "default"))


def test_every_sampler_is_timed_and_judged_once_and_the_command_goes_on(run, tmp_path, capsys):
    rows = run()["rows"]
    methods = [row["method"] for row in rows]
    assert methods == ["real cells", "Gaussian copula"] + ["paper"] * 3 + ["default"] * 2
    assert [row["steps"] for row in rows] == [0, 0, 1000, 4, 2, 4, 2]
    assert all(row["seconds"] > 0 for row in rows[2:]) and all("legacy_kl" in row["metrics"] for row in rows)
    assert (tmp_path / "out/acceleration.png").stat().st_size > 10_000
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and "| DDPM | 1000 |" in table[4]
    assert run()["rows"] == rows  # nothing is left to do
    with pytest.raises(ValueError, match="is of other arguments: {'batch_size': 512}"):
        run("--batch_size", "7")


def test_cells_are_divided_without_overlap_on_the_same_genes(run, tmp_path):
    run()
    parts = {name: ad.read_h5ad(tmp_path / f"out/cells/{name}.h5ad") for name in ("train", "control", "test")}
    names = [set(part.obs_names) for part in parts.values()]
    assert [len(part) for part in names] == [36, 12, 12] and len(set.union(*names)) == 60
    genes = (tmp_path / "out/cells/genes.txt").read_text().split()
    assert all(list(part.var_names) == genes for part in parts.values()) and len(genes) == 20
    of_label = [ad.read_h5ad(tmp_path / f"out/cells/train-{i}.h5ad") for i in range(2)]
    assert [set(part.obs["cell_type"]) for part in of_label] == [{"T"}, {"B"}]


def test_cells_have_the_labels_that_were_asked_for(script, run, tmp_path):
    run()
    obs = ad.read_h5ad(tmp_path / "out/cells/test.h5ad").obs.iloc[:7]
    for folders in ({"T": "paper-0", "B": "paper-1"}, {None: "default"}):
        trained = script.Trained.load({label: tmp_path / "out" / name for label, name in folders.items()})
        sampler = script.SAMPLERS[-1]
        cells, seconds = trained.generate(sampler, 2, obs, "cell_type", batch_size=512, seed=0)
        assert cells.obs["cell_type"].loc[obs.index].tolist() == obs["cell_type"].tolist() and seconds > 0
        assert cells.X.max() <= np.log1p(1e4)  # log1p of counts per 10,000


def test_training_is_by_the_recipe_and_by_the_defaults(script, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(script.subprocess, "run", lambda command, **kwargs: commands.append(command))
    args = script.AccelerationArguments(dataset="cells.h5ad", labels_key="cell_type")
    assert list(script.train_models(args, tmp_path, TYPES, counts=True)) == ["paper-0", "paper-1", "default"]
    assert commands[0][0] == commands[1][0] == str(RECIPE) and "--labels_key" not in commands[0]
    assert commands[0][1:3] == [str(tmp_path / "cells/train-0.h5ad"), str(tmp_path / "paper-0")]
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
    with pytest.raises(ValueError, match=r"\['Bcell'\] occur in no cell"):
        script.prepare_cells(script.AccelerationArguments(**arguments), tmp_path / "cells")
