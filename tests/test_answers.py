"""How denoising, annotation, simulation and augmentation are measured."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/answers")


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy(script):
    probabilities = np.tile([0.8, 0.2], (100, 1))
    codes = (np.arange(100) >= 60).astype(int)  # right in 60 of 100 cells
    assert script.calibration_error(probabilities, codes) == pytest.approx(0.2)


def test_thinned_cells_have_their_effects(script):
    counts = np.random.default_rng(0).poisson(200, (400, 3)).astype(np.float32)
    cells = ad.AnnData(sp.csr_matrix(counts))
    cells.var_names = ["a", "b", "c"]
    thinned = script.thin(cells, {"b": -1.0}, np.random.default_rng(1))
    treated = (thinned.obs["group"] == "treated").to_numpy()
    ratio = np.asarray(thinned.X[treated].mean(axis=0) / thinned.X[~treated].mean(axis=0)).ravel()
    assert np.allclose(ratio, [1, 0.5, 1], atol=0.02)
    assert thinned.varm["log2_fold_change"]["treated"].tolist() == [0, -1, 0]
