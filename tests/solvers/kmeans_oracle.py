"""Weighted one-dimensional k-means in float64: dynamic programming, and every contiguous partition."""

import itertools

import numpy as np


def segment_costs(x: np.ndarray, f: np.ndarray) -> np.ndarray:
    """cost[i, j] of the points i .. j - 1 of ascending `x`, each computed from its own mean."""
    n = len(x)
    cost = np.full((n + 1, n + 1), np.inf)
    for i in range(n + 1):
        for j in range(i, n + 1):
            weight = f[i:j].sum()
            mean = f[i:j] @ x[i:j] / weight if weight > 0 else 0.0
            cost[i, j] = f[i:j] @ (x[i:j] - mean) ** 2
    return cost


def dynamic_programming(x, f, entries: int) -> float:
    """The least cost of at most `entries` centroids."""
    order = np.argsort(x)
    cost = segment_costs(np.asarray(x, np.float64)[order], np.asarray(f, np.float64)[order])
    best = cost[0]
    for _ in range(entries - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[-1])


def every_partition(x, f, entries: int) -> float:
    """The least cost over all cuts of the sorted points into `entries` segments, some perhaps empty."""
    order = np.argsort(x)
    cost = segment_costs(np.asarray(x, np.float64)[order], np.asarray(f, np.float64)[order])
    n = len(x)
    return min(
        sum(cost[i, j] for i, j in itertools.pairwise((0, *cuts, n)))
        for cuts in itertools.combinations_with_replacement(range(n + 1), entries - 1)
    )


def cost_of(x, f, table) -> float:
    """sum f d^2 with d the distance to the nearest entry."""
    x, f, table = (np.asarray(part, np.float64) for part in (x, f, table))
    return float(f @ np.min((x[:, None] - table) ** 2, axis=1))


def problem(seed: int, n: int, channels: int, decades: float) -> tuple[np.ndarray, np.ndarray]:
    """Normal weights and log-uniform importance, `(n, channels)` float32."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, channels)).astype(np.float32)
    return w, (10.0 ** rng.uniform(-decades, 0, (n, channels))).astype(np.float32)
