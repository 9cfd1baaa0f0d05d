"""The translation script: what it writes, and what it refuses before any work."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from scrdit_diffusers import SCRDiTTranslatePipeline

CELLS = ["--dataset", "cells.h5ad"]
TARGET = ["--condition", "batch=b2"]


@pytest.mark.parametrize("output", ["out.h5ad", "out.zarr"])
def test_it_writes_what_the_pipeline_returns(run_job, count_pipe, adata, output):
    arguments = ["--condition", "batch=b2", "cell_type=NK", "--timesteps", 999, 500, "--num_draws", 1, "--seed", 3]
    run_job("translate", *CELLS, *arguments, "--layer", "counts", "--output", output)
    found = ad.read_h5ad(output) if output.endswith(".h5ad") else ad.read_zarr(output)
    translate = SCRDiTTranslatePipeline.from_pipe(count_pipe)
    options = {"timesteps": [999, 500], "num_draws": 1, "generator": torch.Generator().manual_seed(3)}
    expected = translate(adata, {"batch": "b2", "cell_type": "NK"}, **options)
    assert np.array_equal(found.X.toarray(), expected.X.toarray()) and (found.X != adata.X).nnz > 0
    assert set(found.obs["batch"]) == {"b2"} and set(found.obs["cell_type"]) == {"NK"}
    assert list(found.obs_names) == list(adata.obs_names)
    assert list(found.uns["scrdit_translate"]["condition"]) == ["batch=b2", "cell_type=NK"]
    assert {path.name for path in Path.cwd().iterdir()} == {"pipeline", "cells.h5ad", output}


BAD_ARGUMENTS = {
    "no dataset": (TARGET, "--dataset"),
    "no such file": (["--dataset", "nowhere.h5ad", *TARGET], "nowhere.h5ad"),
    "no target": (CELLS, "--condition"),
    "no label": ([*CELLS, "--condition", "batch"], r"--condition .*\['batch'\]"),
    "twice": ([*CELLS, "--condition", "batch=b1", "batch=b2"], "--condition .*twice"),
    "unknown label": ([*CELLS, "--condition", "batch=b7"], "--condition batch=b7: .*'b7'.*'b2'"),
    "unknown condition": (
        [*CELLS, "--condition", "age=b2"],
        r"age=b2: \['age'\].*\['cell_type', 'batch'\]",
    ),
    "logs": ([*CELLS, *TARGET, "--layer", "lognorm"], "--dataset cells.h5ad: .*lognorm.*non-integers"),
    "too much noise": ([*CELLS, *TARGET, "--timesteps", 999, 1000], r"timesteps .* 999.*1000\]"),
    "no draws": ([*CELLS, *TARGET, "--num_draws", 0], "--num_draws .* 0"),
    "no batches": ([*CELLS, *TARGET, "--batch_size", 0], "--batch_size .* 0"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(run_job, name):
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_job("translate", *arguments)
    assert {path.name for path in Path.cwd().iterdir()} == {"pipeline", "cells.h5ad"}


def test_cells_that_cannot_be_translated_are_refused(run_job, adata):
    adata[:, 3:].write_h5ad("cells.h5ad")
    with pytest.raises(ValueError, match="--dataset cells.h5ad: 3 of .* 23 genes .*'gene0', 'gene1', 'gene2'"):
        run_job("translate", *CELLS, *TARGET)
    adata.obs["cell_type"] = "Mast"
    adata.write_h5ad("cells.h5ad")
    with pytest.raises(ValueError, match="--dataset cells.h5ad: .*'Mast'"):
        run_job("translate", *CELLS, *TARGET)
    del adata.obs["cell_type"]
    adata.write_h5ad("cells.h5ad")
    with pytest.raises(ValueError, match=r"\['cell_type'\]"):
        run_job("translate", *CELLS, *TARGET)


def test_a_file_is_not_replaced_unasked(run_job):
    Path("out.h5ad").write_text("precious")
    with pytest.raises(ValueError, match="out.h5ad exists; .*--overwrite"):
        run_job("translate", *CELLS, *TARGET, "--output", "out.h5ad")
    run_job("translate", *CELLS, *TARGET, "--output", "out.h5ad", "--overwrite")
    assert ad.read_h5ad("out.h5ad").n_obs == 60
