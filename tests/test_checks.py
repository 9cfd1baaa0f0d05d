"""Checks of AnnData, genes, labels and values: every refusal."""

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scrdit_diffusers import CellDataset, SCRDiTProcessor
from scrdit_diffusers.checks import (
    check_gene_names,
    check_label,
    get_matrix,
    label_categories,
    layer_names,
    looks_like_counts,
)

SEEDS = range(5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([[0, 3.0]], True), ([[0, 3.5]], False), ([[-1, 3]], False), ([[0, 0]], False), ([[np.nan, 1]], False)],
)
def test_looks_like_counts(values, expected):
    assert looks_like_counts(np.array(values)) is expected
    assert looks_like_counts(sp.csr_matrix(values)) is expected


def set_value(value, layer=None):
    def change(adata):
        matrix = adata.X if layer is None else adata.layers[layer]
        matrix.data[3] = value

    return change


def scale_x(adata):
    adata.X = adata.layers["lognorm"].copy()


def only_lognorm(adata):
    scale_x(adata)
    del adata.layers["counts"]


def only_raw(adata):
    adata.raw = adata.copy()
    only_lognorm(adata)


def empty_x(adata):
    adata.X = None


def rename_gene(adata):
    adata.var_names = ["gene1", *adata.var_names[1:]]


def unname_gene(adata):
    adata.var_names = ["", *adata.var_names[1:]]


def zero_all(adata):
    adata.X = sp.csr_matrix(adata.shape, dtype=np.float32)


def zero_gene(adata):
    matrix = adata.X.tolil()
    matrix[:, 4] = 0
    adata.X = matrix.tocsr()


def nan_label(adata):
    adata.obs.loc["cell3", "cell_type"] = np.nan


def nan_text_label(adata):
    adata.obs.loc["cell3", "batch"] = None


LOG = dict(value_space="log_normalized")
REFUSED_DATA = {
    "NaN in X": (set_value(np.nan), {}, r"adata\.X .* 1 NaN"),
    "infinite in a layer": (
        set_value(np.inf, "counts"),
        dict(layer="counts"),
        r"layers\['counts'\] .* 1 NaN",
    ),
    "NaN in log values": (
        set_value(np.nan, "lognorm"),
        LOG | dict(layer="lognorm"),
        r"layers\['lognorm'\] .* 1 NaN",
    ),
    "negative": (set_value(-1), {}, r"adata\.X .* -1\)"),
    "negative log value": (set_value(-0.5, "lognorm"), LOG | dict(layer="lognorm"), r"layers\['lognorm'\] .* -0\.5\)"),
    "too large a count": (set_value(2.0**24 + 2), {}, r"adata\.X .* 1\.67772e\+07.* 2\^24"),
    "no counts in X": (scale_x, {}, r"adata\.X .* 4\.98311.* \['counts'\]"),
    "no counts at all": (only_lognorm, {}, r"adata\.X .* 4\.98311\. No layer .*value_space"),
    "counts in raw": (only_raw, {}, r"adata\.X .* adata\.raw\.to_adata\(\)"),
    "no counts in the layer": (lambda a: None, dict(layer="lognorm"), r"layers\['lognorm'\] .* adata\.X .*layer=None"),
    "counts as log values": (lambda a: None, LOG, r"adata\.X .* target_sum=1e4"),
    "log values with target_sum": (scale_x, LOG | dict(target_sum=1e4), r"adata\.X .* 4\.98311"),
    "no such layer": (lambda a: None, dict(layer="cuonts"), r"layers\['cuonts'\] .*'counts'"),
    "X is empty": (empty_x, {}, r"^adata\.X [^.]*\blayer\b"),
    "duplicate genes": (rename_gene, {}, r"adata\.var_names .*\['gene1'\].*var_names_make_unique"),
    "missing gene name": (unname_gene, {}, r"adata\.var_names .* 1 .*NaN"),
    "duplicates in the list": (lambda a: None, dict(genes=["gene1", "gene1"]), r"^genes .*\['gene1'\]"),
    "genes not in the data": (
        lambda a: None,
        dict(genes=["gene1", "CD4"]),
        r"^genes: 1 of 2 .*adata\.var_names.*\['CD4'\]",
    ),
    "all-zero gene list": (zero_gene, dict(genes=["gene4"]), r"^genes: .* 1 "),
    "empty gene list": (lambda a: None, dict(genes=[]), r"^genes "),
    "all-zero matrix": (zero_all, {}, r"All genes"),
    "n_top_genes": (lambda a: None, dict(n_top_genes=0), r"n_top_genes .* 0\b"),
    "flavor": (lambda a: None, dict(flavor="pearson"), r"flavor .*'pearson'"),
    "seurat_v3 of log values": (
        lambda a: None,
        LOG | dict(layer="lognorm", flavor="seurat_v3", n_top_genes=5),
        r'flavor="seurat_v3" .*"seurat"',
    ),
    "value_space": (lambda a: None, dict(value_space="cpm"), r"value_space .*'cpm'"),
    "target_sum of counts": (lambda a: None, dict(target_sum=1e4), r'^target_sum .*value_space="log_normalized"'),
    "target_sum": (lambda a: None, LOG | dict(target_sum=-1.0), r"target_sum .* -1"),
    "NaN label": (nan_label, dict(labels_key="cell_type"), r"obs\['cell_type'\] .* 1 NaN"),
    "None label": (nan_text_label, dict(labels_key="batch"), r"obs\['batch'\] .* 1 NaN"),
    "misspelt label column": (
        lambda a: None,
        dict(labels_key="celltype"),
        r"obs .*'celltype'.*'cell_type'.*\['cell_type'",
    ),
    "label is no category": (lambda a: None, dict(labels_key="age"), r"obs\['age'\] .*\b60 .*\b60 "),
    "gene id column": (lambda a: None, dict(gene_ids_key="symbol"), r"^var .*'symbol'"),
}


@pytest.mark.parametrize(("change", "kwargs", "message"), REFUSED_DATA.values(), ids=REFUSED_DATA.keys())
def test_refuses_training_data(adata, change, kwargs, message):
    change(adata)
    with pytest.raises(ValueError, match=message):
        SCRDiTProcessor.from_anndata(adata, **kwargs)


MEMORY = {
    "half precision": lambda x: x.astype(np.float16),
    "extended precision": lambda x: x.astype(np.longdouble),
    "big-endian": lambda x: x.astype(">f4"),
    "CSR array": sp.csr_array,
    "integers": lambda x: x.astype(np.uint16),
    "masked array without masked values": lambda x: np.ma.masked_array(x, mask=False),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_values_in_memory_are_those_of_any_type(adata, kind):
    values = adata.X.toarray()
    adata.layers["other"] = MEMORY[kind](values)
    matrix = get_matrix(adata, "other", expect_counts=True)
    assert matrix.dtype.isnative and np.array_equal(matrix.toarray(), values)


def test_values_that_are_not_real_are_refused(adata):
    masked = np.ma.masked_array(adata.X.toarray(), mask=np.eye(60, 23))
    far = adata.X.copy()
    far.indices[5] = 23
    for values, message in (
        (adata.X * 1j, "complex64.* real"),
        (masked, "masked"),
        (adata.X.astype(np.float64) * 1e300, "float32"),
    ):
        adata.layers["other"] = values
        with pytest.raises(ValueError, match=rf"layers\['other'\].*{message}"):
            get_matrix(adata, "other", expect_counts=False)
    adata.X = far
    with pytest.raises(ValueError, match=r"adata\.X.* ind(ices|ex)"):
        get_matrix(adata, None, expect_counts=True)


def test_labels_of_two_types_are_one_or_refused():
    """As where tables with numbers and text were put together."""
    text = pd.Series(["1", "2", "1"], dtype=object)
    assert label_categories(pd.DataFrame({"label": pd.concat([text, pd.Series([1, 2], dtype=object)])}), "label") == [
        "1",
        "2",
    ]
    for other in ([1.0, 2.0], [True, "a"], ["b", True]):
        with pytest.raises(ValueError, match="'label'.*look like one label"):
            label_categories(pd.DataFrame({"label": pd.concat([text, pd.Series(other, dtype=object)])}), "label")


@pytest.mark.parametrize("other", ["B ", " B", "\N{NO-BREAK SPACE}B"])
def test_labels_that_look_the_same_are_refused(adata, other):
    """Of one table; what can be told apart, such as "1" and "01", is not."""
    adata.obs["cell_type"] = np.resize(["B", other, "1", "01"], adata.n_obs)
    with pytest.raises(ValueError, match=r"'cell_type'.*'B'.*one label"):
        SCRDiTProcessor.from_anndata(adata, "cell_type")
    assert label_categories(adata[np.resize([2, 3], 60)].obs, "cell_type") == ["01", "1"]


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.float64])
@pytest.mark.parametrize("layer", [None, "whole"])
def test_integers_that_float32_would_round_are_refused(adata, tmp_path, dtype, layer):
    counts = adata.X.toarray().astype(dtype)
    counts[3, 2] = 2**24 + 1
    cells = ad.AnnData(sp.csr_matrix(counts), adata.obs, adata.var, layers={"whole": sp.csr_matrix(counts)})
    name = "X" if layer is None else "whole"
    with pytest.raises(ValueError, match=rf"{name}.* 16777217.*float32"):
        CellDataset.from_anndata(cells, layer)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=r"cells\.h5ad.* 16777217.*float32"):
        CellDataset.open(tmp_path / "cells.h5ad", layer, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"2\^24"):
        CellDataset.open(tmp_path / "cells.h5ad", layer, expect_counts=True, cache_dir=tmp_path)
    rows = CellDataset.from_anndata(adata).rows.to_dict() | {
        "expressions": [list(map(int, row[row > 0])) for row in counts]
    }
    dataset = datasets.Dataset.from_dict(rows)
    with pytest.raises(ValueError, match=r"expressions.* 16777217"):
        CellDataset(dataset, adata.var).to_anndata()
    counts[3, 2] = 2**25
    cells.X = sp.csr_matrix(counts)
    assert CellDataset.from_anndata(cells).to_anndata().X[3, 2] == 2**25


def test_fractions_are_rounded_to_float32(adata):
    adata.X = sp.csr_matrix(adata.X.toarray() * (2.0**24 + 0.1))
    values = CellDataset.from_anndata(adata).to_anndata().X
    np.testing.assert_array_equal(values.toarray(), adata.X.toarray().astype(np.float32))


def test_refuses_a_single_cell(adata):
    with pytest.raises(ValueError, match=r"adata\.X .* 1 .* 2 "):
        SCRDiTProcessor.from_anndata(adata[:1].copy())


def test_nan_is_a_gene_and_no_name_is_not():
    """*nanchung* of Drosophila."""
    check_gene_names(["nan", "w"], "var_names")
    for missing in (np.nan, None, ""):
        with pytest.raises(ValueError, match="var_names .* 1 "):
            check_gene_names(["w", missing], "var_names")


def test_a_column_that_comes_twice_is_refused(adata):
    twice = pd.concat([adata.obs, adata.obs], axis=1)
    with pytest.raises(ValueError, match="obs .* 2 columns 'batch'"):
        check_label(twice, "batch")


def test_x_is_none_of_the_layers(adata):
    assert layer_names(adata) == ["counts", "lognorm"]
    with pytest.raises(ValueError, match=r"'missing'.*\['counts', 'lognorm'\]"):
        get_matrix(adata, "missing", expect_counts=False)
