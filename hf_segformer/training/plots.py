"""The course of a training run as a picture: loss and mean IoU over the steps. Only Pillow."""

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _FAINT, _GRID = (255, 255, 255), (32, 33, 36), (95, 99, 104), (228, 230, 234)
_BLUE, _PALE_BLUE, _ORANGE = (33, 84, 196), (190, 206, 240), (214, 96, 20)
_SCALE = 3  # drawn larger and reduced, since Pillow's lines have hard edges
_WIDTH, _HEIGHT = 620, 400
_LEFT, _TOP, _RIGHT, _BOTTOM = 66, 52, 26, 54
_PEAK = 3  # a loss so many times higher than 97 % of them runs out of the panel

Point = tuple[float, float]


def draw_curve(curve: Sequence[dict[str, Any]]) -> Image.Image:
    """Loss and mean IoU over the steps of a training run, one panel each.

    The loss as logged is pale; the strong line is its running mean, where there are points enough to need one.

    Args:
        curve: rows with `step` and any of `loss`, `eval_loss` and `eval_mean_iou`, as in training.json.

    Returns:
        RGB picture, 620 x 400 pixels a panel.

    Raises:
        ValueError: if no row holds any of them.

    Example:
        >>> from hf_segformer.training.plots import draw_curve
        >>> draw_curve([{"step": 10, "loss": 1.5}, {"step": 20, "loss": 0.9}]).size
        (620, 400)
    """
    loss, eval_loss = _points(curve, "loss"), _points(curve, "eval_loss")
    iou = [(step, 100 * share) for step, share in _points(curve, "eval_mean_iou")]
    panels = []
    if loss or eval_loss:
        panels.append(_loss_panel(loss, eval_loss))
    if iou:
        panels.append(_iou_panel(iou))
    if not panels:
        raise ValueError("the curve has neither loss nor eval_mean_iou in any row, so there is nothing to draw")
    picture = Image.new("RGB", (_WIDTH * len(panels), _HEIGHT), _PAPER)
    for index, panel in enumerate(panels):
        picture.paste(panel.picture.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS), (index * _WIDTH, 0))
    return picture


class _Panel:
    """A plot's frame with its axes; points are in units of the data.

    Args:
        title: what the vertical axis shows.
        last_step: end of the horizontal axis.
        top: least end of the vertical axis, which starts at 0.
    """

    def __init__(self, title: str, last_step: float, top: float):
        self.picture = Image.new("RGB", (_WIDTH * _SCALE, _HEIGHT * _SCALE), _PAPER)
        self.draw = ImageDraw.Draw(self.picture)
        self.last_step, ticks = max(last_step, 1), round_ticks(top)
        self.top = ticks[-1]
        self.text(_LEFT, 26, title, _INK, 17, "ls")
        for tick in ticks:
            self.line([(0, tick), (self.last_step, tick)], _GRID, 1)
            self.text(_LEFT - 9, self.place((0, tick))[1] / _SCALE, f"{tick:g}", _FAINT, 14, "rm")
        for tick in round_ticks(self.last_step):
            if tick <= self.last_step:
                left, bottom = (side / _SCALE for side in self.place((tick, 0)))
                self.line([(tick, 0), (tick, -0.014 * self.top)], _FAINT, 1)
                self.text(left, bottom + 10, f"{tick:,g}" if tick < 1e6 else f"{tick / 1e6:g}M", _FAINT, 14, "mt")
        self.line([(0, 0), (self.last_step, 0)], _FAINT, 1)
        self.text(_WIDTH - _RIGHT, _HEIGHT - 10, "step", _FAINT, 14, "rs")

    def place(self, point: Point) -> Point:
        """Where a point lies in the picture; what is beyond the axis lies on its end."""
        step, value = point
        left = _LEFT + step / self.last_step * (_WIDTH - _LEFT - _RIGHT)
        up = min(max(value, 0), self.top) / self.top * (_HEIGHT - _TOP - _BOTTOM)
        return left * _SCALE, (_HEIGHT - _BOTTOM - up) * _SCALE

    def line(self, points: Sequence[Point], color: tuple[int, int, int], width: float, dots: bool = False) -> None:
        """Points joined by lines, each marked by a dot if asked for, or if it is alone."""
        places = [self.place(point) for point in points]
        self.draw.line(places, fill=color, width=round(width * _SCALE), joint="curve")
        for left, top in places if dots or len(places) == 1 else ():
            self.draw.circle((left, top), 3.4 * _SCALE, fill=color)

    def text(self, left: float, top: float, text: str, color: tuple[int, int, int], size: int, anchor: str) -> None:
        """Words at a place in pixels of the finished picture."""
        font = ImageFont.load_default(size * _SCALE)
        self.draw.text((left * _SCALE, top * _SCALE), text, fill=color, font=font, anchor=anchor)

    def legend(self, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> None:
        """Names of the lines, at the top right."""
        right = float(_WIDTH - _RIGHT)
        for name, color in reversed(entries):
            width = ImageFont.load_default(14 * _SCALE).getlength(name) / _SCALE
            self.text(right - width, 26, name, color, 14, "ls")
            right -= width + 18


def round_ticks(top: float) -> list[float]:
    """Three to six round numbers from 0 up, the last not below `top`.

    Example:
        >>> from hf_segformer.training.plots import round_ticks
        >>> round_ticks(73)
        [0, 20, 40, 60, 80]
    """
    top = max(top, 1e-9)
    power = 10.0 ** math.floor(math.log10(top))
    step = next(factor * power for factor in (0.2, 0.25, 0.5, 1, 2) if top / (factor * power) <= 5)
    count = math.ceil(round(top / step, 9))
    ticks = [round(index * step, 12) for index in range(count + 1)]
    return [int(tick) if tick == int(tick) else tick for tick in ticks]


def _loss_panel(loss: Sequence[Point], eval_loss: Sequence[Point]) -> _Panel:
    mean = _running_mean(loss)
    ordered = sorted(value for _, value in loss)
    usual = ordered[: math.ceil(0.97 * len(loss))]
    highest = usual if loss and ordered[-1] > _PEAK * usual[-1] else ordered  # a peak would flatten all else
    top = max([*highest[-1:], *(value for _, value in eval_loss)])
    panel = _Panel("Loss", max(step for step, _ in [*loss, *eval_loss]), top)
    if loss:
        if mean != loss:
            panel.line(loss, _PALE_BLUE, 1.2)
        panel.line(mean, _BLUE, 2.4)
    if eval_loss:
        panel.line(eval_loss, _ORANGE, 2, dots=True)
    panel.legend([("training", _BLUE)] * bool(loss) + [("evaluation", _ORANGE)] * bool(eval_loss))
    return panel


def _iou_panel(iou: Sequence[Point]) -> _Panel:
    step, best = max(iou, key=lambda point: point[1])
    panel = _Panel("Mean IoU, %", max(step for step, _ in iou), best * 1.08)
    panel.line(iou, _ORANGE, 2.4, dots=True)
    left, top = (side / _SCALE for side in panel.place((step, best)))
    panel.text(left, top - 9, f"{best:.1f}", _INK, 15, "rs" if left > _WIDTH / 2 else "ls")
    return panel


def _points(curve: Sequence[dict[str, Any]], key: str) -> list[Point]:
    return [(row["step"], row[key]) for row in curve if row.get(key) is not None and math.isfinite(row[key])]


def _running_mean(points: Sequence[Point]) -> list[Point]:
    """Each point's mean with its neighbours, a fiftieth of all on either side; at the ends with fewer."""
    reach = len(points) // 50
    means = []
    for index, (step, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        window = points[index - near : index + near + 1]
        means.append((step, sum(value for _, value in window) / len(window)))
    return means


__all__ = ["draw_curve", "round_ticks"]
