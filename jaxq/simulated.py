"""Simulated execution: values on grids, multiplied in float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jaxq import uses
from jaxq.errors import JaxqError
from jaxq.interpreter import Rules
from jaxq.sites import mismatch
from jaxq.tracked import Coded, Leaf, Records
from jaxq.uses import Use


def _precision(use: Use) -> Any:
    """A context in which products run at the precision that the function asked for."""
    precision = use.eqn.params["precision"]
    both = precision if isinstance(precision, tuple) else (precision, precision)
    strict = lax.Precision.HIGHEST in both
    return jax.default_matmul_precision("highest") if strict else jax.default_matmul_precision(None)


class QuantizedRules(Rules):
    """Calls the quantized array's own product at its sites, and rounds named activations.

    rounded: {id of the equation that names an activation: its quantizer}. paths: {the same: path in reports}.
    """

    keep_custom_rules = True

    def __init__(
        self,
        on_fallback: Callable[[str, str], None] | None = None,
        rounded: dict[int, Any] | None = None,
        paths: dict[int, str] | None = None,
    ):
        self.on_fallback, self.rounded, self.paths = on_fallback, rounded or {}, paths or {}
        self.follow_names = bool(rounded)

    def named(self, eqn: Any, path: str, value: Any) -> tuple[Any, Records]:
        quantizer = self.rounded.get(id(eqn))
        return (value if quantizer is None else quantizer(value)), {}

    def report(self, path: str, reason: str) -> None:
        if self.on_fallback is not None:
            self.on_fallback(path, reason)

    def fallback(self, tracked: Leaf | Coded, reason: str) -> None:
        self.report(tracked.path, reason)

    def site(self, use: Use, leaf: Leaf, x: Any, dense: Callable[[], Any]) -> tuple[Any, Records]:
        reason = mismatch(use, leaf)
        if leaf.value.rounds_input and (reason or use.kind not in ("matmul", "embedding")):
            raise JaxqError(f"{leaf.path}: the input of this {use.kind} cannot be rounded; "
                            "quantize the weight alone")  # fmt: skip
        if reason:
            self.fallback(leaf, reason)
            return dense(), {}
        if use.kind == "embedding":
            return uses.lookup(use, leaf.value.take_out, x), {}
        if use.kind != "matmul":
            # Convolutions and grouped products read the packed weight and run on its dense form at the site.
            return dense(), {}
        matmul: Callable[..., Any] = lambda q, x: q.matmul(x)  # noqa: E731
        for _ in use.batch_axes:
            matmul = jax.vmap(matmul)
        with _precision(use):
            y = matmul(leaf.value, use.canonical_input(x))
        return use.restore(y).astype(use.eqn.outvars[0].aval.dtype), {}
