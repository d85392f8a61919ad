"""Data sets: where they are looked for, how they are downloaded, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from esync import data
from esync.data import cifar10, fashion_mnist, files
from esync.errors import DataError

SYSTEM = files.SYSTEM


@pytest.fixture(autouse=True)
def a_machine_without_data(tmp_path, monkeypatch):
    """No data set but the packaged one is anywhere, and there is nothing but this machine."""
    monkeypatch.delenv(files.ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(files, "SYSTEM", tmp_path / "system")
    monkeypatch.setattr(fashion_mnist, "BASE_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(cifar10, "BASE_URL", "http://127.0.0.1:9/")


class Mirror:
    """A local web server for the files in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []
        self.announce_more_bytes = 0
        self.before_answer = lambda: None
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requests.append(self.path)
                mirror.before_answer()
                file = mirror.root / self.path.lstrip("/")
                if not file.is_file():
                    self.send_error(404)
                    return
                body = file.read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body) + mirror.announce_more_bytes))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def mirror(tmp_path):
    root = tmp_path / "mirror"
    root.mkdir()
    mirror = Mirror(root)
    yield mirror
    mirror.close()


def idx(values: np.ndarray) -> bytes:
    dimensions = b"".join(n.to_bytes(4, "big") for n in values.shape)
    return bytes([0, 0, 8, values.ndim]) + dimensions + values.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(monkeypatch):
    """A function that writes a tiny Fashion-MNIST, taken for the official one, into a directory."""
    r = np.random.default_rng(0)
    contents = {
        fashion_mnist.TRAIN_IMAGES: idx(r.integers(0, 256, (6, 28, 28))),
        fashion_mnist.TRAIN_LABELS: idx(np.arange(6)),
        fashion_mnist.TEST_IMAGES: idx(r.integers(0, 256, (3, 28, 28))),
        fashion_mnist.TEST_LABELS: idx(np.arange(3)),
    }
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    monkeypatch.setattr(fashion_mnist, "SHA256", digests)

    def write(directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            (directory / file).write_bytes(gzip.compress(content))
        return directory

    return write


@pytest.fixture
def cifar(monkeypatch):
    """A function that writes a tiny CIFAR-10, taken for the official one: its six batch files."""
    monkeypatch.setattr(cifar10, "RECORDS", 4)

    def write(directory: Path) -> Path:
        r = np.random.default_rng(0)
        directory.mkdir(parents=True, exist_ok=True)
        for batch in cifar10.BATCHES:
            records = r.integers(0, 256, (4, cifar10.RECORD_BYTES), dtype=np.uint8)
            records[:, 0] = [0, 1, 2, 9]
            (directory / batch).write_bytes(records.tobytes())
        return directory

    return write


@pytest.fixture
def cifar_archive(cifar, tmp_path, monkeypatch):
    """A function that writes the tiny CIFAR-10 as an archive into a directory."""

    def write(directory: Path, without: str = "") -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        archive = directory / cifar10.ARCHIVE
        with tarfile.open(archive, "w:gz") as tar:
            for file in sorted(cifar(tmp_path / "to-pack").iterdir()):
                if file.name != without:
                    tar.add(file, f"{cifar10.UNPACKED}/{file.name}")
            note = tarfile.TarInfo(f"{cifar10.UNPACKED}/readme.html")
            tar.addfile(note, io.BytesIO())
        monkeypatch.setattr(cifar10, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
        return archive

    return write


# Names


def test_an_unknown_data_set_is_refused_with_the_nearest_name():
    with pytest.raises(DataError, match=r"unknown data set 'cifar-10'. Did you mean 'cifar10'\?"):
        data.load("cifar-10")
    with pytest.raises(DataError, match="unknown data set"):
        data.find("cifar-10")


def test_the_data_sets_are_listed_by_name():
    assert data.names() == ["cifar10", "digits", "fashion-mnist"]


def test_reading_data_does_not_import_jax():
    program = "import sys, esync.data as d; d.load('digits'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Digits


def test_digits_are_shipped_and_divided_evenly_among_the_classes():
    digits = data.load("digits", download=False)
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_labels.dtype == np.int32
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    assert set(np.bincount(digits.test_labels, minlength=digits.classes)) <= {35, 36, 37}


def test_the_published_mean_and_deviation_of_digits_are_those_of_its_training_images():
    digits = data.load("digits")
    pixels = digits.train_images / 255
    assert digits.mean == pytest.approx([pixels.mean()], abs=1e-5)
    assert digits.std == pytest.approx([pixels.std()], abs=1e-5)


def test_the_packaged_digits_are_small_and_found():
    path = data.find("digits")
    assert path is not None
    assert path.stat().st_size < 100_000


# The search


def test_fashion_mnist_is_read_from_the_directory_that_the_user_names(fashion, tmp_path):
    place = fashion(tmp_path / "mine")
    read = data.load("fashion-mnist", place)
    assert read.train_images.shape == (6, 28, 28, 1)
    assert read.test_images.shape == (3, 28, 28, 1)
    assert read.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert read.source == str(place)


def test_a_named_directory_may_hold_several_data_sets_in_subdirectories(fashion, tmp_path):
    place = fashion(tmp_path / "all" / "fashion-mnist")
    assert data.find("fashion-mnist", tmp_path / "all") == place


def test_the_environment_goes_before_the_system_and_the_system_before_the_cache(
    fashion, tmp_path, monkeypatch
):
    cached = fashion(tmp_path / "cache" / "esync" / "fashion-mnist")
    assert data.find("fashion-mnist") == cached
    system = fashion(tmp_path / "system" / "fashion-mnist")
    assert data.find("fashion-mnist") == system
    monkeypatch.setenv(files.ENVIRONMENT, str(tmp_path / "environment"))
    assert data.find("fashion-mnist") == system
    environment = fashion(tmp_path / "environment")
    assert data.find("fashion-mnist") == environment


def test_a_named_directory_without_the_files_is_an_error_even_if_others_have_them(
    fashion, tmp_path
):
    fashion(tmp_path / "system" / "fashion-mnist")
    with pytest.raises(DataError, match="not found") as error:
        data.load("fashion-mnist", tmp_path / "empty")
    assert str(tmp_path / "empty") in str(error.value)
    assert str(tmp_path / "system") not in str(error.value)


def test_a_data_set_that_is_nowhere_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError) as error:
        data.load("fashion-mnist", download=False)
    for words in (fashion_mnist.TRAIN_IMAGES, "dataset-fashion-mnist", "--data-dir", "digits"):
        assert words in str(error.value)


def test_an_incomplete_directory_is_an_error_that_names_what_is_lacking(fashion, tmp_path):
    place = fashion(tmp_path / "mine")
    (place / fashion_mnist.TEST_LABELS).unlink()
    with pytest.raises(DataError, match=f"lacks {fashion_mnist.TEST_LABELS}"):
        data.load("fashion-mnist", place)


# Damage


def test_a_truncated_gzip_file_is_refused(fashion, tmp_path):
    file = fashion(tmp_path) / fashion_mnist.TRAIN_IMAGES
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="truncated") as error:
        data.load("fashion-mnist", tmp_path)
    assert str(file) in str(error.value)


def test_a_file_that_is_not_gzip_is_refused(fashion, tmp_path):
    (fashion(tmp_path) / fashion_mnist.TRAIN_LABELS).write_bytes(b"<html>Sign in</html>")
    with pytest.raises(DataError, match="not a gzip file"):
        data.load("fashion-mnist", tmp_path)


def test_other_content_than_the_official_is_refused_with_both_digests(fashion, tmp_path):
    file = fashion(tmp_path) / fashion_mnist.TRAIN_LABELS
    content = idx(np.zeros(6))
    file.write_bytes(gzip.compress(content))
    with pytest.raises(DataError) as error:
        data.load("fashion-mnist", tmp_path)
    assert str(file) in str(error.value)
    assert fashion_mnist.SHA256[fashion_mnist.TRAIN_LABELS] in str(error.value)
    assert hashlib.sha256(content).hexdigest() in str(error.value)


@pytest.mark.parametrize("cut", [0, 3, 7, 9])
def test_an_idx_file_without_its_whole_header_is_refused(cut):
    with pytest.raises(DataError, match="not an IDX file"):
        fashion_mnist.parse_idx(idx(np.zeros((2, 2, 2)))[:cut], Path("x"), 3)


@pytest.mark.parametrize("content", [idx(np.zeros(5))[:-1], idx(np.zeros(5)) + b"?"])
def test_an_idx_file_of_another_length_than_announced_is_refused(content):
    with pytest.raises(DataError, match=r"announces values of shape \(5,\)"):
        fashion_mnist.parse_idx(content, Path("x"), 1)


def test_the_official_fashion_mnist_passes_its_checks(monkeypatch):
    monkeypatch.setattr(files, "SYSTEM", SYSTEM)
    if data.find("fashion-mnist") is None:
        pytest.skip("the real Fashion-MNIST is not here: apt-get install dataset-fashion-mnist")
    read = data.load("fashion-mnist")
    assert read.train_images.shape == (60_000, 28, 28, 1)
    assert np.bincount(read.test_labels).tolist() == [1000] * 10
    share = np.bincount(read.train_images.ravel(), minlength=256) / read.train_images.size
    values = np.arange(256) / 255
    mean = (share * values).sum()
    assert read.mean == pytest.approx([mean], abs=1e-5)
    assert read.std == pytest.approx([np.sqrt((share * (values - mean) ** 2).sum())], abs=1e-5)


# The download


def test_what_is_nowhere_is_downloaded_once_into_the_cache(fashion, mirror, tmp_path, monkeypatch):
    fashion(mirror.root)
    monkeypatch.setattr(fashion_mnist, "BASE_URL", mirror.url)
    said: list[str] = []
    first = data.load("fashion-mnist", say=said.append)
    second = data.load("fashion-mnist", say=said.append)
    assert (first.train_images == second.train_images).all()
    assert len(mirror.requests) == len(fashion_mnist.SHA256)
    assert sum("downloading" in line for line in said) == len(fashion_mnist.SHA256)
    cached = sorted(file.name for file in (tmp_path / "cache/esync/fashion-mnist").iterdir())
    assert cached == sorted(fashion_mnist.SHA256)


def test_a_download_of_the_wrong_content_leaves_nothing_behind(
    fashion, mirror, tmp_path, monkeypatch
):
    fashion(mirror.root)
    (mirror.root / fashion_mnist.TRAIN_IMAGES).write_bytes(gzip.compress(b"something else"))
    monkeypatch.setattr(fashion_mnist, "BASE_URL", mirror.url)
    with pytest.raises(DataError, match="expected the digest") as error:
        data.load("fashion-mnist", say=lambda _: None)
    assert mirror.url + fashion_mnist.TRAIN_IMAGES in str(error.value)
    assert list((tmp_path / "cache/esync/fashion-mnist").iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing_behind(fashion, mirror, tmp_path, monkeypatch):
    fashion(mirror.root)
    mirror.announce_more_bytes = 10
    monkeypatch.setattr(fashion_mnist, "BASE_URL", mirror.url)
    with pytest.raises(DataError, match="the connection ended after"):
        data.load("fashion-mnist", say=lambda _: None)
    assert list((tmp_path / "cache/esync/fashion-mnist").iterdir()) == []


def test_a_file_that_the_server_does_not_have_is_an_error_that_says_what_to_do(mirror, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "BASE_URL", mirror.url)
    with pytest.raises(DataError, match=r"cannot download .*404.*dataset-fashion-mnist"):
        data.load("fashion-mnist", say=lambda _: None)


def test_a_server_that_cannot_be_reached_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match=r"cannot download .*dataset-fashion-mnist"):
        data.load("fashion-mnist", say=lambda _: None)


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(DataError, match="cannot write to"):
        data.load("fashion-mnist", say=lambda _: None)


def test_two_downloads_at_the_same_time_do_not_disturb_each_other(mirror, tmp_path):
    content = bytes(3 * files.CHUNK_BYTES)
    (mirror.root / "file").write_bytes(content)
    # The server answers neither before both have asked.
    mirror.before_answer = threading.Barrier(2).wait
    target = tmp_path / "cache" / "file"

    def verify(part: Path) -> None:
        assert part.read_bytes() == content

    def fetch(_: int) -> None:
        files.download(mirror.url + "file", target, verify, lambda _: None, "ask a friend")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fetch, range(2)))
    assert len(mirror.requests) == 2
    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


def test_a_long_download_reports_its_progress(mirror, tmp_path):
    (mirror.root / "file").write_bytes(bytes(10 * files.CHUNK_BYTES))
    said: list[str] = []
    files.download(mirror.url + "file", tmp_path / "file", lambda _: None, said.append, "")
    assert "10.5 MB" in said[0]
    assert said[1:] == [f"  {percent} % of file" for percent in (20, 40, 60, 80)]


# CIFAR-10


def test_cifar10_reads_the_same_packed_and_unpacked(cifar, cifar_archive, tmp_path):
    archive = cifar_archive(tmp_path / "packed")
    unpacked = cifar(tmp_path / "unpacked" / cifar10.UNPACKED)
    one = data.load("cifar10", tmp_path / "packed")
    other = data.load("cifar10", tmp_path / "unpacked")
    assert one.train_images.shape == (20, 32, 32, 3)
    assert one.test_images.shape == (4, 32, 32, 3)
    assert one.test_labels.tolist() == [0, 1, 2, 9]
    assert (one.train_images == other.train_images).all()
    assert (one.source, other.source) == (str(archive), str(unpacked))


def test_the_unpacked_directory_itself_may_be_named(cifar, tmp_path):
    place = cifar(tmp_path / cifar10.UNPACKED)
    assert data.find("cifar10", place) == place


def test_the_colours_of_a_record_become_the_last_axis(cifar, tmp_path):
    place = cifar(tmp_path)
    record = np.zeros((4, cifar10.RECORD_BYTES), np.uint8)
    record[0, 1 + 1024 + 32 * 5 + 7] = 200  # green, row 5, column 7
    (place / "test_batch.bin").write_bytes(record.tobytes())
    image = data.load("cifar10", place).test_images[0]
    assert image[5, 7].tolist() == [0, 200, 0]
    assert image.sum() == 200


def test_a_truncated_batch_is_refused(cifar, tmp_path):
    file = cifar(tmp_path) / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="expected 4 records of 3073 bytes") as error:
        data.load("cifar10", tmp_path)
    assert str(file) in str(error.value)


def test_a_label_that_is_no_class_is_refused(cifar, tmp_path):
    file = cifar(tmp_path) / "data_batch_3.bin"
    file.write_bytes(b"\x0a" + file.read_bytes()[1:])
    with pytest.raises(DataError, match="found 10"):
        data.load("cifar10", tmp_path)


def test_an_archive_with_another_checksum_is_refused(cifar_archive, tmp_path, monkeypatch):
    cifar_archive(tmp_path)
    monkeypatch.setattr(cifar10, "MD5", "0" * 32)
    with pytest.raises(DataError, match="expected the digest 00000000"):
        data.load("cifar10", tmp_path)


def test_an_archive_that_lacks_a_batch_is_refused(cifar_archive, tmp_path):
    cifar_archive(tmp_path, without="test_batch.bin")
    with pytest.raises(DataError, match=r"lacks test_batch.bin"):
        data.load("cifar10", tmp_path)


def test_an_archive_that_is_none_is_refused(cifar, tmp_path, monkeypatch):
    (tmp_path / cifar10.ARCHIVE).write_bytes(b"none")
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(b"none").hexdigest())
    with pytest.raises(DataError, match="cannot read"):
        data.load("cifar10", tmp_path)


def test_cifar10_is_downloaded_into_the_cache(cifar_archive, mirror, tmp_path, monkeypatch):
    cifar_archive(mirror.root)
    monkeypatch.setattr(cifar10, "BASE_URL", mirror.url)
    read = data.load("cifar10", say=lambda _: None)
    assert read.source == str(tmp_path / "cache" / "esync" / "cifar10" / cifar10.ARCHIVE)
    assert data.find("cifar10") == Path(read.source)


def test_cifar10_that_is_nowhere_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz(.|\n)*--data-dir"):
        data.load("cifar10", download=False)


def test_threads_read_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's reader of .npz files fails in CPython 3.11 when several threads use it at once."""
    inside, together = [], []

    def read(data_dir: object, download: bool, say: object) -> None:
        inside.append(1)
        time.sleep(0.01)
        together.append(len(inside))
        inside.pop()

    monkeypatch.setitem(data.READERS, "digits", data.READERS["digits"]._replace(load=read))
    threads = [threading.Thread(target=data.load, args=("digits",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1] * 4
