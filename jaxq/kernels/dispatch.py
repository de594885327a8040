"""What the products of all formats share: the choice of an implementation, and derivatives.

An implementation is a function `(x, array) -> x @ array`. The reference is the one that others must agree with,
the one whose derivatives they have, and the one that runs where no other does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

Implementation = Callable[[Any, Any], Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(
    implementation: Implementation, reference: Implementation, x: Float[Array, "*tokens in"], array: Any
) -> Float[Array, "*tokens out"]:
    """`implementation(x, array)`, with the derivatives of `reference` in reverse mode.

    The derivatives with respect to `x` and to every continuous member of `array` make the weight dense while they
    are computed, but nothing dense waits between the passes.
    """
    return implementation(x, array)


def _forward(implementation: Implementation, reference: Implementation, x: Array, array: Any) -> tuple[Any, Any]:
    return implementation(x, array), (x, array)


def _backward(implementation: Implementation, reference: Implementation, saved: Any, cotangent: Array) -> Any:
    x, array = saved
    return jax.vjp(reference, x, array)[1](cotangent)


product.defvjp(_forward, _backward)


def on_cpu(
    implementation: Implementation, reference: Implementation, x: Float[Array, "*tokens in"], array: Any
) -> Float[Array, "*tokens out"]:
    """`implementation` where the program is lowered for CPUs, `reference` elsewhere, in one program."""

    def choose(x: Any, array: Any) -> Any:
        return jax.lax.platform_dependent(x, array, cpu=implementation, default=reference)

    return product(choose, reference, x, array)


def is_whole(*arrays: Array) -> bool:
    """Whether no axis of any array lies on an explicit mesh axis, where slices would have to say where they go."""
    return all(entry is None for array in arrays for entry in jax.typeof(array).sharding.spec)
