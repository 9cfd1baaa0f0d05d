"""How completion, translation and paths are measured."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/editing")


def test_as_many_cells_of_each_label_are_compared(script):
    one, other = np.array(list("aaabbc")), np.array(list("bbbbaad"))
    rows = script.pair_by_label(one, other, seed=0)
    assert [sorted(labels[chosen]) for labels, chosen in zip((one, other), rows, strict=True)] == [list("aabb")] * 2


def test_fold_changes_of_the_right_cells_are_right_whatever_the_composition(script):
    rates = {("a", 0): [50, 20, 30], ("a", 1): [20, 50, 30], ("b", 0): [10, 30, 60], ("b", 1): [4, 66, 30]}
    labels, goal_labels = np.array(list("aaab")), np.array(list("abbbbb"))
    before, after = (np.array([rates[label, i] for label in labels], float) for i in (0, 1))
    goal = np.array([rates[label, 1] for label in goal_labels], float)
    right = script.compare_changes(after, before, labels, goal, goal_labels)
    assert right == pytest.approx({"correlation of log fold changes": 1, "slope of log fold changes": 1})
    shrunk = script.compare_changes((before + after) / 2, before, labels, goal, goal_labels)
    assert 0.1 < shrunk["slope of log fold changes"] < 0.9


def test_neighbors_are_kept_by_a_shift_and_lost_at_random(script):
    rng = np.random.default_rng(0)
    points, groups = rng.normal(size=(80, 4)), np.repeat(["a", "b"], 40)
    assert script.share_neighbors_kept(points, points + 3, groups) == 1
    assert script.share_neighbors_kept(points, rng.normal(size=(80, 4)), groups) < 0.3


def test_mixed_points_have_a_higher_ilisi_and_harmony_mixes_them(script):
    pytest.importorskip("harmonypy", reason="harmonypy is not installed")
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(100, 5)), rng.normal(size=(100, 5))
    assert script.scaled_ilisi(one, other + 5) < 0.05 < 0.7 < script.scaled_ilisi(one, other)
    corrected = script.correct_by_harmony([one, other + 1], [np.repeat("one", 100), np.repeat("other", 100)], 0)
    assert script.scaled_ilisi(*corrected) > script.scaled_ilisi(one, other + 1) + 0.2


def test_scvi_translates_to_the_rates_of_the_target(script):
    pytest.importorskip("scvi", reason="scvi-tools is not installed", exc_type=ImportError)
    rng = np.random.default_rng(0)
    batch = np.repeat(["one", "other"], 100)
    rates = np.where((batch == "one")[:, None], [20, 5, 5, 5], [5, 20, 5, 5])
    cells = ad.AnnData(sp.csr_matrix(rng.poisson(rates).astype(np.float32)))
    cells.obs["batch"] = batch
    found = script.translate_by_scvi(cells, cells[:100].copy(), "batch", "other", np.full(100, 35.0), 0)
    for values in found.values():
        assert values.mean(axis=0) == pytest.approx([5, 20, 5, 5], rel=0.4)
    assert (found["scVI, draws"] % 1 == 0).all() and (found["scVI, means"] % 1 != 0).any()
