"""The space of evaluation: scanpy and scikit-learn as oracles."""

import numpy as np
import pytest
import scanpy as sc
from made_cells import blood_split
from sklearn.decomposition import PCA

from scrdit_diffusers.evaluation.space import EvaluationSpace


@pytest.fixture(scope="module")
def split():
    return blood_split()


def test_space_agrees_with_scanpy(split):
    train = split["train"].copy()
    sc.pp.normalize_total(train, target_sum=1e4)
    sc.pp.log1p(train)
    expected = PCA(10, svd_solver="full").fit_transform(train.X.toarray())
    coordinates = EvaluationSpace(split["train"], n_comps=10).transform(split["train"])
    np.testing.assert_allclose(np.abs(coordinates), np.abs(expected), atol=2e-3)


def test_space_chooses_highly_variable_genes_of_train(split):
    space = EvaluationSpace(split["train"], n_top_genes=50, n_comps=5)
    assert len(space.columns) == 50 and space.transform(split["real"]).shape == (130, 5)
