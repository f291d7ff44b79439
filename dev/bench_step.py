"""A whole training step (forward, backward, gradient norm, clip, AdamW): llmc against PyTorch, in one process.

    python dev/bench_step.py                       GPU: GPT-2 124M, bf16, B=32, T=1024; CPU: fp32, B=4, T=64
    python dev/bench_step.py --ops                 and where the time goes, op by op, beside the limit of each
    python dev/bench_step.py --start               seconds from process start to the first and the tenth step
    python dev/bench_step.py --device cpu --pace 200        ours alone for 200 steps: does it hold its speed?
    python dev/bench_step.py --kernel matmul_forward=4      any rung in the place of the production one
    python dev/bench_step.py --no-peers --variant attention_forward=4,attention_backward=4 --variant recompute=0
                                                   ours against ours with other rungs, or -r: a step each in turn
    python dev/bench_step.py -e d24 -b 32 --peer torch.compile      where not all fit into the memory

The peers (dev/torch_gpt2.py) are what a PyTorch user writes: eager, and on a GPU torch.compile; fused attention, bf16
autocast, fused AdamW. Same weights, batches and threads; a step each in turn, another first every time, so that a busy
machine or a chip that the one before has heated disturbs all alike, and the ratio of medians is the result. A time is
that of the host, from the tokens in NumPy to the loss in Python. Losses are compared at every step, and a mismatch ends
the benchmark. The last line of output is JSON.
"""

import argparse
import datetime
import inspect
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import llmc.model
from dev import bench, roofline
from llmc import gpt2
from llmc.cuda import ladder
from llmc.errors import UserError
from llmc.model import AdamW, Model, memory_plan

# The rate is small so that large models, too, can do without warm-up: their losses are compared at every step.
HYPER = AdamW(lr=1e-5, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0)


class Ours:
    """llmc's model with the interface of torch_gpt2.Trainer."""

    def __init__(self, b, recompute, graphs, ops=None, params=None):
        self.b, self.t = b, 0
        options = dict(recompute=recompute, dtype=b.dtype, graphs=graphs)
        self.model = Model(gpt2, ops or b.ops, b.config, b.B, b.T, **options)
        if params is None:
            self.model.init_weights()
        else:
            self.model.load_parameters(params)

    def step(self, x, y):
        self.t += 1
        self.model.forward(x)
        self.model.backward(x, y)
        self.model.update(HYPER, self.t)
        return self.model.mean_loss()

    def memory(self, x, y):
        """Bytes of the plan, which is all that is allocated on the device."""
        b = self.b
        plan = memory_plan(gpt2, b.ops, b.config, b.B, b.T, recompute=self.model.recompute, dtype=b.dtype)
        return sum(buffer.nbytes for buffer in plan)


class Timed:
    """An op set that notes the time of each op: rows of (label, events). Everything else is that of the op set."""

    def __init__(self, b):
        self.b, self.rows = b, []
        shapes = roofline.linear_layers(b.config)
        self.layers = {shape: name for name, shape in shapes.items()}

    def __getattr__(self, name):
        function = getattr(self.b.ops, name)
        if name == "device" or name.endswith("_scratch_size"):
            return function

        def timed(*args, **kwargs):
            label = name
            if name.startswith("matmul_"):
                arguments = inspect.signature(function).bind(*args, **kwargs).arguments
                label += " " + self.layers[arguments["weight"].shape]
            clock = self.b.clock()
            function(*args, **kwargs)
            self.rows.append((label, clock()))

        return timed

    def sums(self):
        """{label: (calls, ms)} since the last call of this; waits for the device."""
        self.b.ops.device.synchronize()
        found = {}
        for label, ms in self.rows:
            found.setdefault(label, []).append(ms())
        self.rows = []
        return {label: (len(times), sum(times)) for label, times in found.items()}


def op_times(ours, batches, steps=5):
    """{label: (calls, ms of a step)}: medians over steps without CUDA graphs, an event before and after each op."""
    model, graphs, ops = ours.model, ours.model.graphs, ours.model.ops
    model.ops, model.graphs, sums = Timed(ours.b), None, []
    for i in range(steps + 1):
        for _ in range(10 if ours.b.device == "cuda" else 0):
            ours.b.overwrite()  # 0.7 ms in all, in which the host runs ahead: the first ops wait for no launch
        ours.step(*batches[i % len(batches)])
        sums.append(model.ops.sums())
    model.ops, model.graphs = ops, graphs
    return {label: (calls, statistics.median(s[label][1] for s in sums[1:])) for label, (calls, _) in sums[0].items()}


def launches(ours, batch):
    """Kernel launches of a step, memory fills among them; None on a CPU."""
    if ours.b.device != "cuda":
        return None
    model, module, device = ours.model, ours.b.ops.device.module, ours.b.ops.device
    graphs, kernel, zero, count = model.graphs, module.kernel, device.zero, []

    def counted(function):
        def launch(*args, **kwargs):
            count.append(1)
            return function(*args, **kwargs)

        return launch

    model.graphs, device.zero = None, counted(zero)
    module.kernel = lambda *args, **kwargs: counted(kernel(*args, **kwargs))
    try:
        ours.step(*batch)
    finally:
        model.graphs, module.kernel, device.zero = graphs, kernel, zero
    return len(count)


def print_op_times(b, times, recompute):
    """The table, and the rows for the CSV: limits are those measured in this run."""
    copy, matmul = b.ceilings["copy_GBs"], b.ceilings["matmul_TFLOPs"]
    work = {w.label: w for w in roofline.step_work(b.config, b.B, b.T, b.dtype.itemsize, recompute)}
    print(f"\n{'op':<26}{'calls':>8}{'ms':>11}{'% of step':>11}{'TFLOP/s':>11}{'GB/s':>11}{'% limit':>11}")
    total, rows = sum(ms for _, ms in times.values()), []
    for label, (calls, ms) in sorted(times.items(), key=lambda item: -item[1][1]):
        w = work[label]
        limit = 100 * roofline.floor_ms(w, matmul, copy)[0] / ms
        print(
            f"{label:<26}{calls:>8}{ms:>11.3f}{100 * ms / total:>11.1f}{w.flops / ms / 1e9:>11.1f}"
            f"{w.bytes / ms / 1e6:>11.0f}{limit:>11.1f}"
        )
        rows.append(dict(op=label, calls=calls, ms_p50=round(ms, 4), limit=round(limit, 1)))
    floor = sum(roofline.floor_ms(w, matmul, copy)[0] for w in work.values())
    calls = sum(count for count, _ in times.values())
    print(f"{'all':<26}{calls:>8}{total:>11.3f}{100:>11.1f}{'':>22}{100 * floor / total:>11.1f}")
    return rows


def start_times(command, env, steps=10, timeout=300):
    """(seconds to the first step's line, to the tenth's) from the start of the process `command`."""
    start, seen = time.perf_counter(), {}
    process = subprocess.Popen(
        command, cwd=bench.ROOT, env={**os.environ, **env}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    tail = []
    for line in process.stdout:
        tail = [*tail[-9:], line]
        match = re.match(r"step +(\d+)/", line)
        if match:
            seen[int(match[1])] = time.perf_counter() - start
        if time.perf_counter() - start > timeout:
            process.kill()
    if process.wait() or 1 not in seen or steps not in seen:
        raise UserError(f"{' '.join(command)} did not train:\n{''.join(tail)}")
    return seen[1], seen[steps]


def start_table(B, T, model, device):
    """Time to the first and to the tenth step, cold and warm, ours and torch.compile. Returns rows."""
    sizes = ["-e", model, "-b", str(B), "-t", str(T)]
    ours = [sys.executable, "-m", "llmc.train", *sizes, "-x", "10", "-v", "0", "-s", "0", "--device", device]
    peer = [sys.executable, "dev/torch_gpt2.py", "--compile", *sizes]
    rows = []
    print(f"\nseconds from the start of the process, B={B} T={T}\n{'':<24}{'first step':>12}{'tenth':>12}")
    for name, command, variables in (
        ("llmc", ours, ["CUPY_CACHE_DIR"]),
        ("torch.compile", peer, ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"]),
    ):
        if name != "llmc" and bench.torch_or_none() is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            env = dict.fromkeys(variables, folder)
            for state in ("cold", "warm"):
                first, tenth = start_times(command, env)
                rows.append(dict(name=f"{name}, {state} cache", first_s=round(first, 2), tenth_s=round(tenth, 2)))
                print(f"{rows[-1]['name']:<24}{first:>12.2f}{tenth:>12.2f}", flush=True)
    return rows


def quantiles(ms):
    return {f"ms_p{q}": round(float(np.percentile(ms, q)), 3) for q in (20, 50, 80)}


def pace(ours, batches, steps):
    """Ours alone: medians of each tenth of the steps, and the JSON line."""
    ms, tenth = [], max(1, steps // 10)
    for t in range(steps):
        ms.append(bench.host_ms(lambda t=t: ours.step(*batches[t % len(batches)])))
        if (t + 1) % tenth == 0:
            print(f"steps {t + 2 - tenth:4d} to {t + 1:4d}: median {np.median(ms[-tenth:]):9.2f} ms", flush=True)
    ends = dict(first_tenth_ms=float(np.median(ms[1 : tenth + 1])), last_tenth_ms=float(np.median(ms[-tenth:])))
    b = ours.b
    print(json.dumps({"bench": "step_pace", "model": b.model, "B": b.B, "T": b.T, "steps": steps, **ends}))


def trainers(b, args):
    """{name: trainer or None where it cannot be had}, ours first."""
    graphs = b.device == "cuda" and not args.no_graph
    found = {"llmc": Ours(b, args.recompute, graphs)}
    for text in args.variant:
        ops, recompute = argparse.Namespace(**vars(b.ops)), args.recompute
        for setting in text.split(","):
            if setting in ("recompute=0", "recompute=1", "recompute=2"):
                recompute = int(setting[-1])
            else:
                ladder.use(ops, setting, b.dtype_name, b.C // b.NH)
        weights = b.ops.device.download(found["llmc"].model.params_flat)
        found[text] = Ours(b, recompute, graphs, ops, weights)
    if args.no_peers:
        return found
    names = {"torch eager": False} | ({"torch.compile": True} if b.device == "cuda" or args.compile else {})
    names = {name: compiled for name, compiled in names.items() if not args.peer or name in args.peer}
    if b.torch is None:
        return found | dict.fromkeys(names)
    from dev.torch_gpt2 import Trainer

    for other in ("cudnn", "mem_efficient", "math") * args.flash:
        getattr(b.torch.backends.cuda, f"enable_{other}_sdp")(False)
    model = found["llmc"].model
    params = {s.name: b.ops.device.download(getattr(model.params, s.name)) for s in gpt2.parameter_specs(b.config)}
    return found | {name: Trainer(b.config, b.device, compiled, params) for name, compiled in names.items()}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("-e", "--model", default="d12", help="descriptor (d12)")
    p.add_argument("-b", "--batch-size", type=int, metavar="B", help="rows (GPU 32, CPU 4)")
    p.add_argument("-t", "--sequence-length", type=int, metavar="T", help="tokens in a row (GPU 1024, CPU 64)")
    p.add_argument("-r", "--recompute", type=int, choices=(0, 1, 2), default=1)
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="ours (GPU bf16, CPU fp32)")
    p.add_argument("--steps", type=int, default=15, help="timed steps of each (15), after 3 to warm up")
    p.add_argument("--kernel", action="append", default=[], metavar="OP=N", help="a rung in the place of production")
    p.add_argument(
        "--variant", action="append", default=[], metavar="OP=N,...", help="ours with other rungs, beside it"
    )
    p.add_argument("--head-rows", type=int, default=llmc.model.HEAD_ROWS, metavar="N", help="ours: model.HEAD_ROWS")
    p.add_argument("--ops", action="store_true", help="time of each op of our step")
    p.add_argument("--start", action="store_true", help="time to the first and tenth step, cold and warm, instead")
    p.add_argument("--pace", type=int, default=0, metavar="N", help="time N steps of ours alone instead")
    p.add_argument("--no-peers", action="store_true", help="ours alone")
    p.add_argument(
        "--peer",
        action="append",
        choices=("torch eager", "torch.compile"),
        help="this peer alone, where two do not fit",
    )
    p.add_argument("--flash", action="store_true", help="GPU: the peers' attention is flash, not PyTorch's choice")
    p.add_argument("--no-graph", action="store_true", help="GPU: launch each kernel")
    p.add_argument("--compile", action="store_true", help="CPU: torch.compile too")
    p.add_argument("--threads", type=int, help="CPU: for all (default: all cores this process may use)")
    p.add_argument("--csv", metavar="FILE", help="append rows, e.g. to dev/results/nvidia_h200.csv")
    args = p.parse_args(argv)
    try:
        run(args)
    except UserError as error:
        sys.exit(f"bench_step: {error}")


def run(args):
    device = bench.pick(args.device)
    B, T = (32, 1024) if device == "cuda" else (4, 64)
    B, T = args.batch_size or B, args.sequence_length or T
    if device == "cpu" and args.threads:
        from llmc.cpu import device as cpu

        cpu.threads(args.threads)
    if args.start:
        rows = start_table(B, T, args.model, device)
        print(json.dumps(rows))
        return
    llmc.model.HEAD_ROWS = args.head_rows
    b = bench.Bench(device, False, args.model, B, T, args.dtype)
    if device == "cuda":
        b.ops.device.stream().use()  # our stream can capture graphs; each step ends with a wait
    for text in args.kernel:
        ladder.use(b.ops, text, b.dtype_name, b.C // b.NH)
    batches = []
    for _ in range(8):
        tokens = b.draw_tokens((B, T + 1))
        batches.append((np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])))
    flops = gpt2.flops_per_token(b.config, T) * B * T
    copy, matmul = b.ceilings["copy_GBs"], b.ceilings["matmul_TFLOPs"]
    print(f"GPT-2 {args.model} {b.dtype_name} B={B} T={T} recompute {args.recompute} | {b.description}")
    print(f"{flops / 1e9:.0f} GFLOP a step | measured now: copy {copy:.0f} GB/s, matmul {matmul:.2f} TFLOP/s")
    if args.pace:
        pace(Ours(b, args.recompute, device == "cuda" and not args.no_graph), batches, args.pace)
        return

    peers = trainers(b, args)
    ms = {name: [] for name in peers}
    exact = b.dtype_name == "fp32" and device == "cpu"
    for t in range(3 + args.steps):
        losses = {}
        turns = [*peers.items()]
        for name, trainer in turns[t % len(turns) :] + turns[: t % len(turns)]:
            if trainer is not None:
                start = time.perf_counter()
                losses[name] = trainer.step(*batches[t % 8])
                ms[name].append((time.perf_counter() - start) * 1e3)
        # In 16 bits only the first forward pass is the same computation. Our weights are then rounded with noise, as
        # llm.c's are, and autocast's to nearest. Large models without warm-up amplify the difference.
        tolerance = 2e-4 if exact else 0.005 if t == 0 else 0.03
        for name, loss in losses.items():
            if not abs(loss / losses["llmc"] - 1) <= tolerance:
                sys.exit(f"step {t}: loss {losses['llmc']:.6f}, {name} {loss:.6f}: not the same computation")

    peak = peak_flops(b)
    heads = ("ms p50", "p20", "p80", "tokens/s", "MFU %", "% matmul", "GiB", "x")
    width = max(18, *(len(name) + 1 for name in peers))
    print(f"\n{'':<{width}}" + "".join(f"{h:>11}" for h in heads))
    common = dict(date=datetime.date.today().isoformat(), commit=bench.commit(), device=b.description.split(",")[0])
    common |= dict(software=bench.software(b), model=args.model, B=B, T=T, recompute=args.recompute, dtype=b.dtype_name)
    common |= {k: round(v, 2) for k, v in b.ceilings.items()}
    rows = []
    for name, trainer in peers.items():
        if trainer is None:
            print(f"{name:<{width}}{'absent':>11}")
            continue
        q = quantiles(ms[name][3:])
        rate, share = B * T / q["ms_p50"] * 1e3, flops / q["ms_p50"] / 1e9
        mfu, gib = 100 * share / peak if peak else math.nan, trainer.memory(*batches[0]) / 2**30
        ratio = q["ms_p50"] / rows[0]["ms_p50"] if rows else 1.0
        numbers = f"{rate:>11.0f}{mfu:>11.1f}{100 * share / matmul:>11.1f}{gib:>11.2f}{ratio:>11.2f}"
        print(f"{name:<{width}}{q['ms_p50']:>11.2f}{q['ms_p20']:>11.2f}{q['ms_p80']:>11.2f}{numbers}")
        label = f"llmc {name}" if name in args.variant else name
        label += "".join(f" {k}" for k in args.kernel) * (name == "llmc")
        mfu, gib = (None if math.isnan(x) else x for x in (round(mfu, 1), round(gib, 2)))  # JSON has no NaN
        own = dict(name=label, tokens_per_second=round(rate), mfu=mfu, GiB=gib)
        rows.append(dict(bench="step", **common, **own, **q))
    count = launches(peers["llmc"], batches[0])
    print("x: how many times longer than llmc" + (f" | llmc: {count} launches a step" if count else ""))
    if args.ops:
        times = print_op_times(b, op_times(peers["llmc"], batches), args.recompute)
        rows += [dict(bench="step_op", **common, name="llmc", **row) for row in times]
    if args.csv:
        bench.append_rows(args.csv, rows)
    print(json.dumps({**common, "launches": count, "rows": [{k: r[k] for k in r if k not in common} for r in rows]}))


def peak_flops(b):
    """Peak TFLOP/s of the device by its data sheet, or None."""
    if b.device != "cuda":
        return None
    from llmc.training import mfu

    name, multiprocessors, _ = mfu.current_gpu()
    peak = mfu.peak_flops(name, multiprocessors, b.dtype_name)
    return peak and peak / 1e12


if __name__ == "__main__":
    main()
