"""`jaxq quantize`: a float model in, a directory out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxq.cli import console, sources
from jaxq.errors import JaxqError
from jaxq.report.records import Report, number, size

if TYPE_CHECKING:
    from jaxq.planning import Plan
    from jaxq.quantize import Event
    from jaxq.recipe import Recipe

SHAPE_TOKENS = 16
"""Length of the example where a recipe needs shapes only."""

WINDOWS, IMAGES = 32, 1024
"""Calibration examples when nothing is said: of recipes that solve, and of those that train block by block."""


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, .gguf file or demo model.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory to write.")],
    recipe: Annotated[
        str, typer.Option(help="Name ([bold]jaxq recipes[/bold] lists them) or FILE.toml.")
    ] = "gptq",
    bits: Annotated[int | None, typer.Option(help="Bits of a code; the recipe's own when left out.")] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            help="Weights that share a scale: a number, [bold]channel[/bold] (or 0), [bold]tensor[/bold]."
        ),
    ] = None,
    weights: Annotated[
        int | None, typer.Option(help="Bits of the weights, for recipes that round activations too.")
    ] = None,
    activations: Annotated[int | None, typer.Option(help="Bits of the activations, for those recipes.")] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Fraction of weights kept exactly, beside codebooks; the paper's is 0.0045."),
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another setting of the recipe.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.txt|NAME",
            help="Text to calibrate on: a file, or austen, essays, handbook. For an image model: fashion-mnist, "
            "which vit-fashion takes by itself.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Windows of calibration text, or images; 32, or 1024 for recipes that train."),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    batch: Annotated[
        int,
        typer.Option(min=1, help="Windows or images at a time, at most; recipes that train say so themselves."),
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Which windows or images are drawn.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Of the float weights: float32 or bfloat16; float32 when left out.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done; read no weight, write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if jaxq wrote it.")] = False,
    report: Annotated[bool, typer.Option(help="Write OUT/report.html and OUT/report.json.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Quantize MODEL and write it to OUT.

    OUT is written whole or not at all; an OUT that exists survives every failure.
    """
    from jaxq import checkpoint

    if not dry_run:
        checkpoint.check_destination(out, overwrite)
    both = {"weights": weights, "activations": activations}
    settings = sources.settings_of(bits, group_size, setting or [], sparsity)
    chosen = sources.read_recipe(recipe, settings | {k: v for k, v in both.items() if v is not None})
    opened = sources.open_model(model, lazy=True, dtype=dtype)
    if opened.report is not None:
        raise JaxqError(f"{model} is quantized already: give the float model that it was made from")
    if calibration is None and opened.model.source.get("name") in sources.TRAINED_ON:
        calibration = sources.TRAINED_ON[opened.model.source["name"]]
    if chosen.needs_data and calibration is None:
        data = "images: add --calibration fashion-mnist"
        text = "text: add --calibration FILE.txt, or --calibration essays"
        raise JaxqError(f"recipe {chosen.name} needs {data if opened.takes_images else text}")
    if samples is None:
        samples = IMAGES if chosen.steps else WINDOWS
    most = min(batch, _backward_rows(opened, seq_len)) if chosen.needs_gradients else batch
    rows = _batch_size(samples, most) if chosen.needs_data else 1
    example = opened.example(rows, seq_len if chosen.needs_data else SHAPE_TOKENS)
    if dry_run:
        _print_plan(_plan(opened.model, chosen, example, samples // rows), chosen, as_json)
        return
    data = _data(opened, calibration, samples, seq_len, seed, rows) if chosen.needs_data else None
    plan = _plan(opened.model, chosen, example, samples // rows)
    checkpoint.check_destination(out, overwrite, plan.bytes_after)
    result = _run(opened, chosen, data, example, seed)
    pages = {
        "report.html": result.report.html(f"{opened.model.source.get('name', model)}, {chosen.name}"),
        "report.json": json.dumps(result.report.to_dict(), indent=1) + "\n",
    }
    with console.doing(f"writing {out}"):
        checkpoint.save(
            out,
            result,
            config=_student(opened, chosen).config,
            tokenizer=None if opened.takes_images else opened.model.tokenizer,
            source=opened.model.source,
            overwrite=overwrite,
            files=pages if report else {},
        )
    if as_json:
        console.print_json(_summary(result.report, out))
    else:
        result.report.table(console.out())
        console.out().print(f"written to {out}", markup=False)


def _backward_rows(opened: sources.Opened, seq_len: int) -> int:
    """Examples whose float32 logits, and gradients of them, stay within half a gigabyte."""
    config = opened.model.config
    if not opened.takes_images:
        return max(1, (1 << 28) // (4 * config.vocab_size * seq_len))
    if not config.classes:
        raise JaxqError("this model has no classes, so there is no loss to take gradients of: use another recipe")
    return max(1, (1 << 28) // (4 * config.classes))


def _batch_size(samples: int, most: int) -> int:
    """The largest batch, at most `most`, that divides the samples: all batches have one shape."""
    return max(rows for rows in range(1, min(samples, most) + 1) if samples % rows == 0)


def _data(
    opened: sources.Opened, calibration: str | None, samples: int, seq_len: int, seed: int, rows: int
) -> tuple[list[Any], list[Any] | None]:
    """Calibration batches, and the labels of images."""
    from jaxq import data, image_data

    parts = [slice(start, start + rows) for start in range(0, samples, rows)]
    if opened.takes_images:
        drawn = image_data.calibration(sources.read_images(calibration or "", "train"), samples, seed)
        return image_data.batches(drawn, opened.model.config, rows), [drawn.labels[part] for part in parts]
    text = sources.read_text(calibration or "", held_out=False)
    with console.doing("encoding the calibration text"):
        windows = data.calibration(text, opened.tokenizer, samples, seq_len, seed)
    return [windows[part] for part in parts], None


def _plan(model: Any, recipe: Recipe, example: Any, batches: int) -> Plan:
    import jaxq

    with console.doing("planning"):
        return jaxq.plan(model.apply, model.params, example, recipe, batches=batches)


def _run(
    opened: sources.Opened,
    recipe: Recipe,
    data: tuple[list[Any], list[Any] | None] | None,
    example: Any,
    seed: int,
) -> Any:
    import numpy as np

    import jaxq

    with console.meter(recipe.name) as meter:

        def show(event: Event) -> None:
            whole = event.seconds + event.eta
            known = "" if event.error != event.error else f", error {number(event.error)}"
            place = f"stage {event.stage}/{event.stages}, " if event.stages else ""
            # Nothing is known of the time left until something is done.
            share = 0.0 if whole != whole else event.seconds / whole if whole > 0 else 1.0
            meter.update(share, f"{place}{event.path}{known}", event.eta)

        meter.update(0.0, "starting")
        batches, labels = data or ([np.zeros(example.shape, example.dtype)], None)
        losses, model, student = jaxq.losses, opened.model, _student(opened, recipe)
        return jaxq.quantize(
            model.apply,
            model.params,
            batches,
            recipe,
            loss=losses.classification if opened.takes_images else losses.next_token,
            targets=labels if recipe.needs_gradients else None,
            student=None if student is model else student.apply,
            seed=seed,
            progress=show,
        )


def _student(opened: sources.Opened, recipe: Recipe) -> Any:
    """The model that is quantized: with ReLU in its MLPs if the recipe fits them to that."""
    from jaxq.steps import ReluMLP

    model = opened.model
    if not any(isinstance(step, ReluMLP) for step in recipe.steps) or model.config.activation == "relu":
        return model
    if not opened.takes_images:
        raise JaxqError(f"recipe {recipe.name} rebuilds the MLPs of image models only: use --set relu=false")
    from jaxq.models import vision

    return vision.build(model.config.replace(activation="relu"), model.params, model.source)


def _summary(report: Report, out: str) -> dict[str, Any]:
    return {
        "out": out,
        "recipe": report.recipe,
        "bits_per_weight": report.bits_per_weight,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "error": report.error,
        "seconds": report.seconds,
        "sites": [row.to_dict() for row in report.rows],
    }


def _print_plan(plan: Plan, recipe: Recipe, as_json: bool) -> None:
    if as_json:
        rows = [
            {"path": row.path, "kind": row.kind, "shape": list(row.shape), "format": row.format or "dense",
             "bytes_before": row.bytes_before, "bytes_after": row.bytes_after}
            for row in plan.rows
        ]  # fmt: skip
        totals = {name: getattr(plan, name) for name in ("bytes_before", "bytes_after", "peak_bytes")}
        console.print_json({"recipe": recipe.to_dict(), **totals, "sites": rows})
        return
    columns = [("site", "left"), ("kind", "left"), ("shape", "right"), ("format", "left")]
    columns += [("before", "right"), ("after", "right")]
    lines = [
        [row.path, row.kind, " x ".join(map(str, row.shape)), row.format or "dense",
         size(row.bytes_before), size(row.bytes_after)]
        for row in plan.rows
    ]  # fmt: skip
    screen = console.out()
    screen.print(console.table(f"{recipe.name}, a dry run", columns, lines))
    screen.print(
        f"all parameters: {size(plan.bytes_before)} -> {size(plan.bytes_after)}; "
        f"peak memory about {size(plan.peak_bytes)}; nothing was read or written"
    )
