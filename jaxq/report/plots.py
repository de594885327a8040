"""Inline SVG plots: no script, no external resource; colours come from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float, str]]
"""Points of one line: x, y, and what a pointer over the point says."""

MARKS: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>',
    lambda x, y: f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 5.5:.1f}l5 9h-10z"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 6:.1f}l6 6-6 6-6-6z"/>',
    lambda x, y: f'<path d="M{x - 5:.1f} {y - 3.5:.1f}h10l-5 9z"/>',
    lambda x, y: f'<path d="M{x - 1.5:.1f} {y - 5:.1f}h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z"/>',
)
"""Each series has a shape of its own, so that colour is never the only difference."""


def panel(points: Points, label: str, what: str, top: float, *, step: bool = False) -> str:
    """Return a small line plot of one role over the layers, y from 0 to `top`, the largest value labelled.

    Args:
      points: (layer, value, hover text) in layer order.
      label: the accessible name of the plot.
      what: the quantity, for the description.
      top: the largest y of all the panels that are to be compared.
      step: draw steps (bits) where a line (error) would suggest values between layers.
    """
    width, height, left, right, low, high = 240, 120, 34, 10, 98, 14
    xs = [x for x, _, _ in points]
    span = (max(xs) - min(xs)) or 1
    place = [
        (left + (x - min(xs)) / span * (width - left - right), low - y / top * (low - high)) for x, y, _ in points
    ]
    parts = []
    for tick in ticks(top):
        y = low - tick / top * (low - high)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{left - 5}" y="{y + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text class="axis" x="{left}" y="113">{min(xs):g}</text>')
    if max(xs) > min(xs):
        parts.append(f'<text class="axis" x="{width - right}" y="113" text-anchor="end">layer {max(xs):g}</text>')
    if step:
        moves = "".join(f"H{x:.1f}V{y:.1f}" for x, y in place[1:])
        parts.append(f'<path class="line" d="M{place[0][0]:.1f} {place[0][1]:.1f}{moves}"/>')
    elif len(place) > 1:
        parts.append(f'<path class="area" d="M{_joined(place)}L{place[-1][0]:.1f} {low}H{place[0][0]:.1f}z"/>')
        parts.append(f'<path class="line" d="M{_joined(place)}"/>')
    worst = max(range(len(points)), key=lambda i: points[i][1])
    for i, (x, y) in enumerate(place):
        name = "dot worst" if i == worst and not step else "dot"
        radius = 3.4 if i == worst and not step else 2
        parts.append(
            f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{escape(points[i][2])}</title></circle>"
        )
    worst_text = f"{what} by layer; the largest is {points[worst][1]:.3g} in layer {points[worst][0]:g}"
    return _svg(width, height, label, worst_text, parts)


def scatter(series: Mapping[str, Points], label: str, axes: tuple[str, str], reference: float | None) -> str:
    """Return a plot of y (log scale where it spans more than a factor of 3) over x, one line a series.

    Args:
      series: name -> points; at most six series have shapes of their own.
      label: the accessible name of the plot.
      axes: names of the x and y axis.
      reference: a y value to draw as a dashed line (the float model), or None.
    """
    width, height, left, right, low, high = 420, 300, 52, 16, 256, 30
    everything = [point for points in series.values() for point in points]
    ys = [y for _, y, _ in everything] + ([reference] if reference else [])
    xs = [x for x, _, _ in everything]
    x_low, x_high = math.floor(min(xs) - 0.2), math.ceil(max(xs) + 0.2)
    log = min(ys) > 0 and max(ys) > 3 * min(ys)
    scale: Callable[[float], float] = math.log if log else float
    margin = 0.06 * (scale(max(ys)) - scale(min(ys)) or 1)
    bottom, ceiling = scale(min(ys)) - margin, scale(max(ys)) + margin

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (width - left - right),
            low - (scale(y) - bottom) / (ceiling - bottom) * (low - high),
        )

    parts = [f'<text class="axis" x="4" y="14">{escape(axes[1])}{", log scale" if log else ""}</text>']
    parts.append(
        f'<text class="axis" x="{width - right}" y="{height - 6}" text-anchor="end">{escape(axes[0])}</text>'
    )
    for tick in log_ticks(min(ys), max(ys)) if log else span_ticks(min(ys), max(ys)):
        y = at(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for x_tick in range(x_low, x_high + 1):
        x = at(x_tick, min(ys))[0]
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{low}" y2="{low + 4}"/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{low + 18}" text-anchor="middle">{x_tick}</text>')
    if reference:
        y = at(x_low, reference)[1]
        parts.append(f'<line class="reference" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="axis strong" x="{width - right}" y="{y - 5:.1f}" text-anchor="end">'
            f"float {reference:,.2f}</text>"
        )
    for i, (name, points) in enumerate(series.items()):
        place = [at(x, y) for x, y, _ in points]
        mark = MARKS[i % len(MARKS)]
        marks = "".join(
            f"<g>{mark(*spot)}<title>{escape(f'{name}: {point[2]}')}</title></g>"
            for spot, point in zip(place, points, strict=True)
        )
        line = f'<path class="series" d="M{_joined(place)}"/>' if len(place) > 1 else ""
        parts.append(f'<g class="s{i % len(MARKS)}">{line}{marks}</g>')
    words = "; ".join(
        f"{name}: " + ", ".join(f"{y:.2f} at {x:.2f}" for x, y, _ in points) for name, points in series.items()
    )
    return _svg(width, height, label, words, parts)


def swatch(index: int) -> str:
    """Return the legend mark of series `index`."""
    mark = MARKS[index % len(MARKS)](8, 8)
    return (
        f'<svg class="swatch s{index % len(MARKS)}" viewBox="0 0 16 16" width="16" height="16" '
        f'aria-hidden="true">{mark}</svg>'
    )


def bars(before: float, after: float, most: float) -> str:
    """Return two horizontal bars, the size before over the size after; `most` is the full width."""
    widths = [100 * value / most if most else 0 for value in (before, after)]
    return (
        '<svg class="bars" width="100%" height="18" aria-hidden="true">'
        f'<rect class="before" width="{widths[0]:.2f}%" height="7" y="1" rx="2"/>'
        f'<rect class="after" width="{widths[1]:.2f}%" height="7" y="10" rx="2"/></svg>'
    )


def short(value: float) -> str:
    """Return an axis label that fits its margin: "100", "10k", "1M"."""
    for unit, name in ((1e6, "M"), (1e4, "k")):
        if value >= unit:
            return f"{value / (1e6 if name == 'M' else 1e3):,g}{name}"
    return f"{value:,g}"


def ticks(top: float) -> list[float]:
    """Return 0 and one or two round values up to `top`."""
    return [tick for tick in span_ticks(0.0, top, most=3) if tick <= top]


def span_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most `most` round values in [low, high]."""
    raw = (high - low) / max(most - 1, 1) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round values (1, 2, 5 times a power of ten; only powers when many) in [low, high]."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    units = (1, 2, 5) if high / low < 1000 else (1,)
    return [unit * 10.0**power for power in powers for unit in units if low <= unit * 10.0**power <= high]


def _joined(place: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in place)


def _svg(width: int, height: int, label: str, description: str, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"{label}. {description}")}">'
        f"{''.join(parts)}</svg>"
    )
