"""`jaxq.sites`: where a function's parameters meet data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from jaxq import tracing
from jaxq.formats.base import Layout, is_quantized
from jaxq.interpreter import Rules, Walk
from jaxq.names import split
from jaxq.tracked import Leaf, Records
from jaxq.uses import Kind, Use
from jaxq.views import View


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where a parameter leaf, or a named activation, meets data.

    path: of the parameter leaf, or name of the activation. kind: matmul, conv, embedding, grouped, product
    (of activations), or dense (a leaf with two or more axes that only runs dense). shape, dtype: of the whole
    leaf, layer and expert axes included. in_axes, out_axes, batch_axes: axes of the leaf. note: empty, or why
    the leaf runs dense here.
    """

    path: str
    kind: Kind | str
    shape: tuple[int, ...]
    dtype: Any
    in_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    batch_axes: tuple[int, ...] = ()
    note: str = ""

    @property
    def in_size(self) -> int:
        return math.prod(self.shape[a] for a in self.in_axes)

    @property
    def out_size(self) -> int:
        return math.prod(self.shape[a] for a in self.out_axes)

    @property
    def layout(self) -> Layout:
        """How the canonical matrix (batch..., in, out) maps to the leaf."""
        lead = len(self.batch_axes)
        core = self.shape[lead:]
        return Layout.of(core, [a - lead for a in self.in_axes], [a - lead for a in self.out_axes])

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(batch..., in, out)."""
        return (*(self.shape[a] for a in self.batch_axes), self.in_size, self.out_size)


def mismatch(use: Use, leaf: Leaf) -> str:
    """Why a quantized leaf cannot serve this use by its own product, or nothing."""
    value = leaf.value
    lead = len(use.batch_axes)
    core = use.view.base[lead:]
    want = Layout.of(core, [a - lead for a in use.in_axes], [a - lead for a in use.out_axes])
    if len(value.batch_shape) != lead or value.layout != want:
        return "is quantized along other axes than this site contracts"
    return ""


def use_axes(use: Use, leaf: Leaf) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(in, out, batch) axes of the whole leaf: the axes that scans and indices took lead it."""
    taken = len(leaf.levels) + len(leaf.index)
    shift = lambda axes: tuple(a + taken for a in axes)  # noqa: E731
    return shift(use.in_axes), shift(use.out_axes), (*range(taken), *shift(use.batch_axes))


def site_of(use: Use, leaf: Leaf, shapes: dict[str, jax.ShapeDtypeStruct], note: str = "") -> Site:
    inner, outer, batch = use_axes(use, leaf)
    whole = shapes[leaf.path]
    return Site(leaf.path, use.kind, tuple(whole.shape), whole.dtype, inner, outer, batch, note)


class SiteRules(Rules):
    """Collects sites while the walk runs on abstract values."""

    follow_names = True

    def __init__(self, shapes: dict[str, jax.ShapeDtypeStruct]):
        self.shapes = shapes
        self.found: dict[tuple[Any, ...], Site] = {}
        self.products: list[tuple[str, Any]] = []
        self.dense: dict[str, str] = {}

    def site(self, use: Use, leaf: Leaf, x: Any, dense: Callable[[], Any]) -> tuple[Any, Records]:
        note = (mismatch(use, leaf) if is_quantized(leaf.value) else "") or use.note
        site = site_of(use, leaf, self.shapes, note)
        self.found.setdefault(dataclasses.astuple(site), site)
        return dense(), {}

    def product(self, eqn: Any, names: tuple[str | None, str | None]) -> None:
        self.products.append((" @ ".join(n or "?" for n in names), eqn.outvars[0].aval))

    def fallback(self, leaf: Leaf, reason: str) -> None:
        self.dense.setdefault(leaf.path, reason)

    def sites(self) -> list[Site]:
        out = []
        listed = {s.path for s in self.found.values()}
        for site in self.found.values():
            reason = self.dense.get(site.path, "")
            out.append(dataclasses.replace(site, note="; ".join(n for n in (site.note, reason) if n)))
        for path, reason in self.dense.items():
            whole = self.shapes[path]
            if path not in listed and len(whole.shape) >= 2:
                out.append(Site(path, "dense", tuple(whole.shape), whole.dtype, note=reason))
        counts: dict[str, int] = {}
        for path, aval in self.products:
            counts[path] = n = counts.get(path, 0) + 1
            unique = path if n == 1 else f"{path}#{n}"
            out.append(Site(unique, "product", tuple(aval.shape), aval.dtype))
        return out


def sites(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> list[Site]:
    """Lists where the parameters of a pure function meet data, without running it.

    Args:
        fn: `fn(params, *args, **kwargs)`, pure.
        params: pytree of arrays, `jax.ShapeDtypeStruct`, weights not yet read, or quantized arrays. Quantizers of
            activations (`jaxq.Activated`) are left out.
        args: example arguments; shapes are enough.

    Returns:
        Sites in the order of the computation: one for every different use of a leaf, products of activations
        that `jax.ad_checkpoint.checkpoint_name` named, and leaves with two or more axes that reach no site
        (kind "dense"). `Site.note` says why a leaf runs dense.
    """
    call = tracing.trace(fn, (split(params)[0], *args), kwargs)
    abstract = {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in zip(call.paths, call.values, strict=True)}
    rules = SiteRules(abstract)

    def walk(*values: Any) -> None:
        leaves = [
            Leaf(v, p, View.of(v.shape)) if i < call.parameters else v
            for i, (v, p) in enumerate(zip(values, call.paths, strict=True))
        ]
        outs, _ = Walk(rules).run(call.jaxpr, call.consts, leaves)
        for o in outs:
            if isinstance(o, Leaf):
                rules.fallback(o, "is returned by the function")

    values = [v if is_quantized(v) else abstract[p] for v, p in zip(call.values, call.paths, strict=True)]
    jax.eval_shape(walk, *values)
    return rules.sites()
