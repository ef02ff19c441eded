"""The Trainer with the optimiser, the schedule and the samples of the paper's recipe, and with our model card."""

import re
import time
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from ..config import OptimizerConfig
from ..data.torch_datasets import EpochSampler, EvalDataset, TrainDataset, TrainStream
from ..hub.model_card import write_card
from .run_record import build_run_record, write_training

_ENCODER_LAYER = re.compile(r"encoder\.(patch_embeddings|block|layer_norm)\.(\d+)\.(\d+)?")
_WARMUP_START = 1e-6


class SegFormerTrainer(Trainer):
    """A `Trainer` that optimises as the paper's code does and writes our model card; else it is one.

    - Two learning rates, the head's ten times the encoder's; no weight decay on LayerNorms, on all else there is.
    - Linear warm-up (`TrainingArguments.warmup_steps`) times polynomial decay, step i of T at
      base (1 - i / T)^power. Another `lr_scheduler_type` than the default is used as Transformers has it.
    - From a `TrainDataset` samples are drawn so that a resumed run sees what an unbroken one would have seen.

    Args:
        *args: as for `Trainer`.
        optimization: see `OptimizerConfig`.
        **kwargs: as for `Trainer`.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any

    def __init__(self, *args: Any, optimization: OptimizerConfig | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.optimization = optimization or OptimizerConfig()
        if self.optimization.freeze_encoder:
            for name, parameter in self.model.named_parameters():
                if _ENCODER_LAYER.search(name):
                    parameter.requires_grad_(False)
        self.add_callback(Stopwatch())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimiser of `TrainingArguments.optim` with the paper's parameter groups.

        Raises:
            ValueError: if that optimiser makes groups of its own.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, keywords = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & keywords.keys():
                raise ValueError(f"optim {self.args.optim} makes parameter groups of its own: train by a plain Trainer")
            groups = parameter_groups(model, self.args.learning_rate, self.args.weight_decay, self.optimization)
            self.optimizer = kind(groups, **keywords)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Build the paper's schedule, or Transformers' own where `lr_scheduler_type` names one."""
        if self.lr_scheduler is not None or self.args.lr_scheduler_type != "linear":
            return super().create_scheduler(num_training_steps, optimizer)
        factor = partial(
            poly_lr_with_warmup,
            num_steps=num_training_steps,
            num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
            power=self.optimization.power,
        )
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: Any = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Any = None,
        dataset_tags: Any = None,
        dataset: Any = None,
        dataset_args: Any = None,
    ) -> None:
        """Write our card into `output_dir`, from what was measured; `push_to_hub` calls it and passes its keywords on.

        Args:
            language: not used.
            license: of the model, in the Hub's words.
            tags: not used.
            model_name: not used, the card has a name of its own.
            finetuned_from: repository of the weights that training began with.
            tasks: not used.
            dataset_tags: the data set's repository, or several.
            dataset: the data set's name, or several.
            dataset_args: not used.
        """
        if not self.is_world_process_zero():
            return
        if self.state.global_step:
            hub_id, title = (
                names if isinstance(names, str) or not names else names[0] for names in (dataset_tags, dataset)
            )
            facts = build_run_record(self, title=title, hub_id=hub_id, license=license, base_model=finetuned_from)
            write_training(self.args.output_dir, facts)
        write_card(self.args.output_dir, repo_id=self.hub_model_id)

    def get_train_dataloader(self):
        """The training batches."""
        return _seeded_apart(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None):
        """The evaluation batches."""
        return _seeded_apart(super().get_eval_dataloader(eval_dataset))

    def _get_train_sampler(self, train_dataset: Any = None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, TrainDataset):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(len(dataset), seed, lambda: int(self.state.epoch or 0))


def _seeded_apart(loader: Any):
    """Give a loader of our samples, for which workers draw nothing, its own source of the workers' seeds.

    It draws one whenever workers start. Those that live on start once, but in a resumed run again: drawn from the
    global generator this would shift every drop path after it.
    """
    base = getattr(loader, "base_dataloader", loader)
    if isinstance(base.dataset, TrainDataset | TrainStream | EvalDataset):
        base.generator = torch.Generator()
    return loader


class Stopwatch(TrainerCallback):
    """Notes the hours of training in each row of the log, over all the runs that a run was resumed from."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from what earlier runs took."""
        self.start = time.monotonic() - 3600 * max((row.get("hours", 0.0) for row in state.log_history), default=0.0)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add `hours` to the newest row, but for an evaluation without training."""
        if hasattr(self, "start") and state.log_history:
            state.log_history[-1]["hours"] = (time.monotonic() - self.start) / 3600

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop: what comes after is no training."""
        del self.start


def poly_lr_with_warmup(step: int, num_steps: int, num_warmup_steps: int, power: float) -> float:
    """The factor on the learning rate in a step, as mmcv's poly policy with linear warm-up has it.

    Args:
        step: from 0.
        num_steps: T, of the whole run.
        num_warmup_steps: over which a second factor rises from 1e-6 to 1.
        power: of the decay.

    Example:
        >>> from hf_segformer.training.trainer import poly_lr_with_warmup
        >>> 6e-5 * poly_lr_with_warmup(1500, num_steps=160_000, num_warmup_steps=1500, power=1.0)
        5.94375e-05
    """
    factor = max(0.0, 1 - step / num_steps) ** power
    if step < num_warmup_steps:
        factor *= 1 - (1 - step / num_warmup_steps) * (1 - _WARMUP_START)
    return factor


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, how: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters, grouped by learning rate and weight decay.

    Args:
        model: any SegFormer model, wrapped by PEFT or not.
        lr: learning rate of the encoder's last block.
        weight_decay: of everything but LayerNorms.
        how: see `OptimizerConfig`.

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
            key = (_lr_multiplier(name, depths, how), 0.0 if name in undecayed else weight_decay)
            groups.setdefault(key, []).append(parameter)
    return [{"params": groups[key], "lr": lr * key[0], "weight_decay": key[1]} for key in sorted(groups, reverse=True)]


def _lr_multiplier(name: str, depths: list[int], how: OptimizerConfig) -> float:
    """Of a parameter, by the number of blocks that come after its layer."""
    found = _ENCODER_LAYER.search(name)
    if found is None:
        return how.head_lr_multiplier
    kind, stage, block = found[1], int(found[2]), int(found[3] or 0)
    layer = sum(depths[:stage]) + {"patch_embeddings": 0, "block": block + 1, "layer_norm": depths[stage]}[kind]
    return how.layer_lr_decay ** (sum(depths) - layer)
