"""Masked image modeling: SimMIM (Xie et al. 2022) for a hierarchical encoder with overlapping patch embeddings.

SimMIM replaces the tokens of hidden patches after the patch embedding. SegFormer's windows overlap: a token beside a
hidden patch would still see three of its pixels. So the pixels are replaced before it, by a learned colour. The encoder
stays as it is, and nothing of what is hidden reaches it.

Axes: B images, C bands, H W pixels, h w sides of the grid of patches.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..configuration_segformer import SegFormerConfig
from ..modeling_segformer import SegFormerModel, SegFormerPreTrainedModel


@dataclass
class MaskedImageOutput(ModelOutput):
    """Output of `SegFormerForMaskedImages`.

    Attributes:
        loss: mean absolute error of hidden pixels; None without `return_loss`.
        reconstruction: (B, C, H, W).
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None


class SegFormerForMaskedImages(SegFormerPreTrainedModel):
    """The encoder with a linear head that reconstructs masked patches; keep `model.segformer` after pre-training.

    Examples:
        >>> import torch
        >>> from hf_segformer import SegFormerConfig
        >>> from hf_segformer.training.masked_images import SegFormerForMaskedImages
        >>> model = SegFormerForMaskedImages(SegFormerConfig.from_variant("b0"))
        >>> mask = torch.zeros(1, 2, 3, dtype=torch.bool)
        >>> mask[:, 0, 1] = True
        >>> tuple(model(torch.zeros(1, 3, 64, 96), mask).reconstruction.shape)
        (1, 3, 64, 96)
    """

    def __init__(self, config: SegFormerConfig):
        super().__init__(config)
        self.segformer = SegFormerModel(config)
        self.stride = prod(config.strides)
        self.mask_color = nn.Parameter(torch.zeros(config.num_channels))
        self.decoder = nn.Conv2d(config.hidden_sizes[-1], config.num_channels * self.stride**2, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the head as SimMIM's code does: PyTorch's defaults."""
        if module is self:
            init.zeros_(self.mask_color)  # the mean of normalized images
        elif module is self.decoder:
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    def forward(self, pixel_values: Tensor, mask: Tensor, return_loss: bool = True) -> MaskedImageOutput:
        """Draw hidden patches.

        Args:
            pixel_values: (B, C, H, W), normalized.
            mask: bool (B, h, w), True for patches of H / h x W / w pixels that are hidden.
            return_loss: compute the loss.

        Returns:
            `reconstruction` (B, C, H, W), and `loss`, the mean absolute error over the hidden pixels.

        Raises:
            ValueError: if `pixel_values` has a wrong shape, or sides that the patches do not divide.
        """
        self.segformer.encoder.check(pixel_values)
        hidden = expand_mask(mask, pixel_values.shape[-2], pixel_values.shape[-1])
        color = self.mask_color[:, None, None].to(pixel_values.dtype)
        stages, _ = self.segformer.encoder(torch.where(hidden, color, pixel_values))
        drawn = F.pixel_shuffle(self.decoder(stages[-1]), self.stride)
        drawn = drawn[..., : pixel_values.shape[-2], : pixel_values.shape[-1]]
        loss = masked_l1_loss(drawn, pixel_values, hidden) if return_loss else None
        return MaskedImageOutput(loss, drawn)


def expand_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Expand a grid of patches to pixels: bool (B, h, w) -> (B, 1, H, W).

    Raises:
        ValueError: if the patches do not divide the sides.
    """
    rows, columns = mask.shape[-2:]
    if height % rows or width % columns:
        raise ValueError(
            f"mask is a grid of {rows}x{columns} patches; expected one that divides {height}x{width} pixels"
        )
    return mask.repeat_interleave(height // rows, -2).repeat_interleave(width // columns, -1)[:, None]


def masked_l1_loss(drawn: Tensor, pixel_values: Tensor, hidden: Tensor) -> Tensor:
    """Mean absolute error over hidden pixels, in float32; 0 if none is hidden.

    Args:
        drawn: (B, C, H, W).
        pixel_values: (B, C, H, W).
        hidden: bool (B, 1, H, W).
    """
    error = (drawn.float() - pixel_values.float()).abs() * hidden
    return error.sum() / (hidden.sum() * drawn.shape[1]).clamp(min=1)


__all__ = ["MaskedImageOutput", "SegFormerForMaskedImages", "expand_mask", "masked_l1_loss"]
