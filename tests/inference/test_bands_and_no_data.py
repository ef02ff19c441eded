"""Batch inference of chosen bands, of images with pixels that hold no data, and of more than 255 classes."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from hf_segformer import SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.cli.main import main
from hf_segformer.inference.large_image import predict_large_image
from tests.inference.test_predictor import lively, make_image

HEIGHT, WIDTH = 64, 96


def saved(folder, **overrides):
    """Save a checkpoint that does not resize images."""
    lively(**overrides).save_pretrained(folder)
    SegFormerImageProcessor(do_resize=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("five"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint of 300 classes."""
    return saved(tmp_path_factory.mktemp("wide"), num_labels=300)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def pixels(source):
    with Image.open(source) as image:
        return np.asarray(image)


def read_summary(out):
    return json.loads((out / "summary.json").read_text())


def bands_of(num_bands, seed=3):
    """Values (C, H, W) of which no two bands are equal."""
    images = [np.array(make_image(HEIGHT, WIDTH, seed=seed + index)) for index in range(-(-num_bands // 3))]
    return np.concatenate(images, axis=2).transpose(2, 0, 1)[:num_bands].copy()


def write_geotiff(path, bands, **profile):
    rasterio = pytest.importorskip("rasterio")
    transform = rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 5e6)
    shape = dict(zip(("count", "height", "width"), bands.shape, strict=True))
    given = {"driver": "GTiff", "dtype": bands.dtype, "crs": "EPSG:32633", "transform": transform, **shape, **profile}
    with rasterio.open(path, "w", **given) as file:
        file.write(bands)
    return path


def write_without_data(path):
    """Write a GeoTIFF whose left half holds no data."""
    bands = np.maximum(bands_of(3), 1)
    bands[:, :, : WIDTH // 2] = 0
    return write_geotiff(path, bands, nodata=0)


def test_bands_of_an_image_come_in_the_order_of_their_numbers(checkpoint, tmp_path):
    image = make_image(HEIGHT, WIDTH)
    image.save(tmp_path / "a.png")
    Image.fromarray(np.array(image)[..., ::-1].copy()).save(tmp_path / "turned.png")
    Image.fromarray(np.dstack([np.array(image), np.full((HEIGHT, WIDTH), 9, np.uint8)])).save(tmp_path / "rgba.png")
    for name, bands in {"a": (3, 2, 1), "turned": (1, 2, 3), "rgba": (3, 2, 1)}.items():
        out = tmp_path / name
        assert run("predict", checkpoint, tmp_path / f"{name}.png", "-o", out, "--bands", *bands) == 0
        found = pixels(out / f"{name}_mask.png")
        assert np.array_equal(found, pixels(tmp_path / "a" / "a_mask.png"))
    assert run("predict", checkpoint, tmp_path / "a.png", "-o", tmp_path / "all") == 0
    assert (pixels(tmp_path / "all" / "a_mask.png") != found).mean() > 0.01


def test_bands_of_a_palette_are_its_colours(checkpoint, tmp_path):
    image = make_image(HEIGHT, WIDTH).quantize(64)
    image.save(tmp_path / "a.png")
    image.convert("RGB").save(tmp_path / "b.png")
    assert (
        run("predict", checkpoint, tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "o", "--bands", 3, 2, 1)
        == 0
    )
    assert np.array_equal(pixels(tmp_path / "o" / "a_mask.png"), pixels(tmp_path / "o" / "b_mask.png"))


def test_bands_of_arrays_and_rasters(checkpoint, tmp_path):
    bands = bands_of(5)
    np.save(tmp_path / "array.npy", bands)
    np.save(tmp_path / "chosen.npy", bands[[4, 0, 2]])
    write_geotiff(tmp_path / "scene.tif", bands)
    inputs = [tmp_path / name for name in ("array.npy", "scene.tif")]
    out = tmp_path / "out"
    assert run("predict", checkpoint, *inputs, "-o", out, "--bands", 5, 1, 3) == 0
    assert run("predict", checkpoint, tmp_path / "chosen.npy", "-o", tmp_path / "chosen") == 0
    expected = pixels(tmp_path / "chosen" / "chosen_mask.png")
    assert np.array_equal(pixels(out / "array_mask.png"), expected)
    predictor = SegFormerPredictor.from_pretrained(checkpoint)
    predict_large_image(
        predictor.model, predictor.processor, inputs[1], tmp_path / "alone.tif", bands=[5, 1, 3], progress=False
    )
    assert np.array_equal(pixels(out / "scene_mask.tif"), pixels(tmp_path / "alone.tif"))
    assert (pixels(out / "scene_mask.tif") != expected).mean() < 1e-3
    assert read_summary(out)["images"] == 2


def test_bands_of_a_data_set(checkpoint, tmp_path):
    import datasets

    content = write_geotiff(tmp_path / "scene.tif", bands_of(5)).read_bytes()
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]}, features=features)
    datasets.DatasetDict({"train": rows.cast_column("image", datasets.Image())}).save_to_disk(str(tmp_path / "data"))
    assert run("predict", checkpoint, "--dataset", tmp_path / "data", "-o", tmp_path / "o", "--bands", 5, 1, 3) == 0
    np.save(tmp_path / "chosen.npy", bands_of(5)[[4, 0, 2]])
    assert run("predict", checkpoint, tmp_path / "chosen.npy", "-o", tmp_path / "chosen") == 0
    assert np.array_equal(pixels(tmp_path / "o" / "00000000_mask.png"), pixels(tmp_path / "chosen" / "chosen_mask.png"))


def test_bands_that_do_not_fit_are_named(checkpoint, tmp_path, capsys):
    make_image(HEIGHT, WIDTH).save(tmp_path / "a.png")
    for number, (bands, words) in enumerate(
        {
            (1, 2, 4): "bands are [1, 2, 4]; expected numbers from 1 to 3, those of",
            (1, 2): "has 2 bands",
        }.items()
    ):
        assert run("predict", checkpoint, tmp_path / "a.png", "-o", tmp_path / str(number), "--bands", *bands) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("segformer: 1 image could not be predicted: ")
        assert words in error
        assert str(tmp_path / "a.png") in error
    assert run("predict", checkpoint, tmp_path / "a.png", "-o", tmp_path / "0", "--bands", "0") == 2
    assert "argument --bands: got '0'" in capsys.readouterr().err


def test_results_of_other_bands_are_not_mixed(checkpoint, tmp_path, capsys):
    make_image(HEIGHT, WIDTH).save(tmp_path / "a.png")
    assert run("predict", checkpoint, tmp_path / "a.png", "-o", tmp_path / "out") == 0
    assert run("predict", checkpoint, tmp_path / "a.png", "-o", tmp_path / "out", "--bands", 3, 2, 1) == 1
    assert "was made with bands [], which now is [3, 2, 1]" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "ignored"), [("checkpoint", 255), ("wide", 65535)])
@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_pixels_without_data_are_no_class(model, ignored, kind, tmp_path, request):
    import datasets

    content, out = write_without_data(tmp_path / "scene.tif").read_bytes(), tmp_path / "out"
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]}, features=features)
    datasets.DatasetDict({"train": rows.cast_column("image", datasets.Image())}).save_to_disk(str(tmp_path / "data"))
    model = request.getfixturevalue(model)
    assert run("predict", model, "--dataset", tmp_path / "data", "-o", out, "--format", kind) == 0
    if kind == "png":
        mask = pixels(out / "00000000_mask.png")
        [line] = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        counts, share = list(line["pixels"].values()), list(line["share"].values())
        assert sum(share) == pytest.approx(1, abs=1e-4)
    else:
        import pyarrow.parquet as parquet

        [row] = parquet.read_table(next(out.glob("*.parquet"))).to_pylist()
        mask, counts = pixels(io.BytesIO(row["mask"])), row["pixels"]
    assert (mask[:, : WIDTH // 2] == ignored).all()
    assert (mask[:, WIDTH // 2 :] < 300).all()
    assert sum(counts) == HEIGHT * WIDTH // 2
    classes = read_summary(out)["classes"]
    assert sum(each["pixels"] for each in classes) == HEIGHT * WIDTH // 2
    assert sum(each["share"] for each in classes) == pytest.approx(1, abs=1e-3)


def evaluate_own_masks(model, images, masks, tmp_path, suffix):
    arguments = ["--images", images, "--masks", masks, "--mask-suffix", suffix, "-o", tmp_path / "scores"]
    assert run("evaluate", model, *arguments) == 0
    return json.loads((tmp_path / "scores" / "metrics.json").read_text())


@pytest.mark.parametrize("model", ["checkpoint", "wide"])
def test_a_model_agrees_with_its_own_masks(model, tmp_path, request):
    model, images, out = request.getfixturevalue(model), tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for seed in range(3):
        make_image(HEIGHT, WIDTH, seed=seed).save(images / f"{seed}.png")
    assert run("predict", model, images, "-o", out) == 0
    metrics = evaluate_own_masks(model, images, out, tmp_path, "_mask.png")
    assert metrics["overall_accuracy"] == pytest.approx(1, abs=1e-4)  # rounding differs in batches
    pixels_of = {each["name"]: each["pixels"] for each in metrics["classes"]}
    assert pixels_of == {each["name"]: each["pixels"] for each in read_summary(out)["classes"]}


@pytest.mark.parametrize(("model", "ignored"), [("checkpoint", 255), ("wide", 65535)])
def test_a_model_agrees_with_its_own_rasters(model, ignored, tmp_path, request):
    model, images, out = request.getfixturevalue(model), tmp_path / "images", tmp_path / "out"
    images.mkdir()
    write_without_data(images / "scene.tif")
    assert run("predict", model, images, "-o", out) == 0
    with pytest.importorskip("rasterio").open(out / "scene_mask.tif") as file:  # Pillow reads no 16-bit palettes
        assert file.nodata == ignored
        mask = file.read(1)
    assert (mask[:, : WIDTH // 2] == ignored).all()
    metrics = evaluate_own_masks(model, images, out, tmp_path, "_mask.tif")
    assert metrics["overall_accuracy"] > 0.999
    assert sum(each["pixels"] for each in metrics["classes"]) == HEIGHT * WIDTH // 2
    assert sum(each["pixels"] for each in read_summary(out)["classes"]) == HEIGHT * WIDTH // 2


def test_masks_of_many_classes_have_16_bits(wide, tmp_path):
    make_image(HEIGHT, WIDTH).save(tmp_path / "a.png")
    for kind in ("png", "parquet"):
        assert run("predict", wide, tmp_path / "a.png", "-o", tmp_path / kind, "--format", kind) == 0
    import pyarrow.parquet as parquet

    [row] = parquet.read_table(next((tmp_path / "parquet").glob("*.parquet"))).to_pylist()
    with Image.open(tmp_path / "png" / "a_mask.png") as mask, Image.open(io.BytesIO(row["mask"])) as stored:
        assert mask.mode == stored.mode == "I;16"
        values = np.asarray(mask)
        assert np.array_equal(values, np.asarray(stored))
    assert 255 < values.max() < 300
    assert row["pixels"] == np.bincount(values.ravel(), minlength=300).tolist()
    for kind in ("png", "parquet"):
        assert [each["pixels"] for each in read_summary(tmp_path / kind)["classes"]] == row["pixels"]
    prediction = SegFormerPredictor.from_pretrained(wide)(tmp_path / "a.png")
    assert np.array_equal(prediction.segmentation, values)


def test_classes_named_by_clear_show_the_image(checkpoint, tmp_path, capsys):
    make_image(HEIGHT, WIDTH).save(tmp_path / "a.png")
    arguments = ["predict", checkpoint, tmp_path / "a.png", "--overlay"]
    assert run(*arguments, "-o", tmp_path / "o", "--clear", "LABEL_0", "LABEL_3") == 0
    mask, shown = pixels(tmp_path / "o" / "a_mask.png"), pixels(tmp_path / "o" / "a_overlay.png")
    is_clear = np.isin(mask, (0, 3))
    assert 0 < is_clear.mean() < 1
    assert np.array_equal(shown[is_clear], pixels(tmp_path / "a.png")[is_clear])
    assert (shown != pixels(tmp_path / "a.png"))[~is_clear].any()
    assert run(*arguments, "-o", tmp_path / "o", "--clear", "LABEL_1") == 1
    assert "was made with clear ['LABEL_0', 'LABEL_3'], which now is ['LABEL_1']" in capsys.readouterr().err
    assert run(*arguments, "-o", tmp_path / "other", "--clear", "sea") == 1
    assert "clear has 'sea'; expected names of the model's classes: LABEL_0, " in capsys.readouterr().err
