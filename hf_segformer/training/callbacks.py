"""Callbacks that time a run, or end it early: on a signal, or before non-finite gradients reach the weights."""

import signal
import threading
import time
from typing import Any

import torch
from torch.utils.data import get_worker_info
from transformers import Trainer, TrainerCallback


class StopAfterStep(TrainerCallback):
    """On Ctrl-C, or a scheduler's SIGTERM, finishes the current step, saves a checkpoint and stops the training.

    A second Ctrl-C stops at once. With several processes all stop after the same step, whichever got the signal.

    Args:
        trainer: the Trainer that this callback is added to.

    Attributes:
        stopped: True after a signal stopped the training.
    """

    def __init__(self, trainer: Trainer):
        self.accelerator, self.stopped = trainer.accelerator, False
        self._handlers: dict[signal.Signals, Any] = {}  # those of before the training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Install signal handlers, unless a trial with a larger batch did; only a process's main thread can."""
        if threading.current_thread() is threading.main_thread() and not self._handlers:
            signals = (signal.SIGINT, signal.SIGTERM)
            self._handlers = {number: signal.signal(number, self._request_stop) for number in signals}

    def _request_stop(self, number: int, frame: Any) -> None:
        if get_worker_info() is not None:  # a loader's worker gets Ctrl-C too, and must serve until the step is done
            return
        self.restore_handlers()
        self.accelerator.set_trigger()
        if self.accelerator.is_main_process:
            print("\nStopping after this step, with a checkpoint; Ctrl-C again stops at once.", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if any process got a signal."""
        if self.accelerator.check_trigger():
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the signal handlers."""
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Restore the signal handlers; to be called after an error too, which has no `on_train_end`."""
        handlers, self._handlers = self._handlers, {}
        for number, handler in handlers.items():
            signal.signal(number, handler)


class StopAtNonFinite(TrainerCallback):
    """Ends a run before infinite or NaN gradients reach the weights."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check every gradient.

        Raises:
            ValueError: if one is infinite or NaN. (With fp16 that is expected: the scaler skips such a step.)
        """
        sums = [parameter.grad.sum() for parameter in model.parameters() if parameter.grad is not None]
        if not args.fp16 and sums and not torch.stack(sums).sum().isfinite():
            raise ValueError(
                f"the loss of step {state.global_step + 1} has infinite or NaN gradients; the weights are still good, "
                "but cannot be trained any further: lower trainer.learning_rate or set trainer.max_grad_norm=1, then "
                "continue with --resume or start again"
            )


class Stopwatch(TrainerCallback):
    """Adds the hours of training to each row of the log, over all the runs that a run was resumed from."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from the hours of earlier runs."""
        self.start = time.monotonic() - 3600 * max((row.get("hours", 0.0) for row in state.log_history), default=0.0)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add `hours` to the newest row, except for an evaluation without training."""
        if hasattr(self, "start") and state.log_history:
            state.log_history[-1]["hours"] = (time.monotonic() - self.start) / 3600

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop: what follows is not training."""
        del self.start


__all__ = ["StopAfterStep", "StopAtNonFinite", "Stopwatch"]
