"""The denoising script: what it writes, and what it refuses before any work."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from scripts import start_in_block

from scrdit_diffusers import SCRDiTDenoisePipeline

CELLS = ["--dataset", "cells.h5ad"]


@pytest.mark.parametrize("output", ["out.h5ad", "out.zarr"])
def test_it_writes_what_the_pipeline_returns(run_job, count_pipe, adata, output):
    run_job("denoise", *CELLS, "--layer", "counts", "--seed", 3, "--num_draws", 2, "--output", output)
    found = ad.read_h5ad(output) if output.endswith(".h5ad") else ad.read_zarr(output)
    denoise = SCRDiTDenoisePipeline.from_pipe(count_pipe)
    expected = denoise(adata, num_draws=2, generator=torch.Generator().manual_seed(3))
    assert np.array_equal(found.layers["denoised"], expected.layers["denoised"])
    assert list(found.obs["cell_type"]) == list(adata.obs["cell_type"])
    assert list(found.obs_names) == list(adata.obs_names)
    assert found.uns["scrdit_denoise"]["seed"] == 3 and found.uns["scrdit_denoise"]["dataset"] == "cells.h5ad"
    assert {path.name for path in Path.cwd().iterdir()} == {"pipeline", "cells.h5ad", output}


def test_labels_need_not_be_there(run_job, adata):
    del adata.obs["batch"]
    adata.write_h5ad("cells.h5ad")
    with pytest.raises(ValueError, match=r"--dataset cells.h5ad: .*\['batch'\].*use_labels"):
        run_job("denoise", *CELLS)
    run_job("denoise", *CELLS, "--use_labels", "False", "--output", "out.h5ad")
    assert ad.read_h5ad("out.h5ad").layers["denoised"].shape == adata.shape


BAD_ARGUMENTS = {
    "no dataset": ([], "--dataset"),
    "no such file": (["--dataset", "nowhere.h5ad"], "nowhere.h5ad"),
    "other format": ([*CELLS, "--output", "out.csv"], r"--output .*\.zarr, got out\.csv"),
    "logs": ([*CELLS, "--layer", "lognorm"], "--dataset cells.h5ad: .*lognorm.*non-integers.*X looks like counts"),
    "no layer": ([*CELLS, "--layer", "nowhere"], "--dataset cells.h5ad: .*nowhere.*counts"),
    "too little noise": ([*CELLS, "--timestep", -1], "--timestep .* -1"),
    "no draws": ([*CELLS, "--num_draws", 0], "--num_draws .* 0"),
    "no batches": ([*CELLS, "--batch_size", 0], "--batch_size .* 0"),
    "no device": ([*CELLS, "--device", "gpu"], "--device gpu"),
    "negative seed": ([*CELLS, "--seed", -1], "--seed .* -1"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(run_job, name):
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_job("denoise", *arguments)
    assert {path.name for path in Path.cwd().iterdir()} == {"pipeline", "cells.h5ad"}


def test_missing_genes_are_counted_and_named(run_job, adata):
    adata[:, 3:].write_h5ad("cells.h5ad")
    with pytest.raises(ValueError, match="--dataset cells.h5ad: 3 of .* 23 genes .*'gene0', 'gene1', 'gene2'"):
        run_job("denoise", *CELLS)


def test_a_file_is_not_replaced_unasked(run_job):
    Path("out.h5ad").write_text("precious")
    with pytest.raises(ValueError, match="out.h5ad exists; .*--overwrite"):
        run_job("denoise", *CELLS, "--output", "out.h5ad")
    run_job("denoise", *CELLS, "--output", "out.h5ad", "--overwrite")
    assert "denoised" in ad.read_h5ad("out.h5ad").layers


def test_an_output_that_another_run_writes_is_refused(run_job):
    other = start_in_block("lock_folder", "out.h5ad.parts", "")
    with pytest.raises(ValueError, match="out.h5ad.parts is in use by another run"):
        run_job("denoise", *CELLS, "--output", "out.h5ad")
    other.communicate()


def test_several_processes_are_refused(run_job, monkeypatch):
    """Each would do the whole job."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes"):
        run_job("denoise", *CELLS)
