"""What is learned from a dataset of cells."""

import datasets
import numpy as np
import pytest
from cell_files import write

from scrdit_diffusers import CellDataset, SCRDiTProcessor, fit_table
from scrdit_diffusers.cells import fitting


def test_what_was_learned_is_kept(adata, tmp_path, monkeypatch):
    dataset = CellDataset.open(write(adata, tmp_path / "cells.h5ad"), cache_dir=tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    first, statistics = fit_table(dataset.rows.select(range(40)), dataset.var, "cell_type", flavor="all")
    with monkeypatch.context() as context:
        context.setattr(SCRDiTProcessor, "from_chunks", None)  # would raise if called
        again, kept = fit_table(dataset.rows.select(range(40)), dataset.var, "cell_type", flavor="all")
    assert again.to_json_string() == first.to_json_string()
    assert np.array_equal(kept.count_sum, statistics.count_sum)
    other, _ = fit_table(dataset.rows.select(range(41)), dataset.var, "cell_type", flavor="all")
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
        learned.append(fit_table(dataset.rows, dataset.var, num_proc=num_proc, **options))
    (alone, statistics), (shared, of_two) = learned
    assert alone.to_json_string() == shared.to_json_string()
    for name, array in vars(statistics).items():
        np.testing.assert_array_equal(getattr(of_two, name), array)


def test_a_refusal_in_another_process_is_told_as_in_this_one(adata, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "ROWS_PER_PART", 16)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    adata.X.data[-1] = 0.5
    dataset = CellDataset.open(write(adata, tmp_path / "cells.h5ad"), cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="^some file was taken as counts but holds non-integers such as 0.5"):
        fit_table(dataset.rows, dataset.var, num_proc=2, name="some file")
