"""Shards: the same bytes as one process, whatever the order, and all images accounted for."""

import json
from io import BytesIO

import pytest
from PIL import Image
from pyarrow import parquet

from hf_segformer import SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.cluster.shards import ShardJob, decode_items, encode_items, shard_size
from hf_segformer.config import InferenceOptions
from hf_segformer.data.sources import FileSource, InputItem
from hf_segformer.inference.batch import predict_batch
from hf_segformer.inference.writers import Outputs
from tests.inference.test_batch import geotiff
from tests.inference.test_predictor import lively, make_image


def small_predictor(**options):
    return SegFormerPredictor(lively(), SegFormerImageProcessor(do_resize=False), InferenceOptions(**options))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(8):
        make_image(40, 60, seed=index).save(folder / f"{index}.png")
    return folder


def test_shards_are_the_files_of_one_process(images, tmp_path, monkeypatch):
    """All images have one size here, so that batches of one process end where shards do."""
    predictor, out = small_predictor(batch_size=2), tmp_path / "out"
    (images / "5.png").write_text("no image")
    source = FileSource([str(images)], out)
    monkeypatch.setattr("hf_segformer.inference.parquet_writer._SHARD_SIZE", 4)
    report = predict_batch(predictor, source, out, Outputs("parquet"), progress=False)
    identity = {name: metadata_of(out)[name.encode()].decode() for name in ("weights", "run")}
    job = ShardJob(predictor, source.without_items(), Outputs("parquet"), identity)
    for number in (1, 0):
        shard = job.predict(decode_items(encode_items(source.items()[4 * number : 4 * number + 4])))
        assert shard.content == (out / f"masks-{number:05d}-of-00002.parquet").read_bytes()
        assert shard.num_written == 4 - number
    assert (report.num_images, [each["name"] for each in report.failed]) == (7, ["5"])


def metadata_of(out):
    return parquet.read_metadata(out / "masks-00000-of-00002.parquet").metadata


def test_metadata_name_classes_weights_and_run(images, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_segformer.inference.parquet_writer._SHARD_SIZE", 4)
    predictor, out = small_predictor(), tmp_path / "out"
    predict_batch(predictor, FileSource([str(images)], out), out, Outputs("parquet"), progress=False)
    held, settings = metadata_of(out), json.loads((out / "settings.json").read_text())
    assert json.loads(held[b"names"]) == list(predictor.names)
    assert held[b"weights"].decode() == settings["weights"]
    assert len(held[b"run"]) == 16


def test_a_failed_shard_has_an_error_in_each_row(images, tmp_path):
    source = FileSource([str(images)], tmp_path)
    shard = ShardJob(small_predictor(), source, Outputs("parquet"), {}).fail(source.items(), "it died")
    rows = parquet.read_table(BytesIO(shard.content)).to_pylist()
    assert [row["name"] for row in rows] == [str(index) for index in range(8)]
    assert {row["mask"] for row in rows} == {None}
    assert rows[3]["error"] == f"{images / '3.png'}: it died"
    assert shard.num_written == 0


def test_what_is_larger_than_an_image_is_refused_by_name(tmp_path):
    pytest.importorskip("rasterio")
    path = tmp_path / "scene.tif"
    geotiff(path)
    make_image(40, 60).save(tmp_path / "a.png")
    source = FileSource([str(tmp_path)], tmp_path / "out")
    assert [source.kind(item) for item in source.items()] == ["image", "raster"]
    shard = ShardJob(small_predictor(), source, Outputs("parquet"), {}).predict(source.items())
    first, second = parquet.read_table(BytesIO(shard.content)).to_pylist()
    assert Image.open(BytesIO(first["mask"])).size == (60, 40)
    assert second["error"] == (
        f"{path} is a raster or damaged; expected an image for --format parquet, predict it by --engine torch and "
        "--format png"
    )


@pytest.mark.parametrize(
    ("num_images", "batch_size", "expected"),
    [(1, 8, 8), (24, 2, 2), (1024, 8, 8), (1025, 8, 16), (10**7, 16, 992), (10**7, 1000, 1000), (10**7, 1500, 1500)],
)
def test_a_shard_is_whole_batches(num_images, batch_size, expected):
    assert shard_size(num_images, batch_size) == expected


def test_items_survive_as_text():
    items = [InputItem("a/\udce9", "b\udce9.png", 3, ("b", "c")), InputItem("x", "s3://bucket/x y.png")]
    assert encode_items(items).isascii()
    assert decode_items(encode_items(items)) == items
