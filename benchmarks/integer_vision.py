"""Integer against simulated execution of a vision transformer on Fashion-MNIST: accuracy, logits, time.

    python benchmarks/integer_vision.py --bits 4/4,8/8 --test 1000

Rows say how far the logits of the two are apart, and, beside that, how far those of the simulated model move when
its input is scaled by one unit in the last place: both are activations that cross the edge of a rounding.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq import image_data, models, recipes
from jaxq.models import images


def outputs(fn: Callable[..., Any], params: Any, batches: list[jax.Array]) -> np.ndarray:
    return np.concatenate([np.asarray(fn(params, x)) for x in batches])


def seconds(fns: dict[str, Callable[[], jax.Array]], repeats: int) -> dict[str, float]:
    """The fastest of some calls of each, taken in turn, so that what else the machine does falls on all."""
    best = dict.fromkeys(fns, float("inf"))
    for _ in range(repeats):
        for name, fn in fns.items():
            start = time.perf_counter()
            fn().block_until_ready()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-fashion")
    parser.add_argument("--recipe", default="percentile")
    parser.add_argument("--bits", default="4/4,8/8", help="of weights / activations")
    parser.add_argument("--samples", type=int, default=64, help="calibration images")
    parser.add_argument("--test", type=int, default=1000, help="test images that are scored")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5, help="of the timed batch")
    args = parser.parse_args()

    jax.config.update("jax_default_matmul_precision", "highest")
    model = models.load(args.model)
    train, test = (image_data.load("fashion-mnist", split) for split in ("train", "test"))
    test = test[: args.test]
    prepared = images.prepare(test.images, config=model.config)
    batches = [jnp.asarray(prepared[i : i + args.batch]) for i in range(0, len(test), args.batch)]
    calibration = image_data.batches(image_data.calibration(train, args.samples, 0), model.config, 32)
    for weights, activations in (map(int, pair.split("/")) for pair in args.bits.split(",")):
        recipe = recipes.named(args.recipe, weights=weights, activations=activations)
        params = jaxq.quantize(model.apply, model.params, calibration, recipe).params
        in_float: list[tuple[str, str]] = []
        report = lambda *why, found=in_float: found.append(why)  # noqa: E731
        simulated = jax.jit(jaxq.quantized(model.apply))
        integer = jax.jit(jaxq.quantized(model.apply, report, integer=True))
        want, got = outputs(simulated, params, batches), outputs(integer, params, batches)
        nudged = outputs(simulated, params, [x * (1 + 2**-23) for x in batches])
        top1 = [100 * float(np.mean(np.argmax(y, 1) == test.labels)) for y in (want, got)]
        print(f"W{weights}A{activations} top-1: simulated {top1[0]:.2f} %, integer {top1[1]:.2f} %")
        for name, y in (("integer", got), ("input nudged", nudged)):
            far = np.abs(y - want).max(1)
            print(f"  {name}: logits differ by {far.max():.2g} at most, {np.median(far):.2g} in the median image; "
                  f"{100 * np.mean(far < 1e-4):.0f} % of images below 1e-4")  # fmt: skip
        calls = {
            "float": functools.partial(jax.jit(model.apply), model.params, batches[0]),
            "simulated": functools.partial(simulated, params, batches[0]),
            "integer": functools.partial(integer, params, batches[0]),
        }
        calls["float"]()
        found = ", ".join(f"{name} {s:.3f} s" for name, s in seconds(calls, args.repeats).items())
        load = ", ".join(f"{n:.1f}" for n in os.getloadavg())
        machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, load {load}"
        print(f"  {len(batches[0])} images: {found} ({machine})")
        print(f"  in float: {'; '.join(' '.join(why) for why in in_float) or 'nothing'}", flush=True)


if __name__ == "__main__":
    main()
