"""Round to nearest: the base line of every table."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxq.formats.base import Layout
from jaxq.formats.groups import join_groups, split_groups
from jaxq.formats.uniform import Uniform, UniformArray, assemble, quantize_codes
from jaxq.solvers.common import RANGES, all_finite, canonical, check_weights


def rtn(w: Any, format: Uniform, *, range: str = "minmax", layout: Layout | None = None) -> UniformArray:
    """Each weight goes to the nearest point of its group's grid.

    Args:
        w: `(in, out)` or `(batch..., in, out)`, any float dtype; of logical shape if `layout` is given.
        format: the grid.
        range: how the grid is fitted: "minmax", or "mse", which shrinks it for the least squared error.
        layout: how the logical leaf maps to the canonical matrix.

    Returns a UniformArray of the logical shape and dtype of `w`. Raises JaxqError for weights that are not
    finite or a group larger than the width. Cost: one pass (min-max) or eighty (mse) over the weight.
    """
    matrix = canonical(w, format, layout, range)
    array, finite, representable = _solve(matrix, format, range, layout or Layout())
    check_weights(finite, representable, format)
    return array


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _solve(w: Array, format: Uniform, range: str, layout: Layout) -> tuple[UniformArray, Array, Array]:
    in_size = w.shape[-2]
    if format.group_size == "tensor":
        groups = w.astype(jnp.float32)
        scale, zero = RANGES[range](groups, format)
        codes = quantize_codes(groups, scale, zero, format)
    else:
        groups = split_groups(w.astype(jnp.float32), format.rows_per_group(in_size))
        scale, zero = RANGES[range](groups, format)
        codes = join_groups(quantize_codes(groups, scale, zero, format), in_size)
        scale, zero = scale[..., 0, :], zero[..., 0, :]
    array = assemble(codes, scale, zero, format, layout, w.dtype)
    return array, all_finite(w), all_finite(array.scale)
