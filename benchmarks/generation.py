"""Tokens a second of generation from a quantized model, beside llama.cpp on a GGUF file of the same model.

    jaxq quantize smollm2-135m out --recipe benchmarks/four_bits_everywhere.toml
    python benchmarks/generation.py out --gguf smollm2-135m.gguf --llama-python peers/bin/python --json rows.json

`--llama-python` is the interpreter of an environment with the package xllamacpp, which is llama.cpp. Both write
the same number of tokens greedily after the same prompt, in turns; the highest rate of each counts. Rates are
those of new tokens only: the time of the prompt is taken off.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
from peer import Peer

import jaxq
from jaxq import models
from jaxq.cli import sources
from jaxq.kernels import native

PROMPT = "It is a truth universally acknowledged, that a single man in possession of a good fortune"

#: Prints the rate of one generation for each line that it reads.
LLAMA = """
import json, sys
import xllamacpp
path, tokens, threads, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = path, 512, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
for _ in sys.stdin:
    reply = server.handle_completions(
        {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
    )
    reply = json.loads(reply) if isinstance(reply, str) else reply
    print("ANSWER", reply["timings"]["predicted_per_second"], flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="directory that jaxq quantize wrote")
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp")
    parser.add_argument("--llama-python", help="interpreter of an environment with xllamacpp")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    if bool(args.gguf) != bool(args.llama_python):
        parser.error("llama.cpp needs both --gguf and --llama-python")

    native.configure(args.threads)
    opened = sources.open_model(args.out)
    ids = opened.tokenizer.encode(PROMPT)
    ids = list(getattr(ids, "ids", ids))
    in_xla: dict[str, str] = {}
    cases: dict[str, Any] = {
        "jaxq native": jaxq.prepare(opened.model.params, on_fallback=in_xla.__setitem__),
        "jaxq native bfloat16": jaxq.prepare(opened.model.params, activations="bfloat16"),
        "jaxq native int8": jaxq.prepare(opened.model.params, activations="int8"),
        "jaxq xla": opened.model.params,
    }
    for path, why in list(in_xla.items())[:1]:
        print(f"{len(in_xla)} weights have no native kernel, as {path}: {why}")
    language = opened.model.replace(params=None)

    def rate(params: Any) -> float:
        """New tokens a second: those of a long generation less a short one."""
        seconds = []
        for count in (1, args.tokens + 1):
            start = time.perf_counter()
            models.generate(
                language, params, [ids], max_new_tokens=count, temperature=0.0, eos=(), transform=jaxq.quantized
            )
            seconds.append(time.perf_counter() - start)
        return args.tokens / (seconds[1] - seconds[0])

    llama = None
    if args.gguf:
        arguments = [str(args.gguf), str(args.tokens), str(args.threads), PROMPT]
        llama = Peer(args.llama_python, LLAMA, arguments, "xllamacpp, and is the file a GGUF")
    best: dict[str, float] = {}
    for repeat in range(args.repeats + 1):
        found = {name: rate(params) for name, params in cases.items()}
        if llama is not None:
            found["llama.cpp"] = llama.ask()
        if repeat:  # The first compiles.
            best = {name: max(value, best.get(name, 0.0)) for name, value in found.items()}
            print("  ".join(f"{name} {value:.1f}" for name, value in found.items()), flush=True)
    if llama is not None:
        llama.close()
    print("highest: " + "  ".join(f"{name} {value:.1f} tokens/s" for name, value in best.items()))
    if args.json:
        facts = {
            "out": Path(args.out).name,
            "jax": jax.__version__,
            "machine": platform.processor() or platform.machine(),
        }
        facts |= {"instruction_set": native.instruction_set(), "threads": args.threads, "tokens_per_second": best}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
