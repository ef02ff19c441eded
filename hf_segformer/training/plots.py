"""Plots of a run's loss and mean IoU and of a confusion matrix, by matplotlib (the extra `plots`).

Figures are drawn off screen by the Agg backend, without pyplot and its global state.
"""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _PALE_BLUE, _ORANGE, _FAINT = "#2154c4", "#becef0", "#d66014", "#5f6368"
_PANEL = (6.2, 4.0)  # inches
_DPI = 100
_PEAK = 3  # a loss so many times higher than 97 % of them runs out of the panel
_NUMBERED_CLASSES = 20  # up to which cells have room for their number

_Points = list[tuple[float, float]]


def draw_curve(curve: Sequence[dict[str, Any]]) -> Image.Image:
    """Plot loss and mean IoU over the steps of a training run, one panel each.

    The loss as logged is pale; the strong line is its running mean, where there are points enough to need one.

    Args:
        curve: rows with `step` and any of `loss`, `eval_loss` and `eval_mean_iou`, as in training.json.

    Returns:
        RGB image, 620 x 400 pixels a panel.

    Raises:
        ValueError: if no row holds any of them.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> from hf_segformer.training.plots import draw_curve
        >>> draw_curve([{"step": 10, "loss": 1.5}, {"step": 20, "loss": 0.9}]).size
        (620, 400)
    """
    loss, eval_loss = _points(curve, "loss"), _points(curve, "eval_loss")
    iou = [(step, 100 * share) for step, share in _points(curve, "eval_mean_iou")]
    panels: list[Callable[[Axes], None]] = []
    if loss or eval_loss:
        panels.append(lambda axes: _draw_loss(axes, loss, eval_loss))
    if iou:
        panels.append(lambda axes: _draw_iou(axes, iou))
    if not panels:
        raise ValueError("the curve has neither a loss nor a mean IoU; expected rows with step and loss")
    figure = _figure(_PANEL[0] * len(panels), _PANEL[1])
    for index, draw in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        draw(axes)
        axes.set_xlabel("step", color=_FAINT, loc="right")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return _render(figure)


def draw_confusion(matrix: Any, names: Sequence[str]) -> Image.Image:
    """Plot a confusion matrix: the predictions for each class's pixels, in percent.

    Rows are true classes and add up to 100 %, so that rare classes are seen as well as common ones. Few classes have
    numbers in their cells, many have colours alone. A row without pixels is blank.

    Args:
        matrix: (K, K + 1) counts as `metrics.confusion_matrix` gives them, an array or a tensor on the CPU. The last
            column, predictions that are no class, is drawn if there are any.
        names: of the K classes.

    Returns:
        RGB image.

    Raises:
        ValueError: if the matrix does not fit the names.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> from hf_segformer.training.plots import draw_confusion
        >>> draw_confusion([[90, 10, 0], [5, 5, 0]], ["ground", "path"]).mode
        'RGB'
    """
    counts, columns = np.asarray(matrix), [*names, "none"]
    if counts.shape != (len(names), len(names) + 1):
        raise ValueError(
            f"the matrix is {counts.shape}; expected {(len(names), len(names) + 1)} for {len(names)} names: a row and "
            "a column for each, and a column for predictions that are no class"
        )
    shares = 100 * row_shares(counts)
    if not counts[:, -1].any():
        shares, columns = shares[:, :-1], columns[:-1]
    has_numbers = len(names) <= _NUMBERED_CLASSES
    cell, size = (0.42, 10) if has_numbers else (0.14, 7)
    label = 0.012 * size * max(map(len, columns)) + 0.6
    width, height = cell * len(columns) + label + 0.4, cell * len(names) + label + 0.8
    figure = _figure(max(width, 4.0), max(height, 3.0))
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(shares), cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_title("predicted", color=_FAINT, fontsize=10)
    axes.set_ylabel("true", color=_FAINT)
    figure.colorbar(image, ax=axes, orientation="horizontal", label="% of the row's pixels", pad=0.06, aspect=40)
    if has_numbers:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:  # NaN is not
                color = "white" if share > 55 else "black"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=color, fontsize=8)
    return _render(figure)


def row_shares(counts: np.ndarray) -> np.ndarray:
    """Divide each row by its sum; a row of zeros becomes NaN.

    Examples:
        >>> import numpy as np
        >>> from hf_segformer.training.plots import row_shares
        >>> row_shares(np.array([[1, 3], [0, 0]])).tolist()
        [[0.25, 0.75], [nan, nan]]
    """
    totals = counts.sum(axis=1, keepdims=True).astype(float)
    totals[totals == 0] = np.nan
    return counts / totals


def save_plot(path: str | Path, draw: Callable[..., Image.Image], *values: Any) -> bool:
    """Draw to a PNG file, or print one line and leave it out where matplotlib is not installed.

    Args:
        path: the file; an older one is replaced or removed.
        draw: `draw_curve` or `draw_confusion`.
        *values: its arguments.

    Returns:
        True if it was drawn.

    Raises:
        OSError: if the file cannot be written.
    """
    if find_spec("matplotlib") is None:
        Path(path).unlink(missing_ok=True)
        print(f"{path} is left out: plots need matplotlib, pip install 'hf-segformer[plots]'")
        return False
    with atomic_write(path) as partial:
        draw(*values).save(partial, "PNG")
    return True


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hf-segformer[plots]'") from error
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _render(figure: "Figure") -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _draw_loss(axes: "Axes", loss: _Points, eval_loss: _Points) -> None:
    mean = running_mean(loss)
    if loss:
        if mean != loss:
            axes.plot(*zip(*loss, strict=True), color=_PALE_BLUE, linewidth=1)
        axes.plot(*zip(*mean, strict=True), color=_BLUE, marker="o" if len(loss) == 1 else None, label="training")
    if eval_loss:
        axes.plot(*zip(*eval_loss, strict=True), color=_ORANGE, marker="o", label="evaluation")
    axes.set_title("Loss", loc="left")
    axes.set_ylim(top=1.05 * loss_limit([value for _, value in loss], [value for _, value in eval_loss]))
    if loss and eval_loss:
        axes.legend(frameon=False)


def _draw_iou(axes: "Axes", iou: _Points) -> None:
    step, best = max(iou, key=lambda point: point[1])
    axes.plot(*zip(*iou, strict=True), color=_ORANGE, marker="o")
    axes.annotate(f"{best:.1f}", (step, best), xytext=(0, 6), textcoords="offset points", ha="center")
    axes.set_title("Mean IoU, %", loc="left")
    axes.set_ylim(top=1.15 * max(best, 1e-9))


def loss_limit(losses: Sequence[float], eval_losses: Sequence[float] = ()) -> float:
    """Upper end of the loss axis: the highest loss, unless a few peaks are `_PEAK` times higher than 97 % of them.

    Examples:
        >>> from hf_segformer.training.plots import loss_limit
        >>> loss_limit([90.0] + [2.0] * 99), loss_limit([5.0] + [2.0] * 99)
        (2.0, 5.0)
    """
    ordered = sorted(losses)
    usual = ordered[: math.ceil(0.97 * len(ordered))]
    highest = usual if ordered and ordered[-1] > _PEAK * usual[-1] else ordered
    return max([*highest[-1:], *eval_losses, 1e-9])


def _points(curve: Sequence[dict[str, Any]], key: str) -> _Points:
    return [(row["step"], row[key]) for row in curve if row.get(key) is not None and math.isfinite(row[key])]


def running_mean(points: _Points) -> _Points:
    """Mean of each point with its neighbours, a fiftieth of all on either side; with fewer at the ends."""
    reach = len(points) // 50
    means = []
    for index, (step, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        window = points[index - near : index + near + 1]
        means.append((step, sum(value for _, value in window) / len(window)))
    return means


__all__ = ["draw_confusion", "draw_curve", "loss_limit", "row_shares", "running_mean", "save_plot"]
