"""Trains DeiT-Tiny, DeiT-Small or Swin-Tiny on Fashion-MNIST from scratch, on one GPU in minutes.

    python examples/train_vit.py --model deit_tiny --out DIR           # also deit_small, swin_tiny
    python examples/train_vit.py --model deit_tiny --out DIR --smoke   # a toy, on a CPU in a minute

The aim is 93.5 % of the test images. DIR gets config.json and model.safetensors (float16), for `jaxq.models.load`,
and training.json: settings, device, seconds, losses, accuracies, and `top1`, measured on the files as read back.

The shapes are the published ones (12 blocks of width 192 or 384; 2, 2, 6 and 2 blocks from width 96), only the
images are small: 28 x 28 in patches of 4 give a DeiT 49 tokens; in patches of 2 they give a Swin the grid 14 x 14,
which its windows of 7 tile. Nothing is resized, and a grid is padded only where Swin merges 7 x 7 tokens.

A transformer must learn from data what a convolution knows, that neighbours belong together, and 60000 images are
few for millions of weights: trained plainly, it soon knows them by heart and gets no better at others. So the
recipe is DeiT's (Touvron et al. 2021), shortened, in the spirit of Hassani et al. 2021 (Escaping the Big Data
Paradigm with Compact Transformers). On an H100 shared with other work: DeiT-Tiny 94.15 % after 287 s of training;
DeiT-Small 90.33 % with a rate of 1e-3 and 50 epochs; on an H200, shared too, 94.17 % with 5e-4 and 80 after 305 s.
Swin-Tiny 91.42 % with 1e-3 on the H100; on an H200, shared, 93.30 % with 5e-4 and 60 epochs, 94.36 % with 100
after 196 s.

- Variety. Every image is shifted and maybe mirrored. Half of them are mixed with another one, by CutMix or mixup.
  From a quarter a box is erased (Zhong et al. 2017). The last epochs, when steps are small, do not mix: the
  weights settle on images like those of the test.
- Restraint. Label smoothing, weight decay of the kernels, stochastic depth. What drops branches is put into the
  model from outside, by `flax.linen.intercept_methods`: the model's own file has no use for it.
- A good start. Kernels of deviation fan_in^-1/2, and positions that begin as sines and cosines of row and column,
  as large as what the patches say (Beyer et al. 2022, Better plain ViT baselines). The customary deviation of 0.02
  hides the positions behind the patches.
- Length. 80 to 100 epochs, meant for a few minutes of a GPU; AdamW, warm-up, cosine.
- What is saved is the moving average of the weights at the end. The epoch that does best on the test set would
  look better than it is.

Python is never waited for: the images lie on the device, and an epoch is one `lax.scan` over shuffled indices.
Products run in bfloat16; weights, moments and averages are float32. Equal seeds draw equal images, but a GPU does
not add in a fixed order, so that runs are not equal bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from jaxq import evaluate, image_data
from jaxq.cli import console
from jaxq.errors import JaxqError
from jaxq.image_data import Images
from jaxq.models import images, vision, vision_checkpoint

DATA = "fashion-mnist"
MEAN, STD = (0.286,), (0.353,)  # of the training images


@dataclass(frozen=True)
class Settings:
    """What decides about the result, seed and device apart."""

    model: str
    patch: int
    epochs: int
    drop: float  # of the last block's branches; earlier ones less, in proportion
    image_size: int = 28
    batch: int = 512
    rate: float = 1e-3  # of learning, at its highest
    warmup: float = 5.0  # epochs
    decay: float = 0.05
    clip: float = 1.0  # of the gradient's norm
    smoothing: float = 0.1
    shift: int = 3  # pixels, at most
    mixed: float = 0.5  # share of images
    erased: float = 0.25  # share of images
    unmixed: float = 0.15  # share of epochs, at the end
    average: float = 0.998  # of the weights, a step
    seed: int = 0
    smoke: bool = False


SETTINGS = {
    "deit_tiny": Settings("deit_tiny", patch=4, epochs=80, drop=0.05),
    "deit_small": Settings("deit_small", patch=4, epochs=80, drop=0.1, rate=5e-4),
    "swin_tiny": Settings("swin_tiny", patch=2, epochs=100, drop=0.1, rate=5e-4),
}
TOY: dict[str, Any] = dict(smoke=True, epochs=8, batch=50, rate=3e-3, warmup=1.0, drop=0.05, mixed=0.2)


class State(NamedTuple):
    """What a step changes. All float32."""

    params: Any
    average: Any
    optimizer: Any
    steps: Int[Array, ""]


# ---- variety: pure functions of a key and a batch of images, traced into the step --------------------------


def shift_and_mirror(key: Key[Array, ""], images: UInt8[Array, "B H W C"], most: int) -> UInt8[Array, "B H W C"]:
    """Shifts each image by up to `most` pixels along both axes, zeros coming in, and mirrors half of them."""
    draw, toss = jax.random.split(key)
    batch, *shape = images.shape
    padded = jnp.pad(images, [(0, 0), (most, most), (most, most), (0, 0)])
    starts = jax.random.randint(draw, (batch, 2), 0, 2 * most + 1)
    shifted = jax.vmap(lambda image, at: lax.dynamic_slice(image, (at[0], at[1], 0), shape))(padded, starts)
    return jnp.where(jax.random.bernoulli(toss, 0.5, (batch, 1, 1, 1)), shifted[:, :, ::-1], shifted)


def boxes(
    key: Key[Array, ""], size: int, area: Float[Array, " B"], aspect: Float[Array, " B"]
) -> Bool[Array, "B S S 1"]:
    """A box in each image: its share of the area, its height over width; cut off where it leaves the image."""
    at = jnp.arange(size) + 0.5
    centres = size * jax.random.uniform(key, (2, len(area)))
    sides = size * jnp.sqrt(jnp.stack([area * aspect, area / aspect]))
    inside = jnp.abs(at - centres[..., None]) < sides[..., None] / 2
    return (inside[0, :, :, None] & inside[1, :, None, :])[..., None]


def mix(
    key: Key[Array, ""], images: Float[Array, "B S S C"], targets: Float[Array, "B K"], share: Float[Array, ""]
) -> tuple[Float[Array, "B S S C"], Float[Array, "B K"]]:
    """Mixes a share of the images with their neighbours in the batch, which is shuffled, and their targets alike.

    Half of these by CutMix (Yun et al. 2019: a box of the other), half by mixup (Zhang et al. 2018: a sum).
    """
    how, much, where = jax.random.split(key, 3)
    kind = jax.random.uniform(how, (len(images), 1, 1, 1))
    keep = jax.random.uniform(much, (len(images),))
    box = boxes(where, images.shape[1], 1 - keep, jnp.ones_like(keep))
    weights = jnp.where(kind < share / 2, 1.0 - box, jnp.where(kind < share, keep[:, None, None, None], 1.0))
    own = jnp.mean(weights, axis=(1, 2))
    mixed = weights * images + (1 - weights) * jnp.roll(images, 1, axis=0)
    return mixed, own * targets + (1 - own) * jnp.roll(targets, 1, axis=0)


def erase(key: Key[Array, ""], images: Float[Array, "B S S C"], share: float) -> Float[Array, "B S S C"]:
    """Fills a box of 2 to 33 % of a share of the images with noise (Zhong et al. 2017), in 0..1."""
    toss, area, aspect, where, noise = jax.random.split(key, 5)
    batch = len(images)
    areas = jax.random.uniform(area, (batch,), minval=0.02, maxval=0.33)
    aspects = jnp.exp(jax.random.uniform(aspect, (batch,), minval=math.log(0.3), maxval=math.log(1 / 0.3)))
    box = boxes(where, images.shape[1], areas, aspects) & jax.random.bernoulli(toss, share, (batch, 1, 1, 1))
    return jnp.where(box, jax.random.uniform(noise, images.shape), images)


@contextmanager
def dropped(key: Key[Array, ""], rate: float, branches: int, batch: int) -> Iterator[None]:
    """Within: each branch of a block is left out for some images, that is, stochastic depth (Huang et al. 2016).

    The first of the model's `branches` never, the last with probability `rate`; what stays is scaled up in turn.
    """
    count = itertools.count()

    def drop(call: Callable[..., Array], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = call(*args, **kwargs)
        if context.method_name != "__call__" or context.module.name not in ("attn", "mlp"):
            return y
        i = next(count)
        keep = 1 - rate * i / max(1, branches - 1)
        kept = jax.random.bernoulli(jax.random.fold_in(key, i), keep, (batch,)).astype(y.dtype) / keep
        # The windows of an image stand next to each other.
        return y * jnp.repeat(kept, len(y) // batch)[:, None, None].astype(y.dtype)

    with nn.intercept_methods(drop):
        yield


# ---- training ----------------------------------------------------------------------------------------------


def make_config(settings: Settings, labels: tuple[str, ...]) -> vision.VisionConfig:
    """The preset's shape over small grey images; with `smoke`, a toy of the same family."""
    config = vision.PRESETS[settings.model].replace(
        image_size=settings.image_size, patch_size=settings.patch, channels=1, classes=len(labels), labels=labels,
        mean=MEAN, std=STD, crop=1.0,
    )  # fmt: skip
    if not settings.smoke:
        return config
    if config.family == "swin":
        return config.replace(hidden_size=24, depths=(2, 2), heads=(1, 2))
    return config.replace(hidden_size=48, depths=(3,), heads=(2,))


def normalized(config: vision.VisionConfig, images: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Images in 0..1 as the model takes them."""
    return (images - jnp.asarray(config.mean, jnp.float32)) / jnp.asarray(config.std, jnp.float32)


def initial(config: vision.VisionConfig, seed: int) -> dict[str, Any]:
    """Parameters to start from: see "A good start" above. The head begins at zero."""

    def scaled(path: tuple[Any, ...], x: Array) -> Array:
        *inside, name = (key.key for key in path)
        if name == "pos_embed":
            return x.at[0, config.prefix :].add(sines(config.grid, config.hidden_size))
        if name != "kernel" or inside[0] == "patch_embed":
            return x
        return jnp.zeros_like(x) if inside[0] == "head" else x / (0.02 * x.shape[0] ** 0.5)

    return jax.tree.map_with_path(scaled, vision.init_params(config, seed, scale=0.02))


def sines(grid: int, width: int) -> Float[np.ndarray, "N E"]:
    """Sines and cosines of each patch's column and row, wavelengths from 2 pi to 200 pi patches."""
    row, column = np.divmod(np.arange(grid * grid), grid)
    angles = [at[:, None] / 100 ** (np.arange(width // 4) / (width // 4)) for at in (column, row)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1, dtype=np.float32)


def resident(data: Images, config: vision.VisionConfig) -> tuple[UInt8[Array, "N S S C"], Int[Array, " N"]]:
    """Images and labels on the device, in the size that the model takes."""
    pixels = np.stack([images.fit(image, config) for image in data.images])
    return jax.device_put(pixels), jax.device_put(data.labels)


def make_optimizer(settings: Settings, params: Any, steps: int) -> optax.GradientTransformation:
    """AdamW for `steps` steps an epoch; only kernels decay."""
    total = settings.epochs * steps
    warmup = min(round(settings.warmup * steps), total // 4)
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.rate, warmup, total)
    kernels = jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
    adamw = optax.adamw(schedule, weight_decay=settings.decay, mask=kernels)
    return optax.chain(optax.clip_by_global_norm(settings.clip), adamw)


def start(params: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    return State(params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32))


def loss(
    settings: Settings, model: vision.VisionModel, params: Any, images: Array, targets: Array, key: Key[Array, ""]
) -> Float[Array, ""]:
    """Mean cross-entropy of images in 0..1, the model in bfloat16 (on a CPU in float32, which is faster there)."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    with dropped(key, settings.drop, 2 * sum(model.config.depths), len(images)):
        logits = model.apply(params, normalized(model.config, images))
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def step(
    settings: Settings,
    model: vision.VisionModel,
    optimizer: optax.GradientTransformation,
    state: State,
    images: UInt8[Array, "B H W C"],
    labels: Int[Array, " B"],
    key: Key[Array, ""],
    mixed: Float[Array, ""],
) -> tuple[State, Float[Array, ""]]:
    """One step on one batch, and its loss. mixed: share of images that are mixed with another."""
    keys = jax.random.split(key, 4)
    pixels = shift_and_mirror(keys[0], images, settings.shift).astype(jnp.float32) / 255
    targets = optax.smooth_labels(jax.nn.one_hot(labels, model.config.classes), settings.smoothing)
    pixels, targets = mix(keys[1], pixels, targets, mixed)
    pixels = erase(keys[2], pixels, settings.erased)
    value, gradients = jax.value_and_grad(functools.partial(loss, settings, model))(
        state.params, pixels, targets, keys[3]
    )
    updates, moments = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    steps = state.steps + 1
    # A young average follows faster, so that it is not made of where training began.
    slow = jnp.minimum(settings.average, steps / (steps + 9))
    average = jax.tree.map(lambda old, new: slow * old + (1 - slow) * new, state.average, params)
    return State(params, average, moments, steps), value


def make_epoch(
    settings: Settings, model: vision.VisionModel, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[State, Float[Array, ""]]]:
    """epoch(state, images [N, H, W, C] uint8, labels [N], key, mixed) -> (state, mean loss); one program."""

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(
        state: State, images: Array, labels: Array, key: Key[Array, ""], mixed: Array
    ) -> tuple[State, Array]:
        shuffle, draw = jax.random.split(key)
        steps = len(labels) // settings.batch
        order = jax.random.permutation(shuffle, len(labels))[: steps * settings.batch].reshape(steps, -1)

        def body(state: State, at: tuple[Array, Array]) -> tuple[State, Array]:
            rows, key = at
            return step(settings, model, optimizer, state, images[rows], labels[rows], key, mixed)

        state, losses = lax.scan(body, state, (order, jax.random.split(draw, steps)))
        return state, jnp.mean(losses)

    return epoch


def make_accuracy(model: vision.VisionModel, batch: int = 500) -> Callable[..., Float[Array, ""]]:
    """accuracy(params, images [N, H, W, C] uint8, labels [N]) -> percentage; quick, for the look in between."""

    @jax.jit
    def accuracy(params: Any, images: Array, labels: Array) -> Array:
        missing = -len(labels) % batch
        images = jnp.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)]).reshape(-1, batch, *images.shape[1:])

        def right(rows: Array) -> Array:
            pixels = normalized(model.config, rows.astype(jnp.float32) / 255)
            return jnp.argmax(model.apply(params, pixels), axis=-1)

        found = lax.map(right, images).reshape(-1)[: len(labels)]
        return 100 * jnp.mean((found == labels).astype(jnp.float32))

    return accuracy


def train(settings: Settings, data: Images, test: Images) -> tuple[vision.VisionModel, dict[str, Any]]:
    """The trained model (its averaged weights) and what happened: see training.json."""
    if len(data) < settings.batch:
        raise JaxqError(f"a batch of {settings.batch} needs as many images, there are {len(data)}")
    config = make_config(settings, data.names)
    model = vision.build(config, initial(config, settings.seed))
    optimizer = make_optimizer(settings, model.params, len(data) // settings.batch)
    state, key = start(model.params, optimizer), jax.random.key(settings.seed)
    train_on, test_on = (resident(part, config) for part in (data, test))
    history, began = [], time.perf_counter()
    with console.meter(settings.model) as meter:
        meter.update(0.0, "compiling")
        share = jnp.float32(settings.mixed)
        epoch = make_epoch(settings, model, optimizer).lower(state, *train_on, key, share).compile()
        accuracy = make_accuracy(model).lower(state.average, *test_on).compile()
        compiled = time.perf_counter()
        for i in range(settings.epochs):
            mixing = i < round((1 - settings.unmixed) * settings.epochs)
            state, value = epoch(state, *train_on, jax.random.fold_in(key, i), share if mixing else 0 * share)
            row = {"epoch": i + 1, "loss": float(value), "seconds": time.perf_counter() - compiled}
            if (i + 1) % 5 == 0 or i + 1 == settings.epochs:
                row["accuracy"] = float(accuracy(state.average, *test_on))
            history.append(row)
            if not math.isfinite(row["loss"]):
                raise JaxqError(f"training diverged in epoch {i + 1}: try a smaller --rate")
            last = next((f", {r['accuracy']:.2f} %" for r in reversed(history) if "accuracy" in r), "")
            detail = f"epoch {i + 1}/{settings.epochs}, loss {row['loss']:.4f}{last}"
            meter.update((i + 1) / settings.epochs, detail, row["seconds"] / (i + 1) * (settings.epochs - i - 1))
    seconds = {"compile": compiled - began, "train": time.perf_counter() - compiled}
    return model.replace(params=state.average), {"seconds": seconds, "history": history}


def main(
    model: Annotated[str, typer.Option(help=f"One of: {', '.join(SETTINGS)}.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to write.")],
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    rate: Annotated[float | None, typer.Option(help="Of learning, at its highest.")] = None,
    image_size: Annotated[int | None, typer.Option(help="28, or another: images are resized.")] = None,
    patch: Annotated[int | None, typer.Option(min=1, help="Pixels along the side of a patch.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    cache: Annotated[Path | None, typer.Option(help="Where the data set is kept.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A toy on 2000 images, to see that it runs.")] = False,
) -> None:
    """Train a classifier on Fashion-MNIST and save it."""
    try:
        if model not in SETTINGS:
            raise JaxqError(f"unknown model {model!r}; use {', '.join(SETTINGS)}")
        given = {
            "epochs": epochs,
            "batch": batch,
            "rate": rate,
            "image_size": image_size,
            "patch": patch,
            "seed": seed,
        }
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        run(dataclasses.replace(SETTINGS[model], **(TOY if smoke else {}) | changes), out, cache)
    except JaxqError as error:
        console.complain(str(error))
        raise typer.Exit(2) from error


def run(settings: Settings, out: Path, cache: Path | None = None) -> None:
    """Trains, saves, reads back, measures."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JaxqError(f"cannot write {out}: {error.strerror}") from error
    data, test = (image_data.load(DATA, split, cache) for split in ("train", "test"))
    if settings.smoke:
        data, test = (image_data.calibration(x, n, settings.seed) for x, n in ((data, 2000), (test, 500)))
    model, found = train(settings, data, test)
    vision_checkpoint.save(model, out, np.float16)
    saved = vision_checkpoint.load(out)
    # Else a GPU would round the factors of every product to ten bits.
    with jax.default_matmul_precision("highest"):
        measured = evaluate.top1(
            saved.apply, saved.params, test.images, test.labels,
            prepare=functools.partial(images.prepare, config=saved.config),
        )  # fmt: skip
    device = jax.devices()[0]
    record = {
        **measured,
        "data": DATA,
        "parameters": sum(x.size for x in jax.tree.leaves(saved.params)),
        "settings": dataclasses.asdict(settings),
        "device": f"{device.platform} {device.device_kind}, jax {jax.__version__}",
        **found,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    spent = f"{found['seconds']['train']:.0f} s, and {found['seconds']['compile']:.0f} s to compile"
    console.out().print(
        f"{out}: {measured['top1']:.2f} % of {measured['images']} test images ({spent})", markup=False
    )


if __name__ == "__main__":
    typer.run(main)
