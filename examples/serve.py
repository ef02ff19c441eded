"""HTTP service of one model: an image in, its segmentation map out. Described in docs/guides/serving.md.

    pip install 'hf-segformer[app]'
    python examples/serve.py outputs/shapes_b0 --port 8000
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict --output classes.png

Requests are decoded in threads, and one task runs the network: on the images that wait, those of one prepared size at
once. So any number of clients share one copy of the weights and one set of cores, and none waits for a slower format.
Copy this file and change it: answers, authentication and logging are yours.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image

from hf_segformer import InferenceOptions, SegFormerPredictor
from hf_segformer.data.reader_protocol import ImageSource
from hf_segformer.data.readers import image_size, kind_of
from hf_segformer.inference.pipeline import Prepared
from hf_segformer.inference.predictor import Prediction
from hf_segformer.inference.writers import segmentation_to_png


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of all together.

    Attributes:
        max_bytes: size of an upload.
        max_pixels: height times width of an image, checked by its header.
        max_requests: requests at a time; further ones are answered with status 503 at once.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 25_000_000
    max_requests: int = 16


class Batcher:
    """Queue in front of the network, which runs in one thread.

    Args:
        predictor: its `options.batch_size` is the largest number of images at once.
    """

    def __init__(self, predictor: SegFormerPredictor):
        self.predictor = predictor
        self.waiting: list[tuple[Prepared, asyncio.Future]] = []
        self.arrived = asyncio.Event()

    async def predict(self, prepared: Prepared) -> Prediction:
        """Wait for the prediction of an image; raise the ValueError of the network if it does not fit."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((prepared, future))
        self.arrived.set()
        return await future

    async def run(self) -> None:
        """Run the network on what waits, until it is cancelled."""
        while True:
            await self.arrived.wait()
            batch = self._take()
            results = await asyncio.to_thread(self._segment, [prepared for prepared, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                if future.cancelled():  # the service ends
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _take(self) -> list[tuple[Prepared, asyncio.Future]]:
        """Take the image that waits longest and others of its prepared size."""
        shapes, most = self.waiting[0][0].shapes, self.predictor.options.batch_size
        batch = [each for each in self.waiting if each[0].shapes == shapes][:most]
        self.waiting = [each for each in self.waiting if each not in batch]
        if not self.waiting:
            self.arrived.clear()
        return batch

    def _segment(self, batch: list[Prepared]) -> Sequence[Prediction | Exception]:
        """Predict a batch, or its images one by one if they fail together."""
        try:
            return self.predictor.predict(batch)
        except Exception as error:  # it belongs to a request, and the queue goes on
            return [error] if len(batch) == 1 else [self._segment([each])[0] for each in batch]


async def read_body(request: Request, max_bytes: int) -> BytesIO:
    """Read an upload, no further than its limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise HTTPException(413, f"the upload is larger than {max_bytes:,} bytes; send a smaller file")
    return BytesIO(body)


def prepare(predictor: SegFormerPredictor, body: BytesIO, max_pixels: int) -> Prepared:
    """Check an image by its header, decode it and prepare it for the network."""
    no_image = HTTPException(415, "the body is no image; send the bytes of a PNG, JPEG, WebP or TIFF file")
    source = ImageSource(body)
    if kind_of(source) not in ("image", "raster"):
        raise no_image
    try:
        height, width = image_size(source)
    except ValueError as error:
        is_large = isinstance(error.__cause__, Image.DecompressionBombError)
        raise HTTPException(413 if is_large else 422, " ".join(str(error).split())) from error
    except OSError as error:
        raise no_image from error
    if height * width > max_pixels:
        raise HTTPException(
            413, f"the image is {height}x{width} (height x width); expected at most {max_pixels:,} pixels"
        )
    try:
        return predictor.prepare(body, keep_image=False)
    except (ValueError, OSError) as error:
        raise HTTPException(422, " ".join(str(error).split())) from error


def build_service(predictor: SegFormerPredictor, limits: Limits | None = None) -> FastAPI:
    """Build the service without starting it."""
    limits, batcher = limits or Limits(), Batcher(predictor)
    num_requests = 0

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    service = FastAPI(title="SegFormer", lifespan=lifespan)

    @service.post("/predict")
    async def predict(request: Request) -> Response:
        """Segment the image in the body: a PNG of its size whose values are classes, with their palette."""
        nonlocal num_requests
        if num_requests >= limits.max_requests:
            raise HTTPException(503, "the service is busy; try again", {"Retry-After": "1"})
        num_requests += 1
        try:
            body = await read_body(request, limits.max_bytes)
            prepared = await asyncio.to_thread(prepare, predictor, body, limits.max_pixels)
            prediction = await batcher.predict(prepared)
            return Response(await asyncio.to_thread(encode, prediction), media_type="image/png")
        except ValueError as error:  # of the network: the image does not fit it, or not into memory
            raise HTTPException(422, " ".join(str(error).split())) from error
        finally:
            num_requests -= 1

    def encode(prediction: Prediction) -> bytes:
        file = BytesIO()
        segmentation_to_png(prediction.segmentation, predictor.palette).save(file, "PNG")
        return file.getvalue()

    @service.get("/classes")
    def classes() -> list[dict[str, Any]]:
        """List the classes: the value in the PNG, name and colour."""
        pairs = zip(predictor.names, predictor.palette, strict=True)
        return [{"value": value, "name": name, "color": color} for value, (name, color) in enumerate(pairs)]

    @service.get("/health")
    def health() -> dict[str, str]:
        """Answer while the service runs."""
        return {"status": "ok"}

    return service


def main() -> None:
    """Serve a model until Ctrl-C."""
    parser = argparse.ArgumentParser(description="serve a model by HTTP")
    parser.add_argument("model", help="a folder, a file of weights, or a Hub repository (owner/name)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves the whole network (default: this machine)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", help="default: the accelerator if there is one, else the CPU")
    parser.add_argument("--batch-size", type=int, default=4, help="most images at once (default: %(default)s)")
    arguments = parser.parse_args()
    options = InferenceOptions(batch_size=arguments.batch_size)
    predictor = SegFormerPredictor.from_pretrained(arguments.model, device=arguments.device, options=options)
    uvicorn.run(build_service(predictor), host=arguments.host, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
