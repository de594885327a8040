"""What the kernels of GPUs share: a weight as words of codes with a decoder, how a product is cut up, and Pallas.

Written for Pallas' Triton lowering, which the prototypes measured as fast as CUDA C++ on Hopper. It is deprecated
since jax 0.11; all that is known of it is here and in `lanes.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.kernels.dispatch import axes_of, vary_as
from jaxq.kernels.gpu.lanes import Instructions, halves
from jaxq.kernels.gpu.words import Order


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
        cache: what the first cache shall make room with: "words", or "both" if it shall also hold on to inputs as
            long as it can, or "any"; row by row only.
    """

    rows: int
    words: int
    warps: int
    unroll: int = 1
    split: int = 1
    stages: int = 1
    cache: str = "words"


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

    def load(self, place: int, index: Any, width: int) -> Array:
        """Element `index` of each output's `width` of the array at `place`."""
        return load(self.refs[place].at[self.rows * width + index])


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

    def shuffles(self, exact: bool) -> bool:
        """Whether `shuffled_sum`, which only then has to be there, is faster for one token than decoding."""
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


def load(ref: Any, inside: Array | None = None, hint: str | None = None) -> Array:
    """Reads an indexed ref, zero where not `inside`; `hint` is the first cache's, such as "evict_first"."""
    from jax.experimental.pallas import triton

    if inside is None:
        return triton.load(ref, eviction_policy=hint)
    return triton.load(ref, mask=inside, other=jnp.zeros((), ref.dtype), eviction_policy=hint)


def store(ref: Any, value: Array, inside: Array) -> None:
    from jax.experimental.pallas import triton

    triton.store(ref, value, mask=inside)


def program(axis: int) -> Any:
    from jax.experimental import pallas

    return pallas.program_id(axis)


def call(
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


def power_below(size: int) -> int:
    """The largest power of two up to `size`."""
    return 1 << (size.bit_length() - 1)
