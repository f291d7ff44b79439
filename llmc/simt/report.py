"""What a launch is told by: a fault as one paragraph with its place, traffic as rows."""

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

from .build import source_lines

NAMES = {"f": "float{}", "i": "int{}", "u": "uint{}", "b": "bool", "h": "float16", "B": "bfloat16"}


class FloatAtomicWarning(UserWarning):
    """A kernel used a floating-point atomic: its results may depend on timing."""


class KernelFault(Exception):
    """What a launch did wrong: one paragraph, and as attributes kernel, kind, file, line, block and thread (tuples of 3
    or None), array (argument or shared variable), index (its element) and other_line (of a race's other side)."""

    kernel: str
    kind: str
    file: str | None
    line: int | None
    block: tuple[int, int, int] | None
    thread: tuple[int, int, int] | None
    array: str | None
    index: int | None
    other_line: int | None

    def __init__(self, message: str, **attributes: Any):
        super().__init__(message)
        for name in ("kernel", "kind", "file", "line", "block", "thread", "array", "index", "other_line"):
            setattr(self, name, attributes.get(name))


class Access(ctypes.Structure):
    """One of the two sides of a race."""

    _fields_ = [
        ("time", ctypes.c_uint32),
        ("tid", ctypes.c_uint32),
        ("write", ctypes.c_int),
        ("granule", ctypes.c_uint64),
    ]


class Fault(ctypes.Structure):
    """What the runtime has found."""

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

    def explain(self, kernel: str, library: str, order: str, other_pc: int = 0) -> KernelFault:
        """The KernelFault of it. other_pc: where the other side of a race is, if that is known."""
        kind, array = self.kind.decode(), self.array.decode() or None
        where = [(self.file.decode(), self.line)] if self.line else []
        if self.pc:
            where = source_lines(library, [self.pc])[self.pc]
        other, other_line = "", None
        if other_pc and (lines := source_lines(library, [other_pc])[other_pc]):
            other, other_line = f"; the other access is at {describe_lines(lines)}", lines[0][1]
        block, thread = tuple(self.block), tuple(self.thread) if self.has_thread else None
        text = f"{self.text.decode()} at {describe_lines(where)}{other} (block {block}, {order} order)"
        file, line = where[0] if where else (None, None)
        place = {"file": file, "line": line, "other_line": other_line, "block": block, "thread": thread}
        return fault(kernel, kind, text, array=array, index=self.index if array else None, **place)


def fault(kernel: str, kind: str, text: str, **attributes: Any) -> KernelFault:
    return KernelFault(f"{kernel}: {kind}: {text}", kernel=kernel, kind=kind, **attributes)


def describe_lines(lines: list[tuple[str, int]]) -> str:
    return ", called from ".join(f"{Path(file).name}:{line}" for file, line in lines) or "an unknown line"


def type_name(kind: str, size: int) -> str:
    """NumPy's name for a kernel's parameter of that kind (include/simt_cuda.h) and size in bytes."""
    return f"a struct of {size} bytes" if kind == "S" else NAMES[kind].format(8 * size)


class Region(ctypes.Structure):
    """One array argument."""

    _fields_ = [
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("name", ctypes.c_char * 64),
        ("item_size", ctypes.c_int),
        ("read_only", ctypes.c_int),
    ]


class Counts(ctypes.Structure):
    """Traffic of one instruction on one array, as the runtime counts it."""

    _fields_ = [
        ("pc", ctypes.c_uint64),
        ("write", ctypes.c_int),
        ("array", ctypes.c_int),
        ("requests", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("units", ctypes.c_uint64),
        ("ideal", ctypes.c_uint64),
    ]


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


def rows_of(kernel: str, library: str, counts: Any, regions: Any, launch: int) -> list[Traffic]:
    """The counts of one launch, summed by source line and array."""
    lines = source_lines(library, [row.pc for row in counts]) if len(counts) else {}
    sums: dict[tuple, list[int]] = {}
    for row in counts:
        file, line = (lines[row.pc] or [("?", 0)])[0]
        key = (Path(file).name, line, "shared" if row.array < 0 else "global", bool(row.write), row.array)
        total = sums.setdefault(key, [0] * 4)
        for i, value in enumerate((row.requests, row.bytes, row.units, row.ideal)):
            total[i] += value
    rows = []
    for (file, line, space, write, array), total in sorted(sums.items()):
        name, size = ("", 0) if array < 0 else (regions[array].name.decode(), regions[array].end - regions[array].begin)
        requests, nbytes, units, ideal = total
        rows.append(Traffic(kernel, file, line, space, write, requests, nbytes, units, ideal, name, size, launch))
    return rows
