"""Token shards: llm.c's files of tokens, and the files that a pattern names.

A shard is 256 int32 of header (magic, version, number of tokens), then the tokens: uint16 (GPT-2) or uint32 (Llama-3).
Byte-level data uses the uint16 kind. Header word 3, which llm.c leaves 0 and ignores, holds the vocabulary size where
it is not GPT-2's (257 for bytes), so that data which does not fit the model is found before training.

Source: llm.c llmc/dataloader.h, dev/data/data_common.py.
"""

import glob
import os
import re
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc.errors import UserError
from llmc.files.io import atomic_write, open_regular

HEADER_BYTES = 1024
GPT2_MAGIC, GPT2_VERSION, GPT2_VOCAB = 20240520, 1, 50257
LLAMA3_MAGIC, LLAMA3_VERSION, LLAMA3_VOCAB = 20240801, 7, 128256
MAX_TOKENS = 2**31 - 1  # the token count is an int32

Path = str | os.PathLike[str]


class ShardHeader(NamedTuple):
    """What a shard's header states; vocab_size 0: not stated."""

    num_tokens: int
    dtype: np.dtype
    vocab_size: int


class Dataset(NamedTuple):
    """A dataset that is ready: the patterns of its shards (val may be None), the tokenizer's name, vocabulary size."""

    train: str
    val: str | None
    tokenizer: str
    vocab_size: int


def read_shard_header(path: Path) -> ShardHeader:
    """The header of a shard, checked against the size of the file. Errors: UserError."""
    try:
        with open_regular(path) as file:
            raw = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. HINT: check the path") from error
    prepare = "make shards with: python -m llmc.data prepare FILE.txt"
    if size == 0:
        raise UserError(f"{path} is empty. HINT: {prepare}")
    if len(raw) < HEADER_BYTES:
        raise UserError(f"{path} has {size} bytes, fewer than a shard's header of {HEADER_BYTES}. HINT: {prepare}")
    magic, version, num_tokens, vocab_size = np.frombuffer(raw, "<i4", 4).tolist()
    dtype: np.dtype
    if magic == GPT2_MAGIC:
        expected_version, dtype = GPT2_VERSION, np.dtype("<u2")
    elif magic == LLAMA3_MAGIC:
        expected_version, dtype = LLAMA3_VERSION, np.dtype("<u4")
    else:
        raise UserError(
            f"{path} has magic number {magic}, not {GPT2_MAGIC} (GPT-2 tokens) or {LLAMA3_MAGIC} (Llama-3 tokens). "
            f"HINT: {prepare}"
        )
    if version != expected_version:
        raise UserError(f"{path} has version {version}, expected {expected_version}. HINT: {prepare}")
    if num_tokens <= 0:
        raise UserError(f"{path} states {num_tokens} tokens, expected at least 1. HINT: {prepare}")
    expected_size = HEADER_BYTES + num_tokens * dtype.itemsize
    if size != expected_size:
        raise UserError(
            f"{path} is {'truncated' if size < expected_size else 'over-long'}: {size} bytes, expected {expected_size} "
            f"for the {num_tokens} tokens that its header states. HINT: copy it again, or {prepare}"
        )
    return ShardHeader(num_tokens, dtype, vocab_size)


def read_shard(path: Path) -> NDArray[np.unsignedinteger]:
    """The tokens of a shard as a read-only memory map (num_tokens,), uint16 or uint32; the header is checked."""
    header = read_shard_header(path)
    return np.memmap(path, header.dtype, mode="r", offset=HEADER_BYTES, shape=(header.num_tokens,))


def write_shard(path: Path, tokens: NDArray[np.unsignedinteger], vocab_size: int = 0) -> None:
    """Write a 1-D array of tokens as a shard (atomically): uint16 makes a GPT-2 shard, uint32 a Llama-3 shard.

    vocab_size is stored in header word 3; 0, as in llm.c's files, leaves it open.
    Errors: UserError for no tokens, more than MAX_TOKENS, or a file that cannot be written.
    """
    if not 1 <= tokens.size <= MAX_TOKENS:
        raise UserError(f"{path}: a shard holds 1 to {MAX_TOKENS} tokens, not {tokens.size}. HINT: use --shard-size")
    with atomic_write(path) as file:
        put_shard(file, tokens, vocab_size)


def put_shard(file: BinaryIO, tokens: NDArray[np.unsignedinteger], vocab_size: int) -> None:
    """Write what write_shard does into an open file. Errors: OSError."""
    assert tokens.ndim == 1 and tokens.dtype in (np.uint16, np.uint32), (tokens.shape, tokens.dtype)
    assert 1 <= tokens.size <= MAX_TOKENS, tokens.size
    gpt2 = tokens.dtype == np.uint16
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:2] = (GPT2_MAGIC, GPT2_VERSION) if gpt2 else (LLAMA3_MAGIC, LLAMA3_VERSION)
    header[2:4] = tokens.size, vocab_size
    file.write(header.tobytes())
    file.write(np.ascontiguousarray(tokens, "<u2" if gpt2 else "<u4").data)


def shard_paths(pattern: str) -> list[str]:
    """The files that a pattern names, sorted by name: a path that exists is that file alone.

    A leading ~ is the user's home. Brackets, stars and question marks in the names of folders that exist are taken as
    they are, and only behind them as parts of the pattern.
    Errors: UserError where there is no such file, or where it is of a set that is not complete.
    """
    expanded = os.path.expanduser(pattern)
    paths = next(([path] for path in (pattern, expanded) if os.path.exists(path)), None)
    paths = paths or sorted(glob.glob(_escape_folders(expanded))) or sorted(glob.glob(expanded))
    if not paths:
        wrong = f"no file matches {pattern}" if glob.has_magic(pattern) else f"cannot read {pattern}: No such file"
        raise UserError(f"{wrong}. HINT: make shards with: python -m llmc.data prepare FILE.txt")
    for path in paths:
        check_complete(path)
    return paths


def _escape_folders(pattern: str) -> str:
    """The pattern, with the longest part of it that is a folder escaped."""
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return glob.escape(folder) + pattern[len(folder) :] if os.path.isdir(folder) else pattern


def incomplete_marker(folder: str, prefix: str) -> str:
    """The file that is there while `prepare` gives the shards of a set their names, which begin with `prefix`."""
    return os.path.join(folder, f".{prefix}incomplete")


def check_complete(path: str) -> None:
    """UserError for a shard of a set that `prepare` is writing, or was writing when it was killed."""
    folder, name = os.path.split(path)
    match = re.fullmatch(r"(.*)(train|val)(_\d{6})?\.bin", name)
    if match and os.path.exists(incomplete_marker(folder, match[1])):
        wrong = "is of a set that is not complete: `llmc.data prepare` is writing it, or was interrupted"
        raise UserError(f"{path} {wrong}. HINT: run it again")


def check_apart(train: str, val: str) -> None:
    """UserError if a shard is matched by both patterns: what a model was trained on says nothing about it."""
    trained_on = {os.path.realpath(path) for path in shard_paths(train)}
    for path in shard_paths(val):
        same = os.path.realpath(path)
        if same in trained_on or any(os.path.samefile(same, other) for other in trained_on):
            both = f"is trained on (-i {train}) and validated on (-j {val})"
            raise UserError(f"{path} {both}. HINT: give patterns that tell the two apart")


def vocabulary_of(pattern: str) -> int:
    """Tokens in the vocabulary of the first shard of a pattern.

    Our shards state it in their header. llm.c's do not: it follows from the kind of shard, GPT-2's or Llama-3's.
    """
    header = read_shard_header(shard_paths(pattern)[0])
    return header.vocab_size or (GPT2_VOCAB if header.dtype.itemsize == 2 else LLAMA3_VOCAB)
