"""Optimizer groups, learning-rate schedule and frozen layers of the paper's recipe."""

import re
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..config import OptimizerConfig

_ENCODER_LAYER = re.compile(r"encoder\.(patch_embeddings|block|layer_norm)\.(\d+)\.(\d+)?")
_WARMUP_START = 1e-6
_SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")  # of a group; what else it holds may be state


def poly_lr_with_warmup(step: int, num_steps: int, num_warmup_steps: int, power: float) -> float:
    """Learning rate factor of a step: mmcv's poly policy with linear warm-up.

    Args:
        step: from 0.
        num_steps: T, of the whole run.
        num_warmup_steps: steps over which a second factor rises from 1e-6 to 1.
        power: exponent of the decay.

    Examples:
        >>> from hf_segformer.training.optimization import poly_lr_with_warmup
        >>> 6e-5 * poly_lr_with_warmup(1500, num_steps=160_000, num_warmup_steps=1500, power=1.0)
        5.94375e-05
    """
    factor = max(0.0, 1 - step / num_steps) ** power
    if step < num_warmup_steps:
        factor *= 1 - (1 - step / num_warmup_steps) * (1 - _WARMUP_START)
    return factor


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate and weight decay.

    Args:
        model: any SegFormer model, wrapped by PEFT or not.
        lr: learning rate of the encoder's last block.
        weight_decay: of everything but LayerNorms.
        config: multipliers of the learning rate.

    Returns:
        groups with `params`, `lr` and `weight_decay`, in order of learning rate.
    """
    depths = model.config.depths
    undecayed = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (_lr_multiplier(name, depths, config), 0.0 if name in undecayed else weight_decay)
            groups.setdefault(key, []).append(parameter)
    return [{"params": groups[key], "lr": lr * key[0], "weight_decay": key[1]} for key in sorted(groups, reverse=True)]


def _lr_multiplier(name: str, depths: list[int], config: OptimizerConfig) -> float:
    """Learning rate multiplier of a parameter, by the number of blocks after its layer."""
    found = _ENCODER_LAYER.search(name)
    if found is None:
        return config.head_lr_multiplier
    kind, stage, block = found[1], int(found[2]), int(found[3] or 0)
    layer = sum(depths[:stage]) + {"patch_embeddings": 0, "block": block + 1, "layer_norm": depths[stage]}[kind]
    return config.layer_lr_decay ** (sum(depths) - layer)


def group_settings(optimizer: Any) -> list[dict[str, Any]]:
    """Return the learning rate, weight decay and constants of each group, as an optimizer was built with them."""
    return [{name: group[name] for name in _SETTINGS if name in group} for group in optimizer.param_groups]


def apply_settings(optimizer: Any, scheduler: Any, settings: list[dict[str, Any]]) -> None:
    """Give a restored optimizer and its schedule the settings of their own run, which PyTorch replaces by saved ones.

    Where no setting has changed, every rate stays what it was, to the bit. The rate of a schedule that is not a
    function of the step (ReduceLROnPlateau) stays the saved one.

    Args:
        optimizer: with the groups of a checkpoint.
        scheduler: its schedule, restored as well.
        settings: of `group_settings`, from before it was restored.
    """
    groups = optimizer.param_groups
    for group, own in zip(groups, settings, strict=True):
        group.update(own)
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, rate, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in groups]


def freeze(model: nn.Module, config: OptimizerConfig) -> None:
    """Freeze the encoder, or its first stages, as the configuration says.

    Args:
        model: any SegFormer model, wrapped by PEFT or not.
        config: `freeze_encoder` and `freeze_stages`.

    Raises:
        ValueError: if the encoder has fewer stages.
    """
    num_stages = len(model.config.depths)
    if config.freeze_stages > num_stages:
        raise ValueError(
            f"optimizer.freeze_stages is {config.freeze_stages}; expected at most {num_stages}, all stages"
        )
    frozen = num_stages if config.freeze_encoder else config.freeze_stages
    for name, parameter in model.named_parameters():
        found = _ENCODER_LAYER.search(name)
        if found is not None and int(found[2]) < frozen:
            parameter.requires_grad_(False)


__all__ = ["apply_settings", "freeze", "group_settings", "parameter_groups", "poly_lr_with_warmup"]
