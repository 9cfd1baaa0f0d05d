"""Value kinds: scanpy's normalization, and the counts behind it."""

import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from made_cells import make_adata

from scrdit_diffusers import SCRDiTProcessor
from scrdit_diffusers.cells.scaling import find_scaling
from scrdit_diffusers.values import normalize_log1p, recover_counts

SEEDS = range(5)


def test_normalize_log1p_is_scanpys(adata):
    adata.X = adata.X.astype(np.float64)
    ours = normalize_log1p(adata.X, 1e4)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    np.testing.assert_allclose(ours.toarray(), adata.X.toarray(), rtol=1e-12)


def test_normalize_log1p_keeps_empty_cells():
    counts = sp.csr_matrix(np.array([[0.0, 0.0], [1.0, 3.0]]))
    np.testing.assert_allclose(normalize_log1p(counts, 4).toarray(), [[0, 0], np.log1p([1, 3])])


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


def per_length(counts, seed=0, log_base=np.e):
    """Log-normalized counts per length of the gene, as TPM are, which are not scaled counts."""
    lengths = np.exp(np.random.default_rng(seed).normal(0, 0.7, counts.shape[1]))
    values = normalize_log1p(sp.csr_matrix(counts.multiply(1 / lengths)), 1e5) / np.log(log_base)
    return make_adata(values.astype(np.float32))


def estimated(counts, seed=0):
    """TPM of counts that are no integers, as programs that share reads among genes give them."""
    counts = counts.astype(np.float64)
    counts.data *= np.random.default_rng(seed).lognormal(0, 0.2, counts.nnz)
    return per_length(counts, seed)


def test_values_that_are_not_scaled_counts_are_told():
    assert not recover_counts(per_length(few_counts()).X)[2].any()


@pytest.mark.parametrize("log_base", [np.e, 2, 10])
@pytest.mark.parametrize("seed", SEEDS)
def test_scales_of_genes_are_found(seed, log_base):
    counts = few_counts(seed, num_cells=200, num_genes=300)
    base, scale = find_scaling(per_length(counts, seed, log_base).X)
    assert base == log_base
    lengths = np.exp(np.random.default_rng(seed).normal(0, 0.7, 300))
    right = np.isclose(scale * lengths, np.median(scale * lengths), rtol=1e-2)
    assert right[counts.getnnz(axis=0) > 1].mean() > 0.99
    recovered, _, exact = recover_counts(per_length(counts, seed, log_base).X, log_base, scale)
    assert exact.all() and (recovered.data == counts.data).mean() > 0.99


def test_logarithms_to_base_2_are_told_and_have_no_scales_of_genes():
    values = scanpy_normalized(few_counts()).X
    assert find_scaling(values) == (np.e, None) and find_scaling(values / np.log(2)) == (2, None)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_scales_are_found_where_there_are_none(seed):
    assert find_scaling(estimated(few_counts(seed, 200, 300), seed).X) is None


@pytest.mark.parametrize("genes", [["g7", "g0", "g1"], None], ids=["some genes", "all genes"])
def test_counts_behind_tpm_are_modeled_and_become_tpm_again(genes, tmp_path):
    counts = few_counts(1, num_cells=200, num_genes=300)
    adata = per_length(counts, log_base=2)
    SCRDiTProcessor.from_anndata(adata, flavor="all", genes=genes, **RECOVER).save_pretrained(tmp_path)
    processor = SCRDiTProcessor.from_pretrained(tmp_path)
    assert (processor.log_base, processor.normalized_by) == (2, "library_size" if genes else "model_genes")
    recovered, sizes = processor.get_counts(adata)
    expected = counts[:, [7, 0, 1]] if genes else counts
    assert (recovered.toarray() == expected.toarray()).mean() > 0.99
    np.testing.assert_allclose(
        processor.normalize(recovered, sizes).toarray(), adata[:, processor.var_names].X.toarray(), atol=0.02
    )
    with pytest.raises(ValueError, match=r"adata\.X .*log1p"):
        processor.get_counts(estimated(counts))


def test_a_gene_that_the_first_cells_lack_has_a_scale(monkeypatch):
    monkeypatch.setattr("scrdit_diffusers.cells.scaling.SAMPLE_CELLS", 150)
    counts = few_counts(1, num_cells=200, num_genes=300).tolil()
    counts[:150, 9] = 0
    counts[150:, 9] = 1
    adata = per_length(sp.csr_matrix(counts))
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", **RECOVER)
    recovered, _ = processor.get_counts(adata)
    assert np.array_equal(recovered[:, 9].toarray(), counts[:, 9].toarray())


LOGS = dict(value_space="log_normalized")
RECOVER = dict(LOGS, recover_counts=True)


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
    adata = estimated(few_counts())
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all", **RECOVER)
    assert processor.normalized_by is None and "log1p of scaled counts" in caplog.text
    counts, sizes = processor.get_counts(adata)
    np.testing.assert_array_equal(sizes, counts.sum(axis=1).A1)
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
    with pytest.raises(ValueError, match=r"adata\.X .*log1p"):
        processor.get_counts(per_length(few_counts()))
    with pytest.raises(ValueError, match="get_counts"):
        processor.transform(scanpy_normalized(few_counts()).X)
    with pytest.raises(ValueError, match="value_space.*log_normalized"):
        SCRDiTProcessor(value_space="log_normalized").select_counts(few_counts(), slice(None))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(normalized_by="library_size", normalized_to=1e4), "normalized_by .*'library_size' .*'counts'"),
        (dict(value_space="log_normalized", normalized_by="cells", normalized_to=1e4), "normalized_by .*'cells'"),
        (
            dict(value_space="log_normalized", normalized_by="model_genes"),
            "normalized_by='model_genes' .*normalized_to=None",
        ),
        (dict(value_space="log_normalized", normalized_to=1e4), "normalized_by=None .*normalized_to=10000"),
        (
            dict(value_space="log_normalized", normalized_by="library_size", normalized_to=0.0),
            "normalized_by='library_size' .*normalized_to=0",
        ),
        (dict(value_step=0.1), "value_step=0.1"),
        (dict(value_space="log_normalized", value_step=-1.0), "value_step=-1.0"),
        (dict(value_space="log_normalized", value_step=1.0, value_min=[0.1]), r"value_min .*\(1,\)"),
        (dict(value_space="log_normalized", log_base=2), "^log_base"),
        (dict(normalized_by="library_size", normalized_to=1.0, log_base=1) | LOGS, "^log_base .*1"),
        (dict(normalized_by="library_size", normalized_to=1.0, gene_scale=[1.0]) | LOGS, r"gene_scale .*\(1,\)"),
        (dict(normalized_by="library_size", normalized_to=1.0, gene_scale=[0.0]) | LOGS, "gene_scale must be positive"),
        (RECOVER | dict(zero_negation=True), "^zero_negation "),
    ],
)
def test_normalizations_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        if "recover_counts" in kwargs:
            SCRDiTProcessor.from_anndata(scanpy_normalized(few_counts()), **kwargs)
        else:
            SCRDiTProcessor(**kwargs)
