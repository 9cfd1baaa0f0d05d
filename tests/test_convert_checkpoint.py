"""The converter of published checkpoints against a plain DiT, written here from the description of the DiT paper."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from scripts import load_script
from torch import nn
from transformers import HfArgumentParser

from scrdit_diffusers import SCRDiTPipeline, SCRDiTTransformer

SIZES = {  # genes, patch, width, heads, blocks, MLP ratio
    "one block": (40, 10, 32, 8, 1, 4),
    "three blocks": (40, 10, 32, 8, 3, 4),
    "other sizes": (42, 6, 24, 2, 2, 2),
}


class PlainMlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PlainAttention(nn.Module):
    """Peebles and Xie 2023, section 3.2, after Vaswani et al. 2017, equation 1; one matrix for q, k and v."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).split(x.shape[-1], -1))
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)  # (B, H, N, N)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class PlainBlock(nn.Module):
    """adaLN-Zero: scale and shift after each normalization, a gate before each residual."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.attn, self.mlp = PlainAttention(dim, heads), PlainMlp(dim, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        beta1, gamma1, alpha1, beta2, gamma2, alpha2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + alpha1 * self.attn(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + gamma1) + beta1)
        return x + alpha2 * self.mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + gamma2) + beta2)


class PlainFinalLayer(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.linear = nn.Linear(dim, patch)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        beta, gamma = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + gamma) + beta)


def sine_cosine(positions, width):
    """Sines, then cosines, of position / 10000^(i / (width / 2)); shape (positions, width)."""
    angles = positions[:, None] / 10000 ** (torch.arange(width // 2).double() / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], 1).float()


class PlainDiT(nn.Module):
    """The published model: genes as an image of (G, 1) pixels, patches of (P, 1), no labels."""

    def __init__(self, genes, patch, dim, heads, depth, mlp_ratio):
        super().__init__()
        num_patches = genes // patch
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(1, dim, (patch, 1), stride=(patch, 1))
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        # Half of the width for each axis of the (N, 1) grid: column 0, then row 0 ... N - 1.
        columns = sine_cosine(torch.zeros(num_patches).double(), dim // 2)
        rows = sine_cosine(torch.arange(num_patches).double(), dim // 2)
        self.pos_embed = nn.Parameter(torch.cat([columns, rows], 1)[None], requires_grad=False)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads, mlp_ratio * dim) for _ in range(depth))
        self.final_layer = PlainFinalLayer(dim, patch)

    def forward(self, x, t):
        tokens = self.x_embedder.proj(x[:, None, :, None]).flatten(2).transpose(1, 2) + self.pos_embed  # (B, N, D)
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = t[:, None] * frequencies
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1))
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.final_layer(tokens, c).flatten(1)


@pytest.fixture(scope="module")
def script():
    return load_script("convert_checkpoint")


@pytest.fixture
def run(script):
    def run(*arguments):
        arguments = [str(argument) for argument in arguments]
        script.main(HfArgumentParser(script.ConversionArguments).parse_args_into_dataclasses(arguments)[0])

    return run


def plain(name="one block"):
    torch.manual_seed(0)
    return PlainDiT(*SIZES[name]).eval()


@pytest.mark.parametrize("name", SIZES)
def test_converted_transformer_computes_the_same(script, name):
    oracle, heads = plain(name), SIZES[name][3]
    model = script.convert_to_transformer(oracle.state_dict(), heads)
    cells, timesteps = torch.randn(5, SIZES[name][0]), torch.tensor([0, 1, 250, 998, 999])
    with torch.no_grad():
        torch.testing.assert_close(model(cells, timesteps).sample, oracle(cells, timesteps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_there_and_back_is_the_identity(script, name):
    state = plain(name).state_dict()
    back = script.convert_to_published(script.convert_to_transformer(state, SIZES[name][3]))
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(back[key], tensor, rtol=0, atol=0)


def test_positions_are_those_of_a_model_of_our_own():
    genes, patch, dim, heads, depth, _ = SIZES["one block"]
    sizes = dict(num_layers=depth, num_attention_heads=heads, attention_head_dim=dim // heads)
    model = SCRDiTTransformer(genes, patch, "shared", **sizes)
    torch.testing.assert_close(model.pos_embed, plain().pos_embed[0], rtol=0, atol=1e-5)


def test_positions_of_the_checkpoint_are_kept(script):
    state = plain().state_dict()
    state["pos_embed"] = torch.randn_like(state["pos_embed"])
    torch.testing.assert_close(script.convert_to_transformer(state).pos_embed, state["pos_embed"][0])


def test_command_writes_a_pipeline_and_a_checkpoint_again(run, tmp_path):
    oracle = plain()
    torch.save(oracle.state_dict(), tmp_path / "published.pt")
    (tmp_path / "genes.txt").write_text("\n".join(f"G{i}" for i in range(40)))
    run("--checkpoint", tmp_path / "published.pt", "--genes", tmp_path / "genes.txt", "--output_dir", tmp_path / "pipe")
    pipe = SCRDiTPipeline.from_pretrained(tmp_path / "pipe")
    assert pipe.processor.var_names[3] == "G3" and pipe.processor.zero_negation and pipe.processor.zero_value == -10
    assert (pipe.processor.mean == 0).all() and (pipe.processor.std == 1).all()
    expected = {"prediction_type": "epsilon", "beta_schedule": "linear", "num_train_timesteps": 1000}
    assert {name: pipe.scheduler.config[name] for name in expected} == expected
    pipe.set_progress_bar_config(disable=True)
    assert pipe(2, num_inference_steps=2).adata.shape == (2, 40)

    run("--pipeline", tmp_path / "pipe", "--output", tmp_path / "back.pt")
    again = PlainDiT(*SIZES["one block"])
    again.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True))
    cells, timesteps = torch.randn(3, 40), torch.tensor([0, 500, 999])
    torch.testing.assert_close(again(cells, timesteps), oracle(cells, timesteps))


def test_genes_are_numbered_without_a_list(run, tmp_path):
    torch.save(plain().state_dict(), tmp_path / "published.pt")
    run("--checkpoint", tmp_path / "published.pt", "--output_dir", tmp_path / "pipe")
    assert SCRDiTPipeline.from_pretrained(tmp_path / "pipe").processor.var_names[39] == "gene39"


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


def broken(**changes):
    state = plain().state_dict() | changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


BAD_CHECKPOINTS = {
    "code": ({"model": Harmful()}, r"published\.pt .*torch\.save"),
    "nested": ({"model": {"a": torch.ones(1)}, "epoch": 3}, r"published\.pt .*'epoch': 'int'"),
    "no names": ({0: torch.ones(1)}, r"published\.pt .*'0': 'Tensor'"),
    "sparse": (
        broken(**{"final_layer.linear.bias": torch.ones(10).to_sparse()}),
        r"published\.pt .*'final_layer\.linear\.bias': 'Tensor'",
    ),
    "no dict": ([torch.ones(1)], r"published\.pt .* list,"),
    "another model": ({"weight": torch.ones(2, 2)}, r"x_embedder\.proj\.weight .*\['weight'\]"),
    "labels": (
        broken(**{"y_embedder.embedding_table.weight": torch.ones(3, 32)}),
        r" nothing, .*\['y_embedder\.embedding_table\.weight'\]",
    ),
    "a tensor is missing": (broken(**{"blocks.0.mlp.fc2.bias": None}), r"\['blocks\.0\.mlp\.fc2\.bias'\], .* nothing"),
    "variances": (
        broken(**{"final_layer.linear.weight": torch.ones(20, 32)}),
        r"final_layer\.linear\.weight .*\(20, 32\).*\(10, 32\)",
    ),
    "NaN": (
        broken(**{"final_layer.linear.bias": torch.full((10,), torch.nan)}),
        r"^final_layer\.linear\.bias .*torch\.float32",
    ),
    "square patches": (
        broken(**{"x_embedder.proj.weight": torch.ones(32, 1, 10, 10)}),
        r"x_embedder\.proj\.weight .*\(32, 1, 10, 10\)",
    ),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # torch 2.15
@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_other_checkpoints_are_refused(run, tmp_path, capsys, name):
    content, message = BAD_CHECKPOINTS[name]
    torch.save(content, tmp_path / "published.pt")
    with pytest.raises(ValueError, match=message):
        run("--checkpoint", tmp_path / "published.pt", "--output_dir", tmp_path / "pipe")
    assert "must not run" not in capsys.readouterr().out and not (tmp_path / "pipe").exists()


def half_of_a_checkpoint():
    buffer = io.BytesIO()
    torch.save(plain().state_dict(), buffer)
    return buffer.getvalue()[: buffer.tell() // 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", r"published\.pt .*torch\.save"),
        (b"", r"published\.pt .*torch\.save"),
        (half_of_a_checkpoint(), r"published\.pt .*torch\.save"),
        (None, r"--checkpoint .*published\.pt"),
    ],
    ids=["text", "empty", "cut off", "absent"],
)
def test_files_that_are_no_checkpoint_are_refused(run, tmp_path, content, message):
    if content is not None:
        (tmp_path / "published.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run("--checkpoint", tmp_path / "published.pt", "--output_dir", tmp_path / "pipe")


def test_wrong_number_of_genes_is_refused(run, tmp_path):
    torch.save(plain().state_dict(), tmp_path / "published.pt")
    (tmp_path / "genes.txt").write_text("A\nB\nC")
    with pytest.raises(ValueError, match="--genes .* 3 .* 40"):
        run(
            "--checkpoint", tmp_path / "published.pt", "--genes", tmp_path / "genes.txt", "--output_dir", tmp_path / "p"
        )


def test_heads_that_do_not_divide_the_width_are_refused(script):
    with pytest.raises(ValueError, match="num_attention_heads=5 .* 32 "):
        script.convert_to_transformer(plain().state_dict(), 5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_genes": 20, "patch_size": 10}, "patch_embed_type='per_patch'"),
        ({"num_genes": 23, "patch_size": 10, "patch_embed_type": "shared"}, "23 genes.*patch_size=10"),
        ({"num_genes": 20, "patch_size": 10, "patch_embed_type": "shared", "num_classes": [2]}, r"num_classes=\[2\]"),
    ],
)
def test_models_without_a_published_form_are_refused(script, sizes, message):
    with pytest.raises(ValueError, match=message):
        script.convert_to_published(SCRDiTTransformer(**sizes, num_layers=1))


def test_nothing_is_overwritten(run, tmp_path):
    torch.save(plain().state_dict(), tmp_path / "published.pt")
    (tmp_path / "pipe").mkdir()
    with pytest.raises(ValueError, match="/pipe "):
        run("--checkpoint", tmp_path / "published.pt", "--output_dir", tmp_path / "pipe")
