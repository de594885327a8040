"""Labelled images for evaluation and calibration; `jaxq.models.images` makes of them what a model takes.

Fashion-MNIST (Xiao et al. 2017, MIT licence) comes from a Debian package, in the IDX format of MNIST.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from jaxq.assets import Package, fetch
from jaxq.errors import JaxqError
from jaxq.models.images import prepare
from jaxq.models.vision_config import VisionConfig

Split = Literal["train", "test"]
_BYTES = 1 << 31  # an IDX file that claims to hold more is damaged


@dataclass(frozen=True, eq=False)
class Images:
    """Images with the number of each one's class, and the names of the classes."""

    images: UInt8[np.ndarray, "N H W C"]
    labels: Int32[np.ndarray, " N"]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | np.ndarray) -> Images:
        """The images at `rows`: a slice, or an array of indices."""
        return Images(self.images[rows], self.labels[rows], self.names)


def load(name: str, split: Split, cache: str | os.PathLike[str] | None = None) -> Images:
    """A data set by name (`NAMES`). Raises `JaxqError` for an unknown one, or one that cannot be had."""
    if name not in NAMES:
        raise JaxqError(f"there is no image data set {name!r}: choose one of {', '.join(NAMES)}")
    return NAMES[name](split, cache)


def fashion_mnist(split: Split, cache: str | os.PathLike[str] | None = None) -> Images:
    """Grey 28 x 28 pictures of clothes in ten equal classes: 60000 to train with and 10000 to test."""
    if split not in get_args(Split):
        raise JaxqError(f"fashion-mnist has the splits {' and '.join(get_args(Split))}, not {split!r}")
    package = Package(
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ("usr/share/datasets/fashion-mnist/*-ubyte.gz",),
        "debian",
    )
    names = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot"
    folder = fetch(package, cache) / "usr/share/datasets/fashion-mnist"
    return read_pair(folder, "train" if split == "train" else "t10k", tuple(names.split()))


def read_pair(folder: Path, prefix: str, names: tuple[str, ...]) -> Images:
    """Images and labels as MNIST keeps them: PREFIX-images-idx3-ubyte.gz and PREFIX-labels-idx1-ubyte.gz."""
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", axes=3)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", axes=1)
    if len(images) != len(labels):
        raise JaxqError(f"{folder} is damaged: {len(images)} {prefix} images, {len(labels)} labels")
    if len(labels) == 0 or labels.max() >= len(names):
        raise JaxqError(f"{folder} is damaged: {prefix} labels are not numbers of its {len(names)} classes")
    return Images(images[..., None], labels.astype(np.int32), names)


def read_idx(path: str | os.PathLike[str], axes: int) -> UInt8[np.ndarray, ...]:
    """The array of a gzipped IDX file of bytes with `axes` axes.

    The header is two zeros, the type (8 for bytes), the number of axes, and each size as a big-endian 32-bit
    number; then come the values, the last axis fastest. Raises `JaxqError` for any other file.
    """
    try:
        with gzip.open(path, "rb") as file:
            magic = file.read(4)
            if magic != bytes((0, 0, 8, axes)):
                raise JaxqError(
                    f"{path} is no IDX file of bytes with {axes} axes: it starts with {magic.hex(' ')}"
                )
            sizes = file.read(4 * axes)
            shape = struct.unpack(f">{axes}I", sizes) if len(sizes) == 4 * axes else (0,)
            wanted = math.prod(shape)
            if len(sizes) < 4 * axes or wanted > _BYTES:
                raise JaxqError(f"{path} is damaged: its header ends early or claims {wanted} bytes")
            data = file.read(wanted + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise JaxqError(f"cannot read {path}: {error}") from error
    if len(data) != wanted:
        found = "more" if len(data) > wanted else len(data)
        raise JaxqError(f"{path} is damaged: its header says {wanted} bytes, it holds {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def calibration(data: Images, count: int, seed: int = 0) -> Images:
    """`count` different images, every choice of them equally likely, in their order; deterministic in `seed`."""
    if not 1 <= count <= len(data):
        raise JaxqError(f"{count} images asked for, there are {len(data)}: choose from 1 to {len(data)}")
    return data[np.sort(np.random.default_rng(seed).choice(len(data), count, replace=False))]


def batches(data: Images, config: VisionConfig, size: int) -> list[Float32[np.ndarray, "B S S C"]]:
    """All images as the model takes them, `size` at a time, in the form that `jaxq.quantize` calibrates on.

    All batches have one shape, so that a program is compiled once. Raises `JaxqError` where `size` leaves a rest.
    """
    if size < 1 or len(data) % size:
        raise JaxqError(f"{len(data)} images do not make whole batches of {size}")
    return [prepare(data.images[start : start + size], config) for start in range(0, len(data), size)]


NAMES: dict[str, Callable[[Split, str | os.PathLike[str] | None], Images]] = {"fashion-mnist": fashion_mnist}
