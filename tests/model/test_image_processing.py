"""The image processor: parity with Transformers, every kind of image and mask, and error messages."""

import inspect
import json
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, pipeline
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.utils import is_torchvision_available

from hf_segformer.image_processing_segformer import SegFormerImageProcessor

ORIENTATION = ExifTags.Base.Orientation
BANDS = {"image_mean": [0.1, 0.2, 0.3, 0.4, 0.5], "image_std": [0.5, 0.6, 0.7, 0.8, 0.9]}
RAW = {"do_resize": False, "do_rescale": False, "do_normalize": False}

few_examples = settings(max_examples=30, deadline=None)
# Longer than any number of channels, so that Transformers, too, sees which axis holds them.
sides = st.integers(5, 40)

# Transformers 5.17 resizes masks with a constant from torchvision, which may be absent.
needs_builtin_masks = pytest.mark.skipif(
    "NEAREST_EXACT" in inspect.getsource(SegformerImageProcessorPil) and not is_torchvision_available(),
    reason="this Transformers' own PIL processor needs torchvision for masks",
)


def random_image(height=9, width=13, seed=0, num_channels=3):
    """Return random bytes (H, W, C)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, num_channels), dtype=np.uint8)


def random_mask(height=9, width=13, seed=0, dtype=np.uint8):
    """Return random labels (H, W), among them those that `do_reduce_labels` treats specially."""
    return np.random.default_rng(seed).choice([0, 1, 2, 17, 254, 255], (height, width)).astype(dtype)


def raw(image, **keywords):
    """Return an image as the processor reads it, before resizing and scaling."""
    return SegFormerImageProcessor(**{**RAW, **keywords})(image)["pixel_values"][0]


FORMS = {
    "bytes": lambda image: image,
    "channels first": lambda image: image.transpose(2, 0, 1),
    "int64": lambda image: image.astype(np.int64),
    "whole floats": lambda image: image.astype(np.float32),
    # Not multiples of 1/255, so that rounding shows.
    "unit floats": lambda image: (image / 300).astype(np.float32),
    "unit doubles": lambda image: image / 300,
    "tensor": lambda image: torch.from_numpy(image.transpose(2, 0, 1).copy()),
    "PIL": Image.fromarray,
    "list": lambda image: [image, image[::-1]],
    "nested list": lambda image: [[Image.fromarray(image)], [Image.fromarray(image)]],
    "batch": lambda image: np.stack([image, image]),
    "batch of tensors": lambda image: torch.from_numpy(np.stack([image, image])),
}


class TestParity:
    """Pixels and labels bit-equal to those of Transformers' PIL processor."""

    @pytest.mark.parametrize("form", FORMS)
    @few_examples
    @given(data=st.data())
    def test_pixels_equal_transformers(self, form, data):
        image = FORMS[form](random_image(data.draw(sides), data.draw(sides), data.draw(st.integers(0, 99))))
        keywords = {
            "size": {"height": data.draw(sides), "width": data.draw(sides)},
            "resample": data.draw(st.sampled_from(list(Image.Resampling))),
            "do_rescale": data.draw(st.booleans()),
            "rescale_factor": data.draw(st.sampled_from([1 / 255, 0.5])),
        }
        expected = SegformerImageProcessorPil(**keywords)(image)["pixel_values"]
        actual = SegFormerImageProcessor(**keywords)(image)["pixel_values"]
        np.testing.assert_array_equal(actual, np.stack(expected))
        assert {pixels.dtype for pixels in actual} == {np.dtype(np.float32)}

    @pytest.mark.parametrize("do_resize", [True, False])
    @pytest.mark.parametrize("do_rescale", [True, False])
    @pytest.mark.parametrize("do_normalize", [True, False])
    @pytest.mark.parametrize("form", ["bytes", "unit floats", "PIL"])
    def test_steps_can_be_switched_off_one_by_one(self, form, do_resize, do_rescale, do_normalize):
        keywords = {"do_resize": do_resize, "do_rescale": do_rescale, "do_normalize": do_normalize, "size": 11}
        image = FORMS[form](random_image())
        expected = SegformerImageProcessorPil(**keywords)(image)["pixel_values"][0]
        np.testing.assert_array_equal(SegFormerImageProcessor(**keywords)(image)["pixel_values"][0], expected)

    def test_the_defaults_equal_transformers(self):
        image = Image.fromarray(random_image(60, 47))
        actual = SegFormerImageProcessor()(image, return_tensors="pt").pixel_values
        assert actual.shape == (1, 3, 512, 512)
        assert torch.equal(actual, SegformerImageProcessorPil()(image, return_tensors="pt").pixel_values)

    @needs_builtin_masks
    @few_examples
    @given(height=sides, width=sides, new_height=sides, new_width=sides, reduce=st.booleans(), is_pil=st.booleans())
    def test_labels_equal_transformers(self, height, width, new_height, new_width, reduce, is_pil):
        image, mask = random_image(height, width), random_mask(height, width)
        mask = Image.fromarray(mask) if is_pil else mask
        keywords = {"size": {"height": new_height, "width": new_width}, "do_reduce_labels": reduce}
        # Transformers' processor modifies the caller's mask.
        expected = SegformerImageProcessorPil(**keywords)(image, mask.copy(), return_tensors="pt").labels
        actual = SegFormerImageProcessor(**keywords)(image, mask, return_tensors="pt").labels
        assert actual.dtype == torch.int64
        assert torch.equal(actual, expected)

    @few_examples
    @given(height=sides, width=sides, shortest=sides, longest=st.none() | st.integers(5, 60))
    def test_shortest_edge_equals_transformers(self, height, width, shortest, longest):
        size = {"shortest_edge": shortest} | ({} if longest is None else {"longest_edge": longest})
        image = random_image(height, width)
        expected = SegformerImageProcessorPil(size=size)(image)["pixel_values"][0]
        np.testing.assert_array_equal(SegFormerImageProcessor(size=size)(image)["pixel_values"][0], expected)

    PUBLISHED = (
        {"feature_extractor_type": "SegformerFeatureExtractor", "size": 512, "resample": 2, "do_resize": True},
        {"feature_extractor_type": "SegformerFeatureExtractor", "image_processor_type": "SegformerFeatureExtractor"},
        {"image_processor_type": "SegformerImageProcessor", "size": {"height": 32, "width": 24}},
        {
            "image_processor_type": "SegformerImageProcessorFast",
            "crop_size": None,
            "data_format": "channels_first",
            "default_to_square": True,
            "device": None,
            "disable_grouping": None,
            "do_center_crop": None,
            "do_convert_rgb": None,
            "input_data_format": None,
            "return_tensors": None,
            "size": {"height": 24, "width": 40},
            "image_mean": [0.5, 0.5, 0.5],
        },
        {"image_processor_type": "SegformerImageProcessor", "do_resize": None, "do_rescale": False, "unheard_of": 1},
        {"do_resize": 1, "do_rescale": 0, "do_normalize": 1, "do_convert_rgb": 1, "size": 24},
        {"image_mean": 0.5, "image_std": 0.25, "size": 24},
        {"default_to_square": False, "size": 24},
    )

    @pytest.mark.parametrize("content", PUBLISHED)
    def test_published_files_are_read_as_by_transformers(self, content, tmp_path):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        image = Image.fromarray(random_image())
        expected = SegformerImageProcessorPil.from_pretrained(tmp_path)(image)["pixel_values"][0]
        actual = SegFormerImageProcessor.from_pretrained(tmp_path)(image)["pixel_values"][0]
        np.testing.assert_array_equal(actual, expected)

    def test_reduce_labels_in_an_old_file_is_do_reduce_labels(self, tmp_path):
        file = tmp_path / "preprocessor_config.json"
        for content, expected in (
            ({"reduce_labels": True}, True),
            ({"reduce_labels": False}, False),
            ({"reduce_labels": True, "do_reduce_labels": False}, False),
        ):
            file.write_text(json.dumps(content))
            assert SegFormerImageProcessor.from_pretrained(tmp_path).do_reduce_labels is expected
        file.write_text(json.dumps({"reduce_labels": True}))
        assert not SegFormerImageProcessor.from_pretrained(tmp_path, do_reduce_labels=False).do_reduce_labels


class TestImages:
    """Every kind of image becomes three channels."""

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
    def test_pil_modes_become_rgb(self, mode):
        image = Image.fromarray(random_image()).convert(mode)
        np.testing.assert_array_equal(raw(image), np.moveaxis(np.asarray(image.convert("RGB")), -1, 0))

    def test_a_palette_with_transparency_becomes_rgb_without_a_warning(self):
        image = Image.fromarray(random_image()).quantize(8)
        expected = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
        image.info["transparency"] = bytes(range(8))
        np.testing.assert_array_equal(raw(image), expected)

    def test_alpha_is_dropped_before_resizing(self):
        image = Image.fromarray(random_image())
        image.putalpha(Image.fromarray(random_mask()))
        processor = SegFormerImageProcessor(size=7)
        expected = processor(image.convert("RGB"))["pixel_values"][0]
        np.testing.assert_array_equal(processor(image)["pixel_values"][0], expected)

    @pytest.mark.parametrize("shape", [(9, 13), (1, 9, 13), (9, 13, 1)])
    @pytest.mark.parametrize("as_input", [np.asarray, torch.from_numpy])
    def test_grey_arrays_repeat(self, shape, as_input):
        grey = random_image(num_channels=1)[..., 0]
        np.testing.assert_array_equal(raw(as_input(grey.reshape(shape))), np.stack([grey] * 3))

    @pytest.mark.parametrize("dtype", ["<u2", ">u2"])
    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (3, 2, 3)])
    def test_16_bits_are_scaled_without_rounding(self, dtype, shape):
        values = np.resize([0, 128, 129, 257 * 100, 65535, 65406], shape).astype(dtype)
        assert values.dtype == dtype
        expected = (values.astype(float) / 257).astype(np.float32)
        expected = expected if shape == (3, 2, 3) else np.stack([expected.reshape(2, 3)] * 3)
        np.testing.assert_array_equal(raw(values), expected)

    @pytest.mark.parametrize("largest", [200, 60000])
    def test_the_byte_order_changes_nothing(self, largest, tmp_path):
        values = np.linspace(0, largest, 15).astype("<u2").reshape(3, 5)
        swapped, expected = values.astype(">u2"), raw(values)
        np.save(tmp_path / "grey.npy", swapped)
        image = Image.frombytes("I;16B", (5, 3), swapped.tobytes())
        for source in (swapped, image, np.ma.MaskedArray(swapped), np.load(tmp_path / "grey.npy")):
            np.testing.assert_array_equal(raw(source), expected)
            assert SegFormerImageProcessor().used_range(source) == (0, largest, 0, 65535)
            labels = SegFormerImageProcessor(**RAW)(values, source)["labels"][0]
            np.testing.assert_array_equal(labels, values)
        np.testing.assert_array_equal(raw(values.astype(">f4")), values * np.ones((3, 1, 1)))

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_16_bit_files_are_scaled_to_bytes(self, suffix, tmp_path):
        values = np.arange(15, dtype=np.uint16).reshape(3, 5) * 257
        Image.fromarray(values).save(tmp_path / f"grey.{suffix}")
        with Image.open(tmp_path / f"grey.{suffix}") as image:
            assert image.mode.startswith("I;16")
            np.testing.assert_array_equal(raw(image), np.stack([values // 257] * 3))

    def test_32_bit_modes_are_images_if_their_values_fit(self):
        grey = random_image(num_channels=1)[..., 0]
        for dtype in (np.int32, np.float32):
            np.testing.assert_array_equal(raw(Image.fromarray(grey.astype(dtype))), np.stack([grey] * 3))
        np.testing.assert_array_equal(raw(Image.fromarray(grey.astype(np.float32) * 1.5)), np.stack([grey * 1.5] * 3))
        for value in (-1, 65536):
            with pytest.raises(ValueError, match=rf"image 0 has dtype int32 and values from .* to {value};.* uint16"):
                raw(Image.fromarray(np.full((4, 5), value, dtype=np.int32)))

    def test_16_bit_pgm_files_are_scaled_to_bytes(self, tmp_path):
        values = np.arange(15, dtype=np.uint16).reshape(3, 5) * 257
        (tmp_path / "grey.pgm").write_bytes(b"P5 5 3 65535\n" + values.astype(">u2").tobytes())
        with Image.open(tmp_path / "grey.pgm") as image:
            assert image.mode == "I"
        np.testing.assert_array_equal(raw(tmp_path / "grey.pgm"), np.stack([values // 257] * 3))

    def test_16_bit_images_of_a_narrow_range_cause_a_warning(self, monkeypatch):
        warned = []
        logger = SimpleNamespace(warning_once=warned.append)
        monkeypatch.setattr("hf_segformer.image_processing_segformer.logger", logger)
        wide = random_image().astype(np.uint16)
        for image in (random_image(), wide * 257, np.zeros_like(wide)):
            raw(image)
        raw(random_image(num_channels=5).astype(np.uint16), **BANDS)
        assert not warned
        assert raw(wide).max() <= 1
        assert "% of the range 0 to 65535" in warned[0]
        assert "set value_range" in warned[0]
        assert 'astype("uint8")' in warned[0]
        raw(wide, value_range=[0, 255])
        assert len(warned) == 1

    def test_bool_is_black_and_white(self):
        mask = random_mask() > 1
        np.testing.assert_array_equal(raw(mask), np.stack([mask * 255.0] * 3))
        np.testing.assert_array_equal(raw(mask), raw(Image.fromarray(mask)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_tensors_of_any_float_type(self, dtype):
        image = torch.from_numpy(random_image()).to(dtype).requires_grad_()
        np.testing.assert_array_equal(raw(image), np.moveaxis(random_image(), -1, 0))

    @pytest.mark.parametrize(("scale", "offset"), [(3.7, -100), (0.97, 0.3), (0.005, -1), (2.0, 0)])
    def test_float_images_on_other_scales_are_resized_as_floats(self, scale, offset):
        image = random_image() * scale + offset
        actual = SegFormerImageProcessor(size=(5, 6), do_rescale=False, do_normalize=False)(image)["pixel_values"][0]
        for band, expected in zip(actual, np.moveaxis(image.astype(np.float32), -1, 0), strict=True):
            np.testing.assert_array_equal(band, Image.fromarray(expected).resize((6, 5), Image.Resampling.BILINEAR))

    @pytest.mark.parametrize("as_path", [str, lambda path: path])
    def test_paths_are_opened_and_closed(self, as_path, tmp_path):
        path = tmp_path / "image.png"
        Image.fromarray(random_image()).save(path)
        np.testing.assert_array_equal(raw(as_path(path)), np.moveaxis(random_image(), -1, 0))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied_to_images_and_masks(self, orientation, tmp_path):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        Image.fromarray(random_image()).save(tmp_path / "image.png", exif=exif)
        Image.fromarray(random_mask()).save(tmp_path / "mask.png", exif=exif)
        turn = [0, lambda a: a, np.fliplr, lambda a: a[::-1, ::-1], np.flipud]
        turn += [
            lambda a: a.swapaxes(0, 1),
            lambda a: np.rot90(a, -1),
            lambda a: np.rot90(a, 2).swapaxes(0, 1),
            np.rot90,
        ]
        for name in (str, Image.open):
            image, mask = name(tmp_path / "image.png"), name(tmp_path / "mask.png")
            batch = SegFormerImageProcessor(**RAW)(image, mask)
            np.testing.assert_array_equal(
                batch["pixel_values"][0], np.moveaxis(turn[orientation](random_image()), -1, 0)
            )
            np.testing.assert_array_equal(batch["labels"][0], turn[orientation](random_mask()))
            if name is Image.open:
                assert image.size == (13, 9)
                image.close()
                mask.close()

    @few_examples
    @given(form=st.sampled_from(sorted(FORMS)), reduce=st.booleans(), resize=st.booleans())
    def test_inputs_are_not_modified(self, form, reduce, resize):
        image, mask = FORMS[form](random_image()), random_mask()
        before = deepcopy(image)
        num_images = 2 if "list" in form or "batch" in form else 1
        processor = SegFormerImageProcessor(do_reduce_labels=reduce, do_resize=resize, size=8)
        result = processor(image, [mask] * num_images, return_tensors="pt")
        result["pixel_values"].fill_(-1)
        result["labels"].fill_(-1)
        assert np.array_equal(np.asarray(image), np.asarray(before))
        np.testing.assert_array_equal(mask, random_mask())


class TestBands:
    """Arrays with any number of bands."""

    @few_examples
    @given(height=st.integers(6, 30), width=st.integers(6, 30), first=st.booleans(), seed=st.integers(0, 99))
    def test_each_band_is_resized_separately(self, height, width, first, seed):
        image = random_image(height, width, seed, num_channels=5)
        processor = SegFormerImageProcessor(size=(7, 11), **BANDS)
        actual = processor(image.transpose(2, 0, 1) if first else image, return_tensors="pt").pixel_values
        assert actual.shape == (1, 5, 7, 11)
        for band in range(5):
            resized = Image.fromarray(image[..., band]).resize((11, 7), Image.Resampling.BILINEAR)
            expected = (np.asarray(resized) / 255 - BANDS["image_mean"][band]) / BANDS["image_std"][band]
            np.testing.assert_allclose(actual[0, band], expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("dtype", "unit"),
        [(np.int16, 30), (np.uint16, 30), (np.int32, 30), (np.float32, 30), (np.float64, 30), (np.float32, 1 / 300)],
    )
    def test_measurements_keep_their_units(self, dtype, unit):
        image = (random_image(num_channels=5) * unit).astype(dtype)
        keywords = {"size": (5, 6), "do_rescale": False, "do_normalize": False, **BANDS}
        actual = SegFormerImageProcessor(**keywords)(image)["pixel_values"][0]
        for band in range(5):
            expected = Image.fromarray(image[..., band].astype(np.float32)).resize((6, 5), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(actual[band], expected)

    def test_one_channel_reads_grey(self):
        one = {"image_mean": [0.5], "image_std": [0.5]}
        image = Image.fromarray(random_image())
        np.testing.assert_array_equal(raw(image, **one)[0], image.convert("L"))
        np.testing.assert_array_equal(raw(random_mask(), **one)[0], random_mask())

    def test_the_fourth_band_of_a_pil_image_is_not_alpha(self):
        image = Image.fromarray(random_image(4, 13, num_channels=4))
        four = {"image_mean": [0.0] * 4, "image_std": [1.0] * 4, "do_rescale": False, "size": (5, 6)}
        actual = SegFormerImageProcessor(**four)(image)["pixel_values"][0]
        expected = [band.resize((6, 5), Image.Resampling.BILINEAR) for band in image.split()]
        np.testing.assert_array_equal(actual, np.stack(expected))

    def test_channels_are_first_unless_the_caller_says_otherwise(self):
        image = random_image(3, 5)
        np.testing.assert_array_equal(raw(image), image)
        processor = SegFormerImageProcessor(**RAW)
        last = processor(image, input_data_format="channels_last")["pixel_values"][0]
        np.testing.assert_array_equal(last, np.moveaxis(image, -1, 0))
        np.testing.assert_array_equal(raw(random_image(1, 5)), np.moveaxis(random_image(1, 5), -1, 0))

    @pytest.mark.parametrize(("shape", "bands"), [((9, 13, 5), 5), ((2, 9, 13), 2), ((9, 13, 4), 4), ((9, 1, 13), 9)])
    def test_a_wrong_number_of_bands_is_named(self, shape, bands):
        with pytest.raises(
            ValueError, match=rf"image 1 has {bands} bands .*; expected 3, as many as image_mean and image_std"
        ):
            raw([random_image(), np.zeros(shape, dtype=np.uint8)])
        with pytest.raises(ValueError, match=r"image 0 has 3 bands .*; expected 5"):
            raw(Image.fromarray(random_image()), **BANDS)


class TestSizes:
    """keep_ratio and size_divisor."""

    @pytest.mark.parametrize(
        ("size", "divisor", "shape", "expected"),
        [
            # The paper's evaluation: Resize((2048, 512), keep_ratio=True), then sides to multiples of 32.
            ({"shortest_edge": 512, "longest_edge": 2048}, 32, (512, 683), (512, 704)),
            ({"shortest_edge": 512, "longest_edge": 2048}, 32, (500, 375), (704, 512)),
            ({"shortest_edge": 512, "longest_edge": 2048}, 32, (100, 600), (352, 2048)),
            ({"shortest_edge": 512, "longest_edge": 2048}, None, (100, 600), (341, 2048)),
            # 60 * 32 / 37 = 51.89, 3 * 32 / 64 = 1.5: to the nearest, half goes up.
            ({"shortest_edge": 32}, None, (37, 60), (32, 52)),
            ({"shortest_edge": 32}, None, (60, 37), (52, 32)),
            ({"height": 32, "width": 32}, None, (64, 3), (32, 2)),
            ({"height": 64, "width": 96}, None, (100, 100), (64, 64)),
            ({"height": 64, "width": 96}, None, (20, 10), (64, 32)),
            ({"height": 64, "width": 96}, 32, (20, 9), (64, 32)),
            (48, None, (60, 120), (24, 48)),
            ((48, 40), 32, (60, 120), (32, 64)),
            ({"height": 8, "width": 8}, None, (1, 1000), (1, 8)),
        ],
    )
    def test_keep_ratio_is_the_papers_arithmetic(self, size, divisor, shape, expected):
        processor = SegFormerImageProcessor(size=size, keep_ratio=True, size_divisor=divisor)
        image, mask = np.zeros((*shape, 3), dtype=np.uint8), np.zeros(shape, dtype=np.uint8)
        batch = processor(image, mask, input_data_format="channels_last", return_tensors="pt")
        assert batch.pixel_values.shape == (1, 3, *expected)
        assert batch.labels.shape == (1, *expected)

    @few_examples
    @given(height=st.integers(1, 90), width=st.integers(1, 90), divisor=st.sampled_from([1, 8, 32]))
    def test_sides_are_the_next_multiples_of_the_divisor(self, height, width, divisor):
        sized = {"size": {"shortest_edge": 16}, "keep_ratio": True}
        image = Image.new("RGB", (width, height))
        exact = SegFormerImageProcessor(**sized)(image)["pixel_values"][0].shape[1:]
        rounded = SegFormerImageProcessor(**sized, size_divisor=divisor)(image)["pixel_values"][0].shape[1:]
        for side, multiple in zip(exact, rounded, strict=True):
            assert multiple % divisor == 0
            assert side <= multiple < side + divisor

    def test_size_divisor_works_without_keep_ratio(self):
        batch = SegFormerImageProcessor(size=(33, 50), size_divisor=32)(random_image(), return_tensors="pt")
        assert batch.pixel_values.shape == (1, 3, 64, 64)

    def test_a_call_may_switch_size_divisor_off(self):
        processor = SegFormerImageProcessor(size=(33, 50), size_divisor=32)
        assert processor(random_image(), size_divisor=None)["pixel_values"][0].shape == (3, 33, 50)
        assert processor.size_divisor == 32

    def test_an_image_is_resized_once(self):
        processor = SegFormerImageProcessor(size={"shortest_edge": 20}, keep_ratio=True, size_divisor=32)
        expected = SegFormerImageProcessor(size=32)(random_image())["pixel_values"][0]
        np.testing.assert_array_equal(processor(random_image())["pixel_values"][0], expected)


class TestMasks:
    """Masks hold labels: never interpolated, never colours."""

    @few_examples
    @given(height=sides, width=sides, new_height=sides, new_width=sides)
    def test_resizing_adds_no_labels_and_equals_pil(self, height, width, new_height, new_width):
        mask = random_mask(height, width, seed=height)
        processor = SegFormerImageProcessor(size=(new_height, new_width), resample=Image.Resampling.BICUBIC)
        labels = processor(random_image(height, width), mask, return_tensors="pt").labels[0]
        expected = Image.fromarray(mask).resize((new_width, new_height), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(labels, expected)

    @pytest.mark.parametrize("dtype", ["bool", "i1", "u1", "i2", "u2", ">u2", "i4", "u4", "i8", "u8"])
    @pytest.mark.parametrize("shape", [(9, 13), (1, 9, 13), (9, 13, 1)])
    def test_any_integer_type_keeps_its_labels(self, dtype, shape):
        largest = 1 if dtype == "bool" else min(np.iinfo(dtype).max, 2**53)
        mask = np.where(random_mask() > 1, largest, 0).astype(dtype)
        labels = SegFormerImageProcessor(size=(9, 13))(random_image(), mask.reshape(shape), return_tensors="pt").labels
        assert labels.dtype == torch.int64
        np.testing.assert_array_equal(labels[0], mask.astype(np.int64))

    def test_tensors_keep_labels_above_255(self):
        mask = torch.from_numpy(random_mask(dtype=np.int32)) * 1000
        labels = SegFormerImageProcessor(**RAW)(random_image(), mask, return_tensors="pt").labels
        assert torch.equal(labels[0], mask.long())

    def test_a_palettes_indices_are_the_labels(self, tmp_path):
        mask = Image.fromarray(random_mask()).convert("P")
        mask.putpalette(random_image(16, 16).tobytes())
        mask.save(tmp_path / "mask.png")
        for source in (mask, tmp_path / "mask.png"):
            labels = SegFormerImageProcessor(**RAW)(random_image(), source)["labels"][0]
            np.testing.assert_array_equal(labels, random_mask())

    @pytest.mark.parametrize("dtype", [bool, np.uint16, np.int32])
    def test_wide_and_one_bit_pil_masks_keep_their_labels(self, dtype):
        mask = (random_mask(dtype=np.uint16) * 100).astype(dtype)
        labels = SegFormerImageProcessor(**RAW)(random_image(), Image.fromarray(mask))["labels"][0]
        np.testing.assert_array_equal(labels, mask)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int64])
    def test_reduced_labels(self, dtype):
        mask = np.array([[0, 1, 2], [254, 255, 255]], dtype=dtype)
        labels = SegFormerImageProcessor(do_reduce_labels=True, **RAW)(random_image(2, 3), mask)["labels"][0]
        np.testing.assert_array_equal(labels, [[255, 0, 1], [253, 255, 255]])

    @pytest.mark.parametrize("as_batch", [np.stack, list, lambda masks: torch.from_numpy(np.stack(masks)[:, None])])
    def test_masks_may_be_a_batch(self, as_batch):
        masks = [random_mask(seed=seed) for seed in range(3)]
        labels = SegFormerImageProcessor(**RAW)([random_image()] * 3, as_batch(masks), return_tensors="pt").labels
        np.testing.assert_array_equal(labels, np.stack(masks))


class TestErrors:
    """One line with the input, its value and the expectation."""

    @pytest.mark.parametrize(
        ("images", "masks", "message"),
        [
            (
                [random_image()] * 2,
                [random_mask(), random_mask(8, 13)],
                "mask 1 is 8x13 .*; expected the size of image 1, 9x13",
            ),
            ([random_image()] * 2, [random_mask()], "1 masks are given for 2 images"),
            (random_image(), random_image(), r"mask 0 has shape \(9, 13, 3\).*convert colours"),
            (random_image(), Image.fromarray(random_image()), "mask 0 is a PIL image of mode RGB.*convert colours"),
            (random_image(), Image.fromarray(random_mask()).convert("LA"), "mask 0 is a PIL image of mode LA"),
            (random_image(), random_mask().astype(np.float32), "mask 0 has dtype float32; expected a mask of integers"),
            (random_image(), torch.zeros(9, 13), "mask 0 has dtype float32"),
            (random_image(), Image.new("F", (13, 9)), "mask 0 is a PIL image of mode F"),
            (random_image(), [None], "mask 0 is a NoneType"),
            (np.zeros((0, 13, 3), np.uint8), None, "image 0 is 0x13.*at least one pixel"),
            (Image.new("RGB", (0, 5)), None, "image 0 is 5x0"),
            ([], None, "no images"),
            (None, None, "image 0 is a NoneType.*path, PIL image"),
            ([[1, 2], [3, 4]], None, "image 0 is a int"),
            (np.zeros((2, 2, 2, 9, 13), np.uint8), None, r"image 0 has shape"),
            (np.zeros((9, 13, 3), complex), None, "image 0 has dtype complex128"),
            (np.full((9, 13, 3), 300), None, "image 0 has dtype int64 and values from 300 to 300"),
            (np.full((9, 13, 3), -1), None, "values from -1 to -1"),
            (np.full((9, 13), np.nan), None, "image 0 holds NaN or infinite"),
            (torch.full((3, 9, 13), float("inf")), None, "image 0 holds NaN or infinite"),
        ],
    )
    def test_bad_inputs_are_named(self, images, masks, message):
        with pytest.raises(ValueError, match=message):
            SegFormerImageProcessor(size=8)(images, masks)

    @pytest.mark.parametrize("form", ["array", "PIL", "path", "target"])
    def test_decompression_bombs_are_refused(self, form, tmp_path, monkeypatch):
        Image.fromarray(random_image(20, 11)).save(tmp_path / "bomb.png")
        bombs = {"array": random_image(20, 11), "PIL": Image.new("RGB", (11, 20)), "path": tmp_path / "bomb.png"}
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 109)
        with pytest.raises(ValueError, match=r"image 0.*220 pixels.*limit, 218"):
            SegFormerImageProcessor(size=(20, 11) if form == "target" else 8)(bombs.get(form, random_image(4, 5)))
        SegFormerImageProcessor(size=(20, 11), do_resize=False)(random_image(4, 5))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        SegFormerImageProcessor(size=(20, 11) if form == "target" else 8)(bombs.get(form, random_image(4, 5)))

    def test_missing_and_broken_files_are_named(self, tmp_path):
        (tmp_path / "text.png").write_text("no image")
        for name in ("absent.png", "text.png"):
            with pytest.raises(OSError, match=name):
                SegFormerImageProcessor()(tmp_path / name)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
    def test_truncated_files_are_named(self, suffix, tmp_path):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(random_image(40, 57)).save(path)
        whole = path.read_bytes()
        for share in (0.1, 0.5, 0.8):
            path.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(OSError, match=rf"image 1, .*cut\.{suffix}: "):
                SegFormerImageProcessor(size=8)([random_image(40, 57), path])
            with pytest.raises(OSError, match=rf"mask 0, .*cut\.{suffix}: "):
                SegFormerImageProcessor(size=8)(random_image(40, 57), path)

    def test_a_truncated_pil_image_is_named(self, tmp_path):
        Image.fromarray(random_image(40, 57)).save(tmp_path / "cut.bmp")
        (tmp_path / "cut.bmp").write_bytes((tmp_path / "cut.bmp").read_bytes()[:3000])
        with (
            Image.open(tmp_path / "cut.bmp") as image,
            pytest.raises(OSError, match=r"image 1, .*cut\.bmp: image file is truncated"),
        ):
            SegFormerImageProcessor(size=8)([random_image(40, 57), image])

    @pytest.mark.parametrize("return_tensors", ["pt", "np"])
    def test_different_sizes_do_not_stack(self, return_tensors):
        processor, images = SegFormerImageProcessor(do_resize=False), [random_image(), random_image(13, 9)]
        with pytest.raises(ValueError, match=r"different sizes after resizing, 9x13, 13x9.*do_resize.*one at a time"):
            processor(images, return_tensors=return_tensors)
        assert [pixels.shape for pixels in processor(images)["pixel_values"]] == [(3, 9, 13), (3, 13, 9)]

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"keep_ration": True}, "'keep_ration'.*'keep_ratio'"),
            ({"segmentation_map": None}, "'segmentation_map'.*'segmentation_maps'"),
            ({"do_center_crop": True}, "do_center_crop is True; .* no such step"),
            ({"do_pad": True}, "do_pad is True"),
            ({"data_format": "channels_last"}, "data_format is 'channels_last'"),
            ({"default_to_square": False}, "default_to_square is False"),
            ({"do_resize": "no"}, "do_resize is 'no'.*True or False"),
            ({"keep_ratio": 1}, "keep_ratio is 1"),
            ({"size": 0}, "size is 0"),
            ({"size": {"height": 5}}, "size is .*height"),
            ({"size": {"longest_edge": 5}}, "size is .*longest_edge"),
            ({"size": {"height": 5, "width": 2.5}}, "size is "),
            ({"size": True}, "size is True"),
            ({"size": np.int64(0)}, "size is .*0"),
            ({"size": (5, 6, 7)}, r"size is \(5, 6, 7\)"),
            ({"size": "big"}, "size is 'big'"),
            ({"resample": 99}, r"resample is 99.*2 \(BILINEAR\)"),
            ({"resample": "bilinear"}, "resample is 'bilinear'"),
            ({"size_divisor": 0}, "size_divisor is 0"),
            ({"size_divisor": 1.5}, "size_divisor is 1.5"),
            ({"size_divisor": True}, "size_divisor is True"),
            ({"rescale_factor": 0}, "rescale_factor is 0"),
            ({"rescale_factor": float("nan")}, "rescale_factor is nan"),
            ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
            ({"image_mean": True}, "image_mean is True.*each channel"),
            ({"image_mean": "0.5"}, "image_mean is '0.5'.*each channel"),
            ({"size": {"max_height": 5, "max_width": 6}}, "size is .*max_height.*expected an int"),
            ({"size": 5, "default_to_square": False}, r"default_to_square is False; .*size=\{'shortest_edge': 512\}"),
            ({"image_mean": ["a", 0.5, 0.5]}, r"image_mean is \['a', 0.5, 0.5\].*finite number"),
            ({"image_mean": [0.5, float("nan"), 0.5]}, r"image_mean is \[0.5, nan, 0.5\]"),
            ({"image_std": [0.5, float("inf"), 0.5]}, r"image_std is \[0.5, inf, 0.5\]"),
            ({"image_std": []}, r"image_std is \[\]"),
            ({"image_mean": [0.5]}, "image_mean has 1 entries and image_std 3"),
            ({"image_std": [1, 0, 1]}, r"image_std is \[1.0, 0.0, 1.0\].*above 0"),
        ],
    )
    def test_bad_keywords_are_named_at_construction_and_in_a_call(self, keywords, message):
        with pytest.raises(ValueError, match=message):
            SegFormerImageProcessor(**keywords)
        with pytest.raises(ValueError, match=message):
            SegFormerImageProcessor().preprocess(random_image(), **keywords)

    def test_a_wrong_layout_or_tensor_type_is_named(self):
        with pytest.raises(ValueError, match="channels_middle"):
            SegFormerImageProcessor()(random_image(), input_data_format="channels_middle")
        with pytest.raises(ValueError, match="jax"):
            SegFormerImageProcessor()(random_image(), return_tensors="jax")


class TestKeywords:
    """Overrides, files and Transformers' conventions for both."""

    def test_overrides_hold_for_one_call(self):
        processor = SegFormerImageProcessor(size=8)
        before = processor.to_dict()
        overridden = processor(random_image(), random_mask(), size=(5, 6), do_reduce_labels=True, do_rescale=None)
        expected = SegFormerImageProcessor(size=(5, 6), do_reduce_labels=True)(random_image(), random_mask())
        for key in ("pixel_values", "labels"):
            np.testing.assert_array_equal(overridden[key][0], expected[key][0])
        assert processor.to_dict() == before

    def test_a_call_keeps_a_subclass_and_its_state(self):
        class Inverted(SegFormerImageProcessor):
            def __init__(self, white, **keywords):
                super().__init__(**keywords)
                self.white = white

            def _scale(self, band, channel):
                return self.white - super()._scale(band, channel)

        processor = Inverted(255, **RAW)
        for overrides in ({}, {"keep_ratio": True}):
            pixels = processor(random_image(), **overrides)["pixel_values"][0]
            np.testing.assert_array_equal(pixels, 255 - raw(random_image()))

    def test_one_number_is_the_mean_or_deviation_of_three_channels(self):
        processor = SegFormerImageProcessor(image_mean=0.5, image_std=np.float32(0.25))
        assert (processor.image_mean, processor.image_std) == ([0.5] * 3, [0.25] * 3)
        expected = SegformerImageProcessorPil(image_mean=0.5, image_std=0.25)(random_image())["pixel_values"][0]
        np.testing.assert_array_equal(processor(random_image())["pixel_values"][0], expected)
        one_band = SegFormerImageProcessor(image_mean=[0.1], image_std=[0.1])
        pixels = one_band(np.zeros((5, 7), np.float32), image_mean=0.5, image_std=0.5, do_resize=False)["pixel_values"]
        assert pixels[0].shape == (1, 5, 7)  # a call keeps the number of channels

    @pytest.mark.parametrize("overrides", [{}, {"do_rescale": True}])
    def test_attributes_may_be_set_like_keywords(self, overrides):
        processor = SegFormerImageProcessor()
        processor.size = 8
        assert processor(random_image(), **overrides)["pixel_values"][0].shape == (3, 8, 8)
        processor.size = "big"
        with pytest.raises(ValueError, match="size is 'big'"):
            processor(random_image(), **overrides)

    def test_numpy_integers_are_sizes_and_can_be_saved(self, tmp_path):
        SegFormerImageProcessor(size=np.int64(16), size_divisor=np.int32(32)).save_pretrained(tmp_path)
        loaded = SegFormerImageProcessor.from_pretrained(tmp_path)
        assert (loaded.size, loaded.size_divisor) == ({"height": 16, "width": 16}, 32)

    def test_transformers_keywords_without_effect_are_accepted(self):
        idle = {"do_center_crop": False, "crop_size": None, "do_convert_rgb": True, "disable_grouping": True}
        idle |= {"data_format": "channels_first", "default_to_square": True, "device": "cpu", "do_pad": None}
        assert SegFormerImageProcessor(**idle).to_dict() == SegFormerImageProcessor().to_dict()
        np.testing.assert_array_equal(
            SegFormerImageProcessor(size=8)(random_image(), **idle)["pixel_values"][0],
            SegFormerImageProcessor(size=8)(random_image())["pixel_values"][0],
        )

    def test_a_file_may_hold_keywords_that_transformers_ignores(self, tmp_path):
        content = {"do_center_crop": True, "crop_size": {"height": 5, "width": 5}, "size": 16}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        image = random_image()
        expected = SegformerImageProcessorPil.from_pretrained(tmp_path)(image)["pixel_values"][0]
        actual = SegFormerImageProcessor.from_pretrained(tmp_path)(image)["pixel_values"][0]
        np.testing.assert_array_equal(actual, expected)

    def test_keywords_survive_saving_and_loading(self, tmp_path):
        keywords = {
            "do_resize": False,
            "size": {"shortest_edge": 48, "longest_edge": 96},
            "resample": Image.Resampling.BICUBIC,
            "keep_ratio": True,
            "size_divisor": 32,
            "do_rescale": False,
            "rescale_factor": 0.25,
            "do_normalize": False,
            **BANDS,
            "do_reduce_labels": True,
            "do_convert_rgb": False,
            "value_range": {"percentiles": [1, 99.5]},
            "ignore_index": -100,
            "binary_threshold": 0.25,
        }
        SegFormerImageProcessor(**keywords).save_pretrained(tmp_path)
        loaded = SegFormerImageProcessor.from_pretrained(tmp_path)
        assert {keyword: getattr(loaded, keyword) for keyword in keywords} == keywords
        assert {*keywords, "reduce_labels"} == set(SegFormerImageProcessor.valid_kwargs.__annotations__)

    def test_saving_writes_type_auto_map_and_code(self, tmp_path):
        SegFormerImageProcessor().save_pretrained(tmp_path)
        content = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert content["image_processor_type"] == "SegFormerImageProcessor"
        assert content["auto_map"] == {"AutoImageProcessor": "image_processing_segformer.SegFormerImageProcessor"}
        assert {path.name for path in tmp_path.glob("*.py")} >= {
            "image_processing_segformer.py",
            "image_io_segformer.py",
            "configuration_segformer.py",
        }

    def test_the_file_keeps_pipelines_from_asking_for_a_video_processor(self, tmp_path, monkeypatch):
        SegFormerImageProcessor().save_pretrained(tmp_path)
        questions = []
        monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
        with pytest.raises((ValueError, ImportError)):
            AutoVideoProcessor.from_pretrained(tmp_path)
        assert not questions

    def test_loading_takes_overrides(self, tmp_path):
        SegFormerImageProcessor(size=64).save_pretrained(tmp_path)
        loaded = SegFormerImageProcessor.from_pretrained(tmp_path, size=32, keep_ratio=True)
        assert (loaded.size, loaded.keep_ratio) == ({"height": 32, "width": 32}, True)

    def test_loading_refuses_unknown_keywords(self, tmp_path):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 64, "keep_rati": True}))
        with pytest.raises(ValueError, match=r"'keep_rati'.*'keep_ratio'"):
            SegFormerImageProcessor.from_pretrained(tmp_path, keep_rati=True)
        with pytest.raises(ValueError, match=r"do_center_crop is True; .* no such step"):
            SegFormerImageProcessor.from_pretrained(tmp_path, do_center_crop=True)
        known = {"trust_remote_code": True, "revision": "main", "token": None, "use_fast": False, "backend": "pil"}
        known |= {"cache_dir": None, "local_files_only": True, "subfolder": "", "_commit_hash": None}
        assert SegFormerImageProcessor.from_pretrained(tmp_path, **known).size == {"height": 64, "width": 64}
        _, unused = SegFormerImageProcessor.from_pretrained(tmp_path, keep_rati=True, return_unused_kwargs=True)
        assert unused["keep_rati"] is True

    def test_a_pipelines_model_keywords_are_ignored_in_loading(self, tmp_path):
        SegFormerImageProcessor(size=64).save_pretrained(tmp_path)
        keywords = {"_from_pipeline": "image-segmentation", "attn_implementation": "eager"}
        assert SegFormerImageProcessor.from_pretrained(tmp_path, **keywords).size == {"height": 64, "width": 64}

    def test_the_file_of_a_builtin_processor_and_its_dict_are_read(self, tmp_path):
        theirs = SegformerImageProcessorPil(size={"height": 24, "width": 16}, do_reduce_labels=True)
        theirs.save_pretrained(tmp_path)
        for ours in (
            SegFormerImageProcessor.from_pretrained(tmp_path),
            SegFormerImageProcessor(**theirs.to_dict()),
            SegFormerImageProcessor(size=theirs.size, do_reduce_labels=True),
        ):
            assert (ours.size, ours.do_reduce_labels) == ({"height": 24, "width": 16}, True)

    def test_scaling_an_image_twice_causes_a_warning(self, monkeypatch):
        warned = []
        logger = SimpleNamespace(warning_once=warned.append)
        monkeypatch.setattr("hf_segformer.image_processing_segformer.logger", logger)
        SegFormerImageProcessor(size=8)(random_image() / 255, do_rescale=False)
        SegFormerImageProcessor(size=8)(random_image())
        assert not warned
        SegFormerImageProcessor(size=8)(random_image() / 255)
        assert "do_rescale=False" in warned[0]


class TestPostProcessing:
    """Segmentation maps from logits."""

    LOGITS = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))

    def test_each_image_gets_its_own_size(self):
        sizes = [(9, 13), (20, 6)]
        maps = SegFormerImageProcessor().post_process_semantic_segmentation(
            SimpleNamespace(logits=self.LOGITS), target_sizes=sizes
        )
        for image, size, labels in zip(self.LOGITS, sizes, maps, strict=True):
            resized = torch.nn.functional.interpolate(image[None], size=size, mode="bilinear")
            assert labels.dtype == torch.int64
            assert torch.equal(labels, resized.argmax(dim=1)[0])

    @pytest.mark.parametrize("target_sizes", [None, [(9, 13), (20, 6)], torch.tensor([[9, 13], [20, 6]])])
    def test_segmentation_maps_equal_transformers(self, target_sizes):
        outputs = SimpleNamespace(logits=self.LOGITS)
        actual = SegFormerImageProcessor().post_process_semantic_segmentation(outputs, target_sizes)
        expected = SegformerImageProcessorPil().post_process_semantic_segmentation(
            outputs, None if target_sizes is None else [tuple(map(int, size)) for size in target_sizes]
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))

    def test_outputs_may_be_a_mapping_in_half_precision(self):
        half = self.LOGITS.bfloat16()
        maps = SegFormerImageProcessor().post_process_semantic_segmentation({"logits": half}, [(90, 130)] * 2)
        expected = torch.nn.functional.interpolate(half.float(), size=(90, 130), mode="bilinear").argmax(dim=1)
        assert torch.equal(torch.stack(maps), expected)

    @pytest.mark.parametrize("threshold", [None, 0.2, 0.9])
    def test_one_logit_is_binary(self, threshold):
        logits = self.LOGITS[:, :1] * 4
        maps = SegFormerImageProcessor().post_process_semantic_segmentation({"logits": logits}, threshold=threshold)
        expected = (logits.sigmoid() > (0.5 if threshold is None else threshold))[:, 0].long()
        assert torch.equal(torch.stack(maps), expected)
        assert set(expected.unique().tolist()) == {0, 1}

    @pytest.mark.parametrize("target_sizes", [None, [(9, 13), (9, 13)]])
    def test_pixels_below_the_threshold_are_ignored(self, target_sizes):
        post_process = SegFormerImageProcessor().post_process_semantic_segmentation
        certain = torch.stack(post_process({"logits": self.LOGITS}, target_sizes))
        maps = torch.stack(post_process({"logits": self.LOGITS}, target_sizes, threshold=0.5))
        logits = self.LOGITS
        if target_sizes is not None:
            logits = torch.nn.functional.interpolate(logits, size=(9, 13), mode="bilinear")
        unsure = logits.softmax(dim=1).amax(dim=1) < 0.5
        assert unsure.any()
        assert not unsure.all()
        assert torch.equal(maps, certain.masked_fill(unsure, 255))

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"target_sizes": [(9, 13)]}, r"target_sizes is \[\(9, 13\)\]; expected 2 pairs"),
            ({"target_sizes": (9, 13)}, "target_sizes"),
            ({"target_sizes": [(9, 13), (0, 4)]}, "target_sizes"),
            ({"target_sizes": [(9.5, 13), (20, 6)]}, r"target_sizes is \[\(9.5, 13\).*integers above 0"),
            ({"target_sizes": [(9, 13), (20,)]}, r"target_sizes is \[\(9, 13\), \(20,\)\].*pairs"),
            ({"threshold": 1.5}, r"threshold is 1.5; expected a value in \[0, 1\]"),
            ({"threshold": float("nan")}, "threshold is nan"),
            ({"threshold": True}, r"threshold is True; .*give return_segmentation_scores=True by its name"),
            ({"threshold": np.False_}, r"threshold is False; .*give return_segmentation_scores=False by its name"),
        ],
    )
    def test_bad_arguments_are_named(self, keywords, message):
        with pytest.raises(ValueError, match=message):
            SegFormerImageProcessor().post_process_semantic_segmentation({"logits": self.LOGITS}, **keywords)

    @pytest.mark.parametrize("outputs", [LOGITS, (LOGITS,), {"logit": LOGITS}, {"logits": LOGITS[0]}])
    def test_outputs_without_logits_are_named(self, outputs):
        with pytest.raises(ValueError, match=rf"outputs is a {type(outputs).__name__}.*`logits`"):
            SegFormerImageProcessor().post_process_semantic_segmentation(outputs)

    @pytest.mark.parametrize("num_labels", [2, 5])
    def test_the_pipeline_runs_on_images_of_any_size(self, num_labels, tmp_path):
        sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
        model = SegformerForSemanticSegmentation(
            SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=num_labels)
        ).eval()
        processor = SegFormerImageProcessor(size={"shortest_edge": 32}, keep_ratio=True, size_divisor=32)
        segment = pipeline("image-segmentation", model=model, image_processor=processor)
        Image.fromarray(random_image(40, 57)).save(tmp_path / "image.png")
        (first, *_), (second, *_) = segment([str(tmp_path / "image.png"), Image.fromarray(random_mask(61, 33))])
        assert first["label"].startswith("LABEL_")
        assert (first["mask"].size, second["mask"].size) == ((57, 40), (33, 61))
