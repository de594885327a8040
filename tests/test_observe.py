"""Statistics against hand-computed ones: what reaches a site, under loops, branches, experts and shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import JaxqError

from . import zoo

HESSIAN = {"**": jaxq.Hessian()}


def gram(x, weights=None):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64).reshape(-1)
    return (x * w[:, None]).T @ x, w.sum()


def check(state, x, weights=None, tolerance=1e-5):
    matrix, count = gram(x, weights)
    np.testing.assert_allclose(state.matrix, matrix, tolerance, tolerance * np.abs(matrix).max())
    np.testing.assert_allclose(state.count, count)


def random(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


def test_plain_batches_and_merging():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    p = {"a": random(0, 8, 6), "b": random(1, 6, 4)}
    batches = [random(i, 2, 5, 8) for i in range(3)]
    states = jaxq.observe(fn, p, batches, HESSIAN)
    check(states["a"], jnp.concatenate(batches))
    check(states["b"], jnp.tanh(jnp.concatenate(batches) @ p["a"]))
    whole = jaxq.observe(fn, p, [jnp.concatenate(batches)], HESSIAN)
    np.testing.assert_allclose(whole["b"].matrix, states["b"].matrix, 1e-5, 1e-4)


def test_weights_leave_padding_out():
    fn = lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["a"])  # noqa: E731
    p = {"a": random(0, 8, 2, 3)}
    x, w = random(1, 3, 5, 8), jnp.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], jnp.float32)
    check(jaxq.observe(fn, p, [x], HESSIAN, weights=[w])["a"], x, w)
    check(jaxq.observe(fn, p, [x], HESSIAN, weights=[w])["a"], x[w > 0])


def test_transposed_leaf_on_the_left():
    fn = lambda p, x: p["a"].T.reshape(2, 3, 8) @ x.T  # noqa: E731
    p, x = {"a": random(0, 8, 6)}, random(1, 5, 8)
    check(jaxq.observe(fn, p, [x], HESSIAN)["a"], x)


def test_scanned_layers_have_their_axis_in_front():
    w = random(0, 3, 8, 8) / 3
    fn = lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]  # noqa: E731
    x = random(1, 5, 8)
    state = jaxq.observe(fn, {"w": w}, [x, x + 1], HESSIAN)["w"]
    x = jnp.concatenate([x, x + 1])
    for i in range(3):
        check(jax.tree.map(lambda s, i=i: s[i], state), x)
        x = jnp.tanh(x @ w[i])


def test_a_weight_used_in_every_iteration_sums_over_them():
    w = random(0, 8, 8) / 3
    loops = {
        "scan": lambda p, x: lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, None, length=3)[0],
        "fori": lambda p, x: lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ p["w"]), x),
        "while": lambda p, x: lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"]), s[2]), (0, x, p["w"])
        )[1],
    }
    x = random(1, 5, 8)
    seen = [x]
    for _ in range(2):
        seen.append(jnp.tanh(seen[-1] @ w))
    for fn in loops.values():
        check(jaxq.observe(fn, {"w": w}, [x], HESSIAN)["w"], jnp.concatenate(seen))


def test_nested_scans_stack_only_the_level_that_slices():
    w = random(0, 3, 8, 8) / 3

    def fn(p, x):
        def layer(c, w):
            return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), c, None, length=2)[0], None

        return lax.scan(layer, x, p["w"])[0]

    x = random(1, 5, 8)
    state = jaxq.observe(fn, {"w": w}, [x], HESSIAN)["w"]
    for i in range(3):
        y = jnp.tanh(x @ w[i])
        check(jax.tree.map(lambda s, i=i: s[i], state), jnp.concatenate([x, y]))
        x = jnp.tanh(y @ w[i])


def test_layers_taken_by_a_loop_counter():
    w = random(0, 3, 8, 8) / 3
    fn = lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)  # noqa: E731
    x = random(1, 5, 8)
    state = jaxq.observe(fn, {"w": w}, [x], HESSIAN)["w"]
    for i in range(3):
        check(jax.tree.map(lambda s, i=i: s[i], state), x)
        x = jnp.tanh(x @ w[i])


def test_branches_record_what_they_run():
    p = {"a": random(0, 8, 8), "b": random(1, 8, 8)}
    fn = lambda p, x: lax.cond(x[0, 0] > 0, lambda x: x @ p["a"], lambda x: x @ p["b"], x)  # noqa: E731
    x = random(2, 5, 8).at[0, 0].set(1.0)
    states = jaxq.observe(fn, p, [x, -x], HESSIAN)
    check(states["a"], x)
    check(states["b"], -x)


def test_experts_batched_and_grouped():
    case = zoo.experts()
    (x,) = case.args
    states = jaxq.observe(case.fn, case.params, [x], HESSIAN)
    choice = jnp.argmax(jax.nn.softmax(x @ case.params["router"]), -1)
    # All experts see the same tokens through one product: one Hessian, the expert axis is an out axis.
    check(states["up"], x)
    for e in range(4):
        one = lambda s, e=e: s[e]  # noqa: E731
        check(jax.tree.map(one, states["down"]), jax.nn.silu(x @ case.params["up"][e]))
        check(jax.tree.map(one, states["grouped"]), x[choice == e])


@pytest.mark.parametrize(("strides", "padding", "dilation"), [(1, "SAME", 1), (2, "VALID", 1), (1, "VALID", 2)])
def test_convolution_inputs_are_its_patches(strides, padding, dilation):
    x, w = random(0, 2, 7, 6, 3), random(1, 3, 2, 3, 5)

    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (strides,) * 2, padding, rhs_dilation=(dilation,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    site = jaxq.sites(fn, {"w": w}, x)[0]
    seen = []

    class Keep(jaxq.Hessian):
        def update(self, state, x, weights=None):
            jax.debug.callback(seen.append, x)
            return super().update(state, x, weights)

    state = jaxq.observe(fn, {"w": w}, [x], {"w": Keep()})["w"]
    jax.effects_barrier()
    # The patches times the kernel's canonical matrix are the convolution: so they are in its order.
    np.testing.assert_allclose(seen[0] @ site.layout.to_canonical(w), fn({"w": w}, x), 1e-4, 1e-4)
    check(state, jnp.asarray(seen[0]))


def test_named_activations():
    case = zoo.language()
    states = jaxq.observe(case.fn, case.params, [case.args[0]], {"block": jaxq.Range()})
    (state,) = states.values()
    assert state.low.shape == (16,) and bool((state.low < state.high).all())


def mesh(*sizes, names):
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shards_merge_to_the_whole(check_vma):
    grid = mesh(4, 2, names=("data", "model"))
    p, x = {"w": random(0, 8, 6)}, random(1, 16, 8)

    def fn(p, x):
        return jax.shard_map(
            lambda w, x: jnp.tanh(x @ w), mesh=grid, in_specs=(P(None, "model"), P("data")),
            out_specs=P("data", "model"), check_vma=check_vma,
        )(p["w"], x)  # fmt: skip

    check(jaxq.observe(fn, p, [x], HESSIAN)["w"], x)


def test_data_sharded_over_devices():
    grid = mesh(8, names=("data",))
    p, x = {"w": random(0, 8, 6)}, random(1, 16, 8)
    placed = jax.device_put(x, jax.sharding.NamedSharding(grid, P("data")))
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    check(jaxq.observe(fn, p, [placed], HESSIAN)["w"], x)


def test_errors():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    p, x = {"w": random(0, 8, 6)}, random(1, 4, 8)
    with pytest.raises(JaxqError, match="no batches"):
        jaxq.observe(fn, p, [], HESSIAN)
    with pytest.raises(JaxqError, match="'nothing/\\*' matches no site"):
        jaxq.observe(fn, p, [x], {"nothing/*": jaxq.Hessian()})
    with pytest.raises(JaxqError, match="do not fit the data"):
        jaxq.observe(fn, p, [x], HESSIAN, weights=[jnp.ones((3,))])
    grouped = lambda p, x: lax.conv_general_dilated(  # noqa: E731
        x, p["w"], (1,), "SAME", feature_group_count=2, dimension_numbers=("NHC", "HIO", "NHC")
    )
    with pytest.raises(JaxqError, match="grouped convolution"):
        jaxq.observe(grouped, {"w": random(0, 3, 2, 4)}, [random(1, 1, 5, 4)], HESSIAN)
