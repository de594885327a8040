"""What the products of all formats share: the choice of an implementation, and derivatives.

An implementation is a function `(x, array) -> x @ array`. The reference is the one that others must agree with,
the one whose derivatives they have, and the one that runs where no other does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

Implementation = Callable[[Any, Any], Any]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def product(
    implementation: Implementation, reference: Implementation, x: Float[Array, "*tokens in"], array: Any
) -> Float[Array, "*tokens out"]:
    """`implementation(x, array)`, with the derivatives of `reference`, forwards, backwards and of any order.

    The derivatives with respect to `x` and to every continuous member of `array` make the weight dense while they
    are computed, but nothing dense waits between the passes.
    """
    return implementation(x, array)


# Zeros by name: without them a derivative by `x` alone would multiply by a dense weight of zeros.
@functools.partial(product.defjvp, symbolic_zeros=True)
def _derivative(implementation: Implementation, reference: Implementation, primals: Any, tangents: Any) -> Any:
    leaves, tree = jax.tree.flatten(primals)
    changes = jax.tree.leaves(tangents)
    moving = [
        place
        for place, change in enumerate(changes)
        if not isinstance(change, SymbolicZero) and change.dtype != jax.dtypes.float0
    ]

    # The backward pass decodes the weight again: kept for it, a model's weights would all be dense at once.
    @jax.checkpoint
    def along(leaves: list[Array], changes: list[Array]) -> Array:
        def of(*some: Array) -> Array:
            moved = dict(zip(moving, some, strict=True))
            every = [moved.get(place, leaf) for place, leaf in enumerate(leaves)]
            return reference(*jax.tree.unflatten(tree, every))

        return jax.jvp(of, tuple(leaves[place] for place in moving), tuple(changes))[1]

    y = product(implementation, reference, *primals)
    return y, along(leaves, [changes[place] for place in moving]) if moving else jnp.zeros_like(y)


def on(
    platform: str,
    implementation: Implementation,
    reference: Implementation,
    x: Float[Array, "*tokens in"],
    array: Any,
) -> Float[Array, "*tokens out"]:
    """`implementation` where the program is lowered for `platform`, `reference` elsewhere, in one program."""
    # A derivative is traced later, when a precision that stands around the product is no longer in force.
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

    def precise(x: Any, array: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return reference(x, array)

    def choose(x: Any, array: Any) -> Any:
        return jax.lax.platform_dependent(x, array, default=precise, **{platform: implementation})

    return product(choose, precise, x, array)


on_cpu = functools.partial(on, "cpu")


def axes_of(x: Array) -> Any:
    """How `x` varies over the manual axes of a `jax.shard_map`; None where JAX does not say."""
    return getattr(jax.typeof(x), "manual_axis_type", None)


def vary_as(y: Array, *operands: Array) -> Array:
    """`y`, said to vary over every manual axis of a `jax.shard_map` that an operand varies over."""
    every = {axis for kind in map(axes_of, operands) if kind is not None for axis in kind.varying}
    kind = axes_of(y)
    missing = sorted(every - set(kind.varying if kind is not None else ()))
    return jax.lax.pcast(y, tuple(missing), to="varying") if missing else y


def fits(x: Array, array: Any) -> bool:
    """Whether an implementation may take these: numbers of at most 32 bits, one matrix, not on explicit mesh axes.

    Slices along an explicit mesh axis would have to say where they go; under batch axes `jax.vmap` gives single
    matrices.
    """
    members = [x, *jax.tree.leaves(array)]
    numbers = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 4
    whole = all(entry is None for member in members for entry in jax.typeof(member).sharding.spec)
    return numbers and whole and not array.batch_shape
