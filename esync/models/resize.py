"""Images brought to the size that a model wants."""

from __future__ import annotations

import jax


def resize(images: jax.Array, size: int | None) -> jax.Array:
    """`images`, shape (N, H, W, C), bilinearly resized to (N, size, size, C); None leaves them."""
    n, height, width, channels = images.shape
    if size is None or (height, width) == (size, size):
        return images
    resized: jax.Array = jax.image.resize(images, (n, size, size, channels), method="bilinear")
    return resized
