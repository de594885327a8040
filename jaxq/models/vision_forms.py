"""The two forms in which image models are published: what their config.json says, what their tensors are called.

timm: parameters here are named as there, so that a tensor's name is the path with dots. transformers: query, key
and value are tensors of their own, blocks are layers, and some parts have other names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxq.errors import JaxqError
from jaxq.models.config import activation, size
from jaxq.models.huggingface import read_json
from jaxq.models.vision_config import HALF, IMAGENET_MEAN, IMAGENET_STD, VisionConfig

#: From a path to the tensors that hold it; where there are several, they are joined along their first axis.
Naming = Callable[[str], tuple[str, ...]]


class Stored(Protocol):
    """A tensor of a checkpoint: what is known of it before it is read. dtype: as safetensors calls it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def view(self) -> np.ndarray: ...


Tensors = Mapping[str, Stored]

MODEL_TYPES = ("vit", "deit", "swin", "dinov2")

_TIMM = re.compile(
    r"(vit|deit)_(tiny|small|base|large)(_distilled)?_patch\d+(?:_dinov2)?(?:_\d+)?(?:_in21k)?"
    r"|(swin)_(?:tiny|small|base|large)_patch\d+_window\d+_\d+"
)
_TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16}
_TIMM_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
_SWIN_WIDTHS = {96: "tiny", 128: "base", 192: "large"}

# How each kind of transformers' models prepares images where no preprocessor_config.json says it.
_IMAGES: dict[str, dict[str, Any]] = {
    "vit": dict(mean=HALF, std=HALF, squash=True, crop=1.0, interpolation="bilinear"),
    "deit": dict(squash=True),
    "swin": dict(squash=True, crop=1.0),
    "dinov2": {},
}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}

# Parts of a block in transformers.
_HF_BLOCK = {
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}
_HF_SCALE = {r"\.ls([12])\.gamma$": r".layer_scale\1.lambda1"}
_HF_NAMES = {
    r"^(blocks|layers)\.": r"encoder.\1.",
    r"^encoder\.blocks\.": "encoder.layer.",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^patch_embed\.norm\.": "embeddings.norm.",
    r"^cls_token$": "embeddings.cls_token",
    r"^dist_token$": "embeddings.distillation_token",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^norm\.": "layernorm.",
    r"^head(\.fc)?\.": "classifier.",
    r"^head_dist\.": "distillation_classifier.",
    r"\.attn\.proj\.": ".attention.output.dense.",
}


def timm_name(config: VisionConfig, path: str) -> str:
    """timm's name of a parameter, e.g. blocks.0.attn.qkv.weight."""
    name = re.sub(r"(ls[12])/scale$", r"\1/gamma", path)
    name = re.sub(r"/(kernel|scale)$", "/weight", name).replace("/", ".")
    return name.replace("head.", "head.fc.") if config.family == "swin" else name


def hf_names(config: VisionConfig, kind: str, path: str) -> tuple[str, ...]:
    """transformers' names of a parameter of a model_type, without the name of the model that leads them."""
    name = timm_name(config, path)
    # There, a merging ends a stage.
    name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
    if config.distilled_head:
        name = re.sub(r"^head\.", "cls_classifier.", name)
    inner = "attention.self" if kind == "swin" else "attention.attention"
    for old, new in (_HF_NAMES | (_HF_SCALE if kind == "dinov2" else _HF_BLOCK)).items():
        name = re.sub(old, new, name)
    name = name.replace(".attn.relative", f".{inner}.relative")
    if ".attn.qkv." in name:
        return tuple(name.replace("attn.qkv", f"{inner}.{part}") for part in ("query", "key", "value"))
    return (name,)


def read_timm(data: Mapping[str, Any], tensors: Tensors) -> tuple[VisionConfig, Naming]:
    """The config and naming of a timm checkpoint. What its config.json leaves out is read off the tensors."""
    try:
        config = VisionConfig.from_dict(data["jaxq"]) if "jaxq" in data else _timm_config(data, tensors)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, JaxqError) else _unclear(error) from None
    ends_stage = "layers.0.downsample.norm.weight" in tensors
    plain_head = "head.weight" in tensors

    def naming(path: str) -> tuple[str, ...]:
        # Before timm 0.9 a merging ended a stage, as in transformers, and the head was one layer.
        name = timm_name(config, path)
        if ends_stage:
            name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        return (name.replace("head.fc.", "head.") if plain_head else name,)

    return config, naming


def _timm_config(data: Mapping[str, Any], tensors: Tensors) -> VisionConfig:
    name = data["architecture"]
    known = _TIMM.fullmatch(str(name))
    if known is None:
        raise JaxqError(
            f"architecture {name!r} is not supported; jaxq knows vit, deit (distilled too) and swin of size tiny, "
            "small, base and large, and vit_*_dinov2, as named by timm"
        )
    args, images = data.get("model_args") or {}, data.get("pretrained_cfg") or data
    width, channels, patch, _ = _shape(tensors, "patch_embed.proj.weight", 4)
    family = "swin" if known[4] else "vit"
    start = "layers.0.blocks.0" if family == "swin" else "blocks.0"
    head = next((tensors[n].shape for n in ("head.fc.weight", "head.weight") if n in tensors), (0,))
    crop_mode = images.get("crop_mode") or "center"
    if crop_mode not in ("center", "squash"):
        raise JaxqError(f"config.json: crop_mode {crop_mode!r} is not supported; use center or squash")
    fields: dict[str, Any] = dict(
        family=family,
        image_size=_side(args.get("img_size") or images["input_size"][1:]),
        patch_size=patch,
        hidden_size=width,
        classes=head[0],
        channels=channels,
        mlp_ratio=_shape(tensors, f"{start}.mlp.fc1.weight", 2)[0] / width,
        activation=activation(args.get("act_layer", "gelu")),
        qkv_bias=f"{start}.attn.qkv.bias" in tensors,
        mean=tuple(images.get("mean", IMAGENET_MEAN)),
        std=tuple(images.get("std", IMAGENET_STD)),
        crop=float(images.get("crop_pct", 0.875)),
        squash=crop_mode == "squash",
        interpolation=images.get("interpolation", "bicubic"),
    )
    labels = data.get("label_names") or images.get("label_names") or ()
    if isinstance(labels, list) and len(labels) == fields["classes"]:
        fields["labels"] = tuple(map(str, labels))
    if family == "swin":
        tables = {}
        for tensor in tensors:
            if found := re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table", tensor):
                tables[int(found[1]), int(found[2])] = _shape(tensors, tensor, 2)
        stages = range(1 + max(i for i, _ in tables))
        depths = tuple(sum(i == stage for i, _ in tables) for stage in stages)
        heads = tuple(tables[i, 0][1] for i in stages)
        window = int(args.get("window_size") or (round(tables[0, 0][0] ** 0.5) + 1) // 2)
        token: dict[str, Any] = dict(class_token=False, pooling="mean", window_size=window, norm_eps=1e-5)
        return VisionConfig(**fields, **token, depths=depths, heads=heads)
    mean = "fc_norm.weight" in tensors
    if (args.get("global_pool") or data.get("global_pool") or "token") not in (
        "token",
        "avg" if mean else "token",
    ):
        raise JaxqError("config.json: only global_pool token, or avg with fc_norm, is supported")
    return VisionConfig(
        **fields,
        depths=(len({n.split(".")[1] for n in tensors if n.startswith("blocks.")}),),
        heads=(int(args.get("num_heads") or _TIMM_HEADS[known[2]]),),
        layer_scale="blocks.0.ls1.gamma" in tensors,
        class_token="cls_token" in tensors,
        distilled="dist_token" in tensors,
        distilled_head="head_dist.weight" in tensors,
        pooling="mean" if mean else "cls",
    )


def write_timm(config: VisionConfig) -> dict[str, Any]:
    """A config.json that timm can make the model from, with the whole config under "jaxq" beside it."""
    args: dict[str, Any] = dict(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.channels,
        embed_dim=config.hidden_size,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
    )
    if config.family == "swin":
        architecture = f"swin_{_SWIN_WIDTHS.get(config.hidden_size, 'tiny')}_patch4_window7_224"
        args |= dict(depths=list(config.depths), num_heads=list(config.heads), window_size=config.window_size)
        pool = "avg"
    else:
        name = _TIMM_WIDTHS.get(config.hidden_size, "small")
        architecture = f"deit_{name}_distilled_patch16_224" if config.distilled else f"vit_{name}_patch16_224"
        args |= dict(depth=config.depths[0], num_heads=config.heads[0], class_token=config.class_token)
        # Without a head all tokens are normed, as timm does it where it does not pool.
        pool = ("avg" if config.classes else "") if config.pooling == "mean" else "token"
        args |= dict(global_pool=pool) | (dict(init_values=1e-5) if config.layer_scale else {})
    if config.activation != "gelu":
        args["act_layer"] = config.activation
    images = dict(
        input_size=[config.channels, config.image_size, config.image_size],
        fixed_input_size=True,
        interpolation=config.interpolation,
        crop_pct=config.crop,
        crop_mode="squash" if config.squash else "center",
        mean=list(config.mean),
        std=list(config.std),
        num_classes=config.classes,
        first_conv="patch_embed.proj",
        classifier="head.fc" if config.family == "swin" else "head",
    )
    data: dict[str, Any] = dict(
        architecture=architecture,
        num_classes=config.classes,
        num_features=config.width(len(config.depths) - 1),
        global_pool=pool,
        model_args=args,
        pretrained_cfg=images,
    )
    if config.labels:
        data["label_names"] = list(config.labels)
    return data | {"jaxq": config.to_dict()}


def read_hf(data: Mapping[str, Any], tensors: Tensors, path: Path) -> tuple[VisionConfig, Naming]:
    """The config and naming of a transformers checkpoint, whose tensors' names have lost that of the model."""
    try:
        config = _hf_config(data, tensors, path)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, JaxqError) else _unclear(error) from None
    return config, lambda name: hf_names(config, data["model_type"], name)


def _hf_config(hf: Mapping[str, Any], tensors: Tensors, path: Path) -> VisionConfig:
    kind = hf["model_type"]
    swin, dino, deit = kind == "swin", kind == "dinov2", kind == "deit"
    head = next((tensors[n].shape for n in ("classifier.weight", "cls_classifier.weight") if n in tensors), (0,))
    width = size(hf, "embed_dim" if swin else "hidden_size")
    ratio = float(hf.get("mlp_ratio", 4)) if swin or dino else size(hf, "intermediate_size", 4 * width) / width
    fields: dict[str, Any] = dict(
        family="swin" if swin else "vit",
        image_size=_side(hf.get("image_size", 224)),
        patch_size=_side(hf.get("patch_size", 4 if swin else 14 if dino else 16)),
        hidden_size=width,
        classes=head[0],
        channels=size(hf, "num_channels", 3),
        mlp_ratio=ratio,
        activation=activation(hf.get("hidden_act", "gelu")),
        norm_eps=float(hf.get("layer_norm_eps", 1e-5 if swin else 1e-6 if dino else 1e-12)),
        qkv_bias=bool(hf.get("qkv_bias", True)),
        labels=_labels(hf.get("id2label") or {}, head[0]),
    )
    if swin:
        fields |= dict(depths=tuple(hf["depths"]), heads=tuple(hf["num_heads"]), class_token=False, pooling="mean")
        fields |= dict(window_size=size(hf, "window_size", 7))
    else:
        fields |= dict(depths=(size(hf, "num_hidden_layers"),), heads=(size(hf, "num_attention_heads"),))
        fields |= dict(
            layer_scale=dino, distilled=deit, distilled_head="distillation_classifier.weight" in tensors
        )
        fields |= dict(pooling="cls_mean" if dino and head[0] else "cls")
    file = path / "preprocessor_config.json"
    images = _hf_images(read_json(file)) if file.exists() else {}
    return VisionConfig(**(fields | _IMAGES[kind] | images))


def _hf_images(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields about images of a preprocessor_config.json, old or new spelling."""
    found: dict[str, Any] = {}
    if not hf.get("do_normalize", True):
        found |= dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    else:
        names = {"mean": "image_mean", "std": "image_std"}
        found |= {name: tuple(hf[key]) for name, key in names.items() if key in hf}
    if hf.get("resample") is not None:
        if hf["resample"] not in _RESAMPLE:
            raise JaxqError(f"preprocessor_config.json: resample {hf['resample']} is not supported; use 2 or 3")
        found["interpolation"] = _RESAMPLE[hf["resample"]]
    resized = hf.get("size")
    if resized is not None and hf.get("do_resize", True):
        found["squash"] = not isinstance(resized, Mapping) or "shortest_edge" not in resized
        cropped = hf.get("crop_size") if hf.get("do_center_crop") else None
        found["crop"] = 1.0 if cropped is None else _length(cropped) / _length(resized)
    return found


def _labels(names: Mapping[str, str], classes: int) -> tuple[str, ...]:
    """id2label as a tuple, unless it only counts."""
    found = {int(i): str(name) for i, name in names.items()}
    if not classes or sorted(found) != list(range(classes)) or found[0] == "LABEL_0":
        return ()
    return tuple(found[i] for i in range(classes))


def _length(value: Any) -> int:
    """A side out of 224, {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    return _side(list(value.values()) if isinstance(value, Mapping) else value)


def _side(value: Any) -> int:
    """The side of a square given as a number or as equal numbers."""
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise JaxqError(f"config.json: images and patches must be square, found {value}")
    return side


def _shape(tensors: Tensors, name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in tensors or len(tensors[name].shape) != ndim:
        raise JaxqError(f"the checkpoint lacks {name} with {ndim} axes")
    return tensors[name].shape


def _unclear(error: Exception) -> JaxqError:
    return JaxqError(f"config.json of the image model cannot be understood: {type(error).__name__} {error}")
