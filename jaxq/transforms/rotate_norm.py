"""Rotations of the residual stream of a pre-LayerNorm network, folded into the weights around it.

An outlier channel of the stream is spread over all channels by x -> x Q with Q orthogonal, and the function of the
network stays if every writer is followed by Q and every reader preceded by Q^T. QuaRot (Ashkboos et al. 2024,
arXiv 2404.00456) and GLF-Q (2026 preprint, for ViT) do so after they have turned each LayerNorm into an RMSNorm:
scale and bias go into the linear layers behind it (`fold_to_rms`), the subtraction of the mean into the writers
(`centre`).

Here the model's code stays. A LayerNorm of scale 1 and bias 0 commutes with every Q that keeps the vector of ones,
1 Q = 1 and Q 1 = 1: x and x Q have the same mean m, (x - m 1) Q = x Q - m 1, and the norms are equal. `rotation`
gives such a Q; `centre` is not needed then, and costs nothing. Writers are the class token, the positions, the
patch embedding and the outputs of attention and MLP; readers are q, k, v, fc1 and the classifier. A LayerScale on
the way into the stream goes into its writer first. A norm that itself writes into the stream (Swin's patch
embedding, post-norm) cannot be rotated.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxq.errors import JaxqError


class Folded(NamedTuple):
    """What `fold_to_rms` replaces its arguments by: a norm of scale 1 and bias 0, and the linear layer."""

    norm_scale: Float[Array, " in"]
    norm_bias: Float[Array, " in"]
    kernel: Float[Array, "in *out"]
    bias: Float[Array, "*out"]


def fold_to_rms(
    norm_scale: Float[Array, " in"],
    norm_bias: Float[Array, " in"] | None,
    kernel: Float[Array, "in *out"],
    bias: Float[Array, "*out"] | None,
) -> Folded:
    """(n * scale + norm_bias) @ kernel + bias = n @ kernel' + bias', for the normalized n.

    For a norm in front of several linear layers, call it for each, with the original norm.

    Args:
        norm_bias, bias: None counts as zeros.

    Returns arrays of the same shapes and dtypes; sums are in float32. Raises JaxqError if the kernel's first axis
    is not the norm's.
    """
    _check(kernel.shape[0], norm_scale.shape[0], kernel.shape)
    exact = kernel.astype(jnp.float32)
    scaled = exact * norm_scale.astype(jnp.float32).reshape((-1,) + (1,) * (kernel.ndim - 1))
    offset = jnp.zeros(kernel.shape[1:]) if bias is None else bias.astype(jnp.float32)
    if norm_bias is not None:
        offset = offset + jnp.tensordot(norm_bias.astype(jnp.float32), exact, 1, precision="highest")
    dtype = kernel.dtype if bias is None else bias.dtype
    return Folded(
        jnp.ones_like(norm_scale),
        jnp.zeros_like(norm_scale if norm_bias is None else norm_bias),
        scaled.astype(kernel.dtype),
        offset.astype(dtype),
    )


def centre(
    kernel: Float[Array, "*in out"], bias: Float[Array, " out"] | None
) -> tuple[Float[Array, "*in out"], Float[Array, " out"] | None]:
    """A writer whose outputs have mean 0 over the channels; embeddings are kernels without a bias.

    With every writer centred, the stream is, and a LayerNorm of it is an RMSNorm of the same epsilon. The function
    of a pre-LayerNorm network stays, since each norm would subtract the mean.
    """

    def moved(x: Array) -> Array:
        exact = x.astype(jnp.float32)
        return (exact - jnp.mean(exact, axis=-1, keepdims=True)).astype(x.dtype)

    return moved(kernel), None if bias is None else moved(bias)


@functools.partial(jax.jit, static_argnums=0)
def rotation(width: int, key: Key[Array, ""]) -> Float[Array, "width width"]:
    """A random orthogonal Q, float32, that keeps the vector of ones: Q 1 = 1 and 1 Q = 1.

    With width = 4^k rest: P (S x ... x S x R) P', a Kronecker product of k matrices S = J / 2 - I, the Hadamard
    matrix of order 4 whose rows have equal sums, and of a random orthogonal R that keeps the ones. P and P' are
    random permutations, in place of QuaRot's random signs, which would move the ones. For a power of 4 all
    elements are +-1 / sqrt(width), the flattest there are; else at most 2^-k. All to the rounding of float32.

    Raises JaxqError for a width below 1. Time: O(rest^3 + width^2).
    """
    if width < 1:
        raise JaxqError(f"there is no rotation of width {width}")
    rows, columns, draw = jax.random.split(key, 3)
    rest, flat = width, jnp.ones((1, 1))
    while rest % 4 == 0:
        rest, flat = rest // 4, jnp.kron(flat, jnp.full((4, 4), 0.5) - jnp.eye(4))
    whole = jnp.kron(flat, keeping_ones(rest, draw))
    return whole[jax.random.permutation(rows, width)][:, jax.random.permutation(columns, width)]


@functools.partial(jax.jit, static_argnums=0)
def keeping_ones(width: int, key: Key[Array, ""]) -> Float[Array, "width width"]:
    """A uniformly random one of the orthogonal matrices that keep the vector of ones.

    In a basis whose first vector is 1 / sqrt(width) it is 1 beside a random orthogonal matrix. The basis is a
    reflection, so its own inverse.
    """
    ones = jnp.full(width, width**-0.5)
    normal = ones.at[0].add(-1.0)
    length = jnp.sum(jnp.square(normal))
    basis = jnp.eye(width) - 2 * jnp.outer(normal, normal) / jnp.where(length > 0, length, 1.0)
    q, r = jnp.linalg.qr(jax.random.normal(key, (width - 1, width - 1)))
    inner = jnp.eye(width).at[1:, 1:].set(q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0))
    return jnp.matmul(jnp.matmul(basis, inner, precision="highest"), basis, precision="highest")


def rotate_reader(kernel: Float[Array, "width ..."], q: Float[Array, "width width"]) -> Float[Array, "width ..."]:
    """The kernel that makes of x Q what `kernel` makes of x: Q^T kernel. Its bias stays."""
    _check(kernel.shape[0], q.shape[0], kernel.shape)
    return jnp.tensordot(q.T, kernel.astype(jnp.float32), 1, precision="highest").astype(kernel.dtype)


def rotate_writer(
    kernel: Float[Array, "*in width"], bias: Float[Array, " width"] | None, q: Float[Array, "width width"]
) -> tuple[Float[Array, "*in width"], Float[Array, " width"] | None]:
    """The kernel and bias whose outputs are those of the given ones times Q; for embeddings, bias None."""
    _check(kernel.shape[-1], q.shape[0], kernel.shape)

    def turned(x: Array) -> Array:
        return jnp.matmul(x.astype(jnp.float32), q, precision="highest").astype(x.dtype)

    return turned(kernel), None if bias is None else turned(bias)


def _check(found: int, width: int, shape: tuple[int, ...]) -> None:
    if found != width:
        raise JaxqError(f"a kernel of shape {tuple(shape)} does not meet a stream of width {width}")
