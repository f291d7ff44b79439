"""g++ and the libraries that it makes: the runtime, and one for each kernel file, dtype and set of defines.

They are kept in a folder of the system's temporary directory, keyed by everything they depend on: a second process
compiles nothing.
"""

import ctypes
import functools
import hashlib
import json
import os
import re
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmc.cuda.module import DTYPE_DEFINE, kernels_dir
from llmc.errors import UserError

from .translate import translate

HERE = Path(__file__).resolve().parent
COMMON_FLAGS = (
    "-std=c++17 -O2 -g1 -fPIC -ffp-contract=off -fno-exceptions -fno-rtti -fno-strict-aliasing -fno-gnu-unique -w"
).split()
CHECKED_FLAGS = (  # -fno-tree-sra: a 16-byte access stays one access
    "-fno-plt -fno-tree-sra -fsanitize=thread --param=tsan-instrument-func-entry-exit=0 -fno-sanitize-recover=all "
    "-fsanitize=alignment,bounds,object-size,integer-divide-by-zero,return,shift,signed-integer-overflow,unreachable"
).split()
CHECKED_LINK = ("-Wl,--wrap=memcpy,--wrap=memmove,--wrap=memset",)
RUNTIME_FLAGS = "-std=c++17 -O3 -march=native -g -fPIC -ffp-contract=off -fno-exceptions".split()
KEPT = 30 * 86400  # seconds that a library is kept after it was made


def cache_dir() -> Path:
    """A folder of ours under the temporary directory; refuses one that somebody else could write to."""
    folder = Path(tempfile.gettempdir()) / f"llmc-simt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder that only we can write to. HINT: remove it, or set TMPDIR")
    return folder


def gxx(*arguments: object, text: str | None = None) -> str:
    """What g++ prints. RuntimeError: g++'s own messages; UserError: there is no g++."""
    command = ["g++", *map(str, arguments)]
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("the CPU executor needs g++, which is not installed. HINT: apt install g++") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:6000]}")
    return done.stdout


@functools.cache
def gxx_version() -> str:
    return gxx("--version").splitlines()[0]


@functools.cache
def cpu_flags() -> str:
    """What -march=native depends on: a cache in a shared folder must not hand one machine's code to another."""
    return gxx("-march=native", "-Q", "--help=target")


def key_of(*parts: object) -> str:
    digest = hashlib.sha256(gxx_version().encode())
    for part in parts:
        digest.update(b"\0" + (part if isinstance(part, bytes) else repr(part).encode()))
    return digest.hexdigest()[:20]


def build(target: Path, *arguments: object, link: tuple[object, ...] = (), text: str | None = None) -> None:
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
            if old.stat().st_mtime < time.time() - KEPT:
                old.unlink()


@functools.cache
def runtime() -> Any:
    """runtime.cpp as a library. Kernel libraries are linked with its file, runtime()._name."""
    source = HERE / "runtime.cpp"
    parts = [path.read_bytes() for path in (source, *sorted((HERE / "runtime").glob("*.h")))]
    path = cache_dir() / f"runtime-{key_of(*parts, RUNTIME_FLAGS, cpu_flags())}.so"
    if not path.exists():
        build(path, *RUNTIME_FLAGS, source)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    for name in ("simt_memory", "simt_writers", "simt_arena_size", "simt_memory_size"):
        getattr(library, name).restype = ctypes.c_size_t
    return library


def kernel_file(file: str | Path) -> Path:
    """The path of a kernel file: one of kernels/, or any other that is there."""
    for path in (kernels_dir() / file, Path(file).absolute()):
        if path.is_file():
            return path
    raise UserError(f"no kernel file {str(file)!r}: neither in {kernels_dir()} nor in {Path.cwd()}")


@functools.cache
def load(
    path: Path, changed: int, dtype_name: str, defines: tuple[str, ...], fast: bool
) -> tuple[Any, dict[str, list[str]], int]:
    """Compiles a kernel file, or finds it compiled -> (library, {kernel: parameter names}, dynamic alignment).
    changed: when it did, for functools.cache."""
    folders = list(dict.fromkeys((path.parent, kernels_dir(), HERE / "include")))
    headers = [header for folder in folders for suffix in ("*.cuh", "*.h") for header in sorted(folder.glob(suffix))]
    options = [f"-D{DTYPE_DEFINE[dtype_name]}", "-DLLMC_SIMT", *(d if d.startswith("-") else f"-D{d}" for d in defines)]
    flags = [*COMMON_FLAGS, *(() if fast else CHECKED_FLAGS)]
    sources = [p.read_bytes() for p in (path, HERE / "translate.py", HERE / "build.py", *headers)]
    key = key_of(options, flags, runtime()._name, str(path), *sources)
    target = cache_dir() / f"{path.stem}-{dtype_name}-{'fast' if fast else 'checked'}-{key}.so"
    described = target.with_suffix(".json")
    if not target.exists() or not described.exists():
        include = [f"-I{folder}" for folder in folders]
        text = gxx("-E", "-x", "c++", "-std=c++17", *include, *options, "-include", "simt_cuda.h", path)
        translated = translate(text, [path.parent, kernels_dir()])
        partial = described.with_name(f"{described.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps([translated.kernels, translated.dynamic_align]))
        link = (runtime()._name, *(() if fast else CHECKED_LINK))
        build(target, *flags, "-x", "c++-cpp-output", "-", link=link, text=translated.text)
        os.replace(partial, described)
    kernels, dynamic_align = json.loads(described.read_text())
    return ctypes.CDLL(str(target)), kernels, dynamic_align


def source_lines(library: str, offsets: list[int]) -> dict[int, list[tuple[str, int]]]:
    """{return address: its source positions, innermost first, without the executor's own headers}."""
    addresses = [hex(offset - 1) for offset in offsets]
    text = subprocess.run(["addr2line", "-a", "-i", "-e", library, *addresses], capture_output=True, text=True).stdout
    found = {}
    for offset, part in zip(offsets, re.split(r"^0x[0-9a-f]+$", text, flags=re.M)[1:], strict=True):
        lines = [(file, int(line)) for file, line in re.findall(r"^(.*):(\d+)", part, re.M)]
        found[offset] = [(file, line) for file, line in lines if Path(file).parent != HERE / "include"]
    return found
