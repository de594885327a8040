"""Checkpoints of the public SqueezeLLM packer (Kim et al. 2024, arXiv 2306.07629), and others of its layout.

Layers are described in `squeezellm_layer`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.errors import JaxqError
from jaxq.formats.base import is_quantized
from jaxq.formats.dense_sparse import DenseSparseArray
from jaxq.formats.packing import WORD
from jaxq.interop import torch_file
from jaxq.interop.squeezellm_layer import TENSORS
from jaxq.interop.squeezellm_layer import from_tensors as from_tensors
from jaxq.interop.squeezellm_layer import to_tensors as to_tensors
from jaxq.models import huggingface, shards
from jaxq.models.model import Later, Model, ModelConfig, build
from jaxq.report import Report, SiteReport

if TYPE_CHECKING:
    from jaxq.quantize import Result

# For each layer the packer saves how many entries S has, so that its loader can make room.
_COUNTS = "sparse_threshold."
_DTYPES = shards.DTYPES | {"I32": np.dtype(np.int32)}


def load(checkpoint: str | Path, model_dir: str | Path, dtype: Any = None) -> tuple[Model, Result]:
    """(model, result) of a quantized language model; `model.params` are `result.params`.

    Run it with `jaxq.quantized(model.apply)`; write it with `jaxq.save`.

    Args:
      checkpoint: a PyTorch file of the state dict, or a safetensors file or directory of the same names, such as
        model.layers.0.self_attn.q_proj.qweight.
      model_dir: the Hugging Face directory of the float model; only config.json and the tokenizer are read.
      dtype: of the other parameters, and logical dtype of the quantized ones: float32 (the default) or bfloat16.

    Raises:
      JaxqError: a file that cannot be read, a tensor that is missing, unknown, of the wrong type or shape, or not
        finite: one line that names it.
    """
    from jaxq.quantize import Result

    start = time.perf_counter()
    checkpoint, model_dir = Path(checkpoint), Path(model_dir)
    dtype = huggingface.param_dtype(dtype)
    config = _config(model_dir)
    dense, layers = _split(_read(checkpoint))
    params = huggingface.match(config, dense, dtype)

    def finish(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = "/".join(key.key for key in keys)
        name = huggingface.checkpoint_name(config, path).removesuffix(".weight")
        if name not in layers:
            return jnp.asarray(leaf)
        if not path.endswith("/kernel"):
            raise JaxqError(f"{name} has codes, but it is no linear layer ({path})")
        try:
            parts = {part: tensor.view() for part, tensor in layers.pop(name).items() if part != "startrows"}
            return from_tensors(parts, leaf.shape[0], dtype=dtype)
        except JaxqError as error:
            raise JaxqError(f"{name}: {error}") from None

    params = jax.tree.map_with_path(finish, params)
    if layers:
        raise JaxqError(f"{', '.join(sorted(layers)[:3])}: {config.family} has no place for these codes")
    source = {"kind": "squeezellm", "name": checkpoint.name, "model": model_dir.resolve().name}
    model = build(config, params, Later(lambda: huggingface.read_tokenizer(model_dir)), source)
    return model, Result(params, _report(params, checkpoint, time.perf_counter() - start))


@dataclasses.dataclass(frozen=True)
class _Held(shards.Tensor):
    """A tensor of which the values are known, or None where the shape alone is."""

    array: np.ndarray | None = None

    def view(self) -> np.ndarray:
        assert self.array is not None
        return self.array


@dataclasses.dataclass(frozen=True)
class _Mapped(shards.Tensor):
    """A tensor of a safetensors file, of one more type than float models have."""

    def view(self) -> np.ndarray:
        if self.dtype not in _DTYPES:
            raise JaxqError(f"{self.name} is stored as {self.dtype}; only {', '.join(_DTYPES)} are read")
        if not math.prod(self.shape):
            return np.zeros(self.shape, _DTYPES[self.dtype])
        try:
            return np.memmap(self.file, _DTYPES[self.dtype], "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise JaxqError(f"{self.file}: cannot read {self.name}: {error}") from None


def _config(model_dir: Path) -> ModelConfig:
    hf = huggingface.read_json(model_dir / "config.json")
    quantization = hf.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "squeezellm":
        del hf["quantization_config"]
    return dataclasses.replace(ModelConfig.from_hf(hf), **huggingface.generation_ids(model_dir))


def _read(checkpoint: Path) -> dict[str, shards.Tensor]:
    """Every tensor of a checkpoint by name; values are read when asked for."""
    if checkpoint.is_dir():
        return {name: _mapped(tensor) for name, tensor in huggingface.read_tensors(checkpoint)[0].items()}
    if checkpoint.suffix == ".safetensors":
        return {name: _mapped(tensor) for name, tensor in shards.read_header(checkpoint)[0].items()}
    tensors: dict[str, shards.Tensor] = {}
    names = {kind: name for name, kind in _DTYPES.items()}
    for name, array in torch_file.read(checkpoint).items():
        if name.startswith(_COUNTS):
            continue
        if not isinstance(array, np.ndarray):
            kind = type(array).__name__
            raise JaxqError(f"{checkpoint}: {name} is no tensor but {kind}; save model.state_dict()")
        tensors[name] = _Held(checkpoint, name, names.get(array.dtype, str(array.dtype)), array.shape, 0, array)
    return tensors


def _mapped(tensor: shards.Tensor) -> shards.Tensor:
    return _Mapped(**{field.name: getattr(tensor, field.name) for field in dataclasses.fields(tensor)})


def _split(
    tensors: dict[str, shards.Tensor],
) -> tuple[dict[str, shards.Tensor], dict[str, dict[str, shards.Tensor]]]:
    """(float tensors, {layer: {name: tensor}}); among the former a stand-in for the weight of each layer."""
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not names:
        raise JaxqError("the checkpoint holds no qweight: it is not one that SqueezeLLM packed")
    layers: dict[str, dict[str, shards.Tensor]] = {name: {} for name in names}
    dense: dict[str, shards.Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in layers and part in TENSORS:
            layers[layer][part] = tensor
        elif not name.startswith(_COUNTS):
            dense[name] = tensor
    for layer, parts in layers.items():
        weight = f"{layer}.weight"
        if weight in dense:
            raise JaxqError(f"{layer} has both a weight and a qweight: keep one of them")
        if "lookup_table" not in parts:
            raise JaxqError(f"{layer}: a tensor is missing: lookup_table")
        words, table = parts["qweight"].shape, parts["lookup_table"].shape
        if len(words) != 2 or len(table) != 2 or table[1] < 2:
            raise JaxqError(f"{layer}: qweight {words} and lookup_table {table} are not two matrices that fit")
        shape = (words[1], words[0] * WORD // (table[1].bit_length() - 1))
        dense[weight] = _Held(parts["qweight"].file, weight, "F32", shape, 0)
    return dense, layers


def _report(params: Any, checkpoint: Path, seconds: float) -> Report:
    """Rows for all matrices. A quantized one is compared with float16, the others with themselves."""
    rows, other = [], 0
    for keys, leaf in jax.tree.leaves_with_path(params, is_leaf=is_quantized):
        path = "/".join(key.key for key in keys)
        if leaf.ndim < 2:
            other += leaf.nbytes
            continue
        before = 2 * leaf.size if is_quantized(leaf) else leaf.nbytes
        kind = "embedding" if path.endswith("/embedding") else "matmul"
        bits = 8 * leaf.nbytes / leaf.size
        rows.append(SiteReport(path, kind, tuple(leaf.shape), _words(leaf), bits, before, leaf.nbytes))
    recipe = {"name": "imported", "from": "squeezellm", "checkpoint": checkpoint.name, "rules": []}
    return Report(recipe=recipe, rows=rows, seconds=seconds, other_bytes=other)


def _words(leaf: Any) -> str:
    if isinstance(leaf, DenseSparseArray):
        # Every layer has a sparsity of its own, of which two digits say enough.
        return f"{leaf.format.base} + {100 * leaf.format.sparsity:.2g}% sparse"
    return str(leaf.format) if is_quantized(leaf) else "dense"
