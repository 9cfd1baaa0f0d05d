"""How real generated cells are on sets of many kinds, as Markdown tables: those of docs/BENCHMARKS.

    python training/benchmarks/realism.py --data_dir data --output_dir outputs/realism

trains by default on every case of `CASES` whose file the folder has, and judges the cells with `training/evaluate.py`
beside other real cells and the Gaussian copula. `--parts` and `--cases` choose; the same command continues after an
interruption, and commands for different cases may share the folder.

- `sets`: each dataset with its labels.
- `labels`: with coarse labels or none, which are judged without labels.
- `unseen`: a combination of labels that training has not seen, judged against its real cells.
- `values`: values that are no counts.
- `grid`: 150 to 10,000 training cells, 2 to 40 labels, 500 and 2,000 genes of one dataset.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from _common import LABELED, SINGLETS, run_logged, select_labels, to_markdown, write_split

TRAINING = Path(__file__).resolve().parents[1]
PARTS = ("sets", "labels", "unseen", "values", "grid")
Rows = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Case:
    """What is trained and judged.

    Parameters
    ----------
    part
        Table in which it is.
    name
        Row of the table, and folder.
    file
        Name of the AnnData file.
    labels_key
        Columns of obs to train on; the first is the one that is judged.
    split_key
        Column within whose labels the cells are split.
    only
        Columns of obs and labels: cells that have one in each column are used.
    held_out
        Columns of obs and labels: cells that have one in each column are not trained on, but judged.
    num_cells
        Number of training cells; `None` for 60% of all.
    prepare
        Changes the cells before they are split.
    options
        Further arguments of train.py.
    max_cells
        Largest number of cells to judge.
    num_seeds
        Evaluation seeds.
    """

    part: str
    name: str
    file: str
    labels_key: tuple[str, ...] = ("cell_type",)
    split_key: str = "cell_type"
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)
    held_out: dict[str, tuple[str, ...]] = field(default_factory=dict)
    num_cells: int | None = None
    prepare: Callable[[ad.AnnData], None] = lambda cells: None
    options: str = ""
    max_cells: int = 3000
    num_seeds: int = 5


def make_tpm(cells: ad.AnnData) -> None:
    """Turn counts into log2(TPM / 10 + 1), with gene lengths at random."""
    lengths = np.random.default_rng(0).lognormal(0, 0.7, cells.n_vars)
    rates = cells.X.toarray() / lengths
    cells.X = np.log2(1 + rates / rates.sum(axis=1, keepdims=True) * 1e5).astype(np.float32)


def label_composite(cells: ad.AnnData) -> None:
    """Give blood cells of nine datasets 2 lineages, 8 types and 41 pairs of type and dataset."""
    myeloid = cells.obs["cell_type_pred"].isin(["Monocyte", "DC", "Megakaryocyte", "CD34+"])
    cells.obs["lineage"] = np.where(myeloid, "myeloid", "lymphoid")
    cells.obs["type_of_dataset"] = cells.obs["cell_type"].astype(str) + " of " + cells.obs["dataset"].astype(str)


BLOOD, LUNG, OLIGODENDROCYTES = "pbmc_zheng_facs.h5ad", "lung_cancer_lines_celseq2.h5ad", "mouse_oligo_marques.h5ad"
DONORS, COMPOSITE, POLLEN = "kang_pbmc_12k.h5ad", "pbmc_multi_19k.h5ad", "pollen_c1_fulllength.h5ad"
COARSE = {"labels_key": ("cell_type_coarse",), "split_key": "cell_type_coarse", "max_cells": 1000, "only": LABELED}
LOGGED = "--value_space log_normalized"
GRID_LABELS = {"2 labels": "lineage", "8 labels": "cell_type_pred", "41 labels": "type_of_dataset"}
CASES = [
    Case("sets", "blood cells", BLOOD),
    Case("sets", "blood cells (3k)", "pbmc3k_seurat.h5ad"),
    Case("sets", "blood cells of eight donors", DONORS, max_cells=1000),
    Case("sets", "blood cells of four datasets", COMPOSITE, **COARSE),
    Case("sets", "lung lines", LUNG, only=SINGLETS),
    Case("sets", "oligodendrocytes", OLIGODENDROCYTES),
    Case("sets", "developing cells", POLLEN),
    *(
        Case("labels", f"{name}, {what}", file, **options, num_seeds=2, **more)
        for name, file, more in (
            ("blood cells", BLOOD, {}),
            ("blood cells (3k)", "pbmc3k_seurat.h5ad", {}),
            ("blood cells of eight donors", DONORS, {"max_cells": 1000}),
            ("blood cells of four datasets", COMPOSITE, {k: v for k, v in COARSE.items() if k != "labels_key"}),
            ("lung lines", LUNG, {"only": SINGLETS}),
            ("oligodendrocytes", OLIGODENDROCYTES, {}),
            ("developing cells", POLLEN, {}),
        )
        for what, options in (
            ("no labels", {"labels_key": ()}),
            *([("coarse labels", {"labels_key": ("cell_type_coarse",)})] if name == "blood cells" else []),
        )
    ),
    *(
        Case(
            "labels",
            f"CD4 T cells of eight donors, {what}",
            DONORS,
            labels_key=keys,
            split_key="donor",
            only={"cell_type": ("CD4 T cells",)},
            max_cells=1000,
            num_seeds=2,
        )
        for what, keys in (("by donor", ("donor",)), ("no labels", ()))
    ),
    Case(
        "unseen",
        "lung lines, A549 on the third plate",
        LUNG,
        labels_key=("cell_type", "batch"),
        only=SINGLETS,
        held_out={"cell_type": ("A549",), "batch": ("sc_celseq2_5cl_p3",)},
    ),
    Case("values", "TPM of lung lines", LUNG, only=SINGLETS, prepare=make_tpm, options=LOGGED, num_seeds=3),
    Case("values", "tumors, TPM", "hnscc_puram_ref180_log2tpm.h5ad", options=LOGGED, num_seeds=3),
    *(
        Case(
            "grid",
            f"{num_cells:,} cells, {labels}, {num_genes:,} genes",
            COMPOSITE,
            labels_key=(key,),
            split_key="type_of_dataset",
            num_cells=num_cells,
            prepare=label_composite,
            options=f"--n_top_genes {num_genes}",
            max_cells=600,
            num_seeds=2,
        )
        for num_cells, num_genes, (labels, key) in product((150, 500, 2000, 10000), (500, 2000), GRID_LABELS.items())
    ),
]


def draw_cells(labels: pd.Series, num_cells: int) -> np.ndarray:
    """Draw about so many cells in the proportions of their labels, at least two of each; positions, sorted."""
    rng, codes = np.random.default_rng(1), labels.astype("category").cat.codes.to_numpy()
    share = num_cells / len(labels)
    groups = [rng.permutation(np.flatnonzero(codes == code)) for code in np.unique(codes)]
    return np.sort(np.concatenate([group[: max(round(share * len(group)), 2)] for group in groups]))


class Run:
    """The split, the pipeline and the evaluation of a case.

    Parameters
    ----------
    case
        What is trained and judged.
    args
        Command-line arguments.
    """

    def __init__(self, case: Case, args: argparse.Namespace):
        self.case, self.args, self.folder = case, args, args.output_dir / case.part / case.name

    @property
    def metrics(self) -> Path:
        """Where `training/evaluate.py` writes its results."""
        return self.folder / "evaluation/metrics.json"

    @property
    def is_done(self) -> bool:
        """Whether it has been judged."""
        return (self.folder / "evaluation/report.html").exists()  # metrics.json grows seed by seed, it comes last

    def measure(self) -> None:
        """Split, train and judge, but what is there."""
        if not (self.folder / "split.json").exists():  # the last file that is written
            self._split()
        if not (self.folder / "pipeline/model_index.json").exists():
            words = ["--dataset", self.folder / "train.h5ad", "--output_dir", self.folder / "pipeline"]
            words += ["--labels_key", *self.case.labels_key] if self.case.labels_key else []
            words += ["--resume_from_checkpoint", "latest", "--report_to", "none", *shlex.split(self.case.options)]
            self._run("train", *words, *shlex.split(self.args.train_options))
        words = ["--split_dir", self.folder, "--pipeline", self.folder / "pipeline", "--overwrite", "--steps_curve", 0]
        words += ["--output_dir", self.folder / "evaluation", "--max_cells", self.case.max_cells]
        words += ["--num_seeds", self.case.num_seeds, "--baselines", "gaussian_copula"]
        self._run("evaluate", *words, *shlex.split(self.args.evaluate_options))

    def _split(self) -> None:
        """Write the parts; those of held-out cells are judged."""
        case = self.case
        cells = ad.read_h5ad(self.args.data_dir / case.file)
        cells = cells[select_labels(cells.obs, case.only)].copy()
        case.prepare(cells)
        write_split(cells, case.split_key, self.folder, case.held_out)
        train = ad.read_h5ad(self.folder / "train.h5ad")
        if case.held_out:
            held_out = ad.read_h5ad(self.folder / "held_out.h5ad")
            half = np.random.default_rng(0).permutation(held_out.n_obs) % 2 == 0
            held_out[half].copy().write_h5ad(self.folder / "control.h5ad")
            held_out[~half].copy().write_h5ad(self.folder / "test.h5ad")
        if case.num_cells:
            chosen = draw_cells(train.obs[case.split_key], case.num_cells)
            train[chosen].copy().write_h5ad(self.folder / "train.h5ad")
        record = {"dataset": case.file, "labels_key": next(iter(case.labels_key), None), "split_by": None}
        (self.folder / "split.json").write_text(json.dumps(record))

    def _run(self, script: str, *words: object) -> None:
        run_logged([sys.executable, TRAINING / f"{script}.py", *words], self.folder / f"logs/{script}.txt")

    def row(self) -> list[str]:
        """Format the figures of the table: generated / other real cells / copula."""
        rows = [row for row in json.loads(self.metrics.read_text())["rows"] if row["group"] == "all"]
        found: Rows = {row["metric"]: row for row in rows}

        def figures(metric: str, *columns: str) -> str:
            row = found.get(metric, {})
            return " / ".join(f"{row[column]:.3f}" for column in columns if row.get(column) is not None)

        classifiers = [found[f"classifier_{on}_auroc"] for on in ("genes", "pcs")]
        excess = np.mean([row["value"] - row["ceiling"] for row in classifiers])
        over_copula = np.mean([row["gaussian_copula"] - row["value"] for row in classifiers])
        compared = [figures(metric, "value", "ceiling", "gaussian_copula") for metric in COMPARED]
        return [self.case.name, *compared, f"{excess:.3f}", f"{over_copula:.3f}"] + [
            figures(metric, "value", "ceiling") for metric in BESIDE_REAL
        ]


COMPARED = {"classifier_genes_auroc": "genes", "classifier_pcs_auroc": "PCs", "nearest_neighbor_accuracy": "1-NN"}
BESIDE_REAL = {
    "variance_within_labels": "variance within labels",
    "library_size_ks": "library size, KS",
    "genes_detected_ks": "genes detected, KS",
    "label_accuracy": "label accuracy",
    "effect_size_slope": "effect sizes, slope",
    "share_nearer_to_train": "nearer to train",
}


def titles() -> list[str]:
    """Titles of the columns of [`Run.row`]."""
    return ["", *COMPARED.values(), "excess over real", "copula over ours", *BESIDE_REAL.values()]


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the files of CASES")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/realism"), help="splits, pipelines, results")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--cases", nargs="+", help="names of the cases, or how they begin; all if not given")
    parser.add_argument("--train_options", default="", help="further arguments of train.py, in quotes")
    parser.add_argument("--evaluate_options", default="", help="further arguments of evaluate.py, in quotes")
    args = parser.parse_args()
    chosen = [
        Run(case, args)
        for case in CASES
        if case.part in args.parts
        and (not args.cases or case.name.startswith(tuple(args.cases)))
        and (args.data_dir / case.file).exists()
    ]
    if not chosen:
        parser.error(f"--data_dir {args.data_dir} has no file of the cases chosen: {sorted({c.file for c in CASES})}")
    for run in chosen:
        if not run.is_done:
            print(f"{run.case.part}: {run.case.name}", flush=True)
            run.measure()
    for part in dict.fromkeys(run.case.part for run in chosen):
        rows = [run.row() for run in chosen if run.case.part == part]
        print(f"\n## {part}\n\n{to_markdown(titles(), rows)}")


if __name__ == "__main__":
    main()
