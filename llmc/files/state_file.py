"""llm.c's train-state file (magic 20240527), of one rank, read and written byte for byte.

    h[1]      version 1                    h[22:24]  u64 rng_state_last_update
    h[2]      num_processes                h[30:32]  u64 current_shard_idx
    h[3]      rank                         h[32:34]  u64 current_sample_idx
    h[4]      1: has master weights        h[64:66]  u64 elements in m   (ours: llm.c ignores it and leaves 0)
    h[5]      1: the loader shuffles       h[66]     bytes of `extra`    (ours: llm.c ignores it and leaves 0)
    h[10]     step = completed updates     then m, v, [master] fp32; [the loader's block if h[5]];
    h[20:22]  u64 rng_state                [extra: JSON that llm.c never reads]

The loader's block: u64 num_shards, int32 shard_indices, u64 shard_num_samples, int32 intra_shard_indices, MT19937.

Source: llm.c train_gpt2.cu save_state, load_state; train_gpt2.py write_state.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from llmc.errors import UserError
from llmc.files import io, parse
from llmc.files.io import HEADER_BYTES, STATE_MAGIC
from llmc.rand import MT19937

MT19937_BYTES = 2520
LONGEST_EXTRA = 1 << 30  # bytes; the shuffled samples of several streams are some MiB
AT_THE_START = dict(should_shuffle=False, current_shard_idx=0, current_sample_idx=0)


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Where one rank of a run is: all that its state file holds beside m, v and master.

    step           number of completed updates
    loader_state   dict of DataLoader.state(); only its first three keys where the loader does not shuffle
    extra          dict that JSON can hold, stored behind everything that llm.c reads; so is loader_state["streams"]
    use_master_weights, num_parameters   whether the file has master weights, and the length of m: a reader finds them
                   in the file, a writer takes them from the arrays
    """

    step: int
    rng_state: int
    rng_state_last_update: int
    num_processes: int = 1
    rank: int = 0
    loader_state: dict[str, Any] = dataclasses.field(default_factory=AT_THE_START.copy)
    extra: dict[str, Any] | None = None
    use_master_weights: bool = False
    num_parameters: int = 0


def write_state(path: io.Path, state: TrainState, arrays: Sequence[np.ndarray]) -> int:
    """Write one rank's train state atomically -> the CRC-32 of the file.

    Errors: UserError when the disk is full, and for a value that is not finite.
    arrays: (m, v), or (m, v, master) with master weights, (S,) float32 each; S = N, or N / num_processes under ZeRO-1.
    """
    loader, extra = state.loader_state, state.extra
    if "streams" in loader:
        extra = (extra or {}) | dict(loader=loader["streams"])
    tail = json.dumps(extra).encode() if extra is not None else b""
    words = np.zeros(256, np.int32)
    words[:6] = [STATE_MAGIC, 1, state.num_processes, state.rank, len(arrays) == 3, loader["should_shuffle"]]
    words[10] = state.step
    io.put_u64(words, 20, state.rng_state)
    io.put_u64(words, 22, state.rng_state_last_update)
    io.put_u64(words, 30, loader["current_shard_idx"])
    io.put_u64(words, 32, loader["current_sample_idx"])
    io.put_u64(words, 64, arrays[0].size)
    words[66] = len(tail)
    with io.atomic_write(path) as file:
        out = io.Checksum(file)
        io.write_from(out, words)
        for name, values in zip(("m", "v", "the master weights"), arrays, strict=False):
            check_array(values, arrays[0].size)
            bad = io.first_not_finite(values)
            if bad is not None:
                where = f"element {bad} of {name} is {values[bad]:g}"
                raise UserError(f"{path} is not written: {where}. HINT: go on from an earlier checkpoint")
            io.write_from(out, values)
        if loader["should_shuffle"]:
            shards = np.asarray(loader["shard_indices"], np.int32)
            samples = np.asarray(loader["intra_shard_indices"], np.int32)
            assert shards.size == loader["num_shards"] and samples.size == loader["shard_num_samples"], loader
            assert len(loader["mt19937"]) == MT19937_BYTES, len(loader["mt19937"])
            for array in (np.array([shards.size], np.uint64), shards, np.array([samples.size], np.uint64), samples):
                io.write_from(out, array)
            out.write(loader["mt19937"])
        out.write(tail)
    return out.crc


def check_array(values: np.ndarray, size: int) -> None:
    """Assert that m, v or master is flat, float32 and of this length."""
    assert values.shape == (size,) and values.dtype == np.float32, (values.shape, size, values.dtype)


def read_loader_block(file: BinaryIO, start: int, end: int) -> tuple[np.ndarray, np.ndarray, bytes] | None:
    """(shard_indices, intra_shard_indices, mt19937 bytes) of the loader block from byte `start` to `end`.

    None where no such block fits there: the file is cut, or m and v are not as long as `start` supposed.
    """
    arrays = []
    for _ in range(2):
        file.seek(start)
        count = int.from_bytes(file.read(8), "little")
        start += 8 + 4 * count
        if start > end:
            return None
        arrays.append(np.frombuffer(file.read(4 * count), np.int32).copy())
    return (arrays[0], arrays[1], file.read(MT19937_BYTES)) if start + MT19937_BYTES == end else None


def loader_of(block: tuple[np.ndarray, np.ndarray, bytes]) -> dict[str, Any]:
    """What a loader block adds to loader_state. Errors: ValueError where its numbers cannot be a loader's."""
    shards, samples, mt19937 = block
    if not all(np.array_equal(np.sort(a), np.arange(a.size)) for a in (shards, samples)):
        raise ValueError("the shuffled indices are no permutations")
    MT19937.from_bytes(mt19937)
    return dict(
        num_shards=shards.size, shard_indices=shards,
        shard_num_samples=samples.size, intra_shard_indices=samples, mt19937=mt19937,
    )  # fmt: skip


def read_extra(file: BinaryIO, path: io.Path) -> dict[str, Any]:
    """The JSON object at the end of a state file, from where the file is. Errors: UserError."""
    value = parse.json_of(file.read(), f"{path}: extra", longest=LONGEST_EXTRA)
    return parse.dictionary(value, f"{path}: extra")


def find_block(
    file: BinaryIO, end: int, counts: Sequence[int], arrays: int, shuffles: bool
) -> tuple[int, tuple[np.ndarray, np.ndarray, bytes] | None] | None:
    """(elements in m, the loader's block or None) for the one of `counts` with which the file ends at byte `end`."""
    for count in counts:
        start = HEADER_BYTES + 4 * count * arrays
        if shuffles:
            block = read_loader_block(file, start, end)
            if block is not None:
                return count, block
        elif start == end:
            return count, None
    return None


def read_state_header(
    path: io.Path, sizes: Sequence[int], *, num_processes: int | None = None, rank: int | None = None
) -> TrainState:
    """Check a state file (magic, version, processes, rank, exact size, loader block) without reading m and v.

    sizes: the acceptable lengths of m: (S,), or (N, N // num_processes) if it is not known whether ZeRO was on.
    Errors: UserError for a damaged file, one of other processes or another rank (None: any), or of another model.
    """
    with io.open_checked(path, STATE_MAGIC, (1,)) as (file, words, size):
        damaged = UserError(f"{path} has an impossible header or loader state. HINT: the file is damaged")
        if not (0 <= words[3] < words[2] and 0 <= words[4] <= 1 and 0 <= words[5] <= 1 and words[10] >= 0 <= words[66]):
            raise damaged
        found = dict(num_processes=int(words[2]), rank=int(words[3]))
        for name, wanted in (("num_processes", num_processes), ("rank", rank)):
            if wanted is not None and found[name] != wanted:
                raise UserError(
                    f"{path} was written with {name} = {found[name]}, expected {wanted}. HINT: the states of a "
                    "checkpoint are of one run; copy them again"
                )
        stored, extra_bytes = io.get_u64(words, 64), int(words[66])
        if stored and stored not in sizes:
            raise UserError(
                f"{path} is for {stored} parameters, the model has {sizes[0]}. HINT: give the state of this model"
            )
        # llm.c does not store the count; in its files it follows from the size of the file
        counts, end = (stored,) if stored else sizes, size - extra_bytes
        fitting = find_block(file, end, counts, 3 if words[4] else 2, bool(words[5]))
        if fitting is None:
            problem = "truncated or over-long" if stored else "truncated, over-long or for another model"
            raise UserError(
                f"{path} is {problem}: its {size} bytes are not a state of {stored or sizes[0]} parameters. "
                "HINT: copy or write it again"
            )
        count, block = fitting
        loader: dict[str, Any] = dict(should_shuffle=bool(words[5]))
        loader.update(current_shard_idx=io.get_u64(words, 30), current_sample_idx=io.get_u64(words, 32))
        try:
            if block:
                loader.update(loader_of(block))
            # a sample index equal to the number of samples is legal: the next batch opens the next shard
            if block and not (
                loader["current_shard_idx"] < loader["num_shards"]
                and loader["current_sample_idx"] <= loader["shard_num_samples"]
            ):
                raise damaged
        except ValueError:
            raise damaged from None
        file.seek(end)
        extra = read_extra(file, path) if extra_bytes else None
        if extra and "loader" in extra:
            loader["streams"] = parse.dictionary(extra.pop("loader"), f"{path}: extra.loader")
    return TrainState(
        **found, step=int(words[10]), rng_state=io.get_u64(words, 20), rng_state_last_update=io.get_u64(words, 22),
        use_master_weights=bool(words[4]), num_parameters=count, loader_state=loader, extra=extra,
    )  # fmt: skip


def read_state(path: io.Path, arrays: Sequence[np.ndarray], *, num_processes: int = 1, rank: int = 0) -> TrainState:
    """Write (=) arrays, (m, v) or (m, v, master) of (S,) float32, from a state file -> the rest of the file.

    Master weights that are not asked for are skipped. Errors: UserError as read_state_header, and when master is wanted
    but the state has none.
    """
    state = read_state_header(path, (arrays[0].size,), num_processes=num_processes, rank=rank)
    if len(arrays) == 3 and not state.use_master_weights:
        raise UserError(f"{path} has no master weights. HINT: resume with -w 0, as the run that wrote it")
    with io.open_checked(path, STATE_MAGIC, (1,)) as (file, _, _):
        for values in arrays:
            check_array(values, arrays[0].size)
            io.read_into(file, values)
    return state
