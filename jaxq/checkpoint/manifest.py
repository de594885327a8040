"""The manifest: what every path is, so that arrays on disk can be refused when they are something else."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import formats
from jaxq.checkpoint import quantizers
from jaxq.checkpoint.directory import MANIFEST
from jaxq.errors import JaxqError
from jaxq.formats.base import Layout, QuantizedArray, is_quantized
from jaxq.formats.prepared import restore

#: The newest schema. Schema 2 has rounded activations, and settings of quantizers that no grid describes; a
#: directory without them is written as schema 1, which older releases read.
SCHEMA = 2

Arrays = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Entry:
    """One parameter leaf.

    Attributes:
      key: its place in the tree, one string a level.
      shape, dtype: logical.
      arrays: name -> (shape, dtype) of the stored arrays: "" alone for a plain leaf, otherwise the children
        of the quantized array, such as "codes", "scale".
      format, layout, matrix_shape: of a quantized leaf, None for a plain one.
      crc32: checksum over this description and the bytes of the arrays.
      quantizer: settings of the quantizer of a `RoundedInput` that its grid does not describe, such as
        `fractional`; None for a plain one, and then not written.
    """

    key: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    arrays: Arrays
    format: dict[str, Any] | None = None
    layout: dict[str, Any] | None = None
    matrix_shape: tuple[int, ...] | None = None
    crc32: str = ""
    quantizer: dict[str, Any] | None = None

    @property
    def path(self) -> str:
        return "/".join(self.key)

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, scales and all."""
        return stored_bytes(self.arrays)

    @property
    def bits_per_weight(self) -> float:
        weights = math.prod(self.shape)
        return 8 * self.nbytes / weights if weights else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        data = asdict(self) | {"arrays": arrays_to_dict(self.arrays)}
        if self.quantizer is None:
            # The checksums of schema 1 know no such key.
            del data["quantizer"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Entry:
        """Read what to_dict wrote; raises KeyError, TypeError or ValueError for anything else."""
        matrix = data["matrix_shape"]
        return cls(
            key=tuple(str(part) for part in data["key"]),
            shape=tuple(int(n) for n in data["shape"]),
            dtype=str(np.dtype(data["dtype"])),
            arrays=arrays_from_dict(data["arrays"]),
            format=data["format"],
            layout=data["layout"],
            matrix_shape=None if matrix is None else tuple(int(n) for n in matrix),
            crc32=str(data["crc32"]),
            quantizer=data.get("quantizer"),
        )

    def abstract(self) -> Any:
        """Return the leaf as ShapeDtypeStructs, built by the format itself.

        Raises:
          JaxqError: the format is unknown, or gives other arrays than those that the manifest lists.
        """
        if self.format is None:
            return jax.ShapeDtypeStruct(self.shape, np.dtype(self.dtype))
        try:
            layout = Layout(**{name: tuple(value) for name, value in (self.layout or {}).items()})
            form = formats.from_dict(self.format)
            leaf: Any = form.abstract(self.matrix_shape or (), np.dtype(self.dtype), layout)
            if self.quantizer is not None:
                data = quantizers.to_dict(leaf.quantizer) | self.quantizer
                leaf = replace(leaf, quantizer=quantizers.from_dict(data, children(leaf.quantizer)))
            shape = tuple(leaf.shape)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise JaxqError(f"{self.path}: its format in {MANIFEST} cannot be read: {error}") from error
        expected = described(leaf)
        for name in sorted({*expected, *self.arrays}):
            if expected.get(name) != self.arrays.get(name):
                raise JaxqError(
                    f"{self.path}: its format {json.dumps(self.format)} needs "
                    f"{_words(name, expected.get(name))}, but {MANIFEST} lists "
                    f"{_words(name, self.arrays.get(name))}"
                )
        if shape != self.shape:
            raise JaxqError(f"{self.path}: its layout gives shape {shape}, but {MANIFEST} says {self.shape}")
        return leaf

    def checksum(self, arrays: Mapping[str, Any]) -> str:
        """Return the CRC-32 (hexadecimal) over the description, less the checksum, and the arrays' bytes."""
        return checksum(self.to_dict() | {"crc32": ""}, arrays)


def entries(params: Any) -> list[tuple[Entry, dict[str, Any]]]:
    """Describe every leaf of a parameter tree and return it with its arrays.

    Args:
      params: any pytree of arrays and quantized arrays.

    Raises:
      JaxqError: a leaf is not an array, two leaves have the same path, or a quantized leaf could not be
        restored.
    """
    # Files hold canonical arrays, whatever the machine that wrote them prepared.
    params = restore(params)
    found: dict[str, tuple[Entry, dict[str, Any]]] = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]:
        key = tuple(jax.tree_util.keystr((part,), simple=True) for part in key_path)
        entry, arrays = _entry(key, leaf)
        if entry.path in found:
            raise JaxqError(f"two parameters have the path {entry.path}: rename one")
        found[entry.path] = (entry, arrays)
    if not found:
        raise JaxqError("there are no parameters to save")
    return list(found.values())


def described(leaf: Any) -> Arrays:
    """Return name -> (shape, dtype) of the arrays of a quantized array (or of its abstract form)."""
    return {name: (tuple(array.shape), str(np.dtype(array.dtype))) for name, array in children(leaf).items()}


def children(leaf: Any) -> dict[str, Any]:
    """Return name -> array of a quantized array; nested ones are named "base/codes"."""
    flat = jax.tree_util.tree_flatten_with_path(leaf)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): array for path, array in flat}


def numbers(name: str, leaf: Any) -> Any:
    """Return a leaf as an array; JaxqError unless it is one of numbers."""
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    if array.dtype == object or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise JaxqError(f"{name} is not an array of numbers but {type(leaf).__name__}: leave it out")
    return array


def stored_bytes(arrays: Arrays) -> int:
    """Return the bytes of described arrays."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values())


def arrays_to_dict(arrays: Arrays) -> dict[str, Any]:
    """Return plain JSON data."""
    return {name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in arrays.items()}


def arrays_from_dict(data: Mapping[str, Any]) -> Arrays:
    """Read what arrays_to_dict wrote; KeyError, TypeError, ValueError or AttributeError for anything else."""
    return {
        str(name): (tuple(int(n) for n in item["shape"]), str(np.dtype(item["dtype"])))
        for name, item in data.items()
    }


def checksum(description: Mapping[str, Any], arrays: Mapping[str, Any]) -> str:
    """Return the CRC-32 (hexadecimal) over JSON data and the bytes of arrays."""
    value = zlib.crc32(json.dumps(description, sort_keys=True).encode())
    for name in sorted(arrays):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).reshape(-1).data, value)
    return f"{value:08x}"


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of a saved directory as plain data.

    Raises:
      JaxqError: there is no manifest, it is damaged, or a newer jaxq wrote it.
    """
    file = Path(path).expanduser() / MANIFEST
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise JaxqError(f"{path} is not a jaxq directory: it has no {MANIFEST}") from error
    except OSError as error:
        raise JaxqError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise JaxqError(f"{file} is damaged: {error}") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise JaxqError(f"{file} is damaged: it has no schema version")
    if schema > SCHEMA:
        raise JaxqError(
            f"{path} was written by jaxq {manifest.get('jaxq', '?')} with schema {schema}; "
            f"this jaxq reads schema {SCHEMA}: upgrade jaxq"
        )
    return manifest


def read_entries(manifest: Mapping[str, Any]) -> list[Entry]:
    """Return the entries of a manifest. JaxqError when a part of it is missing or of another kind."""
    try:
        found = [Entry.from_dict(item) for item in manifest["params"].values()]
        paths = list(manifest["params"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise JaxqError(f"{MANIFEST} is damaged: {type(error).__name__} {error} in its list of params") from error
    if paths != [entry.path for entry in found]:
        raise JaxqError(f"{MANIFEST} is damaged: a path differs from its key")
    return found


def _entry(key: tuple[str, ...], leaf: Any) -> tuple[Entry, dict[str, Any]]:
    path = "/".join(key)
    if isinstance(leaf, QuantizedArray):
        arrays = children(leaf)
        entry = Entry(
            key=key,
            shape=tuple(leaf.shape),
            dtype=str(np.dtype(leaf.dtype)),
            arrays=described(leaf),
            format=leaf.format.to_dict(),
            layout=asdict(leaf.layout),
            matrix_shape=(*leaf.batch_shape, *leaf.matrix_shape),
        )
        if leaf.rounds_input and jax.tree.structure(entry.abstract()) != jax.tree.structure(leaf):
            entry = replace(entry, quantizer=_beyond_the_grid(path, leaf))
        if jax.tree.structure(entry.abstract()) != jax.tree.structure(leaf):
            raise JaxqError(f"{path}: its format does not describe it, so that it could not be read back")
    else:
        array = numbers(path, leaf)
        arrays = {"": array}
        entry = Entry(key, tuple(array.shape), str(array.dtype), {"": (tuple(array.shape), str(array.dtype))})
    return entry, arrays


def _beyond_the_grid(path: str, leaf: Any) -> dict[str, Any]:
    """Settings of the quantizer of a `RoundedInput` that its grid has no word for."""
    try:
        own = quantizers.to_dict(leaf.quantizer)
    except JaxqError as error:
        raise JaxqError(f"{path}: {error}") from error
    return {key: value for key, value in own.items() if key not in leaf.format.grid.to_dict()}


def _words(name: str, array: tuple[Sequence[int], str] | None) -> str:
    return f"no {name}" if array is None else f"{name} {list(array[0])} {array[1]}"
