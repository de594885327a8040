"""Range searches against every candidate in float64 NumPy; the bounded sample and the extremes of a stream."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from range_oracle import CLOSE, error, grid_candidates, heavy, quantize

from jaxq.errors import JaxqError
from jaxq.formats.activations import AffineQuantizer
from jaxq.solvers import ranges
from jaxq.solvers.ranges import (
    ACTIVATION_PERCENTILES,
    OFFICIAL_ETAS,
    POWERS_OF_TWO,
    Extremes,
    Sample,
    affine,
    choose,
    minmax,
    mse_grid,
    percentile,
    shift_log,
)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


# Searches by an operand's own error


@given(seed=st.integers(0, 1000), bits=st.integers(1, 8), shift=st.sampled_from([-5.0, 0.0, 5.0]))
@settings(max_examples=10)
def test_minmax_covers_the_sample_whatever_its_signs(seed, bits, shift):
    x = np.random.default_rng(seed).uniform(shift - 1, shift + 1, size=(3, 20, 4)).astype(np.float32)
    x[..., 1] = shift
    for axes, grid in ((None, ()), ((0, 1), (4,)), ((0, 2), (20, 1)), ((1, 2), (3, 1, 1)), (-1, (3, 20, 1))):
        q = minmax(x, bits, axes)
        assert q.scale.shape == q.zero.shape == grid
        named = axes if axes is not None else (0, 1, 2)
        spread = x.astype(np.float64).max(named) - x.min(named)
        if axes != (0, 1):
            np.testing.assert_allclose(q.scale, (spread / (2**bits - 1)).reshape(grid), rtol=1e-5)
            assert (np.abs(q(x) - x) <= np.asarray(q.scale) / 2 * CLOSE + 1e-6).all()
    np.testing.assert_array_equal(minmax(x, bits, (0, 1))(x)[..., 1], x[..., 1])


@pytest.mark.parametrize("axes, grid", [(None, ()), ((0, 1), (6,)), ((0, 2), (30, 1))])
@pytest.mark.parametrize("percentiles", [ACTIVATION_PERCENTILES, (0.7, 0.95, 0.99, 1.0)])
def test_percentile_is_the_best_of_all(axes, grid, percentiles):
    x = heavy(0, 8, 30, 6)
    q = percentile(x, 3, axes, percentiles)
    assert q.scale.shape == grid
    named = axes if axes is not None else (0, 1, 2)
    exact = x.astype(np.float64)
    found = np.mean((quantize(x, q.scale, q.zero, 3) - x) ** 2, named)
    for p in percentiles:
        high, low = (np.quantile(exact, v, axis=named, keepdims=True) for v in (p, 1 - p))
        scale = (high - low) / 7
        others = np.mean((quantize(x, scale, np.round(-low / scale), 3) - exact) ** 2, named)
        assert (found <= others * CLOSE).all()
    fewer = percentile(x, 3, axes, percentiles[1:])
    assert (found <= np.mean((quantize(x, fewer.scale, fewer.zero, 3) - x) ** 2, named) * CLOSE).all()


@pytest.mark.parametrize("n", [1, 2, 3, 1000])
def test_quantiles_interpolate(n):
    x = heavy(1, 2, n)
    probabilities = (0.0, 0.01, 0.3, 0.5, 0.99999, 1.0)
    got = ranges.quantiles(jnp.asarray(x), probabilities)
    np.testing.assert_allclose(got, np.quantile(x.astype(np.float64), probabilities, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "bits, zeros, shift",
    [
        (1, range(2), 0.4),
        (3, range(8), 0.0),
        (4, range(16), 0.4),
        (6, range(24, 40), 0.0),
        (8, range(120, 136), 0.4),
    ],
)
def test_mse_grid_is_the_best_of_all(bits, zeros, shift):
    x = heavy(2, 200, 3, shift=shift)
    q = mse_grid(x, bits, 0)
    for channel in range(3):
        one = x[:, channel]
        found = error(one, quantize(one, q.scale[channel], q.zero[channel], bits))
        candidates = grid_candidates(one, bits, zeros, 128 // len(zeros))
        best = min(error(one, quantize(one, s, z, bits)) for s, z in candidates)
        assert best / CLOSE <= found <= best * CLOSE
        assert any(z == q.zero[channel] and abs(s / q.scale[channel] - 1) < 1e-5 for s, z in candidates)
    whole = mse_grid(x, bits)
    best = min(error(x, quantize(x, s, z, bits)) for s, z in grid_candidates(x, bits, zeros, 128 // len(zeros)))
    assert whole.scale.shape == () and error(x, whole(x)) <= best * CLOSE


def test_more_candidates_never_do_worse():
    x = heavy(3, 500)

    def found(count, zeros):
        return error(x, mse_grid(x, 3, count=count, zeros=zeros)(x))

    assert found(36, (2, 3, 4, 5)) <= found(18, (3, 4)) * CLOSE
    # 17 steps hold all of 9.
    assert found(34, (3, 4)) <= found(18, (3, 4)) * CLOSE
    assert found(34, (3, 4)) < found(18, (0, 7))


def test_mse_grid_of_samples_of_one_sign_and_of_constants():
    positive = np.random.default_rng(4).uniform(5, 6, 300).astype(np.float32)
    assert error(positive, mse_grid(positive, 4)(positive)) < 0.05
    relu = np.maximum(heavy(5, 500), 0)
    free, fixed = mse_grid(relu, 4), mse_grid(relu, 4, zeros=[0])
    assert free.zero == fixed.zero == 0
    assert error(relu, fixed(relu)) < error(relu, free(relu)) < 0.99 * error(relu, minmax(relu, 4)(relu))
    flat = mse_grid(np.zeros((5, 2), np.float32), 4, 0)
    np.testing.assert_array_equal(flat.scale, np.float32([1e-4, 1e-4]))
    np.testing.assert_array_equal(flat(np.zeros((5, 2), np.float32)), 0)


@pytest.mark.parametrize("root, official", [(1, False), (2, False), (2, True)])
def test_log_is_the_best_of_all(root, official):
    x = softmax(3 * np.random.default_rng(6).normal(size=(2, 3, 16, 16)))
    percentiles = (0.9, 0.99, 0.999)
    q = ranges.log(x, 3, root, percentiles, (0, 2, 3), official=official)
    assert q.scale.shape == (3, 1, 1) and (q.root, q.official) == (root, official)
    top = 7 + official
    exact = x.astype(np.float64)

    def errors(scale):
        codes = np.clip(np.round(-root * np.log2(exact / scale)), 0, top)
        return np.mean((np.where(codes == top, 0, scale * 2 ** (-codes / root)) - exact) ** 2, (0, 2, 3))

    found = errors(np.asarray(q.scale, np.float64))
    others = [errors(np.quantile(exact, p, axis=(0, 2, 3), keepdims=True)) for p in percentiles]
    np.testing.assert_allclose(found, np.min(others, axis=0), rtol=1e-5)


def shift_log_values(x, eta, bits):
    y = np.log2(np.asarray(x, np.float64) + eta)
    step = (y.max() - y.min()) / (2**bits - 1)
    return 2 ** np.round(np.round((y - y.min()) / step) * step + y.min()) - eta


@pytest.mark.parametrize("score", ["mse", "row_sum"])
@pytest.mark.parametrize("official", [False, True])
def test_shift_log_is_the_best_of_all(score, official):
    # A seed for which neither of the two terms of the row sum's score finds its best shift alone.
    x = softmax(3 * np.random.default_rng(44).normal(size=(3, 8, 100)))
    q = shift_log(x, 3, score=score, official=official)
    etas = OFFICIAL_ETAS if official else POWERS_OF_TWO
    errors = []
    for eta in etas:
        missed = shift_log_values(x, eta, 3) - x
        errors.append(np.mean((missed**2).sum(-1) + (score == "row_sum") * missed.sum(-1) ** 2))
    eta = etas[int(np.argmin(errors))]
    assert np.sort(errors)[1] > 1.001 * min(errors)
    assert q.eta == np.float32(eta) and q.official is official
    y = np.log2(x.astype(np.float64) + eta)
    np.testing.assert_allclose([q.low, q.high], [y.min(), y.max()], rtol=1e-5)
    if not official:
        np.testing.assert_array_equal(np.unique(q(x)), np.unique(shift_log_values(x, eta, 3)).astype(np.float32))


def test_the_row_sum_sees_the_bias_that_the_squared_error_does_not():
    """197-token rows, as in the I&S-ViT grid: a shift that is no power of two makes zeros negative."""
    x = softmax(4 * np.random.default_rng(8).normal(size=(32, 197)))
    off = {s: np.abs(shift_log(x, 3, OFFICIAL_ETAS, score=s)(x).sum(-1) - 1).mean() for s in ("mse", "row_sum")}
    assert off["row_sum"] < 0.5 * off["mse"]


def test_shift_log_takes_a_range_from_elsewhere():
    x = softmax(np.random.default_rng(9).normal(size=(8, 40)))
    q = shift_log(x, 4, [2.0**-10], low_high=(0.0, 0.9))
    np.testing.assert_allclose([q.low, q.high], np.log2([2.0**-10, 0.9 + 2.0**-10]), rtol=1e-6)
    assert q(jnp.float32(0)) == 0
    assert q(jnp.float32(0.9)) == 1 - 2.0**-10


# Searches by the error of a product


def test_choose_takes_one_for_all_or_one_for_each():
    candidates = AffineQuantizer(jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), jnp.zeros((3, 2)), 4)
    target = jnp.asarray([4.6, 2.1])
    one = choose(candidates, lambda q: jnp.sum((q.scale - target) ** 2))
    each = choose(candidates, lambda q: (q.scale - target) ** 2)
    np.testing.assert_array_equal(one.scale, [3, 4])
    np.testing.assert_array_equal(each.scale, [5, 2])
    np.testing.assert_array_equal(choose(candidates, lambda q: jnp.zeros(())).scale, [1, 2])


# What all have in common


@pytest.mark.parametrize(
    "search",
    [
        lambda x: minmax(x, 4, 0),
        lambda x: percentile(x, 4, 0, (0.9, 0.999)),
        lambda x: mse_grid(x, 2, 0, count=16),
        lambda x: ranges.log(jnp.abs(x), 4, 2),
        lambda x: shift_log(jnp.abs(x), 3, (0.01, 0.001)),
    ],
    ids=["minmax", "percentile", "mse_grid", "log", "shift_log"],
)
def test_under_vmap_and_jit_and_on_bfloat16(search):
    x = jnp.asarray(heavy(13, 2, 64, 3))
    stacked = jax.vmap(search)(x)
    for lane in (0, 1):
        for got, want in zip(jax.tree.leaves(stacked), jax.tree.leaves(jax.jit(search)(x[lane])), strict=True):
            np.testing.assert_allclose(got[lane], want, rtol=1e-6)
    half = x[0].astype(jnp.bfloat16)
    for got, want in zip(*map(jax.tree.leaves, (search(half), search(half.astype(jnp.float32)))), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, want)


def test_bad_input_is_named():
    x = heavy(14, 10, 4)
    bad = x.copy()
    bad[3, 2] = np.nan
    for call, words in [
        (lambda: minmax(bad, 4), "the sample of activations holds NaN or infinite values"),
        (lambda: percentile(x[:0], 4), r"a sample of shape \(0, 4\) is empty"),
        (lambda: mse_grid(x, 0), "has 1 to 16 bits, not 0"),
        (lambda: minmax(x, 17), "not 17"),
        (lambda: minmax(np.ones((3, 3), np.int32), 4), "floating point, not int32"),
        (lambda: minmax(x, 4, 2), r"a sample of shape \(10, 4\) has not all of the axes \(2,\)"),
        (lambda: percentile(x, 4, percentiles=(0.3,)), "above 0.5 and up to 1"),
        (lambda: mse_grid(x, 4, zeros=()), "needs a zero point"),
        (lambda: ranges.log(x, 4), "takes values from 0 up, and the sample holds negative ones"),
        (lambda: ranges.log(np.abs(x), 4, root=0), "positive whole number, not 0"),
        (lambda: shift_log(x, 4), "takes values from 0 up"),
        (lambda: shift_log(np.abs(x), 4, [0.0]), "positive numbers"),
        (lambda: shift_log(np.abs(x), 4, score="best"), "unknown score 'best'"),
        (lambda: Sample(0), "a positive number of rows, not 0"),
    ]:
        with pytest.raises(JaxqError, match=words):
            call()


# Streams

SITE = types.SimpleNamespace(in_size=3)


def rows_of(sample, state) -> set[float]:
    return {float(row[0]) for row in sample.finalize(state)}


def stream(n, start=0) -> np.ndarray:
    """Rows that know their number."""
    return np.repeat(np.arange(start, start + n, dtype=np.float32)[:, None], 3, 1)


@functools.partial(jax.jit, static_argnums=0)
def update(statistic, state, x, weights=None):
    return statistic.update(state, x, weights)


@functools.partial(jax.jit, static_argnums=0)
def merge(statistic, a, b):
    return statistic.merge(a, b)


def fold(statistic, batches, weights=None):
    state = statistic.init(SITE)
    for i, x in enumerate(batches):
        state = update(statistic, state, x, None if weights is None else weights[i])
    return state


@given(cuts=st.lists(st.sampled_from([0, 8, 16, 24, 32]), max_size=3), count=st.sampled_from([5, 40, 64]))
@settings(max_examples=8)
def test_sample_is_the_same_however_the_stream_is_cut(cuts, count):
    x, sample = stream(40), Sample(count)
    whole = fold(sample, [x])
    parts = fold(sample, [p for p in np.split(x, sorted(cuts)) if len(p)])
    assert rows_of(sample, parts) == rows_of(sample, whole)
    assert len(sample.finalize(parts)) == min(count, 40) and parts.seen == 40
    if count >= 40:
        assert rows_of(sample, whole) == set(range(40))


def test_sample_is_spread_evenly_and_out_of_step_with_any_period():
    sample = Sample(64)
    state = fold(sample, [stream(256, start).reshape(2, 128, 3) for start in range(0, 4096, 256)])
    kept = np.sort(np.asarray(sample.finalize(state))[:, 0])
    assert np.diff(kept).max() <= 3 * 4096 / 64 and kept[0] < 192 and kept[-1] > 4096 - 192
    # A stride of 64 would take the first token of each sequence of 64, and no other.
    for period in range(2, 257):
        assert len(np.unique(kept % period)) > min(period, 64) / 8


def test_sample_merges_associatively_and_leaves_out_tokens_of_no_weight():
    sample = Sample(6)
    a, b, c = (fold(sample, [stream(5, start)]) for start in (0, 100, 200))
    left, right = merge(sample, merge(sample, a, b), c), merge(sample, a, merge(sample, b, c))
    jax.tree.map(np.testing.assert_array_equal, left, right)
    empty = sample.init(SITE)
    jax.tree.map(np.testing.assert_array_equal, merge(sample, empty, left), left)
    jax.tree.map(np.testing.assert_array_equal, merge(sample, left, empty), left)
    assert rows_of(sample, merge(sample, a, fold(sample, [stream(1, 100)]))) == {0, 1, 2, 3, 4, 100}

    x = stream(8)
    x[[2, 5]] = np.nan
    weights = jnp.asarray([1, 1, 0, 1, 0.5, 0, 1, 0])
    state = fold(sample, [x.reshape(2, 4, 3)], [weights.reshape(2, 4)])
    assert rows_of(sample, state) == {0, 1, 3, 4, 6} and state.seen == 5
    assert np.isfinite(state.rows).all()
    jax.tree.map(np.testing.assert_array_equal, fold(sample, [x[[0, 1, 3, 4, 6]]]), state)


def test_samples_of_a_stack():
    sample = Sample(4)
    states = [fold(sample, [stream(n)]) for n in (6, 9)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    assert sample.finalize(stacked).shape == (2, 4, 3)
    jax.tree.map(np.testing.assert_array_equal, merge(sample, stacked, stacked),
                 jax.jit(jax.vmap(sample.merge))(stacked, stacked))  # fmt: skip
    short = jax.tree.map(lambda *leaves: jnp.stack(leaves), states[0], fold(sample, [stream(2)]))
    with pytest.raises(JaxqError, match="hold from 2 to 4 rows"):
        sample.finalize(short)


@pytest.mark.parametrize("shape", [(), (4,), (3, 1, 1), (3, 1, 4)])
def test_extremes_are_exact(shape):
    x = heavy(15, 5, 3, 6, 4)
    extremes = Extremes(shape)
    state = extremes.init()
    for batch in x[:3], x[3:4], x[4:]:
        state = extremes.merge(state, extremes.update(extremes.init(), batch))
    axes = {(): None, (4,): (0, 1, 2), (3, 1, 1): (0, 2, 3), (3, 1, 4): (0, 2)}[shape]
    low, high = extremes.finalize(state)
    np.testing.assert_array_equal(low, x.min(axes).reshape(shape))
    np.testing.assert_array_equal(high, x.max(axes).reshape(shape))
    jax.tree.map(np.testing.assert_array_equal, affine(low, high, 5), minmax(x, 5, axes))
    x[2, 1] = np.inf
    weights = np.ones(x.shape[:-1])
    weights[2, 1] = 0
    masked = extremes.update(extremes.init(), jnp.asarray(x), jnp.asarray(weights))
    x[2, 1] = x[0, 1]
    jax.tree.map(np.testing.assert_array_equal, masked, extremes.update(extremes.init(), jnp.asarray(x)))
    assert dataclasses.replace(extremes, shape=(4,)).init().low.shape == (4,)
