"""Block sizes found by search: a table that ships with the package, over which the user's own goes.

Both are JSON: device -> "op bits" -> a list of {"n", "k", "m", "group", and the settings}, where one group of all
inputs is one of k. `jaxq bench kernels --tune` writes the user's, in the cache folder (`JAXQ_CACHE`).
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import jax

from jaxq.kernels.native.build import BuildError, cache

SHIPPED = Path(__file__).parent / "tuning.json"

#: A shape uses the entry of another one that is not further away than this, in doublings of n, k and group.
NEAR = 6.0

SHAPE = ("n", "k", "m", "group")

#: What the setting "cache" may be, the default first; see `gpu.weights.Settings`.
HINTS = ("words", "any", "both")

Table = dict[str, dict[str, list[dict[str, Any]]]]


def own() -> Path | None:
    """The user's table; None for a user without a home."""
    try:
        return cache() / "tuning.json"
    except BuildError:
        return None


def look_up(op: str, bits: int, k: int, n: int, m: int, group: int) -> dict[str, Any] | None:
    """Settings for a product of `(m, k)` with `(k, n)` on the device of this process, or None.

    This shape itself or the nearest with about as many tokens, since what is best changes slowly with n and k; of
    two that are equally near the user's. What is best on another device would be a guess.
    """
    return find(device(), op, bits, k, n, m, group)


def find(kind: str, op: str, bits: int, k: int, n: int, m: int, group: int) -> dict[str, Any] | None:
    """`look_up` for a device of this kind."""
    best, found = NEAR, None
    for path in (own(), SHIPPED):
        for entry in _read(path).get(kind, {}).get(f"{op} {bits}", []):
            if (entry["m"] - 1).bit_length() != (m - 1).bit_length():
                continue
            pairs = ((entry["n"], n), (entry["k"], k), (entry["group"], group))
            distance = sum(abs(math.log2(size / wanted)) for size, wanted in pairs)
            if distance < best:
                best, found = distance, entry
    return None if found is None else {name: value for name, value in found.items() if name not in SHAPE}


def save(
    path: Path, kind: str, op: str, bits: int, k: int, n: int, m: int, group: int, settings: dict[str, Any]
) -> None:
    """Puts settings into the table at `path`, in place of those for the same shape."""
    table: Any = json.loads(path.read_text()) if path.exists() else {}
    entries = table.setdefault(kind, {}).setdefault(f"{op} {bits}", [])
    shape = {"n": n, "k": k, "m": m, "group": group}
    entries[:] = [entry for entry in entries if any(entry[name] != size for name, size in shape.items())]
    entries.append({**shape, **settings})
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(table, indent=1) + "\n")
    aside.replace(path)
    _read.cache_clear()


def device() -> str:
    """The kind of GPU that this process has, or that a program is compiled for; empty if there is none."""
    try:
        return jax.devices("gpu")[0].device_kind
    except RuntimeError:
        return ""


@functools.cache
def _read(path: Path | None) -> Table:
    if path is None or not path.exists():
        return {}
    try:
        table = json.loads(path.read_text())
        for kinds in table.values():
            for entries in kinds.values():
                for entry in entries:
                    if not all(_sound(name, value) for name, value in entry.items()):
                        raise ValueError(f"{entry} holds what is neither a positive number nor a hint")
                    if not set(SHAPE) <= set(entry):
                        raise ValueError(f"{entry} names no shape")
        return table
    except (OSError, ValueError, AttributeError, TypeError) as error:
        warnings.warn(f"the table of kernel settings {path} is not used: {error}", stacklevel=4)
        return {}


def _sound(name: str, value: Any) -> bool:
    return value in HINTS if name == "cache" else type(value) is int and value > 0
