"""Flax language and image models, one readable file a family, and how they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxq.errors import JaxqError
from jaxq.models.generate import Generation as Generation
from jaxq.models.generate import generate as generate
from jaxq.models.lazy import Lazy as Lazy
from jaxq.models.model import Model as Model
from jaxq.models.model import ModelConfig as ModelConfig
from jaxq.models.model import abstract_params as abstract_params
from jaxq.models.model import build as build
from jaxq.models.model import init_params as init_params
from jaxq.models.vision import VisionConfig as VisionConfig
from jaxq.models.vision import VisionModel as VisionModel


def load(source: str | Path, *, lazy: bool = False, dtype: Any = None) -> Any:
    """Loads a model: a Hugging Face or timm directory, a GGUF file, or the name of a demo model.

    A language model comes as a `Model`, an image model as a `VisionModel`.

    lazy: parameters are Lazy handles (shape, dtype; np.asarray reads them), only headers are read.
    dtype: of the parameters, float32 (the default) or bfloat16.
    Errors: JaxqError, one line, for everything that is wrong with the source.
    """
    path = Path(source)
    if path.is_dir():
        if (path / "jaxq.json").exists():
            raise JaxqError(f"{path} holds a quantized model: open it with jaxq.load or the jaxq commands")
        from jaxq.models import huggingface, vision_checkpoint

        if vision_checkpoint.holds(huggingface.read_json(path / "config.json")):
            return vision_checkpoint.load(path, lazy=lazy, dtype=dtype)
        return huggingface.load(path, lazy=lazy, dtype=dtype)
    if path.suffix.lower() == ".gguf":
        from jaxq.models import gguf

        return gguf.load(path, lazy=lazy, dtype=dtype)
    from jaxq.models import demo

    if str(source) in demo.NAMES:
        return demo.load(str(source), lazy=lazy, dtype=dtype)
    from jaxq.models import vision_demo

    if str(source) in vision_demo.NAMES:
        return vision_demo.load(str(source), lazy=lazy, dtype=dtype)
    names = ", ".join(sorted([*demo.NAMES, *vision_demo.NAMES]))
    raise JaxqError(f"{source}: no such directory or .gguf file, nor the name of a demo model ({names})")
