"""Random quantized arrays of every format that has kernels."""

import jax.numpy as jnp
import numpy as np

from jaxq.formats import BitPlane, Codebook, QuantizedArray, Uniform, bitplane, codebook, uniform


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_array(format, *shape: int, seed: int = 0) -> QuantizedArray:
    """An array of canonical `shape` with random codes, tables, scales and zero points."""
    rng = np.random.default_rng(seed)
    *batch, width, out = shape
    codes = jnp.asarray(rng.integers(0, 2**format.bits, shape).astype(np.uint8))
    groups = -(-width // format.rows_per_group(width))
    if isinstance(format, Codebook):
        table = rng.normal(size=(*batch, groups * format.entries, out)).astype(np.float32)
        return codebook.assemble(codes, jnp.asarray(table), format)
    if isinstance(format, BitPlane):
        scale = rng.normal(size=(*batch, format.bits, groups, out)).astype(np.float32)
        offset = rng.normal(size=(*batch, groups, out)).astype(np.float32)
        return bitplane.assemble(codes, jnp.asarray(scale), jnp.asarray(offset), format)
    assert isinstance(format, Uniform)
    channels = 1 if format.group_size == "tensor" else out
    scale = rng.uniform(0.5, 2, (*batch, groups, channels)).astype(np.float32)
    zero = rng.integers(0, 2**format.bits, (*batch, groups, channels))
    return uniform.assemble(codes, jnp.asarray(scale), jnp.asarray(zero), format)


def exact(x, array: QuantizedArray) -> np.ndarray:
    """`x @ array` in float64."""
    return np.asarray(x, np.float64) @ np.asarray(array.matrix(jnp.float32), np.float64)


def error(y, expected: np.ndarray) -> float:
    """Relative error of a product, in the norm."""
    return float(np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected))
