import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxq
from jaxq import JaxqError, Recipe, Rule, Uniform, recipes
from jaxq.patterns import matches


@given(
    st.integers(1, 8),
    st.one_of(st.none(), st.just("tensor"), st.integers(1, 256)),
    st.booleans(),
    st.sampled_from(["rtn", "gptq"]),
)
def test_toml_round_trip(bits, group_size, symmetric, name):
    recipe = recipes.named(name, bits=bits, group_size=group_size, symmetric=symmetric)
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_rules_in_order():
    recipe = Recipe("mixed", (Rule("layers/0/**"), Rule("**/kernel", "rtn", Uniform(4, 64))))
    assert recipe.rule("layers/0/mlp/up/kernel").solver is None
    assert recipe.rule("layers/1/mlp/up/kernel").solver == "rtn"
    assert recipe.rule("embed/embedding") is None
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert not recipe.needs_data and recipes.named("gptq").needs_data


def test_a_rule_that_decides_nothing_is_an_error():
    recipe = Recipe("mixed", (Rule("**/kernel", "rtn", Uniform(4)), Rule("layers/0/kernel", "rtn", Uniform(8))))
    with pytest.raises(JaxqError, match=r"'layers/0/kernel' matches no site that an earlier rule left over"):
        recipe.check(["layers/0/kernel", "layers/1/kernel"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules = 3", "list of"),
        ("[[rules]]\nsolver = 'rtn'", "pattern"),
        ("[[rules]]\npattern = '**'\nsolver = 'magic'", "unknown solver 'magic'"),
        ("[[rules]]\npattern = '**'\nsolver = 'rtn'", "needs a format"),
        (
            "[[rules]]\npattern = '**'\nsolver = 'rtn'\nformat = {name = 'wavelet'}",
            "unknown format 'wavelet'",
        ),
        ("[[rules]]\npattern = '**'\nsolver = 'rtn'\nformat = {name = 'uniform', bits = 9}", "1 to 8 bits"),
        (
            "[[rules]]\npattern = '**'\nsolver = 'rtn'\nformat = {name = 'uniform'}\noptions = {dampling = 1}",
            "no option dampling",
        ),
        ("[[rules", "not valid TOML"),
    ],
)
def test_bad_recipes_say_what_is_wrong(text, message):
    with pytest.raises(JaxqError, match=message):
        Recipe.from_toml(text)


def test_named_recipes():
    assert [name for name, line in recipes.names() if line] == list(recipes.NAMED)
    with pytest.raises(JaxqError, match="unknown recipe 'gtpq'; use one of rtn, gptq"):
        recipes.named("gtpq")
    with pytest.raises(JaxqError, match="no setting bit;"):
        recipes.named("gptq", bit=3)
    assert jaxq.recipes is recipes


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("**/kernel", "layers/0/mlp/up/kernel", True),
        ("**/kernel", "kernel", True),
        ("**/kernel", "layers/kernels", False),
        ("layers/*/kernel", "layers/0/kernel", True),
        ("layers/*/kernel", "layers/0/mlp/kernel", False),
        ("layers/{0,2}/**", "layers/2/mlp/kernel", True),
        ("layers/{0,2}/**", "layers/1/mlp/kernel", False),
        ("**", "anything/at all", True),
        ("a.c", "abc", False),
    ],
)
def test_patterns(pattern, path, expected):
    assert matches(pattern, path) is expected
