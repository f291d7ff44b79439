"""Tokenizers: GPT-2's published ids, bytes, llm.c's tokenizer file, and what goes wrong."""

import os
import re
import struct
import sys

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from llmc.data import tokenizer as tokenizers
from llmc.data.tokenizer import get, read_tokenizer_bin, tokenizer_for, tokenizer_name, vocabulary, write_tokenizer_bin
from llmc.errors import UserError


@pytest.fixture(scope="module")
def gpt2():
    return get("gpt2")


@pytest.fixture(params=["gpt2", "bytes"], scope="module")
def tokenizer(request):
    return get(request.param)


def test_gpt2_ids_are_the_published_ones(gpt2):
    assert (gpt2.name, gpt2.n_vocab, gpt2.eot) == ("gpt2", 50257, 50256)
    assert gpt2.encode("Hello, I'm a language model,").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert gpt2.decode([15496, 11, 995]) == "Hello, world"


def test_bytes_are_utf8():
    tokenizer = get("bytes")
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot) == ("bytes", 257, 256)
    assert tokenizer.encode("aé€").tolist() == [0x61, 0xC3, 0xA9, 0xE2, 0x82, 0xAC]
    assert tokenizer.decode_bytes(range(256)) == bytes(range(256))


def test_special_text_is_plain_text(tokenizer):
    """A document that contains <|endoftext|> must not end itself."""
    text = "a<|endoftext|>b"
    ids = tokenizer.encode(text)
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"


@given(text=st.text())
def test_encode_decode_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert isinstance(ids, np.ndarray) and ids.dtype == np.uint16 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids.tolist()) == text.encode()
    assert "".join(tokenizer.stream(iter(ids))) == text


@given(parts=st.lists(st.sampled_from([*" \n\t\u3000\x1c\x85a東", "12", "..."]), max_size=40))
def test_long_runs_of_white_space_encode_as_the_whole_would(gpt2, parts):
    """Every run of two or more is taken for a long one: the ids are those of the pattern all the same."""
    text, ordinary = "".join(parts), tiktoken.get_encoding("gpt2").encode_ordinary
    long, blank = tokenizers.LONG, tokenizers.LONG_BLANK
    try:
        tokenizers.LONG, tokenizers.LONG_BLANK = 2, re.compile(blank.pattern.replace(str(long), "2"))
        assert gpt2.encode(text).tolist() == ordinary(text)
    finally:
        tokenizers.LONG, tokenizers.LONG_BLANK = long, blank


def test_encode_batch_equals_encode(tokenizer):
    texts = ["To be,", "", " or not\n\nto be: 東京 🎭"]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        assert np.array_equal(ids, tokenizer.encode(text))


def test_streaming_holds_back_half_characters_and_survives_nonsense():
    tokenizer = get("bytes")
    assert list(tokenizer.stream("é€".encode())) == ["", "é", "", "", "€", ""]
    assert list(tokenizer.stream([0x61, 0xE2, 0x82])) == ["a", "", "", "\ufffd"]  # ends inside a character
    assert "".join(tokenizer.stream([0xFF, 0x61, 0xE2, 0x61])) == "\ufffda\ufffda"
    assert tokenizer.decode([0x61, 0xE2, 0x82]) == "a\ufffd"


def test_streaming_is_lazy():
    def ids():
        yield 104
        raise AssertionError("asked for a token before the first was shown")

    assert next(get("bytes").stream(ids())) == "h"


@pytest.mark.parametrize("wrong", [257, -1, 50257])
def test_unknown_id_is_named(wrong):
    with pytest.raises(UserError, match=rf"{wrong} .*0\.\.256.*bytes.*HINT"):
        get("bytes").decode([65, wrong])


def test_unknown_tokenizer_lists_the_known():
    with pytest.raises(UserError, match="'gpt3'.*HINT.*gpt2, bytes"):
        get("gpt3")


def test_a_model_s_tokenizer_follows_from_its_vocabulary():
    """Also where tokens were added or the vocabulary was padded: GPT-2's by one, to 128, to 1024."""
    for size, name in ((257, "bytes"), (50257, "gpt2"), (50258, "gpt2"), (50304, "gpt2"), (51200, "gpt2")):
        assert tokenizer_name(size) == tokenizer_for(size).name == tokenizer_for(size, name).name == name
    assert vocabulary("bytes") == get("bytes").n_vocab == 257 and vocabulary("gpt2") == get("gpt2").n_vocab == 50257
    for size in (1, 256, 258, 500, 50256, 51201, 128256):
        assert tokenizer_name(size) is None
    assert tokenizer_for(60000, "gpt2").name == "gpt2"


@pytest.mark.parametrize(
    "size, name, hint",
    [
        (257, "gpt2", "gpt2 has 50257 tokens, the model 257. HINT: give --tokenizer bytes"),
        (50304, "bytes", "bytes has 257 tokens, the model 50304. HINT: give --tokenizer gpt2"),
        (60000, None, "no tokenizer has 60000 tokens, as this model. HINT: give --tokenizer gpt2"),
        (500, None, "no tokenizer has 500 tokens, as this model. HINT: llmc has gpt2 50257, bytes 257"),
        (300, "bytes", "bytes has 257 tokens, the model 300. HINT: llmc has gpt2 50257, bytes 257"),
        (300, "gpt2", "gpt2 has 50257 tokens, the model 300. HINT: llmc has gpt2 50257, bytes 257"),
        (300, "words", "unknown tokenizer 'words'"),
    ],
)
def test_hints_about_a_tokenizer_lead_somewhere(size, name, hint):
    """What a hint says to give works: no two hints send a user in a circle."""
    with pytest.raises(UserError, match=hint) as error:
        tokenizer_for(size, name)
    advised = str(error.value).partition("HINT: give --tokenizer ")[2].rstrip(".")
    if advised:
        assert tokenizer_for(size, advised).name == advised


def test_gpt2_offline(monkeypatch, tmp_path):
    def no_network(name):
        raise ConnectionError("Max retries exceeded\nwith url")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="HINT.*TIKTOKEN_CACHE_DIR.*--tokenizer bytes") as error:
        get("gpt2")
    assert "\n" not in str(error.value)


def test_gpt2_without_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="HINT: pip install tiktoken"):
        get("gpt2")


def test_gpt2_vocabulary_is_kept_in_the_cache_folder(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)

    def get_encoding(name):
        seen.append(os.environ["TIKTOKEN_CACHE_DIR"])
        raise OSError("stop here")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(UserError):
        get("gpt2")
    assert seen == [str(tmp_path / "llmc" / "tiktoken")]


# ----------------------------------------------------------------------------
# gpt2_tokenizer.bin


def test_bin_round_trip(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.bin"
    write_tokenizer_bin(path, tokenizer)
    data = path.read_bytes()
    assert np.frombuffer(data, "<u4", 4).tolist() == [20240328, 2, tokenizer.n_vocab, tokenizer.eot]
    assert not any(data[16:1024])
    assert data[1024:1028] == b"\x01" + tokenizer.pieces[0] + b"\x01" + tokenizer.pieces[1]
    read = read_tokenizer_bin(path)
    assert (read.pieces, read.eot, read.n_vocab) == (tokenizer.pieces, tokenizer.eot, tokenizer.n_vocab)
    assert read.decode(tokenizer.encode("Exeunt, é")) == "Exeunt, é"
    with pytest.raises(UserError, match="only decode"):
        read.encode("a")


def test_bin_is_llm_c_s_byte_for_byte_in_both_directions(tmp_path):
    """A vocabulary of 4, packed by hand; lengths of 1 to 255 bytes."""
    path, pieces = tmp_path / "tokenizer.bin", [b"\x00", b"ab", bytes(range(255)), b"<|endoftext|>"]
    body = b"".join(struct.pack("<B", len(piece)) + piece for piece in pieces)
    path.write_bytes(struct.pack("<4I", 20240328, 2, 4, 3).ljust(1024, b"\0") + body)
    read = read_tokenizer_bin(path)
    assert (read.pieces, read.eot, read.n_vocab) == (pieces, 3, 4)
    write_tokenizer_bin(tmp_path / "again.bin", read)
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


def test_bin_version_1_has_gpt2_eot(gpt2, tmp_path):
    path = tmp_path / "tokenizer.bin"
    write_tokenizer_bin(path, gpt2)
    data = bytearray(path.read_bytes())
    data[4:8], data[12:16] = (1).to_bytes(4, "little"), bytes(4)
    path.write_bytes(data)
    assert read_tokenizer_bin(path).eot == 50256
    data[8:12] = (50000).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match="50000.*50257"):
        read_tokenizer_bin(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: b"", "0 bytes.*header"),
        (lambda d: d[:1000], "1000 bytes.*header"),
        (lambda d: b"\0" * 4 + d[4:], "magic number 0.*20240328"),
        (lambda d: d[:4] + b"\3" + d[5:], "version 3.*1 and 2"),
        (lambda d: d[:-1], "exactly the 257 tokens"),
        (lambda d: d + b"\0", "exactly the 257 tokens"),
        (lambda d: d[:12] + b"\1\1" + d[14:], "end-of-text id 257"),
    ],
)
def test_bad_bin_is_refused(change, message, tmp_path):
    path = tmp_path / "tokenizer.bin"
    write_tokenizer_bin(path, get("bytes"))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=f"{message}.*HINT"):
        read_tokenizer_bin(path)


def test_missing_bin_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.bin.*No such file.*HINT"):
        read_tokenizer_bin(tmp_path / "none.bin")
