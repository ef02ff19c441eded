"""Exports: parity in their own runtimes at any size, refusals, and the report."""

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

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.cli.main import main
from hf_segformer.data.pairing import decode_dataset, find_images, pair_images_and_masks
from hf_segformer.evaluation.evaluate import evaluate
from hf_segformer.export.exportable import DeployedSegFormer, SegFormerWithProcessing, resize, trace
from hf_segformer.export.exporters import (
    ExportConfig,
    _describe,
    add_mean_iou,
    export_model,
    format_report,
    in_half,
)
from hf_segformer.export.metadata import describe_model, openvino_info
from hf_segformer.export.quantization import to_int8
from hf_segformer.export.runtimes import RuntimeModel, onnx_runtime, open_vino, torch_program
from hf_segformer.export.targets import TARGETS
from hf_segformer.export.verification import ParityReport, ReferenceOutputs, smooth_images
from hf_segformer.image_processing_segformer import range_limits
from hf_segformer.upsampling_segformer import upsample
from tests.support.tiny import TINY, assert_same, logits_of

SIZES = [(1, 64, 64), (3, 101, 67), (2, 75, 160)]  # images, height, width


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
    """Share the traces, which take seconds: one model is exported here, alone or with one processor."""
    programs = {}

    def trace_once(network, max_size=None):
        if type(network) not in programs:
            programs[type(network)] = trace(network, max_size)
        return programs[type(network)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_segformer.export.exporters.trace", trace_once)
        yield


def rows_of(folder):
    return decode_dataset(pair_images_and_masks(folder / "images", folder / "labels"), 3, 5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two folders, of images and of masks."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for index, image in enumerate(smooth_images(2, 80, 112, 3, seed=5)):
        image.save(folder / "images" / f"{index}.png")
        Image.fromarray(np.full((80, 112), index, dtype=np.uint8)).save(folder / "labels" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def onnx_folder(model, processor, data, tmp_path_factory):
    """model.onnx with every file that may be beside it, and the figures."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("onnx")
    images, dataset = find_images(data / "images"), rows_of(data)
    export_config = ExportConfig(
        "onnx", float16=True, int8="static", calibration=images, images=images, dataset=dataset
    )
    figures = export_model(model, processor, folder, export_config)
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
        (hooked, r"dense1 is a modified Linear.*hooks"),
        (parametrized, r"linear_c\.0\.proj"),
        (without_statistics, "the decode head is modified"),
        (lambda: build().segformer, "SegFormerModel; expected SegFormerForSemanticSegmentation"),
    ],
)
def test_a_modified_layer_is_refused(make, words):
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
def test_processing_in_the_graph_gives_the_processors_predictions(keywords, bands, num_labels):
    model, processor = build(num_channels=bands, num_labels=num_labels), SegFormerImageProcessor(**keywords)
    with torch.no_grad():  # so that a single label is given to some pixels
        model.decode_head.classifier.bias -= logits_of(model, torch.randn(1, bands, 64, 96)).mean()
    network = SegFormerWithProcessing(DeployedSegFormer(model), processor)
    reference = ReferenceOutputs(model, processor, network)
    cases = list(reference.cases(smooth_images(2, 100, 150, bands, seed=3)))
    assert len({tuple(inputs.shape) for inputs, _ in cases}) >= 3
    for inputs, logits in cases:
        assert inputs.dtype == (torch.uint8 if bands == 3 else torch.float32)
        agreement = reference.compare(network, inputs, logits)
        assert agreement.relative_error < (1e-2 if network.size else 1e-5)
        assert agreement.pixel_agreement > 0.995
    assert len(network(cases[1][0]).unique()) > 1


def test_processing_in_the_graph_equals_post_processing(model, processor):
    [image] = smooth_images(1, 150, 200, 3)
    pixels = processor(image, return_tensors="pt").pixel_values
    outputs = {"logits": logits_of(model, pixels)}
    [expected] = processor.post_process_semantic_segmentation(outputs, target_sizes=[(150, 200)])
    found = SegFormerWithProcessing(DeployedSegFormer(model), processor)(torch.from_numpy(np.array(image))[None])
    assert found.shape == (1, 150, 200)
    assert (found[0] == expected).double().mean() > 0.999


@pytest.mark.parametrize(
    ("keywords", "dtype"),
    [
        ({"size": {"height": 64, "width": 96}, "value_range": [0, 100]}, torch.uint8),
        ({"do_resize": False, "value_range": {"center": 120, "width": 90}}, torch.uint8),
        ({"size": {"height": 64, "width": 96}, "value_range": [300, 2000]}, torch.float32),
        (
            {"do_resize": False, "value_range": {"center": 40, "width": 400}, "image_mean": [0.5], "image_std": [0.3]},
            None,
        ),
    ],
)
def test_a_fixed_value_range_is_in_the_graph(keywords, dtype):
    processor = SegFormerImageProcessor(**keywords)
    bands = len(processor.image_mean)
    model = build(num_channels=bands)
    low, high = range_limits(processor.value_range)
    images = [low + np.array(each) / 255 * 1.2 * (high - low) for each in smooth_images(2, 100, 150, bands, seed=3)]
    images = [each.clip(0, 255).astype(np.uint8) if dtype == torch.uint8 else each for each in images]
    network = SegFormerWithProcessing(DeployedSegFormer(model), processor)
    reference = ReferenceOutputs(model, processor, network)
    for inputs, logits in reference.cases(images):
        assert inputs.dtype == (dtype or torch.float32)
        agreement = reference.compare(network, inputs, logits)
        assert agreement.relative_error < 1e-5
        assert agreement.pixel_agreement > 0.999
    expected = SegFormerPredictor(model, processor)(images[0]).segmentation
    raw = torch.from_numpy(images[0])[None]
    found = network(raw if dtype == torch.uint8 else raw.float())[0]
    assert len(found.unique()) > 1
    assert (found.numpy() == np.asarray(expected)).mean() > 0.999


def test_verification_notices_a_graph_without_the_value_range(model):
    keywords = {"size": {"height": 64, "width": 96}}
    network = SegFormerWithProcessing(DeployedSegFormer(model), SegFormerImageProcessor(**keywords))
    ranged = SegFormerImageProcessor(**keywords, value_range=[0, 100])
    reference = ReferenceOutputs(model, ranged, network)
    assert max(reference.compare(network, *case).relative_error for case in reference.cases([])) > 2e-2


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        (
            {"value_range": {"percentiles": [2, 98]}},
            r"'percentiles': \[2, 98\]\}, a range of each image; expected a fixed",
        ),
        (
            {"value_range": [0, 100], "size": {"shortest_edge": 64}, "keep_ratio": True},
            r"value_range is \[0, 100\], which applies before .*\(the processor keeps the aspect ratio",
        ),
    ],
)
def test_a_value_range_that_no_graph_can_contain_is_refused(keywords, words, model):
    processor, deployed = SegFormerImageProcessor(**keywords), DeployedSegFormer(model)
    with pytest.raises(ValueError, match=words):
        SegFormerWithProcessing(deployed, processor)
    ReferenceOutputs(model, processor, deployed)  # outside the graph it is


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.full((64, 96, 3), 300, np.uint16), "not whole numbers from 0 to 255"),
        (np.ma.masked_less(np.arange(64 * 96 * 3).reshape(64, 96, 3) % 251, 9), "pixels without data"),
    ],
)
@pytest.mark.parametrize("value_range", [None, [0, 100]])
def test_an_image_that_a_graph_of_bytes_cannot_take_is_refused(value_range, image, words, model):
    processor = SegFormerImageProcessor(size={"height": 64, "width": 96}, value_range=value_range)
    reference = ReferenceOutputs(model, processor, SegFormerWithProcessing(DeployedSegFormer(model), processor))
    with pytest.raises(ValueError, match=words):
        reference.inputs(image)


def test_files_of_a_wide_range_are_read_for_a_value_range(model, tmp_path):
    Image.fromarray(np.full((70, 90), 70000, np.int32)).save(tmp_path / "wide.tif")
    processor = SegFormerImageProcessor(size=64, value_range=[0, 100_000])
    image = ReferenceOutputs(model, processor, DeployedSegFormer(model)).read(tmp_path / "wide.tif")
    assert np.asarray(image).max() == 70000


# --- Each runtime -----------------------------------------------------------------------------------------------------


def test_onnx_takes_any_size_and_contains_no_paths(onnx_folder, model):
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


def test_onnx_describes_classes_palette_and_processor_in_every_type(onnx_folder, model, processor):
    onnxruntime = pytest.importorskip("onnxruntime")
    expected = describe_model(model, processor, include_processing=False)
    for name in ("model.onnx", "model_fp16.onnx", "model_quantized.onnx"):
        session = onnxruntime.InferenceSession(onnx_folder[0] / name, providers=["CPUExecutionProvider"])
        found = session.get_modelmeta().custom_metadata_map
        assert {key: found[key] for key in expected} == expected
        assert found.keys() - expected.keys() <= {"onnx.infer"}  # ONNX Runtime's own, of quantised files


def test_float16_keeps_norms_and_softmax_in_float32_and_reports_parity(onnx_folder, model):
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


def test_static_int8_quantises_convolutions_and_reports_mean_iou(onnx_folder, model, processor, data):
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
    assert each["num_images"] == 2


def test_dynamic_int8_quantises_products_by_their_own_range(onnx_folder, model, tmp_path):
    folder, _ = onnx_folder
    to_int8(folder / "model.onnx", tmp_path / "dynamic.onnx")
    kinds = operations(tmp_path / "dynamic.onnx")
    assert kinds["MatMulInteger"] == 24  # all but those of two activations in attention; the head has convolutions
    assert kinds["Conv"] == 16
    pixels = torch.randn(2, 3, 75, 130)
    found, expected = onnx_runtime(tmp_path / "dynamic.onnx")(pixels), logits_of(model, pixels)
    assert 0 < (found - expected).abs().max() < 0.3 * expected.abs().max()


def test_calibration_images_are_read_one_at_a_time(onnx_folder, tmp_path):
    seen = []

    def images():
        for _ in range(4):
            pixels = torch.randn(1, 3, 64, 96)
            seen.append(weakref.ref(pixels))
            yield pixels
            del pixels
            assert sum(each() is not None for each in seen) <= 1

    to_int8(onnx_folder[0] / "model.onnx", tmp_path / "static.onnx", images())
    assert len(seen) == 4


@pytest.mark.slow
def test_openvino_takes_any_size(model, processor, tmp_path):
    pytest.importorskip("openvino")
    figures = export_model(model, processor, tmp_path, ExportConfig("openvino"))
    assert {"model.xml", "model.bin"} <= set(os.listdir(tmp_path))
    assert_agrees(open_vino(tmp_path / "model.xml"), model)
    weights = sum(parameter.numel() for parameter in DeployedSegFormer(model).parameters())
    assert figures["files"]["model.xml"]["bytes"] > 4 * weights  # in float32
    assert model_info(tmp_path / "model.xml") == openvino_info(describe_model(model, processor, False))
    assert str(tmp_path) not in (tmp_path / "model.xml").read_text()


def model_info(path):
    """Read what OpenVINO's own tools read."""
    import openvino

    found = openvino.Core().read_model(path).get_rt_info(["model_info"]).astype(dict)
    return {key: value.astype(str) for key, value in found.items()}


@pytest.mark.slow
def test_openvino_refuses_smaller_images_and_is_right_afterwards(model, processor, tmp_path):
    """Unbounded, it answered a 20x33 image with the previous one's shape."""
    pytest.importorskip("openvino")
    for name, include_processing in (("network", False), ("processing", True)):
        (tmp_path / name).mkdir()
        export_model(model, processor, tmp_path / name, ExportConfig("openvino", include_processing=include_processing))
        run = open_vino(tmp_path / name / "model.xml")
        for height, width in ((63, 96), (96, 20), (20, 33), (1, 1)):
            small = torch.zeros(1, height, width, 3).byte() if include_processing else torch.zeros(1, 3, height, width)
            with pytest.raises(RuntimeError, match="64"):
                run(small)
    assert_agrees(open_vino(tmp_path / "network" / "model.xml"), model)


def first_operations(path, number):
    """The first operations of a kind that may be quantised, each with what its first input comes from."""
    import onnx

    graph = onnx.load(path).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    kinds = ("MatMul", "MatMulInteger", "Conv")
    return [(node.op_type, made.get(node.input[0])) for node in graph.node if node.op_type in kinds][:number]


@pytest.mark.slow
def test_int8_with_processing_resizes_exactly_and_predicts_as_the_quantised_network(
    onnx_folder, model, processor, data, tmp_path
):
    export_config = ExportConfig(
        "onnx", include_processing=True, int8="static", calibration=find_images(data / "images")
    )
    figures = export_model(model, processor, tmp_path, export_config)["files"]["model_quantized.onnx"]
    assert figures["kind"] == "static"
    assert 0 < figures["relative_error"] < 1
    assert 0.8 < figures["pixel_agreement"] < 1
    static, dynamic = tmp_path / "model_quantized.onnx", tmp_path / "dynamic.onnx"
    to_int8(tmp_path / "model.onnx", dynamic)
    assert [kind for kind, _ in first_operations(dynamic, 3)] == ["MatMul", "MatMul", "Conv"]
    assert operations(dynamic)["MatMulInteger"] == 24
    found = first_operations(static, 3)
    assert [kind for kind, _ in found] == ["MatMul", "MatMul", "Conv"]
    assert [source == "DequantizeLinear" for _, source in found] == [False, False, True]
    images = smooth_images(2, 70, 131, 3, seed=9)
    pixels = processor(images, return_tensors="pt").pixel_values
    logits = onnx_runtime(onnx_folder[0] / "model_quantized.onnx")(pixels)  # calibrated on the same images
    expected = upsample(logits, (70, 131)).argmax(1)
    maps = onnx_runtime(static)(torch.stack([torch.from_numpy(np.array(each)) for each in images]))
    assert maps.dtype == torch.int32
    assert (maps == expected).double().mean() > 0.99


def test_int8_leaves_alone_what_precedes_the_network(tmp_path):
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    helper, random = onnx.helper, np.random.default_rng(0)
    shapes = {"resize": (4, 6), "kernel": (5, 3, 1, 1), "last": (6, 2)}
    weights = [
        onnx.numpy_helper.from_array(random.normal(size=shape).astype("float32"), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["images", "resize"], ["resized"], "before"),
        helper.make_node("Conv", ["resized", "kernel"], ["features"], "first"),
        helper.make_node("MatMul", ["features", "last"], ["logits"], "after"),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("images", (1, 3, 5, 4)), ("logits", (1, 5, 5, 2)))
    ]
    opset = [helper.make_opsetid("", 20)]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
    images = torch.randn(1, 3, 5, 4)
    expected = onnx_runtime(tmp_path / "model.onnx")(images)
    for name, calibration in (("dynamic", None), ("static", iter([images]))):
        to_int8(tmp_path / "model.onnx", tmp_path / f"{name}.onnx", calibration)
        [(kind, source), *_, (_, last)] = first_operations(tmp_path / f"{name}.onnx", 3)
        assert (kind, source) == ("MatMul", None)  # as it was, on the image itself
        assert last in ("DequantizeLinear", "DynamicQuantizeLinear")
        found = onnx_runtime(tmp_path / f"{name}.onnx")(images)
        assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_int8_takes_any_size_and_batch(kind, onnx_folder, model, tmp_path):
    calibration = (torch.randn(2, 3, 96, 128) for _ in range(2)) if kind == "static" else None
    to_int8(onnx_folder[0] / "model.onnx", tmp_path / "int8.onnx", calibration)
    run = onnx_runtime(tmp_path / "int8.onnx")
    for num, height, width in SIZES:
        pixels = torch.randn(num, 3, height, width)
        found, expected = run(pixels), logits_of(model, pixels)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 0.5 * expected.abs().max()
        one_by_one = torch.cat([run(each[None]) for each in pixels])
        assert (found - one_by_one).abs().max() < 0.5 * expected.abs().max()


@pytest.mark.parametrize(
    ("keywords", "include_processing", "words"),
    [
        ({"size": 64}, False, "not in the graph: the image processor"),
        ({"size": 64}, True, "in the graph, to 64x64"),
        ({"size": {"shortest_edge": 64}, "keep_ratio": True}, True, "not in the graph: the processor keeps the aspect"),
        ({"do_resize": False}, True, "none: images keep their size"),
    ],
)
def test_the_report_says_whether_the_graph_resizes(keywords, include_processing, words, model, tmp_path):
    target = replace(TARGETS["torch"], write=lambda program, path, metadata: path.write_text(""), run=lambda path: None)
    config = ExportConfig("torch", include_processing=include_processing)
    deployed, processor = DeployedSegFormer(model), SegFormerImageProcessor(**keywords)
    network = SegFormerWithProcessing(deployed, processor) if include_processing else deployed
    report = {**_describe(network, processor, config, target), "files": {}}
    assert words in report["resize"]
    assert f"resizing: {report['resize']}" in format_report(report)
    assert "sides: 64 pixels and up" in format_report(report)


@pytest.mark.slow
def test_openvino_maps_images_to_segmentation_maps(model, processor, tmp_path):
    pytest.importorskip("openvino")
    figures = export_model(model, processor, tmp_path, ExportConfig("openvino", include_processing=True))
    assert figures["input"] == "images, uint8 (batch, height, width, 3)"
    assert figures["resize"] == "in the graph, to 64x96 (height x width)"
    images = torch.stack([torch.from_numpy(np.array(each)) for each in smooth_images(2, 70, 131, 3, seed=9)])
    found = open_vino(tmp_path / "model.xml")(images)
    expected = SegFormerWithProcessing(DeployedSegFormer(model), processor)(images)
    assert found.dtype == torch.int32
    assert (found == expected).double().mean() > 0.999


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        (
            {"target": "tensorrt"},
            "'tensorrt'; expected one of onnx, openvino, torch, aoti, executorch, web, transformers.js",
        ),
        ({"target": "onnx", "int8": "both"}, "'both'; expected one of dynamic, static"),
        ({"target": "torch", "float16": True}, r"torch; expected onnx or transformers.js \(--to\)"),
        ({"target": "openvino", "int8": "dynamic"}, "openvino; expected onnx"),
        (
            {"target": "onnx", "float16": True, "int8": "dynamic", "include_processing": True},
            r"\(--include-processing\); leave it out .*\(--fp16\)",
        ),
        ({"target": "transformers.js", "include_processing": True}, "does the processing itself"),
        ({"target": "onnx", "dataset": [{}], "include_processing": True}, "to measure mean IoU"),
        ({"target": "onnx", "int8": "static"}, "--calibration-dir DIR"),
        ({"target": "onnx", "int8": "dynamic", "calibration": ["a.png"]}, "expected static"),
    ],
)
def test_options_that_exclude_each_other_are_refused(keywords, words):
    with pytest.raises(ValueError, match=words):
        ExportConfig(**keywords)


def test_a_missing_package_is_named_with_its_installation(model, processor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"openvino is not installed: pip install 'hf-segformer\[export\]'"):
        export_model(model, processor, tmp_path, ExportConfig("openvino"))


def test_a_package_may_come_under_another_name(model, processor, tmp_path, monkeypatch):
    """onnxruntime comes from onnxruntime-gpu, for one."""
    monkeypatch.setitem(sys.modules, "renamed", SimpleNamespace(__version__="7.1"))
    monkeypatch.setitem(TARGETS, "torch", replace(TARGETS["torch"], packages=("renamed",)))
    assert export_model(model, processor, tmp_path, ExportConfig("torch"))["versions"]["renamed"] == "7.1"


def test_one_label_is_refused_for_transformers_js(processor, tmp_path):
    for name in TARGETS["transformers.js"].packages:
        pytest.importorskip(name)
    with pytest.raises(ValueError, match="has 1 label"):
        export_model(build(num_labels=1), processor, tmp_path, ExportConfig("transformers.js"))


def test_float16_that_overflows_is_refused(model, processor):
    model = deepcopy(model)
    with torch.no_grad():
        model.decode_head.classifier.weight *= 1e6
    deployed = DeployedSegFormer(model)
    with pytest.raises(ValueError, match="not finite in float16"):
        in_half(deployed, ReferenceOutputs(model, processor, deployed), ExportConfig("onnx", float16=True))


def test_an_image_below_the_smallest_side_is_named(model, tmp_path):
    processor = SegFormerImageProcessor(do_resize=False)
    reference = ReferenceOutputs(model, processor, DeployedSegFormer(model))
    Image.new("RGB", (90, 40)).save(tmp_path / "small.png")
    for image, name in ((tmp_path / "small.png", "small.png"), (Image.new("RGB", (90, 40)), "an image to compare")):
        with pytest.raises(ValueError, match=rf"{name}.* at 40x90 pixels; expected sides of 64"):
            list(reference.cases([image]))


@pytest.mark.parametrize("keywords", [{"size": 32}, {"size": {"shortest_edge": 48}, "keep_ratio": True}])
def test_a_processor_that_resizes_below_the_smallest_side_is_refused(keywords, model):
    processor, deployed = SegFormerImageProcessor(**keywords), DeployedSegFormer(model)
    with pytest.raises(ValueError, match=r"resizes images to (32x32|48x60); expected sides of 64 pixels"):
        ReferenceOutputs(model, processor, deployed)
    if "keep_ratio" not in keywords:  # the graph resizes
        ReferenceOutputs(model, processor, SegFormerWithProcessing(deployed, processor))


def test_files_of_many_channels_can_be_compared_on(tmp_path):
    model = build(num_channels=5)
    processor = SegFormerImageProcessor(size=64, image_mean=[0.5] * 5, image_std=[0.3] * 5, do_rescale=False)
    bands = np.random.default_rng(0).random((5, 70, 90), dtype=np.float32)
    np.save(tmp_path / "scene.npy", bands)
    [path] = find_images(tmp_path)
    *_, (inputs, _) = ReferenceOutputs(model, processor, DeployedSegFormer(model)).cases([path])
    assert torch.equal(inputs, processor(bands, return_tensors="pt").pixel_values)


def test_masks_that_are_ignored_throughout_are_refused(model, processor, tmp_path):
    [image] = smooth_images(1, 80, 112, 3)
    dataset = [{"image": image, "label": np.full((80, 112), 255, dtype=np.uint8)}]
    with pytest.raises(ValueError, match="every pixel of the masks is ignored"):
        export_model(model, processor, tmp_path, ExportConfig("torch", dataset=dataset))


def test_masks_of_0_and_255_get_the_option_for_them(processor, tmp_path):
    model = build(num_labels=1)
    mask = np.zeros((80, 112), dtype=np.uint8)
    mask[:40] = 255
    export_config = ExportConfig("torch", dataset=[{"image": smooth_images(1, 80, 112, 3)[0], "label": mask}])
    reference = ReferenceOutputs(model, processor, DeployedSegFormer(model))
    with pytest.raises(ValueError, match="is 'LABEL_0': if 255 stands for it, give --label-values 0 255"):
        add_mean_iou({}, tmp_path, TARGETS["torch"], reference, export_config)


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_the_command_writes_a_torch_program_for_any_size_and_reports_parity(checkpoint, model, data, tmp_path, capsys):
    destination = tmp_path / "exported"
    images = ("--images", data / "images", "--masks", data / "labels", "--label-values", *range(5))
    assert run("export", checkpoint, destination, "--to", "torch", *images) == 0
    assert sorted(os.listdir(destination)) == ["config.json", "export.json", "model.pt2", "preprocessor_config.json"]
    printed = capsys.readouterr().out
    assert "input: pixel_values, float32 (batch, 3, height, width)" in printed
    assert "model.pt2 in torch.export: 100.000% of the pixels as in PyTorch" in printed
    assert "mean IoU" in printed
    assert "warning" not in printed
    assert printed.endswith(f"written to {destination}\n")
    assert_agrees(torch_program(destination / "model.pt2"), model)
    files = {"metadata.json": ""}
    torch.export.load(destination / "model.pt2", extra_files=files)
    assert json.loads(files["metadata.json"])["names"] == json.dumps([f"LABEL_{index}" for index in range(5)])
    assert SegFormerConfig.from_pretrained(destination).num_labels == 5
    assert SegFormerImageProcessor.from_pretrained(destination).size == {"height": 64, "width": 96}


def test_a_file_with_other_outputs_is_refused_and_removed(checkpoint, model, tmp_path, capsys, monkeypatch):
    deployed = DeployedSegFormer(model)
    for wrong, words in ((0.01, "differs from PyTorch by"), (float("nan"), "not finite")):
        target = replace(
            TARGETS["torch"],
            write=lambda program, path, metadata: path.write_text("a file"),
            run=lambda path, wrong=wrong: lambda inputs: deployed(inputs) + wrong,
        )
        monkeypatch.setitem(TARGETS, "torch", target)
        assert run("export", checkpoint, tmp_path / "exported", "--to", "torch") == 1
        error = capsys.readouterr().err
        assert error.startswith("segformer: model.pt2 in torch.export")
        assert words in error
        assert error.count("\n") == 1
        assert os.listdir(tmp_path) == ["model"]


def test_masks_of_colors_score_as_those_of_values(checkpoint, model, data, tmp_path, capsys, monkeypatch):
    deployed = DeployedSegFormer(model)
    target = replace(
        TARGETS["torch"], write=lambda program, path, metadata: path.write_text("a file"), run=lambda path: deployed
    )
    monkeypatch.setitem(TARGETS, "torch", target)
    colors = np.array([[10, 0, 0], [0, 20, 0], [0, 0, 30], [40, 40, 0], [0, 50, 50]], np.uint8)
    (tmp_path / "colors").mkdir()
    for path in (data / "labels").iterdir():
        Image.fromarray(colors[np.asarray(Image.open(path))]).save(tmp_path / "colors" / path.name)
    names = [",".join(map(str, color)) for color in colors]
    printed = []
    for masks, options in ((data / "labels", ()), (tmp_path / "colors", ("--mask-colors", *names))):
        folders = ("--images", data / "images", "--masks", masks)
        assert run("export", checkpoint, tmp_path / f"{masks.name}_out", "--to", "torch", *folders, *options) == 0
        printed.append([line for line in capsys.readouterr().out.splitlines() if "mean IoU" in line])
    assert printed[0] == printed[1] != []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mask-colors", "0,0,0"], "--mask-colors is given; expected together with --masks"),
        (["--images", "a", "--masks", "b", "--ignore-colors", "0,0,0"], "it requires --mask-colors"),
        (["--images", "a", "--masks", "b", "--mask-colors", "0,0,0", "--label-values", "0"], "masks of one kind"),
    ],
)
def test_the_command_refuses_options_of_colors_that_have_no_effect(options, words, tmp_path, capsys):
    assert run("export", "model", tmp_path / "exported", "--to", "torch", *options) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "torch", "--images", "empty"], "holds no images"),
        (["--to", "torch", "--images", "nowhere"], "nowhere"),
        (["--to", "torch", "--images", "images", "--masks", "others"], "1.png"),
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
    assert run("export", checkpoint, checkpoint, "--to", "torch") == 2
    assert "a new or an empty folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected an empty folder"):
        export_model(model, processor, checkpoint, ExportConfig("torch"))
    assert (checkpoint / "config.json").read_text() == before


# --- The figures ------------------------------------------------------------------------------------------------------


def test_pixel_agreement_is_at_the_size_of_the_image():
    logits = torch.randn(1, 3, 4, 5)
    other = logits.clone()
    other[0, :, 0, 0] = logits[0, :, 0, 0].flip(0)
    same = ParityReport.of_logits((1, 3, 16, 20), logits, logits, (16, 20))
    assert (same.max_error, same.pixel_agreement) == (0, 1)
    differs = ParityReport.of_logits((1, 3, 16, 20), other, logits, (16, 20))
    assert differs.max_error == pytest.approx((other - logits).abs().max().item())
    large = [upsample(each, (16, 20)).argmax(1) for each in (other, logits)]
    assert differs.pixel_agreement == pytest.approx((large[0] == large[1]).double().mean().item())
    assert differs.pixel_agreement < 1


def test_the_error_of_a_segmentation_map_is_the_gap_to_the_best_logit():
    logits = torch.tensor([1.0, 3.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    found = torch.ones(1, 8, 8, dtype=torch.int32)
    assert ParityReport.of_segmentation((1, 8, 8, 3), found, logits, (8, 8)).max_error == 0
    found[0, 0, 0] = 2
    agreement = ParityReport.of_segmentation((1, 8, 8, 3), found, logits, (8, 8))
    assert (agreement.max_error, agreement.pixel_agreement) == (1, 63 / 64)
    found[0, 0, 0] = 3
    assert ParityReport.of_segmentation((1, 8, 8, 3), found, logits, (8, 8)).relative_error == float("inf")


def test_low_pixel_agreement_gives_a_warning(onnx_folder):
    figures = deepcopy(onnx_folder[1])
    figures["files"] = {"model_quantized.onnx": {**figures["files"]["model_quantized.onnx"], "pixel_agreement": 0.9}}
    assert "warning: model_quantized.onnx predicts other classes than PyTorch for 10.0% of the pixels" in format_report(
        figures
    )
