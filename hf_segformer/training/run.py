"""One training run, from a recipe to a folder with a model that was loaded again and checked."""

import errno
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForSemanticSegmentation,
    ProgressCallback,
    TrainerState,
    TrainingArguments,
    logging,
    set_seed,
)

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor

from ..configuration_segformer import VARIANTS, default_ignore_index
from ..conversion.checkpoints import read_json
from ..data.torch_datasets import EpochSampler, EvalDataset, TrainDataset, TrainStream, collate
from ..evaluation.evaluate import evaluate
from ..evaluation.metrics import SegmentationMetrics, predict_labels
from ..hub.model_card import write_card
from .callbacks import StopAfterStep, StopAtNonFinite
from .data import Data, load_data
from .data_checks import check_classes, check_data, format_counts, show_batch
from .losses import SegmentationLoss, class_weights
from .recipe import LoraRecipe, Recipe
from .report import ProgressBar, draw_predictions, predict_some, spread, write_evaluation
from .resume import list_checkpoints, newest_whole_checkpoint
from .run_record import build_run_record, write_training
from .tracking import LogPredictions
from .trainer import SegFormerTrainer

# What PyTorch's zip writer and safetensors say of it; their errors have no number.
_FULL_DISK = re.compile(r"PytorchStreamWriter|inline_container|iostream error|os error (28|27|122)\b|No space left")


def fine_tune(recipe: Recipe, resume: bool = False) -> Path:
    """Check the data, train, evaluate, save, load again, check and draw.

    Args:
        recipe: what to do.
        resume: go on from the newest whole checkpoint in `trainer.output_dir`.

    Returns:
        that folder; it holds the final model and its processor, its card, `metrics.json`, `training.json` and pictures.

    Raises:
        ValueError: if the recipe's values, the data or the checkpoints do not fit, or training came to nothing.
        OSError: if files are missing or can not be read or written.
        KeyboardInterrupt: if it was stopped; there is a checkpoint then.
    """
    if recipe.lora.rank and not recipe.model.get("checkpoint"):
        raise ValueError("lora.rank is set, but adapters can not make up for a random encoder: set model.checkpoint")
    arguments = training_arguments(recipe)
    folder = Path(arguments.output_dir)
    checkpoint = newest_whole_checkpoint(folder) if resume else None
    # Wrong values are told before pictures are drawn or read.
    config, loss, _, _, _ = (
        fresh_config(recipe.model),
        recipe.loss,
        recipe.augmentation,
        recipe.optimization,
        recipe.evaluation,
    )
    data = load_data(recipe.data, config.num_channels)
    is_main = arguments.process_index == 0
    if recipe.model.get("checkpoint") and (told := check_classes(data.names, config.id2label)) and is_main:
        print(told)
    if checkpoint is None or isinstance(loss.class_weights, str):
        counts = check_data(data, len(data.names), quiet=not is_main)
        if is_main:
            print(format_counts(counts, data.names), end="\n\n")
        if isinstance(loss.class_weights, str):
            loss = replace(loss, class_weights=class_weights(counts[0, :-1].tolist(), loss.class_weights))
    if not data.is_stream:  # of which a thousand rows would be fetched for one
        first_samples(data, recipe, 1)  # what does not go together is told before an earlier run is put aside
    check_best_metric(arguments, data.names)
    set_seed(arguments.seed)
    model = build_model(recipe.model, data.names)
    model.config.palette = [list(color) for color in data.palette]  # for label maps, once it is trained
    if checkpoint is not None:
        check_resumable(checkpoint, model.config, recipe.lora)
    if is_main:
        if checkpoint is None:
            archive_previous_run(folder)
        announce(model, data, arguments, checkpoint)
    trainer = build_trainer(model, arguments, recipe, loss, data)
    if checkpoint is not None and is_finished(checkpoint, arguments):
        take_over(trainer, checkpoint)
    else:
        with translate_disk_full(folder):
            train(trainer, checkpoint)
    finish(trainer, recipe, data, folder)
    return folder


def inspect_data(recipe: Recipe, check: bool, picture: Path | None) -> None:
    """Look at the data as a run would, and train nothing.

    Args:
        recipe: whose data.
        check: whether to read all of it and print the share of each class.
        picture: file to draw the first training batch to.

    Raises:
        ValueError: if something is wrong with the data.
        OSError: if files are missing or can not be read or written.
    """
    config = fresh_config(recipe.model)
    data = load_data(recipe.data, config.num_channels)
    if check:
        print(format_counts(check_data(data, len(data.names)), data.names))
    if picture is not None:
        batch = first_samples(data, recipe, training_arguments(recipe).train_batch_size)
        show_batch(batch, data.names, data.palette, data.processor, picture)
        print(f"{picture}  what the model is fed")


def train(trainer: SegFormerTrainer, checkpoint: Path | None) -> None:
    """Train to the end, or until somebody stops it.

    Raises:
        ValueError: if not one step was taken.
        KeyboardInterrupt: after a checkpoint was saved, if it was stopped.
    """
    stop = StopAfterStep(trainer)
    trainer.add_callback(stop)
    trainer.add_callback(StopAtNonFinite())
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception:
        print(file=sys.stderr)  # ends the line of the progress bar
        raise
    finally:
        stop.unlisten()
    if stop.stopped:
        raise KeyboardInterrupt
    if not trainer.state.global_step:
        raise ValueError("nothing was trained: no batch was full, and trainer.dataloader_drop_last drops all others")


def finish(trainer: SegFormerTrainer, recipe: Recipe, data: Data, folder: Path) -> None:
    """Save, evaluate, load again and compare; write numbers, pictures and the card."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if recipe.lora.rank:
        model = model.merge_and_unload()
        trainer.model = trainer.model_wrapped = model
    with translate_disk_full(folder):
        trainer.save_model()
    evaluation = evaluate(model, data.processor, data.evaluation, recipe.evaluation, names=data.names)
    if not trainer.is_world_process_zero():
        return
    print(f"\nOn {evaluation.num_images} pictures that it was not trained on, in percent:\n")
    print(evaluation.format_table())
    write_evaluation(evaluation, recipe, folder)
    samples = predict_some(check_saved(model, data, folder), data)
    draw_predictions(samples, data.names, data.palette).save(folder / "prediction.png")
    facts = build_run_record(trainer, recipe=recipe.tables, title=recipe.data.title, terms=recipe.data.terms)
    write_training(folder, facts)
    write_card(folder)
    print("\nThe model was loaded again from its folder by AutoModelForSemanticSegmentation and predicts the same.")
    print(f"  {folder / 'prediction.png'}  picture, truth and prediction")
    print(f"  {folder / 'metrics.json'}  the numbers above")
    print(f"  {folder / 'README.md'}  the model's card, for publishing")
    print(f"  {folder}  the model, for from_pretrained")


@contextmanager
def translate_disk_full(folder: Path) -> Iterator[None]:
    """Turns what PyTorch, safetensors and Python say of a full disk into one sentence.

    Raises:
        OSError: names the folder.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and not _FULL_DISK.search(str(error)):
            raise
        raise OSError(
            f"{folder} can not be written to, its disk is full: checkpoints that were finished are still good; make "
            "room, then go on with --resume"
        ) from error


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's `[trainer]`, and what label maps need beside it.

    Raises:
        ValueError: if a value is impossible.
    """
    logging.disable_progress_bar()  # those of reading and writing weights, which would tear the one of the training
    defaults = {
        "remove_unused_columns": False,  # the transforms need the pictures
        "batch_eval_metrics": True,  # a matrix of counts is kept, never the logits of all pictures
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 is refused there
    }
    return TrainingArguments(**{**defaults, **recipe.trainer})


def fresh_config(table: dict[str, Any], **labels: Any) -> SegFormerConfig:
    """The configuration of the recipe's `[model]`.

    Raises:
        ValueError: if a value is impossible.
        OSError: if the checkpoint can not be read.
    """
    fields = {key: value for key, value in table.items() if key not in ("variant", "checkpoint")}
    if table.get("checkpoint"):
        return SegFormerConfig.from_pretrained(table["checkpoint"], **fields, **labels)
    return SegFormerConfig.from_variant(table["variant"], **fields, **labels)


def build_model(table: dict[str, Any], names: Sequence[str]) -> SegFormerForSemanticSegmentation:
    """A fresh network of a variant, or the weights of a checkpoint with a head for these classes.

    Args:
        table: the recipe's `[model]`; with `checkpoint` its `variant` is not used.
        names: of the classes.

    Raises:
        ValueError: if a value is impossible, or the checkpoint holds no SegFormer encoder of its config's shape.
        OSError: if the checkpoint can not be read.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    labels["semantic_loss_ignore_index"] = default_ignore_index(max(len(names), 2))
    source = table.get("checkpoint")
    if not source:
        return SegFormerForSemanticSegmentation(fresh_config(table, **labels))
    fields = {key: value for key, value in table.items() if key not in ("variant", "checkpoint")}
    model, found = SegFormerForSemanticSegmentation.from_pretrained(
        source, ignore_mismatched_sizes=True, output_loading_info=True, **fields, **labels
    )
    fresh = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    lost = sorted(key for key in fresh if key.startswith("segformer."))
    if lost:
        raise ValueError(f"{source} does not fit: {len(lost)} weights of the encoder are not in it, {lost[0]} first")
    return model


def check_best_metric(arguments: TrainingArguments, names: Sequence[str]) -> None:
    """See that the evaluation gives the number by which the best checkpoint is to be told.

    Raises:
        ValueError: if it does not; the Trainer would say so after the first evaluation.
    """
    wanted = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    shown = ("background", *names) if len(names) == 1 else names
    by_class = [f"{kind}_{name}" for kind in ("iou", "accuracy") for name in shown]
    known = ["loss", "mean_iou", "mean_accuracy", "overall_accuracy", *by_class]
    if wanted not in known:
        raise ValueError(f"trainer.metric_for_best_model is {wanted!r}, but it must be one of {', '.join(known)}")


def check_resumable(checkpoint: Path, config: SegFormerConfig, recipe: LoraRecipe) -> None:
    """See that a checkpoint holds the network, or the adapters, that the recipe describes.

    Raises:
        ValueError: if it does not.
    """
    path = checkpoint / "adapter_config.json"
    if path.is_file() != bool(recipe.rank):
        kind = "adapters" if path.is_file() else "a whole network"
        raise ValueError(f"{checkpoint} holds {kind}, but lora.rank is {recipe.rank}: resume what was started")
    if recipe.rank:
        adapters = read_json(path)
        saved = (adapters.get("r"), adapters.get("lora_alpha"), sorted(adapters.get("target_modules") or ()))
        asked = (recipe.rank, recipe.alpha, sorted(recipe.target_modules))
        pairs = [*zip(("lora.rank", "lora.alpha", "lora.target_modules"), saved, asked, strict=True)]
    else:
        network = SegFormerConfig.from_pretrained(checkpoint)
        fields = [*VARIANTS["b0"], "num_channels", "num_labels", "id2label"]
        pairs = [(name, getattr(network, name), getattr(config, name)) for name in fields]
    for name, found, wanted in pairs:
        if found != wanted:
            raise ValueError(
                f"{checkpoint} has {name} {found}, but the recipe asks for {wanted}: resume what was started"
            )


def archive_previous_run(folder: Path) -> None:
    """Rename the folder of an earlier run, so that runs never mix and none is lost.

    Raises:
        ValueError: if the folder holds something else than a run.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (list_checkpoints(folder) or (folder / "config.json").is_file()):
        raise ValueError(f"{folder} holds files, but no earlier run: give another trainer.output_dir")
    numbers = (number for number in count(1) if not folder.with_name(f"{folder.name}.{number}").exists())
    aside = folder.with_name(f"{folder.name}.{next(numbers)}")
    folder.rename(aside)
    print(f"{folder} held an earlier run, which is now {aside} (--resume would have gone on with it)")


def is_finished(checkpoint: Path, arguments: TrainingArguments) -> bool:
    """Whether a checkpoint is the last of its run; the Trainer would take one more step."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if arguments.max_steps > 0:
        return state.global_step >= arguments.max_steps
    return (state.epoch or 0) >= arguments.num_train_epochs


def take_over(trainer: SegFormerTrainer, checkpoint: Path) -> None:
    """Give the trainer the weights and the log of a finished run."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best if best and Path(best).is_dir() else str(checkpoint))


def with_adapters(model: SegFormerForSemanticSegmentation, recipe: LoraRecipe):
    """The model with low-rank adapters (PEFT), and its head trained whole.

    Raises:
        ValueError: if PEFT is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("lora.rank is set, but PEFT is not installed: pip install peft") from error
    return get_peft_model(
        model,
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            target_modules=recipe.target_modules,
            modules_to_save=["decode_head"],
        ),
    )


def train_samples(data: Data, recipe: Recipe) -> TrainDataset | TrainStream:
    """Training samples as the recipe varies them."""
    kind = TrainStream if data.is_stream else TrainDataset
    return kind(data.train, recipe.augmentation, data.processor, recipe.data.seed)


def first_samples(data: Data, recipe: Recipe, number: int) -> list[dict[str, torch.Tensor]]:
    """As many samples as there are, up to a number, as an epoch might begin."""
    samples = train_samples(data, recipe)
    if isinstance(samples, TrainStream):
        return list(islice(samples, number))
    return [samples[pair] for pair in islice(EpochSampler(len(samples), recipe.data.seed, lambda: 0), number)]


def build_trainer(
    model: SegFormerForSemanticSegmentation,
    arguments: TrainingArguments,
    recipe: Recipe,
    loss: SegmentationLoss,
    data: Data,
) -> SegFormerTrainer:
    """A Trainer on the recipe's data, with its loss, and with IoU by class as its metric."""
    model.loss_function = loss
    trainer = SegFormerTrainer(
        model=with_adapters(model, recipe.lora) if recipe.lora.rank else model,
        args=arguments,
        data_collator=collate,
        train_dataset=train_samples(data, recipe),
        eval_dataset=EvalDataset(data.evaluation, data.processor),
        processing_class=data.processor,
        compute_metrics=SegmentationMetrics(data.names),
        preprocess_logits_for_metrics=predict_labels,
        optimization=recipe.optimization,
    )
    trainer.add_callback(LogPredictions(trainer, data))
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar())
    return trainer


def announce(model, data: Data, arguments: TrainingArguments, checkpoint: Path | None) -> None:
    """Say what is going to happen."""
    length = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    print(f"Model    SegFormer, {model.num_parameters():,} parameters, {len(data.names)} classes")
    count = "a stream of" if data.is_stream else len(data.train)
    print(f"Data     {count} pictures to train on, {len(data.evaluation)} others to evaluate on")
    print(
        f"Training {length} of {batch} pictures on {arguments.device}" + (f", from {checkpoint}" if checkpoint else "")
    )
    print(f"Folder   {arguments.output_dir}\n", flush=True)


def check_saved(
    trained: SegFormerForSemanticSegmentation, data: Data, folder: Path
) -> SegFormerForSemanticSegmentation:
    """Load the model from its folder as a user would, and compare it with the trained one.

    Returns:
        the loaded model.

    Raises:
        ValueError: if the loaded model's logits are not those of the trained one.
    """
    loaded = AutoModelForSemanticSegmentation.from_pretrained(folder).to(trained.device).eval()
    processor = SegFormerImageProcessor.from_pretrained(folder)
    trained.eval()
    for index in spread(len(data.evaluation)):
        inputs = processor(data.evaluation[index]["image"], return_tensors="pt").to(trained.device)
        with torch.inference_mode():
            logits, expected = loaded(**inputs).logits, trained(**inputs).logits
        if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
            raise ValueError(f"the model loaded from {folder} does not predict what the trained one does")
    return loaded
