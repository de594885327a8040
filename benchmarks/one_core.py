"""Products with quantized weights on one core, beside those of ggml.

    python benchmarks/one_core.py --ggml-python peers/bin/python --json benchmarks/results/one_core.json

`--ggml-python` is the interpreter of an environment with the packages ggml-py and numpy. Both run on the same
core, in turns; the fastest of many calls counts. Calls take turns over copies of the weight that no cache holds
together. ggml rounds activations to 8 bits; jaxq's plain rows lose no more than float32 sums do, those that say
bfloat16 or int8 round too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
from peer import Peer

from jaxq import bench
from jaxq.formats import BitPlane, Codebook, Uniform
from jaxq.kernels import native

#: A format and the types of ggml that are about as large.
PEERS = (
    (Codebook(4), ("IQ4_NL",)),
    (Uniform(4, 128), ("Q4_0", "Q4_K")),
    (BitPlane(3, 128), ("Q3_K",)),
    (BitPlane(2, 128), ("Q2_K",)),
)

#: Answers each line "type m" with the least seconds of a product and its error.
GGML = """
import ctypes, sys, time
import ggml
import numpy as np
size, copies, repeats = int(sys.argv[1]), 12, 24
w = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
for line in sys.stdin:
    name, m = line.split()
    kind, m = getattr(ggml, "GGML_TYPE_" + name), int(m)
    room = ggml.ggml_init_params(mem_size=(copies + 2) * size * size, mem_buffer=None, no_alloc=False)
    context = ggml.ggml_init(room)
    weights = [ggml.ggml_new_tensor_2d(context, kind, size, size) for _ in range(copies)]
    data = [ggml.ggml_get_data(weight) for weight in weights]
    ggml.ggml_quantize_chunk(kind, w.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), data[0], 0, size, size, None)
    for other in data[1:]:
        ctypes.memmove(other, data[0], ggml.ggml_nbytes(weights[0]))
    x = np.random.default_rng(1).normal(size=(m, size)).astype(np.float32)
    operand = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_F32, size, m)
    ctypes.memmove(ggml.ggml_get_data(operand), x.ctypes.data, x.nbytes)
    results, graphs = [ggml.ggml_mul_mat(context, weight, operand) for weight in weights], []
    for result in results:
        graphs.append(ggml.ggml_new_graph(context))
        ggml.ggml_build_forward_expand(graphs[-1], result)
    least = float("inf")
    for call in range(repeats):
        start = time.perf_counter()
        ggml.ggml_graph_compute_with_ctx(context, graphs[call % copies], 1)
        least = min(least, time.perf_counter() - start)
    y = ctypes.cast(ggml.ggml_get_data(results[0]), ctypes.POINTER(ctypes.c_float))
    y, dense = np.ctypeslib.as_array(y, (m, size)), x @ w.T
    print("ANSWER", least, np.linalg.norm(y - dense) / np.linalg.norm(dense), flush=True)
    ggml.ggml_free(context)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml-python", required=True, help="interpreter of an environment with ggml-py")
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    native.configure(1)
    batches = [int(size) for size in args.batch.split(",")]
    peer = Peer(args.ggml_python, GGML, [str(args.size)], "ggml-py and numpy")
    least: dict[tuple[str, int], float] = {}

    def keep(name: str, m: int, milliseconds: float) -> None:
        least[name, m] = min(milliseconds, least.get((name, m), float("inf")))

    for _ in range(args.rounds):
        for format, types in PEERS:
            shapes = [(args.size, args.size)]
            for row in bench.kernels(
                shapes, batches, [format], activations=("float32", "bfloat16", "int8"), repeats=16
            ):
                if row.implementation != "xla":
                    keep(f"{format}, {row.implementation}", row.m, row.milliseconds)
            for m in batches:
                for name in types:
                    keep(name, m, 1e3 * peer.ask(f"{name} {m}"))
    peer.close()
    rows = []
    for format, types in PEERS:
        mine = [name for name, m in least if name.startswith(f"{format}, ") and m == batches[0]]
        for m in batches:
            for name in mine:
                row = {"format": name, "m": m, "milliseconds": least[name, m]}
                row |= {f"times {other}": least[other, m] / least[name, m] for other in types}
                rows.append(row)
                print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if args.json:
        facts = {"jax": jax.__version__, "instruction_set": native.instruction_set(), "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
