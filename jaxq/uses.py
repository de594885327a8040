"""What a primitive does with a parameter leaf: matmul, convolution, look-up or grouped matmul.

A `Use` speaks of the axes of the *stored* leaf and knows how to bring the data into the canonical form
(batch..., tokens..., in) and a canonical product (batch..., tokens..., out) back to what the equation returns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.views import View

Kind = Literal["matmul", "conv", "embedding", "grouped", "product"]


@dataclasses.dataclass(frozen=True)
class Use:
    """operand: which operand of the equation is the leaf. Axes are those of the stored leaf, ascending."""

    kind: Kind
    operand: int
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]
    view: View
    eqn: Any
    note: str = ""

    def sizes(self, axes: Sequence[int]) -> list[int]:
        return [self.view.base[a] for a in axes]

    def canonical_input(self, x: jax.Array) -> jax.Array:
        """The data operand as (batch..., tokens..., in)."""
        return _CANONICAL[self.kind](self, x)

    def restore(self, y: jax.Array) -> jax.Array:
        """A product (batch..., tokens..., out) of a matmul as the equation's own output."""
        return _restore_dot(self, y)

    def canonical_output(self, y: jax.Array, tokens: Sequence[int]) -> jax.Array:
        """What the equation gives as (batch..., tokens..., out); tokens: sizes, as in the canonical input."""
        if self.kind == "conv":
            batch, feature, *places = self.eqn.params["dimension_numbers"].out_spec
            return jnp.transpose(y, [batch, *places, feature])
        sizes = (*self.sizes(self.batch_axes), *tokens, math.prod(self.sizes(self.out_axes)))
        # `restore` only moves elements, so that its transpose is its inverse.
        return jax.linear_transpose(self.restore, jax.ShapeDtypeStruct(sizes, y.dtype))(y)[0]


def find(eqn: Any, views: Sequence[View | None]) -> Use | str:
    """The use that the equation makes of one of the leaves, or why it is none."""
    rule = _RULES.get(eqn.primitive.name)
    if rule is None:
        return f"used by `{eqn.primitive.name}`, which has no quantized form"
    operand = next(i for i in reversed(range(len(views))) if views[i] is not None)
    view = views[operand]
    assert view is not None
    return rule(eqn, operand, view)


def _split_axes(view: View, inner: tuple[int, ...], outer: tuple[int, ...], batch: tuple[int, ...]):
    """(in, out, batch) axes of the stored leaf, ascending; axes of size 1, which views do not show, included."""
    groups = [list(inner), list(outer), list(batch)]
    for axis in set(range(len(view.base))) - {*inner, *outer, *batch}:
        if not inner and not groups[0]:
            groups[0].append(axis)
        elif not outer and not groups[1]:
            groups[1].append(axis)
        elif axis < min([*groups[0], *groups[1]]):
            groups[2].append(axis)
        else:
            groups[0 if axis < max(groups[0]) else 1].append(axis)
    return tuple(tuple(sorted(g)) for g in groups)


# ---- dot_general -----------------------------------------------------------------------------------------


def _dims(use: Use) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
    """(leaf contracted, leaf batch, data contracted, data batch) dimensions of a dot_general."""
    contract, batch = use.eqn.params["dimension_numbers"]
    leaf, data = use.operand, 1 - use.operand
    return contract[leaf], batch[leaf], contract[data], batch[data]


def _dot(eqn: Any, operand: int, view: View) -> Use | str:
    contract, batch = (dims[operand] for dims in eqn.params["dimension_numbers"])
    kept = [d for d in range(len(view.axes)) if d not in contract and d not in batch]
    parts = [view.whole(dims) for dims in (contract, kept, batch)]
    if any(p is None for p in parts):
        return "contracts only a part of a stored axis"
    inner, outer, batches = _split_axes(view, *parts)  # type: ignore[arg-type]
    if batches != tuple(range(len(batches))):
        return "has a batch axis that does not lead the stored array"
    return Use("matmul", operand, inner, outer, batches, view, eqn)


def _gathered(use: Use, dims: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sizes of the atoms behind view dimensions, and the permutation that puts their stored axes in order."""
    atoms = [a for d in dims for a in use.view.axes[d]]
    return [a.size for a in atoms], sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].inner))


def _canonical_dot(use: Use, x: jax.Array) -> jax.Array:
    w_contract, w_batch, contract, batch = _dims(use)
    free = [d for d in range(x.ndim) if d not in contract and d not in batch]
    tokens = [x.shape[d] for d in free]
    in_sizes, in_order = _gathered(use, w_contract)
    batch_sizes, batch_order = _gathered(use, w_batch)
    x = jnp.transpose(x, [*batch, *free, *contract])
    x = jnp.reshape(x, [*batch_sizes, math.prod(tokens), *in_sizes])
    first = len(batch_sizes) + 1
    x = jnp.transpose(x, [*batch_order, first - 1, *(first + i for i in in_order)])
    return jnp.reshape(x, [*use.sizes(use.batch_axes), *tokens, math.prod(in_sizes)])


def _restore_dot(use: Use, y: jax.Array) -> jax.Array:
    w_contract, w_batch, _, _ = _dims(use)
    kept = [d for d in range(len(use.view.axes)) if d not in w_contract and d not in w_batch]
    out_sizes, out_order = _gathered(use, kept)
    batch_sizes, batch_order = _gathered(use, w_batch)
    tokens = y.shape[len(use.batch_axes) : -1]
    y = jnp.reshape(
        y, [*(batch_sizes[i] for i in batch_order), math.prod(tokens), *(out_sizes[i] for i in out_order)]
    )
    first = len(batch_sizes) + 1
    y = jnp.transpose(y, [*np.argsort(batch_order), first - 1, *(first + i for i in np.argsort(out_order))])
    batch, outer = [use.view.shape[d] for d in w_batch], [use.view.shape[d] for d in kept]
    y = jnp.reshape(y, [*batch, *tokens, *outer])
    if use.operand == 1:
        return y
    nb, nt = len(batch), len(tokens)
    return jnp.transpose(y, [*range(nb), *range(nb + nt, y.ndim), *range(nb, nb + nt)])


# ---- convolution -----------------------------------------------------------------------------------------


def _conv(eqn: Any, operand: int, view: View) -> Use | str:
    if operand != 1:
        return "is the data of a convolution, not its kernel"
    if not view.is_identity:
        return "is a convolution kernel in another layout than it is stored in"
    out = eqn.params["dimension_numbers"].rhs_spec[0]
    inner = tuple(a for a in range(len(view.base)) if a != out)
    grouped = eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1
    return Use("conv", operand, inner, (out,), (), view, eqn, "grouped convolution" if grouped else "")


def _canonical_conv(use: Use, x: jax.Array) -> jax.Array:
    p = use.eqn.params
    numbers = p["dimension_numbers"]
    spatial = [use.view.base[a] for a in numbers.rhs_spec[2:]]
    patches = lax.conv_general_dilated_patches(
        x,
        filter_shape=spatial,
        window_strides=p["window_strides"],
        padding=p["padding"],
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
        dimension_numbers=numbers,
        precision=lax.Precision.HIGHEST,
    )
    batch, feature, *places = numbers.out_spec
    patches = jnp.transpose(patches, [batch, *places, feature])
    # Features come channel first, then the window: bring them into the order of the kernel's stored axes.
    patches = jnp.reshape(patches, [*patches.shape[:-1], use.view.base[numbers.rhs_spec[1]], *spatial])
    lead = patches.ndim - len(spatial) - 1
    order = np.argsort(numbers.rhs_spec[1:])
    patches = jnp.transpose(patches, [*range(lead), *(lead + i for i in order)])
    return jnp.reshape(patches, [*patches.shape[:lead], -1])


# ---- look-up ---------------------------------------------------------------------------------------------


def _gather(eqn: Any, operand: int, view: View) -> Use | str:
    d = eqn.params["dimension_numbers"]
    if operand != 0:
        return "is an index"
    table = (
        len(d.start_index_map) == 1
        and d.collapsed_slice_dims == d.start_index_map
        and not d.operand_batching_dims
        and all(
            n == (1 if i in d.start_index_map else view.shape[i]) for i, n in enumerate(eqn.params["slice_sizes"])
        )
    )
    out = view.whole(d.start_index_map) if table else None
    inner = view.whole([i for i in range(len(view.axes)) if i not in d.start_index_map])
    if not out or not inner:
        return "is indexed in another way than row by row"
    in_axes, out_axes, batch = _split_axes(view, inner, out, ())
    if batch:
        return "is a stack of tables"
    return Use("embedding", operand, in_axes, out_axes, (), view, eqn)


def lookup(use: Use, take: Any, indices: jax.Array) -> jax.Array:
    """The gather by `take(ids) -> (..., in)`, with the equation's own treatment of ids out of bounds."""
    p = use.eqn.params
    axis = p["dimension_numbers"].start_index_map[0]
    size = use.view.shape[axis]
    ids = indices[..., 0]
    rows = take(jnp.clip(ids, 0, size - 1))
    kept = [i for i in range(len(use.view.axes)) if i != axis]
    sizes, order = _gathered(use, kept)
    lead = ids.ndim
    rows = jnp.reshape(rows, [*ids.shape, *(sizes[i] for i in order)])
    rows = jnp.transpose(rows, [*range(lead), *(lead + int(i) for i in np.argsort(order))])
    rows = jnp.reshape(rows, [*ids.shape, *(use.view.shape[i] for i in kept)])
    if p["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = jnp.nan if p["fill_value"] is None else p["fill_value"]
        inside = ((ids >= 0) & (ids < size)).reshape([*ids.shape, *[1] * len(kept)])
        rows = jnp.where(inside, rows, jnp.asarray(fill, rows.dtype))
    offset = p["dimension_numbers"].offset_dims
    batch = [i for i in range(rows.ndim) if i not in offset]
    return jnp.transpose(rows, [int(i) for i in np.argsort([*batch, *offset])])


# ---- grouped (ragged) matmul -----------------------------------------------------------------------------


def _ragged(eqn: Any, operand: int, view: View) -> Use | str:
    d = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = d.dot_dimension_numbers
    if operand != 1 or not view.is_identity or batch or len(d.rhs_group_dimensions) != 1:
        return "is used by a ragged product of another form than (tokens, in) x (groups, in, out)"
    group = tuple(d.rhs_group_dimensions)
    inner = tuple(contract)
    outer = tuple(a for a in range(len(view.base)) if a not in {*group, *inner})
    if group != (0,):
        return "has a batch axis that does not lead the stored array"
    return Use("grouped", operand, inner, outer, group, view, eqn)


_RULES = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "ragged_dot_general": _ragged,
    "ragged_dot": _ragged,
}
_CANONICAL = {"matmul": _canonical_dot, "conv": _canonical_conv}
