"""Everything a GPU can tell about this checkout, in one command: tests, parity, speed, memory, time to the first step.

    python dev/gpu_check.py                          all sections; some 9 minutes on an H200 with 16 cores
    python dev/gpu_check.py tests parity             some of them: tests, parity, speed, ops, start, rungs, run
    python dev/gpu_check.py ranks --ranks 2,4,8 --price 2.5         several GPUs, see bench_ranks.py; not among "all"
    python dev/gpu_check.py ranks --device cpu -e tiny:d1 --ranks 2,4       the same on CPUs, over MPI
    python dev/gpu_check.py sanitize                 NVIDIA's compute-sanitizer, see sanitize.py; not among "all"
    python dev/gpu_check.py --csv results.csv        where the rows go (dev/results/<device>.csv)

tests   every test marked gpu, on several workers; the other op sets need no GPU and run in CI
parity  the losses of 10 steps in bf16, fp16 and fp32 against the fp32 CPU op set, same weights and batches
speed   GPT-2 124M, bf16, T=1024, B=4, 32, 64, CUDA graphs: ms, tokens/s, MFU, memory against the plan
ops     the same step at B=32 op by op, in ms and in % of the copy bandwidth and matmul rate measured beside it
start   seconds from starting `python -m llmc.train` to its first and tenth step, with an empty and a full kernel cache
rungs   every rung of every op at B=32, checked and timed without peers: production, the fastest, what to change
run     GPT-2 124M end to end with the commands: trained, killed by SIGKILL halfway, resumed to the bits of a run that
        was not, evaluated, exported to Hugging Face's format, logits compared with transformers' where it is there
ranks   124M and 1558M on several GPUs against one: speed, what of the communication shows, weights and losses, the
        death of a rank, the pace of llm.c's 1558M run

sanitize    memcheck, initcheck, synccheck and racecheck over every production kernel at small shapes

Exit code 1 when a test or a rung fails, a loss is off by more than 0.5 % (fp32: 0.05 %), a resumed run has other bits,
its evaluation another loss than its training had, its export other logits, ranks other losses or weights than one, or
compute-sanitizer a finding that is not explained.
"""

import argparse
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import llmc
from dev import bench, bench_all, bench_ranks, bench_step, sanitize
from llmc import cpu, gpt2
from llmc.data.prepare import prepare_default
from llmc.data.shards import write_shard
from llmc.errors import UserError
from llmc.model import Model, memory_plan

ROOT = Path(__file__).resolve().parents[1]
STEPS, ALLOWED = 10, {"bf16": 0.005, "fp16": 0.005, "fp32": 0.0005}  # how far a loss may be off, relative
LOGITS = 0.001  # how far a logit may be off in fp32, as a share of the largest


def tests(args, rows):
    """Runs the tests marked gpu -> whether all passed. Failures are listed by name and message."""
    files = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if re.search(r"mark\.(op|gpu)\b", p.read_text())]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-m", "gpu", "-n", str(args.workers), "--dist", "load", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", *options, f"--junitxml={report}", *files]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            print(run.stdout[-3000:], run.stderr[-3000:])
            return False
        cases = xml.parse(report).getroot().iter("testcase")
        bad, count, skipped = [], 0, 0
        for case in cases:
            count += 1
            skipped += case.find("skipped") is not None
            problem = case.find("failure") if case.find("failure") is not None else case.find("error")
            if problem is not None:
                bad.append(f"  {case.get('classname')}::{case.get('name')}: {problem.get('message', '')[:300]}")
    passed = count - skipped - len(bad)
    print(f"{passed} passed, {len(bad)} failed, {skipped} skipped")
    rows.append(dict(bench="gpu_tests", passed=passed, failed=len(bad), skipped=skipped))
    print("\n".join(bad[:40]))
    return count > skipped and not bad


def losses_of(model, batches, host):
    """The losses of one step for each batch; training starts from the parameters `host`."""
    model.load_parameters(host)
    losses = []
    for t, (x, y) in enumerate(batches):
        model.forward(x)
        model.backward(x, y)
        model.update(dataclasses.replace(bench_step.HYPER, lr=1e-4), t + 1)
        losses.append(model.mean_loss())
    return np.array(losses)


def draw(config, count, B, T, seed=0):
    """Batches of random tokens with the frequencies of text."""
    rng, p = np.random.default_rng(seed), 1.0 / np.arange(1, config.vocab_size + 1)
    tokens = rng.choice(config.vocab_size, size=(count, B, T + 1), p=p / p.sum()).astype(np.int32)
    return [(np.ascontiguousarray(t[:, :-1]), np.ascontiguousarray(t[:, 1:])) for t in tokens]


def parity(args, rows):
    """Ten losses of GPT-2 124M, B=4, T=64, in each precision -> whether all are near those of the fp32 CPU op set."""
    from llmc import cuda

    cuda.device.start()
    config = gpt2.config_from_descriptor("d12")
    batches = draw(config, STEPS, 4, 64)
    model = Model(gpt2, cpu, config, 4, 64)
    model.init_weights()
    host = model.host_parameters().copy()
    reference, ok = losses_of(model, batches, host), True
    print(f"{'losses':<10}{'first':>12}{'last':>12}{'largest difference':>22}{'allowed':>12}")
    print(f"{'cpu fp32':<10}{reference[0]:>12.6f}{reference[-1]:>12.6f}")
    for name, allowed in ALLOWED.items():
        model = Model(gpt2, cuda, config, 4, 64, dtype=bench.numpy_dtype(name), graphs=True)
        model.loss_scale = 1024.0 if name == "fp16" else 1.0
        losses = losses_of(model, batches, host)
        worst = float(np.max(np.abs(losses / reference - 1)))
        ok &= worst <= allowed
        print(f"{name:<10}{losses[0]:>12.6f}{losses[-1]:>12.6f}{100 * worst:>20.4f} %{100 * allowed:>10.2f} %")
        rows.append(dict(bench="gpu_parity", model="d12", dtype=name, B=4, T=64, difference=round(worst, 7)))
    return ok


def speed(args, rows):
    """Measures milliseconds, tokens/s, MFU and memory at three batch sizes."""
    from llmc import cuda

    cuda.device.start()
    cupy = cuda.module.import_cupy()
    config, host = gpt2.config_from_descriptor("d12"), None
    print(f"{'B':<6}{'ms p50':>10}{'p20':>10}{'p80':>10}{'tokens/s':>12}{'MFU %':>8}{'plan MiB':>12}{'used MiB':>12}")
    for B in (4, 32, 64):
        b = argparse.Namespace(device="cuda", dtype_name="bf16")
        model = Model(gpt2, cuda, config, B, 1024, dtype=bench.numpy_dtype("bf16"), graphs=True)
        if host is None:
            model.init_weights()
            host = cuda.device.download(model.params_flat)
        else:
            model.load_parameters(host)
        ms = []
        for t, (x, y) in enumerate(draw(config, 4, B, 1024) * 5):
            start = time.perf_counter()
            model.forward(x)
            model.backward(x, y)
            model.update(bench_step.HYPER, t + 1)
            model.mean_loss()
            ms.append((time.perf_counter() - start) * 1e3)
        q, peak = bench_step.quantiles(ms[4:]), bench_step.peak_flops(b)
        rate, flops = B * 1024 / q["ms_p50"] * 1e3, gpt2.flops_per_token(config, 1024)
        mfu = 100 * rate * flops / peak / 1e12 if peak else float("nan")
        plan = memory_plan(gpt2, cuda, config, B, 1024, dtype=bench.numpy_dtype("bf16"))
        plan = sum(buffer.nbytes for buffer in plan) / 2**20
        used = cupy.get_default_memory_pool().used_bytes() / 2**20
        times = f"{q['ms_p50']:>10.2f}{q['ms_p20']:>10.2f}{q['ms_p80']:>10.2f}"
        print(f"{B:<6}{times}{rate:>12.0f}{mfu:>8.1f}{plan:>12.0f}{used:>12.0f}", flush=True)
        common = dict(bench="step", name="llmc", model="d12", dtype="bf16", B=B, T=1024, mode="graph", recompute=1)
        measured = dict(tokens_per_second=round(rate), mfu=round(mfu, 1), plan_MiB=round(plan), device_MiB=round(used))
        rows.append(common | q | measured)
        del model
        cupy.get_default_memory_pool().free_all_blocks()


def ops(args, rows):
    """Measures the time of each op of the step."""
    b = bench.Bench("cuda", False, "d12", 32, 1024, "bf16")
    b.ops.device.stream().use()
    print(f"measured now: copy {b.ceilings['copy_GBs']:.0f} GB/s, matmul {b.ceilings['matmul_TFLOPs']:.0f} TFLOP/s")
    ours = bench_step.Ours(b, 1, False)
    times = bench_step.print_op_times(b, bench_step.op_times(ours, draw(b.config, 4, 32, 1024)), 1)
    common = dict(bench="step_op", name="llmc", model="d12", dtype="bf16", B=32, T=1024, recompute=1, **b.ceilings)
    rows += [common | row for row in times]
    print(f"launches in a step: {bench_step.launches(ours, draw(b.config, 1, 32, 1024)[0])}")


def start(args, rows):
    """Measures the seconds to the first and tenth step of the default job, which runs in a process of its own."""
    print(f"{'':<12}{'first step':>12}{'tenth':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            flags = ["-x", "10", "-v", "0", "-s", "0", "-n", "0", "-o", f"{folder}/{state}"]
            command = [sys.executable, "-m", "llmc.train", "--device", "cuda", *flags]
            first, tenth = bench_step.start_times(command, {"CUPY_CACHE_DIR": f"{folder}/kernels"})
            print(f"{state:<12}{first:>12.2f}{tenth:>12.2f}", flush=True)
            rows.append(dict(bench="start", name=f"llmc, {state} cache", first_s=round(first, 2), tenth_s=tenth))


def rungs(args, rows):
    """Prints a line for each rung that is near the fastest -> whether all are right."""
    b, results = bench_all.measure(["--device", "cuda", "-e", "d12", "-b", "32", "-t", "1024", "--brief"])
    rows += bench.csv_rows(b, results)
    return not any("failed" in r for r in results)


def shards(folder, count, vocab_size):
    """(train path, val path, tokenizer, what it is): Tiny Shakespeare in GPT-2's tokens, else random tokens."""
    try:
        train, val, _ = prepare_default("gpt2", allow_fallback=False)
        return train, val, "gpt2", "Tiny Shakespeare"
    except UserError:
        paths = [os.path.join(folder, f"drawn_{split}.bin") for split in ("train", "val")]
        for seed, path in enumerate(paths):
            ((tokens, _),) = draw(argparse.Namespace(vocab_size=vocab_size), 1, 1, count, seed)
            write_shard(path, tokens[0].astype(np.uint16), vocab_size)
        return *paths, "none", "tokens drawn at random"


def command(name, *flags):
    """The start of a command line that runs a command of the package, its output unbuffered."""
    return [sys.executable, "-u", "-m", f"llmc.{name}", *map(str, flags)]


def call(name, *flags):
    """Run a command of the package to its end -> (its output, seconds)."""
    begun = time.perf_counter()
    done = subprocess.run(command(name, *flags), cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise UserError(f"llmc.{name} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout, time.perf_counter() - begun


def killed(step, *flags):
    """Run the trainer, and kill it once it has printed the line of this step -> its exit code."""
    with subprocess.Popen(command("train", *flags), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if re.match(rf"step +{step}/", line):
                process.send_signal(signal.SIGKILL)
                break
        return process.wait(timeout=600)


def logit_difference(checkpoint, folder, B, T, device):
    """Largest difference of a logit between llmc, in fp32, and transformers, as a share of the largest; or None."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    model = llmc.load(checkpoint, llmc.device(device), B, T, dtype="fp32")
    x = np.random.default_rng(0).integers(0, model.config.vocab_size, (B, T), np.int32)
    ours = model.ops.device.download(model.forward(x).output)[..., : model.config.vocab_size]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    with torch.no_grad():
        theirs = theirs(torch.from_numpy(x).long()).logits.numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def run(args, rows, model="d12", B=16, T=1024, steps=20, every=5, device="cuda", vocab_size=50257):
    """Train, kill, resume, evaluate, export -> whether bits, loss and logits are as expected."""
    with tempfile.TemporaryDirectory() as folder:
        train, val, tokenizer, what = shards(folder, 2 * B * T + 1, vocab_size)
        whole, parts, hf = (os.path.join(folder, name) for name in ("whole", "parts", "hf"))
        flags = ["-i", train, "-j", val, "-e", model, "-b", B, "-t", T, "-d", B * T, "-x", steps, "-n", every, "-nk", 2]
        flags += ["-v", steps, "-m", -1, "-s", 0, "-l", 3e-4, "-u", steps // 4, "--device", device]
        print(f"{model} on {what}: {steps} steps of {B} x {T} tokens, a checkpoint every {every}")
        out, seconds = call("train", *flags, "-o", whole)
        losses = [float(x) for x in re.findall(r"^val loss ([\d.]+)", out, re.M)]
        log = [json.loads(line) for line in Path(whole, "metrics.jsonl").read_text().splitlines()]
        rates = [row["tokens_per_second"] for row in log if "tokens_per_second" in row][1:]
        print(
            f"trained in {seconds:.1f} s, {statistics.median(rates):.0f} tokens/s; val loss {losses[0]} to {losses[-1]}"
        )

        code = killed(steps // 2 + 2, *flags, "-o", parts)
        out, resumed = call("train", *flags, "-o", parts, "-y", 1)
        start = re.search(r"resuming from step (\d+)", out)
        names = [f"model_{steps:08d}.bin", f"state_{steps:08d}_00000.bin"]
        equal = all(Path(whole, name).read_bytes() == Path(parts, name).read_bytes() for name in names)
        ok = equal and code == -signal.SIGKILL and start is not None
        print(f"killed after step {steps // 2 + 2} (exit code {code}), resumed from step {start and start[1]} in"
              f" {resumed:.1f} s: model and state are {'bit-equal' if equal else 'NOT EQUAL'}")  # fmt: skip

        out, _ = call("evaluate", parts, "-j", val, "-b", B, "-t", T, "--device", device)
        loss = float(re.search(r"^val loss ([\d.]+)", out, re.M)[1])
        ok &= abs(loss - losses[-1]) <= 1e-5 * loss
        call("export", parts, hf, "--tokenizer", tokenizer)
        worst = logit_difference(parts, hf, 2, min(T, 256), device)
        ok &= worst is None or worst <= LOGITS
        compared = (
            "transformers is absent" if worst is None else f"largest difference to transformers' {100 * worst:.4f} %"
        )
        print(f"evaluated: val loss {loss:.6f}, in training {losses[-1]:.6f}; exported: logits, {compared}")
    row = dict(bench="run", name="llmc", model=model, dtype="bf16" if device == "cuda" else "fp32", B=B, T=T)
    row |= dict(steps=steps, seconds=round(seconds, 1), resumed_s=round(resumed, 1), val_loss=loss)
    row |= dict(tokens_per_second=round(statistics.median(rates)), bit_equal="yes" if equal else "no")
    rows.append(row | dict(difference="absent" if worst is None else round(worst, 7)))
    return ok


SECTIONS = dict(
    tests=tests, parity=parity, speed=speed, ops=ops, start=start, rungs=rungs, run=run, ranks=bench_ranks.compare,
    sanitize=sanitize.sanitize,
)  # fmt: skip
ASKED_FOR = ("ranks", "sanitize")  # sections that run only when they are named


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (all but {' and '.join(ASKED_FOR)})"
    )
    p.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="test processes (12)")
    p.add_argument("--csv", metavar="FILE", help="append the rows (dev/results/<device>.csv)")
    bench_ranks.add_flags(p.add_argument_group("ranks"))
    sanitize.add_flags(p.add_argument_group("sanitize"))
    args = p.parse_args(argv)
    wrong = set(args.sections) - set(SECTIONS)
    if wrong:
        p.error(f"no section {', '.join(sorted(wrong))}: there are {', '.join(SECTIONS)}")
    bench_ranks.fill_flags(p, args, "cuda")
    if args.device == "cpu" and args.sections != ["ranks"]:
        p.error("--device cpu is for the section ranks alone")
    try:
        from llmc import devices

        ops, *_ = devices.pick_device(args.device)
        device = ops.device.describe()
        print(f"{device} | commit {bench.commit()}\n")
        csv = args.csv or ROOT / "dev" / "results" / (re.sub(r"\W+", "_", device.split(",")[0].lower()) + ".csv")
        ok = True
        for name in args.sections or [section for section in SECTIONS if section not in ASKED_FOR]:
            rows, begun = [], time.perf_counter()
            print(f"-- {name}")
            ok &= SECTIONS[name](args, rows) is not False
            about = dict(date=time.strftime("%Y-%m-%d"), commit=bench.commit(), device=device.split(",")[0])
            bench.append_rows(csv, [dict(bench=row["bench"]) | about | row for row in rows])
            print(f"-- {name}: {time.perf_counter() - begun:.0f} s\n", flush=True)
    except UserError as error:
        sys.exit(f"gpu_check: {error}")
    print("all good" if ok else "NOT all good")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
