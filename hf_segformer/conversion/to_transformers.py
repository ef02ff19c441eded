"""Conversion of models and image processors to Transformers' own SegFormer."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from ..image_processing_segformer import SegFormerImageProcessor
from ..modeling_segformer import (
    SegFormerForImageClassification,
    SegFormerForSemanticSegmentation,
    SegFormerModel,
    without_loss,
)

logger = logging.get_logger(__name__)

# By name, so that Transformers imports its own model only on demand.
_MODELS = {
    SegFormerForSemanticSegmentation: "SegformerForSemanticSegmentation",
    SegFormerForImageClassification: "SegformerForImageClassification",
    SegFormerModel: "SegformerModel",
}
_PROCESSOR_FIELDS = (
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_reduce_labels",
)


def to_transformers(
    model: PreTrainedModel, folder: str | Path, processor: SegFormerImageProcessor | None = None
) -> float:
    """Write a folder that Transformers' own SegFormer loads, without any code of this package.

    Transformers' model never reads `layer_norm_eps` and uses 1e-5, where the paper's weights were trained with 1e-6, so
    its outputs are not bit-equal. The folder is loaded there and the difference measured.

    Args:
        model: `SegFormerForSemanticSegmentation`, `SegFormerForImageClassification` or `SegFormerModel`.
        folder: destination; created if needed.
        processor: its image processor, to be written beside it.

    Returns:
        The largest difference of the outputs on a random image, relative to the largest output.

    Raises:
        ValueError: if Transformers has no such model.
    """
    name = next((name for model_class, name in _MODELS.items() if isinstance(model, model_class)), None)
    if name is None:
        raise ValueError(f"Transformers has no counterpart of {type(model).__name__}")
    if isinstance(model, SegFormerForSemanticSegmentation) and model.config.num_labels == 1:
        threshold = 0.5 if processor is None else processor.binary_threshold
        logger.warning(
            "the model has 1 label, and Transformers' own post_process_semantic_segmentation, which takes the best of "
            f"several, gives 0 for every pixel: compare the sigmoid of the logits with {threshold}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(transformers_processor(processor), indent=2) + "\n")
    transformers_config(model, name).save_pretrained(folder)
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in without_loss(model.state_dict()).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    written = getattr(transformers, name).from_pretrained(folder, dtype=model.dtype)
    return _largest_difference(model, written.to(model.device))


def transformers_config(model: PreTrainedModel, name: str) -> transformers.SegformerConfig:
    """Return the configuration in Transformers' own form, for its class of that name."""
    values = model.config.to_dict()
    known = {field.name for field in fields(transformers.SegformerConfig)} - {"transformers_version"}
    config = transformers.SegformerConfig(**{key: value for key, value in values.items() if key in known})
    config.architectures, config.dtype = [name], model.dtype
    if name != "SegformerModel":
        config.reshape_last_stage = True  # its heads fail otherwise, and the outputs are the same
    return config


def transformers_processor(processor: SegFormerImageProcessor) -> dict[str, Any]:
    """Return the processor's keywords in the form of Transformers' own, with a warning for options that it lacks."""
    if processor.keep_ratio or processor.size_divisor:
        logger.warning(
            f"keep_ratio is {processor.keep_ratio} and size_divisor {processor.size_divisor}, but Transformers' own "
            f"processor has neither option: it resizes images to {processor.size}"
        )
    if processor.binary_threshold != 0.5:
        logger.warning(
            f"binary_threshold is {processor.binary_threshold}, which Transformers' own processor does not have: "
            "compare the sigmoid of its logits with that number"
        )
    if processor.ignore_index != 255:
        logger.warning(
            f"ignore_index is {processor.ignore_index}, which Transformers' own processor does not have: where "
            "it reduces labels, pixels of label 0 become 255"
        )
    if processor.value_range is not None:
        logger.warning(
            f"value_range is {processor.value_range}, which Transformers' own processor does not have: scale images "
            "from that range to 0 to 255 before it"
        )
    values = {key: value for key, value in processor.to_dict().items() if key in _PROCESSOR_FIELDS}
    return {**values, "image_processor_type": "SegformerImageProcessor"}


@torch.no_grad()
def _largest_difference(model: PreTrainedModel, written: PreTrainedModel) -> float:
    """Compare the outputs on a random image, relative to the largest output."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, model.config.num_channels, 192, 256, generator=generator).to(model.device, model.dtype)
    training = model.training
    ours, theirs = model.eval()(image)[0], written(image)[0]
    model.train(training)
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


__all__ = ["to_transformers", "transformers_config", "transformers_processor"]
