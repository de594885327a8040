"""The commands that look: sites, eval, generate, inspect, recipes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from jaxq.cli import console, sources
from jaxq.cli.products import Native, prepared
from jaxq.errors import JaxqError
from jaxq.report.records import Report, number, size

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelOrOut = Annotated[
    str, typer.Argument(metavar="MODEL_OR_OUT", help="Directory, .gguf file, demo model, or quantized OUT.")
]
METRICS = ("perplexity", "top1")


def sites(
    model: ModelOrOut,
    every: Annotated[bool, typer.Option("--all", help="One line a site instead of one a role.")] = False,
    as_json: Json = False,
) -> None:
    """List where the parameters of MODEL meet data: what can be quantized, and what cannot and why."""
    import numpy as np

    import jaxq
    from jaxq.report import SiteReport

    opened = sources.open_model(model, lazy=True)
    with console.doing("tracing"):
        found = jaxq.sites(opened.model.apply, opened.model.params, opened.example())
    if as_json:
        rows = [
            {"path": site.path, "kind": site.kind, "shape": list(site.shape),
             "dtype": str(np.dtype(site.dtype)), "in_axes": list(site.in_axes),
             "out_axes": list(site.out_axes), "batch_axes": list(site.batch_axes), "note": site.note}
            for site in found
        ]  # fmt: skip
        console.print_json(rows)
        return
    groups: dict[tuple[str, ...], int] = {}
    for site in found:
        roles = (SiteReport(part).role for part in site.path.split(" @ "))
        name = site.path if every else " @ ".join(roles)
        line = (name, str(site.kind), " x ".join(map(str, site.shape)), str(np.dtype(site.dtype)), site.note)
        groups[line] = groups.get(line, 0) + 1
    columns = [("site", "left"), ("kind", "left"), ("shape", "right"), ("dtype", "left"), ("note", "left")]
    columns += [("count", "right")]
    lines = [[*line, str(count)] for line, count in groups.items()]
    console.out().print(console.table(f"{model}: {len(found)} sites", columns, lines))


def evaluate(
    model: ModelOrOut,
    metric: Annotated[str, typer.Option(help=f"One of: {', '.join(METRICS)}.")] = "perplexity",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.txt|NAME",
            help="Text: a file, or the held-out tenth of austen, essays, handbook. Images: fashion-mnist.",
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows scored, from the start of the text; 40 when left out.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens in a window; 512 when left out.")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images scored, from the start; all when left out.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows or images at a time.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of float weights: float32 or bfloat16.")] = None,
    integer: Annotated[
        bool, typer.Option("--integer", help="Multiply codes, where both operands are rounded.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure MODEL_OR_OUT: perplexity on text, or the percentage of test images told right (top1).

    Text is cut into windows without overlap; every token but the first of each is scored.
    """
    if metric not in METRICS:
        raise JaxqError(f"unknown metric {metric!r}; use {', '.join(METRICS)}")
    if metric == "top1":
        if windows is not None or seq_len is not None:
            raise JaxqError("--windows and --seq-len go with --metric perplexity; top1 takes --images")
        found, line = _top1(model, data, images, batch, dtype, integer)
    elif images is not None:
        raise JaxqError("--images goes with --metric top1; perplexity is measured on text")
    else:
        found, line = _perplexity(model, data, windows or 40, seq_len or 512, batch, dtype, integer)
    if as_json:
        console.print_json(found)
    else:
        console.out().print(line, markup=False)


def _perplexity(
    model: str,
    data: str | None,
    windows: int,
    seq_len: int,
    batch: int | None,
    dtype: str | None,
    integer: bool,
) -> tuple[dict[str, Any], str]:
    """What eval prints, as JSON and as a line."""
    if data is None:
        raise JaxqError("there is no text: add --data FILE.txt, or --data essays")
    from jaxq import evaluate as measures

    text = sources.read_text(data, held_out=True)
    opened = sources.open_model(model, dtype=dtype)
    if opened.takes_images:
        raise JaxqError(f"{model} is an image model, perplexity is for language: use --metric top1")
    tokens = measures.windows(text, opened.tokenizer, seq_len, windows)
    if len(tokens) < windows:
        console.remark(f"{data} gives {len(tokens)} windows of {seq_len} tokens, not {windows}")
    aside = _in_float(opened, integer)
    with _measuring("perplexity", "window") as show:
        found = measures.perplexity(
            opened.model.apply, opened.model.params, tokens, batch=batch, integer=integer, progress=show
        )
    scored = f"{found['tokens']:,} tokens, {len(tokens)} windows of {data}"
    result = {**found, "windows": len(tokens), "seq_len": seq_len, **_of(opened, data, model), **aside}
    return result, f"perplexity {found['perplexity']:.4f} ({scored})"


def _top1(
    model: str, data: str | None, images: int | None, batch: int | None, dtype: str | None, integer: bool
) -> tuple[dict[str, Any], str]:
    """What eval prints, as JSON and as a line."""
    import functools

    import jax

    from jaxq import evaluate as measures
    from jaxq.models.images import prepare

    if data is None:
        raise JaxqError("there are no images: add --data fashion-mnist")
    test = sources.read_images(data, "test")[:images]
    opened = sources.open_model(model, dtype=dtype)
    if not opened.takes_images:
        raise JaxqError(f"{model} is a language model, top1 is for images: use --metric perplexity")
    config = opened.model.config
    if config.classes != len(test.names):
        raise JaxqError(f"{model} knows {config.classes} classes, {data} has {len(test.names)}")
    if images is not None and len(test) < images:
        console.remark(f"{data} gives {len(test)} images, not {images}")
    aside = _in_float(opened, integer)
    # Else a GPU would round the factors of every product to ten bits.
    with _measuring("top1", "image") as show, jax.default_matmul_precision("highest"):
        found = measures.top1(
            opened.model.apply, opened.model.params, test.images, test.labels,
            batch=batch, prepare=functools.partial(prepare, config=config), integer=integer, progress=show,
        )  # fmt: skip
    result = {**found, **_of(opened, data, model), **aside}
    return result, f"top-1 {found['top1']:.2f} % ({found['images']:,} images of {data})"


def _of(opened: sources.Opened, data: str, model: str) -> dict[str, Any]:
    """What was measured, and on what."""
    bits = {} if opened.report is None else {"bits_per_weight": opened.report.bits_per_weight}
    return {"data": data, "model": model, **bits}


def _in_float(opened: sources.Opened, integer: bool) -> dict[str, Any]:
    """What of an integer execution runs in float all the same, for JSON, and as remarks."""
    if not integer:
        return {}
    import jax

    import jaxq

    if opened.report is None:
        raise JaxqError("--integer is for a quantized OUT; this is a float model")
    why: dict[str, str] = {}
    run = jaxq.quantized(opened.model.apply, why.__setitem__, integer=True)
    with console.doing("tracing"):
        jax.eval_shape(run, opened.model.params, opened.example())
    for reason, count in Counter(why.values()).items():
        path = next(p for p, r in why.items() if r == reason)
        console.remark(f"in float: {path}{f' and {count - 1} more' if count > 1 else ''} {reason}")
    return {"integer": True, "in_float": why}


@contextmanager
def _measuring(metric: str, unit: str) -> Iterator[Callable[[int, int, float], None]]:
    """Yields a function that shows how far a measurement is: (done, of how many, value so far)."""
    start = time.perf_counter()
    with console.meter(metric) as meter:

        def show(done: int, count: int, value: float) -> None:
            spent = time.perf_counter() - start
            meter.update(done / count, f"{unit} {done}/{count}, {number(value)}", spent * (count / done - 1))

        meter.update(0.0, "compiling")
        yield show


def generate(
    model: ModelOrOut,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens, at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among this many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among this share of the probability.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of float weights: float32 or bfloat16.")] = None,
    native: Native = True,
    as_json: Json = False,
) -> None:
    """Continue a prompt."""
    import jaxq
    from jaxq import models

    if not prompt.strip():
        raise JaxqError("the prompt is empty: give --prompt some text")
    opened = sources.open_model(model, dtype=dtype)
    tokenizer = opened.tokenizer
    ids = _prompt_ids(tokenizer, prompt, chat)
    params, products = prepared(opened.model.params, native)
    # One of the two forms of the weights is enough to hold.
    language, opened = opened.model.replace(params=None), None
    start = time.perf_counter()
    with console.doing("generating"):
        generation = models.generate(
            language, params, [ids], max_new_tokens=max_tokens, temperature=temperature,
            top_k=top_k, top_p=top_p, seed=seed, transform=jaxq.quantized,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    new = generation.rows()[0]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if as_json:
        console.print_json({"prompt": prompt, "text": text, "tokens": new, "seconds": seconds, **products})
        return
    screen = console.out()
    if not chat:
        screen.print(prompt, style="dim", markup=False, end="", soft_wrap=True)
    screen.print(text, markup=False, soft_wrap=True)


def inspect(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory that jaxq quantize wrote.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every array and compare its checksum.")] = False,
    as_json: Json = False,
) -> None:
    """Show what OUT holds, from its manifest."""
    from jaxq import checkpoint
    from jaxq.checkpoint.activations import read_activations
    from jaxq.checkpoint.manifest import read_entries

    manifest = checkpoint.read_manifest(out)
    entries, rounded = read_entries(manifest), read_activations(manifest) or []
    if verify:
        with console.doing(f"reading {out}"):
            checkpoint.load(out)
    report = Report.from_dict(manifest.get("report") or {})
    stored, numbers = (sum(entry.nbytes for entry in part) for part in (entries, rounded))
    if as_json:
        params = [
            {"path": entry.path, "shape": list(entry.shape), "dtype": entry.dtype, "format": entry.format,
             "bytes": entry.nbytes, "bits_per_weight": entry.bits_per_weight}
            for entry in entries
        ]  # fmt: skip
        activations = [
            {"path": entry.path, "grid": entry.quantizer, "bits": entry.bits, "bytes": entry.nbytes}
            for entry in rounded
        ]
        known = {name: manifest.get(name) for name in ("schema", "jaxq", "source", "baseline", "recipe")}
        totals = {"bits_per_weight": report.bits_per_weight, "bytes": stored + numbers, "verified": verify}
        console.print_json({"path": out, **known, **totals, "params": params, "activations": activations})
        return
    screen = console.out()
    report.table(screen)
    source = ", ".join(f"{key} {value}" for key, value in (manifest.get("source") or {}).items())
    origin = f"schema {manifest['schema']}, written by jaxq {manifest.get('jaxq', '?')}"
    grids = Counter(entry.grid for entry in rounded)
    listed = ", ".join(f"{count} to {grid}" for grid, count in grids.items())
    for line in (
        f"{len(entries)} parameters in {size(stored)}, {origin}",
        f"{len(rounded)} named activations rounded: {listed}; their grids take {size(numbers)}" if rounded else "",
        f"source: {source or 'unknown'}",
        "every array matches its checksum" if verify else "",
    ):
        if line:
            screen.print(line, markup=False)


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe as TOML.")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a code.")] = None,
    group_size: Annotated[str | None, typer.Option(help="A number, channel (or 0), tensor.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of weights kept exactly.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another setting.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the named recipes, or print one as TOML to edit."""
    from jaxq import recipes as known

    if name is None:
        names = [{"name": key, "description": line} for key, line in known.names()]
        if as_json:
            console.print_json(names)
        else:
            rows = [[item["name"], item["description"]] for item in names]
            console.out().print(console.table("recipes", [("name", "left"), ("what it does", "left")], rows))
        return
    recipe = sources.read_recipe(name, sources.settings_of(bits, group_size, setting or [], sparsity))
    if as_json:
        console.print_json(recipe.to_dict())
    else:
        typer.echo(recipe.to_toml().rstrip())


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return [int(token) for token in tokenizer(prompt)["input_ids"]]
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    except ValueError as error:
        raise JaxqError("the model's tokenizer has no chat template: leave out --chat") from error
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
