"""One training run, from a recipe to a folder with a model that was loaded again and checked."""

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSemanticSegmentation,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
    set_seed,
)

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.configuration_segformer import VARIANTS

from .checkpoints import list_checkpoints, newest_whole_checkpoint
from .data import Data, EvalTransform, TrainTransform, collate, load_data, with_index
from .recipe import Recipe
from .report import ProgressBar, SegmentationMetrics, draw_predictions, format_table, predict_labels

_NUM_DRAWN = 4


def fine_tune(recipe: Recipe, resume: bool = False) -> Path:
    """Train, evaluate, save, load again, check and draw.

    Args:
        recipe: what to do.
        resume: go on from the newest whole checkpoint in `trainer.output_dir`.

    Returns:
        that folder; it holds the final model and its processor, `eval_results.json` and `prediction.png`.

    Raises:
        ValueError: if the recipe's values, the data or the checkpoints do not fit.
        OSError: if files are missing or can not be read or written.
    """
    arguments = training_arguments(recipe)
    folder = Path(arguments.output_dir)
    checkpoint = newest_whole_checkpoint(folder) if resume else None
    if not recipe.model.get("checkpoint"):
        fresh_config(recipe.model)  # wrong values are told before pictures are drawn or read
    data = load_data(recipe.data)
    set_seed(arguments.seed)
    if checkpoint is None:
        model = build_model(recipe.model, data.names)
    else:
        model = resumed_model(checkpoint, recipe.model, data.names)
    if arguments.process_index == 0:
        if checkpoint is None:
            put_aside(folder)
        announce(model, data, arguments, checkpoint)
    trainer = build_trainer(model, arguments, recipe, data)
    if checkpoint is None or not is_finished(checkpoint, arguments):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics, combined=False)
    if trainer.is_world_process_zero():
        print(f"\nOn {len(data.evaluation)} pictures that it was not trained on, in percent:\n")
        print(format_table(metrics, data.names))
        check_saved(trainer.model, data, folder)
        print("\nThe model was loaded again from its folder by AutoModelForSemanticSegmentation and predicts the same.")
        print(f"  {folder / 'prediction.png'}  picture, truth and prediction")
        print(f"  {folder / 'eval_results.json'}  the numbers above")
        print(f"  {folder}  the model, for from_pretrained")
    return folder


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
    }
    return TrainingArguments(**{**defaults, **recipe.trainer})


def fresh_config(table: dict[str, Any], **labels: Any) -> SegFormerConfig:
    """The configuration of the recipe's `[model]`.

    Raises:
        ValueError: if the variant is unknown or a value impossible.
    """
    fields = {key: value for key, value in table.items() if key not in ("variant", "checkpoint")}
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


def resumed_model(checkpoint: Path, table: dict[str, Any], names: Sequence[str]) -> SegFormerForSemanticSegmentation:
    """The network of a checkpoint of this run.

    Raises:
        ValueError: if it is not the one that the recipe describes.
    """
    model = SegFormerForSemanticSegmentation.from_pretrained(checkpoint)
    described = {} if table.get("checkpoint") else VARIANTS[table["variant"]]
    described = {**described, **table, "num_labels": len(names)}
    for name, wanted in described.items():
        if name in ("variant", "checkpoint"):
            continue
        value = getattr(model.config, name)
        value = list(value) if isinstance(value, tuple) else value
        if value != wanted:
            raise ValueError(
                f"{checkpoint} has {name} {value}, but the recipe asks for {wanted}: resume what was started"
            )
    return model


def put_aside(folder: Path) -> None:
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
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return 0 < arguments.max_steps <= state["global_step"]


class EpochCounter(TrainerCallback):
    """Tells the training transform which pass over the data begins, in resumed runs too."""

    def __init__(self, transform: TrainTransform):
        self.transform = transform

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the transform's epoch."""
        self.transform.epoch = int(state.epoch or 0)


def build_trainer(
    model: SegFormerForSemanticSegmentation, arguments: TrainingArguments, recipe: Recipe, data: Data
) -> Trainer:
    """A plain Trainer on the recipe's data, with IoU by class as its metric."""
    transform = TrainTransform(recipe.data, data.processor)
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=with_index(data.train).with_transform(transform),
        eval_dataset=data.evaluation.with_transform(EvalTransform(data.processor)),
        processing_class=data.processor,
        compute_metrics=SegmentationMetrics(data.names),
        preprocess_logits_for_metrics=predict_labels,
        callbacks=[EpochCounter(transform)],
    )
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar())
    return trainer


def announce(model, data: Data, arguments: TrainingArguments, checkpoint: Path | None) -> None:
    """Say what is going to happen."""
    length = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    print(f"Model    SegFormer, {model.num_parameters():,} parameters, {len(data.names)} classes")
    print(f"Data     {len(data.train)} pictures to train on, {len(data.evaluation)} others to evaluate on")
    print(
        f"Training {length} of {batch} pictures on {arguments.device}" + (f", from {checkpoint}" if checkpoint else "")
    )
    print(f"Folder   {arguments.output_dir}\n", flush=True)


def check_saved(trained: SegFormerForSemanticSegmentation, data: Data, folder: Path) -> None:
    """Load the model from its folder as a user would, compare it with the trained one, and draw what it predicts.

    Raises:
        ValueError: if the loaded model's logits are not those of the trained one.
    """
    loaded = AutoModelForSemanticSegmentation.from_pretrained(folder).to(trained.device).eval()
    processor = SegFormerImageProcessor.from_pretrained(folder)
    trained.eval()
    samples = []
    for index in np.linspace(0, len(data.evaluation) - 1, min(_NUM_DRAWN, len(data.evaluation))).astype(int):
        image, truth = data.evaluation[int(index)]["image"], data.evaluation[int(index)]["label"]
        inputs = processor(image, return_tensors="pt").to(trained.device)
        with torch.inference_mode():
            outputs = loaded(**inputs)
            expected = trained(**inputs).logits
        if not torch.allclose(outputs.logits, expected, rtol=1e-3, atol=1e-3):
            raise ValueError(f"the model loaded from {folder} does not predict what the trained one does")
        [labels] = processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])
        samples.append((image, np.array(truth), labels.cpu().numpy()))
    draw_predictions(samples, data.names, data.palette).save(folder / "prediction.png")
