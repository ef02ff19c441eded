"""Made-up evaluations: images, labels and predictions of a chosen quality, without a model."""

import numpy as np
import torch
from PIL import Image

from hf_segformer.evaluation.accumulator import MetricAccumulator

IGNORE = 255
NAMES = ["sky", "road", "car & van", "<pole>"]
PALETTE = [(70, 130, 180), (128, 64, 128), (0, 0, 142), (153, 153, 153)]


def scene(seed, num_classes=4, height=90, width=130):
    """An RGB image and its labels: sky above road, boxes on it, and an ignored corner."""
    generator = np.random.default_rng(seed)
    labels = np.zeros((height, width), dtype=np.int64)
    labels[height // 2 + generator.integers(-9, 9) :] = 1
    if num_classes > 2:
        for _ in range(3):
            top, left = generator.integers(height // 3, height - 20), generator.integers(0, width - 30)
            labels[top : top + generator.integers(8, 20), left : left + generator.integers(10, 30)] = 2
        left = generator.integers(5, width - 5)
        labels[10:60, left : left + 3] = 3
    pixels = np.array(PALETTE, dtype=np.uint8)[labels] + generator.integers(0, 60, (height, width, 1), dtype=np.uint8)
    labels[:12, :12] = IGNORE
    return Image.fromarray(pixels), labels


def probabilities_of(labels, seed, num_classes=4, noise=1.0):
    """float32 (K, H, W) that are right where smooth noise is small."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.one_hot(torch.from_numpy(labels).clamp(max=num_classes - 1), num_classes)
    coarse = torch.randn(1, num_classes, 9, 13, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=labels.shape, mode="bilinear")[0]
    return (3 * truth.permute(2, 0, 1) + 3 * noise * smooth).softmax(dim=0)


def evaluation(num_images=8, num_classes=4, noise=1.0, offset=0):
    """An accumulator over scenes, and the function that gives image, prediction and labels of an index."""
    accumulator = MetricAccumulator(num_classes, IGNORE)

    def load(index):
        image, labels = scene(index, num_classes)
        probabilities = probabilities_of(labels, index + offset, num_classes, noise * (0.6 + 0.1 * index))
        return image, probabilities.argmax(dim=0).numpy(), labels

    for index in range(num_images):
        _, labels = scene(index, num_classes)
        probabilities = probabilities_of(labels, index + offset, num_classes, noise * (0.6 + 0.1 * index))
        tensors = probabilities.argmax(dim=0), torch.from_numpy(labels)
        accumulator.update(probabilities, *tensors, name=f"scene_{index // 2}_{index}.png")
    return accumulator, load
