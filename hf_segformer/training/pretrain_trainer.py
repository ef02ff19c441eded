"""The Trainer of a pre-training: soft class targets or masked images, and their evaluation."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction, ProgressCallback, Trainer, TrainingArguments

from ..config import EmaConfig, OptimizerConfig
from ..data.pretraining_datasets import ImageTransform, PretrainCollator
from .report import ProgressBar
from .trainer import SegFormerTrainer


class PretrainTrainer(SegFormerTrainer):
    """A `SegFormerTrainer` for classification or masked images.

    Resuming and weight averaging work as in `SegFormerTrainer`. All weights have one learning rate, and weight decay is
    on matrices and convolutions alone, as in DeiT's recipe.

    Args:
        model: `SegFormerForImageClassification` or `SegFormerForMaskedImages`.
        arguments: the recipe's `[trainer]`.
        transform: of the samples.
        train_dataset: `PretrainDataset` or `PretrainStream`.
        eval_dataset: `PretrainEvalDataset`.
        ema: average of the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        transform: ImageTransform,
        train_dataset: Any,
        eval_dataset: Any,
        ema: EmaConfig,
    ):
        is_masked = transform.pretraining.is_masked
        if not is_masked:
            model.loss_function = class_loss
        super().__init__(
            model=model,
            args=arguments,
            data_collator=PretrainCollator(transform),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=transform.processor,
            optimizer_config=OptimizerConfig(head_lr_multiplier=1.0),
            ema=ema,
            compute_metrics=None if is_masked else top_accuracies,
            preprocess_logits_for_metrics=None if is_masked else rank_of_class,
        )
        if not arguments.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressBar())

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return two groups: weights that decay, and biases, LayerNorms and the colour of hidden patches."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = {
            self.args.weight_decay: [parameter for parameter in trained if parameter.ndim > 1],
            0.0: [parameter for parameter in trained if parameter.ndim <= 1],
        }
        if not self.args.weight_decay:
            groups = {0.0: trained}
        return [
            {"params": parameters, "lr": self.args.learning_rate, "weight_decay": decay}
            for decay, parameters in groups.items()
        ]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's own card: ours is for segmentation."""
        Trainer.create_model_card(self, *args, **kwargs)


def class_loss(labels: Tensor, pooled_logits: Tensor, config: Any) -> Tensor:
    """Cross entropy, the mean over the images, in float32.

    Args:
        labels: (B,) classes, or (B, K) probabilities.
        pooled_logits: (B, K).
        config: not used; the model passes it to every loss.
    """
    return F.cross_entropy(pooled_logits.float(), labels)


def rank_of_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the other classes that are at least as likely as the true one: (B, K), (B,) -> (B,); -1 for NaN."""
    true = logits.gather(1, labels[:, None].to(torch.int64))
    return (logits >= true).sum(1) - 1


def top_accuracies(prediction: EvalPrediction) -> dict[str, float]:
    """Shares of the images whose true class is the first, or among the first five, by `rank_of_class`."""
    ranks = np.asarray(prediction.predictions)
    return {f"top{number}": float(((ranks >= 0) & (ranks < number)).mean()) for number in (1, 5)}


__all__ = ["PretrainTrainer", "class_loss", "rank_of_class", "top_accuracies"]
