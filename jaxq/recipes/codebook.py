"""Recipes with a look-up table for each output channel, or each group of its inputs."""

from __future__ import annotations

from typing import Any

from jaxq.errors import JaxqError
from jaxq.formats import Codebook, DenseSparse, Format
from jaxq.recipe import Recipe, Rule
from jaxq.recipes.uniform import BLOCKS

#: Kim et al. 2024: of the weights, 0.05 % are kept because of their sensitivity, whatever the sparsity.
SENSITIVE = 0.0005

#: {where the inputs of a guided Hessian come from: the statistic}
STREAMS = {"quantized": "stream_guided", "float": "guided"}


def kmeans(
    bits: int = 4,
    group_size: int | None = None,
    method: str = "auto",
    table_dtype: str = "float16",
    pattern: str = BLOCKS,
) -> Recipe:
    """Codebooks by plain k-means: no data, the base line of SqueezeLLM.

    group_size: consecutive inputs that share a table; a whole channel when left out.
    """
    format = Codebook(bits, table_dtype, group_size)
    return Recipe("kmeans", (Rule(pattern, "kmeans", format, {"method": method}, {"importance": "none"}),))


def squeezellm(
    bits: int = 3,
    sparsity: float = 0.0,
    sensitive: float | None = None,
    group_size: int | None = None,
    method: str = "auto",
    table_dtype: str = "float16",
    pattern: str = BLOCKS,
) -> Recipe:
    """SqueezeLLM: codebooks weighted by the Fisher information, and a sparse part (Kim et al. 2024).

    sparsity: fraction of the weights kept exactly, in all; the paper's is 0.0045. sensitive: the part of it that
    is chosen by sensitivity, the rest being the largest; 0.0005 when left out. group_size: consecutive inputs that
    share a table; a whole channel, as in the paper, when left out. method: "exact", "lloyd" or "auto".
    """
    format, options = _split(Codebook(bits, table_dtype, group_size), sparsity, sensitive)
    return Recipe("squeezellm", (Rule(pattern, "kmeans", format, {"method": method, **options}),))


def lnq(
    bits: int = 3,
    sparsity: float = 0.0,
    sensitive: float | None = None,
    rounds: int = 4,
    start: str = "feedback",
    importance: str = "none",
    damping: float = 0.01,
    table_dtype: str = "float16",
    pattern: str = BLOCKS,
) -> Recipe:
    """Codebooks with error feedback: tables and codes alternate against the full Hessian (LNQ, Kim et al. 2025).

    Like SqueezeLLM's, but what is minimised is the error of each layer's output, given what the quantized layers
    before it make of the data. importance: weights of the k-means that it starts from, "none" (the solver's own,
    the root of the Hessian's diagonal) or "fisher".
    """
    return _lnq(
        "lnq", "hessian", importance, bits, sparsity, sensitive, rounds, start, damping, table_dtype, pattern
    )


def guided(
    bits: int = 3,
    sparsity: float = 0.0,
    sensitive: float | None = None,
    rounds: int = 4,
    start: str = "feedback",
    importance: str = "fisher",
    stream: str = "quantized",
    damping: float = 0.01,
    table_dtype: str = "float16",
    pattern: str = BLOCKS,
) -> Recipe:
    """LNQ against Hessians weighted by the loss's gradient at the outputs (GuidedQuant, Kim et al. 2025).

    Consecutive output channels share a Hessian, four of them for a matrix. Gradients are those of the float model.
    stream: where the inputs come from, "float" as published, or "quantized" to answer for the errors of the layers
    before too.
    """
    if stream not in STREAMS:
        raise JaxqError(f"stream is {' or '.join(map(repr, STREAMS))}, not {stream!r}")
    return _lnq(
        "guided",
        STREAMS[stream],
        importance,
        bits,
        sparsity,
        sensitive,
        rounds,
        start,
        damping,
        table_dtype,
        pattern,
    )


def _lnq(
    name: str,
    hessian: str,
    importance: str,
    bits: int,
    sparsity: float,
    sensitive: float | None,
    rounds: int,
    start: str,
    damping: float,
    table_dtype: str,
    pattern: str,
) -> Recipe:
    format, split = _split(Codebook(bits, table_dtype), sparsity, sensitive)
    options = {"rounds": rounds, "start": start, "damping": damping, **split}
    statistics = {"hessian": hessian, "importance": importance}
    return Recipe(name, (Rule(pattern, "lnq", format, options, statistics),))


def _split(base: Format, sparsity: float, sensitive: float | None) -> tuple[Format, dict[str, Any]]:
    """The format with its sparse part, and the options of the split."""
    if sparsity == 0:
        if sensitive:
            raise JaxqError("sensitive weights are a part of the sparsity: give a sparsity above 0")
        return base, {}
    return DenseSparse(base, sparsity), {"sensitive": min(SENSITIVE, sparsity) if sensitive is None else sensitive}
