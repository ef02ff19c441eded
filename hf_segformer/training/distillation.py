"""Knowledge distillation: a trained model as a second target beside the masks (Hinton et al. 2015).

At every position of the logits, a quarter of the image's side, the student learns the probabilities that its teacher
gives to the same augmented crop; pixel by pixel as in Liu et al. 2019, section 3.1. Axes: B images, C channels, K
classes, h w sides of the logits, H W sides of the masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import DistillationConfig
from ..conversion.loading import digest_of_weights, load_segmentation
from ..hub.model_card import is_hub_id
from ..image_processing_segformer import SegFormerImageProcessor
from ..modeling_segformer import SegFormerForSemanticSegmentation
from ..upsampling_segformer import at_least_float32, upsample


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float, is_counted: Tensor) -> Tensor:
    """Compute T^2 KL(teacher || student) of probabilities softened by T, at least in float32.

    The factor keeps gradients at the size that they have without softening (Hinton et al. 2015, section 2.1).

    Args:
        logits: (B, K, h, w) of the student; one logit is two classes, background at log odds 0 and foreground.
        teacher_logits: (B, K, h, w).
        temperature: T.
        is_counted: (B, h, w), positions to take the mean over; without any the loss is 0 with zero gradient.

    Examples:
        >>> import math, torch
        >>> from hf_segformer.training.distillation import distillation_loss
        >>> teacher, student = torch.tensor([3.0, 1.0]).log(), torch.zeros(2)
        >>> every = torch.ones(1, 1, 1, dtype=torch.bool)
        >>> loss = distillation_loss(student.view(1, 2, 1, 1), teacher.view(1, 2, 1, 1), 1.0, every)
        >>> math.isclose(loss, 0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel_tol=1e-6)
        True
    """
    student, teacher = (_log_probabilities(each, temperature) for each in (logits, teacher_logits))
    divergence = (teacher.exp() * (teacher - student)).sum(1) * is_counted
    return temperature**2 * divergence.sum() / is_counted.sum().clamp(min=1)


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    logits = at_least_float32(logits) / temperature
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    return F.log_softmax(logits, dim=1)


@dataclass
class Teacher:
    """A model in eval mode, and how a student learns from it; `load_teacher` makes one.

    Args:
        model: the teacher.
        source: where it came from.
        config: weight and temperature.
        order: (K,) the teacher's number of each of the student's classes.
        factor: (C, 1, 1) by which the student's input is multiplied to get the teacher's.
        offset: (C, 1, 1) that is added then.
    """

    model: SegFormerForSemanticSegmentation
    source: str
    config: DistillationConfig
    order: Tensor
    factor: Tensor
    offset: Tensor

    def __post_init__(self):
        self.model.requires_grad_(False).eval()
        self.digest = digest_of_weights(self.model)

    def to(self, device: torch.device) -> "Teacher":
        """Move it to a device."""
        self.model.to(device)
        self.order, self.factor, self.offset = (each.to(device) for each in (self.order, self.factor, self.offset))
        return self

    @torch.no_grad()
    def logits(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) as the student sees it -> (B, K, h, w), in the order of the student's classes."""
        return self.model(pixel_values * self.factor + self.offset).logits[:, self.order]

    def loss(self, logits: Tensor, pixel_values: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """Weighted distillation loss of a batch.

        Args:
            logits: (B, K, h, w) of the student.
            pixel_values: (B, C, H, W), the student's input.
            labels: (B, H, W); a position counts unless all pixels of the mask below it are ignored, as in padding.
            ignore_index: label of those.
        """
        teacher = self.logits(pixel_values)
        if teacher.shape[-2:] != logits.shape[-2:]:
            teacher = upsample(at_least_float32(teacher), logits.shape[-2:])
        is_counted = F.adaptive_max_pool2d((labels != ignore_index).float()[:, None], logits.shape[-2:])[:, 0] > 0
        return self.config.weight * distillation_loss(logits, teacher, self.config.temperature, is_counted)

    def describe(self) -> dict[str, Any]:
        """Name, size and digest for the run record; the path of a local folder is left out."""
        is_on_hub = is_hub_id(self.source) and not Path(self.source).exists()
        name = self.source if is_on_hub else None
        return {"name": name, "parameters": self.model.num_parameters(), "digest": self.digest}


def load_teacher(config: DistillationConfig, names: Sequence[str], processor: SegFormerImageProcessor) -> Teacher:
    """Load a teacher and compare its classes and images with the student's.

    Args:
        config: its folder or Hub repository, weight and temperature.
        names: the student's class names, in order of its labels.
        processor: what prepares the student's images. Another mean and deviation of the teacher's is converted.

    Raises:
        ValueError: if the teacher has other classes, channels or value range, or is no segmentation model.
        OSError: if it cannot be found or read.
    """
    try:
        model, own = load_segmentation(config.teacher)
    except OSError as error:
        raise OSError(
            f"distill.teacher is {config.teacher}, which cannot be loaded ({' '.join(str(error).split())}); expected a "
            "folder with a model, or a Hub repository and a network"
        ) from error
    found = [model.config.id2label[index].strip() for index in range(model.config.num_labels)]
    if sorted(found) != sorted(names):
        raise ValueError(
            f"distill.teacher {config.teacher} has the classes {', '.join(found)}; expected those of the data: "
            f"{', '.join(names)}"
        )
    num_channels = len(processor.image_mean)
    if model.config.num_channels != num_channels or own.value_range != processor.value_range:
        raise ValueError(
            f"distill.teacher {config.teacher} takes images of {model.config.num_channels} channels and value range "
            f"{own.value_range}; expected {num_channels} and {processor.value_range}, as the data have"
        )
    (scale, shift), (own_scale, own_shift) = _affine(processor), _affine(own)
    factor = own_scale / scale
    return Teacher(
        model,
        config.teacher,
        config,
        torch.tensor([found.index(name) for name in names]),
        factor[:, None, None].float(),
        (own_shift - shift * factor)[:, None, None].float(),
    )


def _affine(processor: SegFormerImageProcessor) -> tuple[Tensor, Tensor]:
    """(C,) factor and summand by which a processor makes its output of an image's values."""
    scale = torch.full((len(processor.image_mean),), processor.rescale_factor if processor.do_rescale else 1.0).double()
    if not processor.do_normalize:
        return scale, torch.zeros_like(scale)
    mean, std = (torch.tensor(each).double() for each in (processor.image_mean, processor.image_std))
    return scale / std, -mean / std


__all__ = ["Teacher", "distillation_loss", "load_teacher"]
