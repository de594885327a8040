"""Perplexity and true bits per weight of every method on a real language model, the float model beside them.

    python benchmarks/quality.py --model smollm2-135m-offgrid --bits 2,3,4 --json out.json

All methods see the same calibration windows of one text and are measured on two others. Rows that OUT.json has
already are not run again, so an interrupted run goes on where it stopped. Uniform methods get groups that cost at
least as many bits as the tables of the others (docs/results.md shows the sizes).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from rows import Rows

import jaxq
from jaxq import data, evaluate, losses, models, recipes

GROUPS = {2: 128, 3: 128, 4: 64}
SPARSITY = 0.0045

#: Inputs that share a table where tables have groups: 1/2, 1 and 2 bits a weight for float16 entries.
TABLES = 128

#: {name in the table: (recipe, settings)}, in the order of the table.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {}),
    "kmeans": ("kmeans", {}),
    "kmeans, groups": ("kmeans", {"group_size": TABLES}),
    "squeezellm, lloyd": ("squeezellm", {"method": "lloyd"}),
    "squeezellm": ("squeezellm", {}),
    "squeezellm, groups": ("squeezellm", {"group_size": TABLES}),
    "squeezellm + 0.45%": ("squeezellm", {"sparsity": SPARSITY}),
    "lnq": ("lnq", {}),
    "lnq, fisher start": ("lnq", {"importance": "fisher"}),
    "lnq + 0.45%": ("lnq", {"sparsity": SPARSITY}),
    "guided": ("guided", {"stream": "float"}),
    "guided, stream": ("guided", {"stream": "quantized"}),
    "guided + 0.45%": ("guided", {"stream": "float", "sparsity": SPARSITY}),
    "guided, stream + 0.45%": ("guided", {"stream": "quantized", "sparsity": SPARSITY}),
}


def recipe_of(method: str, bits: int) -> jaxq.Recipe:
    name, settings = METHODS[method]
    if name in ("rtn", "gptq"):
        settings = settings | {"group_size": GROUPS.get(bits, 64)}
    return recipes.named(name, bits=bits, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-offgrid")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument(
        "--methods", default="all", help=f"of: {'; '.join(METHODS).replace('%', '%%')} (separated by ;)"
    )
    parser.add_argument("--calibration", default="handbook")
    parser.add_argument("--texts", default="austen,essays")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2, help="calibration windows at a time")
    parser.add_argument("--windows", type=int, default=20, help="windows of each text that are scored")
    parser.add_argument("--json", type=Path, help="write rows here, one run after another")
    args = parser.parse_args()

    model = models.load(args.model)
    text = data.split(data.read_text(data.corpus(args.calibration)))[0]
    tokens = data.calibration(text, model.tokenizer, args.samples, args.seq_len, seed=0)
    batches = [tokens[i : i + args.batch] for i in range(0, args.samples, args.batch)]
    held_out = {name: data.split(data.read_text(data.corpus(name)))[1] for name in args.texts.split(",")}
    windows = {
        name: data.windows(text, model.tokenizer, args.seq_len, args.windows) for name, text in held_out.items()
    }

    def measure(params: Any) -> dict[str, float]:
        return {n: evaluate.perplexity(model.apply, params, w)["perplexity"] for n, w in windows.items()}

    settings = {k: getattr(args, k) for k in ("model", "calibration", "samples", "seq_len", "batch", "windows")}
    rows = Rows(args.json, settings, ("method", "bits"))

    def add(row: dict[str, Any]) -> None:
        rows.add(row)
        shown = "  ".join(f"{n} {p:10.3f}" for n, p in row["perplexity"].items())
        print(
            f"{row['method']:20s} {row['bits']:2d} bits  {row['bits_per_weight']:6.3f} b/w  {shown}  "
            f"{row['seconds']:6.1f} s  error {row['error']:.4f}",
            flush=True,
        )

    if ("float32", 32) not in rows:
        figures = {"perplexity": measure(model.params), "seconds": 0.0, "error": 0.0}
        add({"method": "float32", "bits": 32, "bits_per_weight": 32.0, **figures})
    chosen = list(METHODS) if args.methods == "all" else [m.strip() for m in args.methods.split(";")]
    for bits in map(int, args.bits.split(",")):
        for method in chosen:
            if (method, bits) in rows:
                continue
            start = time.perf_counter()
            result = jaxq.quantize(
                model.apply, model.params, batches, recipe_of(method, bits), loss=losses.next_token
            )
            seconds = time.perf_counter() - start
            report = result.report
            figures = {"perplexity": measure(result.params), "seconds": seconds, "error": report.error}
            add({"method": method, "bits": bits, "bits_per_weight": report.bits_per_weight, **figures})


if __name__ == "__main__":
    main()
