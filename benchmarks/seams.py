"""Draws docs/pictures/seams.png: a street labelled whole, and in windows without and with overlap."""

import sys

import torch

from hf_segformer.config import InferenceOptions
from hf_segformer.upsampling_segformer import upsample_argmax
from hf_segformer.visualization import colorize, figure

from .large_images import _LOOKS, street, tiled, trained
from .record import ROOT

PICTURE = ROOT / "docs" / "pictures" / "seams.png"
TILE, OVERLAPS = 384, (0, 192)


def main() -> int:
    """Draw it."""
    model, pixels = trained()
    colors = list(_LOOKS)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    with torch.inference_mode():
        maps = [upsample_argmax(model(pixels).logits, pixels.shape[-2:])[0]]
        maps += [
            tiled(model, pixels, InferenceOptions(tile_size=TILE, tile_overlap=overlap))[1] for overlap in OVERLAPS
        ]
    titles = ["image", "labelled whole", *(f"windows of {TILE}, overlap {overlap}" for overlap in OVERLAPS)]
    pictures = [street(), *(colorize(labels.numpy(), colors) for labels in maps)]
    crops = [picture.crop((0, 0, 1280, 704)) for picture in pictures]
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure([crops], titles, names, colors, panel_height=220).save(PICTURE, optimize=True)
    print(f"written to {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
