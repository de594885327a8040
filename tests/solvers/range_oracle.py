"""Range searches in float64 NumPy: samples, candidates, and what a grid makes of them."""

import numpy as np

# A search compares errors that are sums in float32: the best is known up to this much.
CLOSE = 1 + 1e-5


def heavy(seed, *shape, shift=0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(3, size=shape) + shift).astype(np.float32)


def quantize(x, scale, zero, bits):
    """The affine quantizer in float64."""
    x, scale, zero = (np.asarray(v, np.float64) for v in (x, scale, zero))
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def error(x, y):
    return np.mean((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2)


def grid_candidates(x, bits, zeros, steps, floor=1e-4):
    """All (scale, zero) of the APHQ-ViT search of a flat sample."""
    x = np.asarray(x, np.float64)
    near = (np.quantile(x, 0.9) - np.quantile(x, 0.1)) / (2**bits - 1)
    far = (max(x.max(), 0) - min(x.min(), 0)) / (2**bits - 1)
    return [(max(s, floor), z) for z in zeros for s in np.linspace(near, far, steps)]
