"""Loads kernels/*.cu through CuPy: one RawModule per (file, dtype, defines, arch), compiled by NVRTC on first use.

CuPy keeps compiled modules in ~/.cupy/kernel_cache, keyed by source text, options, architecture and NVRTC version. It
does not see our headers, so a hash of kernels/*.cuh goes into the options: editing common.cuh recompiles, and a second
process compiles nothing.

Options. No --use_fast_math: it turns every expf, logf, sqrtf and division into an approximation of up to some 2^-21
relative error, more for large exponents, which would show in fp32 losses and in AdamW; the kernels that use them wait
for memory anyway. Where a fast instruction is safe the kernel says so itself (rsqrtf, exp2f). -ftz=true, which CuPy
adds in any case: exp2f is then one instruction, and fp32 denormals matter nowhere in training. -lineinfo costs nothing
and lets ncu show source lines. --ptxas-options=-v makes NVRTC report registers and spills, and tells a compilation from
a cache hit, which writes no log.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import io
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from llmc.buffers import Array
from llmc.errors import UserError

DTYPE_DEFINE = {"float32": "ENABLE_FP32", "float16": "ENABLE_FP16", "bfloat16": "ENABLE_BF16"}
MIN_CAPABILITY = {"float32": 75, "float16": 75, "bfloat16": 80}

Module = tuple[str, tuple[str, ...], str | None]
"A kernel file of kernels/, its -D options, and the architecture it is for (None: that of the device)."
compilations: list[tuple[str, str, tuple[str, ...]]] = []
"(file, dtype, defines) of each module that this process compiled; a warm disk cache leaves it empty."
no_hopper: str | None = None
"Why kernels for compute capability 9.0 alone are not used there, if they are not: device.try_hopper."
check_launches = False
"Of train --check: synchronise after every launch and name the kernel that failed."


def installation(cuda: int) -> str:
    """What installs CuPy for CUDA 12 or 13. By real names: the `llmc` of the package index is another project's."""
    if (pathlib.Path(__file__).resolve().parents[2] / "pyproject.toml").is_file():  # a checkout, which pip was run in
        return f'pip install -e ".[cuda{cuda}]"'
    return f'pip install "cupy-cuda{cuda}x[ctk]" ml_dtypes'


INSTALL = f"HINT: {installation(13)} (or {installation(12)} for a CUDA 12 driver)"


def kernels_dir() -> pathlib.Path:
    """The folder with the .cu files: beside the package in a checkout or editable install, inside it in a wheel."""
    package = pathlib.Path(__file__).resolve().parents[1]
    for folder in (package.parent / "kernels", package / "kernels"):
        if (folder / "common.cuh").is_file():
            return folder
    raise UserError(f"no kernels folder at {package.parent / 'kernels'} or {package / 'kernels'}. HINT: reinstall llmc")


def import_cupy() -> Any:
    """CuPy, imported on first use so that `import llmc.cuda` works without it."""
    try:
        import cupy
    except ImportError as error:
        raise UserError(f"the cuda op set needs CuPy ({one_line(error)}). {INSTALL}") from error
    if int(cupy.__version__.split(".")[0]) < 14:  # before, None reached a kernel as the address 0xffffffff
        raise UserError(f"CuPy {cupy.__version__} is too old, 14.0 is needed. {INSTALL}")
    return cupy


@functools.cache
def capability() -> int:
    """Compute capability of the current device as one number: 80 for A100, 90 for H100 and H200. Checks the driver."""
    cupy = import_cupy()
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        driver, needed = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        if driver == 0:
            raise UserError("no NVIDIA driver found. HINT: install one, or train with --device cpu") from error
        if driver < needed:
            raise UserError(
                f"the NVIDIA driver supports CUDA {version(driver)}, CuPy was built for CUDA {version(needed)}. "
                f"HINT: update the driver, or {installation(12)}"
            ) from error
        raise UserError(f"no usable GPU: {one_line(error)}. HINT: see nvidia-smi and CUDA_VISIBLE_DEVICES") from error
    if count == 0:
        raise UserError("no GPU is visible. HINT: check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu")
    found = int(cupy.cuda.Device().compute_capability)
    if found < min(MIN_CAPABILITY.values()):
        raise UserError(f"compute capability {found / 10} is below 7.5 (Turing). HINT: use a newer GPU or --device cpu")
    return found


def hopper() -> bool:
    """Whether steps are to use the kernels for compute capability 9.0 alone."""
    return capability() == 90 and no_hopper is None


@functools.cache
def multiprocessors() -> int:
    """Multiprocessors of the current device: the grid of kernels whose blocks stay. No result may depend on it."""
    return import_cupy().cuda.Device().attributes["MultiProcessorCount"]


def grad_defines(dtype: Any, grads: Iterable[Array]) -> tuple[str, ...]:
    """Defines for kernels that write gradients of weights, given the model's dtype and those gradients (None: absent):
    these have the model's dtype, or float32."""
    found = {array.dtype for array in grads if array is not None}
    if found <= {dtype}:
        return ()
    assert found == {np.dtype(np.float32)}, (dtype, found)
    return ("GRADS_FP32",)


@functools.cache
def header_hash(folder: pathlib.Path) -> str:
    """SHA-1 over every header, name and content: changes when any of them does."""
    digest = hashlib.sha1()
    for header in sorted(folder.glob("*.cuh")):
        digest.update(header.name.encode() + b"\0" + header.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def options(dtype_name: str, defines: tuple[str, ...] = (), arch: str | None = None) -> tuple[str, ...]:
    """The NVRTC options, shared with the compile test. An `arch` such as "sm_90a" stands before the one CuPy appends;
    NVRTC keeps the 'a' (seen with 13.0 and 13.5), and code that needs it fails to compile if it ever does not."""
    folder = kernels_dir()
    return (
        "-std=c++17",
        "-lineinfo",
        "-ftz=true",
        "--ptxas-options=-v",
        f"-I{folder}",
        f"-D{DTYPE_DEFINE[dtype_name]}",
        *(f"-D{define}" for define in defines),
        f"-DLLMC_HEADERS={header_hash(folder)}",
        *([f"-arch={arch}"] if arch else []),
    )


def resources(log: str) -> dict[str, tuple[int, int, bool]]:
    """{kernel: (registers, spill bytes, serialised wgmma)} from a ptxas -v log."""
    found: dict[str, tuple[int, int, bool]] = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = part.split("'", 1)[0]
        used = re.search(r"Used (\d+) registers", part)
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part))
        found[name] = (int(used.group(1)) if used else 0, spills, False)
    for name in re.findall(r"wgmma.*serialized.*function '(\w+)'", log):
        registers, spills, _ = found.get(name, (0, 0, False))
        found[name] = (registers, spills, True)
    return found


@functools.cache
def load(
    file: str, dtype_name: str, defines: tuple[str, ...] = (), arch: str | None = None
) -> tuple[Any, dict[str, tuple[int, int, bool]]]:
    """Compiles kernels/<file> or takes it from CuPy's cache -> (cupy.RawModule, resources)."""
    needed, found = MIN_CAPABILITY[dtype_name], capability()
    if found < needed:
        raise UserError(
            f"{dtype_name} needs compute capability {needed / 10}, this GPU has {found / 10}. "
            "HINT: --dtype fp16 or --dtype fp32"
        )
    cupy, log = import_cupy(), io.StringIO()
    source = (kernels_dir() / file).read_text()
    module = cupy.RawModule(code=source, options=options(dtype_name, defines, arch))
    try:
        module.compile(log_stream=log)
    except Exception as error:  # CompileException, or CuPy's loader when libnvrtc is absent: told apart by their text
        text = str(error)
        missing = re.search(r'(?:cannot|could not) open source file "([^"]+)"', text)
        if missing:
            raise UserError(f"kernels/{file}: CUDA header {missing.group(1)} is not installed. {INSTALL}") from error
        if "nvrtc" in text.lower() and "load" in text.lower():
            raise UserError(f"the CUDA run-time compiler is not installed ({one_line(error)}). {INSTALL}") from error
        raise
    if log.getvalue().strip():  # a cache hit writes no log
        compilations.append((file, dtype_name, defines))
    return module, resources(log.getvalue())


@functools.cache
def kernel(
    file: str,
    name: str,
    dtype: Any,
    defines: tuple[str, ...] = (),
    smem: int = 0,
    arch: str | None = None,
    strict: bool = False,
) -> Callable[..., None]:
    """The kernel `name` of kernels/<file>, compiled for `dtype` -> callable(grid, block, args, shared_mem=0).

    dtype    that of the arrays (NumPy or CuPy dtype, or its name): float32, float16 or bfloat16
    defines  further -D options, a tuple such as ("GRADS_FP32",)
    smem     dynamic shared memory in bytes that launches will ask for; with the static above 48 KiB the kernel has to
             be told
    arch     "sm_90a" where Hopper-only instructions are used; None is the device's own
    strict   the kernel claims no spills and no serialised wgmma: a compilation that finds some is an error
    """
    module, found = load(file, getattr(dtype, "name", dtype), defines, arch)
    function = module.get_function(name)
    if strict and name in found and (found[name][1] or found[name][2]):
        raise RuntimeError(f"kernels/{file}: {name} spills {found[name][1]} bytes, serialised wgmma: {found[name][2]}")
    if smem and smem + function.shared_size_bytes > 48 * 1024:
        # a limit, not a reservation: the largest possible, so that calls with other sizes agree
        limit = import_cupy().cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"] - function.shared_size_bytes
        if smem > limit:
            raise UserError(
                f"kernels/{file}: {name} needs {smem} bytes of shared memory per block, this GPU has {limit}. "
                "HINT: use a smaller model width or a newer GPU"
            )
        function.max_dynamic_shared_size_bytes = limit
    return checked(function, f"kernels/{file}: {name}") if check_launches else function


def checked(function: Callable[..., None], name: str) -> Callable[..., None]:
    """The same kernel, followed by a synchronisation that reports a failure under the kernel's name."""
    runtime = import_cupy().cuda.runtime

    def launch(grid: tuple, block: tuple, args: tuple, shared_mem: int = 0) -> None:
        try:
            function(grid, block, args, shared_mem=shared_mem)
            runtime.deviceSynchronize()
        except Exception as error:
            raise RuntimeError(f"{name} failed, grid {grid}, block {block}: {one_line(error)}") from error

    return launch


def tensor_map(array: Array, rows: int, columns: int, box_rows: int) -> np.ndarray:
    """What TMA has to know of a 16-bit array, seen as (rows, columns), to copy boxes of (box_rows, 64): an argument for
    kernels, of 128 bytes. It holds the array's address, and stays right for whatever array is there later."""
    return _tensor_map(array.data.ptr, array.dtype.name == "bfloat16", rows, columns, box_rows)


@functools.cache
def _tensor_map(address: int, is_bfloat16: bool, rows: int, columns: int, box_rows: int) -> np.ndarray:
    room = np.zeros(256, np.uint8)
    start = -room.ctypes.data % 128
    found = room[start : start + 128].view("V128")  # CuPy passes an array of one element by value
    sizes, strides = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * 2)
    box, steps = (ctypes.c_uint32 * 2)(64, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    at, to = ctypes.c_void_p(found.ctypes.data), ctypes.c_void_p(address)
    # type; 2-D; no interleaving, 128-byte swizzle, L2 reads 256 bytes at a time, zeros outside: the numbers of cuda.h
    encode, dtype = libcuda().cuTensorMapEncodeTiled, 9 if is_bfloat16 else 6
    error = encode(at, dtype, 2, to, sizes, strides, box, steps, 0, 3, 3, 0)
    assert error == 0, (error, address, rows, columns, box_rows)
    return found


@functools.cache
def libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def compile_all(dtype: Any, modules: list[Module]) -> None:
    """Compiles or loads kernel files, several at a time. Call it while data is being read.

    modules  (file, defines, arch) each, such as those of device.step_modules
    Errors: that of the first file that does not compile. Files for one architecture alone are left out then, as they
    have a substitute: device.try_hopper tells what is wrong.
    """
    capability()  # one clear error instead of eight
    device = import_cupy().cuda.Device()

    def compile_one(module: Module) -> None:
        file, defines, arch = module
        with device:  # a new thread starts on device 0
            try:
                load(file, getattr(dtype, "name", dtype), defines, arch)
            except Exception:
                if arch is None:
                    raise

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, modules))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def version(number: int) -> str:
    """13020 -> "13.2", as CUDA encodes its versions."""
    return f"{number // 1000}.{number % 1000 // 10}"
