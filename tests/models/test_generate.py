"""The static cache equals the full forward pass; batched generation equals one by one and transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxq import models
from jaxq.errors import JaxqError
from jaxq.models import ModelConfig, build, generate, init_params
from jaxq.models.generate import pad_prompts, sample

LENGTH = 24
PROMPTS = [[5, 17, 30, 8, 9, 44, 71], [3], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72]]


@functools.cache
def tiny(model_type: str):
    """A model whose greedy choices are well apart."""
    config = ModelConfig.from_hf(tiny_hf.plain_config(model_type))
    return build(config, init_params(config, scale=0.25))


@functools.cache
def jitted(model_type: str):
    """apply and decode with numpy logits, so that indexing them compiles nothing."""
    model = tiny(model_type)
    apply, decode = jax.jit(model.apply), jax.jit(model.decode)

    def numpy_decode(*args):
        logits, cache = decode(*args)
        return np.asarray(logits), cache

    return lambda *args: np.asarray(apply(*args)), numpy_decode


@pytest.mark.parametrize("model_type", tiny_hf.PLAIN)
@settings(max_examples=8)
@given(data=st.data())
def test_decode_equals_full_forward(model_type, data):
    """Prefill of any length, then single tokens, for rows at different positions."""
    model, (apply, decode) = tiny(model_type), jitted(model_type)
    lengths = np.array(data.draw(st.lists(st.integers(1, LENGTH - 5), min_size=2, max_size=2)), np.int32)
    tokens = np.random.default_rng(int(lengths.sum())).integers(0, 97, (2, LENGTH)).astype(np.int32)
    expected = apply(model.params, tokens)
    # Pad garbage behind each prompt: it must not be seen.
    padded = np.where(np.arange(LENGTH) < lengths[:, None], tokens, 96)
    cache = model.init_cache(2, LENGTH)
    logits, cache = decode(model.params, padded, cache, np.zeros(2, np.int32))
    rows = np.arange(2)
    for row in rows:
        np.testing.assert_allclose(
            logits[row, : lengths[row]], expected[row, : lengths[row]], atol=2e-5, rtol=1e-4
        )
    for step in range(4):
        at = lengths + step
        logits, cache = decode(model.params, tokens[rows, at][:, None], cache, at)
        np.testing.assert_allclose(logits[:, 0], expected[rows, at], atol=2e-5, rtol=1e-4)


def test_prefill_in_pieces_and_last_only():
    model, (apply, decode) = tiny("gemma3_text"), jitted("gemma3_text")
    tokens = np.random.default_rng(1).integers(0, 97, (2, LENGTH)).astype(np.int32)
    expected = apply(model.params, tokens)
    cache = model.init_cache(2, LENGTH)
    start = 0
    for piece in (7, 1, 16):
        logits, cache = decode(model.params, tokens[:, start : start + piece], cache, start)
        np.testing.assert_allclose(logits, expected[:, start : start + piece], atol=2e-5, rtol=1e-4)
        start += piece
    last = np.array([3, 20], np.int32)
    one, _ = decode(model.params, tokens, model.init_cache(2, LENGTH), 0, last)
    assert one.shape == (2, 1, 97)
    np.testing.assert_allclose(one[:, 0], expected[np.arange(2), last], atol=2e-5, rtol=1e-4)


def test_an_overfull_cache_keeps_what_it_has():
    model, (_, decode) = tiny("llama"), jitted("llama")
    tokens = np.full((1, 4), 9, np.int32)
    _, cache = decode(model.params, tokens, model.init_cache(1, 4), 0)
    _, after = decode(model.params, tokens[:, :1], cache, 4)
    assert jax.tree.all(jax.tree.map(np.array_equal, cache, after))


def full_forward_greedy(model, apply, prompt, steps) -> list[int]:
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + steps):
        tokens[0, at] = np.argmax(apply(model.params, tokens)[0, at - 1])
    return tokens[0, len(prompt) : len(prompt) + steps].tolist()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_batched_unequal_prompts_equal_one_by_one(model_type):
    model, (apply, _) = tiny(model_type), jitted(model_type)
    together = generate(model, model.params, PROMPTS, max_new_tokens=9, eos=()).rows()
    assert together == [full_forward_greedy(model, apply, prompt, 9) for prompt in PROMPTS]
    alone = [generate(model, model.params, [prompt], max_new_tokens=9, eos=()).rows()[0] for prompt in PROMPTS]
    assert together == alone


@pytest.mark.parametrize("case", ["llama-gqa-llama3", "mistral-window", "gemma2", "gemma3"])
def test_greedy_equals_transformers(case, tmp_path):
    torch = pytest.importorskip("torch")
    original = tiny_hf.tiny(case)
    tiny_hf.save(original, tmp_path)
    model = models.load(tmp_path)
    width = max(map(len, PROMPTS))
    left = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    # The cache grows with what it is given; a hybrid one would not be compared at every length.
    theirs = original.generate(left, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None)
    ours = generate(model, model.params, left.numpy(), mask=mask.numpy(), max_new_tokens=16, eos=())
    assert ours.tokens.tolist() == theirs[:, width:].tolist()


def test_masks_on_either_side_are_the_same():
    model = tiny("llama")
    expected = generate(model, model.params, PROMPTS, max_new_tokens=9, eos=()).tokens
    for side in (0, 1):
        width = 15
        padded, mask = np.full((3, width), 50), np.zeros((3, width), bool)
        for row, prompt in enumerate(PROMPTS):
            at = slice(width - len(prompt), width) if side else slice(0, len(prompt))
            padded[row, at], mask[row, at] = prompt, True
        out = generate(model, model.params, jnp.asarray(padded), mask=mask, max_new_tokens=9, eos=()).tokens
        np.testing.assert_array_equal(out, expected)


def test_rows_end_at_their_own_end_token():
    model = tiny("llama")
    free = generate(model, model.params, PROMPTS, max_new_tokens=9, eos=()).rows()
    end = free[0][4]
    stopped = generate(model, model.params, PROMPTS, max_new_tokens=9, eos=[end])
    for row, long in zip(stopped.rows(), free, strict=True):
        assert row == (long[: long.index(end) + 1] if end in long else long)
    for row, length in zip(stopped.tokens, stopped.lengths, strict=True):
        assert (row[length:] == 0).all()  # pad_token_id
    # Both configured end tokens count; a row that ends at once still ends.
    first = [row[0] for row in free]
    assert generate(model, model.params, PROMPTS, max_new_tokens=9, eos=first).lengths.tolist() == [1, 1, 1]
    assert generate(model, model.params, PROMPTS, max_new_tokens=1, eos=()).tokens.shape == (3, 1)


def test_config_end_tokens_are_the_default():
    model = tiny("llama")
    assert model.config.eos == (2,)
    default = generate(model, model.params, PROMPTS, max_new_tokens=9)
    named = generate(model, model.params, PROMPTS, max_new_tokens=9, eos=[2])
    np.testing.assert_array_equal(default.tokens, named.tokens)


def test_sampling_is_seeded_and_depends_on_the_temperature():
    model = tiny("llama")
    run = functools.partial(generate, model, model.params, PROMPTS, max_new_tokens=9, eos=())
    a, b, c = run(temperature=1.0, seed=1), run(temperature=1.0, seed=1), run(temperature=1.0, seed=2)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert (a.tokens != c.tokens).any()
    greedy = run()
    np.testing.assert_array_equal(run(temperature=1e-6, seed=3).tokens, greedy.tokens)
    np.testing.assert_array_equal(run(temperature=5.0, top_k=1, top_p=0.9).tokens, greedy.tokens)


@pytest.mark.parametrize("top_k,top_p", [(None, None), (3, None), (None, 0.6), (4, 0.7), (6, 1.0)])
def test_sampled_frequencies(top_k, top_p):
    """40000 draws against probabilities from a plain float64 rule; 5 standard deviations."""
    logits, temperature, draws = np.array([2.0, 0.5, 1.5, -1.0, 0.0, 1.0]), 0.7, 40_000
    p = np.exp(logits / temperature)
    order = np.argsort(-p)
    kept = order[:top_k]
    if top_p is not None:
        inside = p[kept] / p[kept].sum()
        kept = kept[: np.searchsorted(np.cumsum(inside), top_p) + 1]
    expected = np.where(np.isin(np.arange(6), kept), p, 0.0)
    expected /= expected.sum()
    rows = jnp.tile(jnp.float32(logits), (draws, 1))
    tokens = jax.jit(sample, static_argnums=(3, 4))(
        rows, jax.random.key(0), jnp.float32(temperature), top_k, top_p
    )
    found = np.bincount(np.asarray(tokens), minlength=6) / draws
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_transform_wraps_decode_and_programs_are_kept():
    model = tiny("llama")
    halves = jax.tree.map(lambda x: x / 2, model.params)
    traces = []

    def double(decode):
        def wrapped(params, *args):
            traces.append(args[0].shape)
            return decode(jax.tree.map(lambda x: 2 * x, params), *args)

        return wrapped

    run = functools.partial(generate, model, max_new_tokens=9)
    assert run(halves, PROMPTS, eos=(), transform=double).rows() == run(model.params, PROMPTS, eos=()).rows()
    assert set(traces) == {(3, 32), (3, 1)}
    count = len(traces)
    # Other prompts of similar length, other end tokens, other parameters: the same program.
    run(halves, [prompt[:3] for prompt in PROMPTS], eos=[4], transform=double)
    run(model.params, PROMPTS, eos=[7], transform=double)
    assert len(traces) == count
    for temperature in (0.5, 0.9):
        run(halves, PROMPTS, transform=double, temperature=temperature)
    assert len(traces) == 2 * count


def test_bfloat16_parameters_generate():
    model = tiny("gemma3_text")
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    out = generate(model, low, PROMPTS, max_new_tokens=4, eos=())
    assert out.tokens.shape == (3, 4) and (out.tokens < 97).all()
    cache = model.init_cache(1, 8, jnp.bfloat16)
    logits, cache = jax.jit(model.decode)(low, jnp.ones((1, 3), jnp.int32), cache, 0)
    assert logits.dtype == jnp.float32 and cache[0].key.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(prompts=[]), "at least one token"),
        (dict(prompts=[[1], []]), "at least one token"),
        (dict(prompts=[[1, 2]], mask=np.zeros((1, 2))), "at least one token"),
        (dict(prompts=[[1, 2]], mask=np.ones((2, 2))), "mask has shape"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=1.0, top_k=0), "top_k"),
        (dict(temperature=1.0, top_k=98), "top_k"),
        (dict(temperature=1.0, top_p=0.0), "top_p"),
    ],
)
def test_bad_settings(changes, message):
    model = tiny("llama")
    with pytest.raises(JaxqError, match=message):
        generate(model, model.params, **(dict(prompts=PROMPTS) | changes))


def test_pad_prompts():
    tokens, lengths = pad_prompts([[1, 2, 3], list(range(33))])
    assert tokens.shape == (2, 64) and lengths.tolist() == [3, 33]
    assert tokens[0].tolist() == [1, 2, 3] + [0] * 61
