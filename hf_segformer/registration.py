"""Makes classes known to Transformers' Auto classes."""

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
        config: its `model_type` is what checkpoints name.
        models: for each name in `AUTO_CLASSES`, or some of them, the class to give.
        processor: the image processor.
        take_over: whether to replace what is registered for this model type.
    """
    AutoConfig.register(config.model_type, config, exist_ok=take_over)
    for name, model in models.items():
        AUTO_CLASSES[name].register(config, model, exist_ok=take_over)
    if not take_over:
        # The segmentation pipeline looks names up here, past what `register` adds, and else logs an error.
        name = models["AutoModelForSemanticSegmentation"].__name__
        MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[config.model_type] = name
    try:
        AutoImageProcessor.register(
            config, image_processor_classes={"pil": processor, "torchvision": processor}, exist_ok=take_over
        )
    except ImportError:
        # Transformers 5.17 has no AutoImageProcessor without torchvision: until 5.17 is no longer supported.
        return
