"""Compiles one product for a TPU that is not there: run as a program, since the compiler may abort a process.

    python tpu_compile.py v5e '{"name": "uniform", "bits": 4}' IN OUT TOKENS DTYPE [vmap|scan]

prints as JSON the custom calls in the program and its memory, and with JAXQ_LLO=FOLDER the bundles of the
instruction schedule of each kernel. Needs the package libtpu; no TPU runs.
"""

import collections
import json
import os
import re
import sys
from pathlib import Path

#: Generation: the name of its smallest topology, and what to prepare for.
GENERATIONS = {
    "v4": ("v4:2x2x1", "tpu-v4"),
    "v5e": ("v5e:2x2", "tpu-v5"),
    "v5p": ("v5p:2x2x1", "tpu-v5"),
    "v6e": ("v6e:2x2", "tpu-v6"),
    "v7x": ("tpu7x:2x2x1", "tpu-v6"),
}

#: Without a TPU, libtpu asks nobody what it runs on, and processes need not take turns.
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


def bundles(folder: Path) -> dict[str, int]:
    """Bundles in the last schedule of each kernel that the compiler wrote into `folder`."""
    found = {}
    for path in sorted(folder.glob("*final_hlo-static-per-bundle-utilization.txt")):
        lines = path.read_text().splitlines()
        found[path.name.split("-")[1]] = sum(bool(re.fullmatch(r"[\d ]+", line)) for line in lines[4:])
    return found


def main(
    generation: str, format: str, in_size: str, out_size: str, tokens: str, dtype: str, over: str = ""
) -> None:
    """`over`: "vmap" or "scan" for products with each of two matrices."""
    os.environ.update(SETTINGS)
    if folder := os.environ.get("JAXQ_LLO"):
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    import jaxq
    from jaxq.formats.base import from_dict

    topology, target = GENERATIONS[generation]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    place = SingleDeviceSharding(devices[0])
    batch = (2,) if over else ()
    array = from_dict(json.loads(format)).abstract((*batch, int(in_size), int(out_size)))
    prepared = jax.eval_shape(lambda q: jaxq.prepare(q, target), array)
    x = jax.ShapeDtypeStruct((*batch, int(tokens), int(in_size)), dtype)
    x, prepared = jax.tree.map(lambda z: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=place), (x, prepared))
    products = {
        "": lambda x, q: x @ q,
        "vmap": jax.vmap(lambda x, q: x @ q),
        "scan": lambda x, q: jax.lax.scan(lambda carry, each: (carry, each[0] @ each[1]), 0, (x, q))[1],
    }
    compiled = jax.jit(products[over]).lower(x, prepared).compile()
    calls = collections.Counter(re.findall(r'custom_call_target="(\w+)"', compiled.as_text()))
    memory = compiled.memory_analysis()
    print(json.dumps({
        "calls": calls, "temporary": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes,
        "bundles": bundles(Path(folder)) if folder else None, "kind": devices[0].device_kind,
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
