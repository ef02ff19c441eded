"""A training run, from a recipe to a folder with a model that was loaded again and checked."""

import errno
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForSemanticSegmentation, TrainerState, TrainingArguments, set_seed

from ..config import EarlyStoppingConfig, LoraConfig
from ..configuration_segformer import VARIANTS, SegFormerConfig
from ..data.sampling import ClassBalance
from ..data.splits import format_division, write_division
from ..evaluation.detailed import evaluate_in_detail
from ..evaluation.metrics import COUNTED_SCORES
from ..files import read_json
from ..hub.model_card import write_card
from ..image_processing_segformer import SegFormerImageProcessor
from ..modeling_segformer import SegFormerForSemanticSegmentation
from .building import build_model, build_trainer, final_epoch, first_samples, fresh_config, training_arguments
from .callbacks import StopAfterStep, StopAtNonFinite
from .data import Data, load_data
from .data_checks import check_classes, check_data, format_counts, show_batch
from .distillation import load_teacher
from .losses import class_weights
from .recipe import Recipe
from .recipe_trainer import RecipeTrainer
from .recipe_writer import write_recipe
from .report import class_count, draw_predictions, predict_some, split_record, spread, write_evaluation
from .resume import newest_whole_checkpoint
from .run_folder import RunFolder
from .run_record import build_run_record, write_run_record
from .trainer import SegFormerTrainer

# Messages of PyTorch's zip writer and of safetensors; their errors have no number.
_FULL_DISK = re.compile(r"PytorchStreamWriter|inline_container|iostream error|os error (28|27|122)\b|No space left")


def fine_tune(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> Path:
    """Check the data, train, evaluate, save, load again, check and draw.

    Args:
        recipe: description of the run.
        resume: continue from the newest complete checkpoint in `trainer.output_dir`.
        overwrite: if that folder holds a finished run, move it away and take its place.

    Returns:
        that folder; it holds the final model and its processor, its card, `recipe.toml`, `metrics.json`,
        `training.json` and figures.

    Raises:
        ValueError: if the recipe's values, the data or the checkpoints do not fit, another run uses the folder, or not
            one step was trained.
        OSError: if files are missing or cannot be read or written.
        KeyboardInterrupt: if it was stopped; there is a checkpoint then.
    """
    recipe.check_trainable()
    arguments = training_arguments(recipe)
    folder, is_main = Path(arguments.output_dir), arguments.process_index == 0
    with RunFolder(folder, is_owner=is_main) as run:
        checkpoint = newest_whole_checkpoint(folder) if resume else None
        if checkpoint is not None:
            run.check_checkpoint(checkpoint)
        elif is_main:
            run.check_free(overwrite)
        data, loss = prepare_data(recipe, arguments, checkpoint)
        teacher = load_teacher(recipe.distill, data.names, data.processor) if recipe.distill.teacher else None
        set_seed(arguments.seed)
        model = build_model(recipe.model, data.names)
        model.config.palette = [list(color) for color in data.palette]  # colours of its segmentation maps
        if checkpoint is not None:
            check_resumable(checkpoint, model.config, recipe.lora)
        if is_main:
            if checkpoint is None and (archive := run.archive_previous_run()):
                print(f"{folder} held an earlier run, which is now {archive} (--resume would have continued it)")
            write_recipe(recipe, folder)
            announce(model, data, arguments, checkpoint)
        trainer = build_trainer(model, arguments, recipe, loss, data, teacher)
        if checkpoint is not None and is_finished(checkpoint, arguments, recipe.early_stopping):
            restore_finished_run(trainer, checkpoint)
        else:
            with translate_disk_full(folder):
                train(trainer, checkpoint)
        finish(trainer, recipe, data, folder)
    return folder


def prepare_data(recipe: Recipe, arguments: TrainingArguments, checkpoint: Path | None) -> tuple[Data, Any]:
    """Load and check the data before an earlier run is archived; the loss has numbers for class weights."""
    is_main = arguments.process_index == 0
    config, loss = fresh_config(recipe.model), recipe.loss
    data = load_data(recipe.data, config.num_channels, recipe.split)
    last = None if data.is_stream else final_epoch(recipe.augmentation, arguments, len(data.train))
    if is_main and (division := format_division(data.train, data.evaluation)):
        print(division, end="\n\n")
    if recipe.model.get("checkpoint") and (remark := check_classes(data.names, config.id2label)) and is_main:
        print(remark)
    if checkpoint is None or isinstance(loss.class_weights, str) or recipe.augmentation.class_balance:
        counts, data = _count(data, recipe, quiet=not is_main)
        if is_main:
            print(format_counts(counts, data.names), end="\n\n")
        check_best_class(arguments, data.names, counts[1])
        if isinstance(loss.class_weights, str):
            loss = replace(loss, class_weights=class_weights(counts[0, :-1].tolist(), loss.class_weights))
    if not data.is_stream:  # a stream would fetch a thousand rows for one
        first_samples(data, recipe, 1, arguments)
        if last:
            first_samples(data, recipe, 1, arguments, last)
    check_best_metric(arguments, data.names)
    return data, loss


def _count(data: Data, recipe: Recipe, quiet: bool) -> tuple[np.ndarray, Data]:
    """Check the data; returns the counts of `check_data`, and the data with the class balance that the recipe wants."""
    image_counts: list[np.ndarray] = []
    counts = check_data(data, len(data.names), quiet, image_counts)
    share = recipe.augmentation.class_balance
    if share:
        data = replace(data, balance=ClassBalance(np.stack(image_counts)[:, :-1], share))
    return counts, data


def inspect_data(recipe: Recipe, check: bool, figure: Path | None) -> None:
    """Look at the data as a run would, and train nothing.

    Args:
        recipe: description of the run.
        check: read all of the data and print the share of each class.
        figure: file to draw the first training batch to.

    Raises:
        ValueError: if something is wrong with the data.
        OSError: if files are missing or cannot be read or written.
    """
    config = fresh_config(recipe.model)
    data = load_data(recipe.data, config.num_channels, recipe.split)
    if division := format_division(data.train, data.evaluation):
        print(division, end="\n\n")
    if check or recipe.augmentation.class_balance:
        counts, data = _count(data, recipe, quiet=not check)
        if check:
            print(format_counts(counts, data.names))
    if figure is not None:
        arguments = training_arguments(recipe)
        batch = first_samples(data, recipe, arguments.train_batch_size, arguments)
        show_batch(batch, data.names, data.palette, data.processor, figure)
        print(f"{figure}  the model's input in the first step")


def train(trainer: SegFormerTrainer, checkpoint: Path | None) -> None:
    """Train to the end, or until a signal stops it.

    Raises:
        ValueError: if not one step was trained.
        KeyboardInterrupt: after a checkpoint was saved, if a signal stopped it.
    """
    stop = StopAfterStep(trainer)
    trainer.add_callback(stop)
    trainer.add_callback(StopAtNonFinite())
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        print(file=sys.stderr)  # ends the line of the progress bar
        message = str(error)
        if "Original Traceback" in message:  # of a loader's worker
            message = re.split(rf"^(?:[\w.]+\.)?{type(error).__name__}: ", message, flags=re.MULTILINE)[-1]
            raise type(error)(" ".join(message.split())) from error
        raise
    finally:
        stop.restore_handlers()
    if stop.stopped:
        raise KeyboardInterrupt
    state = trainer.state
    if state.global_step < state.max_steps and state.best_global_step and trainer.is_world_process_zero():
        print(
            f"\nEnded early, after step {state.global_step}: no evaluation since step {state.best_global_step} was "
            "better, and the weights of that step are restored"
        )
    if not trainer.state.global_step:
        raise ValueError("nothing was trained: no batch was full, and trainer.dataloader_drop_last drops all others")


def finish(trainer: RecipeTrainer, recipe: Recipe, data: Data, folder: Path) -> None:
    """Save, evaluate, load again and compare; write metrics, figures, the run record and the card."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if recipe.lora.rank:
        model = model.merge_and_unload()
        trainer.model = trainer.model_wrapped = model
    with translate_disk_full(folder):
        trainer.save_model()
    arguments = (model, data.processor, data.evaluation, recipe.evaluation)
    evaluation, accumulator = evaluate_in_detail(*arguments, names=data.names)
    if not trainer.is_world_process_zero():
        return
    print(f"\nOn {evaluation.num_images} images that it was not trained on, in percent:\n")
    print(evaluation.format_table())
    loaded = check_saved(model, data, folder)
    write_evaluation(evaluation, accumulator, loaded, data, recipe, folder)
    samples = predict_some(loaded, data)
    draw_predictions(samples, data.names, data.palette).save(folder / "prediction.png")
    if split := split_record(recipe, data):
        write_division(folder, data.train, data.evaluation)
    record = build_run_record(
        trainer, recipe=recipe.tables, title=recipe.data.title, terms=recipe.data.terms, split=split
    )
    write_run_record(folder, record)
    write_card(folder)
    print("\nThe model was loaded again from its folder by AutoModelForSemanticSegmentation and predicts the same.")
    print(f"  {folder / 'prediction.png'}  image, mask and prediction")
    print(f"  {folder / 'report.html'}  the evaluation with all figures; metrics.json holds their values")
    print(f"  {folder / 'README.md'}  the model card")
    print(f"  {folder}  the model, for from_pretrained")


@contextmanager
def translate_disk_full(folder: Path) -> Iterator[None]:
    """Turn the errors of PyTorch, safetensors and Python on a full disk into one line.

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
            f"{folder} cannot be written to, its disk is full: checkpoints that were finished are still good; make "
            "room, then continue with --resume"
        ) from error


def scores_of(names: Sequence[str]) -> list[str]:
    """Return the scores that every evaluation during training measures, for classes of these names."""
    shown = ("background", *names) if len(names) == 1 else names
    return [*COUNTED_SCORES, *(f"{kind}_{name}" for kind in ("iou", "accuracy") for name in shown)]


def check_best_metric(arguments: TrainingArguments, names: Sequence[str]) -> None:
    """Check that evaluation measures the metric that chooses the best checkpoint.

    Raises:
        ValueError: if it does not; the Trainer would say so after the first evaluation.
    """
    if arguments.metric_for_best_model is None:
        return
    wanted, known = arguments.metric_for_best_model.removeprefix("eval_"), scores_of(names)
    if wanted not in known:
        raise ValueError(f"trainer.metric_for_best_model is {wanted!r}; expected one of {', '.join(known)}")


def check_best_class(arguments: TrainingArguments, names: Sequence[str], counts: np.ndarray) -> None:
    """Check that the class whose score chooses the best checkpoint occurs where it is measured.

    Args:
        arguments: of the Trainer.
        names: of the K classes.
        counts: pixels of each label in the evaluation images, with the ignored ones last.

    Raises:
        ValueError: if it does not: its score is then 0 or none, whatever the network learns.
    """
    wanted = (arguments.metric_for_best_model or "").removeprefix("eval_")
    shown = ("background", *names) if len(names) == 1 else names
    for name, count in zip(shown, counts, strict=False):
        if not count and wanted in (f"iou_{name}", f"accuracy_{name}"):
            raise ValueError(
                f"trainer.metric_for_best_model is {wanted}, but no pixel of the evaluation images is {name!r}: set it "
                "to mean_iou, or evaluate on images of that class"
            )


def check_resumable(checkpoint: Path, config: SegFormerConfig, recipe: LoraConfig) -> None:
    """Check that a checkpoint holds the network, or the adapters, that the recipe describes.

    Raises:
        ValueError: if it does not.
    """
    path = checkpoint / "adapter_config.json"
    if path.is_file() != bool(recipe.rank):
        kind = "adapters" if path.is_file() else "a whole network"
        raise ValueError(f"{checkpoint} holds {kind}, but lora.rank is {recipe.rank}; expected the recipe of its run")
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
            raise ValueError(f"the recipe's {name} is {wanted}; expected {found}, as in {checkpoint}")


def is_finished(checkpoint: Path, arguments: TrainingArguments, early_stopping: EarlyStoppingConfig) -> bool:
    """Return True if a checkpoint is the last of its run; the Trainer would take one more step."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    stopping = (state.stateful_callbacks or {}).get("EarlyStoppingCallback", {}).get("attributes", {})
    if 0 < early_stopping.patience <= stopping.get("early_stopping_patience_counter", 0):
        return True
    if arguments.max_steps > 0:
        return state.global_step >= arguments.max_steps
    return (state.epoch or 0) >= arguments.num_train_epochs


def restore_finished_run(trainer: SegFormerTrainer, checkpoint: Path) -> None:
    """Load weights and log of a finished run into the trainer; its folder may have been moved.

    Raises:
        ValueError: if the run ends with its best weights, and their checkpoint is gone.
    """
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    source = checkpoint.with_name(Path(best).name) if best else checkpoint
    if not source.is_dir():
        raise ValueError(
            f"{source}, the best checkpoint of the finished run, is missing; expected it beside {checkpoint}: bring it "
            "back, or set trainer.load_best_model_at_end=false for the last weights"
        )
    trainer._load_from_checkpoint(str(source))


def announce(model, data: Data, arguments: TrainingArguments, checkpoint: Path | None) -> None:
    """Print what the run trains, on which data and where."""
    length = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    print(f"Model    SegFormer, {model.num_parameters():,} parameters, {class_count(len(data.names))}")
    number = "a stream of" if data.is_stream else len(data.train)
    print(f"Data     {number} images to train on, {len(data.evaluation)} others to evaluate on")
    print(f"Training {length} of {batch} images on {arguments.device}" + (f", from {checkpoint}" if checkpoint else ""))
    print(f"Folder   {arguments.output_dir}\n", flush=True)


def check_saved(
    trained: SegFormerForSemanticSegmentation, data: Data, folder: Path
) -> SegFormerForSemanticSegmentation:
    """Load the model from its folder as a user would, and compare it with the trained one.

    Returns:
        the loaded model.

    Raises:
        ValueError: if the loaded model's logits differ from those of the trained one.
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


__all__ = [
    "check_best_metric",
    "check_resumable",
    "check_saved",
    "fine_tune",
    "finish",
    "inspect_data",
    "is_finished",
    "prepare_data",
    "restore_finished_run",
    "train",
    "translate_disk_full",
]
