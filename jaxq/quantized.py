"""`jaxq.quantized`: the same function on quantized parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxq import tracing
from jaxq.formats.base import is_quantized
from jaxq.integer import IntegerRules
from jaxq.interpreter import Walk
from jaxq.names import assigned, names, split
from jaxq.simulated import QuantizedRules
from jaxq.tracked import Leaf


def quantized(
    fn: Callable[..., Any],
    on_fallback: Callable[[str, str], None] | None = None,
    *,
    integer: bool = False,
) -> Callable[..., Any]:
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

    With `integer`, products of two rounded operands are int8 x int8 -> int32 sums of their codes, scaled once, and
    agree with the simulated ones to float32 rounding. Those are products of two named activations, and of a weight
    on a `Uniform` grid of one group an output with an input that is named or that the weight rounds
    (`RoundedInput`), by `AffineQuantizer` or `DynamicQuantizer`. Grids have at most 8 bits and whole zero points,
    and do not vary along what is summed over. From its name on, an activation stays on its codes through changes
    of layout and dtype and products with numbers. All else stays simulated and is reported. Codes are not rounded
    to the dtype of what they stand for (bfloat16, say), and NaN has none: it becomes a number. Derivatives are
    those of the simulated function.

    Args:
        fn: a pure function of pytrees. Python scalars among its arguments are settings, fixed at tracing.
        on_fallback: called at tracing time with (path, reason) for every leaf made dense; with `integer` also for
            every quantized weight whose product, and every rounded activation which, runs in float.
        integer: products of codes where both operands have them.

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
        paths = {place: name.path for place, name in names(call.jaxpr.eqns).items()} if quantizers else {}

        def run(kind: type[QuantizedRules], report: Any, consts: Any, values: Any, rounded: Any) -> list[Any]:
            leaves = [Leaf.of(v, p) if is_quantized(v) else v for v, p in zip(values, call.paths, strict=True)]
            walk = Walk(kind(report, rounded, paths))
            outs, _ = walk.run(call.jaxpr, consts, leaves)
            return [walk.plain(o, "is returned by the function") for o in outs]

        form = functools.partial(run, QuantizedRules, on_fallback)
        if integer:
            simulated = functools.partial(run, QuantizedRules, None)
            form = _with_derivative(functools.partial(run, IntegerRules, on_fallback), simulated)
        return call.finish(form(call.consts, call.values, assigned(call.jaxpr.eqns, quantizers)))

    return wrapped


def _with_derivative(value: Callable[..., Any], of: Callable[..., Any]) -> Callable[..., Any]:
    """The function `value`, whose derivative is defined to be that of another one."""
    call = jax.custom_jvp(value)
    call.defjvp(lambda primals, tangents: (call(*primals), jax.jvp(of, primals, tangents)[1]))
    return call
