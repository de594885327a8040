"""Which of the three kernels a product takes, and with what settings."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.kernels import tuning
from jaxq.kernels.gpu import rows, tiles, warpgroups
from jaxq.kernels.gpu.weights import Settings, Weight

#: Tokens up to which sums in float32 are made row by row, with inputs of any dtype.
EXACT_TOKENS = 8

#: Tokens up to which tiles, for GPUs other than Hopper, have a kernel.
TILE_TOKENS = 64

#: Tokens up to which products are summed row by row without tensor cores.
ROW_TOKENS = 1

#: Where the table of tuned settings has nothing.
ROWS = Settings(rows=2, words=128, warps=1, stages=2)
TILES = Settings(rows=64, words=32, warps=4, split=4)


def takes(tokens: int, dtype: Any, words: Any, exact: bool) -> bool:
    """Whether there is a kernel for so many tokens of `dtype` and a weight of these words, `(out, words)`.

    The tensor cores of Hopper multiply any number, in float32 sums too where inputs are 16 bits: dense weights
    would then be rounded to as many.
    """
    if kernel_for(tokens, words, exact) is warpgroups:
        return not exact or jnp.dtype(dtype).itemsize == 2
    return tokens <= (EXACT_TOKENS if exact else TILE_TOKENS)


def by_rows(tokens: int, exact: bool) -> bool:
    """Whether so many tokens are summed row by row, in which an overlay can be."""
    return tokens <= (EXACT_TOKENS if exact else ROW_TOKENS)


def product_of(
    op: str,
    x: Float[Array, "tokens in"],
    weight: Weight,
    *,
    exact: bool,
    overlay: tuple[Array, ...] = (),
    settings: Any = None,
    dtype: Any = None,
    interpret: bool = False,
) -> Float[Array, "tokens out"]:
    """`x @ weight`.

    Args:
        op: its name in the table of tuned settings.
        exact: sum in float32, with `x` as it is; otherwise in float16 inside a word, with `x` in float16.
        overlay: (rows, values, starts, counts) of sparse entries to add; for products row by row only.
        settings: how to cut the product up, in the class of its kernel; default: the tuned settings.
        dtype: of the result; default: float32.
        interpret: run as array operations on any device, to test.
    """
    tokens, dtype = x.shape[0], dtype or jnp.float32
    if not tokens:
        return jnp.zeros((0, weight.words.shape[0]), dtype)
    kernel = kernel_for(tokens, weight.words, exact)
    if overlay:
        assert kernel is rows, "tiles have no overlay"
        weight = Weight(weight.words, weight.decoder, weight.extra, overlay)
    if settings is None:
        settings = _tuned(op, kernel, x.shape[1], weight, tokens, exact)
    with jax.named_scope(f"jaxq_{op}"):
        if kernel is rows:
            return rows.matvec(x, weight, settings, exact=exact, dtype=dtype, interpret=interpret)
        if kernel is tiles:
            return tiles.tiles(x, weight, settings, dtype=dtype, interpret=interpret)
        return warpgroups.multiply(x, weight, settings, exact=exact, dtype=dtype)


def kernel_for(tokens: int, words: Any, exact: bool) -> ModuleType:
    """The module of the kernel that multiplies so many tokens with a weight of these words, `(out, words)`."""
    if by_rows(tokens, exact):
        return rows
    return warpgroups if warpgroups.available() and warpgroups.fits(words) else tiles


def table_name(op: str, settings: Any, exact: bool) -> str:
    """The name in the table of tuned settings, which differ from kernel to kernel."""
    if isinstance(settings, warpgroups.Settings):
        return f"{op} warpgroups"
    return f"{op} exact" if exact else op


def _tuned(op: str, kernel: ModuleType, in_size: int, weight: Weight, tokens: int, exact: bool) -> Any:
    bits, out_size = weight.decoder.order.bits, weight.words.shape[0]
    if kernel is warpgroups:
        default: Any = warpgroups.default(tokens, bits, in_size, out_size)
    else:
        default = ROWS if kernel is rows else TILES
    name, group = table_name(op, default, exact), weight.decoder.group or in_size
    found = tuning.look_up(name, bits, in_size, out_size, tokens, group)
    return type(default)(**found) if found else default
