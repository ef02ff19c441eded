"""Handler of a Hugging Face Inference Endpoint for a SegFormer, published by `segformer push` as handler.py.

An endpoint loads this file from the model's folder, calls `EndpointHandler(folder)` once, and the handler once a
request. Model and image processor load from that folder, with the code in it: nothing is fetched, and hf_segformer need
not be installed. requirements.txt names what must be.
"""

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

MAX_BYTES = 32 * 2**20  # of an image's file
MAX_PIXELS = 25_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")  # decoded by Pillow alone
_BAD_IMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class EndpointHandler:
    """Semantic segmentation of one image a request, in the form of the image-segmentation task.

    Args:
        path: folder of the model.
    """

    def __init__(self, path: str = ""):
        options = {"trust_remote_code": True, "local_files_only": True}  # the code in this folder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = AutoImageProcessor.from_pretrained(path, **options)
        self.model = AutoModelForSemanticSegmentation.from_pretrained(path, **options).eval().to(self.device)
        labels = self.model.config.id2label
        self.names = [labels[index] for index in range(len(labels))]
        if len(self.names) == 1:
            self.names = ["background", *self.names]

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Segment the image of a request.

        Args:
            data: `inputs`, an image as the endpoint decodes it from a body of type image/*, or the bytes of an image's
                file, or these in base64, as in a body of type application/json; and `parameters`, a mapping, if any.
                The one parameter is `threshold`, from 0 to 1: of several classes pixels below it belong to none, and
                of a binary model those above it are foreground.

        Returns:
            for each class in the image `label`, `score` (mean probability of the class over its pixels), and `mask`,
            a PNG in base64: 255 where the class is, 0 elsewhere, of the image's upright size.

        Raises:
            ValueError: if the input is no image, too large or unfit for the model, or a parameter is unknown; an
                endpoint answers with status 400 and the message.
        """
        threshold = read_threshold(data.get("parameters") or {})
        pixels, size = prepare_image(data.get("inputs"), self.processor)
        with torch.inference_mode():
            logits = self.model(pixels.to(self.device, self.model.dtype)).logits.float()
            [segmentation] = self.processor.post_process_semantic_segmentation({"logits": logits}, [size], threshold)
            return [
                {
                    "label": self.names[index],
                    "score": mean_probability(logits[0], index, segmentation == index),
                    "mask": encode_mask(segmentation == index),
                }
                for index in segmentation.unique().tolist()
                if 0 <= index < len(self.names)  # else below the threshold
            ]


def read_threshold(parameters: Any) -> float | None:
    """Read the parameters of a request; a query string gives texts."""
    if not isinstance(parameters, dict):
        raise ValueError(f"parameters is a {type(parameters).__name__}; expected an object")
    if unknown := sorted(map(str, parameters.keys() - {"threshold", "subtask"})):
        raise ValueError(f"parameters has {', '.join(unknown)[:80]}; expected threshold alone")
    if parameters.get("subtask") not in (None, "semantic"):
        raise ValueError(f"parameters.subtask is {parameters['subtask']!r:.40}; expected semantic, or none")
    threshold = parameters.get("threshold")
    try:
        return None if threshold is None else float(str(threshold))  # true is no number
    except ValueError:
        raise ValueError(f"parameters.threshold is {threshold!r:.40}; expected a number from 0 to 1") from None


def prepare_image(inputs: Any, processor: Callable[..., Any]) -> tuple[Tensor, tuple[int, int]]:
    """Prepare the image of a request for the network.

    The processor decodes it, since Pillow alone leaves 8 bits of 16-bit colours.

    Returns:
        pixels (1, C, h, w), and height and width of the upright image.
    """
    with one_line_errors():
        image = read_image(inputs)
        pixels = processor(image, return_tensors="pt").pixel_values
        width, height = ImageOps.exif_transpose(image).size
        return pixels, (height, width)


def read_image(inputs: Any) -> Image.Image:
    """Open an image of at most `MAX_BYTES` and `MAX_PIXELS`, which its header tells; it is not decoded yet."""
    with one_line_errors():
        image = inputs if isinstance(inputs, Image.Image) else open_image(inputs)
        if image.height * image.width > MAX_PIXELS:
            raise ValueError(
                f"the image is {image.height}x{image.width} (height x width); expected at most {MAX_PIXELS:,} pixels: "
                "send a smaller one, or tiles of it"
            )
        return image


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors of files that are damaged or no images into a ValueError of one line."""
    try:
        yield
    except (Image.DecompressionBombError, Image.UnidentifiedImageError) as error:
        is_large = isinstance(error, Image.DecompressionBombError)
        problem = f"larger than {MAX_PIXELS:,} pixels" if is_large else "no image, or cut off"
        raise ValueError(f"inputs is {problem}; expected an image in one of {', '.join(FORMATS)}") from None
    except ValueError:
        raise
    except _BAD_IMAGE as error:
        raise ValueError(f"the image is damaged: {error or type(error).__name__}") from error


def open_image(inputs: Any) -> Image.Image:
    """Open an image's file, given as bytes or in base64, as far as its header."""
    if isinstance(inputs, str):
        if len(inputs) > MAX_BYTES * 4 // 3 + 100:
            raise ValueError(f"inputs has {len(inputs):,} characters; expected at most {MAX_BYTES:,} bytes in base64")
        encoded = inputs.partition("base64,")[2] if inputs.startswith("data:") else inputs
        try:
            inputs = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(
                f"inputs is {inputs[:40]!r}, which is no base64; expected an image's file in base64, not an address or "
                "a path, or its bytes as the body with Content-Type image/png or image/jpeg"
            ) from None
    if not isinstance(inputs, bytes | bytearray):
        raise ValueError(f"inputs is a {type(inputs).__name__}; expected an image, or its file in base64")
    if len(inputs) > MAX_BYTES:
        raise ValueError(f"the image has {len(inputs):,} bytes; expected at most {MAX_BYTES:,}")
    image = Image.open(io.BytesIO(inputs), formats=FORMATS)
    frames = find_frames(image)
    if len(frames) > 1:
        raise ValueError(f"the file holds {len(frames)} images; expected one")
    if frames != [0]:
        image.seek(frames[0])
    return image


def find_frames(image: Image.Image) -> list[int]:
    """Find the frames that are images of their own: no thumbnails, pyramid levels or masks, nor a camera's previews."""
    number = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if number == 1 or image.format != "TIFF":
        return list(range(number))
    frames = []
    for frame in range(number):
        image.seek(frame)
        if not image.tag_v2.get(254, 0) & 5:  # type: ignore[attr-defined]  # NewSubfileType: reduced, mask
            frames.append(frame)
    image.seek(0)
    return frames or [0]


def mean_probability(logits: Tensor, index: int, mask: Tensor) -> float:
    """Mean probability of a class over its mask (H, W), upsampled from the grid of the logits (K, h, w)."""
    if len(logits) == 1:
        probability = logits.sigmoid() if index == 1 else (-logits).sigmoid()
    else:
        probability = logits.softmax(0)[index : index + 1]
    upsampled = F.interpolate(probability[None], mask.shape, mode="bilinear", align_corners=False)
    return upsampled[0, 0][mask].mean().item()


def encode_mask(mask: Tensor) -> str:
    """Encode a mask (H, W) as a black and white PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(mask.byte().mul(255).cpu().numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


__all__ = ["FORMATS", "MAX_BYTES", "MAX_PIXELS", "EndpointHandler"]
