"""Labels beyond a byte, from masks to scores: K classes, negative values, and an ignore value that is no class."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EvalPrediction

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.configuration_segformer import default_ignore_index
from hf_segformer.data.label_mapping import LabelMapping, class_values
from hf_segformer.data.torch_datasets import EvalDataset
from hf_segformer.evaluation.evaluate import evaluate
from hf_segformer.evaluation.mean_iou import MeanIoU
from hf_segformer.evaluation.metrics import SegmentationMetrics, confusion_matrix
from hf_segformer.training.losses import SegmentationLoss
from hf_segformer.upsampling_segformer import upsample_cross_entropy
from tests.support.tiny import TINY


def test_three_hundred_classes_keep_their_values():
    mapping = LabelMapping(tuple(range(300)))
    labels = mapping.apply(np.array([[0, 257, 299, 255]]), "mask")
    assert labels.tolist() == [[0, 257, 299, 255]]
    assert (mapping.ignore_index, labels.dtype) == (-100, np.int32)


@pytest.mark.parametrize("num_labels", [255, 256, 257, 70_000])
def test_every_class_is_itself_and_no_class_is_ignored(num_labels):
    mapping = LabelMapping(tuple(range(num_labels)))
    values = np.arange(num_labels)[None]
    assert np.array_equal(mapping.apply(values, "mask"), values)
    ignored = mapping.apply(np.array([[mapping.ignore_index]]), "mask")
    assert ignored.tolist() == [[default_ignore_index(num_labels)]]
    assert not 0 <= default_ignore_index(num_labels) < num_labels


def test_values_and_ignored_values_are_any_integers():
    mapping = LabelMapping((-1, 0, 1, 1000), (-7, 256), ignore_index=-5)
    labels = mapping.apply(np.array([[-1, 0, 1, 1000, -7, 256, 255, -5]], np.int64), "mask")
    assert labels.tolist() == [[0, 1, 2, 3, -5, -5, -5, -5]]
    for value in (2, 254, -2):
        with pytest.raises(ValueError, match=rf"mask holds {value}; expected the classes -1, 0, 1, 1000"):
            mapping.apply(np.array([[value]]), "mask")


def test_a_value_has_one_meaning():
    assert LabelMapping((0, 1), (1,)).apply(np.array([[0, 1]]), "mask").tolist() == [[0, 255]]
    with pytest.raises(ValueError, match="ignore_index is 1, a label of 2 classes"):
        LabelMapping((0, 1), ignore_index=1)
    with pytest.raises(ValueError, match=r"label_values is \[3, 3\]; expected a value of its own"):
        class_values(2, False, [3, 3])


def test_booleans_and_bytes_are_mapped_alike():
    mapping = LabelMapping((0, 1))
    mask = np.array([[True, False]])
    assert mapping.apply(mask, "mask").tolist() == mapping.apply(mask.astype(np.uint8), "mask").tolist() == [[1, 0]]


@pytest.mark.parametrize("num_labels", [256, 300])
def test_class_255_is_trained_and_scored(num_labels):
    torch.manual_seed(0)
    logits = torch.randn(1, num_labels, 8, 8)
    labels = torch.full((1, 32, 32), 255)
    expected = torch.nn.functional.cross_entropy(
        torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear"), labels
    )
    assert upsample_cross_entropy(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    assert SegmentationLoss()(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    assert SegmentationLoss(dice=1.0, cross_entropy=0.0)(logits, labels) > 0.5
    assert upsample_cross_entropy(logits, torch.full((1, 32, 32), -100)) == 0
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=num_labels)).eval()
    assert model(torch.zeros(1, 3, 64, 64), labels=torch.full((1, 64, 64), 255)).loss > 1
    assert confusion_matrix(labels, labels, num_labels)[255, 255] == 1024
    assert confusion_matrix(labels, torch.full((1, 32, 32), -100), num_labels).sum() == 0
    metric = MeanIoU(num_labels)
    metric.add_batch(predictions=labels, references=labels)
    assert metric.compute()["overall_accuracy"] == 1
    metrics = SegmentationMetrics([str(index) for index in range(num_labels)])
    assert metrics(EvalPrediction(labels, labels), compute_result=True)["iou_255"] == 1


def test_a_right_model_of_300_classes_scores_one():
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=300)).eval()
    with torch.no_grad():
        model.decode_head.classifier.bias[255] = 1e4
    labels = np.full((64, 64), 255, np.int32)
    labels[:8] = -100
    rows = [{"image": Image.new("RGB", (64, 64)), "label": labels}]
    result = evaluate(model, SegFormerImageProcessor(size=64), rows, progress=False)
    assert result.metrics["overall_accuracy"] == 1
    assert result.matrix.sum() == 64 * 56
    assert EvalDataset(rows, SegFormerImageProcessor(size=64, ignore_index=-100))[0]["labels"].unique().tolist() == [
        -100,
        255,
    ]


def test_uncertain_pixels_of_many_classes_become_no_class():
    logits = torch.zeros(1, 300, 4, 4)
    logits[0, 255, 0, 0] = 50
    [labels] = SegFormerImageProcessor().post_process_semantic_segmentation({"logits": logits}, threshold=0.9)
    assert labels[0, 0] == 255
    assert (labels.flatten()[1:] == -100).all()
    few = torch.zeros(1, 5, 4, 4)
    [labels] = SegFormerImageProcessor().post_process_semantic_segmentation({"logits": few}, threshold=0.9)
    assert (labels == 255).all()


def test_reduced_labels_of_many_classes():
    mask = np.array([[0, 1, 255, 256, 300]] * 5, np.int32)
    image = np.zeros((5, 5, 3), np.uint8)
    keywords = {"do_resize": False, "do_reduce_labels": True}
    labels = SegFormerImageProcessor(**keywords, ignore_index=-100)(image, mask)["labels"][0]
    assert labels[0].tolist() == [-100, 0, 254, 255, 299]
    labels = SegFormerImageProcessor(**keywords)(image, mask)["labels"][0]
    assert labels[0].tolist() == [255, 0, 255, 255, 299]


@pytest.mark.parametrize(("num_labels", "index"), [(256, 255), (300, 255), (5, 0), (1, 1), (2, 1)])
def test_a_configuration_may_not_ignore_a_class(num_labels, index):
    with pytest.raises(ValueError, match=f"semantic_loss_ignore_index is {index}, one of the classes 0 to"):
        SegFormerConfig(num_labels=num_labels, semantic_loss_ignore_index=index)


def test_the_ignore_index_of_a_file_follows_the_classes_or_is_given_with_them(tmp_path):
    SegFormerConfig(num_labels=150).save_pretrained(tmp_path)
    names = [str(index) for index in range(300)]
    with pytest.raises(ValueError, match="semantic_loss_ignore_index=-100"):
        SegFormerConfig.from_pretrained(tmp_path, id2label=names, semantic_loss_ignore_index=255)
    config = SegFormerConfig.from_pretrained(tmp_path, id2label=names)
    assert (config.num_labels, config.semantic_loss_ignore_index, config.label2id["299"]) == (300, -100, 299)
