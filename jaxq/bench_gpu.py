"""Times on a GPU, and the search for the block sizes of its kernels: what `jaxq bench kernels` does there."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import glob
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxq.bench import FORMATS, Row, random_array
from jaxq.errors import JaxqError
from jaxq.formats.base import Format
from jaxq.formats.prepared import PreparedArray, prepare
from jaxq.kernels import tuning
from jaxq.kernels.gpu import run as dispatch
from jaxq.kernels.gpu import warpgroups
from jaxq.kernels.gpu.weights import Settings

#: Bytes of all copies of an operand together: three times what the cache of an H100 holds.
ROTATED = 160 * 10**6

#: Candidates for products row by row. A lane reads 16 bytes at a time if there are 128 words for each warp.
ROWS = tuple(
    Settings(rows, words, warps, unroll, stages=stages)
    for words, warps in ((128, 1), (256, 2))
    for rows in (2, 4, 1)
    for unroll in (1, 2)
    for stages in (2, 1)
) + tuple(Settings(rows, 64, 1, 1, stages=2) for rows in (2, 4, 8))

#: Candidates for tiles on tensor cores.
TILES = tuple(
    Settings(rows, words, warps, 1, split, stages)
    for rows, words, warps in ((64, 64, 4), (64, 32, 4), (128, 32, 8), (128, 64, 8), (32, 64, 4))
    for split in (1, 2, 4)
    for stages in (3, 1)
)

#: Candidates for the tensor cores of Hopper, for up to 64 tokens and for more.
FEW = tuple(
    warpgroups.Settings(64, 64, share, split, 1, stages)
    for share, stages in ((4, 2), (2, 2), (2, 4), (1, 4))
    for split in (1, 2, 4)
)
MANY = tuple(
    warpgroups.Settings(rows, width, share, split, cluster, stages)
    for rows, width, share, stages in ((128, 256, 1, 3), (128, 256, 1, 2), (128, 128, 1, 3), (64, 128, 2, 3))
    for split in (1, 2, 4)
    for cluster in (1, 2)
)

#: Of candidates row by row, the best so many are tried with other hints for the first cache.
HINTED = 3

#: Largest relative error of a product, by whether sums are in float32.
BOUND = {True: 1e-6, False: 1e-3}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate: its time on the device, or why it has none."""

    settings: Any
    seconds: float = math.inf
    failed: str = ""


def device_seconds(run: Callable[..., Any], argsets: Sequence[tuple[Any, ...]], calls: int = 30) -> float:
    """The median time on the device of all kernels that one call launches; calls take turns over `argsets`.

    On a machine without a GPU the mean by the clock of the wall, so that programs can be tried there.
    """
    for args in argsets[:2]:
        jax.block_until_ready(run(*args))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with jax.profiler.trace(folder):
            out = [run(*argsets[call % len(argsets)]) for call in range(calls)]
            jax.block_until_ready(out)
        wall = (time.perf_counter() - start) / calls
        events = _kernels(folder)
    if not events:
        if jax.default_backend() == "gpu":
            raise JaxqError("the profiler saw no kernels on the GPU")
        return wall
    # A kernel that runs twice in a call counts twice; one that ran in few of the calls is not theirs.
    each = [float(np.median(some)) * round(len(some) / calls) for some in events.values()]
    return sum(each) / 1e9


def _kernels(folder: str) -> dict[str, list[float]]:
    """Nanoseconds of each run of each kernel in a profile."""
    events: dict[str, list[float]] = {}
    for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            events.setdefault(event.name, []).append(event.duration_ns)
    return events


def copies(tree: Any) -> list[Any]:
    """So many copies of arrays that no cache holds what the next call reads; two where there is no GPU."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    count = min(40, max(3, math.ceil(ROTATED / size))) if jax.default_backend() == "gpu" else 2
    return [tree] + [jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree) for _ in range(count - 1)]


def exactly(x: Array, array: Any) -> np.ndarray:
    """`x @ array` in float64 on the host, some outputs at a time."""
    weight, x64 = np.asarray(array.matrix(jnp.float32)), np.asarray(x, np.float64)
    strips = range(0, weight.shape[1], 2048)
    return np.concatenate([x64 @ weight[:, at : at + 2048].astype(np.float64) for at in strips], axis=1)


def error_of(y: Array, expected: np.ndarray) -> float:
    """Relative error in the norm, over all outputs."""
    return float(np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected))


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes together."""
    size = 2**28 if jax.default_backend() == "gpu" else 2**20
    xs = [(jnp.ones(size, jnp.float32),) for _ in range(2)]
    return 8 * size / device_seconds(jax.jit(lambda x: x + 1), xs, 10)


@functools.cache
def dense_seconds(shape: tuple[int, int], tokens: int) -> float:
    """Of a dense bfloat16 product; the better of both orders in which the weight may lie."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (tokens, shape[0]), jnp.bfloat16)
    found = []
    for size, product in ((shape, lambda x, w: x @ w), (shape[::-1], lambda x, w: x @ w.T)):
        weights = copies(jax.random.normal(key, size, jnp.bfloat16))
        found.append(device_seconds(jax.jit(product), [(x, w) for w in weights]))
    return min(found)


def measure(
    format: Any, in_size: int, out_size: int, batches: Sequence[int], activations: Sequence[str], repeats: int
) -> list[Row]:
    """What `jaxq.bench.kernels` measures of one format and shape, with activations and results in float16."""
    array = random_array(format, in_size, out_size)
    cases: dict[str, Any] = {"xla": array}
    for kind in activations:
        prepared = prepare(array, "gpu", activations=kind)
        if isinstance(prepared, PreparedArray):
            cases[f"gpu {kind}"] = prepared
    several = {name: copies(case) for name, case in cases.items()}
    copy, rows = copy_bandwidth(), []
    for tokens in batches:
        x = jax.random.normal(jax.random.key(tokens), (tokens, in_size), jnp.float16)
        expected, dense = exactly(x, array), dense_seconds((in_size, out_size), tokens)
        for name, case in cases.items():
            product = jax.jit(lambda x, w: x @ w)
            error = error_of(product(x, case), expected)
            seconds = device_seconds(product, [(x, some) for some in several[name]], repeats)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(case))
            row = Row(
                op=format.name,
                bits=format.bits,
                n=out_size,
                k=in_size,
                m=tokens,
                implementation=name,
                milliseconds=1e3 * seconds,
                speedup_vs_dense=dense / seconds,
                share_of_copy_bandwidth=size / seconds / copy,
                error=error,
            )
            rows.append(row)
    return rows


def candidates(array: PreparedArray, tokens: int) -> tuple[Any, ...]:
    """What to try for so many tokens."""
    kernel = dispatch.kernel_for(tokens, array.parts[0], array.exact)
    if kernel is dispatch.warpgroups:
        return FEW if tokens <= 64 else MANY
    return ROWS if kernel is dispatch.rows else TILES


def search(
    array: Any,
    tokens: int,
    exact: bool,
    some: Sequence[Any] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Times candidates for products of so many tokens, which are all checked against float64; the best first.

    `array` is a canonical array of one matrix, `some` the candidates, if not all of their kernel. Those that do
    not compile, or are wrong, are reported and left out.
    """
    prepared = prepare(array, "gpu", activations="float32" if exact else "float16")
    if not isinstance(prepared, PreparedArray):
        raise JaxqError(f"there is no GPU kernel for {array.format}")
    some = candidates(prepared, tokens) if some is None else some
    in_size, _ = array.matrix_shape
    x = jax.random.normal(jax.random.key(tokens), (tokens, in_size), jnp.float16)
    operands, expected = [(x, copy) for copy in copies(prepared)], exactly(x, array)

    def build(settings: Any) -> Any:
        run = jax.jit(lambda x, q: q.kernel.product(x, q, exact=exact, settings=settings))
        try:
            return run.lower(x, prepared).compile()
        except Exception as reason:  # It may want more registers or shared memory than there are.
            return str(reason).partition("\n")[0][:200]

    def trial(settings: Any, run: Any) -> Trial:
        if isinstance(run, str):
            return Trial(settings, failed=run)
        error = error_of(run(x, prepared), expected)
        # What is not a number is not below the bound either.
        if not error <= BOUND[exact]:
            return Trial(settings, failed=f"is wrong by {error:.1e}")
        return Trial(settings, device_seconds(run, operands))

    def timed(some: Sequence[Any]) -> list[Trial]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            built = list(pool.map(build, some))
        found = []
        for settings, run in zip(some, built, strict=True):
            found.append(trial(settings, run))
            if on_trial is not None:
                on_trial(found[-1])
        return [one for one in found if not one.failed]

    def seconds(one: Trial) -> float:
        return one.seconds

    found = sorted(timed(some), key=seconds)
    if dispatch.kernel_for(tokens, prepared.parts[0], exact) is dispatch.rows:
        best = [one.settings for one in found[:HINTED]]
        found += timed([dataclasses.replace(one, cache=hint) for one in best for hint in tuning.HINTS[1:]])
    return sorted(found, key=seconds)


def save(path: Path, format: Any, shape: tuple[int, int], tokens: int, exact: bool, best: Any) -> None:
    """Writes the settings of products of so many tokens with a weight of `shape` (in, out) into a table."""
    name = dispatch.table_name(format.name, best, exact)
    own = getattr(format, "group_size", None)
    group = own if isinstance(own, int) and own < shape[0] else shape[0]
    tuning.save(path, tuning.device(), name, format.bits, *shape, tokens, group, dataclasses.asdict(best))


def tune(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    formats: Sequence[Format] = FORMATS,
    on_best: Callable[[Format, tuple[int, int], int, Trial], None] | None = None,
) -> Path:
    """Searches block sizes for products that sum in float16, and writes them into the user's table; its path.

    Raises JaxqError where there is no GPU, or no folder for the table.
    """
    path = tuning.own()
    if not tuning.device():
        raise JaxqError("block sizes are searched on the GPU that they are for, and there is none")
    if path is None:
        raise JaxqError("there is no folder for what is found; JAXQ_CACHE may name one")
    for shape in shapes:
        for format in formats:
            array = random_array(format, *shape)
            for tokens in batches:
                if not tokens or (tokens > dispatch.TILE_TOKENS and not warpgroups.available()):
                    continue
                order = search(array, tokens, False)
                if order:
                    save(path, format, shape, tokens, False, order[0].settings)
                    if on_best is not None:
                        on_best(format, shape, tokens, order[0])
    return path
