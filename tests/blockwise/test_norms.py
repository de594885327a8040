"""What moves between a norm and a layer: the float function stays, and so does the quantized one."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxq
from jaxq.blockwise import norms, search
from jaxq.blockwise.work import finished
from jaxq.errors import JaxqError
from jaxq.steps import Calibrate, Reparametrize

FIT = Calibrate("none", images=32, batch=8)


@pytest.fixture(scope="module")
def calibrated(begun):
    job, work, _ = begun("repq-vit")
    return job, search.calibrate(job, work, FIT)


def outputs(vit, job, work, images):
    done = finished(job, work)
    params = jaxq.tracing.replace(vit.params, done.params)
    return jax.jit(jaxq.quantized(vit.apply))(jaxq.Activated(params, done.activations), np.concatenate(images))


def test_one_grid_for_the_tensor_gives_the_same_codes(vit, images, calibrated):
    job, before = calibrated
    after = norms.reparametrize(job, before, Reparametrize())
    path = "blocks/1/mlp/fc1/kernel"
    assert before.inputs[path].scale.shape == (16,) and after.inputs[path].scale.shape == ()
    assert after.rule(path).grid.share == "tensor" and before.rule(path).grid.share == "channel"
    want, got = (outputs(vit, job, work, images) for work in (before, after))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    # Not because nothing is rounded.
    assert np.abs(np.asarray(want) - vit.apply(vit.params, np.concatenate(images))).max() > 0.02


def test_what_is_not_before_a_layer_is_refused(calibrated):
    job, work = calibrated
    with pytest.raises(JaxqError, match="there is no norm blocks/0/other before it"):
        norms.reparametrize(job, work, Reparametrize((("attn/qkv", "other"),)))
    with pytest.raises(JaxqError, match="would change the float function"):
        norms.reparametrize(job, work, Reparametrize((("attn/qkv", "norm2"),)))
    with pytest.raises(JaxqError, match="finds no grid of one scale a channel"):
        norms.reparametrize(job, dataclasses.replace(work, inputs={}), Reparametrize())


def test_paths_of_norms():
    pairs = Reparametrize().pairs
    assert norms.norm_of("blocks/3/attn/qkv/kernel", pairs) == "blocks/3/norm1"
    assert norms.norm_of("layers/1/downsample/reduction/kernel", pairs) == "layers/1/downsample/norm"
    assert norms.norm_of("blocks/3/attn/proj/kernel", pairs) is None
    assert norms.norm_of("blocks/3/notmlp/fc1/kernel", pairs) is None


def test_a_rotation_spreads_the_stream_and_keeps_the_function(begun):
    from jaxq.steps import Rotate

    job, work, _ = begun()
    params = dict(work.floats)
    params["cls_token"] = params["cls_token"].at[..., 3].add(40.0)
    turned = norms.rotate(job, dataclasses.replace(work, floats=params), Rotate())
    assert turned.params is turned.floats
    np.testing.assert_allclose(turned.params["blocks/0/norm1/scale"], 1)
    before, after = (np.abs(p["cls_token"]).max() for p in (params, turned.params))
    assert after < 0.75 * before
