"""The steps of a recipe that works on a function as a whole, as data: `jaxq/blockwise` does them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from jaxq.errors import JaxqError

#: {end of the path of a linear layer: end of the path of the norm before it}, in timm's names.
NORMS = (("attn/qkv", "norm1"), ("mlp/fc1", "norm2"), ("downsample/reduction", "downsample/norm"))

TRAINED = ("rounding", "weights")
LOSSES = ("mse", "aph", "ph", "hessian", "brecq", "fima", "least_squares", "global")
WEIGHT_SEARCHES = ("minmax", "percentile", "mse", "output")


@dataclasses.dataclass(frozen=True)
class Step:
    """Base of the steps. `name` is unique among them."""

    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `step_from_dict` makes an equal step."""
        fields = {k: [list(x) for x in v] if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return {"step": self.name, **fields}

    def require(self, field: str, known: tuple[str, ...]) -> None:
        if getattr(self, field) not in known:
            raise JaxqError(f"step {self.name}: {field} is {', '.join(known)}, not {getattr(self, field)!r}")

    def positive(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise JaxqError(f"step {self.name}: {field} is a positive number, not {value!r}")


@dataclasses.dataclass(frozen=True)
class ReluMLP(Step):
    """Fits each MLP with ReLU to the one with GELU (APHQ-ViT's MLP reconstruction).

    The function that is quantized has ReLU already, and the float function GELU: see `student` of `jaxq.quantize`.

    percentile: of the positive hidden activations, where the clamp of the loss stands. alpha: weight of the error
    with that clamp. weighted: by the importance of the outputs.
    """

    name: ClassVar[str] = "relu_mlp"

    percentile: float = 0.99
    alpha: float = 2.0
    iterations: int = 20000
    batch: int = 32
    rate: float = 4e-5
    weighted: bool = True
    temperature: float = 20.0

    def __post_init__(self) -> None:
        self.positive("iterations", "batch")


@dataclasses.dataclass(frozen=True)
class Calibrate(Step):
    """Fits grids to what the first calibration examples make of the function.

    weights: the search for grids of weights, a grid for each output, or "none" to leave them: "minmax",
    "percentile" and "mse" (of the weight), or "output" (of the layer's output, together with its input's grid).
    activations: whether those are fitted, each by the search that its rule names. only: a pattern of their paths.
    stream: whether the layers before are quantized already ("quantized") or not ("float").
    images: how many examples; batch: how many at a time.
    """

    name: ClassVar[str] = "calibrate"

    weights: str = "output"
    activations: bool = True
    only: str = "**"
    stream: str = "float"
    images: int = 128
    batch: int = 32

    def __post_init__(self) -> None:
        self.require("weights", (*WEIGHT_SEARCHES, "none"))
        self.require("stream", ("float", "quantized"))
        self.positive("images", "batch")


@dataclasses.dataclass(frozen=True)
class Reparametrize(Step):
    """One grid for the tensor in place of one for each channel, where a norm feeds a linear layer (RepQ-ViT).

    pairs: (end of the layer's path, end of the norm's). fractional: the zero point is not rounded, as in I&S-ViT's
    code; the function then changes. search: of the grids from now on, if a later step fits them again.
    """

    name: ClassVar[str] = "reparametrize"

    pairs: tuple[tuple[str, str], ...] = NORMS
    fractional: bool = False
    search: str = "output"


@dataclasses.dataclass(frozen=True)
class Rotate(Step):
    """Turns the residual stream of a ViT by a random rotation that LayerNorm does not see (after GLF-Q).

    Outliers spread over the channels, and the float function stays as it is.
    """

    name: ClassVar[str] = "rotate"

    pairs: tuple[tuple[str, str], ...] = NORMS


@dataclasses.dataclass(frozen=True)
class Reconstruct(Step):
    """Trains block after block until its output is the float block's again.

    train: "rounding" (whether weights go up or down, AdaRound) or "weights" (themselves, straight through the
    rounding, and biases). quantized: whether weights are rounded meanwhile.
    loss: of a block's output against the float one. "mse": squared. Squared and weighted by importance: "aph"
    (mean |g| over examples), "ph" (|g| of each), "hessian" (mean g^2), "brecq" (g^2 of the quantized network).
    "fima" (FIMA-Q, of this rank: its gradients are taken so often in the course of the training), "least_squares"
    (LS-ViT). "global": squared, of the logits that the float blocks behind make of it, and twice that of the
    output itself (after GLF-Q, which takes the features before the head).
    The last stage of a classifier is compared by the KL divergence of its logits. temperature: of the softmax of
    importances.
    iterations, batch, rate: of training; scale_rate: of the scales of activations, 0 to leave them.
    mixed: probability with which an element of a block's input is of the quantized stream, else of the float one.
    drop: probability with which an element of an activation is quantized.
    whole: the function is one block, so that its last output is what counts.
    """

    name: ClassVar[str] = "reconstruct"

    train: str = "rounding"
    quantized: bool = True
    loss: str = "aph"
    temperature: float = 20.0
    rank: int = 5
    iterations: int = 20000
    batch: int = 32
    rate: float = 1e-3
    scale_rate: float = 4e-5
    mixed: float = 0.5
    drop: float = 0.5
    whole: bool = False

    def __post_init__(self) -> None:
        self.require("train", TRAINED)
        self.require("loss", LOSSES)
        self.positive("iterations", "batch", "rank")
        if self.train == "rounding" and not self.quantized:
            raise JaxqError("step reconstruct: rounding cannot be trained without quantized weights")
        if self.whole and self.loss != "mse":
            raise JaxqError('step reconstruct: a function as a whole has loss = "mse" (of a classifier, the KL)')


STEPS: dict[str, type[Step]] = {
    step.name: step for step in (ReluMLP, Calibrate, Reparametrize, Rotate, Reconstruct)
}


def step_from_dict(data: Any) -> Step:
    """The step that `to_dict` described; JaxqError for an unknown name or field."""
    name = data.get("step") if isinstance(data, dict) else None
    if name not in STEPS:
        raise JaxqError(f"unknown step {name!r}; use one of {', '.join(STEPS)}")
    fields = {k: v for k, v in data.items() if k != "step"}
    unknown = sorted(fields.keys() - {f.name for f in dataclasses.fields(STEPS[name])})
    if unknown:
        raise JaxqError(f"step {name!r} has no setting {', '.join(map(repr, unknown))}")
    if "pairs" in fields:
        fields["pairs"] = tuple((str(a), str(b)) for a, b in fields["pairs"])
    return STEPS[name](**fields)
