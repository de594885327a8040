"""Reports: data round trip, figures, terminal tables; pages that are well-formed, escaped, self-contained."""

from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jaxq.errors import JaxqError
from jaxq.report import Report, SiteReport, comparison_html
from jaxq.report.plots import log_ticks, span_ticks
from jaxq.report.records import duration, number, size

ROLES = {"attention/query": (64, 64), "mlp/down": (128, 64)}
EVIL = "<script>alert('x')</script> & \"quotes\""


def example(layers: int = 4, note: str = "", bits: tuple[int, ...] = (3,)) -> Report:
    rows = []
    for layer in range(layers):
        for role, shape in ROLES.items():
            width = bits[layer % len(bits)]
            weights = math.prod(shape)
            rows.append(
                SiteReport(
                    path=f"layers/{layer}/{role}/kernel",
                    shape=shape,
                    format=f"uniform {width}-bit g64",
                    bits_per_weight=width + 0.25,
                    bytes_before=4 * weights,
                    bytes_after=int(weights * (width + 0.25) / 8),
                    error=0.1 * (layer + 1),
                    seconds=0.5,
                    note=note if layer == 0 else "",
                )
            )
    embedding = SiteReport("embed/embedding", "embedding", (100, 64), "dense", 32.0, 25600, 25600)
    recipe = {"name": "gptq", "rules": [{"pattern": "layers/**/kernel"}]}
    return Report(recipe, [*rows, embedding], {"perplexity": {"essays": 31.6}}, 83.0, {}, 512)


class Page(HTMLParser):
    """Collects tags and fails on a tag that is closed out of order."""

    VOID = {"meta", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def test_report_survives_json():
    report = example(note="fell back")
    again = Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert again.to_dict() == report.to_dict()
    assert again.rows[0].shape == (64, 64)


@given(
    error=st.one_of(st.floats(0, 10), st.just(math.nan)),
    path=st.text(max_size=20),
    seconds=st.floats(0, 1e6),
    shape=st.lists(st.integers(1, 9), max_size=4),
)
def test_site_report_survives_json(error, path, seconds, shape):
    row = SiteReport(path, shape=tuple(shape), error=error, seconds=seconds)
    data = json.loads(json.dumps(row.to_dict(), allow_nan=False))
    again = SiteReport.from_dict(data)
    assert again.to_dict() == row.to_dict()
    assert math.isnan(again.error) == math.isnan(error)


def test_nan_and_numpy_values_become_json():
    row = SiteReport("a", error=np.float32(0.5), bits_per_weight=np.float64(np.inf), bytes_after=np.int64(7))
    assert row.to_dict()["error"] == 0.5
    assert row.to_dict()["bits_per_weight"] is None
    assert json.dumps(row.to_dict(), allow_nan=False)
    assert math.isnan(SiteReport.from_dict(row.to_dict()).bits_per_weight)


def test_a_report_refuses_data_that_is_not_plain():
    with pytest.raises(JaxqError, match="plain data"):
        Report(recipe={"name": object()}).to_dict()
    with pytest.raises(JaxqError, match="damaged"):
        Report.from_dict({"rows": ["x"]})


def test_unknown_fields_of_a_later_version_are_ignored():
    assert SiteReport.from_dict({"path": "a", "later": 1}).to_dict() == SiteReport("a").to_dict()


def test_totals():
    report = example(layers=2)
    weights = 2 * (64 * 64 + 128 * 64)
    assert report.bytes_before == 4 * weights + 25600 + 512
    assert report.bytes_after == sum(row.bytes_after for row in report.rows) + 512
    assert report.bits_per_weight == pytest.approx(3.25)
    assert report.error == pytest.approx(0.15)
    assert math.isnan(Report().bits_per_weight)
    assert math.isnan(Report().error)


def test_roles_join_layers():
    assert list(example().roles()) == ["attention/query", "mlp/down", "embed"]
    assert SiteReport("layers/12/mlp/up/kernel").layer == 12
    assert SiteReport("head/kernel").layer is None
    assert SiteReport("kernel").role == "kernel"
    assert SiteReport("0").role == "0"


def test_tables_name_roles_sites_and_notes():
    def printed(full: bool) -> str:
        out = io.StringIO()
        example(note="needs [damping]").table(Console(file=out, width=200), full=full)
        return out.getvalue()

    assert "attention/query" in printed(False)
    assert "needs [damping]" in printed(False)
    assert "layers/3/mlp/down/kernel" in printed(True)
    assert "layers/3/mlp/down/kernel" not in printed(False)


@pytest.mark.parametrize(
    "report",
    [
        example(),
        example(note=EVIL),
        example(layers=1),
        example(bits=(2, 3)),
        Report(),
        Report(rows=[SiteReport("w")]),
    ],
    ids=["plain", "noted", "one layer", "mixed bits", "empty", "bare row"],
)
def test_page_is_well_formed_and_self_contained(report):
    text = report.html()
    page = Page(text)
    assert text.startswith("<!doctype html>")
    tags = [tag for tag, _ in page.seen]
    assert "script" not in tags and "link" not in tags and "img" not in tags
    assert not re.search(r"(src|href)=|url\(|@import", text)
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        ElementTree.fromstring(svg)


def test_page_escapes_every_text():
    report = example(note=EVIL)
    rows = [SiteReport(EVIL, EVIL, (1,), EVIL, note=EVIL), *report.rows]
    text = Report({"name": EVIL}, rows, {EVIL: EVIL}, 1.0, {EVIL: EVIL}).html(EVIL)
    assert "<script" not in text
    assert EVIL in Page(text).text


def test_page_is_accessible():
    page = Page(example().html())
    attributes = [found for tag, found in page.seen if tag == "svg"]
    assert all(found.get("aria-hidden") == "true" or found.get("aria-label") for found in attributes)
    assert ("html", {"lang": "en"}) in page.seen
    assert sum(tag == "table" for tag, _ in page.seen) == sum(tag == "caption" for tag, _ in page.seen)


def test_page_shows_bits_by_layer_only_when_they_differ():
    assert "Bits by layer" not in example().html()
    assert "Bits by layer" in example(bits=(2, 3)).html()


def test_page_shows_metrics_of_both_models():
    report = example()
    both = Report(**{**vars(report), "metrics": {"perplexity": {"essays": 33.25}}})
    assert "31.60 → 33.25" in Page(both.html()).text


ROWS = [
    {
        "recipe": "float32",
        "bits": 32,
        "bits_per_weight": 32.0,
        "bytes": 100,
        "perplexity": {"t": 10.0},
        "seconds": 0,
    },
    *(
        {
            "recipe": name,
            "bits": bits,
            "bits_per_weight": bits + 0.3,
            "bytes": 10 * bits,
            "perplexity": {"t": value},
            "seconds": 9.0,
        }
        for name, bits, value in (
            ("rtn", 4, 12.0),
            ("gptq", 4, 11.0),
            ("rtn", 2, 9000.0),
            ("gptq", 2, 200.0),
        )
    ),
]


def test_comparison_marks_the_better_row_and_draws_both_methods():
    text = comparison_html(ROWS, EVIL, [EVIL], {EVIL: example()})
    page = Page(text)
    assert "<script" not in text
    assert "<b>11.00</b>" in text and "<b>200.00</b>" in text and "<b>12.00</b>" not in text
    assert "log scale" in text and "float 10.00" in text
    assert {"s0", "s1"} <= {found.get("class") for tag, found in page.seen if tag == "g"}
    assert page.text.count("All sites") == 2


@pytest.mark.parametrize(
    "rows",
    [[], ROWS[:1], ROWS[1:2], [{"recipe": "rtn", "bits": 4}], [{**ROWS[1], "perplexity": {"t": None}}]],
    ids=["none", "float only", "one row", "bare row", "failed metric"],
)
def test_comparison_of_few_rows(rows):
    text = comparison_html(rows)
    Page(text)
    assert "nan" not in text and "inf" not in Page(text).text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.2, "0.200"), (12.345, "12.35"), (15234.1, "15,234"), (2e7, "2.00e+07"), (3e-5, "3.00e-05"),
     (0.0, "0.00"), (None, "-"), (math.nan, "-"), (4, "4"), ("x", "x")],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (98362432, "98.4 MB"), (538060032, "538 MB"),
     (999_900, "1.00 MB"), (2.5e12, "2.50 TB")],
)  # fmt: skip
def test_size(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0414, "41 ms"), (12.34, "12.3 s"), (245, "4 min 05 s"), (7380, "2 h 03 min"), (math.nan, "-")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@given(low=st.floats(1e-6, 1e6), factor=st.floats(1.0001, 1e6))
def test_ticks_lie_inside_and_are_few(low, factor):
    high = low * factor
    for ticks in (span_ticks(low, high), log_ticks(low, high)):
        assert all(low * (1 - 1e-6) <= tick <= high * (1 + 1e-6) for tick in ticks)
        assert len(ticks) <= 12
        assert ticks == sorted(set(ticks))
