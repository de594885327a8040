"""Integer execution: products of two operands on uniform grids, on their codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxq import jaxprs
from jaxq.formats.codes import Codes, of_activation, of_weight, unfit
from jaxq.formats.prepared import PreparedArray
from jaxq.formats.uniform import UniformArray
from jaxq.kernels import integer as kernel
from jaxq.nested import NESTED
from jaxq.simulated import QuantizedRules
from jaxq.sites import mismatch
from jaxq.tracked import KEEPS_NAME, LAYOUT, Coded, Copies, Leaf, Named, Records
from jaxq.uses import Use

#: Operations that move elements: where all codes share one grid, they may be moved in any way.
MOVES = frozenset({"reshape", "broadcast_in_dim", "slice", "dynamic_slice", "split", "rev"})


class IntegerRules(QuantizedRules):
    """Multiplies codes by codes, and reports the products of rounded operands that run in float instead."""

    # Derivatives are those of the simulated function: see `jaxq.quantized`.
    keep_custom_rules = False

    def named(self, eqn: Any, path: str, value: Any) -> tuple[Any, Records]:
        quantizer = self.rounded.get(id(eqn))
        if quantizer is None:
            return value, {}
        # The walk does not number equal names.
        path, why = self.paths.get(id(eqn), path), unfit(quantizer)
        if why:
            self.report(path, why)
            return quantizer(value), {}
        return Coded.of(of_activation(quantizer, value), path), {}

    def activation(self, eqn: Any, values: list[Any]) -> list[Any] | None:
        coded = [v for v in values if isinstance(v, Coded)]
        name = eqn.primitive.name
        if not coded or name in NESTED:
            return None
        out, why = self._activation(eqn, values)
        if out is None:
            for v in coded:
                self.report(v.path, why)
        return out

    def _activation(self, eqn: Any, values: list[Any]) -> tuple[list[Any] | None, str]:
        """Outputs, or None and why there are none."""
        name, first = eqn.primitive.name, values[0]
        if name == "name" and id(eqn) in self.rounded:
            return None, "is rounded again"
        if name in KEEPS_NAME and isinstance(first, Coded):
            moved = LAYOUT[name](eqn, values)
            if moved is not None:
                return [moved], ""
        if name in MOVES and isinstance(first, Coded) and first.value.shared:
            seen = first.seen()
            return [_placed(first, seen, out) for out in jaxprs.bind(eqn, [seen.codes, *values[1:]])], ""
        if name in ("mul", "div"):
            scaled = _scaled(eqn, values)
            if scaled is not None:
                return [scaled], ""
        if name == "dot_general":
            return self._product(eqn, values)
        return None, f"is used by `{name}`, which has no integer form"

    def _product(self, eqn: Any, values: list[Any]) -> tuple[list[Any] | None, str]:
        if not all(isinstance(v, Coded) for v in values):
            return None, "is multiplied by what is not rounded"
        a, b = (v.seen() for v in values)
        numbers = eqn.params["dimension_numbers"]
        why = kernel.refused(a, b, numbers)
        if why:
            return None, why
        return [kernel.dot(a, b, numbers).astype(eqn.outvars[0].aval.dtype)], ""

    def site(self, use: Use, leaf: Leaf, x: Any, dense: Callable[[], Any]) -> tuple[Any, Records]:
        # A look-up multiplies nothing; what does not fit the site is reported as in any execution.
        if use.kind != "embedding" and not mismatch(use, leaf):
            found = self._linear(use, leaf, x)
            if not isinstance(found, str):
                return found, {}
            self.report(leaf.path, found)
        for v in x if isinstance(x, list) else (x,):
            if isinstance(v, Coded):
                self.report(v.path, f"is multiplied by {leaf.path}, which runs in float")
        return super().site(use, leaf, x.dense() if isinstance(x, Coded) else x, dense)

    def _linear(self, use: Use, leaf: Leaf, x: Any) -> Any:
        """The product of a quantized weight with its input, or why it is none of codes."""
        if use.kind != "matmul":
            what = {"conv": "convolution", "grouped": "grouped product"}[use.kind]
            return f"is used by a {what}, which has no integer form"
        q = leaf.value
        weight = q.weight if q.rounds_input else q
        if isinstance(weight, PreparedArray):
            weight = weight.restore()
        if not isinstance(weight, UniformArray):
            return "is not stored on a uniform grid"
        if weight.scale.shape[-2] != 1:
            return "has scales for groups of inputs"
        if q.rounds_input:
            a = _input_codes(use, q.quantizer, x.dense() if isinstance(x, Coded) else x)
        else:
            a = _canonical(use, x) if isinstance(x, Coded) else "has an input that is not rounded"
        if isinstance(a, str):
            return a
        b, lead = of_weight(weight), tuple(range(len(use.batch_axes)))
        numbers = (((len(a.shape) - 1,), (len(lead),)), (lead, lead))
        why = kernel.refused(a, b, numbers)
        return why or use.restore(kernel.dot(a, b, numbers)).astype(use.eqn.outvars[0].aval.dtype)


def _input_codes(use: Use, quantizer: Any, x: jax.Array) -> Codes | str:
    """Codes (batch..., tokens..., in) of the input of a weight that rounds it."""
    why = unfit(quantizer)
    if why:
        return f"has an input that {why}"
    encode = of_activation
    for _ in use.batch_axes:
        encode = jax.vmap(encode)
    return encode(quantizer, use.canonical_input(x))


def _canonical(use: Use, x: Coded) -> Codes | str:
    """Codes (batch..., tokens..., in) of a named activation that is the input of a weight."""
    seen = x.seen()
    contracted = use.eqn.params["dimension_numbers"][0][1 - use.operand]
    if any(member.shape[axis] != 1 for member in seen.grids.values() for axis in contracted):
        return "has an input on a grid that varies along what is summed over"
    codes = use.canonical_input(seen.codes)

    def canonical(member: jax.Array) -> jax.Array:
        if member.size == 1:
            return member.reshape((1,) * codes.ndim)
        return use.canonical_input(jnp.broadcast_to(member, seen.shape))[..., :1]

    return dataclasses.replace(seen, codes=codes, **{k: canonical(m) for k, m in seen.grids.items()})


def _placed(coded: Coded, seen: Codes, codes: jax.Array) -> Coded:
    """Moved codes of one grid."""
    grids = {name: member.reshape((1,) * codes.ndim) for name, member in seen.grids.items()}
    return Coded.of(dataclasses.replace(seen, codes=codes, **grids), coded.path)


def _scaled(eqn: Any, values: list[Any]) -> Coded | None:
    """Codes times or through a number: that of another step."""
    coded = next(v for v in values if isinstance(v, Coded))
    number = next((v for v in values if not isinstance(v, Coded)), None)
    if number is None or isinstance(number, (Named, Copies)) or jnp.ndim(number) != 0:
        return None
    if eqn.primitive.name == "div":
        if values[0] is not coded:
            return None
        number = 1 / jnp.asarray(number, jnp.float32)
    scale = coded.value.scale * jnp.asarray(number, jnp.float32)
    return dataclasses.replace(coded, value=dataclasses.replace(coded.value, scale=scale))
