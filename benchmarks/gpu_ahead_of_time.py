"""Compiles GPU products for an H100 on a machine without one, and prints what the compiler made of them.

    python benchmarks/gpu_ahead_of_time.py --shape 8192x8192 --rows 2 --words 256 --warps 2 "codebook 4-bit"
    python benchmarks/gpu_ahead_of_time.py --tokens 16 --warpgroups 64,64,4,1,1,3 "codebook 4-bit"

Registers, spills, barriers and instructions in PTX: what costs no time on a device. An inner loop should have no
`bar.sync`, `st.shared` or `ld.shared` but those of the last sum, and read words as `ld.global.v4`. Needs
jax-cuda13-plugin and jax-cuda13-pjrt (of the version of jax; without the nvidia packages) and `ptxas` on the path.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DUMP = tempfile.mkdtemp(prefix="jaxq-ptx-")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_TO"] = DUMP
# Without a device there is nothing to time candidates on.
FLAGS = f" --xla_gpu_autotune_level=0 --xla_dump_to={DUMP} --xla_dump_emitter_re=.*"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from jaxq.bench import FORMATS
from jaxq.formats.prepared import prepare
from jaxq.kernels.gpu import warpgroups
from jaxq.kernels.gpu.weights import Settings

KIND = "NVIDIA H100 80GB HBM3"

#: What XLA has to know of the device.
TARGET = f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 3 }}
device_description_str: "{KIND}"
"""

#: Parts of the name of an instruction that make it another one.
MATTERS = {"global", "shared", "v2", "v4", "f16x2", "sync", "wgmma", "b32", "b16", "f32", "bfly"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", help="names of formats; default: all that are measured")
    parser.add_argument("--shape", default="8192x8192", help="inputs x outputs")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--exact", action="store_true", help="float32 sums")
    for name, value in (
        ("rows", 2),
        ("words", 256),
        ("warps", 2),
        ("unroll", 1),
        ("split", 1),
        ("stages", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    fields = ",".join(field.name for field in dataclasses.fields(warpgroups.Settings))
    parser.add_argument("--warpgroups", help=f"for several tokens, the tensor cores of Hopper: {fields}")
    args = parser.parse_args()
    settings: Any = Settings(args.rows, args.words, args.warps, args.unroll, args.split, args.stages)
    if args.warpgroups:
        settings = warpgroups.Settings(*map(int, args.warpgroups.split(",")))
        warpgroups.available = lambda: True
    shape = tuple(int(size) for size in args.shape.split("x"))
    topology = topologies.get_topology_desc("h100", platform="cuda", target_config=TARGET, topology="1x1x1")
    place = SingleDeviceSharding(topology.devices[0])
    device = AbstractDevice(device_kind=KIND, num_cores=132, platform="gpu")

    def product(x: jax.Array, q: jax.Array) -> jax.Array:
        return q.kernel.product(x, q, exact=args.exact, settings=settings, dtype=x.dtype)

    for format in FORMATS:
        if args.formats and not any(name in str(format) for name in args.formats):
            continue
        prepared = jax.eval_shape(lambda array: prepare(array, "gpu"), format.abstract(shape))
        x = jax.ShapeDtypeStruct((args.tokens, shape[0]), jnp.float16)
        x, prepared = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), (x, prepared)
        )
        for path in Path(DUMP).iterdir():
            path.unlink()
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            jax.jit(product).lower(x, prepared).compile()
        for path in sorted(Path(DUMP).glob("*.ptx")):
            print(f"{format}: {report(path)}", flush=True)


def report(path: Path) -> str:
    """Registers, spills, and how often each instruction stands in a file of PTX."""
    command = ["ptxas", "-arch=sm_90a", "-v", str(path), "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.findall(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill stores", said)
    counts: collections.Counter[str] = collections.Counter()
    for line in path.read_text().splitlines():
        if found := re.match(r"\s*(?:\{ ?)?(?:@%p\d+ )?([a-z][a-z0-9_.:]+) ", line):
            first, *rest = found.group(1).split(".")
            counts[".".join([first, *(part for part in rest if part in MATTERS)])] += 1
    most = " ".join(f"{name}:{count}" for name, count in counts.most_common(24))
    return f"registers {'/'.join(registers)}, spilled bytes {'/'.join(spills)}; {most}"


if __name__ == "__main__":
    main()
