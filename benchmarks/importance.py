"""What the probe of APHQ-ViT measures on a trained vision transformer, and which estimators agree with it.

    python benchmarks/importance.py --json benchmarks/results/importance_vit_fashion.json
    python benchmarks/importance.py --images 32 --batch 16     # a first look

The paper (Wu et al. 2025, arXiv 2504.02508) shifts all elements of a block's output by the same small number and
takes the change of the gradient for the diagonal of a Hessian. First table: the diagonal itself, exactly; the row
sums of the Hessian, which that probe tends to; and what the paper's code computes, in float32 and float64. Second
table: how every estimator agrees with the diagonal and with its root, over the elements of each block's output.
Elements that do not reach the logits (after the last block, all tokens but the class token) are left out of both.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from scipy import stats

import jaxq
from jaxq import image_data, models

Maps = dict[str, np.ndarray]

CODE = "finite_difference 1e-6, mean_abs (the code)"
COARSE = "finite_difference 1e-3, mean_abs"
SIGNED = "finite_difference 1e-6, signed_mean (eq. 8)"
FISHER = "sampled_fisher, mean_abs"

#: {name in the second table: (estimator, reduction, step)}
ESTIMATES: dict[str, tuple[str, str, float]] = {
    FISHER: ("sampled_fisher", "mean_abs", 1e-6),
    "sampled_fisher, mean_sq": ("sampled_fisher", "mean_sq", 1e-6),
    "gaussian, mean_abs": ("gaussian", "mean_abs", 1e-6),
    "gaussian, mean_sq": ("gaussian", "mean_sq", 1e-6),
    CODE: ("finite_difference", "mean_abs", 1e-6),
    COARSE: ("finite_difference", "mean_abs", 1e-3),
    SIGNED: ("finite_difference", "signed_mean", 1e-6),
    "row_sum, mean_abs": ("row_sum", "mean_abs", 1e-6),
}


def correlations(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Spearman's and Pearson's, of flat arrays; nan where one is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan"), float("nan")
    return float(stats.spearmanr(a, b).statistic), float(stats.pearsonr(a, b).statistic)


def one_image(maps: Maps, exact: Maps) -> list[float]:
    """For each block, the mean over images of Spearman's correlation of an image's map with its own diagonal.

    Images whose map is zero are left out: there, rounding happened to give both logits alike.
    """
    out = []
    for path, want in exact.items():
        own = want.reshape(len(want), -1)
        live = own.max(axis=0) > 0
        pairs = zip(maps[path].reshape(own.shape)[:, live], own[:, live], strict=True)
        out.append(float(np.nanmean([correlations(a, b)[0] for a, b in pairs])))
    return out


def plain(data: Any) -> Any:
    """The same without nan, which JSON does not have."""
    if isinstance(data, dict):
        return {k: plain(v) for k, v in data.items()}
    if isinstance(data, list):
        return [plain(v) for v in data]
    return None if data != data else data


def table(title: str, rows: list[tuple[str, list[str]]], columns: list[str]) -> None:
    wide = max(len(name) for name, _ in rows)
    print(f"\n{title}\n{'':{wide}s} " + " ".join(f"{c:>9s}" for c in columns))
    for name, values in rows:
        print(f"{name:{wide}s} " + " ".join(f"{v:>9s}" for v in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-fashion", help="an image classifier, see docs/models.md")
    parser.add_argument("--images", type=int, default=256, help="training images of Fashion-MNIST")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="of the images and of the draws")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()

    start = time.perf_counter()
    jax.config.update("jax_default_matmul_precision", "highest")
    model = models.load(args.model)
    drawn = image_data.calibration(image_data.load("fashion-mnist", "train"), args.images, args.seed)
    batches = image_data.batches(drawn, model.config, args.batch)
    # The first named activation is the output of the patch embedding, the others are those of the blocks.
    named = [name.path for name in jaxq.activations(model.apply, model.params, batches[0], cut="")]
    paths = [path for path in named if path.rpartition("/")[2].partition("#")[0] == "block"][1:]

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {what}", file=sys.stderr, flush=True)

    def take(params: Any, given: list[np.ndarray], **settings: Any) -> Maps:
        key = jax.random.key(args.seed)
        found = jaxq.importance(
            model.apply, params, given, paths=paths, temperature=args.temperature, key=key, **settings
        )
        return {path: np.asarray(value, np.float64) for path, value in found.items()}

    take32 = functools.partial(take, model.params, batches)
    say("exact diagonals")
    exact = take32(estimator="exact", reduction="per_sample")
    roots = {path: value.mean(axis=0) for path, value in exact.items()}
    diagonals = {path: np.square(value).mean(axis=0) for path, value in exact.items()}
    estimates: dict[str, Maps] = {}
    single: dict[str, list[float]] = {}
    for name, (estimator, reduction, step) in ESTIMATES.items():
        say(name)
        if name not in (CODE, FISHER):
            estimates[name] = take32(estimator=estimator, reduction=reduction, step=step)
            continue
        each = take32(estimator=estimator, reduction="per_sample", step=step)
        estimates[name] = {path: value.mean(axis=0) for path, value in each.items()}
        single[estimator] = one_image(each, exact)
    estimates[f"|{SIGNED}|"] = {path: np.abs(value) for path, value in estimates[SIGNED].items()}
    with jax.enable_x64(True):
        say("float64")
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
        take64 = functools.partial(take, wide, [batch.astype(np.float64) for batch in batches])
        rows64 = take64(estimator="row_sum")
        code64 = take64(estimator="finite_difference", step=1e-6)
        diagonals64 = take64(estimator="exact", reduction="mean_sq")

    live = {path: diagonals[path] > 0 for path in paths}
    sizes: dict[str, Callable[[str], np.ndarray]] = {
        "diagonal": lambda p: diagonals[p],
        "diagonal, float64": lambda p: diagonals64[p],
        "|row sum|, float32": lambda p: estimates["row_sum, mean_abs"][p],
        "|row sum|, float64": lambda p: rows64[p],
        "code / 2d, float32, d = 1e-6": lambda p: estimates[CODE][p] / 2e-6,
        "code / 2d, float32, d = 1e-3": lambda p: estimates[COARSE][p] / 2e-3,
        "code / 2d, float64, d = 1e-6": lambda p: code64[p] / 2e-6,
    }
    means = {name: [float(of(p)[live[p]].mean()) for p in paths] for name, of in sizes.items()}
    agreement = {
        name: {
            target: [correlations(maps[p][live[p]], want[p][live[p]]) for p in paths]
            for target, want in (("root", roots), ("diagonal", diagonals))
        }
        for name, maps in estimates.items()
    }
    code = estimates[CODE]
    fisher = estimates[FISHER]
    shares = {
        name: [float(maps[p][0].sum() / maps[p].sum()) for p in paths]
        for name, maps in (("the code", code), ("root", roots), ("diagonal", diagonals))
    }

    columns = [f"block {i}" for i in range(len(paths))]
    table("Mean over the elements of a block's output",
          [(name, [f"{v:.1e}" for v in values]) for name, values in means.items()], columns)  # fmt: skip
    for target, what in (("root", "mean of the root of the diagonal"), ("diagonal", "mean diagonal")):
        for i, kind in enumerate(("Spearman", "Pearson")):
            rows = [(n, [f"{v[i]:.3f}" for v in found[target]]) for n, found in agreement.items()]
            table(f"{kind}, with the {what}", rows, columns)
    pairs = [correlations(code[p][live[p]], fisher[p][live[p]]) for p in paths]
    both = {kind: [v[i] for v in pairs] for i, kind in enumerate(("spearman", "pearson"))}
    table("The code's map with sampled_fisher, mean_abs",
          [(kind, [f"{v:.3f}" for v in values]) for kind, values in both.items()], columns)  # fmt: skip
    table("One image's map with that image's diagonal, Spearman, mean over images",
          [(name, [f"{v:.3f}" for v in values]) for name, values in single.items()], columns)  # fmt: skip
    table("Share of the class token", [(n, [f"{v:.3f}" for v in vs]) for n, vs in shares.items()], columns)

    if args.json:
        settings = {k: getattr(args, k) for k in ("model", "images", "batch", "temperature", "seed")}
        versions = {"jax": jax.__version__, "jaxq": jaxq.__version__, "python": platform.python_version()}
        out = {
            "settings": settings, "device": jax.devices()[0].device_kind, "versions": versions, "means": means,
            "agreement": {
                name: {f"{kind} with {target}": [v[i] for v in values] for target, values in found.items()
                       for i, kind in enumerate(("spearman", "pearson"))}
                for name, found in agreement.items()
            },
            "the code with sampled_fisher": both,
            "one image, spearman": single,
            "class token's share": shares,
            "seconds": time.perf_counter() - start,
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(plain(out), indent=1) + "\n")


if __name__ == "__main__":
    main()
