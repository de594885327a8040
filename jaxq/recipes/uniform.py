"""Recipes on the uniform grid."""

from __future__ import annotations

from typing import Any

from jaxq.formats import Uniform
from jaxq.recipe import Recipe, Rule

#: The linear layers of a transformer's blocks. Embeddings and the head stay float, as in the published tables.
BLOCKS = "{layers,blocks}/**/kernel"


def rtn(
    bits: int = 4,
    group_size: int | None | str = 128,
    symmetric: bool = False,
    range: str = "minmax",
    pattern: str = BLOCKS,
) -> Recipe:
    """Round to nearest: no data, the base line."""
    return Recipe("rtn", (Rule(pattern, "rtn", Uniform(bits, group_size, symmetric), {"range": range}),))


def gptq(
    bits: int = 4,
    group_size: int | None | str = 128,
    symmetric: bool = False,
    range: str = "mse",
    order: str = "activation",
    damping: float = 0.01,
    pattern: str = BLOCKS,
) -> Recipe:
    """GPTQ: rounding with second-order error feedback (Frantar et al. 2023).

    The defaults are activation order and ranges of least squared error, which docs/results.md compares with the
    natural order and min-max ranges of the paper's first tables.
    """
    options: dict[str, Any] = {"range": range, "order": order, "damping": damping}
    return Recipe("gptq", (Rule(pattern, "gptq", Uniform(bits, group_size, symmetric), options),))
