"""Augmentation of pre-training: crops, erasing, hidden patches, class targets, mixup and CutMix."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from hf_segformer.data.image_transforms import (
    augment_image,
    center_crop,
    class_targets,
    draw_mask,
    draw_window,
    erase,
    mix_batch,
    resize,
)
from hf_segformer.data.pretraining_config import ImageAugmentation

IMAGE = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestCrop:
    @pytest.mark.parametrize("size", [(32, 32), (75, 120), (20, 100)])
    def test_a_resize_is_that_of_pillow(self, size):
        found = resize(IMAGE, *size).numpy().transpose(1, 2, 0)
        expected = Image.fromarray(IMAGE.numpy().transpose(1, 2, 0)).resize(size[::-1], Image.Resampling.BICUBIC)
        assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1
        grey = IMAGE // 4 + 96  # else bytes are cut off between the two passes, floats are not
        assert (resize(grey.float(), *size) - resize(grey, *size).float()).abs().max() < 1.5  # rounded twice

    def test_windows_are_uniform_in_area_and_log_uniform_in_ratio(self):
        options, rng = ImageAugmentation(scale=[0.08, 0.5]), generator()
        windows = [draw_window(300, 300, options, rng) for _ in range(3000)]
        shares, ratios = [], []
        for top, left, height, width in windows:
            assert 0 <= top <= 300 - height
            assert 0 <= left <= 300 - width
            shares.append(height * width / 300**2)
            ratios.append(width / height)
        assert min(shares) > 0.078
        assert np.mean([share < 0.3 for share in shares]) == pytest.approx((0.3 - 0.08) / (0.5 - 0.08), abs=0.03)
        assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.01)
        assert max(ratios) < 1.3333 * 1.02
        assert min(ratios) > 0.75 * 0.98
        assert np.std(
            np.log([ratio for ratio, share in zip(ratios, shares, strict=True) if share < 0.5])
        ) == pytest.approx(math.log(1.3333 / 0.75) / math.sqrt(12), abs=0.01)

    @pytest.mark.parametrize(
        ("size", "expected"),
        [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10)), ((40, 40), (0, 0, 40, 40))],
    )
    def test_what_fits_nowhere_becomes_a_central_window(self, size, expected):
        options = ImageAugmentation(scale=[1.0, 1.0], ratio=[0.75, 1.3333])
        if size == (40, 40):
            options = ImageAugmentation(scale=[1.0, 1.0], ratio=[1.0, 1.0])
        assert draw_window(*size, options, generator()) == expected

    def test_the_whole_image_is_only_resized_and_flipped(self):
        options = ImageAugmentation(crop_size=32, scale=[1.0, 1.0], ratio=[1.5, 1.5], flip=1.0)
        assert torch.equal(augment_image(IMAGE, options, generator()), resize(IMAGE, 32, 32).flip(-1))

    def test_the_center_is_seven_eighths_of_the_shorter_side(self):
        found = center_crop(IMAGE, 56)  # resized to 64 x 96
        assert torch.equal(found, resize(IMAGE, 64, 96)[:, 4:60, 20:76])


def test_erasing_puts_noise_in_one_rectangle():
    pixels = torch.full((2, 50, 60), 9.0)
    shares, values = [], []
    for seed in range(300):
        erased = erase(pixels, generator(seed))
        changed = (erased != 9).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert changed.sum() == len(rows) * len(columns)
        shares.append(changed.float().mean().item())
        values.append(erased[:, changed])
    assert min(shares) > 0.018
    assert max(shares) < 0.34
    assert np.mean(shares) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    noise = torch.cat(values, dim=1)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert (pixels == 9).all()


@pytest.mark.parametrize(("side", "ratio", "number"), [(6, 0.6, 22), (3, 0.5, 5), (2, 0.01, 1)])
def test_a_share_of_the_patches_is_hidden_rounded_up(side, ratio, number):
    masks = torch.stack([draw_mask(side, ratio, generator(seed)) for seed in range(400)])
    assert masks.dtype == torch.bool
    assert masks.shape[1:] == (side, side)
    assert (masks.flatten(1).sum(1) == number).all()
    assert (masks.float().mean(0) - number / side**2).abs().max() < 0.1  # each patch as likely


def test_smoothed_targets_give_the_loss_of_pytorch():
    logits, labels = torch.randn(5, 7, generator=generator()), torch.tensor([0, 3, 6, 3, 1])
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    found = F.cross_entropy(logits, class_targets(labels, 7, 0.1))
    torch.testing.assert_close(found, expected)
    assert torch.equal(class_targets(labels, 7, 0.0), F.one_hot(labels, 7).float())


class TestMixes:
    PIXELS = torch.rand(4, 3, 10, 14, generator=torch.Generator().manual_seed(1))
    TARGETS = torch.eye(4)

    def test_mixup_blends_with_the_mirrored_place_by_a_beta_share(self):
        options = ImageAugmentation(mixup=0.8)
        share = np.random.default_rng(5).beta(0.8, 0.8)  # with mixup alone nothing else is drawn
        pixels, targets = mix_batch(self.PIXELS, self.TARGETS, options, np.random.default_rng(5))
        for index in range(4):
            expected = share * self.PIXELS[index] + (1 - share) * self.PIXELS[3 - index]
            torch.testing.assert_close(pixels[index], expected)
            assert targets[index, index].item() == pytest.approx(share)
            assert targets[index, 3 - index].item() == pytest.approx(1 - share)

    def test_cutmix_pastes_a_box_and_counts_its_pixels(self):
        options, shares = ImageAugmentation(cutmix=1.0), []
        for seed in range(200):
            pixels, targets = mix_batch(self.PIXELS, self.TARGETS, options, np.random.default_rng(seed))
            own, other = (pixels == self.PIXELS).all(1), (pixels == self.PIXELS.flip(0)).all(1)
            assert (own | other).all()
            for index in range(4):
                share = own[index].float().mean().item()
                assert targets[index, index].item() == pytest.approx(share, abs=1e-6)
            shares.append(share)
        assert 0.5 < np.mean(shares) < 0.75  # boxes are cut off at the edges

    def test_with_both_each_batch_has_one_of_them(self):
        options = ImageAugmentation(mixup=0.8, cutmix=1.0)
        is_box = []
        for seed in range(200):
            pixels, targets = mix_batch(self.PIXELS, self.TARGETS, options, np.random.default_rng(seed))
            is_box.append(bool(((pixels == self.PIXELS) | (pixels == self.PIXELS.flip(0))).all()))
            torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert np.mean(is_box) == pytest.approx(0.5, abs=0.12)
