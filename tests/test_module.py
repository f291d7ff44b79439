"""llmc/cuda/module.py and device.py: options, folders, error lines, caching; and the random bits in common.cuh.

Most tests use a stand-in for CuPy, since CI has no GPU. Those marked gpu repeat what is essential on a device.
"""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, op_set
from reference import noise

import llmc
import llmc.cuda
from llmc import devices, simt
from llmc.cuda import module
from llmc.gpt2 import GPT2Config

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
ptxas         .     96 bytes stack frame, 88 bytes spill stores, 92 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""


class FakeError(RuntimeError):
    pass


class FakeKernel:
    def __init__(self, name):
        self.name, self.shared_size_bytes, self.max_dynamic_shared_size_bytes, self.launches = name, 1024, None, []

    def __call__(self, grid, block, args, shared_mem=0):
        self.launches.append((grid, block, args, shared_mem))


class FakeCupy:
    """CuPy as module.py sees it: a device, a driver, and a compiler with a disk cache that outlives restart()."""

    def __init__(self, monkeypatch):
        self.devices, self.driver, self.capability, self.failure, self.sync_failure = 1, 13000, "90", None, None
        self.disk, self.log, self.__version__ = set(), LOG, "14.2.0"
        fake = self

        class RawModule:
            def __init__(self, code, options):
                self.key = code, options

            def compile(self, log_stream):
                if fake.failure:
                    raise fake.failure
                if self.key not in fake.disk:
                    log_stream.write(fake.log)
                fake.disk.add(self.key)

            def get_function(self, name):
                return FakeKernel(name)

        class Device:
            id = 0
            attributes = {"MaxSharedMemoryPerBlockOptin": 99 * 1024}
            compute_capability = property(lambda self: fake.capability)
            __enter__ = __exit__ = lambda *_: None

        runtime = SimpleNamespace(
            CUDARuntimeError=FakeError,
            getDeviceCount=self.count,
            driverGetVersion=lambda: self.driver,
            runtimeGetVersion=lambda: 13000,
            deviceSynchronize=self.synchronize,
        )
        self.cuda = SimpleNamespace(runtime=runtime, Device=Device)
        self.RawModule = RawModule
        monkeypatch.setitem(sys.modules, "cupy", self)
        monkeypatch.setattr(module, "check_launches", False)

    def count(self):
        if self.driver < 13000:
            raise FakeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")
        return self.devices

    def synchronize(self):
        if self.sync_failure:
            raise self.sync_failure

    @staticmethod
    def restart():
        """What a new process starts with."""
        module.capability.cache_clear()
        module.load.cache_clear()
        module.kernel.cache_clear()
        module.compilations.clear()


@pytest.fixture
def cupy(monkeypatch):
    FakeCupy.restart()
    yield FakeCupy(monkeypatch)
    FakeCupy.restart()


@pytest.fixture
def gpu(monkeypatch):
    return op_set("gpu", monkeypatch)


def user_error(call, *args, **kwargs):
    """The message of the UserError that call(...) raises: one line that ends with a hint."""
    with pytest.raises(llmc.UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and "HINT: " in message, message
    return message


# ----------------------------------------------------------------------------------------------------------------------
# folders and options


def test_import_without_cupy():
    """The package, its launchers and their signatures are there without CuPy; only using them is an error."""
    code = "import sys; sys.modules['cupy'] = None; import llmc.cuda as ops; ops.device.alloc(1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("llmc.errors.UserError: the cuda op set needs CuPy"), done
    assert 'pip install -e ".[cuda13]"' in last, done


def test_kernels_dir_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    assert module.kernels_dir() == ROOT / "kernels"
    package = tmp_path / "site-packages" / "llmc"
    monkeypatch.setattr(module, "__file__", str(package / "cuda" / "module.py"))
    assert "kernels" in user_error(module.kernels_dir)
    (package / "kernels").mkdir(parents=True)
    (package / "kernels" / "common.cuh").touch()
    assert module.kernels_dir() == package / "kernels"


def test_options_follow_the_headers(tmp_path, monkeypatch):
    """CuPy's cache does not see headers: an edit of any, or a new one, must change the options."""
    seen = set()
    for i, (name, text) in enumerate([(None, ""), ("common.cuh", "\n"), ("ptx.cuh", " "), ("new.cuh", "")]):
        folder = tmp_path / str(i) / "kernels"
        shutil.copytree(ROOT / "kernels", folder)
        if name:
            with open(folder / name, "a") as f:
                f.write(text)
        seen.add(module.header_hash(folder))
    assert len(seen) == 4, seen
    options = module.options("bfloat16")
    assert f"-DLLMC_HEADERS={module.header_hash(ROOT / 'kernels')}" in options and "-DENABLE_BF16" in options, options
    assert f"-I{ROOT / 'kernels'}" in options and not any(o.startswith("-arch") for o in options), options
    options = module.options("float16", ("A=1", "B"), "sm_90a")
    assert {"-DENABLE_FP16", "-DA=1", "-DB", "-arch=sm_90a"} <= set(options), options


def test_resources_of_a_log():
    assert module.resources(LOG) == {"first": (40, 0, False), "second": (128, 180, False)}
    assert module.resources("") == {}


# ----------------------------------------------------------------------------------------------------------------------
# loading


def test_one_compilation_per_file_dtype_and_defines(cupy):
    first = module.kernel("gelu.cu", "gelu_forward_kernel", np.dtype(np.float32))
    assert module.kernel("gelu.cu", "gelu_forward_kernel", np.dtype(np.float32)) is first
    module.kernel("gelu.cu", "gelu_backward_inplace_kernel", np.dtype(np.float32))
    assert module.compilations == [("gelu.cu", "float32", ())]
    module.kernel("gelu.cu", "gelu_forward_kernel", np.dtype(ml_dtypes.bfloat16))
    module.kernel("adamw.cu", "adamw_update_kernel", "bfloat16", ("GRADS_FP32",))
    module.kernel("adamw.cu", "adamw_update_kernel", "bfloat16")
    assert len(module.compilations) == 4, module.compilations


def test_a_second_process_compiles_nothing(cupy):
    modules = llmc.cuda.device.step_modules(ml_dtypes.bfloat16, 768, 64, 50304, 16)
    module.compile_all("bfloat16", modules)
    assert sorted(module.compilations) == sorted((file, "bfloat16", defines) for file, defines, _ in modules)
    assert {file for file, _, _ in modules} == {path.name for path in module.kernels_dir().glob("*.cu")}
    cupy.restart()
    module.compile_all("bfloat16", modules)
    assert module.compilations == []
    module.compile_all("bfloat16", [*modules, ("attention.cu", ("HEAD_SIZE=128",), None)])
    assert module.compilations == [("attention.cu", "bfloat16", ("HEAD_SIZE=128",))]


def test_hopper_kernels_are_tried_before_they_are_trusted(monkeypatch, capsys):
    """One that raises, or is wrong in one of its results, leaves the portable ones in charge, and a line says why."""
    ops = op_set("executor", monkeypatch)
    monkeypatch.setattr(module, "capability", lambda: 90)
    monkeypatch.setattr(module, "no_hopper", None)
    bf16, matmul, attention = np.dtype(ml_dtypes.bfloat16), ops.matmul, ops.attention
    assert module.hopper() and attention.uses_sm90(64, bf16)
    assert ops.device.try_hopper(np.float32) is None
    assert ops.device.try_hopper(bf16) is None and module.hopper()
    loaded, kernel = set(), module.kernel

    def load(file, name, dtype, defines=(), *args, **kwargs):
        if "ROWS=192" in defines:
            loaded.add(name.split("_")[1])
        return kernel(file, name, dtype, defines, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "kernel", load)
        for tall in (False, True):
            assert ops.device.try_hopper(bf16, tall=tall) is None
            # each product in the other tile, or none: else a model compiles what it has no use for
            assert loaded == ({"forward", "dgrad", "wgrad"} if tall else set())

    def raises(*args):
        raise RuntimeError("no such\nunit")

    def wrong(dqkvr, *args, backward=attention.backward_sm90):
        backward(dqkvr, *args)
        dqkvr[0, 200, 5] += 4.0

    line = "the kernels for Hopper do not work here, portable ones are used: "
    faults = (
        (matmul, "forward_sm90", raises, "no such unit"),
        (attention, "backward_sm90", wrong, "attention backward is off by "),
    )
    for file, name, function, why in faults:
        with monkeypatch.context() as patch:
            patch.setattr(file, name, function)
            patch.setattr(module, "no_hopper", None)
            assert ops.device.try_hopper(bf16).startswith(line + why)
            assert not module.hopper() and not attention.uses_sm90(64, bf16)

    monkeypatch.setattr(module, "compile_all", lambda *_: None)
    monkeypatch.setattr(ops.device, "try_hopper", lambda dtype, HS, tall: line + why)
    assert devices.prepare_kernels(GPT2Config(), bf16).startswith("kernels ready after")
    out, err = capsys.readouterr()
    assert not out and err == line + why + "\n"  # also of commands that print a text on stdout


def test_shared_memory_above_48_kib(cupy):
    """The limit is raised to all there is, so that a later launch with less does not lower it for an earlier one."""
    assert module.kernel("gelu.cu", "a", "float32", smem=47 * 1024).max_dynamic_shared_size_bytes is None
    assert module.kernel("gelu.cu", "a", "float32", smem=48 * 1024).max_dynamic_shared_size_bytes == 98 * 1024  # + 1024
    assert module.kernel("gelu.cu", "a", "float32", smem=50_000).max_dynamic_shared_size_bytes == 98 * 1024
    message = user_error(module.kernel, "gelu.cu", "a", "float32", smem=99 * 1024)
    assert "gelu.cu" in message and str(99 * 1024) in message and str(98 * 1024) in message, message


def test_strict_kernels_may_not_spill(cupy):
    module.kernel("matmul.cu", "first", "float32", strict=True)
    module.kernel("matmul.cu", "second", "float32")
    with pytest.raises(RuntimeError, match="matmul.cu: second spills 180 bytes"):
        module.kernel("matmul.cu", "second", "float32", strict=True)


def test_check_launches_names_the_kernel(cupy, monkeypatch):
    monkeypatch.setattr(module, "check_launches", True)
    launch = module.kernel("gelu.cu", "gelu_forward_kernel", "float32")
    launch((7,), (256,), ())
    cupy.sync_failure = FakeError("cudaErrorIllegalAddress: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match=r"gelu.cu: gelu_forward_kernel failed, grid .7,., block .256,.: .*Illegal"):
        launch((7,), (256,), ())


# ----------------------------------------------------------------------------------------------------------------------
# error lines


def test_cupy_too_old(cupy):
    cupy.__version__ = "13.6.0"
    assert "13.6.0" in user_error(module.capability)


def test_no_driver(cupy):
    cupy.driver = 0
    assert "no NVIDIA driver" in user_error(module.capability)


def test_driver_too_old(cupy):
    cupy.driver = 12040
    message = user_error(module.capability)
    assert "CUDA 12.4" in message and "CUDA 13.0" in message and 'pip install -e ".[cuda12]"' in message, message


def test_no_device(cupy):
    cupy.devices = 0
    assert "no GPU is visible" in user_error(module.capability)


def test_device_too_old(cupy):
    cupy.capability = "70"
    assert "7.0" in user_error(module.capability) and "7.5" in user_error(module.capability)


def test_dtype_not_supported_by_the_device(cupy):
    cupy.capability = "75"
    message = user_error(module.kernel, "gelu.cu", "gelu_forward_kernel", "bfloat16")
    assert "bfloat16" in message and "8.0" in message and "7.5" in message, message
    module.kernel("gelu.cu", "gelu_forward_kernel", "float16")


def test_missing_headers(cupy):
    cupy.failure = RuntimeError('gelu.cu(12): catastrophic error: cannot open source file "cuda_bf16.h"\n\n1 error')
    message = user_error(module.kernel, "gelu.cu", "gelu_forward_kernel1", "float32")
    assert "cuda_bf16.h" in message and 'pip install -e ".[cuda13]"' in message, message


def test_missing_compiler(cupy):
    cupy.failure = RuntimeError("CuPy failed to load libnvrtc.so.13: OSError: cannot open shared object file")
    assert 'pip install -e ".[cuda13]"' in user_error(module.kernel, "gelu.cu", "gelu_forward_kernel1", "float32")


def test_errors_in_a_kernel_are_not_hidden(cupy):
    cupy.failure = RuntimeError('gelu.cu(40): error: identifier "x" is undefined')
    with pytest.raises(RuntimeError, match='identifier "x" is undefined'):
        module.kernel("gelu.cu", "gelu_forward_kernel", "float32")


# ----------------------------------------------------------------------------------------------------------------------
# common.cuh: the noise of stochastic rounding


def test_noise_has_the_published_values():
    assert [noise(0, 0), noise(1, 0), noise(123, 456)] == [377036288, 3365260061, 124875327]
    assert noise(5 + (7 << 32), 1337) == 272267180  # the two-dimensional form, x = 5, y = 7


def test_noise_on_the_device(tmp_path):
    (tmp_path / "noise.cu").write_text(
        '#include "common.cuh"\n'
        'extern "C" __global__ void noise_kernel(u32* out, const unsigned long long* position, const u32* seed) {\n'
        "    out[threadIdx.x] = noise(position[threadIdx.x], seed[threadIdx.x]);\n"
        "}\n"
    )
    rng = np.random.default_rng(0)
    positions = np.concatenate([[0, 1, 123, 5 + (7 << 32)], rng.integers(0, 1 << 40, 60)]).astype(np.uint64)
    seeds = np.concatenate([[0, 0, 456, 1337], rng.integers(0, 1 << 32, 60)]).astype(np.uint32)
    out = np.zeros(64, np.uint32)
    simt.kernel(str(tmp_path / "noise.cu"), "noise_kernel", "float32")((1,), (64,), (out, positions, seeds))
    assert out.tolist() == [noise(int(p), int(s)) for p, s in zip(positions, seeds, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# on a GPU


@pytest.mark.gpu
def test_gpu_second_process_compiles_nothing(gpu, tmp_path):
    code = (
        "import time; start = time.time(); import ml_dtypes; from llmc.cuda import device, module; "
        "modules = device.step_modules(ml_dtypes.bfloat16, 768, 64, 50304, 16); "
        "module.compile_all('bfloat16', modules); "
        "print(len(module.compilations), time.time() - start, len(modules))"
    )
    env = {"CUPY_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
        assert done.returncode == 0, done.stderr
        runs.append(done.stdout.split())
    print(f"cold {runs[0][1]} s, warm {runs[1][1]} s")
    assert [int(count) for count, _, _ in runs] == [int(runs[0][2]), 0], runs


@pytest.mark.gpu
def test_gpu_device(gpu):
    device = gpu.device
    array = device.alloc(1000)
    assert array.data.ptr % 256 == 0 and not device.download(array).any()
    host = np.arange(250, dtype=np.float32)
    view = array.view(np.float32)
    device.upload(view, host)
    assert (device.download(view) == host).all()
    device.zero(view[10:20])
    host[10:20] = 0
    assert (device.download(view) == host).all()
    elapsed = device.timer()
    device.synchronize()
    assert elapsed() >= 0
    free, total = device.memory()
    assert 0 < free <= total and "sm_" in device.describe() and "\n" not in device.describe()


@pytest.mark.gpu
def test_gpu_uploads_arrive_in_order(gpu):
    """Each is seen by the work queued after it, none early, though the host's array changes at once."""
    with gpu.device.stream() as stream:
        inputs = gpu.device.alloc(4 << 20).view(np.int32).reshape(1024, 1024)
        seen = gpu.device.alloc(16 * inputs.nbytes).view(np.int32).reshape(16, 1024, 1024)
        host = np.empty(inputs.shape, np.int32)
        for i in range(16):
            host.fill(i)
            gpu.device.upload(inputs, host)
            seen[i] = inputs
        stream.synchronize()
        assert (gpu.device.download(seen) == np.arange(16)[:, None, None]).all()


@pytest.mark.gpu
def test_gpu_kernels_do_not_use_local_memory_where_they_claim(gpu):
    defines = llmc.cuda.layernorm.defines(768, 2)
    module.kernel("layernorm.cu", "layernorm_backward_wide_kernel", "bfloat16", defines, strict=True)
    found = module.load("layernorm.cu", "bfloat16", defines)[0].get_function("layernorm_backward_wide_kernel")
    assert found.local_size_bytes == 0 and found.num_regs <= 128
