"""The processor: exact inverses, NumPy and scanpy as oracles, and every refusal."""

import json
import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from scrdit_diffusers import SCRDiTProcessor
from scrdit_diffusers.checks import MAX_COUNT, looks_like_counts
from scrdit_diffusers.values import normalize_log1p, recover_counts

SEEDS = range(5)


def random_counts(seed, num_cells=80, num_genes=40, dtype=np.float32):
    """Counts as in a real matrix: many zeros, a long tail up to the largest supported count, constant genes."""
    rng = np.random.default_rng(seed)
    counts = np.floor(10 ** rng.uniform(-2, 7.2, (num_cells, num_genes))) * (rng.random((num_cells, num_genes)) < 0.4)
    counts[0, 0], counts[1, 0], counts[2, 0] = 10**6, 10**6 + 1, MAX_COUNT
    counts[:, 1] = 3
    counts[:, 2] = MAX_COUNT
    counts[rng.integers(num_cells), 3] = 1
    return sp.csr_matrix(np.minimum(counts, MAX_COUNT).astype(dtype))


def make_adata(matrix, **obs):
    var = pd.DataFrame(index=[f"g{i}" for i in range(matrix.shape[1])])
    return ad.AnnData(matrix, obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(matrix.shape[0])]), var=var)


def log_normalized(seed):
    counts = random_counts(seed)
    counts.data = np.minimum(counts.data, 500)
    return normalize_log1p(counts, 1e4).astype(np.float32)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_negation", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_counts_come_back_exactly(seed, zero_negation):
    counts = random_counts(seed)
    processor = SCRDiTProcessor.from_anndata(make_adata(counts), flavor="all", zero_negation=zero_negation)
    values = processor.get_values(make_adata(counts))
    assert values.shape[1] > 35
    back = processor.inverse_transform(processor.transform(values))
    assert np.array_equal(back, values.toarray())
    assert back.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float64])
def test_counts_of_any_dtype_come_back_exactly(dtype):
    counts = random_counts(0)
    counts.data = np.minimum(counts.data, 255)
    counts = counts.astype(dtype)
    processor = SCRDiTProcessor.from_anndata(make_adata(counts), flavor="all")
    values = processor.get_values(make_adata(counts))
    assert np.array_equal(processor.inverse_transform(processor.transform(values)), values.toarray())


def test_counts_that_training_never_saw_come_back_exactly(processor):
    """The transform is bijective on all integers, not only on the training cells."""
    values = np.tile(np.concatenate([np.arange(1000), 2 ** np.arange(10, 25), [MAX_COUNT - 1]])[:, None], (1, 23))
    assert np.array_equal(processor.inverse_transform(processor.transform(values)), values)


def test_counts_survive_float32_up_to_ten_thousand(processor):
    """The network's own precision: what it would have to return for exact counts is a float32."""
    values = np.tile(np.arange(10_000)[:, None], (1, 23))
    samples = processor.transform(values).astype(np.float32)
    assert np.array_equal(processor.inverse_transform(samples), values)


@pytest.mark.parametrize("zero_negation", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_log_normalized_values_come_back_exactly(seed, zero_negation):
    values = log_normalized(seed)
    adata = make_adata(values)
    processor = SCRDiTProcessor.from_anndata(
        adata, value_space="log_normalized", zero_negation=zero_negation, flavor="all"
    )
    values = processor.get_values(adata)
    back = processor.inverse_transform(processor.transform(values))
    assert np.array_equal(back, values.toarray())


def test_target_sum_normalizes_over_all_genes(adata):
    """The library size is that of the whole cell, not of the selected genes."""
    genes = list(adata.var_names[[7, 2, 11]])
    processor = SCRDiTProcessor.from_anndata(adata, value_space="log_normalized", target_sum=1e4, genes=genes)
    np.testing.assert_allclose(
        processor.get_values(adata).toarray(), adata[:, genes].layers["lognorm"].toarray(), rtol=1e-6
    )


@pytest.mark.parametrize("zero_negation", [False, True])
@pytest.mark.parametrize("value_space", ["counts", "log_normalized"])
def test_model_space_is_standardized(value_space, zero_negation):
    matrix = random_counts(1) if value_space == "counts" else log_normalized(1)
    processor = SCRDiTProcessor.from_anndata(
        make_adata(matrix), value_space=value_space, zero_negation=zero_negation, min_std=0.0, flavor="all"
    )
    values = processor.get_values(make_adata(matrix))
    model_space = processor.transform(values)
    varies = np.ptp(values.toarray(), axis=0) > 0
    np.testing.assert_allclose(model_space.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(model_space[:, varies].std(axis=0), 1, atol=1e-9)
    assert varies.sum() > 30


def test_rarely_expressed_genes_keep_a_smaller_std():
    adata = make_adata(random_counts(1))
    own = SCRDiTProcessor.from_anndata(adata, min_std=0.0, flavor="all").std
    floor = float(np.median(own))
    processor = SCRDiTProcessor.from_anndata(adata, min_std=floor, flavor="all")
    np.testing.assert_array_equal(processor.std, np.maximum(own, floor))


@pytest.mark.parametrize("zero_negation", [False, True])
def test_a_gene_that_does_not_vary_has_unit_std(zero_negation):
    """Rounding must not pass for variation: dividing by it would blow up any other cell."""
    counts = sp.csr_matrix(np.array([[3, MAX_COUNT, 0], [3, MAX_COUNT, 1]] * 500, dtype=np.float32))
    processor = SCRDiTProcessor.from_anndata(make_adata(counts), flavor="all", zero_negation=zero_negation)
    assert processor.std[:2].tolist() == [1, 1]


def test_zero_negation_puts_zeros_at_zero_value(adata):
    processor = SCRDiTProcessor.from_anndata(adata, zero_negation=True, zero_value=-4.0, flavor="all")
    values = processor.get_values(adata).toarray()
    before_standardizing = processor.transform(values) * processor.std + processor.mean
    expected = np.where(values == 0, -4.0, np.log1p(values))
    np.testing.assert_allclose(before_standardizing, expected, atol=1e-12)


@pytest.mark.parametrize(("value", "back"), [(-10.0, 0.0), (-0.1, 0.0), (0.0, 0.0), (0.29, 0.0), (0.31, 0.31)])
def test_inverse_clamps_to_exact_zeros(value, back):
    processor = SCRDiTProcessor(["g"], [1.0], [2.0], value_space="log_normalized", zero_threshold=0.3)
    assert processor.inverse_transform(np.array([[(value - 1) / 2]]))[0, 0] == np.float32(back)


@pytest.mark.parametrize(("log_value", "count"), [(-3.0, 0), (0.4, 0), (0.41, 1), (0.9, 1), (1e3, MAX_COUNT)])
def test_inverse_rounds_to_bounded_counts(log_value, count):
    processor = SCRDiTProcessor(["g"], [0.0], [1.0])
    assert processor.inverse_transform(np.array([[log_value]]))[0, 0] == count


def test_without_standardization_model_space_holds_the_values(adata):
    """As in the paper: zeros at -10, other values as they are."""
    options = dict(layer="lognorm", value_space="log_normalized", zero_negation=True, standardize=False)
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", **options)
    values = adata.layers["lognorm"].toarray()
    np.testing.assert_array_equal(processor.transform(values), np.where(values == 0, -10, values))
    np.testing.assert_array_equal(processor.inverse_transform(processor.transform(values)), values)


def test_dense_and_sparse_values_agree(processor, adata):
    sparse = processor.transform(processor.get_values(adata))
    assert np.array_equal(sparse, processor.transform(adata.X.toarray()))
    assert np.array_equal(sparse, processor.transform(adata.X.tocsc()))


def test_transform_leaves_its_input_alone(processor, adata):
    values = adata.X.copy()
    values.data[:5] = 0  # explicit zeros
    data, indptr = values.data.copy(), values.indptr.copy()
    processor.transform(values)
    assert np.array_equal(values.data, data)
    assert np.array_equal(values.indptr, indptr)


def test_entries_stored_in_parts_are_summed(processor, adata):
    """CSR may hold one entry twice; SciPy's meaning is the sum."""
    parts = sp.csr_matrix((np.array([1.0, 2.0]), np.array([4, 4]), np.array([0, 2])), shape=(1, 23))
    cells = ad.AnnData(parts, var=adata.var)
    assert np.array_equal(processor.transform(processor.get_values(cells)), processor.transform(parts.toarray()))


def test_normalize_log1p_is_scanpys(adata):
    adata.X = adata.X.astype(np.float64)
    ours = normalize_log1p(adata.X, 1e4)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    np.testing.assert_allclose(ours.toarray(), adata.X.toarray(), rtol=1e-12)


def test_normalize_log1p_keeps_empty_cells():
    counts = sp.csr_matrix(np.array([[0.0, 0.0], [1.0, 3.0]]))
    np.testing.assert_allclose(normalize_log1p(counts, 4).toarray(), [[0, 0], np.log1p([1, 3])])


@pytest.mark.parametrize(
    ("values", "expected"),
    [([[0, 3.0]], True), ([[0, 3.5]], False), ([[-1, 3]], False), ([[0, 0]], False), ([[np.nan, 1]], False)],
)
def test_looks_like_counts(values, expected):
    assert looks_like_counts(np.array(values)) is expected
    assert looks_like_counts(sp.csr_matrix(values)) is expected


# -- counts behind log-normalized values -------------------------------------------------------------------------------


def scanpy_normalized(counts, target_sum=1e4):
    adata = make_adata(sp.csr_matrix(counts, dtype=np.float32, copy=True))
    sc.pp.normalize_total(adata, target_sum=target_sum)
    sc.pp.log1p(adata)
    return adata


def few_counts(seed=0, num_cells=60, num_genes=50):
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.5, 4.0, num_genes) * rng.gamma(3.0, 1.0, (num_cells, 1))
    counts = rng.poisson(rates)
    counts[0] = np.maximum(counts[0], 1)  # every gene is expressed
    counts[:, 0] = 1  # each cell's smallest value is one count
    counts[:, 1] = rng.integers(0, 2000, num_cells)
    return sp.csr_matrix(counts, dtype=np.float32)


@pytest.mark.parametrize("target_sum", [None, 1e4, 1e6])
@pytest.mark.parametrize("seed", SEEDS)
def test_counts_behind_scanpys_values_are_recovered(seed, target_sum):
    counts = few_counts(seed)
    values = scanpy_normalized(counts, target_sum).X
    recovered, one_count, exact = recover_counts(values)
    assert exact.all() and np.array_equal(recovered.toarray(), counts.toarray())
    np.testing.assert_allclose(one_count, values.expm1().sum(axis=1).A1 / counts.sum(axis=1).A1, rtol=1e-4)


def test_counts_behind_values_of_three_decimals_are_recovered():
    counts = few_counts()
    counts.data = np.minimum(counts.data, 100)
    values = scanpy_normalized(counts).X
    values.data = np.round(values.data, 3)
    recovered, _, exact = recover_counts(values)
    assert exact.all() and np.array_equal(recovered.toarray(), counts.toarray())


@pytest.mark.parametrize("smallest", [2, 3])
def test_counts_are_recovered_where_no_gene_has_one_count(smallest):
    counts = np.array([[smallest, 0, 4, 5, 7, 11], [1, 0, 2, 0, 0, 3], [0, 0, 0, 0, 0, 0]])
    recovered, one_count, exact = recover_counts(normalize_log1p(sp.csr_matrix(counts), 1e4).astype(np.float32))
    assert exact.all() and np.array_equal(recovered.toarray(), counts) and np.isinf(one_count[2])


def per_length(counts, seed=0):
    """Log-normalized counts per length of the gene, as TPM are, which are not scaled counts."""
    lengths = np.exp(np.random.default_rng(seed).normal(0, 0.7, counts.shape[1]))
    return make_adata(normalize_log1p(sp.csr_matrix(counts.multiply(1 / lengths)), 1e5).astype(np.float32))


def test_values_that_are_not_scaled_counts_are_told():
    assert not recover_counts(per_length(few_counts()).X)[2].any()


RECOVER = dict(value_space="log_normalized", recover_counts=True)


@pytest.mark.parametrize("genes", [["g7", "g0", "g1"], None], ids=["some genes", "all genes"])
def test_model_space_of_log_normalized_values_is_that_of_their_counts(genes):
    counts = few_counts()
    expected = SCRDiTProcessor.from_anndata(make_adata(counts), flavor="all", genes=genes)
    for adata, options in ((scanpy_normalized(counts), {}), (make_adata(counts), dict(target_sum=1e4))):
        processor = SCRDiTProcessor.from_anndata(adata, flavor="all", genes=genes, **RECOVER, **options)
        assert processor.normalized_by == ("library_size" if genes else "model_genes")
        assert processor.normalized_to == 1e4
        np.testing.assert_allclose(processor.mean, expected.mean, rtol=1e-9)
        np.testing.assert_allclose(processor.std, expected.std, rtol=1e-9)
        recovered, sizes = processor.get_counts(adata)
        assert np.array_equal(recovered.toarray(), expected.get_values(make_adata(counts)).toarray())
        np.testing.assert_allclose(sizes, counts.sum(axis=1).A1, rtol=1e-3)
        levels = np.quantile(np.log(counts.sum(axis=1).A1), np.linspace(0, 1, 21))
        np.testing.assert_allclose(processor.log_library_sizes, [levels], atol=1e-3)
        samples = processor.transform(recovered).astype(np.float32)
        back = sp.csr_matrix(processor.inverse_transform(samples))
        assert np.array_equal(back.toarray(), recovered.toarray())
        values = processor.normalize(back, sizes)
        np.testing.assert_allclose(values.toarray(), processor.get_values(adata).toarray(), rtol=1e-3)


def test_counts_are_recovered_from_genes_chosen_after_normalization():
    counts = few_counts()
    adata = scanpy_normalized(counts)[:, :20].copy()
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", **RECOVER)
    recovered, sizes = processor.get_counts(adata)
    assert processor.normalized_by == "library_size"
    assert np.array_equal(recovered.toarray(), counts[:, :20].toarray())
    np.testing.assert_allclose(processor.normalize(recovered, sizes).toarray(), adata.X.toarray(), rtol=1e-3)


def test_values_that_are_not_scaled_counts_are_taken_as_fine_ones(caplog):
    adata = per_length(few_counts())
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", **RECOVER)
    assert processor.normalized_by is None and "log1p of scaled counts" in caplog.text
    counts, sizes = processor.get_counts(adata)
    assert np.array_equal(sizes, counts.sum(axis=1).A1)
    values, back = adata.X.toarray(), processor.normalize(counts).toarray()
    assert np.array_equal(back > 0, values > 0)
    step = values[values > 0].std() / 15
    assert np.isclose(processor.value_step, step)
    np.testing.assert_allclose(back, values, atol=0.51 * step)
    np.testing.assert_allclose(
        back.min(axis=0, where=back > 0, initial=99), values.min(axis=0, where=values > 0, initial=99), rtol=1e-6
    )


def test_values_of_another_kind_are_refused():
    processor = SCRDiTProcessor.from_anndata(scanpy_normalized(few_counts()), flavor="all", **RECOVER)
    with pytest.raises(ValueError, match="adata.X is not log1p of scaled counts"):
        processor.get_counts(per_length(few_counts()))
    with pytest.raises(ValueError, match="transform those of get_counts"):
        processor.transform(scanpy_normalized(few_counts()).X)
    with pytest.raises(ValueError, match="sees log-normalized values themselves"):
        SCRDiTProcessor(value_space="log_normalized").select_counts(few_counts(), slice(None))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(normalized_by="library_size", normalized_to=1e4), "normalized_by"),
        (dict(value_space="log_normalized", normalized_by="cells", normalized_to=1e4), "must be one of"),
        (dict(value_space="log_normalized", normalized_by="model_genes"), "does not go with normalized_to=None"),
        (dict(value_space="log_normalized", normalized_to=1e4), "does not go with normalized_to=10000"),
        (dict(value_space="log_normalized", normalized_by="library_size", normalized_to=0.0), "normalized_to=0"),
        (dict(value_step=0.1), "value_step=0.1"),
        (dict(value_space="log_normalized", value_step=-1.0), "value_step=-1.0"),
        (dict(value_space="log_normalized", value_step=1.0, value_min=[0.1]), "value_min has shape"),
        (RECOVER | dict(zero_negation=True), "zero_negation is for values"),
    ],
)
def test_normalizations_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        if "recover_counts" in kwargs:
            SCRDiTProcessor.from_anndata(scanpy_normalized(few_counts()), **kwargs)
        else:
            SCRDiTProcessor(**kwargs)


# -- genes -------------------------------------------------------------------------------------------------------------


def gene_adata():
    """300 genes in 200 cells, two groups of cells, two genes that are never expressed."""
    rng = np.random.default_rng(3)
    rate = rng.gamma(0.5, 3.0, 300) * np.where(rng.random((200, 300)) < 0.5, 1, rng.gamma(1, 1, (2, 300))[[0, 1] * 100])
    counts = rng.poisson(rate)
    counts[:, [5, 250]] = 0
    return make_adata(sp.csr_matrix(counts.astype(np.float32)))


@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger", "seurat_v3"])
def test_variable_genes_are_scanpys(flavor):
    adata = gene_adata()
    processor = SCRDiTProcessor.from_anndata(adata, n_top_genes=50, flavor=flavor)
    sc.pp.filter_genes(adata, min_cells=1)
    if flavor != "seurat_v3":
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=50, flavor=flavor)
    assert processor.var_names == list(adata.var_names[adata.var.highly_variable])
    assert processor.num_genes == 50


def test_cv_takes_the_largest_coefficients_of_variation():
    adata = gene_adata()
    processor = SCRDiTProcessor.from_anndata(adata, n_top_genes=50, flavor="cv")
    values = adata.X.toarray().astype(np.float64)[:, adata.X.toarray().any(axis=0)]
    names = adata.var_names[adata.X.toarray().any(axis=0)]
    cv = values.std(axis=0) / values.mean(axis=0)
    chosen = np.isin(names, processor.var_names)
    assert chosen.sum() == 50
    assert cv[chosen].min() >= cv[~chosen].max() - 1e-9


def test_all_keeps_the_expressed_genes_in_order():
    adata = gene_adata()
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", n_top_genes=3)
    assert processor.var_names == list(adata.var_names[adata.X.toarray().any(axis=0)])
    assert processor.num_genes < adata.n_vars


def test_given_genes_keep_their_order(adata):
    genes = ["gene7", "gene2", "gene11"]
    processor = SCRDiTProcessor.from_anndata(adata, genes=genes)
    assert processor.var_names == genes
    assert processor.gene_ids == ["ENSG00007", "ENSG00002", "ENSG00011"]
    assert np.array_equal(processor.get_values(adata).toarray(), adata[:, genes].X.toarray())


def test_genes_are_found_by_name_in_other_data(processor, adata):
    shuffled = adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()
    assert np.array_equal(processor.get_values(shuffled).toarray(), processor.get_values(adata).toarray())


def test_fewer_expressed_genes_than_asked_for_warns(adata, caplog):
    with caplog.at_level(logging.WARNING):
        processor = SCRDiTProcessor.from_anndata(adata, n_top_genes=2000)
    assert processor.num_genes == 23
    assert "Only 23 genes are expressed" in caplog.text


def test_unexpressed_genes_of_a_list_warn(caplog):
    with caplog.at_level(logging.WARNING):
        SCRDiTProcessor.from_anndata(gene_adata(), genes=["g5", "g6"])
    assert "1 of the 2 genes are zero in every training cell" in caplog.text


def test_gene_ids_of_a_named_column(adata):
    adata.var = adata.var.rename(columns={"gene_ids": "stable_id"})
    assert SCRDiTProcessor.from_anndata(adata, flavor="all").gene_ids is None
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", gene_ids_key="stable_id")
    assert processor.gene_ids == list(adata.var["stable_id"])


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(labels_key=["cell_type", "batch"]),
        dict(layer="lognorm", value_space="log_normalized", zero_negation=True, zero_value=-7.3, zero_threshold=0.1),
        dict(value_space="log_normalized", target_sum=1e4, labels_key="batch", flavor="cv", n_top_genes=4),
        dict(layer="lognorm", value_space="log_normalized", recover_counts=True, labels_key="batch", n_top_genes=9),
    ],
)
def test_save_and_load_bit_by_bit(adata, tmp_path, kwargs):
    processor = SCRDiTProcessor.from_anndata(adata, **{"flavor": "all"} | kwargs)
    processor.save_pretrained(tmp_path / "first")
    loaded = SCRDiTProcessor.from_pretrained(tmp_path / "first")
    assert loaded.mean.tobytes() == processor.mean.tobytes()
    assert loaded.std.tobytes() == processor.std.tobytes()
    assert loaded.to_dict().keys() == processor.to_dict().keys()
    loaded.save_pretrained(tmp_path / "second")
    texts = [(tmp_path / folder / "preprocessor_config.json").read_bytes() for folder in ("first", "second")]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["var_names"] == processor.var_names
    names = ["value_space", "target_sum", "zero_negation", "zero_value", "zero_threshold", "gene_ids"]
    for name in [*names, "normalized_by", "normalized_to", "value_step"]:
        assert getattr(loaded, name) == getattr(processor, name)
    assert (loaded.conditions, loaded.composition) == (processor.conditions, processor.composition)
    assert loaded.log_library_sizes == processor.log_library_sizes


# -- labels ------------------------------------------------------------------------------------------------------------


def test_label_order_is_that_of_the_categorical_else_sorted(processor):
    assert processor.conditions == {"cell_type": ["T", "B", "NK"], "batch": ["b1", "b2"]}
    assert processor.num_classes == [3, 2]


def test_unused_categories_are_left_out(adata):
    processor = SCRDiTProcessor.from_anndata(adata[adata.obs.cell_type != "B"].copy(), "cell_type", flavor="all")
    assert processor.conditions == {"cell_type": ["T", "NK"]}


@pytest.mark.parametrize("labels", [[1, 2, 10] * 20, [True, False, True] * 20, pd.Categorical([3, 1, 2] * 20)])
def test_labels_that_are_no_strings(adata, labels):
    adata.obs["cluster"] = labels
    processor = SCRDiTProcessor.from_anndata(adata, "cluster", flavor="all")
    codes = processor.encode_labels(adata.obs)
    assert list(processor.decode_labels(codes)["cluster"]) == [str(label) for label in adata.obs["cluster"]]


def test_labels_come_back(processor, adata):
    codes = processor.encode_labels(adata.obs)
    assert codes.shape == (60, 2)
    decoded = processor.decode_labels(codes)
    assert list(decoded["cell_type"]) == list(adata.obs["cell_type"])
    assert list(decoded["batch"]) == list(adata.obs["batch"])
    assert list(decoded["cell_type"].cat.categories) == ["T", "B", "NK"]


def test_composition_counts_the_training_cells(processor, adata):
    crossed = pd.crosstab(adata.obs["cell_type"], adata.obs["batch"])
    stored = {(ct, b): n for ct, b, n in processor.composition}
    for i, cell_type in enumerate(["T", "B", "NK"]):
        for j, batch in enumerate(["b1", "b2"]):
            assert stored.get((i, j), 0) == crossed.loc[cell_type, batch]


def skewed_processor():
    """T only in b1 (60 cells), B in both (10 and 30), NK nowhere."""
    return SCRDiTProcessor(
        ["g"],
        [0.0],
        [1.0],
        condition_keys=["cell_type", "batch"],
        condition_categories=[["T", "B", "NK"], ["b1", "b2"]],
        composition=[[0, 0, 60], [1, 0, 10], [1, 1, 30]],
    )


def sampled_shares(conditions, num_cells=20_000):
    codes = skewed_processor().sample_labels(num_cells, conditions, np.random.default_rng(0).random(num_cells))
    combinations, numbers = np.unique(codes, axis=0, return_counts=True)
    return {tuple(map(int, c)): n / num_cells for c, n in zip(combinations, numbers, strict=True)}


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (None, {(0, 0): 0.6, (1, 0): 0.1, (1, 1): 0.3}),
        ({"cell_type": "B"}, {(1, 0): 0.25, (1, 1): 0.75}),
        ({"batch": "b1"}, {(0, 0): 6 / 7, (1, 0): 1 / 7}),
        ({"cell_type": ["T", "B"] * 10_000}, {(0, 0): 0.5, (1, 0): 0.125, (1, 1): 0.375}),
        ({"cell_type": "T", "batch": "b2"}, {(0, 1): 1.0}),
        ({"cell_type": "NK"}, {(2, 0): 0.7, (2, 1): 0.3}),
    ],
    ids=["joint", "given one", "given other", "given list", "all given", "unseen falls back to the marginal"],
)
def test_labels_are_drawn_from_the_training_composition(conditions, expected):
    shares = sampled_shares(conditions)
    assert shares.keys() == expected.keys()
    for combination, share in expected.items():
        assert shares[combination] == pytest.approx(share, abs=0.015)


def test_each_quantile_draws_its_own_label():
    """A cell's label depends on its own random number only, not on those of the other cells."""
    quantiles = np.array([0.0, 0.59, 0.61, 0.69, 0.71, np.nextafter(1.0, 0.0)])
    codes = skewed_processor().sample_labels(6, None, quantiles)
    assert codes.tolist() == [[0, 0], [0, 0], [1, 0], [1, 0], [1, 1], [1, 1]]


# -- library sizes -----------------------------------------------------------------------------------------------------


def test_library_sizes_are_the_quantiles_of_the_cells_with_the_same_labels(processor, adata):
    sizes = adata.X.toarray().sum(axis=1)
    levels = np.linspace(0, 1, 101)[:-1]
    for code, cell_type in enumerate(["T", "B", "NK"]):
        own = sizes[(adata.obs["cell_type"] == cell_type) & (adata.obs["batch"] == "b2")]
        drawn = processor.sample_library_sizes(np.tile([code, 1], (100, 1)), levels)
        assert drawn[0] == pytest.approx(own.min(), rel=1e-3)
        stored = levels * 20 == np.rint(levels * 20)
        np.testing.assert_allclose(np.log(drawn[stored]), np.quantile(np.log(own), levels[stored]), atol=1e-3)
        assert (np.diff(drawn) >= 0).all() and drawn[-1] <= own.max()


def test_library_sizes_are_over_the_models_genes_only(adata):
    processor = SCRDiTProcessor.from_anndata(adata, genes=["gene9", "gene3"])
    size = processor.sample_library_sizes(np.empty((1, 0), dtype=int), np.zeros(1))[0]
    assert size == pytest.approx(max(adata[:, ["gene9", "gene3"]].X.toarray().sum(axis=1).min(), 1), rel=1e-3)


def test_library_sizes_without_labels_are_those_of_all_cells(adata):
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all")
    assert processor.composition == [[60]]
    drawn = processor.sample_library_sizes(np.empty((3, 0), dtype=int), np.array([0, 0.5, 1]))
    sizes = adata.X.toarray().sum(axis=1)
    np.testing.assert_allclose(drawn, [sizes.min(), np.median(sizes), sizes.max()], rtol=1e-2)


def library_sizes_of(composition, log_library_sizes, codes, quantiles):
    processor = SCRDiTProcessor(
        condition_keys=["a", "b"],
        condition_categories=[["a0", "a1", "a2"], ["b0", "b1"]],
        composition=composition,
        log_library_sizes=log_library_sizes,
    )
    return np.log(processor.sample_library_sizes(np.array(codes), np.array(quantiles)))


def test_library_sizes_of_an_unseen_combination_are_shifted_by_each_label():
    """With as many cells everywhere and shifts 0 and 1 by `a`, 0 and 2 by `b`, the shifts of (a1, b1) add."""
    composition = [[0, 0, 50], [0, 1, 50], [1, 0, 50]]
    sizes = [[5.0, 6.0], [7.0, 8.0], [6.0, 7.0]]
    average, of_a1, of_b1 = np.array([6.0, 7.0]), np.array([6.0, 7.0]), np.array([7.0, 8.0])
    drawn = library_sizes_of(composition, sizes, [[1, 1]] * 3, [0, 0.5, 1])
    expected = of_a1 + of_b1 - average
    np.testing.assert_allclose(drawn, [expected[0], expected.mean(), expected[1]])


def test_library_sizes_of_a_label_without_cells_are_finite():
    drawn = library_sizes_of([[0, 0, 50], [1, 1, 50]], [[5.0, 6.0], [7.0, 8.0]], [[2, 0], [2, 1]], [0.5, 0.5])
    np.testing.assert_allclose(drawn, [5.5, 7.5])


def test_each_cell_draws_the_library_size_of_its_own_labels():
    sizes = [[5.0, 6.0], [7.0, 8.0]]
    drawn = library_sizes_of([[0, 0, 50], [1, 1, 50]], sizes, [[1, 1], [0, 0], [1, 1]], [0.0, 0.5, 0.25])
    np.testing.assert_allclose(drawn, [7, 5.5, 7.25])


def test_empty_cells_have_a_library_size_of_one():
    counts = sp.csr_matrix(np.eye(4)[[0, 1, 1]] * 3 * np.array([[1], [1], [0]]))
    processor = SCRDiTProcessor.from_anndata(make_adata(counts), flavor="all")
    assert processor.sample_library_sizes(np.empty((1, 0), dtype=int), np.zeros(1)) == 1


def test_a_processor_of_log_normalized_values_holds_no_library_sizes(adata):
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", value_space="log_normalized", target_sum=1e4)
    with pytest.raises(ValueError, match="holds no library sizes; give library_size"):
        processor.sample_library_sizes(np.empty((1, 0), dtype=int), np.zeros(1))


# -- refusals ----------------------------------------------------------------------------------------------------------


def set_value(value, layer=None):
    def change(adata):
        matrix = adata.X if layer is None else adata.layers[layer]
        matrix.data[3] = value

    return change


def scale_x(adata):
    adata.X = adata.layers["lognorm"].copy()


def only_lognorm(adata):
    scale_x(adata)
    del adata.layers["counts"]


def only_raw(adata):
    adata.raw = adata.copy()
    only_lognorm(adata)


def empty_x(adata):
    adata.X = None


def rename_gene(adata):
    adata.var_names = ["gene1", *adata.var_names[1:]]


def unname_gene(adata):
    adata.var_names = ["", *adata.var_names[1:]]


def zero_all(adata):
    adata.X = sp.csr_matrix(adata.shape, dtype=np.float32)


def zero_gene(adata):
    matrix = adata.X.tolil()
    matrix[:, 4] = 0
    adata.X = matrix.tocsr()


def nan_label(adata):
    adata.obs.loc["cell3", "cell_type"] = np.nan


def nan_text_label(adata):
    adata.obs.loc["cell3", "batch"] = None


LOG = dict(value_space="log_normalized")
REFUSED_DATA = {
    "NaN in X": (set_value(np.nan), {}, r"adata\.X holds 1 NaN or infinite values"),
    "infinite in a layer": (
        set_value(np.inf, "counts"),
        dict(layer="counts"),
        r"layers\['counts'\] holds 1 NaN or inf",
    ),
    "NaN in log values": (
        set_value(np.nan, "lognorm"),
        LOG | dict(layer="lognorm"),
        r"layers\['lognorm'\] holds 1 NaN",
    ),
    "negative": (set_value(-1), {}, r"adata\.X holds negative values \(smallest -1\).*give unscaled values"),
    "negative log value": (set_value(-0.5, "lognorm"), LOG | dict(layer="lognorm"), r"'lognorm'\] holds negative"),
    "too large a count": (set_value(2.0**24 + 2), {}, r"a count of 1\.67772e\+07; the largest supported is 2\^24"),
    "no counts in X": (scale_x, {}, r"adata\.X was taken as counts .* These layers look like counts: \['counts'\]"),
    "no counts at all": (only_lognorm, {}, r"non-integers such as .* No layer looks like counts"),
    "counts in raw": (only_raw, {}, r"use adata\.raw\.to_adata\(\)"),
    "no counts in the layer": (lambda a: None, dict(layer="lognorm"), r"adata\.X looks like counts: use layer=None"),
    "counts as log values": (lambda a: None, LOG, r"adata\.X .* target_sum=1e4"),
    "log values with target_sum": (scale_x, LOG | dict(target_sum=1e4), r"adata\.X was taken as counts but holds"),
    "no such layer": (lambda a: None, dict(layer="cuonts"), r"layers\['cuonts'\] does not exist; .*'counts'"),
    "X is empty": (empty_x, {}, r"adata\.X is empty; name the layer"),
    "duplicate genes": (rename_gene, {}, r"repeats 1 gene names, such as \['gene1'\].*var_names_make_unique"),
    "missing gene name": (unname_gene, {}, r"1 missing \(empty or NaN\) gene names"),
    "duplicates in the list": (lambda a: None, dict(genes=["gene1", "gene1"]), r"genes repeats 1 gene names"),
    "genes not in the data": (lambda a: None, dict(genes=["gene1", "CD4"]), r"1 of 2 genes are not in .*\['CD4'\]"),
    "all-zero gene list": (zero_gene, dict(genes=["gene4"]), r"All 1 genes are zero in every training cell"),
    "empty gene list": (lambda a: None, dict(genes=[]), r"gene"),
    "all-zero matrix": (zero_all, {}, r"All genes are zero|adata\.X"),
    "n_top_genes": (lambda a: None, dict(n_top_genes=0), r"n_top_genes must be at least 1, got 0"),
    "flavor": (lambda a: None, dict(flavor="pearson"), r"flavor must be one of .* got 'pearson'"),
    "seurat_v3 of log values": (
        lambda a: None,
        LOG | dict(layer="lognorm", flavor="seurat_v3", n_top_genes=5),
        r'flavor="seurat_v3" chooses genes from counts; use "seurat"',
    ),
    "value_space": (lambda a: None, dict(value_space="cpm"), r"value_space must be one of .* got 'cpm'"),
    "target_sum of counts": (lambda a: None, dict(target_sum=1e4), r'target_sum .* needs value_space="log_normalized"'),
    "target_sum": (lambda a: None, LOG | dict(target_sum=-1.0), r"target_sum must be positive, got -1"),
    "NaN label": (nan_label, dict(labels_key="cell_type"), r"obs\['cell_type'\] holds 1 NaN; give every cell a label"),
    "None label": (nan_text_label, dict(labels_key="batch"), r"obs\['batch'\] holds 1 NaN"),
    "misspelt label column": (lambda a: None, dict(labels_key="celltype"), r"did you mean 'cell_type'"),
    "label is no category": (lambda a: None, dict(labels_key="age"), r"obs\['age'\] has 60 different values"),
    "gene id column": (lambda a: None, dict(gene_ids_key="symbol"), r"var has no column 'symbol'"),
}


@pytest.mark.parametrize(("change", "kwargs", "message"), REFUSED_DATA.values(), ids=REFUSED_DATA.keys())
def test_refuses_training_data(adata, change, kwargs, message):
    change(adata)
    with pytest.raises(ValueError, match=message):
        SCRDiTProcessor.from_anndata(adata, **kwargs)


def test_refuses_a_single_cell(adata):
    with pytest.raises(ValueError, match=r"adata\.X has 1 cells; at least 2"):
        SCRDiTProcessor.from_anndata(adata[:1].copy())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(var_names=["a", "a"]), "var_names repeats 1 gene names"),
        (dict(mean=[0.0]), r"mean has shape \(1,\), expected one entry for each of 2"),
        (dict(std=[1.0, 0.0]), "std positive"),
        (dict(mean=[np.nan, 0.0]), "must be finite"),
        (dict(gene_ids=["ENSG1"]), r"gene_ids has shape \(1,\)"),
        (dict(condition_keys=["cell_type"]), "condition_keys and condition_categories must have the same length"),
        (dict(value_space="cpm"), "value_space must be one of"),
        (dict(log_library_sizes=[[1.0, 2.0]]), "log_library_sizes must have one row for each of composition"),
    ],
)
def test_refuses_constructor_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SCRDiTProcessor(**dict(var_names=["a", "b"], mean=[0.0, 0.0], std=[1.0, 1.0]) | kwargs)


def test_refuses_data_without_the_models_genes(processor, adata):
    with pytest.raises(ValueError, match=r"1 of the model's 23 genes are missing from the data, such as \['gene0'\]"):
        processor.get_values(adata[:, 1:].copy())


@pytest.mark.parametrize("method", ["transform", "inverse_transform"])
def test_refuses_another_number_of_genes(processor, method):
    with pytest.raises(ValueError, match="has 5 genes, the processor has 23"):
        getattr(processor, method)(np.zeros((2, 5)))


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"cell_type": "Tt"}, r"Unknown cell_type 'Tt', did you mean 'T'\? Known: \['T', 'B', 'NK'\]"),
        ({"cell_type": ["T", "monocyte"]}, r"Unknown cell_type 'monocyte'\. Known"),
        ({"tissue": "blood"}, r"Unknown condition 'tissue'; the model's conditions are \['cell_type', 'batch'\]"),
        ({"cell_type": ["T"]}, r"conditions\['cell_type'\] lists 1 labels for 2 cells"),
        ({"cell_type": ["T", None]}, r"'cell_type' holds 1 NaN"),
    ],
)
def test_refuses_conditions(processor, conditions, message):
    with pytest.raises(ValueError, match=message):
        processor.sample_labels(2, conditions, np.zeros(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: obs.drop(columns="batch"), "obs lacks the column 'batch'"),
        (lambda obs: obs.assign(batch=None), "'batch' holds 60 NaN"),
        (lambda obs: obs.assign(batch="b3"), r"Unknown batch 'b3', did you mean 'b[12]'\? Known: \['b1', 'b2'\]"),
    ],
)
def test_refuses_labels_of_other_cells(processor, adata, change, message):
    with pytest.raises(ValueError, match=message):
        processor.encode_labels(change(adata.obs))
