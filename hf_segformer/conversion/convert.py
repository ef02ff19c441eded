"""Brings the weights that people have to SegFormer's published names, and takes ours back to Transformers' own model.

Names come from the tables of `weight_names`. All else is read from the config.json that lies beside the weights, or
from the tensors' shapes.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration_segformer import SegFormerConfig
from ..image_processing_segformer import SegFormerImageProcessor
from ..modeling_segformer import (
    SegFormerForImageClassification,
    SegFormerForSemanticSegmentation,
    SegFormerModel,
)
from .checkpoints import Checkpoint, locate, read_checkpoint
from .name_tables import num_blocks, published_names, require_same, some, without_head

logger = logging.get_logger(__name__)

# What shapes can not tell is the same in every published SegFormer (paper, Table 6).
_NUM_HEADS = (1, 2, 5, 8)
_PATCH_SIZES = (7, 3, 3, 3)
_STRIDES = (4, 2, 2, 2)
_NEEDS_CONFIG = "convert a folder in which a config.json says how it works"

# By name, so that Transformers imports its own model only where it is asked for.
_STOCK_MODELS = {
    SegFormerForSemanticSegmentation: "SegformerForSemanticSegmentation",
    SegFormerForImageClassification: "SegformerForImageClassification",
    SegFormerModel: "SegformerModel",
}
_STOCK_PROCESSOR_FIELDS = (
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


def convert_checkpoint(
    path: str | Path, *, num_channels: int | None = None, encoder_only: bool = False
) -> PreTrainedModel:
    """A SegFormer model out of weights that another code base, or this one, wrote.

    Read are the paper's own .pth files (segmentation and ImageNet), mmsegmentation's encoders,
    segmentation_models_pytorch, Transformers' own SegFormer and this package's checkpoints. Sizes, classes and bands
    come from a folder's config.json, or from the tensors' shapes where there is none. Every key is used exactly once.

    Two things stay as in the paper, whichever code the weights come from. Logits lie at a quarter of the image's sides,
    and enlarging them does not align corners; segmentation_models_pytorch enlarges its own by four and does. LayerNorms
    of patch embeddings and reductions have epsilon 1e-5; mmsegmentation's have 1e-6 there too.

    Args:
        path: a file or a folder, see `checkpoints.read_checkpoint`.
        num_channels: bands that the model shall take; see `inflate` for what becomes of the first convolution.
        encoder_only: leave any head out and give a `SegFormerModel`, as a start for training. It is the way to use
            encoders whose head is another network's: mmsegmentation's, or a U-Net on a SegFormer encoder.

    Returns:
        In float32 and eval mode, by the head that was found: `SegFormerForSemanticSegmentation`,
        `SegFormerForImageClassification`, or without one `SegFormerModel`.

    Raises:
        OSError: if the path does not exist or can not be read.
        ValueError: if the file is no checkpoint or not SegFormer's; keys missing or left over are listed.

    Example:
        >>> import tempfile, torch
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
        >>> from hf_segformer.conversion.convert import convert_checkpoint
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1], num_labels=5))
        >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        ...     torch.save(model.state_dict(), file.name)
        ...     converted = convert_checkpoint(file.name, num_channels=4)
        >>> converted.config.depths, converted.config.num_labels, converted.config.num_channels
        ([1, 1, 1, 1], 5, 4)
    """
    if num_channels is not None and (type(num_channels) is not int or num_channels < 1):
        raise ValueError(f"num_channels is {num_channels!r}, but it must be a whole number, at least 1")
    checkpoint = read_checkpoint(path)
    held = without_head(checkpoint.weights) if encoder_only else checkpoint.weights
    weights = _published_weights(checkpoint.path, held)
    config = checkpoint.config or _infer_config(checkpoint, weights)
    if num_channels is not None:
        first = "segformer.encoder.patch_embeddings.0.proj.weight"
        weights[first] = inflate(weights[first], num_channels)
        config.num_channels = num_channels
    return _load(checkpoint.path, config, weights)


def inflate(weight: torch.Tensor, num_channels: int) -> torch.Tensor:
    """The first convolution's filters for another number of bands, with what they learnt.

    More bands: band i takes filter i mod B of the B there are, divided by the number of bands that share it, so four
    bands R G B N become R/2, G, B, R/2. Fewer bands: each takes the sum of all filters over the number of bands. Either
    way the filters still add up to what they did, so an image whose bands are all equal gives the same response.

    Args:
        weight: (C, B, k, k).
        num_channels: bands wanted.

    Returns:
        (C, num_channels, k, k) in float32.
    """
    weight = weight.float()
    bands = weight.shape[1]
    if num_channels < bands:
        return weight.sum(1, keepdim=True).expand(-1, num_channels, -1, -1) / num_channels
    taken = torch.arange(num_channels) % bands
    return weight[:, taken] / taken.bincount()[taken][:, None, None]


def _published_weights(path: Path, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under published names, stacked ones taken apart."""
    weights = {}
    for key, names in published_names(path, held).items():
        tensor = held[key]
        if len(names) == 1:
            weights[names[0]] = tensor
            continue
        if tensor.ndim == 0 or len(tensor) % len(names):
            raise ValueError(f"{path}: {key} is {tuple(tensor.shape)}, but it must hold {len(names)} equal parts")
        weights |= zip(names, tensor.chunk(len(names)), strict=True)
    return weights


def _infer_config(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor]) -> SegFormerConfig:
    """The configuration that the published weights' shapes tell.

    Raises:
        ValueError: if the network differs from every published one where shapes can not tell how it works.
    """

    def encoder(name: str) -> torch.Size:
        return weights[f"segformer.encoder.{name}.weight"].shape

    depths = num_blocks(checkpoint.path, weights, "segformer.encoder.block.{stage}.")
    stages = range(len(depths))
    hidden_sizes = [encoder(f"layer_norm.{stage}")[0] for stage in stages]
    patch_sizes = [encoder(f"patch_embeddings.{stage}.proj")[-1] for stage in stages]
    heads = _NUM_HEADS[: len(depths)]
    if len({hidden / num for hidden, num in zip(hidden_sizes, heads, strict=True)}) > 1 or hidden_sizes[0] < 1:
        raise ValueError(
            f"{checkpoint.path} has hidden_sizes {hidden_sizes}, which are not to each other as {list(heads)}, the "
            f"numbers of heads in every published SegFormer: {_NEEDS_CONFIG}"
        )
    if patch_sizes != list(_PATCH_SIZES[: len(depths)]):
        raise ValueError(
            f"{checkpoint.path} has patch_sizes {patch_sizes}, but every published SegFormer has {list(_PATCH_SIZES)}, "
            f"and strides to match: {_NEEDS_CONFIG}"
        )
    mlp_ratios = [encoder(f"block.{stage}.0.mlp.dense1")[0] / hidden_sizes[stage] for stage in stages]
    if any(ratio != int(ratio) for ratio in mlp_ratios):
        raise ValueError(f"{checkpoint.path} has mlp_ratios {mlp_ratios}, but they must be whole numbers")
    reductions = [weights.get(f"segformer.encoder.block.{stage}.0.attention.self.sr.weight") for stage in stages]
    return SegFormerConfig(
        num_channels=encoder("patch_embeddings.0.proj")[1],
        num_encoder_blocks=len(depths),
        depths=depths,
        hidden_sizes=hidden_sizes,
        num_attention_heads=list(heads),
        patch_sizes=patch_sizes,
        strides=list(_STRIDES[: len(depths)]),
        sr_ratios=[1 if weight is None else weight.shape[-1] for weight in reductions],
        mlp_ratios=[int(ratio) for ratio in mlp_ratios],
        **_head_fields(checkpoint.classes, weights),
    )


def _head_fields(classes: list[str], weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of the configuration that follow from the head, if there is one."""
    values: dict[str, Any] = {}
    if "decode_head.linear_fuse.weight" in weights:
        values["decoder_hidden_size"] = weights["decode_head.linear_fuse.weight"].shape[0]
    predict = weights.get("decode_head.classifier.weight", weights.get("classifier.weight"))
    if predict is not None:
        if len(classes) == len(predict):
            values["id2label"] = dict(enumerate(classes))
            values["label2id"] = {name: label for label, name in enumerate(classes)}
        else:
            values["num_labels"] = len(predict)
    return values


def _load(path: Path, config: SegFormerConfig, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """The model of this configuration with these weights, by published names; the head decides the class.

    Raises:
        ValueError: if names or shapes are not those that the configuration asks for.
    """
    model_class: type[PreTrainedModel] = SegFormerModel
    if "decode_head.classifier.weight" in weights:
        model_class = SegFormerForSemanticSegmentation
    elif "classifier.weight" in weights:
        model_class = SegFormerForImageClassification
    else:
        weights = {name.removeprefix("segformer."): tensor for name, tensor in weights.items()}
    if sum(config.depths) > len(weights):  # a damaged number would build for hours
        raise ValueError(f"{path}: depths is {list(config.depths)}, but there are only {len(weights)} tensors")
    with torch.device("meta"):  # nothing is drawn at random that is replaced at once
        model = model_class(config)
    expected = model.state_dict()
    require_same(path, expected, weights)
    fitted, wrong = {}, []
    for name, tensor in weights.items():
        wanted = expected[name]
        if tensor.shape == (*wanted.shape, 1, 1):  # mmsegmentation's 1x1 convolutions are linear layers
            tensor = tensor.flatten(1)
        if tensor.shape != wanted.shape:
            wrong.append(f"{name} {tuple(tensor.shape)} instead of {tuple(wanted.shape)}")
        fitted[name] = tensor.to(wanted.dtype, copy=True).contiguous()
    if wrong:
        raise ValueError(f"{path} holds tensors of wrong shapes, {some(wrong)}")
    model.load_state_dict(fitted, assign=True)
    config.architectures, config.dtype = [model_class.__name__], model.dtype
    return model.eval()


def load_segmentation(source: str | Path) -> tuple[SegFormerForSemanticSegmentation, SegFormerImageProcessor]:
    """A segmentation model and the image processor that belongs to it, from wherever they lie.

    Everything that labels pictures loads through here, so that a bad folder is told in the same line everywhere.

    Args:
        source: a folder, a file of weights or a Hub repository, of any code base that `convert_checkpoint` reads.

    Returns:
        The model, in float32, on the CPU and in eval mode, and its processor: that of the source, or where it brings
        none the default one (squash to 512x512, ImageNet's statistics) with a mean for each of the model's bands.

    Raises:
        OSError: if there is no such path or repository, or a file can not be opened.
        ValueError: if weights, configuration or processor are damaged or foreign, do not fit each other, or the model
            is not one for segmentation.

    Example:
        >>> import tempfile
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
        >>> from hf_segformer.conversion.convert import load_segmentation
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     SegFormerForSemanticSegmentation(SegFormerConfig(depths=[1, 1, 1, 1])).save_pretrained(folder)
        ...     model, processor = load_segmentation(folder)
        >>> processor.size
        {'height': 512, 'width': 512}
    """
    path = locate(str(source))
    model = segmentation_model(path)
    return model, own_processor(path, model) or image_processor_for(path, model.config.num_channels)


def segmentation_model(path: str | Path) -> SegFormerForSemanticSegmentation:
    """`convert_checkpoint`, for what labels pixels.

    Raises:
        OSError: as `convert_checkpoint`.
        ValueError: as `convert_checkpoint`, and if the model has no head for segmentation.
    """
    model = convert_checkpoint(path)
    if not isinstance(model, SegFormerForSemanticSegmentation):
        raise ValueError(f"{path} holds a {type(model).__name__}, but only a segmentation model tells classes")
    return model


def own_processor(path: str | Path, model: PreTrainedModel) -> SegFormerImageProcessor | None:
    """The image processor that a checkpoint's folder brings along; None where it brings none.

    Raises:
        OSError: if its file can not be opened.
        ValueError: if its file is damaged, or has not one mean for each band of the model.
    """
    file = Path(path) / "preprocessor_config.json"
    if not file.is_file():
        return None
    processor = SegFormerImageProcessor.from_pretrained(path)
    num_means, num_channels = len(processor.image_mean), model.config.num_channels
    if num_means != num_channels:
        raise ValueError(f"{file} has {num_means} entries in image_mean, but the model takes {num_channels} bands")
    return processor


def image_processor_for(path: str | Path, num_channels: int) -> SegFormerImageProcessor:
    """The image processor that belongs to a checkpoint.

    A folder's own, or the default one (squash to 512x512, ImageNet's statistics). For another number of bands its means
    and deviations are dealt out as `inflate` deals out filters; bands that are no bytes want statistics of their own.

    Args:
        path: what `convert_checkpoint` was given.
        num_channels: bands that the model takes.
    """
    if (Path(path) / "preprocessor_config.json").exists():
        processor = SegFormerImageProcessor.from_pretrained(path)
    else:
        processor = SegFormerImageProcessor()
    processor.image_mean = _per_band(processor.image_mean, num_channels)
    processor.image_std = _per_band(processor.image_std, num_channels)
    return processor


def _per_band(values: list[float], num_channels: int) -> list[float]:
    if num_channels < len(values):
        return [sum(values) / len(values)] * num_channels
    return [values[band % len(values)] for band in range(num_channels)]


def to_transformers(
    model: PreTrainedModel, folder: str | Path, processor: SegFormerImageProcessor | None = None
) -> float:
    """Write a folder that Transformers' own SegFormer loads, with no code of ours in it.

    Transformers' model never reads `layer_norm_eps` and uses 1e-5, where the paper's weights were trained with 1e-6, so
    its outputs are not bit-equal. How far they are apart is measured by loading the folder there, rather than promised.

    Args:
        model: `SegFormerForSemanticSegmentation`, `SegFormerForImageClassification` or `SegFormerModel`.
        folder: where to; made if need be.
        processor: its image processor, if it shall travel along.

    Returns:
        The largest difference of the outputs on a random image, relative to the largest output.

    Raises:
        ValueError: if Transformers has no such model.
    """
    name = next((name for model_class, name in _STOCK_MODELS.items() if isinstance(model, model_class)), None)
    if name is None:
        raise ValueError(f"Transformers has no counterpart of {type(model).__name__}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(stock_processor(processor), indent=2) + "\n")
    stock_config(model, name).save_pretrained(folder)
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    stock = getattr(transformers, name).from_pretrained(folder, dtype=model.dtype)
    return _largest_difference(model, stock.to(model.device))


def stock_config(model: PreTrainedModel, name: str) -> transformers.SegformerConfig:
    """The configuration in Transformers' own form, for its class of that name."""
    values = model.config.to_dict()
    known = {field.name for field in fields(transformers.SegformerConfig)} - {"transformers_version"}
    config = transformers.SegformerConfig(**{key: value for key, value in values.items() if key in known})
    config.architectures, config.dtype = [name], model.dtype
    if name != "SegformerModel":
        config.reshape_last_stage = True  # its heads fail without, and the outputs are the same
    return config


def stock_processor(processor: SegFormerImageProcessor) -> dict[str, Any]:
    """The processor's keywords in the form of Transformers' own; what that lacks is told by a warning."""
    if processor.keep_ratio or processor.size_divisor:
        logger.warning(
            f"keep_ratio is {processor.keep_ratio} and size_divisor {processor.size_divisor}, but Transformers' own "
            f"processor has neither: there images will be resized to {processor.size}"
        )
    values = {key: value for key, value in processor.to_dict().items() if key in _STOCK_PROCESSOR_FIELDS}
    return {**values, "image_processor_type": "SegformerImageProcessor"}


@torch.no_grad()
def _largest_difference(model: PreTrainedModel, stock: PreTrainedModel) -> float:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, model.config.num_channels, 192, 256, generator=generator).to(model.device, model.dtype)
    training = model.training
    ours, theirs = model.eval()(image)[0], stock(image)[0]
    model.train(training)
    return ((ours - theirs).abs().max() / ours.abs().max()).item()
