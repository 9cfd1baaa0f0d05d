"""The Space in hub_cards/space: what its button does, without a browser and in one."""

import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from huggingface_hub import RepoCard, SpaceCardData
from matplotlib.colors import to_rgb

from scrdit_diffusers.evaluation.plotting import COLORS

pytest.importorskip("gradio", reason="gradio is missing: `make test` installs it apart")

SPACE = Path(__file__).parents[1] / "hub_cards" / "space"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FORM = dict(labels=[], shares="", num_cells=6, library_size="", seed=0, scheduler="UniPCMultistep", num_steps=4)


def load(path):
    spec = importlib.util.spec_from_file_location(f"space_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def app():
    return load(SPACE / "app.py")


@pytest.fixture
def source(app, count_pipe, adata):
    return app.Source("tiny", count_pipe, adata)


@pytest.fixture
def press(app, source):
    """Press the button on a form."""
    return lambda on_progress=lambda share, text: None, **fields: app.generate(
        source, **(FORM | fields), on_progress=on_progress
    )


def same_cells(one, other):
    return one.obs.equals(other.obs) and (one.X != other.X).nnz == 0


def has_color(image, color):
    """Whether many pixels have about a color, as opaque as figures draw it."""
    seen = 0.3 + 0.7 * np.array(to_rgb(color))
    return (np.abs(image[..., :3] - seen).max(axis=2) < 0.02).sum() > 20


def test_cells_are_those_of_the_pipeline(press, count_pipe):
    cells = press(labels=["T", "B"], shares="1, 2", seed=3, scheduler="DDIM")
    count_pipe.scheduler = DDIMScheduler.from_config(count_pipe.scheduler.config)
    expected = count_pipe(
        conditions={"cell_type": ["T"] * 2 + ["B"] * 4}, num_inference_steps=4, generator=torch.manual_seed(3)
    ).adata
    assert same_cells(cells, expected) and cells.uns["scrdit"]["scheduler"] == "DDIMScheduler"
    assert cells.uns["scrdit"]["model"] == "tiny"


def test_a_library_size_reaches_the_pipeline(press, count_pipe):
    expected = count_pipe(6, library_size=40, num_inference_steps=4, generator=torch.manual_seed(0)).adata
    assert same_cells(press(library_size=" 40"), expected) and not same_cells(press(), expected)


def test_no_labels_are_a_mix_as_in_the_training_cells(press, adata):
    shares = press(num_cells=400, num_steps=1).obs["cell_type"].value_counts(normalize=True)
    assert (shares - adata.obs["cell_type"].value_counts(normalize=True)).abs().max() < 0.08


@pytest.mark.parametrize(
    "labels, shares, num_cells, numbers",
    [
        (["T", "B"], "70, 30", 10, [7, 3]),
        (["T", "B", "NK"], "", 11, [4, 4, 3]),
        (["T", "B", "NK"], "1, 0, 1.5", 5, [2, 0, 3]),
        (["B"], "8", 1, [1]),
    ],
)
def test_shares_become_whole_cells(app, labels, shares, num_cells, numbers):
    mixed = app.mix_labels(labels, shares, num_cells)
    assert [mixed.count(label) for label in labels] == numbers and len(mixed) == num_cells


def test_progress_goes_from_the_first_step_to_the_end(app, press, monkeypatch):
    monkeypatch.setattr(app, "BATCH_SIZE", 4)
    seen = []
    press(on_progress=lambda share, text: seen.append((share, text)))
    assert [share for share, _ in seen] == pytest.approx(np.arange(1, 9) / 8)  # two batches of four steps
    assert seen[2][1].endswith("step 3 of 8")


def test_two_people_at_once_get_what_each_gets_alone(press, count_pipe):
    forms = [dict(labels=["T"], seed=1), dict(labels=["NK"], seed=2, scheduler="DPMSolverMultistep", library_size="50")]
    alone = [press(**form) for form in forms]
    second_comes, scheduler = threading.Event(), count_pipe.scheduler

    def wait_for_second(share, text):
        second_comes.wait(60)
        time.sleep(0.1)  # the second one prepares its call

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(press, on_progress=wait_for_second, **forms[0])]
        calls.append(pool.submit(lambda: second_comes.set() or press(**forms[1])))
    assert all(same_cells(call.result(), cells) for call, cells in zip(calls, alone, strict=True))
    assert count_pipe.scheduler is scheduler and scheduler.num_inference_steps is None


@pytest.mark.parametrize(
    "fields, told",
    [
        (dict(num_cells=0), "Cells.*1 to 1,000.* 0"),
        (dict(num_cells=1001), "Cells.*1,001"),
        (dict(num_cells=2.5), r"Cells.*2\.5"),
        (dict(num_cells=None), "Cells.*nothing"),
        (dict(num_cells=float("nan")), "Cells.*nan"),
        (dict(seed=-1), "Seed.*-1"),
        (dict(num_steps=101), "Steps.*100.*101"),
        (dict(library_size="many"), "Counts per cell.*'many'"),
        (dict(library_size="0"), "Counts per cell.*'0'"),
        (dict(library_size="nan"), "Counts per cell.*'nan'"),
        (dict(library_size="inf"), "Counts per cell.*'inf'"),
        (dict(scheduler="LCM"), "Scheduler.*DDIM.*'LCM'"),
        (dict(labels=["plasma"]), "plasma"),
        (dict(shares="1"), "Shares.*'1'"),
        (dict(labels=["T", "B"], shares="1"), "Shares.*2 chosen.*'1'"),
        (dict(labels=["T", "B"], shares="0, 0"), "Shares.*'0, 0'"),
        (dict(labels=["T", "B"], shares="2, -1"), "Shares.*'2, -1'"),
        (dict(labels=["T", "B"], shares="a, b"), "Shares.*'a, b'"),
        (dict(labels=["T", "B"], shares="nan, 1"), "Shares.*'nan, 1'"),
    ],
)
def test_bad_input_is_told_before_any_work(press, fields, told):
    with pytest.raises(ValueError, match=told):
        press(on_progress=lambda share, text: pytest.fail("worked"), **fields)


def test_a_library_size_that_the_model_cannot_take_is_told(app, pipe):
    with pytest.raises(ValueError, match="library_size"):
        app.generate(app.Source("tiny", pipe, None), **(FORM | {"library_size": "9"}), on_progress=print)


def test_warnings_of_the_package_reach_the_page(app, press):
    logger, handler = logging.getLogger("scrdit_diffusers"), app.PageWarnings(logging.WARNING)
    logger.addHandler(handler)
    try:
        with pytest.warns(UserWarning, match="library_size is 9000"):  # outside a page Gradio only warns
            press(library_size="9000")
    finally:
        logger.removeHandler(handler)


def test_the_table_shows_the_counts_of_the_first_cells(app, press):
    cells = press()
    table = app.tabulate(cells, "cell_type", num_rows=3, num_genes=5)
    assert table["cell"].tolist() == list(cells.obs_names[:3]) and len(table.columns) == 8
    assert table["total"].tolist() == cells.X[:3].sum(axis=1).A1.tolist()
    assert (table.iloc[:, 3:].to_numpy() == cells[:3, table.columns[3:]].X.toarray()).all()
    assert table.columns[3] == cells.var_names[cells.X.sum(axis=0).argmax()]


@pytest.mark.slow  # numba compiles UMAP
@pytest.mark.parametrize("labels_key", ["cell_type", None])
def test_figures_show_real_and_new_cells(app, source, press, labels_key, tmp_path, monkeypatch):
    monkeypatch.setattr(app.Source, "labels_key", labels_key)
    files = app.draw_figures(source, press(), tmp_path)
    images = [plt.imread(file) for file in files]
    assert all(has_color(images[0], color) for color in COLORS.values())
    assert images[1].std() > 0.05 and not plt.get_fignums()


@pytest.mark.parametrize("names, told", [(" , ", "' , '"), ("a/{0},b/{0}", "{0}")])
def test_pipelines_are_named_once(app, count_pipe, tmp_path, names, told):
    for parent in "ab":
        count_pipe.save_pretrained(tmp_path / parent / "tiny")
    with pytest.raises(ValueError, match=f"SCRDIT_PIPELINES.*{told.format('tiny')}"):
        app.load_sources(names.format("tiny").replace("a/", f"{tmp_path}/a/").replace("b/", f"{tmp_path}/b/"))


def test_the_space_asks_for_the_gradio_that_it_is_tested_with():
    card = RepoCard.load(SPACE / "README.md", ignore_metadata_errors=False)
    data = SpaceCardData(**card.data.to_dict())
    pins = (SPACE.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert data.sdk == "gradio" and f"gradio=={data.sdk_version}" in pins
    assert (SPACE / data.app_file).is_file() and len(data.short_description) <= 60


def test_real_cells_beside_the_app_are_counts_of_the_labels_of_their_card():
    file = SPACE / "reference" / "scrdit-pbmc-zheng.h5ad"
    real, card = ad.read_h5ad(file), SPACE.parent / file.stem / "card.json"
    text = card.read_text(encoding="utf-8")
    assert real.shape == (776, 2000) and (real.X.data % 1 == 0).all() and real.X.data.min() > 0
    assert all(f'"{label}"' in text for label in real.obs["cell_type"].unique())
    assert file.stat().st_size < 1e6


PROCESSOR = SPACE.parent / "scrdit-pbmc-zheng" / "processor" / "preprocessor_config.json"


@pytest.mark.skipif(not PROCESSOR.is_file(), reason="this checkout has no weights")
def test_real_cells_beside_the_app_have_the_genes_of_their_pipeline():
    real = ad.read_h5ad(SPACE / "reference" / "scrdit-pbmc-zheng.h5ad")
    assert list(real.var_names) == json.loads(PROCESSOR.read_text(encoding="utf-8"))["var_names"]


def test_a_reference_has_the_genes_and_labels_of_its_pipeline(app, count_pipe, adata, tmp_path, monkeypatch):
    copy = shutil.copytree(SPACE, tmp_path / "space")
    count_pipe.save_pretrained(tmp_path / "tiny")
    adata[:, ::-1].copy().write_h5ad(tmp_path / "cells.h5ad")
    script = load(copy / "make_reference.py")
    monkeypatch.setattr(script, "MAX_CELLS", 20)
    arguments = ["--cells", tmp_path / "cells.h5ad", "--pipeline", tmp_path / "tiny", "--about", "made for a test"]
    monkeypatch.setattr(sys, "argv", ["make_reference.py", *map(str, arguments)])
    script.main()
    monkeypatch.setattr(app, "HERE", copy)
    real = app.load_sources(str(tmp_path / "tiny"))["tiny"].real
    assert real.n_obs == 20 and real.uns["about"] == "made for a test"
    assert list(real.var_names) == count_pipe.processor.var_names and list(real.obs) == ["cell_type", "batch"]
    assert (real.X != adata[real.obs_names].X).nnz == 0


@pytest.fixture
def page_address(count_pipe, adata, tmp_path):
    """The Space, run as a Space: a folder by itself, two pipelines, real cells of the first one."""
    adata.uns["about"] = "made for a test"
    shutil.copytree(SPACE, tmp_path / "space")
    adata.write_h5ad(tmp_path / "space" / "reference" / "tiny.h5ad")
    for name in ("tiny", "bare"):
        count_pipe.save_pretrained(tmp_path / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    environment["SCRDIT_PIPELINES"] = f"{tmp_path / 'tiny'}, {tmp_path / 'bare'}"
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, tmp_path / "space" / "app.py"], env=environment, stdout=output, stderr=output
        )
    try:
        for _ in range(600):
            if "Running on" in log.read_text() or server.poll() is not None:
                break
            time.sleep(0.2)
        assert server.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is missing")
def test_a_visitor_generates_looks_and_downloads(page_address, count_pipe, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(page_address)
        page.get_by_text("not measurements").wait_for()

        # Bad input is told, and nothing can be downloaded yet.
        page.get_by_label("Shares").fill("3, 1")
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("no labels are chosen").wait_for()
        assert page.get_by_role("button", name="Download .h5ad").is_disabled()

        # Generate.
        for label in "TB":
            page.get_by_label("cell_type").click()
            page.get_by_role("option", name=f"{label} (").click()
        page.get_by_label("Cells", exact=True).fill("24")
        page.get_by_label("Seed").fill("5")
        page.get_by_label("Steps").fill("6")
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("24 cells").wait_for()

        # Look.
        for tab, colors in (("UMAP", COLORS.values()), ("Marker genes", ())):
            page.get_by_role("tab", name=tab).click()
            shown = page.locator("img[src*='/file=']:visible")
            shown.wait_for()
            file = tmp_path / "figure.png"
            file.write_bytes(page.request.get(shown.get_attribute("src")).body())
            image = plt.imread(file)
            assert all(has_color(image, color) for color in colors) and image.std() > 0.05
        page.get_by_role("tab", name="Counts").click()
        page.locator("text=synthetic_0 >> visible=true").first.wait_for()

        # Download.
        with page.expect_download() as download:
            page.get_by_role("button", name="Download .h5ad").click()
        assert download.value.suggested_filename == "tiny-seed-5.h5ad"
        download.value.save_as(tmp_path / "cells.h5ad")

        # A pipeline without real cells.
        page.get_by_label("Pipeline").click()
        page.get_by_role("option", name="bare").click()
        page.get_by_text("no figures are drawn").wait_for()
        page.get_by_label("Shares").fill("")
        page.get_by_label("Seed").fill("6")
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("seed 6").wait_for()

    cells = ad.read_h5ad(tmp_path / "cells.h5ad")
    expected = count_pipe(
        conditions={"cell_type": ["T"] * 18 + ["B"] * 6}, num_inference_steps=6, generator=torch.manual_seed(5)
    ).adata
    assert same_cells(cells, expected) and cells.obs["synthetic"].all() and cells.uns["scrdit"]["seed"] == 5
