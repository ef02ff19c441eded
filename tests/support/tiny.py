"""Tiny networks and comparisons that many tests share."""

import torch

TINY = {
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}

# With a reduction, and without one.
TWO_STAGES = {
    "num_encoder_blocks": 2,
    "hidden_sizes": [8, 8],
    "depths": [1, 1],
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}

# Encoder, with a head of 150 classes, of 19 classes, and the ImageNet classifier (facts of the original code).
PARAMETERS = {
    "b0": (3_319_392, 3_752_694, 3_719_027, 3_576_392),
    "b1": (13_151_424, 13_715_798, 13_682_131, 13_664_424),
    "b2": (24_196_288, 27_461_974, 27_361_235, 24_709_288),
    "b3": (44_072_128, 47_337_814, 47_237_075, 44_585_128),
    "b4": (60_842_688, 64_108_374, 64_007_635, 61_355_688),
    "b5": (81_443_008, 84_708_694, 84_607_955, 81_956_008),
}


def logits_of(model, images):
    with torch.no_grad():
        return model(images).logits


def assert_same(first, second):
    """Assert float32 equality up to the order of sums: two forms of the head round differently."""
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
