"""What a quantized tensor is: one file a format."""

from jaxq.formats.base import Format as Format
from jaxq.formats.base import Layout as Layout
from jaxq.formats.base import QuantizedArray as QuantizedArray
from jaxq.formats.base import abstract as abstract
from jaxq.formats.base import dequantize as dequantize
from jaxq.formats.base import from_dict as from_dict
from jaxq.formats.base import is_quantized as is_quantized
from jaxq.formats.bitplane import BitPlane as BitPlane
from jaxq.formats.bitplane import BitPlaneArray as BitPlaneArray
from jaxq.formats.codebook import Codebook as Codebook
from jaxq.formats.codebook import CodebookArray as CodebookArray
from jaxq.formats.dense_sparse import DenseSparse as DenseSparse
from jaxq.formats.dense_sparse import DenseSparseArray as DenseSparseArray
from jaxq.formats.grids import Affine as Affine
from jaxq.formats.grids import Dynamic as Dynamic
from jaxq.formats.grids import Grid as Grid
from jaxq.formats.grids import Log as Log
from jaxq.formats.grids import ShiftLog as ShiftLog
from jaxq.formats.prepared import PreparedArray as PreparedArray
from jaxq.formats.prepared import prepare as prepare
from jaxq.formats.prepared import restore as restore
from jaxq.formats.rounded_input import RoundedInput as RoundedInput
from jaxq.formats.rounded_input import RoundedInputArray as RoundedInputArray
from jaxq.formats.rounded_input import rounded_input as rounded_input
from jaxq.formats.uniform import Uniform as Uniform
from jaxq.formats.uniform import UniformArray as UniformArray
