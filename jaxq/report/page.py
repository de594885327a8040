"""The HTML page of one run: self-contained, readable without script, light or dark as the reader prefers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from html import escape
from importlib import resources
from typing import Any

from jaxq.report import plots
from jaxq.report.records import Report, SiteReport, duration, mean, number, shortened, size


def report_html(report: Report, title: str | None = None) -> str:
    """Return the page of one report."""
    name = str(report.recipe.get("name", "quantization"))
    heading = title or f"{name}: {len(report.rows)} sites"
    intro = f"Recipe {escape(name)}: what was stored, in how many bytes, and what each site lost."
    return document(heading, f"{tiles(report)}{body(report)}", intro)


def document(title: str, content: str, intro: str) -> str:
    """Wrap `content` (HTML) as a whole page with the style sheet inside; `intro` is HTML."""
    style = resources.files("jaxq.report").joinpath("page.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} - jaxq</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1><p>{intro}</p></header>\n{content}\n"
        "<footer>Written by jaxq. Sizes count every stored byte: codes, scales, zero points, codebooks."
        "</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def tiles(report: Report) -> str:
    """Return the summary tiles of a report."""
    before, after = report.bytes_before, report.bytes_after
    shown = [
        ("Bits per weight", number(report.bits_per_weight), "over the quantized weights"),
        ("Bytes", _change(size(before), size(after)), f"{before / after:.2f} times smaller" if after else ""),
        ("Mean error", number(report.error), _worst(report.rows)),
        ("Time", duration(report.seconds), f"{len(report.rows)} sites"),
    ]
    for key in [*report.baseline, *(key for key in report.metrics if key not in report.baseline)]:
        shown += _metric_tiles(str(key), report.baseline.get(key), report.metrics.get(key))
    items = "".join(
        f'<li class="tile"><span class="name">{escape(name)}</span> '
        f'<span class="value">{escape(value)}</span> <span class="extra">{escape(extra)}</span></li>'
        for name, value, extra in shown
    )
    return f'<ul class="tiles">{items}</ul>'


def body(report: Report) -> str:
    """Return everything below the tiles: notes, plots, the table of sites, the recipe."""
    recipe = escape(json.dumps(report.to_dict()["recipe"], indent=2, ensure_ascii=False))
    return "\n".join(
        [
            _notes(report),
            _panels(report, "Error by layer", "relative error", lambda row: row.error),
            _bits_panels(report),
            _roles(report),
            _sites(report),
            f"<details><summary>The recipe of this run</summary><pre>{recipe}</pre></details>",
        ]
    )


def table(caption: str, head: Iterable[tuple[str, bool]], rows: Iterable[str]) -> str:
    """Return a table that scrolls sideways by itself; head is (name, text-aligned left), rows are HTML."""
    names = "".join(
        f'<th scope="col"{_left(left)}>{escape(name)}</th>' if name else "<td></td>" for name, left in head
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{names}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _metric_tiles(name: str, before: Any, after: Any) -> list[tuple[str, str, str]]:
    if isinstance(before, dict) or isinstance(after, dict):
        before, after = before or {}, after or {}
        return [
            tile for key in {**before, **after}
            for tile in _metric_tiles(f"{name}, {key}", before.get(key), after.get(key))
        ]  # fmt: skip
    label = name[:1].upper() + name[1:]
    if after is None:
        return [(label, number(before), "float model")]
    if before is None:
        return [(label, number(after), "quantized")]
    return [(label, f"{number(before)} → {number(after)}", "float → quantized")]


def _change(before: str, after: str) -> str:
    """Return "538 → 157 MB": the unit once where it is the same."""
    (figure, unit), unit_after = before.rsplit(" ", 1), after.rsplit(" ", 1)[1]
    return f"{figure if unit == unit_after else before} → {after}"


def _worst(rows: list[SiteReport]) -> str:
    known = [row for row in rows if math.isfinite(row.error)]
    if not known:
        return "not measured"
    worst = max(known, key=lambda row: row.error)
    where = worst.role if worst.layer is None else f"{worst.role}, layer {worst.layer}"
    return f"worst {number(worst.error)}: {where}"


def _notes(report: Report) -> str:
    items = "".join(
        f"<li><b>{escape(note)}</b><br>{len(paths)} site{'s' * (len(paths) > 1)}: "
        f"{escape(shortened(paths, 6))}</li>"
        for note, paths in report.notes().items()
    )
    return f'<h2>Notes</h2><ul class="notes">{items}</ul>' if items else ""


def _panels(
    report: Report, heading: str, what: str, value: Callable[[SiteReport], float], step: bool = False
) -> str:
    lines = {role: _line(rows, value) for role, rows in report.roles().items()}
    lines = {role: points for role, points in lines.items() if len(points) > 1}
    top = max((y for points in lines.values() for _, y, _ in points), default=0.0)
    if not top:
        return ""
    figures = "".join(
        f"<figure><h3>{escape(role)}</h3>{plots.panel(points, role, what, top, step=step)}</figure>"
        for role, points in lines.items()
    )
    lead = f"{what[0].upper()}{what[1:]} of each weight, the same scale in every panel"
    lead += "." if step else "; the ring marks the worst layer."
    return f'<h2>{escape(heading)}</h2><p class="lead">{escape(lead)}</p><div class="panels">{figures}</div>'


def _bits_panels(report: Report) -> str:
    def stored(row: SiteReport) -> float:
        return row.bits_per_weight

    mixed = any(
        len({round(row.bits_per_weight, 2) for row in rows if row.quantized}) > 1
        for rows in report.roles().values()
    )
    return _panels(report, "Bits by layer", "bits per weight", stored, step=True) if mixed else ""


def _line(rows: list[SiteReport], value: Callable[[SiteReport], float]) -> list[tuple[float, float, str]]:
    found = [
        (float(row.layer), value(row), f"{row.path}: {number(value(row))}")
        for row in rows
        if row.layer is not None and math.isfinite(value(row))
    ]
    return sorted(found, key=lambda point: point[0])


def _roles(report: Report) -> str:
    groups = report.roles()
    most = max((sum(row.bytes_before for row in rows) for rows in groups.values()), default=0)
    lines = []
    for role, rows in groups.items():
        before, after = (sum(getattr(row, name) for row in rows) for name in ("bytes_before", "bytes_after"))
        weights = sum(row.weights for row in rows)
        lines.append(
            f'<tr><th scope="row" class="left">{escape(role)}</th>'
            f"<td>{size(before)}</td><td>{size(after)}</td>"
            f'<td class="wide">{plots.bars(before, after, most)}</td>'
            f"<td>{number(8 * after / weights if weights else math.nan)}</td>"
            f"<td>{number(mean(row.error for row in rows))}</td><td>{len(rows)}</td></tr>"
        )
    head = [("Weight", True), ("Before", False), ("After", False), ("", False)]
    head += [("Bits", False), ("Mean error", False), ("Sites", False)]
    key = '<span class="key before"></span> before, <span class="key after"></span> after'
    return (
        f'<h2>Size by weight</h2><p class="lead">Bytes of the same weight summed over the layers: {key}.</p>'
        + table("Size by weight", head, lines)
    )


def _sites(report: Report) -> str:
    noted = any(row.note for row in report.rows)
    lines = [
        f'<tr><th scope="row" class="left">{escape(row.path)}</th><td class="left">{escape(row.kind)}</td>'
        f'<td>{" × ".join(map(str, row.shape))}</td><td class="left">{escape(row.format or "dense")}</td>'
        f"<td>{number(row.bits_per_weight)}</td><td>{size(row.bytes_before)}</td><td>{size(row.bytes_after)}</td>"
        f"<td>{number(row.error)}</td><td>{duration(row.seconds)}</td>"
        + (f'<td class="note">{escape(row.note)}</td>' if noted else "")
        + "</tr>"
        for row in report.rows
    ]
    head = [("Site", True), ("Kind", True), ("Shape", False), ("Format", True), ("Bits", False)]
    head += [("Before", False), ("After", False), ("Error", False), ("Time", False)]
    head += [("Note", True)] if noted else []
    return (
        '<h2>All sites</h2><p class="lead">Error is relative, in the measure that the solver lowers: '
        "‖X(W − Wq)‖ / ‖XW‖ on the calibration activations, or for k-means that of the weights, weighted by their "
        "importance.</p>" + table("All sites", head, lines)
    )


def _left(left: bool) -> str:
    return ' class="left"' if left else ""
