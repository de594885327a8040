"""Layers of SqueezeLLM checkpoints: the bits, the overlay, the way back, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import packer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.errors import JaxqError
from jaxq.formats import Codebook, CodebookArray, DenseSparse, DenseSparseArray, Layout, Uniform
from jaxq.formats.codebook import assemble
from jaxq.interop.squeezellm import from_tensors, to_tensors

# The golden words of the description, one output: 32 inputs at each width.
GOLDEN = {
    2: ([0, 1, 2, 3] * 8, ["e4e4e4e4"] * 2),
    3: (list(range(8)) * 4, ["88fac688", "c688fac6", "fac688fa"]),
    4: ([*range(8)] * 4, ["76543210"] * 4),
}


# Compiled whole: op by op, each shape takes seconds.
dense = jax.jit(lambda array: array.dequantize())


def as_words(texts):
    return np.array([[int(text, 16)] for text in texts], np.uint32).view(np.int32)


def example(bits=3, in_size=64, out_size=5, share=0.1, seed=0):
    rng = np.random.default_rng(seed)
    return packer.layer(packer.weights(rng, out_size, in_size), bits, share, rng)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        assert a[name].dtype == b[name].dtype


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_words(bits):
    codes, texts = GOLDEN[bits]
    words, table = as_words(texts), np.arange(2**bits, dtype=np.float32)[None] * 10
    array = from_tensors({"qweight": words, "lookup_table": table})
    assert type(array) is CodebookArray and array.shape == (32, 1)
    np.testing.assert_array_equal(dense(array)[:, 0], np.array(codes) * 10)
    np.testing.assert_array_equal(packer.words(np.array([codes]), bits), words)
    same(to_tensors(array), {"qweight": words, "lookup_table": table})


def test_a_layer_by_hand():
    codes = np.zeros((3, 32), int)
    codes[0, :4], codes[1, :4], codes[2, :4] = [0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 0]
    tensors = {
        "qweight": packer.words(codes, 2),
        "lookup_table": np.array([[3, -1, 0.5, 2], [0, 1, -7, 4], [0.25, -0.5, 8, 9]], np.float32),
        "rows": np.array([0, 2, 2, 3], np.int32),  # the second output has none
        "cols": np.array([1, 31, 0], np.int32),
        "vals": np.array([10, -3, 100], np.float32),
    }
    array = from_tensors(tensors, in_size=32)
    expected = np.zeros((3, 32), np.float32)
    expected[:, :4] = [[3, 9, 0.5, 2], [4, -7, 1, 0], [99.5, -0.5, 0.25, 0.25]]
    expected[:, 4:] = [[3], [0], [0.25]]
    expected[0, 31] = 0
    np.testing.assert_array_equal(dense(array).T, expected)
    x = np.eye(32, dtype=np.float32)[:2]
    np.testing.assert_array_equal(x @ array, expected.T[:2])
    same(to_tensors(array), tensors)


@given(
    bits=st.sampled_from([2, 3, 4]),
    in_size=st.sampled_from([32, 96]),
    out_size=st.sampled_from([1, 6]),
    share=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_packed_layer_is_what_was_packed(bits, in_size, out_size, share, seed):
    tensors, expected = example(bits, in_size, out_size, share, seed)
    array = from_tensors(tensors, in_size)
    np.testing.assert_array_equal(dense(array).T, expected)
    same(to_tensors(array), tensors)
    count = len(tensors.get("vals", ()))
    assert isinstance(array, DenseSparseArray) == bool(count)
    if isinstance(array, DenseSparseArray):
        assert array.values.shape == (count,) and array.format.entries(in_size, out_size) == count
    abstract = array.format.abstract((in_size, out_size), array.dtype)
    assert jax.tree.structure(abstract) == jax.tree.structure(array)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(array)
    ]


def test_any_number_of_entries_has_a_sparsity():
    for size in (32 * 7, 11008 * 4096):
        for count in (1, 2, 3, 101, size - 1, size):
            sparsity = min(count / size, float(np.nextafter(1.0, 0.0)))
            assert DenseSparse(Codebook(3), sparsity).entries(size, 1) == count


def test_removed_weights_are_exact_to_one_rounding():
    rng = np.random.default_rng(3)
    w = rng.normal(size=(8, 64)).astype(np.float16).astype(np.float32)
    centroids = rng.normal(size=(8, 8)).astype(np.float32)
    labels = np.abs(w[..., None] - centroids[:, None]).argmin(axis=-1)
    removed = np.abs(w) > 1.5
    tensors = packer.pack(w, centroids, labels, removed)
    for table_dtype in ("float32", "float16", "bfloat16"):
        array = from_tensors(tensors, table_dtype=table_dtype)
        assert array.base.table.dtype == jnp.dtype(table_dtype)
        found = np.asarray(array.dequantize()).T
        assert (np.abs(found - w)[removed] <= 2 * np.spacing(np.abs(w[removed]))).all()
        kept = np.take_along_axis(centroids, labels, axis=1).astype(jnp.dtype(table_dtype)).astype(np.float32)
        np.testing.assert_array_equal(found[~removed], kept[~removed])


def test_full_rows_are_merged_and_zeros_left_out():
    tensors, expected = example(out_size=6)
    for count in (0, 10):
        zeros = np.zeros((64, count), np.float32), np.zeros(count, np.int32)
        idle = tensors | dict(zip(("full_rows", "full_row_indices"), zeros, strict=True))
        idle["startrows"] = np.zeros(128, np.int32)
        same(to_tensors(from_tensors(idle)), tensors)
    full = np.zeros((64, 3), np.float32)
    full[[0, 5, 63], 0] = [1, 2, 3]
    full[:, 2] = 0.5
    merged = tensors | {"full_rows": full, "full_row_indices": np.array([4, 0, 2], np.int32)}
    expected[4, [0, 5, 63]] += [1, 2, 3]
    expected[2] += 0.5
    np.testing.assert_array_equal(dense(from_tensors(merged)).T, expected)
    alone = {name: merged[name] for name in ("qweight", "lookup_table", "full_rows", "full_row_indices")}
    assert from_tensors(alone).values.shape == (67,)


def test_entries_in_any_order_and_more_than_once():
    tensors, _ = example(share=0.0)
    tensors["rows"] = np.array([0, 0, 4, 4, 5, 5], np.int32)
    tensors["cols"] = np.array([9, 2, 9, 9, 0], np.int32)
    tensors["vals"] = np.array([1, 2, 3, 4, 5], np.float32)
    array = from_tensors(tensors)
    assert array.rows.tolist() == [2, 9, 0] and array.values.tolist() == [2, 8, 5]
    assert array.counts.tolist() == [0, 2, 0, 1, 0] and array.starts.tolist() == [0, 0, 2, 2, 3]


def test_no_entries_give_a_plain_codebook():
    tensors, _ = example(share=0.0)
    empty = {"rows": np.zeros(6, np.int32), "cols": np.zeros(0, np.int32), "vals": np.zeros(0, np.float32)}
    assert isinstance(from_tensors(tensors | empty), CodebookArray)


def test_dtypes():
    tensors, expected = example()
    array = from_tensors(tensors, dtype="bfloat16")
    assert array.dtype == dense(array).dtype == jnp.bfloat16
    np.testing.assert_array_equal(array.dequantize(jnp.float32).T, expected)


def test_the_result_owns_its_memory():
    tensors, expected = example()
    array = from_tensors(tensors)
    for value in tensors.values():
        value.fill(0)
    np.testing.assert_array_equal(dense(array).T, expected)


def changed(name, edit):
    tensors, _ = example()
    tensors[name] = edit(tensors[name])
    return tensors


def put(value, at=0):
    def edit(array):
        array = array.copy()
        array.flat[at] = value
        return array

    return edit


FULL = np.zeros((64, 2), np.float32)
REFUSED = {
    "no qweight": (lambda: {"lookup_table": np.zeros((5, 8), np.float32)}, "missing: qweight"),
    "no table": (lambda: {"qweight": np.zeros((6, 5), np.int32)}, "missing: lookup_table"),
    "half an overlay": (lambda: {k: v for k, v in example()[0].items() if k != "cols"}, "missing: cols"),
    "full rows of nothing": (lambda: example()[0] | {"full_rows": FULL}, "missing: full_row_indices"),
    "unknown": (lambda: example()[0] | {"g_idx": np.zeros(3)}, "no tensor g_idx"),
    "dtype of codes": (lambda: changed("qweight", lambda x: x.astype(np.int64)), "qweight is int64"),
    "dtype of table": (lambda: changed("lookup_table", lambda x: x.astype(np.float16)), "lookup_table is float16"),
    "axes": (lambda: changed("vals", lambda x: x[None]), "vals is float32 of shape"),
    "3 values": (lambda: changed("lookup_table", lambda x: x[:, :3]), "3 values an output"),
    "5 bits": (lambda: changed("lookup_table", lambda x: np.tile(x, 4)), "32 values an output"),
    "no values": (lambda: changed("lookup_table", lambda x: x[:, :0]), "0 values an output"),
    "outputs": (lambda: changed("lookup_table", lambda x: x[:4]), "5 outputs, but lookup_table 4"),
    "in not of 32s": (lambda: changed("qweight", lambda x: x[:4]), "4 words an output"),
    "no inputs": (lambda: changed("qweight", lambda x: x[:0]), "0 words an output"),
    "nan in table": (
        lambda: changed("lookup_table", put(np.nan)),
        "lookup_table holds values that are not finite",
    ),
    "inf in vals": (lambda: changed("vals", put(np.inf)), "vals holds values that are not finite"),
    "short rows": (lambda: changed("rows", lambda x: x[:-1]), "rows must be 6 numbers"),
    "rows from 1": (lambda: changed("rows", put(1)), "rows must be 6 numbers"),
    "rows fall": (lambda: changed("rows", put(10**6, 2)), "rows must be 6 numbers"),
    "rows end": (lambda: changed("rows", lambda x: np.append(x[:-1], x[-1] + 1).astype(np.int32)), "rows ends at"),
    "short vals": (lambda: changed("vals", lambda x: x[:-1]), "rows ends at"),
    "cols beyond": (lambda: changed("cols", put(64)), "cols must be numbers from 0 to 63; found"),
    "cols below": (lambda: changed("cols", put(-1)), "found -1 to"),
    "full shape": (
        lambda: example()[0] | {"full_rows": FULL[:32], "full_row_indices": np.zeros(2, np.int32)},
        r"full_rows has shape \(32, 2\)",
    ),
    "full beyond": (
        lambda: example()[0] | {"full_rows": FULL, "full_row_indices": np.array([0, 5], np.int32)},
        "full_row_indices must be numbers from 0 to 4",
    ),
    "sums": (
        lambda: example()[0] | {"full_rows": FULL + np.float32(3e38), "full_row_indices": np.zeros(2, np.int32)},
        "beyond the range of float32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(JaxqError, match=message) as caught:
        from_tensors(make())
    assert "\n" not in str(caught.value)


def test_inputs_and_ranges_asked_for():
    tensors, _ = example()
    with pytest.raises(JaxqError, match="codes for 64 inputs, not 32"):
        from_tensors(tensors, in_size=32)
    with pytest.raises(JaxqError, match="keep it in float32"):
        from_tensors(changed("lookup_table", put(1e6)), table_dtype="float16")


def test_what_the_layout_cannot_hold():
    rng = np.random.default_rng(0)

    def codebook(in_size, bits, batch=(), group=None):
        codes = jnp.asarray(rng.integers(0, 2**bits, (*batch, in_size, 4), np.uint8))
        tables = 1 if group is None else in_size // group
        return assemble(codes, jnp.zeros((*batch, tables * 2**bits, 4)), Codebook(bits, group_size=group))

    with pytest.raises(JaxqError, match="inputs by 32s: 33"):
        to_tensors(codebook(33, 3))
    with pytest.raises(JaxqError, match="2 to 4 bits, not codebook 5-bit"):
        to_tensors(codebook(32, 5))
    with pytest.raises(JaxqError, match="batch axes"):
        to_tensors(codebook(32, 3, (2,)))
    with pytest.raises(JaxqError, match="not for groups of 32"):
        to_tensors(codebook(64, 3, group=32))
    assert to_tensors(codebook(64, 3, group=64))["lookup_table"].shape == (4, 8)
    with pytest.raises(JaxqError, match="not uniform"):
        to_tensors(Uniform(bits=4, group_size=32).abstract((32, 4)))


def test_tables_of_other_dtypes_go_back_as_float32():
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 16, (64, 4), np.uint8))
    table = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    array = assemble(codes, table, Codebook(4, "bfloat16"), Layout(perm=(1, 0)))
    tensors = to_tensors(array)
    np.testing.assert_array_equal(dense(from_tensors(tensors)), dense(array).T)
