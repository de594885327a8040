"""One small ViT and its images, for all steps; programs are compiled once where tests can share them."""

import numpy as np
import pytest

from jaxq import recipes
from jaxq.blockwise import driver
from jaxq.models import vision

CONFIG = vision.PRESETS["deit_tiny"].replace(
    image_size=8,
    patch_size=4,
    channels=1,
    classes=4,
    hidden_size=16,
    depths=(2,),
    heads=(2,),
    mean=(0.5,),
    std=(0.5,),
)


@pytest.fixture(scope="session")
def vit():
    return vision.build(CONFIG, vision.init_params(CONFIG, seed=1, scale=0.3))


@pytest.fixture(scope="session")
def relu(vit):
    return vision.build(CONFIG.replace(activation="relu"), vit.params)


@pytest.fixture(scope="session")
def images():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((8, 8, 8, 1)).astype(np.float32) for _ in range(4)]


@pytest.fixture(scope="session")
def begun(vit, images):
    """begun(recipe, **settings): the job and the work before the recipe's first step."""

    def begin(name="qdrop", student=None, **settings):
        settings = {"weights": 3, "activations": 3, "images": 32} | settings
        recipe = recipes.named(name, **settings)
        return *driver.started(vit.apply, vit.params, images, recipe, student=student), recipe

    return begin
