"""What diffusers users expect of any model and pipeline, on the tiny ones: without and with a count head."""

import importlib.util
import shutil

import accelerate
import pytest
import torch
from diffusers import (
    AutoModel,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError

from scrdit_diffusers import SCRDiTPipeline, SCRDiTTransformer, default_scheduler

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="code generation for a CPU needs a C++ compiler"
)
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
from_torch = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # while it compiles


@pytest.fixture(params=["prediction", "counts"])
def model(request, model):
    """Each test runs for the model that predicts cells and for the one that predicts their counts."""
    return model if request.param == "prediction" else request.getfixturevalue("count_model")


@pytest.fixture
def pipe(model, processor):
    decode_timestep = None if model.count_head is None else 50
    pipe = SCRDiTPipeline(model, default_scheduler(), processor, decode_timestep=decode_timestep)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def inputs(model):
    generator = torch.Generator().manual_seed(1)
    inputs = dict(
        hidden_states=torch.randn(4, 23, generator=generator),
        timestep=torch.tensor([3, 500, 40, 999]),
        class_labels=torch.tensor([[0, 1], [2, 0], [3, 2], [1, 1]]),
    )
    return inputs if model.count_head is None else inputs | {"library_size": torch.tensor([30.0, 50.0, 70.0, 60.0])}


@pytest.fixture
def count_inputs(model, inputs):
    """What training gives the model: with a count head, counts too."""
    if model.count_head is None:
        return inputs
    return inputs | {"counts": torch.poisson(torch.full((4, 23), 2.0), generator=torch.Generator().manual_seed(2))}


@pytest.fixture
def sample(pipe):
    """Denoise the same noise; keyword arguments go to the pipeline."""
    latents = torch.randn(3, 23, generator=torch.Generator().manual_seed(0))
    conditions = {"cell_type": "B", "batch": "b1"}

    def run(pipe=pipe, **kwargs):
        pipe.set_progress_bar_config(disable=True)
        kwargs = dict(num_inference_steps=4, output_type="latent", latents=latents, conditions=conditions) | kwargs
        return pipe(**kwargs, generator=torch.Generator().manual_seed(0)).samples

    return run


# -- LoRA --------------------------------------------------------------------------------------------------------------


def add_lora(transformer, seed=0, rank=2):
    """Attach an adapter that already changes the output."""
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
    transformer.add_adapter(config)


def test_lora_scale_and_unload(model, inputs):
    base = model(**inputs).sample
    add_lora(model)
    full, half, zero = (model(**inputs, attention_kwargs={"scale": s}).sample for s in (1.0, 0.5, 0.0))
    torch.testing.assert_close(zero, base)
    assert torch.equal(full, model(**inputs).sample)
    assert not torch.allclose(full, base)
    assert not torch.allclose(half, full)
    model.unload_lora()
    torch.testing.assert_close(model(**inputs).sample, base)


def test_lora_save_and_load_on_the_transformer(model, inputs, tmp_path):
    base = model(**inputs).sample
    add_lora(model)
    adapted = model(**inputs).sample
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    torch.testing.assert_close(model(**inputs).sample, base)
    model.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
    torch.testing.assert_close(model(**inputs).sample, adapted)


def test_lora_save_and_load_on_the_pipeline(pipe, sample, tmp_path):
    base = sample()
    add_lora(pipe.transformer)
    adapted, scaled = sample(), sample(attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(scaled, base)
    SCRDiTPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),  # without, alpha is lost
    )
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(), base)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(sample(), adapted)
    assert pipe.get_active_adapters() == ["default_0"]


def save_adapter(pipe, folder, seed, rank=2):
    """Save a random adapter and give back the folder; the pipeline is left without one."""
    add_lora(pipe.transformer, seed, rank)
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    pipe.unload_lora_weights()
    return folder


def test_a_pipeline_is_not_saved_with_an_adapter(pipe, sample, tmp_path):
    """It could not be loaded; fused and unloaded, it is."""
    pipe.load_lora_weights(save_adapter(pipe, tmp_path, seed=0))
    tuned = sample(output_type="pt")
    for saved in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match="adapter is loaded"):
            saved.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model_index.json").exists()
    pipe.fuse_lora(components=["transformer"])
    with pytest.raises(ValueError, match="adapter is loaded"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    loaded = SCRDiTPipeline.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(sample(loaded, output_type="pt"), tuned, rtol=1e-4, atol=1e-4)


def test_lora_fuse_and_unfuse(pipe, sample, tmp_path):
    pipe.load_lora_weights(save_adapter(pipe, tmp_path, seed=0))
    adapted = sample()
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    before = weight.clone()
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    assert not torch.allclose(weight, before)
    torch.testing.assert_close(sample(), adapted)
    pipe.unfuse_lora()
    torch.testing.assert_close(weight, before)
    torch.testing.assert_close(sample(), adapted)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_lora_adapters_are_mixed_and_deleted(pipe, sample, tmp_path):
    outputs = {}
    for seed, name in enumerate(["first", "second"]):
        pipe.load_lora_weights(save_adapter(pipe, tmp_path / name, seed), adapter_name=name)
        outputs[name] = sample()
        pipe.unload_lora_weights()
    for name in outputs:
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    torch.testing.assert_close(sample(), outputs["first"])
    pipe.set_adapters(["first", "second"], [0.5, 0.5])
    assert not any(torch.allclose(sample(), output) for output in outputs.values())
    pipe.delete_adapters("first")
    pipe.set_adapters("second")
    torch.testing.assert_close(sample(), outputs["second"])


def test_lora_hot_swap(pipe, sample, tmp_path):
    first, second = (save_adapter(pipe, tmp_path / str(seed), seed, rank=1 + seed) for seed in range(2))
    pipe.load_lora_weights(second)
    expected = sample()
    pipe.unload_lora_weights()
    pipe.enable_lora_hotswap(target_rank=2)
    pipe.load_lora_weights(first, adapter_name="swapped")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert not torch.allclose(sample(), expected)
    pipe.load_lora_weights(second, adapter_name="swapped", hotswap=True)
    assert pipe.transformer.transformer_blocks[0].attn.to_q is layer
    torch.testing.assert_close(sample(), expected)


def test_pickled_adapters_are_not_written(pipe, tmp_path):
    add_lora(pipe.transformer)
    layers = get_peft_model_state_dict(pipe.transformer)
    with pytest.raises(ValueError, match="^safe_serialization=False "):
        pipe.save_lora_weights(tmp_path / "adapter", layers, safe_serialization=False)
    with pytest.raises(ValueError, match="^safe_serialization=False "):
        pipe.transformer.save_lora_adapter(tmp_path / "adapter", safe_serialization=False)
    assert not (tmp_path / "adapter").exists()


# -- attention, memory and caches --------------------------------------------------------------------------------------


def test_fused_qkv(model, inputs):
    before = model(**inputs).sample
    model.fuse_qkv_projections()
    assert model.transformer_blocks[0].attn.fused_projections
    torch.testing.assert_close(model(**inputs).sample, before)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(model(**inputs).sample, before)


@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()
def test_attention_backends(model, inputs, backend, monkeypatch):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    before = model(**inputs).sample
    model.set_attention_backend(backend)
    assert model.transformer_blocks[0].attn.processor._attention_backend == backend
    torch.testing.assert_close(model(**inputs).sample, before)


def test_gradient_checkpointing_gives_the_same_gradients(model, count_inputs):
    gradients = []
    for enable in (False, True):
        if enable:
            model.enable_gradient_checkpointing()
        model.train().zero_grad()
        sum(tensor.square().sum() for tensor in model(**count_inputs, return_dict=False)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert model.gradient_checkpointing
    assert len(gradients[0]) == len(list(model.parameters()))
    torch.testing.assert_close(gradients[1], gradients[0])


TAYLORSEER = dict(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32)
CACHES = {
    "first block": FirstBlockCacheConfig(threshold=1e9),
    "pyramid attention broadcast": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=["transformer_blocks"],
        current_timestep_callback=lambda: 500,
    ),
    "MagCache": MagCacheConfig(threshold=1e9, retention_ratio=0.25, num_inference_steps=4, mag_ratios=[1.0] * 4),
    "TaylorSeer": TaylorSeerCacheConfig(**TAYLORSEER),
    "TaylorSeer, lite": TaylorSeerCacheConfig(**TAYLORSEER, use_lite_mode=True),
}
each_cache = pytest.mark.parametrize("config", CACHES.values(), ids=CACHES.keys())


@each_cache
def test_caches_skip_work(pipe, sample, config):
    exact = sample()
    calls = []
    layer = pipe.transformer.transformer_blocks[1].attn.to_q
    hook = layer.register_forward_hook(lambda *args: calls.append(1))
    pipe.transformer.enable_cache(config)
    cached = sample()
    assert 1 <= len(calls) < 4
    assert torch.isfinite(cached).all()
    pipe.transformer.disable_cache()
    hook.remove()
    torch.testing.assert_close(sample(), exact)


@each_cache
def test_caches_start_anew_with_every_batch_of_cells(pipe, sample, config):
    latents = torch.randn(6, 23, generator=torch.Generator().manual_seed(1))
    kwargs = {} if pipe.transformer.count_head is None else {"library_size": 60}
    pipe.transformer.enable_cache(config)
    apart = torch.cat([sample(latents=part, **kwargs) for part in latents.split(3)])
    assert torch.equal(sample(latents=latents, batch_size=3, **kwargs), apart)


@each_cache
def test_a_call_that_broke_off_leaves_nothing_in_a_cache(pipe, sample, config):
    def break_off(pipe, step, *args):
        if step == 1:
            raise KeyboardInterrupt

    pipe.transformer.enable_cache(config)
    expected = sample()
    with pytest.raises(KeyboardInterrupt):
        sample(latents=torch.ones(3, 23), callback_on_step_end=break_off)
    assert torch.equal(sample(), expected)


@torch.no_grad()
def test_lite_taylorseer_extrapolates_all_projections(model, inputs):
    calls = []
    model.transformer_blocks[1].attn.to_q.register_forward_hook(lambda *args: calls.append(1))
    model.enable_cache(CACHES["TaylorSeer, lite"])
    with model.cache_context("cond"):
        computed, extrapolated = (model(**inputs).sample for _ in range(2))
    assert len(calls) == 1
    torch.testing.assert_close(extrapolated, computed)


def test_layerwise_casting(pipe, sample):
    exact = sample()
    transformer = pipe.transformer
    of_head = {k: v.clone() for k, v in transformer.state_dict().items() if k.startswith("count_head")}
    transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)
    assert transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    assert transformer.patch_embed.weight.dtype == torch.float32
    assert all(torch.equal(transformer.state_dict()[name], tensor) for name, tensor in of_head.items())
    torch.testing.assert_close(sample(), exact, rtol=0.1, atol=0.1)


# -- offloading --------------------------------------------------------------------------------------------------------

# On a CPU an offloaded weight has no values where no hook brings it back: sequential offloading leaves it on the meta
# device, and group offloading to a disk leaves memory that was not initialized.
CPU = torch.device("cpu")
OFFLOADING = {
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    # What enable_sequential_cpu_offload does; with its device "cpu:0" Accelerate fails for any model.
    "sequential": lambda pipe, folder: accelerate.cpu_offload(pipe.transformer, CPU),
    "block": lambda pipe, folder: pipe.enable_group_offload(
        CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=folder
    ),
    "leaf": lambda pipe, folder: pipe.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=folder),
}


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("offload", OFFLOADING.values(), ids=OFFLOADING.keys())
def test_offloading_gives_the_same_cells(pipe, sample, tmp_path, offload, guidance_scale):
    kwargs = dict(output_type="pt", guidance_scale=guidance_scale)
    expected = sample(**kwargs)
    offload(pipe, str(tmp_path))
    for _ in range(2):
        torch.testing.assert_close(sample(**kwargs), expected)


@torch.no_grad()
def test_offloading_gives_the_same_likelihood(pipe, count_inputs, tmp_path):
    expected = pipe.transformer(**count_inputs, return_dict=False)[-1]
    OFFLOADING["sequential"](pipe, str(tmp_path))
    torch.testing.assert_close(pipe.transformer(**count_inputs, return_dict=False)[-1], expected)


@pytest.mark.parametrize("device_map", ["auto", "balanced", {"": "cpu"}], ids=str)
def test_device_map(model, inputs, tmp_path, device_map):
    model.save_pretrained(tmp_path)
    loaded = SCRDiTTransformer.from_pretrained(tmp_path, device_map=device_map)
    assert loaded.hf_device_map == {"": "cpu"}
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


def test_device_map_with_blocks_on_disk(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "model")
    device_map = {name: "disk" if name == "transformer_blocks" else "cpu" for name, _ in model.named_children()}
    loaded = SCRDiTTransformer.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.transformer_blocks[0].attn.to_q.weight.device == torch.device("meta")
    torch.testing.assert_close(loaded(**inputs).sample, model(**inputs).sample)


@pytest.mark.skipif(accelerate.__version__ < "1.15", reason="Accelerate puts no whole model on disk before 1.15")
@pytest.mark.parametrize("model_class", [SCRDiTTransformer, AutoModel])
def test_a_pipeline_of_a_transformer_on_disk(pipe, sample, tmp_path, model_class):
    expected = sample(output_type="pt")
    folder = str(tmp_path / "pipeline")
    pipe.save_pretrained(folder)
    on_disk = dict(device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    transformer = model_class.from_pretrained(folder, subfolder="transformer", **on_disk)
    assert {parameter.device.type for parameter in transformer.parameters()} == {"meta"}
    loaded = SCRDiTPipeline.from_pretrained(folder, transformer=transformer)
    assert torch.equal(sample(loaded, output_type="pt"), expected)


@pytest.mark.parametrize("offload", [OFFLOADING[name] for name in ("sequential", "block", "leaf")])
def test_offloaded_weights_are_not_saved(pipe, tmp_path, offload):
    offload(pipe, str(tmp_path / "offload"))
    with pytest.raises(ValueError, match="weights .*offloaded"):
        pipe.save_pretrained(tmp_path / "saved")


def test_model_offloading_saves_all(pipe, inputs, tmp_path):
    OFFLOADING["model"](pipe, None)
    pipe.save_pretrained(tmp_path)
    loaded = SCRDiTTransformer.from_pretrained(tmp_path, subfolder="transformer")
    assert torch.equal(loaded(**inputs).sample, pipe.transformer(**inputs).sample)


# -- quantization ------------------------------------------------------------------------------------------------------


@needs_torchao
def test_int8_weights(model, inputs, tmp_path):
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    model.save_pretrained(tmp_path)
    # torchao cannot quantize a weight of one column, as the embedding of the library size has.
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["library_size_embed"])
    loaded = SCRDiTTransformer.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    assert type(loaded.transformer_blocks[0].attn.to_q.weight).__name__ == "Int8Tensor"
    exact = model(**inputs).sample
    quantized = loaded(**inputs).sample
    assert not torch.equal(quantized, exact)
    torch.testing.assert_close(quantized, exact, rtol=0.1, atol=0.1)


# -- compilation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["counts"], indirect=True)  # pipelines compile the rest, below
@torch.no_grad()
def test_full_graph_compile_of_the_likelihood(model, count_inputs):
    torch._dynamo.reset()
    expected = model(**count_inputs, return_dict=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the capture; code generation takes 30 s
    torch.testing.assert_close(compiled(**count_inputs, return_dict=False), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(**count_inputs | {"timestep": count_inputs["timestep"] - 1}, return_dict=False)


def test_a_pipeline_compiles_once_for_all_steps(pipe, sample):
    torch._dynamo.reset()
    expected = sample(output_type="pt")
    pipe.transformer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(sample(output_type="pt"), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        sample(output_type="pt", num_inference_steps=7)


@needs_compiler
@from_torch
@pytest.mark.parametrize("model", ["prediction"], indirect=True)  # blocks know nothing of the count head
@torch.no_grad()
def test_regional_compile(model, inputs):
    torch._dynamo.reset()
    expected = model(**inputs).sample
    model.compile_repeated_blocks(fullgraph=True)
    assert model.transformer_blocks[0]._compiled_call_impl is not None
    with torch._dynamo.config.patch(recompile_limit=1):  # one graph for all blocks
        torch.testing.assert_close(model(**inputs).sample, expected)
        torch.testing.assert_close(model(**inputs).sample, expected)


@torch.no_grad()
def test_export(model, inputs):
    arguments = dict(inputs, return_dict=False)
    expected = model(**arguments)
    program = torch.export.export(model, (), arguments)
    torch.testing.assert_close(program.module()(**arguments), expected)


@pytest.mark.slow
@needs_compiler
@from_torch
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch, of itself
def test_compile_ahead_of_time(model, inputs, tmp_path):
    arguments = dict(inputs, return_dict=False)
    program = torch.export.export(model, (), arguments)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(compiled(**arguments)[0], model(**inputs).sample)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_sharded_checkpoint(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(SCRDiTTransformer.from_pretrained(tmp_path)(**inputs).sample, model(**inputs).sample)


def test_variant_checkpoint(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, variant="ema")
    with pytest.raises(OSError, match=r" diffusion_pytorch_model\.safetensors "):
        SCRDiTTransformer.from_pretrained(tmp_path)
    loaded = SCRDiTTransformer.from_pretrained(tmp_path, variant="ema")
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


@pytest.mark.parametrize(("before", "after"), [("10KB", "10GB"), ("10GB", "10KB"), ("10KB", "20KB")])
@pytest.mark.parametrize("variant", [None, "ema"])
def test_a_pipeline_replaces_one_of_other_shards(pipe, sample, tmp_path, before, after, variant):
    """Nothing of the first one's weights is read, nor is a byte of them left; other variants and files stay."""
    other = {None: "ema", "ema": None}[variant]
    pipe.save_pretrained(tmp_path, variant=other)
    pipe.save_pretrained(tmp_path, max_shard_size=before, variant=variant)
    (tmp_path / "notes.txt").touch()
    pipe = SCRDiTPipeline.from_pretrained(tmp_path, variant=variant)  # mapped into memory: the files that are replaced
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(1.0)
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path, max_shard_size=after, variant=variant)
    assert torch.equal(sample(SCRDiTPipeline.from_pretrained(tmp_path, variant=variant)), expected)
    assert not torch.equal(sample(SCRDiTPipeline.from_pretrained(tmp_path, variant=other)), expected)
    pipe.save_pretrained(tmp_path / "fresh", max_shard_size=after, variant=variant)
    mine = {path.name for path in (tmp_path / "transformer").iterdir() if (".ema" in path.name) == (variant == "ema")}
    fresh = {path.name for path in (tmp_path / "fresh" / "transformer").iterdir()}
    assert mine | {"config.json"} == fresh and (tmp_path / "notes.txt").exists()


def test_a_pipeline_that_cannot_be_written_leaves_the_one_before(pipe, sample, tmp_path, monkeypatch):
    expected = sample()
    pipe.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(1.0)

    def save(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", save)
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert torch.equal(sample(SCRDiTPipeline.from_pretrained(tmp_path)), expected)


def test_auto_model_of_a_subfolder(pipe, inputs, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")
    assert isinstance(loaded, SCRDiTTransformer)
    assert torch.equal(loaded(**inputs).sample, pipe.transformer(**inputs).sample)


def test_bf16_pipeline(pipe, sample, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = SCRDiTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    of_network = [p for name, p in loaded.transformer.named_parameters() if not name.startswith("count_head")]
    assert {p.dtype for p in of_network} == {torch.bfloat16}
    samples = sample(loaded)
    assert samples.dtype == torch.float32
    torch.testing.assert_close(samples, sample(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("load", [False, True], ids=["cast", "loaded"])
def test_half_precision_pipeline_draws_counts(count_pipe, tmp_path, dtype, load):
    kwargs = dict(num_cells=8, num_inference_steps=4, conditions={"cell_type": "B"}, library_size=60)
    exact = count_pipe(**kwargs, generator=torch.manual_seed(0)).adata.X.toarray()
    if load:
        count_pipe.save_pretrained(tmp_path)
        count_pipe = SCRDiTPipeline.from_pretrained(tmp_path, dtype=dtype)
        count_pipe.set_progress_bar_config(disable=True)
    else:
        count_pipe.to(dtype)
    assert count_pipe.transformer.dtype == dtype
    cells = count_pipe(**kwargs, generator=torch.manual_seed(0)).adata.X.toarray()
    assert (cells == exact).mean() > 0.9


SIZE = dict(num_layers=1, num_attention_heads=2, attention_head_dim=8)


@pytest.mark.parametrize("num_classes", [[3, 2], None])
def test_bf16_model_of_shared_patches_keeps_its_positions(tmp_path, num_classes):
    SCRDiTTransformer(23, 5, "shared", **SIZE, num_classes=num_classes).save_pretrained(tmp_path)
    loaded = SCRDiTTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.pos_embed.dtype == torch.float32
    assert loaded(torch.randn(2, 23, dtype=torch.bfloat16), 3).sample.dtype == torch.bfloat16


# -- callbacks and properties ------------------------------------------------------------------------------------------


def test_callback_sees_every_step_and_can_change_the_latents(pipe, sample):
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append((step, int(timestep), pipe.current_timestep == timestep, list(kwargs)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else {}

    assert not sample(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"]).any()
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    assert [t for _, t, *_ in seen] == pipe.scheduler.timesteps.tolist()
    assert all(same and names == ["latents"] for *_, same, names in seen)
    assert (pipe.num_timesteps, pipe.current_timestep) == (4, None)


def test_properties_describe_the_running_call(pipe, sample):
    seen = []

    def callback(pipe, *args):
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.attention_kwargs, pipe.interrupt))

    sample(num_inference_steps=1, guidance_scale=2.0, attention_kwargs={"scale": 1.0}, callback_on_step_end=callback)
    sample(num_inference_steps=1, callback_on_step_end=callback)
    assert seen == [(2.0, True, {"scale": 1.0}, False), (1.0, False, None, False)]


def interrupt_at(batch, step):
    """Make a callback that stops the pipeline at one step of one batch of cells."""
    steps = []

    def callback(pipe, i, timestep, kwargs):
        steps.append(i)
        pipe._interrupt = steps.count(0) == batch and i == step
        return {}

    return callback


def test_interrupt_leaves_out_unfinished_cells(pipe, caplog):
    kwargs = dict(num_cells=6, num_inference_steps=3, batch_size=2)
    cells = pipe(**kwargs, callback_on_step_end=interrupt_at(batch=2, step=0)).adata
    assert cells.shape == (2, 23)
    assert "Interrupted: 2 of 6 cells are finished" in caplog.text
    assert pipe(**kwargs).adata.n_obs == 6


def test_interrupt_keeps_latents_as_they_are(sample):
    stopped = sample(callback_on_step_end=interrupt_at(batch=1, step=1))
    kept = []
    sample(callback_on_step_end=lambda pipe, i, t, kwargs: kept.append(kwargs["latents"]) or {})
    assert torch.equal(stopped, kept[1])


@torch.no_grad()
def test_hotswapping_an_adapter_does_not_recompile(model, inputs, tmp_path):
    torch._dynamo.reset()
    fresh = type(model).from_config(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    expected = []
    for rank in (2, 3):
        torch.manual_seed(rank)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=["to_q", "to_k"]))
        expected.append(model(**inputs).sample)
        model.save_lora_adapter(tmp_path / str(rank))
        model.delete_adapters("default")
    adapters = [str(tmp_path / str(rank) / "pytorch_lora_weights.safetensors") for rank in (2, 3)]
    fresh.enable_lora_hotswap(target_rank=3)
    fresh.load_lora_adapter(adapters[0], adapter_name="default", prefix=None)
    compiled = torch.compile(fresh, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(**inputs).sample, expected[0])
        fresh.load_lora_adapter(adapters[1], adapter_name="default", hotswap=True, prefix=None)
        torch.testing.assert_close(compiled(**inputs).sample, expected[1])
    assert not torch.allclose(*expected)
