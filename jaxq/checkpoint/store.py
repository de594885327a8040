"""Save and load a quantized model: `params/` by Orbax, `jaxq.json` by hand, nothing pickled."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxq.checkpoint import arrays as disk
from jaxq.checkpoint.directory import MANIFEST, failure, whole
from jaxq.checkpoint.manifest import SCHEMA, Entry, children, entries, read_entries, read_manifest
from jaxq.errors import JaxqError
from jaxq.formats.base import is_quantized
from jaxq.names import Activated
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
    files. It is written beside `path`, flushed and then renamed, so that a crash or a full disk leaves what
    was there.

    Args:
      path: the directory to create.
      result: what `jaxq.quantize` returned: `.params`, any pytree of arrays and quantized arrays, and
        `.report`.
      config: the model's configuration: JSON data or a dataclass.
      tokenizer: an object with `save_pretrained(directory)`.
      source: fingerprint of the float model, JSON data.
      baseline: figures of the float model, JSON data; the report's own when None.
      overwrite: replace an existing jaxq directory.
      files: further text files, name -> content, such as "report.html".

    Raises:
      JaxqError: `path` exists, the parameters are a `jaxq.Activated`, a leaf cannot be stored, or the file system
        refuses; nothing is left behind.
    """
    if isinstance(result.params, Activated):
        raise JaxqError(
            "quantizers of named activations cannot be saved yet: save the .params of jaxq.Activated, which hold "
            "those of the inputs of weights"
        )
    described = entries(result.params)
    needed = sum(array.nbytes for _, found in described for array in found.values())
    with whole(path, overwrite, needed) as directory:
        try:
            disk.write(
                directory / PARAMS,
                {(*entry.key, name): array for entry, found in described for name, array in found.items()},
            )
        except Exception as error:  # Orbax wraps what the file system says in many kinds
            raise failure(path, error, needed) from error
        for name, content in (files or {}).items():
            (directory / name).write_text(content, "utf-8")
        if config is not None:
            _write_json(directory / "config.json", _json_data(config))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(directory))
        _write_json(directory / MANIFEST, _manifest(result.report, described, source, baseline))


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
        of the logical leaf is carried over to codes and scales.
      verify: compare each leaf's checksum.

    Returns:
      Result: parameters with the quantized leaves, and the report.

    Raises:
      JaxqError: not a jaxq directory, a newer schema, or arrays that differ from the manifest: one line that
        names the path, what was expected and what was found.
    """
    from jaxq.quantize import Result

    manifest = read_manifest(path)
    found = read_entries(manifest)
    report = Report.from_dict(manifest.get("report") or {})
    leaves = read_leaves(Path(path).expanduser() / PARAMS, found, shardings, verify)
    return Result(params=_restructured(found, leaves, like), report=report)


def read_leaves(directory: Path, found: list[Entry], shardings: ChooseSharding | None, verify: bool) -> list[Any]:
    """Return the leaves that the entries describe, in their order. JaxqError for every mismatch."""
    abstract = [entry.abstract() for entry in found]
    wanted = {(*entry.key, name): array for entry in found for name, array in entry.arrays.items()}
    placed: dict[tuple[str, ...], jax.sharding.Sharding] = {}
    for entry, leaf in zip(found, abstract, strict=True):
        placed |= _placed(entry, leaf, shardings)
    stored = disk.read(directory, wanted, placed)
    leaves = []
    for entry, leaf in zip(found, abstract, strict=True):
        parts = {name: stored.pop((*entry.key, name)) for name in entry.arrays}
        if verify and all(getattr(part, "is_fully_addressable", True) for part in parts.values()):
            if entry.checksum(parts) != entry.crc32:
                raise JaxqError(f"{directory}: {entry.path} is damaged: its checksum differs from {MANIFEST}")
        if entry.format is None:
            leaves.append(parts[""])
        else:
            names = list(children(leaf))
            leaves.append(jax.tree.unflatten(jax.tree.structure(leaf), [parts[name] for name in names]))
    return leaves


def _placed(
    entry: Entry, leaf: Any, shardings: ChooseSharding | None
) -> dict[tuple[str, ...], jax.sharding.Sharding]:
    logical = jax.ShapeDtypeStruct(entry.shape, np.dtype(entry.dtype))
    sharding = shardings(entry.path, logical) if shardings else None
    if sharding is None:
        return {}
    if entry.format is None:
        return {(*entry.key, ""): sharding}
    specs = children(leaf.partition_specs(sharding.spec, sharding.mesh))
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
    source: Mapping[str, Any] | None,
    baseline: Mapping[str, Any] | None,
) -> dict[str, Any]:
    known = (report or Report()).to_dict()
    return {
        "schema": SCHEMA,
        "jaxq": metadata.version("jaxq"),
        "source": dict(source or {}),
        "baseline": dict(baseline) if baseline is not None else known["baseline"],
        "recipe": known["recipe"],
        "params": {
            entry.path: replace(entry, crc32=entry.checksum(found)).to_dict() for entry, found in described
        },
        "report": known,
    }


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
