"""Native CPU products against float64, on every instruction set that this processor has."""

import concurrent.futures
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import error, exact, normal, random_array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq.checkpoint import load, save
from jaxq.cli import products
from jaxq.errors import JaxqError
from jaxq.formats import BitPlane, Codebook, DenseSparse, Dynamic, Layout, PreparedArray, Uniform, rounded_input
from jaxq.formats.activations import DynamicQuantizer
from jaxq.formats.dense_sparse import DenseSparseArray, compress
from jaxq.kernels import native
from jaxq.kernels.bitplane import native_rows
from jaxq.kernels.native import build, library
from jaxq.quantize import Result

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())


def runs_here(name: str) -> bool:
    try:
        native.configure(instruction_set=name)
    except JaxqError:
        return False
    native.configure()
    return True


NAMES = ("avx512bf16", "avx512", "avx2", "neondot", "neon", "scalar")
SETS = [name for name in NAMES if native.available() and runs_here(name)]
#: Formats, each with inputs and outputs at some edge of a block, a run, a group, a tile or a slab.
CASES = [
    (Codebook(1, "bfloat16"), 1, 1),
    (Codebook(3, "float32"), 513, 17),
    (Codebook(4, "float16"), 1400, 15),
    (Codebook(1, "float16", 64), 650, 18),
    (Codebook(3, "bfloat16", 192), 1089, 35),
    (Codebook(4, "float32", 128), 2100, 9),
    (Uniform(2, 64, symmetric=True), 1089, 16),
    (Uniform(3, "tensor", scale_dtype="float32"), 650, 33),
    (BitPlane(2, 8), 1029, 66),
    (BitPlane(4, None, "float32"), 7, 130),
    (BitPlane(1, 24, "bfloat16"), 2100, 64),
    (BitPlane(3, 64, "bfloat16"), 1089, 35),
    (BitPlane(4, 128), 1300, 9),
]
REPRESENTATIVE = [Codebook(3), Uniform(4, 64), BitPlane(3, 32)]
#: One token, few and many: each kernel has a way of its own for them.
TOKENS = (1, 3, 15, 25)


@pytest.fixture(autouse=True)
def _best_set_again():
    yield
    native.configure()


@pytest.mark.parametrize(("format", "width", "out"), CASES, ids=str)
def test_every_format_on_every_instruction_set(format, width, out):
    array = random_array(format, width, out)
    prepared = jaxq.prepare(array)
    assert isinstance(prepared, PreparedArray) and prepared.shape == array.shape
    assert prepared.dtype == array.dtype and prepared.matrix_shape == (width, out)
    xs, ids = [normal(tokens, width, seed=tokens) for tokens in TOKENS], jnp.array([out - 1, 0, -1, out // 2])

    @jax.jit
    def run(q, array, xs):
        return [x @ q for x in xs], jaxq.restore(q), q.take_out(ids), array.take_out(ids)

    # One output of few inputs may nearly cancel; what it is measured against is then what was added up.
    mass = [np.abs(x) @ np.abs(np.asarray(array.matrix(jnp.float32), np.float64)) + 1e-9 for x in xs]
    for name in SETS:
        native.configure(instruction_set=name)
        ys, back, rows, expected = run(prepared, array, xs)
        for x, y, size in zip(xs, ys, mass, strict=True):
            assert np.max(np.abs(np.asarray(y, np.float64) - exact(x, array)) / size) < 2e-6, (name, len(x))
    assert jax.tree.structure(back) == jax.tree.structure(array)
    jax.tree.map(np.testing.assert_array_equal, back, array)
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("format", [Uniform(3, None), BitPlane(3, 64)], ids=str)
def test_rounded_activations(format):
    array = random_array(format, 700, 70)
    xs = [normal(tokens, 700, seed=tokens) for tokens in (1, 7)]
    kinds = {"float32": 1e-6, "int16": 1e-4, "int8": 2e-2}
    prepared = {kind: jaxq.prepare(array, activations=kind) for kind in kinds}
    run = jax.jit(lambda qs, xs: {kind: [x @ q for x in xs] for kind, q in qs.items()})
    for name in SETS:
        native.configure(instruction_set=name)
        ys = run(prepared, xs)
        for kind, bound in kinds.items():
            for x, y in zip(xs, ys[kind], strict=True):
                assert error(y, exact(x, array)) < bound
        assert error(ys["int8"][0], exact(xs[0], array)) > 1e-4


def in_bfloat16(x) -> np.ndarray:
    """`x` rounded to bfloat16, ties to even."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def multiplied(array) -> np.ndarray:
    """The matrix that activations in bfloat16 are multiplied by where the processor does that."""
    exact_one = np.asarray(array.matrix(jnp.float32), np.float64)
    rows = isinstance(array.format, BitPlane) and jaxq.prepare(array, activations="bfloat16").parts[0].ndim == 2
    tables = isinstance(array.format, Codebook) or rows
    return in_bfloat16(exact_one) if tables and array.format.bits > 1 else exact_one


@pytest.mark.parametrize(("format", "width", "out"), [*CASES, (Uniform(4, 64), 4224, 35)], ids=str)
def test_activations_in_bfloat16(format, width, out):
    array = random_array(format, width, out)
    prepared = jaxq.prepare(array, activations="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, jaxq.restore(prepared), array)
    xs = [normal(tokens, width, seed=tokens) for tokens in (1, 3, 8, 15, 25)]
    run = jax.jit(lambda q, xs: [x @ q for x in xs])
    weight, floats = multiplied(array), np.asarray(array.matrix(jnp.float32), np.float64)
    for name in SETS:
        native.configure(instruction_set=name)
        for x, y in zip(xs, run(prepared, xs), strict=True):
            mass = np.abs(x) @ np.abs(floats) + 1e-9
            oracle = in_bfloat16(x) @ (weight if name == "avx512bf16" else floats)
            assert y.dtype == jnp.float32
            assert np.max(np.abs(np.asarray(y, np.float64) - oracle) / mass) < 2e-6, (name, len(x))
            # Two numbers of 8 bits, each rounded by 2^-8 of it at most.
            assert np.max(np.abs(np.asarray(y, np.float64) - x @ floats) / mass) < 2**-7
            if width > 100:  # So many errors make their mean.
                assert 3e-4 < error(y, x @ floats) < 3.5e-3


def test_batches_and_gradients_in_bfloat16():
    array, x = random_array(Uniform(4, 64), 3, 320, 20), normal(3, 2, 320)
    prepared = jaxq.prepare(array, activations="bfloat16")
    mapped = jax.jit(jax.vmap(lambda q, x: x @ q))(prepared, x)
    ones = [jax.tree.map(lambda z, at=at: z[at], array) for at in range(3)]
    for y, some, one in zip(mapped, x, ones, strict=True):
        assert error(y, in_bfloat16(some) @ multiplied(one)) < 1e-6
    one = ones[0]
    many = jax.jit(jax.vmap(lambda x: x @ jaxq.prepare(one, activations="bfloat16")))(x)
    assert error(many, in_bfloat16(x) @ multiplied(one)) < 1e-6
    half = jnp.asarray(x[0], jnp.bfloat16)
    assert (half @ jaxq.prepare(one, activations="bfloat16")).dtype == jnp.bfloat16
    # Rounding counts as the identity.
    gradient = jax.grad(lambda x: jnp.sum(x @ jaxq.prepare(one, activations="bfloat16")))(jnp.asarray(x[0]))
    np.testing.assert_allclose(gradient, jnp.broadcast_to(one.matrix().sum(1), (2, 320)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format", REPRESENTATIVE[1:], ids=str)
def test_batch_axes(format):
    array = random_array(format, 2, 300, 70)
    prepared = jaxq.prepare(array)
    assert prepared.batch_shape == (2,) and prepared.shape == array.shape
    x = normal(2, 3, 300)
    # Not mapped by jax.vmap, a stack multiplies as a dense one does.
    back, dense, y = jax.jit(lambda q, x: (jaxq.restore(q), q.matrix(), q.matmul(x)))(prepared, x)
    jax.tree.map(np.testing.assert_array_equal, back, array)
    np.testing.assert_array_equal(dense, array.matrix())
    np.testing.assert_allclose(y, x @ np.asarray(dense), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format", REPRESENTATIVE[:1], ids=str)
def test_dtypes_and_leading_axes(format):
    array = random_array(format, 200, 30)
    prepared, x = jaxq.prepare(array), normal(2, 3, 200)
    half = jnp.asarray(x, jnp.bfloat16)
    whole, vector, y = jax.jit(lambda q, x, half: (x @ q, x[0, 0] @ q, half @ q))(prepared, x, half)
    assert error(whole, exact(x, array)) < 1e-6 and vector.shape == (30,)
    assert y.dtype == jnp.bfloat16 and error(y, exact(half.astype(jnp.float32), array)) < 4e-3


def test_activations_choose_the_layout_of_planes():
    # Sums of rounded activations want the bits of one plane together, floats those of one weight where a vector
    # holds its values.
    by_rows = native_rows.BITS.get(native.instruction_set(), 0) >= 2
    array, x = random_array(BitPlane(2, 64), 256, 70), normal(3, 256)
    exact_one, rounded = jaxq.prepare(array), jaxq.prepare(array, activations="int8")
    assert (exact_one.parts[0].ndim, rounded.parts[0].ndim) == (2 if by_rows else 4, 4)
    again = jaxq.prepare(rounded)
    assert jax.tree.structure(again) == jax.tree.structure(exact_one)
    jax.tree.map(np.testing.assert_array_equal, again, exact_one)
    assert error(exact_one.matmul(x), exact(x, array)) < 1e-6 < error(rounded.matmul(x), exact(x, array)) < 2e-2
    # Groups that begin inside a run have the planes' own layout.
    assert jaxq.prepare(random_array(BitPlane(2, 8), 256, 70)).parts[0].ndim == 4


def test_many_products_from_many_threads():
    # Threads that wait for the next product take it from any caller.
    array, x = random_array(Uniform(4, 64), 256, 640), normal(2, 256)
    prepared, run = jaxq.prepare(array), jax.jit(lambda q, x: x @ q)
    expected = run(prepared, x)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for y in pool.map(lambda _: run(prepared, x), range(400)):
            np.testing.assert_array_equal(y, expected)


def test_one_program_for_all_platforms():
    prepared, x = jaxq.prepare(random_array(Uniform(4, 64), 200, 30)), normal(2, 200)
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


def test_integer_execution_of_prepared_leaves():
    weight, reasons = random_array(Uniform(4, None), 64, 8), []
    params = {"w": rounded_input(weight, DynamicQuantizer(8, True), Dynamic(8))}

    def fn(params, x):
        return x @ params["w"]

    run = jax.jit(jaxq.quantized(fn, lambda *why: reasons.append(why), integer=True))
    x = normal(3, 64)
    np.testing.assert_array_equal(run(jaxq.prepare(params), x), run(params, x))
    assert not reasons


def test_shard_map():
    array, x = random_array(Codebook(3), 128, 64), normal(2, 128)
    devices = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    prepared = jaxq.prepare(array)
    specs = prepared.partition_specs(P(None, "model"))
    placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(devices, spec)), prepared, specs)
    product = partial(jax.shard_map, mesh=devices, in_specs=(specs, P()), out_specs=P(None, "model"))
    y = jax.jit(product(lambda q, x: q.matmul(x)))(placed, x)
    assert error(y, exact(x, array)) < 1e-6
    with pytest.raises(JaxqError, match="whole tiles of its outputs only"):
        prepared.partition_specs(P("model"))


@pytest.mark.parametrize("format", REPRESENTATIVE, ids=str)
def test_unusual_activations_and_threads(format):
    array = random_array(format, 200, 150)
    prepared, run = jaxq.prepare(array), jax.jit(lambda q, xs: [x @ q for x in xs])
    xs = [normal(1, 200), normal(12, 200)]
    results = []
    for threads in (1, 2, 0):
        native.configure(threads=threads)
        results.append(run(prepared, xs))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)
    for y in run(prepared, [0 * x for x in xs]):
        np.testing.assert_array_equal(y, 0)
    # Too small for the unit of integers: they may round to zero, to nothing large.
    for y in run(prepared, [np.float32(1e-35) * x for x in xs]):
        assert np.abs(np.asarray(y)).max() < 1e-32
    for bad in (np.nan, np.inf):
        for x in xs:
            x[0, 150] = bad
        for y in map(np.asarray, run(prepared, xs)):
            assert not np.isfinite(y[0]).any() and np.isfinite(y[1:]).all()


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


def test_what_the_command_line_chooses(capsys):
    params = {
        "w": random_array(Uniform(4, 64), 64, 4),
        "odd": random_array(Uniform(4, 20), 40, 4),
        "b": jnp.ones(3),
    }
    for use in (False, True):
        got, said = products.prepared(params, use)
        heard = capsys.readouterr().err
        if not use:
            assert got is params and said["products"] == "xla"
            continue
        assert isinstance(got["w"], PreparedArray) and got["odd"] is params["odd"]
        assert said == {"products": f"native {native.instruction_set()}", "in_xla": {"odd": said["in_xla"]["odd"]}}
        assert "1 of 2 quantized weights" in heard and "in XLA: odd: groups are not" in heard
    assert products.prepared({"b": jnp.ones(3)}, True)[1] == {"products": "xla"}


def test_files_hold_canonical_arrays(tmp_path):
    params = {"w": random_array(Codebook(4), 64, 32)}
    save(tmp_path / "model", Result(jaxq.prepare(params), None))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model").params, params)


def test_overlay_on_a_prepared_base():
    base, values = random_array(Codebook(3), 128, 40), normal(128, 40)
    format = DenseSparse(base.format, 0.01)
    mask = np.abs(values) >= np.sort(np.abs(values), axis=None)[-format.entries(128, 40)]
    overlay = compress(jnp.asarray(values), jnp.asarray(mask), format)
    array = DenseSparseArray(base, *overlay, format, Layout(), "float32")
    prepared = jaxq.prepare(array)
    assert isinstance(prepared.base, PreparedArray)
    x = normal(1, 128)
    y, dense, back = jax.jit(lambda p, q, x: (x @ p, q.matrix(), jaxq.restore(p)))(prepared, array, x)
    assert error(y, x.astype(np.float64) @ np.asarray(dense, np.float64)) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, back, array)


def test_bad_settings_are_named():
    array = random_array(Codebook(4), 32, 4)
    for call, words in [
        (lambda: jaxq.prepare(array, "abacus"), "no kernels for 'abacus'"),
        (lambda: jaxq.prepare(array, activations="int4"), "activations for cpu cannot be 'int4'"),
        (lambda: native.configure(instruction_set="sse9"), "cannot run native products"),
        (lambda: native.configure(threads=-1), "cannot run native products"),
    ]:
        with pytest.raises(JaxqError, match=words):
            call()


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("JAXQ_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "_loaded", library._loaded.__wrapped__)
    library._warn.cache_clear()
    q, told = random_array(Uniform(4, 64), 64, 4), []
    with pytest.warns(UserWarning, match="no-such-compiler' that CXX names") as seen:
        same = jaxq.prepare({"w": q}, on_fallback=lambda *why: told.append(why))["w"], jaxq.prepare(q)
    assert len(seen) == 1 and all(z is q for z in same) and not list(tmp_path.iterdir())
    assert told[0][0] == "w" and "no native CPU kernel" in told[0][1]
    monkeypatch.setenv("JAXQ_NATIVE", "0")
    assert "JAXQ_NATIVE=0" in native.reason()


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """A compiler that compiles nothing: returns the folder of libraries, and how many it has linked."""
    log = tmp_path / "log"
    script = tmp_path / "cc"
    script.write_text(
        f"#!{sys.executable}\n"
        "import sys, os, time\n"
        "arguments = sys.argv[1:]\n"
        f"open({str(log)!r}, 'a').write(' '.join(arguments) + chr(10))\n"
        "if '-mavx512f' in arguments: sys.exit('unrecognized option')\n"
        "if '-o' in arguments: open(arguments[arguments.index('-o') + 1], 'w').write('library')\n"
        "else: print('fake 1.0')\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("JAXQ_CACHE", str(tmp_path / "cache"))

    def links() -> int:
        return log.read_text().count("-shared")

    return tmp_path / "cache" / "native", links


def test_a_damaged_library_is_built_again(fake_compiler):
    folder, links = fake_compiler
    path = build.library()
    assert path.parent == folder and links() == 1
    assert build.library() == path and links() == 1
    path.write_text("libr")
    assert build.library() == path and path.read_text() == "library" and links() == 2
    assert list(folder.iterdir()) == [path]


def test_builds_at_the_same_time(fake_compiler):
    folder, _ = fake_compiler
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.library(), range(4)))
    assert paths == set(folder.iterdir()) and len(paths) == 1


def test_a_cache_that_cannot_be_used_is_named(fake_compiler, monkeypatch, tmp_path):
    folder, links = fake_compiler
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(build.BuildError, match="others may write"):
        build.library()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="JAXQ_CACHE may name another"):
        build.library()


def test_a_compiler_without_an_instruction_set_builds_the_others(fake_compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "family", lambda: "x86_64")
    build.library()
    log = (tmp_path / "log").read_text()
    assert "-DJAXQ_HAS_AVX2" in log and "-DJAXQ_HAS_AVX512" not in log
