"""examples/serve.py: concurrent clients share one network, uploads are limited, errors are answered in one line."""

import asyncio
import importlib.util
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_segformer import (
    SegFormerConfig,
    SegFormerForSemanticSegmentation,
    SegFormerImageProcessor,
    SegFormerPredictor,
)
from hf_segformer.config import InferenceOptions
from hf_segformer.inference.pipeline import Prepared
from tests.support.tiny import TINY

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

PROGRAM = Path(__file__).resolve().parent.parent / "examples" / "serve.py"


@pytest.fixture(scope="module")
def serve():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("serve_example", PROGRAM)
    sys.modules["serve_example"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["serve_example"]


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=5)).eval()
    return SegFormerPredictor(model, SegFormerImageProcessor(size=64), InferenceOptions(batch_size=4))


@pytest.fixture(scope="module")
def address(serve, predictor):
    """A running service with low limits."""
    service = serve.build_service(predictor, serve.Limits(max_bytes=60_000, max_pixels=100 * 100, max_requests=4))
    server = uvicorn.Server(uvicorn.Config(service, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


def ask(address, method, path, body=None):
    """Send one request; returns status, headers and body."""
    connection = HTTPConnection(*address, timeout=60)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def drawing(seed, height=60, width=90):
    values = np.random.default_rng(seed).integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), np.uint8)
    return Image.fromarray(values.repeat(10, 0).repeat(10, 1)[:height, :width])


def file_of(image, kind="PNG"):
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_two_clients_at_a_time_get_the_predictors_maps(address, predictor):
    images = [drawing(seed, *size) for seed, size in enumerate([(60, 90), (90, 50), (64, 64)] * 4)]
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda image: ask(address, "POST", "/predict", file_of(image)), images))
    for image, (status, headers, body) in zip(images, answers, strict=True):
        assert (status, headers["content-type"]) == (200, "image/png")
        found = np.asarray(Image.open(BytesIO(body)))
        expected = predictor(image).segmentation
        assert found.shape == expected.shape
        assert (found == expected).mean() > 0.999  # a batch rounds otherwise


def test_classes_and_health(address, predictor):
    status, _, body = ask(address, "GET", "/classes")
    assert status == 200
    assert [each["name"] for each in json.loads(body)] == list(predictor.names)
    assert [tuple(each["color"]) for each in json.loads(body)] == predictor.palette
    assert json.loads(ask(address, "GET", "/health")[2]) == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 415, "no image; send the bytes of a PNG"),
        (b"%!PS-Adobe-3.0", 415, "no image"),
        (bytes(60_001), 413, "larger than 60,000 bytes"),
        (file_of(Image.new("1", (101, 100))), 413, "100x101 (height x width); expected at most 10,000 pixels"),
        (file_of(drawing(0))[:-300], 422, "the image"),
        (file_of(Image.new("RGB", (1, 5000))), 200, ""),
    ],
    ids=["empty", "foreign", "bytes", "pixels", "cut", "thin"],
)
def test_bad_uploads_are_answered_in_one_line(address, body, status, words):
    found, _, answer = ask(address, "POST", "/predict", body)
    assert found == status
    if words:
        assert words in json.loads(answer)["detail"]
        assert "\n" not in json.loads(answer)["detail"]


@pytest.mark.parametrize("height", [60, 101])
def test_a_tiff_that_pillow_cannot_open_is_predicted_within_the_limits(address, predictor, height):
    tifffile = pytest.importorskip("tifffile")
    file = BytesIO()
    tifffile.imwrite(
        file, np.asarray(drawing(0, height, 100)).astype(np.uint16) * 257, photometric="rgb", compression="zlib"
    )
    status, _, body = ask(address, "POST", "/predict", file.getvalue())
    if height == 101:
        assert (status, json.loads(body)["detail"][:20]) == (413, "the image is 101x100")
    else:
        assert status == 200
        [expected] = predictor.predict([predictor.prepare(file)])
        found = np.asarray(Image.open(BytesIO(body)))
        assert (found == expected.segmentation).mean() > 0.999  # a batch rounds otherwise


def test_what_is_no_image_for_the_model_is_refused(address):
    tifffile = pytest.importorskip("tifffile")
    file = BytesIO()
    tifffile.imwrite(file, np.ones((5, 40, 60), np.uint16), planarconfig="separate", photometric="minisblack")
    status, _, body = ask(address, "POST", "/predict", file.getvalue())
    assert (status, json.loads(body)["detail"][:34]) == (422, "the image has 5 bands; expected 3,")
    scan = (348).to_bytes(4, "little") + bytes(340) + b"n+1\0" + bytes(100)
    status, _, body = ask(address, "POST", "/predict", scan)
    assert (status, json.loads(body)["detail"][:20]) == (415, "the body is no image")


def test_an_upload_without_a_length_is_cut_off_at_the_limit(address):
    chunks = (bytes(20_000) for _ in range(10))
    assert ask(address, "POST", "/predict", chunks)[0] == 413


class SlowPredictor:
    """Takes batches once it may, and refuses an image by name."""

    options = InferenceOptions(batch_size=3)

    def __init__(self):
        self.may_run, self.batches = threading.Event(), []

    def predict(self, batch):
        self.may_run.wait(30)
        self.batches.append([prepared.name for prepared in batch])
        if any(prepared.name == "bad" for prepared in batch):
            raise ValueError("bad does not fit")
        return [prepared.name.upper() for prepared in batch]


def test_what_waits_is_batched_by_size_and_one_bad_image_fails_alone(serve):
    async def run():
        predictor = SlowPredictor()
        batcher = serve.Batcher(predictor)
        task = asyncio.create_task(batcher.run())
        sizes = {"first": 64, "a": 64, "wide": 96, "b": 64, "bad": 64, "c": 64}
        waiting = []
        for name, size in sizes.items():
            prepared = Prepared([torch.zeros(1, 3, 64, size)], (9, 9), name)
            waiting.append(asyncio.create_task(batcher.predict(prepared)))
            await asyncio.sleep(0.05 if name == "first" else 0)
        predictor.may_run.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        task.cancel()
        return predictor.batches, results

    batches, results = asyncio.run(run())
    assert batches == [["first"], ["a", "b", "bad"], ["a"], ["b"], ["bad"], ["wide"], ["c"]]
    assert results[:4] + results[5:] == ["FIRST", "A", "WIDE", "B", "C"]
    assert str(results[4]) == "bad does not fit"


def test_a_busy_service_says_so_at_once(serve):
    predictor = SlowPredictor()
    predictor.names, predictor.palette = ("a",), [(0, 0, 0)]
    prepared = Prepared([torch.zeros(1, 3, 64, 64)], (9, 9), "bad")
    predictor.prepare = lambda body, keep_image: prepared
    service = serve.build_service(predictor, serve.Limits(max_requests=2))

    async def run():
        requests = [send(service, file_of(drawing(0))) for _ in range(3)]
        async with service.router.lifespan_context(service):
            tasks = [asyncio.create_task(request) for request in requests]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            first = [task.result() for task in done]
            predictor.may_run.set()
            return first, [await task for task in tasks if task not in done]

    async def send(service, body):
        messages = []

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def note(message):
            messages.append(message)

        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b""}
        await service({**scope, "asgi": {"version": "3.0"}, "http_version": "1.1"}, receive, note)
        return messages[0]["status"], dict(messages[0]["headers"])

    [(status, headers)], others = asyncio.run(run())
    assert status == 503
    assert headers[b"retry-after"] == b"1"
    assert [status for status, _ in others] == [422, 422]


def test_the_program_has_help(serve, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        serve.main()
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--host", "--port", "--device", "--batch-size"))
