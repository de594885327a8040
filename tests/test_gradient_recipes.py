"""The driver on recipes whose solvers ask for the loss's gradient: codebooks, sparse parts, mixed statistics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import JaxqError, Recipe, Rule, losses, recipes, tracing
from jaxq.formats import Codebook, DenseSparse
from jaxq.solvers.registry import SOLVERS

from . import zoo

pytestmark = pytest.mark.usefixtures("quick_tables")

#: One shape: a solver is compiled for each.
PATTERN = "**/mlp/up/kernel"

#: By one program; `dequantize` itself runs one for every operation.
dequantize = jax.jit(jaxq.dequantize)


def tokens(n=2):
    return [jax.random.randint(jax.random.key(i), (3, 7), 0, 40) for i in range(n)]


@functools.cache
def fisher():
    case = zoo.language()
    found = jaxq.observe(case.fn, case.params, tokens(), {PATTERN: jaxq.Fisher()}, loss=losses.next_token)
    return {path: jaxq.Fisher().finalize(state) for path, state in found.items()}


@functools.cache
def by_kmeans():
    """The language model by k-means weighted with the Fisher information, and the events of that run."""
    case, events = zoo.language(), []
    recipe = recipes.named("squeezellm", bits=2, pattern=PATTERN)
    loss = losses.next_token
    return jaxq.quantize(case.fn, case.params, tokens(), recipe, loss=loss, progress=events.append), events


def test_kmeans_gets_the_fisher_information_of_the_float_model():
    case, (result, events) = zoo.language(), by_kmeans()
    flat, solved = tracing.flatten(case.params), tracing.flatten(result.params)
    for path, importance in fisher().items():
        layout = zoo.chosen(case)[path].layout
        want = jaxq.kmeans(layout.to_canonical(flat[path]), importance, Codebook(2))
        same = np.asarray(dequantize(solved[path])) == np.asarray(layout.from_canonical(dequantize(want)))
        assert same.mean() > 0.99 and solved[path].shape == flat[path].shape
    rows = [r for r in result.report.rows if r.quantized]
    assert [e.path for e in events][::-1] and len(events) == len(rows)
    assert all(r.error < 0.6 for r in rows)
    shares = [e.seconds / (e.seconds + e.eta) for e in events]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)


def test_a_sparse_part_holds_the_most_sensitive_and_the_largest_weights_exactly():
    case, batches = zoo.language(), tokens()
    recipe = recipes.named("squeezellm", bits=2, sparsity=0.05, sensitive=0.02, pattern=PATTERN)
    result = jaxq.quantize(case.fn, case.params, batches, recipe, loss=losses.next_token)
    flat, solved = tracing.flatten(case.params), tracing.flatten(result.params)
    for path, importance in fisher().items():
        w = np.asarray(zoo.chosen(case)[path].layout.to_canonical(flat[path]))
        dense = np.asarray(solved[path].matrix())
        first = np.argsort(-np.asarray(importance), axis=None)[: round(0.02 * w.size)]
        # One rounding of the sum, whose terms are as large as the entries of the table.
        np.testing.assert_allclose(dense.reshape(-1)[first], w.reshape(-1)[first], rtol=1e-6, atol=1e-7)
        rest = np.delete(np.abs(w).reshape(-1), first)
        threshold = np.sort(rest)[-(round(0.05 * w.size) - len(first))]
        large = np.abs(w) >= threshold
        np.testing.assert_allclose(dense[large], w[large], rtol=1e-6, atol=1e-7)
        assert solved[path].format == DenseSparse(Codebook(2), 0.05)
    out = jax.jit(jaxq.quantized(case.fn))(result.params, batches[0])
    want = jax.jit(lambda params, x: case.fn(jaxq.dequantize(params), x))(result.params, batches[0])
    np.testing.assert_allclose(out, want, rtol=2e-4, atol=2e-4)


def test_error_feedback_on_tables_lowers_the_output_error():
    case, batches = zoo.language(), tokens()
    recipe = recipes.named("lnq", bits=2, importance="fisher", pattern=PATTERN)
    better = jaxq.quantize(case.fn, case.params, batches, recipe, loss=losses.next_token)
    assert len(better.report.drift) and np.isfinite(better.report.error)
    want, *found = (jax.jit(case.fn)(dequantize(p), batches[0]) for p in (case.params, better.params,
                                                                         by_kmeans()[0].params))  # fmt: skip
    far = [np.linalg.norm(out - want) for out in found]
    assert far[0] < far[1]


def test_guided_hessians_and_a_sparse_part_in_stacked_layers():
    case = zoo.scanned()
    loss = lambda out, *_: jnp.sum(out**2, axis=tuple(range(1, out.ndim)))  # noqa: E731
    recipe = recipes.named("guided", bits=2, sparsity=0.02, pattern=PATTERN, rounds=1, start="nearest")
    result = jaxq.quantize(case.fn, case.params, [case.args], recipe, loss=loss)
    leaf = tracing.flatten(result.params)["params/layers/block/mlp/up/kernel"]
    assert leaf.batch_shape == (2,) and leaf.shape == (2, 16, 48) and leaf.rows.shape[0] == 2
    out, want = (jax.jit(jaxq.quantized(case.fn))(p, *case.args) for p in (result.params, case.params))
    assert np.linalg.norm(out - want) / np.linalg.norm(want) < 0.6


def test_guided_hessians_of_the_quantized_stream_are_those_of_the_float_one_where_the_streams_part():
    case, batches = zoo.language(), tokens(3)

    def run(stream):
        recipe = recipes.named("guided", bits=2, stream=stream, pattern=PATTERN, rounds=1, start="nearest")
        return tracing.flatten(jaxq.quantize(case.fn, case.params, batches, recipe, loss=losses.next_token).params)

    published, ours = run("float"), run("quantized")
    same = {path: np.mean(np.asarray(q.codes) == np.asarray(published[path].codes)) for path, q in ours.items()
            if jaxq.is_quantized(q)}  # fmt: skip
    first = [share for path, share in same.items() if "block_0" in path]
    later = [share for path, share in same.items() if "block_1" in path]
    assert first and min(first) > 0.97 and later and min(later) < 0.97
    with pytest.raises(JaxqError, match="stream is 'quantized' or 'float'"):
        recipes.named("guided", stream="both")


def test_rules_of_every_kind_in_one_recipe():
    case, batches = zoo.language(), tokens()
    rules = (
        Rule("**/block_0/mlp/up/kernel", "kmeans", Codebook(2)),
        Rule("**/block_1/mlp/up/kernel", "kmeans", Codebook(2), {}, {"importance": "none"}),
        Rule("**/query/kernel", "gptq", jaxq.Uniform(3, None)),
        Rule("**/down/kernel", "rtn", DenseSparse(jaxq.Uniform(3, None), 0.03), {"sensitive": 0.01}),
    )
    recipe = Recipe("mixed", rules)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.needs_gradients and recipe.needs_data
    result = jaxq.quantize(case.fn, case.params, batches, recipe, loss=losses.next_token)
    formats = {r.path.split("/")[-2]: r.format for r in result.report.rows if r.quantized}
    assert formats == {"up": "codebook 2-bit", "query": "uniform 3-bit channel",
                       "down": "uniform 3-bit channel + 3% sparse"}  # fmt: skip
    plan = jaxq.plan(case.fn, case.params, batches[0], recipe, batches=2)
    assert plan.bytes_after == result.report.bytes_after
    assert plan.peak_bytes > jaxq.plan(case.fn, case.params, batches[0], recipe, batches=1).peak_bytes


def test_labels_are_targets_of_the_loss(key):
    k = jax.random.split(key, 3)
    params = {name: jax.random.normal(k[i], (6, 6)) for i, name in enumerate("ab")}
    x, labels = jax.random.normal(k[2], (10, 6)), jnp.arange(10) % 3
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]  # noqa: E731
    recipe = Recipe("squeezellm", (Rule("*", "kmeans", Codebook(2)),))
    result = jaxq.quantize(fn, params, [x], recipe, loss=losses.classification, targets=[labels])
    assert all(jaxq.is_quantized(q) for q in result.params.values())


def test_bad_rules_and_runs_are_refused():
    case, batches = zoo.language(), tokens(1)
    with pytest.raises(JaxqError, match="needs a loss: give loss=jaxq.losses.next_token"):
        jaxq.quantize(case.fn, case.params, batches, recipes.named("squeezellm", pattern=PATTERN))
    with pytest.raises(JaxqError, match="fits the format 'codebook', not 'uniform'"):
        Rule("*", "kmeans", jaxq.Uniform(4))
    with pytest.raises(JaxqError, match="has no option sensitive"):
        Rule("*", "kmeans", Codebook(4), {"sensitive": 0.1})
    with pytest.raises(JaxqError, match="takes no statistic 'hessian'"):
        Rule("*", "kmeans", Codebook(4), {}, {"hessian": "hessian"})
    with pytest.raises(JaxqError, match="unknown statistic 'guess'"):
        Rule("*", "kmeans", Codebook(4), {}, {"importance": "guess"})
    with pytest.raises(JaxqError, match="give a sparsity above 0"):
        recipes.named("squeezellm", sensitive=0.001)
    assert SOLVERS["kmeans"].statistics == {"importance": "fisher"}
    assert dataclasses.replace(Rule("*", "kmeans", Codebook(4)), statistics={"importance": "none"}).needs == {}
