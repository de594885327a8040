"""Eight CPU devices for the sharding tests, before jax starts."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest
from hypothesis import settings

settings.register_profile("jaxq", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("jaxq")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
