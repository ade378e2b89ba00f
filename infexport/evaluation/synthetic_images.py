"""Images to judge by where there are none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MANY = 4096
"""Patches of an image of which one is enough."""


def synthetic_image(height: int, width: int) -> NDArray[np.uint8]:
    """An image with structure at every scale, the same every time: sums of random cosines, and noise."""
    random = np.random.default_rng(height * 65_537 + width)
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    image = random.normal(0, 12, (height, width, 3))
    for octave in range(6):
        frequency = random.normal(0, 2.0**octave, (2, 3))
        phase = random.uniform(0, 2 * np.pi, 3)
        image += 60 / (octave + 1) * np.cos(2 * np.pi * (frequency[0] * y + frequency[1] * x) + phase)
    return np.clip(image + 128, 0, 255).astype(np.uint8)


def synthetic_batch(height: int, width: int, patch: int) -> NDArray[np.uint8]:
    """Three different images of one size, `[B, H, W, 3]`; one where that is many tokens."""
    image = synthetic_image(height, width)
    return np.stack([image, image[::-1], 255 - image][: 3 if height * width <= MANY * patch**2 else 1])
