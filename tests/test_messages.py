"""The wire: what is sent arrives unchanged, and whatever else arrives is refused in words."""

from __future__ import annotations

import dataclasses
import typing

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esync import messages
from esync.messages import MAX_ID, MAX_TEXT, Message, MessageError, Query, Report, decode, encode

TYPES = typing.get_args(Message)

integers = st.integers(-1, 2**53 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(max_size=30)
scalars = st.none() | st.booleans() | integers | floats | texts
maps = st.dictionaries(texts, scalars | st.lists(scalars, max_size=3), max_size=3)
VALUES = {
    "bool": st.booleans(),
    "bytes": st.binary(max_size=64),
    "int": integers,
    "float": floats,
    "str": texts,
    "None": st.none(),
    "dict[str, Any]": maps,
    "list[Any]": st.lists(scalars, max_size=3),
}
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.binary(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


def values_of(field):
    options = [VALUES[part.strip()] for part in field.type.split("|")]
    return texts.filter(bool) if field.name == "worker" else st.one_of(options)


def valid(cls):
    """Any valid message of a type."""
    return st.builds(cls, **{field.name: values_of(field) for field in dataclasses.fields(cls)})


any_message = st.one_of([valid(cls) for cls in TYPES])
required = [
    (cls, field.name)
    for cls in TYPES
    for field in dataclasses.fields(cls)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
]
all_fields = [(cls, field.name) for cls in TYPES for field in dataclasses.fields(cls)]


def example(cls):
    """One valid message of a type as the map that travels."""
    fill = {"int": 1, "float": 1.5, "str": "a", "bool": True, "bytes": b"key"}
    fill |= {"dict[str, Any]": {}, "list[Any]": []}
    given = {f.name: fill[f.type.split("|")[0].strip()] for f in dataclasses.fields(cls)}
    return msgpack.unpackb(encode(cls(**given)))


def refusal(raw):
    frame = raw if isinstance(raw, bytes) else msgpack.packb(raw)
    with pytest.raises(MessageError) as caught:
        decode(frame)
    return caught.value


def decoded_or_refused(frame):
    """Decode what may be anything: whatever is raised but MessageError fails the test."""
    try:
        message = decode(frame)
    except MessageError as error:
        refused = error
    else:
        assert isinstance(message, TYPES)
        assert decode(encode(message)) == message
        return
    assert refused.code
    assert 0 < len(refused.text) < 1000


def test_the_four_messages_of_the_paper_keep_their_names():
    names = {cls.TYPE for cls in TYPES}
    assert {"reset", "report", "query", "response"} <= names
    assert len(names) == len(TYPES)


@settings(max_examples=200)
@given(any_message)
def test_every_message_arrives_as_it_was_sent(message):
    arrived = decode(encode(message))
    assert type(arrived) is type(message)
    assert arrived == message


@given(any_message)
def test_a_frame_may_be_any_buffer(message):
    assert decode(memoryview(encode(message))) == message


@given(any_message)
def test_a_message_is_one_flat_map_with_version_and_type(message):
    raw = msgpack.unpackb(encode(message))
    assert raw["v"] == messages.PROTOCOL
    assert raw["msg_type"] == message.TYPE
    fields = {f.name: getattr(message, f.name) for f in dataclasses.fields(message)}
    assert raw.keys() - {"v", "msg_type"} == {k for k, v in fields.items() if v is not None}


@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(frame):
    decoded_or_refused(frame)


@settings(max_examples=300)
@given(anything)
def test_any_msgpack_is_a_message_or_refused(value):
    decoded_or_refused(msgpack.packb(value))


@settings(max_examples=300)
@given(st.sampled_from(all_fields), anything)
def test_any_value_in_any_field_is_a_message_or_refused(cls_field, value):
    cls, name = cls_field
    decoded_or_refused(msgpack.packb({**example(cls), name: value}))


@settings(max_examples=200)
@given(any_message, st.data())
def test_a_damaged_frame_is_a_message_or_refused(message, data):
    frame = bytearray(encode(message))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] = data.draw(st.integers(0, 255))
    decoded_or_refused(bytes(frame))
    decoded_or_refused(bytes(frame[:at]))


@pytest.mark.parametrize("depth", [400, 900, 1000, 1023, 1024, 5000])
@pytest.mark.parametrize("field", ["v", "msg_type", "worker", "reason"])
def test_deeply_nested_values_are_refused(depth, field):
    head = {"v": 1, "msg_type": "leave", "worker": "a", "reason": ""}
    del head[field]
    frame = bytes([0x84]) + msgpack.packb(head)[1:] + msgpack.packb(field)
    assert refusal(frame + b"\x91" * depth + b"\xc0").code


def test_what_is_not_msgpack_is_refused_as_such():
    for frame in (b"", b"\xc1", b"GET / HTTP/1.1", b"\x81\x93\x01", encode(Query("a", 1, 2))[:-1]):
        assert refusal(frame).code in ("not-msgpack", "not-a-map")
    assert refusal(b"\xc1").code == "not-msgpack"
    assert refusal(encode(Query("a", 1, 2)) + b"\x00").code == "not-msgpack"


@pytest.mark.parametrize("value", [None, 3, "text", [1], 2.5, b"bytes"])
def test_what_is_not_a_map_is_refused_as_such(value):
    assert refusal(msgpack.packb(value)).code == "not-a-map"


@pytest.mark.parametrize("v", [0, 2, -1, True, 1.0, "1", None, [1], {}])
def test_another_protocol_version_is_refused_and_the_refusal_says_what_to_do(v):
    error = refusal({**example(Query), "v": v})
    assert error.code == "version-mismatch"
    assert "same esync version" in error.text
    raw = example(Query)
    del raw["v"]
    assert refusal(raw).code == "version-mismatch"


@pytest.mark.parametrize("kind", ["quarry", "", None, 7, [], {}, ["query"], b"query", True])
def test_an_unknown_type_is_refused_and_named(kind):
    error = refusal({**example(Query), "msg_type": kind})
    assert error.code == "unknown-type"
    assert repr(kind) in error.text
    raw = example(Query)
    del raw["msg_type"]
    assert refusal(raw).code == "unknown-type"


@pytest.mark.parametrize(("cls", "name"), required, ids=lambda x: getattr(x, "TYPE", x))
def test_each_required_field_is_asked_for_by_name(cls, name):
    raw = example(cls)
    del raw[name]
    error = refusal(raw)
    assert error.code == "missing-field"
    assert name in error.text
    assert cls.TYPE in error.text


@pytest.mark.parametrize(("cls", "name"), all_fields, ids=lambda x: getattr(x, "TYPE", x))
def test_a_value_of_another_type_is_refused_in_each_field(cls, name):
    wrong = [msgpack.ExtType(1, b"")]
    types = dict(cls.__annotations__)[name]
    wrong += [b"b" * 65] if "bytes" in types else [b"bytes"]
    wrong += [1] if "bool" in types else [True, False]
    wrong += [] if "str" in types.split("[")[0] else ["text"]
    wrong += [] if "int" in types or "float" in types else [3]
    wrong += [] if "float" in types else [2.5]
    wrong += [] if "dict" in types else [{}]
    wrong += [] if "list" in types else [[]]
    wrong += [] if "None" in types else [None]
    for value in wrong:
        error = refusal({**example(cls), name: value})
        assert error.code == "bad-field"
        assert f"{cls.TYPE}.{name}" in error.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["compute_s", "loss", "accuracy"])
def test_only_finite_numbers_travel(name, value):
    assert refusal({**example(Report), name: value}).code == "bad-field"


@pytest.mark.parametrize("name", ["round", "step", "samples"])
def test_integers_have_bounds_that_every_language_can_hold(name):
    for value in (-2, 2**53, 2**64 - 1, -(2**63)):
        assert refusal({**example(Report), name: value}).code == "bad-field"
    for value in (-1, 0, 2**53 - 1):
        assert getattr(decode(msgpack.packb({**example(Report), name: value})), name) == value


def test_a_whole_number_will_do_for_a_float():
    assert decode(msgpack.packb({**example(Report), "compute_s": 2})).compute_s == 2


def test_text_has_a_longest_length_and_a_worker_s_id_a_shorter_one():
    longest = {**example(Report), "phase": "x" * MAX_TEXT, "worker": "w" * MAX_ID}
    assert decode(msgpack.packb(longest)).phase == "x" * MAX_TEXT
    assert refusal({**longest, "phase": "x" * (MAX_TEXT + 1)}).code == "bad-field"
    assert refusal({**longest, "worker": "w" * (MAX_ID + 1)}).code == "bad-field"
    assert refusal({**longest, "worker": ""}).code == "bad-field"


def test_fields_that_are_not_known_here_are_passed_over():
    raw = {**example(Query), "from_a_later_version": [1, 2, 3]}
    assert decode(msgpack.packb(raw)) == decode(msgpack.packb(example(Query)))


def test_two_messages_never_share_a_default():
    one, other = (decode(msgpack.packb(_fetch())) for _ in range(2))
    one.missing.append(1)
    assert other.missing == []


def _fetch():
    return {"v": 1, "msg_type": "fetch", "worker": "a", "round": 0}
