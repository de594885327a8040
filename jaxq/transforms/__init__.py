"""Pure functions over parameter pytrees and the statistics that they use."""

from jaxq.transforms.statistics import Hessian as Hessian
from jaxq.transforms.statistics import HessianState as HessianState
from jaxq.transforms.statistics import Moments as Moments
from jaxq.transforms.statistics import MomentsState as MomentsState
from jaxq.transforms.statistics import Range as Range
from jaxq.transforms.statistics import RangeState as RangeState
from jaxq.transforms.statistics import Statistic as Statistic
