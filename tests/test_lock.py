"""The lock on a file: one holder, a process that dies lets go of it, and the file can be removed while others wait."""

import errno
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmc.files import lock as locks
from llmc.files.lock import held, holder, waited_for

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(locks.__file__).parents[2])}


def python(code, *args):
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True)


HOLD = """
import sys
from llmc.files.lock import held
with held(sys.argv[1]) as locked:
    print(locked, flush=True)
    sys.stdin.read()
"""


def test_the_second_is_told_who_has_it_and_a_killed_holder_lets_go(tmp_path):
    path = str(tmp_path / "lock")
    with python(HOLD, path) as process:
        assert process.stdout.readline() == "True\n"
        with pytest.raises(BlockingIOError), held(path):
            pass
        assert holder(path) == f"process {process.pid} on {platform.node()}"
        process.send_signal(signal.SIGKILL)
        process.wait()
    with held(path) as locked:
        assert locked and holder(path) == f"process {os.getpid()} on {platform.node()}"
        with pytest.raises(BlockingIOError), held(path):
            pass
        assert os.path.exists(path), "who does not get it leaves it alone"
    assert not os.path.exists(path)


def test_a_lock_file_that_its_owner_removes_is_not_taken(monkeypatch, tmp_path):
    """The owner leaves between another process's open and lock: the lock of a file that is gone protects nothing."""
    real, path = locks.lock_descriptor, str(tmp_path / "lock")

    def lock_of_a_gone_file(fd):
        monkeypatch.setattr(locks, "lock_descriptor", real)
        os.remove(path)
        return real(fd)

    monkeypatch.setattr(locks, "lock_descriptor", lock_of_a_gone_file)
    with held(path):
        assert os.path.exists(path)
        with pytest.raises(BlockingIOError), held(path):
            pass
    assert not os.path.exists(path)


def test_what_a_lock_file_says_is_not_trusted(tmp_path, monkeypatch):
    """Its text may be another program's: control characters are not shown."""
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: None)
    path = tmp_path / "lock"
    for text in (b"", b"12 \x1b[31mhost", b"x y", b"\xff\xfe"):
        path.write_bytes(text)
        assert holder(str(path)) == "another process"


COUNT = """
import sys
from llmc.files.lock import waited_for
for _ in range(50):
    with waited_for(sys.argv[1], "it counts"):
        with open(sys.argv[2]) as file:
            number = int(file.read())
        with open(sys.argv[2], "w") as file:
            file.write(str(number + 1))
"""


def test_blocks_of_several_processes_do_not_overlap(tmp_path):
    (tmp_path / "number").write_text("0")
    running = [python(COUNT, tmp_path / "lock", tmp_path / "number") for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert (tmp_path / "number").read_text() == "200" and os.listdir(tmp_path) == ["number"]


def test_a_waiting_process_says_for_whom(tmp_path, monkeypatch, capsys):
    path = str(tmp_path / "lock")
    other = held(path)
    other.__enter__()
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: other.__exit__(None, None, None))
    with waited_for(path, "it prepares data in X") as locked:
        assert locked
    waits = f"waiting for process {os.getpid()} on {platform.node()}: it prepares data in X\n"
    assert capsys.readouterr().err == waits


def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with held(str(tmp_path / "lock")) as locked:
        assert not locked
