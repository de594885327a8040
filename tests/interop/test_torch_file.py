"""PyTorch files without PyTorch: what torch.save writes is read back, whatever else is refused and not run."""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxq.errors import JaxqError
from jaxq.interop.torch_file import read


def archive(path: Path, data: bytes, storages=None, how=zipfile.ZIP_STORED, **members) -> Path:
    """A file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", how) as made:
        made.writestr("archive/data.pkl", data)
        for key, content in (storages or {}).items():
            made.writestr(f"archive/data/{key}", content)
        for name, content in members.items():
            made.writestr(f"archive/{name}", content)
    return path


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    return b"J" + struct.pack("<i", value)


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def many(values):
    return b"(" + b"".join(map(number, values)) + b"t"


EMPTY = named("collections", "OrderedDict") + b")R"


def tensor(storage="FloatStorage", key="0", count=6, offset=0, size=(6,), stride=(1,), end=b"\x89" + EMPTY):
    """The pickle of {"w": one tensor}, op by op."""
    pid = b"(" + text("storage") + named("torch", storage) + text(key) + text("cpu") + number(count) + b"tQ"
    call = named("torch._utils", "_rebuild_tensor_v2") + b"(" + pid + number(offset)
    return b"\x80\x02}" + text("w") + call + many(size) + many(stride) + end + b"tRs."


NUMBERS = {"0": np.arange(6, dtype=np.float32).tobytes()}


def test_views(tmp_path):
    def one(**how):
        return read(archive(tmp_path / "x.pt", tensor(**how), NUMBERS))["w"]

    np.testing.assert_array_equal(one(), np.arange(6))
    np.testing.assert_array_equal(one(offset=1, size=(2, 2), stride=(1, 3)), [[1, 4], [2, 5]])
    np.testing.assert_array_equal(one(size=(3, 2), stride=(0, 1)), [[0, 1]] * 3)
    np.testing.assert_array_equal(one(offset=5, size=(), stride=()), 5)
    assert one(offset=99, size=(0, 7), stride=(7, 1)).shape == (0, 7)
    assert not one().flags.writeable and not one().flags.owndata
    halves = one(storage="BFloat16Storage", count=12, size=(12,))[1::2]
    np.testing.assert_array_equal(halves, np.arange(6).astype(ml_dtypes.bfloat16))


REFUSED = {
    "an index beyond": (tensor(offset=1), "reaches number 6 of a storage of 6"),
    "a stride beyond": (tensor(size=(2, 2), stride=(5, 1)), "reaches number 6"),
    "a negative offset": (tensor(offset=-1), "damaged"),
    "a negative stride": (tensor(stride=(-1,)), "damaged"),
    "a stride too many": (tensor(stride=(1, 1)), "damaged"),
    "too many numbers": (tensor(count=7), "holds 24 bytes, not 28"),
    "a negative count": (tensor(count=-2), "holds 24 bytes"),
    "a storage that is not there": (tensor(key="1"), "damaged"),
    "a storage outside": (tensor(key="../../x"), "damaged"),
    "another storage": (tensor(storage="ComplexFloatStorage"), "it asks for torch.ComplexFloatStorage"),
    "a flag": (tensor(end=b"\x89" + EMPTY + b"}" + text("neg") + b"\x88s"), "is not dense"),
    "a function": (
        b"\x80\x02}" + text("w") + named("posix", "system") + text("exit") + b"\x85Rs.",
        "posix.system",
    ),
    "a name that is built": (b"\x80\x04" + text("os") + text("system") + b"\x93.", "it asks for os.system"),
    "an instance": (b"(" + text("touch") + b"ios\nsystem\n.", "os.system"),
    "getattr": (named("builtins", "getattr") + b".", "builtins.getattr"),
    "a name inside": (named("torch", "FloatStorage.__init__") + b".", "torch.FloatStorage.__init__"),
    "numpy": (named("numpy.core.multiarray", "_reconstruct") + b".", "numpy.core.multiarray._reconstruct"),
    "state for a function": (
        named("torch._utils", "_rebuild_tensor_v2") + b"}" + text("a") + number(1) + b"sb.",
        "it changes an object",
    ),
    "state for a class": (
        named("torch", "FloatStorage") + b"N}" + text("dtype") + b"Ns\x86b.",
        "it changes an object",
    ),
    "state for a tensor": (tensor()[:-2] + b"}bs.", "it changes an object"),
    "another object": (b"\x80\x02\x8f.", "damaged|not a plain file"),
    "a set": (b"\x80\x04}" + text("w") + b"\x8fs.", "neither a tensor nor plain data"),
    "a name in place of a tensor": (
        b"}" + text("w") + named("torch", "FloatStorage") + b"s.",
        "neither a tensor nor",
    ),
    "a circle": (b"\x80\x02}" + text("w") + b"]q\x00h\x00as.", "contains itself"),
    "a pickle in a pickle": (b"\x80\x02P0\n.", "damaged|outside the file"),
    "a list": (b"\x80\x02].", "does not hold a dictionary"),
    "other keys": (b"\x80\x02}" + number(1) + number(2) + b"s.", "does not hold a dictionary"),
    "half a pickle": (tensor()[:40], "damaged"),
    "nothing": (b"", "damaged"),
    "a lie about length": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.", "damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    data, message = REFUSED[case]
    path = archive(tmp_path / "x.pt", data, NUMBERS)
    with pytest.raises(JaxqError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_nothing_that_a_file_asks_for_is_run(tmp_path):
    mark = tmp_path / "ran"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = archive(tmp_path / "x.pt", pickle.dumps({"w": Evil(mark)}, protocol))
        with pytest.raises(JaxqError, match=r"not a plain file of tensors \(it asks for posix.system\)"):
            read(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()


def test_what_stands_in_two_places_is_read_once(tmp_path):
    # A hundred pairs, each of the one before twice: read as often as they stand there, 2^100 objects.
    ops = b"".join(b"0(h%ch%ctq%c" % (i, i, i + 1) for i in range(100))
    found = read(archive(tmp_path / "x.pt", b"\x80\x02}" + text("w") + b")q\x00" + ops + b"s."))
    depth, item = 0, found["w"]
    while item:
        depth, item = depth + 1, item[0]
    assert depth == 100


def test_files_that_are_something_else(tmp_path):
    def refused(path, message):
        with pytest.raises(JaxqError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value)

    whole = archive(tmp_path / "x.pt", tensor(), NUMBERS)
    path = tmp_path / "y.pt"
    for length in (4, 100, whole.stat().st_size - 1):
        path.write_bytes(whole.read_bytes()[:length])
        refused(path, "cut short or damaged")
    path.write_bytes(whole.read_bytes()[1:60])
    refused(path, "not a file that torch.save wrote")
    path.write_bytes(b"")
    refused(path, "not a file that torch.save wrote")
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest")
    refused(path, "before 1.6: load it there, and torch.save it again")
    refused(tmp_path / "none.pt", "none.pt: cannot be read: No such file")
    refused(tmp_path, "cannot be read")
    refused(archive(path, tensor(), NUMBERS, byteorder=b"big"), "big-endian")
    refused(archive(path, tensor(), NUMBERS, zipfile.ZIP_DEFLATED), "compressed")
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("word/document.xml", "hello")
    refused(path, "it has no data.pkl")
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", tensor())
        made.writestr("archive/data/0", NUMBERS["0"], zipfile.ZIP_DEFLATED)
    refused(path, "is compressed")


def test_what_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    shared = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32)
    tensors = {str(kind): (torch.randn(3, 5) * 9).to(kind) for kind in (*kinds, torch.int64, torch.uint8)}
    tensors |= {
        "bool": torch.tensor([[True, False], [False, True]]),
        "turned": shared.T,
        "part": shared[1:3, ::2],
        "one": shared[2, 3],
        "wide": torch.tensor([7.0]).expand(5),
        "empty": torch.zeros(0, 4),
        "turned bfloat16": tensors["torch.bfloat16"].T[1:],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "buffer": torch.nn.Parameter(torch.ones(2), requires_grad=False),
    }
    linear = torch.nn.Linear(3, 2).state_dict()
    path = tmp_path / "x.pt"
    torch.save({**tensors, "inner": linear, "list": [1, (2.5, "x", None, shared)], "count": 3}, path)
    found = read(path)
    assert list(found) == [*tensors, "inner", "list", "count"] and found["count"] == 3
    for name, value in tensors.items():
        assert found[name].shape == tuple(value.shape)
        assert str(found[name].dtype) == str(value.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].astype(np.float64), value.detach().double().numpy())
    assert np.shares_memory(found["turned"], found["part"])
    np.testing.assert_array_equal(found["inner"]["weight"], linear["weight"].numpy())
    assert found["list"][0] == 1 and found["list"][1][:3] == (2.5, "x", None)
    assert isinstance(linear, OrderedDict) and hasattr(linear, "_metadata")
    torch.save(linear, path)
    assert list(read(path)) == ["weight", "bias"]


def test_torch_files_that_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(JaxqError, match="before 1.6"):
        read(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(JaxqError, match="asks for torch.nn.modules.linear.Linear"):
        read(path)
    torch.save({"w": torch.ones(2).to_sparse()}, path)
    with pytest.raises(JaxqError, match="asks for torch"):
        read(path)
    torch.save(torch.ones(2), path)
    with pytest.raises(JaxqError, match="not hold a dictionary"):
        read(path)
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(JaxqError, match="cut short"):
        read(path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_many_storages_are_one_open_file(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({str(i): torch.full((2,), float(i)) for i in range(300)}, tmp_path / "x.pt")
    before = len(os.listdir("/proc/self/fd"))
    found = read(tmp_path / "x.pt")
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert all(found[str(i)].tolist() == [i, i] for i in range(300))
