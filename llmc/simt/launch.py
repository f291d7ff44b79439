"""Kernels that are called like CuPy's, on NumPy arrays: arguments are checked, the launch runs under several thread
orders, what it did wrong is raised."""

import ctypes
import functools
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .build import kernel_file, load, runtime, source_lines
from .memory import group_arrays, memory_at, poisoned_bytes, unpoison_bytes
from .report import (
    Access,
    Counts,
    Fault,
    FloatAtomicWarning,
    KernelFault,
    Region,
    Traffic,
    describe_lines,
    fault,
    rows_of,
    type_name,
)

ALL_ORDERS = ("forward", "reverse", "random")
lock = threading.Lock()  # the runtime's state is global


class Mode:
    """How launches run; `mode` and `traffic` change it."""

    fast = False  # without any check, straight on the arrays
    orders: Sequence[str] = ALL_ORDERS  # thread orders that each checked launch runs under
    timeout = 300.0  # seconds of CPU time for one run of a launch
    patience = 8.0  # seconds of CPU time in which a thread ends, or an element is touched for the first time
    counted: list[Traffic] | None = None  # the list that `traffic` collects in


@contextmanager
def mode(**settings: Any) -> Iterator[None]:
    """`with simt.mode(fast=True)`, `with simt.mode(orders=("forward",))`, `with simt.mode(patience=1)`: settings of
    the launches inside."""
    before = {name: getattr(Mode, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(Mode, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(Mode, name, value)


@contextmanager
def traffic() -> Iterator[list[Traffic]]:
    """`with simt.traffic() as rows`: every launch inside adds its Traffic rows. One thread order, checked."""
    rows: list[Traffic] = []
    with mode(fast=False, orders=("forward",), counted=rows):
        yield rows


class Param(ctypes.Structure):
    """A kernel's parameter, as include/simt_cuda.h describes it."""

    _fields_ = [(n, ctypes.c_int) for n in ("kind", "size", "pointee", "pointee_size", "constant")]


class Launch(ctypes.Structure):
    """What the runtime has to know of a launch. Keep in step with runtime.cpp."""

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
        ("followed", ctypes.c_int),
        ("timeout", ctypes.c_double),
        ("patience", ctypes.c_double),
        ("counting", ctypes.c_int),
        ("watching", ctypes.c_int),
        ("watched", Access),
        ("regions", ctypes.c_void_p),
        ("region_count", ctypes.c_int),
    ]


class Compiled:
    """One kernel in one compiled library."""

    def __init__(self, name: str, file: Path, changed: int, dtype_name: str, defines: tuple[str, ...], fast: bool):
        library, kernels, self.dynamic_align = load(file, changed, dtype_name, defines, fast)
        if name not in kernels:
            raise KeyError(f"{file} has no kernel {name}. HINT: it has {', '.join(kernels)}")
        self.path, self.names = library._name, kernels[name]
        self.entry = ctypes.cast(getattr(library, f"simt_entry_{name}"), ctypes.c_void_p)
        self.params = (Param * (getattr(library, f"simt_count_{name}")() + 1))()
        getattr(library, f"simt_describe_{name}")(self.params)
        self.bound = getattr(library, f"simt_bound_{name}")()


class Kernel:
    """One kernel of one file and dtype; called like a CuPy RawKernel. Compiled on the first launch in each mode."""

    def __init__(
        self, file: Path, changed: int, name: str, dtype_name: str, defines: tuple[str, ...], smem: int, hopper: bool
    ):
        self.source, self.name, self.smem = (file, changed, dtype_name, defines), name, smem
        self.hopper = hopper  # uses what is defined in simt_ptx_sm90.h
        self.compiled: dict[bool, Compiled] = {}

    def fault(self, kind: str, text: str, **attributes: Any) -> KernelFault:
        return fault(self.name, kind, text, **attributes)

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared_mem: int = 0) -> None:
        if Mode.fast not in self.compiled:
            self.compiled[Mode.fast] = Compiled(self.name, *self.source, Mode.fast)
        code = self.compiled[Mode.fast]
        grid, block = ([*(max(1, int(n)) for n in dims), 1, 1][:3] for dims in (grid, block))
        self.check_launch(code, grid, block, shared_mem)
        values, arrays = self.pack(code, args)
        pointers = (ctypes.c_void_p * (len(values) + 1))()
        for i, value in enumerate(values):
            pointers[i] = value.ctypes.data
        launch = Launch(
            entry=code.entry,
            args=ctypes.addressof(pointers),
            grid=tuple(grid),
            block=tuple(block),
            dynamic_bytes=int(shared_mem),
            dynamic_align=code.dynamic_align,
            declared_bytes=self.smem,
            seed=1,
            checked=not Mode.fast and not self.hopper,
            hopper=self.hopper,
            followed=not Mode.fast and self.hopper,
            timeout=Mode.timeout,
            patience=Mode.patience,
        )
        with lock:
            if launch.checked:
                self.run_checked(code, launch, values, arrays)
                return
            for i, _, array, _ in arrays:
                values[i][0] = array.ctypes.data
            if Mode.fast:
                self.run(code, launch, "forward")
            else:
                self.run_timings(code, launch, values, arrays)

    def check_launch(self, code: Compiled, grid: Sequence[int], block: Sequence[int], shared_mem: int) -> None:
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

    def pack(self, code: Compiled, args: Sequence[Any]) -> tuple[list[np.ndarray], list]:
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

    def check_pointer(self, param: Param, name: str, arg: Any) -> None:
        if arg is None:
            return
        if not isinstance(arg, np.ndarray):
            raise self.mismatch(name, "a pointer", f"{type(arg).__name__} {arg!r}")
        pointee = chr(param.pointee)
        raw = pointee in "vSPb" or param.pointee_size == 1 or arg.dtype.type is np.void or arg.dtype.itemsize == 1
        if not raw and type_name(pointee, param.pointee_size) != arg.dtype.name:
            raise self.mismatch(name, f"{type_name(pointee, param.pointee_size)}*", f"an array of {arg.dtype.name}")

    def scalar(self, expected: str, name: str, arg: Any) -> np.ndarray:
        value = np.int64(arg) if type(arg) is int else np.float64(arg) if type(arg) is float else arg
        value = np.bool_(value) if isinstance(value, bool) else value
        if not isinstance(value, np.generic) or value.dtype.name != expected:
            if isinstance(value, np.ndarray):
                raise self.mismatch(name, expected, f"an array of {value.dtype.name}")
            raise self.mismatch(name, expected, f"{np.asarray(value).dtype.name} {arg!r}")
        return np.array([value])

    def mismatch(self, name: str, expected: str, given: str) -> KernelFault:
        return self.fault("argument type", f"parameter `{name}` is {expected}, given {given}", array=name)

    def run_checked(self, code: Compiled, launch: Launch, values: list[np.ndarray], arrays: list) -> None:
        """Runs the launch under each thread order, each time on fresh copies of the arrays, and compares every byte."""
        groups = group_arrays(arrays)
        regions = (Region * (len(arrays) + 1))()
        count = 0
        for group in groups:
            for i, name, array, begin, end in group.arrays:
                at = begin - group.begin + group.at
                values[i][0] = at
                regions[count] = Region(at, at + end - begin, name.encode()[:63], array.itemsize, group.read_only)
                count += 1
        for i, _, array, _ in arrays:
            if array.size == 0:
                values[i][0] = 64  # no element may be touched
        launch.regions, launch.region_count = ctypes.addressof(regions), count

        def prepare(again: bool) -> None:
            runtime().simt_prepare(ctypes.byref(regions), count)
            for group in groups:
                group.fill(again)

        first = None
        for n, order in enumerate(Mode.orders):
            prepare(n > 0)
            self.run(code, launch, order, lambda: prepare(True))
            if n == 0 and len(Mode.orders) > 1:
                first = [None if g.read_only else g.device.copy() for g in groups]
            elif first is not None:
                self.compare(groups, first, Mode.orders[0], order)
        for group in groups:
            group.written()

    def run_timings(self, code: Compiled, launch: Launch, values: list[np.ndarray], arrays: list) -> None:
        """A kernel of Hopper's units, on the arrays themselves: everything at once in the first thread order, as late
        as the waits allow in the others. The bits must agree; after a fault the arrays are as they were."""
        bounds = [(*np.lib.array_utils.byte_bounds(a), n.encode()[:63], a.itemsize, ro) for _, n, a, ro in arrays]
        regions = (Region * (len(bounds) + 1))(*(Region(*bound) for bound in bounds))
        launch.regions, launch.region_count = ctypes.addressof(regions), len(bounds)
        spans = {(begin, end) for begin, end, *_ in bounds if begin < end}
        for address, rows, columns, *_ in (v.view(np.uint64) for v in values if v.dtype.kind == "V"):  # tensor maps
            spans.add((int(address), int(address + rows * columns * 2)))
        views = [memory_at(begin, end - begin) for begin, end in sorted(spans)]
        before = [view.copy() for view in views]
        garbage = [poisoned_bytes(view.ctypes.data, view.ctypes.data + view.size) for view in views]
        unwritten, first = [mask.copy() for mask in garbage], None
        try:
            for n, order in enumerate(Mode.orders):
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

    def compare(self, groups: list, first: list, first_order: str, order: str) -> None:
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

    def run(self, code: Compiled, launch: Launch, order: str, prepare_again: Any = None) -> None:
        """One run of the launch in one order of threads."""
        launch.order, launch.watching, launch.counting = ALL_ORDERS.index(order), 0, Mode.counted is not None
        found, float_atomic = Fault(), ctypes.c_uint64()
        failed = runtime().simt_launch(ctypes.byref(launch), ctypes.byref(found), ctypes.byref(float_atomic))
        if float_atomic.value:
            where = describe_lines(source_lines(code.path, [float_atomic.value])[float_atomic.value])
            warnings.warn(f"{self.name}: floating-point atomic at {where}", FloatAtomicWarning, stacklevel=4)
        if failed:
            other_pc = found.other_pc
            if prepare_again is not None and found.kind.startswith(b"race"):
                other_pc = self.other_side(launch, found, prepare_again)
            raise found.explain(self.name, code.path, order, other_pc)
        if Mode.counted is not None:
            size = runtime().simt_traffic(None, 0)
            counts = (Counts * size)()
            runtime().simt_traffic(ctypes.byref(counts), size)
            regions = ctypes.cast(launch.regions, ctypes.POINTER(Region))
            number = Mode.counted[-1].launch + 1 if Mode.counted else 0
            Mode.counted += rows_of(self.name, code.path, counts, regions, number)

    def other_side(self, launch: Launch, found: Fault, prepare_again: Any) -> int:
        """Where the other access of a race was made: the same run again, watching for it."""
        launch.watching, launch.watched = 1, found.other
        prepare_again()
        again = Fault()
        runtime().simt_launch(ctypes.byref(launch), ctypes.byref(again), ctypes.byref(ctypes.c_uint64()))
        return again.other_pc


def kernel(
    file: str | Path,
    name: str,
    dtype: Any,
    defines: tuple[str, ...] = (),
    smem: int = 0,
    arch: str | None = None,
    strict: bool = False,
) -> Kernel:
    """The kernel `name` of a file, compiled for `dtype` -> callable(grid, block, args, shared_mem=0).

    file     of kernels/, or the path of any other; compiled anew when it has changed
    dtype    that of the arrays (dtype or its name): floatX of kernels/common.cuh. float32, float16 or bfloat16
    defines  further -D options, a tuple such as ("GRADS_FP32",)
    smem     dynamic shared memory in bytes that launches will ask for, where that is more than 48 KiB
    arch     "sm_90a" for a kernel that uses Hopper's units
    strict   is for the compilation on a GPU and means nothing here
    Mirrors llmc.cuda.module.kernel. Errors: UserError where there is no such file, or no g++.
    """
    path = kernel_file(file)
    changed = path.stat().st_mtime_ns
    return loaded(path, changed, name, getattr(dtype, "name", dtype), tuple(defines), smem, arch == "sm_90a")


@functools.cache
def loaded(path: Path, changed: int, *rest: Any) -> Kernel:
    return Kernel(path, changed, *rest)


def tensor_map(array: np.ndarray, rows: int, columns: int, box_rows: int) -> np.ndarray:
    """Mirrors llmc.cuda.module.tensor_map; include/simt_ptx_sm90.h reads it. ValueError: the array is too small."""
    if array.nbytes < 2 * rows * columns:
        raise ValueError(f"a tensor map of {rows} x {columns} 16-bit numbers, of an array of {array.nbytes} bytes")
    return np.array([array.ctypes.data, rows, columns, box_rows, *[0] * 12], np.uint64).view("V128")
