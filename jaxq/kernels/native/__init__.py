"""Products on CPUs in C++, compiled on first use."""

from jaxq.kernels.native.library import EXPORT_CHECKS as EXPORT_CHECKS
from jaxq.kernels.native.library import available as available
from jaxq.kernels.native.library import call as call
from jaxq.kernels.native.library import configure as configure
from jaxq.kernels.native.library import instruction_set as instruction_set
from jaxq.kernels.native.library import reason as reason
from jaxq.kernels.native.library import tables as tables
