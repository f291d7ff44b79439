"""Texts to datasets: shards of text files and of Tiny Shakespeare, and data that is ready.

Source: llm.c dev/data/data_common.py, dev/data/tinyshakespeare.py.
"""

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc.data import tokenizer as tokenizers
from llmc.data.cache import DownloadError, cache_dir, download, read_bytes, sha256_of, writable_cache_dir
from llmc.data.shards import Dataset, read_shard, read_shard_header, vocabulary_of, write_shard
from llmc.data.texts import decoded_chunks, pieces
from llmc.data.tokenizer import Tokenizer
from llmc.errors import UserError
from llmc.files.io import atomic_write

Tokens = NDArray[np.uint16]
BATCH_CHARS = 1 << 23  # encoded at a time, on all cores


class WrittenShard(NamedTuple):
    """A shard of a prepared dataset; written is False where it was there already."""

    path: str
    num_tokens: int
    num_bytes: int
    written: bool


class Prepared(NamedTuple):
    """What `prepare` made: the patterns for -i and -j (val is None where all is for training), and the shards."""

    train: str
    val: str | None
    files: list[WrittenShard]


class Target(NamedTuple):
    """Where a dataset is written, and how: its folder, the name its shards begin with, what its tokens are."""

    folder: str
    name: str
    tokenizer: Tokenizer
    shard_size: int
    overwrite: bool


TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_BYTES = 1115394
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINYSHAKESPEARE_OFFLINE = "set LLMC_DATA_DIR to a folder that has tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHARDS = {  # SHA-256 of the finished shards: (train, val)
    "gpt2": (
        "8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8",
        "fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62",
    ),
    "bytes": (
        "54c6e8d90dec7a38ec36cfe3fdc100ab21f328118a6701d03e398e96c039cc95",
        "ef23ef328984aaf6f8fb390eb9810ec4ddc364bba58199b18a78b1f641048aad",
    ),
}


# ----------------------------------------------------------------------------
# known texts


def tinyshakespeare_text() -> str:
    """Path of the checked text: $LLMC_DATA_DIR/tinyshakespeare/input.txt, the copy in the cache, or a download."""
    name = os.path.join("tinyshakespeare", "input.txt")
    if os.environ.get("LLMC_DATA_DIR"):
        path = os.path.join(os.environ["LLMC_DATA_DIR"], name)
        if os.path.exists(path):
            data = read_bytes(path)
            if sha256_of(data) != TINYSHAKESPEARE_SHA256:
                raise UserError(
                    f"{path} is not Tiny Shakespeare: {len(data)} bytes with SHA-256 {sha256_of(data)}, expected "
                    f"{TINYSHAKESPEARE_BYTES} with {TINYSHAKESPEARE_SHA256}. HINT: delete it to have it downloaded anew"
                )
            return path
    path = os.path.join(cache_dir(), name)
    if os.path.exists(path) and sha256_of(read_bytes(path)) == TINYSHAKESPEARE_SHA256:
        return path
    path = os.path.join(writable_cache_dir(), name)
    data = download(TINYSHAKESPEARE_URL, TINYSHAKESPEARE_BYTES, TINYSHAKESPEARE_SHA256, TINYSHAKESPEARE_OFFLINE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as file:
        file.write(data)
    return path


def builtin_text() -> str:
    """About 465,000 characters that every CPython carries: the language reference, as shown by Python's help()."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            f"this Python has no pydoc_data.topics: {error}. HINT: train on a text file of your own"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics)) + "\n"


def _tinyshakespeare_tokens(tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
    """(training tokens, validation tokens) of llm.c's split; see prepare."""
    path = tinyshakespeare_text()
    if tokenizer.name == "bytes":
        tokens = np.frombuffer(read_bytes(path), np.uint8).astype(np.uint16)
        num_train = int(0.9 * tokens.size)
        return tokens[:num_train], tokens[num_train:]
    tokens = np.concatenate(list(tokenize([path], tokenizer, blank_lines=True)))
    return tokens[32768:], tokens[:32768]


# ----------------------------------------------------------------------------
# from text to shards


def tokenize(paths: list[str], tokenizer: Tokenizer, blank_lines: bool) -> Iterator[Tokens]:
    """Yield uint16 arrays of token ids: each document of the UTF-8 files, after an EOT; memory stays bounded."""
    from tqdm import tqdm

    def encoded(batch: list[tuple[bool, str]]) -> Iterator[Tokens]:
        for (starts, _), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
            if starts:
                yield np.array([tokenizer.eot], np.uint16)
            yield ids

    size = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    columns = shutil.get_terminal_size().columns  # 80 where the terminal does not tell: tqdm would show nothing
    with tqdm(
        total=size, desc="tokenizing", unit="B", unit_scale=True, ncols=columns, leave=False, disable=None
    ) as bar:
        for path in paths:
            batch, chars = [], 0
            for piece in pieces(decoded_chunks(path, bar.update), blank_lines):
                batch.append(piece)
                chars += len(piece[1])
                if chars >= BATCH_CHARS:
                    yield from encoded(batch)
                    batch, chars = [], 0
            yield from encoded(batch)


def prepare(
    names: list[str],
    tokenizer: str = "gpt2",
    out: str | None = None,
    val_fraction: float | None = None,
    blank_lines: bool = False,
    shard_size: int = 10**8,
    overwrite: bool = False,
) -> Prepared:
    """Make shards of one known dataset ("tinyshakespeare") or of UTF-8 text files; returns Prepared.

    Text files: each file is one document (with blank_lines: each part up to a blank line), preceded by EOT; the last
    val_fraction (0.1) of all tokens is for validation. Shards of at most shard_size tokens, NAME_train_000000.bin ...,
    or NAME_train.bin if there is only one, NAME being the first file's; `out` defaults to ./NAME-TOKENIZER.
    Tiny Shakespeare: llm.c's own split with GPT-2 tokens; byte-level its raw bytes without EOT, of which the last tenth
    is for validation. `out` defaults to a folder in the user's cache.
    Files of the same names and other content are kept and an error raised, unless `overwrite` is set.
    """
    known = "tinyshakespeare" in names
    if known and len(names) > 1:
        raise UserError(f"{' '.join(names)}: a known dataset and files cannot be mixed. HINT: prepare one at a time")
    if known and (val_fraction is not None or blank_lines):
        raise UserError("tinyshakespeare has a fixed split. HINT: leave --val-fraction and --split out")
    assert 0 <= (val_fraction or 0) < 1 and shard_size >= 1, (val_fraction, shard_size)
    for path in names:
        if not known and not os.path.exists(path):
            raise UserError(f"{path} is neither a file nor a known dataset. HINT: known datasets: tinyshakespeare")
    encoder = tokenizers.get(tokenizer)
    if known and out is None:
        out, overwrite = os.path.join(writable_cache_dir(), f"tinyshakespeare-{tokenizer}"), True
    name = "tiny_shakespeare" if known else os.path.splitext(os.path.basename(names[0]))[0]
    target = Target(out or f"{name}-{tokenizer}", name, encoder, shard_size, overwrite)
    try:
        if known:
            return _write_dataset(target, *_tinyshakespeare_tokens(encoder))
        return _prepare_texts(target, names, 0.1 if val_fraction is None else val_fraction, blank_lines)
    except OSError as error:
        where = error.filename or target.folder
        raise UserError(f"cannot write to {where}: {error.strerror}. HINT: choose another folder with --out") from error


def _prepare_texts(target: Target, paths: list[str], val_fraction: float, blank_lines: bool) -> Prepared:
    os.makedirs(target.folder, exist_ok=True)
    # where the validation tokens start is known at the end: all tokens go to a nameless file first
    with tempfile.TemporaryFile(dir=target.folder) as file:
        for ids in tokenize(paths, target.tokenizer, blank_lines):
            file.write(ids.data)
        file.flush()
        tokens = np.memmap(file, np.uint16, mode="r")
        num_train = int(tokens.size * (1 - val_fraction))
        if num_train == 0:
            raise UserError(f"{paths[0]}: {tokens.size} tokens are too few to split. HINT: use a longer text")
        return _write_dataset(target, tokens[:num_train], tokens[num_train:])


def _write_dataset(target: Target, train: Tokens, val: Tokens) -> Prepared:
    """Write the shards of both splits; nothing is touched if a file with other content is in the way."""
    folder, name, tokenizer, shard_size, overwrite = target
    vocab_size = 0 if tokenizer.name == "gpt2" else tokenizer.n_vocab  # 0: byte for byte as llm.c writes it
    os.makedirs(folder, exist_ok=True)
    patterns: list[str | None] = []
    shards: dict[str, Tokens] = {}
    for split, tokens in ("val", val), ("train", train):
        count = -(-tokens.size // shard_size)
        stem = os.path.join(folder, f"{name}_{split}")
        patterns.append(f"{stem}.bin" if count == 1 else f"{glob.escape(stem)}_*.bin" if count else None)
        for i in range(count):  # of equal size, so that no shard is too short for a batch
            part = tokens[tokens.size * i // count : tokens.size * (i + 1) // count]
            shards[f"{stem}.bin" if count == 1 else f"{stem}_{i:06d}.bin"] = part
    same = {path for path, tokens in shards.items() if os.path.exists(path) and _is_shard(path, tokens, vocab_size)}
    ours = re.compile(re.escape(name) + r"_(train|val)(_\d{6})?\.bin")
    there = sorted(os.path.join(folder, file) for file in os.listdir(folder) if ours.fullmatch(file))
    for path in there:
        if path not in same and not overwrite:
            raise UserError(f"{path} exists with other content. HINT: choose another --out, or add --overwrite")
    files = []
    for path, tokens in shards.items():
        if path not in same:
            write_shard(path, tokens, vocab_size)
        files.append(WrittenShard(path, tokens.size, os.path.getsize(path), path not in same))
    for path in set(there) - set(shards):  # they would be taken for a part of the new dataset
        os.remove(path)
    assert patterns[1] is not None
    return Prepared(patterns[1], patterns[0], files)


def _is_shard(path: str, tokens: Tokens, vocab_size: int) -> bool:
    """Whether the file is the shard that write_shard would make."""
    try:
        header = read_shard_header(path)
    except UserError:
        return False
    if (header.num_tokens, header.vocab_size) != (tokens.size, vocab_size):
        return False
    old, step = read_shard(path), 1 << 24
    return all(np.array_equal(old[i : i + step], tokens[i : i + step]) for i in range(0, tokens.size, step))


# ----------------------------------------------------------------------------
# data that is ready


def prepare_default(tokenizer: str, allow_fallback: bool = True) -> tuple[str, str, str]:
    """The data of a run that names none: (train path, val path, a line that says what it is).

    Tiny Shakespeare, from finished shards in the cache (checked by SHA-256) or prepared there now. If it cannot be
    downloaded and allow_fallback is set: the text of builtin_text(), of which the last tenth is for validation.
    """
    folder = os.path.join(cache_dir(), f"tinyshakespeare-{tokenizer}")
    paths = [os.path.join(folder, f"tiny_shakespeare_{split}.bin") for split in ("train", "val")]
    if all(map(os.path.exists, paths)):
        if tuple(sha256_of(read_bytes(path)) for path in paths) == TINYSHAKESPEARE_SHARDS.get(tokenizer):
            return paths[0], paths[1], f"Tiny Shakespeare in {folder}"
    try:
        train, val, _ = prepare(["tinyshakespeare"], tokenizer)
        what = "Tiny Shakespeare"
    except DownloadError as error:
        if not allow_fallback:
            raise
        text = builtin_text().encode()
        folder = os.path.join(writable_cache_dir(), f"python-help-{sha256_of(text)[:8]}-{tokenizer}")
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "python_help.txt")
        with atomic_write(path) as file:
            file.write(text)
        train, val, _ = prepare([path], tokenizer, out=folder, overwrite=True)
        what = f"Python's own documentation, as Tiny Shakespeare cannot be had ({str(error).partition('. HINT')[0]}),"
    assert val is not None
    where = os.path.dirname(train)
    if not where.startswith(cache_dir()):
        where += f" ({cache_dir()} is not writable)"
    return train, val, f"{what} in {where}"


def dataset(name_or_path: str, tokenizer: str = "gpt2") -> Dataset:
    """A dataset that is ready: "shakespeare", a folder of shards, or a text, which is made into shards now.

    "shakespeare" is Tiny Shakespeare, from the cache or downloaded. A folder that holds *train*.bin is taken as it is,
    with its *val*.bin. Of anything else `prepare` makes shards, in ./NAME-TOKENIZER.
    Errors: UserError for what is not there, cannot be had or read, or has another vocabulary than the tokenizer's.
    """
    vocab_size = tokenizers.vocabulary(tokenizer)
    if name_or_path in ("shakespeare", "tinyshakespeare"):
        train, val, _ = prepare_default(tokenizer, allow_fallback=False)
        return Dataset(train, val, tokenizer, vocab_size)
    patterns = [os.path.join(glob.escape(name_or_path), f"*{split}*.bin") for split in ("train", "val")]
    if glob.glob(patterns[0]):
        if vocabulary_of(patterns[0]) != vocab_size:
            found = f"its shards have a vocabulary of {vocabulary_of(patterns[0])} tokens, {tokenizer} has {vocab_size}"
            raise UserError(f"{name_or_path}: {found}. HINT: name the tokenizer that they were made with")
        return Dataset(patterns[0], patterns[1] if glob.glob(patterns[1]) else None, tokenizer, vocab_size)
    return Dataset(*prepare([name_or_path], tokenizer)[:2], tokenizer, vocab_size)
