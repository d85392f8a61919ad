"""Seals: what was sealed opens, and nothing else does."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from esync import seal
from esync.messages import MessageError
from esync.seal import Opener, Sealer, sender_of

KEY = bytes(range(32))
PAYLOAD = b"a chunk of a model"


@pytest.fixture(params=[True, False], ids=["into", "copied"], autouse=True)
def with_and_without_into(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of calling the library, the second for its older versions."""
    if request.param and not seal._INTO:
        pytest.skip("this cryptography only returns copies: pip install 'cryptography>=47'")
    monkeypatch.setattr(seal, "_INTO", request.param)


def refused(opener: Opener, sealed: Any, *about: Any) -> bool:
    with pytest.raises(MessageError) as caught:
        opener.open(sealed, *about)
    return caught.value.code == "bad-seal"


@pytest.mark.parametrize("size", [0, 1, 16, 1000, 2 << 20])
def test_what_was_sealed_opens(size: int) -> None:
    payload = np.random.default_rng(0).bytes(size)
    sealed = Sealer(KEY, "gpu").seal(payload, b"header", b"")
    assert bytes(Opener(KEY).open(sealed, b"header", b"")) == payload
    assert sender_of(sealed) == "gpu"
    assert len(payload) < len(sealed) <= len(payload) + seal.MAX_OVERHEAD_BYTES


def test_payloads_can_be_any_contiguous_buffer() -> None:
    sealer, opener = Sealer(KEY, "gpu"), Opener(KEY)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    opened = opener.open(memoryview(bytes(sealer.seal(values, memoryview(b"header")))), b"header")
    np.testing.assert_array_equal(np.frombuffer(opened, np.float32).reshape(3, 4), values)
    assert opener.open(sealer.seal(values[:0])).nbytes == 0
    assert bytes(opener.open(bytearray(sealer.seal(bytearray(b"x"))))) == b"x"


def test_the_payload_is_not_to_be_seen() -> None:
    sealed = bytes(Sealer(KEY, "gpu").seal(PAYLOAD, b"header"))
    assert PAYLOAD not in sealed
    assert b"header" not in sealed


def test_every_changed_bit_is_noticed() -> None:
    opener = Opener(KEY)
    sealed = bytes(Sealer(KEY, "gpu").seal(PAYLOAD, b"header"))
    for position in range(len(sealed)):
        for bit in range(8):
            changed = bytearray(sealed)
            changed[position] ^= 1 << bit
            assert refused(opener, changed, b"header"), (position, bit)
    assert bytes(opener.open(sealed, b"header")) == PAYLOAD


def test_every_other_length_is_refused() -> None:
    opener = Opener(KEY)
    for payload in (PAYLOAD, b""):
        sealed = bytes(Sealer(KEY, "gpu").seal(payload))
        for size in range(len(sealed)):
            assert refused(opener, sealed[:size]), size
        assert refused(opener, sealed + b"\0")


def test_a_message_without_payload_cannot_be_forged() -> None:
    sealed = Sealer(KEY, "gpu").seal(b"", b"fetch")
    assert Opener(KEY).open(sealed, b"fetch").nbytes == 0
    assert refused(Opener(KEY), sealed, b"leave")
    assert refused(Opener(KEY), Sealer(bytes(32), "gpu").seal(b"", b"fetch"), b"fetch")


def test_another_runs_key_does_not_open() -> None:
    sealed = Sealer(KEY, "gpu").seal(PAYLOAD)
    assert refused(Opener(KEY[::-1]), sealed)


@pytest.mark.parametrize(
    "about",
    [(), (b"a",), (b"ab", b"c"), (b"a", b"bc", b""), (b"abc",), (b"bc", b"a"), (b"", b"a", b"bc")],
)
def test_other_frames_beside_it_do_not_open_it(about: tuple[bytes, ...]) -> None:
    opener, sealed = Opener(KEY), Sealer(KEY, "gpu").seal(PAYLOAD, b"a", b"bc")
    assert refused(opener, sealed, *about)
    assert bytes(opener.open(sealed, b"a", b"bc")) == PAYLOAD


@given(st.lists(st.binary(max_size=12), max_size=4), st.lists(st.binary(max_size=12), max_size=4))
def test_no_two_sets_of_frames_are_authenticated_alike(
    one: list[bytes], other: list[bytes]
) -> None:
    same = seal._authenticated(b"", tuple(one)) == seal._authenticated(b"", tuple(other))
    assert same == (one == other)


@given(st.binary(max_size=80))
def test_any_bytes_are_refused_as_a_bad_seal_and_as_nothing_else(data: bytes) -> None:
    assert refused(Opener(KEY), data)
    assert refused(Opener(KEY), bytes((seal.FORMAT, 1)) + data)


def test_no_nonce_comes_twice_under_one_key_nor_after_a_life_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seal, "MESSAGES_PER_LIFE", 10)
    opener = Opener(KEY)
    sealers = [Sealer(KEY, "gpu"), Sealer(KEY, "gpu"), Sealer(KEY, "old")]
    heads = set()
    prefixes = set()
    for number in range(25):
        for sealer in sealers:
            sealed = sealer.seal(PAYLOAD)
            assert bytes(opener.open(sealed)) == PAYLOAD
            prefix = seal._prefix_of(sealed)
            assert int.from_bytes(seal._nonce(prefix), "big") == number % 10
            heads.add(prefix[: -seal.NUMBER_BYTES])
            prefixes.add(prefix)
    assert len(prefixes) == 75
    assert len(heads) == 9  # three lives of each


def test_threads_that_share_a_sealer_share_no_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "MESSAGES_PER_LIFE", 300)
    sealer = Sealer(KEY, "gpu")
    prefixes: list[bytes] = []

    def body() -> None:
        prefixes.extend(seal._prefix_of(sealer.seal(b"")) for _ in range(500))

    threads = [threading.Thread(target=body) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(prefixes) == len(set(prefixes)) == 2000


def test_a_number_always_fits() -> None:
    assert seal.MESSAGES_PER_LIFE <= 2 ** (8 * seal.NUMBER_BYTES)


def test_the_format_is_as_written() -> None:
    sealed = bytes(Sealer(KEY, "gpu").seal(PAYLOAD, b"ab", b"c"))
    assert sealed[:5] == b"\x01\x03gpu"
    assert sealed[21:25] == bytes(4)
    key = HKDF(SHA256(), 32, None, b"esync seal 1 " + sealed[:21]).derive(KEY)
    about = sealed[:25] + bytes(7) + b"\x02ab" + bytes(7) + b"\x01c"
    assert AESGCM(key).decrypt(bytes(12), sealed[25:], about) == PAYLOAD


def test_lives_of_one_sender_have_different_keys() -> None:
    one, two = (bytes(Sealer(KEY, "gpu").seal(PAYLOAD)) for _ in range(2))
    assert one[:5] == two[:5]
    assert one[25:] != two[25:]


def test_senders_keys_are_kept_but_not_more_than_told() -> None:
    opener = Opener(KEY, keep=3)
    sealers = [Sealer(KEY, f"w{number}") for number in range(5)]
    for sealer in sealers:
        for _ in range(2):
            assert bytes(opener.open(sealer.seal(PAYLOAD))) == PAYLOAD
    assert len(opener._ciphers) == 3
    kept = set(opener._ciphers)
    opener.open(sealers[2].seal(PAYLOAD))  # used last of the three
    opener.open(sealers[0].seal(PAYLOAD))
    assert len(opener._ciphers) == 3
    assert {sealers[2]._head, sealers[4]._head, sealers[0]._head} == set(opener._ciphers)
    assert kept != set(opener._ciphers)


def test_a_known_sender_costs_no_derivation(monkeypatch: pytest.MonkeyPatch) -> None:
    derived: list[bytes] = []
    real = seal._subkey

    def spy(run_key: bytes, head: bytes) -> AESGCM:
        derived.append(head)
        return real(run_key, head)

    monkeypatch.setattr(seal, "_subkey", spy)
    sealer, opener = Sealer(KEY, "gpu"), Opener(KEY)
    for _ in range(5):
        opener.open(sealer.seal(PAYLOAD))
    assert len(derived) == 2  # once at each end


def test_forged_messages_do_not_push_out_the_keys_of_members() -> None:
    opener = Opener(KEY, keep=2)
    member = Sealer(KEY, "gpu")
    opener.open(member.seal(PAYLOAD))
    for number in range(10):
        assert refused(opener, Sealer(bytes(32), f"stranger{number}").seal(PAYLOAD))
    assert set(opener._ciphers) == {member._head}


def test_keys_and_identities_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="has 32 bytes, this one 16"):
        Sealer(bytes(16), "gpu")
    with pytest.raises(ValueError, match="has 32 bytes"):
        Opener(b"")
    with pytest.raises(ValueError, match="has 256 bytes, at most 255"):
        Sealer(KEY, "x" * 256)
    assert bytes(Opener(KEY).open(Sealer(KEY, "x" * 255).seal(PAYLOAD))) == PAYLOAD


def test_runs_have_keys_of_their_own() -> None:
    assert len(seal.new_key()) == seal.KEY_BYTES
    assert seal.new_key() != seal.new_key()
