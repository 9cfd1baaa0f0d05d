"""Translation of cells to other labels: what stays, what becomes of the mean, library sizes, wrong input."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scrdit_diffusers import SCRDiTProcessor, SCRDiTTransformer, SCRDiTTranslatePipeline, count_bins
from scrdit_diffusers.cells.moments import CellMoments
from scrdit_diffusers.initialization import initialize_count_head

GENE = 5  # three times as high in batch b2


@pytest.fixture
def translate(count_pipe):
    """With a network that reads the noisy cell."""
    torch.manual_seed(1)
    for part in (count_pipe.transformer.proj_out, count_pipe.transformer.cell_out):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    translate = SCRDiTTranslatePipeline.from_pipe(count_pipe)
    translate.set_progress_bar_config(disable=True)
    return translate


@pytest.fixture
def batches(adata) -> ad.AnnData:
    """Cells of two batches that differ in one gene."""
    counts = np.tile(adata.X.toarray(), (10, 1))
    rng = np.random.default_rng(2)
    obs = adata.obs.iloc[np.tile(np.arange(60), 10)].set_axis([f"c{i}" for i in range(600)])
    obs["batch"] = rng.choice(["b1", "b2"], 600)
    counts[:, GENE] = rng.poisson(np.where(obs["batch"] == "b2", 9.0, 3.0))
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=adata.var.copy())


@pytest.fixture
def of_batches(translate, batches):
    """Without a network, of the cells of two batches."""
    processor = SCRDiTProcessor.from_anndata(batches, ["cell_type", "batch"], flavor="all")
    config = dict(translate.transformer.config) | {"count_bins": count_bins(batches.X)}
    model = SCRDiTTransformer.from_config(config).eval()
    translate.register_modules(processor=processor, transformer=model)
    for part in (model.proj_out, model.cell_out):
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    moments = CellMoments.from_counts(batches.X, processor.encode_labels(batches.obs))
    initialize_count_head(model.count_head, moments, processor.mean, processor.std)
    with torch.no_grad():  # as training would find; the rows of batches come after those of cell types
        for row, name in enumerate(processor.conditions["batch"]):
            mean = batches[batches.obs["batch"] == name].X[:, [GENE]].mean()
            model.count_head.class_log_mean[3 + row, GENE] = float(np.log(mean / batches.X[:, [GENE]].mean()))
        model.count_head.log_dispersion[GENE] = 5.0
    return translate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_it_shares_the_weights_of_a_loaded_pipeline(translate, count_pipe):
    assert translate.transformer is count_pipe.transformer and translate.processor is count_pipe.processor


def test_cells_with_the_target_labels_come_back_as_they_are(translate, adata):
    translated = translate(adata, {"batch": adata.obs["batch"].tolist()})
    assert np.array_equal(translated.X.toarray(), adata.X.toarray())
    assert (translated.obs["batch"] == adata.obs["batch"]).all()
    to_b1 = translate(adata, {"batch": "b1"}).X.toarray()
    same = (adata.obs["batch"] == "b1").to_numpy()
    assert np.array_equal(to_b1[same], adata.X.toarray()[same])
    assert not np.array_equal(to_b1[~same], adata.X.toarray()[~same])


def test_labels_change_and_everything_else_in_obs_and_var_stays(translate, adata):
    translated = translate(adata[:, ::-1].copy(), {"batch": "b2"})
    assert (translated.obs["batch"] == "b2").all() and list(translated.var_names) == list(adata.var_names)
    for key in ("cell_type", "age"):
        assert translated.obs[key].equals(adata.obs[key])
    assert translated.var["gene_ids"].equals(adata.var["gene_ids"])


def test_the_mean_becomes_that_of_the_target_and_cells_keep_their_ranks(of_batches, batches):
    source = batches[batches.obs["batch"] == "b1"].copy()
    real = batches[batches.obs["batch"] == "b2"].X.toarray()
    translated = of_batches(source, {"batch": "b2"}, timesteps=(999,), generator=seeded()).X.toarray()
    before = source.X.toarray()
    assert translated[:, GENE].mean() == pytest.approx(real[:, GENE].mean(), rel=0.1)
    np.testing.assert_allclose(translated.mean(axis=0), real.mean(axis=0), rtol=0.25, atol=0.15)
    assert np.corrcoef(before[:, GENE], translated[:, GENE])[0, 1] > 0.9
    others = [g for g in range(23) if g != GENE]
    correlations = [np.corrcoef(before[:, g], translated[:, g])[0, 1] for g in others]
    assert np.mean(correlations) > 0.8


def test_library_sizes_keep_their_rank(of_batches, batches):
    processor = of_batches.processor
    codes = processor.encode_labels(batches.obs)
    source, target = codes[[0]].repeat(3, axis=0), codes[[0]].repeat(3, axis=0)
    target[:, 1] = 1 - target[:, 1]
    levels = np.array([0.1, 0.5, 0.9])
    sizes = processor.sample_library_sizes(source, levels)
    found = of_batches.translate_library_size(sizes, source, target)
    np.testing.assert_allclose(found, processor.sample_library_sizes(target, levels), rtol=1e-3)
    largest = processor.sample_library_sizes(source[:1], np.array([1.0]))
    np.testing.assert_allclose(
        of_batches.translate_library_size(3 * largest, source[:1], target[:1]),
        3 * processor.sample_library_sizes(target[:1], np.array([1.0])),
    )


def test_the_network_takes_part_below_the_last_timestep(translate, adata):
    first, second = (
        translate(adata, {"batch": "b1"}, timesteps=timesteps, generator=seeded()).X.toarray()
        for timesteps in ((999,), (999, 100))
    )
    assert not np.array_equal(first, second)


def test_cells_depend_on_the_seed_only_and_batches_are_joined(translate, adata):
    a, b, c = (translate(adata, {"batch": "b1"}, generator=seeded(s)).X.toarray() for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert translate(adata, {"batch": "b1"}, batch_size=25).n_obs == 60


def test_no_cells_are_translated_to_none(translate, adata):
    assert translate(adata[:0].copy(), {"batch": "b1"}).shape == (0, 23)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"donor": "d1"}, "donor.*cell_type.*batch"),
        ({"batch": "b7"}, "b7.*b1"),
        ({"batch": ["b1", "b2"]}, "2 labels for 60"),
        ({"cell_type": [None] * 60}, "60 NaN"),
    ],
)
def test_unknown_targets_are_refused(translate, adata, target, message):
    with pytest.raises(ValueError, match=message):
        translate(adata, target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(timesteps=(1000,)), "timesteps.*1000"),
        (dict(timesteps=()), r"timesteps.*\[\]"),
        (dict(num_draws=0), "num_draws.*0"),
        (dict(batch_size=True), "batch_size.*True"),
        (dict(layer="lognorm"), "lognorm.*non-integers"),
    ],
)
def test_wrong_arguments_are_refused(translate, adata, arguments, message):
    with pytest.raises(ValueError, match=message):
        translate(adata, {"batch": "b1"}, **arguments)


def test_a_target_that_is_no_dict_is_refused(translate, adata):
    for target in ("b1", {}):
        with pytest.raises(TypeError, match="target"):
            translate(adata, target)


def test_cells_whose_own_labels_are_missing_are_refused(translate, adata):
    del adata.obs["cell_type"]
    with pytest.raises(ValueError, match=r"obs.*cell_type"):
        translate(adata, {"batch": "b1"})


def test_missing_genes_are_counted(translate, adata):
    with pytest.raises(ValueError, match="3 of the"):
        translate(adata[:, 3:].copy(), {"batch": "b1"})


def test_a_model_without_a_count_head_is_refused(pipe, adata):
    with pytest.raises(ValueError, match="count head"):
        SCRDiTTranslatePipeline.from_pipe(pipe)(adata, {"batch": "b1"})


def test_a_number_instead_of_timesteps_is_refused(translate, adata):
    with pytest.raises(TypeError, match="timesteps .*list.*got 999"):
        translate(adata, {"batch": "b1"}, timesteps=999)
