"""A function cut into blocks, and examples on their way through it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.errors import JaxqError
from jaxq.stages import Program, Stage, stages

#: What reaches a block: the carry of each batch.
Carries = list[Any]


def cut(
    fn: Callable[..., Any], params: Any, examples: tuple[Any, ...], batch: int, whole: bool = False
) -> list[Stage]:
    """The stages of the function for `batch` examples at a time; `whole`: only one."""
    shapes = (jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in examples)
    return stages(fn, params, *shapes, cut="" if whole else "block")


def start(examples: tuple[Any, ...], batch: int, count: int | None = None) -> Carries:
    """The carries of the first stage: the first `count` examples, `batch` at a time."""
    count = len(examples[0]) if count is None else count
    if count % batch or count > len(examples[0]):
        raise JaxqError(f"{len(examples[0])} calibration examples do not give {count} in batches of {batch}")
    return [tuple(x[i : i + batch] for x in examples) for i in range(0, count, batch)]


def together(batches: Sequence[Any]) -> tuple[Any, ...]:
    """All arguments of a list of batches, examples along axis 0."""
    given = [b if isinstance(b, tuple) else (b,) for b in batches]
    return tuple(np.concatenate([np.asarray(x) for x in parts]) for parts in zip(*given, strict=True))


def live(stage: Stage, carry: Any) -> list[Any]:
    """What a block takes of a carry, constants left out."""
    return stage.inputs(carry)[len(stage.consts) :]


def gathered(stage: Stage, carries: Carries) -> list[Any]:
    """What reaches a block, examples along axis 0."""
    return [jnp.concatenate(parts) for parts in zip(*(live(stage, c) for c in carries), strict=True)]


def outputs(stage: Stage, leaves: Any, carries: Carries) -> list[list[Any]]:
    """What a block gives for each batch."""
    return [stage.program.call(leaves, stage.inputs(carry)) for carry in carries]


def advanced(stage: Stage, carries: Carries, found: Sequence[Any]) -> Carries:
    """The carries after a block gave these outputs."""
    return [stage.advance(carry, out) for carry, out in zip(carries, found, strict=True)]


def joined(found: Sequence[Sequence[Any]]) -> list[Any]:
    """Outputs of a block, examples along axis 0."""
    return [jnp.concatenate(parts) for parts in zip(*found, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _pull(program: Program, leaves: Any, inputs: list[Any], cotangents: list[Any]) -> list[Any]:
    return jax.vjp(lambda inputs: program.run(leaves, inputs), inputs)[1](cotangents)[0]


def cotangents(
    pieces: Sequence[Stage], leaves: Sequence[Any], carry: Any, of_output: Callable[[Any], Any]
) -> list[Any]:
    """Gradients at the door of each block, for one batch.

    Args:
        pieces: consecutive blocks, up to the last of the function; each passes on one float array.
        leaves: those of each block.
        carry: of the first of them.
        of_output: the gradient at the function's output, given that output.

    Returns one array for each block, of the shape of what it takes. A forward and a backward pass.
    """
    inputs = []
    for stage, own in zip(pieces, leaves, strict=True):
        inputs.append(stage.inputs(carry))
        found = stage.program.call(own, inputs[-1])
        carry = stage.advance(carry, found)
    pulled: list[Any] = [of_output(found[0])]
    gradients = []
    for stage, own, given in zip(reversed(pieces), reversed(leaves), reversed(inputs), strict=True):
        pulled = _pull(stage.program, own, given, pulled)[len(stage.consts) :]
        gradients.append(pulled[0])
    return gradients[::-1]


def check_chain(pieces: Sequence[Stage]) -> None:
    """JaxqError unless each block but the first takes one float array, which the one before it gives."""
    for n, stage in enumerate(pieces):
        floats = all(jnp.issubdtype(a.dtype, jnp.floating) for a in stage.program.output_avals)
        if not floats or len(stage.program.output_avals) != 1 or (n and len(stage.reads) != 1):
            raise JaxqError(
                f"block {n} of the function does not pass on one float array: this loss needs a chain of blocks"
            )
