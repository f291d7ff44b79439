"""CPU executor: runs unmodified kernels/*.cu files and unmodified llmc/cuda launchers on NumPy arrays, with g++ only."""

import ctypes
import functools
import hashlib
import json
import os
import re
import stat
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
DTYPE_DEFINE = {"float32": "ENABLE_FP32", "float16": "ENABLE_FP16", "bfloat16": "ENABLE_BF16"}
ORDERS = ("forward", "reverse", "random")
COMMON_FLAGS = ("-std=c++17", "-fPIC", "-g1", "-ffp-contract=off", "-fno-exceptions", "-fno-strict-aliasing", "-w")
FAST_FLAGS = ("-O2",)
lock = threading.Lock()  # the runtime's state is global


class KernelFault(Exception):
    """What a launch did wrong.

    kernel, kind, file, line, block, thread, array, index, orders are attributes; the message is one paragraph.
    """

    def __init__(self, message, **attributes):
        super().__init__(message)
        for name in ("kernel", "kind", "file", "line", "block", "thread", "array", "index"):
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


def key_of(*parts):
    digest = hashlib.sha256(gxx_version().encode())
    for part in parts:
        digest.update(b"\0" + (part if isinstance(part, bytes) else repr(part).encode()))
    return digest.hexdigest()[:20]


def build(target, *arguments, text=None):
    """Compiles to `target` unless it exists. Written beside it first, so that a second process never sees half a file."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    gxx(*arguments, "-shared", "-o", partial, text=text)
    os.replace(partial, target)


@functools.cache
def runtime():
    source = HERE / "runtime.cpp"
    path = cache_dir() / f"runtime-{key_of(source.read_bytes())}.so"
    if not path.exists():
        build(path, "-std=c++17", "-O3", "-g1", "-fPIC", "-ffp-contract=off", "-fno-exceptions", source)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.path = path
    return library


def balanced(text, start, open_="(", close=")"):
    """Index just past the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == open_) - (text[i] == close)
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced {open_} in {text[start:start + 80]!r}")


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
    """`__shared__ T name[N];` becomes a reference into the block's arena, `extern __shared__ T name[];` a pointer to its
    dynamic part. The number of lines stays."""
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
                raise ValueError(f"cannot read the declaration {match[0]!r}: one `type name[sizes]` or a list of them, please")
            type_ = declarator[1] if type_ is None else type_
            name, dims = declarator[2], declarator[3]
            if "extern" in before:
                out += f"{type_}* const {name} = ({type_}*)simt::simt_dynamic_shared({dynamic_align});"
            else:
                align = " , ".join([f"alignof(simt_type_{name})", *aligns, *more])
                out += (
                    f"static unsigned long long simt_key_{name}; typedef {type_} simt_type_{name}{dims};"
                    f"simt_type_{name}& {name} = *(simt_type_{name}*)simt::simt_shared(&simt_key_{name}, "
                    f'sizeof(simt_type_{name}), simt::largest({align}), "{name}", __builtin_FILE(), __builtin_LINE());'
                )
        return out.replace("\n", " ") + "\n" * match[0].count("\n")

    return SHARED.sub(replace, text)


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


TRAMPOLINE = """
extern "C" void simt_entry_{name}(void** args) {{ simt::call({name}, args); }}
extern "C" int simt_count_{name}() {{ return simt::count({name}); }}
extern "C" void simt_describe_{name}(simt::Param* out) {{ simt::describe({name}, out); }}
extern "C" int simt_bound_{name}() {{ return {bound}; }}
"""


@functools.cache
def load(file, dtype_name, defines, fast):
    """Compiles a kernel file, or finds it compiled -> (library, {kernel: parameter names})."""
    path = KERNELS / file
    folders = [path.parent, KERNELS, HERE / "include"]
    headers = [h for f in dict.fromkeys(folders) if f.is_dir() for p in ("*.cuh", "*.h") for h in sorted(f.glob(p))]
    options = [f"-D{DTYPE_DEFINE[dtype_name]}", "-DLLMC_SIMT", *(d if d.startswith("-") else f"-D{d}" for d in defines)]
    flags = [*COMMON_FLAGS, *FAST_FLAGS]
    key = key_of(path.read_bytes(), options, flags, str(runtime().path), str(path), (HERE / "__init__.py").read_bytes(),
                 *(h.read_bytes() for h in headers))  # fmt: skip
    target = cache_dir() / f"{path.stem}-{dtype_name}-{'fast' if fast else 'checked'}-{key}.so"
    described = target.with_suffix(".json")
    if not target.exists() or not described.exists():
        text = gxx("-E", "-x", "c++", "-std=c++17", *(f"-I{f}" for f in folders), *options, "-include", "simt_cuda.h", path)
        text, kernels = find_kernels(rewrite_shared(text))
        for name, (_, bound) in kernels.items():
            text += TRAMPOLINE.format(name=name, bound=bound or 1024)
        partial = described.with_name(f"{described.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps({name: names for name, (names, _) in kernels.items()}))
        build(target, *flags, "-x", "c++-cpp-output", "-", "-x", "none", runtime().path, text=text)
        os.replace(partial, described)
    runtime()
    return ctypes.CDLL(str(target)), json.loads(described.read_text())


# ----------------------------------------------------------------------------------------------------------------------
# Launch
# ----------------------------------------------------------------------------------------------------------------------


class Param(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("kind", "size", "pointee", "pointee_size", "constant")]


class Fault(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char * 40), ("text", ctypes.c_char * 1000), ("file", ctypes.c_char * 400), ("line", ctypes.c_int),
        ("has_thread", ctypes.c_int), ("block", ctypes.c_uint32 * 3), ("thread", ctypes.c_uint32 * 3),
        ("pc", ctypes.c_void_p), ("address", ctypes.c_void_p),
    ]  # fmt: skip


class Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p), ("args", ctypes.c_void_p), ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3),
        ("dynamic_bytes", ctypes.c_uint64), ("order", ctypes.c_int), ("seed", ctypes.c_uint32), ("checked", ctypes.c_int),
    ]  # fmt: skip


class Kernel:
    """One kernel of one compiled file; called like a CuPy RawKernel."""

    def __init__(self, library, name, parameter_names, smem):
        self.name, self.smem = name, smem
        self.entry = ctypes.cast(getattr(library, f"simt_entry_{name}"), ctypes.c_void_p)
        self.params = (Param * (getattr(library, f"simt_count_{name}")() + 1))()
        getattr(library, f"simt_describe_{name}")(self.params)
        self.names = parameter_names
        self.bound = getattr(library, f"simt_bound_{name}")()

    def fault(self, kind, text, **attributes):
        return KernelFault(f"{self.name}: {kind}: {text}", kernel=self.name, kind=kind, **attributes)

    def pack(self, args):
        """The launch's arguments as bytes, after a check of each against the kernel's signature."""
        if len(args) != len(self.names):
            raise self.fault("argument count", f"{len(args)} arguments for {len(self.names)} parameters ({', '.join(self.names)})")
        return [self.pack_one(p, n, a) for p, n, a in zip(self.params, self.names, args, strict=False)]

    def pack_one(self, param, name, arg):
        kind = chr(param.kind)
        if kind == "P":
            if arg is None:
                return np.uint64(0)
            if isinstance(arg, np.ndarray):
                pointee = chr(param.pointee)
                raw = pointee in "vSb" or param.pointee_size == 1 or arg.dtype.kind == "V" or arg.dtype == np.uint8
                if not raw and type_name(pointee, param.pointee_size) != arg.dtype.name:
                    raise self.mismatch(name, f"{type_name(pointee, param.pointee_size)}*", f"array of {arg.dtype.name}")
                return np.uint64(arg.ctypes.data)
            raise self.mismatch(name, "an array", f"{type(arg).__name__} {arg!r}")
        value = np.int64(arg) if type(arg) is int else np.float64(arg) if type(arg) is float else arg
        if kind == "S" and isinstance(value, np.ndarray | np.void) and value.dtype.kind == "V" and value.nbytes == param.size:
            return value
        if not isinstance(value, np.generic | bool) or np.dtype(type(value)).name != type_name(kind, param.size):
            given = value.dtype.name if isinstance(value, np.generic | np.ndarray) else type(arg).__name__
            given += " array" if isinstance(value, np.ndarray) else f" {arg!r}"
            raise self.mismatch(name, type_name(kind, param.size), given)
        return np.bool_(value) if isinstance(value, bool) else value

    def mismatch(self, name, expected, given):
        return self.fault("argument type", f"parameter `{name}` is {expected}, given {given}", array=name)

    def __call__(self, grid, block, args, shared_mem=0):
        grid, block = ([*(max(1, int(n)) for n in dims), 1, 1][:3] for dims in (grid, block))
        threads = block[0] * block[1] * block[2]
        if threads > min(1024, self.bound) or block[2] > 64:
            raise self.fault("launch", f"block {block} has {threads} threads; the limit is {min(1024, self.bound)}")
        if grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise self.fault("launch", f"grid {grid} exceeds (2^31-1, 65535, 65535)")
        if shared_mem > max(48 * 1024, self.smem):
            raise self.fault("launch", f"{shared_mem} bytes of dynamic shared memory; the limit is {max(48 * 1024, self.smem)}")
        values = self.pack(args)
        pointers = (ctypes.c_void_p * (len(values) + 1))()
        holders = [np.atleast_1d(v).copy() for v in values]
        for i, h in enumerate(holders):
            pointers[i] = h.ctypes.data
        with lock:
            self.run(pointers, grid, block, shared_mem, 0)

    def run(self, pointers, grid, block, shared_mem, order):
        fault = Fault()
        what = Launch(self.entry, ctypes.addressof(pointers), tuple(grid), tuple(block), shared_mem, order, 1, 0)
        if runtime().simt_launch(ctypes.byref(what), ctypes.byref(fault)):
            file, line = fault.file.decode(), fault.line
            where = f" at {Path(file).name}:{line}" if file else ""
            raise self.fault(fault.kind.decode(), f"{fault.text.decode()}{where} [block {tuple(fault.block)}]", file=file, line=line,
                             block=tuple(fault.block), thread=tuple(fault.thread) if fault.has_thread else None)  # fmt: skip


def type_name(kind, size):
    return {"f": f"float{8 * size}", "i": f"int{8 * size}", "u": f"uint{8 * size}", "b": "bool", "h": "float16",
            "B": "bfloat16", "S": f"a struct of {size} bytes"}[kind]  # fmt: skip


@functools.cache
def kernel(file, name, dtype, defines=(), smem=0, fast=True, **ignored):
    """The kernel `name` of kernels/<file>, compiled for `dtype` -> callable(grid, block, args, shared_mem=0)."""
    library, kernels = load(str(file), getattr(dtype, "name", dtype), tuple(defines), fast)
    if name not in kernels:
        raise KeyError(f"{file} has no kernel {name}. HINT: it has {', '.join(kernels)}")
    return Kernel(library, name, kernels[name], smem)
