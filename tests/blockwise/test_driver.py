"""Whole recipes with steps, by `jaxq.quantize`, and what may not be asked of them."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxq
from jaxq import recipes
from jaxq.errors import JaxqError
from jaxq.recipe import Recipe, Rule
from jaxq.steps import STEPS, Calibrate, Reconstruct, step_from_dict

SETTINGS = {
    "percentile": {},
    "repq-vit": {},
    "brecq": {},
    "qdrop": {"loss": "fima"},
    "aphq-vit": {"relu": False},
    "ias-vit": {"softmax": "log"},
    "jaxq-vit": {"rotate": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_recipes_are_data(name):
    recipe = recipes.named(name, weights=3, activations=4, **SETTINGS[name])
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.needs_data and recipe.steps
    rule = next(rule for rule in recipe.activations if rule.pattern.endswith("fc2}/kernel"))
    assert rule.grid.bits == 4 and recipe.rules[0].format.bits == 3


def test_a_whole_run(vit, relu, images, tmp_path):
    recipe = recipes.named("aphq-vit", weights=4, activations=4, iterations=20, batch=8, images=16)
    told = []
    result = jaxq.quantize(vit.apply, vit.params, images, recipe, student=relu.apply, progress=told.append)
    assert result.report.recipe == recipe.to_dict()
    rows = {row.path: row for row in result.report.rows}
    assert rows["blocks/0/mlp/fc1/kernel"].format == "uniform 4-bit channel, input 4-bit"
    assert rows["patch_embed/proj/kernel"].format == "uniform 4-bit channel"
    assert len(result.report.drift) == 4 and 0.001 < result.report.drift[-1] < 0.5
    assert all(event.seconds >= 0 for event in told) and any("block 3 of" in event.path for event in told)
    want = vit.apply(vit.params, images[0])
    run = jax.jit(jaxq.quantized(relu.apply))
    got = run(result.params, images[0])
    assert np.mean((got - want) ** 2) < 0.25 * np.mean(want**2)
    again = jaxq.quantize(vit.apply, vit.params, images, recipe, student=relu.apply)
    np.testing.assert_array_equal(run(again.params, images[0]), got)
    jaxq.save(tmp_path / "out", result)
    np.testing.assert_array_equal(run(jaxq.load(tmp_path / "out").params, images[0]), got)


def test_activations_after_solvers(vit, images):
    weights = (Rule("blocks/**/kernel", "gptq", jaxq.Uniform(4, None)),)
    base = recipes.named("percentile", activations=6)
    recipe = dataclasses.replace(base, rules=weights, steps=())
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    result = jaxq.quantize(vit.apply, vit.params, images, recipe)
    leaf = result.params.params["blocks"]["1"]["mlp"]["fc1"]["kernel"]
    assert leaf.format.base == jaxq.Uniform(4, None) and leaf.format.grid.bits == 6
    assert "blocks/1/attn/probs" in result.params.activations


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("**/kernel", "rtn", jaxq.Uniform(4, 8)), "one scale an output, not uniform 4-bit g8"),
        (Rule("**/kernel", "rtn", jaxq.Uniform(4, None, symmetric=True)), "asymmetric uniform grids"),
    ],
)
def test_formats_that_steps_cannot_train(vit, images, rule, message):
    recipe = Recipe("mine", (rule,), (), (Calibrate("mse"),))
    with pytest.raises(JaxqError, match=message):
        jaxq.quantize(vit.apply, vit.params, images, recipe)


def test_a_recipe_that_finds_no_grids(vit, images):
    recipe = dataclasses.replace(recipes.named("percentile"), steps=(Calibrate("none", images=8, batch=8),))
    with pytest.raises(JaxqError, match="add a step calibrate with weights"):
        jaxq.quantize(vit.apply, vit.params, images, recipe)


def test_weights_that_are_quantized_already(vit, images):
    params = jaxq.tracing.replace(
        vit.params, {"head/kernel": jaxq.rtn(vit.params["head"]["kernel"], jaxq.Uniform(4, None))}
    )
    with pytest.raises(JaxqError, match="head/kernel is quantized already"):
        jaxq.quantize(vit.apply, params, images, recipes.named("percentile"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"step": "bake"}, "unknown step 'bake'"),
        ({"step": "calibrate", "heat": 3}, "step 'calibrate' has no setting 'heat'"),
        (
            {"step": "calibrate", "weights": "guess"},
            "weights is minmax, percentile, mse, output, none, not 'guess'",
        ),
        ({"step": "reconstruct", "loss": "vibes"}, "loss is mse"),
        ({"step": "reconstruct", "iterations": 0}, "iterations is a positive number"),
        ({"step": "reconstruct", "quantized": False}, "without quantized weights"),
        ({"step": "reconstruct", "whole": True}, 'has loss = "mse"'),
        ("calibrate", "unknown step None"),
    ],
)
def test_bad_steps(data, message):
    with pytest.raises(JaxqError, match=message):
        step_from_dict(data)


def test_steps_are_data():
    for kind in STEPS.values():
        assert step_from_dict(kind().to_dict()) == kind()
    assert Reconstruct().to_dict()["step"] == "reconstruct"


@pytest.mark.parametrize("name", ["aphq-vit", "jaxq-vit"])
def test_a_batch_is_that_of_all_steps_that_train(name):
    recipe = recipes.named(name, weights=4, activations=4, batch=8)
    assert {step.batch for step in recipe.steps if hasattr(step, "batch")} == {8}
    untold = recipes.named(name, weights=4, activations=4)
    assert {step.batch for step in untold.steps if hasattr(step, "batch")} == {32}
