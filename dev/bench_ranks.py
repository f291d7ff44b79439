"""Several ranks against one: the same run of llmc.train, over MPI on CPU cores, or over NCCL with a GPU for each rank.

    python dev/bench_ranks.py                             two cores: tiny:d4, B=12, T=96, -d 4608
    python dev/bench_ranks.py -e tiny:d6 -z 1 --rounds 5
    python dev/bench_ranks.py --device cuda --ranks 4 -z 1       GPUs: GPT-2 124M, bf16, B=16, T=1024

All train on the same tokens (-d is the same; one rank makes P times the micro-steps) and must find the same losses, or
the benchmark ends. On CPUs each rank is bound to one core and has one thread. Runs alternate; of each the median step
counts, without the first two. What could be had is P; the sum of the gradients, the gathering of shares and memory that
cores share take from it. Other work on the machine slows several ranks more than one, as the slowest counts: the best
runs of both are compared as well. The last line of output is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, ROOT)

DEFAULTS = {"cpu": ("tiny:d4", 12, 96), "cuda": ("d12", 16, 1024)}
ALLOWED = {"fp32": 1e-4, "bf16": 5e-3, "fp16": 5e-3}  # relative difference of losses: gradients add up in another order
TCP_RANKS = ["-pi", "tcp", "-ps", "127.0.0.1", "-pg", "8"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=2, metavar="P")
    parser.add_argument("-e", "--model")
    parser.add_argument("-b", "--batch-size", type=int)
    parser.add_argument("-t", "--sequence-length", type=int)
    parser.add_argument("-z", "--zero-stage", default="0")
    parser.add_argument("--dtype", choices=tuple(ALLOWED), help="(GPU bf16, CPU fp32)")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-steps of each of the ranks in a step")
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", metavar="FILE", help="append a row for each round")
    args = parser.parse_args(argv)
    model, B, T = DEFAULTS[args.device]
    args.model, B, T = args.model or model, args.batch_size or B, args.sequence_length or T
    args.batch_size, args.sequence_length = B, T
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    P, total = args.ranks, args.ranks * args.accumulate * B * T
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-e", args.model, "-b", B, "-t", T, "-d", total, "-x", args.steps, "-v", 0, "-s", 0, "-n", 0]
        flags += ["-k", "constant", "--device", args.device, "--dtype", args.dtype, *data_flags(args, folder)]
        train = [sys.executable, "-m", "llmc.train", *map(str, flags)]
        where = f"{args.device}, {args.dtype}; load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores"
        print(f"{args.model}, -b {B} -t {T} -d {total}, -z {args.zero_stage}, {where}")
        rates, rows = {1: [], P: []}, []
        for _ in range(args.rounds):
            losses = {}
            for ranks in (1, P):
                steps = run(commands(train, ranks, args))
                losses[ranks] = [step["train_loss"] for step in steps]
                rates[ranks].append(statistics.median(step["tokens_per_second"] for step in steps[2:]))
            worst = max(abs(a - b) / a for a, b in zip(losses[1], losses[P], strict=True))
            if not worst <= ALLOWED[args.dtype]:
                sys.exit(f"the losses differ by {worst:.1e}: {losses}")
            one, several = rates[1][-1], rates[P][-1]
            print(f"1 rank {one:10.0f} tok/s   {P} ranks {several:10.0f} tok/s   x {several / one:.2f}   "
                  f"losses differ by {worst:.1e}   load {os.getloadavg()[0]:.2f}", flush=True)  # fmt: skip
            rows.append(dict(one_rank=round(one), ranks=P, tokens_per_second=round(several), difference=f"{worst:.1e}"))
    median = statistics.median(b / a for a, b in zip(rates[1], rates[P], strict=True))
    best = max(rates[P]) / max(rates[1])
    print(f"{P} ranks / 1 rank: median {median:.2f}, best against best {best:.2f}")
    if args.csv:
        from dev import bench

        own = dict(model=args.model, B=B, T=T, d=total, z=args.zero_stage, dtype=args.dtype, device=args.device)
        bench.append_rows(args.csv, [dict(bench="ranks", commit=bench.commit()) | own | row for row in rows])
    print(json.dumps(dict(vars(args), tokens_per_second=rates, median=median, best=best)))


def data_flags(args, folder):
    """Tiny Shakespeare in bytes for tiny models, else in GPT-2's tokens; tokens drawn where it cannot be had."""
    if args.model.startswith("tiny:"):
        return ["--tokenizer", "bytes"]
    from dev.gpu_check import shards

    train, val, _, _ = shards(folder, 1 << 20, 50257)
    return ["-i", train, "-j", val]


def commands(train, ranks, args):
    """What starts the processes of a run: mpirun all of them, or each by itself with its rank."""
    zero = ["-z", args.zero_stage] if ranks > 1 else []
    if args.device == "cpu":
        mpirun = os.path.join(os.path.dirname(sys.executable), "mpirun")
        return [[mpirun, "-n", str(ranks), "-bind-to", "core", *train, *zero]]
    if ranks == 1:
        return [train]
    return [[*train, *zero, "-pn", str(ranks), "-pr", str(rank), *TCP_RANKS] for rank in range(ranks)]


def run(processes):
    """The training rows of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        environ, pipe = {**os.environ, "PYTHONPATH": ROOT}, subprocess.PIPE
        running = [
            subprocess.Popen([*command, "-o", folder], env=environ, stdout=pipe, stderr=subprocess.STDOUT, text=True)
            for command in processes
        ]
        outputs = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            sys.exit("\n".join(outputs))
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            return [row for row in map(json.loads, file) if "train_loss" in row]


if __name__ == "__main__":
    main()
