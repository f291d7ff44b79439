"""llmc/files: formats and checkpoints.

Files are built here by hand with struct from the documented layout, so that reader and writer are checked apart.
Checkpoints, which are sets of such files, are checked at every instant at which a run can die.
"""

import dataclasses
import errno
import itertools
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc import evaluate, export, generate, train
from llmc.data.shards import write_shard
from llmc.errors import UserError
from llmc.files import checkpoints, debug_state, io, model_file, state_file
from llmc.files.state_file import TrainState
from llmc.gpt2 import GPT2Config, parameter_specs
from llmc.rand import MT19937

HEADER = dict(max_seq_len=8, vocab_size=5, num_layers=2, num_heads=2, channels=4, padded_vocab_size=8)
# wte, wpe, then per layer ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb, then lnfw lnfb
N = 8 * 4 + 8 * 4 + 2 * (4 + 4 + 48 + 12 + 16 + 4 + 4 + 4 + 64 + 16 + 64 + 4) + 4 + 4
D12 = dict(max_seq_len=1024, vocab_size=50257, num_layers=12, num_heads=12, channels=768, padded_vocab_size=50304)


def words(*pairs):
    header = bytearray(1024)
    for index, value in pairs:
        struct.pack_into("<q" if value >= 1 << 31 else "<i", header, 4 * index, value)
    return bytes(header)


def model_words(version, header=HEADER, magic=20240326):
    return words((0, magic), (1, version), *((i + 2, value) for i, value in enumerate(header.values())))


def values(seed, n=N):
    return np.random.default_rng(seed).standard_normal(n, np.float32)


def torch_bf16(array):
    """Round-to-nearest-even bf16 bits by PyTorch."""
    return torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view(np.uint16)


def sparse(path, header, size):
    path.write_bytes(header)
    os.truncate(path, size)
    return path


def loader_state(seed=1, shards=3, samples=7):
    mt, rng = MT19937(seed), np.random.default_rng(seed)
    mt.random_u32s(100 + seed)
    return dict(
        should_shuffle=True,
        current_shard_idx=2,
        current_sample_idx=samples,  # legal: the next batch opens the next shard
        num_shards=shards,
        shard_indices=rng.permutation(shards).astype(np.int32),
        shard_num_samples=samples,
        intra_shard_indices=rng.permutation(samples).astype(np.int32),
        mt19937=mt.to_bytes(),
    )


def state_bytes(m, v, master=None, loader=None, num_processes=1, rank=0, step=17, ours=()):
    """A train-state file as llm.c writes it."""
    position = (loader["current_shard_idx"], loader["current_sample_idx"]) if loader else (1, 5)
    flags = (4, int(master is not None)), (5, int(loader is not None))
    rng = (20, 0x7EDCBA9876543210), (22, 0x7123456789ABCDEF)
    header = words(
        *((0, 20240527), (1, 1), (2, num_processes), (3, rank), *flags),
        *((10, step), *rng, (30, position[0]), (32, position[1]), *ours),
    )
    body = b"".join(struct.pack(f"<{a.size}f", *a.tolist()) for a in (m, v, master) if a is not None)
    if loader:
        for array in (loader["shard_indices"], loader["intra_shard_indices"]):
            body += struct.pack(f"<Q{array.size}i", array.size, *array.tolist())
        body += loader["mt19937"]
    return header + body


def save_state(path, **changes):
    """A state of step 17; changes: fields of TrainState, and m, v, master."""
    changes = {name: value for name, value in changes.items() if name != "loader_state" or value is not None}
    arrays = [changes.pop(name, array) for name, array in (("m", values(1)), ("v", values(2)), ("master", None))]
    state = dict(step=17, rng_state=0x7EDCBA9876543210, rng_state_last_update=0x7123456789ABCDEF) | changes
    state_file.write_state(path, state_file.TrainState(**state), [a for a in arrays if a is not None])


def assert_user_error(function, *parts):
    """One line with every part in it and a hint."""
    with pytest.raises(UserError) as info:
        function()
    message = str(info.value)
    assert "\n" not in message and "HINT: " in message, message
    assert all(str(part) in message for part in parts), message


# ---------------------------------------------------------------------------------------------------------------------
# atomic_write


def test_atomic_write_shows_nothing_before_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with io.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        (temporary,) = [p.name for p in tmp_path.iterdir() if p != path]
        assert re.fullmatch(rf"\.file\.{os.getpid()}-[0-9a-f]{{8}}\.tmp", temporary)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt, UserError])
def test_atomic_write_failure_leaves_the_old_file(tmp_path, exception):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(exception), io.atomic_write(path) as file:
        file.write(b"new")
        raise exception
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"


def test_atomic_write_order(tmp_path, monkeypatch):
    """Data reaches the disk before the rename, and the rename before the return."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), replace(old, new)))
    with io.atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_atomic_write_never_writes_through_what_is_there(tmp_path, monkeypatch):
    """A link under the temporary name, put there by somebody else, is an error; what it points to stays."""
    monkeypatch.setattr(io.secrets, "token_hex", lambda n: "known")
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / f".file.{os.getpid()}-known.tmp").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="cannot write .*file: File exists"), io.atomic_write(tmp_path / "file") as file:
        file.write(b"ours")
    assert (tmp_path / "theirs").read_bytes() == b"theirs" and not (tmp_path / "file").exists()


def test_atomic_write_where_a_folder_cannot_be_opened(tmp_path, monkeypatch):
    """As on Windows: the renames are then as durable as the system makes them."""

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(io.os, "open", refuse)
    with io.atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_atomic_write_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with io.atomic_write("file") as file:
        file.write(b"new")
    assert Path("file").read_bytes() == b"new"


def test_atomic_write_where_nothing_can_be_written(tmp_path):
    def write(path):
        with io.atomic_write(path) as file:
            file.write(b"x")

    (tmp_path / "folder").mkdir()
    assert_user_error(lambda: write(tmp_path / "none" / "file"), tmp_path / "none" / "file", "No such file")
    assert_user_error(lambda: write(tmp_path / "folder"), tmp_path / "folder", "directory")
    assert os.listdir(tmp_path) == ["folder"]


# ---------------------------------------------------------------------------------------------------------------------
# disk full


def full_disk_dev_full(path, monkeypatch):
    """The temporary file is /dev/full: write() itself fails with ENOSPC."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr(io, "create", lambda temporary: open("/dev/full", "wb"))


def full_disk_fsync(path, monkeypatch):
    """Delayed allocation: only fsync finds out."""

    def fsync(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    "fill, name",
    [
        (full_disk_dev_full, "model_00000040.bin"),
        (full_disk_dev_full, "state_00000040_00000.bin"),
        (full_disk_fsync, "model_00000040.bin"),
        (full_disk_fsync, "state_00000040_00000.bin"),
        (full_disk_fsync, "DONE_00000040"),
    ],
)
def test_disk_full_keeps_the_previous_checkpoint(tmp_path, monkeypatch, fill, name):
    arrays = values(1), values(2)
    checkpoints.save_checkpoint(tmp_path, HEADER, values(0), 3, TrainState(20, 1, 2), arrays)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    order = ["model_00000040.bin", "state_00000040_00000.bin", "DONE_00000040"]
    real = io.atomic_write

    def atomic_write(path):
        if Path(path).name == name:
            fill(Path(path), monkeypatch)
        return real(path)

    monkeypatch.setattr(io, "atomic_write", atomic_write)
    assert_user_error(
        lambda: checkpoints.save_checkpoint(tmp_path, HEADER, values(3), 3, TrainState(40, 1, 2), arrays),
        name,
        "No space left on device",
    )
    monkeypatch.undo()
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(after) == set(before) | set(order[: order.index(name)])
    assert all(after[name] == before[name] for name in before)
    assert checkpoints.latest_checkpoint(tmp_path) == 20


def test_file_size_limit(tmp_path):
    """A real limit of the operating system, met in the middle of a write."""
    path = tmp_path / "model.bin"
    model_file.write_model(path, HEADER, values(0))
    before = path.read_bytes()
    code = """if 1:
        import resource, sys
        import numpy as np
        from llmc.files import io, model_file
        header, N = eval(sys.argv[2]), int(sys.argv[3])
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            model_file.write_model(sys.argv[1], header, np.ones(N, np.float32))
        except ValueError as error:
            print(error)
    """
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, path, repr(HEADER), str(N)], cwd=root, capture_output=True, text=True, check=True
    )
    assert str(path) in done.stdout and "File too large" in done.stdout and done.stdout.count("\n") == 1, done.stdout
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# bf16


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_bf16_rounding_equals_torch(bits):
    array = np.array(bits, np.uint32).view(np.float32)
    ours, reference, nan = io.fp32_to_bf16(array), torch_bf16(array), np.isnan(array)
    assert np.array_equal(ours[~nan], reference[~nan])
    assert np.isnan(io.bf16_to_fp32(ours[nan])).all()


def test_bf16_rounding_cases():
    cases = {
        0x3F800000: 0x3F80, 0x3F808000: 0x3F80, 0x3F808001: 0x3F81, 0x3F818000: 0x3F82,  # ties go to even
        0x7F7FFFFF: 0x7F80, 0x7F800000: 0x7F80, 0xFF800000: 0xFF80, 0x80000000: 0x8000, 0x00000001: 0x0000,
        0x7F800001: 0x7FC0, 0x7FFFFFFF: 0x7FFF, 0xFFFFFFFF: 0xFFFF,  # NaN: neither Inf nor wrapped to 0
    }  # fmt: skip
    array = np.array(list(cases), np.uint32).view(np.float32)
    assert [hex(x) for x in io.fp32_to_bf16(array)] == [hex(x) for x in cases.values()]


def test_bf16_to_fp32_is_exact():
    bits = np.arange(1 << 16, dtype=np.uint16)
    reference = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(io.bf16_to_fp32(bits), reference, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# model files


@pytest.fixture(params=[1 << 22, 100])
def chunk(request, monkeypatch):
    """The usual chunk, and one that cuts these small files into pieces with a shorter last one."""
    monkeypatch.setattr(io, "CHUNK", request.param)


@pytest.mark.parametrize("version", [3, 5])
def test_model_bytes(tmp_path, version, chunk):
    params = values(0)
    body = params if version == 3 else torch_bf16(params)
    model_file.write_model(tmp_path / "model.bin", HEADER, params, version)
    assert (tmp_path / "model.bin").read_bytes() == model_words(version) + body.tobytes()


@pytest.mark.parametrize("version", [3, 5])
@pytest.mark.parametrize("dtype", ["float32", "uint16", "bfloat16"])
def test_model_read(tmp_path, version, dtype, chunk):
    path, params = tmp_path / "model.bin", values(0)
    path.write_bytes(model_words(version) + (params if version == 3 else torch_bf16(params)).tobytes())
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    read = np.zeros(N, dtype)
    assert model_file.read_model(path, read) == HEADER | dict(version=version)
    if read.dtype.itemsize == 2:
        assert np.array_equal(read.view(np.uint16), torch_bf16(params))
    else:
        reference = params if version == 3 else torch.from_numpy(params).bfloat16().float().numpy()
        assert np.array_equal(read, reference)


@pytest.mark.parametrize("version", [3, 5])
def test_model_written_from_bf16(tmp_path, version, chunk):
    bits = torch_bf16(values(0))
    body = bits if version == 5 else torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    model_file.write_model(tmp_path / "model.bin", HEADER, bits, version)
    assert (tmp_path / "model.bin").read_bytes() == model_words(version) + body.tobytes()


def test_model_file_sizes_of_gpt2(tmp_path):
    assert model_file.num_parameters(D12) == 124_475_904
    for version, size in ((3, 497_904_640), (5, 248_952_832)):  # the sizes of llm.c's gpt2_124M.bin, gpt2_124M_bf16.bin
        path = sparse(tmp_path / f"{version}.bin", model_words(version, D12), size)
        assert model_file.read_model_header(path) == D12 | dict(version=version)
        for wrong, state in ((size - 1, "truncated"), (size + 1, "over-long")):
            os.truncate(path, wrong)
            assert_user_error(lambda path=path: model_file.read_model_header(path), path, state, wrong, size)


def test_model_refused(tmp_path):
    path, good = tmp_path / "model.bin", model_words(3) + values(0).tobytes()

    def refuses(data, *parts):
        if data is not None:
            path.write_bytes(data)
        read = np.zeros(N, np.float32)
        assert_user_error(lambda: model_file.read_model(path, read), path, *parts)
        assert not read.any()

    refuses(None, "No such file")
    refuses(b"", "empty")
    refuses(b"ab", "not a file of llm.c")
    refuses(b"RIFF" + good[4:], "not a file of llm.c")
    refuses(good[:4], "truncated", 1024)
    refuses(good[:1023], "truncated", 1024)
    refuses(good[:1024], "truncated", len(good))
    refuses(good[:-1], "truncated", len(good))
    refuses(good + b"\0", "over-long", len(good))
    refuses(model_words(3, magic=20240527) + good[1024:], "a train state", "20240326")
    refuses(model_words(1) + good[1024:], "version 1", "old layout", "3 and 5")
    refuses(model_words(7) + good[1024:], "version 7", "3 and 5")
    for change in (dict(channels=0), dict(num_layers=-1), dict(vocab_size=9), dict(num_heads=3)):
        refuses(model_words(3, HEADER | change) + good[1024:], "impossible header", *change.values())
    model_file.write_model(path, HEADER | dict(max_seq_len=16), values(0, N + 32))
    refuses(None, N, N + 32)
    path.unlink()
    path.mkdir()
    refuses(None, "directory")


# ---------------------------------------------------------------------------------------------------------------------
# state files


def read_state(path, master=False, size=N, **kwargs):
    arrays = [np.zeros(size, np.float32) for _ in range(3 if master else 2)]
    return state_file.read_state(path, arrays, **kwargs), arrays


def assert_same_loader(ours, reference):
    assert ours.keys() == reference.keys()
    for key in reference:
        assert np.array_equal(ours[key], reference[key]), (key, ours[key], reference[key])


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_state_bytes(tmp_path, master, shuffle, chunk):
    """Ours equals llm.c's, but for the words that llm.c ignores; both are read back in full."""
    path, loader = tmp_path / "state.bin", loader_state() if shuffle else None
    arrays = [values(1), values(2), values(3)] if master else [values(1), values(2)]
    plain = dict(should_shuffle=False, current_shard_idx=1, current_sample_idx=5)
    save_state(path, master=arrays[2] if master else None, loader_state=loader or plain)
    assert path.read_bytes() == state_bytes(*arrays, loader=loader, ours=[(64, N)])
    for data in (path.read_bytes(), state_bytes(*arrays, loader=loader)):
        path.write_bytes(data)
        state, read = read_state(path, master)
        assert all(np.array_equal(a, b) for a, b in zip(read, arrays, strict=True))
        assert_same_loader(state.loader_state, loader or plain)
        assert dataclasses.replace(state, loader_state={}) == TrainState(
            step=17, rng_state=0x7EDCBA9876543210, rng_state_last_update=0x7123456789ABCDEF, num_processes=1, rank=0,
            loader_state={}, extra=None, use_master_weights=master, num_parameters=N,
        )  # fmt: skip


def test_state_rng_uses_all_64_bits(tmp_path):
    save_state(tmp_path / "state.bin", rng_state=2**64 - 1, rng_state_last_update=2**63)
    state, _ = read_state(tmp_path / "state.bin")
    assert (state.rng_state, state.rng_state_last_update) == (2**64 - 1, 2**63)


def test_state_loader_arrays_can_be_shuffled_on(tmp_path):
    save_state(tmp_path / "state.bin", loader_state=loader_state())
    state, _ = read_state(tmp_path / "state.bin")
    state.loader_state["shard_indices"][:] = 0
    state.loader_state["intra_shard_indices"][:] = 0


def test_state_master_weights_are_skipped_when_not_wanted(tmp_path):
    """llm.c reads the loader's state out of the master weights here."""
    path, loader = tmp_path / "state.bin", loader_state()
    for data in (state_bytes(values(1), values(2), values(3), loader), None):
        if data is None:
            save_state(path, master=values(3), loader_state=loader)
        else:
            path.write_bytes(data)
        state, (m, v) = read_state(path, master=False)
        assert np.array_equal(m, values(1)) and np.array_equal(v, values(2))
        assert_same_loader(state.loader_state, loader)


def test_state_without_master_weights_where_they_are_wanted(tmp_path):
    save_state(tmp_path / "state.bin")
    assert_user_error(lambda: read_state(tmp_path / "state.bin", master=True), "state.bin", "no master weights", "-w 0")


@pytest.mark.parametrize("shuffle", [False, True])
def test_state_extra(tmp_path, shuffle):
    path, loader = tmp_path / "state.bin", loader_state() if shuffle else None
    extra = dict(loss_window=[0.1, 1e300, -3.0], count=128)
    save_state(path, loader_state=loader, extra=extra)
    plain = state_bytes(values(1), values(2), loader=loader)
    assert path.read_bytes()[1024 : len(plain)] == plain[1024:]  # llm.c finds all it reads in its place
    assert read_state(path)[0].extra == extra


def test_state_size_of_gpt2(tmp_path):
    size, N = 1_493_711_872, 124_475_904
    path = sparse(tmp_path / "state.bin", words((0, 20240527), (1, 1), (2, 1), (4, 1)), size)
    assert state_file.read_state_header(path, (N,)).num_parameters == N
    assert_user_error(lambda: state_file.read_state_header(path, (N + 1,)), path, size, N + 1)


@pytest.mark.parametrize("written_by", ["llmc", "llm.c"])
def test_state_of_a_shard_of_the_parameters(tmp_path, written_by):
    """ZeRO-1 or not: the file's size tells, or the count that llmc stores."""
    path, loader = tmp_path / "state.bin", loader_state()
    for S in (N, N // 2):
        arrays = dict(m=values(1, S), v=values(2, S))
        if written_by == "llmc":
            save_state(path, **arrays, loader_state=loader, num_processes=2, rank=1)
        else:
            path.write_bytes(state_bytes(**arrays, loader=loader, num_processes=2, rank=1))
        assert state_file.read_state_header(path, (N, N // 2)).num_parameters == S
        state, (m, _) = read_state(path, size=S, num_processes=2, rank=1)
        assert state.rank == 1 and np.array_equal(m, values(1, S))


@pytest.mark.parametrize("shuffle", [False, True])
def test_state_refused(tmp_path, shuffle):
    path = tmp_path / "state.bin"
    loader = loader_state() if shuffle else None
    good = state_bytes(values(1), values(2), loader=loader)
    ours = state_bytes(values(1), values(2), loader=loader, ours=[(64, N)])

    def refuses(data, *parts, **kwargs):
        if data is not None:
            path.write_bytes(data)
        assert_user_error(lambda: read_state(path, **kwargs), path, *parts)

    def with_words(*pairs):
        data = bytearray(good)
        for index, value in pairs:
            struct.pack_into("<i", data, 4 * index, value)
        return bytes(data)

    refuses(None, "No such file")
    refuses(b"", "empty")
    refuses(with_words((0, 20240326)), "a GPT-2 model", "20240527")
    refuses(with_words((1, 2)), "version 2")
    refuses(good[:500], "truncated")
    for data, problem in ((good, "truncated, over-long or for another model"), (ours, "truncated or over-long")):
        for cut in (data[:1024], data[:-1], data[:-2521], data + b"\0", data + bytes(4096)):
            refuses(cut, problem, len(cut))
    refuses(ours, N, N + 1, size=N + 1)
    refuses(good, "another model", N + 1, size=N + 1)
    refuses(state_bytes(values(1), values(2), num_processes=4), "num_processes = 4", "expected 2", num_processes=2)
    two = state_bytes(values(1), values(2), num_processes=2)
    refuses(two, "rank = 0", "expected 1", num_processes=2, rank=1)
    for pair in ((2, 0), (3, 1), (3, -1), (4, 2), (5, 2), (10, -1), (66, -1)):
        refuses(with_words(pair), "damaged")
    if shuffle:
        refuses(with_words((30, 3)), "damaged")
        refuses(with_words((32, 8)), "damaged")
        refuses(state_bytes(values(1), values(2), loader=loader | dict(shard_indices=np.array([0, 0, 2]))), "damaged")
        refuses(state_bytes(values(1), values(2), loader=loader | dict(mt19937=bytes(2520))), "damaged")
    save_state(path, loader_state=loader, extra=dict(a=1))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    refuses(None, "extra is not JSON")


# ---------------------------------------------------------------------------------------------------------------------
# elastic resume

SPECS = parameter_specs(GPT2Config(**HEADER))
LAYERED = [(1, 32), (1, 32)] + [(2, n) for n in (4, 4, 48, 12, 16, 4, 4, 4, 64, 16, 64, 4)] + [(1, 4)] * 2


def shard(flat, P, r):
    """Rank r's part in llm.c's ZeRO-1 layout: of each layer of each tensor the r-th of P parts."""
    parts, at = [], 0
    for layers, n in LAYERED:
        parts.append(flat[at : at + layers * n].reshape(layers, P, n // P)[:, r].reshape(-1))
        at += layers * n
    assert at == flat.size == N
    return np.concatenate(parts)


def write_set(folder, P, zero, master, ours=False):
    """The states of P ranks, as llm.c writes them; rank r is at sample r of its loader."""
    folder.mkdir()
    for r in range(P):
        arrays = [shard(a, P, r) if zero else a for a in (values(1), values(2), *([values(3)] if master else ()))]
        loader = loader_state(seed=r + 1) | dict(current_sample_idx=r)
        words = [(64, arrays[0].size)] if ours else ()
        data = state_bytes(*arrays, loader=loader, num_processes=P, rank=r, ours=words)
        (folder / f"state_00000017_{r:05d}.bin").write_bytes(data)


def read_elastic(folder, P=1, rank=0, zero=0, master=False, step=17):
    arrays = [np.full(N // P if zero else N, np.nan, np.float32) for _ in range(2 + master)]
    where = dict(num_processes=P, rank=rank, zero_stage=zero)
    return checkpoints.read_state_elastic(folder, step, SPECS, arrays, **where), arrays


@pytest.mark.parametrize("P0, zero0", [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1)])
def test_elastic_any_ranks_to_any_ranks(tmp_path, P0, zero0, chunk):
    """From and to 1, 2, 4 ranks, ZeRO 0 and 1, -w 1 read with -w 1 and -w 0, -w 0 with -w 0."""
    for saved_master in (False, True):
        folder = tmp_path / str(saved_master)
        write_set(folder, P0, zero0, saved_master, ours=saved_master)
        for P, zero, master in itertools.product((1, 2, 4), (0, 1), {False, saved_master}):
            for r in range(P):
                states, arrays = read_elastic(folder, P, r, zero, master)
                for seed, array in enumerate(arrays, 1):
                    expected = shard(values(seed), P, r) if zero else values(seed)
                    assert np.array_equal(array, expected), (P, zero, r, seed)
                assert [state.rank for state in states] == list(range(P0))
                for q, state in enumerate(states):
                    assert state.num_parameters == (N // P0 if zero0 else N)
                    assert state.step == 17 and state.num_processes == P0 and state.rng_state == 0x7EDCBA9876543210
                    assert_same_loader(state.loader_state, loader_state(seed=q + 1) | dict(current_sample_idx=q))


def test_elastic_what_our_ranks_write(tmp_path):
    """save_checkpoint of four ZeRO-1 ranks, one after the other; then read by two."""
    crcs = [0] * 4

    def share(number):
        crcs[r] = number
        return crcs

    for r in (1, 2, 3, 0):
        state, arrays = TrainState(17, 5, 4, num_processes=4, rank=r), (shard(values(1), 4, r), shard(values(2), 4, r))
        checkpoints.save_checkpoint(tmp_path, HEADER, values(3), 3, state, arrays, share)
    checkpoints.check_checkpoint(tmp_path, 17)
    for r in range(2):
        _, (m, v) = read_elastic(tmp_path, 2, r, 1)
        assert np.array_equal(m, shard(values(1), 2, r)) and np.array_equal(v, shard(values(2), 2, r))


def test_elastic_refused(tmp_path):
    folder = tmp_path / "set"

    def refuses(*parts, **kwargs):
        assert_user_error(lambda: read_elastic(folder, **kwargs), *parts)

    refuses("state_00000017_00000.bin", "No such file")
    write_set(folder, 4, 1, False)
    refuses("state_00000017_00000.bin", "no master weights", "-w 0", master=True)
    refuses("a layer of 32 parameters", "-z 1 with 3 ranks", P=3, zero=1)
    good = (folder / "state_00000017_00002.bin").read_bytes()

    def with_word(index, value):
        data = bytearray(good)
        struct.pack_into("<i", data, 4 * index, value)
        return data

    path = folder / "state_00000017_00002.bin"
    for data, *parts in (
        (with_word(10, 18), "is of step 18"),
        (with_word(2, 8), "num_processes = 8", "expected 4"),
        (with_word(3, 1), "rank = 1", "expected 2"),
        (good[:-3000], "truncated"),
    ):
        path.write_bytes(data)
        refuses(path, *parts)
    write_set(tmp_path / "other", 4, 1, True)
    path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    refuses(path, "different runs")
    write_set(tmp_path / "whole", 4, 0, False)
    path.write_bytes((tmp_path / "whole" / path.name).read_bytes())
    refuses(path, "truncated, over-long or for another model")
    path.unlink()
    refuses(path, "No such file", "written by 4 ranks")


def test_elastic_reads_only_what_it_needs(tmp_path, monkeypatch):
    write_set(tmp_path / "set", 4, 1, True)
    read = []
    monkeypatch.setattr(io, "read_into", lambda file, array: read.append(array.nbytes))
    read_elastic(tmp_path / "set", 4, 1, 1)
    assert sum(read) == 2 * N // 4 * 4


def test_model_and_state_of_different_runs(tmp_path):
    """Each file is whole, the steps are equal; the weights are not those that the state was saved with."""
    for name, seed in (("a", 1), ("b", 9)):
        (tmp_path / name).mkdir()
        arrays = values(1), values(2)
        checkpoints.save_checkpoint(tmp_path / name, HEADER, values(seed), 3, TrainState(17, 5, 4), arrays)
        checkpoints.check_checkpoint(tmp_path / name, 17)
        (tmp_path / name / "DONE_00000017").write_bytes(b"")  # as before there were checksums
    os.replace(tmp_path / "a" / "model_00000017.bin", tmp_path / "b" / "model_00000017.bin")
    assert_user_error(lambda: checkpoints.check_checkpoint(tmp_path / "b", 17), "model_00000017.bin", "different runs")


# ---------------------------------------------------------------------------------------------------------------------
# debug state


def test_debug_state_bytes(tmp_path):
    path, B, T, V = tmp_path / "debug.bin", 2, 3, HEADER["vocab_size"]
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, V, (2, B, T), np.int32)
    logits, loss, grads = values(1, B * T * V).reshape(B, T, V), 1.25, values(2)
    header = words((0, 20240327), (1, 2), (2, B), (3, T))
    reference = header + b"".join(a.tobytes() for a in (x, y, logits, np.float32([loss]), grads))
    debug_state.write_debug_state(path, x, y, logits, loss, grads)
    assert path.read_bytes() == reference
    state = debug_state.read_debug_state(path, HEADER)
    assert state["loss"] == loss
    for name, array in (("x", x), ("y", y), ("logits", logits), ("grads", grads)):
        assert np.array_equal(state[name], array) and state[name].dtype == array.dtype, name
    path.write_bytes(reference[:-4])
    assert_user_error(lambda: debug_state.read_debug_state(path, HEADER), path, "truncated", len(reference))
    path.write_bytes(words((0, 20240327), (1, 1), (2, B), (3, T)) + reference[1024:])
    assert_user_error(lambda: debug_state.read_debug_state(path, HEADER), path, "version 1", "old layout")
    path.write_bytes(words((0, 20240327), (1, 2), (2, B)) + reference[1024:])
    assert_user_error(lambda: debug_state.read_debug_state(path, HEADER), path, "T = 0")


def test_debug_state_size_of_gpt2(tmp_path):
    path = sparse(tmp_path / "debug.bin", words((0, 20240327), (1, 2), (2, 4), (3, 64)), 549_369_861)
    assert_user_error(lambda: debug_state.read_debug_state(path, D12), "over-long", 549_369_860)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoint sets


def save(folder, step, ranks=1, barrier=lambda: None):
    """A checkpoint whose every number depends on the step. Ranks run one after the other, rank 0 last."""
    numbers = {}

    def share(number):
        barrier()
        numbers[rank] = number
        return [numbers.get(r) for r in range(ranks)]

    for rank in reversed(range(ranks)):
        state = TrainState(step, step, step + 1, ranks, rank, loader_state(step))
        arrays = [np.full(N, step + more, np.float32) for more in (rank, 0.25, 0.5)]
        checkpoints.save_checkpoint(folder, HEADER, np.full(N, step, np.float32), 3, state, arrays, share)


def assert_whole(folder, step):
    params, m, v, master = (np.empty(N, np.float32) for _ in range(4))
    model_file.read_model(checkpoints.model_path(folder, step), params)
    state = state_file.read_state(checkpoints.state_path(folder, step, 0), (m, v, master))
    for array, value in ((params, step), (m, step), (v, step + 0.25), (master, step + 0.5)):
        assert (array == value).all(), (step, array, value)
    assert state.step == state.rng_state == step
    assert_same_loader(state.loader_state, loader_state(step))


def test_checkpoint_names_and_order(tmp_path, monkeypatch):
    """Model, state, barrier, marker: by llm.c's names."""
    events = []
    monkeypatch.setattr(
        os, "replace", lambda a, b, real=os.replace: (events.append(os.path.basename(b)), real(a, b))[1]
    )
    save(tmp_path, 20, barrier=lambda: events.append("barrier"))
    names = ["model_00000020.bin", "state_00000020_00000.bin", "DONE_00000020"]
    assert events == ["barrier", *names[:2], "barrier", names[2]]
    save(tmp_path, 20, barrier=lambda: events.append("barrier"))
    assert events[5:] == ["barrier", "barrier", "barrier", *names[:2], "barrier", names[2]]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    lines = [(zlib.crc32(data), len(data), name) for name in names[:2] for data in [(tmp_path / name).read_bytes()]]
    text = "".join(f"{crc:08x} {size} {name}\n" for crc, size, name in lines)
    assert (tmp_path / names[2]).read_text() == text + f"{zlib.crc32(text.encode()):08x} DONE\n"
    assert_whole(tmp_path, 20)


def test_saving_over_an_old_checkpoint_removes_its_marker_first(tmp_path, monkeypatch):
    save(tmp_path, 20)

    def write_model(*_):
        assert checkpoints.checkpoint_steps(tmp_path) == []
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_model", write_model)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 20)


def test_latest_checkpoint(tmp_path):
    assert checkpoints.latest_checkpoint(tmp_path / "none") is None
    assert checkpoints.latest_checkpoint(tmp_path) is None
    (tmp_path / "DONE_x").touch()
    (tmp_path / "model_00000099.bin").touch()
    for step in (20, 100, 40):
        save(tmp_path, step, ranks=2)
    assert checkpoints.latest_checkpoint(tmp_path) == 100
    assert checkpoints.checkpoint_steps(tmp_path) == [20, 40, 100]


def test_latest_checkpoint_damaged(tmp_path):
    for step in (20, 40, 60, 80):
        save(tmp_path, step, ranks=2)
    (tmp_path / "state_00000060_00001.bin").unlink()
    for name in ("model_00000080.bin", "state_00000080_00000.bin", "state_00000080_00001.bin"):
        path = tmp_path / name
        data = path.read_bytes()
        for damaged in (data[:-1], data[:1024], data + b"\0", b""):
            path.write_bytes(damaged)
            assert_user_error(
                lambda: checkpoints.latest_checkpoint(tmp_path), name, "step 40 is", "remove", "DONE_00000080"
            )
        path.unlink()
        assert_user_error(lambda: checkpoints.latest_checkpoint(tmp_path), name, "No such file", "step 40 is intact")
        path.write_bytes(data)
    (tmp_path / "DONE_00000080").write_bytes(b"")
    (tmp_path / "state_00000080_00000.bin").write_bytes((tmp_path / "state_00000040_00000.bin").read_bytes())
    assert_user_error(lambda: checkpoints.latest_checkpoint(tmp_path), "of step 40")
    for step in (20, 40):
        (tmp_path / f"model_{step:08d}.bin").unlink()
    assert_user_error(lambda: checkpoints.latest_checkpoint(tmp_path), "no older checkpoint is intact")


def flips(folder, count, seed):
    """(path, its bytes with one bit turned) at seeded places over all files of a folder, as if they were one."""
    rng, files = random.Random(seed), sorted(folder.iterdir())
    ends = list(itertools.accumulate(path.stat().st_size for path in files))
    for _ in range(count):
        at = rng.randrange(ends[-1])
        i = next(i for i, end in enumerate(ends) if at < end)
        data = bytearray(files[i].read_bytes())
        data[at - ends[i]] ^= 1 << rng.randrange(8)
        yield files[i], bytes(data)


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.full)])
def test_every_flipped_bit_is_named(tmp_path, count):
    """Of the model, of each rank's state and of the marker; what generates and evaluates reads the model's alone."""
    save(tmp_path, 20, ranks=2)
    assert checkpoints.check_bits(tmp_path, 20) and checkpoints.latest_checkpoint(tmp_path) == 20
    marker = [(tmp_path / "DONE_00000020", data) for data in (b"x", b"\n", b"\xff" * 99)]
    for path, data in [*flips(tmp_path, count, seed=count), *marker]:
        good = path.read_bytes()
        path.write_bytes(data)
        assert_user_error(lambda: checkpoints.latest_checkpoint(tmp_path), f"checkpoint of step 20: {path} is ")
        if path.name.startswith("state_") and len(data) - data.index(b"{") < 10:
            assert checkpoints.latest_checkpoint(tmp_path, states=False) == 20
        path.write_bytes(good)
    assert checkpoints.latest_checkpoint(tmp_path) == 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with shards of letters and a run of two processes' worth of checkpoints, steps 1 and 2."""
    folder = tmp_path_factory.mktemp("trained")
    for seed, name in enumerate(("letters.bin", "others.bin")):
        steps = np.random.default_rng(seed).integers(-2, 4, 2000)
        write_shard(folder / name, (97 + np.cumsum(steps) % 26).astype(np.uint16), 257)
    assert train.main([*train_flags(folder), "-n", "1", "-x", "2"]) == 0
    return folder


def train_flags(folder, run="run"):
    shards = [str(folder / name) for name in ("letters.bin", "others.bin")]
    where = ["-i", shards[0], "-j", shards[1], "-o", str(folder / run), "--device", "cpu", "--threads", "1"]
    return [*where, "-e", "tiny:d1", "-b", "2", "-t", "32", "-v", "0", "-s", "0"]


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.full)])
def test_commands_name_the_flipped_bit(trained, tmp_path, capsys, count):
    """-y 1 and --verify, of a bit in any file; generate and export, of one in the model or the marker."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    for path in run.iterdir():
        if "00000002" not in path.name:
            path.unlink()
    before = sorted(os.listdir(run))
    prompt = ["--device", "cpu", "-g", "2"]
    for path, data in flips(run, count, seed=1000 + count):
        good = path.read_bytes()
        path.write_bytes(data)
        flags = [*train_flags(trained), "-o", str(run)]
        commands = [(train.main, [*flags, "-y", "1", "-x", "3"]), (evaluate.main, ["--verify", str(run)])]
        if not path.name.startswith("state_"):
            commands += [(generate.main, [str(run), *prompt]), (export.main, [str(run), str(tmp_path / "out")])]
            commands += [(generate.main, [str(run / "model_00000002.bin"), *prompt])]
        for main, argv in commands:
            capsys.readouterr()
            assert main(argv) == 2, (path, argv)
            out, err = capsys.readouterr()
            assert err.count("\n") == 1 and f"{path} is " in err, err
        path.write_bytes(good)
        assert sorted(os.listdir(run)) == before and not (tmp_path / "out").exists()


def test_verify_says_what_is_known(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    assert evaluate.main([str(tmp_path / "run"), "--verify"]) == 0
    assert capsys.readouterr().out == "step 1: every bit is as it was written\nstep 2: every bit is as it was written\n"
    (tmp_path / "run" / "DONE_00000002").write_bytes(b"")
    assert evaluate.main([str(tmp_path / "run"), "--verify"]) == 0
    assert "step 2: its bits are unchecked, as DONE_00000002 is empty\n" in capsys.readouterr().out
    assert train.main([*train_flags(trained), "-o", str(tmp_path / "run"), "-y", "1", "-x", "3"]) == 0
    out = capsys.readouterr().out
    assert re.search("resuming from step 2 in .*run; its bits are unchecked, as DONE_00000002 is empty", out)
    (tmp_path / "run" / "model_00000001.bin").unlink()
    assert evaluate.main([str(tmp_path / "run"), "--verify"]) == 2
    out, err = capsys.readouterr()
    assert "step 1: cannot read" in out and "model_00000001.bin: No such file" in err and err.count("\n") == 1
    assert evaluate.main([str(tmp_path), "--verify"]) == 2 and "no finished checkpoint" in capsys.readouterr().err


def test_a_marker_without_checksums_is_accepted(tmp_path):
    """llm.c's, and those of earlier runs: whole is all that is known."""
    save(tmp_path, 20, ranks=2)
    (tmp_path / "DONE_00000020").write_bytes(b"")
    path = tmp_path / "state_00000020_00001.bin"
    data = bytearray(path.read_bytes())
    data[1024] ^= 1
    path.write_bytes(data)
    assert not checkpoints.check_bits(tmp_path, 20) and checkpoints.latest_checkpoint(tmp_path) == 20


@pytest.mark.parametrize("where", ["model", "m", "v", "master"])
def test_what_is_not_finite_has_no_marker(tmp_path, where):
    """Nor does it take the place of the last good set, which -nk 1 would let go."""
    save(tmp_path, 20)
    params, arrays = np.full(N, 1, np.float32), [np.full(N, 1, np.float32) for _ in range(3)]
    target = dict(zip(("m", "v", "master"), arrays, strict=True)).get(where, params)
    target[N - 1] = np.inf
    target[100] = np.nan
    name = {"model": "h[0].qkvw[5, 0] is nan", "master": "element 100 of the master weights is nan"}.get(
        where, f"element 100 of {where} is nan"
    )
    file = "model_00000040.bin" if where == "model" else "state_00000040_00000.bin"

    def save_again(step):
        checkpoints.save_checkpoint(tmp_path, HEADER, params, 3, TrainState(step, 1, 2), arrays)

    assert_user_error(lambda: save_again(40), file, name)
    assert_user_error(lambda: save_again(20), "step 20", "not replaced")
    assert checkpoints.latest_checkpoint(tmp_path) == 20
    assert_whole(tmp_path, 20)


def test_delete_checkpoint(tmp_path, monkeypatch):
    for step in (20, 40):
        save(tmp_path, step, ranks=2)
    removed = []
    monkeypatch.setattr(os, "remove", lambda p, real=os.remove: (removed.append(os.path.basename(p)), real(p))[1])
    checkpoints.delete_checkpoint(tmp_path, 20)
    checkpoints.delete_checkpoint(tmp_path, 30)
    assert removed[0] == "DONE_00000020"
    assert {int(name.split("_")[1].split(".")[0]) for name in os.listdir(tmp_path)} == {40}
    assert checkpoints.latest_checkpoint(tmp_path) == 40


@pytest.mark.parametrize(
    "keep, major, kept",
    [
        (0, 0, [0, 20, 40, 60, 80, 100, 110]),
        (1, 0, [110]),  # llm.c would look for 110 - 20 = 90, which was never written, and leave 100 too
        (2, 0, [100, 110]),
        (1, 40, [0, 40, 80, 110]),
        (9, 0, [0, 20, 40, 60, 80, 100, 110]),
    ],
)
def test_retention(tmp_path, keep, major, kept):
    for step in (0, 20, 40, 60, 80, 100, 110):
        (tmp_path / f"DONE_{step:08d}").touch()
        checkpoints.apply_retention(tmp_path, step, keep, major)
    assert checkpoints.checkpoint_steps(tmp_path) == kept


def test_retention_spares_the_last_set_that_is_known_to_be_good(tmp_path):
    """Of the newer ones, one is of llm.c and one has a damaged marker."""
    for step in (20, 40, 60, 80):
        save(tmp_path, step)
    (tmp_path / "DONE_00000060").write_bytes(b"damaged")
    (tmp_path / "DONE_00000080").write_bytes(b"")
    checkpoints.apply_retention(tmp_path, 80, 1, 0)
    assert checkpoints.checkpoint_steps(tmp_path) == [40, 80]
    assert_whole(tmp_path, 40)
    save(tmp_path, 100)
    checkpoints.apply_retention(tmp_path, 100, 1, 0)
    assert checkpoints.checkpoint_steps(tmp_path) == [100]


def test_prune_stray(tmp_path):
    for step in (20, 40, 60, 80):
        save(tmp_path, step, ranks=2)
    (tmp_path / "DONE_00000040").unlink()  # a deletion or an overwriting was killed
    (tmp_path / "DONE_00000080").unlink()  # newer than the newest marker: about to be written again
    stray = {"model_00000040.bin", "state_00000040_00000.bin", "state_00000040_00001.bin"}
    for name in (".model_00000060.bin.123.tmp", ".main.log.9.tmp", ".DONE_00000080.1.tmp", "state_00000020_00001.bin"):
        (tmp_path / name).touch()
    stray |= {name for name in os.listdir(tmp_path) if name.endswith(".tmp")}
    kept = {"model_00000030.bin", "notes.txt", "main.log", ".mine.tmp"}  # a model alone may be there on purpose
    for name in kept:
        (tmp_path / name).touch()
    before = set(os.listdir(tmp_path))
    assert set(checkpoints.prune_stray(tmp_path)) == stray
    assert set(os.listdir(tmp_path)) == before - stray
    assert checkpoints.prune_stray(tmp_path) == checkpoints.prune_stray(tmp_path / "none") == []


def run(folder):
    """A run that saves every 20 steps up to 80 and keeps one, after resuming where the folder says."""
    checkpoints.prune_stray(folder)
    latest = checkpoints.latest_checkpoint(folder)
    if latest is not None:
        assert_whole(folder, latest)
        checkpoints.apply_retention(folder, latest, 1, 60)
    for step in range((latest or 0) + 20, 81, 20):
        save(folder, step)
        checkpoints.apply_retention(folder, step, 1, 60)


def test_killed_at_every_file_operation(tmp_path, monkeypatch):
    """After the death at operation k of every operation that touches the disk, the folder resumes to the same files."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # thousands of them take long on a busy disk
    (tmp_path / "undisturbed").mkdir()
    run(tmp_path / "undisturbed")
    expected = {p.name: p.read_bytes() for p in (tmp_path / "undisturbed").iterdir()}
    assert checkpoints.checkpoint_steps(tmp_path / "undisturbed") == [60, 80]

    class Killed(BaseException):
        pass

    left = [0]

    def mortal(real):
        def call(*args):
            left[0] -= 1
            if left[0] < 0:  # and so does everything after: a dead process cleans up nothing
                raise Killed
            return real(*args)

        return call

    deaths = 0
    while True:
        folder = tmp_path / str(deaths)
        folder.mkdir()
        left[0] = deaths
        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "remove"), (os, "fsync"), (io, "write_from")):
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            try:
                run(folder)
                break
            except Killed:
                pass
        run(folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == expected, deaths
        deaths += 1
    assert deaths > 60, deaths


SAVE_FOREVER = """
import sys
import numpy as np
from llmc.files import checkpoints
from llmc.files.state_file import TrainState
folder, header, N = sys.argv[1], eval(sys.argv[2]), int(sys.argv[3])
for step in range(1, 10**6):
    values = np.full(N, step, np.float32)
    state = TrainState(step, rng_state=step, rng_state_last_update=0)
    checkpoints.save_checkpoint(folder, header, values, 3, state, (values, values))
    checkpoints.apply_retention(folder, step, 2, 0)
"""


def test_sigkill(tmp_path):
    """The same with a real process and a real SIGKILL at random instants."""
    rng = random.Random(1)
    for i in range(5):
        folder = tmp_path / str(i)
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, folder, repr(HEADER), str(N)], cwd=Path(__file__).resolve().parents[1]
        )
        while not (folder / "DONE_00000001").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        checkpoints.prune_stray(folder)
        assert not list(folder.glob(".*"))
        step = checkpoints.latest_checkpoint(folder)
        params, m, v = (np.empty(N, np.float32) for _ in range(3))
        model_file.read_model(checkpoints.model_path(folder, step), params)
        state = state_file.read_state(checkpoints.state_path(folder, step, 0), (m, v))
        assert all((a == step).all() for a in (params, m, v)) and state.step == state.rng_state == step
