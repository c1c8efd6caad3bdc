"""Cut small pictures from two photographs and prepare them for an autoencoder."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_sample_images

SIDE = 8  # pixels
PLAIN = 0.003  # a patch with less variance (grey is 0 to 1) is plain, like sky, and keeps a low contrast
SMOOTH = 1.0  # directions with less variance than this times the mean are mostly noise, and stay low


def natural_patches(count: int, seed: int = 0) -> np.ndarray:
    """Return `count` whitened patches: float64, shape `(count, SIDE * SIDE)`, within +-0.9, which tanh can reach.

    They come in random order from random places of scikit-learn's two sample photographs, in grey.
    """
    rng = np.random.default_rng(seed)
    photos = [photo.mean(axis=2) / 255 for photo in load_sample_images().images]
    shares = [count // 2, count - count // 2]
    cut = np.concatenate([_cut(photo, share, rng) for photo, share in zip(photos, shares, strict=True)])
    return whiten(rng.permutation(cut))


def whiten(patches: np.ndarray) -> np.ndarray:
    """Return `patches` with equal brightness and contrast, pixels decorrelated (ZCA), scaled to +-0.9.

    Argument and result: float64, shape `(count, pixels)`. Neighbouring pixels of a photograph are nearly equal, and
    a network learns only that unless it is removed: Olshausen & Field, Nature 381 (1996); Ng, CS294A lecture notes,
    "Sparse autoencoder" (2011).
    """
    patches = patches - patches.mean(axis=1, keepdims=True)
    patches /= np.sqrt(patches.var(axis=1, keepdims=True) + PLAIN)
    variances, directions = np.linalg.eigh(patches.T @ patches / len(patches))
    patches = patches @ (directions / np.sqrt(variances + SMOOTH * variances.mean()) @ directions.T)
    return 0.9 * np.clip(patches / (3 * patches.std()), -1, 1)


def _cut(photo: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    places = np.lib.stride_tricks.sliding_window_view(photo, (SIDE, SIDE))
    rows = rng.integers(places.shape[0], size=count)
    columns = rng.integers(places.shape[1], size=count)
    return places[rows, columns].reshape(count, SIDE * SIDE)
