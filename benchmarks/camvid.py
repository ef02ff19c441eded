"""Publication of a finished run of camvid_b0 in docs/results/camvid_b0.

The weights are stored in half precision and evaluated as stored, by `segformer evaluate`, once in a single pass
and once with test-time augmentation. The card gets a section about the run, with numbers from these files. Images of
CamVid are neither copied nor drawn: its terms do not allow it.
"""

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_segformer import SegFormerForSemanticSegmentation, SegFormerImageProcessor, SegFormerPredictor
from hf_segformer.cli.main import main as segformer
from hf_segformer.data.camvid import NAMES, PALETTE
from hf_segformer.evaluation.numbers import percent
from hf_segformer.files import read_json, write_json
from hf_segformer.hub.model_card import write_card
from hf_segformer.training.data import load_data
from hf_segformer.training.recipe import read_recipe
from hf_segformer.visualization import colorize, figure

from .machine import ROOT

RECIPE = "camvid_b0"
FOLDER = ROOT / "docs" / "results" / RECIPE
FLIP_AND_SCALES = ("evaluation.flip=true", "evaluation.scales=[1.0, 1.25]")
FRAMES = ((0, 25, 50), (75, 88, 100))  # of val, in two rows
_OF_RUN = ("training.json", "curve.png")
_OF_EVALUATION = ("metrics.json", "confusion.png", "reliability.png")


def publish(run: Path, data: Path, folder: Path = FOLDER) -> None:
    """Replace the folder by the model of a run, its evaluation and its card.

    Args:
        run: folder of a finished run of `segformer train camvid_b0`.
        data: CamVid's folder.
        folder: to replace.

    Raises:
        ValueError: if an evaluation fails.
        OSError: if files are missing or cannot be read or written.
    """
    with tempfile.TemporaryDirectory() as temporary:
        new = Path(temporary) / RECIPE
        store_half(run, new)
        for name in _OF_RUN:
            shutil.copy(run / name, new)
        once, augmented = (Path(temporary) / name for name in ("once", "augmented"))
        for target, overrides in ((once, ()), (augmented, FLIP_AND_SCALES)):
            evaluate(new, data, target, overrides)
        for name in _OF_EVALUATION:
            shutil.copy(once / name, new)
        shutil.copy(augmented / "metrics.json", new / "metrics_flip_and_two_scales.json")
        draw(new, data).save(new / "predicted.png", optimize=True)
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(new, folder)
    card = write_card(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
    card.write_text(with_section(card.read_text("utf-8"), about(folder)), encoding="utf-8")


def store_half(run: Path, folder: Path) -> None:
    """Save weights, configuration and processor; the package is their code."""
    model = SegFormerForSemanticSegmentation.from_pretrained(run).half()
    model.save_pretrained(folder)
    SegFormerImageProcessor.from_pretrained(run).save_pretrained(folder)
    for path in folder.iterdir():
        if path.suffix == ".json":
            write_json({key: value for key, value in read_json(path).items() if key != "auto_map"}, path)
        elif path.name != "model.safetensors":
            path.unlink()


def evaluate(model: Path, data: Path, folder: Path, overrides: Sequence[str]) -> None:
    """Evaluate by the command, and write its files to a folder."""
    arguments = ["evaluate", str(model), "--recipe", RECIPE, f"data.root={data}", *overrides]
    with contextlib.redirect_stdout(io.StringIO()):
        status = segformer([*arguments, "--output-dir", str(folder)])
    if status:
        raise ValueError(f"segformer {' '.join(arguments)} ended with status {status}")


def draw(model: Path, data: Path) -> Any:
    """Draw predictions of a few frames of val, without the images."""
    predictor = SegFormerPredictor.from_pretrained(model)
    val = load_data(read_recipe(RECIPE, [f"data.root={data}"]).data).evaluation
    rows = [[colorize(predictor(val[frame]["image"]).segmentation, PALETTE) for frame in row] for row in FRAMES]
    captions = [f"frames {', '.join(map(str, row))} of val" for row in FRAMES]
    return figure(rows, ("",) * len(FRAMES[0]), NAMES, PALETTE, captions, panel_height=240)


def about(folder: Path) -> str:
    """Section of the card about the run."""
    metrics, augmented, training = (
        read_json(folder / name) for name in ("metrics.json", "metrics_flip_and_two_scales.json", "training.json")
    )
    curve = [percent(each["eval_mean_iou"]) for each in training["curve"] if "eval_mean_iou" in each]
    weak = [each for each in metrics["classes"] if each["iou"] is not None and each["iou"] < 0.5]
    below = _join([f"{each['name']} ({percent(each['iou'])} %)" for each in weak])
    return f"""## About this run

```sh
segformer train {RECIPE} data.root=DIR
python -m benchmarks.camvid --run outputs/{RECIPE} --data DIR
segformer evaluate docs/results/{RECIPE} --recipe {RECIPE} data.root=DIR --output-dir outputs/evaluation
```

The second command stores the weights of the last step in half precision, measures them, and writes this folder. The
third one prints the table above. With test-time augmentation (horizontal flip and a second scale) mean IoU is
{percent(augmented["mean_iou"])} % ([metrics_flip_and_two_scales.json](metrics_flip_and_two_scales.json)).

- **How it was chosen.** CutMix and the sampling by class were chosen on a drive that was not trained on
  ([options on another drive](../../camvid-drives.md)): they gain there with each of three seeds. The other settings are
  those of an earlier recipe. Then the recipe was trained once on all of train; val chose neither an option nor a step.
- **Against the recipe without the two.** Its run scores more on val, which shows a drive that is trained on
  ([both runs](../../camvid-drives.md#the-whole-recipe-on-all-three-drives)).
- **Where it holds.** The frames of val come from a drive that is trained on; expect less on another road or at another
  hour. The test split was not measured.
- **On the way.** Mean IoU on val every 1,000 steps: {", ".join(curve)} % ([training.json](training.json)).
- **Classes below 50 %.** {below or "None"}. Logits have a quarter of the image's resolution, which thin things suffer
  from.

Predictions on six frames of val; the images themselves may not be redistributed:

![Predictions](predicted.png)
"""


def with_section(card: str, section: str) -> str:
    """Put a section before the environment, or at the end; the card counts as edited then."""
    text, _, _ = card.partition("\n<!-- Rendered")
    start, heading, rest = text.partition("## Environment")
    return f"{start}{section}\n{heading}{rest}".rstrip() + "\n"


def _join(items: Sequence[str]) -> str:
    """List items as in a sentence."""
    return " and ".join(each for each in (", ".join(items[:-1]), *items[-1:]) if each)


def main(argv: Sequence[str] | None = None) -> int:
    """Publish a run."""
    parser = argparse.ArgumentParser("python -m benchmarks.camvid", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run of camvid_b0")
    parser.add_argument("--data", type=Path, required=True, help="CamVid's folder")
    arguments = parser.parse_args(argv)
    publish(arguments.run, arguments.data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
