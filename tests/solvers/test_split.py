"""Dense and sparse: which weights leave, and that they come back exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.errors import JaxqError
from jaxq.formats import Codebook, DenseSparse, Layout, Uniform
from jaxq.formats.codebook import assemble, nearest, store
from jaxq.solvers.gptq import gptq_solve
from jaxq.solvers.rtn import rtn
from jaxq.solvers.split import overlay, select, solve_split


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, size=shape).astype(np.float32)


def quantiles(w, format, *, layout=None, frozen=None):
    """A simple codebook solver: tables at even quantiles."""
    table = store(jnp.quantile(w, (jnp.arange(format.entries) + 0.5) / format.entries, axis=-2), format)
    table = jnp.moveaxis(table, 0, -2)
    return assemble(nearest(w, table), table, format, layout, w.dtype), {"frozen": frozen}


def slow_select(w, count, sensitivity, sensitive):
    """By sorting, with NumPy."""
    mask = np.zeros(w.size, bool)
    if sensitive:
        mask[np.argsort(-sensitivity.reshape(-1), kind="stable")[:sensitive]] = True
    rest = np.where(mask, -1.0, np.abs(w.reshape(-1)))
    mask[np.argsort(-rest, kind="stable")[: count - sensitive]] = True
    return mask.reshape(w.shape)


@given(
    seed=st.integers(0, 10**6),
    count=st.sampled_from([0, 1, 23, 70]),
    part=st.sampled_from([0, 0.4, 1]),
    ties=st.booleans(),
)
def test_select_is_a_stable_sort(seed, count, part, ties):
    rng = np.random.default_rng(seed)
    w, sensitivity = rng.normal(size=(10, 7)).astype(np.float32), rng.lognormal(3, 8, (10, 7)).astype(np.float32)
    if ties:
        w, sensitivity = np.round(w), np.floor(np.minimum(sensitivity, 3))
    sensitive = round(part * count)
    mask = select(jnp.asarray(w), count, jnp.asarray(sensitivity), sensitive)
    np.testing.assert_array_equal(mask, slow_select(w, count, sensitivity, sensitive))


def test_select_at_the_ends_of_the_floats():
    w = jnp.array([[0.0, -0.0, 1e-45], [-1e-40, 3.4e38, -3.4e38]])
    assert select(w, 4, None, 0).tolist() == [[False, False, True], [True, True, True]]
    assert select(jnp.zeros((3, 2)), 3, None, 0).tolist() == [[True, True], [True, False], [False, False]]
    assert int(select(jnp.zeros((3, 2)), 6, None, 0).sum()) == 6


def test_select_compiles_and_maps():
    w, sensitivity = normal(3, 40, 8), np.abs(normal(3, 40, 8, seed=1))
    run = jax.jit(jax.vmap(lambda w, s: select(w, 20, s, 5)))
    expected = np.stack([slow_select(*pair, 5) for pair in ((w[i], 20, sensitivity[i]) for i in range(3))])
    np.testing.assert_array_equal(run(w, sensitivity), expected)
    assert select(jnp.asarray(w[0], jnp.bfloat16), 20, None, 0).sum() == 20


BASES = [(rtn, Uniform(3, 16)), (rtn, Uniform(2, None, symmetric=True)), (quantiles, Codebook(3))]


@pytest.mark.parametrize(
    ("solve", "base"), BASES, ids=lambda value: str(value) if isinstance(value, Uniform) else ""
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_removed_weights_come_back(solve, base, dtype):
    w, sensitivity = jnp.asarray(normal(48, 20), dtype), np.abs(normal(48, 20, seed=1))
    format = DenseSparse(base, 0.05)
    q, _ = solve_split(solve, w, {}, format, sensitivity=sensitivity, sensitive=0.01)
    assert q.dtype == dtype and q.format == format and q.base.format == base
    exact = np.asarray(w, np.float32)
    mask = slow_select(exact, 48, sensitivity, 10)
    both, dense = np.asarray(q.matrix(jnp.float32)), np.asarray(q.base.matrix(jnp.float32))
    # Spec test 7: one rounding where weights were removed, nothing added elsewhere.
    np.testing.assert_allclose(both[mask], exact[mask], rtol=0, atol=np.spacing(np.abs(exact).max()))
    np.testing.assert_array_equal(both[~mask], dense[~mask])
    assert q.values.shape == (48,) and mask.sum() == 48
    expected = solve(jnp.where(mask, 0, w), base)
    expected = expected[0] if isinstance(expected, tuple) else expected
    np.testing.assert_array_equal(dense, expected.matrix(jnp.float32))
    assert ((both - exact) ** 2).sum() < ((dense - exact) ** 2).sum()


def test_entries_are_sorted_and_disjoint():
    w = normal(30, 11)
    w[:, 3] = 0
    q, _ = solve_split(rtn, w, {}, DenseSparse(Uniform(4, None), 0.1))
    rows, starts, counts = (np.asarray(x).astype(int) for x in (q.rows, q.starts, q.counts))
    mask = slow_select(w, 33, None, 0)
    np.testing.assert_array_equal(counts, mask.sum(axis=0))
    np.testing.assert_array_equal(starts, np.cumsum(counts) - counts)
    assert counts[3] == 0 and counts.sum() == 33
    for column in range(11):
        mine = rows[starts[column] : starts[column] + counts[column]]
        np.testing.assert_array_equal(mine, np.flatnonzero(mask[:, column]))


def test_layout_batch_and_frozen_mask():
    leaf, sensitivity = normal(2, 6, 4, 5), np.abs(normal(2, 6, 4, 5, seed=1))
    layout = Layout.of((6, 4, 5), (1, 2), (0,))
    format = DenseSparse(Codebook(2), 0.1)
    options = {"sensitive": 0.05, "layout": layout}
    q, told = solve_split(quantiles, leaf, {}, format, sensitivity=sensitivity, **options)
    assert q.shape == leaf.shape and q.base.shape == (2, 20, 6) and q.base.layout == Layout()
    canonical = [np.asarray(layout.to_canonical(jnp.asarray(x))) for x in (leaf, sensitivity)]
    mask = np.stack([slow_select(canonical[0][i], 12, canonical[1][i], 6) for i in range(2)])
    np.testing.assert_array_equal(told["frozen"], mask)
    np.testing.assert_allclose(np.asarray(q.matrix())[mask], canonical[0][mask], rtol=1e-6)
    again, _ = solve_split(quantiles, leaf, {}, format, sensitivity=canonical[1], **options)
    jax.tree.map(np.testing.assert_array_equal, again, q)
    one, _ = solve_split(quantiles, leaf[1], {}, format, sensitivity=sensitivity[1], **options)
    jax.tree.map(np.testing.assert_array_equal, one, q[1])


def test_statistics_options_and_diagnostics_pass_through():
    w, x = normal(32, 8), normal(64, 32, seed=1)
    format = DenseSparse(Uniform(3, 8), 0.02)
    q, told = solve_split(gptq_solve, w, {"hessian": x.T @ x}, format, order="activation")
    rest = np.where(slow_select(w, 5, None, 0), 0, w)
    alone, expected = gptq_solve(rest, x.T @ x, format.base, order="activation")
    np.testing.assert_array_equal(q.base.codes, alone.codes)
    assert told.keys() == expected.keys()


def test_compiles_whole():
    format = DenseSparse(Uniform(4, 8), 0.05, "bfloat16")
    run = jax.jit(lambda w: solve_split(rtn, w, {}, format)[0])
    w = normal(16, 8)
    jax.tree.map(np.testing.assert_array_equal, run(w), solve_split(rtn, w, {}, format)[0])


def test_overlay_never_stores_the_weight():
    w, format = jnp.asarray(normal(16, 4)), DenseSparse(Codebook(1), 0.1)
    table = jnp.tile(jnp.array([[3.0], [5.0]]), (1, 4))
    base = assemble(nearest(w, table), table, format.base, Layout(perm=(1, 0)), jnp.bfloat16)
    mask = select(w, 6, None, 0)
    q = overlay(w, base, mask, format, Layout(perm=(1, 0)), jnp.float16)
    assert q.shape == (4, 16) and q.dtype == jnp.float16
    assert q.base.layout == Layout() and q.base.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(q.matrix(jnp.float32))[mask], w[mask], rtol=1e-6)
    assert jax.tree.structure(format.abstract((16, 4), jnp.float16, q.layout)) == jax.tree.structure(q)


FORMAT = DenseSparse(Uniform(4, None), 0.1)


@pytest.mark.parametrize(
    ("w", "options", "words"),
    [
        (np.ones((8, 4), int), {}, "floating point"),
        (normal(8), {}, "no matrix"),
        (normal(8, 0), {}, "empty"),
        (np.full((8, 4), np.nan, np.float32), {}, "NaN or infinite"),
        (normal(8, 4), {"sensitive": 0.2}, "part of the sparsity 0.1"),
        (normal(8, 4), {"sensitive": -0.1}, "part of the sparsity"),
        (normal(8, 4), {"sensitive": 0.05}, "without one"),
        (normal(8, 4), {"sensitive": 0.05, "sensitivity": normal(4, 8)}, "does not belong"),
        (normal(8, 4), {"sensitive": 0.05, "sensitivity": np.full((8, 4), np.inf)}, "the sensitivity holds"),
    ],
)
def test_bad_input_is_named(w, options, words):
    with pytest.raises(JaxqError, match=words):
        solve_split(rtn, w, {}, FORMAT, **options)


def test_an_overlay_that_does_not_fit_is_named():
    w = normal(8, 4)
    w[2, 1] = 1e6
    with pytest.raises(JaxqError, match="does not fit float16"):
        solve_split(rtn, w, {}, DenseSparse(Uniform(4, None), 0.1, "float16"))
    q, _ = solve_split(rtn, w, {}, DenseSparse(Uniform(4, None), 0.1, "bfloat16"))
    assert float(q.dequantize()[2, 1]) == pytest.approx(1e6, rel=2**-8)
