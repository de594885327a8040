"""Images as their models want them: resized, cropped, scaled to 0..1, normalised, as the originals do it.

Resizing is Pillow's (antialiased, rounded to 8 bits), cropping torchvision's, so that accuracies can be compared
with published ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

from jaxq.errors import JaxqError
from jaxq.models.vision_config import VisionConfig


def prepare(images: Iterable[Any], config: VisionConfig) -> Float32[np.ndarray, "B S S C"]:
    """Images ready for `VisionModel.apply`.

    images: files, Pillow images, or uint8 arrays (H, W), (H, W, 1) or (H, W, 3), of any sizes; one uint8 array of
        several images is fine too. Grey images get the channels that the model wants.
    """
    return normalize(np.stack([fit(image, config) for image in images]), config)


def normalize(pixels: UInt8[np.ndarray, "*B C"], config: VisionConfig) -> Float32[np.ndarray, "*B C"]:
    """0..255 to 0..1, less the mean, over the deviation."""
    mean, std = (np.asarray(v, np.float32) for v in (config.mean, config.std))
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def fit(image: Any, config: VisionConfig) -> UInt8[np.ndarray, "S S C"]:
    """One image resized and cropped to what the config asks for, still 0..255."""
    pixels = image if isinstance(image, np.ndarray) else read(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,)):
        raise JaxqError(
            f"an image is uint8 of shape (H, W), (H, W, 1) or (H, W, 3), not {pixels.dtype} {pixels.shape}"
        )
    pixels = resize(pixels.squeeze(2) if pixels.shape[2:] == (1,) else pixels, config)
    height, width, side = *pixels.shape[:2], config.image_size
    top, left = round((height - side) / 2), round((width - side) / 2)
    return channels(pixels[top : top + side, left : left + side], config.channels)


def resize(pixels: UInt8[np.ndarray, "H W *C"], config: VisionConfig) -> UInt8[np.ndarray, "I J *C"]:
    """The shorter side (or, where the config squashes, both) becomes image_size / crop."""
    height, width = pixels.shape[:2]
    side = math.floor(config.image_size / config.crop + 1e-6)
    short = min(height, width)
    rows, columns = (side, side) if config.squash else (int(side * height / short), int(side * width / short))
    if (rows, columns) == (height, width):
        return pixels
    known = PIL.Image.Resampling
    how = {"bicubic": known.BICUBIC, "bilinear": known.BILINEAR}[config.interpolation]
    return np.asarray(PIL.Image.fromarray(pixels).resize((columns, rows), how))


def channels(pixels: UInt8[np.ndarray, "S S *C"], wanted: int) -> UInt8[np.ndarray, "S S C"]:
    """Grey becomes `wanted` equal channels; colour becomes a grey one if wanted (ITU-R 601, as Pillow)."""
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], wanted, axis=2)
    if wanted == 1:
        luma = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
        return ((luma + 0x8000) >> 16).astype(np.uint8)[:, :, None]
    if wanted != 3:
        raise JaxqError(f"a colour image has 3 channels, the model wants {wanted}")
    return pixels


def read(image: Any) -> UInt8[np.ndarray, "H W 3"]:
    """A file or a Pillow image, as RGB. Errors: JaxqError for a file that cannot be read."""
    if not isinstance(image, (str, Path)):
        if not isinstance(image, PIL.Image.Image):
            raise JaxqError(
                f"a {type(image).__name__} is not an image: give a file, a Pillow image or a uint8 array"
            )
        return np.asarray(image.convert("RGB"))
    try:
        with PIL.Image.open(image) as file:
            return np.asarray(file.convert("RGB"))
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise JaxqError(f"{image} cannot be read as an image: {error}") from None
