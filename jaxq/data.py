"""Text to batches of token ids: windows for perplexity, samples for calibration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxq.corpora import corpus as corpus
from jaxq.errors import JaxqError

_CHUNK = 1 << 16  # characters encoded at a time for calibration


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file. Raises `JaxqError` for a file that is missing, empty or not text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise JaxqError(f"{path} is not UTF-8 text (byte {error.start}): give a plain text file") from error
    except OSError as error:
        raise JaxqError(f"cannot read {path}: {error.strerror or error}") from error
    if not text.strip():
        raise JaxqError(f"{path} is empty: give a file with some text")
    return text


def split(text: str, fraction: float = 0.9) -> tuple[str, str]:
    """(calibration, held out): the first `fraction` of the characters; the rest from its first line start."""
    at = int(len(text) * fraction)
    line = text.find("\n", at) + 1
    return text[:at], text[line:] if line else ""


def encode(text: str, tokenizer: Any) -> Int[np.ndarray, " n"]:
    """Token ids of a text, without special tokens."""
    if not text.strip():
        raise JaxqError("the text is empty: give a file with some text")
    # A whole file is longer than any model's context, which is no reason to warn.
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def windows(
    text: str, tokenizer: Any, seq_len: int = 512, count: int | None = None, bos: bool | None = None
) -> Int[np.ndarray, "n seq_len"]:
    """The first `count` windows (all if None, fewer if the text ends) of a text, without overlap.

    bos: start each window with the begin-of-text token, which then takes one of its `seq_len` places; None
    does what the tokenizer does with plain text. Raises `JaxqError` for a text shorter than one window.
    """
    _check(seq_len, count, "windows")
    begin = _begin(tokenizer, bos)
    ids = encode(text, tokenizer)
    body = seq_len - len(begin)
    number = len(ids) // body
    if number == 0:
        raise JaxqError(_short(len(ids), body))
    number = number if count is None else min(number, count)
    return _with_begin(ids[: number * body].reshape(number, body), begin)


def calibration(
    text: str, tokenizer: Any, samples: int = 32, seq_len: int = 512, seed: int = 0, bos: bool | None = None
) -> Int[np.ndarray, "samples seq_len"]:
    """`samples` windows from random places of a text, no two of which overlap, in the order of the text.

    Deterministic in `seed`. The text is encoded in pieces of some 64 thousand characters, cut at line ends.
    Raises `JaxqError` for a text that is too short to give so many.
    """
    _check(seq_len, samples, "samples")
    begin = _begin(tokenizer, bos)
    ids = np.concatenate([encode(piece, tokenizer) for piece in _pieces(text)] or [encode(text, tokenizer)])
    body = seq_len - len(begin)
    spare = len(ids) - samples * body
    if len(ids) < body:
        raise JaxqError(_short(len(ids), body))
    if spare < 0:
        raise JaxqError(
            f"text gives {len(ids)} tokens, {samples} samples of {body} need {samples * body}: "
            f"give a longer file, a smaller --seq-len or --samples {len(ids) // body}"
        )
    # Sorted offsets into the text with the windows taken out: every way to place them is equally likely.
    offsets = np.sort(np.random.default_rng(seed).integers(0, spare + 1, samples)) + body * np.arange(samples)
    return _with_begin(ids[offsets[:, None] + np.arange(body)], begin)


def _pieces(text: str) -> list[str]:
    """The text cut at line ends into pieces of at least _CHUNK characters (the last may be shorter)."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + _CHUNK) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return [piece for piece in pieces if piece.strip()]


def _begin(tokenizer: Any, bos: bool | None) -> list[int]:
    """The ids that start every window: [] or [bos]."""
    if bos is None:
        # The empty text encodes to what the tokenizer adds; an end token is not part of a window.
        bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    if bos and tokenizer.bos_token_id is None:
        raise JaxqError("bos=True, but this tokenizer has no begin-of-text token")
    return [tokenizer.bos_token_id] if bos else []


def _with_begin(body: Int[np.ndarray, "n body"], begin: list[int]) -> Int[np.ndarray, "n seq_len"]:
    start = np.broadcast_to(np.asarray(begin, np.int32), (len(body), len(begin)))
    return np.concatenate([start, body], axis=1).astype(np.int32)


def _check(seq_len: int, count: int | None, what: str) -> None:
    if seq_len < 2:
        raise JaxqError(f"a window needs at least 2 tokens, got --seq-len {seq_len}")
    if count is not None and count < 1:
        raise JaxqError(f"at least 1 is needed for --{what}, got {count}")


def _short(found: int, needed: int) -> str:
    return f"text gives {found} tokens, one window needs {needed}: give a longer file or a smaller --seq-len"
