"""A run folder: one run at a time, new ones are claimed, refused commands leave no trace, earlier logs stay."""

import contextlib
import errno
import os
import platform
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_train import BASE, DEFAULT, assert_one_line, files, finish, folder, lines_of, read_steps, run, start  # noqa: F401

from llmc.files import checkpoints
from llmc.training import run_folder


def test_the_second_run_is_refused_and_the_first_goes_on(capsys):
    """One line that names process and machine; the live run's temporary files stay, and it ends as if alone."""
    live = start("-x", 400, "-n", 400, "-o", "out")
    read_steps(live, 2)
    assert Path("out", ".lock").read_text() == f"{live.pid} {platform.node()}\n"
    Path("out", f".model_00000400.bin.{live.pid}.tmp").write_bytes(b"half of a checkpoint")
    for argv in (["-y", 1], [], ["-y", 1, "-x", 1]):
        assert run("-o", os.path.join("..", Path.cwd().name, "out"), *argv) == 2
        out, err = capsys.readouterr()
        assert_one_line(err, f"in use by process {live.pid} on {platform.node()}", "HINT: ")
        assert not lines_of(out, "step ") and Path("out", f".model_00000400.bin.{live.pid}.tmp").exists()
    code, out, err = finish(live)
    assert code == 0 and not err and "wrote checkpoint of step 400" in out
    assert len(lines_of(Path("out", "main.log").read_text(), "s:")) == 400 and not Path("out", ".lock").exists()


def test_a_process_that_is_killed_lets_go():
    killed = start("-x", 100000, "-o", "out")
    read_steps(killed, 1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert Path("out", ".lock").exists()
    assert run("-x", 1, "-o", "out") == 0
    assert not Path("out", ".lock").exists()


@pytest.mark.parametrize("rounds", (50,))
def test_new_folders_are_claimed(rounds, monkeypatch):
    """Runs that start together take one folder each."""
    pattern = os.path.join("runs", "job-{:03d}")
    with ThreadPoolExecutor(4) as pool, contextlib.ExitStack() as stack:
        taken = list(pool.map(lambda _: stack.enter_context(run_folder.new_folder(pattern)), range(4 * rounds)))
        assert sorted(taken) == [pattern.format(i) for i in range(1, 4 * rounds + 1)]
        Path(taken[0], "main.log").touch()
    assert os.listdir("runs") == [os.path.basename(taken[0])]  # empty ones are gone


def test_two_default_runs_at_once():
    runs = [start("-x", 1, "-b", 1, "-t", 32, "-v", 0, "-s", 0, "--seed", i, base=DEFAULT) for i in (1, 2)]
    assert [finish(process)[0] for process in runs] == [0, 0]
    assert sorted(os.listdir("runs")) == ["shakespeare-001", "shakespeare-002"]
    for name in os.listdir("runs"):
        assert len(lines_of(Path("runs", name, "main.log").read_text(), "s:0 trl")) == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["-o", "new/deep/out", "-i", "none.bin"],
        ["-o", "new/deep/out", "-d", 100],
        ["-o", "new/deep/out", "-y", 1, "-e", "d13"],
        ["-o", "there", "-y", 1, "-x", 1],
        ["-o", "there", "-y", 1, "-i", "val.bin"],
        ["-o", "there", "-x", 5],
    ],
    ids=lambda argv: " ".join(map(str, argv)),
)
def test_a_refused_command_changes_nothing(argv, capsys):
    """Neither folders nor the lock are left, and nothing of a killed run is cleaned up."""
    assert run("-x", 2, "-n", 1, "-o", "there") == 0
    for name in (".model_00000009.bin.77.tmp", "state_00000001_00001.bin", "main.log.1"):
        Path("there", name).write_bytes(b"x")
    os.remove(checkpoints.done_path("there", 1))
    before = files()
    capsys.readouterr()
    assert run("-x", 9, *argv) == 2
    assert_one_line(capsys.readouterr().err, "HINT: ")
    assert files() == before and not os.path.exists("new")


def test_a_refused_default_run_leaves_no_folder(capsys):
    assert run("-d", 100, base=DEFAULT) == 2
    assert_one_line(capsys.readouterr().err, "-d 100", "HINT: ")
    assert not os.path.exists("runs")


def test_a_fresh_run_keeps_the_logs_of_an_earlier_one(capsys):
    for number, argv in enumerate(([], [], ["-y", 1])):
        assert run("-x", 2 + number, "-o", "out", *argv) == 0
        assert ("-y 1: out holds no checkpoint; this run starts at step 0" in capsys.readouterr().out) == bool(argv)
    for name, start_of_line in (("main.log", "s:"), ("metrics.jsonl", "{")):
        counts = [len(lines_of(Path("out", n).read_text(), start_of_line)) for n in (f"{name}.1", f"{name}.2", name)]
        assert counts == [2, 3, 4]


def test_where_there_are_no_locks_the_run_says_so(monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run("-x", 1, "-o", "out") == 0
    assert "-o out: no locks there; keep other runs out of it" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="child processes inherit descriptors there")
def test_children_do_not_keep_the_lock(tmp_path):
    """What the run has started may outlive it, as the hub does."""
    with run_folder.lock(str(tmp_path)):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with run_folder.lock(str(tmp_path)):
        pass
    child.communicate(b"\n")
