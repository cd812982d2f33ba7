"""The plots of a report's page, as SVG to be set into it: text stays text, and no colour carries a meaning alone.

Figures are made without pyplot, so nothing is kept between calls. Lengths are CSS pixels.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator

from penchant.evaluation.page_view import Costs, Point, Slice
from penchant.tokens import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of Okabe and Ito's palette, which colour-blind readers tell apart; the best is also larger and a diamond.
_BLUE, _ORANGE, _INK, _GREY = "#0072B2", "#D55E00", "#222222", "#9a9a9a"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GREY,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.usetex": False,
    "text.parse_math": False,  # a system's name may hold dollars
}
_DPI = 72  # a point is a pixel
_PANEL = 350
_ROW = 17
_WIDE, _HIGH = 760, 520
_NAME = 130
# Where a label may go, nearest first; beyond the first ring a line leads to it.
_RINGS = (8, 22, 36, 52, 72, 96)
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8))
Box = tuple[float, float, float, float]  # left, bottom, right, top


def slice_panels(part: Slice) -> list[str]:
    """One SVG a value of the slice: a row a system, its mean and interval; all on the same axis."""
    points = [point for panel in part.panels for point in panel.points]
    top = max((value for p in points for value in (p.mean, p.high) if math.isfinite(value)), default=1.0)
    low = min((value for p in points for value in (p.mean, p.low) if math.isfinite(value)), default=0.0)
    limits = (min(0.0, low * 1.06), top * 1.06 if top > 0 else 1.0)
    return [
        _panel(panel.points, part.metric, limits, f"{part.name}: {panel.value}, {part.metric}") for panel in part.panels
    ]


def _panel(points: Sequence[Point], metric: str, limits: tuple[float, float], label: str) -> str:
    with _plain(label):
        names = [_wrapped(point.system) for point in points]
        # A name of two lines has a row and a half; y counts pixels from the top.
        heights = [_ROW * (1 + 0.7 * name.count("\n")) for name in names]
        middle = [above + own / 2 for above, own in zip(accumulate(heights, initial=0), heights, strict=False)]
        height = sum(heights) + 44
        figure = _figure(_PANEL, height)
        axes = figure.add_axes((0, 0, 1, 1))
        best = max(points, key=lambda point: point.mean)
        for y, point in zip(middle, points, strict=True):
            _mark(axes, point, point.mean, y, best=point is best, across=True)
        axes.set_yticks(middle, names)
        axes.set_ylim(sum(heights), 0)
        axes.set_xlim(limits)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(clean(metric, 40))
        axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        left = max(_size(figure, text)[0] for text in axes.get_yticklabels()) + 10
        axes.set_position((left / _PANEL, 36 / height, 1 - (left + 12) / _PANEL, sum(heights) / height))
        return _svg(figure, label)


def cost_plot(costs: Costs) -> str:
    """The metric against seconds per 1,000 users (log), each system named beside its point; "" without points.

    A grey line joins the systems that no other beats at their cost or below.
    """
    label = f"{costs.metric} against seconds per 1,000 users"
    if not costs.points:
        return ""
    with _plain(label):
        figure = _figure(_WIDE, _HIGH)
        axes = figure.add_axes((70 / _WIDE, 52 / _HIGH, 1 - 90 / _WIDE, 1 - 72 / _HIGH))
        axes.set_xscale("log")
        best = max(costs.points, key=lambda point: point.mean)
        for point in costs.points:
            _mark(axes, point, point.seconds, point.mean, best=point is best, across=False)
        low, high = (pick(p.seconds for p in costs.points) for pick in (min, max))
        # Room for a name on either side of the outermost points.
        room = (math.log10(high / low) or 1.0) * _NAME / (_WIDE - 90 - 2 * _NAME)
        axes.set_xlim(low / 10**room, high * 10**room)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(0.0, bottom), top + 0.08 * (top - min(0.0, bottom)))
        axes.set_xlabel("seconds per 1,000 users (log scale)")
        axes.set_ylabel(clean(costs.metric, 40))
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        frontier = _frontier(costs.points)
        axes.plot([p.seconds for p in frontier], [p.mean for p in frontier], color=_GREY, linewidth=1, zorder=1)
        _label(figure, axes, costs.points)
        return _svg(figure, label)


def _frontier(points: Sequence[Point]) -> list[Point]:
    """The points that are better than every cheaper one, cheapest first."""
    out: list[Point] = []
    for point in sorted(points, key=lambda p: (p.seconds, -p.mean)):
        if not out or point.mean > out[-1].mean:
            out.append(point)
    return out


def _mark(axes: Axes, point: Point, x: float, y: float, *, best: bool, across: bool) -> None:
    colour = _ORANGE if best else _BLUE
    if math.isfinite(point.low) and math.isfinite(point.high):
        ends = ([point.low, point.high], [y, y]) if across else ([x, x], [point.low, point.high])
        axes.plot(*ends, color=colour, linewidth=1.6, solid_capstyle="butt", alpha=0.6, zorder=2)
    axes.plot([x], [y], "D" if best else "o", color=colour, markersize=7 if best else 6, zorder=3)


# -- labels that do not overlap ----------------------------------------------------------------


def _label(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Name every point, the label at the first free place around it; greedily, from the left."""
    _canvas(figure).draw()
    where = axes.get_window_extent()
    frame = (where.x0, where.y0, where.x1, where.y1)
    at = [tuple(axes.transData.transform((p.seconds, p.mean))) for p in points]
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    for point, (x, y) in zip(points, at, strict=True):
        drawn = math.isfinite(point.low) and math.isfinite(point.high)
        low, high = (float(axes.transData.transform((point.seconds, v))[1]) for v in (point.low, point.high))
        taken.append((x - 2, low, x + 2, high) if drawn else (x, y, x, y))
    for i in sorted(range(len(points)), key=lambda i: at[i]):
        x, y = at[i]
        text = axes.text(0, 0, _wrapped(points[i].system), fontsize=10, zorder=4)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5})
        text.set_transform(None)
        width, height = _size(figure, text)
        places = [_place(x, y, side, ring, width, height) for ring in _RINGS for side in _SIDES]
        others = [other for j, other in enumerate(taken) if j not in (i, len(points) + i)]
        box = min(places, key=lambda box: _crowding(box, taken, frame) + _crossed((x, y), box, others))
        text.set_position((box[0], box[1]))
        text.set_verticalalignment("bottom")
        taken.append(box)
        near = _nearest((x, y), box)
        if math.dist(near, (x, y)) > _RINGS[0] + 3:
            axes.plot(*zip(near, (x, y), strict=True), transform=None, color=_GREY, linewidth=0.7, zorder=1)


def _place(x: float, y: float, side: tuple[float, float], ring: float, width: float, height: float) -> Box:
    """The box of a label of that size whose nearest edge is ``ring`` away on that side."""
    centre_x = x + side[0] * ring + (0 if side[0] == 0 else math.copysign(width / 2, side[0]))
    centre_y = y + side[1] * ring + (0 if side[1] == 0 else math.copysign(height / 2, side[1]))
    return (centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)


def _crowding(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """How much of a label lies on others or outside the frame, in square pixels; 0 is free."""
    inside = max(0.0, min(box[2], frame[2]) - max(box[0], frame[0])) * max(
        0.0, min(box[3], frame[3]) - max(box[1], frame[1])
    )
    outside = (box[2] - box[0]) * (box[3] - box[1]) - inside
    over = sum(
        max(0.0, min(box[2], b[2]) - max(box[0], b[0])) * max(0.0, min(box[3], b[3]) - max(box[1], b[1])) for b in taken
    )
    return 10 * max(0.0, outside) + over


def _nearest(point: tuple[float, float], box: Box) -> tuple[float, float]:
    """The place in a box that is nearest to a point."""
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def _crossed(point: tuple[float, float], box: Box, others: Sequence[Box]) -> float:
    """What a line from a point to its label would run across, in the measure of `_crowding`."""
    end = _nearest(point, box)
    way = [(point[0] + (end[0] - point[0]) * t / 8, point[1] + (end[1] - point[1]) * t / 8) for t in range(1, 8)]
    return 40.0 * sum(any(b[0] <= x <= b[2] and b[1] <= y <= b[3] for b in others) for x, y in way)


# -- figures to text ---------------------------------------------------------------------------


@contextmanager
def _plain(label: str) -> Iterator[None]:
    """Our style for one figure; a glyph that matplotlib's own font lacks is the reader's font's job."""
    # The salt goes into the ids, which must differ between the plots of one page.
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": clean(label, None)}
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Glyph .* missing from")
        warnings.filterwarnings("ignore", message=r"(?s).*Matplotlib currently does not support")
        yield


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    figure.patch.set_alpha(0)
    return figure


def _canvas(figure: Figure) -> Any:  # matplotlib's is untyped
    return FigureCanvasAgg(figure)


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(clean(name), 24, max_lines=2, placeholder=" …", break_on_hyphens=False)) or " "


def _size(figure: Figure, text: Text) -> tuple[float, float]:
    """Width and height of a text in pixels."""
    extent = text.get_window_extent(_canvas(figure).get_renderer())
    return float(extent.width), float(extent.height)


def _svg(figure: Figure, label: str) -> str:
    held = io.StringIO()
    figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    width, height = (round(side * _DPI) for side in figure.get_size_inches())
    _, _, body = held.getvalue().partition("<svg")
    body = body.partition(">")[2]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    return (
        f'<svg class="plot" role="img" aria-label="{html.escape(clean(label, None))}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{body.strip()}'
    )
