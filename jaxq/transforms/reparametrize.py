"""From one activation grid a channel to one a tensor, without a change of the function.

RepQ-ViT (Li et al. 2023, section 3.2): what differs between the channels' grids moves into the LayerNorm before
the quantizer and the linear layer behind it. A channel's x becomes x' = (x + s (z - z~)) / r with r = s / s~, so
that x' / s~ + z~ = x / s + z: the codes are the same.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.errors import JaxqError
from jaxq.formats.activations import SCALE_FLOOR, AffineQuantizer


class Reparametrized(NamedTuple):
    """What `reparametrize` replaces its arguments by; the quantizer is per tensor."""

    norm_scale: Float[Array, " in"]
    norm_bias: Float[Array, " in"]
    kernel: Float[Array, "in *out"]
    bias: Float[Array, "*out"]
    quantizer: AffineQuantizer


class Change(NamedTuple):
    """The activation becomes x' = (x + `shift`) / `ratio`, channel by channel."""

    ratio: Float[Array, " in"]
    shift: Float[Array, " in"]


def reparametrize(
    norm_scale: Float[Array, " in"],
    norm_bias: Float[Array, " in"],
    kernel: Float[Array, "in *out"],
    bias: Float[Array, "*out"] | None,
    quantizer: AffineQuantizer,
    *,
    fractional: bool = False,
) -> Reparametrized:
    """A LayerNorm, the linear layer behind it and the quantizer between them, with one grid for the tensor.

    The float function stays; so does the quantized one if the zero point is a whole number. Norms that feed
    several linears (separate q, k and v) need `to_tensor` once, `fold_norm` once and `fold_linear` for each.

    Args:
        norm_scale: gamma of the norm.
        norm_bias: beta of the norm.
        kernel: `(in, out...)`.
        bias: `(out...)`; None counts as zeros.
        quantizer: scale and zero point `(in,)`, or per tensor, which changes nothing.
        fractional: the mean zero point is not rounded, as in the I&S-ViT code. Then the grid has 2^bits + 1
            values, and the quantized function changes.

    Returns new arrays of the same shapes and dtypes, and the quantizer. The bias is always an array.
    """
    if kernel.ndim < 2 or kernel.shape[0] != norm_scale.shape[-1]:
        raise JaxqError(f"a kernel of shape {tuple(kernel.shape)} does not follow a norm of width "
                        f"{norm_scale.shape[-1]}; give it as (in, out)")  # fmt: skip
    tensor, change = to_tensor(quantizer, norm_scale.shape[-1], fractional=fractional)
    return Reparametrized(*fold_norm(norm_scale, norm_bias, change), *fold_linear(kernel, bias, change), tensor)


def to_tensor(
    quantizer: AffineQuantizer, width: int, *, fractional: bool = False
) -> tuple[AffineQuantizer, Change]:
    """The per-tensor quantizer of mean scale and mean zero point, and the change that keeps the codes."""
    if jnp.shape(quantizer.scale) not in ((), (1,), (width,)):
        raise JaxqError(f"a grid of shape {jnp.shape(quantizer.scale)} is not one for each of {width} channels")
    scale = jnp.broadcast_to(jnp.maximum(quantizer.scale, SCALE_FLOOR), (width,)).astype(jnp.float32)
    zero = jnp.broadcast_to(quantizer.zero, (width,)).astype(jnp.float32)
    zero = zero if quantizer.fractional else jnp.round(zero)
    mean_scale, mean_zero = _mean(scale), _mean(zero)
    if not fractional:
        mean_zero = jnp.round(mean_zero)
    change = Change(scale / mean_scale, scale * (zero - mean_zero))
    return dataclasses.replace(quantizer, scale=mean_scale, zero=mean_zero, fractional=fractional), change


def fold_norm(
    scale: Float[Array, " in"], bias: Float[Array, " in"], change: Change
) -> tuple[Float[Array, " in"], Float[Array, " in"]]:
    """Scale and bias of the norm that gives the changed activation."""
    new_scale = scale.astype(jnp.float32) / change.ratio
    new_bias = (bias.astype(jnp.float32) + change.shift) / change.ratio
    return new_scale.astype(scale.dtype), new_bias.astype(bias.dtype)


def fold_linear(
    kernel: Float[Array, "in *out"], bias: Float[Array, "*out"] | None, change: Change
) -> tuple[Float[Array, "in *out"], Float[Array, "*out"]]:
    """Kernel and bias of the linear layer that takes the changed activation."""
    exact = kernel.astype(jnp.float32)
    ratio = change.ratio.reshape((-1, *[1] * (kernel.ndim - 1)))
    offset = jnp.tensordot(change.shift, exact, 1, precision="highest")
    new_bias = -offset if bias is None else bias.astype(jnp.float32) - offset
    dtype = kernel.dtype if bias is None else bias.dtype
    return (exact * ratio).astype(kernel.dtype), new_bias.astype(dtype)


def _mean(x: Float[Array, " in"]) -> Float[Array, ""]:
    """The mean, exactly x[0] if all are equal, so that what is per tensor already stays as it is."""
    return x[0] + jnp.mean(x - x[0])
