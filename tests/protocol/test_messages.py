"""Every message there and back, the tolerance for other releases, and bodies that are none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdshare import errors
from fdshare.errors import (
    BadRequest,
    FdshareError,
    InvalidArgument,
    InvalidName,
    NameNotFound,
    ProtocolError,
)
from fdshare.protocol import messages as m

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
REQUESTS = get_args(m.AnyRequest)
REPLIES = get_args(m.AnyReply)

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
seconds = st.floats(allow_nan=False)


def from_type(hint: Any) -> st.SearchStrategy[Any]:
    """What a field of this type may hold."""
    info = msgspec.inspect.type_info(hint)
    return from_info(info)


def from_info(info: Any) -> st.SearchStrategy[Any]:
    i = msgspec.inspect
    match info:
        case i.StructType():
            return struct(info.cls)
        case i.UnionType():
            return st.one_of([from_info(one) for one in info.types])
        case i.LiteralType():
            return st.sampled_from(info.values)
        case i.ListType():
            return st.lists(from_info(info.item_type), max_size=3)
        case i.DictType():
            return st.dictionaries(from_info(info.key_type), from_info(info.value_type), max_size=3)
        case i.RawType():
            return anything.map(lambda value: msgspec.Raw(msgspec.msgpack.encode(value)))
        case i.IntType():
            return st.integers(-(2**63), 2**64 - 1)
        case i.StrType():
            return st.text(max_size=10)
        case i.FloatType():
            return seconds
        case i.BoolType():
            return st.booleans()
        case i.BytesType():
            return st.binary(max_size=40)
        case i.NoneType():
            return st.none()
        case i.AnyType():
            return anything
    raise AssertionError(f"no strategy for {info}")


def struct(cls: type[Any]) -> st.SearchStrategy[Any]:
    fields = msgspec.inspect.type_info(cls).fields  # type: ignore[attr-defined]
    return st.builds(cls, **{field.name: from_info(field.type) for field in fields})


@pytest.mark.parametrize("cls", REQUESTS, ids=lambda cls: cls.__name__)
def test_requests_there_and_back(cls: type[Any]) -> None:
    @settings(max_examples=20)
    @given(struct(cls))
    def check(request: Any) -> None:
        body = m.encode(request)
        assert msgspec.msgpack.decode(body)["type"] == cls.__struct_config__.tag
        assert m.decode_request(body) == request

    check()


@pytest.mark.parametrize("cls", REPLIES, ids=lambda cls: cls.__name__)
def test_replies_there_and_back(cls: type[Any]) -> None:
    @settings(max_examples=20)
    @given(struct(cls))
    def check(reply: Any) -> None:
        body = m.encode(reply)
        assert msgspec.msgpack.decode(body)["type"] == cls.__struct_config__.tag
        assert m.decode_reply(body) == reply

    check()


def test_every_message_is_in_a_union() -> None:
    everything = {cls for cls in vars(m).values() if isinstance(cls, type)}
    for root, members in ((m.Request, REQUESTS), (m.Reply, REPLIES)):
        leaves = {cls for cls in everything if issubclass(cls, root) and not cls.__subclasses__()}
        assert leaves == set(members)


def bounds(info: Any) -> Iterator[int | None]:
    """The longest that each text, list and bytes in it may be."""
    i = msgspec.inspect
    match info:
        case i.UnionType():
            for one in info.types:
                yield from bounds(one)
        case i.ListType():
            yield info.max_length
            yield from bounds(info.item_type)
        case i.StrType() | i.BytesType():
            yield info.max_length


@pytest.mark.parametrize("cls", REQUESTS, ids=lambda cls: cls.__name__)
def test_what_a_client_says_is_bounded(cls: type[Any]) -> None:
    """Before anything looks at it. `check` bounds the metadata of a Register as a whole."""
    fields = msgspec.inspect.type_info(cls).fields  # type: ignore[attr-defined]
    assert all(most is not None for field in fields for most in bounds(field.type))


LONG = "\x01" * 5000
REFUSED = [
    m.Register(LONG, m.Kind("x", msgspec.Raw(b"\xc0"))),
    m.Register("x", m.Kind("x" * 16384, msgspec.Raw(b"\xc0"))),
    m.Register("x", m.Kind("x", msgspec.Raw(b"\xc0")), metadata={"k": "v" * 4096}),
    m.Fetch(LONG),
    m.Take(LONG),
    m.Wait(LONG),
    m.FetchMany(["x", LONG]),
    m.Unregister(LONG),
    m.Rename(LONG, "x"),
    m.Rename("x", LONG),
    m.Bind(LONG, "tcp://127.0.0.1:0"),
    *[
        m.Bind("x", scheme + LONG[:4900])
        for scheme in ("", "tcp://", "tcp://[::", "unix:@", "unix:///")
    ],
    *[m.Bind("x", f"tcp://{host * 1250}:80") for host in ("\U0001f41b", "[f", "1.")],
    m.Names("*" * 1021),
    m.Info(LONG),
    m.Infos("*" * 1021),
    m.Watch("*" * 1021),
    m.Explain("fetch", LONG, 0, 0),
]


@pytest.mark.parametrize("request_", REFUSED, ids=lambda request: type(request).__name__)
def test_a_bad_shape_is_refused_in_few_words(request_: Any) -> None:
    decoded = m.decode_request(m.encode(request_))
    with pytest.raises((InvalidName, InvalidArgument)) as caught:
        decoded.check()
    assert len(m.encode(m.refusal(caught.value))) < 4096


@pytest.mark.parametrize("type_", ["x" * 100_000, "\x01" * 100_000])
def test_a_body_that_is_none_is_refused_in_few_words(type_: str) -> None:
    with pytest.raises(BadRequest) as caught:
        m.decode_request(msgspec.msgpack.encode({"type": type_}))
    assert len(m.encode(m.refusal(caught.value))) < 4096


def test_tags_are_unique_among_their_kind() -> None:
    for members in (REQUESTS, REPLIES):
        tags = [cls.__name__.lower() for cls in members]
        assert len(set(tags)) == len(tags)


def test_fields_of_a_newer_release_are_ignored() -> None:
    body = msgspec.msgpack.encode({"type": "fetch", "name": "web", "shiny": [1, 2]})
    assert m.decode_request(body) == m.Fetch("web")


def test_fields_of_an_older_release_have_defaults() -> None:
    body = msgspec.msgpack.encode({"type": "fetch", "name": "web"})
    assert m.decode_request(body) == m.Fetch("web", 0.0)
    assert m.encode(m.Fetch("web")) == body


def documented() -> dict[tuple[str, str], str]:
    """(message, field) -> its default, as the tables of docs/protocol.md have it."""
    found: dict[tuple[str, str], str] = {}
    message = ""
    for line in DOCUMENT.read_text().splitlines():
        columns = [column.strip() for column in line.split("|")[1:-1]]
        if heading := re.match(r"\*\*(\w+)\*\*", line):
            message = heading[1]
        elif len(columns) == 4 and columns[0].isidentifier() and columns[0] != "field":
            found[message, columns[0]] = columns[2]
    return found


def test_defaults_are_those_of_the_document() -> None:
    """Whoever writes a peer from it leaves out what has one."""
    classes = {cls.__struct_config__.tag: cls for cls in (*REQUESTS, *REPLIES)}
    classes["infolist"] = m.EntryInfo  # whose table it is
    checked = set()
    for (message, field), text in documented().items():
        (info,) = (f for f in msgspec.structs.fields(classes[message]) if f.name == field)
        default = info.default
        if info.default_factory is not msgspec.NODEFAULT:
            default = info.default_factory()
        words = {"nil": None, "false": False, "": msgspec.NODEFAULT, "{}": {}, "[]": []}
        expected = words[text] if text in words else json.loads(text.strip("`"))
        assert default == expected, (message, field)
        checked.add(message)
    assert {"register", "fetch", "wait", "unregister", "bind", "given", "event"} <= checked


BODIES = {
    "empty": b"",
    "nil": b"\xc0",
    "no-map": msgspec.msgpack.encode([1, 2]),
    "no-type": msgspec.msgpack.encode({"name": "web"}),
    "unknown-type": msgspec.msgpack.encode({"type": "explode"}),
    "wrong-field": msgspec.msgpack.encode({"type": "fetch", "name": 5}),
    "missing-field": msgspec.msgpack.encode({"type": "fetch"}),
    "trailing": msgspec.msgpack.encode({"type": "ping"}) + b"\0",
    "truncated": msgspec.msgpack.encode({"type": "ping"})[:-1],
    "not-utf8": b"\x82\xa4type\xa5fetch\xa4name\xa1\xff",
    "deep": b"\x91" * 100_000,
    "deep-in-a-field": b"\x82\xa4type\xa5fetch\xa4wait" + b"\x91" * 100_000,
    "huge-announced": b"\xdf\xff\xff\xff\xff",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bodies_that_are_none(body: bytes) -> None:
    with pytest.raises(BadRequest):
        m.decode_request(body)
    with pytest.raises(ProtocolError):
        m.decode_reply(body)


@given(st.binary(max_size=200))
def test_garbage(body: bytes) -> None:
    try:
        m.decode_request(body)
    except BadRequest:
        pass
    try:
        m.decode_reply(body)
    except ProtocolError:
        pass


def test_a_deep_spec_is_only_carried() -> None:
    """A kind is opaque to the server: it is stored unread."""
    spec = msgspec.Raw(b"\x91" * 5000 + b"\xc0")
    request = m.Register("web", m.Kind("odd", spec))
    try:
        got = m.decode_request(m.encode(request))
    except BadRequest:
        return  # refused is as good
    assert isinstance(got, m.Register)
    assert bytes(got.kind.spec) == bytes(spec)


# Refusals


def test_a_refusal_carries_the_exception() -> None:
    there = m.decode_reply(m.encode(m.refusal(NameNotFound(["a", "b"]))))
    assert isinstance(there, m.Refused)
    back = m.refusal_error(there)
    assert type(back) is NameNotFound
    assert back.names == ["a", "b"]


def test_a_refusal_of_a_newer_release() -> None:
    error = m.refusal_error(m.Refused("out_of_cheese", {"cheese": 5}, "no cheese"))
    assert type(error) is FdshareError
    assert str(error) == "no cheese"
    assert error.cheese == 5  # type: ignore[attr-defined]


def test_fields_of_a_refusal_that_do_not_fit() -> None:
    error = m.refusal_error(m.Refused("name_taken", {"colour": "red"}, "taken"))
    assert isinstance(error, FdshareError)
    assert str(error) == "taken"


# Names that an exception or its constructor has a use for.
awkward = st.sampled_from(
    ["message", "self", "fields", "code", "args", "errno", "__class__", "__dict__", "__cause__"]
)


@given(
    st.sampled_from(sorted(errors._by_code)),
    st.dictionaries(awkward | st.text(max_size=8), anything),
)
def test_a_refusal_of_any_shape_is_an_error_of_ours(code: str, fields: dict[str, Any]) -> None:
    error = m.refusal_error(m.Refused(code, fields, "text"))
    assert isinstance(error, FdshareError)
    assert isinstance(str(error), str)
