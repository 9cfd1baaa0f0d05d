"""States: groups of similar training cells as one more condition."""

import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from made_cells import blood_cells, chunked

from scrdit_diffusers import SCRDiTDenoisePipeline, SCRDiTPipeline, SCRDiTProcessor
from scrdit_diffusers.cells.fitting import FitOptions, fit_chunks
from scrdit_diffusers.cells.states import MIN_STATE_CELLS, choose_num_states, find_states
from scrdit_diffusers.processing_scrdit import RARE_LABEL_CELLS, STATE_KEY


@pytest.fixture(scope="module")
def grouped():
    """Cells of three kinds, and which they are: each has ten genes that are ten times as high in it."""
    rng = np.random.default_rng(0)
    kinds = np.repeat([0, 1, 2], [60, 50, 40])
    rates = np.ones((3, 40))
    for kind in range(3):
        rates[kind, 10 * kind : 10 * kind + 10] = 10
    counts = sp.csr_matrix(rng.poisson(rates[kinds]), dtype=np.float32)
    adata = ad.AnnData(counts, obs=pd.DataFrame({"kind": kinds.astype(str)}, index=[f"c{i}" for i in range(150)]))
    adata.var_names = [f"g{i}" for i in range(40)]
    return adata


def states_of(processor, adata):
    return processor.add_states(adata.obs, sp.csr_matrix(adata.X))[STATE_KEY].to_numpy()


def test_states_are_the_groups_that_there_are(grouped):
    processor = SCRDiTProcessor.from_anndata(grouped, flavor="all", num_states=3)
    table = pd.crosstab(states_of(processor, grouped), grouped.obs["kind"])
    assert sorted(table.max(axis=1)) == [40, 50, 60] and (table > 0).sum().sum() == 3
    assert processor.condition_keys == [STATE_KEY] and processor.labels_keys == []
    assert sorted(row[-1] for row in processor.composition) == [40, 50, 60]
    assert len(processor.log_library_sizes) == 3


def test_states_are_drawn_as_often_as_with_each_label(grouped):
    grouped.obs["half"] = np.where(grouped.obs["kind"] == "2", "b", "a")
    processor = SCRDiTProcessor.from_anndata(grouped, "half", flavor="all", num_states=3)
    assert processor.condition_keys == ["half", STATE_KEY] and len(processor.composition) == 3  # of 2 x 3
    codes = processor.sample_labels(110, {"half": "a"}, (np.arange(110) + 0.5) / 110)
    assert sorted(np.unique(codes[:, 1], return_counts=True)[1]) == [50, 60]


@pytest.mark.parametrize("smallest", [MIN_STATE_CELLS, RARE_LABEL_CELLS], ids=["few cells", "many cells"])
def test_small_groups_join_others(grouped, smallest, caplog):
    others = np.tile(np.r_[0:110], 2 if smallest > MIN_STATE_CELLS else 1)
    few = grouped[np.r_[others, 110 : 110 + smallest - 1]]
    few = ad.AnnData(few.X, var=few.var)
    processor = SCRDiTProcessor.from_anndata(few, flavor="all", num_states=3)
    assert "2 states instead of 3" in caplog.text
    assert len(processor.state_profiles) == 2 and sum(row[-1] for row in processor.composition) == few.n_obs


def test_states_do_not_depend_on_chunks_and_survive_saving(grouped, tmp_path):
    options = FitOptions(flavor="all", num_states=3)
    whole, _ = fit_chunks(chunked(grouped.X, grouped.obs, 150), grouped.var, options=options)
    parts, _ = fit_chunks(chunked(grouped.X, grouped.obs, 17), grouped.var, options=options)
    np.testing.assert_array_equal(whole.state_profiles, parts.state_profiles)
    whole.save_pretrained(tmp_path)
    again = SCRDiTProcessor.from_pretrained(tmp_path)
    assert list(states_of(again, grouped)) == list(states_of(whole, grouped))


def test_a_panel_suffices(grouped):
    processor = SCRDiTProcessor.from_anndata(grouped, flavor="all", num_states=3)
    panel = np.zeros(40, dtype=bool)
    panel[[0, 1, 2, 10, 11, 12, 20, 21, 22]] = True
    counts = sp.csr_matrix(grouped.X.toarray() * panel)
    assert (processor.add_states(grouped.obs, counts, panel)[STATE_KEY] == states_of(processor, grouped)).mean() > 0.95


def test_given_states_are_kept(grouped):
    processor = SCRDiTProcessor.from_anndata(grouped, flavor="all", num_states=3)
    obs = grouped.obs.assign(**{STATE_KEY: "1"})
    assert processor.add_states(obs, sp.csr_matrix(grouped.X)) is obs


@pytest.mark.parametrize(
    "num_cells, expected", [(31, 0), (32, 2), (199, 12), (200, 4), (640, 6), (2300, 12), (10**6, 20)]
)
def test_the_number_of_states_grows_with_the_cells(num_cells, expected):
    assert choose_num_states(num_cells) == expected


def test_no_states_in_one_kind_of_cell():
    assert find_states(sp.csr_matrix(np.ones((100, 5))), 0).shape == (0, 5)


def test_damaged_states_are_refused(grouped):
    processor = SCRDiTProcessor.from_anndata(grouped, flavor="all", num_states=3).to_dict()
    names = ("feature_extractor_type", "processor_class")
    settings = {name: value for name, value in processor.items() if name not in names}
    with pytest.raises(ValueError, match="state_profiles.*2 rows"):
        SCRDiTProcessor(**settings | {"state_profiles": settings["state_profiles"][:2]})
    with pytest.raises(ValueError, match="state_library_size"):
        SCRDiTProcessor(**settings | {"state_library_size": 0.0})


def test_moments_of_states_that_occur_are_kept(grouped):
    """Library sizes and sums follow the states, of which one has no cell with one of the labels."""
    grouped.obs["half"] = np.where(grouped.obs["kind"] == "2", "b", "a")
    processor, moments = fit_chunks(
        chunked(grouped.X, grouped.obs, 40), grouped.var, "half", options=FitOptions(flavor="all", num_states=3)
    )
    table = processor.encode_labels(processor.add_states(grouped.obs, grouped.X))
    for i, codes in enumerate(moments.combinations):
        rows = (table == codes).all(axis=1)
        np.testing.assert_allclose(moments.count_sum[i], grouped.X.toarray()[rows].sum(axis=0))
        sizes = np.log(grouped.X.toarray()[rows].sum(axis=1))
        assert processor.log_library_sizes[i][0] == pytest.approx(sizes.min(), abs=1e-3)
        assert processor.log_library_sizes[i][-1] == pytest.approx(sizes.max(), abs=1e-3)


def test_the_package_is_imported_without_scikit_learn():
    code = "import sys; sys.modules['sklearn'] = None; import scrdit_diffusers; scrdit_diffusers.SCRDiTPipeline"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_name_of_the_condition_is_taken(grouped):
    cells = grouped.copy()
    cells.obs[STATE_KEY] = "x"
    with pytest.raises(ValueError, match=STATE_KEY):
        SCRDiTProcessor.from_anndata(cells, STATE_KEY)


def test_training_without_labels_finds_states_and_jobs_use_them(tmp_path, monkeypatch, train_here):
    monkeypatch.chdir(tmp_path)
    cells = blood_cells()
    cells.write_h5ad("cells.h5ad")
    train_here("cells.h5ad", "model")
    pipe = SCRDiTPipeline.from_pretrained("model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.processor.condition_keys == [STATE_KEY]
    adata = pipe(20, num_inference_steps=2, generator=torch.manual_seed(0)).adata
    assert set(adata.obs[STATE_KEY]) <= set(pipe.processor.conditions[STATE_KEY])
    assert pipe(obs=cells.obs[:7], num_inference_steps=2).adata.n_obs == 7  # which has no state
    denoised = SCRDiTDenoisePipeline.from_pipe(pipe)(cells[:5], num_draws=1, generator=torch.manual_seed(0))
    assert denoised.shape == (5, 30)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "states" in card and "no labels" in card and f"`{STATE_KEY}` |" not in card
    # Fine-tuning keeps the states: new cells join them.
    more = ("--pretrained_model_name_or_path", "model")
    train_here("cells.h5ad", "tuned", *more)
    tuned = SCRDiTPipeline.from_pretrained("tuned").processor
    np.testing.assert_array_equal(tuned.state_profiles, pipe.processor.state_profiles)
    with pytest.raises(ValueError, match="num_states"):
        train_here("cells.h5ad", "other", "--num_states", "3", *more)
