"""How a parameter looks after layout operations: which axis of the leaf each axis of the view came from.

A model seldom multiplies by a leaf as it is stored: it casts it, transposes it, splits heads off it. A
`View` follows those operations symbolically, so that the interpreter can say at a product which axes of the
*stored* leaf are contracted and which are kept, and can hand the product to a quantized array that knows only
its own layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Atom(NamedTuple):
    """A factor of one stored axis: index // inner % size. The whole axis has inner 1 and its full size."""

    axis: int
    inner: int
    size: int


Axis = tuple[Atom, ...]


def _merge(atoms: Sequence[Atom]) -> Axis:
    """Joins neighbours that are adjacent factors of one stored axis."""
    out: list[Atom] = []
    for atom in atoms:
        if out and out[-1].axis == atom.axis and out[-1].inner == atom.inner * atom.size:
            atom = Atom(atom.axis, atom.inner, out.pop().size * atom.size)
        out.append(atom)
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class View:
    """Static description of a view of a stored array.

    base: shape of the stored (logical) array.
    axes: for each axis of the view, the atoms it is made of, slowest first. Axes of size 1 have none.
    """

    base: tuple[int, ...]
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> View:
        """The identity view of an array of this shape."""
        return cls(tuple(shape), tuple((Atom(i, 1, n),) if n != 1 else () for i, n in enumerate(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(a.size for a in axis) for axis in self.axes)

    @property
    def is_identity(self) -> bool:
        return self == View.of(self.base)

    def transpose(self, perm: Sequence[int]) -> View:
        return dataclasses.replace(self, axes=tuple(self.axes[p] for p in perm))

    def drop(self, dims: Sequence[int]) -> View:
        """Without these axes of size 1."""
        return dataclasses.replace(self, axes=tuple(a for i, a in enumerate(self.axes) if i not in dims))

    def place(self, ndim: int, dims: Sequence[int]) -> View:
        """Axis i becomes axis dims[i] of an array with `ndim` axes; the others have size 1."""
        axes: list[Axis] = [()] * ndim
        for axis, dim in zip(self.axes, dims, strict=True):
            axes[dim] = axis
        return dataclasses.replace(self, axes=tuple(axes))

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The reshaped view, or None where an axis would mix parts that cannot be told apart."""
        atoms = [a for axis in self.axes for a in axis]
        axes: list[Axis] = []
        for size in shape:
            got: list[Atom] = []
            need = size
            while need > 1:
                if not atoms:
                    return None
                atom = atoms.pop(0)
                if need % atom.size == 0:
                    need //= atom.size
                elif atom.size % need == 0:
                    rest = atom.size // need
                    atoms.insert(0, Atom(atom.axis, atom.inner, rest))
                    atom, need = Atom(atom.axis, atom.inner * rest, need), 1
                else:
                    return None
                got.append(atom)
            axes.append(_merge(got))
        return None if atoms else dataclasses.replace(self, axes=tuple(axes))

    def unstack(self) -> View | None:
        """The view of one slice along the leading stored axis, where that leads the view too."""
        lead = (Atom(0, 1, self.base[0]),) if self.base[0] != 1 else ()
        if not self.axes or self.axes[0] != lead or any(a.axis == 0 for axis in self.axes[1:] for a in axis):
            return None
        axes = tuple(tuple(a._replace(axis=a.axis - 1) for a in axis) for axis in self.axes[1:])
        return View(self.base[1:], axes)

    def whole(self, dims: Sequence[int]) -> tuple[int, ...] | None:
        """The stored axes that these axes of the view are made of; None where one is there only in part.

        Stored axes of size 1 belong to no axis of the view and are left out.
        """
        sizes: dict[int, int] = {}
        for atom in (a for d in dims for a in self.axes[d]):
            sizes[atom.axis] = sizes.get(atom.axis, 1) * atom.size
        return tuple(sizes) if all(self.base[axis] == n for axis, n in sizes.items()) else None

    def apply(self, array: jax.Array) -> jax.Array:
        """The view of a dense stored array, as an array."""
        if self.is_identity:
            return array
        factors: list[Atom] = sorted((a for axis in self.axes for a in axis), key=lambda a: (a.axis, -a.inner))
        order = {atom: i for i, atom in enumerate(factors)}
        split = jnp.reshape(array, [a.size for a in factors])
        moved = jnp.transpose(split, [order[a] for axis in self.axes for a in axis])
        return jnp.reshape(moved, self.shape)
