"""The page of `segformer export --to web`: its files, and its predictions in a headless Chromium."""

import functools
import json
import shutil
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor
from hf_segformer.cli.main import main
from hf_segformer.export.exporters import ExportConfig, export_model
from hf_segformer.export.metadata import describe_model
from hf_segformer.export.runtimes import onnx_runtime
from hf_segformer.export.verification import smooth_images
from hf_segformer.export.web import find_onnxruntime_web, require_page, write_page
from tests.support.tiny import TWO_STAGES, logits_of

PACKAGE = Path(__file__).resolve().parents[2] / ".cache" / "node" / "node_modules" / "onnxruntime-web"
NAMES = {0: "road", 1: "<b>sky</b>", 2: "river & lake", 3: "house", 4: "never"}
EQUAL = 0.999  # of the pixels: where two classes are equal up to rounding, the browser's kernels decide otherwise


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TWO_STAGES, id2label=NAMES)).eval()
    with torch.no_grad():  # so that every label but the last is given to some pixels
        model.decode_head.classifier.bias -= logits_of(model, torch.randn(1, 3, 96, 128)).mean(dim=(0, 2, 3))
        model.decode_head.classifier.bias[4] = -1000
    return model


@pytest.fixture(scope="module")
def processor():
    return SegFormerImageProcessor(size={"height": 64, "width": 96})


@pytest.fixture
def library(tmp_path):
    """An npm package with the two files that count."""
    folder = tmp_path / "node_modules" / "onnxruntime-web"
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text('{"name": "onnxruntime-web", "version": "1.99.0"}')
    (folder / "dist" / "ort.webgpu.bundle.min.mjs").write_text('load(new URL("ort-wasm-simd-threaded.asyncify.wasm"))')
    (folder / "dist" / "ort-wasm-simd-threaded.asyncify.wasm").write_bytes(b"\0asm")
    (folder / "dist" / "ort-wasm-simd-threaded.wasm").write_bytes(b"another")
    return folder


# --- Files ------------------------------------------------------------------------------------------------------------


def test_the_folder_holds_page_library_classes_and_licenses(model, processor, library, tmp_path):
    folder = tmp_path / "page"
    folder.mkdir()
    metadata = describe_model(model, processor, include_processing=True)
    assert write_page(processor, metadata, library, folder) == {"onnxruntime-web": "1.99.0"}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "index.html",
        "page.js",
        "model.json",
        "LICENSES.txt",
        "onnxruntime-web/ort.webgpu.bundle.min.mjs",
        "onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm",
    }
    description = json.loads((folder / "model.json").read_text())
    assert description["names"] == list(NAMES.values())
    assert description["palette"] == json.loads(metadata["palette"])
    assert description["processor"]["in_graph"] is True
    licenses = (folder / "LICENSES.txt").read_text()
    assert "ONNX Runtime Web 1.99.0" in licenses
    assert "Copyright (c) Microsoft Corporation" in licenses
    assert "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; " in (folder / "index.html").read_text()
    for name in ("index.html", "page.js"):
        assert "http" not in (folder / name).read_text().replace("http-equiv", "").replace("http.server", "")


def test_the_library_is_found_in_a_parent_folder(library, tmp_path, monkeypatch):
    (tmp_path / "deeper" / "still").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deeper" / "still")
    assert find_onnxruntime_web() == library
    assert find_onnxruntime_web(library) == library


def test_a_library_that_is_missing_or_incomplete_is_refused(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "node_modules")
    shutil.move(library, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"npm install onnxruntime-web, or say where .* --onnxruntime-web DIR"):
        find_onnxruntime_web()
    with pytest.raises(ValueError, match=r"node_modules has no package\.json and dist/ort\.webgpu"):
        find_onnxruntime_web(tmp_path / "node_modules")
    (tmp_path / "elsewhere" / "dist" / "ort-wasm-simd-threaded.asyncify.wasm").unlink()
    with pytest.raises(ValueError, match=r"loads ort-wasm-simd-threaded\.asyncify\.wasm, of which 0 files are beside"):
        find_onnxruntime_web(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"num_channels": 4}, "the model takes 4 bands; expected 3 for a page"),
        ({"num_labels": 300}, "the model has 300 labels; expected at most 256 for a page"),
    ],
)
def test_a_model_that_a_page_cannot_show_is_refused(keywords, words, processor):
    with pytest.raises(ValueError, match=words):
        require_page(SegFormerForSemanticSegmentation(SegFormerConfig(**TWO_STAGES, **keywords)), processor)


@pytest.mark.parametrize(
    ("value_range", "words"),
    [
        ([0, 4095], r"value_range is \[0, 4095\]; expected one within 0 to 255 for a page"),
        ({"percentiles": [2, 98]}, "a range of each image; expected a fixed one"),
    ],
)
def test_a_value_range_that_a_page_cannot_apply_is_refused(value_range, words, model):
    require_page(model, SegFormerImageProcessor(value_range=[0, 100]))
    with pytest.raises(ValueError, match=words):
        require_page(model, SegFormerImageProcessor(value_range=value_range))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"target": "web", "include_processing": True}, "leave it out for web, which does the processing itself"),
        ({"target": "web", "float16": True}, r"target is web; expected onnx or transformers\.js"),
        ({"target": "web", "dataset": [{}]}, "mean IoU .* needs logits, and web"),
        ({"target": "onnx", "onnxruntime_web": Path("x")}, r"given for onnx; expected web \(--to web\)"),
    ],
)
def test_options_that_do_not_go_with_a_page_are_refused(keywords, words):
    with pytest.raises(ValueError, match=words):
        ExportConfig(**keywords)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "web", "--include-processing"], "--to web, which processes images itself"),
        (["--to", "web", "--images", "a", "--masks", "b"], "--masks is given with --to web"),
        (["--to", "torch", "--onnxruntime-web", "a"], "--onnxruntime-web is given with --to torch; expected --to web"),
    ],
)
def test_the_command_refuses_them_before_it_loads_a_model(options, words, tmp_path, capsys):
    assert main(["export", "model", str(tmp_path / "exported"), *options]) == 2
    assert words in capsys.readouterr().err


# --- Browser ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(model, processor, tmp_path_factory):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("page")
    report = export_model(model, processor, folder, ExportConfig("web", onnxruntime_web=PACKAGE))
    assert report["versions"]["onnxruntime-web"] in (folder / "LICENSES.txt").read_text()
    return folder


@contextmanager
def served(folder):
    """A server of files; gives its address and the paths that were asked for."""
    asked = set()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.add(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    pytest.importorskip("selenium")
    if not (shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome"))):
        pytest.skip("needs Chromium and chromedriver: apt-get install chromium chromium-driver")
    from tests.support.browser import browser

    with browser(tmp_path_factory.mktemp("downloads")) as page:
        yield page


def status(page):
    return page.find("#status")[0].text


def open_page(page, address):
    page.driver.get(address)
    page.wait(lambda: page.find("#file:not([disabled])") or page.find("#status.error"), "the network")


def choose(page, path):
    """Choose an image and wait for the answer."""
    page.find("#file")[0].send_keys(str(path))
    page.wait(lambda: path.name in status(page) and "Predicting" not in status(page), "the prediction")


@pytest.mark.browser
def test_labels_in_the_browser_are_those_of_onnxruntime_in_python(exported, chromium, tmp_path):
    [image] = smooth_images(1, 150, 200, 3, seed=9)
    image.save(tmp_path / "photo.png")
    with served(exported) as (address, asked):
        open_page(chromium, address)
        assert status(chromium).startswith("Ready (Web")
        choose(chromium, tmp_path / "photo.png")
        assert status(chromium).startswith("photo.png: 200 \u00d7 150 pixels, ")
        saved = Image.open(chromium.download("save"))
        rows = [row.text for row in chromium.find("#classes tr")]
        asked = set(asked)
    found = np.asarray(saved.convert("RGB"))
    expected = onnx_runtime(exported / "model.onnx")(torch.from_numpy(np.array(image))[None])[0].numpy()
    assert found.shape == (150, 200, 3)
    assert (found == found[..., :1]).all()
    assert (found[..., 0] == expected).mean() >= EQUAL
    counts = np.bincount(found[..., 0].ravel(), minlength=5)
    assert (counts > 0).sum() >= 3
    order = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
    assert rows == [f"{NAMES[index]} {percent(counts[index] / counts.sum())}" for index in order]
    assert "never" in chromium.find("#absent")[0].text
    assert chromium.find("#overlay")[0].get_attribute("aria-label").startswith("Segmentation of photo.png: ")
    assert {path.lstrip("/") for path in asked} <= {
        "",
        "page.js",
        "model.json",
        "model.onnx",
        *(f"onnxruntime-web/{path.name}" for path in (exported / "onnxruntime-web").iterdir()),
    }
    assert all(each.startswith(("http://127.0.0.1:", "data:", "blob:")) for each in chromium.requests())


def percent(share):
    return "< 0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


@pytest.mark.browser
def test_files_that_are_no_images_and_small_images_are_named(exported, chromium, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    Image.new("RGB", (90, 40)).save(tmp_path / "small.png")
    with served(exported) as (address, _):
        open_page(chromium, address)
        choose(chromium, tmp_path / "notes.png")
        assert status(chromium) == "notes.png is not an image that this browser reads; expected PNG, JPEG or WebP."
        choose(chromium, tmp_path / "small.png")
        assert status(chromium) == "small.png enters the network at 90 \u00d7 40 pixels; expected sides of 64 or more."
        assert not chromium.find("#result:not([hidden])")


@pytest.mark.browser
def test_a_missing_or_broken_network_and_an_opened_file_are_told(exported, chromium, tmp_path):
    broken = shutil.copytree(exported, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"no network")
    with served(broken) as (address, _):
        open_page(chromium, address)
        assert status(chromium).startswith("The network cannot be loaded: ")
        (broken / "model.onnx").unlink()
        open_page(chromium, address)
        assert status(chromium) == "The network cannot be loaded: model.onnx: the server answers 404 File not found"
    open_page(chromium, (exported / "index.html").as_uri())
    assert "Serve this folder: python -m http.server" in status(chromium)


@pytest.mark.browser
@pytest.mark.parametrize(
    "keywords",
    [
        {"size": {"shortest_edge": 64}, "keep_ratio": True, "size_divisor": 32},
        {"size": {"shortest_edge": 64, "longest_edge": 90}, "keep_ratio": True},
        {"size": {"height": 70, "width": 100}, "keep_ratio": True, "size_divisor": 8},
        {"size": {"shortest_edge": 64}},
        {"size": {"shortest_edge": 64, "longest_edge": 91}},
        {"size": {"height": 70, "width": 100}, "resample": Image.Resampling.BICUBIC},
    ],
)
def test_the_page_resizes_to_the_processors_sizes(keywords, exported, chromium):
    processor = SegFormerImageProcessor(**keywords)
    generator = np.random.default_rng(0)
    sizes = [*generator.integers(1, 3000, (200, 2)).tolist(), [64, 64], [64, 200], [91, 91], [130, 65], [65, 130]]
    settings = {name: getattr(processor, name) for name in ("do_resize", "size", "keep_ratio", "size_divisor")}
    chromium.driver.get((exported / "index.html").as_uri())
    script = "return arguments[0].map(([height, width]) => inputSize(height, width, arguments[1], 5))"
    found = chromium.driver.execute_script(script, sizes, {**settings, "in_graph": False})
    assert found == [list(processor._target_size(*size)) for size in sizes]


@pytest.mark.browser
def test_large_images_are_reduced_until_their_logits_fit(exported, chromium):
    chromium.driver.get((exported / "index.html").as_uri())
    script = "return inputSize(arguments[0], arguments[1], {in_graph: true}, arguments[2])"
    assert chromium.driver.execute_script(script, 3000, 4000, 5) == [1536, 2048]
    height, width = chromium.driver.execute_script(script, 3000, 4000, 150)
    assert 0.97 * 64e6 < height * width * 150 < 1.03 * 64e6
    assert abs(width / height - 4 / 3) < 0.01
    assert chromium.driver.execute_script(script, 100, 120, 150) == [100, 120]
