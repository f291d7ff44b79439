"""Several ranks against one: speed, what of the communication shows, equal weights and losses, and the death of a rank.

    python dev/bench_ranks.py                               two cores: tiny:d4, over MPI
    python dev/bench_ranks.py -e tiny:d6 -z 1 --rounds 3
    python dev/bench_ranks.py --device cuda --ranks 2,4,8 --price 2.5
                                                            GPUs, over NCCL: GPT-2 124M and 1558M; gpu_check.py ranks

losses   In fp32, of the same tokens, on one rank and on P: equal to 1e-6, as sums of another order are.
speed    Each rank has the same batch, B x T tokens, however many there are. The time of a step is the host's, from the
         tokens in NumPy to the mean loss of all ranks; efficiency is the time of one rank in this call / that of P.
hidden   The same steps once more without sums, shares and gathering: what they take less is what communication adds to
         a step. Bytes are those that a rank sends in a step, by a ring: 2 (P-1)/P of the gradients.
weights  After the timed steps: bit for bit the same on all ranks.
pace     Steps of --batch-tokens tokens on the most ranks, and what --run-steps of them would take: hours and, at
         --price, dollars. They are calculated from the measured steps; nobody has waited for the run.
death    One of the most ranks is killed in the trainer: the others end within 30 s with a line that names it, and half
         as many ranks go on from the checkpoint to the losses of a run that was not killed.

On CPUs each rank is bound to one core and has one thread. Other work on the machine slows several ranks more than one,
as the slowest counts. Exit code 1 if weights or losses differ, or a death is not noticed. The last line is JSON.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from llmc.errors import UserError

ROOT = str(Path(__file__).resolve().parents[1])

MODELS = {"cpu": [("tiny:d4", (12,), 96)], "cuda": [("d12", (32, 64), 1024), ("d48", (8, 16), 1024)]}
BATCH_TOKENS, RUN_STEPS = 1 << 20, 32000  # llm.c's run of 1558M: scripts/run_gpt2_1558M.sh
LOSSES = 1e-6  # relative difference that fp32 sums in another order may make
LATER = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}  # the same for losses after steps on other numbers of ranks
NOTICED = 30  # seconds that the other ranks have to end after a death
TCP = ["-pi", "tcp", "-ps", "127.0.0.1", "-pg", "8"]

# ----------------------------------------------------------------------------------------------------------------------
# a rank: `bench_ranks.py --rank CASES.json`, started P times


class Silent:
    """A communicator that moves no arrays: the step as it is without communication. Its results are wrong."""

    def __init__(self, communicator):
        self.rank, self.size, self.sums = communicator.rank, communicator.size, communicator.sums

    def all_reduce(self, arrays):
        pass

    def reduce_scatter(self, shares, arrays):
        pass

    def all_gather(self, arrays, shares):
        pass

    def wait(self):
        pass


def batches_of(case, rank, P):
    """[(inputs (M, B, T), targets)] of each step: all ranks' micro-batches in turn, so that P does not matter."""
    import numpy as np

    B, T, M, V = case["B"], case["T"], case["micro_steps"], case["vocab_size"]
    found = []
    for step in range(case["distinct"]):
        tokens = [np.random.default_rng([step, m * P + rank]).integers(0, V, (B, T + 1), np.int32) for m in range(M)]
        found.append((np.stack([t[:, :-1] for t in tokens]), np.stack([t[:, 1:] for t in tokens])))
    return found


def steps_of(model, batches, steps, start=0):
    """([ms], [loss]) of as many steps."""
    from llmc.model import AdamW

    adamw, ms, losses = AdamW(lr=1e-4, weight_decay=0.1), [], []
    for t in range(start, start + steps):
        inputs, targets = batches[t % len(batches)]
        begun = time.perf_counter()
        for micro_step, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            model.forward(x)
            model.backward(x, y, len(inputs), micro_step)
        model.update(adamw, t + 1)
        losses.append(model.mean_loss(len(inputs)))
        ms.append((time.perf_counter() - begun) * 1e3)
    return ms, losses


def model_of(case, ops, ranks, communicator, folder, weights):
    """The case's model. Fresh weights are made once, by the first rank that needs them, and kept as a file.

    weights: {(model, dtype): what this process has read of them}.
    """
    import numpy as np

    from llmc import devices, gpt2
    from llmc.model import Model
    from llmc.parallel import launch, zero

    rank, P = (ranks.rank, ranks.size) if ranks else (0, 1)
    config, dtype = gpt2.config_from_descriptor(case["model"], case["vocab_size"], case["T"]), case["dtype"]
    specs, dtype = gpt2.parameter_specs(config), np.dtype(devices.model_dtype(case["dtype"]))
    if case["device"] == "cuda":
        devices.prepare_kernels(config, dtype, tensors=len(specs))
    partition = zero.partition(specs, rank, P) if case["zero_stage"] and P > 1 else None
    if case["zero_stage"] and partition is None:
        raise UserError(f"-z 1: {config.channels} channels cannot be cut into {P} shares. HINT: -z 0.")
    model = Model(
        gpt2, ops, config, case["B"], case["T"], dtype=dtype, graphs=case["device"] == "cuda", ranks=communicator,
        partition=partition,
    )  # fmt: skip
    path, key = folder / f"{case['model'].replace(':', '_')}.npy", (case["model"], dtype.name)

    def make():
        if not path.exists():
            model.init_weights()
            np.save(path, ops.device.download(model.params_flat).astype(np.float32))

    launch.rank0_first(ranks, make)
    if key not in weights:
        weights.clear()
        weights[key] = np.load(path, mmap_mode="r").astype(dtype)
    model.load_parameters(weights[key])
    return model


def measure(case, ops, ranks, communicator, folder, weights):
    """One case -> {ms, losses, ...}; all ranks call it."""
    rank, P = (ranks.rank, ranks.size) if ranks else (0, 1)
    model, batches = model_of(case, ops, ranks, communicator, folder, weights), batches_of(case, rank, P)
    count = case["warm_up"] + case["steps"]
    ms, losses = steps_of(model, batches, count)
    found = dict(ms=ms[case["warm_up"] :], losses=losses)
    sent = 2 * model.grads_flat.nbytes if model.share is None else model.grads_flat.nbytes + model.params_flat.nbytes
    found["bytes"] = sent * (P - 1) // P
    if ranks:
        sums = ranks.exchange(zlib.crc32(ops.device.download(model.params_flat).view("u1")))
        found["same_weights"] = len(set(sums)) == 1
        found["ms"] = max(ranks.exchange(found["ms"]), key=statistics.median)
    if ranks and case["hidden"]:
        model.ranks, model.graphs = Silent(communicator), None if model.graphs is None else {}
        if model.share:
            ops.device.zero(model.share.grads)  # no sum is scattered into these: as zeros they are at least finite
        silent, _ = steps_of(model, batches, count, count)
        found["silent_ms"] = max(statistics.median(times) for times in ranks.exchange(silent[case["warm_up"] :]))
    del model
    gc.collect()  # graphs refer to their model
    if case["device"] == "cuda":
        ops.module.import_cupy().get_default_memory_pool().free_all_blocks()
    return found


def rank_main(path, argv):
    """Measure the cases of a file on this rank; rank 0 writes what was found beside it."""
    from llmc.parallel import launch
    from llmc.parallel.world import meeting_place, world
    from llmc.training import flags

    args = flags.parser().parse_args(argv)
    who = world(args.process_count, args.process_rank, args.gpus_per_node)
    place = meeting_place(who, args.nccl_init_method, args.server_ip, args.fs_path)
    with launch.launched(who, place, args.device) as ranks:
        ops, device, line, communicator = launch.pick_device(args.device, args.threads, ranks)
        cases = json.loads(Path(path).read_text())
        weights = {}
        found = [measure(case, ops, ranks, communicator, Path(path).parent, weights) for case in cases]
        if who.rank == 0:
            Path(path + ".found").write_text(json.dumps(dict(line=line, found=found)))


def train_main(step, rank, argv):
    """llmc.train, in which this rank is killed before the given step, after it has written down the time."""
    from llmc import train
    from llmc.training.loop import Loop

    do_step = Loop.step

    def step_or_die(self, at):
        if (at, self.model.rank) == (step, rank):
            Path(self.run.folder.path, "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        do_step(self, at)

    Loop.step = step_or_die
    sys.exit(train.main(argv))


# ----------------------------------------------------------------------------------------------------------------------
# starting ranks


def commands(command, P, device):
    """The commands that start a run: one mpirun for all ranks, or a process for each rank, which is told its number."""
    if device == "cpu":
        mpirun = os.path.join(os.path.dirname(sys.executable), "mpirun")
        bind = ["-bind-to", "core"] if P <= (os.cpu_count() or 1) else []
        return [[mpirun, "-n", str(P), *bind, *command, "--threads", "1"]]
    if P == 1:
        return [command]
    return [[*command, "-pn", str(P), "-pr", str(rank), *TCP] for rank in range(P)]


def start(command, P, device):
    """Run the processes of a command to their ends -> ([exit code], their output).

    NVLink multicast stays off: ranks are killed here, and one that dies in it can take the host's GPUs along.
    """
    environ = {**os.environ, "PYTHONPATH": ROOT, "NCCL_NVLS_ENABLE": "0"}
    running = [
        subprocess.Popen(each, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for each in commands(list(map(str, command)), P, device)
    ]
    outputs = [process.communicate()[0] for process in running]
    return [process.returncode for process in running], "\n".join(filter(None, outputs))


def measured(cases, P, device, folder):
    """Runs the cases on P ranks -> (the device in words, what they found of each case)."""
    path = Path(folder, "cases.json")
    path.write_text(json.dumps(cases))
    codes, output = start([sys.executable, __file__, "--rank", path, "--device", device], P, device)
    if any(codes):
        raise UserError(f"{P} ranks ended with {codes}:\n{output[-4000:]}")
    found = json.loads(Path(f"{path}.found").read_text())
    return found["line"], found["found"]


# ----------------------------------------------------------------------------------------------------------------------
# what is compared


def vocabulary(model):
    return 257 if model.startswith("tiny:") else 50257


def cases_of(args, P):
    """The cases of P ranks: losses; speed of every model, batch and ZeRO stage; and, on the most ranks, the pace."""
    most, stages = max(args.ranks), args.zero_stages if P > 1 else [0]
    common = dict(device=args.device, dtype=args.dtype, micro_steps=1, distinct=4, warm_up=3, steps=args.steps)
    common["hidden"] = True
    model, sizes, T = args.models[0]
    once = dict(common, dtype="fp32", warm_up=0, steps=4, micro_steps=most // P, hidden=False, B=min(4, *sizes), T=T)
    once |= dict(kind="losses", model=model, vocab_size=vocabulary(model))
    cases = [dict(once, zero_stage=z) for z in stages]
    for model, sizes, T in args.models:
        common |= dict(model=model, vocab_size=vocabulary(model), T=T)
        cases += [dict(common, kind="speed", B=B, zero_stage=z) for B in sizes for z in stages]
    B = max(sizes)
    if P == most and args.batch_tokens % (P * B * T) == 0:
        pace = dict(common, kind="pace", B=B, zero_stage=max(stages), micro_steps=args.batch_tokens // (P * B * T))
        cases.append(dict(pace, hidden=False, steps=4, warm_up=2, distinct=2))
    return cases


HEADER = (
    f"{'model':<9}{'B':>4}{'T':>6}{'-z':>4}{'P':>3}{'ms p50':>10}{'p20':>9}{'p80':>9}{'tokens/s':>11}{'efficiency':>12}"
    f"{'MB sent':>10}{'not hidden':>19}{'weights':>9}"
)


def speed_row(case, f, P, alone):
    """Print a line of the table, and return its row. alone: ms of one rank."""
    ms, ranked = statistics.median(f["ms"]), sorted(f["ms"])
    p20, p80 = (ranked[int(q * (len(ranked) - 1))] for q in (0.2, 0.8))
    row = dict(bench="ranks", **{k: case[k] for k in ("model", "B", "T", "zero_stage", "dtype")}, ranks=P)
    row |= dict(ms_p50=round(ms, 3), ms_p20=round(p20, 3), ms_p80=round(p80, 3))
    row |= dict(tokens_per_second=round(P * case["B"] * case["T"] / ms * 1e3), efficiency=round(alone / ms, 4))
    row |= dict(bytes=f["bytes"])
    hidden = weights = ""
    if P > 1:
        row |= dict(not_hidden_ms=round(ms - f["silent_ms"], 3), same_weights=f["same_weights"])
        hidden = f"{row['not_hidden_ms']:.2f} ms, {100 * row['not_hidden_ms'] / ms:.1f} %"
        weights = "equal" if f["same_weights"] else "DIFFER"
    print(
        f"{case['model']:<9}{case['B']:>4}{case['T']:>6}{case['zero_stage']:>4}{P:>3}{ms:>10.2f}{p20:>9.2f}{p80:>9.2f}"
        f"{row['tokens_per_second']:>11}{100 * row['efficiency']:>10.1f} %{f['bytes'] / 1e6:>10.1f}{hidden:>19}"
        f"{weights:>9}"
    )
    return row


def same_losses(case, f, P, alone):
    """Whether the losses equal those of one rank on the same tokens."""
    worst = max(abs(a - b) / a for a, b in zip(alone, f["losses"], strict=True))
    equal = worst <= LOSSES and f["same_weights"]
    verdict = "equal to fp32 rounding" if equal else "NOT EQUAL"
    print(f"losses of {case['model']}, fp32, on {P} ranks, -z {case['zero_stage']}: {verdict}, {worst:.1e} apart")
    return equal


def pace_row(args, case, f, P):
    """Print the hours and dollars of the long run, and return the row."""
    ms = statistics.median(f["ms"])
    hours, rate = ms / 3.6e6 * args.run_steps, args.batch_tokens / ms * 1e3
    cost = f" and {hours * P * args.price:,.2f} dollars at {args.price:g} a GPU-hour" if args.price else ""
    print(
        f"{case['model']} on {P} ranks, -z {case['zero_stage']}: a step of {args.batch_tokens:,} tokens takes {ms:.0f} "
        f"ms, {rate:,.0f} tokens/s\n{args.run_steps:,} such steps: {hours:.2f} hours{cost}, calculated from "
        f"{len(f['ms'])} measured steps, not run"
    )
    row = dict(bench="ranks_pace", model=case["model"], B=case["B"], T=case["T"], zero_stage=case["zero_stage"])
    return row | dict(dtype=case["dtype"], ranks=P, batch_tokens=args.batch_tokens, ms_p50=round(ms, 1),
                      hours=round(hours, 2))  # fmt: skip


def compare_speed(args, rows, folder):
    """Losses, speed and pace of every number of ranks -> whether losses and weights are equal."""
    ok, alone = True, {}
    for P in sorted({1, *args.ranks}):
        cases = cases_of(args, P)
        line, results = measured(cases, P, args.device, folder)
        if P == 1:
            print(f"{line}; {args.dtype}; load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores\n{HEADER}")
        for case, f in zip(cases, results, strict=True):
            key = case["kind"], case["model"], case["B"]
            alone.setdefault(key, f)
            if case["kind"] == "speed":
                rows.append(speed_row(case, f, P, statistics.median(alone[key]["ms"])))
            elif case["kind"] == "pace":
                rows.append(pace_row(args, case, f, P))
            elif P > 1:
                ok &= same_losses(case, f, P, alone[key]["losses"])
            ok &= f.get("same_weights", True)
        sys.stdout.flush()
    return ok


def death(args, P):
    """Whether the others notice the death of one of P ranks in time, and half as many go on to the same losses."""
    model, sizes, T = args.models[0]
    with tempfile.TemporaryDirectory() as folder:
        train, val = shards_of(model, folder)
        flags = ["-i", train, "-j", val, "-e", model, "-b", min(4, *sizes), "-t", T, "-d", P * min(4, *sizes) * T]
        flags += ["-x", 12, "-n", 3, "-nk", 2, "-v", 0, "-s", 0, "-z", max(args.zero_stages), "--device", args.device]
        flags += ["--dtype", args.dtype]

        def run(ranks, out, *more, die=(-1, -1)):
            command = [sys.executable, __file__, "--train", *die, *flags, "-o", os.path.join(folder, out), *more]
            codes, output = start(command, ranks, args.device)
            return codes, output, time.time()

        whole, parts = (Path(folder, name) for name in ("whole", "parts"))
        codes, output, _ = run(P, whole)
        if any(codes):
            raise UserError(f"{P} ranks ended with {codes}:\n{output[-4000:]}")
        codes, output, ended = run(P, parts, die=(7, P - 1))
        if not (parts / "died").exists():
            raise UserError(f"nobody was killed; {P} ranks ended with {codes}:\n{output[-4000:]}")
        seconds = ended - float((parts / "died").read_text())
        line = next((text for text in output.splitlines() if f"rank {P - 1} died" in text), None)
        ok = line is not None and 0 not in codes and seconds <= NOTICED
        print(f"rank {P - 1} of {P} killed in step 8: the others ended {seconds:.1f} s later with {sorted(set(codes))}")
        print(f"  {line or 'NO LINE NAMES IT: ' + output[-500:]}")
        codes, output, _ = run(P // 2, parts, "-y", 1)
        if any(codes):
            print(f"{P // 2} ranks do not go on: {codes}\n{output[-2000:]}")
            return False
        worst = max(abs(a - b) / a for a, b in zip(losses_in(whole), losses_in(parts), strict=True))
        ok &= worst <= LATER[args.dtype]
        print(f"{P // 2} of them went on to step 12; losses {worst:.1e} apart from those of a run that nobody killed")
    return ok


def losses_in(folder):
    """The training losses of a run's metrics, step by step."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [loss for _, loss in sorted({r["step"]: r["train_loss"] for r in rows if "train_loss" in r}.items())]


def shards_of(model, folder):
    """Tiny Shakespeare: in bytes for tiny models, else in GPT-2's tokens. Random tokens where it cannot be had."""
    from dev.gpu_check import shards
    from llmc.data.prepare import prepare_default

    if model.startswith("tiny:"):
        return prepare_default("bytes", allow_fallback=True)[:2]
    return shards(folder, 1 << 20, 50257)[:2]


def compare(args, rows):
    """Runs every part -> whether everything is as it should be."""
    ok = True
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            ok &= compare_speed(args, rows, folder)
    return ok & (death(args, max(args.ranks)) if args.death else True)


def add_flags(parser):
    """The flags of the comparison, also for gpu_check.py."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="where the ranks compute")
    add("--ranks", default="2", metavar="P,...", help="numbers of ranks, beside one (2)")
    add("-e", "--model", metavar="NAME", help="one model in the place of the default ones")
    add("-b", "--batch-size", metavar="B,...", help="rows of each rank (the model's)")
    add("-t", "--sequence-length", type=int, metavar="T", help="(GPU 1024, CPU 96)")
    add("-z", "--zero-stage", default="0,1", metavar="Z,...", help="ZeRO stages (0,1)")
    add("--dtype", choices=tuple(LATER), help="(GPU bf16, CPU fp32)")
    add("--steps", type=int, default=12, help="timed steps (12)")
    add("--rounds", type=int, default=1, help="times that all is measured (1)")
    add("--no-death", dest="death", action="store_false", help="leave the killed rank out")
    add("--price", type=float, metavar="DOLLARS", help="of a GPU-hour, for the cost of the long run")
    text = "tokens of a step of the long run (1,048,576; on CPUs 8 batches of the most ranks)"
    add("--batch-tokens", type=int, metavar="N", help=text)
    add("--run-steps", type=int, default=RUN_STEPS, metavar="N", help=f"its steps ({RUN_STEPS:,})")


def fill_flags(parser, args, device):
    """Fills in what the flags leave open; it depends on the device."""
    args.device = args.device or device
    names = [("ranks", args.ranks), ("zero_stages", args.zero_stage), ("sizes", args.batch_size or "0")]
    try:
        for name, text in names:
            setattr(args, name, [int(value) for value in text.split(",")])
    except ValueError:
        parser.error(f"{text}: whole numbers with commas between them are wanted")
    if min(args.ranks) < 2 or any(max(args.ranks) % P for P in args.ranks):
        parser.error(f"--ranks {args.ranks}: numbers from 2 that divide the largest are wanted")
    args.models = MODELS[args.device]
    if args.model:
        args.models = [(args.model, *args.models[0][1:])]
    given, T = tuple(args.sizes) if args.batch_size else None, args.sequence_length
    args.models = [(model, given or sizes, T or length) for model, sizes, length in args.models]
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    once = max(args.ranks) * max(args.models[-1][1]) * args.models[-1][2]
    args.batch_tokens = args.batch_tokens or (BATCH_TOKENS if args.device == "cuda" else 8 * once)
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--rank"]:
        return rank_main(argv[1], argv[2:])
    if argv[:1] == ["--train"]:
        return train_main(int(argv[1]), int(argv[2]), argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--csv", metavar="FILE", help="append a row for each measurement")
    args, rows = fill_flags(parser, parser.parse_args(argv), "cpu"), []
    try:
        ok = compare(args, rows)
    except UserError as error:
        sys.exit(f"bench_ranks: {error}")
    if args.csv:
        from dev import bench

        bench.append_rows(args.csv, [dict(bench=row["bench"], commit=bench.commit()) | row for row in rows])
    print(json.dumps(dict(ok=ok, rows=rows)))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
