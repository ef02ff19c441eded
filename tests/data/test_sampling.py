"""Class-balanced sampling: empirical frequencies of classes, images and crops against the rule."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import SegFormerImageProcessor
from hf_segformer.config import AugmentationConfig
from hf_segformer.data.sampling import ClassBalance, SampleKey
from hf_segformer.data.torch_datasets import EpochSampler, TrainDataset, TrainStream
from hf_segformer.data.transforms import augment

# Five images, four classes; the third never occurs, the last one in two images.
COUNTS = np.array([[900, 100, 0, 0], [1000, 0, 0, 0], [500, 480, 0, 20], [990, 0, 0, 10], [1000, 0, 0, 0]])
IDENTITY = {"crop_size": 16, "scale": [1.0, 1.0], "max_class_share": 1.0, "flip": 0.0, "distortion": 0.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def keys(share, num_epochs=2000):
    epochs = iter(range(num_epochs))
    sampler = EpochSampler(len(COUNTS), 3, lambda: next(epochs), ClassBalance(COUNTS, share))
    return [key for _ in range(num_epochs) for key in sampler]


def test_classes_are_drawn_by_the_inverse_square_root_of_their_pixels():
    drawn = Counter(key.focus for key in keys(1.0))
    weights = {label: (sum(row[label] for row in COUNTS.tolist())) ** -0.5 for label in (0, 1, 3)}
    assert set(drawn) == set(weights)
    for label, weight in weights.items():
        assert drawn[label] / 10_000 == pytest.approx(weight / sum(weights.values()), abs=0.015)


def test_images_that_hold_the_class_are_as_likely():
    drawn = Counter((key.focus, key.image) for key in keys(1.0))
    assert {pair for pair in drawn if pair[0] == 3} == {(3, 2), (3, 3)}
    assert {pair for pair in drawn if pair[0] == 1} == {(1, 0), (1, 2)}
    assert drawn[3, 2] / (drawn[3, 2] + drawn[3, 3]) == pytest.approx(0.5, abs=0.02)
    of_ground = [drawn[0, index] for index in range(5)]
    assert max(of_ground) / sum(of_ground) == pytest.approx(0.2, abs=0.02)


def test_a_share_is_drawn_and_the_others_follow_the_permutation():
    epochs = [0]
    plain = EpochSampler(len(COUNTS), 3, lambda: epochs[0])
    balanced = EpochSampler(len(COUNTS), 3, lambda: epochs[0], ClassBalance(COUNTS, 0.3))
    number = 0
    for epochs[0] in range(400):
        for position, (key, expected) in enumerate(zip(balanced, plain, strict=True)):
            if isinstance(key, SampleKey):
                number += 1
                assert (key.epoch, key.position) == (epochs[0], position)
            else:
                assert key == expected
    assert number / 2000 == pytest.approx(0.3, abs=0.03)
    assert len(balanced) == len(plain) == 5


def test_an_epoch_is_drawn_alike_again():
    balance = ClassBalance(COUNTS, 0.5)
    first, again = (list(EpochSampler(5, 7, lambda: 4, balance)) for _ in range(2))
    assert first == again
    assert first != list(EpochSampler(5, 7, lambda: 5, balance))


@pytest.mark.parametrize("size", [(40, 52), (12, 52), (12, 10)])
def test_the_crop_holds_the_class_at_any_place(size):
    labels = torch.zeros(size, dtype=torch.long)
    labels[7, 9] = 3
    image, options = torch.zeros(3, *size, dtype=torch.uint8), AugmentationConfig(**IDENTITY)
    places = Counter()
    for seed in range(600):
        _, crop = augment(image, labels, options, generator(seed), focus=3)
        assert tuple(crop.shape) == tuple(min(side, 16) for side in size)
        [place] = (crop == 3).nonzero().tolist()
        places[tuple(place)] += 1
    # A corner from which the crop holds pixel (7, 9): rows 0 to 7 and columns 0 to 9, as far as the image goes on.
    expected = [min(at, side - min(side, 16)) + 1 for at, side in zip((7, 9), size, strict=True)]
    assert len(places) == expected[0] * expected[1]


@pytest.mark.parametrize("at", [(0, 0), (39, 51), (20, 26)])
def test_a_rotation_does_not_turn_the_class_out_of_the_crop(at):
    """Near a corner of the image the crop cannot move after the pixel: it is not rotated then."""
    labels = torch.zeros(40, 52, dtype=torch.long)
    labels[at] = 3
    image, turned = torch.zeros(3, 40, 52, dtype=torch.uint8), 0
    options = AugmentationConfig(**{**IDENTITY, "rotation": 45.0})
    for seed in range(300):
        _, crop = augment(image, labels, options, generator(seed), focus=3, ignore_index=255)
        assert (crop == 3).any()
        turned += not torch.equal(
            crop, augment(image, labels, AugmentationConfig(**IDENTITY), generator(seed), focus=3)[1]
        )
    assert turned > 100 or at != (20, 26)


def test_pixels_of_the_class_are_as_likely():
    labels = torch.zeros(16, 64, dtype=torch.long)
    labels[0, 2], labels[0, 60] = 1, 1
    left = 0
    for seed in range(400):
        _, crop = augment(
            torch.arange(64, dtype=torch.float32).expand(1, 16, 64),
            labels,
            AugmentationConfig(**IDENTITY),
            generator(seed),
            focus=1,
        )
        left += int((crop == 1).nonzero()[0, 1] <= 2)
    assert 160 < left < 240


def test_a_class_that_the_resize_has_lost_is_no_error():
    labels = torch.zeros(40, 40, dtype=torch.long)
    options = AugmentationConfig(**{**IDENTITY, "max_class_share": 0.75})
    assert augment(torch.zeros(3, 40, 40), labels, options, generator(), focus=2)[1].shape == (16, 16)


def test_the_same_image_at_two_places_is_augmented_in_two_ways():
    rng = np.random.default_rng(0)
    rows = [
        {
            "image": Image.fromarray(rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)),
            "label": Image.fromarray(rng.integers(0, 4, (40, 52), dtype=np.uint8)),
        }
    ]
    options = AugmentationConfig(**{**IDENTITY, "class_balance": 1.0})
    dataset = TrainDataset(rows, options, SegFormerImageProcessor(), 0, ClassBalance(COUNTS[:1], 1.0))
    first, second = (dataset[SampleKey(0, 0, position, 1)]["pixel_values"] for position in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, dataset[SampleKey(0, 0, 0, 1)]["pixel_values"])


def test_a_data_set_without_counts_is_refused():
    with pytest.raises(ValueError, match=r"class_balance is 0.5 without counts .*balance=ClassBalance"):
        TrainDataset([], AugmentationConfig(class_balance=0.5), SegFormerImageProcessor())


def test_a_stream_is_refused():
    with pytest.raises(ValueError, match=r"augmentation.class_balance is 0.5 for a stream.*data.streaming=false"):
        TrainStream([], AugmentationConfig(class_balance=0.5), SegFormerImageProcessor())


def test_images_without_a_pixel_that_counts_are_refused():
    with pytest.raises(ValueError, match="no pixel of the training images is valid"):
        ClassBalance(np.zeros((3, 2)), 0.5)
