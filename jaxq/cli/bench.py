"""`jaxq bench`: how fast products with quantized weights are on this machine."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from jaxq.cli import console
from jaxq.cli.commands import Json
from jaxq.errors import JaxqError


def bench(
    what: Annotated[str, typer.Argument(metavar="kernels", help="What to measure.")] = "kernels",
    shapes: Annotated[str, typer.Option(help="Inputs x outputs: 4096x4096,4096x11008.")] = "4096x4096",
    batch: Annotated[str, typer.Option(help="Rows of the other operand, as 1,8.")] = "1,8",
    activations: Annotated[
        str, typer.Option(help="What integer kernels may round activations to: float32, int16, int8; several.")
    ] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Calls, of which the fastest counts.")] = 15,
    as_json: Json = False,
) -> None:
    """Measure the products of every format here, against XLA's dense float32 product and a copy of memory.

    Weights are random. "native" is what weights that `jaxq.prepare` laid out run, "xla" what all others do.
    """
    if what != "kernels":
        raise JaxqError(f"there is no benchmark {what!r}; use kernels")
    sizes = [_shape(text) for text in shapes.split(",")]
    batches = [_number(text) for text in batch.split(",")]

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


def _number(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise JaxqError(f"{text!r} is not a positive number")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2:
        raise JaxqError(f"{text!r} is not a shape; write inputs and outputs as 4096x11008")
    return _number(parts[0]), _number(parts[1])
