"""Our cells judged by two published protocols on 2,638 blood cells (PBMC3K), beside real cells, as a Markdown table.

    python training/benchmarks/published.py --protocol cfgen --dataset pbmc3k.h5ad --output_dir outputs/cfgen
    python training/benchmarks/published.py --protocol moe-fb --dataset pbmc3k.h5ad --output_dir outputs/moe-fb

trains a pipeline on each of three random splits with the defaults; all splits have the same number of test cells of
each type. Arguments that are not listed go to `training/train.py`, and `--name` tells such a row from the others:

    python training/benchmarks/published.py --protocol cfgen --dataset pbmc3k.h5ad --output_dir outputs/cfgen \
        --name "1,000 steps" --max_train_steps 1000

`--others NAME=FOLDER` judges the cells of another model, trained on the same splits. The same command continues after
an interruption. What others have published is of other splits, so only differences from the real cells of a split say
something.

- cfgen: CFGen (ICLR 2025), by its evaluator that centers generated cells (theislab/CFGen, commit e347d1a). Genes in at
  least 30 cells, all of them generated; CD4 T cells are one type; 20% test cells, whose types and library sizes are
  given. 30 PCs of the test cells, of their 2,000 most variable genes (seurat_v3), log1p of counts per 10,000; generated
  cells are centered by the mean of the test cells. W1, W2 (exact) and the sum of biased squared MMDs with Gaussian
  kernels of sigma 0.01, 0.1, 1, 10 and 100, for each type, then the mean over types with at least two test cells,
  without megakaryocytes (platelets) and with them. The kernels of sigma up to 1 see hardly more than the number of
  cells: each adds 2/n, even for other real cells.
- moe-fb: MOE-FB (PLoS Computational Biology 2025; sevgiturgut/Comparison-Generative-Models, commit d00127a). 2,000
  genes chosen among all cells (seurat_v3), log1p of counts per 10,000 of all genes, 10% test cells; no types are given.
  50 PCs of standardized training cells. Mean over the PCs of their W1; mean absolute difference of their correlations;
  mean of the biased squared MMDs with kernels `exp(-gamma d^2)`, gamma 2, 1, 0.5, 0.1, 0.01 and 0.005.

"Real cells" are training cells, drawn at random in the number of the test cells (cfgen: of each type), mean of 20
draws. In moe-fb the PCs are fitted to them, so that they spread more along most PCs than new cells do: "held out" are
real cells that are left out when the PCs are fitted, mean of 5 draws.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import anndata as ad
import numpy as np
import ot
import pandas as pd
import scanpy as sc
import torch
from _common import Record, to_markdown
from answers import labels_of, log_normalize
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from scrdit_diffusers import SCRDiTPipeline
from scrdit_diffusers.evaluation.metrics import wasserstein2

TRAINING = Path(__file__).resolve().parents[1]
N_TOP_GENES = 2000
REAL, HELD_OUT = "real cells", "real cells, held out"
REAL_DRAWS, HELD_OUT_DRAWS = 20, 5


def variable_genes(counts: ad.AnnData) -> np.ndarray:
    """Choose the most variable genes as scanpy's seurat_v3 does, shape (G,), bool."""
    number = min(N_TOP_GENES, counts.n_vars)
    return sc.pp.highly_variable_genes(counts, flavor="seurat_v3", n_top_genes=number, inplace=False)[
        "highly_variable"
    ].to_numpy()


def biased_mmd2(x: np.ndarray, y: np.ndarray, gammas: Sequence[float]) -> np.ndarray:
    """Biased squared maximum mean discrepancy for each kernel `exp(-gamma d^2)`; pairs of a cell with itself count."""
    squared = [cdist(*pair, "sqeuclidean") for pair in ((x, x), (y, y), (x, y))]
    return np.array([np.dot([1, 1, -2], [np.exp(-gamma * d).mean() for d in squared]) for gamma in gammas])


def draw(labels: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw rows of each label without replacement, as many as are wanted, in the order of `wanted`."""
    rows = np.empty(len(wanted), dtype=int)
    for label in np.unique(wanted):
        found = wanted == label
        rows[found] = rng.choice(np.flatnonzero(labels == label), found.sum(), replace=False)
    return rows


class CFGen:
    """The protocol of CFGen.

    Parameters
    ----------
    cells
        All cells, counts.
    key
        Column of the types.
    folder
        Where to write what training needs.
    """

    MIN_CELLS = 30
    MERGED = {"Naive CD4 T": "CD4 T", "Memory CD4 T": "CD4 T"}
    RARE = "Platelet"  # megakaryocytes: too few to judge
    GAMMAS = tuple(1 / (2 * sigma**2) for sigma in (0.01, 0.1, 1, 10, 100))
    TEST_SHARE = 0.2
    BAR = {"W2": 0.12, "MMD": 0.01}  # largest difference from real cells
    METRICS = ("W1", "W2", "MMD", "W1, all types", "W2, all types", "MMD, all types")
    PUBLISHED = {
        "scVI": {"W2": 13.39, "MMD": 0.58},
        "scDiffusion": {"W2": 12.11, "MMD": 0.67},
        "CFGen": {"W2": 11.17, "MMD": 0.45},
        "CFGen, linear": {"W2": 10.27, "MMD": 0.41},
        "Global Transport": {"W2": 9.80, "MMD": 0.39},
    }

    def __init__(self, cells: ad.AnnData, key: str, folder: Path):
        expressed = np.asarray(cells.X.getnnz(axis=0)).ravel() >= self.MIN_CELLS
        self.cells, self.key = cells[:, expressed].copy(), key
        types = [self.MERGED.get(label, label) for label in labels_of(cells, key)]
        self.cells.obs[key] = pd.Categorical(types)
        self.training = ["--labels_key", key, "--flavor", "all"]

    def values(self, counts: ad.AnnData) -> np.ndarray:
        """Log1p of counts per 10,000, shape (cells, G)."""
        return log_normalize(counts.X)

    def fit(self, train: ad.AnnData, test: ad.AnnData) -> None:
        """Learn genes and PCs from the test cells."""
        self.genes = variable_genes(test)
        self.types = labels_of(test, self.key)
        values = self.values(test)[:, self.genes]
        self.pca = PCA(min(30, *values.shape), svd_solver="full").fit(values)
        self.test = self.pca.transform(values)

    def draw_real(self, train: ad.AnnData, rng: np.random.Generator) -> np.ndarray:
        """Draw values of training cells."""
        return self.values(train)[draw(labels_of(train, self.key), self.types, rng)]

    def generate(self, pipe: SCRDiTPipeline, test: ad.AnnData, seed: int) -> np.ndarray:
        """Generate values for the types and library sizes of the test cells."""
        sizes = np.asarray(test.X.sum(axis=1)).ravel().tolist()
        generator = torch.Generator().manual_seed(seed)
        cells = pipe(obs=test.obs, library_size=sizes, generator=generator).adata
        return self.values(cells[:, test.var_names])

    def judge(self, values: np.ndarray) -> dict[str, float]:
        """Compare values, whose types are those of the test cells, with them."""
        pcs = self.pca.transform(values[:, self.genes])
        found: dict[str, list[float]] = {}
        for label in np.unique(self.types):
            x, y = (cells[self.types == label] for cells in (pcs, self.test))
            if len(y) > 1:
                w1 = ot.emd2(np.empty(0), np.empty(0), cdist(x, y), numItermax=10_000_000)
                found[label] = [w1, wasserstein2(x, y), float(biased_mmd2(x, y, self.GAMMAS).sum())]
        usual = [value for label, value in found.items() if label != self.RARE]
        means = [*np.mean(usual, axis=0), *np.mean(list(found.values()), axis=0)]
        results = dict(zip(self.METRICS, map(float, means), strict=True))
        return results | {f"W2 of {label}": value[1] for label, value in found.items()}


class MoeFB:
    """The protocol of MOE-FB; parameters as for [`CFGen`]."""

    GAMMAS = (2, 1, 0.5, 0.1, 0.01, 0.005)
    TEST_SHARE = 0.1
    BAR = {"MMD": 0.018}  # largest value
    METRICS = ("W1 of PCs", "correlation difference", "MMD")
    PUBLISHED = {
        REAL: {"W1 of PCs": 0.454, "correlation difference": 0.0615, "MMD": 0.0141},
        "MAF-FB (flow)": {"correlation difference": 0.0815, "MMD": 0.0222},
        "MOE-FB (flow)": {"W1 of PCs": 0.405, "correlation difference": 0.0795, "MMD": 0.0310},
        "CTGAN": {"W1 of PCs": 0.440, "correlation difference": 0.0814, "MMD": 0.0605},
        "Gaussian copula": {"W1 of PCs": 11.7, "correlation difference": 0.111, "MMD": 0.0844},
        "ACTIVA": {"W1 of PCs": 0.918, "correlation difference": 0.325, "MMD": 0.106},
        "TVAE": {"W1 of PCs": 1.25, "correlation difference": 0.328, "MMD": 0.326},
    }

    def __init__(self, cells: ad.AnnData, key: str, folder: Path):
        self.cells, self.key = cells, key
        self.genes = cells.var_names[variable_genes(cells)]
        path = folder / "genes.txt"
        path.write_text("\n".join(self.genes) + "\n")
        self.training = ["--value_space", "log_normalized", "--target_sum", "1e4", "--genes", str(path)]

    def values(self, counts: ad.AnnData) -> np.ndarray:
        """Log1p of counts per 10,000 of all genes, shape (cells, G)."""
        return log_normalize(counts.X)[:, counts.var_names.get_indexer(self.genes)]

    def fit(self, train: ad.AnnData, test: ad.AnnData) -> None:
        """Learn scales and PCs from the training cells."""
        values = self.values(train)
        self.scaler = StandardScaler().fit(values)
        self.pca = PCA(min(50, *values.shape), random_state=42).fit(self.scaler.transform(values))
        self.test = self.project(self.values(test))

    def project(self, values: np.ndarray) -> np.ndarray:
        """PCs of standardized values."""
        return self.pca.transform(self.scaler.transform(values))

    def draw_real(self, train: ad.AnnData, rng: np.random.Generator) -> np.ndarray:
        """Draw values of training cells."""
        return self.values(train[rng.permutation(train.n_obs)[: len(self.test)]])

    def generate(self, pipe: SCRDiTPipeline, test: ad.AnnData, seed: int) -> np.ndarray:
        """Generate as many values as there are test cells, without types."""
        cells = pipe(num_cells=test.n_obs, generator=torch.Generator().manual_seed(seed)).adata
        return cells[:, self.genes].X.toarray()

    def judge_held_out(self, train: ad.AnnData, test: ad.AnnData, rng: np.random.Generator) -> dict[str, float]:
        """Compare training cells with the test cells, on PCs of the other training cells."""
        rows = rng.permutation(train.n_obs)
        without = copy(self)
        without.fit(train[rows[test.n_obs :]], test)
        return without.judge(self.values(train[rows[: test.n_obs]]))

    def judge(self, values: np.ndarray) -> dict[str, float]:
        """Compare values with the test cells."""
        x, y = self.project(values), self.test
        difference = np.abs(np.corrcoef(x.T) - np.corrcoef(y.T)).mean()
        w1 = np.mean([wasserstein_distance(*pair) for pair in zip(x.T, y.T, strict=True)])
        found = (w1, difference, biased_mmd2(x, y, self.GAMMAS).mean())
        return dict(zip(self.METRICS, map(float, found), strict=True))


PROTOCOLS = {"cfgen": CFGen, "moe-fb": MoeFB}


def load_or_train(cells: Path, seed: int, output: Path, options: Sequence[str]) -> SCRDiTPipeline:
    """Train a pipeline, or load what was trained before."""
    if not (output / "model_index.json").exists():
        again = ["--resume_from_checkpoint", "latest"] if list(output.glob("checkpoint-*")) else []
        words = ["--dataset", cells, "--seed", seed, "--output_dir", output, *options, *again]
        subprocess.run([sys.executable, str(TRAINING / "train.py"), *map(str, words)], check=True)
    pipe = SCRDiTPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Study:
    """The splits, the pipelines trained on them, and the record of results.

    Parameters
    ----------
    args
        Arguments of the command.
    options
        Those for training.

    Raises
    ------
    ValueError
        The row was trained with other options before.
    """

    def __init__(self, args: argparse.Namespace, options: Sequence[str]):
        self.args, self.folder = args, Path(args.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        given = {"protocol": args.protocol, "dataset": Path(args.dataset).name, "labels_key": args.labels_key}
        self.record = Record(self.folder / "published.json", given, options={}, results={})
        before = self.record["options"].setdefault(args.name, list(options))
        if before != list(options):
            raise ValueError(f"{args.name!r} was trained with {before}, got {list(options)}; give another --name.")
        self.protocol = PROTOCOLS[args.protocol](ad.read_h5ad(args.dataset), args.labels_key, self.folder)
        self.options = [*self.protocol.training, *options]

    def split(self, seed: int) -> dict[str, ad.AnnData]:
        """Divide the cells at random, each type alike, and write the parts, to which the seed always leads."""
        folder = self.folder / f"split-{seed}"
        folder.mkdir(exist_ok=True)
        cells, parts = self.protocol.cells, {}
        divided = train_test_split(
            np.arange(cells.n_obs),
            test_size=self.protocol.TEST_SHARE,
            random_state=seed,
            stratify=labels_of(cells, self.args.labels_key),
        )
        for part, rows in zip(("train", "test"), divided, strict=True):
            parts[part] = cells[rows].copy()
            if not (folder / f"{part}.h5ad").exists():
                parts[part].write_h5ad(folder / f"{part}.h5ad")
        return parts

    def measure(self, seed: int) -> None:
        """Judge on one split what is not in the record: real cells, ours, and those of other models."""
        others, results = self.args.others, self.record["results"]
        real = [REAL, HELD_OUT] if isinstance(self.protocol, MoeFB) else [REAL]
        missing = [n for n in (*real, *others, self.args.name) if str(seed) not in results.setdefault(n, {})]
        if not missing:
            return
        parts, folder = self.split(seed), self.folder / f"split-{seed}"
        self.protocol.fit(**parts)
        for name in missing:
            rng = np.random.default_rng(seed)
            if name == HELD_OUT:
                found = [self.protocol.judge_held_out(**parts, rng=rng) for _ in range(HELD_OUT_DRAWS)]
            elif name == REAL:
                found = [self.protocol.judge(self.protocol.draw_real(parts["train"], rng)) for _ in range(REAL_DRAWS)]
            elif name in others:
                found = list(map(self.protocol.judge, self._read_others(Path(others[name]), seed, parts["test"])))
            else:
                output = folder / f"pipeline-{name.replace(' ', '-')}"
                pipe = load_or_train(folder / "train.h5ad", seed, output, self.options)
                draws = range(self.args.num_draws)
                found = [self.protocol.judge(self.protocol.generate(pipe, parts["test"], i)) for i in draws]
            results[name][str(seed)] = pd.DataFrame(found).mean().to_dict()
            self.record.save()

    def _read_others(self, folder: Path, seed: int, test: ad.AnnData) -> list[np.ndarray]:
        """Read counts of another model, in files of one draw each, in the order of the test cells."""
        paths = sorted(folder.glob(f"split-{seed}*.h5ad"))
        if not paths:
            raise ValueError(f"--others {folder} has no split-{seed}*.h5ad.")
        return [self.protocol.values(ad.read_h5ad(path)[:, test.var_names]) for path in paths]

    def table(self) -> str:
        """Format means over the splits and their ranges, differences from real cells, and what others published."""
        metrics, results = self.protocol.METRICS, self.record["results"]
        frames = {name: pd.DataFrame(found).T[list(metrics)] for name, found in results.items() if found}
        best = HELD_OUT if HELD_OUT in frames else REAL

        def row(title: str, frame: pd.DataFrame, form: str) -> list[str]:
            cells = (f"{frame[m].mean():{form}} ({frame[m].min():{form}} to {frame[m].max():{form}})" for m in metrics)
            return [title, *cells]

        rows = [row(name, frame, ".4f") for name, frame in frames.items()]
        models = (name for name in frames if name not in (REAL, HELD_OUT))
        rows += [row(f"{name} - {best}", (frames[name] - frames[best]).dropna(), "+.4f") for name in models]
        for name, values in self.protocol.PUBLISHED.items():
            rows.append([f"{name} (published, not paired)", *(str(values.get(metric, "")) for metric in metrics)])
        what = "at most" if self.args.protocol == "moe-fb" else f"above {REAL} by at most"
        bar = "; ".join(f"{metric} {what} {value}" for metric, value in self.protocol.BAR.items())
        titles = [f"cells ({len(frames[REAL])} splits)", *metrics]
        return f"{to_markdown(titles, rows)}\n\nBar, mean of the splits: {bar}."


def main() -> None:
    """Train and judge on each split, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--protocol", required=True, choices=list(PROTOCOLS))
    parser.add_argument("--dataset", required=True, help="AnnData file of raw counts")
    parser.add_argument("--labels_key", default="cell_type")
    parser.add_argument("--name", default="ours", help="what to call the row of the pipelines trained here")
    parser.add_argument("--others", nargs="+", default=[], metavar="NAME=FOLDER", help="split-0.h5ad, ... of counts")
    parser.add_argument("--num_splits", type=int, default=3)
    parser.add_argument("--num_draws", type=int, default=5, help="sets of cells generated by each pipeline")
    parser.add_argument("--output_dir", required=True, help="folder of the splits, pipelines and results")
    args, options = parser.parse_known_args()
    args.others = dict(entry.split("=", 1) for entry in args.others)
    study = Study(args, options)
    for seed in range(args.num_splits):
        study.measure(seed)
        print(f"\nSplits up to {seed}:\n\n{study.table()}", flush=True)


if __name__ == "__main__":
    main()
