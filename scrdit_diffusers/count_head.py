"""The likelihood of each gene's count, given the noisy cell.

Noise is independent for each gene. By Bayes' rule the count k of a gene, given the whole noisy cell x_t, follows

    p(k | x_t)  ~  NB(k; mu, theta) exp(b(k))  *  N(x_t,gene; sqrt(alpha_bar) v(k), 1 - alpha_bar)

with v(k) the count in model space. The second factor is known exactly. The first, what the rest of the cell, its labels
and its library size say about the gene, is all that must be learned: mu by the network, theta and b per gene. b lets a
gene be silent in some cells and busy in others (*XIST*), which no negative binomial describes. The posterior gives the
denoised cell E[v(k) | x_t], which every scheduler uses, and the counts themselves. It is the discrete decoder of Ho et
al. 2020 (arXiv 2006.11239, section 3.3) for counts, at any timestep.
"""

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

CACHED_BINS = 2**18  # bins of all cells that are computed at a time on a CPU: as many as its cache holds
LABEL_TABLES = ("class_log_mean", "class_log_dispersion")  # parameters with a row for each label


class GeneGroup(NamedTuple):
    """Genes with similar numbers of bins, computed together.

    Parameters
    ----------
    genes
        Their slice of the sorted genes.
    lower, upper
        Each bin holds the counts from `lower` to `upper` - 1, shape (genes, bins). A padding bin is empty.
    value
        Place of each bin in model space, shape (genes, bins).
    common
        Part of the log posterior that all cells share, shape (genes, bins).
    log_base
        Log of h(k) under each of the K labels of the B cells, K times (genes, bins, B).
    """

    genes: slice
    lower: torch.Tensor
    upper: torch.Tensor
    value: torch.Tensor
    common: torch.Tensor
    log_base: list[torch.Tensor]

    def split(self, num_genes: int) -> "list[GeneGroup]":
        """Split into groups of at most `num_genes` genes."""
        shared = (tensor.split(num_genes) for tensor in (self.lower, self.upper, self.value, self.common))
        by_cell = [table.split(num_genes) for table in self.log_base]
        pieces, start = [], self.genes.start
        for i, (lower, upper, value, common) in enumerate(zip(*shared, strict=True)):
            genes = slice(start, start + len(lower))
            pieces.append(GeneGroup(genes, lower, upper, value, common, [table[i] for table in by_cell]))
            start = genes.stop
        return pieces

    # Not properties, which torch.compile cannot trace in a NamedTuple before PyTorch 2.9.
    def mean_count(self) -> torch.Tensor:
        """Mean count of each bin, shape (genes, bins)."""
        return midpoint(self.lower, self.upper)

    def last(self) -> torch.Tensor:
        """Position of each gene's last bin that is not padding, shape (genes, 1)."""
        return (self.upper > self.lower).sum(dim=1, keepdim=True) - 1

    def find(self, counts: torch.Tensor) -> torch.Tensor:
        """Find the bins of counts (genes, B); a count beyond a gene's last bin is in that one."""
        return torch.searchsorted(self.upper.contiguous(), counts.contiguous(), right=True).minimum(self.last())

    def ends(self, bins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up the ends of one bin for each gene and cell; both have the shape of `bins`, (genes, 1, B)."""
        return self.lower.gather(1, bins[:, 0])[:, None], self.upper.gather(1, bins[:, 0])[:, None]


class CountPosterior(NamedTuple):
    """Posterior of the counts of B cells with given labels and library sizes, at any timestep.

    It does not depend on the noisy cells, so that one serves all timesteps of a batch. The methods take the log mean
    count of each gene: `log_mean` plus what the network adds to it.

    Parameters
    ----------
    library_size
        Log library size, standardized by the training cells', shape (B,).
    log_mean
        Log mean count of each gene by labels and library size alone, shape (B, G).
    log_dispersion
        Log theta, shape (B, G).
    alphas_cumprod
        Noise process, shape (T,).
    gene_order
        Position in the model of each sorted gene, shape (G,).
    groups
        The sorted genes, group by group.
    """

    library_size: torch.Tensor
    log_mean: torch.Tensor
    log_dispersion: torch.Tensor
    alphas_cumprod: torch.Tensor
    gene_order: torch.Tensor
    groups: list[GeneGroup]

    def mean(self, log_mean: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Posterior mean of the clean cell in model space, shape (B, G).

        Parameters
        ----------
        log_mean
            Log mean counts, shape (B, G).
        noisy
            Noisy cells in model space, shape (B, G).
        timestep
            Shape (B,); need not be integers.
        """
        probabilities = (logit.softmax(dim=1) for logit in self.logits(log_mean, noisy, timestep))  # one at a time
        return self._expected([group.value for group in self.groups], probabilities)

    def mean_count(self, probabilities: list[torch.Tensor]) -> torch.Tensor:
        """Mean (B, G) of counts that follow `probabilities`."""
        return self._expected([group.mean_count() for group in self.groups], probabilities)

    def nll(
        self,
        counts: torch.Tensor,
        log_mean: torch.Tensor,
        noisy: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Negative log-likelihood of counts (B, G), averaged over genes, shape (B,); the rest as in `mean`.

        A count beyond a gene's last bin counts as in that bin. Without `noisy` the likelihood is that of `log_mean`,
        labels and library size alone, which a gene's own noisy value does not enter.
        """
        counts = self._sort(counts).float()  # (G, B)
        total = counts.new_zeros(counts.shape[1])
        for logit, group in zip(self.logits(log_mean, noisy, timestep), self.groups, strict=True):
            bins = group.find(counts[group.genes])  # (genes, B)
            nll = F.cross_entropy(logit, bins, reduction="none")  # (genes, B)
            total = total + (nll + (group.upper - group.lower).gather(1, bins).log()).sum(dim=0)
        return total / counts.shape[0]

    def sample(
        self, log_mean: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Draw counts (B, G) by inverting the distribution function.

        Parameters
        ----------
        log_mean, noisy, timestep
            As in `mean`.
        uniform
            Uniform random numbers in [0, 1), shape (B, G).
        """
        probabilities = (logit.softmax(dim=1) for logit in self.logits(log_mean, noisy, timestep))  # one at a time
        return self.quantile(probabilities, uniform)

    def sample_values(
        self, log_mean: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Draw counts as `sample` does, and give them in model space, shape (B, G): the clean cell, not its mean."""
        level = self._sort(uniform)[:, None]  # (G, 1, B)
        values = []
        for logit, group in zip(self.logits(log_mean, noisy, timestep), self.groups, strict=True):
            before_last = logit.softmax(dim=1).unbind(dim=1)[:-1]  # bins - 1 times (genes, B)
            cumulative = torch.stack(list(accumulate(before_last)), dim=1)  # on CPUs a third of the time of cumsum
            is_beyond = _is_at_most(cumulative, level[group.genes])  # (genes, bins - 1, B)
            steps = (group.value.diff(dim=1) * (group.upper > group.lower)[:, 1:])[:, None]  # (genes, 1, bins - 1)
            with torch.autocast(logit.device.type, enabled=False):
                values.append(group.value[:, :1] + torch.bmm(steps, is_beyond)[:, 0])  # (genes, B)
        return self._unsort(torch.cat(values))

    def probabilities(
        self, log_mean: torch.Tensor, noisy: torch.Tensor | None = None, timestep: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Probability of each bin, of shape (genes, bins, B) for each group of genes; parameters as in `nll`."""
        return [logit.softmax(dim=1) for logit in self.logits(log_mean, noisy, timestep)]

    def log_likelihood(self, probabilities: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
        """Log probability (B, G) of each of the counts (B, G) under `probabilities`; in a bin, counts are uniform."""
        counts = self._sort(counts).float()  # (G, B)
        found = []
        for probability, group in zip(probabilities, self.groups, strict=True):
            bins = group.find(counts[group.genes])  # (genes, B)
            inside = probability.gather(1, bins[:, None])[:, 0]  # (genes, B)
            found.append(inside.clamp(min=1e-30).log() - (group.upper - group.lower).gather(1, bins).log())
        return self._unsort(torch.cat(found))

    def quantile(self, probabilities: Iterable[torch.Tensor], level: torch.Tensor) -> torch.Tensor:
        """Find the counts (B, G) at levels (B, G) in [0, 1) of the distribution function of `probabilities`."""
        level = self._sort(level)[:, None]  # (G, 1, B)
        counts = []
        for probability, group in zip(probabilities, self.groups, strict=True):
            cumulative = probability.cumsum(dim=1)
            quantile = level[group.genes] * cumulative[:, -1:]  # (genes, 1, B)
            chosen = _is_at_most(cumulative, quantile).sum(dim=1, keepdim=True).long()  # (genes, 1, B)
            chosen = chosen.minimum(group.last()[..., None])
            inside = probability.gather(1, chosen)  # (genes, 1, B)
            below = cumulative.gather(1, chosen) - inside
            share = (quantile - below) / inside.clamp(min=1e-30)  # where in the bin, 0 to 1
            low, high = group.ends(chosen)
            counts.append((low + (share * (high - low)).floor()).clamp(low, high - 1)[:, 0])
        return self._unsort(torch.cat(counts))

    def scores(self, probabilities: list[torch.Tensor], counts: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Find how high or low counts (B, G) are among `probabilities`, as standard normal scores (B, G), float64.

        The score is the normal quantile at the level that the distribution function has at the count. A count has a
        range of levels, in which `uniform` (B, G), from 0 to 1, says the place: counts that follow `probabilities` have
        normal scores. Unlike levels, scores tell apart counts far above all that is expected.
        """
        counts, uniform = (self._sort(per_gene)[:, None].float() for per_gene in (counts, uniform))
        scores = []
        for probability, group in zip(probabilities, self.groups, strict=True):
            count = counts[group.genes]  # (genes, 1, B)
            chosen = group.find(count[:, 0])[:, None]  # (genes, 1, B)
            low, high = group.ends(chosen)
            inside = (count.minimum(high - 1) - low + uniform[group.genes]) / (high - low)  # where in the bin, 0 to 1
            below, above = _tails(probability)  # (genes, bins + 1, B)
            width = probability.gather(1, chosen)  # (genes, 1, B)
            level = below.gather(1, chosen) + inside * width
            rest = above.gather(1, chosen + 1) + (1 - inside) * width  # 1 - level, but exact near 0
            score = torch.special.ndtri(level.minimum(rest).clamp(min=1e-37).double())  # what float32 tells from 0
            scores.append(torch.where(level < rest, score, -score)[:, 0])
        return self._unsort(torch.cat(scores))

    def at_scores(self, probabilities: list[torch.Tensor], scores: torch.Tensor) -> torch.Tensor:
        """Find the counts (B, G) that have these scores (B, G), see `scores`, among `probabilities`."""
        scores = self._sort(scores)[:, None]  # (G, 1, B)
        counts = []
        for probability, group in zip(probabilities, self.groups, strict=True):
            score = scores[group.genes]  # (genes, 1, B)
            level, rest = (torch.special.ndtr(side).float() for side in (score, -score))
            below, above = _tails(probability)  # (genes, bins + 1, B)
            from_low, from_high = (below <= level).sum(1, keepdim=True), (above > rest).sum(1, keepdim=True)
            chosen = torch.where(score < 0, from_low, from_high) - 1  # (genes, 1, B)
            chosen = chosen.clamp(min=0).minimum(group.last()[..., None])
            width = probability.gather(1, chosen).clamp(min=1e-30)
            from_low = (level - below.gather(1, chosen)) / width
            from_high = 1 - (rest - above.gather(1, chosen + 1)) / width
            low, high = group.ends(chosen)
            count = low + (torch.where(score < 0, from_low, from_high) * (high - low)).floor()
            counts.append(count.clamp(low, high - 1)[:, 0])
        return self._unsort(torch.cat(counts))

    def logits(
        self, log_mean: torch.Tensor, noisy: torch.Tensor | None = None, timestep: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Unnormalized log posterior of the bins, of shape (genes, bins, B) for each group of genes; see `nll`.

        Cells are the last axis, because a softmax over a short contiguous axis is slow.
        """
        if noisy is None or timestep is None:
            noisy, alpha_bar = torch.zeros_like(log_mean), log_mean.new_zeros(len(log_mean), 1)  # (B, G), (B, 1)
        else:
            alpha_bar = self.alpha_bar(timestep)[:, None]  # (B, 1)
        log_odds = log_mean - torch.logaddexp(log_mean, self.log_dispersion)  # (B, G)
        linear = noisy.float() * alpha_bar.sqrt() / (1 - alpha_bar)  # (B, G)
        quadratic = (-alpha_bar / (1 - alpha_bar) / 2).T  # (1, B)
        log_odds, linear = (self._sort(per_gene)[:, None] for per_gene in (log_odds, linear))  # (G, 1, B)
        # Not slices: the gradient of each would be as large as the whole.
        sizes = [len(group.lower) for group in self.groups]
        logits = []
        for group, odds, slope in zip(self.groups, log_odds.split(sizes), linear.split(sizes), strict=True):
            count, value = group.mean_count()[..., None], group.value[..., None]  # (genes, bins, 1)
            logit = group.common[..., None].repeat(1, 1, len(log_mean))  # (genes, bins, B)
            # Not a matmul, which TF32 and autocast would round: logits in the hundreds must be right to 0.01.
            # In place, and with at most one operand that all cells share, this takes a quarter of the time.
            logit.addcmul_(odds, count)
            for log_base in group.log_base:
                logit += log_base
            logits.append(logit.addcmul_(torch.addcmul(slope, quadratic, value), value))
        return logits

    def alpha_bar(self, timestep: torch.Tensor) -> torch.Tensor:
        """Cumulative product of alphas at timesteps (B,), linear between the integers."""
        timestep = timestep.float().clamp(0, len(self.alphas_cumprod) - 1)
        below = timestep.floor().long()
        above = timestep.ceil().long()
        alpha_bar = torch.lerp(self.alphas_cumprod[below], self.alphas_cumprod[above], timestep - below)
        return alpha_bar.clamp(1e-8, 1 - 1e-5)

    def _expected(self, values: list[torch.Tensor], probabilities: Iterable[torch.Tensor]) -> torch.Tensor:
        """Mean (B, G) of what bins stand for, given as (genes, bins) for each group of genes."""
        with torch.autocast(self.log_mean.device.type, enabled=False):
            means = [
                torch.bmm(value[:, None], probability)[:, 0]  # (genes, B)
                for probability, value in zip(probabilities, values, strict=True)
            ]
        return self._unsort(torch.cat(means))

    def _sort(self, values: torch.Tensor) -> torch.Tensor:
        """Reorder values (B, G) to (G, B), with the genes sorted."""
        return values.T.contiguous().index_select(0, self.gene_order)

    def _unsort(self, values: torch.Tensor) -> torch.Tensor:
        """Reorder values (G, B) of the sorted genes to (B, G) in the order of the model."""
        return torch.empty_like(values).index_copy(0, self.gene_order, values).T.contiguous()


class SCRDiTCountHead(nn.Module):
    r"""What labels and library sizes say about the counts of G genes: the [`CountPosterior`] without the network.

    Large counts share bins, inside which they are uniform. The logit of a count k is

        log p(k | x_t) = log(mu / (mu + theta)) k + x_t sqrt(ab) / (1 - ab) v(k) - ab / (1 - ab) v(k)^2 / 2 + log h(k)

    up to a constant, where ab is alpha_bar and h(k) = exp(b(k)) Gamma(k + theta) / (Gamma(theta) k!). For gene g of a
    cell with labels y_1 ... y_K, and f_g(x_t) from the network,

        log mu    = m_g + log size + sum_k m_{g, y_k} + f_g(x_t)
        log theta = a_g + sum_k a_{g, y_k}
        log h(k)  = b_g(k) + h_g(k) + sum_k (h_{g, y_k}(k) - h_g(k))

    where h_g(k) is the log of Gamma(k + theta) / (Gamma(theta) k!) without a label, and h_{g, y}(k) that under y alone.

    Parameters
    ----------
    bins
        Pairs (number of genes, bins per gene), from [`~scrdit_diffusers.initialization.count_bins`].
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
            group_bins = slice(num_bins, num_bins + genes * bins_per_gene)
            self.groups.append((slice(num_genes, num_genes + genes), group_bins, (genes, bins_per_gene)))
            num_genes, num_bins = num_genes + genes, group_bins.stop

        scheduler = DDPMScheduler(num_train_timesteps=num_train_timesteps, beta_schedule=beta_schedule)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.float())  # (T,)
        self.register_buffer("gene_order", torch.arange(num_genes))  # the genes, group by group, (G,)
        # All bins, group by group: counts from lower to upper - 1, and their place in model space.
        lower = torch.cat([torch.arange(n).repeat(genes) for genes, n in bins]).float()
        self.register_buffer("lower", lower)
        self.register_buffer("upper", lower + 1)
        self.register_buffer("value", lower.log1p())
        self.register_buffer("log_library_size", torch.tensor([0.0, 1.0]))  # mean and standard deviation
        self.log_mean = nn.Parameter(torch.zeros(num_genes))  # m, of a cell of typical library size
        self.log_dispersion = nn.Parameter(torch.zeros(num_genes))  # a
        # What each label of each condition, one after the other, adds to the log mean and to log theta.
        self.num_classes = list(num_classes)
        self.class_log_mean = nn.Parameter(torch.zeros(sum(num_classes), num_genes))
        self.class_log_dispersion = nn.Parameter(torch.zeros(sum(num_classes), num_genes))
        # b of each gene (in the order of the model) and bin: how its distribution differs from a negative binomial.
        self.log_base = nn.Parameter(torch.zeros(num_genes, max(bins_per_gene for _, bins_per_gene in bins)))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "SCRDiTCountHead":
        """Move to a device but never to another dtype: bfloat16 is exact only up to 256."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, class_labels: torch.Tensor, library_size: torch.Tensor | None = None) -> CountPosterior:
        """Look up what labels and library sizes say.

        The result stays valid when offloading removes the weights, because its tensors are new ones or views.

        Parameters
        ----------
        class_labels
            Codes, shape (B, K).
        library_size
            Total counts, shape (B,). `None`: those of a typical training cell.
        """
        mean, std = self.log_library_size.float()
        if library_size is None:
            log_size = mean.new_zeros(class_labels.shape[0])  # (B,)
        else:
            log_size = (library_size.to(mean.device).float().clamp(min=1).log() - mean) / std  # (B,)
        rows = self._label_rows(class_labels)  # (B, K)
        label_log_mean = F.embedding(rows, _append_no_label(self.class_log_mean)).sum(dim=1)  # (B, G)
        label_log_dispersion = _append_no_label(self.class_log_dispersion)  # (labels + 1, G)
        log_dispersion = self.log_dispersion.float() + F.embedding(rows, label_log_dispersion).sum(dim=1)  # (B, G)
        return CountPosterior(
            library_size=log_size,
            log_mean=self.log_mean.float() + (log_size * std)[:, None] + label_log_mean,
            log_dispersion=log_dispersion,
            alphas_cumprod=self.alphas_cumprod.float()[:],
            gene_order=self.gene_order[:],
            groups=self._gene_groups(label_log_dispersion, rows),
        )

    def _label_rows(self, class_labels: torch.Tensor) -> torch.Tensor:
        """Rows of the labels (B, K) in a table of all labels; "no label" is the row after the last."""
        ends = list(accumulate(self.num_classes, initial=0))
        rows = [
            torch.where(codes < n, codes + start, ends[-1])
            for codes, n, start in zip(class_labels.unbind(dim=1), self.num_classes, ends[:-1], strict=True)
        ]
        return torch.stack(rows, dim=1) if rows else class_labels

    def _gene_groups(self, label_log_dispersion: torch.Tensor, rows: torch.Tensor) -> list[GeneGroup]:
        """Collect what all cells share and what depends on their labels (B, K), for each group of genes."""
        dispersion = (self.log_dispersion.float() + label_log_dispersion).exp()  # (labels + 1, G)
        dispersion = dispersion.T[self.gene_order, None]  # (G, 1, labels + 1)
        log_b = self.log_base.float()[self.gene_order]  # (G, largest number of bins)
        groups: list[GeneGroup] = []
        on_cpu = log_b.device.type == "cpu" and not torch.compiler.is_compiling()
        sizes = [num_genes for _, _, (num_genes, _) in self.groups]
        tables = zip(self.groups, self.bins(), dispersion.split(sizes), log_b.split(sizes), strict=True)
        for (genes, _, (_, num_bins)), (lower, upper, value), theta, b in tables:
            log_base = _log_base(midpoint(lower, upper)[..., None], theta)  # (genes, bins, labels + 1)
            log_width = (upper - lower).clamp(min=1).log().masked_fill(upper == lower, -1e9)  # (genes, bins)
            # Each of the K labels adds its change from no label.
            common = (1 - rows.shape[1]) * log_base[..., -1] + b[:, :num_bins] + log_width  # (genes, bins)
            label_log_base = [look_up(log_base, row) for row in rows.unbind(dim=1)]  # K x (genes, bins, B)
            whole = GeneGroup(genes, lower, upper, value, common, label_log_base)
            groups += whole.split(max(1, CACHED_BINS // (num_bins * max(1, len(rows)))) if on_cpu else len(lower))
        return groups

    def bins(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Lower and upper ends and values of the bins, of shape (genes, bins) for each group of genes."""
        buffers = (self.lower.float(), self.upper.float(), self.value.float())
        lower, upper, value = ([buffer[bins].view(shape) for _, bins, shape in self.groups] for buffer in buffers)
        return list(zip(lower, upper, value, strict=True))

    def bins_per_gene(self) -> torch.Tensor:
        """Count the bins of each gene, in the order of the model, shape (G,)."""
        used = torch.cat([(upper > lower).sum(dim=1) for lower, upper, _ in self.bins()])  # group by group
        return torch.empty_like(used).index_copy(0, self.gene_order, used)


def _tails(probability: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up probabilities (genes, bins, B) of all bins before each, and of it and all after: (genes, bins + 1, B)."""
    below = F.pad(probability.cumsum(dim=1), (0, 0, 1, 0))
    above = F.pad(probability.flip(1).cumsum(dim=1).flip(1), (0, 0, 0, 1))
    return below, above


def _is_at_most(values: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """`values <= limit` as ones and zeros in float32, which CPUs compare and sum twice as fast as booleans."""
    return (values - limit).le_(0)


def _append_no_label(table: torch.Tensor) -> torch.Tensor:
    """Append a row of zeros, for no label, to a table (labels, G)."""
    return F.pad(table.float(), (0, 0, 0, 1))


def look_up(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`table[..., rows]`; on CPUs as a product with ones and zeros: if not rounded, it is the same and much faster."""
    if table.device.type != "cpu" or torch.compiler.is_compiling() or torch.get_float32_matmul_precision() != "highest":
        return table[..., rows]
    one_hot = F.one_hot(rows, table.shape[-1]).to(table.dtype)  # (B, labels + 1)
    with torch.autocast("cpu", enabled=False):
        return table @ one_hot.T


def _log_base(count: torch.Tensor, dispersion: torch.Tensor) -> torch.Tensor:
    """Log of h(k) without b, that of the negative binomial."""
    return torch.lgamma(count + dispersion) - torch.lgamma(dispersion) - torch.lgamma(count + 1)


def midpoint(lower, upper):
    """Mean count of each bin (for an empty bin, its lower end), as tensor or array."""
    return (lower + (upper - 1).clip(lower)) / 2
