"""Keys: what `esync-keys` makes, who can read it, and whom the list lets in."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest
import zmq
from click.testing import CliRunner

from esync import keys
from esync.errors import KeysError
from esync.keys.cli import main


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Keys of the servers and of two workers."""
    keys.make(tmp_path / "keys", ["gpu", "old"])
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def esync_keys(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.output


# Files


def test_a_public_key_is_not_taken_for_a_worker_s(tmp_path):
    keys.make(tmp_path / "keys", ["gpu"])
    with pytest.raises(KeysError, match="is a public key"):
        keys.load_client(tmp_path / "keys" / "server.pub")


def test_one_command_makes_all_that_a_cluster_needs(tmp_path: Path) -> None:
    said = esync_keys("init", tmp_path / "k", "--workers", "gpu, old")
    assert sorted(path.name for path in (tmp_path / "k").iterdir()) == [
        "allowed.toml",
        "gpu.key",
        "old.key",
        "server.key",
        "server.pub",
    ]
    server, gpu = keys.load_server(tmp_path / "k"), keys.load_client(tmp_path / "k" / "gpu.key")
    assert gpu.name == "gpu"
    assert gpu.server == server.public
    assert server.allowed.name_of(gpu.public) == "gpu"
    assert "gpu.key" in said
    assert server.secret not in said
    assert gpu.secret not in said


def test_a_worker_needs_its_own_file_alone(directory: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.key"
    os.rename(directory / "gpu.key", elsewhere)
    assert keys.load_client(elsewhere).server == keys.load_server(directory).public


def test_workers_can_be_counted_instead_of_named(tmp_path: Path) -> None:
    esync_keys("init", tmp_path / "k", "--count", "3")
    assert [row[0] for row in keys.listed(tmp_path / "k")] == ["worker0", "worker1", "worker2"]
    esync_keys("init", tmp_path / "l", "--count", "3", "--workers", "gpu", status=2)


def test_secrets_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keys.make(tmp_path / "k", ["gpu"])
        keys.add(tmp_path / "k", "gpu", force=True)
    finally:
        os.umask(before)
    assert mode(tmp_path / "k" / "server.key") == 0o600
    assert mode(tmp_path / "k" / "gpu.key") == 0o600
    assert mode(tmp_path / "k") == 0o700


def test_a_secret_is_never_written_to_a_file_that_others_can_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: dict[str, tuple[int, int]] = {}
    real = os.open

    def spy(path: str | Path, flags: int, mode: int = 0o777) -> int:
        opened[Path(path).name] = flags, mode
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", spy)
    keys.make(tmp_path / "k", ["gpu"])
    for name in ("server.key", "gpu.key"):
        flags, wanted = opened[name]
        assert flags & os.O_EXCL
        assert wanted == 0o600


@pytest.mark.parametrize("open_to", [0o640, 0o604, 0o620])
def test_a_secret_that_is_open_to_others_is_refused(directory: Path, open_to: int) -> None:
    for path in (directory / "gpu.key", directory / "server.key"):
        path.chmod(open_to)
    with pytest.raises(KeysError, match=f"{open_to:o}.*chmod 600 {directory}/gpu.key"):
        keys.load_client(directory / "gpu.key")
    with pytest.raises(KeysError, match=f"chmod 600 {directory}/server.key"):
        keys.load_server(directory)
    (directory / "gpu.key").chmod(0o400)
    keys.load_client(directory / "gpu.key")


def test_nothing_is_overwritten_unless_forced(directory: Path) -> None:
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(KeysError, match=r"server\.key is there already.*--force"):
        keys.make(directory, ["other"])
    with pytest.raises(KeysError, match="'gpu' already; --force"):
        keys.add(directory, "gpu")
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    esync_keys("init", directory, "--workers", "gpu", "--force")
    assert all(
        path.read_bytes() != before[path] for path in directory.iterdir() if "old" not in path.name
    )


def test_a_key_file_that_is_not_listed_is_not_overwritten_either(directory: Path) -> None:
    (directory / "new.key").write_text("mine")
    with pytest.raises(KeysError, match=r"new\.key is there already"):
        keys.add(directory, "new")
    assert (directory / "new.key").read_text() == "mine"
    assert [row[0] for row in keys.listed(directory)] == ["gpu", "old"]


def test_secrets_are_not_printed(directory: Path) -> None:
    server, gpu = keys.load_server(directory), keys.load_client(directory / "gpu.key")
    assert server.secret not in repr(server)
    assert gpu.secret not in repr(gpu)
    assert gpu.public in repr(gpu)


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "server", "ps", "state", "x" * 49, "a b"])
def test_names_that_cannot_be_files_or_ids_are_refused(directory: Path, name: str) -> None:
    with pytest.raises(KeysError, match=r"cannot name a key|name of a server"):
        keys.add(directory, name)


def test_a_pair_that_is_none_is_refused(directory: Path) -> None:
    path = directory / "gpu.key"
    gpu = keys.load_client(path)
    path.write_text(path.read_text().replace(gpu.public, zmq.curve_keypair()[0].decode()))
    with pytest.raises(KeysError, match="not that of the secret key"):
        keys.load_client(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[allowed", "not valid TOML"),
        ("[allowd]", "Did you mean 'allowed'"),
        ("allowed = 3", "expected tables"),
        ('[allowed]\ngpu = "short"', "gpu: expected a key, 40 characters"),
        ("[allowed]\ngpu = 3", "gpu: expected a key, 40 characters"),
        (f'[allowed]\na = "{"x" * 40}"\nb = "{"x" * 40}"', "a and b have the same key"),
        (f'[allowed]\na = "{"x" * 40}"\n[revoked]\n{"x" * 40} = "a"', "both allowed and revoked"),
        (f'[allowed]\nserver = "{"x" * 40}"', "name of a server"),
    ],
)
def test_a_damaged_list_is_refused_with_what_and_where(
    directory: Path, text: str, why: str
) -> None:
    (directory / "allowed.toml").write_text(text)
    with pytest.raises(KeysError, match=why) as caught:
        keys.load_server(directory)
    assert str(directory / "allowed.toml") in str(caught.value)


def test_missing_files_are_named_with_what_makes_them(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(KeysError, match="esync-keys init"):
        keys.load_server(tmp_path / "none")
    with pytest.raises(KeysError, match=r"cannot read .*none\.key: No such file"):
        keys.load_client(tmp_path / "none.key")
    with pytest.raises(KeysError, match="not a worker's key file"):
        keys.load_client(directory / "server.key")
    said = esync_keys("add", "x", "--keys", tmp_path / "none", status=1)
    assert "cannot read" in said
    assert "Traceback" not in said


def test_the_servers_pair_is_a_client_too(directory: Path) -> None:
    own = keys.load_client(directory)
    assert own.public == own.server
    assert keys.load_server(directory).allowed.name_of(own.public) == keys.SERVER


# Adding and revoking


def test_added_and_revoked_keys_are_shown(directory: Path) -> None:
    esync_keys("add", "third", "--keys", directory)
    gone = keys.load_client(directory / "gpu.key")
    esync_keys("revoke", "gpu", "--keys", directory)
    assert not (directory / "gpu.key").exists()
    esync_keys("add", "gpu", "--keys", directory)
    new = keys.load_client(directory / "gpu.key")
    shown = esync_keys("list", "--keys", directory).splitlines()
    assert [line for line in shown if gone.public in line and "revoked" in line]
    assert [line for line in shown if new.public in line and "yes" in line]
    assert [line for line in shown if "third" in line and "yes" in line]
    assert "Did you mean 'gpu'" in esync_keys("revoke", "gpuu", "--keys", directory, status=1)


def test_a_forced_key_revokes_the_one_before(directory: Path) -> None:
    gone = keys.load_client(directory / "gpu.key")
    keys.add(directory, "gpu", force=True)
    assert ("gpu", gone.public, False) in keys.listed(directory)


def test_a_list_in_use_follows_its_file(directory: Path) -> None:
    allowed = keys.load_server(directory).allowed
    gpu = keys.load_client(directory / "gpu.key")
    keys.revoke(directory, "gpu")
    new = keys.load_client(keys.add(directory, "new"))
    assert allowed.name_of(gpu.public) == "gpu"  # not looked yet
    allowed.refresh()
    assert allowed.name_of(gpu.public) is None
    assert allowed.name_of(new.public) == "new"


def test_a_list_that_is_damaged_or_missing_for_a_while_stays_in_force(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = keys.load_server(directory).allowed
    gpu = keys.load_client(directory / "gpu.key")
    path = directory / "allowed.toml"
    good = path.read_text()
    path.write_text("[allowed")
    allowed.refresh()
    allowed.refresh()
    assert allowed.name_of(gpu.public) == "gpu"
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    path.unlink()
    allowed.refresh()
    assert allowed.name_of(gpu.public) == "gpu"
    path.write_text(good.replace(gpu.public, zmq.curve_keypair()[0].decode()))
    allowed.refresh()
    assert allowed.name_of(gpu.public) is None


def test_refused_keys_are_counted_and_each_logged_once_by_name_if_it_was_revoked(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "esync.keys")
    allowed = keys.load_server(directory).allowed
    gpu = keys.load_client(directory / "gpu.key").public
    stranger = zmq.curve_keypair()[0]
    assert allowed.callback("", gpu.encode())
    keys.revoke(directory, "gpu")
    for _ in range(3):
        assert not allowed.callback("", gpu.encode())
        assert not allowed.callback("", stranger)
    assert allowed.refusals == 6
    assert allowed.refused == {gpu: 3, stranger.decode(): 3}
    assert len(caplog.records) == 2
    assert "'gpu', which was revoked" in caplog.text
    assert f"{stranger.decode()}, which is not in" in caplog.text


def test_ever_new_keys_fill_neither_the_memory_nor_the_log(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "REMEMBERED", 5)
    allowed = keys.load_server(directory).allowed
    for number in range(20):
        assert not allowed.callback("", f"{number:040}".encode())
    assert allowed.refusals == 20
    assert len(allowed.refused) == len(caplog.records) == 5


def test_a_failing_check_refuses_and_does_not_raise(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = keys.load_server(directory).allowed
    assert not allowed.callback("", b"\xff" * 40)
    assert "could not be checked" in caplog.text


def test_an_id_belongs_to_the_key_with_the_longest_fitting_name(directory: Path) -> None:
    keys.add(directory, "old-2")
    allowed = keys.load_server(directory).allowed
    assert allowed.owner("old") == "old"
    assert allowed.owner("old-1") == "old"
    assert allowed.owner("old-1-7") == "old"
    assert allowed.owner("old-2") == "old-2"
    assert allowed.owner("old-2-7") == "old-2"
    assert allowed.owner("older") is None
    assert allowed.owner("stranger-old") is None
    assert allowed.owner("") is None
