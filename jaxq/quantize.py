"""`jaxq.quantize`: the driver. It cuts, observes, solves and replaces, one stage after another."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq import planning, tracing
from jaxq.blockwise import driver
from jaxq.calibration import calibrate
from jaxq.errors import JaxqError
from jaxq.formats.base import is_quantized
from jaxq.names import Activated
from jaxq.planning import arguments, nbytes
from jaxq.recipe import Recipe
from jaxq.report import Report
from jaxq.run import Data, Run
from jaxq.run import Event as Event
from jaxq.stages import stages


@dataclasses.dataclass
class Result:
    """params: the pytree with quantized leaves. report: what happened at each site."""

    params: Any
    report: Report


def quantize(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    weights: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    targets: Iterable[Any] | None = None,
    student: Callable[..., Any] | None = None,
    seed: int = 0,
    progress: Callable[[Event], None] | None = None,
) -> Result:
    """Quantizes the parameters of a pure function as the recipe says.

    Rules whose statistics are of the loss's gradient come first: the float function runs forwards, then backwards,
    stage by stage, and a weight is solved as soon as all that its solver asks for is known. Then, for each stage
    in turn: statistics are taken of what the *quantized* stages before it make of the calibration data; its
    weights are solved and replaced; the data moves on, through the quantized stage and, beside it, through the
    float one. Memory holds one stage's float weights, the quantized model and the activations at one cut (at every
    cut, on the host, for gradients), never the float model (give weights that are read when asked for). A solver
    that takes both kinds of statistics makes those of the gradient wait on the host.

    Args:
        fn: `fn(params, *args)`, pure.
        params: pytree of arrays, or of handles with `shape`, `dtype` and `__array__`, which are read when
            their stage comes. The pytree itself is not changed.
        batches: calibration batches of one shape, each an array (the one argument) or a tuple of arguments. A
            recipe that needs no data wants one example only, and of that only the shapes.
        recipe: see `jaxq.recipes`.
        weights: for each batch, token weights (padding 0) whose shape leads that of the data at every site. The
            loss is given them too, as keyword `weights`.
        loss: `loss(output, *args) -> (sequences,)`, see `jaxq.losses`; only recipes with statistics of its
            gradient need it. For language models, `jaxq.losses.next_token`.
        targets: for each batch, one more argument of the loss, such as labels.
        student: of recipes with steps, the function that is quantized where it is another than `fn`: with ReLU in
            place of GELU, for the step `relu_mlp`. It has the same parameters and the same stages.
        seed: of the draws of recipes with steps.
        progress: called after each site.

    Raises:
        JaxqError: a rule that matches nothing, no batches, batches of several shapes, no loss where one is
            needed, weights that are not finite, a group larger than a width; each names the path.
    """
    start = time.perf_counter()
    if isinstance(params, Activated):
        raise JaxqError("quantize the parameters first, then calibrate their activations with jaxq.calibrate")
    given = [arguments(b) for b in batches]
    if not given:
        raise JaxqError("there is no calibration data: give at least one batch")
    _check_shapes(given)
    if recipe.steps:
        return _by_steps(fn, params, given, recipe, student, seed, progress)
    found, chosen = planning.targets(fn, params, given[0], recipe)
    flat = tracing.flatten(params)
    for path in chosen:
        if is_quantized(flat[path]):
            raise JaxqError(f"{path} is quantized already: give float parameters, or leave it out of the recipe")
    if recipe.needs_gradients and loss is None:
        raise JaxqError(
            f"recipe {recipe.name} needs a loss: give loss=jaxq.losses.next_token for a language model"
        )
    data = Data(given, *(None if x is None else list(x) for x in (weights, targets)))
    run = Run(flat, chosen, progress, start)
    with _one_blas_thread():
        pieces = stages(fn, params, *given[0]) if recipe.needs_data else []
        if loss is not None and recipe.needs_gradients:
            run.by_gradients(pieces, data, loss)
        if run.left(forwards=True):
            run.by_stages(pieces, data)
        elif run.left():
            run.by_leaves()
    rows = [r for site in found for r in run.rows_of(site)]
    listed = {site.path for site in found}
    other = sum(nbytes(leaf) for path, leaf in run.flat.items() if path not in listed)
    report = Report(
        recipe=recipe.to_dict(),
        rows=rows,
        seconds=time.perf_counter() - start,
        other_bytes=other,
        drift=run.drift,
    )
    done = tracing.replace(params, run.finished())
    if recipe.activations:
        done = calibrate(fn, done, given, recipe.activations, stream="quantized")
    return Result(done, report)


def _by_steps(
    fn: Callable[..., Any],
    params: Any,
    given: Sequence[Any],
    recipe: Recipe,
    student: Callable[..., Any] | None,
    seed: int,
    progress: Callable[[Event], None] | None,
) -> Result:
    def tell(text: str, seconds: float, eta: float) -> None:
        if progress is not None:
            progress(Event(0, 0, text, math.nan, seconds, eta))

    return Result(*driver.run(fn, params, given, recipe, student=student, seed=seed, tell=tell))


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Keeps LAPACK on one thread of a CPU.

    XLA factorizes on the CPU by SciPy's OpenBLAS, whose idle threads spin against XLA's own: a 576 x 576 Cholesky
    factor then takes a second in place of 3 ms.
    """
    if jax.default_backend() != "cpu":
        yield
        return
    import scipy.linalg  # noqa: F401  # the library must be loaded to be limited
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


def _check_shapes(batches: Sequence[tuple[Any, ...]]) -> None:
    def shapes(args: tuple[Any, ...]) -> Any:
        return [(x.shape, jnp.dtype(x.dtype)) for x in jax.tree.leaves(args) if tracing.is_array(x)]

    for i, args in enumerate(batches):
        if shapes(args) != shapes(batches[0]):
            raise JaxqError(
                f"batch {i} has another shape than batch 0: pad it and give token weights, or leave it out"
            )
