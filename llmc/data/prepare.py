"""Texts to datasets: shards of text files and of Tiny Shakespeare, and data that is ready.

Source: llm.c dev/data/data_common.py, dev/data/tinyshakespeare.py.
"""

import contextlib
import glob
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc.data import tokenizer as tokenizers
from llmc.data.cache import DownloadError, cache_dir, download, read_bytes, sha256_of, writable_cache_dir
from llmc.data.shards import (
    MAX_TOKENS,
    Dataset,
    check_apart,
    incomplete_marker,
    put_shard,
    read_shard,
    read_shard_header,
    vocabulary_of,
)
from llmc.data.texts import EOT_TEXT, SPLITS, STDIN, documents, find_texts, pieces, stem_of
from llmc.data.tokenizer import Tokenizer
from llmc.errors import UserError
from llmc.files.io import atomic_write, create, fsync_folder
from llmc.files.lock import waited_for

Tokens = NDArray[np.uint16]
BATCH_CHARS = 1 << 23  # encoded at a time, on all cores
MAX_SHARDS = 10**6  # of one split: their names have six digits
FEW_TOKENS = 4 * 64 + 1  # one batch of the smallest default run, -b 4 -t 64


class WrittenShard(NamedTuple):
    """A shard of a prepared dataset; written is False where it was there already."""

    path: str
    num_tokens: int
    num_bytes: int
    written: bool


class Prepared(NamedTuple):
    """What `prepare` made: the patterns for -i and -j (val is None where all is for training), the shards, and lines
    that the user should read."""

    train: str
    val: str | None
    files: list[WrittenShard]
    notices: list[str]


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
    tokens = np.concatenate(list(Text([path], tokenizer, split="blank-lines")))
    return tokens[32768:], tokens[:32768]


# ----------------------------------------------------------------------------
# from text to shards


class Text:
    """Text files as tokens: iterating yields uint16 arrays, each document after an EOT; memory stays bounded.

    eot_texts: how often the text "<|endoftext|>" was met so far. It is no special token: it is encoded as what it is.
    """

    def __init__(self, paths: list[str], tokenizer: Tokenizer, split: str = "files", field: str | None = None):
        self.paths, self.tokenizer, self.split, self.field = paths, tokenizer, SPLITS[split], field
        self.eot_texts = 0

    def __iter__(self) -> Iterator[Tokens]:
        from tqdm import tqdm

        size = sum(os.path.getsize(path) for path in self.paths if path != STDIN)
        columns = shutil.get_terminal_size().columns  # 80 where the terminal does not tell: tqdm would show nothing
        with tqdm(
            total=size or None, desc="tokenizing", unit="B", unit_scale=True, ncols=columns, leave=False, disable=None
        ) as bar:
            batch: list[tuple[bool, str]] = []
            chars = 0
            for piece in self._pieces(bar.update):
                batch.append(piece)
                chars += len(piece[1])
                if chars >= BATCH_CHARS:
                    yield from self._encoded(batch)
                    batch, chars = [], 0
            yield from self._encoded(batch)

    def _pieces(self, progress: Callable[[int], object]) -> Iterator[tuple[bool, str]]:
        for path in self.paths:
            for document in documents(path, self.field, progress):
                yield from pieces(document, self.split)

    def _encoded(self, batch: list[tuple[bool, str]]) -> Iterator[Tokens]:
        for (starts, text), ids in zip(batch, self.tokenizer.encode_batch([text for _, text in batch]), strict=True):
            self.eot_texts += text.count(EOT_TEXT)
            if starts:
                yield np.array([self.tokenizer.eot], np.uint16)
            yield ids


def prepare(
    names: list[str],
    tokenizer: str = "gpt2",
    out: str | None = None,
    val_fraction: float | None = None,
    split: str = "files",
    field: str | None = None,
    shard_size: int = 10**8,
    overwrite: bool = False,
) -> Prepared:
    """Make shards of one known dataset ("tinyshakespeare"), or of text: files, folders, "-"; returns Prepared.

    Text is UTF-8, packed (gzip, bzip2, xz, zstd) or not. Each file is a document, of a .jsonl file `field` ("text") of
    each line; a document also ends at a blank line with split "blank-lines", and where "<|endoftext|>" stands with
    "endoftext". An EOT token precedes each. The last val_fraction (0.1) of all tokens is for validation. Shards have at
    most shard_size tokens: NAME_train_000000.bin ..., or NAME_train.bin if there is only one, NAME being the first
    name's, left out if "train" or "val" is in it. `out` defaults to ./NAME-TOKENIZER.
    Tiny Shakespeare: llm.c's own split with GPT-2 tokens; byte-level its raw bytes without EOT, of which the last tenth
    is for validation. `out` defaults to a folder in the user's cache.
    Files of the same names and other content are kept and an error raised, unless `overwrite` is set.
    """
    known = "tinyshakespeare" in names
    if known and len(names) > 1:
        raise UserError(f"{' '.join(names)}: a known dataset and files cannot be mixed. HINT: prepare one at a time")
    if known and (val_fraction is not None or split != "files" or field is not None):
        raise UserError("tinyshakespeare has a fixed split. HINT: leave --val-fraction, --split and --field out")
    assert names and 0 <= (val_fraction or 0) < 1 and shard_size >= 1, (names, val_fraction, shard_size)
    if not 2 <= shard_size <= MAX_TOKENS:
        raise UserError(f"--shard-size {shard_size}: a shard has 2 to {MAX_TOKENS} tokens. HINT: leave it out for 1e8")
    for name in names:
        if not known and name != STDIN and not os.path.exists(name):
            raise UserError(f"{name} is neither a file nor a known dataset. HINT: known datasets: tinyshakespeare")
    encoder = tokenizers.get(tokenizer)
    if known and out is None:
        out, overwrite = os.path.join(writable_cache_dir(), f"tinyshakespeare-{tokenizer}"), True
    name = "tiny_shakespeare" if known else stem_of(names[0])
    target = Target(out or f"{name}-{tokenizer}", name, encoder, shard_size, overwrite)
    try:
        with new_folder(target.folder):
            if known:
                return write_set(target, *_tinyshakespeare_tokens(encoder))
            paths, passed_over = find_texts(names, leave_out=target.folder)
            prepared = _prepare_texts(target, Text(paths, encoder, split, field), val_fraction)
    except OSError as error:
        where = error.filename or target.folder
        raise UserError(f"cannot write to {where}: {error.strerror}. HINT: choose another folder with --out") from error
    if passed_over:
        more = f" and {len(passed_over) - 3} more" if len(passed_over) > 3 else ""
        prepared.notices.insert(0, f"passed over, as they hold no text: {', '.join(passed_over[:3])}{more}")
    return prepared


def _prepare_texts(target: Target, text: Text, val_fraction: float | None) -> Prepared:
    val_fraction = 0.1 if val_fraction is None else val_fraction
    # where the validation tokens start is known at the end: all tokens go to a nameless file first
    with tempfile.TemporaryFile(dir=target.folder) as file:
        for ids in text:
            file.write(ids.data)
        file.flush()
        size = file.tell() // 2
        num_train = int(size * (1 - val_fraction))
        if num_train < 2 or size - num_train == 1:  # an input and its target are two tokens
            what = " ".join("standard input" if path == STDIN else path for path in text.paths[:3])
            raise UserError(f"{what}: {size} tokens are too few to split. HINT: use a longer text")
        tokens = np.memmap(file, np.uint16, mode="r")
        prepared = write_set(target, tokens[:num_train], tokens[num_train:])
    if text.eot_texts:
        times = "once" if text.eot_texts == 1 else f"{text.eot_texts} times"
        hint = "HINT: --split endoftext ends a document there"
        prepared.notices.append(f"{EOT_TEXT} stands in the text {times} and was encoded as plain text. {hint}")
    few = min(num_train, size - num_train or num_train)
    if few < FEW_TOKENS:
        which = "training" if few == num_train else "validation"
        prepared.notices.append(f"{few} tokens for {which} are too few to be useful. HINT: use a longer text")
    return prepared


@contextlib.contextmanager
def new_folder(folder: str) -> Iterator[None]:
    """Make a folder if it is missing; if the block fails, one that is empty goes again."""
    missing = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    try:
        yield
    except BaseException:
        if missing:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise


def write_set(target: Target, train: Tokens, val: Tokens) -> Prepared:
    """Write the shards of both splits as one set: all of it is there afterwards, or what was there before.

    A lock lets one process at a time write into a folder. All shards are written under temporary names first. While
    they get theirs, a marker says that the set is incomplete (shards.check_complete), also after a kill.
    Errors: UserError for files of the set's names and other content, unless they may be overwritten.
    """
    vocab_size = 0 if target.tokenizer.name == "gpt2" else target.tokenizer.n_vocab  # 0: byte for byte as llm.c's
    patterns, shards = _name_shards(target, train, val)
    with waited_for(os.path.join(target.folder, ".prepare.lock"), f"it prepares data in {target.folder}"):
        marker = incomplete_marker(target.folder, prefix_of(target.name))
        there = _files_of_set(target)
        new = {path: part for path, part in shards.items() if not _is_shard(path, part, vocab_size)}
        stale = [path for path in there if path in new or path not in shards]
        if stale and not target.overwrite and not os.path.exists(marker):
            raise UserError(f"{stale[0]} exists with other content. HINT: choose another --out, or add --overwrite")
        with contextlib.ExitStack() as cleanup:
            temporary = {}
            for path, part in new.items():
                folder, base = os.path.split(path)
                temporary[path] = os.path.join(folder, f".{base}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
                cleanup.callback(_remove_if_there, temporary[path])
                with create(temporary[path]) as file:
                    put_shard(file, part, vocab_size)
                    os.fsync(file.fileno())
            if new or stale:
                with atomic_write(marker):
                    pass
                for path, written in temporary.items():
                    os.replace(written, path)
                for path in set(stale) - set(new):  # they would be taken for a part of the new set
                    os.remove(path)
                fsync_folder(target.folder)
            _remove_if_there(marker)
        files = [WrittenShard(path, part.size, os.path.getsize(path), path in new) for path, part in shards.items()]
    return Prepared(patterns[0], patterns[1], files, [])


def prefix_of(name: str) -> str:
    """What the shards of a dataset begin with: its name, unless "train" or "val" in it would make *train*.bin and
    *val*.bin match shards of the other split, too."""
    return "" if re.search("train|val", name, re.IGNORECASE) else f"{name}_"


def _name_shards(target: Target, train: Tokens, val: Tokens) -> tuple[tuple[str, str | None], dict[str, Tokens]]:
    """((pattern of the training shards, of the validation shards or None), {path: its tokens})."""
    patterns: dict[str, str | None] = {}
    shards: dict[str, Tokens] = {}
    for split, tokens in ("val", val), ("train", train):
        count = -(-tokens.size // target.shard_size)
        if count > MAX_SHARDS:
            least = -(-tokens.size // MAX_SHARDS)
            raise UserError(f"--shard-size {target.shard_size} makes {count} shards of {split}. HINT: {least} or more")
        stem = os.path.join(target.folder, f"{prefix_of(target.name)}{split}")
        patterns[split] = f"{stem}.bin" if count == 1 else f"{glob.escape(stem)}_*.bin" if count else None
        for i in range(count):  # of equal size, so that no shard is too short for a batch
            part = tokens[tokens.size * i // count : tokens.size * (i + 1) // count]
            shards[f"{stem}.bin" if count == 1 else f"{stem}_{i:06d}.bin"] = part
    assert patterns["train"] is not None, "no tokens to train on"
    return (patterns["train"], patterns["val"]), shards


def _files_of_set(target: Target) -> list[str]:
    """The shards that are there of a set of this name; what a killed process left of one is removed."""
    prefix = re.escape(prefix_of(target.name))
    ours = re.compile(rf"{prefix}(train|val)(_\d{{6}})?\.bin")
    left = re.compile(rf"\.{prefix}(train|val)(_\d{{6}})?\.bin\.\S+\.tmp")
    names = sorted(os.listdir(target.folder))
    for name in names:
        if left.fullmatch(name):  # we have the lock: nobody is writing it
            _remove_if_there(os.path.join(target.folder, name))
    return [os.path.join(target.folder, name) for name in names if ours.fullmatch(name)]


def _remove_if_there(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def _is_shard(path: str, tokens: Tokens, vocab_size: int) -> bool:
    """Whether the file is there, and is the shard that write_shard would make."""
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
        train, val, *_ = prepare(["tinyshakespeare"], tokenizer)
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
        train, val, *_ = prepare([path], tokenizer, out=folder, overwrite=True)
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
        if not glob.glob(patterns[1]):
            return Dataset(patterns[0], None, tokenizer, vocab_size)
        check_apart(*patterns)
        return Dataset(patterns[0], patterns[1], tokenizer, vocab_size)
    return Dataset(*prepare([name_or_path], tokenizer)[:2], tokenizer, vocab_size)
