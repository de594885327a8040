"""GPTQ as the paper prints it, in plain float64 NumPy: a loop over columns and the factor of the inverse."""

import numpy as np

from jaxq.formats import Uniform


def stored_scale(exact: np.ndarray, dtype: str) -> np.ndarray:
    """The smallest float16 (or float32: the nearest) at or above the exact scale."""
    if dtype == "float32":
        return exact.astype(np.float32).astype(np.float64)
    half = exact.astype(np.float16)
    return np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half).astype(np.float64)


def fit(group: np.ndarray, format: Uniform) -> tuple[np.ndarray, np.ndarray]:
    """Min-max scale and zero of each column of a `(rows, out)` group."""
    levels = 2**format.bits - 1
    if format.symmetric:
        scale = stored_scale(2 * np.abs(group).max(0) / levels, format.scale_dtype)
        return scale, np.full(scale.shape, 2.0 ** (format.bits - 1))
    low, high = np.minimum(group.min(0), 0), np.maximum(group.max(0), 0)
    scale = stored_scale((high - low) / levels, format.scale_dtype)
    return scale, np.clip(np.round(-low / scale), 0, levels)


def gptq(w, hessian, format: Uniform, damping: float = 0.01, static: bool = False, activation: bool = False):
    """(dequantized weight, codes, distance of the closest call to a rounding boundary), all `(in, out)`."""
    w, hessian = np.array(w, np.float64), np.array(hessian, np.float64)
    rows = w.shape[0]
    size = format.group_size if isinstance(format.group_size, int) else rows
    hessian /= np.diag(hessian).mean()
    static = static or activation
    grids = [fit(w[start : start + size], format) for start in range(0, rows, size)]
    order = np.argsort(-np.diag(hessian), kind="stable") if activation else np.arange(rows)
    work, hessian = w[order].copy(), hessian[np.ix_(order, order)] + damping * np.eye(rows)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    dense, codes, margin = np.zeros_like(w), np.zeros(w.shape, np.uint8), np.inf
    for row in range(rows):
        group = order[row] // size
        if not static and row % size == 0 and size < rows:
            grids[group] = fit(work[row : row + size], format)
        scale, zero = grids[group]
        steps = work[row] / scale
        margin = min(margin, np.abs(np.abs(steps - np.floor(steps)) - 0.5).min())
        codes[order[row]] = np.clip(np.round(steps) + zero, 0, 2**format.bits - 1)
        dense[order[row]] = (codes[order[row]] - zero) * scale
        error = (work[row] - dense[order[row]]) / upper[row, row]
        work[row:] -= upper[row, row:, None] * error
    return dense, codes, margin


def objective(w, dense, hessian) -> float:
    """tr((W - Q)^T H (W - Q)) in float64."""
    difference = np.asarray(w, np.float64) - np.asarray(dense, np.float64)
    return float(np.einsum("io,ij,jo->", difference, np.asarray(hessian, np.float64), difference))


def problem(seed: int, rows: int, out: int, correlation: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """A weight and a Hessian with correlated inputs of unequal strength."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(4 * rows, 1 + rows // 8))
    x = correlation * shared @ rng.normal(size=(shared.shape[1], rows)) + rng.normal(size=(4 * rows, rows))
    x *= rng.uniform(0.3, 2, size=rows)
    return rng.normal(size=(rows, out)).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)
