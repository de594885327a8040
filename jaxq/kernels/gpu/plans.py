"""How the tensor cores of Hopper cut products of several tokens up: the sizes of what `warpgroups.py` does."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jaxq.kernels.gpu.fragments import ROWS
from jaxq.kernels.gpu.weights import Weight

#: Inputs that one `wgmma` takes from a row of 128 bytes of shared memory.
CHUNK = 64

#: Inputs of weights that are multiplied together.
DEPTH = 128

#: Words of a row of 128 bytes.
LINE = 32

#: Tokens of a tile are a multiple of this: the columns of `wgmma`.
LEAST_TOKENS = 8

#: Bytes of shared memory for all that is copied, and pieces of inputs that are copied ahead at most.
SHARED, MOST_PIECES = 232448 - 2048, 8

#: Processors of an H100, and programs that share inputs at most where nobody asks for more.
PROCESSORS, MOST_SPLIT = 132, 4

#: Registers of a thread that copies.
COPY_REGISTERS = 24


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a product is cut up; results do not depend on it but for the order of sums.

    Args:
        rows: outputs of a program, 64 for each warpgroup.
        tokens: tokens of a program at most, a multiple of 8 up to 256.
        share: warpgroups that share the inputs of an output.
        split: programs that share them, and give their sums to each other.
        cluster: neighbouring programs that copy inputs for each other.
        stages: steps whose words are copied ahead, at most: fewer where shared memory ends.
    """

    rows: int = 64
    tokens: int = 256
    share: int = 4
    split: int = 1
    cluster: int = 1
    stages: int = 3


def default(tokens: int, bits: int, in_size: int, out_size: int) -> Settings:
    """For what nobody searched: about a program for each processor of an H100."""
    tiles = -(-out_size // ROWS)
    if tokens <= CHUNK:
        if tiles >= 3 * PROCESSORS:
            return Settings(2 * ROWS, CHUNK, 2, 1, 1, 2)
        split = min(max(PROCESSORS // tiles, 1), MOST_SPLIT)
        share = 4 if bits == 4 and tokens <= 32 and split == 1 else 2
        return Settings(ROWS, CHUNK, share, split, 1, 2 if share == 4 else 4)
    small = tiles * -(-tokens // DEPTH)
    # Small tiles decode a weight for each of them, but need fewer programs to share inputs.
    if small <= PROCESSORS and (tokens <= DEPTH or in_size < 8192):
        return Settings(ROWS, DEPTH, 2, min(PROCESSORS // small, MOST_SPLIT), 1, 3)
    split = min(max(PROCESSORS // (-(-tiles // 2) * -(-tokens // 256)), 1), MOST_SPLIT)
    return Settings(2 * ROWS, 256, 1, split, 1 if split > 1 else 2, 3)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a product that is cut up.

    A program has `down * share` warpgroups that compute. A step of one of them is `words` of each of its outputs,
    `blocks` blocks of `inputs` inputs in all. Those come in `pieces` of `piece` inputs, which share a ring of
    `ring` places; words have one of `stages`. Of `split` programs that share the inputs of outputs each adds the
    sums of `owned` tokens, or the first one those of all.
    """

    tokens: int
    out_size: int
    width: int
    owned: int
    down: int
    share: int
    split: int
    cluster: int
    words: int
    blocks: int
    inputs: int
    piece: int
    steps: int
    stages: int
    ring: int
    dtype: Any

    @property
    def groups(self) -> int:
        return self.down * self.share

    @property
    def pieces(self) -> int:
        return self.inputs // self.piece

    @property
    def owners(self) -> int:
        """Programs that add sums, of those that share inputs."""
        return self.width // self.owned

    @property
    def registers(self) -> int:
        """Registers of a thread that computes.

        A program starts with the same number for all, a multiple of eight; one that asks for more than others give
        back waits for ever.
        """
        at_start = min(2**16 // (128 * (self.groups + 1)) // 8 * 8, 248)
        return min((at_start * (self.groups + 1) - COPY_REGISTERS) // self.groups // 8 * 8, 248)


def plan_for(tokens: int, weight: Weight, settings: Settings, dtype: Any) -> Plan:
    """Raises ValueError if shared memory is too small."""
    order, (out_size, row_words) = weight.decoder.order, weight.words.shape
    down, share = settings.rows // ROWS, settings.share
    # All tiles have about as many tokens, so many as `wgmma` and copies of results take.
    width = -(-tokens // -(-tokens // settings.tokens))
    unit = LEAST_TOKENS if width <= CHUNK else CHUNK
    width = -(-width // unit) * unit
    words = math.lcm(order.block_words, LINE)
    blocks = words // order.block_words
    inputs = blocks * order.block_inputs
    # The smaller the more tokens there are, so that as many pieces as fit are on their way.
    piece = min(inputs, 256 if width <= 32 else CHUNK)
    steps = -(-row_words // (words * share * settings.split))
    owned = width // settings.split if width % (LEAST_TOKENS * settings.split) == 0 else width
    for stages in range(min(settings.stages, steps), 0, -1):
        left = SHARED - ROWS * down * words * share * 4 * stages
        ring = min(left // (share * width * piece * 2), steps * (inputs // piece), MOST_PIECES)
        # Sums of warpgroups and results go where inputs were.
        if ring >= min(2, steps) and ROWS * down * width * 4 * share <= left:
            break
    else:
        raise ValueError(f"{settings} need more shared memory than there is")
    return Plan(
        tokens=tokens,
        out_size=out_size,
        width=width,
        owned=owned,
        down=down,
        share=share,
        split=settings.split,
        # Programs of a cluster copy whole tiles of eight tokens for each other.
        cluster=settings.cluster if width % (8 * settings.cluster) == 0 else 1,
        words=words,
        blocks=blocks,
        inputs=inputs,
        piece=piece,
        steps=steps,
        stages=stages,
        ring=ring,
        dtype=jnp.dtype(dtype),
    )
