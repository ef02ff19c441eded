"""Samples and batches of pre-training: functions of seed and key, normalized, with classes or hidden patches."""

from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import SegFormerImageProcessor
from hf_segformer.data.image_transforms import center_crop
from hf_segformer.data.pretraining_config import ImageAugmentation, PretrainingConfig
from hf_segformer.data.pretraining_datasets import (
    ImageTransform,
    PretrainCollator,
    PretrainDataset,
    PretrainEvalDataset,
    PretrainStream,
)
from hf_segformer.data.shapes import single_shapes_dataset
from hf_segformer.data.torch_datasets import EpochSampler

NOISY = ImageAugmentation(crop_size=32, randaugment=9, erasing=0.5, mixup=0.8, cutmix=1.0)


@pytest.fixture(scope="module")
def rows():
    return single_shapes_dataset("train", 6, 40).cast_column("image", datasets.Image(decode=False))


def transform(augmentation=NOISY, method="classification", seed=0, **values):
    smoothing = {"label_smoothing": 0.1} if method == "classification" else {"mask_size": 8}
    return ImageTransform(
        augmentation, PretrainingConfig(method=method, **smoothing), SegFormerImageProcessor(), 6, seed=seed, **values
    )


def test_samples_depend_on_seed_and_key_alone(rows):
    dataset = PretrainDataset(rows, transform())
    torch.manual_seed(1)
    first = dataset[3, 2]
    torch.manual_seed(2)
    again = PretrainDataset(rows, transform())[3, 2]
    for name, values in first.items():
        assert torch.equal(again[name], values)
    assert first["key"].tolist() == [3, 2]
    assert first["labels"].item() == rows[2]["label"]
    assert first["pixel_values"].shape == (3, 32, 32)
    others = [dataset[4, 2], PretrainDataset(rows, transform(seed=1))[3, 2]]
    assert not any(torch.equal(other["pixel_values"], first["pixel_values"]) for other in others)


def test_without_augmentation_a_sample_is_the_normalized_image(rows):
    plain = ImageAugmentation(crop_size=40, scale=[1.0, 1.0], ratio=[1.0, 1.0], flip=0.0)
    [sample, evaluated] = [
        PretrainDataset(rows, transform(plain))[0, 1],
        PretrainEvalDataset(rows, transform(plain))[1],
    ]
    image = Image.open(BytesIO(rows[1]["image"]["bytes"]))
    processor = SegFormerImageProcessor(do_resize=False)
    torch.testing.assert_close(sample["pixel_values"], processor(image, return_tensors="pt").pixel_values[0])
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    cropped = Image.fromarray(center_crop(pixels, 40).numpy().transpose(1, 2, 0))
    torch.testing.assert_close(evaluated["pixel_values"], processor(cropped, return_tensors="pt").pixel_values[0])


def test_a_stream_gives_samples_by_the_checksum_of_their_pixels(rows):
    stream = PretrainStream(rows.to_iterable_dataset(), transform())
    samples = [sample for sample, _ in zip(stream, range(9), strict=False)]
    assert [sample["key"][0].item() for sample in samples] == [0] * 6 + [1] * 3
    assert samples[0]["key"][1] == samples[6]["key"][1]
    assert not torch.equal(samples[0]["pixel_values"], samples[6]["pixel_values"])
    assert [sample["labels"].item() for sample in samples[:6]] == rows["label"]


class TestMaskedImages:
    OPTIONS = ImageAugmentation(crop_size=32)

    def test_patches_are_hidden_anew_in_each_epoch(self, rows):
        dataset = PretrainDataset(rows.select_columns("image"), transform(self.OPTIONS, "masked_images"))
        masks = [dataset[epoch, 0]["mask"] for epoch in range(3)]
        assert all(mask.shape == (4, 4) and mask.sum() == 10 for mask in masks)
        assert not torch.equal(masks[0], masks[1])
        assert "labels" not in dataset[0, 0]

    def test_those_of_evaluation_stay(self, rows):
        dataset = PretrainEvalDataset(rows.select_columns("image"), transform(self.OPTIONS, "masked_images"))
        assert torch.equal(dataset[1]["mask"], dataset[1]["mask"])
        assert not torch.equal(dataset[1]["mask"], dataset[2]["mask"])

    def test_a_stream_needs_no_classes(self, rows):
        stream = PretrainStream(
            rows.select_columns("image").to_iterable_dataset(), transform(self.OPTIONS, "masked_images")
        )
        assert set(next(iter(stream))) == {"pixel_values", "key", "mask"}


class TestBatches:
    def test_training_labels_become_probabilities_that_depend_on_the_samples(self, rows):
        dataset, collate = PretrainDataset(rows, transform()), PretrainCollator(transform())
        samples = [dataset[0, index] for index in range(4)]
        batch, again = collate(samples), collate(samples)
        assert set(batch) == {"pixel_values", "labels"}
        assert torch.equal(batch["pixel_values"], again["pixel_values"])
        torch.testing.assert_close(batch["labels"].sum(1), torch.ones(4))
        assert (batch["labels"] >= 0.1 / 6 - 1e-6).all()
        later = collate([dataset[1, index] for index in range(4)])
        assert not torch.equal(later["labels"], batch["labels"])

    def test_evaluation_labels_stay_numbers(self, rows):
        dataset = PretrainEvalDataset(rows, transform())
        batch = PretrainCollator(transform())([dataset[index] for index in range(3)])
        assert batch["labels"].tolist() == rows["label"][:3]

    def test_without_mixing_targets_are_smoothed(self, rows):
        plain = transform(ImageAugmentation(crop_size=32))
        samples = [PretrainDataset(rows, plain)[0, index] for index in range(2)]
        batch = PretrainCollator(plain)(samples)
        assert batch["labels"][0, rows[0]["label"]].item() == pytest.approx(0.9 + 0.1 / 6)
        assert torch.equal(batch["pixel_values"][1], samples[1]["pixel_values"])

    def test_masks_are_stacked(self, rows):
        masked = transform(ImageAugmentation(crop_size=32), "masked_images")
        dataset = PretrainDataset(rows.select_columns("image"), masked)
        batch = PretrainCollator(masked)([dataset[0, index] for index in range(3)])
        assert set(batch) == {"pixel_values", "mask"}
        assert batch["mask"].shape == (3, 4, 4)


def test_the_sampler_gives_every_image_once_an_epoch(rows):
    keys = list(EpochSampler(len(PretrainDataset(rows, transform())), 0, lambda: 2))
    assert sorted(keys) == [(2, index) for index in range(6)]


@pytest.mark.parametrize("label", [-1, 6])
def test_a_class_that_is_none_is_named(rows, label):
    row = {**rows[0], "label": label}
    with pytest.raises(ValueError, match=f"has the class {label}; expected 0 to 5"):
        PretrainDataset([row], transform())[0, 0]


def test_bands_and_value_ranges_are_read(tmp_path):
    bands = np.random.default_rng(0).integers(0, 4096, (5, 40, 44), dtype=np.uint16)
    np.save(tmp_path / "image.npy", bands)
    processor = SegFormerImageProcessor(
        image_mean=[100.0, 50.0], image_std=[2.0, 4.0], do_rescale=False, value_range=(0, 4096)
    )
    options = ImageAugmentation(crop_size=32, scale=[1.0, 1.0], ratio=[1.1, 1.1], flip=0.0)
    made = ImageTransform(options, PretrainingConfig(), processor, 6, bands=(4, 2))
    image, is_byte_scaled = made.decode({"image": str(tmp_path / "image.npy")}, "it")
    assert is_byte_scaled
    np.testing.assert_allclose(image.numpy(), bands[[3, 1]] / 4096 * 255, atol=0.1)
    sample = PretrainDataset([{"image": str(tmp_path / "image.npy"), "label": 1}], made)[0, 0]
    assert sample["pixel_values"].shape == (2, 32, 32)
    assert sample["pixel_values"].min() >= (0 - 100) / 2


def test_a_damaged_image_is_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises((OSError, ValueError), match=r"cut\.png"):
        PretrainDataset([{"image": str(tmp_path / "cut.png"), "label": 0}], transform())[0, 0]
