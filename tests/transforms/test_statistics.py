"""Statistics: folds over tokens that do not care how the tokens were split."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxq.transforms.statistics import Hessian, Moments, Range

STATISTICS = [Hessian(), Moments(), Range()]
SITE = SimpleNamespace(in_size=5)


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, 5)).astype(np.float32)


def fold(statistic, *batches):
    state = statistic.init(SITE)
    for x, weights in batches:
        state = statistic.update(state, jnp.asarray(x), weights)
    return state


def close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5), a, b)


def test_against_float64():
    x, w = tokens(0, 7, 9), np.random.default_rng(1).uniform(0, 2, (7, 9)).astype(np.float32)
    flat, weight = x.reshape(-1, 5).astype(np.float64), w.reshape(-1).astype(np.float64)
    hessian = Hessian().finalize(fold(Hessian(), (x, jnp.asarray(w))))
    np.testing.assert_allclose(hessian, (flat * weight[:, None]).T @ flat / weight.sum(), rtol=1e-5, atol=1e-6)
    mean, square = Moments().finalize(fold(Moments(), (x, jnp.asarray(w))))
    np.testing.assert_allclose(mean, weight @ np.abs(flat) / weight.sum(), rtol=1e-5)
    np.testing.assert_allclose(square, weight @ flat**2 / weight.sum(), rtol=1e-5)
    state = fold(Range(), (x, None))
    np.testing.assert_array_equal(state.low, x.min((0, 1)))
    np.testing.assert_array_equal(state.high, x.max((0, 1)))
    np.testing.assert_array_equal(Range().finalize(state), np.abs(x).max((0, 1)))


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: type(s).__name__)
@given(cut=st.integers(1, 11), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_merged_parts_equal_the_whole(statistic, cut, seed):
    x = tokens(seed, 12)
    whole = fold(statistic, (x, None))
    parts = fold(statistic, (x[:cut], None)), fold(statistic, (x[cut:], None))
    close(statistic.merge(*parts), whole)
    close(statistic.merge(*parts[::-1]), whole)
    close(fold(statistic, (x[:cut], None), (x[cut:], None)), whole)
    close(statistic.merge(statistic.init(SITE), whole), whole)


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.float32], ids=["mask", "weights"])
def test_masked_tokens_are_as_if_absent(statistic, dtype):
    x = tokens(0, 4, 6)
    mask = np.random.default_rng(1).random((4, 6)) < 0.6
    x[~mask] = np.nan
    masked = fold(statistic, (x, jnp.asarray(mask, dtype)))
    close(masked, fold(statistic, (x[mask], None)))


def test_a_weight_of_two_is_the_token_twice():
    x = tokens(0, 6)
    weights = jnp.array([1.0, 2, 0, 1, 2, 0])
    for statistic in (Hessian(), Moments()):
        close(fold(statistic, (x, weights)), fold(statistic, (x[[0, 1, 1, 3, 4, 4]], None)))


def test_low_precision_inputs_are_summed_in_float32():
    x = jnp.asarray(tokens(0, 5000), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    for weights in (None, jnp.ones(5000, bool), jnp.ones(5000)):
        state = fold(Hessian(), (x, weights))
        assert state.matrix.dtype == jnp.float32 and float(state.count) == 5000
        np.testing.assert_allclose(state.matrix, exact.T @ exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("data"), P("data", "model"), P(None, None, "model")], ids=str)
def test_sharded_equals_unsharded(statistic, kind, spec):
    devices = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    site = SimpleNamespace(in_size=6)
    x = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
    mask = np.random.default_rng(1).random((8, 4)) < 0.7
    update = jax.jit(statistic.update)
    for weights in (None, mask):
        expected = update(statistic.init(site), jnp.asarray(x), weights)
        sharded = jax.device_put(x, NamedSharding(devices, spec))
        placed = None if weights is None else jax.device_put(weights, NamedSharding(devices, P(*spec[:2])))
        close(update(statistic.init(site), sharded, placed), expected)


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: type(s).__name__)
def test_in_shard_map_scan_and_vmap(statistic):
    x = tokens(0, 8, 3)
    whole = fold(statistic, (x, None))
    devices = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    states = jax.shard_map(
        lambda x: jax.tree.map(lambda leaf: leaf[None], statistic.update(statistic.init(SITE), x)),
        mesh=devices,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=False,
    )(x)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], jax.device_get(states)) for i in range(8)]
    merged = parts[0]
    for part in parts[1:]:
        merged = statistic.merge(merged, part)
    close(merged, whole)
    scanned, _ = jax.lax.scan(lambda s, x: (statistic.update(s, x), None), statistic.init(SITE), jnp.asarray(x))
    close(scanned, whole)
    experts = jax.vmap(statistic.update)(jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), statistic.init(SITE)), x)
    close(jax.tree.map(lambda leaf: leaf[3], experts), fold(statistic, (x[3], None)))


def test_nothing_seen_gives_zeros():
    assert (np.asarray(Hessian().finalize(Hessian().init(SITE))) == 0).all()
    assert all((np.asarray(x) == 0).all() for x in Moments().finalize(Moments().init(SITE)))
