"""Small functions of many kinds, and how to quantize them: the models on which every verb is tested."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxq
from jaxq import tracing


class Case(NamedTuple):
    """A pure function, its parameters and arguments; how many leaves can be quantized, and run so."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    leaves: int


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="down")(nn.gelu(nn.Dense(48, name="up")(x)))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(h, h)
        return x + MLP(name="mlp")(nn.LayerNorm()(x))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Attention(name="block")(x), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]


class Language(nn.Module):
    """Embedding, named blocks, tied head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(40, 16, name="embed")
        x = embed(tokens)
        for i in range(2):
            x = Attention(name=f"block_{i}")(checkpoint_name(x, "block"))
        return embed.attend(checkpoint_name(x, "block"))


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="stem")(x))
        x = nn.relu(nn.Conv(8, (1, 1), name="point")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class NNXModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 48, rngs=rngs)
        self.down = nnx.Linear(48, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.up(x)))


def _key(i: int = 0) -> jax.Array:
    return jax.random.key(i)


def _normal(i: int, *shape: int) -> jax.Array:
    return jax.random.normal(_key(i), shape) / 4


def _linen(module: nn.Module, x: Any, leaves: int) -> Case:
    return Case(module.apply, module.init(_key(), x), (x,), leaves)


@functools.cache
def dense() -> Case:
    return _linen(MLP(), _normal(1, 2, 7, 16), 2)


@functools.cache
def attention() -> Case:
    return _linen(Attention(), _normal(1, 2, 7, 16), 6)


@functools.cache
def scanned() -> Case:
    return _linen(Scanned(), _normal(1, 2, 7, 16), 6)


@functools.cache
def language() -> Case:
    return _linen(Language(), jnp.arange(14).reshape(2, 7) % 40, 13)


@functools.cache
def conv() -> Case:
    return _linen(Conv(), _normal(1, 2, 9, 9, 3), 3)


@functools.cache
def nnx_model() -> Case:
    graph, state = nnx.split(NNXModel(nnx.Rngs(0)))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)(x)

    return Case(apply, nnx.to_pure_dict(state), (_normal(1, 2, 7, 16),), 2)


@functools.cache
def equinox_model() -> Case:
    import equinox as eqx

    model = eqx.nn.MLP(16, 8, 24, 2, key=_key())
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(x)

    return Case(apply, params, (_normal(1, 6, 16),), 3)


@functools.cache
def bare() -> Case:
    """Transposed, reshaped, cast and einsummed weights; a data-dependent branch and a loop."""
    params = {
        "t": _normal(2, 24, 16),
        "heads": _normal(3, 24, 4, 6),
        "out": _normal(4, 4, 6, 16),
        "loop": _normal(5, 16, 16),
        "scale": jnp.ones((16,)),
    }

    def fn(p: Any, x: jax.Array) -> jax.Array:
        x = x @ p["t"].T
        h = jnp.einsum("btd,dhk->bhtk", x, p["heads"].astype(x.dtype))
        x = jnp.einsum("bhtk,hkd->btd", h, p["out"])
        x = lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ p["loop"]) * p["scale"], x)
        return lax.cond(x.sum() > 0, lambda x: x @ p["loop"], lambda x: 2 * (x @ p["loop"]), x)

    return Case(fn, params, (_normal(1, 2, 5, 16),), 4)


@functools.cache
def experts() -> Case:
    """A mixture of experts: a router, batched experts on all tokens, grouped experts on sorted tokens."""
    params = {
        "router": _normal(2, 16, 4),
        "up": _normal(3, 4, 16, 24),
        "down": _normal(4, 4, 24, 16),
        "grouped": _normal(5, 4, 16, 16),
    }

    def fn(p: Any, x: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(x @ p["router"])
        h = jax.nn.silu(jnp.einsum("td,edf->etf", x, p["up"]))
        y = jnp.einsum("etd,te->td", jnp.einsum("etf,efd->etd", h, p["down"]), gates)
        choice = jnp.argmax(gates, axis=-1)
        order = jnp.argsort(choice)
        sizes = jnp.bincount(choice, length=4).astype(jnp.int32)
        z = lax.ragged_dot(x[order], p["grouped"], sizes)
        return y + z[jnp.argsort(order)]

    return Case(fn, params, (_normal(1, 12, 16),), 4)


@functools.cache
def custom_rules() -> Case:
    """Products behind custom_jvp, custom_vjp, remat and nested jit."""
    params = {name: _normal(i, 16, 16) for i, name in enumerate("abcd")}

    @jax.custom_vjp
    def straight(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.round(4 * (x @ w)) / 4

    straight.defvjp(lambda w, x: (straight(w, x), (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))

    @jax.custom_jvp
    def doubled(w: jax.Array, x: jax.Array) -> jax.Array:
        return x @ w

    @doubled.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (w, x), (dw, dx) = primals, tangents
        return x @ w, 2 * (dx @ w) + x @ dw

    def fn(p: Any, x: jax.Array) -> jax.Array:
        x = x + straight(p["a"], x) + doubled(p["b"], x)
        x = jax.checkpoint(lambda w, x: jnp.sin(x @ w))(p["c"], x)
        return jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w))(p["d"], x)

    return Case(fn, params, (_normal(9, 5, 16),), 4)


@functools.cache
def indexed() -> Case:
    """Stacked layers taken by a Python index and by a loop counter."""
    params = {"layers": _normal(2, 3, 16, 16), "static": _normal(3, 2, 16, 16)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        x = lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["layers"][i]), x)
        return x @ p["static"][0] + jnp.tanh(x) @ p["static"][1]

    return Case(fn, params, (_normal(1, 5, 16),), 2)


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        dense, attention, scanned, language, conv, nnx_model, equinox_model, bare, experts, custom_rules, indexed,
    )
}  # fmt: skip

_chosen: dict[tuple[int, int], tuple[Case, dict[str, jaxq.Site]]] = {}


def cast(case: Case, dtype: Any) -> Case:
    """The case with its floating parameters and arguments in another dtype."""

    def one(x: Any) -> Any:
        return x.astype(dtype) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) else x

    return case._replace(params=jax.tree.map(one, case.params), args=jax.tree.map(one, case.args))


def chosen(case: Case) -> dict[str, jaxq.Site]:
    """{path: site} of the leaves that can be quantized; traced once."""
    key = id(case.fn), id(case.params)
    if key in _chosen:
        return _chosen[key][1]
    out: dict[str, jaxq.Site] = {}
    for site in jaxq.sites(case.fn, case.params, *case.args):
        if site.in_axes and site.out_axes and site.kind != "product":
            if site.path not in out or out[site.path].kind == "embedding":
                out[site.path] = site
    # The case stays alive, and so its key stays its own.
    _chosen[key] = case, out
    return out


def quantize(case: Case, bits: int = 4, group_size: int | None = 8, scale_dtype: str = "float16") -> Any:
    """The parameters with every leaf that can be quantized rounded to nearest."""
    flat = tracing.flatten(case.params)
    small = lambda s: group_size if group_size and s.in_size >= group_size else None  # noqa: E731
    new = {
        p: jaxq.rtn(flat[p], jaxq.Uniform(bits, small(s), scale_dtype=scale_dtype), layout=s.layout)
        for p, s in chosen(case).items()
    }
    return tracing.replace(case.params, new)
