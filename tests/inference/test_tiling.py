"""Tiling: every pixel once, weights that sum to one, strips that equal the whole map, bounded memory."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation
from hf_segformer.config import InferenceOptions
from hf_segformer.data.reader_protocol import Tile
from hf_segformer.inference.tiling import blend, blending_weights, count_tiles, segment_rows, tile_spans
from hf_segformer.upsampling_segformer import upsample_argmax
from tests.support.tiny import TINY

K = 3


def tiles_of(size, overlap):
    return InferenceOptions(tile_size=size, tile_overlap=overlap)


tilings = st.integers(2, 6).flatmap(
    lambda steps: st.integers(0, steps - 1).map(lambda shared: tiles_of(32 * steps, 32 * shared))
)
sides = st.integers(1, 420)
fast = settings(max_examples=40, deadline=None)


def grid_of(height, width, num_classes=K):
    return torch.randn(num_classes, -(-height // 4), -(-width // 4))


def parts_of(grid):
    """Logits of tiles that are those of the whole grid."""

    def logits_of(tiles):
        return torch.stack(
            [
                grid[:, top // 4 : -(-(top + height) // 4), left // 4 : -(-(left + width) // 4)]
                for top, left, height, width in tiles
            ]
        )

    return logits_of


def blended(height, width, tiling, logits_of, batch_size=1, num_classes=K):
    """Whole grid from its blocks, which must not overlap; missing cells are NaN."""
    whole = torch.full((num_classes, -(-height // 4), -(-width // 4)), torch.nan)
    for block in blend(height, width, tiling, logits_of, batch_size):
        here = slice(block.rows.start, block.rows.stop), slice(block.columns.start, block.columns.stop)
        assert whole[:, *here].isnan().all()
        above, beside = block.before
        whole[:, *here] = block.logits[:, above:, beside:][:, : len(block.rows), : len(block.columns)]
    return whole


def segmentation_of(height, width, tiling, logits_of, **others):
    """Segmentation map from its strips, which must follow each other."""
    strips = []
    for top, classes in segment_rows(height, width, tiling, logits_of, **others):
        assert top == sum(map(len, strips))
        strips.append(classes.copy())
    return np.concatenate(strips)


@fast
@given(tiling=tilings, length=st.integers(1, 3000))
def test_tiles_cover_a_side_on_one_grid(tiling, length):
    spans = tile_spans(length, tiling)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    for first, second in pairwise(spans):
        assert first[0] < second[0] <= first[1] - tiling.tile_overlap
    assert all(start % 32 == 0 and stop - start <= tiling.tile_size for start, stop in spans)
    if length > tiling.tile_size:  # no sliver, which would see next to nothing
        assert all(stop - start > tiling.tile_size - 32 for start, stop in spans)


@fast
@given(tiling=tilings, length=st.integers(1, 3000))
def test_number_of_tiles_is_the_least_for_the_overlap(tiling, length):
    stride = tiling.tile_size - tiling.tile_overlap
    beyond = max(-(-(length - tiling.tile_size) // 32) * 32, 0)
    assert len(tile_spans(length, tiling)) == 1 + -(-beyond // stride)
    assert count_tiles(length, tiling.tile_size, tiling) == len(tile_spans(length, tiling))


@fast
@given(tiling=tilings, length=st.integers(1, 3000))
def test_weights_sum_to_one_fall_to_the_edges_and_are_never_zero(tiling, length):
    spans = [(start // 4, -(-stop // 4)) for start, stop in tile_spans(length, tiling)]
    weights = blending_weights(spans)
    total = torch.zeros(spans[-1][1])
    for (first, end), each in zip(spans, weights, strict=True):
        assert (each > 0).all()
        total[first:end] += each
    torch.testing.assert_close(total, torch.ones_like(total))
    assert weights[0][0] == 1
    assert weights[-1][-1] == 1


def test_weights_are_linear_where_two_tiles_overlap():
    first, second = blending_weights([(0, 16), (8, 24)])
    torch.testing.assert_close(first[8:], torch.arange(15, 0, -2) / 16)
    torch.testing.assert_close(second[:8], torch.arange(1, 16, 2) / 16)
    assert (first[:8] == 1).all()
    assert (second[8:] == 1).all()


@fast
@given(tiling=tilings, height=sides, width=sides, batch_size=st.integers(1, 3))
def test_blended_parts_of_a_grid_are_the_grid(tiling, height, width, batch_size):
    grid = grid_of(height, width)
    found = blended(height, width, tiling, parts_of(grid), batch_size)
    torch.testing.assert_close(found, grid, rtol=1e-5, atol=1e-5)


@fast
@given(tiling=tilings, height=sides, width=sides)
def test_strips_equal_the_whole_grid_upsampled_by_four(tiling, height, width):
    grid = grid_of(height, width)
    expected = upsample_argmax(grid[None], (4 * grid.shape[1], 4 * grid.shape[2]))[0, :height, :width]
    found = segmentation_of(height, width, tiling, parts_of(grid))
    assert found.shape == (height, width)
    assert found.dtype == np.uint8
    assert (found != expected.numpy()).mean() < 1e-4  # sums of float32 weights, where two classes are nearly equal


def test_a_block_is_upsampled_in_pieces_that_fit(monkeypatch):
    monkeypatch.setattr("hf_segformer.inference.tiling._UPSAMPLED_SIZE", 16 * 5 * 300)
    grid = grid_of(230, 300)
    expected = upsample_argmax(grid[None], (4 * 58, 300))[0, :230]
    assert (segmentation_of(230, 300, tiles_of(128, 32), parts_of(grid)) != expected.numpy()).mean() < 1e-4


def test_binary_and_wide_segmentation():
    one = grid_of(90, 150, num_classes=1)
    expected = upsample_argmax(one[None], (92, 152))[0, :90, :150]
    assert (segmentation_of(90, 150, tiles_of(64, 32), parts_of(one)) == expected.numpy()).all()
    many = grid_of(90, 150, num_classes=300)
    assert segmentation_of(90, 150, tiles_of(64, 0), parts_of(many), dtype=np.uint16).max() > 255


def test_tiles_of_a_batch_have_one_size_and_are_neighbours():
    asked = []
    grid = grid_of(200, 300)

    def logits_of(tiles):
        asked.append(list(tiles))
        return parts_of(grid)(tiles)

    segmentation_of(200, 300, tiles_of(128, 32), logits_of, batch_size=2)
    assert [[tile.left for tile in tiles] for tiles in asked] == [[0, 96], [192]] * 2
    assert asked[0][0] == Tile(0, 0, 128, 128)
    assert asked[-1][0] == Tile(96, 192, 104, 108)
    assert all(len({tile[2:] for tile in tiles}) == 1 for tiles in asked)


class Largest(TorchDispatchMode):
    """Size of the largest tensor that any operation returns, in numbers."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("overlap", [0, 32])
def test_no_tensor_grows_with_the_height_and_only_the_seam_with_the_width(overlap):
    tiling, num_classes = tiles_of(64, overlap), 7

    def noise(tiles):
        _, _, height, width = tiles[0]
        return torch.randn(len(tiles), num_classes, -(-height // 4), -(-width // 4))

    def largest(height, width):
        with Largest() as mode:
            for _ in segment_rows(height, width, tiling, noise):
                pass
        return mode.size

    tile = (
        num_classes * (64 + 4) ** 2
    )  # one tile at full size, with a cell around, in the reference of `upsample_argmax`
    assert largest(448, 192) == largest(1600, 192) < 2 * tile
    seam = num_classes * (overlap // 4 + 8 + 2) * (8000 // 4)
    assert largest(200, 8000) <= max(seam, 2 * tile) < num_classes * 16 * 2000 * 2


def without_attention(depths=(1, 1, 1, 1)):
    """Network whose attention adds nothing to the tokens, so that only its convolutions see other pixels."""
    torch.manual_seed(1)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**{**TINY, "depths": list(depths)}, num_labels=K)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.output.dense" in name:
                parameter.zero_()
            elif "decode_head" in name:
                parameter.mul_(3)
    return model


def test_tiled_logits_are_the_whole_ones_away_from_edges():
    model, side, reach = without_attention(), 640, 128  # pixels from which an edge is visible, through all stages
    tiling = tiles_of(352, 64)
    pixels = torch.randn(1, 3, side, side - 32)
    columns, rows = (tile_spans(length, tiling) for length in (side - 32, side))
    assert rows == [(0, 352), (288, 640)]
    assert columns == [(0, 352), (256, 608)]
    with torch.no_grad():
        whole = model(pixels).logits[0]

        def logits_of(tiles):
            return torch.cat([model(pixels[:, :, t : t + h, left : left + w]).logits for t, left, h, w in tiles])

        difference = (blended(side, side - 32, tiling, logits_of) - whole).abs().amax(0) / whole.abs().max()
    far_rows, far_columns = (
        torch.tensor([distance(4 * cell + 2, spans) >= reach for cell in range(spans[-1][1] // 4)])
        for spans in (rows, columns)
    )
    far = far_rows[:, None] & far_columns
    assert far.float().mean() > 0.3
    assert difference[far].max() < 1e-5
    assert difference.max() > 1e-3  # at the edges it is not so: the test could fail


def distance(place, spans):
    """Distance of a pixel from the nearest edge, other than the image's, of the tiles that see it."""
    end = spans[-1][1]
    edges = [edge for span in spans if span[0] <= place < span[1] for edge in span if edge not in (0, end)]
    return min((abs(place - edge) for edge in edges), default=end)
