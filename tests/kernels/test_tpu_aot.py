"""Kernels for TPUs through the real compiler, ahead of time: no TPU is needed, and none runs.

`pip install jaxq[tpu]` brings libtpu. Each compilation is a process of its own, since the compiler may abort one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tpu_compile import GENERATIONS

from jaxq.formats import BitPlane, Codebook, Uniform

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: jaxq[tpu]"),
]

PROGRAM = Path(__file__).with_name("tpu_compile.py")

FORMATS = [
    *(Uniform(bits, 128) for bits in (2, 3, 4)),
    *(Codebook(bits) for bits in (2, 3, 4)),
    *(Codebook(bits, group_size=group) for bits, group in ((2, 64), (3, 128), (4, 64), (4, 256))),
    *(BitPlane(bits, 128) for bits in (2, 3, 4)),
]

#: In, out, tokens, dtype of activations: odd ones, whole blocks, and as many tokens as kernels take.
SHAPES = [(1000, 300, 1, "float32"), (4096, 4096, 16, "bfloat16"), (2048, 1024, 128, "bfloat16")]

#: Bundles of the compiler's schedule for 512 x 512 weights and 16 tokens: found with libtpu 0.0.42.1, and the
#: target of issue 5 where there is one. No group stands for one group a channel.
BUNDLES = [
    ("v6e", Uniform(4, None), 89, 125),
    ("v6e", Codebook(4, "bfloat16"), 196, 440),
    ("v7x", Uniform(4, None), 97, None),
    ("v7x", Codebook(4, "bfloat16"), 204, None),
    ("v5e", Uniform(4, None), 138, 180),
    ("v5e", Uniform(4, 128), 163, None),
    ("v5e", Codebook(4, "bfloat16"), 408, 440),
    ("v5e", Codebook(3), 250, None),
    ("v5e", BitPlane(3, None), 396, 400),
    ("v5e", BitPlane(2, None), 252, 255),
    ("v5e", BitPlane(3, 128), 412, None),
]

#: What another release of the compiler may take more.
SLACK = 1.05


def compiled(generation, format, width, out, tokens, dtype, over="", folder=None) -> dict:
    """What tpu_compile.py says; an AssertionError with the compiler's words if it failed."""
    extra = {"JAXQ_LLO": str(folder)} if folder else {}
    arguments = [generation, json.dumps(format.to_dict()), *map(str, (width, out, tokens, dtype, over))]
    root = str(PROGRAM.parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **extra, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles(generation, format, shape):
    assert compiled(generation, format, *shape)["calls"]["tpu_custom_call"] == 1


@pytest.mark.parametrize("over", ["vmap", "scan"])
@pytest.mark.parametrize("format", [Uniform(4, 128), Codebook(4), BitPlane(2, 64)], ids=str)
@pytest.mark.parametrize("generation", ["v4", "v5e", "v6e"])
def test_batched_and_in_loops(generation, format, over):
    assert compiled(generation, format, 512, 256, 4, "bfloat16", over)["calls"]["tpu_custom_call"] == 1


@pytest.mark.parametrize(("generation", "format", "found", "target"), BUNDLES, ids=str)
def test_bundles(generation, format, found, target, tmp_path):
    """Of blocks 1024 deep less those of blocks 512 deep, so that what happens once a block does not count."""
    counts = []
    for deep, width in ((512, 1536), (1024, 2048)):
        folder = tmp_path / str(deep)
        folder.mkdir()
        programs = compiled(generation, format, width, 1024, 16, "bfloat16", folder=folder)["bundles"]
        (kernel,) = (name for name in programs if name.startswith("jaxq_product"))
        counts.append(programs[kernel])
    assert 0 < counts[1] - counts[0] <= min(SLACK * found, target or SLACK * found), counts
