"""The records of a quantization run: one SiteReport a site, one Report a run, both plain JSON-able data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from jaxq.errors import JaxqError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class SiteReport:
    """One parameter leaf of a run.

    Attributes:
      path: where the leaf is, such as "layers/0/mlp/up/kernel".
      kind: how it meets data: "matmul", "conv", "embedding", "grouped".
      shape: its logical shape.
      format: how it is stored now, such as "uniform 4-bit g64"; "dense" or "" when it was left alone.
      bits_per_weight: bits per logical weight with every scale, zero point and codebook counted.
      bytes_before, bytes_after: exact bytes of the leaf.
      error: relative error in the measure that the solver minimises: of the layer's output on the calibration
        activations, ||X (W - Wq)|| / ||X W||, or of the weights weighted by their importance; nan if unknown.
      seconds: wall time spent on this site.
      note: why the site runs dense or fell back; "" when all is well.
    """

    path: str
    kind: str = "matmul"
    shape: tuple[int, ...] = ()
    format: str = ""
    bits_per_weight: float = math.nan
    bytes_before: int = 0
    bytes_after: int = 0
    error: float = math.nan
    seconds: float = 0.0
    note: str = ""

    @property
    def quantized(self) -> bool:
        """Whether the leaf is stored in a quantized format."""
        return self.format not in ("", "dense")

    @property
    def weights(self) -> int:
        """The number of logical weights."""
        return math.prod(self.shape)

    @property
    def role(self) -> str:
        """The path without its numbers, so that the same weight of every layer shares one role."""
        parts = [part for part in self.path.split("/") if not part.isdigit()]
        if len(parts) > 1 and parts[-1] in ("kernel", "embedding", "weight"):
            parts = parts[:-1]
        if len(parts) > 1 and parts[0] in ("layers", "blocks", "h") and self.layer is not None:
            parts = parts[1:]
        return "/".join(parts) or self.path

    @property
    def layer(self) -> int | None:
        """The first number in the path, None when there is none."""
        return next((int(part) for part in self.path.split("/") if part.isdigit()), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data; nan and infinity become null."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteReport:
        """Read what to_dict wrote. JaxqError for data of another form."""
        return cls(**_restored(cls, data, floats=("bits_per_weight", "error", "seconds"), tuples=("shape",)))


@dataclass(frozen=True)
class Report:
    """One run.

    Attributes:
      recipe: the recipe as a dict ("name" and "rules").
      rows: one SiteReport a parameter leaf that a rule looked at, in model order.
      baseline: figures of the float model, name -> value, such as {"perplexity essays": 31.6}.
      seconds: wall time of the whole run.
      metrics: the same figures for the quantized model.
      other_bytes: bytes of the leaves that have no row (norms, biases); counted before and after alike.
      drift: after each stage, the relative distance of the calibration activations from those of the float
        model; empty for a run without data.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    rows: list[SiteReport] = field(default_factory=list)
    baseline: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    other_bytes: int = 0
    drift: list[float] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows) + self.other_bytes

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows) + self.other_bytes

    @property
    def bits_per_weight(self) -> float:
        """Mean bits over the weights that were quantized; nan when none was."""
        rows = [row for row in self.rows if row.quantized]
        weights = sum(row.weights for row in rows)
        return 8 * sum(row.bytes_after for row in rows) / weights if weights else math.nan

    @property
    def error(self) -> float:
        """Mean relative error over the sites where it is known; nan when it is known nowhere."""
        return mean(row.error for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data; nan and infinity become null."""
        data = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "rows"}
        return data | {"rows": [row.to_dict() for row in self.rows]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Read what to_dict wrote. JaxqError for data of another form."""
        known = _restored(cls, data, floats=("seconds",))
        known["rows"] = [SiteReport.from_dict(row) for row in known.get("rows", [])]
        return cls(**known)

    def table(self, console: Console, *, full: bool = False) -> None:
        """Print the run: one line a role (the same weight of all layers), or with full one line a site."""
        console.print(_sites_table(self) if full else _roles_table(self))
        for note, paths in self.notes().items():
            console.print(f"note: {len(paths)} site(s) {note}: {shortened(paths)}", markup=False, style="yellow")

    def notes(self) -> dict[str, list[str]]:
        """Return each note with the paths that carry it."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.note:
                found.setdefault(row.note, []).append(row.path)
        return found

    def roles(self) -> dict[str, list[SiteReport]]:
        """Return the rows grouped by role, in model order."""
        found: dict[str, list[SiteReport]] = {}
        for row in self.rows:
            found.setdefault(row.role, []).append(row)
        return found

    def html(self, title: str | None = None) -> str:
        """Return one self-contained HTML page: tiles, plots, notes and a table of all sites."""
        from jaxq.report.page import report_html

        return report_html(self, title)


def mean(values: Iterable[float]) -> float:
    """Return the mean of the finite values; nan when there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def number(value: Any, digits: int = 3) -> str:
    """Return a figure for people: "0.200", "12.35", "15,234"; "-" for nan and None."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}" if 0 < abs(value) < 1 else f"{value:.2f}"


def size(count: float) -> str:
    """Return a number of bytes in decimal units: "98.4 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{f'{count:#.3g}'.rstrip('.')} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def duration(seconds: float) -> str:
    """Return a time: "41 ms", "12.3 s", "4 min 05 s", "2 h 03 min"."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def shortened(paths: list[str], most: int = 3) -> str:
    """Return the first paths and how many more there are."""
    more = len(paths) - most
    return ", ".join(paths[:most]) + (f" and {more} more" if more > 0 else "")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise JaxqError(f"a report holds plain data, not {type(value).__name__}")


def _restored(cls: type, data: Any, floats: tuple[str, ...] = (), tuples: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise JaxqError(f"a {cls.__name__} must be an object, not {type(data).__name__}: the file is damaged")
    known = {f.name: data[f.name] for f in fields(cls) if f.name in data}  # pyright: ignore[reportArgumentType]
    for name in floats:
        if name in known:
            known[name] = math.nan if known[name] is None else float(known[name])
    return known | {name: tuple(known[name]) for name in tuples if name in known}


def _roles_table(report: Report) -> Table:
    from rich.table import Table

    title = f"{report.recipe.get('name', 'recipe')}: {len(report.rows)} sites in {duration(report.seconds)}"
    table = Table(title=_escaped(title), title_justify="left")
    table.add_column("weight")
    table.add_column("format")
    for name in ("sites", "bits", "before", "after", "mean error", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    for role, rows in report.roles().items():
        known = [row.error for row in rows if math.isfinite(row.error)]
        weights = sum(row.weights for row in rows)
        after = sum(row.bytes_after for row in rows)
        formats = sorted({row.format or "dense" for row in rows})
        table.add_row(
            _escaped(role), _escaped(", ".join(formats)), str(len(rows)),
            number(8 * after / weights if weights else math.nan),
            size(sum(row.bytes_before for row in rows)), size(after),
            number(mean(known)), number(max(known, default=math.nan)),
        )  # fmt: skip
    table.add_section()
    table.add_row(
        "total", "", str(len(report.rows)), number(report.bits_per_weight), size(report.bytes_before),
        size(report.bytes_after), number(report.error), "", style="bold",
    )  # fmt: skip
    return table


def _sites_table(report: Report) -> Table:
    from rich.table import Table

    table = Table()
    for name in ("site", "kind", "shape", "format"):
        table.add_column(name)
    for name in ("bits", "before", "after", "error", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            _escaped(row.path), row.kind, " x ".join(map(str, row.shape)), _escaped(row.format or "dense"),
            number(row.bits_per_weight), size(row.bytes_before), size(row.bytes_after), number(row.error),
            duration(row.seconds),
        )  # fmt: skip
    return table


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
