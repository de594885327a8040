"""Blocks and the gradients at their doors, against the function as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.blockwise import blocks, losses
from jaxq.errors import JaxqError
from jaxq.names import Activated
from jaxq.quantized import quantized
from jaxq.steps import Reconstruct

#: In the order of the network.
BLOCKS = ["blocks/block", "blocks/block#2", "block"]


class Shift:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x + self.by


jax.tree_util.register_pytree_node(Shift, lambda s: ((s.by,), None), lambda _, c: Shift(*c))


@pytest.fixture(scope="module")
def work(begun):
    return begun()


@pytest.fixture(scope="module")
def loss(work):
    job, start, _ = work
    teachers = blocks.cut(job.teacher, start.floats, job.examples, 8)
    return losses.Loss(job, start, Reconstruct(loss="aph"), teachers, blocks.start(job.examples, 8))


def test_importance_is_that_of_the_verb(vit, images, work, loss):
    job = work[0]
    found = jaxq.importance(vit.apply, vit.params, images, key=job.key)
    for mine, path in zip(loss.importance, BLOCKS, strict=True):
        np.testing.assert_allclose(mine, found[path], rtol=2e-3, atol=1e-6)


def test_gradients_of_the_quantized_block(vit, images, work, loss):
    # That of the whole network's divergence, with the error of a block put where its output is named.
    job, start, _ = work
    stage, carries = loss.teachers[1], blocks.start(job.examples, 8)
    carries = blocks.advanced(loss.teachers[0], carries, blocks.outputs(loss.teachers[0], loss.leaves[0], carries))
    wanted = blocks.outputs(stage, loss.leaves[1], carries)
    rough = jax.tree.map(lambda x: jnp.round(4 * x) / 4, loss.leaves[1])
    deviations, gradients = loss.deviations(1, blocks.outputs(stage, rough, carries), wanted)
    whole = jnp.concatenate([jnp.asarray(x) for x in images])
    exact = vit.apply(vit.params, whole)

    def divergence(by):
        z = quantized(vit.apply)(Activated(vit.params, {BLOCKS[1]: Shift(by)}), whole)
        return losses.divergence([z / 20], {"value": [exact / 20]}, None) * len(whole)

    np.testing.assert_allclose(gradients, jax.grad(divergence)(deviations), rtol=2e-3, atol=1e-7)
    assert float(jnp.abs(deviations).max()) > 0.05


def test_batches_of_arguments_are_joined_and_cut():
    given = [(np.full((2, 3), i), np.arange(2) + 2 * i) for i in range(3)]
    examples = blocks.together(given)
    assert examples[0].shape == (6, 3) and examples[1].tolist() == list(range(6))
    assert [len(c[0]) for c in blocks.start(examples, 2, 4)] == [2, 2]
    with pytest.raises(JaxqError, match="6 calibration examples do not give 6 in batches of 4"):
        blocks.start(examples, 4)


def test_a_function_that_is_no_chain_is_refused():
    def fn(params, x):
        y = jax.ad_checkpoint.checkpoint_name(x @ params["a"], "block")
        return jax.ad_checkpoint.checkpoint_name(y @ params["b"], "block") + x, y

    pieces = blocks.cut(fn, {k: jnp.ones((3, 3)) for k in "ab"}, (np.ones((4, 3), np.float32),), 2)
    with pytest.raises(JaxqError, match="needs a chain of blocks"):
        blocks.check_chain(pieces)


def test_the_last_stage_is_compared_by_its_probabilities(loss):
    assert [loss.error(n) is losses.divergence for n in range(4)] == [False, False, False, True]
    z = jnp.asarray([[1.0, 2.0, 0.0]])
    assert float(losses.divergence([z + 3], {"value": [z]}, None)) == pytest.approx(0, abs=1e-6)
    by_hand = jnp.sum(jax.nn.softmax(z) * (jnp.log(jax.nn.softmax(z)) - jnp.log(1 / 3)))
    assert float(losses.divergence([jnp.zeros((1, 3))], {"value": [z]}, None)) == pytest.approx(
        float(by_hand), 1e-5
    )
    assert float(losses.weighted([z], {"value": [z - 1], "weight": 2.0}, {})) == pytest.approx(2.0)
