"""CutMix and ClassMix: boxes and classes by hand, and whole samples whose pixels keep their labels."""

from collections import Counter
from itertools import combinations, islice

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import SegFormerImageProcessor
from hf_segformer.config import AugmentationConfig
from hf_segformer.data.mixing import box, draw_box, draw_classes, draw_mix, paste
from hf_segformer.data.torch_datasets import TrainDataset, TrainStream

PLAIN = {"crop_size": 32, "scale": [1.0, 1.0], "max_class_share": 1.0, "flip": 0.0, "distortion": 0.0}
PIXELS = SegFormerImageProcessor(do_rescale=False, do_normalize=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(count=6):
    """Image i has grey values of 40 * i + label, and labels 4 * i to 4 * i + 3 in quarters."""
    made = []
    for index in range(count):
        labels = np.kron(np.array([[0, 1], [2, 3]]), np.ones((16, 16))).astype(np.uint8) + 4 * index
        made.append({"image": Image.fromarray(labels).convert("RGB"), "label": Image.fromarray(labels)})
    return made


@pytest.mark.parametrize(
    ("share", "center", "rows_", "columns"),
    [
        (0.25, (0.5, 0.5), (10, 30), (15, 45)),
        (0.25, (0.0, 1.0), (0, 10), (45, 60)),  # cut off by a corner
        (0.0, (0.5, 0.5), (20, 20), (30, 30)),
        (1.0, (0.5, 0.5), (0, 40), (0, 60)),
    ],
)
def test_a_box_by_hand(share, center, rows_, columns):
    expected = torch.zeros(40, 60, dtype=torch.bool)
    expected[slice(*rows_), slice(*columns)] = True
    assert torch.equal(box(40, 60, share, center), expected)


def test_boxes_have_the_mean_area_of_the_rule():
    """By integration: a side of the share s covers s - s^2 / 4 of a line on average, where it is cut off."""
    sides = np.sqrt((np.arange(2000) + 0.5) / 2000)
    expected = np.mean((sides - sides**2 / 4) ** 2)
    rng = generator()
    assert np.mean([draw_box(32, 48, rng).float().mean().item() for _ in range(3000)]) == pytest.approx(
        expected, abs=0.015
    )


def test_half_of_the_classes_are_drawn_each_pair_as_often():
    labels = torch.tensor([[0, 3, 7], [9, 255, 255], [12, 0, 3]])
    rng = generator()
    drawn = Counter(tuple(sorted(draw_classes(labels, rng, 255).tolist())) for _ in range(2000))
    assert set(drawn) == set(combinations((0, 3, 7, 9, 12), 2))
    assert all(150 < number < 250 for number in drawn.values())


def test_an_image_of_one_class_gives_nothing():
    assert draw_classes(torch.full((4, 4), 2), generator(), 255).tolist() == []
    assert draw_classes(torch.full((4, 4), 255), generator(), 255).tolist() == []


@pytest.mark.parametrize(("cutmix", "classmix"), [(0.5, 0.0), (0.0, 0.5), (0.3, 0.1)])
def test_a_mix_is_one_of_the_two_as_often_as_their_probabilities_say(cutmix, classmix):
    sample, other = ({"labels": torch.arange(16).reshape(4, 4) + 100 * start} for start in (0, 1))
    options = AugmentationConfig(cutmix=cutmix, classmix=classmix)
    boxes = 0
    for seed in range(400):
        pasted = draw_mix(sample, other, options, generator(seed), 255)
        rng = generator(seed)
        torch.rand((), generator=rng)
        boxes += torch.equal(pasted, draw_box(4, 4, rng))
    assert boxes / 400 == pytest.approx(cutmix / (cutmix + classmix), abs=0.08)


def test_pixels_and_labels_are_pasted_by_loops():
    rng = generator()
    sample, other = (
        {"pixel_values": torch.randn(3, 5, 7, generator=rng), "labels": torch.randint(9, (5, 7), generator=rng)}
        for _ in range(2)
    )
    pasted = torch.rand(5, 7, generator=rng) < 0.5
    mixed = paste(sample, other, pasted)
    for row, column in np.ndindex(5, 7):
        source = other if pasted[row, column] else sample
        assert mixed["labels"][row, column] == source["labels"][row, column]
        assert torch.equal(mixed["pixel_values"][:, row, column], source["pixel_values"][:, row, column])


@pytest.mark.parametrize("name", ["cutmix", "classmix"])
def test_samples_of_a_data_set_are_mixed_with_others_and_keep_their_labels(name):
    dataset = TrainDataset(rows(), AugmentationConfig(**PLAIN, **{name: 1.0}), PIXELS, seed=1)
    partners = Counter()
    for epoch in range(40):
        sample = dataset[epoch, 2]
        assert torch.equal(sample["pixel_values"][0].long(), sample["labels"])  # the grey value is the label
        owners = set((sample["labels"] // 4).unique().tolist())
        partners.update(owners - {2})
        assert len(owners) <= 2
        if name == "classmix":
            others = [label for label in sample["labels"].unique().tolist() if label // 4 != 2]
            assert len(others) in (0, 2)  # two of four classes; none if it was mixed with itself
    assert set(partners) == {0, 1, 3, 4, 5}


def test_a_share_of_the_samples_is_mixed():
    dataset = TrainDataset(rows(), AugmentationConfig(**PLAIN, classmix=0.4), PIXELS)
    mixed = [bool((dataset[epoch, 2]["labels"] // 4 != 2).any()) for epoch in range(300)]
    assert np.mean(mixed) == pytest.approx(0.4 * 5 / 6, abs=0.07)  # a sixth is mixed with itself


def test_a_mixed_sample_depends_on_its_key_alone():
    options = AugmentationConfig(crop_size=24, cutmix=0.5, classmix=0.5)
    first, again = (TrainDataset(rows(), options, SegFormerImageProcessor(), seed=3) for _ in range(2))
    torch.manual_seed(1)
    expected = [first[epoch, 4] for epoch in range(5)]
    torch.manual_seed(2)
    again[0, 1]
    for epoch, sample in enumerate(expected):
        assert all(torch.equal(again[epoch, 4][name], sample[name]) for name in sample)


def test_a_stream_mixes_a_sample_with_the_one_before():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    stream = datasets.Dataset.from_list(rows(), features=features).to_iterable_dataset()
    drawn = list(islice(TrainStream(stream, AugmentationConfig(**PLAIN, classmix=1.0), PIXELS), 12))
    owners = [set((sample["labels"] // 4).unique().tolist()) for sample in drawn]
    assert owners[:3] == [{0}, {0, 1}, {1, 2}]
    assert owners[6] == {0, 5}


def test_a_sample_is_mixed_in_one_way():
    with pytest.raises(ValueError, match=r"augmentation.classmix is 0.6 and augmentation.cutmix 0.6; .* at most 1"):
        AugmentationConfig(cutmix=0.6, classmix=0.6)
