"""Runs of several real processes under mpirun, on the CPU op set."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmc import gpt2, train
from llmc.data.loader import DataLoader
from llmc.data.shards import write_shard
from llmc.errors import UserError
from llmc.files import checkpoints, state_file
from llmc.training import setup
from llmc.training.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
BATCH = ("-e", "tiny:d2", "-b", "2", "-t", "32", "-d", "512", "-x", "6", "-v", "3", "-m", "-1", "-s", "0", "-n", "3")

# llmc.train, whose weights are compared over the ranks, bit by bit, after every update; STEP RANK: who dies, and when
TRAIN = """
import os, signal, sys, zlib
from llmc import train
from llmc.model import Model
from mpi4py import MPI
step, rank = map(int, sys.argv[1:3])
update = Model.update
def update_and_compare(self, *args):
    update(self, *args)
    sums = MPI.COMM_WORLD.allgather(zlib.crc32(self.params_flat))
    assert len(set(sums)) == 1, f"the weights differ after step {args[-1]}: {sums}"
    if args[-1] == step and MPI.COMM_WORLD.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
Model.update = update_and_compare
sys.exit(train.main(sys.argv[3:]))
"""


def start(P, *command, **environ):
    pytest.importorskip("mpi4py")
    if not MPIRUN:
        pytest.skip("no mpirun: pip install mpich")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    mpirun = [MPIRUN, "-n", str(P)] if P else []
    return subprocess.run([*mpirun, *command], env=environ, capture_output=True, text=True, timeout=100)


def run(P, shards, out, *flags, die=(0, 0)):
    """llmc.train on P ranks; returns its training and validation losses and gradient norms: {(step, name): value}."""
    files = ("-i", shards / "train.bin", "-j", shards / "val.bin", "-o", out, "--device", "cpu")
    done = start(P, sys.executable, "-c", TRAIN, *map(str, die), *map(str, files), *BATCH, *flags)
    assert (done.returncode != 0) == (die != (0, 0)), (done.stdout, done.stderr)
    run.stdout, run.stderr = done.stdout, done.stderr
    losses = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        losses |= {(row["step"], name): row[name] for name in ("train_loss", "grad_norm", "val_loss") if name in row}
    return losses


def assert_close(losses, expected, rtol):
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        assert losses[key] == pytest.approx(value, rel=rtol), (key, losses[key], value)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(5)
    text = np.cumsum(rng.integers(-3, 4, 30000)) % 96 + 32
    write_shard(folder / "train.bin", text[:24000].astype(np.uint16), 257)
    write_shard(folder / "val.bin", text[24000:].astype(np.uint16), 257)
    return folder


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """The losses of one process, and its folder."""
    out = tmp_path_factory.mktemp("alone")
    return run(1, shards, out), out


FULL = pytest.mark.full


@pytest.mark.parametrize(
    "P, zero_stage", [(2, 0), pytest.param(2, 1, marks=FULL), pytest.param(4, 0, marks=FULL), (4, 1)]
)
def test_results_do_not_depend_on_the_number_of_processes(alone, shards, tmp_path, P, zero_stage):
    losses, folder = alone
    assert len(losses) == 6 + 6 + 3
    assert_close(run(P, shards, tmp_path, "-z", str(zero_stage)), losses, 1e-6)
    assert f"| num_processes         | {P} " in run.stdout and f"| zero_stage            | {zero_stage} " in run.stdout
    assert run.stdout.count("step    6/6") == 1 and not run.stderr  # rank 0 alone prints
    N = gpt2.num_parameters(gpt2.GPT2Config(32, 257, 384, 2, 4, 64))
    for step in (3, 6):
        assert checkpoints.latest_checkpoint(tmp_path) == 6  # every file is there and belongs to the others
        first = state_file.read_state_header(checkpoints.state_path(folder, step, 0), (N,))
        for rank in range(P):
            S = N // P if zero_stage else N
            state = state_file.read_state_header(
                checkpoints.state_path(tmp_path, step, rank), (S,), num_processes=P, rank=rank
            )
            for name in ("step", "rng_state", "rng_state_last_update"):
                assert getattr(state, name) == getattr(first, name)
            llmc = DataLoader(str(shards / "train.bin"), 2, 32, rank, P, should_shuffle=True)
            for _ in range(step * 512 // (P * 2 * 32)):
                llmc.next_batch(*np.empty((2, 2, 32), np.int32))
            for name, value in llmc.state().items():  # llm.c can go on from here, in an order of its own
                assert name == "streams" or np.array_equal(state.loader_state[name], value), name


@pytest.mark.parametrize("P, zero_stage", [(1, 0), (2, 1)])
def test_death_of_a_rank_and_elastic_resume(alone, shards, tmp_path, P, zero_stage):
    """A rank of four is killed in step 5; the run resumes from step 3 on another number of ranks."""
    run(4, shards, tmp_path, "-z", "1", die=(5, 2))
    assert "llmc.train: error: rank 2 died, the other ranks stop. HINT: -y 1 continues" in run.stderr
    assert checkpoints.latest_checkpoint(tmp_path) == 3
    assert_close(run(P, shards, tmp_path, "-z", str(zero_stage), "-y", "1"), alone[0], 1e-6)


def test_resume_on_as_many_ranks_is_bit_exact(shards, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    losses = run(2, shards, whole, "-z", "1")
    run(2, shards, parts, "-z", "1", die=(5, 0))
    assert "rank 0 died" in run.stderr
    assert run(2, shards, parts, "-z", "1", "-y", "1") == losses
    for name in ("model_00000006.bin", "state_00000006_00000.bin", "state_00000006_00001.bin"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def test_one_process_imports_nothing_of_this(shards):
    flags = ["-i", str(shards / "train.bin"), "-j", str(shards / "val.bin"), "--device", "cpu", *BATCH[:-2], "-x", "1"]
    code = "import sys; from llmc import train; train.main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *flags], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert "step    1/1" in done.stdout, done.stderr
    assert not {"llmc.parallel.hub", "mpi4py", "cupy"} & set(done.stdout.splitlines()[-1].split())


def test_errors_are_one_line(shards):
    """Said by all ranks, by one of two that differ, by rank 0 alone, or by a process that MPI does not know."""
    train = (sys.executable, "-m", "llmc.train", "-j", str(shards / "val.bin"), "--device", "cpu")
    both = (*train, "-i", str(shards / "train.bin"), *BATCH)
    different = [*both, ":", "-n", "1", *both, "--seed", "43"]
    cases = [
        (start(2, *train, "-i", "nothing.bin", "-e", "tiny:d1"), "cannot read nothing.bin: No such file"),
        (start(2, *both, "-l", "x"), "argument -l/--learning-rate: x is not a number "),
        (start(1, *different), "rank 1 was started with --seed 43, rank 0 with --seed 42. HINT: the flags"),
        (start(2, *both, "-o", str(shards / "val.bin" / "x")), "-o "),
        (
            start(0, *both, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"),
            "this process is one of 2, but MPI sees 1",
        ),
    ]
    for done, text in cases:
        assert done.returncode == 2 and done.stderr.startswith(f"llmc.train: error: {text}"), (done.stderr, text)
        assert done.stderr.count("\n") == 1 and "HINT: " in done.stderr, done.stderr


@pytest.mark.parametrize(
    "flags, text",
    [
        (("-pn", "2"), "-pn 2 needs -pr, the rank of this process. HINT: mpirun -n 2 tells both."),
        (("-pn", "2", "-pr", "2"), "-pr 2: with -pn 2 the ranks are 0 to 1. HINT: "),
        (("-pn", "2", "-pr", "1"), "rank 1 of 2 cannot find the others. HINT: "),
    ],
)
def test_flags_of_ranks_are_refused(flags, text, capsys):
    assert train.main(flags) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"llmc.train: error: {text}") and stderr.count("\n") == 1, stderr


def test_a_batch_that_three_processes_cannot_share():
    settings = Settings(batch_size=2, total_batch_size=512, num_processes=3)
    with pytest.raises(UserError, match="-d 512 is not a multiple of -b 2 x -t 32 x 3 processes = 192. HINT: -d 192."):
        setup.total_batch_of(settings, 32)


# ----------------------------------------------------------------------------------------------------------------------
# signals

SIGNALLED = """
import os, sys
from pathlib import Path
from llmc import train
rank = os.environ.get("PMI_RANK", "0")
Path(sys.argv[1], "pid_" + rank).write_text(str(os.getpid()))
sys.exit(train.main(sys.argv[2:]))
"""


def signalled(P, out, flags, signum=None, target=None, steps=1, wait=0.0):
    """Start llmc.train on P processes, send one of them (a rank, or "mpirun") a signal; (exit code, stdout, stderr).

    The signal comes `wait` seconds after so many steps; after the start for 0.
    """
    command = [sys.executable, "-c", SIGNALLED, str(out.parent), *map(str, flags), "-o", str(out), "-y", "1"]
    mpirun = [MPIRUN, "-n", str(P)] if P > 1 else []
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    pids = {rank: out.parent / f"pid_{rank}" for rank in range(P)}
    for path in pids.values():
        path.unlink(missing_ok=True)
    with subprocess.Popen([*mpirun, *command], env=environ, stdout=-1, stderr=-1, text=True, bufsize=1) as process:
        said = []
        if signum is not None:
            while sum(line.startswith("step ") for line in said) < steps and (line := process.stdout.readline()):
                said.append(line)
            time.sleep(wait)
            there = target in pids and pids[target].exists()  # a rank that has not started cannot get one
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pids[target].read_text() or 0) or process.pid if there else process.pid, signum)
        stdout, stderr = process.communicate(timeout=300)
    return process.returncode, "".join(said) + stdout, stderr


def signal_and_resume(P, shards, tmp_path, instants, steps):
    """A run that is interrupted again and again loses no step, and ends with the bits of one that was not."""
    files = ("-i", shards / "train.bin", "-j", shards / "val.bin", "--device", "cpu", "--threads", "1")
    size = ("-e", "tiny:d1", "-b", "2", "-t", "16", "-d", "64", "-x", steps)
    flags = (*files, *size, "-v", "0", "-s", "0", "-n", "100000")  # at the end there is a checkpoint in any case
    whole, parts, interrupted = tmp_path / "whole", tmp_path / "parts", 0
    code, _, stderr = signalled(P, whole, flags)
    assert code == 0, stderr
    for signum, target, after, wait in instants:
        before = checkpoints.latest_checkpoint(parts) if parts.exists() else None
        code, stdout, stderr = signalled(P, parts, flags, signum, target, after, wait)
        about = (signum, target, after, wait, stdout[-2000:], stderr)
        done = [int(line[5:].partition("/")[0]) for line in stdout.splitlines() if line.startswith("step ")]
        if done and code:
            assert code == 128 + signum, about
            assert f"interrupted by {signal.Signals(signum).name} after step {done[-1]} of {steps}. HINT: " in stderr, (
                about
            )
            assert checkpoints.latest_checkpoint(parts) == done[-1], about
            interrupted += 1
        assert done or checkpoints.latest_checkpoint(parts) == before, about
    code, _, stderr = signalled(P, parts, flags)
    assert code == 0, stderr
    names = [f"model_{steps:08d}.bin", *(f"state_{steps:08d}_{rank:05d}.bin" for rank in range(P))]
    for name in names:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    return interrupted


def test_a_signal_at_any_rank_or_the_launcher_stops_all_together(shards, tmp_path):
    pytest.importorskip("mpi4py")
    instants = [(signal.SIGTERM, "mpirun", 3, 0.0), (signal.SIGUSR1, 1, 1, 0.01)]
    assert signal_and_resume(2, shards, tmp_path, instants, 1200) == 2  # more steps than pass until a signal comes


@pytest.mark.full
@pytest.mark.parametrize("P", [1, 2])
def test_signals_at_random_instants(shards, tmp_path, P):
    pytest.importorskip("mpi4py")
    draw = random.Random(P)
    targets = ["mpirun", 0, 1] if P > 1 else [0]
    signums = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    instants = [(signal.SIGTERM, draw.choice(targets), draw.randrange(1, 20), draw.uniform(0, 0.02)) for _ in range(15)]
    instants += [(signal.SIGTERM, draw.choice(targets), 0, draw.uniform(0.0, 2.0)) for _ in range(5)]
    instants += [(signum, rank, 2, 0.0) for signum in signums for rank in range(P)]
    assert signal_and_resume(P, shards, tmp_path, instants, 2400) >= 15
