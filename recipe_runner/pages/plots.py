"""Plots of things that are compared: points with a name each, and bars. As SVG, for pages and as files of their own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from recipe_runner.pages.charts import HEIGHT, LEFT, Axis, write_number

WIDTH = 560  # of a plot; text is 12 high in it
RIGHT, TOP, BOTTOM = 16, 30, 40
ROW = 22  # height of a bar with the space below it
NAMES, VALUES = 150, 96  # width of what stands left and right of bars
# For a file of its own, which has no style sheet around it: both schemes, as in `frame.STYLE`.
COLOURS = """
:root { --ink: #1b1f24; --quiet: #57606a; --line: #d0d7de; --c0: #0969da; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --quiet: #9aa4af; --line: #373e47; --c0: #58a6ff; --paper: #0d1117; }
}
text { font: 12px system-ui, sans-serif; fill: var(--quiet); } .title { fill: var(--ink); font-weight: bold; }
.name { fill: var(--ink); }
"""


@dataclass(frozen=True)
class Point:
    """A thing in a plot.

    Attributes:
        name: Written beside it.
        x: Above 0.
        y: Its value.
        low: Where the interval of its value begins.
        high: Where it ends.
    """

    name: str
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Plot:
    """A picture: its height, and its SVG inside of a width of `WIDTH`."""

    height: int
    svg: str


def plot_points(title: str, across: str, points: Sequence[Point]) -> Plot:
    """Values with their intervals over a logarithmic axis; names are moved apart where they would overlap."""
    height = HEIGHT + 120
    logs = [math.log10(point.x) for point in points]
    space = max(max(logs) - min(logs), 1) * 0.06
    x = Axis(min(logs) - space, max(logs) + space * 3, LEFT, WIDTH - RIGHT)
    lows, highs = [point.low for point in points], [point.high for point in points]
    y = Axis(min(lows), max(highs), height - BOTTOM, TOP)
    parts = [f'<text class="title" x="0" y="14">{escape(title)}</text>']
    for tick in y.ticks():
        down = y.place(tick)
        parts.append(f'<line x1="{LEFT}" y1="{down:.1f}" x2="{WIDTH - RIGHT}" y2="{down:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{write_number(tick)}</text>')
    for power in range(math.ceil(x.low), math.floor(x.high) + 1):
        place = x.place(power)
        parts.append(f'<text x="{place:.1f}" y="{height - 22}" text-anchor="middle">{write_number(10**power)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{height - 4}" text-anchor="middle">{escape(across)}</text>')
    taken: list[tuple[float, float, float, float]] = []  # boxes of names and points: left, right, up, down
    spots = [(x.place(log), y.place(point.y)) for log, point in zip(logs, points, strict=True)]
    taken += [(a - 4, a + 4, d - 4, d + 4) for a, d in spots]
    for point, (a, d) in sorted(zip(points, spots, strict=True), key=lambda pair: pair[1][1]):
        upper, lower = y.place(point.high), y.place(point.low)
        parts.append(f'<line x1="{a:.1f}" y1="{upper:.1f}" x2="{a:.1f}" y2="{lower:.1f}" stroke="var(--quiet)"/>')
        parts.append(f'<circle cx="{a:.1f}" cy="{d:.1f}" r="3.5" fill="var(--c0)"/>')
        left, down, anchor = _find_room(point.name, a, d, taken, height)
        parts.append(
            f'<text class="name" x="{left:.1f}" y="{down:.1f}" text-anchor="{anchor}">{escape(point.name)}</text>'
        )
    return Plot(height, "".join(parts))


def _find_room(
    name: str, across: float, down: float, taken: list[tuple[float, float, float, float]], height: int
) -> tuple[float, float, str]:
    """A place for a name near its point: the nearest where nothing else is."""
    width = 6.6 * len(name)
    steps = sorted(range(-16, 17), key=abs)
    places = [
        (across + 8 if side == "start" else across - 8, down + 4 + 7 * step, side)
        for step in steps
        for side in ("start", "end")
    ]
    for left, base, side in places:
        begin = left if side == "start" else left - width
        box = (begin, begin + width, base - 11, base + 3)
        inside = begin >= LEFT and box[1] <= WIDTH and box[2] >= 18 and box[3] <= height - BOTTOM
        if inside and not any(box[0] < o[1] and o[0] < box[1] and box[2] < o[3] and o[2] < box[3] for o in taken):
            taken.append(box)
            return left, base, side
    return places[0]


def plot_bars(title: str, bars: Sequence[tuple[str, float, str]]) -> Plot:
    """Values as bars from 0: name, value, and the value as it is written."""
    most = max((value for _, value, _ in bars), default=0) or 1
    room = WIDTH - NAMES - VALUES
    parts = [f'<text class="title" x="0" y="14">{escape(title)}</text>']
    for number, (name, value, text) in enumerate(bars):
        up = TOP + ROW * number
        length = max(value / most * room, 1)
        parts.append(f'<text class="name" x="{NAMES - 8}" y="{up + 12}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect x="{NAMES}" y="{up}" width="{length:.1f}" height="{ROW - 7}" fill="var(--c0)"/>')
        parts.append(f'<text x="{NAMES + length + 6:.1f}" y="{up + 12}">{escape(text)}</text>')
    return Plot(TOP + ROW * len(bars), "".join(parts))


def in_page(plot: Plot) -> str:
    """A plot as a part of a page."""
    return f'<figure><svg viewBox="0 0 {WIDTH} {plot.height}" role="img">{plot.svg}</svg></figure>'


def write_file(plots: Sequence[Plot], description: str) -> str:
    """Plots below each other, as an SVG file."""
    gap, parts, height = 16, [], 8
    for plot in plots:
        parts.append(f'<g transform="translate(12 {height})">{plot.svg}</g>')
        height += plot.height + gap
    width = WIDTH + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(description)}"><style>{COLOURS}</style>'
        f'<rect width="{width}" height="{height}" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )
