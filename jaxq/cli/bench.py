"""`jaxq bench`: how fast products with quantized weights are on this machine."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from jaxq.cli import console
from jaxq.cli.commands import Json
from jaxq.errors import JaxqError


def bench(
    what: Annotated[str, typer.Argument(metavar="kernels", help="What to measure.")] = "kernels",
    shapes: Annotated[str, typer.Option(help="Inputs x outputs: 4096x4096,4096x11008.")] = "4096x4096",
    batch: Annotated[str, typer.Option(help="Rows of the other operand, as 1,8.")] = "1,8",
    activations: Annotated[
        str,
        typer.Option(
            help="What to round activations to: float32, bfloat16, int16, int8; on GPUs float16; several."
        ),
    ] = "float32",
    repeats: Annotated[
        int, typer.Option(min=1, help="Calls, of which the fastest counts; on GPUs the median.")
    ] = 15,
    tune: Annotated[
        bool,
        typer.Option(help="Search the block sizes of this GPU's kernels and keep them, instead of measuring."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the products of every format here, against XLA's dense product and a copy of memory.

    Weights are random. "native" or "gpu" is what weights run that `jaxq.prepare` laid out, "xla" what all others
    run. Dense is float32 on CPUs, bfloat16 on GPUs, where times are those of the device.
    """
    if what != "kernels":
        raise JaxqError(f"there is no benchmark {what!r}; use kernels")
    sizes = [_shape(text) for text in shapes.split(",")]
    batches = [_number(text) for text in batch.split(",")]
    if tune:
        _tune(sizes, batches, as_json)
        return

    from jaxq import bench as measure

    with console.doing("measuring"):
        rows = measure.kernels(sizes, batches, activations=activations.split(","), repeats=repeats)
    if as_json:
        console.print_json({"rows": [dataclasses.asdict(row) for row in rows]})
        return
    columns = [("op", "left"), ("bits", "right"), ("k x n", "right"), ("m", "right"), ("implementation", "left")]
    columns += [("ms", "right"), ("x dense", "right"), ("of copy", "right"), ("error", "right")]
    lines = [
        [row.op, str(row.bits), f"{row.k}x{row.n}", str(row.m), row.implementation, f"{row.milliseconds:.3f}"]
        + [f"{row.speedup_vs_dense:.2f}", f"{row.share_of_copy_bandwidth:.0%}", f"{row.error:.0e}"]
        for row in rows
    ]
    console.out().print(console.table("products with quantized weights", columns, lines))


def _tune(sizes: list[tuple[int, int]], batches: list[int], as_json: bool) -> None:
    from jaxq import bench_gpu

    rows = []

    def keep(format: Any, shape: tuple[int, int], tokens: int, best: Any) -> None:
        found = {"op": format.name, "bits": format.bits, "k": shape[0], "n": shape[1], "m": tokens}
        rows.append({**found, "milliseconds": 1e3 * best.seconds, **dataclasses.asdict(best.settings)})

    with console.doing("searching block sizes"):
        path = bench_gpu.tune(sizes, batches, on_best=keep)
    if as_json:
        console.print_json({"table": str(path), "rows": rows})
        return
    names = ["op", "bits", "k", "n", "m", "rows", "words", "warps", "unroll", "split", "stages"]
    lines = [[*(str(row[name]) for name in names), f"{row['milliseconds']:.4f}"] for row in rows]
    columns = [("op", "left"), *((name, "right") for name in [*names[1:], "ms"])]
    console.out().print(console.table(f"block sizes, written to {path}", columns, lines))


def _number(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise JaxqError(f"{text!r} is not a positive number")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2:
        raise JaxqError(f"{text!r} is not a shape; write inputs and outputs as 4096x11008")
    return _number(parts[0]), _number(parts[1])
