"""GPU products: their logic interpreted on any machine, and on a GPU if there is one (marked `gpu`)."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import error, exact, normal, random_array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import bench_gpu
from jaxq.errors import JaxqError
from jaxq.formats import BitPlane, Codebook, DenseSparse, PreparedArray, Uniform
from jaxq.formats.dense_sparse import DenseSparseArray, compress
from jaxq.kernels import dispatch, gpu, tuning
from jaxq.kernels.gpu import lanes, parts, plans, run, warpgroups, words
from jaxq.kernels.gpu.weights import Settings, Weight

#: Every format and number of bits; inputs that end inside a block, a group, or what a program reads together.
CASES = [
    (Uniform(4, 64), 200),
    (Uniform(3, 128, scale_dtype="bfloat16"), 384),
    (Uniform(2, None, symmetric=True), 520),
    (Codebook(4), 520),
    (Codebook(3), 1000),
    (Codebook(2), 512),
    (Codebook(4, group_size=64), 200),
    (Codebook(3, group_size=128), 320),
    (Codebook(2, group_size=64), 384),
    (BitPlane(4, 64), 192),
    (BitPlane(3, 64), 320),
    (BitPlane(2, 128, "float32"), 384),
]
ROWS, TILES = Settings(rows=2, words=32, warps=1, stages=2), Settings(rows=4, words=32, warps=4, split=2)
WARPGROUPS = [
    warpgroups.Settings(64, 64, 4, 1, 1, 2),
    warpgroups.Settings(64, 256, 2, 2, 2, 2),
    warpgroups.Settings(128, 256, 1, 3, 2, 3),
    warpgroups.Settings(128, 128, 1, 1, 4, 1),
    warpgroups.Settings(64, 64, 1, 1, 1, 8),
    warpgroups.Settings(64, 128, 2, 4, 1, 3),
]
REPRESENTATIVE = [Uniform(4, 64), Codebook(3), Codebook(4, group_size=64), BitPlane(2, 64)]
OUT = 5


def interpreted(x, prepared, settings, **options):
    run = jax.jit(lambda x, q: q.kernel.product(x, q, settings=settings, interpret=True, **options))
    return run(x, prepared)


@pytest.fixture
def in_kernel(monkeypatch):
    """Products on this machine take the kernels of GPUs, interpreted."""

    def on(platform, implementation, reference, x, array):
        assert platform == "cuda"
        return dispatch.product(implementation.__wrapped__, reference, x, array)

    from jaxq.kernels.gpu import run

    own = run.product_of
    for module in (jaxq.formats.prepared, jaxq.formats.dense_sparse):
        monkeypatch.setattr(module.dispatch, "on", on)
    for kernel in jaxq.formats.prepared.KERNELS["gpu"].values():
        monkeypatch.setattr(kernel, "product_of", lambda *a, **k: own(*a, **k, interpret=True))
    monkeypatch.setattr(run, "ROWS", ROWS)


@pytest.mark.parametrize(("format", "width"), CASES, ids=str)
def test_layout_comes_back(format, width):
    # Batched ones of a few, since each compiles.
    shapes = ((width, OUT), (2, width, OUT)) if format.bits == 3 else ((width, OUT),)
    for shape in shapes:
        array = random_array(format, *shape)
        told = []
        prepared = jaxq.prepare({"w": array}, "gpu", on_fallback=lambda *why, told=told: told.append(why))["w"]
        assert isinstance(prepared, PreparedArray) and not told
        assert prepared.target == "gpu" and prepared.exact
        assert prepared.shape == array.shape and prepared.batch_shape == array.batch_shape
        ids = jnp.array([OUT - 1, 0, -1])
        back, dense = jax.jit(lambda q: (jaxq.restore(q), q.matrix()))(prepared)
        assert jax.tree.structure(back) == jax.tree.structure(array)
        jax.tree.map(np.testing.assert_array_equal, back, array)
        np.testing.assert_array_equal(dense, array.matrix())
        if len(shape) == 2:
            np.testing.assert_array_equal(prepared.take_out(ids), array.take_out(ids))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("spread", [True, False])
def test_words_are_full(bits, spread):
    order = words.order_for(bits, 64, spread)
    low, top = order.places()
    used = [(member, place + bit) for (member, *_), place in np.ndenumerate(low) for bit in range(order.low_bits)]
    used += [(2, place) for place in top.flat] if bits == 3 else []
    assert sorted(used) == [(plane, bit) for plane in range(order.planes) for bit in range(32)]


@pytest.mark.parametrize(("format", "width"), CASES, ids=str)
def test_rows(format, width):
    array = random_array(format, width, OUT)
    prepared = jaxq.prepare(array, "gpu")
    x = normal(2, width)
    assert error(interpreted(x, prepared, ROWS, exact=True), exact(x, array)) < 1e-6
    half = jnp.asarray(x[:1], jnp.float16)
    y = interpreted(half, prepared, ROWS, exact=False)
    assert y.dtype == jnp.float32 and error(y, exact(half, array)) < 1e-3
    # Tables of 16 entries are looked up as float32, so that their sums are exact all the same.
    assert (error(y, exact(half, array)) < 1e-6) == (format == Codebook(4))


@pytest.mark.parametrize("format", REPRESENTATIVE, ids=str)
def test_tiles(format):
    array = random_array(format, 384, 9)
    x = jnp.asarray(normal(3, 384), jnp.float16)
    y = interpreted(x, jaxq.prepare(array, "gpu"), TILES, exact=False)
    assert error(y, exact(x, array)) < 1e-3


def test_settings_change_no_value():
    array = random_array(Codebook(4), 780, OUT)
    several = (
        Settings(1, 64, 1, 2),
        Settings(4, 512, 1),
        Settings(2, 32, 1, 4),
        Settings(2, 32, 1, stages=2),
        Settings(2, 32, 1, 2, stages=2),
        Settings(2, 32, 1, cache="both"),
        Settings(2, 32, 1, cache="any"),
    )
    prepared, x = jaxq.prepare(array, "gpu"), jnp.asarray(normal(1, 780), jnp.float16)
    for settings in several:
        assert error(interpreted(x, prepared, settings, exact=True), exact(x, array)) < 1e-6
    assert error(interpreted(x, prepared, several[0], exact=False), exact(x, array)) < 1e-3


def test_large_and_small_activations():
    """Sums of codes would overflow float16 where activations are a thousand."""
    array = random_array(Uniform(4, 64), 128, OUT)
    for size in (3000.0, 0.01):
        x = jnp.asarray(size * normal(1, 128), jnp.float16)
        assert error(interpreted(x, jaxq.prepare(array, "gpu"), ROWS, exact=False), exact(x, array)) < 1e-3


def test_no_tokens():
    prepared = jaxq.prepare(random_array(Uniform(4, 64), 128, OUT), "gpu")
    assert (jnp.zeros((0, 128)) @ prepared).shape == (0, OUT)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_summed_in_float32(dtype):
    """Also tables of bfloat16, whose products have no other way."""
    array = random_array(Codebook(2, dtype), 512, OUT)
    x = jnp.asarray(normal(1, 512), dtype)
    y = interpreted(x, jaxq.prepare(array, "gpu"), ROWS, exact=dtype == "float16")
    assert error(y, exact(x, array)) < 1e-6
    # Tensor cores have float16.
    several = jnp.asarray(normal(20, 512), dtype)
    y = interpreted(several, jaxq.prepare(array, "gpu"), TILES, exact=False)
    assert error(y, exact(several, array)) < 1e-3


@pytest.mark.parametrize("summed", ["float32", "float16"])
def test_overlay_in_the_same_pass(summed, in_kernel):
    format = DenseSparse(Uniform(4, 64), 0.01)
    base = random_array(Uniform(4, 64), 256, 40)
    mask = np.zeros(256 * 40, bool)
    # Outputs with none, few and more entries than a program reads at a time.
    mask[np.random.default_rng(0).permutation(256)[:90] * 40 + 7] = True
    mask[[3, 80]] = True
    mask[np.flatnonzero(~mask)[: format.entries(256, 40) - mask.sum()]] = True
    overlay = compress(jnp.asarray(normal(256, 40)), jnp.asarray(mask.reshape(256, 40)), format)
    array = DenseSparseArray(base, *overlay, format, base.layout, "float32")
    prepared = jaxq.prepare(array, "gpu", activations=summed)
    jax.tree.map(np.testing.assert_array_equal, jaxq.restore(prepared), array)
    x = normal(1, 256)
    assert prepared.base.fuses(x, prepared.rows.size) and not prepared.base.fuses(x, 2 * prepared.rows.size)
    assert prepared.base.fuses(normal(2, 256), 1) == (summed == "float32")
    y = jax.jit(lambda q, x: x @ q)(prepared, x)
    assert error(y, exact(x, array)) < (1e-6 if summed == "float32" else 1e-3)


@pytest.mark.parametrize("format", REPRESENTATIVE[1:], ids=str)
def test_derivatives_vmap_and_scan(format, in_kernel):
    array = random_array(format, 2, 192, OUT)
    prepared, xs = jaxq.prepare(array, "gpu"), normal(2, 1, 192)

    def loss(some, q):
        mapped = jax.vmap(lambda x, w: x @ w)(some, q)
        _, scanned = jax.lax.scan(lambda carry, one: (carry, one[0] @ one[1]), 0.0, (some, q))
        return jnp.sum(mapped * 2 + jnp.sin(scanned)), (mapped, scanned)

    def dense(some):
        return loss(some, array.matrix(jnp.float32))

    (_, ys), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(xs, prepared)
    (_, expected), wanted = jax.jit(jax.value_and_grad(dense, has_aux=True))(xs)
    for y, reference in zip((*ys, found), (*expected, wanted), strict=True):
        np.testing.assert_allclose(y, reference, rtol=1e-4, atol=1e-4)


def test_what_has_no_kernel_stays_and_is_reported():
    told = {}
    params = {
        "bits": random_array(Uniform(5, 64), 128, 8),
        "group": random_array(BitPlane(2, 96), 192, 8),
        "table": random_array(Codebook(4, "float32"), 128, 8),
        "fine": random_array(Uniform(4, 64), 128, 8),
    }
    prepared = jaxq.prepare(params, "gpu", on_fallback=lambda path, why: told.setdefault(path, why))
    assert set(told) == {"bits", "group", "table"} and isinstance(prepared["fine"], PreparedArray)
    assert "2 to 4 bits" in told["bits"] and "power of two" in told["group"] and "16 bits" in told["table"]
    for name in told:
        assert prepared[name] is params[name]
    with pytest.raises(JaxqError, match="use float32, float16"):
        jaxq.prepare(params, "gpu", activations="int8")


def test_the_other_target_is_laid_out_again():
    array = random_array(Uniform(4, 64), 128, 8)
    there = jaxq.prepare(jaxq.prepare(array, "gpu"), "gpu", activations="float16")
    assert there.target == "gpu" and not there.exact
    jax.tree.map(np.testing.assert_array_equal, jaxq.restore(jaxq.prepare(there, "cpu")), array)


def test_elsewhere_products_are_the_reference():
    array = random_array(BitPlane(3, 64), 192, 8)
    x = normal(1, 192)
    y = jax.jit(lambda q, x: x @ q)(jaxq.prepare(array, "gpu"), x)
    np.testing.assert_allclose(y, x @ np.asarray(array.matrix()), rtol=1e-5, atol=1e-4)
    many = normal(70, 192)
    assert "pallas_call" in str(jax.make_jaxpr(lambda q, x: x @ q)(jaxq.prepare(array, "gpu"), x))
    assert "pallas_call" not in str(jax.make_jaxpr(lambda q, x: x @ q)(jaxq.prepare(array, "gpu"), many))


def test_lowers_for_nvidia_without_one():
    prepared, x = jaxq.prepare(random_array(BitPlane(2, 64), 512, 32), "gpu"), normal(1, 512)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(
            jax.jit(lambda q, x: x @ q), platforms=["cuda"], disabled_checks=gpu.EXPORT_CHECKS
        )(prepared, x)
    assert "xla.gpu.triton" in exported.mlir_module() and "jaxq_matvec" in exported.mlir_module()


def lowered_for_hopper(x, prepared, **options):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    run = jax.jit(lambda x, q: q.kernel.product(x, q, exact=False, **options))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return run.trace(x, prepared).lower(lowering_platforms=("cuda",)).as_text()


mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU of this jax lacks what kernels need"
)


@mosaic
@pytest.mark.parametrize("format", REPRESENTATIVE, ids=str)
def test_several_tokens_lower_for_hopper_without_one(format, monkeypatch):
    """What runs on a Hopper GPU is at least a valid program wherever this runs."""
    monkeypatch.setattr(warpgroups, "available", lambda: True)
    prepared = jaxq.prepare(random_array(format, 4096, 64), "gpu", activations="float16")
    for tokens in (3, 300):
        x = jnp.asarray(normal(tokens, 4096), jnp.bfloat16)
        assert "mosaic_gpu" in lowered_for_hopper(x, prepared)


@mosaic
@pytest.mark.parametrize("settings", WARPGROUPS, ids=str)
def test_settings_lower_for_hopper_without_one(settings, monkeypatch):
    """A newer jax may refuse what an older one took, in one way of cutting a product up and not in another."""
    monkeypatch.setattr(warpgroups, "available", lambda: True)
    prepared = jaxq.prepare(random_array(Codebook(4), 5000, 200), "gpu", activations="float16")
    for tokens in (3, 40):
        x = jnp.asarray(normal(tokens, 5000), jnp.float16)
        assert "mosaic_gpu" in lowered_for_hopper(x, prepared, settings=settings)


def test_which_kernel_takes_a_product(monkeypatch):
    words = jax.ShapeDtypeStruct((64, 512), jnp.uint32)
    for hopper, several in ((False, run.tiles), (True, warpgroups)):
        monkeypatch.setattr(warpgroups, "available", lambda hopper=hopper: hopper)
        assert run.kernel_for(1, words, exact=False) is run.rows is run.kernel_for(8, words, exact=True)
        assert run.kernel_for(2, words, exact=False) is several
        assert run.takes(64, jnp.float32, words, exact=False)
        assert run.takes(65, jnp.float32, words, exact=False) == hopper
        # Sums in float32 of many tokens are those of the tensor cores where a dense weight would be as narrow.
        assert run.takes(9, jnp.bfloat16, words, exact=True) == hopper
        assert not run.takes(9, jnp.float32, words, exact=True)
    # What copies by tiles cannot read is for the other kernel.
    for shape in ((63, 512), (64, 500)):
        assert run.kernel_for(2, jax.ShapeDtypeStruct(shape, jnp.uint32), exact=False) is run.tiles


def test_default_settings_fit_into_shared_memory():
    formats = (Codebook(4), Codebook(3), Codebook(2), Codebook(4, group_size=64), Uniform(3, 128), BitPlane(2, 64))
    for format in formats:
        prepared = jax.eval_shape(lambda a: jaxq.prepare(a, "gpu"), format.abstract((8192, 4096)))
        order = parts.order_of(format, prepared.kernel.groups(prepared.parts))
        weight = Weight(prepared.parts[0], types.SimpleNamespace(order=order), ())
        for tokens in (2, 16, 33, 64, 65, 200, 256, 257, 3000):
            for out_size in (256, 4096, 8192, 28672, 128256):
                settings = warpgroups.default(tokens, format.bits, 8192, out_size)
                plan = plans.plan_for(tokens, weight, settings, "float16")
                assert plan.width * -(-tokens // plan.width) >= tokens and plan.width <= 256
                # Threads that compute and those that copy share the registers of a processor.
                assert 128 * (plan.groups * plan.registers + plans.COPY_REGISTERS) <= 2**16


def test_outputs_on_several_devices():
    array, x = random_array(Uniform(4, 64), 256, 32), normal(1, 256)
    prepared = jaxq.prepare(array, "gpu")
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    specs = prepared.partition_specs(P(None, "d"), mesh)
    run = jax.shard_map(lambda x, q: x @ q, mesh=mesh, in_specs=(P(), specs), out_specs=P(None, "d"))
    assert error(jax.jit(run)(x, prepared), exact(x, array)) < 1e-6


@pytest.mark.parametrize("format", [Uniform(4, 64), Codebook(3), BitPlane(2, 128)], ids=str)
def test_inputs_on_several_devices(format):
    array, x = random_array(format, 4096, 16), normal(1, 4096)
    prepared = jaxq.prepare(array, "gpu")
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

    def part(x, q):
        assert q.matrix_shape == (2048, 16)
        return jax.lax.psum(x @ q, "d")

    specs = prepared.partition_specs(P("d"), mesh)
    run = jax.shard_map(part, mesh=mesh, in_specs=(P(None, "d"), specs), out_specs=P())
    assert error(jax.jit(run)(x, prepared), exact(x, array)) < 1e-6
    # One group a shard would be laid out in another way, and what fills up a row belongs to no shard.
    for size in (128, 1000):
        with pytest.raises(JaxqError, match="whole blocks and several groups"):
            jaxq.prepare(random_array(Uniform(4, 64), size, 16), "gpu").partition_specs(P("d"), mesh)


def test_instructions_are_those_of_the_processor():
    """Against the definitions in the manual of PTX, on values chosen one by one."""
    ops = lanes.Emulated()
    low, high = jnp.uint32([0x33221100]), jnp.uint32([0x77665544])
    assert hex(int(ops.permute(low, high, 0x0527)[0])) == "0x552277"
    one, two = (jnp.uint32([bits]) for bits in (0x3C004000, 0x42003800))
    # (2.0, 1.0) * (0.5, 3.0) + (2.0, 1.0), low halves first.
    assert hex(int(ops.multiply_add(one, two, one)[0])) == "0x44004200"
    assert hex(int(ops.multiply_add(one, two, None)[0])) == "0x42003c00"


def test_tuned_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXQ_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped.json")
    small, large = ({"rows": rows, "words": 256, "warps": 2, "unroll": 1, "split": 1} for rows in (1, 4))
    assert tuning.find("chip", "uniform", 4, 4096, 4096, 1, 64) is None
    tuning.save(tmp_path / "shipped.json", "chip", "uniform", 4, 4096, 4096, 1, 64, small)
    tuning.save(tmp_path / "shipped.json", "chip", "uniform", 4, 8192, 28672, 1, 64, large)
    # The nearest shape; nothing for another number of tokens, or on another chip.
    assert tuning.find("chip", "uniform", 4, 4096, 6000, 1, 64) == small
    assert tuning.find("chip", "uniform", 4, 8192, 16384, 1, 64) == large
    assert tuning.find("chip", "uniform", 4, 4096, 4096, 2, 64) is None
    assert tuning.find("other", "uniform", 4, 4096, 4096, 1, 64) is None
    tuning.save(tmp_path / "tuning.json", "chip", "uniform", 4, 4096, 4096, 1, 64, large)
    assert tuning.find("chip", "uniform", 4, 4096, 4096, 1, 64) == large
    (tmp_path / "tuning.json").write_text(json.dumps({"chip": {"uniform 4": [{"n": 1}]}}))
    tuning._read.cache_clear()
    with pytest.warns(UserWarning, match="names no shape"):
        assert tuning.find("chip", "uniform", 4, 4096, 4096, 1, 64) == small
    (tmp_path / "tuning.json").write_text(json.dumps({"chip": {"uniform 4": [{"n": 1, "cache": "word"}]}}))
    tuning._read.cache_clear()
    with pytest.warns(UserWarning, match="'cache': 'word'"):
        assert tuning.find("chip", "uniform", 4, 4096, 4096, 1, 64) == small


def test_block_sizes_are_searched_on_a_gpu_only(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXQ_CACHE", str(tmp_path))
    # Where a candidate runs at all is not tested here: one that does not compile must not end the search.
    trials = []
    array = random_array(Uniform(4, 64), 256, 8)
    if not tuning.device():
        assert bench_gpu.search(array, 1, False, [ROWS], trials.append) == []
        assert [trial.settings for trial in trials] == [ROWS] and "interpret mode" in trials[0].failed
        with pytest.raises(JaxqError, match="there is none"):
            bench_gpu.tune([(256, 8)], [1])
    with pytest.raises(JaxqError, match="no GPU kernel for"):
        bench_gpu.search(random_array(Uniform(5, 64), 256, 8), 1, False, [ROWS])
    bench_gpu.save(tmp_path / "tuning.json", Uniform(4, 64), (256, 8), 1, True, ROWS)
    kept = json.loads((tmp_path / "tuning.json").read_text())[tuning.device()]["uniform exact 4"]
    assert kept == [{"n": 8, "k": 256, "m": 1, "group": 64, **dataclasses.asdict(ROWS)}]


def test_shipped_settings_are_sound():
    table = json.loads(tuning.SHIPPED.read_text())
    for kinds in table.values():
        for op, entries in kinds.items():
            kind = warpgroups.Settings if "warpgroups" in op else Settings
            for entry in entries:
                assert set(entry) == {field.name for field in dataclasses.fields(kind)} | set(tuning.SHAPE)


@pytest.mark.gpu
@pytest.mark.parametrize(("format", "width"), CASES, ids=str)
def test_on_a_gpu(format, width):
    array = random_array(format, width, 33)
    prepared = jaxq.prepare(array, "gpu")
    many = (17, 70, 300) if warpgroups.available() else ()
    for summed, bound, counts in ((True, 1e-6, (1, 5)), (False, 1e-3, (1, 5, 64, *many))):
        for tokens in counts:
            x = jnp.asarray(normal(tokens, width, seed=tokens), jnp.float16)
            y = jax.jit(lambda x, q, summed=summed: q.kernel.product(x, q, exact=summed))(x, prepared)
            assert error(y, exact(x, array)) < bound, (summed, tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not warpgroups.available(), reason="not a Hopper GPU")
@pytest.mark.parametrize("settings", WARPGROUPS, ids=str)
def test_warpgroups_on_a_gpu(settings):
    """However a product is cut up: ragged outputs, tokens and inputs, several rounds of shared memory."""
    for format, width, out in (
        (Codebook(4), 5000, 200),
        (Uniform(4, 64), 4160, 136),
        (Codebook(3, group_size=128), 4000, 136),
        (BitPlane(2, 128), 2048, 104),
    ):
        array = random_array(format, width, out)
        prepared = jaxq.prepare(array, "gpu", activations="float16")
        for tokens in (3, 40, 333):
            x = jnp.asarray(normal(tokens, width, seed=tokens), jnp.float16)
            run = jax.jit(lambda x, q: q.kernel.product(x, q, exact=False, settings=settings))
            try:
                y = run(x, prepared)
            except ValueError as reason:
                assert "shared memory" in str(reason)
                continue
            assert error(y, exact(x, array)) < 1e-3, (format, tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not warpgroups.available(), reason="not a Hopper GPU")
@pytest.mark.parametrize(
    ("format", "tokens"), [(BitPlane(2, 128), 16), (Codebook(4), 16), (Codebook(4), 300)], ids=str
)
def test_every_run_gives_the_same_bits(format, tokens):
    """Sums have one order: a difference is a copy that overtook a read. So rare that a tolerance may hide it."""
    prepared = jaxq.prepare(random_array(format, 8192, 8192), "gpu", activations="float16")
    x = jnp.asarray(normal(tokens, 8192), jnp.float16)
    copies = [prepared, *(jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), prepared) for _ in range(5))]
    product = jax.jit(lambda x, q: x @ q)
    first = product(x, prepared)
    for turn in range(200):
        assert jnp.array_equal(product(x, copies[turn % len(copies)]), first)


@pytest.mark.gpu
@pytest.mark.skipif(not warpgroups.available(), reason="not a Hopper GPU")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_many_exact_tokens_on_a_gpu(dtype):
    """Inputs of 16 bits, of any size, are not rounded by products in float32 sums."""
    for table in ("float16", "bfloat16"):
        array = random_array(Codebook(4, table), 1000, 72)
        prepared = jaxq.prepare(array, "gpu")
        x = normal(40, 1000) * np.geomspace(1e-3, 3e3 if dtype == "float16" else 1e30, 40)[:, None]
        x = jnp.asarray(x, dtype)
        y = np.asarray(jax.jit(lambda x, q: q.kernel.product(x, q, exact=True))(x, prepared), np.float64)
        expected = exact(x, array)
        errors = np.linalg.norm(y - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert errors.max() < 3e-6


@pytest.mark.gpu
@pytest.mark.parametrize("format", REPRESENTATIVE, ids=str)
def test_programs_on_a_gpu(format):
    """As users call it: with an overlay, mapped, in a loop, differentiated, in the dtypes of models."""
    array = random_array(format, 2, 384, 33)
    prepared, dense = jaxq.prepare(array, "gpu"), array.matrix(jnp.float32)
    xs = jnp.asarray(normal(2, 1, 384), jnp.float32)

    def loss(xs, q):
        mapped = jax.vmap(lambda x, w: x @ w)(xs, q)
        _, scanned = jax.lax.scan(lambda carry, one: (carry, one[0] @ one[1]), 0.0, (xs, q))
        return jnp.sum(mapped * 2 + jnp.sin(scanned / 64)), (mapped, scanned)

    with jax.default_matmul_precision("highest"):
        (_, ys), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(xs, prepared)
        (_, expected), wanted = jax.jit(jax.value_and_grad(loss, has_aux=True))(xs, dense)
    for y, reference in zip((*ys, found), (*expected, wanted), strict=True):
        assert error(y, np.asarray(reference, np.float64)) < 1e-5
    several = jnp.asarray(normal(2, 24, 384), jnp.float16)
    mapped = jax.jit(jax.vmap(lambda x, q: x @ q))(several, jaxq.prepare(array, "gpu", activations="float16"))
    for y, x, one in zip(mapped, several, (array[0], array[1]), strict=True):
        assert error(y, exact(x, one)) < 1e-3
    half = xs.astype(jnp.bfloat16)
    assert error(jax.jit(lambda x, q: x @ q)(half[0], prepared[0]), exact(half[0], array[0])) < 5e-3
    sparse = DenseSparse(format, 0.01)
    mask = np.arange(384 * 33) % (384 * 33 // sparse.entries(384, 33)) == 0
    mask[np.flatnonzero(mask)[sparse.entries(384, 33) :]] = False
    overlay = compress(jnp.asarray(normal(384, 33)), jnp.asarray(mask.reshape(384, 33)), sparse)
    both = DenseSparseArray(array[0], *overlay, sparse, array.layout, "float32")
    for summed, bound in (("float32", 1e-6), ("float16", 1e-3)):
        y = jax.jit(lambda x, q: x @ q)(xs[0], jaxq.prepare(both, "gpu", activations=summed))
        assert error(y, exact(xs[0], both)) < bound
