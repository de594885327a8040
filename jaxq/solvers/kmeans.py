"""Weighted k-means for each output channel or group of its inputs.

The dense part of SqueezeLLM (Kim et al. 2024, arXiv 2306.07629).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxq.errors import JaxqError
from jaxq.formats.base import Layout
from jaxq.formats.codebook import Codebook, CodebookArray, assemble, joined, lookup, nearest, representable, store
from jaxq.formats.groups import join_groups, split_groups
from jaxq.kernels import native
from jaxq.solvers.common import all_finite, check, matrices
from jaxq.solvers.lloyd import Channels, better, iterate, lloyd
from jaxq.solvers.segments import best_cuts, bytes_for, evaluations

METHODS = ("auto", "exact", "lloyd")

#: What "auto" lets the exact method take for one matrix.
BUDGET_SECONDS = 30.0

#: Segment costs a second: 1.3e9 on two cores of a server and 4.1e11 on an H100 in docs/results.md; that of a TPU
#: is a guess.
RATES = {"cpu": 1e9, "gpu": 4e11, "tpu": 1e11}

#: Segment costs for which the C++ kernel is called: some tens of milliseconds of XLA's.
NATIVE_FROM = 2e7

#: Segment costs a second of the C++ kernel, which looks at entries * in * log2(in) of them for a channel.
NATIVE_RATE = 5e8

#: Bytes of temporaries at a time. CPUs are fastest where these stay in the cache.
MEMORY = {"cpu": 12 * 2**20, "gpu": 2**32, "tpu": 2**31}

#: Importance below this part of a channel's greatest counts as none: its reciprocal must stay finite.
NEGLIGIBLE = 1e-30

POLISH = 2


def kmeans(
    w: Any,
    importance: Any = None,
    format: Codebook = Codebook(),  # noqa: B008
    *,
    method: str = "auto",
    frozen: Any = None,
    layout: Layout | None = None,
) -> CodebookArray:
    """Each channel gets the table of least importance-weighted squared error, each weight its nearest entry.

    Minimises sum_i f_i (w_i - table[code_i])^2 for each output channel on its own; where the format has groups,
    for each of its groups: what is said of channels below is true of these then.

    Args:
        w: `(in, out)` or `(batch..., in, out)`, any float dtype; of logical shape if `layout` is given.
        importance: shaped like `w`, or like its canonical matrix; not negative; any scale, which may differ
            between channels. None counts all weights alike.
        format: bits, the dtype of the tables, and the group size.
        method: "exact" finds the optimum by dynamic programming, O(entries in^1.5) for a channel, and O(entries
            in log in) on CPUs with a C++ compiler; "lloyd" runs 50 iterations from two starts, O(entries in);
            "auto" takes "exact" where an estimate of its time for this matrix on this backend stays within
            `BUDGET_SECONDS`.
        frozen: bool, of the canonical shape `(batch..., in, out)`: weights whose error costs nothing (they are
            stored elsewhere).
        layout: how the logical leaf maps to the canonical matrix.

    Returns a CodebookArray of the logical shape and dtype of `w`; its tables ascend. A channel whose importance is
    zero throughout counts its weights alike. Raises JaxqError for weights or importance that are not finite,
    negative importance, tables that `table_dtype` cannot hold, and shapes that do not fit.
    """
    return kmeans_solve(w, importance, format, method=method, frozen=frozen, layout=layout)[0]


def kmeans_solve(
    w: Any,
    importance: Any = None,
    format: Codebook = Codebook(),  # noqa: B008
    *,
    method: str = "auto",
    frozen: Any = None,
    layout: Layout | None = None,
) -> tuple[CodebookArray, dict[str, Array]]:
    """`kmeans` with diagnostics: (array, {"error": sqrt(sum f d^2 / sum f w^2) of each matrix})."""
    w = jnp.asarray(w)
    if method not in METHODS:
        raise JaxqError(f"unknown k-means method {method!r}; use one of {', '.join(map(repr, METHODS))}")
    matrix = matrices(w, layout)
    format.rows_per_group(matrix.shape[-2])
    if importance is not None:
        importance = _fitting(jnp.asarray(importance), w, matrix, layout)
    if frozen is not None:
        frozen = jnp.asarray(frozen)
        if frozen.shape != matrix.shape or frozen.dtype != jnp.bool_:
            raise JaxqError(f"frozen must be a bool array of shape {matrix.shape}, "
                            f"not {frozen.dtype.name} of shape {frozen.shape}")  # fmt: skip
    array, error, finite, sound, fits = _solve(matrix, importance, frozen, format, method, layout or Layout())
    check(finite, "the weights hold NaN or infinite values; repair the checkpoint or leave this weight dense")
    check(sound, "the importance holds negative, NaN or infinite values; look at the gradients it was built from")
    check(fits, f"a table entry does not fit {format.table_dtype}; use table_dtype='bfloat16'")
    return array, {"error": error}


def fit_tables(
    w: Float[Array, "in out"], importance: Float[Array, "in out"], entries: int, method: str = "auto"
) -> Float[Array, "entries out"]:
    """Centroids of weighted one-dimensional k-means for each column, float32, ascending along axis 0.

    Args:
        w: finite, any float dtype.
        importance: not negative, any scale; a column without any counts its weights alike.
        entries: centroids of a column; with fewer distinct weights some occur twice.
        method: as for `kmeans`.

    Pure, for use inside jit and vmap; columns are taken in chunks that bound the memory. The result of "exact"
    costs at most about 1e-6 more than the optimum, and so no more than that of "lloyd".
    """
    if entries < 1:
        raise JaxqError(f"a table has at least one entry, not {entries}")
    if method not in METHODS:
        raise JaxqError(f"unknown k-means method {method!r}; use one of {', '.join(map(repr, METHODS))}")
    n, out = w.shape
    backend = jax.default_backend()
    natively = _natively(w, importance, entries, backend)
    needed = native_seconds(n, out, entries) if natively else seconds(n, out, entries, backend)
    exact = method == "exact" or (method == "auto" and needed <= BUDGET_SECONDS)
    fit = _fit_natively if exact and natively else _fit_tables
    return fit(w, importance, entries, exact, _chunk(n, out, entries, exact, backend))


def _natively(w: Array, importance: Array, entries: int, backend: str) -> bool:
    """Whether the exact method runs in C++: on CPUs, for what is worth the call, not on explicit mesh axes."""
    n, out = w.shape
    if backend != "cpu" or out * evaluations(n, entries) < NATIVE_FROM:
        return False
    whole = all(entry is None for x in (w, importance) for entry in jax.typeof(x).sharding.spec)
    return whole and native.available()


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _fit_natively(w: Array, importance: Array, entries: int, exact: bool, width: int) -> Array:
    """`fit_tables` in C++, where the program runs on a CPU."""

    def kernel(w: Array, f: Array) -> Array:
        return native.tables(w.T.astype(jnp.float32), f.T.astype(jnp.float32), entries).T

    def plain(w: Array, f: Array) -> Array:
        return _fit_tables(w, f, entries, exact, width)

    return jax.lax.platform_dependent(w, importance, cpu=kernel, default=plain)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _fit_tables(w: Array, importance: Array, entries: int, exact: bool, width: int) -> Array:
    """`fit_tables`, `width` columns at a time."""
    n, out = w.shape
    chunks = -(-out // width)
    if chunks == 1:
        return _fit(w, importance, entries, exact)
    padding = [(0, 0), (0, chunks * width - out)]
    parts = [jnp.moveaxis(jnp.pad(z, padding).reshape(n, chunks, width), 1, 0) for z in (w, importance)]
    tables = jax.lax.map(lambda part: _fit(part[0], part[1], entries, exact), tuple(parts))
    return jnp.moveaxis(tables, 0, 1).reshape(entries, chunks * width)[:, :out]


def seconds(n: int, out: int, entries: int, backend: str) -> float:
    """About how long the exact method takes for `out` channels of `n` weights."""
    return out * evaluations(n, entries) / RATES.get(backend, RATES["cpu"])


def native_seconds(n: int, out: int, entries: int) -> float:
    """About how long the exact method takes in C++."""
    return out * entries * n * math.log2(n + 1) / NATIVE_RATE


def _chunk(n: int, out: int, entries: int, exact: bool, backend: str) -> int:
    """How many channels at a time: a multiple of the vector width, few of them beyond the last channel."""
    each = bytes_for(n, entries) if exact else 64 * n
    most = max(MEMORY.get(backend, MEMORY["cpu"]) // each, 32)
    if out <= most:
        return out
    widths = range(16 * math.ceil(most / 32), most + 1, 16)
    return min(widths, key=lambda width: (math.ceil(out / width) * width, -width))


def _fitting(importance: Array, w: Array, matrix: Array, layout: Layout | None) -> Array:
    if not jnp.issubdtype(importance.dtype, jnp.floating):
        raise JaxqError(f"importance must be floating point, not {importance.dtype.name}")
    # A square leaf has the shape of its own transpose: the logical reading is the documented one.
    if importance.shape == w.shape:
        return layout.to_canonical(importance) if layout else importance
    if importance.shape == matrix.shape:
        return importance
    raise JaxqError(f"importance of shape {importance.shape} does not fit a weight of shape {w.shape}")


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _solve(
    w: Array, importance: Array | None, frozen: Array | None, format: Codebook, method: str, layout: Layout
) -> tuple[CodebookArray, Array, Array, Array, Array]:
    f = jnp.ones(w.shape, jnp.float32) if importance is None else importance.astype(jnp.float32)
    sound = (jnp.isfinite(f) & (f >= 0)).all(axis=(-2, -1))
    in_size, size = w.shape[-2], format.rows_per_group(w.shape[-2])
    live = jnp.ones((in_size, 1), bool) if frozen is None else ~frozen
    groups = split_groups(w, size)
    # What fills up the last group is not live.
    counted = _counted(split_groups(f, size), split_groups(live, size))
    fit = functools.partial(_fit_groups, entries=format.entries, method=method)
    if w.ndim == 2:
        table = fit(groups, counted)
    else:
        flat = (x.reshape(-1, *x.shape[-3:]) for x in (groups, counted))
        table = jax.lax.map(lambda pair: fit(*pair), tuple(flat))
        table = table.reshape(*w.shape[:-2], *table.shape[1:])
    table = store(table, format)
    codes = nearest(groups, table)
    found = join_groups(lookup(codes, table), in_size)
    error = _relative_error(w.astype(jnp.float32), found, _counted(f, live))
    return (
        assemble(join_groups(codes, in_size), joined(table), format, layout, w.dtype),
        error,
        all_finite(w),
        sound,
        representable(joined(table), format),
    )


def _fit_groups(
    w: Float[Array, "groups size out"], importance: Float[Array, "groups size out"], entries: int, method: str
) -> Float[Array, "groups entries out"]:
    """`fit_tables` of all groups at a time, each a column."""
    count, size, out = w.shape

    def columns(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(size, count * out)

    table = fit_tables(columns(w), columns(importance), entries, method)
    return jnp.moveaxis(table.reshape(entries, count, out), 1, 0)


def _counted(f: Array, live: Bool[Array, "*#batch in #out"]) -> Array:
    """Importance, 0 at places that are not live; ones instead at the live places of a channel that has none."""
    f = jnp.where(live, f, 0.0)
    top = jnp.max(f, axis=-2, keepdims=True)
    return jnp.where(top > 0, f, live.astype(jnp.float32))


def _relative_error(w: Array, found: Array, f: Array) -> Array:
    # Fisher information may be as small as 1e-20, and squares of weights times that would vanish.
    f = f / jnp.maximum(jnp.max(f, axis=(-2, -1), keepdims=True), jnp.finfo(jnp.float32).tiny)
    size = jnp.maximum(jnp.max(jnp.abs(w), axis=(-2, -1), keepdims=True), jnp.finfo(jnp.float32).tiny)
    energy = jnp.sum(f * (w / size) ** 2, axis=(-2, -1))
    error = jnp.sum(f * ((found - w) / size) ** 2, axis=(-2, -1))
    return jnp.where(energy > 0, jnp.sqrt(error / jnp.where(energy > 0, energy, 1.0)), 0.0)


def _fit(w: Array, importance: Array, entries: int, exact: bool) -> Float[Array, "entries out"]:
    """`fit_tables` of a chunk."""
    w, f = _sorted(w.astype(jnp.float32), importance.astype(jnp.float32))
    top = jnp.max(f, axis=0)
    f = jnp.where(top > 0, f / jnp.where(top > 0, top, 1.0), 1.0)
    f = jnp.where(f < NEGLIGIBLE, 0.0, f)
    # Halves, since the difference of the ends may overflow.
    centre = 0.5 * w[0] + 0.5 * w[-1]
    scale = _power_of_two(jnp.maximum(w[-1] - centre, centre - w[0]))
    channels = Channels((w - centre) / scale, f)
    if exact:
        cuts = best_cuts(channels.x, f, entries)
        first = jnp.minimum(cuts[:-1], w.shape[0] - 1)
        table = channels.means(cuts, jnp.take_along_axis(channels.x, first, axis=0))
        table = better(channels, table, iterate(channels, table, POLISH))
    else:
        table = lloyd(channels, entries)
    return table * scale + centre


def _power_of_two(x: Array) -> Array:
    """The power of two at or below `x`; 1 for 0."""
    exponent = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    power = jax.lax.bitcast_convert_type(exponent, jnp.float32)
    return jnp.where(power > 0, power, 1.0)


def _sorted(w: Array, f: Array) -> tuple[Array, Array]:
    """Each column in ascending order, with its importance; sorted along the last axis, the fast one."""
    # Zeros of both signs are one value to the comparison and two to the bits.
    w = jnp.where(w == 0, 0.0, w)
    by_bits = _sorted_by_bits if w.shape[0] <= 2**16 else _sorted_by_value
    return jax.lax.platform_dependent(w, f, cpu=by_bits, default=_sorted_by_value)


def _sorted_by_value(w: Array, f: Array) -> tuple[Array, Array]:
    sorted_w, sorted_f = jax.lax.sort((w.T, f.T), dimension=1, num_keys=1)
    return sorted_w.T, sorted_f.T


def _sorted_by_bits(w: Array, f: Array) -> tuple[Array, Array]:
    """A radix sort of two digits: XLA on CPUs sorts single integers several times as fast as pairs of floats."""
    w, f = w.T, f.T
    bits = jax.lax.bitcast_convert_type(w, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    key = jnp.where(bits >= sign, ~bits, bits | sign)
    place = jnp.arange(w.shape[1], dtype=jnp.uint32)

    def order(digit: Array) -> Array:
        return (jax.lax.sort(digit << 16 | place, dimension=1, is_stable=False) & 0xFFFF).astype(jnp.int32)

    def take(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")

    low = order(key & 0xFFFF)
    index = take(low, order(take(key >> 16, low)))
    return take(w, index).T, take(f, index).T
