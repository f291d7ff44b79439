"""The lock on a file: one holder, whoever dies lets go, and the file can be removed under waiting processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from llmc.files import lock as locks
from llmc.files.lock import Lock, locked

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(locks.__file__).parents[2])}


def python(code, *args):
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True)


HOLD = """
import sys
from llmc.files.lock import Lock
print(Lock(sys.argv[1]).acquire(), flush=True)
sys.stdin.read()
"""


def test_the_second_is_told_who_has_it_and_a_killed_holder_lets_go(tmp_path):
    path = tmp_path / "lock"
    with python(HOLD, path) as holder:
        assert holder.stdout.readline() == "None\n"
        mine = Lock(str(path))
        assert mine.acquire() == f"process {holder.pid} on {os.uname().nodename}"
        assert path.exists(), "who does not get it leaves it alone"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert mine.acquire() is None
    assert Lock(str(path)).acquire() == f"process {os.getpid()} on {os.uname().nodename}"
    mine.release()
    other = Lock(str(path))
    assert other.acquire() is None
    other.release(remove=True)
    other.release()
    assert not path.exists()


def test_a_file_removed_between_opening_and_locking_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    path, lock, tries = tmp_path / "lock", locks._lock, []

    def remove_and_lock(file):
        tries.append(file)
        if len(tries) == 1:
            path.unlink()
        return lock(file)

    monkeypatch.setattr(locks, "_lock", remove_and_lock)
    mine = Lock(str(path))
    assert mine.acquire() is None and len(tries) == 2 and path.exists()
    mine.release()


COUNT = """
import sys
from llmc.files.lock import locked
for _ in range(50):
    with locked(sys.argv[1], "it counts"):
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
    mine = Lock(str(tmp_path / "lock"))
    mine.acquire()
    monkeypatch.setattr("time.sleep", lambda seconds: mine.release())
    with locked(str(tmp_path / "lock"), "it prepares data in X"):
        pass
    assert (
        capsys.readouterr().err
        == f"waiting for process {os.getpid()} on {os.uname().nodename}: it prepares data in X\n"
    )


def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    assert Lock(str(tmp_path / "lock")).acquire() is None
