"""Accuracy on Fashion-MNIST of every recipe for vision transformers, the float model beside them.

    python benchmarks/quality_vision.py --model vit-fashion --bits 3/3,4/4 --seeds 0,1,2 --json out.json

A seed draws the calibration images and everything random of a recipe; all methods see the same images of a seed,
and are scored on all test images. Rows that OUT.json has already are not run again, so an interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from rows import Rows

import jaxq
from jaxq import evaluate, image_data, models, recipes
from jaxq.models import images, vision
from jaxq.steps import ReluMLP

#: {name in the table: (recipe, settings)}, in the order of the table.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "min-max": ("percentile", {"search": "minmax"}),
    "percentile": ("percentile", {}),
    "repq-vit": ("repq-vit", {}),
    "mse": ("qdrop", {}),
    "brecq": ("brecq", {}),
    "ph": ("qdrop", {"loss": "ph"}),
    "aph": ("qdrop", {"loss": "aph"}),
    "mean square": ("qdrop", {"loss": "hessian"}),
    "aph + mr": ("aphq-vit", {}),
    "mse + mr": ("aphq-vit", {"loss": "mse"}),
    "fima": ("qdrop", {"loss": "fima"}),
    "least squares": ("qdrop", {"loss": "least_squares"}),
    "global": ("qdrop", {"loss": "global"}),
    "global + mr": ("aphq-vit", {"loss": "global"}),
    "aph + rotation": ("jaxq-vit", {"relu": False, "rotate": True, "whole_iterations": 0}),
    "i&s, log": ("ias-vit", {"softmax": "log"}),
    "i&s, uniform": ("ias-vit", {"softmax": "uniform"}),
    "i&s, nothing trained": ("ias-vit", {"stages": 0}),
    "i&s, last stage": ("ias-vit", {"stages": 2}),
    "i&s": ("ias-vit", {}),
    "mse, then together": ("jaxq-vit", {"relu": False, "loss": "mse"}),
    "aph, then together": ("jaxq-vit", {"relu": False}),
    "jaxq-vit": ("jaxq-vit", {}),
}

#: Recipes whose length is theirs, not that of the table.
OWN_LENGTH = ("ias-vit",)


def recipe_of(method: str, weights: int, activations: int, iterations: int) -> jaxq.Recipe:
    name, settings = METHODS[method]
    recipe = recipes.named(name, weights=weights, activations=activations, **settings)
    if name not in OWN_LENGTH and any(step.name in ("reconstruct", "relu_mlp") for step in recipe.steps):
        settings = settings | {"iterations": iterations}
        recipe = recipes.named(name, weights=weights, activations=activations, **settings)
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-fashion")
    parser.add_argument("--bits", default="3/3", help="of weights / activations, such as 3/3,4/4,6/6")
    parser.add_argument("--methods", default="all", help=f"of: {'; '.join(METHODS)} (separated by ;)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--samples", type=int, default=1024, help="calibration images")
    parser.add_argument("--iterations", type=int, default=20000, help="of a block, where a recipe trains rounding")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--test", type=int, default=10000, help="test images that are scored")
    parser.add_argument("--json", type=Path, help="write rows here, one run after another")
    args = parser.parse_args()

    model = models.load(args.model)
    train, test = (image_data.load("fashion-mnist", split) for split in ("train", "test"))
    test = test[: args.test]
    prepare = functools.partial(images.prepare, config=model.config)
    relu = vision.build(model.config.replace(activation="relu"), model.params, model.source)

    def score(apply: Any, params: Any) -> float:
        with jax.default_matmul_precision("highest"):
            return float(evaluate.top1(apply, params, test.images, test.labels, prepare=prepare)["top1"])

    settings = {k: getattr(args, k) for k in ("model", "samples", "iterations", "test")}
    rows = Rows(args.json, settings, ("method", "weights", "activations", "seed"))

    def add(row: dict[str, Any]) -> None:
        rows.add(row)
        print(
            f"{row['method']:22s} W{row['weights']}A{row['activations']} seed {row['seed']}  "
            f"{row['top1']:6.2f} %  {row['seconds']:7.1f} s",
            flush=True,
        )

    if ("float32", 32, 32, 0) not in rows:
        top1 = score(model.apply, model.params)
        add({"method": "float32", "weights": 32, "activations": 32, "seed": 0, "top1": top1, "seconds": 0.0})
    chosen = list(METHODS) if args.methods == "all" else [m.strip() for m in args.methods.split(";")]
    for seed in map(int, args.seeds.split(",")):
        drawn = image_data.calibration(train, args.samples, seed)
        order = np.random.default_rng(seed).permutation(len(drawn))
        batches = image_data.batches(drawn[order], model.config, args.batch)
        for weights, activations in (map(int, pair.split("/")) for pair in args.bits.split(",")):
            for method in chosen:
                if (method, weights, activations, seed) in rows:
                    continue
                recipe = recipe_of(method, weights, activations, args.iterations)
                student = relu if any(isinstance(step, ReluMLP) for step in recipe.steps) else model
                start = time.perf_counter()
                result = jaxq.quantize(
                    model.apply, model.params, batches, recipe, seed=seed,
                    student=None if student is model else student.apply,
                )  # fmt: skip
                seconds = time.perf_counter() - start
                top1 = score(student.apply, result.params)
                add({"method": method, "weights": weights, "activations": activations, "seed": seed, "top1": top1,
                     "seconds": seconds})  # fmt: skip


if __name__ == "__main__":
    main()
