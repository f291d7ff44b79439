"""CPU executor: runs unmodified kernels/*.cu files and unmodified llmc/cuda launchers on NumPy arrays, with g++ only.

    kernel = simt.kernel("gelu.cu", "gelu_forward_kernel1", np.dtype("float32"))    as llmc.cuda.module.kernel
    kernel((grid,), (block,), (out, inp, np.int64(n)), shared_mem=0)                as a CuPy RawKernel, on NumPy arrays

A test puts it under the launchers with `monkeypatch.setattr(llmc.cuda.module, "kernel", simt.kernel)`. A launch returns
when it has ended; what it did wrong is raised as KernelFault and then leaves the arrays as they were.

How it works
    The file is preprocessed by g++, with include/ in the place of CUDA's headers: simt_cuda.h (threadIdx, vector types,
    intrinsics), cuda_bf16.h, cuda_fp16.h, simt_ptx.h (tensor cores, ldmatrix, cp.async; kernels/ptx.cuh includes it
    instead of its inline assembly when LLMC_SIMT is defined) and simt_ptx_sm90.h, likewise for ptx_sm90.cuh.
    `__shared__` declarations are rewritten into references to the block's shared memory; nothing else changes, lines
    keep their numbers. Compiled libraries are kept in a folder of the system's temporary directory, keyed by everything
    they depend on.
    runtime.cpp runs the blocks one after another and a block's threads as fibers: each runs until it waits for others.
    Every launch runs three times on fresh copies of its arrays, with threads and blocks in forward, reverse and seeded
    random order, and must leave the same bits.
    Array arguments are copied to places far from each other (overlapping ones together), at the address modulo 256 that
    they would have in device memory. g++ calls the runtime before every load and store (-fsanitize=thread without its
    library) and at undefined operations. The runtime knows for each two bytes who wrote and who read them last.

What it catches, with kernel, source line, block, thread, array and element
    out of bounds           an access outside the views given to the launch, or outside a shared variable; null pointers
    out of bounds, array    an index outside a C++ array, also where the access stays inside the memory
    misaligned access       vector loads and stores, ldmatrix, cp.async
    uninitialised read      of shared memory that this block has not written, or of an array marked by `poison`
    write to const          through a pointer that the kernel takes as const, or to a read-only array
    race                    two threads of a block on one element, one of them writing, with no barrier between; within
                            a warp __syncwarp orders memory, shuffles and votes do not (CUDA promises no more)
    race between blocks     the same for two blocks of a launch, unless an atomic on one address orders them, with
                            __threadfence before it (the pattern of the last block that adds up)
    cp.async in flight      data used before this thread waited for its group
    divergent barrier       __syncthreads that some threads do not reach, or at different lines
    divergent warp, warp mask, shuffle source    lanes of the mask that do not come, or are read and not in it
    undefined behaviour     signed overflow, shifts, division by zero
    assertion               assert() and __trap()
    order-dependent result  different bits in another thread order
    argument type, argument count, launch    CuPy checks none of these
    crash, timeout          without taking the process down
    Floating-point atomics are allowed and reported as FloatAtomicWarning.
    Of kernels for sm_90a (arch="sm_90a"), with kernel and line or array:
    timing-dependent result     different bits when TMA copies and wgmma happen as late as the waits allow, or with
                                other garbage in arrays that are marked by `poison`
    missing fence               stmatrix, then TMA or wgmma on the same bytes; ldmatrix, then a TMA load into them;
                                without fence_async between by the thread that wrote, or gave the row's address
    TMA load, TMA store, wgmma in flight    at the end of the thread or block
    deadlock                    mbarriers, named barriers

What it cannot see
    Timing and the hardware's memory model: every access takes effect at once and in program order, so a missing
    `volatile` or a fence of too small a scope inside a block goes unnoticed. Blocks that wait for each other do not end
    (timeout). Of several readers of an element only two are remembered, so a single order may miss a write after read.
    Neighbouring bytes of one 2-byte pair are told apart only for 1-byte accesses. Inline assembly, __device__ variables
    that are written, textures, clusters. Kernels for sm_90a (TMA, mbarriers, wgmma: simt_ptx_sm90.h) run unchecked:
    layouts, swizzles, the ring's logic and deadlocks show, and what was not waited for (above); races between ordinary
    accesses and accesses out of bounds do not, nor that a plain load or store in C++ lacks a fence_async before TMA
    comes to its bytes, or that a fence_async comes after the arrival that it should come before.
    Rounding of approximate instructions (__expf, rsqrtf) and the order of sums inside the tensor cores are the CPU's;
    denormals are flushed as with -ftz=true; a * b + c is not contracted. Registers, occupancy and speed.

Settings, `with simt.mode(...)`: orders=("forward",) for one run instead of three; fast=True compiles without
instrumentation and runs straight on the arrays: for whole models, after the ops were checked. `with simt.traffic() as
rows` counts sectors and bank conflicts per source line. `alloc` gives memory aligned as on a device.

Speed, one core, checked, per order: 50 to 90 million 4-byte accesses, 50 million lane-shuffles, 0.2 million
mma.m16n8k16 per second (1 GFLOP/s); fast mode is 4 to 10 times faster. g++ takes 0.5 to 2.5 s for a file.
"""

import ctypes
import functools
import hashlib
import json
import mmap
import os
import re
import stat
import subprocess
import tempfile
import threading
import time
import warnings
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
DTYPE_DEFINE = {"float32": "ENABLE_FP32", "float16": "ENABLE_FP16", "bfloat16": "ENABLE_BF16"}
ALL_ORDERS = ("forward", "reverse", "random")
COMMON_FLAGS = (
    "-std=c++17 -O2 -g1 -fPIC -ffp-contract=off -fno-exceptions -fno-rtti -fno-strict-aliasing -fno-gnu-unique -w"
).split()
CHECKED_FLAGS = (  # -fno-tree-sra: a 16-byte access stays one access
    "-fno-plt -fno-tree-sra -fsanitize=thread --param=tsan-instrument-func-entry-exit=0 -fno-sanitize-recover=all "
    "-fsanitize=alignment,bounds,integer-divide-by-zero,return,shift,signed-integer-overflow,unreachable"
).split()
CHECKED_LINK = ("-Wl,--wrap=memcpy,--wrap=memmove,--wrap=memset",)
RUNTIME_FLAGS = "-std=c++17 -O3 -march=native -g -fPIC -ffp-contract=off -fno-exceptions".split()
TIMEOUT = 300.0  # seconds of CPU time for one run of a launch

fast = False  # launches without any check, straight on the arrays
orders = ALL_ORDERS  # thread orders that each checked launch runs under
counted = None  # the list that `traffic` collects in
lock = threading.Lock()  # the runtime's state is global


@contextmanager
def mode(**settings):
    """`with simt.mode(fast=True)` or `with simt.mode(orders=("forward",))`: settings of the launches inside."""
    before = {name: globals()[name] for name in settings}
    globals().update(settings)
    try:
        yield
    finally:
        globals().update(before)


class FloatAtomicWarning(UserWarning):
    """A kernel used a floating-point atomic: its results may depend on timing."""


class KernelFault(Exception):
    """What a launch did wrong: one paragraph, and as attributes kernel, kind, file, line, block and thread (tuples of 3
    or None), array (argument or shared variable), index (its element) and other_line (of a race's other side)."""

    def __init__(self, message, **attributes):
        super().__init__(message)
        for name in ("kernel", "kind", "file", "line", "block", "thread", "array", "index", "other_line"):
            setattr(self, name, attributes.get(name))


# ----------------------------------------------------------------------------------------------------------------------
# Compilation
# ----------------------------------------------------------------------------------------------------------------------


def cache_dir():
    """A folder of ours under the temporary directory; refuses one that somebody else could write to."""
    folder = Path(tempfile.gettempdir()) / f"llmc-simt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder that only we can write to. HINT: remove it, or set TMPDIR")
    return folder


def gxx(*arguments, text=None):
    done = subprocess.run(["g++", *map(str, arguments)], input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ {' '.join(map(str, arguments))}\n{done.stderr[:6000]}")
    return done.stdout


@functools.cache
def gxx_version():
    return gxx("--version").splitlines()[0]


@functools.cache
def cpu_flags():
    """What -march=native depends on: a cache in a shared folder must not hand one machine's code to another."""
    return gxx("-march=native", "-Q", "--help=target")


def key_of(*parts):
    digest = hashlib.sha256(gxx_version().encode())
    for part in parts:
        digest.update(b"\0" + (part if isinstance(part, bytes) else repr(part).encode()))
    return digest.hexdigest()[:20]


def build(target, *arguments, link=(), text=None):
    """Compiles to the shared library `target`. Written beside it first: a second process never sees half a file. Linked
    in a step of its own, because g++ -fsanitize=thread would add libtsan. Clears away what is a month old."""
    stem = f"{target.name}.{os.getpid()}"
    object_, partial = target.with_name(f"{stem}.o"), target.with_name(f"{stem}.partial")
    try:
        gxx("-c", "-o", object_, *arguments, text=text)
        gxx("-shared", "-o", partial, object_, *link)
        os.replace(partial, target)
    finally:
        object_.unlink(missing_ok=True)
    for old in target.parent.iterdir():
        with suppress(FileNotFoundError):  # another process clears away too
            if old.stat().st_mtime < time.time() - 30 * 86400:
                old.unlink()


@functools.cache
def runtime():
    source = HERE / "runtime.cpp"
    path = cache_dir() / f"runtime-{key_of(source.read_bytes(), RUNTIME_FLAGS, cpu_flags())}.so"
    if not path.exists():
        build(path, *RUNTIME_FLAGS, source)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.path = path
    for name in ("simt_memory", "simt_writers", "simt_arena_size", "simt_memory_size"):
        getattr(library, name).restype = ctypes.c_size_t
    return library


def balanced(text, start, open_="(", close=")"):
    """Index just past the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == open_) - (text[i] == close)
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced {open_} in {text[start : start + 80]!r}")


def split_commas(text):
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in [*parts, text[start:]] if p.strip()]


ALIGNAS = re.compile(r"\balignas\s*(?=\()")
SHARED = re.compile(r"((?:\b(?:extern|static|alignas\s*\((?:[^()]|\([^()]*\))*\))\s*)*)\b__shared__\b([^;]*);")
DECLARATOR = re.compile(r"(.*?[\s*&>])?(\w+)\s*((?:\[[^\]]*\]\s*)*)", re.S)


def take_alignas(text):
    """(text without alignas(...), their arguments)."""
    found = []
    while match := ALIGNAS.search(text):
        end = balanced(text, match.end())
        found.append(text[match.end() + 1 : end - 1])
        text = text[: match.start()] + text[end:]
    return text, found


def rewrite_shared(text):
    """(text, alignment of dynamic shared memory): `__shared__ T name[N];` becomes a reference into the block's shared
    memory, `extern __shared__ T name[];` a pointer to its dynamic part. The number of lines stays."""
    dynamic_align = 16
    for match in SHARED.finditer(text):
        if "extern" in match[1]:
            dynamic_align = max([dynamic_align, *map(int, re.findall(r"alignas\s*\(\s*(\d+)\s*\)", match[0]))])

    def replace(match):
        before, aligns = take_alignas(match[1])
        after, more = take_alignas(match[2])
        type_, out = None, ""
        for part in split_commas(after):
            declarator = DECLARATOR.fullmatch(part)
            if declarator is None:
                raise ValueError(
                    f"cannot read the declaration {match[0]!r}: one `type name[sizes]` or a list of them, please"
                )
            type_ = declarator[1] if type_ is None else type_
            name, dims = declarator[2], declarator[3]
            if "extern" in before:
                call = f'simt::simt_dynamic_shared({dynamic_align}, "{name}", sizeof({type_}))'
                out += f"{type_}* const {name} = ({type_}*){call};"
            else:
                align = " , ".join([f"alignof(simt_type_{name})", *aligns, *more])
                out += (
                    f"static unsigned long long simt_key_{name}; typedef {type_} simt_type_{name}{dims};"
                    f"simt_type_{name}& {name} = *(simt_type_{name}*)simt::simt_shared("
                    f"&simt_key_{name}, sizeof(simt_type_{name}), simt::largest({align}), "
                    f'simt::Element<simt_type_{name}>::size, "{name}", __builtin_FILE(), __builtin_LINE());'
                )
        return out.replace("\n", " ") + "\n" * match[0].count("\n")

    return SHARED.sub(replace, text), dynamic_align


def find_kernels(text):
    """(text without CUDA's function attributes, {kernel: (parameter names, launch bound expression)})."""
    found = {}
    while match := re.search(r"\b__global__\b", text):
        end = text.index("(", match.end())
        bound = None
        head = text[match.end() : end]
        if "__launch_bounds__" in head:
            close = balanced(text, end)
            bound = split_commas(text[end + 1 : close - 1])[0]
            start = text.index("__launch_bounds__", match.end())
            text = text[:start] + re.sub(r"[^\n]", " ", text[start:close]) + text[close:]
            end = text.index("(", close)
        name = re.search(r"(\w+)\s*$", text[match.end() : end])[1]
        parameters = split_commas(text[end + 1 : balanced(text, end) - 1])
        found[name] = ([re.search(r"(\w+)\s*(?:\[[^\]]*\])?$", p)[1] for p in parameters if p != "void"], bound)
        text = text[: match.start()] + " " * len("__global__") + text[match.end() :]
    return re.sub(r"\b__launch_bounds__\s*\([^)]*\)", "", text), found


UNCHECKED = '__attribute__((no_sanitize("thread", "undefined")))'
TRAMPOLINE = """
extern "C" {unchecked} void simt_entry_{name}(void** args) {{ simt::call({name}, args); }}
extern "C" {unchecked} void simt_describe_{name}(simt::Param* out) {{ simt::describe({name}, out); }}
extern "C" int simt_count_{name}() {{ return simt::count({name}); }}
extern "C" int simt_bound_{name}() {{ return {bound}; }}
"""


@functools.cache
def load(file, dtype_name, defines, fast):
    """Compiles a kernel file, or finds it compiled -> (library, {kernel: parameter names}, dynamic alignment)."""
    path = KERNELS / file
    folders = [path.parent, KERNELS, HERE / "include"]
    headers = [h for f in dict.fromkeys(folders) if f.is_dir() for p in ("*.cuh", "*.h") for h in sorted(f.glob(p))]
    options = [f"-D{DTYPE_DEFINE[dtype_name]}", "-DLLMC_SIMT", *(d if d.startswith("-") else f"-D{d}" for d in defines)]
    flags = [*COMMON_FLAGS, *(() if fast else CHECKED_FLAGS)]
    key = key_of(
        path.read_bytes(),
        options,
        flags,
        str(runtime().path),
        str(path),
        Path(__file__).read_bytes(),
        *(h.read_bytes() for h in headers),
    )
    target = cache_dir() / f"{path.stem}-{dtype_name}-{'fast' if fast else 'checked'}-{key}.so"
    described = target.with_suffix(".json")
    if not target.exists() or not described.exists():
        text = gxx(
            "-E", "-x", "c++", "-std=c++17", *(f"-I{f}" for f in folders), *options, "-include", "simt_cuda.h", path
        )
        text, dynamic_align = rewrite_shared(text)
        text, kernels = find_kernels(text)
        for name, (_, bound) in kernels.items():
            text += TRAMPOLINE.format(name=name, bound=bound or 1024, unchecked=UNCHECKED)
        partial = described.with_name(f"{described.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps([{name: names for name, (names, _) in kernels.items()}, dynamic_align]))
        build(
            target,
            *flags,
            "-x",
            "c++-cpp-output",
            "-",
            link=(runtime().path, *(() if fast else CHECKED_LINK)),
            text=text,
        )
        os.replace(partial, described)
    return ctypes.CDLL(str(target)), *json.loads(described.read_text())


def source_lines(library, offsets):
    """{return address: its source positions, innermost first, without the executor's own headers}."""
    addresses = [hex(offset - 1) for offset in offsets]
    text = subprocess.run(["addr2line", "-a", "-i", "-e", library, *addresses], capture_output=True, text=True).stdout
    found = {}
    for offset, part in zip(offsets, re.split(r"^0x[0-9a-f]+$", text, flags=re.M)[1:], strict=True):
        lines = [(file, int(line)) for file, line in re.findall(r"^(.*):(\d+)", part, re.M)]
        found[offset] = [(file, line) for file, line in lines if Path(file).parent != HERE / "include"]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------

NEVER_WRITTEN = 0xFFFFFFFE
poisoned = {}  # address: (end, mask per 2 bytes, of what nothing has written)


def poison(array):
    """From now on the array counts as never written: a kernel that reads an element before a kernel wrote it is at
    fault. Writes from Python are not seen: `unpoison` afterwards."""
    begin, end = np.lib.array_utils.byte_bounds(array)
    unpoison(array)
    poisoned[begin] = (end, np.ones((end - begin + 1) // 2, bool))
    weakref.finalize(owner(array), poisoned.pop, begin, None)


def unpoison(array):
    """The array counts as written."""
    begin, end = np.lib.array_utils.byte_bounds(array)
    for at, (stop, mask) in list(poisoned.items()):
        if at < end and begin < stop:
            mask[max(0, begin - at) // 2 : max(0, end - at + 1) // 2] = False
            if not mask.any():
                del poisoned[at]


def poisoned_bytes(begin, end):
    """Which bytes from `begin` to `end` nothing has written: an array of bool."""
    found = np.zeros(end - begin, bool)
    for at, (stop, mask) in poisoned.items():
        low, high = max(at, begin), min(stop, end)
        if low < high:
            found[low - begin : high - begin] = np.repeat(mask, 2)[low - at : high - at]
    return found


def unpoison_bytes(begin, written):
    """The bytes from `begin` on that `written` marks, and with them their pairs, count as written."""
    for at, (stop, mask) in poisoned.items():
        low, high = max(at, begin), min(stop, begin + written.size)
        if low < high:
            pairs = np.zeros(2 * mask.size, bool)
            pairs[low - at : high - at] = written[low - begin : high - begin]
            mask &= ~pairs.reshape(-1, 2).any(axis=1)


def alloc(nbytes):
    """Zeroed bytes at a multiple of 256, like device memory: what the fixture gives llmc.cuda.device.alloc."""
    return np.frombuffer(mmap.mmap(-1, max(1, nbytes)), np.uint8)[:nbytes]


def owner(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def memory_at(address, nbytes, dtype=np.uint8):
    return np.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype)


class Group:
    """Arrays of one launch that overlap. They are copied to one place in the runtime's memory, far from all others, so
    that a step past the end of a view is seen even if the next view begins there."""

    def __init__(self, begin, end, array, read_only):
        self.begin, self.end, self.read_only = begin, end, read_only
        self.arrays = []  # (number of the argument, name, array, begin, end)
        # Distance to a multiple of 256: of the address, or of the offset in the owner, which CuPy would align so.
        offsets = (begin % 256, (begin - owner(array).ctypes.data) % 256)
        self.alignment = max(offsets, key=lambda n: n & -n or 256)

    def place(self, cursor):
        """Chooses the copy's address at or after `cursor` -> the next cursor."""
        self.at = -(-cursor // 256) * 256 + self.alignment
        nbytes = self.end - self.begin
        self.host, self.device = memory_at(self.begin, nbytes), memory_at(self.at, nbytes)
        return self.at + nbytes + min(max(nbytes, 4096), 1 << 20)

    def shadow(self, begin, end):
        """The writer records of host addresses [begin, end), one per 2 bytes."""
        offset = begin - self.begin + self.at - runtime().simt_memory()
        return memory_at(runtime().simt_writers() + offset // 2 * 4, (end - begin + 1) // 2 * 4, np.uint32)

    def poisoned_parts(self):
        for at, (stop, mask) in poisoned.items():
            begin, end = max(at, self.begin), min(stop, self.end)
            if begin < end:
                yield self.shadow(begin, end), mask[(begin - at) // 2 : (end - at + 1) // 2]

    def fill(self, again):
        """Copies the arrays in, unless they cannot have changed since the last run; marks what nothing has written."""
        if not (again and self.read_only):
            self.device[:] = self.host
        for shadow, mask in self.poisoned_parts():
            shadow[mask] = NEVER_WRITTEN

    def written(self):
        """Takes over what the kernels wrote."""
        for shadow, mask in self.poisoned_parts():
            mask &= shadow == NEVER_WRITTEN
        if not self.read_only:
            self.host[:] = self.device


def group_arrays(arrays):
    """[(number, name, array, read_only)] -> groups of overlapping ones, placed."""
    spans = sorted((*np.lib.array_utils.byte_bounds(a), i, n, a, ro) for i, n, a, ro in arrays if a.size)
    groups = []
    for begin, end, number, name, array, read_only in sorted(spans, key=lambda s: (s[0], -s[1])):
        if not groups or begin >= groups[-1].end:
            groups.append(Group(begin, end, array, read_only))
        group = groups[-1]
        group.end = max(group.end, end)
        group.read_only &= read_only
        group.arrays.append((number, name, array, begin, end))
    cursor = runtime().simt_memory() + runtime().simt_arena_size() + (1 << 20)
    for group in groups:
        cursor = group.place(cursor)
    if cursor > runtime().simt_memory() + runtime().simt_memory_size():
        raise MemoryError(
            "the launch's arrays exceed the executor's memory. HINT: smaller shapes, or simt.mode(fast=True)"
        )
    return groups


# ----------------------------------------------------------------------------------------------------------------------
# Launch
# ----------------------------------------------------------------------------------------------------------------------


class Param(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("kind", "size", "pointee", "pointee_size", "constant")]


class Access(ctypes.Structure):
    _fields_ = [
        ("time", ctypes.c_uint32),
        ("tid", ctypes.c_uint32),
        ("write", ctypes.c_int),
        ("granule", ctypes.c_uint64),
    ]


class Fault(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char * 40),
        ("text", ctypes.c_char * 1000),
        ("file", ctypes.c_char * 400),
        ("line", ctypes.c_int),
        ("has_thread", ctypes.c_int),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("pc", ctypes.c_uint64),
        ("array", ctypes.c_char * 80),
        ("index", ctypes.c_longlong),
        ("other", Access),
        ("other_pc", ctypes.c_uint64),
    ]


class Region(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("name", ctypes.c_char * 64),
        ("item_size", ctypes.c_int),
        ("read_only", ctypes.c_int),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_bytes", ctypes.c_uint64),
        ("dynamic_align", ctypes.c_uint64),
        ("declared_bytes", ctypes.c_uint64),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint32),
        ("late", ctypes.c_int),
        ("checked", ctypes.c_int),
        ("hopper", ctypes.c_int),
        ("timeout", ctypes.c_double),
        ("counting", ctypes.c_int),
        ("watching", ctypes.c_int),
        ("watched", Access),
        ("regions", ctypes.c_void_p),
        ("region_count", ctypes.c_int),
    ]


class Counts(ctypes.Structure):
    _fields_ = [("pc", ctypes.c_uint64), ("write", ctypes.c_int), ("array", ctypes.c_int)]
    _fields_ += [(n, ctypes.c_uint64) for n in ("requests", "bytes", "units", "ideal")]


class Traffic(NamedTuple):
    """What the accesses of a source line to an array cost, all blocks and warps together, as a warp would make them."""

    kernel: str
    file: str
    line: int
    space: str  # "global" | "shared"
    write: bool
    requests: int  # warp-wide
    bytes: int  # that the lanes asked for
    units: int  # 32-byte sectors of global memory, wavefronts of shared memory
    ideal: int  # the fewest sectors for so many bytes, wavefronts without bank conflicts
    array: str  # the kernel's name for it, "" for shared memory
    array_bytes: int
    launch: int  # number of the launch since `traffic` began


@contextmanager
def traffic():
    """`with simt.traffic() as rows`: every launch inside adds its Traffic rows. One thread order, checked."""
    global counted
    with mode(fast=False, orders=("forward",)):
        counted, before = [], counted
        try:
            yield counted
        finally:
            counted = before


class Compiled:
    """One kernel in one compiled library."""

    def __init__(self, file, name, dtype_name, defines, fast):
        library, kernels, self.dynamic_align = load(file, dtype_name, defines, fast)
        if name not in kernels:
            raise KeyError(f"{file} has no kernel {name}. HINT: it has {', '.join(kernels)}")
        self.path, self.names = library._name, kernels[name]
        self.entry = ctypes.cast(getattr(library, f"simt_entry_{name}"), ctypes.c_void_p)
        self.params = (Param * (getattr(library, f"simt_count_{name}")() + 1))()
        getattr(library, f"simt_describe_{name}")(self.params)
        self.bound = getattr(library, f"simt_bound_{name}")()


class Kernel:
    """One kernel of one file and dtype; called like a CuPy RawKernel. Compiled on the first launch in each mode."""

    def __init__(self, file, name, dtype_name, defines, smem, hopper):
        self.file, self.name, self.dtype_name, self.defines, self.smem = file, name, dtype_name, defines, smem
        self.hopper = hopper  # uses what is defined in simt_ptx_sm90.h
        self.compiled = {}

    def fault(self, kind, text, **attributes):
        return KernelFault(f"{self.name}: {kind}: {text}", kernel=self.name, kind=kind, **attributes)

    def __call__(self, grid, block, args, shared_mem=0):
        unchecked = fast or self.hopper
        if unchecked not in self.compiled:
            self.compiled[unchecked] = Compiled(self.file, self.name, self.dtype_name, self.defines, unchecked)
        code = self.compiled[unchecked]
        grid, block = ([*(max(1, int(n)) for n in dims), 1, 1][:3] for dims in (grid, block))
        self.check_launch(code, grid, block, shared_mem)
        values, arrays = self.pack(code, args)
        pointers = (ctypes.c_void_p * (len(values) + 1))()
        for i, value in enumerate(values):
            pointers[i] = value.ctypes.data
        launch = Launch(
            code.entry,
            ctypes.addressof(pointers),
            tuple(grid),
            tuple(block),
            int(shared_mem),
            code.dynamic_align,
            self.smem,
            0,
            1,
            0,
            not unchecked,
            self.hopper,
            TIMEOUT,
        )
        with lock:
            if unchecked:
                for i, _, array, _ in arrays:
                    values[i][0] = array.ctypes.data
                if fast:
                    self.run(code, launch, "forward")
                else:
                    self.run_timings(code, launch, values, [array for _, _, array, _ in arrays])
            else:
                self.run_checked(code, launch, values, arrays)

    def check_launch(self, code, grid, block, shared_mem):
        threads, most = block[0] * block[1] * block[2], min(1024, code.bound)
        if threads > most or block[2] > 64:
            raise self.fault("launch", f"block {tuple(block)} has {threads} threads; the limit is {most}")
        if grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise self.fault("launch", f"grid {tuple(grid)} exceeds (2147483647, 65535, 65535)")
        most = 48 * 1024 if self.smem <= 48 * 1024 else 227 * 1024
        if shared_mem > most:
            raise self.fault(
                "launch", f"{shared_mem} bytes of dynamic shared memory; the limit is {most}. HINT: kernel(..., smem=)"
            )

    def pack(self, code, args):
        """(argument values as arrays of one element, [(number, name, array, read only)]), each checked against the
        kernel's signature. CuPy checks nothing: a Python int arrives as 8 bytes whatever the kernel declares."""
        if len(args) != len(code.names):
            raise self.fault(
                "argument count", f"{len(args)} arguments for {len(code.names)} parameters ({', '.join(code.names)})"
            )
        values, arrays = [], []
        for i, (param, name, arg) in enumerate(zip(code.params, code.names, args, strict=False)):
            kind = chr(param.kind)
            if kind == "P":
                self.check_pointer(param, name, arg)
                if arg is not None:
                    arrays.append((i, name, arg, bool(param.constant) or not arg.flags.writeable))
                values.append(np.zeros(1, np.uint64))
            elif kind == "S" and getattr(arg, "nbytes", 0) == param.size and np.asarray(arg).dtype.kind == "V":
                values.append(np.array(arg).reshape(1))
            else:
                values.append(self.scalar(type_name(kind, param.size), name, arg))
        return values, arrays

    def check_pointer(self, param, name, arg):
        if arg is None:
            return
        if not isinstance(arg, np.ndarray):
            raise self.mismatch(name, "a pointer", f"{type(arg).__name__} {arg!r}")
        pointee = chr(param.pointee)
        raw = pointee in "vSPb" or param.pointee_size == 1 or arg.dtype.type is np.void or arg.dtype.itemsize == 1
        if not raw and type_name(pointee, param.pointee_size) != arg.dtype.name:
            raise self.mismatch(name, f"{type_name(pointee, param.pointee_size)}*", f"an array of {arg.dtype.name}")

    def scalar(self, expected, name, arg):
        value = np.int64(arg) if type(arg) is int else np.float64(arg) if type(arg) is float else arg
        value = np.bool_(value) if isinstance(value, bool) else value
        if not isinstance(value, np.generic) or value.dtype.name != expected:
            given = (
                f"an array of {value.dtype.name}"
                if isinstance(value, np.ndarray)
                else f"{np.asarray(value).dtype.name} {arg!r}"
            )
            raise self.mismatch(name, expected, given)
        return np.array([value])

    def mismatch(self, name, expected, given):
        return self.fault("argument type", f"parameter `{name}` is {expected}, given {given}", array=name)

    def run_checked(self, code, launch, values, arrays):
        """Runs the launch under each thread order, each time on fresh copies of the arrays, and compares every byte."""
        groups = group_arrays(arrays)
        regions = (Region * (len(arrays) + 1))()
        count = 0
        for group in groups:
            for i, name, array, begin, end in group.arrays:
                values[i][0] = begin - group.begin + group.at
                regions[count] = Region(
                    int(values[i][0]),
                    int(values[i][0]) + end - begin,
                    name.encode()[:63],
                    array.itemsize,
                    group.read_only,
                )
                count += 1
        for i, _, array, _ in arrays:
            if array.size == 0:
                values[i][0] = 64  # no element may be touched
        launch.regions, launch.region_count = ctypes.addressof(regions), count
        first = None
        for n, order in enumerate(orders):
            self.prepare(groups, regions, count, n > 0)
            self.run(code, launch, order, lambda: self.prepare(groups, regions, count, True))
            if n == 0 and len(orders) > 1:
                first = [None if g.read_only else g.device.copy() for g in groups]
            elif n > 0:
                self.compare(groups, first, orders[0], order)
        for group in groups:
            group.written()

    def run_timings(self, code, launch, values, arrays):
        """A kernel of Hopper's units, on the arrays themselves: everything at once in the first thread order, as late
        as the waits allow in the others. The bits must agree; after a fault the arrays are as they were."""
        spans = {np.lib.array_utils.byte_bounds(a) for a in arrays if a.size}
        for address, rows, columns, *_ in (v.view(np.uint64) for v in values if v.dtype.kind == "V"):  # tensor maps
            spans.add((int(address), int(address + rows * columns * 2)))
        views = [memory_at(begin, end - begin) for begin, end in sorted(spans)]
        before = [view.copy() for view in views]
        garbage = [poisoned_bytes(view.ctypes.data, view.ctypes.data + view.size) for view in views]
        unwritten, first = [mask.copy() for mask in garbage], None
        try:
            for n, order in enumerate(orders):
                for view, was, mask in zip(views, before, garbage, strict=True):
                    view[:] = was
                    view[mask] = 0xA5 if n else 0x5A  # what is written has the same bits in spite of it
                launch.late = n > 0
                self.run(code, launch, order)
                first = first or [view.copy() for view in views]
                for view, was, mask in zip(views, first, unwritten, strict=True):
                    mask &= (was == 0x5A) & (view == (0xA5 if n else 0x5A))
                    differs = (view != was) & ~mask
                    if differs.any():
                        text = f"byte {int(np.argmax(differs))} of an array of {view.size} bytes"
                        text += f" differs when copies and products are late (threads in {order} order)"
                        raise self.fault("timing-dependent result", text)
        except KernelFault:
            for view, was in zip(views, before, strict=True):
                view[:] = was
            raise
        for view, was, mask in zip(views, before, unwritten, strict=True):
            view[mask] = was[mask]
            unpoison_bytes(view.ctypes.data, ~mask)

    def prepare(self, groups, regions, count, again):
        runtime().simt_prepare(ctypes.byref(regions), count)
        for group in groups:
            group.fill(again)

    def compare(self, groups, first, first_order, order):
        for group, expected in zip(groups, first, strict=True):
            if expected is None or np.array_equal(expected, group.device):
                continue
            byte = int(np.argmax(expected != group.device))
            _, name, array, begin, _ = next(a for a in group.arrays if a[3] <= group.begin + byte < a[4])
            index = (group.begin + byte - begin) // array.itemsize
            start = byte - (group.begin + byte - begin) % array.itemsize
            one, two = (b[start : start + array.itemsize].copy().view(array.dtype)[0] for b in (expected, group.device))
            raise self.fault(
                "order-dependent result",
                f"element {index} of `{name}` is {one!r} with threads in {first_order} order "
                f"and {two!r} in {order} order",
                array=name,
                index=index,
            )

    def run(self, code, launch, order, prepare_again=None):
        launch.order, launch.watching, launch.counting = ALL_ORDERS.index(order), 0, counted is not None
        fault, float_atomic = Fault(), ctypes.c_uint64()
        failed = runtime().simt_launch(ctypes.byref(launch), ctypes.byref(fault), ctypes.byref(float_atomic))
        if float_atomic.value:
            where = describe_lines(source_lines(code.path, [float_atomic.value])[float_atomic.value])
            warnings.warn(f"{self.name}: floating-point atomic at {where}", FloatAtomicWarning, stacklevel=4)
        if failed:
            raise self.explain(code, launch, order, fault, prepare_again)
        if counted is not None:
            self.count(code, launch)

    def explain(self, code, launch, order, fault, prepare_again):
        """The KernelFault for what the runtime has found."""
        kind, array = fault.kind.decode(), fault.array.decode() or None
        where = [(fault.file.decode(), fault.line)] if fault.line else []
        if fault.pc:
            where = source_lines(code.path, [fault.pc])[fault.pc]
        other, other_line = "", None
        if kind.startswith("race"):  # the same run again, watching for the other side
            launch.watching, launch.watched = 1, fault.other
            prepare_again()
            again = Fault()
            runtime().simt_launch(ctypes.byref(launch), ctypes.byref(again), ctypes.byref(ctypes.c_uint64()))
            if again.other_pc and (lines := source_lines(code.path, [again.other_pc])[again.other_pc]):
                other, other_line = f"; the other access is at {describe_lines(lines)}", lines[0][1]
        block, thread = tuple(fault.block), tuple(fault.thread) if fault.has_thread else None
        text = f"{fault.text.decode()} at {describe_lines(where)}{other} (block {block}, {order} order)"
        file, line = where[0] if where else (None, None)
        where = {"file": file, "line": line, "other_line": other_line, "block": block, "thread": thread}
        return self.fault(kind, text, array=array, index=fault.index if array else None, **where)

    def count(self, code, launch):
        """Adds the launch's traffic to `counted`, by source line and array."""
        size = runtime().simt_traffic(None, 0)
        rows = (Counts * size)()
        runtime().simt_traffic(ctypes.byref(rows), size)
        lines = source_lines(code.path, [row.pc for row in rows]) if size else {}
        regions = ctypes.cast(launch.regions, ctypes.POINTER(Region))
        number = counted[-1].launch + 1 if counted else 0
        sums = {}
        for row in rows:
            file, line = (lines[row.pc] or [("?", 0)])[0]
            key = (Path(file).name, line, "shared" if row.array < 0 else "global", bool(row.write), row.array)
            total = sums.setdefault(key, [0] * 4)
            for i, value in enumerate((row.requests, row.bytes, row.units, row.ideal)):
                total[i] += value
        for (*key, array), total in sorted(sums.items()):
            region = regions[array] if array >= 0 else None
            where = (region.name.decode(), region.end - region.begin) if region else ("", 0)
            counted.append(Traffic(self.name, *key, *total, *where, number))


def describe_lines(lines):
    return ", called from ".join(f"{Path(file).name}:{line}" for file, line in lines) or "an unknown line"


def type_name(kind, size):
    return {
        "f": f"float{8 * size}",
        "i": f"int{8 * size}",
        "u": f"uint{8 * size}",
        "b": "bool",
        "h": "float16",
        "B": "bfloat16",
        "S": f"a struct of {size} bytes",
    }[kind]


@functools.cache
def kernel(file, name, dtype, defines=(), smem=0, arch=None, strict=False):
    """The kernel `name` of kernels/<file>, compiled for `dtype` -> callable(grid, block, args, shared_mem=0).
    Mirrors llmc.cuda.module.kernel; `file` may also be an absolute path."""
    return Kernel(str(file), name, getattr(dtype, "name", dtype), tuple(defines), smem, arch == "sm_90a")


def tensor_map(array, rows, columns, box_rows):
    """Mirrors llmc.cuda.module.tensor_map; simt_ptx_sm90.h reads it."""
    return np.array([array.ctypes.data, rows, columns, box_rows, *[0] * 12], np.uint64).view("V128")
