"""`Trainer` with the optimizer, schedule and samples of the paper's recipe, exact metrics, and our model card."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, HubStrategy
from transformers.utils import PushInProgress

from ..config import EmaConfig, OptimizerConfig
from ..data.torch_datasets import EpochSampler, EvalDataset, KeyedDataset, KeyedStream
from ..evaluation.metrics import LOWER_IS_BETTER, SegmentationMetrics
from ..hub.model_card import write_card
from .arguments import check_arguments
from .callbacks import Stopwatch
from .collect import Collector
from .distillation import Teacher
from .ema import WeightAverage, synchronize_buffers
from .optimization import apply_settings, freeze, group_settings, parameter_groups, poly_lr_with_warmup
from .resume import LOSS_STATE, TRAINING_WEIGHTS, saved_attributes
from .run_folder import RunFolder
from .run_record import build_run_record, write_run_record
from .uploads import upload_checkpoint, upload_model

_STATE = "SegFormerTrainer"  # key of our part of trainer_state.json, beside the callbacks' states


class SegFormerTrainer(Trainer):
    """A `Trainer` for segmentation as in the paper's code, exact in any number of processes.

    - Two learning rates, the head's ten times the encoder's; weight decay on everything but LayerNorms.
    - Linear warm-up (`TrainingArguments.warmup_steps`) times polynomial decay, step i of T at
      base (1 - i / T)^power. An `lr_scheduler_type` other than the default is Transformers' own.
    - From a `KeyedDataset`, such as `TrainDataset`, samples are drawn so that a resumed run sees what an uninterrupted
      one would have seen.
    - With `SegmentationMetrics`, each process counts its images and only the counts are reduced: images may differ in
      size, their number need not divide by that of the processes, and the result equals that of one process.
    - One batch is evaluated before the first step, so that what fails in evaluation fails at once.
    - With `ema`, evaluation, the choice of the best checkpoint, `save_model` and the model after `train` have averaged
      weights; checkpoints hold both.
    - With a `teacher`, its predictions are a second target. The logged loss is the sum; evaluation measures the model's
      own.
    - An `EarlyStoppingCallback` of a resumed run continues its count. A changed learning rate or weight
      decay applies from there on.
    - One run at a time trains in `output_dir`.

    Args:
        *args: as for `Trainer`.
        optimizer_config: parameter groups and schedule.
        ema: average of the weights.
        teacher: what `distillation.load_teacher` gives.
        **kwargs: as for `Trainer`.

    Raises:
        ValueError: if an argument cannot work for segmentation; the message names it with the remedy.

    Examples:
        >>> from transformers import TrainingArguments
        >>> from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerTrainer
        >>> model = SegFormerForSemanticSegmentation(SegFormerConfig.from_variant("b0", num_labels=3))
        >>> arguments = TrainingArguments("outputs", max_steps=4, remove_unused_columns=False, report_to="none")
        >>> trainer = SegFormerTrainer(model, arguments)
        >>> [group["lr"] for group in trainer.create_optimizer().param_groups]  # head, encoder
        [0.0005, 5e-05]
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any
    push_in_progress: PushInProgress | None

    def __init__(
        self,
        *args: Any,
        optimizer_config: OptimizerConfig | None = None,
        ema: EmaConfig | None = None,
        teacher: Teacher | None = None,
        **kwargs: Any,
    ):
        self.optimizer_config = optimizer_config or OptimizerConfig()
        self.ema = ema or EmaConfig()
        self.run_id: str | None = None
        self._collector: Collector | None = None
        self._average: WeightAverage | None = None
        super().__init__(*args, **kwargs)
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        self._check_arguments()
        if self.model_init is None:
            freeze(self.model, self.optimizer_config)
        self.add_callback(Stopwatch())
        self.add_callback(_StartOfRun(self))
        if self.ema.decay:  # before the trackers, which may save the model at the end
            self.callback_handler.callbacks.insert(0, _AverageWeights(self))

    def _check_arguments(self) -> None:
        """Refuse at construction what would fail, or do nothing, later."""
        arguments = self.args
        check_arguments(arguments)
        if arguments.lr_scheduler_type == "linear" and arguments.lr_scheduler_kwargs:
            raise ValueError(
                f"lr_scheduler_kwargs is {arguments.lr_scheduler_kwargs} for the paper's schedule; expected "
                "OptimizerConfig(power=...), in a recipe optimizer.power"
            )
        metric = (arguments.metric_for_best_model or "").removeprefix("eval_")
        if metric in LOWER_IS_BETTER and arguments.greater_is_better:
            raise ValueError(
                f"greater_is_better is true for metric_for_best_model={metric}, which would choose the worst "
                "checkpoint; expected greater_is_better=False"
            )
        if self.ema.decay and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"ema.decay is {self.ema.decay} for a sharded model; expected 0, or DDP in place of FSDP: "
                "configuration/accelerate/ddp.yaml"
            )
        strategy = getattr(arguments, "train_sampling_strategy", "random")
        if isinstance(self.train_dataset, KeyedDataset) and strategy != "random":
            kind = type(self.train_dataset).__name__
            raise ValueError(f"train_sampling_strategy is {strategy!r}; expected 'random' for a {kind}")

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build a model by `model_init`, frozen as the optimizer's configuration says."""
        model = super().call_model_init(trial)
        freeze(model, self.optimizer_config)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, as the only run in `output_dir`.

        Raises:
            ValueError: if another run is training in that folder; the message names its owner.
        """
        with RunFolder(self.args.output_dir, is_owner=self.is_world_process_zero()) as run:
            run.keep_identity()
            self.run_id, self._average = run.id, None
            output = super().train(*args, **kwargs)
            synchronize_buffers(self.model, self.accelerator)
            return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `Trainer.evaluate` does: one network in all processes, averaged where there is an average."""
        with self._evaluated_weights():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as `Trainer.predict` does: one network in all processes, averaged where there is an average."""
        with self._evaluated_weights():
            return super().predict(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the model as `Trainer.save_model` does, with averaged weights where there is an average."""
        with self._averaged_weights():
            super().save_model(*args, **kwargs)

    @contextmanager
    def _evaluated_weights(self) -> Iterator[None]:
        with self._averaged_weights():
            synchronize_buffers(self.model, self.accelerator)
            yield

    def _averaged_weights(self) -> Any:
        return nullcontext() if self._average is None else self._average.applied()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer of `TrainingArguments.optim` with the paper's parameter groups.

        Raises:
            ValueError: if that optimizer makes groups of its own.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, keywords = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & keywords.keys():
                raise ValueError(
                    f"optim is {self.args.optim}, which makes its own parameter groups; expected one that takes the "
                    "paper's, such as adamw_torch"
                )
            self.optimizer = kind(self.parameter_groups(model), **keywords)
        return self.optimizer

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the optimizer's groups of a model's trained parameters."""
        return parameter_groups(model, self.args.learning_rate, self.args.weight_decay, self.optimizer_config)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Build the paper's schedule, or Transformers' own where `lr_scheduler_type` names one."""
        if self.lr_scheduler is not None or self.args.lr_scheduler_type != "linear":
            return super().create_scheduler(num_training_steps, optimizer)
        factor = partial(
            poly_lr_with_warmup,
            num_steps=num_training_steps,
            num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
            power=self.optimizer_config.power,
        )
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss; in training, add the distillation loss."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]  # which a loss function of the user's takes out
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        ignore_index = self.model.config.semantic_loss_ignore_index
        with self.accelerator.autocast():
            loss = loss + self.teacher.loss(outputs["logits"], inputs["pixel_values"], labels, ignore_index)
        return (loss, outputs) if return_outputs else loss

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Publish model, image processor, code and card, as `Trainer.push_to_hub` does, and no other file.

        Args:
            commit_message: of the commit.
            blocking: return when the files are uploaded, else a future.
            token: with the right to write; by default `hub_token`.
            revision: branch; by default `hub_revision`.
            **kwargs: `private` for a repository that does not exist yet, others are those of `create_model_card`.

        Returns:
            the commit, or a future of it; None in other processes than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        creation = {"private": kwargs.pop("private")} if "private" in kwargs else {}
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, **creation)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        self._finish_current_push()
        return upload_model(
            self.args.output_dir,
            self.hub_model_id,
            commit_message=commit_message,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            run_as_future=not blocking,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        earlier = [] if running is None or running.is_done() else running.jobs
        if earlier and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
        jobs = upload_checkpoint(
            Path(checkpoint_folder),
            self.hub_model_id,
            names.get(strategy, ""),
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
        )
        self.push_in_progress = PushInProgress([*earlier, *jobs])

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
        """Write our card into `output_dir` from the run record; `push_to_hub` calls it and passes its keywords on.

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
            record = build_run_record(self, title=title, hub_id=hub_id, license=license, base_model=finetuned_from)
            write_run_record(self.args.output_dir, record)
        write_card(self.args.output_dir, repo_id=self.hub_model_id)

    def get_train_dataloader(self):
        """Return the training batches."""
        return _with_own_generator(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None):
        """Return the evaluation batches; none is dropped."""
        with self._nothing_dropped():
            return _with_own_generator(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any):
        """Return the batches of a data set to predict; none is dropped."""
        with self._nothing_dropped():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _nothing_dropped(self) -> Iterator[None]:
        """Suspend `dataloader_drop_last`, which would shorten evaluation too."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_train_sampler(self, train_dataset: Any = None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, KeyedDataset):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(len(dataset), seed, lambda: int(self.state.epoch or 0), dataset.balance)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate or predict; with `SegmentationMetrics` only losses and counts leave a process.

        Predictions, which `Trainer.predict` returns, are segmentation maps (H, W) in the data set's order: one array
        where all have one size, else a list. Without labels they have the prepared images' size.
        """
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if not self._counts_matrices() or prediction_loss_only or self.args.prediction_loss_only:
            return super().evaluation_loop(*arguments)
        collector = Collector(self.accelerator, self.compute_metrics, keeps_maps=description == "Prediction")
        self._collector = collector
        try:
            output = super().evaluation_loop(*arguments)
        finally:
            self._collector = None
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in collector.metrics().items()}
        predictions, labels = collector.gather_maps()
        return output._replace(predictions=predictions, label_ids=labels, metrics={**metrics, **output.metrics})

    def _counts_matrices(self) -> bool:
        """Return True if evaluation needs no user's function on gathered logits."""
        if isinstance(self.compute_metrics, SegmentationMetrics):
            return True
        owner = getattr(self.preprocess_logits_for_metrics, "__self__", None)
        return self.compute_metrics is None and isinstance(owner, SegmentationMetrics)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Predict one batch; where matrices are counted, logits and labels stay in this process."""
        if self._collector is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        self._collector.add(logits, labels, inputs["pixel_values"].shape[-2:])
        return loss, None, None

    def try_evaluation(self) -> None:
        """Evaluate one batch of each evaluation data set and drop the result: what fails in evaluation fails now."""
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for dataset in datasets.values():
            if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
                continue
            inputs = self._first_batch(dataset)
            collector = Collector(self.accelerator, self.compute_metrics) if self._counts_matrices() else None
            self._collector = collector
            try:
                self.prediction_step(self.model, inputs, prediction_loss_only=self.compute_metrics is None)
            finally:
                self._collector = None
            if collector is not None:
                collector.metrics()

    def _first_batch(self, dataset: Any) -> dict[str, Any]:
        """This process's first evaluation batch, without a loader whose workers would have to be stopped."""
        import datasets

        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="evaluation")
        size, rank = self.args.eval_batch_size, self.args.process_index
        samples = [dataset[index % len(dataset)] for index in range(size * rank, size * (rank + 1))]
        return self._get_collator_with_removed_columns(self.data_collator, "evaluation")(samples[: len(dataset)])

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Keep the checkpoint that a callback asked for, which `save_strategy="best"` takes back (Transformers 5)."""
        return super()._determine_best_metric(metrics, trial) or self.control.should_save

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        pending = self.accelerator.gather(self._tr_loss.detach()).mean().item()
        self.state.stateful_callbacks[_STATE] = {
            "args": {},
            "attributes": {
                "run_id": self.run_id,
                "pending_loss": pending,
                "last_logged_step": self._globalstep_last_logged,
                **({"averaged": True} if self._average is not None else {}),
                **({"teacher": self.teacher.digest} if self.teacher is not None else {}),
            },
        }
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None and self.args.should_save:
            self._average.save_training_weights(Path(output_dir))
        if self._loss_module is not None and self.args.should_save:
            torch.save(self._loss_module.state_dict(), Path(output_dir, LOSS_STATE))

    @property
    def _loss_module(self) -> nn.Module | None:
        """The model's loss where it is a module with tensors."""
        loss = getattr(self.model, "loss_function", None)
        return loss if isinstance(loss, nn.Module) and loss.state_dict() else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_in_train:
            return
        path = Path(resume_from_checkpoint, LOSS_STATE)
        if path.is_file() and self._loss_module is not None:
            self._loss_module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        path = Path(resume_from_checkpoint, TRAINING_WEIGHTS)
        if path.is_file() != bool(self.ema.decay):
            holds = "averaged weights" if path.is_file() else "no averaged weights"
            raise ValueError(
                f"{path.parent} holds {holds}, but ema.decay is {self.ema.decay}; expected that of its run"
            )
        found, wanted = saved_attributes(path.parent).get("teacher"), self.teacher and self.teacher.digest
        if found != wanted:
            before, now = (f"the teacher {each}" if each else "no teacher" for each in (found, wanted))
            raise ValueError(
                f"{path.parent} was trained with {before}, but the run has {now}; expected that of its run"
            )
        if self.ema.decay:
            self._average = WeightAverage.resume(self.model, self.ema, path.parent)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        settings = group_settings(self.optimizer)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise ValueError(
                f"{checkpoint} holds parameters in other groups of equal learning rate and weight decay; expected "
                "[optimizer] and trainer.weight_decay of its run: a changed value is taken over where parameters with "
                "equal ones still have equal ones"
            ) from error
        apply_settings(self.optimizer, self.lr_scheduler, settings)

    def _load_best_model(self) -> None:
        if self._average is not None:
            self._average.apply()  # stays where the best checkpoint is gone, of which the Trainer only warns
        super()._load_best_model()
        self._average = None  # the best checkpoint's is in the model

    def _restore_pending_loss(self) -> None:
        """Restore the sum of losses since the last log, which an uninterrupted run would still hold."""
        saved = saved_state(self.state)
        if "pending_loss" in saved and saved["last_logged_step"] < self.state.global_step:
            self._tr_loss.fill_(saved["pending_loss"])
            self._globalstep_last_logged = saved["last_logged_step"]
            self._total_loss_scalar -= saved["pending_loss"]  # train_loss is the mean of this call's steps alone

    def _restore_best_checkpoint(self) -> None:
        """Find the best checkpoint of a run whose folder was moved, which the Trainer looks for at its old place."""
        best = Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
        if self.state.best_model_checkpoint is None and best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _restore_early_stopping(self) -> None:
        """Restore how long a resumed run has waited, which the Trainer saves and does not read."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                saved = self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
                if isinstance(saved, dict):  # a list if there are several
                    callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]


def saved_state(state: Any) -> dict[str, Any]:
    """Our part of a checkpoint's `TrainerState`: `run_id`, `pending_loss`, `last_logged_step`; empty if it has none."""
    return (state.stateful_callbacks or {}).get(_STATE, {}).get("attributes", {})


def _with_own_generator(loader: Any):
    """Give a loader of our samples, for which workers draw nothing, its own source of the workers' seeds.

    It draws one whenever workers start. Persistent ones start once, but in a resumed run again: drawn from the global
    generator this would shift every drop path after it.
    """
    base = getattr(loader, "base_dataloader", loader)
    if isinstance(base.dataset, KeyedDataset | KeyedStream | EvalDataset):
        base.generator = torch.Generator()
    return loader


class _StartOfRun(TrainerCallback):
    """Restores what the Trainer forgets on a resume, and tries one evaluation batch before the first step."""

    def __init__(self, trainer: SegFormerTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Restore, then evaluate one batch without a trace in weights or random numbers."""
        state.compute_steps(args, state.max_steps)  # else a resumed run keeps to the intervals of its checkpoint
        self.trainer._restore_pending_loss()
        self.trainer._restore_best_checkpoint()
        self.trainer._restore_early_stopping()
        if args.eval_strategy != "no":
            model.eval()
            with torch.random.fork_rng(devices=[]):
                self.trainer.try_evaluation()


class _AverageWeights(TrainerCallback):
    """Averages the weights of a `SegFormerTrainer` after each optimizer step, and leaves it the average at the end."""

    def __init__(self, trainer: SegFormerTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the first weights, unless a checkpoint was resumed."""
        if self.trainer._average is None:
            self.trainer._average = WeightAverage(self.trainer.model, self.trainer.ema)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add a step, unless the scaler of fp16 skipped it."""
        average = self.trainer._average
        if average is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            average.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the average into the model, where that does not hold a checkpoint's already."""
        if self.trainer._average is not None:
            self.trainer._average.apply()
            self.trainer._average = None


__all__ = ["SegFormerTrainer", "saved_state"]
