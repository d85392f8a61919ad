"""What a data set is, once it is in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with their classes, for training and for testing.

    `train_images`, `test_images`: uint8, shape (N, H, W, C). `train_labels`, `test_labels`: int32,
    shape (N,), from 0 to `classes` - 1. `mean` and `std` are those of the training images, one
    for each channel, of pixels divided by 255. `source` says to a human where it was read from.
    """

    name: str
    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.int32]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.int32]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
