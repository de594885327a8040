"""DenseSparseArray as a pytree: its value is base plus overlay, in every way of asking for it."""

import dataclasses
import json

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
from jaxq.formats import Codebook, DenseSparse, DenseSparseArray, Layout, Uniform, from_dict, is_quantized
from jaxq.formats.codebook import assemble, nearest
from jaxq.quantize import Result
from jaxq.solvers.rtn import rtn
from jaxq.solvers.split import solve_split

FORMATS = [DenseSparse(Uniform(3, 16), 0.05), DenseSparse(Codebook(2, "float32"), 0.03, "bfloat16")]
WIDTH, OUT = 48, 16


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def solve(w, format, *, layout=None):
    if isinstance(format, Uniform):
        return rtn(w, format, layout=layout)
    table = jnp.sort(jnp.asarray(normal(*w.shape[:-2], format.entries, w.shape[-1], seed=7)), axis=-2)
    return assemble(nearest(w, table), table, format, layout, w.dtype)


def example(format: DenseSparse, *shape: int, layout: Layout | None = None) -> tuple[DenseSparseArray, np.ndarray]:
    """A split random weight of logical `shape`, with an output that has no entry, and its dense matrix."""
    w = normal(*shape)
    w[..., 1] *= 1e-3
    q, _ = solve_split(solve, w, {}, format, layout=layout)
    return q, slow_matrix(q)


@jax.jit
def compiled(q: DenseSparseArray) -> jax.Array:
    """The canonical matrix by one program; `matrix` itself runs one for every operation."""
    return q.matrix(jnp.float32)


def slow_matrix(q: DenseSparseArray) -> np.ndarray:
    """Base plus overlay, entry by entry."""
    dense = np.array(compiled(q.base))
    for lane in np.ndindex(*q.batch_shape):
        rows, values, starts, counts = (np.asarray(x[lane], np.float64) for x in q.overlay)
        for column in range(dense.shape[-1]):
            for entry in range(int(starts[column]), int(starts[column] + counts[column])):
                dense[(*lane, int(rows[entry]), column)] += np.float32(values[entry])
    return dense


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [(), (3,), (2, 40)], ids=str)
def test_products(format, tokens):
    (q, dense), x = example(format, WIDTH, OUT), normal(*tokens, WIDTH, seed=1)
    half = jnp.asarray(x, jnp.bfloat16)
    whole, one, other, product = jax.jit(lambda q, x, y: (q.dequantize(), x @ q, q.matmul(x), y @ q))(q, x, half)
    np.testing.assert_array_equal(whole, dense)
    # One after the other, too: for one shape, since each operation is a program.
    products = (one, other, x @ q, q.matmul(x)) if len(tokens) == 1 else (one, other)
    for found in products:
        np.testing.assert_allclose(found, x.astype(np.float64) @ dense, rtol=1e-5, atol=1e-5)
    assert product.dtype == jnp.bfloat16
    exact = np.asarray(half, np.float64) @ dense
    np.testing.assert_allclose(np.asarray(product, np.float64), exact, rtol=0.02, atol=0.02 * np.abs(exact).max())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_embedding_look_up(format):
    q, dense = example(format, OUT, WIDTH, layout=Layout.of((OUT, WIDTH), (1,), (0,)))
    ids = np.array([[0, 15, 15], [1, -1, 3]])
    whole, *found = jax.jit(lambda q, i: (q.dequantize(), q[i], q.take_out(i), q[4]))(q, ids)
    np.testing.assert_array_equal(whole, dense.T)
    for rows, want in zip(found, (ids, ids, 4), strict=True):
        np.testing.assert_array_equal(rows, dense.T[want])
    half = jax.eval_shape(lambda q, i: q.astype(jnp.bfloat16).take_out(i), q, ids)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_batch_axes_slice_scan_and_vmap(format):
    layout = Layout.of((OUT, 8, 6), (1, 2), (0,))
    (q, dense), x = example(format, 3, OUT, 8, 6, layout=layout), normal(2, WIDTH, seed=1)
    assert q.shape == (3, OUT, 8, 6) and q.batch_shape == (3,)
    np.testing.assert_array_equal(compiled(q), dense)
    layer = q[1]
    assert is_quantized(layer) and layer.shape == (OUT, 8, 6)
    np.testing.assert_array_equal(compiled(layer), dense[1])

    @jax.jit
    def run(q, x):
        _, layers = jax.lax.scan(lambda carry, layer: (carry, (layer.matrix(), layer.matmul(x))), 0, q)
        return *layers, jax.vmap(lambda q: q.matmul(x))(q)

    matrices, *products = run(q, x)
    np.testing.assert_array_equal(matrices, dense)
    for product in products:
        np.testing.assert_allclose(product, x @ dense, rtol=1e-5, atol=1e-5)
    nested = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), q)
    np.testing.assert_array_equal(compiled(nested), np.stack([dense, dense]))
    with pytest.raises(JaxqError, match="index the batch axes away"):
        q.take_out(jnp.array([0]))


@pytest.mark.parametrize("tokens", [2, 100])
def test_gradients(tokens):
    format = DenseSparse(Codebook(2, "float32"), 0.05)
    (q, dense), x = example(format, WIDTH, OUT), normal(tokens, WIDTH, seed=1)
    grad, of_x = jax.jit(jax.grad(lambda q, x: jnp.sum((x @ q) ** 2), (0, 1), allow_int=True))(q, x)
    assert grad.rows.dtype == grad.starts.dtype == grad.base.codes.dtype == jax.dtypes.float0
    of_weights = 2 * x.T @ (x @ dense)
    column = np.repeat(np.arange(OUT), np.asarray(q.counts))
    scale = np.abs(of_weights).max()
    np.testing.assert_allclose(grad.values, of_weights[np.asarray(q.rows), column], rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(grad.base.table.sum(axis=0), of_weights.sum(axis=0), rtol=1e-4, atol=1e-4 * scale)
    np.testing.assert_allclose(of_x, 2 * (x @ dense) @ dense.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_export_round_trip(format):
    (q, _), x = example(format, WIDTH, OUT), normal(3, WIDTH)
    run = jax.jit(lambda params, x: x @ params["w"])
    again = jax.export.deserialize(
        jax.export.export(run, platforms=["cpu", "cuda", "tpu"])({"w": q}, x).serialize()
    )
    np.testing.assert_array_equal(again.call({"w": q}, x), run({"w": q}, x))


def mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("tokens", [2, 100])
def test_sharded_along_out(format, kind, tokens):
    (q, dense), x, devices = example(format, WIDTH, OUT), normal(tokens, WIDTH, seed=1), mesh(kind)
    specs = q.partition_specs(P(None, "model"))
    placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(devices, spec)), q, specs)
    for spec in (P(), P("data")):
        spread = jax.device_put(x, NamedSharding(devices, spec))
        mapped = jax.shard_map(
            lambda q, x: q.matmul(x), mesh=devices, in_specs=(specs, spec), out_specs=P(*spec or (None,), "model")
        )
        run = jax.jit(lambda q, x, mapped=mapped: (q.dequantize(), x @ q, mapped(q, x)))
        whole, *products = run(placed, spread)
        np.testing.assert_array_equal(whole, dense)
        for product in products:
            np.testing.assert_allclose(product, x @ dense, rtol=1e-5, atol=1e-5)


def test_specs():
    layout = Layout.of((OUT, 8, 6), (1, 2), (0,))
    q, _ = example(FORMATS[0], 3, OUT, 8, 6, layout=layout)
    specs = q.partition_specs(P("data", "model"))
    assert specs.base.codes == specs.base.scale == P("data", None, "model")
    assert specs.rows == specs.values == P("data", None) and specs.starts == specs.counts == P("data", "model")
    with pytest.raises(JaxqError, match="cannot be sharded along its in axis"):
        q.partition_specs(P(None, None, "model"), mesh(AxisType.Auto))


def test_saved_and_loaded(tmp_path):
    layout = Layout.of((OUT, WIDTH), (1,), (0,))
    params = {"a": example(FORMATS[0], 2, WIDTH, OUT)[0], "b": example(FORMATS[1], OUT, WIDTH, layout=layout)[0]}
    save(tmp_path / "model", Result(params, None))
    devices = mesh(AxisType.Auto)
    back = load(
        tmp_path / "model",
        shardings=lambda path, leaf: NamedSharding(devices, P("model")) if path == "b" else None,
    )
    assert jax.tree.structure(back.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    assert back.params["b"].starts.sharding.spec == P("model") and back.params["b"].shape == (OUT, WIDTH)


def test_quantized_function():
    format = DenseSparse(Codebook(3, "float32"), 0.05)
    params = {
        "embed": example(format, 20, 16, layout=Layout.of((20, 16), (1,), (0,)))[0],
        "stack": example(format, 3, 16, 16)[0],
    }

    def fn(params, ids):
        x = params["embed"][ids]
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
        return x @ params["embed"].T

    reasons, ids = [], jnp.array([[1, 2, 3], [4, 19, 0]])
    out = jax.jit(jaxq.quantized(fn, lambda *why: reasons.append(why)))(params, ids)
    want = jax.jit(lambda params, ids: fn(jaxq.dequantize(params), ids))(params, ids)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    assert not reasons


@given(
    rows=st.sampled_from([1, 5, 300, 65535, 65536, 65537]),
    columns=st.integers(1, 40),
    sparsity=st.floats(1e-6, 0.999),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_exact_size(rows, columns, sparsity, dtype):
    format = DenseSparse(Codebook(3), sparsity, dtype)
    entries = max(1, round(sparsity * rows * columns))
    assert format.entries(rows, columns) == entries <= rows * columns
    per_entry = (2 if rows <= 65536 else 4) + (2 if dtype == "float16" else 4)
    per_output = 4 + (2 if rows <= 65535 else 4)
    size = Codebook(3).nbytes((rows, columns)) + entries * per_entry + columns * per_output
    assert format.nbytes((rows, columns)) == size and format.nbytes((7, rows, columns)) == 7 * size
    assert from_dict(json.loads(json.dumps(format.to_dict()))) == format


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_abstract_is_what_the_split_makes(format):
    made, promised = example(format, 2, WIDTH, OUT)[0], format.abstract((2, WIDTH, OUT))
    assert jax.tree.structure(made) == jax.tree.structure(promised)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), made, promised))
    )
    assert made.nbytes == format.nbytes((2, WIDTH, OUT)) and made.shape == promised.shape


@pytest.mark.parametrize(("bits", "paper"), [(3, 3.243), (4, 4.270)])
def test_average_bits_of_llama(bits, paper):
    layers = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    weights, format = sum(a * b for a, b in layers), DenseSparse(Codebook(bits), 0.0045)
    found = sum(8 * format.nbytes(layer) for layer in layers) / weights
    # The paper counts 48 bits an entry; starts and counts take 48 bits an output more.
    assert found - sum(48 * out for _, out in layers) / weights == pytest.approx(paper, abs=6e-4)


def test_nested_formats_round_trip():
    format = DenseSparse(DenseSparse(Uniform(4, 8), 0.01), 0.02, "float16")
    assert from_dict(format.to_dict()) == format and hash(from_dict(format.to_dict())) == hash(format)
    q, _ = solve_split(
        lambda w, format, layout: solve_split(rtn, w, {}, format, layout=layout), normal(32, 8), {}, format
    )
    np.testing.assert_array_equal(compiled(q), slow_matrix(q))
    assert str(dataclasses.replace(FORMATS[0], sparsity=0.0045)) == "uniform 3-bit g16 + 0.45% sparse"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DenseSparse(4, 0.1), "is a format, not 4"),
        (lambda: DenseSparse(Codebook(), 0.0), "between 0 and 1, not 0.0"),
        (lambda: DenseSparse(Codebook(), 1), "between 0 and 1, not 1"),
        (lambda: DenseSparse(Codebook(), float("nan")), "between 0 and 1, not nan"),
        (lambda: DenseSparse(Codebook(), 0.1, "float8"), "overlays are stored in"),
        (lambda: from_dict({"name": "dense_sparse", "sparsity": 0.1}), "needs a base"),
        (lambda: from_dict({"name": "dense_sparse", "base": {"name": "codebook"}}), "and a sparsity"),
        (
            lambda: from_dict({"name": "dense_sparse", "base": {"name": "x"}, "sparsity": 0.1}),
            "unknown format 'x'",
        ),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(JaxqError, match=words):
        make()


def test_placeholders():
    q, _ = example(FORMATS[0], WIDTH, OUT)
    assert "uniform 3-bit g16 + 5% sparse, shape=(48, 16)" in repr(q)
    for placeholder in (None, object(), P("x"), 1):
        rebuilt = jax.tree.map(lambda _, p=placeholder: p, q)
        assert isinstance(rebuilt, DenseSparseArray) and "placeholder" in repr(rebuilt)
