"""The completion script: what it writes, and what it refuses before any work."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from scrdit_diffusers import SCRDiTCompletePipeline

PANEL = slice(3, 15)
CELLS = ["--dataset", "panel.h5ad"]
FEW_STEPS = ["--num_inference_steps", 2, "--num_draws", 2]


@pytest.fixture
def panel(run_job, adata):
    """Some genes of twelve cells, as a file."""
    cells = adata[:12, PANEL].copy()
    cells.write_h5ad("panel.h5ad")
    return cells


@pytest.mark.parametrize("output", ["out.h5ad", "out.zarr"])
def test_it_writes_what_the_pipeline_returns(run_job, panel, count_pipe, output):
    arguments = [*FEW_STEPS, "--layer", "counts", "--interval", 0.8, "--library_size", 60, "--seed", 3]
    run_job("complete", *CELLS, *arguments, "--output", output)
    found = ad.read_h5ad(output) if output.endswith(".h5ad") else ad.read_zarr(output)
    complete = SCRDiTCompletePipeline.from_pipe(count_pipe)
    options = {"num_inference_steps": 2, "num_draws": 2, "interval": 0.8, "library_size": 60}
    expected = complete(panel, generator=torch.Generator().manual_seed(3), **options)
    assert np.array_equal(found.X.toarray(), expected.X.toarray())
    for name in ("mean", "lower", "upper"):
        assert np.array_equal(found.layers[name], expected.layers[name])
    assert list(found.var_names[found.var["measured"]]) == list(panel.var_names)
    assert list(found.obs_names) == list(panel.obs_names)
    assert found.uns["scrdit_complete"]["seed"] == 3 and found.uns["scrdit_complete"]["dataset"] == "panel.h5ad"
    assert {path.name for path in Path.cwd().iterdir()} == {"pipeline", "cells.h5ad", "panel.h5ad", output}


def test_labels_need_not_be_there(run_job, panel):
    del panel.obs["batch"]
    panel.write_h5ad("panel.h5ad")
    with pytest.raises(ValueError, match=r"\['batch'\].*use_labels"):
        run_job("complete", *CELLS)
    run_job("complete", *CELLS, *FEW_STEPS, "--use_labels", "False", "--output", "out.h5ad")
    assert ad.read_h5ad("out.h5ad").shape == (12, 23)


BAD_ARGUMENTS = {
    "no dataset": ([], "--dataset"),
    "no such file": (["--dataset", "nowhere.h5ad"], "nowhere.h5ad"),
    "other format": ([*CELLS, "--output", "out.csv"], r"--output .*\.zarr, got out\.csv"),
    "logs": ([*CELLS, "--layer", "lognorm"], "--dataset panel.h5ad: .*lognorm.*non-integers.*X looks like counts"),
    "no layer": ([*CELLS, "--layer", "nowhere"], "--dataset panel.h5ad: .*nowhere.*counts"),
    "no draws": ([*CELLS, "--num_draws", 0], "--num_draws .* 0"),
    "no steps": ([*CELLS, "--num_inference_steps", 0], "--num_inference_steps .* 0"),
    "all": ([*CELLS, "--interval", 90], "interval .* 90"),
    "nothing": ([*CELLS, "--interval", 0], "--interval .* 0"),
    "less than a count": ([*CELLS, "--library_size", 0.5], r"library_size .* 0\.5"),
    "no batches": ([*CELLS, "--batch_size", 0], "--batch_size .* 0"),
    "no device": ([*CELLS, "--device", "gpu"], "--device gpu"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(run_job, panel, name):
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_job("complete", *arguments)
    assert {path.name for path in Path.cwd().iterdir()} == {"pipeline", "cells.h5ad", "panel.h5ad"}


def test_cells_that_cannot_be_completed_are_refused_by_file(run_job, panel):
    panel.obs["batch"] = "b7"
    panel.write_h5ad("panel.h5ad")
    with pytest.raises(ValueError, match="--dataset panel.h5ad: .*'b7'"):
        run_job("complete", *CELLS)
    panel.var_names = [f"ENSG{i}" for i in range(panel.n_vars)]
    panel.write_h5ad("panel.h5ad")
    with pytest.raises(ValueError, match="--dataset panel.h5ad: .*23 genes.*gene0.*ENSG0"):
        run_job("complete", *CELLS)


def test_a_file_is_not_replaced_unasked(run_job, panel):
    Path("out.h5ad").write_text("precious")
    with pytest.raises(ValueError, match="out.h5ad exists; .*--overwrite"):
        run_job("complete", *CELLS, "--output", "out.h5ad")
    run_job("complete", *CELLS, *FEW_STEPS, "--output", "out.h5ad", "--overwrite")
    assert "mean" in ad.read_h5ad("out.h5ad").layers
