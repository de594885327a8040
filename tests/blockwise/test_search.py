"""Grids from a sample: those of the step are those of the searches on what reaches each place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.blockwise import blocks, search
from jaxq.blockwise.work import leaves
from jaxq.solvers import output_ranges, ranges
from jaxq.steps import Calibrate


@pytest.fixture(scope="module")
def inputs(vit, images):
    """What reaches the first block's places, of all images."""
    whole = np.concatenate(images)
    kept = {f"blocks/0/{p}/kernel": search.whole(["x"])["x"] for p in ("attn/proj", "mlp/fc2")}
    kept |= {f"blocks/0/attn/{p}": search.whole(["x"])["x"] for p in ("query", "key", "probs", "value")}
    return jaxq.observe(vit.apply, vit.params, [whole], kept)


@pytest.fixture(scope="module")
def found(begun):
    job, work, _ = begun()
    return search.calibrate(job, work, Calibrate("output", images=32, batch=8))


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_linear_layers_by_output(vit, inputs, found):
    w = vit.params["blocks"]["0"]["mlp"]["fc2"]["kernel"]
    x = inputs["blocks/0/mlp/fc2/kernel"]
    on_x, on_w = output_ranges.linear_output_error(x, w, 3, 3)
    same(found.inputs["blocks/0/mlp/fc2/kernel"], on_x)
    grid = found.weights["blocks/0/mlp/fc2/kernel"]
    same((grid.scale, grid.zero), (on_w.scale.ravel(), on_w.zero.ravel()))

    def error(q):
        return float(jnp.linalg.norm(on_x(x) @ q(w) - x @ w))

    assert error(grid) <= error(ranges.mse_grid(w, 3, 0, floor=ranges.WEIGHT_FLOOR))


def test_products_by_output(inputs, found):
    names = [f"blocks/0/attn/{p}" for p in ("query", "key", "probs", "value")]
    q, k, p, v = (inputs[name] for name in names)
    scores = output_ranges.product_output_error(q, jnp.swapaxes(k, -1, -2), 3)
    assert found.named[names[0]].scale.shape == (2, 1, 1)

    def error(a, b):
        return float(jnp.linalg.norm(a(q) @ jnp.swapaxes(b(k), -1, -2) - q @ jnp.swapaxes(k, -1, -2)))

    # The product of the network has its operands in another order of axes: errors are those of equal grids.
    mine = error(found.named[names[0]], found.named[names[1]])
    theirs = float(
        jnp.linalg.norm(scores[0](q) @ scores[1](jnp.swapaxes(k, -1, -2)) - q @ jnp.swapaxes(k, -1, -2))
    )
    assert mine == pytest.approx(theirs, rel=0.02)
    alone = error(ranges.mse_grid(q, 3, (0, 2, 3)), ranges.mse_grid(k, 3, (0, 2, 3)))
    assert mine <= alone
    kept = jnp.linalg.norm(found.named[names[2]](p) @ found.named[names[3]](v) - p @ v)
    assert float(kept) < 0.5 * float(jnp.linalg.norm(p @ v))


def test_grids_of_weights_are_as_stored(begun):
    job, work, _ = begun("percentile", search="minmax")
    found = search.calibrate(job, work, Calibrate("minmax", activations=False, images=8, batch=8))
    assert not found.inputs and not found.named and set(found.weights) == set(job.targets)
    for path, grid in found.weights.items():
        assert grid.scale.shape == (job.targets[path].site.out_size,)
        assert float(jnp.min(grid.zero)) >= 0 and float(jnp.max(grid.zero)) <= 7
    w = work.params["head/kernel"]
    low, high = jnp.minimum(w.min(0), 0), jnp.maximum(w.max(0), 0)
    np.testing.assert_allclose(found.weights["head/kernel"].scale, (high - low) / 7, rtol=1e-5)


def test_the_quantized_stream_sees_the_layers_before(begun):
    job, work, _ = begun("percentile")
    steps = [Calibrate("minmax", stream=stream, images=8, batch=8) for stream in ("float", "quantized")]
    exact, rough = (search.calibrate(job, work, step) for step in steps)
    first, later = "blocks/0/attn/qkv/kernel", "blocks/1/mlp/fc2/kernel"
    pieces = blocks.cut(job.fn, work.params, job.examples, 8)
    carries = blocks.start(job.examples, 8, 8)
    after = blocks.advanced(pieces[0], carries, blocks.outputs(pieces[0], leaves(job, rough, pieces[0]), carries))
    own = leaves(job, rough, pieces[1], weights=False, activations=False)
    position = str(list(map(str, pieces[1].paths)).index(first))
    x = search.seen(pieces[1], own, after, (position,))[position]
    same(rough.inputs[first], dataclasses.replace(ranges.percentile(x, 3), bits=3))
    assert float(rough.inputs[later].scale) != float(exact.inputs[later].scale)
