"""Rotations that a LayerNorm lets pass, and networks that compute the same after them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.errors import JaxqError
from jaxq.transforms.rotate_norm import (
    centre,
    fold_to_rms,
    keeping_ones,
    rotate_reader,
    rotate_writer,
    rotation,
)

#: Powers of 4 and of 2, a multiple of 3 (ViT-T is 192 wide), a prime, and the smallest.
WIDTHS = [64, 32, 48, 13, 1]


def rows(width, seed=0, count=40):
    """A stream with an outlier channel and a mean that is not 0."""
    x = np.random.default_rng(seed).normal(size=(count, width)) + 0.7
    x[:, 0] *= 30
    return x


def layer_norm(x, eps=1e-6):
    mean = x.mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axis=-1, keepdims=True) + eps)


def rms_norm(x, eps=1e-6):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


@functools.cache
def rotated(width):
    return np.asarray(rotation(width, jax.random.key(width)), np.float64)


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_orthogonal_keeps_the_ones_and_passes_a_layer_norm(width):
    q = rotated(width)
    np.testing.assert_allclose(q @ q.T, np.eye(width), atol=1e-6)
    np.testing.assert_allclose(q @ np.ones(width), 1, atol=1e-6)
    np.testing.assert_allclose(np.ones(width) @ q, 1, atol=1e-6)
    x = rows(width)
    np.testing.assert_allclose(layer_norm(x @ q), layer_norm(x) @ q, atol=2e-5)


def test_for_powers_of_four_it_is_exact_and_as_flat_as_can_be():
    q, x = rotated(64), rows(64)
    np.testing.assert_array_equal(np.abs(q), 1 / 8)
    np.testing.assert_array_equal(q @ q.T, np.eye(64))
    np.testing.assert_allclose(layer_norm(x @ q), layer_norm(x) @ q, atol=1e-13)


@pytest.mark.parametrize("width", [64, 48])
def test_outliers_are_spread(width):
    def peak(x):
        return np.mean(np.abs(x).max(axis=1) / np.sqrt((x**2).mean(axis=1)))

    x = layer_norm(rows(width))
    assert peak(x @ rotated(width)) < 0.7 * peak(x)
    assert np.abs(rotated(width)).max() <= 1 / 4 + 1e-6


def test_keys_decide():
    first, other = (rotation(48, jax.random.key(k)) for k in (0, 1))
    np.testing.assert_array_equal(first, rotation(48, jax.random.key(0)))
    assert np.abs(first - other).max() > 0.1
    with pytest.raises(JaxqError, match="no rotation of width 0"):
        rotation(0, jax.random.key(0))


def test_random_part_is_uniform():
    """Mean and covariance of an element of R over keys, by symmetry: 1/n, and (1 - 1/n) / n off the mean."""
    n = 5
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = np.asarray(jax.vmap(functools.partial(keeping_ones, n))(keys), np.float64)
    np.testing.assert_allclose(drawn.mean(axis=0), 1 / n, atol=0.03)
    np.testing.assert_allclose(drawn.var(axis=0), (1 - 1 / n) ** 2 / (n - 1), atol=0.02)


def test_another_rotation_does_not_pass_but_does_an_rms_norm():
    """The control: QR of a normal matrix needs the centred stream and the RMSNorm."""
    x = rows(16)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))
    assert np.abs(layer_norm(x @ q) - layer_norm(x) @ q).max() > 0.1
    centred = x - x.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(rms_norm(centred @ q), layer_norm(x) @ q, atol=1e-12)


def test_folding_keeps_the_linear_layers_output():
    rng = np.random.default_rng(1)
    gamma, beta = (jnp.asarray(rng.normal(size=12), jnp.float32) for _ in range(2))
    kernel = jnp.asarray(rng.normal(size=(12, 2, 3)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    n = layer_norm(rows(12))
    for b in (bias, None):
        folded = fold_to_rms(gamma, beta, kernel, b)
        expected = np.tensordot(n * gamma + beta, kernel, 1) + (0 if b is None else b)
        np.testing.assert_array_equal(folded.norm_scale, 1)
        np.testing.assert_array_equal(folded.norm_bias, 0)
        np.testing.assert_allclose(np.tensordot(n, folded.kernel, 1) + folded.bias, expected, atol=1e-5)
    np.testing.assert_array_equal(fold_to_rms(gamma, None, kernel, bias).bias, bias)
    half = fold_to_rms(*(x.astype(jnp.bfloat16) for x in (gamma, beta, kernel, bias)))
    assert all(x.dtype == jnp.bfloat16 for x in half)


def network(seed=2, width=48, hidden=10):
    """Weights of a pre-LayerNorm residual network: embedding, positions, two blocks, norm and head."""
    rng = np.random.default_rng(seed)

    def norm():
        return [1 + 0.3 * rng.normal(size=width), 0.3 * rng.normal(size=width)]

    def linear(a, b):
        return [rng.normal(size=(a, b)) / a**0.5, rng.normal(size=b)]

    blocks = [(*norm(), *linear(width, hidden), *linear(hidden, width)) for _ in range(2)]
    parts = [linear(7, width), [rng.normal(size=(5, width))], *blocks, [*norm(), *linear(width, 4)]]
    return [tuple(jnp.asarray(x, jnp.float32) for x in part) for part in parts]


def run(parts, x, norm=layer_norm):
    """The network in float64."""
    (kernel, bias), (positions,), *blocks, (gamma, beta, head, head_bias) = [
        [np.asarray(w, np.float64) for w in part] for part in parts
    ]
    stream = x @ kernel + bias + positions
    for g, b, k1, b1, k2, b2 in blocks:
        stream = stream + np.tanh((norm(stream) * g + b) @ k1 + b1) @ k2 + b2
    return (norm(stream) * gamma + beta) @ head + head_bias


def turned(parts, writer, reader):
    """The network with every writer and every folded reader changed."""
    embedding, (positions,), *blocks, (gamma, beta, head, head_bias) = parts
    changed = []
    for g, b, k1, b1, k2, b2 in blocks:
        one, zero, k1, b1 = fold_to_rms(g, b, k1, b1)
        changed.append((one, zero, reader(k1), b1, *writer(k2, b2)))
    one, zero, head, head_bias = fold_to_rms(gamma, beta, head, head_bias)
    last = (one, zero, reader(head), head_bias)
    return [writer(*embedding), writer(positions, None)[:1], *changed, last]


@pytest.mark.parametrize("centred", [False, True])
def test_a_rotated_network_computes_the_same_with_its_layer_norms(centred):
    parts, x = network(), np.random.default_rng(3).normal(size=(6, 5, 7))
    q = rotation(48, jax.random.key(4))

    def writer(kernel, bias):
        return rotate_writer(*(centre(kernel, bias) if centred else (kernel, bias)), q)

    new = turned(parts, writer, functools.partial(rotate_reader, q=q))
    assert np.abs(new[0][0] - parts[0][0]).max() > 0.1
    np.testing.assert_allclose(run(new, x), run(parts, x), atol=2e-5)
    if centred:
        np.testing.assert_allclose(run(new, x, rms_norm), run(parts, x), atol=2e-5)


def test_centred_writers_need_no_mean():
    parts, x = network(), np.random.default_rng(5).normal(size=(6, 5, 7))
    new = turned(parts, centre, lambda kernel: kernel)
    np.testing.assert_allclose(run(new, x, rms_norm), run(parts, x), atol=2e-5)
    assert np.abs(run(parts, x, rms_norm) - run(parts, x)).max() > 0.1
    np.testing.assert_allclose(new[0][0].mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(new[0][1].mean(), 0, atol=1e-6)


def test_kernels_of_more_axes_and_dtypes():
    rng = np.random.default_rng(6)
    q = rotation(48, jax.random.key(1))
    reading = jnp.asarray(rng.normal(size=(48, 2, 3)), jnp.float32)
    writing = jnp.asarray(rng.normal(size=(2, 3, 48)), jnp.float32)
    x = jnp.asarray(rows(48), jnp.float32)
    np.testing.assert_allclose(
        jnp.tensordot(x @ q, rotate_reader(reading, q), 1), jnp.tensordot(x, reading, 1), atol=1e-3
    )
    kernel, bias = rotate_writer(writing, None, q)
    np.testing.assert_allclose(kernel, writing @ q, atol=1e-5)
    assert bias is None and centre(writing, None)[1] is None
    half = writing.astype(jnp.bfloat16), jnp.ones(48, jnp.bfloat16)
    assert {leaf.dtype for pair in (rotate_writer(*half, q), centre(*half)) for leaf in pair} == {
        jnp.dtype(jnp.bfloat16)
    }
    with pytest.raises(JaxqError, match=r"shape \(2, 3, 48\) does not meet a stream of width 48"):
        rotate_reader(writing, q)
    with pytest.raises(JaxqError, match=r"shape \(48, 2, 3\) does not meet a stream of width 48"):
        rotate_writer(reading, None, q)
    with pytest.raises(JaxqError, match="does not meet a stream of width 5"):
        fold_to_rms(jnp.ones(5), None, reading, None)
