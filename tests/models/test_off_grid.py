"""The off-grid form computes the same function with weights that no longer lie on their grid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf
from hypothesis import given
from hypothesis import strategies as st

from jaxq.errors import JaxqError
from jaxq.models import Lazy, ModelConfig, abstract_params, build
from jaxq.models.off_grid import off_grid, rotation, turn_rows

TOKENS = np.random.default_rng(7).integers(3, 97, (2, 24)).astype(np.int32)


def random_params(config: ModelConfig) -> dict:
    draws = np.random.default_rng(0)
    return jax.tree.map(lambda x: draws.normal(0.1, 0.3, x.shape).astype(np.float32), abstract_params(config))


def logits(config, params) -> np.ndarray:
    return np.asarray(jax.jit(build(config, params).apply)(params, TOKENS))


@pytest.mark.parametrize("model_type, changes", [
    ("llama", dict(attention_bias=True, mlp_bias=True)),
    ("llama", dict(tie_word_embeddings=True)),
    ("qwen3", {}),
    ("qwen2", {}),
])  # fmt: skip
def test_the_function_stays(model_type, changes):
    config = ModelConfig.from_hf(tiny_hf.plain_config(model_type, **changes))
    params = random_params(config)
    moved, untied = off_grid(params, config, seed=3)
    assert not untied.tied and untied == dataclasses.replace(config, tied=False)
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(untied))
    assert jax.tree.map(lambda leaf: leaf.shape, moved) == shapes
    expected = logits(config, params)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(untied, moved), expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    gains = [moved["norm"]["scale"]] + [
        layer[name]["scale"] for layer in moved["layers"].values() for name in ("attention_norm", "mlp_norm")
    ]
    assert all((np.asarray(gain) == 1).all() for gain in gains)
    # Every matrix changed, and the parameters that were handed in did not.
    same = jax.tree.map(lambda a, b: a.ndim > 1 and np.array_equal(a, b), moved["layers"], params["layers"])
    assert not any(jax.tree.leaves(same))
    jax.tree.map(np.testing.assert_array_equal, params, random_params(config))


def test_deterministic_and_lazy():
    config = ModelConfig.from_hf(tiny_hf.plain_config("llama"))
    params = random_params(config)
    reads = []

    def lazy(leaf):
        return Lazy(leaf.shape, leaf.dtype, lambda: reads.append(leaf.shape) or leaf)

    later, _ = off_grid(jax.tree.map(lazy, params), config, seed=1)
    assert reads == [] and all(isinstance(leaf, Lazy) for leaf in jax.tree.leaves(later))
    now, _ = off_grid(params, config, seed=1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), later, now)
    other, _ = off_grid(params, config, seed=2)
    assert not np.array_equal(other["embed"]["embedding"], now["embed"]["embedding"])


@given(blocks=st.integers(1, 5), seed=st.integers(0, 50), out=st.integers(1, 9))
def test_rotation_is_orthogonal_and_mixes_channels_of_like_size(blocks, seed, out):
    draws = np.random.default_rng(seed)
    hidden = 4 * blocks
    embedding = draws.normal(size=(30, hidden)) * np.exp(draws.normal(size=hidden))
    channels, mixes = rotation(embedding, seed)
    size = np.sqrt((embedding**2).mean(0))
    assert (np.diff(size[channels.ravel()]) <= 0).all()
    q = np.zeros((hidden, hidden))
    for rows, mix in zip(channels, mixes, strict=True):
        q[np.ix_(rows, rows)] = mix
    np.testing.assert_allclose(q @ q.T, np.eye(hidden), atol=1e-12)
    w, gain = draws.normal(size=(hidden, out)), draws.normal(size=hidden)
    np.testing.assert_allclose(turn_rows(w, gain, channels, mixes), q.T @ (gain[:, None] * w), atol=1e-12)
    np.testing.assert_allclose(turn_rows(gain, None, channels, mixes), q.T @ gain, atol=1e-12)


def test_wide_matrices_are_turned_some_columns_at_a_time(monkeypatch):
    from jaxq.models import off_grid as module

    channels, mixes = rotation(np.random.default_rng(0).normal(size=(9, 8)), 0)
    w = np.random.default_rng(1).normal(size=(8, 23)).astype(np.float32)
    whole = turn_rows(w, None, channels, mixes)
    monkeypatch.setattr(module, "_COLUMNS", 5)
    np.testing.assert_array_equal(turn_rows(w, None, channels, mixes), whole)
    assert whole.dtype == np.float32


def test_models_it_does_not_fit():
    config = ModelConfig.from_hf(tiny_hf.plain_config("gemma2"))
    with pytest.raises(JaxqError, match="not gemma2"):
        off_grid({}, config)
    config = ModelConfig.from_hf(tiny_hf.plain_config("llama", hidden_size=30, head_dim=8))
    with pytest.raises(JaxqError, match="multiple of 4, not 30"):
        off_grid({}, config)


def test_bfloat16_leaves_stay_bfloat16():
    config = ModelConfig.from_hf(tiny_hf.plain_config("llama"))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(config))
    moved, _ = off_grid(half, config)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(moved)} == {"bfloat16"}
