"""ExecuTorch programs: equal to PyTorch up to their largest image, with the classes inside; refusals."""

import sys
import warnings

import numpy as np
import pytest
import torch

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.cli.main import main
from hf_segformer.export import executorch_program
from hf_segformer.export.executorch_program import executorch_runtime, require_executorch
from hf_segformer.export.exportable import DeployedSegFormer, SegFormerWithProcessing
from hf_segformer.export.exporters import ExportConfig, export_model, one_size
from hf_segformer.export.metadata import describe_model
from hf_segformer.export.verification import ReferenceOutputs, smooth_images
from tests.support.tiny import TWO_STAGES, logits_of

NAMES = {0: 'sky "above"', 1: "Straße", 2: "roof, tiled"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SegFormerForSemanticSegmentation(SegFormerConfig(**TWO_STAGES, id2label=NAMES)).eval()


@pytest.fixture(scope="module")
def processor():
    return SegFormerImageProcessor(size={"height": 64, "width": 96})


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_a_program_takes_images_up_to_the_largest(checkpoint, model, processor, tmp_path, capsys):
    pytest.importorskip("executorch.version", reason="needs the extra executorch")
    destination = tmp_path / "exported"
    command = ["export", str(checkpoint), str(destination), "--to", "executorch", "--max-size", "96", "160"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "model.pte in ExecuTorch: 100.000% of the pixels as in PyTorch" in printed
    assert "sides: 64 pixels to 96x160 (height x width), one image at a time" in printed
    run = executorch_runtime(destination / "model.pte")
    for num, height, width in [(1, 64, 64), (3, 75, 160), (2, 96, 67)]:
        pixels = torch.randn(num, 3, height, width)
        expected = logits_of(model, pixels)
        assert (run(pixels) - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ValueError, match=r"as 1x3x97x160; expected at most 1x3x96x160: export with a larger max_size"):
        run(torch.zeros(1, 3, 97, 160))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.runtime import Runtime
    program = Runtime.get().load_program(destination / "model.pte")
    description = describe_model(model, processor, include_processing=False)
    assert program.method_names == {"forward", *description}
    assert {name: program.load_method(name).execute([])[0] for name in description} == description


@pytest.mark.slow
def test_processing_in_the_program(model, processor, tmp_path):
    pytest.importorskip("executorch.version", reason="needs the extra executorch")
    config = ExportConfig("executorch", include_processing=True, max_size=(96, 160))
    report = export_model(model, processor, tmp_path, config)
    assert report["input"] == "images, uint8 (batch, height, width, 3)"
    assert report["resize"] == "in the graph, to 64x96 (height x width)"
    assert "executorch" in report["versions"]
    images = torch.stack([torch.from_numpy(np.array(each)) for each in smooth_images(2, 70, 131, 3, seed=9)])
    found = executorch_runtime(tmp_path / "model.pte")(images)
    assert found.dtype == torch.int32
    assert (found == SegFormerWithProcessing(DeployedSegFormer(model), processor)(images)).double().mean() > 0.999


def test_the_cases_of_a_bounded_graph_stay_within_its_bound(model, processor):
    cases = ReferenceOutputs(model, processor, DeployedSegFormer(model), max_size=(80, 100)).cases(())
    assert [tuple(inputs.shape[2:]) for inputs, _ in cases] == [(64, 96), (80, 67), (80, 100), (80, 100)]


def test_the_largest_image_is_that_of_a_processor_with_one_size():
    assert one_size(SegFormerImageProcessor(size={"height": 64, "width": 96})) == (64, 96)
    assert one_size(SegFormerImageProcessor(size={"height": 32, "width": 96})) == (64, 96)
    for keywords in ({"do_resize": False}, {"size": {"shortest_edge": 64}}, {"size": 64, "keep_ratio": True}):
        with pytest.raises(ValueError, match=r"gives images of many sizes.*--max-size HEIGHT WIDTH"):
            one_size(SegFormerImageProcessor(**keywords))


def test_options_that_do_not_fit_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"max_size \(--max-size\) is given for onnx; expected executorch"):
        ExportConfig("onnx", max_size=(64, 64))
    with pytest.raises(ValueError, match=r"max_size is \(32, 64\); expected sides of 64 or more"):
        ExportConfig("executorch", max_size=(32, 64))
    command = ["export", "model", str(tmp_path / "exported"), "--to", "torch", "--max-size", "64", "64"]
    assert main(command) == 2
    assert "--max-size is given with --to torch; expected --to executorch" in capsys.readouterr().err


def test_a_missing_or_foreign_executorch_is_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    def none(name):
        raise executorch_program.PackageNotFoundError(name)

    monkeypatch.setattr(executorch_program, "version", none)
    assert main(["export", str(checkpoint), str(tmp_path / "exported"), "--to", "executorch"]) == 1
    error = capsys.readouterr().err
    assert error == "segformer: executorch is not installed: pip install 'hf-segformer[executorch]'\n"
    monkeypatch.setattr(executorch_program, "version", lambda name: "0.7.0")
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(ValueError, match=r"executorch 0\.7\.0 does not load with torch 2\S* \(.*\); expected versions"):
        require_executorch()
