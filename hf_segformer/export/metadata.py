"""Description of a model inside its exported file: classes, palette, image processing.

The values are strings, and JSON except for those that OpenVINO's tools read. They come from the configuration of the
model and the keywords of its processor alone: no path, no name of a machine or a user enters a file.
"""

import json
from collections.abc import Mapping
from typing import Any

from ..image_processing_segformer import SegFormerImageProcessor
from ..inference.predictor import palette_of
from ..inference.segmenter import class_names
from ..modeling_segformer import SegFormerForSemanticSegmentation
from ..version import __version__


def describe_model(
    model: SegFormerForSemanticSegmentation, processor: SegFormerImageProcessor, include_processing: bool
) -> dict[str, str]:
    """Describe a model for users who have nothing but its exported file.

    Args:
        model: names and colours of its configuration.
        processor: its keywords.
        include_processing: True if the graph contains the processing.

    Returns:
        `hf_segformer` (the version), `names` (a list; index is class; of a binary model background and its own),
        `palette` (a list of [red, green, blue]), `processor` (an object: the keywords of `SegFormerImageProcessor`) and
        `include_processing` (true or false), all but the first in JSON.

    Raises:
        ValueError: if the palette of the configuration does not fit the classes.
    """
    names = class_names(model.config)
    keywords = {
        name: value for name, value in processor.to_dict().items() if name in processor.valid_kwargs.__annotations__
    }
    values = {
        "names": list(names),
        "palette": [list(color) for color in palette_of(model.config, names)],
        "processor": keywords,
        "include_processing": include_processing,
    }
    return {"hf_segformer": __version__, **{name: json.dumps(value) for name, value in values.items()}}


def openvino_info(metadata: Mapping[str, str]) -> dict[str, str]:
    """Add what OpenVINO's Model API and DL Streamer read from `model_info` to a description.

    These are `model_type`, `labels` (separated by spaces; those within a name become underscores), and for a network
    without processing `mean_values`, `scale_values` and `reverse_input_channels`, in units of a byte image in RGB. An
    empty description stays empty.
    """
    if not metadata:
        return {}
    names, processor = json.loads(metadata["names"]), json.loads(metadata["processor"])
    info = {**metadata, "model_type": "Segmentation", "labels": " ".join("_".join(name.split()) for name in names)}
    if not json.loads(metadata["include_processing"]) and "value_range" not in processor:
        info |= {
            name: " ".join(f"{value:.6g}" for value in values) for name, values in _normalization(processor).items()
        }
        info["reverse_input_channels"] = "False"
    return info


def _normalization(processor: Mapping[str, Any]) -> dict[str, list[float]]:
    """Mean and scale of each channel for an image that is neither rescaled nor normalized yet."""
    unit = processor["rescale_factor"] if processor["do_rescale"] else 1.0
    mean, std = processor["image_mean"], processor["image_std"]
    if not processor["do_normalize"]:
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    return {"mean_values": [each / unit for each in mean], "scale_values": [each / unit for each in std]}


__all__ = ["describe_model", "openvino_info"]
