"""One description of an image model for every family, and the shapes of the published ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxq.errors import JaxqError

FAMILIES = ("vit", "swin")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
POOLINGS = ("cls", "mean", "cls_mean")
INTERPOLATIONS = ("bicubic", "bilinear")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class VisionConfig:
    """Shape and arithmetic of an image model, and how its images are prepared; hashable.

    Arithmetic
        hidden_size: width of the tokens; of Swin's first stage (each further stage doubles it).
        depths, heads: blocks and attention heads, one number a stage; a ViT has one stage.
        classes: outputs of the head; 0 means no head: `apply` gives the normed tokens.
        activation: "gelu" is the exact one, x * Phi(x).
        layer_scale: each branch of a block is multiplied by a learned vector (Touvron et al. 2021, CaiT).
        class_token: whether a learned token stands before the patches; a Swin has none.
        distilled: DeiT's second learned token (Touvron et al. 2021); distilled_head: it has a head of its own, and
            the logits are the mean of both heads.
        pooling: what the head reads: "cls" the class token; "mean" the mean of the patches (ViT: taken before the
            norm, which is then called fc_norm, as in timm); "cls_mean" both, one after the other (DINOv2).
        window_size: side of Swin's attention windows, in tokens.
    Images (see images.py)
        mean, std: of each channel, subtracted and divided by after scaling to 0..1.
        crop: the share of the resized image's side that the centre crop keeps.
        squash: the image is resized to a square whatever its shape; otherwise its shorter side is what is resized.
        labels: names of the classes, or empty.
    """

    family: str
    image_size: int
    patch_size: int
    hidden_size: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    classes: int = 1000
    channels: int = 3
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    layer_scale: bool = False
    class_token: bool = True
    distilled: bool = False
    distilled_head: bool = False
    pooling: str = "cls"
    window_size: int = 7
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 0.875
    squash: bool = False
    interpolation: str = "bicubic"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("family", self.family, FAMILIES)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("interpolation", self.interpolation, INTERPOLATIONS)
        for name in ("image_size", "patch_size", "hidden_size", "channels", "window_size"):
            _positive(name, getattr(self, name))
        for name in ("depths", "heads"):
            for value in getattr(self, name):
                _positive(name, value)
        if not self.depths or len(self.depths) != len(self.heads):
            raise JaxqError(f"depths {self.depths} and heads {self.heads} must have one number for each stage")
        for i, heads in enumerate(self.heads):
            if self.width(i) % heads:
                raise JaxqError(f"{heads} heads cannot share a width of {self.width(i)} evenly")
        if self.image_size % self.patch_size:
            raise JaxqError(f"patches of {self.patch_size} pixels do not tile an image of {self.image_size}")
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or self.classes < 0:
            raise JaxqError(f"classes must be 0 (no head) or a positive integer, not {self.classes!r}")
        if self.hidden(0) < 1 or self.norm_eps <= 0 or not 0 < self.crop <= 1:
            raise JaxqError("mlp_ratio and norm_eps must be positive, crop above 0 and at most 1")
        if len(self.mean) != self.channels or len(self.std) != self.channels or min(self.std) <= 0:
            raise JaxqError(f"mean and std need {self.channels} numbers each, those of std positive")
        if self.labels and len(self.labels) != self.classes:
            raise JaxqError(f"{len(self.labels)} labels for {self.classes} classes")
        if self.family == "swin":
            if (
                self.class_token
                or self.distilled
                or self.distilled_head
                or self.layer_scale
                or self.pooling != "mean"
            ):
                raise JaxqError("a Swin has neither class tokens nor layer scale, and pooling mean")
        elif len(self.depths) != 1:
            raise JaxqError(f"a ViT has one stage, not {len(self.depths)}")
        elif not self.class_token and (self.distilled or self.pooling != "mean"):
            raise JaxqError(f"pooling {self.pooling!r} and distillation need a class token")
        elif self.distilled_head and not (self.distilled and self.classes and self.pooling == "cls"):
            raise JaxqError("a distilled head needs distilled=True, classes and pooling 'cls'")

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def prefix(self) -> int:
        """Learned tokens before the patches."""
        return int(self.class_token) + int(self.distilled)

    def width(self, stage: int) -> int:
        """Width of the tokens in a stage."""
        return self.hidden_size << stage

    def hidden(self, stage: int) -> int:
        """Width inside the MLPs of a stage."""
        # A ratio that came out of a division must give back the integer that it was made of.
        return int(self.width(stage) * self.mlp_ratio + 1e-6)

    def replace(self, **changes: Any) -> VisionConfig:
        """A copy with some fields changed, e.g. config.replace(image_size=32, classes=10)."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that from_dict reads back to an equal config."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VisionConfig:
        """The config that to_dict wrote. Errors: JaxqError for unknown, missing or impossible fields."""
        try:
            fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
            return cls(**fields)
        except JaxqError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise JaxqError(
                f"this is not a jaxq vision config: {error}; write it with VisionConfig.to_dict"
            ) from None

    def to_json(self) -> str:
        """to_dict as text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> VisionConfig:
        """The config that to_json wrote. Errors: JaxqError as from_dict, and for text that is no JSON object."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise JaxqError(f"this is not a jaxq vision config: {error}") from None
        if not isinstance(data, dict):
            raise JaxqError("this is not a jaxq vision config: a JSON object is expected")
        return cls.from_dict(data)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise JaxqError(f"{name} {value!r} is not one of {', '.join(known)}")


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise JaxqError(f"{name} must be a positive integer, not {value!r}")


def _vit(width: int, heads: int, **changes: Any) -> VisionConfig:
    return VisionConfig("vit", 224, 16, width, (12,), (heads,), **changes)


def _swin(width: int, depth: int, heads: tuple[int, ...]) -> VisionConfig:
    return VisionConfig(
        "swin", 224, 4, width, (2, 2, depth, 2), heads, norm_eps=1e-5, class_token=False, pooling="mean", crop=0.9
    )


#: Published shapes. ViT: Dosovitskiy et al. 2021 as trained by Steiner et al. 2021; DeiT: Touvron et al. 2021
#: (without the distillation token); Swin: Liu et al. 2021; DINOv2: Oquab et al. 2023.
PRESETS: dict[str, VisionConfig] = {
    "vit_small": _vit(384, 6, mean=HALF, std=HALF, crop=0.9),
    "vit_base": _vit(768, 12, mean=HALF, std=HALF, crop=0.9),
    "deit_tiny": _vit(192, 3),
    "deit_small": _vit(384, 6),
    "deit_base": _vit(768, 12),
    "swin_tiny": _swin(96, 6, (3, 6, 12, 24)),
    "swin_small": _swin(96, 18, (3, 6, 12, 24)),
    "swin_base": _swin(128, 18, (4, 8, 16, 32)),
    "dinov2_small": VisionConfig("vit", 518, 14, 384, (12,), (6,), classes=0, layer_scale=True),
}
