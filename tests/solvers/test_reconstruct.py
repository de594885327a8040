"""The generic training loop, on problems whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.errors import JaxqError
from jaxq.formats.groups import split_groups
from jaxq.formats.uniform import Uniform, fit_mse
from jaxq.solvers import adaround
from jaxq.solvers.reconstruct import Data, Settings, mixed, reconstruct, reconstruct_together

FORMAT = Uniform(2, None, scale_dtype="float32")
SETTINGS = Settings(iterations=1500, batch=16, rates=(("rounding", 2e-2),), cosine=(), mixed=1.0, chunk=500)


def run(trained, fixed, x, key):
    return x @ adaround.soft(adaround.AdaRound(trained["rounding"], *fixed["grid"], FORMAT))


def squared(outputs, targets, fixed):
    return jnp.mean(jnp.square(outputs - targets))


def penalty(trained, share):
    return adaround.rounding_penalty(trained, share, weight=4.0)


@pytest.fixture
def problem(key):
    """Correlated inputs, where rounding to nearest is far from best."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (64, 12)) @ jax.random.normal(keys[1], (12, 12))
    w = jax.random.normal(keys[2], (12, 4))
    scale, zero = fit_mse(split_groups(w, 12), FORMAT)
    a = adaround.start(w, scale, zero, FORMAT)
    return a, Data(x, None, x @ w), {"grid": (a.floor, a.scale, a.zero)}


def solved(problem, settings=SETTINGS, penalty=penalty, **extra):
    a, data, fixed = problem
    return reconstruct(run, squared, penalty, {"rounding": a.alpha}, fixed, data, settings, **extra)


def test_learned_rounding_beats_nearest(problem):
    a, data, _ = problem
    seen = []
    found = solved(problem, progress=lambda done, error: seen.append((done, error)))
    trained = adaround.AdaRound(found.trained["rounding"], a.floor, a.scale, a.zero, FORMAT)

    def cost(w):
        return float(squared(data.quantized @ w, data.targets, None))

    gates = np.asarray(adaround.gate(trained.alpha))
    assert (np.minimum(gates, 1 - gates) < 1e-3).all()
    np.testing.assert_allclose(adaround.soft(trained), adaround.hard(trained), atol=2e-3)
    assert cost(adaround.hard(trained)) < 0.6 * cost(adaround.hard(a))
    assert [done for done, _ in seen] == [500, 1000, 1500] and [e for _, e in seen] == found.errors
    # What was given is left alone.
    assert np.isfinite(np.asarray(a.alpha)).all()


def test_equal_keys_give_equal_results_whatever_the_chunk(problem):
    first, other = solved(problem), solved(problem, Settings(**{**vars(SETTINGS), "chunk": 400}))
    np.testing.assert_array_equal(first.trained["rounding"], other.trained["rounding"])
    moved = solved(problem, key=jax.random.key(7))
    assert np.abs(moved.trained["rounding"] - first.trained["rounding"]).max() > 1e-3


def test_equal_blocks_compile_once(problem):
    calls = []

    def counted(trained, fixed, x, key):
        calls.append(1)
        return run(trained, fixed, x, key)

    a, data, fixed = problem
    few = Settings(**{**vars(SETTINGS), "iterations": 4, "chunk": 4})
    for scale in (1.0, 2.0):
        changed = Data(data.quantized * scale, None, data.targets * scale)
        reconstruct(counted, squared, penalty, {"rounding": a.alpha}, fixed, changed, few)
    assert len(calls) == 1


def test_a_block_without_error_keeps_none(problem):
    a, data, fixed = problem
    perfect = Data(data.quantized, None, data.quantized @ adaround.soft(a))
    # Adam makes steps of the smallest gradient: the error, not the gates, says that nothing happened.
    few = Settings(**{**vars(SETTINGS), "iterations": 20, "chunk": 20})
    found = reconstruct(run, squared, None, {"rounding": a.alpha}, fixed, perfect, few)
    assert found.errors[-1] < 1e-3 * float(jnp.mean(jnp.square(perfect.targets)))
    unscaled = Settings(**{**vars(few), "scale": None, "rates": (("rounding", 0.0),)})
    still = reconstruct(run, squared, None, {"rounding": a.alpha}, fixed, perfect, unscaled)
    np.testing.assert_array_equal(still.trained["rounding"], a.alpha)


def test_scaling_the_error_changes_nothing(problem):
    def hundredfold(outputs, targets, fixed):
        return 100 * squared(outputs, targets, fixed)

    a, data, fixed = problem
    found = [reconstruct(run, error, None, {"rounding": a.alpha}, fixed, data, SETTINGS).trained["rounding"]
             for error in (squared, hundredfold)]  # fmt: skip
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_groups_have_their_own_rates(problem):
    def affine(trained, fixed, x, key):
        return run(trained, fixed, x, key) * trained["gain"] + trained["shift"]

    a, data, fixed = problem
    settings = Settings(
        iterations=50,
        batch=16,
        rates=(("rounding", 0.0), ("gain", 1e-2), ("shift", 1e-2)),
        cosine=("shift",),
        mixed=1.0,
    )
    given = {"rounding": a.alpha, "gain": jnp.ones(4), "shift": jnp.zeros(4)}
    found = reconstruct(affine, squared, None, given, fixed, data, settings).trained
    np.testing.assert_array_equal(found["rounding"], a.alpha)
    # Adam's steps are as long as the rate, and a cosine halves their sum.
    assert 0.1 < np.abs(found["gain"] - 1).max() <= 0.5
    assert 0.02 < np.abs(found["shift"]).max() <= 0.27


@pytest.mark.parametrize(("probability", "share"), [(1.0, 1.0), (0.5, 0.5), (0.1, 0.1), (0.0, 0.0)])
def test_inputs_are_mixed_element_by_element(probability, share, key):
    batch = Data([jnp.ones((50, 40)), jnp.ones((50, 3))], [jnp.zeros((50, 40)), jnp.zeros((50, 3))], None)
    first, second = mixed(batch, probability, key)
    assert set(np.unique(first)) <= {0.0, 1.0} and second.shape == (50, 3)
    assert abs(float(first.mean()) - share) < 0.05


def test_bad_input_is_refused(problem):
    a, data, fixed = problem
    with pytest.raises(JaxqError, match="to train"):
        reconstruct(run, squared, None, {"gain": a.alpha}, fixed, data, SETTINGS)
    with pytest.raises(JaxqError, match="a step takes 65 examples"):
        solved(problem, Settings(**{**vars(SETTINGS), "batch": 65}))
    with pytest.raises(JaxqError, match="use smaller rates"):
        reconstruct(run, lambda *_: jnp.nan, None, {"rounding": a.alpha}, fixed, data, SETTINGS)
    with pytest.raises(JaxqError, match="probability"):
        Settings(mixed=1.5)
    with pytest.raises(JaxqError, match="no rate for gains"):
        Settings(cosine=("gains",))
    with pytest.raises(JaxqError, match="at least one"):
        Settings(batch=0)


def test_blocks_side_by_side_are_checked(problem):
    a, data, fixed = problem
    two = jax.tree.map(lambda x: jnp.stack([x, x]), (a.alpha, fixed, data))
    with pytest.raises(JaxqError, match="16 examples of 3 blocks"):
        reconstruct_together(
            run,
            squared,
            None,
            {"rounding": two[0]},
            *two[1:],
            SETTINGS,
            keys=jax.random.split(jax.random.key(0), 3),
        )
    with pytest.raises(JaxqError, match="there are rates for"):
        reconstruct_together(
            run, squared, None, {"gain": two[0]}, *two[1:], SETTINGS, keys=jax.random.split(jax.random.key(0), 2)
        )
