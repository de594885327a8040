"""Products with quantized weights on a GPU, against dense bfloat16 and the bandwidth of a copy.

    python benchmarks/kernels_gpu.py --quick --json rows.json          # one product of each kind, a minute
    python benchmarks/kernels_gpu.py --tune --json tuned.json          # searches block sizes (minutes)
    python benchmarks/kernels_gpu.py --json benchmarks/results/h100.json
    python benchmarks/kernels_gpu.py --parts peers --json peers.json

Times are medians on the device, from the profiler, of all kernels that a call launches. Calls take turns over
copies of the weight that no cache holds together, inputs are random, and every output is compared with float64.
Each result is written as soon as it is there. Tuned settings go into the table of the package,
`jaxq/kernels/tuning.json`. `benchmarks/programs_gpu.py` measures whole programs.
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
from collections.abc import Callable
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
    Case(Codebook(4, group_size=128), SQUARE),
    Case(Codebook(3, group_size=128), SQUARE),
    Case(Codebook(2, group_size=64), SQUARE),
    Case(Codebook(3, group_size=128), LARGE),
    Case(Codebook(2, group_size=64), LARGE),
    Case(Codebook(4, group_size=128), SQUARE, 16),
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


def peers(results: Results) -> None:
    """torch's int4 product and bitsandbytes' NF4, where these see the GPU; their outputs are not checked."""
    try:
        import torch
    except ImportError:
        print("torch is not installed: no peers")
        return
    if not torch.cuda.is_available():
        print("torch sees no GPU: no peers")
        return
    sizes, batches = (SMALL[0], SQUARE[0]), (1, 16, 64)
    # Only one of jax and torch can ask the driver for times: jax first.
    dense = {(n, m): 1e6 * dense_seconds((n, n), m) for n in sizes for m in batches}
    for name, make in (("torch int4 g128", torch_int4), ("bitsandbytes NF4 g64", bitsandbytes_nf4)):
        for n in sizes:
            try:
                product, weights = make(n)
            except ImportError as reason:
                print(f"no {name}: {reason}")
                break
            for m in batches:
                x = torch.randn(m, n, dtype=torch.bfloat16, device="cuda")
                us = torch_micros(lambda call: product(x, weights[call % len(weights)]))  # noqa: B023
                row = {"peer": name, "k": n, "n": n, "m": m, "us": us, "times_dense": dense[n, m] / us}
                results.add(row)


def torch_int4(n: int) -> tuple[Callable[[Any, Any], Any], list[Any]]:
    """(product, copies of a weight of n x n)."""
    import torch

    codes = torch.randint(0, 255, (n, n // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randn(n // 128, n, 2, dtype=torch.bfloat16, device="cuda")
    weights = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(torch_copies(n))]
    return lambda x, w: torch.ops.aten._weight_int4pack_mm(x, w, 128, scales), weights


def bitsandbytes_nf4(n: int) -> tuple[Callable[[Any, Any], Any], list[Any]]:
    """(product, copies of a weight of n x n)."""
    import bitsandbytes
    import torch

    weight = torch.randn(n, n, dtype=torch.bfloat16, device="cuda")
    some = [
        bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        for _ in range(torch_copies(n))
    ]
    return lambda x, w: bitsandbytes.matmul_4bit(x, w[0].t(), quant_state=w[1]), some


def torch_copies(n: int) -> int:
    """As many weights of n x n in 4 bits as no cache holds together."""
    return max(3, math.ceil(ROTATED / (n * n // 2)))


def torch_micros(run: Callable[[int], Any], calls: int = 40) -> float:
    """Microseconds on the device of all kernels of a call, by the median of each."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    run(0)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for call in range(calls):
            run(call)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_time and "Memset" not in event.name:
            times.setdefault(event.name, []).append(event.device_time)
    return sum(float(np.median(some)) * round(len(some) / calls) for some in times.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one product of each kind")
    parser.add_argument("--tune", action="store_true", help="search block sizes and write them into the table")
    parser.add_argument("--table", type=Path, default=tuning.SHIPPED, help="the table that --tune writes")
    parser.add_argument("--parts", default="rows", help="of rows and peers")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing new after so long")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", default="", help="formats whose name holds this, such as 'bit planes 3-bit'")
    parser.add_argument("--tokens", default="", help="products of so many tokens alone, such as 1,16")
    parser.add_argument("--try-on-cpu", action="store_true", help="tiny shapes by the reference, without meaning")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    until = time.monotonic() + args.seconds
    results = Results(args.json)
    cases = tuple(case for case in (QUICK if args.quick else CASES) if args.only in str(case.format))
    if args.tokens:
        cases = tuple(case for case in cases if str(case.m) in args.tokens.split(","))
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
    if "peers" in parts:
        peers(results)
    results.write()


if __name__ == "__main__":
    main()
