"""SegFormer for Hugging Face Transformers.

Importing the package registers its classes with the Auto classes. The public names are those of `__all__`; what needs
more than the model, such as training and checkpoint conversion, is imported when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .auto_classes import override_builtin, register
from .configuration_segformer import SegFormerConfig
from .dispatch_segformer import explain_fast_paths, set_fast_paths
from .image_processing_segformer import SegFormerImageProcessor
from .kernels.switch import enable_if_wanted
from .modeling_segformer import (
    SegFormerBackbone,
    SegFormerForImageClassification,
    SegFormerForSemanticSegmentation,
    SegFormerModel,
)
from .upsampling_segformer import upsample_argmax, upsample_cross_entropy
from .version import __version__

if TYPE_CHECKING:
    from .config import InferenceOptions
    from .conversion.convert import convert_checkpoint
    from .conversion.loading import load_segmentation
    from .evaluation.evaluate import evaluate
    from .evaluation.metrics import SegmentationMetrics
    from .inference.large_image import predict_large_image
    from .inference.predictor import SegFormerPredictor
    from .training.losses import SegmentationLoss
    from .training.trainer import SegFormerTrainer

_LAZY = {
    "InferenceOptions": "config",
    "SegFormerPredictor": "inference.predictor",
    "SegFormerTrainer": "training.trainer",
    "SegmentationLoss": "training.losses",
    "SegmentationMetrics": "evaluation.metrics",
    "convert_checkpoint": "conversion.convert",
    "evaluate": "evaluation.evaluate",
    "load_segmentation": "conversion.loading",
    "predict_large_image": "inference.large_image",
}

register(
    SegFormerConfig,
    {
        "AutoModel": SegFormerModel,
        "AutoModelForSemanticSegmentation": SegFormerForSemanticSegmentation,
        "AutoModelForImageClassification": SegFormerForImageClassification,
        "AutoBackbone": SegFormerBackbone,
    },
    SegFormerImageProcessor,
)
enable_if_wanted()


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "InferenceOptions",
    "SegFormerBackbone",
    "SegFormerConfig",
    "SegFormerForImageClassification",
    "SegFormerForSemanticSegmentation",
    "SegFormerImageProcessor",
    "SegFormerModel",
    "SegFormerPredictor",
    "SegFormerTrainer",
    "SegmentationLoss",
    "SegmentationMetrics",
    "__version__",
    "convert_checkpoint",
    "evaluate",
    "explain_fast_paths",
    "load_segmentation",
    "override_builtin",
    "predict_large_image",
    "set_fast_paths",
    "upsample_argmax",
    "upsample_cross_entropy",
]
