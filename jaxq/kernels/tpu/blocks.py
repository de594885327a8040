"""How a product is cut into blocks for a TPU's kernel, and the loop that adds them up.

Pallas for TPUs is imported where a kernel is traced: it would be a tenth of the time that `import jaxq` takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.kernels.dispatch import axes_of, vary_as
from jaxq.kernels.tpu import words

#: Tokens up to which kernels run: by the peak rates of a v5e, reading a dense weight bounds up to some 240.
TOKENS = 128

#: Inputs and outputs in a block, the first that divides the size.
INPUTS = (1024, 512, 256)
OUTPUTS = (512, 256, 128)

#: Strips of outputs may go to two cores (v4, v5p); sums along the inputs may not.
SEMANTICS: Any = ("parallel", "arbitrary")


def precise(x: Float[Array, "tokens in"]) -> Float[Array, "tokens in"]:
    """Activations as the kernels multiply them: bfloat16 in one pass, anything else as float32, exactly."""
    return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def dot(x: Array, weights: Array) -> Array:
    """`x @ weights` in float32; exact products of float32 take the matrix unit several passes."""
    # Stated, since a default that stands around the call would ask for passes that bfloat16 has no use for.
    precision = jax.lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jax.lax.dot(x, weights.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)


def product(
    body: Callable[..., None],
    x: Float[Array, "tokens in"],
    blocked: Sequence[tuple[Array, int]],
    columns: Sequence[Array],
    scratch: Callable[[int, int], Sequence[tuple[int, ...]]],
) -> Float[Array, "tokens out"]:
    """Runs `body` over blocks of the weight, those of one strip of outputs in order of their inputs.

    Args:
        body: takes references to a block of `x`, of each operand, the result and the scratch; called with the
            position of its block along the inputs as `pl.program_id(1)`.
        x: `(tokens, in)` bfloat16 or float32; tokens and inputs are filled up with zeros.
        blocked: operands `(..., rows, out)` with a number of inputs in a row of them.
        columns: operands `(..., rows, out)` of which every block sees all rows of its outputs.
        scratch: from padded tokens and outputs in a block, the shapes of scratch memory, float32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    first, per_row = blocked[0]
    in_size, out_size = first.shape[-2] * per_row, first.shape[-1]
    tokens = x.shape[0]
    rows = -(-tokens // words.TILE) * words.TILE
    x = words.pad_matrix(x, rows, in_size)
    deep = next(size for size in INPUTS if in_size % size == 0)
    # A shard may have fewer outputs than lanes; then a block is all of them.
    wide = next((size for size in OUTPUTS if out_size % size == 0), out_size)

    def spec(operand: Array, height: int | None) -> pl.BlockSpec:
        lead = operand.shape[:-2]
        shape = (*lead, operand.shape[-2] if height is None else height, wide)
        return pl.BlockSpec(shape, lambda n, k: (*[0] * len(lead), 0 if height is None else k, n))

    operands = [x, *(operand for operand, _ in blocked), *columns]
    # In a shard_map all must vary over the same axes, and the result over them too.
    operands = [vary_as(operand, *operands) for operand in operands]
    out = jax.ShapeDtypeStruct((rows, out_size), jnp.float32, manual_axis_type=axes_of(operands[0]))
    call = pl.pallas_call(
        body,
        grid=(out_size // wide, in_size // deep),
        in_specs=[
            pl.BlockSpec((rows, deep), lambda n, k: (0, k)),
            *(spec(operand, deep // per) for operand, per in blocked),
            *(spec(operand, None) for operand in columns),
        ],
        out_specs=pl.BlockSpec((rows, wide), lambda n, k: (0, n)),
        out_shape=out,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch(rows, wide)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS),
        name="jaxq_product",
    )
    return call(*operands)[:tokens]


def chunk(group: int, deep: int, most: int) -> int:
    """Inputs that one product of a kernel takes: as many as end with each group and each block, at most `most`."""
    size = math.gcd(group, deep)
    return size if size <= most else math.gcd(most, size)
