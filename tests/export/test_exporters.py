"""Exported files give PyTorch's answers in their own runtimes, at any size, and what can not be exported is refused."""

import json
import os
import sys
import weakref
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import parametrizations

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.cli.main import main
from hf_segformer.data.pairing import decode_dataset, find_images, pair_images_and_masks
from hf_segformer.evaluation.evaluate import evaluate
from hf_segformer.export.exportable import DeployedSegFormer, PicturesToLabels, resize, trace
from hf_segformer.export.exporters import (
    TARGETS,
    ExportConfig,
    add_mean_iou,
    export_model,
    format_report,
    in_half,
)
from hf_segformer.export.quantization import to_int8
from hf_segformer.export.runtimes import (
    ParityReport,
    RuntimeModel,
    onnx_runtime,
    open_vino,
    smooth_pictures,
    torch_program,
)
from hf_segformer.export.verification import ReferenceOutputs
from hf_segformer.upsampling_segformer import upsample
from tests.support.tiny import TINY, assert_same, logits_of

SIZES = [(1, 64, 64), (3, 101, 67), (2, 75, 160)]  # pictures, height, width


def build(**overrides):
    """A tiny model whose BatchNorm does something."""
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**{**TINY, "num_labels": 5, **overrides})).eval()
    norm = model.decode_head.batch_norm
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def processor():
    return SegFormerImageProcessor(size={"height": 64, "width": 96})


@pytest.fixture(scope="module", autouse=True)
def _trace_once():
    """Tracing takes seconds, and all that is exported here is the one model, alone or with the one processor."""
    programs = {}

    def trace_once(network):
        if type(network) not in programs:
            programs[type(network)] = trace(network)
        return programs[type(network)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_segformer.export.exporters.trace", trace_once)
        yield


def rows_of(folder):
    return decode_dataset(pair_images_and_masks(folder / "images", folder / "labels"), 3, 5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two folders, of pictures and of label maps."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for index, picture in enumerate(smooth_pictures(2, 80, 112, 3, seed=5)):
        picture.save(folder / "images" / f"{index}.png")
        Image.fromarray(np.full((80, 112), index, dtype=np.uint8)).save(folder / "labels" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def onnx_folder(model, processor, data, tmp_path_factory):
    """model.onnx with all that may lie beside it, and the figures."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("onnx")
    pictures, labelled = find_images(data / "images"), rows_of(data)
    request = ExportConfig(
        "onnx", float16=True, int8="static", calibration=pictures, pictures=pictures, labelled=labelled
    )
    figures = export_model(model, processor, folder, request)
    assert json.loads((folder / "export.json").read_text()) == figures
    return folder, figures


def assert_agrees(runtime, model):
    for num, height, width in SIZES:
        pixels = torch.randn(num, 3, height, width)
        expected = logits_of(model, pixels)
        assert (runtime(pixels) - expected).abs().max() < 1e-4 * expected.abs().max()


def operations(path):
    import onnx

    return Counter(node.op_type for node in onnx.load(path).graph.node)


# --- The network ------------------------------------------------------------------------------------------------------


def test_the_deployed_head_gives_the_models_logits_and_has_no_norm_left(model, images):
    before = deepcopy(model.state_dict())
    deployed = DeployedSegFormer(model)
    assert_same(deployed(images), logits_of(model, images))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_in_training_and_in_short_floats_is_exported_as_it_would_answer(model, images):
    short = deepcopy(model).bfloat16().train()
    deployed = DeployedSegFormer(short)
    assert_same(deployed(images), logits_of(short.eval().float(), images))


def wrapped_in_lora():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(build(), peft.LoraConfig(target_modules=["query"]))


def with_lora_inside():
    return wrapped_in_lora().base_model.model


def hooked():
    model = build()
    model.segformer.encoder.block[0][0].mlp.dense1.register_forward_hook(lambda *_: None)
    return model


def parametrized():
    model = build()
    parametrizations.weight_norm(model.decode_head.linear_c[0].proj)
    return model


def without_statistics():
    model = build()
    model.decode_head.batch_norm = nn.BatchNorm2d(16, track_running_stats=False)
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21 asks for it
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (wrapped_in_lora, "PeftModel.*merge_and_unload"),
        (with_lora_inside, "query.*LoRA.*merge_and_unload"),
        (hooked, r"dense1 is a Linear.*hooks"),
        (parametrized, r"linear_c\.0\.proj"),
        (without_statistics, "can not be folded"),
        (lambda: build().segformer, "SegFormerModel, but SegFormerForSemanticSegmentation"),
    ],
)
def test_a_layer_that_is_not_what_it_seems_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        DeployedSegFormer(make())


@pytest.mark.parametrize("old", [(70, 90), (150, 131), (64, 500), (40, 50)])
def test_resizing_in_the_graph_is_pils_but_for_one_grey_level(old):
    noise = np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(noise).resize((96, 64), Image.Resampling.BILINEAR)).astype(int)
    found = resize(torch.from_numpy(noise).permute(2, 0, 1)[None].float(), (64, 96), as_bytes=True)
    difference = np.abs(found[0].permute(1, 2, 0).numpy() - expected)
    assert difference.max() <= 1
    # Pillow 13 rounds otherwise than 12: more values lie one level off, none two.
    assert (difference > 0).mean() < (0.03 if int(PIL.__version__.split(".")[0]) < 13 else 0.35)


@pytest.mark.parametrize(
    ("keywords", "bands", "num_labels"),
    [
        ({"size": {"height": 64, "width": 96}}, 3, 5),
        ({"size": {"height": 64, "width": 96}}, 3, 1),
        (
            {"size": {"height": 64, "width": 96}, "image_mean": [90] * 4, "image_std": [50] * 4, "do_rescale": False},
            4,
            5,
        ),
        ({"size": {"shortest_edge": 64}, "keep_ratio": True, "size_divisor": 32}, 3, 5),
        ({"do_resize": False, "do_normalize": False}, 3, 5),
        ({"size": 64, "resample": Image.Resampling.BICUBIC}, 3, 5),
    ],
)
def test_processing_in_the_graph_gives_the_processors_labels(keywords, bands, num_labels):
    model, processor = build(num_channels=bands, num_labels=num_labels), SegFormerImageProcessor(**keywords)
    with torch.no_grad():  # so that a single label is given to some pixels
        model.decode_head.classifier.bias -= logits_of(model, torch.randn(1, bands, 64, 96)).mean()
    network = PicturesToLabels(DeployedSegFormer(model), processor)
    reference = ReferenceOutputs(model, processor, network)
    cases = list(reference.cases(smooth_pictures(2, 100, 150, bands, seed=3)))
    assert len({tuple(inputs.shape) for inputs, _ in cases}) >= 3
    for inputs, logits in cases:
        assert inputs.dtype == (torch.uint8 if bands == 3 else torch.float32)
        agreement = reference.agreement(network, inputs, logits)
        assert agreement.relative_error < (1e-2 if network.size else 1e-5)
        assert agreement.equal_labels > 0.995
    assert len(network(cases[1][0]).unique()) > 1


def test_a_picture_in_a_labelling_graph_gives_what_post_processing_gives(model, processor):
    [picture] = smooth_pictures(1, 150, 200, 3)
    pixels = processor(picture, return_tensors="pt").pixel_values
    outputs = {"logits": logits_of(model, pixels)}
    [expected] = processor.post_process_semantic_segmentation(outputs, target_sizes=[(150, 200)])
    found = PicturesToLabels(DeployedSegFormer(model), processor)(torch.from_numpy(np.array(picture))[None])
    assert found.shape == (1, 150, 200)
    assert (found[0] == expected).double().mean() > 0.999


# --- Each runtime -----------------------------------------------------------------------------------------------------


def test_onnx_takes_any_size_and_says_nothing_of_this_machine(onnx_folder, model):
    onnx = pytest.importorskip("onnx")
    folder, figures = onnx_folder
    assert_agrees(onnx_runtime(folder / "model.onnx"), model)
    graph = onnx.load(folder / "model.onnx").graph
    assert [dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim] == ["batch", "", "height", "width"]
    assert [each.name for each in (*graph.input, *graph.output)] == ["pixel_values", "logits"]
    content = (folder / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert os.path.dirname(__file__).encode() not in content
    kinds = operations(folder / "model.onnx")
    assert kinds["BatchNormalization"] == 0
    assert kinds["Gelu"] == 4
    assert figures["files"]["model.onnx"]["relative_error"] < 1e-4
    assert [each["shape"] for each in figures["files"]["model.onnx"]["compared"]][-2:] == [[1, 3, 64, 96]] * 2


def test_float16_keeps_norms_and_softmax_full_and_says_how_near_it_is(onnx_folder, model):
    onnx = pytest.importorskip("onnx")
    folder, figures = onnx_folder
    weights = onnx.load(folder / "model_fp16.onnx").graph.initializer
    floats = Counter(each.data_type for each in weights)
    assert floats[onnx.TensorProto.FLOAT16] > 40
    assert operations(folder / "model_fp16.onnx")["Cast"] >= 2 * (19 + 4)  # LayerNorms and softmaxes stand in float32
    pixels = torch.randn(2, 3, 75, 130)
    found, expected = onnx_runtime(folder / "model_fp16.onnx")(pixels), logits_of(model, pixels)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 5e-3 * expected.abs().max()
    each = figures["files"]["model_fp16.onnx"]
    assert 0 < each["relative_error"] < 5e-3
    assert 0 < each["half_arithmetic"]["relative_error"] < 1e-2
    assert each["bytes"] < 0.7 * figures["files"]["model.onnx"]["bytes"]


def test_static_int8_quantises_convolutions_too_and_is_judged_on_labels(onnx_folder, model, processor, data):
    folder, figures = onnx_folder
    kinds = operations(folder / "model_quantized.onnx")
    assert kinds["QuantizeLinear"] > 10
    assert kinds["DynamicQuantizeLinear"] == 0
    each = figures["files"]["model_quantized.onnx"]
    assert each["kind"] == "static"
    assert 0 < each["relative_error"] < 1
    rows = rows_of(data)
    assert figures["files"]["model.onnx"]["mean_iou_in_pytorch"] == evaluate(model, processor, rows).metrics["mean_iou"]
    quantised = RuntimeModel(onnx_runtime(folder / "model_quantized.onnx"), model.config)
    assert each["mean_iou"] == evaluate(quantised, processor, rows).metrics["mean_iou"]
    assert each["labelled_pictures"] == 2


def test_dynamic_int8_quantises_products_by_their_own_range(onnx_folder, model, tmp_path):
    folder, _ = onnx_folder
    to_int8(folder / "model.onnx", tmp_path / "dynamic.onnx")
    kinds = operations(tmp_path / "dynamic.onnx")
    assert kinds["MatMulInteger"] == 24  # all but those of two activations in attention; the head has convolutions
    assert kinds["Conv"] == 16
    pixels = torch.randn(2, 3, 75, 130)
    found, expected = onnx_runtime(tmp_path / "dynamic.onnx")(pixels), logits_of(model, pixels)
    assert 0 < (found - expected).abs().max() < 0.3 * expected.abs().max()


def test_pictures_to_calibrate_on_are_not_held_all_at_once(onnx_folder, tmp_path):
    seen = []

    def pictures():
        for _ in range(4):
            pixels = torch.randn(1, 3, 64, 96)
            seen.append(weakref.ref(pixels))
            yield pixels
            del pixels
            assert sum(each() is not None for each in seen) <= 1

    to_int8(onnx_folder[0] / "model.onnx", tmp_path / "static.onnx", pictures())
    assert len(seen) == 4


def test_openvino_takes_any_size(model, processor, tmp_path):
    pytest.importorskip("openvino")
    figures = export_model(model, processor, tmp_path, ExportConfig("openvino"))
    assert {"model.xml", "model.bin"} <= set(os.listdir(tmp_path))
    assert_agrees(open_vino(tmp_path / "model.xml"), model)
    weights = sum(parameter.numel() for parameter in DeployedSegFormer(model).parameters())
    assert figures["files"]["model.xml"]["bytes"] > 4 * weights  # in float32


def test_openvino_takes_pictures_and_gives_label_maps(model, processor, tmp_path):
    pytest.importorskip("openvino")
    figures = export_model(model, processor, tmp_path, ExportConfig("openvino", with_processing=True))
    assert figures["input"] == "pictures, uint8 (batch, height, width, 3)"
    pictures = torch.stack([torch.from_numpy(np.array(each)) for each in smooth_pictures(2, 70, 131, 3, seed=9)])
    found = open_vino(tmp_path / "model.xml")(pictures)
    expected = PicturesToLabels(DeployedSegFormer(model), processor)(pictures)
    assert found.dtype == torch.int32
    assert (found == expected).double().mean() > 0.999


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"target": "tensorrt"}, "'tensorrt', but it must be one of onnx, openvino, torch, transformers.js"),
        ({"target": "onnx", "int8": "both"}, "'both', but it must be one of dynamic, static"),
        ({"target": "torch", "float16": True}, "not for torch"),
        ({"target": "openvino", "int8": "dynamic"}, "not for openvino"),
        ({"target": "onnx", "int8": "dynamic", "with_processing": True}, "of the network alone"),
        ({"target": "transformers.js", "with_processing": True}, "does the processing itself"),
        ({"target": "onnx", "labelled": [{}], "with_processing": True}, "measured on logits"),
        ({"target": "onnx", "int8": "static"}, "needs pictures to calibrate on"),
        ({"target": "onnx", "int8": "dynamic", "calibration": ["a.png"]}, "for static int8 only"),
    ],
)
def test_what_does_not_go_together_is_refused(keywords, words):
    with pytest.raises(ValueError, match=words):
        ExportConfig(**keywords)


def test_a_missing_package_is_named_with_what_installs_it(model, processor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"openvino is not installed: pip install 'hf-segformer\[export\]'"):
        export_model(model, processor, tmp_path, ExportConfig("openvino"))


def test_a_package_may_come_under_another_name(model, processor, tmp_path, monkeypatch):
    """As onnxruntime does from onnxruntime-gpu."""
    monkeypatch.setitem(sys.modules, "renamed", SimpleNamespace(__version__="7.1"))
    monkeypatch.setitem(TARGETS, "torch", replace(TARGETS["torch"], packages=("renamed",)))
    assert export_model(model, processor, tmp_path, ExportConfig("torch"))["versions"]["renamed"] == "7.1"


def test_one_label_is_nothing_for_transformers_js(processor, tmp_path):
    for name in TARGETS["transformers.js"].packages:
        pytest.importorskip(name)
    with pytest.raises(ValueError, match="one label"):
        export_model(build(num_labels=1), processor, tmp_path, ExportConfig("transformers.js"))


def test_float16_that_overflows_is_refused(model, processor):
    model = deepcopy(model)
    with torch.no_grad():
        model.decode_head.classifier.weight *= 1e6
    deployed = DeployedSegFormer(model)
    with pytest.raises(ValueError, match="in float16 the network overflows"):
        in_half(deployed, ReferenceOutputs(model, processor, deployed), ExportConfig("onnx", float16=True))


def test_a_picture_that_is_too_small_for_the_graph_is_named(model, tmp_path):
    processor = SegFormerImageProcessor(do_resize=False)
    reference = ReferenceOutputs(model, processor, DeployedSegFormer(model))
    Image.new("RGB", (90, 40)).save(tmp_path / "small.png")
    for picture, name in ((tmp_path / "small.png", "small.png"), (Image.new("RGB", (90, 40)), "a picture to compare")):
        with pytest.raises(ValueError, match=rf"{name}.* at 40x90 pixels, but sides must be 64 at least"):
            list(reference.cases([picture]))


@pytest.mark.parametrize("keywords", [{"size": 32}, {"size": {"shortest_edge": 48}, "keep_ratio": True}])
def test_a_processor_that_makes_pictures_too_small_for_a_graph_is_told(keywords, model):
    processor, deployed = SegFormerImageProcessor(**keywords), DeployedSegFormer(model)
    with pytest.raises(ValueError, match=r"processor makes (32x32|48x60) of a picture, but sides must be 64"):
        ReferenceOutputs(model, processor, deployed)
    if "keep_ratio" not in keywords:  # the graph resizes
        ReferenceOutputs(model, processor, PicturesToLabels(deployed, processor))


def test_files_of_bands_are_compared_on_like_any_labelled_picture(tmp_path):
    model = build(num_channels=5)
    processor = SegFormerImageProcessor(size=64, image_mean=[0.5] * 5, image_std=[0.3] * 5, do_rescale=False)
    bands = np.random.default_rng(0).random((5, 70, 90), dtype=np.float32)
    np.save(tmp_path / "scene.npy", bands)
    [path] = find_images(tmp_path)
    *_, (inputs, _) = ReferenceOutputs(model, processor, DeployedSegFormer(model)).cases([path])
    assert torch.equal(inputs, processor(bands, return_tensors="pt").pixel_values)


def test_label_maps_without_a_pixel_that_counts_are_told(model, processor, tmp_path):
    [picture] = smooth_pictures(1, 80, 112, 3)
    labelled = [{"image": picture, "label": np.full((80, 112), 255, dtype=np.uint8)}]
    with pytest.raises(ValueError, match="no pixel of the label maps counts"):
        export_model(model, processor, tmp_path, ExportConfig("torch", labelled=labelled))


def test_masks_of_0_and_255_are_not_taken_for_masks_of_nothing(processor, tmp_path):
    model = build(num_labels=1)
    mask = np.zeros((80, 112), dtype=np.uint8)
    mask[:40] = 255
    request = ExportConfig("torch", labelled=[{"image": smooth_pictures(1, 80, 112, 3)[0], "label": mask}])
    reference = ReferenceOutputs(model, processor, DeployedSegFormer(model))
    with pytest.raises(ValueError, match="is of 'LABEL_0': where 255 stands for it, give --label-values 0 255"):
        add_mean_iou({}, tmp_path, TARGETS["torch"], reference, request)


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_the_command_writes_a_torch_program_for_any_size_and_says_how_near_it_is(
    checkpoint, model, data, tmp_path, capsys
):
    destination = tmp_path / "exported"
    images = ("--images", data / "images", "--labels", data / "labels", "--label-values", *range(5))
    assert run("export", checkpoint, destination, "--to", "torch", *images) == 0
    assert sorted(os.listdir(destination)) == ["config.json", "export.json", "model.pt2", "preprocessor_config.json"]
    printed = capsys.readouterr().out
    assert "takes pixel_values, float32 (batch, 3, height, width)" in printed
    assert "model.pt2 in torch.export: 100.000% of the labels are PyTorch's" in printed
    assert "mean IoU" in printed
    assert "warning" not in printed
    assert printed.endswith(f"written to {destination}\n")
    assert_agrees(torch_program(destination / "model.pt2"), model)
    assert SegFormerConfig.from_pretrained(destination).num_labels == 5
    assert SegFormerImageProcessor.from_pretrained(destination).size == {"height": 64, "width": 96}


def test_a_file_with_other_answers_is_refused_and_leaves_nothing(checkpoint, model, tmp_path, capsys, monkeypatch):
    deployed = DeployedSegFormer(model)
    for wrong, words in ((0.01, "of the largest logit off PyTorch's"), (float("nan"), "not finite")):
        target = replace(
            TARGETS["torch"],
            write=lambda program, path: path.write_text("a file"),
            run=lambda path, wrong=wrong: lambda inputs: deployed(inputs) + wrong,
        )
        monkeypatch.setitem(TARGETS, "torch", target)
        assert run("export", checkpoint, tmp_path / "exported", "--to", "torch") == 1
        error = capsys.readouterr().err
        assert error.startswith("segformer: model.pt2 in torch.export")
        assert words in error
        assert error.count("\n") == 1
        assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "torch", "--labels", "labels"], "--images DIR"),
        (["--to", "torch", "--images", "empty"], "holds no pictures"),
        (["--to", "torch", "--images", "nowhere"], "nowhere"),
        (["--to", "torch", "--images", "images", "--labels", "others"], "1.png"),
        (["--to", "torch", "--fp16"], "not for torch"),
        (["--to", "torch", "--label-values", "0", "255"], "--labels DIR"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, words, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    os.symlink(data / "images", "images")
    os.mkdir("others")
    os.symlink(data / "labels" / "0.png", "others/0.png")
    assert run("export", "model", "exported", *arguments) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not os.path.exists("exported")


def test_a_destination_with_files_is_left_alone(checkpoint, model, processor, capsys):
    before = (checkpoint / "config.json").read_text()
    assert run("export", checkpoint, checkpoint, "--to", "torch") == 1
    assert "a new or an empty folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be an empty folder"):
        export_model(model, processor, checkpoint, ExportConfig("torch"))
    assert (checkpoint / "config.json").read_text() == before


# --- The figures ------------------------------------------------------------------------------------------------------


def test_agreement_counts_labels_at_the_pictures_size():
    logits = torch.randn(1, 3, 4, 5)
    other = logits.clone()
    other[0, :, 0, 0] = logits[0, :, 0, 0].flip(0)
    same = ParityReport.of_logits((1, 3, 16, 20), logits, logits, (16, 20))
    assert (same.max_error, same.equal_labels) == (0, 1)
    differs = ParityReport.of_logits((1, 3, 16, 20), other, logits, (16, 20))
    assert differs.max_error == pytest.approx((other - logits).abs().max().item())
    large = [upsample(each, (16, 20)).argmax(1) for each in (other, logits)]
    assert differs.equal_labels == pytest.approx((large[0] == large[1]).double().mean().item())
    assert differs.equal_labels < 1


def test_agreement_of_label_maps_is_by_how_much_a_label_is_not_the_best():
    logits = torch.tensor([1.0, 3.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    found = torch.ones(1, 8, 8, dtype=torch.int32)
    assert ParityReport.of_labels((1, 8, 8, 3), found, logits, (8, 8)).max_error == 0
    found[0, 0, 0] = 2
    agreement = ParityReport.of_labels((1, 8, 8, 3), found, logits, (8, 8))
    assert (agreement.max_error, agreement.equal_labels) == (1, 63 / 64)
    found[0, 0, 0] = 3
    assert ParityReport.of_labels((1, 8, 8, 3), found, logits, (8, 8)).relative_error == float("inf")


def test_a_file_that_often_disagrees_is_warned_of(onnx_folder):
    figures = deepcopy(onnx_folder[1])
    figures["files"] = {"model_quantized.onnx": {**figures["files"]["model_quantized.onnx"], "equal_labels": 0.9}}
    assert "warning: model_quantized.onnx gives other labels than PyTorch at 10.0% of the pixels" in format_report(
        figures
    )
