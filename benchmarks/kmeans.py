"""How long weighted k-means takes for each channel of a matrix, and what Lloyd's iteration gives away.

    python benchmarks/kmeans.py --rows 4096 --width 4096 --bits 4 --sklearn --json out.json
    python benchmarks/kmeans.py --model-8b

A row is an output channel: `--width` weights, importance log-normal with sigma 3, about as concentrated as the
Fisher information of a language model. Tables only; `--model-8b` times all of `kmeans`, packing included, on the
224 matrices of an 8B Llama, each shape's weight drawn once. `--sklearn` runs scikit-learn's KMeans beside it as
the SqueezeLLM code does, one process a core. Costs are sum f d^2, relative to the exact method.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats.codebook import Codebook, lookup, nearest
from jaxq.solvers.kmeans import fit_tables, kmeans

#: (in, out) and how often in each of 32 layers: q and o, k and v, gate and up, down.
LLAMA_8B = {(4096, 4096): 2, (4096, 1024): 2, (4096, 14336): 2, (14336, 4096): 1}
LAYERS = 32


def problem(width: int, rows: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """A weight `(width, rows)` and its importance."""
    keys = jax.random.split(jax.random.key(seed))
    w = jax.random.normal(keys[0], (width, rows)) * 0.02
    return jax.block_until_ready((w, jnp.exp(3 * jax.random.normal(keys[1], w.shape))))


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, dict[str, float]]:
    """The result, compile seconds (first call less a later one) and the seconds after it."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    first = time.perf_counter() - start
    laps = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        laps.append(time.perf_counter() - start)
    median = statistics.median(laps)
    return result, {"s": median, "best_s": min(laps), "compile_s": max(first - median, 0.0)}


@jax.jit
def costs(w: jax.Array, f: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.sum(f * (w - lookup(nearest(w, table), table)) ** 2, axis=0)


def one_row(job: tuple[np.ndarray, np.ndarray, int]) -> np.ndarray:
    """A row as SqueezeLLM's `nuq.py` fits it."""
    from sklearn.cluster import KMeans  # type: ignore[import-not-found]

    w, f, entries = job
    fitted = KMeans(n_clusters=entries, random_state=0, n_init="auto", max_iter=50).fit(
        w[:, None], sample_weight=f
    )
    return np.sort(fitted.cluster_centers_[:, 0])


def sklearn_tables(w: np.ndarray, f: np.ndarray, entries: int) -> tuple[np.ndarray, float]:
    """Tables `(entries, rows)` and seconds, on all cores."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    jobs = [
        (np.ascontiguousarray(w[:, row]), np.ascontiguousarray(f[:, row]), entries) for row in range(w.shape[1])
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(one_row, jobs[: 2 * cores], chunksize=1)
        start = time.perf_counter()
        tables = pool.map(one_row, jobs, chunksize=8)
        return np.stack(tables, axis=1), time.perf_counter() - start


def whole_model(bits: int, method: str, repeats: int) -> dict[str, Any]:
    """Seconds for every linear of Llama 8B, from the median of each shape."""
    shapes, total, compiling = [], 0.0, 0.0
    for (width, rows), times in LLAMA_8B.items():
        w, f = problem(width, rows)
        w = w.astype(jnp.bfloat16)
        _, figures = timed(lambda w=w, f=f: kmeans(w, f, Codebook(bits), method=method), repeats)
        total += LAYERS * times * figures["s"]
        compiling += figures["compile_s"]
        shapes.append({"in": width, "out": rows, "count": LAYERS * times, **figures})
        print(f"  {width:6d} x {rows:6d}  {1e3 * figures['s']:10.1f} ms  x {LAYERS * times}", flush=True)
    print(f"8B model, {method}, {bits} bits: {total:.1f} s, and {compiling:.1f} s of compilation")
    return {"method": method, "bits": bits, "seconds": total, "compile_s": compiling, "shapes": shapes}


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048 if on_cpu else 4096)
    parser.add_argument("--width", type=int, default=576 if on_cpu else 4096)
    parser.add_argument("--bits", type=int, default=3 if on_cpu else 4)
    parser.add_argument("--methods", default="exact,lloyd")
    parser.add_argument("--repeats", type=int, default=3 if on_cpu else 7)
    parser.add_argument("--sklearn", action="store_true", help="scikit-learn beside it, if it is installed")
    parser.add_argument("--sklearn-rows", type=int, default=512)
    parser.add_argument("--model-8b", action="store_true", help="time the 224 matrices of an 8B model")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()

    entries = 2**args.bits
    result: dict[str, Any] = {
        "width": args.width,
        "rows": args.rows,
        "bits": args.bits,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "processor": platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "methods": [],
    }
    methods = args.methods.split(",")
    if args.model_8b:
        result["model_8b"] = [whole_model(args.bits, method, min(args.repeats, 3)) for method in methods]
    else:
        w, f = problem(args.width, args.rows)
        found = {}

        def add(name: str, figures: dict[str, float], rows: int) -> None:
            result["methods"].append({"name": name, "rows_per_second": rows / figures["s"], **figures})
            compiled = f"compile {figures['compile_s']:6.1f} s" if "compile_s" in figures else ""
            print(
                f"{name:20s} {1e3 * figures['s']:10.1f} ms  {rows / figures['s']:10.0f} rows/s  {compiled}",
                flush=True,
            )

        for method in methods:
            table, figures = timed(lambda m=method: fit_tables(w, f, entries, m), args.repeats)
            found[method] = np.asarray(costs(w, f, table))
            add(method, figures, args.rows)
        if args.sklearn and importlib.util.find_spec("sklearn"):
            rows = min(args.sklearn_rows, args.rows)
            table, seconds = sklearn_tables(np.asarray(w)[:, :rows], np.asarray(f)[:, :rows], entries)
            some = costs(w[:, :rows], f[:, :rows], jnp.asarray(table, jnp.float32))
            found["scikit-learn"] = np.asarray(some)
            result["sklearn"] = importlib.import_module("sklearn").__version__
            add("scikit-learn", {"s": seconds}, rows)
        elif args.sklearn:
            print("scikit-learn is not installed")
        for name in [name for name in found if name != "exact" and "exact" in found]:
            ratio = found[name] / found["exact"][: len(found[name])]
            summary = {"mean": ratio.mean(), "median": np.median(ratio), "p95": np.quantile(ratio, 0.95)}
            summary |= {"worst": ratio.max(), "least": ratio.min()}
            result[f"{name} / exact"] = {key: float(value) for key, value in summary.items()}
            print(f"cost {name} / exact: " + ", ".join(f"{key} {value:.4f}" for key, value in summary.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
