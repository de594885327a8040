"""The driver: what it solves, from which data, and what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import JaxqError, Recipe, Rule, Uniform, tracing

from . import zoo

FORMAT = Uniform(4, 8)


def gptq(pattern="**/kernel", **options):
    return Recipe("gptq", (Rule(pattern, "gptq", FORMAT, options),))


def tokens(seed, n=1):
    return [jax.random.randint(jax.random.key(seed + i), (2, 7), 0, 40) for i in range(n)]


def leaves_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_first_layer_gets_the_hessian_of_float_data_and_the_second_that_of_quantized_data():
    case = zoo.language()
    batches = tokens(1, 3)
    result = jaxq.quantize(case.fn, case.params, batches, gptq())
    flat, solved = tracing.flatten(case.params), tracing.flatten(result.params)

    def expected(params, path):
        states = jaxq.observe(case.fn, params, batches, {path: jaxq.Hessian()})
        site = zoo.chosen(case)[path]
        return jaxq.gptq(flat[path], jaxq.Hessian().finalize(states[path]), FORMAT, layout=site.layout)

    first = "params/block_0/mlp/up/kernel"
    want = expected(case.params, first)
    assert np.mean(np.asarray(solved[first].codes) == np.asarray(want.codes)) > 0.99
    # The second block sees what the quantized first block makes of the data.
    stream = tracing.replace(case.params, {p: q for p, q in solved.items() if "block_0" in p})
    second = "params/block_1/attention/query/kernel"
    want = expected(jaxq.dequantize(stream), second)
    assert np.mean(np.asarray(solved[second].codes) == np.asarray(want.codes)) > 0.99


@pytest.mark.parametrize("name", ["scanned", "nnx_model", "conv", "experts"])
def test_error_feedback_beats_rounding_on_functions_of_every_kind(name):
    case = zoo.CASES[name]()
    pattern = "**" if name == "experts" else "**/kernel"
    rules = lambda solver: Recipe(solver, (Rule(pattern, solver, Uniform(3, None)),))  # noqa: E731
    batches = [tuple(x + 0.1 * i for x in case.args) for i in range(3)]
    better = jaxq.quantize(case.fn, case.params, batches, rules("gptq"))
    errors = [r.error for r in better.report.rows if r.format]
    assert len(errors) >= case.leaves and np.isfinite(errors).all()

    flat = tracing.flatten(case.params)
    statistics = jaxq.observe(case.fn, case.params, batches, {pattern: jaxq.Hessian()})
    rounded = jaxq.quantize(case.fn, case.params, batches, rules("rtn"))

    def objective(params):
        total = 0.0
        for path, state in statistics.items():
            site = zoo.chosen(case)[path]
            delta = site.layout.to_canonical(flat[path] - tracing.flatten(params)[path].dequantize())
            total += float(jnp.einsum("...io,...ij,...jo->", delta, state.matrix, delta))
        return total

    assert objective(better.params) < objective(rounded.params)


def test_stacked_layers_come_back_stacked():
    case = zoo.scanned()
    result = jaxq.quantize(case.fn, case.params, [case.args], gptq())
    path = "params/layers/block/mlp/up/kernel"
    leaf = tracing.flatten(result.params)[path]
    assert leaf.shape == (2, 16, 48) and leaf.batch_shape == (2,)
    assert [r.path for r in result.report.rows if r.path.startswith(path)] == [f"{path}[{i}]" for i in range(2)]
    out, want = (jax.jit(jaxq.quantized(case.fn))(p, *case.args) for p in (result.params, case.params))
    assert float(jnp.linalg.norm(out - want) / jnp.linalg.norm(want)) < 0.15


def test_weights_leave_padding_out():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    key = jax.random.key
    p = {"a": jax.random.normal(key(0), (8, 8)), "b": jax.random.normal(key(1), (8, 8))}
    x = jax.random.normal(key(2), (4, 6, 8))
    w = (jnp.arange(6) < 3).astype(jnp.float32) * jnp.ones((4, 1))
    padded = jnp.where(w[..., None] > 0, x, 1e3)
    rule = gptq("*")
    leaves_equal(
        jaxq.quantize(fn, p, [padded], rule, weights=[w]).params,
        jaxq.quantize(fn, p, [x], rule, weights=[w]).params,
    )


def test_weights_are_read_one_stage_at_a_time():
    case = zoo.language()
    order = []

    class OnDisk:
        def __init__(self, path, array):
            self.path, self.array, self.shape, self.dtype = path, array, array.shape, array.dtype

        def __array__(self, dtype=None, copy=None):
            order.append(self.path)
            return np.asarray(self.array)

    flat = tracing.flatten(case.params)
    lazy = tracing.replace(case.params, {p: OnDisk(p, a) for p, a in flat.items()})
    jaxq.plan(case.fn, lazy, case.args, gptq())
    assert order == []
    seen = []
    result = jaxq.quantize(case.fn, lazy, [case.args], gptq(), progress=lambda e: seen.append((e, len(order))))
    leaves_equal(result.params, jaxq.quantize(case.fn, case.params, [case.args], gptq()).params)
    first = [reads for event, reads in seen if "block_0" in event.path]
    assert max(first) <= 1 + 16


def test_report_and_progress():
    case = zoo.language()
    events = []
    result = jaxq.quantize(case.fn, case.params, tokens(1, 2), gptq(), progress=events.append)
    report = result.report
    quantized = [r for r in report.rows if r.format != "dense"]
    assert [e.path for e in events] == [r.path for r in quantized] and len(events) == 12
    assert all(e.stages == 4 and e.seconds > 0 for e in events) and events[-1].eta == pytest.approx(0, abs=1e-9)
    table = next(r for r in report.rows if r.path.endswith("embedding"))
    assert table.format == "dense" and table.bytes_before == table.bytes_after == 40 * 16 * 4
    exact = sum(x.nbytes for x in jax.tree.leaves(result.params, is_leaf=jaxq.is_quantized))
    assert report.bytes_after == exact
    assert report.bytes_before == sum(x.nbytes for x in jax.tree.leaves(case.params))
    plan = jaxq.plan(case.fn, case.params, case.args, gptq())
    assert (plan.bytes_before, plan.bytes_after) == (report.bytes_before, report.bytes_after)
    assert plan.peak_bytes > plan.bytes_after
    # Nothing differs before the first quantized block; what the blocks do differs after each.
    assert report.drift[0] == 0 and all(0 < d < 0.5 for d in report.drift[1:]) and len(report.drift) == 2


def test_the_embedding_can_be_rounded_and_the_head_that_shares_it_uses_it():
    case = zoo.language()
    recipe = Recipe("all", (Rule("**/embedding", "rtn", FORMAT), Rule("**/kernel", "gptq", FORMAT)))
    result = jaxq.quantize(case.fn, case.params, tokens(1), recipe)
    assert not [s.note for s in jaxq.sites(case.fn, result.params, *case.args) if s.note and "kernel" in s.path]
    leaf = tracing.flatten(result.params)["params/embed/embedding"]
    assert leaf.layout.perm == (1, 0) and leaf.matrix_shape == (16, 40)


def test_rows_of_data_free_recipes_need_shapes_only():
    case = zoo.language()
    recipe = Recipe("rtn", (Rule("**/kernel", "rtn", FORMAT),))
    result = jaxq.quantize(case.fn, case.params, [jax.ShapeDtypeStruct((2, 7), jnp.int32)], recipe)
    assert len([r for r in result.report.rows if r.format == str(FORMAT)]) == 12


def test_the_same_run_gives_the_same_bits():
    case = zoo.language()
    a, b = (jaxq.quantize(case.fn, case.params, tokens(3), gptq()).params for _ in range(2))
    leaves_equal(a, b)


def test_bad_input_is_refused_by_name():
    case = zoo.language()
    run = lambda params, batches, recipe: jaxq.quantize(case.fn, params, batches, recipe)  # noqa: E731
    with pytest.raises(JaxqError, match="no calibration data"):
        run(case.params, [], gptq())
    with pytest.raises(JaxqError, match="batch 1 has another shape"):
        run(case.params, [*tokens(1), jnp.zeros((1, 7), jnp.int32)], gptq())
    with pytest.raises(JaxqError, match="'nope/\\*' matches no site"):
        run(case.params, tokens(1), gptq("nope/*"))
    with pytest.raises(JaxqError, match="block_0/.*: group size 32 is larger than the input width 16"):
        run(case.params, tokens(1), Recipe("r", (Rule("**/kernel", "gptq", Uniform(4, 32)),)))
    table = {"table": jnp.ones((40, 16))}
    with pytest.raises(JaxqError, match="table is a look-up: no data flows into it"):
        jaxq.quantize(lambda p, ids: p["table"][ids], table, tokens(1), gptq("table"))
    path = "params/block_1/mlp/up/kernel"
    broken = tracing.replace(case.params, {path: jnp.full((16, 48), jnp.nan)})
    with pytest.raises(JaxqError, match=f"{path}: .*(NaN|finite)"):
        run(broken, tokens(1), gptq())
    once = run(case.params, tokens(1), gptq()).params
    with pytest.raises(JaxqError, match="is quantized already"):
        run(once, tokens(1), gptq())
