"""SegFormer's configuration: the shape of the network in the words of Transformers' own files.

Every field of a published `segformer` config.json is read under its published name, and every combination of values
that can not make a network is refused here, at construction, rather than deep in a forward pass.
"""

from copy import deepcopy
from dataclasses import fields
from difflib import get_close_matches
from typing import ClassVar

import transformers

# The Auto classes import this file first when they load a checkpoint's code, so this is the place to say it.
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
    raise ImportError(
        f"SegFormer's code needs transformers 5.17 or newer, but {transformers.__version__} is installed: "
        "pip install --upgrade 'transformers>=5.17,<6'"
    )

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

# What is written into every config.json, so that each Auto class finds the code that lies beside it.
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


def closest(name: str, known) -> str:
    """A hint that names the known word nearest to a misspelt one, or lists all of them if none is near."""
    near = get_close_matches(str(name).lower(), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"


@strict
class SegFormerConfig(BackboneConfigMixin, PreTrainedConfig):
    """The shape of a SegFormer network (paper section 3).

    The defaults are B0. The fields are those of Transformers' `SegformerConfig`, so that its files are read as they
    are; unlike there, `layer_norm_eps` is read.

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
        semantic_loss_ignore_index: label of pixels that do not count.
        reshape_last_stage: whether `SegFormerModel` gives its last stage as (B, C, H, W) or as tokens (B, N, C).
        out_features: stages that `SegFormerBackbone` returns, of `"stage1"` to `"stage4"`; the last by default.
        out_indices: the same by index, from 0.

    Raises:
        ValueError: if values can not make a network; the message names the field and the value.

    Example:
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
    semantic_loss_ignore_index: int = 255
    reshape_last_stage: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        num_labels = kwargs.get("num_labels")
        if num_labels is not None and (not isinstance(num_labels, int) or num_labels < 1):
            raise ValueError(f"num_labels is {num_labels!r}, but it must be a whole number, at least 1")
        if num_labels is not None and num_labels > _MAX_LABELS:  # each gets a name, before any check comes
            raise ValueError(f"num_labels is {num_labels}, but it must be at most {_MAX_LABELS}")
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        self.check()
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @property
    def stage_names(self) -> list[str]:
        """`["stage1", ...]`, one a stage, as `SegFormerBackbone` calls them."""
        return [f"stage{stage}" for stage in range(1, self.num_encoder_blocks + 1)]

    def check(self) -> None:
        """Refuse what can not make a network; also called on what was changed after construction.

        Raises:
            ValueError: names the field and the value.
        """
        stages = self.num_encoder_blocks
        if not 1 <= stages <= 4:
            raise ValueError(f"num_encoder_blocks is {stages}, but SegFormer has 1 to 4 stages")
        for name in _PER_STAGE:
            values = list(getattr(self, name))
            if len(values) != stages:
                raise ValueError(
                    f"{name} is {values}: {len(values)} entries, but num_encoder_blocks is {stages}; give one a stage"
                )
            if min(values) < 1:
                raise ValueError(f"{name} is {values}, but every entry must be at least 1")
            if max(values) > _MAX_WIDTH:
                raise ValueError(f"{name} is {values}, but every entry must be at most {_MAX_WIDTH}")
        for hidden, heads in zip(self.hidden_sizes, self.num_attention_heads, strict=True):
            if hidden % heads:
                raise ValueError(
                    f"hidden_sizes is {list(self.hidden_sizes)} and num_attention_heads is "
                    f"{list(self.num_attention_heads)}, but {hidden} channels do not divide by {heads} heads"
                )
        if any(size % 2 == 0 for size in self.patch_sizes):
            raise ValueError(f"patch_sizes is {list(self.patch_sizes)}, but every entry must be odd")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act is {self.hidden_act!r}, no activation's name: {closest(self.hidden_act, ACT2FN)}"
            )
        if set(self.id2label) != set(range(len(self.id2label))):
            raise ValueError(
                f"id2label has the keys {sorted(self.id2label)}, but must number its {len(self.id2label)} labels from 0"
            )
        for name in ("num_channels", "decoder_hidden_size", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        for name in ("num_channels", "decoder_hidden_size"):
            if getattr(self, name) > _MAX_WIDTH:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at most {_MAX_WIDTH}")
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must lie in [0, 1)")
        for name in ("initializer_range", "layer_norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be above 0")

    @classmethod
    def from_variant(cls, variant: str, **overrides) -> "SegFormerConfig":
        """The configuration of a published size (paper, Table 6).

        Args:
            variant: `"b0"` to `"b5"`.
            **overrides: any field of this class, `num_labels`, `id2label`, ...

        Raises:
            ValueError: if the variant or a field is unknown; the message gives the nearest right name.
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
        """Read config.json; Transformers' own `segformer` files count as ours, any other network is refused."""
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = values.get("model_type")
        if model_type not in ("hf_segformer", "segformer"):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a config of model_type {model_type!r}, "
                "but SegFormer reads 'hf_segformer' and 'segformer'"
            )
        return {**values, "model_type": cls.model_type}, kwargs

    def to_dict(self) -> dict:
        """The fields as written to config.json, with the whole map from Auto classes to the shipped code."""
        values = super().to_dict()
        if self._auto_class is not None:
            # A repository's name before "--" points at where the code came from; it now lies beside the file.
            own = {name: reference.split("--")[-1] for name, reference in (values.get("auto_map") or {}).items()}
            values["auto_map"] = {**AUTO_MAP, **own}
        return values


__all__ = ["SegFormerConfig"]
