"""SegFormer: simple and efficient semantic segmentation with transformers (Xie et al. 2021, arXiv 2105.15203).

Four stages, each an overlapping patch embedding and a row of transformer blocks, give feature maps at 1/4, 1/8, 1/16
and 1/32 of the image; an all-MLP head joins them. Modules and parameters bear the names of the published files, so a
state dict, a Trainer checkpoint and a published file agree without any renaming.

Tokens are laid out so that (B, N, C) and a channels-last (B, C, H, W) share memory: turning one into the other copies
nothing.

Axes: B batch, C channels, H W a stage's grid, N = H*W tokens, M tokens left after reduction, A heads, K classes.
"""

from collections.abc import Callable
from typing import ClassVar

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
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .configuration_segformer import SegFormerConfig
from .cpu_decode_head_segformer import decode, decode_training, is_decodable
from .cpu_encoder_segformer import AttentionWeights, MixWeights, are_encodable, attend, mix
from .cpu_runtime_segformer import plain_linear
from .dispatch_segformer import (
    are_fast_paths_on,
    is_exactly,
    is_idle,
    is_untouched,
    kernel,
    linear_weights,
    needs_gradient,
)
from .upsampling_segformer import at_least_float32, check_labels, upsample, upsample_cross_entropy

logger = logging.get_logger(__name__)

_ExactGELU = type(ACT2FN["gelu"])


def tokens_to_features(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, N, C) -> (B, C, H, W), a channels-last view of the same memory; a copy while compiling."""
    features = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    # Inductor can not order the strides of a channels-last view of symbolic size (PyTorch 2.13); it fuses the copy.
    return features.contiguous() if torch.compiler.is_compiling() else features


def features_to_tokens(features: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, C); copies nothing where the features are channels-last."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)


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
        return tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self, tokens: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, C) -> (B, N, C) and, on demand, attention maps (B, A, N, M)."""
        reduced = self.reduce(tokens, height, width) if self.sr_ratio > 1 else tokens
        attend = eager_attention_forward
        if not output_attentions:  # only eager attention has maps to give
            implementation = self.config._attn_implementation
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        context, maps = attend(
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

    def weights(self) -> AttentionWeights | None:
        """What `attend` computes with, or None where it would not do what the modules do."""
        inner, output = self.self, self.output
        if (
            type(inner) is SegFormerEfficientSelfAttention
            and type(output) is SegFormerSelfOutput
            and all(map(is_untouched, (self, inner, output)))
            and is_idle(output.dropout)
            and inner.config._attn_implementation == "sdpa"
            and not (inner.training and inner.config.attention_probs_dropout_prob)
            and (weights := linear_weights(inner.query, inner.key, inner.value, output.dense))
        ):
            return AttentionWeights(*weights)
        return None

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

    def is_as_built(self) -> bool:
        """Whether it still is a zero-padded depthwise 3x3 convolution and nothing else."""
        convolution = self.dwconv
        return (
            is_exactly(convolution, nn.Conv2d)
            and convolution.kernel_size == (3, 3)
            and convolution.stride == convolution.padding == convolution.dilation == (1, 1)
            and convolution.groups == convolution.in_channels == convolution.out_channels
            and convolution.padding_mode == "zeros"
        )

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

    def weights(self, norm: nn.Module) -> MixWeights | None:
        """What `mix` computes with, the norm before it included, or None where it would not do what the modules do."""
        if (
            type(self.dwconv) is SegFormerDWConv
            and type(self.activation) is _ExactGELU
            and all(map(is_untouched, (self, self.dwconv, self.activation)))
            and is_idle(self.dropout)
            and is_exactly(norm, nn.LayerNorm)
            and self.dwconv.is_as_built()
            and (weights := linear_weights(self.dense1, self.dense2))
        ):
            convolution = self.dwconv.dwconv
            return MixWeights(
                *(norm.weight, norm.bias, *weights[:2], convolution.weight, convolution.bias, *weights[2:])
            )
        return None

    def convolve(self, hidden: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Depthwise convolution and activation: (B, N, E) -> (B, N, E); a kernel where there is one."""
        if (
            type(self.dwconv) is SegFormerDWConv
            and type(self.activation) is _ExactGELU
            and all(map(is_untouched, (self.dwconv, self.activation)))
            and self.dwconv.is_as_built()
        ):
            weight, bias = self.dwconv.dwconv.weight, self.dwconv.dwconv.bias
            fused = None if bias is None else kernel("depthwise_gelu", hidden, weight, bias)
            if fused is not None:
                return fused(hidden, weight, bias, height, width)
        return self.activation(self.dwconv(hidden, height, width))

    def forward(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        hidden = self.convolve(self.dense1(tokens), height, width)
        return self.dropout(self.dense2(self.dropout(hidden)))


class SegFormerDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a residual branch for whole samples while training."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def is_active(self) -> bool:
        """Whether it may drop anything now."""
        return self.training and self.probability > 0.0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        if not self.is_active():
            return tokens
        keep = torch.full((tokens.shape[0], 1, 1), 1 - self.probability, device=tokens.device)
        return tokens * (torch.bernoulli(keep) / keep).to(tokens.dtype)

    def extra_repr(self) -> str:
        """The probability, for `print(model)`."""
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

    def add_attended(
        self, tokens: torch.Tensor, height: int, width: int, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, C) -> (B, N, C) and, on demand, attention maps (B, A, N, M)."""
        normed, attention = self.layer_norm_1(tokens), self.attention
        weights = None
        if not output_attentions and type(attention) is SegFormerAttention:
            weights = attention.weights()
        if weights is not None and not self.drop_path.is_active() and are_encodable(tokens, normed, *weights):
            reduced = attention.self.reduce(normed, height, width) if attention.self.sr_ratio > 1 else normed
            if not (torch.compiler.is_compiling() and needs_gradient(reduced)):  # of the reduction alone
                return attend(tokens, normed, reduced, weights, attention.self.head_dim), None
        attended, maps = attention(normed, height, width, output_attentions)
        return tokens + self.drop_path(attended), maps

    def add_mixed(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        weights = self.mlp.weights(self.layer_norm_2) if type(self.mlp) is SegFormerMixFFN else None
        if weights is None or not are_encodable(tokens, *weights):
            return tokens + self.drop_path(self.mlp(self.layer_norm_2(tokens), height, width))
        residual = not self.drop_path.is_active()
        mixed = mix(tokens, height, width, weights, self.layer_norm_2.eps, residual)
        return mixed if residual else tokens + self.drop_path(mixed)

    def forward(
        self, tokens: torch.Tensor, height: int, width: int, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, C) -> (B, N, C) and, on demand, attention maps (B, A, N, M)."""
        tokens, maps = self.add_attended(tokens, height, width, output_attentions)
        return self.add_mixed(tokens, height, width), maps


class SegFormerEncoder(nn.Module):
    """The Mix Transformer encoder (paper section 3.1). The published names keep its stages side by side."""

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
        """(B, bands, height, width) -> each stage's features (B, C, H, W) and, on demand, each block's maps."""
        self.check(pixel_values)
        implementation = self.config._attn_implementation
        if output_attentions and implementation != "eager" and not torch.compiler.is_compiling():
            logger.warning_once(f"{implementation!r} attention gives no maps: this call runs eager attention")
        dtype = self.patch_embeddings[0].proj.weight.dtype
        features = pixel_values.to(dtype).contiguous(memory_format=torch.channels_last)
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
        """Raise ValueError unless `pixel_values` is (B, num_channels, height, width) of real numbers."""
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            kind = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise ValueError(
                f"pixel_values are of type {kind}, but the model takes a tensor of normalised real numbers: "
                "SegFormerImageProcessor makes it"
            )
        num_channels = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, but the model takes "
                f"(batch, {num_channels}, height, width): config.num_channels is {num_channels}"
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

    Up to BatchNorm everything is linear at each pixel, and bilinear weights sum to one. So the fusing convolution's
    columns for one stage may be multiplied into that stage's linear layer, applied at that stage's own resolution,
    and the results upsampled and summed: the same numbers for a tenth of the multiplications. The product is formed
    anew in every call, in inference and in training, because parameters change behind any cache's back. On a CPU the
    rest of the head runs in bands of rows, too (see `cpu_decode_head_segformer`).
    """

    def __init__(self, config: SegFormerConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.linear_c = nn.ModuleList(SegFormerMLP(config, hidden_size) for hidden_size in config.hidden_sizes)
        self.linear_fuse = nn.Conv2d(width * len(config.hidden_sizes), width, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(config.classifier_dropout_prob)
        self.classifier = nn.Conv2d(width, config.num_labels, 1)

    def fuse_plain(self, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Each stage's (B, C, H, W) -> (B, D, H, W) at the first stage's size, as the paper writes it."""
        first, *others = [linear(stage) for linear, stage in zip(self.linear_c, features, strict=True)]
        projected = [first, *(upsample(stage, first.shape[-2:]) for stage in others)]
        return self.linear_fuse(torch.cat(projected[::-1], dim=1))

    def fold(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Linear and fusing weights multiplied: a matrix (D, C) for each stage, and the bias (D,) of their sum."""
        matrices, biases = [], []
        columns = self.linear_fuse.weight.flatten(1).chunk(len(self.linear_c), dim=1)[::-1]
        for linear, column in zip(self.linear_c, columns, strict=True):
            with maybe_autocast(column.device.type, enabled=False):
                column = at_least_float32(column)
                matrices.append((column @ at_least_float32(linear.proj.weight)).to(linear.proj.weight.dtype))
                biases.append(column @ at_least_float32(linear.proj.bias))
        return matrices, sum(biases)

    def fuse_folded(self, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What `fuse_plain` gives, by the product of the weights."""
        matrices, bias = self.fold()
        add_up = kernel("upsample_sum", *features) if len(features) <= 4 else None
        if add_up is not None:
            return add_up(self.project(features, matrices, bias)).permute(0, 3, 1, 2)
        first, *others = [
            plain_linear(stage.permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2)
            for stage, matrix in zip(features, matrices, strict=True)
        ]
        fused = first + bias.to(first.dtype)[:, None, None]
        return sum((upsample(stage, first.shape[-2:]) for stage in others), fused)

    def project(
        self, features: tuple[torch.Tensor, ...], matrices: list[torch.Tensor], bias: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Each stage's (B, C, H, W) -> (B, H, W, D) by its matrix; the first one's gets the bias."""
        biases = [None if bias is None else bias.to(matrices[0].dtype), *[None] * (len(matrices) - 1)]
        return [
            F.linear(stage.permute(0, 2, 3, 1), matrix, bias)
            for stage, matrix, bias in zip(features, matrices, biases, strict=True)
        ]

    def activate_by_kernel(self, features: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """Each stage's (B, C, H, W) -> (B, D, H, W) after ReLU in one pass; None without a kernel, or in training."""
        norm = self.batch_norm
        activate = kernel("upsample_sum_relu", *features) if len(features) <= 4 else None
        if (
            activate is None
            or needs_gradient(*features, *self.parameters())
            or not (is_exactly(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.bias is not None)
            or norm.training
            or type(self.dropout) is not nn.Dropout2d
            or self.dropout.training
            or not is_untouched(self.dropout)
        ):
            return None
        matrices, bias = self.fold()
        # As BatchNorm itself computes them: in 16 bits a channel would be off everywhere in the same direction.
        variance, weight = at_least_float32(norm.running_var), at_least_float32(norm.weight)
        scale = weight * (variance + norm.eps).rsqrt()
        shift = (bias - norm.running_mean) * scale + norm.bias
        return activate(self.project(features, matrices, None), scale, shift).permute(0, 3, 1, 2)

    def is_foldable(self) -> bool:
        """Whether every layer before BatchNorm still is what it was built as."""
        fuse = self.linear_fuse
        return (
            is_exactly(fuse, nn.Conv2d)
            and fuse.bias is None
            and fuse.kernel_size == (1, 1)
            and all(
                type(linear) is SegFormerMLP
                and is_untouched(linear)
                and is_exactly(linear.proj, nn.Linear)
                and linear.proj.bias is not None
                for linear in self.linear_c
            )
        )

    def forward(self, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Each stage's (B, C, H, W) -> logits (B, K, H, W) at the first stage's size."""
        if not (are_fast_paths_on() and self.is_foldable()):
            fused = self.fuse_plain(features)
        elif (active := self.activate_by_kernel(features)) is not None:
            return self.classifier(active)
        elif not is_decodable(self, features):
            fused = self.fuse_folded(features)
        else:
            wants_gradient = needs_gradient(*features, *self.parameters())
            is_training = wants_gradient or self.batch_norm.training or self.dropout.training
            return (decode_training if is_training else decode)(self, features, *self.fold())
        return self.classifier(self.dropout(F.relu(self.batch_norm(fused))))


class SegFormerPreTrainedModel(PreTrainedModel):
    """What all SegFormer models share: the original's initialisation, and what Transformers may do with them."""

    config_class = SegFormerConfig
    base_model_prefix = "segformer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean already: the Trainer must not rescale it when it accumulates
    _no_split_modules = ["SegFormerLayer", "SegFormerDecodeHead"]  # noqa: RUF012 (the base class annotates it)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: SegFormerConfig):
        # Asked by what it can do: code that came with a checkpoint has a class of its own.
        if not hasattr(config, "check"):
            raise ValueError(
                f"config is a {type(config).__name__}, but {type(self).__name__} takes a SegFormerConfig: leave config "
                "out, or read it by SegFormerConfig.from_pretrained, which takes Transformers' own files too"
            )
        config.check()  # fields may have been set after construction
        super().__init__(config)

    def get_input_embeddings(self) -> nn.Module:
        """The first convolution: with a frozen base, reentrant checkpointing starts gradients at its output."""
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

    def _wanted(self, output_attentions: bool | None, output_hidden_states: bool | None) -> tuple[bool, bool]:
        """The two switches, from the configuration where the caller left them open."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return bool(output_attentions), bool(output_hidden_states)


class SegFormerModel(SegFormerPreTrainedModel):
    """The encoder alone.

    Example:
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
            pixel_values: (B, num_channels, height, width), normalised; sides of 8 pixels and up.
            output_attentions: whether to return every block's maps (B, A, N, M); runs eager attention for this call.
            output_hidden_states: whether to return every stage's features (B, C, H, W).

        Returns:
            `last_hidden_state` is the last stage's (B, C, H, W), or (B, N, C) with `reshape_last_stage=False`.

        Raises:
            ValueError: if `pixel_values` has another shape.
        """
        output_attentions, output_hidden_states = self._wanted(output_attentions, output_hidden_states)
        stages, attentions = self.encoder(pixel_values, output_attentions)
        last = stages[-1] if self.config.reshape_last_stage else features_to_tokens(stages[-1])
        return BaseModelOutput(
            last_hidden_state=last,
            hidden_states=stages if output_hidden_states else None,
            attentions=attentions,
        )


class SegFormerBackbone(BackboneMixin, SegFormerPreTrainedModel):
    """The encoder as a backbone for other heads: feature maps of chosen stages.

    Example:
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
        output_attentions, output_hidden_states = self._wanted(output_attentions, output_hidden_states)
        stages, attentions = self.encoder(pixel_values, output_attentions)
        return BackboneOutput(
            feature_maps=tuple(stages[self.stage_names.index(name)] for name in self.out_features),
            hidden_states=stages if output_hidden_states else None,
            attentions=attentions,
        )


class SegFormerForImageClassification(SegFormerPreTrainedModel):
    """The encoder with a linear classifier over the mean token, as it was pre-trained on ImageNet.

    Example:
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
        self.loss_type = "ForSequenceClassification"  # Transformers goes by the class's name, which subclasses change
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
            labels: (B,) classes of any integer type; (B, K) real numbers in [0, 1] for several labels an image; or
                real numbers for a regression where `num_labels` is 1.
            output_attentions: as for `SegFormerModel`.
            output_hidden_states: as for `SegFormerModel`.

        Returns:
            `logits` (B, K), and `loss` where labels are given.

        Raises:
            ValueError: if `pixel_values` or class labels have a wrong shape, type or range.
        """
        output_attentions, output_hidden_states = self._wanted(output_attentions, output_hidden_states)
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


class SegFormerForSemanticSegmentation(SegFormerPreTrainedModel):
    """The encoder with the all-MLP decode head: SegFormer itself.

    The loss is `upsample_cross_entropy` unless `model.loss_function` is set to another function or module of logits,
    labels and `ignore_index`; after loading it has to be set anew.

    Example:
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
        """Of logits, labels and `ignore_index`; what was set, or `upsample_cross_entropy`."""
        # PyTorch stores a module past the setter, and in 5.x the class's name would decide where nothing was set.
        return self._modules.get("loss_function", getattr(self, "_loss_function", upsample_cross_entropy))

    @loss_function.setter
    def loss_function(self, value: Callable[..., torch.Tensor]) -> None:
        self._loss_function = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The head starts as in the original: PyTorch's defaults, and Kaiming for the fusing convolution."""
        head = self.decode_head
        if not isinstance(head, SegFormerDecodeHead):  # a subclass brought its own
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
            pixel_values: (B, num_channels, height, width), normalised; sides of 8 pixels and up.
            labels: (B, height, width) of any integer type: 0..K-1 or `config.semantic_loss_ignore_index`; with one
                label 0 and 1. Their size need not be that of the images.
            output_attentions: as for `SegFormerModel`.
            output_hidden_states: as for `SegFormerModel`.

        Returns:
            `logits` (B, K, ceil(height / 4), ceil(width / 4)), and `loss` where labels are given: the mean over the
            pixels that count, 0 where there is none.

        Raises:
            ValueError: if `pixel_values` or `labels` have a wrong shape, type or range.
        """
        output_attentions, output_hidden_states = self._wanted(output_attentions, output_hidden_states)
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
]
