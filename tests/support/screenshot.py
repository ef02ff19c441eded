"""Screenshot of the page of `segformer app` with the model of `make demo`, for the documentation: `make screenshot`.

The page shows twelve generated shapes that the model has not seen, side by side, and examples of the same kind.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

from PIL import Image

from hf_segformer.data.shapes import PALETTE, draw_sample
from tests.support.browser import browser, served

_COLUMNS, _ROWS, _SIDE = 4, 3, 128
_FIRST = 20


def unseen(first: int, columns: int, rows: int) -> Image.Image:
    """Draw samples of the validation split, side by side."""
    grid = Image.new("RGB", (columns * _SIDE, rows * _SIDE))
    for place in range(columns * rows):
        sample, _ = draw_sample(0, "validation", first + place, size=_SIDE)
        grid.paste(sample, (place % columns * _SIDE, place // columns * _SIDE))
    return grid


def stage(model: Path, home: Path) -> Path:
    """Copy the model, with the colours of its data and three examples."""
    folder = home / model.name
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "palette": PALETTE}), encoding="utf-8")
    (folder / "examples").mkdir(exist_ok=True)
    for number in range(3):
        unseen(_FIRST + 12 + 4 * number, 2, 2).save(folder / "examples" / f"{number}.png")
    unseen(_FIRST, _COLUMNS, _ROWS).save(home / "shapes.png")
    return folder


def main() -> None:
    """Take the screenshot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("outputs/shapes_b0"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/app.png"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with served(stage(arguments.model, home)) as address, browser(home) as page:
            page.open(address)
            for _ in range(2):  # the first run is slower than those that follow
                page.upload(home / "shapes.png")
                page.wait(lambda: len(page.classes()) > 1, "the classes")
                time.sleep(3)
            before = page.source()
            page.switch("ring")
            page.changed(before)
            time.sleep(1)
            page.driver.save_screenshot(str(arguments.out))
    Image.open(arguments.out).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(arguments.out, optimize=True)
    print(f"{arguments.out}  {arguments.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
