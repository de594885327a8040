"""Products with quantized weights on a GPU, against dense bfloat16 and the bandwidth of a copy.

    python benchmarks/kernels_gpu.py --quick --json rows.json          # one product of each kind, a minute
    python benchmarks/kernels_gpu.py --tune --json tuned.json          # searches block sizes (minutes)
    python benchmarks/kernels_gpu.py --json benchmarks/results/h100.json
    python benchmarks/kernels_gpu.py --parts chain,decode --json whole.json

Times are medians on the device, from the profiler, of all kernels that a call launches. Calls take turns over
copies of the weight that no cache holds together, inputs are random, and every output is compared with float64.
Each result is written as soon as it is there. Tuned settings go into the table of the package,
`jaxq/kernels/tuning.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.bench import random_array
from jaxq.bench_gpu import (
    BOUND,
    ROTATED,
    Trial,
    copies,
    copy_bandwidth,
    dense_seconds,
    device_seconds,
    error_of,
    exactly,
    save,
    search,
)
from jaxq.formats import BitPlane, Codebook, DenseSparse, Uniform
from jaxq.formats.dense_sparse import DenseSparseArray
from jaxq.formats.prepared import prepare
from jaxq.kernels import tuning

#: (inputs, outputs).
SQUARE, SMALL, LARGE = (8192, 8192), (4096, 4096), (8192, 28672)
U, L, H = Uniform(4, 128), Codebook(4), BitPlane(3, 128)


@dataclasses.dataclass(frozen=True)
class Case:
    """`m` tokens times a weight of `shape`; `target`: times dense that it should be, where one is set."""

    format: Any
    shape: tuple[int, int]
    m: int = 1
    target: float = 0.0
    exact: bool = False


CASES = (
    Case(L, SQUARE, 16, 2.3),
    Case(L, SQUARE, 64, 1.5),
    Case(L, SQUARE, 256, 0.95),
    Case(L, SQUARE, 2048, 0.95),
    Case(U, SQUARE, 1, 3.6),
    Case(L, SQUARE, 1, 3.0),
    Case(Codebook(3), SQUARE, 1, 3.0),
    Case(H, SQUARE, 1, 3.0),
    Case(BitPlane(2, 128), SQUARE, 1, 3.8),
    Case(Codebook(2), SQUARE, 1, 3.8),
    Case(L, SMALL, 1, 2.6),
    Case(U, LARGE, 1, 3.7),
    Case(L, LARGE, 1, 3.3),
    Case(Codebook(3), LARGE, 1, 3.5),
    Case(H, LARGE, 1, 3.5),
    Case(BitPlane(2, 128), LARGE, 1, 4.5),
    Case(Codebook(2), LARGE, 1, 4.5),
    Case(DenseSparse(L, 0.0045, "float16"), SQUARE, 1),
    Case(L, SQUARE, 1, exact=True),
    Case(U, SQUARE, 1, exact=True),
    Case(BitPlane(2, 128), SQUARE, 1, exact=True),
    Case(L, LARGE, 1, 3.3, exact=True),
    Case(L, SMALL, 1, 2.6, exact=True),
    Case(Codebook(3), SQUARE, 1, exact=True),
    Case(Uniform(3, 128), SQUARE),
    Case(Uniform(2, 128), SQUARE),
    Case(Uniform(4, 64), SQUARE),
    Case(BitPlane(4, 128), SQUARE),
    Case(BitPlane(3, 64), SQUARE),
    *(Case(U, SQUARE, m) for m in (16, 64, 256, 2048)),
    Case(H, SQUARE, 16),
    Case(BitPlane(2, 128), SQUARE, 16),
    Case(L, SMALL, 16),
    Case(L, LARGE, 16),
    Case(L, SQUARE, 512),
    Case(U, SMALL),
    Case(H, SMALL),
    Case(BitPlane(2, 128), SMALL),
)

QUICK = tuple(
    Case(format, SMALL, m, exact=exact)
    for format, m, exact in (
        *((Uniform(bits, 128), 1, False) for bits in (4, 3, 2)),
        *((Codebook(bits), 1, False) for bits in (4, 3, 2)),
        *((BitPlane(bits, 128), 1, False) for bits in (4, 3, 2)),
        (DenseSparse(L, 0.0045, "float16"), 1, False),
        (L, 1, True),
        (H, 1, True),
        (L, 16, False),
        (U, 16, False),
    )
)


#: What whole programs are measured with, and decoding steps whose head is quantized too.
WHOLE = (("bf16", None), ("codebook 4", L), ("planes 2", BitPlane(2, 128)), ("uniform 4", U))
HEADS_TOO = (("codebook 4, head too", L, L), ("planes 2, head codebook 4", BitPlane(2, 128), L))


class Results:
    """Rows that are printed and written as they come."""

    def __init__(self, path: Path | None):
        self.path = path
        self.facts: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": []}

    def add(self, row: dict[str, Any]) -> None:
        self.facts["rows"].append(row)
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.facts, indent=1) + "\n")


@functools.lru_cache(maxsize=2)
def canonical(format: Any, shape: tuple[int, int]) -> Any:
    """A random quantized array, with an overlay if the format has one."""
    if not isinstance(format, DenseSparse):
        return random_array(format, *shape)
    base = random_array(format.base, *shape)
    (in_size, out_size), entries = shape, format.entries(*shape)
    rng = np.random.default_rng(2)
    counts = np.bincount(rng.integers(0, out_size, entries), minlength=out_size).astype(np.uint16)
    rows = np.concatenate([np.sort(rng.choice(in_size, count, replace=False)) for count in counts])
    values = rng.normal(size=entries).astype(format.value_dtype)
    starts = (np.cumsum(counts, dtype=np.uint32) - counts).astype(np.uint32)
    overlay = [jnp.asarray(z) for z in (rows.astype(np.uint16), values, starts, counts)]
    return DenseSparseArray(base, *overlay, format, base.layout, "float32")


def measured(case: Case, copy: float) -> dict[str, Any]:
    """A row: the product as users call it, with the settings of the table."""
    array = canonical(case.format, case.shape)
    weight = prepare(array, "gpu", activations="float32" if case.exact else "float16")
    x = jax.random.normal(jax.random.key(case.m), (case.m, case.shape[0]), jnp.float16)
    product = jax.jit(lambda x, w: x @ w)
    start = time.perf_counter()
    y = product(x, weight)
    if case.exact and jax.default_backend() == "gpu":
        # Rounded to the dtype of x the result would say nothing of the sums.
        y = jax.jit(lambda x, w: w.kernel.product(x, w, exact=True))(x, weight)
    built = time.perf_counter() - start
    error = error_of(y, exactly(x, array))
    seconds = device_seconds(product, [(x, w) for w in copies(weight)])
    dense = dense_seconds(case.shape, case.m)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    return {
        "op": case.format.name,
        "format": str(case.format),
        "k": case.shape[0],
        "n": case.shape[1],
        "m": case.m,
        "sums": "float32" if case.exact else "float16",
        "us": 1e6 * seconds,
        "dense_us": 1e6 * dense,
        "times_dense": dense / seconds,
        "target": case.target,
        "share_of_copy": size / seconds / copy,
        "error": error,
        "sound": error <= BOUND[case.exact],
        "seconds_to_build": built,
    }


def tune(cases: tuple[Case, ...], results: Results, table: Path, until: float) -> None:
    """Cases with a target first, of those 8192 x 8192; then other shapes, with what was best for that one."""
    best: dict[Any, list[Any]] = {}
    some = [case for case in cases if not isinstance(case.format, DenseSparse)]
    some.sort(key=lambda case: (case.target == 0, case.m > 64, case.shape != SQUARE, case.m, case.exact))
    for case in some:
        if time.monotonic() > until:
            print(f"no time for {case}")
            continue
        key = (case.format, case.m, case.exact)
        tried = best[key][:6] if key in best else None
        about = {
            "tune": str(case.format),
            "k": case.shape[0],
            "n": case.shape[1],
            "m": case.m,
            "exact": case.exact,
        }

        def show(trial: Trial, about: dict[str, Any] = about) -> None:
            outcome = {"failed": trial.failed} if trial.failed else {"us": 1e6 * trial.seconds}
            results.add({**about, **dataclasses.asdict(trial.settings), **outcome})

        order = search(canonical(case.format, case.shape), case.m, case.exact, tried, show)
        if order:
            best.setdefault(key, [trial.settings for trial in order])
            save(table, case.format, case.shape, case.m, case.exact, order[0].settings)


def steady(tree: Any, size: int) -> Any:
    """A quantized array scaled so that a product with it keeps the size of activations."""
    rms = float(jnp.sqrt(jnp.mean(tree.matrix(jnp.float32) ** 2)))

    def scaled(leaf: Any) -> Any:
        continuous = jnp.issubdtype(leaf.dtype, jnp.floating)
        return (leaf / (rms * math.sqrt(size))).astype(leaf.dtype) if continuous else leaf

    return jax.tree.map(scaled, tree)


def chain(results: Results) -> None:
    """128 dependent products of one token with 4096 x 4096 weights in one program, by the clock of the wall."""
    calls, links = 20, 128

    @jax.jit
    def link(x: Any, w: Any) -> Any:
        return x @ w

    @jax.jit
    def run(x: Any, ws: list[Any]) -> Any:
        for place in range(links):
            x = link(x, ws[place % len(ws)])
        return x

    found = {}
    for name, format in WHOLE:
        x = jax.random.normal(jax.random.key(0), (1, SMALL[0]), jnp.bfloat16 if format is None else jnp.float16)
        if format is None:
            ws = copies(jax.random.normal(jax.random.key(1), SMALL, jnp.bfloat16) / math.sqrt(SMALL[0]))
        else:
            array = steady(random_array(format, *SMALL), SMALL[0])
            ws = copies(prepare(array, "gpu", activations="float16"))
        jax.block_until_ready(run(x, ws))
        least = math.inf
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(calls):
                y = run(x, ws)
            jax.block_until_ready(y)
            least = min(least, (time.perf_counter() - start) / calls / links)
        found[name] = least
        device = device_seconds(run, [(x, ws)], 10) / links
        ratio = found["bf16"] / least
        results.add({"chain": name, "wall_us": 1e6 * least, "device_us": 1e6 * device, "times_dense": ratio})


#: Llama-3.1-8B: width, layers, heads of queries and of keys, size of a head, hidden width, vocabulary.
WIDTH, LAYERS, HEADS, KEYS, HEAD, HIDDEN, VOCABULARY = 4096, 32, 32, 8, 128, 14336, 128256


def decode(
    results: Results, layers: int = LAYERS, positions: int = 256, formats: Any = (*WHOLE, *HEADS_TOO)
) -> None:
    """Tokens a second of steps of the shape of Llama-3.1-8B, batch 1, random weights, all steps in one program.

    Projections that share an input are one (q, k and v; gate and up). The embedding stays bfloat16, and the head
    where no format is given for it.
    """
    sizes = {
        "qkv": (WIDTH, (HEADS + 2 * KEYS) * HEAD),
        "out": (HEADS * HEAD, WIDTH),
        "up": (WIDTH, 2 * HIDDEN),
        "down": (HIDDEN, WIDTH),
        "head": (WIDTH, VOCABULARY),
    }

    def normed(x: Any) -> Any:
        some = x.astype(jnp.float32)
        return (some * jax.lax.rsqrt(jnp.mean(some**2, -1, keepdims=True) + 1e-5)).astype(x.dtype)

    @jax.jit
    def layer(x: Any, w: Any, cache: Any, place: Any) -> Any:
        qkv = normed(x) @ w["qkv"]
        q, k, v = jnp.split(qkv.reshape((HEADS + 2 * KEYS, HEAD)), (HEADS, HEADS + KEYS))
        cache = jax.lax.dynamic_update_slice(cache, jnp.stack([k, v])[:, :, None], (0, 0, place, 0))
        scores = jnp.einsum("gqd,gtd->gqt", q.reshape((KEYS, -1, HEAD)), cache[0]) / math.sqrt(HEAD)
        seen = jnp.where(jnp.arange(positions) <= place, scores.astype(jnp.float32), -jnp.inf)
        mixed = jnp.einsum("gqt,gtd->gqd", jax.nn.softmax(seen).astype(x.dtype), cache[1])
        x = x + mixed.reshape((1, -1)) @ w["out"]
        gate, up = jnp.split(normed(x) @ w["up"], 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ w["down"], cache

    def step(place: Any, carried: Any, ws: Any, ends: Any) -> Any:
        token, caches = carried
        x = ends["embedding"][token][None]
        after = []
        for w, cache in zip(ws, caches, strict=True):
            x, cache = layer(x, w, cache, place)
            after.append(cache)
        return jnp.argmax((normed(x) @ ends["head"])[0]).astype(jnp.int32), after

    @functools.partial(jax.jit, donate_argnums=3)
    def run(token: Any, ws: Any, ends: Any, caches: Any, start: Any) -> Any:
        body = functools.partial(step, ws=ws, ends=ends)
        return jax.lax.fori_loop(start, start + steps, body, (token, caches))

    def weight(format: Any, name: str, seed: int) -> Any:
        key, size = jax.random.key(seed), sizes[name]
        if format is None:
            return jax.random.normal(key, size, jnp.bfloat16) / math.sqrt(size[0])
        shape = jax.eval_shape(
            lambda a: prepare(a, "gpu", activations="float16"), format.abstract(size, jnp.bfloat16)
        )

        def fill(leaf: Any) -> Any:
            if leaf.dtype == jnp.uint8:
                return jax.random.bits(key, leaf.shape, jnp.uint8) & 15
            if leaf.dtype == jnp.uint32:
                return jax.random.bits(key, leaf.shape, jnp.uint32)
            return (jax.random.normal(key, leaf.shape) / (4 * math.sqrt(size[0]))).astype(leaf.dtype)

        return jax.tree.map(fill, shape)

    steps = positions // 4
    embedding, base = jax.random.normal(jax.random.key(0), (VOCABULARY, WIDTH), jnp.bfloat16), None
    for name, format, *head in formats:
        fill = jax.jit(weight, static_argnums=(0, 1))
        ends = {"embedding": embedding, "head": fill(head[0] if head else None, "head", layers)}
        ws = [{kind: fill(format, kind, seed) for kind in sizes if kind != "head"} for seed in range(layers)]
        caches = [jnp.zeros((2, KEYS, positions, HEAD), jnp.bfloat16) for _ in range(layers)]
        token = jnp.int32(1)
        start = time.perf_counter()
        token, caches = run(token, ws, ends, caches, jnp.int32(0))
        jax.block_until_ready(token)
        built = time.perf_counter() - start
        rates = []
        for place in (steps, 2 * steps, 3 * steps):
            start = time.perf_counter()
            token, caches = run(token, ws, ends, caches, jnp.int32(place))
            jax.block_until_ready(token)
            rates.append(steps / (time.perf_counter() - start))
        rate = max(rates)
        base = base or rate
        results.add(
            {"decode": name, "tokens_per_second": rate, "times_dense": rate / base, "seconds_to_build": built}
        )
        del ws, ends


def peers(results: Results) -> None:
    """The int4 product of torch, groups of 128, where torch sees the GPU; its outputs are not checked."""
    try:
        import torch
        from torch.profiler import ProfilerActivity, profile
    except ImportError:
        print("torch is not installed: no peers")
        return
    if not torch.cuda.is_available():
        print("torch sees no GPU: no peers")
        return
    aten, calls = torch.ops.aten, 40
    for n in (SMALL[0], SQUARE[0]):
        codes = torch.randint(0, 255, (n, n // 2), dtype=torch.uint8, device="cuda")
        scales = torch.randn(n // 128, n, 2, dtype=torch.bfloat16, device="cuda")
        count = max(3, math.ceil(ROTATED / codes.numel()))
        weights = [aten._convert_weight_to_int4pack(codes, 8) for _ in range(count)]
        for m in (1, 16, 64):
            x = torch.randn(m, n, dtype=torch.bfloat16, device="cuda")
            aten._weight_int4pack_mm(x, weights[0], 128, scales)
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                for call in range(calls):
                    aten._weight_int4pack_mm(x, weights[call % count], 128, scales)
                torch.cuda.synchronize()
            times = [
                event.device_time for event in seen.events() if event.device_time and "Memset" not in event.name
            ]
            dense = 1e6 * dense_seconds((n, n), m)
            middle = float(np.median(times))
            results.add(
                {"peer": "torch int4 g128", "k": n, "n": n, "m": m, "us": middle, "times_dense": dense / middle}
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one product of each kind")
    parser.add_argument("--tune", action="store_true", help="search block sizes and write them into the table")
    parser.add_argument("--table", type=Path, default=tuning.SHIPPED, help="the table that --tune writes")
    parser.add_argument("--parts", default="rows", help="of rows, chain, decode and peers")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing new after so long")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", default="", help="formats whose name holds this, such as 'bit planes 3-bit'")
    parser.add_argument("--try-on-cpu", action="store_true", help="tiny shapes by the reference, without meaning")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    until = time.monotonic() + args.seconds
    results = Results(args.json)
    cases = tuple(case for case in (QUICK if args.quick else CASES) if args.only in str(case.format))
    if args.try_on_cpu:
        cases = tuple(dataclasses.replace(case, shape=(512, 16)) for case in cases if case.m < 256)
    elif jax.default_backend() != "gpu":
        parser.error("there is no GPU here; --try-on-cpu tries the program")
    if args.tune:
        tune(cases, results, args.table, until)
        return
    parts = args.parts.split(",")
    if "rows" in parts:
        copy = results.facts["copy_bytes_per_second"] = copy_bandwidth()
        print(f"copy {copy / 1e9:.0f} GB/s", flush=True)
        for case in cases:
            if time.monotonic() > until:
                print(f"no time for {case}")
                continue
            try:
                results.add(measured(case, copy))
            except Exception as reason:  # The other rows are worth having.
                results.add({"format": str(case.format), "m": case.m, "failed": repr(reason)[:400]})
    if "chain" in parts:
        chain(results)
    if "decode" in parts:
        decode(results)
    if "peers" in parts:
        peers(results)
    results.write()


if __name__ == "__main__":
    main()
