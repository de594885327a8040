"""Every family against the original in transformers; structure that jaxq.stages and jaxq.sites rely on."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf

from jaxq import models
from jaxq.errors import JaxqError
from jaxq.models import ModelConfig, abstract_params, build, init_params
from jaxq.models.common import inverse_frequencies
from jaxq.models.config import Rope

TOKENS = np.random.default_rng(7).integers(3, 97, (2, 24))


def reference(model, tokens=TOKENS) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def ours(model, params=None, tokens=TOKENS) -> np.ndarray:
    logits = jax.jit(model.apply)(model.params if params is None else params, jnp.asarray(tokens, jnp.int32))
    assert logits.dtype == jnp.float32
    return np.asarray(logits)


@pytest.mark.parametrize("case", tiny_hf.CASES)
def test_logits_equal_transformers(case, tmp_path):
    original = tiny_hf.tiny(case)
    tiny_hf.save(original, tmp_path)
    expected = reference(original)
    assert np.abs(expected).max() > 0.5
    assert np.abs(ours(models.load(tmp_path)) - expected).max() <= 1e-4


# What a case is there for: taking it away must be seen, or the parity test would prove nothing about it.
ABLATIONS = {
    "llama-gqa-llama3": {"rope": Rope()},
    "llama-linear": {"rope": Rope(500.0)},
    "mistral-window": {"windows": (None, None)},
    "qwen2-window": {"windows": (None, None)},
    "qwen3-window": {"windows": (None, None)},
    "gemma2": {"windows": (None, None)},
    "gemma3": {"windows": (6, 6)},
    "gemma3-ropes": {"local_rope": None},
}
SCALARS = {
    "gemma2": [{"attention_softcap": None}, {"logit_softcap": None}, {"query_scale": 0.25}],
    "gemma3": [{"query_scale": 0.25}],
    "gemma3-ropes": [{"logit_softcap": None}, {"rope": Rope(1e6)}],
}


@pytest.mark.parametrize(
    "case,change", [*ABLATIONS.items(), *((case, c) for case, changes in SCALARS.items() for c in changes)]
)
def test_every_trait_matters(case, change):
    model, logits = whole(case)
    changed = build(dataclasses.replace(model.config, **change), model.params)
    assert np.abs(ours(changed) - logits).max() > 1e-2


@functools.cache
def whole(case):
    kind, settings = tiny_hf.CASES[case]
    config = ModelConfig.from_hf(tiny_hf.TINY | {"model_type": tiny_hf.MODEL_TYPES[kind]} | settings)
    model = build(config, init_params(config, scale=0.25))
    return model, ours(model)


@pytest.mark.parametrize("case", tiny_hf.FAMILIES)
def test_bfloat16_is_as_close_to_exact_as_transformers(case, tmp_path):
    torch = pytest.importorskip("torch")
    original = tiny_hf.tiny(case).to(torch.bfloat16)
    tiny_hf.save(original, tmp_path)
    low = models.load(tmp_path, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(low.params)} == {"bfloat16"}
    exact = ours(models.load(tmp_path))  # the same bfloat16 weights, computed in float32
    theirs = reference(original)
    error, bound = (np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (ours(low), theirs))
    assert error <= bound


@pytest.mark.parametrize("model_type", tiny_hf.PLAIN)
def test_paths_and_shapes(model_type):
    config = ModelConfig.from_hf(tiny_hf.plain_config(model_type))
    shapes = {
        "/".join(key.key for key in keys): leaf.shape
        for keys, leaf in jax.tree.leaves_with_path(abstract_params(config, jnp.bfloat16))
    }
    width = config.heads * config.head_dim
    assert shapes["embed/embedding"] == (97, 32)
    assert shapes["layers/0/attention/query/kernel"] == (32, width)
    assert shapes["layers/0/attention/key/kernel"] == (32, width // 2)
    assert shapes["layers/1/attention/output/kernel"] == (width, 32)
    assert shapes["layers/1/mlp/gate/kernel"] == shapes["layers/1/mlp/up/kernel"] == (32, 48)
    assert shapes["layers/1/mlp/down/kernel"] == (48, 32)
    assert shapes["layers/0/attention_norm/scale"] == shapes["norm/scale"] == (32,)
    assert ("head/kernel" in shapes) == (not config.tied)
    assert ("layers/0/attention/query/bias" in shapes) == (model_type == "qwen2")
    assert ("layers/0/attention/query_norm/scale" in shapes) == (model_type in ("qwen3", "gemma3_text"))
    assert ("layers/0/mlp_post_norm/scale" in shapes) == model_type.startswith("gemma")
    params = init_params(config, 1, jnp.bfloat16)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, abstract_params(config))


def segments(closed) -> list[str]:
    """The jaxpr cut at the "block" names, each piece printed with variables numbered as they appear."""
    pieces, equations = [], []
    for equation in closed.jaxpr.eqns:
        equations.append(equation)
        if equation.primitive.name == "name" and equation.params["name"] == "block":
            pieces.append(equations)
            equations = []
    pieces.append(equations)

    def show(piece) -> str:
        seen: dict[int, str] = {}

        def name(v) -> str:
            # A literal has a value and no number of its own.
            return str(v.val) if hasattr(v, "val") else seen.setdefault(id(v), f"v{len(seen)}:{v.aval}")

        lines = []
        for e in piece:
            settings = sorted((key, str(value)) for key, value in e.params.items())
            lines.append(
                f"{[name(v) for v in e.outvars]} = {e.primitive} {settings} {[name(v) for v in e.invars]}"
            )
        return "\n".join(lines)

    return [show(piece) for piece in pieces]


@pytest.mark.parametrize("model_type", tiny_hf.PLAIN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_layers_give_equal_jaxprs(model_type, dtype):
    config = ModelConfig.from_hf(tiny_hf.plain_config(model_type, num_hidden_layers=6))
    model = build(config, abstract_params(config, dtype))
    closed = jax.make_jaxpr(model.apply)(model.params, jax.ShapeDtypeStruct((2, 9), jnp.int32))
    first, *blocks, _ = segments(closed)
    assert len(blocks) == 6
    # Local and global layers of Gemma differ only in the mask and tables that they are handed.
    assert len(set(blocks)) == 1
    # Masks and rotary tables are made before the first block, never inside.
    assert "iota" in first and not any("iota" in block or " cos " in block for block in blocks)
    names = [name for name in ("query", "key", "value", "probs") if f"('name', '{name}')" in blocks[0]]
    assert names == ["query", "key", "value", "probs"]


def test_apply_holds_no_parameters_and_equal_configs_share_functions():
    config = ModelConfig.from_hf(tiny_hf.plain_config("llama"))
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert build(config, {"a": 1}).apply is build(again, None).apply
    assert build(config, None).tokenizer is None


@pytest.mark.parametrize("model_type", tiny_hf.PLAIN)
def test_config_json_round_trip(model_type):
    config = ModelConfig.from_hf(tiny_hf.plain_config(model_type))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_llama3_frequencies_against_float64():
    rope = Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    plain = 500_000.0 ** -(np.arange(0, 128, 2) / 128)
    expected = []
    for f in plain:
        wavelength = 2 * np.pi / f
        if wavelength < 8192 / 4:
            expected.append(f)
        elif wavelength > 8192:
            expected.append(f / 8)
        else:
            smooth = (8192 / wavelength - 1) / 3
            expected.append((1 - smooth) * f / 8 + smooth * f)
    np.testing.assert_allclose(inverse_frequencies(rope, 128), expected, rtol=2e-6)


PUBLISHED = {
    "llama 3.1": (
        dict(model_type="llama", rope_theta=500000.0, eos_token_id=[128001, 128008, 128009],
             rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                               original_max_position_embeddings=8192, rope_type="llama3")),
        dict(rope=Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192), eos=(128001, 128008, 128009)),
    ),
    "old linear": (dict(model_type="llama", rope_scaling=dict(type="linear", factor=4.0)),
                   dict(rope=Rope(1e4, "linear", 4.0))),
    "mistral 0.1": (dict(model_type="mistral", sliding_window=4096), dict(windows=(4096,) * 3)),
    "mistral 0.3": (dict(model_type="mistral", sliding_window=None), dict(windows=(None,) * 3)),
    "qwen2.5": (dict(model_type="qwen2", use_sliding_window=False, sliding_window=32768, max_window_layers=1),
                dict(windows=(None,) * 3, qkv_bias=True, output_bias=False)),
    "qwen3": (dict(model_type="qwen3", head_dim=128, rope_theta=1e6), dict(head_dim=128, rope=Rope(1e6))),
    "gemma 2": (dict(model_type="gemma2", hidden_act="gelu_pytorch_tanh", sliding_window=4096, head_dim=256,
                     query_pre_attn_scalar=256),
                dict(windows=(4096, None, 4096), tied=True, activation="gelu_tanh", attention_softcap=50.0)),
    "gemma 3": (dict(model_type="gemma3_text", num_hidden_layers=7, sliding_window=512, head_dim=256,
                     rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=6),
                dict(windows=(512,) * 5 + (None, 512), rope=Rope(1e6), local_rope=Rope(1e4))),
    "gemma 3 image-text": (
        dict(model_type="gemma3",
             text_config=dict(hidden_size=2560, rope_scaling=dict(factor=8.0, rope_type="linear"),
                              sliding_window=1024, num_hidden_layers=6)),
        dict(hidden_size=2560, rope=Rope(1e6, "linear", 8.0), local_rope=Rope(1e4),
             windows=(1024,) * 5 + (None,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_spellings_of_configs(name):
    hf, expected = PUBLISHED[name]
    config = ModelConfig.from_hf(tiny_hf.TINY | {"num_hidden_layers": 3} | hf)
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(model_type="gpt2"), "gpt2.*supported.*gemma2.*llama.*qwen3"),
        (dict(model_type=None), "model_type None"),
        (dict(rope_scaling=dict(rope_type="yarn")), "'yarn' is not supported; use default, linear or llama3"),
        (dict(rope_scaling=dict(rope_type="linear")), "needs 'factor'"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(quantization_config={"bits": 4}), "already quantized"),
        (dict(hidden_size="32"), "hidden_size must be a positive integer"),
        (dict(num_hidden_layers=0), "num_hidden_layers"),
        (dict(num_key_value_heads=3), "4 heads cannot share 3"),
        (dict(head_dim=7), "even head size"),
        (dict(hidden_act="mish"), "'mish'"),
        (dict(model_type="qwen2", layer_types=["full_attention"]), "layer_types"),
        (dict(model_type="qwen2", layer_types=["sliding_attention"] * 2), "sliding_window is not set"),
        (dict(model_type="gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention"),
    ],
)  # fmt: skip
def test_unsupported_configs_are_one_clear_line(changes, message):
    with pytest.raises(JaxqError, match=message) as error:
        ModelConfig.from_hf(tiny_hf.TINY | dict(model_type="llama") | changes)
    assert "\n" not in str(error.value)


def test_broken_jaxq_configs():
    good = ModelConfig.from_hf(tiny_hf.plain_config("llama")).to_dict()
    for bad in (
        good | {"surprise": 1},
        {k: v for k, v in good.items() if k != "rope"},
        good | {"heads": None},
    ):
        with pytest.raises(JaxqError, match="not a jaxq model config"):
            ModelConfig.from_dict(bad)
    with pytest.raises(JaxqError, match="unknown model family 'x'"):
        abstract_params(ModelConfig.from_dict(good | {"family": "x"}))


@pytest.mark.parametrize("model_type", tiny_hf.PLAIN)
def test_forward_is_causal_and_finite(model_type):
    """Also the check that runs where torch is not installed."""
    config = ModelConfig.from_hf(tiny_hf.plain_config(model_type))
    model = build(config, init_params(config, 3, jnp.bfloat16))
    changed = TOKENS.copy()
    changed[:, 13:] = 5
    a, b = ours(model), ours(model, tokens=changed)
    assert np.isfinite(a).all()
    np.testing.assert_array_equal(a[:, :13], b[:, :13])
    assert np.abs(a[:, 13:] - b[:, 13:]).max() > 0
