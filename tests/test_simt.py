"""Proof of the CPU executor, tests/simt: planted faults are found, correct twins pass, and its CUDA vocabulary computes
what CUDA's does.

1. Faults. tests/simt/faults/*.cu holds small kernels with one mistake each. A test states the kind, the source line
   (the one that ends in `// <kernel>`), block, thread and array that the report must name.
2. Semantics. tests/simt/semantics.cu against NumPy and ml_dtypes, on the executor and, where there is one, on a GPU: on
   a machine with both, the two agree on every bit of these kernels.
"""

import importlib
import shutil
import textwrap
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

if shutil.which("g++") is None:
    pytest.skip("the CPU executor needs g++", allow_module_level=True)

from reference import BF16, FP16, FP32

from llmc import simt
from llmc.errors import UserError
from llmc.simt import build

HERE = Path(__file__).resolve().parent / "simt"
i32 = np.int32


def ints(n, start=0):
    return np.arange(start, start + n, dtype=i32)


def floats(n):
    return np.arange(n, dtype=np.float32)


def launch(file, name, args, grid=1, block=32, dtype=FP32, shared_mem=0):
    grid, block = (n if isinstance(n, tuple) else (n,) for n in (grid, block))
    simt.kernel(HERE / "faults" / file, name, dtype)(grid, block, args, shared_mem=shared_mem)


def line_of(file, mark):
    lines = (HERE / "faults" / file).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"// {mark}"))
    return number


def caught(*args, orders=("forward",), **kwargs):
    with simt.mode(orders=orders), pytest.raises(simt.KernelFault) as caught:
        launch(*args, **kwargs)
    print(caught.value)
    return caught.value


def test_example_of_the_package(tmp_path, monkeypatch):
    """The ten lines in simt's docstring: a .cu file of one's own, and the line that it names."""
    monkeypatch.chdir(tmp_path)
    example = textwrap.dedent(simt.__doc__.split("\n\n")[1])
    promised = "".join(simt.__doc__.split("\n\n")[2].partition("KernelFault: ")[2]).split()
    with pytest.raises(simt.KernelFault) as caught:
        exec(example, {})
    assert str(caught.value).split() == promised, str(caught.value)
    source = (tmp_path / "reverse.cu").read_text()
    assert caught.value.file == str(tmp_path / "reverse.cu")
    assert "__syncthreads is missing" in source.splitlines()[caught.value.line - 1]
    (tmp_path / "reverse.cu").write_text(source.replace("= inp[threadIdx.x];", "= inp[threadIdx.x]; __syncthreads();"))
    inp = floats(64)
    out = np.zeros_like(inp)
    simt.kernel("reverse.cu", "reverse", FP32)((1,), (64,), (out, inp, i32(64)))  # the file has changed
    np.testing.assert_array_equal(out, inp[::-1])


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match="no kernel file 'absent.cu'"):
        simt.kernel("absent.cu", "absent", FP32)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="needs g\\+\\+.*HINT"):
        build.gxx("--version")


# ----------------------------------------------------------------------------------------------------------------------
# Planted faults
# ----------------------------------------------------------------------------------------------------------------------

# file, kernel, arguments, launch options, what the report must say (in "forward" thread order). `line` is the mark of
# the line if it is not the kernel's name.
# fmt: off
FAULTS = [
    ("barrier.cu", "missing_bad", (ints(64), ints(64)), {"block": 64},
     {"kind": "race", "thread": (1, 0, 0), "array": "tile", "index": 0}),
    ("barrier.cu", "reuse_bad", (ints(64), ints(128)), {"block": 64}, {"kind": "race", "array": "tile"}),
    ("barrier.cu", "last_reader_bad", (ints(64), ints(64)), {"block": 64},
     {"kind": "race", "thread": (63, 0, 0), "array": "value"}),
    ("barrier.cu", "exit_bad", (ints(64), ints(64), i32(40)), {"block": 64},
     {"kind": "divergent barrier", "thread": (0, 0, 0)}),
    ("barrier.cu", "branch_bad", (ints(64), ints(64)), {"block": 64}, {"kind": "divergent barrier"}),
    ("barrier.cu", "warp_bad", (ints(32), ints(32)), {},
     {"kind": "race", "thread": (0, 0, 0), "array": "tile", "index": 31}),
    ("barrier.cu", "chain_bad", (ints(1),), {}, {"kind": "race", "thread": (2, 0, 0), "array": "value"}),
    ("bounds.cu", "global_read_bad", (floats(100), floats(100), i32(100)), {"grid": 4},
     {"kind": "out of bounds", "block": (3, 0, 0), "thread": (4, 0, 0), "array": "inp", "index": 100}),
    ("bounds.cu", "global_write_bad", (floats(100), floats(100), i32(100)), {"grid": 4},
     {"kind": "out of bounds", "block": (3, 0, 0), "thread": (4, 0, 0), "array": "out", "index": 100}),
    ("bounds.cu", "before_bad", (floats(32), floats(32)), {},
     {"kind": "out of bounds", "thread": (0, 0, 0), "array": "inp", "index": -1}),
    ("bounds.cu", "shared_read_bad", (floats(32), floats(32)), {},
     {"kind": "out of bounds, shared", "thread": (0, 0, 0), "array": "tile", "index": 32}),
    ("bounds.cu", "shared_write_bad", (floats(32), floats(32)), {"shared_mem": 128},
     {"kind": "out of bounds, shared", "thread": (31, 0, 0), "array": "dynamic", "index": 32}),
    ("bounds.cu", "row_bad", (floats(32), floats(32)), {}, {"kind": "out of bounds, array", "thread": (8, 0, 0)}),
    ("bounds.cu", "uninitialised_bad", (floats(64), floats(32)), {"grid": 2},
     {"kind": "uninitialised read", "block": (1, 0, 0), "thread": (0, 0, 0), "array": "tile", "index": 31}),
    ("bounds.cu", "vector_read", (floats(32), floats(256), i32(1)), {},
     {"kind": "misaligned access", "array": "inp", "index": 1}),
    ("bounds.cu", "vector_write", (floats(256), floats(32), i32(2)), {},
     {"kind": "misaligned access", "array": "out", "index": 2}),
    ("bounds.cu", "null_bad", (floats(32), None), {}, {"kind": "out of bounds", "thread": (0, 0, 0)}),
    ("bounds.cu", "const_bad", (floats(32), floats(32)), {},
     {"kind": "write to const", "thread": (5, 0, 0), "array": "inp", "index": 2}),
    ("bounds.cu", "local_bad", (ints(32),), {}, {"kind": "out of bounds", "thread": (1, 0, 0)}),
    ("bounds.cu", "too_much_shared", (ints(32),), {}, {"kind": "shared memory size"}),
    ("bounds.cu", "too_much_in_all", (ints(32),), {"shared_mem": 48 * 1024}, {"kind": "shared memory size"}),
    ("blocks.cu", "two_write_bad", (ints(64),), {"grid": 2},
     {"kind": "race between blocks", "block": (1, 0, 0), "thread": (0, 0, 0), "array": "out", "index": 31}),
    ("blocks.cu", "read_bad", (ints(64),), {"grid": 2},
     {"kind": "race between blocks", "block": (1, 0, 0), "thread": (0, 0, 0), "array": "out", "index": 31}),
    ("blocks.cu", "write_after_read_bad", (ints(65),), {"grid": 2},
     {"kind": "race between blocks", "block": (1, 0, 0), "thread": (3, 0, 0), "array": "out", "index": 63}),
    ("blocks.cu", "no_fence_bad", (ints(1), ints(64), np.zeros(1, np.uint32)), {"grid": 2},
     {"kind": "race between blocks", "block": (1, 0, 0), "thread": (0, 0, 0), "array": "partial", "line": "sum"}),
    ("blocks.cu", "no_barrier_bad", (ints(1), ints(128), np.zeros(1, np.uint32)), {"grid": 2, "block": 64},
     {"kind": "race between blocks", "block": (1, 0, 0), "thread": (0, 0, 0), "array": "partial", "line": "sum"}),
    ("blocks.cu", "long_bad", (ints(1),), {"grid": 900},
     {"kind": "race between blocks", "block": (899, 0, 0), "thread": (0, 0, 0), "array": "out", "index": 0}),
    ("blocks.cu", "late_write_bad", (ints(1), ints(8), np.zeros(1, np.uint32)), {"grid": 4},
     {"kind": "race between blocks", "block": (3, 0, 0), "thread": (0, 0, 0), "array": "partial", "index": 1}),
    ("blocks.cu", "atomic_and_read_bad", (ints(9), ints(32) % 8), {},
     {"kind": "race", "thread": (31, 0, 0), "array": "out"}),
    ("warp.cu", "mask_bad", (ints(32), ints(32)), {}, {"kind": "warp mask", "thread": (16, 0, 0)}),
    ("warp.cu", "source_bad", (ints(32), ints(32)), {}, {"kind": "shuffle source", "thread": (15, 0, 0)}),
    ("warp.cu", "divergent_bad", (ints(32), ints(32)), {}, {"kind": "divergent warp", "thread": (0, 0, 0)}),
    ("warp.cu", "exited_bad", (ints(40), ints(40), i32(40)), {"grid": 2},
     {"kind": "divergent warp", "block": (1, 0, 0), "thread": (0, 0, 0)}),
    ("warp.cu", "kinds_bad", (ints(32), ints(32)), {}, {"kind": "divergent warp", "thread": (0, 0, 0)}),
    ("async.cu", "no_commit_bad", (ints(32), ints(256)), {},
     {"kind": "cp.async in flight", "line": "first", "array": "tile"}),
    ("async.cu", "no_wait_bad", (ints(32), ints(256)), {},
     {"kind": "cp.async in flight", "line": "second", "array": "tile"}),
    ("async.cu", "no_barrier_bad", (ints(32), ints(256)), {}, {"kind": "race", "line": "first", "array": "tile"}),
    ("async.cu", "misaligned_bad", (ints(32), ints(256)), {},
     {"kind": "misaligned access", "array": "inp", "index": 1}),
    ("async.cu", "refill_bad", (ints(64), ints(8)), {"block": 64}, {"kind": "race", "array": "tile"}),
    ("async.cu", "ldmatrix_bad", (ints(32), ints(96)), {},
     {"kind": "misaligned access", "thread": (1, 0, 0), "array": "tile"}),
    ("arrays.cu", "packs", (floats(32), floats(8), i32(3)), {},
     {"kind": "out of bounds, array", "thread": (0, 0, 0)}),
    ("arrays.cu", "table", (floats(32), floats(12), i32(4)), {},
     {"kind": "out of bounds, array", "thread": (0, 0, 0)}),
    ("arrays.cu", "pointer", (floats(32), i32(5)), {}, {"kind": "out of bounds", "thread": (0, 0, 0)}),
    ("undefined.cu", "overflow", (ints(32), i32(2 ** 30), i32(2)), {},
     {"kind": "undefined behaviour", "thread": (0, 0, 0)}),
    ("undefined.cu", "overflow", (ints(32), i32(2 ** 31 - 8), i32(1)), {},
     {"kind": "undefined behaviour", "thread": (8, 0, 0)}),
    ("undefined.cu", "shift", (ints(32), i32(1), i32(32)), {}, {"kind": "undefined behaviour", "thread": (0, 0, 0)}),
    ("undefined.cu", "divide", (ints(32), i32(1), i32(0)), {}, {"kind": "undefined behaviour", "thread": (0, 0, 0)}),
    ("undefined.cu", "asserts", (ints(32), i32(9), i32(0)), {}, {"kind": "assertion", "thread": (9, 0, 0)}),
    ("undefined.cu", "variable", (ints(32),), {}, {"kind": "unsupported", "thread": (2, 0, 0)}),
]
# fmt: on


@pytest.mark.parametrize(
    "file,name,args,options,expected", FAULTS, ids=[f"{f[0][:-3]}-{f[1]}-{i}" for i, f in enumerate(FAULTS)]
)
def test_planted_fault(file, name, args, options, expected):
    expected = {"kernel": name, "block": (0, 0, 0), "line": name, **expected}
    expected["line"] = line_of(file, expected["line"])
    before = [a.copy() for a in args if isinstance(a, np.ndarray)]
    fault = caught(file, name, args, dtype=FP16 if file == "async.cu" else FP32, **options)
    assert {k: getattr(fault, k) for k in expected} == expected, str(fault)
    assert Path(fault.file).name == file and f"{file}:{fault.line}" in str(fault) and name in str(fault)
    # A launch that fails leaves the caller's arrays alone.
    for array, was in zip((a for a in args if isinstance(a, np.ndarray)), before, strict=True):
        np.testing.assert_array_equal(array, was)


@pytest.mark.parametrize("name,line,index,dtype", [("pack_bad", "pack", 4, FP32), ("pack_write_bad", None, 8, BF16)])
def test_index_of_a_pack(name, line, index, dtype):
    """The check stands in common.cuh: the report has its line and the one that called."""
    fault = caught("arrays.cu", name, (floats(32), floats(128)), dtype=dtype)
    assert fault.kind == "out of bounds, array" and f"index {index} of" in str(fault), str(fault)
    assert f"called from arrays.cu:{line_of('arrays.cu', line or name)}" in str(fault), str(fault)


@pytest.mark.parametrize("order", simt.ALL_ORDERS)
@pytest.mark.parametrize(
    "file,name",
    [f[:2] for f in FAULTS if f[4]["kind"].startswith("race")],
    ids=[f[1] for f in FAULTS if f[4]["kind"].startswith("race")],
)
def test_race_is_found_in_every_order(file, name, order):
    """A race need not come out wrong to be found: any single order reports it. An element that is read before another
    thread writes it is reported as uninitialised."""
    _, _, args, options, _ = next(f for f in FAULTS if f[:2] == (file, name))
    fault = caught(file, name, args, orders=(order,), dtype=FP16 if file == "async.cu" else FP32, **options)
    assert fault.kind.startswith("race") or fault.kind == "uninitialised read", str(fault)


def test_race_names_both_sides():
    fault = caught("barrier.cu", "reuse_bad", (ints(64), ints(128)), block=64)
    lines = (HERE / "faults" / "barrier.cu").read_text().splitlines()
    assert lines[fault.other_line - 1].strip() == "tile[threadIdx.x] = inp[64 * round + threadIdx.x];", str(fault)
    fault = caught("blocks.cu", "two_write_bad", (ints(64),), grid=2)
    assert fault.other_line == fault.line and "thread 31 of block (0,0,0)" in str(fault)


# fmt: off
TWINS = [
    ("barrier.cu", "missing_good", (ints(64), ints(64)), {"block": 64}, np.maximum(ints(64) - 1, 0)),
    ("barrier.cu", "reuse_good", (ints(64), ints(128)), {"block": 64}, 63 + 127 - 2 * ints(64)),
    ("barrier.cu", "exit_good", (ints(64), ints(64), i32(40)), {"block": 64}, np.r_[ints(40)[::-1], ints(24, 40)]),
    ("barrier.cu", "warp_good", (ints(32), ints(32)), {}, ints(32)[::-1]),
    ("barrier.cu", "chain_good", (ints(1),), {}, [7]),
    ("bounds.cu", "global_good", (floats(100), floats(100), i32(100)), {"grid": 4}, 2 * floats(100)),
    ("bounds.cu", "shared_good", (floats(32), floats(32)), {}, np.full(32, 31)),
    ("bounds.cu", "uninitialised_good", (floats(64), floats(32)), {"grid": 2}, np.tile(np.r_[0, floats(31)[::-1]], 2)),
    ("bounds.cu", "vector_read", (floats(32), floats(256), i32(4)), {}, 16 * floats(32) + 22),
    ("bounds.cu", "vector_write", (floats(132), floats(32), i32(4)), {}, np.r_[floats(4), np.repeat(floats(32), 4)]),
    ("blocks.cu", "own_good", (ints(64),), {"grid": 2}, np.ones(64)),
    ("blocks.cu", "counter_good", (ints(1), ints(128), np.zeros(1, np.uint32)), {"grid": 4}, [32 * (1 + 2 + 3 + 4)]),
    ("blocks.cu", "one_fence_good", (ints(1), ints(128), np.zeros(1, np.uint32)), {"grid": 4}, [128]),
    ("blocks.cu", "tree_good", (ints(1), ints(8), np.zeros(5, np.uint32)), {"grid": 8}, [36]),
    ("blocks.cu", "each_thread_good", (ints(1), ints(256), np.zeros(1, np.uint32)), {"grid": 4, "block": 64}, [256]),
    ("blocks.cu", "long_good", (np.zeros(900, np.int32),), {"grid": 900}, np.ones(900)),
    ("blocks.cu", "histogram_good", (np.zeros(8, i32), ints(128) % 8), {"grid": 4}, np.full(8, 16)),
    ("warp.cu", "shuffle_good", (ints(32), ints(32)), {}, np.r_[ints(16) ^ 1, ints(16, 16)]),
    ("async.cu", "async_good", (ints(32), ints(256)), {},
     4 * np.maximum(ints(32) - 1, 0) + np.where(ints(32) <= 16, 128 + 4 * np.maximum(ints(32) - 1, 0), 0)),
    ("arrays.cu", "pack_good", (floats(32), floats(128)), {}, 16 * floats(32) + 6),
    ("arrays.cu", "packs", (floats(32), floats(8), i32(2)), {}, np.full(32, 6)),
    ("arrays.cu", "table", (floats(32), floats(12), i32(3)), {}, np.full(32, 15)),
    ("arrays.cu", "pointer", (floats(32), i32(4)), {}, floats(32) % 4),
    ("undefined.cu", "overflow", (ints(32), i32(2 ** 30), i32(1)), {}, 2 ** 30 + ints(32)),
    ("undefined.cu", "shift", (ints(32), i32(3), i32(4)), {}, np.full(32, 48)),
    ("undefined.cu", "divide", (ints(32), i32(7), i32(2)), {}, np.full(32, 3)),
    ("undefined.cu", "asserts", (ints(32), i32(32), i32(5)), {}, np.full(32, 5)),
]
# fmt: on


@pytest.mark.parametrize("fast", [False, True], ids=["checked", "fast"])
@pytest.mark.parametrize("file,name,args,options,expected", TWINS, ids=[f"{t[0][:-3]}-{t[1]}" for t in TWINS])
def test_correct_twin(file, name, args, options, expected, fast):
    args = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
    with simt.mode(fast=fast):
        launch(file, name, args, dtype=FP16 if file == "async.cu" else FP32, **options)
    np.testing.assert_array_equal(args[0], expected)


# kernel, its fault's kind, the mark of its line if it has one
HOPPER_FAULTS = [
    ("unfilled_bad", "timing-dependent result", None),
    ("fence_bad", "missing fence", "store"),
    ("barrier_bad", "missing fence", "store"),
    ("refilled_bad", "missing fence", "load"),
    ("exit_bad", "TMA store in flight", "store"),
    ("reuse_bad", "timing-dependent result", None),
    ("sums_bad", "race", "refill"),
    ("refill_bad", "race", "refill"),
    ("load_bad", "TMA load in flight", "load"),
    ("phase_bad", "deadlock", None),
    ("few_bad", "deadlock", "few_bad"),
    ("outside_bad", "out of bounds, shared", "load"),
    ("released_bad", "race", "load"),
    ("begin_bad", "missing fence", "released"),
    ("ring_bad", "race", "load"),
    ("ring_shuffle_bad", "race", "load"),
    ("ring_wgmma_bad", "race", "load"),
    ("ring_late_fence_bad", "race", "load"),
    ("plain_bad", "race", "plain"),
    ("unwritten_bad", "uninitialised read", "plain"),
    ("store_bad", "missing fence", "plain store"),
    ("beyond_bad", "out of bounds, shared", "beyond"),
]


def launch_hopper(name, out, inp):
    maps = simt.tensor_map(out, len(out), 64, 64), simt.tensor_map(inp, 64, 64, 64)
    smem = 1024 + 16384 + 16
    kernel = simt.kernel(HERE / "faults" / "hopper.cu", name, FP16, smem=smem, arch="sm_90a")
    kernel((1,), (128,), maps, shared_mem=smem)


@pytest.mark.parametrize("name,kind,mark", HOPPER_FAULTS, ids=[f[0] for f in HOPPER_FAULTS])
def test_planted_fault_of_hopper(name, kind, mark):
    inp, out = np.random.default_rng(0).integers(-2, 3, (64, 64)).astype(FP16), np.full((128, 64), 7, FP16)
    with pytest.raises(simt.KernelFault) as caught:
        launch_hopper(name, out, inp)
    assert (caught.value.kernel, caught.value.kind) == (name, kind), str(caught.value)
    assert mark is None or caught.value.line == line_of("hopper.cu", mark), str(caught.value)
    assert (out == 7).all()


def test_race_with_tma_names_the_reader():
    """What lets TMA overwrite a tile is one side of the race, the read that nothing orders before it the other."""
    with pytest.raises(simt.KernelFault) as caught:
        launch_hopper("ring_bad", np.zeros((128, 64), FP16), np.ones((64, 64), FP16))
    assert caught.value.other_line == line_of("hopper.cu", "ring"), str(caught.value)
    assert caught.value.thread == (0, 0, 0) and caught.value.array == "memory"


@pytest.mark.parametrize("name", ["nothing_bad", "syncwarp_good", "fence_good", "all_arrive_good", "block_good"])
def test_pattern_of_the_ring(name):
    """The smallest kernels with it, which compute-sanitizer is asked about too (dev/sanitize.py)."""
    inp, out = np.random.default_rng(0).integers(-8, 9, (8, 128)).astype(np.float32), np.zeros((8, 32), np.float32)
    kernel = simt.kernel(HERE / "faults" / "ring.cu", name, FP16, arch="sm_90a")
    if name.endswith("bad"):
        with pytest.raises(simt.KernelFault) as caught:
            kernel((1,), (64,), (out, inp, i32(8)))
        lines = caught.value.kind, caught.value.line, caught.value.other_line
        assert lines == ("race", line_of("ring.cu", "load"), line_of("ring.cu", "read")), str(caught.value)
    else:
        kernel((1,), (64,), (out, inp, i32(8)))
        np.testing.assert_array_equal(out, np.roll(inp.reshape(8, 4, 32).sum(1), -1, axis=1))


def test_global_memory_of_hopper():
    """Ordinary accesses of such a kernel stay in the arrays that it was given, and do not write to constant ones."""
    kernel, out = simt.kernel(HERE / "faults" / "hopper.cu", "global_array", FP16, arch="sm_90a"), floats(64)
    kernel((1,), (128,), (out[:32], i32(32)))
    assert (out[:32] == 1).all() and (out[32:] == floats(64)[32:]).all()
    with pytest.raises(simt.KernelFault) as caught:
        kernel((1,), (128,), (out[:32], i32(33)))
    expected = ("out of bounds", "out", 32, line_of("hopper.cu", "global"))
    assert (caught.value.kind, caught.value.array, caught.value.index, caught.value.line) == expected
    out.flags.writeable = False
    with pytest.raises(simt.KernelFault, match="write to const"):
        kernel((1,), (128,), (out, i32(1)))
    with pytest.raises(ValueError, match="tensor map"):
        simt.tensor_map(np.zeros((63, 64), FP16), 64, 64, 64)


def test_correct_twins_of_hopper():
    inp, out = np.random.default_rng(0).integers(-2, 3, (64, 64)).astype(FP16), np.full((128, 64), 7, FP16)
    launch_hopper("copy_good", out, inp)
    np.testing.assert_array_equal(out, np.r_[2 * inp, np.full((64, 64), 7, FP16)])
    launch_hopper("reuse_good", out, inp)
    np.testing.assert_array_equal(out, np.r_[2 * inp, 4 * inp])
    launch_hopper("square_good", out, inp)
    np.testing.assert_array_equal(out[:64], inp @ inp.T)
    for name in ("refilled_good", "ring_good", "ring_all_good", "plain_good", "released_good"):
        launch_hopper(name, out, inp)
    np.testing.assert_array_equal(out[:64], inp @ inp.T)
    launch_hopper("store_good", out, inp)
    assert (out[:64] == 2).all()
    with simt.mode(fast=True):
        launch_hopper("copy_good", out, inp)
    np.testing.assert_array_equal(out[:64], 2 * inp)


def test_order_dependent_result():
    out = np.zeros(32, i32)
    fault = caught("blocks.cu", "order_bad", (out, np.zeros(1, np.uint32)), orders=simt.ALL_ORDERS)
    assert (fault.kind, fault.array, fault.index) == ("order-dependent result", "out", 0), str(fault)
    assert "forward" in str(fault) and "reverse" in str(fault) and not out.any()


def test_float_atomic_is_reported():
    out = np.zeros(1, np.float32)
    with pytest.warns(simt.FloatAtomicWarning, match=f"blocks.cu:{line_of('blocks.cu', 'float_atomic')}"):
        launch("blocks.cu", "float_atomic", (out, floats(32)))
    assert out == floats(32).sum()
    with pytest.warns(simt.FloatAtomicWarning):
        fault = caught(
            "blocks.cu", "float_atomic", (np.zeros(1, np.float32), np.sin(floats(32))), orders=simt.ALL_ORDERS
        )
    assert fault.kind == "order-dependent result"


def test_views_have_their_own_bounds():
    """Two views side by side in one buffer: a step past the end of one is a fault, though the next begins there."""
    for n in (100, 128):  # 128 floats end at a multiple of 256 bytes
        flat = floats(2 * n)
        fault = caught("bounds.cu", "global_write_bad", (flat[:n], flat[n:], i32(n)), grid=5)
        assert (fault.kind, fault.array, fault.index) == ("out of bounds", "out", n)
        launch("bounds.cu", "global_good", (flat[:n], flat[n:], i32(n)), grid=4)
        np.testing.assert_array_equal(flat, np.r_[2 * floats(2 * n)[n:], floats(2 * n)[n:]])


def test_overlapping_arguments_share_memory():
    both = floats(100)
    launch("bounds.cu", "global_good", (both, both, i32(100)), grid=4)  # in place: the constant pointer sees the writes
    np.testing.assert_array_equal(both, 2 * floats(100))
    fault = caught("bounds.cu", "global_good", (both[:64], both[32:96], i32(64)), grid=2)
    assert fault.kind == "race between blocks", str(fault)


def test_alignment_is_that_of_the_view():
    launch("bounds.cu", "vector_read", (floats(32), floats(260)[4:], i32(0)))
    assert caught("bounds.cu", "vector_read", (floats(32), floats(260)[3:], i32(0))).kind == "misaligned access"


def test_poisoned_array():
    out, inp = floats(32), floats(32)
    simt.poison(out)
    fault = caught("bounds.cu", "accumulate", (out, inp))
    assert (fault.kind, fault.array, fault.index) == ("uninitialised read", "out", 0)
    assert fault.line == line_of("bounds.cu", "accumulate")
    launch("bounds.cu", "global_good", (out, inp, i32(20)))
    launch("bounds.cu", "accumulate", (out[:20], inp[:20]), block=20)
    fault = caught("bounds.cu", "accumulate", (out, inp))
    assert (fault.kind, fault.index) == ("uninitialised read", 20)
    simt.unpoison(out)
    launch("bounds.cu", "accumulate", (out, inp))


def test_read_only_array_is_constant():
    out, inp = floats(32), floats(32)
    out.flags.writeable = False
    assert caught("bounds.cu", "accumulate", (out, inp)).kind == "write to const"


def scalars(**changed):
    given = dict(
        out=floats(1),
        i=i32(1),
        u=np.uint32(2),
        l=np.int64(3),
        f=np.float32(4),
        d=np.float64(5),
        b=np.bool_(True),
        s=np.uint64(7),
    )
    return tuple({**given, **changed}.values())


def test_scalar_arguments():
    out = floats(1)
    launch("undefined.cu", "scalars", scalars(out=out))
    assert out == 1 + 2 + 3 + 4 + 5 + 1 + 7
    launch(
        "undefined.cu", "scalars", scalars(out=out, l=30, d=50.0, b=False)
    )  # a Python int is int64, a float is float64
    assert out == 1 + 2 + 30 + 4 + 50 + 0 + 7


@pytest.mark.parametrize(
    "name,value,expected,given",
    [
        ("i", 1, "int32", "int64"),
        ("i", np.uint32(1), "int32", "uint32"),
        ("f", 1.0, "float32", "float64"),
        ("f", i32(1), "float32", "int32"),
        ("s", 7, "uint64", "int64"),
        ("u", None, "uint32", "object"),
        ("out", np.zeros(1), "float32*", "float64"),
        ("out", i32(1), "a pointer", "int32"),
        ("out", np.zeros(1, ml_dtypes.bfloat16), "float32*", "bfloat16"),
        ("i", np.zeros(1, i32), "int32", "an array"),
    ],
)
def test_wrong_argument_type(name, value, expected, given):
    fault = caught("undefined.cu", "scalars", scalars(**{name: value}))
    assert fault.kind == "argument type" and fault.array == name, str(fault)
    assert f"`{name}` is {expected}, given" in str(fault) and given in str(fault).split("given")[1]


def test_wrong_argument_count():
    assert caught("undefined.cu", "scalars", scalars()[:-1]).kind == "argument count"


def test_launch_limits():
    out = ints(4096)
    assert caught("undefined.cu", "bounded", (out,), block=65).kind == "launch"  # __launch_bounds__(64)
    assert caught("blocks.cu", "own_good", (out,), block=1025).kind == "launch"
    assert caught("blocks.cu", "own_good", (out,), grid=(1, 65536)).kind == "launch"
    assert caught("bounds.cu", "shared_write_bad", (floats(32), floats(32)), shared_mem=49 * 1024).kind == "launch"


ENDLESS = [
    ("endless", (np.zeros(1, i32),)),
    ("endless_register", (np.zeros(1, i32),)),
    ("endless_sum", (floats(32), floats(32))),
    ("endless_barrier", (ints(32),)),
]


@pytest.mark.parametrize("name,args", ENDLESS, ids=[e[0] for e in ENDLESS])
def test_endless_loop_is_named(name, args):
    assert simt.launch.Mode.patience < 10
    with simt.mode(patience=0.2):
        fault = caught("undefined.cu", name, args)
    assert fault.kind == "endless loop" and fault.line == line_of("undefined.cu", name), str(fault)


def test_endless_ring():
    """Hopper's units: a ring that brings the same tile for ever."""
    inp, out = np.zeros((64, 64), FP16), np.full((128, 64), 7, FP16)
    with simt.mode(patience=0.2), pytest.raises(simt.KernelFault) as caught:
        launch_hopper("endless_bad", out, inp)
    assert caught.value.kind == "endless loop" and (out == 7).all(), str(caught.value)


def test_long_is_not_endless():
    """Much longer than the patience, but there is progress: new elements, new blocks."""
    n, settings = 1 << 23, {"patience": 0.05, "orders": ("forward",)}
    out = np.zeros(n, i32)
    with simt.mode(**settings):
        launch("undefined.cu", "long_good", (out, i32(n)), block=1)
        launch("undefined.cu", "long_good", (out, i32(1 << 7)), block=1, grid=n >> 7)
    with simt.mode(**settings, timeout=0.05):
        assert caught("undefined.cu", "long_good", (out, i32(n)), block=1).kind == "timeout"


def test_crash_ends_the_launch_only():
    """Without checks a wild access or a division by zero is a fault still, and the next launch works."""
    with simt.mode(fast=True):
        fault = caught("bounds.cu", "null_bad", (floats(32), None))
        assert fault.kind == "crash" and fault.line == line_of("bounds.cu", "null_bad"), str(fault)
        assert caught("undefined.cu", "divide", (ints(32), i32(1), i32(0))).kind == "crash"
    out = ints(64)
    launch("blocks.cu", "own_good", (out,), grid=2)
    assert out.all()


def test_compile_error_is_shown(tmp_path):
    (tmp_path / "broken.cu").write_text('extern "C" __global__ void broken(int* out) { out[0] = missing; }\n')
    with pytest.raises(RuntimeError, match=r"broken.cu:1:.*missing"):
        simt.kernel(tmp_path / "broken.cu", "broken", FP32)((1,), (1,), (ints(1),))
    with pytest.raises(KeyError, match="own_good"):
        simt.kernel(HERE / "faults" / "blocks.cu", "absent", FP32)((1,), (1,), ())


def test_second_process_compiles_nothing(monkeypatch):
    launch("blocks.cu", "own_good", (ints(64),), grid=2)
    build.load.cache_clear()
    monkeypatch.setattr(build, "gxx", lambda *args, **kwargs: pytest.fail("compiled again"))
    build.load(HERE / "faults" / "blocks.cu", 0, "float32", (), False)


def test_traffic():
    """Sectors and bank conflicts of known access patterns: out[i] = inp[stride * i] and a column of a shared tile."""
    inp = floats(32 * 8)
    expected = {
        1: (4, 4),
        2: (8, 4),
        8: (32, 4),
    }  # stride: 32-byte sectors of one warp's 128 bytes, the fewest possible
    for stride, (units, ideal) in expected.items():
        with simt.traffic() as rows:
            launch("traffic.cu", "strided", (floats(32), inp, i32(stride)))
        read, write = (next(r for r in rows if r.write == w) for w in (False, True))
        assert (read.space, read.requests, read.bytes, read.units, read.ideal) == ("global", 1, 128, units, ideal)
        assert read.line == line_of("traffic.cu", "strided") and (write.units, write.bytes) == (4, 128)
        assert [(r.array, r.array_bytes) for r in (read, write)] == [("inp", inp.nbytes), ("out", 128)]
    expected = {32: 32, 33: 1, 34: 2, 36: 4}  # floats in a row: wavefronts of reading a column
    for row, units in expected.items():
        with simt.traffic() as rows:
            launch("traffic.cu", "column", (floats(32), i32(row)), shared_mem=4 * 32 * row)
        read = next(r for r in rows if r.space == "shared" and not r.write)
        assert (read.requests, read.bytes, read.units, read.ideal) == (1, 128, units, 1), row
    expected = {4: 4, 8: 8}  # floats between 16-byte reads: 8 lanes at a time
    for step, units in expected.items():
        with simt.traffic() as rows:
            launch("traffic.cu", "vectors", (floats(32), i32(step)), shared_mem=4 * 32 * step)
        read = next(r for r in rows if r.space == "shared" and not r.write)
        assert (read.requests, read.bytes, read.units, read.ideal) == (1, 512, units, 4), step


# ----------------------------------------------------------------------------------------------------------------------
# Semantics, on the executor and on a GPU
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["executor", "gpu"])
def run(request):
    """run(name, dtype, grid, block, *arrays and scalars): launches a kernel of semantics.cu on NumPy arrays."""
    path = HERE / "semantics.cu"
    if request.param == "executor":
        return lambda name, dtype, grid, block, *args: simt.kernel(path, name, dtype)((grid,), (block,), args)
    cupy = pytest.importorskip("cupy", reason="no GPU: CuPy is not installed")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    module = importlib.import_module("llmc.cuda.module")

    def on_gpu(name, dtype, grid, block, *args):
        device = [cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
        module.kernel(path, name, dtype)((grid,), (block,), tuple(device))
        for host, array in zip(args, device, strict=True):
            if isinstance(host, np.ndarray):
                host[...] = array.get()

    return on_gpu


def same_bits(got, expected):
    """Equal bit for bit; NaNs as CUDA writes them, 0x7fff."""
    np.testing.assert_array_equal(
        got.view(np.uint16), np.where(np.isnan(expected.astype(np.float32)), 0x7FFF, expected.view(np.uint16))
    )


def patterns(dtype):
    return np.arange(65536, dtype=np.uint16).view(dtype)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_decode_all_patterns(run, dtype):
    out = np.zeros(65536, np.float32)
    run("decode", dtype, 256, 256, out, patterns(dtype), i32(65536))
    expected = patterns(dtype).astype(np.float32)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(out[number].view(np.uint32), expected[number].view(np.uint32))
    assert np.isnan(out[~number]).all()


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_encode_rounds_to_nearest_even(run, dtype):
    """Every number of the type, the midpoints between neighbours (ties), the neighbours of both, random bits."""
    with np.errstate(invalid="ignore"):  # NaNs with odd payloads
        numbers = patterns(dtype).astype(np.float64)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    exact = np.concatenate([numbers.astype(np.float32), middles])
    near = [np.nextafter(exact, np.float32(s * np.inf)) for s in (-1, 1)]
    noise = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    special = np.array([np.inf, -np.inf, np.nan, 65519.996, 65520, 3.4e38, -0.0, 1e-45], np.float32)
    values = np.concatenate([exact, *near, noise, special])
    out = np.zeros(values.size, dtype)
    run("encode", dtype, -(-values.size // 256), 256, out, values, i32(values.size))
    with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same_bits(out, values.astype(dtype))


def rounded(values, dtype):
    """float64 -> nearest even number of the type, from the definition: float64 has no digits to lose here."""
    bits, smallest, largest = (11, -14, 16) if dtype == FP16 else (8, -126, 128)
    unit = 2.0 ** (np.maximum(np.frexp(values)[1], smallest + 1) - bits)
    nearest = np.rint(values / unit) * unit
    return np.where(np.abs(nearest) >= 2.0**largest, np.copysign(np.inf, values), nearest).astype(dtype)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_arithmetic_rounds_once(run, dtype):
    n = 20_000
    generator = np.random.default_rng(2)
    a, b, c = (np.ldexp(generator.uniform(1, 2, n), generator.integers(-6, 6, n)).astype(dtype) for _ in range(3))
    a, c = a * np.where(generator.random(n) < 0.5, -1, 1).astype(dtype), -c
    out = np.zeros((7, n), dtype)
    run("arithmetic", dtype, -(-n // 256), 256, out, a, b, c, i32(n))
    x, y, z = (v.astype(np.float64) for v in (a, b, c))
    for got, expected in zip(out, (x + y, x - y, x * y, x / y, x * y + z, -x, np.minimum(x, y)), strict=True):
        same_bits(got, rounded(expected, dtype))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_pairs_put_the_first_value_low(run, dtype):
    values = np.random.default_rng(3).standard_normal(512).astype(np.float32)
    out = np.zeros(256, np.uint32)
    run("pairs", dtype, 1, 256, out, values, i32(256))
    same_bits(out.view(np.uint16).view(dtype), values.astype(dtype))


def test_bits(run):
    n = 1024
    a, b, c = (np.random.default_rng(i).integers(0, 2**32, n, dtype=np.uint32) for i in (4, 5, 6))
    a[:70] = np.r_[0, 1, 0xFFFFFFFF, 0x80000000, 1 << np.arange(32), np.arange(34)].astype(np.uint32)
    c[70:140] = np.arange(70)
    out = np.zeros((13, n), np.uint32)
    run("bits", FP32, n // 256, 256, out, a, b, c, i32(n))
    signed = lambda v: v - (v >> 31 << 32)  # noqa: E731
    for i in range(n):
        x, y, z = int(a[i]), int(b[i]), int(c[i])
        both = y << 32 | x
        selected = 0
        for k in range(4):
            s = z >> 4 * k & 15
            byte = both >> 8 * (s & 7) & 255
            selected |= (0xFF * (byte >> 7) if s & 8 else byte) << 8 * k
        expected = [
            x.bit_count(),
            (x & -x).bit_length(),
            32 - x.bit_length(),
            int(f"{x:032b}"[::-1], 2),
            selected,
            both << (z & 31) >> 32 & 0xFFFFFFFF,
            both >> (z & 31) & 0xFFFFFFFF,
            x * y >> 32,
            signed(x) * signed(y) >> 32 & 0xFFFFFFFF,
            min(x, y),
            max(signed(x), signed(y)) & 0xFFFFFFFF,
            x.bit_count() + y.bit_count(),
            64 - (x << 32 | y).bit_length(),
        ]
        assert out[:, i].tolist() == expected, (hex(x), hex(y), hex(z))


def shuffled(inp, function, operand, width):
    """CUDA C++ Programming Guide, "Warp shuffle functions": segments of `width` lanes, out of range means one's own."""
    out = inp.copy()
    for t in range(64):
        warp, lane = t & ~31, t & 31
        first = lane & ~(width - 1)
        source = {"idx": first + operand % width, "up": lane - operand, "down": lane + operand, "xor": lane ^ operand}[
            function
        ]
        if (function == "up" and source < first) or (function in ("down", "xor") and source >= first + width):
            source = lane
        out[t] = inp[warp + source]
    return out


@pytest.mark.parametrize("operand", [0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31])
def test_shuffles(run, operand):
    inp = np.random.default_rng(7).integers(-(2**31), 2**31, 64).astype(i32)
    out = np.zeros((4, 4, 64), i32)
    run("shuffle", FP32, 1, 64, out, inp, i32(operand))
    for i, width in enumerate((32, 16, 8, 2)):
        for j, function in enumerate(("idx", "up", "down", "xor")):
            np.testing.assert_array_equal(out[i, j], shuffled(inp, function, operand, width), f"{function} {width}")


@pytest.mark.parametrize("seed", range(4))
def test_votes(run, seed):
    inp = np.random.default_rng(seed).integers(0, 4 - seed // 2, 64).astype(i32)
    if seed == 3:
        inp[:16] = 1
    out = np.zeros((12, 64), np.uint32)
    run("votes", FP32, 1, 64, out, inp)
    ballot = lambda lanes: sum(int(p) << i for i, p in enumerate(lanes))  # noqa: E731
    for t in range(64):
        warp, base = inp[t & ~31 :][:32], t & 16
        half = warp[base : base + 16]
        expected = [
            ballot(warp > 1),
            ballot(half > 1) << base,
            (half == 3).any(),
            (half < 3).all(),
            ballot(warp == inp[t]),
            (inp == 3).any(),
            True,
            (inp == 1).sum(),
            half.sum(),
            (int(half.min()) - 2) % 2**32,
            half.max(),
            np.bitwise_xor.reduce(half),
        ]
        assert out[:, t].tolist() == [int(e) for e in expected], t


def test_atomics(run):
    inp = np.random.default_rng(8).integers(0, 2**32, 64, dtype=np.uint32)
    out = np.array([1, 7, 2**32 - 1, 2**32 - 1, 0, 0, 3, 4, 9, 2**31, 0, 5], np.uint32)
    run("atomics", FP32, 1, 64, out, inp)
    total = int(inp.sum(dtype=np.uint64))
    expected = [
        (1 + total) % 2**32,
        inp.max(),
        inp.min(),
        np.bitwise_and.reduce(inp),
        np.bitwise_or.reduce(inp),
        np.bitwise_xor.reduce(inp),
        (3 + 64) % 50,
        (4 - 64) % 10,
        (9 - total) % 2**32,
        int(inp.view(i32).max()) % 2**32,
        inp[7],
        9,
    ]
    assert out.tolist() == [int(e) for e in expected]


MMA = [
    ("mma_tf32", FP32, 8),
    ("mma_k16", BF16, 16),
    ("mma_k16", FP16, 16),
    ("mma_k8", FP16, 8),
    ("mma_ldmatrix", BF16, 16),
    ("mma_ldmatrix", FP16, 16),
]


@pytest.mark.parametrize("name,dtype,K", MMA, ids=[f"{m[0]}-{m[1]}" for m in MMA])
def test_mma_computes_the_product(run, name, dtype, K):
    """Small integers: every product and sum is exact, so one wrong lane or register changes the result."""
    generator = np.random.default_rng(9)
    for _ in range(3):
        A, B = (generator.integers(-100, 100, shape).astype(np.float32).astype(dtype) for shape in ((16, K), (K, 8)))
        C = generator.integers(-1000, 1000, (16, 8)).astype(np.float32)
        D = np.zeros((16, 8), np.float32)
        run(name, dtype, 1, 32, D, A, B, C)
        np.testing.assert_array_equal(D, A.astype(np.float64) @ B.astype(np.float64) + C)


def test_tf32_ignores_the_low_bits(run):
    A, B = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
    A[:, 0], B[0] = np.float32(1 + 2.0**-11 + 2.0**-23), 1  # the last bit kept is 2^-10
    D = np.zeros((16, 8), np.float32)
    run("mma_tf32", FP32, 1, 32, D, A, B, np.zeros_like(D))
    np.testing.assert_array_equal(D, 1)


def test_ldmatrix_forms(run):
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8) * 251
    out = np.zeros((6, 4, 32), np.uint32)
    run("ldmatrix_forms", FP16, 1, 32, out, matrices)
    expected = np.zeros_like(out)
    for form, count, transposed in ((0, 1, 0), (1, 2, 0), (2, 4, 0), (4, 2, 1), (5, 4, 1)):
        for i in range(count):
            M = matrices[i].T if transposed else matrices[i]
            expected[form, i] = np.ascontiguousarray(M).reshape(32, 2).view(np.uint32)[:, 0]
    np.testing.assert_array_equal(out, expected)


def test_async_copy(run):
    inp, out = ints(128, 1000), ints(128)
    run("async_copy", FP16, 1, 32, out, inp)
    np.testing.assert_array_equal(out, np.where(np.arange(128) // 4 % 3, inp, 0)[::-1])
