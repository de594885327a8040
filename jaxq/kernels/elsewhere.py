"""Kernels of one platform in programs for several.

A program for several platforms holds every branch of `jax.lax.platform_dependent`, and JAX lowers each of them for
all platforms, which Pallas refuses. Here a function is lowered for its own platform only; for others, where its
branch is never taken, zeros stand in for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jaxtyping import Array


def only_on(platform: str, f: Callable[..., Array]) -> Callable[..., Array]:
    """`f`, of pytrees of arrays, for that branch of a `jax.lax.platform_dependent` and nowhere else."""
    kernel = _PRIMITIVES[platform]

    @functools.wraps(f)
    def bound(*args: Any) -> Array:
        flat, tree = jax.tree.flatten(args)
        jaxpr = jax.make_jaxpr(lambda *flat: f(*jax.tree.unflatten(tree, flat)))(*flat)
        return kernel.bind(*flat, jaxpr=jaxpr)

    return bound


def _primitive(platform: str) -> Primitive:
    kernel = Primitive(f"jaxq_{platform}")
    kernel.def_abstract_eval(lambda *_, jaxpr: jaxpr.out_avals[0])

    def batch(args: Any, axes: Any, *, jaxpr: Any) -> tuple[Array, int]:
        f = jax.vmap(lambda *args: jaxpr_as_fun(jaxpr)(*args)[0], tuple(axes))
        return kernel.bind(*args, jaxpr=jax.make_jaxpr(f)(*args)), 0

    batching.primitive_batchers[kernel] = batch
    mlir.register_lowering(kernel, mlir.lower_fun(_lowered, multiple_results=False), platform=platform)
    mlir.register_lowering(kernel, mlir.lower_fun(_never_run, multiple_results=False))
    return kernel


def _lowered(*args: Array, jaxpr: Any) -> Array:
    return jaxpr_as_fun(jaxpr)(*args)[0]


def _never_run(*_: Array, jaxpr: Any) -> Array:
    (result,) = jaxpr.out_avals
    return jnp.zeros(result.shape, result.dtype)


_PRIMITIVES = {platform: _primitive(platform) for platform in ("cuda", "tpu")}
