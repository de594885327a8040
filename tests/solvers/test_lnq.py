"""LNQ against plain float64 loops, and against what it promises."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_oracle import objective, problem
from jax.extend.core import jaxprs_in_params

from jaxq.errors import JaxqError
from jaxq.formats.base import Layout
from jaxq.formats.codebook import Codebook, nearest
from jaxq.formats.packing import unpack
from jaxq.solvers import lnq as module
from jaxq.solvers.descent import (
    _at_once,
    _in_a_loop,
    descend,
    descent_coupling,
    product,
    schedule_for,
    table_point,
)
from jaxq.solvers.gptq import output_error
from jaxq.solvers.kmeans import kmeans
from jaxq.solvers.lnq import lnq, lnq_solve
from jaxq.solvers.tables import chunk_of, corrections

THREE = Codebook(3, "float32")
ROWS, OUT = 40, 6


@pytest.fixture
def real_tables():
    """Asks for the tables of k-means, which take long to compile."""


@pytest.fixture(autouse=True)
def first_tables(request, monkeypatch):
    """Quantiles in place of k-means: a start like any other, and hardly any code."""
    if "real_tables" in request.fixturenames:
        yield
        return
    monkeypatch.setattr(module, "fit_tables", quantiles)
    module._first_tables.clear_cache()
    yield
    module._first_tables.clear_cache()


def quantiles(w, importance, entries: int):
    """Weighted quantiles of each channel."""
    order = jnp.argsort(w, axis=0)
    share = jnp.cumsum(jnp.take_along_axis(importance, order, 0), 0) / jnp.sum(importance, 0)
    wanted = (jnp.arange(entries) + 0.5) / entries
    places = jnp.sum(share[None] < wanted[:, None, None], axis=1)
    return jnp.take_along_axis(jnp.take_along_axis(w, order, 0), jnp.minimum(places, len(w) - 1), 0)


def codes_of(q) -> np.ndarray:
    return np.asarray(unpack(q.codes, q.format.bits, q.matrix_shape[0]))


def columns(w, dense, hessian) -> np.ndarray:
    d = np.asarray(w, np.float64) - np.asarray(dense, np.float64)
    return np.einsum("io,ij,jo->o", d, np.asarray(hessian, np.float64), d)


def with_damping(hessian, damping=0.01) -> np.ndarray:
    hessian = np.asarray(hessian, np.float64)
    return hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))


def spread_tables(w, entries: int) -> np.ndarray:
    return np.quantile(w, (np.arange(entries) + 0.5) / entries, axis=0).astype(np.float32)


def plain_sweep(w, points, table, hessian, free) -> tuple[np.ndarray, float]:
    """Coordinate descent as the paper has it: (points, smallest distance from a boundary between entries)."""
    w, points, table, hessian = (np.array(x, np.float64) for x in (w, points, table, hessian))
    margin = np.inf
    for o in range(w.shape[1]):
        for i in range(len(w)):
            if not free[i, o] or hessian[i, i] == 0:
                continue
            rest = sum(hessian[i, j] * (w[j, o] - points[j, o]) for j in range(len(w)) if j != i)
            best = w[i, o] + rest / hessian[i, i]
            distance = np.sort(np.abs(table[:, o] - best))
            margin = min(margin, distance[1] - distance[0])
            points[i, o] = table[np.abs(table[:, o] - best).argmin(), o]
    return points, margin


def one_sweep(w, points, table, hessian, free) -> np.ndarray:
    schedule = schedule_for(len(w))
    hessian = jnp.asarray(hessian)
    coupling = schedule.pad(schedule.pad(descent_coupling(hessian)).T).T
    return np.asarray(jax.jit(descend, static_argnums=6)(coupling, hessian, w, points, table, free, schedule))


@pytest.mark.parametrize(("rows", "entries"), [(ROWS, 8), (150, 4)])
def test_a_sweep_is_the_double_loop(rows, entries):
    agreed = 0
    for seed in range(3):
        w, hessian = problem(seed, rows, 3)
        table = spread_tables(w, entries)
        free = np.random.default_rng(seed).random(w.shape) > 0.1
        start = np.where(free, np.take_along_axis(table, np.asarray(nearest(w, table)).astype(int), 0), w)
        expected, margin = plain_sweep(w, start, table, hessian, free)
        if margin > 1e-4:
            agreed += 1
            np.testing.assert_allclose(one_sweep(w, start, table, hessian, free), expected, rtol=1e-6)
    assert agreed


def test_sweeps_never_raise_the_objective():
    w, hessian = problem(5, 70, 8)
    table = spread_tables(w, 4)
    points, free = np.take_along_axis(table, np.asarray(nearest(w, table)).astype(int), 0), np.ones(w.shape, bool)
    last = columns(w, points, hessian)
    for _ in range(4):
        points = one_sweep(w, points, table, hessian, free)
        now = columns(w, points, hessian)
        assert (now <= last * (1 + 1e-5)).all()
        last = now


@pytest.mark.parametrize("entries", [2, 8, 32])
def test_all_ways_to_the_nearest_entry_agree(entries):
    rng = np.random.default_rng(entries)
    table = np.sort(rng.normal(size=(entries, 50)), axis=0).astype(np.float32)
    value = 2 * rng.normal(size=50).astype(np.float32)
    middles = (table[1:] + table[:-1]) / 2
    expected = np.take_along_axis(table, np.abs(table - value).argmin(0)[None], 0)[0]
    np.testing.assert_array_equal(_at_once(value, table, middles), expected)
    np.testing.assert_array_equal(_in_a_loop(value, jnp.asarray(table), jnp.asarray(middles)), expected)
    free = np.arange(50) % 2 == 0
    points, _ = table_point(value, value, jnp.asarray(table), jnp.asarray(middles), free)
    np.testing.assert_array_equal(points, np.where(free, expected, value))


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_the_closed_form_is_least_squares(chunk):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, ROWS)) @ (np.eye(ROWS) + 0.3)
    hessian = x.T @ x / 200
    w, free = rng.normal(size=(ROWS, 7)), rng.random((ROWS, 7)) > 0.1
    table = spread_tables(w, 8)
    codes = rng.integers(0, 7, size=w.shape).astype(np.uint8)
    points = np.where(free, np.take_along_axis(table, codes.astype(int), 0), w).astype(np.float32)
    h = jnp.asarray(hessian, jnp.float32)
    pull = product(h, jnp.asarray(w, jnp.float32) - points)
    found = np.asarray(corrections(h, jnp.asarray(codes), pull, jnp.asarray(free), 8, chunk)) + table
    for o in range(7):
        members = (codes[:, o, None] == np.arange(7)) & free[:, o, None]
        target = x @ np.where(free[:, o], w[:, o], 0)
        expected = np.linalg.lstsq(x @ members, target, rcond=None)[0]
        np.testing.assert_allclose(found[:7, o], expected, rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(found[7], table[7])


def test_chunks_stay_inside_the_bound():
    assert chunk_of(576, 1536, 8, 1) == 1536
    chunk = chunk_of(8192, 8192, 256, 2)
    assert 1 <= chunk and chunk * 8192 * 256 * 2 <= 2**25


def test_beats_nearest_codes_and_its_start_on_correlated_inputs(real_tables):
    w, hessian = problem(1, 96, 16)
    tables = lnq(w, hessian, THREE, rounds=0, sweeps=0, start="nearest")
    walked = lnq(w, hessian, THREE, rounds=0, sweeps=0)
    paper = lnq(w, hessian, THREE, start="nearest", sweeps=3)
    full = lnq(w, hessian, THREE)
    score = {name: objective(w, q.matrix(), hessian) for name, q in locals().items() if hasattr(q, "codes")}
    assert score["paper"] < 0.8 * score["tables"]
    assert score["walked"] < 0.8 * score["tables"]
    assert score["full"] < 0.97 * score["walked"] and score["full"] < score["paper"]


@pytest.mark.parametrize(("start", "format"), [("feedback", Codebook(3, "bfloat16")), ("nearest", Codebook(5))])
def test_no_channel_is_worse_than_with_the_first_table(start, format):
    for seed in range(3):
        w, hessian = problem(seed, ROWS, OUT)
        first = lnq(w, hessian, format, rounds=0, start=start)
        last = lnq(w, hessian, format, rounds=3, start=start)
        cost = with_damping(hessian)
        assert (columns(w, last.matrix(), cost) <= columns(w, first.matrix(), cost) * (1 + 1e-5) + 1e-6).all()


def test_tiny_problems_end_in_local_optima_above_the_global_one():
    for seed in range(3):
        w, hessian = problem(seed, 5, 3)
        q = lnq(w, hessian, Codebook(1), rounds=3, sweeps=12, damping=0.0)
        table, codes = np.asarray(q.table, np.float64), codes_of(q)
        best = np.full(3, np.inf)
        for choice in itertools.product(range(2), repeat=5):
            members = np.eye(2)[list(choice)]
            gram = members.T @ hessian @ members
            c = np.linalg.lstsq(gram, members.T @ hessian @ w, rcond=None)[0]
            best = np.minimum(best, columns(w, members @ c, hessian))
        found = columns(w, q.matrix(), hessian)
        assert (found >= best * (1 - 1e-4) - 1e-9).all()
        for i, o in itertools.product(range(5), range(3)):
            changed = codes.copy()
            changed[i, o] ^= 1
            dense = np.take_along_axis(table, changed.astype(int), 0)
            assert columns(w, dense, hessian)[o] >= found[o] * (1 - 1e-5)


@pytest.mark.parametrize("weights", ["identity", "diagonal"])
def test_without_correlation_it_is_weighted_kmeans(weights, real_tables):
    rng = np.random.default_rng(2)
    w = rng.normal(size=(ROWS, OUT)).astype(np.float32)
    diagonal = np.ones(ROWS) if weights == "identity" else rng.uniform(0.2, 3, ROWS)
    importance = np.broadcast_to(diagonal[:, None], w.shape).astype(np.float32)
    hessian = np.diag(diagonal).astype(np.float32)
    clusters = kmeans(w, importance, THREE)
    q = lnq(w, hessian, THREE, importance=importance, damping=0.0)
    assert (columns(w, q.matrix(), hessian) <= columns(w, clusters.matrix(), hessian) * (1 + 1e-5)).all()
    np.testing.assert_array_equal(q.matrix(), np.asarray(q.table)[codes_of(q), np.arange(OUT)])
    np.testing.assert_array_equal(codes_of(q), nearest(w, q.table))


def test_groups_of_channels_have_their_own_hessian():
    w, first = problem(6, ROWS, 18)
    hessians = np.stack([first, problem(7, ROWS, 9)[1], problem(8, ROWS, 9)[1]])
    q, used = lnq_solve(w, hessians, THREE)
    assert used["error"].shape == used["damping"].shape == used["fallback"].shape == ()
    power = error = 0.0
    for group, columns_of in enumerate((slice(0, 6), slice(6, 12), slice(12, 18))):
        alone = lnq(w[:, columns_of], hessians[group], THREE)
        np.testing.assert_allclose(q.matrix()[:, columns_of], alone.matrix(), rtol=1e-5, atol=1e-6)
        error += objective(w[:, columns_of], alone.matrix(), hessians[group])
        power += objective(w[:, columns_of], np.zeros((ROWS, 6)), hessians[group])
    assert float(used["error"]) == pytest.approx(np.sqrt(error / power), rel=1e-4)


def test_frozen_inputs_are_as_good_as_absent():
    w, hessian = problem(9, ROWS, OUT)
    frozen = np.zeros(w.shape, bool)
    gone = [3, 11, 39]
    frozen[gone] = True
    kept = np.setdiff1d(np.arange(ROWS), gone)
    w[gone] += 30
    importance = np.ones(w.shape, np.float32)
    settings = {"start": "nearest", "damping": 0.0}
    q, used = lnq_solve(w, hessian, THREE, frozen=frozen, importance=importance, **settings)
    smaller = lnq(w[kept], hessian[np.ix_(kept, kept)], THREE, importance=importance[kept], **settings)
    np.testing.assert_allclose(np.asarray(q.matrix())[kept], smaller.matrix(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(codes_of(q)[gone], nearest(w[gone], q.table))
    dense = np.where(frozen, w, q.matrix())
    reference = objective(w, np.zeros_like(w), hessian)
    assert float(used["error"]) == pytest.approx(np.sqrt(objective(w, dense, hessian) / reference), rel=1e-3)


def test_scattered_frozen_weights_do_not_move_with_their_value():
    w, hessian = problem(10, ROWS, OUT)
    frozen = np.random.default_rng(0).random(w.shape) < 0.2
    frozen[:, 0] = True
    other = np.where(frozen, w + 5, w).astype(np.float32)
    a, b = (np.asarray(lnq(x, hessian, THREE, frozen=frozen).matrix()) for x in (w, other))
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a[~frozen], b[~frozen], rtol=1e-4, atol=1e-5)
    cost = with_damping(hessian)
    without = np.where(frozen, w, lnq(w, hessian, THREE).matrix())
    assert columns(w, np.where(frozen, w, a), cost).sum() < columns(w, without, cost).sum()


def test_dead_inputs_cost_nothing_and_take_the_nearest_entry():
    w, hessian = problem(3, ROWS, OUT)
    dead = [0, 7, ROWS - 1]
    w[dead] *= 100
    hessian[dead] = 0
    hessian[:, dead] = 0
    live = np.setdiff1d(np.arange(ROWS), dead)
    q = lnq(w, hessian, THREE)
    alone = lnq(w[live], hessian[np.ix_(live, live)], THREE)
    np.testing.assert_array_equal(codes_of(q)[dead], nearest(w[dead], q.table))
    ours, theirs = (objective(w[live], x, hessian[np.ix_(live, live)]) for x in (
        np.asarray(q.matrix())[live], alone.matrix()))  # fmt: skip
    assert ours == pytest.approx(theirs, rel=0.02)
    nothing, used = lnq_solve(w, np.zeros_like(hessian), THREE)
    assert np.isfinite(np.asarray(nothing.matrix())).all() and float(used["error"]) == 0


def test_constant_and_few_valued_channels_are_exact():
    rng = np.random.default_rng(0)
    hessian = problem(0, ROWS, 4)[1]
    w = rng.choice(np.float32([-2, -0.5, 0.25, 1]), size=(ROWS, 4))
    w[:, 1], w[:, 2] = 0.75, 0
    q = lnq(w, hessian, Codebook(2))
    np.testing.assert_allclose(q.matrix(), w, atol=2e-3)


def test_a_hopeless_hessian_falls_back_and_says_so():
    w, hessian = problem(5, ROWS, OUT)
    hopeless = hessian - 50 * np.outer(np.ones(ROWS), np.ones(ROWS)) + 50 * np.eye(ROWS)
    q, used = lnq_solve(w, hopeless.astype(np.float32), THREE)
    assert bool(used["fallback"])
    assert np.isfinite(np.asarray(q.matrix())).all()


def test_batches_layouts_and_transformations():
    parts = [problem(seed, ROWS, OUT) for seed in range(2)]
    w, hessian = (np.stack(x) for x in zip(*parts, strict=True))
    single = [np.asarray(lnq(*part, THREE).matrix()) for part in parts]
    batched, used = lnq_solve(w, hessian, THREE)
    assert used["error"].shape == used["damping"].shape == used["fallback"].shape == (2,)
    assert float(used["error"][1]) == pytest.approx(float(output_error(w[1], batched[1], hessian[1])), rel=1e-4)
    np.testing.assert_allclose(batched.matrix(), single, rtol=1e-4, atol=1e-5)
    mapped = jax.vmap(lambda w, h: lnq(w, h, THREE))(w, hessian)
    np.testing.assert_allclose(mapped.matrix(), single, rtol=1e-4, atol=1e-5)
    shared = lnq(np.stack([w[0], w[0]]), hessian[0], THREE)
    np.testing.assert_allclose(shared.matrix()[0], single[0], rtol=1e-4, atol=1e-5)
    grouped = lnq(w, np.stack([hessian, hessian], axis=1), THREE)
    np.testing.assert_allclose(grouped.matrix(), single, rtol=1e-4, atol=1e-5)
    layout = Layout.of((2, 3, ROWS), (2,), (0, 1))
    logical = layout.from_canonical(jnp.asarray(w[0]))
    beside = {"importance": jnp.ones_like(logical), "frozen": logical > 9}
    q = lnq(logical.astype(jnp.bfloat16), hessian[0], THREE, layout=layout, rounds=0, **beside)
    assert q.shape == (2, 3, ROWS) and q.dtype == jnp.bfloat16


def test_the_same_input_gives_the_same_bits():
    w, hessian = problem(4, ROWS, OUT)
    a, b = lnq(w, hessian), lnq(w, hessian)
    assert a.format == Codebook() and (a.codes == b.codes).all() and (a.table == b.table).all()


def test_program_size_does_not_depend_on_the_width():
    def count(jaxpr) -> int:
        return sum(
            1 + sum(map(count, jaxprs_in_params(eqn.params))) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns
        )

    def size(width: int) -> int:
        w = jax.ShapeDtypeStruct((width, 64), jnp.float32)
        h = jax.ShapeDtypeStruct((width, width), jnp.float32)
        return count(jax.make_jaxpr(lambda w, h: lnq(w, h))(w, h))

    assert size(4096) == pytest.approx(size(512), rel=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w": np.zeros(5, np.float32)}, "no matrix"),
        ({"w": np.zeros((5, 0), np.float32)}, "empty"),
        ({"w": np.zeros((5, 4), np.int32)}, "floating point"),
        ({"w": np.full((5, 4), np.nan, np.float32)}, "weights hold NaN"),
        ({"w": np.full((5, 4), 1e6, np.float32)}, "does not fit float16"),
        ({"hessian": np.eye(4, dtype=np.float32)}, "does not fit weights"),
        ({"hessian": np.ones((3, 5, 5), np.float32)}, "cannot share 4"),
        ({"hessian": np.full((5, 5), np.inf, np.float32)}, "Hessian holds NaN"),
        ({"importance": np.ones((4, 4), np.float32)}, "importance has shape"),
        ({"importance": -np.ones((5, 4), np.float32)}, "negative"),
        ({"frozen": np.ones((5,), bool)}, "mask of frozen weights has shape"),
        ({"start": "best"}, "start is"),
        ({"rounds": -1}, "rounds is a whole number"),
        ({"sweeps": 1.5}, "sweeps is a whole number"),
        ({"damping": -1.0}, "damping"),
        ({"format": Codebook(1, group_size=2)}, "one table a channel, not one for each group of 2"),
    ],
)
def test_bad_input_gives_one_clear_line(change, words):
    w = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    with pytest.raises(JaxqError, match=words) as caught:
        lnq(**({"w": w, "hessian": np.eye(5, dtype=np.float32), "format": Codebook(1)} | change))
    assert "\n" not in str(caught.value)
