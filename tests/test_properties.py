"""Whatever cells and files come: what is valid is read as SciPy reads it, and what is not is refused by name.

`make fuzz` tries many more examples, for as long as it takes.
"""

import json
import os
import random
import shutil
import string
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from cell_files import write
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from scrdit_diffusers import CellDataset, SCRDiTProcessor, fit_dataset
from scrdit_diffusers.checks import MAX_COUNT

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "suite",
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # shrinking takes minutes; `make fuzz` does it
    suppress_health_check=SLOW_IS_FINE,
)
settings.register_profile("fuzz", max_examples=3000, deadline=None, suppress_health_check=SLOW_IS_FINE, print_blob=True)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
COPIES = PROFILE.max_examples  # damaged copies of each file
PUBLISHED = Path(__file__).parent / "pipelines_613385b"
MEMORY = 2**31

# -- cells -------------------------------------------------------------------------------------------------------------

NUMBERS = ["bool", "int8", "uint8", ">i2", "int32", "uint32", "int64", "uint64", "float16", "float32", "<f8", ">f8"]
TEXT = st.text(string.ascii_letters + string.digits + " _.-é細Ωß'\"", min_size=1, max_size=8)
# Names that something of this package, of anndata, datasets or pandas means otherwise.
COLUMNS = st.one_of(TEXT, st.sampled_from(["token_id", "index", "_index", "gene_symbol", "label", "n_counts", "0"]))


@st.composite
def matrices(draw, num_cells, num_genes):
    """Counts or logs, sometimes with a value that no model can be trained on; any storage and type of number."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.poisson(draw(st.sampled_from([0.0, 0.3, 3.0, 40.0])), (num_cells, num_genes)).astype(np.float64)
    if draw(st.booleans()):
        values = np.log1p(values * rng.uniform(0.5, 3, (num_cells, 1)))
    bad = draw(st.sampled_from([None] * 6 + [np.nan, np.inf, -1.0, 0.5, MAX_COUNT + 1.0]))
    if bad is not None:
        values[rng.integers(num_cells), rng.integers(num_genes)] = bad
    dtype = np.dtype(draw(st.sampled_from(NUMBERS)))
    with np.errstate(all="ignore"):
        if dtype.kind in "iu":
            values = np.clip(np.nan_to_num(values), np.iinfo(dtype).min, np.iinfo(dtype).max)
        values = values.astype(dtype)
    storage = draw(st.sampled_from(["dense", "csr", "csc"]))
    if storage == "dense" or dtype == "float16" or dtype.byteorder == ">":  # which SciPy's matrices do not have
        return values
    return {"csr": sp.csr_matrix, "csc": sp.csc_matrix}[storage](values)


@st.composite
def label_columns(draw, num_cells):
    """A column of obs of any kind."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    names = draw(st.lists(st.one_of(TEXT), min_size=1, max_size=4, unique=True))
    codes = rng.integers(len(names), size=num_cells)
    kind = draw(st.sampled_from(["text", "category", "integer category", "integer", "bool", "number", "missing"]))
    if kind == "text":
        return np.array(names, dtype=object)[codes]
    if kind == "category":
        return pd.Categorical.from_codes(codes, draw(st.permutations(names)))
    if kind == "integer category":
        return pd.Categorical(codes * 10)
    if kind == "missing":
        return pd.Categorical.from_codes(np.where(rng.random(num_cells) < 0.3, -1, codes), names)
    return {"integer": codes, "bool": codes % 2 == 0, "number": codes / 4}[kind]


@st.composite
def cells(draw):
    """AnnData of few cells, the layer with its values, and a column of labels."""
    num_cells, num_genes = draw(st.integers(1, 25)), draw(st.integers(1, 8))
    names = draw(st.lists(TEXT, min_size=num_genes, max_size=num_genes, unique=draw(st.booleans())))
    var_columns = draw(st.lists(COLUMNS, max_size=2, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    var = pd.DataFrame({key: rng.permutation(num_genes) for key in var_columns}, index=pd.Index(names, dtype=object))
    # anndata writes over obs itself for a column ".", which HDF5 takes for the group.
    keys = draw(
        st.lists(COLUMNS, min_size=1, max_size=3, unique=True).filter(lambda keys: not {"_index", "."} & {*keys})
    )
    index = [f"c{i}" for i in range(num_cells)]
    obs = pd.DataFrame({key: draw(label_columns(num_cells)) for key in keys}, index=index)
    adata = ad.AnnData(
        draw(matrices(num_cells, num_genes)), obs=obs, var=var.drop(columns=["_index", "."], errors="ignore")
    )
    layer = draw(st.sampled_from([None, "counts", "spliced"]))
    if layer is not None:
        adata.layers[layer] = draw(matrices(num_cells, num_genes))
    return adata, layer, keys[0]


def faults(adata, layer, key, expect_counts) -> list[str]:
    """List, by NumPy alone, what is wrong with cells: a word of each message."""
    matrix = adata.X if layer is None else adata.layers[layer]
    values = (matrix.toarray() if sp.issparse(matrix) else matrix).astype(np.float64)
    with np.errstate(all="ignore"):
        rounded = (values.astype(np.float32) != values) & (values == np.rint(values)) & np.isfinite(values)
    labels = {str(label) for label in adata.obs[key]}
    found = {
        "gene": not adata.var_names.is_unique or "nan" in adata.var_names,
        "NaN or infinite": not np.isfinite(values).all(),
        "negative": (values < 0).any(),
        "non-integers": expect_counts and not (values == np.rint(values)).all(),
        "largest": expect_counts and (values > MAX_COUNT).any(),
        "float32 would round": rounded.any(),
        "look like one label": len({" ".join(label.split()) for label in labels}) < len(labels),
        "NaN; give": adata.obs[key].isna().any(),
    }
    return [word for word, wrong in found.items() if wrong]


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@PROFILE
@given(cells(), st.sampled_from([".h5ad", ".zarr"]), st.booleans())
def test_cells_are_refused_or_read_as_scipy_reads_them(tmp_path_factory, drawn, suffix, expect_counts):
    adata, layer, key = drawn
    folder = tmp_path_factory.mktemp("cells")
    path = write(adata.copy(), folder / f"cells{suffix}")
    wrong = faults(adata, layer, key, expect_counts)
    options = dict(layer=layer, expect_counts=expect_counts, labels_key=[key], cache_dir=folder / "cache")
    try:
        dataset = CellDataset.open(path, **options)
    except ValueError as error:
        # zarr leaves out chunks of zeros, which are then the same as lost.
        labels = adata.obs[key].cat.codes if isinstance(adata.obs[key].dtype, pd.CategoricalDtype) else adata.obs[key]
        left_out = suffix == ".zarr" and "chunks of obs" in str(error) and not labels.astype(bool).any()
        assert str(path) in str(error) and (left_out or any(word in str(error) for word in wrong)), (wrong, str(error))
        shutil.rmtree(folder)
        return
    assert not wrong
    matrix = adata.X if layer is None else adata.layers[layer]
    expected = (matrix.toarray() if sp.issparse(matrix) else matrix).astype(np.float32)
    found = dataset.to_anndata()
    np.testing.assert_array_equal(found.X.toarray(), expected)
    assert list(found.var_names) == list(adata.var_names) and set(found.obs) <= set(adata.obs)
    assert list(found.obs[key].astype(str)) == list(adata.obs[key].astype(str))
    plain = ad.AnnData(sp.csr_matrix(expected), obs=adata.obs.copy(), var=adata.var)
    plain.strings_to_categoricals()  # which sorts them as anndata does in files
    check_processors(dataset, plain, key, expect_counts)
    shutil.rmtree(folder)


def check_processors(dataset, adata, key, expect_counts):
    """A processor of the dataset is that of the cells in memory, and brings back what it was given."""
    kind = dict(value_space="counts" if expect_counts else "log_normalized", flavor="all")
    try:
        processor = SCRDiTProcessor.from_anndata(adata, key, **kind)
    except ValueError as in_memory:
        with pytest.raises(ValueError) as of_dataset:
            fit_dataset(dataset.rows, dataset.var, key, **kind)
        assert str(of_dataset.value)[-20:] == str(in_memory)[-20:]
        return
    assert fit_dataset(dataset.rows, dataset.var, key, **kind)[0].to_json_string() == processor.to_json_string()
    values = processor.get_values(adata)
    restored = processor.inverse_transform(processor.transform(values))
    if expect_counts:
        np.testing.assert_array_equal(restored, values.toarray())
    else:
        np.testing.assert_allclose(restored, values.toarray(), rtol=1e-5, atol=1e-5)
    labels = processor.decode_labels(processor.encode_labels(adata.obs))
    assert list(labels[key]) == list(adata.obs[key].astype(str))


# -- damaged files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One file or folder of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    adata = ad.read_h5ad(PUBLISHED / "cells.h5ad")[:30].copy()
    write(adata, folder / "cells.h5ad")
    write(adata, folder / "cells.zarr")
    CellDataset.from_anndata(adata).save(folder / "dataset")
    shutil.copytree(PUBLISHED / "counts", folder / "pipeline")
    return folder


def damage(path: Path, rng: random.Random) -> None:
    """Flip bits of a file or overwrite some of it, most often near its beginning, or cut it off."""
    content = bytearray(path.read_bytes())
    if not content:
        return
    for _ in range(rng.choice([1, 1, 4])):
        place = rng.randrange(min(len(content), rng.choice([64, 2000, len(content)])))
        how = rng.randrange(4)
        if how == 0:
            content[place : place + 8] = rng.choice([b"\xff", b"\0", b"\x7f"]) * len(content[place : place + 8])
        elif how == 1 and place:
            del content[place:]
        else:
            content[place] ^= 1 << rng.randrange(8)
        if not content:
            break
    path.write_bytes(content)


@pytest.mark.parametrize(
    "kind, name, files",
    [
        ("cells", "cells.h5ad", ""),
        ("cells", "cells.zarr", "**/*"),
        ("cells", "dataset", "*"),
        ("pipeline", "pipeline", "transformer/*.safetensors"),
        ("pipeline", "pipeline", "**/*.json"),
    ],
)
def test_damaged_files_are_refused_by_name_or_read(whole, tmp_path, kind, name, files):
    rng = random.Random(0 if PROFILE.derandomize else None)
    for i in range(COPIES):
        copy = tmp_path / f"{i}{Path(name).suffix}"
        shutil.copytree(whole / name, copy) if (whole / name).is_dir() else shutil.copy(whole / name, copy)
        parts = [part for part in copy.glob(files) if part.is_file()] if files else [copy]
        damage(rng.choice(sorted(parts)), rng)
    kept = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}_kept"))
    command = [sys.executable, str(Path(__file__).with_name("damaged_files.py")), kind, str(tmp_path), str(MEMORY)]
    wrong = []
    while any(tmp_path.iterdir()):  # again after a copy that ended the process
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 10 * COPIES)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"copy"')]
        assert lines, done.stderr[-2000:]
        wrong += [line for line in lines if line.get("outcome", "").startswith("other")]
        if "outcome" not in lines[-1]:
            wrong.append(lines[-1] | {"outcome": f"exit code {done.returncode}: {done.stderr[-300:]}"})
            left = tmp_path / lines[-1]["copy"]
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not wrong:
        shutil.rmtree(kept)
    assert not wrong, f"copies in {kept}:\n" + "\n".join(f"{line['copy']}: {line['outcome']}" for line in wrong)
