"""Fine-tuning: which weights are kept for other genes and labels, LoRA, and the training script that uses both."""

import copy
import importlib.util
import json
import shutil
import signal
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import HfArgumentParser

from scrdit_diffusers import (
    FoldChangePrior,
    SCRDiTPipeline,
    SCRDiTProcessor,
    SCRDiTTransformer,
    count_bins,
    default_scheduler,
    finetuning,
)
from scrdit_diffusers.cells.moments import CellMoments
from scrdit_diffusers.count_head import LABEL_TABLES
from scrdit_diffusers.initialization import initialize_count_head
from scrdit_diffusers.values import normalize_log1p

SCRIPT = Path(__file__).parents[1] / "training" / "train.py"
OTHER_GENES = [f"gene{i}" for i in range(20)] + ["new0", "new1", "new2"]  # without gene20, gene21, gene22
ALL_GENES = [f"gene{i}" for i in range(23)]


def other_cells(genes=OTHER_GENES, cell_types=("B", "Mono"), num_cells=40, seed=1):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(2.0, 1.0, len(genes)), (num_cells, len(genes))).astype(np.float32)
    obs = pd.DataFrame({"cell_type": rng.choice(cell_types, num_cells), "batch": "b1"})
    return ad.AnnData(sp.csr_matrix(counts), obs.set_index(obs.index.astype(str)), pd.DataFrame(index=list(genes)))


def adapt(pretrained, adata, labels_key=("cell_type", "batch"), keep_labels=False):
    """What the training script does with a pretrained pipeline: processor, model, and what is new."""
    genes = finetuning.arrange_genes(pretrained.processor.var_names, list(adata.var_names))
    fitted = SCRDiTProcessor.from_anndata(adata, list(labels_key), genes=genes)
    processor = finetuning.adapt_processor(pretrained.processor, fitted, keep_labels)
    statistics = None
    if pretrained.transformer.count_head:
        statistics = CellMoments.from_counts(processor.get_values(adata), processor.encode_labels(adata.obs))
    model, _ = finetuning.adapt_transformer(pretrained, processor, statistics)
    model.eval()
    new = finetuning.transfer_weights(pretrained.transformer, pretrained.processor, model, processor)
    return processor, model, new


@pytest.mark.parametrize(
    ("genes", "expected"),
    [
        ("dcba", "abcd"),  # the pretrained order
        ("xbcd", "xbcd"),  # a new gene takes the place of one that is missing
        ("abcdxy", "abcdxy"),  # further ones follow
        ("bd", "db"),  # too few: the last known one moves
        ("xyz", "xyz"),
        ("c", "c"),
    ],
)
def test_known_genes_keep_their_place(genes, expected):
    assert finetuning.arrange_genes(list("abcd"), list(genes)) == list(expected)


def test_missing_genes_are_replaced_by_the_most_variable_others():
    variable = SCRDiTProcessor(var_names=list("xaybz"), mean=[1, 1, 3, 1, 2], std=[1, 9, 1, 9, 2])
    assert finetuning.choose_genes(list("abc"), list("xaybz"), variable, 4) == ["a", "b", "z", "y"]


def test_fewer_genes_than_are_common_are_refused():
    with pytest.raises(ValueError, match="3 genes .*n_top_genes=2"):
        finetuning.choose_genes(list("abc"), list("abcd"), None, 2)


def test_no_common_gene_is_refused():
    with pytest.raises(ValueError, match=r"'CD3D'.*'ENSG0'.*adata\.var_names"):
        finetuning.check_common_genes(["CD3D", "CD8A"], ["ENSG0", "ENSG1"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("value_space", "log_normalized", "--value_space counts"),
        ("prediction_type", "epsilon", "--prediction_type sample"),
        ("beta_schedule", "linear", "--beta_schedule squaredcos_cap_v2"),
        ("decode", "round", "--decode posterior"),
        ("patch_size", 10, "--patch_size 5"),
        ("target_sum", 1e4, "no --target_sum"),
    ],
)
def test_settings_that_are_not_the_pretrained_ones_are_refused(count_pipe, name, value, message):
    settings = {"value_space": "counts", "patch_size": None, "target_sum": None}
    finetuning.check_settings(count_pipe, settings)
    with pytest.raises(ValueError, match=f"--{name} {value}: .*{message}"):
        finetuning.check_settings(count_pipe, settings | {name: value})


def test_known_genes_and_labels_keep_their_statistics_and_order(pipe):
    adata = other_cells()
    before = pipe.processor
    processor, _, _ = adapt(pipe, adata)
    fitted = SCRDiTProcessor.from_anndata(adata, "cell_type", genes=processor.var_names)
    assert processor.var_names == OTHER_GENES
    assert np.array_equal(processor.mean, np.append(before.mean[:20], fitted.mean[20:]))
    assert np.array_equal(processor.std, np.append(before.std[:20], fitted.std[20:]))
    assert processor.conditions == {"cell_type": ["B", "Mono"], "batch": ["b1"]}


def test_a_known_label_that_is_spelled_differently_is_refused(pipe):
    known = pipe.processor
    fitted = copy.deepcopy(known)
    known.condition_categories[0] = ["1.0", "2.0", "3.0"]
    fitted.condition_categories[0] = ["1", "2", "3"]
    with pytest.raises(ValueError, match=r"the new cells.* and .*the pretrained model"):
        finetuning.adapt_processor(known, fitted)


def test_pretrained_genes_called_by_numbers_are_doubted(caplog):
    finetuning.check_common_genes(["1", "2"], ["2", "3"])
    assert "numbers such as 1" in caplog.text


def test_pretrained_genes_that_the_data_lack_are_told(caplog):
    finetuning.check_common_genes(["CD3D", "CD8A", "NKG7"], ["CD3D", "Cd8a", "Nkg7"])
    assert "2 of the pretrained model's 3 genes are not in the data" in caplog.text
    assert "2 of them differ in case only, such as 'Cd8a' for 'CD8A'" in caplog.text


def test_composition_counts_the_new_cells_by_name(pipe):
    adata = other_cells(cell_types=("Mono", "T", "A"))
    for keep_labels in (False, True):
        processor, _, _ = adapt(pipe, adata, ["cell_type"], keep_labels)
        names = processor.conditions["cell_type"]
        assert names == (["T", "B", "NK", "A", "Mono"] if keep_labels else ["T", "A", "Mono"])
        composition = {names[code]: number for code, number in processor.composition}
        assert composition == adata.obs["cell_type"].value_counts().to_dict()


def test_report_counts_genes_and_names_labels(pipe):
    processor, _, _ = adapt(pipe, other_cells(), ["cell_type"])
    report = finetuning.compare_processors(pipe.processor, processor)
    assert report["genes"] == {"matched": 20, "moved": 0, "new": 3, "dropped": 3}
    assert report["labels"]["cell_type"] == {"matched": ["B"], "new": ["Mono"], "dropped": ["T", "NK"]}
    assert report["labels"]["batch"]["dropped"] == ["b1", "b2"]
    assert finetuning.compare_processors(
        *[SCRDiTProcessor(list(genes), *np.ones((2, len(genes)))) for genes in ("abcd", "bd")]
    )["genes"] == {"matched": 0, "moved": 2, "new": 0, "dropped": 2}


@pytest.fixture
def noisy():
    return torch.randn(4, 23, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_cell_tokens", [0, 2])
@pytest.mark.parametrize("patch_embed_type", ["per_patch", "shared"])
def test_known_genes_get_what_the_pretrained_model_says(pipe, noisy, patch_embed_type, num_cell_tokens):
    """New genes are silent; a gene that is left out is one at its mean."""
    torch.manual_seed(1)
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    pipe.transformer = SCRDiTTransformer(
        **config | {"patch_embed_type": patch_embed_type, "num_cell_tokens": num_cell_tokens}
    ).eval()
    _, model, _ = adapt(pipe, other_cells())
    without = noisy.clone()
    without[:, 20:] = 0
    given = without if patch_embed_type == "shared" else noisy  # shared projections know no genes
    old = pipe.transformer(without, 300, torch.tensor([[1, 0]] * 4)).sample  # B, b1
    new = model(given, 300, torch.tensor([[0, 0]] * 4)).sample
    torch.testing.assert_close(new[:, :20], old[:, :20])
    if patch_embed_type == "per_patch":
        assert not new[:, 20:].any()


def test_known_counts_get_the_means_that_the_pretrained_head_says(count_pipe, noisy):
    """The library size is over other genes, but the means of the known ones add up as before."""
    for name in LABEL_TABLES:
        table = count_pipe.transformer.count_head.get_parameter(name)
        torch.nn.init.normal_(table, generator=torch.Generator().manual_seed(0))
    adata = other_cells()
    processor, model, _ = adapt(count_pipe, adata)
    old_head, new_head = count_pipe.transformer.count_head, model.count_head
    counts = processor.get_values(adata).toarray()
    share_of_known = counts[:, :20].sum() / counts.sum()
    rates = old_head.log_mean.detach().exp()
    size = torch.full((4,), 50.0)
    noisy[:, 20:] = 0
    options = {"timestep": 300, "class_labels": torch.tensor([[1, 0]] * 4)}
    old = count_pipe.transformer(noisy, library_size=size, **options).count_log_mean
    size = size * float(rates[:20].sum() / rates.sum()) / share_of_known
    new = model(noisy, library_size=size, **options | {"class_labels": torch.tensor([[0, 0]] * 4)}).count_log_mean
    torch.testing.assert_close(new[:, :20], old[:, :20])
    torch.testing.assert_close(new_head.log_dispersion[:20], old_head.log_dispersion[:20])
    torch.testing.assert_close(new_head.class_log_dispersion[0, :20], old_head.class_log_dispersion[1, :20])
    expected = counts[:, 20:].sum(axis=0) / counts.sum() * float(size[0])
    torch.testing.assert_close(new[0, 20:].exp(), torch.tensor(expected, dtype=torch.float32))


def test_known_genes_keep_the_shapes_of_their_distributions(count_pipe):
    before = count_pipe.transformer.count_head.log_base
    torch.nn.init.normal_(before, generator=torch.Generator().manual_seed(0))
    _, model, new = adapt(count_pipe, other_cells())
    bins = count_pipe.transformer.count_head.bins_per_gene().numpy()
    after = model.count_head.log_base
    for gene in range(20):
        assert torch.equal(after[gene, : bins[gene]], before[gene, : bins[gene]])
    assert not after[20:].any()
    assert new["count_head.log_base"][20:].all() and not new["count_head.log_base"][:20].any()


def test_the_prior_is_centered_on_the_pretrained_weights(count_pipe):
    """Centered on zero it would undo within a few steps what was learned from many more cells."""
    _, model, _ = adapt(count_pipe, other_cells())
    prior = FoldChangePrior(model, num_cells=60, around_present_weights=True)
    with torch.no_grad():
        model.proj_out.weight[0, :, 0] += 1  # the width is 16
        model.count_head.log_base[0, 0] += 3
        model.count_head.class_log_mean[0, 1] += 4
    squared_fold_changes, squared_shape_changes = prior.squared_changes()
    expected = torch.zeros(23).index_put((torch.tensor([0, 1]),), torch.tensor([16.0, 4**2 / 16]))
    torch.testing.assert_close(squared_fold_changes, expected, rtol=1e-4, atol=1e-8)
    assert squared_shape_changes.item() == pytest.approx(9)


def test_bins_of_known_genes_hold_old_and_new_counts(count_pipe):
    adata = other_cells(ALL_GENES)
    counts = adata.X.toarray()
    counts[:, 3], counts[0, 4] = 0, 500
    adata.X = sp.csr_matrix(counts)
    _, model, _ = adapt(count_pipe, adata)
    before, after = count_pipe.transformer.count_head.bins_per_gene().numpy(), model.count_head.bins_per_gene().numpy()
    assert (after >= before).all() and after[3] == before[3] and after[4] > before[4]
    last = (model.count_head.gene_order == 4).nonzero().item()
    genes, bins = next(
        (genes, upper)
        for (genes, _, _), (_, upper, _) in zip(model.count_head.groups, model.count_head.bins(), strict=True)
        if last < genes.stop
    )
    assert bins[last - genes.start].max() > 500


def test_new_labels_start_as_no_label(pipe, noisy):
    processor, model, _ = adapt(pipe, other_cells(ALL_GENES, ("B", "Mono")))
    code = processor.conditions["cell_type"].index("Mono")
    old = pipe.transformer(noisy, 300, torch.tensor([[3, 0]] * 4)).sample
    torch.testing.assert_close(model(noisy, 300, torch.tensor([[code, 0]] * 4)).sample, old)
    torch.testing.assert_close(model(noisy, 300, torch.tensor([[2, 0]] * 4)).sample, old)


@pytest.mark.parametrize("label", ["T", "B", "NK", None])
def test_new_labels_start_as_the_known_one_that_fits_their_cells(pipe, label):
    """The new cells are what the pretrained model makes of noise for a label that it knows, or for none."""
    labels = pipe.transformer.class_embed[0]
    torch.nn.init.normal_(labels.weight, std=20.0, generator=torch.Generator().manual_seed(0))
    adata = other_cells(ALL_GENES, ["Mono"])
    processor, model, _ = adapt(pipe, adata)
    code = pipe.processor.conditions["cell_type"].index(label) if label else len(labels.weight) - 1
    noise = torch.randn(40, 23, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        values = pipe.transformer(noise, 900, torch.tensor([[code, 2]]).expand(40, -1)).sample
    cells = {"values": values, "class_labels": torch.tensor(processor.encode_labels(adata.obs))}
    started = finetuning.start_new_labels(pipe, model, processor, cells)
    assert started == ({"cell_type": {"Mono": label}} if label else {})
    before, after = labels.weight, model.class_embed[0].weight  # Mono and no label
    assert torch.equal(after, before[[code, -1]])


def log_normalized(adata):
    values = normalize_log1p(sp.csr_matrix(adata.X), 1e4)
    return ad.AnnData(values.astype(np.float32), adata.obs, adata.var)


def test_means_relative_to_library_sizes_over_all_genes_stay(count_model):
    """However many of the genes are modeled."""
    options = dict(value_space="log_normalized", recover_counts=True)
    before = log_normalized(other_cells([*ALL_GENES, "left0"], seed=2))
    processor = SCRDiTProcessor.from_anndata(before, ["cell_type", "batch"], genes=ALL_GENES, **options)
    counts, _ = processor.get_counts(before)
    config = dict(count_model.config) | dict(count_bins=count_bins(counts), num_classes=processor.num_classes)
    model = SCRDiTTransformer.from_config(config)
    codes = processor.encode_labels(before.obs)
    initialize_count_head(model.count_head, CellMoments.from_counts(counts, codes), processor.mean, processor.std)
    after = log_normalized(other_cells([*OTHER_GENES, "left1"]))
    fitted = SCRDiTProcessor.from_anndata(after, ["cell_type", "batch"], genes=OTHER_GENES, **options)
    assert processor.normalized_by == fitted.normalized_by == "library_size"
    adapted = finetuning.adapt_processor(processor, fitted)
    counts, _ = adapted.get_counts(after)
    statistics = CellMoments.from_counts(counts, adapted.encode_labels(after.obs))
    pipe = SCRDiTPipeline(model, default_scheduler(), processor, decode_timestep=50)
    new, _ = finetuning.adapt_transformer(pipe, adapted, statistics)
    assert torch.equal(new.count_head.log_library_size, model.count_head.log_library_size)
    assert torch.equal(new.count_head.log_mean[:20], model.count_head.log_mean[:20])


def test_values_that_are_no_scaled_counts_are_refused():
    adata = log_normalized(other_cells())
    adata.X.data *= np.random.default_rng(0).uniform(0.3, 1, adata.X.nnz)
    options = dict(value_space="log_normalized", recover_counts=True, flavor="all")
    processor = SCRDiTProcessor.from_anndata(adata, "cell_type", **options)
    with pytest.raises(ValueError, match="log1p of scaled counts"):
        finetuning.adapt_processor(processor, processor)


@pytest.mark.parametrize("name", LABEL_TABLES)
def test_new_labels_have_the_means_and_dispersions_of_the_known_one(count_pipe, name):
    known = count_pipe.transformer.count_head.get_parameter(name)
    torch.nn.init.normal_(known, std=0.1, generator=torch.Generator().manual_seed(0))
    adata = other_cells(cell_types=["Mono"])
    processor, model, _ = adapt(count_pipe, adata)
    counts = torch.tensor(processor.get_values(adata).toarray())
    cells = {"values": torch.tensor(processor.transform(processor.get_values(adata))).float(), "counts": counts}
    cells["class_labels"] = torch.tensor(processor.encode_labels(adata.obs))
    started = finetuning.start_new_labels(count_pipe, model, processor, cells)["cell_type"]["Mono"]
    row = count_pipe.processor.conditions["cell_type"].index(started)
    table = model.count_head.get_parameter(name)
    assert torch.equal(table[0, :20], known[row, :20]) and not table[0, 20:].any()


def test_a_condition_that_is_left_out_is_one_without_label(pipe, noisy):
    adata = other_cells(ALL_GENES, ("B",))
    adata.obs["donor"] = "d1"
    _, model, _ = adapt(pipe, adata, ["donor", "cell_type"])
    old = pipe.transformer(noisy, 300, torch.tensor([[1, 2]] * 4)).sample
    torch.testing.assert_close(model(noisy, 300, torch.tensor([[0, 0]] * 4)).sample, old)


def test_tokens_beyond_the_pretrained_ones_are_new(pipe):
    genes = [*ALL_GENES, *(f"new{i}" for i in range(5))]  # 28 genes are 6 tokens of 5, instead of 5
    _, model, new = adapt(pipe, other_cells(genes))
    assert new["patch_embed.bias"].any(dim=1).tolist() == [False] * 5 + [True]
    assert int((~new["patch_embed.weight"]).sum()) == 23 * 16
    assert torch.equal(model.patch_embed.bias[:5], pipe.transformer.patch_embed.bias)


def test_lora_changes_adapters_and_what_is_new_only(count_pipe, noisy):
    _, model, new = adapt(count_pipe, other_cells())
    finetuning.add_lora(model, 2, new)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.1, weight_decay=0)
    for _ in range(2):  # in the first step the gradient of lora_A is zero
        labels = torch.tensor([[0, 0], [1, 0], [0, 0], [1, 0]])
        model(noisy, 300, labels, noisy.abs().sum(1), noisy.abs().round()).count_nll.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        moved = parameter != before[name]
        if "lora_" in name:
            assert moved.any(), name
        else:
            assert not moved[~new[name]].any() if name in new else not moved.any(), name
    assert (model.count_head.log_mean != before["count_head.log_mean"])[20:].all()
    assert (model.proj_out.weight != before["proj_out.weight"])[4, :, :3].any()


# -- the training script -----------------------------------------------------------------------------------------------

TINY = ["--preset", "scrdit-s", "--patch_size", "8", "--num_layers", "1", "--num_attention_heads", "2"]
TINY += ["--attention_head_dim", "8"]
QUICK = ["--train_batch_size", "16", "--lr_warmup_steps", "2", "--max_train_steps", "6", "--checkpointing_steps", "4"]
QUICK += [
    "--validation_steps",
    "1000",
    "--num_validation_cells",
    "4",
    "--report_to",
    "none",
    "--labels_key",
    "cell_type",
]


@pytest.fixture(scope="module")
def train():
    """Run the script's main in this process, which saves the seconds of importing everything."""
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules["train"] = script
    spec.loader.exec_module(script)

    def train(dataset, output_dir, *arguments):
        command = ["--dataset", str(dataset), "--output_dir", str(output_dir), *QUICK, *map(str, arguments)]
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            script.main(HfArgumentParser(script.TrainingArguments).parse_args_into_dataclasses(command)[0])
        finally:
            torch.set_flush_denormal(False)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            AcceleratorState._reset_state(reset_partial_state=True)
        return output_dir

    return train


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Files of cells: of the pretraining, with other genes and labels, and with the same."""
    folder = tmp_path_factory.mktemp("cells")
    other_cells(ALL_GENES, ("B", "T"), 60, 0).write_h5ad(folder / "first.h5ad")
    other_cells(OTHER_GENES, ("B", "Mono"), 60, 1).write_h5ad(folder / "other.h5ad")
    other_cells(ALL_GENES, ("B", "T"), 60, 2).write_h5ad(folder / "same.h5ad")
    return folder


@pytest.fixture(scope="module")
def pretrained(train, cells, tmp_path_factory):
    return train(cells / "first.h5ad", tmp_path_factory.mktemp("pretrained"), *TINY)


@pytest.fixture(scope="module")
def tuned(train, cells, pretrained, tmp_path_factory):
    """Fine-tuned on other genes and labels: with all weights, and by LoRA."""
    start = ["--pretrained_model_name_or_path", pretrained]
    full = train(cells / "other.h5ad", tmp_path_factory.mktemp("full"), *start)
    return {
        "full": full,
        "lora": train(cells / "other.h5ad", tmp_path_factory.mktemp("lora"), *start, "--lora_rank", 2),
    }


def weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def latents(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        4,
        conditions={"cell_type": "B"},
        library_size=40,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).samples


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_output_generates_cells_of_the_new_genes_and_labels(tuned, kind):
    pipe = SCRDiTPipeline.from_pretrained(tuned[kind])
    if kind == "lora":
        pipe.load_lora_weights(tuned[kind])
    pipe.set_progress_bar_config(disable=True)
    adata = pipe(3, conditions={"cell_type": "Mono"}, num_inference_steps=2).adata
    assert list(adata.var_names[:20]) == OTHER_GENES[:20] and set(adata.var_names) == set(OTHER_GENES)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_train_config_reports_what_was_matched(tuned, kind):
    report = json.loads((tuned[kind] / "train_config.json").read_text())["finetuning"]
    assert report["genes"] == {"matched": 20, "moved": 0, "new": 3, "dropped": 3} and not report["adapter_only"]
    assert set(report["new_labels_start_as"].get("cell_type", {})) <= {"Mono"}  # a model of a few steps tells little
    dropped = {"full": ["T"], "lora": []}[kind]  # a frozen network still knows its labels
    assert report["labels"]["cell_type"] == {
        "matched": ["B"] if dropped else ["B", "T"],
        "new": ["Mono"],
        "dropped": dropped,
    }


def test_full_fine_tuning_trains_known_weights(tuned, pretrained):
    moved = (weights(tuned["full"])["patch_embed.weight"] - weights(pretrained)["patch_embed.weight"]).abs()
    assert 0 < moved[0].max() < 0.2


def test_lora_leaves_known_weights_as_they_were(tuned, pretrained):
    old, new = weights(pretrained), weights(tuned["lora"])
    for name in ("transformer_blocks.0.attn.to_q.weight", "time_embed.linear_1.weight", "adaln_out.weight"):
        assert torch.equal(new[name], old[name])
    assert torch.equal(new["proj_out.weight"][:2], old["proj_out.weight"][:2])
    assert new["proj_out.weight"][2, :, 4:7].abs().max() > 0  # gene20 ... gene22 made place for new ones


def test_adapter_changes_what_the_saved_pipeline_says(tuned):
    pipe = SCRDiTPipeline.from_pretrained(tuned["lora"])
    without = latents(pipe)
    pipe.load_lora_weights(tuned["lora"])
    assert (latents(pipe) - without).abs().max() > 1e-5


def test_adapter_of_other_genes_is_refused(tuned, pretrained):
    pipe = SCRDiTPipeline.from_pretrained(pretrained)
    with pytest.raises(ValueError, match=rf"{tuned['lora']} .*SCRDiTPipeline\.from_pretrained"):
        pipe.load_lora_weights(tuned["lora"])


@pytest.fixture(scope="module")
def adapter(train, cells, pretrained, tmp_path_factory):
    arguments = ["--pretrained_model_name_or_path", pretrained, "--lora_rank", 2]
    return train(cells / "same.h5ad", tmp_path_factory.mktemp("adapter"), *arguments)


def test_adapter_alone_suffices_for_the_same_genes_and_labels(adapter, pretrained):
    assert (adapter / "pytorch_lora_weights.safetensors").is_file() and not (adapter / "transformer").exists()
    assert json.loads((adapter / "train_config.json").read_text())["finetuning"]["adapter_only"]
    pipe = SCRDiTPipeline.from_pretrained(pretrained)
    before = latents(pipe)
    pipe.load_lora_weights(adapter)
    assert (latents(pipe) - before).abs().max() > 1e-5
    pipe.unload_lora_weights()
    torch.testing.assert_close(latents(pipe), before)


def test_loaded_adapter_equals_the_model_that_was_trained(adapter, pretrained):
    """The last checkpoint holds the average of the model with its adapter inside."""
    pipe = SCRDiTPipeline.from_pretrained(pretrained)
    pipe.load_lora_weights(adapter)
    saved = load_file(adapter / "checkpoint-6" / "transformer_ema" / "diffusion_pytorch_model.safetensors")
    loaded = pipe.transformer.state_dict()
    renamed = {name.replace(".default_0.", ".default."): tensor for name, tensor in loaded.items()}
    assert saved.keys() == renamed.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(renamed[name], tensor)


def test_processor_of_an_adapter_holds_the_new_composition(adapter, cells):
    processor = SCRDiTProcessor.from_pretrained(adapter, subfolder="processor")
    numbers = {processor.conditions["cell_type"][code]: number for code, number in processor.composition}
    assert sum(numbers.values()) == 60
    assert numbers.keys() == set(ad.read_h5ad(cells / "same.h5ad").obs["cell_type"])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resumed_fine_tuning_equals_the_uninterrupted_one(train, tuned, cells, pretrained, tmp_path, kind):
    shutil.copytree(tuned[kind] / "checkpoint-4", tmp_path / "checkpoint-4")
    arguments = ["--pretrained_model_name_or_path", pretrained, "--resume_from_checkpoint", "latest"]
    arguments += ["--lora_rank", 2] if kind == "lora" else []
    train(cells / "other.h5ad", tmp_path, *arguments)
    files = ["transformer/diffusion_pytorch_model.safetensors"]
    files += ["pytorch_lora_weights.safetensors"] if kind == "lora" else []
    for file in files:
        resumed, expected = load_file(tmp_path / file), load_file(tuned[kind] / file)
        for name, tensor in expected.items():
            torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_writes_a_card(tuned, pretrained, kind):
    text = (tuned[kind] / "README.md").read_text(encoding="utf-8")
    assert f"`{pretrained.name}`: 20 genes kept in place, 0 moved, 3 new, 3 dropped" in text
    assert ("pipe.load_lora_weights(" in text) == (kind == "lora")
    facts = json.loads((tuned[kind] / "card.json").read_text())
    assert sum(facts["labels"]["cell_type"].values()) == facts["recipe"]["train_cells"] == 60


def test_card_says_what_the_arguments_say(train, cells, tmp_path):
    (tmp_path / "card.yaml").write_text("tissue: lung\ndataset_accession: GSE1\nlicense: mit\n")
    train(cells / "first.h5ad", tmp_path / "model", *TINY, "--card_data", tmp_path / "card.yaml")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert "tissue:lung" in card.data.tags and card.data.license == "mit" and "| accession | GSE1 |" in card.text
    assert "| license of the data | not stated |" in card.text


BAD_ARGUMENTS = {
    "adapter of an untrained model": (["--lora_rank", 2], "--lora_rank 2 .*--pretrained_model_name_or_path"),
    "rank of zero": (["--lora_rank", 0], "--lora_rank .* 0"),
    "other values": (["--value_space", "log_normalized", "--target_sum", 1e4], "--value_space counts"),
    "other size": (["--num_layers", 2], "--num_layers 1"),
    "other noise": (["--beta_schedule", "linear"], "--beta_schedule squaredcos_cap_v2"),
    "too few genes": (["--n_top_genes", 10], "20 genes .*n_top_genes=10"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(train, cells, pretrained, tmp_path, name):
    arguments, message = BAD_ARGUMENTS[name]
    start = [] if name == "adapter of an untrained model" else ["--pretrained_model_name_or_path", pretrained]
    with pytest.raises(ValueError, match=message):
        train(cells / "other.h5ad", tmp_path / "model", *start, *arguments)
    assert not (tmp_path / "model").exists()


def test_data_without_a_common_gene_are_refused(train, pretrained, tmp_path):
    other_cells([f"ENSG{i}" for i in range(9)]).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=r"'gene0'.*'ENSG0'.*adata\.var_names"):
        train(tmp_path / "cells.h5ad", tmp_path / "model", "--pretrained_model_name_or_path", pretrained)
