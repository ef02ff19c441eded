"""Losses: each term against sums over pixels in plain Python, and how a model lives with another loss."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from hf_segformer import SegFormerForSemanticSegmentation
from hf_segformer.config import LOSS_TERMS
from hf_segformer.conversion.loading import digest_of_weights, load_segmentation
from hf_segformer.conversion.to_transformers import to_transformers
from hf_segformer.export.exportable import require_plain
from hf_segformer.training.losses import SegmentationLoss, class_weights
from hf_segformer.training.trainer import SegFormerTrainer
from hf_segformer.upsampling_segformer import upsample, upsample_cross_entropy

pytestmark = pytest.mark.usefixtures("small_sizes")
WEIGHTS = {1: [0.5, 2.0], 4: [0.5, 2.0, 1.0, 3.0]}


def batch(num_logits, dtype=torch.float32):
    """Logits and labels whose last class never occurs (except with one logit), some pixels ignored."""
    logits = torch.randn(2, num_logits, 3, 5, dtype=dtype)
    labels = torch.randint(0, max(num_logits - 1, 2), (2, 6, 10))
    labels[0, :2, 3:] = 255
    return logits, labels


def pixels_of(logits, labels):
    """Probabilities of all classes and the label of each valid pixel."""
    logits = upsample(logits.double(), labels.shape[-2:])
    pixels = []
    for image in range(labels.shape[0]):
        for row in range(labels.shape[1]):
            for column in range(labels.shape[2]):
                label = labels[image, row, column].item()
                if label != 255:
                    values = logits[image, :, row, column].tolist()
                    odds = [math.exp(value) for value in ([0.0, *values] if len(values) == 1 else values)]
                    pixels.append(([value / sum(odds) for value in odds], label))
    return pixels


def weighted_mean(losses, weights):
    return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


def cross_entropy(pixels, weights, smoothing=0.0):
    total = 0.0
    for probabilities, label in pixels:
        for index, probability in enumerate(probabilities):
            target = (1 - smoothing) * (index == label) + smoothing / len(probabilities)
            total -= target * weights[index] * math.log(probability)
    return total / sum(weights[label] for _, label in pixels)


def ohem(pixels, weights, threshold, num_kept):
    right = sorted(probabilities[label] for probabilities, label in pixels)
    last = right[num_kept - 1] if num_kept else 0.0
    hard = [(values[label], label) for values, label in pixels if values[label] < threshold or values[label] <= last]
    return weighted_mean([-math.log(value) for value, _ in hard], [weights[label] for _, label in hard])


def focal(pixels, weights, gamma):
    losses = [-((1 - values[label]) ** gamma) * math.log(values[label]) for values, label in pixels]
    return weighted_mean(losses, [weights[label] for _, label in pixels])


def dice(pixels, classes):
    losses = []
    for index in classes:
        true = sum(label == index for _, label in pixels)
        if true:
            overlap = sum(values[index] for values, label in pixels if label == index)
            losses.append(1 - 2 * overlap / (sum(values[index] for values, _ in pixels) + true))
    return sum(losses) / len(losses)


def tversky(pixels, classes, alpha, beta, gamma):
    losses = []
    for index in classes:
        true = sum(values[index] for values, label in pixels if label == index)
        wrong = sum(values[index] for values, label in pixels if label != index)
        missed = sum(1 - values[index] for values, label in pixels if label == index)
        if any(label == index for _, label in pixels):
            losses.append((1 - true / (true + alpha * wrong + beta * missed)) ** gamma)
    return sum(losses) / len(losses)


def jaccard_loss(mistaken, truth):
    """1 - IoU of a prediction that is wrong at these pixels, both sets of pixels."""
    union = truth | mistaken
    return len(mistaken) / len(union) if union else 0.0


def lovasz_extension(errors, truth):
    """By its definition: errors in falling order times what each pixel adds to the loss of those before it."""
    total, mistaken = 0.0, set()
    for pixel in sorted(range(len(errors)), key=lambda each: -errors[each]):
        before = jaccard_loss(mistaken, truth)
        mistaken = mistaken | {pixel}
        total += max(errors[pixel], 0.0) * (jaccard_loss(mistaken, truth) - before)
    return total


def lovasz_softmax(pixels, classes):
    losses = []
    for index in classes:
        truth = {pixel for pixel, (_, label) in enumerate(pixels) if label == index}
        if truth:
            errors = [abs((label == index) - values[index]) for values, label in pixels]
            losses.append(lovasz_extension(errors, truth))
    return sum(losses) / len(losses)


def lovasz_hinge(pixels):
    logits = [math.log(values[1] / values[0]) for values, _ in pixels]
    errors = [1 - logit * (2 * label - 1) for logit, (_, label) in zip(logits, pixels, strict=True)]
    return lovasz_extension(errors, {pixel for pixel, (_, label) in enumerate(pixels) if label})


@pytest.mark.parametrize("num_logits", [1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_what_its_definition_says(num_logits, smoothing, weighted):
    logits, labels = batch(num_logits)
    weights = WEIGHTS[num_logits] if weighted else None
    loss = SegmentationLoss(class_weights=weights, label_smoothing=smoothing)
    wanted = cross_entropy(pixels_of(logits, labels), weights or [1.0] * max(num_logits, 2), smoothing)
    assert loss(logits, labels).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("num_logits", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_what_its_definition_says(num_logits, weighted, gamma):
    logits, labels = batch(num_logits)
    weights = WEIGHTS[num_logits] if weighted else None
    loss = SegmentationLoss(cross_entropy=0, focal=1, focal_gamma=gamma, class_weights=weights)
    wanted = focal(pixels_of(logits, labels), weights or [1.0] * max(num_logits, 2), gamma)
    assert loss(logits, labels).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("num_logits", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("threshold", "min_kept"), [(0.4, 0), (0.0, 7), (0.2, 20), (0.4, 2), (0.7, 100_000)])
def test_ohem_keeps_the_hard_pixels_and_at_least_so_many(num_logits, weighted, threshold, min_kept):
    logits, labels = batch(num_logits)
    weights = WEIGHTS[num_logits] if weighted else None
    loss = SegmentationLoss(
        cross_entropy=0, ohem=1, ohem_threshold=threshold, ohem_min_kept=min_kept, class_weights=weights
    )
    pixels = pixels_of(logits, labels)
    num_kept = min(min_kept * len(labels), len(pixels))
    wanted = ohem(pixels, weights or [1.0] * max(num_logits, 2), threshold, num_kept)
    assert loss(logits, labels).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("num_logits", [1, 4])
def test_dice_is_a_mean_over_the_classes_of_the_batch(num_logits):
    logits, labels = batch(num_logits)
    wanted = dice(pixels_of(logits, labels), [1] if num_logits == 1 else range(num_logits))
    # Class weights are not for Dice.
    loss = SegmentationLoss(cross_entropy=0, dice=1, class_weights=WEIGHTS[num_logits])
    assert loss(logits, labels).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("num_logits", [1, 4])
@pytest.mark.parametrize(("alpha", "beta", "gamma"), [(0.3, 0.7, 1.0), (0.5, 0.5, 0.75), (0.0, 2.0, 2.0)])
def test_tversky_is_what_its_definition_says(num_logits, alpha, beta, gamma):
    logits, labels = batch(num_logits)
    classes = [1] if num_logits == 1 else range(num_logits)
    keywords = {"tversky_alpha": alpha, "tversky_beta": beta, "tversky_gamma": gamma}
    loss = SegmentationLoss(cross_entropy=0, tversky=1, class_weights=WEIGHTS[num_logits], **keywords)
    wanted = tversky(pixels_of(logits, labels), classes, alpha, beta, gamma)
    assert loss(logits, labels).item() == pytest.approx(wanted, rel=1e-5)


def test_tversky_with_equal_halves_is_dice():
    logits, labels = batch(4, torch.float64)
    halves = SegmentationLoss(cross_entropy=0, tversky=1, tversky_alpha=0.5, tversky_beta=0.5)(logits, labels)
    assert halves.item() == pytest.approx(SegmentationLoss(cross_entropy=0, dice=1)(logits, labels).item(), rel=1e-12)


@pytest.mark.parametrize("num_logits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lovasz_softmax_is_the_extension_of_iou_by_its_definition(num_logits, dtype):
    logits, labels = batch(num_logits, dtype)
    loss = SegmentationLoss(cross_entropy=0, lovasz=1, class_weights=WEIGHTS.get(num_logits))
    wanted = lovasz_softmax(pixels_of(logits, labels), range(num_logits))
    assert loss(logits, labels).item() == pytest.approx(wanted, rel=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("foreground", [True, False])
def test_lovasz_hinge_is_the_extension_of_iou_by_its_definition(foreground):
    """Without foreground it is the largest error: one such pixel makes IoU 0."""
    logits, labels = batch(1)
    if not foreground:
        labels = labels.where(labels == 255, 0)
    loss = SegmentationLoss(cross_entropy=0, lovasz=1)(logits, labels)
    pixels = pixels_of(logits, labels)
    assert loss.item() == pytest.approx(lovasz_hinge(pixels), rel=1e-5)
    if not foreground:
        largest = max(1 + math.log(values[1] / values[0]) for values, _ in pixels)
        assert loss.item() == pytest.approx(largest, rel=1e-5)


def test_lovasz_of_certain_predictions_is_one_minus_iou():
    labels = torch.randint(0, 3, (2, 6, 10))
    predictions = torch.randint(0, 3, (2, 6, 10))
    logits = 1e3 * torch.nn.functional.one_hot(predictions, 3).permute(0, 3, 1, 2).double()
    both = [((labels == each) & (predictions == each)).sum() for each in range(3)]
    any_of = [((labels == each) | (predictions == each)).sum() for each in range(3)]
    wanted = sum(1 - part / whole for part, whole in zip(both, any_of, strict=True)) / 3
    assert SegmentationLoss(cross_entropy=0, lovasz=1)(logits, labels).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_lovasz_of_millions_of_pixels_keeps_the_weight_of_each():
    """Differences of neighbouring values of 1 - IoU in float32 would have no right digit left."""
    labels = torch.zeros(1, 1024, 2048, dtype=torch.uint8)
    labels[:, :512] = 1
    logits = torch.full((1, 1, 1024, 2048), -0.5, requires_grad=True)
    SegmentationLoss(cross_entropy=0, lovasz=1)(logits, labels).backward()
    # Errors 1.5 of the 2^20 true pixels come first, each with 1 / union, then 0.5 of the others, with nothing to lose.
    assert torch.allclose(logits.grad[0, 0, :512], torch.tensor(-(2.0**-20)), rtol=1e-6, atol=0)
    assert not logits.grad[0, 0, 512:].any()


@pytest.mark.parametrize("term", ["dice", "tversky"])
def test_overlap_with_a_mask_without_foreground_is_nothing(term):
    logits = torch.randn(2, 1, 3, 5, requires_grad=True)
    value = SegmentationLoss(**{"cross_entropy": 0, term: 1})(logits, torch.zeros(2, 6, 10, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert not logits.grad.any()


def test_dice_of_millions_of_pixels_loses_none():
    # One running sum in float32 rounds each of them to quarters from 2^21 on.
    logits, labels = torch.full((1, 1, 2, 3), 0.3), torch.ones(1, 2048, 2304, dtype=torch.uint8)
    probability = 1 / (1 + math.exp(-0.3))
    loss = SegmentationLoss(cross_entropy=0, dice=1)(logits, labels)
    assert loss.item() == pytest.approx(1 - 2 * probability / (probability + 1), rel=1e-4)


@pytest.mark.parametrize("num_logits", [1, 4])
def test_terms_are_summed_by_their_weights(num_logits):
    logits, labels = batch(num_logits)
    parts = {"cross_entropy": 0.5, "ohem": 2.0, "dice": 3.0, "focal": 0.25, "lovasz": 0.75, "tversky": 1.5}
    none = dict.fromkeys(parts, 0.0)
    wanted = sum(
        share * SegmentationLoss(**{**none, name: 1.0}, ohem_min_kept=3)(logits, labels)
        for name, share in parts.items()
    )
    assert SegmentationLoss(**parts, ohem_min_kept=3)(logits, labels).item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("num_logits", [1, 4])
def test_the_default_is_the_models_own_loss_to_the_last_bit(num_logits):
    logits, labels = batch(num_logits)
    assert torch.equal(SegmentationLoss()(logits, labels), upsample_cross_entropy(logits, labels))
    # What no term uses changes nothing but the way it is computed.
    assert SegmentationLoss(focal_gamma=1.0)(logits, labels).item() == pytest.approx(
        upsample_cross_entropy(logits, labels).item(), rel=1e-6
    )


ALL = {**dict.fromkeys(LOSS_TERMS, 1.0), "label_smoothing": 0.1, "ohem_min_kept": 5, "tversky_gamma": 0.75}


@pytest.mark.parametrize("num_logits", [1, 4])
def test_the_gradient_of_the_sum_is_that_of_its_value(num_logits):
    logits, labels = batch(num_logits, torch.float64)
    loss = SegmentationLoss(**ALL, class_weights=WEIGHTS[num_logits])
    assert torch.autograd.gradcheck(lambda values: loss(values, labels), logits.requires_grad_())


@pytest.mark.parametrize("num_logits", [1, 4])
@pytest.mark.parametrize("keywords", [{"cross_entropy": 1.0}, ALL], ids=["default", "all"])
def test_where_no_pixel_counts_loss_and_gradient_are_zero(num_logits, keywords):
    logits, labels = batch(num_logits)
    logits.requires_grad_()
    loss = SegmentationLoss(**keywords)(logits, torch.full_like(labels, 255))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_a_batch_of_classes_without_weight_is_no_division_by_zero():
    logits, labels = batch(4)
    loss = SegmentationLoss(ohem=1, focal=1, class_weights=[0.0, 0.0, 0.0, 1.0])
    assert loss(logits, labels).item() == 0


@pytest.mark.parametrize("num_logits", [1, 4])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients_of_certain_pixels_are_finite(num_logits, gamma):
    logits, labels = batch(num_logits)
    logits = (logits * 1e4).requires_grad_()
    loss = SegmentationLoss(**ALL, focal_gamma=gamma)(logits, labels)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("num_logits", [1, 4])
def test_half_precision_logits_are_summed_in_float32(num_logits):
    logits, labels = batch(num_logits)
    logits = logits.bfloat16()
    loss = SegmentationLoss(**ALL, class_weights=WEIGHTS[num_logits])
    wanted = loss(logits.float(), labels)
    assert torch.equal(loss(logits, labels), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(logits.float(), labels), wanted)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dice": -1}, "loss.dice is -1; expected a finite number of at least 0"),
        ({"focal": math.nan}, "loss.focal is nan"),
        ({"ohem": math.inf}, "loss.ohem is inf"),
        ({"cross_entropy": 0}, "loss has no term: give one of cross_entropy, .*, tversky a positive weight"),
        ({"tversky": 1, "tversky_alpha": -1}, "loss.tversky_alpha is -1; expected a finite number of at least 0"),
        (
            {"tversky_alpha": 0, "tversky_beta": 0},
            "loss.tversky_alpha and loss.tversky_beta are 0; expected a positive",
        ),
        ({"tversky_gamma": 0}, "loss.tversky_gamma is 0; expected a positive number"),
        ({"focal_gamma": -0.5}, "loss.focal_gamma is -0.5"),
        ({"ohem_min_kept": -1}, "loss.ohem_min_kept is -1"),
        ({"ohem_threshold": 1.5}, "loss.ohem_threshold is 1.5; expected a number from 0 to 1"),
        ({"label_smoothing": 1.5}, "loss.label_smoothing is 1.5; expected a number from 0 to 1"),
        ({"label_smoothing": math.nan}, "loss.label_smoothing is nan"),
        ({"class_weights": []}, r"loss.class_weights is \[\]"),
        ({"class_weights": [0.0, 0.0]}, "not all 0"),
        ({"class_weights": [1.0, -1.0]}, "expected finite numbers of at least 0"),
        ({"class_weights": [1.0, math.nan]}, "finite"),
        ({"class_weights": "logarithm"}, "loss.class_weights is 'logarithm'; expected .*: did you mean 'log'"),
        ({"class_weights": "median"}, "did you mean 'median_frequency'"),
    ],
)
def test_wrong_values_are_named(keywords, message):
    with pytest.raises(ValueError, match=message) as caught:
        SegmentationLoss(**keywords)
    assert "\n" not in str(caught.value)


def test_class_weights_must_be_numbers_one_for_each_class():
    logits, labels = batch(4)
    with pytest.raises(ValueError, match=r"loss\.class_weights has 3 numbers; expected 4"):
        SegmentationLoss(class_weights=[1.0, 2.0, 3.0])(logits, labels)
    with pytest.raises(ValueError, match=r"loss.class_weights is 'log'; expected numbers, which hf_segformer"):
        SegmentationLoss(class_weights="log")(logits, labels)


def test_labels_are_looked_at_for_every_term():
    with pytest.raises(ValueError, match="labels hold 4; expected classes 0 to 3, or 255"):
        SegmentationLoss(dice=1)(torch.zeros(1, 4, 2, 3), torch.full((1, 8, 12), 4))


@pytest.mark.parametrize(
    ("scheme", "weight"),
    [
        # Shares are 0.6, 0.3 and 0.1; the median of those is 0.3.
        ("median_frequency", lambda share: 0.3 / share),
        ("log", lambda share: 1 / math.log(1.02 + share)),
        ("inverse_sqrt", lambda share: 1 / math.sqrt(share)),
    ],
)
def test_class_weights_are_those_of_the_scheme_with_a_mean_of_one(scheme, weight):
    counts = [600, 0, 300, 100]
    weights = class_weights(counts, scheme)
    assert weights[1] == 0
    assert weights[2] / weights[0] == pytest.approx(weight(0.3) / weight(0.6))
    assert weights[3] / weights[0] == pytest.approx(weight(0.1) / weight(0.6))
    assert sum(count * weight for count, weight in zip(counts, weights, strict=True)) == pytest.approx(1000)
    assert class_weights(torch.tensor(counts), scheme) == weights
    assert all(type(weight) is float for weight in class_weights(torch.tensor(counts), scheme))


def test_wrong_schemes_and_counts_are_refused():
    with pytest.raises(ValueError, match=r"loss\.class_weights is 'inverse'; expected .*: did you mean 'inverse_sqrt'"):
        class_weights([1, 2], "inverse")
    with pytest.raises(ValueError, match="all pixel counts are 0"):
        class_weights([0, 0], "log")


# The model with another loss.


@pytest.fixture
def labels():
    return torch.randint(0, 5, (2, 40, 72))


def test_a_model_trains_by_the_loss_that_it_is_given(model, images, labels):
    model.loss_function = SegmentationLoss(dice=1.0, ohem=0.5, class_weights=[1.0, 2.0, 3.0, 1.0, 1.0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    values = []
    for _ in range(5):
        output = model(images, labels=labels)
        assert torch.equal(output.loss, model.loss_function(output.logits, labels, ignore_index=255))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(output.loss.item())
    assert values[-1] < values[0]


def test_a_models_ignore_index_goes_to_its_loss(tiny_config, images, labels):
    model = SegFormerForSemanticSegmentation(tiny_config(semantic_loss_ignore_index=7)).eval()
    model.loss_function = SegmentationLoss(dice=1.0)
    assert model(images, labels=torch.full_like(labels, 7)).loss.item() == 0


def test_a_model_that_was_given_none_has_its_own(model, images, labels, tmp_path):
    output = model(images, labels=labels)
    assert torch.equal(output.loss, upsample_cross_entropy(output.logits, labels))
    model.loss_function = SegmentationLoss(dice=1.0)
    model.save_pretrained(tmp_path)
    loaded = SegFormerForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded.loss_function is upsample_cross_entropy
    # Not to the bit: the order of oneDNN's sums depends on the weights' addresses.
    torch.testing.assert_close(loaded(images, labels=labels).loss, output.loss, rtol=2e-6, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_keeps_the_loss(model, images, labels, duplicate):
    model.loss_function = SegmentationLoss(dice=1.0)
    assert duplicate(model).loss_function == model.loss_function
    assert torch.equal(duplicate(model)(images, labels=labels).loss, model(images, labels=labels).loss)


def test_a_loss_may_be_a_module(model, images, labels):
    class Largest(torch.nn.Module):
        def forward(self, logits, labels, ignore_index):
            return logits.max()

    model.loss_function = Largest()
    output = model(images, labels=labels)
    assert torch.equal(output.loss, output.logits.max())


def test_a_loss_is_replaced_by_any_other_and_none_restores_the_models_own(model):
    module, function = torch.nn.Identity(), SegmentationLoss(dice=1.0)
    for first, second in itertools.permutations((module, function, None), 2):
        for loss in (first, second):
            model.loss_function = loss
            assert model.loss_function is (upsample_cross_entropy if loss is None else loss)


class Weighted(torch.nn.Module):
    """Cross entropy with class weights and a factor that is trained."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weights", torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0]))
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, logits, labels, ignore_index):
        loss = upsample_cross_entropy(logits, labels, ignore_index=ignore_index, weight=self.weights)
        return loss * self.factor.exp() - self.factor


def test_tensors_of_a_loss_move_with_the_model_and_are_no_part_of_it(model, tmp_path):
    digest = digest_of_weights(model)
    model.loss_function = Weighted()
    assert "loss_function.factor" in dict(model.named_parameters())
    assert digest_of_weights(model) == digest
    model.save_pretrained(tmp_path / "saved")
    assert not [name for name in load_file(tmp_path / "saved/model.safetensors") if "loss" in name]
    assert load_segmentation(tmp_path / "saved")[0].loss_function is upsample_cross_entropy
    to_transformers(model, tmp_path / "theirs")
    assert not [name for name in load_file(tmp_path / "theirs/model.safetensors") if "loss" in name]
    require_plain(model)


def test_a_resumed_run_restores_the_tensors_of_its_loss(tiny_config, images, labels, tmp_path):
    samples = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]

    def trained(resume):
        """The loss after two steps, or of a run that was over at its checkpoint."""
        model = SegFormerForSemanticSegmentation(tiny_config())
        model.loss_function = Weighted()
        options = {"max_steps": 2, "save_steps": 2, "learning_rate": 0.1, "use_cpu": True, "report_to": "none"}
        run = SegFormerTrainer(model, TrainingArguments(tmp_path, **options), train_dataset=samples)
        run.train(resume_from_checkpoint=resume)
        return model.loss_function.state_dict()

    unbroken = trained(None)
    assert unbroken["factor"] != Weighted().factor
    resumed = trained(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


@pytest.mark.parametrize("keywords", [{}, ALL], ids=["default", "all"])
@pytest.mark.slow
def test_a_loss_compiles_with_the_model_into_one_graph(model, images, labels, keywords):
    model.loss_function = SegmentationLoss(**keywords)
    wanted = model(images, labels=labels).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images, labels=labels).loss
    torch.testing.assert_close(compiled, wanted)
