"""Learned rounding: whether a weight goes up or down is trained (AdaRound, Nagel et al. 2020, arXiv 2004.10568).

Constants and schedule are those of the code of QDrop, BRECQ and APHQ-ViT.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt8

from jaxq.formats.base import Layout
from jaxq.formats.groups import join_groups, split_groups
from jaxq.formats.uniform import Uniform, UniformArray, assemble

#: The gate is a sigmoid stretched to (LOW, HIGH) and clamped to [0, 1], so that 0 and 1 are reached.
LOW, HIGH = -0.1, 1.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AdaRound:
    """A weight on its way to codes: (clamp(floor + h(alpha) + zero, 0, 2^bits - 1) - zero) * scale.

    Only `alpha` is trained. `floor` is floor(w / scale) in float32; scale and zero `(groups, 1, out)` are those
    that will be stored.
    """

    alpha: Float[Array, "in out"]
    floor: Float[Array, "in out"]
    scale: Float[Array, "groups 1 out"]
    zero: Float[Array, "groups 1 out"]
    format: Uniform = dataclasses.field(metadata={"static": True})


def start(
    w: Float[Array, "in out"],
    scale: Float[Array, "groups 1 out"],
    zero: Float[Array, "groups 1 out"],
    format: Uniform,
) -> AdaRound:
    """The gate stands where the weight does: `soft` gives w, clamped to the grid's range.

    Args:
        w: any float dtype.
        scale, zero: of the grid, as `jaxq.formats.uniform.fit_mse` gives them.
        format: the grid; a group is `format.rows_per_group(in)` inputs.
    """
    position = _grouped(w, format) / scale
    floor = jnp.floor(position)
    rest = join_groups(position - floor, w.shape[0])
    alpha = -jnp.log((HIGH - LOW) / (rest - LOW) - 1.0)
    return AdaRound(alpha, join_groups(floor, w.shape[0]), scale, zero, format)


def gate(alpha: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """h(alpha) in [0, 1]; the derivative passes where the clamp does nothing, bounds included."""
    raw = (HIGH - LOW) * jax.nn.sigmoid(alpha) + LOW
    return jnp.where(raw < 0, 0.0, jnp.where(raw > 1, 1.0, raw))


def soft(a: AdaRound) -> Float[Array, "in out"]:
    """The weight that training sees, float32."""
    return _values(a, gate(a.alpha))


def hard(a: AdaRound) -> Float[Array, "in out"]:
    """The weight that will be stored: up where the gate is at least half open."""
    return _values(a, (a.alpha >= 0).astype(jnp.float32))


def codes(a: AdaRound) -> UInt8[Array, "in out"]:
    return join_groups(_codes(a, (a.alpha >= 0).astype(jnp.float32)), a.alpha.shape[0]).astype(jnp.uint8)


def store(a: AdaRound, layout: Layout | None = None, dtype: Any = jnp.float32) -> UniformArray:
    """The quantized array whose values are `hard(a)`, with the scale in `format.scale_dtype`."""
    return assemble(codes(a), a.scale[:, 0], a.zero[:, 0], a.format, layout, dtype)


def regularizer(alpha: Float[Array, "*shape"], beta: Any) -> Float[Array, ""]:
    """sum(1 - |2 h - 1|^beta): 0 where every gate is shut or open, 1 for each half open."""
    return jnp.sum(1.0 - jnp.abs(2.0 * gate(alpha) - 1.0) ** beta)


def rounding_penalty(
    alphas: PyTree[Float[Array, ...]], share: Any, weight: float = 0.01, warmup: float = 0.2
) -> Float[Array, ""]:
    """weight * the sum of all regularizers at the annealed beta; nothing before `warmup`."""
    beta = annealed(share, warmup)
    total = sum((regularizer(alpha, beta) for alpha in jax.tree.leaves(alphas)), jnp.float32(0.0))
    return jnp.where(share < warmup, 0.0, weight * total)


def gates_penalty(trained: dict[str, Any], share: Any) -> Float[Array, ""]:
    """`rounding_penalty` of the group "rounding" of what `jaxq.solvers.reconstruct` trains."""
    return rounding_penalty(trained["rounding"], share)


def annealed(share: Any, warmup: float = 0.2, first: float = 20.0, last: float = 2.0) -> Float[Array, ""]:
    """beta after a share of the iterations: `first` until `warmup`, then linear down to `last`."""
    progress = jnp.clip((share - warmup) / (1.0 - warmup), 0.0, 1.0)
    return first + (last - first) * progress


def _grouped(x: Array, format: Uniform) -> Array:
    return split_groups(x.astype(jnp.float32), format.rows_per_group(x.shape[0]))


def _codes(a: AdaRound, up: Array) -> Array:
    code = _grouped(a.floor, a.format) + _grouped(up, a.format) + a.zero
    # As for activations, `jnp.clip` would halve the derivative on the first and the last code.
    return jnp.where(code < 0, 0.0, jnp.where(code > a.format.levels, float(a.format.levels), code))


def _values(a: AdaRound, up: Array) -> Array:
    return join_groups((_codes(a, up) - a.zero) * a.scale, a.alpha.shape[0])
