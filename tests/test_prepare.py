"""Preparation: texts to shards, downloads, the default data, and what a user can get wrong."""

import hashlib
import io
import os
import subprocess
import sys
import tracemalloc
import urllib.error
import urllib.request

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.data import prepare as data
from llmc.data import texts
from llmc.data.__main__ import main
from llmc.data.cache import cache_dir
from llmc.data.loader import DataLoader
from llmc.data.prepare import dataset, prepare
from llmc.data.shards import read_shard, read_shard_header
from llmc.data.texts import pieces
from llmc.data.tokenizer import get
from llmc.errors import UserError

# ----------------------------------------------------------------------------
# streaming: pieces encode as the whole


@pytest.fixture(scope="module")
def gpt2():
    return get("gpt2")


def cut_at(text, cuts):
    cuts = sorted(min(cut, len(text)) for cut in cuts)
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


WORDS = ["a", "'s", "'ll", "'", "don't", "Zoë", "東京", "🎭", "e\u0301", "12", "3", "...", "!?", "<|endoftext|>"]
SPACES = [" ", "  ", "\n", "\n\n", "\n\n\n", "\t", "\r\n", "\xa0", "\u3000", "\x1c", "\x85", "\u2028", "   \n"]
TEXTS = st.lists(st.sampled_from(WORDS + 2 * SPACES) | st.text(max_size=3), max_size=30).map("".join)
CUTS = st.lists(st.integers(0, 60), max_size=8)


@settings(max_examples=400)
@given(text=TEXTS, cuts=CUTS)
@example(text="a  b", cuts=[2])
@example(text="a \n b", cuts=[3])
@example(text="x\n\n\ny", cuts=[2, 3, 4])
def test_streamed_pieces_encode_as_the_whole(gpt2, text, cuts):
    parts = list(pieces(cut_at(text, cuts), blank_lines=False))
    assert "".join(piece for _, piece in parts) == text
    assert [starts for starts, _ in parts] == [True] * bool(parts) + [False] * (len(parts) - 1)
    expected = gpt2.encode(text).tolist()
    assert [i for _, piece in parts for i in gpt2.encode(piece).tolist()] == expected


@settings(max_examples=400)
@given(text=TEXTS, cuts=CUTS)
@example(text="a\n\n\n\n\nb\n\n", cuts=[2, 3, 4, 5])
def test_streamed_blank_line_documents_are_those_of_the_whole(gpt2, text, cuts):
    documents = text.split("\n\n")
    documents = [document + "\n\n" for document in documents[:-1]] + [d for d in documents[-1:] if d]
    streamed = []
    for starts, piece in pieces(cut_at(text, cuts), blank_lines=True):
        if starts:
            streamed.append([])
        streamed[-1].append(piece)
    assert ["".join(parts) for parts in streamed] == documents
    for parts, document in zip(streamed, documents, strict=True):
        assert [i for part in parts for i in gpt2.encode(part).tolist()] == gpt2.encode(document).tolist()


def test_streaming_does_cut():
    """The property would also hold if nothing were ever cut."""
    chunks = ["some words and ", "others and\nmore ", "words"]
    assert [len(piece) for _, piece in pieces(chunks, blank_lines=False)] == [14, 16, 6]


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_file_streamed_in_small_chunks(tokenizer, tmp_path, monkeypatch):
    text = "“Ça va,” said 東京 🎭.\r\n\r\n  And  \n\n so\t on\u2028… " * 200
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(texts, "CHUNK_BYTES", 37)
    monkeypatch.setattr(data, "BATCH_CHARS", 300)
    encoder = get(tokenizer)
    ids = np.concatenate(list(data.tokenize([str(path)], encoder, blank_lines=False)))
    assert ids[0] == encoder.eot
    assert np.array_equal(ids[1:], encoder.encode(text))


def test_streaming_memory_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_bytes(b"To be, or not to be: that is the question.\n" * 700_000)
    monkeypatch.setattr(data, "BATCH_CHARS", 1 << 20)
    tracemalloc.start()
    prepared = prepare([str(path)], "bytes", out=str(tmp_path / "out"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(file.num_tokens for file in prepared.files) == path.stat().st_size + 1
    assert peak < path.stat().st_size / 2


# ----------------------------------------------------------------------------
# prepare


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of this test's own; the text comes from LLMC_DATA_DIR, or once from the network."""
    source = os.environ.get("LLMC_DATA_DIR") or cache_dir()
    monkeypatch.setenv("LLMC_DATA_DIR", source)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llmc"


@pytest.fixture(scope="session", autouse=True)
def shakespeare():
    """The bytes of the text. It and GPT-2's vocabulary are there before tests forbid the network and move the cache."""
    get("gpt2")
    with open(data.tinyshakespeare_text(), "rb") as file:
        return file.read()


@pytest.fixture
def offline(monkeypatch):
    def urlopen(url, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("LLMC_DATA_DIR", "")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_tinyshakespeare_gpt2_is_that_of_llmc(cache, gpt2, shakespeare, capsys):
    assert main(["prepare", "tinyshakespeare"]) == 0
    folder = cache / "tinyshakespeare-gpt2"
    train, val = folder / "tiny_shakespeare_train.bin", folder / "tiny_shakespeare_val.bin"
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {val}: 32768 tokens, 66560 bytes",
        f"wrote {train}: 305260 tokens, 611544 bytes",
        f"next: python -m llmc.train -i {train} -j {val}",
    ]
    tokens = np.concatenate([read_shard(val), read_shard(train)])
    sections = shakespeare.decode().split("\n\n")
    expected = [i for s in sections[:-1] for i in [50256, *gpt2.encode(s + "\n\n").tolist()]]
    assert tokens.tolist() == expected + [50256, *gpt2.encode(sections[-1]).tolist()]
    assert not any(train.read_bytes()[12:1024]), "the header is llm.c's"
    assert main(["prepare", "tinyshakespeare"]) == 0
    assert capsys.readouterr().out.count("unchanged: ") == 2


def test_tinyshakespeare_bytes(cache, shakespeare, capsys):
    assert main(["prepare", "tinyshakespeare", "--tokenizer", "bytes"]) == 0
    out = capsys.readouterr().out
    train = read_shard(cache / "tinyshakespeare-bytes" / "tiny_shakespeare_train.bin")
    val = read_shard(cache / "tinyshakespeare-bytes" / "tiny_shakespeare_val.bin")
    assert (train.size, val.size) == (1003854, 111540)
    assert train.astype(np.uint8).tobytes() + val.astype(np.uint8).tobytes() == shakespeare
    assert read_shard_header(cache / "tinyshakespeare-bytes" / "tiny_shakespeare_val.bin").vocab_size == 257
    assert out.endswith("tiny_shakespeare_val.bin --tokenizer bytes\n")


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_known_hashes_of_finished_shards(tokenizer, tmp_path):
    prepared = prepare(["tinyshakespeare"], tokenizer, out=str(tmp_path))
    for path, expected in zip(prepared[:2], data.TINYSHAKESPEARE_SHARDS[tokenizer], strict=True):
        with open(path, "rb") as file:
            assert hashlib.sha256(file.read()).hexdigest() == expected


def test_user_files(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my text.txt").write_text("abcd\n\nefgh", encoding="utf-8")
    (tmp_path / "b.txt").write_text("ij", encoding="utf-8")
    command = ["prepare", "my text.txt", "b.txt", "--tokenizer", "bytes"]
    assert main([*command, "--val-fraction", "0.25"]) == 0
    out, err = capfd.readouterr()
    assert err == "", "no progress bar where stderr is no terminal"
    expected = [256, *b"abcd\n\nefgh", 256, *b"ij"]
    assert read_shard("my text-bytes/my text_train.bin").tolist() == expected[:10]
    assert read_shard("my text-bytes/my text_val.bin").tolist() == expected[10:]
    assert "-i 'my text-bytes/my text_train.bin' -j 'my text-bytes/my text_val.bin' --tokenizer bytes" in out

    assert main([*command, "--val-fraction", "0", "--split", "blank-lines", "--out", "all"]) == 0
    assert os.listdir("all") == ["my text_train.bin"]
    assert read_shard("all/my text_train.bin").tolist() == [256, *b"abcd\n\n", 256, *b"efgh", 256, *b"ij"]
    assert " -j " not in capfd.readouterr().out


def test_many_shards_of_equal_size(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(bytes(range(32, 127)) * 10)  # 951 tokens with the EOT
    prepared = prepare([str(path)], "bytes", out=str(tmp_path), shard_size=200)
    train = [read_shard(tmp_path / f"x_train_{i:06d}.bin") for i in range(5)]
    assert [shard.size for shard in train] == [171] * 5
    assert read_shard(tmp_path / "x_val.bin").size == 96
    loader = DataLoader(prepared.train, 1, 8)
    assert loader.num_tokens == 855 and prepared.val == str(tmp_path / "x_val.bin")
    assert np.concatenate(train).tolist() == [256, *(bytes(range(32, 127)) * 9)[:854]]


def test_other_content_is_not_overwritten_silently(tmp_path, capsys):
    path, out = tmp_path / "x.txt", tmp_path / "out"
    command = ["prepare", str(path), "--tokenizer", "bytes", "--out", str(out)]
    path.write_bytes(b"one text" * 10)
    assert main([*command, "--shard-size", "30"]) == 0
    before = {name: (out / name).read_bytes() for name in sorted(os.listdir(out))}
    assert len(before) == 4
    path.write_bytes(b"another text" * 10)
    assert main(command) == 2
    assert "exists with other content. HINT" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in sorted(os.listdir(out))} == before
    assert main([*command, "--overwrite"]) == 0
    assert sorted(os.listdir(out)) == ["x_train.bin", "x_val.bin"], "no shard of the old text may stay"
    (out / "x_val.bin").write_bytes(b"damaged")
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 0


BAD_COMMANDS = {
    "no such file": (["none.txt"], "none.txt is neither a file nor a known dataset. HINT"),
    "a folder": (["."], "cannot read .: Is a directory. HINT"),
    "empty file": (["empty.txt"], "empty.txt is empty. HINT"),
    "not UTF-8": (["latin1.txt"], "latin1.txt is not UTF-8 at byte offset 5 (byte 0xe9). HINT"),
    "cut UTF-8": (["cut.txt"], "cut.txt is not UTF-8 at byte offset 3 (byte 0xe2). HINT"),
    "too short": (["one.txt", "--val-fraction", "0.9"], "2 tokens are too few to split. HINT"),
    "unknown tokenizer": (["one.txt", "--tokenizer", "words"], "unknown tokenizer 'words'. HINT"),
    "val fraction": (
        ["one.txt", "--val-fraction", "1.5"],
        "--val-fraction: 1.5 is not a number from 0 to below 1. HINT",
    ),
    "shard size": (["one.txt", "--shard-size", "-1"], "--shard-size: -1 is not a whole number of at least 1. HINT"),
    "out is a file": (["one.txt", "--out", "one.txt"], "cannot write to one.txt: File exists. HINT"),
    "out cannot be made": (["one.txt", "--out", "one.txt/x"], "cannot write to one.txt/x: Not a directory. HINT"),
    "not a number": (["one.txt", "--val-fraction", "x"], "--val-fraction: x is not a number from 0 to below 1. HINT"),
    "unknown split": (["one.txt", "--split", "words"], "invalid choice: 'words'"),
    "no name": ([], "the following arguments are required: NAME|FILE.txt. HINT"),
    "mixed": (["one.txt", "tinyshakespeare"], "a known dataset and files cannot be mixed. HINT"),
    "fixed split": (["tinyshakespeare", "--val-fraction", "0.5"], "tinyshakespeare has a fixed split. HINT"),
    "known, out is a file": (["tinyshakespeare", "--out", "one.txt"], "cannot write to one.txt: File exists. HINT"),
}


@pytest.mark.parametrize("args, message", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_bad_command_ends_with_one_line_and_code_2(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(texts, "CHUNK_BYTES", 4)  # the error may be in any chunk, and a character in two
    for name, content in {
        "empty": b"",
        "latin1": "cafés é".encode("latin-1")[:3] + b"e \xe9t\xe9",
        "cut": b"abc\xe2\x82",
    }.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "one.txt").write_bytes(b"a")
    tokenizer = [] if "--tokenizer" in args else ["--tokenizer", "bytes"]
    try:
        code = main(["prepare", *args, *tokenizer])
    except SystemExit as error:  # by argparse, before main has begun
        code = error.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("llmc.data") and " error: " in err and message in err and err.count("\n") == 1
    assert not [name for name in sorted(os.listdir(tmp_path)) if name.endswith(".bin")]


def test_command_as_a_process(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "llmc.data", "prepare", "none.txt"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(data.__file__)))},
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("llmc.data: error: none.txt") and run.stderr.count("\n") == 1


def test_disk_full_leaves_no_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.txt"
    path.write_bytes(b"some text" * 10)

    class Full(io.BytesIO):
        def write(self, chunk):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: Full())
    assert main(["prepare", str(path), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 2
    assert "No space left on device. HINT" in capsys.readouterr().err
    assert not os.listdir(tmp_path / "out")


def test_import_is_cheap():
    program = "import sys, llmc.data.prepare, llmc.data.tokenizer; print([m for m in LAZY if m in sys.modules])"
    lazy = ["torch", "tiktoken", "tqdm", "urllib.request", "requests", "cupy"]
    run = subprocess.run([sys.executable, "-c", program.replace("LAZY", repr(lazy))], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


# ----------------------------------------------------------------------------
# downloads and the default data


def serve(monkeypatch, content):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(content)

    monkeypatch.setenv("LLMC_DATA_DIR", "")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def files_below(folder):
    return sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)


def test_download_once(cache, shakespeare, monkeypatch):
    asked = serve(monkeypatch, shakespeare)
    path = data.tinyshakespeare_text()
    assert path == str(cache / "tinyshakespeare" / "input.txt") and asked == [data.TINYSHAKESPEARE_URL]
    assert data.tinyshakespeare_text() == path and len(asked) == 1
    with open(path, "r+b") as file:
        file.write(b"x")
    assert data.tinyshakespeare_text() == path and len(asked) == 2, "a damaged copy in the cache is replaced"
    with open(path, "rb") as file:
        assert file.read() == shakespeare


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"x" + b[1:], lambda b: b"<html>"])
def test_wrong_download_is_not_kept(cache, shakespeare, monkeypatch, change):
    serve(monkeypatch, change(shakespeare))
    with pytest.raises(UserError, match="expected 1115394 bytes with 86c4e6aa.*HINT") as error:
        data.tinyshakespeare_text()
    assert "\n" not in str(error.value) and not files_below(cache)


def test_wrong_file_in_the_data_folder_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tinyshakespeare" / "input.txt"
    path.parent.mkdir()
    path.write_bytes(b"something else")
    monkeypatch.setenv("LLMC_DATA_DIR", str(tmp_path))
    assert main(["prepare", "tinyshakespeare"]) == 2
    err = capsys.readouterr().err
    assert f"{path} is not Tiny Shakespeare: 14 bytes" in err and "HINT" in err
    with pytest.raises(UserError, match="is not Tiny Shakespeare"):
        data.prepare_default("bytes")


def test_named_dataset_offline_is_an_error(offline, cache, capsys):
    assert main(["prepare", "tinyshakespeare", "--tokenizer", "bytes"]) == 2
    err = capsys.readouterr().err
    assert "cannot download https://" in err and "HINT" in err and err.count("\n") == 1
    assert not files_below(cache)
    with pytest.raises(UserError, match="cannot download"):
        data.prepare_default("bytes", allow_fallback=False)


def test_default_data_is_reused_without_its_source(cache, monkeypatch):
    train, val, what = data.prepare_default("bytes")
    assert what == f"Tiny Shakespeare in {cache}/tinyshakespeare-bytes"
    assert DataLoader(train, 4, 64, vocab_size=257).num_tokens == 1003854
    assert read_shard_header(val).num_tokens == 111540
    monkeypatch.setattr(data, "tinyshakespeare_text", lambda: pytest.fail("finished shards are there"))
    assert data.prepare_default("bytes") == (train, val, what)


def test_damaged_default_data_is_made_again(cache):
    train, val, _ = data.prepare_default("bytes")
    good = open(val, "rb").read()
    with open(val, "r+b") as file:
        file.seek(2000)
        file.write(b"\xff\xff")
    assert data.prepare_default("bytes")[:2] == (train, val)
    assert open(val, "rb").read() == good


def test_dataset_of_a_name_a_folder_and_a_text(cache, tmp_path, monkeypatch, offline):
    with pytest.raises(UserError, match="cannot download"):
        dataset("shakespeare", "bytes")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_bytes(b"a book of ten words, and then another one " * 9)
    made = dataset("book.txt", "bytes")
    assert made == (os.path.join("book-bytes", "book_train.bin"), made.train.replace("train", "val"), "bytes", 257)
    found = dataset("book-bytes", "bytes")
    assert DataLoader(found, 1, 8).paths == [made.train] and found.vocab_size == 257
    with pytest.raises(UserError, match="book-bytes: its shards have a vocabulary of 257 tokens, gpt2 has 50257.*HINT"):
        dataset("book-bytes", "gpt2")
    with pytest.raises(UserError, match="none.txt is neither"):
        dataset("none.txt", "bytes")


def test_dataset_shakespeare(cache):
    data = dataset("shakespeare", "bytes")
    assert (data.tokenizer, data.vocab_size) == ("bytes", 257)
    assert DataLoader(data, 12, 96).num_tokens == 1003854 and read_shard_header(data.val).num_tokens == 111540


def test_default_data_offline_is_python_documentation(offline, cache):
    train, val, what = data.prepare_default("bytes")
    assert "Python's own documentation" in what and "cannot be had" in what and str(cache) in what and "\n" not in what
    tokens = np.concatenate([read_shard(train), read_shard(val)])
    text = data.builtin_text()
    assert tokens[0] == 256 and tokens[1:].astype(np.uint8).tobytes().decode() == text
    assert 400_000 < len(text) < 600_000
    assert read_shard_header(val).num_tokens == -(-tokens.size // 10)
    assert data.prepare_default("bytes") == (train, val, what)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    train, _, what = data.prepare_default("bytes")
    assert os.path.dirname(train).startswith(str(tmp_path / "llmc-")) and read_shard_header(train)
    assert what.endswith(f"({tmp_path}/file/llmc is not writable)")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write to .*HINT"):
        data.prepare_default("bytes")


def test_cache_folder_of_each_platform(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == "/xdg/llmc"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == "/home/me/.cache/llmc"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_dir() == "/home/me/Library/Caches/llmc"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/appdata")
    assert cache_dir() == "/appdata/llmc/cache"
