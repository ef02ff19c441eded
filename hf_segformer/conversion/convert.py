"""Conversion of existing checkpoints to models under SegFormer's published names.

A straight pass: read the weights, map their names by the tables of `name_tables`, take the configuration from the
config.json beside them or infer it from the tensors' shapes, and build the model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration_segformer import SegFormerConfig
from ..modeling_segformer import (
    SegFormerForImageClassification,
    SegFormerForSemanticSegmentation,
    SegFormerModel,
)
from .adapters import read_merged_checkpoint
from .checkpoints import Checkpoint, locate
from .name_tables import num_blocks, require_same, some, to_published

# Properties that shapes cannot show; every published SegFormer has these (paper, Table 6).
_NUM_HEADS = (1, 2, 5, 8)
_PATCH_SIZES = (7, 3, 3, 3)
_STRIDES = (4, 2, 2, 2)
_NEEDS_CONFIG = "convert a folder with a config.json"


def convert_checkpoint(
    source: str | Path, *, num_channels: int | None = None, encoder_only: bool = False
) -> PreTrainedModel:
    """Build a SegFormer model from weights that another code base, or this one, wrote.

    Read are the paper's own .pth files (segmentation and ImageNet), mmsegmentation's encoders,
    segmentation_models_pytorch, Transformers' own SegFormer, this package's checkpoints and PEFT's LoRA adapters to
    them. Sizes, classes and channels come from a folder's config.json, or from the tensors' shapes where there is none.
    Every key is used exactly once.

    Two things stay as in the paper, whichever code the weights come from. Logits have a quarter of the image's sides,
    and enlarging them does not align corners; segmentation_models_pytorch enlarges its own by four and does. LayerNorms
    of patch embeddings and reductions have epsilon 1e-5; mmsegmentation's have 1e-6 there too.

    Args:
        source: a file, a folder or a Hub repository, see `checkpoints.read_checkpoint`.
        num_channels: input channels of the model; see `inflate` for what becomes of the first convolution.
        encoder_only: drop any head and give a `SegFormerModel`, as a start for training. It is the way to use encoders
            whose head is another network's: mmsegmentation's, or a U-Net on a SegFormer encoder.

    Returns:
        In float32 and eval mode, by the head that was found: `SegFormerForSemanticSegmentation`,
        `SegFormerForImageClassification`, or without one `SegFormerModel`.

    Raises:
        OSError: if there is no such path or repository, or a file cannot be read.
        ValueError: if the file is no checkpoint or not SegFormer's; missing and unexpected keys are listed.

    Examples:
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
        raise ValueError(f"num_channels is {num_channels!r}; expected a whole number, at least 1")
    return build_model(read_merged_checkpoint(locate(source)), num_channels=num_channels, encoder_only=encoder_only)


def build_model(
    checkpoint: Checkpoint, *, num_channels: int | None = None, encoder_only: bool = False
) -> PreTrainedModel:
    """Build the model of a checkpoint that was read; see `convert_checkpoint`.

    Raises:
        ValueError: if names or shapes are not SegFormer's.
    """
    weights = to_published(checkpoint.path, checkpoint.weights, encoder_only=encoder_only)
    config = checkpoint.config or _infer_config(checkpoint, weights)
    if num_channels is not None:
        first = "segformer.encoder.patch_embeddings.0.proj.weight"
        weights[first] = inflate(weights[first], num_channels)
        config.num_channels = num_channels
    return _load(checkpoint.path, config, weights)


def inflate(weight: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Adapt the first convolution's pretrained filters to another number of input channels.

    More channels: channel i takes filter i mod N of the N there are, divided by the number of channels that share it,
    so four channels R G B N become R/2, G, B, R/2. Fewer channels: each takes the sum of all filters over the number of
    channels. Either way the sum of the filters is kept, so an image whose channels are all equal gives the same
    response.

    Args:
        weight: (C, N, k, k).
        num_channels: input channels of the result.

    Returns:
        (C, num_channels, k, k) in float32.
    """
    weight = weight.float()
    num_filters = weight.shape[1]
    if num_channels < num_filters:
        return weight.sum(1, keepdim=True).expand(-1, num_channels, -1, -1) / num_channels
    taken = torch.arange(num_channels) % num_filters
    return weight[:, taken] / taken.bincount()[taken][:, None, None]


def _infer_config(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor]) -> SegFormerConfig:
    """Infer the configuration from the shapes of the published weights.

    Raises:
        ValueError: if the network differs from every published one in properties that shapes cannot show.
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
            f"{checkpoint.path} has hidden_sizes {hidden_sizes}; expected the proportions {list(heads)}, the numbers "
            f"of heads in every published SegFormer: {_NEEDS_CONFIG}"
        )
    if patch_sizes != list(_PATCH_SIZES[: len(depths)]):
        raise ValueError(
            f"{checkpoint.path} has patch_sizes {patch_sizes}; expected those of every published SegFormer, "
            f"{list(_PATCH_SIZES)}, and strides to match: {_NEEDS_CONFIG}"
        )
    mlp_ratios = [encoder(f"block.{stage}.0.mlp.dense1")[0] / hidden_sizes[stage] for stage in stages]
    if any(ratio != int(ratio) for ratio in mlp_ratios):
        raise ValueError(f"{checkpoint.path} has mlp_ratios {mlp_ratios}; expected whole numbers")
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
    """Infer the fields of the configuration that follow from the head, if there is one."""
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
    """Build the model of a configuration with weights by published names; the head decides the class.

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
    if sum(config.depths) > len(weights):  # a damaged number would take hours to build
        raise ValueError(f"{path}: depths is {list(config.depths)}, but there are only {len(weights)} tensors")
    with torch.device("meta"):  # no random initialisation that is replaced at once
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


__all__ = ["build_model", "convert_checkpoint", "inflate"]
