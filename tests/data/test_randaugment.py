"""RandAugment: each operation against NumPy, and how often each is applied."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer.data import randaugment as module
from hf_segformer.data.randaugment import OPERATIONS, randaugment

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def apply(name, level, sign=1, pixels=PIXELS):
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), level, sign))


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"autocontrast", "equalize", "invert", "posterize"}))
def test_level_zero_changes_nothing(name):
    assert np.array_equal(apply(name, 0.0), PIXELS)


def test_operations_on_values_are_those_of_numpy():
    wide = PIXELS.astype(int)
    assert np.array_equal(apply("invert", 0.9), 255 - wide)
    assert np.array_equal(apply("posterize", 0.5), wide & 0b11000000)  # 4 bits less 2
    assert np.array_equal(apply("posterize", 0.0), wide & 0b11110000)
    assert np.array_equal(apply("solarize", 0.5), np.where(wide < 128, wide, 255 - wide))
    assert np.array_equal(apply("solarize_add", 1.0), np.where(wide < 128, np.minimum(wide + 110, 255), wide))
    low, high = wide.min((0, 1)), wide.max((0, 1))
    assert np.abs(apply("autocontrast", 0.3) - (wide - low) * 255 / (high - low)).max() <= 1


@pytest.mark.parametrize("sign", [1, -1])
def test_enhancements_blend_with_black_grey_mean_or_blur(sign):
    factor, wide = 1 + sign * 0.45, PIXELS.astype(float)
    grey = wide @ [0.299, 0.587, 0.114]

    def near(name, base):
        expected = np.clip(base + factor * (wide - base), 0, 255)
        assert np.abs(apply(name, 0.5, sign) - expected).max() <= 1.5

    near("brightness", 0)
    near("contrast", np.round(grey.mean()))
    near("color", grey[..., None])
    assert not np.array_equal(apply("sharpness", 0.5, sign), PIXELS)


def test_the_strongest_darkening_leaves_a_tenth():
    assert np.abs(apply("brightness", 1.0, -1) - 0.1 * PIXELS).max() <= 1


def test_translations_and_shears_move_pixels_and_fill_the_rest():
    moved = apply("translate_x", 1.0)  # 0.45 of 20 pixels
    assert np.array_equal(moved[:, :11], PIXELS[:, 9:])
    assert (moved[:, 11:] == module._OUTSIDE).all()
    back = apply("translate_x", 1.0, -1)
    assert np.array_equal(back[:, 9:], PIXELS[:, :11])
    square = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    assert np.array_equal(
        apply("translate_y", 1.0, 1, square), apply("translate_x", 1.0, 1, square.swapaxes(0, 1)).swapaxes(0, 1)
    )
    assert np.array_equal(
        apply("shear_y", 1.0, 1, square), apply("shear_x", 1.0, 1, square.swapaxes(0, 1)).swapaxes(0, 1)
    )
    # Stripes by column: row r of a shear by 0.3 begins 0.3 r columns further.
    ramp = np.repeat(np.tile(np.arange(20, dtype=np.uint8)[:, None] * 5, (20, 1, 1)), 3, axis=2)
    sheared = apply("shear_x", 1.0, 1, ramp)
    assert sheared[10, 5, 0] == pytest.approx(5 * (5 + 0.3 * 10.5), abs=1.5)


def test_a_rotation_turns_by_up_to_thirty_degrees():
    line = np.zeros((61, 61, 3), dtype=np.uint8)
    line[30, 31:] = 255
    turned = apply("rotate", 1.0, 1, line)[..., 0].astype(float)
    assert np.array_equal(apply("rotate", 1.0, -1, line)[..., 0], turned[::-1])  # the other way is the mirror image
    rows, columns = np.indices(turned.shape) - 30
    turned[np.hypot(rows, columns) > 25] = 0  # corners are filled
    angle = np.degrees(np.arctan2(-(turned * rows).sum(), (turned * columns).sum()))
    assert angle == pytest.approx(30, abs=1)


class TestDraws:
    def test_half_of_the_operations_are_applied_and_all_are_drawn(self, monkeypatch):
        calls = []
        names = list(OPERATIONS)
        fakes = {
            name: lambda image, level, sign, name=name: calls.append((name, level, sign)) or image for name in names
        }
        monkeypatch.setattr(module, "OPERATIONS", fakes)
        generator = torch.Generator().manual_seed(0)
        image = torch.zeros(3, 4, 4, dtype=torch.uint8)
        for _ in range(1000):
            randaugment(image, 9.0, 2, generator)
        assert len(calls) == pytest.approx(1000, abs=90)
        assert {name for name, _, _ in calls} == set(names)
        levels = np.array([level for _, level, _ in calls])
        assert levels.max() <= 1
        assert np.median(levels) == pytest.approx(0.9, abs=0.01)
        assert np.mean([sign for _, _, sign in calls]) == pytest.approx(0, abs=0.1)

    def test_the_generator_alone_decides(self):
        image = torch.from_numpy(PIXELS.transpose(2, 0, 1).copy())
        first, second = (randaugment(image, 9.0, 4, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second)
        assert first.dtype == torch.uint8
        assert first.shape == image.shape

    @pytest.mark.parametrize(
        ("image", "words"),
        [
            (torch.zeros(4, 8, 8, dtype=torch.uint8), "uint8 images of 4 bands"),
            (torch.zeros(3, 8, 8), "float32 images of 3 bands"),
        ],
    )
    def test_other_images_are_refused(self, image, words):
        with pytest.raises(
            ValueError, match=rf"augmentation\.randaugment is 9 for {words}.*set augmentation\.randaugment=0"
        ):
            randaugment(image, 9.0, 2, torch.Generator())
