"""The generation script: one file, or many shards by several processes with interruptions, the same cells."""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from scripts import load_script, start_in_block
from transformers import HfArgumentParser

from scrdit_diffusers import SCRDiTPipeline, SCRDiTProcessor, default_scheduler


@pytest.fixture(scope="module")
def script():
    return load_script("generate")


def run_main(script, pipeline, arguments, device=("--device", "cpu")):
    """Run the script's main in this process."""
    arguments = ["--pipeline", pipeline, "--num_inference_steps", 3, *device, *arguments]
    command = [str(argument) for argument in arguments]
    script.main(HfArgumentParser(script.GenerationArguments).parse_args_into_dataclasses(command)[0])


def run_main_elsewhere(pipeline, arguments, environment):
    """Run it in a process that has just been started, and finds no GPU."""
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    run_main(load_script("generate"), pipeline, arguments, device=())


@pytest.fixture
def start(pipeline):
    """Start the script's main in another process."""
    started = []

    def start(*arguments, **environment):
        process = multiprocessing.get_context("forkserver").Process(
            target=run_main_elsewhere, args=(pipeline, arguments, environment)
        )
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def pipeline(count_model, processor, tmp_path):
    """A folder with a tiny pipeline that samples counts, of two conditions."""
    count_model.initialize_weights()
    pipe = SCRDiTPipeline(count_model, default_scheduler(), processor, decode_timestep=200, min_timestep=200)
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def generate(script, pipeline):
    """Run the script's main in this process."""

    yield lambda *arguments: run_main(script, pipeline, arguments)
    PartialState._reset_state()


def assert_same_cells(left: ad.AnnData, right: ad.AnnData) -> None:
    """Every part of two AnnData objects is equal."""
    pd.testing.assert_frame_equal(left.obs, right.obs)
    pd.testing.assert_frame_equal(left.var, right.var)
    assert left.X.format == right.X.format == "csr" and left.X.dtype == right.X.dtype
    assert (left.X != right.X).nnz == 0 and (left.layers["counts"] != right.layers["counts"]).nnz == 0
    assert left.uns["scrdit"] == right.uns["scrdit"]


def test_cells_have_the_wanted_labels(generate, tmp_path):
    (tmp_path / "wanted.csv").write_text("cell_type\nB\nT\nB\n")
    generate("--obs", tmp_path / "wanted.csv", "--output", tmp_path / "cells.h5ad", "--seed", 3)
    adata = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert adata.obs["cell_type"].tolist() == ["B", "T", "B"] and adata.uns["scrdit"]["seed"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.h5ad", "pipeline", "wanted.csv"]


def test_scheduler_is_swapped(generate, tmp_path):
    arguments = ["--num_cells", 2, "--condition", "cell_type=T", "--scheduler", "DDIMScheduler", "--eta", 1]
    generate("--output", tmp_path / "cells.h5ad", *arguments)
    assert ad.read_h5ad(tmp_path / "cells.h5ad").uns["scrdit"]["scheduler"] == "DDIMScheduler"


def test_library_size_is_used(generate, tmp_path):
    for size in (20, 80):
        generate("--num_cells", 20, "--library_size", size, "--output", tmp_path / f"{size}.h5ad")
    totals = [ad.read_h5ad(tmp_path / f"{size}.h5ad").X.sum() / 20 for size in (20, 80)]
    assert totals == [pytest.approx(20, rel=0.3), pytest.approx(80, rel=0.3)]


def test_adapter_is_loaded_with_the_composition_it_was_trained_on(generate, pipeline, tmp_path, monkeypatch):
    processor = SCRDiTProcessor.from_pretrained(pipeline, subfolder="processor")
    processor.composition, processor.log_library_sizes = [processor.composition[0]], [processor.log_library_sizes[0]]
    processor.save_pretrained(tmp_path / "adapter" / "processor")
    loaded = []
    monkeypatch.setattr(SCRDiTPipeline, "load_lora_weights", lambda pipe, source: loaded.append(source))
    generate("--num_cells", 20, "--lora_weights", tmp_path / "adapter", "--output", tmp_path / "cells.h5ad")
    assert loaded == [str(tmp_path / "adapter")]
    obs = ad.read_h5ad(tmp_path / "cells.h5ad").obs
    assert len(obs[processor.condition_keys].drop_duplicates()) == 1


def test_adapter_that_is_not_used_is_told(generate, pipeline, tmp_path, caplog):
    (pipeline / "pytorch_lora_weights.safetensors").touch()
    generate("--num_cells", 2, "--output", tmp_path / "cells.h5ad")
    assert "holds an adapter, which is not used" in caplog.text


@pytest.fixture
def whole(generate, tmp_path):
    """Fifty cells generated at once."""
    generate("--num_cells", 50, "--output", tmp_path / "whole.h5ad")
    return ad.read_h5ad(tmp_path / "whole.h5ad")


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_shards_join_to_the_same_cells(generate, whole, tmp_path, suffix):
    output = tmp_path / f"cells{suffix}"
    generate("--num_cells", 50, "--shard_size", 16, "--batch_size", 5, "--output", output)
    joined = ad.read_h5ad(output) if suffix == ".h5ad" else ad.read_zarr(output)
    assert list(joined.obs["cell_type"].cat.categories) == list(whole.obs["cell_type"].cat.categories)
    assert_same_cells(joined, whole)
    assert not Path(f"{output}.parts").exists()


def test_each_cell_is_a_function_of_seed_and_number(generate, whole, tmp_path):
    generate("--num_cells", 20, "--output", tmp_path / "fewer.h5ad")
    assert_same_cells(ad.read_h5ad(tmp_path / "fewer.h5ad"), whole[:20].copy())
    generate("--num_cells", 20, "--seed", 1, "--output", tmp_path / "others.h5ad")
    assert (ad.read_h5ad(tmp_path / "others.h5ad").X != whole[:20].X).nnz


def test_no_two_cells_share_their_noise(script):
    """The seeds differ in the 32 bits that PyTorch's CPU generator uses."""
    generators = script.cell_generators(0, range(999_990, 1_000_010)) + script.cell_generators(0, range(20))
    assert len({float(torch.randn((), generator=generator)) for generator in generators}) == 40
    assert len({generator.initial_seed() % 2**32 for generator in generators}) == 40


def test_two_processes_share_the_shards(start, whole, tmp_path):
    arguments = ["--num_cells", 50, "--shard_size", 8, "--output", tmp_path / "cells.zarr"]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    launched = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = [start(*arguments, **launched, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert_same_cells(ad.read_zarr(tmp_path / "cells.zarr"), whole)


def test_one_process_where_two_were_asked_for_is_refused(script, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as accelerate launch sets them
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ValueError, match="num_processes"):
        script.join_processes("cpu")
    PartialState._reset_state()


def test_processes_that_do_not_find_each_other_are_refused(script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(script, "PartialState", lambda **kwargs: SimpleNamespace(num_processes=1))
    with pytest.raises(ValueError, match="^2 .* 1: .*ACCELERATE_USE_CPU"):
        script.join_processes(None)


def kill_after(process, parts: Path, num_shards: int) -> None:
    """Kill a process without warning when it has written some shards."""
    while len(list(parts.glob("shard-??????.h5ad"))) < num_shards:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_run_goes_on(generate, start, whole, tmp_path, capsys):
    output = tmp_path / "cells.h5ad"
    arguments = ["--num_cells", 50, "--shard_size", 2, "--output", output]
    kill_after(start(*arguments), Path(f"{output}.parts"), 3)
    kept = {path: path.stat().st_mtime_ns for path in Path(f"{output}.parts").glob("shard-??????.h5ad")}
    assert 3 <= len(kept) < 25 and not output.exists()
    unfinished = Path(f"{output}.parts") / "shard-000024.tmp.h5ad"
    unfinished.write_bytes(next(iter(kept)).read_bytes()[:1000])  # as if killed while it was written
    generate(*arguments)
    assert f"{len(kept)} of 25 shards are there" in capsys.readouterr().out
    assert_same_cells(ad.read_h5ad(output), whole)


def test_damaged_shards_are_named_and_made_again(generate, start, whole, tmp_path, caplog):
    output = tmp_path / "cells.h5ad"
    arguments = ["--num_cells", 50, "--shard_size", 2, "--output", output]
    kill_after(start(*arguments), Path(f"{output}.parts"), 4)
    cut, empty, overwritten, other = sorted(Path(f"{output}.parts").glob("shard-??????.h5ad"))[:4]
    cut.write_bytes(cut.read_bytes()[:-100])
    empty.write_bytes(b"")
    content = bytearray(overwritten.read_bytes())
    content[-len(content) // 2 :] = bytes(-(-len(content) // 2))
    overwritten.write_bytes(content)
    other.write_bytes(next(Path(f"{output}.parts").glob("shard-000004.h5ad"), other).read_bytes())
    generate(*arguments)
    assert all(path.name in caplog.text for path in (cut, empty, overwritten))
    assert_same_cells(ad.read_h5ad(output), whole)


def test_a_shard_that_is_damaged_later_is_named(generate, script, tmp_path, monkeypatch):
    def write(*arguments, original=script.write_shard):
        original(*arguments)
        arguments[-1].write_bytes(b"damaged")

    monkeypatch.setattr(script, "write_shard", write)
    arguments = ["--num_cells", 2, "--output", tmp_path / "cells.h5ad"]
    with pytest.raises(OSError, match=r"shard-000000.h5ad is damaged .*again"):
        generate(*arguments)
    monkeypatch.undo()
    generate(*arguments)
    assert ad.read_h5ad(tmp_path / "cells.h5ad").n_obs == 2


def test_an_output_that_another_run_writes_is_refused(generate, tmp_path):
    arguments = ["--num_cells", 2, "--output", tmp_path / "cells.h5ad"]
    other = start_in_block("lock_folder", tmp_path / "cells.h5ad.parts", "")
    with pytest.raises(ValueError, match="cells.h5ad.parts is in use by another run, .*--output"):
        generate(*arguments)
    other.communicate()
    generate(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "pipeline"}


def test_unfinished_run_of_other_arguments_is_not_mixed_in(generate, start, whole, tmp_path):
    output = tmp_path / "cells.h5ad"
    arguments = ["--num_cells", 50, "--shard_size", 2, "--output", output]
    kill_after(start(*arguments, "--seed", 1), Path(f"{output}.parts"), 2)
    with pytest.raises(ValueError, match=r"'seed': \(1, 0\).*--overwrite"):
        generate(*arguments)
    generate(*arguments, "--overwrite")
    assert_same_cells(ad.read_h5ad(output), whole)


def test_unfinished_run_of_another_model_is_not_mixed_in(generate, start, pipeline, tmp_path):
    output = tmp_path / "cells.h5ad"
    arguments = ["--num_cells", 50, "--shard_size", 2, "--output", output]
    kill_after(start(*arguments), Path(f"{output}.parts"), 2)
    config = json.loads((pipeline / "processor" / "preprocessor_config.json").read_text())
    config["std"][0] *= 2
    (pipeline / "processor" / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="content_sha256"):
        generate(*arguments)


def test_cells_are_written_as_they_are_made(generate, script, tmp_path, monkeypatch):
    """No call of the pipeline is for more than a shard."""
    sizes, write_shard = [], script.write_shard

    def recorded(pipe, args, request, cells, path):
        write_shard(pipe, args, request, cells, path)
        sizes.append((len(cells), ad.read_h5ad(path).n_obs))

    monkeypatch.setattr(script, "write_shard", recorded)
    generate("--num_cells", 20, "--shard_size", 8, "--output", tmp_path / "cells.h5ad")
    assert sizes == [(8, 8), (8, 8), (4, 4)]


BAD_ARGUMENTS = {
    "unknown label": (["--num_cells", 2, "--condition", "cell_type=NKK"], r"cell_type 'NKK'.*'NK'.*\['T', 'B', 'NK'\]"),
    "no key": (["--num_cells", 2, "--condition", "cell_type"], r"--condition .*key=value.*\['cell_type'\]"),
    "condition twice": (
        ["--num_cells", 2, "--condition", "batch=b1", "--condition", "batch=b2"],
        r"--condition .*twice: \['batch=b1'",
    ),
    "no scheduler": (["--num_cells", 2, "--scheduler", "NoScheduler"], " NoScheduler; .*DDIMScheduler"),
    "no number": ([], "--num_cells, .*--obs "),
    "no cells": (["--num_cells", 0], "num_cells .* 0"),
    "empty shards": (["--num_cells", 2, "--shard_size", 0], "--shard_size .* 0"),
    "no batches": (["--num_cells", 2, "--batch_size", 0], "--batch_size .* 0"),
    "no device": (["--num_cells", 2, "--device", "gpu"], "--device gpu: .*cpu"),
    "negative seed": (["--num_cells", 2, "--seed", -1], "--seed .* -1"),
    "large seed": (["--num_cells", 2, "--seed", 2**63], f"--seed .* {2**63}"),
    "library size of zero": (["--num_cells", 2, "--library_size", 0], r"library_size .* 0\.0\.$"),
    "too much noise": (["--num_cells", 2, "--scheduler", "DDIMScheduler", "--eta", 2], r"eta .* 2\.0"),
    "other format": (["--num_cells", 2, "--output", "cells.csv"], r"--output .*\.zarr, .* cells\.csv"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(generate, tmp_path, name):
    arguments, message = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        generate("--output", tmp_path / "cells.h5ad", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_bad_label_of_the_last_cell_is_refused_before_any_is_made(generate, tmp_path):
    (tmp_path / "wanted.csv").write_text("cell_type\n" + "B\n" * 99 + "b\n")
    with pytest.raises(ValueError, match=r"cell_type 'b'.*\['T', 'B', 'NK'\]"):
        generate("--obs", tmp_path / "wanted.csv", "--output", tmp_path / "cells.h5ad", "--shard_size", 10)
    assert not (tmp_path / "cells.h5ad.parts").exists()


@pytest.mark.parametrize("content", ["cell_type\nB\u00e4r\n".encode("latin-1"), b""], ids=["Latin-1", "empty"])
def test_a_table_that_cannot_be_read_is_named(generate, tmp_path, content):
    (tmp_path / "wanted.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"--obs .*wanted\.csv"):
        generate("--obs", tmp_path / "wanted.csv", "--output", tmp_path / "cells.h5ad")


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_a_column_that_comes_twice_in_a_table_is_refused(generate, tmp_path, suffix, separator):
    (tmp_path / f"wanted.{suffix}").write_text(separator.join(["cell_type"] * 2) + "\n" + separator.join("BT"))
    with pytest.raises(ValueError, match=rf"--obs .*wanted\.{suffix} .*\['cell_type'\]"):
        generate("--obs", tmp_path / f"wanted.{suffix}", "--output", tmp_path / "cells.h5ad")


def test_a_table_may_have_an_index(script, tmp_path):
    for header in ("", ",", "index,"):
        (tmp_path / "WANTED.CSV").write_text(f"{header}cell_type\n1,B\n2,T\n")
        assert script.read_table(str(tmp_path / "WANTED.CSV"), "--obs")["cell_type"].tolist() == ["B", "T"]


def test_output_that_cannot_be_written_is_refused_before_any_cell_is_made(generate, script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "write_shard", lambda *args: pytest.fail("a cell was made"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"/file/cells\.h5ad.* cannot be a folder: .*/file is a file"):
        generate("--num_cells", 2, "--output", tmp_path / "file" / "cells.h5ad")


def test_file_is_not_replaced_unasked(generate, tmp_path):
    (tmp_path / "cells.h5ad").write_text("precious")
    with pytest.raises(ValueError, match="--overwrite"):
        generate("--num_cells", 1, "--output", tmp_path / "cells.h5ad")
    generate("--num_cells", 1, "--output", tmp_path / "cells.h5ad", "--overwrite")
    assert ad.read_h5ad(tmp_path / "cells.h5ad").n_obs == 1


def test_store_is_replaced_only_once_the_new_one_is_whole(generate, script, whole, tmp_path, monkeypatch):
    output = tmp_path / "cells.zarr"
    generate("--num_cells", 3, "--seed", 1, "--output", output)
    old = ad.read_zarr(output)
    again = ["--num_cells", 50, "--shard_size", 16, "--output", output, "--overwrite"]
    replace = os.replace

    def stopped(source, target):
        if Path(target) == output:
            raise OSError("stopped")
        replace(source, target)

    with monkeypatch.context() as context:
        context.setattr(script, "join_shards", lambda *args: stopped(None, output))
        with pytest.raises(OSError, match="stopped"):
            generate(*again)
    assert_same_cells(ad.read_zarr(output), old)
    with monkeypatch.context() as context:  # at the worst moment, none has the name and both are whole
        context.setattr(os, "replace", stopped)
        with pytest.raises(OSError, match="stopped"):
            generate(*again)
    assert_same_cells(ad.read_zarr(tmp_path / "cells.zarr.parts" / "replaced.zarr"), old)
    assert_same_cells(ad.read_zarr(tmp_path / "cells.zarr.parts" / "joined.zarr"), whole)
    generate(*again[:-1])
    assert_same_cells(ad.read_zarr(output), whole)
    assert not Path(f"{output}.parts").exists()


def test_float_values_are_joined(generate, script, pipe, processor, pipeline, adata, tmp_path):
    """A model of log-normalized values, which has no layer."""
    log = type(processor).from_anndata(
        adata, ["cell_type", "batch"], "lognorm", value_space="log_normalized", flavor="all"
    )
    SCRDiTPipeline(pipe.transformer, pipe.scheduler, log).save_pretrained(tmp_path / "log")
    arguments = ["--pipeline", tmp_path / "log", "--num_cells", 9]
    generate(*arguments, "--output", tmp_path / "one.h5ad")
    generate(*arguments, "--shard_size", 4, "--output", tmp_path / "joined.zarr")
    one, joined = ad.read_h5ad(tmp_path / "one.h5ad"), ad.read_zarr(tmp_path / "joined.zarr")
    assert "counts" not in joined.layers
    np.testing.assert_allclose(joined.X.toarray(), one.X.toarray(), atol=1e-5)
