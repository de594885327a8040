"""Weighted k-means against float64 oracles, the examples of the method's specification, and its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kmeans_oracle import cost_of, dynamic_programming, every_partition, problem

from jaxq.errors import JaxqError
from jaxq.formats import Layout
from jaxq.formats.codebook import Codebook
from jaxq.formats.packing import unpack
from jaxq.solvers import kmeans as solver
from jaxq.solvers import lloyd, segments, sorted_sums
from jaxq.solvers.kmeans import fit_tables, kmeans, kmeans_solve

FULL = "float32"


@pytest.fixture(autouse=True)
def short_programs(monkeypatch):
    """Unrolling is for speed; most of the time of these tests goes into compilation."""
    monkeypatch.setattr(segments, "UNROLL", 1)


def tables(w, f, entries, method="exact"):
    return fit_tables(jnp.asarray(w), jnp.asarray(f), entries, method)


def column(*values) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def codes_of(q) -> np.ndarray:
    return np.asarray(unpack(q.codes, q.format.bits, q.matrix_shape[0]))


SIX = column(-3, -1, 0, 0.5, 4, 9), column(1, 2, 1, 4, 1, 0.5)


@pytest.mark.parametrize(
    ("x", "f", "expected", "cost"),
    [
        (column(0, 1, 2, 10, 11, 12), column(1, 1, 1, 1, 1, 4), (1, 11.5), 5.5),
        (*SIX, (-0.375, 17 / 3), 19.208333),
        (*SIX, (-0.375, 4, 9), 10.875),
        (*SIX, (-5 / 3, 0.4, 4, 9), 2.866667),
        (SIX[0], np.ones((6, 1), np.float32), (-0.875, 6.5), 19.6875),
        (column(0, 1, 10, 11, 20, 21), np.ones((6, 1), np.float32), (0.5, 10.5, 20.5), 1.5),
    ],
)
def test_examples_of_the_specification(x, f, expected, cost):
    table = np.asarray(tables(x, f, len(expected)))[:, 0]
    np.testing.assert_allclose(table, expected, rtol=1e-6)
    assert cost_of(x[:, 0], f[:, 0], table) == pytest.approx(cost, rel=1e-6)


def test_lloyd_stays_in_the_trap_that_the_exact_method_avoids():
    x = column(0, 1, 10, 11, 20, 21)
    channels = lloyd.Channels(jnp.asarray(x), jnp.ones((6, 1)))
    trap = column(0, 1, 15.5)
    np.testing.assert_array_equal(lloyd.iterate(channels, jnp.asarray(trap), 5), trap)
    assert float(channels.cost(jnp.asarray(trap))[0]) == 101


@pytest.mark.parametrize(("n", "entries"), [(1, 2), (2, 3), (5, 3), (10, 4)])
def test_equals_brute_force(n, entries):
    w, f = problem(n, n, 4, 3)
    found = np.asarray(tables(w, f, entries))
    for c in range(4):
        best = every_partition(w[:, c], f[:, c], entries)
        assert cost_of(w[:, c], f[:, c], found[:, c]) == pytest.approx(best, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(("n", "entries"), [(23, 3), (59, 32), (60, 8)])
@pytest.mark.parametrize("decades", [0.0, 8.0])
def test_equals_dynamic_programming_in_float64(n, entries, decades):
    w, f = problem(n + entries, n, 6, decades)
    found = np.asarray(tables(w, f, entries))
    for c in range(6):
        best = dynamic_programming(w[:, c], f[:, c], entries)
        assert cost_of(w[:, c], f[:, c], found[:, c]) == pytest.approx(best, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("sizes", [(60, 1, 1), (7, 1, 9), (1, 4, 15), (3, 7, 3)])
def test_blocks_and_groups_of_any_size_give_the_optimum(monkeypatch, sizes):
    monkeypatch.setattr(segments, "sizes", lambda n: segments.Sizes(*sizes))
    w, f = problem(3, 60, 3, 6)
    order = np.argsort(w, axis=0)
    x, f = np.take_along_axis(w, order, 0), np.take_along_axis(f, order, 0)
    cuts = np.asarray(jax.jit(lambda x, f: segments.best_cuts(x, f, 5))(x, f))
    for c in range(3):
        bounds = cuts[:, c]
        means = [np.average(x[a:b, c], weights=f[a:b, c]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        best = dynamic_programming(x[:, c], f[:, c], 5)
        assert cost_of(x[:, c], f[:, c], means) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(("n", "most"), [(60, 32), (576, 84), (1536, 71), (4096, 95), (14336, 134)])
def test_segment_costs_are_few_and_as_many_as_evaluations_says(monkeypatch, n, most):
    counted, fold = [], segments._fold

    def counting(combine, start, count, term):
        counted.append(count * start.size)
        return fold(combine, start, count, term)

    monkeypatch.setattr(segments, "_fold", counting)
    jax.eval_shape(lambda x: segments.best_cuts(x, x, 8), jax.ShapeDtypeStruct((n, 1), jnp.float32))
    assert 6 * sum(counted) == segments.evaluations(n, 8) <= 6 * most * n


def test_one_heavy_weight_does_not_hide_the_others():
    w, f = problem(5, 60, 6, 2)
    f[7] = 1e8
    found = np.asarray(tables(w, f, 8))
    for c in range(4):
        best = dynamic_programming(w[:, c], f[:, c], 8)
        # The heavy weight's own error: tables are accurate to a float32 step of the widest weight.
        slack = 1e8 * (1.2e-7 * np.abs(w[:, c]).max()) ** 2
        assert cost_of(w[:, c], f[:, c], found[:, c]) <= best * (1 + 1e-5) + slack


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_number_of_bits(bits):
    w, f = problem(bits, 40, 3, 4)
    q, used = kmeans_solve(w, f, Codebook(bits, FULL), method="exact")
    assert q.shape == w.shape and q.table.shape == (2**bits, 3)
    assert (np.diff(q.table, axis=0) >= 0).all()
    for c in range(3):
        best = dynamic_programming(w[:, c], f[:, c], 2**bits)
        found = f[:, c].astype(np.float64) @ (np.asarray(q.matrix(), np.float64)[:, c] - w[:, c]) ** 2
        assert found == pytest.approx(best, rel=1e-5, abs=1e-11)
    if 2**bits >= 40:
        np.testing.assert_allclose(q.matrix(), w, rtol=3e-7, atol=3e-7)
        assert used["error"] < 1e-6


@pytest.mark.parametrize("method", ["exact", "lloyd"])
def test_few_distinct_values_are_kept(method):
    rng = np.random.default_rng(0)
    w = rng.choice(np.array([-2.0, -0.25, 0.5, 3.0], np.float32), (50, 4))
    f = rng.uniform(0.1, 1, (50, 4)).astype(np.float32)
    q = kmeans(w, f, Codebook(2, FULL), method=method)
    np.testing.assert_allclose(q.matrix(), w, rtol=1e-6)


def test_exact_is_never_above_lloyd_and_falls_with_the_entries():
    w, f = problem(9, 60, 6, 5)
    before = np.full(6, np.inf)
    for entries in (1, 3, 8):
        exact, approximate = (np.asarray(tables(w, f, entries, method)) for method in ("exact", "lloyd"))
        cost = np.array([cost_of(w[:, c], f[:, c], exact[:, c]) for c in range(6)])
        other = np.array([cost_of(w[:, c], f[:, c], approximate[:, c]) for c in range(6)])
        assert (cost <= other * (1 + 1e-6)).all() and (cost <= before * (1 + 1e-6)).all()
        before = cost


def test_lloyd_never_gets_worse():
    w, f = problem(10, 200, 5, 6)
    order = np.argsort(w, axis=0)
    channels = lloyd.Channels(*(jnp.asarray(np.take_along_axis(z, order, 0)) for z in (w, f)))
    step, cost_of_table = jax.jit(channels.step), jax.jit(channels.cost)
    for start in (lloyd.spread_start, lloyd.farthest_start):
        table = start(channels, 8)
        assert (np.diff(table, axis=0) >= 0).all()
        cost = cost_of_table(table)
        for _ in range(12):
            table = step(table)
            later = cost_of_table(table)
            assert (np.diff(table, axis=0) >= 0).all() and (later <= cost * (1 + 1e-5)).all()
            cost = later


def test_an_empty_cell_keeps_its_centroid():
    channels = lloyd.Channels(jnp.asarray(column(0, 1, 2, 3)), jnp.asarray(column(1, 1, 0, 1)))
    np.testing.assert_allclose(channels.step(jnp.asarray(column(0, 2, 2.2, 9)))[:, 0], (0.5, 2, 3, 9))


@pytest.mark.parametrize("method", ["exact", "lloyd"])
@given(
    seed=st.integers(0, 2**16), scale=st.floats(1e-6, 1e6), shift=st.floats(-3, 3), weight=st.floats(1e-20, 1e20)
)
def test_laws(method, seed, scale, shift, weight):
    w, f = problem(seed, 24, 2, 3)
    # Values on a grid of powers of two, so that the map is exact and no tie is broken by its rounding.
    w, scale = np.round(w * 64) / 64, np.float32(2.0 ** np.round(np.log2(scale)))
    shift = np.float32(np.round(shift * 4) / 4)
    table = np.asarray(tables(w, f, 4, method))
    mapped = np.asarray(tables(scale * (w + shift), f, 4, method))
    costs = [[cost_of(w[:, c], f[:, c], t[:, c]) for c in range(2)] for t in (table, mapped / scale - shift)]
    np.testing.assert_allclose(costs[1], costs[0], rtol=1e-4, atol=1e-11)
    heavier = np.asarray(tables(w, (f * np.float32(2.0 ** np.round(np.log2(weight)))), 4, method))
    np.testing.assert_allclose(heavier, table, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["exact", "lloyd"])
def test_the_order_of_inputs_does_not_matter(method):
    w, f = problem(11, 24, 2, 3)
    order = np.random.default_rng(0).permutation(24)
    np.testing.assert_array_equal(tables(w[order], f[order], 4, method), tables(w, f, 4, method))


def test_a_weight_without_importance_moves_nothing_but_has_a_code():
    w, f = problem(12, 30, 3, 2)
    f[4] = 0
    q = kmeans(w, f, Codebook(2, FULL))
    moved = np.array(w)
    moved[4] += 1e-3
    np.testing.assert_allclose(kmeans(moved, f, Codebook(2, FULL)).table, q.table, rtol=1e-5)
    distance = np.abs(np.asarray(q.table) - w[4])
    np.testing.assert_array_equal(codes_of(q)[4], distance.argmin(axis=0))


def test_channels_without_importance_count_all_alike():
    w, f = problem(13, 30, 3, 2)
    ones = np.ones_like(f)
    partly = np.array(f)
    partly[:, 1] = 0
    np.testing.assert_array_equal(
        kmeans(w, partly, Codebook(2)).table[:, 1], kmeans(w, ones, Codebook(2)).table[:, 1]
    )
    np.testing.assert_array_equal(kmeans(w, None, Codebook(2)).table, kmeans(w, ones, Codebook(2)).table)
    q, used = kmeans_solve(w, np.zeros_like(f), Codebook(2))
    np.testing.assert_array_equal(q.table, kmeans(w, None, Codebook(2)).table)
    assert 0 < used["error"] < 1


def test_frozen_weights_cost_nothing():
    w, f = problem(14, 30, 3, 2)
    frozen = np.zeros(w.shape, bool)
    frozen[[2, 9]] = True
    frozen[:, 2] = True
    w[9, :2] = 50
    q, used = kmeans_solve(w, f, Codebook(3, FULL), frozen=frozen)
    zeroed = np.where(frozen, 0, f)
    np.testing.assert_array_equal(q.table[:, :2], kmeans(w, zeroed, Codebook(3, FULL)).table[:, :2])
    assert q.table[:, :2].max() < 10 and np.isfinite(q.table).all()
    alone = np.zeros_like(f)
    alone[:, 0] = np.where(frozen[:, 0], 1, 0)
    kept = kmeans(w, alone, Codebook(3, FULL), frozen=frozen)
    np.testing.assert_array_equal(
        kept.table[:, :2], kmeans(w, None, Codebook(3, FULL), frozen=frozen).table[:, :2]
    )
    assert used["error"].shape == () and 0 <= used["error"] < 1


def test_the_error_is_the_weighted_one():
    w, f = problem(15, 30, 3, 2)
    q, used = kmeans_solve(w, f, Codebook(2))
    difference = np.asarray(q.matrix(), np.float64) - w
    expected = np.sqrt((f * difference**2).sum() / (f * w.astype(np.float64) ** 2).sum())
    assert float(used["error"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tables_are_of_the_stored_dtype_and_codes_nearest_in_it(dtype):
    w, f = problem(16, 60, 3, 2)
    q = kmeans(w, f, Codebook(4, dtype))
    assert q.table.dtype == dtype
    table = np.asarray(q.table, np.float64)
    distance = np.abs(w[:, None].astype(np.float64) - table[None])
    chosen = np.take_along_axis(distance, codes_of(q)[:, None].astype(int), 1)[:, 0]
    np.testing.assert_allclose(chosen, distance.min(axis=1), atol=1e-7)


def test_batches_layouts_dtypes_and_transformations():
    w, f = problem(17, 24, 6, 2)
    single = kmeans(w, f, Codebook(2))
    stacked = kmeans(np.stack([w, 2 * w]), np.stack([f, f]), Codebook(2))
    assert stacked.shape == (2, 24, 6)
    np.testing.assert_array_equal(codes_of(jax.tree.map(lambda z: z[0], stacked)), codes_of(single))
    np.testing.assert_allclose(stacked.table[1], 2 * np.asarray(single.table))
    layout = Layout.of((3, 2, 24), in_axes=(2,), out_axes=(0, 1))
    logical = layout.from_canonical(jnp.asarray(w))
    shaped = kmeans(logical, layout.from_canonical(jnp.asarray(f)), Codebook(2), layout=layout)
    canonical = kmeans(logical, f, Codebook(2), layout=layout, frozen=np.zeros(w.shape, bool))
    assert shaped.shape == (3, 2, 24)
    for q in (shaped, canonical, jax.jit(lambda w, f: kmeans(w, f, Codebook(2)))(w, f)):
        np.testing.assert_array_equal(codes_of(q), codes_of(single))
    mapped = jax.vmap(lambda w: fit_tables(w, jnp.asarray(f), 4, "exact"))(jnp.stack([w, 2 * w]))
    np.testing.assert_allclose(mapped[1], 2 * tables(w, f, 4), rtol=1e-6)
    half = kmeans(jnp.asarray(w, jnp.bfloat16), f, Codebook(2))
    assert half.dtype == jnp.bfloat16


def test_each_group_is_solved_by_itself():
    (w, f), size = problem(22, 40, 5, 2), 16
    f[16:32, 3] = 0  # A group without importance counts its weights alike.
    frozen = np.random.default_rng(3).random(w.shape) < 0.1
    format, own = Codebook(2, FULL, size), Codebook(2, FULL)
    for kept in (None, frozen):
        q, used = kmeans_solve(w, f, format, frozen=kept)
        assert q.shape == w.shape and q.table.shape == (3 * 4, 5)
        for group, first in enumerate(range(0, 40, size)):
            rows = slice(first, first + size)
            alone = kmeans(w[rows], f[rows], own, frozen=None if kept is None else kept[rows])
            np.testing.assert_allclose(q.table[4 * group : 4 * group + 4], alone.table, rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(codes_of(q)[rows], codes_of(alone))
        live = f if kept is None else np.where(kept, 0, f)
        difference = np.asarray(q.matrix(), np.float64) - w
        expected = np.sqrt((live * difference**2).sum() / (live * w.astype(np.float64) ** 2).sum())
        assert float(used["error"]) == pytest.approx(expected, rel=1e-4)
    stacked = kmeans(np.stack([w, 2 * w]), np.stack([f, f]), format, frozen=np.stack([frozen, frozen]))
    np.testing.assert_array_equal(codes_of(jax.tree.map(lambda z: z[0], stacked)), codes_of(q))
    np.testing.assert_allclose(stacked.table[1], 2 * np.asarray(q.table))
    errors = [float(kmeans_solve(w, None, some)[1]["error"]) for some in (own, format)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", ["exact", "lloyd"])
def test_chunks_of_channels_change_nothing(monkeypatch, method):
    w, f = problem(18, 10, 70, 2)
    whole = fit_tables(jnp.asarray(w), jnp.asarray(f), 4, method)
    monkeypatch.setattr(solver, "MEMORY", {"cpu": 1})
    np.testing.assert_array_equal(fit_tables(jnp.asarray(w), jnp.asarray(f), 4, method), whole)


def test_auto_is_exact_where_that_is_fast(monkeypatch):
    w, f = problem(19, 60, 6, 4)
    np.testing.assert_array_equal(tables(w, f, 8, "auto"), tables(w, f, 8))
    monkeypatch.setattr(solver, "BUDGET_SECONDS", 0.0)
    np.testing.assert_array_equal(tables(w, f, 8, "auto"), tables(w, f, 8, "lloyd"))


def test_weighted_is_at_most_unweighted_in_every_channel():
    w, f = problem(20, 60, 6, 4)
    weighted, plain = tables(w, f, 8), tables(w, np.ones_like(f), 8)
    for c in range(6):
        assert cost_of(w[:, c], f[:, c], weighted[:, c]) <= cost_of(w[:, c], f[:, c], plain[:, c]) * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale):
    w, f = problem(21, 24, 2, 3)
    found = tables(w * np.float32(scale), f * np.float32(1e-30), 4)
    np.testing.assert_allclose(np.asarray(found) / scale, tables(w, f, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.full((4, 2), np.nan, np.float32)}, "weights hold NaN"),
        ({"w": np.zeros((4, 2), np.int32)}, "floating point"),
        ({"w": np.zeros(4, np.float32)}, "no matrix"),
        ({"w": np.zeros((0, 2), np.float32)}, "empty"),
        ({"importance": -np.ones((4, 2), np.float32)}, "negative"),
        ({"importance": np.full((4, 2), np.inf, np.float32)}, "infinite"),
        ({"importance": np.full((4, 2), np.nan, np.float32)}, "NaN"),
        ({"importance": np.ones((2, 4), np.float32)}, "does not fit"),
        ({"importance": np.ones((4, 2), np.int32)}, "floating point"),
        ({"frozen": np.ones((4, 2), np.float32)}, "bool"),
        ({"frozen": np.ones((2, 2), bool)}, "frozen"),
        ({"method": "best"}, "unknown k-means method"),
        ({"format": Codebook(2, group_size=8)}, "group size 8 is larger than the input width 4"),
        ({"w": np.full((4, 2), 1e6, np.float32)}, "does not fit float16"),
    ],
)
def test_bad_input(change, message):
    given = {"w": np.ones((4, 2), np.float32), "importance": None} | change
    with pytest.raises(JaxqError, match=message):
        kmeans(given.pop("w"), given.pop("importance"), **({"format": Codebook(2)} | given))


def test_bad_arguments_of_fit_tables():
    with pytest.raises(JaxqError, match="at least one"):
        fit_tables(jnp.ones((4, 2)), jnp.ones((4, 2)), 0)
    with pytest.raises(JaxqError, match="unknown"):
        fit_tables(jnp.ones((4, 2)), jnp.ones((4, 2)), 2, "best")


def test_running_sums_keep_what_float32_loses():
    f = np.array([1.0, 3e-9, 2e-9, 5e-10], np.float32)[:, None]
    sums = sorted_sums.running_sums(sorted_sums.Double(jnp.asarray(f), jnp.zeros_like(f)))
    cuts = jnp.asarray([[0], [1], [2], [4]])
    np.testing.assert_allclose(sorted_sums.between(sums, cuts)[:, 0], (1, 3e-9, 2.5e-9), rtol=1e-5)
    high, low = sorted_sums.product(jnp.float32(1 + 2**-20), jnp.float32(1 + 2**-21))
    assert float(np.float64(high) + np.float64(low)) == (1 + 2**-20) * (1 + 2**-21)
    counted = sorted_sums.count_up_to(jnp.asarray(column(1, 2, 2, 5)), jnp.asarray(column(0, 2, 4, 9)))
    np.testing.assert_array_equal(counted[:, 0], (0, 3, 3, 4))
