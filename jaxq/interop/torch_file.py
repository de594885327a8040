"""Reads the tensors of a PyTorch file (.pt, .bin, .pth) without PyTorch, and without running what it says.

The file is a zip archive: `data.pkl`, a pickle that describes the object, and one member a storage, plain bytes
that are never compressed. A pickle is a program, so this one runs in a machine that knows nothing: every name that
it may ask for becomes an object of this file, and any other name ends the reading.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

from jaxq.errors import JaxqError

STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_PLAIN = (str, int, float, bool, type(None))
_PICKLE_LIMIT = 256 << 20
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER = 30


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote: arrays, and dictionaries, lists, tuples and numbers as they were.

    Arrays are read-only views of the mapped file, of the sizes and strides that the tensors had: a page is read
    when it is touched, and nothing is copied. They stay good while the file is left alone.

    Raises:
      JaxqError: the file is missing, cut short, of PyTorch before 1.6, big-endian, holds no dictionary at the top,
        or asks for anything but tensors and plain data; nothing that it asks for is run.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive)
    except JaxqError:
        raise
    except zipfile.BadZipFile:
        raise JaxqError(f"{path} {_what_else(path)}") from None
    except OSError as error:
        raise JaxqError(f"{path}: cannot be read: {error.strerror or error}") from None
    except _Refused as error:
        raise JaxqError(f"{path} is not a plain file of tensors ({error})") from None
    except Exception as error:  # a damaged pickle fails in a dozen ways
        raise JaxqError(f"{path} is damaged: {type(error).__name__} {' '.join(str(error).split())}") from None


class _Refused(Exception):
    """The file asks for something that is neither a tensor nor plain data."""


class _Made:
    """What the pickle is given in place of what it names. It can call it, and change nothing about it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise _Refused("it changes an object")


class _Kind(_Made):
    """A storage class: the dtype of its numbers."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class _Storage(_Made):
    """The numbers of a storage, one axis."""

    __slots__ = ("values",)

    def __init__(self, values: np.ndarray):
        self.values = values


class _Tensor(_Made):
    """A finished tensor, hidden from the pickle, which could otherwise write into it."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray):
        self.array = array


class _Dict(dict):
    """A dictionary that takes attributes and drops them: state dicts carry the versions of their modules."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _MakeDict(_Made):
    __slots__ = ()

    def __call__(self, items: Any = ()) -> _Dict:
        return _Dict(items)


class _MakeTensor(_Made):
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Tensor:
        # The rest: whether it has a gradient, hooks, and flags that change what the numbers mean.
        if not isinstance(storage, _Storage) or any(rest[2:]):
            raise _Refused("a tensor of it is not dense")
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"a tensor of size {size} and strides {stride}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if not math.prod(size):
            return _Tensor(np.zeros(size, storage.values.dtype))
        if last >= storage.values.size:
            raise ValueError(f"a tensor reaches number {last} of a storage of {storage.values.size}")
        steps = [step * storage.values.itemsize for step in stride]
        return _Tensor(as_strided(storage.values[offset:], size, steps, writeable=False))


class _MakeParameter(_Made):
    __slots__ = ()

    def __call__(self, data: Any, *rest: Any) -> Any:
        return data


class _Unpickler(pickle.Unpickler):
    """Knows the names of plain state dicts and the storages of one archive."""

    def __init__(self, data: bytes, storages: _Storages):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return _Kind(STORAGES[name])
        known = {
            ("collections", "OrderedDict"): _MakeDict,
            ("torch._utils", "_rebuild_tensor_v2"): _MakeTensor,
            ("torch._utils", "_rebuild_parameter"): _MakeParameter,
        }
        if (module, name) not in known:
            raise _Refused(f"it asks for {module}.{name}"[:120])
        return known[module, name]()

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, _, count = pid
        if tag != "storage" or not isinstance(kind, _Kind) or type(key) is not str or type(count) is not int:
            raise _Refused("it asks for an object outside the file")
        return _Storage(self._storages.get(key, kind.dtype, count))


class _Storages:
    """The storages of an archive, as views of the file, which is mapped once."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str):
        # One map for all: each map holds a file descriptor, and a model has thousands of storages.
        self._file = np.memmap(path, np.uint8, "r")
        self._archive, self._root = archive, root

    def get(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        info = self._archive.getinfo(f"{self._root}data/{key}")
        start, length = self._start(info), count * dtype.itemsize
        if not 0 <= length <= info.file_size or start + info.file_size > self._file.size:
            raise ValueError(f"storage {key} holds {info.file_size} bytes, not {length}")
        return np.asarray(self._file[start : start + length]).view(dtype)

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where the bytes of a member begin: names and padding before them have lengths of their own."""
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is compressed, which torch.save never does")
        header = bytes(self._file[info.header_offset : info.header_offset + _LOCAL_HEADER])
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{info.filename} is not where the archive says")
        name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        return info.header_offset + _LOCAL_HEADER + name + extra


def _read(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    names = archive.namelist()
    found = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise JaxqError(f"{path} is a zip archive, but not one that torch.save wrote: it has no data.pkl")
    root = found[0].removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise JaxqError(f"{path} was written on a big-endian machine: save it again on another")
    info = archive.getinfo(found[0])
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > _PICKLE_LIMIT:
        raise JaxqError(f"{path}: its data.pkl is compressed or far too large: torch.save did not write it")
    loaded = _Unpickler(archive.read(info), _Storages(path, archive, root)).load()
    plain = _plain(loaded, {})
    if not isinstance(plain, dict) or not all(isinstance(name, str) for name in plain):
        raise JaxqError(f"{path} does not hold a dictionary of tensors by name: save model.state_dict()")
    return plain


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """What the pickle made, with arrays for tensors. An object that stands in two places is made once."""
    if isinstance(value, _Tensor):
        return value.array
    if type(value) in _PLAIN:
        return value
    if type(value) not in (dict, _Dict, list, tuple):
        raise _Refused("it holds something that is neither a tensor nor plain data")
    if id(value) in done:
        if done[id(value)] is None:
            raise _Refused("an object of it contains itself")
        return done[id(value)]
    done[id(value)] = None
    if isinstance(value, dict):
        made: Any = {_plain(key, done): _plain(item, done) for key, item in value.items()}
    else:
        made = type(value)(_plain(item, done) for item in value)
    done[id(value)] = made
    return made


def _what_else(path: Path) -> str:
    """What a file that is no whole zip archive is, as the rest of a sentence that says what to do."""
    with path.open("rb") as stream:
        start = stream.read(len(_OLD_MAGIC))
    if start == _OLD_MAGIC:
        return "was written by PyTorch before 1.6: load it there, and torch.save it again with a newer one"
    if start.startswith(b"PK\x03\x04"):
        return "is cut short or damaged: its zip directory cannot be read; fetch it again"
    return "is not a file that torch.save wrote: it is no zip archive"
