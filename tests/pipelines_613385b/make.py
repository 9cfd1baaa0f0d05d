"""Made the pipelines beside this file, at commit 613385b: run there, from the root, with OMP_NUM_THREADS=1.

Later code must load them to the same cells, bit for bit (tests/test_published_pipelines.py): do not run it again.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from scrdit_diffusers import SCRDiTPipeline

FOLDER = Path(__file__).parent
SIZE = "--n_top_genes 30 --patch_size 8 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8".split()
# 22 steps of 4 of the 90 cells: all within the first pass over them
SIZE += "--train_batch_size 4 --lr_warmup_steps 2 --max_train_steps 22 --report_to none --learning_rate 0.01".split()
LABELS = ["--labels_key", "cell_type", "batch"]
PAPER = "--value_space log_normalized --target_sum 1e4 --decode round --zero_negation True --zero_value -10".split()
PAPER += "--standardize False --flavor cv --beta_schedule linear --prediction_type epsilon".split()
PAPER += "--loss_weighting epsilon --max_loss_weight 1e9 --lr_scheduler constant --use_ema False".split()
PAPER += "--patch_embed_type shared --num_cell_tokens 0 --adam_beta2 0.999 --adam_weight_decay 0.01".split()
RECIPES = {
    "counts": ["--dataset", "cells.h5ad", *LABELS],
    "log_normalized": ["--dataset", "log.h5ad", *LABELS, "--value_space", "log_normalized"],
    "steps": ["--dataset", "tpm.h5ad", *LABELS, "--value_space", "log_normalized"],
    "paper": ["--dataset", "cells.h5ad", *PAPER],
    "adapter": ["--dataset", "cells.h5ad", *LABELS, "--lora_rank", "2"],
}


def make_cells() -> ad.AnnData:
    """Ninety cells of 40 genes, with two conditions."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.5, 2.0, size=(2, 40))
    labels, batches = rng.choice(2, size=90), rng.choice(2, size=90)
    counts = sp.csr_matrix(rng.poisson(rates[labels] * (1 + batches[:, None])), dtype=np.float32)
    obs = {"cell_type": np.array(["T cell", "B cell"])[labels], "batch": np.array(["b1", "b2"])[batches]}
    var = pd.DataFrame({"gene_ids": [f"ENSG{i:05d}" for i in range(40)]}, index=[f"gene{i}" for i in range(40)])
    return ad.AnnData(counts, obs=pd.DataFrame(obs, index=[f"cell{i}" for i in range(90)]), var=var)


def main() -> None:
    """Make cells, pipelines, and what these generate."""
    adata = make_cells()
    adata.write_h5ad(FOLDER / "cells.h5ad")
    counts = adata.X.toarray()
    adata.X = sp.csr_matrix(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4), dtype=np.float32)
    adata.write_h5ad(FOLDER / "log.h5ad")
    lengths = np.random.default_rng(1).uniform(0.5, 5, counts.shape)
    adata.X = sp.csr_matrix(np.log2(counts / lengths + 1), dtype=np.float32)
    adata.write_h5ad(FOLDER / "tpm.h5ad")
    cells = {}
    for name, (_, dataset, *arguments) in RECIPES.items():
        command = [sys.executable, "training/train.py", "--dataset", str(FOLDER / dataset), *arguments, *SIZE]
        if name == "adapter":
            command += ["--pretrained_model_name_or_path", str(FOLDER / "counts")]
        subprocess.run([*command, "--output_dir", str(FOLDER / name)], check=True)
        for pattern in ("checkpoint-*", "samples", "README.md", "card.json", "train_config.json"):
            for path in (FOLDER / name).glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        pipe = SCRDiTPipeline.from_pretrained(FOLDER / ("counts" if name == "adapter" else name))
        if name == "adapter":
            pipe.load_lora_weights(str(FOLDER / name))
        for scheduler in (type(pipe.scheduler), DDIMScheduler, DDPMScheduler):
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
            options = dict(num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np")
            cells[f"{name}/{scheduler.__name__}"] = pipe(40, batch_size=16, **options).samples
        if pipe.processor.condition_keys:
            options = dict(num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="latent")
            options |= dict(conditions={"cell_type": "B cell"}, guidance_scale=2.0)
            cells[f"{name}/guided"] = pipe(40, **options).samples.numpy()
    np.savez_compressed(FOLDER / "cells.npz", **cells)
    made_with = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    (FOLDER / "made_with.json").write_text(json.dumps(made_with) + "\n")


if __name__ == "__main__":
    main()
