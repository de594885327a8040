"""What the GPU products of all formats share: words of codes, instructions on pairs of halves, two kernels."""

import jax.export

#: For `jax.export.export(..., disabled_checks=...)` of a program with products of GPUs.
EXPORT_CHECKS = (jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton"),)
