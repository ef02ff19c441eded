"""Registration with the Auto classes, and `override_builtin` for Transformers' own `segformer` checkpoints.

A model type belongs to one implementation at a time, so taking over `segformer` is opt-in: after `override_builtin()`
the Auto classes of this process give this package's classes for `segformer` folders and repositories. Such a model
saves `segformer` checkpoints without remote code, which Transformers loads.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from . import configuration_segformer, image_processing_segformer, modeling_segformer

AUTO_CLASSES = {
    "AutoModel": AutoModel,
    "AutoModelForSemanticSegmentation": AutoModelForSemanticSegmentation,
    "AutoModelForImageClassification": AutoModelForImageClassification,
    "AutoBackbone": AutoBackbone,
}


def register(
    config: type[PretrainedConfig],
    models: dict[str, type[PreTrainedModel]],
    processor: type[BaseImageProcessor],
    *,
    take_over: bool = False,
) -> None:
    """Register a configuration with its models, named by Auto class, and its image processor.

    Args:
        config: the configuration, whose `model_type` checkpoints name.
        models: classes by the name of their Auto class, one of `AUTO_CLASSES`.
        processor: the image processor.
        take_over: replace what is registered for this model type.
    """
    AutoConfig.register(config.model_type, config, exist_ok=take_over)
    for name, model in models.items():
        AUTO_CLASSES[name].register(config, model, exist_ok=take_over)
    if not take_over:
        # The segmentation pipeline looks names up here, which `register` does not fill, and logs an error otherwise.
        name = models["AutoModelForSemanticSegmentation"].__name__
        MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[config.model_type] = name
    try:
        AutoImageProcessor.register(
            config, image_processor_classes={"pil": processor, "torchvision": processor}, exist_ok=take_over
        )
    except ImportError:
        # Without torchvision, Transformers 5.17 has no AutoImageProcessor (until 5.17 is no longer supported).
        return


@strict
class SegFormerConfig(configuration_segformer.SegFormerConfig):
    """The configuration under Transformers' own model type."""

    model_type = "segformer"
    _auto_class: ClassVar[str | None] = None

    def to_dict(self) -> dict:
        """Return the fields with the class names of Transformers' own model and no map to code."""
        values = super().to_dict()
        if values.get("architectures"):
            values["architectures"] = [name.replace("SegFormer", "Segformer") for name in values["architectures"]]
        return values


class SegFormerModel(modeling_segformer.SegFormerModel):
    """The encoder for `segformer` checkpoints."""

    config_class = SegFormerConfig
    _auto_class: ClassVar[str | None] = None


class SegFormerForSemanticSegmentation(modeling_segformer.SegFormerForSemanticSegmentation):
    """The segmentation model for `segformer` checkpoints."""

    config_class = SegFormerConfig
    _auto_class: ClassVar[str | None] = None


class SegFormerForImageClassification(modeling_segformer.SegFormerForImageClassification):
    """The classifier for `segformer` checkpoints."""

    config_class = SegFormerConfig
    _auto_class: ClassVar[str | None] = None


class SegFormerBackbone(modeling_segformer.SegFormerBackbone):
    """The backbone for `segformer` checkpoints."""

    config_class = SegFormerConfig
    _auto_class: ClassVar[str | None] = None


class SegformerImageProcessor(image_processing_segformer.SegFormerImageProcessor):
    """The image processor under Transformers' own name, which its files carry."""

    _auto_class = None


def override_builtin() -> None:
    """Let the Auto classes of this process give this package's classes for model type `segformer`.

    On Transformers 5.17 without torchvision, which has no AutoImageProcessor, only the models are taken over.

    Examples:
        >>> from hf_segformer import override_builtin
        >>> from transformers import AutoModelForSemanticSegmentation
        >>> override_builtin()  # doctest: +SKIP
        >>> name = "nvidia/segformer-b0-finetuned-ade-512-512"
        >>> model = AutoModelForSemanticSegmentation.from_pretrained(name)  # doctest: +SKIP
    """
    register(
        SegFormerConfig,
        {
            "AutoModel": SegFormerModel,
            "AutoModelForSemanticSegmentation": SegFormerForSemanticSegmentation,
            "AutoModelForImageClassification": SegFormerForImageClassification,
            "AutoBackbone": SegFormerBackbone,
        },
        SegformerImageProcessor,
        take_over=True,
    )


__all__ = [
    "AUTO_CLASSES",
    "SegFormerBackbone",
    "SegFormerConfig",
    "SegFormerForImageClassification",
    "SegFormerForSemanticSegmentation",
    "SegFormerModel",
    "SegformerImageProcessor",
    "override_builtin",
    "register",
]
