"""From a function call to a jaxpr and leaves with paths, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxq import jaxprs
from jaxq.errors import JaxqError
from jaxq.formats.base import is_quantized


def is_array(x: Any) -> bool:
    """Whether the leaf is data: anything with a shape and a dtype. Python scalars are settings."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def path_of(keys: Sequence[Any]) -> str:
    """The path of a leaf as users write it: `layers/0/mlp/up/kernel`."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def flatten(params: Any) -> dict[str, Any]:
    """{path: leaf} of a parameter pytree; a quantized array is one leaf."""
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]
    return {path_of(keys): leaf for keys, leaf in flat}


def replace(params: Any, new: dict[str, Any]) -> Any:
    """The pytree with the leaves at these paths replaced."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: new.get(path_of(keys), leaf), params, is_leaf=is_quantized
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """A traced call. values, paths: its data leaves in order, with paths (those of the first argument bare)."""

    jaxpr: Any
    consts: Sequence[Any]
    values: list[Any]
    paths: list[str]
    parameters: int
    out_tree: Any

    def finish(self, flat: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.out_tree, flat)


def _dense_abstract(x: Any) -> Any:
    if not is_quantized(x):
        # Weights that lie on disk are traced by their shape alone.
        return x if isinstance(x, (jax.Array, np.ndarray)) else jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jaxprs.abstract_like(x.shape, x.dtype, [a for a in jax.tree.leaves(x) if isinstance(a, jax.Array)])


def trace(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Call:
    """Traces `fn(*args, **kwargs)` with dense abstract values in place of quantized leaves.

    The leaves of the first argument are the parameters. Python scalars, strings and None are settings of the
    function, fixed at tracing, as they are when it is called directly.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path((args, kwargs or {}), is_leaf=is_quantized)
    data = [i for i, (_, leaf) in enumerate(flat) if is_array(leaf)]

    def on_data(*values: Any) -> Any:
        leaves = [leaf for _, leaf in flat]
        for i, value in zip(data, values, strict=True):
            leaves[i] = value
        args, kwargs = jax.tree.unflatten(tree, leaves)
        return fn(*args, **kwargs)

    values = [flat[i][1] for i in data]
    closed, shape = jax.make_jaxpr(on_data, return_shape=True)(*map(_dense_abstract, values))
    jaxpr, consts = jaxprs.opened(closed)
    keys = [flat[i][0] for i in data]
    is_param = [k[0].idx == 0 and k[1] == jax.tree_util.SequenceKey(0) for k in keys]
    paths = [path_of(k[2:]) if p else path_of(k[1:]) for k, p in zip(keys, is_param, strict=True)]
    return Call(jaxpr, consts, values, paths, sum(is_param), jax.tree.structure(shape))


def check_paths(patterns_matched: dict[str, bool], known: Sequence[str]) -> None:
    """JaxqError for a pattern that matches no path."""
    for pattern, matched in patterns_matched.items():
        if not matched:
            shown = ", ".join(list(known)[:6]) + (", ..." if len(known) > 6 else "")
            raise JaxqError(f"pattern {pattern!r} matches no site; paths are like {shown}")
