"""Loads and saves image models: config.json and safetensors, in the form of timm or of transformers."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxq.errors import JaxqError
from jaxq.models import shards
from jaxq.models.huggingface import param_dtype, read_json, read_tensors
from jaxq.models.lazy import Lazy
from jaxq.models.vision import VisionModel, abstract_params, build
from jaxq.models.vision_config import VisionConfig
from jaxq.models.vision_forms import (
    MODEL_TYPES,
    Naming,
    Stored,
    Tensors,
    read_hf,
    read_timm,
    timm_name,
    write_timm,
)
from jaxq.models.vit import resample_positions

# Not parameters of the function: a pooler that no classifier uses, what stands for masked patches, constants.
_IGNORED = re.compile(r"^pooler\.|(^|\.)mask_token$|\.relative_position_index$|\.attn_mask$")

# Axes of a kernel (in, out) or (H, W, in, out) in the order in which checkpoints store them.
_STORED_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}


def holds(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an image model."""
    return "architecture" in config or config.get("model_type") in MODEL_TYPES


def load(path: str | Path, *, lazy: bool = False, dtype: Any = None, image_size: int | None = None) -> VisionModel:
    """The model of a directory, parameters in dtype (float32 unless given; or bfloat16).

    lazy: leaves are Lazy handles and only headers are read. image_size: of the images that the model shall be used
    with, where that differs from what its config says. Position embeddings of another grid than the image's are
    interpolated. Errors: JaxqError, one line, for everything that is wrong with the files.
    """
    path = Path(path)
    kind = param_dtype(dtype)
    data = read_json(path / "config.json")
    tensors, fingerprint = read_tensors(path)
    if "architecture" in data:
        config, naming = read_timm(data, tensors)
    else:
        tensors = {name.removeprefix(f"{data['model_type']}."): tensor for name, tensor in tensors.items()}
        config, naming = read_hf(data, tensors, path)
    if image_size is not None:
        config = config.replace(image_size=image_size)
    params = match(config, tensors, naming, kind)
    if not lazy:
        params = jax.tree.map(jnp.asarray, params)
    return build(config, params, {"kind": "vision", "name": path.resolve().name, **fingerprint})


def save(model: VisionModel, path: str | Path, dtype: Any = np.float32) -> None:
    """Writes config.json and model.safetensors in timm's form: `jaxq.models.load` and timm read them.

    dtype: float32 or float16. Errors: JaxqError for parameters that are not the config's (quantized ones, say),
    for values that float16 cannot hold, and for a folder that cannot be written.
    """
    kind = np.dtype(dtype)
    if kind not in (np.float16, np.float32):
        raise JaxqError(f"an image model is saved as float32 or float16, not {kind}")
    leaves, expected = (_by_path(tree) for tree in (model.params, abstract_params(model.config)))
    if {path: leaf.shape for path, leaf in leaves.items()} != {p: leaf.shape for p, leaf in expected.items()}:
        raise JaxqError("these parameters are not the model's own: quantized ones are saved with jaxq.save")
    tensors = {timm_name(model.config, p): _stored(p, np.asarray(leaf), kind) for p, leaf in leaves.items()}
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as scratch:
            save_file(tensors, Path(scratch, "model.safetensors"), {"format": "pt"})
            Path(scratch, "config.json").write_text(json.dumps(write_timm(model.config), indent=2) + "\n")
            for file in ("model.safetensors", "config.json"):
                os.replace(Path(scratch, file), folder / file)
    except OSError as error:
        raise JaxqError(f"cannot write {folder}: {error}") from None


def match(config: VisionConfig, tensors: Tensors, naming: Naming, dtype: np.dtype) -> dict[str, Any]:
    """Lazy parameters for a config out of a checkpoint's tensors, checked both ways."""
    left = dict(tensors)

    def find(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Lazy:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        axes = _axes(path, leaf.ndim)
        names = naming(path)
        expected = tuple(leaf.shape[a] for a in axes)
        expected = (expected[0] // len(names), *expected[1:])
        parts = [_take(left, name, path, config) for name in names]
        if path == "pos_embed" and _other_grid(parts[0].shape, expected, config.prefix):
            return Lazy(leaf.shape, dtype, lambda: _resampled(parts[0], config))
        for part in parts:
            if part.shape != expected:
                raise JaxqError(f"{part.name} has shape {part.shape}, but {expected} is expected ({path})")
        back = tuple(np.argsort(axes).tolist())
        return Lazy(leaf.shape, dtype, lambda: _joined(parts).transpose(back))

    params = jax.tree.map_with_path(find, abstract_params(config, dtype))
    unknown = [name for name in left if not _IGNORED.search(name)]
    if unknown:
        some = ", ".join(sorted(unknown)[:3])
        raise JaxqError(f"{len(unknown)} tensors that this {config.family} has no place for: {some}")
    return params


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def _take(left: dict[str, Stored], name: str, path: str, config: VisionConfig) -> Stored:
    tensor = left.pop(name, None)
    if tensor is None:
        raise JaxqError(f"the checkpoint lacks {name}, which this {config.family} needs for {path}")
    if tensor.dtype not in shards.DTYPES:
        raise JaxqError(f"{name} is stored as {tensor.dtype}; only {', '.join(shards.DTYPES)} are read")
    return tensor


def _axes(path: str, ndim: int) -> tuple[int, ...]:
    """Axes of a parameter in the order in which they are stored."""
    return _STORED_AXES[ndim] if path.endswith("/kernel") else tuple(range(ndim))


def _joined(parts: list[Stored]) -> np.ndarray:
    return parts[0].view() if len(parts) == 1 else np.concatenate([part.view() for part in parts])


def _other_grid(shape: tuple[int, ...], expected: tuple[int, ...], prefix: int) -> bool:
    """Whether these are position embeddings of a square grid of another size than expected."""
    side = round(max(shape[1] - prefix, 0) ** 0.5) if len(shape) == 3 else 0
    return side > 0 and shape != expected and shape == (1, prefix + side * side, expected[2])


def _resampled(positions: Stored, config: VisionConfig) -> np.ndarray:
    return resample_positions(positions.view().astype(np.float32), config.prefix, config.grid)


def _stored(path: str, value: np.ndarray, kind: np.dtype) -> np.ndarray:
    """A parameter as it is stored."""
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(value.transpose(_axes(path, value.ndim)).astype(kind))
    if np.isinf(out).sum() > np.isinf(value.astype(np.float32)).sum():
        raise JaxqError(f"{path} holds values that float16 cannot: save it as float32")
    return out
