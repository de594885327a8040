"""What a command multiplies quantized weights with."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from jaxq.cli import console

Native = Annotated[
    bool,
    typer.Option("--native/--no-native", help="Multiply quantized weights by kernels of this CPU or Nvidia GPU."),
]


def prepared(params: Any, use: bool) -> tuple[Any, dict[str, Any]]:
    """Parameters in the order in which products with few tokens are fastest, and what that is, for JSON.

    These are the native kernels of CPUs with vector instructions and those of Nvidia GPUs, for the formats that
    have one, with sums in float32. Otherwise, or unless `use`, parameters stay as they are and products in XLA.
    Remarks what was chosen, and why.
    """
    import jax

    import jaxq
    from jaxq.formats import is_quantized
    from jaxq.kernels import native, tuning

    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    count, target = sum(map(is_quantized, leaves)), jax.default_backend()
    known = target == "cpu" or (target == "gpu" and "NVIDIA" in tuning.device())
    if not use or not count or not known:
        return params, {"products": "xla"}
    if target == "cpu":
        with console.doing("loading native kernels"):
            why_not = native.reason()
        if why_not:
            console.remark(f"products in XLA: {why_not}")
            return params, {"products": "xla"}
    in_xla: dict[str, str] = {}
    with console.doing("preparing weights"):
        params = jaxq.prepare(params, target, on_fallback=in_xla.__setitem__)
    chosen, kind = count - len(in_xla), f"native {native.instruction_set()}" if target == "cpu" else "gpu"
    console.remark(f"products with {chosen} of {count} quantized weights: {kind}")
    for reason, many in Counter(in_xla.values()).items():
        path = next(p for p, r in in_xla.items() if r == reason)
        console.remark(f"in XLA: {path}{f' and {many - 1} more' if many > 1 else ''}: {reason}")
    return params, {"products": kind if chosen else "xla", "in_xla": in_xla}
