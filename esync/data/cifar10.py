"""CIFAR-10: 60,000 colour images, 32 x 32 pixels, in 10 classes.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009);
https://www.cs.toronto.edu/~kriz/cifar.html. Read from the "binary version", either the archive
cifar-10-binary.tar.gz as it is, or the directory cifar-10-batches-bin that it unpacks to. A batch
file is a run of records: one byte, the label, then 3072 bytes, the red, green and blue values, each
row by row.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from esync.data import files
from esync.data.dataset import Dataset
from esync.errors import DataError

NAME = "cifar10"
ARCHIVE = "cifar-10-binary.tar.gz"
BASE_URL = "https://www.cs.toronto.edu/~kriz/"
# Published on the data set's page, for the archive.
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"

UNPACKED = "cifar-10-batches-bin"
TRAIN_BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_BATCHES = ("test_batch.bin",)
BATCHES = TRAIN_BATCHES + TEST_BATCHES
RECORDS = 10_000
RECORD_BYTES = 1 + 3 * 32 * 32

CLASSES = 10
# Of the 50,000 training images, pixels divided by 255: red, green, blue.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

REMEDY = (
    f"get {ARCHIVE} from https://www.cs.toronto.edu/~kriz/cifar.html, packed or unpacked, "
    f"and pass --data-dir or set {files.ENVIRONMENT} to its directory"
)


def find(data_dir: str | Path | None) -> Path | None:
    """The directory or archive from which `load` would read without downloading, or None.

    In each place an unpacked data set goes before an archive. The place may also be the unpacked
    directory itself.
    """
    for place in files.places(NAME, data_dir):
        for directory in (place / UNPACKED, place):
            if all(files.is_file(directory / batch) for batch in BATCHES):
                return directory
        if files.is_file(place / ARCHIVE):
            return place / ARCHIVE
    return None


def load(data_dir: str | Path | None, download: bool, say: files.Say) -> Dataset:
    """Read the six batches, downloading the archive first if it is nowhere and that is allowed.

    Raises DataError if the data set is missing, damaged, or not the official one.
    """
    found = find(data_dir)
    if found is None:
        if data_dir is not None or not download:
            raise files.missing(NAME, [ARCHIVE], data_dir, REMEDY)
        found = files.cache(NAME) / ARCHIVE
        files.download(BASE_URL + ARCHIVE, found, _verify, say, REMEDY)
    batches = _unpacked(found) if found.is_dir() else _packed(found)
    train_images, train_labels = _join(found, batches, TRAIN_BATCHES)
    test_images, test_labels = _join(found, batches, TEST_BATCHES)
    return Dataset(
        name=NAME,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=CLASSES,
        mean=MEAN,
        std=STD,
        source=str(found),
    )


def _verify(archive: Path) -> None:
    files.check_digest(files.digest_of(archive, "md5"), MD5, str(archive), f"replace it: {REMEDY}")


def _unpacked(directory: Path) -> dict[str, bytes]:
    """The contents of the batch files, by name."""
    try:
        return {batch: (directory / batch).read_bytes() for batch in BATCHES}
    except OSError as e:
        raise DataError(f"cannot read {e.filename}: {e}. What to do: {REMEDY}.") from e


def _packed(archive: Path) -> dict[str, bytes]:
    """The contents of the batch files in the archive, by name; nothing is written to disk."""
    contents: dict[str, bytes] = {}
    try:
        _verify(archive)
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                batch = Path(member.name).name
                file = tar.extractfile(member) if batch in BATCHES else None
                if file is not None:
                    contents[batch] = file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as e:
        raise DataError(f"cannot read {archive}: {e}. What to do: {REMEDY}.") from e
    absent = [batch for batch in BATCHES if batch not in contents]
    if absent:
        raise DataError(f"{archive} lacks {', '.join(absent)}. What to do: {REMEDY}.")
    return contents


def _join(
    found: Path, batches: dict[str, bytes], names: tuple[str, ...]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """The images, uint8 (N, 32, 32, 3), and labels, int32 (N,), of the batches in `names`."""
    records = np.concatenate([_records(batches[name], found / name) for name in names])
    labels = records[:, 0].astype(np.int32)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def _records(contents: bytes, path: Path) -> npt.NDArray[np.uint8]:
    """The records of one batch, uint8 (N, RECORD_BYTES): complete, and labelled 0 to 9."""
    expected_bytes = RECORDS * RECORD_BYTES
    if len(contents) != expected_bytes:
        raise DataError(
            f"{path} is truncated or too long: expected {RECORDS} records of {RECORD_BYTES} bytes, "
            f"{expected_bytes} bytes, found {len(contents)}. What to do: replace it: {REMEDY}."
        )
    records = np.frombuffer(contents, np.uint8).reshape(RECORDS, RECORD_BYTES)
    largest = int(np.max(records[:, 0]))
    if largest >= CLASSES:
        raise DataError(
            f"{path} is damaged: expected labels from 0 to {CLASSES - 1}, found {largest}. "
            f"What to do: replace it: {REMEDY}."
        )
    return records
