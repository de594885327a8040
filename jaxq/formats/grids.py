"""What an activation is rounded to, as data: the quantizer of a grid holds the numbers.

A grid is to its quantizer what a `Format` is to its quantized array: frozen, hashable, plain data in a recipe and
in a saved model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxq.errors import JaxqError
from jaxq.formats.activations import AffineQuantizer, DynamicQuantizer, check_bits
from jaxq.formats.log_activations import LogQuantizer, ShiftLogQuantizer

#: What shares a grid: all of the activation, a channel (last axis), or a head (axis -3 of (B, heads, N, D)).
SHARES = ("tensor", "channel", "head")


@dataclasses.dataclass(frozen=True)
class Grid:
    """Base of the grids. `name` is unique among them."""

    name: ClassVar[str]

    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def abstract(self, shape: Sequence[int], batch: Sequence[int] = ()) -> Any:
        """The quantizer of an activation whose trailing axes are `shape`, with ShapeDtypeStructs for numbers.

        batch: axes of a stack of quantizers, in front.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `grid_from_dict` makes an equal grid."""
        return {"name": self.name, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Affine(Grid):
    """Uniform steps with a zero point (`AffineQuantizer`), one grid for the whole tensor, a channel or a head."""

    name: ClassVar[str] = "affine"

    share: str = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share not in SHARES:
            raise JaxqError(f"a grid is shared by a {', '.join(SHARES)}, not {self.share!r}")

    def __str__(self) -> str:
        return f"{self.bits}-bit" + (f" per {self.share}" if self.share != "tensor" else "")

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of an activation of `ndim` axes that share a grid: those to search a range over."""
        kept = {"tensor": None, "channel": ndim - 1, "head": ndim - 3}[self.share]
        if kept is not None and kept < 0:
            raise JaxqError(f"an activation with {ndim} axes has none for a {self.share}")
        return tuple(axis for axis in range(ndim) if axis != kept)

    def abstract(self, shape: Sequence[int], batch: Sequence[int] = ()) -> AffineQuantizer:
        if self.share == "head" and len(shape) < 3:
            raise JaxqError(f"an activation of shape {tuple(shape)} has no heads; use share='tensor'")
        sizes = {"tensor": (), "channel": tuple(shape[-1:]), "head": (*shape[-3:-2], 1, 1)}[self.share]
        number: Any = jax.ShapeDtypeStruct((*batch, *sizes), jnp.float32)
        return AffineQuantizer(number, number, self.bits)


@dataclasses.dataclass(frozen=True)
class Dynamic(Grid):
    """A uniform grid for each token, from its own range at run time (`DynamicQuantizer`); stores no numbers."""

    name: ClassVar[str] = "dynamic"

    symmetric: bool = True

    def __str__(self) -> str:
        return f"{self.bits}-bit per token"

    def abstract(self, shape: Sequence[int], batch: Sequence[int] = ()) -> DynamicQuantizer:
        return DynamicQuantizer(self.bits, self.symmetric)


@dataclasses.dataclass(frozen=True)
class Log(Grid):
    """Powers of 2^(1 / root) below a scale (`LogQuantizer`), for activations that are not negative."""

    name: ClassVar[str] = "log"

    root: int = 1
    official: bool = False

    def __str__(self) -> str:
        root, official = "" if self.root == 1 else f" root {self.root}", " (official)" if self.official else ""
        return f"{self.bits}-bit log{root}{official}"

    def abstract(self, shape: Sequence[int], batch: Sequence[int] = ()) -> LogQuantizer:
        number: Any = jax.ShapeDtypeStruct(tuple(batch), jnp.float32)
        return LogQuantizer(number, self.bits, self.root, self.official)


@dataclasses.dataclass(frozen=True)
class ShiftLog(Grid):
    """Shifted powers of two at uniform steps of the exponent (`ShiftLogQuantizer`, SULQ of I&S-ViT)."""

    name: ClassVar[str] = "shift_log"

    official: bool = False

    def __str__(self) -> str:
        return f"{self.bits}-bit shifted log" + (" (official)" if self.official else "")

    def abstract(self, shape: Sequence[int], batch: Sequence[int] = ()) -> ShiftLogQuantizer:
        number: Any = jax.ShapeDtypeStruct(tuple(batch), jnp.float32)
        return ShiftLogQuantizer(number, number, number, self.bits, self.official)


def grid_from_dict(data: Any) -> Grid:
    """The grid that `to_dict` described; JaxqError for an unknown name or field."""
    known = {cls.name: cls for cls in Grid.__subclasses__()}
    name = data.get("name") if isinstance(data, dict) else None
    if name not in known:
        raise JaxqError(f"unknown grid {name!r}; use one of {', '.join(sorted(known))}")
    fields = {key: value for key, value in data.items() if key != "name"}
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(known[name])})
    if unknown or "bits" not in fields:
        problem = f"has no setting {', '.join(map(repr, unknown))}" if unknown else "needs bits"
        raise JaxqError(f"grid {name!r} {problem}")
    return known[name](**fields)
