"""quantized(f) is f with dequantized leaves, for functions of every kind and under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq

from . import zoo


def close(a, b, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), tolerance, tolerance)


#: By one program: `dequantize` itself runs one for every operation.
dequantize = jax.jit(jaxq.dequantize)


def dense(fn, q, *args):
    """The function on dequantized leaves: what quantized(fn) has to give."""
    return jax.jit(lambda q, *args: fn(jaxq.dequantize(q), *args))(q, *args)


@pytest.mark.parametrize("name", zoo.CASES)
def test_all_leaves_are_sites_and_run_quantized(name):
    case = zoo.CASES[name]()
    assert len(zoo.chosen(case)) == case.leaves
    q = zoo.quantize(case)
    fallbacks = []
    out = jax.jit(jaxq.quantized(case.fn, lambda *why: fallbacks.append(why)))(q, *case.args)
    close(out, dense(case.fn, q, *case.args))
    assert fallbacks == []
    # Rounding must have done something: otherwise the comparison says nothing.
    assert np.abs(np.asarray(out) - jax.jit(case.fn)(case.params, *case.args)).max() > 1e-3


@pytest.mark.parametrize("name", ["dense", "scanned", "bare", "experts", "nnx_model"])
def test_bfloat16(name):
    case = zoo.cast(zoo.CASES[name](), jnp.bfloat16)
    q = zoo.quantize(case)
    out = jax.jit(jaxq.quantized(case.fn))(q, *case.args)
    assert out.dtype == jnp.bfloat16
    close(out, dense(case.fn, q, *case.args), 2e-2)


@pytest.mark.parametrize("name", ["attention", "scanned", "bare", "experts", "custom_rules", "conv"])
def test_gradients_are_those_of_the_dense_function(name):
    case = zoo.CASES[name]()
    q = zoo.quantize(case, scale_dtype="float32")

    def loss(fn):
        return lambda p, *args: jnp.sum(fn(p, *args) ** 2)

    # With respect to the scales, leaves of the pytree like any other, and to the data.
    ours = jax.jit(jax.grad(loss(jaxq.quantized(case.fn)), argnums=(0, 1), allow_int=True))(q, *case.args)
    want = jax.jit(
        jax.grad(lambda q, *args: loss(case.fn)(jaxq.dequantize(q), *args), argnums=(0, 1), allow_int=True)
    )(q, *case.args)
    floats = lambda t: [x for x in jax.tree.leaves(t) if jnp.issubdtype(x.dtype, jnp.floating)]  # noqa: E731
    close(floats(ours), floats(want), 2e-4)


def test_custom_jvp_keeps_its_rule_in_forward_mode():
    case = zoo.custom_rules()
    q = zoo.quantize(case)

    @jax.custom_jvp
    def doubled(w, x):
        return x @ w

    doubled.defjvp(lambda p, t: (p[1] @ p[0], 2 * (t[1] @ p[0]) + p[1] @ t[0]))
    f = lambda p, x: doubled(p["b"], x)  # noqa: E731
    x = case.args[0]
    _, ours = jax.jit(lambda x: jax.jvp(lambda x: jaxq.quantized(f)(q, x), (x,), (x,)))(x)
    close(ours, 2 * (x @ dequantize(q)["b"]))


def test_vmap_over_data_and_over_models():
    case = zoo.dense()
    q, x = zoo.quantize(case), case.args[0]
    close(jax.jit(jax.vmap(lambda x: jaxq.quantized(case.fn)(q, x)))(x), dense(case.fn, q, x))
    pair = jax.tree.map(lambda a, b: jnp.stack([a, b]), q, zoo.quantize(case._replace(params=case.params)))
    both = jax.jit(jax.vmap(jaxq.quantized(case.fn), in_axes=(0, None)))(pair, x)
    close(both[0], dense(case.fn, q, x))


@pytest.mark.parametrize("name", ["dense", "scanned", "conv"])
def test_export_round_trip(name):
    case = zoo.CASES[name]()
    q = zoo.quantize(case, bits=3)
    exported = jax.export.export(jax.jit(jaxq.quantized(case.fn)))(q, *case.args)
    again = jax.export.deserialize(exported.serialize())
    close(again.call(q, *case.args), dense(case.fn, q, *case.args))


def test_export_for_other_platforms():
    case = zoo.dense()
    q = zoo.quantize(case)
    for platform in ("tpu", "cuda"):
        exported = jax.export.export(jax.jit(jaxq.quantized(case.fn)), platforms=[platform])(q, *case.args)
        assert exported.platforms == (platform,)


def mesh(*sizes, names):
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def test_sharded_data_and_weights_equal_unsharded():
    case = zoo.attention()
    q = zoo.quantize(case)
    grid = mesh(2, 4, names=("data", "model"))
    x = jnp.concatenate([case.args[0]] * 4)
    want = jax.jit(jaxq.quantized(case.fn))(q, x)

    def place(leaf):
        if not jaxq.is_quantized(leaf):
            return jax.device_put(leaf, NamedSharding(grid, P()))
        specs = leaf.partition_specs(P(*[None] * (leaf.ndim - 1), "model"), grid) if leaf.ndim == 2 else None
        if specs is None:
            return jax.device_put(leaf, NamedSharding(grid, P()))
        return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(grid, s)), leaf, specs)

    placed = jax.tree.map(place, q, is_leaf=jaxq.is_quantized)
    out = jax.jit(jaxq.quantized(case.fn))(placed, jax.device_put(x, NamedSharding(grid, P("data"))))
    # Sharding the contraction of attention changes the order of sums, no more.
    close(out, want, 1e-5)


@pytest.mark.parametrize("spec", [P(), P(None, "model")])
def test_shard_map_inside_the_function(spec):
    grid = mesh(2, 4, names=("data", "model"))
    w = jax.random.normal(jax.random.key(0), (16, 32))
    x = jax.random.normal(jax.random.key(1), (8, 16))

    def fn(p, x):
        out = P("data", "model") if spec != P() else P("data")
        return jax.shard_map(lambda w, x: jnp.tanh(x @ w), mesh=grid, in_specs=(spec, P("data")), out_specs=out)(
            p["w"], x
        )

    q = {"w": jaxq.rtn(w, jaxq.Uniform(4, 8))}
    reasons = []
    run = jax.jit(jaxq.quantized(fn, lambda *why: reasons.append(why)))
    close(run(q, x), jnp.tanh(x @ dequantize(q)["w"]))
    assert reasons == []


def test_shard_map_that_would_cut_a_group_runs_dense_and_says_so():
    grid = mesh(8, names=("model",))
    w = jax.random.normal(jax.random.key(0), (16, 32))
    x = jax.random.normal(jax.random.key(1), (4, 16))

    def local(w, x):
        return jax.lax.psum(x @ w, "model")

    def fn(p, x):
        specs = (P("model"), P(None, "model"))
        return jax.shard_map(local, mesh=grid, in_specs=specs, out_specs=P())(p["w"], x)

    q = {"w": jaxq.rtn(w, jaxq.Uniform(4, 8))}
    reasons = []
    run = jax.jit(jaxq.quantized(fn, lambda *why: reasons.append(why)))
    close(run(q, x), x @ dequantize(q)["w"])
    assert [path for path, _ in reasons] == ["w"]


def test_quantized_under_an_outer_shard_map():
    case = zoo.dense()
    q = zoo.quantize(case)
    grid = mesh(8, names=("data",))
    x = jnp.concatenate([case.args[0]] * 4)
    run = jax.shard_map(jaxq.quantized(case.fn), mesh=grid, in_specs=(P(), P("data")), out_specs=P("data"))
    close(jax.jit(run)(q, x), dense(case.fn, q, x))


def test_leaves_that_cannot_run_quantized_are_dense_and_reported():
    w = jax.random.normal(jax.random.key(0), (16, 16))
    x = jnp.ones((3, 16))
    functions = {
        "added": lambda p, x: x @ p["w"] + (p["w"] + 1).sum(),
        "returned": lambda p, x: (x @ p["w"], p["w"]),
        "other way": lambda p, x: x @ p["w"] + x @ p["w"].T,
        "part of an axis": lambda p, x: jnp.einsum("ta,abo->tbo", x[:, :4], p["w"].reshape(4, 4, 16)),
        "carried": lambda p, x: jax.lax.fori_loop(0, 2, lambda i, c: (c[0] * 2, c[1] @ c[0]), (p["w"], x))[1],
    }
    q = {"w": jaxq.rtn(w, jaxq.Uniform(4, 8))}
    for name, fn in functions.items():
        why = []
        out = jax.jit(jaxq.quantized(fn, lambda *reason, why=why: why.append(reason)))(q, x)
        close(out, dense(fn, q, x))
        assert why and why[0][0] == "w" and why[0][1], name
        assert any(s.note for s in jaxq.sites(fn, q, x) if s.path == "w"), name


def test_without_quantized_leaves_it_is_the_function_itself():
    calls = []

    def fn(p, x, flag=True):
        calls.append(flag)
        return p * x

    assert float(jaxq.quantized(fn)(jnp.float32(2), jnp.float32(3), flag=False)) == 6
    assert calls == [False]


def test_settings_stay_settings():
    def fn(p, x, times, mode="relu"):
        for _ in range(times):
            x = x @ p["w"]
        return jax.nn.relu(x) if mode == "relu" else x

    q = {"w": jaxq.rtn(jax.random.normal(jax.random.key(0), (16, 16)), jaxq.Uniform(4, 8))}
    x = jnp.ones((2, 16))
    w = dequantize(q)["w"]
    close(jaxq.quantized(fn)(q, x, 2, mode="none"), x @ w @ w)


def test_out_of_bounds_look_ups_do_as_the_function_says():
    table = jax.random.normal(jax.random.key(0), (10, 16))
    q = {"e": jaxq.rtn(table, jaxq.Uniform(4, 8), layout=jaxq.Layout.of((10, 16), (1,), (0,)))}
    ids = jnp.array([[0, 9], [12, -3]])
    for mode in ("fill", "clip", "wrap"):
        fn = lambda p, ids, mode=mode: jnp.take(p["e"], ids, axis=0, mode=mode)  # noqa: E731
        np.testing.assert_array_equal(jax.jit(jaxq.quantized(fn))(q, ids), dense(fn, q, ids))
