"""Instructions on 32-bit words that hold two 16-bit floats (a *pair*) or four bytes, on a GPU or emulated.

Kernels are written once over an `Instructions` object: `Hardware` is inline assembly for Nvidia GPUs, `Emulated`
means the same in plain array operations, with which a kernel is interpreted and tested on any machine.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

Words = UInt32[Array, "*tile"]
Pair = tuple[Array, Array]


class Instructions(Protocol):
    def permute(self, low: Words, high: Words, selector: Words | int) -> Words:
        """Byte k is that of the eight bytes (low, high) which bits 4k to 4k + 2 of the selector name.

        Selectors have bit 4k + 3 clear; bits from 16 on mean nothing.
        """
        ...

    def multiply_add(self, a: Words, b: Words, c: Words | None) -> Words:
        """a * b + c of both halves as float16, rounded once; without `c` the product."""
        ...

    def fused(self, a: Array, b: Array, c: Array) -> Array:
        """a * b + c of float32, in one instruction."""
        ...

    def merged(self, word: Words, mask: int, bits: int) -> Words:
        """(word & mask) | bits, in one instruction."""
        ...

    def shuffled_sum(
        self, entries: list[Words], kind: Any, nibbles: Words, xs: list[Pair], start: Float[Array, "*tile"]
    ) -> Float[Array, "*tile"]:
        """`start` plus the products of `xs` with the entries that eight nibbles name, lowest first, in float32.

        Args:
            entries: a table of up to 16 as pairs of `kind`; all lanes of a warp must have the same one.
        """
        ...


class Emulated:
    """Array operations that give the same bits."""

    def permute(self, low: Words, high: Words, selector: Words | int) -> Words:
        low, high, selector = jnp.broadcast_arrays(low, high, jnp.asarray(selector, jnp.uint32))
        # Shifts, not casts to bytes and back: XLA on CPUs (jaxlib 0.10.2) joins two casts to a wrong one.
        bytes_of = [(word[..., None] >> jnp.arange(0, 32, 8, dtype=jnp.uint32)) & 0xFF for word in (low, high)]
        several = jnp.concatenate(bytes_of, axis=-1)
        places = (selector[..., None] >> jnp.arange(0, 16, 4, dtype=jnp.uint32)) & 7
        found = jnp.take_along_axis(several, places.astype(jnp.int32), axis=-1)
        return jnp.sum(found << jnp.arange(0, 32, 8, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)

    def multiply_add(self, a: Words, b: Words, c: Words | None) -> Words:
        def both(word: Words) -> Array:
            return jax.lax.bitcast_convert_type(word, jnp.float16).astype(jnp.float32)

        # A product of two float16 is exact in float32.
        total = both(a) * both(b)
        if c is not None:
            total = total + both(c)
        return jax.lax.bitcast_convert_type(total.astype(jnp.float16), jnp.uint32)

    def fused(self, a: Array, b: Array, c: Array) -> Array:
        return a * b + c

    def merged(self, word: Words, mask: int, bits: int) -> Words:
        return (word & jnp.uint32(mask)) | jnp.uint32(bits)

    def shuffled_sum(
        self, entries: list[Words], kind: Any, nibbles: Words, xs: list[Pair], start: Float[Array, "*tile"]
    ) -> Float[Array, "*tile"]:
        table = jnp.stack([half for word in entries for half in halves(word, kind)], axis=-1)
        table = jnp.broadcast_to(table, (*nibbles.shape, table.shape[-1]))
        for place, x in enumerate(x for pair in xs for x in pair):
            code = (nibbles >> (4 * place)) & (table.shape[-1] - 1)
            start = start + x * jnp.take_along_axis(table, code[..., None].astype(jnp.int32), axis=-1)[..., 0]
        return start


class Assembly:
    """What decoders need, as PTX; `run` puts it into a kernel."""

    def run(self, text: str, *words: Array) -> Words:
        """Runs PTX of which $0 is the result, on each element."""
        raise NotImplementedError

    def permute(self, low: Words, high: Words, selector: Words | int) -> Words:
        if isinstance(selector, int):
            return self.run(f"prmt.b32 $0, $1, $2, {selector:#x};", low, high)
        return self.run("prmt.b32 $0, $1, $2, $3;", low, high, selector)

    def multiply_add(self, a: Words, b: Words, c: Words | None) -> Words:
        if c is None:
            return self.run("mul.rn.f16x2 $0, $1, $2;", a, b)
        return self.run("fma.rn.f16x2 $0, $1, $2, $3;", a, b, c)

    def merged(self, word: Words, mask: int, bits: int) -> Words:
        return self.run(f"lop3.b32 $0, $1, {mask:#x}, {bits:#x}, 0xEA;", word)


class Hardware(Assembly):
    """Inline assembly in a Pallas kernel that is lowered through Triton."""

    def run(self, text: str, *words: Array) -> Words:
        return _assembly(text, *words)

    def fused(self, a: Array, b: Array, c: Array) -> Array:
        return _assembly("fma.rn.f32 $0, $1, $2, $3;", a, b, c, constraint="f,f,f", result=jnp.float32)

    def shuffled_sum(
        self, entries: list[Words], kind: Any, nibbles: Words, xs: list[Pair], start: Float[Array, "*tile"]
    ) -> Float[Array, "*tile"]:
        singles = [x for pair in xs for x in pair]
        text = _shuffled_sum(len(entries), kind)
        return _assembly(
            text, start, nibbles, *singles, *entries, constraint="f,r," + "f," * 8, result=jnp.float32
        )


def _shuffled_sum(pairs: int, kind: Any) -> str:
    """Each lane keeps the entry of its number, and a shuffle gets that which the low bits of a register name.

    That a lane picks its entry here, each time anew, is to be right however a compiler spreads arrays over lanes;
    what does not change in a loop is moved out of it.
    """
    count = 2 * pairs
    first = 2 + 8
    lines = ["{ .reg .b32 lane, part, code, found; .reg .pred odd; .reg .f32 sum, value;"]
    lines += [
        f".reg .b32 e<{pairs}>;",
        "mov.u32 lane, %laneid;",
        *(f"mov.b32 e{i}, ${first + 1 + i};" for i in range(pairs)),
    ]
    step = 1
    while step < pairs:
        lines += [f"and.b32 part, lane, {2 * step}; setp.ne.u32 odd, part, 0;"]
        lines += [f"selp.b32 e{i}, e{i + step}, e{i}, odd;" for i in range(0, pairs, 2 * step)]
        step *= 2
    lines += ["and.b32 part, lane, 1; shl.b32 part, part, 4; shr.u32 e0, e0, part;"]
    if kind == jnp.bfloat16:
        lines += ["shl.b32 e0, e0, 16;"]
    else:
        lines += ["{ .reg .b16 low, high; mov.b32 {low, high}, e0; cvt.f32.f16 value, low; mov.b32 e0, value; }"]
    lines += ["mov.b32 sum, $1;"]
    for place in range(8):
        lines += [f"shr.u32 code, $2, {4 * place};" if place else "mov.b32 code, $2;"]
        lines += [f"shfl.sync.idx.b32 found, e0, code, {(32 - count) << 8 | 0x1F:#x}, 0xffffffff;"]
        lines += [f"mov.b32 value, found; fma.rn.f32 sum, ${3 + place}, value, sum;"]
    return " ".join([*lines, "mov.b32 $0, sum; }"])


def _assembly(text: str, *words: Array, constraint: str = "", result: Any = jnp.uint32) -> Array:
    """Runs PTX of which $0 is the result; `constraint` is that of the first words, "r" that of the others."""
    from jax.experimental.pallas import triton

    words = tuple(jnp.broadcast_arrays(*words))
    some = constraint.strip(",").split(",") if constraint else []
    kinds = [*some, *["r"] * (len(words) - len(some))]
    # Triton's own type of 32 bits, which has no sign; jax writes uint32 as another, which it refuses.
    out = jax.ShapeDtypeStruct(words[0].shape, jnp.int32 if result == jnp.uint32 else result)
    constraints = ",".join(["=f" if result == jnp.float32 else "=r", *kinds])
    (found,) = triton.elementwise_inline_asm(
        text, args=words, constraints=constraints, pack=1, result_shape_dtypes=[out]
    )
    return found.astype(result)


def halves(word: Words, kind: Any = jnp.float16) -> tuple[Float[Array, "*tile"], Float[Array, "*tile"]]:
    """Both halves of a pair of `kind` (float16 or bfloat16), the low one first, as float32."""
    if kind == jnp.bfloat16:
        return _as_float32(word << 16), _as_float32(word & jnp.uint32(0xFFFF0000))
    low, high = parts(word)
    return low.astype(jnp.float32), high.astype(jnp.float32)


def parts(word: Words) -> tuple[Array, Array]:
    """Both halves as float16."""
    low, high = (jax.lax.bitcast_convert_type(z.astype(jnp.uint16), jnp.float16) for z in (word, word >> 16))
    return low, high


def pair(low: Float[Array, "*tile"], high: Float[Array, "*tile"]) -> Words:
    """A pair of two float16."""
    bits = [jax.lax.bitcast_convert_type(z, jnp.uint16).astype(jnp.uint32) for z in (low, high)]
    return bits[0] | (bits[1] << 16)


def _as_float32(word: Words) -> Float[Array, "*tile"]:
    return jax.lax.bitcast_convert_type(word, jnp.float32)


def tables(instructions: Instructions, entries: list[Words]) -> list[tuple[Words, Words]]:
    """Registers of look-up tables from pairs of entries: for each run of 4 entries (low bytes, high bytes)."""
    runs = []
    for first in range(0, len(entries), 2):
        some = entries[first], entries[first + 1]
        runs.append((instructions.permute(*some, 0x6420), instructions.permute(*some, 0x7531)))
    return runs


def look_up(instructions: Instructions, nibbles: Words, runs: list[tuple[Words, Words]]) -> list[Words]:
    """The four pairs that eight nibbles of a word stand for, two neighbouring nibbles a pair, lowest first.

    Byte permutes find the low and the high bytes of four entries at a time, and others join them to pairs. With 16
    entries both halves of the table are read and a third permute picks between them by the nibble's top bit.
    """
    count = 4 * len(runs)
    selector, choice = nibbles, None
    if count == 16:
        selector = nibbles & jnp.uint32(0x77777777)
        choice = instructions.merged(nibbles >> 1, 0x44444444, 0x32103210)
    found = []
    for half in (0, 1):
        if half:
            selector, choice = selector >> 16, None if choice is None else choice >> 16
        sides = []
        for side in (0, 1):
            registers = [run[side] for run in runs]
            if count == 16:
                first = instructions.permute(registers[0], registers[1], selector)
                second = instructions.permute(registers[2], registers[3], selector)
                assert choice is not None
                sides.append(instructions.permute(first, second, choice))
            else:
                sides.append(instructions.permute(registers[0], registers[-1], selector))
        low, high = sides
        found += [instructions.permute(low, high, 0x5140), instructions.permute(low, high, 0x7362)]
    return found
