"""The two kernels of GPUs, for any weight that comes as words of codes: row by row, and tiles for tensor cores.

Written in Pallas for its Triton lowering, which the prototypes measured as fast as CUDA C++ on Hopper. It is
deprecated since jax 0.11; all that is known of it is here and in `lanes.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxq.kernels.dispatch import axes_of, vary_as
from jaxq.kernels.gpu.lanes import Emulated, Hardware, Instructions, halves, pair, parts
from jaxq.kernels.gpu.words import Order

#: Entries of an overlay that a program reads at a time for each of its outputs.
ENTRIES = 64

#: Pairs whose products are summed in float16 at most: each half of a pair adds up so many. The error grows with
#: the root of it; with 16 it came near 1e-3.
CHAIN = 8

#: Tokens of a tile on tensor cores at least.
TILE_TOKENS = 16

#: Products of a tile on tensor cores at least, for each sum: with fewer the compiler counts some twice.
TILE_DEPTH = 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a product is cut up; results do not depend on it but for the order of sums.

    Args:
        rows: outputs of a program, a power of two.
        words: words of each plane that a program reads of each output at a time, a power of two.
        warps: warps of a program.
        unroll: such reads that are under way together.
        split: parts that the inputs are cut into, whose sums are added afterwards; for tiles only.
        stages: steps whose reads are under way together: row by row 1, or 2 in registers; for tiles as many as
            the compiler shall keep in shared memory.
        mixed: where tables are looked up by shuffles, one read in so many goes by permutes instead, which keep
            other units busy; 1: none. For one token only.
    """

    rows: int
    words: int
    warps: int
    unroll: int = 1
    split: int = 1
    stages: int = 1
    mixed: int = 1


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program reads of a weight: some blocks of some outputs.

    `rows` is `(rows, 1, 1)`, `blocks` `(1, blocks, 1)`; arrays of a decoder have the shape `(rows, blocks, run)`
    or one that broadcasts to it. `refs` are the decoder's own arrays, flat.
    """

    instructions: Instructions
    refs: tuple[Any, ...]
    rows: Array
    blocks: Array


class Decoder(Protocol):
    """What a format adds to the kernels."""

    @property
    def order(self) -> Order: ...

    @property
    def group(self) -> int | None:
        """Inputs of a group; None for one group an output."""
        ...

    @property
    def kind(self) -> Any:
        """float16 or bfloat16: what halves of decoded pairs are."""
        ...

    def begin(self, tile: Tile) -> Any:
        """What is made once for the outputs of a program; `tile.blocks` means nothing yet."""
        ...

    def read(self, tile: Tile) -> Any:
        """What the groups of these blocks have of their own, as it lies in memory: nothing is computed yet."""
        ...

    def decode(
        self, instructions: Instructions, state: Any, own: Any, planes: list[Array]
    ) -> list[tuple[list[Array], Array | None]]:
        """For each member of a block: its pairs, and what to multiply their sums by (float32), if anything."""
        ...

    def exact(
        self, instructions: Instructions, state: Any, own: Any, planes: list[Array]
    ) -> list[tuple[list[tuple[Array, Array]], Array | None]]:
        """The same with both halves of each pair in float32, not rounded to 16 bits."""
        ...


@dataclasses.dataclass(frozen=True)
class Weight:
    """`words` (out, row words), a decoder and its arrays, perhaps an overlay (rows, values, starts, counts)."""

    words: Array
    decoder: Any
    extra: tuple[Array, ...]
    overlay: tuple[Array, ...] = ()


def pairs_exactly(
    decoder: Any, instructions: Instructions, state: Any, own: Any, planes: list[Array]
) -> list[Any]:
    """`Decoder.exact` of a decoder whose pairs are exact."""
    decoded = decoder.decode(instructions, state, own, planes)
    return [([halves(p, decoder.kind) for p in pairs], scale) for pairs, scale in decoded]


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
    x, source = _operand(x, order.inputs_in(row_words), exact)
    blocks = row_words // order.block_words
    some = min(max(settings.words // order.run, 1), _power(blocks))
    unroll = min(settings.unroll, -(-blocks // some))
    steps = -(-blocks // (some * unroll))
    ragged = steps * unroll * some != blocks
    rows = min(settings.rows, _power(out_size))
    instructions = Emulated() if interpret else Hardware()

    def kernel(x_ref: Any, words_ref: Any, *rest: Any) -> None:
        *inputs, out_ref = rest
        extra, overlay = tuple(inputs[: len(weight.extra)]), inputs[len(weight.extra) :]
        # One array for each output, not one more axis: arrays of scales are then smaller than a program, and the
        # compiler reads them where they are used instead of passing them through shared memory.
        own = [_program(0) * rows + row + jnp.arange(1, dtype=jnp.int32) for row in range(rows)]
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
                planes = [load(words_ref.at[at + plane * order.run]) for plane in range(order.planes)]
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

        mixed = settings.mixed
        shuffles = tokens == 1 and getattr(decoder, "shuffles", lambda exact: False)(exact)
        decode = decoder.exact if exact else decoder.decode

        def added(index: Any, weights: Any, sums: Any) -> Any:
            permuted = [part for part in range(unroll) if not shuffles or 0 < part % mixed == mixed - 1]
            xs = [[inputs_of(token, index * unroll + part) for part in range(unroll)] for token in range(tokens)]
            result = []
            for row, state in enumerate(states):
                some = [weights[part][row] for part in range(unroll)]
                totals = list(sums[row])
                for place in sorted(set(range(unroll)) - set(permuted)):
                    x = xs[0][place] if exact else [[halves(word) for word in words] for words in xs[0][place]]
                    totals = [decoder.shuffled_sum(instructions, state, some[place][0], x, *totals)]
                if permuted:
                    parts = [decode(instructions, state, some[place][1], some[place][0]) for place in permuted]
                    totals = [
                        _accumulated(instructions, total, parts, [x[place] for place in permuted], exact)
                        for total, x in zip(totals, xs, strict=True)
                    ]
                result.append(tuple(totals))
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
    out = _call(kernel, operands, out, (-(-out_size // rows),), compiled, interpret, "jaxq_matvec")
    return out.reshape((tokens, out_size))


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
    some = max(min(max(settings.words // order.run, 1), _power(blocks)), TILE_DEPTH // order.run)
    split = min(settings.split, -(-blocks // some))
    steps = -(-blocks // (some * split))
    ragged = steps * split * some != blocks
    rows = min(settings.rows, _power(out_size))
    width = max(TILE_TOKENS, 1 << (tokens - 1).bit_length())
    instructions = Emulated() if interpret else Hardware()
    depth, side = some * order.run, steps * split * some * order.block_inputs // 2
    # Even and odd inputs apart, each of all tokens, so that a tile of them is read as it lies; zeros where there
    # are no tokens or inputs.
    x = jnp.pad(x.astype(jnp.float16), ((0, width - tokens), (0, 2 * side - in_size)))
    x = jnp.moveaxis(x.reshape((width, side, 2)), -1, 0)
    kept = dtype if split == 1 else jnp.float32

    def kernel(x_ref: Any, words_ref: Any, *rest: Any) -> None:
        *extra, out_ref = rest
        part = _program(1)
        own = _program(0) * rows + jnp.arange(rows, dtype=jnp.int32)
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
    out = _call(kernel, operands, out, grid, settings, interpret, "jaxq_tiles").reshape((split, tokens, out_size))
    return out[0] if split == 1 else out.sum(axis=0).astype(dtype)


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

    def read(self, ref: Any, token: int, at: Array, inside: Array | None) -> Any:
        """The pairs at these places: words, or if exact both halves in float32."""
        if self.kind is None:
            return tuple(load(ref.at[token * self.width + 2 * at + half], inside) for half in (0, 1))
        words = load(ref.at[token * (self.width // 2) + at], inside)
        return halves(words, self.kind) if self.exact else words

    def single(self, ref: Any, token: int, at: Array) -> Array:
        """Single inputs, in float32."""
        if self.kind is None:
            return load(ref.at[token * self.width + at])
        words = load(ref.at[token * (self.width // 2) + (at >> 1)])
        return halves(words >> (16 * (at & 1)).astype(jnp.uint32), self.kind)[0]


def _operand(x: Array, width: int, exact: bool) -> tuple[Array, _Source]:
    """`x` flat, as the kernels read it, with zeros up to `width` inputs."""
    tokens, in_size = x.shape
    if width != in_size:
        x = jnp.pad(x, ((0, 0), (0, width - in_size)))
    if not exact:
        x = x.astype(jnp.float16)
    if x.dtype == jnp.float32:
        return x.reshape(-1), _Source(None, width, exact)
    words = lax.bitcast_convert_type(x.reshape((-1, 2)), jnp.uint32)
    return words, _Source(x.dtype, width, exact)


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


def load(ref: Any, inside: Array | None = None) -> Array:
    """Reads an indexed ref, zero where not `inside`."""
    from jax.experimental.pallas import triton

    if inside is None:
        return triton.load(ref)
    return triton.load(ref, mask=inside, other=jnp.zeros((), ref.dtype))


def store(ref: Any, value: Array, inside: Array) -> None:
    from jax.experimental.pallas import triton

    triton.store(ref, value, mask=inside)


def _program(axis: int) -> Any:
    from jax.experimental import pallas

    return pallas.program_id(axis)


def _call(
    kernel: Any,
    operands: list[Array],
    out: Any,
    grid: tuple[int, ...],
    settings: Settings,
    interpret: bool,
    name: str,
) -> Float[Array, " size"]:
    """Runs a kernel on flat arrays, with a flat result like `out`."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    whole = pallas.BlockSpec(memory_space=pallas.ANY)
    # In a shard_map all must vary over the same axes, and the result over them too.
    operands = [vary_as(operand, *operands) for operand in operands]
    out = out.update(manual_axis_type=axes_of(operands[0]))
    return pallas.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole] * len(operands),
        out_specs=whole,
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=settings.warps, num_stages=settings.stages),
        interpret=interpret,
        name=name,
    )(*[operand.reshape(-1) for operand in operands])


def _power(size: int) -> int:
    """The largest power of two up to `size`."""
    return 1 << (size.bit_length() - 1)
