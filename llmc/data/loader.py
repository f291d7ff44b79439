"""Loaders: batches for training in llm.c's order, and every pair of a set exactly once for validation.

Source: llm.c llmc/dataloader.h.
"""

import itertools
from collections.abc import Iterator
from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc.data.shards import HEADER_BYTES, Dataset, ShardHeader, read_shard_header, shard_paths
from llmc.data.tokenizer import tokenizer_name
from llmc.errors import UserError
from llmc.files import parse
from llmc.rand import MT19937, random_permutation

Batch = NDArray[np.int32]
RESUME_HINT = "HINT: resume with the same data, -t and shuffling (-a), after llm.c also the same -b"


def source_of(source: str | Dataset, vocab_size: int | None) -> tuple[str, int | None]:
    """(pattern, vocabulary size) of a pattern, or of a dataset's training shards."""
    if isinstance(source, Dataset):
        return source.train, vocab_size or source.vocab_size
    return source, vocab_size


def check_vocabulary(path: str, header: ShardHeader, vocab_size: int | None) -> None:
    """UserError for a shard that states another vocabulary than that of the model; None: any will do.

    A model with more ids than the shard states is fine where both have the same tokenizer.
    """
    stated = header.vocab_size
    if not stated or not vocab_size or stated == vocab_size:
        return
    if stated > vocab_size or tokenizer_name(stated) is None or tokenizer_name(stated) != tokenizer_name(vocab_size):
        raise UserError(
            f"{path} was made with a vocabulary of {header.vocab_size} tokens, the model has {vocab_size}. "
            "HINT: prepare the data with the model's tokenizer (--tokenizer)"
        )


def check_ids(path: str, position: int, tokens: NDArray[np.unsignedinteger], vocab_size: int | None) -> None:
    """UserError for an id outside the vocabulary; position: that of the first token in the shard."""
    if vocab_size and tokens.max() >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{path}: token {position + at} has id {tokens[at]}, the model's vocabulary ends at "
            f"{vocab_size - 1}. HINT: prepare the data with the model's tokenizer (--tokenizer)"
        )


def read_tokens(
    file: FileIO, path: str, position: int, tokens: NDArray[np.unsignedinteger], vocab_size: int | None
) -> NDArray[np.unsignedinteger]:
    """Fill `tokens` (=) with those of an open shard, from token `position` on, and return it.

    Errors: UserError for a file that got shorter, and for ids >= vocab_size.
    """
    file.seek(HEADER_BYTES + position * tokens.itemsize)
    view, done = tokens.data.cast("B"), 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise UserError(f"{path} became shorter while it was read. HINT: keep data files unchanged")
        done += got
    check_ids(path, position, tokens, vocab_size)
    return tokens


def check_shards(paths: list[str], vocab_size: int | None) -> None:
    """check_ids of every token of these shards."""
    for path in paths:
        header = read_shard_header(path)
        with open_shard(path) as file:
            file.seek(HEADER_BYTES)
            for position in range(0, header.num_tokens, 1 << 20):
                check_ids(path, position, np.fromfile(file, header.dtype, 1 << 20), vocab_size)


def open_shard(path: str) -> FileIO:
    """The file of a shard, unbuffered. Errors: UserError."""
    try:
        return FileIO(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. HINT: keep data files where they are") from error


class Stream:
    """The order in which one stream of batches visits shards and samples: that of llm.c's loader on one rank.

    num_samples: of each shard. seed None: as they come. Else an MT19937 permutes the shards once an epoch, on top of
    their previous order, and the samples of a shard when it is opened.
    """

    def __init__(self, num_samples: list[int], seed: int | None = None):
        self.num_samples, self.rng = num_samples, None if seed is None else MT19937(seed)
        self.shards = np.arange(len(num_samples), dtype=np.int32)
        self.reset()

    def reset(self) -> None:
        """Start an epoch."""
        if self.rng:
            random_permutation(self.shards, self.rng)
        self.open(0)

    def open(self, shard: int) -> None:
        """Go to the first sample of the shard in this place of the epoch's order."""
        self.shard, self.sample = shard, 0
        self.samples: Any = range(self.num_samples[self.shards[shard]])
        if self.rng:
            self.samples = np.array(self.samples, np.int32)
            random_permutation(self.samples, self.rng)

    def current(self) -> tuple[int, int]:
        """(place of the shard in the list of files, sample in it) that is next; goes to the next shard if it is due."""
        if self.sample >= len(self.samples):
            if self.shard == len(self.shards) - 1:
                self.reset()
            else:
                self.open(self.shard + 1)
        return int(self.shards[self.shard]), int(self.samples[self.sample])

    def state(self) -> dict[str, Any]:
        """What llm.c keeps of its loader in a train-state file, under its names."""
        state: dict[str, Any] = dict(should_shuffle=self.rng is not None, num_shards=len(self.shards))
        state.update(current_shard_idx=self.shard, current_sample_idx=self.sample)
        if self.rng:
            state.update(shard_indices=self.shards.copy(), shard_num_samples=len(self.samples))
            state.update(intra_shard_indices=self.samples.copy(), mt19937=self.rng.to_bytes())
        return state


class DataLoader:
    """Serves (B, T) batches of inputs and targets from the shards of a pattern or a Dataset, in llm.c's order.

        for inputs, targets in DataLoader(dataset("shakespeare", "bytes"), B=12, T=96).batches(200): ...

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
        self,
        source: str | Dataset,
        B: int,
        T: int,
        rank: int = 0,
        num_processes: int = 1,
        should_shuffle: bool = False,
        vocab_size: int | None = None,
        streams: int | None = None,
        rows: int | None = None,
    ):
        self.pattern, self.vocab_size = source_of(source, vocab_size)
        self.B, self.T, self.rank, self.num_processes = B, T, rank, num_processes
        self.should_shuffle = bool(should_shuffle)
        self.paths = shard_paths(self.pattern)
        self._file: FileIO
        self._opened: int | None = None
        self._make_streams(streams or num_processes, rows or B)
        self._open(self._stream.current()[0])

    def _make_streams(self, count: int, rows: int, stream: int = 0, row: int = 0) -> None:
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

    @property
    def path(self) -> str:
        """The shard that this rank's stream is in."""
        return self.paths[self._stream.shards[self._stream.shard]]

    @property
    def shard_num_samples(self) -> int:
        """Samples of that shard."""
        return len(self._stream.samples)

    @property
    def current_shard_idx(self) -> int:
        """Its place in the order of this epoch."""
        return self._stream.shard

    @property
    def current_sample_idx(self) -> int:
        """The place of the next sample in the order of this shard."""
        return self._stream.sample

    def _check(self, path: str) -> ShardHeader:
        header = read_shard_header(path)
        needed = self.num_streams * self.rows * self.T + 1
        if header.num_tokens < needed:
            raise UserError(
                f"{path} has {header.num_tokens} tokens, one batch of -b {self.rows} x -t {self.T} on "
                f"{self.num_streams} processes needs {needed}. HINT: lower -b or -t, or use a longer text"
            )
        check_vocabulary(path, header, self.vocab_size)
        return header

    def _open(self, shard: int) -> None:
        if shard != self._opened:
            header = self._check(self.paths[shard])
            if self._opened is not None:
                self._file.close()
            self._file, self._opened = open_shard(self.paths[shard]), shard
            self._buffer = np.empty(self.B * self.T + 1, header.dtype)

    def reset(self) -> None:
        """Start a new epoch; a shuffling loader permutes the shards on top of their previous order."""
        for stream in self._streams:
            stream.reset()
        self._next = self._row = 0

    def _take(self, rows: int) -> Iterator[tuple[int, int, int]]:
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

    def next_batch(self, inputs: Batch, targets: Batch) -> None:
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
            tokens = self._buffer[: n * T + 1]
            read_tokens(self._file, self.paths[shard], position, tokens, self.vocab_size)
            inputs[row : row + n].reshape(-1)[:] = tokens[:-1]
            targets[row : row + n].reshape(-1)[:] = tokens[1:]
            row += n
        for _ in self._take(self._after):
            pass

    def batches(self, count: int) -> Iterator[tuple[Batch, Batch]]:
        """Yield the next `count` batches as new (inputs, targets) int32 (B, T) arrays. Errors: as next_batch."""
        for _ in range(count):
            inputs, targets = np.empty((2, self.B, self.T), np.int32)
            self.next_batch(inputs, targets)
            yield inputs, targets

    def check_all_ids(self, limit: int = 1 << 25) -> None:
        """Look at every id before training where there are at most `limit` tokens; of more, each batch is checked."""
        if self.num_tokens <= limit:
            check_shards(self.paths, self.vocab_size)

    def state(self) -> dict[str, Any]:
        """The position, to be saved: what llm.c keeps, and `streams`, which llm.c has not.

        In llm.c's order the former is Stream.state() of this rank's stream. In another order, which llm.c could not go
        on with, it is where llm.c's loader of this rank would be as many tokens into its first epoch.
        streams: count, rows, T, next (whose turn it is), row (used of its sample), and others, the states of streams
        that no rank has as its own, shared out over the ranks. JSON can hold it.
        """

        def plain(state: dict[str, Any]) -> dict[str, Any]:
            return {
                k: v.hex() if isinstance(v, bytes) else getattr(v, "tolist", lambda v=v: v)() for k, v in state.items()
            }

        shared = [] if self._own else range(self.rank, self.num_streams, self.num_processes)
        others = {s: plain(self._streams[s].state()) for s in shared}
        streams = dict(count=self.num_streams, rows=self.rows, T=self.T, next=self._next, row=self._row, others=others)
        return (self._stream.state() if self._own else self._llmc_state()) | dict(streams=streams)

    def _llmc_state(self) -> dict[str, Any]:
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

    def load_state(self, state: dict[str, Any]) -> None:
        """load_states of one rank: the only one, or one whose stream no other rank reads (llm.c's order, same P)."""
        count = state.get("streams", {}).get("count", self.num_processes)
        assert count == self.num_processes or self.num_processes == 1, (count, self.num_processes)
        self.load_states([state] * self.num_processes)

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """Continue where the loaders of a run's ranks were (their states in order), on any number of ranks.

        T must be that of the run, and B if llm.c wrote the states; UserError if they cannot be used.
        """
        about = states[0].get("streams") or dict(count=len(states), rows=self.B, T=self.T, next=0, row=0)
        what = f"{self.pattern}: the checkpoint's data loader"
        about = parse.dictionary(about, f"{what}: streams")
        count, rows, T = (
            parse.integer(about.get(name), f"{what}: {name}", 1, 2**31) for name in ("count", "rows", "T")
        )
        turn = parse.integer(about.get("next"), f"{what}: next", 0, count - 1)
        row = parse.integer(about.get("row"), f"{what}: row", 0, rows - 1)
        if T != self.T:
            raise UserError(f"{self.pattern}: the checkpoint was saved with -t {T}, not {self.T}. {RESUME_HINT}")
        found: dict[int, Any] = {}
        for rank, state in enumerate(states):
            found.setdefault(rank % count, state)
        for state in states:
            shared = parse.dictionary(state.get("streams") or {}, f"{what}: streams").get("others", {})
            for name, other in parse.dictionary(shared, f"{what}: others").items():
                found[int(name) if name.isdecimal() and len(name) < 10 else -1] = other
        if count > len(found) or set(range(count)) - set(found):
            raise UserError(f"{what} has {len(found)} states of {count} streams. {RESUME_HINT}")
        self._make_streams(count, rows, turn, row)
        for s, stream in zip(self._indices, self._streams, strict=True):
            self._load_stream(stream, parse.dictionary(found[s], f"{what}: stream {s}"), f"{what}: stream {s}")
        self._open(self._stream.shards[self._stream.shard])

    def _load_stream(self, stream: Stream, state: dict[str, Any], what: str) -> None:
        shuffled = bool(state.get("should_shuffle"))
        if shuffled != self.should_shuffle:
            said = ["without shuffling", "with shuffling"]
            raise UserError(
                f"{self.pattern}: the checkpoint was saved {said[shuffled]}, this run is {said[self.should_shuffle]}. "
                f"{RESUME_HINT}"
            )
        shard, sample = (
            parse.integer(state.get(f"current_{name}_idx"), f"{what}: {name}") for name in ("shard", "sample")
        )
        if shard >= len(self.paths):
            raise UserError(f"{self.pattern}: the checkpoint is in shard {shard} of {len(self.paths)}. {RESUME_HINT}")
        if self.should_shuffle:
            stream.shards = _order(state.get("shard_indices"), len(self.paths), f"{self.pattern}", "shards")
            stream.rng = _generator(state.get("mt19937"), what)
        path, count = self.paths[stream.shards[shard]], stream.num_samples[stream.shards[shard]]
        if sample > count:
            raise UserError(f"{path}: the checkpoint is at sample {sample} of {count} in this shard. {RESUME_HINT}")
        stream.shard, stream.sample, stream.samples = shard, sample, range(count)
        if self.should_shuffle:
            stream.samples = _order(state.get("intra_shard_indices"), count, path, "samples in this shard")


def _order(indices: Any, count: int, what: str, of: str) -> NDArray[np.int32]:
    """The numbers 0 .. count - 1 in the order of a state. Errors: UserError for anything else."""
    try:
        order = np.asarray(indices)
    except ValueError:  # lists within lists of different lengths
        order = np.empty((0, 0))
    if order.ndim != 1 or (order.size and order.dtype.kind not in "iu"):
        raise UserError(f"{what}: the checkpoint's order of {of} is {parse.shown(indices)}. {RESUME_HINT}")
    if not np.array_equal(np.sort(order), np.arange(count)):
        raise UserError(f"{what}: the checkpoint has {order.size} {of}, not {count}. {RESUME_HINT}")
    return order.astype(np.int32)


def _generator(state: Any, what: str) -> MT19937:
    """The random generator of a state: bytes, or their hexadecimal digits. Errors: UserError."""
    try:
        return MT19937.from_bytes(bytes.fromhex(state) if isinstance(state, str) else state)
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what}: mt19937 is {parse.shown(state)}. {RESUME_HINT}") from error


class EveryPair:
    """Every (input, target) pair of the shards exactly once: for validation, where "all" means all.

        pairs = EveryPair(pattern, B, T, rank, num_processes)
        for inputs, targets in pairs:           # int32 (b, t) arrays, b <= B, t <= T: this rank's share
            ...
        mean = (sum of all ranks' losses over all positions) / pairs.num_pairs

    A shard of n tokens has n - 1 pairs: token i is the input, token i + 1 its target. They are cut into rows of T, of
    which the last one is shorter, and the rows into batches: (B, T) arrays, then one of the (b, T) that are left, then
    the short row, (1, t). No row reaches over the end of a shard. Batch k of the whole set is that of rank
    k % num_processes, so that nothing is lost or read twice, whatever the number of shards or ranks; a rank can have
    one batch less than another, or none. Every iteration starts at the first shard.

    limit: only the first `limit` batches of all ranks together (None: all).
    Attributes: paths; num_pairs and num_batches, of all ranks together and within the limit.
    Errors: UserError for a pattern without files, an invalid shard, another vocabulary, shards without a single pair,
    and, when they are read, for ids >= vocab_size.
    """

    def __init__(
        self,
        source: str | Dataset,
        B: int,
        T: int,
        rank: int = 0,
        num_processes: int = 1,
        vocab_size: int | None = None,
        limit: int | None = None,
    ):
        assert 0 <= rank < num_processes and min(B, T) > 0, (rank, num_processes, B, T)
        pattern, self.vocab_size = source_of(source, vocab_size)
        self.B, self.T, self.rank, self.num_processes, self.limit = B, T, rank, num_processes, limit
        self.paths = shard_paths(pattern)
        self._headers = [read_shard_header(path) for path in self.paths]
        for path, header in zip(self.paths, self._headers, strict=True):
            check_vocabulary(path, header, self.vocab_size)
        self.num_batches = self.num_pairs = 0
        for _, _, b, t in self._cuts():
            self.num_batches, self.num_pairs = self.num_batches + 1, self.num_pairs + b * t
        if not self.num_pairs:
            raise UserError(f"{pattern}: no shard has the 2 tokens that make an input and its target. HINT: more text")

    def check_all_ids(self, limit: int = 1 << 25) -> None:
        """As DataLoader.check_all_ids."""
        if sum(header.num_tokens for header in self._headers) <= limit:
            check_shards(self.paths, self.vocab_size)

    def _cuts(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (shard, first token, b, t) of each batch of all ranks, as far as the limit."""
        every = (
            (shard, first * self.T, b, t)
            for shard, header in enumerate(self._headers)
            for first, b, t in self._cuts_of(header.num_tokens - 1)
        )
        return itertools.islice(every, self.limit)

    def _cuts_of(self, pairs: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first row, b, t) of each batch of a shard."""
        rows, rest = divmod(pairs, self.T)
        for first in range(0, rows, self.B):
            yield first, min(self.B, rows - first), self.T
        if rest:
            yield rows, 1, rest

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        for shard, cuts in itertools.groupby(self._cuts_of_rank(), lambda cut: cut[0]):
            path, dtype = self.paths[shard], self._headers[shard].dtype
            with open_shard(path) as file:
                for _, position, b, t in cuts:
                    tokens = read_tokens(file, path, position, np.empty(b * t + 1, dtype), self.vocab_size)
                    yield tokens[:-1].astype(np.int32).reshape(b, t), tokens[1:].astype(np.int32).reshape(b, t)

    def _cuts_of_rank(self) -> Iterator[tuple[int, int, int, int]]:
        return itertools.islice(self._cuts(), self.rank, None, self.num_processes)
