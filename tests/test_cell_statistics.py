"""Statistics in chunks: NumPy, scanpy and the formulas over all cells as oracles."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch

from scrdit_diffusers import SCRDiTProcessor, SCRDiTTransformer, cell_statistics, count_bins
from scrdit_diffusers.cell_statistics import CellStatistics, GeneMoments, normalize_log1p, take_in
from scrdit_diffusers.initialization import initialize_count_head

NUM_CELLS, NUM_GENES = 211, 120


@pytest.fixture(scope="module")
def counts() -> sp.csr_matrix:
    """Overdispersed counts with some genes that no cell expresses."""
    rng = np.random.default_rng(3)
    mean = np.minimum(rng.lognormal(-0.5, 1.5, NUM_GENES), 60)
    mean[[5, 50]] = 0
    size = rng.lognormal(0, 0.5, NUM_CELLS)[:, None]
    theta = rng.uniform(0.5, 10, NUM_GENES)
    return sp.csr_matrix(rng.poisson(rng.gamma(theta, mean * size / theta)), dtype=np.float32)


@pytest.fixture(scope="module")
def obs() -> pd.DataFrame:
    rng = np.random.default_rng(4)
    cell_type = pd.Categorical(rng.choice(["T", "B", "NK"], NUM_CELLS), categories=["T", "NK", "B"])
    return pd.DataFrame({"cell_type": cell_type, "batch": rng.integers(8, 11, NUM_CELLS)})


def chunked(matrix, obs, rows):
    return lambda: ((matrix[i : i + rows], obs.iloc[i : i + rows]) for i in range(0, matrix.shape[0], rows))


@pytest.mark.parametrize("rows", [1, 10, 1000])
@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_moments_are_numpys(counts, rows, offset):
    """With a mean of 10^7, E[x^2] - E[x]^2 would have no correct digit."""
    values = counts.toarray().astype(np.float64) + offset
    moments = GeneMoments(NUM_GENES)
    for start in range(0, NUM_CELLS, rows):
        moments.update(sp.csr_matrix(values[start : start + rows]))
    np.testing.assert_allclose(moments.mean, values.mean(axis=0), rtol=1e-12)
    for ddof in (0, 1):
        expected = counts.toarray().astype(np.float64).var(axis=0, ddof=ddof)
        np.testing.assert_allclose(moments.variance(ddof), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rows", [13, 1000])
@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger", "seurat_v3"])
def test_genes_are_scanpys(counts, obs, flavor, rows):
    processor, _ = SCRDiTProcessor.from_chunks(
        chunked(counts, obs, rows), pd.DataFrame(index=names()), flavor=flavor, n_top_genes=40
    )
    adata = ad.AnnData(counts.astype(np.float64), var=pd.DataFrame(index=names()))
    sc.pp.filter_genes(adata, min_cells=1)
    if flavor != "seurat_v3":
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=40, flavor=flavor)
    assert processor.var_names == list(adata.var_names[adata.var["highly_variable"]])


def names():
    return [f"g{i}" for i in range(NUM_GENES)]


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(flavor="all"),
        dict(genes=["g9", "g70", "g3"], zero_negation=True),
        dict(flavor="cv", n_top_genes=30, value_space="log_normalized", target_sum=1e4),
        dict(n_top_genes=30, value_space="log_normalized", recover_counts=True),
        dict(n_top_genes=30, value_space="log_normalized", recover_counts=True, per_length=True),
    ],
    ids=["counts", "some genes", "log-normalised", "counts behind them", "no counts behind them"],
)
def test_chunks_give_the_processor_of_the_whole(counts, obs, kwargs):
    labels = ["cell_type", "batch"]
    kwargs = dict(kwargs)
    lengths = np.linspace(0.5, 3, counts.shape[1]) if kwargs.pop("per_length", False) else 1.0
    if "recover_counts" in kwargs:
        counts = normalize_log1p(sp.csr_matrix(counts.multiply(1 / lengths)), 1e4)
    adata = ad.AnnData(counts, obs=obs.set_axis(obs.index.astype(str)), var=pd.DataFrame(index=names()))
    whole = SCRDiTProcessor.from_anndata(adata, labels, **kwargs)
    processor, _ = SCRDiTProcessor.from_chunks(chunked(counts, obs, 17), adata.var, labels, **kwargs)
    assert processor.var_names == whole.var_names
    assert processor.condition_categories == whole.condition_categories == [["T", "NK", "B"], ["8", "9", "10"]]
    assert processor.composition == whole.composition
    assert processor.log_library_sizes == whole.log_library_sizes
    assert (processor.normalized_by, processor.normalized_to) == (whole.normalized_by, whole.normalized_to)
    assert (processor.value_step is None) == (whole.value_step is None)
    assert np.array_equal(processor.value_min, whole.value_min)
    np.testing.assert_allclose(processor.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(processor.std, whole.std, rtol=1e-12)


@pytest.fixture(params=[2**20, 20], ids=["sizes joined at the end", "sizes joined often"])
def statistics(counts, obs, monkeypatch, request) -> CellStatistics:
    monkeypatch.setattr(cell_statistics, "MAX_PENDING", request.param)
    codes = np.column_stack([obs["cell_type"].cat.codes, obs["batch"] - 8]).astype(np.int64)
    statistics = CellStatistics(np.unique(codes, axis=0), NUM_GENES)
    for start in range(0, NUM_CELLS, 17):
        statistics.update(counts[start : start + 17], codes[start : start + 17])
    return statistics


def groups(obs):
    return [np.asarray(cells) for cells in obs.groupby(["cell_type", "batch"], observed=True).indices.values()]


def test_library_sizes_are_numpys(statistics, counts, obs):
    log_size = np.log(np.maximum(counts.toarray().sum(axis=1, dtype=np.float64), 1))
    np.testing.assert_allclose(statistics.log_library_size(), (log_size.mean(), log_size.std()), rtol=1e-9)
    expected = [np.quantile(log_size[cells], np.linspace(0, 1, 21)) for cells in groups(obs)]
    np.testing.assert_allclose(statistics.library_size_quantiles(21), expected, rtol=1e-9)
    assert statistics.num_cells.tolist() == [len(cells) for cells in groups(obs)]


@pytest.mark.parametrize("flavor", ["seurat", "seurat_v3", "cv"])
def test_parts_give_what_the_whole_gives(counts, obs, flavor):
    """Also a part without cells, and one without any of the labels."""
    starts = [0, 80, 80, 81, 200]
    parts = [chunked(counts[a:b], obs.iloc[a:b], 17) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    arguments = pd.DataFrame(index=names()), ["cell_type", "batch"]
    options = {"flavor": flavor, "n_top_genes": 40}
    whole, statistics = SCRDiTProcessor.from_chunks(chunked(counts, obs, 17), *arguments, **options)
    joined, of_parts = SCRDiTProcessor.from_chunks(parts, *arguments, **options)
    assert joined.var_names == whole.var_names
    assert joined.condition_categories == whole.condition_categories
    assert joined.composition == whole.composition
    assert joined.log_library_sizes == whole.log_library_sizes
    np.testing.assert_allclose(joined.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(joined.std, whole.std, rtol=1e-12)
    for name in ("num_cells", "count_max", "square_sum", "count_sum", "weighted_sum"):
        np.testing.assert_array_equal(getattr(of_parts, name), getattr(statistics, name))  # sums of integers


def test_the_order_of_parts_is_kept_whoever_is_first(counts, obs):
    class Seen:
        rows: list[int] = []

        def update(self, matrix, obs):
            self.rows = [*self.rows, *obs.index]

        def merge(self, other):
            self.rows = [*self.rows, *other.rows]

    parts = [chunked(counts[a : a + 50], obs.iloc[a : a + 50], 17) for a in range(0, NUM_CELLS, 50)]
    assert take_in(Seen(), parts).rows == list(range(NUM_CELLS))


def test_dispersions_are_moment_estimates(statistics, counts, obs):
    """Summed over cells: squared means, and squared residuals beyond Poisson."""
    dense = counts.toarray().astype(np.float64)
    size = np.maximum(dense.sum(axis=1), 1)
    squared_means, excess = np.zeros(NUM_GENES), np.zeros(NUM_GENES)
    for cells in groups(obs):
        mean = size[cells, None] * dense[cells].sum(axis=0) / size[cells].sum()
        squared_means += (mean**2).sum(axis=0)
        excess += ((dense[cells] - mean) ** 2 - mean).sum(axis=0)
    expected = np.clip(squared_means / np.maximum(excess, 1e-6), 0.1, 200)
    np.testing.assert_allclose(statistics.inverse_dispersion(), expected, rtol=1e-6)
    np.testing.assert_allclose(statistics.mean_profile(), dense.sum(axis=0) / size.sum())
    assert np.array_equal(statistics.count_max, dense.max(axis=0))


def test_count_head_starts_from_statistics_as_from_counts(counts, obs):
    processor, statistics = SCRDiTProcessor.from_chunks(
        chunked(counts, obs, 17), pd.DataFrame(index=names()), "cell_type", flavor="all"
    )
    counts = counts[:, [int(name[1:]) for name in processor.var_names]]
    assert count_bins(statistics) == count_bins(counts)
    kwargs = dict(patch_size=30, num_layers=1, num_attention_heads=1, attention_head_dim=8)
    heads = []
    for _ in range(2):
        model = SCRDiTTransformer(counts.shape[1], num_classes=[3], count_bins=count_bins(statistics), **kwargs)
        heads.append(model.count_head)
    initialize_count_head(
        heads[0], CellStatistics.from_counts(counts, processor.encode_labels(obs)), processor.mean, processor.std
    )
    initialize_count_head(heads[1], statistics, processor.mean, processor.std)
    for name, expected in heads[0].state_dict().items():
        torch.testing.assert_close(heads[1].state_dict()[name], expected)


def test_statistics_survive_a_file(statistics, tmp_path):
    statistics.save(tmp_path / "statistics.npz")
    loaded = CellStatistics.load(tmp_path / "statistics.npz")
    assert np.array_equal(loaded.library_size_quantiles(5), statistics.library_size_quantiles(5))
    assert np.array_equal(loaded.inverse_dispersion(), statistics.inverse_dispersion())
    assert np.array_equal(loaded.num_cells, statistics.num_cells)


def test_labels_missing_in_a_later_chunk_are_refused(counts, obs):
    obs = obs.assign(cell_type=obs["cell_type"].where(np.arange(NUM_CELLS) < 200))
    with pytest.raises(ValueError, match=r"obs\['cell_type'\] holds 11 NaN"):
        SCRDiTProcessor.from_chunks(chunked(counts, obs, 100), pd.DataFrame(index=names()), "cell_type")


def test_values_that_are_no_counts_in_a_later_chunk_are_refused(counts, obs):
    counts = counts.copy()
    counts.data[-1] = 0.5
    with pytest.raises(ValueError, match="some file was taken as counts but holds non-integers such as 0.5"):
        SCRDiTProcessor.from_chunks(chunked(counts, obs, 100), pd.DataFrame(index=names()), name="some file")


def test_log_normalised_values_may_begin_with_integers(counts, obs):
    """Only if all are integers they are counts by mistake."""
    values = sp.vstack([sp.csr_matrix(np.ones((100, NUM_GENES))), normalize_log1p(counts, 1e4)[100:]], format="csr")
    processor, _ = SCRDiTProcessor.from_chunks(
        chunked(values, obs, 100), pd.DataFrame(index=names()), value_space="log_normalized", flavor="all"
    )
    assert processor.num_genes == NUM_GENES
    with pytest.raises(ValueError, match="holds only integers"):
        SCRDiTProcessor.from_chunks(
            chunked(counts, obs, 100), pd.DataFrame(index=names()), value_space="log_normalized"
        )
