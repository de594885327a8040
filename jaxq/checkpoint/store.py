"""Save and load a quantized model: `params/` by Orbax, `jaxq.json` by hand, nothing pickled."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxq.checkpoint import arrays as disk
from jaxq.checkpoint.activations import ACTIVATIONS, ActivationEntry, activation_entries, read_activations
from jaxq.checkpoint.directory import MANIFEST, failure, whole
from jaxq.checkpoint.manifest import SCHEMA, Entry, children, entries, read_entries, read_manifest
from jaxq.errors import JaxqError
from jaxq.formats.base import is_quantized
from jaxq.names import Activated, split
from jaxq.report import Report

if TYPE_CHECKING:
    from jaxq.quantize import Result

PARAMS = "params"

ChooseSharding = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.NamedSharding | None]


def save(
    path: str | os.PathLike[str],
    result: Result,
    *,
    config: Any = None,
    tokenizer: Any = None,
    source: Mapping[str, Any] | None = None,
    baseline: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a quantized model as one directory, whole or not at all.

    The directory holds `params/` (Orbax), `jaxq.json` (the manifest: format, shape, dtype and checksum of
    every path; recipe, report, source, float baseline), and, where given, `config.json` and the tokenizer's
    files. The arrays of quantizers of named activations are in `activations/` (Orbax), and a section of the
    manifest describes them. The directory is written beside `path`, flushed and then renamed, so that a crash or
    a full disk leaves what was there.

    Args:
      path: the directory to create.
      result: what `jaxq.quantize` returned: `.params`, any pytree of arrays and quantized arrays or a
        `jaxq.Activated` of one, and `.report`.
      config: the model's configuration: JSON data or a dataclass.
      tokenizer: an object with `save_pretrained(directory)`.
      source: fingerprint of the float model, JSON data.
      baseline: figures of the float model, JSON data; the report's own when None.
      overwrite: replace an existing jaxq directory.
      files: further text files, name -> content, such as "report.html".

    Raises:
      JaxqError: `path` exists, a leaf or a quantizer cannot be stored, or the file system refuses; nothing is
        left behind.
    """
    params, quantizers = split(result.params)
    described = entries(params)
    rounded = activation_entries(quantizers) if isinstance(result.params, Activated) else None
    leaves = {(*entry.key, name): array for entry, found in described for name, array in found.items()}
    numbers = {(entry.path, name): array for entry, found in rounded or () for name, array in found.items()}
    needed = sum(array.nbytes for array in (*leaves.values(), *numbers.values()))
    with whole(path, overwrite, needed) as directory:
        try:
            disk.write(directory / PARAMS, leaves)
            if numbers:
                disk.write(directory / ACTIVATIONS, numbers)
        except Exception as error:  # Orbax wraps what the file system says in many kinds
            raise failure(path, error, needed) from error
        for name, content in (files or {}).items():
            (directory / name).write_text(content, "utf-8")
        if config is not None:
            _write_json(directory / "config.json", _json_data(config))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(directory))
        _write_json(directory / MANIFEST, _manifest(result.report, described, rounded, source, baseline))


def load(
    path: str | os.PathLike[str],
    *,
    like: Any = None,
    shardings: ChooseSharding | None = None,
    verify: bool = True,
) -> Result:
    """Read what `save` wrote, refusing anything that is not exactly what the manifest describes.

    Args:
      path: the directory.
      like: a pytree of the same paths whose structure (lists, tuples, dataclasses) the parameters take; only
        its structure is used. None gives nested dicts with string keys.
      shardings: (path, logical shape and dtype) -> NamedSharding, or None for the default device. A sharding
        of the logical leaf is carried over to codes and scales. Quantizers of named activations are copied to
        all devices of the first one.
      verify: compare the checksum of each leaf and each quantizer.

    Returns:
      Result: parameters with the quantized leaves, in a `jaxq.Activated` if such was saved, and the report.

    Raises:
      JaxqError: not a jaxq directory, a newer schema, or arrays that differ from the manifest: one line that
        names the path, what was expected and what was found.
    """
    from jaxq.quantize import Result

    manifest, directory = read_manifest(path), Path(path).expanduser()
    found, rounded = read_entries(manifest), read_activations(manifest)
    if rounded is None and (directory / ACTIVATIONS).exists():
        raise JaxqError(f"{path} is damaged: it has {ACTIVATIONS}, of which {MANIFEST} says nothing")
    report = Report.from_dict(manifest.get("report") or {})
    placed: dict[disk.Key, jax.sharding.NamedSharding] = {}
    if shardings is not None:
        for entry in found:
            placed |= _placed(entry, shardings)
    leaves = read_leaves(directory / PARAMS, found, placed, verify)
    params = _restructured(found, leaves, split(like)[0])
    if rounded is not None:
        everywhere = next((jax.NamedSharding(sharding.mesh, jax.P()) for sharding in placed.values()), None)
        params = Activated(params, read_quantizers(directory / ACTIVATIONS, rounded, everywhere, verify))
    return Result(params=params, report=report)


def read_leaves(
    directory: Path, found: list[Entry], placed: Mapping[disk.Key, jax.sharding.Sharding], verify: bool
) -> list[Any]:
    """Return the leaves that the entries describe, in their order. JaxqError for every mismatch."""
    abstract = [entry.abstract() for entry in found]
    wanted = {(*entry.key, name): array for entry in found for name, array in entry.arrays.items()}
    stored = disk.read(directory, wanted, placed)
    leaves = []
    for entry, leaf in zip(found, abstract, strict=True):
        parts = {name: stored.pop((*entry.key, name)) for name in entry.arrays}
        if verify:
            _check(directory, entry, parts)
        if entry.format is None:
            leaves.append(parts[""])
        else:
            names = list(children(leaf))
            leaves.append(jax.tree.unflatten(jax.tree.structure(leaf), [parts[name] for name in names]))
    return leaves


def read_quantizers(
    directory: Path, rounded: list[ActivationEntry], sharding: jax.sharding.Sharding | None, verify: bool
) -> dict[str, Any]:
    """Return the quantizers that the entries describe, {path: quantizer}. JaxqError for every mismatch."""
    wanted = {(entry.path, name): array for entry in rounded for name, array in entry.arrays.items()}
    placed = {} if sharding is None else dict.fromkeys(wanted, sharding)
    stored = disk.read(directory, wanted, placed) if wanted else {}
    quantizers = {}
    for entry in rounded:
        parts = {name: stored.pop((entry.path, name)) for name in entry.arrays}
        if verify:
            _check(directory, entry, parts)
        quantizers[entry.path] = entry.build(parts)
    return quantizers


def _check(directory: Path, entry: Entry | ActivationEntry, parts: Mapping[str, Any]) -> None:
    """JaxqError where the bytes differ from the entry's checksum; arrays of several hosts are not compared."""
    if all(getattr(part, "is_fully_addressable", True) for part in parts.values()):
        if entry.checksum(parts) != entry.crc32:
            raise JaxqError(f"{directory}: {entry.path} is damaged: its checksum differs from {MANIFEST}")


def _placed(entry: Entry, shardings: ChooseSharding) -> dict[disk.Key, jax.sharding.NamedSharding]:
    sharding = shardings(entry.path, jax.ShapeDtypeStruct(entry.shape, np.dtype(entry.dtype)))
    if sharding is None:
        return {}
    if entry.format is None:
        return {(*entry.key, ""): sharding}
    specs = children(entry.abstract().partition_specs(sharding.spec, sharding.mesh))
    return {(*entry.key, name): jax.sharding.NamedSharding(sharding.mesh, spec) for name, spec in specs.items()}


def _restructured(found: list[Entry], leaves: list[Any], like: Any) -> Any:
    if like is None:
        tree: dict[str, Any] = {}
        for entry, leaf in zip(found, leaves, strict=True):
            node = tree
            for part in entry.key[:-1]:
                node = node.setdefault(part, {})
            node[entry.key[-1] if entry.key else ""] = leaf
        return tree if found[0].key else leaves[0]
    flat, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_quantized)
    paths = [jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in flat]
    known = dict(zip([entry.path for entry in found], leaves, strict=True))
    for path in sorted({*paths, *known}):
        if path not in known or path not in paths:
            where = "the given tree" if path not in paths else "the saved directory"
            raise JaxqError(f"{where} has no parameter {path}")
    return jax.tree.unflatten(structure, [known[path] for path in paths])


def _manifest(
    report: Report | None,
    described: list[tuple[Entry, dict[str, Any]]],
    rounded: list[tuple[ActivationEntry, dict[str, Any]]] | None,
    source: Mapping[str, Any] | None,
    baseline: Mapping[str, Any] | None,
) -> dict[str, Any]:
    known = (report or Report()).to_dict()
    newer = rounded is not None or any(entry.quantizer is not None for entry, _ in described)
    section = {} if rounded is None else {ACTIVATIONS: _summed(rounded)}
    return {
        "schema": SCHEMA if newer else 1,
        "jaxq": metadata.version("jaxq"),
        "source": dict(source or {}),
        "baseline": dict(baseline) if baseline is not None else known["baseline"],
        "recipe": known["recipe"],
        "params": _summed(described),
        **section,
        "report": known,
    }


def _summed(described: Sequence[tuple[Entry | ActivationEntry, dict[str, Any]]]) -> dict[str, Any]:
    """{path: description with its checksum}."""
    return {entry.path: replace(entry, crc32=entry.checksum(found)).to_dict() for entry, found in described}


def _json_data(config: Any) -> Any:
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return config


def _write_json(path: Path, data: Any) -> None:
    try:
        text = _json_text(data)
    except (TypeError, ValueError) as error:
        raise JaxqError(f"{path.name} cannot be written as JSON: {error}") from error
    path.write_text(text + "\n", "utf-8")


def _json_text(data: Any, depth: int = 2, indent: str = "") -> str:
    """JSON with one line for each item of the outer levels: short enough to read, and to compare by line."""
    inner = indent + "  "
    if depth and isinstance(data, dict) and data:
        lines = [
            f"{inner}{json.dumps(str(key), ensure_ascii=False)}: {_json_text(data[key], depth - 1, inner)}"
            for key in data
        ]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(data, list) and data and isinstance(data[0], dict):
        return "[\n" + ",\n".join(inner + _json_text(item, 0) for item in data) + f"\n{indent}]"
    return json.dumps(data, ensure_ascii=False, allow_nan=False)
