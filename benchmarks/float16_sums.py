"""Perplexity of SmolLM2 as a GPU with `activations="float16"` would compute it, on any machine.

    python benchmarks/float16_sums.py --windows 4 --json benchmarks/results/float16_sums_smollm2.json

With one token the kernels of GPUs sum the products of a word in float16, and words in float32; with several tokens
tensor cores round weights and inputs to float16 and sum in float32. Here both are done in plain array operations,
in the order of the words, for every product of the model with a uniform grid, and set beside sums in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

import jaxq
from jaxq import data, evaluate, models, recipes
from jaxq.formats import UniformArray
from jaxq.formats.packing import unpack
from jaxq.kernels.gpu import words
from jaxq.kernels.uniform.gpu import SHRINK


def rounded(x: jax.Array, array: UniformArray) -> jax.Array:
    """The product of tensor cores: weights and inputs in float16, sums in float32."""
    half = array.matrix(jnp.float16).astype(jnp.float32)
    return x.astype(jnp.float16).astype(jnp.float32) @ half


def word_by_word(x: jax.Array, array: UniformArray) -> jax.Array:
    """The product of one token at a time: each half of a word's pairs adds up in float16."""
    in_size, out_size = array.matrix_shape
    groups = array.scale.shape[-2]
    group = in_size if groups == 1 else array.format.group_size
    order = words.order_for(array.format.bits, None if groups == 1 else group, spread=True)
    shape = (-1, order.pairs, order.run, 2)
    codes = unpack(array.codes, array.format.bits, in_size).astype(jnp.float32)
    codes = (codes - jnp.repeat(array.zero_point(), group, axis=0)[:in_size]) / SHRINK
    weights = codes.astype(jnp.float16).reshape((*shape, out_size))
    each = order.member_inputs
    scale = jnp.repeat(array.scale.astype(jnp.float32), group // each, axis=0)[: in_size // each] * SHRINK

    def one(token: jax.Array) -> jax.Array:
        inputs = token.astype(jnp.float16).reshape(shape).astype(jnp.float32)
        total = jnp.zeros((), jnp.float16)
        for pair in range(order.pairs):
            exact = inputs[:, pair, :, :, None] * weights[:, pair].astype(jnp.float32)
            total = (exact + total.astype(jnp.float32)).astype(jnp.float16)
        return (total.astype(jnp.float32).sum(axis=(1, 2)) * scale).sum(axis=0)

    return jax.lax.map(one, x.reshape((-1, in_size))).reshape((*x.shape[:-1], out_size))


def exactly(x: jax.Array, array: UniformArray) -> jax.Array:
    return x @ array.matrix(jnp.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-offgrid")
    parser.add_argument("--text", default="essays")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = models.load(args.model)
    text = data.split(data.read_text(data.corpus(args.text)))[1]
    windows = data.windows(text, model.tokenizer, args.seq_len, args.windows)
    recipe = recipes.named("rtn", bits=4, group_size=64)
    params = jaxq.quantize(model.apply, model.params, [windows[:1]], recipe).params
    found: dict[str, Any] = {"model": args.model, "text": args.text, "windows": args.windows, "rows": []}
    for name, product in (("float32", exactly), ("tensor cores", rounded), ("float16 in a word", word_by_word)):
        # One method for all: whatever multiplies a grid in this process goes through it.
        UniformArray.matmul = lambda self, x, product=product: product(jnp.asarray(x), self).astype(x.dtype)

        def apply(params: Any, tokens: Any) -> Any:
            return model.apply(params, tokens)

        start = time.perf_counter()
        value = evaluate.perplexity(apply, params, windows, batch=1)["perplexity"]
        row = {"sums": name, "perplexity": value, "seconds": time.perf_counter() - start}
        found["rows"].append(row)
        print(row, flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
