"""SegFormer's configuration, with the field names of Transformers' own files.

Every field of a published `segformer` config.json is read under its published name. Values that cannot make a network
are refused at construction rather than deep in a forward pass.
"""

from copy import deepcopy
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
import transformers

# The Auto classes import this file first when they load a checkpoint's code.
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
    raise ImportError(
        f"SegFormer's code needs transformers 5.17 or newer, but {transformers.__version__} is installed: "
        "pip install --upgrade 'transformers>=5.17,<6'"
    )

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Written into every config.json, so that each Auto class finds the code that is shipped with the file.
AUTO_MAP = {
    "AutoConfig": "configuration_segformer.SegFormerConfig",
    "AutoModel": "modeling_segformer.SegFormerModel",
    "AutoModelForSemanticSegmentation": "modeling_segformer.SegFormerForSemanticSegmentation",
    "AutoModelForImageClassification": "modeling_segformer.SegFormerForImageClassification",
    "AutoBackbone": "modeling_segformer.SegFormerBackbone",
}

# Paper, Table 6 and section 3.1 (the published code and weights have Mix-FFN ratio 4 throughout).
VARIANTS = {
    "b0": {"hidden_sizes": [32, 64, 160, 256], "depths": [2, 2, 2, 2], "decoder_hidden_size": 256},
    "b1": {"hidden_sizes": [64, 128, 320, 512], "depths": [2, 2, 2, 2], "decoder_hidden_size": 256},
    "b2": {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 4, 6, 3], "decoder_hidden_size": 768},
    "b3": {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 4, 18, 3], "decoder_hidden_size": 768},
    "b4": {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 8, 27, 3], "decoder_hidden_size": 768},
    "b5": {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 6, 40, 3], "decoder_hidden_size": 768},
}

_PER_STAGE = (
    "depths",
    "sr_ratios",
    "hidden_sizes",
    "patch_sizes",
    "strides",
    "num_attention_heads",
    "mlp_ratios",
)
# Beyond these a file is damaged: the number of a tensor's elements would overflow, or names fill the memory.
_MAX_WIDTH, _MAX_LABELS = 2**15, 2**20
_PROBABILITIES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout_prob",
    "drop_path_rate",
)
# Inherited fields of a config.json that describe the network and its outputs, beside the class's own fields.
_INHERITED_FIELDS = {"model_type", "num_labels", "id2label", "label2id", "out_features", "out_indices", "problem_type"}
_INHERITED_FIELDS |= {"palette"}  # of `inference.predictor`, which checks it
# Fields that Transformers writes or wrote, which choose neither code nor weights.
_HARMLESS_FIELDS = {"architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}
_HARMLESS_FIELDS |= {"output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"}
_HARMLESS_FIELDS |= {"is_encoder_decoder", "_commit_hash", "downsampling_rates", "image_size"}
_HARMLESS_FIELDS |= {"use_cache"}  # every Trainer sets it
# Keywords that take the place of a file's fields before the configuration is built, since they are checked together.
_LABEL_FIELDS = ("id2label", "label2id", "semantic_loss_ignore_index")


def default_ignore_index(num_labels: int) -> int:
    """The label of ignored pixels: 255 while no class has that label, else -100.

    255 is the convention of ADE20K, Cityscapes and Transformers' SegFormer; -100 is PyTorch's, and never a class.

    Args:
        num_labels: number of classes K.

    Examples:
        >>> from hf_segformer.configuration_segformer import default_ignore_index
        >>> default_ignore_index(255), default_ignore_index(256)
        (255, -100)
    """
    return 255 if num_labels <= 255 else -100


def closest(name: str, known) -> str:
    """Return a hint with the known word nearest to a misspelt one, or with all of them if none is near."""
    near = get_close_matches(str(name).lower(), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"


def network_fields() -> set[str]:
    """Names of the fields of a config.json that describe the network: all that a loaded model depends on."""
    inherited = {field.name for field in fields(PreTrainedConfig)}
    return {field.name for field in fields(SegFormerConfig)} - inherited | _INHERITED_FIELDS


def foreign_fields(values: dict[str, Any], config_class: type | None = None) -> dict[str, Any]:
    """Return the fields of a config.json that no SegFormer reads, and dtypes that PyTorch does not have.

    Such a field may choose code, as `attn_implementation`, `quantization_config` and `use_kernels` do, weights
    elsewhere, or replace an attribute of the class.

    Args:
        values: content of the config.json.
        config_class: a subclass of `SegFormerConfig` whose own fields are read, too.

    Examples:
        >>> from hf_segformer.configuration_segformer import foreign_fields
        >>> foreign_fields({"depths": [2, 2, 2, 2], "dtype": "float16", "use_kernels": True})
        {'use_kernels': True}
    """
    known = network_fields() | _HARMLESS_FIELDS | {field.name for field in fields(config_class or SegFormerConfig)}
    return {
        name: value
        for name, value in values.items()
        if name not in known or (name in ("dtype", "torch_dtype") and value is not None and not _is_dtype(value))
    }


def _count_labels(values: dict[str, Any]) -> int:
    """Return the number of labels by a config.json; 2, the default, where it does not say or is damaged."""
    names, number = values.get("id2label"), values.get("num_labels")
    if isinstance(names, dict | list) and names:
        return len(names)
    return number if isinstance(number, int) else 2


def _is_dtype(value: Any) -> bool:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    return isinstance(found, torch.dtype)


@strict
class SegFormerConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a SegFormer network (paper section 3).

    The defaults are B0. The fields are those of Transformers' `SegformerConfig`, whose files load unchanged; unlike
    there, `layer_norm_eps` is read.

    Args:
        num_channels: bands of the input image.
        num_encoder_blocks: number of stages, 1 to 4; every list below has one entry a stage.
        depths: number of transformer blocks.
        sr_ratios: reduction of keys and values along each side; 1 is full attention.
        hidden_sizes: channels C, divisible by the number of heads.
        patch_sizes: kernel size of the overlapping patch embedding, odd.
        strides: its stride.
        num_attention_heads: number of heads.
        mlp_ratios: width of the Mix-FFN over C.
        hidden_act: name of the Mix-FFN's activation; `"gelu"` is the exact one.
        hidden_dropout_prob: dropout after projections and in the Mix-FFN.
        attention_probs_dropout_prob: dropout of attention weights.
        classifier_dropout_prob: dropout of whole channels (Dropout2d) before the decode head's classifier.
        initializer_range: standard deviation of the truncated normal for the encoder's linear layers.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over all blocks.
        layer_norm_eps: epsilon of the blocks' and stages' LayerNorms (1e-6 in the original; patch embeddings and
            reductions keep 1e-5, as there). Set 1e-5 to repeat what Transformers' own model computes.
        decoder_hidden_size: width of the decode head.
        semantic_loss_ignore_index: label of ignored pixels, none of the classes'; by default
            `default_ignore_index(num_labels)`, 255 for up to 255 classes and -100 for more.
        reshape_last_stage: return the last stage of `SegFormerModel` as (B, C, H, W) rather than as tokens (B, N, C).
        out_features: stages that `SegFormerBackbone` returns, of `"stage1"` to `"stage4"`; the last by default.
        out_indices: the same by index, from 0.
        id2label: names of the classes, a list or a dictionary from numbers; `label2id` follows from it.

    Raises:
        ValueError: if values cannot make a network; the message names the field and the value.

    Examples:
        >>> from hf_segformer import SegFormerConfig
        >>> SegFormerConfig.from_variant("b2", num_labels=19).depths
        [3, 4, 6, 3]
    """

    model_type = "hf_segformer"
    attribute_map = {"num_hidden_layers": "num_encoder_blocks"}  # noqa: RUF012 (the base class annotates it)
    _auto_class: ClassVar[str | None] = "AutoConfig"

    num_channels: int = 3
    num_encoder_blocks: int = 4
    depths: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    sr_ratios: list[int] | tuple[int, ...] = (8, 4, 2, 1)
    hidden_sizes: list[int] | tuple[int, ...] = (32, 64, 160, 256)
    patch_sizes: list[int] | tuple[int, ...] = (7, 3, 3, 3)
    strides: list[int] | tuple[int, ...] = (4, 2, 2, 2)
    num_attention_heads: list[int] | tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: list[int] | tuple[int, ...] = (4, 4, 4, 4)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    classifier_dropout_prob: float | int = 0.1
    initializer_range: float = 0.02
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float = 1e-6
    decoder_hidden_size: int = 256
    semantic_loss_ignore_index: int | None = None
    reshape_last_stage: bool = True
    id2label: Any = None
    label2id: Any = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __setattr__(self, name, value):
        super().__setattr__(name, dict(enumerate(value)) if name == "id2label" and isinstance(value, list) else value)

    def __post_init__(self, **kwargs):
        num_labels = kwargs.get("num_labels")
        if num_labels is not None and (not isinstance(num_labels, int) or num_labels < 1):
            raise ValueError(f"num_labels is {num_labels!r}; expected a whole number, at least 1")
        if num_labels is not None and num_labels > _MAX_LABELS:  # each label gets a name before any check runs
            raise ValueError(f"num_labels is {num_labels}; expected at most {_MAX_LABELS}")
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        if self.label2id is None and self.id2label is not None:
            self.label2id = {name: label for label, name in self.id2label.items()}
        if self.semantic_loss_ignore_index is None:
            self.semantic_loss_ignore_index = default_ignore_index(self.num_labels)
        self.check()
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @property
    def stage_names(self) -> list[str]:
        """`["stage1", ...]`, one a stage, as `SegFormerBackbone` calls them."""
        return [f"stage{stage}" for stage in range(1, self.num_encoder_blocks + 1)]

    def check(self) -> None:
        """Refuse values that cannot make a network; the models call it too, for fields that were assigned later.

        Raises:
            ValueError: names the field and the value.
        """
        stages = self.num_encoder_blocks
        if not 1 <= stages <= 4:
            raise ValueError(f"num_encoder_blocks is {stages}; expected 1 to 4")
        for name in _PER_STAGE:
            values = list(getattr(self, name))
            if len(values) != stages:
                raise ValueError(
                    f"{name} is {values}, {len(values)} entries; expected num_encoder_blocks, {stages}: one a stage"
                )
            if min(values) < 1:
                raise ValueError(f"{name} is {values}; expected at least 1 in every entry")
            if max(values) > _MAX_WIDTH:
                raise ValueError(f"{name} is {values}; expected at most {_MAX_WIDTH} in every entry")
        for hidden, heads in zip(self.hidden_sizes, self.num_attention_heads, strict=True):
            if hidden % heads:
                raise ValueError(
                    f"hidden_sizes is {list(self.hidden_sizes)} and num_attention_heads is "
                    f"{list(self.num_attention_heads)}; expected channels that divide by heads, but {hidden} channels "
                    f"do not divide by {heads} heads"
                )
        if any(size % 2 == 0 for size in self.patch_sizes):
            raise ValueError(f"patch_sizes is {list(self.patch_sizes)}; expected odd numbers")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act is {self.hidden_act!r}; expected an activation's name: {closest(self.hidden_act, ACT2FN)}"
            )
        if set(self.id2label) != set(range(len(self.id2label))):
            raise ValueError(f"id2label has the keys {sorted(self.id2label)}; expected 0 to {len(self.id2label) - 1}")
        num_classes = max(self.num_labels, 2)  # a single label has the background beside it
        if self.semantic_loss_ignore_index is not None and 0 <= self.semantic_loss_ignore_index < num_classes:
            raise ValueError(
                f"semantic_loss_ignore_index is {self.semantic_loss_ignore_index}, one of the classes 0 to "
                f"{num_classes - 1}; expected another number, semantic_loss_ignore_index="
                f"{default_ignore_index(num_classes)}"
            )
        for name in ("num_channels", "decoder_hidden_size", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("num_channels", "decoder_hidden_size"):
            if getattr(self, name) > _MAX_WIDTH:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at most {_MAX_WIDTH}")
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a value in [0, 1)")
        for name in ("initializer_range", "layer_norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a value above 0")

    @classmethod
    def from_variant(cls, variant: str, **overrides) -> "SegFormerConfig":
        """Build the configuration of a published size (paper, Table 6).

        Args:
            variant: `"b0"` to `"b5"`.
            **overrides: any field of this class, `num_labels`, `id2label`, ...

        Raises:
            ValueError: if the variant or a field is unknown; the message gives the nearest known name.
        """
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}: {closest(variant, VARIANTS)}")
        known = {field.name for field in fields(cls)} | {"num_labels", "out_features", "out_indices"}
        known = {name for name in known if not name.startswith("_")} | {"attn_implementation"}
        for name in overrides:
            if name not in known:
                raise ValueError(f"unknown field {name!r} of SegFormerConfig: {closest(name, known)}")
        return cls(**{**deepcopy(VARIANTS[variant]), **overrides})

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read config.json of a SegFormer, this package's or Transformers' own; other networks are refused."""
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = values.get("model_type")
        if model_type not in ("hf_segformer", "segformer"):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a config of model_type {model_type!r}; "
                "expected 'hf_segformer' or 'segformer'"
            )
        return {**values, "model_type": cls.model_type}, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build the configuration of a file's fields, which keywords override.

        Fields of the file that are not known are dropped with a warning: they may choose code (`attn_implementation`,
        which may name a repository of kernels, `quantization_config`) or weights elsewhere. As keywords they count.
        `id2label` as a keyword brings its own `label2id`. An ignore index that is the default of the file's number of
        labels follows the number that keywords give; so does 255, which Transformers writes whatever that number is.
        """
        foreign = foreign_fields(config_dict, cls)
        values = {name: value for name, value in config_dict.items() if name not in foreign}
        if named := [f"{name} is {value!r:.100}" for name, value in sorted(foreign.items()) if value is not None]:
            logger.warning(
                f"{', '.join(named)} in a config file; dropped, since a file may not choose code or weights elsewhere: "
                "pass it to from_pretrained, if you trust it"
            )
        if kwargs.get("id2label") is not None:
            values.pop("label2id", None)
        if values.get("semantic_loss_ignore_index") in (255, default_ignore_index(_count_labels(values))):
            del values["semantic_loss_ignore_index"]
        values |= {name: kwargs.pop(name) for name in _LABEL_FIELDS if name in kwargs}
        return super().from_dict(values, **kwargs)

    def to_dict(self) -> dict:
        """Return the fields as written to config.json, with the whole map from Auto classes to the shipped code."""
        values = super().to_dict()
        if self._auto_class is not None:
            # A repository's name before "--" points at where the code came from; it is now shipped with the file.
            own = {name: reference.split("--")[-1] for name, reference in (values.get("auto_map") or {}).items()}
            values["auto_map"] = {**AUTO_MAP, **own}
        return values


__all__ = [
    "AUTO_MAP",
    "VARIANTS",
    "SegFormerConfig",
    "closest",
    "default_ignore_index",
    "foreign_fields",
    "network_fields",
]
