"""What every solver does before and after its own work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxq.errors import JaxqError
from jaxq.formats.base import Layout
from jaxq.formats.uniform import Uniform, fit_minmax, fit_mse

RANGES = {"minmax": fit_minmax, "mse": fit_mse}


def canonical(w: Any, format: Uniform, layout: Layout | None, range: str) -> Float[Array, "*batch in out"]:
    """The weight as canonical matrices, after checks of shape, dtype, group size and range search name."""
    if range not in RANGES:
        raise JaxqError(f"unknown range search {range!r}; use one of {', '.join(map(repr, RANGES))}")
    w = matrices(w, layout)
    format.rows_per_group(w.shape[-2])
    return w


def matrices(w: Any, layout: Layout | None) -> Float[Array, "*batch in out"]:
    """The weight as canonical matrices, after checks of shape and dtype."""
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise JaxqError(f"weights must be floating point, not {w.dtype.name}")
    if w.ndim < (layout.core_ndim if layout else 2):
        raise JaxqError(f"a weight of shape {w.shape} is no matrix; give it as (in, out), or give its layout")
    w = layout.to_canonical(w) if layout else w
    if 0 in w.shape:
        raise JaxqError(f"a weight of shape {w.shape} is empty; leave it out of the recipe")
    return w


def check(flag: Bool[Array, "*batch"], message: str) -> None:
    """JaxqError if any lane of `flag` is false. Under a transformation the value is unknown: no check."""
    if not isinstance(flag, Tracer) and not bool(flag.all()):
        raise JaxqError(message)


def check_weights(finite: Bool[Array, "*batch"], representable: Bool[Array, "*batch"], format: Uniform) -> None:
    """JaxqError for NaN or infinite weights, or scales that `scale_dtype` cannot hold."""
    check(finite, "the weights hold NaN or infinite values; repair the checkpoint or leave this weight dense")
    check(representable, f"a scale does not fit {format.scale_dtype}; use scale_dtype='bfloat16'")


def all_finite(x: Array) -> Bool[Array, "*batch"]:
    """Whether each matrix `(batch..., rows, columns)` is finite."""
    return jnp.isfinite(x).all(axis=(-2, -1))


class Jitted:
    """`jax.jit` with compiler options of GPUs, as `on_gpu`; `plain` is without.

    Inside another transformation options are the caller's, and none are given. No keyword arguments.
    """

    def __init__(self, function: Callable[..., Any], static: tuple[int, ...], options: dict[str, Any]):
        self.static = static
        self.plain = jax.jit(function, static_argnums=static)
        self.on_gpu = jax.jit(function, static_argnums=static, compiler_options=options)

    def __call__(self, *args: Any) -> Any:
        free = [arg for n, arg in enumerate(args) if n not in self.static]
        traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(free))
        return (self.on_gpu if not traced and jax.default_backend() == "gpu" else self.plain)(*args)
