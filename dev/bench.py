"""What every dev/bench_<op>.py shares: arrays, a check against float64, timing, the limit, a table, a CSV row, JSON.

    python -m dev.bench_layernorm                    GPU: B=32, T=1024, GPT-2 124M, bf16; else the CPU op set, small
    python -m dev.bench_layernorm -b 64 -t 1024 -e d24 --dtype fp32 --only layernorm_backward
    python -m dev.bench_layernorm --executor         no times: what each rung reads and writes, on the CPU executor
    python -m dev.bench_layernorm --csv dev/results/nvidia_h200.csv --compare dev/results/nvidia_h200.csv

A bench file has one function, cases(b), that yields a Case for each op: its arrays, the NumPy formula that is both the
float64 reference and the naive peer, the fewest bytes and FLOPs, and PyTorch functions to compare with. Here every rung
that llmc/cuda has of the op is run from the same arrays with its outputs poisoned, compared with float64, and only then
timed; a mismatch ends the run with exit code 1 (bench_all: that rung is not timed, the others are, then exit code 1).

Time on a GPU: calls with the L2 cache overwritten after each, less the overwriting alone, between two events some 1 ms
apart; median, 20th and 80th percentile of up to 50 such means. L2 writes back late: a call leaves in it what it wrote,
and pays for writing back what it found there. In a row of calls that evens out. Events around a single call after the
overwriting would charge a call that only reads up to 60 MB (H200) of writes that are not its own, and every call some
2 us of the events themselves. Calls under 10 us are replayed in a CUDA graph of 20 instead, where data stays in L2
(marked *). Limit: the larger of bytes / copy bandwidth and FLOPs / matmul rate, both measured in the same run.
Accumulating ops run on what they have accumulated: their data stays random.
"""

import argparse
import csv
import datetime
import importlib
import itertools
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmc import gpt2
from llmc.cuda import ladder
from llmc.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
OPS = ("encoder", "layernorm", "matmul", "attention", "gelu", "fused_classifier", "adamw", "global_norm")
BUDGET = 150.0  # ms that the timed calls of one row may take together
MODE = "in a row"  # result files name how calls were timed; a row without a name timed single calls between events


class Row(NamedTuple):
    """One line of a table: something to call, the bytes it has to move and the FLOPs it has to do."""

    name: str
    call: Callable | None  # None: the peer is absent
    bytes: int
    flops: int
    kind: str = "ours"  # or "torch", which captures graphs its own way, or "host"


class Case(NamedTuple):
    """An op on given arrays.

    args    {parameter: array or scalar} in the order of the signature; arrays are on the device
    writes  names of the arrays that the op overwrites, "out mean"; they are poisoned before a rung is checked
    adds    names of the arrays that the op reads and adds to
    want    () -> [(name, index, float64)]: what args[name][index] must be afterwards, from the arrays as they are
    bytes, flops  what any implementation moves and does at least; bound, "bytes" or "flops", says which is the limit
    naive   a NumPy function without arguments: the peer on a CPU. None: the op has no such peer
    peers   () -> {name: (function, "torch")}, called where PyTorch can be imported; None for what is absent
    ulps    roundings to the output's precision that a right result may be off by
    rungs   None: all, or the numbers of those to run besides the public function
    """

    op: str
    shape: str
    args: dict
    writes: str
    adds: str
    want: Callable
    bytes: int
    flops: int = 0
    naive: Callable | None = None
    peers: Callable | None = None
    ulps: float = 2.0
    rungs: tuple | None = None


# ----------------------------------------------------------------------------------------------------------------------
# the machine


def torch_or_none():
    try:
        import torch
    except ImportError:
        return None
    return torch


class Bench:
    """The op set under test, the model's sizes, and arrays of random numbers where the op set wants them."""

    def __init__(self, device="auto", executor=False, model=None, B=None, T=None, dtype=None):
        self.executor = executor
        self.device = "executor" if executor else pick(device)
        gpu, small = self.device == "cuda", {"cpu": ("d6", 4, 64), "executor": ("tiny:d4", 2, 64)}
        model, self.B, self.T = (
            a or b for a, b in zip((model, B, T), small.get(self.device, ("d12", 32, 1024)), strict=True)
        )
        words = 5003 if self.device == "executor" else 50257  # counts and time grow with it: a tenth will do
        self.config = model if isinstance(model, gpt2.GPT2Config) else gpt2.config_from_descriptor(model, words, self.T)
        self.model = model if isinstance(model, str) else "custom"
        self.dtype_name = dtype or ("fp32" if self.device == "cpu" else "bf16")
        if self.device == "cpu" and self.dtype_name != "fp32":
            raise UserError(f"--dtype {dtype}: the CPU op set has fp32 only. HINT: --executor has all three")
        self.dtype = numpy_dtype(self.dtype_name)
        self.ops = op_set(self.device)
        self.C, self.NH, self.V = self.config.channels, self.config.num_heads, self.config.vocab_size
        self.Vp, self.L = self.config.padded_vocab_size, self.config.num_layers
        self.N = gpt2.num_parameters(self.config)
        self.rng = np.random.default_rng(0)
        self.torch = None if executor else torch_or_none()
        if self.torch is not None and not gpu:
            self.torch.set_num_threads(self.ops.device.threads())
            self.torch.set_flush_denormal(True)
        self.description = "CPU executor" if executor else self.ops.device.describe()  # now: a device may fail later
        self.keep_going = False  # whether the run goes on after a rung that fails; bench_all sets it
        self.print = print_table
        self.block = self.rng.standard_normal(1 << 22, np.float32) if gpu else None
        self.scrubs = itertools.cycle(self.ops.device.alloc(8 * l2_bytes()).reshape(2, -1) if gpu else [])
        self.ceilings = {} if executor else self.measure_ceilings()

    # arrays

    def array(self, host):
        """A host array where the op set wants it."""
        if self.device != "cuda":
            return np.ascontiguousarray(host)
        array = self.empty(host.shape, host.dtype)
        self.ops.device.upload(array, np.ascontiguousarray(host))
        return array

    def empty(self, shape, dtype=None):
        """An array whose contents no op may rely on: the check poisons it."""
        dtype = self.dtype if dtype is None else np.dtype(dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        return self.ops.device.alloc(nbytes).view(dtype).reshape(shape)

    def normal(self, shape, dtype=None, scale=1.0, mean=0.0):
        """Gaussian numbers. A GPU repeats one block of 4 M of them: the host would take long to draw 1.6 G."""
        dtype = self.dtype if dtype is None else np.dtype(dtype)
        if self.block is None:
            return self.array((self.rng.standard_normal(shape, np.float32) * scale + mean).astype(dtype))
        out = self.empty(shape, dtype)
        flat, block = out.reshape(-1), self.array((self.block * scale + mean).astype(dtype))
        copy = self.ops.device.copy_async
        for start in range(0, flat.size, block.size):
            n = min(block.size, flat.size - start) * dtype.itemsize
            copy(flat.data.ptr + start * dtype.itemsize, block.data.ptr, n, self.ops.device.current_stream())
        self.ops.device.synchronize()
        return out

    def draw_tokens(self, shape):
        """Token ids on the host with the frequencies of text: most of the vocabulary is rare."""
        p = 1.0 / np.arange(1, self.V + 1)
        return self.rng.choice(self.V, size=shape, p=p / p.sum()).astype(np.int32)

    def tokens(self, shape):
        return self.array(self.draw_tokens(shape))

    def host(self, array, index=...):
        return on_host(array, index)

    def t(self, array, grad=False):
        """A torch tensor over the same memory."""
        torch, bf16 = self.torch, array.dtype.name == "bfloat16"
        array = array.view(np.int16) if bf16 else array
        tensor = torch.as_tensor(array, device="cuda") if self.device == "cuda" else torch.from_numpy(array)
        tensor = tensor.view(torch.bfloat16) if bf16 else tensor
        return tensor.detach().requires_grad_(grad)

    # time

    def clock(self):
        """Starts a clock on the stream -> stop. stop() -> ms, a function to call once the stream has come that far."""
        if self.device != "cuda":
            timer = self.ops.device.timer()

            def stopped():
                ms = timer()
                return lambda: ms

            return stopped
        cuda = self.ops.device.module.import_cupy().cuda
        start, stop = cuda.Event(), cuda.Event()
        start.record()

        def stop_it():
            stop.record()
            return lambda: cuda.get_elapsed_time(start, stop)

        return stop_it

    def time(self, row):
        """{p20, p50, p80 in us, calls, graph} of row.call()."""
        if self.device != "cuda":
            row.call()
            ms = [host_ms(row.call)]
            while len(ms) < 5 or (sum(ms) < BUDGET and len(ms) < 30):
                ms.append(host_ms(row.call))
                if sum(ms) > 10 * BUDGET:
                    break
            return quantiles(ms)
        device = self.ops.device
        row.call()
        device.synchronize()
        timer = device.timer()
        row.call()
        once = timer()
        if once > 1000.0:  # a naive rung on a full-size problem: the time is long enough to be its own median
            return quantiles([once])
        calls = int(np.clip(1.0 / once, 1, 10))
        ms = self.gpu_ms(row.call, int(np.clip(BUDGET / once / calls, 3, 50)), calls)
        if np.median(ms) > 0.010:
            return quantiles(ms)
        return quantiles([x / 20 for x in self.gpu_ms(self.graph(row), 10)]) | {"graph": True}

    def gpu_ms(self, call, samples, calls=1):
        """`samples` means of `calls` calls, in ms. L2 is overwritten after each call; that time is subtracted."""
        alone = np.median(self.overwritten_ms(lambda: None, 10, calls))
        return [ms - alone for ms in self.overwritten_ms(call, samples, calls)]

    def overwrite(self):
        """Writes four times what the L2 cache holds: little of what was there is left, whatever it replaces first.
        Two places take turns, so that the cache does not hold the zeros from the time before."""
        self.ops.device.zero(next(self.scrubs))

    def overwritten_ms(self, call, samples, calls):
        clocks = []
        for _ in range(samples):
            self.overwrite()  # the host runs ahead meanwhile
            clock = self.clock()
            for _ in range(calls):
                call()
                self.overwrite()
            clocks.append(clock())
        self.ops.device.synchronize()
        return [ms() / calls for ms in clocks]

    def graph(self, row):
        """A function that replays 20 calls from a CUDA graph."""

        def calls():
            for _ in range(20):
                row.call()

        if row.kind != "torch":
            with self.ops.device.stream():  # the default stream cannot be captured
                return self.ops.device.capture(calls)
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            calls()
        return graph.replay

    def copy(self, nbytes):
        """What copies nbytes on a GPU: reads and writes as many."""
        device = self.ops.device
        a, b = (device.alloc(nbytes) for _ in range(2))
        return lambda: device.copy_async(a.data.ptr, b.data.ptr, nbytes, device.current_stream())

    def measure_ceilings(self):
        """{copy_GBs: bytes read and written by a copy, matmul_TFLOPs: a large product in the benchmark's dtype}."""
        gpu, torch = self.device == "cuda", self.torch
        ceilings = {}
        if gpu:
            nbytes = 1 << 30
            ms = self.gpu_ms(self.copy(nbytes), 10)
        else:
            nbytes = 1 << 26
            a, b = (np.ones(nbytes, np.uint8) for _ in range(2))
            pieces = self.ops.device.split(a.size, 1 << 22)

            def copy(i):
                a[slice(*pieces[i])] = b[slice(*pieces[i])]

            ms = [host_ms(lambda: self.ops.device.parallel(copy, len(pieces))) for _ in range(10)]
            if torch is not None:  # the limit is that of whichever copies faster
                to, source = torch.from_numpy(a), torch.from_numpy(b)
                ms = min(ms, [host_ms(lambda: to.copy_(source)) for _ in range(10)], key=np.median)
        ceilings["copy_GBs"] = 2 * nbytes / np.percentile(ms, 20) / 1e6
        n = (8192 if self.dtype_name != "fp32" else 4096) if gpu else 1024
        if torch is not None:
            x, y = (self.t(self.normal((n, n))) for _ in range(2))
            product = Row("matmul", lambda: torch.mm(x, y), 0, 2 * n**3, "torch")
        else:
            x, y = (self.normal((n, n), np.float32) for _ in range(2))
            product = Row("matmul", lambda: x @ y, 0, 2 * n**3)
        ceilings["matmul_TFLOPs"] = 2 * n**3 / self.time(product)["p20"] / 1e6
        return ceilings

    def limit_us(self, nbytes, flops):
        """The least time for so much work on this machine."""
        return max(nbytes / self.ceilings["copy_GBs"] / 1e3, flops / self.ceilings["matmul_TFLOPs"] / 1e6)


def on_host(array, index=...):
    """array[index] as float64 on the host; integers stay what they are."""
    part = array[index]
    part = part if isinstance(part, np.ndarray) else part.get()
    return part if part.dtype.kind in "iu" else part.astype(np.float64)


def pick(device):
    """The device to run on; auto means cuda where it works."""
    if device == "cpu":
        return "cpu"
    from llmc.cuda import device as cuda

    try:
        cuda.start()
        return "cuda"
    except UserError:
        if device == "cuda":
            raise
        return "cpu"


def op_set(device):
    """llmc.cpu or llmc.cuda; for the executor, llmc.cuda with its kernels and memory replaced."""
    if device == "cpu":
        return importlib.import_module("llmc.cpu")
    cuda = importlib.import_module("llmc.cuda")
    if device == "executor":
        return importlib.import_module("llmc.simt").install()
    cuda.module.import_cupy().cuda.Stream.null.use()  # PyTorch's stream too, so that the same events time both
    return cuda


def numpy_dtype(name):
    if name == "bf16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"fp32": np.float32, "fp16": np.float16}[name])


def l2_bytes():
    from llmc.cuda import module

    return max(32 << 20, module.import_cupy().cuda.Device().attributes["L2CacheSize"])


def host_ms(call):
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def quantiles(ms):
    p20, p50, p80 = (float(np.percentile(ms, q)) * 1e3 for q in (20, 50, 80))
    return {"p50": p50, "p20": p20, "p80": p80, "calls": len(ms), "graph": False}


# ----------------------------------------------------------------------------------------------------------------------
# rungs and peers


def rungs_of(ops, op, dtype_name):
    """[(label, function)]: the rungs of the ladder that the dtype and the GPU have, and the public function. Rung 4
    has the label "4", or "4 production" if it is the public function. The label "production" is that of a public
    function which chooses among rungs."""
    file = next(name for name in OPS if hasattr(importlib.import_module(f"{ops.__name__}.{name}"), op))
    public = getattr(importlib.import_module(f"{ops.__name__}.{file}"), op)
    if ops.__name__ == "llmc.cpu":
        return [("llmc.cpu", public)]
    rungs = [rung for rung in ladder.of(op) if ladder.why_not(rung, dtype_name) is None]
    found = [(f"{rung.number}" + " production" * (rung.call is public), rung.call) for rung in rungs]
    return found if any(rung.call is public for rung in rungs) else [*found, ("production", public)]


def numpy_only(function, *arrays):
    """The naive peer: function(*arrays) where they are NumPy arrays, else None."""
    if all(array is None or isinstance(array, np.ndarray) for array in arrays):
        return lambda: function(*arrays)
    return None


def torch_peers(b, function, *, dout=None, inputs=()):
    """Peers "torch" and "torch.compile" of a function without arguments; with dout, of its backward pass alone."""
    torch = b.torch
    peers = {}
    for name, prepare in (("torch", lambda f: f), ("torch.compile", compiled(torch))):
        if prepare is None:
            peers[name] = None
            continue
        call = prepare(function)
        if dout is not None:
            out = call()
            call = backward_of(torch, out, inputs, dout)
        peers[name] = call
    return peers


def backward_of(torch, out, inputs, dout):
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def compiled(torch):
    """torch.compile, or None where it cannot work (no compiler)."""
    if not hasattr(torch, "compile"):
        return None
    import torch._functorch.config as config

    config.donated_buffer = False  # backward is called again and again on one graph

    def prepare(function):
        torch._dynamo.reset()
        return torch.compile(function)

    return prepare


class Wrong(Exception):
    """A rung's result that differs from the float64 reference, or a time that cannot be."""


def check(case, label, function, saved, want):
    """Runs a rung once from the saved state and compares. Returns the largest error over its tolerance."""
    for name in case.writes.split():
        poison(case.args[name])
    for name, copy in saved.items():
        case.args[name][...] = copy
    if "scratch" in case.args:
        poison(case.args["scratch"])
    function(*case.args.values())
    worst = 0.0
    for name, index, truth in want:
        got = on_host(case.args[name], index)
        eps = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[case.args[name].dtype.name]
        scale = np.max(np.abs(truth))
        allowed = (case.ulps * eps + 1e-5) * scale + 1e-30
        error = np.abs(got - truth)
        error = float(np.max(np.where(np.isfinite(error), error, np.inf)))
        if error > allowed:
            raise Wrong(f"{case.op} {label}: {name} is off by {error:.3g}, allowed {allowed:.3g} ({case.shape})")
        worst = max(worst, error / allowed)
    return worst


def poison(array):
    array.view(np.uint8)[...] = 0xFF


# ----------------------------------------------------------------------------------------------------------------------
# traffic, on the CPU executor


def traffic(case, function):
    """What one call reads and writes: {launches, requests, read, written (bytes), ratio to the fewest bytes, ...}.

    An access counts its 32-byte sectors each time it is made: data that a kernel reads twice counts twice. Arrays up to
    an eighth of the op's largest, such as a layer's weights or a row's statistics, stay in a cache: they count once.
    sectors: 32-byte sectors of a warp's request. coalescing: fewest sectors for the bytes asked for / sectors, in %.
    conflicts: extra wavefronts of shared memory, in %.
    """
    simt = importlib.import_module("llmc.simt")
    with simt.traffic() as rows:
        function(*case.args.values())
    largest = max(a.nbytes for name, a in case.args.items() if isinstance(a, np.ndarray) and name != "scratch")
    moved = {False: 0, True: 0}
    of_global = [r for r in rows if r.space == "global"]
    for key in {(r.launch, r.array, r.write) for r in of_global}:
        own = [r for r in of_global if (r.launch, r.array, r.write) == key]
        nbytes = 32 * sum(r.units for r in own)
        moved[key[2]] += min(nbytes, own[0].array_bytes) if own[0].array_bytes <= largest / 8 else nbytes
    requests, units = sum(r.requests for r in of_global), sum(r.units for r in of_global)
    ideal = sum(min(r.ideal, r.units) for r in of_global)
    shared = [r for r in rows if r.space == "shared"]
    wavefronts, fewest = sum(r.units for r in shared), sum(r.ideal for r in shared)
    return {
        "launches": len({r.launch for r in rows}),
        "requests": requests,
        "units": units,
        "wavefronts": wavefronts,
        "read": moved[False],
        "written": moved[True],
        "ratio": sum(moved.values()) / case.bytes,
        "sectors": units / requests,
        "coalescing": 100 * ideal / units,
        "conflicts": 100 * (wavefronts / fewest - 1) if fewest else 0.0,
    }


def failure(b, case, label, error):
    """The result of a rung that cannot be timed. Ends the run unless the others are wanted all the same."""
    text = str(error) if isinstance(error, Wrong) else f"{case.op} {label}: {type(error).__name__}: {error}"
    text = " ".join(text.split())
    if not b.keep_going:
        sys.exit(text)
    return {"op": case.op, "shape": case.shape, "dtype": b.dtype_name, "name": label, "failed": text}


def count_case(b, case):
    """Checks every rung and counts its traffic -> list of result dictionaries, printed as a table."""
    print(f"\n{case.op}  {case.shape} {b.dtype_name} | at least {case.bytes / 1e3:.1f} kB")
    heads = ("launches", "requests", "read kB", "written kB", "x least", "sectors/req", "coalesced%", "conflicts%")
    print(f"{'rung':<24}" + "".join(f"{h:>12}" for h in heads))
    results, want, saved = [], case.want(), {name: case.args[name].copy() for name in case.adds.split()}
    for label, function in rungs_of(b.ops, case.op, b.dtype_name):
        try:
            with importlib.import_module("llmc.simt").mode(orders=("forward",)):  # races are for the tests to find
                check(case, label, function, saved, want)
            r = traffic(case, function)
        except Exception as error:
            results.append(failure(b, case, label, error))
            print(f"{label:<24}{'FAILED':>12}  {results[-1]['failed']}")
            continue
        kilo = "".join(f"{r[k] / 1e3:>12.1f}" for k in ("read", "written"))
        exact = f"{r['ratio']:>12.3f}{r['sectors']:>12.2f}{r['coalescing']:>12.1f}{r['conflicts']:>12.1f}"
        print(f"{label:<24}{r['launches']:>12}{r['requests']:>12}{kilo}{exact}")
        results.append({"op": case.op, "shape": case.shape, "dtype": b.dtype_name, "name": label} | r)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# running and reporting


def run_case(b, case):
    """Checks and times a case -> list of result dictionaries, printed as a table."""
    want = case.want()
    saved = {name: case.args[name].copy() for name in case.adds.split()}
    rows, results = [], []
    for label, function in rungs_of(b.ops, case.op, b.dtype_name):
        if case.rungs is not None and label.isdigit() and int(label) not in case.rungs:
            continue
        try:
            check(case, label, function, saved, want)
            rows.append(Row(label, bind(function, case.args), case.bytes, case.flops))
        except Exception as error:
            results.append(failure(b, case, label, error))
    if case.naive is not None and b.device == "cpu":
        rows.append(Row("NumPy naive", case.naive, case.bytes, case.flops, "host"))
    if b.device == "cuda" and not case.flops:
        rows.append(Row("copy of as many bytes", b.copy(case.bytes // 2), case.bytes, 0))
    if case.peers is not None:
        peers = {"torch": None, "torch.compile": None}
        try:
            peers = case.peers() if b.torch is not None else peers
        except Exception as error:  # some compile, or run their forward pass, here
            print(f"{case.op}: no peers: {' '.join(str(error).split())[:80]}")
        rows += [Row(name, call, case.bytes, case.flops, "torch") for name, call in peers.items()]
    floor = b.limit_us(case.bytes, case.flops)
    for row in rows:
        result = {"op": case.op, "shape": case.shape, "dtype": b.dtype_name, "name": row.name}
        if row.call is None:
            results.append(result | {"absent": True})
            continue
        try:
            result |= b.time(row)
            result["GBs"], result["TFLOPs"] = row.bytes / result["p50"] / 1e3, row.flops / result["p50"] / 1e6
            result["limit"] = 100 * floor / result["p50"]
            if b.device == "cuda" and result["limit"] > 200 and case.bytes > 4 * l2_bytes():
                raise Wrong(f"{case.op} {row.name}: {result['p50']:.1f} us is half of the limit: not timed right")
            results.append(result)
        except Exception as error:  # a peer that this machine cannot run is absent; a rung of ours that fails is not
            if row.kind == "torch" and not isinstance(error, Wrong):
                results.append(result | {"absent": True, "why": " ".join(str(error).split())[:60]})
            else:
                results.append(failure(b, case, row.name, error))
    b.print(case, results, floor)
    return results


def bind(function, args):
    values = list(args.values())
    return lambda: function(*values)


def find(results, name):
    return next((r for r in results if r["name"] == name and "p50" in r), None)


def print_table(case, results, floor):
    print(f"\n{case.op}  {case.shape} | {case.bytes / 1e6:.1f} MB, {case.flops / 1e9:.1f} GFLOP | limit {floor:.1f} us")
    heads = ("us p50", "p20", "p80", "GB/s", "TFLOP/s", "% limit", "x torch", "x compile")
    print(f"{'rung':<24}" + "".join(f"{h:>11}" for h in heads))
    eager, comp = find(results, "torch"), find(results, "torch.compile")
    for r in results:
        if "p50" not in r:
            why = f"FAILED  {r['failed']}" if "failed" in r else f"{'absent':>11}  {r.get('why', '')}"
            print(f"{r['name']:<24}{why}")
            continue
        ratios = "".join(f"{peer['p50'] / r['p50']:>11.2f}" if peer else f"{'-':>11}" for peer in (eager, comp))
        name = r["name"] + "*" * r["graph"]
        times = "".join(f"{r[q]:>11.1f}" for q in ("p50", "p20", "p80"))
        print(f"{name:<24}{times}{r['GBs']:>11.0f}{r['TFLOPs']:>11.2f}{r['limit']:>11.1f}{ratios}")


BRIEF_HEAD = f"{'op':<24}{'shape':<29}{'rung':<13}{'us p50':>9}{'% limit':>9}{'% copy':>8}"


def print_brief(case, results, floor):
    """Prints production and the rungs within 1.3 times the fastest time, what failed, and what to change.
    % copy is the speed as a share of that of a copy of as many bytes."""
    ours = [r for r in results if re.fullmatch(r"\d+|(\d+ )?production|llmc.cpu", r["name"]) and "p50" in r]
    fastest, copy = min(ours, key=lambda r: r["p50"], default=None), find(results, "copy of as many bytes")
    production = next((r for r in ours if not r["name"].isdigit()), None)
    name = f"{case.op:<24}{case.shape[:28]:<29}"
    for r in ours:
        if r is not production and r["p50"] > 1.3 * fastest["p50"]:
            continue
        same = f"{100 * copy['p50'] / r['p50']:>8.1f}" if copy else f"{'-':>8}"
        note = ""
        if r is fastest and production and r["p80"] < production["p20"]:  # faster by more than the spread of both
            gain = 100 * (production["p50"] / r["p50"] - 1)
            note = f"  <- production to {r['name']}: +{gain:.0f} %"
        print(f"{name}{r['name']:<13}{r['p50']:>9.1f}{r['limit']:>9.1f}{same}{note}", flush=True)
        name = f"{'':<53}"
    for r in results:
        if "failed" in r:
            print(f"FAILED  {r['failed']}", flush=True)


def commit():
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def software(b):
    found = [f"Python {platform.python_version()}", f"NumPy {np.__version__}"]
    if b.device == "cuda":
        found.append(f"CuPy {b.ops.device.module.import_cupy().__version__}")
    return ", ".join(found + ([f"torch {b.torch.__version__}"] if b.torch is not None else []))


def csv_rows(b, results):
    """A row for each time, be it of a rung or of a peer."""
    common = {"bench": "op", "date": datetime.date.today().isoformat(), "commit": commit(), "mode": MODE}
    common |= {"device": b.description.split(",")[0], "software": software(b)} | b.ceilings
    names = {q: f"us_{q}" for q in ("p50", "p20", "p80")} | {"calls": None, "graph": None}
    rows = [common | {names.get(k, k): v for k, v in r.items() if names.get(k, k)} for r in results if "p50" in r]
    return [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def append_rows(path, rows):
    """Appends dictionaries to a CSV file. New columns go to the right, and earlier rows are empty there."""
    path, old, fields = Path(path), [], []
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            old, fields = list(reader), list(reader.fieldnames or [])
    fields += [name for name in dict.fromkeys(k for row in rows for k in row) if name not in fields]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(old + rows)


def compare(old, results):
    """Prints what is faster or slower than in an earlier CSV by more than the spread of both (p20 to p80)."""
    with open(old, newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["bench"] == "op"]
    before = {tuple(r[k] for k in ("op", "shape", "dtype", "name")): r for r in rows}
    moved = 0
    print(f"\nmoved against {old}:")
    for r in results:
        was = before.get(tuple(r[k] for k in ("op", "shape", "dtype", "name")))
        if was is None or "p50" not in r:
            continue
        faster, slower = r["p80"] < float(was["us_p20"]), r["p20"] > float(was["us_p80"])
        if faster or slower:
            moved += 1
            change = f"{float(was['us_p50']):.1f} -> {r['p50']:.1f} us"
            ratio = float(was["us_p50"]) / r["p50"]
            name = f"{r['op']} {r['name']} ({r['shape']})"
            how = was["commit"] + ("" if was.get("mode") == MODE else ", timed otherwise")
            print(f"  {'faster' if faster else 'SLOWER'}  {name:<70} {change}, x {ratio:.2f}, was {how}")
    print(f"  {moved} moved, the rest is within the noise")


def flags(description):
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-b", "--batch-size", type=int, metavar="B", help="rows (GPU 32, CPU 4)")
    p.add_argument("-t", "--sequence-length", type=int, metavar="T", help="tokens in a row (GPU 1024, CPU 64)")
    p.add_argument("-e", "--model", metavar="MODEL", help="a descriptor: widths and vocabulary (GPU d12, CPU d6)")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the arrays (GPU bf16, CPU fp32)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where it works")
    p.add_argument("--executor", action="store_true", help="count traffic on the CPU executor; needs g++")
    p.add_argument("--only", metavar="TEXT", default="", help="only ops whose name has TEXT in it")
    p.add_argument("--no-peers", action="store_true", help="our rungs alone")
    p.add_argument("--brief", action="store_true", help="no peers, and of the rungs only production and the fastest")
    text = "another value for a constant of llmc/cuda, e.g. layernorm.ROW_THREADS=128: to try sizes of blocks and grids"
    p.add_argument("--set", action="append", default=[], metavar="FILE.NAME=N", help=text)
    p.add_argument("--csv", metavar="FILE", help="append the results, e.g. to dev/results/nvidia_h200.csv")
    p.add_argument("--compare", metavar="FILE", help="say what moved against the newest rows in FILE")
    return p


def main(*modules, argv=None, description=None, keep_going=False):
    """The command of a bench file: runs the cases of the given modules. Returns (Bench, results).

    keep_going: a rung that fails is reported and the rest goes on; finish() then ends with exit code 1.
    """
    args = flags(description or modules[0].__doc__).parse_args(argv)
    if args.compare and not Path(args.compare).is_file():
        sys.exit(f"--compare {args.compare}: no such file. HINT: --csv {args.compare} makes one")
    try:
        b = Bench(args.device, args.executor, args.model, args.batch_size, args.sequence_length, args.dtype)
    except UserError as error:
        sys.exit(f"{error}")
    b.keep_going, b.print = keep_going, print_brief if args.brief else print_table
    for text in args.set:
        set_constant(b.ops, text)
    print(f"{b.description} | {software(b)} | commit {commit()}")
    if b.ceilings:
        print(f"measured now: copy {b.ceilings['copy_GBs']:.0f} GB/s, matmul {b.ceilings['matmul_TFLOPs']:.2f} TFLOP/s")
    if args.brief and not b.executor:
        print(BRIEF_HEAD)
    results = []
    for module in modules:
        try:
            for case in module.cases(b):
                if args.only in case.op:
                    case = case._replace(peers=None) if args.no_peers or args.brief else case
                    results += count_case(b, case) if b.executor else run_case(b, case)
        except Exception as error:  # making a case failed: for lack of memory, or with the device
            if not keep_going:
                raise
            text = " ".join(f"{module.__name__}: {type(error).__name__}: {error}".split())
            print(f"FAILED  {text}", flush=True)
            results.append({"op": module.__name__, "shape": "", "name": "", "failed": text})
    if args.compare and not b.executor:
        compare(args.compare, results)
    if args.csv and not b.executor:
        append_rows(args.csv, csv_rows(b, results))
    return b, results


def set_constant(ops, text):
    """ "layernorm.ROW_THREADS=128": launchers of the op set see the new value."""
    match = re.fullmatch(r"(\w+)\.([A-Z_]+)=(\d+)", text)
    module = importlib.import_module(f"{ops.__name__}.{match[1]}") if match and match[1] in OPS else None
    if not isinstance(getattr(module, match[2] if match else "", None), int):
        sys.exit(f"--set {text}: no such constant in {ops.__name__}. HINT: layernorm.ROW_THREADS=128")
    setattr(module, match[2], int(match[3]))


def spread(n, count):
    """The part of an array that is compared: a slice of about `count` of n elements, the last among them."""
    step = max(1, n // count)
    return slice((n - 1) % step, None, step)


def finish(b, results):
    """The last line: everything as JSON. Exit code 1 if a rung failed."""
    about = {"device": b.description, "commit": commit(), "software": software(b)}
    print(json.dumps(about | b.ceilings | {"rows": results}))
    if any("failed" in r for r in results):
        sys.exit(1)
