"""What ends a run early: signals, on one process and on all ranks, and a stdout that accepts no more output."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_distributed import MPIRUN
from test_train import (  # noqa: F401
    BASE,
    assert_one_line,
    assert_same_run,
    environment,
    finish,
    folder,
    lines_of,
    python,
    read_steps,
    run,
    start,
)

from llmc import train
from llmc.command import silence
from llmc.files import checkpoints
from llmc.training import loop, signals
from llmc.training.logger import Display

FLAGS = ("-x", 7, "-v", 3, "-m", 1, "-n", 7)


def raise_in_step(step, signum, monkeypatch, times=1):
    """The signal comes in the middle of the 0-based step."""
    train_step = loop.train_step

    def with_signal(*args):
        if args[3] == step:
            for _ in range(times):
                signal.raise_signal(signum)
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", with_signal)


@pytest.mark.parametrize("signum", signals.SIGNALS, ids=lambda s: s.name)
def test_every_signal_saves_and_resumes(signum, monkeypatch, capsys):
    """The step is finished, what was due is left to the run that goes on, and that one ends in the undisturbed bits."""
    before = [signal.getsignal(s) for s in signals.SIGNALS]
    assert run(*FLAGS, "-o", "full") == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        raise_in_step(2, signum, patch)  # a validation is due after it
        assert run(*FLAGS, "-o", "out") == 128 + signum
    out, err = capsys.readouterr()
    assert_one_line(err, f"interrupted by {signum.name} after step 3 of 7", "-o out -y 1 continues", "HINT: ")
    assert "wrote checkpoint of step 3 to out" in out and len(lines_of(out, "val loss")) == 1
    assert [signal.getsignal(s) for s in signals.SIGNALS] == before and checkpoints.latest_checkpoint("out") == 3
    assert run(*FLAGS, "-o", "out", "-y", 1) == 0
    assert_same_run("out", "full", 7)


def test_a_scheduler_may_send_it_again(monkeypatch, capsys):
    raise_in_step(1, signal.SIGTERM, monkeypatch, times=3)
    assert run("-x", 5, "-o", "out") == 143
    assert "interrupted by SIGTERM after step 2 of 5" in capsys.readouterr().err


def test_before_the_first_step(monkeypatch, capsys):
    """At once, and the folder that was made for the run is gone."""
    for name in ("prepare", "build"):
        with monkeypatch.context() as patch:
            patch.setattr(f"llmc.training.setup.{name}", lambda *args: signal.raise_signal(signal.SIGTERM))
            assert run("-x", 5, "-o", "out") == 143
        assert_one_line(capsys.readouterr().err, "interrupted by SIGTERM before the first step", "HINT: ")
        assert not os.path.exists("out")


def test_what_was_ignored_stays_ignored(monkeypatch):
    """nohup and background shells start programs so."""
    with monkeypatch.context() as patch:
        previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            raise_in_step(1, signal.SIGHUP, patch)
            assert run("-x", 3, "-o", "out") == 0
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, previous)


def test_in_a_thread(capsys):
    """There Python has no handlers: the run works, and signals do what they did."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train.main([*BASE, "-x", "3", "-o", "out"])))
    thread.start()
    thread.join()
    assert codes == [0] and len(lines_of(capsys.readouterr().out, "step ")) == 3


def test_ctrl_c_that_a_launcher_passes_on_counts_once(monkeypatch):
    """The terminal sends it to all, the launcher once more: only a later one is impatience."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    caught = signals.Signals(patience=1.0)
    caught.finishing = True
    caught.handle(signal.SIGINT, None)
    now[0] += 0.9
    caught.handle(signal.SIGINT, None)
    assert caught.seen == signal.SIGINT
    now[0] += 0.2
    with pytest.raises(KeyboardInterrupt):
        caught.handle(signal.SIGINT, None)


def test_sigterm_of_a_real_process():
    process = start("-x", 100000, "-n", 50000, "-o", "out")
    read_steps(process, 3)
    process.terminate()
    code, _, err = finish(process)
    step = checkpoints.latest_checkpoint("out")
    assert code == 143 and step >= 3
    assert_one_line(err, f"interrupted by SIGTERM after step {step} of 100000", "-o out -y 1 continues")


@pytest.mark.parametrize("whom", ("rank 1", "all ranks"))
def test_all_ranks_stop_together(whom):
    """Whichever rank got it: one checkpoint of all of them, one line, and the run that goes on has the same bits."""
    pytest.importorskip("mpi4py")
    if not MPIRUN:
        pytest.skip("no mpirun: pip install mpich")
    argv = [*BASE, *map(str, ("-d", 128, "-x", 9, "-n", 9, "-v", 4, "-m", 1, "--threads", 1))]
    hit = {"rank 1": (1,), "all ranks": (0, 1)}[whom]
    code = f"""
import os, signal, sys
from mpi4py import MPI
from llmc import train
from llmc.command import silence
from llmc.training import loop
train_step = loop.train_step
def with_signal(*args):
    if args[3] == 4 and MPI.COMM_WORLD.rank in {hit}:
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(*args)
loop.train_step = with_signal
sys.exit(train.main(sys.argv[1:]))
"""

    def mpirun(*command):
        command = [MPIRUN, "-n", "2", sys.executable, *command]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)

    done = mpirun("-c", code, *argv, "-o", "out")
    assert done.returncode == 143, (done.stdout, done.stderr)
    assert_one_line(done.stderr, "interrupted by SIGTERM after step 5 of 9", "-o out -y 1 continues")
    assert checkpoints.checkpoint_steps("out") == [5]
    for out, resume in (("out", "1"), ("full", "0")):
        done = mpirun("-m", "llmc.train", *argv, "-o", out, "-y", resume)
        assert done.returncode == 0, done.stderr
    for name in ("model_00000009.bin", "state_00000009_00000.bin", "state_00000009_00001.bin", "main.log"):
        assert Path("out", name).read_bytes() == Path("full", name).read_bytes(), name


# ---------------------------------------------------------------------------------------------------------------------
# stdout


def test_a_reader_that_goes_away_is_no_reason_to_lose_work():
    """With -o the run goes on, stderr says so once, and the files are those of a run whose reader stayed."""
    argv = ("-x", 60, "-n", 60, "-v", 20, "-m", 1)
    process = start(*argv, "-o", "out")
    read_steps(process, 1)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=120) == 0
    process.stderr.close()
    assert err.count("\n") == 1 and "llmc.train: stdout: Broken pipe; the run goes on, its lines are in out" in err, err
    assert finish(start(*argv, "-o", "full"))[0] == 0
    assert_same_run("out", "full", 60)


def test_a_reader_of_several_ranks_that_goes_away():
    """Without -o there is nothing to go on for: all ranks end, with one line."""
    pytest.importorskip("mpi4py")
    if not MPIRUN:
        pytest.skip("no mpirun: pip install mpich")
    code = "import os, sys; from mpi4py import MPI; r, w = os.pipe(); os.close(r); MPI.COMM_WORLD.rank or os.dup2(w, 1)"
    code += "; from llmc import train; sys.exit(train.main(sys.argv[1:]))"
    command = [MPIRUN, "-n", "2", sys.executable, "-c", code, *BASE, "-x", "9", "--threads", "1"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert_one_line(done.stderr, "nobody reads stdout any more", "HINT: with -o DIR")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout(capsys):
    def to_full(*argv):
        command = [sys.executable, "-m", "llmc.train", *BASE, *map(str, argv)]
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, timeout=100)
        return done.returncode, done.stderr.decode()

    for argv in ([], ["-o", "out"]):  # found out with the tables, before anything is done
        code, err = to_full("-x", 2, "-n", 2, *argv)
        assert code == 1 and not os.path.exists("out")
        assert_one_line(err, "stdout: No space left on device", "HINT: ")
    display = Display(3, False, folder="out")
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        for _ in range(3):
            display.write("val loss 1.0")
    assert capsys.readouterr().err.count("stdout: No space left on device; the run goes on") == 1
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(sys, "stdout", full)
        try:
            Display(3, False).write("val loss 1.0")
        finally:
            silence(full)


@pytest.mark.parametrize("closed", ("stdin", "stdout", "stderr", "stdin stdout stderr"))
def test_closed_streams(closed):
    """No file gets the number of a stream, where a print would go into it."""
    numbers = [("stdin", "stdout", "stderr").index(name) for name in closed.split()]
    close = "; ".join(f"os.close({n})" for n in numbers)
    command = [sys.executable, "-m", "llmc.train", *BASE, "-x", "2", "-n", "2", "-o", "out", "-v", "1", "-m", "1"]
    code = f"import os, sys; {close}; os.execv(sys.executable, {command})"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert bool(lines_of(done.stdout, "step ")) == ("stdout" not in closed)
    assert checkpoints.latest_checkpoint("out") == 2
    assert run("-x", 2, "-n", 2, "-o", "full", "-v", 1, "-m", 1, "--threads", 2) == 0
    assert Path("out", "main.log").read_text() == Path("full", "main.log").read_text()


@pytest.mark.parametrize("encoding", ("ascii", "cp1252", "utf-16"))
def test_encodings_of_the_terminal(encoding):
    """Names and samples hold any character, a folder's any byte: what the terminal does not have is replaced."""
    name = os.fsdecode(b"run-\xff-\xe2\x88\x9e-\xc3\xa9")
    argv = ("-x", 1, "-s", 1, "-g", 40, "--temperature", 3, "-o", name, "-n", 1)
    process = start(*argv, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and not err and b"generating:" in out.replace(b"\0", b"")
    process = start(*argv, "-i", f"{name}/none.bin", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2 and b"Traceback" not in err.replace(b"\0", b"")
