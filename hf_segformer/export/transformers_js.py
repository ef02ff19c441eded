"""Folder layout of transformers.js: names of the files, and configurations in the form of Transformers' own."""

from pathlib import Path

from ..conversion.to_transformers import transformers_config, transformers_processor
from ..files import write_json
from ..image_processing_segformer import SegFormerImageProcessor
from ..modeling_segformer import SegFormerForSemanticSegmentation

FLOAT32, FLOAT16, INT8 = "model.onnx", "model_fp16.onnx", "model_quantized.onnx"


def require_several_labels(model: SegFormerForSemanticSegmentation) -> None:
    """Raise ValueError for a model with one label: transformers.js takes the maximum over several."""
    if model.config.num_labels == 1:
        raise ValueError("the model has 1 label; expected at least 2 for transformers.js, which takes the best of them")


def write_configurations(
    model: SegFormerForSemanticSegmentation, processor: SegFormerImageProcessor, folder: Path
) -> None:
    """Write config.json and preprocessor_config.json as transformers.js reads them."""
    transformers_config(model, "SegformerForSemanticSegmentation").to_json_file(folder / "config.json")
    write_json(transformers_processor(processor), folder / "preprocessor_config.json")


__all__ = ["FLOAT16", "FLOAT32", "INT8", "require_several_labels", "write_configurations"]
