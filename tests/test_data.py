"""Windows and calibration samples, with a tokenizer that gives one token a character."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq import data
from jaxq.errors import JaxqError

TEXT = "".join(f"line {i}\n" for i in range(200))


class Characters:
    """One token a character; adds token 1 first if asked to, like a Gemma tokenizer, and 2 last."""

    def __init__(self, bos: bool = False, eos: bool = False):
        self.bos, self.eos = bos, eos
        self.bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict:
        first, last = self.bos and add_special_tokens, self.eos and add_special_tokens
        return {"input_ids": [1] * first + ids(text) + [2] * last}


def ids(text: str) -> list[int]:
    return [10 + ord(c) for c in text]


def test_split_starts_the_held_out_part_at_a_line():
    text = "aaaa\nbbbb\ncccc\ndddd\n"
    assert data.split(text, 0.6) == ("aaaa\nbbbb\ncc", "dddd\n")
    assert data.split(text, 0.5) == ("aaaa\nbbbb\n", "dddd\n")  # cut at a line end: the next line goes
    assert data.split("one line", 0.5) == ("one ", "")
    calibration, held = data.split(TEXT)
    assert len(calibration) == int(0.9 * len(TEXT)) and TEXT.endswith(held) and held.startswith("line ")


@given(seq_len=st.integers(2, 40), count=st.none() | st.integers(1, 9))
def test_windows_are_the_text_in_order(seq_len, count):
    found = data.windows(TEXT, Characters(), seq_len, count)
    assert found.dtype == np.int32
    assert len(found) == (len(TEXT) // seq_len if count is None else min(count, len(TEXT) // seq_len))
    assert found.ravel().tolist() == ids(TEXT)[: found.size]


@pytest.mark.parametrize("eos", [False, True])
def test_windows_begin_as_the_tokenizer_does(eos):
    found = data.windows(TEXT, Characters(bos=True, eos=eos), 8, 3)
    assert found.shape == (3, 8) and (found[:, 0] == 1).all()
    assert found[:, 1:].ravel().tolist() == ids(TEXT)[:21]
    assert (data.windows(TEXT, Characters(bos=True), 8, bos=False) == data.windows(TEXT, Characters(), 8)).all()
    assert (data.windows(TEXT, Characters(), 8, bos=True)[:3] == found).all()


@given(samples=st.integers(1, 12), seq_len=st.integers(2, 60), seed=st.integers(0, 99), bos=st.booleans())
def test_calibration_samples_are_windows_of_the_text_without_overlap(samples, seq_len, seed, bos):
    # Each token is its own position, so that a sample tells where it was taken.
    text = "".join(chr(1000 + i) for i in range(900))
    found = data.calibration(text, Characters(bos=bos), samples, seq_len, seed)
    assert found.shape == (samples, seq_len) and found.dtype == np.int32
    body = found[:, bos:]
    assert not bos or (found[:, 0] == 1).all()
    assert (np.diff(body.ravel()) >= 1).all() and (np.diff(body, axis=1) == 1).all()
    assert (found == data.calibration(text, Characters(bos=bos), samples, seq_len, seed)).all()


def test_calibration_depends_on_the_seed_and_reaches_everywhere():
    text = "".join(chr(1000 + i) for i in range(40))
    starts = {tuple(data.calibration(text, Characters(), 2, 10, seed)[:, 0] - 1010) for seed in range(300)}
    assert len(starts) > 100
    assert min(a for a, _ in starts) == 0 and max(b for _, b in starts) == 30
    exact = data.calibration(text, Characters(), 4, 10)
    assert exact.ravel().tolist() == ids(text)


def test_long_texts_are_encoded_in_pieces_of_lines(monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 50)
    pieces = data._pieces(TEXT)
    assert "".join(pieces) == TEXT and len(pieces) > 20
    assert all(piece.endswith("\n") and 50 <= len(piece) for piece in pieces[:-1])
    whole = data.calibration(TEXT, Characters(), 200, 8)
    monkeypatch.setattr(data, "_CHUNK", 1 << 20)
    assert (whole == data.calibration(TEXT, Characters(), 200, 8)).all()


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_text(text):
    for call in (data.windows, data.calibration):
        with pytest.raises(JaxqError, match="empty"):
            call(text, Characters())


def test_text_that_is_too_short():
    message = "text gives 37 tokens, one window needs 512: give a longer file or a smaller --seq-len"
    for call in (data.windows, data.calibration):
        with pytest.raises(JaxqError) as caught:
            call("x" * 37, Characters())
        assert str(caught.value) == message
    with pytest.raises(JaxqError, match="text gives 37 tokens, 4 samples of 10 need 40: .* or --samples 3"):
        data.calibration("x" * 37, Characters(), 4, 10)


def test_senseless_numbers():
    with pytest.raises(JaxqError, match="at least 2 tokens"):
        data.windows(TEXT, Characters(), 1)
    with pytest.raises(JaxqError, match="--windows, got 0"):
        data.windows(TEXT, Characters(), 8, 0)
    with pytest.raises(JaxqError, match="--samples, got -1"):
        data.calibration(TEXT, Characters(), -1)
    tokenizer = Characters()
    tokenizer.bos_token_id = None
    with pytest.raises(JaxqError, match="no begin-of-text"):
        data.windows(TEXT, tokenizer, 8, bos=True)
    assert data.windows(TEXT, tokenizer, 8)[0, 0] == 10 + ord("l")


def test_read_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("é\n", encoding="utf-8")
    assert data.read_text(path) == "é\n"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(JaxqError, match="not UTF-8 text"):
        data.read_text(path)
    path.write_text(" \n")
    with pytest.raises(JaxqError, match="is empty"):
        data.read_text(path)
    with pytest.raises(JaxqError, match="cannot read"):
        data.read_text(tmp_path / "absent")
    with pytest.raises(JaxqError, match="cannot read"):
        data.read_text(tmp_path)
