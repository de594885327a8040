"""Products for TPUs against float64, in Pallas's interpret mode with race detection. No TPU runs here."""

import contextlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import error, exact, normal, random_array
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq.errors import JaxqError
from jaxq.formats import BitPlane, Codebook, PreparedArray, Uniform
from jaxq.kernels.codebook import tpu as codebook_tpu
from jaxq.kernels.codebook import tpu_words
from jaxq.kernels.tpu import blocks, generations, words

EXACT = 1e-5

#: Every way to multiply: target, format, in, out, tokens, at some edge of a tile, a group or a block.
CASES = [
    ("tpu-v4", Codebook(4), 65, 129, 1),
    ("tpu-v5", Uniform(4, 64), 300, 200, 3),
    ("tpu-v5", Uniform(3, None, symmetric=True), 513, 40, 17),
    ("tpu-v5", Codebook(4, "float32"), 300, 130, 2),
    ("tpu-v5", Codebook(2, "bfloat16"), 257, 128, 9),
    ("tpu-v5", BitPlane(3, 128), 1100, 127, 5),
    ("tpu-v5", BitPlane(2, None), 64, 256, 16),
    ("tpu-v6", Uniform(4, 192, scale_dtype="float32"), 700, 100, 3),
    ("tpu-v6", Codebook(4), 300, 200, 3),
    ("tpu-v6", Codebook(3, "float32"), 90, 20, 1),
    ("tpu-v4", Codebook(2, "float32", 128), 600, 20, 3),
    ("tpu-v5", Codebook(3, "float16", 64), 300, 130, 2),
    ("tpu-v5", Codebook(4, "float32", 256), 513, 40, 17),
    ("tpu-v6", Codebook(4, "float16", 64), 300, 200, 3),
]


@contextlib.contextmanager
def interpreted():
    """Kernels for TPUs run here, on memory of NaN at first; an AssertionError if two accesses race."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    try:
        with pltpu.force_tpu_interpret_mode(params):
            yield
        assert interpreter.races is not None, "nothing was interpreted"
        assert not interpreter.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def product(x, prepared):
    return prepared.kernel.product(x, prepared)[:, : prepared.matrix_shape[1]]


@pytest.mark.parametrize(("target", "format", "width", "out", "tokens"), CASES, ids=str)
def test_products(target, format, width, out, tokens):
    array, x = random_array(format, width, out), normal(tokens, width)
    prepared = jaxq.prepare(array, target)
    assert isinstance(prepared, PreparedArray) and prepared.target == target
    assert prepared.shape == array.shape and prepared.dtype == array.dtype
    with interpreted():
        y = jax.block_until_ready(product(jnp.asarray(x), prepared))
    # One output of few inputs may nearly cancel; what it is measured against is then what was added up.
    mass = np.abs(x) @ np.abs(np.asarray(array.matrix(jnp.float32), np.float64)) + 1e-9
    assert y.dtype == jnp.float32
    assert np.max(np.abs(np.asarray(y, np.float64) - exact(x, array)) / mass) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("group", [64, 128, None])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_random_shapes(bits, group, seed):
    rng = np.random.default_rng(1000 * bits + 10 * (group or 0) + seed)
    width, out, tokens = int(rng.integers(group or 1, 700)), int(rng.integers(1, 300)), int(rng.integers(1, 20))
    target = generations.TARGETS[int(rng.integers(3))]
    for format in (Uniform(bits, group), BitPlane(bits, group), Codebook(bits)):
        array, x = random_array(format, width, out, seed=seed), normal(tokens, width, seed=seed)
        with interpreted():
            y = jax.block_until_ready(product(jnp.asarray(x), jaxq.prepare(array, target)))
        assert error(y, exact(x, array)) < EXACT, (format, target, width, out, tokens)


@pytest.mark.parametrize(
    ("target", "format"),
    [("tpu-v5", Codebook(4)), ("tpu-v6", Codebook(4)), ("tpu-v5", Uniform(4, 64)), ("tpu-v6", Uniform(4, 64))],
    ids=str,
)
def test_bfloat16_activations(target, format):
    """Tables are rounded to bfloat16, as in the reference; codes are exact and scales stay float32."""
    array, x = random_array(format, 300, 70), jnp.asarray(normal(2, 300), jnp.bfloat16)
    dtype = jnp.bfloat16 if isinstance(format, Codebook) else jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(array.matrix(dtype), np.float64)
    with interpreted():
        y = jax.block_until_ready(product(x, jaxq.prepare(array, target)))
    assert error(y, expected) < EXACT


@pytest.mark.parametrize(
    ("target", "format"),
    [
        ("tpu-v5", Uniform(1, 64, scale_dtype="bfloat16")),
        ("tpu-v6", Uniform(3, "tensor", symmetric=True)),
        ("tpu-v6", Uniform(2, 64)),
        *(("tpu-v4", Codebook(1)), ("tpu-v5", Codebook(2)), ("tpu-v5", Codebook(4)), ("tpu-v6", Codebook(3))),
        ("tpu-v4", BitPlane(4, 64)),
    ],
    ids=str,
)
def test_layouts_are_lossless(target, format):
    array, ids = random_array(format, 2, 100, 33), jnp.array([32, 0, -1])
    prepared = jaxq.prepare(array, target)
    assert prepared.batch_shape == (2,) and prepared.matrix_shape == (100, 33)

    @jax.jit
    def run(q, array):
        return jaxq.restore(q), q.matrix(), array.matrix(), q[1].take_out(ids), array[1].take_out(ids)

    back, dense, expected, rows, taken = run(prepared, array)
    assert jax.tree.structure(back) == jax.tree.structure(array)
    jax.tree.map(np.testing.assert_array_equal, back, array)
    np.testing.assert_array_equal(dense, expected)
    np.testing.assert_array_equal(rows, taken)


def test_codes_lie_where_they_are_said_to():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (64, 1)).astype(np.uint8))
    places = [place for code in tpu_words.places(4) for place in code]
    assert sorted(places) == list(range(32))
    word = int(tpu_words.pack(codes, 4).astype(jnp.uint32)[3, 0])
    found = [sum(((word >> place) & 1) << bit for bit, place in enumerate(code)) for code in tpu_words.places(4)]
    assert found == [int(codes[8 * k + 3, 0]) for k in range(8)]
    halves = int(words.pack(codes, 4).astype(jnp.uint32)[3, 0])
    assert [(halves >> 4 * s) & 15 for s in range(4)] == [int(codes[16 * s + 6, 0]) for s in range(4)]
    assert [(halves >> 16 + 4 * s) & 15 for s in range(4)] == [int(codes[16 * s + 7, 0]) for s in range(4)]


def test_pairs_round_to_their_upper_entry():
    """Of every sign, with zeros of both signs and neighbours of what rounding would reach."""
    least = float(jnp.finfo(jnp.bfloat16).min)
    some = jnp.asarray([0.0, -0.0, 1.0, -1.0, 1.0078125, least, 2e-38, -2.5], jnp.bfloat16)
    low, high = (x.reshape(-1) for x in jnp.meshgrid(some, some, indexing="ij"))
    table = jnp.zeros((1, 16, 64), jnp.bfloat16).at[0, 0].set(low).at[0, 8].set(high)
    word = codebook_tpu._pairs(table)[0, 0]
    first = jax.lax.bitcast_convert_type(word, jnp.float32).astype(jnp.bfloat16)
    second = jax.lax.bitcast_convert_type(word << 16, jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(first, np.float64), np.asarray(low, np.float64), rtol=0, atol=1e-40)
    np.testing.assert_array_equal(np.asarray(second, np.float32), np.asarray(high, np.float32))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_pieces_add_up_exactly(name):
    table = jnp.asarray(normal(2, 16, 50)).astype(name)
    pieces = np.asarray(codebook_tpu._pieces(table), np.float64)
    np.testing.assert_array_equal(pieces.sum(0), np.asarray(table, np.float64))


def test_batched_and_in_loops(monkeypatch):
    # The interpreter knows no batched grids with semantics; the compiler does: see test_tpu_aot.py.
    monkeypatch.setattr(blocks, "SEMANTICS", None)
    stack = random_array(Uniform(4, 64, scale_dtype="float32"), 2, 128, 40)
    prepared, x = jaxq.prepare(stack, "tpu-v5"), jnp.asarray(normal(2, 3, 128))
    expected = np.stack([exact(x[i], jax.tree.map(lambda z, i=i: z[i], stack)) for i in range(2)])
    with interpreted():
        mapped = jax.block_until_ready(jax.vmap(product)(x, prepared))
    assert error(mapped, expected) < EXACT
    with interpreted():
        _, looped = jax.lax.scan(lambda carry, layer: (carry, product(*layer)), 0, (x, prepared))
        jax.block_until_ready(looped)
    assert error(looped, expected) < EXACT


def test_one_program_for_all_platforms():
    array, x = random_array(BitPlane(2, 64), 200, 30), jnp.asarray(normal(2, 200))
    prepared = jaxq.prepare(array, "tpu")
    run = jax.jit(lambda q, x: x @ q)
    exported = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(prepared, x)
    assert exported.mlir_module().count("tpu_custom_call") == 1
    # On this machine the reference is what runs.
    y = jax.export.deserialize(exported.serialize()).call(prepared, x)
    assert error(y, exact(x, array)) < 1e-6


@pytest.mark.parametrize("format", [Codebook(4), Uniform(4, 64)], ids=str)
def test_shard_map(format):
    array, x = random_array(format, 128, 256), jnp.asarray(normal(2, 128))
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    prepared = jaxq.prepare(array, "tpu-v6")
    specs = prepared.partition_specs(P(None, "model"))
    product = jax.shard_map(lambda q, x: q.matmul(x), mesh=mesh, in_specs=(specs, P()), out_specs=P(None, "model"))
    assert error(jax.jit(product)(prepared, x), exact(x, array)) < 1e-6
    exported = jax.export.export(jax.jit(product), platforms=["tpu"])(prepared, x)
    assert "tpu_custom_call" in exported.mlir_module()
    with pytest.raises(JaxqError, match="whole tiles of its outputs only"):
        prepared.partition_specs(P("model"))


def test_batched_in_one_program_for_all_platforms():
    stack, x = random_array(Codebook(3), 2, 64, 40), jnp.asarray(normal(2, 3, 64))
    prepared = jaxq.prepare(stack, "tpu")
    run = jax.jit(jax.vmap(lambda q, x: q.matmul(x)))
    exported = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(prepared, x)
    assert exported.mlir_module().count("tpu_custom_call") == 1
    np.testing.assert_allclose(exported.call(prepared, x), jnp.matmul(x, stack.matrix()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", generations.TARGETS)
def test_derivatives_are_those_of_the_reference(target):
    array, x = random_array(Codebook(4, "float32"), 80, 20), jnp.asarray(normal(2, 80))

    def loss(table, x, q):
        moved = jax.tree.map(lambda z: table if jnp.issubdtype(z.dtype, jnp.floating) else z, q)
        return jnp.sum(jnp.sin(0.01 * (x @ moved)))

    of = jax.jit(jax.value_and_grad(loss, (0, 1)))
    prepared = jaxq.prepare(array, target)
    wide = prepared.parts[1]
    value, (by_table, by_x) = of(wide, x, prepared)
    expected, (table, activations) = of(array.table, x, array)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(by_table[:, :20], table, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(by_x, activations, rtol=1e-4, atol=1e-6)
    exported = jax.export.export(of, platforms=["tpu"])(wide, x, prepared)
    assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.parametrize(("tokens", "dtype", "kernel"), [(128, "float32", True), (129, "float32", False)])
def test_many_tokens_take_the_reference(tokens, dtype, kernel):
    assert blocks.TOKENS == 128
    prepared = jaxq.prepare(random_array(Codebook(4), 64, 16), "tpu")
    x = jnp.ones((tokens, 64), dtype)
    module = jax.export.export(jax.jit(lambda q, x: x @ q), platforms=["tpu"])(prepared, x).mlir_module()
    assert ("tpu_custom_call" in module) == kernel


def test_what_has_no_kernel_stays_and_is_told():
    params = {
        "wide": random_array(Codebook(8), 32, 4),
        "group": random_array(Uniform(4, 48), 96, 4),
        "planes": random_array(BitPlane(2, 32), 64, 4),
        "many": random_array(BitPlane(5, 64), 64, 4),
        "fine": random_array(Uniform(4, 64), 64, 4),
    }
    told = {}
    prepared = jaxq.prepare(params, "tpu", on_fallback=told.__setitem__)
    assert set(told) == {"wide", "group", "planes", "many"} and "multiples of 64" in told["group"]
    assert isinstance(prepared["fine"], PreparedArray) and prepared["wide"] is params["wide"]
    with pytest.raises(JaxqError, match="activations for tpu cannot be 'int8'; use float32"):
        jaxq.prepare(params, "tpu", activations="int8")


def test_from_one_target_to_another():
    array = random_array(Uniform(4, 64), 100, 30)
    there = jaxq.prepare(jaxq.prepare(array, "tpu-v6"), "tpu-v4")
    assert there.target == "tpu-v4"
    jax.tree.map(np.testing.assert_array_equal, jaxq.restore(there), array)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        *(("TPU v2", "tpu-v4"), ("TPU v4", "tpu-v4"), ("TPU v5 lite", "tpu-v5"), ("TPU v5", "tpu-v5")),
        *(("TPU v6 lite", "tpu-v6"), ("TPU7x", "tpu-v6"), ("TPU", "tpu-v4")),
    ],
)
def test_generations(kind, target):
    assert generations.of_device_kind(kind) == target


def test_to_import_the_package_does_not_load_the_compiler():
    code = "import sys, jaxq; assert 'jax.experimental.pallas' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
