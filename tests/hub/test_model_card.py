"""Model card: measured numbers only, escaped names, and edits that are kept."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import TrainingArguments

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor, SegFormerModel
from hf_segformer.evaluation.accumulator import MetricAccumulator
from hf_segformer.evaluation.summary import summarize
from hf_segformer.hub.model_card import card_text, is_edited_text, write_card
from hf_segformer.training.plots import draw_curve
from hf_segformer.training.run_record import build_run_record, write_run_record
from hf_segformer.training.trainer import SegFormerTrainer
from tests.support.hub_cards import card_errors

NAMES = ["sky", "a|b_c", "<script>", "`x`", "never seen"]
METRICS = {
    "mean_iou": 0.70123,
    "mean_accuracy": 0.8,
    "overall_accuracy": 0.93,
    "classes": [
        {"name": name, "iou": iou, "accuracy": accuracy, "pixels": pixels}
        for name, iou, accuracy, pixels in zip(
            NAMES, [0.91, 0.6, 0.5, 0.0, None], [0.95, 0.7, 0.6, None, None], [1234567, 20, 30, 0, 0], strict=True
        )
    ],
    "dataset": {"title": "Street: #1\n- scenes", "split": "val", "images": 1010},
    "method": {"sliding_window": 0, "stride": 0, "flip": True, "scales": [1.0]},
    "seconds": 3.0,
}
TRAINING = {
    "recipe": {"model": {"variant": "b0"}, "loss": {"dice": 1.0}, "trainer": {"max_steps": 40}},
    "arguments": {"learning_rate": 1e-3},
    "steps": 9000,
    "epochs": 196.2,
    "hours": 1.73,
    "batch_size": 8,
    "hardware": "A processor, 2 threads",
    "processes": 2,
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
    "base_model": "someone/encoder",
    "license": "apache-2.0",
    "dataset": {"title": "Street: #1\n- scenes", "terms": "research only", "images": 367, "hub_id": "someone/street"},
    "curve": [{"step": 20, "loss": 2.0}, {"step": 40, "loss": 1.0, "eval_mean_iou": 0.3}],
}


@pytest.fixture
def folder(tiny_config, tmp_path):
    model = SegFormerForSemanticSegmentation(tiny_config(id2label=dict(enumerate(NAMES))))
    model.save_pretrained(tmp_path)
    SegFormerImageProcessor(size=64).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def measured(folder):
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    write_run_record(folder, TRAINING)
    return folder


def card_of(folder, **options):
    return ModelCard(write_card(folder, **options).read_text(encoding="utf-8"))


def test_a_bare_folder_gets_a_card_without_empty_fields(folder):
    card = card_of(folder)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation",
        "tags": ["hf_segformer", "segformer", "semantic-segmentation"],
    }
    headings = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == ["## Model description", "## Intended uses & limitations"]
    for word in ("None", "N/A", "nan", "{{", "![", "trained from", "size B"):
        assert word not in card.text


def test_parameters_are_those_of_the_model(folder, tiny_config):
    expected = SegFormerForSemanticSegmentation(tiny_config()).num_parameters()
    assert f"{expected:,} parameters in float32" in card_of(folder).text


def test_a_half_precision_copy_says_so(folder):
    SegFormerForSemanticSegmentation.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    assert "parameters in bfloat16" in card_of(folder).text


def test_metadata_are_the_measured_ones(measured):
    data = card_of(measured, repo_id="me/street").data
    assert data.base_model == "someone/encoder"
    assert data.datasets == ["someone/street"]
    assert data.license == "apache-2.0"
    assert data.model_name == "street"
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "mean_iou": 0.7012,
        "mean_accuracy": 0.8,
        "overall_accuracy": 0.93,
    }
    assert results["mean_iou"].dataset_type == "someone/street"
    assert results["mean_iou"].dataset_split == "val"


def test_a_folder_on_a_disk_is_no_hub_name(measured):
    training = TRAINING | {"base_model": "/data/encoder", "dataset": {"title": "x", "hub_id": "../x"}}
    write_run_record(measured, training)
    card = card_of(measured)
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert "/data" not in card.content


def test_names_of_users_break_neither_metadata_nor_tables(measured):
    card = card_of(measured)
    assert card.data.eval_results[0].dataset_name == METRICS["dataset"]["title"]
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert r"| a\|b\_c | 60.0 | 70.0 | 20 |" in rows
    assert r"| \<script\> | 50.0 | 60.0 | 30 |" in rows
    assert r"| \`x\` | 0.0 |  | 0 |" in rows
    assert r"Street: \#1 - scenes" in card.text
    assert not [line for line in card.text.splitlines() if line.startswith("- scenes")]


def test_names_are_no_templates(measured):
    """Text in Jinja's brackets is text: a template could reach Python's objects."""
    name = "{{ 7 * 7 }}{% include 'config.json' %}{{ ''.__class__ }}"
    classes = [row | {"name": name} for row in METRICS["classes"][:1]]
    metrics = METRICS | {"classes": classes, "dataset": {"title": name, "split": name, "images": 3}}
    (measured / "metrics.json").write_text(json.dumps(metrics))
    text = card_of(measured).text
    assert "{{ 7 \\* 7 }}" in text
    assert "49" not in "".join(line for line in text.splitlines() if line.startswith("| "))
    assert "<class" not in text


def test_a_class_that_is_nowhere_is_named_and_has_no_row(measured):
    text = card_of(measured).text
    assert "not part of the means: never seen." in text
    assert "| never seen |" not in text


def test_measurements_are_in_the_text(measured):
    text = card_of(measured).text
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "Model description",
        "Intended uses & limitations",
        "Training data",
        "Training procedure",
        "Evaluation results",
        "Environment",
    ]
    for words in (
        "| 70.1 % | 80.0 % | 93.0 % |",
        "1,234,567",
        "Measured on 1,010 images",
        "Predictions are made on whole images, averaged over horizontal flips (test-time augmentation).",
        "Training took 9,000 steps of 8 images, 196.2 epochs.",
        "dice = 1.0",
        "A processor, 2 threads",
        "Processes: 2",
        "1.7 hours",
        "research only",
        "torch 2.13.0",
        "![Loss and mean IoU over the training steps](curve.png)",
    ):
        assert words in text
    assert "prediction.png" not in text


REPORTED = METRICS | {
    "boundary_iou": 0.41,
    "boundary_f1": 0.5,
    "calibration_error": 0.0312,
    "intervals": {
        "level": 0.95,
        "resamples": 1000,
        "seed": 0,
        "unit": "images",
        "num_drawn": 1010,
        "mean_iou": [0.68, 0.7249],
        "mean_accuracy": None,
    },
    "classes": [
        METRICS["classes"][0] | {"boundary_iou": 0.5, "calibration_error": 0.01, "intervals": {"iou": [0.9, 0.921]}},
        METRICS["classes"][1] | {"boundary_iou": None, "calibration_error": 0.25, "intervals": {"iou": None}},
        METRICS["classes"][2] | {"boundary_iou": 0.125, "calibration_error": None, "intervals": {}},
        METRICS["classes"][4] | {"boundary_iou": None, "calibration_error": None, "intervals": {"iou": None}},
    ],
}
REPORTED_RESULTS = r"""
| Mean IoU | Mean accuracy | Pixel accuracy | Boundary IoU | Calibration error |
| ---: | ---: | ---: | ---: | ---: |
| 70.1 % (68.0 to 72.5) | 80.0 % | 93.0 % | 41.0 % | 3.1 % |

| Class | IoU, % | Accuracy, % | Boundary IoU, % | Calibration error, % | Pixels |
| --- | ---: | ---: | ---: | ---: | ---: |
| sky | 91.0 (90.0 to 92.1) | 95.0 | 50.0 | 1.0 | 1,234,567 |
| a\|b\_c | 60.0 | 70.0 |  | 25.0 | 20 |
| \<script\> | 50.0 | 60.0 | 12.5 |  | 30 |

In brackets: 95 % confidence intervals by a bootstrap over 1,010 images. They show how the scores vary with the choice of images, not how they fall on images of another kind, and not how training varies with its seed.

Neither annotated nor predicted in these images, and therefore not part of the means: never seen.
"""  # noqa: E501 (a paragraph of the card is one line)
RESULTS = r"""
| Mean IoU | Mean accuracy | Pixel accuracy |
| ---: | ---: | ---: |
| 70.1 % | 80.0 % | 93.0 % |

| Class | IoU, % | Accuracy, % | Pixels |
| --- | ---: | ---: | ---: |
| sky | 91.0 | 95.0 | 1,234,567 |
| a\|b\_c | 60.0 | 70.0 | 20 |
| \<script\> | 50.0 | 60.0 | 30 |
| \`x\` | 0.0 |  | 0 |

Neither annotated nor predicted in these images, and therefore not part of the means: never seen.
"""


@pytest.mark.parametrize(("metrics", "expected"), [(METRICS, RESULTS), (REPORTED, REPORTED_RESULTS)])
def test_results_are_those_of_metrics_json(metrics, expected, measured):
    (measured / "metrics.json").write_text(json.dumps(metrics))
    text = card_of(measured).text
    start = text.index("\n| Mean IoU")
    assert text[start : start + len(expected)] == expected


def test_the_results_of_a_real_evaluation_are_shown(measured):
    """The fields' names are those that `summarize` writes."""
    accumulator = MetricAccumulator(2, ignore_index=255)
    generator = torch.Generator().manual_seed(0)
    for index in range(4):
        probabilities = torch.rand(2, 20, 31, generator=generator).softmax(0)
        labels = torch.randint(0, 2, (20, 31), generator=generator)
        accumulator.update(probabilities, probabilities.argmax(0), labels, index=index)
    summary = summarize(accumulator, ["road", "sky"])
    (measured / "metrics.json").write_text(json.dumps(METRICS | summary))
    text = card_of(measured).text
    scores = [
        "Mean IoU",
        "Mean accuracy",
        "Pixel accuracy",
        "Mean Dice",
        "Precision",
        "Boundary IoU",
        "Calibration error",
    ]
    assert f"| {' | '.join(scores)} |" in text
    assert "| Class | IoU, % | Accuracy, % | Dice, % | Precision, % | Boundary IoU, % | Calibration error, % |" in text
    low, high = summary["intervals"]["mean_iou"]
    assert f"| {100 * summary['mean_iou']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) |" in text
    low, high = summary["classes"][1]["intervals"]["iou"]
    assert f"| sky | {100 * summary['classes'][1]['iou']:.1f} ({100 * low:.1f} to {100 * high:.1f}) |" in text
    assert "by a bootstrap over 4 images." in text
    card = card_of(measured, repo_id="me/street")
    assert card_errors(card.content) == []
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {result.task_type for result in results.values()} == {"image-segmentation"}
    for name in ("mean_iou", "mean_dice", "boundary_iou", "calibration_error"):
        assert results[name].metric_value == pytest.approx(summary[name], abs=5e-5)


@pytest.mark.parametrize("kind", ["bare", "measured"])
def test_the_hubs_rules_accept_every_card(request, folder, kind):
    folder = request.getfixturevalue("measured") if kind == "measured" else folder
    for repo_id in (None, "me/street"):
        assert card_errors(card_of(folder, repo_id=repo_id).content) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("type: image-segmentation", "type: segmenting", "task.type"),
        ("license: apache-2.0", "license: my own", "license"),
        ("someone/street", "some one/street", "datasets"),
        ("value: 0.7012", "value: null", "need type and value"),
        ("name: street", "name: ''", "name"),
    ],
)
def test_the_hubs_rules_can_refuse(measured, old, new, message):
    content = card_of(measured, repo_id="me/street").content
    assert old in content
    assert message in " ".join(card_errors(content.replace(old, new)))


def test_the_trainers_own_evaluation_stands_in_where_there_is_no_other(folder):
    write_run_record(folder, {"steps": 40, "evaluation": {"step": 40, "mean_iou": 0.25}})
    card = card_of(folder)
    assert [result.metric_value for result in card.data.eval_results] == [0.25]
    assert "the Trainer's evaluation at step 40" in card.text


def test_the_lines_to_load_name_the_repository_or_else_the_folder(folder):
    assert f'from_pretrained("{folder.name}")' in card_of(folder).text
    assert '"revision": "COMMIT"' not in card_of(folder).text
    text = card_of(folder, repo_id="me/street").text
    assert 'from_pretrained("me/street")' in text
    assert '"trust_remote_code": True, "revision": "COMMIT", "code_revision": "COMMIT"' in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_usage_code_runs_in_float32(dtype, folder, monkeypatch):
    """A half-precision checkpoint on a CPU included."""
    SegFormerForSemanticSegmentation.from_pretrained(folder).to(dtype).save_pretrained(folder)
    monkeypatch.chdir(folder.parent)
    code = re.findall(r"^```python\n(.*?)^```", card_of(folder).text, flags=re.MULTILINE | re.DOTALL)[0]
    assert ("dtype=torch.float32" in code) == (dtype != torch.float32)
    assert len(code.splitlines()) <= 9
    photo = Image.new("RGB", (90, 70))
    photo.getexif()[0x0112] = 6  # of a phone held upright
    for image, shape in ((Image.new("RGB", (90, 70)), (70, 90)), (photo, (90, 70))):
        values = {"image": image}
        exec(compile(code, "card", "exec"), values)
        assert values["model"].dtype == torch.float32
        assert values["segmentation"].shape == shape


def test_an_encoder_is_no_segmentation_model(tiny_config, tmp_path):
    SegFormerModel(tiny_config()).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "without a head" in card.text


def test_the_same_folder_gives_the_same_card(measured):
    first = write_card(measured, repo_id="me/street").read_bytes()
    (measured / "README.md").unlink()
    assert write_card(measured, repo_id="me/street").read_bytes() == first


def test_the_blank_template_of_transformers_is_no_edited_card():
    from huggingface_hub import ModelCard, ModelCardData

    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    values = ModelCardData(tags=["a"], library_name="transformers")
    text = str(ModelCard.from_template(values, model_description=description))
    assert not is_edited_text(text)
    assert is_edited_text(text.replace("[More Information Needed]", "Mine", 1))


def test_a_rendered_card_follows_the_numbers_and_an_edited_one_is_kept(measured):
    path = write_card(measured)
    (measured / "metrics.json").write_text(json.dumps(METRICS | {"mean_iou": 0.9}))
    assert "| 90.0 %" in write_card(measured).read_text()
    edited = path.read_text().replace("## Evaluation results", "## My results")
    path.write_text(edited)
    assert write_card(measured).read_text() == edited


def test_the_name_of_a_pre_trainings_method_is_no_setting(folder):
    values = {"loss": 0.5, "method": "masked", "dataset": {"title": "streets", "images": 7}}
    (folder / "metrics.json").write_text(json.dumps(values))
    assert "# SegFormer\n" in card_of(folder).text


@pytest.mark.parametrize(
    "values",
    [
        {"mean_iou": 0.5, "classes": [{"name": "a", "iou": "<b>", "accuracy": 0.5}]},
        {"mean_iou": 0.5, "method": {"sliding_window": "<script>", "stride": 1}},
        {"mean_iou": 0.5, "method": [1]},
        {"classes": 3},
        {"mean_iou": "high"},
        {"mean_iou": 0.5, "intervals": {"mean_iou": "<b>"}},
        {"mean_iou": 0.5, "intervals": {"level": "<b>", "unit": "images", "num_drawn": 3}},
        {"mean_iou": 0.5, "intervals": {"level": 0.95, "unit": "images", "num_drawn": "<b>"}},
        {"mean_iou": 0.5, "intervals": [0.1, 0.2]},
        {"mean_iou": 0.5, "classes": [{"name": "a", "iou": 0.5, "accuracy": 0.5, "pixels": "<b>"}]},
        {"mean_iou": 0.5, "classes": [{"name": "a", "iou": 0.5, "accuracy": 0.5, "boundary_iou": "<b>"}]},
        {"mean_iou": 0.5, "classes": [{"name": "a", "iou": 0.5, "accuracy": 0.5, "intervals": {"iou": ["<", 1]}}]},
    ],
)
def test_metrics_of_strange_values_are_refused(values, folder):
    (folder / "metrics.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        write_card(folder)


@pytest.mark.parametrize("part", ["recipe", "arguments"])
def test_the_settings_of_a_card_are_toml(part, folder):
    kwargs = {"min_lr_rate": 0.01, "names": ["a\x7f", "b"]}
    values = {"lr_scheduler_kwargs": kwargs, "learning_rate": 1e-05, "gr\u00f6sse": True}
    tables = {"trainer": values} if part == "recipe" else {**values, "not_set": None}
    write_run_record(folder, {"steps": 3, part: tables})
    [settings] = re.findall(r"^```toml\n(.*?)^```", card_of(folder).text, re.M | re.S)
    assert tomllib.loads(settings) == ({"trainer": values} if part == "recipe" else values)


def test_a_recipe_cannot_leave_its_code_block(folder):
    key = "a\n```\n<script>alert(1)</script>\n```"
    write_run_record(folder, {"steps": 3, "recipe": {key: {key: key}}})
    lines = card_of(folder).text.splitlines()
    assert not [line for line in lines if line.startswith("<script>")]
    assert sum(line.startswith("```") for line in lines) % 2 == 0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [("metrics.json", "{", "metrics.json is not JSON"), ("training.json", "[1]", "training.json holds a list")],
)
def test_a_damaged_file_is_named(name, text, words, folder):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        write_card(folder)


@pytest.fixture
def trainer(model, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True, gradient_accumulation_steps=3, max_steps=40
    )
    trainer = SegFormerTrainer(model=model, args=arguments, train_dataset=[None] * 7)
    trainer.state.global_step, trainer.state.epoch = 40, 2.5
    trainer.state.log_history = [
        {"step": 20, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "hours": 0.5},
        {"step": 20, "eval_mean_iou": 0.6, "eval_loss": 1.0, "eval_runtime": 3.0, "hours": 0.6},
        {"step": 40, "loss": float("nan"), "learning_rate": 5e-4, "hours": 1.0},
        {
            "step": 40,
            "eval_mean_iou": 0.4,
            "eval_mean_accuracy": float("nan"),
            "eval_per_category_iou": [0.4, 0.4, float("nan"), 0.4, 0.4],
            "eval_per_category_accuracy": [0.5] * 5,
            "hours": 1.1,
        },
    ]
    return trainer


def test_facts_are_the_trainers(trainer):
    facts = build_run_record(trainer, title="Street", terms="research only")
    assert (facts["steps"], facts["epochs"], facts["hours"], facts["batch_size"]) == (40, 2.5, 1.1, 24)
    assert facts["dataset"] == {"title": "Street", "terms": "research only", "images": 7}
    assert facts["arguments"]["head_lr_multiplier"] == 10.0
    assert facts["arguments"]["lr_scheduler_type"] == "linear"
    assert facts["curve"] == [
        {"step": 20, "loss": 2.0, "learning_rate": 1e-3},
        {"step": 20, "eval_loss": 1.0, "eval_mean_iou": 0.6},
        {"step": 40, "learning_rate": 5e-4},
        {"step": 40, "eval_mean_iou": 0.4},
    ]
    assert facts["evaluation"]["mean_iou"] == 0.4
    assert "mean_accuracy" not in facts["evaluation"]
    assert facts["evaluation"]["classes"][2]["iou"] is None
    json.dumps(facts, allow_nan=False)


def test_the_best_checkpoints_evaluation_counts_where_it_was_loaded(trainer):
    trainer.args.load_best_model_at_end, trainer.state.best_global_step = True, 20
    assert build_run_record(trainer)["evaluation"] == {"step": 20, "mean_iou": 0.6}


def test_numbers_by_class_are_found_as_segmentation_metrics_names_them(trainer, model):
    name = model.config.id2label[1]
    trainer.state.log_history[-1] = {
        "step": 40,
        "eval_mean_iou": 0.4,
        f"eval_iou_{name}": 0.3,
        f"eval_accuracy_{name}": 0.5,
    }
    classes = build_run_record(trainer)["evaluation"]["classes"]
    assert classes[1] == {"name": name, "iou": 0.3, "accuracy": 0.5}
    assert classes[0]["iou"] is None


def test_facts_name_no_folder_and_no_token(trainer, tmp_path):
    recipe = {
        "model": {"checkpoint": str(tmp_path)},
        "data": {"source": "camvid", "root": "/secret/place"},
        "trainer": {"output_dir": "outputs/x", "hub_token": "hf_secret", "max_steps": 40, "logging_dir": "logs"},
    }
    facts = build_run_record(trainer, recipe=recipe)
    assert facts["recipe"] == {"data": {"source": "camvid"}, "trainer": {"max_steps": 40}}
    for word in ("secret", str(tmp_path), "outputs"):
        assert word not in json.dumps(facts)


def test_a_curve_has_a_panel_for_each_kind_of_number():
    pytest.importorskip("matplotlib")
    loss, iou = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}], [{"step": 2, "eval_mean_iou": 0.5}]
    assert draw_curve(loss).size == draw_curve(iou).size == (620, 400)
    assert draw_curve(loss + iou).size == (1240, 400)
    with pytest.raises(ValueError, match="neither a loss nor a mean IoU"):
        draw_curve([{"step": 1, "loss": float("nan")}])


def test_the_committed_card_holds_the_rendered_sections(monkeypatch):
    """docs/results/camvid_b0 has a section of its own beside them."""
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    folder = Path("docs/results/camvid_b0")
    committed = (folder / "README.md").read_text()
    monkeypatch.setattr("hf_segformer.hub.model_card._is_rendered", lambda text: True)
    rendered = card_text(folder)
    for section in rendered[: rendered.index("\n<!-- Rendered")].split("\n## "):
        assert section.strip() in committed
