"""Fashion-MNIST: 70,000 grey images of clothes, 28 x 28 pixels, in 10 classes.

H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
Learning Algorithms" (2017, arXiv:1708.07747); MIT licence;
https://github.com/zalandoresearch/fashion-mnist.

The four files are in the IDX format: two zero bytes, a type (8 is uint8), the number of dimensions,
each dimension as a big-endian uint32, and the values, the last dimension varying fastest.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esync.data import files
from esync.data.dataset import Dataset
from esync.errors import DataError

NAME = "fashion-mnist"
BASE_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"

# SHA-256 of what is inside the .gz: a distribution may compress the files anew (Debian's have
# another gzip header), and the MD5 sums that the authors publish are those of their own .gz files.
# The contents digested here were checked against those sums.
SHA256 = {
    TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

CLASSES = 10
# Of the 60,000 training images, pixels divided by 255.
MEAN = (0.28604,)
STD = (0.35302,)

REMEDY = (
    "apt-get install dataset-fashion-mnist, "
    f"or pass --data-dir or set {files.ENVIRONMENT} to the directory of the four official .gz files"
)


def find(data_dir: str | Path | None) -> Path | None:
    """The directory from which `load` would read without downloading, or None."""
    return files.locate(NAME, list(SHA256), data_dir)


def load(data_dir: str | Path | None, download: bool, say: files.Say) -> Dataset:
    """Read the four files, downloading them first if they are nowhere and that is allowed.

    Raises DataError if a file is missing, damaged, or not the official one.
    """
    place = find(data_dir)
    if place is None:
        if data_dir is not None or not download:
            raise files.missing(NAME, list(SHA256), data_dir, REMEDY)
        place = _fetch(say)
    train_images, train_labels = _read_pair(place, TRAIN_IMAGES, TRAIN_LABELS)
    test_images, test_labels = _read_pair(place, TEST_IMAGES, TEST_LABELS)
    return Dataset(
        name=NAME,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=CLASSES,
        mean=MEAN,
        std=STD,
        source=str(place),
    )


def _fetch(say: files.Say) -> Path:
    """Download what the cache lacks; the directory."""
    place = files.cache(NAME)
    for file in SHA256:
        if not files.is_file(place / file):
            files.download(
                BASE_URL + file,
                place / file,
                partial(_contents, file=file),
                say,
                REMEDY,
            )
    return place


def _contents(path: Path, file: str) -> bytes:
    """The decompressed bytes of `path`, which must be those of the official `file`."""
    try:
        contents = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(
            f"{path} is truncated or not a gzip file: {e}. What to do: replace it: {REMEDY}."
        ) from e
    except OSError as e:
        raise DataError(f"cannot read {path}: {e}. What to do: {REMEDY}.") from e
    found = hashlib.sha256(contents).hexdigest()
    files.check_digest(found, SHA256[file], f"the content of {path}", f"replace it: {REMEDY}")
    return contents


def _read_pair(
    place: Path, images_file: str, labels_file: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Images, uint8 (N, H, W, 1), and labels, int32 (N,), which must be equally many."""
    images = parse_idx(_contents(place / images_file, images_file), place / images_file, 3)
    labels = parse_idx(_contents(place / labels_file, labels_file), place / labels_file, 1)
    if len(images) != len(labels):
        raise DataError(
            f"{place / images_file} holds {len(images)} images, "
            f"but {place / labels_file} {len(labels)} labels. What to do: {REMEDY}."
        )
    return images[..., np.newaxis], labels.astype(np.int32)


def parse_idx(contents: bytes, path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """The array in the IDX file `contents`, which was read from `path`.

    Raises DataError unless it holds uint8 values in `dimensions` dimensions, all of them.
    """
    expected = bytes([0, 0, 8, dimensions])
    start = 4 + 4 * dimensions
    if contents[:4] != expected or len(contents) < start:
        raise DataError(
            f"{path} is not an IDX file of uint8 in {dimensions} dimension(s): "
            f"it starts with {contents[:4].hex()}, expected {expected.hex()} and the dimensions."
        )
    shape = tuple(int(n) for n in np.frombuffer(contents[4:start], ">u4"))
    if len(contents) != start + math.prod(shape):
        raise DataError(
            f"{path} is truncated or too long: its header announces values of shape {shape}, "
            f"but {len(contents) - start} bytes follow."
        )
    return np.frombuffer(contents, np.uint8, offset=start).reshape(shape)
