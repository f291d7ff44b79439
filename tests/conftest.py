"""One test file per op, three op sets: llmc.cpu, llmc.cuda on the CPU executor (tests/simt), llmc.cuda on a GPU.

    @pytest.mark.op("layernorm_forward", shapes=[(2, 3, 16)], big=[(2, 65, 768)], cpu=[(2, 3, 5)])
    def test_forward(op, shape): ...

runs once for every op set, dtype, rung (layernorm_forward1, layernorm_forward2, ... in llmc/cuda) and shape: `shapes` on every
op set, `big` not on the executor, `cpu` on the cpu set alone. `dtypes=("bf16",)` and `sets=("cpu",)` restrict the rest.
`op` is then called with NumPy arrays, wherever it runs. Each call is a test of its own, see Op.__call__.
The fixture `ops` is the op set as a module, for tests of more than one op.
"""

import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from reference import DTYPES, OPS, assert_bits

ROOT = Path(__file__).resolve().parents[1]
SETS = ("cpu", "executor", "gpu")

settings.register_profile("llmc", max_examples=15, deadline=None, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
settings.load_profile("llmc")


def pytest_configure(config):
    config.addinivalue_line("markers", "op(name, shapes, big, cpu, dtypes, sets): the op, dtypes and shapes a test runs for")


def file_of(name):
    """The op's file: layernorm_forward -> layernorm."""
    return next(file for file, names in OPS.items() if name in names)


def versions(kind, name):
    """Names to test: every numbered rung in llmc/cuda, and the public name unless it is an alias of a rung."""
    path = ROOT / "llmc" / "cuda" / f"{file_of(name)}.py"
    if kind == "cpu" or not path.exists():
        return [name]
    source = path.read_text()  # read, not imported: collecting tests needs no CuPy
    rungs = sorted({int(n) for n in re.findall(rf"^(?:def )?{name}(\d+)\b", source, re.M)})
    alias = re.search(rf"^{name} = {name}\d+\b", source, re.M)
    return [f"{name}{n}" for n in rungs] + ([] if alias else [name])


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("op")
    if marker is None:
        return
    (name,), options = marker.args, marker.kwargs
    cases = []
    for kind in options.get("sets", SETS):
        shapes = options.get("shapes", []) + options.get("big", []) * (kind != "executor")
        shapes += options.get("cpu", []) * (kind == "cpu")
        for dtype in options.get("dtypes", DTYPES):
            if kind == "cpu" and dtype != "fp32":
                continue
            for version in versions(kind, name):
                label = f"{kind}-{dtype}" + (f"-{version}" if kind != "cpu" else "")
                if "shape" not in metafunc.fixturenames:
                    cases.append(pytest.param((kind, dtype, name, version), id=label))
                for shape in shapes:
                    cases.append(pytest.param((kind, dtype, name, version), shape, id=f"{label}-{'x'.join(map(str, shape))}"))
    metafunc.parametrize("op,shape" if "shape" in metafunc.fixturenames else "op", cases, indirect=["op"])


def op_set(kind):
    """The op set's module, or a skip with the reason."""
    if kind == "cpu":
        return importlib.import_module("llmc.cpu")
    if not (ROOT / "llmc" / "cuda" / "__init__.py").exists():
        pytest.skip("llmc/cuda does not exist yet")
    if kind == "executor":
        if not (ROOT / "tests" / "simt").exists():
            pytest.skip("the CPU executor (tests/simt) does not exist yet")
        pytest.skip("the CPU executor is not connected yet")
    cupy = pytest.importorskip("cupy", reason="no GPU: CuPy is not installed")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    return importlib.import_module("llmc.cuda")


def to_dev(kind, array):
    """The array where the op set wants it: itself, or a CuPy copy on the GPU."""
    if kind != "gpu":
        return array
    return importlib.import_module("cupy").asarray(array)


def to_host(array):
    return array if isinstance(array, np.ndarray) else array.get()


class Op:
    """One rung of one op in one op set, called with NumPy arrays."""

    def __init__(self, kind, dtype, name, version):
        self.request = kind, dtype, name, version
        self.kind, self.dtype, self.name, self.version = kind, DTYPES[dtype], name, version
        self.file = importlib.import_module(f"{op_set(kind).__name__}.{file_of(name)}")
        self.function = getattr(self.file, version)
        self.signature = inspect.signature(self.function)
        self.multiple = 1 if kind == "cpu" else 8  # what C must be divisible by: 16-byte accesses

    def __str__(self):
        return f"{self.version} [{self.kind} {self.dtype}]"

    def scratch(self, *dims, dtype=np.float32):
        """Scratch of exactly the size that the op's file states, full of garbage."""
        size = getattr(self.file, f"{self.file.__name__.rsplit('.', 1)[1]}_scratch_size")(*dims)
        garbage = np.empty(size, dtype)
        garbage.view(np.uint8)[:] = 0xFF  # NaN as float, -1 as integer
        return garbage

    def sibling(self, name):
        """Another op of the same file."""
        return Op(*self.request[:2], name, name)

    def run(self, *args, **kwargs):
        """Call the op once. On a GPU: upload every array, call, copy every array back into the caller's."""
        dev = {id(a): to_dev(self.kind, a) for a in (*args, *kwargs.values()) if isinstance(a, np.ndarray)}
        self.function(*(dev.get(id(a), a) for a in args), **{k: dev.get(id(a), a) for k, a in kwargs.items()})
        for a in (*args, *kwargs.values()):
            if isinstance(a, np.ndarray) and self.kind == "gpu":
                a[...] = to_host(dev[id(a)])

    def __call__(self, *args, **kwargs):
        """Call the op twice from the same state: the bits must agree (repeatable), inputs must come back unchanged, and
        outputs that are overwritten hold different garbage before each call, so that an element not written shows."""
        arguments = self.signature.bind(*args, **kwargs).arguments
        arrays = {k: a for k, a in arguments.items() if isinstance(a, np.ndarray)}
        written = dict(OPS[file_of(self.name)][self.name])
        if arguments.get("accumulate") is False:
            written = dict.fromkeys(written, "=")
        before = {k: a.copy() for k, a in arrays.items()}
        results = []
        for garbage in (np.nan, 3.0):
            for k, a in arrays.items():
                if k != "scratch":  # what the first call left in it stays for the second
                    a[...] = garbage if written.get(k) == "=" else before[k]
            self.run(*args, **kwargs)
            results.append({k: a.copy() for k, a in arrays.items()})
        for k in arrays:
            if k == "scratch":
                continue
            if k not in written:
                assert_bits(f"{self} changed its input", k, arrays[k], before[k])
            assert_bits(f"{self}, second call from the same state", k, results[1][k], results[0][k])


@pytest.fixture
def op(request):
    return Op(*request.param)


@pytest.fixture(params=SETS)
def ops(request):
    return op_set(request.param)
