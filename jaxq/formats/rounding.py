"""Rounding to the numbers that a dtype can store, kept in float32.

Arithmetic instead of a pair of casts, because XLA may drop such a pair (`xla_allow_excess_precision`) and what
is fitted afterwards must belong to the stored numbers; `lax.reduce_precision` would flush the subnormals of
float16.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def round_to(values: Float[Array, "*shape"], dtype: str) -> Float[Array, "*shape"]:
    """The nearest numbers of `dtype` ("float16", "bfloat16" or "float32"), ties to even, as float32.

    Values beyond the range become infinite. Numbers below the smallest normal float32 may become 0, as
    everywhere in XLA.
    """
    values = values.astype(jnp.float32)
    if dtype == "float32":
        return values
    power, steps = spacing(values, dtype)
    rounded = jnp.round(values / power * steps) / steps * power
    rounded = jnp.where(jnp.abs(rounded) > float(jnp.finfo(dtype).max), jnp.sign(values) * jnp.inf, rounded)
    return jnp.where(jnp.isfinite(values), rounded, values)


def spacing(values: Float[Array, "*shape"], dtype: str) -> tuple[Float[Array, "*shape"], float]:
    """(power of two at or below each |value|, steps in which numbers of `dtype` divide it); of finite float32."""
    info = jnp.finfo(dtype)
    exponent = jax.lax.bitcast_convert_type(values, jnp.uint32) & jnp.uint32(0x7F800000)
    power = jax.lax.bitcast_convert_type(exponent, jnp.float32)
    # Below the smallest exponent the distance between numbers no longer shrinks.
    return jnp.maximum(power, jnp.float32(2.0**info.minexp)), 2.0**info.nmant
