"""Recipes for weights and activations of vision transformers, with names as in timm."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxq.activation_rule import ActivationRule
from jaxq.errors import JaxqError
from jaxq.formats import Uniform
from jaxq.formats.grids import Affine, Grid, Log, ShiftLog
from jaxq.recipe import Recipe, Rule
from jaxq.steps import Calibrate, Reconstruct, ReluMLP, Reparametrize, Rotate, Step

#: Linear layers behind a norm, whose inputs are first given one grid a channel; and the others.
NORMED = "**/{qkv,fc1,reduction}/kernel"
LINEAR = "**/{proj,fc2}/kernel"
HEADS = "{head,head_dist}/kernel"
OPERANDS = "**/{query,key,value}"
PROBS = "**/probs"

PERCENTILES = {2: 0.98, 3: 0.99, 4: 0.98}
"""Of the hidden activations of an MLP, by bits (APHQ-ViT's code; the paper has 0.99)."""


def _weights(bits: int) -> tuple[Rule, ...]:
    return (Rule("**/kernel", "rtn", Uniform(bits, None, scale_dtype="float32")),)


def _activations(
    bits: int, search: str, *, normed: str = "channel", operands: str = "head", probs: Grid | None = None
) -> tuple[ActivationRule, ...]:
    own = "mse" if search == "output" and normed == "channel" else search
    return (
        ActivationRule(NORMED, Affine(bits, normed), own),
        ActivationRule(LINEAR, Affine(bits), search),
        ActivationRule(HEADS, Affine(bits), search),
        ActivationRule(OPERANDS, Affine(bits, operands), search),
        ActivationRule(PROBS, probs or Affine(bits, operands), search),
    )


def percentile(weights: int = 4, activations: int = 4, search: str = "percentile", images: int = 128) -> Recipe:
    """Static grids from percentiles (or "minmax", "mse"), one a tensor, nothing trained: a base line of images.

    search: of the grids of weights and activations alike, "minmax" for plain rounding to nearest.
    """
    rules = _activations(activations, search, normed="tensor", operands="tensor")
    return Recipe("percentile", _weights(weights), rules, (Calibrate(search, images=images),))


def repq_vit(weights: int = 4, activations: int = 4, images: int = 128) -> Recipe:
    """RepQ-ViT: grids a channel behind norms, turned into one a tensor; logarithmic softmax (Li et al. 2023)."""
    rules = _activations(activations, "percentile", operands="tensor", probs=Log(activations, root=2))
    steps = (
        Calibrate("none", images=images),
        Reparametrize(),
        Calibrate("percentile", activations=False, images=images),
    )
    return Recipe("repq-vit", _weights(weights), rules, steps)


def qdrop(
    weights: int = 4,
    activations: int = 4,
    loss: str = "mse",
    iterations: int = 20000,
    images: int = 128,
    **more: Any,
) -> Recipe:
    """QDrop: rounding and activation scales trained block by block, activations rounded half the time (Wei 2022).

    loss: see the step `reconstruct`; "brecq", "ph", "aph", "fima" and "least_squares" weigh the error of a block
    in other ways, all else being equal.
    """
    return _reconstructed("qdrop", weights, activations, loss, iterations, images, more)


def brecq(
    weights: int = 4, activations: int = 4, iterations: int = 20000, images: int = 128, **more: Any
) -> Recipe:
    """BRECQ: as qdrop, with the error weighted by squared gradients of each image (Li et al. 2021)."""
    return _reconstructed("brecq", weights, activations, "brecq", iterations, images, more)


def aphq_vit(
    weights: int = 4,
    activations: int = 4,
    relu: bool = True,
    loss: str = "aph",
    iterations: int = 20000,
    images: int = 128,
    mlp_iterations: int | None = None,
    **more: Any,
) -> Recipe:
    """APHQ-ViT: error weighted by the average perturbation Hessian, MLPs rebuilt with ReLU (Wu et al. 2025).

    relu: whether GELU becomes ReLU, its MLPs fitted for mlp_iterations (iterations when left out). images: for the
    grids; all calibration images are trained on, `batch` (32) of them in a step.
    """
    rebuilt: tuple[Step, ...] = ()
    if relu:
        share = PERCENTILES.get(activations, 0.99)
        rebuilt = (ReluMLP(share, iterations=mlp_iterations or iterations, **_batch(more)),)
    return _reconstructed("aphq-vit", weights, activations, loss, iterations, images, more, rebuilt)


def _reconstructed(
    name: str,
    weights: int,
    activations: int,
    loss: str,
    iterations: int,
    images: int,
    more: dict[str, Any],
    first: tuple[Step, ...] = (),
) -> Recipe:
    """Grids a channel behind norms, made one a tensor; grids by output error; rounding trained."""
    last = Reconstruct(loss=loss, iterations=iterations, **more)
    batch = min(last.batch, images)
    behind = Calibrate("none", only=NORMED, images=images, batch=batch)
    by_output = Calibrate("output", images=images, batch=batch)
    steps = (*first, behind, Reparametrize(), by_output, last)
    return Recipe(name, _weights(weights), _activations(activations, "output"), steps)


def ias_vit(
    weights: int = 4,
    activations: int = 4,
    iterations: int | None = None,
    stages: int = 3,
    softmax: str = "shift_log",
    official: bool = False,
    images: int = 64,
    batch: int = 64,
    rate: float = 4e-5,
) -> Recipe:
    """I&S-ViT: shift-uniform-log2 softmax, and three stages: activations, reparametrization, weights (Zhong 2023).

    iterations: of a block in each stage; 1000, or 200 from 6 bits on. stages: how many of the three; without the
    first the weights are trained in the last only, with 0 nothing is trained. softmax: "shift_log", "log" or
    "uniform". official: the quantizers of the paper's code, with 2^bits + 1 codes.
    """
    count = iterations or (200 if activations >= 6 else 1000)
    grids: dict[str, Grid | None] = {
        "shift_log": ShiftLog(activations, official),
        "log": Log(activations),
        "uniform": None,
    }
    if softmax not in grids:
        raise JaxqError(f"softmax is {', '.join(grids)}, not {softmax!r}")
    rules = _activations(activations, "percentile", operands="tensor", probs=grids[softmax])
    train = {"train": "weights", "loss": "mse", "iterations": count, "batch": batch, "rate": rate}
    train |= {"scale_rate": 0.0, "drop": 1.0}
    first = Reconstruct(quantized=False, mixed=0.0, **train)  # type: ignore[arg-type]
    last = Reconstruct(mixed=1.0, **train)  # type: ignore[arg-type]
    steps: list[Step] = [Calibrate("none", stream="quantized", images=images, batch=min(batch, images))]
    steps += [first] if stages >= 3 else []
    steps += [Reparametrize(fractional=official), Calibrate("percentile", activations=False, images=images)]
    steps += [last] if stages >= 1 else []
    return Recipe("ias-vit", _weights(weights), rules, tuple(steps))


def jaxq_vit(
    weights: int = 4,
    activations: int = 4,
    loss: str = "aph",
    relu: bool = True,
    rotate: bool = False,
    iterations: int = 20000,
    images: int = 128,
    mlp_iterations: int | None = None,
    whole_iterations: int = 1000,
    whole_rate: float = 1e-4,
    whole_scale_rate: float = 4e-4,
    **more: Any,
) -> Recipe:
    """Our best composition: aphq-vit, and at the end all blocks together.

    Blocks that were trained one by one do not know of each other's errors. So the last step trains weights
    (straight through their rounding), biases and activation scales of all of them by the KL divergence from the
    float logits. It is short: on a thousand images a longer one fits those.

    rotate: turns the residual stream first, which needs a ViT that reads its class token alone. whole_iterations,
    whole_rate, whole_scale_rate: of the last step, 0 iterations for none.
    """
    share = PERCENTILES.get(activations, 0.99)
    first: tuple[Step, ...] = (Rotate(),) if rotate else ()
    first += (ReluMLP(share, iterations=mlp_iterations or iterations, **_batch(more)),) if relu else ()
    recipe = _reconstructed("jaxq-vit", weights, activations, loss, iterations, images, more, first)
    if not whole_iterations:
        return recipe
    together = Reconstruct(
        "weights", loss="mse", whole=True, iterations=whole_iterations, rate=whole_rate,
        scale_rate=whole_scale_rate, mixed=1.0, drop=1.0, **_batch(more),
    )  # fmt: skip
    return dataclasses.replace(recipe, steps=(*recipe.steps, together))


def _batch(more: dict[str, Any]) -> dict[str, Any]:
    """The setting of that name, for the other steps that train."""
    return {"batch": more["batch"]} if "batch" in more else {}
