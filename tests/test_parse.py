"""files/parse.py: what is no JSON, or not the wanted value, gets one line; no other module parses JSON files."""

import json
import re
from pathlib import Path

import pytest

import llmc
from llmc.errors import UserError
from llmc.files import parse

PACKAGE = Path(llmc.__file__).parent


def refused(function, *args):
    with pytest.raises(UserError, match="^what.*HINT: ") as info:
        function(*args)
    assert str(info.value).isprintable() and len(str(info.value)) < 300
    return str(info.value)


@pytest.mark.parametrize("text, message", [
    ("[" * 100_000, "deeper than 32 levels"),
    ("[" * 40 + "]" * 40, "deeper than 32 levels"),
    ('{"a":' * 500 + "1" + "}" * 500, "deeper than 32 levels"),
    ("9" * 5000, r"99999999999999999999\\.\\.\\. is an integer of more than 64 bits"),
    ("-9223372036854775809", "more than 64 bits"),
    ("18446744073709551616", "more than 64 bits"),
    ("1e999", "1e999 is more than a double holds"),
    ("-1" + "0" * 400 + ".5", "more than a double holds"),
    ("NaN", "NaN is no number of JSON"),
    ("[Infinity]", "Infinity is no number of JSON"),
    ("-Infinity", "-Infinity is no number"),
    (b"\xff\xfe", "not JSON"),
    (b"\xed\xa0\x80", "not JSON"),
    ("", "not JSON"),
    ('{"a": 1', "not JSON"),
    ("\x1b[2J", "not JSON"),
    (b'"' + b"x" * (64 << 20) + b'"', "more than 64 MiB"),
])  # fmt: skip
def test_texts_that_are_refused(text, message):
    assert re.search(message.replace("\\\\", "\\"), refused(parse.json_of, text, "what"))


def test_texts_that_are_read():
    for value in (None, True, 0, -(2**63), 2**64 - 1, 1.5, -3e300, "\x1b é \ud83d", [[]], {"a": [{"b": 1}]}):
        assert parse.json_of(json.dumps(value), "what") == value
    assert parse.json_of("[" * 32 + "]" * 32, "what")


@pytest.mark.parametrize("function, good, bad", [
    (parse.dictionary, [{}, {"a": 1}], [[], None, 1, "a"]),
    (lambda v, what: parse.array(v, what, 2), [[], [1, 2]], [{}, None, "ab", [1, 2, 3]]),
    (lambda v, what: parse.string(v, what, 3), ["", "abc"], ["abcd", 1, None, []]),
    (lambda v, what: parse.integer(v, what, 1, 9), [1, 9], [0, 10, 1.0, True, "1", None, [], 2**63]),
    (lambda v, what: parse.number(v, what, 0, 9), [0, 9, 0.5], [-1, 9.5, True, "1", None, float("nan")]),
    (parse.number, [-1e300, 2**63], [float("inf"), float("nan"), {}]),
])  # fmt: skip
def test_values(function, good, bad):
    for value in good:
        assert function(value, "what") == value
    for value in bad:
        refused(function, value, "what")


def test_decimals():
    assert [parse.decimal(text, "what") for text in ("3.1", "-6e-4", "2")] == [3.1, -6e-4, 2]
    for text in ("3.1-oops", "", "nan", "inf", "1e999", "0x10", "\x1b[2J"):
        refused(parse.decimal, text, "what")


def test_files(tmp_path):
    path = tmp_path / "what\x1b[31m\n.json"
    path.write_text('{"a": 1}')
    assert parse.read_json(path) == {"a": 1}
    for text in ("[]", "{", "1e999"):
        path.write_text(text)
        with pytest.raises(UserError) as info:
            parse.read_json(path)
        assert r"what\x1b[31m\n.json" in str(info.value) and str(info.value).isprintable()


def test_nothing_else_reads_json():
    """But for what is no file: the hub's messages, and what a package or this one has just checked or written."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        count = len(re.findall(r"json\.loads?\(", path.read_text()))
        if count:
            found[path.relative_to(PACKAGE).as_posix()] = count
    allowed = {"files/parse.py": 1, "files/huggingface.py": 1, "parallel/hub.py": 2, "simt/build.py": 1}
    assert found == allowed
