"""One description of a language model for every family, and how a Hugging Face config becomes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxq.errors import JaxqError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_ACTIVATION_NAMES = {
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) and its context extension.

    scaling: "default"; "linear" (Chen et al. 2023: every frequency divided by factor);
    "llama3" (Llama 3.1: only wavelengths above original_length / low_factor are divided by factor,
    those below original_length / high_factor stay, smooth in between).
    """

    base: float = 10_000.0
    scaling: str = "default"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of a model; hashable, JSON through to_dict / from_dict.

    windows: for each layer, how many positions (itself included) a query sees, or None for all before it.
    local_rope: the rotary embedding of the layers that have a window, where it differs (Gemma 3).
    query_scale: attention scores are multiplied by it.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    query_scale: float
    norm_eps: float = 1e-6
    activation: str = "silu"
    rope: Rope = field(default_factory=Rope)
    local_rope: Rope | None = None
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    max_length: int = 2048
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None

    def __post_init__(self) -> None:
        if not self.windows:
            raise JaxqError(f"{self.family}: the config asks for no layers at all")
        if self.heads % self.kv_heads:
            raise JaxqError(
                f"{self.family}: {self.heads} heads cannot share {self.kv_heads} key-value heads evenly"
            )
        if self.head_dim % 2:
            raise JaxqError(f"{self.family}: rotary embedding needs an even head size, not {self.head_dim}")
        if self.activation not in ACTIVATIONS:
            raise JaxqError(
                f"{self.family}: activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}"
            )

    @property
    def layers(self) -> int:
        return len(self.windows)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that from_dict reads back to an equal config."""
        data = dataclasses.asdict(self)
        return data | {"windows": list(self.windows), "eos": list(self.eos)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The config that to_dict wrote. Errors: JaxqError for unknown or missing fields."""
        data = dict(data)
        try:
            data["windows"], data["eos"] = tuple(data["windows"]), tuple(data["eos"])
            data["rope"] = Rope(**data["rope"])
            data["local_rope"] = Rope(**data["local_rope"]) if data.get("local_rope") else None
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise JaxqError(
                f"this is not a jaxq model config: {error}; write it with ModelConfig.to_dict"
            ) from None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """The config of a Hugging Face config.json (as a dict), old or new spelling.

        Errors: JaxqError for an unsupported model_type (lists the supported ones) or feature.
        """
        from jaxq.models.model import hf_family

        if hf.get("quantization_config"):
            raise JaxqError(
                "config.json: this checkpoint is already quantized (quantization_config): load the float one"
            )
        return hf_family(hf.get("model_type")).read_config(hf)


def size(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """hf[key] as a positive int, or the default where the key is absent or null."""
    value = hf.get(key) if hf.get(key) is not None else default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise JaxqError(f"config.json: {key} must be a positive integer, found {value!r}")
    return value


def read_common(hf: Mapping[str, Any], family: str, **chosen: Any) -> ModelConfig:
    """The fields that every family spells alike; `chosen` overrides or adds those that differ."""
    hidden, heads = size(hf, "hidden_size"), size(hf, "num_attention_heads")
    head_dim = chosen.pop("head_dim", None) or size(hf, "head_dim", hidden // heads)
    fields: dict[str, Any] = {
        "family": family,
        "vocab_size": size(hf, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": size(hf, "intermediate_size"),
        "heads": heads,
        "kv_heads": size(hf, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "windows": (None,) * size(hf, "num_hidden_layers"),
        "query_scale": head_dim**-0.5,
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "activation": activation(hf.get("hidden_act", "silu")),
        "tied": bool(hf.get("tie_word_embeddings", False)),
        "max_length": size(hf, "max_position_embeddings", 2048),
        "bos": hf.get("bos_token_id"),
        "eos": token_ids(hf.get("eos_token_id")),
        "pad": hf.get("pad_token_id"),
    }
    if "rope" not in chosen:
        fields["rope"] = read_rope(
            hf.get("rope_parameters") or hf.get("rope_scaling"), hf.get("rope_theta", 1e4), hf
        )
    return ModelConfig(**(fields | chosen))


def token_ids(found: Any) -> tuple[int, ...]:
    """One id, several or none, as configs spell end tokens, as a tuple."""
    return () if found is None else tuple(found) if isinstance(found, list | tuple) else (found,)


def activation(name: str) -> str:
    """jaxq's name of a Hugging Face activation name."""
    return _ACTIVATION_NAMES.get(name, name)


def read_rope(found: Mapping[str, Any] | None, base: float, hf: Mapping[str, Any]) -> Rope:
    """The Rope of a `rope_parameters` (new) or `rope_scaling` (old) entry; base where it names none."""
    found = found or {}
    kind = found.get("rope_type", found.get("type", "default"))
    if found.get("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise JaxqError("config.json: partial_rotary_factor other than 1 is not supported")
    base = float(found.get("rope_theta", base))
    try:
        if kind == "default":
            return Rope(base)
        if kind == "linear":
            return Rope(base, "linear", float(found["factor"]))
        if kind == "llama3":
            original = found.get("original_max_position_embeddings") or hf["max_position_embeddings"]
            low, high = float(found["low_freq_factor"]), float(found["high_freq_factor"])
            return Rope(base, "llama3", float(found["factor"]), low, high, int(original))
    except KeyError as missing:
        raise JaxqError(f"config.json: rope scaling {kind!r} needs {missing}") from None
    raise JaxqError(f"config.json: rope scaling {kind!r} is not supported; use default, linear or llama3")


def layer_windows(hf: Mapping[str, Any], layers: int, window: int | None, is_local: Any) -> tuple[int | None, ...]:
    """The window of each layer: from `layer_types` where the config has it, else where is_local(index)."""
    kinds = hf.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if is_local(i) else "full_attention" for i in range(layers)]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown or len(kinds) != layers:
        raise JaxqError(
            f"config.json: layer_types must be full_attention or sliding_attention, for {layers} layers"
        )
    if window is None and "sliding_attention" in kinds:
        raise JaxqError("config.json: layer_types has sliding_attention but sliding_window is not set")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
