"""The statistics that solvers and recipes can name."""

from __future__ import annotations

from typing import Any

from jaxq.transforms.gradients import Fisher, GuidedHessian
from jaxq.transforms.statistics import Hessian

STATISTICS: dict[str, Any] = {
    "hessian": Hessian(),
    "fisher": Fisher(),
    "guided": GuidedHessian(),
}


def needs_gradients(statistic: Any) -> bool:
    """Whether a statistic is updated with the gradient of a loss too."""
    return getattr(statistic, "gradient", False)
