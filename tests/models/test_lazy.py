"""Lazy leaves: shapes from headers alone, values only when asked for."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_hf
from hypothesis import given
from hypothesis import strategies as st

from jaxq import models
from jaxq.errors import JaxqError
from jaxq.models import Lazy
from jaxq.models.shards import Tensor

BF16 = np.dtype(ml_dtypes.bfloat16)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    turn=st.booleans(),
    dtype=st.sampled_from([np.float32, BF16]),
)
def test_lazy_equals_its_values(rows, columns, turn, dtype):
    stored = np.arange(rows * columns, dtype=np.float16).reshape(rows, columns)
    view = stored.T if turn else stored
    leaf = Lazy(view.shape, np.dtype(dtype), lambda: view)
    values = np.asarray(leaf)
    assert values.dtype == dtype and values.flags.c_contiguous and values.flags.writeable
    np.testing.assert_array_equal(values, view.astype(dtype))
    np.testing.assert_array_equal(leaf[1:3], view.astype(dtype)[1:3])
    assert (leaf.ndim, leaf.size, leaf.nbytes) == (
        2,
        rows * columns,
        rows * columns * np.dtype(dtype).itemsize,
    )
    assert jnp.asarray(leaf).dtype == dtype
    assert np.asarray(leaf, np.float64).dtype == np.float64


def test_lazy_is_one_abstract_leaf():
    leaf = Lazy((4, 3), BF16, lambda: pytest.fail("read"))
    assert jax.tree.leaves({"a": leaf}) == [leaf]
    out = jax.eval_shape(lambda a, b: a @ b, leaf, jax.ShapeDtypeStruct((3, 5), BF16))
    assert (out.shape, out.dtype) == ((4, 5), BF16)
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(leaf, copy=False)


def test_lazy_load_reads_headers_only(tmp_path, monkeypatch):
    tiny_hf.write(tmp_path, tiny_hf.plain_config("qwen3"))
    viewed = []
    whole = Tensor.view
    monkeypatch.setattr(Tensor, "view", lambda self: viewed.append(self.name) or whole(self))
    model = models.load(tmp_path, lazy=True, dtype="bfloat16")
    abstract = models.abstract_params(model.config, "bfloat16")
    spec = jax.tree.map(lambda x: (tuple(x.shape), np.dtype(x.dtype)), (model.params, abstract))
    assert spec[0] == spec[1]
    jax.eval_shape(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    assert viewed == []
    np.asarray(model.params["layers"]["1"]["mlp"]["up"]["kernel"])
    assert viewed == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_lazy_values_equal_eager_and_written(model_type, tmp_path):
    written = tiny_hf.write(tmp_path, tiny_hf.plain_config(model_type))
    lazy, eager = models.load(tmp_path, lazy=True).params, models.load(tmp_path).params
    assert jax.tree.structure(lazy) == jax.tree.structure(eager) == jax.tree.structure(written)
    for a, b, c in zip(*map(jax.tree.leaves, (lazy, eager, written)), strict=True):
        assert isinstance(a, Lazy) and isinstance(b, jax.Array)
        np.testing.assert_array_equal(np.asarray(a), b)
        np.testing.assert_array_equal(b, c)


def test_a_file_that_vanishes_is_one_clear_error(tmp_path):
    tiny_hf.write(tmp_path, tiny_hf.plain_config("llama"))
    model = models.load(tmp_path, lazy=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(JaxqError, match="cannot read model.norm.weight"):
        np.asarray(model.params["norm"]["scale"])
