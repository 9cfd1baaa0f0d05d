"""The power curve: what a test finds of effects that are known, against brute force and against expectation."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, mannwhitneyu

from scrdit_diffusers.evaluation.power import power_curve

NUM_CELLS, NUM_GENES = 80, 60


def make_cells(num_cells=NUM_CELLS, seed=0, effect=1.0):
    """Poisson counts of two groups and a control; genes 0 to 9 change in the first, genes 10 to 14 in the second."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(["control", "treated", "other"], num_cells)
    truth = pd.DataFrame(0.0, index=[f"gene{i}" for i in range(NUM_GENES)], columns=["treated", "other"])
    truth.loc[[f"gene{i}" for i in range(10)], "treated"] = effect
    truth.loc[[f"gene{i}" for i in range(10, 15)], "other"] = -effect
    means = 3.0 * np.stack([2.0 ** truth[group] if group in truth else np.ones(NUM_GENES) for group in groups])
    obs = pd.DataFrame({"group": groups}, index=[f"cell{i}" for i in range(len(groups))])
    cells = ad.AnnData(rng.poisson(means).astype(np.float32), obs=obs, var=truth[[]])
    cells.varm["log2_fold_change"] = truth
    return cells


def test_all_cells_give_what_brute_force_gives():
    cells = make_cells(effect=0.35)
    control = cells[cells.obs["group"] == "control"].X
    expected = []
    for group, truth in cells.varm["log2_fold_change"].items():
        p = [mannwhitneyu(*pair).pvalue for pair in zip(control.T, cells[cells.obs["group"] == group].X.T, strict=True)]
        called, changed = false_discovery_control(p) < 0.05, truth.to_numpy() != 0
        expected.append((called[changed].mean(), called[~changed].sum() / called.sum()))
    table = power_curve(cells, num_cells=[NUM_CELLS], num_repeats=2)
    assert table.loc[NUM_CELLS, ["power", "false_discoveries"]].tolist() == pytest.approx(np.mean(expected, axis=0))
    assert 0 < table.loc[NUM_CELLS, "power"] < 1


def test_more_cells_find_more_and_few_of_the_called_genes_are_false():
    table = power_curve(make_cells(), num_repeats=5)
    assert table.index.tolist() == [10, 20, 50, 80] and table.index.name == "num_cells"
    assert table["power"].is_monotonic_increasing and table["power"].iloc[0] < 0.9 < table["power"].iloc[-1]
    assert (table["false_discoveries"] < 0.15).all() and table["power_std"].iloc[0] > 0


def test_a_function_makes_cells_of_each_number():
    sizes = []

    def make(num_cells):
        sizes.append(num_cells)
        return make_cells(num_cells, seed=len(sizes))

    table = power_curve(make, num_cells=[5, 40], num_repeats=3)
    assert sizes == [5] * 3 + [40] * 3 and table["power"].is_monotonic_increasing


def test_small_effects_and_untested_genes_do_not_count():
    cells = make_cells()
    cells.varm["log2_fold_change"].loc["gene20", "treated"] = 0.01  # is not found
    options = {"num_cells": [NUM_CELLS], "num_repeats": 1}
    assert power_curve(cells, **options)["power"].item() < 1
    assert power_curve(cells, min_log2_fold_change=0.5, **options)["power"].item() == 1
    assert power_curve(cells, [f"gene{i}" for i in range(20)], **options)["power"].item() == 1


def test_effects_on_the_control_are_part_of_the_difference():
    """Groups change names, so that what was planted in one is a difference of the other."""
    cells = make_cells()
    swapped = cells[cells.obs["group"] != "other"].copy()
    swapped.obs["group"] = swapped.obs["group"].map({"control": "treated", "treated": "control"})
    truth = cells.varm["log2_fold_change"]["treated"]
    swapped.varm["log2_fold_change"] = pd.DataFrame({"control": truth, "treated": 0.0})
    assert power_curve(swapped, num_cells=[NUM_CELLS], num_repeats=1)["power"].item() == 1


def test_without_effects_there_is_no_power():
    cells = make_cells(effect=0.0)
    cells.X[:, 3] = 0  # constant
    table = power_curve(cells, num_cells=[NUM_CELLS], num_repeats=1)
    assert np.isnan(table["power"].item()) and table["false_discoveries"].item() in (0, 0.5, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_key": "arm"}, "group_key.*'arm'"),
        ({"control": "none"}, r"\['none'\]"),
        ({"layer": "logs"}, "'logs'"),
        ({"genes": ["gene3", "geneX"]}, "geneX"),
        ({"num_cells": [10, 81]}, "num_cells.*80.*81"),
        ({"num_cells": [1]}, "num_cells.* 2 "),
        ({"num_repeats": 0}, "num_repeats.* 0 "),
        ({"fdr": 1.0}, "fdr.* 1.0"),
        ({"cells": make_cells}, "num_cells.*function"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        power_curve(**{"cells": make_cells()} | options)


def test_cells_without_truth_are_refused():
    cells = make_cells()
    del cells.varm["log2_fold_change"]
    with pytest.raises(ValueError, match="log2_fold_change.*SCRDiTSimulatePipeline"):
        power_curve(cells)
