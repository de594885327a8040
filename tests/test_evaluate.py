"""Perplexity against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import evaluate
from jaxq.errors import JaxqError
from jaxq.evaluate import perplexity, token_nll

VOCAB = 11
PARAMS = {"table": np.random.default_rng(0).normal(0, 3, (VOCAB, VOCAB)).astype(np.float32)}
WINDOWS = np.random.default_rng(1).integers(0, VOCAB, (5, 7)).astype(np.int32)


def bigram(params, tokens):
    return params["table"][tokens]


def expected(windows: np.ndarray = WINDOWS) -> float:
    logits = PARAMS["table"].astype(np.float64)[windows[:, :-1]]
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
    return float(np.exp(nll.mean()))


@pytest.mark.parametrize("batch", [None, 1, 2, 5, 100])
def test_perplexity_equals_numpy_whatever_the_batch(batch):
    found = perplexity(bigram, PARAMS, WINDOWS, batch=batch)
    assert found["tokens"] == 5 * 6 and isinstance(found["perplexity"], float)
    assert found["perplexity"] == pytest.approx(expected(), rel=1e-6)


def test_uniform_logits_give_the_size_of_the_vocabulary():
    found = perplexity(lambda params, tokens: jnp.zeros((*tokens.shape, VOCAB)), {}, WINDOWS)
    assert found["perplexity"] == pytest.approx(VOCAB, rel=1e-6)


def test_bfloat16_logits_are_scored_in_float32():
    half = {"table": PARAMS["table"].astype(jnp.bfloat16)}
    nll = token_nll(bigram(half, jnp.asarray(WINDOWS)), jnp.asarray(WINDOWS))
    assert nll.dtype == jnp.float32 and nll.shape == (5, 6)
    wide = token_nll(half["table"].astype(np.float32)[WINDOWS], jnp.asarray(WINDOWS))
    np.testing.assert_array_equal(nll, wide)


def test_huge_logits_do_not_overflow():
    found = perplexity(bigram, {"table": PARAMS["table"] + 1e4}, WINDOWS)
    assert found["perplexity"] == pytest.approx(expected(), rel=1e-2)  # float32 has steps of 1e-3 there


def test_compiled_once_for_all_batches_and_calls():
    traces = []

    def apply(params, tokens):
        traces.append(tokens.shape)
        return params["table"][tokens]

    for _ in range(2):
        perplexity(apply, PARAMS, WINDOWS, batch=2)
    # The other trace finds the vocabulary's size, which compiles nothing.
    assert len(traces) == 2
    assert traces.count((2, 7)) == 1 and set(traces) == {(1, 7), (2, 7)}


def test_progress():
    seen = []
    perplexity(bigram, PARAMS, WINDOWS, batch=2, progress=lambda *event: seen.append(event))
    assert [event[:2] for event in seen] == [(2, 5), (4, 5), (5, 5)]
    assert seen[0][2] == pytest.approx(expected(WINDOWS[:2]), rel=1e-6)


def test_batch_keeps_logits_within_bounds(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "_LOGITS", 4 * VOCAB * 7 * 2)
    perplexity(bigram, PARAMS, WINDOWS, progress=lambda done, *_: seen.append(done))
    assert seen == [2, 4, 5]


def test_lazy_parameters():
    from jaxq.models import Lazy

    table = Lazy((VOCAB, VOCAB), np.dtype(np.float32), lambda: PARAMS["table"])
    assert perplexity(bigram, {"table": table}, WINDOWS)["perplexity"] == pytest.approx(expected(), rel=1e-6)


def test_other_windows_are_refused():
    for windows in (WINDOWS[:0], WINDOWS[:, :1], WINDOWS[0]):
        with pytest.raises(JaxqError, match="windows of at least 2 tokens"):
            perplexity(bigram, PARAMS, windows)
    with pytest.raises(JaxqError, match="from 0 to 11, the model has 11: use the model's own tokenizer"):
        perplexity(bigram, PARAMS, WINDOWS + (WINDOWS == WINDOWS.max()))
    with pytest.raises(JaxqError, match="at least 1 window"):
        perplexity(bigram, PARAMS, WINDOWS, batch=0)


def test_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.clear_caches()
        assert perplexity(bigram, PARAMS, WINDOWS)["perplexity"] == pytest.approx(expected(), rel=1e-6)
