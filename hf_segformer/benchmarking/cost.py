"""Parameters and multiply-adds of a SegFormer by stage, computed from its configuration.

Multiply-adds are those of convolutions and matrix products, which the paper calls FLOPs; norms, activations and
interpolation are not counted.

Axes: H W grid of a stage, N = H*W tokens, M tokens after reduction, C channels, D width of the decode head.
"""

from dataclasses import dataclass
from pathlib import Path

from ..configuration_segformer import VARIANTS, SegFormerConfig, closest, default_ignore_index
from ..conversion.checkpoints import folder_config, is_repository, read_config
from ..conversion.convert import convert_checkpoint

MIN_SIDE = 8
_TITLES = ("", "grid", "tokens N", "channels", "heads", "reduction", "reduced M", "attention", "parameters")
_HEADER = (*_TITLES, "multiply-adds", "share")


@dataclass(frozen=True)
class InfoRow:
    """One stage or one head of a model, at one image size.

    Attributes:
        name: `"stage1"`, ..., or `"decode head"`, `"classifier"`.
        grid: H, W.
        num_channels: C of a stage, D of the decode head.
        num_parameters: number of trained parameters.
        num_multiply_adds: number for one image.
        num_heads: attention heads; None outside stages, as are the next two.
        reduction: reduction of keys and values along each side.
        num_reduced_tokens: M, the number of tokens that each token attends to.
    """

    name: str
    grid: tuple[int, int]
    num_channels: int
    num_parameters: int
    num_multiply_adds: int
    num_heads: int | None = None
    reduction: int | None = None
    num_reduced_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """N, the number of cells of the grid."""
        return self.grid[0] * self.grid[1]


def model_info(config: SegFormerConfig, height: int, width: int) -> list[InfoRow]:
    """Return one row per stage and one for the head that `config.architectures` names, by default the decode head.

    Args:
        config: configuration of a SegFormer.
        height: image height, at least 8 pixels.
        width: image width, at least 8 pixels.

    Raises:
        ValueError: if a side is below 8 pixels.

    Examples:
        >>> from hf_segformer import SegFormerConfig
        >>> from hf_segformer.benchmarking.cost import model_info
        >>> stage = model_info(SegFormerConfig.from_variant("b2"), 128, 128)[0]
        >>> stage.grid, stage.num_tokens, stage.num_channels, stage.num_reduced_tokens
        ((32, 32), 1024, 64, 16)
    """
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"the image is {height}x{width}; expected sides of at least {MIN_SIDE} pixels")
    rows: list[InfoRow] = []
    grid, num_channels = (height, width), config.num_channels
    for stage in range(config.num_encoder_blocks):
        rows.append(_stage_info(config, stage, grid, num_channels))
        grid, num_channels = rows[-1].grid, rows[-1].num_channels
    architecture = (config.architectures or ["SegFormerForSemanticSegmentation"])[0]
    if architecture.endswith("ForSemanticSegmentation"):
        rows.append(_decode_head_info(config, rows))
    elif architecture.endswith("ForImageClassification"):
        parameters = _linear(num_channels, config.num_labels)
        rows.append(InfoRow("classifier", (1, 1), num_channels, parameters, num_channels * config.num_labels))
    return rows


def decode_head_cost(config: SegFormerConfig, stages: list[InfoRow], folded: bool) -> int:
    """Return the multiply-adds of the decode head (paper section 3.2).

    Folded, as in this package, each stage is projected by the product of two weights, which is computed once per batch
    and counted here once. Unfolded, as in the paper, all stages are fused at the first stage's size.
    """
    width, tokens = config.decoder_hidden_size, stages[0].num_tokens
    linear = sum(stage.num_tokens * stage.num_channels * width for stage in stages)
    fold = sum(stage.num_channels * width**2 for stage in stages)
    fuse = tokens * len(stages) * width**2
    return linear + (fold if folded else fuse) + tokens * width * config.num_labels


def _linear(inputs: int, outputs: int) -> int:
    """Return the parameters of a linear layer or convolution with bias."""
    return (inputs + 1) * outputs


def _stage_info(config: SegFormerConfig, stage: int, grid: tuple[int, int], num_channels: int) -> InfoRow:
    """Return the row of a stage (paper section 3.1) for features of that size and number of channels."""
    kernel, stride, ratio = config.patch_sizes[stage], config.strides[stage], config.sr_ratios[stage]
    channels = config.hidden_sizes[stage]
    hidden = channels * config.mlp_ratios[stage]
    height, width = ((side + 2 * (kernel // 2) - kernel) // stride + 1 for side in grid)
    tokens = height * width
    reduced = max(height // ratio, 1) * max(width // ratio, 1)  # a side below the ratio is padded to it
    norm = 2 * channels

    block = 2 * norm + 4 * _linear(channels, channels)
    block += _linear(channels, hidden) + _linear(9, hidden) + _linear(hidden, channels)
    projections = 2 * (tokens + reduced) * channels**2
    attention = 2 * tokens * reduced * channels
    mix_ffn = tokens * hidden * (2 * channels + 9)
    cost = projections + attention + mix_ffn
    if ratio > 1:
        block += _linear(ratio**2 * channels, channels) + norm
        cost += reduced * ratio**2 * channels**2
    depth, window = config.depths[stage], kernel**2 * num_channels
    return InfoRow(
        name=f"stage{stage + 1}",
        grid=(height, width),
        num_channels=channels,
        num_parameters=_linear(window, channels) + 2 * norm + depth * block,
        num_multiply_adds=tokens * window * channels + depth * cost,
        num_heads=config.num_attention_heads[stage],
        reduction=ratio,
        num_reduced_tokens=reduced,
    )


def _decode_head_info(config: SegFormerConfig, stages: list[InfoRow]) -> InfoRow:
    width = config.decoder_hidden_size
    linear = sum(_linear(stage.num_channels, width) for stage in stages)
    fuse_and_norm = len(stages) * width**2 + 2 * width
    return InfoRow(
        name="decode head",
        grid=stages[0].grid,
        num_channels=width,
        num_parameters=linear + fuse_and_norm + _linear(width, config.num_labels),
        num_multiply_adds=decode_head_cost(config, stages, folded=True),
    )


def load_config(source: str, num_labels: int | None = None) -> SegFormerConfig:
    """Return the configuration of a variant, a config.json, a checkpoint (file or folder) or a Hub repository.

    Args:
        source: one of these.
        num_labels: replaces the number of labels.

    Raises:
        OSError: if a file or repository cannot be read.
        ValueError: if the source is none of these, or another network's, or the number of labels is out of range.
    """
    config = _load_config(source)
    if num_labels is not None:
        config.num_labels, config.semantic_loss_ignore_index = num_labels, default_ignore_index(num_labels)
        config.check()
    return config


def _load_config(source: str) -> SegFormerConfig:
    if source in VARIANTS:
        return SegFormerConfig.from_variant(source)
    path = Path(source)
    if not path.exists() and not is_repository(source):
        raise ValueError(f"{source!r} is no file, folder, Hub repository or variant: {closest(source, VARIANTS)}")
    if path.suffix == ".json" or not path.exists():
        return read_config(source)
    return folder_config(path) or convert_checkpoint(path).config


def format_info(config: SegFormerConfig, height: int, width: int) -> str:
    """Return the rows of `model_info` as a table, with the total and the saving of the folded decode head."""
    rows = model_info(config, height, width)
    parameters = sum(row.num_parameters for row in rows)
    total = sum(row.num_multiply_adds for row in rows)
    lines = [_HEADER, *(_cells(row, total) for row in rows)]
    lines.append(("total", *[""] * 7, *_costs(parameters, total, total)))
    name_width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    table = [
        "  ".join([name.ljust(name_width), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for name, *cells in lines
    ]
    labels = f"{config.num_labels} labels" if len(rows) > config.num_encoder_blocks else "no head"
    title = f"{height}x{width} pixels, {config.num_channels} channels, {labels}"
    return "\n".join([title, *table, *_fold_note(config, rows)])


def _cells(row: InfoRow, total: int) -> tuple[str, ...]:
    attention = ("", "", "", "")
    if row.num_reduced_tokens is not None:
        maps = f"{row.num_tokens}x{row.num_reduced_tokens}"
        attention = (str(row.num_heads), str(row.reduction), str(row.num_reduced_tokens), maps)
    place = (row.name, f"{row.grid[0]}x{row.grid[1]}", str(row.num_tokens), str(row.num_channels))
    return (*place, *attention, *_costs(row.num_parameters, row.num_multiply_adds, total))


def _costs(parameters: int, multiply_adds: int, total: int) -> tuple[str, str, str]:
    return f"{parameters:,}", f"{multiply_adds / 1e6:,.1f} M", f"{multiply_adds / total:.1%}"


def _fold_note(config: SegFormerConfig, rows: list[InfoRow]) -> list[str]:
    if rows[-1].name != "decode head":
        return []
    unfolded = decode_head_cost(config, rows[:-1], folded=False)
    total = sum(row.num_multiply_adds for row in rows[:-1]) + unfolded
    return [
        f"The decode head is folded. As in the paper it would take {unfolded / 1e6:,.1f} M, "
        f"and the whole model {total / 1e6:,.1f} M."
    ]


__all__ = ["MIN_SIDE", "InfoRow", "decode_head_cost", "format_info", "load_config", "model_info"]
