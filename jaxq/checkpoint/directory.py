"""A directory that is written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxq.errors import JaxqError

MANIFEST = "jaxq.json"


def check_destination(path: str | os.PathLike[str], overwrite: bool = False, needed: int = 0) -> Path:
    """Return the resolved path when something can be saved there; call it before long work.

    Args:
      path: the directory to write.
      overwrite: allow an existing jaxq directory (or an empty one) to be replaced.
      needed: bytes that will be written, 0 if unknown.

    Raises:
      JaxqError: the path exists and may not be replaced, its parent cannot be written, or the disk is full.
    """
    target = Path(path).expanduser().resolve()
    if os.path.lexists(target):
        if not overwrite:
            raise JaxqError(f"{path} exists: choose another name, or allow it to be replaced (--overwrite)")
        if not target.is_dir():
            raise JaxqError(f"{path} is a file: choose another name")
        if not (target / MANIFEST).exists() and any(target.iterdir()):
            # Replacing deletes the old directory: never one that jaxq did not write.
            raise JaxqError(f"{path} holds no {MANIFEST}, so jaxq will not replace it: choose another name")
    parent = next(place for place in target.parents if place.exists())
    if not parent.is_dir():
        raise JaxqError(f"cannot write {path}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise JaxqError(f"cannot write {path}: no permission to write in {parent}")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise JaxqError(f"cannot write {path}: it needs {needed:,} bytes and {free:,} are free")
    return target


@contextmanager
def whole(path: str | os.PathLike[str], overwrite: bool, needed: int) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `path` when the block ends without an error.

    On any error, an interrupt included, the temporary directory is removed and whatever was at `path` is as
    before. Failures of the file system become JaxqError.
    """
    target = check_destination(path, overwrite)
    mark = secrets.token_hex(4)
    partial = target.with_name(f".{target.name}.{mark}.partial")
    old = target.with_name(f".{target.name}.{mark}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _flush(partial)
        _swap(partial, target, old)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise failure(path, error, needed) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def failure(path: str | os.PathLike[str], error: BaseException, needed: int) -> JaxqError:
    """Return the one-line error for a write that failed, with the bytes needed and the bytes free."""
    target = Path(path).expanduser().resolve()
    parent = next(place for place in target.parents if place.exists())
    # TensorStore buries what the system said in a long message of its own kind.
    known = (os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS))
    reason = next((text for text in known if text in str(error)), " ".join(str(error).split())[:200])
    free = shutil.disk_usage(parent).free
    return JaxqError(f"cannot write {path}: {reason} ({needed:,} bytes needed, {free:,} free); nothing was kept")


def _swap(partial: Path, target: Path, old: Path) -> None:
    replaced = os.path.lexists(target)
    if replaced:
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        if replaced:
            os.rename(old, target)
        raise
    _sync(target.parent)


def _flush(directory: Path) -> None:
    """Ask the file system to keep every file below `directory` before the rename makes it visible."""
    for place, _, files in os.walk(directory):
        for name in files:
            _sync(Path(place) / name)
        _sync(Path(place))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
