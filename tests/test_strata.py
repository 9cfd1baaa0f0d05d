"""Realism of all genes, and of those of each level of expression."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from scrdit_diffusers.evaluation.strata import compare_strata

RATES = np.repeat([0.002, 0.03, 0.4, 4.0], 25)  # a quarter of the genes in each stratum


def draw(rates, seed, num_cells=300):
    cells = ad.AnnData(sp.csr_matrix(np.random.default_rng(seed).poisson(rates, (num_cells, 100)), dtype=np.float32))
    cells.var_names = [f"gene{i}" for i in range(100)]
    return cells


def test_only_the_stratum_of_wrong_genes_tells_cells_apart():
    wrong = RATES * np.repeat([1, 1, 2, 1], 25)
    real, control, train = (draw(RATES, seed, 300 if seed < 2 else 3000) for seed in range(3))
    table = compare_strata(real, draw(wrong, 3), train, control).set_index("stratum")
    assert table["num_genes"].to_dict() == {
        "all genes": 100, "below 0.01": 25, "0.01 to 0.1": 25, "0.1 to 1": 25, "at least 1": 25
    }  # fmt: skip
    assert table["value"]["0.1 to 1"] > 0.75 and table["value"]["all genes"] > 0.75
    assert 0.35 < table["value"]["0.01 to 0.1"] < 0.65
    assert table["ceiling"].dropna().between(0.35, 0.65).all()
    assert np.isnan(table["value"]["below 0.01"])  # no gene is seen in 20 of 600 cells


def test_missing_control_cells_leave_the_ceiling_open():
    real, train, synthetic = (draw(RATES, seed) for seed in range(3))
    assert compare_strata(real, synthetic, train)["ceiling"].isna().all()


def test_too_few_cells_are_refused():
    with pytest.raises(ValueError, match="^synthetic has 5 cells"):
        compare_strata(draw(RATES, 0), draw(RATES, 1, 5), draw(RATES, 2))
