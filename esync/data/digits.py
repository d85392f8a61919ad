"""Handwritten digits of 8 x 8 pixels, shipped with esync: a cluster to try without a download.

The test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine
Learning Repository, 1998, doi:10.24432/C50P49, CC BY 4.0); digits.md has the particulars.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np

from esync.data import files
from esync.data.dataset import Dataset
from esync.errors import DataError

NAME = "digits"
FILE = "digits.npz"
CLASSES = 10
# The values in the file count the dark pixels of a block of 4 x 4.
LARGEST_VALUE = 16
# Of the 1437 training images, pixels divided by 255.
MEAN = (0.30580,)
STD = (0.37605,)


def find(data_dir: str | Path | None) -> Path | None:
    """The packaged file; `data_dir` has no part in it. None if the installation lacks the file."""
    path = Path(str(resources.files("esync.data") / FILE))
    return path if path.is_file() else None


def load(data_dir: str | Path | None, download: bool, say: files.Say) -> Dataset:
    """Read the packaged file; the arguments are there because every data set has them.

    Pixels become round(value * 255 / 16). With the images sorted by digit (otherwise in the
    file's order), every fifth, from the first on, is for testing: 360 images, 35 to 37 of each
    digit, without a random number generator. The other 1437 are for training. Both keep the
    file's order.

    Raises DataError if the installation lacks the file.
    """
    path = find(data_dir)
    if path is None:
        raise DataError(
            f"{FILE} is missing from the installation of esync. What to do: install esync again."
        )
    with np.load(path) as arrays:
        values, labels = arrays["images"], arrays["labels"].astype(np.int32)
    images = np.rint(values * (255 / LARGEST_VALUE)).astype(np.uint8)[..., np.newaxis]
    testing = np.zeros(len(labels), bool)
    testing[np.argsort(labels, kind="stable")[::5]] = True
    return Dataset(
        name=NAME,
        train_images=images[~testing],
        train_labels=labels[~testing],
        test_images=images[testing],
        test_labels=labels[testing],
        classes=CLASSES,
        mean=MEAN,
        std=STD,
        source="shipped with esync",
    )
