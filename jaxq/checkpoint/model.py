"""A saved directory as a model that runs: config, tokenizer and quantized parameters together."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxq.checkpoint.directory import MANIFEST
from jaxq.checkpoint.manifest import read_manifest
from jaxq.checkpoint.store import load
from jaxq.errors import JaxqError

if TYPE_CHECKING:
    from jaxq.quantize import Result


def is_saved(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory that `jaxq.save` wrote."""
    return (Path(path).expanduser() / MANIFEST).is_file()


def load_model(path: str | os.PathLike[str]) -> tuple[Any, Result]:
    """Return (model, result) of a saved Model or VisionModel; `model.params` are `result.params`.

    They are the quantized parameters, in a `jaxq.Activated` where named activations are rounded. Run the model
    with `jaxq.quantized(model.apply)`.

    Raises:
      JaxqError: what `load` refuses, or a directory without a readable config.json.
    """
    from jaxq.models import ModelConfig, VisionConfig, build, vision
    from jaxq.models.huggingface import read_tokenizer
    from jaxq.models.model import Later

    directory = Path(path).expanduser()
    source = read_manifest(directory).get("source") or {}
    try:
        data = json.loads((directory / "config.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise JaxqError(
            f"{path} has no config.json: it holds parameters, not a model; open it with jaxq.load"
        ) from error
    except (OSError, ValueError) as error:
        raise JaxqError(f"{directory / 'config.json'} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise JaxqError(f"{directory / 'config.json'} is damaged: it is not a JSON object")
    if data.get("family") in vision.MODULES:
        seen = VisionConfig.from_dict(data)
        result = load(directory)
        return vision.build(seen, result.params, source), result
    config = ModelConfig.from_dict(data)
    result = load(directory)
    return build(config, result.params, Later(lambda: read_tokenizer(directory)), source), result
