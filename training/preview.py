"""Previews during training: a figure of generated cells, and the loss of held-out cells."""

import logging
from collections.abc import Mapping
from pathlib import Path

import anndata as ad
import matplotlib
import numpy as np
import scipy.sparse as sp
import torch
from diffusers import DDPMScheduler

from scrdit_diffusers import SCRDiTPipeline, SCRDiTTransformer, diffusion_loss
from scrdit_diffusers.atomic import write_atomically
from scrdit_diffusers.evaluation import plotting

matplotlib.use("Agg")
logger = logging.getLogger("train")


def draw_samples(pipe: SCRDiTPipeline, batch: Mapping[str, torch.Tensor], seed: int, path: Path) -> None:
    """Draw gene statistics of generated and real cells with the same labels, and save the figure."""
    processor = pipe.processor
    pipe.set_progress_bar_config(disable=True)
    obs = processor.decode_labels(batch["class_labels"].cpu().numpy())
    synthetic = pipe(len(batch["values"]), obs=obs, generator=torch.Generator().manual_seed(seed)).adata
    values = sp.csr_matrix(processor.inverse_transform(batch["values"].cpu().numpy()))
    library_size = batch["library_size"].cpu().numpy() if "library_size" in batch else None
    real = ad.AnnData(processor.normalize(values, library_size), var=synthetic.var)
    try:
        figure = np.ravel(plotting.gene_statistics(real, synthetic, value_space=processor.value_space))[0].figure
    except ValueError as error:  # early in training, generated cells may be impossible to draw
        logger.warning(f"{path.name} could not be drawn: {error}")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary:
            figure.savefig(temporary, dpi=100)
    except OSError as error:  # a full disk, say: training matters more
        logger.warning(f"{path} could not be written: {error}")
    matplotlib.pyplot.close(figure)


def validation_loss(
    model: SCRDiTTransformer, noise_scheduler: DDPMScheduler, batch: Mapping[str, torch.Tensor], settings
) -> float:
    """Mean loss of cells over all trained timesteps, with the same noise at each call."""
    values = batch["values"]  # (B, G)
    first = settings.min_timestep if settings.decode == "posterior" else 0
    timesteps = torch.linspace(first, settings.num_train_timesteps - 1, len(values)).to(values.device, torch.long)
    seed = int(np.random.SeedSequence([settings.seed]).generate_state(1, np.uint64)[0]) >> 1
    generator = torch.Generator(values.device).manual_seed(seed)
    noise = torch.randn(values.shape, generator=generator, device=values.device)
    weighting = (settings.loss_weighting, settings.max_loss_weight)
    with torch.no_grad():
        return diffusion_loss(model, noise_scheduler, batch, timesteps, noise, *weighting).mean().item()
