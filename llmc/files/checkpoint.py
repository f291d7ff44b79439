"""llm.c's model, train-state and debug-state files, read and written byte for byte, and sets of them in a folder.

Every file is little-endian and starts with 256 int32 words h[0..255]; words without a meaning are 0. The three formats
and the set are one file because they share the header check, the chunked transfer and the atomic write.

model (magic 20240326)          state (magic 20240527)                 debug state (magic 20240327)
h[1]    version 3 fp32, 5 bf16  h[1]      version 1                    h[1]  version 2
h[2]    max_seq_len             h[2]      num_processes                h[2]  B
h[3]    vocab_size              h[3]      rank                         h[3]  T
h[4]    num_layers              h[4]      1: has master weights        x, y    int32 (B, T)
h[5]    num_heads               h[5]      1: loader shuffles           logits  fp32 (B, T, V)
h[6]    channels                h[10]     step = completed updates     loss    fp32
h[7]    padded_vocab_size       h[20:22]  u64 rng_state                grads   fp32 (N)
the 16 parameter tensors        h[22:24]  u64 rng_state_last_update
                                h[30:32]  u64 current_shard_idx
                                h[32:34]  u64 current_sample_idx
                                h[64:66]  u64 elements in m  (ours: llm.c ignores it and leaves 0)
                                h[66]     bytes of `extra`   (ours: llm.c ignores it and leaves 0)
                                m, v, [master]  fp32; [loader block if h[5]]; [extra: JSON that llm.c never reads]

Sources: llm.c train_gpt2.cu gpt2_write_to_checkpoint, gpt2_build_from_checkpoint, save_state, load_state,
write_checkpoint, delete_checkpoint; train_gpt2.py write_state; llmc/utils.h find_max_step.
"""

import contextlib
import errno
import json
import os
import re
import zlib

import numpy as np

from llmc.errors import UserError
from llmc.rand import MT19937

HEADER_BYTES = 1024
MODEL_MAGIC, DEBUG_MAGIC, STATE_MAGIC = 20240326, 20240327, 20240527
KINDS = {
    MODEL_MAGIC: "a GPT-2 model",
    DEBUG_MAGIC: "a debug state",
    STATE_MAGIC: "a train state",
    20240328: "a tokenizer",
    20240520: "a GPT-2 token shard",
    20240522: "an eval set",
    20240801: "a Llama-3 token shard",
    20240803: "a Llama-3 model",
}
FILE_DTYPES = {3: np.dtype(np.float32), 5: np.dtype(np.uint16)}  # model version -> element type; bf16 as its 16 bits
CHUNK = 4 << 20  # elements converted and moved at a time
MT19937_BYTES = 2520


# ---------------------------------------------------------------------------------------------------------------------
# files


def fsync_folder(folder):
    """Make renames and removals in `folder` survive a power cut."""
    fd = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot fsync a folder
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_write(path):
    """Yield a binary file that becomes `path` when the block ends: readers see the old file or all of the new one.

    The bytes go to a temporary file in the same folder, are fsynced and renamed over `path`; then the folder is
    fsynced. After an exception the temporary file is gone and an old `path` is untouched. OSError (disk full, not
    writable, no such folder) becomes UserError. A kill can leave the temporary file behind: see prune_stray.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
        fsync_folder(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. HINT: check that the folder exists, is writable and has "
            "free space; nothing half-written is left behind"
        ) from error


@contextlib.contextmanager
def open_checked(path, magic, versions):
    """Yield (file, header (256,) int32, size in bytes) of a readable file with this magic and one of these versions."""
    path, kind = os.fspath(path), KINDS[magic]
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = np.frombuffer(file.read(HEADER_BYTES), np.uint8)
            if header.size == 0:
                raise UserError(f"{path} is empty. HINT: {kind} was expected; a copy or download may have failed")
            word = int(header[:4].view(np.int32)[0]) if header.size >= 4 else None
            if word != magic:
                found = KINDS.get(word, f"not a file of llm.c (first word {word})")
                raise UserError(f"{path} is {found}, expected {kind} (magic {magic}). HINT: check the path")
            if header.size < HEADER_BYTES:
                raise UserError(
                    f"{path} is truncated: {size} bytes, a header takes {HEADER_BYTES}. HINT: copy it again"
                )
            header = header.view(np.int32)
            if header[1] not in versions:
                old = "this is an old layout of llm.c, its current train_gpt2.py writes the new one"
                raise UserError(
                    f"{path} is {kind} of version {header[1]}, only {' and '.join(map(str, versions))} can be read. "
                    f"HINT: {old if header[1] == 1 else 'the file is damaged or of a newer program'}"
                )
            yield file, header, size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. HINT: {kind} was expected there") from error


def check_size(path, size, expected, what):
    if size != expected:
        state = "truncated" if size < expected else "over-long"
        raise UserError(f"{path} is {state}: {size} bytes, {what} takes {expected}. HINT: copy or write it again")


def read_into(file, array):
    """Fill a flat array with the file's next bytes."""
    for i in range(0, array.size, CHUNK):
        part = array[i : i + CHUNK]
        if file.readinto(memoryview(part).cast("B")) != part.nbytes:
            raise UserError(f"{file.name} ended early. HINT: it was cut while it was read")


def write_from(file, array):
    for i in range(0, array.size, CHUNK):
        file.write(memoryview(array[i : i + CHUNK]).cast("B"))


def get_u64(header, word):
    return int(header[word : word + 2].view(np.uint64)[0])


def put_u64(header, word, value):
    header[word : word + 2].view(np.uint64)[0] = value


# ---------------------------------------------------------------------------------------------------------------------
# bf16 as uint16 bits


def bf16_to_fp32(bits):
    """uint16 bf16 bits -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values):
    """float32 -> uint16 bf16 bits, round to nearest even; NaN stays NaN (quiet, same sign), overflow becomes Inf."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def as_file_dtype(array):
    """The same memory as float32 or, for bf16 (ml_dtypes or uint16), as uint16."""
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    flat = array.ndim == 1 and array.flags.c_contiguous
    assert flat and array.dtype in FILE_DTYPES.values(), (array.shape, array.dtype)
    return array


def convert(values, dtype):
    if values.dtype == dtype:
        return values
    return bf16_to_fp32(values) if dtype == np.float32 else fp32_to_bf16(values)


# ---------------------------------------------------------------------------------------------------------------------
# model


MODEL_WORDS = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels", "padded_vocab_size")  # h[2..7]


def num_parameters(header):
    """Padded parameter count N = Vp*C + maxT*C + L*(12*C*C + 13*C) + 2*C of a model header."""
    C, L = header["channels"], header["num_layers"]
    return (header["padded_vocab_size"] + header["max_seq_len"]) * C + L * (12 * C * C + 13 * C) + 2 * C


def read_model_header(path):
    """Check a model file (magic, version, dims, exact size) -> dict of MODEL_WORDS and version.

    Errors: UserError for a file that is missing, empty, of another kind or version, truncated or over-long.
    """
    with open_checked(path, MODEL_MAGIC, (3, 5)) as (_, words, size):
        header = {name: int(words[2 + i]) for i, name in enumerate(MODEL_WORDS)}
        header["version"] = int(words[1])
    if (
        min(header.values()) <= 0
        or header["vocab_size"] > header["padded_vocab_size"]
        or header["channels"] % header["num_heads"] != 0
    ):
        raise UserError(f"{path} has an impossible header: {header}. HINT: the file is damaged")
    expected = HEADER_BYTES + num_parameters(header) * FILE_DTYPES[header["version"]].itemsize
    check_size(path, size, expected, f"this model in {'fp32' if header['version'] == 3 else 'bf16'}")
    return header


def read_model(path, params):
    """params (N,) float32, or bf16 as uint16 or ml_dtypes, written (=) from a model file -> its header.

    A bf16 file becomes fp32 exactly; an fp32 file becomes bf16 by rounding to nearest even. Errors: UserError as
    read_model_header, and when the file holds another number of parameters.
    """
    header = read_model_header(path)
    params = as_file_dtype(params)
    if num_parameters(header) != params.size:
        raise UserError(
            f"{path} holds {num_parameters(header)} parameters, the model has {params.size}. HINT: give the "
            "checkpoint of this model, or build the model from the checkpoint"
        )
    dtype = FILE_DTYPES[header["version"]]
    with open_checked(path, MODEL_MAGIC, (3, 5)) as (file, _, _):
        if dtype == params.dtype:
            read_into(file, params)
        else:
            buffer = np.empty(min(CHUNK, params.size), dtype)
            for i in range(0, params.size, CHUNK):
                part = buffer[: min(CHUNK, params.size - i)]
                read_into(file, part)
                params[i : i + CHUNK] = convert(part, params.dtype)
    return header


def write_model(path, header, params, version=3):
    """Write params (N,) float32 or bf16 (uint16 or ml_dtypes) as fp32 (version 3) or bf16 (version 5), atomically.

    header: dict of MODEL_WORDS. fp32 -> bf16 rounds to nearest even. llm.c has no version for fp16: train.py writes
    such a model as fp32, which holds the same numbers and reads back exactly. Errors: UserError when the disk is full.
    """
    params, dtype = as_file_dtype(params), FILE_DTYPES[version]
    assert params.size == num_parameters(header), (params.size, header)
    words = np.zeros(256, np.int32)
    words[:8] = [MODEL_MAGIC, version] + [header[name] for name in MODEL_WORDS]
    with atomic_write(path) as file:
        write_from(file, words)
        for i in range(0, params.size, CHUNK):
            write_from(file, convert(params[i : i + CHUNK], dtype))


def fingerprint(path):
    """[version, CRC-32 of 64 of its pages]: what tells the model files of two runs or steps apart."""
    crc, size = 0, os.path.getsize(path)
    with open(path, "rb") as file:
        version = int(np.frombuffer(file.read(8), np.int32)[1])
        for i in range(64):
            file.seek(i * size // 64 // 4096 * 4096)
            crc = zlib.crc32(file.read(4096), crc)
    return [version, crc]


# ---------------------------------------------------------------------------------------------------------------------
# train state


def write_state(
    path,
    *,
    num_processes,
    rank,
    step,
    rng_state,
    rng_state_last_update,
    m,
    v,
    master=None,
    loader_state=None,
    extra=None,
):
    """Write one rank's train state atomically. step = number of completed updates.

    m, v, master  (S,) float32, master None without master weights; S = N, or N / num_processes under ZeRO-1
    loader_state  dict of llmc.data.loader.DataLoader.state(), None for a loader at the start that does not shuffle
    extra         dict that JSON can hold, stored behind everything llm.c reads, as is loader_state["streams"]
    """
    loader = loader_state or dict(should_shuffle=False, current_shard_idx=0, current_sample_idx=0)
    if "streams" in loader:
        extra = (extra or {}) | dict(loader=loader["streams"])
    tail = json.dumps(extra).encode() if extra is not None else b""
    words = np.zeros(256, np.int32)
    words[:6] = [STATE_MAGIC, 1, num_processes, rank, master is not None, loader["should_shuffle"]]
    words[10] = step
    put_u64(words, 20, rng_state)
    put_u64(words, 22, rng_state_last_update)
    put_u64(words, 30, loader["current_shard_idx"])
    put_u64(words, 32, loader["current_sample_idx"])
    put_u64(words, 64, m.size)
    words[66] = len(tail)
    with atomic_write(path) as file:
        write_from(file, words)
        for values in (m, v) if master is None else (m, v, master):
            assert values.shape == m.shape and values.dtype == np.float32, (values.shape, m.shape, values.dtype)
            write_from(file, values)
        if loader["should_shuffle"]:
            shards = np.asarray(loader["shard_indices"], np.int32)
            samples = np.asarray(loader["intra_shard_indices"], np.int32)
            assert shards.size == loader["num_shards"] and samples.size == loader["shard_num_samples"], loader
            assert len(loader["mt19937"]) == MT19937_BYTES, len(loader["mt19937"])
            for array in (np.uint64([shards.size]), shards, np.uint64([samples.size]), samples):
                write_from(file, array)
            file.write(loader["mt19937"])
        file.write(tail)


def read_loader_block(file, start, end):
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
    return (*arrays, file.read(MT19937_BYTES)) if start + MT19937_BYTES == end else None


def read_state_header(path, sizes, *, num_processes=None, rank=None):
    """Check a state file (magic, version, processes, rank, exact size, loader block) -> dict, without reading m and v.

    sizes  the acceptable lengths of m: (S,), or (N, N // num_processes) where ZeRO is not known
    Returns num_parameters (the one of `sizes` that it is), num_processes, rank, step, rng_state,
    rng_state_last_update, use_master_weights, loader_state (as given to write_state; only its first three keys where
    the loader does not shuffle) and extra.
    Errors: UserError for a damaged file, one of other processes (None: any), or one of another model.
    """
    with open_checked(path, STATE_MAGIC, (1,)) as (file, words, size):
        state = dict(num_processes=int(words[2]), rank=int(words[3]), step=int(words[10]))
        state.update(rng_state=get_u64(words, 20), rng_state_last_update=get_u64(words, 22))
        state.update(use_master_weights=bool(words[4]))
        loader = dict(should_shuffle=bool(words[5]))
        loader.update(current_shard_idx=get_u64(words, 30), current_sample_idx=get_u64(words, 32))
        stored, extra_bytes = get_u64(words, 64), int(words[66])

        damaged = UserError(f"{path} has an impossible header or loader state. HINT: the file is damaged")
        if not (0 <= words[3] < words[2] and 0 <= words[4] <= 1 and 0 <= words[5] <= 1 and words[10] >= 0 <= words[66]):
            raise damaged
        for name, wanted in (("num_processes", num_processes), ("rank", rank)):
            if wanted is not None and state[name] != wanted:
                raise UserError(
                    f"{path} was written with {name} = {state[name]}, expected {wanted}. HINT: the states of a "
                    "checkpoint are of one run; copy them again"
                )
        if stored and stored not in sizes:
            raise UserError(
                f"{path} is for {stored} parameters, the model has {sizes[0]}. HINT: give the state of this model"
            )

        end = size - extra_bytes
        for count in (stored,) if stored else sizes:  # llm.c does not store the count: the size of the file must tell
            start = HEADER_BYTES + 4 * count * (3 if state["use_master_weights"] else 2)
            if loader["should_shuffle"]:
                block = read_loader_block(file, start, end)
            else:
                block = () if start == end else None
            if block is not None:
                break
        else:
            problem = "truncated or over-long" if stored else "truncated, over-long or for another model"
            raise UserError(
                f"{path} is {problem}: its {size} bytes are not a state of {stored or sizes[0]} parameters. "
                "HINT: copy or write it again"
            )
        state.update(num_parameters=count, loader_state=loader)
        if block:
            shards, samples, mt19937 = block
            loader.update(num_shards=shards.size, shard_indices=shards)
            loader.update(shard_num_samples=samples.size, intra_shard_indices=samples, mt19937=mt19937)
            permutations = all(np.array_equal(np.sort(a), np.arange(a.size)) for a in (shards, samples))
            # a sample index equal to the number of samples is legal: the next batch opens the next shard
            in_range = loader["current_shard_idx"] < shards.size and loader["current_sample_idx"] <= samples.size
            if not (permutations and in_range):
                raise damaged
        file.seek(end)
        try:
            if block:
                MT19937.from_bytes(loader["mt19937"])
            state["extra"] = json.loads(file.read()) if extra_bytes else None
            if state["extra"] and "loader" in state["extra"]:
                loader["streams"] = state["extra"].pop("loader")
        except ValueError:
            raise damaged from None
    return state


def read_state(path, m, v, master=None, *, num_processes=1, rank=0):
    """m, v (S,) float32, and master where it is not None, written (=) from a state file -> dict of read_state_header.

    A state with master weights read with master=None skips them. Errors: UserError as read_state_header, and when
    master is wanted but the state has none.
    """
    state = read_state_header(path, (m.size,), num_processes=num_processes, rank=rank)
    if master is not None and not state["use_master_weights"]:
        raise UserError(f"{path} has no master weights. HINT: resume with -w 0, as the run that wrote it")
    with open_checked(path, STATE_MAGIC, (1,)) as (file, _, _):
        for values in (m, v) if master is None else (m, v, master):
            assert values.shape == m.shape and values.dtype == np.float32, (values.shape, m.shape, values.dtype)
            read_into(file, values)
    return state


# ---------------------------------------------------------------------------------------------------------------------
# elastic resume: the states of P0 ranks, read by any number of ranks


def layer_sizes(specs):
    """Elements of each layer of each tensor, in checkpoint order; specs: gpt2.parameter_specs(config)."""
    return [spec.size // max(spec.layers, 1) for spec in specs for _ in range(max(spec.layers, 1))]


def read_state_elastic(folder, step, specs, m, v, master=None, *, num_processes=1, rank=0, zero_stage=0):
    """m, v, and master where it is not None, written (=) from the states of all ranks that wrote `step` -> dict.

    The states may be of any number of ranks P0, in llm.c's ZeRO-0 layout (each file holds all N elements) or its ZeRO-1
    layout (rank q holds the q-th of P0 equal parts of every layer of every tensor, one after the other in checkpoint
    order). m, v, master (S,) float32 get the layout of this run: S = N, or with zero_stage 1 the parts of `rank` of
    `num_processes`, S = N / num_processes. Only what is needed is read, layer by layer.

    Returns the dict of rank 0's read_state_header, plus zero_stage (of the states) and loader_states, the loader_state
    of each rank, for DataLoader.load_states. rng_state is rank 0's: ranks share the noise of stochastic rounding.
    Errors: UserError as read_state, for a missing file, for files that do not belong together, and for layers that are
    no multiple of the number of ranks.
    """
    sizes = layer_sizes(specs)
    P, N = num_processes if zero_stage else 1, sum(sizes)
    rank = rank if zero_stage else 0
    states = read_state_headers(folder, step, N)
    P0 = len(states) if states[0]["num_parameters"] < N else 1
    first = state_path(folder, step, 0)
    if master is not None and not states[0]["use_master_weights"]:
        raise UserError(f"{first} has no master weights. HINT: resume with -w 0, as the run that wrote it")
    for ranks, whose in ((P0, f"the {P0} ranks that wrote {first}"), (P, f"-z 1 with {P} ranks")):
        if any(n % ranks for n in sizes):
            n = next(n for n in sizes if n % ranks)
            raise UserError(f"a layer of {n} parameters cannot be shared by {whose}. HINT: -z 0, or fewer ranks")
    arrays = (m, v) if master is None else (m, v, master)
    for array in arrays:
        assert array.shape == (N // P,) and array.dtype == np.float32, (array.shape, array.dtype, N, P)
    for q in range(P0):
        with open_checked(state_path(folder, step, q), STATE_MAGIC, (1,)) as (file, _, _):
            for i, array in enumerate(arrays):
                at = 0  # of the layer, in the flat parameters
                for n in sizes:
                    start, end = max(rank * n // P, q * n // P0), min((rank + 1) * n // P, (q + 1) * n // P0)
                    if start < end:  # of the layer's elements, those that this rank wants and that one has
                        file.seek(HEADER_BYTES + 4 * (i * N // P0 + at // P0 + start - q * n // P0))
                        place = at // P + start - rank * n // P
                        read_into(file, array[place : place + end - start])
                    at += n
    return states[0] | dict(zero_stage=int(P0 > 1), loader_states=[state["loader_state"] for state in states])


def read_state_headers(folder, step, N):
    """read_state_header of every rank's state of `step` for a model of N parameters, which must belong together."""
    states, lengths, P0 = [], None, None
    while not states or len(states) < P0:
        rank, path = len(states), state_path(folder, step, len(states))
        if states and not os.path.exists(path):
            hint = "HINT: copy the states of all ranks into the folder"
            raise UserError(f"{path}: No such file, step {step} was written by {P0} ranks. {hint}")
        if not states:
            with open_checked(path, STATE_MAGIC, (1,)) as (_, words, _):
                lengths = (N, N // int(words[2])) if words[2] > 1 else (N,)
        state = read_state_header(path, lengths, num_processes=P0, rank=rank)
        P0, lengths = state["num_processes"], (state["num_parameters"],)
        if state["step"] != step:
            raise UserError(f"{path} is of step {state['step']}, not {step}. HINT: copy it again")
        if states and state["use_master_weights"] != states[0]["use_master_weights"]:
            raise UserError(f"{path} and the state of rank 0 are of different runs (-w). HINT: copy them again")
        states.append(state)
    return states


# ---------------------------------------------------------------------------------------------------------------------
# debug state


def write_debug_state(path, x, y, logits, loss, grads):
    """Write x, y (B, T) int32, logits (B, T, V) float32, loss, grads (N,) float32 in checkpoint order."""
    words = np.zeros(256, np.int32)
    words[:4] = [DEBUG_MAGIC, 2, *x.shape]
    with atomic_write(path) as file:
        write_from(file, words)
        for tokens in (x, y):
            write_from(file, np.ascontiguousarray(tokens, np.int32).reshape(-1))
        for values in (logits, loss, grads):
            write_from(file, np.ascontiguousarray(values, np.float32).reshape(-1))


def read_debug_state(path, header):
    """dict(x, y (B, T) int32, logits (B, T, V) float32, loss float, grads (N,) float32) for the model of `header`.

    The file holds neither V nor N: they come from the model's header. Errors: UserError.
    """
    with open_checked(path, DEBUG_MAGIC, (2,)) as (file, words, size):
        B, T, V, N = int(words[2]), int(words[3]), header["vocab_size"], num_parameters(header)
        if B < 1 or T < 1:
            raise UserError(f"{path} has an impossible header: B = {B}, T = {T}. HINT: the file is damaged")
        expected = HEADER_BYTES + 4 * (2 * B * T + B * T * V + 1 + N)
        check_size(path, size, expected, f"a debug state with B = {B}, T = {T} of this model")
        flat = [np.empty(n, t) for n, t in ((B * T, "i4"), (B * T, "i4"), (B * T * V, "f4"), (1, "f4"), (N, "f4"))]
        for values in flat:
            read_into(file, values)
    x, y, logits, loss, grads = flat
    return dict(x=x.reshape(B, T), y=y.reshape(B, T), logits=logits.reshape(B, T, V), loss=float(loss[0]), grads=grads)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoint sets: model_<step>.bin, state_<step>_<rank>.bin, and DONE_<step> once both are complete


def model_path(folder, step):
    return os.path.join(folder, f"model_{step:08d}.bin")


def state_path(folder, step, rank):
    return os.path.join(folder, f"state_{step:08d}_{rank:05d}.bin")


def done_path(folder, step):
    return os.path.join(folder, f"DONE_{step:08d}")


def list_folder(folder):
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}. HINT: give -o a folder that can be read") from error


def remove(path):
    try:
        os.remove(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror}. HINT: make its folder writable") from error


def checkpoint_steps(folder):
    """Steps that have a DONE marker, in rising order; none for a folder that does not exist."""
    return sorted(int(name[5:]) for name in list_folder(folder) if re.fullmatch(r"DONE_\d{8,}", name))


def save_checkpoint(folder, step, header, params, version, state, barrier=lambda: None):
    """Write the model (rank 0), every rank's state, and then the DONE marker (rank 0). All ranks call it.

    state: keyword arguments of write_state except step. barrier: waits for all ranks.
    A kill at any instant leaves either no marker for `step` or a complete checkpoint.
    """
    rank = state["rank"]
    if rank == 0 and os.path.exists(done_path(folder, step)):  # an old set is about to be replaced file by file
        remove(done_path(folder, step))
        fsync_folder(folder)
    barrier()
    if rank == 0:
        write_model(model_path(folder, step), header, params, version)
        state = state | dict(extra=(state.get("extra") or {}) | dict(model=fingerprint(model_path(folder, step))))
    write_state(state_path(folder, step, rank), step=step, **state)
    barrier()
    if rank == 0:
        with atomic_write(done_path(folder, step)):
            pass


def check_checkpoint(folder, step):
    """Check that the model and every rank's state of `step` are there, complete and belong together, or UserError."""
    path = model_path(folder, step)
    states = read_state_headers(folder, step, num_parameters(read_model_header(path)))
    stated, found = (states[0]["extra"] or {}).get("model"), fingerprint(path)
    if stated is not None and stated[0] == found[0] and stated != found:  # it may have been converted since
        raise UserError(
            f"{path} and {state_path(folder, step, 0)} are of different runs. HINT: copy both from the same checkpoint"
        )


def latest_checkpoint(folder):
    """The largest step with a DONE marker, None without any.

    Errors: UserError, naming the file, if a file of that step is missing or damaged; the hint names the newest older
    step that is intact. It never falls back by itself: that would train again over steps that were thought safe.
    """
    steps = checkpoint_steps(folder)
    if not steps:
        return None
    try:
        check_checkpoint(folder, steps[-1])
    except UserError as error:
        for step in reversed(steps[:-1]):
            with contextlib.suppress(UserError):
                check_checkpoint(folder, step)
                hint = f"step {step} is intact, to resume from it remove {done_path(folder, steps[-1])}"
                break
        else:
            hint = "no older checkpoint is intact"
        problem = str(error).split(" HINT: ")[0]
        raise UserError(f"checkpoint of step {steps[-1]}: {problem} HINT: {hint}") from error
    return steps[-1]


def delete_checkpoint(folder, step):
    """Remove the checkpoint of `step`: marker, model, states. A kill in between leaves no marker without its files."""
    remove(done_path(folder, step))
    fsync_folder(folder)
    remove(model_path(folder, step))
    for name in list_folder(folder):
        if re.fullmatch(rf"state_{step:08d}_\d{{5,}}\.bin", name):
            remove(os.path.join(folder, name))


def apply_retention(folder, step, keep, major):
    """After the checkpoint of `step`: of those up to it only the newest `keep` stay, and multiples of `major`.

    keep, major: -nk (0 keeps all), -nm (0: none is special). llm.c deletes step - nk * n alone, which leaves strays at
    the last step and after an interruption. Call it once more after resuming at `step`: the run may have been killed
    after the save and before the deletion.
    """
    past = [s for s in checkpoint_steps(folder) if s <= step]
    for old in past[:-keep] if keep > 0 else ():
        if not (major > 0 and old % major == 0):
            delete_checkpoint(folder, old)


def prune_stray(folder):
    """Remove what a killed run left: our temporary files, and sets without a marker older than the newest marker.

    A model file without a marker and without a state may have been kept on purpose: it stays. Call this at the start
    of a run that resumes, on rank 0, before any rank writes. Returns the removed names.
    """
    names, steps = list_folder(folder), checkpoint_steps(folder)
    ours = r"model_\d+\.bin|state_\d+_\d+\.bin|DONE_\d+|main\.log|metrics\.jsonl|nonfinite_\d+_\d+\.npz"
    temporary = rf"\.({ours})\.\d+\.tmp"
    stray = [name for name in names if re.fullmatch(temporary, name)]
    for state in names:
        match = re.fullmatch(r"state_(\d{8,})_\d{5,}\.bin", state)
        if match and steps and int(match[1]) < steps[-1] and int(match[1]) not in steps:
            model = f"model_{match[1]}.bin"
            stray += [model, state] if model in names and model not in stray else [state]
    for name in stray:
        remove(os.path.join(folder, name))
    return stray
