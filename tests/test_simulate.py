"""The simulation script: designs, effects, the power curve, and what it refuses before any work."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scrdit_diffusers import SCRDiTSimulatePipeline, draw_effects

FEW_STEPS = ["--num_inference_steps", 2]
GROUPS = ["--num_cells", 12, "--condition", "cell_type=B"]
EFFECTS = {"treated": {"gene3": 1.0, "gene7": -2.0}}


@pytest.fixture
def tables(run_job):
    """Files of a design and of effects."""
    groups = ["control"] * 6 + ["treated"] * 6
    pd.DataFrame({"cell_type": "B", "batch": "b2", "group": groups, "donor": "01"}).to_csv("design.csv")
    rows = [(group, gene, change) for group, changes in EFFECTS.items() for gene, change in changes.items()]
    pd.DataFrame(rows, columns=["group", "gene", "log2_fold_change"]).to_csv("effects.csv", index=False)


def test_a_design_and_effects_are_simulated(run_job, tables, count_pipe):
    arguments = ["--obs", "design.csv", "--effects", "effects.csv", "--library_size", 60, "--seed", 3]
    run_job("simulate", *arguments, *FEW_STEPS, "--output", "out.h5ad")
    found = ad.read_h5ad("out.h5ad")
    design = pd.read_csv("design.csv", dtype=str)
    simulate = SCRDiTSimulatePipeline.from_pipe(count_pipe)
    options = {"library_size": 60, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(3)}
    expected = simulate(design, EFFECTS, **options)
    assert np.array_equal(found.X.toarray(), expected.X.toarray())
    assert np.array_equal(found.layers["mean"], expected.layers["mean"])
    assert found.varm["log2_fold_change"]["treated"][["gene3", "gene7"]].tolist() == [1.0, -2.0]
    assert list(found.obs["donor"]) == ["01"] * 12 and found.obs_names[0] == "synthetic_0"
    assert found.uns["scrdit"]["seed"] == 3 and found.uns["scrdit"]["model"] == "pipeline"
    assert found.uns["scrdit_simulate"]["effects"] == "effects.csv"


def test_groups_are_made_and_effects_drawn(run_job, count_pipe):
    Path("genes.txt").write_text("gene2\ngene4\ngene5\n")
    arguments = [*GROUPS, "--groups", "control", "low", "c", "--num_effects", 2, "--effect_std", 0.5]
    run_job("simulate", *arguments, "--genes", "genes.txt", "--seed", 1, *FEW_STEPS, "--output", "out.zarr")
    found = ad.read_zarr("out.zarr")
    assert found.obs["group"].value_counts().to_dict() == {"control": 12, "low": 12, "c": 12}
    assert set(found.obs["cell_type"]) == {"B"} and set(found.obs["batch"]) <= {"b1", "b2"}
    truth = found.varm["log2_fold_change"]
    for group, changes in draw_effects(["gene2", "gene4", "gene5"], ["low", "c"], 2, 0.5, seed=1).items():
        assert truth[group][truth[group] != 0].to_dict() == pytest.approx(changes)


def test_without_effects_nothing_changes(run_job):
    run_job("simulate", *GROUPS, *FEW_STEPS, "--output", "out.h5ad")
    assert not ad.read_h5ad("out.h5ad").var["changed"].any()


def test_a_power_curve_is_written(run_job, capsys):
    arguments = [*GROUPS, "--num_effects", 5, "--effect_std", 3, "--power_curve", "power.csv"]
    run_job("simulate", *arguments, *FEW_STEPS, "--output", "out.h5ad")
    table = pd.read_csv("power.csv", index_col="num_cells")
    assert table.index.tolist() == [10, 12] and table["power"].between(0, 1).all()
    assert "power.csv" in capsys.readouterr().out


def test_a_power_curve_without_any_power_says_what_to_change(run_job, capsys):
    arguments = [*GROUPS, "--num_effects", 1, "--effect_std", 1e-6, "--power_curve", "power.csv"]
    run_job("simulate", *arguments, *FEW_STEPS, "--output", "out.h5ad")
    assert "No effect was found: take more cells" in capsys.readouterr().out


BAD_ARGUMENTS = {
    "no design": ([], "--obs.*--num_cells"),
    "two designs": (["--obs", "design.csv", "--num_cells", 3], "--obs.*--num_cells"),
    "labels of a design": (["--obs", "design.csv", "--condition", "cell_type=B"], "--condition.*cell_type=B"),
    "unknown label": (["--num_cells", 3, "--condition", "cell_type=NKK"], "cell_type 'NKK'.*'NK'"),
    "no cells": (["--num_cells", 0], "--num_cells .* 0"),
    "a group twice": ([*GROUPS, "--groups", "a", "a"], r"--groups .*\['a', 'a'\]"),
    "a slash": ([*GROUPS, "--groups", "control", "a/b", "--num_effects", 3], r"slash.*\['a/b'\]"),
    "two effects": ([*GROUPS, "--effects", "effects.csv", "--num_effects", 3], "--effects.*--num_effects"),
    "negative spread": ([*GROUPS, "--num_effects", 3, "--effect_std", -1], "--effect_std .*-1"),
    "too many effects": ([*GROUPS, "--num_effects", 24], "num_genes .*23 .*24"),
    "no control": ([*GROUPS, "--num_effects", 3, "--control", "none"], r"--control none .*\['control', 'treated'\]"),
    "no group": (["--obs", "design.csv", "--num_effects", 3, "--group_key", "arm"], "--group_key arm"),
    "power of nothing": ([*GROUPS, "--power_curve", "power.csv"], "--power_curve"),
    "power elsewhere": ([*GROUPS, "--num_effects", 3, "--power_curve", "power.h5ad"], r"--power_curve .*power\.h5ad"),
    "small factor": ([*GROUPS, "--max_factor", 0.5], r"max_factor .*0\.5"),
    "no counts": ([*GROUPS, "--library_size", 0], "--library_size .* 0"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(run_job, tables, name):
    arguments, message = BAD_ARGUMENTS[name]
    before = set(Path.cwd().iterdir())
    with pytest.raises(ValueError, match=message):
        run_job("simulate", *arguments)
    assert set(Path.cwd().iterdir()) == before


BAD_EFFECTS = {
    "a missing column": ("group,gene\ntreated,gene3\n", r"--effects effects.csv .*\['log2_fold_change'\]"),
    "no number": ("group,gene,log2_fold_change\ntreated,gene3,much\n", "--effects effects.csv: 1 rows .*much"),
    "a gene twice": ("group,gene,log2_fold_change\ntreated,gene3,1\ntreated,gene3,2\n", "--effects .*gene3"),
    "an unknown gene": ("group,gene,log2_fold_change\ntreated,geneX,1\ntreated,gene3,2\n", "1 genes .*geneX"),
    "an unknown group": ("group,gene,log2_fold_change\ntreatd,gene3,1\n", "treatd"),
    "infinity": ("group,gene,log2_fold_change\ntreated,gene3,inf\n", "gene3.*inf"),
}


@pytest.mark.parametrize("name", BAD_EFFECTS)
def test_wrong_tables_of_effects_are_refused(run_job, tables, name):
    text, message = BAD_EFFECTS[name]
    Path("effects.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        run_job("simulate", "--obs", "design.csv", "--effects", "effects.csv")


def test_a_design_without_a_label_is_refused(run_job, tables):
    pd.read_csv("design.csv").drop(columns="batch").to_csv("design.csv", index=False)
    with pytest.raises(ValueError, match=r"\['batch'\]"):
        run_job("simulate", "--obs", "design.csv")


def test_genes_of_another_model_are_counted_and_named(run_job):
    Path("genes.txt").write_text("gene2\nA1BG\nA1CF\n")
    with pytest.raises(ValueError, match=r"--genes genes.txt: 2 genes .*\['A1BG', 'A1CF'\]"):
        run_job("simulate", *GROUPS, "--num_effects", 1, "--genes", "genes.txt")


def test_files_are_not_replaced_unasked(run_job):
    Path("power.csv").write_text("precious")
    arguments = [*GROUPS, "--num_effects", 3, "--power_curve", "power.csv"]
    with pytest.raises(ValueError, match="power.csv exists; .*--overwrite"):
        run_job("simulate", *arguments)
    Path("simulated.h5ad").write_text("precious")
    with pytest.raises(ValueError, match="simulated.h5ad exists; .*--overwrite"):
        run_job("simulate", *GROUPS)
