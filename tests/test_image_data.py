"""The IDX format byte by byte, draws, and how images become what a model takes."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from jaxq import image_data
from jaxq.errors import JaxqError
from jaxq.image_data import Images, Split, batches, calibration, fashion_mnist, load, read_idx, read_pair
from jaxq.models.vision_config import VisionConfig

# Two images of 2 x 3 pixels, written out by hand.
IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes([0, 1, 2, 3, 4, 255, 9, 8, 7, 6, 5, 4])
LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 2]) + bytes([1, 0])


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data, mtime=0))
    return path


def folder(path: Path, images: bytes = IMAGES, labels: bytes = LABELS) -> Path:
    write(path / "some-images-idx3-ubyte.gz", images)
    write(path / "some-labels-idx1-ubyte.gz", labels)
    return path


def some(count: int = 20) -> Images:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8)
    return Images(images, np.arange(count, dtype=np.int32), tuple(map(str, range(count))))


def test_idx_by_hand(tmp_path):
    found = read_idx(write(tmp_path / "x.gz", IMAGES), axes=3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, [[[0, 1, 2], [3, 4, 255]], [[9, 8, 7], [6, 5, 4]]])


def test_a_pair_of_files(tmp_path):
    found = read_pair(folder(tmp_path), "some", ("cat", "dog"))
    assert found.images.shape == (2, 2, 3, 1) and found.images[0, 1, 2, 0] == 255
    assert found.labels.dtype == np.int32 and found.labels.tolist() == [1, 0]
    assert found.names == ("cat", "dog") and len(found) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no IDX file of bytes with 3 axes: it starts with $"),
        (LABELS, "no IDX file of bytes with 3 axes: it starts with 00 00 08 01"),
        (b"\0\0\x0d\3" + IMAGES[4:], "starts with 00 00 0d 03"),  # float32
        (IMAGES[:15], "header ends early"),
        (IMAGES[:-1], "its header says 12 bytes, it holds 11"),
        (IMAGES[:16], "its header says 12 bytes, it holds 0"),
        (IMAGES + b"\0", "its header says 12 bytes, it holds more"),
        (IMAGES[:4] + b"\xff" * 12, "claims 7922816249581759352|claims 792281"),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path, data, message):
    with pytest.raises(JaxqError, match=message):
        read_idx(write(tmp_path / "x.gz", data), axes=3)


@pytest.mark.parametrize("damage", ["cut off", "not compressed", "wrong checksum"])
def test_a_damaged_gzip_file_is_refused(tmp_path, damage):
    whole = gzip.compress(IMAGES)
    data = {"cut off": whole[:-12], "not compressed": IMAGES, "wrong checksum": whole[:-8] + bytes(8)}[damage]
    (tmp_path / "x.gz").write_bytes(data)
    with pytest.raises(JaxqError, match="cannot read .*x.gz"):
        read_idx(tmp_path / "x.gz", axes=3)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(JaxqError, match="cannot read .*No such file"):
        read_idx(tmp_path / "x.gz", axes=3)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    three = LABELS[:7] + b"\3" + b"\0\0\0"
    with pytest.raises(JaxqError, match="2 some images, 3 labels"):
        read_pair(folder(tmp_path, labels=three), "some", ("cat", "dog"))
    with pytest.raises(JaxqError, match="not numbers of its 1 classes"):
        read_pair(folder(tmp_path), "some", ("cat",))
    with pytest.raises(JaxqError, match="not numbers"):
        read_pair(folder(tmp_path, IMAGES[:7] + bytes(9), LABELS[:7] + b"\0"), "some", ("cat", "dog"))


def test_calibration_draws_different_images_in_their_order():
    data = some()
    drawn = calibration(data, 8, seed=3)
    assert len(drawn) == 8 and (np.diff(drawn.labels) > 0).all()
    np.testing.assert_array_equal(drawn.images, data.images[drawn.labels])
    assert drawn.names == data.names
    np.testing.assert_array_equal(calibration(data, 8, seed=3).labels, drawn.labels)
    assert calibration(data, 8, seed=4).labels.tolist() != drawn.labels.tolist()
    np.testing.assert_array_equal(calibration(data, 20).labels, data.labels)


@pytest.mark.parametrize("count", [0, 21])
def test_calibration_of_too_few_or_too_many(count):
    with pytest.raises(JaxqError, match=f"{count} images asked for, there are 20"):
        calibration(some(), count)


def test_batches_are_what_the_model_takes():
    config = VisionConfig("vit", 4, 2, 8, (1,), (2,), channels=1, mean=(0.5,), std=(0.25,), crop=1.0)
    data = some()
    found = batches(data, config, 5)
    assert [x.shape for x in found] == [(5, 4, 4, 1)] * 4 and found[0].dtype == np.float32
    np.testing.assert_allclose(np.concatenate(found), (data.images / 255 - 0.5) / 0.25, atol=1e-6)
    for size in (0, 7, 21):
        with pytest.raises(JaxqError, match=f"20 images do not make whole batches of {size}"):
            batches(data, config, size)


def test_batches_of_another_size_and_of_three_channels():
    config = VisionConfig("vit", 8, 2, 8, (1,), (2,))
    assert [x.shape for x in batches(some(4), config, 4)] == [(4, 8, 8, 3)]


def test_unknown_names_are_refused():
    with pytest.raises(JaxqError, match="no image data set 'cifar': choose one of fashion-mnist"):
        load("cifar", "test")
    with pytest.raises(JaxqError, match="splits train and test, not 'validation'"):
        fashion_mnist("validation")  # type: ignore


def test_load_hands_on_split_and_cache(monkeypatch):
    monkeypatch.setitem(image_data.NAMES, "tiny", lambda split, cache: (split, cache))
    assert load("tiny", "test", "here") == ("test", "here")


@pytest.mark.slow
def test_the_real_data_set():
    sizes: dict[Split, int] = {"train": 60000, "test": 10000}
    for split, count in sizes.items():
        data = load("fashion-mnist", split)
        assert data.images.shape == (count, 28, 28, 1)
        assert np.bincount(data.labels).tolist() == [count // 10] * 10 and len(data.names) == 10
