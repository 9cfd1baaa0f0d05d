"""The pipeline: outputs, reproducibility, refusals and saving."""

import logging

import anndata as ad
import diffusers
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from diffusers import DDIMScheduler

from scrdit_diffusers import (
    SCRDiTPipeline,
    SCRDiTPipelineOutput,
    SCRDiTProcessor,
    SCRDiTTransformer,
    count_bins,
    default_scheduler,
    pipeline_scrdit,
)
from scrdit_diffusers.cells.moments import CellMoments
from scrdit_diffusers.count_head import CountPosterior
from scrdit_diffusers.initialization import initialize_count_head
from scrdit_diffusers.transformer_scrdit import SCRDiTTransformerOutput


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def constant(value):
    """Forward pass of a transformer that always predicts the same."""
    return lambda x, **kwargs: SCRDiTTransformerOutput(sample=torch.full_like(x, value))


def swap(pipe, name, prediction_type="epsilon"):
    """The one-line swap that users write, from the scheduler of a model with this prediction type."""
    pipe.__init__(pipe.transformer, default_scheduler(prediction_type, "linear"), pipe.processor)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    return pipe


# -- output ------------------------------------------------------------------------------------------------------------


def test_anndata_output(pipe, adata):
    cells = pipe(num_cells=12, generator=seeded(), num_inference_steps=3).adata
    assert cells.shape == (12, 23)
    assert isinstance(cells.X, sp.csr_matrix)
    assert cells.X.dtype == np.float32
    assert np.array_equal(cells.X.data, np.rint(cells.X.data))
    assert (cells.X.data > 0).all()
    assert np.array_equal(cells.layers["counts"].toarray(), cells.X.toarray())
    assert list(cells.var_names) == list(adata.var_names)
    assert list(cells.var["gene_ids"]) == list(adata.var["gene_ids"])
    assert cells.obs_names.is_unique
    assert cells.obs["synthetic"].dtype == bool
    assert cells.obs["synthetic"].all()
    assert list(cells.obs["cell_type"].cat.categories) == ["T", "B", "NK"]
    assert list(cells.obs["batch"].cat.categories) == ["b1", "b2"]


def test_counts_layer_is_a_copy(pipe):
    cells = pipe(num_cells=2, num_inference_steps=2).adata
    cells.X.data[:] = -1
    assert (cells.layers["counts"].data > 0).all()


def test_uns_describes_the_call(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    uns = pipe(num_cells=2, generator=seeded(7), num_inference_steps=4, guidance_scale=2, eta=0.5).adata.uns["scrdit"]
    expected = dict(scheduler="DDIMScheduler", num_inference_steps=4, guidance_scale=2.0, eta=0.5, seed=7)
    assert uns.items() >= (expected | dict(value_space="counts", model="")).items()


def test_output_survives_h5ad(pipe, generators, tmp_path):
    cells = pipe(num_cells=3, generator=generators(3), num_inference_steps=2).adata
    cells.write_h5ad(tmp_path / "cells.h5ad")
    back = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert np.array_equal(back.X.toarray(), cells.X.toarray())
    pd.testing.assert_frame_equal(back.obs, cells.obs)
    assert list(back.uns["scrdit"]["seed"]) == [0, 1, 2]
    assert {k: v for k, v in back.uns["scrdit"].items() if k != "seed"}.items() <= cells.uns["scrdit"].items()


def test_large_seeds_are_recorded_exactly(pipe, tmp_path):
    seeds = [2**63 + 12345, 1, 2**64 - 1]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipe(num_cells=3, num_inference_steps=1, generator=generators).adata.write_h5ad(tmp_path / "cells.h5ad")
    assert [int(seed) for seed in ad.read_h5ad(tmp_path / "cells.h5ad").uns["scrdit"]["seed"]] == seeds


@pytest.mark.parametrize("output_type", ["np", "pt", "latent"])
def test_other_output_types(pipe, output_type):
    kwargs = dict(num_cells=5, num_inference_steps=3, latents=torch.randn(5, 23, generator=seeded()))
    cells = pipe(**kwargs, generator=seeded()).adata
    output = pipe(**kwargs, generator=seeded(), output_type=output_type)
    assert isinstance(output, SCRDiTPipelineOutput)
    assert output.adata is None
    pd.testing.assert_frame_equal(output.obs, cells.obs.drop(columns="synthetic"))
    assert isinstance(output.samples, np.ndarray if output_type == "np" else torch.Tensor)
    samples = np.asarray(output.samples)
    assert samples.dtype == np.float32
    values = pipe.processor.inverse_transform(samples) if output_type == "latent" else samples
    assert np.array_equal(values, cells.X.toarray())


@pytest.mark.parametrize("output_type", ["anndata", "np", "pt", "latent"])
def test_return_dict_false_gives_a_tuple(pipe, output_type):
    kwargs = dict(num_cells=2, num_inference_steps=2, output_type=output_type)
    output = pipe(**kwargs, generator=seeded(), return_dict=False)
    assert isinstance(output, tuple)
    expected = pipe(**kwargs, generator=seeded())
    expected = expected.adata.X.toarray() if output_type == "anndata" else expected.samples
    first = output[0].X.toarray() if output_type == "anndata" else output[0]
    assert np.array_equal(np.asarray(first), np.asarray(expected))


@pytest.fixture
def log_pipe(adata, count_model):
    """The count pipeline for log-normalized values of the same cells, with a fourth of the genes left out."""

    def make(layer="lognorm", genes=None, **options):
        options |= dict(value_space="log_normalized", recover_counts=True, genes=genes, flavor="all")
        processor = SCRDiTProcessor.from_anndata(adata, ["cell_type", "batch"], layer, **options)
        counts, _ = processor.get_counts(adata, layer)
        config = dict(count_model.config) | dict(num_genes=processor.num_genes, count_bins=count_bins(counts))
        torch.manual_seed(0)
        model = SCRDiTTransformer.from_config(config).eval()
        codes = processor.encode_labels(adata.obs)
        initialize_count_head(model.count_head, CellMoments.from_counts(counts, codes), processor.mean, processor.std)
        pipe = SCRDiTPipeline(model, default_scheduler(), processor, decode_timestep=50)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def test_log_normalized_output_of_a_count_model(log_pipe, adata):
    """Values are log1p(10,000 counts / library size), the counts stay, and library sizes are over all genes."""
    pipe = log_pipe(genes=list(adata.var_names[:17]))
    sizes = np.linspace(50, 90, 12)
    options = dict(library_size=sizes, num_inference_steps=3)
    cells = pipe(**options, generator=seeded()).adata
    counts = cells.layers["counts"].toarray()
    assert np.array_equal(counts, np.rint(counts)) and counts.max() > 1 and cells.X.dtype == np.float32
    np.testing.assert_allclose(cells.X.toarray(), np.log1p(1e4 * counts / sizes[:, None]), rtol=1e-5)
    assert not np.allclose(counts.sum(axis=1), sizes, rtol=0.05)
    values = pipe(**options, generator=seeded(), output_type="np").samples
    assert np.array_equal(values, cells.X.toarray())


def test_log_normalized_output_over_all_genes_has_their_sum(log_pipe):
    cells = log_pipe()(num_cells=12, num_inference_steps=3, generator=seeded()).adata
    np.testing.assert_allclose(np.expm1(cells.X.toarray().astype(np.float64)).sum(axis=1), 1e4, rtol=1e-4)


def test_output_of_a_count_model_for_values_that_are_no_counts(log_pipe, adata):
    adata.layers["tpm"] = adata.layers["lognorm"].multiply(np.linspace(0.3, 1, 23)).tocsr()
    pipe = log_pipe("tpm")
    assert pipe.processor.value_step is not None
    cells = pipe(num_cells=40, num_inference_steps=3, generator=seeded()).adata
    assert "counts" not in cells.layers
    smallest = adata.layers["tpm"].toarray().min(axis=0, where=adata.layers["tpm"].toarray() > 0, initial=99)
    assert (cells.X.toarray() >= smallest - 1e-5)[cells.X.toarray() > 0].all()
    assert adata.layers["tpm"].max() * 1.2 > cells.X.max() > 1
    with pytest.raises(ValueError, match="^library_size .*scaled counts"):
        pipe(library_size=100)


def test_a_processor_of_counts_needs_a_count_head(log_pipe, model):
    pipe = SCRDiTPipeline(model, default_scheduler(), log_pipe().processor)
    with pytest.raises(ValueError, match="processor .*count head; .*transformer"):
        pipe(2)


def test_log_normalized_output_has_no_counts(adata, model):
    processor = SCRDiTProcessor.from_anndata(
        adata, ["cell_type", "batch"], "lognorm", value_space="log_normalized", zero_negation=True, flavor="all"
    )
    pipe = SCRDiTPipeline(model, default_scheduler(), processor)
    pipe.set_progress_bar_config(disable=True)
    cells = pipe(num_cells=20, num_inference_steps=3, generator=seeded()).adata
    assert "counts" not in cells.layers
    assert cells.uns["scrdit"]["value_space"] == "log_normalized"
    assert (cells.X.data > 0).all()
    assert not np.array_equal(cells.X.data, np.rint(cells.X.data))
    assert cells.X.nnz < cells.X.shape[0] * cells.X.shape[1]


def test_all_zero_cells_warn(pipe, monkeypatch, caplog):
    monkeypatch.setattr(pipe.transformer, "forward", constant(-100.0))
    with caplog.at_level(logging.WARNING):
        cells = pipe(num_cells=3, num_inference_steps=2).adata
    assert cells.X.nnz == 0
    assert "3 of 3 cells have no expressed gene" in caplog.text


def test_ordinary_cells_do_not_warn(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe(num_cells=3, num_inference_steps=2, generator=seeded())
    assert "no expressed gene" not in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_from_the_model_is_an_error(pipe, monkeypatch, value):
    monkeypatch.setattr(pipe.transformer, "forward", constant(value))
    with pytest.raises(ValueError, match="NaN .*dtype"):
        pipe(num_cells=2, num_inference_steps=2)


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def labels(pipe):
    """Ask the pipeline for cells and give back the labels it made them with."""

    def ask(**kwargs):
        return pipe(num_inference_steps=1, generator=seeded(), output_type="latent", **kwargs).obs

    return ask


def test_one_label_for_all_cells(labels):
    obs = labels(num_cells=4, conditions={"cell_type": "B", "batch": "b2"})
    assert obs.astype(str).to_numpy().tolist() == [["B", "b2"]] * 4


def test_a_list_of_labels_sets_the_number_of_cells(labels):
    obs = labels(conditions={"cell_type": ["NK", "T", "B"], "batch": "b1"})
    assert list(obs["cell_type"]) == ["NK", "T", "B"]
    assert list(obs["batch"]) == ["b1"] * 3


def test_a_row_of_obs_for_each_cell(labels, adata):
    obs = labels(obs=adata.obs)
    assert list(obs["cell_type"]) == list(adata.obs["cell_type"])
    assert list(obs["batch"]) == list(adata.obs["batch"])


def test_missing_columns_of_obs_are_drawn(labels, adata):
    obs = labels(obs=adata.obs[["cell_type", "age"]])
    assert list(obs["cell_type"]) == list(adata.obs["cell_type"])
    assert set(obs["batch"]) == {"b1", "b2"}


def test_without_conditions_labels_follow_the_training_composition(labels, adata):
    obs = labels(num_cells=4000, batch_size=4000)
    for key in ("cell_type", "batch"):
        drawn, trained = (frame[key].value_counts(normalize=True) for frame in (obs, adata.obs))
        assert (drawn - trained[drawn.index]).abs().max() < 0.03


@pytest.mark.parametrize("kwargs", [{}, {"latents": torch.zeros(3, 23)}])
def test_number_of_cells_when_it_is_left_out(labels, kwargs):
    assert len(labels(**kwargs)) == (3 if kwargs else 1)


def test_the_model_gets_the_codes_of_the_labels(pipe, monkeypatch, adata):
    seen = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: seen.append(k["class_labels"]) or forward(*a, **k))
    pipe(obs=adata.obs, num_inference_steps=1, batch_size=25)
    assert np.array_equal(torch.cat(seen).numpy(), pipe.processor.encode_labels(adata.obs))


def test_unconditional_pipeline(adata):
    torch.manual_seed(0)
    pipe = SCRDiTPipeline(
        SCRDiTTransformer(num_genes=23, patch_size=5, num_layers=1),
        default_scheduler(),
        SCRDiTProcessor.from_anndata(adata, flavor="all"),
    )
    pipe.set_progress_bar_config(disable=True)
    cells = pipe(num_cells=3, num_inference_steps=2).adata
    assert list(cells.obs) == ["synthetic"]
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 .*conditions"):
        pipe(guidance_scale=2.0)


# -- guidance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@torch.no_grad()
def test_guidance_is_uncond_plus_scale_times_difference(pipe, scale):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    codes, null = torch.tensor([[1, 0], [2, 1]]), torch.tensor([[3, 2], [3, 2]])
    latents = torch.randn(2, 23, generator=seeded())
    conditions = {"cell_type": ["B", "NK"], "batch": ["b1", "b2"]}
    kwargs = dict(conditions=conditions, latents=latents, num_inference_steps=3, output_type="latent")
    samples = pipe(**kwargs, guidance_scale=scale).samples

    scheduler, x = DDIMScheduler.from_config(pipe.scheduler.config), latents
    scheduler.set_timesteps(3)
    for t in scheduler.timesteps:
        cond, uncond = (pipe.transformer(x, t, labels).sample for labels in (codes, null))
        x = scheduler.step(scale * cond + (1 - scale) * uncond, t, x).prev_sample
    torch.testing.assert_close(samples, x, rtol=1e-4, atol=1e-4)


def test_no_guidance_evaluates_the_network_once_per_cell(pipe, monkeypatch):
    rows = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda x, **k: rows.append(len(x)) or forward(x, **k))
    pipe(num_cells=5, batch_size=2, num_inference_steps=1)
    pipe(num_cells=5, batch_size=2, num_inference_steps=1, guidance_scale=1.5)
    assert rows == [2, 2, 1, 4, 4, 2]


# -- counts from the likelihood ----------------------------------------------------------------------------------------


def test_counts_are_drawn_at_the_decode_timestep(count_pipe, monkeypatch):
    """The network is called as often as asked for, never far below, and its last means are those of the counts."""
    seen = []

    def forward(x, timestep, **kwargs):
        seen.append(timestep[0].item())
        log_mean = torch.full_like(x, 1.0 if len(seen) == 6 else 20.0)
        return SCRDiTTransformerOutput(torch.zeros_like(x), log_mean)

    monkeypatch.setattr(count_pipe.transformer, "forward", forward)
    means = []
    monkeypatch.setattr(CountPosterior, "sample", lambda _, m, *args: means.append(m) or m.exp().floor())
    cells = count_pipe(num_cells=3, num_inference_steps=6, generator=seeded()).adata
    assert len(seen) == 6
    assert min(seen) >= 49
    assert (means[0] == 1).all() and (cells.X.toarray() == 2).all()


def test_counts_are_drawn_per_cell_with_a_generator_per_cell(count_pipe, generators):
    kwargs = dict(num_cells=5, num_inference_steps=3)
    first, second = (count_pipe(**kwargs, generator=generators(5), batch_size=n).adata for n in (2, 5))
    assert np.array_equal(first.X.toarray(), second.X.toarray())


def test_decode_round_goes_to_the_end(count_pipe):
    kwargs = dict(num_cells=3, num_inference_steps=4, output_type="latent", decode="round")
    samples = count_pipe(**kwargs, generator=seeded()).samples
    count_pipe.register_to_config(decode_timestep=None)
    assert torch.equal(count_pipe(**kwargs | {"decode": None}, generator=seeded()).samples, samples)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(decode="mean"), "^decode .*'mean'"),
        (dict(decode="round", decode_timestep=5), 'decode="round" .*decode_timestep'),
        (dict(decode_timestep=1000), " 0 to 999 .* 1000"),
    ],
)
def test_refuses_decoding(count_pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        count_pipe(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(decode="posterior"), 'decode="posterior" .*decode_timestep'),
        (dict(decode_timestep=5), "^decode_timestep .*count head"),
    ],
)
def test_refuses_to_draw_counts_without_a_count_head(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipe(**kwargs)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@torch.no_grad()
def test_guidance_of_the_means_of_counts(count_pipe, monkeypatch, scale):
    means = []
    draw = lambda _, mean, noisy, *args: means.append((mean, noisy)) or noisy.abs().floor()  # noqa: E731
    monkeypatch.setattr(CountPosterior, "sample", draw)
    conditions = {"cell_type": ["B", "NK"], "batch": ["b1", "b2"]}
    kwargs = dict(num_inference_steps=1, decode_timestep=900, library_size=[40, 90], generator=seeded())
    count_pipe(conditions=conditions, guidance_scale=scale, **kwargs)
    (mean, noisy), t = means[0], int(count_pipe.scheduler.timesteps[0])
    codes, null = torch.tensor([[1, 0], [2, 1]]), torch.tensor([[3, 2], [3, 2]])
    cond, uncond = (
        count_pipe.transformer(noisy, t, labels, library_size=torch.tensor([40, 90])).count_log_mean
        for labels in (codes, null)
    )
    torch.testing.assert_close(mean, scale * cond + (1 - scale) * uncond, rtol=1e-4, atol=1e-4)


def test_refuses_a_scheduler_of_another_noise_process_than_the_count_heads(count_model, processor):
    pipe = SCRDiTPipeline(count_model, default_scheduler(beta_schedule="linear"), processor)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler .*beta_schedule='linear'.*'squaredcos_cap_v2'"):
        pipe()


def test_refuses_another_prediction_type_than_the_count_heads(count_model, processor):
    with pytest.raises(ValueError, match="UniPCMultistepScheduler .*prediction_type='epsilon'.*count head .*'sample'"):
        SCRDiTPipeline(count_model, default_scheduler("epsilon"), processor)()


def test_unconditional_pipeline_with_a_count_head(adata):
    processor = SCRDiTProcessor.from_anndata(adata, flavor="all")
    model = SCRDiTTransformer(23, 5, num_layers=1, count_bins=count_bins(adata.X))
    initialize_count_head(
        model.count_head,
        CellMoments.from_counts(adata.X, processor.encode_labels(adata.obs)),
        processor.mean,
        processor.std,
    )
    pipe = SCRDiTPipeline(model, default_scheduler(), processor, decode_timestep=50)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(3, num_inference_steps=3).adata.shape == (3, 23)


def test_a_pipeline_made_of_the_components_of_another_generates_the_same_cells(count_pipe):
    pipe = SCRDiTPipeline(**count_pipe.components)
    assert pipe.config.decode_timestep == count_pipe.config.decode_timestep == 50
    expected, cells = (p(4, num_inference_steps=2, generator=seeded()).adata.X for p in (count_pipe, pipe))
    assert (cells != expected).nnz == 0


def test_the_lowest_timestep_of_the_training_stays_with_the_transformer(count_model, processor, tmp_path):
    pipe = SCRDiTPipeline(count_model, default_scheduler(), processor, decode_timestep=200, min_timestep=100)
    pipe.save_pretrained(tmp_path)
    transformer = SCRDiTTransformer.from_pretrained(tmp_path, subfolder="transformer")
    pipe = SCRDiTPipeline(transformer, default_scheduler(), processor)
    assert (pipe.config.decode_timestep, pipe.config.min_timestep) == (200, 100)
    with pytest.raises(ValueError, match="timesteps 100 to 999"):
        pipe(decode="round")


def test_a_saved_pipeline_with_a_count_head_generates_the_same_cells(count_pipe, tmp_path):
    count_pipe.save_pretrained(tmp_path)
    loaded = SCRDiTPipeline.from_pretrained(tmp_path)
    cells, expected = (p(4, num_inference_steps=3, generator=seeded()).adata for p in (loaded, count_pipe))
    assert np.array_equal(cells.X.toarray(), expected.X.toarray())


# -- library sizes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sizes_of(count_pipe, monkeypatch):
    """The library sizes that the transformer gets, those of the cells with labels last."""

    def sizes_of(**kwargs):
        seen = []
        forward = count_pipe.transformer.forward
        with monkeypatch.context() as patch:
            spy = lambda *args, **kwargs: seen.append(kwargs["library_size"]) or forward(*args, **kwargs)  # noqa: E731
            patch.setattr(count_pipe.transformer, "forward", spy)
            count_pipe(num_inference_steps=1, **{"generator": seeded()} | kwargs)
        return torch.cat(seen).tolist()

    return sizes_of


def test_one_library_size_for_all_cells(sizes_of):
    assert sizes_of(num_cells=3, library_size=70) == [70, 70, 70]


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, pd.Series])
def test_a_list_of_library_sizes_sets_the_number_of_cells(sizes_of, convert):
    assert sizes_of(library_size=convert([70.0, 20.0, 55.0])) == [70, 20, 55]


def test_library_sizes_are_cut_into_batches_and_doubled_for_guidance(sizes_of):
    assert sizes_of(library_size=[1, 2, 3], batch_size=2, guidance_scale=2.0) == [1, 2, 1, 2, 3, 3]


def test_library_sizes_are_drawn_from_the_cells_with_the_same_labels(sizes_of, adata):
    own = adata[(adata.obs["cell_type"] == "NK") & (adata.obs["batch"] == "b2")].X.toarray().sum(axis=1)
    sizes = sizes_of(num_cells=300, conditions={"cell_type": "NK", "batch": "b2"})
    assert min(sizes) >= own.min() * 0.999 and max(sizes) <= own.max() * 1.001
    assert np.median(sizes) == pytest.approx(np.median(own), rel=0.1)


def test_drawn_library_sizes_are_reproducible(sizes_of, generators):
    assert sizes_of(num_cells=5) == sizes_of(num_cells=5) != sizes_of(num_cells=5, generator=seeded(1))
    per_cell = sizes_of(num_cells=5, generator=generators(5))
    assert per_cell[2:4] == sizes_of(num_cells=2, generator=generators(2, start=2))


def test_total_counts_follow_the_library_size(count_pipe):
    count_pipe.transformer.initialize_weights()  # only the library size tells the cells apart
    cells = count_pipe(library_size=[30] * 50 + [90] * 50, num_inference_steps=4, generator=seeded()).adata
    totals = cells.X.toarray().sum(axis=1)
    assert totals[:50].mean() == pytest.approx(30, rel=0.15)
    assert totals[50:].mean() == pytest.approx(90, rel=0.15)


def test_library_sizes_out_of_reach_are_told(count_pipe, caplog):
    count_pipe(library_size=1e7, num_inference_steps=2, generator=seeded())
    assert "library_size is 10000000 to 10000000, that of the training cells" in caplog.text
    caplog.clear()
    count_pipe(library_size=60, num_inference_steps=2, generator=seeded())
    assert not caplog.text


@pytest.mark.parametrize(
    ("library_size", "error", "message"),
    [
        (0, ValueError, r"library_size .* 0\.$"),
        (-5.0, ValueError, r"library_size .* -5\.$"),
        ([50, float("nan")], ValueError, "library_size .* nan"),
        (float("inf"), ValueError, "library_size .* inf"),
        ([50, 60, 70], ValueError, r"library_size .*\(3,\) .* 2 "),
        ([[50, 60]], ValueError, r"library_size .*\(1, 2\) .* 2 "),
        ("large", TypeError, "library_size .*'large'"),
        ({"B": 50}, TypeError, r"library_size .*\{'B': 50\}"),
    ],
)
def test_refuses_library_sizes_before_any_work(count_pipe, monkeypatch, library_size, error, message):
    monkeypatch.setattr(count_pipe.transformer, "forward", None)
    with pytest.raises(error, match=message):
        count_pipe(num_cells=2, library_size=library_size)


def test_refuses_library_sizes_without_a_count_head(pipe):
    with pytest.raises(ValueError, match="^library_size .*count head"):
        pipe(num_cells=2, library_size=50)


# -- reproducibility ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DDPMScheduler", "HeunDiscreteScheduler"])
def test_batch_size_does_not_matter_with_a_generator_per_cell(pipe, generators, name):
    swap(pipe, name)
    kwargs = dict(num_cells=7, num_inference_steps=4, output_type="latent")
    outputs = [pipe(**kwargs, generator=generators(7), batch_size=size) for size in (2, 512)]
    for output in outputs[1:]:
        torch.testing.assert_close(output.samples, outputs[0].samples, rtol=1e-4, atol=1e-4)
        pd.testing.assert_frame_equal(output.obs, outputs[0].obs)


def test_without_a_generator_pytorchs_seed_rules_and_is_recorded(pipe):
    torch.manual_seed(5)
    first = pipe(num_cells=4, num_inference_steps=2).adata
    torch.manual_seed(5)
    second = pipe(num_cells=4, num_inference_steps=2).adata
    recorded = pipe(num_cells=4, num_inference_steps=2, generator=seeded(first.uns["scrdit"]["seed"])).adata
    for cells in (second, recorded):
        assert np.array_equal(cells.X.toarray(), first.X.toarray())
        pd.testing.assert_frame_equal(cells.obs, first.obs)


def test_latents_are_used_and_left_alone(pipe):
    swap(pipe, "HeunDiscreteScheduler")  # scales its noise
    latents = torch.randn(2, 23, generator=seeded())
    before = latents.clone()
    kwargs = dict(num_inference_steps=3, output_type="latent", conditions={"cell_type": "B", "batch": "b1"})
    outputs = [pipe(latents=latents, generator=seeded(seed), **kwargs).samples for seed in (1, 2)]
    assert torch.equal(latents, before)
    assert torch.equal(outputs[0], outputs[1])


def test_eta_makes_ddim_stochastic(pipe):
    swap(pipe, "DDIMScheduler")
    latents = torch.randn(2, 23, generator=seeded())
    kwargs = dict(latents=latents, num_inference_steps=3, output_type="latent", conditions={"cell_type": "B"})
    plain, noisy = (pipe(generator=seeded(1), eta=eta, **kwargs).samples for eta in (0.0, 1.0))
    assert not torch.allclose(plain, noisy)


# -- refusals ----------------------------------------------------------------------------------------------------------

OBS = pd.DataFrame({"cell_type": ["B", "T"], "batch": ["b1", "b2"]})
REFUSED_CALLS = {
    "num_cells 0": (dict(num_cells=0), ValueError, "num_cells .* 0"),
    "num_cells float": (dict(num_cells=2.0), TypeError, r"num_cells .* 2\.0"),
    "num_cells bool": (dict(num_cells=True), TypeError, "num_cells .* True"),
    "num_inference_steps": (dict(num_inference_steps=0), ValueError, "num_inference_steps .* 0"),
    "too many steps": (dict(num_inference_steps=1001), ValueError, "num_inference_steps=1001 .* 1000 "),
    "batch_size": (dict(batch_size=-1), ValueError, "batch_size .* -1"),
    "obs and conditions": (dict(obs=OBS, conditions={"cell_type": "B"}), ValueError, r"obs \(.* conditions,"),
    "obs no frame": (dict(obs={"cell_type": ["B"]}), TypeError, "^obs .*DataFrame .* dict"),
    "obs length": (dict(obs=OBS, num_cells=3), ValueError, "obs .* 2 .*num_cells=3"),
    "obs other columns": (
        dict(obs=OBS.rename(columns={"cell_type": "a", "batch": "b"})),
        ValueError,
        r"^obs .*\['cell_type', 'batch'\].*\['a', 'b'\]",
    ),
    "obs unknown label": (dict(obs=OBS.replace("T", "Tcell")), ValueError, r"cell_type 'Tcell'.*\['T', 'B', 'NK'\]"),
    "obs NaN": (dict(obs=OBS.replace("T", np.nan)), ValueError, "'cell_type'.* 1 NaN"),
    "obs column twice": (dict(obs=OBS[["batch", "cell_type", "batch"]]), ValueError, "obs .* 2 columns 'batch'"),
    "conditions no dict": (dict(conditions="B"), TypeError, "^conditions .* dict .* str"),
    "conditions unknown key": (
        dict(conditions={"tissue": "lung"}),
        ValueError,
        r"conditions: 'tissue'.*\['cell_type', 'batch'\]",
    ),
    "conditions unknown label": (dict(conditions={"cell_type": "NKT"}), ValueError, r"cell_type 'NKT'.*'NK'.*\['T'"),
    "conditions length": (
        dict(num_cells=3, conditions={"cell_type": ["B", "T"]}),
        ValueError,
        r"conditions\['cell_type'\] .* 2 .* 3 ",
    ),
    "conditions of two lengths": (
        dict(conditions={"cell_type": ["B", "T"], "batch": ["b1"]}),
        ValueError,
        r"conditions\['batch'\] .* 1 .* 2 ",
    ),
    "eta above one": (dict(eta=2), ValueError, r"^eta .* 2\.$"),
    "eta without DDIM": (dict(eta=0.5), ValueError, r"UniPCMultistepScheduler .*eta=0\.5 .*DDIMScheduler"),
    "generators": (dict(num_cells=2, generator=[seeded()]), ValueError, "^generator .* 1 .* 2 "),
    "generator a seed": (dict(generator=0), TypeError, r"^generator .*torch\.Generator"),
    "latents shape": (dict(latents=torch.zeros(2, 22)), ValueError, r"latents .*\(2, 22\).*\(2, 23\)"),
    "latents no tensor": (dict(latents=np.zeros((2, 23))), TypeError, "latents .*ndarray"),
    "latents and num_cells": (
        dict(latents=torch.zeros(2, 23), num_cells=3),
        ValueError,
        r"latents .*\(2, 23\).*\(3, 23\)",
    ),
    "output_type": (dict(output_type="pil"), ValueError, "output_type .*'pil'"),
    "callback tensors": (
        dict(callback_on_step_end_tensor_inputs=["noise"]),
        ValueError,
        r"callback_on_step_end_tensor_inputs .*\['latents'\].*\['noise'\]",
    ),
}


@pytest.mark.parametrize(("kwargs", "error", "message"), REFUSED_CALLS.values(), ids=REFUSED_CALLS.keys())
def test_refuses_before_any_work(pipe, monkeypatch, kwargs, error, message):
    def forward(*args, **kwargs):
        raise AssertionError("the network ran")

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    with pytest.raises(error, match=message):
        pipe(**kwargs)


def test_decode_timestep_zero_is_not_ignored(pipe):
    with pytest.raises(ValueError, match="^decode_timestep .*count head"):
        pipe(num_cells=1, decode_timestep=0)


@pytest.mark.parametrize("library_size", [0, -3, 0.5, float("nan"), float("inf"), 1e39, "100", [100, "7"], True, {}])
def test_bad_library_sizes_are_refused(count_pipe, library_size):
    with pytest.raises((TypeError, ValueError), match="library_size"):
        count_pipe(library_size=library_size)


@pytest.mark.parametrize("guidance_scale", [-1.0, float("nan"), float("inf"), "2"])
def test_bad_guidance_scales_are_refused(pipe, guidance_scale):
    with pytest.raises(ValueError, match=f"guidance_scale .*{guidance_scale}"):
        pipe(num_cells=1, guidance_scale=guidance_scale)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(num_genes=24, num_classes=[3, 2]), "processor .* 23 .*transformer 24"),
        (dict(num_genes=23, num_classes=[3, 5]), r"processor.*\[3, 2\].*transformer.*\[3, 5\]"),
        (dict(num_genes=23, num_classes=None), r"processor.*\[3, 2\].*transformer.*\[\]"),
    ],
)
def test_refuses_components_that_do_not_fit(processor, config, message):
    pipe = SCRDiTPipeline(SCRDiTTransformer(patch_size=5, num_layers=1, **config), default_scheduler(), processor)
    with pytest.raises(ValueError, match=message):
        pipe()


# -- saving ------------------------------------------------------------------------------------------------------------

MODEL_INDEX = """{
  "_class_name": "SCRDiTPipeline",
  "_diffusers_version": "%s",
  "autocast_dtype": null,
  "decode_timestep": null,
  "default_timesteps": null,
  "min_timestep": 0,
  "processor": [
    "scrdit_diffusers",
    "SCRDiTProcessor"
  ],
  "scheduler": [
    "diffusers",
    "UniPCMultistepScheduler"
  ],
  "transformer": [
    "scrdit_diffusers",
    "SCRDiTTransformer"
  ]
}
"""


def test_model_index_is_pinned(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "model_index.json").read_text() == MODEL_INDEX % diffusers.__version__
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "processor/preprocessor_config.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }


def test_a_saved_pipeline_generates_the_same_cells(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = SCRDiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    kwargs = dict(num_cells=4, num_inference_steps=3, guidance_scale=1.5)
    cells, expected = (p(**kwargs, generator=seeded()).adata for p in (loaded, pipe))
    assert np.array_equal(cells.X.toarray(), expected.X.toarray())
    pd.testing.assert_frame_equal(cells.obs, expected.obs)
    assert cells.uns["scrdit"]["model"] == str(tmp_path)


def test_rare_labels_that_are_asked_for_are_named(pipe, caplog):
    numbers = pipe.processor.label_counts["cell_type"]
    assert sum(numbers.values()) == 60 and numbers["T"] >= 30 > numbers["NK"]
    samples = pipe(conditions={"cell_type": ["NK", "T", "NK"]}, num_inference_steps=1, output_type="np").samples
    assert len(samples) == 3
    warned = [record.message for record in caplog.records if "training cells" in record.message]
    assert len(warned) == 1 and warned[0].startswith(
        f"cell_type 'NK' has {numbers['NK']} training cells, fewer than 30"
    )


def test_labels_that_are_drawn_are_no_cause_to_warn(pipe, caplog):
    pipe(20, num_inference_steps=1)
    assert "training cells" not in caplog.text


def test_a_label_without_training_cells_generates_with_a_warning(pipe, caplog):
    pipe.processor.composition = [row for row in pipe.processor.composition if row[0] != 2]
    assert pipe(2, conditions={"cell_type": "NK"}, num_inference_steps=1).adata.n_obs == 2
    assert "cell_type 'NK' has 0 training cells" in caplog.text


@pytest.fixture
def fast_pipe(count_pipe):
    """A pipeline as training saves it."""
    pipe = SCRDiTPipeline(**count_pipe.components, default_timesteps=[999, 700, 400], autocast_dtype="bfloat16")
    pipe.register_to_config(decode_timestep=400)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def visited(pipe, **kwargs):
    """Timesteps of the network calls."""
    seen = []
    pipe(3, generator=seeded(), callback_on_step_end=lambda pipe, i, t, kw: seen.append(int(t)) or {}, **kwargs)
    return seen


def test_default_timesteps_are_visited_unless_a_call_says_how_many(fast_pipe):
    assert visited(fast_pipe) == [999, 700, 400]
    assert fast_pipe(3).adata.uns["scrdit"]["num_inference_steps"] == 3
    assert len(visited(fast_pipe, num_inference_steps=5)) == 5


@pytest.mark.parametrize("kwargs", [{"decode": "round"}, {"decode_timestep": 500}])
def test_default_timesteps_are_only_for_their_end(fast_pipe, kwargs):
    assert len(visited(fast_pipe, **kwargs)) == 25


def test_default_timesteps_are_only_for_unipc(fast_pipe):
    fast_pipe.scheduler = DDIMScheduler.from_config(fast_pipe.scheduler.config)
    assert len(visited(fast_pipe)) == 25


@pytest.mark.parametrize("timesteps", [[999, 999, 400], [1000, 700, 400], [400, 700, 400]])
def test_refuses_default_timesteps_that_do_not_fall(fast_pipe, timesteps):
    fast_pipe.register_to_config(default_timesteps=timesteps)
    with pytest.raises(ValueError, match="default_timesteps"):
        fast_pipe(3)
    fast_pipe(3, num_inference_steps=2)


def test_autocast_is_used_where_the_processor_has_it(fast_pipe, monkeypatch):
    dtypes = []
    block = fast_pipe.transformer.transformer_blocks[0]
    block.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    for has_it in (True, False):
        monkeypatch.setattr(pipeline_scrdit, "has_bfloat16", lambda device, has_it=has_it: has_it)
        cells = [fast_pipe(4, generator=seeded()).adata for _ in range(2)]
        assert (cells[0].X != cells[1].X).nnz == 0
        assert cells[0].uns["scrdit"]["dtype"] == ("bfloat16" if has_it else "float32")
    assert dtypes == [torch.bfloat16] * 6 + [torch.float32] * 6


def test_default_timesteps_and_autocast_are_saved_and_replaced(fast_pipe, tmp_path):
    fast_pipe.save_pretrained(tmp_path)
    loaded = SCRDiTPipeline.from_pretrained(tmp_path)
    assert loaded.config.default_timesteps == [999, 700, 400] and loaded.config.autocast_dtype == "bfloat16"
    assert SCRDiTPipeline(**loaded.components).config.default_timesteps == [999, 700, 400]
    assert SCRDiTPipeline.from_pretrained(tmp_path, autocast_dtype="float32").config.autocast_dtype == "float32"
