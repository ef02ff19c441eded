"""Transformers' common model tests, run on this package's classes.

An override says why the common form does not fit. What is skipped is skipped by the common tests themselves, with
their reason: no accelerator here, or a trait (tokens, experts, sub-configurations) that no SegFormer has.
"""

import unittest
from contextlib import nullcontext
from unittest.mock import mock_open, patch

import pytest
import torch
from torch import nn
from transformers.testing_utils import torch_device

from hf_segformer import (
    SegFormerBackbone,
    SegFormerConfig,
    SegFormerForImageClassification,
    SegFormerForSemanticSegmentation,
    SegFormerModel,
)
from tests.support.tiny import TINY
from tests.support.transformers_common import backbone, configuration, modeling

# By these lists the common tests know which class takes which labels, and which has no loss.
for _names, _model_class in {
    "MODEL_MAPPING_NAMES": SegFormerModel,
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": SegFormerBackbone,
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": SegFormerForImageClassification,
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES": SegFormerForSemanticSegmentation,
}.items():
    known = {**getattr(modeling, _names), SegFormerConfig.model_type: _model_class.__name__}
    setattr(modeling, _names, known)


class ModelTester:
    """Source of models and inputs for the common tests: a tiny network with every dropout active."""

    is_training = True
    batch_size = 3
    height, width = 64, 96
    hidden_states = ((3, 8, 16, 24), (3, 8, 8, 12), (3, 16, 4, 6), (3, 16, 2, 3))
    attentions = ((3, 1, 384, 6), (3, 1, 96, 6), (3, 2, 24, 6), (3, 2, 6, 6))

    def get_config(self):
        return SegFormerConfig(**TINY, num_labels=5, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        size = [self.batch_size, config.num_channels, self.height, self.width]
        return config, {"pixel_values": modeling.floats_tensor(size)}


class SegFormerModelTest(modeling.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        SegFormerModel,
        SegFormerForSemanticSegmentation,
        SegFormerForImageClassification,
        SegFormerBackbone,
    )
    test_resize_embeddings = False  # there are no token embeddings

    def setUp(self):
        self.model_tester = ModelTester()

    def run_model(self, model_class, config, **switches):
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = model_class(config).to(torch_device).eval()
        with torch.no_grad():
            return model(**inputs, **switches)

    def check_shapes(self, tensors, expected):
        assert tuple(tuple(tensor.shape) for tensor in tensors) == expected

    def test_hidden_states_output(self):
        # The common form knows one sequence length and one width; here every stage has its own.
        for model_class in self.all_model_classes:
            asked = self.run_model(model_class, self.model_tester.get_config(), output_hidden_states=True)
            self.check_shapes(asked.hidden_states, self.model_tester.hidden_states)
            config = self.model_tester.get_config()
            config.output_hidden_states = True
            self.check_shapes(self.run_model(model_class, config).hidden_states, self.model_tester.hidden_states)

    def test_attention_outputs(self):
        # As above; the common form also holds that all blocks have as many heads.
        for model_class in self.all_model_classes:
            asked = self.run_model(model_class, self.model_tester.get_config(), output_attentions=True)
            self.check_shapes(asked.attentions, self.model_tester.attentions)
            config = self.model_tester.get_config()
            config.output_attentions = True
            outputs = self.run_model(model_class, config, output_hidden_states=True)
            self.check_shapes(outputs.to_tuple()[-1], self.model_tester.attentions)

    def test_model_get_set_embeddings(self):
        # The common form wants a table of tokens; images are embedded by a convolution, and nothing replaces it.
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            embeddings = model.get_input_embeddings()
            assert isinstance(embeddings, nn.Conv2d)
            assert embeddings.in_channels == model.config.num_channels
            assert model.get_output_embeddings() is None

    def test_can_init_all_missing_weights(self):
        # The common form leaves out models from before 2023, and reads the year from a line that our files lack.
        with patch.object(modeling, "open", mock_open(read_data="# Copyright 2026"), create=True):
            super().test_can_init_all_missing_weights()

    def test_bc_torch_dtype(self):
        # The common form makes a subtest of each of 3,000 tensors: reporting them takes longer than comparing them.
        with patch.object(self, "subTest", lambda message: nullcontext()):
            super().test_bc_torch_dtype()


class SegFormerConfigTest(unittest.TestCase):
    def test_config_keeps_its_own_and_the_common_fields(self):
        properties = ["hidden_sizes", "depths", "num_attention_heads", "num_encoder_blocks", "num_hidden_layers"]
        tester = configuration.ConfigTester(
            self, SegFormerConfig, has_text_modality=False, common_properties=properties, **TINY
        )
        self.model_tester = ModelTester()
        tester.run_common_tests()


class SegFormerBackboneTest(backbone.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (SegFormerBackbone,)
    config_class = SegFormerConfig

    def setUp(self):
        self.model_tester = ModelTester()

    def test_config(self):
        # The common form counts a stem before the stages; SegFormer has none, so stage1 has index 0.
        def chosen(**choice):
            config = SegFormerConfig(**choice)
            return config.out_features, config.out_indices

        assert SegFormerConfig().stage_names == ["stage1", "stage2", "stage3", "stage4"]
        assert chosen() == (["stage4"], [3])
        assert chosen(out_features=["stage2", "stage4"]) == (["stage2", "stage4"], [1, 3])
        assert chosen(out_indices=[0, 2]) == (["stage1", "stage3"], [0, 2])
        assert chosen(out_features=["stage1"], out_indices=[0]) == (["stage1"], [0])
        with pytest.raises(ValueError, match="correspond to the same stages"):
            chosen(out_features=["stage1", "stage2"], out_indices=[0, 2])
