"""Small fixtures that all tests share: cells with two label columns, and a processor, model and pipeline for them."""

import multiprocessing
import os
import signal
import threading

os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: threads would wait for each other

import hub_server  # before the Hugging Face libraries, which read the address of the Hub at import

# isort: split
import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from accelerate.state import AcceleratorState
from made_cells import make_counts, make_obs
from scripts import load_script, run_main
from tqdm import tqdm
from transformers import HfArgumentParser

from scrdit_diffusers import (
    CellDataset,
    SCRDiTPipeline,
    SCRDiTProcessor,
    SCRDiTTransformer,
    count_bins,
    default_scheduler,
)
from scrdit_diffusers.cells.moments import CellMoments
from scrdit_diffusers.initialization import initialize_count_head

pytest_plugins = ["evaluations"]
torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # the default one is shared with other processes; one that is killed keeps it
# Tests start processes as forks of a server that has imported everything and done nothing. Forks of the process of the
# tests would wait for its OpenMP threads, which they do not have, for ever.
multiprocessing.set_forkserver_preload(["accelerate", "anndata", "datasets", "scrdit_diffusers", "transformers"])

CELL_TYPES = ["T", "B", "NK"]  # not sorted: the stored order must be kept
BATCHES = ["b1", "b2"]
NUM_GENES = 23  # not divisible by the patch size of the tiny model
MODEL = dict(num_genes=NUM_GENES, patch_size=5, num_layers=2, num_attention_heads=2, attention_head_dim=8)
MODEL["num_classes"] = [len(CELL_TYPES), len(BATCHES)]

# What `make quick` leaves out: modules that train, start processes, compile, fit classifiers or try all schedulers,
# and tests that need what these fixtures train or fit.
TRAINING_MODULES = {"test_ablations", "test_acceleration", "test_checkpointing", "test_commands"}
TRAINING_MODULES |= {"test_diffusers_testers", "test_docs_snippets", "test_folders"}
TRAINING_MODULES |= {"test_evaluate", "test_first_class", "test_generate", "test_hub", "test_metrics", "test_notebooks"}
TRAINING_MODULES |= {"test_compare", "test_gpu", "test_growth", "test_realism", "test_train"}
TRAINING_MODULES |= {"test_properties", "test_published_pipelines", "test_readme", "test_report", "test_schedulers"}
TRAINING_FIXTURES = {"embedding", "pretrained", "run_job", "train", "train_here", "trained", "tuned"}


def pytest_collection_modifyitems(items):
    """Mark the tests that `make quick` leaves out."""
    for item in items:
        if item.path.stem in TRAINING_MODULES or TRAINING_FIXTURES & set(item.fixturenames):
            item.add_marker("training")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Sums depend on how many threads share them, and Accelerate changes the number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Keep the datasets that tests convert out of the user's cache, in subprocesses as well."""
    folder = tmp_path_factory.mktemp("datasets")
    before, os.environ["HF_DATASETS_CACHE"] = os.environ.get("HF_DATASETS_CACHE"), str(folder)
    kept, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder
    yield folder
    datasets.config.HF_DATASETS_CACHE = kept
    if before is None:
        del os.environ["HF_DATASETS_CACHE"]
    else:
        os.environ["HF_DATASETS_CACHE"] = before


@pytest.fixture
def adata() -> ad.AnnData:
    """Sixty cells of 23 genes: counts in X and in a layer, log-normalized values in another, two conditions."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.uniform(0.3, 6.0, NUM_GENES), (60, NUM_GENES)).astype(np.float32)
    counts[:, 0] = rng.integers(0, 2, 60)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(CELL_TYPES, 60, p=[0.5, 0.3, 0.2]), categories=CELL_TYPES),
            "batch": rng.choice(BATCHES, 60),
            "age": rng.uniform(20, 80, 60),
        },
        index=[f"cell{i}" for i in range(60)],
    )
    var = pd.DataFrame(
        {"gene_ids": [f"ENSG{i:05d}" for i in range(NUM_GENES)]}, index=[f"gene{i}" for i in range(NUM_GENES)]
    )
    adata = ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)
    adata.layers["counts"] = adata.X.copy()
    adata.layers["lognorm"] = sp.csr_matrix(np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(np.float32))
    return adata


@pytest.fixture(scope="module")
def counts() -> sp.csr_matrix:
    """Overdispersed counts of 211 cells x 120 genes."""
    return make_counts()


@pytest.fixture(scope="module")
def obs() -> pd.DataFrame:
    """Cell types and batches of the cells of `counts`."""
    return make_obs()


@pytest.fixture
def processor(adata) -> SCRDiTProcessor:
    """A count processor with both conditions and all genes."""
    return SCRDiTProcessor.from_anndata(adata, ["cell_type", "batch"], flavor="all")


@pytest.fixture
def model() -> SCRDiTTransformer:
    """A model of five tokens of five genes; the last token holds three genes and two zeros."""
    torch.manual_seed(0)
    return SCRDiTTransformer(**MODEL).eval()


@pytest.fixture
def count_model(adata, processor) -> SCRDiTTransformer:
    """The same model with a cell token, and a count head for the cells."""
    torch.manual_seed(0)
    bins = count_bins(adata.X)
    model = SCRDiTTransformer(**MODEL, num_cell_tokens=1, count_bins=bins).eval()
    codes = processor.encode_labels(adata.obs)
    initialize_count_head(model.count_head, CellMoments.from_counts(adata.X, codes), processor.mean, processor.std)
    return model


@pytest.fixture
def pipe(model, processor) -> SCRDiTPipeline:
    """The tiny pipeline, with the scheduler that trained pipelines ship with."""
    pipe = SCRDiTPipeline(transformer=model, scheduler=default_scheduler(), processor=processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def count_pipe(count_model, processor) -> SCRDiTPipeline:
    """The tiny pipeline that draws counts from their posterior at timestep 50."""
    pipe = SCRDiTPipeline(count_model, default_scheduler(), processor, decode_timestep=50)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def run_job(count_pipe, adata, tmp_path, monkeypatch):
    """Run the main function of a script in a folder with the tiny pipeline and `cells.h5ad`."""
    count_pipe.save_pretrained(tmp_path / "pipeline")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)

    def run_job(name, *arguments):
        script = load_script(name)
        own = [kind for kind in vars(script).values() if getattr(kind, "__module__", "") == name]
        (arguments_class,) = [kind for kind in own if kind.__name__.endswith("Arguments")]
        command = ["--pipeline", "pipeline", "--device", "cpu", *map(str, arguments)]
        script.main(HfArgumentParser(arguments_class).parse_args_into_dataclasses(command)[0])

    return run_job


@pytest.fixture
def generators():
    """Make a list of generators, one per cell, with seeds from `start` on."""
    return lambda n, start=0: [torch.Generator().manual_seed(start + i) for i in range(n)]


@pytest.fixture
def hub():
    """A Hub on loopback, empty; the libraries of this process know its address."""
    hub_server.HUB.reset()
    hub_server.HUB.start()
    yield hub_server.HUB
    hub_server.HUB.stop()


@pytest.fixture(scope="session")
def train_script():
    return load_script("train")


@pytest.fixture
def train_here(train_script):
    """Run the script's main in this process, which saves the seconds of importing everything."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda dataset, output_dir, *arguments: run_main(train_script, dataset, output_dir, *arguments)
    torch.set_flush_denormal(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Ninety cells of 40 genes and two types, as a file."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.5, 2.0, size=(2, 40))
    labels = rng.choice(2, size=90)
    counts = sp.csr_matrix(rng.poisson(rates[labels]), dtype=np.float32)
    obs = pd.DataFrame({"cell_type": np.array(["T cell", "B cell"])[labels]}, index=[f"cell{i}" for i in range(90)])
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(40)])).write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def trained(train_script, dataset, tmp_path_factory):
    """A tiny pipeline that train.py has trained on `dataset`, with its checkpoints and logs."""
    output_dir = tmp_path_factory.mktemp("model")
    run_main(train_script, dataset, output_dir, "--labels_key", "cell_type", "--report_to", "tensorboard")
    torch.set_flush_denormal(False)
    return output_dir


@pytest.fixture(scope="session")
def parquet_folder(dataset, tmp_path_factory):
    """A dataset as on the Hub: parquet files and the gene vocabulary."""
    folder = tmp_path_factory.mktemp("parquet")
    adata = ad.read_h5ad(dataset)
    rows = CellDataset.from_anndata(adata).rows
    (folder / "data").mkdir()
    for part in range(2):
        rows.shard(2, part, contiguous=True).to_parquet(folder / "data" / f"train-{part:05d}-of-00002.parquet")
    adata.var.rename_axis("var_names").to_parquet(folder / "var.parquet")
    return folder
