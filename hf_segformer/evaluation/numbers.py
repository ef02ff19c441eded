"""Scores as JSON and in tables: a score that is not defined has no number."""

import math
from typing import Any


def known(value: Any) -> float | None:
    """Return a score as a number for JSON; None for NaN."""
    return None if math.isnan(value) else float(value)


def percent(value: float | None, digits: int = 1) -> str:
    """Format a share in percent; a dash for None and NaN.

    Examples:
        >>> from hf_segformer.evaluation.numbers import percent
        >>> percent(0.6971), percent(None)
        ('69.7', '-')
    """
    return "-" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


__all__ = ["known", "percent"]
