"""Activation quantizers against float64 NumPy, their stated derivatives against closed forms and torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxq.errors import JaxqError
from jaxq.formats.activations import AffineQuantizer, DynamicQuantizer, qdrop
from jaxq.formats.log_activations import LogQuantizer, ShiftLogQuantizer

SIZE = 256


def off_ties(x: np.ndarray, steps) -> np.ndarray:
    """Some of x, as many as SIZE, whose position on the grid is clearly nearer to one code than to the other."""
    position = np.asarray(steps(x.astype(np.float64)))
    clear = np.abs(position - np.floor(position) - 0.5) > 1e-3
    assert clear.sum() >= SIZE
    return x[clear][:SIZE]


def sums(q, x, seed):
    """Derivatives of a weighted sum of q(x), by x and by the quantizer, and the weights."""
    g = np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)
    by_q, by_x = jax.grad(lambda q, x: jnp.sum(g * q(x)), argnums=(0, 1))(q, x)
    return by_q, by_x, g


def floats(*values):
    return [jnp.asarray(v, jnp.float32) for v in values]


# The affine grid


@st.composite
def affine_cases(draw):
    """A quantizer, its scale and zero point, and a sample on and around its grid."""
    bits = draw(st.integers(1, 8))
    scale = np.float32(draw(st.floats(1e-3, 10)))
    zero = draw(st.integers(-3, 2**bits + 2))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    ends = np.array([-zero - 3, 2**bits + 2 - zero]) * scale
    x = rng.uniform(*ends, size=2 * SIZE).astype(np.float32)
    return AffineQuantizer(*floats(scale, zero), bits), float(scale), zero, off_ties(x, lambda x: x / float(scale))


@given(affine_cases())
def test_affine_grid(case):
    q, scale, zero, x = case
    top = 2**q.bits - 1
    codes = np.clip(np.round(x.astype(np.float64) / scale) + zero, 0, top)
    assert q.levels == top
    np.testing.assert_array_equal(q.codes(x), codes)
    assert q.codes(x).dtype == jnp.int32
    y = np.asarray(q(x))
    np.testing.assert_allclose(y, (codes - zero) * scale, rtol=3e-7)
    np.testing.assert_array_equal(y, q.dequantize(q.codes(x)))
    np.testing.assert_array_equal(q(y), y)
    assert len(np.unique(y)) <= 2**q.bits
    assert (np.diff(y[np.argsort(x)]) >= 0).all()
    inside = (x >= -zero * scale) & (x <= (top - zero) * scale)
    assert (np.abs(y - x)[inside] <= scale / 2 * (1 + 1e-5)).all()
    if 0 <= zero <= top:
        assert q(np.zeros(1, np.float32))[0] == 0


def test_affine_derivatives_on_and_around_both_bounds():
    """In quarters of a step of 1/4, exactly: bounds, ties, and values far outside."""
    scale, zero, bits = 0.25, 2, 3
    x = np.concatenate([np.arange(-20, 40) / 16, [-100, 100]]).astype(np.float32)
    code = np.round(x / scale) + zero
    inside = (code >= 0) & (code <= 7)
    assert (code == 0).sum() > 1 and (code == 7).sum() > 1 and (~inside).sum() > 10
    by_scale = np.where(inside, np.round(x / scale) - x / scale, np.where(code < 0, -zero, 7 - zero))
    q = AffineQuantizer(*floats(scale, zero), bits)
    got, by_x, g = sums(q, x, 0)
    np.testing.assert_array_equal(by_x, g * inside)
    np.testing.assert_allclose(got.scale, np.sum(g * by_scale), rtol=1e-5)
    assert got.zero == 0
    # Forward mode, one direction at a time: nothing is summed.
    along = jax.jvp(lambda s: dataclasses.replace(q, scale=s)(x), (q.scale,), (jnp.ones(()),))[1]
    np.testing.assert_array_equal(along, by_scale)
    assert jax.grad(q)(jnp.float32(-0.5)) == 1 and jax.grad(q)(jnp.float32(1.25)) == 1


@pytest.mark.parametrize("shape, grid", [((5, 6), (6,)), ((2, 3, 5, 4), (3, 1, 1)), ((4, 6), ())])
def test_affine_derivatives_equal_those_of_torch(shape, grid):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    x = (2 * rng.normal(size=shape)).astype(np.float32)
    scale = rng.uniform(0.2, 0.5, size=grid).astype(np.float32)
    zero = rng.integers(0, 8, size=grid).astype(np.float32)
    by_q, by_x, g = sums(AffineQuantizer(*floats(scale, zero), 3), x, 2)

    def through(v):
        return v + (torch.round(v) - v).detach()

    tx, ts, tz = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, scale, zero))
    code = torch.clamp(through(tx / ts) + tz.detach(), 0, 7)
    ((code - tz.detach()) * ts * torch.tensor(g)).sum().backward()
    assert 0 < tx.grad.count_nonzero() < x.size
    np.testing.assert_array_equal(by_x, tx.grad.numpy().astype(np.float32))
    np.testing.assert_allclose(by_q.scale, ts.grad.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(by_q.zero, np.zeros(grid))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-38, 1e30])
def test_no_scale_blows_up(scale):
    x = np.array([-1e38, -1.0, 0.0, 1.0, 3e38], np.float32)
    q = AffineQuantizer(*floats(scale, 3), 3)
    by_q, by_x, _ = sums(q, x, 3)
    for value in (q(x), by_x, by_q.scale):
        assert np.isfinite(value).all()
    if scale <= 1e-38:
        # The floored scale still has the derivative that leads it back up: L - z for x above.
        assert jax.grad(lambda q: q(jnp.ones(())))(q).scale == 4
        np.testing.assert_array_equal(q.codes(x), [0, 0, 3, 7, 7])


def test_fractional_zero_point_has_one_value_too_many():
    x = np.linspace(-3, 3, 1001).astype(np.float32)
    for zero, values in ((3.4, 9), (3.0, 8)):
        q = AffineQuantizer(*floats(0.5, zero), 3, fractional=True)
        expected = (np.clip(np.round(x / 0.5) + np.float32(zero), 0, 7) - np.float32(zero)) * np.float32(0.5)
        np.testing.assert_allclose(q(x), expected, rtol=1e-6, atol=1e-6)
        assert len(np.unique(q(x))) == values
        np.testing.assert_array_equal(q.dequantize(q.codes(x)), q(x))
        assert np.unique(q.codes(x)).tolist() == list(range(values))
    assert q.levels == 8
    assert len(np.unique(AffineQuantizer(*floats(0.5, 3.4), 3)(x))) == 8


# The grid of each token


@given(
    seed=st.integers(0, 1000), bits=st.integers(2, 8), symmetric=st.booleans(), shift=st.sampled_from([-5, 0, 5])
)
@settings(max_examples=12)
def test_dynamic_grid_of_each_token(seed, bits, symmetric, shift):
    x = (np.random.default_rng(seed).normal(size=(3, 4, 16)) + shift).astype(np.float32)
    x[0, 0] = 0
    x[0, 1] *= 1e-20
    q = DynamicQuantizer(bits, symmetric)
    y = np.asarray(q(x))
    low, high = np.minimum(x.min(-1, keepdims=True), 0.0), np.maximum(x.max(-1, keepdims=True), 0.0)
    if symmetric:
        scale = np.maximum(-low, high).astype(np.float64) / (2 ** (bits - 1) - 1)
    else:
        scale = (high - low).astype(np.float64) / (2**bits - 1)
    assert (np.abs(y - x) <= scale / 2 * (1 + 1e-4)).all()
    codes = np.asarray(q.codes(x))
    assert codes.min() >= 0 and codes.max() <= q.levels
    np.testing.assert_array_equal(q.dequantize(codes, q.grid(x)), y)
    one = (slice(None), slice(2, 3))
    np.testing.assert_array_equal(q(x[one]), y[one])
    if symmetric:
        np.testing.assert_array_equal(q(-x), -y)
        np.testing.assert_allclose(np.abs(y).max(-1), np.abs(x).max(-1), rtol=1e-6)


def test_dynamic_derivative_is_one_even_where_rounding_leaves_the_codes():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(64, 16)), jnp.float32)
    # -1.5 and 5.5 steps from 0: both round away, to 8 steps in all.
    x = x.at[0].set(0.0).at[0, :2].set(jnp.asarray([-1.5, 5.5]))
    q = DynamicQuantizer(3, symmetric=False)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(q(x)))(x), np.ones_like(x))
    assert jax.tree.leaves(q) == []
    whole = DynamicQuantizer(3, symmetric=True, axis=(0, 1))
    assert whole.grid(x).scale.shape == (1, 1)
    assert np.unique(whole(x)).size <= 8


def test_dynamic_bfloat16_keeps_dtype():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 8)), jnp.bfloat16)
    q = DynamicQuantizer(4)
    assert q(x).dtype == jnp.bfloat16 == jax.grad(lambda x: jnp.sum(q(x)))(x).dtype
    np.testing.assert_array_equal(q(x), q(x.astype(jnp.float32)).astype(jnp.bfloat16))


# Logarithmic grids


@given(
    seed=st.integers(0, 1000),
    bits=st.integers(1, 5),
    root=st.integers(1, 3),
    scale=st.floats(0.01, 2),
    official=st.booleans(),
)
def test_log_grid(seed, bits, root, scale, official):
    rng = np.random.default_rng(seed)
    scale = float(np.float32(scale))
    top = 2**bits - 1 + official
    x = (2 * scale * np.exp2(-rng.uniform(0, (top + 3) / root, size=2 * SIZE))).astype(np.float32)
    x = off_ties(x, lambda x: -root * np.log2(x / scale))
    codes = np.clip(np.round(-root * np.log2(x.astype(np.float64) / scale)), 0, top)
    q = LogQuantizer(*floats(scale), bits, root, official)
    y = np.asarray(q(x))
    np.testing.assert_array_equal(q.codes(x), codes)
    np.testing.assert_allclose(y, np.where(codes == top, 0, scale * 2 ** (-codes / root)), rtol=1e-6)
    np.testing.assert_array_equal(q.dequantize(q.codes(x)), y)
    np.testing.assert_array_equal(q(y), y)
    assert q.levels == top
    assert len(np.unique(y)) <= 2**bits + official
    assert (np.diff(y[np.argsort(x)]) >= 0).all()
    for nothing in (0.0, -1.0):
        assert q(jnp.float32(nothing)) == 0 and q.codes(jnp.float32(nothing)) == top


@pytest.mark.parametrize("root", [1, 2])
def test_log_derivatives_equal_those_of_torch(root):
    torch = pytest.importorskip("torch")
    scale, bits = 0.7, 3
    x = (2 * np.exp2(-np.random.default_rng(6).uniform(0, 11, size=SIZE))).astype(np.float32)
    q = LogQuantizer(*floats(scale), bits, root)
    by_q, by_x, g = sums(q, x, 7)

    def through(v):
        return v + (torch.round(v) - v).detach()

    tx, ts = (torch.tensor(np.float32(v), dtype=torch.float64, requires_grad=True) for v in (x, scale))
    steps = through(-root * torch.log2(tx / ts))
    value = torch.where(steps < 7, ts * 2 ** (-torch.clamp(steps, min=0) / root), 0.0)
    (value * torch.tensor(g)).sum().backward()
    kinds = [int((steps < 0).sum()), int((steps >= 7).sum())]
    assert min(kinds) > 5 and sum(kinds) < SIZE - 5
    np.testing.assert_allclose(by_x, tx.grad.numpy(), rtol=1e-5)
    np.testing.assert_allclose(by_q.scale, ts.grad.numpy(), rtol=1e-5)


def test_log_at_zero_is_finite():
    by_q, by_x, _ = sums(LogQuantizer(*floats(0.5), 3, 2), np.zeros(4, np.float32), 0)
    assert by_q.scale == 0 and not by_x.any()


def shift_log_of(x, eta, bits, official=False) -> ShiftLogQuantizer:
    y = np.log2(np.asarray(x, np.float64) + eta)
    return ShiftLogQuantizer(*floats(eta, y.min(), y.max()), bits, official)


def test_worked_example_of_the_paper():
    """Its inner quantizer has a zero point, round(-l / s) = 0: the grid is moved to multiples of the step."""
    least, most = -np.log2(np.array([0.868, 1.08e-8]) + 1e-6)
    step = (most - least) / 7
    assert round(least, 3) == 0.204 and round(most, 2) == 19.92 and round(step, 2) == 2.82
    zero = np.round(-least / step)
    paper = ShiftLogQuantizer(*floats(1e-6, (zero - 7) * step, zero * step), 3)
    exact = shift_log_of([1.08e-8, 0.868], 1e-6, 3)
    for q, third in ((paper, 8), (exact, 9)):
        values = np.asarray(q.dequantize(jnp.arange(8)), np.float64) + 1e-6
        np.testing.assert_allclose(-np.log2(values), [20, 17, 14, 11, third, 6, 3, 0], atol=1e-4)
        assert f"{q(jnp.float32(2.38e-5)):.2e}" == "6.00e-05"
        assert q.codes(jnp.float32(2.38e-5)) == 7 - 5


def softmax_rows(seed, rows=4, width=64) -> np.ndarray:
    logits = 3 * np.random.default_rng(seed).normal(size=(rows, width))
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


@given(
    seed=st.integers(0, 1000),
    bits=st.integers(1, 6),
    eta=st.sampled_from([2.0**-k for k in range(4, 20)] + [0.001, 0.01, 0.05, 0.5]),
    official=st.booleans(),
)
def test_shift_log_grid(seed, bits, eta, official):
    x = softmax_rows(seed)
    q = shift_log_of(x, eta, bits, official)
    top = 2**bits - 1 + official
    assert q.levels == top
    eta = float(q.eta)
    low, high = float(q.low), float(q.high)
    step = (high - low) / top
    y = np.log2(x.astype(np.float64) + eta)
    codes, values = np.asarray(q.codes(x)), np.asarray(q(x), np.float64)
    position = (y - low) / step
    clear = np.abs(position - np.floor(position) - 0.5) > 1e-3
    np.testing.assert_array_equal(codes[clear], np.clip(np.round(position), 0, top)[clear])

    np.testing.assert_array_equal(q.dequantize(codes), q(x))
    exponents = np.log2(values + eta)
    np.testing.assert_allclose(exponents, np.round(exponents), atol=1e-5)
    integers = np.round(high) - np.round(low) + 1
    assert len(np.unique(values)) <= min(top + 1, integers)
    assert codes[np.unravel_index(x.argmin(), x.shape)] == 0
    assert codes[np.unravel_index(x.argmax(), x.shape)] == top
    assert (np.diff(values.ravel()[np.argsort(x, axis=None)]) >= 0).all()
    assert (np.abs(exponents - y) <= step / 2 + 0.5 + 1e-5).all()


def test_official_shift_log_has_a_code_more():
    x = np.exp2(np.linspace(-19.5, 0, 4000)).astype(np.float32)
    assert len(np.unique(shift_log_of(x, 2.0**-20, 3)(x))) == 8
    assert len(np.unique(shift_log_of(x, 2.0**-20, 3, official=True)(x))) == 9


def test_zero_comes_back_as_zero_only_for_a_power_of_two():
    for k in range(4, 20):
        assert shift_log_of([0.0, 0.9], 2.0**-k, 3)(jnp.float32(0)) == 0
    assert shift_log_of([0.0, 0.9], 0.01, 3)(jnp.float32(0)) == np.float32(2.0**-7) - np.float32(0.01)


@pytest.mark.parametrize("official", [False, True])
def test_shift_log_derivative(official):
    torch = pytest.importorskip("torch")
    x = softmax_rows(8)
    q = shift_log_of(x[:2] * 0.7 + 0.001, 2.0**-9, 3, official)
    by_q, by_x, g = sums(q, x, 9)

    def through(v):
        return v + (torch.round(v) - v).detach()

    low, step = float(q.low), (float(q.high) - float(q.low)) / q.levels
    tx = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    code = torch.clamp(through((torch.log2(tx + 2.0**-9) - low) / step), 0, q.levels)
    (torch.pow(2.0, through(code * step + low)) * torch.tensor(g)).sum().backward()
    assert 0 < tx.grad.count_nonzero() < x.size
    np.testing.assert_allclose(by_x, tx.grad.numpy(), rtol=1e-5)
    y = np.log2(x + 2.0**-9)
    inside = (y >= low) & (y <= float(q.high))
    np.testing.assert_allclose(by_x[inside], (g * (q(x) + 2.0**-9) / (x + 2.0**-9))[inside], rtol=1e-6)
    outside = (y < low - step / 2 - 1e-3) | (y > float(q.high) + step / 2 + 1e-3)
    assert outside.sum() > 1 and not np.asarray(by_x)[outside].any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(by_q))


def test_shift_log_between_uniform_and_logarithmic():
    x = np.linspace(0.002, 1, 500).astype(np.float32)
    flat = off_ties(x, lambda x: 7 * (x - 0.002) / 0.998)
    wide = shift_log_of(x, 2.0**8, 3)
    ties = np.abs((7 * (flat - 0.002) / 0.998) % 1 - 0.5) < 0.02
    np.testing.assert_array_equal(wide.codes(flat)[~ties], np.round(7 * (flat - 0.002) / 0.998)[~ties])
    narrow = shift_log_of(x, 2.0**-24, 3)
    position = 7 * np.log2(x / x[0]) / np.log2(x[-1] / x[0])
    ties = np.abs(position % 1 - 0.5) < 0.02
    np.testing.assert_array_equal(narrow.codes(x)[~ties], np.round(position)[~ties])


def test_shift_log_of_a_constant_and_of_values_out_of_its_domain():
    q = shift_log_of([0.25, 0.25], 2.0**-10, 3)
    x = jnp.asarray([0.25, 0.0, -1.0, 1.0], jnp.float32)
    np.testing.assert_array_equal(q(x), np.full(4, 0.25 - 2.0**-10))
    assert np.isfinite(jax.grad(lambda x: jnp.sum(q(x)))(x)).all()


# What all have in common

QUANTIZERS = [
    lambda rng: AffineQuantizer(*floats(rng.uniform(0.05, 0.1), 3), 4),
    lambda rng: AffineQuantizer(*floats(rng.uniform(0.05, 0.1), 3.3), 4, fractional=True),
    lambda rng: DynamicQuantizer(4),
    lambda rng: DynamicQuantizer(4, symmetric=False),
    lambda rng: LogQuantizer(*floats(rng.uniform(0.5, 1)), 4, 2),
    lambda rng: ShiftLogQuantizer(*floats(2.0**-8, -8, rng.uniform(-1, 0)), 4),
]


@pytest.mark.parametrize("make", QUANTIZERS)
def test_stacked_quantizers_under_vmap_and_scan(make):
    rng = np.random.default_rng(10)
    single = [make(rng) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    x = np.stack([softmax_rows(seed) for seed in range(3)])
    expected = np.stack([q(one) for q, one in zip(single, x, strict=True)])
    np.testing.assert_array_equal(jax.vmap(lambda q, x: q(x))(stacked, x), expected)
    np.testing.assert_array_equal(jax.lax.scan(lambda _, at: (_, at[0](at[1])), 0, (stacked, x))[1], expected)
    np.testing.assert_array_equal(jax.jit(lambda q, x: q(x))(single[0], x[0]), expected[0])

    def loss(q, x):
        return jnp.sum(jnp.square(q(x)))

    derivatives = jax.vmap(jax.grad(loss, argnums=(0, 1)))(stacked, x)
    one = jax.grad(loss, argnums=(0, 1))(single[1], x[1])
    for got, want in zip(jax.tree.leaves(derivatives), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got[1], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", QUANTIZERS)
def test_dtype_nan_and_leaves(make):
    q = make(np.random.default_rng(11))
    x = softmax_rows(12)
    half = jnp.asarray(x, jnp.bfloat16)
    assert q(half).dtype == jnp.bfloat16 == jax.grad(lambda x: jnp.sum(q(x)))(half).dtype
    np.testing.assert_array_equal(q(half), q(half.astype(jnp.float32)).astype(jnp.bfloat16))
    x[1, 3] = np.nan
    missing = np.zeros_like(x, bool)
    missing[1] = isinstance(q, DynamicQuantizer)
    missing[1, 3] = True
    np.testing.assert_array_equal(np.isnan(q(x)), missing)
    leaves, treedef = jax.tree.flatten(q)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    again = jax.tree.unflatten(treedef, [np.asarray(leaf) for leaf in leaves])
    np.testing.assert_array_equal(again(half), q(half))


def test_a_quantizer_is_exported():
    q = AffineQuantizer(*floats(0.1, 3), 4)
    x = jnp.asarray(softmax_rows(13))
    again = jax.export.deserialize(jax.export.export(jax.jit(lambda q, x: q(x)))(q, x).serialize())
    np.testing.assert_array_equal(again.call(q, x), q(x))


def test_qdrop():
    x, x_hat = jnp.zeros((200, 50)), jnp.ones((200, 50))
    key = jax.random.key(0)
    for probability in (0.5, 0.9):
        assert abs(float(qdrop(x, x_hat, key, probability).mean()) - probability) < 0.02
    mixed = np.asarray(qdrop(x, x_hat, key, 0.5))
    assert 0 < mixed.mean(0).min() and mixed.mean(1).max() < 1
    np.testing.assert_array_equal(qdrop(x, x_hat, None, 1.0), x_hat)
    np.testing.assert_array_equal(qdrop(x, x_hat, None, 0.0), x)
    traced = jax.jit(qdrop)
    np.testing.assert_array_equal(traced(x, x_hat, key, jnp.float32(1.0)), x_hat)
    assert abs(float(traced(x, x_hat, key, jnp.float32(0.5)).mean()) - 0.5) < 0.02
    np.testing.assert_array_equal(jax.jit(qdrop, static_argnums=3)(x, x_hat, key, 0.5), mixed)
    # Each derivative goes where the value came from.
    by = jax.grad(lambda x, x_hat: jnp.sum(qdrop(x, x_hat, key, 0.5)), argnums=(0, 1))(x, x_hat)
    np.testing.assert_array_equal(by[1], mixed)
    np.testing.assert_array_equal(by[0], 1 - mixed)


def test_bad_input_is_named():
    q = AffineQuantizer(jnp.ones((3, 1, 1)), jnp.zeros((3, 1, 1)), 4)
    x = jnp.ones((2, 4))
    for call, words in [
        (lambda: AffineQuantizer(*floats(1, 0), 0), "has 1 to 16 bits, not 0"),
        (lambda: AffineQuantizer(*floats(1, 0), 17), "has 1 to 16 bits, not 17"),
        (lambda: AffineQuantizer(*floats(1, 0), True), "not True"),
        (lambda: DynamicQuantizer(1), "has 2 to 16 bits, not 1"),
        (lambda: LogQuantizer(*floats(1), 4, 0), "root of a log quantizer is a positive whole number, not 0"),
        (lambda: LogQuantizer(*floats(1), 4.0), "not 4.0"),
        (lambda: ShiftLogQuantizer(*floats(1, 0, 1), 99), "not 99"),
        (lambda: q(x), r"a grid of shape \(3, 1, 1\) does not fit activations of shape \(2, 4\)"),
        (lambda: q(jnp.ones((2, 4, 5, 6))), "does not fit"),
        (lambda: qdrop(x, x, None, 0.5), "takes a random key"),
        (lambda: qdrop(x, x, None, 1.5), "between 0 and 1"),
    ]:
        with pytest.raises(JaxqError, match=words):
            call()
