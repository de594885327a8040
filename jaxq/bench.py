"""How fast products with quantized weights are here: what `jaxq bench kernels` prints."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.errors import JaxqError
from jaxq.formats import bitplane, codebook, uniform
from jaxq.formats.base import Format, QuantizedArray
from jaxq.formats.bitplane import BitPlane
from jaxq.formats.codebook import Codebook
from jaxq.formats.prepared import PreparedArray, prepare
from jaxq.formats.uniform import Uniform
from jaxq.kernels import native

FORMATS: tuple[Format, ...] = (
    *(Uniform(bits, 128) for bits in (4, 3, 2)),
    *(Codebook(bits) for bits in (4, 3, 2)),
    *(BitPlane(bits, 128) for bits in (4, 3, 2)),
)

#: Bytes that copies of one operand take together: enough that no cache holds what the next call reads.
ROTATED = 96 * 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: `x` (m, k) times a weight (k, n).

    speedup_vs_dense: the time of XLA's dense product over that of this one. share_of_copy_bandwidth: bytes of the
    weight a second over those that a copy reads and writes. error: in the norm, against float64.
    """

    op: str
    bits: int
    n: int
    k: int
    m: int
    implementation: str
    milliseconds: float
    speedup_vs_dense: float
    share_of_copy_bandwidth: float
    error: float


def random_array(format: Any, in_size: int, out_size: int, seed: int = 0) -> QuantizedArray:
    """An `(in_size, out_size)` array of random codes, with scales and tables like those of normal weights."""
    rng = np.random.default_rng(seed)
    codes = jnp.asarray(rng.integers(0, 2**format.bits, (in_size, out_size), np.uint8))

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    groups = -(-in_size // format.rows_per_group(in_size))
    if isinstance(format, Codebook):
        return codebook.assemble(codes, normal(groups * format.entries, out_size), format)
    if isinstance(format, BitPlane):
        return bitplane.assemble(codes, normal(format.bits, groups, out_size), normal(groups, out_size), format)
    zero = jnp.asarray(rng.integers(0, 2**format.bits, (groups, out_size)))
    return uniform.assemble(codes, jnp.abs(normal(groups, out_size)) + 0.5, zero, format)


def kernels(
    shapes: Sequence[tuple[int, int]] = ((4096, 4096),),
    batches: Sequence[int] = (1, 8),
    formats: Sequence[Format] = FORMATS,
    *,
    activations: Sequence[str] = ("float32",),
    repeats: int = 15,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measures each format's products of `(batch, k)` with `(k, n)`, for `shapes` of (k, n).

    Each is measured as it is ("xla") and prepared for this machine's kernels ("native avx2", "gpu float16", ...),
    by calls over copies of the weight that no cache holds together. On CPUs the least times of `repeats`
    interleaved calls, against dense float32; on GPUs median times of the device, against dense bfloat16.
    """
    if any(size < 1 for shape in shapes for size in shape) or any(batch < 1 for batch in batches) or repeats < 1:
        raise JaxqError("shapes, batches and repeats are positive numbers")
    from jaxq import bench_gpu

    measure = bench_gpu.measure if jax.default_backend() == "gpu" else _measure
    rows = []
    for in_size, out_size in shapes:
        for format in formats:
            for row in measure(format, in_size, out_size, batches, activations, repeats):
                rows.append(row)
                if on_row is not None:
                    on_row(row)
    return rows


def _measure(
    format: Any,
    in_size: int,
    out_size: int,
    batches: Sequence[int],
    activations: Sequence[str],
    repeats: int,
) -> list[Row]:
    array = random_array(format, in_size, out_size)
    exact = np.asarray(array.matrix(jnp.float32), np.float64)
    cases: dict[str, Any] = {"dense": array.matrix(jnp.float32), "xla": array}
    for kind in activations:
        if kind in ("int16", "int8") and isinstance(format, Codebook):
            continue  # A look-up table multiplies floats in any case.
        prepared = prepare(array, activations=kind)
        if isinstance(prepared, PreparedArray):
            kernel = f"native {native.instruction_set()}"
            cases[kernel if kind == "float32" else f"{kernel} {kind}"] = prepared
    copies = {name: _copies(case) for name, case in cases.items()}
    copy = _copy_bandwidth(repeats)
    rows = []
    for batch in batches:
        x = jnp.asarray(np.random.default_rng(1).normal(size=(batch, in_size)).astype(np.float32))
        expected = np.asarray(x, np.float64) @ exact
        run = jax.jit(lambda x, w: x @ w)
        errors = {}
        for name, case in cases.items():
            y = np.asarray(run(x, case), np.float64)
            errors[name] = float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
        least = dict.fromkeys(cases, float("inf"))
        for repeat in range(repeats):
            for name, some in copies.items():
                start = time.perf_counter()
                jax.block_until_ready(run(x, some[repeat % len(some)]))
                least[name] = min(least[name], time.perf_counter() - start)
        for name in list(cases)[1:]:
            rows.append(
                Row(
                    op=format.name,
                    bits=format.bits,
                    n=out_size,
                    k=in_size,
                    m=batch,
                    implementation=name,
                    milliseconds=1e3 * least[name],
                    speedup_vs_dense=least["dense"] / least[name],
                    share_of_copy_bandwidth=cases[name].nbytes / least[name] / copy,
                    error=errors[name],
                )
            )
    return rows


def _copies(weight: Any) -> list[Any]:
    count = max(1, min(8, -(-ROTATED // weight.nbytes)))
    return [weight] + [jax.tree.map(lambda z: jnp.array(z, copy=True), weight) for _ in range(count - 1)]


def _copy_bandwidth(repeats: int) -> float:
    """Bytes a second that a copy larger than the caches reads and writes together."""
    source = jnp.ones(ROTATED // 4, jnp.float32)
    # In place: fresh memory would cost more than the copy.
    copy = jax.jit(lambda z: z + 1, donate_argnums=0)
    least = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        source = jax.block_until_ready(copy(source))
        least = min(least, time.perf_counter() - start)
    return 2 * source.nbytes / least
