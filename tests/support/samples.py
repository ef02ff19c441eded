"""Small valid files of every kind that the package reads, for tests that damage them."""

import io
import json
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from safetensors.torch import save_file

from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, SegFormerImageProcessor

_HEIGHT, _WIDTH = 17, 24
# The smallest network whose sizes follow from its weights.
_SMALLEST = {
    "hidden_sizes": [1, 2, 5, 8],
    "depths": [1, 1, 1, 1],
    "mlp_ratios": [1, 1, 1, 1],
    "decoder_hidden_size": 4,
    "num_labels": 2,
}


def write_samples(folder: Path) -> dict[str, list[Path]]:
    """Write the files.

    Args:
        folder: an empty one.

    Returns:
        images, masks, rows (images and masks of data sets), rasters, weights and folders (files of checkpoint folders),
        each a list of paths.
    """
    return {
        "images": _write(folder / "images", _images()),
        "masks": _write(folder / "masks", _masks()),
        "rows": [*_write(folder / "rows", _row_images()), *_write(folder / "rows_labels", _row_labels())],
        "rasters": _write(folder / "rasters", _rasters()),
        "weights": _weights(folder / "weights"),
        "folders": [*_folder(folder / "whole"), *_shards(folder / "sharded")],
    }


def _write(folder: Path, files: dict[str, bytes]) -> list[Path]:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """Return an image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _images() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (_HEIGHT, _WIDTH, 3), dtype=np.uint8))
    smooth = noise.resize((5, 4)).resize((_WIDTH, _HEIGHT))
    wide = Image.fromarray(random.integers(0, 65536, (_HEIGHT, _WIDTH), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    alpha = smooth.convert("RGBA")
    alpha.putalpha(smooth.convert("L"))
    files = {
        "rgb.png": encoded(noise, "PNG"),
        "grey.png": encoded(smooth.convert("L"), "PNG"),
        "bits.png": encoded(smooth.convert("1"), "PNG"),
        "alpha.png": encoded(alpha, "PNG"),
        "grey_alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "palette.png": encoded(smooth.convert("P"), "PNG", transparency=3),
        "wide.png": encoded(wide, "PNG"),
        "exif.png": encoded(smooth, "PNG", exif=exif),
        "photo.jpg": encoded(smooth, "JPEG", exif=exif, quality=80),
        "progressive.jpg": encoded(noise, "JPEG", progressive=True),
        "grey.jpg": encoded(smooth.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(smooth.convert("CMYK"), "JPEG"),
        "raw.tif": encoded(noise, "TIFF", exif=exif),
        "wide.tif": encoded(wide, "TIFF"),
        "floats.tif": encoded(smooth.convert("F"), "TIFF"),
        "still.gif": encoded(smooth.convert("P"), "GIF"),
        "lossy.webp": encoded(smooth, "WEBP", exif=exif),
        "lossless.webp": encoded(alpha, "WEBP", lossless=True),
        "colours.bmp": encoded(noise, "BMP"),
        "palette.bmp": encoded(smooth.convert("P"), "BMP"),
        "colours.ppm": encoded(noise, "PPM"),
        "colours.tga": encoded(noise, "TGA", compression="tga_rle"),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"{compression}.tif"] = encoded(smooth, "TIFF", compression=compression)
    for kind, name in (("JPEG2000", "wavelets.jp2"), ("AVIF", "still.avif")):
        if kind in Image.SAVE:  # not every build of Pillow has them
            files[name] = encoded(smooth, kind)
    return files


def _masks() -> dict[str, bytes]:
    labels = np.random.default_rng(1).integers(0, 5, (_HEIGHT, _WIDTH), dtype=np.uint8)
    palette = Image.fromarray(labels).convert("P")
    palette.putpalette([value for label in range(5) for value in (40 * label, 7, 200)])
    return {
        "grey.png": encoded(Image.fromarray(labels), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "bits.png": encoded(Image.fromarray(labels > 2), "PNG"),
        "wide.png": encoded(Image.fromarray(labels.astype(np.uint16) * 300), "PNG"),
        "raw.tif": encoded(Image.fromarray(labels), "TIFF"),
        "lzw.tif": encoded(Image.fromarray(labels.astype(np.int32)), "TIFF", compression="tiff_lzw"),
        "palette.gif": encoded(palette, "GIF"),
        "palette.bmp": encoded(palette, "BMP"),
    }


def _rasters() -> dict[str, bytes]:
    noise = np.random.default_rng(3).integers(1, 256, (40, 50, 3), dtype=np.uint8)
    place = [(33550, "d", 3, (1.0, 1.0, 0.0), True), (33922, "d", 6, (0.0, 0.0, 0.0, 5.0, 7.0, 0.0), True)]
    layouts: dict[str, dict] = {
        "flat.tif": {},
        "strips.tif": {"rowsperstrip": 7, "compression": "zlib"},
        "tiles.tif": {"tile": (16, 16)},
        "deflated.tif": {"tile": (16, 16), "compression": "zlib", "predictor": True},
        "nodata.tif": {"extratags": [(42113, 2, 0, "7", True)]},
        "placed.tif": {"tile": (16, 16), "extratags": place},
    }
    files = {}
    for name, layout in layouts.items():
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, noise, photometric="rgb", **layout)
        files[name] = buffer.getvalue()
    return files


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _row_images() -> dict[str, bytes]:
    bands = np.random.default_rng(2).random((5, _HEIGHT, _WIDTH), dtype=np.float32)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, bands, photometric="minisblack")
    files = _images()
    kept = {name: files[name] for name in ("rgb.png", "photo.jpg", "tiff_lzw.tif")}
    right = {"image.png": files["rgb.png"], "labels.png": _masks()["grey.png"]}
    return {**right, **kept, "bands.npy": _npy(bands), "bands.tif": buffer.getvalue()}


def _row_labels() -> dict[str, bytes]:
    files = _masks()
    kept = {name: files[name] for name in ("grey.png", "raw.tif", "palette.png")}
    return {**kept, "labels.npy": _npy(np.ones((_HEIGHT, _WIDTH), dtype=np.int64))}


def _model() -> SegFormerForSemanticSegmentation:
    torch.manual_seed(0)
    return SegFormerForSemanticSegmentation(SegFormerConfig(**_SMALLEST))


def _weights(folder: Path) -> list[Path]:
    folder.mkdir()
    weights = {name: tensor.clone() for name, tensor in _model().state_dict().items()}
    few = dict(list(weights.items())[:6])  # most bytes of a short pickle are its opcodes
    wrapped = {"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}, "epoch": 3}
    wrapped["meta"] = {"CLASSES": ("road", "sky"), "mmcv_version": "1.3.0"}
    save_file(weights, folder / "weights.safetensors", metadata={"format": "pt"})
    save_file(few, folder / "few.safetensors")
    torch.save(weights, folder / "zip.pth")
    torch.save(wrapped, folder / "wrapped.ckpt")
    torch.save(weights, folder / "old.bin", _use_new_zipfile_serialization=False)
    torch.save(few, folder / "few.pt", _use_new_zipfile_serialization=False)
    return sorted(folder.iterdir())


def _folder(folder: Path) -> list[Path]:
    _model().save_pretrained(folder)
    SegFormerImageProcessor(size=64).save_pretrained(folder)
    for file in folder.glob("*.py"):
        file.unlink()
    return [folder / name for name in ("config.json", "preprocessor_config.json", "model.safetensors")]


def _shards(folder: Path) -> list[Path]:
    folder.mkdir()
    model = _model()
    names = list(model.state_dict())
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: model.state_dict()[name].clone() for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in halves.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.config.save_pretrained(folder)
    return [folder / "model.safetensors.index.json", folder / "config.json"]
