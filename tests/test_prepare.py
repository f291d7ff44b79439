"""Preparation: texts to shards, downloads, the default data, and what a user can get wrong."""

import bz2
import codecs
import fnmatch
import gzip
import hashlib
import io
import lzma
import os
import random
import re
import subprocess
import sys
import tarfile
import tracemalloc
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.data import prepare as data
from llmc.data import texts
from llmc.data.__main__ import main
from llmc.data.cache import cache_dir, writable_cache_dir
from llmc.data.loader import DataLoader
from llmc.data.prepare import dataset, prepare
from llmc.data.shards import read_shard, read_shard_header, shard_paths, write_shard
from llmc.data.texts import EOT_TEXT, SPLITS, find_texts, pieces
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


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(data.__file__).parents[2])}
WORDS = ["a", "'s", "'ll", "'", "don't", "Zoë", "東京", "🎭", "e\u0301", "12", "3", "...", "!?", "<|endoftext|>"]
SPACES = [" ", "  ", "\n", "\n\n", "\n\n\n", "\t", "\r\n", "\xa0", "\u3000", "\x1c", "\x85", "\u2028", "   \n"]
TEXTS = st.lists(
    st.sampled_from(WORDS + 2 * SPACES + ["\r", "\r\r", "\r\n\r\n"]) | st.text(max_size=3), max_size=30
).map("".join)
CUTS = st.lists(st.integers(0, 60), max_size=8)


@settings(max_examples=400)
@given(text=TEXTS, cuts=CUTS)
@example(text="a  b", cuts=[2])
@example(text="a \n b", cuts=[3])
@example(text="x\n\n\ny", cuts=[2, 3, 4])
def test_streamed_pieces_encode_as_the_whole(gpt2, text, cuts):
    parts = list(pieces(cut_at(text, cuts), SPLITS["files"]))
    assert "".join(piece for _, piece in parts) == text
    assert [starts for starts, _ in parts] == [True] * bool(parts) + [False] * (len(parts) - 1)
    expected = gpt2.encode(text).tolist()
    assert [i for _, piece in parts for i in gpt2.encode(piece).tolist()] == expected


def blank_line_documents(text):
    """Documents end behind two line ends in a row, each "\\n", "\\r\\n" or "\\r": character by character."""
    found, here, ends, i = [], "", 0, 0
    while i < len(text):
        unit = "\r\n" if text.startswith("\r\n", i) else text[i]
        here, i, ends = here + unit, i + len(unit), ends + 1 if unit in ("\r\n", "\n", "\r") else 0
        if ends == 2:
            found, here, ends = [*found, here], "", 0
    return found + [here] * bool(here)


@settings(max_examples=400)
@given(text=TEXTS, cuts=CUTS)
@example(text="a\r\n\r\nb\r\rc\r\n", cuts=[2, 3, 4, 5, 7, 10])
@example(text="a\n\n\n\n\nb\n\n", cuts=[2, 3, 4, 5])
def test_streamed_blank_line_documents_are_those_of_the_whole(gpt2, text, cuts):
    documents = blank_line_documents(text)
    streamed = []
    for starts, piece in pieces(cut_at(text, cuts), SPLITS["blank-lines"]):
        if starts:
            streamed.append([])
        streamed[-1].append(piece)
    assert ["".join(parts) for parts in streamed] == documents
    for parts, document in zip(streamed, documents, strict=True):
        assert [i for part in parts for i in gpt2.encode(part).tolist()] == gpt2.encode(document).tolist()


def test_streaming_does_cut():
    """The property would also hold if nothing were ever cut."""
    chunks = ["some words and ", "others and\nmore ", "words"]
    assert [len(piece) for _, piece in pieces(chunks, SPLITS["files"])] == [14, 16, 6]


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_file_streamed_in_small_chunks(tokenizer, tmp_path, monkeypatch):
    text = "“Ça va,” said 東京 🎭.\r\n\r\n  And  \n\n so\t on\u2028… " * 200
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(texts, "CHUNK_BYTES", 37)
    monkeypatch.setattr(data, "BATCH_CHARS", 300)
    encoder = get(tokenizer)
    ids = np.concatenate(list(data.Text([str(path)], encoder)))
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


# ----------------------------------------------------------------------------
# text as people have it


def tokens_of(*names, out="out", **options):
    """All tokens that `prepare` makes of the names, byte by byte."""
    train, val, *_ = prepare([str(name) for name in names], "bytes", out=str(out), val_fraction=0, **options)
    assert val is None
    return read_shard(train).tolist()


TEXT = "“Ça va,” said 東京 🎭.\r\n\r\nAnd so on, and on.\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_a_byte_order_mark_is_no_text(tokenizer, folder):
    (folder / "plain.txt").write_text(TEXT, encoding="utf-8", newline="")
    (folder / "bom.txt").write_text(TEXT, encoding="utf-8-sig", newline="")
    marked, plain = (
        read_shard(prepare([name], tokenizer, out=name[:3], val_fraction=0).train) for name in ("bom.txt", "plain.txt")
    )
    assert np.array_equal(marked, plain)
    if tokenizer == "gpt2":
        (folder / "hello.txt").write_bytes(b"\xef\xbb\xbfHello world")
        hello = prepare(["hello.txt"], out="hello", val_fraction=0)
        assert read_shard(hello.train).tolist() == [50256, 15496, 995]


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("suffix, pack", PACKERS.items(), ids=PACKERS)
def test_packed_text_is_unpacked(suffix, pack, folder):
    """Also of two parts, each packed for itself, and whatever the file is called."""
    halves = TEXT[:20].encode() * 300, TEXT[20:].encode() * 300
    (folder / "plain.txt").write_bytes(b"".join(halves))
    for name in (f"book.txt.{suffix}", "download"):
        (folder / name).write_bytes(pack(halves[0]) + pack(halves[1]))
        assert tokens_of(name, out=f"of-{name}") == tokens_of("plain.txt")
    assert os.listdir(f"of-book.txt.{suffix}") == ["book_train.bin"]
    (folder / f"docs.jsonl.{suffix}").write_bytes(pack(b'{"text": "a document"}\n'))
    assert tokens_of(f"docs.jsonl.{suffix}", out="docs") == [256, *b"a document"]


def test_zstd_without_its_package(folder, monkeypatch, capsys):
    (folder / "book.zst").write_bytes(zstandard.compress(TEXT.encode()))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    assert main(["prepare", "book.zst", "--tokenizer", "bytes"]) == 2
    assert "HINT: pip install zstandard" in capsys.readouterr().err


def test_json_lines_are_a_document_each(folder):
    one, two = '{"text": "one\\u00e9", "id": 1}', '{"id": 2, "body": "x", "text": "two\\n\\nparts"}' + "\r"
    (folder / "docs.jsonl").write_text("\n".join([one, "", two, '{"text": ""}']), encoding="utf-8", newline="")
    one = [256, *"oneé".encode()]
    assert tokens_of("docs.jsonl") == [*one, 256, *b"two\n\nparts"]
    assert tokens_of("docs.jsonl", out="parts", split="blank-lines") == [*one, 256, *b"two\n\n", 256, *b"parts"]
    (folder / "lines.txt").write_text('{"body": "a"}\n{"body": "b"}\n')
    assert tokens_of("lines.txt", out="body", field="body") == [256, *b"a", 256, *b"b"]
    assert tokens_of("lines.txt", out="plain") == [256, *b'{"body": "a"}\n{"body": "b"}\n']


def test_a_folder_is_its_text_files_in_order(folder, capsys):
    for name, content in {
        "texts/b.txt": b"bbb", "texts/a/z.md": b"zzz", "texts/a/.hidden.txt": b"no", "texts/.git/x.txt": b"no",
        "texts/a/1.bin": bytes(99), "texts/a/2.bin": b"\x7fELF\0", "texts/a/3.bin": b"%PDF-1.7\n",
        "texts/c": "ccç".encode(), "texts/d.jsonl": b'{"text": "ddd"}\n',
        "texts/p.gz": gzip.compress(b"ppp"), "texts/empty": b"", "more.txt": b"more",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    command = ["prepare", "texts", "more.txt", "--tokenizer", "bytes", "--val-fraction", "0"]
    assert main(command) == 0
    out = capsys.readouterr().out
    passed = [os.path.join("texts", *name) for name in (("a", "1.bin"), ("a", "2.bin"), ("a", "3.bin"))]
    assert f"passed over, as they hold no text: {', '.join(passed)} and 1 more\n" in out
    expected = [i for text in ("bbb", "ccç", "ddd", "ppp", "zzz", "more") for i in (256, *text.encode())]
    assert read_shard("texts-bytes/texts_train.bin").tolist() == expected
    assert main(["prepare", ".", *command[3:], "--out", "texts/here"]) == 0
    assert os.listdir("texts/here") and not [path for path in find_texts(["texts"], "x")[0] if "here" in path]
    below = [path for paths in find_texts(["texts"], "texts/here") for path in paths]
    assert len(below) == 9 and not [path for path in below if "here" in path], "what is made itself is not looked at"


def test_names_do_not_steer_the_terminal(folder, capsys):
    (folder / "a\x1b[2Jb.txt").write_text("some text " * 100)
    (folder / "texts").mkdir()
    (folder / "texts" / "\x07.bin").write_bytes(bytes(9))
    (folder / "texts" / "\x1bc.txt").write_text("more")
    assert main(["prepare", "a\x1b[2Jb.txt", "texts", "--tokenizer", "bytes"]) == 0
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable() and "a\\x1b[2Jb_train.bin" in out and "\\x07.bin" in out
    (folder / "texts" / "\x1bc.txt").write_bytes(b"\xff")
    assert main(["prepare", "texts", "--tokenizer", "bytes"]) == 2
    assert "\\x1bc.txt is not UTF-8" in capsys.readouterr().err


def test_standard_input(folder):
    command = [sys.executable, "-m", "llmc.data", "prepare", "-", "--tokenizer", "bytes"]

    def run(text):
        return subprocess.run(command, input=text, capture_output=True, env=ENVIRONMENT)

    assert run(gzip.compress(TEXT.encode() * 9)).returncode == 0
    shards = [read_shard(f"stdin-bytes/stdin_{split}.bin") for split in ("train", "val")]
    assert np.concatenate(shards).tolist() == [256, *(TEXT.encode() * 9)]
    done = run(b"")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"llmc.data: error: standard input is empty. HINT: name a file with text\n"
    closed = subprocess.run(
        f"{sys.executable} -m llmc.data prepare - <&-", shell=True, capture_output=True, env=ENVIRONMENT
    )
    assert closed.returncode == 2 and closed.stderr.count(b"\n") == 1 and b"HINT" in closed.stderr


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_documents_that_contain_endoftext(chunk, folder, monkeypatch, capsys):
    monkeypatch.setattr(texts, "CHUNK_BYTES", chunk)
    story = f"{EOT_TEXT}\r\nOnce upon a time.\n{EOT_TEXT}\nAnd <|then|>{EOT_TEXT}{EOT_TEXT}\n\nthe end"
    (folder / "stories.txt").write_text(story, newline="")
    command = ["prepare", "stories.txt", "--tokenizer", "bytes", "--val-fraction", "0"]
    assert main(command) == 0
    assert f"{EOT_TEXT} stands in the text 4 times and was encoded as plain text. HINT" in capsys.readouterr().out
    assert read_shard("stories-bytes/stories_train.bin").tolist() == [256, *story.encode()]
    assert main([*command, "--split", "endoftext", "--out", "split"]) == 0
    assert EOT_TEXT not in capsys.readouterr().out
    stories = ["Once upon a time.\n", "And <|then|>", "the end"]
    assert read_shard("split/stories_train.bin").tolist() == [i for s in stories for i in (256, *s.encode())]


@pytest.mark.parametrize("blank", [" ", "\n", "\r\n", "\u3000"])
def test_a_million_blanks(blank, gpt2, folder):
    text = "a" + blank * (1_000_000 // len(blank)) + "b c"
    (folder / "blanks.txt").write_text(text, encoding="utf-8", newline="")
    ids = read_shard(prepare(["blanks.txt"], "gpt2", val_fraction=0).train)
    assert ids[0] == 50256 and gpt2.decode(ids[1:]) == text


def test_an_input_too_small_to_be_useful_says_so(folder, capsys):
    (folder / "small.txt").write_text("word " * 100)
    (folder / "fine.txt").write_text("word " * 1000)
    assert main(["prepare", "small.txt", "--tokenizer", "bytes"]) == 0
    assert "51 tokens for validation are too few to be useful. HINT: use a longer text" in capsys.readouterr().out
    assert main(["prepare", "fine.txt", "--tokenizer", "bytes"]) == 0
    assert "too few" not in capsys.readouterr().out
    (folder / "tiny.txt").write_text("ab")
    assert main(["prepare", "tiny.txt", "--tokenizer", "bytes"]) == 2
    assert "tiny.txt: 3 tokens are too few to split. HINT" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "medieval", "TRAINING notes", "a_train_b", "val", "book_val", "book"])
@pytest.mark.parametrize("shard_size", [10**8, 3000])
def test_no_pattern_matches_the_other_split(name, shard_size, folder):
    """Also not the loose ones that people write: *train*.bin, *val*.bin."""
    (folder / f"{name}.txt").write_text("To be, or not to be. " * 500)
    prepared = prepare([f"{name}.txt"], "bytes", out="data", shard_size=shard_size)
    files = [file.path for file in prepared.files]
    for split, pattern in ("train", prepared.train), ("val", prepared.val):
        found = DataLoader(pattern, 1, 8).paths
        assert found == DataLoader(f"data/*{split}*.bin", 1, 8).paths and set(found) < set(files)
    assert len(DataLoader(prepared.train, 1, 8).paths) + len(DataLoader(prepared.val, 1, 8).paths) == len(files)


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


def test_more_shards_than_names_are_refused(folder, monkeypatch):
    (folder / "x.txt").write_text("some text " * 100)
    monkeypatch.setattr(data, "MAX_SHARDS", 10)
    with pytest.raises(UserError, match="--shard-size 89 makes 11 shards of train. HINT: 90 or more"):
        prepare(["x.txt"], "bytes", shard_size=89)
    assert len(prepare(["x.txt"], "bytes", shard_size=90).files) == 10 + 2


def test_readme_s_patterns_are_those_of_what_its_commands_make(folder):
    """For a small text and for one of several shards; they match no shard of the other split, whatever it is called."""
    readme = (Path(data.__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    patterns = re.findall(r"-([ij]) '?(book-bytes/[^' ]+)", readme)
    assert {flag for flag, _ in patterns} == {"i", "j"}
    (folder / "book.txt").write_text("some words of a book " * 100)
    for shard_size in (10**8, 300):
        prepared = prepare(["book.txt"], "bytes", shard_size=shard_size, overwrite=True)
        expected = {flag: shard_paths(p) for flag, p in (("i", prepared.train), ("j", prepared.val))}
        for flag, pattern in patterns:
            assert [Path(path) for path in shard_paths(pattern)] == [Path(path) for path in expected[flag]]
            assert not fnmatch.fnmatch("book-bytes/train_val.bin", pattern) or flag == "j"


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


# ----------------------------------------------------------------------------
# whole sets


def test_many_processes_into_one_place_leave_one_whole_set(folder):
    """Of different texts with one name: with --overwrite the set is that of one text, without it the first one's."""
    sets = []
    for i in range(4):
        (folder / str(i)).mkdir()
        (folder / str(i) / "x.txt").write_text(f"text {i} " * 9000)
        prepared = prepare([f"{i}/x.txt"], "bytes", out=f"alone{i}", shard_size=9000)
        sets.append({os.path.basename(file.path): Path(file.path).read_bytes() for file in prepared.files})
    for flags, codes in ((["--overwrite"], [0, 0, 0, 0]), ([], [0, 2, 2, 2])):
        command = [sys.executable, "-m", "llmc.data", "prepare", "--tokenizer", "bytes", "--shard-size", "9000"]
        command += [*flags, "--out", f"out{len(flags)}"]
        running = [subprocess.Popen([*command, f"{i}/x.txt"], env=ENVIRONMENT) for i in range(4)]
        assert sorted(process.wait() for process in running) == codes
        found = {path.name: path.read_bytes() for path in (folder / f"out{len(flags)}").iterdir()}
        assert found in sets, sorted(found)


KILLED = """
import os, sys
from llmc.data import prepare
count, replace = int(sys.argv[2]), os.replace
def killed(*args):
    global count
    count -= args[1].endswith(".bin")
    if count < 0:
        os._exit(9)
    replace(*args)
os.replace = killed
prepare.prepare(["new/x.txt"], "bytes", out=sys.argv[1], shard_size=2000, overwrite=True)
"""


@pytest.mark.parametrize("old_size", [None, 500, 3000, 7000])
def test_a_kill_leaves_one_whole_set_or_none_that_is_used(old_size, folder):
    """The new set has 4 + 1 shards, the old one none, fewer, as many, or more. Killed before each gets its name."""
    for name, size in ("old", old_size), ("new", 8000):
        (folder / name).mkdir()
        (folder / name / "x.txt").write_text(f"{name} text " * (size // 9) if size else "")
    new = prepare(["new/x.txt"], "bytes", out="expected", shard_size=2000)
    content = [Path(file.path).read_bytes() for file in new.files]
    for kill in range(len(new.files)):
        out = f"out{kill}"
        old = prepare(["old/x.txt"], "bytes", out=out, shard_size=1500).files if old_size else []
        before = {file.path: Path(file.path).read_bytes() for file in old}
        killed = subprocess.run([sys.executable, "-c", KILLED, out, str(kill)], env=ENVIRONMENT)
        assert killed.returncode == 9 and [name for name in os.listdir(out) if name.endswith(".tmp")]
        if kill == 0 and old_size:
            assert all(Path(path).read_bytes() == raw for path, raw in before.items())
        for path in Path(out).glob("x_*.bin"):
            with pytest.raises(UserError, match="of a set that is not complete.*HINT: run it again"):
                DataLoader(str(path), 1, 8)
        again = prepare(["new/x.txt"], "bytes", out=out, shard_size=2000)
        assert [Path(file.path).read_bytes() for file in again.files] == content
        assert sorted(os.listdir(out)) == sorted(os.listdir("expected")), "nothing of the killed one is left"
        assert DataLoader(again.train, 1, 8).num_tokens == DataLoader(new.train, 1, 8).num_tokens


def test_a_set_is_not_touched_where_the_disk_is_full(folder, monkeypatch, capsys):
    (folder / "x.txt").write_text("some text " * 900)
    command = ["prepare", "x.txt", "--tokenizer", "bytes", "--out", "out", "--shard-size", "2000", "--overwrite"]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    (folder / "x.txt").write_text("other text " * 900)
    calls, fsync = [], os.fsync

    def full(file):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err == (
        "llmc.data: error: cannot write to out: No space left on device. HINT: choose another folder with --out\n"
    )
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before


BAD_COMMANDS = {
    "no such file": (["none.txt"], "none.txt is neither a file nor a known dataset. HINT"),
    "a folder without text": (["folder"], "folder is a folder without text files. HINT"),
    "a pipe": (["pipe"], "cannot read pipe: it is a named pipe, not a file. HINT"),
    "a device": (["/dev/zero"], "cannot read /dev/zero: it is a device, not a file. HINT"),
    "a NUL in the name": (["a\0b"], "a\\x00b is neither a file nor a known dataset. HINT"),
    "standard input twice": (["-", "-"], "- is named twice"),
    "field of known data": (["tinyshakespeare", "--field", "text"], "--field out"),
    "UTF-16": (["utf16.txt"], "utf16.txt is UTF-16, not UTF-8. HINT: convert it with: iconv -f UTF-16 -t UTF-8"),
    "UTF-16, big endian": (["utf16be.txt"], "utf16be.txt is UTF-16, not UTF-8"),
    "UTF-16 without a mark": (["utf16le.txt"], "utf16le.txt is UTF-16LE, not UTF-8. HINT: convert it with: iconv -f"),
    "UTF-32": (["utf32.txt"], "utf32.txt is UTF-32, not UTF-8. HINT: convert it with: iconv -f UTF-32 -t UTF-8"),
    "UTF-32 without a mark": (["utf32be.txt"], "utf32be.txt is UTF-32BE, not UTF-8"),
    "a ZIP archive": (["book.zip"], "book.zip is a ZIP archive (as .zip, .docx, .epub), not text. HINT"),
    "a packed tar archive": (["book.tar.gz"], "book.tar.gz is a tar archive, not text. HINT"),
    "a shard": (["shard.bin"], "shard.bin is a shard, tokens already, not text. HINT"),
    "cut gzip": (["cut.gz"], "cut.gz is damaged or cut (gzip: "),
    "damaged gzip": (["bad.gz"], "bad.gz is damaged or cut (gzip: "),
    "cut zstd": (["cut.zst"], "cut.zst is damaged or cut (zstd: it ends inside a frame). HINT"),
    "damaged zstd": (["bad.zst"], "bad.zst is damaged (zstd: "),
    "cut xz": (["cut.xz"], "cut.xz is damaged or cut (xz: "),
    "cut bzip2": (["cut.bz2"], "cut.bz2 is damaged or cut (bzip2: "),
    "no JSON": (["bad.jsonl"], "bad.jsonl, line 2 is not JSON: "),
    "nested JSON": (["nested.jsonl"], "nested.jsonl, line 1: JSON within JSON, deeper than 32 levels. HINT"),
    "JSON of a long number": (["number.jsonl"], "number.jsonl, line 1 is not JSON: "),
    "another field": (
        ["docs.jsonl"],
        "docs.jsonl, line 1 has no text in the field 'text'. HINT: --field 'body' would be",
    ),
    "no such field": (["docs.jsonl", "--field", "id"], "docs.jsonl, line 1 has no text in the field 'id'. HINT"),
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
    "a shard that no header holds": (["one.txt", "--shard-size", "2147483648"], "2147483648 is not a whole number of"),
    "shard size of one": (["one.txt", "--shard-size", "1"], "--shard-size 1: a shard has 2 to 2147483647 tokens. HINT"),
    "out is a file": (["one.txt", "--out", "one.txt"], "cannot write to one.txt: File exists. HINT"),
    "out cannot be made": (["one.txt", "--out", "one.txt/x"], "cannot write to one.txt/x: Not a directory. HINT"),
    "not a number": (["one.txt", "--val-fraction", "x"], "--val-fraction: x is not a number from 0 to below 1. HINT"),
    "unknown split": (["one.txt", "--split", "words"], "invalid choice: 'words'"),
    "no name": ([], "the following arguments are required: NAME|FILE.txt. HINT"),
    "mixed": (["one.txt", "tinyshakespeare"], "a known dataset and files cannot be mixed. HINT"),
    "fixed split": (["tinyshakespeare", "--val-fraction", "0.5"], "tinyshakespeare has a fixed split. HINT"),
    "known, out is a file": (["tinyshakespeare", "--out", "one.txt"], "cannot write to one.txt: File exists. HINT"),
}


def write_bad_texts(folder):
    """What people give for text, and is none."""
    text = "Some plain English text, of a line.\n" * 50
    for name, encoding in dict(utf16="utf-16", utf16le="utf-16-le", utf32="utf-32", utf32be="utf-32-be").items():
        (folder / f"{name}.txt").write_bytes(text.encode(encoding))
    (folder / "utf16be.txt").write_bytes(codecs.BOM_UTF16_BE + text.encode("utf-16-be"))
    (folder / "folder").mkdir()
    (folder / "folder" / "image.png").write_bytes(b"\x89PNG\r\n" + bytes(99))
    os.mkfifo(folder / "pipe")
    with zipfile.ZipFile(folder / "book.zip", "w") as file:
        file.writestr("book.txt", text)
    with tarfile.open(folder / "book.tar.gz", "w:gz") as file:
        file.add(folder / "one.txt", "one.txt")
    write_shard(folder / "shard.bin", np.arange(300, dtype=np.uint16))
    (folder / "cut.gz").write_bytes(gzip.compress(text.encode())[:-9])
    packed = bytearray(gzip.compress(text.encode()))
    packed[30] ^= 255
    (folder / "bad.gz").write_bytes(packed)
    packed = bytearray(zstandard.compress(random.Random(1).randbytes(300)))
    (folder / "cut.zst").write_bytes(packed[:-9])
    packed[5] ^= 255
    (folder / "bad.zst").write_bytes(packed)
    (folder / "cut.xz").write_bytes(lzma.compress(text.encode())[:-9])
    (folder / "cut.bz2").write_bytes(bz2.compress(text.encode())[:-9])
    (folder / "bad.jsonl").write_text('{"text": "a document"}\n{"text": \n')
    (folder / "nested.jsonl").write_text("[" * 100_000 + "\n")
    (folder / "number.jsonl").write_text('{"text": "a", "n": ' + "9" * 5000 + "}\n")
    (folder / "docs.jsonl").write_text('{"id": 1, "body": "a document"}\n')


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
    write_bad_texts(tmp_path)
    before = sorted(os.listdir(tmp_path))
    tokenizer = [] if "--tokenizer" in args else ["--tokenizer", "bytes"]
    try:
        code = main(["prepare", *args, *tokenizer])
    except SystemExit as error:  # by argparse, before main has begun
        code = error.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("llmc.data") and " error: " in err and message in err and err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before, "a refusal leaves nothing behind"


def test_command_as_a_process(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "llmc.data", "prepare", "none.txt"], capture_output=True, text=True, cwd=tmp_path,
        env=ENVIRONMENT,
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
    assert sorted(os.listdir(tmp_path)) == ["x.txt"]


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
    os.link(made.train, os.path.join("book-bytes", "a_train_val.bin"))
    with pytest.raises(UserError, match="is trained on .* and validated on"):
        dataset("book-bytes", "bytes")


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


def test_a_temporary_folder_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"llmc-{os.getuid()}"
    assert writable_cache_dir() == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"is not used as a cache: others may write to it \(mode 777\)\. HINT"):
        data.prepare_default("bytes")
    folder.chmod(0o755)
    assert writable_cache_dir() == str(folder)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not used as a cache: it is no folder"):
        writable_cache_dir()
    folder.unlink()
    folder.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    folder.rename(tmp_path / "llmc-12345")
    with pytest.raises(UserError, match="is not used as a cache: it belongs to user"):
        writable_cache_dir()


def test_no_home_is_no_folder_called_tilde(tmp_path, monkeypatch):
    """No HOME, and a user without an entry in passwd: expanduser leaves "~" as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == writable_cache_dir() == str(tmp_path / "tmp" / f"llmc-{os.getuid()}")
    train, _, what = data.prepare_default("bytes")
    assert train.startswith(cache_dir()) and os.listdir(tmp_path) == ["tmp"], what


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
