"""The solvers that recipes can name. A new method adds its line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxq.solvers.gptq import gptq_solve
from jaxq.solvers.rtn import rtn


class Solver(NamedTuple):
    """solve: `(weight, [importance,] format, *, layout, **options)`, giving an array, or an array and diagnostics.

    statistic: name of the statistic of the site's inputs that is its importance; None for data-free solvers.
    """

    solve: Callable[..., Any]
    statistic: str | None = None


SOLVERS: dict[str, Solver] = {
    "rtn": Solver(rtn),
    "gptq": Solver(gptq_solve, "hessian"),
}
