"""How long block reconstruction takes: one block, or a whole run with all its steps.

    python benchmarks/reconstruction.py                                    # a DeiT-Small block, 20000 iterations
    python benchmarks/reconstruction.py --depth 12 --recipe aphq-vit       # all of DeiT-Small, W3A3
    python benchmarks/reconstruction.py --model deit_tiny --iterations 1000 --samples 64 --json out.json

Shapes as published (224 x 224 pixels in 197 tokens, unless --image says otherwise); weights and images are random,
on which the time does not depend. A block's time is that of its iterations after the first 500, in which it may be
compiled, in proportion; the median over the blocks in the middle, which are equal.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

import jaxq
from jaxq import recipes
from jaxq.models import vision
from jaxq.steps import ReluMLP

#: Iterations between two messages of a block.
CHUNK = 500
BLOCK = re.compile(r"block (\d+) of \d+, (\d+)/\d+")


def phases(told: list[tuple[float, str]]) -> dict[str, float]:
    """Seconds of each kind of work, by what was told at its start or in it."""
    kinds = (("calibrating", "calibration"), ("MLP", "MLPs"), ("importance", "importance"), ("block", "blocks"))
    spent: dict[str, float] = {}
    before = 0.0
    for seconds, text in told:
        kind = next((name for start, name in kinds if text.startswith(start)), "rest")
        spent[kind] = spent.get(kind, 0.0) + seconds - before
        before = seconds
    return spent


def of_a_block(told: list[tuple[float, str]], iterations: int) -> float:
    """Seconds for all iterations of a block, without compilation."""
    stamps: dict[int, dict[int, float]] = {}
    for seconds, text in told:
        found = BLOCK.match(text)
        if found:
            stamps.setdefault(int(found[1]), {})[int(found[2])] = seconds
    middle = [stamps[n] for n in sorted(stamps)[1:-2]] or [stamps[min(stamps)]]
    rates = [(max(s.values()) - s[CHUNK]) / (max(s) - CHUNK) for s in middle]
    return iterations * statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small", help="a preset of jaxq.models.vision")
    parser.add_argument("--recipe", default="qdrop")
    parser.add_argument("--depth", type=int, default=2, help="blocks of the model; 12 is the whole")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1024, help="calibration images")
    parser.add_argument("--iterations", type=int, default=20000, help="of a block; more than 500")
    parser.add_argument("--weights", type=int, default=3)
    parser.add_argument("--activations", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    if args.iterations <= CHUNK:
        parser.error(f"--iterations must be more than {CHUNK}")

    config = vision.PRESETS[args.model].replace(
        depths=(args.depth,), image_size=args.image, patch_size=args.patch, classes=10, labels=()
    )
    model = vision.build(config, vision.init_params(config, 0, scale=0.02))
    relu = vision.build(config.replace(activation="relu"), model.params)
    rng = np.random.default_rng(0)
    shape = (32, args.image, args.image, config.channels)
    batches = [rng.standard_normal(shape).astype(np.float32) for _ in range(args.samples // 32)]
    recipe = recipes.named(
        args.recipe, weights=args.weights, activations=args.activations, iterations=args.iterations
    )
    student = relu.apply if any(isinstance(step, ReluMLP) for step in recipe.steps) else None

    told: list[tuple[float, str]] = []
    start = time.perf_counter()

    def tell(event: Any) -> None:
        told.append((time.perf_counter() - start, event.path))
        if not BLOCK.match(event.path) or event.path.split(",")[1].strip().startswith(f"{args.iterations}/"):
            print(f"{told[-1][0]:7.1f} s  {event.path}", flush=True)

    jaxq.quantize(model.apply, model.params, batches, recipe, student=student, progress=tell)
    whole = time.perf_counter() - start
    block = of_a_block(told, args.iterations)
    spent = phases([*told, (whole, "rest")])
    device = jax.devices()[0].device_kind
    print(f"\n{device}, {args.model}, {args.depth} blocks, {args.recipe}, {args.samples} images")
    print(f"a block, {args.iterations} iterations of 32 images: {block:.1f} s")
    print(f"the whole run: {whole:.1f} s; " + ", ".join(f"{k} {v:.1f} s" for k, v in spent.items()))
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        versions = {"jax": jax.__version__, "jaxq": jaxq.__version__, "python": platform.python_version()}
        found: dict[str, Any] = {"settings": settings, "device": device, "versions": versions}
        found |= {"block_s": block, "whole_s": whole, "phases_s": spent}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
