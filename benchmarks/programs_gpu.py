"""Whole programs of products with quantized weights on a GPU, against the same in dense bfloat16.

    python benchmarks/programs_gpu.py --json benchmarks/results/kernels_h100_whole.json
    python benchmarks/programs_gpu.py --parts decode --only "codebook 4" --layers 8

`chain`: 128 dependent products in one program. `decode`: steps of a model of the shape of Llama-3.1-8B with random
weights, batch 1, all steps in one program, in tokens a second. What is not a product is the same for all: one
kernel for attention and the cache, one for a residual sum and its norm, one for the activation. Times are by the
clock of the wall.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from benchmarks.rows import Rows
from jaxq.bench import random_array
from jaxq.bench_gpu import copies, device_seconds
from jaxq.formats import BitPlane, Codebook, Uniform
from jaxq.formats.prepared import prepare

TABLES, PLANES, GRIDS = Codebook(4), BitPlane(2, 128), Uniform(4, 128)

#: (name, format of the layers, of the head); None is bfloat16.
PROGRAMS = (
    ("bf16", None, None),
    ("codebook 4", TABLES, None),
    ("planes 2", PLANES, None),
    ("uniform 4", GRIDS, None),
    ("codebook 4, head too", TABLES, TABLES),
    ("planes 2, head codebook 4", PLANES, TABLES),
)

#: Of a chain: products, and their inputs and outputs.
LINKS, LINK = 128, 4096

#: Llama-3.1-8B: width, heads of queries and of keys, size of a head, hidden width, vocabulary, layers.
WIDTH, HEADS, KEYS, HEAD, HIDDEN, VOCABULARY, LAYERS = 4096, 32, 8, 128, 14336, 128256, 32
EACH = HEADS // KEYS
EPSILON = 1e-5


def chain(add: Callable[[dict[str, Any]], None], formats: tuple[Any, ...]) -> None:
    """Dependent products of one token in one program."""
    calls = 20

    @jax.jit
    def link(x: Any, w: Any) -> Any:
        return x @ w

    @jax.jit
    def run(x: Any, ws: list[Any]) -> Any:
        for place in range(LINKS):
            x = link(x, ws[place % len(ws)])
        return x

    dense = math.inf
    for name, format in formats:
        x = jax.random.normal(jax.random.key(0), (1, LINK), jnp.bfloat16 if format is None else jnp.float16)
        if format is None:
            ws = copies(jax.random.normal(jax.random.key(1), (LINK, LINK), jnp.bfloat16) / math.sqrt(LINK))
        else:
            ws = copies(prepare(steady(random_array(format, LINK, LINK)), "gpu", activations="float16"))
        jax.block_until_ready(run(x, ws))
        least = math.inf
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(calls):
                y = run(x, ws)
            jax.block_until_ready(y)
            least = min(least, (time.perf_counter() - start) / calls / LINKS)
        dense = least if format is None else dense
        device = device_seconds(run, [(x, ws)], 10) / LINKS
        add({"chain": name, "wall_us": 1e6 * least, "device_us": 1e6 * device, "times_dense": dense / least})


def steady(array: Any) -> Any:
    """A quantized array scaled so that products with it keep the size of activations."""
    rms = float(jnp.sqrt(jnp.mean(array.matrix(jnp.float32) ** 2)))

    def scaled(leaf: Any) -> Any:
        continuous = jnp.issubdtype(leaf.dtype, jnp.floating)
        return (leaf / (rms * math.sqrt(LINK))).astype(leaf.dtype) if continuous else leaf

    return jax.tree.map(scaled, array)


def add_norm(x: Any, more: Any, dtype: Any) -> tuple[Any, Any]:
    """(x + more in the dtype of x, that over its root mean square in `dtype`), both `(1, width)`."""

    def kernel(x_ref: Any, more_ref: Any, sum_ref: Any, normed_ref: Any) -> None:
        total = x_ref[...].astype(jnp.float32) + more_ref[...].astype(jnp.float32)
        sum_ref[...] = total.astype(sum_ref.dtype)
        scale = jax.lax.rsqrt(jnp.sum(total * total) / WIDTH + EPSILON)
        normed_ref[...] = (total * scale).astype(normed_ref.dtype)

    out = (jax.ShapeDtypeStruct((WIDTH,), x.dtype), jax.ShapeDtypeStruct((WIDTH,), dtype))
    params = triton.CompilerParams(num_warps=8, num_stages=1)
    total, normed = pl.pallas_call(kernel, out_shape=out, compiler_params=params, name="add_norm")(x[0], more[0])
    return total[None], normed[None]


def attend(qkv: Any, cache: tuple[Any, Any], place: Any) -> tuple[Any, tuple[Any, Any]]:
    """(attention of the token at `place` `(1, heads * size)`, the cache with its keys and values).

    `qkv` `(1, ...)` holds the queries, keys and values of all heads; `cache` two arrays `(KEYS, positions, HEAD)`,
    which are overwritten.
    """
    positions = cache[0].shape[1]

    def kernel(qkv_ref: Any, keys_ref: Any, values_ref: Any, place_ref: Any, out_ref: Any, *new: Any) -> None:
        group, head = pl.program_id(0), pl.program_id(1)
        lanes, times = jnp.arange(HEAD), jnp.arange(positions)
        index = (group * positions + times)[:, None] * HEAD + lanes[None, :]
        # All reads before any arithmetic: they are what the kernel waits for.
        keys, values = triton.load(keys_ref.at[index]), triton.load(values_ref.at[index])
        at = place_ref[0]

        def own(first: Any) -> Any:
            return triton.load(qkv_ref.at[first * HEAD + lanes])

        query, key, value = own(group * EACH + head), own(HEADS + group), own(HEADS + KEYS + group)
        for ref, latest in zip(new, (key, value), strict=True):
            place = (group * positions + at) * HEAD + lanes
            triton.store(ref.at[place], latest.astype(ref.dtype), mask=jnp.broadcast_to(head == 0, lanes.shape))
        query = query.astype(jnp.float32) / math.sqrt(HEAD)
        # What the cache has at this place is of an earlier use, or just being written: it counts for nothing.
        scores = jnp.sum(keys.astype(jnp.float32) * query[None, :], axis=1)
        scores = jnp.where(times < at, scores, -jnp.inf)
        latest = jnp.sum(key.astype(jnp.float32) * query)
        most = jnp.maximum(jnp.max(scores), latest)
        weights, own_weight = jnp.exp(scores - most), jnp.exp(latest - most)
        mixed = jnp.sum(values.astype(jnp.float32) * weights[:, None], axis=0) + own_weight * value
        mixed = mixed / (jnp.sum(weights) + own_weight)
        triton.store(out_ref.at[(group * EACH + head) * HEAD + lanes], mixed.astype(out_ref.dtype))

    whole = pl.BlockSpec(memory_space=pl.ANY)
    flat = [part.reshape(-1) for part in cache]
    out, *flat = pl.pallas_call(
        kernel,
        grid=(KEYS, EACH),
        in_specs=[whole] * 4,
        out_specs=[whole] * 3,
        out_shape=[jax.ShapeDtypeStruct((HEADS * HEAD,), qkv.dtype)]
        + [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in flat],
        input_output_aliases={1: 1, 2: 2},
        compiler_params=triton.CompilerParams(num_warps=16, num_stages=1),
        name="attend",
    )(qkv[0], *flat, place[None])
    keys, values = (part.reshape(cache[0].shape) for part in flat)
    return out[None], (keys, values)


@jax.jit
def layer(x: Any, more: Any, w: Any, cache: Any, place: Any) -> tuple[Any, Any, Any]:
    """(the residual stream before its last sum, what that adds, the cache); projections of one input are one."""
    dtype = activation_dtype(w)
    x, normed = add_norm(x, more, dtype)
    mixed, cache = attend(normed @ w["qkv"], cache, place)
    x, normed = add_norm(x, mixed @ w["out"], dtype)
    gate, up = jnp.split(normed @ w["up"], 2, axis=-1)
    return x, (jax.nn.silu(gate.astype(jnp.float32)) * up).astype(dtype) @ w["down"], cache


def activation_dtype(w: Any) -> Any:
    return jnp.bfloat16 if isinstance(w["qkv"], jax.Array) else jnp.float16


def plain_layer(x: Any, more: Any, w: Any, cache: Any, place: Any) -> tuple[Any, Any, Any]:
    """`layer` without the kernels above."""

    def normed(x: Any) -> Any:
        some = x.astype(jnp.float32)
        return (some * jax.lax.rsqrt(jnp.mean(some**2, -1, keepdims=True) + EPSILON)).astype(x.dtype)

    x = x + more
    qkv = (normed(x) @ w["qkv"]).reshape((HEADS + 2 * KEYS, HEAD))
    q, k, v = jnp.split(qkv, (HEADS, HEADS + KEYS))
    cache = tuple(
        jax.lax.dynamic_update_slice(part, new[:, None], (0, place, 0))
        for part, new in zip(cache, (k, v), strict=True)
    )
    scores = jnp.einsum("gqd,gtd->gqt", q.reshape((KEYS, EACH, HEAD)), cache[0], preferred_element_type="float32")
    seen = jnp.where(jnp.arange(cache[0].shape[1]) <= place, scores / math.sqrt(HEAD), -jnp.inf)
    mixed = jnp.einsum("gqt,gtd->gqd", jax.nn.softmax(seen), cache[1].astype(jnp.float32)).astype(x.dtype)
    x = x + mixed.reshape((1, -1)) @ w["out"]
    gate, up = jnp.split(normed(x) @ w["up"], 2, axis=-1)
    return x, (jax.nn.silu(gate.astype(jnp.float32)) * up).astype(x.dtype) @ w["down"], cache


SIZES = {
    "qkv": (WIDTH, (HEADS + 2 * KEYS) * HEAD),
    "out": (HEADS * HEAD, WIDTH),
    "up": (WIDTH, 2 * HIDDEN),
    "down": (HIDDEN, WIDTH),
    "head": (WIDTH, VOCABULARY),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def weight(format: Any, name: str, seed: int) -> Any:
    """Random; a quantized one is filled as it lies in memory, which takes no time."""
    key, size = jax.random.key(seed), SIZES[name]
    if format is None:
        return jax.random.normal(key, size, jnp.bfloat16) / math.sqrt(size[0])
    shape = jax.eval_shape(lambda a: prepare(a, "gpu", activations="float16"), format.abstract(size, jnp.bfloat16))

    def fill(leaf: Any) -> Any:
        if leaf.dtype == jnp.uint32:
            return jax.random.bits(key, leaf.shape, jnp.uint32)
        return (jax.random.normal(key, leaf.shape) / (4 * math.sqrt(size[0]))).astype(leaf.dtype)

    return jax.tree.map(fill, shape)


def caches(layers: int, positions: int) -> list[Any]:
    return [tuple(jnp.zeros((KEYS, positions, HEAD), jnp.bfloat16) for _ in range(2)) for _ in range(layers)]


def decoding(steps: int) -> Callable[..., Any]:
    """The program: `steps` steps from a token and a place on, giving the last token and the caches."""

    def step(place: Any, carried: Any, ws: Any, ends: Any) -> Any:
        token, caches = carried
        x, after = ends["embedding"][token][None], []
        more = jnp.zeros_like(x)
        for w, cache in zip(ws, caches, strict=True):
            x, more, cache = layer(x, more, w, cache, place)
            after.append(cache)
        head = ends["head"]
        _, normed = add_norm(x, more, jnp.bfloat16 if isinstance(head, jax.Array) else jnp.float16)
        return jnp.argmax((normed @ head)[0]).astype(jnp.int32), after

    @functools.partial(jax.jit, donate_argnums=3)
    def run(token: Any, ws: Any, ends: Any, caches: Any, start: Any) -> Any:
        # A loop of a known length: XLA then asks the device before no step whether there is another.
        def body(turn: Any, carried: Any) -> Any:
            return step(start + turn, carried, ws, ends)

        return jax.lax.fori_loop(0, steps, body, (token, caches))

    return run


def check(positions: int) -> float:
    """How far one layer is from the same without kernels of its own, after some tokens; relative, in the norm."""
    w = {name: weight(None, name, 0) for name in SIZES if name != "head"}
    states = [caches(1, positions)[0]] * 2
    for place in range(3):
        x, more = (jax.random.normal(jax.random.key(place + some), (1, WIDTH), jnp.bfloat16) for some in (0, 9))
        found = []
        for one, cache in zip((layer, plain_layer), states, strict=True):
            # The kernel overwrites its cache.
            x_out, more_out, after = one(x, more, w, jax.tree.map(jnp.copy, cache), jnp.int32(place))
            found.append((np.asarray(x_out + more_out, np.float64), after))
        states = [after for _, after in found]
    ours, plain = found[0][0], found[1][0]
    return float(np.linalg.norm(ours - plain) / np.linalg.norm(plain))


def decode(add: Callable[[dict[str, Any]], None], programs: tuple[Any, ...], layers: int, positions: int) -> None:
    """Tokens a second. The embedding stays bfloat16."""
    distance = check(positions)
    print(f"a layer is within {distance:.1e} of one without kernels of its own", flush=True)
    if not distance < 0.02:  # noqa: PLR2004
        raise SystemExit("the kernels of this benchmark are wrong on this device")
    steps = positions // 4
    run = decoding(steps)
    embedding, dense = jax.random.normal(jax.random.key(0), (VOCABULARY, WIDTH), jnp.bfloat16), math.inf
    for name, format, head in programs:
        ends = {"embedding": embedding, "head": weight(head, "head", layers)}
        ws = [{kind: weight(format, kind, seed) for kind in SIZES if kind != "head"} for seed in range(layers)]
        token, state = jnp.int32(1), caches(layers, positions)
        start = time.perf_counter()
        token, state = run(token, ws, ends, state, jnp.int32(0))
        jax.block_until_ready(token)
        built = time.perf_counter() - start
        rates = []
        for place in (steps, 2 * steps, 3 * steps):
            start = time.perf_counter()
            token, state = run(token, ws, ends, state, jnp.int32(place))
            jax.block_until_ready(token)
            rates.append(steps / (time.perf_counter() - start))
        rate = max(rates)
        dense = rate if format is None else dense
        add({"decode": name, "tokens_per_second": rate, "times_dense": rate / dense, "seconds_to_build": built})
        del ws, ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="chain,decode")
    parser.add_argument("--only", default="", help="programs whose name holds this, beside dense bfloat16")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument(
        "--positions", type=int, default=256, help="of the cache; a run has a quarter as many steps"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    if jax.default_backend() != "gpu":
        parser.error("there is no GPU here")
    rows = Rows(args.json, {"layers": args.layers, "positions": args.positions}, ())

    def add(row: dict[str, Any]) -> None:
        rows.add(row)
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    programs = tuple(some for some in PROGRAMS if some[0] == "bf16" or args.only in some[0])
    if "chain" in args.parts:
        chain(add, tuple((name, format) for name, format, head in programs if head is None))
    if "decode" in args.parts:
        decode(add, programs, args.layers, args.positions)


if __name__ == "__main__":
    main()
