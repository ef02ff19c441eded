"""Prediction of one shard: a function of its images and the options alone, wherever and however often it runs.

Images share batches within a shard only. A shard thus has the same bits from every process with the same number of
threads on the same kind of processor, whatever other shards that process predicts, and in whatever order.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from ..data.sources import FileSource, InputItem
from ..inference.batch import Job, predict_items
from ..inference.distributed import DistributedContext
from ..inference.parquet_writer import ParquetWriter
from ..inference.predictor import SegFormerPredictor
from ..inference.writers import Outputs, WriterArguments

_MOST, _SHARDS = 1000, 128  # images in a shard, and shards that a folder is divided into if it is small
REMEDY = "predict it by --engine torch and --format png"


class Shard(NamedTuple):
    """A predicted shard.

    Attributes:
        content: bytes of its Parquet file.
        num_written: number of its images with a prediction.
    """

    content: bytes
    num_written: int


@dataclass(frozen=True)
class ShardJob:
    """The part of a job that all its shards have in common.

    Attributes:
        predictor: on the device of the process that predicts.
        source: reads the images.
        outputs: requested outputs, of the kind `parquet`.
        identity: see `Writer`.
    """

    predictor: SegFormerPredictor
    source: FileSource
    outputs: Outputs
    identity: dict[str, str]

    def predict(self, items: Sequence[InputItem]) -> Shard:
        """Predict the images of a shard, in order; those that cannot be read have their error in the file.

        Raises:
            ValueError: if a batch does not fit into memory.
            OSError: if there is no room for the file.
        """
        with TemporaryDirectory(prefix="segformer-") as folder:
            writer = self._writer(folder, items)
            job = Job(
                self.predictor, self.source, items, Path(folder), self.outputs, DistributedContext(), False, REMEDY
            )
            try:
                predict_items(job, writer, len(items), items)
            except MemoryError as error:
                raise ValueError(str(error) or "there is not enough memory") from error
            finally:
                writer.close()
            return _shard_of(folder, writer)

    def fail(self, items: Sequence[InputItem], message: str) -> Shard:
        """The shard of images none of which could be predicted."""
        with TemporaryDirectory(prefix="segformer-") as folder:
            writer = self._writer(folder, items)
            for item in items:
                writer.fail(item, f"{self.source.describe(item)}: {message}")
            return _shard_of(folder, writer)

    def _writer(self, folder: str, items: Sequence[InputItem]) -> ParquetWriter:
        origin_of, size = self.source.origin, len(items)
        writer = ParquetWriter(WriterArguments(Path(folder), self.predictor, self.outputs, items, origin_of, 1, size))
        writer.identity = self.identity
        return writer


def _shard_of(folder: str, writer: ParquetWriter) -> Shard:
    [path] = Path(folder).iterdir()
    return Shard(path.read_bytes(), writer.num_written)


def shard_size(num_images: int, batch_size: int) -> int:
    """Number of images in a shard: whole batches, at most 1000, and where there are enough images 128 shards.

    It does not depend on the number of processes, which may change while a cluster scales.

    Examples:
        >>> from hf_segformer.cluster.shards import shard_size
        >>> shard_size(24, 2), shard_size(10_000, 8), shard_size(10_000_000, 16)
        (2, 80, 992)
    """
    batches = -(-num_images // (_SHARDS * batch_size))
    return batch_size * max(1, min(batches, _MOST // batch_size))


def encode_items(items: Sequence[InputItem]) -> str:
    """Items as text in ASCII, whatever bytes their names hold."""
    return json.dumps(items)


def decode_items(text: str) -> list[InputItem]:
    """Items of `encode_items`."""
    return [InputItem(name, source, page, tuple(files)) for name, source, page, files in json.loads(text)]


__all__ = ["REMEDY", "Shard", "ShardJob", "decode_items", "encode_items", "shard_size"]
