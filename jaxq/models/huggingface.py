"""Loads a Hugging Face directory: config.json, safetensors (one file or a sharded index), tokenizer files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxq.errors import JaxqError
from jaxq.models import shards
from jaxq.models.config import token_ids
from jaxq.models.lazy import Lazy
from jaxq.models.model import Later, Model, ModelConfig, abstract_params, build, family_file
from jaxq.models.shards import Tensor

# Whole-model names; those inside a layer are the family's CHECKPOINT_NAMES.
NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
PARAM_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))


def load(path: str | Path, *, lazy: bool = False, dtype: Any = None) -> Model:
    """The model of a directory, parameters in dtype (float32 unless given; or bfloat16).

    lazy: leaves are Lazy handles and only headers are read. Errors: JaxqError, one line, for a missing or
    unreadable file, a missing, truncated or malformed shard, an unsupported model_type, a tensor that is
    missing, unknown, or of the wrong shape.
    """
    path = Path(path)
    dtype = param_dtype(dtype)
    hf = read_json(path / "config.json")
    config = dataclasses.replace(ModelConfig.from_hf(hf), **generation_ids(path))
    tensors, fingerprint = read_tensors(path)
    params = match(config, tensors, dtype)
    if not lazy:
        params = jax.tree.map(jnp.asarray, params)
    source = {"kind": "huggingface", "name": path.resolve().name, **fingerprint}
    return build(config, params, Later(lambda: read_tokenizer(path)), source)


def param_dtype(dtype: Any) -> np.dtype:
    """float32 for None; float32 or bfloat16 else. Errors: JaxqError for any other type."""
    try:
        found = np.dtype(np.float32 if dtype is None else dtype)
    except TypeError:
        found = np.dtype(object)
    if found not in PARAM_DTYPES:
        raise JaxqError(f"parameters can be float32 or bfloat16, not {dtype}")
    return found


def checkpoint_name(config: ModelConfig, path: str) -> str:
    """The Hugging Face tensor name of a parameter path, e.g. layers/0/attention/query/kernel."""
    if path in NAMES:
        return NAMES[path]
    _, layer, rest = path.split("/", 2)
    module, leaf = rest.rsplit("/", 1)
    return f"model.layers.{layer}.{family_file(config).CHECKPOINT_NAMES[module]}.{LEAVES[leaf]}"


def match(config: ModelConfig, tensors: dict[str, Tensor], dtype: np.dtype) -> dict[str, Any]:
    """Lazy parameters for a config out of a checkpoint's tensors, checked both ways.

    Linear weights are stored (out, in) and read as (in, out).
    """
    left = dict(tensors)

    def find(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Lazy:
        path = "/".join(key.key for key in keys)
        name = checkpoint_name(config, path)
        tensor = left.pop(name, None)
        if tensor is None:
            raise JaxqError(f"the checkpoint lacks {name}, which {config.family} needs for {path}")
        turn = path.endswith("/kernel")
        expected = leaf.shape[::-1] if turn else leaf.shape
        if tensor.shape != expected:
            raise JaxqError(f"{name} has shape {tensor.shape}, but config.json asks for {expected} ({path})")
        if tensor.dtype not in shards.DTYPES:
            kinds = ", ".join(shards.DTYPES)
            raise JaxqError(f"{name} is stored as {tensor.dtype}; only {kinds} are read")
        return Lazy(leaf.shape, dtype, _reader(tensor, turn))

    params = jax.tree.map_with_path(find, abstract_params(config, dtype))
    ignored = [*family_file(config).IGNORED, *([r"^lm_head\.weight$"] if config.tied else [])]
    unknown = [name for name in left if not any(re.search(pattern, name) for pattern in ignored)]
    if unknown:
        some = ", ".join(sorted(unknown)[:3])
        raise JaxqError(f"{len(unknown)} tensors that {config.family} has no place for: {some}")
    return params


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor of a checkpoint by name, and {"bytes", "header_sha256"} of its files."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise JaxqError(f"{index}: no weight_map of tensor names to files")
        files = sorted(set(weight_map.values()))
    else:
        files, weight_map = ["model.safetensors"], None
        if not (path / files[0]).exists():
            raise JaxqError(
                f"{path}: neither model.safetensors nor model.safetensors.index.json is there; "
                "other weight files (.bin, .pt) are not read, save the model as safetensors"
            )
    tensors: dict[str, Tensor] = {}
    digest, total = hashlib.sha256(), 0
    for file in files:
        if Path(file).name != file:
            raise JaxqError(f"{index}: shard {file!r} lies outside the directory")
        found, header = shards.read_header(path / file)
        tensors |= found
        size = (path / file).stat().st_size
        total += size
        digest.update(f"{file} {size} ".encode() + header)
    lost = next((name for name in weight_map or () if name not in tensors), None)
    if lost is not None:
        raise JaxqError(f"{index}: {lost} should be in {(weight_map or {})[lost]} but is not; fetch it again")
    # The text model of an image-text checkpoint goes by longer names.
    tensors = {re.sub(r"(^|\.)language_model\.", r"\1", name): tensor for name, tensor in tensors.items()}
    return tensors, {"bytes": total, "header_sha256": digest.hexdigest()}


def read_tokenizer(path: Path) -> Any:
    """The transformers tokenizer of a directory, None when it has none; nothing is downloaded or executed."""
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise JaxqError(f"{path}: the tokenizer cannot be read: {reason[0] if reason else error!r}") from None


def _reader(tensor: Tensor, turn: bool) -> Any:
    return (lambda: tensor.view().T) if turn else tensor.view


def read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JaxqError(f"{file} is missing: this is not a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise JaxqError(f"{file} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise JaxqError(f"{file}: a JSON object is expected")
    return data


def generation_ids(path: Path) -> dict[str, Any]:
    """Chat models often name more end tokens in generation_config.json than in config.json."""
    file = path / "generation_config.json"
    found = read_json(file) if file.exists() else {}
    eos = found.get("eos_token_id")
    return {} if eos is None else {"eos": token_ids(eos)}
