"""`jaxq.quantized`: the same function on quantized parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jaxq import tracing, uses
from jaxq.errors import JaxqError
from jaxq.formats.base import is_quantized
from jaxq.interpreter import Rules, Walk
from jaxq.names import assigned, split
from jaxq.sites import mismatch
from jaxq.tracked import Leaf, Records
from jaxq.uses import Use


def _precision(use: Use) -> Any:
    """A context in which products run at the precision that the function asked for."""
    precision = use.eqn.params["precision"]
    both = precision if isinstance(precision, tuple) else (precision, precision)
    strict = lax.Precision.HIGHEST in both
    return jax.default_matmul_precision("highest") if strict else jax.default_matmul_precision(None)


class QuantizedRules(Rules):
    """Calls the quantized array's own product at its sites, and rounds named activations.

    rounded: {id of the equation that names an activation: its quantizer}.
    """

    keep_custom_rules = True

    def __init__(
        self, on_fallback: Callable[[str, str], None] | None = None, rounded: dict[int, Any] | None = None
    ):
        self.on_fallback, self.rounded = on_fallback, rounded or {}
        self.follow_names = bool(rounded)

    def named(self, eqn: Any, path: str, value: Any) -> tuple[Any, Records]:
        quantizer = self.rounded.get(id(eqn))
        return (value if quantizer is None else quantizer(value)), {}

    def fallback(self, leaf: Leaf, reason: str) -> None:
        if self.on_fallback is not None:
            self.on_fallback(leaf.path, reason)

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


def quantized(fn: Callable[..., Any], on_fallback: Callable[[str, str], None] | None = None) -> Callable[..., Any]:
    """The same function, running on quantized arrays wherever they are in its arguments.

    Nothing is patched: the function is traced with dense abstract parameters, and its jaxpr is evaluated with
    the quantized ones. A quantized leaf is multiplied by its own product at matmuls and look-ups; in any
    other place it is made dense, so that the result is always that of the dense function on
    `jaxq.dequantize(params)`, to rounding. `jaxq.sites(fn, params, ...)` says beforehand where that happens.

    The returned function composes with jit, grad, vmap, scan, shard_map and jax.export. Derivatives reach the
    continuous members (scales) of quantized leaves; a custom derivative rule inside `fn` stays in force.
    Without quantized leaves among its arguments, it is `fn` itself.

    Given `jaxq.Activated(params, {path: quantizer})` for its first argument, it rounds the activations that
    `fn` names (`jaxq.activations`) too. Raises JaxqError for a path that `fn` does not have, or whose activation
    it names in a loop or in a function called more than once.

    Args:
        fn: a pure function of pytrees. Python scalars among its arguments are settings, fixed at tracing.
        on_fallback: called at tracing time with (path, reason) for every leaf made dense.

    Example:
        >>> logits = jax.jit(jaxq.quantized(model.apply))(result.params, tokens)  # doctest: +SKIP
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        params, quantizers = split(args[0]) if args else (None, {})
        args = (params, *args[1:]) if args else args
        if not quantizers and not any(map(is_quantized, jax.tree.leaves((args, kwargs), is_leaf=is_quantized))):
            return fn(*args, **kwargs)
        call = tracing.trace(fn, args, kwargs)
        values = [Leaf.of(v, p) if is_quantized(v) else v for v, p in zip(call.values, call.paths, strict=True)]
        walk = Walk(QuantizedRules(on_fallback, assigned(call.jaxpr.eqns, quantizers)))
        outs, _ = walk.run(call.jaxpr, call.consts, values)
        return call.finish([walk.plain(o, "is returned by the function") for o in outs])

    return wrapped
