"""Line charts as SVG: curves of a run, or of several in one picture."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 220  # of the picture; text is 12 high in it
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 24  # around the curves
POINTS = 300  # of a curve: more can't be told apart
COLOURS = 6  # in the style sheet: --c0 to --c5


@dataclass(frozen=True)
class Curve:
    """Points of a measure.

    Attributes:
        name: For the legend.
        points: Step and value.
        colour: Number of its colour.
        dotted: Whether its points are marked: few of them, far apart.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dotted: bool = False


def draw_chart(title: str, curves: Sequence[Curve], logarithmic: bool = False) -> str:
    """A chart with axes and, for several curves, a legend; empty where no curve has a finite point.

    Args:
        title: What is shown.
        curves: In the order of the legend.
        logarithmic: Whether equal distances are equal ratios; values must be above 0, else it is linear.
    """
    kept = [(curve, thin(_finite(curve.points))) for curve in curves]
    kept = [(curve, points) for curve, points in kept if points]
    if not kept:
        return ""
    steps = [step for _, points in kept for step, _ in points]
    values = [value for _, points in kept for _, value in points]
    logarithmic = logarithmic and min(values) > 0 and max(values) / min(values) > 30
    heights = [math.log10(value) for value in values] if logarithmic else values
    x = Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    y = Axis(min(heights), max(heights), HEIGHT - BOTTOM, TOP)
    parts = [f"<figure><figcaption>{escape(title)}{' (logarithmic)' * logarithmic}</figcaption>"]
    parts.append(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">')
    parts += _draw_axes(x, y, logarithmic)
    for curve, points in kept:
        colour = f"var(--c{curve.colour % COLOURS})"
        places = [(x.place(step), y.place(math.log10(value) if logarithmic else value)) for step, value in points]
        line = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if curve.dotted or len(places) == 1:
            parts += [f'<circle cx="{a:.1f}" cy="{d:.1f}" r="2.6" fill="{colour}"/>' for a, d in places]
    parts.append("</svg>")
    if len(kept) > 1 or kept[0][0].name != title:
        names = (f'<span class="c{curve.colour % COLOURS}">{escape(curve.name)}</span>' for curve, _ in kept)
        parts.append(f'<div class="legend">{" ".join(names)}</div>')
    return "".join([*parts, "</figure>"])


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most so many points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    stretches, kept = most // 2, []
    for number in range(stretches):
        part = points[len(points) * number // stretches : len(points) * (number + 1) // stretches]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return [points[0], *kept[1:-1], points[-1]]


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(step, float(value)) for step, value in points if isinstance(value, int | float) and math.isfinite(value)]


@dataclass(frozen=True)
class Axis:
    """From values to places in the picture."""

    low: float
    high: float
    begin: float
    end: float

    def place(self, value: float) -> float:
        """Where a value stands."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Round values in the range: 1, 2 or 5 times a power of ten apart."""
        span = self.high - self.low
        if not span > 0:
            return [self.low]
        unit = 10 ** math.floor(math.log10(span / 3))
        apart = next(factor * unit for factor in (1, 2, 5, 10) if span / (factor * unit) <= 5)
        return [number * apart for number in range(math.ceil(self.low / apart), math.floor(self.high / apart) + 1)]


def _draw_axes(x: Axis, y: Axis, logarithmic: bool) -> Iterator[str]:
    for tick in y.ticks():
        down = y.place(tick)
        yield f'<line x1="{LEFT}" y1="{down:.1f}" x2="{WIDTH - RIGHT}" y2="{down:.1f}" stroke="var(--line)"/>'
        text = write_number(10**tick if logarithmic else tick)
        yield f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{text}</text>'
    for tick in x.ticks():
        across = min(max(x.place(tick), LEFT + 8), WIDTH - RIGHT - 14)
        yield f'<text x="{across:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{write_number(tick)}</text>'


def write_number(value: float) -> str:
    """A value beside an axis."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def draw_histogram(counts: Sequence[int], edges: Sequence[int], limit: int | None) -> str:
    """Rows by length in tokens, before cutting, with a line at `limit`; empty where there is no row."""
    return "".join(_histogram(counts, edges, limit)) if counts else ""


def _histogram(counts: Sequence[int], edges: Sequence[int], limit: int | None) -> Iterator[str]:
    width, height = 700, 160
    least, reach = edges[0], max(edges[-1] - edges[0], 1)
    most = f"{max(counts):,} row{'s' * (max(counts) != 1)}"
    yield f'<figure><figcaption class="axis">{most}</figcaption>'
    yield f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="rows by length in tokens">'
    yield f'<line x1="0" y1="1" x2="{width}" y2="1" stroke="var(--line)"/>'  # the height of the tallest bar
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        x, bar = (low - least) / reach * width, count / max(counts) * height
        yield (
            f'<rect x="{x:.1f}" y="{height - bar:.1f}" width="{max((high - low) / reach * width - 1, 1):.1f}"'
            f' height="{bar:.1f}" fill="var(--bar)"><title>{low} to {high} tokens: {count:,} rows</title></rect>'
        )
    yield f'<line x1="0" y1="{height}" x2="{width}" y2="{height}" stroke="var(--quiet)" stroke-width="2"/>'
    cut = ""
    if limit and least <= limit <= edges[-1]:
        x = (limit - least) / reach * width
        cut = f'<span class="limit">max_length {limit:,}</span>'
        dashes = 'stroke="var(--bad)" stroke-width="2" stroke-dasharray="6"'
        yield f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height}" {dashes}/>'
    yield f'</svg><div class="axis"><span>{least:,}</span>{cut}<span>{edges[-1]:,} tokens</span></div></figure>'
