"""Moments in chunks: NumPy and the formulas over all cells as oracles."""

import numpy as np
import pytest
import scipy.sparse as sp
from made_cells import NUM_CELLS, NUM_GENES, chunked

from scrdit_diffusers.cells import moments
from scrdit_diffusers.cells.moments import CellMoments, GeneMoments, run_pass


@pytest.mark.parametrize("rows", [1, 10, 1000])
@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_moments_are_numpys(counts, rows, offset):
    """With a mean of 10^7, E[x^2] - E[x]^2 would have no correct digit."""
    values = counts.toarray().astype(np.float64) + offset
    gene_moments = GeneMoments(NUM_GENES)
    for start in range(0, NUM_CELLS, rows):
        gene_moments.update(sp.csr_matrix(values[start : start + rows]))
    np.testing.assert_allclose(gene_moments.mean, values.mean(axis=0), rtol=1e-12)
    for ddof in (0, 1):
        expected = counts.toarray().astype(np.float64).var(axis=0, ddof=ddof)
        np.testing.assert_allclose(gene_moments.variance(ddof), expected, rtol=1e-6, atol=1e-9)


@pytest.fixture(params=[2**20, 20], ids=["sizes joined at the end", "sizes joined often"])
def cell_moments(counts, obs, monkeypatch, request) -> CellMoments:
    monkeypatch.setattr(moments, "MAX_PENDING", request.param)
    codes = np.column_stack([obs["cell_type"].cat.codes, obs["batch"] - 8]).astype(np.int64)
    cell_moments = CellMoments(np.unique(codes, axis=0), NUM_GENES)
    for start in range(0, NUM_CELLS, 17):
        cell_moments.update(counts[start : start + 17], codes[start : start + 17])
    return cell_moments


def groups(obs):
    return [np.asarray(cells) for cells in obs.groupby(["cell_type", "batch"], observed=True).indices.values()]


def test_library_sizes_are_numpys(cell_moments, counts, obs):
    log_size = np.log(np.maximum(counts.toarray().sum(axis=1, dtype=np.float64), 1))
    np.testing.assert_allclose(cell_moments.log_library_size(), (log_size.mean(), log_size.std()), rtol=1e-9)
    expected = [np.quantile(log_size[cells], np.linspace(0, 1, 21)) for cells in groups(obs)]
    np.testing.assert_allclose(cell_moments.library_size_quantiles(21), expected, rtol=1e-9)
    assert cell_moments.num_cells.tolist() == [len(cells) for cells in groups(obs)]


def test_the_order_part_moments_is_kept_whoever_is_first(counts, obs):
    class Seen:
        rows: list[int] = []

        def update(self, matrix, obs):
            self.rows = [*self.rows, *obs.index]

        def merge(self, other):
            self.rows = [*self.rows, *other.rows]

    parts = [chunked(counts[a : a + 50], obs.iloc[a : a + 50], 17) for a in range(0, NUM_CELLS, 50)]
    assert run_pass(Seen(), parts).rows == list(range(NUM_CELLS))


def test_dispersions_are_moment_estimates(cell_moments, counts, obs):
    """Summed over cells: squared means, and squared residuals beyond Poisson."""
    dense = counts.toarray().astype(np.float64)
    size = np.maximum(dense.sum(axis=1), 1)
    squared_means, excess = np.zeros(NUM_GENES), np.zeros(NUM_GENES)
    for cells in groups(obs):
        mean = size[cells, None] * dense[cells].sum(axis=0) / size[cells].sum()
        squared_means += (mean**2).sum(axis=0)
        excess += ((dense[cells] - mean) ** 2 - mean).sum(axis=0)
    expected = np.clip(squared_means / np.maximum(excess, 1e-6), 0.1, 200)
    np.testing.assert_allclose(cell_moments.inverse_dispersion(), expected, rtol=1e-6)
    np.testing.assert_allclose(cell_moments.mean_profile(), dense.sum(axis=0) / size.sum())
    assert np.array_equal(cell_moments.count_max, dense.max(axis=0))


def test_cell_moments_survive_a_file(cell_moments, tmp_path):
    cell_moments.save(tmp_path / "moments.npz")
    loaded = CellMoments.load(tmp_path / "moments.npz")
    assert np.array_equal(loaded.library_size_quantiles(5), cell_moments.library_size_quantiles(5))
    assert np.array_equal(loaded.inverse_dispersion(), cell_moments.inverse_dispersion())
    assert np.array_equal(loaded.num_cells, cell_moments.num_cells)
