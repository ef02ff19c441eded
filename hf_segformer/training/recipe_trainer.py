"""The Trainer of a recipe's run: every evaluation is the one that the model card shows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, ProgressCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..data.torch_datasets import EvalDataset, collate
from ..evaluation.detailed import evaluate_in_detail
from .data import Data
from .distillation import Teacher
from .recipe import Recipe
from .report import ProgressBar
from .tracking import LogPredictions
from .trainer import SegFormerTrainer


class RecipeTrainer(SegFormerTrainer):
    """A `SegFormerTrainer` that evaluates by the recipe's `[evaluation]`, in full precision unless that says otherwise.

    So the best checkpoint is chosen by the metric that the model card shows: to the digit, sliding window, flips and
    scales included. There is no evaluation loss; it would need a second pass over the images.

    Args:
        model: the network, with adapters or without.
        arguments: the recipe's `[trainer]`.
        data: images and masks.
        train_dataset: augmented training samples.
        recipe: description of the run.
        teacher: of `[distill]`.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        data: Data,
        train_dataset: Any,
        recipe: Recipe,
        teacher: Teacher | None = None,
    ):
        self.data, self.evaluation = data, recipe.evaluation
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=EvalDataset(data.evaluation, data.processor),
            processing_class=data.processor,
            optimizer_config=recipe.optimizer,
            ema=recipe.ema,
            teacher=teacher,
        )
        self.add_callback(LogPredictions(self, data))
        if recipe.early_stopping.patience:
            self.add_callback(EarlyStoppingCallback(recipe.early_stopping.patience, recipe.early_stopping.min_delta))
        if not arguments.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressBar())

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as `segformer evaluate --recipe` does; processes share the images."""
        result = self._evaluate_rows(self.data.evaluation, not self.args.disable_tqdm)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.named_metrics.items()}
        return EvalLoopOutput(None, None, metrics, result.num_images)

    def try_evaluation(self) -> None:
        """Evaluate one batch in each process and drop the result."""
        number = min(self.args.world_size * self.evaluation.batch_size, len(self.data.evaluation))
        self._evaluate_rows(self.data.evaluation.select(range(number)), progress=False)

    def _evaluate_rows(self, rows: Any, progress: bool) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        with _without_autocast(model):
            return evaluate_in_detail(
                model, self.data.processor, rows, self.evaluation, names=self.data.names, progress=progress
            )[0]


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Suspend the autocast that Accelerate wraps around `forward`, as an attribute of the instance."""
    wrapped = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


__all__ = ["RecipeTrainer"]
