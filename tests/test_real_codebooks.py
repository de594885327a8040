"""Codebooks on SmolLM2-135M: what the Fisher weights, the sparse part and error feedback are worth."""

import numpy as np
import pytest

import jaxq
from jaxq import data, evaluate, losses, recipes, tracing
from jaxq.assets import Unavailable
from jaxq.formats import Codebook

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    try:
        return jaxq.models.load("smollm2-135m-offgrid")
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def batches(model):
    text = data.split(data.read_text(data.corpus("handbook")))[0]
    tokens = data.calibration(text, model.tokenizer, 8, 512, seed=0)
    return [tokens[i : i + 2] for i in range(0, 8, 2)]


@pytest.fixture(scope="module")
def windows(model):
    return data.windows(data.split(data.read_text(data.corpus("essays")))[1], model.tokenizer, 512, 4)


def test_each_step_of_squeezellm_lowers_perplexity_at_three_bits(model, batches, windows):
    # Lloyd's tables take a tenth of the time, and the order does not hang on the last part of the error.
    chosen = {
        "rtn": recipes.named("rtn", bits=3, group_size=128),
        "kmeans": recipes.named("kmeans", bits=3, method="lloyd"),
        "squeezellm": recipes.named("squeezellm", bits=3, method="lloyd"),
        "sparse": recipes.named("squeezellm", bits=3, method="lloyd", sparsity=0.0045),
    }
    found = {}
    for name, recipe in chosen.items():
        result = jaxq.quantize(model.apply, model.params, batches[:2], recipe, loss=losses.next_token)
        found[name] = evaluate.perplexity(model.apply, result.params, windows)["perplexity"]
    assert found["sparse"] < found["squeezellm"] < found["kmeans"], found
    assert found["squeezellm"] < found["rtn"], found


def test_no_start_of_lloyd_reaches_below_the_optimum_on_real_importance(model, batches):
    paths = ["layers/0/attention/query/kernel", "layers/10/mlp/up/kernel"]
    states = jaxq.observe(
        model.apply, model.params, batches[:1], dict.fromkeys(paths, jaxq.Fisher()), loss=losses.next_token
    )
    flat = tracing.flatten(model.params)
    for path in paths:
        w = np.asarray(flat[path], np.float64)
        importance = np.asarray(jaxq.Fisher().finalize(states[path]), np.float64)

        def costs(method, importance=importance, w=w):
            q = jaxq.kmeans(
                w.astype(np.float32), importance.astype(np.float32), Codebook(3, "float32"), method=method
            )
            return np.sum(importance * (w - np.asarray(q.dequantize(), np.float64)) ** 2, axis=0)

        exact, lloyd = costs("exact"), costs("lloyd")
        assert (exact <= lloyd * (1 + 1e-4) + 1e-30).all()
        assert exact.sum() < lloyd.sum()
