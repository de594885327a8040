"""The HTML page that sets several runs side by side: figures, plots, and each run's own report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jaxq.report import page, plots
from jaxq.report.records import Report, duration, number, size


def comparison_html(
    rows: Sequence[Mapping[str, Any]],
    title: str = "Comparison",
    notes: str | Sequence[str] = (),
    reports: Mapping[str, Report] | None = None,
) -> str:
    """Return one self-contained page that compares runs.

    Args:
      rows: one mapping a run: "recipe", "bits", "bits_per_weight", "bytes", "seconds" and "perplexity"
        {text: value}. A row of 16 or more bits, or of bits None, is the float model: the reference line.
      title: the page's heading.
      notes: paragraphs of plain text below the heading's figures.
      reports: name -> Report of single runs; each is shown folded at the end.
    """
    paragraphs = [notes] if isinstance(notes, str) else list(notes)
    texts = list(dict.fromkeys(text for row in rows for text in row.get("perplexity", {})))
    prose = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs if paragraph)
    folded = "".join(
        f'<details class="run"><summary>{escape(name)}</summary>{page.tiles(report)}{page.body(report)}</details>'
        for name, report in (reports or {}).items()
    )
    content = [
        _table(rows, texts),
        _plots(rows, texts),
        f'<h2>Notes</h2><div class="prose">{prose}</div>' if prose else "",
        f"<h2>Each run</h2>{folded}" if folded else "",
    ]
    intro = "Perplexity (lower is better) against the bits that are stored for each weight."
    return page.document(title, "\n".join(content), intro)


def is_float(row: Mapping[str, Any]) -> bool:
    """Whether a row is the float model."""
    bits = row.get("bits")
    return bits is None or float(bits) >= 16


def _table(rows: Sequence[Mapping[str, Any]], texts: list[str]) -> str:
    best = {
        (bits, text): min(_perplexity(row, text) for row in rows if row.get("bits") == bits)
        for bits in {row.get("bits") for row in rows if not is_float(row)}
        for text in texts
    }
    lines = []
    for row in rows:
        figures = ""
        for text in texts:
            value = _perplexity(row, text)
            rivals = sum(other.get("bits") == row.get("bits") for other in rows)
            strong = rivals > 1 and value == best.get((row.get("bits"), text))
            figures += f"<td>{'<b>' if strong else ''}{number(_finite(value))}{'</b>' if strong else ''}</td>"
        bits, seconds = row.get("bits"), row.get("seconds")
        lines.append(
            f"<tr{' class=float' if is_float(row) else ''}>"
            f'<th scope="row" class="left">{escape(str(row["recipe"]))}</th>'
            f"<td>{number(bits)}</td>{figures}<td>{number(row.get('bits_per_weight'))}</td>"
            f"<td>{size(row['bytes']) if row.get('bytes') is not None else '-'}</td>"
            f"<td>{'-' if not seconds else duration(float(seconds))}</td></tr>"
        )
    head = [("Recipe", True), ("Bits", False), *((f"Perplexity, {text}", False) for text in texts)]
    head += [("Bits per weight", False), ("Bytes", False), ("Time", False)]
    lead = '<p class="lead">The better figure of each width is bold.</p>'
    return f"<h2>Figures</h2>{lead}{page.table(page_caption(texts), head, lines)}"


def page_caption(texts: list[str]) -> str:
    """Return the name of the table of figures."""
    return f"Bits, bytes and perplexity on {', '.join(texts)}" if texts else "Bits and bytes"


def _plots(rows: Sequence[Mapping[str, Any]], texts: list[str]) -> str:
    methods = list(dict.fromkeys(str(row["recipe"]) for row in rows if not is_float(row)))
    figures = ""
    for text in texts:
        series = {method: _points(rows, method, text) for method in methods}
        series = {method: points for method, points in series.items() if points}
        if not series:
            continue
        reference = next((_finite(_perplexity(row, text)) for row in rows if is_float(row)), None)
        plot = plots.scatter(series, f"Perplexity on {text}", ("bits per weight", "perplexity"), reference)
        figures += f"<figure><h3>{escape(text)}</h3>{plot}</figure>"
    legend = "".join(f"<li>{plots.swatch(i)}{escape(method)}</li>" for i, method in enumerate(methods))
    if not figures:
        return ""
    return (
        "<h2>Perplexity against size</h2>"
        '<p class="lead">Down and to the left is better; the dashed line is the float model.</p>'
        f'<ul class="legend">{legend}</ul><div class="plots">{figures}</div>'
    )


def _points(rows: Sequence[Mapping[str, Any]], method: str, text: str) -> list[tuple[float, float, str]]:
    found = [
        (float(row["bits_per_weight"]), _perplexity(row, text))
        for row in rows
        if not is_float(row) and str(row["recipe"]) == method and row.get("bits_per_weight") is not None
    ]
    return [(x, y, f"{number(y)} at {number(x)} bits per weight") for x, y in sorted(found) if math.isfinite(y)]


def _perplexity(row: Mapping[str, Any], text: str) -> float:
    value = row.get("perplexity", {}).get(text)
    return math.inf if value is None else float(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
