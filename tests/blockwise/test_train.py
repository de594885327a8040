"""Training of blocks: what is trained moves and helps, everything else stays bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.blockwise import blocks, mlp, search, train
from jaxq.blockwise.work import leaves
from jaxq.errors import JaxqError
from jaxq.steps import Calibrate, Reconstruct, ReluMLP

FAST = Reconstruct(loss="mse", iterations=60, batch=8, rate=2e-2, mixed=1.0, drop=1.0, scale_rate=1e-3)


@pytest.fixture(scope="module")
def calibrated(begun):
    job, work, _ = begun("percentile")
    return job, search.calibrate(job, work, Calibrate("mse", images=32, batch=8))


def divergence(job, work, **rounds):
    """KL divergence of the work's classes from those of the float function."""
    pieces, carries = blocks.cut(job.fn, work.params, job.examples, 8), blocks.start(job.examples, 8)
    exact = blocks.start(job.examples, 8)
    for stage in pieces:
        off = dataclasses.replace(work, params=work.floats)
        found = blocks.outputs(stage, leaves(job, work, stage, **rounds), carries)
        wanted = blocks.outputs(stage, leaves(job, off, stage, weights=False, activations=False), exact)
        carries, exact = blocks.advanced(stage, carries, found), blocks.advanced(stage, exact, wanted)
    p, q = (jax.nn.log_softmax(jnp.concatenate(z)) for z in (exact, carries))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)))


def test_learned_rounding(calibrated):
    job, work = calibrated
    done = train.train(job, work, FAST)
    assert divergence(job, done) < 0.7 * divergence(job, work)
    for path, grid in done.weights.items():
        matrix = job.targets[path].site.layout.to_canonical(done.params[path])
        np.testing.assert_allclose(grid(matrix), matrix, rtol=1e-5, atol=1e-6)
        steps = np.abs(matrix - job.targets[path].site.layout.to_canonical(work.params[path])) / grid.scale
        inside = np.asarray(grid.codes(matrix))
        assert np.all((steps < 1 + 1e-3) | (inside == 0) | (inside == 7))
    moved = {path for path in work.params if not np.array_equal(done.params[path], work.params[path])}
    assert moved == set(job.targets)
    assert any(done.inputs[p].scale != work.inputs[p].scale for p in work.inputs)
    again = train.train(job, work, FAST)
    for path in job.targets:
        np.testing.assert_array_equal(again.params[path], done.params[path])


def test_weights_trained_straight_through(calibrated):
    job, work = calibrated
    step = dataclasses.replace(FAST, train="weights", rate=3e-3, scale_rate=0.0)
    done = train.train(job, work, step)
    assert divergence(job, done) < 0.9 * divergence(job, work)
    kept = [path for path in work.params if "norm" in path or path in ("cls_token", "pos_embed")]
    assert kept
    for path in kept:
        np.testing.assert_array_equal(done.params[path], work.params[path])
    for path, quantizer in work.inputs.items():
        np.testing.assert_array_equal(done.inputs[path].scale, quantizer.scale)
    assert not np.array_equal(done.params["blocks/0/mlp/fc1/bias"], work.params["blocks/0/mlp/fc1/bias"])


def test_all_blocks_together(calibrated):
    job, work = calibrated
    step = dataclasses.replace(FAST, train="weights", loss="mse", whole=True, rate=1e-3, mixed=1.0, drop=1.0)
    told = []
    done = train.train(dataclasses.replace(job, tell=lambda text, share: told.append(text)), work, step)
    assert all(text.startswith("block 1 of 1") for text in told)
    assert divergence(job, done) < 0.5 * divergence(job, work)
    for path in job.targets:
        assert not np.array_equal(done.params[path], work.params[path])


def test_with_nothing_rounded_there_is_nothing_to_learn(calibrated):
    job, work = calibrated
    bare = dataclasses.replace(work, inputs={}, named={})
    step = dataclasses.replace(FAST, train="weights", quantized=False, mixed=0.0, iterations=5)
    done = train.train(job, bare, step)
    for path in work.params:
        np.testing.assert_allclose(done.params[path], work.params[path], atol=1e-5)


@pytest.mark.parametrize("loss", ["aph", "brecq", "fima", "least_squares", "global"])
def test_other_losses_help_too(calibrated, loss):
    job, work = calibrated
    done = train.train(job, work, dataclasses.replace(FAST, loss=loss, mixed=0.5, drop=0.5))
    assert divergence(job, done) < 0.85 * divergence(job, work)


def test_fima_follows_the_training(calibrated, monkeypatch):
    job, work = calibrated
    seen = []
    real = train.losses.fima.Rows.followed_by
    monkeypatch.setattr(
        train.losses.fima.Rows, "followed_by", lambda rows, *new: seen.append(rows.count) or real(rows, *new)
    )
    train.train(job, work, dataclasses.replace(FAST, loss="fima", rank=3, iterations=10))
    # Two blocks and the embedding; the head is compared by its logits.
    assert seen == [1, 2] * 3


def test_relu_in_place_of_gelu(begun, relu):
    job, work, recipe = begun("aphq-vit", student=relu.apply, iterations=150, batch=8)
    step = dataclasses.replace(recipe.steps[0], rate=2e-3, batch=8)
    assert isinstance(step, ReluMLP)
    done = mlp.relu_mlp(job, work, step)
    off = {"weights": False, "activations": False}
    before, after = (_against_the_float_function(job, w, **off) for w in (work, done))
    assert after < 0.5 * before
    moved = {p for p in work.params if not np.array_equal(done.params[p], work.params[p])}
    assert moved == {p for p in work.params if "/mlp/" in p}


def _against_the_float_function(job, work, **rounds):
    """As `divergence`, the float function being another one than that which is quantized."""
    whole = tuple(x for x in job.examples)
    p, q = (
        jax.nn.log_softmax(fn(params, *whole))
        for fn, params in ((job.teacher, work.floats), (job.fn, work.params))
    )
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)))


def test_mlps_side_by_side(begun, relu, monkeypatch):
    job, work, recipe = begun("aphq-vit", student=relu.apply, iterations=20, batch=8)
    step = dataclasses.replace(recipe.steps[0], rate=2e-3, batch=8)
    alone = mlp.relu_mlp(job, work, step)
    told = []
    monkeypatch.setattr(mlp, "_fits", lambda *_: True)
    together = mlp.relu_mlp(
        dataclasses.replace(job, tell=lambda text, share: told.append((text, share))), work, step
    )
    for path in alone.params:
        np.testing.assert_allclose(alone.params[path], together.params[path], atol=1e-5, err_msg=path)
    trained = [(text, share) for text, share in told if "/20, " in text]
    assert len(trained) == 1 and trained[0][0].startswith("MLPs of blocks 2 to 3 of 4, 20/20, error ")
    assert trained[0][1] == pytest.approx(3 / 4)


def test_relu_needs_a_student(begun):
    job, work, recipe = begun("aphq-vit")
    with pytest.raises(JaxqError, match="give student="):
        mlp.relu_mlp(job, work, recipe.steps[0])
