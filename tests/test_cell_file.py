"""One AnnData file: whatever it is stored as is read right, or refused by name."""

import contextlib
import json
import re

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from cell_files import assert_same_cells, write

from scrdit_diffusers import CellDataset, read_cells
from scrdit_diffusers.cells.cell_file import CellFile


@pytest.fixture
def opened(tmp_path):
    """Open files with a cache of their own."""
    return lambda source, **options: CellDataset.open(source, cache_dir=tmp_path / "cache", **options)


@contextlib.contextmanager
def changing(path):
    """Open a file to change it; a .zarr store without the copy of its metadata that would hide the change."""
    if path.suffix == ".h5ad":
        with h5py.File(path, "r+") as file:
            yield file
    else:
        (path / ".zmetadata").unlink(missing_ok=True)  # of format 2; format 3 keeps the copy in the root's own metadata
        if (root := path / "zarr.json").exists():
            root.write_text(json.dumps(json.loads(root.read_text()) | {"consolidated_metadata": None}))
        yield zarr.open_group(path, mode="r+", use_consolidated=False)


def rechunk(path, name, rows):
    """Store an array of a .zarr store in chunks of some rows; those of zeros only are left out."""
    with changing(path) as group:
        values, attributes = group[name][:], dict(group[name].attrs)
        del group[name]
        stored = group.create_array(name, data=values, chunks=(rows, *values.shape[1:]))
        stored.attrs.update(attributes)
        return stored


# -- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_strings_that_may_be_missing(adata, tmp_path, opened, suffix):
    adata.obs["donor"] = pd.array(["d1", "d2", None] * 20, dtype="string")
    adata.obs["cell_type"] = pd.array(adata.obs["cell_type"].astype(str), dtype="string")
    adata.var["name"] = pd.array([None, *"abcdefghijklmnopqrstuv"], dtype="string")
    expected = adata.copy()
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.obs_names, adata.var_names = adata.obs_names.astype("string"), adata.var_names.astype("string")
        path = write(adata, tmp_path / f"cells{suffix}")
    cells = opened(path, labels_key=["cell_type"]).to_anndata()
    assert list(cells.var_names) == list(expected.var_names)
    assert list(cells.obs["cell_type"]) == list(expected.obs["cell_type"])
    assert cells.obs["donor"].isna().sum() == 20
    with pytest.raises(ValueError, match=r"cells\.(h5ad|zarr): .*'donor'.* 20 NaN"):
        opened(path, labels_key=["donor"])


def big_endian(values):
    return values.astype(values.dtype.newbyteorder(">"))


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("dtype", ["f2", ">f2", ">f4", ">f8", ">i4", ">u2", "g", "?"])
@pytest.mark.parametrize("storage", ["dense", "csr", "csc"])
def test_numbers_of_any_type(adata, tmp_path, opened, suffix, dtype, storage):
    """Also of those that anndata itself does not write, or SciPy does not hold."""
    if dtype == "g" and suffix == ".zarr":
        pytest.skip("zarr has no such numbers")
    adata.X = sp.csc_matrix(adata.X) if storage == "csc" else adata.X if storage == "csr" else adata.X.toarray()
    if dtype == "?":
        adata.X = (adata.X > 0).astype(np.float32)
    adata.layers["unused"] = adata.X.copy()
    path = write(adata, tmp_path / f"cells{suffix}")
    with changing(path) as file:
        for name in [f"{layer}{'/data' * (storage != 'dense')}" for layer in ("X", "layers/unused")]:
            values, attributes = file[name][:].astype(dtype), dict(file[name].attrs)
            del file[name]
            file.create_dataset(name, data=values) if suffix == ".h5ad" else file.create_array(name, data=values)
            file[name].attrs.update(attributes)
    cells = opened(path, expect_counts=True).to_anndata()
    expected = adata.X if storage == "dense" else adata.X.toarray()
    assert np.array_equal(cells.X.toarray(), expected)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_what_is_not_needed_need_not_be_readable(adata, tmp_path, opened, caplog, suffix):
    expected = adata.copy()
    adata.obs["genes"], adata.obs["lost"] = 3, np.arange(60)
    adata.var["odd"] = "x"
    path = write(adata, tmp_path / f"cells{suffix}")
    with changing(path) as file:
        for name in ("layers/counts", "layers/lognorm/data", "obs/lost", "var/odd"):
            del file[name]
        file["layers"].create_group("unknown").attrs["encoding-type"] = "of-the-future"
        file["obs"].create_group("age2").attrs["encoding-type"] = "of-the-future"
        file["obs"].attrs["column-order"] = [*file["obs"].attrs["column-order"], "age2"]
    cells = opened(path, expect_counts=True, labels_key=["cell_type"]).to_anndata()
    assert_same_cells(cells, expected)
    for name in ("'genes'", "'lost'", "'age2'", "'odd'"):
        assert name in caplog.text
    for key in ("genes", "lost", "age2"):
        with pytest.raises(ValueError, match=key):
            opened(path, labels_key=[key])
    with pytest.raises(ValueError, match=r"cells.*lognorm.* cannot be read"):
        opened(path, layer="lognorm")


def test_a_layer_with_a_slash_in_its_name(adata, tmp_path, opened):
    """As anndata before 0.13 wrote it."""
    path = write(adata, tmp_path / "cells.h5ad")
    with changing(path) as file:
        file.move("layers/lognorm", "layers/log/norm")
    assert np.array_equal(opened(path, layer="log/norm").to_anndata().X.toarray(), adata.layers["lognorm"].toarray())


# -- chunks that a .zarr store lacks -----------------------------------------------------------------------------------


def test_chunks_of_zeros_that_zarr_leaves_out(adata, tmp_path, opened):
    """Cells without values, the first gene alone, and labels of a single category."""
    values = adata.X.toarray()
    values[:30] = 0
    adata.X = sp.csr_matrix(values)
    adata.obs["batch"] = pd.Categorical(["one"] * 60)
    path = write(adata, tmp_path / "cells.zarr")
    assert rechunk(path, "X/indptr", 10).nchunks_initialized < 7
    assert rechunk(path, "obs/batch/codes", 20).nchunks_initialized == 0
    assert_same_cells(opened(path, labels_key=["batch"]).to_anndata(), adata)

    first = adata[:, :1].copy()
    first.X = sp.csr_matrix(np.ones((60, 1), np.float32))
    path = write(first, tmp_path / "first.zarr")
    assert rechunk(path, "X/indices", 20).nchunks_initialized == 0
    assert_same_cells(opened(path).to_anndata(), first)

    adata.X = adata.X.toarray()
    path = write(adata, tmp_path / "dense.zarr")
    assert rechunk(path, "X", 10).nchunks_initialized < 6
    assert np.array_equal(opened(path).to_anndata().X.toarray(), adata.X)


def lose(path, name, number):
    """Lose a chunk that holds something."""
    folder = path / name
    (chunk,) = [part for part in folder.rglob("*") if re.fullmatch(rf"(c/)?{number}", str(part.relative_to(folder)))]
    chunk.unlink()


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("name", ["X/data", "X/indices", "X/indptr", "obs/cell_type/codes", "obs/batch", "obs/age"])
def test_chunks_that_are_lost_are_missed(adata, tmp_path, opened, name, number):
    """They would be read as zeros: the first label, say."""
    adata.obs["batch"] = adata.obs["batch"].astype(str).astype("category").cat.add_categories("other")
    path = write(adata, tmp_path / "cells.zarr")
    name = "obs/batch/codes" if name == "obs/batch" else name
    size = zarr.open_group(path, mode="r")[name].shape[0]
    rechunk(path, name, -(-size // 3))
    lose(path, name, number)
    key = name.split("/")[1]
    with pytest.raises(ValueError, match=rf"cells\.zarr: .*({key}|adata\.X)"):
        opened(path, labels_key=[key] if name.startswith("obs") else [])
    if name.startswith("obs"):
        assert key not in opened(path).to_anndata().obs
        assert key not in read_cells(path).obs


# -- damage ------------------------------------------------------------------------------------------------------------


def set_value(name, place, value):
    def change(file):
        file[name][place] = value(file) if callable(value) else value

    return change


def replace_x(values):
    def change(file):
        del file["X"]
        ad.io.write_elem(file, "X", values)

    return change


DAMAGE = {
    "index too large": (set_value("X/indices", 40, 23), "adata.X.* 23"),
    "index negative": (set_value("X/indices", 40, -3), "adata.X.* -3"),
    "indptr decreasing": (set_value("X/indptr", 30, lambda file: file["X/indptr"][32] + 1), "adata.X.* indptr"),
    "indptr beyond the values": (set_value("X/indptr", 30, 10**6), "adata.X.* indptr"),
    "indptr negative": (set_value("X/indptr", 30, -(10**6)), "adata.X.* indptr"),
    "shape that lies": (lambda file: file["X"].attrs.update(shape=[60, 24]), r"adata.X.*\(60, 24\)"),
    "code out of range": (set_value("obs/cell_type/codes", 59, 9), "cell_type"),
    "code below -1": (set_value("obs/cell_type/codes", 59, -7), "cell_type"),
    "column that is not stored": (lambda file: file["obs"].__delitem__("cell_type"), "cell_type"),
    "data frame": (
        replace_x(pd.DataFrame(np.ones((60, 23)), columns=list("abcdefghijklmnopqrstuvw"))),
        "adata.X.*dataframe",
    ),
    "complex values": (replace_x(np.full((60, 23), 1 + 1j)), "adata.X.* complex128.* real"),
    "sparse complex values": (replace_x(sp.csr_matrix(np.full((60, 23), 1 + 1j))), "adata.X.* complex128.* real"),
    "text": (replace_x(np.full((60, 23), "one", dtype=object)), "adata.X"),
    "values beyond float32": (replace_x(np.full((60, 23), 1e300)), "adata.X.* 1e[+]300.* float32"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_before_anything_is_converted(adata, tmp_path, opened, damage):
    change, message = DAMAGE[damage]
    path = write(adata, tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(ValueError, match=rf"cells\.h5ad.*{message}"):
        opened(path, labels_key=["cell_type"])


@pytest.mark.parametrize("name", ["indices", "indptr"])
def test_damage_of_a_matrix_stored_by_genes_is_named(adata, tmp_path, opened, name):
    adata.X = sp.csc_matrix(adata.X)
    path = write(adata, tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        file[f"X/{name}"][12] = -3
    with pytest.raises(ValueError, match=rf"cells\.h5ad: adata\.X.*{name}"):
        opened(path)


def test_damage_beyond_the_first_cells_is_named(adata, tmp_path, opened, monkeypatch):
    path = write(adata, tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        file["X/indptr"][50] = file["X/indptr"][52] + 1
    monkeypatch.setattr("scrdit_diffusers.cells.cell_file.ROWS_OF_HEAD", 20)
    with pytest.raises(ValueError, match=r"cells\.h5ad, cells from 0: .*indptr"):
        opened(path)


def test_files_without_genes_or_cells_are_refused(adata, tmp_path, opened):
    with pytest.raises(ValueError, match=r"none\.h5ad.* no cells"):
        opened(write(adata[:0].copy(), tmp_path / "none.h5ad"))
    for values in (np.empty((5, 0), np.float32), sp.csr_matrix((5, 0), dtype=np.float32)):
        with pytest.raises(ValueError, match=r"empty\.h5ad.* no genes"):
            opened(write(ad.AnnData(values), tmp_path / "empty.h5ad"))


# -- what read_cells leaves out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_read_cells_leaves_out_what_cannot_be_read(adata, tmp_path, caplog, suffix):
    adata.layers["lost"] = adata.X.copy()
    adata.obs["odd"] = adata.obs["gone"] = np.arange(60)
    adata.obsm["X_pca"], adata.obsm["X_odd"] = np.ones((60, 2)), np.ones((60, 3))
    adata.uns["note"] = {"kept": "yes"}
    adata.raw = adata.copy()
    path = write(adata, tmp_path / f"cells{suffix}")
    with changing(path) as file:
        del file["layers/lost/data"], file["obs/gone"]
        for name in ("obs/odd", "obsm/X_odd"):
            file[name].attrs["encoding-type"] = "of-the-future"
    cells = read_cells(path)
    for name in ("layers/lost", "gone", "obs/odd", "obsm/X_odd"):
        assert name in caplog.text
    del adata.layers["lost"], adata.obsm["X_odd"]
    adata.obs = adata.obs.drop(columns=["odd", "gone"])
    assert_same_cells(cells, adata)
    pd.testing.assert_frame_equal(cells.obs, adata.obs)
    assert (
        set(cells.layers) == set(adata.layers)
        and list(cells.obsm) == ["X_pca"]
        and cells.uns["note"] == {"kept": "yes"}
    )
    assert np.array_equal(cells.raw.X.toarray(), adata.raw.X.toarray())
    for layer in adata.layers:
        assert np.array_equal(cells.layers[layer].toarray(), adata.layers[layer].toarray())


def test_read_cells_refuses_a_file_without_values_that_can_be_read(adata, tmp_path):
    path = write(ad.AnnData(adata.X, obs=adata.obs, var=adata.var), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        del file["X/data"]
    with pytest.raises(ValueError, match=r"cells\.h5ad: neither X nor a layer"):
        read_cells(path)


def test_the_mark_of_generated_cells_is_read_and_told(adata, tmp_path, caplog):
    adata.obs["synthetic"] = np.arange(60) < 7
    path = write(adata, tmp_path / "cells.h5ad")
    assert list(read_cells(path).obs["synthetic"]) == list(adata.obs["synthetic"]) and not caplog.records
    dataset = CellDataset.open(path, cache_dir=tmp_path / "cache")
    assert "7 of the 60 cells are marked as generated" in caplog.text
    assert list(dataset.to_anndata().obs["synthetic"]) == list(adata.obs["synthetic"])
    with pytest.raises(ValueError, match=r"obs\['synthetic'\] marks generated cells and cannot be a label"):
        CellDataset.open(path, labels_key=["synthetic"], cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("source", ["", "*.h5ad"], ids=["folder", "pattern"])
def test_read_cells_says_that_it_takes_one_file(adata, tmp_path, source):
    for name in ("a", "b"):
        write(adata, tmp_path / f"{name}.h5ad")
    with pytest.raises(ValueError, match="is 2 AnnData files, and one is needed"):
        read_cells(tmp_path / source)


def test_read_cells_reads_layers_beside_a_damaged_x(adata, tmp_path, caplog):
    path = write(adata, tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        del file["X/data"]
    cells = read_cells(path)
    assert cells.X is None and "X is left out" in caplog.text
    assert np.array_equal(cells.layers["counts"].toarray(), adata.layers["counts"].toarray())


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_column_damaged_beyond_the_first_cells_is_left_out_unless_needed(adata, tmp_path, opened, caplog, suffix):
    adata.obs["unused"] = pd.Categorical(["a", "b"] * 30)
    path = write(adata, tmp_path / f"cells{suffix}")
    with changing(path) as file:
        file["obs/unused/codes"][59] = 9
    cells = opened(path, labels_key=["cell_type"]).to_anndata()
    del adata.obs["unused"]
    assert_same_cells(cells, adata)
    assert "unused" in caplog.text and "unused" not in read_cells(path).obs
    with pytest.raises(ValueError, match=rf"cells\{suffix}.*unused"):
        opened(path, obs_columns=["unused"])


def test_a_file_that_is_refused_is_closed(tmp_path):
    """So that the right one can be written in its place."""
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        file.create_group("obs")
    with pytest.raises(ValueError, match=r"cells\.h5ad .*var") as _error:  # whose traceback keeps the object
        CellFile(tmp_path / "cells.h5ad")
    h5py.File(tmp_path / "cells.h5ad", "w").close()
