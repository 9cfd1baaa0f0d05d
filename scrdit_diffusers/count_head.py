"""The likelihood of the counts: what a gene's count may be, given the noisy cell.

Noise is independent for each gene. By Bayes' rule the count k of a gene, given the whole noisy cell x_t, follows

    p(k | x_t)  ~  NB(k; mu, theta) exp(b(k))  *  N(x_t,gene; sqrt(alpha_bar) v(k), 1 - alpha_bar)

with v(k) the count in model space. The second factor is known exactly; the first, what the rest of the cell, its labels
and its library size say about the gene, is all that has to be learned: mu by the network, theta and b of each gene.
By b a gene may be silent in some cells and busy in others (*XIST*), which no negative binomial describes. From the
posterior follow the denoised cell E[v(k) | x_t], which every scheduler uses, and the counts themselves. It is the
discrete decoder of Ho et al. 2020 (arXiv 2006.11239, section 3.3) for counts, at any timestep.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from .cell_statistics import CellStatistics
from .processing_scrdit import MAX_COUNT

EXACT_COUNTS = 12  # counts up to here have a bin of their own, larger ones share bins that grow by BIN_RATIO
BIN_RATIO = 1.12
MAX_OVERSHOOT = 1.3  # how far beyond the largest training count of a gene new counts may go
LABEL_TABLES = ("class_log_mean", "class_log_dispersion")  # parameters with a row for each label
GROUP_BINS = (4, 6, 9, 13, 20, 32, 48)  # genes with similar numbers of bins are computed together

Method = TypeVar("Method", bound=Callable[..., Any])


def _inside_forward(method: Method) -> Method:
    """Run a method of the head inside its `forward`: the hooks that bring offloaded weights back wrap only that."""

    @functools.wraps(method)
    def call(self: nn.Module, *args, **kwargs):
        return self(method, *args, **kwargs)

    return call  # type: ignore[return-value]


def _bin_edges(largest: float) -> np.ndarray:
    """Lower edges of the bins of counts: 0, 1, 2, ..., then in growing steps up to beyond `largest`."""
    edges = list(range(EXACT_COUNTS + 1))
    while edges[-1] <= largest:
        edges.append(max(edges[-1] + 1, round(edges[-1] * BIN_RATIO)))
    return np.array(edges)


def _bins_of_genes(count_max: np.ndarray) -> np.ndarray:
    """Count the bins of each gene (G,) for its largest training count (G,)."""
    largest = np.minimum(np.floor(MAX_OVERSHOOT * count_max.astype(np.float64)) + 1, MAX_COUNT)
    return np.searchsorted(_bin_edges(largest.max()), largest, side="right")


def count_bins(counts: sp.csr_matrix | CellStatistics, at_least: np.ndarray | None = None) -> list[list[int]]:
    """Group genes by the number of bins that their counts need, for the config of [`SCRDiTTransformer`].

    Parameters
    ----------
    counts
        Counts of the training cells, shape (cells, G), or their statistics.
    at_least
        Number of bins that a gene has in any case, shape (G,), as in a pretrained head.

    Returns
    -------
    Pairs of a number of genes and of bins; the genes of all groups are the G genes, those with few bins first.
    """
    count_max = counts.count_max if isinstance(counts, CellStatistics) else counts.max(axis=0).toarray().ravel()
    bins = np.sort(np.maximum(_bins_of_genes(count_max), 0 if at_least is None else at_least))
    groups = np.split(bins, np.unique(np.searchsorted(bins, GROUP_BINS, side="right")))
    return [[len(group), int(group.max())] for group in groups if len(group)]


class SCRDiTCountHead(nn.Module):
    r"""Posterior of the counts of G genes given the noisy cell.

    Large counts share bins, inside which they are uniform. The logit of a count k is
    log p(k | x_t) = log(mu / (mu + theta)) k + x_t sqrt(ab) / (1 - ab) v(k) - ab / (1 - ab) v(k)^2 / 2 + log h(k) + c,
    h(k) = exp(b(k)) Gamma(k + theta) / (Gamma(theta) k!).

    b is a table of genes and bins, theta depends on the gene and the labels. With several conditions log theta is a sum
    over them, and so are the part of log h(k) that differs from that of no labels and what labels alone add to log mu.

    Parameters
    ----------
    bins
        Pairs (number of genes, bins per gene), from [`count_bins`].
    num_classes
        Number of categories of each condition.
    num_train_timesteps
        Number of diffusion timesteps T.
    beta_schedule
        Noise schedule; see [`~diffusers.DDPMScheduler`].
    """

    alphas_cumprod: torch.Tensor
    gene_order: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    value: torch.Tensor
    log_library_size: torch.Tensor

    def __init__(self, bins: list[list[int]], num_classes: list[int], num_train_timesteps: int, beta_schedule: str):
        super().__init__()
        self.groups: list[tuple[slice, slice, tuple[int, int]]] = []  # genes, their bins, and the shape (genes, bins)
        num_genes = num_bins = 0
        for genes, bins_per_gene in bins:
            bins_of_group = slice(num_bins, num_bins + genes * bins_per_gene)
            self.groups.append((slice(num_genes, num_genes + genes), bins_of_group, (genes, bins_per_gene)))
            num_genes, num_bins = num_genes + genes, bins_of_group.stop

        scheduler = DDPMScheduler(num_train_timesteps=num_train_timesteps, beta_schedule=beta_schedule)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.float())  # (T,)
        self.register_buffer("gene_order", torch.arange(num_genes))  # the genes, group by group, (G,)
        # All bins, group by group: counts from lower to upper - 1, and their place in model space.
        lower = torch.cat([torch.arange(n).repeat(genes) for genes, n in bins]).float()
        self.register_buffer("lower", lower)
        self.register_buffer("upper", lower + 1)
        self.register_buffer("value", lower.log1p())
        self.register_buffer("log_library_size", torch.tensor([0.0, 1.0]))  # mean and standard deviation
        self.log_mean = nn.Parameter(torch.zeros(num_genes))  # of a cell of typical library size
        self.log_dispersion = nn.Parameter(torch.zeros(num_genes))  # log theta
        # What each label of each condition, one after the other, adds to the log mean and to log theta.
        self.num_classes = list(num_classes)
        self.class_log_mean = nn.Parameter(torch.zeros(sum(num_classes), num_genes))
        self.class_log_dispersion = nn.Parameter(torch.zeros(sum(num_classes), num_genes))
        # b of each gene, in the order of the model, and bin: what its distribution has that is not negative binomial.
        self.log_base = nn.Parameter(torch.zeros(num_genes, max(bins_per_gene for _, bins_per_gene in bins)))

    def initialize(self, counts: sp.csr_matrix, class_labels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
        """Set the bins, and the means and dispersions from which training starts, from the training cells.

        Dispersions are moment estimates around means that are proportional to the library size within each combination
        of labels. Training alone moves them too slowly. Labels start equal, and distributions as negative binomials.

        Parameters
        ----------
        counts
            Counts, shape (cells, G).
        class_labels
            Codes, shape (cells, K).
        mean
            Mean of each gene before standardisation, shape (G,), of the processor.
        std
            Standard deviation of each gene before standardisation, shape (G,), of the processor.

        Raises
        ------
        ValueError
            The head's bins are not those of `counts`.
        """
        self.initialize_from_statistics(CellStatistics.from_counts(counts, class_labels), mean, std)

    def initialize_from_statistics(
        self, statistics: CellStatistics, mean: np.ndarray, std: np.ndarray, at_least: np.ndarray | None = None
    ) -> None:
        """[`initialize`] from what [`SCRDiTProcessor.from_chunks`] has gathered of the training cells.

        `at_least` is as in [`count_bins`].
        """
        bins = np.maximum(_bins_of_genes(statistics.count_max), 0 if at_least is None else at_least)
        needed = count_bins(statistics, at_least)
        if needed != [list(shape) for *_, shape in self.groups]:
            raise ValueError(f"This head was made for other counts; make it with count_bins={needed}.")
        order = np.argsort(bins, kind="stable")
        edges = _bin_edges(MAX_COUNT)
        parts = []
        for genes_of_group, _, (num_genes, num_bins) in self.groups:
            inside = np.arange(num_bins) < bins[order[genes_of_group], None]  # (genes, bins)
            lower = np.tile(edges[:num_bins], num_genes)
            upper = np.where(inside, edges[1 : num_bins + 1], edges[:num_bins]).ravel()  # a padding bin is empty
            parts.append((lower, upper, np.repeat(order[genes_of_group], num_bins)))
        lower, upper, genes = (np.concatenate(part) for part in zip(*parts, strict=True))
        value = (np.log1p(_midpoint(lower, upper)) - mean[genes]) / std[genes]

        mean_log_size, std_log_size = statistics.log_library_size()
        typical = statistics.mean_profile() * np.exp(mean_log_size)
        state = self.state_dict() | {
            "lower": lower,
            "upper": upper,
            "value": value,
            "gene_order": order,
            "log_library_size": [mean_log_size, max(std_log_size, 1e-3)],
            "log_mean": np.log(np.maximum(typical, 1e-4)),
            "log_dispersion": np.log(statistics.inverse_dispersion()),
            "class_log_mean": np.zeros(self.class_log_mean.shape),
            "class_log_dispersion": np.zeros(self.class_log_dispersion.shape),
            "log_base": np.zeros(self.log_base.shape),
        }
        self.load_state_dict({name: torch.as_tensor(array) for name, array in state.items()})

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "SCRDiTCountHead":
        """Move to a device but never to another dtype: bfloat16 holds no counts above 256."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, method: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:
        """Run one of the methods below; call these instead."""
        return method(self, *args, **kwargs)

    @_inside_forward
    def standardize_library_size(self, library_size: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Log library size in standard deviations of the training cells', shape (B,); zero where it is not given."""
        if library_size is None:
            return like.new_zeros(like.shape[0], dtype=torch.float32)
        mean, std = self.log_library_size.float()
        return (library_size.to(like.device).float().clamp(min=1).log() - mean) / std

    @_inside_forward
    def predict_log_mean(
        self, shift: torch.Tensor, standardized_library_size: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        """Log of the mean of each gene's count that the rest of the cell predicts, shape (B, G).

        What labels say is a sum over conditions, so that a combination that was never seen gets the sum of its parts.

        Parameters
        ----------
        shift
            The network's part, shape (B, G): zero gives every cell its labels' profile times its library size.
        standardized_library_size
            Shape (B,).
        class_labels
            Codes, shape (B, K).
        """
        log_size = standardized_library_size * self.log_library_size[1].float()  # (B,), relative to a typical cell
        of_labels = _with_no_label(self.class_log_mean)[self._rows(class_labels)].sum(dim=1)  # (B, G)
        return self.log_mean.float() + log_size[:, None] + of_labels + shift.float()

    def _rows(self, class_labels: torch.Tensor) -> torch.Tensor:
        """Rows of the labels (B, K) in a table of all labels; of no label it is the row after the last."""
        ends = np.cumsum([0, *self.num_classes])
        rows = [
            torch.where(codes < n, codes + int(start), int(ends[-1]))
            for codes, n, start in zip(class_labels.unbind(dim=1), self.num_classes, ends, strict=False)
        ]
        return torch.stack(rows, dim=1) if rows else class_labels

    def alpha_bar(self, timestep: torch.Tensor) -> torch.Tensor:
        """Cumulative product of alphas at timesteps (B,), linear between the integers."""
        alphas_cumprod = self.alphas_cumprod.float()
        timestep = timestep.float().clamp(0, len(alphas_cumprod) - 1)
        below = timestep.floor().long()
        above = timestep.ceil().long()
        return torch.lerp(alphas_cumprod[below], alphas_cumprod[above], timestep - below).clamp(1e-8, 1 - 1e-5)

    def _logits(
        self, log_mean: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> list[torch.Tensor]:
        """Unnormalised log posterior of the bins, of shape (genes, bins, B) for each group of genes.

        Cells come last: a softmax over few neighbouring numbers is slow.
        """
        alpha_bar = self.alpha_bar(timestep)[:, None]  # (B, 1)
        rows = self._rows(class_labels)  # (B, K)
        of_label = _with_no_label(self.class_log_dispersion)  # (labels + 1, G)
        log_dispersion = self.log_dispersion.float() + of_label[rows].sum(dim=1)  # (B, G)
        log_odds = log_mean - torch.logaddexp(log_mean, log_dispersion)  # (B, G)
        linear = noisy.float() * alpha_bar.sqrt() / (1 - alpha_bar)  # (B, G)
        quadratic = (-alpha_bar / (1 - alpha_bar) / 2).T  # (1, B)
        log_odds, linear = (of_gene.T[self.gene_order, None] for of_gene in (log_odds, linear))  # (G, 1, B)
        dispersion = (self.log_dispersion.float() + of_label).exp().T[self.gene_order, None]  # (G, 1, labels + 1)
        of_gene = self.log_base.float()[self.gene_order]  # (G, largest number of bins)
        logits = []
        for (genes, _, (_, num_bins)), (lower, upper, value) in zip(self.groups, self._bins(), strict=True):
            count, value = _midpoint(lower, upper)[..., None], value[..., None]  # (genes, bins, 1)
            log_base = _log_base(count, dispersion[genes])  # (genes, bins, labels + 1)
            inside = (upper - lower).clamp(min=1).log().masked_fill(upper == lower, -1e9)  # (genes, bins)
            # Each of K labels changes what holds without a label.
            common = (1 - rows.shape[1]) * log_base[..., -1] + of_gene[genes, :num_bins] + inside  # (genes, bins)
            # Not as a matmul, which TF32 and autocast would round: logits of hundreds have to be right to 0.01.
            logit = torch.addcmul(common[..., None], log_odds[genes], count)  # (genes, bins, B)
            for row in rows.unbind(dim=1):
                logit = logit + log_base[..., row]
            logits.append(torch.addcmul(logit, torch.addcmul(linear[genes], quadratic, value), value))
        return logits

    def bins_of_genes(self) -> np.ndarray:
        """Count the bins of each gene, shape (G,)."""
        in_use = torch.cat([(upper > lower).sum(dim=1) for lower, upper, _ in self._bins()])  # group by group
        return self._unsort(in_use[:, None])[0].cpu().numpy()

    def _bins(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Lower and upper ends and values of the bins, of shape (genes, bins) for each group of genes."""
        buffers = (self.lower.float(), self.upper.float(), self.value.float())
        lower, upper, value = ([buffer[bins].view(shape) for _, bins, shape in self.groups] for buffer in buffers)
        return list(zip(lower, upper, value, strict=True))

    @_inside_forward
    def denoise(
        self, log_mean: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        """Posterior mean of the clean cell in model space.

        Parameters
        ----------
        log_mean
            Output of `predict_log_mean`, shape (B, G).
        noisy
            Noisy cells in model space, shape (B, G).
        timestep
            Shape (B,); need not be integers.
        class_labels
            Codes, shape (B, K).

        Returns
        -------
        Shape (B, G).
        """
        logits = self._logits(log_mean, noisy, timestep, class_labels)
        with torch.autocast(noisy.device.type, enabled=False):
            means = [
                torch.bmm(posterior.softmax(dim=1).transpose(1, 2), value[..., None])[..., 0]  # (genes, B)
                for posterior, (_, _, value) in zip(logits, self._bins(), strict=True)
            ]
        return self._unsort(torch.cat(means))

    @_inside_forward
    def nll(
        self,
        counts: torch.Tensor,
        log_mean: torch.Tensor,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
    ) -> torch.Tensor:
        """Negative log-likelihood of counts (B, G), averaged over genes, shape (B,); the rest as in `denoise`.

        A count beyond a gene's last bin is taken as in it.
        """
        counts = counts[:, self.gene_order].T.float().contiguous()  # (G, B)
        total = counts.new_zeros(counts.shape[1])
        logits = self._logits(log_mean, noisy, timestep, class_labels)
        for (genes, _, _), posterior, (lower, upper, _) in zip(self.groups, logits, self._bins(), strict=True):
            last = (upper > lower).sum(dim=1, keepdim=True) - 1  # (genes, 1)
            target = torch.searchsorted(upper.contiguous(), counts[genes], right=True).minimum(last)  # (genes, B)
            nll = F.cross_entropy(posterior, target, reduction="none")  # (genes, B)
            total = total + (nll + (upper - lower).gather(1, target).log()).sum(dim=0)
        return total / counts.shape[0]

    @_inside_forward
    def sample(
        self,
        log_mean: torch.Tensor,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """Draw counts (B, G) from the posterior by inverting its distribution function.

        Parameters
        ----------
        log_mean, noisy, timestep, class_labels
            As in `denoise`.
        uniform
            Uniform random numbers in [0, 1), shape (B, G).
        """
        uniform = uniform[:, self.gene_order].T[:, None]  # (G, 1, B)
        drawn = []
        logits = self._logits(log_mean, noisy, timestep, class_labels)
        for (genes, _, _), posterior, (lower, upper, _) in zip(self.groups, logits, self._bins(), strict=True):
            probability = posterior.softmax(dim=1)  # (genes, bins, B)
            cumulative = probability.cumsum(dim=1)
            quantile = uniform[genes] * cumulative[:, -1:]  # (genes, 1, B)
            last = (upper > lower).sum(dim=1)[:, None, None] - 1
            chosen = (cumulative <= quantile).sum(dim=1, keepdim=True).minimum(last)  # (genes, 1, B)
            below = cumulative.gather(1, chosen) - probability.gather(1, chosen)
            inside = (quantile - below) / probability.gather(1, chosen).clamp(min=1e-30)  # where in the bin, 0 to 1
            low, high = (ends[..., None].expand_as(probability).gather(1, chosen) for ends in (lower, upper))
            drawn.append((low + (inside * (high - low)).floor()).clamp(low, high - 1)[:, 0])
        return self._unsort(torch.cat(drawn))

    def _unsort(self, values: torch.Tensor) -> torch.Tensor:
        """Bring values (G, B) from the order of the groups to (B, G) in that of the model."""
        return torch.empty_like(values).index_copy(0, self.gene_order, values).T


def _with_no_label(table: torch.Tensor) -> torch.Tensor:
    """Append the row of no label, which is zero, to a table (labels, G)."""
    return F.pad(table.float(), (0, 0, 0, 1))


def _log_base(count: torch.Tensor, dispersion: torch.Tensor) -> torch.Tensor:
    """Log of h(k) of the negative binomial, without b."""
    return torch.lgamma(count + dispersion) - torch.lgamma(dispersion) - torch.lgamma(count + 1)


def _midpoint(lower, upper):
    """Mean of the counts in bins; of an empty bin its lower end."""
    return (lower + (upper - 1).clip(lower)) / 2
