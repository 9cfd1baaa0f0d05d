"""The annotation script: what it writes, the temperature, and what it refuses before any work."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scrdit_diffusers import SCRDiTAnnotatePipeline

CELLS = ["--dataset", "cells.h5ad", "--labels_key", "cell_type"]


@pytest.fixture
def annotate(count_pipe):
    return SCRDiTAnnotatePipeline.from_pipe(count_pipe)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_labels_are_written_into_a_copy_of_the_cells(run_job, annotate, adata):
    run_job("annotate", *CELLS, "--seed", 3, "--prior", "composition", "--timesteps", 500, 900, "--output", "out.h5ad")
    found = ad.read_h5ad("out.h5ad")
    table = annotate(adata, "cell_type", prior="composition", timesteps=[500, 900], generator=seeded(3))
    assert list(found.obs["scrdit_cell_type"]) == list(table["cell_type"])
    assert np.allclose(found.obs[["scrdit_probability", "scrdit_unlikeness"]], table[["probability", "unlikeness"]])
    assert np.allclose(found.obsm["scrdit_probabilities"], table.filter(like="p_"), atol=1e-6)
    names = list(found.obs["scrdit_cell_type"].cat.categories)
    assert [f"p_{name}" for name in names] == list(table.filter(like="p_"))
    assert list(found.obs["cell_type"]) == list(adata.obs["cell_type"])  # the labels of before
    assert np.array_equal(found.X.toarray(), adata.X.toarray()) and "lognorm" in found.layers
    assert found.uns["scrdit_annotate"]["labels_key"] == "cell_type"


@pytest.mark.parametrize("output", ["out.csv", "out.tsv"])
def test_a_table_has_a_row_per_cell(run_job, annotate, adata, output):
    run_job("annotate", *CELLS, "--temperature", 2, "--output", output)
    found = pd.read_csv(output, sep="," if output.endswith("csv") else "\t", index_col="cell")
    expected = annotate(adata, "cell_type", temperature=2, generator=seeded())
    pd.testing.assert_frame_equal(found, expected.astype({"cell_type": found["cell_type"].dtype}), check_names=False)


def test_the_temperature_is_fitted_to_labeled_cells(run_job, annotate, adata, capsys):
    adata[:40].write_h5ad("labeled.h5ad")
    run_job("annotate", *CELLS, "--temperature_cells", "labeled.h5ad", "--output", "out.h5ad")
    expected = annotate.fit_temperature(adata[:40].copy(), "cell_type", generator=seeded())
    assert ad.read_h5ad("out.h5ad").uns["scrdit_annotate"]["temperature"] == pytest.approx(expected)
    assert "40 labeled cells" in capsys.readouterr().out


def test_labeled_cells_that_cannot_serve_are_named(run_job, adata):
    cells = adata[:10].copy()
    arguments = [*CELLS, "--temperature_cells", "labeled.h5ad"]
    cells.obs["cell_type"] = ["T"] * 9 + ["Mast"]
    cells.write_h5ad("labeled.h5ad")
    with pytest.raises(ValueError, match="--temperature_cells labeled.h5ad: .*1 cells.*Mast"):
        run_job("annotate", *arguments)
    del cells.obs["cell_type"]
    cells.write_h5ad("labeled.h5ad")
    with pytest.raises(ValueError, match="--temperature_cells labeled.h5ad: .*'cell_type'"):
        run_job("annotate", *arguments)


BAD_ARGUMENTS = {
    "no label": (["--labels_key", "celltype"], r"--labels_key .*\['cell_type', 'batch'\], got celltype"),
    "two temperatures": (["--temperature", 2, "--temperature_cells", "x.h5ad"], "--temperature .*2"),
    "cold": (["--temperature", 0], "temperature .* 0"),
    "no timesteps": (["--timesteps", -1], r"timesteps .*\[-1\]"),
    "logs": (["--layer", "lognorm"], "--dataset cells.h5ad: .*lognorm.*non-integers"),
    "other format": (["--output", "out.txt"], r"--output .*\.csv .*out\.txt"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(run_job, name):
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        run_job("annotate", *CELLS, *arguments)
    assert {path.name for path in Path.cwd().iterdir()} == {"pipeline", "cells.h5ad"}


def test_missing_genes_are_counted_and_named(run_job, adata):
    adata[:, 3:].write_h5ad("cells.h5ad")
    with pytest.raises(ValueError, match="--dataset cells.h5ad: 3 of .* 23 genes .*'gene0', 'gene1', 'gene2'"):
        run_job("annotate", *CELLS)


def test_a_table_is_not_replaced_unasked(run_job):
    Path("out.csv").write_text("precious")
    with pytest.raises(ValueError, match="out.csv exists; .*--overwrite"):
        run_job("annotate", *CELLS, "--output", "out.csv")
