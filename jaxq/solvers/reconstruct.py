"""Block reconstruction: trains a few leaves of a block until its output is the float block's again.

The generic loop of BRECQ (Li et al. 2021), QDrop (Wei et al. 2022), APHQ-ViT and I&S-ViT. What is trained, how the
block runs and what an error costs are the caller's; so it knows nothing of models or quantizers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxq import masks
from jaxq.errors import JaxqError


class Data(NamedTuple):
    """Calibration examples along axis 0 of every leaf.

    quantized: inputs of the block that the quantized blocks before it make; floats: those of the float function,
    of the same structure, or None; targets: the float block's outputs. Leaves without an example axis do not
    belong here but into `fixed`.
    """

    quantized: PyTree
    floats: PyTree | None
    targets: PyTree


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long, and in which steps.

    Args:
        iterations: steps of training.
        batch: examples of a step, drawn without replacement from all.
        rates: {group: learning rate at first} of Adam for each top-level key of what is trained.
        cosine: the groups whose rate falls to 0 along a cosine; that of the others stays.
        mixed: probability with which an element of the input is that of the quantized stream; the others are of
            the float one (QDrop). 1.0 takes the quantized stream, 0.0 the float one.
        scale: of the error, after division by its value in the first step; None leaves it as it is.
        chunk: steps between two calls of `progress`.
    """

    iterations: int = 20000
    batch: int = 32
    rates: tuple[tuple[str, float], ...] = (("rounding", 1e-3), ("scales", 4e-5))
    cosine: tuple[str, ...] = ("scales",)
    mixed: float = 0.5
    scale: float | None = 2.0
    chunk: int = 500

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch < 1 or self.chunk < 1:
            raise JaxqError("reconstruction takes at least one iteration, one example a step and one step a chunk")
        if not 0 <= self.mixed <= 1:
            raise JaxqError(f"mixed is a probability, not {self.mixed!r}")
        strange = set(self.cosine) - dict(self.rates).keys()
        if strange:
            raise JaxqError(f"there is no rate for {', '.join(sorted(strange))}")


#: run(trained, fixed, inputs, key) -> outputs of the block, a pytree like the targets.
Run = Callable[[Any, Any, Any, Any], Any]

#: error(outputs, targets, fixed) -> scalar.
Error = Callable[[Any, Any, Any], Any]

#: penalty(trained, share of the iterations done) -> scalar, such as `jaxq.solvers.adaround.regularizer`.
Penalty = Callable[[Any, Any], Any]


#: renew(trained, fixed, iterations done) -> fixed, such as weights of the error that depend on where training is.
Renew = Callable[[Any, Any, int], Any]


class Trained(NamedTuple):
    """What reconstruction gives: the trained leaves, and the mean error of each chunk, not scaled."""

    trained: Any
    errors: list[float]


#: Below it an error counts as none, and its derivative as 0: Adam would make large steps of rounding noise.
NO_ERROR = 1e-12


def reconstruct(
    run: Run,
    error: Error,
    penalty: Penalty | None,
    trained: dict[str, Any],
    fixed: Any,
    data: Data,
    settings: Settings = Settings(),  # noqa: B008
    *,
    key: Key[Array, ""] | None = None,
    renew: Renew | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Trained:
    """Minimises error(run(trained, fixed, inputs, key), targets) over `trained`, by Adam.

    Args:
        run, error, penalty: pure; see above. Blocks that are given the same three functions, settings and shapes
            share one compilation, so everything that differs between blocks goes through `fixed`.
        trained: {group: pytree of float leaves}; the groups are those of `settings.rates`.
        fixed: whatever else the block needs; not trained.
        data: the examples, on the device for as long as it takes.
        settings: how long, and in which steps.
        key: of the draws; default `jax.random.key(0)`. Equal keys give equal results.
        renew: called between chunks; what it gives takes the place of `fixed`, and has its structure and shapes.
        progress: called with (steps done, mean error of the last chunk).

    Raises JaxqError for groups without a rate, data without examples, and an error that is not finite. Time:
    iterations times a forward and a backward pass of `batch` examples, and one compilation.
    """
    _check_groups(trained, settings)
    sizes = {len(leaf) for leaf in jax.tree.leaves(tuple(data))}
    if len(sizes) != 1 or min(sizes) < settings.batch:
        raise JaxqError(f"a step takes {settings.batch} examples, and the data have {sorted(sizes)}")
    key = jax.random.key(0) if key is None else key
    # Steps overwrite what they are given, and these arrays are the caller's.
    own = jax.tree.map(jnp.array, trained)
    state = State(own, _optimizer(settings).init(own), jnp.float32(0.0), jnp.int32(0))
    advance = functools.partial(_steps, run, error, penalty, settings)
    return _in_chunks(advance, state, fixed, data, key, settings, renew, progress)


def reconstruct_together(
    run: Run,
    error: Error,
    penalty: Penalty | None,
    trained: dict[str, Any],
    fixed: Any,
    data: Data,
    settings: Settings = Settings(),  # noqa: B008
    *,
    keys: Key[Array, " blocks"],
    progress: Callable[[int, float], None] | None = None,
) -> Trained:
    """`reconstruct` of several equal blocks that do not depend on each other, side by side (by vmap).

    All as there, with the blocks along axis 0 of every leaf of `trained`, `fixed` and `data`, behind it the
    examples of `data`, and a key for each block. Errors are means over the blocks. It takes the memory of all
    blocks; an accelerator that one small block leaves idle is quicker, a CPU is not.
    """
    _check_groups(trained, settings)
    shapes = {leaf.shape[:2] for leaf in jax.tree.leaves(tuple(data))}
    if len(shapes) != 1 or min(shapes)[1] < settings.batch or min(shapes)[0] != len(keys):
        raise JaxqError(
            f"a step takes {settings.batch} examples of {len(keys)} blocks, and the data have {sorted(shapes)}"
        )
    own = jax.tree.map(jnp.array, trained)
    zeros = jnp.zeros(len(keys))
    state = State(own, jax.vmap(_optimizer(settings).init)(own), zeros, zeros.astype(jnp.int32))
    advance = functools.partial(_steps_together, run, error, penalty, settings)
    return _in_chunks(advance, state, fixed, data, keys, settings, None, progress)


def _check_groups(trained: dict[str, Any], settings: Settings) -> None:
    rates = dict(settings.rates)
    if set(trained) != set(rates):
        raise JaxqError(f"there are rates for {sorted(rates)}, and {sorted(trained)} to train")


def _in_chunks(
    advance: Callable[..., tuple[State, Array]],
    state: State,
    fixed: Any,
    data: Data,
    key: Array,
    settings: Settings,
    renew: Renew | None,
    progress: Callable[[int, float], None] | None,
) -> Trained:
    """advance(steps, state, fixed, data, key), with a look after each chunk; errors are means of what it gives."""
    errors: list[float] = []
    done = 0
    while done < settings.iterations:
        steps = min(settings.chunk, settings.iterations - done)
        state, found = advance(steps, state, fixed, data, key)
        mean = jnp.mean(found)
        done += steps
        errors.append(float(mean))
        if not jnp.isfinite(mean):
            raise JaxqError(f"the error of reconstruction is {errors[-1]} after {done} steps: use smaller rates")
        if progress is not None:
            progress(done, errors[-1])
        if renew is not None and done < settings.iterations:
            fixed = renew(state.trained, fixed, done)
    return Trained(state.trained, errors)


class State(NamedTuple):
    """What a step changes. first: error of the first step."""

    trained: Any
    optimizer: Any
    first: Float[Array, ""]
    step: Any


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    def adam(group: str, rate: float) -> optax.GradientTransformation:
        falling = group in settings.cosine
        return optax.adam(optax.cosine_decay_schedule(rate, settings.iterations) if falling else rate)

    return optax.multi_transform({group: adam(group, rate) for group, rate in settings.rates}, _labels)


def _labels(trained: dict[str, Any]) -> dict[str, str]:
    """The optimizer of each leaf: every group is one."""
    return {group: group for group in trained}


def _several(
    run: Run,
    error: Error,
    penalty: Penalty | None,
    settings: Settings,
    steps: int,
    state: State,
    fixed: Any,
    data: Data,
    key: Array,
) -> tuple[State, Array]:
    optimizer = _optimizer(settings)
    count = len(jax.tree.leaves(data.targets)[0])

    def loss(trained: Any, first: Array, step: Array, batch: Data, draw: Array) -> tuple[Array, Array]:
        mix, inner = jax.random.split(draw)
        outputs = run(trained, fixed, mixed(batch, settings.mixed, mix), inner)
        found = error(outputs, batch.targets, fixed)
        total = found
        if settings.scale is not None:
            reference = jnp.where(step == 0, jax.lax.stop_gradient(found), first)
            total = settings.scale * found / jnp.where(reference > NO_ERROR, reference, jnp.inf)
        if penalty is not None:
            total = total + penalty(trained, (step + 1) / settings.iterations)
        return total, found

    def one(state: State, _: None) -> tuple[State, Array]:
        pick, draw = jax.random.split(jax.random.fold_in(key, state.step))
        rows = jax.random.permutation(pick, count)[: settings.batch]
        batch = jax.tree.map(lambda x: x[rows], data)
        gradients, found = jax.grad(loss, has_aux=True)(state.trained, state.first, state.step, batch, draw)
        updates, moments = optimizer.update(gradients, state.optimizer, state.trained)
        first = jnp.where(state.step == 0, found, state.first)
        return State(optax.apply_updates(state.trained, updates), moments, first, state.step + 1), found

    state, found = jax.lax.scan(one, state, None, length=steps)
    return state, jnp.mean(found)


_steps = jax.jit(_several, static_argnums=(0, 1, 2, 3, 4), donate_argnums=5)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=5)
def _steps_together(
    run: Run, error: Error, penalty: Penalty | None, settings: Settings, steps: int, *blocks: Any
) -> tuple[State, Array]:
    return jax.vmap(functools.partial(_several, run, error, penalty, settings, steps))(*blocks)


def mixed(batch: Data, probability: float, key: Key[Array, ""]) -> PyTree:
    """The block's input: elements of the quantized stream with the given probability, else of the float one."""
    if batch.floats is None or probability == 1:
        return batch.quantized
    if probability == 0:
        return batch.floats
    leaves, tree = jax.tree.flatten(batch.quantized)
    keys = jax.random.split(key, len(leaves))
    floats = jax.tree.leaves(batch.floats)
    return jax.tree.unflatten(
        tree,
        [
            jnp.where(masks.bernoulli(k, probability, q.shape), q, x)
            for k, q, x in zip(keys, leaves, floats, strict=True)
        ],
    )
