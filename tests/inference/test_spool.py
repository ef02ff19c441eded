"""Rasters that are killed: the next run repeats no row of tiles, and ends with the same files."""

import numpy as np
import pytest
import torch

from hf_segformer import SegFormerImageProcessor
from hf_segformer.config import InferenceOptions
from hf_segformer.data.readers import open_raster
from hf_segformer.inference.large_image import segment_raster
from hf_segformer.inference.segmenter import Segmenter
from hf_segformer.inference.spool import Spool, rows_of
from hf_segformer.inference.tiling import Seam, count_tiles, segment_rows
from tests.inference.test_predictor import lively

tifffile = pytest.importorskip("tifffile")

OPTIONS = InferenceOptions(tile_size=64, tile_overlap=32)
SIZE = 200, 150


def scene(path, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (29, 22, 3), np.uint8)
    pixels = small.repeat(7, 0).repeat(7, 1)[: SIZE[0], : SIZE[1]]
    tifffile.imwrite(path, pixels, photometric="rgb", extratags=[(42113, 2, 0, "3", True)])
    return path


def segmenter():
    return Segmenter(lively(), SegFormerImageProcessor(do_resize=False), OPTIONS)


class Killed(BaseException):
    pass


class Planes:
    """Keeps labels and confidence."""

    needs_confidence = True

    def __init__(self, kept):
        self.kept = kept

    def check(self, raster):
        assert raster.height == SIZE[0]

    def write(self, found):
        self.kept += [np.array(found.labels), np.array(found.confidence)]


def predict(path, out, kill_after=None, monkeypatch=None):
    """Segment a raster; return the number of tiles that were predicted, and the planes of labels and confidence."""
    ours, calls, planes = segmenter(), [], []
    forward = ours.tile_logits

    def counted(tiles):
        if kill_after is not None and len(calls) == kill_after:
            raise Killed
        calls.append(1)
        return forward(tiles)

    ours.tile_logits = counted
    with open_raster(path, num_rows=64) as raster:
        segment_raster(ours, raster, out, progress=False, resumable=True, output=Planes(planes))
    return len(calls), planes


def test_a_killed_run_continues_and_ends_bit_equal(tmp_path):
    path, total = scene(tmp_path / "scene.tif"), count_tiles(*SIZE, OPTIONS)
    number, whole = predict(path, tmp_path / "whole.tif")
    assert number == total
    killed = 0
    for kill_after in (total // 2, total // 4):
        with pytest.raises(Killed):
            predict(path, tmp_path / "mask.tif", kill_after)
        killed += kill_after
        assert not (tmp_path / "mask.tif").exists()
    number, planes = predict(path, tmp_path / "mask.tif")
    row = count_tiles(64, SIZE[1], OPTIONS)
    assert 0 < number < total
    assert total <= killed + number < total + 2 * row  # at most one row of tiles is repeated each time
    assert all(map(np.array_equal, planes, whole))
    assert (tmp_path / "mask.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mask.tif", "scene.tif", "whole.tif"]


def test_confidence_is_the_probability_of_the_class(tmp_path):
    ours = segmenter()
    ours.options = InferenceOptions(tile_size=256)
    pixels = tifffile.imread(scene(tmp_path / "scene.tif"))
    tile = pixels.transpose(2, 0, 1)
    [(_, labels, found)] = segment_rows(*SIZE, ours.options, lambda _: ours.tile_logits([tile]), with_probability=True)
    logits = torch.nn.functional.interpolate(ours.tile_logits([tile]), (200, 152), mode="bilinear")[0, :, :, :150]
    np.testing.assert_array_equal(labels, logits.argmax(0))
    np.testing.assert_allclose(found, logits.softmax(0).amax(0), atol=1e-5)
    [(_, plain)] = segment_rows(*SIZE, ours.options, lambda _: ours.tile_logits([tile]))
    np.testing.assert_array_equal(plain, labels)


@pytest.mark.slow
def test_another_source_or_another_run_begins_again(tmp_path):
    path = scene(tmp_path / "scene.tif")
    with pytest.raises(Killed):
        predict(path, tmp_path / "mask.tif", 9)
    scene(path, seed=1)
    number, planes = predict(path, tmp_path / "mask.tif")
    assert number == count_tiles(*SIZE, OPTIONS)
    assert np.array_equal(planes[0], predict(path, tmp_path / "again.tif")[1][0])


@pytest.mark.parametrize("damage", ["short", "state", "key"])
def test_a_damaged_folder_begins_again(tmp_path, damage):
    arguments = tmp_path / "rows", tmp_path / "mask.tif", {"a": 1}, 5, (np.uint8, np.uint16)
    spool = Spool(*arguments)
    planes = [np.arange(15, dtype=np.uint8).reshape(3, 5), np.arange(15, dtype=np.uint16).reshape(3, 5)]
    spool.append(planes, Seam(2, torch.ones(2, 1, 5)), np.zeros((1, 5), bool))
    with (tmp_path / "rows" / "1.raw").open("ab") as file:  # a strip whose state was not written
        file.write(b"half a strip")
    again = Spool(*arguments)
    assert (again.num_rows, again.seam.row, again.valid.any()) == (3, 2, False)
    assert torch.equal(again.seam.logits, torch.ones(2, 1, 5))
    assert [np.array_equal(again.plane(i), each) for i, each in enumerate(planes)] == [True, True]
    assert [top for top, _ in rows_of(np.zeros((1025, 1)))] == [0, 512, 1024]
    if damage == "short":
        (tmp_path / "rows" / "0.raw").write_bytes(b"1")
    elif damage == "state":
        (tmp_path / "rows" / "state.npz").write_bytes(b"PK damaged")
    assert Spool(*arguments[:2], {"a": 2 if damage == "key" else 1}, *arguments[3:]).num_rows == 0


def test_an_error_names_the_file_that_the_rows_are_for(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        Spool(tmp_path / "nowhere" / "rows", tmp_path / "mask.tif", {}, 5, (np.uint8,))
    assert caught.value.filename == str(tmp_path / "mask.tif")
