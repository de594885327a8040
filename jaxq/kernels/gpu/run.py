"""Which of the two kernels a product takes, and with what settings."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxq.kernels import tuning
from jaxq.kernels.gpu import rows, tiles
from jaxq.kernels.gpu.weights import Settings, Weight

#: Tokens up to which float32 sums have a kernel.
EXACT_TOKENS = 8

#: Tokens up to which tiles that are decoded for tensor cores have one.
TILE_TOKENS = 64

#: Tokens up to which products are summed row by row without tensor cores.
ROW_TOKENS = 1

#: Where the table of tuned settings has nothing.
ROWS = Settings(rows=2, words=128, warps=1, stages=2)
TILES = Settings(rows=64, words=32, warps=4, split=4)


def most_tokens(exact: bool) -> int:
    """Tokens up to which there is a kernel."""
    return EXACT_TOKENS if exact else TILE_TOKENS


def by_rows(tokens: int, exact: bool) -> bool:
    """Whether so many tokens are summed row by row, in which an overlay can be."""
    return exact or tokens <= ROW_TOKENS


def product_of(
    op: str,
    x: Float[Array, "tokens in"],
    weight: Weight,
    *,
    exact: bool,
    overlay: tuple[Array, ...] = (),
    settings: Settings | None = None,
    dtype: Any = None,
    interpret: bool = False,
) -> Float[Array, "tokens out"]:
    """`x @ weight`.

    Args:
        op: its name in the table of tuned settings.
        exact: sum in float32, with `x` as it is; otherwise in float16 inside a word, with `x` in float16.
        overlay: (rows, values, starts, counts) of sparse entries to add; float16 tiles have none.
        settings: how to cut the product up; default: the tuned settings.
        dtype: of the result; default: float32.
        interpret: run as array operations on any device, to test.
    """
    tokens = x.shape[0]
    if not tokens:
        return jax.numpy.zeros((0, weight.words.shape[0]), dtype or jax.numpy.float32)
    if overlay:
        assert by_rows(tokens, exact), "tiles have no overlay"
        weight = Weight(weight.words, weight.decoder, weight.extra, overlay)
    if settings is None:
        settings = _tuned(op, x.shape[1], weight, tokens, exact)
    run: Any = functools.partial(rows.matvec, exact=exact) if by_rows(tokens, exact) else tiles.tiles
    with jax.named_scope(f"jaxq_{op}"):
        return run(x, weight, settings, dtype=dtype or jax.numpy.float32, interpret=interpret)


def _tuned(op: str, in_size: int, weight: Weight, tokens: int, exact: bool) -> Settings:
    bits, out_size = weight.decoder.order.bits, weight.words.shape[0]
    name = f"{op} exact" if exact else op
    found = tuning.look_up(name, bits, in_size, out_size, tokens, weight.decoder.group or in_size)
    if found is None:
        return ROWS if by_rows(tokens, exact) else TILES
    return Settings(**found)
