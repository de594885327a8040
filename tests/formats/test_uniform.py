"""The uniform grid: what a code means, to the last bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.errors import JaxqError
from jaxq.formats import Uniform, from_dict
from jaxq.formats.groups import split_groups
from jaxq.formats.uniform import (
    dequantize_codes,
    fit_minmax,
    fit_mse,
    quantize_codes,
    round_up,
)
from jaxq.solvers.rtn import rtn

GRIDS = [
    Uniform(1, None),
    Uniform(1, 8, symmetric=True),
    Uniform(2, 7),
    Uniform(3, "tensor", scale_dtype="bfloat16"),
    Uniform(4, 8, scale_dtype="bfloat16"),
    Uniform(5, 7, symmetric=True, scale_dtype="float32"),
    Uniform(8, None, scale_dtype="float16"),
    Uniform(8, 7, symmetric=True, scale_dtype="bfloat16"),
]
SIGNS = [(-1, 1), (5, 6), (-6, -5), (0, 1)]


def weights(seed: int, shape=(24, 5), low=-1.0, high=1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(low, high, shape).astype(np.float32) * rng.lognormal(sigma=2, size=shape[-1:]).astype("f4")


@pytest.mark.parametrize("format", GRIDS, ids=str)
def test_error_is_at_most_half_a_step(format):
    size = {None: 24, "tensor": 24}.get(format.group_size, format.group_size)
    for low, high in SIGNS:
        w = weights(format.bits, low=low, high=high)
        q = rtn(w, format)
        step = np.repeat(np.asarray(q.scale, np.float64), size, axis=0)[:24]
        error = np.abs(np.asarray(q.matrix(jnp.float32), np.float64) - w)
        assert (error <= step / 2 * (1 + 1e-5) + 1e-7).all()


@pytest.mark.parametrize("format", GRIDS, ids=str)
def test_quantizing_twice_changes_nothing(format):
    w = jnp.asarray(weights(3))
    groups = split_groups(w, 8)
    scale, zero = fit_minmax(groups, format)
    codes = quantize_codes(groups, scale, zero, format)
    assert int(codes.max()) <= format.levels
    again = quantize_codes(dequantize_codes(codes, scale, zero), scale, zero, format)
    np.testing.assert_array_equal(codes, again)


@pytest.mark.parametrize("format", GRIDS, ids=str)
def test_zero_is_exact(format):
    w = weights(4, low=0.2, high=1.0)
    w[3] = 0
    assert (np.asarray(rtn(w, format).dequantize())[3] == 0).all()


def test_asymmetric_by_hand():
    w = np.array([[-1.0], [0.25], [2.0], [0.0]], np.float32)
    q = rtn(w, Uniform(2, None, scale_dtype="float32"))
    assert q.scale.tolist() == [[1.0]] and q.zero_point().tolist() == [[1.0]]
    assert q.dequantize()[:, 0].tolist() == [-1.0, 0.0, 2.0, 0.0]
    assert q.codes.tolist() == [[0b01_11_01_00]] and q.zero.tolist() == [[1]]


def test_symmetric_by_hand():
    w = np.array([[-1.5], [0.4], [1.5], [0.0]], np.float32)
    q = rtn(w, Uniform(2, None, symmetric=True, scale_dtype="float32"))
    assert q.scale.tolist() == [[1.0]] and q.zero is None
    # -1.5 and 1.5 lie half way: ties to even, and the upper end of the grid is one step above zero.
    assert q.dequantize()[:, 0].tolist() == [-2.0, 0.0, 1.0, 0.0]


def test_group_of_zeros():
    q = rtn(np.zeros((8, 2), np.float32), Uniform(3, 4))
    assert (np.asarray(q.dequantize()) == 0).all() and np.isfinite(np.asarray(q.scale)).all()


@given(
    values=st.lists(st.floats(-29, 15).map(lambda e: 2.0**e), min_size=1, max_size=20),
    dtype=st.sampled_from(["float16", "bfloat16"]),
)
def test_scales_round_up_to_the_next_number(values, dtype):
    exact = np.array(values, np.float32)
    rounded = np.asarray(jax.jit(round_up, static_argnums=1)(exact, dtype))
    kind = np.dtype(dtype) if dtype == "float16" else np.dtype(ml_dtypes.bfloat16)
    stored = rounded.astype(kind)
    np.testing.assert_array_equal(stored.astype(np.float32), rounded)
    below = (stored.view(np.uint16) - 1).view(kind).astype(np.float32)
    assert (rounded >= exact).all() and (below < exact).all()


@given(seed=st.integers(0, 1000), bits=st.sampled_from([1, 3, 8]), norm=st.sampled_from([2.0, 2.4]))
def test_mse_search_never_loses_to_minmax(seed, bits, norm):
    format = Uniform(bits, 16, symmetric=bits == 3)
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_t(3, size=(2, 16, 6)).astype(np.float32))
    weight = jnp.asarray(rng.uniform(0, 1, size=(2, 16, 1)).astype(np.float32))

    def loss(scale, zero):
        values = dequantize_codes(quantize_codes(w, scale, zero, format), scale, zero)
        return np.asarray((weight * jnp.abs(values - w) ** norm).sum(axis=-2))

    searched = loss(*fit_mse(w, format, weight, norm=norm))
    assert (searched <= loss(*fit_minmax(w, format)) * (1 + 1e-6)).all()


def test_mse_search_equals_brute_force():
    format = Uniform(3, None, scale_dtype="float32")
    w = np.random.default_rng(1).standard_t(3, size=(32, 4)).astype(np.float32)
    scale, zero = (np.asarray(x)[0] for x in fit_mse(jnp.asarray(w), format))
    for column in range(4):
        x = w[:, column].astype(np.float64)
        best = np.inf
        for shrink in [1 - step / 100 for step in range(80)]:
            low, high = min(x.min(), 0) * shrink, max(x.max(), 0) * shrink
            s = (high - low) / 7
            z = np.clip(np.round(-low / s), 0, 7)
            best = min(best, ((((np.clip(np.round(x / s) + z, 0, 7)) - z) * s - x) ** 2).sum())
        s, z = np.float64(scale[column]), np.float64(zero[column])
        found = ((((np.clip(np.round(x / s) + z, 0, 7)) - z) * s - x) ** 2).sum()
        assert found == pytest.approx(best, rel=1e-5)


def test_exact_size_by_hand():
    # 100 x 16 at 3 bits, groups of 32: 10 words of codes, 4 float16 scales, 4 zeros of 3 bits in one word.
    assert Uniform(3, 32).nbytes((100, 16)) == 16 * (10 * 4 + 4 * 2 + 4)
    assert Uniform(3, 32, symmetric=True).nbytes((100, 16)) == 16 * (10 * 4 + 4 * 2)
    assert Uniform(3, "tensor").nbytes((100, 16)) == 16 * 10 * 4 + 2 + 4
    assert Uniform(4, 128).bits_per_weight(4096, 4096) == 4 + (16 + 4) / 128
    assert Uniform(4, 128, symmetric=True).bits_per_weight(4096, 11008) == 4 + 16 / 128
    assert Uniform(8, None, scale_dtype="float32", symmetric=True).bits_per_weight(64, 8) == 8 + 32 / 64


@pytest.mark.parametrize("format", GRIDS, ids=str)
def test_abstract_is_what_solvers_make(format):
    w = np.zeros((2, 24, 5), np.float32)
    made, promised = rtn(w, format), format.abstract((2, 24, 5))
    assert jax.tree.structure(made) == jax.tree.structure(promised)
    shapes = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), made, promised)
    assert all(jax.tree.leaves(shapes))
    assert made.nbytes == promised.nbytes == format.nbytes((2, 24, 5))
    assert promised.shape == (2, 24, 5) and promised.dtype == jnp.float32


@pytest.mark.parametrize("format", GRIDS, ids=str)
def test_dict_round_trip(format):
    assert from_dict(format.to_dict()) == format
    assert hash(from_dict(format.to_dict())) == hash(format)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Uniform(0), "1 to 8 bits"),
        (lambda: Uniform(9), "1 to 8 bits"),
        (lambda: Uniform(4, 0), "group size 0"),
        (lambda: Uniform(4, "row"), "group size 'row'"),
        (lambda: Uniform(4, scale_dtype="float64"), "scales are stored in"),
        (lambda: from_dict({"name": "nf4"}), "unknown format 'nf4'"),
        (lambda: from_dict({"name": "uniform", "bites": 4}), "no setting 'bites'"),
        (lambda: Uniform(4, 128).nbytes((64, 8)), "group size 128 is larger than the input width 64"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(JaxqError, match=words):
        make()
