"""Augmentation: how many cells of which label, and what tells real from new ones."""

import numpy as np
import pytest
import torch

from scrdit_diffusers import augment


def test_labels_grow_to_the_number_asked_for(count_pipe, adata):
    numbers = adata.obs["cell_type"].value_counts()
    both = augment(count_pipe, adata, "cell_type", to=25, generator=torch.manual_seed(0))
    assert both.obs["cell_type"].value_counts().to_dict() == numbers.clip(lower=25).to_dict()
    real = both[~both.obs["synthetic"].astype(bool)]
    assert np.array_equal(real.X.toarray(), adata.X.toarray()) and list(real.obs_names) == list(adata.obs_names)
    assert real.obs["age"].equals(adata.obs["age"]) and both.obs["age"].isna().sum() == both.n_obs - adata.n_obs


def test_only_named_labels_grow(count_pipe, adata):
    before = adata.obs["cell_type"].value_counts()
    both = augment(count_pipe, adata, "cell_type", to={"NK": before["NK"] + 3}, generator=torch.manual_seed(0))
    new = both[both.obs["synthetic"].astype(bool)]
    assert new.n_obs == 3 and set(new.obs["cell_type"]) == {"NK"}


def test_genes_follow_the_model(count_pipe, adata):
    both = augment(count_pipe, adata[:, ::-1].copy(), "cell_type", to=25, generator=torch.manual_seed(0))
    assert list(both.var_names) == count_pipe.processor.var_names
    assert np.array_equal(both.X[:60].toarray(), adata.X.toarray())


def test_columns_keep_types_that_files_can_hold(count_pipe, adata, tmp_path):
    """Labels that are numbers meet the model's, which are text; truth values are missing for new cells."""
    count_pipe.processor.condition_categories[1] = ["8", "9"]
    adata.obs["batch"] = adata.obs["batch"].map({"b1": 8, "b2": 9})
    adata.obs["checked"] = adata.obs["age"] > 50
    both = augment(count_pipe, adata, "cell_type", to=25, generator=torch.manual_seed(0))
    both.write_h5ad(tmp_path / "both.h5ad")
    assert set(both.obs["batch"]) == {"8", "9"} and list(both.obs["cell_type"].cat.categories) == ["T", "B", "NK"]
    assert (both.obs["checked"][:60] == adata.obs["checked"]).all() and both.obs["checked"][60:].isna().all()


def test_values_come_from_the_layer_and_must_be_what_the_model_was_trained_on(count_pipe, adata):
    adata.X = adata.layers["lognorm"]
    both = augment(count_pipe, adata, "cell_type", to=25, layer="counts", generator=torch.manual_seed(0))
    assert np.array_equal(both.X[:60].toarray(), adata.layers["counts"].toarray())
    with pytest.raises(ValueError, match="adata.X.*non-integers"):
        augment(count_pipe, adata, "cell_type", to=25)


@pytest.mark.parametrize(
    ("labels_key", "to", "message"),
    [
        ("celltype", 25, "labels_key.*'celltype'"),
        ("cell_type", {"Mast": 9}, "Mast"),
        ("cell_type", {"NK": 0}, "NK.*0"),
        ("cell_type", 12.5, r"to .*whole number.*12\.5"),
        ("cell_type", 1, "to: "),
    ],
)
def test_wrong_requests_are_refused(count_pipe, adata, labels_key, to, message):
    with pytest.raises(ValueError, match=message):
        augment(count_pipe, adata, labels_key, to=to)


def test_generated_cells_stay_marked_and_names_unique(count_pipe, adata):
    once = augment(count_pipe, adata, "cell_type", to=25, generator=torch.manual_seed(0))
    twice = augment(count_pipe, once, "cell_type", to=30, generator=torch.manual_seed(1))
    assert list(twice.obs["synthetic"][: once.n_obs]) == list(once.obs["synthetic"])
    assert twice.obs["synthetic"][once.n_obs :].all() and twice.obs_names.is_unique
    assert twice.n_obs > once.n_obs and once.obs["synthetic"].sum() == once.n_obs - adata.n_obs


def test_a_column_of_another_meaning_is_not_overwritten(count_pipe, adata):
    adata.obs["synthetic"] = "no"
    with pytest.raises(ValueError, match=r"adata\.obs\['synthetic'\] .*'no'.*rename"):
        augment(count_pipe, adata, "cell_type", to=25)
