"""Transformers' own common tests of image processors, unchanged, on SegFormerImageProcessor.

The common tests tell a model by the folder of its test file, hence this one. What is skipped is skipped by the common
tests themselves: they compare backends or need torchvision's, an accelerator or an annotation format.
"""

import unittest

import torch

from hf_segformer import SegFormerImageProcessor
from tests.support.transformers_common import image_processing


class SegFormerImageProcessingTester(image_processing.ImageProcessingTester):
    """Options and inputs of the common tests."""

    def __init__(self, parent):
        self.num_labels = 5
        super().__init__(
            parent,
            batch_size=3,
            do_resize=True,
            size={"height": 20, "width": 30},
            do_normalize=True,
            image_mean=[0.5, 0.4, 0.3],
            image_std=[0.5, 0.25, 0.2],
            do_reduce_labels=False,
        )

    def _get_image_processing_classes(self):
        return {"pil": SegFormerImageProcessor}


class SegFormerImageProcessingTest(
    image_processing.ImageProcessingTestMixin,
    image_processing.PostProcessSemanticSegmentationTestMixin,
    unittest.TestCase,
):
    """The common tests of this processor."""

    image_processor_tester_class = SegFormerImageProcessingTester
    test_cast_dtype = torch.float16
