"""SegFormer from scratch, at home in Transformers: the public names, and their registration with the Auto classes."""

from .auto_classes import override_builtin, register
from .configuration_segformer import SegFormerConfig
from .conversion.convert import convert_checkpoint
from .dispatch_segformer import set_fast_paths
from .image_processing_segformer import SegFormerImageProcessor
from .inference.predictor import SegFormerPredictor
from .kernels import enable_if_wanted
from .modeling_segformer import (
    SegFormerBackbone,
    SegFormerForImageClassification,
    SegFormerForSemanticSegmentation,
    SegFormerModel,
)
from .upsampling_segformer import upsample_argmax, upsample_cross_entropy
from .version import __version__

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

__all__ = [
    "SegFormerBackbone",
    "SegFormerConfig",
    "SegFormerForImageClassification",
    "SegFormerForSemanticSegmentation",
    "SegFormerImageProcessor",
    "SegFormerModel",
    "SegFormerPredictor",
    "__version__",
    "convert_checkpoint",
    "override_builtin",
    "set_fast_paths",
    "upsample_argmax",
    "upsample_cross_entropy",
]
