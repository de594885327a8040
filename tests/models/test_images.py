"""Preparation of images against the processors of transformers, and every way to hand images in."""

import numpy as np
import PIL.Image
import pytest

from jaxq.errors import JaxqError
from jaxq.models import images
from jaxq.models.vision_config import HALF, PRESETS

CONFIG = PRESETS["deit_tiny"].replace(image_size=32, patch_size=8)


def picture(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    """Smooth, with noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.sin(0.3 * x + 0.1 * y)[(..., *[None] * len(channels))] + np.zeros((height, width, *channels))
    noise = np.random.default_rng(seed).standard_normal((height, width, *channels))
    return np.clip(128 + 90 * waves + 25 * noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(40, 60), (80, 33), (32, 32)])
def test_as_vit_processor(shape):
    processor = pytest.importorskip("transformers.models.vit.image_processing_pil_vit").ViTImageProcessorPil
    config = CONFIG.replace(mean=HALF, std=HALF, squash=True, crop=1.0, interpolation="bilinear")
    image = picture(*shape, 3)
    expected = processor(size={"height": 32, "width": 32})(image, return_tensors="np")["pixel_values"]
    found = images.prepare([image], config)
    assert found.dtype == np.float32 and found.shape == (1, 32, 32, 3)
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 60), (80, 34)])  # as many pixels go on the left as on the right
@pytest.mark.parametrize("squash", [True, False])
def test_as_deit_processor(shape, squash):
    processor = pytest.importorskip("transformers.models.deit.image_processing_pil_deit").DeiTImageProcessorPil
    size = {"height": 36, "width": 36} if squash else {"shortest_edge": 36}
    image = picture(*shape, 3)
    crop_size = {"height": 32, "width": 32}
    processor = processor(size=size, crop_size=crop_size, image_mean=CONFIG.mean, image_std=CONFIG.std)
    expected = processor(image, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    found = images.prepare([image], CONFIG.replace(crop=32 / 36, squash=squash))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("odd, start", [(1, 0), (3, 2), (5, 2), (7, 4)])
def test_crops_where_torchvision_does(odd, start):
    """It rounds half a pixel to even, where transformers rounds down."""
    image = picture(32, 32 + odd, 3)
    np.testing.assert_array_equal(images.fit(image, CONFIG.replace(crop=1.0)), image[:, start : start + 32])


def test_the_resized_side_is_that_of_timm():
    vit = PRESETS["vit_small"]
    assert images.resize(picture(300, 400), vit).shape == (248, 330)
    assert images.resize(picture(300, 400), vit.replace(crop=224 / 248)).shape == (248, 330)
    assert images.resize(picture(300, 400), vit.replace(crop=0.875)).shape == (256, 341)


def test_images_of_the_right_size_are_only_normalized():
    config = CONFIG.replace(crop=1.0)
    stack = np.stack([picture(32, 32, 3, seed=seed) for seed in range(3)])
    found = images.prepare(stack, config)
    expected = (stack / 255 - np.array(config.mean)) / np.array(config.std)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_grey_images_get_the_channels_wanted():
    grey = picture(32, 32)
    config = CONFIG.replace(crop=1.0)
    for image in (grey, grey[:, :, None]):
        np.testing.assert_array_equal(images.fit(image, config), np.stack([grey] * 3, -1))
    one = config.replace(channels=1, mean=(0.5,), std=(0.5,))
    np.testing.assert_array_equal(images.fit(grey, one)[..., 0], grey)
    assert images.prepare([grey], one).shape == (1, 32, 32, 1)


def test_colour_becomes_grey_as_in_pillow():
    colour = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    expected = np.asarray(PIL.Image.fromarray(colour).convert("L"))
    np.testing.assert_array_equal(images.channels(colour, 1)[..., 0], expected)


def test_files_and_pillow_images(tmp_path):
    colour = picture(40, 50, 3)
    clear = np.concatenate([colour, np.full((40, 50, 1), 9, np.uint8)], axis=-1)
    expected = images.fit(colour, CONFIG)
    PIL.Image.fromarray(colour).save(tmp_path / "rgb.png")
    PIL.Image.fromarray(clear).save(tmp_path / "rgba.png")
    PIL.Image.fromarray(colour[..., 0]).save(tmp_path / "grey.png")
    for image in (tmp_path / "rgb.png", str(tmp_path / "rgba.png"), PIL.Image.fromarray(colour)):
        np.testing.assert_array_equal(images.fit(image, CONFIG), expected)
    found = images.prepare([tmp_path / "rgb.png", tmp_path / "grey.png"], CONFIG)
    np.testing.assert_array_equal(found[0], images.normalize(expected, CONFIG))
    np.testing.assert_array_equal(found[1], images.prepare([colour[..., 0]], CONFIG)[0])


def test_what_is_no_image(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    for image, message in [
        (tmp_path / "text.png", "cannot be read as an image"),
        (tmp_path / "missing.png", "missing.png cannot be read"),
        (7, "a int is not an image"),
        (np.zeros((4, 4, 3)), "uint8 of shape .*not float64"),
        (np.zeros((4, 4, 2), np.uint8), r"not uint8 \(4, 4, 2\)"),
        (np.zeros(4, np.uint8), r"not uint8 \(4,\)"),
    ]:
        with pytest.raises(JaxqError, match=message):
            images.prepare([image], CONFIG)
    five = CONFIG.replace(channels=5, mean=(0.5,) * 5, std=(0.5,) * 5, crop=1.0)
    with pytest.raises(JaxqError, match="3 channels, the model wants 5"):
        images.fit(picture(32, 32, 3), five)
