"""The move from channel-wise to per-tensor grids: the float function and the codes stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxq.errors import JaxqError
from jaxq.formats.activations import AffineQuantizer
from jaxq.solvers.ranges import mse_grid
from jaxq.transforms.reparametrize import fold_linear, fold_norm, reparametrize, to_tensor

WIDTH = 12


def problem(seed):
    """Normalized rows, a norm and a linear layer; channels of very different size and offset."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(96, WIDTH))
    rows = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
    gamma, beta = rng.lognormal(sigma=0.7, size=WIDTH), rng.normal(size=WIDTH)
    kernel, bias = rng.normal(size=(WIDTH, 5)), rng.normal(size=5)
    return [jnp.asarray(v, jnp.float32) for v in (rows, gamma, beta, kernel, bias)]


def activation(rows, gamma, beta):
    return rows * gamma + beta


def position(x, q):
    """x / scale in float64."""
    return np.asarray(x, np.float64) / np.asarray(q.scale, np.float64)


@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 4, 8]), fractional=st.booleans())
@settings(max_examples=12)
def test_float_function_stays(seed, bits, fractional):
    rows, gamma, beta, kernel, bias = problem(seed)
    q = mse_grid(activation(rows, gamma, beta), bits, 0)
    new = reparametrize(gamma, beta, kernel, bias, q, fractional=fractional)
    before = activation(rows, gamma, beta) @ kernel + bias
    after = activation(rows, new.norm_scale, new.norm_bias) @ new.kernel + new.bias
    np.testing.assert_allclose(after, before, atol=1e-5 * float(jnp.abs(before).max()))
    assert new.quantizer.scale.shape == new.quantizer.zero.shape == ()
    assert float(jnp.abs(new.norm_scale / gamma - 1).max()) > 0.1


@given(seed=st.integers(0, 1000), bits=st.sampled_from([3, 4, 6]))
@settings(max_examples=12)
def test_codes_and_quantized_outputs_stay(seed, bits):
    rows, gamma, beta, kernel, bias = problem(seed)
    x = activation(rows, gamma, beta)
    q = mse_grid(x, bits, 0)
    new = reparametrize(gamma, beta, kernel, bias, q)
    changed = activation(rows, new.norm_scale, new.norm_bias)
    # A row with a value on the edge of two bins may go either way.
    clear = (np.abs(position(x, q) % 1 - 0.5) > 1e-4).all(axis=1)
    assert clear.sum() > 80
    np.testing.assert_array_equal(new.quantizer.codes(changed)[clear], q.codes(x)[clear])
    before, after = q(x) @ kernel + bias, new.quantizer(changed) @ new.kernel + new.bias
    np.testing.assert_allclose(after[clear], before[clear], atol=1e-5 * float(jnp.abs(before).max()))


def test_quantized_outputs_are_bit_for_bit_the_same():
    """Scales 1/4 and 3/4 have the mean 1/2, ratios 1/2 and 3/2; inputs are multiples of 3/4 off the ties."""
    rng = np.random.default_rng(0)
    scale = rng.permutation(np.repeat([0.25, 0.75], WIDTH // 2))
    zero = rng.permutation(np.repeat([2, 3, 4], WIDTH // 3))
    q = AffineQuantizer(jnp.asarray(scale, jnp.float32), jnp.asarray(zero, jnp.float32), 3)
    rows = jnp.asarray(rng.integers(-12, 13, size=(64, WIDTH)) * 0.75, jnp.float32)
    gamma = jnp.asarray(rng.choice([1.0, 2.0], size=WIDTH), jnp.float32)
    beta = jnp.zeros(WIDTH)
    kernel = jnp.asarray(rng.integers(-4, 5, size=(WIDTH, 5)), jnp.float32)
    bias = jnp.asarray(rng.integers(-4, 5, size=5), jnp.float32)

    new = reparametrize(gamma, beta, kernel, bias, q)
    assert (new.quantizer.scale, new.quantizer.zero) == (0.5, 3)
    x, changed = activation(rows, gamma, beta), activation(rows, new.norm_scale, new.norm_bias)
    codes = np.asarray(q.codes(x))
    assert len(np.unique(codes)) == 8
    np.testing.assert_array_equal(new.quantizer.codes(changed), codes)
    np.testing.assert_array_equal(new.quantizer(changed) @ new.kernel + new.bias, q(x) @ kernel + bias)


def test_a_fractional_zero_point_is_not_equivalent():
    """What the I&S-ViT code does: a level too many, and another quantized function."""
    rows, gamma, beta, kernel, bias = problem(1)
    x = activation(rows, gamma, beta)
    q = mse_grid(x, 3, 0)
    new = reparametrize(gamma, beta, kernel, bias, q, fractional=True)
    mean = float(np.mean(np.asarray(q.zero, np.float64)))
    assert mean % 1 > 0.05
    assert new.quantizer.fractional and abs(float(new.quantizer.zero) - mean) < 1e-6
    values = new.quantizer(activation(rows, new.norm_scale, new.norm_bias))
    assert len(np.unique(values)) == 9
    whole = reparametrize(gamma, beta, kernel, bias, q)
    assert len(np.unique(whole.quantizer(activation(rows, whole.norm_scale, whole.norm_bias)))) == 8
    before = q(x) @ kernel + bias
    assert float(jnp.abs(values @ new.kernel + new.bias - before).max()) > 0.1


@given(seed=st.integers(0, 1000))
def test_means_of_the_change(seed):
    rng = np.random.default_rng(seed)
    scale, zero = rng.uniform(0.1, 1, WIDTH).astype(np.float32), rng.integers(0, 16, WIDTH).astype(np.float32)
    q = AffineQuantizer(jnp.asarray(scale), jnp.asarray(zero), 4)
    for fractional, most in ((True, 1e-5), (False, 0.5 + 1e-5)):
        tensor, change = to_tensor(q, WIDTH, fractional=fractional)
        np.testing.assert_allclose(np.mean(change.ratio), 1, rtol=1e-6)
        moved = np.asarray(change.shift) / scale
        np.testing.assert_allclose(moved, zero - float(tensor.zero), atol=1e-5)
        assert abs(moved.mean()) <= most
        np.testing.assert_allclose(tensor.scale, scale.astype(np.float64).mean(), rtol=1e-6)


@pytest.mark.parametrize("grid", [(), (WIDTH,)])
def test_equal_grids_change_nothing(grid):
    _, gamma, beta, kernel, bias = problem(2)
    q = AffineQuantizer(jnp.full(grid, 0.1), jnp.full(grid, 3.0), 4)
    new = reparametrize(gamma, beta, kernel, bias, q)
    expected = (gamma, beta, kernel, bias, AffineQuantizer(jnp.float32(0.1), jnp.float32(3), 4))
    jax.tree.map(np.testing.assert_array_equal, tuple(new), expected)


def test_twice_is_once():
    rows, gamma, beta, kernel, bias = problem(3)
    once = reparametrize(gamma, beta, kernel, bias, mse_grid(activation(rows, gamma, beta), 4, 0))
    assert not np.array_equal(once.kernel, kernel)
    jax.tree.map(np.testing.assert_array_equal, reparametrize(*once), once)


def test_several_linears_behind_one_norm_and_kernels_of_more_axes():
    rows, gamma, beta, kernel, _ = problem(4)
    q = mse_grid(activation(rows, gamma, beta), 3, 0)
    tensor, change = to_tensor(q, WIDTH)
    changed = activation(rows, *fold_norm(gamma, beta, change))
    np.testing.assert_array_equal(tensor.codes(changed).shape, rows.shape)
    for shaped in (kernel[:, :4].reshape(WIDTH, 2, 2), 2 * kernel):
        new_kernel, new_bias = fold_linear(shaped, None, change)
        assert new_kernel.shape == shaped.shape and new_bias.shape == shaped.shape[1:]
        before = jnp.tensordot(activation(rows, gamma, beta), shaped, 1)
        after = jnp.tensordot(changed, new_kernel, 1) + new_bias
        np.testing.assert_allclose(after, before, atol=1e-5 * float(jnp.abs(before).max()))
    whole = reparametrize(gamma, beta, kernel, None, q)
    np.testing.assert_array_equal(whole.kernel, fold_linear(kernel, None, change)[0])


def test_stacked_blocks_dtypes_and_jit():
    single = []
    for seed in (5, 6):
        rows, gamma, beta, kernel, bias = problem(seed)
        single.append((gamma, beta, kernel, bias, mse_grid(activation(rows, gamma, beta), 4, 0)))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *single)
    together = jax.vmap(reparametrize)(*stacked)
    for lane, one in enumerate(single):
        for got, want in zip(
            jax.tree.leaves(together), jax.tree.leaves(jax.jit(reparametrize)(*one)), strict=True
        ):
            np.testing.assert_allclose(got[lane], want, rtol=1e-5, atol=1e-6)
    half = [leaf.astype(jnp.bfloat16) for leaf in single[0][:4]]
    new = reparametrize(*half, single[0][4])
    assert all(leaf.dtype == jnp.bfloat16 for leaf in new[:4])
    assert new.quantizer.scale.dtype == jnp.float32


def test_bad_input_is_named():
    _, gamma, beta, kernel, bias = problem(7)
    with pytest.raises(JaxqError, match=r"kernel of shape \(5, 12\) does not follow a norm of width 12"):
        reparametrize(gamma, beta, kernel.T, bias, AffineQuantizer(gamma, beta, 4))
    with pytest.raises(JaxqError, match=r"a grid of shape \(3, 1, 1\) is not one for each of 12 channels"):
        reparametrize(gamma, beta, kernel, bias, AffineQuantizer(jnp.ones((3, 1, 1)), jnp.zeros((3, 1, 1)), 4))
