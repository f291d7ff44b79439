"""One test file per op, three op sets: llmc.cpu, llmc.cuda on the CPU executor (tests/simt), llmc.cuda on a GPU.

    @pytest.mark.op("layernorm_forward", shapes=[(2, 3, 16)], big=[(2, 65, 768)], cpu=[(2, 3, 5)])
    def test_forward(op, shape): ...

runs once for every op set, dtype, rung (the table RUNGS of llmc/cuda/ladder) and shape: `shapes` on every op set, `big`
not on the executor, `cpu` on the cpu set alone. dtypes=("bf16",), sets=("cpu",) and rungs=(4,) restrict it, public=True
leaves the rungs out. A public function that chooses among rungs gets the last shape only, as the rungs get every shape.
`op` is then called with NumPy arrays, wherever it runs. Each call is a test of its own, see Op.__call__.
The fixture `ops` is the op set as a module, for tests of more than one op.
"""

import ctypes
import functools
import importlib
import importlib.util
import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from reference import DTYPES, OPS, assert_bits, file_of

from llmc.cuda import ladder

ROOT = Path(__file__).resolve().parents[1]
SETS = ("cpu", "executor", "gpu")

settings.register_profile(
    "llmc", max_examples=15, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("llmc")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every rung, dtype and shape, also those marked full")


@functools.cache
def gpu_is_there():
    """Whether a CUDA device and CuPy can be had. The question goes to the driver, as importing CuPy takes a second."""
    if importlib.util.find_spec("cupy") is None:
        return False
    try:
        cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return False
    return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


LEFT_OUT = {  # reason -> the marker of the tests that are left out, and when
    "GPU tests are not collected, as there is no GPU here": ("gpu", lambda config: not gpu_is_there()),
    "further tests run with pytest --full": ("full", lambda config: not config.getoption("--full")),
}
left_out = dict.fromkeys(LEFT_OUT, 0)


def pytest_collection_modifyitems(config, items):
    """Tests that cannot run here, or that only --full runs, are left out, and counted."""
    for why, (marker, applies) in LEFT_OUT.items():
        if applies(config):
            gone = [item for item in items if item.get_closest_marker(marker)]
            left_out[why] += len(gone)
            config.hook.pytest_deselected(items=gone)
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = left_out


def pytest_terminal_summary(terminalreporter):
    for why, count in left_out.items():
        if count:
            terminalreporter.write_line(f"{count:,} {why}.")


def pytest_configure(config):
    torch.set_num_threads(1)  # the shapes are small, and other workers use the other cores
    config.addinivalue_line("markers", "op(name, shapes, big, cpu, dtypes, sets, public, rungs): see conftest.py")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """xdist's workers have no terminal: what test_compile.py found out in one of them is printed here."""
    output = getattr(node, "workeroutput", {})
    left_out.update(output.get("left_out", {}))  # every worker collects the same tests
    table = output.get("compile_table")
    if table:
        node.config.pluginmanager.getplugin("terminalreporter").write_line("\n" + table)


def rungs_to_test(kind, dtype, name):
    """The rungs of an op that a dtype has, and None for the public function where that is not one of them. The executor
    takes long for Hopper's rungs and runs them in bf16 alone: fp16 changes nothing but conversions, which they share
    with the other rungs."""
    if kind == "cpu":
        return [None]
    rungs = [rung for rung in ladder.of(name) if dtype in rung.dtypes]
    if kind == "executor" and dtype == "fp16":
        rungs = [rung for rung in rungs if rung.arch is None]
    public = getattr(importlib.import_module("llmc.cuda"), name)
    return [*rungs, *([] if any(rung.call is public for rung in rungs) else [None])]


def is_further(kind, dtype, rung):
    """Whether a test of a rung runs with --full only. On the executor that is fp16, whose kernels differ from bf16's by
    conversions alone, the rungs below production, and in other dtypes a rung that is production for fp32 alone."""
    if kind != "executor":
        return False
    if dtype == "fp16" or rung is None:
        return dtype == "fp16"
    others_for_16_bits = any(r.production and "fp32" not in r.dtypes for r in ladder.of(rung.op))
    return not rung.production or (dtype != "fp32" and "fp32" in rung.dtypes and others_for_16_bits)


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("op")
    if marker is None:
        return
    (name,), options = marker.args, marker.kwargs
    cases = []

    def add(label, kind, dtype, rung, *shape):
        marks = [pytest.mark.gpu] if kind == "gpu" else [pytest.mark.full] if is_further(kind, dtype, rung) else []
        cases.append(pytest.param((kind, dtype, name, rung), *shape, id=label, marks=marks))

    for kind in options.get("sets", SETS):
        shapes = options.get("shapes", []) + options.get("big", []) * (kind != "executor")
        shapes += options.get("cpu", []) * (kind == "cpu")
        for dtype in options.get("dtypes", DTYPES):
            if kind == "cpu" and dtype != "fp32":
                continue
            rungs = [None] if options.get("public") else rungs_to_test(kind, dtype, name)
            if "rungs" in options:
                rungs = [rung for rung in rungs if rung and rung.number in options["rungs"]]
            for rung in rungs:
                label = f"{kind}-{dtype}" + (f"-{name}{rung.number if rung else ''}" if kind != "cpu" else "")
                if "shape" not in metafunc.fixturenames:
                    add(label, kind, dtype, rung)
                    continue
                for shape in shapes[-1:] if rung is None and len(rungs) > 1 else shapes:
                    size = "x".join(map(str, shape))
                    add(f"{label}-{size}", kind, dtype, rung, shape)
    metafunc.parametrize("op,shape" if "shape" in metafunc.fixturenames else "op", cases, indirect=["op"])


def op_set(kind, monkeypatch):
    """The op set's module, or a skip with the reason. The executor's is llmc.cuda with other kernels and memory."""
    if kind == "cpu":
        return importlib.import_module("llmc.cpu")
    if kind == "gpu":
        cupy = pytest.importorskip("cupy", reason="no GPU: CuPy is not installed")
        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            pytest.skip(f"no GPU: {error}")
        return importlib.import_module("llmc.cuda")
    if shutil.which("g++") is None:
        pytest.skip("the CPU executor needs g++")
    return importlib.import_module("llmc.simt").install(patch=monkeypatch.setattr)


def to_dev(kind, array):
    """The array where the op set wants it: itself, or a CuPy copy on the GPU."""
    if kind != "gpu":
        return array
    return importlib.import_module("cupy").asarray(array)


def to_host(array):
    return array if isinstance(array, np.ndarray) else array.get()


class Op:
    """One rung of one op in one op set, or the op set's public function (rung None), called with NumPy arrays."""

    def __init__(self, ops, kind, dtype, name, rung=None):
        self.ops, self.kind, self.dtype, self.name, self.rung = ops, kind, DTYPES[dtype], name, rung
        self.file = importlib.import_module(f"{ops.__name__}.{file_of(name)}")
        self.function = rung.call if rung else getattr(self.file, name)
        self.signature = inspect.signature(self.function)
        self.multiple = 1 if kind == "cpu" else 8  # what C must be divisible by: 16-byte accesses

    def __str__(self):
        return f"{self.name}{self.rung.number if self.rung else ''} [{self.kind} {self.dtype}]"

    def scratch(self, *dims, dtype=np.float32):
        """Scratch of exactly the size that the op's file states, full of garbage."""
        size = getattr(self.file, f"{self.file.__name__.rsplit('.', 1)[1]}_scratch_size")(*dims)
        garbage = np.empty(size, dtype)
        garbage.view(np.uint8)[:] = 0xFF  # NaN as float, -1 as integer
        return garbage

    def sibling(self, name):
        """Another op of the same op set and dtype."""
        dtype = next(label for label, dtype in DTYPES.items() if dtype == self.dtype)
        return Op(self.ops, self.kind, dtype, name)

    def run(self, *args, **kwargs):
        """Call the op once. On a GPU: upload every array, call, copy every array back into the caller's."""
        dev = {id(a): to_dev(self.kind, a) for a in (*args, *kwargs.values()) if isinstance(a, np.ndarray)}
        self.function(*(dev.get(id(a), a) for a in args), **{k: dev.get(id(a), a) for k, a in kwargs.items()})
        for a in (*args, *kwargs.values()):
            if isinstance(a, np.ndarray) and self.kind == "gpu":
                a[...] = to_host(dev[id(a)])

    def __call__(self, *args, **kwargs):
        """Call the op twice from the same state: the bits must agree (repeatable), inputs must come back unchanged, and
        outputs that are overwritten hold different garbage before each call, so that an element not written shows.
        The executor makes one call under several thread orders, and itself reports reads of what nothing wrote."""
        arguments = self.signature.bind(*args, **kwargs).arguments
        arrays = {k: a for k, a in arguments.items() if isinstance(a, np.ndarray)}
        written = dict(OPS[file_of(self.name)][self.name])
        if arguments.get("accumulate") is False:
            written = dict.fromkeys(written, "=")
        before = {k: a.copy() for k, a in arrays.items()}
        results = []
        for garbage in (np.nan,) if self.kind == "executor" else (np.nan, 3.0):
            for k, a in arrays.items():
                if k != "scratch":  # what the first call left in scratch stays for the second
                    a[...] = garbage if written.get(k) == "=" else before[k]
                if self.kind == "executor" and (k == "scratch" or written.get(k) == "="):
                    importlib.import_module("llmc.simt").poison(a)
            self.run(*args, **kwargs)
            results.append({k: a.copy() for k, a in arrays.items()})
        for k, a in arrays.items():
            if self.kind == "executor":
                importlib.import_module("llmc.simt").unpoison(a)
            if k == "scratch":
                continue
            if k not in written:
                assert_bits(f"{self} changed its input", k, arrays[k], before[k])
            assert_bits(f"{self}, second call from the same state", k, results[-1][k], results[0][k])


@pytest.fixture
def op(request, monkeypatch):
    kind, *rest = request.param
    op = Op(op_set(kind, monkeypatch), kind, *rest)
    if kind == "gpu" and op.rung and op.rung.arch not in (None, op.ops.module.capability()):
        pytest.skip("a kernel for compute capability 9.0")
    return op


@pytest.fixture(params=("cpu", "executor", pytest.param("gpu", marks=pytest.mark.gpu)))
def ops(request, monkeypatch):
    return op_set(request.param, monkeypatch)
