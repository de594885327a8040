"""`jaxq.observe`: statistics of what reaches each site."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq import tracing
from jaxq.errors import JaxqError
from jaxq.interpreter import Rules, Walk
from jaxq.names import Name, names
from jaxq.patterns import first_match
from jaxq.sites import Site, site_of
from jaxq.tracked import Leaf, Record, Records
from jaxq.transforms.registry import needs_gradients
from jaxq.transforms.statistics import Statistic
from jaxq.uses import Use


class ObserveRules(Rules):
    """Records statistics at the sites whose path a pattern matches; everything runs as it is.

    weights: token weights for all sites, or {path: the site's own, "": those of all others}.
    """

    follow_names = True

    def __init__(self, statistics: dict[str, Statistic], shapes: dict[str, Any], weights: Any):
        self.statistics, self.shapes, self.weights = statistics, shapes, weights
        self.sites: dict[str, Site] = {}
        #: {id of an equation: the activation that it names}, which tells equal names apart.
        self.names: dict[int, Name] = {}

    def statistic(self, path: str) -> Statistic | None:
        pattern = first_match(self.statistics, path)
        return None if pattern is None else self.statistics[pattern]

    def initial(self, path: str) -> Any:
        statistic = self.statistic(path)
        assert statistic is not None
        return statistic.init(self.sites[path])

    def merge(self, path: str, a: Any, b: Any) -> Any:
        statistic = self.statistic(path)
        assert statistic is not None
        return statistic.merge(a, b)

    def token_weights(self, path: str, tokens: tuple[int, ...]) -> Any:
        """Weights for data of these leading sizes; trailing extra axes repeat their token's weight."""
        w = self.weights
        if isinstance(w, dict):
            if path in w:
                return w[path]
            w = w[""]
        if w is None:
            return None
        if tuple(tokens[: w.ndim]) != tuple(w.shape):
            raise JaxqError(
                f"weights of shape {tuple(w.shape)} do not fit the data {tuple(tokens)} at site {path}; "
                "observe this site without weights"
            )
        return jnp.broadcast_to(w.reshape(w.shape + (1,) * (len(tokens) - w.ndim)), tokens)

    def site(self, use: Use, leaf: Leaf, x: Any, dense: Callable[[], Any]) -> tuple[Any, Records]:
        statistic = self.statistic(leaf.path)
        if statistic is None:
            return dense(), {}
        if use.kind == "embedding":
            # A look-up feeds no data into the table; a tied head observes the same leaf elsewhere.
            return dense(), {}
        if use.note:
            raise JaxqError(f"{leaf.path}: no statistics for a {use.note}; leave it out of the patterns")
        site = site_of(use, leaf, self.shapes)
        self.sites.setdefault(leaf.path, site)
        if use.kind == "grouped":
            state = self.grouped(statistic, site, leaf.path, x)
        else:
            state = self.matmul(statistic, site, leaf.path, use, use.canonical_input(x))
        stacked = len(use.batch_axes)
        for position, length in reversed(leaf.index):
            # Other members of the stack keep the neutral state.
            state = jax.tree.map(
                lambda neutral, s, length=length, position=position: (
                    jnp.broadcast_to(neutral, (length, *s.shape)).astype(s.dtype).at[position].set(s)
                ),
                statistic.init(site),
                state,
            )
            stacked += 1
        return dense(), {leaf.path: Record(state, stacked, leaf.levels)}

    def matmul(self, statistic: Statistic, site: Site, path: str, use: Use, x: Any) -> Any:
        if x.shape[-1] != site.in_size:
            raise JaxqError(f"{path}: a shard_map splits the contracted axis; observe it outside the shard_map")
        lead = len(use.batch_axes)
        weights = self.token_weights(path, x.shape[lead:-1])

        def update(x: Any) -> Any:
            return statistic.update(statistic.init(site), x, weights)

        for _ in range(lead):
            update = jax.vmap(update)
        return update(x)

    def grouped(self, statistic: Statistic, site: Site, path: str, operands: list[Any]) -> Any:
        """One state for each group: the tokens of the others have weight zero."""
        x, _, sizes = operands
        ends = jnp.cumsum(sizes)
        tokens = jnp.arange(x.shape[0])
        weights = self.token_weights(path, x.shape[:-1])

        def one(bounds: tuple[Any, Any]) -> Any:
            inside = ((tokens >= bounds[0]) & (tokens < bounds[1])).astype(jnp.float32)
            mine = inside if weights is None else inside * weights
            return statistic.update(statistic.init(site), x, mine)

        return lax.map(one, (ends - sizes, ends))

    def named(self, eqn: Any, path: str, value: Any) -> tuple[Any, Records]:
        path = self.names[id(eqn)].path if id(eqn) in self.names else path
        statistic = self.statistic(path)
        if statistic is None or jnp.ndim(value) == 0:
            return value, {}
        site = Site(path, "product", tuple(value.shape), value.dtype, (value.ndim - 1,))
        self.sites.setdefault(path, site)
        weights = None
        return value, {path: Record(statistic.update(statistic.init(site), value, weights))}


def observed(fn: Callable[..., Any], statistics: dict[str, Statistic]) -> Callable[..., tuple[Any, Records]]:
    """`observed(fn, statistics)(params, *args, weights=None)` gives (output, {path: Record}); pure, for jit."""

    def wrapped(params: Any, *args: Any, weights: Any = None) -> tuple[Any, dict[str, Any]]:
        call = tracing.trace(fn, (params, *args))
        shapes = {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in zip(call.paths, call.values, strict=True)}
        rules = ObserveRules(statistics, shapes, weights)
        rules.names = names(call.jaxpr.eqns)
        values = [
            Leaf.of(v, p) if i < call.parameters else v
            for i, (v, p) in enumerate(zip(call.values, call.paths, strict=True))
        ]
        walk = Walk(rules)
        outs, records = walk.run(call.jaxpr, call.consts, values)
        asked = [k for k, s in statistics.items() if s is not None]
        matched = {k: any(first_match(statistics, p) == k for p in records) for k in asked}
        tracing.check_paths(matched, [p for p in call.paths[: call.parameters]])
        return call.finish([walk.plain(o) for o in outs]), records

    return wrapped


def merge_records(statistics: dict[str, Statistic], a: Records, b: Records) -> Records:
    """The records of both parts of the data; pure."""
    return Walk(ObserveRules(statistics, {}, None)).merged(a, b)


def observe(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    statistics: dict[str, Any],
    weights: Iterable[Any] | None = None,
    *,
    loss: Callable[..., Any] | None = None,
    targets: Iterable[Any] | None = None,
) -> dict[str, Any]:
    """Runs the function over batches and folds what reaches each site into statistics.

    Args:
        fn: `fn(params, *args)`, pure. It is compiled once for each shape of batch.
        params: pytree of arrays; quantized leaves run quantized sites dense.
        batches: each an array (the one argument) or a tuple of arguments.
        statistics: {pattern: statistic}, patterns as in recipes; the first that matches a path counts.
        weights: for each batch, token weights whose shape leads that of the data at every observed site;
            weight 0 leaves a token (padding) out.
        loss: `loss(output, *args) -> (sequences,)`, see `jaxq.losses`: for statistics of its gradient (`Fisher`,
            `GuidedHessian`). They are taken backwards, stage by stage, see `jaxq.gradients`.
        targets: for each batch, one more argument of the loss, such as labels.

    Returns:
        {path: state}; for scanned layers and experts the state has their axes in front.

    Raises:
        JaxqError: no batches, a pattern that matches no site, or no loss for a statistic that needs one.
    """
    backwards = {k for k, s in statistics.items() if needs_gradients(s)}
    if backwards:
        from jaxq.gradients import observe_gradients

        if loss is None:
            raise JaxqError("statistics of a gradient need a loss: for a language model, jaxq.losses.next_token")
        given = [b if isinstance(b, tuple) else (b,) for b in batches]
        extra = (None if x is None else list(x) for x in (targets, weights))
        targets, weights = extra
        only = {k: s if k in backwards else None for k, s in statistics.items()}
        found = observe_gradients(fn, params, given, only, loss, targets, weights)
        if len(backwards) == len(statistics):
            return found
        rest = {k: None if k in backwards else s for k, s in statistics.items()}
        return found | _observe_inputs(fn, params, given, rest, weights)
    return _observe_inputs(fn, params, batches, statistics, weights)


def _observe_inputs(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    statistics: dict[str, Any],
    weights: Iterable[Any] | None,
) -> dict[str, Any]:
    """The part of `observe` that only runs forwards; None in place of a statistic leaves its sites out."""
    run = jax.jit(lambda params, args, w: observed(fn, statistics)(params, *args, weights=w)[1])
    records: Records | None = None
    merge = jax.jit(functools.partial(merge_records, statistics))
    given = iter(weights) if weights is not None else None
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        new = run(params, args, None if given is None else jnp.asarray(next(given)))
        records = new if records is None else merge(records, new)
    if records is None:
        raise JaxqError("there are no batches to observe: give at least one")
    return {path: record.state for path, record in records.items()}
