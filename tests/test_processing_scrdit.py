"""The processor: exact inverses, NumPy and scanpy as oracles, and every refusal."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from made_cells import make_adata

from scrdit_diffusers import SCRDiTProcessor
from scrdit_diffusers.checks import MAX_COUNT
from scrdit_diffusers.values import normalize_log1p

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
    with pytest.raises(ValueError, match=r"processor .*library_size\."):
        processor.sample_library_sizes(np.empty((1, 0), dtype=int), np.zeros(1))


# -- refusals ----------------------------------------------------------------------------------------------------------


LABELS = dict(condition_keys=["cell_type"], condition_categories=[["T", "B"]])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(var_names=["a", "a"]), r"^var_names .*\['a'\]"),
        (dict(mean=[0.0]), r"^mean .*\(1,\).* 2 var_names"),
        (dict(std=[1.0, 0.0]), "^mean and std "),
        (dict(mean=[np.nan, 0.0]), "^mean and std "),
        (dict(gene_ids=["ENSG1"]), r"^gene_ids .*\(1,\).* 2 var_names"),
        (dict(condition_keys=["cell_type"]), "^condition_keys and condition_categories "),
        (dict(value_space="cpm"), "value_space .*'cpm'"),
        (dict(log_library_sizes=[[1.0, 2.0]]), "^log_library_sizes .*composition"),
        (LABELS | dict(composition=[[2, 5]]), "code 2"),
        (LABELS | dict(composition=[[-1, 5]]), "code -1"),
        (LABELS | dict(composition=[[0, 0]]), "composition"),
        (LABELS | dict(composition=[[5]]), "composition"),
        (LABELS | dict(condition_categories=[["T", "T"]]), "'cell_type'"),
        (dict(composition=[[5], [5]], log_library_sizes=[[1.0], [1.0, 2.0]]), "log_library_sizes"),
        (dict(composition=[[5]], log_library_sizes=[[1e9]]), "log_library_sizes"),
        (dict(composition=[[5]], log_library_sizes=[[np.inf]]), "log_library_sizes"),
        (dict(zero_value=np.nan), "zero_value"),
    ],
)
def test_refuses_constructor_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SCRDiTProcessor(**dict(var_names=["a", "b"], mean=[0.0, 0.0], std=[1.0, 1.0]) | kwargs)


@pytest.mark.parametrize("settings", [dict(mean=["a"]), dict(var_names=3), dict(std=[0.0]), dict(composition=[["x"]])])
def test_a_damaged_file_is_named(processor, tmp_path, settings):
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(OSError, match=str(file)):
        SCRDiTProcessor.from_pretrained(tmp_path)


def test_refuses_data_without_the_models_genes(processor, adata):
    with pytest.raises(ValueError, match=r"^1 .* 23 genes .*\['gene0'\]"):
        processor.get_values(adata[:, 1:].copy())


@pytest.mark.parametrize("method", ["transform", "inverse_transform"])
def test_refuses_another_number_of_genes(processor, method):
    with pytest.raises(ValueError, match=" 5 .*processor .* 23"):
        getattr(processor, method)(np.zeros((2, 5)))


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"cell_type": "Tt"}, r"cell_type 'Tt'.*'T'.*\['T', 'B', 'NK'\]"),
        ({"cell_type": ["T", "monocyte"]}, r"cell_type 'monocyte'.*\['T', 'B', 'NK'\]"),
        ({"tissue": "blood"}, r"conditions: 'tissue'.*\['cell_type', 'batch'\]"),
        ({"cell_type": ["T"]}, r"conditions\['cell_type'\] .* 1 .* 2 "),
        ({"cell_type": ["T", None]}, r"'cell_type'.* 1 NaN"),
    ],
)
def test_refuses_conditions(processor, conditions, message):
    with pytest.raises(ValueError, match=message):
        processor.sample_labels(2, conditions, np.zeros(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: obs.drop(columns="batch"), "^obs .*'batch'"),
        (lambda obs: obs.assign(batch=None), "'batch'.* 60 NaN"),
        (lambda obs: obs.assign(batch="b3"), r"batch 'b3'.*'b[12]'.*\['b1', 'b2'\]"),
    ],
)
def test_refuses_labels_of_other_cells(processor, adata, change, message):
    with pytest.raises(ValueError, match=message):
        processor.encode_labels(change(adata.obs))
