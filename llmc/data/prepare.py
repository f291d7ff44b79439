"""Token shards: the file format, the loader that serves batches, and `python -m llmc.data prepare`, which makes shards.

A shard is llm.c's: 256 int32 of header (magic, version, number of tokens), then the tokens: uint16 (GPT-2) or uint32
(Llama-3). Byte-level data uses the uint16 kind. Header word 3, which llm.c leaves 0 and ignores, holds the vocabulary
size where it is not GPT-2's (257 for bytes), so that data which does not fit the model is found before training.

Source: llm.c llmc/dataloader.h, dev/data/data_common.py, dev/data/tinyshakespeare.py.
"""

import codecs
import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import namedtuple

import numpy as np

from llmc import command as flags
from llmc.command import command
from llmc.errors import UserError
from llmc.files.checkpoint import atomic_write, open_checked
from llmc.rand import MT19937, random_permutation

HEADER_BYTES = 1024
GPT2_MAGIC, GPT2_VERSION = 20240520, 1
LLAMA3_MAGIC, LLAMA3_VERSION, LLAMA3_VOCAB = 20240801, 7, 128256
MAX_TOKENS = 2**31 - 1  # the token count is an int32

# ----------------------------------------------------------------------------
# shards

ShardHeader = namedtuple("ShardHeader", "num_tokens dtype vocab_size")  # vocab_size 0: not stated


def read_shard_header(path):
    """Check a shard's header against its file size; returns a ShardHeader, raises UserError."""
    try:
        with open(path, "rb") as file:
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


def read_shard(path):
    """The tokens of a shard as a read-only memory map (num_tokens,), uint16 or uint32; the header is checked."""
    header = read_shard_header(path)
    return np.memmap(path, header.dtype, mode="r", offset=HEADER_BYTES, shape=(header.num_tokens,))


def write_shard(path, tokens, vocab_size=0):
    """Write a 1-D array of tokens as a shard (atomically): uint16 makes a GPT-2 shard, uint32 a Llama-3 shard.

    vocab_size is stored in header word 3; 0, as in llm.c's files, leaves it open.
    """
    assert tokens.ndim == 1 and tokens.dtype in (np.uint16, np.uint32), (tokens.shape, tokens.dtype)
    if not 1 <= tokens.size <= MAX_TOKENS:
        raise UserError(f"{path}: a shard holds 1 to {MAX_TOKENS} tokens, not {tokens.size}. HINT: use --shard-size")
    gpt2 = tokens.dtype == np.uint16
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:2] = (GPT2_MAGIC, GPT2_VERSION) if gpt2 else (LLAMA3_MAGIC, LLAMA3_VERSION)
    header[2:4] = tokens.size, vocab_size
    with atomic_write(path) as file:
        file.write(header)
        file.write(np.ascontiguousarray(tokens, "<u2" if gpt2 else "<u4"))


# ----------------------------------------------------------------------------
# loader


class Stream:
    """The order in which one stream of batches visits shards and samples: that of llm.c's loader on one rank.

    num_samples: of each shard. seed None: as they come. Else an MT19937 permutes the shards once an epoch, on top of
    their previous order, and the samples of a shard when it is opened.
    """

    def __init__(self, num_samples, seed=None):
        self.num_samples, self.rng = num_samples, None if seed is None else MT19937(seed)
        self.shards = np.arange(len(num_samples), dtype=np.int32)
        self.reset()

    def reset(self):
        if self.rng:
            random_permutation(self.shards, self.rng)
        self.open(0)

    def open(self, shard):
        self.shard, self.sample = shard, 0
        self.samples = range(self.num_samples[self.shards[shard]])
        if self.rng:
            self.samples = np.array(self.samples, np.int32)
            random_permutation(self.samples, self.rng)

    def current(self):
        """(place of the shard in the list of files, sample in it) that is next; goes to the next shard if it is due."""
        if self.sample >= len(self.samples):
            if self.shard == len(self.shards) - 1:
                self.reset()
            else:
                self.open(self.shard + 1)
        return int(self.shards[self.shard]), int(self.samples[self.sample])

    def state(self):
        """What llm.c keeps of its loader in a train-state file, under its names."""
        state = dict(should_shuffle=self.rng is not None, num_shards=len(self.shards))
        state.update(current_shard_idx=self.shard, current_sample_idx=self.sample)
        if self.rng:
            state.update(shard_indices=self.shards.copy(), shard_num_samples=len(self.samples))
            state.update(intra_shard_indices=self.samples.copy(), mt19937=self.rng.to_bytes())
        return state


class DataLoader:
    """Serves (B, T) batches of inputs and targets from the shards that match a pattern, in llm.c's order.

    Sample k of a shard is the tokens k*P*B*T .. (k+1)*P*B*T (P = num_processes); rank r takes the B*T + 1 tokens from
    k*P*B*T + r*B*T: inputs are the first B*T, targets the same moved by one. Tokens after the last whole sample are
    dropped. With should_shuffle each rank permutes shards once an epoch and samples once a shard, with its own MT19937
    seeded 42 + rank; ranks stay disjoint because their offset inside a sample is fixed.

    That is one *stream* of batches for each rank. The number of streams can also be another one, S, and their batches
    can have another number of rows than B: the streams then take turns, batch by batch, and their rows make one
    sequence, of which the ranks take B rows each in turn. So the data of an update does not depend on the number of
    ranks, nor on B, if its number of tokens is the same: with streams=1, rows=B from the start, and in a run that is
    continued by other ranks, which keeps the streams of the ranks that began it (load_states). No token is skipped or
    read twice then. (llm.c itself resumes only what was saved with a stream for each rank: its samples are that long.)

    vocab_size (optional): ids >= vocab_size and shards that state another vocabulary are refused.
    Attributes: num_tokens (of all shards), paths, and of this rank's stream path, shard_num_samples, current_shard_idx
    and current_sample_idx (the next one in the shard).
    Errors: UserError for a pattern without files, an invalid shard, or one with fewer than S*rows*T + 1 tokens.
    Source: llm.c llmc/dataloader.h.
    """

    def __init__(
        self, pattern, B, T, rank=0, num_processes=1, should_shuffle=False, vocab_size=None, streams=None, rows=None
    ):
        self.pattern, self.B, self.T, self.rank, self.num_processes = pattern, B, T, rank, num_processes
        self.should_shuffle, self.vocab_size = bool(should_shuffle), vocab_size
        self.paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not self.paths:
            raise UserError(f"no file matches {pattern}. HINT: make shards with: python -m llmc.data prepare FILE.txt")
        self._opened = None
        self._make_streams(streams or num_processes, rows or B)
        self._open(self._stream.current()[0])

    def _make_streams(self, count, rows, stream=0, row=0):
        """`count` streams at their start, whose batches have `rows` rows. In llm.c's order a rank needs only its own.

        stream: whose turn it is; row: how many rows are used of its current sample.
        """
        self.num_streams, self.rows = count, rows
        num_tokens = [self._check(path).num_tokens for path in self.paths]
        self.num_tokens = sum(num_tokens)
        num_samples = [(n - 1) // (count * rows * self.T) for n in num_tokens]
        self._own = own = (count, rows, stream, row) == (self.num_processes, self.B, 0, 0)  # llm.c's order
        self._indices = [self.rank] if own else list(range(count))
        self._streams = [Stream(num_samples, 42 + s if self.should_shuffle else None) for s in self._indices]
        self._stream = self._streams[0 if own else self.rank % count]
        self._before = 0 if own else self.rank * self.B  # rows of other ranks before and after ours
        self._after = 0 if own else (self.num_processes - 1 - self.rank) * self.B
        self._next, self._row = stream, row

    path = property(lambda self: self.paths[self._stream.shards[self._stream.shard]])
    shard_num_samples = property(lambda self: len(self._stream.samples))
    current_shard_idx = property(lambda self: self._stream.shard)
    current_sample_idx = property(lambda self: self._stream.sample)

    def _check(self, path):
        header = read_shard_header(path)
        needed = self.num_streams * self.rows * self.T + 1
        if header.num_tokens < needed:
            raise UserError(
                f"{path} has {header.num_tokens} tokens, one batch of -b {self.rows} x -t {self.T} on "
                f"{self.num_streams} processes needs {needed}. HINT: lower -b or -t, or use a longer text"
            )
        if header.vocab_size and self.vocab_size and header.vocab_size != self.vocab_size:
            raise UserError(
                f"{path} was made with a vocabulary of {header.vocab_size} tokens, the model has {self.vocab_size}. "
                "HINT: prepare the data with the model's tokenizer (--tokenizer)"
            )
        return header

    def _open(self, shard):
        if shard != self._opened:
            header = self._check(self.paths[shard])
            if self._opened is not None:
                self._file.close()
            self._file, self._opened = open(self.paths[shard], "rb", buffering=0), shard
            self._buffer = np.empty(self.B * self.T + 1, header.dtype)

    def reset(self):
        """Start a new epoch; a shuffling loader permutes the shards on top of their previous order."""
        for stream in self._streams:
            stream.reset()
        self._next = self._row = 0

    def _take(self, rows):
        """Yield (shard, token, n) for each run of n rows among the next `rows` of all ranks, and move on by them."""
        while rows:
            s, stream = self._indices[self._next], self._streams[self._next]
            shard, sample = stream.current()
            n = min(rows, self.rows - self._row)
            yield shard, ((sample * self.num_streams + s) * self.rows + self._row) * self.T, n
            rows, self._row = rows - n, self._row + n
            if self._row == self.rows:
                stream.sample += 1
                self._next, self._row = (self._next + 1) % len(self._streams), 0

    def next_batch(self, inputs, targets):
        """Fill inputs and targets, C-contiguous int32 (B, T) arrays (=), with the next batch.

        Errors: UserError for an id >= vocab_size, naming shard, position, id and limit, or if the file got shorter.
        """
        B, T = self.B, self.T
        for array in (inputs, targets):
            assert array.shape == (B, T) and array.dtype == np.int32 and array.flags.c_contiguous, (array.shape, B, T)
        for _ in self._take(self._before):
            pass
        row = 0
        for shard, position, n in self._take(B):
            self._open(shard)
            tokens = self._read(position, n * T + 1)
            inputs[row : row + n].reshape(-1)[:] = tokens[:-1]
            targets[row : row + n].reshape(-1)[:] = tokens[1:]
            row += n
        for _ in self._take(self._after):
            pass

    def _read(self, position, count):
        """`count` tokens from token `position` of the open shard, in the buffer."""
        self._file.seek(HEADER_BYTES + position * self._buffer.itemsize)
        tokens = self._buffer[:count]
        view, done, path = memoryview(tokens).cast("B"), 0, self.paths[self._opened]
        while done < len(view):
            got = self._file.readinto(view[done:])
            if not got:
                raise UserError(f"{path} became shorter while it was read. HINT: keep data files unchanged")
            done += got
        self._check_ids(path, position, tokens)
        return tokens

    def _check_ids(self, path, position, tokens):
        if self.vocab_size and tokens.max() >= self.vocab_size:
            at = int(np.argmax(tokens >= self.vocab_size))
            raise UserError(
                f"{path}: token {position + at} has id {tokens[at]}, the model's vocabulary ends at "
                f"{self.vocab_size - 1}. HINT: prepare the data with the model's tokenizer (--tokenizer)"
            )

    def check_all_ids(self, limit=1 << 25):
        """Look at every id before training where there are at most `limit` tokens; of more, each batch is checked."""
        for path in self.paths if self.num_tokens <= limit else ():
            header = read_shard_header(path)
            with open(path, "rb") as file:
                file.seek(HEADER_BYTES)
                for position in range(0, header.num_tokens, 1 << 20):
                    self._check_ids(path, position, np.fromfile(file, header.dtype, 1 << 20))

    def state(self):
        """The position, to be saved: what llm.c keeps, and `streams`, which llm.c has not.

        In llm.c's order the former is Stream.state() of this rank's stream. In another order, which llm.c could not go
        on with, it is where llm.c's loader of this rank would be as many tokens into its first epoch.
        streams: count, rows, T, next (whose turn it is), row (used of its sample), and others, the states of streams
        that no rank has as its own, shared out over the ranks. JSON can hold it.
        """

        def plain(state):
            return {
                k: v.hex() if isinstance(v, bytes) else getattr(v, "tolist", lambda v=v: v)() for k, v in state.items()
            }

        shared = [] if self._own else range(self.rank, self.num_streams, self.num_processes)
        others = {s: plain(self._streams[s].state()) for s in shared}
        streams = dict(count=self.num_streams, rows=self.rows, T=self.T, next=self._next, row=self._row, others=others)
        return (self._stream.state() if self._own else self._llmc_state()) | dict(streams=streams)

    def _llmc_state(self):
        batch, ours = self.num_processes * self.B * self.T, self._streams[0]
        num_samples = [(read_shard_header(path).num_tokens - 1) // batch for path in self.paths]
        stream = Stream(num_samples, 42 + self.rank if self.should_shuffle else None)
        samples = sum(ours.num_samples[shard] for shard in ours.shards[: ours.shard]) + ours.sample
        done = samples * self.num_streams * self.rows * self.T // batch
        while done > len(stream.samples) and stream.shard < len(stream.shards) - 1:
            done -= len(stream.samples)
            stream.open(stream.shard + 1)
        stream.sample = min(done, len(stream.samples))
        return stream.state()

    def load_state(self, state):
        """load_states of one rank: the only one, or one whose stream no other rank reads (llm.c's order, same P)."""
        count = state.get("streams", {}).get("count", self.num_processes)
        assert count == self.num_processes or self.num_processes == 1, (count, self.num_processes)
        self.load_states([state] * self.num_processes)

    def load_states(self, states):
        """Continue where the loaders of a run's ranks were (their states in order), on any number of ranks.

        T must be that of the run, and B if llm.c wrote the states; UserError if they cannot be used.
        """
        hint = "HINT: resume with the same data, -t and shuffling (-a), after llm.c also the same -b"
        about = states[0].get("streams") or dict(count=len(states), rows=self.B, T=self.T, next=0, row=0)
        if about["T"] != self.T:
            raise UserError(f"{self.pattern}: the checkpoint was saved with -t {about['T']}, not {self.T}. {hint}")
        self._make_streams(about["count"], about["rows"], about["next"], about["row"])
        found = {}
        for rank, state in enumerate(states):
            found.setdefault(rank % about["count"], state)
        for state in states:
            found.update({int(s): other for s, other in state.get("streams", {}).get("others", {}).items()})
        for s, stream in zip(self._indices, self._streams, strict=True):
            self._load_stream(stream, found[s], hint)
        self._open(self._stream.shards[self._stream.shard])

    def _load_stream(self, stream, state, hint):
        if bool(state["should_shuffle"]) != self.should_shuffle:
            said = ["without shuffling", "with shuffling"]
            raise UserError(
                f"{self.pattern}: the checkpoint was saved {said[bool(state['should_shuffle'])]}, this run is "
                f"{said[self.should_shuffle]}. {hint}"
            )
        shard, sample = int(state["current_shard_idx"]), int(state["current_sample_idx"])
        if not 0 <= shard < len(self.paths):
            raise UserError(f"{self.pattern}: the checkpoint is in shard {shard} of {len(self.paths)}. {hint}")
        if self.should_shuffle:
            order, mt19937 = np.array(state["shard_indices"], np.int32), state["mt19937"]
            if not np.array_equal(np.sort(order), np.arange(len(self.paths))):
                raise UserError(
                    f"{self.pattern}: the checkpoint has {order.size} shards, not {len(self.paths)}. {hint}"
                )
            stream.shards = order
            stream.rng = MT19937.from_bytes(bytes.fromhex(mt19937) if isinstance(mt19937, str) else mt19937)
        path, count = self.paths[stream.shards[shard]], stream.num_samples[stream.shards[shard]]
        if not 0 <= sample <= count:
            raise UserError(f"{path}: the checkpoint is at sample {sample} of {count} in this shard. {hint}")
        stream.shard, stream.sample, stream.samples = shard, sample, range(count)
        if self.should_shuffle:
            stream.samples = np.array(state["intra_shard_indices"], np.int32)
            if not np.array_equal(np.sort(stream.samples), np.arange(count)):
                raise UserError(
                    f"{path}: the checkpoint has {stream.samples.size} samples in this shard, not {count}. {hint}"
                )


# ----------------------------------------------------------------------------
# eval sets: multiple choice with four completions, hellaswag_val.bin of llm.c


EVAL_MAGIC, EVAL_VERSION = 20240522, 1
EVAL_START = 2**16 - 1  # the word before each example
COMPLETIONS = 4


def write_eval_set(path, examples):
    """Write (label, context, completions) examples as llm.c's eval set, atomically.

    label: 0..3, the completion that is right; context: a list of token ids; completions: four such lists.
    An example is a run of uint16 words: 65535, its bytes (these words too), its index, label, 4, then each list behind
    its length. The header has the number of examples in h[2] and the bytes of the longest one in h[3].
    Errors: UserError for what the format cannot hold. Source: llm.c dev/data/hellaswag.py, data_common.py.
    """
    stream, longest = [], 0
    if not 1 <= len(examples) < 2**16:
        raise UserError(f"{path}: an eval set holds 1 to 65535 examples, not {len(examples)}. HINT: split the file")
    for i, (label, context, completions) in enumerate(examples):
        words = [EVAL_START, 0, i, label, len(completions)]
        for tokens in (context, *completions):
            words += [len(tokens), *map(int, tokens)]
        words[1] = 2 * len(words)
        problem = None
        if len(completions) != COMPLETIONS or not 0 <= label < COMPLETIONS:
            problem = f"label {label} of {len(completions)} completions, expected 0..3 of 4"
        elif not all(map(len, (context, *completions))):
            problem = "the context or a completion is empty"
        elif words[1] >= 2**16:
            problem = f"{words[1]} bytes, at most 65534 fit"
        elif max(words[5:]) >= EVAL_START or min(words) < 0:
            problem = f"a token id outside 0..65534 ({max(words[5:])})"
        if problem:
            raise UserError(f"{path}: example {i}: {problem}. HINT: remove or shorten it")
        longest = max(longest, words[1])
        stream.append(np.array(words, "<u2"))
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:4] = EVAL_MAGIC, EVAL_VERSION, len(examples), longest
    with atomic_write(path) as file:
        file.write(header)
        for words in stream:
            file.write(words)


def read_eval_set(path):
    """The (label, context, completions) examples of an eval set, token ids as lists of int. Errors: UserError."""
    with open_checked(path, EVAL_MAGIC, (EVAL_VERSION,)) as (file, header, size):
        count, longest = int(header[2]), int(header[3])
        data = file.read()
    damaged = f"{path} is damaged, over-long or truncated ({size} bytes, {count} examples)"
    hint = "HINT: copy it again, or make it with: python -m llmc.data prepare hellaswag FILE.jsonl"
    if len(data) % 2 or count < 1:
        raise UserError(f"{damaged}. {hint}")
    words, examples, at = np.frombuffer(data, "<u2"), [], 0
    for i in range(count):
        example = words[at : at + words[at + 1] // 2].tolist() if at + 1 < words.size else []
        lists, place = [], 5
        while place < len(example) and len(lists) <= COMPLETIONS:
            lists.append(example[place + 1 : place + 1 + example[place]])
            place += 1 + example[place]
        fits = place == len(example) == words[at + 1] // 2 and 2 * place <= longest if example else False
        if not (fits and example[:1] == [EVAL_START] and example[2] == i and example[3] < example[4] == COMPLETIONS):
            raise UserError(f"{damaged}: example {i} is not one. {hint}")
        if len(lists) != 1 + COMPLETIONS or not all(lists):
            raise UserError(f"{damaged}: example {i} lacks tokens. {hint}")
        examples.append((example[3], lists[0], lists[1:]))
        at += place
    if at != words.size:
        raise UserError(f"{damaged}: there is more behind the last example. {hint}")
    return examples


# ----------------------------------------------------------------------------
# where data comes from

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_BYTES = 1115394
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
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


class DownloadError(UserError):
    """A file could not be had from the network."""


def cache_dir():
    """The user's cache folder for llmc (it need not exist)."""
    if sys.platform == "win32":
        return os.path.join(os.environ.get("LOCALAPPDATA") or os.path.expanduser("~"), "llmc", "cache")
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Caches/llmc")
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llmc")


def writable_cache_dir():
    """cache_dir(), made if missing; where that is not possible, this user's folder for temporary files."""
    folder = cache_dir()
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        user = os.getuid() if hasattr(os, "getuid") else "user"
        temporary = os.path.join(tempfile.gettempdir(), f"llmc-{user}")
        try:
            os.makedirs(temporary, mode=0o700, exist_ok=True)
        except OSError:
            raise UserError(f"cannot write to {folder} or {temporary}: {error.strerror}. HINT: set TMPDIR") from error
        return temporary


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _read_bytes(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. HINT: check the path") from error


def tinyshakespeare_text():
    """Path of the checked text: $LLMC_DATA_DIR/tinyshakespeare/input.txt, the copy in the cache, or a download."""
    name = os.path.join("tinyshakespeare", "input.txt")
    if os.environ.get("LLMC_DATA_DIR"):
        path = os.path.join(os.environ["LLMC_DATA_DIR"], name)
        if os.path.exists(path):
            data = _read_bytes(path)
            if _sha256(data) != TINYSHAKESPEARE_SHA256:
                raise UserError(
                    f"{path} is not Tiny Shakespeare: {len(data)} bytes with SHA-256 {_sha256(data)}, expected "
                    f"{TINYSHAKESPEARE_BYTES} with {TINYSHAKESPEARE_SHA256}. HINT: delete it to have it downloaded anew"
                )
            return path
    path = os.path.join(cache_dir(), name)
    if os.path.exists(path) and _sha256(_read_bytes(path)) == TINYSHAKESPEARE_SHA256:
        return path
    path = os.path.join(writable_cache_dir(), name)
    data = _download(TINYSHAKESPEARE_URL, TINYSHAKESPEARE_BYTES, TINYSHAKESPEARE_SHA256)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as file:
        file.write(data)
    return path


def _download(url, size, sha256):
    """The bytes at a URL; DownloadError unless they are exactly the expected ones."""
    import http.client
    import urllib.request

    hint = "HINT: connect to the internet, or set LLMC_DATA_DIR to a folder that has tinyshakespeare/input.txt"
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            data = response.read(size + 1)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"cannot download {url}: {error}. {hint}") from error
    if len(data) != size or _sha256(data) != sha256:
        got = f"{len(data)} bytes with SHA-256 {_sha256(data)}" if len(data) <= size else f"more than {size} bytes"
        raise DownloadError(f"{url} sent {got}, expected {size} bytes with {sha256}. {hint}")
    return data


def builtin_text():
    """About 465,000 characters that every CPython carries: the language reference, as shown by Python's help()."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            f"this Python has no pydoc_data.topics: {error}. HINT: train on a text file of your own"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics)) + "\n"


# ----------------------------------------------------------------------------
# from text to tokens

CHUNK_BYTES = 1 << 20  # read at a time
BATCH_CHARS = 1 << 23  # encoded at a time, on all cores


def _decoded_chunks(path, progress):
    """Yield the text of a UTF-8 file in pieces; UserError with the byte offset of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    try:
        with open(path, "rb") as file:
            while True:
                chunk = file.read(CHUNK_BYTES)
                held = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
                yield decoder.decode(chunk, final=not chunk)
                if not chunk:
                    break
                position += len(chunk)
                progress(len(chunk))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. HINT: check the path") from error
    except UnicodeDecodeError as error:
        offset = position - held + error.start
        raise UserError(
            f"{path} is not UTF-8 at byte offset {offset} (byte 0x{error.object[error.start]:02x}). "
            "HINT: convert it, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error
    if position == 0:
        raise UserError(f"{path} is empty. HINT: name a file with text")


def pieces(chunks, blank_lines):
    """Cut a streamed text into (starts a document, text) pieces that encode one by one as they would together.

    Without blank_lines the text is one document. With it, a document ends after each blank line ("\\n\\n").
    Pieces are cut only where a character that is not white space is followed by a space or newline. No token of GPT-2's
    pattern reaches over such a place, and what matches on its left does not depend on what follows: the pattern's only
    lookahead is after white space. Text without any such place is held in memory as a whole.
    """
    text, starts = "", True
    for chunk in chunks:
        searched = len(text)
        text += chunk
        if blank_lines:
            *documents, text = text.split("\n\n")
            for document in documents:
                yield starts, document + "\n\n"
                starts = True
        for i in range(len(text) - 1, max(searched, 1) - 1, -1):
            if text[i] in " \n" and not text[i - 1].isspace():
                yield starts, text[:i]
                starts, text = False, text[i:]
                break
    if text:
        yield starts, text


def tokenize(paths, tokenizer, blank_lines):
    """Yield uint16 arrays of token ids: each document of the UTF-8 files, after an EOT; memory stays bounded."""
    from tqdm import tqdm

    def encoded(batch):
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
            for piece in pieces(_decoded_chunks(path, bar.update), blank_lines):
                batch.append(piece)
                chars += len(piece[1])
                if chars >= BATCH_CHARS:
                    yield from encoded(batch)
                    batch, chars = [], 0
            yield from encoded(batch)


# ----------------------------------------------------------------------------
# preparation

Prepared = namedtuple("Prepared", "train val files")  # patterns for -i and -j (val may be None); the WrittenShards
WrittenShard = namedtuple("WrittenShard", "path num_tokens num_bytes written")  # written False: was there already


def prepare(names, tokenizer="gpt2", out=None, val_fraction=None, blank_lines=False, shard_size=10**8, overwrite=False):
    """Make shards of one known dataset ("tinyshakespeare") or of UTF-8 text files; returns Prepared.

    Text files: each file is one document (with blank_lines: each part up to a blank line), preceded by EOT; the last
    val_fraction (0.1) of all tokens is for validation. Shards of at most shard_size tokens, NAME_train_000000.bin ...,
    or NAME_train.bin if there is only one, NAME being the first file's; `out` defaults to ./NAME-TOKENIZER.
    Tiny Shakespeare: llm.c's own split with GPT-2 tokens; byte-level its raw bytes without EOT, of which the last tenth
    is for validation. `out` defaults to a folder in the user's cache.
    Files of the same names and other content are kept and an error raised, unless `overwrite` is set.
    """
    from llmc.data import tokenizer as tokenizers

    known = "tinyshakespeare" in names
    if known and len(names) > 1:
        raise UserError(f"{' '.join(names)}: a known dataset and files cannot be mixed. HINT: prepare one at a time")
    if known and (val_fraction is not None or blank_lines):
        raise UserError("tinyshakespeare has a fixed split. HINT: leave --val-fraction and --split out")
    val_fraction = 0.1 if val_fraction is None else val_fraction
    assert 0 <= val_fraction < 1 and shard_size >= 1, (val_fraction, shard_size)
    for path in names:
        if not known and not os.path.exists(path):
            raise UserError(f"{path} is neither a file nor a known dataset. HINT: known datasets: tinyshakespeare")
    encoder = tokenizers.get(tokenizer)
    vocab_size = 0 if tokenizer == "gpt2" else encoder.n_vocab  # 0: byte for byte as llm.c writes it
    try:
        if known:
            train, val = _tinyshakespeare_tokens(encoder)
            if out is None:
                out, overwrite = os.path.join(writable_cache_dir(), f"tinyshakespeare-{tokenizer}"), True
            return _write_dataset(out, "tiny_shakespeare", train, val, vocab_size, shard_size, overwrite)
        name = os.path.splitext(os.path.basename(names[0]))[0]
        out = out or f"{name}-{tokenizer}"
        os.makedirs(out, exist_ok=True)
        # where the validation tokens start is known at the end: all tokens go to a nameless file first
        with tempfile.TemporaryFile(dir=out) as file:
            for ids in tokenize(names, encoder, blank_lines):
                file.write(ids)
            file.flush()
            tokens = np.memmap(file, np.uint16, mode="r")
            num_train = int(tokens.size * (1 - val_fraction))
            if num_train == 0:
                raise UserError(f"{names[0]}: {tokens.size} tokens are too few to split. HINT: use a longer text")
            return _write_dataset(out, name, tokens[:num_train], tokens[num_train:], vocab_size, shard_size, overwrite)
    except OSError as error:
        where = error.filename or out
        raise UserError(f"cannot write to {where}: {error.strerror}. HINT: choose another folder with --out") from error


def prepare_hellaswag(path, tokenizer="gpt2", out=None, overwrite=False):
    """Make FILE.bin, an eval set, of HellaSwag's FILE.jsonl, in its folder or in `out`; returns (path, examples).

    A line is a JSON object: ctx, the context; endings, four completions; label, the number of the right one.
    Completions are encoded apart from the context, with a space in front. Source: llm.c dev/data/hellaswag.py.
    """
    from llmc.data import tokenizer as tokenizers

    labels, texts = [], []
    for number, line in enumerate(_read_bytes(path).splitlines(), 1):
        try:
            example = json.loads(line)
            context, label, endings = example["ctx"], int(example["label"]), example["endings"]
            if not (
                isinstance(context, str) and isinstance(endings, list) and all(isinstance(e, str) for e in endings)
            ):
                raise ValueError("ctx is text, endings a list of texts")
            if len(endings) != COMPLETIONS or not 0 <= label < COMPLETIONS:
                raise ValueError(f"label {label} of {len(endings)} endings, expected 0..3 of 4")
        except (ValueError, KeyError, TypeError) as error:
            wrong = f"no {error}" if isinstance(error, KeyError) else str(error)
            form = '{"ctx": "...", "label": 0, "endings": ["...", "...", "...", "..."]}'
            raise UserError(f"{path}, line {number}: {wrong}. HINT: a line of HellaSwag's jsonl is {form}") from error
        labels.append(label)
        texts += [context, *(" " + ending for ending in endings)]
    ids = [tokens.tolist() for tokens in tokenizers.get(tokenizer).encode_batch(texts)]
    examples = [(label, ids[5 * i], ids[5 * i + 1 : 5 * i + 5]) for i, label in enumerate(labels)]
    stem, folder = os.path.splitext(os.path.basename(path))[0], out or os.path.dirname(path)
    target = os.path.join(folder, f"{stem}.bin")
    if os.path.exists(target) and not overwrite:
        with contextlib.suppress(UserError):
            if read_eval_set(target) == examples:
                return target, examples
        raise UserError(f"{target} exists with other content. HINT: choose another --out, or add --overwrite")
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}. HINT: choose another --out") from error
    write_eval_set(target, examples)
    return target, examples


def _tinyshakespeare_tokens(tokenizer):
    path = tinyshakespeare_text()
    if tokenizer.name == "bytes":
        tokens = np.frombuffer(_read_bytes(path), np.uint8).astype(np.uint16)
        num_train = int(0.9 * tokens.size)
        return tokens[:num_train], tokens[num_train:]
    tokens = np.concatenate(list(tokenize([path], tokenizer, blank_lines=True)))
    return tokens[32768:], tokens[:32768]


def _write_dataset(out, name, train, val, vocab_size, shard_size, overwrite):
    """Write the shards of both splits; nothing is touched if a file with other content is in the way."""
    os.makedirs(out, exist_ok=True)
    patterns, shards = [], {}  # path: tokens
    for split, tokens in ("val", val), ("train", train):
        count = -(-tokens.size // shard_size)
        stem = os.path.join(out, f"{name}_{split}")
        patterns.append(f"{stem}.bin" if count == 1 else f"{glob.escape(stem)}_*.bin" if count else None)
        for i in range(count):  # of equal size, so that no shard is too short for a batch
            part = tokens[tokens.size * i // count : tokens.size * (i + 1) // count]
            shards[f"{stem}.bin" if count == 1 else f"{stem}_{i:06d}.bin"] = part
    same = {path for path, tokens in shards.items() if os.path.exists(path) and _is_shard(path, tokens, vocab_size)}
    ours = re.compile(re.escape(name) + r"_(train|val)(_\d{6})?\.bin")
    there = sorted(os.path.join(out, file) for file in os.listdir(out) if ours.fullmatch(file))
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
    return Prepared(patterns[1], patterns[0], files)


def _is_shard(path, tokens, vocab_size):
    try:
        header = read_shard_header(path)
    except UserError:
        return False
    if (header.num_tokens, header.vocab_size) != (tokens.size, vocab_size):
        return False
    old, step = read_shard(path), 1 << 24
    return all(np.array_equal(old[i : i + step], tokens[i : i + step]) for i in range(0, tokens.size, step))


def prepare_default(tokenizer, allow_fallback=True):
    """The data of a run that names none: (train path, val path, a line that says what it is).

    Tiny Shakespeare, from finished shards in the cache (checked by SHA-256) or prepared there now. If it cannot be
    downloaded and allow_fallback is set: the text of builtin_text(), of which the last tenth is for validation.
    """
    folder = os.path.join(cache_dir(), f"tinyshakespeare-{tokenizer}")
    paths = [os.path.join(folder, f"tiny_shakespeare_{split}.bin") for split in ("train", "val")]
    if all(map(os.path.exists, paths)):
        if tuple(_sha256(_read_bytes(path)) for path in paths) == TINYSHAKESPEARE_SHARDS.get(tokenizer):
            return *paths, f"Tiny Shakespeare in {folder}"
    try:
        train, val, _ = prepare(["tinyshakespeare"], tokenizer)
        what = "Tiny Shakespeare"
    except DownloadError as error:
        if not allow_fallback:
            raise
        text = builtin_text().encode()
        folder = os.path.join(writable_cache_dir(), f"python-help-{_sha256(text)[:8]}-{tokenizer}")
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "python_help.txt")
        with atomic_write(path) as file:
            file.write(text)
        train, val, _ = prepare([path], tokenizer, out=folder, overwrite=True)
        what = f"Python's own documentation, as Tiny Shakespeare cannot be had ({str(error).partition('. HINT')[0]}),"
    where = os.path.dirname(train)
    if not where.startswith(cache_dir()):
        where += f" ({cache_dir()} is not writable)"
    return train, val, f"{what} in {where}"


# ----------------------------------------------------------------------------
# command line


@command("llmc.data")
def main(argv=None):
    """python -m llmc.data prepare ...; returns the exit code."""
    parser = flags.Parser(prog="llmc.data", description="Make token shards for llmc.train.", allow_abbrev=False)
    prepare_parser = parser.add_subparsers(dest="command", required=True).add_parser(
        "prepare",
        help="turn a known dataset or UTF-8 text files into token shards",
        description="Turn a known dataset (tinyshakespeare) or UTF-8 text files into token shards, or with hellaswag "
        "FILE.jsonl HellaSwag's examples into FILE.bin, the eval set of llmc.train -h 1 and llmc.evaluate.",
        allow_abbrev=False,
    )
    add = prepare_parser.add_argument
    add("names", nargs="+", metavar="NAME|FILE.txt", help="tinyshakespeare, or text files, or hellaswag FILE.jsonl")
    add("--tokenizer", default="gpt2", metavar="NAME", help="gpt2 or bytes (default gpt2)")
    add("--out", metavar="DIR", help="folder for the shards (default ./FILE-TOKENIZER; known data: the user's cache)")
    add("--val-fraction", type=flags.below_one, metavar="F", help="last part of all tokens, to validate (default 0.1)")
    add(
        "--split",
        choices=["files", "blank-lines"],
        default="files",
        help="what a document is, which an end-of-text token precedes: a file, or a part up to a blank line",
    )
    add("--shard-size", type=flags.positive, default=10**8, metavar="N", help="most tokens in a shard (default 1e8)")
    add("--overwrite", action="store_true", help="replace shards that have other content")
    args = parser.parse_args(argv)

    if args.names[0] == "hellaswag":
        if len(args.names) != 2 or args.val_fraction is not None or args.split != "files":
            raise UserError("hellaswag takes one jsonl file and has no splits. HINT: prepare hellaswag FILE.jsonl")
        path, examples = prepare_hellaswag(args.names[1], args.tokenizer, args.out, args.overwrite)
        print(f"{path}: {len(examples)} examples, {os.path.getsize(path)} bytes")
        print(f"next: python -m llmc.evaluate MODEL --hellaswag {shlex.quote(path)}")
        return 0
    blank_lines = args.split == "blank-lines"
    train, val, files = prepare(
        args.names, args.tokenizer, args.out, args.val_fraction, blank_lines, args.shard_size, args.overwrite
    )
    for file in files:
        done = "wrote" if file.written else "unchanged:"
        print(f"{done} {file.path}: {file.num_tokens} tokens, {file.num_bytes} bytes")
    train_flags = ["-i", train]
    if val:
        train_flags += ["-j", val]
    if args.tokenizer != "gpt2":
        train_flags += ["--tokenizer", args.tokenizer]
    print(f"next: python -m llmc.train {shlex.join(train_flags)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
