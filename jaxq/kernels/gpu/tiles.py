"""Products by tensor cores, for more tokens: tiles of any weight that comes as words of codes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxq.kernels.gpu.lanes import Emulated, Hardware, pair, parts
from jaxq.kernels.gpu.weights import Settings, Tile, Weight, call, load, power_below, program, store

#: Tokens of a tile on tensor cores at least.
LEAST_TOKENS = 16

#: Products of a tile on tensor cores at least, for each sum: with fewer the compiler counts some twice.
LEAST_DEPTH = 16


def tiles(
    x: Float[Array, "tokens in"],
    weight: Weight,
    settings: Settings,
    *,
    dtype: Any = jnp.float32,
    interpret: bool = False,
) -> Float[Array, "tokens out"]:
    """The product by tensor cores, `(tokens, out)` in `dtype`: weights and `x` become float16, sums are float32.

    Weights are on the side of a tile with many rows, so that few tokens waste little of it. No overlay.
    """
    assert not weight.overlay
    decoder, order = weight.decoder, weight.decoder.order
    tokens, in_size = x.shape
    out_size, row_words = weight.words.shape
    blocks = row_words // order.block_words
    some = max(min(max(settings.words // order.run, 1), power_below(blocks)), LEAST_DEPTH // order.run)
    split = min(settings.split, -(-blocks // some))
    steps = -(-blocks // (some * split))
    ragged = steps * split * some != blocks
    rows = min(settings.rows, power_below(out_size))
    width = max(LEAST_TOKENS, 1 << (tokens - 1).bit_length())
    instructions = Emulated() if interpret else Hardware()
    depth, side = some * order.run, steps * split * some * order.block_inputs // 2
    # Even and odd inputs apart, each of all tokens, so that a tile of them is read as it lies; zeros where there
    # are no tokens or inputs.
    x = jnp.pad(x.astype(jnp.float16), ((0, width - tokens), (0, 2 * side - in_size)))
    x = jnp.moveaxis(x.reshape((width, side, 2)), -1, 0)
    kept = dtype if split == 1 else jnp.float32

    def kernel(x_ref: Any, words_ref: Any, *rest: Any) -> None:
        *extra, out_ref = rest
        part = program(1)
        own = program(0) * rows + jnp.arange(rows, dtype=jnp.int32)
        n = jnp.minimum(own, out_size - 1)[:, None, None]
        places = jnp.arange(order.run, dtype=jnp.int32)[None, None, :]
        token = jnp.arange(width, dtype=jnp.int32)[None, :]
        flat = jnp.arange(depth, dtype=jnp.int32)[:, None]
        # lax, not the operators of Python: those keep the compiler from seeing runs of addresses.
        block_of, place_of = (op(flat, jnp.full_like(flat, order.run)) for op in (lax.div, lax.rem))

        def tile(chunk: Any) -> Tile:
            b = chunk * some + jnp.arange(some, dtype=jnp.int32)[None, :, None]
            return Tile(instructions, tuple(extra), n, jnp.minimum(b, blocks - 1) if ragged else b)

        state = decoder.begin(tile(0))

        def step(index: Any, sums: Array) -> Array:
            chunk = part * steps + index
            at = n * row_words + tile(chunk).blocks * order.block_words + places
            planes = [load(words_ref.at[at + plane * order.run]) for plane in range(order.planes)]
            own = decoder.read(tile(chunk))
            for member, (pairs, scale) in enumerate(decoder.decode(instructions, state, own, planes)):
                b = chunk * some + block_of
                for i, word in enumerate(pairs):
                    if scale is not None:
                        both = pair(*[scale.astype(jnp.float16)] * 2)
                        word = instructions.multiply_add(word, jnp.broadcast_to(both, word.shape), None)
                    first = ((b * order.members + member) * order.pairs + i) * order.run
                    for half, a in enumerate(parts(word)):
                        some_x = load(x_ref.at[(half * width + token) * side + first + place_of])
                        sums = sums + lax.dot(a.reshape((rows, depth)), some_x, preferred_element_type=jnp.float32)
            return sums

        sums = lax.fori_loop(0, steps, step, jnp.zeros((rows, width), jnp.float32))
        at = (part * tokens + token) * out_size + own[:, None]
        store(out_ref.at[at], sums.astype(kept), (own[:, None] < out_size) & (token < tokens))

    operands = [x, weight.words, *weight.extra]
    grid = (-(-out_size // rows), split)
    out = jax.ShapeDtypeStruct((split * tokens * out_size,), kept)
    out = call(kernel, operands, out, grid, settings, interpret, "jaxq_tiles").reshape((split, tokens, out_size))
    return out[0] if split == 1 else out.sum(axis=0).astype(dtype)
