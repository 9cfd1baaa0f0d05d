"""Damaged and lying files of a pipeline are refused with their names, before memory is taken."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scrdit_diffusers import SCRDiTPipeline, SCRDiTTransformer
from scrdit_diffusers.stored_weights import read_header, read_headers

WEIGHTS = "diffusion_pytorch_model.safetensors"
PUBLISHED = Path(__file__).parent / "pipelines_613385b"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(PUBLISHED / "counts", tmp_path / "pipeline")


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_headers_tell_shapes_and_kinds(folder):
    tensors = load_file(folder / "transformer" / WEIGHTS)
    header = read_header(folder / "transformer" / WEIGHTS)
    assert {name: stored.shape for name, stored in header.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {n for n, t in tensors.items() if not t.is_floating_point()} == {"count_head.gene_order"}
    assert not header["count_head.gene_order"].is_floating_point and header["adaln_out.bias"].is_floating_point


def test_headers_of_shards_are_joined(folder, tmp_path):
    model = SCRDiTTransformer.from_pretrained(folder, subfolder="transformer")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert read_headers(tmp_path / "shards").keys() == model.state_dict().keys()
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(OSError, match="00001-of-.* is missing"):
        SCRDiTTransformer.from_pretrained(tmp_path / "shards")


@pytest.mark.parametrize("name", ["counts", "log_normalized", "paper", "steps"])
@pytest.mark.parametrize(
    "setting, value",
    [
        ("num_genes", 10**9),
        ("patch_size", 10**9),
        ("num_layers", 10**9),
        ("num_attention_heads", 10**9),
        ("attention_head_dim", 10**9),
        ("mlp_ratio", 1e9),
        ("num_cell_tokens", 10**9),
        ("num_classes", [10**9]),
        ("num_classes", [3] * 10**5),
        ("count_bins", [[10**9, 10**9]]),
        ("num_layers", 0),
        ("num_layers", "2"),
        ("num_genes", None),
        ("num_genes", 1.5),
        ("num_classes", "ab"),
        ("count_bins", [1]),
        ("patch_embed_type", []),
    ],
)
def test_a_config_that_asks_for_other_weights_is_refused(name, setting, value):
    """Building a model of such sizes would take all memory."""
    source = PUBLISHED / name / "transformer"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="config.json"):
        patch.setattr(
            "scrdit_diffusers.stored_weights.read_json", lambda p: json.loads(p.read_text()) | {setting: value}
        )
        SCRDiTTransformer.from_pretrained(source)


def test_a_count_head_of_absurd_length_is_refused(folder):
    change(folder / "transformer" / "config.json", num_train_timesteps=10**9)
    with pytest.raises(OSError, match=r"alphas_cumprod of shape \(1000,\).*1000000000"):
        SCRDiTPipeline.from_pretrained(folder)


@pytest.mark.parametrize("setting", ["num_train_timesteps", "solver_order", "beta_end"])
def test_a_scheduler_of_absurd_size_is_refused(folder, setting):
    change(folder / "scheduler" / "scheduler_config.json", **{setting: 10**9})
    with pytest.raises(OSError, match=f"scheduler_config.json has {setting}=1000000000"):
        SCRDiTPipeline.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 7, 100, 20_000, -1])
def test_weights_that_were_cut_off_are_refused(folder, size):
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(OSError, match=f"{WEIGHTS} is no whole safetensors file"):
        SCRDiTPipeline.from_pretrained(folder)


@pytest.mark.parametrize("lie", ["length", "offsets", "shape", "dtype", "more layers", "fewer"])
def test_headers_that_lie_are_refused(folder, lie):
    path = folder / "transformer" / WEIGHTS
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if lie == "offsets":
        header["adaln_out.bias"]["data_offsets"] = [0, 10**15]
    elif lie == "shape":
        header["proj_out.weight"]["shape"] = header["proj_out.weight"]["shape"][::-1]
    elif lie == "dtype":
        header["adaln_out.bias"]["dtype"] = "I32"
    elif lie == "more layers":
        header["transformer_blocks.7.adaln.bias"] = header.pop("adaln_out.bias")
    elif lie == "fewer":
        change(folder / "transformer" / "config.json", num_cell_tokens=0)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", 10**18 if lie == "length" else len(text)) + text + content[8 + length :])
    with pytest.raises(OSError, match=WEIGHTS):
        SCRDiTPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff{}", b"[" * 10**5])
def test_damaged_json_is_refused(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(OSError, match=name.split("/")[-1]):
        SCRDiTPipeline.from_pretrained(folder)


def test_missing_weights_are_an_error(folder):
    weights = load_file(folder / "transformer" / WEIGHTS)
    weights.pop("proj_out.bias")
    save_file(weights, folder / "transformer" / WEIGHTS)
    with pytest.raises(OSError, match=r"lacks 1 weights, such as proj_out.bias"):
        SCRDiTTransformer.from_pretrained(folder / "transformer")


def test_a_damaged_adapter_is_refused(folder, tmp_path):
    pipe = SCRDiTPipeline.from_pretrained(folder)
    for content in (b"", b"PK\x03\x04" + b"0" * 100):
        (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(content)
        with pytest.raises(OSError, match="safetensors"):
            pipe.load_lora_weights(str(tmp_path))


@pytest.mark.parametrize("damage", ["shape", "kind", "missing", "renamed", "all renamed", "not LoRA"])
def test_an_adapter_that_does_not_fit_is_refused(folder, tmp_path, damage):
    weights = load_file(PUBLISHED / "adapter" / "pytorch_lora_weights.safetensors")
    name = "transformer.adaln_out.lora_A.weight"
    if damage == "shape":
        weights[name] = weights[name][:, :3].contiguous()
    elif damage == "kind":
        weights[name] = weights[name].int()
    elif damage == "missing":
        del weights[name]
    elif damage == "renamed":
        weights["transformer.adaln_ouu.lora_A.weight"] = weights.pop(name)
    elif damage == "all renamed":
        weights = {name.replace("transformer.", "transformed."): tensor for name, tensor in weights.items()}
    else:
        weights = {"transformer.adaln_out.weight": weights[name]}
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    pipe = SCRDiTPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=str(tmp_path)):
        pipe.load_lora_weights(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises((OSError, ValueError), match=str(tmp_path / "nowhere")):
        SCRDiTPipeline.from_pretrained(tmp_path / "nowhere")
