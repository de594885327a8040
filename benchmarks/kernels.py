"""Products with quantized weights on this machine's device, against XLA's dense product and a copy of memory.

    python benchmarks/kernels.py --shapes 4096x4096 --batch 1,8 --json benchmarks/results/kernels.json

The same figures as `jaxq bench kernels`, kept with the machine and the versions. Other jobs on the machine slow
both sides of a ratio, though not always alike: the fastest of many interleaved calls counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from jaxq import bench
from jaxq.kernels import native


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096", help="inputs x outputs, comma separated")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--activations", default="float32,bfloat16,int8")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0, help="of the native kernels; 0 for all")
    parser.add_argument("--instruction-set", default="", help="avx2, neon, ...; empty for the best")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()

    if args.threads or args.instruction_set:
        native.configure(args.threads, args.instruction_set)

    def show(row: bench.Row) -> None:
        print(
            f"{row.op:9s} {row.bits} bits  {row.k}x{row.n} m={row.m:<3d} {row.implementation:18s}"
            f"{row.milliseconds:9.3f} ms  {row.speedup_vs_dense:6.2f}x dense"
            f"  {row.share_of_copy_bandwidth:5.0%} of copy  error {row.error:.0e}",
            flush=True,
        )

    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    batches = [int(batch) for batch in args.batch.split(",")]
    rows = bench.kernels(
        shapes,  # type: ignore[arg-type]
        batches,
        activations=args.activations.split(","),
        repeats=args.repeats,
        on_row=show,
    )
    if args.json:
        facts = {
            "device": jax.devices()[0].device_kind,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "native": native.instruction_set() or native.reason(),
            "jax": jax.__version__,
        }
        found = {**facts, "rows": [dataclasses.asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
