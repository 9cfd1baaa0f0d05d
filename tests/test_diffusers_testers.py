"""diffusers' own tests of models and pipelines, run on ours, where DIFFUSERS_SOURCE names a checkout of diffusers:

    DIFFUSERS_SOURCE=../diffusers pytest -o addopts= -o filterwarnings=default tests/test_diffusers_testers.py

The checkout should be of the installed version; these tests are no part of the installed package. The options lift our
rules on markers and warnings, by which theirs are not written. Tests that ask for an accelerator run on a CPU too,
except those that `NEEDS_A_GPU` names; those that are no tests of ours stand in `DO_NOT_APPLY`.
"""

import functools
import importlib
import importlib.util
import os
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from scrdit_diffusers import SCRDiTPipeline, SCRDiTProcessor, SCRDiTTransformer, default_scheduler

SOURCE = os.environ.get("DIFFUSERS_SOURCE")
if SOURCE is None:
    pytest.skip("DIFFUSERS_SOURCE names no checkout of diffusers", allow_module_level=True)

sys.path.insert(0, SOURCE)
testing_utils = importlib.import_module("tests.testing_utils")
testing_utils.require_accelerator = testing_utils.require_torch_accelerator = lambda test: test
testers = importlib.import_module("tests.models.testing_utils")
pipeline_testers = importlib.import_module("tests.pipelines.testing_utils")

STREAMS, SPLIT = "streams of an accelerator", "splits the model between an accelerator and something else"
NEEDS_A_GPU = {
    "test_cpu_offload": SPLIT,
    "test_disk_offload_with_safetensors": SPLIT,
    "test_disk_offload_without_safetensors": SPLIT,
    "test_group_offloading": STREAMS,
    "test_group_offloading_with_disk": STREAMS,
    "test_group_offloading_with_layerwise_casting": STREAMS,
    "test_group_offloading_inference_denoiser[block_level-True]": STREAMS,
    "test_group_offloading_inference_denoiser[leaf_level-True]": STREAMS,
    "test_compile_with_group_offloading": STREAMS,
    "test_layerwise_casting_memory": "memory of an accelerator",
    "test_mixed_precision_training": "float16 gradients",
    # On a CPU these calls fail for any model; tests/test_first_class.py offloads in other words.
    "test_cpu_offload_forward_pass_twice": "enable_model_cpu_offload()",
    "test_lora_loading_model_cpu_offload": "enable_model_cpu_offload()",
    "test_sequential_cpu_offload_forward_pass": "enable_sequential_cpu_offload()",
    "test_sequential_offload_forward_pass_twice": "enable_sequential_cpu_offload()",
}
DO_NOT_APPLY = {
    "test_from_save_pretrained_variant": "wants pickled weights to be looked for; test_first_class.py has the rest",
}


@pytest.fixture(autouse=True)
def skip(request):
    for name in (request.node.name, request.node.originalname):
        if name in NEEDS_A_GPU and not torch.cuda.is_available():
            pytest.skip(f"needs a GPU: {NEEDS_A_GPU[name]}")
        if name in DO_NOT_APPLY:
            pytest.skip(f"does not apply: {DO_NOT_APPLY[name]}")


# -- models ------------------------------------------------------------------------------------------------------------

SIZES = dict(num_genes=23, patch_size=5, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=[3, 2])
COUNT_BINS = [[13, 4], [10, 9]]


class Config(testers.BaseModelTesterConfig):
    """The model that predicts cells."""

    model_class = SCRDiTTransformer
    output_shape = (23,)
    main_input_name = "hidden_states"

    def get_init_dict(self):
        return dict(SIZES)

    def get_dummy_inputs(self, batch_size=2):
        generator = torch.Generator().manual_seed(0)
        return dict(
            hidden_states=torch.randn(batch_size, 23, generator=generator).to(testers.common.torch_device),
            timestep=torch.tensor([500] * batch_size, device=testers.common.torch_device),
            class_labels=torch.tensor([[0, 1]] * batch_size, device=testers.common.torch_device),
        )


class CountConfig(Config):
    """The model that predicts counts."""

    def get_init_dict(self):
        return super().get_init_dict() | dict(count_bins=COUNT_BINS, num_cell_tokens=1)

    def get_dummy_inputs(self, batch_size=2):
        inputs = super().get_dummy_inputs(batch_size)
        return inputs | dict(library_size=torch.full_like(inputs["timestep"], 40))


class LargeWeights(SCRDiTTransformer):
    """With weights so large that two random adapters of the queries alone change the counts by more than 0.005."""

    def __init__(self, **config):
        super().__init__(**config)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and not name.startswith("count_head."):
                torch.nn.init.normal_(parameter, std=0.5)


class LargeWeightsConfig(Config):
    """The model that predicts cells."""

    model_class = LargeWeights


class CountLargeWeightsConfig(CountConfig):
    """The model that predicts counts."""

    model_class = LargeWeights


# -- pipelines ---------------------------------------------------------------------------------------------------------


class Pipeline(SCRDiTPipeline):
    """Ours, in their terms: a batch is given as a list, and pickled weights, which we refuse, are safetensors."""

    @functools.wraps(SCRDiTPipeline.__call__)
    def __call__(self, num_cells=1, **kwargs):
        return super().__call__(num_cells=sum(num_cells) if isinstance(num_cells, list) else num_cells, **kwargs)

    def save_pretrained(self, save_directory, safe_serialization=True, **kwargs):
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def save_lora_weights(cls, save_directory, safe_serialization=True, **kwargs):
        name = f"pytorch_lora_weights.{'safetensors' if safe_serialization else 'bin'}"
        super().save_lora_weights(save_directory, weight_name=name, **kwargs)

    @classmethod
    def lora_state_dict(cls, source, **kwargs):
        if str(source).endswith(".bin"):
            source = safetensors.torch.load_file(source)
        return super().lora_state_dict(source, **kwargs)


class PipelineConfig(pipeline_testers.BasePipelineTesterConfig):
    """The pipeline that predicts cells, up to model space."""

    pipeline_class = Pipeline
    output_shape = (23,)
    required_input_params_in_call_signature = {"num_cells", "conditions", "guidance_scale", "attention_kwargs"}
    optional_input_params = frozenset(
        pipeline_testers.BasePipelineTesterConfig.optional_input_params - {"num_images_per_prompt"}
    )
    batch_input_params = {"num_cells"}
    callback_cfg_params = frozenset()
    count_bins = None

    def get_dummy_components(self, num_layers=2):
        processor = SCRDiTProcessor(
            var_names=[f"gene{i}" for i in range(23)],
            mean=np.full(23, 0.5),
            std=np.ones(23),
            condition_keys=["cell_type", "batch"],
            condition_categories=[["T", "B", "NK"], ["b1", "b2"]],
            composition=[[0, 0, 50], [1, 1, 50], [2, 0, 50]],
            log_library_sizes=[[3.0, 4.0]] * 3,
        )
        torch.manual_seed(0)
        sizes = SIZES | dict(num_layers=num_layers, count_bins=self.count_bins)
        sizes |= dict(num_cell_tokens=1 if self.count_bins else 0)
        return dict(transformer=SCRDiTTransformer(**sizes), scheduler=default_scheduler(), processor=processor)

    def get_dummy_inputs(self):
        return dict(
            num_cells=1,
            conditions={"cell_type": "B", "batch": "b1"},
            num_inference_steps=4,
            guidance_scale=2.0,
            generator=self.get_generator(),
            output_type="latent",
        )


class CountPipelineConfig(PipelineConfig):
    """The pipeline that draws counts, up to these: every noise that follows from a seed stays the same."""

    count_bins = COUNT_BINS

    def get_dummy_components(self, num_layers=2):
        return super().get_dummy_components(num_layers) | dict(decode_timestep=50)

    def get_dummy_inputs(self):
        return super().get_dummy_inputs() | dict(output_type="pt")


class CountLatentPipelineConfig(CountPipelineConfig):
    """The same up to the noisy cells of which counts are drawn: a weak adapter changes no drawn count."""

    def get_dummy_inputs(self):
        return super().get_dummy_inputs() | dict(output_type="latent")


class CachedPipelineConfig(PipelineConfig):
    """Without guidance, which multiplies what a cache leaves out, and with a tolerance for cells.

    Theirs is for pixels in [0, 1]; these cells spread over some three units. An untrained network changes too fast with
    the timestep to be extrapolated over five steps.
    """

    TAYLORSEER_CACHE_CONFIG = dict(cache_interval=2, disable_cache_before_step=10, max_order=1, use_lite_mode=True)

    def get_dummy_inputs(self):
        return super().get_dummy_inputs() | dict(guidance_scale=1.0)

    def _test_cache_inference(self, *args, expected_atol, **kwargs):
        super()._test_cache_inference(*args, expected_atol=3 * expected_atol, **kwargs)


class CountCachedPipelineConfig(CachedPipelineConfig, CountLatentPipelineConfig):
    """The same for the pipeline that draws counts."""


# -- theirs ------------------------------------------------------------------------------------------------------------


def combine(mixins, *configs):
    """Make a test class of each mixin and configuration."""
    for mixin in mixins:
        for config in configs:
            name = f"Test{config.__name__.removesuffix('Config')}{mixin.__name__.removesuffix('TesterMixin')}"
            globals()[name] = type(name, (config, mixin), {})


combine(
    [
        testers.ModelTesterMixin,
        testers.TrainingTesterMixin,
        testers.AttentionTesterMixin,
        testers.AttentionBackendTesterMixin,
        testers.MemoryTesterMixin,
        testers.LoraTesterMixin,
        testers.TorchCompileTesterMixin,
        testers.PyramidAttentionBroadcastTesterMixin,
        testers.FirstBlockCacheTesterMixin,
        testers.MagCacheTesterMixin,
        testers.TaylorSeerCacheTesterMixin,
        testers.TensorParallelTesterMixin,
        testers.ContextParallelTesterMixin,
    ],
    Config,
    CountConfig,
)
combine([testers.LoraHotSwappingForModelTesterMixin], LargeWeightsConfig, CountLargeWeightsConfig)
combine([pipeline_testers.PipelineTesterMixin, pipeline_testers.MemoryTesterMixin], PipelineConfig, CountPipelineConfig)
combine(
    [pipeline_testers.LoraTesterMixin, pipeline_testers.LoraMemoryTesterMixin],
    PipelineConfig,
    CountLatentPipelineConfig,
)
combine(
    [
        pipeline_testers.PyramidAttentionBroadcastTesterMixin,
        pipeline_testers.FirstBlockCacheTesterMixin,
        pipeline_testers.MagCacheTesterMixin,
        pipeline_testers.TaylorSeerCacheTesterMixin,
    ],
    CachedPipelineConfig,
    CountCachedPipelineConfig,
)
