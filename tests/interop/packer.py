"""The SqueezeLLM packer, written again from the description of its files: NumPy only, nothing of jaxq."""

import numpy as np


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 (in * bits / 32, out) of codes (out, in): each output's bits, lowest first, one after the other."""
    stream = (codes[..., None].astype(np.int64) >> np.arange(bits)) & 1
    packed = np.packbits(stream.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return np.ascontiguousarray(packed.view("<i4").T)


def pack(w: np.ndarray, centroids: np.ndarray, labels: np.ndarray, removed: np.ndarray) -> dict[str, np.ndarray]:
    """Tensors of one layer from its weights (out, in), centroids (out, 2^b), labels and mask of removed ones."""
    zero = np.abs(centroids).argmin(axis=1)[:, None]
    nearest_zero = np.take_along_axis(centroids, zero, axis=1)
    tensors = {
        "qweight": words(np.where(removed, zero, labels), centroids.shape[1].bit_length() - 1),
        "lookup_table": centroids.astype(np.float32),
    }
    if removed.any():
        outputs, inputs = np.nonzero(removed)
        tensors["rows"] = np.searchsorted(outputs, np.arange(len(w) + 1)).astype(np.int32)
        tensors["cols"] = inputs.astype(np.int32)
        tensors["vals"] = (w - nearest_zero)[removed].astype(np.float32)
    return tensors


def layer(w: np.ndarray, bits: int, share: float, rng: np.random.Generator) -> tuple[dict, np.ndarray]:
    """(tensors, what the layer's weights are) of weights (out, in): centroids in no order, a share removed."""
    # In C order: safetensors writes the memory of an array, whatever its strides say.
    spread = np.ascontiguousarray(np.quantile(w, np.linspace(0.02, 0.98, 2**bits), axis=1).T)
    # A grid on which every sum of the tests is exact.
    spread = np.round(spread * 4096) / 4096
    centroids = rng.permuted(spread, axis=1)
    labels = np.abs(w[..., None] - centroids[:, None]).argmin(axis=-1)
    removed = rng.random(w.shape) < share
    kept = np.take_along_axis(centroids, labels, axis=1)
    return pack(w, centroids, labels, removed), np.where(removed, w, kept).astype(np.float32, order="C")


def weights(rng: np.random.Generator, out_size: int, in_size: int) -> np.ndarray:
    return np.round(rng.normal(size=(out_size, in_size)) * 4096) / 4096
