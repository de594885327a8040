"""What the walk over a jaxpr follows: parameters, named activations, and the records left at sites."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq import jaxprs
from jaxq.formats.base import is_quantized
from jaxq.formats.codes import Codes
from jaxq.views import View


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter on its way to a product.

    value: the stored array, dense or quantized. levels: nesting levels of the scans that sliced it.
    index: (position, length) for each leading axis that a dynamic index took, outermost first.
    """

    value: Any
    path: str
    view: View
    levels: tuple[int, ...] = ()
    index: tuple[tuple[jax.Array, int], ...] = ()

    @classmethod
    def of(cls, value: Any, path: str) -> Leaf:
        return cls(value, path, View.of(value.shape))

    def dense(self) -> jax.Array:
        return self.view.apply(self.value.dequantize() if is_quantized(self.value) else self.value)

    def with_view(self, view: View) -> Leaf:
        return dataclasses.replace(self, view=view)


@dataclasses.dataclass(frozen=True)
class Named:
    """An activation that `checkpoint_name` named, through layout operations and scalings."""

    value: Any
    path: str

    def dense(self) -> jax.Array:
        return self.value


@dataclasses.dataclass(frozen=True)
class Coded(Named):
    """A named activation that is rounded and still on its codes: `value`, of which `view` is what is meant."""

    value: Codes
    view: View

    @classmethod
    def of(cls, value: Codes, path: str) -> Coded:
        return cls(value, path, View.of(value.shape))

    def dense(self) -> jax.Array:
        return self.view.apply(self.value.dequantize())

    def with_view(self, view: View) -> Coded:
        return dataclasses.replace(self, view=view)

    def seen(self) -> Codes:
        """The codes as they are after the layout operations."""

        def moved(member: jax.Array) -> jax.Array:
            axes = (tuple(a for a in axis if member.shape[a.axis] != 1) for axis in self.view.axes)
            return View(tuple(member.shape), tuple(axes)).apply(member)

        members = {name: moved(member) for name, member in self.value.grids.items()}
        return dataclasses.replace(self.value, codes=self.view.apply(self.value.codes), **members)


@dataclasses.dataclass(frozen=True)
class Copies:
    """A value that a shard_map declared to differ over an axis only because the other operand does.

    source: the value before that; statistics of it must not count its copies.
    """

    value: Any
    source: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["stacked", "levels"])
@dataclasses.dataclass(frozen=True)
class Record:
    """A statistic's state with `stacked` leading axes; `levels` are the scans that have still to stack it."""

    state: Any
    stacked: int = 0
    levels: tuple[int, ...] = ()


Records = dict[str, Record]


# ---- layout operations on leaves: each returns the leaf's new view, or None where it has none ------------
# Those that keep a name (`KEEPS_NAME`) serve coded activations too.


def _view(change: Callable[[Any, View], View | None]) -> Callable[[Any, list[Any]], Leaf | None]:
    def rule(eqn: Any, values: list[Any]) -> Leaf | None:
        view = change(eqn, values[0].view)
        return None if view is None else values[0].with_view(view)

    return rule


def _reshape(eqn: Any, view: View) -> View | None:
    return view.reshape(eqn.params["new_sizes"]) if eqn.params["dimensions"] is None else None


def _broadcast(eqn: Any, view: View) -> View | None:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    placed = view.place(len(shape), dims)
    return placed if placed.shape == tuple(shape) else None


def _cast(eqn: Any, values: list[Any]) -> Leaf | None:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return dataclasses.replace(values[0], value=values[0].value.astype(dtype))


def _each_member(eqn: Any, values: list[Any]) -> Leaf:
    """An elementwise no-op (stop_gradient, pvary) on every array that the leaf is stored as."""
    leaf = values[0]
    return dataclasses.replace(leaf, value=jax.tree.map(lambda a: jaxprs.bind(eqn, [a])[0], leaf.value))


def _take_slice(leaf: Leaf, start: Any, shape: Sequence[int]) -> Leaf | None:
    """One layer or expert of a stack: a slice of size 1 along the leading batch axis of the leaf."""
    view = leaf.view
    inner = view.unstack()
    stack = leaf.value.batch_shape if is_quantized(leaf.value) else leaf.view.base[:-2]
    if inner is None or not stack or tuple(shape) != (1, *view.shape[1:]) or view.shape[0] == 1:
        return None
    value = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, start, 0, keepdims=False), leaf.value)
    return dataclasses.replace(
        leaf,
        value=value,
        view=dataclasses.replace(inner, axes=((), *inner.axes)),
        index=(*leaf.index, (start, view.shape[0])),
    )


def _slice(eqn: Any, values: list[Any]) -> Leaf | None:
    p = eqn.params
    if set(p["strides"] or (1,)) != {1} or any(p["start_indices"][1:]):
        return None
    sizes = [hi - lo for lo, hi in zip(p["start_indices"], p["limit_indices"], strict=True)]
    return _take_slice(values[0], p["start_indices"][0], sizes)


def _dynamic_slice(eqn: Any, values: list[Any]) -> Leaf | None:
    # Starts along axes that are taken whole are clamped to zero by the operation itself.
    return _take_slice(values[0], values[1], eqn.params["slice_sizes"])


LAYOUT: dict[str, Callable[[Any, list[Any]], Leaf | None]] = {
    "transpose": _view(lambda eqn, view: view.transpose(eqn.params["permutation"])),
    "squeeze": _view(lambda eqn, view: view.drop(eqn.params["dimensions"])),
    "reshape": _view(_reshape),
    "broadcast_in_dim": _view(_broadcast),
    # Hints and marks that change no value.
    "copy": _view(lambda eqn, view: view),
    "copy_p": _view(lambda eqn, view: view),
    "name": _view(lambda eqn, view: view),
    "sharding_constraint": _view(lambda eqn, view: view),
    "convert_element_type": _cast,
    "stop_gradient": _each_member,
    "pvary": _each_member,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}

KEEPS_NAME = frozenset(LAYOUT) - {"slice", "dynamic_slice"}
