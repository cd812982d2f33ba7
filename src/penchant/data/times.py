"""Times of any form become one integer: microseconds since 1970-01-01 UTC."""

from __future__ import annotations

from typing import Literal, NamedTuple

import polars as pl

TimeUnit = Literal["s", "ms", "us"]

_MICROSECONDS: dict[TimeUnit, int] = {"s": 1_000_000, "ms": 1_000, "us": 1}
YEAR_1 = -62_135_596_800_000_000
YEAR_2200 = 7_258_118_400_000_000
YEAR_10000 = 253_402_300_800_000_000
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
# With a zone, then without one (read as UTC), the most usual first.
_ZONED = ("%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M%#z")
_NAIVE = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d", "%Y-%m-%dT%H:%M")


class Times(NamedTuple):
    """Int64 microseconds, null where a value isn't a time; and where a number, read in the unit, is past 2200."""

    values: pl.Series
    too_far: pl.Series


def parse_times(raw: pl.Series, unit: TimeUnit) -> Times:
    """Read numbers in ``unit``, dates and ISO 8601 texts (without a zone: UTC).

    Fractions finer than a microsecond are cut off. Infinite and NaN numbers, and those before the year 1, are no times.
    """
    kind = raw.dtype
    if kind in (pl.Datetime, pl.Date):
        return _within(raw.cast(pl.Datetime("us", getattr(kind, "time_zone", None))).cast(pl.Int64))
    if kind.is_numeric():
        return _numbers(raw, unit)
    if kind != pl.String:
        return _within(pl.Series(raw.name, [None] * len(raw), dtype=pl.Int64))
    text = raw.str.strip_chars()
    whole = _numbers(text.cast(pl.Int64, strict=False), unit)
    if whole.values.null_count() == 0:
        return whole
    rest = text.filter(whole.values.is_null() & ~whole.too_far)
    numeric = rest.str.contains(_NUMBER).fill_null(False)
    decimal = _numbers(rest.set(~numeric, None).cast(pl.Float64, strict=False), unit)
    dates = _iso(rest.set(numeric, None))
    place = (whole.values.is_null() & ~whole.too_far).arg_true()
    values = whole.values.scatter(place, pl.select(pl.coalesce(decimal.values, dates)).to_series())
    too_far = whole.too_far.scatter(place, decimal.too_far)
    return Times(values, too_far)


def _numbers(raw: pl.Series, unit: TimeUnit) -> Times:
    factor = _MICROSECONDS[unit]
    raw = raw if raw.dtype.is_float() else raw.cast(pl.Int64, strict=False)
    # Compare before multiplying: an integer that overflows would wrap round to a plausible time.
    fits = (raw >= YEAR_1 // factor) & (raw < YEAR_2200 // factor)
    too_far = (raw >= YEAR_2200 // factor).fill_null(False)
    if raw.dtype.is_float():
        too_far = too_far & raw.is_finite().fill_null(False)
        fits = fits & raw.is_finite()
        scaled = (raw.set(~fits.fill_null(False), None).cast(pl.Float64) * factor).round()
        return Times(scaled.cast(pl.Int64), too_far)
    scaled = raw.set(~fits.fill_null(False), None) * factor
    return Times(scaled, too_far)


def _iso(text: pl.Series) -> pl.Series:
    # A year has four digits: with two, 05-06-24 would be a day of the year 5.
    text = text.set(~text.str.contains(r"^\d{4}-").fill_null(False), None)
    text = text.str.replace(r"^(\S+) (\d)", "${1}T${2}").str.replace(r"(?i)\s*(Z|UTC)$", "+00:00")
    found = pl.Series(text.name, [None], dtype=pl.Int64).new_from_index(0, len(text))
    for form in (*_NAIVE, *_ZONED):
        left = found.is_null() & text.is_not_null()
        if not left.any():
            break
        parsed = text.filter(left).str.to_datetime(form, time_unit="us", strict=False, exact=True).cast(pl.Int64)
        found = found.scatter(left.arg_true(), parsed)
    return _within(found).values


def _within(values: pl.Series) -> Times:
    inside = values.is_between(YEAR_1, YEAR_10000 - 1)
    values = values.set(~inside.fill_null(True), None)
    return Times(values, pl.Series([False]).new_from_index(0, len(values)))


def fitting_unit(value: float) -> TimeUnit | None:
    """The unit under which a numeric time falls before the year 2200, the coarsest first; None if none does."""
    for unit, factor in _MICROSECONDS.items():
        if value * factor < YEAR_2200:
            return unit
    return None
