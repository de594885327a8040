"""Arrays through Orbax: exactly the described arrays are written and read, or an error says why not."""

from __future__ import annotations

import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.errors import JaxqError

Key = tuple[str, ...]
Described = tuple[tuple[int, ...], str]


def write(directory: Path, arrays: Mapping[Key, Any]) -> None:
    """Write arrays under `directory` with Orbax; errors are those of Orbax and the file system."""
    import orbax.checkpoint as ocp

    # Orbax refuses arrays of size 0; the manifest alone says all there is to know about them.
    tree = _nested({key: array for key, array in arrays.items() if array.size})
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        checkpointer.save(directory.resolve(), args=ocp.args.PyTreeSave(tree))


def read(
    directory: Path, wanted: Mapping[Key, Described], shardings: Mapping[Key, jax.sharding.Sharding]
) -> dict[Key, Any]:
    """Read the wanted arrays.

    Args:
      directory: what `write` wrote.
      wanted: the shape and dtype that each array must have.
      shardings: where arrays go; those that are not named go to the default device.

    Raises:
      JaxqError: something is missing, is more than wanted, has another shape or dtype, or cannot be read.
    """
    import orbax.checkpoint as ocp

    full = {key: described for key, described in wanted.items() if 0 not in described[0]}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        stored = _attempt(
            lambda: _stored(checkpointer.metadata(directory.resolve())), f"{directory} cannot be read"
        )
        _compare(directory, full, stored)
        args = {
            key: _restore_args(ocp, dtype, shape, shardings.get(key, default))
            for key, (shape, dtype) in full.items()
        }
        item = {key: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for key, (shape, dtype) in full.items()}
        restore = ocp.args.PyTreeRestore(item=_nested(item), restore_args=_nested(args))
        tree = _attempt(lambda: checkpointer.restore(directory.resolve(), args=restore), f"{directory} is damaged")
    found = {key: _at(tree, key) for key in full}
    return found | {key: _empty(*described) for key, described in wanted.items() if key not in full}


def _empty(shape: tuple[int, ...], dtype: str) -> Any:
    kind = np.dtype(dtype)
    return np.zeros(shape, kind) if jax.dtypes.canonicalize_dtype(kind) != kind else jnp.zeros(shape, kind)


def _restore_args(ocp: Any, dtype: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> Any:
    kind = np.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(kind) != kind:
        # A float64 leaf stays numpy: jax would round it.
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=kind)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array, dtype=kind, sharding=sharding, global_shape=shape, strict=True
    )


def _compare(directory: Path, wanted: Mapping[Key, Described], stored: Mapping[Key, Described]) -> None:
    known = {tuple(_name(part) for part in key): (key, described) for key, described in wanted.items()}
    for name in sorted({*known, *stored}):
        expected, found = known.get(name, (None, None))[1], stored.get(name)
        if expected != found:
            path = "/".join(known[name][0] if name in known else map(_part, name)).rstrip("/")
            raise JaxqError(f"{directory}: {path} should be {_words(expected)} but is {_words(found)}")


def _stored(metadata: Any) -> dict[Key, Described]:
    tree = getattr(metadata, "item_metadata", metadata)
    tree = getattr(tree, "tree", tree)
    found: dict[Key, Described] = {}

    def walk(node: Any, key: Key) -> None:
        if isinstance(node, Mapping):
            for name, child in node.items():
                walk(child, (*key, str(name)))
        else:
            found[key] = (tuple(node.shape), str(np.dtype(node.dtype)))

    walk(tree, ())
    return found


def _nested(flat: Mapping[Key, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        node = tree
        for part in key[:-1]:
            node = node.setdefault(_name(part), {})
        node[_name(key[-1])] = value
    return tree


def _at(tree: Any, key: Key) -> Any:
    for part in key:
        tree = tree[_name(part)]
    return tree


def _name(part: str) -> str:
    # Orbax joins names with dots and takes an empty dict as a leaf: dots and empty names are encoded.
    return quote(part, safe=" ~!$&'()*+,;=@_-").replace(".", "%2E") or "%"


def _part(name: str) -> str:
    return "" if name == "%" else unquote(name)


def _words(described: Described | None) -> str:
    return "absent" if described is None else f"{list(described[0])} {described[1]}"


def _attempt(call: Callable[[], Any], problem: str) -> Any:
    """Return call(), or raise a JaxqError of one line whatever Orbax and TensorStore raise."""
    try:
        return call()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    # Reads that were given up end in other threads and complain when collected: let them, now and unheard.
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        time.sleep(0.1)
        gc.collect()
    finally:
        sys.unraisablehook = hook
    raise JaxqError(f"{problem}: {reason}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax's log lines and warnings off the terminal while the block runs."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
