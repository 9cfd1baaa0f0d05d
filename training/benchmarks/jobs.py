"""What trained models answer, beside baselines, as Markdown tables: the figures of docs/jobs.

    python training/benchmarks/jobs.py --data_dir data --output_dir outputs/jobs

measures every job on the datasets of `STUDIES` that the folder has. For other cells:

    python training/benchmarks/jobs.py --datasets cells.h5ad --labels_key cell_type --output_dir outputs/jobs
    python training/benchmarks/jobs.py --datasets cells.h5ad --labels_key cell_type batch --output_dir outputs/moved \
        --jobs translate --translate batch B

Each dataset is split as `training/evaluate.py` does. Training is on its train part (60%) with the defaults, once for
each seed, after the cells of `--held_out` are taken out of all parts. The same command continues after an interruption.
`answers.py` says how denoising, annotation, simulation and augmentation are measured, `editing.py` how completion,
translation and paths are. MAGIC, scVI, SMOTE and Harmony are measured where magic-impute, scvi-tools, imbalanced-learn
and harmonypy are installed.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
from _common import LABELED, SINGLETS, Record, select_labels, to_markdown, write_split
from answers import (
    labels_of,
    measure_annotation,
    measure_augmentation,
    measure_denoising,
    measure_realism,
    measure_simulation,
    measure_unseen,
    rare_labels,
)
from editing import PARTS, Parts, Results, measure_completion, measure_path, measure_translation

from scrdit_diffusers import SCRDiTPipeline

TRAINING = Path(__file__).resolve().parents[1]
ANSWERS = ("denoise", "annotate", "unseen", "simulate", "realism", "augment", "complete")
JOBS = (*ANSWERS, "translate", "path")
MEASUREMENTS: dict[str, Callable[..., Results]] = {
    "denoise": measure_denoising,
    "annotate": measure_annotation,
    "simulate": measure_simulation,
    "realism": measure_realism,
}
MIN_UNSEEN = 20  # test cells of a label that is left out of training


@dataclass(frozen=True)
class Study:
    """A dataset, and what is measured on it; each field but the first is an argument of the command.

    Parameters
    ----------
    file
        Name of the AnnData file.
    labels_key
        Columns of obs to train on, that of the types first.
    jobs
        What to measure.
    held_out
        Columns of obs and labels: cells that have one in each column are not trained on.
    translate
        Conditions and the labels to which cells are translated.
    path
        Label of the start and of the end.
    only
        Columns of obs and labels: cells that have one in each column are used.
    """

    file: str
    labels_key: tuple[str, ...] = ("cell_type",)
    jobs: tuple[str, ...] = ANSWERS
    held_out: dict[str, tuple[str, ...]] = field(default_factory=dict)
    translate: tuple[tuple[str, str], ...] = ()
    path: tuple[str, str] | None = None
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the folder of results."""
        return Path(self.file).stem + "-translate" * bool(self.translate) + "-path" * bool(self.path)


LUNG, OLIGODENDROCYTES, COMPOSITE = "lung_cancer_lines_celseq2.h5ad", "mouse_oligo_marques.h5ad", "pbmc_multi_19k.h5ad"
STUDIES = (
    Study("pbmc_zheng_facs.h5ad"),
    Study("pbmc3k_seurat.h5ad"),
    Study(LUNG, only=SINGLETS),
    Study(
        LUNG,
        labels_key=("cell_type", "batch"),
        jobs=("translate",),
        held_out={"cell_type": ("A549",), "batch": ("sc_celseq2_5cl_p3",)},
        translate=(("batch", "sc_celseq2"), ("batch", "sc_celseq2_5cl_p3")),
        only=SINGLETS,
    ),
    Study(OLIGODENDROCYTES),
    Study(OLIGODENDROCYTES, jobs=("path",), held_out={"cell_type": ("MFOL1", "MFOL2")}, path=("NFOL2", "MOL1")),
    Study("pollen_c1_fulllength.h5ad"),
    Study("kang_pbmc_12k.h5ad"),
    Study(COMPOSITE, labels_key=("cell_type_coarse",), only=LABELED),
    Study(
        COMPOSITE,
        labels_key=("cell_type_coarse", "dataset"),
        jobs=("translate",),
        translate=(("dataset", "pbmc3k"),),
        only=LABELED,
    ),
)


class Bench:
    """The split of a study, the pipelines trained on it, and the record of results.

    Parameters
    ----------
    study
        What is measured.
    path
        AnnData file.
    output_dir
        Folder of all studies.
    """

    def __init__(self, study: Study, path: Path, output_dir: Path):
        self.study, self.key, self.folder = study, study.labels_key[0], output_dir / study.name
        given = {name: getattr(study, name) for name in ("labels_key", "held_out", "only")}
        self.record = Record(self.folder / "jobs.json", given, results={})
        files = {part: self.folder / f"{part}.h5ad" for part in (*PARTS, "held_out")}
        if not files["test"].exists():  # the last one that is written
            cells = ad.read_h5ad(path)
            write_split(cells[select_labels(cells.obs, study.only)], self.key, self.folder, study.held_out)
        self.all_genes = {part: ad.read_h5ad(file) for part, file in files.items() if file.exists()}

    def _train(self, cells: Path, seed: int, output: Path) -> SCRDiTPipeline:
        """Train with the defaults, or load what was trained before."""
        if not (output / "model_index.json").exists():
            again = ["--resume_from_checkpoint", "latest"] if list(output.glob("checkpoint-*")) else []
            options = ["--labels_key", *self.study.labels_key, "--seed", seed, "--output_dir", output, *again]
            command = [sys.executable, TRAINING / "train.py", "--dataset", cells, *options]
            subprocess.run(list(map(str, command)), check=True)
        pipe = SCRDiTPipeline.from_pretrained(output)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _parts(self, pipe: SCRDiTPipeline) -> Parts:
        return {part: cells[:, pipe.processor.var_names].copy() for part, cells in self.all_genes.items()}

    def unseen_labels(self, number: int) -> list[str]:
        """Labels to leave out of training, spread over those with enough test cells from frequent to rare."""
        counts = self.all_genes["test"].obs[self.key].astype(str).value_counts()
        enough = list(counts.index[counts >= MIN_UNSEEN])
        return [enough[i] for i in np.linspace(0, len(enough) - 1, min(number, len(enough))).round().astype(int)]

    def measurements(self) -> Iterator[tuple[str, Callable[..., Results]]]:
        """Name and function of each measurement that is repeated with every seed."""
        for job in self.study.jobs:
            if job == "complete":
                for kind in ("variable", "random"):
                    yield f"complete, {kind} panel", partial(measure_completion, kind=kind)
            elif job == "translate":
                for condition, target in self.study.translate:
                    measure = partial(measure_translation, condition=condition, target=target)
                    yield f"translate, {condition} {target}", measure
            elif job == "path":
                start, end = self.study.path
                yield f"path, {start} to {end}", partial(measure_path, start=start, end=end)
            elif job == "augment":
                if rare_labels(self.all_genes["train"], self.key):
                    yield job, measure_augmentation
            elif job in MEASUREMENTS:
                yield job, MEASUREMENTS[job]

    def measure(self, seed: int) -> None:
        """Measure all jobs with the pipeline of a seed, but what is in the record."""
        for job, measure in self.measurements():
            if f"{job} {seed}" not in self.record["results"]:
                pipe = self._train(self.folder / "train.h5ad", seed, self.folder / f"pipeline-{seed}")
                self._save(f"{job} {seed}", measure(pipe, self._parts(pipe), self.key, seed))

    def measure_unseen(self, labels: list[str]) -> None:
        """Leave one label after the other out of training, but those in the record."""
        for label in labels:
            if f"unseen {label}" in self.record["results"]:
                continue
            train = self.all_genes["train"]
            number = sorted(set(labels_of(train, self.key))).index(label)
            path = self.folder / f"without-{number}.h5ad"
            if not path.exists():
                train[labels_of(train, self.key) != label].write_h5ad(path)
            pipe = self._train(path, 0, self.folder / f"pipeline-without-{number}")
            self._save(f"unseen {label}", measure_unseen(pipe, self._parts(pipe), self.key, label))

    def _save(self, name: str, found: Results) -> None:
        self.record["results"][name] = found
        self.record.save()

    def tables(self) -> str:
        """Format what is in the record of each job."""
        jobs = [job for job, _ in self.measurements()] + ["unseen"] * ("unseen" in self.study.jobs)
        parts = []
        for job in jobs:
            runs = [found for name, found in self.record["results"].items() if name.startswith(f"{job} ")]
            if runs:
                parts.append(f"\n## {self.study.name}: {job} ({len(runs)} runs)\n\n{format_table(runs)}")
        return "\n".join(parts)


def format_table(runs: list[Results]) -> str:
    """Format the mean of each value over the runs, and its range: a row per method, a column per metric."""
    metrics = list(dict.fromkeys(metric for found in runs[0].values() for metric in found))
    rows = []
    for method, found in runs[0].items():
        row = [method]
        for metric in metrics:
            values = [run[method][metric] for run in runs if metric in found and method in run]
            row.append(f"{np.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})" if values else "")
        rows.append(row)
    return to_markdown(["method", *metrics], rows)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_dir", type=Path, help="folder of the files of STUDIES")
    source.add_argument("--datasets", nargs="+", type=Path, help="AnnData files of raw counts")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, help="default: all of a study, but translate and path")
    parser.add_argument("--labels_key", nargs="+", default=["cell_type"], help="columns of obs, that of types first")
    parser.add_argument("--held_out", nargs="+", action="append", default=[], metavar="KEY LABEL")
    parser.add_argument("--translate", nargs=2, action="append", default=[], metavar=("CONDITION", "LABEL"))
    parser.add_argument("--path", nargs=2, metavar=("START", "END"))
    parser.add_argument("--num_seeds", type=int, default=3, help="trained pipelines of each dataset")
    parser.add_argument("--num_unseen", type=int, default=2, help="labels left out of training, one at a time")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/jobs"), help="splits, pipelines and results")
    args = parser.parse_args()
    jobs = args.jobs or ANSWERS
    if not args.data_dir and ("translate" in jobs) != bool(args.translate):
        parser.error("--jobs translate needs --translate CONDITION LABEL, and the other way round")
    if not args.data_dir and not ("path" in jobs) == bool(args.path) == bool(args.path and args.held_out):
        parser.error("--jobs path needs --path START END and, for the cells between them, --held_out KEY LABEL")
    return args


def choose_studies(args: argparse.Namespace) -> list[tuple[Study, Path]]:
    """List the studies that the command asks for, and their files."""
    if args.data_dir:
        wanted = args.jobs or JOBS
        studies = [replace(study, jobs=tuple(job for job in study.jobs if job in wanted)) for study in STUDIES]
        found = [(study, args.data_dir / study.file) for study in studies if study.jobs]
        return [(study, path) for study, path in found if path.exists()]
    held_out = {key: tuple(labels) for key, *labels in args.held_out}
    translate = tuple((condition, target) for condition, target in args.translate)
    chosen = tuple(args.labels_key), tuple(args.jobs or ANSWERS), held_out, translate, args.path
    return [(Study(path.name, *chosen), path) for path in args.datasets]


def main() -> None:
    """Measure each job on each dataset and print the tables."""
    args = parse_arguments()
    benches = [Bench(study, path, args.output_dir) for study, path in choose_studies(args)]
    for seed in range(args.num_seeds):
        for bench in benches:
            bench.measure(seed)
            if "unseen" in bench.study.jobs and seed == 0:
                bench.measure_unseen(bench.unseen_labels(args.num_unseen))
    for bench in benches:
        print(bench.tables(), flush=True)


if __name__ == "__main__":
    main()
