"""The report: values, tables, sheets and a page that needs nothing else."""

import csv
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer.data.splits import group_names
from hf_segformer.evaluation import plots
from hf_segformer.evaluation.accumulator import MetricAccumulator, worst_images
from hf_segformer.evaluation.binary import roc_auc
from hf_segformer.evaluation.bootstrap import bootstrap_intervals
from hf_segformer.evaluation.boundary import boundary_scores
from hf_segformer.evaluation.calibration import calibration_error, calibration_errors
from hf_segformer.evaluation.metrics import scores
from hf_segformer.evaluation.report import Report, choose_samples
from hf_segformer.evaluation.samples import Sample, error_map, sample_sheet
from hf_segformer.evaluation.summary import (
    classes_csv,
    classes_latex,
    escape_latex,
    frequent_confusions,
    per_image_csv,
    summarize,
)
from hf_segformer.files import csv_text
from hf_segformer.visualization import default_palette
from tests.support.evaluations import IGNORE, NAMES, PALETTE, evaluation

RESAMPLES = 100


@pytest.fixture(scope="module")
def accumulator():
    return evaluation()[0]


@pytest.fixture(scope="module")
def summary(accumulator):
    return summarize(accumulator, NAMES, num_resamples=RESAMPLES)


def test_summary_holds_every_score(accumulator, summary):
    expected = scores(accumulator.matrix)
    for name in ("mean_iou", "mean_accuracy", "overall_accuracy"):
        assert summary[name] == pytest.approx(expected[name])
    classes = summary["classes"]
    assert [row["name"] for row in classes] == NAMES
    for name, values in (
        ("iou", expected["per_category_iou"]),
        ("accuracy", expected["per_category_accuracy"]),
        ("recall", expected["per_category_accuracy"]),
        ("boundary_iou", boundary_scores(accumulator.boundary)["boundary_iou"]),
        ("boundary_f1", boundary_scores(accumulator.boundary)["boundary_f1"]),
        ("calibration_error", calibration_errors(accumulator.calibration)),
    ):
        assert [row[name] for row in classes] == pytest.approx(values), name
    assert summary["boundary_iou"] == pytest.approx(np.mean([row["boundary_iou"] for row in classes]))
    assert summary["calibration_error"] == pytest.approx(calibration_error(accumulator.calibration))
    assert [row["pixels"] for row in classes] == accumulator.matrix.sum(dim=1).tolist()
    assert summary["binary"] is None
    json.dumps(summary, allow_nan=False)


def test_summary_holds_intervals(accumulator, summary):
    expected = bootstrap_intervals(accumulator.counts, num_resamples=RESAMPLES)
    assert summary["intervals"]["mean_iou"] == [expected["mean_iou"].low, expected["mean_iou"].high]
    assert summary["intervals"]["recall"] == [expected["mean_recall"].low, expected["mean_recall"].high]
    assert summary["classes"][2]["intervals"]["dice"][1] == expected["dice"].high[2]
    settings = {"level": 0.95, "resamples": RESAMPLES, "seed": 0, "unit": "images", "num_drawn": 8}
    assert settings.items() <= summary["intervals"].items()


def test_groups_widen_what_is_drawn(accumulator):
    groups = group_names(accumulator.names, r"scene_(\d+)_")
    summary = summarize(accumulator, NAMES, groups=groups, num_resamples=20)
    assert (summary["intervals"]["unit"], summary["intervals"]["num_drawn"]) == ("groups", 4)
    with pytest.raises(ValueError, match=r"'patient' is not found in the image name 'scene_0_0.png'"):
        group_names(accumulator.names, "patient")
    with pytest.raises(ValueError, match="expected a regular expression"):
        group_names(accumulator.names, "(")


def test_binary_models_have_thresholds():
    accumulator, _ = evaluation(num_classes=2)
    summary = summarize(accumulator, NAMES[:2], num_resamples=20)
    assert summary["binary"]["auc"] == pytest.approx(roc_auc(accumulator.histogram))
    assert summary["binary"]["at_half"]["iou"] == pytest.approx(summary["classes"][1]["iou"])
    assert summary["binary"]["best"]["dice"] >= summary["binary"]["at_half"]["dice"]
    assert len(summary["binary"]["sweep"]) == 20


def test_one_image_has_no_intervals_and_absent_classes_no_scores():
    accumulator = MetricAccumulator(4, IGNORE)
    labels = torch.tensor([[0, 0, 1], [1, 1, IGNORE]])
    accumulator.update(None, labels.clamp(max=1), labels)
    summary = summarize(accumulator, NAMES)
    assert summary["intervals"] == {}
    assert summary["mean_iou"] == 1.0
    assert summary["classes"][3]["iou"] is summary["classes"][3]["boundary_f1"] is summary["calibration_error"] is None
    json.dumps(summary, allow_nan=False)
    page = Report("one", accumulator, NAMES, PALETTE, summary).to_html()
    assert "100.0" in page
    assert "nan" not in page.lower().split("base64")[0]


def test_nothing_evaluated_is_refused():
    with pytest.raises(ValueError, match="no image was evaluated"):
        summarize(MetricAccumulator(4, IGNORE), NAMES)
    with pytest.raises(ValueError, match="class_names has 2 names; expected 4"):
        summarize(evaluation(2)[0], NAMES[:2])


def test_per_image_csv_has_every_image(accumulator):
    rows = list(csv.DictReader(io.StringIO(per_image_csv(accumulator, NAMES))))
    assert [row["image"] for row in rows] == accumulator.names
    counts = accumulator.counts
    for row, count in zip(rows, counts, strict=True):
        assert float(row["accuracy"]) == pytest.approx(count[0].sum() / count[1].sum())
        iou = [float(row[f"iou {name}"]) for name in NAMES if row[f"iou {name}"]]
        assert float(row["mean_iou"]) == pytest.approx(np.mean(iou))
    assert int(rows[0]["pixels"]) == counts[0, 1].sum()
    groups = [name[:7] for name in accumulator.names]
    rows = list(csv.DictReader(io.StringIO(per_image_csv(accumulator, NAMES, groups))))
    assert [(row["image"], row["group"]) for row in rows] == list(zip(accumulator.names, groups, strict=True))


def test_tables_hold_the_summary(summary):
    rows = list(csv.DictReader(io.StringIO(classes_csv(summary))))
    assert [row["class"] for row in rows] == [*NAMES, "mean"]
    assert float(rows[2]["iou"]) == summary["classes"][2]["iou"]
    assert float(rows[2]["iou_low"]) == summary["classes"][2]["intervals"]["iou"][0]
    assert float(rows[-1]["iou_high"]) == summary["intervals"]["mean_iou"][1]
    table = classes_latex(summary)
    assert r"car \& van" in table
    assert f"{100 * summary['mean_iou']:.1f}" in table.splitlines()[-3]
    assert {line.count("&") - line.count(r"\&") for line in table.splitlines() if line.endswith(r"\\")} == {7}


def test_confusions_are_listed_by_their_pixels():
    matrix = torch.tensor([[5, 3, 0, 0], [7, 1, 0, 2], [0, 0, 0, 0]])
    found = frequent_confusions(matrix, ["a", "b", "c"], number=2)
    assert found == [
        {"true": "b", "predicted": "a", "pixels": 7, "share": 0.7},
        {"true": "a", "predicted": "b", "pixels": 3, "share": 0.375},
    ]
    assert [row["predicted"] for row in frequent_confusions(matrix, ["a", "b", "c"])] == ["a", "b", "none"]
    assert matrix[0, 0] == 5


def test_hundreds_of_classes_are_shown_by_the_worst_and_best(tmp_path):
    pytest.importorskip("matplotlib")
    number = 400
    names = [f"class {place}" for place in range(number)]
    accumulator = MetricAccumulator(number, ignore_index=-100)
    labels = torch.arange(number).repeat_interleave(4).reshape(40, 40)
    for prediction in (labels.roll(1, 1), labels):
        accumulator.update(None, prediction, labels)
    summary = summarize(accumulator, names, num_resamples=10)
    Report("many", accumulator, names, default_palette(number), summary).write(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "60 of 400" in page.text
    assert page.text.count("class ") < 200
    assert len((tmp_path / "table.csv").read_text().splitlines()) == number + 2
    assert (tmp_path / "report.html").stat().st_size < 2_500_000
    with Image.open(tmp_path / "confusion.png") as drawn:
        assert max(drawn.size) < 2500


def test_error_map_shows_errors_and_ignored_pixels():
    labels = np.array([[0, 1, 1], [0, 0, IGNORE]])
    prediction = np.array([[0, 1, 0], [1, 0, 1]])
    found = np.asarray(error_map(Image.new("RGB", (3, 2), "white"), prediction, labels, IGNORE))
    is_red = (found == (214, 39, 40)).all(axis=-1)
    np.testing.assert_array_equal(is_red, (prediction != labels) & (labels != IGNORE))
    assert (found[0, 0] == 255).all()
    assert found[1, 2].max() < 100
    with pytest.raises(ValueError, match="expected the same shape"):
        error_map(Image.new("RGB", (3, 2)), prediction[:1], labels, IGNORE)


def test_sheets_take_images_of_any_size():
    samples = [
        Sample(Image.new("L", (width, height)), np.zeros((height, width), int), np.ones((height, width), int), "one")
        for width, height in ((3000, 1000), (20, 9))
    ]
    sheet = sample_sheet(samples, NAMES, PALETTE, IGNORE)
    assert sheet.mode == "RGB"
    assert sheet.height < 700
    with pytest.raises(ValueError, match="no samples to draw"):
        sample_sheet([], NAMES, PALETTE, IGNORE)


def test_samples_are_the_worst_and_typical_ones():
    accumulator, load = evaluation()
    worst, typical = choose_samples(accumulator, load, 2)
    places = worst_images(accumulator.counts, 2)
    assert [sample.caption.split()[0] for sample in worst] == [accumulator.names[place] for place in places]
    assert len(typical) == 2
    assert not {sample.caption for sample in worst} & {sample.caption for sample in typical}
    np.testing.assert_array_equal(worst[0].labels, load(accumulator.indices[places[0]])[2])


class Page(HTMLParser):
    """Checks nesting, and collects whatever a browser would load."""

    EMPTY = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        assert tag not in ("script", "link", "iframe")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("num_classes", [2, 4])
def test_report_is_one_page_and_its_files(tmp_path, num_classes):
    pytest.importorskip("matplotlib")
    accumulator, load = evaluation(num_classes=num_classes)
    names, palette = NAMES[:num_classes], PALETTE[:num_classes]
    summary = summarize(accumulator, names, num_resamples=20) | {"dataset": {"split": "test"}}
    samples = choose_samples(accumulator, load, 2)
    report = Report("A <b> model", accumulator, names, palette, summary, *samples, {"Model": "outputs/x"})
    paths = report.write(tmp_path / "new")
    expected = [
        "confusion.png",
        "metrics.json",
        "per_image.csv",
        "reliability.png",
        "report.html",
        "table.csv",
        "table.tex",
        "typical.png",
        "worst.png",
    ]
    assert sorted(path.name for path in paths) == expected == sorted(path.name for path in (tmp_path / "new").iterdir())
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?://", text)
    page = Page(text)
    assert len(page.loaded) == 5 + (num_classes == 2)
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
    assert "A <b> model" in page.text
    assert f"{100 * summary['mean_iou']:.1f}" in page.text
    assert ("Average precision" in page.text) == (num_classes == 2)
    assert json.loads((tmp_path / "new" / "metrics.json").read_text())["dataset"] == {"split": "test"}


def test_page_without_matplotlib_says_so(monkeypatch, accumulator, summary):
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    page = Page(Report("a", accumulator, NAMES, PALETTE, summary).to_html())
    assert page.loaded == []
    assert 'pip install "hf-segformer[plots]"' in page.text


def cells_of(matrix, names):
    """Colours of the cells of a drawn confusion matrix, by their place in it."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        own = Axes.imshow
        patch.setattr(
            Axes, "imshow", lambda self, values, **others: drawn.append(values) or own(self, values, **others)
        )
        plots.plot_confusion(matrix, names)
    return (drawn[0] ** 2).tolist()


def test_confusion_matrix_is_in_percent_of_its_rows():
    assert cells_of([[1, 3, 0], [0, 500, 0]], ["a", "b"]) == [[25, pytest.approx(75)], [0, 100]]


def test_confusion_matrix_has_a_column_for_no_class_if_it_is_used():
    assert cells_of([[1, 0, 1], [0, 2, 2]], ["a", "b"]) == [
        [pytest.approx(50), 0, pytest.approx(50)],
        [0, *2 * [pytest.approx(50)]],
    ]


def test_confusion_matrix_has_a_blank_row_for_a_class_without_pixels():
    first, second = cells_of([[4, 0, 0], [0, 0, 0]], ["a", "b"])
    assert first == [100, 0]
    assert all(math.isnan(value) for value in second)


def test_confusion_matrix_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"matrix is \(3, 3\); expected \(3, 4\)"):
        plots.plot_confusion(np.eye(3), ["a", "b", "c"])


def test_many_classes_and_missing_values_are_drawn(accumulator):
    pytest.importorskip("matplotlib")
    rows = [
        {"name": f"class {place}", "iou": None if place == 3 else place / 150, "intervals": {}} for place in range(150)
    ]
    matrix = np.random.default_rng(0).integers(0, 9, (150, 151))
    matrix[7] = 0
    drawings = [plots.plot_iou(rows), plots.plot_confusion(matrix, [row["name"] for row in rows])]
    bins = [{"count": 0, "accuracy": None, "confidence": None}] * 15
    drawings.append(plots.plot_reliability(bins, None))
    for drawing in drawings:
        with Image.open(io.BytesIO(drawing)) as image:
            assert image.format == "PNG"
            assert max(image.size) < 12_000
    assert math.isfinite(image.size[0])


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", " ="])
def test_a_spreadsheet_computes_no_name(sign):
    text = csv_text([["class", "iou"], [f"{sign}1+1", -0.5], ["a\n\x1b[31mred", None]])
    assert text.splitlines() == ["class,iou", f"'{sign}1+1,-0.5", "a\\n\\x1b[31mred,"]


def test_a_name_puts_no_control_characters_into_latex():
    assert escape_latex("a\n\x1b") == r"a\textbackslash{}n\textbackslash{}x1b"
