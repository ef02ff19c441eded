"""Comparison of models: scores, tests and images, as text, CSV, JSON and HTML."""

import csv
import io
import json

import numpy as np
import pytest

from hf_segformer.evaluation.bootstrap import class_scores, holm, paired_bootstrap
from hf_segformer.evaluation.comparison import compare
from hf_segformer.evaluation.comparison_report import (
    comparison_csv,
    comparison_html,
    comparison_json,
    comparison_per_image_csv,
    difference_sheet,
    format_comparison,
    write_comparison,
)
from tests.evaluation.test_report import Page
from tests.support.evaluations import NAMES, PALETTE, evaluation

RESAMPLES = 400


@pytest.fixture(scope="module")
def evaluations():
    return {"base": evaluation(), "better": evaluation(noise=0.6), "other": evaluation(offset=5)}


@pytest.fixture(scope="module")
def comparison(evaluations):
    return compare({name: pair[0] for name, pair in evaluations.items()}, NAMES, num_resamples=RESAMPLES)


def test_tests_are_paired_and_corrected_together(evaluations, comparison):
    counts = {name: pair[0].counts for name, pair in evaluations.items()}
    tests = [paired_bootstrap(counts["base"], counts[name], num_resamples=RESAMPLES) for name in ("better", "other")]
    corrected = holm([test["iou"].p_value for test in tests])
    for row, name in enumerate(("better", "other")):
        for place, found in enumerate(comparison.classes[name]):
            assert found.difference == tests[row]["iou"].difference[place]
            assert found.low == tests[row]["iou"].low[place]
            assert found.p_value == tests[row]["iou"].p_value[place]
            assert found.corrected == corrected[row, place]
    overall = holm([test["mean_iou"].p_value for test in tests])
    assert [comparison.overall[name]["mean_iou"].corrected for name in ("better", "other")] == list(overall)
    assert comparison.num_tests == 8
    assert all(test.is_significant for test in comparison.classes["better"])
    assert not any(test.is_significant for test in comparison.classes["other"])


def test_images_that_differ_most_come_first(evaluations, comparison):
    scores = np.stack([class_scores(pair[0].counts)["mean_iou"] for pair in evaluations.values()])
    ranges = np.ptp(scores, axis=0)
    assert comparison.most_different(3) == np.argsort(-ranges)[:3].tolist()
    same = compare({"a": evaluations["base"][0], "b": evaluations["base"][0]}, NAMES, num_resamples=160)
    assert same.most_different() == []
    assert difference_sheet(same, lambda index: None, PALETTE) is None
    assert same.overall["b"]["mean_iou"].p_value == 1.0


def test_text_has_models_classes_and_images(comparison):
    text = format_comparison(comparison)
    for part in (*NAMES, "better - base", "corrected by Holm for 8 tests", comparison.image_names[0]):
        assert part in text
    [line] = [line for line in text.splitlines() if line.lstrip().startswith("road")]
    test = comparison.classes["better"][1]
    assert f"{100 * test.difference:+.1f}*" in line
    assert "<=" in line


def test_csv_holds_all_numbers(comparison):
    rows = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    assert [row["class"] for row in rows] == [*NAMES, "mean"]
    assert float(rows[2]["corrected other"]) == comparison.classes["other"][2].corrected
    assert float(rows[-1]["difference better"]) == comparison.overall["better"]["mean_iou"].difference
    rows = list(csv.DictReader(io.StringIO(comparison_per_image_csv(comparison))))
    assert [float(row["mean_iou other"]) for row in rows] == comparison.image_scores[2].tolist()


def test_everything_is_written(tmp_path, evaluations, comparison):
    pytest.importorskip("matplotlib")

    def load(index):
        image, _, labels = evaluations["base"][1](index)
        return image, labels, {name: pair[1](index)[1] for name, pair in evaluations.items()}

    sheet = difference_sheet(comparison, load, PALETTE, 2)
    paths = write_comparison(comparison, tmp_path / "out", "Three <models>", sheet)
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "out").iterdir())
    page = Page((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8"))
    assert "Three <models>" in page.text
    assert "<pole>" in page.text
    assert len(page.loaded) == 3
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert result["tests"]["better"]["iou"][0]["is_significant"] is True
    assert result["models"]["base"]["mean_iou"]["value"] == comparison.intervals["base"]["mean_iou"].value


def test_an_absent_class_has_no_test(evaluations):
    accumulators = {}
    for name in ("base", "better"):
        accumulators[name] = evaluation(num_classes=4)[0]
        for _, _, counts in accumulators[name]._images:
            counts[:, 3] = 0
    found = compare(accumulators, NAMES, num_resamples=160)
    assert found.classes["better"][3].p_value is found.classes["better"][3].difference is None
    assert found.num_tests == 3
    assert "-" in format_comparison(found)
    json.dumps(comparison_json(found), allow_nan=False)
    assert "nan" not in comparison_html(found).split("base64")[0].lower()


def test_resamples_leave_room_for_the_correction(evaluations):
    accumulators = {name: pair[0] for name, pair in evaluations.items()}
    with pytest.raises(ValueError, match="num_resamples is 300; expected at least 3"):
        compare(accumulators, NAMES, num_resamples=300)
    assert compare({"a": accumulators["base"], "b": accumulators["other"]}, NAMES).num_resamples == 10_000


def test_models_of_other_images_or_labels_are_refused(evaluations):
    base = evaluations["base"][0]
    with pytest.raises(ValueError, match="there are 1 models to compare"):
        compare({"a": base}, NAMES)
    with pytest.raises(ValueError, match="a and b were evaluated on different images"):
        compare({"a": base, "b": evaluation(num_images=3)[0]}, NAMES)
    with pytest.raises(ValueError, match="a has 4 classes and b has 2"):
        compare({"a": base, "b": evaluation(num_classes=2)[0]}, NAMES)
    changed = evaluation()[0]
    changed._images[3][2][1, 0] += 1
    with pytest.raises(ValueError, match=r"a and b were evaluated on different labels of scene_1_3\.png"):
        compare({"a": base, "b": changed}, NAMES)
