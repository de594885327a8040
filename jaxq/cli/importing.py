"""`jaxq import`: a quantized model of another program in, a directory out."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jaxq.cli import console
from jaxq.report.records import Report


def import_model(
    quantized: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="What the SqueezeLLM packer wrote: .pt, .safetensors, or a directory."
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory to write.")],
    model: Annotated[
        str, typer.Option(metavar="DIR", help="Hugging Face directory with config.json and the tokenizer.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if jaxq wrote it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read a quantized CHECKPOINT of another program and write it to OUT; nothing in it is run.

    OUT is written whole or not at all; an OUT that exists survives every failure.

    The report compares quantized weights with float16, and other parameters with themselves.
    """
    from jaxq import checkpoint
    from jaxq.interop import squeezellm

    checkpoint.check_destination(out, overwrite)
    with console.doing(f"reading {quantized}"):
        opened, result = squeezellm.load(quantized, model)
        tokenizer = opened.tokenizer
    checkpoint.check_destination(out, overwrite, result.report.bytes_after)
    with console.doing(f"writing {out}"):
        checkpoint.save(
            out, result, config=opened.config, tokenizer=tokenizer, source=opened.source, overwrite=overwrite
        )
    if as_json:
        console.print_json(_summary(result.report, out))
    else:
        result.report.table(console.out())
        console.out().print(f"written to {out}", markup=False)


def _summary(report: Report, out: str) -> dict[str, Any]:
    return {
        "out": out,
        "recipe": report.recipe,
        "bits_per_weight": report.bits_per_weight,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "seconds": report.seconds,
        "sites": [row.to_dict() for row in report.rows],
    }
