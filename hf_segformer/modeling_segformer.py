"""SegFormer: simple and efficient semantic segmentation with transformers (Xie et al. 2021, arXiv 2105.15203).

Four stages, each an overlapping patch embedding followed by transformer blocks, give feature maps at 1/4, 1/8, 1/16 and
1/32 of the image; an all-MLP head fuses them. Modules and parameters have the names of the published files, so a state
dict, a Trainer checkpoint and a published file agree without renaming.

Tokens are laid out so that (B, N, C) and a channels-last (B, C, H, W) share memory: converting one into the other
copies nothing.

This file is the reference: SegFormer as the paper writes it. Where `run_fast` finds a faster implementation that gives
the same result, it runs instead (see `dispatch_segformer`).

Axes: B batch, C channels, H W a stage's grid, N = H*W tokens, M tokens left after reduction, A heads, K classes.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_segformer import SegFormerConfig
from .cpu_decode_head_segformer import fused_decode_head  # noqa: F401 (fills the dispatch table)
from .cpu_encoder_segformer import fused_attention, fused_mix_ffn  # noqa: F401 (fills the dispatch table)
from .cpu_runtime_segformer import warn_of_slow_type
from .dispatch_segformer import run_fast
from .shards_segformer import check_shards
from .upsampling_segformer import at_least_float32, check_labels, upsample, upsample_cross_entropy

logger = logging.get_logger(__name__)


def tokens_to_features(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, N, C) -> (B, C, H, W), a channels-last view of the same memory; a copy while compiling."""
    # Not by `unflatten`, which makes constants of the sizes when it is traced.
    features = tokens.view(tokens.shape[0], height, width, tokens.shape[2]).permute(0, 3, 1, 2)
    # Inductor cannot order the strides of a channels-last view of symbolic size (PyTorch 2.13); it fuses the copy.
    return features.contiguous() if torch.compiler.is_compiling() else features


def features_to_tokens(features: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, C); copies nothing where the features are channels-last."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)


def to_channels_last(features: torch.Tensor) -> torch.Tensor:
    """Copy (B, C, H, W) to channels-last memory, by operations that function transforms can batch."""
    return features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class SegFormerOverlapPatchEmbeddings(nn.Module):
    """Overlapping patch embedding (paper section 3.1): a strided convolution whose windows overlap, then LayerNorm."""

    def __init__(self, patch_size: int, stride: int, num_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(num_channels, hidden_size, patch_size, stride, padding=patch_size // 2)
        self.layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """(B, C_in, H_in, W_in) -> tokens (B, N, C) and their grid H, W."""
        embeddings = self.proj(features)
        height, width = embeddings.shape[-2:]
        return self.layer_norm(features_to_tokens(embeddings)), height, width


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, in the form of Transformers' attention interface.

    Query (B, A, N, C/A), key and value (B, A, M, C/A) -> context (B, N, A, C/A) and maps (B, A, N, M).
    """
    scores = query @ key.transpose(-2, -1) * scaling
    maps = at_least_float32(scores).softmax(dim=-1).to(query.dtype)
    maps = F.dropout(maps, p=dropout, training=module.training)
    return (maps @ value).transpose(1, 2), maps


class SegFormerEfficientSelfAttention(nn.Module):
    """Self-attention over shortened keys and values (paper section 3.1, equation 2).

    A strided convolution turns the N tokens into M = N / sr_ratio^2 before keys and values are made, which brings
    O(N^2) down to O(N^2 / R) with R = sr_ratio^2. With ratio 1, as in the last stage, attention is full.
    """

    def __init__(self, config: SegFormerConfig, hidden_size: int, num_heads: int, sr_ratio: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.sr_ratio = sr_ratio
        self.is_causal = False  # read by Transformers' attention functions
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(hidden_size, hidden_size, sr_ratio, sr_ratio)
            self.layer_norm = nn.LayerNorm(hidden_size)

    def reduce(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, N, C) -> (B, M, C). A grid smaller than the ratio is zero-padded to it, right and bottom."""
        features = tokens_to_features(tokens, height, width)
        if height < self.sr_ratio or width < self.sr_ratio:
            features = F.pad(features, (0, max(self.sr_ratio - width, 0), 0, max(self.sr_ratio - height, 0)))
        return self.layer_norm(features_to_tokens(self.sr(features)))

    def split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, A, N, C/A)."""
        return tokens.view(tokens.shape[0], tokens.shape[1], -1, self.head_dim).transpose(1, 2)

    def forward(
        self, tokens: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, C) -> (B, N, C) and, on demand, attention maps (B, A, N, M)."""
        reduced = self.reduce(tokens, height, width) if self.sr_ratio > 1 else tokens
        attention = eager_attention_forward
        if not output_attentions:  # only eager attention returns maps
            implementation = self.config._attn_implementation
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        context, maps = attention(
            self,
            self.split_heads(self.query(tokens)),
            self.split_heads(self.key(reduced)),
            self.split_heads(self.value(reduced)),
            None,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
        )
        return context.flatten(2), maps


class SegFormerSelfOutput(nn.Module):
    """The projection after attention."""

    def __init__(self, config: SegFormerConfig, hidden_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.dropout(self.dense(tokens))


class SegFormerAttention(nn.Module):
    """Efficient self-attention and its output projection, nested as in the published names."""

    def __init__(self, config: SegFormerConfig, hidden_size: int, num_heads: int, sr_ratio: int):
        super().__init__()
        self.self = SegFormerEfficientSelfAttention(config, hidden_size, num_heads, sr_ratio)
        self.output = SegFormerSelfOutput(config, hidden_size)

    def forward(
        self, tokens: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, C) -> (B, N, C) and, on demand, attention maps (B, A, N, M)."""
        context, maps = self.self(tokens, height, width, output_attentions)
        return self.output(context), maps


class SegFormerDWConv(nn.Module):
    """The depthwise 3x3 convolution of the Mix-FFN: its zero padding leaks position, so none need be embedded."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dwconv = nn.Conv2d(hidden_size, hidden_size, 3, padding=1, groups=hidden_size)

    def forward(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        return features_to_tokens(self.dwconv(tokens_to_features(tokens, height, width)))


class SegFormerMixFFN(nn.Module):
    """Mix-FFN (paper section 3.1, equation 3): linear, depthwise convolution, GELU, linear."""

    def __init__(self, config: SegFormerConfig, hidden_size: int, mlp_ratio: int):
        super().__init__()
        self.dense1 = nn.Linear(hidden_size, hidden_size * mlp_ratio)
        self.dwconv = SegFormerDWConv(hidden_size * mlp_ratio)
        self.activation = ACT2FN[config.hidden_act]
        self.dense2 = nn.Linear(hidden_size * mlp_ratio, hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        hidden = self.activation(self.dwconv(self.dense1(tokens), height, width))
        return self.dropout(self.dense2(self.dropout(hidden)))


class SegFormerDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a residual branch for whole samples while training."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        if not self.training or self.probability == 0.0:
            return tokens
        keep = torch.full((tokens.shape[0], 1, 1), 1 - self.probability, device=tokens.device)
        return tokens * (torch.bernoulli(keep) / keep).to(tokens.dtype)

    def extra_repr(self) -> str:
        """Return the probability, for `print(model)`."""
        return f"probability={self.probability}"


class SegFormerLayer(GradientCheckpointingLayer):
    """One transformer block: attention and Mix-FFN, each after a LayerNorm and beside a residual."""

    def __init__(
        self,
        config: SegFormerConfig,
        hidden_size: int,
        num_heads: int,
        drop_path: float,
        sr_ratio: int,
        mlp_ratio: int,
    ):
        super().__init__()
        self.layer_norm_1 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = SegFormerAttention(config, hidden_size, num_heads, sr_ratio)
        self.drop_path = SegFormerDropPath(drop_path)
        self.layer_norm_2 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = SegFormerMixFFN(config, hidden_size, mlp_ratio)

    def add_attention(
        self, tokens: torch.Tensor, height: int, width: int, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, C) -> (B, N, C) and, on demand, attention maps (B, A, N, M)."""
        fast = run_fast("attention", self, tokens, height, width, output_attentions)
        if fast is not NotImplemented:
            return fast, None
        attended, maps = self.attention(self.layer_norm_1(tokens), height, width, output_attentions)
        return tokens + self.drop_path(attended), maps

    def add_mix_ffn(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        fast = run_fast("mix_ffn", self, tokens, height, width)
        if fast is not NotImplemented:
            return fast
        return tokens + self.drop_path(self.mlp(self.layer_norm_2(tokens), height, width))

    def forward(
        self, tokens: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, C) -> (B, N, C) and, on demand, attention maps (B, A, N, M)."""
        tokens, maps = self.add_attention(tokens, height, width, output_attentions)
        return self.add_mix_ffn(tokens, height, width), maps


class SegFormerEncoder(nn.Module):
    """The Mix Transformer encoder (paper section 3.1). In the published names a part's stages are side by side."""

    def __init__(self, config: SegFormerConfig):
        super().__init__()
        self.config = config
        num_blocks = sum(config.depths)
        drop_paths = [config.drop_path_rate * block / max(num_blocks - 1, 1) for block in range(num_blocks)]
        num_channels = config.num_channels
        self.patch_embeddings = nn.ModuleList()
        self.block = nn.ModuleList()
        self.layer_norm = nn.ModuleList()
        for stage, hidden_size in enumerate(config.hidden_sizes):
            self.patch_embeddings.append(
                SegFormerOverlapPatchEmbeddings(
                    config.patch_sizes[stage], config.strides[stage], num_channels, hidden_size
                )
            )
            first = sum(config.depths[:stage])
            self.block.append(
                nn.ModuleList(
                    SegFormerLayer(
                        config,
                        hidden_size,
                        config.num_attention_heads[stage],
                        drop_path,
                        config.sr_ratios[stage],
                        config.mlp_ratios[stage],
                    )
                    for drop_path in drop_paths[first : first + config.depths[stage]]
                )
            )
            self.layer_norm.append(nn.LayerNorm(hidden_size, eps=config.layer_norm_eps))
            num_channels = hidden_size

    def forward(
        self, pixel_values: torch.Tensor, output_attentions: bool = False
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]:
        """(B, num_channels, height, width) -> each stage's features (B, C, H, W) and, on demand, each block's maps."""
        self.check(pixel_values)
        implementation = self.config._attn_implementation
        if output_attentions and implementation != "eager" and not torch.compiler.is_compiling():
            logger.warning_once(f"{implementation!r} attention returns no maps: this call runs eager attention")
        dtype = self.patch_embeddings[0].proj.weight.dtype
        warn_of_slow_type(dtype, pixel_values.device)
        features = to_channels_last(pixel_values.to(dtype))
        stages, attentions = [], []
        for embed, blocks, norm in zip(self.patch_embeddings, self.block, self.layer_norm, strict=True):
            tokens, height, width = embed(features)
            for block in blocks:
                tokens, maps = block(tokens, height, width, output_attentions)
                attentions.append(maps)
            features = tokens_to_features(norm(tokens), height, width)
            stages.append(features)
        return tuple(stages), tuple(attentions) if output_attentions else None

    def check(self, pixel_values: torch.Tensor) -> None:
        """Raise ValueError unless `pixel_values` is a float tensor (B, num_channels, height, width)."""
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            kind = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise ValueError(
                f"pixel_values are of type {kind}; expected a tensor of normalized floats, which "
                "SegFormerImageProcessor returns"
            )
        num_channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; expected (batch, {num_channels}, height, "
                f"width), as config.num_channels is {num_channels}"
            )


class SegFormerMLP(nn.Module):
    """One stage's linear layer in the decode head."""

    def __init__(self, config: SegFormerConfig, hidden_size: int):
        super().__init__()
        self.proj = nn.Linear(hidden_size, config.decoder_hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, H, W)."""
        return self.proj(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SegFormerDecodeHead(nn.Module):
    """The all-MLP decode head (paper section 3.2, equation 4).

    Everything before BatchNorm is linear at each pixel, which the fast paths use: see `folding_segformer`.
    """

    def __init__(self, config: SegFormerConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.linear_c = nn.ModuleList(SegFormerMLP(config, hidden_size) for hidden_size in config.hidden_sizes)
        self.linear_fuse = nn.Conv2d(width * len(config.hidden_sizes), width, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(config.classifier_dropout_prob)
        self.classifier = nn.Conv2d(width, config.num_labels, 1)

    def forward(self, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Each stage's (B, C, H, W) -> logits (B, K, H, W) at the first stage's size."""
        fast = run_fast("decode_head", self, features)
        if fast is not NotImplemented:
            return fast
        first, *others = [linear(stage) for linear, stage in zip(self.linear_c, features, strict=True)]
        projected = [first, *(upsample(stage, first.shape[-2:]) for stage in others)]
        fused = self.linear_fuse(torch.cat(projected[::-1], dim=1))
        return self.classifier(self.dropout(F.relu(self.batch_norm(fused))))


class SegFormerPreTrainedModel(PreTrainedModel):
    """Base class of all SegFormer models: the original code's initialization, and traits that Transformers asks for."""

    config_class = SegFormerConfig
    base_model_prefix = "segformer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean: the Trainer must not rescale it for gradient accumulation
    _no_split_modules = ["SegFormerLayer", "SegFormerDecodeHead"]  # noqa: RUF012 (the base class annotates it)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: SegFormerConfig):
        # Not by type: the code of a checkpoint has a class of its own.
        if not hasattr(config, "check"):
            raise ValueError(
                f"config is a {type(config).__name__}; {type(self).__name__} expects a SegFormerConfig: omit config, "
                "or load it by SegFormerConfig.from_pretrained, which reads Transformers' own files, too"
            )
        config.check()  # fields may have been set after construction
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does, but no shards outside its folder.

        Raises:
            ValueError: if the index of the shards names a file that is not beside it.
        """
        check_shards(pretrained_model_name_or_path, **kwargs)
        model = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        check_shards(pretrained_model_name_or_path, **kwargs)  # the index may have been downloaded just now
        return model

    def get_input_embeddings(self) -> nn.Module:
        """Return the first convolution, at whose output reentrant checkpointing of a frozen base starts gradients."""
        return self.base_model.encoder.patch_embeddings[0].proj

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.weight[0, 0].numel() // module.groups
            init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            if module.weight is not None:
                init.ones_(module.weight)
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
        else:
            return
        if module.bias is not None:
            init.zeros_(module.bias)

    def _resolve_switches(self, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
        """Return both switches, from the configuration where the caller passed None."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return bool(output_attentions), bool(output_hidden_states)


class SegFormerModel(SegFormerPreTrainedModel):
    """The encoder alone.

    Examples:
        >>> import torch
        >>> from hf_segformer import SegFormerConfig, SegFormerModel
        >>> model = SegFormerModel(SegFormerConfig.from_variant("b0")).eval()
        >>> outputs = model(torch.zeros(1, 3, 64, 96), output_hidden_states=True)
        >>> [tuple(features.shape) for features in outputs.hidden_states]
        [(1, 32, 16, 24), (1, 64, 8, 12), (1, 160, 4, 6), (1, 256, 2, 3)]
    """

    _auto_class: ClassVar[str | None] = "AutoModel"

    def __init__(self, config: SegFormerConfig):
        super().__init__(config)
        self.encoder = SegFormerEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """Encode images.

        Args:
            pixel_values: (B, num_channels, height, width), normalized; sides of at least 8 pixels.
            output_attentions: True returns every block's maps (B, A, N, M) and runs eager attention for this call.
            output_hidden_states: True returns every stage's features (B, C, H, W).

        Returns:
            `last_hidden_state` is the last stage's (B, C, H, W), or (B, N, C) with `reshape_last_stage=False`.

        Raises:
            ValueError: if `pixel_values` has another shape.
        """
        output_attentions, output_hidden_states = self._resolve_switches(output_attentions, output_hidden_states)
        stages, attentions = self.encoder(pixel_values, output_attentions)
        last = stages[-1] if self.config.reshape_last_stage else features_to_tokens(stages[-1])
        return BaseModelOutput(
            last_hidden_state=last,
            hidden_states=stages if output_hidden_states else None,
            attentions=attentions,
        )


class SegFormerBackbone(BackboneMixin, SegFormerPreTrainedModel):
    """The encoder as a backbone for other heads: feature maps of selected stages.

    Examples:
        >>> import torch
        >>> from hf_segformer import SegFormerBackbone, SegFormerConfig
        >>> backbone = SegFormerBackbone(SegFormerConfig.from_variant("b0", out_features=["stage2", "stage4"])).eval()
        >>> [tuple(features.shape) for features in backbone(torch.zeros(1, 3, 64, 96)).feature_maps]
        [(1, 64, 8, 12), (1, 256, 2, 3)]
        >>> backbone.channels
        [64, 256]
    """

    _auto_class: ClassVar[str | None] = "AutoBackbone"

    def __init__(self, config: SegFormerConfig):
        super().__init__(config)
        self.num_features = list(config.hidden_sizes)
        self.encoder = SegFormerEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BackboneOutput:
        """Encode images; arguments and errors as for `SegFormerModel`.

        Returns:
            `feature_maps` holds (B, C, H, W) of the stages named in `config.out_features`, in their order.
        """
        output_attentions, output_hidden_states = self._resolve_switches(output_attentions, output_hidden_states)
        stages, attentions = self.encoder(pixel_values, output_attentions)
        return BackboneOutput(
            feature_maps=tuple(stages[self.stage_names.index(name)] for name in self.out_features),
            hidden_states=stages if output_hidden_states else None,
            attentions=attentions,
        )


class SegFormerForImageClassification(SegFormerPreTrainedModel):
    """The encoder with a linear classifier over the mean token, as pre-trained on ImageNet.

    Examples:
        >>> import torch
        >>> from hf_segformer import SegFormerConfig, SegFormerForImageClassification
        >>> model = SegFormerForImageClassification(SegFormerConfig.from_variant("b0", num_labels=10)).eval()
        >>> tuple(model(torch.zeros(1, 3, 64, 96)).logits.shape)
        (1, 10)
    """

    _auto_class: ClassVar[str | None] = "AutoModelForImageClassification"

    def __init__(self, config: SegFormerConfig):
        super().__init__(config)
        self.segformer = SegFormerModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.loss_type = "ForSequenceClassification"  # by default Transformers uses the class's name
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, num_channels, height, width).
            labels: (B,) classes of any integer type; (B, K) floats in [0, 1] for several labels per image; or floats
                for a regression where `num_labels` is 1.
            output_attentions: as for `SegFormerModel`.
            output_hidden_states: as for `SegFormerModel`.

        Returns:
            `logits` (B, K), and `loss` if labels are given.

        Raises:
            ValueError: if `pixel_values` or class labels have a wrong shape, type or range.
        """
        output_attentions, output_hidden_states = self._resolve_switches(output_attentions, output_hidden_states)
        stages, attentions = self.segformer.encoder(pixel_values, output_attentions)
        logits = self.classifier(stages[-1].mean(dim=(2, 3)))
        loss = None
        if labels is not None:
            if self.config.num_labels > 1 and not torch.is_floating_point(labels):
                labels = check_labels(labels, (len(logits),), self.config.num_labels, ignore_index=-100)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=stages if output_hidden_states else None,
            attentions=attentions,
        )


def without_loss(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the network's part of a state dict: a loss that is a module has its tensors there, too."""
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith("loss_function.")}


class SegFormerForSemanticSegmentation(SegFormerPreTrainedModel):
    """The encoder with the all-MLP decode head: SegFormer itself.

    The loss is `upsample_cross_entropy` unless `model.loss_function` is set to another function or module of logits,
    labels and `ignore_index`; None restores it. It is not saved with the model: set it again after loading.

    Examples:
        >>> import torch
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig.from_variant("b0", num_labels=19)).eval()
        >>> tuple(model(torch.zeros(1, 3, 64, 96)).logits.shape)
        (1, 19, 16, 24)
    """

    _auto_class: ClassVar[str | None] = "AutoModelForSemanticSegmentation"

    def __init__(self, config: SegFormerConfig):
        super().__init__(config)
        self.segformer = SegFormerModel(config)
        self.decode_head = SegFormerDecodeHead(config)
        self.post_init()

    @property
    def loss_function(self) -> Callable[..., torch.Tensor]:
        """Function of logits, labels and `ignore_index`; `upsample_cross_entropy` unless it was set."""
        # PyTorch stores a module without calling the setter; Transformers 5 would choose by the class's name.
        chosen = self._modules.get("loss_function", getattr(self, "_loss_function", None))
        return upsample_cross_entropy if chosen is None else chosen

    @loss_function.setter
    def loss_function(self, value: Callable[..., torch.Tensor] | None) -> None:
        self._loss_function = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; in place of a module PyTorch would take no function for the loss."""
        if name == "loss_function":
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model as Transformers does, without the tensors of its loss."""
        loss = self.loss_function
        names = loss.state_dict() if isinstance(loss, nn.Module) else ()
        self._keys_to_ignore_on_save = {f"loss_function.{name}" for name in names}
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the head as the original code does: PyTorch's defaults, and Kaiming for the fusing convolution."""
        head = self.decode_head
        if not isinstance(head, SegFormerDecodeHead):  # a subclass has its own
            super()._init_weights(module)
        elif module is head.linear_fuse:
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif module is head.classifier or any(module is linear.proj for linear in head.linear_c):
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> SemanticSegmenterOutput:
        """Segment images.

        Args:
            pixel_values: (B, num_channels, height, width), normalized; sides of at least 8 pixels.
            labels: (B, height, width) of any integer type: 0..K-1 or `config.semantic_loss_ignore_index`; 0 and 1 if
                `num_labels` is 1. Their size may differ from that of the images.
            output_attentions: as for `SegFormerModel`.
            output_hidden_states: as for `SegFormerModel`.

        Returns:
            `logits` (B, K, ceil(height / 4), ceil(width / 4)), and `loss` if labels are given: the mean over the
            valid pixels, 0 if there are none.

        Raises:
            ValueError: if `pixel_values` or `labels` have a wrong shape, type or range.
        """
        output_attentions, output_hidden_states = self._resolve_switches(output_attentions, output_hidden_states)
        stages, attentions = self.segformer.encoder(pixel_values, output_attentions)
        logits = self.decode_head(stages)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, ignore_index=self.config.semantic_loss_ignore_index)
        return SemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=stages if output_hidden_states else None,
            attentions=attentions,
        )


__all__ = [
    "SegFormerBackbone",
    "SegFormerForImageClassification",
    "SegFormerForSemanticSegmentation",
    "SegFormerModel",
    "SegFormerPreTrainedModel",
    "without_loss",
]
