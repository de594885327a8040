"""What a recipe says of activations: which are rounded, to what grid, and how its range is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from jaxq.errors import JaxqError
from jaxq.formats.grids import Affine, Dynamic, Grid, Log, ShiftLog, grid_from_dict
from jaxq.solvers import ranges

#: {name of a search: search(x, grid) -> quantizer}, for affine grids.
SEARCHES: dict[str, Callable[[Array, Affine], Any]] = {
    "minmax": lambda x, grid: ranges.minmax(x, grid.bits, grid.axes(x.ndim)),
    "percentile": lambda x, grid: ranges.percentile(x, grid.bits, grid.axes(x.ndim)),
    "mse": lambda x, grid: ranges.mse_grid(x, grid.bits, grid.axes(x.ndim)),
    # Of the sample alone, where nothing is known of the product: see `jaxq.blockwise.search`.
    "output": lambda x, grid: ranges.mse_grid(x, grid.bits, grid.axes(x.ndim)),
}


@dataclasses.dataclass(frozen=True)
class ActivationRule:
    """What to do with the activations whose path matches a pattern.

    The path is that of a weight, whose input is meant, or the name of an activation (`jaxq.activations`).

    grid: what they are rounded to; None leaves them alone. search: how an affine grid's range is found, "minmax",
    "percentile", "mse", or "output", the error of the product, which only recipes with a step `calibrate` know (by
    `jaxq.calibrate`, and for a grid a channel, it is "mse"); other grids have one search each.
    """

    pattern: str
    grid: Grid | None = None
    search: str = "percentile"

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise JaxqError(f"rule {self.pattern!r}: unknown search {self.search!r}; use {', '.join(SEARCHES)}")

    def quantizer(self, x: Float[Array, "*shape"]) -> Any:
        """The quantizer of this sample. JaxqError for a sample that the grid cannot serve."""
        grid = self.grid
        if isinstance(grid, Affine):
            return SEARCHES[self.search](x, grid)
        if isinstance(grid, Log):
            return ranges.log(x, grid.bits, grid.root, official=grid.official)
        if isinstance(grid, ShiftLog):
            return ranges.shift_log(x, grid.bits, official=grid.official)
        assert isinstance(grid, Dynamic)
        return grid.abstract(x.shape[-1:])

    def to_dict(self) -> dict[str, Any]:
        if self.grid is None:
            return {"pattern": self.pattern}
        return {"pattern": self.pattern, "grid": self.grid.to_dict(), "search": self.search}

    @classmethod
    def from_dict(cls, data: Any) -> ActivationRule:
        if not isinstance(data, dict) or not {"pattern"} <= data.keys() <= {"pattern", "grid", "search"}:
            raise JaxqError(f"a rule of activations has pattern, grid and search, not {data!r}")
        grid = data.get("grid")
        settings = {k: data[k] for k in ("search",) if k in data}
        return cls(data["pattern"], None if grid is None else grid_from_dict(grid), **settings)
