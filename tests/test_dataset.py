"""Datasets of cells: AnnData to rows and back, files, folders, tokens, streams, splits."""

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from cell_files import assert_same_cells, write

from scrdit_diffusers import CellCollator, CellDataset, SCRDiTProcessor, fit_dataset, read_cells, split_cells
from scrdit_diffusers.cells import cell_file, fitting
from scrdit_diffusers.cells import dataset as dataset_module
from scrdit_diffusers.cells.layout import rows_to_matrix, token_positions

# -- AnnData to rows and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_chunk", [7, 10_000])
def test_dataset_round_trip(adata, monkeypatch, rows_per_chunk):
    monkeypatch.setattr(dataset_module, "ROWS_PER_CHUNK", rows_per_chunk)
    dataset = CellDataset.from_anndata(adata)
    assert dataset.rows.column_names == ["genes", "expressions", "cell_type", "batch", "age"]
    assert len(dataset) == 60
    assert_same_cells(dataset.to_anndata(), adata)


def test_dataset_is_sparse(adata):
    adata.X = sp.csr_matrix(adata.X.toarray() * (np.arange(60) != 2)[:, None])
    dataset = CellDataset.from_anndata(adata)
    assert len(dataset.rows[2]["genes"]) == 0
    row, dense = dataset.rows[5], adata.X[5].toarray().ravel()
    assert row["genes"] == np.flatnonzero(dense).tolist()
    assert row["expressions"] == dense[dense > 0].tolist()
    assert dataset.rows.features["genes"].feature.dtype == "int32"
    assert dataset.rows.features["expressions"].feature.dtype == "float32"


@pytest.mark.parametrize("convert", [sp.csc_matrix, lambda x: x.toarray(), lambda x: x.astype(np.int64)])
def test_dataset_of_other_matrices(adata, convert):
    expected = adata.X.toarray()
    adata.X = convert(adata.X)
    assert np.array_equal(CellDataset.from_anndata(adata).to_anndata().X.toarray(), expected)


def test_dataset_of_a_layer_with_chosen_columns(adata):
    dataset = CellDataset.from_anndata(adata, layer="lognorm", obs_columns=["batch"])
    assert dataset.rows.column_names == ["genes", "expressions", "batch"]
    back = dataset.to_anndata()
    assert np.array_equal(back.X.toarray(), adata.layers["lognorm"].toarray())


def test_dataset_after_selecting_and_shuffling(adata):
    order = np.random.default_rng(0).permutation(60)[:20]
    back = CellDataset.from_anndata(adata).select(order).to_anndata()
    assert_same_cells(back, adata[order].copy())


@pytest.mark.parametrize("column", ["text", "category"])
def test_missing_labels_stay_missing(adata, column):
    """A label "nan" would pass for a cell type, and its cells would be trained on."""
    labels = pd.Series(["x", None, "y"] * 20, index=adata.obs_names, dtype=object)
    adata.obs["label"] = labels.astype("category") if column == "category" else labels
    back = CellDataset.from_anndata(adata).to_anndata()
    assert back.obs["label"].isna().tolist() == labels.isna().tolist()


def test_labels_missing_from_a_whole_chunk(adata, monkeypatch):
    monkeypatch.setattr(dataset_module, "ROWS_PER_CHUNK", 30)
    adata.obs["donor"] = [None] * 30 + ["d1"] * 30
    back = CellDataset.from_anndata(adata).to_anndata()
    assert back.obs["donor"].fillna("none").tolist() == ["none"] * 30 + ["d1"] * 30


@pytest.mark.parametrize("key", ["genes", "expressions"])
def test_refuses_obs_columns_with_names_of_value_columns(adata, key):
    adata.obs[key] = 1
    with pytest.raises(ValueError, match=key):
        CellDataset.from_anndata(adata)


def test_columns_of_mixed_types_are_saved_as_text(adata, tmp_path):
    adata.obs["batch"] = pd.Series([1] * 30 + ["two"] * 20 + [None] * 10, index=adata.obs_names, dtype=object)
    adata.obs["doublet"] = pd.Series([True] * 30 + [np.nan] * 30, index=adata.obs_names, dtype=object)
    adata.obs["markers"] = [["a", "b"]] * 60
    adata.var["chromosome"] = pd.Series([1.0, 2] * 11 + ["X"], index=adata.var_names, dtype=object)
    adata.var["note"] = pd.Series([None] * 22 + ["odd"], index=adata.var_names, dtype=object)
    CellDataset.from_anndata(adata).save(tmp_path / "cells")
    cells = read_cells(tmp_path / "cells")
    assert np.array_equal(cells.X.toarray(), adata.X.toarray())
    assert cells.obs["batch"].tolist()[:50] == ["1"] * 30 + ["two"] * 20 and cells.obs["batch"].isna().sum() == 10
    assert cells.obs["doublet"].tolist()[:30] == [True] * 30 and cells.obs["doublet"].isna().sum() == 30
    assert [list(names) for names in cells.obs["markers"]] == [["a", "b"]] * 60
    assert cells.var["chromosome"].tolist() == ["1", "2"] * 11 + ["X"]
    assert cells.var["note"].isna().tolist() == [True] * 22 + [False]


def test_refuses_values_that_are_no_expression(adata):
    adata.X.data[0] = np.nan
    with pytest.raises(ValueError, match=r"adata\.X .* 1 NaN"):
        CellDataset.from_anndata(adata)


# -- files -------------------------------------------------------------------------------------------------------------


def test_reads_h5ad(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert_same_cells(read_cells(tmp_path / "cells.h5ad"), adata)


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default")  # anndata, on writing
def test_reads_zarr(adata, tmp_path):
    adata.write_zarr(tmp_path / "cells.zarr")
    assert_same_cells(read_cells(str(tmp_path / "cells.zarr")), adata)


def test_a_name_in_capitals_is_that_of_a_file(adata, tmp_path):
    (tmp_path / "cells").mkdir()
    path = tmp_path / "cells" / "C.H5AD"
    adata.write_h5ad(path)
    np.testing.assert_array_equal(read_cells(path).X.toarray(), adata.X.toarray())
    for source in (path, [path], path.parent, path.parent / "*"):
        assert len(CellDataset.open(source, cache_dir=tmp_path / "cache")) == adata.n_obs


def test_reads_a_saved_folder(adata, tmp_path):
    CellDataset.from_anndata(adata).save(tmp_path / "cells")
    assert_same_cells(read_cells(tmp_path / "cells"), adata)


DAYS = pd.to_datetime(["2026-01-02", "2026-01-01"])


@pytest.mark.parametrize(
    "labels",
    [DAYS, pd.Categorical(DAYS), DAYS.to_period("D"), pd.arrays.SparseArray([2, 1]), [1j, 2j], DAYS.tz_localize("UTC")],
    ids=["dates", "categories of dates", "periods", "sparse", "complex", "time zone"],
)
def test_labels_of_any_type_are_those_of_the_cells(adata, labels):
    adata.obs["label"] = pd.Series(labels).loc[np.resize([0, 1], adata.n_obs)].array
    cells = CellDataset.from_anndata(adata)
    fitted, _ = fit_dataset(cells.rows, cells.var, "label", flavor="all")
    assert fitted.conditions == SCRDiTProcessor.from_anndata(adata, "label", flavor="all").conditions
    assert fitted.label_counts["label"].keys() == {str(label) for label in pd.Series(labels)}


@pytest.mark.parametrize("label", [("a", "b"), ["a"], {"a": 1}, {"a"}, np.arange(2)], ids=lambda label: f"{label}")
def test_labels_of_several_parts_are_refused_by_the_name_of_the_column(adata, label):
    adata.obs["label"] = pd.Series([label] * 60, dtype=object).array
    cells = CellDataset.from_anndata(adata)
    with pytest.raises(ValueError, match=r"obs\['label'\].*map\(str"):
        cells.labels(["label"])
    with pytest.raises(ValueError, match=r"obs\['label'\].*map\(str"):
        fit_dataset(cells.rows, cells.var, "label", flavor="all")
    adata.obs["label"] = adata.obs["label"].map(str, na_action="ignore")
    assert set(CellDataset.from_anndata(adata).labels(["label"])["label"]) == {str(label)}


def test_columns_of_one_name_are_refused(adata):
    adata.obs = pd.concat([adata.obs, adata.obs[["batch"]]], axis=1)
    with pytest.raises(ValueError, match=r"obs .*\['batch'\]"):
        CellDataset.from_anndata(adata)


def test_a_folder_of_other_things_is_not_replaced(adata, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=str(tmp_path)):
        CellDataset.from_anndata(adata).save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_saves_the_layer_it_is_told_to(adata, tmp_path):
    CellDataset.from_anndata(adata, layer="lognorm").save(tmp_path / "cells")
    assert np.array_equal(read_cells(tmp_path / "cells").X.toarray(), adata.layers["lognorm"].toarray())


def test_what_is_saved_is_an_ordinary_dataset(adata, tmp_path):
    """What others read it with is `datasets` alone, and a Hub upload goes through parquet."""
    CellDataset.from_anndata(adata).save(tmp_path / "cells")
    rows = datasets.load_from_disk(str(tmp_path / "cells"))
    rows.to_parquet(str(tmp_path / "cells.parquet"))
    rows = datasets.Dataset.from_parquet(str(tmp_path / "cells.parquet"), cache_dir=str(tmp_path / "cache"))
    assert_same_cells(CellDataset(rows, adata.var).to_anndata(), adata)


@pytest.mark.parametrize("name", ["no.h5ad", "no.zarr", "no", "a/b/c"])
def test_missing_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^{name} "):
        read_cells(name)


@pytest.mark.parametrize("name", ["cells.csv", "folder"])
def test_files_of_another_kind(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.write_text("a,b")
    with pytest.raises(ValueError, match=rf"{name} .*CellDataset\.save"):
        read_cells(path)


# -- split -------------------------------------------------------------------------------------------------------------


def test_split_takes_its_share_of_every_combination(adata):
    stay, aside = split_cells(adata, ["cell_type", "batch"], 0.25, seed=0)
    assert sorted([*stay, *aside]) == list(range(60))
    groups = adata.obs.reset_index().groupby(["cell_type", "batch"], observed=True).indices
    assert {key: len(np.intersect1d(cells, aside)) for key, cells in groups.items()} == {
        key: round(0.25 * len(cells)) for key, cells in groups.items()
    }


def test_split_depends_on_the_seed_only(adata):
    first, second, other = (split_cells(adata, [], 0.25, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == second != other
    assert len(first) == 15


@pytest.mark.parametrize("fraction", [-0.2, 1, 1.5, float("nan")])
def test_split_refuses_what_is_no_share(adata, fraction):
    with pytest.raises(ValueError, match=rf"fraction .*{fraction}"):
        split_cells(adata, [], fraction, seed=0)


def test_split_refuses_missing_labels(adata):
    adata.obs.loc["cell3", "cell_type"] = np.nan
    with pytest.raises(ValueError, match=r"obs\['cell_type'\] .* 1 NaN"):
        split_cells(adata, ["cell_type"], 0.25, seed=0)


def test_split_of_a_dataset_is_that_of_the_cells(adata, tmp_path):
    dataset = CellDataset.open(write(adata, tmp_path / "cells.h5ad"))
    labels = ["cell_type", "batch"]
    for left, right in zip(
        split_cells(dataset.labels(labels), labels, 0.3, 0), split_cells(adata, labels, 0.3, 0), strict=True
    ):
        assert np.array_equal(left, right)


# -- datasets with tokens, streams -----------------------------------------------------------------------------------


@pytest.fixture
def tahoe(adata, tmp_path):
    """A folder laid out as tahoebio/Tahoe-100M: token ids from 3 on, and a special token 1 of value -2 first."""
    folder = tmp_path / "tahoe"
    (folder / "data").mkdir(parents=True)
    tokens = np.random.default_rng(0).permutation(23) + 3
    metadata = {"gene_symbol": adata.var_names, "ensembl_id": adata.var["gene_ids"], "token_id": tokens}
    (folder / "metadata").mkdir()
    pd.DataFrame(metadata).to_parquet(folder / "metadata" / "gene_metadata.parquet", index=False)
    for part, cells in enumerate(np.split(np.arange(60), 3)):
        rows = [adata.X[i] for i in cells]
        columns = {
            "genes": [[1, *tokens[row.indices].tolist()] for row in rows],
            "expressions": [[-2.0, *row.data.tolist()] for row in rows],
            "drug": adata.obs["cell_type"].iloc[cells].astype(str).tolist(),
            "plate": adata.obs["batch"].iloc[cells].tolist(),
        }
        path = folder / "data" / f"train-{part:05d}-of-00003.parquet"
        pq.write_table(
            pa.table(columns | {"expressions": pa.array(columns["expressions"], pa.list_(pa.float32()))}), path
        )
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: expression_data\n  default: true\n  data_files: data/train-*\n"
        "- config_name: gene_metadata\n  data_files: metadata/gene_metadata.parquet\n---\n"
    )
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_become_genes(adata, tahoe, tmp_path, streaming):
    dataset = CellDataset.open(tahoe, streaming=streaming, cache_dir=tmp_path / "cache")
    assert list(dataset.var.index) == list(adata.var_names)
    rows = pa.concat_tables(dataset.iterate(11, ["genes", "expressions"]))
    positions = token_positions(dataset.var, dataset.token_key)
    assert np.array_equal(rows_to_matrix(rows, len(dataset.var), positions).toarray(), adata.X.toarray())


def test_tokens_are_known_as_such_once_saved(adata, tahoe, tmp_path):
    CellDataset.open(tahoe, cache_dir=tmp_path / "cache").save(tmp_path / "saved")
    again = read_cells(tmp_path / "saved")
    assert np.array_equal(again.X.toarray(), adata.X.toarray()) and "token_id" in again.var


USER_COLUMNS = [
    *("token_id", "gene_symbol", "genes", "expressions", "var_names", "_index", "index", "__index_level_0__"),
    *("cell_id", "gene_metadata", "values", "class_labels", "counts", "library_size"),
]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr", "", ".stream"])
def test_no_column_of_a_user_changes_what_is_read(adata, tmp_path, monkeypatch, suffix):
    """Whatever it is called: tokens of a tokenizer, say, are no positions."""
    monkeypatch.setattr(cell_file, "ROWS_PER_CHUNK", 25)
    plain = SCRDiTProcessor.from_anndata(adata, "cell_type", flavor="all", gene_ids_key="gene_ids")
    expected = adata.copy()
    for i, key in enumerate(USER_COLUMNS):
        if key != "_index" or suffix not in (".h5ad", ".zarr"):  # which anndata does not write
            adata.var[key] = np.random.default_rng(i).permutation(23)
            if key not in ("genes", "expressions"):
                adata.obs[key] = np.random.default_rng(i).permutation(60)
    path = tmp_path / f"cells{suffix}"
    if suffix in (".h5ad", ".zarr"):
        write(adata, path)
    else:
        CellDataset.from_anndata(adata).save(path)
    dataset = CellDataset.open(path, streaming=suffix == ".stream", cache_dir=tmp_path / "cache")
    options = dict(flavor="all", gene_ids_key="gene_ids", token_key=dataset.token_key)
    processor, _ = fit_dataset(dataset.rows, dataset.var, "cell_type", **options)
    assert processor.to_json_string() == plain.to_json_string()
    rows = next(dataset.iterate(60, ["genes", "expressions", "cell_type"]))
    collate = CellCollator(processor, dataset.var, expect_counts=True, token_key=dataset.token_key)
    assert np.array_equal(collate(rows)["counts"].numpy(), expected.X.toarray())
    if suffix != ".stream":
        again = dataset.to_anndata()
        assert list(again.var_names) == list(adata.var_names)
        pd.testing.assert_frame_equal(again.var, adata.var, check_names=False)
        pd.testing.assert_frame_equal(again.obs.astype(str), adata.obs.reset_index(drop=True).rename(str).astype(str))


def test_rows_of_genes_that_the_vocabulary_lacks_are_refused(adata, tmp_path):
    CellDataset.from_anndata(adata).save(tmp_path / "cells")
    pd.read_parquet(tmp_path / "cells" / "var.parquet").iloc[:20].to_parquet(tmp_path / "cells" / "var.parquet")
    with pytest.raises(ValueError, match="vocabulary of 20 genes"):
        read_cells(tmp_path / "cells")


def test_genes_of_tokens_may_be_named_by_ensembl_id(adata, tahoe, tmp_path):
    dataset = CellDataset.open(tahoe, gene_key="ensembl_id", cache_dir=tmp_path / "cache")
    assert list(dataset.var.index) == list(adata.var["gene_ids"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_processor_learned_from_tokens_is_that_of_the_cells(adata, tahoe, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(fitting, "ROWS_PER_UPDATE", 13)
    dataset = CellDataset.open(tahoe, streaming=streaming, cache_dir=tmp_path / "cache")
    processor, _ = fit_dataset(dataset.rows, dataset.var, ["drug", "plate"], token_key="token_id", flavor="all")
    adata.obs = adata.obs.rename(columns={"cell_type": "drug", "batch": "plate"}).astype({"drug": str})
    expected = SCRDiTProcessor.from_anndata(adata, ["drug", "plate"], flavor="all")
    assert processor.composition == expected.composition
    assert processor.conditions == expected.conditions
    assert processor.gene_ids == expected.gene_ids
    np.testing.assert_allclose(processor.mean, expected.mean)
    rows = next(dataset.iterate(60, ["genes", "expressions", "drug", "plate"]))
    values = CellCollator(processor, dataset.var, True, dataset.token_key)(rows)["counts"]
    assert np.array_equal(values.numpy(), adata.X.toarray())


def test_an_unknown_token_is_refused(tahoe, tmp_path):
    dataset = CellDataset.open(tahoe, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"\d+ .* tokens .*\bvar .* \d+"):
        CellDataset(dataset.rows, dataset.var.iloc[:-3], dataset.token_key).to_anndata()


def test_integer_expressions_are_read():
    rows = pa.table({"genes": [[0, 2], [], [1]], "expressions": [[5, 1], [], [2]]})
    assert rows_to_matrix(rows, 3).toarray().tolist() == [[5, 0, 1], [0, 0, 0], [0, 2, 0]]


def test_a_folder_without_a_vocabulary_is_refused(tahoe, tmp_path):
    (tahoe / "README.md").unlink()
    with pytest.raises(ValueError, match=r"/tahoe .*var\.parquet .*gene_metadata"):
        CellDataset.open(tahoe, cache_dir=tmp_path / "cache")


def test_split_of_a_stream(adata, monkeypatch):
    monkeypatch.setattr(dataset_module, "ROWS_PER_CHUNK", 16)
    adata.obs["number"] = np.arange(60)
    stream = CellDataset(CellDataset.from_anndata(adata).rows.to_iterable_dataset(4), adata.var)

    def numbers(fraction, seed):
        parts = stream.split([], fraction, seed)
        return [[n for rows in part.iterate(9, ["number"]) for n in rows["number"].to_pylist()] for part in parts]

    stay, aside = numbers(0.3, 0)
    assert sorted(stay + aside) == list(range(60)) and 8 <= len(aside) <= 28
    assert numbers(0.3, 0) == [stay, aside] != numbers(0.3, 1)


def test_saving_fails_without_a_trace_and_replaces_what_was_there(adata, tmp_path, monkeypatch):
    CellDataset.from_anndata(adata).save(tmp_path / "cells")
    other = adata[:20].copy()
    with monkeypatch.context() as context:
        context.setattr(pq, "write_table", lambda *args: pytest.fail("no room"))
        with pytest.raises(pytest.fail.Exception):
            CellDataset.from_anndata(other).save(tmp_path / "cells")
    assert_same_cells(read_cells(tmp_path / "cells"), adata)
    CellDataset.from_anndata(other).save(tmp_path / "cells")
    assert_same_cells(read_cells(tmp_path / "cells"), other)
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]


def test_sample(adata):
    adata.obs["number"] = np.arange(60)
    dataset = CellDataset.from_anndata(adata)
    stream = CellDataset(dataset.rows.to_iterable_dataset(4), adata.var)

    def numbers(cells, seed=0):
        return cells.sample(20, ["number"], np.random.default_rng(seed))["number"].to_pylist()

    assert numbers(dataset) == sorted(np.random.default_rng(0).permutation(60)[:20]) != numbers(dataset, 1)
    assert numbers(stream) == list(range(20))
    for cells in (dataset, stream):
        assert cells.split([], 0, 0)[1].sample(20, ["number"], np.random.default_rng(0)).num_rows == 0


def test_a_stream_is_read_in_order_only(adata):
    stream = CellDataset(CellDataset.from_anndata(adata).rows.to_iterable_dataset(4), adata.var)
    assert stream.is_stream
    for read in (lambda: len(stream), lambda: stream.select([0]), lambda: stream.labels(["batch"]), stream.to_anndata):
        with pytest.raises(ValueError, match="streaming=False"):
            read()
