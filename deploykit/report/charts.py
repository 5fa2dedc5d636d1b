"""Charts as inline SVG: no script, no font, no file beside the page.

They are drawn at the size of a phone's screen and the page puts them side by side, so that
their letters stay readable on any screen; colours come from the page's style.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 26, 40
LETTER = 6.4  # width of an average letter at the size of the labels
Format = Callable[[float], str]


@dataclass(frozen=True)
class Point:
    """A labelled dot; ``kind`` is its style: ``baseline``, ``final``, ``kept``, ``refused``."""

    label: str
    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Line:
    """A named series; ``style`` 1 to 3 picks its colour and dashes."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels."""

    low: float
    high: float
    first: float
    last: float
    ticks: Sequence[float]

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x: str,
    y: str,
    formats: Sequence[Format],
    others: Sequence[Point] = (),
) -> Markup:
    """Draw labelled dots, joined in their order, and the front of those that none dominates.

    A dot dominates another where it is further left and higher.

    Args:
        points: at least one.
        others: more dots, which nothing joins.
        title: what a screen reader says.
        x: name of the horizontal axis; it begins at 0.
        y: name of the vertical axis.
        formats: writers of the values on x and on y.
    """
    dots = [*points, *others]
    across = _axis([0.0, *(point.x for point in dots)], LEFT, WIDTH - RIGHT, room=0.15)
    up = _axis([point.y for point in dots], HEIGHT - BOTTOM, TOP, room=0.25)
    parts = [_frame(across, up, x, y, formats)]
    path = " ".join(f"{across(point.x)},{up(point.y)}" for point in points)
    parts.append(Markup('<polyline class="way" points="{}"/>').format(path))
    stairs = " ".join(f"{across(left)},{up(height)}" for left, height in pareto_stairs(dots))
    parts.append(Markup('<polyline class="front" points="{}"/>').format(stairs))
    boxes = [_box(across(point.x), up(point.y), 12, 12) for point in dots]
    for point in dots:
        label_x, label_y, anchor = _place_label(point.label, across(point.x), up(point.y), boxes)
        hint = f"{point.label}: {formats[0](point.x)}, {formats[1](point.y)}"
        parts.append(
            Markup(
                '<circle class="dot {}" cx="{}" cy="{}" r="5"><title>{}</title></circle>'
                '<text class="name" x="{}" y="{}" text-anchor="{}">{}</text>'
            ).format(
                point.kind,
                across(point.x),
                up(point.y),
                hint,
                label_x,
                label_y,
                anchor,
                point.label,
            )
        )
    return _svg(title, parts)


def pareto_stairs(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return the corners of the line under which every point lies: least x, greatest y."""
    stairs: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not stairs:
            stairs.append((point.x, point.y))
        elif point.y > stairs[-1][1]:
            stairs += [(point.x, stairs[-1][1]), (point.x, point.y)]
    return stairs


def line_chart(
    lines: Sequence[Line], *, title: str, x: str, y: str, formats: Sequence[Format]
) -> Markup:
    """Draw series over whole numbers, such as epochs; see `scatter` for the arguments."""
    across = _axis([value for line in lines for value in line.x], LEFT, WIDTH - RIGHT, whole=True)
    up = _axis([value for line in lines for value in line.y], HEIGHT - BOTTOM, TOP, room=0.08)
    parts = [_frame(across, up, x, y, formats)]
    for line in lines:
        pairs = list(zip(line.x, line.y, strict=True))
        path = " ".join(f"{across(left)},{up(value)}" for left, value in pairs)
        parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(line.style, path))
        for left, value in pairs if len(pairs) <= 40 else ():
            hint = f"{line.label}, {x} {formats[0](left)}: {formats[1](value)}"
            parts.append(
                Markup(
                    '<circle class="mark s{}" cx="{}" cy="{}" r="2.5"><title>{}</title></circle>'
                ).format(line.style, across(left), up(value), hint)
            )
    return _svg(title, parts)


def _svg(title: str, parts: Sequence[Markup]) -> Markup:
    start = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        WIDTH, HEIGHT, title
    )
    return start + Markup("").join(parts) + Markup("</svg>")


def _frame(across: _Axis, up: _Axis, x: str, y: str, formats: Sequence[Format]) -> Markup:
    """Draw grid, ticks and the axes' names."""
    parts = []
    for tick in up.ticks:
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(
                LEFT, WIDTH - RIGHT, up(tick), up(tick), LEFT - 6, up(tick) + 3.5, formats[1](tick)
            )
        )
    for tick in across.ticks:
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                across(tick), HEIGHT - BOTTOM + 15, formats[0](tick)
            )
        )
    parts.append(
        Markup(
            '<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>'
            '<text class="title" x="{}" y="{}" text-anchor="end">{}</text>'
            '<text class="title" x="2" y="9">{}</text>'
        ).format(
            LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - 6, x, y
        )
    )
    return Markup("").join(parts)


def _axis(
    values: Sequence[float], first: float, last: float, room: float = 0.0, whole: bool = False
) -> _Axis:
    """Span the values; values that are all equal get a span of their own."""
    low, high = min(values), max(values)
    width = high - low or abs(high) * 0.1 or 1.0
    if high == low:
        low -= width / 2
        high += width / 2
    below = 0.0 if min(values) == 0 else room * width
    low, high = low - below, high + room * width
    return _Axis(low, high, first, last, nice_ticks(low, high, whole=whole))


def nice_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Return about ``count`` round numbers within ``[low, high]``."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


Box = tuple[float, float, float, float]


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _place_label(label: str, x: float, y: float, taken: list[Box]) -> tuple[float, float, str]:
    """Find room beside a dot, and take it; the last resort is to overlap above."""
    width = LETTER * len(escape(label).unescape())
    places = [
        (x + 9, y + 4, "start", x + 9 + width / 2),
        (x - 9, y + 4, "end", x - 9 - width / 2),
        (x, y - 10, "middle", x),
        (x, y + 18, "middle", x),
        (x + 9, y - 9, "start", x + 9 + width / 2),
        (x - 9, y + 17, "end", x - 9 - width / 2),
    ]
    for left, base, anchor, centre in places:
        box = _box(centre, base - 4, width, 12)
        inside = box[0] > LEFT and box[2] < WIDTH and box[1] > TOP - 6 and box[3] < HEIGHT - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return left, base, anchor
    return x, y - 10, "middle"


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
