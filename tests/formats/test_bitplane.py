"""Bit planes: values, sizes, and BitPlaneArray as a pytree."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq.checkpoint import load, save
from jaxq.errors import JaxqError
from jaxq.formats import BitPlane, BitPlaneArray, Layout, from_dict, is_quantized
from jaxq.formats.bitplane import assemble
from jaxq.formats.packing import unpack
from jaxq.quantize import Result
from jaxq.solvers.rtn import rtn

FORMATS = [BitPlane(1, 16), BitPlane(2, None, "bfloat16"), BitPlane(3, 20), BitPlane(5, 32, "float32")]
WIDTH, OUT = 50, 6


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def example(format: BitPlane, *shape: int, layout: Layout | None = None) -> tuple[BitPlaneArray, np.ndarray]:
    """A random array of canonical `shape` and its dense canonical matrix, bit by bit in float64."""
    *batch, width, out = shape
    size = format.rows_per_group(width)
    groups = -(-width // size)
    codes = np.random.default_rng(2).integers(0, format.entries, shape).astype(np.uint8)
    scale, offset = normal(*batch, format.bits, groups, out, seed=1), normal(*batch, groups, out, seed=3)
    q = assemble(jnp.asarray(codes), jnp.asarray(scale), jnp.asarray(offset), format, layout)
    kept = [np.repeat(np.asarray(z, np.float64), size, axis=-2)[..., :width, :] for z in (q.scale, q.offset)]
    dense = kept[1] + sum(kept[0][..., j, :, :] * ((codes >> j) & 1) for j in range(format.bits))
    return q, dense


def test_by_hand():
    codes = jnp.array([[0], [1], [2], [3]], jnp.uint8)
    q = assemble(codes, jnp.array([[[1.0]], [[3.0]]]), jnp.array([[-2.0]]), BitPlane(2, 4))
    assert q.dequantize()[:, 0].tolist() == [-2, -1, 1, 2]
    assert q.planes.shape == (2, 1, 1) and q.planes[:, 0, 0].tolist() == [0b1010, 0b1100] and q.pad == 28


def test_uniform_grids_are_a_special_case():
    w = normal(64, 5)
    grid = rtn(w, jaxq.Uniform(4, 16, scale_dtype="float32"))
    scale, zero = np.asarray(grid.scale), np.asarray(grid.zero_point())
    codes = unpack(grid.codes, 4, 64)
    q = assemble(codes, np.stack([scale * 2**j for j in range(4)]), -zero * scale, BitPlane(4, 16, "float32"))
    np.testing.assert_allclose(q.dequantize(), grid.dequantize(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_products(format):
    (q, dense), x = example(format, WIDTH, OUT), normal(2, 3, WIDTH)
    made, product, half = jax.jit(lambda q, x: (q.dequantize(), x @ q, x.astype(jnp.bfloat16) @ q))(q, x)
    np.testing.assert_allclose(made, dense, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(product, x.astype(np.float64) @ dense, rtol=1e-4, atol=1e-4)
    assert half.dtype == jnp.bfloat16
    assert jax.eval_shape(q.astype(jnp.bfloat16).dequantize).dtype == jnp.bfloat16


@pytest.mark.parametrize("format", FORMATS[2:3], ids=str)
def test_embedding_look_up(format):
    q, _ = example(format, WIDTH, OUT, layout=Layout.of((OUT, WIDTH), (1,), (0,)))
    rows, ids = np.asarray(q.dequantize()), jnp.array([[0, 5, 5], [2, -1, 3]])
    np.testing.assert_array_equal(q[ids], rows[np.asarray(ids)])
    np.testing.assert_array_equal(jax.jit(lambda q, i: q.take_out(i))(q, ids), rows[np.asarray(ids)])


@pytest.mark.parametrize("format", FORMATS[2:3], ids=str)
def test_batch_axes_slice_scan_and_vmap(format):
    (q, _), x = example(format, 3, WIDTH, OUT, layout=Layout((10,), (), (0, 1, 2))), normal(2, WIDTH)
    dense = np.asarray(q.matrix())
    assert q.shape == (3, 5, 10, OUT) and q.batch_shape == (3,)
    assert is_quantized(q[1]) and q[1].shape == (5, 10, OUT)
    np.testing.assert_array_equal(q[1].matrix(), dense[1])
    _, layers = jax.lax.scan(lambda carry, layer: (carry, (layer.matrix(), layer.matmul(x))), 0, q)
    np.testing.assert_array_equal(layers[0], dense)
    np.testing.assert_allclose(layers[1], x @ dense, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(lambda q: q.matmul(x))(q), x @ dense, rtol=1e-4, atol=1e-4)
    with pytest.raises(JaxqError, match="index the batch axes away"):
        q.take_out(jnp.array([0]))


@pytest.mark.parametrize("format", FORMATS[1:3], ids=str)
def test_gradient_of_scales_and_offsets(format):
    (q, dense), x = example(dataclasses.replace(format, scale_dtype="float32"), WIDTH, OUT), normal(3, WIDTH)
    grad = jax.jit(jax.grad(lambda q: jnp.sum((x @ q) ** 2), allow_int=True))(q)
    assert grad.planes.dtype == jax.dtypes.float0
    size = format.rows_per_group(WIDTH)
    of_weights = np.zeros((q.offset.shape[0] * size, OUT))
    of_weights[:WIDTH] = 2 * x.T @ (x @ dense)
    bits = np.zeros((format.bits, *of_weights.shape))
    bits[:, :WIDTH] = np.asarray(unpack(q.planes, 1, WIDTH))
    sums = partial(np.sum, axis=-2)
    shape = (q.offset.shape[0], size, OUT)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * np.abs(of_weights).sum(axis=0).max()}
    np.testing.assert_allclose(grad.offset, sums(of_weights.reshape(shape)), **tolerance)
    of_scales = sums((bits * of_weights).reshape(format.bits, *shape))
    np.testing.assert_allclose(grad.scale, of_scales, **tolerance)


@pytest.mark.parametrize("format", FORMATS[2:3], ids=str)
def test_export_round_trip(format):
    (q, _), x = example(format, WIDTH, OUT), normal(3, WIDTH)
    run = jax.jit(lambda params, x: x @ params["w"])
    exported = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])({"w": q}, x)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call({"w": q}, x), run({"w": q}, x))


def mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_along_out(kind):
    (q, dense), x, devices = example(BitPlane(3, 16), 64, 16), normal(3, 64), mesh(kind)
    specs = q.partition_specs(P(None, "model"))
    assert specs.planes == specs.scale == P(None, None, "model") and specs.offset == P(None, "model")
    placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(devices, spec)), q, specs)
    x = jax.device_put(x, NamedSharding(devices, P()))
    made, y = jax.jit(lambda x, q: (q.dequantize(), x @ q))(x, placed)
    np.testing.assert_allclose(made, dense, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(y, x @ dense, rtol=1e-4, atol=1e-4)
    if kind == AxisType.Explicit:
        return
    both = partial(jax.shard_map, mesh=devices, in_specs=(specs, P()), out_specs=P(None, "model"))
    np.testing.assert_allclose(jax.jit(both(lambda q, x: q.matmul(x)))(placed, x), x @ dense, rtol=1e-4, atol=1e-4)


def test_sharded_along_in():
    (q, dense), x, devices = example(BitPlane(2, 16), 128, 8), normal(3, 128), mesh(AxisType.Auto)
    specs = q.partition_specs(P("model"), devices)
    assert specs.planes == specs.scale == P(None, "model", None) and specs.offset == P("model", None)

    @partial(jax.shard_map, mesh=devices, in_specs=(specs, P(None, "model")), out_specs=P())
    def product(q, x):
        assert q.shape == (32, 8)
        return jax.lax.psum(q.matmul(x), "model")

    np.testing.assert_allclose(jax.jit(product)(q, x), x @ dense, rtol=1e-4, atol=1e-4)
    with pytest.raises(JaxqError, match="inside a packed word"):
        example(BitPlane(2, 16), 64, 8)[0].partition_specs(P("model"), devices)
    with pytest.raises(JaxqError, match="a group would be cut"):
        example(BitPlane(2, 64), 128, 8)[0].partition_specs(P("model"), devices)


def test_saved_and_loaded(tmp_path):
    layout = Layout.of((16, 32), (1,), (0,))
    params = {
        "a": example(BitPlane(3, 20), 2, WIDTH, OUT)[0],
        "b": example(BitPlane(2, None, "bfloat16"), 32, 16, layout=layout)[0],
    }
    save(tmp_path / "model", Result(params, None))
    back = load(tmp_path / "model")
    assert jax.tree.structure(back.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)


def test_quantized_function():
    params = {
        "embed": example(BitPlane(4, 16), 16, 20, layout=Layout.of((20, 16), (1,), (0,)))[0],
        "stack": example(BitPlane(3, 8), 3, 16, 16)[0],
    }

    def fn(params, ids):
        x = params["embed"][ids]
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
        return x @ params["embed"].T

    reasons, ids = [], jnp.array([[1, 2, 3], [4, 19, 0]])
    out = jax.jit(jaxq.quantized(fn, lambda *why: reasons.append(why)))(params, ids)
    dense = jax.jit(lambda params: fn(jaxq.dequantize(params), ids))(params)
    np.testing.assert_allclose(out, dense, rtol=1e-4, atol=1e-4)
    assert not reasons


@pytest.mark.parametrize(
    ("bits", "group", "mean"), [(2, 128, 2.375), (2, 64, 2.75), (3, 128, 3.5), (4, 128, 4.625), (4, 32, 6.5)]
)
def test_average_bits(bits, group, mean):
    assert BitPlane(bits, group).bits_per_weight(4096, 4096) == mean


@given(bits=st.integers(1, 8), rows=st.integers(1, 100), columns=st.integers(1, 9), group=st.integers(1, 40))
def test_exact_size(bits, rows, columns, group):
    format = BitPlane(bits, min(group, rows), "float32")
    groups = -(-rows // min(group, rows))
    made = partial(assemble, format=format)
    q = jax.eval_shape(
        made,
        jax.ShapeDtypeStruct((2, rows, columns), jnp.uint8),
        jax.ShapeDtypeStruct((2, bits, groups, columns), jnp.float32),
        jax.ShapeDtypeStruct((2, groups, columns), jnp.float32),
    )
    promised = format.abstract((2, rows, columns))
    assert jax.tree.structure(q) == jax.tree.structure(promised) and q.shape == (2, rows, columns)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), q, promised)))
    size = 4 * bits * ((rows + 31) // 32) + 4 * (bits + 1) * groups
    assert q.nbytes == format.nbytes((2, rows, columns)) == 2 * columns * size
    assert from_dict(format.to_dict()) == format


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BitPlane(0), "1 to 8 bit planes"),
        (lambda: BitPlane(3, 0), "not a positive number or None"),
        (lambda: BitPlane(3, "tensor"), "not a positive number or None"),
        (lambda: BitPlane(3, 64, "float64"), "scales are stored in"),
        (lambda: BitPlane(3, 64).nbytes((32, 4)), "larger than the input width"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(JaxqError, match=words):
        make()


def test_words():
    q, _ = example(BitPlane(3, 64), 64, 8)
    assert str(q.format) == "bit planes 3-bit g64" and "bit planes 3-bit g64, shape=(64, 8)" in repr(q)
    assert str(BitPlane(2, None)) == "bit planes 2-bit channel"
