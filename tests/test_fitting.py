"""Fitting a processor to chunks of cells: the whole and scanpy as oracles."""

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from cell_files import write
from made_cells import NUM_CELLS, NUM_GENES, chunked, names

from scrdit_diffusers import CellDataset, SCRDiTProcessor, SCRDiTTransformer, count_bins, fit_dataset
from scrdit_diffusers.cells import fitting
from scrdit_diffusers.cells.fitting import FitOptions, fit_chunks
from scrdit_diffusers.cells.moments import CellMoments
from scrdit_diffusers.initialization import initialize_count_head
from scrdit_diffusers.values import normalize_log1p


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(flavor="all"),
        dict(genes=["g9", "g70", "g3"], zero_negation=True),
        dict(flavor="cv", n_top_genes=30, value_space="log_normalized", target_sum=1e4),
        dict(n_top_genes=30, value_space="log_normalized", recover_counts=True),
        dict(n_top_genes=30, value_space="log_normalized", recover_counts=True, per_length=True),
        dict(n_top_genes=30, value_space="log_normalized", recover_counts=True, noise=True),
    ],
    ids=["counts", "some genes", "log-normalized", "counts behind them", "counts behind TPM", "no counts behind them"],
)
def test_chunks_give_the_processor_of_the_whole(counts, obs, kwargs):
    labels = ["cell_type", "batch"]
    kwargs = dict(kwargs)
    lengths = np.linspace(0.5, 3, counts.shape[1]) if kwargs.pop("per_length", False) else 1.0
    noise = kwargs.pop("noise", False)
    if "recover_counts" in kwargs:
        counts = normalize_log1p(sp.csr_matrix(counts.multiply(1 / lengths)), 1e4)
        counts.data *= np.random.default_rng(0).uniform(0.3, 1, counts.nnz) if noise else 1
    adata = ad.AnnData(counts, obs=obs.set_axis(obs.index.astype(str)), var=pd.DataFrame(index=names()))
    whole = SCRDiTProcessor.from_anndata(adata, labels, **kwargs)
    processor, _ = fit_chunks(chunked(counts, obs, 17), adata.var, labels, options=FitOptions(**kwargs))
    assert processor.var_names == whole.var_names
    assert processor.condition_categories == whole.condition_categories == [["T", "NK", "B"], ["8", "9", "10"]]
    assert processor.composition == whole.composition
    assert processor.log_library_sizes == whole.log_library_sizes
    assert (processor.normalized_by, processor.normalized_to) == (whole.normalized_by, whole.normalized_to)
    assert (processor.value_step is None) == (whole.value_step is None)
    assert np.array_equal(processor.value_min, whole.value_min)
    assert np.array_equal(processor.gene_scale, whole.gene_scale)
    assert (len(whole.gene_scale), len(whole.value_min)) == (30 * (np.ndim(lengths) > 0), 30 * noise)
    np.testing.assert_allclose(processor.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(processor.std, whole.std, rtol=1e-12)


@pytest.mark.parametrize("flavor", ["seurat", "seurat_v3", "cv"])
def test_parts_give_what_the_whole_gives(counts, obs, flavor):
    """Also a part without cells, and one without any of the labels."""
    starts = [0, 80, 80, 81, 200]
    parts = [chunked(counts[a:b], obs.iloc[a:b], 17) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    arguments = pd.DataFrame(index=names()), ["cell_type", "batch"]
    options = {"flavor": flavor, "n_top_genes": 40}
    whole, cell_moments = fit_chunks(chunked(counts, obs, 17), *arguments, options=FitOptions(**options))
    joined, part_moments = fit_chunks(parts, *arguments, options=FitOptions(**options))
    assert joined.var_names == whole.var_names
    assert joined.condition_categories == whole.condition_categories
    assert joined.composition == whole.composition
    assert joined.log_library_sizes == whole.log_library_sizes
    np.testing.assert_allclose(joined.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(joined.std, whole.std, rtol=1e-12)
    for name in ("num_cells", "count_max", "square_sum", "count_sum", "weighted_sum"):
        np.testing.assert_array_equal(getattr(part_moments, name), getattr(cell_moments, name))  # sums of integers


def test_count_head_starts_from_cell_moments_as_from_counts(counts, obs):
    processor, cell_moments = fit_chunks(
        chunked(counts, obs, 17), pd.DataFrame(index=names()), "cell_type", options=FitOptions(flavor="all")
    )
    counts = counts[:, [int(name[1:]) for name in processor.var_names]]
    assert count_bins(cell_moments) == count_bins(counts)
    kwargs = dict(patch_size=30, num_layers=1, num_attention_heads=1, attention_head_dim=8)
    heads = []
    for _ in range(2):
        model = SCRDiTTransformer(counts.shape[1], num_classes=[3], count_bins=count_bins(cell_moments), **kwargs)
        heads.append(model.count_head)
    initialize_count_head(
        heads[0], CellMoments.from_counts(counts, processor.encode_labels(obs)), processor.mean, processor.std
    )
    initialize_count_head(heads[1], cell_moments, processor.mean, processor.std)
    for name, expected in heads[0].state_dict().items():
        torch.testing.assert_close(heads[1].state_dict()[name], expected)


def test_labels_missing_in_a_later_chunk_are_refused(counts, obs):
    obs = obs.assign(cell_type=obs["cell_type"].where(np.arange(NUM_CELLS) < 200))
    with pytest.raises(ValueError, match=r"obs\['cell_type'\] .* 11 NaN"):
        fit_chunks(chunked(counts, obs, 100), pd.DataFrame(index=names()), "cell_type")


def test_values_that_are_not_counts_in_a_later_chunk_are_refused(counts, obs):
    counts = counts.copy()
    counts.data[-1] = 0.5
    with pytest.raises(ValueError, match=r"^some file .* 0\.5"):
        fit_chunks(chunked(counts, obs, 100), pd.DataFrame(index=names()), name="some file")


def test_log_normalized_values_may_begin_with_integers(counts, obs):
    """Only if all are integers they are counts by mistake."""
    values = sp.vstack([sp.csr_matrix(np.ones((100, NUM_GENES))), normalize_log1p(counts, 1e4)[100:]], format="csr")
    processor, _ = fit_chunks(
        chunked(values, obs, 100), pd.DataFrame(index=names()), options=FitOptions("log_normalized", flavor="all")
    )
    assert processor.num_genes == NUM_GENES
    with pytest.raises(ValueError, match="^the data .*target_sum=1e4"):
        fit_chunks(chunked(counts, obs, 100), pd.DataFrame(index=names()), options=FitOptions("log_normalized"))


def test_what_was_learned_is_kept(adata, tmp_path, monkeypatch):
    dataset = CellDataset.open(write(adata, tmp_path / "cells.h5ad"), cache_dir=tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    first, statistics = fit_dataset(dataset.rows.select(range(40)), dataset.var, "cell_type", flavor="all")
    with monkeypatch.context() as context:
        context.setattr(fitting, "fit_chunks", None)  # would raise if called
        again, kept = fit_dataset(dataset.rows.select(range(40)), dataset.var, "cell_type", flavor="all")
    assert again.to_json_string() == first.to_json_string()
    assert np.array_equal(kept.count_sum, statistics.count_sum)
    other, _ = fit_dataset(dataset.rows.select(range(41)), dataset.var, "cell_type", flavor="all")
    assert other.to_json_string() != first.to_json_string()


@pytest.mark.parametrize("flavor", ["seurat", "seurat_v3"])
def test_what_was_learned_does_not_depend_on_the_number_of_processes(adata, tmp_path, monkeypatch, flavor):
    """Real processes, which are sent parts of a selection of rows of the dataset on disk."""
    monkeypatch.setattr(fitting, "ROWS_PER_PART", 16)
    dataset = CellDataset.open(write(adata, tmp_path / "cells.h5ad"), cache_dir=tmp_path / "cache")
    dataset = dataset.select(list(range(0, 60, 2)) + list(range(1, 60, 4)))
    options = {"labels_key": ["cell_type", "batch"], "flavor": flavor, "n_top_genes": 10}
    learned = []
    for num_proc in (1, 2):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / str(num_proc))
        learned.append(fit_dataset(dataset.rows, dataset.var, num_proc=num_proc, **options))
    (alone, statistics), (shared, of_two) = learned
    assert alone.to_json_string() == shared.to_json_string()
    for name, array in vars(statistics).items():
        np.testing.assert_array_equal(getattr(of_two, name), array)


def test_a_refusal_in_another_process_is_told_as_in_this_one(adata, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "ROWS_PER_PART", 16)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    adata.X.data[-1] = 0.5
    dataset = CellDataset.open(write(adata, tmp_path / "cells.h5ad"), cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"^some file .* 0\.5"):
        fit_dataset(dataset.rows, dataset.var, num_proc=2, name="some file")
