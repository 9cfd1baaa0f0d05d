"""Folders of pipelines: what is written, what is not there, and pickles, which are never opened."""

import json
import os
import pickle

import huggingface_hub
import pytest
import torch
from diffusers import AutoModel
from test_first_class import add_lora

from scrdit_diffusers import SCRDiTPipeline, SCRDiTTransformer
from scrdit_diffusers.hub import load_safely

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_saved_weights_may_be_read_by_whom_other_files_may(count_pipe, tmp_path, mask):
    before = os.umask(mask)
    try:
        count_pipe.save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "transformer" / WEIGHTS).stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_that_is_not_there_is_not_taken_for_a_repository():
    with pytest.raises(OSError, match="/nowhere .*user/name"):
        SCRDiTPipeline.from_pretrained("/nowhere")


def test_a_training_that_is_not_finished_is_named(tmp_path):
    (tmp_path / "checkpoint-5" / "transformer").mkdir(parents=True)
    with pytest.raises(OSError, match=f"{tmp_path} .*--resume_from_checkpoint latest"):
        SCRDiTPipeline.from_pretrained(tmp_path)


def test_a_name_that_is_no_folder_is_said_to_be_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="Could not load mdel.*no such folder here"), load_safely("mdel", {}):
        raise OSError("Cannot load model mdel: the model is not fully cached locally")


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(OSError, match=r"holds no pipeline: it has no model_index\.json, which training writes"):
        SCRDiTPipeline.from_pretrained(tmp_path)


def test_a_flipped_letter_in_the_index_is_told(count_pipe, tmp_path):
    count_pipe.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace('"scrdit_diffusers"', '"scrdit_digfusers"'))
    with pytest.raises((OSError, ValueError), match="scrdit_digfusers"):  # by the version of diffusers
        SCRDiTPipeline.from_pretrained(tmp_path)


def test_pickled_weights_are_not_written(count_pipe, tmp_path):
    for saved in (count_pipe, count_pipe.transformer):
        with pytest.raises(ValueError, match="^safe_serialization=False "):
            saved.save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert not (tmp_path / "saved").exists()


def test_a_pipeline_with_an_adapter_is_saved_once_that_is_fused(count_pipe, tmp_path):
    """The names of weights below an adapter are others, and the folder could not be loaded."""
    add_lora(count_pipe.transformer)
    with pytest.raises(ValueError, match="save_lora_weights"):
        count_pipe.save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()
    count_pipe.fuse_lora()
    count_pipe.unload_lora_weights()
    count_pipe.save_pretrained(tmp_path / "pipeline")
    weights = SCRDiTPipeline.from_pretrained(tmp_path / "pipeline").transformer.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in count_pipe.transformer.state_dict().items())


# -- no pickles --------------------------------------------------------------------------------------------------------


class Mark:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def mark(tmp_path):
    """Where unpickling `evil` would leave a mark; none may be there in the end."""
    pickle.loads(pickle.dumps(Mark(tmp_path / "proof")))
    assert (tmp_path / "proof").is_dir()
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists()


@pytest.fixture
def pickled_folder(count_pipe, mark, tmp_path):
    """Pipeline folder whose weights are an evil pickle."""
    folder = tmp_path / "pickled"
    count_pipe.save_pretrained(folder)
    (folder / "transformer" / WEIGHTS).unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Mark(mark)))
    return folder


def test_pickled_weights_are_refused(pickled_folder):
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors\b.*safetensors files"):
        SCRDiTPipeline.from_pretrained(pickled_folder)
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors\b.*safetensors files"):
        SCRDiTTransformer.from_pretrained(pickled_folder / "transformer")
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors\b.*safetensors files"):
        AutoModel.from_pretrained(str(pickled_folder), subfolder="transformer")
    with pytest.raises(ValueError, match="^use_safetensors=False "):
        SCRDiTPipeline.from_pretrained(pickled_folder, use_safetensors=False)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers
def test_pickled_weights_on_the_hub_are_refused(hub, pickled_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    paths = [path for path in pickled_folder.rglob("*") if path.is_file()]
    hub.add("user/pickled", {str(path.relative_to(pickled_folder)): path.read_bytes() for path in paths})
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.bin'.*safetensors files"):
        SCRDiTPipeline.from_pretrained("user/pickled")
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors\b.*safetensors files"):
        SCRDiTTransformer.from_pretrained("user/pickled", subfolder="transformer")
    assert not [request for request in hub.requests if request.startswith("GET /lfs")]


def test_pickled_shards_do_not_run(pickled_folder):
    folder = pickled_folder / "transformer"
    names = dict.fromkeys(["patch_embed.weight"], "diffusion_pytorch_model.bin")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        SCRDiTTransformer.from_pretrained(folder)


def test_pickled_lora_weights_are_refused(count_pipe, mark, tmp_path):
    (tmp_path / "lora").mkdir()
    file = tmp_path / "lora" / "pytorch_lora_weights.bin"
    file.write_bytes(pickle.dumps(Mark(mark)))
    for load in (count_pipe.load_lora_weights, count_pipe.transformer.load_lora_adapter):
        with pytest.raises(OSError, match=r"pytorch_lora_weights\.safetensors .*safetensors files"):
            load(tmp_path / "lora")
        with pytest.raises(ValueError, match=r"pytorch_lora_weights\.bin .*safetensors files"):
            load(tmp_path / "lora", weight_name=file.name)
        with pytest.raises(ValueError, match=r"pytorch_lora_weights\.bin .*safetensors files"):
            load(file)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_pickled_checkpoints_do_not_run(train_here, dataset, mark, tmp_path, name):
    train_here(dataset, tmp_path / "model", "--max_train_steps", "3")
    checkpoint = max((tmp_path / "model").glob("checkpoint-*"))
    assert (checkpoint / name).is_file()
    (checkpoint / name).write_bytes(pickle.dumps(Mark(mark), protocol=2))
    if name == "random_states_0.pkl":  # which Accelerate does without: each step seeds its own
        train_here(dataset, tmp_path / "model", "--resume_from_checkpoint", "latest")
    else:
        with pytest.raises(pickle.UnpicklingError):
            train_here(dataset, tmp_path / "model", "--resume_from_checkpoint", "latest")
