"""Leaves that are read from disk only when somebody asks for their values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16")
import numpy as np


@dataclass(frozen=True, eq=False)
class Lazy:
    """A parameter still in its file: shape and dtype are known, values come with np.asarray or jnp.asarray.

    read: gives the values in the logical orientation, any dtype; it may be a view of a mapped file. It is
    called on every access and nothing is kept, so a caller that is done with the values frees them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values once read."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a lazy parameter is read from its file: it cannot be had without a copy")
        return _own(self.read(), self.dtype if dtype is None else dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Values at a numpy index; of a mapped file only the pages that hold them are read."""
        return _own(self.read()[index], self.dtype)


def _own(values: np.ndarray, dtype: Any) -> np.ndarray:
    # order="C" makes a transposed view contiguous in the same pass that casts it.
    return np.array(values, dtype=dtype, order="C")
