"""The script of paths: between named cells, to other labels, and what it refuses before any work."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from scrdit_diffusers import SCRDiTInterpolatePipeline

CELLS = ["--dataset", "cells.h5ad"]
ENDS = ["--start_cells", "cell3", "cell1", "--end_cells", "cell7", "cell9"]


@pytest.fixture
def interpolate(count_pipe):
    return SCRDiTInterpolatePipeline.from_pipe(count_pipe)


@pytest.mark.parametrize("output", ["out.h5ad", "out.zarr"])
def test_paths_lead_from_cell_to_cell(run_job, interpolate, adata, output):
    arguments = [*ENDS, "--positions", 0, 0.3, 1, "--num_draws", 1, "--layer", "counts", "--seed", 3]
    run_job("interpolate", *CELLS, *arguments, "--output", output)
    found = ad.read_h5ad(output) if output.endswith(".h5ad") else ad.read_zarr(output)
    start, end = (adata[names].copy() for names in (["cell3", "cell1"], ["cell7", "cell9"]))
    options = {"positions": [0, 0.3, 1], "num_draws": 1, "generator": torch.Generator().manual_seed(3)}
    expected = interpolate(start, end, **options)
    assert np.array_equal(found.X.toarray(), expected.X.toarray())
    assert list(found.obs["start"]) == ["cell3", "cell1"] * 3 and list(found.obs["end"]) == ["cell7", "cell9"] * 3
    assert list(found.obs["position"]) == [0, 0, 0.3, 0.3, 1, 1]
    assert list(found.uns["scrdit_interpolate"]["end_cells"]) == ["cell7", "cell9"]
    assert {path.name for path in Path.cwd().iterdir()} == {"pipeline", "cells.h5ad", output}


def test_paths_lead_from_label_to_label(run_job, interpolate, adata):
    arguments = ["--start_condition", "cell_type=NK", "batch=b1", "--end_condition", "cell_type=B"]
    run_job("interpolate", *CELLS, *arguments, "--num_positions", 3, "--output", "out.h5ad")
    found = ad.read_h5ad("out.h5ad")
    start = adata[(adata.obs["cell_type"] == "NK") & (adata.obs["batch"] == "b1")].copy()
    options = {"positions": [0, 0.5, 1], "generator": torch.Generator().manual_seed(0)}
    assert np.array_equal(found.X.toarray(), interpolate(start, {"cell_type": "B"}, **options).X.toarray())
    assert list(found.obs["start"]) == list(start.obs_names) * 3 and found.n_obs > 3


def test_paths_start_at_all_cells_unless_told(run_job):
    run_job("interpolate", *CELLS, "--end_condition", "batch=b2", "--positions", 1, "--output", "out.h5ad")
    assert ad.read_h5ad("out.h5ad").n_obs == 60


BAD_ARGUMENTS = {
    "no dataset": (ENDS, "--dataset"),
    "no such file": (["--dataset", "nowhere.h5ad", *ENDS], "nowhere.h5ad"),
    "no end": ([*CELLS, "--start_cells", "cell1"], "--end_cells.*--end_condition"),
    "two ends": ([*CELLS, *ENDS, "--end_condition", "batch=b2"], "--end_cells.*--end_condition"),
    "two starts": ([*CELLS, *ENDS, "--start_condition", "batch=b2"], "--start_cells.*--start_condition"),
    "unknown start": ([*CELLS, "--start_cells", "cellX", "--end_cells", "cell1"], "--start_cells.*cellX.*cell0"),
    "unknown end": ([*CELLS, "--start_cells", "cell1", "--end_cells", "cellX"], "--end_cells.*cellX.*cell0"),
    "fewer ends": ([*CELLS, "--start_cells", "cell1", "cell2", "--end_cells", "cell3"], "--end_cells .*1 .*2 "),
    "no such label": ([*CELLS, "--start_condition", "batch=b7", "--end_condition", "batch=b2"], "batch=b7.*'b1', 'b2'"),
    "no such column": ([*CELLS, "--start_condition", "btch=b1", "--end_condition", "batch=b2"], "btch=b1: .*'batch'"),
    "no condition": ([*CELLS, "--start_condition", "batch", *ENDS[3:]], r"--start_condition .*\['batch'\]"),
    "unknown label": ([*CELLS, "--end_condition", "batch=b7"], "--end_condition batch=b7: .*'b7'.*'b2'"),
    "unknown condition": ([*CELLS, "--end_condition", "age=3"], r"--end_condition age=3: .*\['cell_type', 'batch'\]"),
    "beyond the end": ([*CELLS, *ENDS, "--positions", 0, 1.5], r"--positions .*\[1\.5\]"),
    "no number": ([*CELLS, *ENDS, "--positions", "nan"], r"--positions .*nan"),
    "one place": ([*CELLS, *ENDS, "--num_positions", 1], "--num_positions .* 1"),
    "places twice": ([*CELLS, *ENDS, "--positions", 0.5, "--num_positions", 3], r"--positions.*--num_positions.*0\.5"),
    "logs": ([*CELLS, *ENDS, "--layer", "lognorm"], "--dataset cells.h5ad: .*lognorm.*non-integers"),
    "no draws": ([*CELLS, *ENDS, "--num_draws", 0], "--num_draws .* 0"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(run_job, name):
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_job("interpolate", *arguments)
    assert {path.name for path in Path.cwd().iterdir()} == {"pipeline", "cells.h5ad"}


@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
def test_names_of_several_cells_are_refused(run_job, adata):
    adata.obs_names = ["cell3", *adata.obs_names[1:]]
    adata.write_h5ad("cells.h5ad")
    with pytest.raises(ValueError, match=r"--start_cells: .*\['cell3'\]"):
        run_job("interpolate", *CELLS, *ENDS)


def test_missing_genes_are_counted_and_named(run_job, adata):
    adata[:, 3:].write_h5ad("cells.h5ad")
    with pytest.raises(ValueError, match="--dataset cells.h5ad: 3 of .* 23 genes .*'gene0', 'gene1', 'gene2'"):
        run_job("interpolate", *CELLS, *ENDS)


def test_a_file_is_not_replaced_unasked(run_job):
    Path("out.h5ad").write_text("precious")
    with pytest.raises(ValueError, match="out.h5ad exists; .*--overwrite"):
        run_job("interpolate", *CELLS, *ENDS, "--output", "out.h5ad")
    run_job("interpolate", *CELLS, *ENDS, "--output", "out.h5ad", "--overwrite")
    assert ad.read_h5ad("out.h5ad").n_obs == 10
