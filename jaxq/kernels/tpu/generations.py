"""Which kernels a generation of TPUs runs. Nothing here was timed on a TPU: see docs/design.md."""

from __future__ import annotations

import re

import jax

#: Without gathers along sublanes: v4 and older.
V4 = "tpu-v4"
#: Gathers among the 8 rows of a register of 32-bit numbers: v5e, v5p.
V5 = "tpu-v5"
#: Gathers of 16-bit numbers among 16 rows, and 4-bit integers that convert in hardware: v6e, v7x.
V6 = "tpu-v6"

TARGETS = (V4, V5, V6)


def of_this_process() -> str:
    """The target of the first device if that is a TPU; else V5, whose kernels run on later ones too."""
    device = jax.devices()[0]
    return of_device_kind(device.device_kind) if device.platform == "tpu" else V5


def of_device_kind(kind: str) -> str:
    """The target for what JAX calls a device, such as "TPU v5 lite" or "TPU7x"."""
    number = re.search(r"(\d+)", kind)
    if number is None:
        return V4
    return V4 if int(number[1]) <= 4 else V5 if int(number[1]) == 5 else V6
