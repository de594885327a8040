"""NEON against plain C++, kernel by kernel: its logic on any processor, its instructions emulated."""

import concurrent.futures
import shutil
import subprocess
from pathlib import Path

import pytest

from jaxq.kernels.native import build

HERE = Path(__file__).parent / "neon"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
DOT = build.SETS["aarch64"]["NEONDOT"]
BASE = ("-std=c++17", f"-I{build.SOURCES}")


def check(folder: Path, command: tuple[str, ...], dot: tuple[str, ...]) -> str:
    """The path of the program that compares them; `dot` are the flags of dot products."""
    sets = {"NEON": (), "SCALAR": (), "NEONDOT": dot}

    def compiled(name: str) -> str:
        out = str(folder / f"{name}.o")
        flags = (f"-DJAXQ_ISA_{name}", *sets[name])
        subprocess.run([*command, *BASE, *flags, "-c", str(build.SOURCES / "isa.cc"), "-o", out], check=True)
        return out

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sets))
    program = str(folder / "check")
    subprocess.run([*command, *BASE, str(HERE / "check.cc"), *objects, "-o", program], check=True)
    return program


def passes(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " checks failed" in done.stdout, done.stdout + done.stderr


def test_logic_on_any_processor(tmp_path):
    try:
        command = build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    # Not optimized: most of the time would go into that.
    some = (*command, "-O0", "-w", f"-I{HERE}")
    passes(check(tmp_path, some, ("-D__ARM_FEATURE_DOTPROD",)), "dot")


@pytest.mark.aarch64
@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)), reason=f"{CROSS} and {EMULATOR} are not both here"
)
def test_instructions_emulated(tmp_path):
    program = check(tmp_path, (CROSS, *build.BASE, "-static"), DOT)
    passes(EMULATOR, program, "dot")
    # A processor that has no dot products.
    passes(EMULATOR, "-cpu", "cortex-a57", program)
