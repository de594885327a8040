"""The promises on SmolLM2-135M itself, and the README's example as printed."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import data, recipes, tracing
from jaxq.assets import Unavailable
from jaxq.solvers.gptq import output_error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    try:
        return jaxq.models.load("smollm2-135m-offgrid")
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokens(model):
    text = data.split(data.read_text(data.corpus("handbook")))[0]
    return data.calibration(text, model.tokenizer, 2, 256, seed=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_wins_on_real_hessians(model, tokens, bits):
    paths = ["layers/0/mlp/down/kernel", "layers/7/attention/query/kernel", "layers/29/mlp/up/kernel"]
    statistics = {path: jaxq.Hessian() for path in paths}
    states = jaxq.observe(model.apply, model.params, [tokens], statistics)
    flat = tracing.flatten(model.params)
    for path in paths:
        hessian, format = jaxq.Hessian().finalize(states[path]), jaxq.Uniform(bits, 64)
        errors = {
            order: float(output_error(flat[path], jaxq.gptq(flat[path], hessian, format, order=order), hessian))
            for order in ("natural", "activation")
        }
        rounded = float(output_error(flat[path], jaxq.rtn(flat[path], format), hessian))
        assert max(errors.values()) < rounded, (path, errors, rounded)


def test_quantized_model_is_the_dequantized_model(model, tokens):
    recipe = recipes.named("rtn", bits=3, group_size=64)
    result = jaxq.quantize(model.apply, model.params, [tokens], recipe)
    notes = [s for s in jaxq.sites(model.apply, result.params, tokens) if s.note and s.kind != "dense"]
    assert notes == []
    logits = jax.jit(jaxq.quantized(model.apply))(result.params, tokens[:1, :64])
    dense = jax.jit(model.apply)(jaxq.dequantize(result.params), tokens[:1, :64])
    np.testing.assert_allclose(logits, dense, 1e-4, 1e-3)
    assert float(jnp.abs(logits - jax.jit(model.apply)(model.params, tokens[:1, :64])).max()) > 0.1


def test_readme_example_runs_as_printed():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None and len(code.group(1).strip().splitlines()) <= 11
    done = subprocess.run([sys.executable, "-c", code.group(1)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"4\.\d\d bits a weight, output error 0\.\d+, \(2, 256, 49152\)", done.stdout)
