"""Augmentation and data sets: each step against a slow reference, and randomness that depends on the seed alone."""

import colorsys
import math
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_segformer import SegFormerImageProcessor
from hf_segformer.config import AugmentationConfig
from hf_segformer.data.torch_datasets import EpochSampler, EvalDataset, TrainDataset, TrainStream, collate
from hf_segformer.data.transforms import augment, crop_rotated, photometric_distortion
from hf_segformer.files import IGNORE_INDEX

IDENTITY = AugmentationConfig(crop_size=32, scale=[1.0, 1.0], max_class_share=1.0, flip=0.0, distortion=0.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def with_changes(**changes):
    return AugmentationConfig(**{**vars(IDENTITY), **changes})


def rows(count=6, height=40, width=52, mode="RGB"):
    rng = np.random.default_rng(0)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return [
        {
            "image": Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)),
            "label": Image.fromarray(rng.integers(0, 5, (height, width), dtype=np.uint8)),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_image_and_labels_are_cropped_and_flipped_together(seed):
    labels = torch.randint(0, 200, (40, 52), generator=generator(seed))
    image = labels.to(torch.uint8).expand(3, -1, -1)
    image, labels = augment(image, labels, with_changes(flip=0.5), generator(seed))
    assert image.shape == (3, 32, 32)
    assert torch.equal(image[0].long(), labels)


def test_half_of_the_images_are_flipped():
    labels = torch.arange(32).expand(32, -1)
    flipped = sum(
        int(augment(torch.zeros(3, 32, 32), labels, with_changes(flip=0.5), generator(seed))[1][0, 0]) == 31
        for seed in range(400)
    )
    assert 160 < flipped < 240


@pytest.mark.parametrize(
    ("base_size", "expected"),
    [([], (20, 30)), ([60, 400], (30, 45)), ([60, 70], (23, 35))],  # 70 / 60 is the smaller ratio, times a half
)
def test_the_scale_is_relative_to_the_image_or_to_the_base_size(base_size, expected):
    image, labels = torch.zeros(3, 40, 60, dtype=torch.uint8), torch.zeros(40, 60, dtype=torch.long)
    options = with_changes(crop_size=999, base_size=base_size, scale=[0.5, 0.5])
    image, labels = augment(image, labels, options, generator())
    assert tuple(labels.shape) == tuple(image.shape[1:]) == expected


def test_scales_are_uniform_between_the_bounds():
    options = with_changes(crop_size=999, scale=[0.5, 2.0])
    labels = torch.zeros(100, 40, dtype=torch.long)
    heights = [augment(torch.zeros(3, 100, 40), labels, options, generator(seed))[1].shape[0] for seed in range(300)]
    assert 50 <= min(heights) < 60
    assert 190 < max(heights) <= 200
    assert 115 < np.mean(heights) < 135


def test_labels_are_resized_without_mixing():
    labels = torch.tensor([[0, 200], [255, 7]]).repeat_interleave(20, 0).repeat_interleave(20, 1)
    _, resized = augment(torch.zeros(3, 40, 40), labels, with_changes(crop_size=99, scale=[0.7, 0.7]), generator())
    assert resized.unique().tolist() == [0, 7, 200, 255]


def test_crops_dominated_by_one_class_are_drawn_again_up_to_ten_times():
    labels = torch.zeros(64, 256, dtype=torch.long)
    labels[:, 192:] = 1
    labels[:, :64] = IGNORE_INDEX
    shares = []
    for seed in range(100):
        _, crop = augment(torch.zeros(3, 64, 256), labels, with_changes(max_class_share=0.75), generator(seed))
        counted = crop[crop != IGNORE_INDEX]
        shares.append(torch.bincount(counted).max() / counted.numel() if counted.numel() else 1.0)
    # 16 of 225 positions qualify, which is the share of such crops without the rule.
    assert sum(share < 0.75 for share in shares) > 40


def test_an_image_of_one_class_is_still_cropped():
    image, labels = torch.zeros(3, 40, 52), torch.zeros(40, 52, dtype=torch.long)
    assert augment(image, labels, with_changes(max_class_share=0.75), generator())[1].shape == (32, 32)


@pytest.mark.parametrize("seed", range(12))
def test_photometric_distortion_matches_the_slow_reference(seed):
    image = torch.randint(0, 256, (3, 3, 5), generator=generator(99)).to(torch.uint8)
    expected = slow_distortion(image.permute(1, 2, 0).tolist(), generator(seed))
    difference = photometric_distortion(image, 1.0, generator(seed)).permute(1, 2, 0).float() - torch.tensor(expected)
    assert difference.abs().max() <= 1  # of rounding to bytes


def slow_distortion(pixels, generator):
    """Distort one pixel at a time by colorsys, with draws in the order of the paper's code."""

    def draw(low=0.0, high=1.0):
        return low + (high - low) * torch.rand((), generator=generator).item()

    def each(change):
        return [[[min(255.0, max(0.0, value)) for value in change(pixel)] for pixel in row] for row in pixels]

    def contrast():
        factor = draw(0.5, 1.5) if draw() < 0.5 else 1.0
        return each(lambda pixel: [value * factor for value in pixel])

    def recoloured(pixel, factor, turn):
        hue, saturation, value = colorsys.rgb_to_hsv(*(band / 255 for band in pixel))
        return [band * 255 for band in colorsys.hsv_to_rgb((hue + turn) % 1, min(1, saturation * factor), value)]

    if draw() < 0.5:
        shift = draw(-32, 32)
        pixels = each(lambda pixel: [value + shift for value in pixel])
    first = draw() < 0.5
    if first:
        pixels = contrast()
    factor = draw(0.5, 1.5) if draw() < 0.5 else 1.0
    turn = draw(-18, 18) / 180 if draw() < 0.5 else 0.0
    pixels = each(lambda pixel: recoloured(pixel, factor, turn))
    return pixels if first else contrast()


@pytest.mark.parametrize(("option", "turned"), [("vertical_flip", 2), ("quarter_turns", 1)])
def test_images_from_above_are_turned_with_their_labels(option, turned):
    labels = torch.randint(0, 200, (32, 32), generator=generator(1))
    image = labels.to(torch.uint8).expand(3, -1, -1)
    expected = [labels, labels.flip(0)] if option == "vertical_flip" else [labels.rot90(k) for k in range(4)]
    seen = [0] * len(expected)
    for seed in range(600):
        bands, found = augment(image, labels, with_changes(**{option: 0.5}), generator(seed))
        assert torch.equal(bands[0].long(), found)
        [which] = [index for index, other in enumerate(expected) if torch.equal(other, found)]
        seen[which] += 1
    assert 250 < seen[0] < 350
    assert all(number == pytest.approx((600 - seen[0]) / len(seen[1:]), abs=40) for number in seen[1:])


def test_a_quarter_turn_of_a_crop_that_is_not_square_swaps_its_sides():
    options = with_changes(quarter_turns=1.0)
    shapes = {
        tuple(augment(torch.zeros(3, 20, 28), torch.zeros(20, 28, dtype=torch.long), options, generator(seed))[1].shape)
        for seed in range(12)
    }
    assert shapes == {(20, 28), (28, 20)}


def slow_rotation(image, labels, corner, side, degrees):
    """Look up one pixel at a time; the image is mirrored at its outer edges."""
    height, width = labels.shape
    rows, columns = (range(at, min(at + side, stop)) for at, stop in zip(corner, (height, width), strict=True))
    center = (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def mirrored(at, stop):
        return -1 - at if at < 0 else 2 * stop - 1 - at if at >= stop else at

    found = torch.zeros(len(image), len(rows), len(columns))
    marks = torch.full((len(rows), len(columns)), IGNORE_INDEX)
    for row, column in np.ndindex(marks.shape):
        # Rows run downward: what an anticlockwise turn shows here lies clockwise of here in the image.
        down, right = rows[row] - center[0], columns[column] - center[1]
        at = center[0] + cosine * down + sine * right, center[1] - sine * down + cosine * right
        first = [math.floor(each) for each in at]
        for low, left in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weights = [1 - abs(each - place) for each, place in zip(at, (first[0] + low, first[1] + left), strict=True)]
            place = mirrored(first[0] + low, height), mirrored(first[1] + left, width)
            found[:, row, column] += math.prod(weights) * image[:, *place]
        nearest = [round(each) for each in at]
        if 0 <= nearest[0] < height and 0 <= nearest[1] < width:
            marks[row, column] = labels[*nearest]
    return found, marks


@pytest.mark.parametrize(
    ("corner", "side", "degrees"), [((9, 11), 16, 17.0), ((0, 0), 16, -30.0), ((24, 36), 16, 8.5), ((0, 0), 64, 12.0)]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_rotated_crop_matches_the_slow_reference(corner, side, degrees, dtype):
    image = torch.randint(0, 256, (4, 40, 52), generator=generator(9)).to(dtype)
    labels = torch.randint(0, 9, (40, 52), generator=generator(8))
    found, marks = crop_rotated(image, labels, corner, side, degrees)
    expected, expected_marks = slow_rotation(image.float(), labels, corner, side, degrees)
    assert torch.equal(marks, expected_marks)
    assert found.dtype == dtype
    tolerance = 0.51 if dtype == torch.uint8 else 0.01
    assert (found.float() - expected).abs().max() <= tolerance


def test_a_crop_that_is_turned_by_a_right_angle_is_the_turned_crop():
    labels = torch.randint(0, 200, (40, 52), generator=generator(1))
    image = labels.float()[None]
    found, marks = crop_rotated(image, labels, (10, 12), 16, 90.0)
    assert torch.equal(marks, labels[10:26, 12:28].rot90(1))
    torch.testing.assert_close(found[0], image[0, 10:26, 12:28].rot90(1), rtol=0, atol=0.01)


def test_angles_are_uniform_up_to_the_largest():
    # A ramp along the rows falls off by the sine of the angle along the columns.
    image, labels = torch.arange(96.0)[:, None].expand(1, 96, 96), torch.zeros(96, 96, dtype=torch.long)
    angles = []
    for seed in range(200):
        crop, _ = augment(image, labels, with_changes(rotation=20.0), generator(seed))
        across, along = crop[0, 16, 20] - crop[0, 16, 12], crop[0, 20, 16] - crop[0, 12, 16]
        angles.append(math.degrees(math.atan2(across, along)))
    assert max(angles) <= 20.01
    assert min(angles) >= -20.01
    assert np.std(angles) == pytest.approx(20 / math.sqrt(3), rel=0.1)


def test_grey_images_stay_grey():
    image = torch.full((3, 4, 5), 90, dtype=torch.uint8)
    for seed in range(20):
        bands = photometric_distortion(image, 1.0, generator(seed))
        assert torch.equal(bands[0], bands[1])
        assert torch.equal(bands[0], bands[2])


def test_four_bands_of_bytes_change_brightness_and_contrast_only():
    image = torch.arange(4 * 6 * 5).reshape(4, 6, 5).to(torch.uint8)
    changed = [photometric_distortion(image, 1.0, generator(seed)) for seed in range(8)]
    assert any(not torch.equal(image, other) for other in changed)
    order = image.flatten().argsort()
    assert all((other.flatten()[order].int().diff() >= 0).all() for other in changed)


def test_measurements_cannot_be_distorted():
    image, labels = torch.zeros(4, 40, 52), torch.zeros(40, 52, dtype=torch.long)
    with pytest.raises(ValueError, match=r"float32 images in units of their own.*set data.value_range, or"):
        augment(image, labels, with_changes(distortion=1.0), generator())


def test_floats_on_the_byte_scale_are_distorted_like_bytes_without_rounding():
    image = torch.randint(0, 256, (3, 6, 5), generator=generator(99)).to(torch.uint8)
    for seed in range(8):
        exact = photometric_distortion(image.float(), 1.0, generator(seed))
        assert exact.dtype == torch.float32
        assert torch.equal(exact.round().to(torch.uint8), photometric_distortion(image, 1.0, generator(seed)))


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    dataset = TrainDataset(rows(), AugmentationConfig(crop_size=32), SegFormerImageProcessor(), seed=3)
    torch.manual_seed(1)
    first = dataset[2, 5]
    torch.manual_seed(2)
    again = dataset[2, 5]
    assert all(torch.equal(first[name], again[name]) for name in first)
    others = [
        dataset[3, 5],
        dataset[2, 4],
        TrainDataset(rows(), AugmentationConfig(crop_size=32), SegFormerImageProcessor(), 4)[2, 5],
    ]
    assert all(not torch.equal(first["pixel_values"], other["pixel_values"]) for other in others)


def test_a_plain_index_draws_a_new_augmentation_each_time():
    dataset = TrainDataset(rows(), AugmentationConfig(crop_size=32), SegFormerImageProcessor(), seed=3)
    assert not torch.equal(dataset[1]["pixel_values"], dataset[1]["pixel_values"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")  # on one core
@pytest.mark.parametrize(("workers", "start"), [(2, "fork"), (1, "spawn")])
def test_workers_give_the_samples_of_the_main_process_in_every_epoch(workers, start):
    dataset = TrainDataset(rows(), AugmentationConfig(crop_size=32), SegFormerImageProcessor(), seed=0)
    epochs = [0]
    sampler = EpochSampler(len(dataset), 0, lambda: epochs[-1])
    here = DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=collate)
    there = DataLoader(
        dataset,
        batch_size=2,
        sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context=start,
        persistent_workers=True,
    )
    seen = []
    for epoch in range(2):
        epochs.append(epoch)
        for ours, theirs in zip(here, there, strict=True):
            assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
            assert torch.equal(ours["labels"], theirs["labels"])
        seen.append(ours["pixel_values"])
    assert not torch.equal(*seen)


def stream_of_rows(path, num_shards):
    """Stream sixteen images, each of one grey value, with one mask for all of them."""
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (52, 40), (10 * index,) * 3) for index in range(16)]
    labels = Image.fromarray((np.arange(40 * 52) % 251).astype(np.uint8).reshape(40, 52))
    columns = {"image": datasets.Image(), "label": datasets.Image()}
    for shard in range(num_shards):
        rows = [{"image": image, "label": labels} for image in images[shard::num_shards]]
        table = datasets.Dataset.from_list(rows, features=datasets.Features(columns))
        table.to_parquet(path / f"train-{shard}.parquet")
    stream = datasets.load_dataset(str(path), split="train", streaming=True)
    return stream.shuffle(seed=0, buffer_size=100)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize(("num_shards", "workers"), [(4, 0), (4, 2), (4, 3), (1, 2)])
def test_each_pass_over_a_stream_yields_every_image_once_in_a_new_order(tmp_path, num_shards, workers):
    processor = SegFormerImageProcessor(do_rescale=False, do_normalize=False)
    stream = TrainStream(stream_of_rows(tmp_path, num_shards), IDENTITY, processor)
    samples = [sample["pixel_values"] for sample in islice(DataLoader(stream, 1, num_workers=workers), 40)]
    greys = [int(pixels[0, 0, 0, 0]) // 10 for pixels in samples]
    if workers in (0, 2) and num_shards % max(workers, 1) == 0:  # then workers finish a pass together
        assert sorted(greys[:16]) == sorted(greys[16:32]) == list(range(16))
    assert set(greys) == set(range(16))
    assert greys[:8] != greys[16:24]


def test_augmentation_of_a_stream_varies_with_pixels_and_epoch(tmp_path):
    stream = TrainStream(stream_of_rows(tmp_path, 1), with_changes(scale=[0.5, 2.0]), SegFormerImageProcessor())
    drawn, again = ([sample["labels"].numpy().tobytes() for sample in islice(stream, 32)] for _ in range(2))
    assert len(set(drawn)) == 32
    assert again == drawn


def test_each_epoch_has_a_permutation_of_its_own():
    epoch = 0
    sampler = EpochSampler(20, 7, lambda: epoch)
    first, again = list(sampler), list(sampler)
    epoch = 1
    second = list(sampler)
    assert first == again
    assert sorted(first) == [(0, index) for index in range(20)]
    assert sorted(second) == [(1, index) for index in range(20)]
    assert [index for _, index in first] != [index for _, index in second]


def test_small_images_are_padded_with_the_mean_and_ignored_labels():
    sample = TrainDataset(rows(), with_changes(crop_size=64), SegFormerImageProcessor(), 0)[0, 0]
    assert sample["pixel_values"].shape == (3, 64, 64)
    assert (sample["pixel_values"][:, 40:] == 0).all()
    assert (sample["pixel_values"][:, :, 52:] == 0).all()
    assert (sample["labels"][40:] == IGNORE_INDEX).all()
    assert (sample["labels"][:40, :52] != IGNORE_INDEX).all()


def test_without_augmentation_a_sample_equals_the_processor_output():
    [row] = rows(1, 32, 32)
    processor = SegFormerImageProcessor(do_resize=False)
    sample = TrainDataset([row], IDENTITY, SegFormerImageProcessor(), 0)[0, 0]
    expected = processor(row["image"], row["label"], return_tensors="pt")
    assert torch.equal(sample["pixel_values"], expected.pixel_values[0])
    assert torch.equal(sample["labels"], expected.labels[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_four_band_images_end_to_end(dtype, tiny_config):
    from hf_segformer import SegFormerForSemanticSegmentation

    rng = np.random.default_rng(0)
    row = {
        "image": rng.integers(0, 256, (4, 40, 52)).astype(dtype),
        "label": rng.integers(0, 5, (40, 52), dtype=np.uint8),
    }
    processor = SegFormerImageProcessor(image_mean=[100.0] * 4, image_std=[50.0] * 4, do_rescale=False)
    sample = TrainDataset([row], with_changes(scale=[0.8, 1.2], flip=0.5), processor, 0)[0, 0]
    model = SegFormerForSemanticSegmentation(tiny_config(num_channels=4))
    loss = model(**collate([sample, sample])).loss
    loss.backward()
    assert sample["pixel_values"].shape == (4, 32, 32)
    assert loss.isfinite()


def test_evaluation_keeps_labels_at_their_own_size():
    processor = SegFormerImageProcessor(size={"shortest_edge": 64}, keep_ratio=True, size_divisor=32)
    sample = EvalDataset(rows(), processor)[0]
    assert sample["pixel_values"].shape == (3, 64, 96)
    assert sample["labels"].shape == (40, 52)


def test_images_of_several_sizes_cannot_be_collated():
    samples = EvalDataset([*rows(1), *rows(1, 36)], SegFormerImageProcessor(do_resize=False))
    with pytest.raises(
        ValueError, match=r"sizes 36x52, 40x52 do not fit into one batch: set trainer.per_device_eval_batch_size=1"
    ):
        collate([samples[0], samples[1]])


def test_a_mask_of_another_size_is_refused():
    row = {"image": Image.new("RGB", (52, 40)), "label": Image.new("L", (40, 52))}
    with pytest.raises(ValueError, match=r"image 0 is 40x52 .* but its mask 52x40"):
        TrainDataset([row], IDENTITY, SegFormerImageProcessor(), 0)[0, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_size": 8}, "augmentation.crop_size is 8"),
        ({"base_size": [512]}, r"augmentation.base_size is \[512\]"),
        ({"base_size": [640, 512]}, "augmentation.base_size"),
        ({"scale": [2.0, 0.5]}, r"0 < low <= high"),
        ({"max_class_share": 0.0}, "augmentation.max_class_share"),
        ({"flip": 1.5}, "augmentation.flip is 1.5; expected a number from 0 to 1"),
        ({"distortion": -1}, "augmentation.distortion is -1"),
    ],
)
def test_invalid_options_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**values)
