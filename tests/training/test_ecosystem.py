"""The flow of Transformers' own example script and notebooks for semantic segmentation, with this package's classes.

The calls, their order and their arguments are those of `run_semantic_segmentation.py` and of the fine-tuning notebooks;
data are local, and augmentation is a few lines of NumPy in place of albumentations.
"""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.evaluation.mean_iou import MeanIoU
from tests.support.hub import NEEDS_AUTO_IMAGE_PROCESSOR
from tests.support.tiny import TINY

NAMES = {0: "road", 1: "sky", 2: "car"}
pytestmark = pytest.mark.slow


@pytest.fixture
def dataset():
    """Images of unequal sizes whose grey value is their label; 0 stands for no class."""
    rows = {"image": [], "label": []}
    for index in range(8):
        generator = np.random.default_rng(index)
        labels = generator.integers(0, 4, (5, 7 + index % 2), dtype=np.uint8).repeat(12, 0).repeat(12, 1)
        rows["image"].append(Image.fromarray(np.stack([labels * 60] * 3, axis=-1)))
        rows["label"].append(Image.fromarray(labels))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    return datasets.Dataset.from_dict(rows, features=features).train_test_split(0.25, seed=0)


@pytest.fixture
def checkpoint(tmp_path):
    """An encoder with a head for other classes, as `nvidia/mit-b0` is one without."""
    SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=3)).save_pretrained(tmp_path / "encoder")
    SegFormerImageProcessor(size=64).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def arguments_of(folder, **others):
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"remove_unused_columns": False, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 1}
    return TrainingArguments(str(folder), **options, **others)


@NEEDS_AUTO_IMAGE_PROCESSOR
def test_the_example_script_runs(dataset, checkpoint, tmp_path):
    id2label, label2id = NAMES, {name: str(label) for label, name in NAMES.items()}
    config = AutoConfig.from_pretrained(checkpoint, label2id=label2id, id2label=id2label, trust_remote_code=False)
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint, config=config, trust_remote_code=False)
    processor = AutoImageProcessor.from_pretrained(checkpoint, do_reduce_labels=True, trust_remote_code=False)
    assert isinstance(model, SegFormerForSemanticSegmentation)
    height, width = processor.size["height"], processor.size["width"]

    def preprocess(batch):
        pixels, labels = [], []
        for image, target in zip(batch["image"], batch["label"], strict=True):
            image = image.convert("RGB").resize((width, height))
            target = np.array(target.resize((width, height), Image.Resampling.NEAREST))
            target[target == 0] = 255
            target = target - 1
            target[target == 254] = 255
            values = (np.array(image) / 255 - processor.image_mean) / processor.image_std
            pixels.append(torch.from_numpy(values.transpose(2, 0, 1)))
            labels.append(torch.from_numpy(target))
        return {"pixel_values": torch.stack(pixels).float(), "labels": torch.stack(labels).long()}

    metric = MeanIoU(len(id2label))

    @torch.no_grad()
    def compute_metrics(prediction):
        logits, labels = prediction
        logits = nn.functional.interpolate(
            torch.from_numpy(logits), size=labels.shape[-2:], mode="bilinear", align_corners=False
        ).argmax(dim=1)
        metrics = metric.compute(predictions=logits.numpy(), references=labels)
        by_class = metrics.pop("per_category_iou")
        metrics.pop("per_category_accuracy")
        return metrics | {f"iou_{id2label[label]}": value for label, value in enumerate(by_class)}

    dataset["train"].set_transform(preprocess)
    dataset["test"].set_transform(preprocess)
    trainer = Trainer(
        model=model,
        args=arguments_of(tmp_path / "out"),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        compute_metrics=compute_metrics,
        processing_class=processor,
        data_collator=default_data_collator,
    )
    trained = trainer.train()
    trainer.save_model()
    trainer.save_metrics("train", trained.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    assert metrics.keys() >= {"eval_loss", "eval_mean_iou", "eval_iou_sky"}
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["id2label"] == {str(label): name for label, name in NAMES.items()}
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]


def test_the_notebooks_run(dataset, checkpoint, tmp_path):
    """Fine-tuning: processor as transform, labels by the processor, metrics on logits, and inference afterwards."""
    processor = SegFormerImageProcessor.from_pretrained(checkpoint, do_reduce_labels=True)
    image = dataset["test"][0]["image"]

    def transform(batch):
        return processor(list(batch["image"]), list(batch["label"]))

    for split in dataset.values():
        split.set_transform(transform)
    model = SegFormerForSemanticSegmentation.from_pretrained(
        checkpoint, id2label=NAMES, label2id={name: label for label, name in NAMES.items()}
    )
    trainer = Trainer(
        model=model,
        args=arguments_of(tmp_path / "out", save_steps=1, load_best_model_at_end=True),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
    )
    trainer.train()
    trainer.save_model()
    processor.save_pretrained(tmp_path / "out")
    inputs = processor(images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    [segmentation] = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
    assert segmentation.shape == image.size[::-1]

    loaded = SegFormerForSemanticSegmentation.from_pretrained(tmp_path / "out")
    segmenter = pipeline("image-segmentation", model=loaded, image_processor=processor)
    found = segmenter(image)
    assert {each["label"] for each in found} == {NAMES[label] for label in segmentation.unique().tolist()}
    for each in found:
        mask = np.asarray(each["mask"]) == 255
        np.testing.assert_array_equal(mask, segmentation.numpy() == loaded.config.label2id[each["label"]])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which PEFT 0.21 reads
def test_the_notebook_of_adapters_runs(dataset, checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    processor = SegFormerImageProcessor.from_pretrained(checkpoint, do_reduce_labels=True)
    for split in dataset.values():
        split.set_transform(lambda batch: processor(list(batch["image"]), list(batch["label"])))
    model = SegFormerForSemanticSegmentation.from_pretrained(checkpoint)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["query", "value"], modules_to_save=["decode_head"])
    adapted = peft.get_peft_model(model, config)
    arguments = arguments_of(tmp_path / "out", label_names=["labels"])
    trainer = Trainer(adapted, arguments, train_dataset=dataset["train"], eval_dataset=dataset["test"])
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    adapted.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(
        SegFormerForSemanticSegmentation.from_pretrained(checkpoint), tmp_path / "adapters"
    )
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(pixels).logits, adapted.eval()(pixels).logits)
