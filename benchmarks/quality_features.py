"""Features of a pretrained vision transformer without a head (DINOv2), quantized by every recipe.

    python benchmarks/quality_features.py --bits 4/4,6/6,8/8 --json out.json
    python benchmarks/quality_features.py --size 56 --samples 32 --iterations 20 --train 200 --test 100   # a try

The model is used as it is published, frozen. An image's features are its class token and the mean of its patches,
after the final norm. Data is Fashion-MNIST, resized to --size pixels. Columns:

    probe    accuracy of the linear head that was fitted on the float features, on quantized ones
    refit    accuracy of a linear head that is fitted on the quantized features
    knn      accuracy of the vote of the nearest neighbours by cosine, both sides quantized
    cosine   between an image's quantized and its float features, mean over the test images

Heads are ridge regressions in closed form on the first --train training images. Losses weighted by importance need
logits: they see the function head(features(x)) with the head of the float features. It stands in the function as a
constant in float, is never quantized, and is all that ever depends on labels; the other recipes take nothing from
it. The last step of jaxq-vit holds on to nothing but those logits, which leaves features free to drift where the
head does not look; "jaxq-vit, tokens" therefore holds on to the tokens themselves, by squares, and sees no head.
Calibration images are drawn from the training images behind those --train.

A seed draws the calibration images and everything random of a recipe. Rows that OUT.json has already are not run
again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from rows import Rows

import jaxq
from jaxq import image_data, recipes
from jaxq.image_data import Images
from jaxq.models import images, vision, vision_demo
from jaxq.models.vision import VisionModel
from jaxq.stages import Stage, run, stages
from jaxq.steps import Reconstruct, ReluMLP

#: {name in the table: (recipe, settings)}, in the order of the table.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "percentile": ("percentile", {}),
    "repq-vit": ("repq-vit", {}),
    "qdrop": ("qdrop", {}),
    "aphq-vit, gelu": ("aphq-vit", {"relu": False}),
    "aphq-vit": ("aphq-vit", {}),
    "ias-vit": ("ias-vit", {}),
    "jaxq-vit": ("jaxq-vit", {}),
    "jaxq-vit, tokens": ("jaxq-vit", {"relu": False, "loss": "mse"}),
}

#: Methods that see the model's own outputs, its tokens, and no head.
HEADLESS = ("jaxq-vit, tokens",)

SCORES = ("probe", "refit", "knn", "cosine")
RIDGES = np.logspace(-6, 2, 17)  # over the largest eigenvalue of the features' covariance
SCALES = np.logspace(-1, 2, 61)


class Head(NamedTuple):
    """Logits are features @ kernel + bias."""

    kernel: np.ndarray  # (features, classes) float32
    bias: np.ndarray  # (classes,) float32

    def logits(self, x: np.ndarray) -> np.ndarray:
        return x @ self.kernel + self.bias


def features(apply: Callable[..., Any], prefix: int, params: Any, x: Any) -> Any:
    """(B, 2 E): the class token, then the mean of the patches, of tokens (B, N, E) that begin with `prefix`."""
    tokens = apply(params, x)
    return jnp.concatenate([tokens[:, 0], jnp.mean(tokens[:, prefix:], axis=1)], axis=-1)


def classifier(apply: Callable[..., Any], prefix: int, head: Head, params: Any, x: Any) -> Any:
    return features(apply, prefix, params, x) @ jnp.asarray(head.kernel) + jnp.asarray(head.bias)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    top = logits.max(axis=1, keepdims=True)
    whole = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return float((whole - logits[np.arange(len(labels)), labels]).mean())


def ridge(x: np.ndarray, labels: np.ndarray, classes: int) -> Head:
    """Ridge regression on one-hot targets; its strength, and the scale that makes its outputs logits, are those of
    the least cross entropy where each image is left out once, which has a closed form too.
    """
    x = x.astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-6
    targets = np.eye(classes)[labels]
    centre = targets.mean(axis=0)
    u, s, vt = np.linalg.svd((x - mean) / deviation, full_matrices=False)
    best: tuple[float, float, float] | None = None
    for strength in RIDGES * s[0] ** 2:
        shrunk = s**2 / (s**2 + strength)
        fitted = centre + (u * shrunk) @ (u.T @ targets)
        leverage = (np.square(u) * shrunk).sum(axis=1, keepdims=True) + 1 / len(x)
        left_out = targets - (targets - fitted) / (1 - leverage)
        for scale in SCALES:
            loss = cross_entropy(scale * left_out, labels)
            best = min(best or (loss, strength, scale), (loss, strength, scale))
    assert best is not None
    _, strength, scale = best
    kernel = scale * (vt.T * (s / (s**2 + strength))) @ (u.T @ targets) / deviation[:, None]
    bias = scale * centre - mean @ kernel
    return Head(kernel.astype(np.float32), bias.astype(np.float32))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float((logits.argmax(axis=1) == labels).mean())


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def neighbours(bank: np.ndarray, labels: np.ndarray, x: np.ndarray, k: int, classes: int) -> np.ndarray:
    """(N, classes): how many of the k nearest of the bank have each class."""
    nearest = np.argsort(-unit(x) @ unit(bank).T, axis=1, kind="stable")[:, :k]
    return np.eye(classes)[labels[nearest]].sum(axis=1)


def recipe_of(method: str, weights: int, activations: int, iterations: int) -> jaxq.Recipe:
    """The recipe; where it trains, for `iterations`, or for its own number if that is less, as of ias-vit."""
    name, settings = METHODS[method]
    recipe = recipes.named(name, weights=weights, activations=activations, **settings)
    own = [step.iterations for step in recipe.steps if isinstance(step, Reconstruct) and not step.whole]
    if own:
        settings = settings | {"iterations": min(iterations, *own)}
    return recipes.named(name, weights=weights, activations=activations, **settings)


def shortened(model: VisionModel, blocks: int) -> VisionModel:
    """The model without the blocks behind the first `blocks`."""
    kept = {str(i): model.params["blocks"][str(i)] for i in range(blocks)}
    return vision.build(model.config.replace(depths=(blocks,)), model.params | {"blocks": kept}, model.source)


def extract(
    pieces: Sequence[Stage], params: Any, pixels: np.ndarray, model: VisionModel, batch: int
) -> np.ndarray:
    out = []
    for start in range(0, len(pixels), batch):
        rows = images.prepare(pixels[start : start + batch], model.config)
        # The last batch is filled up so that it has the shape that was compiled.
        found = run(pieces, params, np.resize(rows, (batch, *rows.shape[1:])))
        out.append(np.asarray(found, np.float32)[: len(rows)])
    return np.concatenate(out)


class Scorer:
    """Takes the features of both splits, and scores them against those of the float model."""

    def __init__(self, model: VisionModel, train: Images, test: Images, batch: int, k: int):
        self.model, self.train, self.test, self.batch, self.k = model, train, test, batch, k
        self.classes = len(train.names)
        self.bank, self.wanted = self.both(model, model.params)
        self.head = ridge(self.bank, train.labels, self.classes)

    def both(self, model: VisionModel, params: Any) -> tuple[np.ndarray, np.ndarray]:
        side, channels = model.config.image_size, model.config.channels
        shape = jax.ShapeDtypeStruct((self.batch, side, side, channels), jnp.float32)
        take = functools.partial(features, model.apply, model.config.prefix)
        with jax.default_matmul_precision("highest"):
            pieces = stages(take, self.model.params, shape)
            bank, found = (
                extract(pieces, params, data.images, model, self.batch) for data in (self.train, self.test)
            )
        return bank, found

    def score(self, model: VisionModel, params: Any) -> dict[str, float]:
        bank, found = (self.bank, self.wanted) if params is self.model.params else self.both(model, params)
        labels, wanted = self.train.labels, self.test.labels
        return {
            "probe": accuracy(self.head.logits(found), wanted),
            "refit": accuracy(ridge(bank, labels, self.classes).logits(found), wanted),
            "knn": accuracy(neighbours(bank, labels, found, self.k, self.classes), wanted),
            "cosine": float((unit(found) * unit(self.wanted)).sum(axis=1).mean()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2-small", help="a demo model that gives tokens")
    parser.add_argument("--size", type=int, default=112, help="pixels, a multiple of the patch size")
    parser.add_argument("--blocks", type=int, default=0, help="how many of the model's, from the first; 0 for all")
    parser.add_argument("--bits", default="4/4,6/6,8/8", help="of weights / activations")
    parser.add_argument("--methods", default="all", help=f"of: {'; '.join(METHODS)} (separated by ;)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--train", type=int, default=2000, help="labelled images, of heads and neighbours")
    parser.add_argument("--test", type=int, default=1000, help="test images that are scored")
    parser.add_argument("--neighbours", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1024, help="calibration images")
    parser.add_argument("--iterations", type=int, default=20000, help="of a block, where a recipe trains it")
    parser.add_argument("--batch", type=int, default=32, help="images at a time")
    parser.add_argument("--json", type=Path, help="write rows here, one run after another")
    args = parser.parse_args()

    model = vision_demo.load(args.model, image_size=args.size)
    if model.config.classes:
        parser.error(f"{args.model} has a head: benchmarks/quality_vision.py measures classifiers")
    # The pictures fill their frame: cropping would cut sleeves and heels off.
    model = vision.build(model.config.replace(crop=1.0), model.params, model.source)
    model = shortened(model, args.blocks) if args.blocks else model
    relu = vision.build(model.config.replace(activation="relu"), model.params, model.source)
    whole, test = (image_data.load("fashion-mnist", split) for split in ("train", "test"))

    names = ("model", "size", "blocks", "train", "test", "neighbours", "samples", "iterations", "batch")
    settings = {k: getattr(args, k) for k in names}
    rows = Rows(args.json, settings, ("method", "weights", "activations", "seed"))

    def add(row: dict[str, Any]) -> None:
        rows.add(row)
        scores = "  ".join(f"{name} {row[name]:{'.4f' if name == 'cosine' else '5.1f'}}" for name in SCORES)
        print(
            f"{row['method']:16s} W{row['weights']}A{row['activations']} seed {row['seed']}  {scores}  "
            f"{row['seconds']:7.1f} s",
            flush=True,
        )

    scorer = Scorer(model, whole[: args.train], test[: args.test], args.batch, args.neighbours)
    if ("float32", 32, 32, 0) not in rows:
        row = {"method": "float32", "weights": 32, "activations": 32, "seed": 0}
        add(row | scorer.score(model, model.params) | {"seconds": 0.0})
    functions = {m: functools.partial(classifier, m.apply, m.config.prefix, scorer.head) for m in (model, relu)}
    chosen = list(METHODS) if args.methods == "all" else [m.strip() for m in args.methods.split(";")]
    for seed in map(int, args.seeds.split(",")):
        drawn = image_data.calibration(whole[args.train :], args.samples, seed)
        order = np.random.default_rng(seed).permutation(len(drawn))
        batches = image_data.batches(drawn[order], model.config, args.batch)
        for weights, activations in (map(int, pair.split("/")) for pair in args.bits.split(",")):
            for method in chosen:
                if (method, weights, activations, seed) in rows:
                    continue
                recipe = recipe_of(method, weights, activations, args.iterations)
                student = relu if any(isinstance(step, ReluMLP) for step in recipe.steps) else model
                fn = model.apply if method in HEADLESS else functions[model]
                start = time.perf_counter()
                result = jaxq.quantize(
                    fn, model.params, batches, recipe, seed=seed,
                    student=None if student is model else functions[student],
                )  # fmt: skip
                seconds = time.perf_counter() - start
                row = {"method": method, "weights": weights, "activations": activations, "seed": seed}
                add(row | scorer.score(student, result.params) | {"seconds": seconds})


if __name__ == "__main__":
    main()
