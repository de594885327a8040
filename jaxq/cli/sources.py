"""What the arguments of the commands name: models, texts, recipes."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxq.cli.console import doing
from jaxq.errors import JaxqError

if TYPE_CHECKING:
    from jaxq.image_data import Images, Split
    from jaxq.recipe import Recipe
    from jaxq.report import Report


#: {demo model: the data set that it was trained on, and is calibrated on when nothing else is said}
TRAINED_ON = {"vit-fashion": "fashion-mnist"}


@dataclass(frozen=True)
class Opened:
    """A model that runs, a Model or a VisionModel: float, or quantized with its report."""

    model: Any
    report: Report | None

    @property
    def takes_images(self) -> bool:
        """Whether the model classifies images; otherwise it reads tokens."""
        from jaxq.models.vision import VisionModel

        return isinstance(self.model, VisionModel)

    def example(self, rows: int = 1, tokens: int = 16) -> Any:
        """The abstract input that shapes are found with: so many images, or rows of tokens."""
        import jax
        import jax.numpy as jnp

        if self.takes_images:
            side, channels = self.model.config.image_size, self.model.config.channels
            return jax.ShapeDtypeStruct((rows, side, side, channels), jnp.float32)
        return jax.ShapeDtypeStruct((rows, tokens), jnp.int32)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer. JaxqError when the model has none."""
        if self.takes_images:
            raise JaxqError("this is an image model: it reads no text")
        if self.model.tokenizer is None:
            raise JaxqError("the model has no tokenizer files, so that text cannot be read: add tokenizer.json")
        return self.model.tokenizer


def open_model(source: str, *, lazy: bool = False, dtype: str | None = None) -> Opened:
    """Open MODEL_OR_OUT. JaxqError for anything that cannot be read."""
    from jaxq import checkpoint, models

    with doing(f"reading {source}"):
        if checkpoint.is_saved(source):
            model, result = checkpoint.load_model(source)
            return Opened(model, result.report)
        return Opened(models.load(source, lazy=lazy, dtype=dtype), None)


def read_text(name: str, held_out: bool) -> str:
    """Return the text of a file (all of it), or of a named corpus.

    A corpus is split: the first 90 % are for calibration, the rest (held_out) for evaluation.
    """
    from jaxq import data
    from jaxq.corpora import NAMES

    if Path(name).exists():
        return data.read_text(name)
    if name not in NAMES:
        raise JaxqError(f"{name}: no such file, nor the name of a corpus ({', '.join(NAMES)})")
    with doing(f"fetching {name}"):
        return data.split(data.read_text(data.corpus(name)))[1 if held_out else 0]


def read_images(name: str, split: Split) -> Images:
    """Return a split of a named data set of images."""
    from jaxq import image_data

    with doing(f"fetching {name}"):
        return image_data.load(name, split)


def read_recipe(name: str, settings: dict[str, Any]) -> Recipe:
    """Return a named recipe with settings, or the recipe of a TOML file, which has them inside.

    Raises:
      JaxqError: an unknown recipe or setting, settings beside a file, a file that cannot be read.
    """
    from jaxq import recipes
    from jaxq.recipe import Recipe

    path = Path(name)
    if path.suffix != ".toml":
        return recipes.named(name, **settings)
    if settings:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in settings)
        raise JaxqError(f"{flags} cannot be combined with {name}: the file says what to do; edit it")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise JaxqError(f"{name} is not UTF-8 text") from error
    except OSError as error:
        raise JaxqError(f"cannot read the recipe {name}: {error.strerror}") from error
    try:
        return Recipe.from_toml(text)
    except JaxqError as error:
        raise JaxqError(f"{name}: {error}") from error


def settings_of(
    bits: int | None, group_size: str | None, extra: list[str], sparsity: float | None = None
) -> dict[str, Any]:
    """Return the settings that --bits, --group-size, --sparsity and --set KEY=VALUE give."""
    found: dict[str, Any] = {} if sparsity is None else {"sparsity": sparsity}
    if bits is not None:
        found["bits"] = bits
    if group_size is not None:
        found["group_size"] = _group_size(group_size)
    for item in extra:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise JaxqError(f"--set takes KEY=VALUE, not {item!r}")
        found[key] = _group_size(value) if key == "group_size" else _value(value)
    return found


def _group_size(text: str) -> int | str | None:
    if text in ("0", "channel"):
        return None
    if text == "tensor" or not text.isdecimal():
        if text != "tensor":
            raise JaxqError(f"--group-size is a number, channel (or 0) or tensor, not {text!r}")
        return text
    return int(text)


def _value(text: str) -> Any:
    """A TOML value where it is one (true, 3, 0.5, "x"), otherwise the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
