"""What may cut a run short, and how it ends then."""

import signal
import threading
from typing import Any

import torch
from torch.utils.data import get_worker_info
from transformers import Trainer, TrainerCallback


class StopAfterStep(TrainerCallback):
    """Ctrl-C, or SIGTERM from a scheduler, ends the step at hand, saves a checkpoint and stops the training.

    A second Ctrl-C stops at once. With several processes all stop after the same step, whichever was told.

    Args:
        trainer: whose training it is; it must be given this callback, too.

    Attributes:
        stopped: whether that happened.
    """

    def __init__(self, trainer: Trainer):
        self.accelerator, self.stopped = trainer.accelerator, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen; only a process's main thread can."""
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}

    def _hear(self, number: int, frame: Any) -> None:
        if get_worker_info() is not None:  # a loader's worker hears Ctrl-C too, and must serve until the step is done
            return
        self.unlisten()
        self.accelerator.set_trigger()
        if self.accelerator.is_main_process:
            print("\nStopping after this step, with a checkpoint; Ctrl-C again stops at once.", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look whether any process was told to stop."""
        if self.accelerator.check_trigger():
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen no more."""
        self.unlisten()

    def unlisten(self) -> None:
        """Give the signals back to whoever had them; to be called after an error, too, which has no `on_train_end`."""
        for number, handler in self.__dict__.pop("handlers", {}).items():
            signal.signal(number, handler)


class StopAtNonFinite(TrainerCallback):
    """Ends a run before gradients that are no numbers reach the weights."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at every gradient.

        Raises:
            ValueError: if one is infinite or NaN. (With fp16 that is expected: the scaler passes over such a step.)
        """
        sums = [parameter.grad.sum() for parameter in model.parameters() if parameter.grad is not None]
        if not args.fp16 and sums and not torch.stack(sums).sum().isfinite():
            raise ValueError(
                f"the loss of step {state.global_step + 1} has gradients that are infinite or NaN; the weights are "
                "still good, but nothing can be learnt: lower trainer.learning_rate or set trainer.max_grad_norm=1, "
                "then go on with --resume or start anew"
            )
