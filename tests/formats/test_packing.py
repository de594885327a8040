"""Packing: the bit stream of GPTQ checkpoints, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.formats.packing import capacity_of, pack, unpack, words_for


def stream(column: np.ndarray, bits: int) -> list[int]:
    """The words of one column, built from one big Python integer."""
    whole = sum(int(value) << (index * bits) for index, value in enumerate(column))
    return [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(column) * bits // 32))]


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (1, [1, 0, 1, 1], [0b1101]),
        (2, [3, 0, 1, 2], [0b10_01_00_11]),
        # 33 bits: the last value straddles the word boundary, two bits below it and one above.
        (3, [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 7], [0xD11F58D1, 1]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8, 9], [0x87654321, 0x9]),
        (8, [0x11, 0x22, 0x33, 0x44, 0x55], [0x44332211, 0x55]),
    ],
)
def test_golden_words(bits, codes, words):
    packed = pack(jnp.asarray(codes, jnp.uint8)[:, None], bits)
    assert packed.dtype == jnp.uint32
    assert packed[:, 0].tolist() == words


@given(bits=st.integers(1, 8), count=st.integers(1, 75), seed=st.integers(0, 2**16))
def test_stream_and_round_trip(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, count, 3)).astype(np.uint8)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.shape == (2, words_for(count, bits), 3)
    assert packed[1, :, 2].tolist() == stream(codes[1, :, 2], bits)
    np.testing.assert_array_equal(unpack(packed, bits, count), codes)
    assert count <= capacity_of(packed.shape[-2], bits) < count + 32


@pytest.mark.parametrize("bits", range(1, 9))
def test_under_jit_and_vmap(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (4, 37, 5)).astype(np.uint8)
    whole = jax.jit(pack, static_argnums=1)(codes, bits)
    np.testing.assert_array_equal(jax.vmap(lambda c: pack(c, bits))(codes), whole)
    np.testing.assert_array_equal(jax.vmap(lambda w: unpack(w, bits, 37))(whole), codes)
