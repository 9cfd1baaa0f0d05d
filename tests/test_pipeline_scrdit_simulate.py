"""Simulation with known truth: planted effects, means, the null hypothesis, wrong input."""

import numpy as np
import pandas as pd
import pytest
import torch

from scrdit_diffusers import SCRDiTSimulatePipeline, draw_effects

EFFECTS = {"treated": {"gene3": 1.0, "gene7": -2.0}}


@pytest.fixture
def simulate(count_pipe):
    """With a network that adds nothing to what labels and library size say."""
    for part in (count_pipe.transformer.proj_out, count_pipe.transformer.cell_out):
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    simulate = SCRDiTSimulatePipeline.from_pipe(count_pipe)
    simulate.set_progress_bar_config(disable=True)
    return simulate


@pytest.fixture
def design():
    return pd.DataFrame(
        {"cell_type": "B", "batch": ["b1", "b2"] * 1000, "group": ["control"] * 1000 + ["treated"] * 1000},
        index=[f"new{i}" for i in range(2000)],
    )


def test_effects_are_recovered_and_other_genes_do_not_change(simulate, design):
    adata = simulate(design, EFFECTS, library_size=60, num_inference_steps=2, generator=torch.manual_seed(0))
    counts = adata.X.toarray()
    treated = (design["group"] == "treated").to_numpy()
    means = [counts[side].mean(axis=0) for side in (treated, ~treated)]
    error = np.sqrt(sum(counts[side].var(axis=0) / side.sum() for side in (treated, ~treated)))
    factor = 2.0 ** adata.varm["log2_fold_change"]["treated"].to_numpy()
    assert (np.abs(means[0] - factor * means[1]) < 4.5 * error * np.maximum(factor, 1)).all()
    assert adata.var_names[adata.var["changed"]].tolist() == ["gene3", "gene7"]
    assert adata.obs["group"].tolist() == design["group"].tolist() and list(adata.obs_names) == list(design.index)


def test_counts_scatter_around_their_means(simulate, design):
    adata = simulate(design, EFFECTS, num_inference_steps=2, generator=torch.manual_seed(0))
    counts, means = adata.X.toarray(), adata.layers["mean"]
    error = counts.std(axis=0) / np.sqrt(len(counts))
    assert (np.abs((counts - means).mean(axis=0)) < 4.5 * error).all()


def test_library_sizes_are_those_that_were_asked_for(simulate, design):
    """Before effects, if cells are generated with as many counts as the largest one asks for."""
    options = {"library_size": 60, "max_factor": 2, "generator": torch.manual_seed(0)}
    adata = simulate(design, {"treated": {"gene0": 0.5}}, **options)
    control = adata.X[:1000].sum(axis=1)
    assert control.mean() == pytest.approx(60, rel=0.05)


def test_large_effects_lower_the_baseline_of_their_genes_alone(simulate, design):
    """The same cells, generated at twice their library size and then thinned, serve effects of 2 and of 8."""
    options = {"library_size": 60, "max_factor": 2, "num_inference_steps": 2}
    adata, twice = (
        simulate(design[::20], {"treated": {"gene3": change}}, **options, generator=torch.manual_seed(0))
        for change in (3.0, 1.0)
    )
    baseline = adata.var["baseline"].to_numpy()
    assert baseline[3] == 0.25 and (np.delete(baseline, 3) == 1).all() and (twice.var["baseline"] == 1).all()
    control, treated = twice.layers["mean"][:50] * baseline, twice.layers["mean"][50:]
    assert np.allclose(adata.layers["mean"], np.concatenate([control, treated]))
    assert np.array_equal(adata.X[50:].toarray(), twice.X[50:].toarray())


def test_what_no_effect_lowers_is_as_it_was_generated(simulate, design):
    adata, null = (
        simulate(design[::20], effects, num_inference_steps=2, generator=torch.manual_seed(0))
        for effects in ({"treated": {"gene3": 4.0, "gene5": -1.0}}, {})
    )
    unchanged = np.delete(np.arange(23), [3, 5])
    assert np.array_equal(adata.X[:, unchanged].toarray(), null.X[:, unchanged].toarray())
    assert np.array_equal(adata.X[50:, [3]].toarray(), null.X[50:, [3]].toarray())  # where it is highest
    assert np.array_equal(adata.X[:50, [5]].toarray(), null.X[:50, [5]].toarray())
    assert adata.var.loc["gene3", "baseline"] == 1 / 16 and (adata.var["baseline"].drop("gene3") == 1).all()
    assert adata.uns["scrdit"]["num_inference_steps"] == 2


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_wrong_batch_sizes_are_refused(simulate, design, batch_size):
    with pytest.raises(ValueError, match=f"batch_size .*{batch_size}"):
        simulate(design, EFFECTS, batch_size=batch_size)


@pytest.mark.parametrize("max_factor", [0.5, np.inf, np.nan])
def test_wrong_factors_are_refused(simulate, design, max_factor):
    with pytest.raises(ValueError, match=f"max_factor.*{max_factor}"):
        simulate(design, EFFECTS, max_factor=max_factor)


def test_it_is_a_function_of_the_seed(simulate, design):
    cells = [
        simulate(design[::100], EFFECTS, num_inference_steps=2, generator=torch.manual_seed(seed)).X.toarray()
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(cells[0], cells[1]) and not np.array_equal(cells[0], cells[2])


def test_effects_are_drawn_as_asked():
    effects = draw_effects([f"gene{i}" for i in range(400)], ["a", "b"], num_genes=300, std=0.5)
    values = np.array(list(effects["a"].values()))
    assert len(values) == 300 and values.std() == pytest.approx(0.5, rel=0.2) and effects["a"] != effects["b"]


@pytest.mark.parametrize(
    ("effects", "options", "message"),
    [
        ({"treatd": {"gene0": 1.0}}, {}, "treatd"),
        ({"treated": {"geneX": 1.0}}, {}, "geneX"),
        ({"treated": {"gene0": np.inf}}, {}, "gene0.*inf"),
        (EFFECTS, {"group_key": "arm"}, "group_key.*'arm'"),
    ],
)
def test_wrong_effects_are_refused(simulate, design, effects, options, message):
    with pytest.raises(ValueError, match=message):
        simulate(design, effects, **options)


@pytest.mark.parametrize("effects", [None, {"gene0": 1.0}, pd.DataFrame({"gene": ["gene0"]})])
def test_effects_of_another_form_are_refused(simulate, design, effects):
    with pytest.raises(TypeError, match=f"effects .*for each group.*{type(effects).__name__}"):
        simulate(design, effects)


def test_a_design_without_a_label_is_refused(simulate, design):
    with pytest.raises(ValueError, match=r"\['cell_type'\]"):
        simulate(design.drop(columns="cell_type"), EFFECTS)


def test_more_changed_genes_than_genes_are_refused():
    with pytest.raises(ValueError, match="num_genes.*3"):
        draw_effects(["a", "b"], ["treated"], num_genes=3)


def test_one_name_instead_of_groups_is_refused():
    with pytest.raises(TypeError, match=r"groups .*'treated'.*\['treated'\]"):
        draw_effects(["a", "b"], "treated", num_genes=1)
