"""Every kernel compiles for every supported GPU in every dtype, without a GPU or a driver.

NVRTC comes from four wheels (cuda-bindings, cuda-pathfinder, nvidia-cuda-nvrtc, nvidia-cuda-runtime), not from a CUDA
toolkit. The options are those that llmc/cuda/module.py gives to CuPy. Kernels that a training step launches must not
spill registers; naive rungs may. A table of registers and spills is printed at the end.
"""

import concurrent.futures
import dataclasses
import functools
import os
import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import llmc.cpu
import llmc.cuda
from dev.compare_sass import launched as launched_by
from dev.compare_sass import variant
from llmc import gpt2
from llmc.cuda import ladder, module
from llmc.gpt2 import GPT2Config, config_from_descriptor, parameter_specs
from llmc.model import AdamW, Model

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason='NVRTC is not installed: pip install -e ".[test]"')

KERNELS = module.kernels_dir()
ONE_LAYER = GPT2Config(num_layers=1)
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def dtypes_of(arch):
    """The dtypes that a GPU has, by name."""
    return [dtype for dtype in DTYPES if module.MIN_CAPABILITY[dtype] <= capability_of(arch)]


def capability_of(arch):
    return int(re.search(r"\d+", arch)[0])


@functools.cache
def launches_of(rungs, arch):
    """{(file, defines, dtype)} of what the public functions launch, or the rungs below production, in any dtype of a
    GPU."""
    found = set()
    for rung in rungs:
        for dtype in dtypes_of(arch):
            if rung is None or (rung.arch in (None, capability_of(arch)) and SHORT[dtype] in rung.dtypes):
                launches = launched_by(arch, dtype, rung)
                assert launches, (rung, arch, dtype)
                found |= {(file, defines, dtype) for file, _, _, defines in launches}
    return found


def jobs_of(rungs, arch):
    """[(file, defines)] of the same."""
    return sorted({(file, defines) for file, defines, _ in launches_of(rungs, arch)})


SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
PRODUCTION = [(*job, arch) for arch in ARCHS for job in jobs_of((None,), arch)]
LADDER = tuple(rung for rung in ladder.RUNGS if not rung.production)
LADDER_ARCHS = ("sm_75", "sm_80", "sm_90a")
BELOW = [(*job, arch) for arch in LADDER_ARCHS for job in jobs_of(LADDER, arch)]
JOBS = [*PRODUCTION, *(job for job in BELOW if job not in PRODUCTION)]


def name_of(file, defines, *more):
    """A short name of what is compiled: of the defines those that tell variants apart, not all the sizes."""
    return (file, *sorted(variant({"defines": defines})), *more)


# What a kernel of a step may spill: rows of 1024 and 1600 channels in four packs a thread, which Hopper has room for.
SPILLED = {("layernorm_forward_kernel", "sm_80", "bfloat16", True): 8}


def compile_source(source, name, options):
    """(NVRTC's log, compiled: bool)"""
    error, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, error
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(bytearray(size + 1))  # an object of its own: a bytes of one character is shared by the whole process
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    return log.rstrip(b"\0").decode(), error == nvrtc.nvrtcResult.NVRTC_SUCCESS


def include_option():
    """CuPy finds CUDA's headers by itself; here they come from the nvidia-cuda-runtime wheel."""
    from cuda.pathfinder import find_nvidia_header_directory

    folder = find_nvidia_header_directory("cudart")
    assert folder, 'CUDA headers not found. HINT: pip install -e ".[test]"'
    return f"-I{folder}"


def compile_module(file, defines, arch):
    """{dtype: (log, compiled)}, for the dtypes in which anything of the file is launched.

    Threads call it: launches_of only looks up here what JOBS has found out, for finding out replaces functions of a
    module, which threads may not do side by side.
    """
    path = KERNELS / file
    launches = launches_of((None,), arch) | (launches_of(LADDER, arch) if arch in LADDER_ARCHS else set())
    return {
        dtype: compile_source(
            path.read_text(), str(path), [*module.options(dtype, defines), f"-arch={arch}", include_option()]
        )
        for dtype in sorted({dtype for other, _, dtype in launches if other == file})
    }


@functools.cache
def launched(dtype, capability, config=ONE_LAYER, grad_dtype=None):
    """{(file, kernel, defines, arch)} of a training step: what GPT-2 launches when launching does nothing. GPT-2's real
    sizes, since launchers may choose by them; the arrays are zero pages that nothing touches."""
    found = set()

    def record(file, name, dtype, defines=(), smem=0, arch=None, strict=False):
        found.add((file, name, defines, arch))
        return lambda grid, block, args, shared_mem=0: None

    ops = SimpleNamespace(**{name: getattr(llmc.cuda, name) for name in llmc.cuda.__all__})
    ops.device = llmc.cpu.device
    tokens = np.zeros((4, 1024), np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "kernel", record)
        patch.setattr(module, "capability", lambda: capability)
        patch.setattr(module, "multiprocessors", lambda: 132)
        patch.setattr(module, "tensor_map", lambda *args: None)
        options = dict(recompute=2, dtype=DTYPES[dtype], grad_dtype=grad_dtype)
        model = Model(gpt2, ops, config, *tokens.shape, **options)
        model.forward(tokens)
        model.backward(tokens, tokens)
        model.grad_norm()
        model.update(AdamW(1e-3, weight_decay=0.1), 1)
    return frozenset(found)


@pytest.fixture(scope="module")
def jobs(request):
    """A future for every job that this run tests: compiled on all cores while the tests wait in order."""
    tests = [item for item in request.session.items if item.originalname == "test_compiles"]
    wanted = {tuple(item.callspec.params[name] for name in ("file", "defines", "arch")) for item in tests}
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    yield {job: pool.submit(compile_module, *job) for job in JOBS if job in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def table(request):
    """{(file, defines, kernel): {arch: {dtype: (registers, spills)}}}, printed when the last test of --full is done."""
    rows = {}
    yield rows
    if not request.config.getoption("--full"):
        return
    title = "registers, the most of fp32, fp16, bf16 (+ bytes spilled)"
    lines = [f"{title:<66}" + "".join(f"{arch:>9}" for arch in ARCHS)]
    for (file, defines, kernel), archs in sorted(rows.items()):
        cells = ""
        for arch in ARCHS:
            found = archs.get(arch, {}).values()
            spills = max((spills for _, spills in found), default=0)
            registers = max((registers for registers, _ in found), default="")
            cells += f"{f'{registers}+{spills}' if spills else registers:>9}"
        lines.append(f"{' '.join(name_of(file.removesuffix('.cu'), defines, kernel)):<66}{cells}")
    if hasattr(request.config, "workeroutput"):  # a worker of xdist has no terminal: conftest.py prints it
        request.config.workeroutput["compile_table"] = "\n".join(lines)
        return
    plugins = request.config.pluginmanager
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        plugins.getplugin("terminalreporter").write_line("\n" + "\n".join(lines))


def case(job):
    """A parameter of test_compiles. What no production op launches, GPUs that are neither an A100 nor a Hopper, and
    portable attention with other heads than of 64 are compiled with --full."""
    file, defines, arch = job
    other_heads = file == "attention.cu" and "HEAD_SIZE=64" not in defines
    usual = job in PRODUCTION and arch in ("sm_80", "sm_90a") and not other_heads
    marks = [] if usual else [pytest.mark.full]
    return pytest.param(file, defines, arch, id="-".join(name_of(*job)), marks=marks)


@pytest.mark.parametrize("file, defines, arch", [case(job) for job in JOBS])
def test_compiles(file, defines, arch, jobs, table):
    """In every dtype of the GPU: no error, no warning; in kernels of a training step no spill, no serialised wgmma."""
    problems = []
    for dtype, (log, compiled) in jobs[file, defines, arch].result().items():
        found = module.resources(log)
        if not compiled or not found:
            problems.append(f"{dtype} does not compile:\n{log}")
        problems += [f"{dtype}: {line}" for line in log.splitlines() if "warning" in line]
        for kernel, (registers, spills, serialised) in found.items():
            table.setdefault((file, defines, kernel), {}).setdefault(arch, {})[dtype] = registers, spills
            in_step = kernel in {name for _, name, _, _ in launched(dtype, capability_of(arch))}
            if registers == 0:
                problems.append(f"{dtype} {kernel}: no register count in\n{log}")
            if in_step and spills > SPILLED.get((kernel, arch, dtype, "PACKS=4" in defines), 0):
                problems.append(f"{dtype} {kernel} spills {spills} bytes at {registers} registers")
            if in_step and serialised:
                problems.append(f"{dtype} {kernel} has serialised wgmma")
    assert not problems, "\n".join([f"{file} {' '.join(defines)} {arch}", *problems])


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ("d12", "d24", "gpt3:c2048"))
def test_a_step_compiles_nothing_new(name, dtype, capability, monkeypatch):
    """What start-up compiles has all that a step launches, and nothing else: for narrow and wide models and heads, and
    with gradients of fp32."""
    monkeypatch.setattr(module, "capability", lambda: capability)
    config = dataclasses.replace(config_from_descriptor(name, 50257, 1024), num_layers=1)
    C, HS, Vp = config.channels, config.channels // config.num_heads, config.padded_vocab_size
    for grad_dtype in (None, "float32"):
        tensors = len(parameter_specs(config))
        ready = set(llmc.cuda.device.step_modules(DTYPES[dtype], C, HS, Vp, tensors, grad_dtype))
        step = {(file, defines, arch) for file, _, defines, arch in launched(dtype, capability, config, grad_dtype)}
        spare = {
            "matmul.cu",
            "attention.cu",
            "gelu.cu",
            "adamw.cu",
        }  # Hopper's are compared with them; init_from_master
        assert step <= ready, step - ready
        assert {file for file, _, _ in ready - step} <= spare, ready - step


SIZED = {(file, defines): None for file, defines, arch in JOBS if "SHARED_BYTES" in str(defines) and arch == "sm_90a"}


@pytest.mark.parametrize("file, defines", SIZED, ids=["-".join(name_of(*job)) for job in SIZED])
def test_a_wrong_size_of_shared_memory_does_not_compile(file, defines):
    """Launchers ask for as many bytes as they work out; the kernel knows how many it needs. 16 too many, or too few, of
    any of its kernels are an error of the compilation, not of a launch on a GPU."""
    source, options = (KERNELS / file).read_text(), [*module.options("bfloat16"), "-arch=sm_90a", include_option()]
    for i, (name, size) in enumerate(define.partition("=")[::2] for define in defines):
        for step in (-16, 16) if name.endswith("SHARED_BYTES") else ():
            wrong = [*defines[:i], f"{name}={int(size) + step}", *defines[i + 1 :]]
            log, compiled = compile_source(source, file, [*options, *(f"-D{define}" for define in wrong)])
            assert not compiled and "static assertion failed" in log, (file, wrong, log)


def test_a_spill_is_seen():
    """The parser must not report 0 because it reads nothing: 200 live values do not fit 64 registers."""
    source = """
    extern "C" __global__ void __launch_bounds__(1024) greedy(float* x) {
        float v[200];
        #pragma unroll
        for (int i = 0; i < 200; i++) { v[i] = x[i * 1024 + threadIdx.x]; }
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 200; i++) { x[i * 1024 + threadIdx.x] = v[199 - i] * v[i]; }
    }
    extern "C" __global__ void modest(float* x) { x[threadIdx.x] = 1.0f; }
    """
    log, compiled = compile_source(source, "spill.cu", ["-arch=sm_80", "--ptxas-options=-v"])
    assert compiled, log
    found = module.resources(log)
    assert 0 < found["greedy"][0] <= 64 and found["greedy"][1] > 0, found
    assert 0 < found["modest"][0] < 64 and found["modest"][1] == 0, found


def test_serialised_wgmma_is_seen():
    """Accumulators that another instruction touches between two wgmma make ptxas wait for the first."""
    source = """
    extern "C" __global__ void __launch_bounds__(128) serial(float* x, long long a, long long b, int n) {
        float d[4] = {};
        asm volatile("wgmma.fence.sync.aligned;");
        for (int i = 0; i < n; i++) {
            asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0;"
                         "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, p, 1, 1, 0, 0;}"
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
            d[0] *= 2.0f;
        }
        asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;");
        x[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
    }
    """
    log, compiled = compile_source(source, "serial.cu", ["-arch=sm_90a", "--ptxas-options=-v"])
    assert compiled, log
    assert module.resources(log)["serial"][2], log


def test_hopper_arch_survives_the_one_that_cupy_appends():
    """Our -arch=sm_90a comes first, CuPy's -arch=sm_90 last: wgmma must still be accepted."""
    source = 'extern "C" __global__ void f() { asm volatile("wgmma.fence.sync.aligned;"); }'
    for options, expected in ((["-arch=sm_90a", "-arch=sm_90"], True), (["-arch=sm_90"], False)):
        log, compiled = compile_source(source, "hopper.cu", options)
        assert compiled == expected, log
