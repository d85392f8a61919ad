"""Where the files of a data set are looked for, and how they are downloaded and checked.

The search, for the data set NAME:

1. the directory that the user names, and its subdirectory NAME; if one is named, nothing else;
2. the directory in the environment variable ESYNC_DATA_DIR, and its subdirectory NAME;
3. /usr/share/datasets/NAME, where Debian's packages put data sets;
4. esync/NAME in the user's cache ($XDG_CACHE_HOME, or ~/.cache), where downloads go.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from esync.errors import DataError

ENVIRONMENT = "ESYNC_DATA_DIR"
SYSTEM = Path("/usr/share/datasets")

CONNECT_TIMEOUT_S = 30.0
CHUNK_BYTES = 1 << 20

Say = Callable[[str], None]


def say_on_stderr(line: str) -> None:
    """Write `line` to standard error."""
    print(line, file=sys.stderr, flush=True)


def cache(name: str) -> Path:
    """The directory into which the data set `name` is downloaded."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "esync" / name


def places(name: str, data_dir: str | Path | None) -> list[Path]:
    """The directories that are searched for the data set `name`, in this order."""
    if data_dir is not None:
        return _with_subdirectory(Path(data_dir), name)
    named = os.environ.get(ENVIRONMENT)
    return [
        *(_with_subdirectory(Path(named), name) if named else []),
        SYSTEM / name,
        cache(name),
    ]


def _with_subdirectory(directory: Path, name: str) -> list[Path]:
    directory = directory.expanduser()
    return [directory, directory / name]


def is_file(path: Path) -> bool:
    """Whether `path` is a file; False, and no error, where it may not be looked at."""
    return os.path.isfile(path)


def locate(name: str, wanted: Sequence[str], data_dir: str | Path | None) -> Path | None:
    """The first of the `places` that holds every file in `wanted`, or None."""
    for place in places(name, data_dir):
        if all(is_file(place / file) for file in wanted):
            return place
    return None


def missing(
    name: str, wanted: Sequence[str], data_dir: str | Path | None, remedy: str
) -> DataError:
    """The error for a data set that is in none of the `places`: what was expected, and where."""
    lines = [f"data set {name!r} not found. Looked for {', '.join(wanted)} in:"]
    for place in places(name, data_dir):
        absent = [file for file in wanted if not is_file(place / file)]
        lines.append(f"  {place} ({_shortfall(place, absent, wanted)})")
    lines.append(f"What to do: {remedy}, or use --dataset digits, which is shipped with esync.")
    return DataError("\n".join(lines))


def _shortfall(place: Path, absent: Sequence[str], wanted: Sequence[str]) -> str:
    if not os.path.isdir(place):
        return "no such directory"
    if len(absent) < len(wanted):
        return "lacks " + ", ".join(absent)
    return "none of them"


def check_digest(found: str, expected: str, what: str, remedy: str) -> None:
    """Raise DataError, with `what` and `remedy`, unless the two hexadecimal digests agree."""
    if found != expected:
        raise DataError(
            f"{what} is damaged, or not the official file: "
            f"expected the digest {expected}, found {found}. What to do: {remedy}."
        )


def digest_of(path: Path, algorithm: str) -> str:
    """The hexadecimal digest of the file at `path`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def download(
    url: str, target: Path, verify: Callable[[Path], object], say: Say, remedy: str
) -> None:
    """Put what is at `url` into the file `target`, whole and verified, or not at all.

    The bytes go to a temporary file of this process beside `target`, `verify` is called with its
    path and raises DataError if they are wrong, and only then it takes the name of `target`.
    Processes that download the same file at the same time do not disturb each other. `say` gets
    a line of progress now and then.

    Raises DataError, with `remedy`, if the download fails or `verify` refuses it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            prefix=f"{target.name}.", suffix=".part", dir=target.parent
        )
    except OSError as e:
        raise DataError(
            f"cannot write to {target.parent} to download {url}: {e}. What to do: {remedy}."
        ) from e
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _copy(url, target, file, say)
        verify(part)
        part.replace(target)
    except DataError as e:
        raise DataError(f"{url} gave something else than {target.name}: {e}") from e
    except (OSError, http.client.HTTPException) as e:
        raise DataError(f"cannot download {url}: {e}. What to do: {remedy}.") from e
    finally:
        part.unlink(missing_ok=True)


def _copy(url: str, target: Path, file: BinaryIO, say: Say) -> None:
    """Write what is at `url` to `file`; raise OSError if less came than was announced."""
    with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S) as response:
        announced = response.headers.get("Content-Length")
        total_bytes = int(announced) if announced else None
        size = f"{total_bytes / 1e6:.1f} MB" if total_bytes else "size unknown"
        say(f"downloading {url} ({size}) to {target}")
        done_bytes = 0
        said = 0
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            done_bytes += len(chunk)
            if total_bytes:
                fifths = 5 * done_bytes // total_bytes
                if said < fifths < 5:
                    said = fifths
                    say(f"  {20 * fifths} % of {target.name}")
    if total_bytes is not None and done_bytes != total_bytes:
        raise OSError(f"the connection ended after {done_bytes} of {total_bytes} bytes")
