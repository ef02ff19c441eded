"""Figures for the trackers that `trainer.report_to` names; the Trainer itself logs the numbers."""

import importlib
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from .data import Data
from .report import draw_predictions, predict_some

_WITH_IMAGES = ("wandb", "trackio")


class LogPredictions(TrainerCallback):
    """After each evaluation logs predictions on a few images to TensorBoard, Weights & Biases or Trackio.

    Args:
        trainer: the Trainer that has the trackers.
        data: the evaluation images are its.
    """

    def __init__(self, trainer: Trainer, data: Data):
        self.trainer, self.data = trainer, data

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Draw once, and log to every tracker that takes images."""
        callbacks = self.trainer.callback_handler.callbacks
        boards = [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]
        modules = [importlib.import_module(name) for name in _WITH_IMAGES if name in args.report_to]
        if not state.is_world_process_zero or not (any(boards) or modules):
            return
        image = draw_predictions(predict_some(model, self.data), self.data.names, self.data.palette)
        for board in filter(None, boards):
            board.add_image("predictions", np.asarray(image), state.global_step, dataformats="HWC")
        for module in modules:
            module.log({"predictions": module.Image(image)})


__all__ = ["LogPredictions"]
