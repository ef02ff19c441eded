"""PEFT adapter folders: low-rank adapters merged into the weights of their base model.

The merge needs tensors alone, W + scale * B @ A, so neither PEFT nor any code that an adapter's configuration may name
takes part. Adapters of other kinds are refused with the way to merge them in PEFT.

Axes: R the rank.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..configuration_segformer import default_ignore_index
from ..files import read_json
from .checkpoints import ADAPTER_CONFIG, Checkpoint, read_checkpoint, read_weights_file
from .name_tables import some, to_published

logger = logging.get_logger(__name__)

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_BATCH_NORM = "decode_head.batch_norm."
_MERGED_IN_PEFT = "merge it in PEFT (merge_and_unload), save the model, and give that folder"
# Fields of LoraConfig that do not change what is merged; every other one must be unset.
_HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal")  # others change the base model's weights


def read_merged_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file or a folder of weights; a PEFT adapter's folder is merged into its base model.

    Args:
        path: see `checkpoints.read_checkpoint`; or a folder with adapter_config.json, whose
            `base_model_name_or_path` must be a local folder or file.

    Raises:
        OSError: if a file does not exist or cannot be opened.
        ValueError: as `read_checkpoint`, and if an adapter is not a plain LoRA, its base is not here, or it belongs to
            another model.
    """
    folder = Path(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        return read_checkpoint(path)
    values = read_json(folder / ADAPTER_CONFIG)
    _check_mergeable(folder / ADAPTER_CONFIG, values)
    base = adapter_base(folder)
    checkpoint = read_checkpoint(base)
    weights = to_published(checkpoint.path, checkpoint.weights)
    adapter = _read_adapter(folder)
    merged = weights | _whole_tensors(adapter)
    _merge(merged, adapter, folder, values)
    if unknown := {name for name in merged.keys() - weights.keys() if not name.startswith("decode_head.")}:
        raise ValueError(f"{folder} holds tensors that {base} has no place for, {some(unknown)}")
    _warn_of_statistics(folder, base, adapter)
    config = checkpoint.config
    classifier = merged.get("decode_head.classifier.weight")
    if config is not None and classifier is not None and config.num_labels != len(classifier):
        config.num_labels = len(classifier)  # a new head on an encoder
        config.semantic_loss_ignore_index = default_ignore_index(len(classifier))
    return Checkpoint(folder, merged, config, checkpoint.classes)


def _check_mergeable(path: Path, values: Mapping[str, Any]) -> None:
    """Raise ValueError unless the adapter is a LoRA whose merge is a product of two matrices."""
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {values.get('peft_type')!r}; expected 'LORA': {_MERGED_IN_PEFT}")
    for name in ("alpha_pattern", "rank_pattern"):
        if values.get(name):
            raise ValueError(f"{path}: {name} is set; expected one rank and alpha for all layers: {_MERGED_IN_PEFT}")
    if values.get("init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        raise ValueError(
            f"{path}: init_lora_weights is {values['init_lora_weights']!r}, which changes the base: {_MERGED_IN_PEFT}"
        )
    others = sorted(values.keys() - _HARMLESS - {"init_lora_weights"})
    if unusual := next((name for name in others if values[name]), None):
        raise ValueError(f"{path}: {unusual} is set; only plain LoRA is merged here: {_MERGED_IN_PEFT}")
    for name in ("r", "lora_alpha"):
        if not isinstance(values.get(name), int | float) or values[name] <= 0:
            raise ValueError(f"{path}: {name} is {values.get(name)!r}; expected a number above 0")


def adapter_base(folder: Path) -> Path:
    """Return the local path of an adapter's base model; nothing is downloaded because a file asks for it.

    Raises:
        ValueError: if the base is not here, or is an adapter itself.
    """
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or not Path(base).exists():
        named = f"of {base!r}, which is not a local folder" if base else "of an unnamed base model"
        raise ValueError(
            f"{folder} is a PEFT adapter {named}: download the base and give its path as base_model_name_or_path in "
            f"{ADAPTER_CONFIG}, or {_MERGED_IN_PEFT}"
        )
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder} is a PEFT adapter of another adapter, {base}: {_MERGED_IN_PEFT}")
    return Path(base)


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    """Read an adapter's tensors by the names of the base model's modules."""
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds {ADAPTER_CONFIG}, but no {_FILES[0]}: save the adapter again")
    tensors = read_weights_file(path).weights
    return {key.removeprefix(_PREFIX).replace(".base_layer.", "."): tensor for key, tensor in tensors.items()}


def _whole_tensors(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that replace those of the base: `modules_to_save` and trained biases."""
    return {name: tensor for name, tensor in adapter.items() if ".lora_" not in name}


def _merge(weights: dict[str, Tensor], adapter: Mapping[str, Tensor], folder: Path, values: Mapping[str, Any]) -> None:
    """Add scale * B @ A to each adapted weight, in float32 as PEFT does for a float32 base."""
    modules = {name.split(".lora_")[0] for name in adapter if ".lora_" in name}
    for module in sorted(modules):
        down, up = adapter.get(f"{module}.lora_A.weight"), adapter.get(f"{module}.lora_B.weight")
        weight = weights.get(f"{module}.weight")
        if down is None or up is None or weight is None:
            lacks = f"{module}.weight in its base" if weight is None else f"lora_A or lora_B of {module}"
            raise ValueError(f"{folder} finds no {lacks}: {_MERGED_IN_PEFT}")
        rank = len(down) if down.ndim else 0
        if rank != values["r"] or up.ndim < 2 or up.shape[1] != rank:
            raise ValueError(f"{folder}: the rank of {module} is {rank}; expected r of {ADAPTER_CONFIG}, {values['r']}")
        scale = values["lora_alpha"] / (rank**0.5 if values.get("use_rslora") else rank)
        delta = _product(up.float(), down.float()) * scale
        if delta.shape != weight.shape:
            raise ValueError(
                f"{folder}: {module} is adapted as {tuple(delta.shape)}; expected its base's {tuple(weight.shape)}"
            )
        weights[f"{module}.weight"] = weight.float() + delta
        if (bias := adapter.get(f"{module}.lora_B.bias")) is not None:
            weights[f"{module}.bias"] = weights[f"{module}.bias"].float() + bias.float() * scale


def _product(up: Tensor, down: Tensor) -> Tensor:
    """Compose two linear layers or convolutions: (O, R) @ (R, I), or (O, R, 1, 1) after (R, I, k, k)."""
    if down.ndim == 2:
        return up @ down
    return torch.einsum("or,rihw->oihw", up.flatten(1), down)


def _warn_of_statistics(folder: Path, base: Path, adapter: Mapping[str, Tensor]) -> None:
    """Warn where training moved the head's BatchNorm and the adapter does not hold where to."""
    if not any(name.startswith(f"{_BATCH_NORM}running_") for name in adapter):
        logger.warning(
            f"{folder} holds no running statistics of the head's BatchNorm, which training changes: those of {base} "
            "are used, and its predictions may differ from those at the end of training; list decode_head in "
            "modules_to_save to store them"
        )


__all__ = ["adapter_base", "read_merged_checkpoint"]
