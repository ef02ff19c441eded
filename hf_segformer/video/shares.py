"""Shares of the classes over time, as a table and a plot.

Axes: K classes.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_write, csv_text
from ..visualization import Color

_MOST_POINTS = 2048  # of a plot; longer videos are averaged
_MOST_NAMES = 12  # of its legend


class SharesTable:
    """A CSV file with a row for each frame: `frame` from 1, `time_s`, and the share of each class.

    Args:
        path: the file.
        names: of the K classes.

    Raises:
        OSError: if it cannot be written.
    """

    def __init__(self, path: Path, names: Sequence[str]):
        self._file = path.open("w", encoding="utf-8", newline="")
        self._file.write(csv_text([["frame", "time_s", *names]]))

    def add(self, number: int, seconds: float, shares: np.ndarray) -> None:
        """Append a frame.

        Args:
            number: of the frame, from 1.
            seconds: its time.
            shares: of the classes, (K,).
        """
        row = [number, round(seconds, 6), *(round(share, 6) for share in shares.tolist())]
        self._file.write(csv_text([row]))

    def close(self) -> None:
        """End the file."""
        self._file.close()


class SharesCurve:
    """Shares over time in bounded memory: of more than 2048 points neighbours are averaged.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int):
        self._points: list[np.ndarray] = []  # (1 + K,): time and shares
        self._sum, self._number, self._stride = np.zeros(1 + num_classes), 0, 1

    def add(self, seconds: float, shares: np.ndarray) -> None:
        """Append a frame; see `SharesTable.add`."""
        self._sum, self._number = self._sum + np.concatenate([[seconds], shares]), self._number + 1
        if self._number == self._stride:
            self._points.append(self._sum / self._number)
            self._sum, self._number = np.zeros_like(self._sum), 0
        if len(self._points) == _MOST_POINTS:
            self._points = [
                (left + right) / 2 for left, right in zip(self._points[::2], self._points[1::2], strict=True)
            ]
            self._stride *= 2

    def points(self) -> np.ndarray:
        """Return (N, 1 + K): mean time and mean shares of each point."""
        rest = [self._sum / self._number] if self._number else []
        return np.array([*self._points, *rest])

    def draw(self, path: Path, names: Sequence[str], palette: Sequence[Color], title: str) -> None:
        """Write a plot as a PNG file, atomically: stacked areas in the colours of the classes.

        Args:
            path: the file.
            names: of the K classes.
            palette: one colour for each.
            title: of the plot.

        Raises:
            ImportError: if matplotlib is not installed.
            OSError: if it cannot be written.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        points = self.points()
        figure = Figure((9, 4.5), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        colors = [(red / 255, green / 255, blue / 255) for red, green, blue in palette]
        times, shares = points[:, 0], 100 * points[:, 1:]
        if len(points) == 1:
            times, shares = np.array([times[0], times[0] + 1]), np.repeat(shares, 2, axis=0)
        areas = axes.stackplot(times, shares.T, colors=colors, linewidth=0)
        axes.set(xlim=(times[0], times[-1]), ylim=(0, 100), xlabel="seconds", ylabel="% of pixels")
        axes.set_title(_plain(title), loc="left")
        largest = [index for index in np.argsort(-shares.mean(axis=0), kind="stable") if shares[:, index].any()]
        shown = largest[:_MOST_NAMES]
        axes.legend(
            [areas[index] for index in shown], [_plain(names[index]) for index in shown], loc="upper left",
            bbox_to_anchor=(1, 1), frameon=False,
        )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        with atomic_write(path) as partial:
            figure.savefig(partial, format="png", metadata={"Software": None})


def require_plots() -> None:
    """Raise ValueError if matplotlib is not installed."""
    try:
        is_there = find_spec("matplotlib") is not None
    except ValueError:  # a module that was blocked
        is_there = False
    if not is_there:
        raise ValueError("a plot of the shares needs matplotlib: pip install 'hf-segformer[plots]'")


def _plain(text: Any) -> str:
    """Return text in which no sign begins a formula."""
    return str(text).replace("$", r"\$").lstrip("_") or " "


__all__ = ["SharesCurve", "SharesTable", "require_plots"]
