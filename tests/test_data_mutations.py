"""Damaged shards, eval sets, JSON lines, packed texts, tokenizers: the public commands report each in one line."""

import bz2
import gzip
import json
import lzma
import zlib

import numpy as np
import pytest
import zstandard
from mutations import assert_one_line, mutations

from llmc import cpu, evaluate, gpt2
from llmc.data import __main__ as prepare
from llmc.data.eval_sets import prepare_hellaswag
from llmc.data.shards import write_shard
from llmc.data.tokenizer import get, read_tokenizer_bin, write_tokenizer_bin
from llmc.errors import UserError
from llmc.files import model_file
from llmc.gpt2 import GPT2Config
from llmc.model import Model

COUNTS = [pytest.param(1, 60, id="some"), pytest.param(2, 2000, id="many", marks=pytest.mark.full)]
LINES = [
    {"ctx": f"The {i}. time, she", "label": i % 4, "endings": ["goes.", "stays at home.", "is", "says “no”"]}
    for i in range(5)
]
TEXT = "".join(f"{i} bottles of beer on the wall, “{i}” bottles of beer.\n\n" for i in range(99))
DOCUMENTS = "".join(json.dumps({"id": i, "text": f"document {i}, é\n"}) + "\n" for i in range(9))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small byte-level model's file."""
    path, config = tmp_path_factory.mktemp("model") / "model.bin", GPT2Config(32, 257, 384, 1, 2, 32)
    model = Model(gpt2, cpu, config, 1, 32, recompute=2, training=False)
    model.init_weights(1)
    header = {name: getattr(config, name) for name in model_file.MODEL_WORDS}
    model_file.write_model(path, header, model.params_flat, 3)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def codes_of(good, seed, count, path, main, argv, capfd):
    """The exit codes for a good file, which is taken, and for its mutations, of which many are not."""
    path.write_bytes(good)
    assert assert_one_line(main, argv, capfd, "the good file") == 0
    codes = []
    for case, raw in mutations(good, seed, count):
        path.write_bytes(raw)
        codes.append(assert_one_line(main, argv, capfd, case))
    assert codes.count(2) > count // 10, "hardly any file was damaged"


@pytest.mark.parametrize("seed, count", COUNTS)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_shards(dtype, seed, count, model, folder, capfd):
    write_shard("good.bin", np.arange(200).astype(dtype), 257)
    argv = [model, "-j", "bad.bin", "-t", "32", "--device", "cpu", "--threads", "1"]
    good = (folder / "good.bin").read_bytes()
    codes_of(good, seed, count, folder / "bad.bin", evaluate.main, argv, capfd)


@pytest.mark.parametrize("seed, count", COUNTS)
def test_eval_sets(seed, count, model, folder, capfd):
    (folder / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    good, _ = prepare_hellaswag("set.jsonl", "bytes")
    argv = [model, "--hellaswag", "bad.bin", "-t", "32", "--device", "cpu", "--threads", "1"]
    codes_of((folder / good).read_bytes(), seed, count, folder / "bad.bin", evaluate.main, argv, capfd)


@pytest.mark.parametrize("seed, count", COUNTS)
def test_hellaswag_s_json_lines(seed, count, folder, capfd):
    argv = ["prepare", "hellaswag", "bad.jsonl", "--tokenizer", "bytes", "--overwrite"]
    good = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()
    codes_of(good, seed, count, folder / "bad.jsonl", prepare.main, argv, capfd)


@pytest.mark.parametrize("seed, count", COUNTS)
@pytest.mark.parametrize("flags", [[], ["--split", "blank-lines", "--shard-size", "100"]], ids=["plain", "split"])
def test_json_lines(flags, seed, count, folder, capfd):
    argv = ["prepare", "bad.jsonl", "--tokenizer", "bytes", "--overwrite", *flags]
    codes_of(DOCUMENTS.encode(), seed, count, folder / "bad.jsonl", prepare.main, argv, capfd)


PACKERS = {"plain": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("seed, count", COUNTS)
@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS.keys())
def test_texts(pack, seed, count, folder, capfd):
    argv = ["prepare", "bad.txt", "--tokenizer", "gpt2", "--overwrite"]
    codes_of(pack(TEXT.encode()), seed, count, folder / "bad.txt", prepare.main, argv, capfd)


@pytest.mark.parametrize("seed, count", COUNTS)
def test_tokenizers(seed, count, folder, capfd):
    """No command reads llm.c's tokenizer file: the function says what is wrong."""
    write_tokenizer_bin("good.bin", get("bytes"))
    good, refused = (folder / "good.bin").read_bytes(), 0
    for case, raw in mutations(good, seed, count):
        (folder / "bad.bin").write_bytes(raw)
        try:
            assert read_tokenizer_bin("bad.bin").n_vocab > 0, case
        except UserError as error:
            assert "HINT: " in str(error) and str(error).isprintable(), case
            refused += 1
    assert refused > count // 10
    assert zlib.crc32(good) == zlib.crc32((folder / "good.bin").read_bytes())
