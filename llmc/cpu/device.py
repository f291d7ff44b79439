"""The CPU as a device: memory, and the threads that every op of this set runs its blocks on.

An op cuts its work into blocks of cache size and calls ``parallel(body, n)``. Threads are ours rather than the BLAS's
because then *every* op uses all cores (NumPy's element-wise loops and small matmuls are serial by themselves), and an
epilogue such as GELU runs on a block while it is still in cache. NumPy and BLAS release the GIL while they work.

The threads flush denormals to zero. Adam's moments decay into denormal numbers within a few steps, and on many
processors arithmetic on those is tens of times slower. The setting belongs to our threads alone: the floating-point
environment of the caller's thread is left as it is.
"""

import ctypes
import ctypes.util
import itertools
import math
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from llmc.buffers import Array

SCRATCH = 1 << 20  # float32 elements of scratch that each thread owns: 4 MiB


def alloc(nbytes: int) -> Array:
    """A zeroed uint8 array of nbytes, aligned to 256 bytes. Pages are touched only when first written."""
    room = np.zeros(nbytes + 256, np.uint8)
    skip = -room.ctypes.data % 256
    return room[skip : skip + nbytes]


def zero(array: Array) -> None:
    """array = 0"""
    array.fill(0)


def upload(array: Array, host: np.ndarray) -> None:
    """array = host (same shape and dtype)."""
    assert array.shape == host.shape and array.dtype == host.dtype, (array.shape, host.shape, array.dtype, host.dtype)
    np.copyto(array, host)


def download(array: Array) -> np.ndarray:
    """A NumPy copy of array."""
    return array.copy()


def host_view(array: Array) -> np.ndarray:
    """The array where NumPy can read and write it: here it is the array itself, on a GPU a copy."""
    return array


def synchronize() -> None:
    """Wait for all ops. Those of this set have finished when they return: there is nothing to wait for."""


def capture(launch: Callable[[], None]) -> Callable[[], None]:
    """What replays launch(). There is nothing to record here: it is launch itself."""
    return launch


def timer() -> Callable[[], float]:
    """Start a timer; calling what this returns gives the milliseconds since."""
    start = time.perf_counter()
    return lambda: (time.perf_counter() - start) * 1e3


def memory() -> tuple[int, int]:
    """(free, total) bytes of main memory, or of what a container may use; (0, 0) where the system does not tell."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    except (AttributeError, ValueError, OSError):
        return 0, 0
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # Linux, v2 and v1
        try:
            with open(path) as file:
                total = min(total, int(file.read()))
        except (OSError, ValueError):  # there is no such file, or it says "max"
            pass
    return min(free, total), total


def budget(total: int | None = None) -> int | None:
    """Bytes that a memory plan may take: all of main memory, or of `total` bytes; None where the system does not tell.

    What is free now does not count: the system gives up caches, and swaps, as memory is touched.
    """
    return memory()[1] or None if total is None else total


def max_positions(C: int, Vp: int, dtype: DTypeLike) -> int:
    """The largest B*T of a micro-batch. NumPy and BLAS index with 64 bits, so that memory alone is the limit."""
    return 2**63 // max(C, Vp)


def describe() -> str:
    """One line that names the processor and the threads in use."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {threads()} thread{'s' * (threads() > 1)}"


# ----------------------------------------------------------------------------------------------------------------------
# threads


class _Pool:
    """n threads with a queue each. A task is (body, counter, n): run body(i) for the next i while it is below n."""

    def __init__(self, n: int) -> None:
        # BLAS gets one thread, as the parallelism is ours. Only BLAS is limited: torch beside us keeps its threads.
        from threadpoolctl import threadpool_limits

        threadpool_limits(limits=1, user_api="blas")
        self.done: queue.SimpleQueue = queue.SimpleQueue()
        self.tasks: list[queue.SimpleQueue] = [queue.SimpleQueue() for _ in range(n)]
        for task in self.tasks:
            threading.Thread(target=self._work, args=(task,), daemon=True, name="llmc.cpu").start()

    def _work(self, tasks: queue.SimpleQueue) -> None:
        flush_denormals()
        np.seterr(all="ignore")  # in this thread: the loss and the gradient norm show NaN and Inf
        _local.scratch = alloc(SCRATCH * 4).view(np.float32)
        while True:
            item = tasks.get()
            if item is None:
                return
            body, counter, n = item
            error = None
            try:
                while (i := next(counter)) < n:
                    body(i)
            except BaseException as e:  # the caller gets it, and raises it
                error = e
            del body, item
            self.done.put(error)

    def run(self, body: Callable[[int], None], n: int) -> None:
        """body(0) ... body(n-1) on the threads; returns when all are done."""
        counter = itertools.count()  # next() on it is atomic under the GIL
        used = self.tasks[: min(n, len(self.tasks))]
        for task in used:
            task.put((body, counter, n))
        errors = [self.done.get() for _ in used]
        for error in errors:
            if error is not None:
                raise error


_local = threading.local()
_pool: _Pool | None = None


def threads(n: int | None = None) -> int:
    """The number of threads that ops run on; with n, set it. The default is the cores that this process may use."""
    global _pool
    if n is None and _pool is None:
        n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if n is not None and (_pool is None or n != len(_pool.tasks)):
        for task in _pool.tasks if _pool else ():
            task.put(None)
        _pool = _Pool(n)
    assert _pool is not None
    return len(_pool.tasks)


def parallel(body: Callable[[int], None], n: int) -> None:
    """body(0) ... body(n-1) on all threads, in any order; returns when all are done. An exception is raised here.

    Results do not depend on which thread does what, as each body(i) writes memory of its own. They can depend on the
    number of threads, because `split` cuts by it: some BLAS kernels (OpenBLAS's for Haswell) round the same element
    differently in blocks of other sizes.
    """
    if n > 0:
        threads()
        assert _pool is not None
        _pool.run(body, n)


def scratch(*shape: int) -> Array:
    """A float32 view of the given shape into this thread's scratch, with the contents that the last user left.

    Blocks are cut to fit SCRATCH; only attention over more than 2,700 positions asks for more, and then it grows once.
    """
    size = math.prod(shape)
    if size > _local.scratch.size:
        _local.scratch = alloc(size * 4).view(np.float32)
    return _local.scratch[:size].reshape(shape)


def scratch_bytes() -> int:
    """Bytes of all threads' scratch, for the memory plan."""
    return threads() * SCRATCH * 4


def shares() -> int:
    """Into how many equal parts the blocks of an op are to divide: one for each thread."""
    return threads()


def split(n: int, block: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut range(n) into equal pieces [(start, stop), ...] of about `block`; their number is a multiple of the shares.

    All sizes but the last are multiples of `multiple`.
    """
    pieces = -(-n // block)
    pieces = -(-pieces // shares()) * shares()
    size = -(-n // pieces)
    size = -(-size // multiple) * multiple
    return [(a, min(a + size, n)) for a in range(0, n, size)]


def flush_denormals() -> bool:
    """Set flush-to-zero for this thread, through the C library's fenv. False where it is not known how.

    x86-64 glibc keeps MXCSR at byte 28 of fenv_t (FTZ is bit 15, DAZ bit 6); AArch64 glibc keeps FPCR first (FZ is
    bit 24); Windows has _controlfp. Elsewhere (macOS on Apple silicon) denormals run at full speed anyway.
    """
    machine = platform.machine().lower()
    if sys.platform == "win32":
        ctypes.cdll.msvcrt._controlfp(0x01000000, 0x03000000)  # _DN_FLUSH, _MCW_DN
        return True
    known = {"x86_64": (7, 0x8040), "aarch64": (0, 1 << 24)}.get(machine)  # (word of fenv_t, bits)
    if not sys.platform.startswith("linux") or known is None:
        return False
    libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
    env = (ctypes.c_uint32 * 16)()
    if libm.fegetenv(env) != 0:
        return False
    word, bits = known
    env[word] |= bits
    return libm.fesetenv(env) == 0
