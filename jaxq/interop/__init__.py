"""Quantized models of other programs, read and written without those programs."""

from jaxq.interop import squeezellm as squeezellm
from jaxq.interop import torch_file as torch_file
