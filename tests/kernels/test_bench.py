"""The benchmark of products: its rows, and the command."""

import json
from functools import partial

import pytest
from typer.testing import CliRunner

from jaxq import bench, bench_gpu
from jaxq.cli.app import app
from jaxq.errors import JaxqError
from jaxq.formats import BitPlane, Codebook, Uniform
from jaxq.kernels import native


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    monkeypatch.setattr(bench, "ROTATED", 2**20)


def test_rows():
    rows = bench.kernels(
        [(256, 96)], [2], [Uniform(4, 64), Codebook(3)], activations=["float32", "int8"], repeats=2
    )
    found = {(row.op, row.m, row.implementation): row for row in rows}
    names = {name for _, _, name in found}
    assert "xla" in names and all(row.n == 96 and row.k == 256 for row in rows)
    if native.available():
        assert names == {"xla", f"native {native.instruction_set()}", f"native {native.instruction_set()} int8"}
        assert len(rows) == 3 + 2
    for row in rows:
        assert row.milliseconds > 0 and row.speedup_vs_dense > 0 and row.share_of_copy_bandwidth > 0
        assert row.error < (2e-2 if "int8" in row.implementation else 1e-6)
    with pytest.raises(JaxqError, match="positive numbers"):
        bench.kernels([(0, 4)])


def test_rows_of_a_gpu():
    """By the clock of the wall and the reference where there is none."""
    rows = bench_gpu.measure(BitPlane(2, 64), 256, 96, [1, 3], ["float16"], 2)
    assert [(row.implementation, row.m) for row in rows] == [
        ("xla", 1),
        ("gpu float16", 1),
        ("xla", 3),
        ("gpu float16", 3),
    ]
    for row in rows:
        assert row.n == 96 and row.k == 256 and row.error < 1e-3
        assert row.milliseconds > 0 and row.speedup_vs_dense > 0 and row.share_of_copy_bandwidth > 0
    with pytest.raises(JaxqError, match="use float32, float16"):
        bench_gpu.measure(BitPlane(2, 64), 256, 96, [1], ["int8"], 2)


def test_command(monkeypatch):
    # One format: each compiles several programs.
    few = [BitPlane(2, 64)]
    monkeypatch.setattr(bench, "kernels", partial(bench.kernels, formats=few))
    result = CliRunner().invoke(
        app, ["bench", "kernels", "--shapes", "128x64", "--batch", "1", "--repeats", "1", "--json"]
    )
    rows = json.loads(result.stdout)["rows"]
    assert {
        "op",
        "bits",
        "n",
        "k",
        "m",
        "implementation",
        "speedup_vs_dense",
        "share_of_copy_bandwidth",
        "error",
    } <= {*rows[0]}
    assert {row["op"] for row in rows} == {"bitplane"}
    for arguments in (["--shapes", "64"], ["--batch", "0"], ["memory"]):
        assert CliRunner().invoke(app, ["bench", *arguments]).exit_code != 0
