"""Numbers as a report's page shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NONE = "–"


def number(value: Any, digits: int = 4, *, sign: bool = False) -> str:
    """Fixed digits with a true minus; fewer where the number is large; a dash for none or NaN."""
    if not is_number(value):
        return NONE
    digits = digits if abs(value) < 100 else min(digits, 2)
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def is_number(value: Any) -> bool:
    """Whether there is a finite number to show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_float(value: Any) -> float:
    """The number, NaN where there is none."""
    return float(value) if is_number(value) else math.nan


def interval(estimate: Mapping[str, Any], sign: bool = False) -> str:
    """[low, high] of an estimate; nothing where it has none."""
    low, high = estimate.get("low"), estimate.get("high")
    if not (is_number(low) and is_number(high)):
        return ""
    return f"[{number(low, sign=sign)}, {number(high, sign=sign)}]"


def amount(value: Any) -> str:
    """Seconds or tokens: three significant digits."""
    if not is_number(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def p_value(value: Any) -> str:
    """Three digits; nothing where there was no test."""
    if not is_number(value):
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"
