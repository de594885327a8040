"""Native CPU products against float64, on every instruction set that this processor has."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import error, exact, normal, random_array
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq.checkpoint import load, save
from jaxq.errors import JaxqError
from jaxq.formats import BitPlane, Codebook, DenseSparse, PreparedArray, Uniform
from jaxq.kernels import native
from jaxq.quantize import Result
from jaxq.solvers.kmeans import kmeans_solve
from jaxq.solvers.split import solve_split

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())


def runs_here(name: str) -> bool:
    try:
        native.configure(instruction_set=name)
    except JaxqError:
        return False
    native.configure()
    return True


SETS = [name for name in ("avx512", "avx2", "neon", "scalar") if native.available() and runs_here(name)]
FORMATS = [
    *(Codebook(bits, dtype) for bits, dtype in ((1, "float16"), (2, "bfloat16"), (3, "float32"), (4, "float16"))),
    Uniform(1, None),
    Uniform(2, 64, symmetric=True),
    Uniform(3, "tensor", scale_dtype="float32"),
    Uniform(4, 128),
    Uniform(4, 64, scale_dtype="bfloat16"),
    *(BitPlane(2, 8), BitPlane(3, 128), BitPlane(4, None, "float32"), BitPlane(1, 24, "bfloat16")),
]
REPRESENTATIVE = [Codebook(3), Uniform(4, 64), BitPlane(3, 32)]


@pytest.fixture(autouse=True)
def _best_set_again():
    yield
    native.configure()


def group_of(format) -> int:
    size = getattr(format, "group_size", None)
    return size if isinstance(size, int) else 1


@pytest.mark.parametrize("name", SETS)
@given(
    format=st.sampled_from(FORMATS),
    width=st.integers(1, 1400),
    out=st.integers(1, 140),
    tokens=st.sampled_from([1, 2, 3, 5, 8, 13, 30]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=15, deadline=None)
def test_any_shape(name, format, width, out, tokens, seed):
    native.configure(instruction_set=name)
    width = max(width, group_of(format))
    array, x = random_array(format, width, out, seed=seed), normal(tokens, width, seed=seed + 1)
    prepared = jaxq.prepare(array)
    assert isinstance(prepared, PreparedArray) and prepared.shape == array.shape
    y = x @ prepared
    # One output of few inputs may nearly cancel; what it is measured against is then what was added up.
    dense = np.abs(np.asarray(array.matrix(jnp.float32), np.float64))
    assert np.max(np.abs(np.asarray(y, np.float64) - exact(x, array)) / (np.abs(x) @ dense + 1e-9)) < 2e-6


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("format", [Uniform(4, 64), Uniform(3, None), Uniform(2, 128), BitPlane(3, 64)], ids=str)
def test_rounded_activations(name, format):
    native.configure(instruction_set=name)
    array = random_array(format, 700, 70)
    for tokens in (1, 8):
        x = normal(tokens, 700, seed=tokens)
        expected = exact(x, array)
        for activations, bound in (("float32", 1e-6), ("int16", 1e-4), ("int8", 2e-2)):
            y = x @ jaxq.prepare(array, activations=activations)
            assert error(y, expected) < bound
        assert error(x @ jaxq.prepare(array, activations="int8"), expected) > 1e-4


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_preparing_loses_nothing(format):
    width = max(300, group_of(format))
    array = random_array(format, 2, width, 70)
    prepared = jaxq.prepare(array)
    assert prepared.shape == array.shape and prepared.dtype == array.dtype and prepared.batch_shape == (2,)
    back = jaxq.restore(prepared)
    assert jax.tree.structure(back) == jax.tree.structure(array)
    jax.tree.map(np.testing.assert_array_equal, back, array)
    np.testing.assert_array_equal(prepared.dequantize(), array.dequantize())
    np.testing.assert_array_equal(prepared[1].take_out(jnp.array([3, 69])), array[1].take_out(jnp.array([3, 69])))


@pytest.mark.parametrize("format", REPRESENTATIVE, ids=str)
def test_dtypes_and_leading_axes(format):
    array = random_array(format, 200, 30)
    prepared, x = jaxq.prepare(array), normal(2, 3, 200)
    assert error(jax.jit(lambda q, x: x @ q)(prepared, x), exact(x, array)) < 1e-6
    assert (x[0, 0] @ prepared).shape == (30,)
    half = jnp.asarray(x, jnp.bfloat16)
    y = half @ prepared
    assert y.dtype == jnp.bfloat16 and error(y, exact(half.astype(jnp.float32), array)) < 4e-3


@pytest.mark.parametrize("format", REPRESENTATIVE, ids=str)
def test_vmap_and_scan(format):
    array = random_array(format, 3, 200, 30)
    prepared, x = jaxq.prepare(array), normal(3, 4, 200)
    dense = np.asarray(array.matrix(), np.float64)
    experts = jax.vmap(lambda q, x: q.matmul(x))
    assert error(experts(prepared, x), x @ dense) < 1e-6
    shared = jax.vmap(lambda q, x: q.matmul(x), in_axes=(0, None))(prepared, x[0])
    assert error(shared, x[0] @ dense) < 1e-6
    tokens = jax.vmap(lambda q, x: q.matmul(x), in_axes=(None, 0))(prepared[1], x)
    assert error(tokens, x @ dense[1]) < 1e-6
    both = jax.vmap(jax.vmap(lambda q, x: q.matmul(x), in_axes=(None, 0)), in_axes=(0, None))(prepared, x)
    assert error(both, x[None] @ dense[:, None]) < 1e-6
    _, layers = jax.lax.scan(lambda carry, layer: (carry, layer.matmul(x[0])), 0, prepared)
    assert error(layers, x[0] @ dense) < 1e-6


@pytest.mark.parametrize(
    "format", [Codebook(3, "float32"), Uniform(4, 64, scale_dtype="float32"), BitPlane(2, 32, "float32")], ids=str
)
def test_gradients(format):
    array, x = random_array(format, 150, 20), normal(3, 150)

    def loss(q, x):
        return jnp.sum(q.matmul(x) ** 2)

    prepared = jaxq.prepare(array)
    of_prepared = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(prepared, x)
    of_array = jax.grad(loss, argnums=(0, 1), allow_int=True)(array, x)
    np.testing.assert_allclose(of_prepared[1], of_array[1], rtol=1e-4, atol=1e-2)

    def continuous(q):
        return [leaf for leaf in jax.tree.leaves(q) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    # Read back as an array, the gradient of the parts is that of the canonical members.
    def number(part):
        return jnp.zeros(part.shape, jnp.uint8) if part.dtype == jax.dtypes.float0 else part

    parts = [number(part) for part in of_prepared[0].parts]
    in_size, out_size = array.matrix_shape
    kernel = prepared.kernel
    restored = [z[..., :out_size] for z in kernel.restore(format, tuple(parts), in_size)[1:]]
    for found, expected in zip(restored, continuous(of_array[0]), strict=False):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-2)
    batched = jax.vmap(jax.grad(loss, argnums=1), in_axes=(None, 0))(prepared, jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(batched[1], 2 * of_array[1], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("format", REPRESENTATIVE, ids=str)
def test_one_program_for_all_platforms(format):
    prepared, x = jaxq.prepare(random_array(format, 200, 30)), normal(2, 200)
    run = jax.jit(lambda q, x: x @ q)
    exported = jax.export.export(run, platforms=["cpu", "cuda", "tpu"], disabled_checks=native.EXPORT_CHECKS)(
        prepared, x
    )
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(prepared, x), run(prepared, x))


def test_quantized_function_with_prepared_leaves():
    params = {"up": random_array(Codebook(4), 64, 96), "down": random_array(BitPlane(2, 32), 96, 64)}

    def fn(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    x, reasons = normal(5, 64), []
    out = jax.jit(jaxq.quantized(fn, lambda *why: reasons.append(why)))(jaxq.prepare(params), x)
    np.testing.assert_allclose(out, fn(jaxq.dequantize(params), x), rtol=1e-4, atol=1e-4)
    assert not reasons


@pytest.mark.parametrize("format", [Codebook(3), Uniform(4, 64)], ids=str)
def test_shard_map(format):
    array, x = random_array(format, 128, 64), normal(2, 128)
    devices = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    prepared = jaxq.prepare(array)
    specs = prepared.partition_specs(P(None, "model"))
    placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(devices, spec)), prepared, specs)
    product = partial(jax.shard_map, mesh=devices, in_specs=(specs, P()), out_specs=P(None, "model"))
    y = jax.jit(product(lambda q, x: q.matmul(x)))(placed, x)
    assert error(y, exact(x, array)) < 1e-6
    with pytest.raises(JaxqError, match="whole tiles of its outputs only"):
        prepared.partition_specs(P("model"))


def test_activations_that_are_no_numbers_are_not_hidden():
    for format in REPRESENTATIVE:
        prepared = jaxq.prepare(random_array(format, 200, 30))
        for bad in (np.nan, np.inf):
            for tokens in (1, 12):
                x = normal(tokens, 200)
                x[0, 150] = bad
                y = np.asarray(x @ prepared)
                assert not np.isfinite(y[0]).any() and np.isfinite(y[1:]).all()


def test_zero_activations():
    for format in REPRESENTATIVE:
        y = jnp.zeros((1, 200)) @ jaxq.prepare(random_array(format, 200, 30))
        np.testing.assert_array_equal(y, 0)


def test_threads_do_not_change_bits():
    x = normal(3, 512)
    for format in REPRESENTATIVE:
        prepared, results = jaxq.prepare(random_array(format, 512, 300)), []
        for threads in (1, 2, 0):
            native.configure(threads=threads)
            results.append(np.asarray(x @ prepared))
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])


def test_what_has_no_kernel_stays_and_is_told():
    params = {
        "dense": jnp.ones((4, 4)),
        "wide": random_array(Codebook(8), 32, 4),
        "group": random_array(Uniform(4, 20), 40, 4),
        "planes": random_array(BitPlane(2, 12), 48, 4),
        "fine": random_array(Codebook(4), 32, 4),
    }
    told = {}
    prepared = jaxq.prepare(params, on_fallback=lambda path, why: told.setdefault(path, why))
    assert set(told) == {"wide", "group", "planes"} and "multiples of 64" in told["group"]
    assert isinstance(prepared["fine"], PreparedArray) and prepared["wide"] is params["wide"]


def test_files_hold_canonical_arrays(tmp_path):
    params = {"w": random_array(Codebook(4), 64, 32)}
    save(tmp_path / "model", Result(jaxq.prepare(params), None))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model").params, params)


def test_overlay_on_a_prepared_base():
    w = normal(128, 40)
    array, _ = solve_split(kmeans_solve, w, {}, DenseSparse(Codebook(3), 0.01))
    prepared = jaxq.prepare(array)
    assert isinstance(prepared.base, PreparedArray)
    x = normal(1, 128)
    assert error(x @ prepared, exact(x, array)) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, jaxq.restore(prepared), array)


def test_bad_settings_are_named():
    array = random_array(Codebook(4), 32, 4)
    for call, words in [
        (lambda: jaxq.prepare(array, "abacus"), "no kernels for 'abacus'"),
        (lambda: jaxq.prepare(array, activations="int4"), "activations cannot be 'int4'"),
        (lambda: native.configure(instruction_set="sse9"), "cannot run native products"),
        (lambda: native.configure(threads=-1), "cannot run native products"),
    ]:
        with pytest.raises(JaxqError, match=words):
            call()


@pytest.mark.parametrize(
    ("setting", "words"),
    [({"CXX": "no-such-compiler"}, "no-such-compiler"), ({"JAXQ_NATIVE": "0"}, "JAXQ_NATIVE=0")],
)
def test_without_a_compiler(tmp_path, setting, words):
    code = (
        "import warnings, jax.numpy as jnp, jaxq\n"
        "from jaxq.kernels import native\n"
        "q = jaxq.rtn(jnp.ones((128, 8)), jaxq.Uniform(4, 64))\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    same = jaxq.prepare({'w': q})['w'], jaxq.prepare(q)\n"
        "assert all(z is q for z in same)\n"
        "print(len([w for w in seen if 'native' in str(w.message)]), native.reason())\n"
    )
    environment = {**os.environ, **setting, "JAXQ_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.startswith("1 ") and words in done.stdout and not list(tmp_path.iterdir())
