"""UniformArray as a pytree: shapes, products, look-ups, transformations, shards, export."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxq.errors import JaxqError
from jaxq.formats import Layout, Uniform, UniformArray, abstract, dequantize, is_quantized
from jaxq.solvers.rtn import rtn

FORMATS = [
    Uniform(4, 16),
    Uniform(3, 20),
    Uniform(3, 20, symmetric=True, scale_dtype="bfloat16"),
    Uniform(5, None),
    Uniform(2, "tensor"),
    Uniform(8, 7, scale_dtype="float32"),
]
WIDTH, OUT = 50, 6


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def slow_matrix(q: UniformArray) -> np.ndarray:
    """Codes, scales and zeros read bit by bit with Python integers, in float64."""
    bits, (rows, columns) = q.format.bits, q.matrix_shape
    groups = q.scale.shape[0]
    size = q.format.group_size if isinstance(q.format.group_size, int) else rows

    def value(words, column, index):
        whole = sum(int(word) << (32 * k) for k, word in enumerate(np.asarray(words)[:, column]))
        return (whole >> (bits * index)) & (2**bits - 1)

    dense = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            group, channel = min(row // size, groups - 1), column % q.scale.shape[1]
            zero = 2 ** (bits - 1) if q.zero is None else value(q.zero, channel, group)
            dense[row, column] = (value(q.codes, column, row) - zero) * float(q.scale[group, channel])
    return dense


@jax.jit
def compiled(q: UniformArray) -> jax.Array:
    """The dense leaf by one program; `dequantize` itself runs one for every operation."""
    return q.dequantize()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_dequantize_against_bit_by_bit(format):
    q = rtn(normal(WIDTH, OUT), format)
    np.testing.assert_allclose(q.dequantize(), slow_matrix(q), rtol=1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_products(format):
    q, x = rtn(normal(WIDTH, OUT), format), normal(2, 3, WIDTH, seed=1)
    expected = np.asarray(x, np.float64) @ slow_matrix(q)
    for product in (x @ q, np.asarray(x) @ q, q.matmul(x), jax.jit(lambda q, x: x @ q)(q, x)):
        np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)
    y = normal(OUT, 4, seed=2)
    np.testing.assert_allclose(q @ y, slow_matrix(q) @ np.asarray(y, np.float64), rtol=1e-5, atol=1e-5)
    assert (x.astype(jnp.bfloat16) @ q).dtype == jnp.bfloat16


def test_product_with_an_out_first_leaf_follows_numpy():
    leaf = normal(OUT, WIDTH)
    q = rtn(leaf, Uniform(8, None), layout=Layout.of(leaf.shape, (1,), (0,)))
    x = normal(3, OUT, seed=1)
    product = x @ q
    np.testing.assert_allclose(product, x @ compiled(q), rtol=1e-6)
    np.testing.assert_allclose(product, x @ leaf, atol=0.1)


@pytest.mark.parametrize(
    ("shape", "ins", "outs"),
    [
        ((5, 10, 6), (0, 1), (2,)),
        ((10, 2, 3), (0,), (1, 2)),
        ((6, 50), (1,), (0,)),
        ((3, 3, 4, 8), (0, 1, 2), (3,)),
    ],
)
def test_logical_shape(shape, ins, outs):
    leaf = normal(4, *shape)
    q = rtn(leaf, Uniform(8, 9), layout=Layout.of(shape, ins, outs))
    assert q.shape == leaf.shape and q.ndim == leaf.ndim and q.size == leaf.size and q.dtype == leaf.dtype
    np.testing.assert_allclose(compiled(q), leaf, atol=0.05)
    assert abstract(q) == jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_embedding_look_up(format):
    table = normal(OUT, WIDTH)
    q = rtn(table, format, layout=Layout.of(table.shape, (1,), (0,)))
    dense, ids = np.asarray(compiled(q)), jnp.array([[0, 5, 5], [2, -1, 3]])
    found = jax.jit(lambda q, i: (q[i], q[2], q[1:3], q.take_out(i)))(q, ids)
    for rows, want in zip((q[ids], *found), (ids, ids, 2, slice(1, 3), ids), strict=True):
        np.testing.assert_array_equal(rows, dense[np.asarray(want) if isinstance(want, jax.Array) else want])


def test_look_up_with_split_embedding_axes():
    table = normal(5, 7, 4)
    ids = np.array([3, 1])
    split = rtn(table, Uniform(4, None), layout=Layout.of(table.shape, (2, 1), (0,)))
    for q in (split, rtn(normal(8, 3), Uniform(4, None))):
        np.testing.assert_array_equal(jax.jit(lambda q: q[ids])(q), np.asarray(compiled(q))[ids])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_batch_axes_slice_scan_and_vmap(format):
    leaf = np.asarray(normal(3, 5, 10, OUT))
    layout = Layout.of((5, 10, OUT), (0, 1), (2,))
    q, x = rtn(leaf, format, layout=layout), normal(3, 2, WIDTH, seed=1)
    one_by_one = [rtn(leaf[i], format, layout=layout) for i in range(3)]
    for i in range(3):
        layer = q[i]
        assert is_quantized(layer) and layer.shape == (5, 10, OUT)
        np.testing.assert_array_equal(compiled(layer), compiled(one_by_one[i]))

    def body(carry, layer):
        assert layer.shape == (5, 10, OUT) and layer.batch_shape == ()
        return carry, (layer.dequantize(), x[0] @ layer.matrix(), layer.matmul(x[0]))

    @jax.jit
    def run(q, x):
        return jax.lax.scan(body, 0, q)[1], jax.vmap(lambda layer, x: layer.matmul(x))(q, x), q.matrix()

    (dense, expected, product), mapped, matrix = run(q, x)
    np.testing.assert_array_equal(dense, compiled(q))
    np.testing.assert_allclose(product, expected, rtol=1e-6)
    np.testing.assert_allclose(mapped, np.einsum("bti,bio->bto", x, matrix), rtol=1e-5, atol=1e-5)
    with pytest.raises(JaxqError, match="index the batch axes away"):
        q.take_out(jnp.array([0]))


def test_astype_changes_only_the_name():
    q = rtn(normal(WIDTH, OUT), Uniform(4, 16))
    half = q.astype(jnp.bfloat16)
    assert half.dtype == jnp.bfloat16 and half.dequantize().dtype == jnp.bfloat16 and half.codes is q.codes
    np.testing.assert_array_equal(half.dequantize(), q.dequantize().astype(jnp.bfloat16))
    assert rtn(normal(WIDTH, OUT).astype(jnp.bfloat16), Uniform(4, 16)).dtype == jnp.bfloat16


def test_trees():
    q = rtn(normal(WIDTH, OUT), Uniform(4, 16))
    tree = dequantize({"a": q, "b": jnp.ones(3)})
    assert not any(map(is_quantized, jax.tree.leaves(tree, is_leaf=is_quantized)))
    paths = jax.tree_util.tree_flatten_with_path({"a": q})[0]
    assert [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths] == [
        "a/codes",
        "a/scale",
        "a/zero",
    ]
    for placeholder in (None, object(), P("x"), 1):
        rebuilt = jax.tree.map(lambda _, p=placeholder: p, q)
        assert isinstance(rebuilt, UniformArray) and rebuilt.codes is placeholder
        assert "UniformArray" in repr(rebuilt)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradient_of_scales(format):
    q, x = (
        rtn(normal(WIDTH, OUT), dataclasses.replace(format, scale_dtype="float32")),
        normal(3, WIDTH, seed=1),
    )

    @jax.jit
    def loss(q):
        return jnp.sum((x @ q) ** 2)

    grad = jax.grad(loss, allow_int=True)(q)
    assert grad.codes.dtype == jax.dtypes.float0 and grad.scale.shape == q.scale.shape
    at = (q.scale.shape[0] - 1, q.scale.shape[1] - 1)
    step = 1e-2 * float(q.scale[at])
    up, down = (dataclasses.replace(q, scale=q.scale.at[at].add(d)) for d in (step, -step))
    numeric = (float(loss(up)) - float(loss(down))) / (2 * step)
    assert float(grad.scale[at]) == pytest.approx(numeric, rel=2e-2, abs=1e-2)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_export_round_trip(format):
    q, x = rtn(normal(WIDTH, OUT), format), normal(3, WIDTH, seed=1)
    exported = jax.export.export(jax.jit(lambda params, x: x @ params["w"]))({"w": q}, x)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call({"w": q}, x), jax.jit(lambda q, x: x @ q)(q, x))


def mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


@pytest.mark.parametrize("format", [*FORMATS, Uniform(4, 16, symmetric=True)], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_along_out(format, kind):
    q, x, devices = rtn(normal(64, 16), format), normal(3, 64, seed=1), mesh(kind)
    specs = q.partition_specs(P(None, "model"))
    placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(devices, spec)), q, specs)
    x = jax.device_put(x, NamedSharding(devices, P()))
    mapped = jax.shard_map(
        lambda q, x: q.matmul(x), mesh=devices, in_specs=(specs, P()), out_specs=P(None, "model")
    )
    dense, product, shards = jax.jit(lambda q, x: (q.dequantize(), x @ q, mapped(q, x)))(placed, x)
    np.testing.assert_array_equal(dense, compiled(q))
    np.testing.assert_allclose(product, np.asarray(x) @ np.asarray(compiled(q)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(shards, product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "format", [Uniform(4, 16, symmetric=True), Uniform(8, None), Uniform(2, "tensor")], ids=str
)
def test_sharded_along_in(format):
    q, x, devices = rtn(normal(128, 16), format), normal(3, 128, seed=1), mesh(AxisType.Auto)
    specs = q.partition_specs(P("model", None), devices)

    @jax.jit
    @partial(jax.shard_map, mesh=devices, in_specs=(specs, P(None, "model")), out_specs=P())
    def product(q, x):
        assert q.shape == (32, 16)
        return jax.lax.psum(q.matmul(x), "model")

    np.testing.assert_allclose(product(q, x), x @ compiled(q), rtol=1e-5, atol=1e-5)


def test_specs_follow_layout_and_batch():
    leaf = normal(3, 4, 16, 8)
    q = rtn(leaf, Uniform(4, 16), layout=Layout.of((4, 16, 8), (0, 1), (2,)))
    specs = q.partition_specs(P("data", None, None, "model"))
    assert specs.codes == specs.scale == specs.zero == P("data", None, "model")
    table = rtn(normal(8, 32), Uniform(4, 16), layout=Layout.of((8, 32), (1,), (0,)))
    assert table.partition_specs(P("model")).codes == P(None, "model")
    assert rtn(leaf, Uniform(4, "tensor"), layout=q.layout).partition_specs(P()).scale == P(None, None, None)


@pytest.mark.parametrize(
    ("format", "spec", "words"),
    [
        (Uniform(4, 32), P("model"), "a group would be cut"),
        (Uniform(3, None), P("model"), "inside a packed word"),
        (Uniform(4, 8), P("model"), "zero points would be cut"),
        (Uniform(4, 8), P("expert"), "no mesh with an axis 'expert'"),
        (Uniform(4, 8), P(None, None, "model"), "more entries"),
    ],
)
def test_a_shard_never_splits_a_group_or_a_word(format, spec, words):
    with pytest.raises(JaxqError, match=words):
        rtn(normal(64, 16), format).partition_specs(spec, mesh(AxisType.Auto))


def test_an_inner_axis_cannot_be_sharded():
    q = rtn(normal(4, 16, 8), Uniform(4, 16), layout=Layout.of((4, 16, 8), (0, 1), (2,)))
    with pytest.raises(JaxqError, match="inner axis"):
        q.partition_specs(P(None, "model"), mesh(AxisType.Auto))
