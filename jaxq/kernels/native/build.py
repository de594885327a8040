"""Compiles the C++ products with the system's compiler, into the user's cache.

Not when the package is installed: the headers of XLA's foreign function interface come with jaxlib and must be
those of the jaxlib that will run, which a wheel built in isolation cannot know; and without a compiler the package
must install all the same.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import jax
from jaxlib import version as jaxlib_version

SOURCES = Path(__file__).parent / "src"
BASE = ("-std=c++17", "-O2", "-fPIC", "-pthread")

AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
    *("-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
)

#: Flags of the instruction sets of each processor family, beside the plain one that every family has.
SETS = {
    "x86_64": {
        "AVX2": ("-mavx2", "-mfma", "-mf16c"),
        "AVX512": AVX512,
        "AVX512BF16": (*AVX512, "-mavx512bf16"),
    },
    "aarch64": {
        "NEON": (),
        "NEONDOT": ("-march=armv8.2-a+dotprod",),
    },
}
FAMILIES = {"amd64": "x86_64", "arm64": "aarch64"}

#: Seconds that one file may take; some eighty are usual for all of them on one core.
TIMEOUT = 600


class BuildError(Exception):
    """Why there is no library, in one sentence."""


def cache() -> Path:
    """Where libraries are kept: `JAXQ_CACHE`, or `jaxq` below the user's cache home; BuildError without a home."""
    chosen = os.environ.get("JAXQ_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "jaxq"
    except RuntimeError as error:
        raise BuildError("there is no home folder to keep the library in; JAXQ_CACHE may name one") from error


def compiler() -> list[str]:
    """The command of the C++ compiler: `CXX`, or the first of the usual names; BuildError if there is none."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"the compiler {chosen[0]!r} that CXX names is not there")
        return chosen
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("there is no C++ compiler (c++, g++ or clang++; CXX may name another)")


def family() -> str:
    machine = platform.machine().lower()
    return FAMILIES.get(machine, machine)


def fingerprint(command: list[str]) -> str:
    """A name for what would be built: sources, flags, compiler, jaxlib and processor family."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    settings = (
        command,
        _version(command),
        BASE,
        SETS[family()],
        jaxlib_version.__version__,
        platform.system(),
    )
    digest.update(repr((settings, family())).encode())
    return digest.hexdigest()[:16]


def _version(command: list[str]) -> str:
    return _run([*command, "--version"]).partition("\n")[0]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, errors="replace", check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise BuildError(f"{command[0]} failed: {' '.join(lines[:1])[:300]}")
    return done.stdout


def library() -> Path:
    """The path of the compiled library, built now if the cache lacks a sound one; BuildError if it cannot be.

    Takes some eighty seconds of one core once for each version of the sources, the compiler and jaxlib, and logs
    that it does. Processes that build at the same time do not disturb each other: each builds aside and the last
    rename stands. The name holds a checksum, so that a damaged file is not loaded, which could end the process.
    """
    if platform.system() == "Windows" or family() not in SETS:
        raise BuildError(f"there are no native kernels for {platform.system()} on {platform.machine()}")
    command = compiler()
    folder, name = cache() / "native", f"products-{fingerprint(command)}"
    try:
        _check_owner(folder)
        for path in folder.glob(f"{name}-*.so"):
            if path.stem == f"{name}-{_checksum(path)}":
                return path
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        logging.getLogger(__name__).info("compiling native kernels with %s, once: about a minute", command[0])
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
            made = _compile(command, Path(scratch))
            return made.replace(folder / f"{name}-{_checksum(made)}.so")
    except OSError as error:
        raise BuildError(f"cannot use {folder} ({error}); JAXQ_CACHE may name another folder") from error


def _check_owner(folder: Path) -> None:
    """BuildError if another user could have put a library there."""
    if not folder.exists():
        return
    status = folder.stat()
    if status.st_uid not in (0, os.getuid()) or status.st_mode & stat.S_IWOTH:
        raise BuildError(f"others may write to {folder}, and what lies there would be run")


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compile(command: list[str], scratch: Path) -> Path:
    # An older compiler may not know an instruction set; the others then do without it.
    known = {name: flags for name, flags in SETS[family()].items() if _accepts(command, flags)}
    jobs = {"SCALAR": (), **known}

    def build(name: str) -> str:
        out = str(scratch / f"{name}.o")
        _run([*command, *BASE, f"-DJAXQ_ISA_{name}", *jobs[name], "-c", str(SOURCES / "isa.cc"), "-o", out])
        return out

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(build, jobs))
    entry = [*BASE, *(f"-DJAXQ_HAS_{name}" for name in jobs), "-isystem", jax.ffi.include_dir()]
    out = scratch / "products.so"
    _run([*command, *entry, "-shared", str(SOURCES / "entry.cc"), *objects, "-o", str(out)])
    return out


def _accepts(command: list[str], flags: tuple[str, ...]) -> bool:
    try:
        _run([*command, *flags, "-fsyntax-only", "-x", "c++", os.devnull])
    except BuildError:
        return False
    return True
