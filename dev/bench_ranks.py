"""Two ranks on two cores against one rank on one core: the same run of llmc.train, over MPI on the CPU op set.

    python dev/bench_ranks.py                             tiny:d4, B=12, T=96, -d 4608: the default job, twice its batch
    python dev/bench_ranks.py -e tiny:d6 -z 1 --rounds 5

Both train on the same tokens (-d is the same; one rank makes twice the micro-steps) and must find the same losses, else
the benchmark ends. Each rank is bound to one core and has one thread. Runs alternate; of each the median step counts,
without the first two. What could be had is 2; the sum of the gradients, the gathering of shares and memory that both
cores share take from it. Other work on the machine slows two ranks more than one, as the slower of the two counts: the
best runs of both are compared as well. The last line of output is JSON.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-e", "--model", default="tiny:d4")
    parser.add_argument("-b", "--batch-size", type=int, default=12)
    parser.add_argument("-t", "--sequence-length", type=int, default=96)
    parser.add_argument("-z", "--zero-stage", default="0")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-steps of each of the two ranks in a step")
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    total = 2 * args.accumulate * args.batch_size * args.sequence_length
    flags = ["-e", args.model, "-b", args.batch_size, "-t", args.sequence_length, "-d", total, "-x", args.steps]
    flags += ["-v", 0, "-s", 0, "-n", 0, "-k", "constant", "--device", "cpu", "--tokenizer", "bytes"]
    train = [sys.executable, "-m", "llmc.train", *map(str, flags)]
    mpirun = os.path.join(os.path.dirname(sys.executable), "mpirun")
    commands = {
        1: [mpirun, "-n", "1", "-bind-to", "core", *train],
        2: [mpirun, "-n", "2", "-bind-to", "core", *train, "-z", args.zero_stage],
    }
    print(f"{args.model}, -d {total}, -z {args.zero_stage}; load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    rates = {1: [], 2: []}
    for _ in range(args.rounds):
        losses = {}
        for P, command in commands.items():
            rows = run(command)
            losses[P] = [row["train_loss"] for row in rows]
            rates[P].append(statistics.median(row["tokens_per_second"] for row in rows[2:]))
        worst = max(abs(a - b) / a for a, b in zip(losses[1], losses[2], strict=True))
        if worst > 1e-4:
            sys.exit(f"the losses differ by {worst:.1e}: {losses}")
        one, two = rates[1][-1], rates[2][-1]
        print(f"1 rank {one:8.0f} tok/s   2 ranks {two:8.0f} tok/s   x {two / one:.2f}   load {os.getloadavg()[0]:.2f}")
    median = statistics.median(b / a for a, b in zip(rates[1], rates[2], strict=True))
    best = max(rates[2]) / max(rates[1])
    print(f"2 ranks / 1 rank: median {median:.2f}, best against best {best:.2f}")
    print(json.dumps(dict(vars(args), tokens_per_second=rates, median=median, best=best)))


def run(command):
    """The training rows of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "PYTHONPATH": ROOT}
        done = subprocess.run([*command, "-o", folder], env=environ, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            return [row for row in map(json.loads, file) if "train_loss" in row]


if __name__ == "__main__":
    main()
