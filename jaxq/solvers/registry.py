"""The solvers that recipes can name. A new method adds its line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxq.formats.base import Format
from jaxq.formats.bitplane import BitPlane
from jaxq.formats.codebook import Codebook
from jaxq.formats.uniform import Uniform
from jaxq.solvers.gptq import gptq_solve
from jaxq.solvers.hlq import hlq
from jaxq.solvers.kmeans import kmeans_solve
from jaxq.solvers.lnq import lnq_solve
from jaxq.solvers.rtn import rtn


@dataclasses.dataclass(frozen=True)
class Solver:
    """solve: `(weight, format=, layout=, **statistics, **options)`, giving an array, or an array and diagnostics.

    format: the kind of format that it fits. statistics: {argument: name in `jaxq.transforms.registry.STATISTICS`}
    of what it is given about the site by default; "none" leaves an argument out, and a rule may name others.
    """

    solve: Callable[..., Any]
    format: type[Format]
    statistics: dict[str, str] = dataclasses.field(default_factory=dict)


SOLVERS: dict[str, Solver] = {
    "rtn": Solver(rtn, Uniform),
    "gptq": Solver(gptq_solve, Uniform, {"hessian": "hessian"}),
    "kmeans": Solver(kmeans_solve, Codebook, {"importance": "fisher"}),
    "hlq": Solver(hlq, BitPlane),
    "lnq": Solver(lnq_solve, Codebook, {"hessian": "hessian", "importance": "none"}),
}
