"""Post-training quantization as a JAX function transformation."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxq.calibration import ActivationRule as ActivationRule
from jaxq.calibration import calibrate as calibrate
from jaxq.errors import JaxqError as JaxqError
from jaxq.formats import BitPlane as BitPlane
from jaxq.formats import Codebook as Codebook
from jaxq.formats import DenseSparse as DenseSparse
from jaxq.formats import Layout as Layout
from jaxq.formats import QuantizedArray as QuantizedArray
from jaxq.formats import Uniform as Uniform
from jaxq.formats import dequantize as dequantize
from jaxq.formats import is_quantized as is_quantized
from jaxq.formats import prepare as prepare
from jaxq.formats import restore as restore
from jaxq.importance import importance as importance
from jaxq.names import Activated as Activated
from jaxq.names import activations as activations
from jaxq.observe import observe as observe
from jaxq.planning import Plan as Plan
from jaxq.planning import plan as plan
from jaxq.quantize import Event as Event
from jaxq.quantize import Result as Result
from jaxq.quantize import quantize as quantize
from jaxq.quantized import quantized as quantized
from jaxq.recipe import Recipe as Recipe
from jaxq.recipe import Rule as Rule
from jaxq.report import Report as Report
from jaxq.report import SiteReport as SiteReport
from jaxq.sites import Site as Site
from jaxq.sites import sites as sites
from jaxq.solvers.gptq import gptq as gptq
from jaxq.solvers.hlq import hlq as hlq
from jaxq.solvers.kmeans import kmeans as kmeans
from jaxq.solvers.lnq import lnq as lnq
from jaxq.solvers.rtn import rtn as rtn
from jaxq.stages import Stage as Stage
from jaxq.stages import stages as stages
from jaxq.transforms.gradients import Fisher as Fisher
from jaxq.transforms.gradients import GuidedHessian as GuidedHessian
from jaxq.transforms.statistics import Hessian as Hessian
from jaxq.transforms.statistics import Moments as Moments
from jaxq.transforms.statistics import Range as Range
from jaxq.transforms.statistics import Statistic as Statistic

if TYPE_CHECKING:
    from jaxq import interop as interop
    from jaxq import losses as losses
    from jaxq import models as models
    from jaxq import recipes as recipes
    from jaxq.checkpoint import load as load
    from jaxq.checkpoint import save as save

__version__ = "0.1.0"

# Flax, Orbax and transformers take seconds to import: they wait until somebody asks.
_LATER = {
    "interop": None,
    "losses": None,
    "models": None,
    "recipes": None,
    "evaluate": None,
    "data": None,
    "save": "checkpoint",
    "load": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'jaxq' has no attribute {name!r}")
    home = _LATER[name]
    module = importlib.import_module(f"jaxq.{home or name}")
    return getattr(module, name) if home else module
