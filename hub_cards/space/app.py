"""The Space: choose cells, generate them, see them beside real ones, download them.

    python hub_cards/space/app.py

The environment variable SCRDIT_PIPELINES lists the pipelines, as folders or Hub ids with commas between them. Real
cells of a pipeline's dataset lie in `reference/NAME.h5ad`, where NAME is the last part of its path; make_reference.py
makes them.
"""

import html
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import diffusers
import gradio as gr
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from scrdit_diffusers import SCRDiTPipeline
from scrdit_diffusers.evaluation import plotting

matplotlib.use("Agg")
HERE = Path(__file__).resolve().parent
SCHEDULERS = ("UniPCMultistep", "DPMSolverMultistep", "DDIM", "EulerDiscrete", "DDPM")
MAX_CELLS, MAX_STEPS, MAX_SEED = 1000, 100, 2**32 - 1  # what a Space with two cores does in about two minutes
BATCH_SIZE = 250  # cells; part of what makes a seed give the same cells
INTRODUCTION = """# Virtual single cells
Generate cells with [scRDiT](https://arxiv.org/abs/2404.06153), a diffusion transformer that learned gene counts from
one dataset, and look at them beside real cells of that dataset."""
CAVEAT = """**What these cells are not:** they are draws from a model of one dataset, not measurements, so they show no
biology that the dataset does not, and counting them as cells or patients would make evidence out of nothing."""
DRAWING = threading.Lock()  # pyplot and numba keep state for the whole process


class Source(NamedTuple):
    """A pipeline, never run itself, with real cells of its dataset (`None` where there are none)."""

    name: str
    pipe: SCRDiTPipeline
    real: ad.AnnData | None

    @property
    def labels_key(self) -> str | None:
        """The condition that a visitor chooses labels of; others are drawn from the training composition."""
        return next(iter(self.pipe.processor.condition_keys), None)


def load_sources(names: str) -> dict[str, Source]:
    """Load the pipelines of a comma-separated list, and their real cells."""
    sources = {}
    for path in filter(None, map(str.strip, names.split(","))):
        name = Path(path).name
        if name in sources:
            raise ValueError(f"SCRDIT_PIPELINES has two pipelines called {name!r}; give them different names.")
        file = HERE / "reference" / f"{name}.h5ad"
        real = ad.read_h5ad(file) if file.is_file() else None
        sources[name] = Source(name, SCRDiTPipeline.from_pretrained(path), real)
    if not sources:
        raise ValueError(f"SCRDIT_PIPELINES names no pipeline, it is {names!r}; list folders or Hub ids.")
    return sources


def read_whole_number(name: str, value: float | None, low: int, high: int) -> int:
    """Check what was typed into a field for a whole number."""
    if value is None or not float(value).is_integer() or not low <= value <= high:
        came = "nothing" if value is None else f"{value:,}"
        raise ValueError(f"{name} must be a whole number from {low:,} to {high:,}; it is {came}.")
    return int(value)


def read_library_size(text: str) -> float | None:
    """Check the total count per cell; `None` where the field is empty."""
    try:
        library_size = float(text) if text.strip() else None
    except ValueError:
        library_size = 0.0
    if library_size is not None and not 1 <= library_size < float("inf"):
        raise ValueError(f"Counts per cell must be a number of at least 1, or empty; it is {text!r}.")
    return library_size


def mix_labels(labels: list[str], shares: str, num_cells: int) -> list[str]:
    """One label per cell, in proportion to the shares (equal where the text is empty), by largest remainders."""
    try:
        weights = np.array([float(share) for share in shares.split(",")] if shares.strip() else [1.0] * len(labels))
    except ValueError:
        raise ValueError(
            f"Shares must be numbers with commas between them, such as 70, 30; they are {shares!r}."
        ) from None
    if len(weights) != len(labels) or not np.isfinite(weights).all() or weights.min() < 0 or not weights.sum():
        raise ValueError(
            f"Shares must hold one positive number for each of the {len(labels)} chosen labels; they are {shares!r}."
        )
    exact = num_cells * weights / weights.sum()
    numbers = np.floor(exact).astype(int)
    numbers[np.argsort(numbers - exact, kind="stable")[: num_cells - numbers.sum()]] += 1
    return [label for label, number in zip(labels, numbers, strict=True) for _ in range(number)]


def generate(
    source: Source,
    labels: list[str],
    shares: str,
    num_cells: float,
    library_size: str,
    seed: float,
    scheduler: str,
    num_steps: float,
    on_progress: Callable[[float, str], object],
) -> ad.AnnData:
    """Generate cells with a pipeline of this call alone, on the weights that all calls share."""
    num_cells = read_whole_number("Cells", num_cells, 1, MAX_CELLS)
    num_steps = read_whole_number("Steps", num_steps, 1, MAX_STEPS)
    seed = read_whole_number("Seed", seed, 0, MAX_SEED)
    if scheduler not in SCHEDULERS:
        raise ValueError(f"Scheduler must be one of {', '.join(SCHEDULERS)}; it is {scheduler!r}.")
    if shares.strip() and not labels:
        raise ValueError(f"Shares are {shares!r}, but no labels are chosen that they could belong to.")
    shared = source.pipe
    scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(shared.scheduler.config)
    pipe = SCRDiTPipeline(shared.transformer, scheduler, shared.processor)
    pipe.register_to_config(_name_or_path=source.name)  # what uns["scrdit"] says of the model
    pipe.set_progress_bar_config(disable=True)
    done = 0

    def on_step_end(pipe: SCRDiTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        nonlocal done
        done += 1
        total = pipe.num_timesteps * -(-num_cells // BATCH_SIZE)
        on_progress(done / total, f"Denoising, step {done} of {total}")
        return {}

    return pipe(
        num_cells,
        {source.labels_key: mix_labels(labels, shares, num_cells)} if labels else None,
        library_size=read_library_size(library_size),
        num_inference_steps=num_steps,
        generator=torch.Generator().manual_seed(seed),
        batch_size=BATCH_SIZE,
        callback_on_step_end=on_step_end,
    ).adata


def draw_figures(source: Source, cells: ad.AnnData, folder: Path) -> list[str]:
    """Draw new cells in one UMAP with real ones, and marker genes (gene means where there are no labels)."""
    key, value_space = source.labels_key, source.pipe.processor.value_space
    with DRAWING:
        embedding = plotting.joint_umap(source.real, cells, labels_key=key, value_space=value_space)
        colors = ["origin", key] if key else ["origin"]
        figure, axes = plt.subplots(
            1, len(colors), figsize=(5.6 * len(colors), 4.2), layout="constrained", squeeze=False
        )
        for ax, color in zip(axes[0], colors, strict=True):
            plotting.umap(embedding, color, ax)
        figure.savefig(folder / "umap.png", dpi=150)
        plt.close(figure)
        if key:
            axes = plotting.marker_dotplot(source.real, cells, source.real, key, value_space=value_space)
        else:
            axes = plotting.gene_statistics(source.real, cells, value_space=value_space)
        axes[0].figure.savefig(folder / "genes.png", dpi=150)
        plt.close(axes[0].figure)
    return [str(folder / "umap.png"), str(folder / "genes.png")]


def tabulate(cells: ad.AnnData, labels_key: str | None, num_rows: int = 10, num_genes: int = 12) -> pd.DataFrame:
    """First cells, with their label, their total and the genes with the largest means."""
    genes = np.argsort(-np.asarray(cells.X.mean(axis=0)).ravel(), kind="stable")[:num_genes]
    values = cells.X[:num_rows].toarray()
    table = pd.DataFrame({"cell": cells.obs_names[:num_rows], "total": values.sum(axis=1)})
    if labels_key:
        table.insert(1, labels_key, cells.obs[labels_key].astype(str).to_numpy()[:num_rows])
    return table.join(pd.DataFrame(values[:, genes], columns=cells.var_names[genes])).round(2)


class PageWarnings(logging.Handler):
    """Shows the package's warnings, such as of rare labels, to the visitor whose call they come from."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show a warning."""
        gr.Warning(html.escape(record.getMessage()))


def describe(source: Source) -> str:
    """Say what a pipeline makes, and what real cells its figures show."""
    seen = "There are no real cells of its dataset here: no figures are drawn."
    if source.real is not None:
        seen = f"The figures show {source.real.n_obs:,} real cells: {source.real.uns['about']}."
    return f"**{source.name}** generates the counts of {source.pipe.processor.num_genes:,} genes. {seen}"


def offer_labels(source: Source) -> dict:
    """Offer the labels of a pipeline with their numbers of training cells."""
    key = source.labels_key
    numbers = source.pipe.processor.label_counts.get(key, {})
    choices = [(f"{label} ({number:,})", label) for label, number in numbers.items()]
    return dict(choices=choices, value=[], label=key or "labels", visible=key is not None)


def answer(source: Source, fields: tuple, progress: gr.Progress) -> Iterator[tuple]:
    """Fill the page for a form: summary, figures, table and download."""
    try:
        cells = generate(source, *fields, on_progress=lambda share, text: progress(share, desc=text))
    except (TypeError, ValueError) as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None
    made = cells.uns["scrdit"]
    summary = f"**{cells.n_obs:,} cells** with seed {made['seed']}, "
    summary += f"in {made['num_inference_steps']} steps of {made['scheduler']}."
    with tempfile.TemporaryDirectory() as folder:  # Gradio has copied the files when it asks for more
        file = Path(folder) / f"{source.name}-seed-{made['seed']}.h5ad"
        cells.write_h5ad(file, compression="gzip")
        figures = [None, None]
        if source.real is not None:
            progress(None, desc="Drawing the figures")
            figures = draw_figures(source, cells, Path(folder))
        yield summary, *figures, tabulate(cells, source.labels_key), gr.DownloadButton(value=file, interactive=True)


def build_page(sources: dict[str, Source]) -> gr.Blocks:
    """Lay out the page: a form on the left, what it gives on the right."""

    def on_choice(name: str) -> tuple:
        return describe(sources[name]), gr.Dropdown(**offer_labels(sources[name]))

    def on_click(name: str, *fields: object, progress: gr.Progress = gr.Progress()) -> Iterator[tuple]:  # noqa: B008
        yield from answer(sources[name], fields, progress)

    first = next(iter(sources.values()))
    picture = dict(format="png", show_label=False, interactive=False, buttons=["download", "fullscreen"])
    with gr.Blocks(title="Virtual single cells", delete_cache=(3600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                name = gr.Dropdown(list(sources), value=first.name, label="Pipeline", visible=len(sources) > 1)
                hint = "In brackets: training cells. Empty: all, in these shares."
                labels = gr.Dropdown(**offer_labels(first), multiselect=True, info=hint)
                shares = gr.Textbox("", label="Shares", info="Of the chosen ones: 70, 30. Empty: equal.")
                with gr.Row():
                    num_cells = gr.Number(200, label="Cells", min_width=100)
                    seed = gr.Number(0, label="Seed", min_width=100)
                hint = "Empty: as training cells of the same label."
                library_size = gr.Textbox("", label="Counts per cell", info=hint)
                with gr.Row():
                    scheduler = gr.Dropdown(SCHEDULERS, value=SCHEDULERS[0], label="Scheduler", min_width=180)
                    steps = gr.Number(25, label="Steps", min_width=80)
                button = gr.Button("Generate", variant="primary")
                download = gr.DownloadButton("Download .h5ad", interactive=False)
            with gr.Column(scale=3):
                about = gr.Markdown(describe(first))
                summary = gr.Markdown("Press **Generate**. 200 cells take about half a minute, figures included.")
                with gr.Tabs():
                    with gr.Tab("UMAP"):
                        umap = gr.Image(**picture)
                        gr.Markdown("Real and new cells, embedded together.")
                    with gr.Tab("Marker genes"):
                        genes = gr.Image(**picture)
                        gr.Markdown("Genes that mark a label in the real cells. Labels without new cells have no dots.")
                    with gr.Tab("Counts"):
                        table = gr.Dataframe(show_label=False, interactive=False)
                        gr.Markdown("The first cells and the genes with the largest means. The download has them all.")
                gr.Markdown(CAVEAT)
        name.change(on_choice, name, [about, labels])
        inputs = [name, labels, shares, num_cells, library_size, seed, scheduler, steps]
        shown = [umap, genes, table]
        button.click(
            on_click,
            inputs,
            [summary, *shown, download],
            show_progress_on=shown,
            concurrency_limit=2,
            api_name="generate",
        )
    return page


def main() -> None:
    """Serve the page."""
    sources = load_sources(os.environ.get("SCRDIT_PIPELINES", str(HERE.parent / "scrdit-pbmc-zheng")))
    logging.getLogger("scrdit_diffusers").addHandler(PageWarnings(logging.WARNING))
    build_page(sources).launch(theme=gr.themes.Soft(font=["system-ui", "sans-serif"]))


if __name__ == "__main__":
    main()
