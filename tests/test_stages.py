"""Stages, run one after the other, are the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxq
from jaxq import tracing
from jaxq.stages import run

from . import zoo


@pytest.mark.parametrize("name", ["dense", "scanned", "language", "bare", "experts", "indexed", "conv"])
@pytest.mark.parametrize("quantize", [False, True])
def test_stages_compose_to_the_function(name, quantize):
    case = zoo.CASES[name]()
    params = zoo.quantize(case) if quantize else case.params
    pieces = jaxq.stages(case.fn, case.params, *case.args)
    want = jax.jit(jaxq.quantized(case.fn))(params, *case.args)
    np.testing.assert_allclose(run(pieces, params, *case.args), want, 2e-5, 2e-5)


@pytest.mark.parametrize("name", ["scanned", "language"])
def test_equal_layers_share_one_program(name):
    case = zoo.CASES[name]()
    pieces = jaxq.stages(case.fn, case.params, *case.args)
    layers = [p for p in pieces if len(p.paths) > 8]
    assert len(layers) == 2
    assert len({id(p.program) for p in layers}) == 1
    slots = [slot for p in layers for slot in p.paths]
    assert len(set(slots)) == len(slots) == 2 * len(layers[0].paths)


def test_nothing_is_read_before_a_stage_needs_it():
    case = zoo.language()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.params)
    pieces = jaxq.stages(case.fn, shapes, jax.ShapeDtypeStruct((2, 7), jnp.int32))
    np.testing.assert_allclose(run(pieces, case.params, *case.args), case.fn(case.params, *case.args), 2e-5, 2e-5)


def test_a_cast_of_all_parameters_does_not_cross_the_cuts():
    case = zoo.language()

    def fn(params, tokens):
        return case.fn(jax.tree.map(lambda w: w.astype(jnp.float32), params), tokens)

    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), case.params)
    pieces = jaxq.stages(fn, params, *case.args)
    assert [len(p.reads) for p in pieces] == [1, 1, 1, 1]
    np.testing.assert_allclose(run(pieces, params, *case.args), fn(params, *case.args), 1e-4, 1e-4)


def test_masks_made_before_the_first_cut_are_carried():
    def fn(p, x):
        mask = jnp.cumsum(jnp.ones_like(x), 0)
        for w in p:
            x = checkpoint_name(x, "block")
            x = jnp.tanh(x @ w) * mask
        return {"out": x, "weight": p[0], "one": 1.0}

    params = [jax.random.normal(jax.random.key(i), (8, 8)) for i in range(3)]
    x = jnp.ones((4, 8))
    pieces = jaxq.stages(fn, params, x)
    assert len(pieces) == 4 and len({id(p.program) for p in pieces[1:3]}) == 1
    for ours, theirs in zip(jax.tree.leaves(run(pieces, params, x)), jax.tree.leaves(fn(params, x)), strict=True):
        np.testing.assert_allclose(ours, theirs, 1e-5)


def test_functions_without_cuts_are_one_stage():
    pieces = jaxq.stages(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    assert len(pieces) == 1 and pieces[0].paths == ("w",)


def test_scanned_data_and_outputs():
    """A scan that also takes data, in reverse, and stacks outputs."""

    def fn(p, x, flags):
        def layer(c, inputs):
            w, flag = inputs
            c = jnp.tanh(c @ w) * flag
            return c, c.sum()

        y, sums = jax.lax.scan(layer, x, (p["w"], flags), reverse=True)
        return y, sums + flags

    params = {"w": jax.random.normal(jax.random.key(0), (4, 8, 8)) / 3}
    args = jnp.ones((2, 8)), jnp.arange(1.0, 5.0)
    pieces = jaxq.stages(fn, params, *args)
    layers = [p for p in pieces if p.paths]
    assert [p.paths[0].index for p in layers] == [3, 2, 1, 0]
    assert len({id(p.program) for p in layers}) == 1
    for ours, theirs in zip(run(pieces, params, *args), fn(params, *args), strict=True):
        np.testing.assert_allclose(ours, theirs, 1e-5)


def test_a_missing_parameter_is_named():
    case = zoo.language()
    stage = jaxq.stages(case.fn, case.params, *case.args)[0]
    with pytest.raises(jaxq.JaxqError, match="params/embed/embedding"):
        stage.fn({}, case.args)


def test_take_finds_the_leaves_of_a_stage():
    case = zoo.scanned()
    stage = next(p for p in jaxq.stages(case.fn, case.params, *case.args) if p.paths)
    taken = stage.take(case.params)
    flat = tracing.flatten(case.params)
    for slot, leaf in taken.items():
        np.testing.assert_array_equal(leaf, flat[slot.path][slot.index])
