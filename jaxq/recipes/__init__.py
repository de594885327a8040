"""The named recipes: every published method that jaxq covers is one of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from jaxq.errors import JaxqError
from jaxq.recipe import Recipe
from jaxq.recipes.codebook import guided, kmeans, lnq, squeezellm
from jaxq.recipes.uniform import gptq, rtn
from jaxq.recipes.vision import aphq_vit, brecq, ias_vit, jaxq_vit, percentile, qdrop, repq_vit

NAMED: dict[str, Callable[..., Recipe]] = {
    "rtn": rtn,
    "gptq": gptq,
    "kmeans": kmeans,
    "squeezellm": squeezellm,
    "lnq": lnq,
    "guided": guided,
    "percentile": percentile,
    "repq-vit": repq_vit,
    "brecq": brecq,
    "qdrop": qdrop,
    "aphq-vit": aphq_vit,
    "ias-vit": ias_vit,
    "jaxq-vit": jaxq_vit,
}


def names() -> list[tuple[str, str]]:
    """(name, what it is in one line) of every named recipe."""
    return [(name, (inspect.getdoc(make) or "").splitlines()[0]) for name, make in NAMED.items()]


def named(name: str, **settings: object) -> Recipe:
    """The named recipe with these settings. Raises JaxqError for an unknown name or setting."""
    if name not in NAMED:
        raise JaxqError(f"unknown recipe {name!r}; use one of {', '.join(NAMED)}, or a TOML file")
    known = inspect.signature(NAMED[name]).parameters
    # Settings that a recipe hands on to its steps are checked there.
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = [k for k in settings if k not in known and not open_ended]
    if unknown:
        raise JaxqError(f"recipe {name} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    return NAMED[name](**settings)
