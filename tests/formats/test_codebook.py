"""Look-up tables: packing, rounding, nearest entries, and CodebookArray as a pytree."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq.checkpoint import load, save
from jaxq.errors import JaxqError
from jaxq.formats import Codebook, CodebookArray, Layout, from_dict, is_quantized
from jaxq.formats import codebook as module
from jaxq.formats.codebook import assemble, lookup, nearest, representable, store
from jaxq.quantize import Result

#: Groups of which the last one is shorter, and of a width of 50 the only one.
FORMATS = [
    Codebook(1),
    Codebook(3, "bfloat16"),
    Codebook(4),
    Codebook(8, "float32"),
    Codebook(2, group_size=20),
    Codebook(5, "bfloat16", 50),
]
WIDTH, OUT = 50, 6
NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def table_of(format: Codebook, *columns: int, seed: int = 1) -> np.ndarray:
    """Ascending tables of numbers that `format` can store, (batch..., entries, out)."""
    *batch, out = columns
    values = normal(*batch, format.entries, out, seed=seed).astype(NUMPY[format.table_dtype])
    return np.sort(values.astype(np.float32), axis=-2)


def codes_of(format: Codebook, *shape: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, format.entries, shape).astype(np.uint8)


def example(format: Codebook, *shape: int, layout: Layout | None = None) -> tuple[CodebookArray, np.ndarray]:
    """A random array of canonical `shape` and its dense canonical matrix."""
    *batch, width, out = shape
    size = format.group_size or width
    codes, groups = codes_of(format, *shape), -(-width // size)
    table = table_of(format, *batch, groups, out)
    q = assemble(jnp.asarray(codes), jnp.asarray(table.reshape(*batch, -1, out)), format, layout)
    dense = [
        np.take_along_axis(table[..., row // size, :, :], codes[..., row : row + 1, :].astype(int), axis=-2)
        for row in range(width)
    ]
    return q, np.concatenate(dense, axis=-2)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, [0xE4E4E4E4, 0xE4E4E4E4]),
        (3, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (4, [0x76543210] * 4),
    ],
)
def test_golden_words(bits, words):
    codes = np.tile(np.arange(min(2**bits, 8)), 32)[:32].astype(np.uint8)[:, None]
    q = assemble(codes, jnp.arange(2.0**bits)[:, None], Codebook(bits))
    assert q.codes.dtype == jnp.uint32 and q.codes[:, 0].tolist() == words
    assert q.dequantize()[:, 0].tolist() == codes[:, 0].tolist()


def test_columns_have_tables_of_their_own():
    q = assemble(jnp.array([[0, 1], [1, 1], [1, 0]], jnp.uint8), jnp.array([[-1.0, 2.0], [0.5, 3.0]]), Codebook(1))
    assert q.dequantize().tolist() == [[-1.0, 3.0], [0.5, 3.0], [0.5, 2.0]]
    assert q.codes.tolist() == [[0b110, 0b011]] and q.pad == 29


FINITE = st.floats(width=32, allow_nan=False).filter(lambda x: x == 0 or abs(x) >= 2.0**-126)
SMALL = st.floats(-(2.0**-13), 2.0**-13, width=32).filter(lambda x: x == 0 or abs(x) >= 2.0**-126)
HALVES = st.integers(-4200, 4200).map(lambda n: n * 2.0**-25)
EDGES = st.sampled_from([65504.0, 65519.0, 65520.0, -65520.0, 70000.0, 3.4e38, -3.39e38, 2.0**-126, -0.0])


@given(st.lists(st.one_of(FINITE, SMALL, HALVES, EDGES), min_size=8, max_size=8), st.sampled_from(sorted(NUMPY)))
def test_tables_round_to_nearest_even(values, dtype):
    format = Codebook(3, dtype)
    table = np.array(values, np.float32)[:, None]
    with np.errstate(over="ignore"):
        expected = table.astype(NUMPY[dtype])
    stored = jax.jit(store, static_argnums=1)(table, format)
    assert stored.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(stored), expected.astype(np.float32))
    kept = assemble(np.zeros((1, 1), np.uint8), stored, format).table
    np.testing.assert_array_equal(np.asarray(kept), expected)
    assert bool(representable(table, format)) == np.isfinite(expected.astype(np.float32)).all()


def test_representable_is_told_of_each_matrix():
    table = jnp.array([[[1.0], [2.0]], [[1.0], [1e6]], [[jnp.nan], [1.0]]])
    assert representable(table, Codebook(1)).tolist() == [True, False, False]
    assert representable(table, Codebook(1, "bfloat16")).tolist() == [True, True, False]


@given(seed=st.integers(0, 10**6), bits=st.integers(1, 8), whole=st.booleans())
def test_nearest_is_brute_force(seed, bits, whole):
    rng = np.random.default_rng(seed)
    if whole:
        # Small integers: exact ties, and entries that occur more than once.
        table = np.sort(rng.integers(-6, 7, (2, 2**bits, 3)), axis=-2).astype(np.float32)
        w = rng.integers(-16, 17, (2, 20, 3)).astype(np.float32) / 2
    else:
        table = np.sort(rng.normal(size=(2, 2**bits, 3)).astype(np.float32), axis=-2)
        w = rng.normal(size=(2, 20, 3)).astype(np.float32)
    distance = np.abs(w[:, :, None].astype(np.float64) - table[:, None])
    codes = nearest(jnp.asarray(w), jnp.asarray(table))
    assert codes.dtype == jnp.uint8 and codes.shape == w.shape
    np.testing.assert_array_equal(codes, distance.argmin(axis=2))


def test_entries_are_their_own_nearest():
    low = np.float32(1.0)
    high = np.nextafter(low, np.float32(2))
    table = np.array([-high, -low, low, high], np.float32)[:, None]
    assert nearest(table, table)[:, 0].tolist() == [0, 1, 2, 3]
    largest = np.array([-3.4e38, -3.3e38, 3.3e38, 3.4e38], np.float32)[:, None]
    assert nearest(largest, largest)[:, 0].tolist() == [0, 1, 2, 3]
    assert nearest(jnp.array([[-jnp.inf], [jnp.inf]]), table)[:, 0].tolist() == [0, 3]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("way", [lookup, module._select, module._gather])
def test_look_up(format, way):
    table, codes = table_of(format, 2, OUT), codes_of(format, 2, WIDTH, OUT)
    expected = np.take_along_axis(table, codes.astype(np.int64), axis=-2)
    values = way(jnp.asarray(codes), jnp.asarray(table))
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(way))(codes, table), expected)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_products(format):
    (q, dense), x = example(format, WIDTH, OUT), normal(2, 3, WIDTH)
    np.testing.assert_array_equal(q.dequantize(), dense)
    for product in (x @ q, q.matmul(jnp.asarray(x)), jax.jit(lambda q, x: x @ q)(q, x)):
        np.testing.assert_allclose(product, x.astype(np.float64) @ dense, rtol=1e-5, atol=1e-5)
    assert (jnp.asarray(x, jnp.bfloat16) @ q).dtype == jnp.bfloat16
    assert q.astype(jnp.bfloat16).dequantize().dtype == jnp.bfloat16


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_embedding_look_up(format):
    q, dense = example(format, WIDTH, OUT, layout=Layout.of((OUT, WIDTH), (1,), (0,)))
    ids = jnp.array([[0, 5, 5], [2, -1, 3]])
    np.testing.assert_array_equal(q.dequantize(), dense.T)
    np.testing.assert_array_equal(q[ids], dense.T[np.asarray(ids)])
    np.testing.assert_array_equal(jax.jit(lambda q, i: q.take_out(i))(q, ids), dense.T[np.asarray(ids)])
    np.testing.assert_array_equal(q[1:3], dense.T[1:3])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_batch_axes_slice_scan_and_vmap(format):
    (q, dense), x = example(format, 3, WIDTH, OUT, layout=Layout((10,), (), (0, 1, 2))), normal(2, WIDTH)
    assert q.shape == (3, 5, 10, OUT) and q.batch_shape == (3,)
    assert is_quantized(q[1]) and q[1].shape == (5, 10, OUT)
    np.testing.assert_array_equal(q[1].matrix(), dense[1])
    _, layers = jax.lax.scan(lambda carry, layer: (carry, (layer.matrix(), layer.matmul(x))), 0, q)
    np.testing.assert_array_equal(layers[0], dense)
    np.testing.assert_allclose(layers[1], x @ dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda q: q.matmul(x))(q), x @ dense, rtol=1e-5, atol=1e-5)
    with pytest.raises(JaxqError, match="index the batch axes away"):
        q.take_out(jnp.array([0]))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradient_of_tables(format):
    (q, dense), x = example(dataclasses.replace(format, table_dtype="float32"), WIDTH, OUT), normal(3, WIDTH)
    grad = jax.jit(jax.grad(lambda q: jnp.sum((x @ q) ** 2), allow_int=True))(q)
    assert grad.codes.dtype == jax.dtypes.float0
    of_weights = 2 * x.T @ (x @ dense)
    codes, size = codes_of(format, WIDTH, OUT), format.group_size or WIDTH
    expected = [
        (of_weights * (codes == entry))[first : first + size].sum(axis=0)
        for first in range(0, WIDTH, size)
        for entry in range(format.entries)
    ]
    np.testing.assert_allclose(grad.table, np.stack(expected), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_export_round_trip(format):
    (q, _), x = example(format, WIDTH, OUT), normal(3, WIDTH)
    run = jax.jit(lambda params, x: x @ params["w"])
    for platforms in (["cpu"], ["cpu", "cuda", "tpu"]):
        again = jax.export.deserialize(jax.export.export(run, platforms=platforms)({"w": q}, x).serialize())
        np.testing.assert_array_equal(again.call({"w": q}, x), run({"w": q}, x))


def mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_along_out(format, kind):
    (q, dense), x, devices = example(format, 64, 16), normal(3, 64), mesh(kind)
    specs = q.partition_specs(P(None, "model"))
    assert specs.codes == specs.table == P(None, "model")
    placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(devices, spec)), q, specs)
    x = jax.device_put(x, NamedSharding(devices, P()))
    np.testing.assert_array_equal(jax.jit(lambda q: q.dequantize())(placed), dense)
    np.testing.assert_allclose(jax.jit(lambda x, q: x @ q)(x, placed), x @ dense, rtol=1e-5, atol=1e-5)
    both = partial(jax.shard_map, mesh=devices, in_specs=(specs, P()), out_specs=P(None, "model"))
    np.testing.assert_allclose(jax.jit(both(lambda q, x: q.matmul(x)))(placed, x), x @ dense, rtol=1e-5, atol=1e-5)


def test_nearest_in_a_shard_map():
    w, table, devices = normal(16, 8), table_of(Codebook(4), 8), mesh(AxisType.Auto)
    for specs in ((P(None, "model"), P(None, "model")), (P("data"), P())):
        out = jax.jit(jax.shard_map(nearest, mesh=devices, in_specs=specs, out_specs=specs[0]))(w, table)
        np.testing.assert_array_equal(out, nearest(w, table))


@pytest.mark.parametrize(("group", "rows"), [(None, None), (8, "model"), (16, "model")])
def test_sharded_along_in(group, rows):
    (q, dense), x, devices = example(Codebook(4, group_size=group), 64, 16), normal(3, 64), mesh(AxisType.Auto)
    specs = q.partition_specs(P("model"), devices)
    assert specs.codes == P("model", None) and specs.table == P(rows, None)

    @partial(jax.shard_map, mesh=devices, in_specs=(specs, P(None, "model")), out_specs=P())
    def product(q, x):
        assert q.shape == (16, 16)
        return jax.lax.psum(q.matmul(x), "model")

    np.testing.assert_allclose(product(q, x), x @ dense, rtol=1e-5, atol=1e-5)
    with pytest.raises(JaxqError, match="inside a packed word"):
        example(Codebook(3), 64, 16)[0].partition_specs(P("model"), devices)
    with pytest.raises(JaxqError, match="a group would be cut"):
        example(Codebook(4, group_size=32), 64, 16)[0].partition_specs(P("model"), devices)


def test_saved_and_loaded(tmp_path):
    layout = Layout.of((16, 32), (1,), (0,))
    params = {
        "a": example(Codebook(3, group_size=20), 2, WIDTH, OUT)[0],
        "b": example(Codebook(4, "bfloat16"), 32, 16, layout=layout)[0],
    }
    save(tmp_path / "model", Result(params, None))
    devices = mesh(AxisType.Auto)
    back = load(
        tmp_path / "model",
        shardings=lambda path, leaf: NamedSharding(devices, P("model")) if path == "b" else None,
    )
    assert jax.tree.structure(back.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    assert back.params["b"].table.sharding.spec == P(None, "model")


def test_quantized_function():
    params = {
        "embed": example(Codebook(4), 16, 20, layout=Layout.of((20, 16), (1,), (0,)))[0],
        "stack": example(Codebook(3), 3, 16, 16)[0],
    }

    def fn(params, ids):
        x = params["embed"][ids]
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
        return x @ params["embed"].T

    reasons, ids = [], jnp.array([[1, 2, 3], [4, 19, 0]])
    out = jax.jit(jaxq.quantized(fn, lambda *why: reasons.append(why)))(params, ids)
    np.testing.assert_allclose(out, fn(jaxq.dequantize(params), ids), rtol=1e-5, atol=1e-5)
    assert not reasons


def mean_bits(layers: list[tuple[int, int]], format) -> float:
    weights = sum(a * b for a, b in layers)
    return sum(format.bits_per_weight(a, b) * a * b for a, b in layers) / weights


@pytest.mark.parametrize(
    ("hidden", "inner", "bits", "mean"),
    [(4096, 11008, 3, 3.027), (4096, 11008, 4, 4.054), (5120, 13824, 3, 3.021), (5120, 13824, 4, 4.043)],
)
def test_average_bits_of_llama(hidden, inner, bits, mean):
    layers = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
    assert mean_bits(layers, Codebook(bits)) == pytest.approx(mean, abs=6e-4)


def test_average_bits_of_a_narrow_model():
    layers = [(576, 576)] * 2 + [(576, 192)] * 2 + [(576, 1536)] * 2 + [(1536, 576)]
    found = [round(mean_bits(layers, Codebook(bits)), 3) for bits in (2, 3, 4)]
    assert found == pytest.approx([2.094, 3.188, 4.375], abs=1.5e-3)


@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 100),
    columns=st.integers(1, 9),
    dtype=st.sampled_from(sorted(NUMPY)),
    group=st.integers(1, 100),
)
def test_exact_size(bits, rows, columns, dtype, group):
    format = Codebook(bits, dtype, group if group <= rows else None)
    groups = -(-rows // group) if group <= rows else 1
    made = partial(assemble, format=format)
    codes, table = (jax.ShapeDtypeStruct((2, n, columns), jnp.float32) for n in (rows, groups * 2**bits))
    q, promised = jax.eval_shape(made, codes, table), format.abstract((2, rows, columns))
    assert jax.tree.structure(q) == jax.tree.structure(promised) and q.shape == (2, rows, columns)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), q, promised)))
    size = 4 * ((rows * bits + 31) // 32) + groups * 2**bits * NUMPY[dtype](0).itemsize
    assert q.nbytes == format.nbytes((2, rows, columns)) == 2 * columns * size
    assert from_dict(format.to_dict()) == format and format.entries == 2**bits


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Codebook(0), "1 to 8 bits"),
        (lambda: Codebook(9), "1 to 8 bits"),
        (lambda: Codebook(True), "1 to 8 bits"),
        (lambda: Codebook(4, "float64"), "tables are stored in"),
        (lambda: Codebook(4, group_size=0), "group size 0 is not a positive number"),
        (lambda: Codebook(4, group_size=128).nbytes((64, 8)), "group size 128 is larger than the input width 64"),
        (lambda: from_dict({"name": "codebook", "symmetric": True}), "no setting 'symmetric'"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(JaxqError, match=words):
        make()


def test_words():
    q, _ = example(Codebook(3), 64, 8)
    assert str(q.format) == "codebook 3-bit" and "codebook 3-bit, shape=(64, 8), bits_per_weight=5.000" in repr(q)
    assert "placeholder" in repr(jax.tree.map(lambda _: None, q))
    assert str(Codebook(3, group_size=64)) == "codebook 3-bit g64"


def test_a_description_from_before_groups():
    assert from_dict({"name": "codebook", "bits": 3, "table_dtype": "bfloat16"}) == Codebook(3, "bfloat16")
