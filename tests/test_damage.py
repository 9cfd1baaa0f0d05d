"""Errors of damaged files of cells name the file, whatever the library beneath raises."""

import errno
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from scrdit_diffusers import CellDataset, fit_dataset, read_cells
from scrdit_diffusers.cells.batches import CellRows, CellStream
from scrdit_diffusers.cells.damage import reading


@pytest.mark.parametrize(
    "error",
    [RuntimeError("bad heap"), KeyError("dtype"), OSError("corrupt"), UnicodeDecodeError("a", b"", 0, 1, "")],
)
def test_an_error_beneath_becomes_one_that_names_the_file(error):
    with pytest.raises(ValueError, match=r"cells\.h5ad: obs .* again") as raised, reading("cells.h5ad", "obs"):
        raise error
    assert type(error).__name__ in str(raised.value) and raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [ValueError("cells.h5ad has no genes"), OSError(errno.ENOSPC, "full"), MemoryError(), SystemExit()],
)
def test_what_is_named_already_or_not_of_the_file_stays_as_it_is(error):
    with pytest.raises(type(error)) as raised, reading("cells.h5ad"):
        raise error
    assert raised.value is error


@pytest.fixture
def saved(adata, tmp_path):
    CellDataset.from_anndata(adata).save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "var.parquet"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"{}"])
def test_a_damaged_part_of_a_saved_dataset_is_refused_with_its_folder(saved, name, content):
    (saved / name).write_bytes(content)
    for read in (CellDataset.open, read_cells):
        try:
            read(saved)
        except ValueError as error:
            assert "saved" in str(error) and "again" in str(error)
        else:
            assert (name, content) == ("dataset_info.json", b"{}")  # which says nothing


def test_genes_beyond_the_vocabulary_are_refused_with_their_folder(saved, adata):
    CellDataset.from_anndata(adata[:, :3].copy()).save(saved.with_name("other"))
    (saved / "var.parquet").write_bytes((saved.with_name("other") / "var.parquet").read_bytes())
    cells = CellDataset.open(saved)
    for read in (cells.to_anndata, lambda: fit_dataset(cells.rows, cells.var, flavor="all")):
        with pytest.raises(ValueError, match=r"saved: .* vocabulary of 3 genes"):
            read()


def test_cells_that_cannot_be_read_are_refused_with_their_folder(saved):
    info = json.loads((saved / "dataset_info.json").read_text())
    info["features"]["cell_type"]["names"] = ["one"]  # fewer labels than the cells have
    (saved / "dataset_info.json").write_text(json.dumps(info))
    cells = CellDataset.open(saved)
    for read in (
        cells.to_anndata,
        lambda: list(cells.iterate(10, ["cell_type"])),
        lambda: CellRows(cells.rows).__getitems__([0, 59]),
    ):
        with pytest.raises(ValueError, match=r"saved: its cells .* again"):
            read()


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[200:900] = bytes(byte ^ 0x5A for byte in content[200:900])
    path.write_bytes(content)


def rename(path):
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(["tokens", *table.column_names[1:]]), path)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("damage", [cut, flip, rename, Path.unlink])
def test_the_damaged_file_of_a_stream_is_named(parquet_folder, tmp_path, damage, number):
    """The first file is read when the stream is opened, to learn of its columns."""
    folder = shutil.copytree(parquet_folder, tmp_path / "cells")
    cells = CellDataset.open(folder, streaming=True)
    damage(path := folder / "data" / f"train-{number:05d}-of-00002.parquet")
    named = str(folder) if damage is rename else str(path)
    with pytest.raises((ValueError, OSError), match=re.escape(named)):
        fit_dataset(cells.rows, cells.var, "cell_type")
    batches = CellStream(cells.rows, 90, 16, ["cell_type"])
    with pytest.raises((ValueError, OSError), match=re.escape(named)):
        next(itertools.islice(batches, 9, None))


def test_a_stream_of_a_saved_dataset_is_named(saved, adata):
    CellDataset.from_anndata(adata[:, :3].copy()).save(saved.with_name("other"))
    (saved / "var.parquet").write_bytes((saved.with_name("other") / "var.parquet").read_bytes())
    cells = CellDataset.open(saved, streaming=True)
    with pytest.raises(ValueError, match=r"saved: .* vocabulary of 3 genes"):
        fit_dataset(cells.rows, cells.var, flavor="all")
