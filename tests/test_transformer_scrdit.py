"""The transformer against plain PyTorch oracles."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from sklearn.decomposition import PCA
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scrdit_diffusers import SCRDIT_PRESETS, SCRDiTTransformer, count_bins, fit_preset
from scrdit_diffusers.cells.moments import CellMoments
from scrdit_diffusers.initialization import initialize_count_head
from scrdit_diffusers.transformer_scrdit import (
    MAX_PRODUCT_TOKENS,
    SCRDiTPerPatchLinear,
    SCRDiTTransformerBlock,
    SCRDiTTransformerOutput,
    attend,
)

PATCH_EMBED_TYPES = ("per_patch", "shared")
TINY = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8)


def make_model(patch_embed_type="per_patch", num_genes=23, patch_size=5, num_classes=(3, 2), **kwargs):
    torch.manual_seed(0)
    config = TINY | kwargs
    return SCRDiTTransformer(
        num_genes, patch_size, patch_embed_type, num_classes=list(num_classes) or None, **config
    ).eval()


def make_inputs(batch_size=4, num_genes=23):
    generator = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(batch_size, num_genes, generator=generator),
        timestep=torch.randint(0, 1000, (batch_size,), generator=generator),
        class_labels=torch.randint(0, 2, (batch_size, 2), generator=generator),
    )


# -- genes and tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_embed_type", PATCH_EMBED_TYPES)
@pytest.mark.parametrize("num_genes", [1, 4, 5, 6, 23, 25])
def test_any_number_of_genes(patch_embed_type, num_genes):
    model = make_model(patch_embed_type, num_genes)
    output = model(**make_inputs(num_genes=num_genes))
    assert isinstance(output, SCRDiTTransformerOutput)
    assert output.sample.shape == (4, num_genes)
    assert model.num_patches == {1: 1, 4: 1, 5: 1, 6: 2, 23: 5, 25: 5}[num_genes]


def padded_weights(model):
    """The weights that only padding can reach: inputs and outputs 3 and 4 of the last of five tokens (23 genes)."""
    return {
        "patch_embed.weight": model.patch_embed.weight[-1, 3:],
        "proj_out.weight": model.proj_out.weight[-1, :, 3:],
        "proj_out.bias": model.proj_out.bias[-1, 3:],
    }


def test_padding_is_never_seen():
    model, inputs = make_model(), make_inputs()
    before = model(**inputs).sample
    with torch.no_grad():
        for weight in padded_weights(model).values():
            weight.fill_(1e6)
    assert torch.equal(model(**inputs).sample, before)


def test_no_gradient_flows_into_padding():
    model = make_model()
    model(**make_inputs()).sample.square().sum().backward()
    for name, weight in padded_weights(model).items():
        gradient = model.get_parameter(name).grad
        in_padding = gradient[-1, 3:] if weight.ndim == 1 or name.startswith("patch") else gradient[-1, :, 3:]
        assert in_padding.shape == weight.shape
        assert not in_padding.any()
        assert gradient.any()


@pytest.mark.parametrize("patch_embed_type", PATCH_EMBED_TYPES)
def test_every_gene_reaches_every_other(patch_embed_type):
    model, inputs = make_model(patch_embed_type), make_inputs(1)
    hidden_states = inputs.pop("hidden_states").requires_grad_()
    for gene in (0, 22):
        (gradient,) = torch.autograd.grad(model(hidden_states, **inputs).sample[0, gene], hidden_states)
        assert (gradient != 0).all()


def test_cells_of_a_batch_do_not_mix():
    model, inputs = make_model(), make_inputs()
    alone = torch.cat([model(**{k: v[i : i + 1] for k, v in inputs.items()}).sample for i in range(4)])
    torch.testing.assert_close(model(**inputs).sample, alone)


def test_per_patch_linear_is_a_loop_over_tokens():
    torch.manual_seed(0)
    layer = SCRDiTPerPatchLinear(num_patches=4, in_features=3, out_features=6)
    x = torch.randn(2, 4, 3)
    loop = torch.stack([F.linear(x[:, n], layer.weight[n].T, layer.bias[n]) for n in range(4)], dim=1)
    torch.testing.assert_close(layer(x), loop)


def test_shared_positions_are_one_dimensional_sincos():
    """Half of the width encodes positions 0 ... N-1; the other half, the axis of length one, is constant."""
    table = make_model("shared").pos_embed  # (5, 16)
    positions = get_1d_sincos_pos_embed_from_grid(8, torch.arange(5).float(), output_type="pt")
    halves = table[:, :8], table[:, 8:]
    matches = [torch.allclose(half, positions.float(), atol=1e-6) for half in halves]
    assert sorted(matches) == [False, True]
    constant = halves[matches.index(False)]
    assert torch.equal(constant, constant[:1].expand(5, -1))


# -- blocks ------------------------------------------------------------------------------------------------------------


def dit_block(block, x, c, heads):
    """adaLN-Zero block of DiT, with PyTorch's own multi-head attention."""
    dim = x.shape[-1]
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaln(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
    attn = block.attn
    h = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale1) + shift1
    h = F.multi_head_attention_forward(
        *[h.transpose(0, 1)] * 3,
        embed_dim_to_check=dim,
        num_heads=heads,
        in_proj_weight=torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]),
        in_proj_bias=torch.cat([attn.to_q.bias, attn.to_k.bias, attn.to_v.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=attn.to_out[0].weight,
        out_proj_bias=attn.to_out[0].bias,
    )[0].transpose(0, 1)
    x = x + gate1 * h
    first, last = [layer for layer in block.ff.modules() if isinstance(layer, torch.nn.Linear)]
    h = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale2) + shift2
    return x + gate2 * last(F.gelu(first(h), approximate="tanh"))


def test_block_is_a_dit_block():
    torch.manual_seed(0)
    block = SCRDiTTransformerBlock(dim=24, num_attention_heads=3, attention_head_dim=8, mlp_ratio=4.0, dropout=0.0)
    x, c = torch.randn(2, 5, 24), torch.randn(2, 24)
    torch.testing.assert_close(block(x, c), dit_block(block, x, c, heads=3))


@pytest.mark.parametrize("num_tokens", [1, 5, MAX_PRODUCT_TOKENS + 1])
def test_block_in_bfloat16_is_that_block_up_to_rounding(num_tokens):
    torch.manual_seed(0)
    block = SCRDiTTransformerBlock(dim=24, num_attention_heads=3, attention_head_dim=8, mlp_ratio=4.0, dropout=0.0)
    x, c = torch.randn(2, num_tokens, 24), torch.randn(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        output = block(x, c)
    torch.testing.assert_close(output.float(), dit_block(block, x, c, heads=3), rtol=0.02, atol=0.02)


def test_attention_by_products_is_that_of_pytorch():
    query, key, value = 3 * torch.randn(3, 2, 7, 4, 8, generator=torch.Generator().manual_seed(0))  # (B, N, H, D/H)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    torch.testing.assert_close(attend(query, key, value), expected)


def test_dropout_acts_in_training_only():
    model, inputs = make_model(dropout=0.5), make_inputs()
    assert torch.equal(model(**inputs).sample, model(**inputs).sample)
    model.train()
    assert not torch.equal(model(**inputs).sample, model(**inputs).sample)


# -- timestep and labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "timestep",
    [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor(7.0, dtype=torch.float64), torch.tensor([7])],
    ids=["int", "float", "0-d int", "0-d float32", "0-d float64", "(1,)"],
)
def test_timestep_forms(timestep):
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs | {"timestep": torch.full((4,), 7)}).sample
    assert torch.equal(model(**inputs | {"timestep": timestep}).sample, expected)


def test_timestep_may_be_fractional():
    model, inputs = make_model(), make_inputs()
    outputs = [model(**inputs | {"timestep": t}).sample for t in (7, 7.5, 8)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("name", ["timestep", "class_labels"])
def test_output_depends_on_the_condition(name):
    model, inputs = make_model(), make_inputs()
    other = model(**inputs | {name: (inputs[name] + 1) % 3}).sample
    assert not torch.allclose(model(**inputs).sample, other)


def test_one_condition_takes_a_flat_tensor():
    model, inputs = make_model(num_classes=[3]), make_inputs()
    labels = inputs.pop("class_labels")[:, 0]
    assert torch.equal(
        model(**inputs, class_labels=labels).sample, model(**inputs, class_labels=labels[:, None]).sample
    )


def test_no_labels_are_the_null_entries():
    model, inputs = make_model(num_classes=[3, 2]), make_inputs()
    del inputs["class_labels"]
    null = torch.tensor([3, 2]).expand(4, -1)
    assert torch.equal(model(**inputs).sample, model(**inputs, class_labels=null).sample)
    with torch.no_grad():
        model.class_embed[1].weight[2] += 1.0
    assert not torch.equal(model(**inputs).sample, model(**inputs, class_labels=torch.tensor([[3, 1]] * 4)).sample)


def test_unconditional_model_takes_no_labels_or_none_per_cell():
    model, inputs = make_model(num_classes=[]), make_inputs()
    del inputs["class_labels"]
    empty = torch.empty(4, 0, dtype=torch.long)
    assert torch.equal(model(**inputs).sample, model(**inputs, class_labels=empty).sample)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (2, 4), (8,)])
def test_refuses_labels_of_another_shape(shape):
    """Also shapes with the right number of codes: reshaping them would mix up the cells."""
    model, inputs = make_model(), make_inputs()
    with pytest.raises(ValueError, match=r"class_labels .*\(4, 2\)"):
        model(**inputs | {"class_labels": torch.zeros(shape, dtype=torch.long)})


def test_refuses_another_number_of_genes():
    with pytest.raises(ValueError, match="hidden_states .* 25 .* 23"):
        make_model()(**make_inputs(num_genes=25))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(num_genes=0), "num_genes .* 0"),
        (dict(patch_size=0), "patch_size .* 0"),
        (dict(num_layers=-1), "num_layers .* -1"),
        (dict(num_attention_heads=0), "num_attention_heads .* 0"),
        (dict(attention_head_dim=0), "attention_head_dim .* 0"),
        (dict(num_classes=[3, 0]), r"num_classes\[1\] .* 0"),
        (dict(patch_embed_type="conv"), "patch_embed_type .*'conv'"),
        (
            dict(patch_embed_type="shared", num_attention_heads=1, attention_head_dim=6),
            'patch_embed_type="shared" .*dim=6 .* 4',
        ),
    ],
)
def test_refuses_config(config, message):
    with pytest.raises(ValueError, match=message):
        SCRDiTTransformer(**config)


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_embed_type", PATCH_EMBED_TYPES)
def test_initialize_weights_gives_zero_output_and_identity_blocks(patch_embed_type):
    model, inputs = make_model(patch_embed_type), make_inputs()
    assert model(**inputs).sample.any()
    model.initialize_weights()
    assert not model(**inputs).sample.any()
    x = torch.randn(4, 5, 16)
    assert torch.equal(model.transformer_blocks[0](x, torch.randn(4, 16)), x)


@pytest.mark.parametrize("patch_embed_type", PATCH_EMBED_TYPES)
def test_initialized_weights_can_learn(patch_embed_type):
    """A few steps on one batch must lower the loss by a lot: nothing is stuck at zero."""
    model, inputs = make_model(patch_embed_type), make_inputs()
    model.initialize_weights()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    target = inputs["hidden_states"].flip(1)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(model(**inputs).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("patch_embed_type", PATCH_EMBED_TYPES)
def test_save_and_load(tmp_path, patch_embed_type):
    model, inputs = make_model(patch_embed_type), make_inputs()
    model.save_pretrained(tmp_path)
    loaded = SCRDiTTransformer.from_pretrained(tmp_path)
    configs = [{k: v for k, v in m.config.items() if not k.startswith("_")} for m in (loaded, model)]
    assert configs[0] == configs[1]
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_embed_type", PATCH_EMBED_TYPES)
def test_count_head_starts_at_the_average_profile(patch_embed_type):
    """Whatever the noisy cell and its labels; only the library size scales it."""
    counts = sp.csr_array(np.maximum(np.random.default_rng(0).integers(-7, 8, (50, 23)), 0), dtype=np.float64)
    model = make_model(patch_embed_type, count_bins=count_bins(counts.tocsr()))
    model.initialize_weights()
    initialize_count_head(
        model.count_head, CellMoments.from_counts(counts, np.zeros((50, 2))), np.zeros(23), np.ones(23)
    )
    sizes = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    profile = torch.from_numpy(counts.sum(axis=0) / counts.sum()).float()
    log_mean = model(**make_inputs(), library_size=sizes).count_log_mean
    torch.testing.assert_close(log_mean.exp(), sizes[:, None] * profile, rtol=1e-4, atol=1e-6)


# -- cell tokens and the prior of the fold changes ---------------------------------------------------------------------


def test_cell_tokens_read_the_principal_components_and_reach_all_genes():
    values = np.random.default_rng(0).normal(size=(80, 4)) @ np.random.default_rng(1).normal(size=(4, 23))
    model = make_model(num_cell_tokens=2)
    model.initialize_weights()
    others = model.cell_embed.weight[4:].detach().clone()
    model.initialize_cell_tokens(torch.from_numpy(values))
    read = model.cell_embed.weight[:4].detach().numpy()
    torch.testing.assert_close(model.cell_embed.weight[4:], others)  # 80 cells show four components
    components = PCA(4).fit(values).components_
    np.testing.assert_allclose(np.abs(np.sum(read * components, axis=1)), 1, atol=1e-4)

    inputs = make_inputs()
    before = model(**inputs).sample
    torch.nn.init.normal_(model.cell_out.weight)
    torch.nn.init.ones_(model.adaln_out.bias)
    assert (model(**inputs).sample - before).abs().amin() > 0


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "depth"), [("scrdit-paper-d1", 1), ("scrdit-paper-d3", 3)])
def test_paper_presets(name, depth):
    """Hidden 768, 8 heads, patches of 10 with shared projections, depth 1 and 3."""
    model = SCRDiTTransformer(num_genes=2000, **SCRDIT_PRESETS[name])
    assert model.num_patches == 200
    assert (len(model.transformer_blocks), model.transformer_blocks[0].attn.heads) == (depth, 8)
    assert model.patch_embed.weight.shape == (768, 10)


def test_own_presets_grow():
    models = [SCRDiTTransformer(num_genes=2000, **SCRDIT_PRESETS[f"scrdit-{size}"]) for size in "sbl"]
    parameters = [model.num_parameters() for model in models]
    flops = [model.flops_per_cell() for model in models]
    assert parameters == sorted(parameters)
    assert flops == sorted(flops)
    assert set(SCRDIT_PRESETS) == {"scrdit-s", "scrdit-b", "scrdit-l", "scrdit-paper-d1", "scrdit-paper-d3"}


@pytest.mark.parametrize(
    ("name", "num_genes", "patch_size"),
    [
        ("scrdit-s", 500, 100),
        ("scrdit-s", 2000, 100),
        ("scrdit-s", 16791, 840),
        ("scrdit-l", 16791, 420),
        ("scrdit-paper-d1", 16791, 10),
    ],
)
def test_more_genes_make_patches_larger_not_more(name, num_genes, patch_size):
    assert fit_preset(name, num_genes) == SCRDIT_PRESETS[name] | {"patch_size": patch_size}


@pytest.mark.parametrize("patch_embed_type", PATCH_EMBED_TYPES)
@pytest.mark.parametrize("num_cell_tokens", [0, 2])
@pytest.mark.parametrize(("num_genes", "count_bins"), [(23, None), (25, None), (25, [[20, 4], [5, 9]])])
def test_flops_per_cell_against_the_flop_counter(patch_embed_type, num_genes, count_bins, num_cell_tokens, monkeypatch):
    # Label tables are looked up by a product on CPUs, which is no work of the model.
    monkeypatch.setattr("scrdit_diffusers.count_head.look_up", lambda table, rows: table[..., rows])
    kwargs = dict(mlp_ratio=3.0, count_bins=count_bins, num_cell_tokens=num_cell_tokens)
    model = make_model(patch_embed_type, num_genes, **kwargs)
    # The counter does not know the CPU's fused attention; the "math" backend is made of matmuls.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**make_inputs(4, num_genes))
    assert model.flops_per_cell() == counter.get_total_flops() / 4
