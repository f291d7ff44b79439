"""The GPU as a device: memory, timers, streams, graphs, and uploads that do not wait for what the GPU is doing.

The functions up to the streams are those of llmc/cpu/device.py. Work goes to CuPy's current stream; start() makes one
of our own current, which is what a CUDA graph is captured on.
"""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np

from llmc.buffers import Array
from llmc.errors import UserError

from . import module
from .global_norm import global_norm_scratch_size, global_norm_squared


def start() -> None:
    """Makes a stream of our own current and launches a kernel: UserError where no GPU can be used, and why."""
    module.capability()  # driver and device
    cupy = module.import_cupy()
    stream().use()
    out, scratch, values = (cupy.ones(n, np.float32) for n in (1, global_norm_scratch_size(8), 8))
    global_norm_squared(out, scratch, values)
    if float(out.get()[0]) != 8.0:
        raise UserError("the GPU computes wrong results: the sum of eight ones is not 8. HINT: use --device cpu")


def step_modules(
    dtype: Any, C: int, HS: int, Vp: int, tensors: int | None = None, grad_dtype: Any = None
) -> list[module.Module]:
    """The modules whose kernels the passes of a GPT-2 launch on this GPU, and with `tensors` those of its update.

    dtype, grad_dtype  NumPy's, of the parameters and of their gradients (None: the same)
    C, HS, Vp          channels, head size and padded vocabulary, which some kernels are compiled for
    tensors            how many tensors the parameters have: rows of AdamW's tables
    """
    from . import adamw, attention, encoder, global_norm, layernorm, matmul
    from .fused_classifier import defines as classifier_defines

    defines = {
        "encoder.cu": encoder.defines(),
        "layernorm.cu": layernorm.defines(C, np.dtype(dtype).itemsize),
        "matmul.cu": matmul.defines_portable(),
        "attention.cu": attention.defines(HS),
        "gelu.cu": (),
        "fused_classifier.cu": classifier_defines(),
        "global_norm.cu": global_norm.defines(),
    }
    if tensors is not None:
        defines["adamw.cu"] = adamw.defines(tensors)
    found: list[module.Module] = [(file, own, None) for file, own in defines.items()]
    if module.capability() == 90 and np.dtype(dtype) != np.float32:
        if HS in attention.SM90_HEAD_SIZES:
            found.append(("attention_sm90.cu", attention.defines_sm90(HS), "sm_90a"))
        for tile in (matmul.WIDE, matmul.TALL) if matmul.turned(C, Vp) else (matmul.WIDE,):
            found.append(("matmul_sm90.cu", matmul.defines_sm90(tile), "sm_90a"))
    if grad_dtype is not None and np.dtype(grad_dtype) != np.dtype(dtype):  # what reads or writes gradients, once more
        files = ("encoder.cu", "layernorm.cu", "matmul.cu", "matmul_sm90.cu", "adamw.cu")
        found += [(file, (*own, "GRADS_FP32"), arch) for file, own, arch in found if file in files]
    return found


def try_hopper(dtype: Any, HS: int = 64, tall: bool = False) -> str | None:
    """Launches Hopper's matmuls and attention once and compares them with the portable ones -> None, or a line that
    says that these are used from now on, and why. A kernel that breaks the CUDA context itself raises: nothing can
    follow it. HS: size of the heads; tall: whether the model's widths want the other tile too (matmul.turned)."""
    if not module.hopper() or np.dtype(dtype) == np.float32:
        return None
    from . import attention, matmul

    rng, dtype = np.random.default_rng(0), np.dtype(dtype)

    def filled(*shape: int) -> Array:
        array = alloc(int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
        upload(array, rng.standard_normal(shape, np.float32).astype(dtype))
        return array

    def room(size: int) -> Array:
        return alloc(4 * size).view(np.float32)

    def compare(names: tuple[str, ...], run: Callable, portable: tuple, own: tuple) -> None:
        """run(forward, backward) -> arrays; portable, own: the functions of an op, forward and backward"""
        results = [[download(array).astype(np.float32) for array in run(*op)] for op in (portable, own)]
        for name, right, array in zip(names, *results, strict=True):
            error = float(np.abs(array - right).max() / np.abs(right).max())
            if not error < 2**-6:  # a rounding of bf16 is 2^-8
                raise ValueError(f"{name} is off by {error:.1g}")

    T, NH, (BT, C, OC) = 320, 2, (384, 128, 448) if tall else (200, 192, 320)
    inp, weight, bias, dout = filled(1, BT, C), filled(OC, C), filled(OC), filled(1, BT, OC)
    qkvr, datty, att = filled(1, T, 3 * NH * HS), filled(1, T, NH * HS), room(NH * T).reshape(1, NH, T)

    def products(forward: Callable, backward: Callable) -> tuple:
        pre_gelu, out, gelu, dinp = filled(1, BT, OC), filled(1, BT, OC), filled(1, BT, C), filled(1, BT, C)
        dweight, dbias, scratch = filled(OC, C), filled(OC), room(matmul.matmul_scratch_size(1, BT, C, OC))
        forward(out, inp, weight, bias, pre_gelu)
        backward(dinp, dweight, dbias, scratch, dout, gelu, weight, inp, accumulate=False, recompute=True)
        return pre_gelu, out, gelu, dinp, dweight, dbias

    def heads(forward: Callable, backward: Callable) -> tuple:
        atty, dqkvr = filled(1, T, NH * HS), filled(1, T, 3 * NH * HS)
        forward(atty, att, qkvr)
        scratch = room(attention.attention_scratch_size(1, T, NH * HS, NH))
        backward(dqkvr, scratch, datty, atty, qkvr, att)
        return atty, dqkvr

    try:
        names = "forward", "forward's GELU", "recomputed GELU", "dgrad", "wgrad", "bias gradient"
        portable: tuple = matmul.forward_mma, matmul.backward_mma
        compare(names, products, portable, (matmul.forward_sm90, matmul.backward_sm90))
        if attention.uses_sm90(HS, dtype):
            portable = attention.forward_mma, attention.backward_mma
            own = attention.forward_sm90, attention.backward_sm90
            compare(("attention forward", "attention backward"), heads, portable, own)
    except Exception as error:
        synchronize()
        module.no_hopper = module.one_line(error)
        return f"the kernels for Hopper do not work here, portable ones are used: {module.no_hopper}"
    return None


def alloc(nbytes: int) -> Array:
    """A zeroed uint8 array of nbytes on the device, aligned to 256 bytes. MemoryError when it does not fit."""
    module.capability()  # driver and device, checked before the first use of either
    return module.import_cupy().zeros(nbytes, np.uint8)


def zero(array: Array) -> None:
    """array = 0"""
    assert array.flags.c_contiguous, array.strides
    module.import_cupy().cuda.runtime.memsetAsync(array.data.ptr, 0, array.nbytes, current_stream().ptr)


def upload(array: Array, host: np.ndarray) -> None:
    """array = host (a NumPy array of the same shape and dtype), in order with the work queued before and after.

    Returns at once: the bytes are copied to pinned memory first, so `host` may be changed again.
    """
    assert array.shape == host.shape and array.dtype == host.dtype, (array.shape, host.shape, array.dtype, host.dtype)
    if array.nbytes > SMALL:  # weights: once, at the start; not worth as much pinned memory
        array.set(np.ascontiguousarray(host))
        current_stream().synchronize()
        return
    while _in_flight and _in_flight[0][0].done:
        _in_flight.popleft()
    source = pinned(host.shape, host.dtype)
    np.copyto(source, host)
    copy_async(array.data.ptr, source.ctypes.data, source.nbytes, current_stream())
    event = module.import_cupy().cuda.Event(disable_timing=True)
    event.record()
    _in_flight.append((event, source))  # pinned memory goes back to its pool once the copy has been made


SMALL = 16 << 20
_in_flight: collections.deque[tuple[Any, np.ndarray]] = collections.deque()


def download(array: Array) -> np.ndarray:
    """A NumPy copy of array, taken after the work queued before it."""
    return array.get()


def host_view(array: Array) -> np.ndarray:
    """array where NumPy can read and write it: a copy, which upload() brings back."""
    return array.get()


def scratch_bytes() -> int:
    """Memory of the ops beside the plan: none."""
    return 0


def capture(launch: Callable[[], None]) -> Callable[[], None]:
    """What replays the kernels of launch() as one CUDA graph on the current stream. launch() must not synchronise."""
    on = current_stream()
    on.begin_capture()
    try:
        launch()
    finally:
        graph = on.end_capture()
    return graph.launch


def synchronize() -> None:
    """Waits for everything queued on the device; an error of an earlier kernel is raised here."""
    module.import_cupy().cuda.runtime.deviceSynchronize()


def timer() -> Callable[[], float]:
    """Starts a timer on the current stream; calling what it returns waits for the work queued since, and gives ms."""
    cuda = module.import_cupy().cuda
    start, stop = cuda.Event(), cuda.Event()
    start.record()

    def elapsed() -> float:
        stop.record()
        stop.synchronize()
        return cuda.get_elapsed_time(start, stop)

    return elapsed


def memory() -> tuple[int, int]:
    """(free, total) bytes of device memory. Blocks that CuPy's pool keeps for reuse count as used."""
    module.capability()
    return module.import_cupy().cuda.runtime.memGetInfo()


CONTEXT = 640 << 20  # what CUDA, the loaded kernels and graphs take beside the plan: 540 MiB measured on an H200
LEFT = 128 << 20  # of that, what is still to come after start()


def budget(total: int | None = None) -> int | None:
    """Bytes that a memory plan may take: of what is free on this device now, or on an empty one of `total` bytes."""
    return memory()[0] - LEFT if total is None else max(0, total - CONTEXT)


def max_positions(C: int, Vp: int, dtype: Any) -> int:
    """The largest B*T of a micro-batch. Offsets in the kernels are 64-bit, but not every count and grid is.

    encoder_forward counts 16-byte pieces of (B*T, C) in 32 bits. The fp32 matmul has B*T / 128 blocks in the second
    direction of its grid, which ends at 65535; the others have all their blocks in the first, up to 2^31 - 1, and
    Hopper's count their tiles, which are wider, in 32 bits. Positions themselves, also as TMA's coordinates, are 32-bit
    everywhere: half of that leaves room for sums with block sizes.
    Tried on an H200: bf16 with 3.6e10 logits and 2.2e9 elements in fch, fp32 with 8.4 million positions.
    """
    itemsize = np.dtype(dtype).itemsize
    pieces = (2**31 - 1) * (16 // itemsize) // C
    rows = 65535 if itemsize == 4 else (2**31 - 1) // -(-max(Vp, 4 * C) // 128)
    return min(pieces, rows * 128, 2**30)


def describe() -> str:
    """One line that names the GPU: name, capability, multiprocessors, memory, driver and CuPy."""
    capability = module.capability()
    cupy = module.import_cupy()
    device, runtime = cupy.cuda.Device(), cupy.cuda.runtime
    properties = runtime.getDeviceProperties(device.id)
    return (
        f"{properties['name'].decode()}, sm_{capability}, {properties['multiProcessorCount']} SMs, "
        f"{properties['totalGlobalMem'] / 2**30:.0f} GiB, driver CUDA {module.version(runtime.driverGetVersion())}, "
        f"CuPy {cupy.__version__}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# streams and asynchronous copies


def stream() -> Any:
    """A new stream that does not wait for the default one. `with stream():` makes it current."""
    return module.import_cupy().cuda.Stream(non_blocking=True)


def current_stream() -> Any:
    return module.import_cupy().cuda.get_current_stream()


def pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised NumPy array in page-locked memory, which the GPU can read while the CPU does something else."""
    count, dtype = int(np.prod(shape)), np.dtype(dtype)
    room = module.import_cupy().cuda.alloc_pinned_memory(max(count * dtype.itemsize, 1))
    return np.frombuffer(room, dtype, count).reshape(shape)


def copy_async(to: int, source: int, nbytes: int, on: Any) -> None:
    """Queues a copy between two addresses, host or device, on the stream `on`."""
    runtime = module.import_cupy().cuda.runtime
    runtime.memcpyAsync(to, source, nbytes, runtime.memcpyDefault, on.ptr)
