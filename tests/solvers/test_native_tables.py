"""Exact k-means in C++, against dynamic programming in NumPy."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from kmeans_oracle import cost_of, dynamic_programming

from jaxq.kernels import native
from jaxq.solvers import kmeans as solver

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.reason()}")


def scaled(f):
    """Importance over its greatest; that of a channel without any counts all alike."""
    f = np.asarray(f, np.float64)
    return f / f.max() if f.max() > 0 else np.ones_like(f)


@given(
    n=st.integers(1, 30),
    entries=st.integers(1, 9),
    spread=st.sampled_from([0.0, 1.0, 8.0, 20.0]),
    kind=st.sampled_from(["normal", "grid", "far"]),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_the_cost_is_the_least(n, entries, spread, kind, zeros, seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((2, n))
    w = {"normal": w * 0.02, "grid": np.round(2 * w), "far": 1000 + w}[kind].astype(np.float32)
    f = np.exp(spread * rng.standard_normal((2, n))).astype(np.float32) * (rng.random((2, n)) >= zeros)
    f = f.astype(np.float32)
    tables = np.asarray(native.tables(jnp.asarray(w), jnp.asarray(f), entries))
    assert tables.shape == (2, entries) and tables.dtype == np.float32
    for row in range(2):
        assert np.all(np.diff(tables[row]) >= 0)
        # An entry is a float32, and lies that far from the mean that it stands for.
        rounding = np.square(np.spacing(np.abs(w[row]).max())) * n
        weight = scaled(f[row])
        found, least = cost_of(w[row], weight, tables[row]), dynamic_programming(w[row], weight, entries)
        assert found <= least * (1 + 1e-6) + rounding


def test_many_points_as_in_xla():
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((1500, 6)) * 0.02).astype(np.float32)
    f = np.exp(3 * rng.standard_normal(w.shape)).astype(np.float32)
    for entries in (4, 16):
        ours = np.asarray(native.tables(w.T, f.T, entries))
        theirs = np.asarray(solver._fit_tables(jnp.asarray(w), jnp.asarray(f), entries, True, 6)).T
        for row in range(6):
            a, b = (cost_of(w[:, row], f[:, row], t[row]) for t in (ours, theirs))
            assert a <= b * (1 + 1e-6)


def test_batches_and_what_is_not_finite():
    rng = np.random.default_rng(1)
    w, f = (jnp.asarray(rng.standard_normal((3, 4, 50)) ** 2, jnp.float32) for _ in range(2))
    together = jax.vmap(lambda a, b: native.tables(a, b, 5))(w, f)
    shared = jax.vmap(lambda b: native.tables(w[0], b, 5))(f)
    for i in range(3):
        np.testing.assert_array_equal(together[i], native.tables(w[i], f[i], 5))
        np.testing.assert_array_equal(shared[i], native.tables(w[0], f[i], 5))
    bad = w[0].at[0, 3].set(jnp.nan).at[1, 0].set(jnp.inf).at[2].set(jnp.nan)
    some = native.tables(bad, f[0].at[3, 2].set(jnp.nan), 5)
    assert some.shape == (4, 5)


def test_large_matrices_take_it_and_small_ones_do_not(monkeypatch):
    rng = np.random.default_rng(2)
    w, f = (jnp.asarray(rng.standard_normal((600, 256)) ** 2, jnp.float32) for _ in range(2))
    called = []
    real = native.tables
    monkeypatch.setattr(native, "tables", lambda *args: called.append(args[0].shape) or real(*args))
    table = solver.fit_tables(w, f, 8, "exact")
    assert called == [(256, 600)]
    np.testing.assert_array_equal(table, real(w.T, f.T, 8).T)
    solver.fit_tables(w[:, :2], f[:, :2], 8, "exact")
    solver.fit_tables(w, f, 8, "lloyd")
    assert len(called) == 1
    monkeypatch.setattr(native, "available", lambda: False)
    plain = solver.fit_tables(w, f, 8, "exact")
    assert len(called) == 1
    for row in range(0, 256, 64):
        a, b = (cost_of(w[:, row], f[:, row], t[:, row]) for t in (table, plain))
        assert abs(a - b) <= 1e-6 * b
