"""The one file that knows how JAX writes its jaxprs, and how that differs between releases (0.10 to 0.12)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

Literal = jex.Literal
Jaxpr = jex.Jaxpr

#: Primitives that call one jaxpr on their operands, in order.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"})
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """(jaxpr, consts) of a ClosedJaxpr, or of a bare Jaxpr, which newer releases put in its place."""
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


def called(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """The (jaxpr, consts) that a call-like equation calls."""
    params = eqn.params
    return opened(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"])


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs the equation on values; always a list of outputs."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):
        subfuns, params = params
        out = eqn.primitive.bind(*subfuns, *values, **params)
    else:
        out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


class Scan(NamedTuple):
    jaxpr: Any
    jaxpr_consts: Sequence[Any]
    consts: int
    carry: int
    length: int
    reverse: bool
    unroll: int


def scan_parts(eqn: Any) -> Scan:
    """What a scan equation says, with the number of operands that are constants and carries."""
    p = eqn.params
    if "num_consts" in p:
        consts, carry = p["num_consts"], p["num_carry"]
    else:
        groups = [list(g) for g in p["ft_in"].update(list(eqn.invars)).unpack()]
        consts, carry = len(groups[0]), len(groups[1])
    jaxpr, jaxpr_consts = opened(p["jaxpr"])
    return Scan(jaxpr, jaxpr_consts, consts, carry, p["length"], p["reverse"], p["unroll"])


def subjaxprs(eqn: Any) -> Iterator[Any]:
    """Every jaxpr among the equation's parameters."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                yield opened(item)[0]


def any_equation(jaxpr: Any, test: Callable[[Any], bool]) -> bool:
    """Whether the test holds for an equation of the jaxpr or of a jaxpr inside it."""
    return any(test(e) or any(any_equation(s, test) for s in subjaxprs(e)) for e in jaxpr.eqns)


def scope_of(eqn: Any) -> str:
    """The name stack of the equation ("LM/block_0/attention" for Linen modules), "" where there is none."""
    return str(eqn.source_info.name_stack)


def varying_axes(x: Any) -> frozenset[str]:
    """Mesh axes over which the value differs inside a shard_map."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset(() if kind is None else kind.varying)


def abstract_like(shape: Sequence[int], dtype: Any, parts: Sequence[Any]) -> jax.ShapeDtypeStruct:
    """A ShapeDtypeStruct that varies over the mesh axes over which any of the parts does."""
    kinds = [jax.typeof(a).manual_axis_type for a in parts if varying_axes(a)]
    return jax.ShapeDtypeStruct(tuple(shape), dtype, **({"manual_axis_type": kinds[0]} if kinds else {}))
