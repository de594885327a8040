"""Extraction of the texts, on toy inputs; the real files are checked by sha256 whenever they are built."""

import bz2
import gzip
import lzma
import zlib

import pytest

from jaxq import assets, corpora
from jaxq.corpora import corpus, tidy
from jaxq.errors import JaxqError


def test_tidy_folds_collapses_and_drops():
    first = "\u201cYes\u201d \u2013 he\u2019s\n  in\u2026"
    paragraphs = [first, "one two", "x\u00a0y \u2014 z\u200b", "x y \u2014 z"]
    assert tidy(paragraphs, 3) == '"Yes" - he\'s in...\nx y -- z\n'


def test_blocks():
    assert list(corpora.blocks(["", "a", "b", " ", "c", "", ""])) == ["a b", "c"]


def test_every_compression_of_an_r_database():
    data = b"some serialized value" * 9
    raw = lzma.compress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    for record in (zlib.compress(data), b"2" + bz2.compress(data), b"Z" + raw):
        assert corpora.r_decompress(len(data).to_bytes(4, "big") + record) == data


def test_essays(tmp_path):
    folder = tmp_path / "usr/share/doc/anarchism/markdown"
    folder.mkdir(parents=True)
    text = "# Title\n\n> *quoted* text\n> of [two](x.html) <b>lines</b>\\.\n\n- item\n\nplain_ `code`\n"
    (folder / "secA.md.gz").write_bytes(gzip.compress(text.encode()))
    assert list(corpora.essays(tmp_path)) == ["quoted text\nof two lines.", "plain code\n"]


def test_manuals(tmp_path):
    folder = tmp_path / "usr/share/debian-reference"
    folder.mkdir(parents=True)
    (folder / "a.html").write_text(
        "<html><style>p {}</style><p>one &amp; <b>two</b></p><div class='nav'>no</div>"
        "<div class='x para'>three <div>four</div> five<table><tr><p>hidden</p></tr></table></div>"
        "<table><p>no</p></table><p>six<pre>code</pre></p>"
    )
    assert list(corpora.manuals(tmp_path)) == ["one & two", "three four five", "six"]


def test_unknown_corpus():
    with pytest.raises(JaxqError, match="no corpus 'x': choose one of austen, essays, handbook"):
        corpus("x")


@pytest.mark.parametrize("name", ["essays"])
def test_real_corpus(name, tmp_path, monkeypatch):
    try:
        path = corpus(name, tmp_path)
    except assets.Unavailable as reason:
        pytest.skip(str(reason))
    assert assets.sha256(path) == corpora.NAMES[name].sha256
    monkeypatch.setattr(corpora, "unpack", lambda *_: pytest.fail("fetched again"))
    assert corpus(name, tmp_path) == path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["austen", "handbook"])
def test_other_real_corpora(name, tmp_path):
    try:
        assert assets.sha256(corpus(name, tmp_path)) == corpora.NAMES[name].sha256
    except assets.Unavailable as reason:
        pytest.skip(str(reason))
