"""Support of every `TrainingArguments` field, as data.

A recipe's `[trainer]` table and `SegFormerTrainer` accept what is `SUPPORTED` or `HARMLESS`. What is `PROGRAM` is fine
in a `SegFormerTrainer` and refused in a recipe, where the program decides it or another key sets it. What is `REFUSED`
cannot work for segmentation, and both refuse it before anything is read. A test compares the table with the fields of
the installed Transformers. Nothing heavy is imported here.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

SUPPORTED, HARMLESS, PROGRAM, REFUSED = "supported", "harmless", "program", "refused"


class Rule(NamedTuple):
    """Support of one field.

    Attributes:
        support: one of the four levels.
        note: what the field does here, the reason why it has no effect, or the remedy of the refusal.
    """

    support: str
    note: str


_OPTIMIZER = Rule(SUPPORTED, "optimizer and schedule")
_LENGTH = Rule(SUPPORTED, "length of the run and batch size")
_PRECISION = Rule(SUPPORTED, "precision, memory and compilation of training steps")
_LOG = Rule(SUPPORTED, "logging and trackers")
_EVALUATION = Rule(SUPPORTED, "time of evaluation and choice of the best checkpoint")
_SAVE = Rule(SUPPORTED, "checkpoints")
_CHANCE = Rule(SUPPORTED, "random numbers and resume")
_LOADER = Rule(SUPPORTED, "data loading")
_DISTRIBUTED = Rule(SUPPORTED, "several processes")
_ONE_MATRIX = Rule(HARMLESS, "evaluation keeps a confusion matrix in each process, neither predictions nor inputs")
_HUB = Rule(PROGRAM, "publish a finished run by `segformer push`")
_TEXT = Rule(REFUSED, "it is for language models")
_SCRIPT = Rule(PROGRAM, "a recipe always trains and evaluates")
_HALF_EVALUATION = Rule(REFUSED, 'the weights would stay in half precision; set evaluation.dtype = "bfloat16"')

RULES: dict[str, Rule] = {
    "output_dir": _SAVE,
    "per_device_train_batch_size": _LENGTH,
    "num_train_epochs": _LENGTH,
    "max_steps": _LENGTH,
    "gradient_accumulation_steps": _LENGTH,
    "auto_find_batch_size": _LENGTH,
    "learning_rate": _OPTIMIZER,
    "lr_scheduler_type": Rule(SUPPORTED, "linear is the paper's polynomial decay; others are Transformers' own"),
    "lr_scheduler_kwargs": Rule(SUPPORTED, "for schedules other than linear, whose exponent is optimizer.power"),
    "warmup_steps": _OPTIMIZER,
    "optim": Rule(SUPPORTED, "optimizers that take parameter groups"),
    "optim_args": _OPTIMIZER,
    "optim_target_modules": Rule(REFUSED, "the optimizer has the paper's parameter groups; use lora.target_modules"),
    "weight_decay": _OPTIMIZER,
    "adam_beta1": _OPTIMIZER,
    "adam_beta2": _OPTIMIZER,
    "adam_epsilon": _OPTIMIZER,
    "max_grad_norm": _OPTIMIZER,
    "average_tokens_across_devices": Rule(HARMLESS, "the loss is a mean over pixels and takes no number of tokens"),
    "label_smoothing_factor": Rule(
        REFUSED,
        "it is for one label an image; set loss.label_smoothing, in pre-training pretraining.label_smoothing, "
        "or model.loss_function = SegmentationLoss(label_smoothing=...)",
    ),
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "bf16_full_eval": _HALF_EVALUATION,
    "fp16_full_eval": _HALF_EVALUATION,
    "tf32": _PRECISION,
    "activation_checkpointing": _PRECISION,
    "activation_checkpointing_kwargs": _PRECISION,
    "gradient_checkpointing": _PRECISION,
    "gradient_checkpointing_kwargs": _PRECISION,
    "torch_compile": _PRECISION,
    "torch_compile_backend": _PRECISION,
    "torch_compile_mode": _PRECISION,
    "torch_empty_cache_steps": _PRECISION,
    "use_liger_kernel": _TEXT,
    "liger_kernel_config": _TEXT,
    "use_cache": Rule(HARMLESS, "a segmentation model has no key-value cache"),
    "neftune_noise_alpha": _TEXT,
    "logging_strategy": _LOG,
    "logging_steps": _LOG,
    "logging_first_step": _LOG,
    "log_on_each_node": _LOG,
    "logging_nan_inf_filter": _LOG,
    "include_num_input_tokens_seen": _TEXT,
    "log_level": _LOG,
    "log_level_replica": _LOG,
    "disable_tqdm": _LOG,
    "report_to": _LOG,
    "run_name": _LOG,
    "project": _LOG,
    "trackio_space_id": _LOG,
    "trackio_bucket_id": _LOG,
    "trackio_static_space_id": _LOG,
    "eval_strategy": _EVALUATION,
    "eval_steps": _EVALUATION,
    "eval_delay": _EVALUATION,
    "eval_on_start": _EVALUATION,
    "per_device_eval_batch_size": Rule(PROGRAM, "set evaluation.batch_size; pre-training takes the training's"),
    "prediction_loss_only": Rule(PROGRAM, "a recipe's evaluation measures IoU; leave it out"),
    "eval_do_concat_batches": _ONE_MATRIX,
    "eval_use_gather_object": _ONE_MATRIX,
    "eval_accumulation_steps": _ONE_MATRIX,
    "include_for_metrics": _ONE_MATRIX,
    "batch_eval_metrics": Rule(PROGRAM, "evaluation counts batch by batch in any case; leave it out"),
    "load_best_model_at_end": _EVALUATION,
    "metric_for_best_model": _EVALUATION,
    "greater_is_better": _EVALUATION,
    "save_only_model": Rule(PROGRAM, "--resume needs complete checkpoints; limit them by trainer.save_total_limit"),
    "save_strategy": _SAVE,
    "save_steps": _SAVE,
    "save_on_each_node": _SAVE,
    "save_total_limit": _SAVE,
    "enable_jit_checkpoint": Rule(PROGRAM, "SIGTERM saves a checkpoint in any case; leave it out"),
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "ignore_data_skip": _CHANCE,
    "restore_callback_states_from_checkpoint": Rule(PROGRAM, "--resume restores what a run needs; leave it out"),
    "full_determinism": _CHANCE,
    "seed": _CHANCE,
    "data_seed": _CHANCE,
    "resume_from_checkpoint": Rule(PROGRAM, "resume by --resume"),
    "use_cpu": _DISTRIBUTED,
    "accelerator_config": _DISTRIBUTED,
    "parallelism_config": Rule(REFUSED, "a SegFormer fits one device; use DDP, or FSDP by configuration/accelerate"),
    "dataloader_drop_last": Rule(SUPPORTED, "of training alone; evaluation always reads every image"),
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_in_order": Rule(PROGRAM, "a resumed run would see other batches; leave it out"),
    "remove_unused_columns": Rule(PROGRAM, "the transforms read the columns image and label; leave it out"),
    "label_names": Rule(PROGRAM, "the model's labels are `labels`; leave it out"),
    "train_sampling_strategy": Rule(PROGRAM, "the order of samples is drawn from trainer.seed; leave it out"),
    "length_column_name": Rule(HARMLESS, "it is read by other sampling strategies only"),
    "ddp_find_unused_parameters": _DISTRIBUTED,
    "ddp_bucket_cap_mb": _DISTRIBUTED,
    "ddp_broadcast_buffers": _DISTRIBUTED,
    "ddp_static_graph": _DISTRIBUTED,
    "ddp_backend": _DISTRIBUTED,
    "ddp_timeout": _DISTRIBUTED,
    "fsdp": _DISTRIBUTED,
    "fsdp_config": _DISTRIBUTED,
    "deepspeed": Rule(REFUSED, "it is not tested with SegFormer; use FSDP by configuration/accelerate/fsdp2.yaml"),
    "debug": _LOG,
    "skip_memory_metrics": _LOG,
    "do_train": _SCRIPT,
    "do_eval": _SCRIPT,
    "do_predict": _SCRIPT,
    "local_rank": Rule(PROGRAM, "torchrun and accelerate launch set it"),
}

_UNSET: tuple[Any, ...] = (None, False, "no", [], {})


def check_recipe_arguments(names: Iterable[str]) -> None:
    """Refuse `[trainer]` keys that a recipe cannot set.

    Raises:
        ValueError: names the first one as `trainer.name`, with the remedy.
    """
    for name in names:
        rule = RULES.get(name)
        if rule is not None and rule.support in (PROGRAM, REFUSED):
            raise ValueError(f"trainer.{name} cannot be set: {rule.note}")


def check_arguments(arguments: Any) -> None:
    """Refuse values of a `TrainingArguments` that cannot work for segmentation.

    Raises:
        ValueError: names the first one, with the remedy.
    """
    for name, rule in RULES.items():
        if rule.support == REFUSED and (value := getattr(arguments, name, None)) not in _UNSET:
            raise ValueError(f"{name} is {value!r}, which cannot be used here: {rule.note}")


__all__ = ["HARMLESS", "PROGRAM", "REFUSED", "RULES", "SUPPORTED", "Rule", "check_arguments", "check_recipe_arguments"]
