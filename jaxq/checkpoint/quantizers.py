"""Quantizers of activations as plain data: a name and settings, beside which their arrays stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxq.errors import JaxqError
from jaxq.formats.activations import AffineQuantizer, DynamicQuantizer
from jaxq.formats.grids import Affine, Dynamic, Log, ShiftLog
from jaxq.formats.log_activations import LogQuantizer, ShiftLogQuantizer

# Under the names of their grids.
KINDS: dict[str, type[Any]] = {
    Affine.name: AffineQuantizer,
    Dynamic.name: DynamicQuantizer,
    Log.name: LogQuantizer,
    ShiftLog.name: ShiftLogQuantizer,
}


def to_dict(quantizer: Any) -> dict[str, Any]:
    """Its name and settings, from which and from its arrays `from_dict` makes an equal quantizer.

    Raises:
      JaxqError: it is none of `KINDS`.
    """
    for name, cls in KINDS.items():
        if type(quantizer) is cls:
            return {"name": name, **{field.name: getattr(quantizer, field.name) for field in _settings(cls)}}
    kinds = ", ".join(cls.__name__ for cls in KINDS.values())
    raise JaxqError(f"a {type(quantizer).__name__} cannot be saved, only {kinds}")


def from_dict(data: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    """The quantizer that `to_dict` described, with these arrays.

    Raises:
      JaxqError: the name is unknown, or settings or arrays are not those of its kind.
    """
    name = data.get("name")
    if name not in KINDS:
        raise JaxqError(f"unknown quantizer {name!r}; use one of {', '.join(sorted(KINDS))}")
    settings = {key: value for key, value in data.items() if key != "name"}
    known = {field.name: field.default for field in _settings(KINDS[name])}
    members = [field.name for field in dataclasses.fields(KINDS[name]) if field.name not in known]
    for what, expected, found in (("settings", known, settings), ("arrays", members, arrays)):
        if set(expected) != set(found):
            given = ", ".join(sorted(found)) or "none"
            raise JaxqError(f"quantizer {name!r} has the {what} {', '.join(expected) or 'none'}, not {given}")
    for key, value in settings.items():
        if not _like(known[key], value):
            raise JaxqError(f"quantizer {name!r} cannot have {key} {value!r}")
    return KINDS[name](**settings, **arrays)


def words(quantizer: Any) -> str:
    """What it rounds to, in the words of its grid: "4-bit per channel"."""
    match quantizer:
        case AffineQuantizer():
            shape = max(quantizer.scale.shape, quantizer.zero.shape, key=len)
            share = "head" if shape[1:] == (1, 1) else "channel" if shape else "tensor"
            return str(Affine(quantizer.bits, share)) + (" (fractional)" if quantizer.fractional else "")
        case DynamicQuantizer():
            return str(Dynamic(quantizer.bits, quantizer.symmetric))
        case LogQuantizer():
            return str(Log(quantizer.bits, quantizer.root, quantizer.official))
    return str(ShiftLog(quantizer.bits, quantizer.official))


def _settings(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.metadata.get("static")]


def _like(default: Any, value: Any) -> bool:
    """Whether a setting is a truth value where its default is one, elsewhere a whole number or a list of them."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    return all(type(number) is int for number in (value if isinstance(value, list | tuple) else [value]))
