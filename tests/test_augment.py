"""The augmentation script: what it writes, how many cells are asked for, and what it refuses before any work."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scripts import load_script

CELLS = ["--dataset", "cells.h5ad", "--labels_key", "cell_type"]
FEW_STEPS = ["--num_inference_steps", 2]


@pytest.mark.parametrize("output", ["out.h5ad", "out.zarr"])
def test_real_and_new_cells_are_written(run_job, adata, output):
    adata.obs["checked"], adata.obs["batch"] = True, adata.obs["batch"].astype("category")
    adata.write_h5ad("cells.h5ad")
    run_job("augment", *CELLS, *FEW_STEPS, "--layer", "counts", "--to", 25, "--seed", 3, "--output", output)
    both = ad.read_h5ad(output) if output.endswith(".h5ad") else ad.read_zarr(output)
    numbers = adata.obs["cell_type"].value_counts().clip(lower=25)
    assert both.obs["cell_type"].value_counts().to_dict() == numbers.to_dict()
    real = both[~both.obs["synthetic"].to_numpy()]
    assert np.array_equal(real.X.toarray(), adata.X.toarray()) and real.obs["checked"].all()
    assert both.uns["scrdit"]["seed"] == 3 and list(both.uns["scrdit_augment"]["to"]) == ["25"]


def test_labels_grow_to_numbers_of_their_own(run_job, adata):
    number = int((adata.obs["cell_type"] == "NK").sum())
    run_job("augment", *CELLS, *FEW_STEPS, "--to", f"NK={number + 3}", "--output", "out.h5ad")
    both = ad.read_h5ad("out.h5ad")
    assert both.n_obs == adata.n_obs + 3 and (both.obs["cell_type"] == "NK").sum() == number + 3


def test_numbers_are_read_as_they_are_written():
    parse_to = load_script("augment").parse_to
    assert parse_to(["200"]) == 200 and parse_to(["a=b=2", "CD4+/CD25 T Reg=3"]) == {"a=b": 2, "CD4+/CD25 T Reg": 3}


BAD_ARGUMENTS = {
    "no number": ([], r"--to .*\[\]"),
    "no cells": (["--to", "NK="], r"--to .*\['NK='\]"),
    "two numbers": (["--to", "20", "30"], r"--to .*\['20', '30'\]"),
    "a fraction": (["--to", "2.5"], r"--to .*2\.5"),
    "twice": (["--to", "NK=20", "NK=30"], r"--to .*twice.*NK=30"),
    "unknown label": (["--to", "Mast=20"], "to: .*Mast"),
    "enough": (["--to", "1"], "to: "),
    "no condition": (["--to", "20", "--labels_key", "celltype"], "--labels_key .*celltype"),
    "logs": (["--to", "20", "--layer", "lognorm"], "--dataset cells.h5ad: .*lognorm.*non-integers"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(run_job, name):
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        run_job("augment", *CELLS, *arguments)
    assert {path.name for path in Path.cwd().iterdir()} == {"pipeline", "cells.h5ad"}


def test_missing_genes_and_columns_are_named(run_job, adata):
    adata[:, 3:].write_h5ad("cells.h5ad")
    with pytest.raises(ValueError, match="--dataset cells.h5ad: 3 of .* 23 genes .*'gene0', 'gene1', 'gene2'"):
        run_job("augment", *CELLS, "--to", 25)
    del adata.obs["cell_type"]
    adata.write_h5ad("cells.h5ad")
    with pytest.raises(ValueError, match="'cell_type'"):
        run_job("augment", *CELLS, "--to", 25)


def test_a_file_is_not_replaced_unasked(run_job):
    Path("out.h5ad").write_text("precious")
    with pytest.raises(ValueError, match="out.h5ad exists; .*--overwrite"):
        run_job("augment", *CELLS, "--to", 25, "--output", "out.h5ad")
