"""Publishing and loading through the Hub's protocol, with the real client and a server on loopback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoModel
from huggingface_hub import HfApi, ModelCard
from peft.utils import get_peft_model_state_dict
from scripts import TINY, load_script
from test_first_class import add_lora
from transformers import HfArgumentParser

import scrdit_diffusers
from scrdit_diffusers import (
    CellDataset,
    SCRDiTPipeline,
    SCRDiTProcessor,
    SCRDiTTransformer,
    push_remote_code,
    read_cells,
)
from scrdit_diffusers.remote_code import bundle_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub, uploading large files
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),  # diffusers
]

REPOSITORY = Path(__file__).parents[1]
REPO = "user/scrdit-pbmc"
USER = "hf_user"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PIPELINE_FILES = {
    ".gitattributes",
    "README.md",
    "card.json",
    "model_index.json",
    "processor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    f"transformer/{WEIGHTS}",
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    hurried = SimpleNamespace(sleep=lambda seconds: None, time=time.time, perf_counter=time.perf_counter)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", hurried)  # no pauses between its retries


@pytest.fixture
def published(hub, count_pipe):
    """Publish the pipeline as `REPO` and give its commit."""
    count_pipe.push_to_hub(REPO, token=USER)
    return hub.repositories["model", REPO].branches["main"]


def generate(pipe):
    pipe.set_progress_bar_config(disable=True)
    kwargs = dict(num_cells=3, num_inference_steps=2, conditions={"cell_type": "B", "batch": "b1"})
    return pipe(**kwargs, generator=torch.manual_seed(0)).adata.X.toarray()


def first_weight(model):
    return model.patch_embed.weight.flatten()[0].item()


def run(command, tmp_path, **environment):
    """Run a command with a cache of its own."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "fresh")} | environment
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_push_and_load(hub, published, count_pipe):
    assert set(hub.files(REPO)) == PIPELINE_FILES
    assert np.array_equal(generate(SCRDiTPipeline.from_pretrained(REPO)), generate(count_pipe))
    assert any("GET /lfs/" in request for request in hub.requests)


def test_large_files_go_up_in_parts(hub, count_pipe, tmp_path):
    hub.part_size = 20_000
    count_pipe.push_to_hub(REPO, token=USER)
    count_pipe.save_pretrained(tmp_path)
    assert any(request.startswith("PUT /lfs/") and request.endswith("/2") for request in hub.requests)
    assert hub.files(REPO)[f"transformer/{WEIGHTS}"] == (tmp_path / "transformer" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("as_path", [False, True], ids=["str", "Path"])
@pytest.mark.parametrize("part", ["pipeline", "transformer"])
def test_save_pretrained_names_the_repository_by_the_folder(hub, count_pipe, tmp_path, part, as_path):
    folder = tmp_path / "scrdit-pbmc" if as_path else f"{tmp_path}/scrdit-pbmc/"
    saved = count_pipe if part == "pipeline" else count_pipe.transformer
    saved.save_pretrained(folder, push_to_hub=True, token=USER)
    wanted = PIPELINE_FILES if part == "pipeline" else {".gitattributes", "README.md", "config.json", WEIGHTS}
    assert set(hub.files(REPO)) == wanted


def test_revisions(hub, published, count_pipe):
    api = HfApi(token=USER)
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="old")
    before = first_weight(count_pipe.transformer)
    torch.nn.init.constant_(count_pipe.transformer.patch_embed.weight, 7.0)
    count_pipe.push_to_hub(REPO, token=USER)
    for revision in ("v1", "old", published):
        assert first_weight(SCRDiTPipeline.from_pretrained(REPO, revision=revision).transformer) == before
    assert first_weight(SCRDiTPipeline.from_pretrained(REPO).transformer) == 7.0


def test_cached_pipelines_load_without_the_server(hub, published, count_pipe):
    SCRDiTPipeline.from_pretrained(REPO)
    hub.stop()
    for kwargs in ({"local_files_only": True}, {}):
        assert np.array_equal(generate(SCRDiTPipeline.from_pretrained(REPO, **kwargs)), generate(count_pipe))


def test_private_repositories(hub, count_pipe, monkeypatch):
    count_pipe.push_to_hub(REPO, token=USER, private=True)
    assert hub.repositories["model", REPO].private
    with pytest.raises(OSError, match=REPO):
        SCRDiTPipeline.from_pretrained(REPO)
    assert SCRDiTPipeline.from_pretrained(REPO, token=USER).processor.num_genes == 23
    monkeypatch.setenv("HF_TOKEN", USER)
    assert SCRDiTTransformer.from_pretrained(REPO, subfolder="transformer").config.num_genes == 23


def test_components_alone(hub, published, count_pipe):
    weight = first_weight(count_pipe.transformer)
    assert first_weight(AutoModel.from_pretrained(REPO, subfolder="transformer")) == weight
    count_pipe.transformer.push_to_hub("user/transformer", token=USER)
    assert first_weight(SCRDiTTransformer.from_pretrained("user/transformer")) == weight
    count_pipe.processor.push_to_hub("user/processor", token=USER)
    processor = SCRDiTProcessor.from_pretrained("user/processor")
    assert processor.to_json_string() == count_pipe.processor.to_json_string()


def test_lora_weights_from_the_hub(hub, count_pipe, tmp_path):
    add_lora(count_pipe.transformer)
    layers = get_peft_model_state_dict(count_pipe.transformer)
    SCRDiTPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    hub.add("user/lora", {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")})
    count_pipe.unload_lora_weights()
    count_pipe.load_lora_weights("user/lora")
    loaded = get_peft_model_state_dict(count_pipe.transformer, adapter_name="default_0")
    assert loaded.keys() == layers.keys() and all(torch.equal(loaded[name], layers[name]) for name in layers)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo_id", "kwargs", "message"),
    [
        ("user/missing", {"token": USER}, "user/missing"),
        ("user/missing", {}, "user/missing"),
        (REPO, {"revision": "nope"}, "nope"),
        (REPO, {"token": "hf_bad"}, "scrdit-pbmc"),
        ("user/private", {}, "user/private"),
        ("user/private", {"token": "hf_stranger"}, "user/private"),
        ("a/b/c", {}, "a/b/c"),
        ("user/empty", {}, "user/empty"),
        ("user/missing", {"local_files_only": True}, "user/missing"),
    ],
)
@pytest.mark.parametrize("part", ["pipeline", "transformer"])
def test_what_cannot_be_loaded_is_named(hub, published, repo_id, kwargs, message, part):
    hub.add("user/private", hub.files(REPO), private=True)
    hub.add("user/empty", {"README.md": b""})
    with pytest.raises((OSError, ValueError), match=message):
        if part == "pipeline":
            SCRDiTPipeline.from_pretrained(repo_id, **kwargs)
        else:
            SCRDiTTransformer.from_pretrained(repo_id, subfolder="transformer", **kwargs)


@pytest.mark.slow  # the client tries again for 25 seconds
def test_no_network(hub):
    hub.stop()
    with pytest.raises(OSError, match="user/never-seen.* network"):
        SCRDiTPipeline.from_pretrained("user/never-seen")


def test_truncated_download(hub, published, count_pipe):
    hub.truncated = {f"transformer/{WEIGHTS}"}
    with pytest.raises(OSError, match=f"^Loading {REPO} "):
        SCRDiTPipeline.from_pretrained(REPO)
    with pytest.raises(OSError, match=f"^Loading {REPO} "):
        SCRDiTTransformer.from_pretrained(REPO, subfolder="transformer")
    hub.truncated = set()
    assert np.array_equal(generate(SCRDiTPipeline.from_pretrained(REPO)), generate(count_pipe))


@pytest.fixture
def push(count_pipe, adata, tmp_path, part):
    """Call every way to publish something by one signature."""
    parts = {"transformer": count_pipe.transformer, "processor": count_pipe.processor, "pipeline": count_pipe}
    saved = parts.get(part.removesuffix(" folder"))
    if part == "table":
        return lambda repo_id, **kwargs: CellDataset.from_anndata(adata).push_to_hub(repo_id, **kwargs)
    if part.endswith("folder"):
        kwargs = dict(save_directory=tmp_path / "saved", push_to_hub=True)
        return lambda repo_id, token: saved.save_pretrained(**kwargs, repo_id=repo_id, token=token)
    return saved.push_to_hub


PARTS = ["pipeline", "pipeline folder", "transformer", "transformer folder", "processor", "processor folder", "table"]


@pytest.mark.parametrize("part", PARTS)
def test_pushing_without_the_right(hub, push, tmp_path, part):
    hub.add("other/here", {})
    hub.add("other/here", {}, repo_type="dataset")
    before = {name: repository.branches["main"] for name, repository in hub.repositories.items()}
    for token in (None, "hf_bad"):
        with pytest.raises(OSError, match=f"{REPO}.*hf auth login.*401 "):
            push(REPO, token=token)
    for repo_id in ("other/new", "other/here"):
        with pytest.raises(OSError, match=f"{repo_id}.*hf auth login.* 403 .*rights"):
            push(repo_id, token=USER)
    assert {name: repository.branches["main"] for name, repository in hub.repositories.items()} == before
    assert part != "pipeline folder" or SCRDiTPipeline.from_pretrained(tmp_path / "saved").processor.num_genes == 23


@pytest.mark.parametrize("part", PARTS)
def test_pushing_without_a_network_or_room(hub, published, push, part):
    hub.full = True
    with pytest.raises(OSError, match=f"{REPO}.*storage quota.* 403 .*Storage limit"):
        push(REPO, token=USER)
    hub.stop()
    with pytest.raises(OSError, match=f"{REPO}.* network"):
        push(REPO, token=USER)


def test_pushing_the_code_without_a_network(hub, published):
    hub.stop()
    with pytest.raises(OSError, match=f"{REPO}.* network"):
        push_remote_code(REPO, token=USER)


# -- cards -------------------------------------------------------------------------------------------------------------


def test_a_pushed_pipeline_has_a_card_of_cells(hub, published, count_pipe, tmp_path):
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.library_name == "diffusers" and "single-cell" in card.data.tags
    assert f'SCRDiTPipeline.from_pretrained("{REPO}")' in card.text and "| dataset | not stated |" in card.text
    count_pipe.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="user/folder", token=USER)
    assert b'from_pretrained("user/folder")' in hub.files("user/folder")["README.md"]


def test_a_card_on_the_hub_is_kept(hub, published, count_pipe):
    HfApi(token=USER).upload_file(path_or_fileobj=b"by hand", path_in_repo="README.md", repo_id=REPO)
    torch.nn.init.constant_(count_pipe.transformer.patch_embed.weight, 7.0)
    count_pipe.push_to_hub(REPO, token=USER)
    assert hub.files(REPO)["README.md"] == b"by hand"
    assert first_weight(SCRDiTPipeline.from_pretrained(REPO).transformer) == 7.0


def test_the_card_of_a_trained_pipeline_goes_along(hub, count_pipe, tmp_path):
    source = REPOSITORY / "hub_cards" / "scrdit-pbmc-zheng"
    count_pipe.save_pretrained(tmp_path)
    for name in ("card.json", "metrics.json", "figures"):
        (shutil.copytree if name == "figures" else shutil.copyfile)(source / name, tmp_path / name)
    SCRDiTPipeline.from_pretrained(tmp_path).push_to_hub(REPO, token=USER)
    files = hub.files(REPO)
    assert {f"figures/{path.name}" for path in (source / "figures").iterdir()} <= set(files)
    assert files["metrics.json"] == (source / "metrics.json").read_bytes()
    text = files["README.md"].decode()
    for line in (f'SCRDiTPipeline.from_pretrained("{REPO}")', "| accession | SRP073767", "![Genes](figures/genes.png)"):
        assert line in text


# -- scripts -----------------------------------------------------------------------------------------------------------


def script_main(name, arguments_class, *arguments):
    script = load_script(name)
    command = [str(argument) for argument in arguments]
    script.main(HfArgumentParser(getattr(script, arguments_class)).parse_args_into_dataclasses(command)[0])


@pytest.fixture
def train(adata, tmp_path):
    """Train in this process on the sixty cells."""
    adata.write_h5ad(tmp_path / "cells.h5ad")

    def train(output_dir, *arguments):
        command = ["--dataset", tmp_path / "cells.h5ad", "--labels_key", "cell_type", "--output_dir", output_dir]
        script_main("train", "TrainingArguments", *command, *TINY, *arguments)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield train
    torch.set_flush_denormal(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_train_pushes_and_generate_loads_in_a_fresh_process(hub, train, tmp_path):
    train(tmp_path / "model", "--push_to_hub", "--hub_model_id", REPO, "--hub_token", USER, "--hub_private_repo")
    assert PIPELINE_FILES <= set(hub.files(REPO))
    assert not [path for path in hub.files(REPO) if path.startswith(("checkpoint-", "logs/"))]
    assert hub.repositories["model", REPO].private
    assert USER.encode() not in hub.files(REPO)["train_config.json"]
    card = hub.files(REPO)["README.md"]
    assert b"single-cell" in card and b"8 steps of 16 cells" in card
    command = [sys.executable, "training/generate.py", "--pipeline", REPO, "--num_cells", "3"]
    command += ["--num_inference_steps", "2", "--output", str(tmp_path / "new.h5ad")]
    refused = run(command, tmp_path)
    assert refused.returncode == 1 and refused.stderr.strip().splitlines()[-1] and REPO in refused.stderr
    done = run(command, tmp_path, HF_TOKEN=USER)
    assert done.returncode == 0, done.stderr
    assert ad.read_h5ad(tmp_path / "new.h5ad").n_obs == 3


def test_train_is_refused_before_it_trains(hub, train, tmp_path):
    hub.add("other/here", {})
    for repo_id in ("other/here", "other/new"):
        with pytest.raises(OSError, match=f"{repo_id}.*hf auth login.* 403 .*rights"):
            train(tmp_path / "model", "--push_to_hub", "--hub_model_id", repo_id, "--hub_token", USER)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "model").exists()


def test_what_was_trained_outlives_a_push_that_fails(hub, train, tmp_path):
    hub.full = True
    with pytest.raises(OSError, match=f"{REPO}.* 403 .*Storage limit") as refused:
        train(tmp_path / "my model", "--push_to_hub", "--hub_model_id", REPO, "--hub_token", USER)
    assert SCRDiTPipeline.from_pretrained(tmp_path / "my model").processor.num_genes == 23
    hub.full = False
    command = re.search("upload it by `(.*?)`", str(refused.value))[1]
    done = run(["bash", "-c", f"{Path(sys.executable).parent}/{command}"], tmp_path, HF_TOKEN=USER)
    assert done.returncode == 0, done.stderr
    assert PIPELINE_FILES <= set(hub.files(REPO))
    assert not [path for path in hub.files(REPO) if path.startswith(("checkpoint-", "logs/"))]


def test_evaluate_loads(hub, published, adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    folder = ["--split_dir", tmp_path / "split"]
    options = [*folder, "--dataset", tmp_path / "cells.h5ad", "--labels_key", "cell_type"]
    script_main("evaluate", "EvaluationArguments", *options)
    quick = ["--n_jobs", 1, "--num_seeds", 1, "--baselines", "none", "--steps_curve", 0, "--num_inference_steps", 2]
    output = tmp_path / "evaluation"
    script_main("evaluate", "EvaluationArguments", *folder, "--pipeline", REPO, "--output_dir", output, *quick)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["source"] == f"pipeline {REPO}"


# -- datasets ----------------------------------------------------------------------------------------------------------


def test_cells_as_a_dataset(hub, adata, monkeypatch):
    CellDataset.from_anndata(adata, "counts").push_to_hub("user/cells", token=USER, private=True)
    monkeypatch.setenv("HF_TOKEN", USER)
    cells = read_cells("user/cells")
    assert (cells.X != adata.X).nnz == 0
    assert list(cells.var_names) == list(adata.var_names)
    assert list(cells.obs["cell_type"]) == list(adata.obs["cell_type"])
    rows = list(datasets.load_dataset("user/cells", split="train", streaming=True))
    assert len(rows) == adata.n_obs
    assert rows[5]["genes"] == adata.X[5].indices.tolist() and rows[5]["expressions"] == adata.X[5].data.tolist()


def test_missing_datasets_are_named(hub):
    with pytest.raises(OSError, match="user/missing"):
        read_cells("user/missing")
    hub.add("user/other", {"README.md": b""}, repo_type="dataset")
    with pytest.raises(OSError, match="user/other"):
        read_cells("user/other")


# -- without the package -----------------------------------------------------------------------------------------------

WITHOUT_PACKAGE = """
import importlib.util
assert importlib.util.find_spec("scrdit_diffusers") is None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({repo!r}, revision={revision!r}, trust_remote_code={trust})
pipe.set_progress_bar_config(disable=True)
cells = pipe(
    num_cells=3, num_inference_steps=2, conditions={{"cell_type": "B", "batch": "b1"}}, generator=torch.manual_seed(0)
).adata
assert type(pipe).__module__.startswith("diffusers_modules.local"), type(pipe)
print(type(pipe).__name__, cells.X.toarray().astype(int).tolist())
"""


@pytest.fixture
def python_without_package(tmp_path):
    """Make an environment that has all that this one has, but not this package."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True, with_pip=False)
    here = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    there = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    for path in (path for packages in here for path in packages.iterdir()):
        # .pth files add folders, such as that of this package where it is installed in editable mode
        if "scrdit_diffusers" not in path.name and path.suffix != ".pth" and path.name != "__pycache__":
            (there / path.name).symlink_to(path)
    return folder / "bin" / "python"


def test_remote_code_loads_without_the_package(hub, published, count_pipe, python_without_package, tmp_path):
    main = dict(hub.files(REPO))
    sha = push_remote_code(REPO, token=USER)
    files = hub.files(REPO, "remote-code")
    assert hub.files(REPO) == main and not [path for path in main if path.endswith(".py")]
    code = {"pipeline_scrdit.py", "processor/processing_scrdit.py", "transformer/transformer_scrdit.py"}
    assert set(files) - set(main) == code
    assert {path: files[path] for path in main if path != "model_index.json"} == {
        path: content for path, content in main.items() if path != "model_index.json"
    }
    script = WITHOUT_PACKAGE.format(repo=REPO, revision=sha, trust=True)
    done = run([python_without_package, "-P", "-c", script], tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr
    name, cells = done.stdout.strip().split(" ", 1)
    assert name == "SCRDiTPipeline" and json.loads(cells) == generate(count_pipe).astype(int).tolist()


def test_remote_code_needs_trust(hub, published):
    from diffusers import DiffusionPipeline

    push_remote_code(REPO, token=USER)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(REPO, revision="remote-code")
    assert SCRDiTPipeline.from_pretrained(REPO).processor.num_genes == 23


def test_remote_code_follows_the_weights_when_published_again(hub, published, count_pipe):
    api = HfApi(token=USER)
    api.upload_file(path_or_fileobj=b"old", path_in_repo="old.txt", repo_id=REPO)
    push_remote_code(REPO, token=USER)
    torch.nn.init.constant_(count_pipe.transformer.patch_embed.weight, 7.0)
    count_pipe.push_to_hub(REPO, token=USER)
    api.delete_file("old.txt", REPO)
    api.upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=REPO)
    before = hub.files(REPO, "remote-code")
    assert before[f"transformer/{WEIGHTS}"] != hub.files(REPO)[f"transformer/{WEIGHTS}"]
    del hub.requests[:]
    push_remote_code(REPO, token=USER)
    writes = [request for request in hub.requests if request.startswith(("DELETE", "PUT"))]
    writes += [request for request in hub.requests if "/commit/" in request]
    assert writes == [f"POST /api/models/{REPO}/commit/remote-code"]  # the branch is never missing
    after = hub.files(REPO, "remote-code")
    assert set(after) == set(hub.files(REPO)) | {path for path in before if path.endswith(".py")}
    assert all(after[path] == hub.files(REPO)[path] for path in set(hub.files(REPO)) - {"model_index.json"})


def test_remote_code_checks_its_arguments(hub, published):
    with pytest.raises(ValueError, match="^branch='main' "):
        push_remote_code(REPO, branch="main", token=USER)
    hub.add("user/other", {"model_index.json": b'{"_class_name": "DDPMPipeline"}'})
    with pytest.raises(ValueError, match="user/other at main .*DDPMPipeline"):
        push_remote_code("user/other", token=USER)
    assert list(hub.repositories["model", "user/other"].branches) == ["main"]


@pytest.mark.parametrize(
    ("imports", "message"),
    [
        ("from . import count_head\n", r"line 1: .*`from \.module import name`"),
        ("from .count_head import LABEL_TABLES as tables\n", r"line 1: .*`from \.module import name`"),
        ("from .count_head import midpoint\nLABEL_TABLES = 3\n", " LABEL_TABLES"),
    ],
)
def test_code_that_cannot_be_joined_is_refused(monkeypatch, tmp_path, imports, message):
    package = Path(scrdit_diffusers.__file__).parent
    for path in package.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "module.py").write_text(imports)
    monkeypatch.setattr("scrdit_diffusers.remote_code.files", lambda name: tmp_path)
    with pytest.raises(ValueError, match=message):
        bundle_module("module")
