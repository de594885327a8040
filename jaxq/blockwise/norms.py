"""The steps that move numbers between a norm and the linear layer behind it: `reparametrize` and `rotate`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxq.activation_rule import ActivationRule
from jaxq.blockwise.work import Job, Work
from jaxq.errors import JaxqError, at_path
from jaxq.formats.grids import Affine
from jaxq.stages import run as run_stages
from jaxq.stages import stages
from jaxq.steps import Reparametrize, Rotate
from jaxq.transforms import rotate_norm
from jaxq.transforms.reparametrize import reparametrize as fold

#: Largest change of the function's output that rounding may explain, relative to its largest entry.
UNCHANGED = 1e-3


def reparametrize(job: Job, work: Work, step: Reparametrize) -> Work:
    """Replaces grids of one scale a channel, where a norm stands before them, by one for the tensor."""
    params, inputs = dict(work.params), dict(work.inputs)
    rules: list[ActivationRule] = []
    for path, quantizer in work.inputs.items():
        norm = norm_of(path, step.pairs)
        if norm is None or jnp.ndim(getattr(quantizer, "scale", 0.0)) == 0:
            continue
        beside = path.removesuffix("kernel") + "bias"
        with at_path(path):
            if f"{norm}/scale" not in params or f"{norm}/bias" not in params:
                raise JaxqError(f"there is no norm {norm} before it: change the pairs of the step reparametrize")
            new = fold(
                params[f"{norm}/scale"], params[f"{norm}/bias"], params[path], params.get(beside), quantizer,
                fractional=step.fractional,
            )  # fmt: skip
        if beside not in params and np.any(np.asarray(new.bias)):
            raise JaxqError(
                f"{path} has no bias that could take what the norm gives up: leave its grid per tensor"
            )
        params |= {f"{norm}/scale": new.norm_scale, f"{norm}/bias": new.norm_bias, path: new.kernel}
        params |= {beside: new.bias} if beside in params else {}
        inputs[path] = new.quantizer
        rules.append(ActivationRule(path, Affine(quantizer.bits), step.search))
    if not rules:
        raise JaxqError("the step reparametrize finds no grid of one scale a channel behind a norm")
    check_same(job, work.params, params, "reparametrize")
    return dataclasses.replace(work, params=params, inputs=inputs, rules=(*rules, *work.rules))


def rotate(job: Job, work: Work, step: Rotate) -> Work:
    """Turns the residual stream of a ViT; the float function's parameters are turned too, so that blocks agree."""
    params = rotated(work.floats, step.pairs, job.key)
    check_same(job, work.floats, params, "rotate")
    return Work(params, params, work.rules)


#: Ends of the paths of what adds to the residual stream of a ViT, without a bias of its own; and with one.
TOKENS = ("cls_token", "dist_token", "pos_embed")
WRITERS = ("patch_embed/proj", "attn/proj", "mlp/fc2")

#: {the layer scale behind a writer: the writer}
SCALES = {"ls1/scale": "attn/proj", "ls2/scale": "mlp/fc2"}


def rotated(params: dict[str, Any], pairs: tuple[tuple[str, str], ...], key: Key[Array, ""]) -> dict[str, Any]:
    """Flat parameters of the same ViT with its residual stream turned by a rotation that LayerNorm does not see.

    Scales and biases of norms, and layer scales, move into the layers beside them. JaxqError for another model.
    """
    if "pos_embed" not in params or "norm/scale" not in params:
        raise JaxqError(
            "the step rotate knows ViTs that read their class token alone: leave it out for this model"
        )
    out = dict(params)
    q = rotate_norm.rotation(params["norm/scale"].shape[0], key)
    for path in params:
        if any(path.endswith(end) for end in TOKENS):
            out[path] = rotate_norm.rotate_writer(params[path], None, q)[0]
        writer = path.removesuffix("/kernel")
        if path != writer and any(writer.endswith(end) for end in WRITERS):
            kernel, bias = params[path], params.get(f"{writer}/bias")
            for scale, scaled in SCALES.items():
                name = writer.removesuffix(scaled) + scale
                if writer.endswith(scaled) and name in params:
                    kernel, bias = kernel * params[name], None if bias is None else bias * params[name]
                    out[name] = jnp.ones_like(params[name])
            new, turned = rotate_norm.rotate_writer(kernel, bias, q)
            out |= {path: new} | ({} if turned is None else {f"{writer}/bias": turned})
        norm = "norm" if path in ("head/kernel", "head_dist/kernel") else norm_of(path, pairs)
        if norm is None:
            continue
        beside = path.removesuffix("kernel") + "bias"
        folded = rotate_norm.fold_to_rms(
            params[f"{norm}/scale"], params[f"{norm}/bias"], params[path], params.get(beside)
        )
        out |= {path: rotate_norm.rotate_reader(folded.kernel, q), beside: folded.bias}
        out |= {f"{norm}/scale": folded.norm_scale, f"{norm}/bias": folded.norm_bias}
    return {path: out[path] for path in params}


def norm_of(path: str, pairs: tuple[tuple[str, str], ...]) -> str | None:
    """The path of the norm before the layer with this kernel."""
    for layer, norm in pairs:
        head = path.removesuffix(f"{layer}/kernel")
        if head != path and (not head or head.endswith("/")):
            return head + norm
    return None


def check_same(job: Job, old: dict[str, Any], new: dict[str, Any], step: str) -> None:
    """JaxqError unless the function gives the same with both, to rounding."""
    some = tuple(x[:2] for x in job.examples)
    # GPUs round the factors of products to 11 bits by default: a rescaled layer then differs by that.
    with jax.default_matmul_precision("highest"):
        pieces = stages(job.fn, old, *some)
        want, got = (jax.tree.leaves(run_stages(pieces, params, *some))[0] for params in (old, new))
    change = float(jnp.max(jnp.abs(want - got)) / jnp.maximum(jnp.max(jnp.abs(want)), 1e-30))
    if not change <= UNCHANGED:
        raise JaxqError(
            f"the step {step} would change the float function by {change:.2g}: something else reads that norm, or "
            "padding stands behind it; leave the layer out of its pairs"
        )
