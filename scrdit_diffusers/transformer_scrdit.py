"""The scRDiT denoiser: a diffusion transformer (DiT) whose tokens are groups of genes.

A noisy cell (B, G) becomes N tokens of P genes each (B, N, D), passes adaLN-Zero blocks that are conditioned on the
timestep and on any number of categorical labels, and becomes a cell again (B, G).
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, TaylorSeerCacheConfig
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import nn

from .count_head import CountPosterior, SCRDiTCountHead
from .hub import SafeModelMixin

MAX_PRODUCT_TOKENS = 128  # tokens up to which `attend` is faster than the kernel of PyTorch on CPUs
CELLS_PER_COMPONENT = 20  # training cells per principal component from which cell tokens start

TABLES = ("log_dispersion", "log_base", "class_log_mean")  # of the count head
TABLE_RATE = 10  # learning rate of these tables, relative to the rest

# Sizes by name. The paper's two models are those of scRDiT (arXiv 2404.06153): one projection shared by all patches
# of 10 consecutive genes. Ours give each token of 100 genes projections of its own, hence ten times fewer tokens, and
# have one token that reads all genes.
_PRESET_COLUMNS = ["patch_size", "patch_embed_type", "num_cell_tokens", "num_layers"]
_PRESET_COLUMNS += ["num_attention_heads", "attention_head_dim"]
_PRESET_ROWS = {
    "scrdit-s":        (100, "per_patch", 1,  2, 4, 32),
    "scrdit-b":        (100, "per_patch", 1,  6, 8, 32),
    "scrdit-l":        ( 50, "per_patch", 1, 12, 8, 64),
    "scrdit-paper-d1": ( 10, "shared",    0,  1, 8, 96),
    "scrdit-paper-d3": ( 10, "shared",    0,  3, 8, 96),
}  # fmt: skip
SCRDIT_PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(_PRESET_COLUMNS, row, strict=True)) for name, row in _PRESET_ROWS.items()
}


def fit_preset(name: str, num_genes: int) -> dict[str, Any]:
    """Sizes of a preset for a number of genes: ours have as many tokens for more than 2,000 genes, each of more genes.

    The cost of a token hardly depends on the genes that it stands for.
    """
    preset = SCRDIT_PRESETS[name]
    if preset["patch_embed_type"] == "shared":
        return dict(preset)
    num_patches = -(-2000 // preset["patch_size"])
    return preset | {"patch_size": max(preset["patch_size"], -(-num_genes // num_patches))}


@dataclasses.dataclass
class SCRDiTTransformerOutput(BaseOutput):
    """Output of [`SCRDiTTransformer`].

    Parameters
    ----------
    sample
        The prediction, shape (B, G), in model space: noise, velocity or the clean cell, by the `prediction_type` of the
        scheduler.
    count_log_mean
        With a count head, log of the mean count of each gene as predicted from the rest of the cell, shape (B, G), for
        [`CountPosterior.sample`].
    count_nll
        With a count head and given `counts`, their negative log-likelihood, averaged over genes, shape (B,). `sample`
        is then `None`.
    """

    sample: torch.Tensor | None = None
    count_log_mean: torch.Tensor | None = None
    count_nll: torch.Tensor | None = None


class SCRDiTAttnProcessor:
    """Scaled dot-product attention among a cell's tokens, through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SCRDiTAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the layers of `attn` to tokens (B, N, D)."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)  # 3 x (B, N, D)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))  # 3 x (B, N, H, D/H)
        is_free = self._attention_backend is None and self._parallel_config is None
        is_small = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[1] <= MAX_PRODUCT_TOKENS
        if is_free and is_small:
            hidden_states = attend(query, key, value)  # (B, N, H, D/H)
        else:
            hidden_states = dispatch_attention_fn(
                query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
            )  # (B, N, H, D/H)
        return attn.to_out[0](hidden_states.flatten(2, 3))  # (B, N, D)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention (B, N, H, D/H) as two products.

    In bfloat16 on CPUs, with the few tokens of a cell, it takes half the time of PyTorch's kernel.
    """
    heads = query.shape[2]
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # 3 x (B H, N, D/H)
    scores = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))  # (B H, N, N)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(weights, value).unflatten(0, (-1, heads)).transpose(1, 2)  # (B, N, H, D/H)


class SCRDiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention over tokens.

    Parameters
    ----------
    dim
        Width D of a token.
    heads
        Number of attention heads H.
    dim_head
        Width of one head; H x `dim_head` = D.
    """

    _default_processor_cls = SCRDiTAttnProcessor
    _available_processors = [SCRDiTAttnProcessor]

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.head_dim = dim_head
        self.use_bias = True
        self.is_cross_attention = False
        self.to_q = nn.Linear(dim, heads * dim_head)
        self.to_k = nn.Linear(dim, heads * dim_head)
        self.to_v = nn.Linear(dim, heads * dim_head)
        self.to_out = nn.ModuleList([nn.Linear(heads * dim_head, dim)])
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Let the N tokens (B, N, D) of each cell attend to each other."""
        return self.processor(self, hidden_states)  # (B, N, D)


class SCRDiTFeedForward(FeedForward):
    """The MLP of a block: two linear layers with a GELU between.

    Parameters
    ----------
    dim
        Width D of a token.
    inner_dim
        Hidden width.
    dropout
        Dropout probability.
    """

    def __init__(self, dim: int, inner_dim: int, dropout: float):
        super().__init__(dim, inner_dim=inner_dim, dropout=dropout, activation_fn="gelu-approximate")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the MLP to each token (B, N, D)."""
        projection, dropout, linear = self.net
        hidden_states = projection.proj(hidden_states)  # (B, N, 4 D)
        # In bfloat16 the two GELUs differ by less than the rounding, and on CPUs tanh takes six times as long as erf.
        approximate = "none" if hidden_states.dtype == torch.bfloat16 else "tanh"
        return linear(dropout(F.gelu(hidden_states, approximate=approximate)))  # (B, N, D)


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """adaLN: `hidden_states * (1 + scale) + shift`, with (B, D) modulation of (B, N, D) tokens."""
    return torch.addcmul(shift[:, None], hidden_states, 1 + scale[:, None])


class SCRDiTTransformerBlock(nn.Module):
    """One adaLN-Zero block (Peebles and Xie 2023, section 3.2): attention, then an MLP, each gated by the condition.

    Parameters
    ----------
    dim
        Width D of a token.
    num_attention_heads
        Number of attention heads.
    attention_head_dim
        Width of one head.
    mlp_ratio
        Hidden width of the MLP over D.
    dropout
        Dropout probability inside the MLP.
    """

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SCRDiTAttention(dim, num_attention_heads, attention_head_dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = SCRDiTFeedForward(dim, dropout=dropout, inner_dim=int(dim * mlp_ratio))
        self.adaln = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Update the tokens (B, N, D) under the condition `temb` (B, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(F.silu(temb)).chunk(6, dim=-1)  # 6 x (B, D)
        attn_output = self.attn(modulate(self.norm1(hidden_states), shift1, scale1))  # (B, N, D)
        hidden_states = torch.addcmul(hidden_states, gate1[:, None], attn_output)  # (B, N, D)
        ff_output = self.ff(modulate(self.norm2(hidden_states), shift2, scale2))  # (B, N, D)
        return torch.addcmul(hidden_states, gate2[:, None], ff_output)  # (B, N, D)


class SCRDiTPerPatchLinear(nn.Module):
    """A linear layer of its own for every token: `y[b, n] = x[b, n] @ weight[n] + bias[n]`, as one batched matmul.

    Parameters
    ----------
    num_patches
        Number of tokens N.
    in_features
        Width of a token on the way in.
    out_features
        Width of a token on the way out.
    """

    def __init__(self, num_patches: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_patches, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_patches, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias from U(-1/sqrt(in), 1/sqrt(in)), as `nn.Linear` does."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project the tokens (B, N, in) to (B, N, out)."""
        output = torch.baddbmm(self.bias[:, None], hidden_states.transpose(0, 1), self.weight)  # (N, B, out)
        return output.transpose(0, 1)  # (B, N, out)


class SCRDiTTransformer(SafeModelMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    r"""A diffusion transformer over the genes of a cell.

    Genes are split into N = ceil(G / P) tokens of P consecutive genes; the last token is padded with zeros, on which no
    result depends. Each block is modulated by c = timestep embedding + sum of the label
    embeddings (adaLN-Zero).

    Parameters
    ----------
    num_genes
        Number of genes G; need not be divisible by `patch_size`.
    patch_size
        Genes per token P. Compute and memory of a cell grow with ceil(G / P).
    patch_embed_type
        "per_patch": every token has its own input and output projections, and a learned position.
        "shared": one projection for all tokens and fixed sine-cosine positions, as in the paper.
    num_cell_tokens
        Number of additional tokens that read and write all genes. What varies across a whole cell is weak in each
        patch, and at high noise only a sum over all genes shows it.
    num_layers
        Number of transformer blocks.
    num_attention_heads
        Number of attention heads; the width of a token is D = `num_attention_heads` x `attention_head_dim`.
    attention_head_dim
        Width of one head.
    mlp_ratio
        Hidden width of the MLPs over D.
    dropout
        Dropout probability in the MLPs and before the last projection.
    num_classes
        Number of categories of each categorical condition (cell type, batch, ...). `None` or empty: unconditional.
        Condition k has codes 0 ... `num_classes[k]` - 1, and `num_classes[k]` is its null entry (no label given),
        which classifier-free guidance uses.
    count_bins
        `None`: the projection of the tokens is the prediction. Otherwise (from [`count_bins`] of the training cells)
        the projection is added to each gene's log mean count; [`SCRDiTCountHead`] combines this with the noisy cell to
        the posterior of the counts, whose mean, the clean cell, is the prediction.
    num_train_timesteps
        Number of diffusion timesteps T of the noise process; used by the count head.
    beta_schedule
        Noise schedule of the noise process; used by the count head.
    decode_timestep, min_timestep, default_timesteps, autocast_dtype
        Those of the pipelines that this transformer is part of, see
        [`~scrdit_diffusers.pipeline_scrdit.SCRDiTPipeline`]; pipelines write them here.

    Raises
    ------
    ValueError
        A size is not positive, `patch_embed_type` is unknown, or D is not divisible by 4 with "shared".

    References
    ----------
    scRDiT: arXiv 2404.06153. DiT: Peebles and Xie 2023, arXiv 2212.09748.

    Examples
    --------
    >>> import torch
    >>> from scrdit_diffusers import SCRDiTTransformer
    >>> model = SCRDiTTransformer(num_genes=45, patch_size=10, num_layers=1, num_classes=[3])
    >>> model(torch.randn(2, 45), timestep=7, class_labels=torch.tensor([0, 2])).sample.shape
    torch.Size([2, 45])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SCRDiTTransformerBlock"]
    _repeated_blocks = ["SCRDiTTransformerBlock"]
    _group_offload_block_modules = ["count_head"]  # pipelines also call it on its own
    _skip_layerwise_casting_patterns = [
        "patch_embed",
        "pos_embed",
        "time_embed",
        "class_embed",
        "norm",
        "proj_out",
        "count_head",
        "library_size_embed",
    ]
    _keep_in_fp32_modules = ["pos_embed", "count_head"]

    @register_to_config
    def __init__(
        self,
        num_genes: int = 2000,
        patch_size: int = 100,
        patch_embed_type: str = "per_patch",
        *,
        num_cell_tokens: int = 0,
        num_layers: int = 2,
        num_attention_heads: int = 4,
        attention_head_dim: int = 32,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        num_classes: list[int] | None = None,
        count_bins: list[list[int]] | None = None,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "squaredcos_cap_v2",
        decode_timestep: int | None = None,
        min_timestep: int = 0,
        default_timesteps: list[int] | None = None,
        autocast_dtype: str | None = None,
    ):
        super().__init__()
        sizes = dict(num_genes=num_genes, patch_size=patch_size, num_layers=num_layers)
        sizes |= dict(num_attention_heads=num_attention_heads, attention_head_dim=attention_head_dim)
        sizes |= {f"num_classes[{k}]": n for k, n in enumerate(num_classes or [])}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:  # a damaged config may hold other types
                raise ValueError(f"{name} must be at least 1, got {size!r}.")
        if patch_embed_type not in ("per_patch", "shared"):
            raise ValueError(f'patch_embed_type must be "per_patch" or "shared", got {patch_embed_type!r}.')

        dim = num_attention_heads * attention_head_dim
        self.num_patches = num_patches = -(-num_genes // patch_size)
        self.gradient_checkpointing = False

        self.patch_embed: nn.Module
        self.proj_out: nn.Module
        if patch_embed_type == "per_patch":
            # The bias of each token's own projection is its learned position.
            self.patch_embed = SCRDiTPerPatchLinear(num_patches, patch_size, dim)
            self.proj_out = SCRDiTPerPatchLinear(num_patches, dim, patch_size)
        else:
            if dim % 4:
                raise ValueError(f'patch_embed_type="shared" has sine-cosine positions: {dim=} must be divisible by 4.')
            self.patch_embed = nn.Linear(patch_size, dim)
            self.proj_out = nn.Linear(dim, patch_size)
            # A (tokens x 1) grid, half of the width for each axis; base_size=N makes the positions 0 ... N-1.
            pos_embed = get_2d_sincos_pos_embed(dim, (num_patches, 1), base_size=num_patches)  # (N, D)
            self.register_buffer("pos_embed", pos_embed.float(), persistent=True)

        if num_cell_tokens:
            self.cell_embed = nn.Linear(num_genes, num_cell_tokens * dim)
            self.cell_out = nn.Linear(num_cell_tokens * dim, num_genes)

        self.count_head: SCRDiTCountHead | None = None
        if count_bins is not None:
            if sum(genes for genes, _ in count_bins) != num_genes:
                raise ValueError(f"count_bins has {sum(g for g, _ in count_bins)} genes, the model {num_genes}.")
            self.count_head = SCRDiTCountHead(count_bins, num_classes or [], num_train_timesteps, beta_schedule)
            self.library_size_embed = TimestepEmbedding(1, dim)

        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, dim)
        self.class_embed = nn.ModuleList([nn.Embedding(n + 1, dim) for n in num_classes or []])

        self.transformer_blocks = nn.ModuleList(
            SCRDiTTransformerBlock(dim, num_attention_heads, attention_head_dim, mlp_ratio, dropout)
            for _ in range(num_layers)
        )

        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaln_out = nn.Linear(dim, 2 * dim)
        self.dropout_out = nn.Dropout(dropout)

    @staticmethod
    def leading_shapes(
        num_genes: int,
        patch_size: int,
        patch_embed_type: str,
        num_cell_tokens: int,
        num_layers: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        num_classes: list[int] | None,
        count_bins: list[list[int]] | None,
        num_train_timesteps: int,
        **others: Any,
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of weights in which each size of a config occurs: files that have them bound the sizes."""
        num_patches, dim = -(-num_genes // patch_size), num_attention_heads * attention_head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "time_embed.linear_2.bias": (dim,),
            f"transformer_blocks.{num_layers - 1}.ff.net.0.proj.bias": (int(dim * mlp_ratio),),
        }
        if patch_embed_type == "per_patch":
            shapes["patch_embed.weight"] = (num_patches, patch_size, dim)
        else:
            shapes |= {"patch_embed.weight": (dim, patch_size), "pos_embed": (num_patches, dim)}
        if num_cell_tokens:
            shapes["cell_embed.weight"] = (num_cell_tokens * dim, num_genes)
        for k, n in enumerate(num_classes or []):
            shapes[f"class_embed.{k}.weight"] = (n + 1, dim)
        if count_bins is not None:
            shapes["count_head.alphas_cumprod"] = (num_train_timesteps,)
            shapes["count_head.lower"] = (sum(genes * bins for genes, bins in count_bins),)
            shapes["count_head.class_log_mean"] = (sum(num_classes or []), num_genes)
        return shapes

    def enable_cache(self, config: Any) -> None:
        """Enable one of the caches of diffusers, as `CacheMixin.enable_cache` does.

        The lite mode of TaylorSeer skips the blocks and extrapolates the last projection. Here there are two, and
        without the change below that of the cell tokens would give zeros.
        """
        # FirstBlockCache, TaylorSeer and others look blocks up in this registry of diffusers. As it is private, it is
        # imported here: changes to it can break caches, but not the import of this package.
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        TransformerBlockRegistry.register(
            SCRDiTTransformerBlock,
            TransformerBlockMetadata(return_hidden_states_index=0, hidden_states_argument_name="hidden_states"),
        )
        if isinstance(config, TaylorSeerCacheConfig) and config.use_lite_mode:
            config = dataclasses.replace(
                config,
                use_lite_mode=False,
                skip_predict_identifiers=[r"transformer_blocks\.\d+"],
                cache_identifiers=["proj_out", "cell_out"],
            )
        super().enable_cache(config)

    def initialize_weights(self) -> None:
        """Set the initial weights for training (adaLN-Zero: every block is the identity, the output is zero).

        The constructor keeps PyTorch's non-zero defaults, because tests of loading, LoRA and caching compare outputs.
        [`~scrdit_diffusers.initialization.initialize_from_cells`] also sets what starts from the training cells.
        """
        # Linear layers and patch projections: Xavier uniform, zero bias.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, SCRDiTPerPatchLinear):
                _, fan_in, fan_out = module.weight.shape
                bound = (6 / (fan_in + fan_out)) ** 0.5
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.normal_(module.bias, std=0.02)  # on the way in, the learned position of a token
        # Timestep, labels and library size: small and normal.
        embeddings = [self.time_embed.linear_1, self.time_embed.linear_2, *self.class_embed]
        if self.count_head is not None:
            embeddings.append(self.library_size_embed.linear_2)
        for embedding in embeddings:
            nn.init.normal_(embedding.weight, std=0.02)
        # adaLN-Zero: gates, shifts, scales and the last projection start at zero.
        zero = nn.ModuleList([self.adaln_out, self.proj_out])
        if self.config.num_cell_tokens:
            zero.append(self.cell_out)
        zero.extend(block.get_submodule("adaln") for block in self.transformer_blocks)
        for parameter in zero.parameters():
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def initialize_cell_tokens(self, values: torch.Tensor) -> None:
        """Let the cell tokens read the principal components of cells (cells, G) in model space.

        There is at most one component per 20 cells; further ones are noise, which the model would memorize.
        """
        num_components = min(self.cell_embed.out_features, -(-len(values) // CELLS_PER_COMPONENT), *values.shape)
        _, _, components = torch.pca_lowrank(values.float(), num_components, niter=4)  # (G, components)
        self.cell_embed.weight[:num_components] = components.T.to(self.cell_embed.weight)

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Group the parameters that are trained for an optimizer of `torch.optim`.

        Tables by gene in the count head are on a log scale and may have far to go, so they learn faster. Neither they
        nor the log means decay: decay toward zero would raise the counts of rare genes by half. What is trained besides
        LoRA adapters does not decay either, because its tensors also have frozen entries.

        Parameters
        ----------
        learning_rate
            Learning rate of most parameters.
        weight_decay
            Weight decay of most parameters.
        """
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        has_adapters = any("lora_" in name for name in trained)
        tables = [trained.pop(name) for name in list(trained) if name.endswith(TABLES)]
        constant = [trained.pop(name) for name in list(trained) if name.endswith("log_mean")]
        if has_adapters:
            constant += [trained.pop(name) for name in list(trained) if "lora_" not in name]
        groups: list[dict[str, Any]] = [
            {"params": list(trained.values()), "lr": learning_rate, "weight_decay": weight_decay},
            {"params": constant, "lr": learning_rate, "weight_decay": 0.0},
            {"params": tables, "lr": TABLE_RATE * learning_rate, "weight_decay": 0.0},
        ]
        return [groups[0]] + [group for group in groups[1:] if group["params"]]

    @property
    def null_labels(self) -> torch.Tensor:
        """Codes that mean "no label", one for each condition; shape (K,)."""
        return torch.tensor(self.config.num_classes or [], dtype=torch.long, device=self.device)

    def check_labels(self, class_labels: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        """Bring labels to shape (B, K); null codes if none are given."""
        num_conditions = len(self.class_embed)
        if class_labels is None:
            class_labels = self.null_labels.expand(batch_size, -1)  # (B, K)
        given = tuple(class_labels.shape)
        if class_labels.ndim == 1:
            class_labels = class_labels[:, None]  # (B, 1)
        if class_labels.shape != (batch_size, num_conditions):
            raise ValueError(
                f"class_labels has shape {given}, expected ({batch_size}, "
                f"{num_conditions}): one code for each cell and condition."
            )
        return class_labels

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        library_size: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        count_posterior: CountPosterior | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_sample: bool = True,
        return_dict: bool = True,
    ) -> SCRDiTTransformerOutput | tuple[torch.Tensor, ...]:
        """Denoise a batch of cells in one network call.

        Parameters
        ----------
        hidden_states
            Noisy cells, shape (B, G), in model space.
        timestep
            Diffusion timestep, a number or a tensor of shape () or (B,); it need not be an integer.
        class_labels
            Integer codes, shape (B,) for one condition or (B, K) for K conditions; a condition's `num_classes` is
            its null code. `None`: no label is given.
        library_size
            With a count head, total count of each cell over the G genes, shape (B,). `None`: that of a typical
            training cell.
        counts
            With a count head, the cells' counts, shape (B, G), to get their likelihood instead of the prediction.
        count_posterior
            What the count head returns for these labels and library sizes, to look it up once for many timesteps.
            `None`: it is looked up here.
        attention_kwargs
            `{"scale": s}` scales the LoRA layers.
        return_sample
            With a count head, whether to compute the prediction, the mean of the posterior; else it is `None`.
        return_dict
            Return a `SCRDiTTransformerOutput` (default) or a tuple.

        Returns
        -------
        The prediction (B, G) and, with a count head, the log mean counts (B, G). With `counts`, the log mean counts and
        the negative log-likelihoods (B,).

        Raises
        ------
        ValueError
            The number of genes or of conditions is not the model's, or a model without a count head got `library_size`
            or `counts`.
        """
        batch_size, num_genes = hidden_states.shape
        if num_genes != self.config.num_genes:
            raise ValueError(f"hidden_states has {num_genes} genes, the model has {self.config.num_genes}.")
        if self.count_head is None and (library_size is not None or counts is not None):
            raise ValueError("library_size and counts need a model with a count head (count_bins).")
        noisy = hidden_states  # (B, G)

        # 1. Condition: timestep + labels + library size
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch_size)  # (B,)
        temb = self.time_embed(self.time_proj(timestep).to(hidden_states.dtype))  # (B, D)
        class_labels = self.check_labels(class_labels, batch_size)  # (B, K)
        for k, embed in enumerate(self.class_embed):
            temb = temb + embed(class_labels[:, k])  # (B, D)
        if self.count_head is not None:
            # Of cells with these labels and library sizes
            posterior = count_posterior or self.count_head(class_labels, library_size)
            temb = temb + self.library_size_embed(posterior.library_size[:, None].to(temb.dtype))  # (B, D)

        # 2. Genes -> tokens
        padding = self.num_patches * self.config.patch_size - num_genes
        hidden_states = F.pad(hidden_states, (0, padding)).unflatten(1, (self.num_patches, -1))  # (B, N, P)
        hidden_states = self.patch_embed(hidden_states)  # (B, N, D)
        if self.config.patch_embed_type == "shared":
            hidden_states = hidden_states + self.pos_embed.to(hidden_states.dtype)  # (B, N, D)
        num_cell_tokens = self.config.num_cell_tokens
        if num_cell_tokens:
            cell_tokens = self.cell_embed(noisy).unflatten(1, (num_cell_tokens, -1))  # (B, C, D)
            hidden_states = torch.cat([cell_tokens, hidden_states], dim=1)  # (B, C + N, D)

        # 3. Blocks
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb)  # (B, N, D)
            else:
                hidden_states = block(hidden_states, temb)  # (B, N, D)

        # 4. Tokens -> genes
        shift, scale = self.adaln_out(F.silu(temb)).chunk(2, dim=-1)  # 2 x (B, D)
        hidden_states = self.dropout_out(modulate(self.norm_out(hidden_states), shift, scale))  # (B, C + N, D)
        sample = self.proj_out(hidden_states[:, num_cell_tokens:]).flatten(1)[:, :num_genes]  # (B, G)
        if num_cell_tokens:
            sample = sample + self.cell_out(hidden_states[:, :num_cell_tokens].flatten(1))  # (B, G)
        output = SCRDiTTransformerOutput(sample=sample)

        # 5. What the cell says about each gene, and the gene's own noisy value -> counts
        if self.count_head is not None:
            log_mean = posterior.log_mean + sample.float()  # (B, G)
            if counts is None:
                sample = posterior.mean(log_mean, noisy, timestep).to(noisy.dtype) if return_sample else None  # (B, G)
                output = SCRDiTTransformerOutput(sample, log_mean)
            else:
                nll = posterior.nll(counts, log_mean, noisy, timestep)  # (B,)
                output = SCRDiTTransformerOutput(None, log_mean, nll)
        return output if return_dict else output.to_tuple()

    def flops_per_cell(self) -> int:
        """Floating-point operations per cell and network call: two for each multiply-add of the matmuls."""
        n, p, c = self.num_patches, self.config.patch_size, self.config.num_cell_tokens
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        per_token = (
            4 * dim * dim + 2 * dim * int(dim * self.config.mlp_ratio) + 2 * (c + n) * dim
        )  # qkv + out, MLP, attention
        per_cell = 256 * dim + dim * dim + self.config.num_layers * 6 * dim * dim + 2 * dim * dim  # timestep, adaLN
        if self.count_head is not None:
            per_cell += dim + dim * dim  # library size
            per_cell += sum(genes * bins for genes, bins in self.config.count_bins)  # mean of the posterior
        per_cell += 2 * n * p * dim + 2 * self.config.num_genes * c * dim  # genes -> tokens -> genes
        return 2 * (self.config.num_layers * (c + n) * per_token + per_cell)
