"""CPU executor: runs unmodified .cu files and the unmodified launchers of llmc.cuda on NumPy arrays, with g++ only, and
names the line of a kernel that does something wrong. Without a GPU, write this to reverse.cu and call it:

    CUDA = '''
    extern "C" __global__ void reverse(float* out, const float* inp, int n) {
        __shared__ float tile[64];
        tile[threadIdx.x] = inp[threadIdx.x];
        out[threadIdx.x] = tile[n - 1 - threadIdx.x];  // __syncthreads is missing before this line
    }'''
    import numpy as np
    from llmc import simt
    open("reverse.cu", "w").write(CUDA)
    reverse, inp = simt.kernel("reverse.cu", "reverse", "float32"), np.arange(64, dtype=np.float32)
    reverse((1,), (64,), (np.zeros_like(inp), inp, np.int32(64)))    # grid, block, arguments, as a CuPy RawKernel

    KernelFault: reverse: uninitialised read: 4-byte read of element 63 of the shared `tile`, which has 64 of 4 bytes:
    nothing in this block wrote it at reverse.cu:5 (block (0, 0, 0), forward order)

`ops = simt.install()` puts it under the launchers of llmc.cuda, for a whole model on the CPU. A launch returns when it
has ended; what it did wrong is raised as KernelFault and then leaves the arrays as they were.

How it works
    translate.py    The file is preprocessed by g++, with include/ in the place of CUDA's headers: simt_cuda.h
                    (threadIdx, vector types, intrinsics), cuda_bf16.h, cuda_fp16.h, simt_ptx.h (tensor cores, ldmatrix,
                    cp.async; kernels/ptx.cuh includes it instead of its inline assembly when LLMC_SIMT is defined) and
                    simt_ptx_sm90.h, likewise for ptx_sm90.cuh. `__shared__` declarations are rewritten into references
                    to the block's shared memory; nothing else changes, lines keep their numbers.
    build.py        Compiled libraries are kept in a folder of the system's temporary directory, keyed by everything
                    they depend on.
    runtime.cpp     It runs the blocks one after another and a block's threads as fibers: each runs until it waits for
                    others. g++ calls it before every load and store (-fsanitize=thread without its library) and at
                    undefined operations. It knows for each two bytes who wrote and who read them last.
    launch.py       Every launch runs three times on fresh copies of its arrays, with threads and blocks in forward,
                    reverse and seeded random order, and must leave the same bits.
    memory.py       Array arguments are copied to places far from each other (overlapping ones together), at the address
                    modulo 256 that they would have in device memory.
    report.py       Faults become text, with the source lines of addr2line.

What it catches, with kernel, source line, block, thread, array and element
    out of bounds           an access outside the views given to the launch, or outside a shared variable; null pointers
    out of bounds, array    an index outside a C++ array, also where the access stays inside the memory, or outside a
                            pack of kernels/common.cuh
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
    endless loop            for 8 seconds of CPU time no thread has ended and no element was touched for the first time
    crash, timeout          without taking the process down
    Floating-point atomics are allowed and reported as FloatAtomicWarning.
    Of kernels for sm_90a (arch="sm_90a"), with kernel and line or array, and as above: what is outside of arrays, not
    written (in shared memory), constant or undefined, and
    race                    in shared memory: of two threads' ordinary accesses, ldmatrix and stmatrix among them, or of
                            one of them and a TMA copy that another thread asks for. Order comes of __syncthreads, named
                            barriers, __syncwarp and of arrivals at mbarriers that the other waits for; not of wgmma or
                            shuffles. So lane 0 arrives for a warp that has read only after __syncwarp; fence_async, and
                            the wait for a wgmma that reads, come before the arrival that they are for
    timing-dependent result different bits when TMA copies and wgmma happen as late as the waits allow, or with other
                            garbage in arrays that are marked by `poison`
    missing fence           a write, then TMA or wgmma on the same bytes; ldmatrix, then a TMA load into them; without
                            fence_async between by the thread that wrote, or gave the row's address. wgmma without
                            wgmma_begin since all of the thread's were waited for
    TMA load, TMA store, wgmma in flight    at the end of the thread or block
    deadlock                mbarriers, named barriers

What it cannot see
    Timing and the hardware's memory model: every access takes effect at once and in program order, so a missing
    `volatile` or a fence of too small a scope inside a block goes unnoticed. Blocks that wait for each other are
    reported as an endless loop. Of several readers of an element only two are remembered, so a single order may miss a
    write after read. Neighbouring bytes of one 2-byte pair are told apart only for 1-byte accesses. A step past the end
    of a local array of arrays or of classes, taken through a pointer and not by its index. Inline assembly, __device__
    variables that are written, textures, clusters. In kernels for sm_90a: races in global memory, and of cp.async;
    races of single bytes; whether TMA has brought what wgmma reads is checked by the timings, and an ordinary read (not
    ldmatrix) needs no fence_async before a TMA load comes to its bytes, as CUTLASS has none there either.
    Rounding of approximate instructions (__expf, rsqrtf) and the order of sums inside the tensor cores are the CPU's;
    denormals are flushed as with -ftz=true; a * b + c is not contracted. Registers, occupancy and speed.

Settings, `with simt.mode(...)`: orders=("forward",) for one run instead of three; fast=True compiles without
instrumentation and runs straight on the arrays: for whole models, after the ops were checked; patience=1 and timeout=30
end a run after so many seconds of CPU time without progress, and in all. `with simt.traffic() as rows` counts sectors
and bank conflicts per source line. `alloc` gives memory aligned as on a device.

Speed, one core, checked, per order: 50 to 90 million 4-byte accesses, 50 million lane-shuffles, 0.2 million
mma.m16n8k16 per second (1 GFLOP/s); fast mode is 4 to 10 times faster. g++ takes 0.5 to 2.5 s for a file.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .launch import ALL_ORDERS, Kernel, kernel, mode, tensor_map, traffic
from .memory import alloc, poison, unpoison
from .report import FloatAtomicWarning, KernelFault, Traffic

__all__ = [
    "ALL_ORDERS",
    "FloatAtomicWarning",
    "Kernel",
    "KernelFault",
    "Traffic",
    "alloc",
    "install",
    "kernel",
    "mode",
    "poison",
    "tensor_map",
    "traffic",
    "unpoison",
]

HOST = ("zero", "upload", "download", "host_view", "synchronize", "timer", "memory", "describe")  # as llmc.cpu has them


def install(
    capability: int = 80, multiprocessors: int = 3, patch: Callable[[Any, str, Any], None] = setattr
) -> ModuleType:
    """Puts the executor under the launchers of llmc.cuda, for good -> llmc.cuda, whose ops now take NumPy arrays.

    capability       of the GPU that is played, as llmc.cuda.module.capability has it: 80 for an A100, 90 for an H100
    multiprocessors  few: blocks that stay make several rounds
    patch            sets an attribute; a test passes monkeypatch.setattr, which undoes it at the test's end
    """
    from llmc import cpu, cuda
    from llmc.cuda import device, module

    patch(module, "kernel", kernel)
    patch(module, "tensor_map", tensor_map)
    patch(module, "capability", lambda: capability)
    patch(module, "multiprocessors", lambda: multiprocessors)
    patch(device, "alloc", alloc)
    for name in HOST:
        patch(device, name, getattr(cpu.device, name))
    return cuda
