"""Quantizers of named activations on disk: a section of the manifest, and arrays in a folder of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxq.checkpoint import quantizers
from jaxq.checkpoint.directory import MANIFEST
from jaxq.checkpoint.manifest import (
    arrays_from_dict,
    arrays_to_dict,
    checksum,
    children,
    described,
    numbers,
    stored_bytes,
)
from jaxq.errors import JaxqError

#: The folder of the arrays, and the section of the manifest.
ACTIVATIONS = "activations"


@dataclass(frozen=True)
class ActivationEntry:
    """The quantizer of one named activation.

    Attributes:
      path: of the activation, as `jaxq.activations` lists it.
      quantizer: its name and settings, see `quantizers.to_dict`.
      arrays: name -> (shape, dtype) of its arrays.
      crc32: checksum over this description and the bytes of the arrays.
    """

    path: str
    quantizer: dict[str, Any]
    arrays: dict[str, tuple[tuple[int, ...], str]]
    crc32: str = ""

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.arrays)

    @property
    def bits(self) -> int:
        return self.quantizer["bits"]

    @property
    def grid(self) -> str:
        """What the activation is rounded to, in words."""
        return quantizers.words(self.abstract())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "path": self.path,
            "quantizer": self.quantizer,
            "arrays": arrays_to_dict(self.arrays),
            "crc32": self.crc32,
        }

    def abstract(self) -> Any:
        """Return the quantizer with ShapeDtypeStructs for arrays; JaxqError with the path if there is none."""
        arrays = {name: jax.ShapeDtypeStruct(shape, np.dtype(kind)) for name, (shape, kind) in self.arrays.items()}
        try:
            return quantizers.from_dict(self.quantizer, arrays)
        except (TypeError, ValueError, AttributeError) as error:
            raise JaxqError(f"activation {self.path}: {error}") from error

    def build(self, arrays: Mapping[str, Any]) -> Any:
        """Return the quantizer with these arrays."""
        return quantizers.from_dict(self.quantizer, arrays)

    def checksum(self, arrays: Mapping[str, Any]) -> str:
        """Return the CRC-32 (hexadecimal) over the description, less the checksum, and the arrays' bytes."""
        return checksum(self.to_dict() | {"crc32": ""}, arrays)


def activation_entries(activations: Mapping[str, Any]) -> list[tuple[ActivationEntry, dict[str, Any]]]:
    """Describe quantizers of named activations and return each with its arrays.

    Args:
      activations: {path: quantizer}, as in `jaxq.Activated`.

    Raises:
      JaxqError: a quantizer is of a kind that cannot be stored, or does not hold arrays of numbers.
    """
    return [_entry(path, quantizer) for path, quantizer in activations.items()]


def read_activations(manifest: Mapping[str, Any]) -> list[ActivationEntry] | None:
    """Return the entries of a manifest, None if it has no such section: then no activation was rounded.

    Raises:
      JaxqError: an entry is damaged or of an unknown kind; the message names the activation.
    """
    if ACTIVATIONS not in manifest:
        return None
    section = manifest[ACTIVATIONS]
    if not isinstance(section, dict):
        raise JaxqError(f"{MANIFEST} is damaged: its {ACTIVATIONS} are no list of paths")
    return [_read(path, item) for path, item in section.items()]


def _entry(path: str, quantizer: Any) -> tuple[ActivationEntry, dict[str, Any]]:
    name = f"activation {path}"
    try:
        data = quantizers.to_dict(quantizer)
    except JaxqError as error:
        raise JaxqError(f"{name}: {error}") from error
    arrays = {key: numbers(f"{key} of {name}", leaf) for key, leaf in children(quantizer).items()}
    entry = ActivationEntry(path, data, described(arrays))
    if jax.tree.structure(entry.abstract()) != jax.tree.structure(quantizer):
        raise JaxqError(f"{name}: its quantizer is not one that could be read back")
    return entry, arrays


def _read(path: str, item: Any) -> ActivationEntry:
    try:
        arrays = arrays_from_dict(item["arrays"])
        entry = ActivationEntry(str(item["path"]), dict(item["quantizer"]), arrays, str(item["crc32"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__} {error}"
        raise JaxqError(f"{MANIFEST} is damaged: {problem} in its activation {path}") from error
    if entry.path != path:
        raise JaxqError(f"{MANIFEST} is damaged: its activation {path} says that it is {entry.path}")
    entry.abstract()
    return entry
