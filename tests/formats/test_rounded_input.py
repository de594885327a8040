"""A weight that rounds its input: everywhere as if the function rounded it there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq.checkpoint import load, save
from jaxq.errors import JaxqError
from jaxq.formats import (
    Affine,
    Codebook,
    Dynamic,
    Layout,
    Log,
    RoundedInput,
    ShiftLog,
    Uniform,
    from_dict,
    rounded_input,
)
from jaxq.formats.grids import grid_from_dict
from jaxq.quantize import Result
from jaxq.solvers.ranges import minmax
from jaxq.solvers.rtn import rtn

WIDTH, OUT = 24, 8
GRIDS = [Affine(3), Affine(4, "channel"), Dynamic(4), Log(4, 2), ShiftLog(3)]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def quantizer(grid, batch=()):
    """One of the grid with numbers in it, different for each of a stack."""
    index = np.arange(np.prod(batch, dtype=int)).reshape(batch)

    def fill(path, leaf):
        name = path[-1].name
        number = {"scale": 0.3, "zero": 2.0, "eta": 2.0**-6, "low": -6.0, "high": 0.4}[name]
        grow = 1.0 + 0.1 * index.reshape(batch + (1,) * (len(leaf.shape) - len(batch)))
        return jnp.broadcast_to(jnp.asarray(number * (grow if name == "scale" else 1.0), leaf.dtype), leaf.shape)

    return jax.tree_util.tree_map_with_path(fill, grid.abstract((WIDTH,), batch))


def positive(grid, x):
    return jnp.abs(x) if isinstance(grid, (Log, ShiftLog)) else x


@pytest.mark.parametrize("base", [None, Uniform(4, 8), Codebook(2)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_products_are_those_of_the_rounded_input(base, grid):
    w = normal(WIDTH, OUT)
    weight = w if base is None else (jaxq.kmeans if isinstance(base, Codebook) else rtn)(w, format=base)
    q, x = rounded_input(weight, quantizer(grid), grid), positive(grid, normal(2, 3, WIDTH, seed=1))
    dense = w if base is None else weight.dequantize()
    want = q.quantizer(x) @ dense
    assert q.shape == (WIDTH, OUT) and q.format == RoundedInput(base, grid)
    np.testing.assert_array_equal(q.dequantize(), dense)
    for product in (x @ q, q.matmul(x), jax.jit(lambda q, x: x @ q)(q, x)):
        np.testing.assert_allclose(product, want, rtol=1e-4, atol=1e-5)
    assert np.abs(want - x @ dense).max() > 1e-2


def test_logical_shapes_and_look_ups():
    leaf = normal(OUT, 4, 6)
    q = rounded_input(leaf, quantizer(Affine(3)), Affine(3), Layout.of(leaf.shape, (1, 2), (0,)))
    assert q.shape == leaf.shape and q.matrix_shape == (WIDTH, OUT)
    np.testing.assert_array_equal(q.dequantize(), leaf)
    table = rounded_input(normal(OUT, WIDTH), quantizer(Affine(3)), Affine(3), Layout.of((OUT, WIDTH), (1,), (0,)))
    np.testing.assert_array_equal(table[jnp.array([3, 0])], table.dequantize()[jnp.array([3, 0])])


@pytest.mark.parametrize("grid", [Affine(3), Affine(4, "channel"), Dynamic(4)], ids=str)
def test_stacked_layers_run_in_a_scan_and_as_stages(grid):
    w, x = normal(3, WIDTH, WIDTH) / 5, normal(4, WIDTH, seed=1)
    weight = rtn(w, Uniform(4, None), layout=Layout())
    params = {"w": rounded_input(weight, quantizer(grid, (3,)), grid)}

    def model(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    want = x
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], params["w"].quantizer)
        want = jnp.tanh(one(want) @ weight.dequantize()[i])
    got = jax.jit(jaxq.quantized(model))(params, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    pieces = jaxq.stages(model, params, x)
    carry = (x,)
    for piece in pieces:
        carry = piece.fn(piece.take(params), carry)
    assert len(pieces) >= 3
    np.testing.assert_allclose(carry, want, rtol=1e-4, atol=1e-4)


def test_derivatives_pass_the_rounding():
    grid, w, x = Affine(3), normal(WIDTH, OUT), normal(5, WIDTH, seed=1)
    q = rounded_input(w, minmax(x, 3), grid)

    def loss(q, x):
        return jnp.sum(jnp.square(jaxq.quantized(lambda p, x: x @ p["w"])({"w": q}, x)))

    of_q, of_x = jax.grad(loss, (0, 1))(q, x)
    y = 2 * (q.quantizer(x) @ w)
    np.testing.assert_allclose(of_q.weight, q.quantizer(x).T @ y, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(of_x, y @ w.T, rtol=1e-4, atol=1e-3)
    want = jax.grad(lambda quantizer: jnp.sum(jnp.square(quantizer(x) @ w)))(q.quantizer)
    np.testing.assert_allclose(of_q.quantizer.scale, want.scale, rtol=1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_saved_and_exported(grid, tmp_path):
    q = rounded_input(rtn(normal(WIDTH, OUT), Uniform(3, 8)), quantizer(grid), grid)
    x = positive(grid, normal(3, WIDTH, seed=1))
    save(tmp_path / "out", Result({"w": q}, jaxq.Report()))
    again = load(tmp_path / "out").params["w"]
    assert again.format == q.format and from_dict(q.format.to_dict()) == q.format
    jax.tree.map(np.testing.assert_array_equal, again, q)
    run = jax.jit(lambda params, x: x @ params["w"])
    exported = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])({"w": q}, x).serialize()
    np.testing.assert_array_equal(jax.export.deserialize(exported).call({"w": q}, x), run({"w": q}, x))


@pytest.mark.parametrize("base", [None, Uniform(8, 6, symmetric=True)], ids=str)
@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)], ids=str)
def test_sharded(base, spec):
    grid, w, x = Affine(4, "channel"), normal(WIDTH, OUT), normal(4, WIDTH, seed=1)
    q = rounded_input(w if base is None else rtn(w, base), quantizer(grid), grid)
    devices = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    specs = q.partition_specs(spec, devices)
    placed = jax.tree.map(lambda leaf, s: jax.device_put(leaf, NamedSharding(devices, s)), q, specs)
    np.testing.assert_allclose(jax.jit(lambda q, x: x @ q)(placed, x), x @ q, rtol=1e-5, atol=1e-5)


def test_what_cannot_round_its_input_is_refused():
    kernel = normal(3, 3, 4, OUT)
    layout = Layout.of(kernel.shape, (0, 1, 2), (3,))
    q = rounded_input(kernel, quantizer(Affine(3)), Affine(3), layout)

    def conv(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    with pytest.raises(JaxqError, match="w: the input of this conv cannot be rounded"):
        jaxq.quantized(conv)({"w": q}, normal(1, 5, 5, 4))
    q = rounded_input(normal(WIDTH, OUT), quantizer(Affine(3)), Affine(3))
    with pytest.raises(JaxqError, match="the input of this matmul cannot be rounded"):
        jaxq.quantized(lambda p, x: x @ p["w"].T)({"w": q}, normal(2, OUT))
    with pytest.raises(JaxqError, match="already rounds"):
        rounded_input(q, q.quantizer, Affine(3))


def test_bad_descriptions():
    for grid in (*GRIDS, Affine(4, "head")):
        assert grid_from_dict(grid.to_dict()) == grid
    for bad, words in [
        ({"name": "cubic", "bits": 3}, "unknown grid 'cubic'"),
        ({"name": "affine"}, "needs bits"),
        ({"name": "affine", "bits": 3, "root": 2}, "no setting 'root'"),
        (None, "unknown grid None"),
    ]:
        with pytest.raises(JaxqError, match=words):
            grid_from_dict(bad)
    with pytest.raises(JaxqError, match="bits"):
        Affine(0)
    with pytest.raises(JaxqError, match="shared by"):
        Affine(4, "token")
    with pytest.raises(JaxqError, match="no heads"):
        RoundedInput(None, Affine(4, "head"))
    with pytest.raises(JaxqError, match="needs a base"):
        from_dict({"name": "rounded_input", "base": None})
