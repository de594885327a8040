"""GPTQ against the paper's algorithm in float64, and at its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_oracle import gptq as plain_gptq
from gptq_oracle import objective, problem
from jax.extend.core import jaxprs_in_params

from jaxq.errors import JaxqError
from jaxq.formats import Uniform
from jaxq.formats.packing import unpack
from jaxq.solvers import gptq as solver
from jaxq.solvers import schedule
from jaxq.solvers.gptq import gptq, gptq_solve, output_error
from jaxq.solvers.rtn import rtn

ROWS, OUT = 72, 6
GROUPED = Uniform(3, 20)


def codes_of(q) -> np.ndarray:
    return np.asarray(unpack(q.codes, q.format.bits, q.matrix_shape[0]))


@pytest.mark.parametrize(
    ("format", "change"),
    [
        (GROUPED, {}),
        (Uniform(2, 8, scale_dtype="float32"), {}),
        (Uniform(4, 36, symmetric=True), {}),
        (Uniform(4, None), {}),
        (GROUPED, {"groups": "static"}),
        (GROUPED, {"order": "activation"}),
    ],
    ids=["ragged", "small groups", "symmetric", "channel", "static", "activation"],
)
def test_equals_the_paper_in_float64(format, change):
    agreed = 0
    for seed in range(4):
        w, hessian = problem(seed, ROWS, OUT)
        q = gptq(w, hessian, format, **change)
        expected, codes, margin = plain_gptq(
            w, hessian, format, static="groups" in change, activation="order" in change
        )
        # A value this close to a rounding boundary may fall on either side in float32.
        if margin > 1e-4:
            agreed += 1
            np.testing.assert_array_equal(codes_of(q), codes)
            np.testing.assert_allclose(q.matrix(), expected, rtol=1e-6)
            found = objective(w, q.matrix(), hessian)
            assert found == pytest.approx(objective(w, expected, hessian), rel=1e-4)
    assert agreed >= 2


def test_equals_the_paper_over_many_panels(monkeypatch):
    monkeypatch.setattr(schedule, "PANEL", 128)
    w, hessian = problem(12, 520, 3)
    format = Uniform(4, 104, scale_dtype="float32")
    q = jax.jit(lambda w, h: gptq(w, h, format))(w, hessian)
    expected, codes, margin = plain_gptq(w, hessian, format)
    assert schedule.plan(520, 104).sizes == (104, 13)
    assert margin > 1e-4
    np.testing.assert_array_equal(codes_of(q), codes)


def test_dead_inputs_become_zero_and_disturb_nothing():
    w, hessian = problem(3, ROWS, OUT)
    dead = [0, 7, ROWS - 1]
    w[dead] *= 100
    hessian[dead] = 0
    hessian[:, dead] = 0
    live = np.setdiff1d(np.arange(ROWS), dead)
    format = Uniform(4, None)
    q = gptq(w, hessian, format)
    assert (np.asarray(q.matrix())[dead] == 0).all()
    expected, _, margin = plain_gptq(w[live], hessian[np.ix_(live, live)], format)
    assert margin > 1e-5
    np.testing.assert_allclose(np.asarray(q.matrix())[live], expected, rtol=1e-6)
    nothing = gptq(w, np.zeros_like(hessian), format)
    assert (np.asarray(nothing.matrix()) == 0).all()


def test_damping_grows_until_the_factor_exists():
    w, hessian = problem(4, ROWS, OUT)
    _, healthy = gptq_solve(w, hessian, GROUPED)
    assert float(healthy["damping"]) == pytest.approx(0.01) and not bool(healthy["fallback"])
    values, vectors = np.linalg.eigh(hessian)
    values[0] = -0.05 * np.diag(hessian).mean()
    q, used = gptq_solve(w, (vectors * values @ vectors.T).astype(np.float32), GROUPED)
    assert float(used["damping"]) == pytest.approx(0.1) and not bool(used["fallback"])
    assert np.isfinite(np.asarray(q.matrix())).all()


def test_a_hopeless_hessian_falls_back_and_says_so():
    w, hessian = problem(5, ROWS, OUT)
    hopeless = hessian - 50 * np.outer(np.ones(ROWS), np.ones(ROWS)) + 50 * np.eye(ROWS)
    q, used = gptq_solve(w, hopeless.astype(np.float32), GROUPED)
    assert bool(used["fallback"])
    np.testing.assert_array_equal(q.matrix(), rtn(w, GROUPED).matrix())


def test_error_is_that_of_the_output():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, ROWS)).astype(np.float32)
    w, hessian = problem(0, ROWS, OUT)[0], (x.T @ x / 300).astype(np.float32)
    q, used = gptq_solve(w, hessian, GROUPED)
    exact = np.linalg.norm(x @ (w - np.asarray(q.matrix()))) / np.linalg.norm(x @ w)
    assert float(used["error"]) == pytest.approx(exact, rel=1e-4)
    assert float(output_error(w, q, hessian)) == pytest.approx(exact, rel=1e-4)
    assert float(output_error(np.zeros_like(w), rtn(np.zeros_like(w), GROUPED), hessian)) == 0


@pytest.mark.parametrize("size", [64, 128, 1024, None])
def test_program_size_does_not_depend_on_the_width(size):
    def count(jaxpr) -> int:
        return sum(
            1 + sum(map(count, jaxprs_in_params(eqn.params))) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns
        )

    def equations(width: int) -> int:
        square = jax.ShapeDtypeStruct((width, width), jnp.float32)
        return count(jax.make_jaxpr(lambda w, h: gptq(w, h, Uniform(4, size)))(square, square))

    assert equations(8192) == equations(16384)


def test_compiles_once_for_each_shape():
    compiled = solver._jitted.plain
    compiled.clear_cache()
    for seed in range(3):
        gptq(*problem(seed, ROWS, OUT), GROUPED, damping=0.01 * (1 + seed))
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w, h: gptq(w, h[:-1], GROUPED), "a Hessian of shape"),
        (lambda w, h: gptq(w, h, Uniform(4, 128)), "group size 128 is larger than the input width 72"),
        (lambda w, h: gptq(w * np.nan, h, GROUPED), "NaN or infinite"),
        (lambda w, h: gptq(w, h * np.inf, GROUPED), "the Hessian holds NaN or infinite"),
        (lambda w, h: gptq(w, h, GROUPED, order="random"), "order is 'natural' or 'activation'"),
        (lambda w, h: gptq(w, h, GROUPED, range="max"), "unknown range search 'max'"),
        (lambda w, h: gptq(w, h, GROUPED, damping=-1), "damping -1"),
        (lambda w, h: gptq(w * 1e9, h, GROUPED), "does not fit float16"),
        (lambda w, h: gptq(w.astype(int), h, GROUPED), "must be floating point"),
        (lambda w, h: gptq(w[0], h, GROUPED), "is no matrix"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(JaxqError, match=words):
        change(*problem(0, ROWS, OUT))
