"""Exponential moving average of a network's weights.

Averaged are the trained parameters and, with them, BatchNorm's running statistics: these belong to the weights that
made them, and a copy of the last ones would go with the last weights alone. Frozen parameters are as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from ..config import EmaConfig
from .resume import TRAINING_WEIGHTS


class WeightAverage:
    """The average of a network's weights, and the exchange of one for the other.

    Args:
        model: the network, unwrapped; with adapters these and what else is trained are averaged.
        config: decay and its warm-up.

    Attributes:
        average: averaged tensors by name.
        num_updates: optimizer steps so far.

    Raises:
        ValueError: if trained parameters are in half precision, where steps that small are lost.

    Examples:
        >>> import torch
        >>> from hf_segformer.config import EmaConfig
        >>> from hf_segformer.training.ema import WeightAverage
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(layer.weight)
        >>> average = WeightAverage(layer, EmaConfig(decay=0.75, warmup=False))
        >>> _ = torch.nn.init.ones_(layer.weight)
        >>> average.update()
        >>> average.average["weight"].item()
        0.25
    """

    def __init__(self, model: nn.Module, config: EmaConfig):
        self.config, self.num_updates = config, 0
        self._live = averaged_tensors(model)
        for name, tensor in self._live.items():
            if tensor.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"ema.decay is {config.decay}, but {name} is {tensor.dtype}; expected weights in float32: load the "
                    "model with dtype=torch.float32, and train in half precision by bf16=True"
                )
        self.average = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._is_applied = False

    @property
    def decay(self) -> float:
        """Share of the average that the next update keeps."""
        warm = (1 + self.num_updates) / (10 + self.num_updates)
        return min(self.config.decay, warm) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after an optimizer step."""
        torch._foreach_lerp_([*self.average.values()], [*self._live.values()], 1 - self.decay)
        self.num_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the network for a while; within one such context another changes nothing."""
        if self._is_applied:
            yield
            return
        training = self._copy()
        self._is_applied = True
        self.apply()
        try:
            yield
        finally:
            self._fill(training)
            self._is_applied = False

    def apply(self) -> None:
        """Put the average into the network."""
        self._fill(self.average)

    def save_training_weights(self, checkpoint: Path) -> None:
        """Write what a resumed run needs beside the averaged weights, into the folder of a checkpoint."""
        torch.save({"num_updates": self.num_updates, "weights": self._copy()}, checkpoint / TRAINING_WEIGHTS)

    @classmethod
    def resume(cls, model: nn.Module, config: EmaConfig, checkpoint: Path) -> "WeightAverage":
        """Take over a checkpoint whose average is in the network already, and put the training's weights there.

        Raises:
            ValueError: if the checkpoint holds other tensors.
        """
        average = cls(model, config)
        path = checkpoint / TRAINING_WEIGHTS
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: tensor.shape for name, tensor in saved["weights"].items()}
        wanted = {name: tensor.shape for name, tensor in average.average.items()}
        if found != wanted:
            different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            raise ValueError(
                f"{path} holds other weights than are trained now, {different[0]} for one; expected the recipe of "
                "its run"
            )
        average.num_updates = saved["num_updates"]
        average._fill(saved["weights"])
        return average

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def _fill(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in self._live.items():
            tensor.copy_(weights[name])


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and floating-point buffers by name; counters are none."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def synchronize_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the buffers of the first one, which is what a checkpoint holds.

    With DDP each has running statistics of its own images; without this each would evaluate another network.
    """
    if accelerator.distributed_type.name.startswith("MULTI_"):
        for _, buffer in sorted(model.named_buffers()):
            buffer.copy_(broadcast(buffer))


__all__ = ["WeightAverage", "averaged_tensors", "synchronize_buffers"]
