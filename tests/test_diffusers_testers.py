"""diffusers' own tests of models, run on ours, where DIFFUSERS_SOURCE names a checkout of diffusers:

    DIFFUSERS_SOURCE=../diffusers pytest -o addopts= -o filterwarnings=default tests/test_diffusers_testers.py

The checkout should be of the installed version; these tests are no part of the installed package. The options lift our
rules on markers and warnings, by which theirs are not written. Tests that ask for an accelerator run on a CPU too,
except those of streams and of several devices.
"""

import importlib
import os
import sys

import pytest
import torch

from scrdit_diffusers import SCRDiTTransformer

SOURCE = os.environ.get("DIFFUSERS_SOURCE")
if SOURCE is None:
    pytest.skip("DIFFUSERS_SOURCE names no checkout of diffusers", allow_module_level=True)

sys.path.insert(0, SOURCE)
importlib.import_module("tests.testing_utils").require_accelerator = lambda test: test
testers = importlib.import_module("tests.models.testing_utils")

NEEDS_A_GPU = {
    "test_cpu_offload": "splits the model between a GPU and a CPU",
    "test_disk_offload_with_safetensors": "splits the model between a GPU and a disk",
    "test_disk_offload_without_safetensors": "splits the model between a GPU and a disk",
    "test_group_offloading": "streams of an accelerator",
    "test_group_offloading_with_disk": "streams of an accelerator",
    "test_group_offloading_with_layerwise_casting": "streams of an accelerator",
    "test_compile_with_group_offloading": "streams of an accelerator",
    "test_layerwise_casting_memory": "memory of an accelerator",
    "test_mixed_precision_training": "float16 gradients",
}


@pytest.fixture(autouse=True)
def skip_what_needs_a_gpu(request):
    reason = NEEDS_A_GPU.get(request.node.originalname)
    if reason and not torch.cuda.is_available():
        pytest.skip(f"needs a GPU: {reason}")


class Config(testers.BaseModelTesterConfig):
    """The model that predicts cells."""

    model_class = SCRDiTTransformer
    output_shape = (23,)
    main_input_name = "hidden_states"

    def get_init_dict(self):
        sizes = dict(num_genes=23, patch_size=5, num_layers=2, num_attention_heads=2, attention_head_dim=8)
        return sizes | dict(num_classes=[3, 2])

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
        return super().get_init_dict() | dict(count_bins=[[13, 4], [10, 9]])

    def get_dummy_inputs(self, batch_size=2):
        inputs = super().get_dummy_inputs(batch_size)
        return inputs | dict(library_size=torch.full_like(inputs["timestep"], 40))


MIXINS = [
    testers.ModelTesterMixin,
    testers.TrainingTesterMixin,
    testers.AttentionTesterMixin,
    testers.MemoryTesterMixin,
    testers.LoraTesterMixin,
    testers.LoraHotSwappingForModelTesterMixin,
    testers.TorchCompileTesterMixin,
    testers.PyramidAttentionBroadcastTesterMixin,
    testers.FirstBlockCacheTesterMixin,
    testers.MagCacheTesterMixin,
    testers.TaylorSeerCacheTesterMixin,
]
for mixin in MIXINS:
    for config in (Config, CountConfig):
        name = f"Test{config.__name__.removesuffix('Config')}{mixin.__name__.removesuffix('TesterMixin')}"
        globals()[name] = type(name, (config, mixin), {})
del mixin, config
