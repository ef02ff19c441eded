"""Loading of a segmentation model with its image processor, from any checkpoint.

Every command and every class that predicts loads through here, so that a bad folder gives the same message everywhere.
"""

import hashlib
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..image_processing_segformer import SegFormerImageProcessor
from ..modeling_segformer import SegFormerForSemanticSegmentation, without_loss
from .adapters import adapter_base, read_merged_checkpoint
from .checkpoints import ADAPTER_CONFIG, locate
from .convert import build_model

_PROCESSOR_FILE = "preprocessor_config.json"


def load_segmentation(
    source: str | Path, dtype: torch.dtype | None = None
) -> tuple[SegFormerForSemanticSegmentation, SegFormerImageProcessor]:
    """Load a segmentation model and the image processor that belongs to it.

    Args:
        source: a folder, a file of weights or a Hub repository, of any code base that `convert_checkpoint` reads, or
            the folder of a PEFT adapter whose base is a local folder.
        dtype: dtype of the weights. The default, float32, holds for checkpoints in half precision too: on a CPU
            they run several times slower as they are.

    Returns:
        The model, on the CPU and in eval mode, and its processor: that of the source (or of its base, for an adapter),
        or by default one that squashes images to 512x512 and normalises with ImageNet's statistics, dealt out to the
        model's channels.

    Raises:
        OSError: if there is no such path or repository, or a file cannot be opened.
        ValueError: if weights, configuration or processor are damaged or foreign, do not fit each other, or the model
            is not one for segmentation.

    Examples:
        >>> import tempfile
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
        >>> from hf_segformer.conversion.loading import load_segmentation
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1])).save_pretrained(folder)
        ...     model, processor = load_segmentation(folder)
        >>> processor.size
        {'height': 512, 'width': 512}
    """
    checkpoint = read_merged_checkpoint(locate(source))
    model = build_model(checkpoint)
    if not isinstance(model, SegFormerForSemanticSegmentation):
        raise ValueError(f"{checkpoint.path} holds a {type(model).__name__}; expected a segmentation model")
    if dtype is not None:
        model = model.to(dtype)
        model.config.dtype = dtype
    processor = own_processor(checkpoint.path, model)
    return model, processor or image_processor_for(checkpoint.path, model.config.num_channels)


def digest_of_weights(model: torch.nn.Module) -> str:
    """Return 16 hexadecimal digits that depend on the name and every bit of each weight, whatever file they were in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(without_loss(model.state_dict()).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def own_processor(path: str | Path, model: PreTrainedModel) -> SegFormerImageProcessor | None:
    """Load the image processor in a checkpoint's folder, or of an adapter's base; None where there is none.

    Raises:
        OSError: if its file cannot be opened.
        ValueError: if its file is damaged, or has not one mean for each channel of the model.
    """
    folder = _processor_folder(Path(path))
    if folder is None:
        return None
    file, processor = folder / _PROCESSOR_FILE, SegFormerImageProcessor.from_pretrained(folder)
    num_means, num_channels = len(processor.image_mean), model.config.num_channels
    if num_means != num_channels:
        raise ValueError(f"{file} has {num_means} entries in image_mean; expected one a channel, {num_channels}")
    return processor


def image_processor_for(path: str | Path, num_channels: int) -> SegFormerImageProcessor:
    """Load or make the image processor of a checkpoint, for a number of channels.

    A folder's own, or the default one (squash to 512x512, ImageNet's statistics). For another number of channels its
    means and deviations are repeated over the channels as `convert.inflate` repeats filters; channels that are not
    bytes need statistics of their own.

    Args:
        path: of the checkpoint.
        num_channels: input channels of the model.
    """
    folder = _processor_folder(Path(path))
    processor = SegFormerImageProcessor() if folder is None else SegFormerImageProcessor.from_pretrained(folder)
    processor.image_mean = _deal_out(processor.image_mean, num_channels)
    processor.image_std = _deal_out(processor.image_std, num_channels)
    return processor


def _processor_folder(path: Path) -> Path | None:
    """Return the folder of a checkpoint's image processor: its own, or that of an adapter's base."""
    folders = [path, adapter_base(path)] if (path / ADAPTER_CONFIG).is_file() else [path]
    return next((folder for folder in folders if (folder / _PROCESSOR_FILE).is_file()), None)


def _deal_out(values: list[float], num_channels: int) -> list[float]:
    if num_channels < len(values):
        return [sum(values) / len(values)] * num_channels
    return [values[channel % len(values)] for channel in range(num_channels)]


__all__ = ["digest_of_weights", "image_processor_for", "load_segmentation", "own_processor"]
