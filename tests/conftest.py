"""Settings that must stand before jax starts: eight CPU devices, and LAPACK on one thread.

The threads of OpenBLAS spin against those of XLA and of the other test process; see jaxq.quantize.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Several processes may share one GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jaxlib
import pytest
from hypothesis import settings

settings.register_profile("jaxq", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("jaxq")


def pytest_configure(config: pytest.Config) -> None:
    # Tracing makes many small objects that live on: looking for garbage among them takes a twentieth of the time.
    gc.set_threshold(50_000, 20, 100)
    # The fast tests compile hundreds of tiny programs once each: the compiler's work is most of their time. Real
    # models want its optimizations. Programs cut into parts for several cores take a fifth longer to compile; the
    # older of its two code generators, which jaxlib 0.10 still has, takes half as long.
    if "not slow" in config.option.markexpr:
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # for the programs that tests start
        os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
        if jaxlib.__version__.startswith("0.10."):
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


@pytest.fixture
def quick_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """k-means by iterations, which compile in half the time, where it is not the tables that are tested."""
    monkeypatch.setattr("jaxq.solvers.kmeans.BUDGET_SECONDS", 0.0)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


#: Memory mappings, of the 65530 that Linux allows a process. Each compiled program takes some; when there are no
#: more, the compiler aborts.
MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """After a file of tests, forgets what was compiled if it has become much."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()
