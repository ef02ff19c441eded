"""Pre-training of an encoder, from a recipe to a folder that `model.checkpoint` and `--init` take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForImageClassification, TrainingArguments, set_seed

from ..config import EarlyStoppingConfig, LoraConfig, parse_value_range
from ..configuration_segformer import SegFormerConfig
from ..data.image_source import Images, open_images
from ..data.pretraining_datasets import ImageTransform, PretrainDataset, PretrainEvalDataset, PretrainStream
from ..files import write_json
from ..image_processing_segformer import SegFormerImageProcessor
from ..modeling_segformer import SegFormerForImageClassification
from .building import build_arguments, build_network, fresh_config
from .data import measure_bands
from .masked_images import SegFormerForMaskedImages
from .pretrain_recipe import PretrainRecipe, metric_names
from .pretrain_trainer import PretrainTrainer
from .recipe_writer import write_recipe
from .resume import newest_whole_checkpoint
from .run import check_resumable, is_finished, restore_finished_run, train, translate_disk_full
from .run_folder import RunFolder
from .run_record import build_run_record, write_run_record


@dataclass(frozen=True)
class Samples:
    """Samples of a pre-training.

    Args:
        images: the rows.
        transform: from rows to samples.
        train: training samples, by key or as a stream.
        evaluation: evaluation samples.
    """

    images: Images
    transform: ImageTransform
    train: PretrainDataset | PretrainStream
    evaluation: PretrainEvalDataset


def pretrain(recipe: PretrainRecipe, resume: bool = False, overwrite: bool = False) -> Path:
    """Train, evaluate, save, load again and compare.

    Args:
        recipe: description of the run.
        resume: continue from the newest complete checkpoint in `trainer.output_dir`.
        overwrite: if that folder holds a finished run, move it away and take its place.

    Returns:
        that folder; it holds the classifier, or after masked images the encoder, its processor, `recipe.toml`,
        `metrics.json` and `training.json`.

    Raises:
        ValueError: if the recipe's values, the data or the checkpoints do not fit, or another run uses the folder.
        OSError: if files are missing or cannot be read or written.
        KeyboardInterrupt: if it was stopped; there is a checkpoint then.
    """
    arguments = pretraining_arguments(recipe)
    folder, is_main = Path(arguments.output_dir), arguments.process_index == 0
    with RunFolder(folder, is_owner=is_main) as run:
        checkpoint = newest_whole_checkpoint(folder) if resume else None
        if checkpoint is not None:
            run.check_checkpoint(checkpoint)
        elif is_main:
            run.check_free(overwrite)
        samples = load_samples(recipe, arguments)
        set_seed(arguments.seed)
        model = build_pretraining_model(recipe, samples.images.names)
        if checkpoint is not None:
            check_task(checkpoint, model)
        if is_main:
            if checkpoint is None and (archive := run.archive_previous_run()):
                print(f"{folder} held an earlier run, which is now {archive} (--resume would have continued it)")
            write_recipe(recipe, folder)
            announce(model, samples, arguments, checkpoint)
        trainer = build_pretrainer(recipe, arguments, model, samples)
        if checkpoint is not None and is_finished(checkpoint, arguments, EarlyStoppingConfig()):
            restore_finished_run(trainer, checkpoint)
        else:
            with translate_disk_full(folder):
                train(trainer, checkpoint)
        finish(trainer, recipe, samples, folder)
    return folder


def pretraining_arguments(recipe: PretrainRecipe) -> TrainingArguments:
    """The recipe's `[trainer]` with the defaults of pre-training.

    Raises:
        ValueError: if a value is out of range; the message names its key.
    """
    table = recipe.trainer
    defaults: dict[str, Any] = {"per_device_eval_batch_size": table.get("per_device_train_batch_size", 8)}
    if table.get("load_best_model_at_end"):
        defaults["metric_for_best_model"] = metric_names(recipe)[0]
    return build_arguments(table, defaults)


def load_samples(recipe: PretrainRecipe, arguments: TrainingArguments) -> Samples:
    """Open the images of a recipe, and build one sample, to fail early on errors that affect all of them.

    Raises:
        ValueError: if the images do not fit the recipe.
        OSError: if they are missing or cannot be read.
    """
    images = open_images(recipe.data, is_labeled=not recipe.pretraining.is_masked)
    transform = ImageTransform(
        recipe.augmentation,
        recipe.pretraining,
        _processor(recipe, images),
        len(images.names),
        tuple(recipe.data.bands) or None,
        arguments.seed if arguments.data_seed is None else arguments.data_seed,
    )
    evaluation = PretrainEvalDataset(images.evaluation, transform)
    if images.is_stream:
        return Samples(images, transform, PretrainStream(images.train, transform), evaluation)
    dataset = PretrainDataset(images.train, transform)
    dataset[0, 0]
    return Samples(images, transform, dataset, evaluation)


def _processor(recipe: PretrainRecipe, images: Images) -> SegFormerImageProcessor:
    """A processor for whole images, whose shorter side becomes that of the crops."""
    num_channels = fresh_config(recipe.model).num_channels
    keywords: dict[str, Any] = {
        "size": {"shortest_edge": recipe.augmentation.crop_size},
        "keep_ratio": True,
        "value_range": parse_value_range(recipe.data.value_range, "data.value_range"),
    }
    if num_channels == 3:
        return SegFormerImageProcessor(**keywords)
    statistics: dict[str, Any] = {"image_mean": [0.0] * num_channels, "image_std": [1.0] * num_channels}
    unscaled = SegFormerImageProcessor(**keywords, **statistics, do_rescale=False, do_normalize=False)
    decode = ImageTransform(recipe.augmentation, recipe.pretraining, unscaled, bands=tuple(recipe.data.bands) or None)
    if images.is_stream:
        rows = images.train.map(lambda row: {"image": decode.read(row["image"])})
    else:
        rows = images.train.with_transform(lambda batch: {"image": [decode.read(value) for value in batch["image"]]})
    keywords["image_mean"], keywords["image_std"] = measure_bands(rows, unscaled)
    return SegFormerImageProcessor(**keywords, do_rescale=False)


def build_pretraining_model(
    recipe: PretrainRecipe, names: tuple[str, ...]
) -> SegFormerForImageClassification | SegFormerForMaskedImages:
    """Build the network of a recipe: a variant, or one that begins with the encoder of a checkpoint.

    Raises:
        ValueError: see `run.build_model`.
        OSError: if the checkpoint cannot be read.
    """
    if recipe.pretraining.is_masked:
        return build_network(SegFormerForMaskedImages, recipe.model, {})
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return build_network(SegFormerForImageClassification, recipe.model, labels)


def build_pretrainer(
    recipe: PretrainRecipe, arguments: TrainingArguments, model: torch.nn.Module, samples: Samples
) -> PretrainTrainer:
    """Build a Trainer on the recipe's images."""
    return PretrainTrainer(model, arguments, samples.transform, samples.train, samples.evaluation, recipe.ema)


def check_task(checkpoint: Path, model: Any) -> None:
    """Check that a checkpoint holds the network that the recipe describes.

    Raises:
        ValueError: if it does not.
    """
    found, wanted = SegFormerConfig.from_pretrained(checkpoint).architectures, [type(model).__name__]
    if found != wanted:
        raise ValueError(
            f"{checkpoint} holds {found and found[0]}, but the recipe's pretraining.method needs {wanted[0]}; expected "
            "the recipe of its run"
        )
    check_resumable(checkpoint, model.config, LoraConfig())


def announce(model: Any, samples: Samples, arguments: TrainingArguments, checkpoint: Path | None) -> None:
    """Print what the run trains, on which images and where."""
    length = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    names = samples.images.names
    task = f"{len(names)} classes" if names else "masked images"
    number = "a stream of" if samples.images.is_stream else len(samples.images.train)
    print(f"Model    SegFormer, {model.num_parameters():,} parameters, {task}")
    print(f"Data     {number} images to train on, {len(samples.images.evaluation)} others to evaluate on")
    if samples.images.unused:
        print(f"         not used: {', '.join(samples.images.unused)}")
    print(f"Training {length} of {batch} images on {arguments.device}" + (f", from {checkpoint}" if checkpoint else ""))
    print(f"Folder   {arguments.output_dir}\n", flush=True)


def finish(trainer: PretrainTrainer, recipe: PretrainRecipe, samples: Samples, folder: Path) -> None:
    """Evaluate, save what fine-tuning starts from, load it again and compare; write metrics and the run record."""
    measured = trainer.evaluate()
    if not trainer.is_world_process_zero():
        return
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    is_masked = recipe.pretraining.is_masked
    kept = trained.segformer if is_masked else trained
    with translate_disk_full(folder):
        kept.save_pretrained(folder)
        samples.transform.processor.save_pretrained(folder)
    loaded = (AutoModel if is_masked else AutoModelForImageClassification).from_pretrained(folder).state_dict()
    for name, weights in kept.state_dict().items():
        if not torch.equal(loaded[name], weights.cpu()):
            raise ValueError(f"the model loaded from {folder} has another {name} than the trained one")
    metrics = {name: measured[f"eval_{name}"] for name in metric_names(recipe)}
    dataset = {"title": recipe.data.title, "images": len(samples.images.evaluation)}
    write_json({**metrics, "method": recipe.pretraining.method, "dataset": dataset}, folder / "metrics.json")
    record = build_run_record(trainer, recipe=recipe.tables, title=recipe.data.title, terms=recipe.data.terms)
    write_run_record(folder, record)
    _print_result(metrics, samples, folder)


def _print_result(metrics: dict[str, float], samples: Samples, folder: Path) -> None:
    number = len(samples.images.evaluation)
    if "top1" in metrics:
        shares = " and ".join(f"{100 * metrics[f'top{each}']:.1f} % (top {each})" for each in (1, 5))
        print(f"\nOf {number} images that it was not trained on, {shares} are classified correctly.")
    else:
        print(
            f"\nOn {number} images that it was not trained on, hidden pixels are {metrics['loss']:.4f} off on average,"
        )
        print("in standard deviations of a band.")
    print(f"  {folder}  the encoder, for `segformer train DIR --init {folder}` and model.checkpoint={folder}")


__all__ = [
    "Samples",
    "announce",
    "build_pretrainer",
    "build_pretraining_model",
    "check_task",
    "finish",
    "load_samples",
    "pretrain",
    "pretraining_arguments",
]
