"""Photometric augmentation: every step against loops over pixels, and the draws in their documented order."""

import math
import random
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer.config import PHOTOMETRIC, AugmentationConfig
from hf_segformer.data.photometric import (
    add_noise,
    augment_photometrically,
    blur,
    cast_shadow,
    change_exposure,
    change_gamma,
    change_temperature,
    compress,
)
from hf_segformer.data.transforms import augment

STRENGTHS = {
    "shadow": 0.6,
    "exposure": 1.0,
    "temperature": 0.5,
    "gamma": 0.8,
    "blur": 1.5,
    "noise": 12.0,
    "jpeg": 30,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bands(number=3, height=9, width=13):
    return torch.randint(0, 256, (number, height, width), generator=generator(99)).to(torch.uint8)


def by_pixel(pixels, change):
    """Apply a function of (value, band, row, column) to each value."""
    values = pixels.double().numpy().copy()
    for place in np.ndindex(values.shape):
        values[place] = change(values[place], *place)
    return torch.from_numpy(values)


def slow_shadow(pixels, center, edges, softness, darkness):
    def light(value, _, row, column):
        depths = [
            distance - ((row - center[0]) * math.cos(angle) + (column - center[1]) * math.sin(angle))
            for angle, distance in edges
        ]
        return value * (1 - darkness * min(1.0, max(0.0, min(depths) / softness + 0.5)))

    return by_pixel(pixels, light)


def slow_blur(pixels, sigma):
    """Sum over a square of neighbours, whose weights are the product of two Gaussians."""
    radius = max(1, math.ceil(3 * sigma))
    reach = range(-radius, radius + 1)
    weights = {(down, right): math.exp(-0.5 * (down**2 + right**2) / sigma**2) for down in reach for right in reach}
    total = sum(weights.values())
    values = pixels.double().numpy()
    height, width = values.shape[1:]

    def average(_, band, row, column):
        return (
            sum(
                weight * values[band, min(max(row + down, 0), height - 1), min(max(column + right, 0), width - 1)]
                for (down, right), weight in weights.items()
            )
            / total
        )

    return by_pixel(pixels, average)


def slow_jpeg(pixels, quality):
    values = pixels.round().clamp(0, 255).to(torch.uint8)
    planes = [Image.fromarray(band.numpy()) for band in values]
    images = [Image.merge("RGB", planes)] if len(planes) == 3 else planes
    found = []
    for image in images:
        file = BytesIO()
        image.save(file, format="JPEG", quality=quality)
        found += [np.asarray(band) for band in Image.open(BytesIO(file.getvalue())).split()]
    return torch.from_numpy(np.stack(found).astype(np.float64))


def slow_photometric(image, seed, probability):
    """All seven options, drawn in their order, by loops over pixels."""
    rng = generator(seed)

    def draw(low, high):
        return low + (high - low) * torch.rand((), generator=rng).item()

    def is_drawn():
        return draw(0, 1) < probability

    pixels, (height, width) = image.double(), image.shape[1:]
    if is_drawn():
        number = 1 + int(torch.randint(4, (), generator=rng))
        center, first = (draw(0, height), draw(0, width)), draw(0, 2 * math.pi)
        edges = [(first + 2 * math.pi * edge / number, 13 * draw(0.1, 0.5)) for edge in range(number)]
        softness = draw(1, max(1, 13 / 16))
        pixels = slow_shadow(pixels, center, edges, softness, draw(0, 0.6))
    if is_drawn():
        factor = 2 ** draw(-1, 1)
        pixels = by_pixel(pixels, lambda value, *_: min(255, value * factor))
    if is_drawn():
        stops = draw(-0.5, 0.5)
        factors = [2**stops, 1, 2**-stops]
        pixels = by_pixel(pixels, lambda value, band, *_: min(255, value * factors[band]))
    if is_drawn():
        exponent = 1.8 ** draw(-1, 1)
        pixels = by_pixel(pixels, lambda value, *_: 255 * (value / 255) ** exponent)
    if is_drawn():
        pixels = slow_blur(pixels, draw(0, 1.5))
    if is_drawn():
        std = draw(0, 12)
        noise = torch.randn(pixels.shape, generator=rng).double().numpy()
        pixels = by_pixel(pixels, lambda value, *place: min(255, max(0, value + std * noise[place])))
    if is_drawn():
        pixels = slow_jpeg(pixels, int(torch.randint(30, 96, (), generator=rng)))
    return pixels


@pytest.mark.parametrize("seed", range(12))
def test_draws_and_steps_are_the_documented_ones(seed):
    options = AugmentationConfig(**STRENGTHS, photometric_probability=0.6)
    found = augment_photometrically(bands(), options, generator(seed), True)
    expected = slow_photometric(bands(), seed, 0.6)
    assert found.dtype == torch.uint8
    # Rounding before JPEG may differ by one, which the compression may enlarge.
    assert (found.double() - expected).abs().max() <= 3
    assert (found.double() - expected).abs().mean() <= 0.35


@pytest.mark.parametrize("name", PHOTOMETRIC)
@pytest.mark.parametrize("seed", range(3))
def test_an_option_alone_is_exact_on_floats(name, seed):
    options = AugmentationConfig(**{name: STRENGTHS[name]}, photometric_probability=1.0)
    found = augment_photometrically(bands().float(), options, generator(seed), True)
    rng = generator(seed)
    torch.rand((), generator=rng)  # whether it is applied
    assert found.dtype == torch.float32
    if name == "gamma":
        exponent = 1.8 ** (2 * torch.rand((), generator=rng).item() - 1)
        expected = by_pixel(bands(), lambda value, *_: 255 * (value / 255) ** exponent)
    elif name == "exposure":
        factor = 2 ** (2 * torch.rand((), generator=rng).item() - 1)
        expected = by_pixel(bands(), lambda value, *_: min(255, value * factor))
    elif name == "blur":
        expected = slow_blur(bands(), 1.5 * torch.rand((), generator=rng).item())
    elif name == "jpeg":
        expected = slow_jpeg(bands(), int(torch.randint(30, 96, (), generator=rng)))
    else:
        return  # by the test of all together, and below
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)


def test_values_by_hand():
    pixels = torch.tensor([51.0, 102.0, 204.0])[:, None, None].expand(3, 2, 2)
    assert change_exposure(pixels, -1.0)[:, 0, 0].tolist() == [25.5, 51.0, 102.0]
    assert change_temperature(pixels, 1.0)[:, 0, 0].tolist() == [102.0, 102.0, 102.0]
    assert change_gamma(pixels, 2.0)[:, 0, 0].tolist() == pytest.approx([10.2, 40.8, 163.2])


def test_a_shadow_of_one_edge_is_a_half_plane():
    pixels = torch.full((1, 3, 8), 100.0)
    shaded = cast_shadow(pixels, (1.0, 3.0), [(math.pi / 2, 1.5)], 1.0, 0.4)  # columns up to 4.5
    assert shaded[0, 1].tolist() == pytest.approx([60, 60, 60, 60, 60, 100, 100, 100])


def test_a_shadow_of_four_edges_is_a_square():
    edges = [(edge * math.pi / 2, 2.5) for edge in range(4)]
    shaded = cast_shadow(torch.ones(1, 11, 11), (5.0, 5.0), edges, 1e-3, 1.0)[0]
    expected = torch.ones(11, 11)
    expected[3:8, 3:8] = 0
    assert torch.equal(shaded, expected)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.5])
def test_blur_is_the_two_dimensional_gaussian(sigma):
    found, expected = blur(bands(2, 6, 7).float(), sigma).double(), slow_blur(bands(2, 6, 7), sigma)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)  # of float32


def test_blur_of_nothing_changes_nothing():
    assert torch.equal(blur(bands().float(), 0.0), bands().float())


def test_noise_has_the_standard_deviation_and_is_another_for_each_value():
    noise = add_noise(torch.full((3, 80, 80), 100.0), 8.0, generator()) - 100
    assert noise.std().item() == pytest.approx(8, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.2)
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 0.05


@pytest.mark.parametrize("number", [1, 3, 4])
def test_compression_is_that_of_pillow(number):
    assert torch.equal(compress(bands(number).float(), 40).double(), slow_jpeg(bands(number), 40))


def test_options_that_are_off_draw_nothing():
    rng = generator()
    before = rng.get_state()
    image = bands()
    assert augment_photometrically(image, AugmentationConfig(), rng, True) is image
    assert torch.equal(rng.get_state(), before)


def test_an_option_is_applied_as_often_as_its_probability_says():
    options = AugmentationConfig(gamma=1.0, photometric_probability=0.3)
    changed = [
        not torch.equal(augment_photometrically(bands(), options, generator(seed), True), bands())
        for seed in range(1000)
    ]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("name", [name for name in PHOTOMETRIC if name != "blur"])
def test_measurements_are_refused_with_a_remedy(name):
    options = AugmentationConfig(**{name: STRENGTHS[name]}, distortion=0.0)
    remedy = rf"augmentation.{name} is .* for float32 images in units of their own.* or augmentation.{name}=0"
    with pytest.raises(ValueError, match=remedy):
        augment(torch.zeros(3, 40, 52), torch.zeros(40, 52, dtype=torch.long), options, generator())


def test_colour_temperature_needs_three_bands():
    with pytest.raises(ValueError, match=r"augmentation.temperature is 0.5 for images of 4 bands; expected red, green"):
        augment_photometrically(bands(4), AugmentationConfig(temperature=0.5), generator(), True)


def test_measurements_are_blurred_in_their_units():
    image = 1000 * torch.randn(5, 6, 7, generator=generator())
    options = AugmentationConfig(blur=1.0, photometric_probability=1.0)
    rng = generator(3)
    torch.rand((), generator=rng)
    expected = slow_blur(image, torch.rand((), generator=rng).item())
    found = augment_photometrically(image, options, generator(3), False)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("vertical_flip", 1),
        ("quarter_turns", 1),
        ("rotation", 45),
        ("photometric_probability", 1),
        ("shadow", 1),
        ("exposure", 4),
        ("temperature", 2),
        ("gamma", 4),
        ("blur", 16),
        ("noise", 128),
        ("jpeg", 95),
        ("cutmix", 1),
        ("classmix", 1),
        ("class_balance", 1),
    ],
)
def test_each_option_has_its_range(name, largest):
    AugmentationConfig(**{name: largest})
    for value in (-1, largest + 1, math.nan):
        with pytest.raises(ValueError, match=f"augmentation.{name} is {value}; expected a number from 0 to {largest}"):
            AugmentationConfig(**{name: value})


def test_global_random_states_are_not_used():
    options = AugmentationConfig(**STRENGTHS, photometric_probability=1.0)
    states = random.getstate(), torch.get_rng_state()
    first = augment_photometrically(bands(), options, generator(1), True)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert torch.equal(first, augment_photometrically(bands(), options, generator(1), True))
