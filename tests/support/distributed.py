"""A tiny Trainer that one process and several build alike."""

import torch
from PIL import Image
from transformers import TrainingArguments

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.config import AugmentationConfig
from hf_segformer.data.torch_datasets import EvalDataset, TrainDataset, collate
from hf_segformer.evaluation.metrics import SegmentationMetrics
from hf_segformer.training.trainer import SegFormerTrainer
from tests.support.tiny import TINY

NAMES = ("road", "car", "boat")


def rows(number):
    """Images without an ignored pixel, so that all batches count equally many."""
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "image": Image.fromarray(torch.randint(256, (40, 56, 3), generator=generator, dtype=torch.uint8).numpy()),
            "label": Image.fromarray(torch.randint(3, (40, 56), generator=generator, dtype=torch.uint8).numpy()),
        }
        for _ in range(number)
    ]


def unequal_rows(sizes=((40, 56), (56, 40), (48, 72), (33, 57), (64, 64))):
    """Images of different sizes with masks."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for height, width in sizes:
        mask = torch.randint(3, (height, width), generator=generator, dtype=torch.uint8)
        image = (mask[..., None] * 80).expand(-1, -1, 3).contiguous()
        rows.append({"image": Image.fromarray(image.numpy()), "label": Image.fromarray(mask.numpy())})
    return rows


def tiny_trainer(folder, chance, evaluation_rows=None, options=None, **arguments):
    """A Trainer of 6 steps, 3 an epoch with 4 images a step; without chance BatchNorm only scales.

    `options` are of SegFormerTrainer itself, the other keywords of TrainingArguments.
    """
    torch.manual_seed(0)
    rates = dict.fromkeys(("drop_path_rate", "classifier_dropout_prob"), 0.3 if chance else 0.0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=3, **rates))
    if not chance:
        norm = model.decode_head.batch_norm.eval()
        norm.train = lambda mode=True: norm
    processor, metrics = SegFormerImageProcessor(do_resize=False), SegmentationMetrics(NAMES)
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    augmentation = AugmentationConfig(crop_size=32, scale=[1.0, 1.2], max_class_share=1.0)
    return SegFormerTrainer(
        model,
        TrainingArguments(str(folder), **{**settings, **arguments}),
        data_collator=collate,
        train_dataset=TrainDataset(rows(12), augmentation, processor, seed=0),
        eval_dataset=EvalDataset(evaluation_rows or rows(5), processor),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.preprocess_logits,
        **(options or {}),
    )
