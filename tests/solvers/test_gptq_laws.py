"""Laws of GPTQ: limits, permutations, batches, shards."""

import jax
import jax.numpy as jnp
import numpy as np
from gptq_oracle import gptq as plain_gptq
from gptq_oracle import objective, problem
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxq.formats import Layout, Uniform
from jaxq.formats.packing import unpack
from jaxq.solvers import schedule
from jaxq.solvers.gptq import gptq, gptq_solve
from jaxq.solvers.rtn import rtn

ROWS, OUT = 72, 6
GROUPED = Uniform(3, 20)


def codes_of(q) -> np.ndarray:
    return np.asarray(unpack(q.codes, q.format.bits, q.matrix_shape[0]))


def test_identity_hessian_is_round_to_nearest_bit_for_bit():
    w, _ = problem(0, ROWS, OUT)
    for change in ({}, {"groups": "static"}, {"order": "activation"}):
        q, plain = gptq(w, 3 * np.eye(ROWS, dtype=np.float32), GROUPED, **change), rtn(w, GROUPED)
        jax.tree.map(np.testing.assert_array_equal, q, plain)


def test_heavy_damping_is_round_to_nearest():
    w, hessian = problem(1, ROWS, OUT)
    q = gptq(w, hessian, GROUPED, damping=1e8, groups="static")
    np.testing.assert_array_equal(codes_of(q), codes_of(rtn(w, GROUPED)))


@given(seed=st.integers(0, 10_000), correlation=st.floats(0.3, 2))
@settings(max_examples=20)
def test_objective_is_not_above_round_to_nearest(seed, correlation):
    w, hessian = problem(seed, ROWS, OUT, correlation)
    format = Uniform(4, None)
    assert objective(w, gptq(w, hessian, format).matrix(), hessian) <= objective(
        w, rtn(w, format).matrix(), hessian
    )


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10)
def test_permuting_inputs_permutes_the_result(seed):
    w, hessian = problem(seed, ROWS, OUT)
    order = np.random.default_rng(seed).permutation(ROWS)
    format = Uniform(4, None)
    assume(plain_gptq(w, hessian, format, activation=True)[2] > 1e-4)
    q = gptq(w, hessian, format, order="activation")
    moved = gptq(w[order], hessian[np.ix_(order, order)], format, order="activation")
    np.testing.assert_array_equal(codes_of(moved), codes_of(q)[order])


def test_piece_sizes_do_not_change_the_result(monkeypatch):
    w, hessian = problem(2, ROWS, OUT)
    assert plain_gptq(w, hessian, GROUPED, static=True)[2] > 1e-4
    expected = gptq(w, hessian, GROUPED, groups="static")
    for name, size in {"MICRO": 4, "BLOCK": 16, "PANEL": 32}.items():
        monkeypatch.setattr(schedule, name, size)
    again = jax.jit(lambda w, h: gptq(w, h, GROUPED, groups="static"))(w, hessian)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_batch_equals_one_by_one():
    problems = [problem(seed, ROWS, OUT) for seed in range(3)]
    w, hessians = (np.stack(parts) for parts in zip(*problems, strict=True))
    # The last lane needs more damping than the others: lanes must not disturb each other.
    hessians[2] -= 0.02 * np.diag(hessians[2]).mean() * np.eye(ROWS, dtype=np.float32)
    hessians[2][0] = hessians[2][:, 0] = 0
    hessians[2][0, 0] = 1e-3
    batch, used = gptq_solve(w, hessians, GROUPED)
    assert batch.shape == (3, ROWS, OUT)
    for lane in range(3):
        one, alone = gptq_solve(w[lane], hessians[lane], GROUPED)
        np.testing.assert_allclose(batch[lane].matrix(), one.matrix(), rtol=1e-6)
        for name, value in alone.items():
            np.testing.assert_allclose(used[name][lane], value, rtol=1e-4)


def test_a_hessian_can_be_shared_by_a_batch():
    w, hessian = problem(0, ROWS, 3 * OUT)
    stacked = np.stack(np.split(w, 3, axis=1))
    shared, repeated = gptq(stacked, hessian, GROUPED), gptq(stacked, np.stack([hessian] * 3), GROUPED)
    np.testing.assert_array_equal(shared.matrix(), repeated.matrix())


def test_layout_and_dtype_are_kept():
    w, hessian = problem(0, ROWS, OUT)
    leaf = jnp.asarray(w.T.reshape(2, 3, 8, 9), jnp.bfloat16)
    layout = Layout.of(leaf.shape, (2, 3), (0, 1))
    q = gptq(leaf, hessian, GROUPED, layout=layout)
    assert q.shape == leaf.shape and q.dtype == jnp.bfloat16
    plain = gptq(layout.to_canonical(leaf).astype(jnp.float32), hessian, GROUPED)
    np.testing.assert_array_equal(q.matrix(jnp.float32), plain.matrix())


def test_sharded_along_out_equals_unsharded():
    w, hessian = problem(6, ROWS, OUT)
    q = gptq(w, hessian, GROUPED)
    devices = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    specs = q.partition_specs(P(None, "model"))
    sharded = jax.shard_map(
        lambda w, h: gptq(w, h, GROUPED),
        mesh=devices,
        in_specs=(P(None, "model"), P()),
        out_specs=specs,
        check_vma=False,
    )
    assert plain_gptq(w, hessian, GROUPED)[2] > 1e-5
    jax.tree.map(np.testing.assert_array_equal, jax.jit(sharded)(w, hessian), q)
