"""How long GPTQ takes, and how well it does, on whatever device JAX finds.

    python benchmarks/solvers.py --width 4096 --json out.json

Times everything after the Hessian: damping, factorization, the walk, packing. The matrix is square, 4-bit in
groups of 128 by default, the Hessian that of correlated inputs. Beside it: round to nearest, a plain NumPy
float64 GPTQ on the same machine's CPU, and, where `qwix` is installed, that library's contrib GPTQ (run as
its own driver runs it: op by op; compile time grows with the width). Objectives are tr((W-Q)^T H (W-Q)) in
float64, relative to round to nearest on the same grid.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
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

from jaxq.formats.uniform import Uniform
from jaxq.solvers.gptq import gptq
from jaxq.solvers.rtn import rtn


def problem(width: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """A weight and the Hessian of 4 x width tokens whose channels share a few strong directions."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shared = jax.random.normal(keys[0], (4 * width, width // 16))
    x = shared @ jax.random.normal(keys[1], (width // 16, width)) / 4
    strength = jax.random.uniform(keys[3], (width,), minval=0.3, maxval=2.0)
    x = (x + jax.random.normal(keys[2], x.shape)) * strength
    hessian = jnp.matmul(x.T, x, precision="highest") / x.shape[0]
    return jax.block_until_ready((jax.random.normal(keys[4], (width, width)), hessian))


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, dict[str, float]]:
    """The result, compile seconds (first call less a later one) and median milliseconds after it."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    first = time.perf_counter() - start
    laps = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        laps.append(time.perf_counter() - start)
    median = statistics.median(laps)
    return result, {"ms": 1e3 * median, "best_ms": 1e3 * min(laps), "compile_s": max(first - median, 0.0)}


def objective(w: np.ndarray, dense: Any, hessian: np.ndarray) -> float:
    difference = np.asarray(w, np.float64) - np.asarray(dense, np.float64)
    return float(np.sum(difference * (np.asarray(hessian, np.float64) @ difference)))


def plain_gptq(w: np.ndarray, hessian: np.ndarray, bits: int, group: int, block: int = 128) -> np.ndarray:
    """Algorithm 1 of Frantar et al. 2023 in NumPy float64, rows being inputs, with its lazy update."""
    work, hessian = np.array(w, np.float64), np.array(hessian, np.float64)
    rows, levels = len(work), 2**bits - 1
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(rows)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    dense = np.zeros_like(work)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        errors = np.zeros((stop - start, work.shape[1]))
        for row in range(start, stop):
            if row % group == 0:
                piece = work[row : row + group]
                low, high = np.minimum(piece.min(0), 0), np.maximum(piece.max(0), 0)
                scale = (high - low) / levels
                zero = np.round(-low / scale)
            dense[row] = (np.clip(np.round(work[row] / scale) + zero, 0, levels) - zero) * scale
            error = (work[row] - dense[row]) / upper[row, row]
            work[row:stop] -= upper[row, row:stop, None] * error
            errors[row - start] = error
        work[stop:] -= upper[start:stop, stop:].T @ errors
    return dense


def qwix_gptq(w: jax.Array, hessian: jax.Array, bits: int, group: int) -> Callable[[], Any]:
    """Qwix's contrib GPTQ on the same matrix, symmetric (its asymmetric path fails on arrays)."""
    from qwix._src.core import qarray  # type: ignore[import-not-found]
    from qwix.contrib import gptq_core  # type: ignore[import-not-found]

    how = qarray.HowToQuantize(qtype=f"int{bits}", channelwise_axes=[0], tiled_axes={1: group})

    def solve() -> jax.Array:
        return qarray.dequantize(gptq_core.quantize_weight(w.T, hessian, how)[0]).T

    return solve


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024 if on_cpu else 4096)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5 if on_cpu else 20)
    parser.add_argument("--skip-numpy", action="store_true", help="leave out the float64 comparison")
    parser.add_argument("--skip-qwix", action="store_true", help="leave out Qwix even if it is installed")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()

    w, hessian = problem(args.width)
    format = Uniform(args.bits, args.group_size)
    symmetric = Uniform(args.bits, args.group_size, symmetric=True)
    host_w, host_hessian = np.asarray(w), np.asarray(hessian)
    nearest, rtn_figures = timed(lambda: rtn(w, format), args.repeats)
    base = {
        format: objective(host_w, nearest.matrix(), host_hessian),
        symmetric: objective(host_w, rtn(w, symmetric).matrix(), host_hessian),
    }
    rows: list[dict[str, Any]] = []

    def add(name: str, grid: Uniform, dense: Any, figures: dict[str, float]) -> None:
        score = objective(host_w, dense, host_hessian)
        relative = score / base[grid]
        rows.append({"name": name, "grid": str(grid), **figures, "objective": score, "over_rtn": relative})
        compiled = f"compile {figures['compile_s']:6.2f} s" if "compile_s" in figures else ""
        print(f"{name:30s} {figures['ms']:10.2f} ms  {compiled:18s} objective/RTN {relative:.4f}", flush=True)

    for name, settings in {
        "jaxq gptq": {},
        "jaxq gptq, static groups": {"groups": "static"},
        "jaxq gptq, activation order": {"order": "activation"},
        "jaxq gptq, mse range": {"range": "mse"},
    }.items():
        q, figures = timed(lambda s=settings: gptq(w, hessian, format, **s), args.repeats)
        add(name, format, q.matrix(), figures)
    q, figures = timed(lambda: gptq(w, hessian, symmetric), args.repeats)
    add("jaxq gptq, symmetric", symmetric, q.matrix(), figures)
    add("jaxq rtn", format, nearest.matrix(), rtn_figures)
    ratio = None
    if not args.skip_numpy:
        dense, figures = timed(lambda: plain_gptq(host_w, host_hessian, args.bits, args.group_size), 1)
        add("numpy float64 gptq (CPU)", format, dense, {"ms": figures["ms"]})
        ratio = figures["ms"] / rows[0]["ms"]
        print(f"numpy / jaxq: {ratio:.1f}")
    if not args.skip_qwix and importlib.util.find_spec("qwix"):
        dense, figures = timed(qwix_gptq(w, hessian, args.bits, args.group_size), 1)
        add("qwix contrib gptq, symmetric", symmetric, dense, figures)

    result = {
        "width": args.width,
        "bits": args.bits,
        "group_size": args.group_size,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "jax": jax.__version__,
        "numpy_over_jaxq": ratio,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
