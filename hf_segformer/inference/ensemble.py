"""Ensembles: several models that predict as one, by the mean of their probabilities.

To the `Segmenter` the members are further views of an image, like its mirrored copy, so that sliding windows, rasters,
test-time augmentation, batch inference and evaluation work as with one model. An ensemble takes the time and the
weights' memory of all its members; the network runs one member at a time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..conversion.checkpoints import locate
from ..conversion.ensembles import is_ensemble, member_folders
from ..conversion.loading import load_segmentation
from ..files import differences
from ..image_processing_segformer import SegFormerImageProcessor

_NOT_COMPARED = ("auto_map", "image_processor_type", "processor_class")


class Ensemble(nn.Module):
    """Several segmentation models of the same classes.

    Args:
        members: at least one; they may differ in size. They agree in class names, channels and ignored label.

    Attributes:
        members: the models.
        config: that of the first one.

    Raises:
        ValueError: if they do not agree.

    Examples:
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
        >>> from hf_segformer.inference.ensemble import Ensemble
        >>> config = SegFormerConfig(depths=[1, 1, 1, 1], num_labels=5)
        >>> ensemble = Ensemble([SegFormerForSemanticSegmentation(config) for _ in range(3)])
        >>> ensemble.config.num_labels, len(ensemble.members)
        (5, 3)
    """

    def __init__(self, members: Sequence[PreTrainedModel]):
        super().__init__()
        if not members:
            raise ValueError("an ensemble has no members; expected at least one model")
        first, *others = members
        for place, other in enumerate(others, start=1):
            for name in ("num_labels", "id2label", "num_channels", "semantic_loss_ignore_index"):
                held, found = getattr(first.config, name, None), getattr(other.config, name, None)
                for key, value, wanted in differences(name, found, held):
                    raise ValueError(
                        f"member {place} of the ensemble has {key} {value}; expected that of member 0, {wanted}"
                    )
        self.members, self.config = nn.ModuleList(members), first.config

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.members[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.members[0].dtype

    def num_parameters(self) -> int:
        """Number of parameters of all members."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, pixel_values: torch.Tensor) -> Any:
        """Refuse: probabilities are averaged, which one set of logits cannot express before they are upsampled."""
        raise NotImplementedError("an ensemble has no logits of its own; predict by a Segmenter or a predictor")


def members_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """The members of an ensemble, or the model itself."""
    return tuple(model.members) if isinstance(model, Ensemble) else (model,)


def load_model_or_ensemble(source: str | Path) -> tuple[Any, SegFormerImageProcessor]:
    """Load a segmentation model, or an ensemble of them, with its image processor.

    Args:
        source: what `load_segmentation` takes, or a folder or Hub repository with an ensemble.json.

    Returns:
        The model or `Ensemble`, on the CPU and in eval mode, and its processor.

    Raises:
        OSError: see `load_segmentation`; or if a member is missing.
        ValueError: see `load_segmentation`; or if the members do not agree in classes or processor.
    """
    path = locate(source)
    if not is_ensemble(path):
        return load_segmentation(path)
    folders = member_folders(path)
    models, processors = zip(*(load_segmentation(folder) for folder in folders), strict=True)
    for folder, processor in zip(folders, processors, strict=True):
        _check_processor(folder, processor, folders[0], processors[0])
    try:
        return Ensemble(models).eval(), processors[0]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_processor(
    folder: Path, processor: SegFormerImageProcessor, first: Path, expected: SegFormerImageProcessor
) -> None:
    found, wanted = processor.to_dict(), expected.to_dict()
    for name in dict.fromkeys((*wanted, *found)):
        if name in _NOT_COMPARED:
            continue
        for key, value, text in differences(name, found.get(name), wanted.get(name)):
            raise ValueError(f"{folder} prepares images with {key} {value}; expected that of {first}, {text}")


__all__ = ["Ensemble", "load_model_or_ensemble", "members_of"]
