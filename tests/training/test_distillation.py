"""Distillation: the loss by a loop over pixels, what a teacher sees, whose classes fit, and what a run records."""

import json
import math

import pytest
import torch
from PIL import Image

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.config import DistillationConfig
from hf_segformer.conversion.loading import load_segmentation
from hf_segformer.training.distillation import distillation_loss, load_teacher
from tests.support.distributed import NAMES, tiny_trainer
from tests.support.training import error_of, train


def slow_loss(logits, teacher_logits, temperature, is_counted):
    """T^2 times the mean Kullback-Leibler divergence, pixel by pixel."""
    losses = []
    for image in range(logits.shape[0]):
        for row in range(logits.shape[2]):
            for column in range(logits.shape[3]):
                if not is_counted[image, row, column]:
                    continue
                shares = []
                for each in (teacher_logits, logits):
                    values = [value / temperature for value in each[image, :, row, column].tolist()]
                    odds = [math.exp(value) for value in ([0.0, *values] if len(values) == 1 else values)]
                    shares.append([value / sum(odds) for value in odds])
                losses.append(sum(p * math.log(p / q) for p, q in zip(*shares, strict=True)))
    return temperature**2 * sum(losses) / len(losses)


def save_teacher(folder, config, names, **processor):
    """A random model with class names, and its processor."""
    torch.manual_seed(5)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    SegFormerForSemanticSegmentation(config(num_labels=len(names), **labels)).save_pretrained(folder)
    SegFormerImageProcessor(do_resize=False, **processor).save_pretrained(folder)
    return folder


@pytest.fixture
def teacher_folder(tmp_path, tiny_config):
    return save_teacher(tmp_path / "teacher", lambda **fields: tiny_config(**fields), NAMES)


@pytest.mark.parametrize("num_logits", [1, 4])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_what_its_definition_says(num_logits, temperature):
    logits, teacher = torch.randn(2, 2, num_logits, 3, 5, dtype=torch.float64)
    is_counted = torch.rand(2, 3, 5) > 0.3
    loss = distillation_loss(logits, teacher, temperature, is_counted)
    assert loss.item() == pytest.approx(slow_loss(logits, teacher, temperature, is_counted), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda values: distillation_loss(values, teacher, temperature, is_counted), logits.requires_grad_()
    )
    half = distillation_loss(logits.detach().bfloat16(), teacher.bfloat16(), temperature, is_counted)
    assert half.dtype == torch.float32


def test_where_no_pixel_counts_loss_and_gradient_are_zero():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = distillation_loss(logits, torch.randn(1, 3, 2, 2), 1.0, torch.zeros(1, 2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_a_teacher_sees_the_image_as_its_own_processor_prepares_it(tmp_path, tiny_config):
    """With means of its own and without them, in the order of its own classes."""
    names = ("boat", "road", "car")
    image = Image.fromarray(torch.randint(256, (40, 56, 3), dtype=torch.uint8).numpy())
    student = SegFormerImageProcessor(do_resize=False)
    for number, own in enumerate(({"image_mean": [0.1, 0.5, 0.9], "image_std": [0.2] * 3}, {"do_normalize": False})):
        folder = save_teacher(tmp_path / str(number), lambda **fields: tiny_config(**fields), names, **own)
        teacher = load_teacher(DistillationConfig(str(folder)), NAMES, student)
        model, processor = load_segmentation(folder)
        with torch.no_grad():
            expected = model(**processor(image, return_tensors="pt")).logits[:, [1, 2, 0]]
        found = teacher.logits(student(image, return_tensors="pt")["pixel_values"])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not found.requires_grad
        assert not teacher.model.training


def test_a_step_adds_the_weighted_loss_on_the_same_input(teacher_folder, tmp_path):
    config = DistillationConfig(str(teacher_folder), weight=0.5, temperature=2.0)
    teacher = load_teacher(config, NAMES, SegFormerImageProcessor(do_resize=False))
    trainer = tiny_trainer(tmp_path / "run", False, options={"teacher": teacher}, save_strategy="no", max_steps=1)
    [batch] = [next(iter(trainer.get_train_dataloader()))]
    batch["labels"][:, :8, :8] = 255  # four positions of the logits, which are ignored from now on
    own = trainer.model.train()(**batch)
    is_counted = (batch["labels"].unfold(1, 4, 4).unfold(2, 4, 4) != 255).flatten(3).any(-1)
    assert 0 < is_counted.float().mean() < 1
    wanted = own.loss.item() + 0.5 * slow_loss(own.logits, teacher.logits(batch["pixel_values"]), 2.0, is_counted)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(wanted, rel=1e-5)
    # Evaluation measures the model's own loss.
    evaluated = trainer.compute_loss(trainer.model.eval(), dict(batch)).item()
    assert evaluated == pytest.approx(trainer.model(**batch).loss.item(), rel=1e-6)
    trainer.train()
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_a_record_names_a_teacher_of_the_hub_and_no_folder(teacher_folder, monkeypatch):
    """A relative path may look as a repository does."""
    monkeypatch.chdir(teacher_folder.parent.parent)
    local = "/".join(teacher_folder.parts[-2:])
    teacher = load_teacher(DistillationConfig(local), NAMES, SegFormerImageProcessor(do_resize=False))
    assert teacher.describe()["name"] is None
    teacher.source = "owner/name"
    assert teacher.describe()["name"] == "owner/name"


@pytest.mark.slow
def test_a_student_comes_closer_to_its_teacher(teacher_folder, tmp_path):
    def distance(teacher):
        options = {"teacher": teacher} if teacher else {}
        trainer = tiny_trainer(tmp_path / "run", False, options=options, save_strategy="no")
        trainer.train()
        batch = next(iter(trainer.get_train_dataloader()))
        counted = torch.ones(len(batch["labels"]), 8, 8, dtype=torch.bool)
        logits = trainer.model.eval()(batch["pixel_values"]).logits
        return distillation_loss(logits, reference.logits(batch["pixel_values"]), 1.0, counted).item()

    processor = SegFormerImageProcessor(do_resize=False)
    reference = load_teacher(DistillationConfig(str(teacher_folder)), NAMES, processor)
    assert distance(load_teacher(DistillationConfig(str(teacher_folder), 20.0), NAMES, processor)) < distance(None)


@pytest.mark.parametrize(
    ("names", "processor", "message"),
    [
        (("road", "car"), {}, "has the classes road, car, boat; expected those of the data: road, car"),
        (("road", "car", "ship"), {}, "has the classes road, car, boat; expected those of the data: road, car, ship"),
        (NAMES, {"value_range": [0, 4095]}, r"value range None; expected 3 and \[0.*4095.*\], as the data have"),
    ],
)
def test_a_teacher_of_something_else_is_refused(teacher_folder, names, processor, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(DistillationConfig(str(teacher_folder)), names, SegFormerImageProcessor(**processor))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": "x", "weight": 0}, "distill.weight is 0; expected a positive number"),
        ({"teacher": "x", "temperature": math.inf}, "distill.temperature is inf"),
        ({"weight": 2.0}, "distill.weight is set, but distill.teacher is not"),
    ],
)
def test_impossible_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**values)


def test_a_recipe_records_its_teacher_and_resumes_with_it_alone(trained_run, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["trainer.max_steps=2", "trainer.save_steps=1"]
    assert train(folder, *arguments, f"distill.teacher={trained_run}", "distill.temperature=2") == 0
    record = json.loads((folder / "training.json").read_text())
    assert record["teacher"].keys() == {"parameters", "digest"}  # nobody else's folder
    assert str(trained_run) not in json.dumps(record)
    assert record["recipe"]["distill"] == {"temperature": 2}
    assert (
        f"Its teacher was a model of {record['teacher']['parameters']:,} parameters"
        in (folder / "README.md").read_text()
    )
    assert record["teacher"]["digest"] in (folder / "README.md").read_text()
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    error = error_of(capsys, folder, *arguments, "--resume")
    assert f"was trained with the teacher {record['teacher']['digest']}, but the run has no teacher" in error


def test_a_teacher_of_other_classes_is_refused_before_anything_is_archived(
    trained_run, teacher_folder, tmp_path, capsys
):
    error = error_of(capsys, tmp_path / "run", f"distill.teacher={teacher_folder}")
    assert "has the classes road, car, boat; expected those of the data: ground, disc, " in error
    assert error_of(capsys, tmp_path / "run", "distill.teacher=./nowhere").endswith(
        "distill.teacher is ./nowhere, which does not exist; expected a folder or a Hub repository"
    )
