"""What training minimises: the weighted error of the denoiser, or the likelihood of the counts."""

from collections.abc import Callable, Mapping

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from .transformer_scrdit import SCRDiTTransformerOutput

FREE_FOLD_CHANGE = 1.8  # over sqrt(number of cells): beyond it a gene's log fold changes are hardly shrunk any more
SHAPE_PRIOR = 4  # standard deviation of what is learned of the shapes of distributions, over that of log fold changes


def loss_weights(
    snr: torch.Tensor, prediction_type: str, loss_weighting: str = "v", max_loss_weight: float = 25.0
) -> torch.Tensor:
    """Weigh the squared error of a prediction by the signal-to-noise ratio of its timestep.

    A weighting is defined by the weight w of the error of the clean cell: "sample" 1, "epsilon" SNR, "v" SNR + 1, each
    at most `max_loss_weight` ("epsilon" with 5 is min-SNR). As errors of the noise are sqrt(SNR) times those of the
    clean cell, and errors of v sqrt(SNR + 1) times, w is divided by the square where the network predicts these.

    Parameters
    ----------
    snr
        Signal-to-noise ratios alpha_bar / (1 - alpha_bar), shape (B,).
    prediction_type
        What the network predicts: "epsilon", "v_prediction" or "sample".
    loss_weighting
        "sample", "epsilon" or "v".
    max_loss_weight
        Largest w.

    Returns
    -------
    Weights, shape (B,).

    References
    ----------
    Salimans and Ho 2022, arXiv 2202.00512, section 4; min-SNR: Hang et al. 2023, arXiv 2303.09556.
    """
    weight = {"sample": torch.ones_like(snr), "epsilon": snr, "v": snr + 1}[loss_weighting].clamp(max=max_loss_weight)
    return weight / {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}[prediction_type]


def drop_labels(
    class_labels: torch.Tensor, null_labels: torch.Tensor, probability: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Replace labels by the null code, so that the model also learns cells without labels (classifier-free guidance).

    All labels of a cell are dropped with `probability`; with several conditions each one is also dropped on its own
    with `probability`, so that any subset of them may be left out.

    Parameters
    ----------
    class_labels
        Codes, shape (B, K).
    null_labels
        Null code of each condition, shape (K,).
    probability
        Probability of dropping.
    generator
        Draws which.

    Returns
    -------
    Codes, shape (B, K).

    References
    ----------
    Ho and Salimans 2022, arXiv 2207.12598.
    """
    shape = (class_labels.shape[0], class_labels.shape[1] + 1)
    drop = torch.rand(shape, generator=generator, device=class_labels.device) < probability  # (B, K + 1)
    dropped = drop[:, :1] | drop[:, 1:] if class_labels.shape[1] > 1 else drop[:, :1]  # (B, K) or (B, 1)
    return torch.where(dropped, null_labels, class_labels)


def negative_log_prior(
    output: SCRDiTTransformerOutput, num_cells: int, width: int, prior_std: float = 0.16
) -> torch.Tensor:
    """Negative log-prior of the weights behind fold changes and shapes, for each cell and gene, shape ().

    Without it a network learns rare genes of single cells by heart: Adam gives weights with small gradients steps as
    large as the others. It is width c log(1 + f^2 / c) / (2 s^2) for a gene with squared log fold changes f^2: for
    most genes that of a normal distribution of standard deviation s / sqrt(width) of each weight, with the tails of
    Student's t for the few whose fold changes are large, those of sex or stress. What N cells say by chance goes with
    1 / sqrt(N), and so does sqrt(c), where the tails begin.

    Parameters
    ----------
    output
        Of a model with a count head in training mode, given counts.
    num_cells
        Number of training cells N.
    width
        Width of a token.
    prior_std
        s.

    References
    ----------
    `training/LOG.md`, "a prior with heavy tails".
    """
    assert output.squared_fold_changes is not None and output.squared_shape_changes is not None
    free = FREE_FOLD_CHANGE**2 / num_cells
    fold_changes = width * free * (output.squared_fold_changes / free).log1p().sum()
    shapes = output.squared_shape_changes / SHAPE_PRIOR**2
    return (fold_changes + shapes) / (2 * prior_std**2 * num_cells * len(output.squared_fold_changes))


def diffusion_loss(
    model: torch.nn.Module,
    noise_scheduler: DDPMScheduler,
    batch: Mapping[str, torch.Tensor],
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    loss_weighting: str = "v",
    max_loss_weight: float = 25.0,
    prior: Callable[[SCRDiTTransformerOutput], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Noise cells, denoise them once, and compare.

    Without a count head the loss is w(t) |prediction - target|^2 / G, with one it is -log p(counts | noisy cell) / G
    plus the prior.

    Parameters
    ----------
    model
        [`SCRDiTTransformer`], possibly wrapped.
    noise_scheduler
        Gives the noise process and the prediction type.
    batch
        `values` (B, G) in model space, `class_labels` (B, K), and for a model with a count head `counts` (B, G) and
        `library_size` (B,) where that is not their sum.
    timesteps
        Timesteps, shape (B,).
    noise
        Standard normal noise, shape (B, G).
    loss_weighting
        See [`loss_weights`].
    max_loss_weight
        See [`loss_weights`].
    prior
        [`negative_log_prior`] with its arguments. Only for a model with a count head in training mode.

    Returns
    -------
    Loss of each cell, shape (B,).
    """
    values = batch["values"]  # (B, G)
    noisy = noise_scheduler.add_noise(values, noise, timesteps)  # (B, G)
    if "counts" in batch:
        counts = batch["counts"]  # (B, G)
        library_size = batch["library_size"] if "library_size" in batch else counts.sum(dim=1)  # (B,)
        output = model(noisy, timesteps, batch["class_labels"], library_size, counts)
        return output.count_nll + (prior(output) if prior else 0.0)  # (B,)
    prediction = model(noisy, timesteps, batch["class_labels"], return_dict=False)[0]  # (B, G)
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise  # (B, G)
    elif prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(values, noise, timesteps)  # (B, G)
    else:
        target = values  # (B, G)
    snr = compute_snr(noise_scheduler, timesteps).clamp(min=1e-8)  # (B,)
    weight = loss_weights(snr, prediction_type, loss_weighting, max_loss_weight)  # (B,)
    return weight * (prediction.float() - target).square().mean(dim=1)  # (B,)
