"""The statistics that solvers and recipes can name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxq.transforms.gradients import Fisher, GuidedHessian, Saliency, StreamHessian
from jaxq.transforms.statistics import Hessian

STATISTICS: dict[str, Any] = {
    "hessian": Hessian(),
    "fisher": Fisher(),
    "guided": GuidedHessian(),
    "saliency": Saliency(),
    "stream_guided": StreamHessian(),
}


def needs_gradients(statistic: Any) -> bool:
    """Whether a statistic is updated with the gradient of a loss too."""
    return getattr(statistic, "gradient", False)


def weighted_by(name: str) -> str:
    """Name of the statistic that gives the token weights of the named one, "" for none."""
    return getattr(STATISTICS[name], "weighted_by", "")


def of_gradient(names: Iterable[str]) -> list[str]:
    """Which of the named statistics, and of what weighs them, are of a loss's gradient; each once."""
    given = [n for name in names for n in (name, weighted_by(name)) if n]
    return [n for n in dict.fromkeys(given) if needs_gradients(STATISTICS[n])]
