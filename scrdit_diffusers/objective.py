"""What training minimizes: the weighted error of the denoiser, or the negative log-likelihood of the counts."""

from collections.abc import Callable, Mapping

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from .transformer_scrdit import SCRDiTTransformer

FREE_FOLD_CHANGE = 1.8  # over sqrt(number of cells): log fold changes of a gene beyond it are hardly shrunk
FREE_LABEL_CHANGE = 0.42  # log fold changes of a label beyond it are hardly shrunk where labels have their own prior
SHAPE_PRIOR = 4  # prior standard deviation of shapes of distributions over that of log fold changes


def loss_weights(
    snr: torch.Tensor, prediction_type: str, loss_weighting: str = "v", max_loss_weight: float = 25.0
) -> torch.Tensor:
    """Weigh the squared error of a prediction by the signal-to-noise ratio of its timestep.

    The weight w of the squared error of the clean cell is 1 for "x0", SNR for "epsilon" and SNR + 1 for "v", each at
    most `max_loss_weight` ("epsilon" with 5 is min-SNR). If the network predicts the noise, whose error is sqrt(SNR)
    times that of the clean cell, w is divided by SNR; if it predicts v, by SNR + 1.

    Parameters
    ----------
    snr
        Signal-to-noise ratios alpha_bar / (1 - alpha_bar), shape (B,).
    prediction_type
        What the network predicts: "epsilon", "v_prediction" or "sample".
    loss_weighting
        "x0", "epsilon" or "v".
    max_loss_weight
        Largest w.

    Returns
    -------
    Weights, shape (B,).

    References
    ----------
    Salimans and Ho 2022, arXiv 2202.00512, section 4; min-SNR: Hang et al. 2023, arXiv 2303.09556.
    """
    weight = {"x0": torch.ones_like(snr), "epsilon": snr, "v": snr + 1}[loss_weighting].clamp(max=max_loss_weight)
    return weight / {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}[prediction_type]


def drop_labels(
    class_labels: torch.Tensor, null_labels: torch.Tensor, probability: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Replace labels by the null code, so that the model also learns without labels (classifier-free guidance).

    All labels of a cell are dropped together with `probability`. With several conditions, each is also dropped alone
    with `probability`, so that any subset may be missing.

    Parameters
    ----------
    class_labels
        Codes, shape (B, K).
    null_labels
        Null code of each condition, shape (K,).
    probability
        Probability of dropping.
    generator
        Source of randomness; `None` takes PyTorch's global one.

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
    squared_fold_changes: torch.Tensor,
    squared_shape_changes: torch.Tensor,
    num_cells: int,
    width: int,
    prior_std: float = 0.16,
) -> torch.Tensor:
    """Negative log-density of [`FoldChangePrior`], divided by the numbers of cells and genes, shape ().

    Parameters
    ----------
    squared_fold_changes
        f^2 of each gene, shape (G,).
    squared_shape_changes
        Sum of the squares of dispersions by label and base measures, shape ().
    num_cells
        Number of training cells N.
    width
        Width of a token D.
    prior_std
        s.
    """
    tail_start = FREE_FOLD_CHANGE**2 / num_cells  # c
    fold_changes = width * tail_start * (squared_fold_changes / tail_start).log1p().sum()
    shapes = squared_shape_changes / SHAPE_PRIOR**2
    return (fold_changes + shapes) / (2 * prior_std**2 * num_cells * len(squared_fold_changes))


def negative_log_label_prior(
    squared_label_changes: torch.Tensor, num_cells: int, prior_std: float = 0.16
) -> torch.Tensor:
    """Negative log-density of what labels have of their own in [`FoldChangePrior`], divided as there, shape ().

    Parameters
    ----------
    squared_label_changes
        m^2 of each label and gene, shape (labels, G).
    num_cells, prior_std
        As in [`negative_log_prior`].
    """
    tails = FREE_LABEL_CHANGE**2 * (squared_label_changes / FREE_LABEL_CHANGE**2).log1p().sum()
    return tails / (2 * prior_std**2 * num_cells * squared_label_changes.shape[1])


class FoldChangePrior:
    """Negative log-prior of the weights behind fold changes and shapes of distributions.

    Without it, the network memorizes rare genes of single cells, because Adam takes equally large steps for weights
    with small gradients. With

        f_g^2 = sum_d W_gd^2 + sum_l m_gl^2 / D

    of the last projections W and the log means m of the labels, the penalty of gene g is

        D c log(1 + f_g^2 / c) / (2 s^2)

    For small f this is a Gaussian prior N(0, s^2 / D) on each weight. For large f it grows like log f (Student's t), so
    that real marker genes, such as those of sex or stress, are not shrunk. The tails begin at sqrt(c), which shrinks
    like 1 / sqrt(N), as chance effects in N cells do. Dispersions by label and base measures have a Gaussian prior.

    In few cells this leaves nothing of the labels, which differ as much there as in many. They may therefore have a
    prior of their own: m has a scale of s and tails that begin at `FREE_LABEL_CHANGE`, and f^2 is that of W alone.

    Parameters
    ----------
    model
        A transformer with a count head, not wrapped. Its weights are read at each call.
    num_cells
        Number of training cells N.
    prior_std
        s.
    around_present_weights
        Center the prior on the present weights, for fine-tuning, instead of on zero.
    own_label_prior
        Whether labels have a prior of their own.

    References
    ----------
    `training/LOG.md`, "a prior with heavy tails" and "labels of few cells".
    """

    def __init__(
        self,
        model: SCRDiTTransformer,
        num_cells: int,
        prior_std: float = 0.16,
        around_present_weights: bool = False,
        own_label_prior: bool = False,
    ):
        self.model, self.num_cells, self.prior_std = model, num_cells, prior_std
        self.own_label_prior = own_label_prior
        self.means = {}
        if around_present_weights:
            self.means = {name: weight.detach().clone() for name, weight in self._weights().items()}

    def __call__(self) -> torch.Tensor:
        """Negative log-prior, divided by the numbers of cells and genes, shape ()."""
        penalty = negative_log_prior(*self.squared_changes(), self.num_cells, self._width(), self.prior_std)
        if self.own_label_prior:
            penalty = penalty + negative_log_label_prior(self._squares("labels"), self.num_cells, self.prior_std)
        return penalty

    def squared_changes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """f^2 of each gene, shape (G,), and the summed squares of dispersions by label and base measures, shape ()."""
        config = self.model.config
        fold_changes = self._squares("patches").sum(dim=1).flatten()  # (N * P,), or (P,) if shared
        if config.patch_embed_type == "shared":
            fold_changes = fold_changes.repeat(self.model.num_patches)  # (N * P,)
        fold_changes = fold_changes[: config.num_genes]  # (G,)
        if config.num_cell_tokens:
            fold_changes = fold_changes + self._squares("cell").sum(dim=1)  # (G,)
        if not self.own_label_prior:
            # Divided by D, so that a label's log fold change itself has the prior's standard deviation s.
            fold_changes = fold_changes + self._squares("labels").sum(dim=0) / self._width()  # (G,)
        return fold_changes, self._squares("dispersions").sum() + self._squares("bases").sum()

    def _squares(self, name: str) -> torch.Tensor:
        """Squared distances of weights from where the prior is centered."""
        weight, mean = self._weights()[name], self.means.get(name)
        return (weight if mean is None else weight - mean.to(weight.device)).float().square()

    def _width(self) -> int:
        return self.model.config.num_attention_heads * self.model.config.attention_head_dim

    def _weights(self) -> dict[str, torch.nn.Parameter]:
        model, head = self.model, self.model.count_head
        assert head is not None
        weights = {
            "patches": model.proj_out.get_parameter("weight"),
            "labels": head.class_log_mean,
            "dispersions": head.class_log_dispersion,
            "bases": head.log_base,
        }
        if model.config.num_cell_tokens:
            weights["cell"] = model.cell_out.get_parameter("weight")
        return weights


def diffusion_loss(
    model: torch.nn.Module,
    noise_scheduler: DDPMScheduler,
    batch: Mapping[str, torch.Tensor],
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    loss_weighting: str = "v",
    max_loss_weight: float = 25.0,
    prior: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Add noise to cells, denoise them once, and compute the loss.

    Without a count head the loss is `w(t) |prediction - target|^2 / G`; with one it is
    `-log p(counts | noisy cell) / G` plus the prior.

    Parameters
    ----------
    model
        [`SCRDiTTransformer`], possibly wrapped.
    noise_scheduler
        Gives the noise process and the prediction type.
    batch
        `values` (B, G) in model space, `class_labels` (B, K), and for a count head `counts` (B, G) and, if not their
        sum, `library_size` (B,).
    timesteps
        Timesteps, shape (B,).
    noise
        Standard normal noise, shape (B, G).
    loss_weighting
        See [`loss_weights`].
    max_loss_weight
        See [`loss_weights`].
    prior
        [`FoldChangePrior`], for a model with a count head.

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
        return output.count_nll + (prior() if prior else 0.0)  # (B,)
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
