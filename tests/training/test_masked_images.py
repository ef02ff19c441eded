"""Masked image modeling: nothing of a hidden patch is seen, and the loss is that of a loop over pixels."""

import pytest
import torch

from hf_segformer import SegFormerConfig
from hf_segformer.training.masked_images import SegFormerForMaskedImages, expand_mask, masked_l1_loss
from tests.support.tiny import TINY, TWO_STAGES

HIDDEN = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 0, 0]]], dtype=torch.bool)


@pytest.fixture
def model():
    return SegFormerForMaskedImages(SegFormerConfig(**TINY)).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96)


def test_a_mask_covers_its_patches():
    hidden = expand_mask(HIDDEN, 4, 6)
    assert hidden.shape == (2, 1, 4, 6)
    for row in range(4):
        for column in range(6):
            assert torch.equal(hidden[:, 0, row, column], HIDDEN[:, row // 2, column // 2])
    with pytest.raises(ValueError, match="grid of 2x3 patches; expected one that divides 5x6 pixels"):
        expand_mask(HIDDEN, 5, 6)


def test_the_loss_is_the_mean_over_hidden_pixels():
    drawn, images = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    total, number = 0.0, 0
    for image in range(2):
        for row in range(4):
            for column in range(6):
                if HIDDEN[image, row // 2, column // 2]:
                    total += (drawn[image, :, row, column] - images[image, :, row, column]).abs().sum().item()
                    number += 3
    found = masked_l1_loss(drawn, images, expand_mask(HIDDEN, 4, 6))
    assert found.item() == pytest.approx(total / number, rel=1e-6)
    assert masked_l1_loss(drawn, images, torch.zeros(2, 1, 4, 6, dtype=torch.bool)).item() == 0
    assert masked_l1_loss(drawn.bfloat16(), images, expand_mask(HIDDEN, 4, 6)).dtype == torch.float32


def test_nothing_of_a_hidden_patch_is_seen(model, images):
    """With overlapping windows, tokens beside a hidden patch would see three of its pixels."""
    hidden = expand_mask(HIDDEN, 64, 96)
    others = torch.where(hidden, torch.randn_like(images), images)
    with torch.no_grad():
        first, second = (model(pixels, HIDDEN).reconstruction for pixels in (images, others))
        assert torch.equal(first, second)
        seen = images.clone()
        seen[0, 0, 40, 0] += 1  # of a patch that is not hidden
        assert not torch.equal(model(seen, HIDDEN).reconstruction[0], first[0])


def test_the_head_shuffles_channels_to_pixels(model, images):
    with torch.no_grad():
        outputs = model(images, HIDDEN)
        masked = torch.where(expand_mask(HIDDEN, 64, 96), model.mask_color[:, None, None], images)
        last = model.segformer(masked).last_hidden_state
        drawn = model.decoder(last)  # (2, 3 * 32 * 32, 2, 3)
    assert outputs.reconstruction.shape == images.shape
    for channel, row, column in ((0, 0, 0), (2, 17, 5), (1, 63, 95), (2, 32, 64)):
        inside = channel * 1024 + (row % 32) * 32 + column % 32
        assert torch.equal(outputs.reconstruction[:, channel, row, column], drawn[:, inside, row // 32, column // 32])
    expected = masked_l1_loss(outputs.reconstruction, images, expand_mask(HIDDEN, 64, 96))
    assert torch.equal(outputs.loss, expected)
    with torch.no_grad():
        assert model(images, HIDDEN, return_loss=False).loss is None


def test_every_weight_learns(model, images):
    model.train()(images, HIDDEN).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_other_depths_and_bands_are_drawn_in_full():
    config = SegFormerConfig(**TWO_STAGES, num_channels=5)
    model = SegFormerForMaskedImages(config).eval()
    mask = torch.tensor([[[True, False, False]]])
    with torch.no_grad():
        outputs = model(torch.randn(1, 5, 12, 36), mask)  # 12 pixels are a stride and a half
    assert outputs.reconstruction.shape == (1, 5, 12, 36)


def test_weights_survive_saving(model, tmp_path):
    with torch.no_grad():
        model.mask_color.copy_(torch.tensor([0.5, -1.0, 2.0]))
    model.save_pretrained(tmp_path)
    loaded, found = SegFormerForMaskedImages.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert all(torch.equal(loaded.state_dict()[name], weights) for name, weights in model.state_dict().items())


def test_images_of_other_bands_are_refused(model):
    with pytest.raises(ValueError, match=r"expected \(batch, 3, height, width\)"):
        model(torch.randn(2, 4, 64, 96), HIDDEN)
