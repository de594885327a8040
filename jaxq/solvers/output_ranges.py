"""Static ranges of the two operands of a product, by the error of what it gives: linear layers and attention.

Each operand's range is searched with the other one quantized, in turn. Axes and candidates are those of
`solvers.ranges`, whose searches start these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxq.errors import JaxqError
from jaxq.formats.activations import AffineQuantizer, check_bits
from jaxq.solvers.common import Jitted
from jaxq.solvers.ranges import (
    ACTIVATION_FLOOR,
    WEIGHT_FLOOR,
    Axes,
    affine,
    axes_of,
    by_grid,
    checked,
    choose,
    least_error,
    quantiles,
    scales_and_zeros,
    zero_points,
)

Product = Callable[[Array, Array], Array]
Ends = tuple[Array, Array]


def matmul(x: Array, w: Array) -> Array:
    """`x @ w` in full float32."""
    return jnp.matmul(x, w, precision="highest")


def linear_output_error(
    x: Float[Array, "*tokens in"],
    w: Float[Array, "in out"],
    bits: int | None,
    weight_bits: int,
    *,
    rounds: int = 3,
    count: int = 128,
) -> tuple[AffineQuantizer | None, AffineQuantizer]:
    """Grids of a linear layer's input, per tensor, and of its weight, per output (APHQ-ViT's code).

    Both start from `mse_grid`. Then in turn, `rounds` times: the weight's grids by the squared error of the output
    made with the quantized input, channel by channel; the input's grid by that with the quantized weight. The
    error never grows from one to the next.

    Args:
        x: input of the layer.
        w: the weight.
        bits: of the input; None leaves it alone, and then the weight is searched once.
        weight_bits: of the weight.
        rounds: 0 for the grids of least error of the operands themselves.
        count: candidates of each search.

    Returns (quantizer of x or None, quantizer of w with members `(out,)`). Time: errors are quadratic in what a
    candidate changes, so that one of the weight costs in^2 out and one of the input tokens in min(in, out).
    """
    for each in (bits, weight_bits):
        None if each is None else check_bits(each)
    x, w = checked(x), checked(w)
    return _linear(x.reshape(-1, x.shape[-1]), w, bits, weight_bits, rounds, count)


def product_output_error(
    a: Float[Array, "*a"],
    b: Float[Array, "*b"],
    bits: int | tuple[int, int],
    *,
    axes: Axes = (0, 2, 3),
    product: Product = matmul,
    rounds: int = 3,
    points: int = 128,
) -> tuple[AffineQuantizer, AffineQuantizer]:
    """Grids of both operands of a product of activations, by the squared error of the product (APHQ-ViT's code).

    A range's upper end goes from Q_0.99 to Q_0.99999 and its lower from Q_0.01 to Q_0.00001 in equal steps, the
    last left out. First both ends together: for a with b not quantized, for b with a quantized. Then in turn,
    `rounds` times: the lower end of a, its upper end, those of b. That never makes the error larger.

    Args:
        a: first operand, such as the queries `(batch, head, token, feature)` or the attention weights.
        b: second operand, such as the keys, already transposed, or the values.
        bits: of both, or of each.
        axes: axes of a, b and the product that share a grid; the default keeps the heads.
        product: how they meet; it keeps the axes that are not in `axes` where they are.
        rounds: of the search for one end at a time.
        points: candidates of each search.
    """
    pair = (bits, bits) if isinstance(bits, int) else tuple(bits)
    for each in pair:
        check_bits(each)
    a, b = checked(a), checked(b)
    if a.ndim != b.ndim:
        raise JaxqError(f"operands of shape {a.shape} and {b.shape} do not have the same number of axes")
    return _product(a, b, pair, axes_of(a, axes), product, rounds, points)


# Compiling each search with a trial of every way to multiply would take a GPU longer than all it is for: 18 s each
# for the six of a DeiT-Small block, 4 s without those of Triton (H200), where a search runs for a second or two.
_SEARCH = {"xla_gpu_enable_triton_gemm": False}


def _linear_search(
    x: Array, w: Array, bits: int | None, weight_bits: int, rounds: int, count: int
) -> tuple[AffineQuantizer | None, AffineQuantizer]:
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    w_rows, w_grid = by_grid(w, (0,))
    w_candidates = scales_and_zeros(w_rows, weight_bits, zero_points(weight_bits, None), count, WEIGHT_FLOOR)
    for_w = least_error(w_rows, w_candidates, w_grid)

    def by_w(x_hat: Array) -> AffineQuantizer:
        # |x_hat (w + d) - x w|^2 for a change d of the weight, but for what d does not change.
        gram, cross = matmul(x_hat.T, x_hat), matmul(x_hat.T, matmul(x_hat - x, w))

        def error(q: AffineQuantizer) -> Array:
            d = q(w) - w
            return jnp.sum(d * (matmul(gram, d) + 2 * cross), axis=0)

        return choose(w_candidates, error)

    if bits is None:
        return None, by_w(x) if rounds else for_w
    x_rows, _ = by_grid(x, (0, 1))
    x_candidates = scales_and_zeros(x_rows, bits, zero_points(bits, None), count, ACTIVATION_FLOOR)
    x_candidates = jax.tree.map(lambda leaf: leaf[:, 0], x_candidates)
    for_x = choose(x_candidates, lambda q: jnp.mean(jnp.square(q(x) - x)))

    def by_x(w_hat: Array) -> AffineQuantizer:
        # |(x + d) w_hat - x w|^2 for a change d of the input.
        missed = matmul(x, w_hat - w)
        if w.shape[1] <= w.shape[0]:
            return choose(x_candidates, lambda q: jnp.sum(jnp.square(matmul(q(x) - x, w_hat) + missed)))
        gram, cross = matmul(w_hat, w_hat.T), matmul(missed, w_hat.T)

        def error(q: AffineQuantizer) -> Array:
            d = q(x) - x
            return jnp.sum(d * (matmul(d, gram) + 2 * cross))

        return choose(x_candidates, error)

    def both(_: Any, found: tuple[AffineQuantizer, AffineQuantizer]) -> tuple[AffineQuantizer, AffineQuantizer]:
        for_w = by_w(found[0](x))
        return by_x(for_w(w)), for_w

    return jax.lax.fori_loop(0, rounds, both, (for_x, for_w))


_linear = Jitted(_linear_search, (2, 3, 4, 5), _SEARCH)


def _product_search(
    a: Array,
    b: Array,
    bits: tuple[int, int],
    axes: tuple[int, ...],
    product: Product,
    rounds: int,
    points: int,
) -> tuple[AffineQuantizer, AffineQuantizer]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    exact = product(a, b)

    def ends(x: Array) -> Ends:
        """Candidates for the lower and the upper end, `(points, *grid)` each."""
        rows, grid = by_grid(x, axes)
        inner, outer = quantiles(rows, (0.01, 0.99)), quantiles(rows, (0.00001, 0.99999))
        share = (jnp.arange(points) / points)[:, None, None]
        low, high = jnp.moveaxis(inner + (outer - inner) * share, 1, 0)
        return low.reshape((points, *grid)), high.reshape((points, *grid))

    def error(a_hat: Array, b_hat: Array) -> Array:
        rows, grid = by_grid(exact - product(a_hat, b_hat), axes)
        return jnp.mean(jnp.square(rows), axis=1).reshape(grid)

    def a_hat(end: Ends) -> Array:
        return affine(*end, bits[0])(a)

    def b_hat(end: Ends) -> Array:
        return affine(*end, bits[1])(b)

    def each_end(candidates: Ends, found: Ends, error: Callable[[Ends], Array]) -> Ends:
        low = choose(candidates[0], lambda low: error((low, found[1])))
        return low, choose(candidates[1], lambda high: error((low, high)))

    def both(_: Any, found: tuple[Ends, Ends]) -> tuple[Ends, Ends]:
        of_b = b_hat(found[1])
        for_a = each_end(a_ends, found[0], lambda end: error(a_hat(end), of_b))
        of_a = a_hat(for_a)
        return for_a, each_end(b_ends, found[1], lambda end: error(of_a, b_hat(end)))

    a_ends, b_ends = ends(a), ends(b)
    for_a = choose(a_ends, lambda end: error(a_hat(end), b))
    of_a = a_hat(for_a)
    for_b = choose(b_ends, lambda end: error(of_a, b_hat(end)))
    for_a, for_b = jax.lax.fori_loop(0, rounds, both, (for_a, for_b))
    return affine(for_a[0], for_a[1], bits[0]), affine(for_b[0], for_b[1], bits[1])


_product = Jitted(_product_search, (2, 3, 4, 5, 6), _SEARCH)
