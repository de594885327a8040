"""Loads the compiled products and makes them known to XLA."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.errors import JaxqError
from jaxq.kernels.dispatch import vary_as
from jaxq.kernels.native import build

TARGETS = ("jaxq_codebook", "jaxq_uniform", "jaxq_levels", "jaxq_bitplane", "jaxq_tables")

#: For `jax.export.export(..., disabled_checks=...)`: a program with native products runs only where jaxq is
#: loaded.
EXPORT_CHECKS = tuple(jax.export.DisabledSafetyCheck.custom_call(name) for name in TARGETS)


_LOADING = threading.Lock()


def _load() -> tuple[Any, str]:
    """(library, ""), or (None, why there is none); compiled and loaded by the first that asks."""
    with _LOADING:
        return _loaded()


@functools.cache
def _loaded() -> tuple[Any, str]:
    if os.environ.get("JAXQ_NATIVE", "1") == "0":
        return None, "JAXQ_NATIVE=0 turns it off"
    try:
        library = ctypes.CDLL(str(build.library()))
        for name in TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except (build.BuildError, OSError, jax.errors.JaxRuntimeError) as error:
        return None, str(error)
    library.jaxq_isa.restype = ctypes.c_char_p
    library.jaxq_configure.restype = ctypes.c_bool
    library.jaxq_configure.argtypes = (ctypes.c_int, ctypes.c_char_p)
    if library.jaxq_isa() == b"scalar":
        # In plain C++, which is there to compare with, they take ten times as long as XLA's products.
        return None, "there are no kernels for the vector instructions of this processor"
    return library, ""


def available(warn: bool = False) -> bool:
    """Whether native products can run here; compiles them on the first call. `warn`: say once why not."""
    library, why = _load()
    if library is None and warn:
        _warn(why)
    return library is not None


@functools.cache
def _warn(why: str) -> None:
    warnings.warn(f"no native CPU kernel: {why}; products run in plain XLA, several times slower", stacklevel=3)


def reason() -> str:
    """Why there is no native kernel; empty if there is one."""
    return _load()[1]


def instruction_set() -> str:
    """What the native kernel runs on now, as `configure` names it; empty if there is none."""
    library, _ = _load()
    return library.jaxq_isa().decode() if library else ""


def configure(threads: int = 0, instruction_set: str = "") -> None:
    """Sets how native products run from now on, also in programs compiled before.

    Args:
        threads: at most so many of XLA's own; 0 for all of them.
        instruction_set: "avx512bf16", "avx512" or "avx2" (x86-64), "neondot" or "neon" (AArch64; the former with
            dot products) or, to compare with, "scalar"; empty for the best of this processor.

    Raises JaxqError if there is no native kernel, or not for that instruction set.
    """
    library, why = _load()
    if library is None:
        raise JaxqError(f"there is no native CPU kernel to configure: {why}")
    if threads < 0 or not library.jaxq_configure(threads, instruction_set.encode()):
        raise JaxqError(f"cannot run native products with {threads} threads on {instruction_set!r} here")


def call(name: str, x: Array, *operands: Array, activations: str, out_size: int, **attributes: Any) -> Array:
    """The foreign call `name`: `x` `(tokens, in)` and prepared arrays, giving `(tokens, out)` float32.

    `x` goes as bfloat16 if that is what `activations` names; otherwise as float32, of which kernels make integers.
    Under jax.vmap it stays one call, to which an operand that is not mapped goes once, with an axis of size 1.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], out_size), jnp.float32)
    call = jax.ffi.ffi_call(name, out, vmap_method="expand_dims")
    dtype = jnp.bfloat16 if activations == "bfloat16" else jnp.float32
    y = call(x.astype(dtype), *operands, **attributes)
    return vary_as(y, x, *operands)


def tables(
    w: Float[Array, "channels in"], importance: Float[Array, "channels in"], entries: int
) -> Float[Array, "channels entries"]:
    """Centroids of exact weighted k-means for each channel, ascending, all in float32.

    Importance is not negative; a channel without any counts its weights alike. O(entries in log in) a channel.
    """
    out = jax.ShapeDtypeStruct((w.shape[0], entries), jnp.float32)
    table = jax.ffi.ffi_call("jaxq_tables", out, vmap_method="broadcast_all")(w, importance)
    return vary_as(table, w, importance)
