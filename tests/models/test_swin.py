"""Swin: windows, masks and bias rows from their definitions; stages and sites. Parity: test_vision_checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vision import SWIN, paths, pictures, programs, random

import jaxq
from jaxq.errors import JaxqError
from jaxq.models import swin
from jaxq.models.vision import abstract_params, build


def test_windows_are_cut_and_put_back():
    grid = jnp.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    cut = swin.windows(grid, 4)
    assert cut.shape == (8, 16, 3)
    np.testing.assert_array_equal(cut[1], grid[0, :4, 4:].reshape(16, 3))
    np.testing.assert_array_equal(swin.unwindows(cut, 4, 8), grid)


def test_bias_rows_speak_of_relative_positions():
    index = swin.relative_index(3).reshape(9, 9)
    assert index.min() == 0 and index.max() == 24 and len(np.unique(index)) == 25
    for i in range(9):
        for j in range(9):
            down, right = i // 3 - j // 3, i % 3 - j % 3
            assert index[i, j] == (down + 2) * 5 + right + 2


def test_mask_parts_what_the_shift_brought_together():
    grid, window, shift = 8, 4, 2
    mask = swin.shift_mask(grid, window, shift)
    assert mask.shape == (4, 1, 16, 16) and mask.dtype == np.float32
    at = np.stack(np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij"), -1)
    moved = swin.windows(
        np.roll(at, (-shift, -shift), (0, 1))[None], window
    )  # where each token of a window came from
    for window_mask, tokens in zip(mask[:, 0], np.asarray(moved), strict=True):
        near = np.abs(tokens[:, None] - tokens[None]).max(-1) < window
        np.testing.assert_array_equal(window_mask, np.where(near, 0.0, -100.0))


def test_shifted_and_plain_blocks_share_programs():
    stages, numbers = programs(SWIN)
    # Patches, plain and shifted twice, merging, two plain ones where the grid is one window, head.
    assert numbers == [0, 1, 2, 1, 2, 3, 4, 4, 5]
    assert [len(stage.consts) for stage in stages] == [0, 1, 2, 1, 2, 0, 1, 1, 0]
    assert stages[5].paths == tuple(p for p in stages[5].paths if p.startswith("layers/1/downsample/"))
    assert not any("downsample" in p for stage in stages[6:] for p in stage.paths)


def test_stages_compute_the_function():
    params, images = random(SWIN), pictures(SWIN)
    carry = (images,)
    model = build(SWIN, params)
    for stage in jaxq.stages(model.apply, params, images):
        carry = stage.fn(stage.take(params), carry)
    np.testing.assert_allclose(carry, jax.jit(model.apply)(params, images), atol=1e-5)


def test_sites_are_clean_and_products_are_named():
    sites = {s.path: s for s in jaxq.sites(build(SWIN, None).apply, abstract_params(SWIN), pictures(SWIN))}
    kernels = [path for path in paths(SWIN) if path.endswith("/kernel")]
    assert len(kernels) == 3 + 4 * 6
    for path in kernels:
        assert (sites[path].kind, sites[path].note) == ("conv" if "patch_embed" in path else "matmul", "")
    products = {s.path: s.shape for s in sites.values() if s.kind == "product"}
    assert len(products) == 12
    assert products["layers/0/blocks/1/attn/query @ layers/0/blocks/1/attn/key"] == (8, 2, 16, 16)
    assert products["layers/1/blocks/0/attn/probs @ layers/1/blocks/0/attn/value"] == (2, 4, 16, 4)


def test_query_is_named_after_the_scale():
    jaxpr = jax.make_jaxpr(build(SWIN, None).apply)(abstract_params(SWIN), pictures(SWIN)).jaxpr
    names = [e.params["name"] for e in jaxpr.eqns if e.primitive.name == "name"]
    block = ["block", "query", "key", "value", "probs"]
    assert names == block * 4 + ["block"] + block * 2 + ["block"]
    query = next(e for e in jaxpr.eqns if e.params.get("name") == "query")
    assert next(e for e in jaxpr.eqns if query.invars[0] in e.outvars).primitive.name == "mul"


@pytest.mark.parametrize("image_size", [16, 12])
def test_every_parameter_matters_and_transformations_compose(image_size):
    """12 pixels: grids of 6 and 3, which windows of 4 do not tile."""
    config = SWIN.replace(image_size=image_size, depths=(2, 1))
    model = build(config, random(config))
    images = pictures(config)
    out = jax.jit(model.apply)(model.params, images)
    assert out.dtype == jnp.float32 and out.shape == (2, 5)
    one_by_one = jax.jit(jax.vmap(lambda image: model.apply(model.params, image[None])[0]))(images)
    np.testing.assert_allclose(one_by_one, out, rtol=1e-4, atol=1e-5)
    slopes = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, images)))))(model.params)
    for keys, slope in jax.tree.leaves_with_path(slopes):
        assert np.isfinite(slope).all() and jnp.abs(slope).max() > 1e-6, keys


def test_paths_are_those_of_timm():
    shapes = paths(SWIN)
    assert shapes["layers/0/blocks/3/attn/relative_position_bias_table"] == (49, 2)
    assert shapes["layers/1/downsample/reduction/kernel"] == (32, 16)
    assert shapes["layers/1/downsample/norm/scale"] == (32,) and "layers/0/downsample/norm/scale" not in shapes
    assert "layers/1/downsample/reduction/bias" not in shapes
    assert shapes["patch_embed/norm/bias"] == (8,) and shapes["head/kernel"] == (16, 5)
    assert len(shapes) == 4 + 13 * 6 + 3 + 2 + 2


def test_without_a_head_tokens_come_out():
    config = SWIN.replace(classes=0)
    out = jax.eval_shape(build(config, None).apply, abstract_params(config, "bfloat16"), pictures(config))
    assert out.shape == (2, 16, 16) and out.dtype == jnp.float32


def test_images_of_another_size():
    model = build(SWIN, random(SWIN))
    larger = model.resize(32)
    assert larger.params is model.params and larger.config.grid == 16
    assert jax.eval_shape(larger.apply, larger.params, pictures(larger.config)).shape == (2, 5)
    with pytest.raises(JaxqError, match="a swin for images of 8 pixels has parameters of other shapes"):
        model.resize(8)
