"""Paths between cells and labels: their ends, what lies between, wrong input."""

import anndata as ad
import numpy as np
import pytest
import torch

from scrdit_diffusers import SCRDiTInterpolatePipeline, SCRDiTTranslatePipeline


@pytest.fixture
def interpolate(count_pipe):
    interpolate = SCRDiTInterpolatePipeline.from_pipe(count_pipe)
    interpolate.set_progress_bar_config(disable=True)
    return interpolate


@pytest.fixture
def marginal(interpolate):
    """With a network that adds nothing to what labels and library size say, and labels that differ."""
    model = interpolate.transformer
    with torch.no_grad():
        for part in (model.proj_out, model.cell_out):
            for parameter in part.parameters():
                parameter.zero_()
        model.count_head.class_log_mean.normal_(std=0.7, generator=seeded())
        model.count_head.class_log_dispersion.zero_()
        model.count_head.log_base.zero_()
    return interpolate


@pytest.fixture
def ends(adata):
    """Thirty cells and thirty others."""
    return adata[:30].copy(), adata[30:].copy()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_it_shares_the_weights_of_a_loaded_pipeline(interpolate, count_pipe):
    assert interpolate.transformer is count_pipe.transformer and interpolate.processor is count_pipe.processor


def test_the_ends_are_the_cells(interpolate, ends):
    path = interpolate(*ends, positions=(0, 0.5, 1), generator=seeded())
    for position, cells in zip((0, 1), ends, strict=True):
        there = path[path.obs["position"] == position]
        assert np.array_equal(there.X.toarray(), cells.X.toarray())
    assert list(path.obs["start"]) == 3 * list(ends[0].obs_names)
    assert list(path.obs["end"]) == 3 * list(ends[1].obs_names)
    assert path.obs_names.is_unique and path.var["gene_ids"].equals(ends[0].var["gene_ids"])


def test_near_the_ends_the_formula_gives_the_cells_too(marginal, ends):
    """Positions that are not quite 0 and 1 are not copied."""
    path = marginal(*ends, positions=(1e-7, 1 - 1e-7), generator=seeded())
    for position, cells in zip((1e-7, 1 - 1e-7), ends, strict=True):
        there = path[path.obs["position"] == position].X.toarray()
        assert np.mean(there == cells.X.toarray()) > 0.99


def test_means_lie_between_those_of_the_ends(marginal, adata):
    adata.obs["batch"] = "b1"
    path = marginal(adata, {"batch": "b2"}, positions=(0, 0.5, 1), generator=seeded()).X.toarray()
    first, middle, last = path.reshape(3, 60, 23).mean(axis=1) + 1e-6
    strong = (np.abs(np.log(last / first)) > 0.5) & (first + last > 1)
    assert strong.sum() >= 5
    share = np.log(middle / first)[strong] / np.log(last / first)[strong]
    assert share.min() > 0.1 and share.max() < 0.9 and share.mean() == pytest.approx(0.5, abs=0.1)


def test_counts_on_the_path_are_spread_like_real_ones(marginal, adata):
    """Between cells that follow the model, scores stay standard normal; the mean of two has half their variance."""
    rng = np.random.default_rng(0)
    obs = adata.obs.iloc[rng.integers(0, 60, 400)].set_axis([f"c{i}" for i in range(400)])
    cells = ad.AnnData(np.ones((400, 23), np.float32), obs=obs, var=adata.var)
    codes = torch.from_numpy(marginal.processor.encode_labels(cells.obs))
    sizes = torch.full((400,), 60.0)
    posterior = marginal.transformer.count_head(codes, sizes)
    probabilities = posterior.probabilities(posterior.log_mean)
    k = posterior.quantile(probabilities, torch.rand(400, 23, generator=seeded())).detach()
    cells.X = k.numpy()
    middle = marginal(cells, cells[::-1].copy(), positions=(0.5,), generator=seeded()).X.toarray()
    variance = {name: np.log1p(x).var(axis=0).mean() for name, x in {"real": k.numpy(), "path": middle}.items()}
    straight = np.log1p((k.numpy() + k.numpy()[::-1]) / 2).var(axis=0).mean()
    assert straight < 0.75 * variance["real"] and variance["path"] > 0.85 * variance["real"]


def test_a_path_to_labels_ends_in_the_translated_cell(marginal, adata):
    marginal.processor.log_library_sizes = []  # translation then keeps library sizes, as a path does
    translate = SCRDiTTranslatePipeline(marginal.transformer, marginal.processor)
    translate.set_progress_bar_config(disable=True)
    path = marginal(adata, {"batch": "b2"}, positions=(0, 0.5, 1), generator=seeded())
    translated = translate(adata, {"batch": "b2"}, timesteps=(999,), generator=seeded()).X.toarray()
    assert np.array_equal(path[path.obs["position"] == 0].X.toarray(), adata.X.toarray())
    assert np.mean(path[path.obs["position"] == 1].X.toarray() == translated) > 0.99
    assert "end" not in path.obs


def test_paths_depend_on_the_seed_only_and_batches_are_joined(interpolate, ends):
    a, b, c = (interpolate(*ends, positions=(0.5,), generator=seeded(s)).X.toarray() for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    path = interpolate(*ends, positions=(0, 0.5), batch_size=7)
    assert np.array_equal(path[:30].X.toarray(), ends[0].X.toarray()) and path.n_obs == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(positions=()), r"positions.*\[\]"),
        (dict(positions=(0, 2)), "positions.*2"),
        (dict(num_draws=0), "num_draws.*0"),
        (dict(batch_size=True), "batch_size.*True"),
        (dict(layer="lognorm"), "lognorm.*non-integers"),
    ],
)
def test_wrong_arguments_are_refused(interpolate, ends, arguments, message):
    with pytest.raises(ValueError, match=message):
        interpolate(*ends, **arguments)


def test_a_number_instead_of_positions_is_refused(interpolate, ends):
    with pytest.raises(TypeError, match="positions .*list.*got 5"):
        interpolate(*ends, positions=5)


def test_ends_that_do_not_fit_are_refused(interpolate, ends):
    with pytest.raises(ValueError, match="end.*29.*30"):
        interpolate(ends[0], ends[1][1:].copy())
    with pytest.raises(ValueError, match="donor.*batch"):
        interpolate(ends[0], {"donor": "d1"})
    with pytest.raises(ValueError, match="b7"):
        interpolate(ends[0], {"batch": "b7"})
    with pytest.raises(TypeError, match="end"):
        interpolate(ends[0], "b1")
    with pytest.raises(TypeError, match="start"):
        interpolate("cells", ends[1])
    del ends[1].obs["batch"]
    with pytest.raises(ValueError, match=r"end.obs.*batch"):
        interpolate(*ends)


def test_missing_genes_are_counted(interpolate, ends):
    with pytest.raises(ValueError, match="3 of the"):
        interpolate(ends[0], ends[1][:, 3:].copy())


def test_a_model_without_a_count_head_is_refused(pipe, ends):
    with pytest.raises(ValueError, match="count head"):
        SCRDiTInterpolatePipeline.from_pipe(pipe)(*ends)
