"""Where the tokens of a video and of the actions between its frames are, and the rotary embedding of a place.

NumPy: these numbers are constants of a network, or inputs of its exported graphs, and need float64.
"""

from __future__ import annotations

import numpy as np


def grid(frames: int, rows: int, columns: int, first: int = 0) -> np.ndarray:
    """Places (T, 3) of a video's tokens: frame, row, column; the first frame is number `first`."""
    axes = (np.arange(first, first + frames), np.arange(rows), np.arange(columns))
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3).astype(float)


def between(frames: int, count: int, first: int = 0) -> np.ndarray:
    """Places (T, 3) of `count` actions a frame, evenly between it and the next; off the picture."""
    steps = np.arange(1, count + 1) / (count + 1)
    frame = (np.arange(first, first + frames)[:, None] + steps).ravel()
    return np.stack([frame, np.full_like(frame, -1), np.full_like(frame, -1)], 1)


def rotary(places: np.ndarray, size: int, base: float = 10000.0) -> np.ndarray:
    """Cosine and sine (2, T, size/2) float32 by which the pairs of a head of `size` numbers turn at places (T, n).

    The n axes share a head's pairs, the first takes the rest. Computed in float64.
    """
    count = places.shape[1]
    pairs = [size // 2 - (count - 1) * (size // 2 // count), *[size // 2 // count] * (count - 1)]
    angle = np.concatenate([places[:, n : n + 1] * base ** -(np.arange(own) / own) for n, own in enumerate(pairs)], 1)
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)
