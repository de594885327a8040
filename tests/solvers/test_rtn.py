"""Round to nearest against float64 NumPy, over batches and layouts."""

import numpy as np
import pytest
from gptq_oracle import fit

from jaxq.errors import JaxqError
from jaxq.formats import Layout, Uniform
from jaxq.solvers.rtn import rtn


@pytest.mark.parametrize("format", [Uniform(4, 16), Uniform(3, 20, symmetric=True), Uniform(2, None)], ids=str)
def test_against_numpy(format):
    w = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    size = format.group_size or 50
    expected = np.zeros((50, 6))
    for start in range(0, 50, size):
        group = w[start : start + size].astype(np.float64)
        scale, zero = fit(group, format)
        codes = np.clip(np.round(group / scale) + zero, 0, 2**format.bits - 1)
        expected[start : start + size] = (codes - zero) * scale
    np.testing.assert_allclose(rtn(w, format).dequantize(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("range", ["minmax", "mse"])
@pytest.mark.parametrize("size", [20, "tensor"])
def test_batch_equals_one_by_one(range, size):
    w = np.random.default_rng(1).standard_t(3, size=(3, 50, 6)).astype(np.float32)
    whole = rtn(w, Uniform(3, size), range=range)
    for lane in (0, 1, 2):
        one = rtn(w[lane], Uniform(3, size), range=range)
        np.testing.assert_array_equal(whole[lane].dequantize(), one.dequantize())


def test_mse_search_lowers_the_squared_error():
    w = np.random.default_rng(2).standard_t(3, size=(256, 8)).astype(np.float32)
    for bits in (2, 3, 4):
        format = Uniform(bits, 64)
        error = {r: ((np.asarray(rtn(w, format, range=r).dequantize()) - w) ** 2).sum() for r in ("minmax", "mse")}
        assert error["mse"] < 0.95 * error["minmax"]


def test_bad_input_is_named():
    w, format = np.ones((8, 4), np.float32), Uniform(4, 4)
    bad = w.copy()
    bad[3, 2] = np.nan
    for call, words in [
        (lambda: rtn(bad, format), "the weights hold NaN or infinite values"),
        (lambda: rtn(w, Uniform(4, 16)), "group size 16 is larger than the input width 8"),
        (lambda: rtn(w, format, range="best"), "unknown range search 'best'"),
        (lambda: rtn(w[:0], format), "is empty"),
        (lambda: rtn(w, format, layout=Layout.of((2, 2, 4), (0, 1), (2,))), "is no matrix"),
        (lambda: rtn(1e8 * w, format), "a scale does not fit float16; use scale_dtype='bfloat16'"),
    ]:
        with pytest.raises(JaxqError, match=words):
            call()
