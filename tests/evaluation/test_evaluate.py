"""Evaluation: predictions against a slow reference, exact counts in one process and two, and the program's errors."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.cli.main import main as command
from hf_segformer.config import InferenceOptions
from hf_segformer.data.shapes import NAMES
from hf_segformer.evaluation.evaluate import Evaluation, evaluate
from hf_segformer.evaluation.metrics import confusion_matrix, scores
from hf_segformer.files import write_json
from hf_segformer.inference.segmenter import predict
from tests.support.tiny import TINY

ROOT = Path(__file__).parents[2]
K = 5


@pytest.fixture
def processor():
    return SegFormerImageProcessor(do_resize=False)


def lively(config):
    """Untrained model whose predictions vary within an image, near a border between classes."""
    torch.manual_seed(1)
    model = SegFormerForSemanticSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.decode_head.parameters():
            parameter.mul_(3)
        pixels = torch.randn(1, config.num_channels, 64, 96)
        model.decode_head.classifier.bias -= model(pixels).logits.mean(dim=(0, 2, 3))
    return model


@pytest.fixture
def model(tiny_config):
    return lively(tiny_config())


def make_image(height=70, width=110, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def rows(num=4, num_classes=K):
    """Images of different sizes with random masks, some pixels ignored."""
    rng = np.random.default_rng(3)
    result = []
    for index in range(num):
        height, width = 40 + 9 * index, 70 - 5 * index
        labels = rng.integers(0, num_classes, (height, width)).astype(np.uint8)
        labels[:3] = 255
        result.append({"image": make_image(height, width, seed=index), "label": Image.fromarray(labels)})
    return result


def logits_of(model, pixels, size):
    with torch.no_grad():
        return F.interpolate(model(pixels).logits, size=tuple(size), mode="bilinear", align_corners=False)[0]


def slow_window(model, pixels, window, step):
    """Reference: for each pixel the mean of the logits of all windows that see it, (K, H, W)."""
    height, width = pixels.shape[-2:]
    windows = []
    for row in range(100):
        for column in range(100):
            bottom, right = min(row * step + window, height), min(column * step + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            if (top, left) not in [place for place, _ in windows]:
                part = pixels[:, :, top:bottom, left:right]
                windows.append(((top, left), logits_of(model, part, part.shape[-2:])))
    result = torch.empty(model.config.num_labels, height, width)
    for y in range(height):
        for x in range(width):
            seen = [
                logits[:, y - top, x - left]
                for (top, left), logits in windows
                if top <= y < top + logits.shape[1] and left <= x < left + logits.shape[2]
            ]
            result[:, y, x] = torch.stack(seen).mean(dim=0)
    return result


def assert_best(labels, reference):
    """Assert that the classes are the best ones of the reference, up to ties within rounding."""
    labels = labels.cpu()
    assert len(labels.unique()) > 1, "a map of one class proves nothing"
    chosen = reference.gather(0, labels[None])[0]
    torch.testing.assert_close(chosen, reference.amax(dim=0), rtol=1e-5, atol=1e-5)


def test_default_prediction_equals_post_processed_logits(model, processor):
    image = make_image()
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    [expected] = processor.post_process_semantic_segmentation(outputs, [(70, 110)])
    assert len(expected.unique()) > 1
    assert torch.equal(predict(model, processor, image, (70, 110)), expected)


@pytest.mark.parametrize("size", [(70, 110), (40, 150)], ids=["whole in the window", "higher than it"])
@pytest.mark.parametrize(("window", "stride"), [(64, 48), (32, 0), (96, 50)])
def test_overlapping_windows_are_averaged_as_in_the_reference(model, processor, size, window, stride):
    image, options = make_image(*size), InferenceOptions(sliding_window=window, stride=stride)
    pixels = processor(image, return_tensors="pt").pixel_values
    reference = slow_window(model, pixels, window, options.effective_stride)
    assert_best(predict(model, processor, image, size, options), reference)


def test_window_as_large_as_the_image_sees_it_whole(model, processor):
    image = make_image()
    whole = predict(model, processor, image, (35, 55))
    assert torch.equal(predict(model, processor, image, (35, 55), InferenceOptions(sliding_window=110)), whole)
    assert not torch.equal(predict(model, processor, image, (35, 55), InferenceOptions(sliding_window=64)), whole)


@pytest.mark.parametrize("size", [(48, 70), (70, 110)], ids=["smaller", "own size"])
def test_flips_and_scales_are_averaged_as_probabilities(model, processor, size):
    image = make_image()
    probabilities = []
    for height, width in ((70, 110), (53, 83), (105, 165)):  # 1, 0.75 and 1.5 times, halves rounded up
        pixels = processor(image.resize((width, height), Image.Resampling.BILINEAR), return_tensors="pt").pixel_values
        probabilities.append(logits_of(model, pixels, size).softmax(dim=0))
        mirrored = F.interpolate(model(pixels.flip(-1)).logits.flip(-1), size=size, mode="bilinear")[0]
        probabilities.append(mirrored.detach().softmax(dim=0))
    options = InferenceOptions(flip=True, scales=[1.0, 0.75, 1.5])
    assert_best(predict(model, processor, image, size, options), torch.stack(probabilities).mean(dim=0))


@pytest.mark.parametrize(
    ("keywords", "shape"),
    [
        ({"size": {"shortest_edge": 64}, "keep_ratio": True, "size_divisor": 32}, (96, 160)),
        ({"size": (64, 64)}, (96, 96)),
        ({"size": {"shortest_edge": 64, "longest_edge": 80}, "keep_ratio": True}, (76, 120)),
        ({"do_resize": False}, (105, 165)),
    ],
)
def test_scale_multiplies_the_size_of_the_processor(model, keywords, shape):
    seen = []
    model.segformer.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
    predict(model, SegFormerImageProcessor(**keywords), make_image(), (70, 110), InferenceOptions(scales=[1.5]))
    assert seen == [shape]


def test_windows_flips_and_scales_go_together(model, processor):
    labels = predict(
        model,
        processor,
        make_image(),
        (70, 110),
        InferenceOptions(sliding_window=64, stride=32, flip=True, scales=[0.5, 1.5]),
    )
    assert labels.shape == (70, 110)
    assert labels.dtype == torch.int64
    labels[0] = 255  # may be changed


@pytest.mark.parametrize("options", [InferenceOptions(), InferenceOptions(sliding_window=64, flip=True)])
def test_one_label_is_1_where_its_probability_is_above_one_half(tiny_config, processor, options):
    binary, image = lively(tiny_config(num_labels=1, id2label={0: "crack"})), make_image()
    labels = predict(binary, processor, image, (70, 110), options)
    assert labels.unique().tolist() == [0, 1]
    if options.sliding_window:
        pixels = processor(image, return_tensors="pt").pixel_values
        mirrored = slow_window(binary, pixels.flip(-1), 64, options.effective_stride).flip(-1)
        mean = (slow_window(binary, pixels, 64, options.effective_stride).sigmoid() + mirrored.sigmoid()) / 2
        sure = (mean[0] - 0.5).abs() > 1e-5
        assert torch.equal(labels[sure], (mean[0] > 0.5).long()[sure])
    result = evaluate(binary, processor, [{"image": image, "label": labels.numpy()}], options, progress=False)
    assert result.names == ("background", "crack")
    assert result.metrics["mean_iou"] == 1.0


def test_model_is_not_modified_and_can_be_trained_further(model, processor):
    model.train()
    model.decode_head.batch_norm.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predict(model, processor, make_image(), (70, 110))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="row 0"):
        evaluate(model, processor, [{"image": make_image(), "label": np.zeros((3, 2, 4), int)}], progress=False)
    assert [module.training for module in model.modules()] == modes
    model(torch.randn(2, 3, 40, 72), labels=torch.zeros(2, 40, 72, dtype=torch.long)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_images_are_counted_at_the_size_of_their_masks(model):
    processor, data = SegFormerImageProcessor(size=64), rows()
    result = evaluate(model, processor, data, progress=False)
    expected = torch.zeros(K, K + 1, dtype=torch.int64)
    for row in data:
        labels = torch.tensor(np.asarray(row["label"])).long()
        best = logits_of(model, processor(row["image"], return_tensors="pt").pixel_values, labels.shape).argmax(0)
        expected += confusion_matrix(best, labels, K)
    assert torch.equal(result.matrix, expected)
    assert result.matrix.sum() == sum((np.asarray(row["label"]) != 255).sum() for row in data)
    assert result.metrics == scores(expected)
    assert result.num_images == 4


def test_a_palettes_indices_are_the_labels(model, processor):
    labels = np.random.default_rng(0).integers(0, K, (40, 72)).astype(np.uint8)
    indexed = Image.fromarray(labels)
    indexed.putpalette([200, 9, 9, 9, 200, 9] * 50)
    matrices = [
        evaluate(model, processor, [{"image": make_image(40, 72), "label": label}], progress=False).matrix
        for label in (indexed, labels)
    ]
    assert indexed.mode == "P"
    assert torch.equal(*matrices)


def test_worst_images_are_listed_worst_first(model, processor):
    data = rows(6)
    # Two images are right in a third and in all of their rows; one has no labels and therefore no score.
    for index, share in ((4, 3), (1, 1)):
        right = predict(model, processor, data[index]["image"], data[index]["image"].size[::-1]).numpy()
        labels = np.asarray(data[index]["label"]).copy()
        labels[::share] = right[::share]
        data[index]["label"] = labels
    data[2]["label"] = np.full_like(np.asarray(data[2]["label"]), 255)
    alone = {i: evaluate(model, processor, [data[i]], progress=False).metrics["mean_iou"] for i in (0, 1, 3, 4, 5)}
    result = evaluate(model, processor, data, num_worst=4, progress=False)
    assert result.worst == tuple(sorted(alone.items(), key=lambda item: item[1])[:4])
    assert result.worst[-1][0] == 4
    assert evaluate(model, processor, data, progress=False).worst == ()


# Program of each process; its one argument is a folder.
SHARED_EVALUATION = """
import sys
import torch
from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.config import InferenceOptions
from hf_segformer.evaluation.evaluate import evaluate

folder, kept = sys.argv[1], []
model = SegFormerForSemanticSegmentation.from_pretrained(folder).train()
data = torch.load(f"{folder}/rows.pt", weights_only=True)
seen = []
model.register_forward_hook(lambda module, inputs, outputs: seen.append(len(inputs[0])))
for options in (InferenceOptions(batch_size=2), InferenceOptions(flip=True, sliding_window=32)):
    result = evaluate(model, SegFormerImageProcessor(do_resize=False), data, options, num_worst=2)
    kept.append((result.matrix, result.worst, result.num_images, sum(seen)))
    seen.clear()
data[4]["label"][0, 0] = 77
try:
    evaluate(model, SegFormerImageProcessor(do_resize=False), data)
except ValueError as error:
    kept.append(str(error))
assert model.training
torch.save(kept, f"{folder}/{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_exactly_the_result_of_one(model, processor, tmp_path):
    data = [{name: torch.tensor(np.asarray(value)) for name, value in row.items()} for row in rows(5)]
    for name in ("image", "label"):
        data[1][name] = data[0][name].flip(0)  # two images of one size share a batch
    model.save_pretrained(tmp_path)
    torch.save(data, tmp_path / "rows.pt")
    run = launched(tmp_path, SHARED_EVALUATION)
    assert run.returncode == 0, run.stderr
    ways = InferenceOptions(batch_size=2), InferenceOptions(flip=True, sliding_window=32)
    expected = [evaluate(model, processor, data, options, num_worst=2, progress=False) for options in ways]
    for process in range(2):
        *found, error = torch.load(tmp_path / f"{process}.pt", weights_only=True)
        for (matrix, worst, num_images, _), result in zip(found, expected, strict=True):
            assert torch.equal(matrix, result.matrix)
            assert worst == result.worst
            assert num_images == 5
        assert error.startswith("row 4 of the data: labels hold [77]")  # in the process that did not read it, too
        assert found[0][3] == (3, 2)[process]


def launched(folder, program):
    (folder / "program.py").write_text(program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment["ACCELERATE_USE_CPU"] = "true"
    command = [*launch, str(folder / "program.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


# A plain Trainer evaluates images of unequal heights, widths and number, in one process or in each of two.
TRAINER_EVALUATION = """
import json, os, sys
import torch
from transformers import Trainer, TrainingArguments
from hf_segformer import SegFormerForSemanticSegmentation
from hf_segformer.evaluation.metrics import SegmentationMetrics

folder = sys.argv[1]
model = SegFormerForSemanticSegmentation.from_pretrained(folder)
data = torch.load(f"{folder}/rows.pt", weights_only=True)
metrics = SegmentationMetrics(list("abcde"))
found = {}
for batch_eval_metrics in (True, False):
    arguments = TrainingArguments(
        f"{folder}/out", per_device_eval_batch_size=1, batch_eval_metrics=batch_eval_metrics, report_to="none",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model, arguments, eval_dataset=data, compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.preprocess_logits,
    )
    found[batch_eval_metrics] = {
        name: value for name, value in trainer.evaluate().items() if "iou" in name or "accuracy" in name
    }
if int(os.environ.get("RANK", "0")) == 0:
    json.dump(found, open(f"{folder}/metrics{os.environ.get('WORLD_SIZE', '')}.json", "w"))
"""


@pytest.mark.slow
def test_a_plain_trainer_in_two_processes_evaluates_unequal_sizes_as_one(model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = [(40, 70), (49, 65), (40, 33), (64, 64), (33, 70)]
    data = []
    for height, width in sizes:
        labels = torch.randint(K, (height, width), generator=generator)
        labels[-5:] = 255  # ignored rows at the bottom are not padding
        data.append({"pixel_values": torch.randn(3, height, width, generator=generator), "labels": labels})
    model.save_pretrained(tmp_path)
    torch.save(data, tmp_path / "rows.pt")
    run = launched(tmp_path, TRAINER_EVALUATION)
    assert run.returncode == 0, run.stderr
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    subprocess.run(alone, check=True, capture_output=True, env=environment)
    shared, single = (json.loads((tmp_path / f"metrics{n}.json").read_text()) for n in (2, ""))
    assert shared == single
    matrix = torch.zeros(K, K + 1, dtype=torch.int64)
    for row in data:
        best = logits_of(model, row["pixel_values"][None], row["labels"].shape).argmax(0)
        matrix += confusion_matrix(best, row["labels"], K)
    for values in single.values():
        assert values["eval_mean_iou"] == pytest.approx(scores(matrix)["mean_iou"], abs=1e-6)


def known_result():
    matrix = torch.tensor([[6, 2, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    return Evaluation(matrix, ("road", "car", "boat"), ((3, 0.25),), 1.234, 7)


def test_metrics_json_has_null_for_unknown_values(tmp_path):
    values = known_result().to_json("Roads", "val", InferenceOptions(sliding_window=512, flip=True))
    write_json(values, tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "mean_iou": (6 / 8 + 1 / 4) / 2,
        "mean_accuracy": (6 / 8 + 1 / 2) / 2,
        "overall_accuracy": 7 / 10,
        "classes": [
            {"name": "road", "iou": 0.75, "accuracy": 0.75, "pixels": 8},
            {"name": "car", "iou": 0.25, "accuracy": 0.5, "pixels": 2},
            {"name": "boat", "iou": None, "accuracy": None, "pixels": 0},
        ],
        "dataset": {"title": "Roads", "split": "val", "images": 7},
        "method": {"sliding_window": 512, "stride": 384, "flip": True, "scales": [1.0]},
        "seconds": 1.23,
    }


def test_the_table_has_every_class_in_percent():
    assert known_result().format_table().splitlines() == [
        "          IoU  accuracy  pixels",
        "  road   75.0      75.0    80.0",
        "  car    25.0      50.0    20.0",
        "  boat      -         -     0.0",
        "  -----------------------------",
        "  mean   50.0      62.5",
        "  70.0 % of all pixels are correct",
    ]


def test_a_class_name_sends_no_control_characters_to_the_terminal():
    matrix = torch.tensor([[6, 2, 0], [0, 1, 1]])
    table = Evaluation(matrix, ("a\n\x1b[31mred", "car"), (), 1.0, 2).format_table()
    assert "  a\\n\\x1b[31mred   75.0" in table
    assert "\x1b" not in table


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_json({"mean_iou": 1}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"mean_iou": math.nan}, path)

    def half(self, text, **kwargs):
        self.write_bytes(text[:5].encode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        write_json({"mean_iou": 2}, path)
    assert json.loads(path.read_bytes()) == {"mean_iou": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(("window", "step"), [(0, 0), (32, 32), (64, 32), (512, 384), (1024, 768), (100, 64)])
def test_a_window_steps_by_three_quarters_in_multiples_of_32(window, step):
    assert InferenceOptions(sliding_window=window).effective_stride == step
    if window:
        assert InferenceOptions(sliding_window=window, stride=17).effective_stride == 17


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"sliding_window": 16}, "evaluation.sliding_window is 16; expected at least 32"),
        ({"sliding_window": -64}, "evaluation.sliding_window is -64"),
        ({"stride": -1}, "evaluation.stride is -1"),
        ({"sliding_window": 384, "stride": 512}, "evaluation.stride is 512; expected at most the window, 384"),
        ({"stride": 64}, "evaluation.stride is 64; expected 0 without a sliding window"),
        ({"scales": []}, r"evaluation.scales is \[\]"),
        ({"scales": [1.0, 0]}, r"evaluation.scales is \[1.0, 0\]; expected a list of numbers above 0"),
        ({"scales": [math.nan]}, "evaluation.scales is"),
        ({"dtype": "half"}, "evaluation.dtype is 'half'; expected one of float32, float16, bfloat16"),
        ({"batch_size": 0}, "evaluation.batch_size is 0; expected at least 1"),
        ({"tile_size": 100}, "evaluation.tile_size is 100; expected a multiple of 32"),
        ({"tile_size": 32}, "evaluation.tile_size is 32; expected a multiple of 32 pixels, 64 or more"),
        ({"tile_size": 128.0}, "evaluation.tile_size is 128.0"),
        ({"tile_size": 128, "tile_overlap": 16}, "evaluation.tile_overlap is 16; .* from 0 to 96, for tiles of 128"),
        ({"tile_size": 128, "tile_overlap": 128}, "evaluation.tile_overlap is 128"),
        ({"tile_overlap": -32}, "evaluation.tile_overlap is -32"),
        ({"scales": [math.inf]}, "evaluation.scales is"),
    ],
)
def test_options_out_of_range_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        InferenceOptions(**keywords)


@pytest.mark.parametrize(
    ("data", "names", "message"),
    [
        ([], None, "the data set to evaluate on is empty"),
        (rows(1), ["road"], "names has 1 entries; expected one for each of the model's 5 classes"),
        (
            [*rows(1), {"image": make_image(), "label": np.full((70, 110), 7)}],
            None,
            r"row 1 of the data: labels hold \[7\]",
        ),
        (
            [{"image": make_image(), "label": Image.new("RGB", (110, 70))}],
            None,
            "row 0 of the data: its mask is a PIL",
        ),
        ([{"image": np.zeros((4, 70, 110)), "label": np.zeros((70, 110), int)}], None, "row 0 .* has 4 bands"),
    ],
)
def test_invalid_data_are_refused(model, processor, data, names, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, processor, data, names=names, progress=False)


def test_unreadable_file_is_named(model, processor, tmp_path):
    data = [{"image": str(tmp_path / "gone.png"), "label": np.zeros((70, 110), int)}]
    with pytest.raises(OSError, match=r"row 0 of the data.*gone.png"):
        evaluate(model, processor, data, progress=False)


RECIPE = """
[model]
variant = "b0"
[data]
source = "shapes"
title = "Shapes"
image_size = 48
num_train = 1
num_eval = 3
[evaluation]
flip = true
[trainer]
output_dir = "somewhere"
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    def save(names=NAMES, folder=tmp_path / "model", processor=True):
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
        lively(SegFormerConfig(**TINY, **labels)).save_pretrained(folder)
        if processor:
            SegFormerImageProcessor(do_resize=False).save_pretrained(folder)
        return folder

    return save


def main(arguments):
    """Run `segformer evaluate MODEL --recipe RECIPE ...`; the first two arguments are model and recipe."""
    model, recipe, *others = map(str, arguments)
    return command(["evaluate", model, "--recipe", recipe, *others])


def error_of(capsys, *arguments):
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("segformer: ")
    return error


def test_program_prints_a_table_and_writes_metrics_and_figures(checkpoint, recipe, capsys):
    folder = checkpoint()
    assert main([str(folder), str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
    assert "of all pixels are correct" in printed
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["dataset"] == {"title": "Shapes", "split": "validation", "images": 3}
    assert metrics["method"]["flip"] is True
    assert [entry["name"] for entry in metrics["classes"]] == list(NAMES)
    for name in ("confusion.png", "worst.png"):
        with Image.open(folder / name) as drawn:
            assert min(drawn.size) > 100


def test_program_takes_options_and_output_folder(checkpoint, recipe, tmp_path):
    folder, out = checkpoint(processor=False), tmp_path / "a" / "b"
    arguments = [
        str(folder),
        str(recipe),
        "evaluation.sliding_window=32",
        "evaluation.flip=false",
        "--output-dir",
        str(out),
    ]
    assert main(arguments) == 0
    assert json.loads((out / "metrics.json").read_text())["method"]["sliding_window"] == 32
    assert not (folder / "metrics.json").exists()


def test_a_binary_checkpoint_is_judged_on_two_classes(checkpoint, recipe, tmp_path):
    data = tmp_path / "data"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (data / kind / split).mkdir(parents=True)
        for index in range(2):
            labels = np.zeros((40, 56), dtype=np.uint8)
            labels[10:20, index : index + 30] = 1
            make_image(40, 56, index).save(data / "images" / split / f"{index}.png")
            Image.fromarray(labels).save(data / "masks" / split / f"{index}.png")
    folder = checkpoint(names=("crack",))
    overrides = ["data.source=folders", f"data.root={data}", 'data.names=["crack"]', "data.num_eval=0"]
    assert main([str(folder), str(recipe), *overrides]) == 0
    classes = json.loads((folder / "metrics.json").read_text())["classes"]
    assert [entry["name"] for entry in classes] == ["background", "crack"]
    assert classes[1]["pixels"] == 600


def test_a_recipe_is_evaluated_with_the_models_own_ignore_index(checkpoint, recipe, tmp_path):
    """The masks' 255, which is ignored, becomes the label that the checkpoint leaves out."""
    data = tmp_path / "data"
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (data / kind / split).mkdir(parents=True)
        labels = np.zeros((40, 56), dtype=np.uint8)
        labels[:10], labels[30:] = 255, 1
        make_image(40, 56).save(data / "images" / split / "0.png")
        Image.fromarray(labels).save(data / "masks" / split / "0.png")
    folder = checkpoint(names=("road", "sky"))
    config = SegFormerConfig.from_pretrained(folder, semantic_loss_ignore_index=200)
    config.save_pretrained(folder)
    overrides = ["data.source=folders", f"data.root={data}", 'data.names=["road", "sky"]', "data.num_eval=0"]
    assert main([str(folder), str(recipe), *overrides, "--group", "0"]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [entry["pixels"] for entry in metrics["classes"]] == [20 * 56, 10 * 56]


def test_other_classes_are_refused_with_both_lists(checkpoint, recipe, capsys):
    folder = checkpoint(names=("road", "sky"))
    assert error_of(capsys, folder, recipe).endswith(
        f"has 2 classes, road, sky; expected the 7 of the data: {', '.join(NAMES)}"
    )
    reordered = checkpoint(names=NAMES[::-1])
    assert "has 7 classes, star," in error_of(capsys, reordered, recipe)
    assert not (folder / "metrics.json").exists()


def test_weights_without_class_names_are_taken_for_as_many_classes(checkpoint, recipe):
    assert main([str(checkpoint(names=[f"LABEL_{index}" for index in range(len(NAMES))])), str(recipe)]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["nowhere"], "no such file or folder: nowhere"),
        (["./no/where"], "there is no folder no/where"),
        (["MODEL", "evaluation.flipp=true"], "did you mean 'evaluation.flip'"),
        (["MODEL", "evaluation.sliding_window=7"], "evaluation.sliding_window is 7"),
        (["MODEL", "--output-dir", "RECIPE"], "cannot be written"),
        (["RECIPE"], "is no checkpoint"),
    ],
)
def test_errors_are_one_line(checkpoint, recipe, capsys, change, message):
    places = {"MODEL": str(checkpoint()), "RECIPE": str(recipe)}
    first, *others = (places.get(argument, argument) for argument in change)
    assert message in error_of(capsys, first, recipe, *others)


@pytest.mark.parametrize("missing", ["no/such/folder", "runs/none"])
def test_missing_checkpoint_is_one_line(recipe, missing):
    """A path beside the recipe's run is no name of a repository."""
    arguments = ["evaluate", missing, "--recipe", str(recipe), "trainer.output_dir=runs/shapes"]
    command = [sys.executable, "-m", "segformer_command", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert missing in run.stderr
    assert run.stderr.count("\n") == 1


def test_debug_shows_the_traceback(recipe, capsys):
    assert main(["nowhere", str(recipe), "--debug"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert "FileNotFoundError" in error
    assert error.endswith("segformer: no such file or folder: nowhere\n")
