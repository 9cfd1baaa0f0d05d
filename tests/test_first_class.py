"""What diffusers users expect of any model and pipeline, on the tiny ones."""

import shutil

import pytest
import torch
from diffusers import AutoModel, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from scrdit_diffusers import SCRDiTPipeline, SCRDiTTransformer


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(4, 23, generator=generator),
        timestep=torch.tensor([3, 500, 40, 999]),
        class_labels=torch.tensor([[0, 1], [2, 0], [3, 2], [1, 1]]),
    )


@pytest.fixture
def count_inputs(inputs):
    generator = torch.Generator().manual_seed(2)
    counts = torch.poisson(torch.full((4, 23), 2.0), generator=generator)
    return inputs | {"library_size": counts.sum(dim=1), "counts": counts}


@pytest.fixture
def sample(pipe):
    """Denoise the same noise; keyword arguments go to the pipeline."""
    latents = torch.randn(3, 23, generator=torch.Generator().manual_seed(0))
    conditions = {"cell_type": "B", "batch": "b1"}

    def run(pipe=pipe, **kwargs):
        pipe.set_progress_bar_config(disable=True)
        kwargs = dict(num_inference_steps=4, output_type="latent", latents=latents, conditions=conditions) | kwargs
        return pipe(**kwargs).samples

    return run


# -- LoRA --------------------------------------------------------------------------------------------------------------


def add_lora(transformer):
    """Attach an adapter that already changes the output."""
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))


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
    SCRDiTPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(), base)
    pipe.load_lora_weights(tmp_path)
    # The file of diffusers keeps the weights, not lora_alpha: it is loaded with alpha = r, half of the scale here.
    torch.testing.assert_close(sample(attention_kwargs={"scale": 2.0}), adapted)
    assert pipe.get_active_adapters() == ["default_0"]


# -- attention, memory and caches --------------------------------------------------------------------------------------


def test_fused_qkv(model, inputs):
    before = model(**inputs).sample
    model.fuse_qkv_projections()
    assert model.transformer_blocks[0].attn.fused_projections
    torch.testing.assert_close(model(**inputs).sample, before)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(model(**inputs).sample, before)


def test_gradient_checkpointing_gives_the_same_gradients_of_counts(count_model, count_inputs):
    gradients = []
    for enable in (False, True):
        if enable:
            count_model.enable_gradient_checkpointing()
        count_model.train().zero_grad()
        count_model(**count_inputs).count_nll.sum().backward()
        gradients.append([p.grad.clone() for p in count_model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_gradient_checkpointing_gives_the_same_gradients(model, inputs):
    gradients = []
    for enable in (False, True):
        if enable:
            model.enable_gradient_checkpointing()
        model.train().zero_grad()
        model(**inputs).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert model.gradient_checkpointing
    assert len(gradients[0]) == len(list(model.parameters()))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=1e9),
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=["transformer_blocks"],
            current_timestep_callback=lambda: 500,
        ),
    ],
    ids=["first block", "pyramid attention broadcast"],
)
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


def test_layerwise_casting(pipe, sample):
    exact = sample()
    pipe.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)
    blocks = pipe.transformer.transformer_blocks
    assert blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    assert pipe.transformer.patch_embed.weight.dtype == torch.float32
    torch.testing.assert_close(sample(), exact, rtol=0.1, atol=0.1)


def test_layerwise_casting_leaves_the_count_head_alone(count_model, count_inputs):
    exact = count_model(**count_inputs).count_nll
    before = {name: tensor.clone() for name, tensor in count_model.count_head.state_dict().items()}
    count_model.enable_layerwise_casting(torch.bfloat16, torch.float32)
    assert count_model.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    after = count_model.count_head.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    torch.testing.assert_close(count_model(**count_inputs).count_nll, exact, rtol=0.1, atol=0.1)


# -- compilation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_full_graph_compile_once_for_all_timesteps(model, inputs):
    torch._dynamo.reset()
    expected = model(**inputs).sample
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the capture; code generation takes 30 s
    torch.testing.assert_close(compiled(**inputs).sample, expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(**inputs | {"timestep": inputs["timestep"] - 1})


@pytest.mark.parametrize("counts", [False, True], ids=["prediction", "likelihood"])
@torch.no_grad()
def test_full_graph_compile_with_a_count_head(count_model, count_inputs, counts):
    torch._dynamo.reset()
    count_inputs = count_inputs if counts else count_inputs | {"counts": None}
    expected = count_model(**count_inputs, return_dict=False)
    compiled = torch.compile(count_model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**count_inputs, return_dict=False), expected)


@torch.no_grad()
def test_export_with_a_count_head(count_model, count_inputs):
    arguments = dict(count_inputs, counts=None, return_dict=False)
    expected = count_model(**arguments)
    program = torch.export.export(count_model, (), arguments)
    torch.testing.assert_close(program.module()(**arguments), expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="code generation for a CPU needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, while compiling
@torch.no_grad()
def test_regional_compile(model, inputs):
    torch._dynamo.reset()
    expected = model(**inputs).sample
    model.compile_repeated_blocks(fullgraph=True)
    assert model.transformer_blocks[0]._compiled_call_impl is not None
    torch.testing.assert_close(model(**inputs).sample, expected)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_sharded_checkpoint(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(SCRDiTTransformer.from_pretrained(tmp_path)(**inputs).sample, model(**inputs).sample)


def test_variant_checkpoint(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, variant="ema")
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        SCRDiTTransformer.from_pretrained(tmp_path)
    loaded = SCRDiTTransformer.from_pretrained(tmp_path, variant="ema")
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


def test_auto_model_of_a_subfolder(pipe, inputs, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")
    assert isinstance(loaded, SCRDiTTransformer)
    assert torch.equal(loaded(**inputs).sample, pipe.transformer(**inputs).sample)


def test_bf16_pipeline(pipe, sample, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = SCRDiTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.transformer.parameters()} == {torch.bfloat16}
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


@pytest.mark.parametrize("num_classes", [[3, 2], None])
def test_bf16_model_of_shared_patches_keeps_its_positions(tmp_path, num_classes):
    SCRDiTTransformer(23, 5, "shared", 1, 2, 8, num_classes=num_classes).save_pretrained(tmp_path)
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
