"""Numerical methods, arrays in and quantized arrays out. They know nothing of models."""

from jaxq.solvers.rtn import rtn as rtn
