"""Products summed row by row, for few tokens: any weight that comes as words of codes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxq.kernels.gpu.lanes import Emulated, Hardware, Instructions, halves
from jaxq.kernels.gpu.weights import Settings, Tile, Weight, call, load, power_below, program, store

#: Entries of an overlay that a program reads at a time for each of its outputs.
ENTRIES = 64

#: Pairs whose products are summed in float16 at most: each half of a pair adds up so many. The error grows with
#: the root of it; with 16 it came near 1e-3.
CHAIN = 8


def matvec(
    x: Float[Array, "tokens in"],
    weight: Weight,
    settings: Settings,
    *,
    exact: bool,
    dtype: Any = jnp.float32,
    interpret: bool = False,
) -> Float[Array, "tokens out"]:
    """Products and sums row by row, `(tokens, out)` in `dtype`; each weight is decoded once for all tokens.

    `exact` sums in float32, with `x` as it is. Otherwise `x` becomes float16 and the products of a word (for
    weights without groups of all words read together) are summed in float16, then in float32.
    """
    decoder, order = weight.decoder, weight.decoder.order
    tokens, _ = x.shape
    out_size, row_words = weight.words.shape
    # Words are read once, while all programs of a processor read the same inputs.
    once = None if settings.cache == "any" else "evict_first"
    x, source = _operand(x, order.inputs_in(row_words), exact, "evict_last" if settings.cache == "both" else None)
    blocks = row_words // order.block_words
    some = min(max(settings.words // order.run, 1), power_below(blocks))
    unroll = min(settings.unroll, -(-blocks // some))
    steps = -(-blocks // (some * unroll))
    ragged = steps * unroll * some != blocks
    rows = min(settings.rows, power_below(out_size))
    instructions = Emulated() if interpret else Hardware()

    def kernel(x_ref: Any, words_ref: Any, *rest: Any) -> None:
        *inputs, out_ref = rest
        extra, overlay = tuple(inputs[: len(weight.extra)]), inputs[len(weight.extra) :]
        # One array for each output, not one more axis: arrays of scales are then smaller than a program, and the
        # compiler reads them where they are used instead of passing them through shared memory.
        own = [program(0) * rows + row + jnp.arange(1, dtype=jnp.int32) for row in range(rows)]
        ns = [jnp.minimum(place, out_size - 1)[:, None, None] for place in own]
        places = jnp.arange(order.run, dtype=jnp.int32)[None, None, :]
        shape = (1, some, order.run)

        def tile(n: Array, chunk: Any) -> Tile:
            b = chunk * some + jnp.arange(some, dtype=jnp.int32)[None, :, None]
            # Past the end the last block is read again: its inputs count as zero.
            return Tile(instructions, extra, n, jnp.minimum(b, blocks - 1) if ragged else b)

        def read(index: Any) -> Any:
            """For each chunk of a step and each output (its words, what its groups have)."""

            def one(n: Array, chunk: Any) -> Any:
                some_tile = tile(n, chunk)
                at = n * row_words + some_tile.blocks * order.block_words + places
                planes = [load(words_ref.at[at + plane * order.run], hint=once) for plane in range(order.planes)]
                return planes, decoder.read(some_tile)

            return [[one(n, index * unroll + part) for n in ns] for part in range(unroll)]

        def inputs_of(token: int, chunk: Any) -> list[list[Any]]:
            """For each member of a block its pairs of inputs."""
            b = chunk * some + jnp.arange(some, dtype=jnp.int32)[None, :, None]
            inside = jnp.broadcast_to(b < blocks, shape) if ragged else None

            def pair_of(member: int, i: int) -> Any:
                first = ((b * order.members + member) * order.pairs + i) * order.run
                return source.read(x_ref, token, first + places, inside)

            return [[pair_of(member, i) for i in range(order.pairs)] for member in range(order.members)]

        states = [decoder.begin(tile(n, 0)) for n in ns]

        shuffles = tokens == 1 and decoder.shuffles(exact)
        decode = decoder.exact if exact else decoder.decode

        def added(index: Any, weights: Any, sums: Any) -> Any:
            xs = [[inputs_of(token, index * unroll + part) for part in range(unroll)] for token in range(tokens)]
            result = []
            for row, state in enumerate(states):
                some = [chunk[row] for chunk in weights]
                if shuffles:
                    (total,) = sums[row]
                    for (planes, _), x in zip(some, xs[0], strict=True):
                        x = x if exact else [[halves(word) for word in words] for words in x]
                        total = decoder.shuffled_sum(instructions, state, planes, x, total)
                    result.append((total,))
                    continue
                parts = [decode(instructions, state, own, planes) for planes, own in some]
                result.append(
                    tuple(
                        _accumulated(instructions, total, parts, x, exact)
                        for total, x in zip(sums[row], xs, strict=True)
                    )
                )
            return tuple(result)

        def step(index: Any, sums: Any) -> Any:
            # All reads before any arithmetic: they are what a program waits for.
            return added(index, read(index), sums)

        def step_ahead(index: Any, carried: Any) -> Any:
            weights, sums = carried
            following = read(index + 1)
            return following, added(index, weights, sums)

        sums = tuple(tuple(jnp.zeros(shape, jnp.float32) for _ in range(tokens)) for _ in range(rows))
        if settings.stages > 1 and steps > 1:
            weights, sums = lax.fori_loop(0, steps - 1, step_ahead, (read(0), sums))
            sums = added(steps - 1, weights, sums)
        else:
            sums = lax.fori_loop(0, steps, step, sums)
        for row, (place, n) in enumerate(zip(own, ns, strict=True)):
            for token in range(tokens):
                y = sums[row][token].sum(axis=2).sum(axis=1)
                if overlay:
                    y = y + _overlay(overlay, n[:, 0, 0], functools.partial(source.single, x_ref, token))
                store(out_ref.at[token * out_size + place], y.astype(dtype), place < out_size)

    operands = [x, weight.words, *weight.extra, *weight.overlay]
    out = jax.ShapeDtypeStruct((tokens * out_size,), dtype)
    # What is read ahead is so above: nothing is left to the compiler.
    compiled = dataclasses.replace(settings, stages=1)
    out = call(kernel, operands, out, (-(-out_size // rows),), compiled, interpret, "jaxq_matvec")
    return out.reshape((tokens, out_size))


def _summed(instructions: Instructions, pairs: list[Any], xs: list[Any], start: Any, exact: bool) -> Any:
    """The sum of products: float32, or a pair of partial sums in float16 that goes on from `start`."""
    if exact:
        for word, x in zip(pairs, xs, strict=True):
            for a, b in zip(word, x, strict=True):
                start = a * b if start is None else instructions.fused(a, jnp.broadcast_to(b, a.shape), start)
        return start
    for word, x in zip(pairs, xs, strict=True):
        start = instructions.multiply_add(word, jnp.broadcast_to(x, word.shape), start)
    return start


def _accumulated(instructions: Instructions, total: Array, parts: list[Any], xs: list[Any], exact: bool) -> Array:
    """`total` plus the products of one output's decoded weights with one token's inputs, chunk by chunk."""
    chain, length = None, 0
    members = [
        (*part, x) for some, inputs in zip(parts, xs, strict=True) for part, x in zip(some, inputs, strict=True)
    ]
    for place, (pairs, scale, x) in enumerate(members):
        chain = _summed(instructions, pairs, x, chain, exact)
        length += len(pairs)
        last = place == len(members) - 1
        if exact or last or scale is not None or length + len(pairs) > CHAIN:
            part: Any = chain if exact else sum(halves(chain))
            total = total + part if scale is None else instructions.fused(part, scale, total)
            chain, length = None, 0
    return total


@dataclasses.dataclass(frozen=True)
class _Source:
    """How a kernel reads `x`: as pairs of `kind`, or, where `kind` is None, as float32."""

    kind: Any
    width: int
    exact: bool
    hint: str | None

    def read(self, ref: Any, token: int, at: Array, inside: Array | None) -> Any:
        """The pairs at these places: words, or if exact both halves in float32."""
        if self.kind is None:
            return tuple(load(ref.at[token * self.width + 2 * at + half], inside, self.hint) for half in (0, 1))
        words = load(ref.at[token * (self.width // 2) + at], inside, self.hint)
        return halves(words, self.kind) if self.exact else words

    def single(self, ref: Any, token: int, at: Array) -> Array:
        """Single inputs, in float32."""
        if self.kind is None:
            return load(ref.at[token * self.width + at])
        words = load(ref.at[token * (self.width // 2) + (at >> 1)])
        return halves(words >> (16 * (at & 1)).astype(jnp.uint32), self.kind)[0]


def _operand(x: Array, width: int, exact: bool, hint: str | None) -> tuple[Array, _Source]:
    """`x` flat, as the kernels read it, with zeros up to `width` inputs."""
    tokens, in_size = x.shape
    if width != in_size:
        x = jnp.pad(x, ((0, 0), (0, width - in_size)))
    if not exact:
        x = x.astype(jnp.float16)
    if x.dtype == jnp.float32:
        return x.reshape(-1), _Source(None, width, exact, hint)
    words = lax.bitcast_convert_type(x.reshape((-1, 2)), jnp.uint32)
    return words, _Source(x.dtype, width, exact, hint)


def _overlay(refs: Any, n: Array, single: Callable[[Array], Array]) -> Array:
    """What the entries of outputs `n` (rows,) add, float32."""
    inputs, values, starts, counts = refs
    start, count = (load(ref.at[n]).astype(jnp.int32)[:, None] for ref in (starts, counts))
    lanes = jnp.arange(ENTRIES, dtype=jnp.int32)[None, :]

    def step(index: Any, total: Array) -> Array:
        place = index * ENTRIES + lanes
        inside = place < count
        at = jnp.where(inside, start + place, 0)
        row = load(inputs.at[at]).astype(jnp.int32)
        value = load(values.at[at]).astype(jnp.float32)
        return total + jnp.where(inside, value * single(row), 0.0)

    steps = (jnp.max(count) + (ENTRIES - 1)) // ENTRIES
    total = jnp.zeros((n.shape[0], ENTRIES), jnp.float32)
    return lax.fori_loop(0, steps, step, total).sum(axis=1)
